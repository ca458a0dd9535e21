"""Checks of lesson 05: one scale for each token, and a product whose outlier channels stay in float."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded
from qlab.exercises.predicting import Option, Question

_ZEROS = (("under 1 %", lambda percent: percent < 1), ("about a fifth", lambda percent: 15 < percent < 25),
          ("nearly all", lambda percent: percent > 95))
PREDICTIONS = {
    "int8 as it comes": Question(
        "With int8 kernels, the perplexity is", (
            Option("at most 5 % higher", lambda ratio: ratio <= 1.05,
                   "So it was with the digits. But what are the activations of a language model like?"),
            Option("up to a half higher", lambda ratio: 1.05 < ratio <= 1.5,
                   "There is one scale for all tokens and channels of a tensor. Read the three ratios."),
            Option("more than half higher", lambda ratio: ratio > 1.5),
        )),
    "largest in layer 12": Question(
        "The largest value at (12, attn_in) is", (
            Option("alone", lambda shares: max(shares) < 0.02,
                   "Look along the token axis at its channel: is there a needle or a ridge?"),
            Option("one of many in its channel", lambda shares: shares[1] > 0.5 > shares[0]),
            Option("one of many in its token", lambda shares: shares[0] > 0.5 > shares[1],
                   "Which axis does the ridge run along? All its values belong to one index of the other."),
        )),
    "largest in layer 11": Question(
        "The largest value at (11, down_in) is", (
            Option("alone", lambda shares: max(shares) < 0.02),
            Option("one of many in its channel", lambda shares: shares[1] > 0.5 > shares[0],
                   "A ridge would run through all tokens. Set place in the figure to layer 11, input of down."),
            Option("one of many in its token", lambda shares: shares[0] > 0.5 > shares[1],
                   "Count what stands beside it in its token: set place in the figure to layer 11, input of down."),
        )),
    "zeros in layer 12": Question(
        "In layer 12, of the other values there become 0", tuple(
            Option(text, right, look) for (text, right), look in zip(_ZEROS, (
                "The largest is 126 times the median, and 8 bits have 255 steps. Where is half a step, then?", "",
                "That is 4 bits: set bits to 4. At 8 bits, the blue line lies below most of the black dots."),
                strict=True))),
    "zeros in layer 11": Question(
        "In layer 11, of the other values there become 0", tuple(
            Option(text, right, look) for (text, right), look in zip(_ZEROS, (
                "The largest is more than ten thousand times the median. How many steps of 255 are left below it?",
                "That was layer 12. Compare the blue line with the black dots here.", ""), strict=True)),
        move="Set place to layer 11, input of down."),
    "FP8 in layer 11": Question(
        "With FP8, the error of the output in layer 11", (
            Option("stays above 50 %", lambda percent: percent > 50,
                   "FP8 has levels close to 0 as well: its smallest number is 2⁻⁹, its largest 448. Divide."),
            Option("falls to between 10 and 50 %", lambda percent: 10 <= percent <= 50,
                   "A normal number of E4M3 has 3 bits of mantissa, so it is off by 1/16 at most. Does a needle change "
                   "that?"),
            Option("falls below 10 %", lambda percent: percent < 10),
        )),
    "clipped to ±6": Question(
        "Clipping to ±6 does most harm at", (
            Option("attn_in", lambda most: most == "attn_in",
                   "The ridge of layer 12 reaches 9.9, so the largest loses two fifths. What do others lose?"),
            Option("mlp_in", lambda most: most == "mlp_in",
                   "Compare how far the largest value is from 6 at each site: the table of section 3."),
            Option("down_in", lambda most: most == "down_in"),
        )),
    "channels to zero": Question(
        "The model is hurt most without", (
            Option("channel 247", lambda most: most == "channel 247",
                   "It is the largest single one. But the others are four, and outliers, too. Compare the four rows."),
            Option("four other outlier channels", lambda most: most == "four others"),
            Option("four random channels", lambda most: most == "four random",
                   "Chosen at random, they are ordinary channels. What did they carry?"),
            Option("the needles of layer 11", lambda most: most == "needles",
                   "Only token 0 has them. Compare the four rows."),
        )),
}


@recorded
def check_token_scales(function):
    """Check ``function(x, bits)``, the absmax scale of each token: max|x| of its row / (2^(bits − 1) − 1).

    x has the shape (tokens, channels), the answer (tokens,).

    References
    ----------
    Yao et al. 2022, "ZeroQuant", section 4.1 (token-wise quantization).

    Examples
    --------
    >>> check_token_scales(lambda x, bits: np.abs(x).max(axis=1) / (2 ** (bits - 1) - 1))
    ✓ Right, on the tiny case and on real activations.
    """

    def right(x, bits):
        return np.abs(x).max(axis=1) / (2 ** (bits - 1) - 1)

    misconceptions = [
        (lambda x, bits: np.abs(x).max(axis=0) / (2 ** (bits - 1) - 1),
         "This is one scale for each channel: the max went over axis 0, the tokens. A token is a row: take axis 1."),
        (lambda x, bits: np.abs(x).max() / (2 ** (bits - 1) - 1),
         "This is one scale for the whole tensor. Take the max over axis 1, so that each row keeps its own."),
        (lambda x, bits: np.abs(x).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1),
         "The numbers are right, as a column. The answer has the shape (tokens,): leave keepdims out."),
        (lambda x, bits: x.max(axis=1) / (2 ** (bits - 1) - 1),
         "The absolute value is missing: a large negative activation needs room, too."),
        (lambda x, bits: np.abs(x).max(axis=1) / 2 ** (bits - 1),
         "The largest code is 2^(bits − 1) − 1, 127 for 8 bits: divide by that."),
        (lambda x, bits: np.abs(x).max(axis=1) / (2**bits - 1),
         "The codes go from −(2^(bits − 1) − 1) to 2^(bits − 1) − 1, so |x| has only half of the 2^bits codes."),
        (lambda x, bits: (x.max(axis=1) - x.min(axis=1)) / (2**bits - 1),
         "This is the scale of the zero-point scheme. The symmetric one asks for max|x| alone."),
        (lambda x, bits: (2 ** (bits - 1) - 1) / np.abs(x).max(axis=1),
         "This is 1 / s, what the values are multiplied by. The scale is the step: what a code is multiplied by."),
    ]
    tiny = np.array([[0.5, -14.0, 2.0], [1.0, 0.7, -0.35]])
    real, _ = samples.products()[12, "attn_in"]
    cases = [Case(f"x = {tiny.tolist()}, bits = 4", (tiny, 4), right(tiny, 4)),
             Case("x holds real activations of 64 tokens, bits = 8", (real, 8), right(real, 8))]
    ladder = ("Look at the maxima first: the largest |x| of each row, one for each token.",
              "np.abs(x).max(axis=1) has them. Divide by the largest code, 2**(bits − 1) − 1.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on real activations.", ladder=ladder)


@recorded
def check_decompose(function):
    """Check ``function(x, w, threshold)``, x wᵀ in 8-bit integers, with the outlier channels of x in float.

    w is stored as 8-bit integers by absmax, one scale for each output, before any x is seen. A channel of x stays in
    float if some |x| in it is at least the threshold; it meets the dequantized weights. The other channels are
    quantized by absmax, one scale for each token, taken from them alone.

    References
    ----------
    Dettmers et al. 2022, "LLM.int8(): 8-bit matrix multiplication for transformers at scale", section 3; that the
    weights are stored once and outlier columns dequantized: bitsandbytes, ``MatMul8bitLt``.

    Examples
    --------
    >>> def decompose(x, w, threshold):
    ...     s_w = np.abs(w).max(axis=1, keepdims=True) / 127
    ...     q_w = np.rint(w / s_w)
    ...     large = (np.abs(x) >= threshold).any(axis=0)
    ...     s_x = np.abs(x[:, ~large]).max(axis=1, keepdims=True) / 127
    ...     q_x = np.rint(x[:, ~large] / s_x)
    ...     return x[:, large] @ (s_w * q_w)[:, large].T + s_x * s_w.T * (q_x @ q_w[:, ~large].T)
    >>> check_decompose(decompose)
    ✓ Right, on the tiny case and on a real layer.
    """

    def right(x, w, threshold, *, large=None, everywhere=False, parts=(1, 1), w_scale="output", w_float=False):
        if large is None:
            large = (np.abs(x) >= threshold).any(axis=0)
        s_x = np.abs(x if everywhere else x[:, ~large]).max(axis=1, keepdims=True) / 127
        s_w = np.abs(w[:, ~large] if w_scale == "rest" else w).max(axis=1, keepdims=True) / 127
        if w_scale == "tensor":
            s_w = np.full_like(s_w, s_w.max())
        q_w = np.rint(w / s_w)
        in_float = x[:, large] @ (w if w_float else s_w * q_w)[:, large].T
        return parts[0] * in_float + parts[1] * s_x * s_w.T * (np.rint(x[:, ~large] / s_x) @ q_w[:, ~large].T)

    def per_element(x, w, threshold):
        large = np.abs(x) >= threshold
        none = np.zeros(x.shape[1], bool)
        s_w = np.abs(w).max(axis=1, keepdims=True) / 127
        return np.where(large, x, 0) @ (s_w * np.rint(w / s_w)).T + right(
            np.where(large, 0, x), w, threshold, large=none)

    misconceptions = [
        (lambda x, w, threshold: x @ w.T,
         "This is the product in float. Quantize the weights, and the channels that stay below the threshold."),
        (lambda x, w, threshold: right(x, w, threshold, large=np.zeros(x.shape[1], bool)),
         "Everything went through the integers, the outliers too. Their channels stay in float."),
        (lambda x, w, threshold: right(x, w, threshold, parts=(0, 1)),
         "The outlier channels are lost. Add their product in float, with the weights dequantized."),
        (lambda x, w, threshold: right(x, w, threshold, parts=(1, 0)),
         "This is the float part alone. Add the product of the other channels, computed with integers."),
        (lambda x, w, threshold: right(x, w, threshold, everywhere=True),
         "The scales of x were taken from all channels, so that the outliers still set the step. Take them from the "
         "channels that remain."),
        (lambda x, w, threshold: right(x, w, threshold, w_scale="rest", w_float=True),
         "The weights were quantized without the outlier columns. They are stored before any x is seen, when nobody "
         "knows which columns those will be: one scale for each whole row, and dequantized weights in the float part."),
        (lambda x, w, threshold: right(x, w, threshold, w_scale="rest"),
         "The scales of w were taken without the outlier columns. They are stored before any x is seen, when nobody "
         "knows which columns those will be: take whole rows."),
        (lambda x, w, threshold: right(x, w, threshold, w_float=True),
         "The float part uses the weights as they were. A kernel has only their codes and scales: dequantize them."),
        (lambda x, w, threshold: right(x, w, threshold, w_scale="tensor"),
         "One scale for all of w here. Each output, a row of w, has its own."),
        (lambda x, w, threshold: right(x, w, threshold, large=(np.abs(x) >= threshold).all(axis=0)),
         "A channel counts as large here only if all of its values are. One is enough: use any()."),
        (lambda x, w, threshold: right(x, w, threshold, large=(x >= threshold).any(axis=0)),
         "The absolute value is missing: a large negative activation is an outlier, too."),
        (per_element,
         "Single values were taken out. It is whole channels that stay in float, so that both parts are ordinary "
         "products of smaller matrices."),
    ]
    x = np.array([[0.3, 9.0, -1.0, -7.0], [-0.5, 0.4, 0.9, -8.0]])
    w = np.array([[0.5, 0.2, -0.7, 0.1], [2.0, 1, -3, 4]])
    real_x, real_w = (matrix.astype(np.float64) for matrix in samples.products()[12, "attn_in"])
    real_w = real_w[:4]
    cases = [Case(f"x = {x.tolist()}, w = {w.tolist()}, threshold = 6", (x, w, 6.0), right(x, w, 6.0)),
             Case("x and w from the attention of a real layer, threshold = 6", (real_x, real_w, 6.0),
                  right(real_x, real_w, 6.0))]
    ladder = ("Look at which channels are large, a column with some |x| of 6 or more: of the tiny case "
              "they are the second and the fourth. Then look at the two products apart.",
              "large = (np.abs(x) >= threshold).any(axis=0). x[:, large] @ w[:, large].T is the float part; of the "
              "other columns take scales by row, codes, their product, and multiply it by both scales.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on a real layer.", ladder=ladder)
