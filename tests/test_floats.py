"""Number formats against ml_dtypes, NumPy, struct and exact fractions."""

import math
import re
import struct
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.floats import (
    BF16,
    FORMATS,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FP32,
    FP64,
    FloatFormat,
    decode,
    encode,
    fields,
    spacing,
)
from tests.benchmarks.encode import CASTS, HARDWARE

pytestmark = pytest.mark.filterwarnings("error")  # neither infinity nor NaN is worth a warning

REFERENCES = CASTS | {
    FloatFormat("E4M3, IEEE", 4, 3): ml_dtypes.float8_e4m3,
    FloatFormat("E3M4, IEEE", 3, 4): ml_dtypes.float8_e3m4,
}
SHIFTED = FloatFormat("E3M4, bias 5, finite", 3, 4, bias=5, specials="fn")
EVERY = (*REFERENCES, SHIFTED)
UP_TO_16 = [fmt for fmt in EVERY if fmt.bits <= 16]
EDGES = (  # the fewest bits, and the largest and smallest numbers that FP64 leaves room for
    *(FloatFormat(f"E1M1, {specials}", 1, 1, specials=specials) for specials in ("ieee", "fn", "none")),
    FloatFormat("E2M1, finite", 2, 1, specials="fn"),
    FloatFormat("E5M2, up to 2^1023", 5, 2, bias=-993),
    FloatFormat("E5M2, down to 2^-1074", 5, 2, bias=1073),
)
SMALL = [fmt for fmt in EVERY if fmt.bits <= 8] + [*EDGES]
IN_FRACTIONS = settings(max_examples=60)


def per_format(formats):
    return pytest.mark.parametrize("fmt", formats, ids=lambda fmt: fmt.name)


