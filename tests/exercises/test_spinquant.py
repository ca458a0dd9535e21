"""The exercises on rotations: what is right, and the misconceptions that their checks know."""

import math
from functools import partial, reduce

import numpy as np
import torch

from qlab import spinquant
from tests.exercises.checks import asked


def hadamard(k, *, block=lambda h: [[h, h], [h, -h]]):
    """Sylvester's matrix of order 2^k, with one thing wrong."""
    h = np.array([[1]])
    for _ in range(k):
        h = np.block(block(h))
    return h


def cayley(a, step):
    """On the imaginary axis, where the eigenvalues are."""
    values, vectors = np.linalg.eig(a)
    return (vectors * ((1 + step / 2 * values) / (1 - step / 2 * values)) @ np.linalg.inv(vectors)).real


MISTAKES = [
    ("hadamard", lambda k: hadamard(k) / 2 ** (k / 2), "which is orthogonal"),
    ("hadamard", partial(hadamard, block=lambda h: [[h / 2**0.5, h / 2**0.5], [h / 2**0.5, -h / 2**0.5]]),
     "which is orthogonal"),
    ("hadamard", lambda k: np.ones((2**k, 2**k)), "A minus is missing"),
    ("hadamard", partial(hadamard, block=lambda h: [[h, h], [-h, h]]), "stands below left"),
    ("hadamard", partial(hadamard, block=lambda h: [[h, -h], [h, h]]), "stands above right"),
    ("hadamard", partial(hadamard, block=lambda h: [[-h, h], [h, h]]), "stands above left"),
    ("hadamard", lambda k: hadamard(k + 1), "twice too large"),
    ("hadamard", lambda k: hadamard(max(k, 1)), "beginning with [[1]]"),
    ("hadamard", lambda k: hadamard(k - 1), "half too small"),
    ("hadamard", lambda n: hadamard(int(math.log2(n))), "half too small"),
    ("cayley", lambda a, step: cayley(a, step).T, "turns the other way"),
    ("cayley", lambda a, step: cayley(a, -step), "turns the other way"),
    ("cayley", lambda a, step: cayley(a, 2 * step), "half is missing"),
    ("cayley", lambda a, step: np.eye(len(a)) + step * a, "straight step along the tangent"),
    ("cayley", lambda a, step: np.identity(len(a)) + a * step / 2, "inverse of the first bracket"),
    ("cayley", lambda a, step: np.linalg.inv(np.eye(len(a)) - step / 2 * a) * (np.eye(len(a)) + step / 2 * a), "`@`"),
    ("cayley", lambda a, step: (np.eye(len(a)) + step / 2 * a) / (np.eye(len(a)) - step / 2 * a), "divides entry by"),
]
RIGHT = [
    ("hadamard", hadamard),
    ("hadamard", lambda k: hadamard(k).tolist()),
    ("hadamard", lambda k: torch.tensor(hadamard(k), dtype=torch.float32)),
    ("hadamard", lambda k: [[(-1) ** (i & j).bit_count() for j in range(2**k)] for i in range(2**k)]),
    ("hadamard", lambda k: reduce(np.kron, k * [np.array([[1.0, 1.0], [1.0, -1.0]])], np.eye(1))),
    ("hadamard", lambda k: spinquant.hadamard(2**k)),
    ("cayley", cayley),
    ("cayley", lambda a, step: torch.linalg.solve(torch.eye(len(a)) - step / 2 * torch.tensor(a),
                                                  torch.eye(len(a)) + step / 2 * torch.tensor(a))),
    ("cayley", lambda a, step: (np.eye(len(a)) + step / 2 * a) @ np.linalg.inv(np.eye(len(a)) - step / 2 * a)),
]
FIRST_CASES = [  # how the first case of a check is told
    ("hadamard", "For k = 1: expected [[1, 1], [1, -1]], "),
]


def test_what_is_asked():
    assert asked("hadamard", hadamard) == [(1,), (2,), (0,), (6,)]
