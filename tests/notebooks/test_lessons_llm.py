"""What lesson 05 says about the language model, measured on one sequence with room to spare."""

import pytest
import torch

from qlab import outliers, smollm


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
