"""Checks of lesson 07: Hadamard matrices, and the Cayley transform."""

import numpy as np

from qlab.exercises.checking import Case, check, recorded


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
