"""Checks of lesson 01: the bits of a floating-point number."""

import struct

import numpy as np

from qlab.exercises.checking import Case, by_part, check, numbers, recorded
from qlab.exercises.predicting import Number, Option, Question

PREDICTIONS = {
    "exponent bit": Question(
        "1. The rightmost exponent bit goes from 1 to 0. The value", (
            Option("loses 1", lambda value: value == -117.625,
                   "The field holds the power of two. What does one less in the power do to the product above the "
                   "figure?"),
            Option("loses 127", lambda value: value == 8.375,
                   "127 is what was added to the exponent before it was stored. Which bit of the field is this, and "
                   "what is it worth?"),
            Option("halves", lambda value: value == -59.3125),
        ), move="Press “−118.625” in the figure, and click the rightmost exponent bit."),
    "first mantissa bit": Question(
        "2. The leftmost mantissa bit goes from 1 to 0. The value changes by", (
            Option("0.5", lambda change: change == 0.5,
                   "The bit is worth ½ in 1.m. But 1.m is multiplied by a power of two: which?"),
            Option("32", lambda change: change == 32),
            Option("64", lambda change: change == 64,
                   "2⁶ is what the leading 1 is worth, which is not stored. This is the first bit after the point."),
        ), move="Press “−118.625” in the figure, and click the leftmost mantissa bit."),
    "last mantissa bit": Question(
        "3. The rightmost mantissa bit changes −121,472 by", (
            Option("as much", lambda ratio: ratio == 1,
                   "The bit is worth 2⁻²³ in 1.m, as before. But 1.m is multiplied by a power of two: which, now?"),
            Option("ten times as much", lambda ratio: ratio == 10,
                   "The power has grown by 10: from 2⁶ to 2¹⁶. How many times as large is that?"),
            Option("1,024 times as much", lambda ratio: ratio == 1024),
        ), move="Type −121472 into value, and read spacing under the figure."),
    "16,777,216 + 1": Question(
        "16,777,216 + 1 in FP32 is", (
            Option("16,777,217", lambda total: float(total) == 16_777_217,
                   "16,777,216 is 2²⁴. With 23 bits after the leading 1, how far is it to the next number?"),
            Option("16,777,216", lambda total: float(total) == 16_777_216),
            Option("infinity", lambda total: total == float("inf"),
                   "Infinity is what lies beyond the largest number, about 3.4 × 10³⁸. This is far below."),
        )),
    "sum in FP16": Question(
        "Ten thousand times 0.1 in FP16 is", (
            Option("a little off", lambda total: 900 < total < 1100,
                   "The errors do not cancel. How far apart are numbers of FP16 at 500? And what becomes of + 0.1 "
                   "there?"),
            Option("about half", lambda total: 400 < total < 600,
                   "The sum stops where 0.1 is less than half the spacing. Where is that, with 10 mantissa bits?"),
            Option("not even 300", lambda total: total < 300),
        )),
    "FP16 or BF16": Question(
        "Stored better is", (
            Option("both in FP16", lambda names: names == ("FP16", "FP16"),
                   "How large is the largest number of FP16, with 5 exponent bits?"),
            Option("both in BF16", lambda names: names == ("BF16", "BF16"),
                   "1.01 needs no range. Which of the two has more mantissa bits?"),
            Option("70,000 in FP16, 1.01 in BF16", lambda names: names == ("FP16", "BF16"),
                   "It is the other way round: exponent bits give range, mantissa bits precision."),
            Option("70,000 in BF16, 1.01 in FP16", lambda names: names == ("BF16", "FP16")),
        )),
    "numbers of FP4": Number(
        "How many different numbers does FP4 have?",
        "Four bits make 2⁴ codes. Does each of them stand for a number of its own?",
        wrong=((16, "There are 16 codes. Two of them stand for the same number: which?"),
               (8, "That is one side of the line. The sign bit doubles it, but for one number.")), rtol=0),
    "two FP8 formats": Question(
        "The better FP8 format for these weights is", (
            Option("E5M2", lambda name: name == "FP8 E5M2",
                   "E5M2 has the larger range, E4M3 one more mantissa bit. After scaling, do the weights need the "
                   "range?"),
            Option("E4M3", lambda name: name == "FP8 E4M3"),
        )),
    "24 GB": Question(
        "On 24 GB", (
            Option("7 billion fit in FP32, 70 billion in FP8", lambda bits: bits == ([32, 16, 8, 4], [8, 4]),
                   "A weight of 32 bits is 4 bytes, so that 7 billion of them are 28 GB."),
            Option("7 billion fit from BF16 down, 70 billion in FP4", lambda bits: bits == ([16, 8, 4], [4]),
                   "A weight of 4 bits is half a byte. How many GB are 70 billion of those?"),
            Option("7 billion fit from BF16 down, 70 billion in none", lambda bits: bits == ([16, 8, 4], [])),
            Option("7 billion fit in FP8 and FP4, 70 billion in none", lambda bits: bits == ([8, 4], []),
                   "A weight of 16 bits is 2 bytes. How many GB are 7 billion of those?"),
        )),
}


