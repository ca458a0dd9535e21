"""The exercises on ranges: what is right, and the misconceptions that their checks know."""


import numpy as np

from qlab import calibration
from tests.exercises.checks import check


def clip_error(x, alpha, beta):
    return x - np.clip(x, alpha, beta)


MISTAKES = [
    ("clipping_error", lambda x, a, b: np.mean(clip_error(x, a, b)[(x < a) | (x > b)] ** 2), "clipped values alone"),
    ("clipping_error", lambda x, a, b: np.sum(clip_error(x, a, b) ** 2), "sum of the squared errors"),
    ("clipping_error", lambda x, a, b: sum(np.square(clip_error(x, a, b)).flat) / len(x), "rows of a matrix"),
    ("clipping_error", lambda x, a, b: np.mean(np.abs(clip_error(x, a, b))), "mean of |error|"),
    ("clipping_error", lambda x, a, b: np.mean((x - np.minimum(x, b)) ** 2), "below alpha"),
    ("clipping_error", lambda x, a, b: np.mean(np.where((x < a) | (x > b), x, 0) ** 2), "nearest end"),
    ("percentile_range", lambda x, p: (x.min(), np.percentile(x, p)), "Only the upper end"),
    ("percentile_range", lambda x, p: np.percentile(x, [(100 - p) / 2, (100 + p) / 2]), "both tails together"),
    ("percentile_range", lambda x, p: np.quantile(x, [1 - p / 1e4, p / 1e4]), "p is in percent"),
    ("percentile_range", lambda x, p: np.percentile(np.abs(x), p) * np.array([-1, 1]), "percentile of |x|"),
    ("percentile_range", lambda x, p: np.percentile(x, [p, 100 - p]), "swapped"),
    ("best_range", lambda x, bits: np.abs(x).max(), "nothing is clipped"),
    ("best_range", lambda x, bits: 0.01, "only the rounding error"),
    ("best_range", lambda x, bits: 8.16e-4, "least error itself"),
    ("best_range", lambda x, bits: 1.2, "more candidates"),
    ("best_range", lambda x, bits: 0.6, "At 4 bits your beta = 0.6 gives"),
]
RIGHT = [
    ("clipping_error", lambda x, a, b: np.square(np.maximum(a - x, 0) + np.maximum(x - b, 0)).mean()),
    ("percentile_range", lambda x, p: np.quantile(x, [1 - p / 100, p / 100])),
    ("best_range", lambda x, bits: calibration.mse(x, bits, symmetric=True)[1]),
]


def test_the_tiny_case_is_printed_and_survives_a_function_that_writes_to_it():
    def writes(x, alpha, beta):
        x[:] = 0
        return 0.0

    said = [check("clipping_error", writes).text for _ in range(2)]
    assert said[0] == said[1]
    assert "x = [-4.0, -1.0, 0.0, 0.5, 2.0, 6.0], alpha = -2, beta = 3: expected 2.16667" in said[0]
