"""Checks of lesson 08: bits per weight, a step of GPTQ, AWQ's scales, the time of a token; and its predictions."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded
from qlab.exercises.predicting import Number, Option, Question

PREDICTIONS = {
    "groups of 64": Question(
        "Of the KL of rows, groups of 64 leave", (
            Option("nine tenths or more", lambda left: left >= 0.85,
                   "One large weight spoils a row of 576, or a group of 64. Read the ratios below the rows."),
            Option("about a half", lambda left: 0.35 < left < 0.65),
            Option("a tenth or less", lambda left: left < 0.15,
                   "Most groups still have a largest weight far from the rest. Read the ratios below the rows."),
        )),
    "weights clipped": Question(
        "The error of the output is then", (
            Option("smaller, too", lambda ratio: ratio < 0.95,
                   "Follow the black curve from the right. Which columns have the large errors, on the left?"),
            Option("the same within a twentieth", lambda ratio: 0.95 <= ratio <= 1.05,
                   "Follow the black curve from the right: where has it its least value, and where the blue one?"),
            Option("larger", lambda ratio: ratio > 1.05),
        ), move="Press best for weights."),
    "the second weight": Number(
        "The second weight of the first row, before it is rounded",
        "The first token's output lacks 2 · 0.4, and this weight is multiplied by 1 there.",
        wrong=((0.9, "It may move: it is not rounded yet, and can give back what the first token lacks."),
               (0.1, "0.4 was taken away in the first column; both inputs are positive, so it must be added here."),
               (1.3, "The first token multiplies the first weight by 2: it lacks 0.8."),
               (1.0, "That is 0.9 rounded. Before that it takes over what the first token lacks.")),
        rtol=0.01),
    "the weights of GPTQ": Question(
        "The weights of GPTQ are", (
            Option("nearer to the float weights", lambda far: far < 0.9,
                   "Each weight was moved for the sake of others before it was rounded. Read the dB at 0 and at 64."),
            Option("as far", lambda far: 0.9 <= far <= 1.1,
                   "Each weight was moved for the sake of others before it was rounded. Read the dB at 0 and at 64."),
            Option("farther from them", lambda far: far > 1.1),
        )),
    "few tokens": Question(
        "With 64 tokens, the error on other prose ends", (
            Option("below that of rounding to nearest", lambda ratio: ratio < 0.95,
                   "64 tokens, 64 columns: what can the columns learn by heart? Read the first line below."),
            Option("where it was", lambda ratio: 0.95 <= ratio <= 1.05,
                   "The weights moved by steps: for other text that is not without effect. Read the first line below."),
            Option("above it", lambda ratio: ratio > 1.05),
        )),
    "the model by GPTQ": Question(
        "Of the KL of rounding to nearest, GPTQ leaves", (
            Option("nine tenths", lambda left: left > 0.8,
                   "A layer's error fell to six tenths in the figure, and KL goes with its square. Read the ratios."),
            Option("about two thirds", lambda left: 0.55 < left <= 0.8,
                   "That is a step of it. There are also the order and the ranges: read the ratios one by one."),
            Option("about a third", lambda left: 0.25 < left < 0.45),
        )),
    "α of AWQ": Question(
        "The least error is at", (
            Option("α = 0", lambda alpha: alpha == 0,
                   "The ridge's column is rounded like all others there. Read the errors from α = 0 on."),
            Option("between 0.2 and 0.8", lambda alpha: 0.2 <= alpha <= 0.8),
            Option("α = 0.95", lambda alpha: alpha > 0.9,
                   "Near 1 the ridge's column takes all steps of its group. Read the errors of the last lines."),
        )),
    "rotated and repaired": Question(
        "After GPTQ on both, rotated divided by not rotated is", (
            Option("above 1 on all three texts", lambda ratios: min(one.kl_low for one in ratios) > 1,
                   "That holds for rounding to nearest. Read the ratios with GPTQ."),
            Option("below 1 on all three texts", lambda ratios: max(one.kl_high for one in ratios) < 1),
            Option("not the same verdict on all three", lambda ratios: not (
                min(one.kl_low for one in ratios) > 1 or max(one.kl_high for one in ratios) < 1),
                   "Read the intervals of the last ratios, text by text."),
        )),
    "the dearest four": Question(
        "The largest KL alone comes from", (
            Option("the weights", lambda least: max(least, key=least.get) == "weights",
                   "Rounded to nearest, they would be. Read the rows W4A16KV16 and W16A4KV16."),
            Option("the activations", lambda least: max(least, key=least.get) == "activations"),
            Option("the cache", lambda least: max(least, key=least.get) == "cache",
                   "Its ranges are of 64 channels each, the keys rotated. Read the row W16A16KV4."),
        )),
    "four bits at 256 tokens": Question(
        "At 256 tokens, four bits divided by FP32 take", (
            Option("less than a half", lambda ratio: ratio < 0.5,
                   "How often is a weight used that was read once? Compare the columns of 1 and of 256 tokens."),
            Option("between a half and nine tenths", lambda ratio: 0.5 <= ratio < 0.9,
                   "Compare the columns of 1 and of 256 tokens: which of the two is about reading?"),
            Option("about as long, or longer", lambda ratio: ratio >= 0.9,
                   "On this machine the four-bit kernel keeps a lead. Compare it with that at 1 token."),
        )),
    "four bits again": Question(
        "The two are apart by", (
            Option("less than 1 dB", lambda found: abs(found[0] - found[1]) < 1,
                   "That is so after a rotation. As it is, the weights lie on a grid: which of the two finds it?"),
            Option("some dB", lambda found: 1 <= abs(found[0] - found[1]) < 20,
                   "Read the dB of the matrix as it is: one of the two makes no error at all."),
            Option("without limit", lambda found: abs(found[0] - found[1]) >= 20),
        )),
}


@recorded
def check_group_bits(function):
    """Check ``function(bits, group_size)``: what a weight takes when each group has a 16-bit scale and a zero-point.

    The zero-point is a code, of ``bits`` bits.

    References
    ----------
    Frantar et al. 2023, "GPTQ", section 4, on groups.

    Examples
    --------
    >>> check_group_bits(lambda bits, group_size: bits + (16 + bits) / group_size)
    ✓ Right, for groups and for whole rows.
    """

    def right(bits, group_size):
        return bits + (16 + bits) / group_size

    misconceptions = [
        (lambda bits, group_size: bits + 16 / group_size, "The zero-point is missing: each group stores one, too."),
        (lambda bits, group_size: bits + (32 + bits) / group_size, "The scale has 16 bits here, not 32."),
        (lambda bits, group_size: bits + 32 / group_size, "The zero-point is a code: it takes the bits of one weight."),
        (lambda bits, group_size: bits + 16 + bits, "Scale and zero-point are shared by the group: divide them by it."),
        (lambda bits, group_size: bits * group_size + 16 + bits,
         "This is what a group takes. Asked is what one of its weights takes."),
        (lambda bits, group_size: (16 + bits) / group_size, "The code of the weight itself is missing."),
        (lambda bits, group_size: bits + 2 / group_size, "Scale and zero-point are two numbers of several bits each."),
    ]
    cases = [Case(f"bits = {bits}, group_size = {size}", (bits, size), right(bits, size))
             for bits, size in ((4, 10), (4, 64), (3, 64), (8, 576))]
    ladder = ("Look at what a group stores beside its codes: one scale and one zero-point. How many bits are these?",
              "The code's bits, and a share of 16 + bits for each of the group_size weights.")
    return check(function, cases, misconceptions, "Right, for groups and for whole rows.", ladder=ladder)


@recorded
def check_column(function):
    """Check ``function(w, u, j, step)``: the weights after column j was rounded and its error passed on.

    w has the shape (outputs, inputs), u (inputs, inputs), upper triangular. Rounding is to multiples of ``step``. The
    answer is a matrix: column j rounded, those behind it corrected, those before it as they were.

    References
    ----------
    Frantar et al. 2023, "GPTQ", algorithm 1.

    Examples
    --------
    >>> def column(w, u, j, step):
    ...     rounded = step * np.round(w[:, j] / step)
    ...     error = (w[:, j] - rounded) / u[j, j]
    ...     w[:, j] = rounded
    ...     w[:, j + 1:] -= np.outer(error, u[j, j + 1:])
    ...     return w
    >>> check_column(column)
    ✓ Right, on the tiny case and on a real layer.
    """

    def build(share=lambda error, u, j: np.outer(error / u[j, j], u[j, j + 1:]), sign=-1, keep=False):
        def function(w, u, j, step):
            w = w.copy()
            rounded = step * np.round(w[:, j] / step)
            error = w[:, j] - rounded
            w[:, j + 1:] += sign * share(error, u, j)
            if not keep:
                w[:, j] = rounded
            return w
        return function

    right = build()
    misconceptions = [
        (build(sign=1), "The error is subtracted: w − ŵ is missing in the output, and w_k − e U_jk gives it back."),
        (build(lambda error, u, j: np.outer(error, u[j, j + 1:])), "The error was not divided by U_jj."),
        (build(lambda error, u, j: np.outer(error / u[j, j] ** 2, u[j, j + 1:])),
         "The error was divided by U_jj twice: U holds roots of what H⁻¹ has, once is enough."),
        (build(lambda error, u, j: np.outer(error / u[j, j], u[j + 1:, j])),
         "This is column j of U below the diagonal, which is all zeros. The row j behind the diagonal is meant."),
        (build(keep=True), "Column j itself was left as it was: it takes its rounded values."),
        (lambda w, u, j, step: step * np.round(w / step),
         "All columns were rounded. Only column j is; those behind it are corrected and wait for their turn."),
        (build(lambda error, u, j: np.repeat(error[:, None], u.shape[0] - j - 1, axis=1)),
         "Every column behind got the same share. Column k gets e U_jk."),
    ]
    tiny = np.array([[0.4, 0.7, 1.0], [1.3, -0.2, 0.5]]), np.array([[2.0, -1.0, 0.5], [0.0, 1.0, -0.5], [0, 0, 0.5]])
    x, w = (matrix.astype(np.float64)[:, :48] for matrix in samples.products()[12, "attn_in"])
    w = w[np.abs(w[:, 7]) > 0.06]  # none of it becomes 0, which a difference might miss by 1e-18
    u = np.linalg.cholesky(np.linalg.inv(2 * x.T @ x + 0.1 * np.eye(48))).T
    written = f"w = {tiny[0].tolist()}, u = {tiny[1].tolist()}"
    cases = [Case(f"{written}, j = {j}, step = 1", (*tiny, j, 1.0), right(*tiny, j, 1.0)) for j in (0, 1)]
    cases.append(Case("48 columns of a real layer, j = 7, step = 0.1", (w, u, 7, 0.1), right(w, u, 7, 0.1)))
    ladder = ("Look at column j of your result first: it holds the rounded weights, step · round(w / step).",
              "The error of column j, divided by u[j, j], times u[j, k], is taken from every column k behind it; those "
              "before j stay.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on a real layer.", ladder=ladder)


@recorded
def check_awq_scales(function):
    """Check ``function(x, alpha)``, by what AWQ multiplies each column of the weights: mean|x|^α / √(max · min).

    x has the shape (tokens, channels), the answer (channels,); max and min are those of mean|x|^α. No channel is 0
    everywhere.

    References
    ----------
    Lin et al. 2024, "AWQ", section 3.2, equation 5.

    Examples
    --------
    >>> def awq(x, alpha):
    ...     s = np.abs(x).mean(axis=0) ** alpha
    ...     return s / np.sqrt(s.max() * s.min())
    >>> check_awq_scales(awq)
    ✓ Right, on the tiny case and on a real layer.
    """

    def build(size=lambda x: np.abs(x).mean(axis=0), norm=lambda s: np.sqrt(s.max() * s.min()),
              power=lambda alpha: alpha):
        def function(x, alpha):
            s = size(x) ** power(alpha)
            return s / norm(s)
        return function

    right = build()
    misconceptions = [
        (build(norm=lambda s: 1), "The division by √(max s · min s) is missing: it keeps the middle of s at 1."),
        (build(size=lambda x: np.abs(x).max(axis=0)),
         "This is max|x|, as in SmoothQuant. Here activations are not rounded, so the typical size counts: the mean."),
        (build(size=lambda x: np.abs(x.mean(axis=0))), "First |x|, then the mean: positive and negative ones cancel."),
        (build(size=lambda x: np.abs(x).mean(axis=1)),
         "This is a mean for each token, over axis 1. A channel is a column: axis 0."),
        (build(power=lambda alpha: -alpha),
         "This is 1 / s: a column that meets large activations is multiplied by more, not by less."),
        (build(power=lambda alpha: 1 - alpha), "α and 1 − α have changed places: α = 0 must leave all weights alone."),
        (build(norm=lambda s: s.max() * s.min()), "The root is missing: √(max s · min s)."),
        (build(norm=lambda s: s.mean()), "Divided is by √(max s · min s), and not by the mean of s."),
        (build(norm=lambda s: s.max()), "Divided is by √(max s · min s), and not by the largest s."),
    ]
    x = np.array([[100.0, -24.0, 3.0], [-28.0, 8.0, 5.0]])
    real = samples.products()[12, "attn_in"][0].astype(np.float64)
    cases = [Case(f"x = {x.tolist()}, alpha = 0.5", (x, 0.5), right(x, 0.5)),
             Case("x of a real layer, alpha = 0.25", (real, 0.25), right(real, 0.25))]
    ladder = ("Look at the mean of |x| over the tokens first, one number for each channel.",
              "Take the mean to the power α, and divide by the root of the largest times the smallest of these.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on a real layer.", ladder=ladder)


@recorded
def check_roofline(function):
    """Check ``function(weights, bits, tokens, bandwidth, rate)``: the seconds that a model's weights take at least.

    The longer of two: reading all weights once, ``bandwidth`` in bytes per second, and a multiplication and an addition
    for each weight and token, ``rate`` in operations per second.

    References
    ----------
    Williams et al. 2009, "Roofline: an insightful visual performance model for multicore architectures".

    Examples
    --------
    >>> check_roofline(lambda weights, bits, tokens, bandwidth, rate: max(
    ...     weights * bits / 8 / bandwidth, 2 * weights * tokens / rate))
    ✓ Right, under both parts of the roof.
    """

    def build(join=max, size=lambda weights, bits: weights * bits / 8, operations=lambda weights, tokens:
              2 * weights * tokens):
        return lambda weights, bits, tokens, bandwidth, rate: join(
            size(weights, bits) / bandwidth, operations(weights, tokens) / rate)

    right = build()
    misconceptions = [
        (build(join=lambda a, b: a + b),
         "This is the sum. Reading and computing go on at the same time: the longer one decides."),
        (build(size=lambda weights, bits: weights * bits), "The bandwidth counts bytes: 8 bits each."),
        (build(operations=lambda weights, tokens: weights * tokens),
         "Each weight takes a multiplication and an addition for each token: two operations."),
        (build(operations=lambda weights, tokens: 2 * weights),
         "This computes one token. Each weight is used for all tokens."),
        (lambda weights, bits, tokens, bandwidth, rate: max(
            tokens * weights * bits / 8 / bandwidth, 2 * weights * tokens / rate),
         "The weights are read once for all tokens, not once for each."),
        (lambda weights, bits, tokens, bandwidth, rate: weights * bits / 8 / bandwidth,
         "This is the reading. With many tokens, computing takes longer: the longer one decides."),
        (lambda weights, bits, tokens, bandwidth, rate: 2 * weights * tokens / rate,
         "This is the computing. With few tokens, reading takes longer: the longer one decides."),
    ]
    cases = [Case("weights = {:g}, bits = {}, tokens = {}, bandwidth = {:g}, rate = {:g}".format(*given), given,
                  right(*given))
             for given in ((1e9, 4, 1, 1e10, 1e11), (1e8, 16, 8, 2e10, 1e10), (1e9, 4, 2, 1e10, 1e11),
                           (1e9, 4, 256, 1e10, 1e11))]
    ladder = ("Look at the two times by themselves: reading all weights once, and computing for all tokens.",
              "Bytes over bandwidth, two operations for each weight and token over rate: the longer decides.")
    return check(function, cases, misconceptions, "Right, under both parts of the roof.", ladder=ladder)
