"""The exercises on smoothing: what is right, and the misconceptions that their checks know."""

from functools import partial

import numpy as np
import torch

from qlab import smoothquant
from tests.exercises.checks import asked


def peaks(m):
    return abs(m).max(0)


def smoothing(x, w, alpha, *, of_x=peaks, of_w=peaks, powers=lambda alpha: (alpha, alpha - 1)):
    """s of each channel, with one thing wrong."""
    p, q = powers(alpha)
    return of_x(x) ** p * of_w(w) ** q


MISTAKES = [
    ("smoothing_scales", lambda x, w, alpha: 1 / smoothing(x, w, alpha), "This is 1 / s"),
    ("smoothing_scales", partial(smoothing, powers=lambda alpha: (-alpha, 1 - alpha)), "This is 1 / s"),
    ("smoothing_scales", partial(smoothing, powers=lambda alpha: (1 - alpha, -alpha)), "have changed places"),
    ("smoothing_scales", lambda x, w, alpha: smoothing(x, w, 1 - alpha), "have changed places"),
    ("smoothing_scales", partial(smoothing, powers=lambda alpha: (alpha, 1 - alpha)), "The power of max|w| divides"),
    ("smoothing_scales", partial(smoothing, powers=lambda alpha: (alpha, -alpha)), "1 − α, not α"),
    ("smoothing_scales", partial(smoothing, powers=lambda alpha: (alpha, -1 - alpha)), "not 1 + α"),
    ("smoothing_scales", partial(smoothing, of_x=lambda x: x.max(0), of_w=lambda w: w.max(0)),
     "The absolute values are missing"),
    ("smoothing_scales", partial(smoothing, of_x=lambda x: abs(x).max()), "over the whole matrix"),
    ("smoothing_scales", partial(smoothing, of_x=lambda x: abs(x).mean(0), of_w=lambda w: abs(w).mean(0)),
     "These are means"),
    ("smoothing_scales", partial(smoothing, of_x=lambda x: abs(x).max(1), of_w=lambda w: abs(w).max(1)),
     "maxima over axis 1"),
    ("fold", lambda gain, w, s: (gain * s, w / s), "other way round"),
    ("fold", lambda gain, w, s: (gain / s, w @ np.diag(1 / s)), "Both were divided"),
    ("fold", lambda gain, w, s: (gain / s, w), "weights did not change"),
    ("fold", lambda gain, w, s: (gain, np.multiply(w, s)), "gain did not change"),
    ("fold", lambda gain, w, s: (gain / s, (w.T * s).T), "multiplies the rows"),
]
RIGHT = [
    ("smoothing_scales", smoothing),
    ("smoothing_scales", lambda x, w, alpha: (peaks(x) / peaks(w)) ** alpha * peaks(w) ** (2 * alpha - 1)),
    ("smoothing_scales", lambda x, w, alpha: [
        max(map(abs, a)) ** alpha / max(map(abs, b)) ** (1 - alpha) for a, b in zip(x.T, w.T, strict=True)]),
    ("smoothing_scales", lambda x, w, alpha: np.exp(alpha * np.log(peaks(np.float32(x)))
                                                    - (1 - alpha) * np.log(peaks(np.float32(w))))),
    ("smoothing_scales", lambda x, w, alpha: torch.tensor(x).abs().amax(0) ** alpha
     / torch.tensor(w).abs().amax(0) ** (1 - alpha)),
    ("smoothing_scales", lambda x, w, alpha: smoothquant.smoothing_scales(peaks(x), peaks(w), alpha)),
    ("fold", lambda gain, w, s: [(gain / s).tolist(), (w @ np.diag(s)).tolist()]),
    ("fold", lambda gain, w, s: (torch.tensor(gain) / torch.tensor(s), torch.tensor(w) * torch.tensor(s))),
]
FIRST_CASES = [  # how the first case of a check is told
    ("smoothing_scales", "For x = [[1.0, -16.0, 0.5], [-2.0, 9.0, 0.25]], w = [[0.5, 1.0, -4.0], [-2.0, 0.25, 1.0]], "
                         "alpha = 0.75: expected [1.41421, 8, 0.420448], "),
]


def test_what_is_asked():
    for x, w, alpha in asked("smoothing_scales", smoothing):
        assert (np.shape(x), np.shape(w), alpha) in [((2, 3), (2, 3), 0.75), ((64, 576), (192, 576), 0.5)]
        assert peaks(np.array(x)).all() and peaks(np.array(w)).all()
