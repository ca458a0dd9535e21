"""Checks of lesson 09: block formats."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, by_part, check, numbers, recorded
from qlab.exercises.predicting import Number, Option, Question
from qlab.floats import FP4_E2M1, FP8_E4M3, decode, encode

_BELOW_1024 = np.nextafter(np.float32(1024), np.float32(0))

PREDICTIONS = {
    "bytes of a block": Number(
        "Bytes of 32 values in MXFP4",
        "Count 32 codes of 4 bits, and the one scale that they share.",
        wrong=((16, "That is the codes alone. Where is the scale?"),
               (20, "With a scale in float32. That of MX has no sign and no mantissa: which bits are left?"),
               (18, "With a scale in FP16, as in Q4_0. That of MX has no sign and no mantissa: which bits are left?"),
               (32, "Two codes of 4 bits share a byte.")), rtol=0),
    "the largest of a block": Question(
        "The value of 7.56 steps becomes", (
            Option("6", lambda level: level == 6),
            Option("8", lambda level: level == 8,
                   "8 would be the next number, were the exponent one longer. Is it in the list of levels?"),
            Option("infinity", np.isinf, "Which code of FP4 stands for infinity? Lesson 01 counted its numbers."),
        )),
    "rule for the scale": Question(
        "Over the whole matrix, the most dB come from", (
            Option("floor", lambda db: max(db, key=db.get) == "floor",
                   "It cuts off all that lies between 6 and 8 steps, in those blocks whose largest value is there."),
            Option("ceil", lambda db: max(db, key=db.get) == "ceil",
                   "Nothing is cut off. But how long are the steps of a block whose largest value is just above a "
                   "power of two?"),
            Option("even", lambda db: max(db, key=db.get) == "even"),
        )),
    "8 bits against 6": Question(
        "With two bits more, MXFP8 E4M3 has", (
            Option("about 12 dB more", lambda gain: 9 < gain < 15,
                   "6 dB a bit hold for steps of equal length. Which of the fields got the two bits, and which of them "
                   "sets the step?"),
            Option("about the same", lambda gain: -2 < gain < 2),
            Option("about 12 dB less", lambda gain: -15 < gain < -9,
                   "More bits cannot cost that much. Count the mantissa bits of both."),
        )),
    "a thousandth": Question(
        "Of a thousandth of the matrix, without the tensor's scale, there is left", (
            Option("as much as before", lambda lost: lost < 0.1,
                   "The largest magnitude of a block becomes as small as 10⁻⁵, divided by 6. What is the smallest "
                   "number of E4M3?"),
            Option("some dB less", lambda lost: 0.1 <= lost < 12,
                   "How much smaller than the smallest number of E4M3 have the scales become?"),
            Option("nothing", lambda lost: lost >= 12),
        )),
    "most dB at 4.5 bits": Question(
        "At 4.5 bits, the most dB for the weights has", (
            Option("NVFP4", lambda db: max(db, key=db.get) == "NVFP4",
                   "Its blocks are half as long. But look at how many levels lie in the outer half of its range."),
            Option("int4 absmax", lambda db: max(db, key=db.get) == "int4 absmax",
                   "It uses 15 of its 16 codes, and steps of equal length. Who uses the sixteenth?"),
            Option("Q4_0", lambda db: max(db, key=db.get) == "Q4_0"),
        ), move="Take the figure to data weights, format NVFP4."),
    "NVFP4 against int4": Question(
        "As the model is, with weights at 4.5 bits, the KL divergence is less for", (
            Option("Q4_0, as its dB say", lambda ratios: all(low > 1 for low, _ in ratios),
                   "The dB count the error of each weight alike, the output does not. Read the table."),
            Option("NVFP4", lambda ratios: all(high < 1 for _, high in ratios)),
            Option("neither: not resolved", lambda ratios: all(low <= 1 <= high for low, high in ratios),
                   "Does the interval of their ratio hold 1 on any of the three texts?"),
        )),
    "Hadamard before NVFP4": Question(
        "With activations in NVFP4, the rotation makes the KL divergence", (
            Option("smaller, as with rows", lambda ratios: all(high < 1 for _, high in ratios),
                   "What is there to spread in a block of 16, most of which hold no outlier at all?"),
            Option("about the same", lambda ratios: all(0.8 < low and high < 1.25 for low, high in ratios),
                   "So it is for integers in small groups. But which levels of FP4 do the values of a block meet when "
                   "many of them are nearly as large as its largest?"),
            Option("larger", lambda ratios: all(low > 1 for low, _ in ratios)),
        )),
    "FP8 against int8": Question(
        "With one scale for each tensor of activations, the KL divergence of FP8, divided by that of int8, is", (
            Option("about 1", lambda ratios: all(0.8 < ratio < 1.25 for ratio in ratios),
                   "Both have 256 codes and one scale. But where do the small values lie on each grid?"),
            Option("about 1/3", lambda ratios: all(0.2 < ratio < 0.5 for ratio in ratios),
                   "More than that. Halve a value again and again: what happens to its relative error on each grid?"),
            Option("below 1/10", lambda ratios: all(ratio < 0.1 for ratio in ratios)),
        )),
    "a chip of 2022": Question(
        "The tensor cores of Hopper (H100) multiply", (
            Option("FP8, its scales outside of the product",
                   lambda formats: "FP8" in formats and "MXFP8" not in formats),
            Option("MXFP8, too", lambda formats: "MXFP8" in formats and "NVFP4" not in formats,
                   "The MX specification is of 2023. The chip is older."),
            Option("NVFP4, too", lambda formats: "NVFP4" in formats,
                   "What a chip can *store* is any byte. In which row of the table is NVFP4?"),
        )),
}


@recorded
def check_e8m0_byte(function):
    """Check ``function(x)``, the byte of the scale of an MXFP4 block by the specification's rule.

    The values are not all zero.

    References
    ----------
    Open Compute Project, "Microscaling formats (MX) specification" 1.0, section 6.3.

    Examples
    --------
    >>> check_e8m0_byte(lambda x: 127 + np.frexp(np.abs(x).max())[1] - 1 - 2)
    ✓ Right, on the tiny case, just below a power of two, and on blocks of real weights.
    """

    def power(x):
        return int(np.frexp(np.abs(x).max())[1]) - 1

    misconceptions = [
        (lambda x: 127 + int(np.floor(np.log2(np.abs(x).max()))) - 2,
         "In float32 np.log2 rounds up to 10 here. np.frexp(peak)[1] − 1 is exact."),
        (lambda x: 127 + int(np.frexp(x.max())[1]) - 1 - 2,
         "The largest value is not the largest magnitude: take |x| first."),
        (lambda x: 127 + power(x), "The largest element of E2M1 is 6 = 1.5 · 2². Its exponent, 2, is subtracted."),
        (lambda x: 127 + power(x) + 1 - 2,
         "The exponent of max|x| is log₂ rounded down. Rounded up it is the rule “ceil”; and np.frexp, whose "
         "significand is below 1, gives one more, too."),
        (lambda x: 127 + int(np.floor(np.log2(np.abs(x).max() / 6))),
         "Dividing by 6 and then rounding down is another rule: subtract the exponent of 6 from that of max|x|."),
        (lambda x: power(x) - 2, "This is the exponent of the scale. The byte holds it plus the bias, 127."),
        (lambda x: 2.0 ** (power(x) - 2), "This is the scale itself. The byte holds its exponent plus 127."),
    ]
    w = samples.load("weights")
    tiny = np.array([3.0, -21.0, 7.0, 0.9])
    cases = [Case(f"x = {tiny.tolist()}", (tiny,), 129),
             Case("x = [1023.99994, 1], the largest float32 below 1024", (np.float32([_BELOW_1024, 1]),), 134),
             *(Case(f"32 real weights from {i} on", (w[0, i:i + 32],), 125 + power(w[0, i:i + 32]))
               for i in (0, 32, 64))]
    ladder = ("Look at the power of two of the largest |x| first: 21 lies between 16 and 32, so it is 4.",
              "np.frexp(np.abs(x).max())[1] - 1 is that power. Subtract 2, the power of the largest element, and add "
              "the bias, 127.")
    return check(function, cases, misconceptions,
                 "Right, on the tiny case, just below a power of two, and on blocks of real weights.", ladder=ladder)


@recorded
def check_mxfp4_bytes(function):
    """Check ``function(x)``, the 17 bytes of 32 values in MXFP4 as a GGUF file has them, as an array of numbers.

    The scale by the specification's rule; a tie goes to the even code, a negative value keeps its sign where it becomes
    0, and the scale's byte of a block of zeros is 0.

    References
    ----------
    Open Compute Project, "Microscaling formats (MX) specification" 1.0, sections 5 and 6.3; ggml, ``block_mxfp4``.

    Examples
    --------
    >>> from qlab.blocks import MXFP4, pack, quantize
    >>> check_mxfp4_bytes(lambda x: pack(quantize(x, MXFP4)))
    ✓ Right: ties, a tiny negative, a tip, zeros, just below a power of two, and real weights.
    """

    def scale_byte(x, of_zeros=0):
        peak = np.abs(x).max()
        return 124 + int(np.frexp(peak)[1]) if peak > 0 else of_zeros

    def by_log2(x):
        with np.errstate(divide="ignore"):
            exponent = np.log2(np.abs(x).max())
        return 125 + int(np.floor(exponent)) if np.isfinite(exponent) else 0

    def codes(x, byte):
        return encode(x / np.float32(2.0 ** (byte - 127)), FP4_E2M1, saturate=True)

    def ties_down(x, byte):
        steps = x / np.float32(2.0 ** (byte - 127))
        levels = decode(np.arange(8, dtype=np.uint8), FP4_E2M1)
        return np.abs(np.abs(steps)[:, None] - levels).argmin(axis=1) + 8 * (steps < 0)

    def without_sign_of_zero(x, byte):
        found = codes(x, byte)
        return np.where(found == 8, 0, found)

    def halves(found):
        return found[:16] + 16 * found[16:]

    def written(x, byte=scale_byte, elements=codes, together=halves):
        return np.r_[byte(x), together(elements(x, byte(x)))]

    def block(*pairs):
        x = np.zeros(32, np.float32)
        for i, value in pairs:
            x[i] = value
        return x

    misconceptions = [
        (lambda x: written(x)[1:], "These are the codes. The byte of the scale comes before them."),
        (lambda x: np.roll(written(x), -1), "The byte of the scale comes first."),
        (lambda x: np.r_[scale_byte(x), codes(x, scale_byte(x))],
         "Each code has a byte of its own here: two of them share one."),
        (lambda x: written(x, together=lambda found: found[::2] + 16 * found[1::2]),
         "Value i shares its byte with value i + 16, not with its neighbour."),
        (lambda x: written(x, together=lambda found: 16 * found[:16] + found[16:]),
         "The low half of a byte is of the first 16 values, the high half of the last 16."),
        (lambda x: written(x, elements=ties_down), "Half-way between two levels, the even code is taken: 2.5 steps go "
                                                   "to code 4, not to 3."),
        (lambda x: written(x, elements=without_sign_of_zero),
         "A negative value keeps its sign where it becomes 0: −0 has code 8."),
        (lambda x: written(x, byte=by_log2), "In float32 np.log2 rounds up just below a power of two. "
                                             "np.frexp(peak)[1] − 1 is exact."),
        (lambda x: written(x, byte=lambda x: scale_byte(x, of_zeros=124)),
         "np.frexp(0) has exponent 0, which is that of no number here: for a block of zeros the byte is 0."),
    ]
    tie, tip = block((0, 6), (1, 2.5), (16, 1.75), (17, -0.75)), block((3, -7.5), (30, 1))
    below, weights = block((0, _BELOW_1024), (1, -100), (20, 384)), samples.load("weights")[0, 32:64]
    cases = [Case(told, (x,), written(x)) for told, x in (
        ("x[0], x[1], x[16], x[17] = 6, −3, 1.5, 0.5 and zeros", block((0, 6), (1, -3), (16, 1.5), (17, 0.5))),
        ("x[0], x[1], x[16], x[17] = 6, 2.5, 1.75, −0.75 and zeros", tie),
        ("x[0], x[1] = 6, −0.1 and zeros", block((0, 6), (1, -0.1))),
        ("x[3], x[30] = −7.5, 1 and zeros", tip),
        ("x[0], x[1], x[20] = 1023.99994, −100, 384 and zeros", below),
        ("32 zeros", block()), ("32 real weights", weights))]

    def steps(answer, case):
        found = numbers(answer)
        if found is None or found.shape != (17,):
            return "Look at how many bytes there are: 32 codes of half a byte, and one scale."
        if found[0] != case.expected[0]:
            return "Look at the first byte: it is the scale's exponent plus 127."
        return "The scale is right. Look at the codes: in units of the scale, the nearest level, and 8 for a minus."

    hint = ("peak = np.abs(x).max(), byte = np.frexp(peak)[1] - 1 - 2 + 127 (0 for zeros), codes = "
            "encode(x / 2.0 ** (byte - 127), FP4_E2M1, saturate=True); then byte, and codes[:16] + 16 * codes[16:].")
    return check(function, cases, misconceptions,
                 "Right: ties, a tiny negative, a tip, zeros, just below a power of two, and real weights.",
                 ladder=(steps, hint))


@recorded
def check_nvfp4_block(function):
    """Check ``function(x, tensor_scale)``: the block's scale as E4M3 has it, and the values that come back.

    References
    ----------
    NVIDIA, "Pretraining large language models with NVFP4" 2025, appendix on quantization.

    Examples
    --------
    >>> def block(x, tensor_scale):
    ...     scale = decode(encode(np.abs(x).max() / 6 / tensor_scale, FP8_E4M3), FP8_E4M3)
    ...     s = scale * tensor_scale
    ...     return scale, decode(encode(x / s, FP4_E2M1, saturate=True), FP4_E2M1) * s
    >>> check_nvfp4_block(block)
    ✓ Right, on the tiny case and on a block of real activations.
    """

    def e4m3(scale):
        return decode(encode(scale, FP8_E4M3), FP8_E4M3)

    def e2m1(x):
        return decode(encode(x, FP4_E2M1, saturate=True), FP4_E2M1)

    def build(most=6, stored=e4m3, step=lambda x, scale, tensor_scale: scale * tensor_scale):
        def function(x, tensor_scale):
            scale = stored(np.abs(x).max() / most / tensor_scale)
            s = step(x, scale, tensor_scale)
            return scale, e2m1(x / s) * s
        return function

    def elements(x, tensor_scale):
        scale, x_hat = right(x, tensor_scale)
        return scale, x_hat / (scale * tensor_scale)

    right = build()
    misconceptions = [
        (build(stored=lambda scale: scale),
         "The block's scale is stored in E4M3: round it, with decode(encode(…, FP8_E4M3), FP8_E4M3)."),
        (lambda x, tensor_scale: right(x, 1.0),
         "The tensor's scale is missing: divide the block's scale by it before it is stored."),
        (build(most=448),
         "448 is the largest scale; the tensor's scale has taken care of it. The largest element is 6."),
        (elements, "These are the elements. Multiply them by both scales."),
        (build(step=lambda x, scale, tensor_scale: np.abs(x).max() / 6),
         "Find the elements with the scale that is stored: nobody has the exact one later."),
    ]
    tiny = np.array([0.9, -6.1, 2.0, 0.3])
    x = samples.load("activations").astype(np.float64)
    real, tensor_scale = x[0, :16], float(np.abs(x).max() / (6 * 448))
    cases = [Case(f"x = {tiny.tolist()}, tensor_scale = 0.01", (tiny, 0.01), right(tiny, 0.01)),
             Case("16 real activations", (real, tensor_scale), right(real, tensor_scale))]
    steps = by_part("Look at the block's scale first: max|x| shall become 6, and the tensor's scale is another factor.",
                    "The scale is right. Look at the values: divide by both scales, round to E2M1, multiply again.")
    hint = ("scale = decode(encode(np.abs(x).max() / 6 / tensor_scale, FP8_E4M3), FP8_E4M3). With s = scale * "
            "tensor_scale, the values are decode(encode(x / s, FP4_E2M1, saturate=True), FP4_E2M1) * s.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on a block of real activations.",
                 ladder=(steps, hint))
