"""Integer arithmetic against exact fractions, gemmlowp's own steps, ONNX Runtime, and the simulation in floats."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn

from qlab import digits, ptq, samples
from qlab.affine import QParams, absmax_params, dequantize, quantize, range_params, zero_point_params
from qlab.integer import (
    INT32_MAX,
    INT32_MIN,
    ROUNDINGS,
    IntegerLayer,
    accumulate,
    convert,
    quantize_multiplier,
    requantize,
    round_biases,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
    simulated_codes,
)
from qlab.ptq import QuantizedLayer
from tests import onnx_export
from tests.onnx_export import to_onnx

PROPERTY = settings(max_examples=200)
INT32 = st.integers(INT32_MIN, INT32_MAX)
INT8 = {"zero_point": 0, "qmin": -128, "qmax": 127}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine torch's threads wait for each other many times longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Multipliers


@PROPERTY
@given(st.floats(min_value=5e-324, allow_infinity=False))
@example(5e-324)
@example(1 - 2**-53)  # rounds up to 2³¹, which is 2³⁰ of the next shift
@example(1 - 2**-33)
@example(1.0)
@example((2**30 + 0.5) / 2**31)  # a tie: away from zero
def test_multiplier_is_the_nearest_one(m):
    m0, shift = quantize_multiplier(m)
    assert type(m0) is type(shift) is int
    assert 2**30 <= m0 < 2**31
    approximation = m0 * Fraction(2) ** (-31 - shift)
    assert abs(approximation - Fraction(m)) <= Fraction(m) * Fraction(1, 2**31)
    fraction, exponent = math.frexp(m)
    mantissa = math.floor(Fraction(fraction) * 2**31 + Fraction(1, 2))
    assert (m0, shift) == ((2**30, -exponent - 1) if mantissa == 2**31 else (mantissa, -exponent))


def test_multiplier_of_a_power_of_two_is_exact():
    for exponent in range(-60, 60):
        assert quantize_multiplier(2.0**exponent) == (2**30, -exponent - 1)


def test_multipliers_per_channel_equal_those_one_by_one():
    m = np.float32([[3e-5, 0.5, 0.99999997], [1.0, 7.3, 1e9]])
    m0, shift = quantize_multiplier(m)
    assert m0.dtype == shift.dtype == np.int32
    pairs = [(int(a), int(b)) for a, b in zip(m0.flat, shift.flat, strict=True)]
    assert pairs == [quantize_multiplier(float(value)) for value in m.flat]


@pytest.mark.parametrize(("m", "message"), [
    (0.0, "m must be greater than 0, got 0"),
    (-0.5, "m must be greater than 0, got -0.5"),
    ([0.5, -2.0], "m must be greater than 0, got -2"),
    (np.nan, "m must be finite, got 1 NaN"),
    (np.inf, "m must be finite, got 0 NaN and 1 infinite"),
    ([], "m must not be empty"),
    ("0.5", "m must be an array of real numbers, got '0.5' of dtype <U3"),
    (None, "m must be an array of real numbers"),
])
def test_bad_multiplier_is_named(m, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        quantize_multiplier(m)


# Requantization


def truncated(numerator, denominator):
    """Division as in C: toward zero."""
    quotient = abs(numerator) // denominator
    return quotient if numerator >= 0 else -quotient


def high_mul_of_gemmlowp(a, b):
    """SaturatingRoundingDoublingHighMul, step by step as published, in Python's integers."""
    if a == b == INT32_MIN:
        return INT32_MAX
    ab = a * b
    nudge = 2**30 if ab >= 0 else 1 - 2**30
    return truncated(ab + nudge, 2**31)