@recorded
def check_decode(function):
    """Check ``function(sign, exponent, mantissa)``, the value of an FP32 word from its three fields.

    The fields are unsigned integers. Exponent 255 (infinity and NaN) is not asked, and 0 will do for −0. Values are
    compared to a relative 1e-8.

    References
    ----------
    IEEE 754-2019, section 3.4.

    Examples
    --------
    >>> def decode(sign, exponent, mantissa):
    ...     leading = 1 if exponent > 0 else 0
    ...     return (-1) ** sign * (leading + mantissa / 2**23) * 2.0 ** (max(exponent, 1) - 127)
    >>> check_decode(decode)
    ✓ Right: normal and subnormal numbers, both zeros, and the largest number.
    """

    def right(s, e, m):
        return struct.unpack(">f", struct.pack(">I", s << 31 | e << 23 | m))[0]

    whole = ("The mantissa bits stand after the point, worth 1/2, 1/4, 1/8 and so on: divide mantissa by 2**23, and "
             "add the leading 1, which is not stored.")
    misconceptions = [
        (lambda s, e, m: (-1) ** s * (1 + m / 2**23) * 2.0 ** (e - 127),
         "Exponent 0 is special: the leading digit is 0 there, not 1, and the power is 2**−126. These are the "
         "subnormal numbers, and zero is one of them."),
        (lambda s, e, m: (-1) ** s * ((e > 0) + m / 2**23) * 2.0 ** (e - 127),
         "No leading 1 at exponent 0: right. The power is 2**−126 there, as at exponent 1, so that the subnormal "
         "numbers reach up to the normal ones without a gap."),
        (lambda s, e, m: (-1) ** s * (1 + m / 2**23) * 2.0 ** (max(e, 1) - 127),
         "The power 2**−126 is right. But at exponent 0 the leading digit is 0: otherwise zero could not be written."),
        (lambda s, e, m: right(s, e, m) if e else 0.0,
         "Exponent 0 is the number 0 only if all mantissa bits are 0. Otherwise it is a subnormal number, mantissa / "
         "2**23 · 2**−126."),
        (lambda s, e, m: right(s, e, m) if e else (-1) ** s * (1 + m / 2**23),
         "Right from exponent 1 on. At exponent 0 the leading digit is 0, not 1, and the product has a power, too: "
         "2**−126."),
        (lambda s, e, m: (-1) ** s * (m / 2**23) * 2.0 ** (e - 127),
         "The leading 1 is missing. It is not stored, but it counts: the number is 1.m, so add 1 to mantissa / 2**23."),
        (lambda s, e, m: (-1) ** s * (1 + m / 2**23) * 2.0**e,
         "The exponent is stored with a bias of 127: 133 means 2**(133 − 127)."),
        (lambda s, e, m: (-1) ** s * (1 + m / 2**23) * 2.0 ** (e - 256 * (e > 127)),
         "The exponent is not two's complement, in which 133 would be −123. It is unsigned with a bias: 133 − 127 = "
         "6."),
        (lambda s, e, m: (-1) ** s * (1 + m / 2**23) * 2.0 ** (e - 128),
         "The bias is 127, not 128: the exponent of 1.0 is stored as 127."),
        (lambda s, e, m: (-1) ** s * (1 + m) * 2.0 ** (e - 127), whole),
        (lambda s, e, m: (-1) ** s * m * 2.0 ** (e - 127), whole),
        (lambda s, e, m: (-1) ** s * float(f"1.{m}") * 2.0 ** (e - 127),
         "The digits after the point of 1.m are binary ones, not decimal: add mantissa / 2**23 to 1."),
        (lambda s, e, m: (-1) ** s * (1 + m / (2**23 - 1)) * 2.0 ** (e - 127),
         "Divide by 2**23, not by the largest mantissa, 2**23 − 1: 23 ones after the point stay just below 1."),
        (lambda s, e, m: -abs(right(s, e, m)),
         "Always negative: in −1**s the power binds first, so this is −(1**s). Write (−1)**s."),
        (lambda s, e, m: abs(right(s, e, m)),
         "The magnitude is right. Sign 1 means minus: multiply by (−1)**sign."),
    ]
    fields = [(1, 133, 7159808), (0, 127, 0), (0, 0, 0), (1, 0, 0), (1, 0, 2**22 + 1), (0, 0, 1), (0, 254, 2**23 - 1)]
    cases = [Case(f"sign = {s}, exponent = {e}, mantissa = {m} (the word 0x{s << 31 | e << 23 | m:08X})", (s, e, m),
                  right(s, e, m)) for s, e, m in fields]
    praise = "Right: normal and subnormal numbers, both zeros, and the largest number."
    ladder = _wrong_factor, ("From exponent 1 on: (−1)**sign · 2.0**(exponent − 127) · (1 + mantissa / 2**23). At "
                             "exponent 0: (−1)**sign · 2.0**−126 · mantissa / 2**23.")
    return check(function, cases, misconceptions, praise, rtol=1e-8, ladder=ladder)


