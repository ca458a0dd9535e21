"""Checks of lesson 09: block formats."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded
from qlab.exercises.predicting import Number, Option, Question
from qlab.floats import FP4_E2M1, FP8_E4M3, decode, encode

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
            Option("a bit less, some dB", lambda lost: 0.1 <= lost < 12,
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
                   "After the rotation, an outlier is in every block. How many blocks knew of it before?"),
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
            Option("FP8 with a scale per tensor", lambda formats: "FP8" in formats and "MXFP8" not in formats),
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
    >>> check_e8m0_byte(lambda x: 127 + int(np.floor(np.log2(np.abs(x).max()))) - 2)
    ✓ Right, on the tiny case and on blocks of real weights.
    """

    def power(x):
        return np.floor(np.log2(np.abs(x).max()))

    misconceptions = [
        (lambda x: 127 + int(np.floor(np.log2(x.max()))) - 2,
         "The largest value is not the largest magnitude: take |x| first."),
        (lambda x: 127 + int(power(x)), "The largest element of E2M1 is 6 = 1.5 · 2². Its exponent, 2, is subtracted."),
        (lambda x: 127 + int(np.ceil(np.log2(np.abs(x).max()))) - 2,
         "The exponent of max|x| is log₂ rounded down. Rounded up it is the rule “ceil”."),
        (lambda x: 127 + int(np.floor(np.log2(np.abs(x).max() / 6))),
         "Dividing by 6 and then rounding down is another rule: subtract the exponent of 6 from that of max|x|."),
        (lambda x: int(power(x)) - 2, "This is the exponent of the scale. The byte holds it plus the bias, 127."),
        (lambda x: 2.0 ** (power(x) - 2), "This is the scale itself. The byte holds its exponent plus 127."),
    ]
    w = samples.load("weights")
    tiny = np.array([3.0, -21.0, 7.0, 0.9])
    cases = [Case(f"x = {tiny.tolist()}", (tiny,), 129),
             *(Case(f"32 real weights from {i} on", (w[0, i:i + 32],), 125 + int(power(w[0, i:i + 32])))
               for i in (0, 32, 64))]
    return check(function, cases, misconceptions, "Right, on the tiny case and on blocks of real weights.")


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

    def right(x, tensor_scale):
        scale = e4m3(np.abs(x).max() / 6 / tensor_scale)
        return scale, e2m1(x / (scale * tensor_scale)) * scale * tensor_scale

    def exact(x, tensor_scale):
        scale = np.abs(x).max() / 6 / tensor_scale
        return scale, e2m1(x / (scale * tensor_scale)) * scale * tensor_scale

    def without_the_tensors(x, tensor_scale):
        scale = e4m3(np.abs(x).max() / 6)
        return scale, e2m1(x / scale) * scale

    def over_448(x, tensor_scale):
        scale = e4m3(np.abs(x).max() / 448 / tensor_scale)
        return scale, e2m1(x / (scale * tensor_scale)) * scale * tensor_scale

    def elements(x, tensor_scale):
        scale, x_hat = right(x, tensor_scale)
        return scale, x_hat / (scale * tensor_scale)

    def by_the_exact_scale(x, tensor_scale):
        scale, s = right(x, tensor_scale)[0], np.abs(x).max() / 6
        return scale, e2m1(x / s) * s

    misconceptions = [
        (exact, "The block's scale is stored in E4M3: round it, with decode(encode(…, FP8_E4M3), FP8_E4M3)."),
        (without_the_tensors, "The tensor's scale is missing: divide the block's scale by it before it is stored."),
        (over_448, "448 is the largest scale; the tensor's scale has taken care of it. The largest element is 6."),
        (elements, "These are the elements. Multiply them by both scales."),
        (by_the_exact_scale, "Find the elements with the scale that is stored: nobody has the exact one later."),
    ]
    tiny = np.array([0.9, -6.1, 2.0, 0.3])
    x = samples.load("activations").astype(np.float64)
    real, tensor_scale = x[0, :16], float(np.abs(x).max() / (6 * 448))
    cases = [Case(f"x = {tiny.tolist()}, tensor_scale = 0.01", (tiny, 0.01), right(tiny, 0.01)),
             Case("16 real activations", (real, tensor_scale), right(real, tensor_scale))]
    return check(function, cases, misconceptions, "Right, on the tiny case and on a block of real activations.")


@recorded
def check_bits_per_value(function):
    """Check ``function(element_bits, block, scale_bits)``, the bits per value of a block format.

    ``scale_bits`` counts all that a block has beside its codes.

    Examples
    --------
    >>> check_bits_per_value(lambda element_bits, block, scale_bits: element_bits + scale_bits / block)
    ✓ Right, for MXFP4, NVFP4, Q4_1 and blocks of 256.
    """
    misconceptions = [
        (lambda bits, block, scale: bits, "The scale is missing: each value bears its share of it."),
        (lambda bits, block, scale: bits + scale, "The whole block shares one scale: divide its bits by the block."),
        (lambda bits, block, scale: bits * block + scale, "These are the bits of a block. Divide by its values."),
        (lambda bits, block, scale: (bits * block + scale) / 8, "These are the bytes of a block."),
        (lambda bits, block, scale: bits + block / scale, "The share of the scale is scale_bits / block, not the "
                                                          "inverse."),
    ]
    cases = [Case(f"{name}: element_bits = {bits}, block = {block}, scale_bits = {scale}", (bits, block, scale),
                  bits + scale / block)
             for name, bits, block, scale in (("MXFP4", 4, 32, 8), ("NVFP4", 4, 16, 8), ("Q4_1", 4, 32, 32),
                                              ("a block of 256", 3, 256, 16))]
    return check(function, cases, misconceptions, "Right, for MXFP4, NVFP4, Q4_1 and blocks of 256.")