def divide_of_gemmlowp(x, exponent):
    """RoundingDivideByPOT, step by step as published."""
    mask = (1 << exponent) - 1
    remainder = x & mask
    threshold = (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def exactly(acc, m0, shift, rounding):
    if rounding == "gemmlowp":
        acc = min(max(acc << max(-shift, 0), INT32_MIN), INT32_MAX)
        return divide_of_gemmlowp(high_mul_of_gemmlowp(acc, m0), max(shift, 0))
    x = Fraction(acc * m0) / Fraction(2) ** (31 + shift)
    return round(x) if rounding == "even" else math.floor(x + Fraction(1, 2))  # Python rounds fractions half to even


@pytest.mark.parametrize("rounding", ROUNDINGS)
@PROPERTY
@given(acc=INT32 | st.integers(-1000, 1000) | st.sampled_from([INT32_MIN, INT32_MAX]),
       m0=st.integers(2**30, INT32_MAX) | st.sampled_from([2**30, 3 * 2**29, 5 * 2**28, INT32_MAX]),
       shift=st.integers(-30, 70) | st.integers(-2, 10),
       codes=st.sampled_from([(-23, -128, 127), (3, -8, 7), (0, 0, 90), (0, INT32_MIN, INT32_MAX)]))
def test_requantize_equals_exact_arithmetic(rounding, acc, m0, shift, codes):
    zero_point, qmin, qmax = codes
    expected = min(max(exactly(acc, m0, shift, rounding) + zero_point, qmin), qmax)
    assert requantize(acc, m0, shift, *codes, rounding=rounding) == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_requantize_every_tie_and_its_neighbours(rounding):
    """Accumulators around 0 by powers of two: M = 2^-k has a tie at each odd multiple of 2^(k-1)."""
    acc = np.arange(-300, 301, dtype=np.int32)
    for k in range(-3, 8):
        m0, shift = quantize_multiplier(2.0**-k)
        expected = [exactly(int(a), m0, shift, rounding) for a in acc]
        assert requantize(acc, m0, shift, 0, -10_000, 10_000, rounding=rounding).tolist() == expected
    if rounding == "even":
        np.testing.assert_array_equal(requantize(acc, 2**30, 2, 0, -128, 127), np.rint(acc / 8))


def test_roundings_differ_at_ties():
    ties = np.array([-20, -12, -4, 4, 12, 20])  # over 8: −2.5 … 2.5
    codes = {rounding: requantize(ties, 2**30, 2, 0, -128, 127, rounding=rounding).tolist() for rounding in ROUNDINGS}
    assert codes == {"even": [-2, -2, 0, 0, 2, 2], "up": [-2, -1, 0, 1, 2, 3], "gemmlowp": [-3, -2, -1, 1, 2, 3]}
    assert rounding_divide_by_pot(-12, 3) == -2


@PROPERTY
@given(INT32 | st.sampled_from([INT32_MIN, INT32_MAX, 0]), INT32 | st.sampled_from([INT32_MIN, INT32_MAX, 2**30]))
@example(INT32_MIN, INT32_MIN)
@example(-3, 2**30)
@example(3, 2**30)
def test_high_mul_equals_gemmlowp(a, b):
    assert saturating_rounding_doubling_high_mul(a, b) == high_mul_of_gemmlowp(a, b)


@PROPERTY
@given(INT32 | st.integers(-300, 300), st.integers(0, 31))
@example(INT32_MIN, 31)
def test_divide_equals_gemmlowp_and_rounds_half_away(x, exponent):
    half_away = math.floor(Fraction(abs(x), 2**exponent) + Fraction(1, 2)) * (1 if x >= 0 else -1)
    assert rounding_divide_by_pot(x, exponent) == divide_of_gemmlowp(x, exponent) == half_away


@pytest.mark.parametrize("shift", range(7))
def test_gemmlowp_differs_by_1_where_the_first_rounding_makes_a_tie(shift):
    """The first rounding hits an odd multiple of 2^(shift − 1) in one of 2^shift cases; in half of them from beyond."""
    rng = np.random.default_rng(shift)
    acc, m0 = rng.integers(-(2**24), 2**24, 400_000), rng.integers(2**30, 2**31, 400_000)
    even, gemmlowp = (requantize(acc, m0, shift, 0, INT32_MIN, INT32_MAX, rounding=rounding).astype(np.int64)
                      for rounding in ("even", "gemmlowp"))
    assert np.abs(gemmlowp - even).max() <= 1
    assert (gemmlowp != even).mean() == pytest.approx(2.0 ** -(shift + 1) if shift else 0, rel=0.1, abs=1e-4)


def test_multipliers_per_channel_broadcast():
    acc = np.random.default_rng(0).integers(-(2**20), 2**20, (5, 3, 4, 4)).astype(np.int32)
    m0, shift = quantize_multiplier([1e-4, 3e-4, 2e-3])
    codes = requantize(acc, m0.reshape(3, 1, 1), shift.reshape(3, 1, 1), -3, -128, 127)
    assert codes.dtype == np.int32
    for channel in range(3):
        alone = requantize(acc[:, channel], int(m0[channel]), int(shift[channel]), -3, -128, 127)
        np.testing.assert_array_equal(codes[:, channel], alone)


def test_codes_saturate():
    acc = [INT32_MIN, -(10**6), 10**6, INT32_MAX]
    for rounding in ROUNDINGS:
        assert requantize(acc, 2**30, 3, 5, -128, 127, rounding=rounding).tolist() == [-128, -128, 127, 127]
        assert requantize(INT32_MAX, INT32_MAX, 0, INT32_MAX, INT32_MIN, INT32_MAX, rounding=rounding) == INT32_MAX


@pytest.mark.parametrize(("call", "message"), [
    (lambda: requantize(1.0, 2**30, 0, **INT8), "acc must be an integer or an array of integers, got dtype float64"),
    (lambda: requantize([], 2**30, 0, **INT8), "acc must be an integer .* got dtype float64"),
    (lambda: requantize(np.zeros(0, int), 2**30, 0, **INT8), r"acc must not be empty, got shape \(0,\)"),
    (lambda: requantize(2**31, 2**30, 0, **INT8), "acc must be from -2147483648 to 2147483647, got 2147483648"),
    (lambda: requantize([0, -(2**31) - 1], 2**30, 0, **INT8), "acc must be from .*, got -2147483649"),
    (lambda: requantize(1, 2**30 - 1, 0, **INT8), "m0 must be from 1073741824 to 2147483647, got 1073741823"),
    (lambda: requantize(1, 2**31, 0, **INT8), "m0 must be from .* got 2147483648"),
    (lambda: requantize(1, 0.75, 0, **INT8), "m0 must be an integer"),
    (lambda: requantize(1, 2**30, -31, **INT8), "shift must be from -30 to 2147483647, got -31"),
    (lambda: requantize(1, 2**30, np.nan, **INT8), "shift must be an integer"),
    (lambda: requantize(1, 2**30, 0, 0.5, -128, 127), "zero_point must be an integer"),
    (lambda: requantize(1, 2**30, 0, 0, 3, 2), "qmin must be at most qmax, got 3 and 2"),
    (lambda: requantize(1, 2**30, 0, 0, True, 2), "qmin must be an integer .* got dtype bool"),
    (lambda: requantize(1, 2**30, 0, **INT8, rounding="half"),
     "rounding must be one of even, up, gemmlowp, got 'half'"),
    (lambda: requantize([[1, 2], [3]], 2**30, 0, **INT8), r"acc must be an integer .* got \[\[1, 2\], \[3\]\]"),
    (lambda: requantize(1, 2**30, [[1, 2], [3]], **INT8), r"shift must be an integer .* got \[\[1, 2\], \[3\]\]"),
    (lambda: requantize([1, 2, 3], [2**30] * 2, 0, **INT8), r"acc, m0, shift, zero_point, qmin, qmax must have shapes "
     r"that broadcast, got \(3,\) for acc, \(2,\) for m0, \(\) for shift, \(\) for zero_point, "),
    (lambda: requantize([1, 2, 3], 2**30, 0, 0, -128, [127] * 2), r"acc, .* broadcast, .* \(2,\) for qmax"),
    (lambda: requantize([1, 2, 3], [2**30] * 2, 0, **INT8, rounding="gemmlowp"), "acc, m0, shift, .* broadcast"),
    (lambda: saturating_rounding_doubling_high_mul([1, 2, 3], [1, 2]), r"a, b must have .* \(3,\) for a, \(2,\) for b"),
    (lambda: rounding_divide_by_pot([1, 2, 3], [1, 2]), r"x, exponent must have .* \(3,\) for x, \(2,\) for exponent"),
    (lambda: rounding_divide_by_pot(1, 33), "exponent must be from 0 to 32, got 33"),
    (lambda: rounding_divide_by_pot(1, -1), "exponent must be from 0 to 32, got -1"),
    (lambda: saturating_rounding_doubling_high_mul(1, 2**31), "b must be from"),
    (lambda: accumulate(np.ones((2, 2)), np.int8([[1]]), 0, 0), "q1 must be an int8 or uint8 array, got float64"),
    (lambda: accumulate(np.int8([[1]]), [[1]], 0, 0), "q2 must be an int8 or uint8 array, got list"),
    (lambda: accumulate(np.int8([[1, 2]]), np.int8([[1, 2]]), 0, 0), r"q1 and q2 must be .* got \(1, 2\) and \(1, 2\)"),
])
def test_bad_arguments_are_named_with_their_value(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


# One layer against ONNX Runtime


def onnx_run(op, *inputs, **attributes):
    """The output of one ONNX operator in ONNX Runtime."""
    inputs = [np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value) for value in inputs]
    types = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    names = [f"in{i}" for i in range(len(inputs))]
    declared = [helper.make_tensor_value_info(n, t, v.shape) for n, t, v in zip(names, types, inputs, strict=True)]
    graph = helper.make_graph([helper.make_node(op, names, ["out"], **attributes)], op, declared,
                              [onnx.ValueInfoProto(name="out")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_accumulate_equals_matmul_integer(dtype):
    rng = np.random.default_rng(0)
    limits = np.iinfo(dtype).min, np.iinfo(dtype).max + 1
    most = 127 if dtype == np.int8 else 63  # x86 without VNNI adds two products u8 · s8 in 16 bits, which saturate
    for _ in range(30):
        rows, n, columns = rng.integers(1, 70, 3)
        q1 = rng.integers(*limits, (rows, n)).astype(dtype)
        q2 = rng.integers(-most, most + 1, (n, columns)).astype(np.int8)
        z1, z2 = rng.integers(*limits, ()).astype(dtype), rng.integers(-128, 128, columns).astype(np.int8)
        expected = onnx_run("MatMulInteger", q1, q2, z1, z2)
        acc = accumulate(q1, q2, z1, z2)
        assert acc.dtype == expected.dtype == np.int32
        np.testing.assert_array_equal(acc, expected)
        np.testing.assert_array_equal(acc, (q1.astype(int) - z1) @ (q2.astype(int) - z2))
        np.testing.assert_array_equal(accumulate(q1[None], q2[None], z1, z2)[0], acc)


def linear(inputs, outputs, *, per_channel=False, bias=True, seed=0):
    """A Linear layer with int8 weights and inputs in −1…3."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    return QuantizedLayer(layer, ptq.weight_params(layer.weight, per_channel=per_channel), grid(-1.0, 3.0))


def grid(alpha, beta, bits=8):
    return zero_point_params(torch.tensor([alpha, beta]), bits)


def real_multiplier(layer):
    return np.asarray(layer.m0) * 2.0 ** (-31.0 - np.asarray(layer.shift))


def distance_from_tie(u):
    return np.abs(u - np.floor(u) - 0.5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_linear_equals_qlinear_matmul(per_channel):
    """ONNX Runtime multiplies by a float32 M: a code may differ where acc · M is within float32's error of a tie."""
    model = nn.Sequential(linear(50, 40, per_channel=per_channel, bias=False), linear(40, 1))
    layer = convert(model, (50,)).layers["0"]
    codes = np.random.default_rng(0).integers(-128, 128, (2000, 50)).astype(np.int8)
    inputs, weights, output = model[0].input_params, model[0].weight_params, model[1].input_params
    zeros = np.zeros(weights.scale.shape, np.int8)
    theirs = onnx_run("QLinearMatMul", codes, np.float32(inputs.scale), np.int8(inputs.zero_point),
                      layer.weight.T, weights.scale.numpy(), zeros,
                      np.float32(output.scale), np.int8(output.zero_point))
    ours = layer.run(codes)
    differs = ours.outputs != theirs
    assert 0 < len(np.unique(theirs)) and differs.mean() < 1e-4
    assert np.abs(ours.outputs.astype(int) - theirs).max() <= 1
    u = ours.accumulators * real_multiplier(layer)
    assert (distance_from_tie(u)[differs] <= 4 * 2**-24 * np.abs(u)[differs]).all()
    np.testing.assert_array_equal(ours.accumulators,
                                  onnx_run("MatMulInteger", codes, layer.weight.T, np.int8(inputs.zero_point)))


# Networks against the simulation


def equals_simulation(model, images):
    """Compare every code and logit with the simulation in float64; returns how many codes there are."""
    net = convert(model, tuple(images.shape[1:]))
    codes = net.quantize_input(images)
    trace, logits = net.trace(codes), net(codes)
    exact = round_biases(model, torch.float64)
    simulated = simulated_codes(exact, images)
    assert list(trace) == list(simulated)
    for name in trace:
        np.testing.assert_array_equal(trace[name].inputs, simulated[name], err_msg=name)
    with torch.no_grad():
        reals = exact(images).numpy()
    assert logits.shape == reals.shape
    assert logits.dtype == np.int32
    *_, last = net.layers.values()
    tolerance = 1e-6 if np.all(real_multiplier(last) == 1) else 0.76  # M is rounded too
    assert np.abs(logits - reals / net.logits_scale).max() <= tolerance
    return sum(layer.inputs.size for layer in trace.values())


def quantized(model, images, *, bits=8, per_channel=False):
    """With ranges wider than what is seen, so that it is not they who clip below 0 and above 6."""
    folded = ptq.fold_batch_norm(model)
    ranges = {name: (alpha - 1, beta + 1) for name, (alpha, beta) in ptq.calibrate(ptq.observe(folded, images)).items()}
    return ptq.quantize_static(folded, ranges, weight_bits=bits, activation_bits=bits, per_channel=per_channel)


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options)


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 7, 5)),
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(126, 20), nn.ReLU(), nn.Linear(20, 20, bias=False), nn.ReLU6(),
                                 nn.Linear(20, 5)),
    "no activations": lambda: nn.Sequential(conv(2, 6, 3), conv(6, 4, 3), nn.Flatten(), nn.Linear(60, 5)),
    "depthwise": lambda: nn.Sequential(conv(2, 8, 3, padding=1), nn.ReLU6(), conv(8, 8, 3, groups=8, padding=1),
                                       nn.ReLU6(), conv(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "groups": lambda: nn.Sequential(conv(2, 8, 3), nn.ReLU(), conv(8, 12, 3, groups=4), nn.ReLU(), nn.Flatten(),
                                    nn.Linear(180, 5)),
    "depthwise with a multiplier": lambda: nn.Sequential(conv(2, 6, 3, groups=2), nn.Flatten(), nn.Linear(210, 5)),
    "stride, padding, oblong kernel": lambda: nn.Sequential(
        conv(2, 4, (3, 2), stride=(2, 1), padding=(0, 1)), nn.ReLU(), conv(4, 4, (1, 4), stride=(3, 2), padding=(2, 0)),
        nn.Flatten(), nn.Linear(36, 5)),
    "average, then convolution": lambda: nn.Sequential(conv(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)),
                                                       conv(6, 5, 1), nn.ReLU6(), nn.Flatten()),
    "average without activation": lambda: nn.Sequential(conv(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                                        nn.Linear(6, 5), nn.ReLU()),
    "nested, one ReLU twice": lambda: nest(nn.ReLU()),
}


def nest(relu):
    return nn.Sequential(nn.Sequential(conv(2, 4, 3), relu), nn.Sequential(conv(4, 4, 3), relu), nn.Flatten(),
                         nn.Linear(60, 5))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_the_simulation_code_by_code(name, bits, per_channel):
    torch.manual_seed(1)
    images = 4 * torch.rand(50, 2, 9, 7) - 1.5  # a zero-point inside the codes, and values that ReLU6 clamps
    model = quantized(NETWORKS[name](), images, bits=bits, per_channel=per_channel)
    assert equals_simulation(model, images) >= 50 * 126


@pytest.mark.parametrize("axis", [None, 0])
def test_zero_points_of_weights(axis):
    """Equation 7 with both zero-points."""
    torch.manual_seed(2)
    layers = []
    for layer in (nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Linear(6 * 5 * 5, 4)):
        w = layer.weight.detach() + 0.1
        over = None if axis is None else tuple(range(1, w.ndim))
        low, high = (w.min(), w.max()) if over is None else (w.amin(over), w.amax(over))
        params = range_params(low, high, narrow=True, axis=axis)
        assert (params.zero_point != 0).all()
        layers.append(QuantizedLayer(layer, params, grid(-2.0, 2.0)))
    images = torch.randn(40, 3, 5, 5)
    assert equals_simulation(nn.Sequential(layers[0], nn.ReLU6(), nn.Flatten(), layers[1]), images) == 40 * (75 + 150)


def test_padding_is_the_code_of_zero():
    params = grid(-1.0, 3.0)
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    model = nn.Sequential(QuantizedLayer(layer, absmax_params(torch.ones(1, 1, 3, 3)), params), nn.Flatten())
    net = convert(model, (1, 4, 4))
    zeros = np.full((1, 1, 4, 4), int(params.zero_point), np.int8)
    assert params.zero_point == -64
    assert not net(zeros).any()


# The digits network, on its whole test set


@lru_cache
def digits_data():
    return digits.data()


@lru_cache
def digits_network(bits=8, per_channel=False):
    calibrator = "min-max" if bits == 8 else "MSE"
    folded = ptq.fold_batch_norm(digits.load())
    ranges = ptq.calibrate(ptq.observe(folded, digits_data().train_images), bits, calibrator)
    return ptq.quantize_static(folded, ranges, weight_bits=bits, activation_bits=bits, per_channel=per_channel)


@lru_cache
def digits_trace(bits=8, per_channel=False, rounding="even"):
    net = convert(digits_network(bits, per_channel), (1, 8, 8), rounding=rounding)
    return net, net.trace(net.quantize_input(digits_data().test_images))


@pytest.mark.parametrize("per_channel", [False, True])
def test_digits_equal_the_simulation_code_by_code(per_channel):
    assert equals_simulation(digits_network(8, per_channel), digits_data().test_images) == 360 * 5760


@pytest.mark.parametrize("bits", [4, 8])
def test_digits_are_read_as_well(bits):
    images, labels = digits_data().test_images, digits_data().test_labels
    net, _ = digits_trace(bits)
    predicted = net.predict(images)
    exact = round_biases(digits_network(bits), torch.float64)
    with torch.no_grad():
        assert (exact(images).argmax(1).numpy() == predicted).all()
    right = (predicted == labels.numpy()).sum()
    simulated = round(3.6 * digits.accuracy(digits_network(bits), images, labels))
    assert abs(right - simulated) <= (1 if bits == 8 else 10)  # biases in float count at 4 bits


def test_only_integers_between_the_input_and_the_logits():
    net, trace = digits_trace()
    assert list(trace) == list(net.layers)
    for name, layer in trace.items():
        last = name == "linear"
        assert layer.inputs.dtype == np.int8
        assert layer.accumulators.dtype == np.int32
        assert layer.outputs.dtype == (np.int32 if last else np.int8)
        assert (layer.sums is None) == (name != "pointwise3")
        assert layer.sums is None or layer.sums.dtype == np.int32
    for layer in net.layers.values():
        assert layer.weight.dtype == np.int8 and layer.weight.min() >= -127
        assert layer.bias.dtype == np.int32
        for value in vars(layer).values():
            assert isinstance(value, (str, type(None))) or np.asarray(value).dtype.kind == "i"
    assert np.array_equal(trace["linear"].outputs, trace["linear"].accumulators)


@pytest.mark.parametrize("rounding", ["up", "gemmlowp"])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_roundings_differ_by_1_at_most_for_the_same_accumulators(bits, rounding):
    _, even = digits_trace(bits)
    net, _ = digits_trace(bits, rounding=rounding)
    differing = sizes = 0
    for name, layer in net.layers.items():
        steps = layer.run(even[name].inputs).outputs.astype(np.int64) - even[name].outputs
        assert np.abs(steps).max() <= 1
        differing, sizes = differing + np.count_nonzero(steps), sizes + steps.size
    if rounding == "up":
        assert differing == 0  # no sum is a tie
    else:
        assert 0 < differing < sizes * 2.0 ** -int(min(layer.shift for layer in [*net.layers.values()][:-1]))


def reference_differences(simulation, bits, per_channel):
    """For each layer, given the simulation's own inputs: where its outputs differ, acc · M and the errors it may have.

    Float32 rounds each product and sum by 2⁻²⁴ of its size at most.
    """
    net, _ = digits_trace(bits, per_channel)
    simulated = simulated_codes(simulation, digits_data().test_images)
    names = list(net.layers)
    for name, following in pairwise(names):
        layer = net.layers[name]
        ours = layer.run(simulated[name])
        differs = ours.outputs.reshape(simulated[following].shape) != simulated[following]
        steps = ours.outputs.reshape(simulated[following].shape).astype(int) - simulated[following]
        sizes = replace(layer, weight=np.abs(layer.weight), bias=np.abs(layer.bias)).accumulate(simulated[name])
        n = 1
        if ours.sums is not None:
            sizes, n = sizes.sum((2, 3), keepdims=True), np.prod(sizes.shape[2:])
        m = real_multiplier(layer).reshape(-1, 1, 1)
        u = (ours.accumulators if ours.sums is None else ours.sums) * m
        operations = layer.weight[0].size + n + 8
        yield name, steps, [np.broadcast_to(x, ours.outputs.shape).reshape(differs.shape)[differs]
                            for x in (u, m * n, operations * 2**-24 * sizes * m)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_float32_simulation_differs_at_ties_only(per_channel):
    counts = []
    for name, steps, (u, _, rounding_error) in reference_differences(
            round_biases(digits_network(8, per_channel)), 8, per_channel):
        assert np.abs(steps).max() <= 1, name
        assert (rounding_error < 0.01).all()
        assert (distance_from_tie(u) <= rounding_error).all(), name
        counts.append(len(u))
    assert sum(counts) < 50  # of 2 million


@pytest.mark.parametrize("bits", [4, 8])
def test_biases_in_float_move_a_code_by_half_an_accumulator_step(bits):
    counts = []
    for name, steps, (u, accumulator_step, rounding_error) in reference_differences(
            digits_network(bits, False), bits, False):
        clamped = 0.5 * accumulator_step if name == "pointwise3" else 0  # 6 is rounded too before the average
        assert np.abs(steps).max() <= 1, name
        assert (distance_from_tie(u) <= 0.5 * accumulator_step + clamped + rounding_error).all(), name
        counts.append(len(u))
    assert 0 < sum(counts) < (5_000 if bits == 8 else 100_000)


def test_6_is_rounded_to_an_accumulator_before_an_average():
    net, trace = digits_trace(4)
    layer, model = net.layers["pointwise3"], digits_network(4).pointwise3
    step = float(model.weight_params.scale) * float(model.input_params.scale)
    low, high = layer.clamp
    assert low == 0 and abs(high * step - 6) <= step / 2
    assert high == math.ceil(6 / step)  # the nearer one here: not what dropping the fraction gives
    np.testing.assert_array_equal(trace["pointwise3"].sums[..., 0, 0],
                                  np.clip(trace["pointwise3"].accumulators, 0, high).sum((2, 3)))


def test_round_biases_changes_nothing_else():
    model = digits_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = round_biases(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, value in rounded.state_dict().items():
        if name.endswith("weight"):
            assert torch.equal(before[name], value)
        else:
            layer = model.get_submodule(name.removesuffix(".layer.bias"))
            step = layer.weight_params.scale * layer.input_params.scale
            steps = value / step
            assert torch.allclose(steps, steps.round(), atol=1e-3)
            assert 0 < (value - before[name]).abs().max() <= 0.5001 * step
    net, again = convert(model, (1, 8, 8)), convert(rounded, (1, 8, 8))
    for name, layer in net.layers.items():
        np.testing.assert_array_equal(layer.bias, again.layers[name].bias)
        np.testing.assert_array_equal(layer.weight, again.layers[name].weight)


# ONNX


def run_onnx(file, images, *, fused=True):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI, int16 sums would saturate
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, {"images": images}),
                    strict=True))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_file_gives_the_same_predictions(bits, per_channel):
    images = digits_data().test_images.numpy()
    net, trace = digits_trace(bits, per_channel)
    file = to_onnx(digits_network(bits, per_channel), (1, 8, 8))
    for fused in (True, False):
        logits = run_onnx(file, images, fused=fused)["logits"]
        assert (logits.argmax(1) == trace["linear"].outputs.argmax(1)).all()
        moved = np.abs(logits - net.logits_scale * trace["linear"].outputs) > 1e-4  # by codes at ties
        assert moved.mean() < 0.02
    stored = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(file).graph.initializer}
    for name in net.layers:
        assert stored[f"{name}.weight_codes"] == onnx.TensorProto.INT8
        assert stored[f"{name}.bias_codes"] == onnx.TensorProto.INT32


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_codes_are_those_of_the_integers(bits):
    """The file, run as it is written, is the simulation with rounded biases: its codes differ at ties only."""
    file = onnx.load_from_string(to_onnx(digits_network(bits), (1, 8, 8)))
    _, trace = digits_trace(bits)
    outputs = {name: f"{name}.{'clipped' if bits < 8 else 'input'}_codes" for name in trace}
    file.graph.output.extend(helper.make_tensor_value_info(output, onnx.TensorProto.INT8, None)
                             for output in outputs.values())
    results = run_onnx(file.SerializeToString(), digits_data().test_images.numpy(), fused=False)
    differing = {name: np.count_nonzero(results[output] != trace[name].inputs) for name, output in outputs.items()}
    assert differing["conv"] == 0
    assert sum(differing.values()) < 200  # of 2 million, most of them passed on from a first one


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runs_every_network(name):
    torch.manual_seed(1)
    images = 4 * torch.rand(50, 2, 9, 7) - 1.5
    model = quantized(NETWORKS[name](), images, per_channel=True)
    with torch.no_grad():
        expected = round_biases(model)(images).numpy()
    logits = run_onnx(to_onnx(model, (2, 9, 7)), images.numpy(), fused=False)["logits"]
    assert np.mean(np.abs(logits - expected) > 1e-4) < 0.02  # a code at a tie moves the logits of its image


