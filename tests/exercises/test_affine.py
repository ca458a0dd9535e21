"""The exercises on from values to codes: what is right, and the misconceptions that their checks know."""

from functools import partial

import numpy as np
import pytest

from qlab import affine, samples
from tests.exercises.checks import asked, check

SEVEN = [5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8]

def absmax(x, bits, *, steps=None, largest=lambda x: max(abs(x)), rounded=np.rint):
    s = largest(x) / (steps or 2 ** (bits - 1) - 1)
    return s, rounded(x / s)


def zero_point(x, bits, *, steps=None, ends=lambda x: (min(0, *x), max(0, *x)), z=None):
    alpha, beta = ends(x)
    s = (beta - alpha) / (steps or 2**bits - 1)
    return s, z(alpha / s) if z else round(-alpha / s) - 2 ** (bits - 1)


def half_up(v):
    return -np.ceil(-v - 0.5)


def half_away(v):
    return np.sign(v) * (abs(v) + 0.5).astype(int)


def single(x):
    return np.abs(x.astype(np.float32)).max(), x.astype(np.float32)


def absmax_float32(x, bits, *, by_reciprocal=False):
    largest, x = single(x)
    s = largest / np.float32(2 ** (bits - 1) - 1)
    return s, np.rint(x * (np.float32(1) / s) if by_reciprocal else x / s).astype(np.int8)


def absmax_float64(x, bits):
    s = np.abs(x.astype(np.float64)).max() / (2 ** (bits - 1) - 1)
    return [s, np.round(x.astype(np.float64) * (1 / s))]


def absmax_loops(x, bits):
    s = max(abs(v) for v in x) / (2 ** (bits - 1) - 1)
    return s, [round(v / s) for v in x]


def absmax_of_qlab(x, bits):
    params = affine.absmax_params(x, bits)
    return params.scale, affine.quantize(x, params)


def zero_point_float32(x, bits):
    low, high = np.minimum(single(x)[1].min(), 0), np.maximum(single(x)[1].max(), 0)
    s = (high - low) / np.float32(2**bits - 1)
    return np.array([s, np.rint(-low / s) - 2 ** (bits - 1)], np.float32)


def zero_point_from_above(x, bits):
    low, high = min(0.0, *x.tolist()), max(0.0, *x.tolist())
    return [(high - low) / (2**bits - 1), np.int8(2 ** (bits - 1) - 1 - round(high * (2**bits - 1) / (high - low)))]


def zero_point_of_qlab(x, bits):
    params = affine.zero_point_params(x, bits)
    return params.scale, params.zero_point


