"""Outliers of the language model against hooks, SciPy and NumPy's integers; the facts that lesson 05 tells of them."""

import itertools
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from qlab import affine, evaluation, floats, smollm
from qlab.outliers import (
    GRANULARITIES,
    MassiveActivation,
    Statistics,
    capture,
    dynamic_quantizers,
    fp8,
    kurtosis,
    massive_activations,
    outlier_channels,
    params_of,
    products,
    static_quantizers,
    statistics,
)
from qlab.smollm import CACHE_SITES, READERS, SITES, Sizes, inserted
from tests.small_model import small_model, some_tokens

PLACES = list(itertools.product(range(Sizes.num_hidden_layers), SITES))
TEXTS = ["Once upon a time there was a miller who had two boats and a daughter, and the river ran past his door.",
         "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2), area(10))\n",
         "1998: 34.2 %, 2003: 41.7 %, 2011: 58.0 % of all households had one, says the report of the ministry."]


@pytest.fixture(scope="module")
def model():
    return smollm.load(progress=False)


@pytest.fixture(scope="module")
def tokens(model):
    return evaluation.texts(model)["calibration"][:2, :32]


@pytest.fixture(scope="module")
def captured(model, tokens):
    return capture(model, tokens, PLACES)


@pytest.fixture(scope="module")
def found(model, tokens):
    return statistics(model, tokens)


