"""The exercises on tokens and outliers: what is right, and the misconceptions that their checks know."""

from functools import partial

import numpy as np
import torch

from qlab import affine
from tests.exercises.checks import asked


def token_scales(x, bits, *, steps=None, largest=lambda x: abs(x).max(1)):
    return largest(x) / (steps or 2 ** (bits - 1) - 1)


def has_outlier(x, threshold):
    return (abs(x) >= threshold).any(0)


def both_scales(rest, w):
    return token_scales(rest, 8), token_scales(w, 8)


def decomposed(x, w, threshold, *, large=has_outlier, scales=both_scales, everywhere=False, parts=(1, 1),
               in_float=None):
    """x wᵀ in two parts, with one thing wrong."""
    outliers = large(x, threshold)
    rest = x if everywhere else x[:, ~outliers]
    s_x, s_w = scales(rest, w)
    q_x, q_w = np.rint(x[:, ~outliers].T / s_x).T, np.rint(w.T / s_w).T
    stored = (q_w.T * s_w).T if in_float is None else in_float
    return (parts[0] * (x[:, outliers] @ stored[:, outliers].T)
            + parts[1] * np.outer(s_x, s_w) * (q_x @ q_w[:, ~outliers].T))


def decomposed_value_by_value(x, w, threshold):
    large = abs(x) >= threshold
    s_w = token_scales(w, 8)
    return np.where(large, x, 0) @ (np.rint(w.T / s_w) * s_w) + decomposed(np.where(large, 0, x), w, threshold)


def decomposed_by_columns(x, w, threshold, keep_float=True):
    """As this course had it once: the weights' scales without the outlier columns."""
    small = ~has_outlier(x, threshold)
    return decomposed(x, w, threshold, scales=lambda rest, w: (token_scales(rest, 8), token_scales(w[:, small], 8)),
                      in_float=w if keep_float else None)


def decomposed_by(dtype, quantized):
    """In one floating-point type; ``quantized`` maps rows and their largest magnitudes to codes."""
    def function(x, w, threshold):
        x, w = x.astype(dtype), w.astype(dtype)
        large = has_outlier(x, threshold)
        most_x, most_w = (abs(m).max(1, keepdims=True) for m in (x[:, ~large], w))
        codes, unit = quantized(w, most_w), dtype(127)
        sums = quantized(x[:, ~large], most_x) @ codes[:, ~large].T
        return sums * (most_x / unit) * (most_w / unit).T + x[:, large] @ (codes * (most_w / unit))[:, large].T

    return function


def decomposed_loops(x, w, threshold):
    large = [any(abs(v) >= threshold for v in column) for column in zip(*x, strict=True)]
    y = []
    for a in x.tolist():
        y.append([])
        s = max(abs(v) for v, out in zip(a, large, strict=True) if not out) / 127
        for b in w.tolist():
            t = max(map(abs, b)) / 127
            terms = [p * t * round(q / t) if out else s * round(p / s) * t * round(q / t)
                     for p, q, out in zip(a, b, large, strict=True)]
            y[-1].append(sum(terms))
    return y


def decomposed_in_int32(x, w, threshold):
    x, w = torch.tensor(x), torch.tensor(w)
    large = (x.abs() >= threshold).any(0)
    s_x, s_w = (m.abs().amax(1, keepdim=True) / 127 for m in (x[:, ~large], w))
    q_x, q_w = ((m / s).round().to(torch.int8) for m, s in ((x[:, ~large], s_x), (w, s_w)))
    integers = q_x.to(torch.int32) @ q_w[:, ~large].to(torch.int32).T
    return x[:, large] @ (s_w * q_w)[:, large].T + integers * (s_x @ s_w.T)


