"""Checks of lesson 06: smoothing scales, and their folding."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded
from qlab.exercises.predicting import Option, Question

_OFF_AND_ENDS = "Look at s itself: at α = 0 it is 1 / max|w|, which is 1 only where max|w| is."
PREDICTIONS = {
    "alpha 0": Question("At α = 0, smoothing", (  # of s and the peaks of X / s and W s
        Option("is off", lambda found: np.allclose(found[0], 1), _OFF_AND_ENDS),
        Option("makes all channels of X equally large", lambda found: np.ptp(found[1]) < 1e-9,
               "That is α = 1: s = max|x|, and each channel of X / s reaches 1."),
        Option("makes all columns of W equally large", lambda found: np.ptp(found[2]) < 1e-9),
    )),
    "best alpha": Question("In layer 12, the least error of Y is", (
        Option("at α = 0", lambda alpha: alpha == 0, "Follow the curve to its left end: how large are the channels of "
               "X there?"),
        Option("inside", lambda alpha: 0 < alpha < 1),
        Option("at α = 1", lambda alpha: alpha == 1, "Follow the curve to its right end: who has the outliers there?"),
    ), move="Choose the direction X / s, W · s."),
    "the slides' direction": Question("The direction on the slides, in layer 12, is", (  # least error over α, and off
        Option("better than off for some α", lambda errors: errors[0] < errors[1],
               "Compare the whole curve with the dashed line."),
        Option("worse than off for every α", lambda errors: errors[0] > errors[1]),
    ), move="Choose the direction X · s, W / s (slides)."),
    "which pair": Question("In this model, in static 8 bits, the divergence falls most by", (  # what each leaves of it
        Option("the paper's two pairs", lambda left: left[0] < left[1] / 1.5,
               "Remember where lesson 05 found the harm, and which site the pairs do not touch."),
        Option("the pair up → down", lambda left: left[1] < left[0] / 1.5),
        Option("both about equally", lambda left: 1 / 1.5 <= left[0] / left[1] <= 1.5,
               "Remember where lesson 05 found the harm, and which site the pairs do not touch."),
    )),
    "which level": Question("Smoothing takes the larger share of the divergence away", (  # left of it: token, tensor
        Option("with one scale per token (O1)", lambda left: left[0] < left[1],
               "A token's own scale has already kept the needle of one token from all others."),
        Option("with one scale per tensor (O2, O3)", lambda left: left[1] < left[0]),
    )),
}


@recorded
def check_smoothing_scales(function):
    """Check ``function(x, w, alpha)``, the s of each channel: max|x|^α / max|w|^(1 − α).

    x has the shape (tokens, channels), w (outputs, channels), the answer (channels,). No channel is 0 everywhere.

    References
    ----------
    Xiao et al. 2023, "SmoothQuant", equation 4.

    Examples
    --------
    >>> check_smoothing_scales(lambda x, w, alpha: np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha))
    ✓ Right, on the tiny case and on a real layer.
    """

    def peaks(x, w):
        return np.abs(x).max(axis=0), np.abs(w).max(axis=0)

    def right(x, w, alpha):
        a, m = peaks(x, w)
        return a**alpha / m ** (1 - alpha)

    def of_peaks(formula):
        return lambda x, w, alpha: formula(*peaks(x, w), alpha)

    misconceptions = [
        (lambda x, w, alpha: 1 / right(x, w, alpha),
         "This is 1 / s. In Y = (X / s)(W s)ᵀ the activations are divided by s, so it is large where they are."),
        (of_peaks(lambda a, m, alpha: a ** (1 - alpha) / m**alpha),
         "α and 1 − α have changed places: α = 1 should make all channels of X equal, so s = max|x| then."),
        (of_peaks(lambda a, m, alpha: a**alpha * m ** (1 - alpha)),
         "The power of max|w| divides: a channel whose weights are large already takes less."),
        (of_peaks(lambda a, m, alpha: (a / m) ** alpha),
         "The exponent of max|w| is 1 − α, not α. The two agree at α = 0.5 only."),
        (of_peaks(lambda a, m, alpha: a**alpha / m ** (1 + alpha)), "The exponent of max|w| is 1 − α, not 1 + α."),
        (lambda x, w, alpha: x.max(axis=0) ** alpha / w.max(axis=0) ** (1 - alpha) if (x.max(0) > 0).all() and (
            w.max(0) > 0).all() else None,
         "The absolute values are missing: a channel may be largest on the negative side."),
        (lambda x, w, alpha: np.abs(x).max() ** alpha / np.abs(w).max(axis=0) ** (1 - alpha),
         "max|x| was taken over the whole matrix. Each channel, a column, has its own: axis 0."),
        (lambda x, w, alpha: np.abs(x).max(axis=1) ** alpha / np.abs(w).max(axis=1) ** (1 - alpha)
         if len(x) == len(w) else None,
         "These are maxima over axis 1, one for each token. A channel is a column: axis 0."),
        (lambda x, w, alpha: np.abs(x).mean(axis=0) ** alpha / np.abs(w).mean(axis=0) ** (1 - alpha),
         "These are means. The grid must hold the largest value, so take max."),
    ]
    x, w = np.array([[1.0, -16.0, 0.5], [-2.0, 9.0, 0.25]]), np.array([[0.5, 1.0, -4.0], [-2.0, 0.25, 1.0]])
    real = [matrix.astype(np.float64) for matrix in samples.products()[12, "attn_in"]]
    cases = [Case(f"x = {x.tolist()}, w = {w.tolist()}, alpha = 0.75", (x, w, 0.75), right(x, w, 0.75)),
             Case("x and w of a real layer, alpha = 0.5", (*real, 0.5), right(*real, 0.5))]
    return check(function, cases, misconceptions, "Right, on the tiny case and on a real layer.")


@recorded
def check_fold(function):
    """Check ``function(gain, w, s)``: the gains g / s of the norm, and the weights W S that follow it.

    gain and s have the shape (channels,), w (outputs, channels).

    References
    ----------
    Xiao et al. 2023, "SmoothQuant", section 4.

    Examples
    --------
    >>> check_fold(lambda gain, w, s: (gain / s, w * s))
    ✓ Right: gain and weights changed, their product did not.
    """
    misconceptions = [
        (lambda gain, w, s: (gain * s, w / s),
         "The other way round: s is large where the activations are large, so their gain is divided by it."),
        (lambda gain, w, s: (gain / s, w / s), "Both were divided. What the gain loses, the weights must win: W S."),
        (lambda gain, w, s: (gain / s, w), "The weights did not change, so the product did: multiply them by s."),
        (lambda gain, w, s: (gain, w * s), "The gain did not change, so the product did: divide it by s."),
        (lambda gain, w, s: (gain / s, w * s[:, None]) if len(s) == len(w) else None,
         "This multiplies the rows of W, its outputs. A channel of X meets a column of W."),
    ]
    chance = np.random.default_rng(0)
    tiny = np.array([2.0, 0.5]), np.array([[1.0, 3.0], [-2.0, 4.0]]), np.array([4.0, 0.25])
    more = chance.normal(size=6), chance.normal(size=(3, 6)), chance.uniform(0.1, 9.0, 6)
    written = ", ".join(f"{name} = {value.tolist()}" for name, value in zip(("gain", "w", "s"), tiny, strict=True))
    cases = [Case(text, (gain, w, s), (gain / s, w * s))
             for text, (gain, w, s) in ((written, tiny), ("6 channels and 3 outputs", more))]
    return check(function, cases, misconceptions, "Right: gain and weights changed, their product did not.")
