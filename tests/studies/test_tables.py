"""What the studies ship is whole, and each contrast that of its rows; a table writes what it is given."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from qlab import smollm
from qlab.evaluation import Judge
from qlab.studies import blocks, gptq, outliers, smoothquant, spinquant, tables
from tests.small_model import small_model

TEXTS = ("prose", "code", "documentation")
SPINQUANT = {f"{part}: {method}" for part, methods in spinquant.METHODS.items() for method in methods}
METHODS = {  # what there has to be, beside what is contrasted
    "blocks": {", ".join(row) for row in blocks.ROWS}, "gptq": set(),
    "outliers": {"PyTorch int8"}, "smoothquant": {f"α {alpha}" for alpha in smoothquant.ALPHAS}, "spinquant": SPINQUANT,
}
CONTRASTS = {
    "blocks": blocks.CONTRASTS, "gptq": gptq.CONTRASTS, "outliers": outliers.CONTRASTS,
    "smoothquant": smoothquant.CONTRASTS,
    "spinquant": spinquant.CONTRASTS,
}


def seeds(study, method):
    if study == "spinquant":
        run = tables.load(study).about["run"]
        if method.endswith(spinquant.END_TO_END):
            return run["end_to_end"]
        contrasted = method.endswith((spinquant.HADAMARD, spinquant.LEARNED))
        return run["seeds"] if contrasted else spinquant.FEWER_SEEDS if "R1" in method else 1
    return gptq.SEEDS if (study, method) == ("gptq", "W4A4KV4 Hadamard, GPTQ") else 1


@pytest.mark.parametrize("study", METHODS)
def test_everything_is_there_once(study):
    found = tables.load(study)
    methods = {method for method, *_ in found.rows}
    assert METHODS[study] | {method for pair in CONTRASTS[study] for method in pair} <= methods
    assert Counter(tuple(entry[:3]) for entry in found.rows) == Counter(
        (method, seed, text) for method in methods for seed in range(seeds(study, method)) for text in TEXTS)
    once = Counter(tuple(entry[:4]) for entry in found.contrasts)
    assert set(once.values()) == {1}
    assert {(*pair, text) for *pair, _, text in once} == {(*pair, text) for pair in CONTRASTS[study] for text in TEXTS}
    assert set(found.about["versions"]) == {"python", "torch"}


@pytest.mark.parametrize("study", METHODS)
def test_a_contrast_is_that_of_its_rows(study):
    found = tables.load(study)
    rows = {tuple(entry[:3]): entry[3:] for entry in found.rows}
    for method, than, seed, text, *numbers in found.contrasts:
        one, other = rows[method, seed, text], rows.get((than, seed, text)) or rows[than, 0, text]
        assert numbers[0] == pytest.approx(one[0] / other[0], rel=2e-3)
        assert numbers[3] == pytest.approx(one[3] / other[3], rel=2e-3)
        assert numbers[1] <= numbers[0] <= numbers[2] and numbers[4] <= numbers[3] <= numbers[5]


def test_a_row_is_the_mean_over_its_seeds_and_the_hull_of_their_intervals():
    found, method = tables.load("gptq"), "W4A4KV4 Hadamard, GPTQ"
    entries = [entry[3:] for entry in found.rows if (entry[0], entry[2]) == (method, "code")]
    row = found.row(method, "code")
    assert len(entries) == 5
    assert row.kl == pytest.approx(np.mean([entry[3] for entry in entries]))
    assert (row.kl_low, row.kl_high) == (min(entry[4] for entry in entries), max(entry[5] for entry in entries))
    assert row.agreement == pytest.approx(np.mean([entry[6] for entry in entries]))


def test_what_is_not_there_is_told():
    found = tables.load("gptq")
    with pytest.raises(ValueError, match="the table must have a row of W4A4KV4 GPTQ / Latin, it has none"):
        found.row("W4A4KV4 GPTQ", "Latin")
    with pytest.raises(ValueError, match="a contrast of W4A16 GPTQ / W4A4KV4 GPTQ / code"):
        found.contrast("W4A16 GPTQ", "W4A4KV4 GPTQ", "code")


def test_a_table_writes_what_the_judges_find(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "_path", lambda study: tmp_path / study)
    model = small_model()
    judges = {text: Judge(model, torch.randint(9, (2, 33), generator=torch.Generator().manual_seed(i)))
              for i, text in enumerate(TEXTS[:2])}
    table = tables.Table("some", judges, [("a", "b"), ("c", "a")], tokens=64)
    nets = {bits: smollm.quantize_weights(model, bits) for bits in (3, 4, 5)}
    table.add("a", nets[3])  # its contrast waits for b
    table.add("b", nets[4])
    for seed, bits in enumerate((5, 4)):
        table.add("c", nets[bits], seed=seed)
    found = tables.load("some")
    assert found.about["tokens"] == 64 and len(capsys.readouterr().out.splitlines()) == len(found.rows) == 8
    assert [entry[:4] for entry in found.contrasts] == [
        *(["a", "b", 0, text] for text in judges),
        *(["c", "a", seed, text] for seed, text in product((0, 1), judges))]
    assert found.row("b", "code").kl == pytest.approx(judges["code"].compare(nets[4]).kl, rel=1e-3)
    expected = judges["code"].compare(nets[3]).versus(judges["code"].compare(nets[4]))
    assert found.contrast("a", "b", "code").kl == pytest.approx(expected.kl, rel=1e-3)