def test_onnx_of_weights_with_zero_points_and_of_a_single_layer():
    layer = nn.Linear(6, 3)
    model = QuantizedLayer(layer, range_params(-0.2, 0.6, narrow=True), grid(-1.0, 2.0))
    images = torch.rand(20, 6)
    logits = run_onnx(to_onnx(model, (6,)), images.numpy(), fused=False)["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(logits, round_biases(model)(images), atol=1e-5)


def test_the_shipped_file_is_that_of_the_lesson():
    """Its constants, but for the last bit of floats (processors add differently), and what it gives."""
    shipped, fresh = (onnx.load_from_string(file) for file in (
        Path(samples.path(onnx_export.FILE)).read_bytes(), to_onnx(onnx_export.lesson_network(), (1, 8, 8))))
    assert [node.op_type for node in shipped.graph.node] == [node.op_type for node in fresh.graph.node]
    for ours, theirs in zip(shipped.graph.initializer, fresh.graph.initializer, strict=True):
        assert ours.name == theirs.name
        values, expected = map(onnx.numpy_helper.to_array, (ours, theirs))
        assert values.dtype == expected.dtype
        values, expected, last = values.astype(float), expected.astype(float), values.dtype == np.int32
        np.testing.assert_allclose(values, expected, rtol=3e-7, atol=last)
    images, labels = digits_data().test_images.numpy(), digits_data().test_labels.numpy()
    logits = run_onnx(samples.path(onnx_export.FILE), images)["logits"]
    assert 98 < 100 * np.mean(logits.argmax(1) == labels) < 99


# What cannot be done in integers


def overflowing(inputs, alpha=0.0, beta=1.0):
    """All weights 1 and inputs that reach 255 steps from the zero-point: a sum of ± ``inputs`` · 127 · 255."""
    layer = nn.Linear(inputs, 1, bias=False)
    layer.weight.data[:] = 1.0
    return nn.Sequential(QuantizedLayer(layer, absmax_params(layer.weight.detach()), grid(alpha, beta)))


@pytest.mark.parametrize(("alpha", "beta", "code", "sign"), [(0.0, 1.0, 127, 1), (-1.0, 0.0, -128, -1)])
def test_accumulators_cannot_overflow(alpha, beta, code, sign):
    most = (2**31 - 1) // (127 * 255)
    codes = np.full((1, most), code, np.int8)
    assert convert(overflowing(most, alpha, beta), (most,))(codes) == sign * most * 127 * 255
    with pytest.raises(ValueError, match=r"accumulators that stay within int32 .* got up to 2.148e\+09 at '0'"):
        convert(overflowing(most + 1, alpha, beta), (most + 1,))


def test_biases_count_in_the_overflow():
    model = overflowing(2)
    model[0].layer.bias = nn.Parameter(torch.tensor([1e6]))
    with pytest.raises(ValueError, match="accumulators that stay within int32"):
        convert(model, (2,))
    model[0].layer.bias = nn.Parameter(torch.tensor([1e4]))
    assert convert(model, (2,)).layers["0"].bias == pytest.approx(1e4 * 127 * 255, rel=1e-6)


@pytest.mark.parametrize(("relu", "fits"), [(nn.Identity(), False), (nn.ReLU(), False), (nn.ReLU6(), True)])
def test_sums_of_an_average_cannot_overflow(relu, fits):
    layer = nn.Conv2d(1, 1, 1, bias=False)
    layer.weight.data[:] = 1.0
    quantized_conv = QuantizedLayer(layer, absmax_params(layer.weight.detach()), grid(0.0, 100.0))
    activation = [] if isinstance(relu, nn.Identity) else [relu]
    model = nn.Sequential(quantized_conv, *activation, nn.AdaptiveAvgPool2d(1))
    side = 258  # 258² · 127 · 255 > 2³¹
    if fits:
        net = convert(model, (1, side, side))
        codes = np.full((1, 1, side, side), 127, np.int8)
        assert net(codes) * net.logits_scale == pytest.approx(6, rel=1e-3)
    else:
        with pytest.raises(ValueError, match="accumulators that stay within int32"):
            convert(model, (1, side, side))
    assert convert(model, (1, 200, 200))


def dilated(**options):
    layer = nn.Conv2d(1, 1, 2, **options)
    return nn.Sequential(QuantizedLayer(layer, absmax_params(layer.weight.detach()), grid(0.0, 1.0)))


def with_params(weights, inputs):
    return nn.Sequential(QuantizedLayer(nn.Linear(2, 2), weights, inputs))


FOUR_BITS = QParams(torch.tensor(0.1), 0, -7, 7)
MINUS_128 = QuantizedLayer(nn.Linear(2, 2), QParams(torch.tensor(1e-4), 0, -128, 127), grid(0.0, 1.0))
with torch.no_grad():
    MINUS_128.layer.weight[:] = -1e-4 * 128
ORDER = "model must hold a quantized layer, an activation and a global average in this order, got "


@pytest.mark.parametrize(("model", "shape", "message"), [
    (nn.Sequential(linear(2, 2), nn.Sigmoid()), (2,), "model must be an nn.Sequential of .* got Sigmoid at '1'"),
    (nn.Sequential(nn.Linear(2, 2)), (2,), "model must be an nn.Sequential of .* got Linear at '0'"),
    (nn.Sequential(linear(2, 2), nn.MaxPool2d(2)), (2,), "model must be .* got MaxPool2d at '1'"),
    (nn.ModuleList([linear(2, 2)]), (2,), "model must be an nn.Sequential of .* got ModuleList at ''"),
    (nn.Sequential(nn.Flatten()), (2,), "model must hold a quantized layer, got none"),
    (ptq.quantize_dynamic(nn.Sequential(nn.Linear(2, 2))), (2,),
     "model must have static ranges for all inputs, got dynamic inputs at '0'"),
    (with_params(FOUR_BITS, None), (2,), "model must have static ranges for all inputs, got float inputs at '0'"),
    (with_params(None, FOUR_BITS), (2,), "model must have quantized weights, got float weights at '0'"),
    (with_params(FOUR_BITS, range_params(0, 1, signed=False)), (2,), "model must have one int8 grid .* at '0'"),
    (with_params(range_params(-1, 1, bits=9), FOUR_BITS), (2,), "model must have int8 weights .* at '0'"),
    (with_params(range_params(-1, 1, signed=False), FOUR_BITS), (2,), "model must have int8 weights .* at '0'"),
    (with_params(QParams(torch.ones(2), [0, 0], -7, 7, axis=1), FOUR_BITS), (2,), "model must have int8 weights .*"),
    (nn.Sequential(MINUS_128), (2,), "model must have weights with codes from -127 to 127, got -128 at '0'"),
    (nn.Sequential(nn.ReLU(), linear(2, 2)), (2,), f"{ORDER}ReLU at '0'"),
    (nn.Sequential(linear(2, 2), nn.ReLU(), nn.ReLU6()), (2,), f"{ORDER}ReLU6 at '2'"),
    (nn.Sequential(dilated()[0], nn.AdaptiveAvgPool2d(1), nn.ReLU()), (1, 4, 4), f"{ORDER}ReLU at '2'"),
    (nn.Sequential(dilated()[0], nn.AdaptiveAvgPool2d(2)), (1, 4, 4),
     r"model must average over whole images, got AdaptiveAvgPool2d\(output_size=2\) at '1'"),
    (nn.Sequential(linear(2, 2), nn.AdaptiveAvgPool2d(1)), (2,), r"model must average .* for shape \(2,\)"),
    (nn.Sequential(nn.Flatten(0), linear(2, 2)), (2,), "model must flatten all axes but the first, got"),
    (dilated(dilation=2), (1, 4, 4), "model must have convolutions without dilation"),
    (dilated(padding="same"), (1, 4, 4), "model must have convolutions without dilation"),
    (dilated(padding=1, padding_mode="reflect"), (1, 4, 4), "model must have convolutions without dilation"),
    (nn.Sequential(linear(2, 2)), (3,), r"QuantizedLayer at '0' must receive shape \(2,\), got \(3,\)"),
    (nn.Sequential(linear(2, 2)), (5, 2), r"QuantizedLayer at '0' must receive shape \(2,\), got \(5, 2\)"),
    (dilated(), (2, 4, 4), r"QuantizedLayer at '0' must receive shape \(1, height, width\)"),
    (dilated(), (1, 4), r"QuantizedLayer at '0' must receive shape \(1, height, width\)"),
    (dilated(), (1, 1, 4), "QuantizedLayer at '0' must receive .* no smaller than its kernel"),
    (dilated(), (4,), "QuantizedLayer at '0' must receive"),
    (nn.Sequential(linear(2, 2)), (), r"input_shape must be a tuple of integers of at least 1, got \(\)"),
    (nn.Sequential(linear(2, 2)), (0,), "each size of input_shape must be an integer of at least 1, got 0"),
    (nn.Sequential(linear(2, 2)), (2.0,), "each size of input_shape must be an integer of at least 1, got 2.0"),
    (nn.Sequential(linear(2, 2)), 2, "input_shape must be a tuple of integers of at least 1, got 2"),
])
def test_unsupported_models_are_named(model, shape, message):
    for function in (convert, to_onnx):
        with pytest.raises(ValueError, match=f"^{message}"):
            function(model, shape)


@pytest.mark.parametrize(("call", "message"), [
    (lambda net: net.quantize_input(torch.zeros(3, 3)), r"images must have shape \(N, 2\), got \(3, 3\)"),
    (lambda net: net.quantize_input(torch.tensor([[np.nan, 0]])), "images must be finite, got 1 NaN"),
    (lambda net: net.quantize_input(torch.zeros(0, 2)), "images must not be empty"),
    (lambda net: net(np.zeros((3, 2))), "codes must be an int8 array, got float64"),
    (lambda net: net(torch.zeros(3, 2)), "codes must be an int8 array, got torch.float32"),
    (lambda net: net([[0, 0]]), "codes must be an int8 array, got list"),
    (lambda net: net(np.zeros((3, 1), np.int8)), r"codes must have shape \(N, 2\), got \(3, 1\)"),
    (lambda net: net(np.zeros((0, 2), np.int8)), r"codes must have shape \(N, 2\), got \(0, 2\)"),
    (lambda net: convert(nn.Sequential(linear(2, 2)), (2,), rounding="half"), "rounding must be one of even, up"),
    (lambda net: simulated_codes(nn.Sequential(linear(2, 2)), torch.zeros(0, 2)), "images must not be empty"),
    (lambda net: simulated_codes(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)), "model must be an nn.Sequential"),
    (lambda net: round_biases(nn.Sequential(linear(2, 2)), torch.float16), "dtype must be torch.float32 or"),
    (lambda net: round_biases(nn.Sequential(nn.Linear(2, 2))), "model must be an nn.Sequential of .* got Linear"),
])
def test_bad_calls_are_named(call, message):
    net = convert(nn.Sequential(linear(2, 2)), (2,))
    with pytest.raises(ValueError, match=f"^{message}"):
        call(net)


