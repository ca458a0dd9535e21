"""The affine quantizer against ONNX Runtime, torch, worked numbers and its own laws."""

import re
import warnings
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import helper
from torch.ao.quantization import observer

from qlab.affine import (
    QParams,
    absmax_params,
    dequantize,
    error_split,
    fake_quantize,
    mse,
    quantize,
    range_params,
    sqnr_db,
    zero_point_params,
)

SEVEN = np.float32([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])
ZERO_POINTS = [-128, -23, 0, 3, 127]
SCALES = [0.0625, 0.0721176, 3.7e-3]  # the first is a power of two
PROPERTY = settings(max_examples=100)


def many_values(scale, n=200_000):
    """Normal values over the whole range of codes and far outside of it, and the ties between codes."""
    normal = np.random.default_rng(0).normal(0, 100 * scale, n).astype(np.float32)
    ties = np.arange(-1200, 1201, dtype=np.float32) * np.float32(scale) / 2
    return np.concatenate([normal, ties, np.float32([1e4, -1e4, 1e9, -1e9]) * np.float32(scale)])


def onnx_run(op, *inputs, outputs=1, **attributes):
    """The outputs of one ONNX operator in ONNX Runtime."""
    types = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    names, results = [f"in{i}" for i in range(len(inputs))], [f"out{i}" for i in range(outputs)]
    declared = [helper.make_tensor_value_info(n, t, v.shape) for n, t, v in zip(names, types, inputs, strict=True)]
    graph = helper.make_graph([helper.make_node(op, names, results, **attributes)], op, declared,
                              [onnx.ValueInfoProto(name=name) for name in results])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))


def assert_equal_to_onnx(x, params, dtype, **attributes):
    both = np.array(params.scale, np.float32), np.array(params.zero_point, dtype)
    codes, = onnx_run("QuantizeLinear", x, *both, **attributes)
    values, = onnx_run("DequantizeLinear", codes, *both, **attributes)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(quantize(x, params), codes)
    np.testing.assert_array_equal(dequantize(codes, params), values)
    np.testing.assert_array_equal(fake_quantize(x, params), values)