def some_codes(fmt):
    """All codes of a format up to 16 bits; otherwise random ones, and every exponent with a few mantissas."""
    if fmt.bits <= 16:
        return np.arange(2**fmt.bits, dtype=fmt.code_dtype)
    top = 1 << fmt.mantissa_bits
    mantissas = np.array([0, 1, 2, top // 3, top // 2 - 1, top // 2, top // 2 + 1, top - 1], np.uint64)
    exponents = np.arange(2 ** (fmt.exponent_bits + 1), dtype=np.uint64) << np.uint64(fmt.mantissa_bits)
    words = np.random.default_rng(0).integers(2**fmt.bits - 1, size=100_000, dtype=np.uint64, endpoint=True)
    return np.concatenate([(exponents[:, None] | mantissas).ravel(), words]).astype(fmt.code_dtype)


def values(fmt, n=100_000):
    """Random signs and mantissas; exponents from below the smallest number of the format to beyond the largest."""
    rng = np.random.default_rng(1)
    lowest, highest = math.frexp(fmt.smallest_subnormal)[1] - 3, math.frexp(fmt.max)[1] + 2
    with np.errstate(over="ignore"):
        return np.ldexp(rng.choice([-1.0, 1.0], n) * rng.uniform(1, 2, n), rng.integers(lowest, highest, n))


def as_source(x, fmt):
    """In the type that the reference casts from: float32 for ml_dtypes, which has float64 go through it anyway."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float64 if fmt in HARDWARE else np.float32)


def reference_codes(x, fmt):
    np.testing.assert_array_equal(x, as_source(x, fmt))
    with np.errstate(all="ignore"):
        return as_source(x, fmt).astype(REFERENCES[fmt]).view(fmt.code_dtype)


def assert_identical(actual, expected):
    """Equal numbers, NaN at the same places, and the same signs, those of zeros included."""
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


def defined(code, fmt):
    """The number of a positive code, 0.m · 2^(1 − bias) or 1.m · 2^(exponent − bias); specials are not looked at."""
    exponent, mantissa = divmod(code, 2**fmt.mantissa_bits)
    significand = (exponent > 0) + Fraction(mantissa, 2**fmt.mantissa_bits)
    return significand * Fraction(2) ** (max(exponent, 1) - fmt.bias)


def nearest_code(x, fmt):
    """By comparison with every number of the format and with the one that would follow the largest; ties to even."""
    size = abs(Fraction(x))
    code = min(range(fmt.max_code + 2), key=lambda code: (abs(defined(code, fmt) - size), code % 2))
    if code > fmt.max_code and not fmt.has_nan:
        code = fmt.max_code
    return code + (math.copysign(1, x) < 0) * fmt.sign_code


@per_format(REFERENCES)
def test_numbers_equal_the_reference(fmt):
    codes = some_codes(fmt)
    with np.errstate(invalid="ignore"):  # signalling NaN of FP16 and FP32
        expected = codes.view(REFERENCES[fmt]).astype(np.float64)
    actual = decode(codes, fmt)
    assert actual.dtype == np.float64
    assert_identical(actual, expected)


@pytest.mark.parametrize("fmt, letter", [(FP32, "f"), (FP64, "d")], ids=["FP32", "FP64"])
def test_numbers_equal_struct(fmt, letter):
    codes = some_codes(fmt)
    actual = decode(codes, fmt)
    assert {np.isnan(actual).any(), np.isinf(actual).any(), (abs(actual) == fmt.smallest_subnormal).any()} == {True}
    assert_identical(actual, struct.unpack(f"<{codes.size}{letter}", codes.astype(f"<u{fmt.bits // 8}").tobytes()))


@per_format(SMALL)
def test_numbers_equal_the_definition(fmt):
    codes = range(fmt.max_code + 1)
    assert decode(codes, fmt).tolist() == [defined(code, fmt) for code in codes]


@per_format(REFERENCES)
def test_codes_equal_the_reference(fmt):
    x = as_source(values(fmt), fmt)
    codes = encode(x, fmt)
    assert codes.dtype == fmt.code_dtype
    assert len(np.unique(fields(codes, fmt).exponent)) == 2**fmt.exponent_bits
    np.testing.assert_array_equal(codes, reference_codes(x, fmt))


@per_format(REFERENCES)
def test_codes_of_zero_infinity_and_nan_equal_the_reference(fmt):
    x = np.array([0.0, -0.0, np.inf, -np.inf] + [np.nan] * fmt.has_nan)
    np.testing.assert_array_equal(encode(x, fmt), reference_codes(x, fmt))


@per_format([fmt for fmt in EVERY if fmt != FP64])
def test_midpoints_go_to_the_even_code_and_what_is_beside_them_to_the_nearer(fmt):
    """All midpoints up to 16 bits, the one beyond the largest number included."""
    lower = some_codes(fmt)
    lower = np.unique(np.append(lower[lower < fmt.max_code], fmt.code_dtype.type(fmt.max_code)))
    upper = lower + 1
    if not fmt.has_nan:
        upper[-1] = fmt.max_code
    middle = decode(lower, fmt) + spacing(decode(lower, fmt), fmt) / 2
    for x, sign in ((middle, 0), (-middle, fmt.code_dtype.type(fmt.sign_code))):
        np.testing.assert_array_equal(encode(x, fmt), sign | np.where(lower % 2 == 0, lower, upper))
        np.testing.assert_array_equal(encode(np.nextafter(x, 0), fmt), sign | lower)
        np.testing.assert_array_equal(encode(np.nextafter(x, 2 * x), fmt), sign | upper)
        if fmt in REFERENCES:
            source = as_source(x, fmt)
            for near in (source, np.nextafter(source, 0 * source), np.nextafter(source, as_source(2 * x, fmt))):
                np.testing.assert_array_equal(encode(near, fmt), reference_codes(near, fmt))


def test_rounds_once():
    """Rounding 1 + 2^-8 + 2^-40 to FP32 first, as ml_dtypes does, makes a tie of it, which then goes down."""
    x, below, above = 1 + 2**-8 + 2**-40, 1, 1 + 2**-7
    assert abs(Fraction(x) - Fraction(above)) < abs(Fraction(x) - below)
    assert decode(encode(x, BF16), BF16) == above
    assert np.float32(x).astype(ml_dtypes.bfloat16) == below
    assert decode(encode(np.float32(x), BF16), BF16) == below


@per_format(SMALL)
@IN_FRACTIONS
@given(data=st.data())
def test_codes_are_the_nearest_by_fractions(fmt, data):
    reach = min(2 * fmt.max, float(np.finfo(np.float64).max))
    ties = st.integers(0, fmt.max_code).map(lambda code: float((defined(code, fmt) + defined(code + 1, fmt)) / 2))
    beside = st.tuples(ties, st.sampled_from([0.0, math.inf])).map(lambda pair: math.nextafter(*pair))
    size = data.draw(st.one_of(st.floats(0, reach), ties, beside, st.floats(0, allow_infinity=False)))
    for x in (size, -size):
        assert encode(x, fmt) == nearest_code(x, fmt)


@pytest.mark.parametrize("fmt, x, plain, saturated", [
    (FP8_E4M3, [448, 464, 464.1, 1e9, np.inf], [448, 448, np.nan, np.nan, np.nan], [448, 448, 448, 448, 448]),
    (FP8_E5M2, [57344, 61439, 61440, 1e9, np.inf], [57344, 57344, *[np.inf] * 3], [57344] * 5),
    (FP6_E3M2, [28, 29.9, 30, 1e9, np.inf], [28] * 5, [28] * 5),
    (FP4_E2M1, [6, 6.9, 7, 1e9, np.inf], [6] * 5, [6] * 5),
], ids=["E4M3", "E5M2", "FP6", "FP4"])
def test_what_is_too_large(fmt, x, plain, saturated):
    x = np.array(x)
    for sign in (1, -1):
        np.testing.assert_array_equal(decode(encode(sign * x, fmt), fmt), sign * np.array(plain))
        np.testing.assert_array_equal(decode(encode(sign * x, fmt, saturate=True), fmt), sign * np.array(saturated))


@per_format(EVERY)
def test_saturation_changes_only_what_is_too_large(fmt):
    x = np.concatenate([values(fmt), [np.inf, -np.inf, 0.0, -0.0], [np.nan] * fmt.has_nan])
    plain, saturated = encode(x, fmt), encode(x, fmt, saturate=True)
    sign = plain & fmt.code_dtype.type(fmt.sign_code)
    too_large = (plain - sign > fmt.max_code) & ~np.isnan(x)
    assert too_large.any() == fmt.has_nan
    np.testing.assert_array_equal(saturated, np.where(too_large, sign + fmt.code_dtype.type(fmt.max_code), plain))


@per_format([FP6_E3M2, FP6_E2M3, FP4_E2M1])
@pytest.mark.parametrize("saturate", [False, True])
def test_nan_is_refused_where_it_has_no_code(fmt, saturate):
    """ml_dtypes makes a zero of it, of either sign."""
    with pytest.raises(ValueError, match=rf"x must have no NaN, for which {fmt.name} has no code, got 2"):
        encode([np.nan, 1, np.nan], fmt, saturate=saturate)


@per_format([*EVERY, *EDGES])
def test_codes_return_from_their_numbers_and_their_fields(fmt):
    codes = some_codes(fmt)
    sign, exponent, mantissa = fields(codes, fmt)
    assert sign.max() == 1 and exponent.max() < 2**fmt.exponent_bits and mantissa.max() < 2**fmt.mantissa_bits
    np.testing.assert_array_equal((sign << (fmt.bits - 1)) | (exponent << fmt.mantissa_bits) | mantissa, codes)
    numbers = decode(codes, fmt)
    nan = np.isnan(numbers)
    assert nan.any() == fmt.has_nan
    np.testing.assert_array_equal(encode(numbers[~nan], fmt), codes[~nan])
    if fmt.has_nan:
        np.testing.assert_array_equal(encode(numbers[nan], fmt), fmt.nan_code + (sign[nan] << (fmt.bits - 1)))


@pytest.mark.parametrize("fmt", [FP16, FP32, FP64], ids=lambda fmt: fmt.name)
def test_spacing_equals_numpy(fmt):
    with np.errstate(all="ignore"):
        x = np.append(values(fmt), [0, fmt.max, np.inf, np.nan]).astype(CASTS[fmt])
        expected = np.spacing(abs(x)).astype(np.float64)  # of a negative number NumPy's is negative
    largest = abs(x) == fmt.max  # beyond it NumPy sees infinity
    assert np.isinf(expected[largest]).all() and not np.isinf(expected[~largest]).any()
    expected[largest] = fmt.max - np.nextafter(CASTS[fmt](fmt.max), CASTS[fmt](0))
    np.testing.assert_array_equal(spacing(x, fmt), expected)


@per_format(UP_TO_16)
def test_spacing_is_the_distance_between_neighbours(fmt):
    numbers = decode(np.arange(fmt.max_code + 1), fmt)
    distance = np.diff(numbers)
    for between in (numbers[:-1], numbers[:-1] + distance / 3, np.nextafter(numbers[1:], 0)):
        np.testing.assert_array_equal(spacing(between, fmt), distance)
        np.testing.assert_array_equal(spacing(-between, fmt), distance)
    assert spacing(fmt.max, fmt) == distance[-1]


@per_format(EVERY)
def test_there_is_no_spacing_beyond_the_largest_number(fmt):
    beyond = math.nextafter(fmt.max, np.inf)
    assert np.isnan(spacing([beyond, -beyond, np.inf, -np.inf, np.nan], fmt)).all()
    assert np.isfinite(spacing([fmt.max, -fmt.max], fmt)).all()


def test_a_bias_shifts_the_numbers_by_a_power_of_two():
    x, codes = values(SHIFTED), np.arange(2**8)
    unshifted = replace(SHIFTED, bias=None)
    assert (unshifted.bias, SHIFTED.max, SHIFTED.has_infinity) == (3, 7.5, False)
    np.testing.assert_array_equal(decode(codes, SHIFTED), decode(codes, unshifted) / 4)
    np.testing.assert_array_equal(encode(x, SHIFTED), encode(x * 4, unshifted))


@per_format(REFERENCES)
def test_attributes_equal_finfo(fmt):
    info = ml_dtypes.finfo(REFERENCES[fmt])
    expected = float(info.max), float(info.smallest_normal), float(info.smallest_subnormal), info.nmant, info.nexp
    ours = fmt.max, fmt.smallest_normal, fmt.smallest_subnormal, fmt.mantissa_bits, fmt.exponent_bits
    assert ours == expected


@per_format([*EVERY, *EDGES])
def test_attributes_agree_with_the_codes(fmt):
    numbers = decode(some_codes(fmt), fmt)
    assert fmt.has_infinity == np.isinf(numbers).any() == (fmt.specials == "ieee")
    assert fmt.has_nan == np.isnan(numbers).any() == (fmt.nan_code is not None) == (fmt.specials != "none")
    assert np.nanmax(numbers[~np.isinf(numbers)]) == fmt.max == decode(fmt.max_code, fmt)
    assert decode(1, fmt) == fmt.smallest_subnormal == min(numbers[numbers > 0])
    assert decode(1 << fmt.mantissa_bits, fmt) == fmt.smallest_normal or fmt.max < fmt.smallest_normal
    next_one = {"ieee": np.inf, "fn": np.nan, "none": -0.0}[fmt.specials]
    assert_identical(decode([fmt.max_code + 1, fmt.sign_code], fmt), [next_one, -0.0])
    assert fmt.nan_code is None or np.isnan(decode(fmt.nan_code, fmt))


def test_the_formats_in_order():
    assert [fmt.bits for fmt in FORMATS] == [64, 32, 16, 16, 8, 8, 6, 6, 4]
    assert set(FORMATS) == set(CASTS)


@pytest.mark.parametrize("fmt, dtype", [(FP4_E2M1, np.uint8), (FP16, np.uint16), (FP32, np.uint32), (FP64, np.uint64)])
def test_a_scalar_gives_a_scalar(fmt, dtype):
    code = encode(1.5, fmt)
    for scalar in (code, encode(np.array(1.5), fmt), *fields(int(code), fmt)):
        assert isinstance(scalar, np.unsignedinteger) and scalar.dtype == dtype
    assert type(decode(int(code), fmt)) is type(spacing(1.5, fmt)) is np.float64
    assert encode([1.5], fmt).shape == decode([code], fmt).shape == spacing([1.5], fmt).shape == (1,)


@pytest.mark.parametrize("view", [
    lambda x: x, lambda x: x.T, lambda x: x[::2, ::-3], lambda x: np.broadcast_to(x[0], (2, *x[0].shape)),
    lambda x: x.reshape(2, -1, 1, 5),
], ids=["whole", "transposed", "every other", "broadcast", "4-d"])
def test_any_layout_keeps_its_shape_and_stays_as_it_was(view):
    """50,000 values are several blocks; only the last one has infinity and NaN."""
    fmt = FP8_E4M3
    x = as_source(values(fmt, 50_000), fmt).astype(np.float64).reshape(2, -1)
    x[1, -3:] = np.nan, np.inf, -np.inf
    codes, before = reference_codes(x, fmt), x.copy()
    np.testing.assert_array_equal(encode(view(x), fmt), view(codes))
    np.testing.assert_array_equal(decode(view(codes), fmt), view(decode(codes, fmt)))
    np.testing.assert_array_equal(spacing(view(x), fmt), view(spacing(x, fmt)))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint64, np.float16, ">f4", np.longdouble])
def test_any_real_type_is_taken(kind):
    x = np.array([0, 1, 6]).astype(kind)
    np.testing.assert_array_equal(decode(encode(x, FP4_E2M1), FP4_E2M1), x)
    np.testing.assert_array_equal(spacing(x, FP4_E2M1), spacing(x.tolist(), FP4_E2M1))


def test_whole_numbers_of_more_than_64_bits_are_taken():
    assert encode(2**127, FP32) == encode(2.0**127, FP32) == 0x7F000000
    assert encode([0.5, -(2**128)], FP32).tolist() == [0x3F000000, 0xFF800000]


def test_codes_on_both_sides_of_2_to_the_63_in_one_list():
    """NumPy makes floats of them, in which they would lose digits."""
    assert decode([0x3FF0000000000001, 0xBFF0000000000001], FP64).tolist() == [1 + 2**-52, -1 - 2**-52]
    with pytest.raises(ValueError, match="codes of FP64"):
        decode([2**63, -1], FP64)


@pytest.mark.parametrize("function", [encode, spacing])
@pytest.mark.parametrize("x", ["1.5", ["1", "2"], 1j, np.complex64([1]), None, [None], [1, None], [[1], [1, 2]], {},
                               np.datetime64("2020"), pytest.param(2**2000, id="2**2000")])
def test_what_is_no_real_number_is_refused(function, x):
    with pytest.raises(ValueError, match=r"x must be (an array of )?real numbers.*, got "):
        function(x, FP32)


@pytest.mark.parametrize("function", [encode, spacing])
@pytest.mark.parametrize("x, shape", [([], "(0,)"), (np.zeros((3, 0)), "(3, 0)")])
def test_nothing_is_refused(function, x, shape):
    with pytest.raises(ValueError, match=re.escape(f"x must not be empty, got shape {shape}")):
        function(x, FP32)


@pytest.mark.parametrize("function", [decode, fields])
@pytest.mark.parametrize("codes", [-1, 16, [0, 16], np.int8([3, -1]), 2**64, 1.0, [0.5], True, "1", None, 1j,
                                   [[1], [1, 2]]])
def test_what_is_no_code_is_refused(function, codes):
    message = f"codes of FP4 E2M1 must be integers from 0 to 2^4 − 1, got {codes!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(codes, FP4_E2M1)


@pytest.mark.parametrize("function", [decode, fields])
def test_no_codes_are_refused(function):
    with pytest.raises(ValueError, match=re.escape("codes must not be empty, got shape (0,)")):
        function([], FP32)


@pytest.mark.parametrize("function", [encode, decode, spacing, fields])
@pytest.mark.parametrize("fmt", ["FP32", None, np.float32, 32, FloatFormat, pytest.param("x" * 100, id="long")])
def test_what_is_no_format_is_refused(function, fmt):
    for x in (1, None):
        message = f"fmt must be a FloatFormat, such as FP32, got {repr(fmt)[:60]}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(x, fmt)


@pytest.mark.parametrize("fmt", [FP32, FP64], ids=lambda fmt: fmt.name)
def test_codes_end_at_all_ones(fmt):
    assert np.isnan(decode(2**fmt.bits - 1, fmt))
    with pytest.raises(ValueError, match=re.escape(f"codes of {fmt.name} must be integers from 0 to 2^{fmt.bits} − 1")):
        decode(2**fmt.bits, fmt)


@pytest.mark.parametrize("wrong, message", [
    ({"exponent_bits": 0}, "exponent_bits must be an integer from 1 to 11, got 0"),
    ({"exponent_bits": 12}, "exponent_bits must be an integer from 1 to 11, got 12"),
    ({"exponent_bits": 4.0}, "exponent_bits must be an integer from 1 to 11, got 4.0"),
    ({"exponent_bits": True}, "exponent_bits must be an integer from 1 to 11, got True"),
    ({"mantissa_bits": 0}, "mantissa_bits must be an integer from 1 to 52, got 0"),
    ({"mantissa_bits": 53}, "mantissa_bits must be an integer from 1 to 52, got 53"),
    ({"mantissa_bits": None}, "mantissa_bits must be an integer from 1 to 52, got None"),
    ({"specials": "fnuz"}, "specials must be 'ieee', 'fn' or 'none', got 'fnuz'"),
    ({"specials": None}, "specials must be 'ieee', 'fn' or 'none', got None"),
    ({"bias": 5.0}, "bias must be an integer, got 5.0"),
    ({"bias": True}, "bias must be an integer, got True"),
    ({"bias": "7"}, "bias must be an integer, got '7'"),
    ({"bias": 1073}, "bias must keep all numbers within those of FP64, got 1073"),
    ({"bias": -1010}, "bias must keep all numbers within those of FP64, got -1010"),
    ({"bias": -1009, "specials": "fn"}, "bias must keep all numbers within those of FP64, got -1009"),
    ({"exponent_bits": 11, "specials": "none"}, "bias must keep all numbers within those of FP64, got 1023"),
])
def test_parameters_of_a_format_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FloatFormat(**{"name": "wrong", "exponent_bits": 4, "mantissa_bits": 3} | wrong)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int64])
@pytest.mark.parametrize("fmt", [FP64, FP8_E4M3, FP4_E2M1], ids=lambda fmt: fmt.name)
def test_parameters_may_be_integers_of_numpy(fmt, integer):
    bias = None if fmt.bias > 127 else integer(fmt.bias)
    same = FloatFormat(fmt.name, integer(fmt.exponent_bits), integer(fmt.mantissa_bits), bias, fmt.specials)
    assert same == fmt and repr(same) == repr(fmt)
    assert encode(-1.5, same) == encode(-1.5, fmt) and same.max == fmt.max


def test_the_worked_example_and_the_errata_of_the_notes():
    assert encode(-118.625, FP32) == 0xC2ED4000 and decode(0xC2ED4000, FP32) == -118.625
    sign, exponent, mantissa = (int(field) for field in fields(0xC2ED4000, FP32))
    assert f"{sign} {exponent:08b} {mantissa:023b}" == "1 10000101 11011010100000000000000"
    assert exponent == 6 + FP32.bias == int("10000101", 2) == 133 and int("100000101", 2) == 261
    with_leading_1 = 0b1110110101 << (FP32.mantissa_bits - 10)
    assert decode((1 << 31) | (133 << 23) | with_leading_1, FP32) == -123.3125


def test_normal_exponents_of_fp32_are_from_minus_126_to_127():
    stored = np.arange(2**8)
    numbers = decode(stored << 23, FP32)
    np.testing.assert_array_equal(numbers[1:-1], 2.0 ** np.arange(-126, 128))
    assert numbers[0] == 0 and numbers[-1] == np.inf
    assert np.isnan(decode(FP32.max_code + 2, FP32)) and decode(1, FP32) == 2.0**-149