def _wrong_factor(answer, case):
    """Which of the three factors of a value to look at."""
    answer, expected, exponent = numbers(answer), case.expected, case.arguments[1]
    if answer is None or answer.ndim or not np.isfinite(answer):
        return "Look at what you return: one number, the product of sign, power and 1.m."
    if exponent == 0:
        return "Look at exponent 0 by itself: another power and another leading digit than elsewhere."
    if answer * expected < 0:
        return "Look at the sign: (−1)**sign."
    power = np.log2(abs(answer / expected)) if answer else 0.5
    if abs(power - round(power)) < 1e-6 and round(power):
        return f"Look at the power of two: yours is 2**{round(power)} times the right one."
    return "Look at 1.m: what the mantissa bits are worth, and the digit before the point."


@recorded
def check_encode(function):
    """Check ``function(x)``, the fields (sign, exponent, mantissa) of the FP32 word of x, as unsigned integers.

    Every x that is asked is a normal number and exact in FP32, so nothing has to be rounded.

    References
    ----------
    IEEE 754-2019, section 3.4.

    Examples
    --------
    >>> def encode(x):
    ...     exponent = int(np.floor(np.log2(abs(x))))
    ...     return int(x < 0), exponent + 127, int((abs(x) / 2.0**exponent - 1) * 2**23)
    >>> check_encode(encode)
    ✓ Right, for −118.625 and six more numbers.
    """

    def right(x):
        word = struct.unpack(">I", struct.pack(">f", x))[0]
        return word >> 31, word >> 23 & 0xFF, word & 0x7FFFFF

    def exponent(change):
        return lambda x: (..., change(right(x)[1]), ...)

    def mantissa(change):
        return lambda x: (..., ..., change(right(x)[2]))

    def whole_part(below_1):
        return lambda x: (..., right(x)[1] if abs(x) >= 1 else below_1, ...)

    texts = "The bits are right. Return them as integers: int(text, 2) reads a text of bits."
    misconceptions = [
        (lambda x: tuple(f"{field:0{width}b}" for field, width in zip(right(x), (1, 8, 23), strict=True)), texts),
        (lambda x: (..., f"{right(x)[1]:08b}", ...), texts),
        (lambda x: (..., ..., f"{right(x)[2]:023b}"), texts),
        (lambda x: "".join(f"{field:0{width}b}" for field, width in zip(right(x), (1, 8, 23), strict=True)),
         "This is the whole word, as a text. Return its three fields, as integers: int(text, 2) reads a text of bits."),
        (lambda x: (int(x > 0), ..., ...), "The sign bit is 1 for a negative number and 0 for a positive one."),
        (lambda x: (-1 if x < 0 else 1, ..., ...),
         "The sign field is one bit: 1 for a negative number and 0 for a positive one, not −1 and +1."),
        (exponent(lambda e: e - 127),
         "This is the exponent itself. What is stored is that plus the bias of 127, so that it is never negative."),
        (lambda x: (..., int(np.log2(abs(x))) + 127, ...),
         "int() cuts off towards 0, which is one too high for a negative logarithm. np.floor always goes down."),
        (whole_part(127),
         "Below 1, |x| has no digits before the point to count. Move the point right, up to behind the first 1: "
         "0.15625 = 1.25 · 2**−3, so the power is −3."),
        (whole_part(126),
         "Below 1, the place of the first 1 says the power: 0.15625 is 0.00101 in binary, = 1.01 · 2**−3. There are no "
         "digits before the point to count."),
        (exponent(lambda e: e + 1),
         "The exponent is one too large. The bias is 127, not 128, and before it is added the exponent is that of "
         "1.m, the floor of log2|x|. (math.frexp writes 0.1m, and its exponent is one more.)"),
        (exponent(lambda e: e - 1), "The exponent is one too small: the bias is 127, not 126."),
        (mantissa(lambda m: (2**23 + m) >> 1),
         "This stores the leading 1 as well: 1110110101…, which is what the notes write. Decoding adds that 1 again, "
         "and −118.625 comes back as −123.3125. Drop it, and store the 23 bits after it."),
        (mantissa(lambda m: 2**23 + m),
         "This has 24 bits: the leading 1 and the 23 after it. Only those 23 are stored, so drop the leading 1."),
        (mantissa(lambda m: m // (m & -m or 1)),
         "The bits are right, their place is not. They start at the left end of the 23 bits: fill up with zeros on "
         "the right."),
        (lambda x: (..., ..., int((x / 2.0 ** (right(x)[1] - 127) - 1) * 2**23)),
         "The mantissa is made from x with its sign here. The sign has a bit of its own: take |x| for the rest."),
        (mantissa(lambda m: m / 2**23),
         "This is the fraction, m in 1.m. The field is that fraction as an integer: multiply by 2**23."),
        (mantissa(lambda m: 1 + m / 2**23),
         "This is 1.m. Drop the leading 1, and multiply the rest by 2**23 to make it an integer."),
    ]
    singles = np.float32([-118.625, 1.0, 0.15625, 6.5, -1.75 * 2.0**-15, np.pi, 6.02214076e23]).tolist()
    cases = [Case(f"x = {x}", (x,), right(x)) for x in singles]
    steps = by_part("Look at the sign (step 1): 1 for a negative number, 0 for a positive one.",
                    "The sign is right. Look at the exponent (steps 3 and 5): how far the point moves, plus 127.",
                    "Sign and exponent are right. Look at the mantissa (step 4): the 23 digits after the leading 1.")
    hint = ("np.frexp(abs(x)) gives a fraction from ½ to 1 and a power. Twice the fraction is 1.m, and its power is "
            "one less; the fields are that power + 127, and 0.m · 2**23.")
    return check(function, cases, misconceptions, "Right, for −118.625 and six more numbers.", ladder=(steps, hint))


@recorded
def check_spacing(function):
    """Check ``function(x, mantissa_bits)``, the distance from |x| to the next larger number of a binary format.

    ``mantissa_bits`` counts the stored bits, without the leading 1. |x| is 1 or more; if it lies between two numbers
    of the format, their distance is asked.

    References
    ----------
    Goldberg 1991, "What every computer scientist should know about floating-point arithmetic", section 1.2.

    Examples
    --------
    >>> check_spacing(lambda x, mantissa_bits: 2.0 ** (np.frexp(abs(x))[1] - 1 - mantissa_bits))
    ✓ Right, for four formats, also just below a power of two.
    """

    def exponent(x):
        return np.frexp(abs(x))[1] - 1

    misconceptions = [
        (lambda x, m: 2.0 ** (np.floor(np.log2(abs(x))) - m),
         "The formula is right, but np.log2 rounds: just below 8 it gives 3, and so does the floor of that. np.frexp "
         "does not round; its power is one more than the exponent."),
        (lambda x, m: 2.0**-m,
         "This is the spacing at 1, the machine epsilon. From there it doubles with each power of two: multiply by "
         "2**exponent."),
        (lambda x, m: abs(x) * 2.0**-m,
         "Between two powers of two all numbers have the same spacing, so it does not grow with x itself: put "
         "2**exponent in place of |x|."),
        (lambda x, m: 2.0 ** (np.ceil(np.log2(abs(x))) - 1 - m),
         "At a power of two the spacing changes. This is the distance to the next smaller number; the next larger one "
         "is twice as far."),
        (lambda x, m: 2.0 ** (exponent(x) + 1 - m),
         "Twice too large. The exponent is that of 1.m: the floor of log2|x|, not its ceiling, nor the nearest "
         "integer. (math.frexp gives one more, for it writes 0.1m.)"),
        (lambda x, m: 2.0 ** (exponent(x) - m - 1),
         "Half of it. The leading 1 is not among the mantissa bits, so do not count it in. (Half the spacing is the "
         "largest error of rounding to nearest.)"),
        (lambda x, m: np.copysign(2.0 ** (exponent(x) - m), x), "A distance is positive: take |x|."),
        (lambda x, m: 2.0 ** (exponent(x) - m) if x > 0 else np.nan,
         "The logarithm of a negative number is NaN. The spacing is the same on both sides of 0: take |x|."),
        (lambda x, m: 2.0 ** exponent(x), "mantissa_bits is not used. From this power of two to the next there are "
                                          "2**mantissa_bits numbers, so divide by that."),
        *((lambda x, m, bits=bits: 2.0 ** (exponent(x) - bits),
           f"mantissa_bits has no effect here: this is the spacing with {bits} mantissa bits, those of {name}, for "
           f"every format.") for bits, name in ((10, "FP16"), (23, "FP32"), (52, "Python's own numbers"))),
    ]
    asked = [(1000.0, 10, "FP16"), (3.14159, 7, "BF16"), (1.0, 23, "FP32"), (1024.0, 10, "FP16"),
             (-1000.0, 23, "FP32"), (float(np.nextafter(8, 0)), 52, "FP64")]
    cases = [Case(f"x = {x}, mantissa_bits = {m} ({name})", (x, m), 2.0 ** (exponent(x) - m)) for x, m, name in asked]
    ladder = ("Look at the exponent first: which power of two is at or below |x|? For 1000 it is 512, 2**9.",
              "np.frexp(abs(x))[1] − 1 is the exponent. Subtract mantissa_bits from it; 2 to the power of that is the "
              "spacing.")
    praise = "Right, for four formats, also just below a power of two."
    return check(function, cases, misconceptions, praise, ladder=ladder)