def code_limits(dtype):
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_codes_and_values_equal_onnx_per_tensor(dtype, zero_point, scale):
    zero_point += 0 if dtype == np.int8 else 128
    for number in (scale, np.float32(scale)):
        params = QParams(number, zero_point, *code_limits(dtype))
        assert_equal_to_onnx(many_values(scale), params, dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("attributes", [{"axis": 0}, {"axis": 1}, {"axis": 1, "block_size": 50}])
def test_codes_and_values_equal_onnx_per_axis_and_group(attributes, dtype):
    rng = np.random.default_rng(1)
    x = many_values(0.0625)[:202_400].reshape(-1, 200)[rng.permutation(1012)]
    group_size = attributes.get("block_size")
    shape = (len(x), 200 // group_size) if group_size else x.shape[attributes["axis"]]
    params = QParams(rng.choice(np.float32(SCALES), shape), rng.choice(ZERO_POINTS, shape) + 128 * (dtype == np.uint8),
                     *code_limits(dtype), axis=None if group_size else attributes["axis"], group_size=group_size)
    assert_equal_to_onnx(x, params, dtype, **attributes)


def test_dynamic_parameters_equal_onnx():
    rng = np.random.default_rng(2)
    for i in range(210):
        x = (rng.standard_normal(rng.integers(2, 200)) * 10.0 ** rng.integers(-6, 7)).astype(np.float32)
        x = (x, np.abs(x), -np.abs(x))[i % 3]
        codes, scale, zero_point = onnx_run("DynamicQuantizeLinear", x, outputs=3)
        params = range_params(x.min(), x.max(), signed=False)
        assert (params.scale, params.zero_point) == (scale, zero_point)
        np.testing.assert_array_equal(quantize(x, params), codes)
        signed = zero_point_params(x)
        assert (signed.scale, signed.zero_point + 128) == (scale, zero_point)
        np.testing.assert_array_equal(quantize(x, signed) + 128, codes)


def test_dynamic_parameters_of_zeros_equal_onnx():
    zeros = np.zeros(5, np.float32)
    codes, scale, zero_point = onnx_run("DynamicQuantizeLinear", zeros, outputs=3)
    params = zero_point_params(zeros)
    assert (params.scale, params.zero_point) == (scale, zero_point) == (1, 0)
    np.testing.assert_array_equal(quantize(zeros, params), codes)


def torch_fake_quantize(x, params):
    limits = params.qmin, params.qmax
    if params.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, params.scale, params.zero_point, *limits)
    return torch.fake_quantize_per_channel_affine(x, params.scale, params.zero_point, params.axis, *limits)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equals_torch_fake_quantize_when_scales_are_powers_of_two(axis, zero_point):
    x = torch.from_numpy(many_values(0.0625)[:202_400]).reshape(-1, 200)
    scale = torch.tensor(0.0625)
    if axis is not None:
        scale = 2.0 ** torch.randint(-6, -1, (x.shape[axis],), generator=torch.Generator().manual_seed(0))
    params = QParams(scale, torch.full_like(scale, zero_point), -128, 127, axis=axis)
    assert torch.equal(fake_quantize(x, params), torch_fake_quantize(x, params))


@pytest.mark.parametrize("axis", [None, 0])
def test_differs_from_torch_fake_quantize_by_one_step_at_ties_only(axis):
    """torch multiplies by the float32 reciprocal of the scale, which can move a value across a tie."""
    x = torch.stack([torch.from_numpy(many_values(scale)) for scale in SCALES])
    scale, zero_point = torch.tensor(SCALES), torch.tensor([0, -23, 3], dtype=torch.int32)
    if axis is None:
        x, scale, zero_point = x[1], scale[1], zero_point[1]
    params = QParams(scale, zero_point, -128, 127, axis=axis)
    column = (scale, zero_point) if axis is None else (scale[:, None], zero_point[:, None])
    ours, theirs = fake_quantize(x, params), torch_fake_quantize(x, params)

    steps = ((ours.double() - theirs) / column[0]).round()
    u = x.double() / column[0]
    near_tie = ((u.abs() % 1) - 0.5).abs() <= 4 * 2**-24 * u.abs()
    assert 0 < (steps != 0).sum() < 0.01 * x.numel()
    assert steps.abs().max() == 1
    assert near_tie[steps != 0].all()

    reciprocal = (torch.round(x * (1 / column[0])) + column[1]).clamp(-128, 127)
    assert torch.equal(theirs, column[0] * (reciprocal - column[1]))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_gradient_of_x_equals_torch(zero_point):
    x = torch.from_numpy(many_values(0.0625)).requires_grad_()
    params = QParams(torch.tensor(0.0625), zero_point, -128, 127)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad(f(x, params), x, upstream)[0] for f in (fake_quantize, torch_fake_quantize))
    assert torch.equal(ours, theirs)
    assert 0 < (ours == 0).sum() < x.numel()


@pytest.mark.parametrize("axis", [None, 0])
def test_gradient_of_the_scale(axis):
    """LSQ's, but for values that rounding alone keeps inside."""
    x = torch.from_numpy(np.random.default_rng(3).normal(0, 4, (3, 5000)).astype(np.float32))
    scale = torch.nn.Parameter(torch.tensor([0.7, 1.0, 0.3] if axis == 0 else 0.7))
    fake_quantize(x, QParams(scale, torch.zeros_like(scale), -8, 7, axis=axis)).sum().backward()
    v = x / (scale.detach()[:, None] if axis == 0 else scale.detach())
    expected = torch.where(v.round() < -8, -8.0, torch.where(v.round() > 7, 7.0, v.round() - v)).double()
    expected = expected.sum() if axis is None else expected.sum(dim=1)
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("quint8", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_zero_point_parameters_equal_torch_observers(axis, quint8):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((40, 30)) + rng.uniform(-3, 3, (40, 1))).astype(np.float32)
    scale, zero_point = observed(x, axis, dtype=torch.quint8 if quint8 else torch.qint8)
    params = zero_point_params(x, axis=axis)
    np.testing.assert_array_equal(params.scale, scale)
    np.testing.assert_array_equal(params.zero_point + 128 * quint8, zero_point)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_absmax_parameters_equal_torch_symmetric_observers(axis):
    """With limits of -127 and 127; torch's default limits divide by 127.5 instead."""
    x = np.random.default_rng(5).standard_normal((40, 30)).astype(np.float32)
    params = absmax_params(x, axis=axis)
    symmetric = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric
    scale, zero_point = observed(x, axis, dtype=torch.qint8, qscheme=symmetric, quant_min=-127, quant_max=127)
    np.testing.assert_array_equal(params.scale, scale)
    assert not np.any(params.zero_point) and not np.any(zero_point)
    wide, _ = observed(x, axis, dtype=torch.qint8, qscheme=symmetric)
    np.testing.assert_allclose(params.scale * 127 / 127.5, wide, rtol=1e-6)


