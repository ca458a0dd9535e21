"""Block formats against gguf, ml_dtypes, torchao, bitsandbytes and compressed-tensors, bit for bit, and by property."""

import json
from dataclasses import replace
from statistics import NormalDist

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qlab import samples
from qlab.affine import sqnr_db
from qlab.blocks import (
    E8M0,
    FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NF4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q8_0,
    BlockFormat,
    Blocks,
    dequantize,
    pack,
    quantize,
)
from qlab.floats import FP4_E2M1, FP8_E4M3, FP16, FP32, FloatFormat, decode
from tests import golden_blocks
from tests.golden_blocks import LARGEST, MX, RULES

pytestmark = pytest.mark.filterwarnings("error")

IN_GGUF = {fmt: GGMLQuantizationType[fmt.name] for fmt in (MXFP4, NVFP4, Q4_0, Q4_1, Q8_0)}
WITH_FP16 = (Q4_0, Q4_1, Q8_0)
ELEMENTS = dict(zip(MX, (ml_dtypes.float4_e2m1fn, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn,
                         ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2), strict=True))
RANDOM, EDGES = golden_blocks.random_values(), golden_blocks.edges()
NVFP4_EDGES = golden_blocks.nvfp4_edges()
GOLDEN = json.loads(golden_blocks.FILE.read_text())


