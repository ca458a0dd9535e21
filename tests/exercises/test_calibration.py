"""The exercises on ranges: what is right, and the misconceptions that their checks know."""


import numpy as np

from qlab import affine, calibration
from tests.exercises.checks import check


def clip_error(x, alpha, beta):
    return x - np.clip(x, alpha, beta)


def search(x, bits, reach=None, error=affine.mse, **grid):
    ends = (reach or np.abs(x).max()) * np.arange(1, 201) / 200
    return ends[np.argmin([error(x, affine.fake_quantize(x, affine.range_params(-end, end, bits, **grid)))
                           for end in ends])]


MISTAKES = [
    ("clipping_error", lambda x, a, b: np.mean(clip_error(x, a, b)[(x < a) | (x > b)] ** 2), "clipped values alone"),
    ("clipping_error", lambda x, a, b: np.sum(clip_error(x, a, b) ** 2), "sum of the squared errors"),
    ("clipping_error", lambda x, a, b: sum(np.square(clip_error(x, a, b)).flat) / len(x), "rows of a matrix"),
    ("clipping_error", lambda x, a, b: np.mean(np.abs(clip_error(x, a, b))), "mean of |error|"),
    ("clipping_error", lambda x, a, b: np.square(clip_error(x, a, b)).mean() ** 0.5, "without the root"),
    ("clipping_error", lambda x, a, b: np.mean(np.maximum(np.abs(x) - b, 0) ** 2), "alpha is ignored"),
    ("clipping_error", lambda x, a, b: np.mean((x - np.minimum(x, b)) ** 2), "below alpha"),
    ("clipping_error", lambda x, a, b: np.mean(np.where((x < a) | (x > b), x, 0) ** 2), "nearest end"),
    ("clipping_error", lambda x, a, b: np.mean(clip_error(x, a, b)), "not squared"),
    ("clipping_error", lambda x, a, b: np.mean(clip_error(x, a, b)) ** 2, "The mean is squared"),
    ("clipping_error", lambda x, a, b: clip_error(x, a, b) ** 2, "one for each value"),
    ("clipping_error", lambda x, a, b: (clip_error(x, a, b) ** 2).mean(0), "many means"),
    ("clipping_error", lambda x, a, b: (clip_error(x, a, b) ** 2).mean(-1), "many means"),
    ("percentile_range", lambda x, p: (np.quantile(x, 100 - p), np.quantile(x, p)), "np.quantile counts from 0 to 1"),
    ("percentile_range", lambda x, p: np.percentile(x, [1 - p / 100, p / 100]), "np.percentile takes percent"),
    ("percentile_range", lambda x, p: np.percentile(x, [100 - p, p], axis=0), "leave axis out"),
    ("percentile_range", lambda x, p: np.percentile(x, [100 - p, p], axis=-1), "leave axis out"),
    ("percentile_range", np.percentile, "only one of 2 parts"),
    ("percentile_range", lambda x, p: (x.min(), np.percentile(x, p)), "Only the upper end"),
    ("percentile_range", lambda x, p: np.percentile(x, [(100 - p) / 2, (100 + p) / 2]), "both tails together"),
    ("percentile_range", lambda x, p: np.quantile(x, [1 - p / 1e4, p / 1e4]), "p is in percent"),
    ("percentile_range", lambda x, p: np.percentile(np.abs(x), p) * np.array([-1, 1]), "percentile of |x|"),
    ("percentile_range", lambda x, p: np.percentile(x, [p, 100 - p]), "swapped"),
    ("best_range", lambda x, bits: np.abs(x).max(), "nothing is clipped"),
    ("best_range", lambda x, bits: search(x, bits, error=lambda x, x_hat: abs(x - x_hat).mean(), symmetric=True),
     "minimizes |error|"),
    ("best_range", search, "all 4 levels, which is not symmetric"),
    ("best_range", lambda x, bits: search(x, bits, x.max(), symmetric=True), "candidates end at max(x)"),
    ("best_range", lambda x, bits: 0.01, "only the rounding error"),
    ("best_range", lambda x, bits: 8.16e-4, "least error itself"),
    ("best_range", lambda x, bits: 1.2, "more candidates"),
    ("best_range", lambda x, bits: 0.6, "bits = 4: your beta = 0.6 gives"),
]
RIGHT = [
    ("clipping_error", lambda x, a, b: np.square(np.maximum(a - x, 0) + np.maximum(x - b, 0)).mean()),
    ("percentile_range", lambda x, p: np.quantile(x, [1 - p / 100, p / 100])),
    ("best_range", lambda x, bits: calibration.mse(x, bits, symmetric=True)[1]),
]
STEPS = [  # wrong in a way that no misconception explains, and the step that is told at the second failure
    ("clipping_error", lambda x, a, b: 1.0, "they are -2, 0, 0, 0, 0, 3"),
    ("percentile_range", lambda x, p: (0, np.percentile(x, p)), "alpha: 100 − p"),
    ("percentile_range", lambda x, p: (np.percentile(x, 100 - p), 0), "alpha is right"),
    ("best_range", lambda x, bits: 0.6, "beta = 0.5 with 4 bits has an MSE of 0.0008"),
    ("best_range", lambda x, bits: x[10**6], "this line: "),
]


def test_the_tiny_case_is_printed_and_survives_a_function_that_writes_to_it():
    def writes(x, alpha, beta):
        x[:] = 0
        return 0.0

    said = [check("clipping_error", writes).text.split("\n")[0] for _ in range(2)]
    assert said[0] == said[1]
    assert "x = [-4.0, -1.0, 0.0, 0.5, 2.0, 6.0], alpha = -2, beta = 3: expected 2.16667" in said[0]
