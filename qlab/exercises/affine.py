"""Checks of lesson 02: absmax, zero-point, and quantizing with given parameters."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded

_SEVEN = np.array([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])

_HALF_UP = ("A half goes up here: 0.5 → 1, 2.5 → 3. Quantizers round half to even, as np.rint does: 0.5 → 0, "
            "1.5 → 2, 2.5 → 2.")
_HALF_AWAY = ("A half goes away from 0 here, as at school: 0.5 → 1, −0.5 → −1. Quantizers round half to even, as "
              "np.rint does: 0.5 → 0, 1.5 → 2, 2.5 → 2.")


def _half_up(v):
    return np.floor(v + 0.5)


def _half_away(v):
    return np.copysign(np.floor(np.abs(v) + 0.5), v)


@recorded
def check_absmax(function):
    """Check ``function(x, bits)``, the absmax mapping of an array: (s, q), the scale and the integer codes.

    s = max|x| / (2^(b−1) − 1) and q = rint(x / s). Every x has one dimension and is not all 0.

    References
    ----------
    Gholami et al. 2022, "A survey of quantization methods for efficient neural network inference", section III-C.

    Examples
    --------
    >>> def absmax(x, bits):
    ...     s = np.abs(x).max() / (2 ** (bits - 1) - 1)
    ...     return s, np.rint(x / s)
    >>> check_absmax(absmax)
    ✓ Right: the seven numbers, ties, a negative maximum, and 36,864 real weights.
    """

    def scale(x, bits):
        return np.abs(x).max() / (2 ** (bits - 1) - 1)

    def codes(rounded):
        return lambda x, bits: (scale(x, bits), rounded(x / scale(x, bits)))

    right = codes(lambda v: np.rint(v).astype(int))
    misconceptions = [
        (lambda x, bits: right(x, bits)[::-1], "Both are right, in the other order: return s first, then q."),
        (lambda x, bits: (1 / scale(x, bits), ...),
         "This is 1 / s. The scale s is the width of one step, so that q = x / s, and back again x̂ = s · q."),
        (lambda x, bits: (x.max() / (2 ** (bits - 1) - 1), ...),
         "This scale comes from max(x), but the value furthest from 0 is negative here. Take the maximum of |x|."),
        (lambda x, bits: (np.abs(x).max() / (2 ** (bits - 1) - 0.5), ...),
         "This divides by half of 2^b − 1, 127.5 for 8 bits, as torch's observers do. A code is a whole number: "
         "absmax gives max|x| the largest one, 127."),
        (lambda x, bits: (np.abs(x).max() / 2 ** (bits - 1), ...),
         "This divides by 2^(b−1), 128 for 8 bits. But int8 ends at 127, so +max|x| would have no code: divide by "
         "2^(b−1) − 1."),
        (lambda x, bits: (np.abs(x).max() / (2**bits - 1), ...),
         "This divides by 2^b − 1. The codes have a sign: from 0 to max|x| there are 2^(b−1) − 1 steps, 127 for 8 "
         "bits."),
        (lambda x, bits: ((x.max() - x.min()) / (2**bits - 1), ...),
         "This is the scale of the zero-point mapping. The range of absmax goes from −max|x| to max|x|."),
        (lambda x, bits: (np.abs(x).max() / 127, ...), "127 belongs to 8 bits. For b bits it is 2^(b−1) − 1."),
        (lambda x, bits: (scale(x, bits), np.rint(x * scale(x, bits))),
         "The scale is right. To get q, divide x by it; multiplying is the way back."),
        (codes(lambda v: v), "The scale is right, and q is x / s, not yet rounded to integers."),
        (codes(np.trunc),
         "The fraction is cut off here (int() and astype(int) do that), so 36.9 becomes 36. Round with np.rint first."),
        (codes(np.floor), "The floor goes down always, even from 36.9 to 36. np.rint goes to the nearest integer."),
        (codes(_half_up), _HALF_UP),
        (codes(_half_away), _HALF_AWAY),
    ]
    ties, negated = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 7]), 0 - _SEVEN
    weights = samples.load("weights")[:64].ravel()  # further rows hold max|x| / 2: a tie, whatever the bits
    cases = [
        Case(f"x = {_SEVEN.tolist()}, bits = 8", (_SEVEN, 8), right(_SEVEN, 8)),
        Case(f"x = {ties.tolist()}, bits = 4, so that s = 1", (ties, 4), right(ties, 4)),
        Case(f"x = {negated.tolist()}, bits = 8", (negated, 8), right(negated, 8)),
        Case("36,864 real weights, bits = 4", (weights, 4), right(weights.astype(np.float64), 4)),
    ]
    praise = "Right: the seven numbers, ties, a negative maximum, and 36,864 real weights."
    return check(function, cases, misconceptions, praise)


@recorded
def check_zero_point(function):
    """Check ``function(x, bits)``, the scale and zero-point (s, z) of an array for codes from −2^(b−1) to 2^(b−1) − 1.

    s = (β − α) / (2^b − 1) and z = −2^(b−1) − rint(α / s), where [α, β] is [min x, max x] widened to hold 0. Every x
    has one dimension and is not all 0.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", section 2.1 and equation 13.

    Examples
    --------
    >>> def zero_point(x, bits):
    ...     alpha, beta = min(x.min(), 0), max(x.max(), 0)
    ...     s = (beta - alpha) / (2**bits - 1)
    ...     return s, -(2 ** (bits - 1)) - np.rint(alpha / s)
    >>> check_zero_point(zero_point)
    ✓ Right: the seven numbers, ranges without 0, and 73,728 real activations.
    """

    def width(x):
        return max(x.max(), 0) - min(x.min(), 0)

    def with_zero(zero_point):
        """(s, z) with the right s; ``zero_point`` makes z from the lowest code and α / s."""

        def answer(x, bits):
            s = width(x) / (2**bits - 1)
            return s, zero_point(-(2 ** (bits - 1)), min(x.min(), 0) / s)

        return answer

    right = with_zero(lambda qmin, steps: int(qmin - np.rint(steps)))
    cut_off = "z is cut off here. Round it to the nearest integer: np.rint."
    misconceptions = [
        (lambda x, bits: right(x, bits)[::-1], "Both are right, in the other order: return s first, then z."),
        (lambda x, bits: (1 / right(x, bits)[0], ...),
         "This is 1 / s. The scale s is the width of one step, (β − α) / (2^b − 1)."),
        (lambda x, bits: ((x.max() - x.min()) / (2**bits - 1), ...),
         "This range leaves out 0. Widen it: [1, 3] becomes [0, 3], and [−3, −1] becomes [−3, 0]. 0 must be exact, "
         "because padding and ReLU produce it all the time, and each of these zeros would carry an error."),
        (lambda x, bits: (width(x) / 2**bits, ...),
         "This divides by the number of levels. 2^b levels have 2^b − 1 steps between them, 255 for 8 bits."),
        (lambda x, bits: (width(x) / (2**bits - 2), ...),
         "This divides by 2^b − 2, as the slides do (254): the narrow range, without the lowest code. Here all 2^b "
         "codes are used, with 2^b − 1 steps between them."),
        (lambda x, bits: (np.abs(x).max() / (2 ** (bits - 1) - 1), ...),
         "This is the scale of absmax. Here the range goes from α to β: s = (β − α) / (2^b − 1)."),
        (lambda x, bits: (np.abs(x).max() / (2**bits - 1), ...),
         "The range is β − α, from the smallest to the largest value, not from 0 to max|x|."),
        (lambda x, bits: (width(x) / 255, ...), "255 belongs to 8 bits. For b bits it is 2^b − 1."),
        (with_zero(lambda qmin, steps: qmin - steps),
         "The scale is right. z has to be an integer: it is the code of 0, which is exact only if it has one. Round "
         "it."),
        (with_zero(lambda qmin, steps: np.rint(steps) - qmin),
         "z has the other sign. In x̂ = s(q − z) it is subtracted, and α must get the lowest code: z = −2^(b−1) − "
         "rint(α / s)."),
        (with_zero(lambda qmin, steps: qmin + np.rint(steps)),
         "Mind the sign of α / s. α is below 0, so z lies above the lowest code: subtract rint(α / s)."),
        (with_zero(lambda qmin, steps: -np.rint(steps)),
         "This is z for unsigned codes, which begin at 0 (0…255). Signed ones begin at −2^(b−1): add that."),
        (with_zero(lambda qmin, steps: np.rint(steps)),
         "α / s is where α lies, in steps from 0. z is the code of 0 when α has the lowest one: z = −2^(b−1) − rint(α "
         "/ s)."),
        (with_zero(lambda qmin, steps: -128 - np.rint(steps)),
         "−128 is the lowest code of 8 bits. For b bits it is −2^(b−1)."),
        (with_zero(lambda qmin, steps: np.floor(qmin - steps)), cut_off),
        (with_zero(lambda qmin, steps: np.ceil(qmin - steps)), cut_off),
    ]
    above, x = np.array([1.0, 2.0, 3.0]), samples.load("activations").ravel()
    cases = [
        Case(f"x = {_SEVEN.tolist()}, bits = 8", (_SEVEN, 8), right(_SEVEN, 8)),
        Case(f"x = {above.tolist()}, bits = 8", (above, 8), right(above, 8)),
        Case(f"x = {(-above).tolist()}, bits = 8", (-above, 8), right(-above, 8)),
        Case("73,728 real activations, bits = 4", (x, 4), right(x.astype(np.float64), 4)),
    ]
    praise = "Right: the seven numbers, ranges without 0, and 73,728 real activations."
    return check(function, cases, misconceptions, praise)


@recorded
def check_quantize(function):
    """Check ``function(x, s, z, qmin, qmax)``, the integer codes clip(rint(x / s) + z, qmin, qmax) of an array.

    Every x has one dimension.

    References
    ----------
    ONNX operator QuantizeLinear.

    Examples
    --------
    >>> check_quantize(lambda x, s, z, qmin, qmax: np.clip(np.rint(x / s) + z, qmin, qmax))
    ✓ Right, on the tiny case and on 73,728 real activations.
    """

    def codes(rounded):
        return lambda x, s, z, qmin, qmax: np.clip(rounded(x / s) + z, qmin, qmax)

    def right(x, s, z, qmin, qmax):
        return np.clip(np.rint(x / s) + z, qmin, qmax).astype(int)

    misconceptions = [
        (lambda x, s, z, qmin, qmax: np.clip(np.rint(x / s) + z, -128, 127),
         "The limits are not always −128 and 127: clip to the arguments qmin and qmax."),
        (lambda x, s, z, qmin, qmax: np.rint(x / s) + z,
         "There are codes outside [qmin, qmax]. The notes have no clip either, but int8 has no code for a value "
         "outside the range: np.clip gives it the nearest one."),
        (lambda x, s, z, qmin, qmax: np.rint(x / s + z),
         "This is the formula of the notes. It needs a clip to [qmin, qmax], and z comes after rounding, as in ONNX "
         "and torch: with an odd z, ties would go the other way."),
        (lambda x, s, z, qmin, qmax: np.clip(np.rint(x / s + z), qmin, qmax),
         "This rounds x / s + z, as the notes do. ONNX rounds x / s, then adds z. With an odd z the two "
         "differ at ties, for x / s + z has another even neighbour."),
        (lambda x, s, z, qmin, qmax: np.clip(np.rint(x / s) - z, qmin, qmax),
         "z is subtracted. That is the way back, x̂ = s(q − z); on the way to the code it is added."),
        (lambda x, s, z, qmin, qmax: np.clip(np.rint(x / s), qmin, qmax) + z,
         "z is added after the clip, and moves codes out of [qmin, qmax] again. Add it first, then clip."),
        (lambda x, s, z, qmin, qmax: np.clip((np.rint(x / s) + z).astype(int).astype(np.int8), qmin, qmax),
         "The cast to int8 comes before the clip, and a code that does not fit wraps around: 200 becomes −56. Clip "
         "first, cast last."),
        (lambda x, s, z, qmin, qmax: np.clip(np.rint(x * s) + z, qmin, qmax),
         "x is multiplied by s. That is the way back; to get a code, divide."),
        (lambda x, s, z, qmin, qmax: np.clip(np.rint(x / s), qmin, qmax), "z is missing. It is the code of 0: add it."),
        (codes(lambda v: v), "These are not integers. Round x / s, then add z."),
        (codes(np.trunc),
         "The fraction is cut off here (int() and astype(int) do that). Round x / s to the nearest integer first: "
         "np.rint."),
        (codes(np.floor), "The floor goes down always. np.rint goes to the nearest integer."),
        (codes(_half_up), _HALF_UP),
        (codes(_half_away), _HALF_AWAY),
    ]
    tiny, x = np.array([-300, -5, -1.5, -1, 0, 1, 3, 394]), samples.load("activations").ravel()
    cases = [
        Case(f"x = {tiny.tolist()}, s = 2, z = 3, qmin = -128, qmax = 127", (tiny, 2.0, 3, -128, 127),
             right(tiny, 2.0, 3, -128, 127)),
        Case("73,728 real activations, s = 0.11, z = -3, qmin = -8, qmax = 7", (x, 0.11, -3, -8, 7),
             right(x.astype(np.float64), 0.11, -3, -8, 7)),
    ]
    return check(function, cases, misconceptions, "Right, on the tiny case and on 73,728 real activations.")