def unpack(data, fmt):
    """`pack` backwards."""
    head = fmt.record * fmt.scale_bits // 8
    records = data.reshape(-1, head + fmt.record * fmt.block * fmt.element_bits // 8)
    heads, codes = np.ascontiguousarray(records[:, :head]), records[:, head:].reshape(len(records) * fmt.record, -1)
    if fmt.scale == E8M0:
        scales = [np.where(heads == 255, np.nan, np.exp2(heads - 127.0)).astype(np.float32)]
    else:
        values = decode(heads.view(fmt.scale.code_dtype.newbyteorder("<")), fmt.scale).astype(np.float32)
        scales = np.split(values, values.shape[1] // fmt.record, axis=1)
    if fmt.element_bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
    shape = (*data.shape[:-1], -1)
    scales, *minima = (part.reshape(shape) for part in scales)
    codes = np.ascontiguousarray(codes).view(fmt.code_dtype).reshape(shape)
    return Blocks(codes, scales, minima=minima[0] if minima else None, format=fmt)
TINY = np.float32(2.0**-126)


def per_format(formats):
    return pytest.mark.parametrize("fmt", formats, ids=lambda fmt: fmt.name)


def in_fp16(x):
    """Rows whose scales FP16 holds, as normal numbers or 0."""
    peak = np.abs(x).max(axis=1)
    return x[(peak < 60_000) & ((peak > 1) | (peak == 0))]


def gguf_quantize(x, fmt):
    with np.errstate(all="ignore"):
        return gguf.quantize(x, IN_GGUF[fmt])


def gguf_dequantize(data, fmt):
    with np.errstate(all="ignore"):
        return gguf.dequantize(data, IN_GGUF[fmt])


def patched(array, other):
    """With a library's own values at the places where it differs."""
    array = array.copy()
    array.ravel()[other["places"]] = np.asarray(other["theirs"], array.dtype)
    return array


def block_peaks(x, places, size):
    """The largest magnitude of the blocks that flat places are in."""
    return np.abs(x).reshape(-1, size).max(axis=1)[np.asarray(places, int) // size]


@per_format(WITH_FP16)
@pytest.mark.parametrize("x", [RANDOM, in_fp16(EDGES)], ids=["random", "edges"])
def test_bytes_equal_those_of_gguf(fmt, x):
    blocks, expected = quantize(x, fmt), gguf_quantize(x, fmt)
    np.testing.assert_array_equal(pack(blocks), expected)
    values = gguf_dequantize(expected, fmt)
    np.testing.assert_array_equal(dequantize(blocks).view(np.uint32), values.view(np.uint32))


def test_gguf_sends_mxfp4s_ties_towards_0_and_has_no_negative_0():
    for x in (RANDOM, EDGES[np.abs(EDGES).max(axis=1) > 1e-30]):
        blocks, theirs = quantize(x, MXFP4), unpack(gguf_quantize(x, MXFP4), MXFP4)
        high = np.abs(x).reshape(*blocks.scales.shape, 32).max(axis=-1) == LARGEST  # see the next test
        assert np.array_equal(theirs.scales[~high], blocks.scales[~high])
        ours = dequantize(blocks)
        high = np.repeat(high, 32, axis=1)
        other = (theirs.codes != blocks.codes) & ~high
        steps = np.abs(x / np.repeat(blocks.scales, 32, axis=1))
        tie = np.isin(steps, [0.75, 1.75, 3.5])  # between an odd code below and an even code above
        assert np.array_equal(other, ((tie & (steps < 7)) | (blocks.codes == 8)) & ~high)
        values = dequantize(theirs)
        assert np.array_equal(values[~tie & ~high], ours[~tie & ~high])
        assert (np.abs(values) < np.abs(ours))[tie & ~high].all()


@pytest.mark.parametrize("power", [20, -20, 128])
def test_gguf_rounds_the_logarithm_just_below_a_power_of_two(power):
    x = np.full(32, LARGEST if power == 128 else np.nextafter(np.float32(2.0**power), np.float32(0)), np.float32)
    assert gguf_quantize(x, MXFP4)[0] == 127 + power - 2
    assert pack(quantize(x, MXFP4))[0] == 127 + power - 3


def test_gguf_wraps_the_scale_of_a_block_of_tiny_numbers():
    x = np.full(32, TINY)
    assert gguf_quantize(x, MXFP4)[0] == 255  # which is NaN
    assert pack(quantize(x, MXFP4))[0] == 0


@per_format(IN_GGUF)
def test_gguf_reads_what_is_packed(fmt):
    x = np.concatenate([RANDOM[:2000], in_fp16(EDGES)])
    blocks = replace(quantize(x, fmt), tensor_scale=None)  # which a file has elsewhere
    data = pack(blocks)
    assert data.shape[1] * 8 == 64 * fmt.bits_per_value
    np.testing.assert_array_equal(dequantize(blocks), gguf_dequantize(data, fmt))
    again = unpack(data, fmt)
    assert again.format == fmt
    for name in ("codes", "scales", "minima"):
        np.testing.assert_array_equal(getattr(again, name), getattr(blocks, name))


def test_all_bytes_of_a_record_can_be_read():
    for fmt in IN_GGUF:
        size = 3, int(16 * fmt.bits_per_value)  # bytes of 128 values
        data = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
        if fmt == NVFP4:
            data[:, [0, 1, 2, 3, 36, 37, 38, 39]] &= 0x77  # GGUF's scales have no sign, and it takes NaN for 0
        if fmt == MXFP4:
            data[:, ::17] %= 255  # NaN, which gguf reads as 2^127
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(dequantize(unpack(data, fmt)), gguf_dequantize(data, fmt))


def test_a_scale_of_all_ones_is_nan():
    data = pack(quantize(np.ones(32, np.float32), MXFP4))
    data[0] = 255
    assert np.isnan(dequantize(unpack(data, MXFP4))).all()
    assert pack(unpack(data, MXFP4))[0] == 255


@per_format(MX)
@pytest.mark.parametrize("x", [RANDOM[:4000], EDGES], ids=["random", "edges"])
def test_mx_equals_the_definition_in_ml_dtypes(fmt, x):
    blocks = quantize(x, fmt)
    runs = x.reshape(len(x), -1, 32).astype(np.float64)
    peak = np.abs(runs).max(axis=-1)
    with np.errstate(divide="ignore"):
        power = np.floor(np.log2(peak)) - np.floor(np.log2(fmt.largest))
    power = np.maximum(power, -127)
    np.testing.assert_array_equal(blocks.scales, 2.0**power)
    assert np.array_equal(blocks.scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8),
                          golden_blocks.scale_codes(blocks))
    steps = np.clip(runs / 2.0**power[..., None], -fmt.largest, fmt.largest)
    elements = steps.astype(np.float32).astype(ELEMENTS[fmt])
    np.testing.assert_array_equal(blocks.codes, elements.view(np.uint8).reshape(x.shape))
    with np.errstate(under="ignore"):
        values = (elements.astype(np.float64) * 2.0**power[..., None]).reshape(x.shape)
        np.testing.assert_array_equal(dequantize(blocks), values.astype(np.float32))


@pytest.mark.parametrize("x", [RANDOM, NVFP4_EDGES], ids=["random", "edges"])
def test_nvfp4_equals_the_definition_in_ml_dtypes(x):
    blocks = quantize(x, NVFP4)
    runs = x.reshape(len(x), -1, 16)
    tensor_scale = np.abs(x).max() / np.float32(6 * 448)
    scales = (np.abs(runs).max(axis=-1) / np.float32(6) / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    assert blocks.tensor_scale == tensor_scale
    np.testing.assert_array_equal(golden_blocks.scale_codes(blocks), scales.view(np.uint8))
    s = (scales.astype(np.float32) * tensor_scale)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        elements = np.where(s > 0, np.clip(runs / s, -6, 6), np.copysign(0, runs)).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(blocks.codes, elements.view(np.uint8).reshape(x.shape))
    np.testing.assert_array_equal(dequantize(blocks), (elements.astype(np.float32) * s).reshape(x.shape))


@per_format(MX)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name, x", [("random", RANDOM), ("edges", EDGES)], ids=["random", "edges"])
def test_mx_equals_torchao(fmt, rule, name, x):
    golden, blocks = GOLDEN[f"torchao {fmt.name} {rule} {name}"], quantize(x, replace(fmt, rule=rule))
    scales, other = golden_blocks.scale_codes(blocks), golden["other codes"]
    assert golden_blocks.digest(scales) == golden["scales"]
    assert golden_blocks.digest(patched(blocks.codes, other)) == golden["codes"]
    # torchao divides by 2^−126 where it stores 2^−127.
    assert (block_peaks(x, other["places"], 32) <= TINY).all()
    assert (scales.ravel()[np.asarray(other["places"], int) // 32] == 0).all()


@pytest.mark.parametrize("name, x", [("random", RANDOM), ("edges", NVFP4_EDGES)], ids=["random", "edges"])
def test_nvfp4_equals_torchao_but_for_the_smallest_scales_and_a_reciprocal(name, x):
    golden, blocks = GOLDEN[f"torchao NVFP4 {name}"], quantize(x, NVFP4)
    scales = golden_blocks.scale_codes(blocks)
    assert blocks.tensor_scale == np.float32(golden["tensor_scale"])
    assert golden_blocks.digest(patched(scales, golden["other scales"])) == golden["scales"]
    assert golden_blocks.digest(patched(blocks.codes, golden["other codes"])) == golden["codes"]
    # torchao stores no scale below E4M3's smallest normal number.
    clamped = np.asarray(golden["other scales"]["places"], int)
    assert (blocks.scales.ravel()[clamped] < 2.0**-6).all()
    assert (np.asarray(golden["other scales"]["theirs"]) == 8).all()
    places = np.asarray(golden["other codes"]["places"], int)
    places = places[~np.isin(places // 16, clamped)]
    # It multiplies by the reciprocal of the scale, and so meets a tie where the value is next to one.
    steps = x.ravel()[places] / (blocks.scales.ravel() * blocks.tensor_scale)[places // 16]
    beside = [np.nextafter(np.float32(tie), np.float32(0)) for tie in (1.75, 3.5)]
    assert np.isin(np.abs(steps), beside).all()
    assert len(places) == (4 if name == "edges" else 0)


@pytest.mark.parametrize("name, x", [("random", RANDOM), ("edges", EDGES)], ids=["random", "edges"])
def test_nf4_equals_bitsandbytes(name, x):
    golden, blocks = GOLDEN[f"bitsandbytes NF4 {name}"], quantize(x, NF4)
    found = {"codes": blocks.codes, "scales": blocks.scales, "values": dequantize(blocks)}
    assert {key: golden_blocks.digest(array) for key, array in found.items()} == {key: golden[key] for key in found}


@pytest.mark.parametrize("name, x", [("random", RANDOM), ("edges", EDGES)], ids=["random", "edges"])
def test_compressed_tensors_takes_the_rule_even(name, x):
    golden, x = GOLDEN[f"compressed-tensors MXFP4 even {name}"], golden_blocks.finite_in_it(x)
    blocks = quantize(x, replace(MXFP4, rule="even"))
    other = golden["other values"]
    assert golden_blocks.digest(blocks.scales) == golden["scales"]
    assert golden_blocks.digest(patched(dequantize(blocks), other)) == golden["values"]
    assert not x.ravel()[other["places"]].any()  # it gives −0 a positive sign


@pytest.mark.parametrize("rule, scale, codes", [
    ("floor", 1.0, [7, 7, 15]), ("ceil", 2.0, [6, 5, 14]), ("even", 2.0, [6, 5, 14]),
])
def test_three_rules_three_results(rule, scale, codes):
    x = np.float32([7.5, 6, -7] + 29 * [0])
    blocks = quantize(x, replace(MXFP4, rule=rule))
    assert (blocks.scales.tolist(), blocks.codes[:3].tolist()) == ([scale], codes)


@per_format(MX)
@pytest.mark.parametrize("rule", RULES)
def test_where_the_rules_go_to_the_next_scale(fmt, rule):
    half_step = 2.0 ** -(fmt.element.mantissa_bits + 1)
    unit = 2.0 ** np.floor(np.log2(fmt.largest))
    peaks = np.float32([1, 1 + 2.0**-23, 2 - half_step - 2.0**-22, 2 - half_step, 2 - 2.0**-23])
    moves = {"floor": [0, 0, 0, 0, 0], "ceil": [0, 1, 1, 1, 1], "even": [0, 0, 0, 1, 1]}[rule]
    found = [quantize(np.full(32, peak * unit, np.float32), replace(fmt, rule=rule)).scales[0] for peak in peaks]
    assert found == [2.0**move for move in moves]


def test_nf4_is_the_quantiles_of_a_normal():
    below, above = ([NormalDist().inv_cdf(p) for p in np.linspace(0.5, 0.9677083, n)[1:]] for n in (8, 9))
    expected = np.array([*(-q for q in below[::-1]), 0, *above]) / above[-1]
    np.testing.assert_allclose(NF4.levels, expected, rtol=0, atol=3e-7)


def test_bits_per_value():
    assert {fmt.name: fmt.bits_per_value for fmt in FORMATS} == {
        "MXFP8 E5M2": 8.25, "MXFP8 E4M3": 8.25, "MXFP6 E3M2": 6.25, "MXFP6 E2M3": 6.25, "MXFP4": 4.25, "NVFP4": 4.5,
        "NF4": 4.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5,
    }
    assert replace(NF4, scale=FP16).bits_per_value == 4.25


def test_decibels_of_real_weights():
    w = samples.load("weights")
    found = {fmt.name: round(float(sqnr_db(w, dequantize(quantize(w, fmt)))), 1) for fmt in FORMATS}
    assert found["Q4_1"] > found["Q4_0"] > found["NF4"] > found["NVFP4"] > found["MXFP4"]
    assert found["Q8_0"] > found["MXFP6 E2M3"] > found["MXFP8 E4M3"]


@per_format(FORMATS)
def test_zeros_stay_zeros(fmt):
    x = np.zeros((2, 64), np.float32)
    x[1, ::2] = -0.0
    blocks = quantize(x, fmt)
    assert not dequantize(blocks).any()
    if fmt.tensor_scale:
        assert blocks.tensor_scale == 1


@per_format(FORMATS)
@pytest.mark.parametrize("x", [1e-45, 3e-39, -1e-41])
def test_the_smallest_numbers(fmt, x):
    with np.errstate(all="raise"):
        y = dequantize(quantize(np.full(64, x, np.float32), fmt))
    assert np.isfinite(y).all()
    assert (np.abs(y) <= 2 * abs(x)).all()


FLOATS = st.floats(-1000, 1000, width=32)
ROWS = arrays(np.float32, (2, 64), elements=FLOATS)
OWN_VALUES = [fmt for fmt in FORMATS if fmt not in (NVFP4, Q4_1)]  # whose scales come back from the values


@per_format(OWN_VALUES)
@settings(max_examples=30)
@given(x=ROWS)
def test_dequantized_values_are_kept(fmt, x):
    x = np.where(np.abs(x) < 1e-2, np.float32(0), x)  # FP16's scales are normal numbers
    blocks = quantize(x, fmt)
    again = quantize(dequantize(blocks), fmt)
    np.testing.assert_array_equal(dequantize(again), dequantize(blocks))
    np.testing.assert_array_equal(again.scales, blocks.scales)
    if fmt.rounding != "even":  # else, of two zeros, −0 may come back as 0
        np.testing.assert_array_equal(again.codes, blocks.codes)


@per_format([*MX, NVFP4, NF4])
@settings(max_examples=30)
@given(x=ROWS)
def test_each_value_goes_to_the_nearest_level(fmt, x):
    blocks = quantize(x, fmt)
    scales = np.float64(blocks.scales) * (blocks.tensor_scale if fmt.tensor_scale else 1)
    levels = fmt.levels[np.isfinite(fmt.levels)].astype(np.float64)
    runs = x.reshape(*scales.shape, fmt.block, 1).astype(np.float64)
    least = np.abs(runs - levels * scales[..., None, None]).min(axis=-1).reshape(x.shape)
    found = np.abs(x - np.float64(dequantize(blocks)))
    assert (found <= least + 1e-6 * np.abs(x)).all()


@per_format([*MX, NF4])
@settings(max_examples=30)
@given(x=ROWS, power=st.integers(-20, 20), rule=st.sampled_from(RULES))
def test_a_power_of_two_goes_into_the_scale(fmt, x, power, rule):
    fmt = replace(fmt, rule=rule) if fmt in MX else fmt
    x = np.where(np.abs(x) < 1e-20, np.float32(0), x)
    x[:, ::fmt.block] = 1
    blocks, scaled = quantize(x, fmt), quantize(np.ldexp(x, power), fmt)
    np.testing.assert_array_equal(scaled.codes, blocks.codes)
    np.testing.assert_array_equal(scaled.scales, np.ldexp(blocks.scales, power))


@per_format(FORMATS)
def test_blocks_run_along_the_last_axis(fmt):
    x = RANDOM[:12].reshape(2, 3, 128)
    blocks = quantize(x, fmt)
    assert blocks.codes.shape == x.shape
    assert blocks.scales.shape == (2, 3, 128 // fmt.block)
    if not fmt.tensor_scale:
        np.testing.assert_array_equal(quantize(x[1, 2], fmt).codes, blocks.codes[1, 2])


@per_format([MXFP4, Q4_0])
@pytest.mark.parametrize("x", [
    RANDOM[:2].astype(np.float64), RANDOM[:2].astype(np.float16), torch.tensor(RANDOM[:2]).bfloat16(),
    torch.tensor(RANDOM[:2], requires_grad=True), RANDOM[:4, ::2], RANDOM[:2].astype(">f4"), RANDOM[:2].tolist(),
], ids=["float64", "float16", "bfloat16", "with a gradient", "strided", "big-endian", "lists"])
def test_kinds_of_floats(fmt, x):
    plain = x.detach().float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    expected = quantize(np.ascontiguousarray(plain, np.float32), fmt)
    np.testing.assert_array_equal(quantize(x, fmt).codes, expected.codes)


ONES = np.ones(64, np.float32)


@pytest.mark.parametrize("x, part", [
    (np.float32([]), "not be empty"), (np.float32(1), "multiple of 32, the block of MXFP4, got shape \\(\\)"),
    (np.ones((64, 3), np.float32), "multiple of 32.*\\(64, 3\\)"), (ONES * np.nan, "64 NaN and 0 infinite"),
    (ONES * -np.inf, "0 NaN and 64 infinite"), (np.ones(64, int), "floats.*int64"), (np.ones(64, bool), "bool"),
    (np.ones(64, complex), "complex128"), (ONES.astype(ml_dtypes.bfloat16), "bfloat16"),
    (np.full(64, -1e39), "within float32"), (torch.ones(64, dtype=torch.int32), "int32"), ("abc", "floats"),
])
def test_bad_input(x, part):
    with pytest.raises(ValueError, match=part):
        quantize(x, MXFP4)


@per_format(WITH_FP16)
def test_a_scale_beyond_fp16(fmt):
    with pytest.raises(ValueError, match=f"within FP16 for {fmt.name}, the largest is 65504"):
        quantize(np.linspace(-1e8, 1e8, 32, dtype=np.float32), fmt)


def test_the_minimum_of_q4_1_beyond_fp16():
    with pytest.raises(ValueError, match="within FP16"):
        quantize(np.full(32, -7e4, np.float32), Q4_1)


@pytest.mark.parametrize("change, part", [
    ({"rule": "round"}, "rule must be one of floor, ceil, even .*'round'"), ({"rule": "absmax"}, "floor, ceil, even"),
    ({"scale": FP16}, "rule must be one of absmax for"), ({"tensor_scale": True}, "tensor_scale"),
    ({"record": -1}, "record"),
    ({"element": (0.0, 1.0), "rounding": "down"}, "rule must be one of none"),
    ({"element": (1.0, 0.0), "rounding": "down"}, "rising"), ({"element": (0, 2), "rounding": "up"}, "neighbouring"),
    ({"element": (0, 1), "rounding": "away"}, "int8"), ({"element": (-2, -1), "rounding": "up"}, "some above 0"),
    ({"element": (0, 1), "rounding": "up", "scale": FP16, "rule": "signed absmax"}, "of absmax, min-max for"),
    ({"element": (-1, 0, 1), "rounding": "up", "scale": FP16, "rule": "min-max"}, "of absmax, signed absmax for"),
    ({"block": 0}, "block must be an integer of at least 1, got 0"),
    ({"block": 2.5}, "block"), ({"element": FP16}, "up to 8 bits"), ({"element": "E2M1", "rounding": "up"}, "'E2M1'"),
    ({"element": (0.0, np.inf), "rounding": "down"}, "finite"),
    ({"scale": "E5M3"}, "scale must be a FloatFormat or 'E8M0', got 'E5M3'"),
    ({"rounding": "up"}, "rounding must be 'even' for a float"), ({"rounding": "nearest"}, "rounding"),
])
def test_bad_formats(change, part):
    with pytest.raises(ValueError, match=part):
        replace(MXFP4, **change)


@pytest.mark.parametrize("call, part", [
    (lambda: quantize(ONES, "MXFP4"), "fmt must be a BlockFormat, such as MXFP4, got 'MXFP4'"),
    (lambda: quantize(ONES, FP4_E2M1), "BlockFormat"), (lambda: dequantize(ONES), "blocks must be Blocks"),
    (lambda: pack(ONES), "blocks must be Blocks"), (lambda: pack(quantize(ONES, NF4)), "MXFP4, NVFP4, Q4_0.*got NF4"),
    (lambda: pack(quantize(ONES[:32], NVFP4)), "multiple of 64"),
    (lambda: Blocks(np.zeros(64, np.uint8), np.ones(1)), "scales must have shape \\(2,\\)"),
    (lambda: dequantize(Blocks(np.full(32, 16, np.uint8), np.ones(1))), "uint8 and below 16, got uint8 up to 16"),
    (lambda: dequantize(Blocks(np.zeros(32), np.ones(1))), "got float64"),
    (lambda: Blocks(np.zeros(32, np.uint8), np.ones(1), format="MXFP4"), "fmt must be a BlockFormat"),
])
def test_bad_calls(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_a_format_of_ones_own():
    ternary = BlockFormat("ternary", (-1, 0, 1), 64, FP16, "absmax", "down")
    assert ternary.bits_per_value == 2.25
    y = dequantize(quantize(np.linspace(-2, 2, 64, dtype=np.float32), ternary))
    assert np.unique(y).tolist() == [-2, 0, 2]
    per_row = BlockFormat("FP8 per row", FP8_E4M3, 64, FP32, "absmax")
    assert sqnr_db(RANDOM, dequantize(quantize(RANDOM, per_row))) > 30
    assert quantize(RANDOM, replace(MXFP8_E5M2, block=64)).scales.shape == (len(RANDOM), 1)
    assert MXFP6_E3M2.levels.max() == 28
    assert MXFP6_E2M3.code_dtype == np.uint8
    assert MXFP8_E4M3.levels.size == 256


def test_a_scale_beyond_the_largest_power_is_refused():
    small = BlockFormat("small", FloatFormat("E2M1b", 2, 1, bias=4, specials="none"), 32)
    for rule in ("floor", "ceil", "even"):
        with pytest.raises(ValueError, match=r"scale is at most 2\^127, got 2\^12"):
            quantize(np.full(32, 3e38, np.float32), replace(small, rule=rule))
