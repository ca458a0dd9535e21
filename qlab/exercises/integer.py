"""Checks of lesson 04: a real factor in integers."""

import math

from qlab.exercises.checking import Case, check, recorded
from qlab.exercises.predicting import Option, Question

PREDICTIONS = {
    "codes in integers": Question(
        "Of the codes that enter layers, differ", (
            Option("none", lambda share: share == 0),
            Option("about one in a hundred", lambda share: 0.002 < share < 0.05,
                   "M is held with 31 bits. How near to a half must a sum come before that decides how it is rounded?"),
            Option("more than one in ten", lambda share: share > 0.1,
                   "Both compute with the same codes, and the int32 sums are exact. What is left to differ?"),
        )),
}


@recorded
def check_multiplier(function):
    """Check ``function(m)``, the integers (m0, n) that stand for a positive factor: m ≈ 2^(−n) · m0 / 2^31.

    m0 is in [2^30, 2^31) and rounded to the nearest integer; no m that is asked makes a tie.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", equation 6.

    Examples
    --------
    >>> import math
    >>> def multiplier(m):
    ...     fraction, exponent = math.frexp(m)  # m = fraction · 2^exponent, with the fraction in [½, 1)
    ...     m0 = round(fraction * 2**31)
    ...     return (m0, -exponent) if m0 < 2**31 else (m0 // 2, -exponent - 1)
    >>> check_multiplier(multiplier)
    ✓ Right: powers of two, small factors, one just below 1, and two above.
    """

    def right(m):
        m0, shift = rounded(m)
        return (m0, shift) if m0 < 2**31 else (2**30, shift - 1)

    def rounded(m, power=31):
        fraction, exponent = math.frexp(m)
        return round(fraction * 2**power), -exponent

    sixteen = ("m0 has 16 bits here. The accumulator has 32 bits, and so has its factor: multiply the fraction by "
               "2^31, which leaves a relative error of 2^−31 at most.")
    misconceptions = [
        (rounded,
         "m is so close to 1 that m0 was rounded up to 2^31, which does not fit int32. Take 2^30 then, and an n that "
         "is less by 1."),
        (lambda m: right(m)[::-1], "Both are right, in the other order: return m0 first, then n."),
        (lambda m: (math.frexp(m)[0], ...),
         "This is the fraction, in [½, 1). The hardware multiplies integers: m0 is the fraction · 2^31, rounded."),
        (lambda m: (math.frexp(m)[0] * 2**31, ...), "m0 is an integer: round the fraction · 2^31."),
        (lambda m: (round(m * 2**31), 0),
         "This is m · 2^31, with n = 0. A small m leaves the upper bits of m0 empty, and so loses as many below; an m "
         "of 1 or more does not fit. Double m, or halve it, until it is in [½, 1). n counts the doublings, and each "
         "halving as −1."),
        (lambda m: (right(m)[0], -right(m)[1]),
         "n has the other sign. It counts places to the right, so it is positive for a small m: 2^(−n)."),
        (lambda m: (right(m)[0], 31 + right(m)[1]),
         "This n is the whole shift, with the 31 of 2^31 in it: m0 · 2^−n. That is a convention, too; here n is what "
         "remains after the division by 2^31, so subtract 31."),
        (lambda m: (rounded(m, 15)[0], ...), sixteen),
        (lambda m: (rounded(m, 16)[0], ...), sixteen),
        (lambda m: (rounded(m, 32)[0], ...),
         "m0 is 2^31 or more here, and does not fit int32, whose largest number is 2^31 − 1. The fraction m0 / 2^31 "
         "lies in [½, 1): 0.25 is 0.5 · 2^−1, not 1 · 2^−2."),
        (lambda m: (min(rounded(m)[0], 2**31 - 1), rounded(m)[1]),
         "m0 is held at 2^31 − 1 where it was rounded up to 2^31. Nearer is 2^30, with an n that is less by 1."),
        (lambda m: (int(math.frexp(m)[0] * 2**31), rounded(m)[1]),
         "The fraction of m0 is cut off here (int() does that). Round to the nearest integer: half the error."),
    ]
    cases = [Case(f"m = {m}", (m,), right(m)) for m in (0.25, 0.3, 0.0072474273418460, 0.75, 1.7, 2.0**5)]
    cases.append(Case("m = 1 − 2^−33", (1 - 2.0**-33,), right(1 - 2.0**-33)))
    praise = "Right: powers of two, small factors, one just below 1, and two above."
    return check(function, cases, misconceptions, praise, rtol=1e-12)