def observed(x, axis, **options):
    """Scale and zero-point that torch's min-max observer finds for ``x``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if axis is None:
            watcher = observer.MinMaxObserver(**options)
        else:
            options.setdefault("qscheme", torch.per_channel_affine)
            watcher = observer.PerChannelMinMaxObserver(ch_axis=axis, **options)
        watcher(torch.from_numpy(x))
        scale, zero_point = watcher.calculate_qparams()
    return (scale.numpy(), zero_point.numpy()) if axis is not None else (scale.item(), zero_point.item())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"axis": -1}, {"group_size": 25}])
@pytest.mark.parametrize("make_params", [absmax_params, zero_point_params])
def test_numpy_and_torch_agree_bit_for_bit(make_params, granularity, bits):
    x = many_values(1.0)[:20_000].reshape(20, 10, 100)
    with_numpy = make_params(x, bits, **granularity)
    with_torch = make_params(torch.from_numpy(x), bits, **granularity)
    assert isinstance(with_torch.scale, torch.Tensor)
    np.testing.assert_array_equal(with_numpy.scale, with_torch.scale.numpy())
    np.testing.assert_array_equal(with_numpy.zero_point, with_torch.zero_point.numpy())
    for function in (quantize, fake_quantize, lambda x, params: dequantize(quantize(x, params), params)):
        ours, theirs = function(x, with_numpy), function(torch.from_numpy(x), with_torch)
        assert theirs.numpy().dtype == ours.dtype
        np.testing.assert_array_equal(ours, theirs.numpy())
    for ours, theirs in zip(error_split(x, with_numpy), error_split(torch.from_numpy(x), with_torch), strict=True):
        assert ours == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.parametrize("granularity", [{"axis": 0}, {"axis": 1}, {"axis": 2}, {"axis": -2}, {"group_size": 4}])
@pytest.mark.parametrize("make_params", [absmax_params, zero_point_params])
def test_each_slice_is_quantized_as_if_alone(make_params, granularity):
    x = np.random.default_rng(6).standard_normal((3, 5, 8)).astype(np.float32)
    params = make_params(x, 4, **granularity)
    codes = quantize(x, params)
    if "axis" in granularity:
        slices = [(i, np.moveaxis(x, granularity["axis"], 0)[i], np.moveaxis(codes, granularity["axis"], 0)[i])
                  for i in range(x.shape[granularity["axis"]])]
    else:
        slices = [(i, x.reshape(3, 5, 2, 4)[i], codes.reshape(3, 5, 2, 4)[i]) for i in np.ndindex(3, 5, 2)]
    for i, part, part_codes in slices:
        alone = make_params(part, 4)
        assert (params.scale[i], params.zero_point[i]) == (alone.scale, alone.zero_point)
        np.testing.assert_array_equal(part_codes, quantize(part, alone))


@pytest.mark.parametrize(("make_params", "zero_point", "codes", "errors", "mean_squared"), [
    (absmax_params, 0, [64, 36, -89, 0, -23, -54, 127], [.0275, .0186, -.0215, 0, .0059, .0221, 0], 2.98e-4),
    (zero_point_params, -23, [53, 20, -128, -23, -50, -86, 127],
     [-.0109, -.0211, -.0176, 0, -.0028, -.0266, -.0176], 2.72e-4),
])
def test_the_seven_numbers(make_params, zero_point, codes, errors, mean_squared):
    params = make_params(SEVEN)
    assert params.zero_point == zero_point
    assert quantize(SEVEN, params).tolist() == codes
    x_hat = fake_quantize(SEVEN, params)
    np.testing.assert_allclose(SEVEN - x_hat, errors, atol=0.5001e-4)
    assert mse(SEVEN, x_hat) == pytest.approx(mean_squared, abs=0.5e-6)


@pytest.mark.parametrize(("narrow", "scale", "zero_point"), [(True, 0.763469, -125), (False, 0.760475, -126)])
def test_narrow_and_full_steps_of_one_range(narrow, scale, zero_point):
    params = range_params(-1.577, 192.344, narrow=narrow)
    assert (round(float(params.scale), 6), params.zero_point) == (scale, zero_point)
    assert (params.qmin, params.qmax) == (-127 if narrow else -128, 127)
    unsigned = range_params(-1.577, 192.344, narrow=narrow, signed=False)
    assert (unsigned.scale, unsigned.zero_point, unsigned.qmin) == (params.scale, zero_point + 128, params.qmin + 128)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("signed", [True, False])
def test_symmetric_range_covers_the_larger_end(bits, signed):
    params = range_params(-3.0, 2.0, bits, symmetric=True, signed=signed)
    middle, half = (0 if signed else 2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert (params.qmin, params.zero_point, params.qmax) == (middle - half, middle, middle + half)
    assert params.scale == np.float32(3 / half)


def make_quantizer(x, bits, kind, reach):
    if kind == "absmax":
        return absmax_params(x, bits)
    if kind == "zero-point":
        return zero_point_params(x, bits)
    low, high = reach * min(float(x.min()), 0.0), reach * max(float(x.max()), 0.0)
    assume(high - low > 1e-30)
    return range_params(low, high, bits, symmetric=kind == "symmetric range", narrow=kind == "narrow range")


BITS = st.integers(2, 16)
KIND = st.sampled_from(["absmax", "zero-point", "range", "narrow range", "symmetric range"])
REACH = st.floats(0.01, 1.5)
VALUES = arrays(np.float32, array_shapes(max_dims=3, max_side=12), elements=st.floats(-1e6, 1e6, width=32))


def quantizer_law(law):
    """Run ``law(x, params)`` over arrays and quantizers of every kind."""

    @PROPERTY
    @given(VALUES, BITS, KIND, REACH)
    def run(x, bits, kind, reach):
        law(x, make_quantizer(x, bits, kind, reach))

    return run


@quantizer_law
def test_zero_is_exact(x, params):
    zero = np.float32([0.0, -0.0])
    assert not fake_quantize(zero, params).any()
    assert (quantize(zero, params) == params.zero_point).all()


@quantizer_law
def test_codes_are_whole_within_limits_and_in_order(x, params):
    codes = quantize(np.sort(x, axis=None), params)
    assert codes.dtype == np.int32
    assert codes.min() >= params.qmin and codes.max() <= params.qmax
    assert (np.diff(codes) >= 0).all()


@quantizer_law
def test_error_inside_the_levels_is_half_a_step_at_most(x, params):
    scale, zero_point = float(params.scale), int(params.zero_point)
    low, high = scale * (params.qmin - zero_point), scale * (params.qmax - zero_point)
    inside = x[(x >= low) & (x <= high)]
    if inside.size:
        error = np.abs(inside.astype(np.float64) - fake_quantize(inside, params))
        assert (error <= scale / 2 + 2.0 * np.spacing(np.abs(inside))).all()


@quantizer_law
def test_fake_quantize_is_quantize_then_dequantize_and_idempotent(x, params):
    x_hat = fake_quantize(x, params)
    np.testing.assert_array_equal(x_hat.view(np.int32), dequantize(quantize(x, params), params).view(np.int32))
    np.testing.assert_array_equal(fake_quantize(x_hat, params), x_hat)


@quantizer_law
def test_error_split_sums_to_the_mean_squared_error(x, params):
    split = error_split(x, params)
    total = mse(x, fake_quantize(x, params))
    assert split.total == split.rounding + split.clipping == pytest.approx(total, rel=1e-9, abs=1e-300)
    low, high = (params.scale * np.float32(q - params.zero_point) for q in (params.qmin, params.qmax))
    assert (split.clipping > 0) == bool(((x < low) | (x > high)).any())


@PROPERTY
@given(VALUES, BITS)
def test_symmetric_quantizer_is_odd(x, bits):
    params = absmax_params(x, bits)
    np.testing.assert_array_equal(quantize(-x, params), -quantize(x, params))
    assert absmax_params(-x, bits).scale == params.scale


def test_tiny_data_keeps_a_normal_scale():
    x = np.float32([1e-45, 0])
    for params in (absmax_params(x), zero_point_params(x)):
        assert params.scale == np.finfo(np.float32).smallest_normal
        assert np.isfinite(fake_quantize(x, params)).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float16, bool])
def test_small_dtypes_are_exact_in_float32(dtype):
    x = np.array([1, 0, 1], dtype)
    assert absmax_params(x).scale.dtype == np.float32
    np.testing.assert_array_equal(quantize(x, absmax_params(x)), [127, 0, 127])


@pytest.mark.parametrize("asarray", [np.asarray, torch.asarray])
def test_codes_of_32_bits_saturate(asarray):
    x = asarray(np.float32([3e9, -3e9, 2**31 - 128, 2**24 + 2, 0]))
    params = QParams(1.0, 0, -(2**31), 2**31 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantize(x, params).tolist() == [2**31 - 1, -(2**31), 2**31 - 128, 2**24 + 2, 0]
        assert fake_quantize(x, params).tolist() == dequantize(quantize(x, params), params).tolist()


def test_a_sum_that_overflows_is_no_error():
    x = torch.tensor([3e38, 3e38, -3e38])
    assert quantize(x, absmax_params(x)).tolist() == [127, 127, -127]


def test_values_far_beyond_the_range_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantize(np.float32([3e38, -3e38]), QParams(1e-30, 0, -128, 127)).tolist() == [127, -128]


def test_numpy_and_torch_in_one_call():
    x, y = [1.0, -2.5], [1.0, -2.0]
    assert mse(torch.tensor(x), y) == mse(x, torch.tensor(y)) == 0.125
    assert sqnr_db(torch.tensor(x), np.array(y)).item() == pytest.approx(sqnr_db(x, y))
    params = range_params(torch.tensor([-1.0, -2.0]), [1.0, 2.0], axis=0)
    np.testing.assert_allclose(params.scale, range_params(*np.array([[-1.0, -2.0], [1.0, 2.0]]), axis=0).scale)
    assert range_params(torch.tensor(-1.0), 1).zero_point == 0
    learned = QParams(torch.tensor(0.5, requires_grad=True), 0, -8, 7)
    assert quantize(np.float32([1, 2]), learned).tolist() == [2, 4]


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_end_for_several_others(symmetric):
    params = range_params(-1, np.array([1.0, 2.0]), symmetric=symmetric, axis=0)
    each = [range_params(*np.array([-1.0, beta]), symmetric=symmetric) for beta in (1, 2)]
    assert params.scale.tolist() == [p.scale for p in each]
    assert params.zero_point.tolist() == [p.zero_point for p in each]


def test_sqnr_of_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sqnr_db([0.0, 0.0], [1.0, 0.0]) == -np.inf


def test_sqnr_of_equal_arrays_is_infinite():
    assert sqnr_db(SEVEN, SEVEN) == np.inf
    assert sqnr_db(torch.from_numpy(SEVEN), torch.from_numpy(SEVEN)) == np.inf


def test_sqnr_grows_by_6_db_per_bit():
    x = np.random.default_rng(7).uniform(-1, 1, 100_000)
    decibels = [sqnr_db(x, fake_quantize(x, range_params(-1, 1, bits))) for bits in range(2, 13)]
    np.testing.assert_allclose(np.diff(decibels)[4:], 6.02, atol=0.1)
    assert decibels[-1] == pytest.approx(6.02 * 12, abs=0.1)


ONE = QParams(np.float32(1), 0, -128, 127)
ROWS = np.zeros((2, 3), np.float32)
PER_ROW = QParams(np.float32([1, 2]), [0, 0], -128, 127, axis=0)
TAKES_X = {
    "quantize": partial(quantize, params=ONE),
    "fake_quantize": partial(fake_quantize, params=ONE),
    "error_split": partial(error_split, params=ONE),
    "absmax_params": absmax_params,
    "zero_point_params": zero_point_params,
    "mse": lambda x: mse(x, np.zeros(2)),
    "sqnr_db": lambda x: sqnr_db(x, np.zeros(2)),
}
BAD_X = [
    ([1.0, np.nan], "x must be finite, got 1 NaN and 0 infinite"),
    ([np.inf, -np.inf], "x must be finite, got 0 NaN and 2 infinite"),
    (torch.tensor([1.0, torch.nan]), "x must be finite, got 1 NaN and 0 infinite"),
    (torch.tensor([torch.inf, 1.0, -torch.inf]), "x must be finite, got 0 NaN and 2 infinite"),
    ([], r"x must not be empty, got shape \(0,\)"),
    (np.zeros((2, 0)), r"x must not be empty, got shape \(2, 0\)"),
    ("12", "x must be an array of real numbers, got '12' of dtype <U2"),
    (["1", "2"], r"x must be an array of real numbers, got \['1', '2'\] of dtype <U1"),
    ([1j, 2.0], r"x must be an array of real numbers, got \[1j, \(2\+0j\)\] of dtype complex128"),
    (torch.tensor([1j]), r"x must be an array of real numbers, got \[1j\] of dtype torch.complex64"),
    (None, "x must be an array of real numbers, got None of dtype object"),
    ([[1.0, 2.0], [3.0]], r"x must be an array of real numbers, got \[\[1.0, 2.0\], \[3.0\]\]"),
]


@pytest.mark.parametrize("function", TAKES_X.values(), ids=TAKES_X)
@pytest.mark.parametrize(("x", "message"), BAD_X)
def test_bad_data_is_named(function, x, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(x)


@pytest.mark.parametrize("bits", [1, 17, 8.0, True, "8", None, np.float64(8)])
@pytest.mark.parametrize("function", [partial(absmax_params, ROWS), partial(zero_point_params, ROWS),
                                      partial(range_params, -1, 1)], ids=["absmax", "zero_point", "range"])
def test_bad_bits_are_named(function, bits):
    with pytest.raises(ValueError, match=re.escape(f"bits must be an integer from 2 to 16, got {bits!r}")):
        function(bits)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: range_params(1, 1), "alpha must be less than beta, got alpha=1 and beta=1"),
    (lambda: range_params(2.5, -1), "alpha must be less than beta, got alpha=2.5 and beta=-1"),
    (lambda: range_params(np.zeros(2), np.array([1, 0])), r"alpha must be less than beta, got alpha=\[0, 0\] and beta"),
    (lambda: range_params(np.nan, 1), "alpha must be finite, got 1 NaN"),
    (lambda: range_params(-1, np.inf), "beta must be finite, got 0 NaN and 1 infinite"),
    (lambda: range_params("-1", 1), "alpha must be an array of real numbers, got '-1' of dtype <U2"),
    (lambda: range_params(-1, None), "beta must be an array of real numbers, got None of dtype object"),
    (lambda: range_params(torch.tensor(-3e38), torch.tensor(3e38)), r"beta - alpha must be finite .* got -3e\+38 and"),
    (lambda: range_params(-1e39, 1), r"alpha and beta must be from -1.7e\+38 to 1.7e\+38, got alpha=-1e\+39"),
    (lambda: range_params(0, 1.8e38), r"alpha and beta must be from .* got alpha=0 and beta=1.8e\+38"),
    (lambda: absmax_params(ROWS, axis=2), r"axis of .* \(2, 3\) must be an integer from -2 to 1, got 2"),
    (lambda: absmax_params(ROWS, axis=-3), "axis of .* must be .* got -3"),
    (lambda: absmax_params(ROWS, axis=0.0), "axis of .* must be .* got 0.0"),
    (lambda: absmax_params(ROWS, axis=True), "axis of .* must be .* got True"),
    (lambda: absmax_params(np.float32(1), axis=0), r"axis must be None for an array of shape \(\), got 0"),
    (lambda: absmax_params(ROWS, group_size=2), r"group_size must divide the last axis of .* \(2, 3\), got 2"),
    (lambda: zero_point_params(ROWS, group_size=0), "group_size must divide .* got 0"),
    (lambda: zero_point_params(ROWS, group_size=1.5), "group_size must be an integer, got 1.5"),
    (lambda: zero_point_params(np.float32(1), group_size=1), r"group_size must divide .* \(\), got 1"),
    (lambda: zero_point_params(ROWS, axis=0, group_size=3), "axis and group_size exclude each other, got 0 and 3"),
    (lambda: QParams(1.0, 0, -8, 7, axis=0, group_size=3), "axis and group_size exclude each other, got 0 and 3"),
    (lambda: QParams(0, 0, -8, 7), "scale must be greater than 0 and finite in float32, got 0"),
    (lambda: QParams([0.5, -0.25], [0, 0], -8, 7), r"scale must be greater than 0 .*, got \[0.5, -0.25\]"),
    (lambda: QParams(np.nan, 0, -8, 7), "scale must be finite, got 1 NaN"),
    (lambda: QParams("1", 0, -8, 7), "scale must be an array of real numbers, got '1' of dtype <U1"),
    (lambda: QParams(1.0, 8, -8, 7), "zero_point must be an integer from -8 to 7, got 8"),
    (lambda: QParams([1.0, 1.0], [0, -9], -8, 7), r"zero_point must be an integer from -8 to 7, got \[0, -9\]"),
    (lambda: QParams(1.0, 7, 7, 7), "qmax must be an integer from 8 to 2147483647, got 7"),
    (lambda: QParams(1.0, 0, -8, 2**31), "qmax must be an integer from -7 to 2147483647, got 2147483648"),
    (lambda: QParams(1e-50, 0, -8, 7), "scale must be greater than 0 and finite in float32, got 1e-50"),
    (lambda: QParams(1e39, 0, -8, 7), r"scale must be greater than 0 and finite in float32, got 1e\+39"),
    (lambda: quantize(ROWS, None), "params must be QParams, got None"),
    (lambda: fake_quantize(torch.ones(2), {"scale": 1}), r"params must be QParams, got \{'scale': 1\}"),
    (lambda: dequantize([1], 0.5), "params must be QParams, got 0.5"),
    (lambda: quantize(ROWS.T, PER_ROW), r"scale must have shape \(3,\) for an array of shape \(3, 2\), got \(2,\)"),
    (lambda: dequantize(ROWS.T, PER_ROW), r"scale must have shape \(3,\) .* got \(2,\)"),
    (lambda: fake_quantize(ROWS[0], QParams([1.0, 2.0], [0, 0], -8, 7)),
     r"scale must have shape \(\) .* got \(2,\)"),
    (lambda: quantize(ROWS[:, :2], absmax_params(ROWS, group_size=3)), "group_size must divide .* got 3"),
    (lambda: quantize(ROWS[:1], absmax_params(ROWS, group_size=3)), r"scale must have shape \(1, 1\) .* got \(2, 1\)"),
    (lambda: quantize(ROWS[0], QParams([1.0, 2.0], [0, 0], -8, 7, axis=1)), "axis of .* must be .* got 1"),
    (lambda: dequantize([], ONE), r"q must not be empty, got shape \(0,\)"),
    (lambda: mse(ROWS, ROWS.T), r"x and y must have the same shape, got \(2, 3\) and \(3, 2\)"),
    (lambda: sqnr_db(ROWS, ROWS[0]), r"x and y must have the same shape, got \(2, 3\) and \(3,\)"),
    (lambda: mse([0.0], [np.nan]), "y must be finite, got 1 NaN"),
    (lambda: sqnr_db([0.0], "a"), "y must be an array of real numbers"),
])
def test_bad_arguments_are_named_with_their_value(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("bits", [np.int8(8), np.uint8(8), np.int16(16)])
def test_bits_of_small_integer_types(bits):
    assert repr(range_params(-1, 1, bits)) == repr(range_params(-1, 1, int(bits)))


@pytest.mark.parametrize("zero_point", [0.5, np.nan, None, "0", 2**40])
def test_bad_zero_point_is_named(zero_point):
    with pytest.raises(ValueError, match="zero_point must be"):
        QParams(1.0, zero_point, -128, 127)


@pytest.mark.parametrize("shape", [2, 4])
def test_zero_point_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match="zero_point must have the shape of scale"):
        quantize(np.zeros((3, 4)), QParams(np.ones(3), np.zeros(shape), -8, 7, axis=0))


def test_overflow_of_a_range_does_not_warn():
    with warnings.catch_warnings(), pytest.raises(ValueError, match="beta - alpha must be finite"):
        warnings.simplefilter("error")
        range_params(*np.array([-1e308, 1e308]))


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_largest_ranges(bits, symmetric):
    largest = float(np.finfo(np.float32).max) / 2
    for alpha, beta in ((-largest, largest), (0, largest), (-largest, 0)):
        params = range_params(alpha, beta, bits, symmetric=symmetric)
        assert np.isfinite(dequantize([params.qmin, params.qmax], params)).all()


PLAIN = np.float32([0.25, -1.0, 0.5, 3.0])  # all of it in bfloat16 too
SAME = {
    "bfloat16": torch.tensor(PLAIN).bfloat16(), "float16": PLAIN.astype(np.float16), "parameter": torch.nn.Parameter(
        torch.tensor(PLAIN)), "big-endian": PLAIN.astype(">f4"), "reversed": PLAIN[::-1].copy()[::-1],
    "longdouble": PLAIN.astype(np.longdouble), "negated lazily": torch.complex(*[-torch.tensor(PLAIN)] * 2).conj().imag,
}
REFUSED = {
    "meta": torch.empty(4, device="meta"), "sparse": torch.tensor(PLAIN).to_sparse(), "object": PLAIN.astype(object),
    "masked": np.ma.array(PLAIN, mask=PLAIN > 2), "tensors": [torch.tensor(1.0, requires_grad=True)] * 2,
}


@pytest.mark.parametrize("x", SAME.values(), ids=SAME)
def test_every_kind_of_array_gives_what_float32_gives(x):
    params = QParams(np.float32(0.5), 0, -4, 3)
    expected = mse(PLAIN, fake_quantize(PLAIN, params))
    assert quantize(x, params).tolist() == quantize(PLAIN, params).tolist()
    assert float(error_split(x, params).total) == float(mse(x, fake_quantize(x, params))) == expected
    assert float(absmax_params(x).scale) == pytest.approx(absmax_params(PLAIN).scale, rel=1e-7)
    read_only = np.broadcast_to(np.float32(0.5), ())
    assert quantize(torch.tensor(PLAIN), QParams(read_only, 0, -4, 3)).tolist() == quantize(PLAIN, params).tolist()


@pytest.mark.parametrize("function", TAKES_X.values(), ids=TAKES_X)
@pytest.mark.parametrize("x", REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_array_is_refused(x, function):
    with pytest.raises(ValueError, match=r"^x must be an array of real|^x must be a dense tensor|^x must be .* mask"):
        function(x)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("s", [1e-45, 1e-38, 1e-30, 1e-20, 1.0])
def test_gradients_stay_finite_where_steps_overflow(s):
    scale = torch.tensor(s, requires_grad=True)
    x = torch.tensor([3e38, -1e30, 5 * s, 0.0], requires_grad=True)
    params = QParams(scale, 0, -128, 127)
    x_hat = fake_quantize(x, params)
    assert torch.equal(x_hat, dequantize(quantize(x, params), params))
    x_hat.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 0, 1, 1])
    assert scale.grad.item() == pytest.approx(127 - 128 + round(5 * s / s) - 5, abs=1e-4)


def test_codes_beyond_24_bits_are_exact():
    limits = -(2**31), 2**31 - 1
    for one in (np.float32(1), torch.tensor(1.0)):
        assert dequantize([2**31 - 2, 2**31 - 4], QParams(one, 2**31 - 1, *limits)).tolist() == [-1, -3]
        assert fake_quantize(np.float32([-1, -2]), QParams(one, 2**31 - 1, *limits)).tolist() == [-1, -2]
    assert dequantize(torch.tensor([5], dtype=torch.int8), QParams(torch.tensor(1.0), 2**24 + 1, *limits)) == 4 - 2**24


@pytest.mark.parametrize("zero_point", [np.float32(2**31), 2.0**31, True, np.array(True), torch.tensor(True), 2**31])
def test_zero_points_that_are_no_int32_are_named(zero_point):
    with pytest.raises(ValueError, match=r"^zero_point must be an integer from"):
        QParams(1.0, zero_point, -(2**31), 2**31 - 1)


def test_levels_and_errors_are_finite_or_refused():
    with pytest.raises(ValueError, match=r"^scale must give levels that are finite in float32"):
        QParams(np.float32(3e38), 0, -8, 7)
    with pytest.raises(ValueError, match=r"^x and y must have a mean squared error that float64 holds"):
        mse([1e300], [-1e300])


def test_sqnr_of_the_largest_and_the_smallest_data():
    for size in (1e-320, 1e-200, 1.0, 1e200, 1.7e308):
        x = size * np.array([1.0, -1.0])
        assert sqnr_db(x, x / 2) == pytest.approx(6.0206, abs=1e-3)
        assert sqnr_db(x, -x) == pytest.approx(-6.0206, abs=1e-3)
