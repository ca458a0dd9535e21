"""The exercises on the bits of a float: what is right, and the misconceptions that their checks know."""

import math
import struct
from fractions import Fraction
from functools import partial

import numpy as np

from qlab import floats
from tests.exercises.checks import asked, check


def value(sign, exponent, mantissa, *, leading=1.0, bias=127):
    """What the fields mean, with one thing wrong."""
    fraction = int(mantissa) / 8388608
    if exponent == 0:
        return math.ldexp(fraction, -126) * (1 - 2 * sign)
    return math.ldexp(leading + fraction, exponent - bias) * (1 - 2 * sign)


def subnormal(leading, power):
    """Right where the exponent is not 0."""
    return lambda s, e, m: value(s, e, m) if e else (1 - 2 * s) * (leading + m / 8388608) * 2.0**power


def fields(x, sign=(0, 1), exponent=lambda e: e + 127, mantissa=lambda fraction: int(fraction * 8388608)):
    """(sign, exponent, mantissa), with one thing wrong."""
    fraction, e = math.frexp(abs(x))
    return sign[x < 0], exponent(e - 1), mantissa(2 * fraction - 1)


def gap(x, mantissa_bits, exponent):
    return math.ldexp(1, exponent - mantissa_bits)


def as_word(sign, exponent, mantissa):
    return sign << 31 | exponent << 23 | mantissa


def in_float32(sign, exponent, mantissa):
    two = np.float32(2)
    normal = np.float32(exponent > 0)
    return np.float32(-1) ** sign * (normal + np.float32(mantissa) / two**23) * two ** (max(exponent, 1) - 127)


def from_text(x):
    bits = "".join(f"{byte:08b}" for byte in struct.pack(">f", x))
    return [int(bits[:1], 2), int(bits[1:9], 2), int(bits[9:], 2)]


def by_halving(x):
    significand, exponent = abs(x), 0
    while significand >= 2:
        significand, exponent = significand / 2, exponent + 1
    while significand < 1:
        significand, exponent = significand * 2, exponent - 1
    return x < 0, exponent + 127, (significand - 1) * 2**23


