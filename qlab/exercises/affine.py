"""Checks of lesson 02: absmax, zero-point, and quantizing with given parameters."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, by_part, check, numbers, recorded
from qlab.exercises.predicting import Number, Option, Question

PREDICTIONS = {
    "codes of 0": Question(
        "How many of the seven numbers get the code 0?", (
            Option("one", lambda n: n == 1,
                   "That is the number that is 0. A level takes all numbers that lie nearer to it than to any other."),
            Option("two", lambda n: n == 2,
                   "Which numbers lie within half a step of 0? With 2 bits, half a step is half of 10.8."),
            Option("four", lambda n: n == 4,
                   "Count the numbers that lie within half a step of 0: half of 10.8."),
        ), move="Press “seven numbers” in the figure, drag bits to 2, and read codes."),
    "signs turned": Number(
        "1. Where is z after the signs are turned?",
        "z = −128 − round(α / s), and now α is −10.8 and β is 7.59. The step is as before.",
        wrong=((23, "That would be the mirror image of −23. Do the codes from −128 to 127 mirror each other?"),
               (-23, "That was z before. Now the range reaches further below 0 than above, so more codes must lie "
                     "below z."),
               (0, "z is 0 with absmax. Is the scheme zero-point?")),
        move="Type the numbers with their signs turned into data, and choose zero-point."),
    "one bit less": Question(
        "2. From 8 bits to 7, the MSE becomes", (
            Option("twice as large", lambda ratio: ratio < 3, "The step about doubles, and so do the errors. The "
                   "MSE is the mean of their squares."),
            Option("about four times as large", lambda ratio: 3 <= ratio < 6),
            Option("about eight times as large", lambda ratio: ratio >= 6, "Twice the error, squared: is that eight?"),
        ), move="Press “seven numbers”, choose absmax, and take bits from 8 to 7."),
    "codes of [1, 2, 3]": Question(
        "3. Which codes does no number from 1 to 3 get?", (
            Option("none", lambda share: share == 0,
                   "The range is widened to hold 0. Which codes lie between 0 and 1?"),
            Option("about a third of them", lambda share: 0.25 < share < 0.4),
            Option("about two thirds of them", lambda share: 0.55 < share < 0.75,
                   "Two thirds of the range, from 1 to 3, hold the data. What is below?"),
        ), move="Untick narrow range, choose zero-point, and press “[1, 2, 3]”."),
    "an end before the data's": Question(
        "4. With β at 5, which numbers end at the last code?", (
            Option("10.8 only", lambda n: n == 1, "Every number beyond β is cut down to it. Is 10.8 the only one?"),
            Option("10.8 and 5.47", lambda n: n == 2),
            Option("10.8, 5.47 and 3.08", lambda n: n == 3, "3.08 lies inside of the range. Follow its thread."),
        ), move="Press “seven numbers”, choose zero-point, and take β down to 5."),
    "gain of zero-point": Question(
        "At 8 bits, zero-point beats absmax by", (
            Option("about 6 dB on both", lambda db: min(db) > 4, "The output of tanh reaches from −1 to 1. How many "
                   "codes does absmax leave empty there?"),
            Option("about 6 dB on ReLU and next to nothing on tanh", lambda db: db[0] > 4 and db[1] < 1),
            Option("next to nothing on both", lambda db: max(db) < 1, "ReLU has no negative values. How many of the "
                   "codes of absmax does it use, and how many bits is that?"),
        )),
    "codes of ReLU data": Number(
        "How many of the 15 codes of absmax are used?",
        "The codes of absmax go from −7 to 7. Which of them stand for values that ReLU puts out?",
        wrong=((15, "The codes of absmax go from −7 to 7. Does ReLU put out negative values?"),
               (7, "Count the code of 0, too."))),
    "bits for rows": Number(
        "Bits per weight, with one scale for each row",
        "A row has 576 weights, which share the 16 bits of one scale; each has 4 bits of its own.",
        wrong=((4 + 16 / 192, "There are 192 rows, but a row has 576 weights, and these share its scale."),
               (20, "The 16 bits are shared by all weights of the row."),
               (4, "Nearly. But the 16 bits of a scale are shared by 576 weights, not by endless many.")),
        rtol=0.001),
    "bits for groups": Number(
        "Bits per weight, with one scale for each group of 32",
        "Each weight has 4 bits of its own. 32 of them share the 16 bits of a scale.",
        wrong=((0.5, "That is the scale's share. The weight's own 4 bits come on top."),
               (20, "The 16 bits are shared by 32 weights."),
               (4.25, "That is the price of groups of 64.")),
        rtol=0.001, move="Choose group in the figure, with a group size of 32, and read bits per weight."),
    "integers or floats": Question(
        "One scale for the whole matrix. Less error has", (
            Option("INT4, and INT8", lambda lead: lead[0] > 0.5 and lead[1] > 0.5,
                   "Most weights lie near 0, in the shape of a bell. With 15 levels up to the largest weight, how "
                   "many are left for them?"),
            Option("FP4, and FP8", lambda lead: lead[0] < -0.5 and lead[1] < -0.5,
                   "FP8 E4M3 has 3 mantissa bits wherever a value lies: its error is a share of the value. How fine "
                   "are 255 even levels?"),
            Option("INT4, but FP8", lambda lead: lead[0] > 0.5 and lead[1] < -0.5,
                   "Which of the two needs its levels near 0 more: one that has 15 of them, or one that has 255?"),
            Option("FP4, but INT8", lambda lead: lead[0] < -0.5 and lead[1] > 0.5),
        )),
    "who wins on what": Question(
        "With 4 bits, where less than half a dB apart is nobody, the winner is", (
            Option("FP4 on both", lambda lead: max(lead) < -0.5,
                   "Values spread evenly have no crowd near 0. Where are the levels of FP4, and where are the values?"),
            Option("integers on both", lambda lead: min(lead) > 0.5,
                   "In groups of 32 the largest of 32 weights sets the scale. The lead of FP4 is smaller then; is it "
                   "turned around?"),
            Option("integers on even values, nobody on groups", lambda lead: lead[0] > 0.5 and abs(lead[1]) <= 0.5),
            Option("integers on even values, FP4 on groups", lambda lead: lead[0] > 0.5 and lead[1] < -0.5,
                   "Read the row of the groups: by how much does FP4 lead there?"),
        )),
    "from layer to layer": Question(
        "At 8 bits, from the first layer to the ninth, the ratio", (
            Option("stays within 3 dB", lambda fall: abs(fall) < 3, "Every layer adds an error of its own."),
            Option("falls by 3 to 12 dB", lambda fall: 3 <= fall <= 12),
            Option("falls by more than 12 dB", lambda fall: fall > 12,
                   "Nine errors of about the same size add up to nine times the squared error. How many dB is that?"),
        )),
    "one early error": Question(
        "From where the error is made to the ninth layer, the ratio", (
            Option("falls", lambda rise: max(rise) < 0, "Compare the two columns of numbers: there, and in layer 9."),
            Option("stays within 1 dB", lambda rise: -1 <= min(rise) and max(rise) <= 1,
                   "Compare the two columns of numbers: there, and in layer 9."),
            Option("rises", lambda rise: min(rise) > 1),
        )),
}
_SEVEN = np.array([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])

_HALF_UP = ("A half goes up here: 0.5 → 1, 2.5 → 3. Quantizers round half to even, as np.rint does: 0.5 → 0, "
            "1.5 → 2, 2.5 → 2.")
_HALF_AWAY = ("A half goes away from 0 here, as at school: 0.5 → 1, −0.5 → −1. Quantizers round half to even, as "
              "np.rint does: 0.5 → 0, 1.5 → 2, 2.5 → 2.")

_NO_POWER = "2^b in the text is written 2**b in Python. There, 2 ^ 7 compares bits (XOR) and gives 5, and 2**7 is 128."


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
        (lambda x, bits: (np.abs(x).max() / (2 ^ bits - 2 or np.nan), ...), _NO_POWER),
        (lambda x, bits: (np.abs(x).max() / 127, ...), "127 belongs to 8 bits. For b bits it is 2^(b−1) − 1."),
        (lambda x, bits: (scale(x, bits), np.rint(x * scale(x, bits))),
         "The scale is right. To get q, divide x by it; multiplying is the way back."),
        (lambda x, bits: (scale(x, bits), scale(x, bits) * np.rint(x / scale(x, bits))),
         "The scale is right. But this is x̂ = s · q, the way back; asked are the integers q themselves."),
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
    steps = by_part("Look at s first: what is the largest |x|, and which code shall it get?",
                    "s is right. Look at q: divide, then round to the nearest integer.")
    hint = "s = max|x| / (2**(bits − 1) − 1), and q = np.rint(x / s)."
    return check(function, cases, misconceptions, praise, ladder=(steps, hint))


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
        (lambda x, bits: (width(x) / (2 ^ bits - 1), ...), _NO_POWER),
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
    steps = by_part("Look at s first: which range [α, β] do you take, and how many steps has it?",
                    "s is right. Look at z: which code stands for α, and how many steps further is 0?")
    hint = ("α = min(x.min(), 0), β = max(x.max(), 0); s = (β − α) / (2**bits − 1), and z = −2**(bits − 1) − np.rint(α "
            "/ s), with the power in brackets.")
    return check(function, cases, misconceptions, praise, ladder=(steps, hint))


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
        (lambda x, s, z, qmin, qmax: s * (right(x, s, z, qmin, qmax) - z),
         "This is x̂ = s (q − z), the way back. Asked are the codes q themselves."),
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
    return check(function, cases, misconceptions, "Right, on the tiny case and on 73,728 real activations.",
                 ladder=(_wrong_code, "Three steps, in this order: np.rint(x / s), + z, and np.clip to qmin and qmax."))


def _wrong_code(answer, case):
    """Which of the three steps to a code to look at."""
    answer, expected, (_, _, z, qmin, qmax) = numbers(answer), case.expected, case.arguments
    if answer is None or answer.shape != expected.shape:
        return "Look at what you return: one code for each value of x."
    if not ((qmin <= answer) & (answer <= qmax)).all():
        return f"Look at the last step: no code may lie outside {qmin} to {qmax}."
    inside, off = (qmin < expected) & (expected < qmax), answer - expected
    if not off[inside].any():
        return "Look at the last step, the clip: only codes at the ends of the range are wrong."
    if np.ptp(off[inside]) == 0:
        return f"Look at z: all codes inside the range are off by {off[inside][0]:g}, and z is {z}."
    return "Look at the first step: x / s, rounded to the nearest integer, before z is added."
