"""The shipped table of lesson 08: complete, each contrast that of its rows; and what only the study computes."""

from collections import Counter

import pytest
import torch

from qlab.affine import fake_quantize
from qlab.outliers import params_of
from qlab.studies import gptq as study

TEXTS = ("prose", "code", "documentation")
TABLE = study.load()
SEEDS = {("W4A4KV4", "Hadamard, GPTQ"): study.SEEDS}
METHODS = {(part, method) for part, method, *_ in TABLE["rows"]}


def test_everything_is_there_once():
    wanted = {(part, method, seed, text) for part, method in METHODS for seed in range(SEEDS.get((part, method), 1))
              for text in TEXTS}
    assert Counter(tuple(entry[:4]) for entry in TABLE["rows"]) == Counter(wanted)
    assert {part for part, _ in METHODS} == set(study.CONTRASTS)
    asked = {(part, method, 0, than, text) for part in study.CONTRASTS for method, than in study.CONTRASTS[part]
             for text in TEXTS}
    assert Counter(tuple(entry[:5]) for entry in TABLE["contrasts"]) == Counter(asked)
    assert set(TABLE["versions"]) == {"python", "torch"}


def test_a_contrast_is_that_of_its_rows():
    rows = {tuple(entry[:4]): entry[4:] for entry in TABLE["rows"]}
    for part, method, seed, than, text, ratio, *_ in TABLE["contrasts"]:
        assert ratio == pytest.approx(rows[part, method, seed, text][0] / rows[part, than, seed, text][0], rel=1e-3)


def test_a_row_is_the_mean_over_its_seeds_and_the_hull_of_their_intervals():
    part, method, text = "W4A4KV4", "Hadamard, GPTQ", "code"
    entries = [entry[4:] for entry in TABLE["rows"] if entry[:2] == [part, method] and entry[3] == text]
    found = study.row(part, method, text)
    assert found.kl == pytest.approx(sum(entry[3] for entry in entries) / study.SEEDS)
    assert (found.kl_low, found.kl_high) == (min(entry[4] for entry in entries), max(entry[5] for entry in entries))
    with pytest.raises(ValueError, match=r"rows of W4A4KV4, GPTQ, Latin"):
        study.row("W4A4KV4", "GPTQ", "Latin")


def test_clipped_ranges():
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    found, rows = study.clipped(x), x.flatten(0, 1)
    params = params_of(rows, "token", 4)
    inside = (rows > 0.8 * rows.amin(1, keepdim=True)) & (rows < 0.8 * rows.amax(1, keepdim=True))
    steps = params.scale.view(-1, 1).expand_as(rows)
    assert ((found.flatten(0, 1) - rows).abs() <= 0.501 * study.CLIP * steps)[inside].all()
    assert found.amax() < 0.95 * fake_quantize(rows, params).amax()