def test_a_layer_prints_what_it_computes_with():
    net, _ = digits_trace()
    layer = net.layers["linear"]
    assert isinstance(layer, IntegerLayer)
    text = repr(layer)
    for line in ("weight: int8 (10, 64)", "input_zero_point: -128", f"m0: {layer.m0}", "shift: -1", "rounding: even",
                 f"bias: {layer.bias}"):
        assert line in text
    assert repr(net).splitlines()[0] == "conv: int8 weights (16, 1, 3, 3)"


def test_relu6_is_a_narrower_range_of_codes():
    net, trace = digits_trace()
    following = digits_network().pointwise1.input_params  # calibrated to 0 … 6, its whole range
    layer = net.layers["depthwise1"]
    assert (layer.qmin, layer.qmax) == (-128, 127) == tuple(quantize(torch.tensor([0.0, 6.0]), following).tolist())
    wide = nn.Sequential(linear(3, 4), nn.ReLU6(), QuantizedLayer(nn.Linear(4, 2), FOUR_BITS, grid(-4.0, 12.0)))
    first = convert(wide, (3,)).layers["0"]
    assert dequantize(np.array([first.qmin, first.qmax]), grid(-4.0, 12.0)) == pytest.approx([0, 6], abs=0.03)
    assert trace["depthwise1"].outputs.min() == -128


