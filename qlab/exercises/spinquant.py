"""Checks of lesson 07: Hadamard matrices, and the Cayley transform; and its predictions."""

import numpy as np

from qlab.exercises.checking import Case, check, recorded
from qlab.exercises.predicting import Option, Question

PREDICTIONS = {
    "turned by 45°": Question(
        "Turned by 45°, the error", (
            Option("falls for both", lambda ratio: max(ratio) < 0.9,
                   "Choose diagonal and turn: where is the long axis of the cloud before and after?"),
            Option("falls for the first and grows for the second", lambda ratio: ratio[0] < 0.9 and ratio[1] > 1.1),
            Option("stays for both", lambda ratio: all(0.9 <= one <= 1.1 for one in ratio),
                   "Lengths stay, and the largest coordinate does not: look at the square that the grid has to fill."),
        )),
    "largest of two channels": Question(
        "The largest coordinate becomes", (
            Option("about three quarters of what it was", lambda ratio: 0.65 < ratio < 0.85),
            Option("half of it", lambda ratio: 0.4 < ratio < 0.6,
                   "A point (v, 0) becomes (v / √2, v / √2): two channels share the length as a root."),
            Option("a fifth of it", lambda ratio: ratio < 0.3,
                   "That is the other channel's size. The length of each point stays, so √2 is the most to be won."),
        )),
    "Hadamard or any": Question(
        "Less error comes from", (
            Option("the Hadamard matrix", lambda error: error[0] < 0.95 * error[1]),
            Option("the random orthogonal one", lambda error: error[1] < 0.95 * error[0],
                   "Compare the bars. In which of the two matrices do all entries have the same magnitude?"),
            Option("either", lambda error: 0.95 <= error[0] / error[1] <= 1 / 0.95,
                   "Compare the bars. One new channel gets a larger share of the ridge than another, unless all "
                   "entries have the same magnitude."),
        )),
    "the needle, turned": Question(
        "The error after the Hadamard matrix is", (
            Option("below 10 %", lambda error: error < 10,
                   "The needle is spread over the channels of its token. How large is that token then, beside others?"),
            Option("about half of what it was", lambda error: 30 < error < 70,
                   "All 64 tokens share the scale. Which of them sets it, before the rotation and after?"),
            Option("still above 90 %", lambda error: error > 90),
        )),
    "a rotation or groups": Question(
        "Nearest to float comes", (
            Option("Hadamard R1, R2 and R4", lambda contrast: contrast.kl_high < 1,
                   "Read the line with the ratio: above 1, the first has the larger KL. How many channels share a "
                   "range?"),
            Option("no rotation", lambda contrast: contrast.kl_low > 1),
            Option("they cannot be told apart", lambda contrast: not contrast.resolved,
                   "Read the interval of the ratio: it does not hold 1."),
        )),
    "four-bit weights, turned": Question(
        "The KL of the rotated weights is", (
            Option("half", lambda ratio: 0.3 < ratio < 0.7,
                   "That holds for activations. Look at what folding the gains does to the columns of a row."),
            Option("within a tenth", lambda ratio: 0.9 < ratio < 1.1,
                   "No length changes, yet before that the gains are multiplied into the weights: read that row."),
            Option("about twice as large, or more", lambda ratio: ratio > 1.7),
        )),
    "where learning helps": Question(
        "Learning beats Hadamard by a tenth or more", (
            Option("on the axes only", lambda ratio: ratio[0] < 0.9 <= ratio[1],
                   "On the axes a Hadamard matrix gives every channel the same share: what is left to learn?"),
            Option("on the turned cloud only", lambda ratio: ratio[1] < 0.9 <= ratio[0]),
            Option("on both", lambda ratio: max(ratio) < 0.9,
                   "Compare Hadamard and learned in the first line: on the axes, equal shares are about the best."),
        )),
    "two hundred steps": Question(
        "The held-out proxy falls", (
            Option("by nearly half", lambda ratio: 0.45 < ratio < 0.65),
            Option("by a tenth or so", lambda ratio: 0.8 < ratio < 0.95,
                   "That is what some tens of steps do. Read the lines of the study's seeds below the figure."),
            Option("not at all", lambda ratio: ratio >= 0.95,
                   "576 × 576 numbers could learn some thousand tokens by heart; read the study's held-out numbers."),
        )),
    "keys at 3 bits": Question(
        "Nearest to float at 3 bits is", (
            Option("R3", lambda contrasts: min(one.kl_low for one in contrasts) > 1,
                   "R3 spreads the outlier channels. What is left of them if each has its own range? Read the ratios."),
            Option("keys per channel", lambda contrasts: max(one.kl_high for one in contrasts) < 1),
            Option("neither", lambda contrasts: not all(one.resolved for one in contrasts),
                   "Read the last line of the 3 bits: does an interval hold 1?"),
        )),
}


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
    ladder = ("Look at one doubling first: from [[1]] to [[1, 1], [1, −1]].",
              "Begin with h = np.array([[1]]), and k times put h = np.block([[h, h], [h, -h]]).")
    return check(function, cases, misconceptions, "Right, up to 64 × 64.", ladder=ladder)


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
    ladder = ("Look at the two brackets first, before one is inverted: I ± step/2 · A, with np.eye(len(skew)) for I.",
              "np.linalg.solve(I − step/2 · A, I + step/2 · A) inverts the first and multiplies by the second.")
    return check(function, cases, misconceptions, "Right, and orthogonal: RᵀR is I for every step.", ladder=ladder)