MISTAKES = [
    ("absmax", lambda x, bits: absmax(x, bits)[::-1], "s first, then q"),
    ("absmax", lambda x, bits: (1 / absmax(x, bits)[0], absmax(x, bits)[1]), "This is 1 / s"),
    ("absmax", partial(absmax, largest=max), "Take the maximum of |x|"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=(2**bits - 1) / 2), "torch's observers"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=(2**bits - 1) / 2, rounded=np.trunc), "torch's observers"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=2 ** (bits - 1)), "would have no code"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=2**bits - 1), "codes have a sign"),
    ("absmax", partial(absmax, steps=255, largest=np.ptp), "scale of the zero-point mapping"),
    ("absmax", partial(absmax, steps=127), "127 belongs to 8 bits"),
    ("absmax", lambda x, bits: (absmax(x, bits)[0], np.rint(x * absmax(x, bits)[0])), "multiplying is the way back"),
    ("absmax", partial(absmax, rounded=np.array), "not yet rounded"),
    ("absmax", lambda x, bits: absmax(x, bits)[1], "only one of 2 parts"),
    ("absmax", lambda x, bits: (absmax(x, bits)[0], np.multiply(*absmax(x, bits))), "asked are the integers q"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=2 ^ (bits - 1) - 1), "2**7 is 128"),
    ("absmax", partial(absmax, rounded=lambda v: v.astype(int)), "36.9 becomes 36"),
    ("absmax", partial(absmax, rounded=lambda v: v // 1), "The floor goes down"),
    ("absmax", partial(absmax, rounded=half_up), "A half goes up"),
    ("absmax", partial(absmax, rounded=half_away), "A half goes away from 0"),
    ("zero_point", lambda x, bits: zero_point(x, bits)[::-1], "s first, then z"),
    ("zero_point", lambda x, bits: (1 / zero_point(x, bits)[0], -23), "This is 1 / s"),
    ("zero_point", partial(zero_point, ends=lambda x: (min(x), max(x))), "padding and ReLU"),
    ("zero_point", partial(zero_point, ends=lambda x: (min(x), max(*x, 0))), "[1, 3] becomes [0, 3]"),
    ("zero_point", partial(zero_point, ends=lambda x: (min(*x, 0), max(x))), "[−3, −1] becomes [−3, 0]"),
    ("zero_point", lambda x, bits: zero_point(x, bits, steps=2**bits), "number of levels"),
    ("zero_point", lambda x, bits: zero_point(x, bits, steps=2**bits - 2), "narrow range"),
    ("zero_point", lambda x, bits: (absmax(x, bits)[0], 0), "scale of absmax"),
    ("zero_point", partial(zero_point, ends=lambda x: (0, max(abs(x)))), "not from 0 to max|x|"),
    ("zero_point", lambda x, bits: zero_point(x, bits)[0], "only one of 2 parts"),
    ("zero_point", lambda x, bits: zero_point(x, bits, steps=2 ^ bits - 1), "2**7 is 128"),
    ("zero_point", partial(zero_point, steps=255), "255 belongs to 8 bits"),
    ("zero_point", partial(zero_point, z=lambda a: -128 - a), "z has to be an integer"),
    ("zero_point", lambda x, bits: (zero_point(x, bits)[0], -zero_point(x, bits)[1]), "z has the other sign"),
    ("zero_point", partial(zero_point, z=lambda a: -128 + round(a)), "Mind the sign"),
    ("zero_point", partial(zero_point, z=lambda a: -round(a)), "unsigned codes"),
    ("zero_point", partial(zero_point, z=round), "where α lies"),
    ("zero_point", partial(zero_point, z=lambda a: -128 - round(a)), "lowest code of 8 bits"),
    ("zero_point", partial(zero_point, z=lambda a: int(-128 - a)), "z is cut off"),
    ("zero_point", lambda x, bits: zero_point(x, bits, z=lambda a: int(-a) - 2 ** (bits - 1)), "z is cut off"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s) + z, "codes outside"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s + z), "formula of the notes"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s + z).clip(low, high), "another even neighbour"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) - z).clip(low, high), "z is subtracted"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s).clip(low, high) + z, "z is added after the clip"),
    ("quantize", lambda x, s, z, low, high: np.int8(np.int32(np.rint(x / s)) + z).clip(low, high), "wraps around"),
    ("quantize", lambda x, s, z, low, high: np.int8(np.int32(np.rint(x / s)) + z), "wraps around"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(-128, 127), "arguments qmin and qmax"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x * s) + z).clip(low, high), "x is multiplied by s"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s).clip(low, high), "z is missing"),
    ("quantize", lambda x, *params: affine.fake_quantize(x, affine.QParams(*params)), "This is x̂"),
    ("quantize", lambda x, s, z, low, high: (x / s + z).clip(low, high), "These are not integers"),
    ("quantize", lambda x, s, z, low, high: ((x / s).astype(int) + z).clip(low, high), "The fraction is cut off"),
    ("quantize", lambda x, s, z, low, high: (x // s + z).clip(low, high), "The floor goes down"),
    ("quantize", lambda x, s, z, low, high: (half_up(x / s) + z).clip(low, high), "A half goes up"),
    ("quantize", lambda x, s, z, low, high: (half_away(x / s) + z).clip(low, high), "A half goes away from 0"),
]
RIGHT = [
    ("absmax", absmax),
    ("absmax", absmax_float32),
    ("absmax", partial(absmax_float32, by_reciprocal=True)),
    ("absmax", absmax_float64),
    ("absmax", absmax_loops),
    ("absmax", absmax_of_qlab),
    ("zero_point", zero_point),
    ("zero_point", zero_point_float32),
    ("zero_point", zero_point_from_above),
    ("zero_point", zero_point_of_qlab),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(low, high).astype(np.int8)),
    ("quantize", lambda x, s, z, low, high: [min(max(round(v / s) + z, low), high) for v in x]),
    ("quantize", lambda x, s, z, low, high: np.rint(x.astype(float) / s).clip(low - z, high - z) + z),
    ("quantize", lambda x, s, z, low, high: (np.rint(single(x)[1] / np.float32(s)) + z).clip(low, high)),
    ("quantize", lambda x, s, z, low, high: (np.rint(single(x)[1] * np.float32(1 / s)) + z).clip(low, high)),
    ("quantize", lambda x, *params: affine.quantize(x, affine.QParams(*params))),
]
STEPS = [  # wrong in a way that no misconception explains, and the step that is told at the second failure
    ("absmax", lambda x, bits: (1.5, absmax(x, bits)[1]), "s first"),
    ("absmax", lambda x, bits: (absmax(x, bits)[0], absmax(x, bits)[1] + 1), "s is right"),
    ("zero_point", lambda x, bits: (1.5, 3), "s first"),
    ("zero_point", lambda x, bits: (zero_point(x, bits)[0], 3), "s is right"),
    ("quantize", lambda x, *_: x[1:], "one code for each value"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s) + 3 * z, "no code may lie outside -128 to 127"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(low, high - 1), "the last step, the clip"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z + 2).clip(low, high), "off by 2, and z is 3"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s / 3) + z).clip(low, high), "the first step"),
]
FIRST_CASES = [  # how the first case of a check is told
    ("absmax", f"For x = {list(map(float, SEVEN))}, bits = 8: expected (0.0850394, [64, 36, -89, 0, -23, -54, 127]), "),
    ("zero_point", f"For x = {list(map(float, SEVEN))}, bits = 8: expected (0.0721176, -23), "),
    ("quantize", "For x = [-300.0, -5.0, -1.5, -1.0, 0.0, 1.0, 3.0, 394.0], s = 2, z = 3, qmin = -128, qmax = 127: "
                 "expected [-128, 1, 2, 3, 3, 3, 5, 127], "),
]
NEARLY = [  # integers are compared exactly
    ("absmax", lambda x, bits: (absmax(x, bits)[0], absmax(x, bits)[1] * (1 + 1e-9))),
    ("zero_point", lambda x, bits: (zero_point(x, bits)[0], zero_point(x, bits)[1] - 1e-6)),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(low, high) * (1 + 1e-9)),
]


