"""What lessons 05 and 07 say about the language model, measured on one sequence with room to spare."""

import pytest
import torch

from qlab import outliers, smollm, spinquant
from qlab.studies.spinquant import quantized_perplexity


@pytest.fixture(scope="module")
def llm():
    model = smollm.load(progress=False)
    calibration, evaluation = smollm.texts(model, sequences=2, length=192)
    found = outliers.statistics(model, calibration)
    return model, found, evaluation[-1:]


def perplexity(llm, functions, model=None):
    model, tokens = model or llm[0], llm[2]
    with smollm.inserted(model, functions):
        return smollm.perplexity(model, tokens)


@pytest.fixture(scope="module")
def exact(llm):
    return perplexity(llm, {})


def dynamic(llm, granularity, bits=8):
    return outliers.dynamic_quantizers(granularity, bits, places=llm[1])


def zero(channels):
    return lambda x: x.index_fill(-1, torch.tensor(channels), 0)


@pytest.mark.parametrize("granularity, least, most", [("tensor", 1.15, 5), ("token", 0.98, 1.03),
                                                      ("group", 0.98, 1.03)])
def test_lesson_05_what_shares_a_scale_decides(llm, exact, granularity, least, most):
    assert least < perplexity(llm, dynamic(llm, granularity)) / exact < most


@pytest.mark.parametrize("site, least, most", [("attn_in", 0.98, 1.05), ("o_in", 0.98, 1.05), ("mlp_in", 0.98, 1.15),
                                               ("down_in", 1.2, 9)])
def test_lesson_05_down_is_the_site_that_hurts(llm, exact, site, least, most):
    functions = outliers.static_quantizers(llm[1], 8, places=[place for place in llm[1] if place[1] == site])
    assert least < perplexity(llm, functions) / exact < most


def test_lesson_05_the_kernels_are_7_bits_and_down_in_float_saves_them(llm, exact):
    assert perplexity(llm, {}, smollm.torch_int8(llm[0])) > 1.8 * exact
    assert perplexity(llm, {}, smollm.torch_int8(llm[0], in_float=["down"])) < 1.5 * exact


def test_lesson_05_outliers_are_important(llm, exact):
    attention = [place for place in llm[1] if place[1] == "attn_in"]
    assert perplexity(llm, dict.fromkeys(attention, zero([247]))) > 4 * exact
    assert perplexity(llm, dict.fromkeys(attention, zero([44, 465, 429, 210]))) < 1.2 * exact
    assert perplexity(llm, {(11, "down_in"): lambda x: x.masked_fill(x.abs() > 100, 0)}) > 1.5 * exact
    assert perplexity(llm, dict.fromkeys(llm[1], lambda x: x.clamp(-6, 6))) > 4 * exact


def test_lesson_07_rotations_help_and_the_gains_come_first(llm, exact):
    model, _, tokens = llm
    folded = spinquant.fold_gains(model)
    r1, r2 = spinquant.random_hadamard(576, 0), spinquant.random_hadamard(64, 0)
    none, some, most = (quantized_perplexity(net, tokens) for net in (
        folded, spinquant.rotate(folded, r1, r2), spinquant.rotate(folded, r1, r2, r4=True)))
    assert none > 3 * some > 3 * most > 3 * exact
    assert perplexity(llm, {}, spinquant.rotate(model, r1, r2, check=False)) > 1e6


def test_lesson_07_learning_helps_where_the_outliers_are_not_on_the_axes():
    cloud = 20.0 ** (torch.arange(64) < 4) * torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    start = spinquant.random_hadamard(64, seed=0)
    for x, least, most in ((cloud, 0.93, 1.01), (cloud @ spinquant.random_orthogonal(64, seed=1), 0.3, 0.6)):
        toy = spinquant.ProxyInputs(x, 64 / x.square().sum(1))
        *_, last = spinquant.learn_rotation(toy, start=start, steps=100, batch_size=1024)
        none, random, learned = (spinquant.proxy_loss(r, toy) for r in (torch.eye(64), start, last.rotation))
        assert least < learned / random < most
        assert learned < 0.6 * none
