"""The exercises on a multiplier of integers: what is right, and the misconceptions that their checks know."""

import math
from fractions import Fraction
from functools import partial

import numpy as np

from qlab import integer
from tests.exercises.checks import asked


def multiplier(m, *, power=31, whole=round):
    """(m0, shift) by doubling and halving, without a care for m0 = 2^31."""
    shift = 0
    while m < 0.5:
        m, shift = 2 * m, shift + 1
    while m >= 1:
        m, shift = m / 2, shift - 1
    return whole(m * 2**power), shift


def safe_multiplier(m):
    m0, shift = multiplier(m)
    return (m0, shift) if m0 < 2**31 else (m0 >> 1, shift - 1)


MISTAKES = [
    ("multiplier", lambda m: safe_multiplier(m)[::-1], "return m0 first"),
    ("multiplier", partial(multiplier, power=0, whole=float), "This is the fraction"),
    ("multiplier", partial(multiplier, whole=float), "m0 is an integer"),
    ("multiplier", lambda m: (int(m * 2**31), 0), "with n = 0"),
    ("multiplier", lambda m: (round(m * 2**31), 0) if m > 1 else safe_multiplier(m), "Double m, or halve it"),
    ("multiplier", lambda m: (safe_multiplier(m)[0], -safe_multiplier(m)[1]), "the other sign"),
    ("multiplier", lambda m: (safe_multiplier(m)[0], safe_multiplier(m)[1] + 31), "This n is the whole shift"),
    ("multiplier", partial(multiplier, power=15), "m0 has 16 bits"),
    ("multiplier", partial(multiplier, power=16), "m0 has 16 bits"),
    ("multiplier", partial(multiplier, power=32), "not 1 · 2^−2"),
    ("multiplier", lambda m: (multiplier(m, power=32)[0], multiplier(m)[1] + 1), "not 1 · 2^−2"),
    ("multiplier", lambda m: (round(m * 2 ** (31 + math.floor(-math.log2(m)))), math.floor(-math.log2(m))),
     "not 1 · 2^−2"),
    ("multiplier", partial(multiplier, whole=int), "cut off"),
    ("multiplier", lambda m: (min(multiplier(m)[0], 2**31 - 1), multiplier(m)[1]), "held at 2^31 − 1"),
    ("multiplier", multiplier, "m is so close to 1"),
]
RIGHT = [
    ("multiplier", safe_multiplier),
    ("multiplier", integer.quantize_multiplier),
    ("multiplier", lambda m: np.array(integer.quantize_multiplier(m), np.float64)),
    ("multiplier", lambda m: max((Fraction(1, 2) <= Fraction(round(Fraction(m) * 2 ** (31 + n)), 2**31) < 1,
                                  round(Fraction(m) * 2 ** (31 + n)), n) for n in range(-31, 9))[1:]),
]
FIRST_CASES = [  # how the first case of a check is told
    ("multiplier", "For m = 0.25: expected (1073741824, 1), "),
]
NEARLY = [  # integers are compared exactly
    ("multiplier", lambda m: (safe_multiplier(m)[0] + 1, safe_multiplier(m)[1])),
]


def test_what_is_asked():
    factors = [m for (m,) in asked("multiplier", safe_multiplier)]
    assert [multiplier(m)[1] for m in factors] == [1, 1, 7, 0, -1, -6, 0]
    assert [round(m * 2 ** (31 + multiplier(m)[1])) == 2**31 for m in factors] == [False] * 6 + [True]
    assert all(Fraction(m) * 2 ** (32 + multiplier(m)[1]) % 2 != 1 for m in factors)  # no tie