MISTAKES = [
    ("decode", partial(value, leading=0.0), "leading 1 is missing"),
    ("decode", partial(value, bias=0), "133 means 2**(133 − 127)"),
    ("decode", lambda s, e, m: value(s, 0, m) if e == 0 else value(s, int(np.uint8(e).astype(np.int8)), m, bias=0),
     "not two's complement"),
    ("decode", partial(value, bias=128), "not 128"),
    ("decode", lambda s, e, m: (1 - 2 * s) * math.ldexp(1 + m, e - 127), "divide mantissa by 2**23"),
    ("decode", lambda s, e, m: (1 - 2 * s) * m * 2 ** (e - 127), "divide mantissa by 2**23"),
    ("decode", lambda s, e, m: (1 - 2 * s) * math.ldexp(1 + m / 10 ** len(str(m)), e - 127), "not decimal"),
    ("decode", lambda s, e, m: value(s, e, m) * (1 + m / (2**23 - 1)) / (1 + m / 2**23), "largest mantissa"),
    ("decode", lambda s, e, m: value(0, e, m), "Sign 1 means minus"),
    ("decode", lambda s, e, m: s * value(0, e, m), "Sign 1 means minus"),
    ("decode", subnormal(1, -127), "Exponent 0 is special"),
    ("decode", subnormal(0, -127), "as at exponent 1"),
    ("decode", subnormal(1, -126), "zero could not be written"),
    ("decode", lambda s, e, m: value(s, e, m) if e else 0, "only if all mantissa bits are 0"),
    ("decode", lambda s, e, m: value(s, e, m) if e else (1 - 2 * s) * (1 + m / 8388608), "has a power, too"),
    ("decode", lambda s, e, m: -1**s * value(0, e, m), "(−1)**s"),
    ("encode", lambda x: fields(x, exponent=lambda e: 127 + max(e, 0)), "no digits before the point to count. Move"),
    ("encode", lambda x: fields(x, exponent=lambda e: 127 + len(f"{int(abs(x)):b}".lstrip("0")) - 1), "is 0.00101"),
    ("encode", lambda x: (*fields(x)[:2], int((2 * math.frexp(x)[0] - 1) * 2**23)), "made from x with its sign"),
    ("encode", lambda x: (int(x < 0), math.floor(math.log2(x)) + 127, 0), "Take |x| first"),
    ("encode", lambda x: (int(x < 0), int(np.float64("nan")) + 127, 0), "Take |x| first"),
    ("encode", lambda x: fields(x)[0], "only one of 3 parts"),
    ("encode", lambda x: (int(x < 0), int(abs(x) / 2^6), 0), "written with two stars"),
    ("encode", partial(fields, sign=(1, -1)), "not −1 and +1"),
    ("encode", partial(fields, sign=(1, 0)), "1 for a negative number"),
    ("encode", partial(fields, sign=(0, 0)), "1 for a negative number"),
    ("encode", partial(fields, sign=(1, 1)), "1 for a negative number"),
    ("encode", partial(fields, exponent=lambda e: e), "plus the bias"),
    ("encode", partial(fields, exponent=lambda e: e + 128), "127, not 128"),
    ("encode", partial(fields, exponent=lambda e: e + 126), "127, not 126"),
    ("encode", lambda x: (int(x < 0), int(math.log2(abs(x))) + 127, fields(x)[2]), "cuts off towards 0"),
    ("encode", partial(fields, mantissa=lambda f: int((1 + f) * 2**22)), "comes back as −123.3125"),
    ("encode", partial(fields, mantissa=lambda f: int((1 + f) * 2**23)), "has 24 bits"),
    ("encode", partial(fields, mantissa=lambda f: int(f"{int(f * 2**23):023b}".rstrip("0") or "0", 2)), "their place"),
    ("encode", partial(fields, mantissa=lambda f: f), "fraction as an integer"),
    ("encode", partial(fields, mantissa=lambda f: 1 + f), "Drop the leading 1, and multiply"),
    ("encode", partial(fields, sign=(1, -1), exponent=lambda e: e), "not −1 and +1"),
    ("encode", partial(fields, exponent=lambda e: e, mantissa=lambda f: f), "plus the bias"),
    ("encode", lambda x: tuple(map(np.binary_repr, fields(x), (1, 8, 23))), "as integers"),
    ("encode", lambda x: (int(x < 0), *map(np.binary_repr, fields(x)[1:], (8, 23))), "as integers"),
    ("encode", lambda x: (*fields(x)[:2], np.binary_repr(fields(x)[2], 23)), "as integers"),
    ("encode", lambda x: "".join(map(np.binary_repr, fields(x), (1, 8, 23))), "This is the whole word"),
    ("spacing", lambda x, m: 2 ** (math.floor(math.log2(abs(x))) - m), "np.log2 rounds"),
    ("spacing", lambda x, m: np.exp2(np.floor(np.log2(np.abs(np.float32(x)))) - np.float32(m)), "np.log2 rounds"),
    ("spacing", lambda x, m: gap(x, m, int(math.log2(abs(x)))), "np.log2 rounds"),
    ("spacing", lambda x, m: 2**-m, "machine epsilon"),
    ("spacing", lambda x, m: abs(x) / 2**m, "same spacing"),
    ("spacing", lambda x, m: gap(x, m + 1, math.frexp(x)[1] - 1), "do not count it in"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1) / 2, "largest error of rounding"),
    ("spacing", lambda x, m: gap(x, m, math.ceil(math.log2(abs(x)))), "not its ceiling"),
    ("spacing", lambda x, m: gap(x, m, round(math.log2(abs(x)))), "nor the nearest integer"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1]), "math.frexp gives one more"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(np.nextafter(abs(x), 0))[1] - 1), "next smaller number"),
    ("spacing", lambda x, m: gap(x, m, math.floor(math.log2(x))), "Take |x| first"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1) if x > 0 else math.nan, "logarithm of a negative number"),
    ("spacing", lambda x, m: gap(x, 0, math.frexp(x)[1] - 1), "mantissa_bits is not used"),
    ("spacing", lambda x, m: gap(x, 10, math.frexp(x)[1] - 1), "those of FP16"),
    ("spacing", lambda x, m: np.spacing(np.float32(abs(x))), "those of FP32"),
    ("spacing", lambda x, m: np.spacing(abs(x)), "those of Python's own numbers"),
    ("spacing", lambda x, m: math.copysign(1, x) * gap(x, m, math.frexp(x)[1] - 1), "A distance is positive"),
]
RIGHT = [
    ("decode", value),
    ("decode", in_float32),
    ("decode", lambda *fields: np.uint32(as_word(*fields)).view(np.float32)),
    ("decode", lambda *fields: np.array(floats.decode(as_word(*fields), floats.FP32))),
    ("decode", lambda s, e, m: Fraction(1 - 2 * s) * (Fraction(m, 2**23) + (e > 0)) * Fraction(2) ** (max(e, 1) - 127)),
    ("encode", fields),
    ("encode", from_text),
    ("encode", by_halving),
    ("encode", lambda x: np.array(fields(x), np.float64)),
    ("encode", lambda x: np.float32(x).view(np.uint32) >> np.uint32([31, 23, 0]) & np.uint32([1, 255, 0x7FFFFF])),
    ("encode", lambda x: floats.fields(int(floats.encode(x, floats.FP32)), floats.FP32)),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1)),
    ("spacing", lambda x, m: np.spacing(abs(x)) * 2 ** (52 - m)),
]
STEPS = [  # wrong in a way that no misconception explains, and the step that is told at the second failure
    ("decode", lambda s, e, m: -value(s, e, m, bias=124), "the sign"),
    ("decode", lambda s, e, m: value(s, e, m, bias=124), "yours is 2**3 times"),
    ("decode", lambda s, e, m: value(s, e, m // 2), "1.m"),
    ("decode", lambda s, e, m: value(s, e, m) if e else 3, "exponent 0 by itself"),
    ("decode", lambda s, e, m: [1, 2], "what you return: one number"),
    ("encode", lambda x: (2, *fields(x)[1:]), "the sign"),
    ("encode", partial(fields, exponent=lambda e: e + 100), "The sign is right"),
    ("encode", partial(fields, mantissa=lambda fraction: 5), "Sign and exponent are right"),
    ("encode", lambda x: (1, 2), "3 parts"),
    ("spacing", lambda x, m: 3, "the exponent first"),
]
FIRST_CASES = [  # how the first case of a check is told
    ("decode", "For sign = 1, exponent = 133, mantissa = 7159808 (the word 0xC2ED4000): expected -118.625, "),
    ("encode", "For x = -118.625: expected (1, 133, 7159808), "),
    ("spacing", "For x = 1000.0, mantissa_bits = 10 (FP16): expected 0.5, "),
]
NEARLY = [  # integers are compared exactly
    ("encode", lambda x: (*fields(x)[:2], fields(x)[2] + 1)),
    ("encode", lambda x: (*fields(x)[:2], fields(x)[2] + 0.5)),
]


def test_what_is_asked():
    decoded = asked("decode", value)
    assert {(0, 127, 0), (0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 254, 2**23 - 1)} < set(decoded)
    encoded = [x for (x,) in asked("encode", fields)]
    assert encoded[:4] == [-118.625, 1.0, 0.15625, 6.5]
    assert min(encoded, key=abs) < 0 and 1e20 < max(encoded) < 1e38
    assert all(np.float32(x) == x for x in encoded)
    spaced = asked("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1))
    assert {m for _, m in spaced} == {7, 10, 23, 52} and min(abs(x) for x, _ in spaced) == 1


def test_an_exception_is_told_with_its_case():
    def fails(x, m):
        return [x][m]

    verdict, again = check("spacing", fails), check("spacing", fails)
    assert verdict.text == "For x = 1000.0, mantissa_bits = 10 (FP16), your function raised IndexError: list index " + (
        "out of range")
    assert again.text == verdict.text + "\n  Look at this line: return [x][m]"


def test_values_that_look_alike_are_told_apart():
    text = check("decode", lambda *fields: value(*fields) * (1 + 1e-7)).text
    assert "expected -118.625, your function gave -118.625011863." in text