@contextmanager
def unchanged(model):
    """What stands at the sites stays there, whatever happens in the block."""
    before = [getattr(block, site) for block in model.blocks for site in SITES + CACHE_SITES]
    yield
    assert [getattr(block, site) for block in model.blocks for site in SITES + CACHE_SITES] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def random_matrix(tokens, channels, seed, *, dtype=torch.float32):
    """Normally distributed, channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(channels, generator=generator, dtype=dtype).mul(2).exp()
    return torch.randn(tokens, channels, generator=generator, dtype=dtype) * sizes


MATRICES = st.builds(random_matrix, st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))


# capture and statistics


def test_captured_is_what_the_linear_layers_read(model, tokens, captured):
    read = {place: [] for place in PLACES}
    hooks = [getattr(model.blocks[layer], reader).register_forward_pre_hook(
        lambda _, inputs, parts=read[layer, site]: parts.append(inputs[0][0]))
        for layer, site in PLACES for reader in READERS[site][-1:]]
    with torch.no_grad():
        for sequence in tokens:
            model(sequence[None])
    for hook in hooks:
        hook.remove()
    assert list(captured) == PLACES
    for (layer, site), x in captured.items():
        assert x.shape == (64, 1536 if site == "down_in" else 576)
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.cat(read[layer, site]))
    assert len({x.sum().item() for x in captured.values()}) == len(PLACES)


def test_captured_tensors_can_be_computed_with(captured):
    x = captured[3, "mlp_in"]
    weight = nn.Parameter(torch.ones(2, 576))
    (x @ weight.T).sum().backward()
    torch.testing.assert_close(weight.grad[1], x.sum(0))


def test_statistics_are_those_of_the_captured_activations(captured, found):
    assert list(found) == PLACES
    for place, x in captured.items():
        one = found[place]
        assert torch.equal(one.low, x.min(0).values)
        assert torch.equal(one.high, x.max(0).values)
        assert torch.equal(one.absmax, x.abs().max(0).values)


def test_sites_are_told_in_the_order_that_was_asked_for(model, tokens):
    asked = statistics(model, tokens[:1, :4], iter(["down_in", "attn_in"]))
    assert list(asked) == list(itertools.product(range(Sizes.num_hidden_layers), ["down_in", "attn_in"]))
    places = [(7, "o_in"), (0, "down_in"), (7, "attn_in")]
    assert list(capture(model, tokens[:1, :4], iter(places))) == places


def test_products_are_activations_and_the_first_rows_that_they_meet(model, tokens, captured):
    places = [(12, "attn_in"), (0, "o_in"), (29, "mlp_in"), (11, "down_in")]
    found = products(model, tokens, iter(places), outputs=7)
    assert list(found) == places
    for (layer, site), name in zip(places, ("q", "o", "gate", "down"), strict=True):
        x, weight = found[layer, site]
        assert torch.equal(x, captured[layer, site])
        assert torch.equal(weight, model.state_dict()[f"blocks.{layer}.{name}.weight"][:7])
    assert products(model, tokens, places[:1])[places[0]][1].shape == (64, 576)


@pytest.mark.parametrize("outputs", [0, -1, 2.0, True])
def test_products_need_an_output(model, tokens, outputs):
    with pytest.raises(ValueError, match=f"outputs must be an integer of at least 1, got {outputs}"):
        products(model, tokens, [(0, "o_in")], outputs)


def test_a_sequence_does_not_see_the_others(model, tokens, captured):
    second = capture(model, tokens[1:], [(20, "down_in")])[20, "down_in"]
    assert torch.equal(second, captured[20, "down_in"][32:])


def test_what_is_inserted_acts_before_the_look():
    small, tokens = small_model(), some_tokens()
    functions = dynamic_quantizers("token", 2, places=[(0, "o_in")])
    expected = functions[0, "o_in"](capture(small, tokens, [(0, "o_in")])[0, "o_in"])
    with inserted(small, functions):
        seen, later = capture(small, tokens, [(0, "o_in"), (1, "o_in")]).values()
        assert torch.equal(statistics(small, tokens)[0, "o_in"].high, expected.amax(0))
    assert torch.equal(seen, expected) and len(seen[0].unique()) <= 4
    assert not torch.equal(later, capture(small, tokens, [(1, "o_in")])[1, "o_in"])


@pytest.mark.parametrize("break_it", [
    lambda model: model.embedding.weight.data[17].fill_(np.nan), lambda model: model.norm.weight.data.fill_(1),
    lambda model: model.blocks[1].attn_norm.weight.data[3].fill_(np.inf),
], ids=["embedding", "not at all", "gain"])
def test_statistics_of_a_broken_model_are_refused(break_it):
    model = small_model()
    break_it(model)
    tokens = torch.tensor([[17, 3], [1, 2]])
    if torch.isfinite(model(tokens)).all():
        assert len(statistics(model, tokens)) == 8
    else:
        with unchanged(model), pytest.raises(ValueError, match=r"activations at \([01], 'attn_in'\) must be finite"):
            statistics(model, tokens)


def test_nothing_stays_in_the_model(model, tokens):
    with unchanged(model):
        capture(model, tokens[:, :4], PLACES)
        statistics(model, tokens[:, :4], ["o_in"])


@pytest.mark.parametrize("look", [lambda *given: capture(*given, PLACES), statistics], ids=["capture", "statistics"])
def test_nothing_stays_in_the_model_after_an_exception(model, tokens, look):
    def broken(x):
        raise KeyError("on the way")

    with inserted(model, {(9, "values"): broken}), unchanged(model), pytest.raises(KeyError, match="on the way"):
        look(model, tokens)


@pytest.mark.parametrize("place", [(30, "attn_in"), (-1, "attn_in"), (0, "attention"), (0, "queries"), (0,), "attn_in",
                                   (0.5, "o_in"), None])
def test_an_unknown_place_is_refused(model, tokens, place):
    with unchanged(model), pytest.raises(ValueError) as caught:
        capture(model, tokens, [(1, "o_in"), place])
    assert all(part in str(caught.value) for part in ("places", "from 0 to 29", ", ".join(SITES), repr(place)))


@pytest.mark.parametrize("sites, named", [(["o_in", "keys"], "keys"), (["gate"], "gate"), ("o_in", "o")])
def test_an_unknown_site_is_refused(model, tokens, sites, named):
    with unchanged(model), pytest.raises(ValueError, match=rf"site of attn_in.*got \(0, '{named}'\)"):
        statistics(model, tokens, sites)


@pytest.mark.parametrize("bad, part", [
    (torch.zeros(4, dtype=torch.int64), r"shape \(4,\)"), (torch.zeros(0, 4, dtype=torch.int64), r"\(0, 4\)"),
    (torch.zeros(1, 4), "float32"), ([[1, 2]], "list"), (torch.tensor([[1, 49152]]), "1 to 49152"),
])
@pytest.mark.parametrize("look", [lambda *given: capture(*given, PLACES), statistics], ids=["capture", "statistics"])
def test_bad_tokens_are_refused(model, look, bad, part):
    with unchanged(model), pytest.raises(ValueError, match=f"tokens must be .*got .*{part}"):
        look(model, bad)


# kurtosis


@given(x=MATRICES, shift=st.floats(-3, 3))
@example(x=torch.tensor([[0.0, 1.0]]), shift=0)
def test_kurtosis_is_scipys(x, shift):
    x = x.double() + shift
    if x.numel() > 1:
        assert kurtosis(x) == pytest.approx(scipy.stats.kurtosis(x.numpy(), axis=None, fisher=False), rel=1e-9)


def test_kurtosis_of_known_distributions():
    n = (np.arange(100_000) + 0.5) / 100_000
    assert kurtosis(n) == pytest.approx(1.8, rel=1e-6)  # uniform
    assert kurtosis(scipy.stats.norm.ppf(n)) == pytest.approx(3, rel=1e-3)
    assert kurtosis(scipy.stats.laplace.ppf(n)) == pytest.approx(6, rel=1e-2)


@pytest.mark.parametrize("x", [[-1, 1, 0], np.float16([-1, 1, 0]), torch.tensor([-1, 1, 0]),
                               torch.tensor([[-1], [1], [0]], dtype=torch.bfloat16)], ids=lambda x: type(x).__name__)
def test_kurtosis_of_other_kinds_of_arrays(x):
    assert kurtosis(x) == pytest.approx(1.5)


@pytest.mark.parametrize("unit", [1e-300, 1e-100, 1e-10, 1e100, 1e300])
def test_kurtosis_has_no_unit(unit):
    x = np.random.default_rng(0).normal(size=500)
    assert kurtosis(unit * x) == pytest.approx(scipy.stats.kurtosis(x, fisher=False), rel=1e-9)


@pytest.mark.parametrize("offset", [1e6, -1e12, 2.0**60])
def test_kurtosis_far_from_0(offset):
    x = 4096 * np.random.default_rng(0).integers(-9, 9, 500)  # so that the sums are exact
    assert kurtosis(x + offset) == pytest.approx(scipy.stats.kurtosis(x, fisher=False), rel=1e-12)


@pytest.mark.parametrize("x", [np.array([5e-324, 0, 0, 0]), np.array([1.7e308, -1.7e308, -1.7e308, -1.7e308]),
                               nn.Parameter(torch.tensor([-3e38, 3e38, 3e38, 3e38]))])
@pytest.mark.filterwarnings("error")
def test_kurtosis_at_the_ends_of_the_floats(x):
    assert kurtosis(x) == pytest.approx(7 / 3)  # of one among four


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1e30])
@pytest.mark.parametrize("count", [1, 15, 22, 29, 1000])
def test_kurtosis_of_equal_values_is_nan(value, count):
    assert np.isnan(kurtosis(np.full(count, value)))


# outliers


def lower_median(x, axis=None):
    """The middle value; of two, the smaller."""
    x = np.sort(x, axis=axis)
    return np.take(x, (x.shape[axis or 0] - 1) // 2, axis=axis)


@given(x=MATRICES, factor=st.floats(1.01, 30))
def test_outlier_channels_by_definition(x, factor):
    typical = lower_median(np.abs(x.numpy()), axis=0)
    ratio = typical / lower_median(typical)
    outliers = outlier_channels(x, factor)
    assert outliers == pytest.approx({c: ratio[c] for c in range(len(ratio)) if ratio[c] >= factor})
    assert list(outliers.values()) == sorted(outliers.values(), reverse=True)


@given(tokens=st.integers(3, 40), channels=st.integers(7, 40), seed=st.integers(0, 10**6), data=st.data())
def test_planted_channels_are_found(tokens, channels, seed, data):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(2, tokens, channels, generator=generator)
    x = (1 + noise[0]) * (noise[1] - 0.5).sign()
    planted = data.draw(st.sets(st.integers(0, channels - 1), max_size=channels // 3))
    spike = data.draw(st.integers(0, channels - 1))
    x[:, list(planted)] *= 17
    x[0, spike] *= 1e6  # in a single token
    assert set(outlier_channels(x)) == planted


def test_ratios_beyond_float32():
    x = torch.tensor([[1e-30, 1e-30, 1e30]])
    assert outlier_channels(x) == pytest.approx({2: 1e60})
    assert massive_activations(x)[0].ratio == pytest.approx(1e60)
    assert outlier_channels(nn.Parameter(torch.tensor([[1e-4, 1e-4, 6e4]]).half())) == pytest.approx({2: 6e8}, rel=1e-3)
    assert massive_activations(torch.tensor([[3e38, 1e35, 1e35]]), ratio=1e4) == []  # ratio times the median overflows
    assert outlier_channels(torch.zeros(3, 2)) == {}


def test_factor_is_included():
    x = torch.tensor([[1.0, 1.0, 1.0, 5.0, -7.0]])
    assert outlier_channels(x, 5) == {4: 7, 3: 5}
    assert outlier_channels(x, 5.001) == {4: 7}


@given(x=MATRICES, magnitude=st.floats(0.01, 10), ratio=st.floats(0.5, 50))
def test_massive_activations_by_definition(x, magnitude, ratio):
    size = np.abs(x.numpy())
    median = lower_median(size.ravel(), axis=0)
    expected = {(t, c) for t, c in np.ndindex(*size.shape) if size[t, c] > magnitude and size[t, c] > ratio * median}
    massive = massive_activations(x, magnitude=magnitude, ratio=ratio)
    assert {(one.token, one.channel) for one in massive} == expected
    assert len(massive) == len(expected)
    for one in massive:
        assert one.value == x[one.token, one.channel].item()
        assert one.ratio == pytest.approx(size[one.token, one.channel] / median, abs=0.051, rel=1e-6)
    assert [abs(one.value) for one in massive] == sorted((abs(one.value) for one in massive), reverse=True)


@given(places=st.dictionaries(st.tuples(st.integers(0, 19), st.integers(0, 29)), st.floats(1100, 1e5), max_size=9),
       sign=st.sampled_from([-1, 1]))
def test_planted_massive_activations_are_found(places, sign):
    x = random_matrix(20, 30, 0).clamp(-1, 1) * 0.05
    for place, value in places.items():
        x[place] = sign * value
    massive = massive_activations(x)
    assert {(one.token, one.channel): one.value for one in massive} == pytest.approx(
        {place: sign * value for place, value in places.items()})


def test_massive_activations_need_both_limits():
    x = torch.tensor([[100.0, 0.1, 0.1], [100.5, 0.1, -0.1]])
    assert massive_activations(x, ratio=1004) == [MassiveActivation(1, 0, 100.5, 1005)]
    assert massive_activations(x, ratio=500) == [MassiveActivation(1, 0, 100.5, 1005)]  # more than 100, not 100
    assert massive_activations(x, ratio=1006) == []
    assert massive_activations(x, magnitude=99, ratio=1004) == [MassiveActivation(1, 0, 100.5, 1005)]
    assert [one.token for one in massive_activations(x, magnitude=99, ratio=999)] == [1, 0]


@pytest.mark.parametrize("text", TEXTS)
def test_what_lesson_05_says_of_the_model(model, text):
    tokens = model.encode(text)
    x = capture(model, tokens, [(12, "attn_in"), (11, "down_in")])
    outliers = outlier_channels(x[12, "attn_in"])
    assert next(iter(outliers)) == 247
    assert outliers[247] > 20
    massive = massive_activations(x[11, "down_in"])
    assert {one.token for one in massive} == {0}
    assert massive[0].channel == 1229
    assert abs(massive[0].value) > 1000
    assert not massive_activations(x[12, "attn_in"])


# quantizers


def parts(x, granularity, group_size):
    """What shares a scale, row by row."""
    return {"tensor": lambda: x.reshape(1, -1), "token": lambda: x, "channel": lambda: x.T,
            "group": lambda: x.reshape(-1, group_size)}[granularity]()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_params_hold_the_range_of_each_part(granularity, bits):
    x = random_matrix(6, 32, 3) + 0.2
    x[:, 5] = x[:, 5].abs() + 1  # ranges without 0
    params = params_of(x, granularity, bits, group_size=8)
    rows = parts(x.double().numpy(), granularity, 8)
    alpha, beta = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    scale = (beta - alpha) / (2**bits - 1)
    np.testing.assert_allclose(params.scale.reshape(-1), scale, rtol=1e-6)
    np.testing.assert_allclose(params.zero_point.reshape(-1), np.rint(-alpha / scale) - 2 ** (bits - 1), atol=1)
    x_hat = affine.fake_quantize(x, params)
    assert (np.abs(parts((x_hat - x).double().numpy(), granularity, 8)) <= 0.501 * scale[:, None]).mean() > 0.99
    used = {"tensor": {}, "token": {"axis": 0}, "channel": {"axis": 1}, "group": {"group_size": 8}}[granularity]
    direct = affine.zero_point_params(x, bits, **used)
    assert torch.equal(params.scale, direct.scale) and torch.equal(params.zero_point, direct.zero_point)
    assert (params.axis, params.group_size) == (direct.axis, direct.group_size)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fp8_is_that_of_ml_dtypes_and_of_lesson_01(granularity, dtype):
    x = random_matrix(6, 32, 3).to(dtype)
    x[2], x[:, 7], x[4, 8:16] = 0, 0, 0  # a part with nothing but 0
    x_hat, scale = fp8(x, granularity, group_size=8)
    assert (x_hat.dtype, x_hat.shape) == (dtype, x.shape)
    wide = x.double() if dtype == torch.float64 else x.float()
    largest = np.abs(parts(wide.numpy(), granularity, 8)).max(1)
    seen = parts(scale.expand(6, 32).numpy(), granularity, 8)
    np.testing.assert_array_equal(seen, np.repeat(np.where(largest > 0, largest / 448, 1)[:, None], seen.shape[1], 1))
    scaled = (wide / scale).numpy()
    for rounded in (scaled.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(scaled.dtype),
                    floats.decode(floats.encode(scaled, floats.FP8_E4M3, saturate=True), floats.FP8_E4M3)):
        expected = (scale * torch.tensor(rounded).to(scale.dtype)).to(dtype)
        assert torch.equal(x_hat, expected)
    assert torch.equal(fp8(x.view(2, 3, 32), granularity, group_size=8)[0], x_hat.view(2, 3, 32))


@pytest.mark.parametrize("size", [3e38, 1e-38, 9e-43, 1e-44])
def test_fp8_at_the_ends_of_the_floats(size):
    x = size * torch.linspace(-1, 1, 64).view(4, 16)
    x_hat, _ = fp8(x)
    assert x_hat.isfinite().all()
    assert size < 1e-40 or (x_hat - x).abs().max() <= 0.04 * size


def test_what_the_defaults_are():
    x = random_matrix(4, 128, 0)
    assert repr(params_of(x)) == repr(params_of(x, "tensor", 8))
    assert params_of(x, "group").group_size == 64
    three = x.view(2, 2, 128)
    by_default = dynamic_quantizers(places=[(0, "o_in")])[0, "o_in"](three)
    assert torch.equal(by_default, dynamic_quantizers("token", 8, places=[(0, "o_in")])[0, "o_in"](three))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 3, 2, 64), (3, 1, 64), (4, 64)], ids=str)
@pytest.mark.parametrize("bits", [3, 8])
def test_dynamic_quantizers_see_each_token_as_a_row(granularity, shape, bits):
    functions = dynamic_quantizers(granularity, bits, places=iter([(3, "o_in"), (5, "attn_in")]), group_size=16)
    assert list(functions) == [(3, "o_in"), (5, "attn_in")]
    x = random_matrix(int(np.prod(shape[:-1])), 64, 1)
    expected = affine.fake_quantize(x, params_of(x, granularity, bits, group_size=16)).view(shape)
    assert torch.equal(functions[3, "o_in"](x.view(shape)), expected)
    swapped = x.view(shape).transpose(0, 1).contiguous().transpose(0, 1)  # lies elsewhere in memory
    assert torch.equal(functions[5, "attn_in"](swapped), expected)


def test_dynamic_quantizers_see_the_data_of_each_call_alone():
    function = dynamic_quantizers("tensor", 4, places=[(0, "o_in")])[0, "o_in"]
    x = random_matrix(3, 8, 0)[None]
    once = function(x)
    function(100 * x)
    assert torch.equal(function(x), once)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("place", [(12, "attn_in"), (11, "down_in")])
def test_static_quantizers_use_the_ranges_that_were_found(found, captured, bits, place):
    functions = static_quantizers(found, bits)
    assert list(functions) == PLACES
    x = captured[place]
    params = affine.range_params(x.min().clamp(max=0), x.max().clamp(min=0), bits)
    new = 1.5 * x.flip(0)
    assert torch.equal(functions[place](new.view(4, 16, -1)), affine.fake_quantize(new, params).view(4, 16, -1))


def test_a_static_range_holds_0(found):
    low = found[0, "o_in"].low.abs() + 2  # all above 0
    function = static_quantizers({(0, "o_in"): Statistics(low, low + 2)}, 8)[0, "o_in"]
    assert (function(torch.zeros(1, 1, 576)) == 0).all()
    x = (low + 1)[None, None]
    assert (function(x) - x).abs().max() < (low + 2).max() / 255


def test_some_places_alone(found):
    places = [(4, "o_in"), (2, "attn_in")]
    assert list(static_quantizers(found, places=iter(places))) == places
    assert static_quantizers(found, places=[]) == {}
    some = {place: found[place] for place in places}
    assert list(static_quantizers(some)) == places


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantizers_keep_the_precision(dtype):
    x = random_matrix(4, 8, 0).to(dtype).requires_grad_()
    found = {0: Statistics(x.detach().amin(0), x.detach().amax(0))}
    for functions in (dynamic_quantizers(places=[0]), static_quantizers(found)):
        y = functions[0](x)
        assert y.dtype == dtype and y.requires_grad
        assert (y - x).abs().max() <= (x.max() - x.min()) / 200
    ends = torch.tensor([65504.0, -65504]).half()  # the lowest level is half a step further out
    assert dynamic_quantizers(places=[0])[0](ends).isfinite().all()


def test_more_bits_change_the_model_less(model, tokens, found):
    def difference(functions):
        with torch.no_grad(), inserted(model, functions):
            return (model.hidden(tokens[:1]) - hidden).norm().item()

    with torch.no_grad():
        hidden = model.hidden(tokens[:1])
    eight = difference(dynamic_quantizers("token", 8, places=PLACES))
    assert 0 < difference(dynamic_quantizers("group", 12, places=PLACES)) < eight
    assert eight < difference(static_quantizers(found, 8)) < 1.5 * hidden.norm()


# bad input


NAN, INF = torch.tensor([[1.0, float("nan")]]), torch.tensor([[1.0, float("inf")]])
MATRIX = torch.ones(2, 4)
BAD_MATRICES = [(NAN, "must be finite, got 1 NaN"), (INF, "1 infinite"), (torch.ones(3), r"shape \(3,\)"),
                (torch.ones(1, 2, 3), r"\(1, 2, 3\)"), (torch.ones(0, 3), "not be empty"), (np.ones((2, 3)), "ndarray"),
                ([[1.0]], "list"), (torch.ones(2, 2, dtype=torch.complex64), "complex64"), (None, "NoneType")]


@pytest.mark.parametrize("bad, part", BAD_MATRICES, ids=[part for _, part in BAD_MATRICES])
@pytest.mark.parametrize("function", [outlier_channels, massive_activations])
def test_bad_matrices_are_refused(function, bad, part):
    with pytest.raises(ValueError, match=f"^x .*{part}"):
        function(bad)


@pytest.mark.parametrize("call, part", [
    (lambda: kurtosis([]), "x must not be empty"), (lambda: kurtosis([1, np.nan]), "x must be finite, got 1 NaN"),
    (lambda: kurtosis(torch.tensor([np.inf])), "x must be finite, got 0 NaN and 1 infinite"),
    (lambda: kurtosis("text"), "x must be an array of real numbers"),
    *[(lambda factor=factor: outlier_channels(MATRIX, factor), f"factor must be greater than 1, got {factor}")
      for factor in (1, 0.5, -3.0, float("nan"), True, None)],
    *[(lambda limit=limit: massive_activations(MATRIX, magnitude=limit), f"magnitude and .* got {limit} and 1000.0")
      for limit in (0, -1.0, float("nan"), None)],
    *[(lambda limit=limit: massive_activations(MATRIX, ratio=limit), f"ratio must be greater .* 100.0 and {limit}")
      for limit in (0, -1.0, float("nan"))],
    *[(lambda name=name: params_of(MATRIX, name),
       f"granularity must be one of tensor, token, channel, group, got {name!r}")
      for name in ("row", None, 0)],
    *[(lambda bits=bits: params_of(MATRIX, "token", bits), f"bits must be an integer from 2 to 16, got {bits}")
      for bits in (1, 17, 2.5)],
    *[(lambda size=size: params_of(MATRIX, "group", group_size=size), f"group_size must divide .* got {size}")
      for size in (3, 0, 8)],
    (lambda: params_of(NAN), "x must be finite, got 1 NaN"), (lambda: fp8(NAN), "x must be finite, got 1 NaN"),
    (lambda: fp8(MATRIX, "row"), "granularity must be .* got 'row'"),
    *[(lambda bad=bad: fp8(bad), "x must be a tensor of floats with 2 or more axes")
      for bad in (MATRIX.long(), MATRIX.numpy(), torch.ones(3))],
    *[(lambda size=size: fp8(MATRIX, "group", group_size=size), f"group_size must .* got {size}")
      for size in (3, 0, 8)],
    (lambda: dynamic_quantizers("row", places=[]), "granularity must be .* got 'row'"),
    (lambda: dynamic_quantizers("token", 1, places=[]), "bits must be .* got 1"),
    *[(lambda bad=bad: dynamic_quantizers(places=[0])[0](bad), "x must be a tensor of floats with 1 or more axes")
      for bad in (MATRIX.long(), MATRIX.numpy(), torch.tensor(1.0))],
    (lambda: dynamic_quantizers("tensor", places=[0])[0](torch.tensor([-3e38, 3e38])), "beta - alpha must be finite"),
])
def test_bad_arguments_are_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call()


@pytest.mark.parametrize("bits", [1, 17, 4.5, "8"])
def test_static_quantizers_refuse_bad_bits(found, bits):
    with pytest.raises(ValueError, match=f"bits must be an integer from 2 to 16, got {bits!r}"):
        static_quantizers(found, bits)


@pytest.mark.parametrize("place", [(30, "o_in"), (0, "keys"), "o_in"])
def test_static_quantizers_refuse_a_place_without_statistics(found, place):
    with pytest.raises(ValueError) as caught:
        static_quantizers(found, places=[(0, "o_in"), place])
    assert "found must have statistics" in str(caught.value)
    assert repr(place) in str(caught.value)
