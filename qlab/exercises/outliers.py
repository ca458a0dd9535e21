"""Checks of lesson 05: one scale for each token, and a product whose outlier channels stay in float."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded


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
    """Check ``function(x, w, threshold)``, x wᵀ with the outlier channels in float and the rest in 8-bit integers.

    A channel stays in float if some |x| in it is at least the threshold. The others are quantized by absmax, one scale
    for each token of x and one for each output of w, taken from those channels alone.

    References
    ----------
    Dettmers et al. 2022, "LLM.int8(): 8-bit matrix multiplication for transformers at scale", section 3.

    Examples
    --------
    >>> def decompose(x, w, threshold):
    ...     large = (np.abs(x) >= threshold).any(axis=0)
    ...     s_x = np.abs(x[:, ~large]).max(axis=1, keepdims=True) / 127
    ...     s_w = np.abs(w[:, ~large]).max(axis=1, keepdims=True) / 127
    ...     q_x, q_w = np.rint(x[:, ~large] / s_x), np.rint(w[:, ~large] / s_w)
    ...     return x[:, large] @ w[:, large].T + s_x * s_w.T * (q_x @ q_w.T)
    >>> check_decompose(decompose)
    ✓ Right, on the tiny case and on a real layer.
    """

    def right(x, w, threshold, *, large=None, everywhere=False, integers=True, floats=True, w_scale=1):
        if large is None:
            large = (np.abs(x) >= threshold).any(axis=0)
        s_x, s_w = (np.abs(m if everywhere else m[:, ~large]).max(axis=1, keepdims=True) / 127 for m in (x, w))
        if w_scale == "tensor":
            s_w = np.full_like(s_w, s_w.max())
        sums = np.rint(x[:, ~large] / s_x) @ np.rint(w[:, ~large] / s_w).T
        return floats * (x[:, large] @ w[:, large].T) + integers * s_x * s_w.T * sums

    def per_element(x, w, threshold):
        large = np.abs(x) >= threshold
        none = np.zeros(x.shape[1], bool)
        return np.where(large, x, 0) @ w.T + right(np.where(large, 0, x), w, threshold, large=none)

    misconceptions = [
        (lambda x, w, threshold: x @ w.T,
         "This is the product in float. Quantize the channels that stay below the threshold."),
        (lambda x, w, threshold: right(x, w, threshold, large=np.zeros(x.shape[1], bool)),
         "Everything went through the integers, the outliers too. Their channels stay in float."),
        (lambda x, w, threshold: right(x, w, threshold, floats=False),
         "The outlier channels are lost. Add their product in float: x[:, large] @ w[:, large].T."),
        (lambda x, w, threshold: right(x, w, threshold, integers=False),
         "This is the float part alone. Add the product of the other channels, computed with integers."),
        (lambda x, w, threshold: right(x, w, threshold, everywhere=True),
         "The scales were taken from all channels, so that the outliers still set the step. Take them from the "
         "channels that remain."),
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
