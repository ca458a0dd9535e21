"""Smoothing scales against the paper's formula; a small LLaMA in float64, and the real one, before and after."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from qlab import smollm
from qlab.affine import absmax_params, fake_quantize, mse
from qlab.evaluation import texts
from qlab.outliers import statistics
from qlab.smollm import READERS, SITES, reweighted
from qlab.smoothquant import PAIRS, quantized, smooth, smoothed_statistics, smoothing_scales
from tests.small_model import logits, relative, small_model, some_tokens, state_bytes


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def tokens():
    return some_tokens()


@pytest.fixture
def found(model, tokens):
    return statistics(model, tokens)


# The scales

MAGNITUDES = arrays(np.float64, 7, elements=st.floats(1e-3, 1e4))


@given(MAGNITUDES, MAGNITUDES, st.floats(0, 1))
def test_scales_are_equation_4(a, w, alpha):
    expected = np.exp(alpha * np.log(a) - (1 - alpha) * np.log(w)).clip(1e-5)
    np.testing.assert_allclose(smoothing_scales(a, w, alpha), expected, rtol=1e-12)
    in_torch = smoothing_scales(torch.from_numpy(a).float(), torch.from_numpy(w).float(), alpha)
    assert in_torch.dtype == torch.float32
    np.testing.assert_allclose(in_torch.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(smoothing_scales(torch.from_numpy(a), w, alpha).numpy(), expected, rtol=1e-12)


def test_the_ends_of_alpha_level_one_side():
    a, w = np.array([0.5, 3.0, 200.0]), np.array([2.0, 0.1, 0.3])
    np.testing.assert_allclose(a / smoothing_scales(a, w, 1), 1)
    np.testing.assert_allclose(w * smoothing_scales(a, w, 0), 1)
    half = smoothing_scales(a, w, 0.5)
    np.testing.assert_allclose(a / half, w * half)


def test_dead_channels_as_in_the_published_code():
    a, w = np.array([0.0, 4.0, 0.0]), np.array([4.0, 0.0, 0.0])
    np.testing.assert_allclose(smoothing_scales(a, w, 0.5), [1e-5, 2 / math.sqrt(1e-5), 1e-5])
    np.testing.assert_allclose(smoothing_scales(a, w, 0), [0.25, 1e5, 1e5])


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e-6, 1e30])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_scales_follow_the_units(unit, alpha):
    a, w = np.float32([1, 4, 9, 0.25]), np.float32([2, 0.5, 1, 3])
    expected = smoothing_scales(a, w, alpha)
    np.testing.assert_allclose(smoothing_scales(unit * a, w, alpha), expected * unit**alpha, rtol=1e-6)
    small = smoothing_scales(a, np.float32(unit) * w, alpha)
    np.testing.assert_allclose(small, expected * unit ** (alpha - 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_scales_are_finite_and_no_zero(dtype, alpha):
    ends = [0, float(np.finfo(dtype).smallest_subnormal), 1, float(np.finfo(dtype).max)]
    a, w = (values.ravel() for values in np.meshgrid(np.array(ends, dtype), np.array(ends, dtype)))
    for s in (smoothing_scales(a, w, alpha), smoothing_scales(torch.tensor(a), torch.tensor(w), alpha).numpy()):
        assert (s > 0).all() and np.isfinite(s).all() and s.dtype == dtype


def test_scales_of_other_arrays():
    for ones in (nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.bfloat16), torch.ones(2).half(), [1, 1]):
        assert smoothing_scales(ones, np.float32([4, 16]), np.float32(0.5)).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("x_absmax, w_absmax, alpha, message", [
    ([1.0], [1.0], -0.1, "alpha must be a number from 0 to 1, got -0.1"),
    ([1.0], [1.0], 1.01, "alpha must be a number from 0 to 1, got 1.01"),
    ([1.0], [1.0], math.nan, "alpha must be a number from 0 to 1, got nan"),
    ([1.0], [1.0], "0.5", "alpha must be a number from 0 to 1, got '0.5'"),
    ([1.0], [1.0], True, "alpha must be a number from 0 to 1, got True"),
    ([1.0, -2.0], [1.0, 1.0], 0.5, "x_absmax must be of one axis and nowhere less than 0"),
    ([1.0], [-1.0], 0.5, "w_absmax must be of one axis and nowhere less than 0"),
    ([[1.0]], [[1.0]], 0.5, "x_absmax must be of one axis"),
    ([1.0, 2.0], [1.0], 0.5, "the same shape, got (2,) and (1,)"),
    ([math.nan], [1.0], 0.5, "x_absmax must be finite"),
    ([1.0], [math.inf], 0.5, "w_absmax must be finite"),
    ([], [], 0.5, "x_absmax must not be empty"),
])
def test_bad_scales(x_absmax, w_absmax, alpha, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        smoothing_scales(np.array(x_absmax), np.array(w_absmax), alpha)


def test_the_direction_of_the_lecture_notes_amplifies():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 16, generator=generator), torch.randn(32, 16, generator=generator)
    x[:, 3] *= 60
    s = smoothing_scales(x.abs().amax(0), w.abs().amax(0), 0.5)

    def error(x, w):
        rounded = [fake_quantize(values, absmax_params(values)) for values in (x, w)]
        return mse(x @ w.T, rounded[0] @ rounded[1].T)

    right, naive, printed = error(x / s, w * s), error(x, w), error(x * s, w / s)
    assert right < naive / 3 and printed > 3 * naive


# The model


@pytest.mark.parametrize("sites", [["attn_in"], ["mlp_in"], ["down_in"], ["attn_in", "mlp_in"], [*PAIRS]], ids=str)
@pytest.mark.parametrize("alpha", [0, 0.5, 0.85, 1])
def test_nothing_changes_in_float64(model, tokens, found, sites, alpha):
    before = state_bytes(model)
    smoothed = smooth(model, found, alpha, sites=sites)
    assert relative(logits(smoothed, tokens), logits(model, tokens)) <= 1e-11
    assert smoothed.changes == ("smoothed",) and model.changes == ()
    assert state_bytes(model) == before
    touched = {f"blocks.{i}.{name}.weight" for i in range(2) for site in sites
               for name in (PAIRS[site], *READERS[site])}
    assert {name for name, value in state_bytes(smoothed).items() if value != before[name]} == touched


def test_smoothed_weights_are_those_of_the_paper(model, found):
    alpha = {"attn_in": 0.3, "mlp_in": 0.6, "down_in": 0.9}
    smoothed = smooth(model, found, alpha, sites=PAIRS)
    for i in range(2):
        old, new = ({name: getattr(m.blocks[i], name).weight.numpy()
                     for name in ("attn_norm", "q", "k", "v", "mlp_norm", "gate", "up", "down")}
                    for m in (model, smoothed))
        s = {}
        for site, names in (("attn_in", "q k v"), ("mlp_in", "gate up"), ("down_in", "down")):
            a = np.maximum(found[i, site].high.numpy(), -found[i, site].low.numpy())
            w = np.abs(np.vstack([old[name] for name in names.split()])).max(0)
            s[site] = np.exp(alpha[site] * np.log(a) - (1 - alpha[site]) * np.log(w))
        attention, mlp, down = s.values()
        expected = {"attn_norm": old["attn_norm"] / attention, "mlp_norm": old["mlp_norm"] / mlp,
                    "q": old["q"] * attention, "k": old["k"] * attention, "v": old["v"] * attention,
                    "gate": old["gate"] * mlp, "up": old["up"] * mlp / down[:, None], "down": old["down"] * down}
        for name, weight in expected.items():
            np.testing.assert_allclose(new[name], weight, rtol=1e-6)


def test_activations_are_divided_by_s(model, tokens, found):
    after = statistics(smooth(model, found, 1.0, sites=PAIRS), tokens)
    for place in after:
        expected = found[place].absmax if place[1] == "o_in" else torch.ones_like(found[place].absmax)
        torch.testing.assert_close(after[place].absmax, expected, rtol=1e-9, atol=0)


def test_smoothed_statistics_are_those_of_the_smoothed_model(model, tokens, found):
    alpha = {"attn_in": 0.3, "mlp_in": 0.6, "down_in": 0.9}
    after = statistics(smooth(model, found, alpha, sites=PAIRS), tokens)
    for place, said in smoothed_statistics(model, found, alpha, sites=PAIRS).items():
        torch.testing.assert_close(said.low, after[place].low, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(said.high, after[place].high, rtol=1e-9, atol=1e-12)


def test_smoothing_refuses(model, found, tokens):
    changed = reweighted(model, {}, "8-bit weights")
    missing = {place: value for place, value in found.items() if place != (1, "mlp_in")}
    for arguments, message in [
        ((changed, found), "model must be as loaded, got one that was changed: 8-bit weights"),
        ((smooth(model, found), found), "model must be as loaded, got one that was changed: smoothed"),
        ((model, found, 1.5), "alpha must be a number from 0 to 1, got 1.5"),
        ((model, found, {"attn_in": 0.5}), "alpha must have a number for 'mlp_in'"),
        ((model, missing), "found must have statistics of each place, got none of (1, 'mlp_in')"),
        ((model, None), "found must be a dict of statistics, got NoneType"),
        ((model, found | {(2, "o_in"): found[1, "o_in"]}), "found must be statistics of this model, by (layer, site)"),
    ]:
        for function in (smooth, smoothed_statistics):
            with pytest.raises(ValueError, match=re.escape(message)):
                function(*arguments)
    with pytest.raises(ValueError, match=re.escape("sites must be of attn_in, mlp_in, down_in, got 'o_in'")):
        smooth(model, found, sites=["o_in"])


def test_statistics_of_a_model_before_it_lost_a_block(model, found):
    del model.blocks[0]
    for function in (smooth, smoothed_statistics, lambda *arguments: quantized(arguments[0], "O3", arguments[1])):
        with pytest.raises(ValueError, match=r"found must be statistics of this model.* 0 to 0 .*got \(1, 'attn_in'\)"):
            function(model, found)


def test_smoothing_refuses_what_is_not_finite(model, found):
    model.blocks[1].attn_norm.weight[5] = math.nan
    with pytest.raises(ValueError, match=r"weights\['blocks.1.attn_norm.weight'\] must be finite, got 1 NaN"):
        smooth(model, found)
    model.blocks[1].q.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="w_absmax must be finite, got 1 NaN"):
        smooth(model, found)


def test_dead_channels_and_small_weights_change_nothing(tokens):
    model = small_model(torch.float32)
    model.blocks[0].attn_norm.weight[5] = 0
    for name in "qkv":
        getattr(model.blocks[0], name).weight[:, 7] = 0
        getattr(model.blocks[1], name).weight.mul_(1e-12)
    model.blocks[1].attn_norm.weight.mul_(1e-12)
    found = statistics(model, tokens)
    assert relative(logits(smooth(model, found, sites=PAIRS), tokens), logits(model, tokens)) < 1e-5
    absmax = statistics(smooth(model, found, 1.0), tokens)[1, "attn_in"].absmax
    torch.testing.assert_close(absmax, torch.ones(48), rtol=1e-4, atol=0)  # small ones are levelled too


# Quantization


def rounded(x, low, high, bits):
    """Asymmetric fake quantization from its definition, in NumPy."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    s = (high - low) / (2**bits - 1)
    z = -2 ** (bits - 1) - np.rint(low / s)
    return s * (np.clip(np.rint(x / s) + z, -2 ** (bits - 1), 2 ** (bits - 1) - 1) - z)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("bits", [8, 4])
