"""What lesson 06 says about the language model, measured on one sequence with room to spare."""

import pytest
import torch

from qlab import outliers, smollm, smoothquant


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


def test_lesson_06_smoothing_takes_nearly_all_of_the_rise(llm, exact):
    model, found, _ = llm
    sites = ("attn_in", "mlp_in", "down_in")

    def static(net, ranges):
        net, functions = smoothquant.quantized(net, "O3", ranges, per_channel=True)
        return perplexity(llm, functions, net)

    rise = static(model, found) - exact
    for chosen, least, most in ((sites, 0.7, 1.1), (sites[:2], -0.2, 0.4)):
        smoothed = static(smoothquant.smooth(model, found, 0.7, sites=chosen),
                          smoothquant.smoothed_statistics(model, found, 0.7, sites=chosen))
        assert least < 1 - (smoothed - exact) / rise < most


def test_lesson_06_smoothed_statistics_are_those_of_the_smoothed_model(llm):
    model, found, tokens = llm
    found = outliers.statistics(model, tokens[:, :32])
    smoothed = smoothquant.smooth(model, found, 0.7, sites=smoothquant.PAIRS)
    after = outliers.statistics(smoothed, tokens[:, :32])
    said = smoothquant.smoothed_statistics(model, found, 0.7, sites=smoothquant.PAIRS)
    for place in found:
        torch.testing.assert_close(said[place].low, after[place].low, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(said[place].high, after[place].high, rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module")
def smoothed(llm):
    return smoothquant.smooth(llm[0], llm[1], 0.7, sites=smoothquant.PAIRS)


def test_lesson_06_the_circle_closes(llm, exact, smoothed):
    assert perplexity(llm, {}, smollm.torch_int8(smoothed, per_channel=True)) < 1.25 * exact
    assert perplexity(llm, {}, smollm.torch_int8(smoothed)) > 1.5 * exact  # one scale per matrix


def test_lesson_06_up_and_down_pay_for_one_scale_per_matrix(llm, exact, smoothed):
    rise = {site: perplexity(llm, {}, smollm.quantize_weights(smoothed, 8, sites=[site])) / exact
            for site in smollm.SITES}
    assert max(rise["attn_in"], rise["o_in"]) < 1.03
    assert 1.1 < rise["mlp_in"] < rise["down_in"]
