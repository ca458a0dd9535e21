"""What lessons 06 and 07 say about the language model, measured on one sequence with room to spare."""

import pytest
import torch

from qlab import outliers, smollm, smoothquant, spinquant
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