def test_levels(model, found, level, bits):
    copy, functions = quantized(model, level, found if level == "O3" else None, bits)
    assert set(functions) == {(i, site) for i in range(2) for site in SITES}
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    x[0, 1] *= 20
    low, high = {"O1": (x.min(2, keepdims=True), x.max(2, keepdims=True)), "O2": (x.min(), x.max()),
                 "O3": (found[1, "mlp_in"].low.min().item(), found[1, "mlp_in"].high.max().item())}[level]
    ours = functions[1, "mlp_in"](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, rounded(x, low, high, bits), rtol=0, atol=1e-12)
    for name in (name for names in READERS.values() for name in names):
        weight = getattr(model.blocks[0], name).weight.numpy()
        s = np.abs(weight).max() / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(getattr(copy.blocks[0], name).weight.numpy(), s * np.rint(weight / s), atol=1e-12)
    assert copy.changes == (f"{bits}-bit weights",)


def test_weights_per_channel_and_fewer_sites(model, found):
    copy, functions = quantized(model, "O3", found, 4, per_channel=True, sites=["mlp_in"])
    assert set(functions) == {(0, "mlp_in"), (1, "mlp_in")}
    weight = model.blocks[1].up.weight.numpy()
    s = np.abs(weight).max(1, keepdims=True) / 7
    np.testing.assert_allclose(copy.blocks[1].up.weight.numpy(), s * np.rint(weight / s), atol=1e-12)
    assert torch.equal(copy.blocks[1].down.weight, model.blocks[1].down.weight)


