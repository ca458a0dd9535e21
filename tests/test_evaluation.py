"""The judge against SciPy and plain perplexities, its intervals against simulation, its texts against their hashes."""

import hashlib
import itertools
import math
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import nn

from qlab import evaluation, samples, smollm
from qlab.evaluation import TEXTS, Comparison, Contrast, Judge
from qlab.outliers import dynamic_quantizers
from qlab.smollm import SITES, inserted, perplexity, quantize_weights, reweighted
from qlab.spinquant import fold_gains, random_hadamard, rotate
from qlab.studies import texts as study
from tests.small_model import SIZES, small_model, some_tokens

HASHES = {
    "prose": "65a1438b34a3c125238d8f248b3d4fd54bac3528ce7e1b629eec310481439455",
    "code": "32bb5e468b18d45a4a41b4b4d7ce20f128e2f09e4d080cea6b2a420b2100725d",
    "documentation": "a7cf5f689a1061c8b9fa605720b67c79cfd7e449fc6c6caac74ce02c1b524ca1",
    "calibration": "a7edcce10fd1f61e34549c751ea0a042ad0729c209232a215eaff73527021063",
}
PLACES = [(i, site) for i in range(SIZES.num_hidden_layers) for site in SITES]
TOKENS = some_tokens(4, 40)


def text(name):
    return Path(samples.path(f"text_{name}.txt")).read_text(encoding="utf-8")


def perturbed(model, size=0.02):
    """A copy of the model with noise on the weights of its first v."""
    weight = model.blocks[0].v.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return reweighted(model, {"blocks.0.v.weight": weight + size * noise}, "noise")


def other_head(model, size=0.05):
    noise = torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(4))
    return reweighted(model, {"head.weight": model.head.weight * (1 + size * noise)}, "another head")