def test_what_is_asked():
    mapped = asked("absmax", absmax)
    assert [(len(x), bits) for x, bits in mapped] == [(7, 8), (6, 4), (7, 8), (36_864, 4)]
    assert [max(x) < -min(x) for x, _ in mapped[:3]] == [False, False, True]
    assert [(len(x), bits) for x, bits in asked("zero_point", zero_point)] == [(7, 8), (3, 8), (3, 8), (73_728, 4)]
    assert [(len(x), *rest) for x, *rest in asked("quantize", dict(RIGHT)["quantize"])] == [
        (8, 2.0, 3, -128, 127), (73_728, 0.11, -3, -8, 7)]


def test_of_a_long_array_the_first_difference_is_told():
    def nearly(x, bits):
        s, q = absmax(x, bits)
        q[1000::1000] += 1
        return s, q

    s, codes = absmax(samples.load("weights")[:64].ravel(), 4)
    shown = f"({s:.6g}, [{', '.join(f'{code + 0:.0f}' for code in codes[:8])}, …])"
    assert check("absmax", nearly).text == (
        f"For 36,864 real weights, bits = 4: expected {shown}, your function gave {shown}.\n"
        f"  36 of 36,864 numbers differ. The first at index 1000: expected {codes[1000]:.0f}, "
        f"your function gave {codes[1000] + 1:.0f}.")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_real_data_has_no_near_ties(dtype):
    weights, activations = samples.load("weights")[:64].astype(dtype), samples.load("activations").astype(dtype)
    for x, s in ((weights, dtype(1.1875) / dtype(7)), (activations, dtype(0.11))):
        steps = x / s
        assert np.abs(np.abs(steps - np.floor(steps)) - 0.5).min() > 5e-5
