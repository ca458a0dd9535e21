"""The exercises on weights of four bits: what is right, and the misconceptions that their checks know."""

import numpy as np
import torch

from qlab.gptq import compensated, factor, hessian
from tests.exercises.checks import asked


def column(w, u, j, step, *, passed=lambda error, u, j: error / u[j, j], row=lambda u, j: u[j], only=True):
    """One column's update, with one thing wrong."""
    w = np.array(w)
    rounded = np.round(w[:, j] / step) * step
    error = passed(w[:, j] - rounded, u, j)
    for k in range(j + 1, w.shape[1]):
        w[:, k] -= error * row(u, j)[k]
    w[:, j] = rounded if only else w[:, j]
    return w


def scales(x, alpha, *, of=lambda x: abs(x).mean(0), norm=lambda s: (s.max() * s.min()) ** 0.5):
    s = of(x) ** alpha
    return s / norm(s)


def roofline(weights, bits, tokens, bandwidth, rate):
    return max(weights * bits / (8 * bandwidth), tokens * weights / (rate / 2))


MISTAKES = [
    ("group_bits", lambda bits, size: (bits * size + 16) / size, "zero-point is missing"),
    ("group_bits", lambda bits, size: bits + (32 + bits) / size, "not 32"),
    ("group_bits", lambda bits, size: bits + (16 + 16) / size, "bits of one weight"),
    ("group_bits", lambda bits, size: 2 * bits + 16, "divide them by it"),
    ("group_bits", lambda bits, size: (size + 1) * bits + 16, "what a group takes"),
    ("group_bits", lambda bits, size: (bits + 16) / size, "itself is missing"),
    ("group_bits", lambda bits, size: (bits * size + 2) / size, "two numbers"),
    ("column", lambda *a: column(*a, passed=lambda error, u, j: -error / u[j, j]), "is subtracted"),
    ("column", lambda *a: column(*a, passed=lambda error, u, j: error), "not divided by U_jj"),
    ("column", lambda *a: column(*a, passed=lambda error, u, j: error / u[j, j] / u[j, j]), "twice"),
    ("column", lambda *a: column(*a, row=lambda u, j: u[:, j]), "column j of U"),
    ("column", lambda *a: column(*a, only=False), "left as it was"),
    ("column", lambda w, u, j, step: np.rint(w / step) * step, "All columns were rounded"),
    ("column", lambda *a: column(*a, passed=lambda error, u, j: error, row=lambda u, j: np.ones(len(u))),
     "the same share"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, norm=lambda s: 1), "is missing"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, of=lambda x: abs(x).max(0)), "as in SmoothQuant"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, of=lambda x: abs(x.mean(0))), "cancel"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, of=lambda x: abs(x).mean(1)), "for each token"),
    ("awq_scales", lambda x, alpha: 1 / scales(x, alpha), "This is 1 / s"),
    ("awq_scales", lambda x, alpha: scales(x, 1 - alpha), "changed places"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, norm=lambda s: s.max() * s.min()), "The root is missing"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, norm=np.mean), "the mean of s"),
    ("awq_scales", lambda x, alpha: scales(x, alpha, norm=np.max), "the largest s"),
    ("roofline", lambda w, b, t, bandwidth, rate: w * b / 8 / bandwidth + 2 * w * t / rate, "This is the sum"),
    ("roofline", lambda w, b, t, bandwidth, rate: min(w * b / 8 / bandwidth, 2 * w * t / rate), "is the computing"),
    ("roofline", lambda w, b, t, bandwidth, rate: roofline(w, 8 * b, t, bandwidth, rate), "8 bits each"),
    ("roofline", lambda w, b, t, bandwidth, rate: roofline(w, b, t, bandwidth, 2 * rate), "two operations"),
    ("roofline", lambda w, b, t, bandwidth, rate: roofline(w, b, 1, bandwidth, rate), "computes one token"),
    ("roofline", lambda w, b, t, bandwidth, rate: t * roofline(w, b, 1, bandwidth, rate), "once for each"),
    ("roofline", lambda w, b, t, bandwidth, rate: w * b / 8 / bandwidth, "This is the reading"),
    ("roofline", lambda w, b, t, bandwidth, rate: 2 * w * t / rate, "This is the computing"),
]
RIGHT = [
    ("group_bits", lambda bits, size: bits + (16 + bits) / size),
    ("group_bits", lambda bits, size: ((size + 1) * bits + 16) / size),
    ("column", column),
    ("column", lambda w, u, j, step: (w - np.outer(w[:, j] - np.rint(w[:, j] / step) * step, u[j] / u[j, j]))),
    ("column", lambda w, u, j, step: torch.tensor(column(w, u, j, step))),
    ("column", lambda w, u, j, step: np.hstack([w[:, :j], w[:, j:] - np.outer(
        (w[:, j] - np.round(w[:, j] / step) * step) / u[j, j], u[j, j:])])),  # column j by the update, too
    ("awq_scales", scales),
    ("awq_scales", lambda x, alpha: np.exp(alpha * (np.log(abs(x).mean(0)) - np.mean(
        [np.log(abs(x).mean(0)).max(), np.log(abs(x).mean(0)).min()])))),
    ("awq_scales", lambda x, alpha: scales(torch.tensor(x), alpha)),
    ("roofline", roofline),
    ("roofline", lambda w, b, t, bandwidth, rate: np.maximum(w * b / 8 / bandwidth, 2 * w * t / rate)),
]
FIRST_CASES = [  # how the first case of a check is told
    ("awq_scales", "For x = [[100.0, -24.0, 3.0], [-28.0, 8.0, 5.0]], alpha = 0.5: expected [2, 1, 0.5], "),
]


def test_columns_one_after_the_other_are_gptq():
    """The exercise's update, repeated, gives the codes of qlab.gptq."""
    chance = np.random.default_rng(0)
    w, x = chance.normal(size=(4, 6)), chance.normal(size=(20, 6)) @ chance.normal(size=(6, 6))
    found = factor(hessian(x))
    done = compensated(torch.from_numpy(w), found, 16, symmetric=True)
    step = float(done.params.scale[0])
    row = w[:1]
    for j in range(6):
        row = column(row, found.upper.numpy(), j, step)
    np.testing.assert_allclose(row[0], step * done.codes[0].numpy(), rtol=1e-9)


def test_what_is_asked():
    shapes = [(np.shape(w), np.shape(u), j, step) for w, u, j, step in asked("column", column)]
    assert shapes == [((2, 3), (3, 3), 0, 1.0), ((2, 3), (3, 3), 1, 1.0), ((137, 48), (48, 48), 7, 0.1)]
    for _, u, *_ in asked("column", column):
        assert np.array_equal(np.triu(u), u) and (np.diag(u) > 0).all()