def by_scipy(model, other, tokens):
    """Divergence, agreement and perplexity ratio from all logits at once."""
    with torch.inference_mode():
        p, q = (log_softmax(net(tokens[:, :-1]).double().numpy(), axis=-1) for net in (model, other))
    divergence, agreement = rel_entr(np.exp(p), np.exp(q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).mean()
    gain = np.take_along_axis(p - q, tokens[:, 1:, None].numpy(), -1)
    return divergence, agreement, math.exp(gain.mean())


# The texts


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_the_same_everywhere(name):
    content = text(name).encode()
    assert hashlib.sha256(content).hexdigest() == HASHES[name]
    assert len(content) <= 100_000
    assert "|" not in text(name) or name in ("code", "calibration")
    assert not re.search(r"[-=+]{10}", text(name)) or name in ("code", "calibration")


def test_no_text_repeats_another():
    found = {name: study.runs(text(name)) for name in TEXTS}
    for one, another in itertools.combinations(TEXTS, 2):
        assert found[one].isdisjoint(found[another]), (one, another)


def test_the_script_makes_the_texts_again():
    known = subprocess.run(["git", "cat-file", "-e", study.COMMIT], cwd=study.FOLDER, capture_output=True, check=False)
    if known.returncode or platform.python_version() != "3.11.7":
        pytest.skip("the commit or the version of Python that the texts were taken from is not here")
    assert study.make() == {name: text(name) for name in TEXTS}


def test_the_licence_of_pythons_texts_ships():
    licence = text("licence")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence and "What was changed" in licence


def test_tokens_of_the_texts():
    model = smollm.load(progress=False)
    found = evaluation.texts(model)
    assert tuple(found) == TEXTS
    for name, tokens in found.items():
        assert tokens.shape == (32, 256) and tokens.dtype == torch.int64
        assert text(name).startswith(model.tokenizer.decode(tokens[0].tolist()))
        assert torch.equal(tokens, evaluation.texts(model)[name])


def test_texts_need_a_model():
    with pytest.raises(ValueError, match="model must be a SmolLM, got str"):
        evaluation.texts("SmolLM")
    with pytest.raises(ValueError, match="model must have a tokenizer"):
        evaluation.texts(small_model())


# What is compared


@pytest.mark.parametrize("change", [perturbed, other_head, lambda model: quantize_weights(model, 4),
                                    lambda model: small_model(seed=9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergence_agreement_and_ratio_are_scipys(change, dtype):
    model = small_model(dtype)
    other, tolerance = change(model), 1e-9 if dtype == torch.float64 else 1e-4
    found = Judge(model, TOKENS).compare(other)
    divergence, agreement, ratio = by_scipy(model, other, TOKENS)
    np.testing.assert_allclose(found.divergence, divergence, rtol=tolerance, atol=tolerance / 10)
    assert found.kl == pytest.approx(divergence.mean(), rel=tolerance)
    assert found.agreement == pytest.approx(agreement)
    assert found.ratio == pytest.approx(ratio, rel=tolerance)


def test_the_ratio_is_that_of_perplexities():
    model = small_model()
    other, judge = perturbed(model, 0.2), Judge(model, TOKENS)
    assert judge.perplexity == pytest.approx(perplexity(model, TOKENS), rel=1e-12)
    found = judge.compare(other)
    assert found.ratio == pytest.approx(perplexity(other, TOKENS) / perplexity(model, TOKENS), rel=1e-12)
    assert found.low < found.ratio < found.high and found.kl_low < found.kl < found.kl_high


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_head", [False, True])
def test_the_same_model_is_no_distance_away(dtype, own_head):
    model = small_model(dtype)
    same = reweighted(model, {"head.weight": model.head.weight.clone()}, "a head of its own") if own_head else model
    found = Judge(model, TOKENS).compare(same)
    assert (found.kl, found.kl_low, found.kl_high) == (0, 0, 0)
    assert (found.ratio, found.low, found.high, found.agreement) == (1, 1, 1, 1)
    assert not found.resolved


def test_both_ways_agree(monkeypatch):
    model = small_model()
    other, judge = perturbed(model, 0.3), Judge(model, TOKENS)
    short = judge.compare(other)
    monkeypatch.setattr(evaluation, "_same", lambda weight, head: False)
    np.testing.assert_allclose(judge.compare(other).divergence, short.divergence, rtol=1e-9, atol=1e-13)


def test_a_rotated_model_is_the_same_model():
    model = small_model()
    turned = rotate(fold_gains(model), random_hadamard(SIZES.hidden_size, 0, torch.float64))
    found = Judge(model, TOKENS).compare(turned)
    assert found.kl < 1e-12 and found.agreement == 1 and found.ratio == pytest.approx(1, abs=1e-12)


def test_the_reference_is_what_the_model_was():
    model = small_model()
    judge = Judge(model, TOKENS)
    with inserted(model, dynamic_quantizers("token", 3, places=PLACES)):
        coarse = judge.compare(model)
        assert Judge(model, TOKENS).compare(model).kl == 0
    assert coarse.kl > 0.01 and judge.compare(model).kl == 0


def test_half_precision():
    model = small_model(torch.bfloat16)
    other = perturbed(model, 0.2)
    found, (divergence, _, ratio) = Judge(model, TOKENS).compare(other), by_scipy(model, other, TOKENS)
    assert found.kl == pytest.approx(divergence.mean(), rel=1e-4) and found.ratio == pytest.approx(ratio, rel=1e-4)


def test_results_do_not_depend_on_the_parts(monkeypatch):
    model = small_model()
    other = other_head(model)
    whole = Judge(model, TOKENS).compare(other)
    monkeypatch.setattr(smollm, "_HEAD_POSITIONS", 7)
    monkeypatch.setattr(evaluation, "_ROWS", 3)
    np.testing.assert_allclose(Judge(model, TOKENS).compare(other).divergence, whole.divergence, rtol=1e-9)


@pytest.mark.parametrize("change", [perturbed, other_head])
def test_logits_are_never_all_in_memory(monkeypatch, change):
    model = small_model()
    other, seen = change(model), []
    wide = evaluation.wide
    monkeypatch.setattr(smollm, "_HEAD_POSITIONS", 16)
    monkeypatch.setattr(evaluation, "wide", lambda logits: seen.append(len(logits)) or wide(logits))
    judge = Judge(model, TOKENS)
    judge.compare(other)
    assert max(seen) == 16 and sum(seen) >= 2 * 4 * 39
    kept = sum(value.numel() for part in judge._parts for value in part)
    assert kept == 4 * 39 * (2 * SIZES.hidden_size + 2)


def test_the_judge_leaves_no_graph_and_no_change():
    model = small_model().requires_grad_(True)
    tokens = TOKENS.clone()
    judge = Judge(model, tokens)
    before = judge.compare(perturbed(model))
    tokens.zero_()
    assert judge.compare(perturbed(model)) == before
    assert all(parameter.grad is None for parameter in model.parameters())


# Intervals


def simulated(rng, sequences, skew):
    """Values that depend on their neighbours: normal of mean 0, or, skewed as divergences are, of mean 1."""
    noise, x = rng.standard_normal((sequences, 255)), np.zeros((sequences, 255))
    x[:, 0] = noise[:, 0]
    for t in range(1, 255):
        x[:, t] = 0.6 * x[:, t - 1] + 0.8 * noise[:, t]
    return np.exp(x - 0.5) if skew else x


@pytest.mark.parametrize(("sequences", "skew"), [(8, False), (8, True), (2, False)])
def test_intervals_cover_as_often_as_they_say(sequences, skew, monkeypatch):
    monkeypatch.setattr(evaluation, "_DRAWS", 400)
    rng, true, runs = np.random.default_rng(sequences), float(skew), 200
    found = [evaluation._interval(x, np.ones_like(x), positive=skew)
             for x in (simulated(rng, sequences, skew) for _ in range(runs))]
    covered = np.mean([low <= true <= high for _, low, high in found])
    assert 0.95 - 0.046 <= covered <= 0.95 + 0.046  # three standard errors of 200 runs
    missed = [np.mean([low > true for _, low, _ in found]), np.mean([high < true for _, _, high in found])]
    assert max(missed) < 0.08


def test_ratio_of_two_divergences_covers_and_pairs(monkeypatch):
    monkeypatch.setattr(evaluation, "_DRAWS", 400)
    rng, runs = np.random.default_rng(5), 200
    covered, paired, alone = 0, [], []
    for run in range(runs):
        common = simulated(rng, 8, True)
        one, another = (common * np.exp(rng.normal(0, 0.5, common.shape) - 0.125) for _ in range(2))
        _, low, high = evaluation._interval(0.9 * one, another, positive=True)
        covered += low <= 0.9 <= high
        paired.append(high / low)
        if run % 10 == 0:
            _, low, high = evaluation._interval(one, np.ones_like(one), positive=True)
            alone.append(high / low)
    assert np.median(paired) < np.median(alone) - 0.05
    assert 0.95 - 0.046 <= covered / runs <= 0.95 + 0.046


@pytest.mark.parametrize("positive", [False, True])
def test_little_text_makes_no_claim(positive):
    values = np.abs(np.random.default_rng(0).standard_normal((1, 16)))
    ratio, low, high = evaluation._interval(values, np.ones_like(values), positive=positive)
    assert ratio == pytest.approx(values.mean()) and high == math.inf and low == (0 if positive else -math.inf)
    for blocks in (2, 3, 6):
        values = np.random.default_rng(blocks).standard_normal((blocks, 16)) ** 2
        ratio, low, high = evaluation._interval(values, np.ones_like(values), positive=positive)
        assert low < ratio < high


def test_an_interval_is_the_same_every_time():
    x = np.random.default_rng(0).standard_normal((2, 100))
    assert evaluation._interval(x, np.ones_like(x)) == evaluation._interval(x, np.ones_like(x))


def test_a_change_at_one_place_only():
    one = np.zeros((4, 64))
    one[3, 60] = 1.0
    ratio, low, high = evaluation._interval(one, np.ones_like(one), positive=True)
    assert 0 <= low < ratio == 1 / 256 < high
    assert evaluation._interval(one, 0 * one, positive=True) == (math.inf,) * 3
    assert evaluation._interval(0 * one, 0 * one, positive=True) == (1.0,) * 3
    assert evaluation._interval(0 * one, one, positive=True) == (0.0,) * 3


def test_blocks_do_not_cross_sequences():
    values = np.arange(2 * 20.0).reshape(2, 20)
    np.testing.assert_array_equal(evaluation._block_sums(values), [values[0, :16].sum(), values[0, 16:].sum(),
                                                                   values[1, :16].sum(), values[1, 16:].sum()])


# Two models, one against the other


def test_versus_is_the_quotient_and_pairs():
    model = small_model()
    judge = Judge(model, TOKENS)
    fine, coarse = (judge.compare(perturbed(model, size)) for size in (0.05, 0.2))
    found = fine.versus(coarse)
    assert found.ratio == pytest.approx(fine.ratio / coarse.ratio, rel=1e-12)
    assert found.kl == pytest.approx(fine.kl / coarse.kl, rel=1e-12)
    assert found.kl_low < found.kl < found.kl_high < 1 and found.resolved
    back = coarse.versus(fine)
    assert back.kl == pytest.approx(1 / found.kl) and back.kl_low > 1
    same = fine.versus(fine)
    assert (same.kl, same.ratio, same.resolved) == (1, 1, False)


def test_versus_needs_the_same_judge():
    model = small_model()
    one = Judge(model, TOKENS).compare(perturbed(model))
    assert one.versus(Judge(model, TOKENS).compare(perturbed(model))).kl == 1  # made again of the same
    for other in (Judge(model, TOKENS[:2]), Judge(perturbed(model), TOKENS)):
        with pytest.raises(ValueError, match="other must come from the same judge"):
            one.versus(other.compare(model))
    with pytest.raises(ValueError, match="other must be a Comparison, got float"):
        one.versus(one.kl)
    with pytest.raises(ValueError, match="same judge"):
        Comparison(1, 1, 1, 0, 0, 0, 1).versus(one)


@pytest.mark.parametrize(("low", "high", "word", "resolved"), [
    (0.9, 0.99, "lower", True), (0.9, 1.0, "not resolved", False), (1.0, 1.1, "not resolved", False),
    (0.9, 1.1, "not resolved", False), (1.0004, 1.1, "not resolved", False), (1.01, 1.1, "higher", True)])
def test_a_verdict_says_no_more_than_its_interval(low, high, word, resolved):
    found = Comparison((low + high) / 2, low, high, 0.1, 0.05, 0.2, 0.5)
    assert found.resolved is resolved and str(found).endswith(word) and "\n" not in str(found)
    contrast = Contrast(2, 1.5, 3, (low + high) / 2, low, high)
    assert contrast.resolved is resolved
    assert re.fullmatch(rf"KL × .*\] {word}  perplexity × 2\.000 \[1\.500, 3\.000\] higher", str(contrast))


# What is refused


@pytest.mark.parametrize("tokens", [TOKENS[:, :1], TOKENS[0], TOKENS[:0], TOKENS.float(), TOKENS + 60, None, [[1, 2]]])
def test_tokens_that_are_none(tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        Judge(small_model(), tokens)


@pytest.mark.parametrize("other", [None, nn.Linear(2, 2), "model"])
def test_models_that_are_none(other):
    with pytest.raises(ValueError, match="model must be a SmolLM"):
        Judge(other, TOKENS)
    with pytest.raises(ValueError, match=f"other must be a SmolLM, got {type(other).__name__}"):
        Judge(small_model(), TOKENS).compare(other)


def test_another_vocabulary_is_refused():
    larger = smollm.SmolLM(smollm.Sizes(61, 48, 96, 2, 4, 2)).eval()
    with pytest.raises(ValueError, match="other must have the reference's 60 tokens, got 61"):
        Judge(small_model(), TOKENS).compare(larger)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_models_are_refused(value):
    model = small_model()
    judge = Judge(model, TOKENS)

    def broken(x):
        x = x.clone()
        x[:, 5:] = value
        return x

    with inserted(model, {(1, "down_in"): broken}):
        with pytest.raises(ValueError, match=r"other must give finite logits, .* after token 5 of sequence 0"):
            judge.compare(model)
        with pytest.raises(ValueError, match="model must give finite logits"):
            Judge(model, TOKENS)
    assert judge.compare(model).kl == 0


def test_a_head_that_was_changed_in_place_is_noticed():
    model = small_model()
    judge = Judge(model, TOKENS)
    model.head.weight.data[7] *= 3
    with pytest.raises(ValueError, match="reference's head must stay as it was"):
        judge.compare(model)


def test_a_head_with_exchanged_channels_is_noticed():
    model = small_model()
    judge, other = Judge(model, TOKENS), perturbed(model)
    model.head.weight.data.copy_(model.head.weight.data.flip(1).clone())
    with pytest.raises(ValueError, match="changed in place"):
        judge.compare(other)
