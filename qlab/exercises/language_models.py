"""Checks of lessons 06 and 07: smoothing scales and their folding, Hadamard matrices, the Cayley transform."""

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, recorded


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


@recorded
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


@recorded
def check_cayley(function):
    """Check ``function(skew, step)``, the Cayley transform (I − step/2 · A)⁻¹ (I + step/2 · A) of A = ``skew``.

    skew has the shape (n, n), and A = −Aᵀ.

    References
    ----------
    Li et al. 2020, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform", section 3.

    Examples
    --------
    >>> check_cayley(lambda a, step: np.linalg.solve(np.eye(len(a)) - step / 2 * a, np.eye(len(a)) + step / 2 * a))
    ✓ Right, and orthogonal: RᵀR is I for every step.
    """

    def right(a, step):
        return np.linalg.solve(np.eye(len(a)) - step / 2 * a, np.eye(len(a)) + step / 2 * a)

    misconceptions = [
        (lambda a, step: right(a, -step), "This turns the other way: I − step/2 · A is the one that is inverted."),
        (lambda a, step: right(a, 2 * step), "The half is missing: step/2 in both brackets."),
        (lambda a, step: np.eye(len(a)) + step * a,
         "This is a straight step along the tangent: its columns are longer than 1, so it is no rotation."),
        (lambda a, step: np.eye(len(a)) + step / 2 * a,
         "The inverse of the first bracket is missing: without it, the columns are longer than 1."),
        (lambda a, step: np.linalg.inv(np.eye(len(a)) - step / 2 * a) * (np.eye(len(a)) + step / 2 * a),
         "`*` multiplies entry by entry. The product of matrices is `@`."),
        (lambda a, step: (np.eye(len(a)) + step / 2 * a) / (np.eye(len(a)) - step / 2 * a),
         "`/` divides entry by entry. Use np.linalg.solve, or multiply by np.linalg.inv with `@`."),
    ]
    upper = np.triu(np.random.default_rng(0).normal(size=(5, 5)), 1)
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    cases = [Case(f"skew = {quarter.tolist()}, step = {step}", (quarter, step), right(quarter, step))
             for step in (1.0, 2.0)]
    cases.append(Case("a 5 × 5 matrix and step = 0.5", (upper - upper.T, 0.5), right(upper - upper.T, 0.5)))
    return check(function, cases, misconceptions, "Right, and orthogonal: RᵀR is I for every step.")