@pytest.mark.parametrize("arguments, message", [
    (("O4",), "level must be one of O1, O2, O3, got 'O4'"),
    (("O3",), "found must be the statistics of the model for level O3, got None"),
    (("O3", {}), "found must have statistics of each place"),
    (("O1", None, 1), "bits must be an integer from 2 to 16, got 1"),
])
def test_levels_refuse(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantized(model, *arguments)


def test_torch_kernels(tokens):
    model = small_model(torch.float32)
    before, reference = state_bytes(model), logits(model, tokens)
    kernels = smollm.torch_int8(model, in_float=["down"])
    for block in kernels.blocks:
        for name in ("q", "k", "v", "o", "gate", "up"):
            assert getattr(block, name).weight().dtype == torch.qint8
        assert type(block.down) is torch.nn.Linear
    assert type(kernels.head) is torch.nn.Linear and kernels.changes == ("torch int8",)
    assert state_bytes(model) == before and model.changes == ()
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(3))
    assert 0 < relative(kernels.blocks[1].up(x), model.blocks[1].up(x)) < 0.05
    assert not torch.equal(logits(kernels, tokens), reference)
    assert smollm.torch_int8(model).blocks[0].down.weight().dtype == torch.qint8
    by_row = smollm.torch_int8(model, per_channel=True).blocks[0].up.weight()
    assert by_row.qscheme() == torch.per_channel_affine and by_row.q_per_channel_scales().shape == (96,)
    with pytest.raises(ValueError, match="in_float must be of q, k, v, o, gate, up, down, got 'head'"):
        smollm.torch_int8(model, in_float=["head"])


# The real model


@pytest.mark.long
def test_the_real_model():
    model = smollm.load(progress=False)
    tokens = texts(model)["prose"][:1, :64]
    smoothed = smooth(model, statistics(model, tokens), 0.8, sites=PAIRS)
    assert relative(logits(smoothed, tokens), logits(model, tokens)) <= 2e-4