MISTAKES = [
    ("token_scales", partial(token_scales, largest=lambda x: abs(x).max(0)), "one scale for each channel"),
    ("token_scales", partial(token_scales, largest=lambda x: abs(x).max()), "one scale for the whole tensor"),
    ("token_scales", lambda x, bits: max(token_scales(x, bits)), "one scale for the whole tensor"),
    ("token_scales", partial(token_scales, largest=lambda x: abs(x).max(1, keepdims=True)), "leave keepdims out"),
    ("token_scales", partial(token_scales, largest=lambda x: x.max(1)), "absolute value is missing"),
    ("token_scales", lambda x, bits: token_scales(x, bits, steps=2 ** (bits - 1)), "127 for 8 bits"),
    ("token_scales", lambda x, bits: token_scales(x, bits, steps=2**bits - 1), "only half of the 2^bits codes"),
    ("token_scales", lambda x, bits: token_scales(x, bits, steps=2**bits - 1, largest=partial(np.ptp, axis=1)),
     "scale of the zero-point scheme"),
    ("token_scales", lambda x, bits: 1 / token_scales(x, bits), "This is 1 / s"),
    ("decompose", lambda x, w, threshold: x @ w.T, "product in float"),
    ("decompose", partial(decomposed, large=lambda x, threshold: has_outlier(x, 1e9)), "the outliers too"),
    ("decompose", partial(decomposed, parts=(0, 1)), "outlier channels are lost"),
    ("decompose", partial(decomposed, parts=(1, 0)), "the float part alone"),
    ("decompose", partial(decomposed, everywhere=True), "taken from all channels"),
    ("decompose", decomposed_by_columns, "nobody knows which columns those will be: one scale for each whole row"),
    ("decompose", partial(decomposed_by_columns, keep_float=False), "take whole rows"),
    ("decompose", lambda x, w, threshold: decomposed(x, w, threshold, in_float=w), "dequantize them"),
    ("decompose", partial(decomposed, scales=lambda x, w: (token_scales(x, 8), np.full(len(w), abs(w).max() / 127))),
     "Each output, a row of w, has its own"),
    ("decompose", partial(decomposed, large=lambda x, threshold: (abs(x) >= threshold).all(0)), "use any()"),
    ("decompose", partial(decomposed, large=lambda x, threshold: (x >= threshold).any(0)), "absolute value is missing"),
    ("decompose", decomposed_value_by_value, "Single values were taken out"),
]
RIGHT = [
    ("token_scales", token_scales),
    ("token_scales", lambda x, bits: [max(map(abs, row)) / (2 ** (bits - 1) - 1) for row in x.tolist()]),
    ("token_scales", lambda x, bits: np.maximum(x.max(1), -x.min(1)).astype(np.float32) / (2 ** (bits - 1) - 1)),
    ("token_scales", lambda x, bits: torch.tensor(x).abs().amax(1) / (2 ** (bits - 1) - 1)),
    ("token_scales", lambda x, bits: affine.absmax_params(x, bits, axis=0).scale),
    ("decompose", decomposed),
    ("decompose", decomposed_loops),
    ("decompose", decomposed_in_int32),
    *[("decompose", decomposed_by(dtype, quantized)) for dtype in (np.float32, np.float64) for quantized in (
        lambda m, most: np.rint(m * (127 / most)), lambda m, most: np.rint(127 * m / most),
        lambda m, most: np.rint(m / (most / 127)))],
    ("decompose", lambda x, w, threshold: decomposed(x, w, threshold, large=lambda x, t: abs(x).max(0) > t)),
]
FIRST_CASES = [  # how the first case of a check is told
    ("token_scales", "For x = [[0.5, -14.0, 2.0], [1.0, 0.7, -0.35]], bits = 4: expected [2, 0.142857], "),
    ("decompose", "For x = [[0.3, 9.0, -1.0, -7.0], [-0.5, 0.4, 0.9, -8.0]], w = [[0.5, 0.2, -0.7, 0.1], [2.0, 1.0, "
                  "-3.0, 4.0]], threshold = 6: expected [1.94142, -15.3339, -1.5967, -35.304], "),
]


def test_what_is_asked():
    assert [(np.shape(x), bits) for x, bits in asked("token_scales", token_scales)] == [((2, 3), 4), ((64, 576), 8)]
    for x, w, threshold in asked("decompose", decomposed):
        outlying = has_outlier(np.array(x), threshold)
        assert np.shape(w)[1] == len(outlying) == {2: 4, 64: 576}[len(x)]
        assert 0 < sum(outlying) < 0.5 * len(outlying) or len(x) == 2
