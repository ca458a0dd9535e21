"""Checks of lessons 06 and 07: smoothing scales, and Sylvester's Hadamard matrices."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check


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
        (lambda x, w, alpha: np.abs(x).mean(axis=0) ** alpha / np.abs(w).mean(axis=0) ** (1 - alpha),
         "These are means. The grid must hold the largest value, so take max."),
    ]
    x, w = np.array([[1.0, -16.0, 0.5], [-2.0, 9.0, 0.25]]), np.array([[0.5, 1.0, -4.0], [-2.0, 0.25, 1.0]])
    real = [matrix.astype(np.float64) for matrix in samples.products()[12, "attn_in"]]
    cases = [Case(f"x = {x.tolist()}, w = {w.tolist()}, alpha = 0.75", (x, w, 0.75), right(x, w, 0.75)),
             Case("x and w of a real layer, alpha = 0.5", (*real, 0.5), right(*real, 0.5))]
    return check(function, cases, misconceptions, "Right, on the tiny case and on a real layer.")


def check_hadamard(function):
    """Check ``function(k)``, Sylvester's Hadamard matrix of order 2^k: H₁ = [[1]], H₂ₙ = [[H, H], [H, −H]].

    References
    ----------
    Sylvester 1867, "Thoughts on inverse orthogonal matrices".

    Examples
    --------
    >>> def hadamard(k):
    ...     h = np.array([[1]])
    ...     for _ in range(k):
    ...         h = np.block([[h, h], [h, -h]])
    ...     return h
    >>> check_hadamard(hadamard)
    ✓ Right, up to 64 × 64.
    """

    def build(block):
        def function(k):
            h = np.array([[1]])
            for _ in range(k):
                h = np.block(block(h))
            return h
        return function

    right = build(lambda h: [[h, h], [h, -h]])
    misconceptions = [
        (lambda k: right(k) / np.sqrt(2.0**k),
         "This is H / √n, which is orthogonal. Asked is H itself, with entries +1 and −1: leave the division out."),
        (build(lambda h: [[h, h], [h, h]]), "A minus is missing: all rows are equal. The block below right is −H."),
        (build(lambda h: [[h, h], [-h, h]]), "The minus stands below left. It belongs below right: [[H, H], [H, −H]]."),
        (build(lambda h: [[h, -h], [h, h]]), "The minus stands above right. It belongs below right."),
        (build(lambda h: [[-h, h], [h, h]]), "The minus stands above left. It belongs below right."),
        (lambda k: right(k + 1), "This is twice too large: order 2^k means k doublings, beginning with [[1]]."),
        (lambda k: right(k - 1) if k else None, "This is half too small: order 2^k means k doublings."),
    ]
    cases = [Case(f"k = {k}", (k,), right(k)) for k in (1, 2, 0, 6)]
    return check(function, cases, misconceptions, "Right, up to 64 × 64.")