@pytest.mark.parametrize("z", [0.5, 2**40, np.nan, True, np.float32(1), [0.0]])
def test_zero_points_of_accumulate_are_checked(z):
    q1, q2 = np.int8([[1, 2]]), np.int8([[3], [4]])
    for name, zero_points in (("z1", (z, 0)), ("z2", (0, z))):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            accumulate(q1, q2, *zero_points)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_bias_of_an_output_without_weights(per_channel):
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.zeros(2, 4)
    if per_channel:
        layer.weight.data[1, :2] = 1e-3
    layer.bias.data = torch.tensor([1.7, 0.1])
    model = nn.Sequential(QuantizedLayer(layer, ptq.weight_params(layer.weight, per_channel=per_channel),
                                         grid(0.0, 1000.0)))
    images = torch.tensor([[1000.0, 0, 500, 0], [200.0, 300, 0, 0]])
    net = convert(model, (4,))
    with torch.no_grad():
        np.testing.assert_allclose(net(net.quantize_input(images)) * net.logits_scale, model(images), atol=0.01)
        np.testing.assert_allclose(run_onnx(to_onnx(model, (4,)), images.numpy(), fused=False)["logits"], model(images),
                                   atol=0.01)
    equals_simulation(model, images)


@pytest.mark.parametrize("place", ["0", "1", ""])
def test_hooks_cannot_be_done_in_integers(place):
    layer = QuantizedLayer(nn.Linear(4, 4), range_params(-1, 1, symmetric=True), grid(-1.0, 1.0))
    model = nn.Sequential(layer, nn.ReLU())
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: output / 4)
    with pytest.raises(ValueError, match=f"no hooks, got some on the .* at '{place}'"):
        convert(model, (4,))


def test_codes_of_a_layer_that_is_used_twice():
    layer = QuantizedLayer(nn.Linear(4, 4), range_params(-1, 1, symmetric=True), grid(-1.0, 1.0))
    model, images = nn.Sequential(layer, nn.ReLU(), layer), np.random.default_rng(0).uniform(-1, 1, (8, 4))
    net = convert(model, (4,))
    trace = net.trace(net.quantize_input(images.astype(np.float32)))
    for name, codes in simulated_codes(model, images).items():
        np.testing.assert_array_equal(codes, trace[name].inputs)
