"""The checks of the exercises: right, unanswered, nonsense, and every misconception they claim to know."""

import ast
import math
import re
import struct
import subprocess
import sys
from fractions import Fraction
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qlab import (
    affine,
    calibration,
    digits,
    exercises,
    floats,
    integer,
    outliers,
    ptq,
    qat,
    samples,
    smoothquant,
    spinquant,
)
from qlab.exercises import checking

NOTEBOOKS = sorted(Path(__file__).parents[2].joinpath("notebooks").glob("*.ipynb"))


SEVEN = [5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8]


def value(sign, exponent, mantissa, *, leading=1.0, bias=127):
    """What the fields mean, with one thing wrong."""
    fraction = int(mantissa) / 8388608
    if exponent == 0:
        return math.ldexp(fraction, -126) * (1 - 2 * sign)
    return math.ldexp(leading + fraction, exponent - bias) * (1 - 2 * sign)


def subnormal(leading, power):
    """Right where the exponent is not 0."""
    return lambda s, e, m: value(s, e, m) if e else (1 - 2 * s) * (leading + m / 8388608) * 2.0**power


def fields(x, sign=(0, 1), exponent=lambda e: e + 127, mantissa=lambda fraction: int(fraction * 8388608)):
    """(sign, exponent, mantissa), with one thing wrong."""
    fraction, e = math.frexp(abs(x))
    return sign[x < 0], exponent(e - 1), mantissa(2 * fraction - 1)


def gap(x, mantissa_bits, exponent):
    return math.ldexp(1, exponent - mantissa_bits)


def absmax(x, bits, *, steps=None, largest=lambda x: max(abs(x)), rounded=np.rint):
    s = largest(x) / (steps or 2 ** (bits - 1) - 1)
    return s, rounded(x / s)


def zero_point(x, bits, *, steps=None, ends=lambda x: (min(0, *x), max(0, *x)), z=None):
    alpha, beta = ends(x)
    s = (beta - alpha) / (steps or 2**bits - 1)
    return s, z(alpha / s) if z else round(-alpha / s) - 2 ** (bits - 1)


def half_up(v):
    return -np.ceil(-v - 0.5)


def half_away(v):
    return np.sign(v) * (abs(v) + 0.5).astype(int)


def clip_error(x, alpha, beta):
    return x - np.clip(x, alpha, beta)


def fold(weight, bias, gamma, beta, mean, variance, eps, *, gain=lambda g, v, eps: g / (v + eps) ** 0.5,  # noqa: PLR0917
         weights=lambda w, k: np.stack([f * kernels for f, kernels in zip(k, w, strict=True)]),
         biases=lambda k, b, beta, mu: k * b + beta - k * mu):
    """The folded (weight, bias), with one thing wrong."""
    k = gain(gamma, variance, eps)
    return weights(weight, k), biases(k, bias, beta, mean)


def rounded(x, s, low, high):
    return torch.round(x / s).clip(low, high) * s


def half_away_ste(x, s, low, high):
    return x + (torch.as_tensor(half_away((x / s).detach().numpy())).clip(low, high) * s - x).detach()


class Staircase(torch.autograd.Function):
    """x̂, with the gradient that ``inside`` makes of x / s and the two ends, times the one that comes."""

    @staticmethod
    def forward(ctx, x, s, low, high, inside):  # noqa: PLR0917
        ctx.save_for_backward(inside(x / s, low, high))
        return rounded(x, s, low, high)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient, None, None, None, None


def staircase(inside):
    return lambda *arguments: Staircase.apply(*arguments, inside)


def one_inside(u, low, high):
    return ((low < u) & (u < high)).float()


def multiplier(m, *, power=31, whole=round):
    """(m0, shift) by doubling and halving, without a care for m0 = 2^31."""
    shift = 0
    while m < 0.5:
        m, shift = 2 * m, shift + 1
    while m >= 1:
        m, shift = m / 2, shift - 1
    return whole(m * 2**power), shift


def safe_multiplier(m):
    m0, shift = multiplier(m)
    return (m0, shift) if m0 < 2**31 else (m0 >> 1, shift - 1)


def token_scales(x, bits, *, steps=None, largest=lambda x: abs(x).max(1)):
    return largest(x) / (steps or 2 ** (bits - 1) - 1)


def has_outlier(x, threshold):
    return (abs(x) >= threshold).any(0)


def decomposed(x, w, threshold, *, large=has_outlier, scales=lambda x, w: (token_scales(x, 8), token_scales(w, 8)),
               ranges=lambda m, small: m[:, small], parts=(1, 1)):
    """x wᵀ in two parts, with one thing wrong."""
    outliers = large(x, threshold)
    small = ~outliers
    s_x, s_w = scales(ranges(x, small), ranges(w, small))
    q_x, q_w = np.rint(x[:, small].T / s_x).T, np.rint(w[:, small].T / s_w).T
    return parts[0] * (x[:, outliers] @ w[:, outliers].T) + parts[1] * np.outer(s_x, s_w) * (q_x @ q_w.T)


def decomposed_value_by_value(x, w, threshold):
    large = abs(x) >= threshold
    return np.where(large, x, 0) @ w.T + decomposed(np.where(large, 0, x), w, threshold)


def peaks(m):
    return abs(m).max(0)


def smoothing(x, w, alpha, *, of_x=peaks, of_w=peaks, powers=lambda alpha: (alpha, alpha - 1)):
    """s of each channel, with one thing wrong."""
    p, q = powers(alpha)
    return of_x(x) ** p * of_w(w) ** q


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
    ("decode", partial(value, leading=0.0), "leading 1 is missing"),
    ("decode", partial(value, bias=0), "133 means 2**(133 − 127)"),
    ("decode", lambda s, e, m: value(s, 0, m) if e == 0 else value(s, int(np.uint8(e).astype(np.int8)), m, bias=0),
     "not two's complement"),
    ("decode", partial(value, bias=128), "not 128"),
    ("decode", lambda s, e, m: (1 - 2 * s) * math.ldexp(1 + m, e - 127), "divide mantissa by 2**23"),
    ("decode", lambda s, e, m: (1 - 2 * s) * m * 2 ** (e - 127), "divide mantissa by 2**23"),
    ("decode", lambda s, e, m: (1 - 2 * s) * math.ldexp(1 + m / 10 ** len(str(m)), e - 127), "not decimal"),
    ("decode", lambda s, e, m: value(s, e, m) * (1 + m / (2**23 - 1)) / (1 + m / 2**23), "largest mantissa"),
    ("decode", lambda s, e, m: value(0, e, m), "Sign 1 means minus"),
    ("decode", lambda s, e, m: s * value(0, e, m), "Sign 1 means minus"),
    ("decode", subnormal(1, -127), "Exponent 0 is special"),
    ("decode", subnormal(0, -127), "as at exponent 1"),
    ("decode", subnormal(1, -126), "zero could not be written"),
    ("decode", lambda s, e, m: value(s, e, m) if e else 0, "only if all mantissa bits are 0"),
    ("encode", partial(fields, sign=(1, -1)), "not −1 and +1"),
    ("encode", partial(fields, sign=(1, 0)), "1 for a negative number"),
    ("encode", partial(fields, sign=(0, 0)), "1 for a negative number"),
    ("encode", partial(fields, sign=(1, 1)), "1 for a negative number"),
    ("encode", partial(fields, exponent=lambda e: e), "plus the bias"),
    ("encode", partial(fields, exponent=lambda e: e + 128), "127, not 128"),
    ("encode", partial(fields, exponent=lambda e: e + 126), "127, not 126"),
    ("encode", lambda x: (int(x < 0), int(math.log2(abs(x))) + 127, fields(x)[2]), "cuts off towards 0"),
    ("encode", partial(fields, mantissa=lambda f: int((1 + f) * 2**22)), "comes back as −123.3125"),
    ("encode", partial(fields, mantissa=lambda f: int((1 + f) * 2**23)), "has 24 bits"),
    ("encode", partial(fields, mantissa=lambda f: int(f"{int(f * 2**23):023b}".rstrip("0") or "0", 2)), "their place"),
    ("encode", partial(fields, mantissa=lambda f: f), "fraction as an integer"),
    ("encode", partial(fields, mantissa=lambda f: 1 + f), "Drop the leading 1, and multiply"),
    ("encode", partial(fields, sign=(1, -1), exponent=lambda e: e), "not −1 and +1"),
    ("encode", partial(fields, exponent=lambda e: e, mantissa=lambda f: f), "plus the bias"),
    ("encode", lambda x: tuple(map(np.binary_repr, fields(x), (1, 8, 23))), "as integers"),
    ("spacing", lambda x, m: 2**-m, "machine epsilon"),
    ("spacing", lambda x, m: abs(x) / 2**m, "same spacing"),
    ("spacing", lambda x, m: gap(x, m + 1, math.frexp(x)[1] - 1), "do not count it in"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1) / 2, "largest error of rounding"),
    ("spacing", lambda x, m: gap(x, m, math.ceil(math.log2(abs(x)))), "not its ceiling"),
    ("spacing", lambda x, m: gap(x, m, round(math.log2(abs(x)))), "nor the nearest integer"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1]), "math.frexp gives one more"),
    ("spacing", lambda x, m: gap(x, m, math.frexp(np.nextafter(abs(x), 0))[1] - 1), "next smaller number"),
    ("spacing", lambda x, m: math.copysign(1, x) * gap(x, m, math.frexp(x)[1] - 1), "A distance is positive"),
    ("absmax", lambda x, bits: absmax(x, bits)[::-1], "s first, then q"),
    ("absmax", lambda x, bits: (1 / absmax(x, bits)[0], absmax(x, bits)[1]), "This is 1 / s"),
    ("absmax", partial(absmax, largest=max), "Take the maximum of |x|"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=(2**bits - 1) / 2), "torch's observers"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=(2**bits - 1) / 2, rounded=np.trunc), "torch's observers"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=2 ** (bits - 1)), "would have no code"),
    ("absmax", lambda x, bits: absmax(x, bits, steps=2**bits - 1), "codes have a sign"),
    ("absmax", partial(absmax, steps=255, largest=np.ptp), "scale of the zero-point mapping"),
    ("absmax", partial(absmax, steps=127), "127 belongs to 8 bits"),
    ("absmax", lambda x, bits: (absmax(x, bits)[0], np.rint(x * absmax(x, bits)[0])), "multiplying is the way back"),
    ("absmax", partial(absmax, rounded=np.array), "not yet rounded"),
    ("absmax", partial(absmax, rounded=lambda v: v.astype(int)), "36.9 becomes 36"),
    ("absmax", partial(absmax, rounded=lambda v: v // 1), "The floor goes down"),
    ("absmax", partial(absmax, rounded=half_up), "A half goes up"),
    ("absmax", partial(absmax, rounded=half_away), "A half goes away from 0"),
    ("zero_point", lambda x, bits: zero_point(x, bits)[::-1], "s first, then z"),
    ("zero_point", lambda x, bits: (1 / zero_point(x, bits)[0], -23), "This is 1 / s"),
    ("zero_point", partial(zero_point, ends=lambda x: (min(x), max(x))), "padding and ReLU"),
    ("zero_point", partial(zero_point, ends=lambda x: (min(x), max(*x, 0))), "[1, 3] becomes [0, 3]"),
    ("zero_point", partial(zero_point, ends=lambda x: (min(*x, 0), max(x))), "[−3, −1] becomes [−3, 0]"),
    ("zero_point", lambda x, bits: zero_point(x, bits, steps=2**bits), "number of levels"),
    ("zero_point", lambda x, bits: zero_point(x, bits, steps=2**bits - 2), "narrow range"),
    ("zero_point", lambda x, bits: (absmax(x, bits)[0], 0), "scale of absmax"),
    ("zero_point", partial(zero_point, ends=lambda x: (0, max(abs(x)))), "not from 0 to max|x|"),
    ("zero_point", partial(zero_point, steps=255), "255 belongs to 8 bits"),
    ("zero_point", partial(zero_point, z=lambda a: -128 - a), "z has to be an integer"),
    ("zero_point", lambda x, bits: (zero_point(x, bits)[0], -zero_point(x, bits)[1]), "z has the other sign"),
    ("zero_point", partial(zero_point, z=lambda a: -128 + round(a)), "Mind the sign"),
    ("zero_point", partial(zero_point, z=lambda a: -round(a)), "unsigned codes"),
    ("zero_point", partial(zero_point, z=round), "where α lies"),
    ("zero_point", partial(zero_point, z=lambda a: -128 - round(a)), "lowest code of 8 bits"),
    ("zero_point", partial(zero_point, z=lambda a: int(-128 - a)), "z is cut off"),
    ("zero_point", lambda x, bits: zero_point(x, bits, z=lambda a: int(-a) - 2 ** (bits - 1)), "z is cut off"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s) + z, "codes outside"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s + z), "formula of the notes"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s + z).clip(low, high), "another even neighbour"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) - z).clip(low, high), "z is subtracted"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s).clip(low, high) + z, "z is added after the clip"),
    ("quantize", lambda x, s, z, low, high: np.int8(np.int32(np.rint(x / s)) + z).clip(low, high), "wraps around"),
    ("quantize", lambda x, s, z, low, high: np.int8(np.int32(np.rint(x / s)) + z), "wraps around"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(-128, 127), "arguments qmin and qmax"),
    ("quantize", lambda x, s, z, low, high: (np.rint(x * s) + z).clip(low, high), "x is multiplied by s"),
    ("quantize", lambda x, s, z, low, high: np.rint(x / s).clip(low, high), "z is missing"),
    ("quantize", lambda x, s, z, low, high: (x / s + z).clip(low, high), "These are not integers"),
    ("quantize", lambda x, s, z, low, high: ((x / s).astype(int) + z).clip(low, high), "The fraction is cut off"),
    ("quantize", lambda x, s, z, low, high: (x // s + z).clip(low, high), "The floor goes down"),
    ("quantize", lambda x, s, z, low, high: (half_up(x / s) + z).clip(low, high), "A half goes up"),
    ("quantize", lambda x, s, z, low, high: (half_away(x / s) + z).clip(low, high), "A half goes away from 0"),
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
    ("fold_batch_norm", lambda *arguments: fold(*arguments)[::-1], "return the weight first"),
    ("fold_batch_norm", partial(fold, weights=np.multiply), "NumPy lines up the last axes"),
    ("fold_batch_norm", partial(fold, weights=lambda w, k: np.einsum("oihw,i->oihw", w, k)), "along axis 1"),
    ("fold_batch_norm", partial(fold, weights=lambda w, k: w), "still the old one. Batch norm multiplies"),
    ("fold_batch_norm", partial(fold, gain=lambda g, v, eps: g / (v + eps)), "square root is missing"),
    ("fold_batch_norm", partial(fold, gain=lambda g, v, eps: g / v**0.5), "eps has no effect"),
    ("fold_batch_norm", partial(fold, gain=lambda g, v, eps: g / (v + 1e-5) ** 0.5), "eps has no effect"),
    ("fold_batch_norm", partial(fold, gain=lambda g, v, eps: g / (v**0.5 + eps)), "eps is added to the root"),
    ("fold_batch_norm", partial(fold, gain=lambda g, v, eps: (v + eps) ** 0.5 / g), "upside down"),
    ("fold_batch_norm", partial(fold, gain=lambda g, v, eps: (v + eps) ** -0.5), "γ is missing"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: beta), "β alone"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: b), "the bias is still the old one"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: b * k + beta), "the mean is missing"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: beta - k * mu), "old bias is lost"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: b + beta - k * mu), "old bias must be scaled"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: b * k + beta - mu), "μ is scaled as well"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: k * (b - mu)), "β is missing"),
    ("straight_through", rounded, "no gradient arrives"),
    ("straight_through", staircase(lambda u, low, high: 0 * u), "no gradient arrives"),
    ("straight_through", lambda *arguments: rounded(*arguments).detach(), "does not depend on x"),
    ("straight_through", lambda *arguments: rounded(*arguments).detach().numpy(), "does not depend on x"),
    ("straight_through", torch.no_grad()(rounded), "does not depend on x"),
    ("straight_through", lambda *arguments: rounded(*arguments).detach().requires_grad_(), "does not depend on x"),
    ("straight_through", lambda x, *rest: (rounded(x, *rest) - x).detach() + x, "clip is inside of detach()"),
    ("straight_through", staircase(lambda u, low, high: 0 * u + 1), "clip is inside of detach()"),
    ("straight_through", lambda x, s, low, high: (x / s).clip(low, high) + (
        rounded(x, s, low, high) - (x / s).clip(low, high)).detach(), "1 / s inside"),
    ("straight_through", lambda x, s, low, high: qat.round_ste(x / s).clip(low, high), "integer codes q"),
    ("straight_through", lambda x, s, low, high: rounded(x, s, low, high) / s, "integer codes q"),
    ("straight_through", lambda x, s, low, high: s * qat.round_ste(x / s), "Nothing is clipped"),
    ("straight_through", lambda x, s, low, high: x.clip(s * low, s * high), "not rounded"),
    ("straight_through", half_away_ste, "A half goes away from 0"),
    ("straight_through", lambda x, s, low, high: torch.floor(x / s + 0.5).clip(low, high) * s, "A half goes up"),
    ("multiplier", lambda m: safe_multiplier(m)[::-1], "return m0 first"),
    ("multiplier", partial(multiplier, power=0, whole=float), "This is the fraction"),
    ("multiplier", partial(multiplier, whole=float), "m0 is an integer"),
    ("multiplier", lambda m: (int(m * 2**31), 0), "with no shift"),
    ("multiplier", lambda m: (safe_multiplier(m)[0], -safe_multiplier(m)[1]), "the other sign"),
    ("multiplier", lambda m: (safe_multiplier(m)[0], safe_multiplier(m)[1] + 31), "This shift is the total"),
    ("multiplier", partial(multiplier, power=15), "m0 has 16 bits"),
    ("multiplier", partial(multiplier, power=16), "m0 has 16 bits"),
    ("multiplier", partial(multiplier, power=32), "not 1 · 2^−2"),
    ("multiplier", lambda m: (multiplier(m, power=32)[0], multiplier(m)[1] + 1), "not 1 · 2^−2"),
    ("multiplier", lambda m: (round(m * 2 ** (31 + math.floor(-math.log2(m)))), math.floor(-math.log2(m))),
     "not 1 · 2^−2"),
    ("multiplier", partial(multiplier, whole=int), "cut off"),
    ("multiplier", lambda m: (min(multiplier(m)[0], 2**31 - 1), multiplier(m)[1]), "held at 2^31 − 1"),
    ("multiplier", multiplier, "m is so close to 1"),
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
    ("decompose", partial(decomposed, ranges=lambda m, small: m), "taken from all channels"),
    ("decompose", partial(decomposed, scales=lambda x, w: (token_scales(x, 8), np.full(len(w), abs(w).max() / 127))),
     "Each output, a row of w, has its own"),
    ("decompose", partial(decomposed, large=lambda x, threshold: (abs(x) >= threshold).all(0)), "use any()"),
    ("decompose", partial(decomposed, large=lambda x, threshold: (x >= threshold).any(0)), "absolute value is missing"),
    ("decompose", decomposed_value_by_value, "Single values were taken out"),
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
    ("fold", lambda gain, w, s: (gain * s, w / s), "other way round"),
    ("fold", lambda gain, w, s: (gain / s, w @ np.diag(1 / s)), "Both were divided"),
    ("fold", lambda gain, w, s: (gain / s, w), "weights did not change"),
    ("fold", lambda gain, w, s: (gain, np.multiply(w, s)), "gain did not change"),
    ("fold", lambda gain, w, s: (gain / s, (w.T * s).T), "multiplies the rows"),
    ("cayley", lambda a, step: cayley(a, step).T, "turns the other way"),
    ("cayley", lambda a, step: cayley(a, -step), "turns the other way"),
    ("cayley", lambda a, step: cayley(a, 2 * step), "half is missing"),
    ("cayley", lambda a, step: np.eye(len(a)) + step * a, "straight step along the tangent"),
    ("cayley", lambda a, step: np.identity(len(a)) + a * step / 2, "inverse of the first bracket"),
    ("cayley", lambda a, step: np.linalg.inv(np.eye(len(a)) - step / 2 * a) * (np.eye(len(a)) + step / 2 * a), "`@`"),
    ("cayley", lambda a, step: (np.eye(len(a)) + step / 2 * a) / (np.eye(len(a)) - step / 2 * a), "divides entry by"),
]
CHECKS = ["decode", "encode", "spacing", "absmax", "zero_point", "quantize", "clipping_error", "percentile_range",
          "best_range", "fold_batch_norm", "straight_through", "multiplier", "token_scales", "decompose",
          "smoothing_scales", "fold", "hadamard", "cayley"]


def as_word(sign, exponent, mantissa):
    return sign << 31 | exponent << 23 | mantissa


def in_float32(sign, exponent, mantissa):
    two = np.float32(2)
    normal = np.float32(exponent > 0)
    return np.float32(-1) ** sign * (normal + np.float32(mantissa) / two**23) * two ** (max(exponent, 1) - 127)


def from_text(x):
    bits = "".join(f"{byte:08b}" for byte in struct.pack(">f", x))
    return [int(bits[:1], 2), int(bits[1:9], 2), int(bits[9:], 2)]


def by_halving(x):
    significand, exponent = abs(x), 0
    while significand >= 2:
        significand, exponent = significand / 2, exponent + 1
    while significand < 1:
        significand, exponent = significand * 2, exponent - 1
    return x < 0, exponent + 127, (significand - 1) * 2**23


def single(x):
    return np.abs(x.astype(np.float32)).max(), x.astype(np.float32)


def absmax_float32(x, bits, *, by_reciprocal=False):
    largest, x = single(x)
    s = largest / np.float32(2 ** (bits - 1) - 1)
    return s, np.rint(x * (np.float32(1) / s) if by_reciprocal else x / s).astype(np.int8)


def absmax_float64(x, bits):
    s = np.abs(x.astype(np.float64)).max() / (2 ** (bits - 1) - 1)
    return [s, np.round(x.astype(np.float64) * (1 / s))]


def absmax_loops(x, bits):
    s = max(abs(v) for v in x) / (2 ** (bits - 1) - 1)
    return s, [round(v / s) for v in x]


def absmax_of_qlab(x, bits):
    params = affine.absmax_params(x, bits)
    return params.scale, affine.quantize(x, params)


def zero_point_float32(x, bits):
    low, high = np.minimum(single(x)[1].min(), 0), np.maximum(single(x)[1].max(), 0)
    s = (high - low) / np.float32(2**bits - 1)
    return np.array([s, np.rint(-low / s) - 2 ** (bits - 1)], np.float32)


def zero_point_from_above(x, bits):
    low, high = min(0.0, *x.tolist()), max(0.0, *x.tolist())
    return [(high - low) / (2**bits - 1), np.int8(2 ** (bits - 1) - 1 - round(high * (2**bits - 1) / (high - low)))]


def zero_point_of_qlab(x, bits):
    params = affine.zero_point_params(x, bits)
    return params.scale, params.zero_point


def by_torch(weight, bias, gamma, beta, mean, variance, eps):  # noqa: PLR0917
    weight, bias, gamma, beta, mean, variance = map(torch.tensor, (weight, bias, gamma, beta, mean, variance))
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, eps, gamma, beta)
    return tuple(parameter.detach().numpy() for parameter in folded)


def by_modules(weight, bias, *statistics):
    """With `qlab.ptq.fold_batch_norm`, in float32, from modules."""
    conv, norm = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:]), nn.BatchNorm2d(len(weight), eps=statistics[-1])
    with torch.no_grad():
        for parameter, array in zip((conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean,
                                     norm.running_var), (weight, bias, *statistics[:-1]), strict=True):
            parameter.copy_(torch.tensor(array))
    folded = ptq.fold_batch_norm(nn.Sequential(conv, norm))[0]
    return [folded.weight.detach().numpy(), folded.bias.tolist()]


def by_what_it_does(weight, bias, gamma, beta, mean, variance, eps):  # noqa: PLR0917
    """Batch norm of the convolution's answer to 0, and to 1 at one place."""
    def norm(y):
        return (y - mean) / np.sqrt(variance + eps) * gamma + beta

    at_0 = norm(bias)
    ones = [norm(bias + column) - at_0 for column in weight.reshape(len(bias), -1).T]
    return np.stack(ones, axis=1).reshape(weight.shape), at_0


def decomposed_by(dtype, quantized):
    """In one floating-point type; ``quantized`` maps rows and their largest magnitudes to codes."""
    def function(x, w, threshold):
        x, w = x.astype(dtype), w.astype(dtype)
        large = has_outlier(x, threshold)
        most_x, most_w = (abs(m[:, ~large]).max(1, keepdims=True) for m in (x, w))
        sums = quantized(x[:, ~large], most_x) @ quantized(w[:, ~large], most_w).T
        return sums * (most_x / dtype(127)) * (most_w / dtype(127)).T + x[:, large] @ w[:, large].T

    return function


def decomposed_loops(x, w, threshold):
    large = [any(abs(v) >= threshold for v in column) for column in zip(*x, strict=True)]
    y = []
    for a in x.tolist():
        y.append([])
        for b in w.tolist():
            inside = [(p, q) for p, q, out in zip(a, b, large, strict=True) if not out]
            s, t = (max(abs(v) for v in side) / 127 for side in zip(*inside, strict=True))
            whole = sum(round(p / s) * round(q / t) for p, q in inside)
            y[-1].append(s * t * whole + sum(p * q for p, q, out in zip(a, b, large, strict=True) if out))
    return y


def decomposed_in_int32(x, w, threshold):
    x, w = torch.tensor(x), torch.tensor(w)
    large = (x.abs() >= threshold).any(0)
    s_x, s_w = (m[:, ~large].abs().amax(1, keepdim=True) / 127 for m in (x, w))
    q_x, q_w = ((m[:, ~large] / s).round().to(torch.int8).to(torch.int32) for m, s in ((x, s_x), (w, s_w)))
    return x[:, large] @ w[:, large].T + (q_x @ q_w.T) * (s_x @ s_w.T)


RIGHT = [
    ("decode", value),
    ("decode", in_float32),
    ("decode", lambda *fields: np.uint32(as_word(*fields)).view(np.float32)),
    ("decode", lambda *fields: np.array(floats.decode(as_word(*fields), floats.FP32))),
    ("decode", lambda s, e, m: Fraction(1 - 2 * s) * (Fraction(m, 2**23) + (e > 0)) * Fraction(2) ** (max(e, 1) - 127)),
    ("encode", fields),
    ("encode", from_text),
    ("encode", by_halving),
    ("encode", lambda x: np.array(fields(x), np.float64)),
    ("encode", lambda x: np.float32(x).view(np.uint32) >> np.uint32([31, 23, 0]) & np.uint32([1, 255, 0x7FFFFF])),
    ("encode", lambda x: floats.fields(int(floats.encode(x, floats.FP32)), floats.FP32)),
    ("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1)),
    ("spacing", lambda x, m: 2 ** (math.floor(math.log2(abs(x))) - m)),
    ("spacing", lambda x, m: np.exp2(np.floor(np.log2(np.abs(np.float32(x)))) - np.float32(m))),
    ("spacing", lambda x, m: np.spacing(abs(x)) * 2 ** (52 - m)),
    ("spacing", lambda x, m: gap(x, m, int(math.log2(abs(x))))),  # |x| is at least 1
    ("absmax", absmax),
    ("absmax", absmax_float32),
    ("absmax", partial(absmax_float32, by_reciprocal=True)),
    ("absmax", absmax_float64),
    ("absmax", absmax_loops),
    ("absmax", absmax_of_qlab),
    ("zero_point", zero_point),
    ("zero_point", zero_point_float32),
    ("zero_point", zero_point_from_above),
    ("zero_point", zero_point_of_qlab),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(low, high).astype(np.int8)),
    ("quantize", lambda x, s, z, low, high: [min(max(round(v / s) + z, low), high) for v in x]),
    ("quantize", lambda x, s, z, low, high: np.rint(x.astype(float) / s).clip(low - z, high - z) + z),
    ("quantize", lambda x, s, z, low, high: (np.rint(single(x)[1] / np.float32(s)) + z).clip(low, high)),
    ("quantize", lambda x, s, z, low, high: (np.rint(single(x)[1] * np.float32(1 / s)) + z).clip(low, high)),
    ("quantize", lambda x, *params: affine.quantize(x, affine.QParams(*params))),
    ("clipping_error", lambda x, a, b: np.square(np.maximum(a - x, 0) + np.maximum(x - b, 0)).mean()),
    ("percentile_range", lambda x, p: np.quantile(x, [1 - p / 100, p / 100])),
    ("best_range", lambda x, bits: calibration.mse(x, bits, symmetric=True)[1]),
    ("fold_batch_norm", fold),
    ("fold_batch_norm", by_torch),
    ("fold_batch_norm", by_modules),
    ("fold_batch_norm", by_what_it_does),
    ("straight_through", lambda x, s, low, high: s * qat.round_ste((x / s).clip(low, high))),
    ("straight_through", lambda x, s, low, high: s * qat.round_ste(x / s).clip(low, high)),  # rint first
    ("straight_through", lambda x, s, low, high: x.clip(low * s, high * s) + (
        rounded(x, s, low, high) - x.clip(low * s, high * s)).detach()),
    ("straight_through", lambda x, s, low, high: torch.fake_quantize_per_tensor_affine(x, s, 0, low, high)),
    ("straight_through", lambda x, s, low, high: affine.fake_quantize(x, affine.QParams(s, 0, low, high)).detach()
     + one_inside((x / s).detach(), low, high) * (x - x.detach())),
    ("straight_through", staircase(one_inside)),
    ("multiplier", safe_multiplier),
    ("multiplier", integer.quantize_multiplier),
    ("multiplier", lambda m: np.array(integer.quantize_multiplier(m), np.float64)),
    ("multiplier", lambda m: max((Fraction(1, 2) <= Fraction(round(Fraction(m) * 2 ** (31 + n)), 2**31) < 1,
                                  round(Fraction(m) * 2 ** (31 + n)), n) for n in range(-31, 9))[1:]),
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
    ("decompose", lambda x, w, threshold: outliers.decompose(torch.tensor(x), torch.tensor(w), threshold).product),
    ("decompose", lambda *given: outliers.decompose(*(torch.as_tensor(a).float() for a in given)).product),
    ("decompose", lambda x, w, threshold: decomposed(x, w, threshold, large=lambda x, t: abs(x).max(0) > t)),
    ("smoothing_scales", smoothing),
    ("smoothing_scales", lambda x, w, alpha: (peaks(x) / peaks(w)) ** alpha * peaks(w) ** (2 * alpha - 1)),
    ("smoothing_scales", lambda x, w, alpha: [
        max(map(abs, a)) ** alpha / max(map(abs, b)) ** (1 - alpha) for a, b in zip(x.T, w.T, strict=True)]),
    ("smoothing_scales", lambda x, w, alpha: np.exp(alpha * np.log(peaks(single(x)[1]))
                                                    - (1 - alpha) * np.log(peaks(single(w)[1])))),
    ("smoothing_scales", lambda x, w, alpha: torch.tensor(x).abs().amax(0) ** alpha
     / torch.tensor(w).abs().amax(0) ** (1 - alpha)),
    ("smoothing_scales", lambda x, w, alpha: smoothquant.smoothing_scales(peaks(x), peaks(w), alpha)),
    ("hadamard", hadamard),
    ("hadamard", lambda k: hadamard(k).tolist()),
    ("hadamard", lambda k: torch.tensor(hadamard(k), dtype=torch.float32)),
    ("hadamard", lambda k: [[(-1) ** (i & j).bit_count() for j in range(2**k)] for i in range(2**k)]),
    ("hadamard", lambda k: reduce(np.kron, k * [np.array([[1.0, 1.0], [1.0, -1.0]])], np.eye(1))),
    ("hadamard", lambda k: spinquant.hadamard(2**k)),
    ("fold", lambda gain, w, s: [(gain / s).tolist(), (w @ np.diag(s)).tolist()]),
    ("fold", lambda gain, w, s: (torch.tensor(gain) / torch.tensor(s), torch.tensor(w) * torch.tensor(s))),
    ("cayley", cayley),
    ("cayley", lambda a, step: torch.linalg.solve(torch.eye(len(a)) - step / 2 * torch.tensor(a),
                                                  torch.eye(len(a)) + step / 2 * torch.tensor(a))),
    ("cayley", lambda a, step: (np.eye(len(a)) + step / 2 * a) @ np.linalg.inv(np.eye(len(a)) - step / 2 * a)),
]


def check(name, function):
    return getattr(exercises, f"check_{name}")(function)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "right"), RIGHT)
def test_right_in_many_ways(name, right):
    verdict = check(name, right)
    assert verdict.passed, verdict.text


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_misconception_is_recognised(name, wrong, hint):
    verdict = check(name, wrong)
    assert verdict.passed is False
    assert hint in verdict.text


def claimed():
    """(check, wrong idea, hint) of all checks that keep a list of misconceptions."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (exercises.floats, exercises.affine, exercises.calibration, exercises.networks,
                       exercises.activations, exercises.language_models):
            patch.setattr(module, "check", lambda _, cases, misconceptions, *rest, **options: misconceptions)
        for name in CHECKS:
            if name != "best_range":
                found += [(name, idea, hint) for idea, hint in check(name, None)]
    return found


@pytest.mark.parametrize(("name", "idea", "hint"), claimed())
def test_every_claimed_misconception_is_among_the_mistakes(name, idea, hint):
    assert any(phrase in hint for mistaken, _, phrase in MISTAKES if mistaken == name)


@pytest.mark.parametrize(("name", "idea", "hint"), claimed())
def test_no_hint_is_hidden_by_another(name, idea, hint):
    right = {"encode": fields, "absmax": absmax, "zero_point": zero_point, "fold_batch_norm": fold,
             "multiplier": safe_multiplier}.get(name)
    if name == "straight_through":
        idea = idea.args[0]  # the idea itself, not what its values and gradients are

    def mistaken(*arguments):
        answer = idea(*arguments)
        if isinstance(answer, tuple) and any(part is ... for part in answer):
            return tuple(a if w is ... else w for w, a in zip(answer, right(*arguments), strict=True))
        return answer

    assert hint in check(name, mistaken).text


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("answer", [None, ..., (None, None), (0.5, ...)])
def test_unanswered_is_no_error(name, answer):
    verdict = check(name, lambda *_: answer)
    assert verdict.passed is None
    assert repr(verdict) == "… Not answered yet."


class Hostile:
    def __array__(self, *_, **__):
        raise RuntimeError("no array")


ITSELF = [1]
ITSELF.append(ITSELF)
NONSENSE = [
    "text", object(), [], (), [1, [2]], np.nan, -1.0, {"a": 1}, 1j, np.zeros((2, 2)), np.array(None), b"", int, [None],
    10**400, (10**400, 1, 1), ("0", "1"), (0.1, "text"), (np.nan,) * 3, (1, 2, 3, 4), np.inf, -np.inf, Hostile(),
    ITSELF, (0.1, np.zeros((2, 2))), {1, 2}, np.array(["a", "b"]), (x for x in (1, 2)), np.datetime64("2020-01-01"),
    np.zeros(7),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda value: type(value).__name__)
def test_nonsense_is_wrong_not_a_crash(name, nonsense):
    assert check(name, lambda *_: nonsense).passed is False


@pytest.mark.parametrize("name", CHECKS)
def test_an_exception_is_told(name):
    verdict = check(name, lambda *_: 1 / 0)
    assert verdict.passed is False
    assert "ZeroDivisionError" in verdict.text


def test_the_tiny_case_is_printed_and_survives_a_function_that_writes_to_it():
    def writes(x, alpha, beta):
        x[:] = 0
        return 0.0

    said = [check("clipping_error", writes).text for _ in range(2)]
    assert said[0] == said[1]
    assert "x = [-4.0, -1.0, 0.0, 0.5, 2.0, 6.0], alpha = -2, beta = 3: expected 2.16667" in said[0]


@pytest.mark.parametrize(("name", "said"), [
    ("decode", "For sign = 1, exponent = 133, mantissa = 7159808 (the word 0xC2ED4000): expected -118.625, "),
    ("encode", "For x = -118.625: expected (1, 133, 7159808), "),
    ("spacing", "For x = 1000.0, mantissa_bits = 10 (FP16): expected 0.5, "),
    ("absmax", f"For x = {list(map(float, SEVEN))}, bits = 8: expected (0.0850394, [64, 36, -89, 0, -23, -54, 127]), "),
    ("zero_point", f"For x = {list(map(float, SEVEN))}, bits = 8: expected (0.0721176, -23), "),
    ("quantize", "For x = [-300.0, -5.0, -1.5, -1.0, 0.0, 1.0, 3.0, 394.0], s = 2, z = 3, qmin = -128, qmax = 127: "
                 "expected [-128, 1, 2, 3, 3, 3, 5, 127], "),
    ("fold_batch_norm", "For weight = [[1.0, 2.0], [3.0, 4.0]] (two outputs, two inputs, 1 × 1 kernels), bias = [5.0, "
                        "1.0], gamma = [8.0, 9.0], beta = [0.5, -2.0], mean = [1.0, 3.0], variance = [3.0, 8.0], "
                        "eps = 1: expected ([4, 8, 9, 12], [16.5, -8]), "),
    ("straight_through", "For x̂ where x = [-3.0, -0.75, -0.25, 0.2, 0.25, 0.75, 1.2, 9.0], s = 0.5, qmin = -4, "
                         "qmax = 3: expected [-2, -1, 0, 0, 0, 1, 1, 1.5], "),
    ("multiplier", "For m = 0.25: expected (1073741824, 1), "),
    ("token_scales", "For x = [[0.5, -14.0, 2.0], [1.0, 0.7, -0.35]], bits = 4: expected [2, 0.142857], "),
    ("decompose", "For x = [[0.3, 9.0, -1.0, -7.0], [-0.5, 0.4, 0.9, -8.0]], w = [[0.5, 0.2, -0.7, 0.1], [2.0, 1.0, "
                  "-3.0, 4.0]], threshold = 6: expected [1.95008, -15.3992, -1.60237, -35.3103], "),
    ("smoothing_scales", "For x = [[1.0, -16.0, 0.5], [-2.0, 9.0, 0.25]], w = [[0.5, 1.0, -4.0], [-2.0, 0.25, 1.0]], "
                         "alpha = 0.75: expected [1.41421, 8, 0.420448], "),
    ("hadamard", "For k = 1: expected [1, 1, 1, -1], "),
])
def test_the_first_case_is_tiny_and_tells_what_came(name, said):
    assert check(name, lambda *_: (7, 7.5)).text.split("\n")[0] == said + "your function gave (7, 7.5)."


def asked(name, right):
    """The arguments of all calls that a check makes, arrays as tuples."""
    calls = []

    def recorded(*arguments):
        calls.append(tuple(tuple(a.tolist()) if isinstance(a, np.ndarray) else a for a in arguments))
        return right(*arguments)

    assert check(name, recorded).passed
    return calls


def test_what_is_asked():
    decoded = asked("decode", value)
    assert {(0, 127, 0), (0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 254, 2**23 - 1)} < set(decoded)
    encoded = [x for (x,) in asked("encode", fields)]
    assert encoded[:4] == [-118.625, 1.0, 0.15625, 6.5]
    assert min(encoded, key=abs) < 0 and 1e20 < max(encoded) < 1e38
    assert all(np.float32(x) == x for x in encoded)
    spaced = asked("spacing", lambda x, m: gap(x, m, math.frexp(x)[1] - 1))
    assert {m for _, m in spaced} == {7, 10, 23} and min(abs(x) for x, _ in spaced) == 1
    mapped = asked("absmax", absmax)
    assert [(len(x), bits) for x, bits in mapped] == [(7, 8), (6, 4), (7, 8), (36_864, 4)]
    assert [max(x) < -min(x) for x, _ in mapped[:3]] == [False, False, True]
    assert [(len(x), bits) for x, bits in asked("zero_point", zero_point)] == [(7, 8), (3, 8), (3, 8), (73_728, 4)]
    assert [(len(x), *rest) for x, *rest in asked("quantize", dict(RIGHT)["quantize"])] == [
        (8, 2.0, 3, -128, 127), (73_728, 0.11, -3, -8, 7)]
    folded = asked("fold_batch_norm", fold)
    assert [np.shape(weight) for weight, *_ in folded] == [(2, 2, 1, 1), (2, 1, 2, 2)]
    assert [eps for *_, eps in folded] == [1, 1e-5]
    assert [(np.shape(x), bits) for x, bits in asked("token_scales", token_scales)] == [((2, 3), 4), ((64, 576), 8)]
    for x, w, threshold in asked("decompose", decomposed):
        outlying = has_outlier(np.array(x), threshold)
        assert np.shape(w)[1] == len(outlying) == {2: 4, 64: 576}[len(x)]
        assert 0 < sum(outlying) < 0.5 * len(outlying) or len(x) == 2
    for x, w, alpha in asked("smoothing_scales", smoothing):
        assert (np.shape(x), np.shape(w), alpha) in [((2, 3), (2, 3), 0.75), ((64, 576), (192, 576), 0.5)]
        assert peaks(np.array(x)).all() and peaks(np.array(w)).all()
    assert asked("hadamard", hadamard) == [(1,), (2,), (0,), (6,)]
    factors = [m for (m,) in asked("multiplier", safe_multiplier)]
    assert [multiplier(m)[1] for m in factors] == [1, 1, 7, 0, -1, -6, 0]
    assert [round(m * 2 ** (31 + multiplier(m)[1])) == 2**31 for m in factors] == [False] * 6 + [True]
    assert all(Fraction(m) * 2 ** (32 + multiplier(m)[1]) % 2 != 1 for m in factors)  # no tie


def test_folding_is_asked_of_the_real_network():
    weight, bias, *statistics, eps = asked("fold_batch_norm", fold)[1]
    model = digits.load()
    folded = ptq.fold_batch_norm(model).conv
    assert bias == (0, 0) and model.conv.bias is None and eps == model.conv_norm.eps
    mine = fold(np.array(weight), np.zeros(2), *map(np.array, statistics), eps)
    np.testing.assert_allclose(mine[0], folded.weight.detach()[:2, :, :2, :2], rtol=1e-5)
    np.testing.assert_allclose(mine[1], folded.bias.detach()[:2], rtol=1e-5)


def test_straight_through_asks_for_values_and_gradients_where_all_agree():
    calls = asked("straight_through", staircase(one_inside))
    assert [(len(x), *rest) for x, *rest in calls] == 2 * [(8, 0.5, -4, 3)] + 2 * [(73_704, 0.11, -8, 7)]
    for x, s, low, high in calls:
        assert x.dtype == torch.float32 and x.requires_grad and x.is_leaf
        u = x.detach().double() / s
        assert (u > high).any()
        beyond = torch.maximum(low - u, u - high)
        assert ((beyond < -1e-3) | (beyond > 0.5 + 1e-3)).all()
    assert (calls[0][0] < -4 * 0.5).any()


def test_the_gradients_of_the_tiny_case_are_told():
    assert check("straight_through", rounded).text.startswith(
        "For the gradient of sum(x̂) with respect to x where x = [-3.0, -0.75, -0.25, 0.2, 0.25, 0.75, 1.2, 9.0], "
        "s = 0.5, qmin = -4, qmax = 3: expected [0, 1, 1, 1, 1, 1, 1, 0], "
        "your function gave [0, 0, 0, 0, 0, 0, 0, 0].\n")
    assert "your function gave 'no gradient'.\n" in check("straight_through", torch.no_grad()(rounded)).text


def test_an_exception_on_the_way_back_is_told():
    verdict = check("straight_through", staircase(lambda u, low, high: u[1:]))
    assert verdict.passed is False
    assert verdict.text.startswith("For the gradient of sum(x̂)")
    assert "your function raised RuntimeError: " in verdict.text


@pytest.mark.parametrize("nonsense", [
    lambda x: x.sum(), lambda x: x[1:], lambda x: (x,), lambda x: x.to(torch.complex64), lambda x: x.to_sparse(),
    lambda x: x.to("meta"), lambda x: x > 0, lambda x: x * math.nan, lambda x: x.double().numpy(), lambda x: x.zero_(),
    lambda x: torch.Tensor, lambda x: [x, x],
])
@pytest.mark.filterwarnings("error")
def test_other_tensors_are_wrong_not_a_crash(nonsense):
    assert check("straight_through", lambda x, *_: nonsense(x)).passed is False


def test_gradients_are_asked_for_even_where_they_are_switched_off():
    with torch.no_grad():
        assert check("straight_through", staircase(one_inside)).passed
        assert not torch.is_grad_enabled()


def test_only_the_check_that_needs_torch_imports_it():
    code = """if True:
        import sys
        from qlab import exercises
        for name in exercises.__all__:
            if name not in ("check_straight_through", "summary"):
                getattr(exercises, name)(lambda *_: 0)
        assert "torch" not in sys.modules
        exercises.check_straight_through(lambda *_: 0)
        assert "torch" in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_exception_is_told_with_its_case():
    verdict = check("spacing", lambda x, m: gap(x, m, math.floor(math.log2(x))))
    assert verdict.text.startswith("For x = -1000.0, mantissa_bits = 23 (FP32), your function raised ValueError: ")


def test_values_that_look_alike_are_told_apart():
    text = check("decode", lambda *fields: value(*fields) * (1 + 1e-7)).text
    assert "expected -118.625, your function gave -118.625011863." in text


@pytest.mark.parametrize(("name", "wrong"), [
    ("encode", lambda x: (*fields(x)[:2], fields(x)[2] + 1)),
    ("encode", lambda x: (*fields(x)[:2], fields(x)[2] + 0.5)),
    ("absmax", lambda x, bits: (absmax(x, bits)[0], absmax(x, bits)[1] * (1 + 1e-9))),
    ("zero_point", lambda x, bits: (zero_point(x, bits)[0], zero_point(x, bits)[1] - 1e-6)),
    ("quantize", lambda x, s, z, low, high: (np.rint(x / s) + z).clip(low, high) * (1 + 1e-9)),
    ("multiplier", lambda m: (safe_multiplier(m)[0] + 1, safe_multiplier(m)[1])),
])
def test_integers_are_compared_exactly(name, wrong):
    assert check(name, wrong).passed is False


def test_of_a_long_array_the_first_difference_is_told():
    def nearly(x, bits):
        s, q = absmax(x, bits)
        q[1000::1000] += 1
        return s, q

    s, codes = absmax(samples.load("weights")[:64].ravel(), 4)
    shown = f"({s:.6g}, [{', '.join(f'{code + 0:.0f}' for code in codes[:8])}, …])"
    assert check("absmax", nearly).text == (
        f"For 36,864 real weights, bits = 4: expected {shown}, your function gave {shown}.\n"
        f"  36 of 36,864 numbers differ. The first at index 1000: expected {codes[1000]:.0f}, "
        f"your function gave {codes[1000] + 1:.0f}.")


@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float32], ids=["numpy", "torch", "float32"])
def test_other_shapes_are_wrong(kind):
    for name, right in (("token_scales", token_scales), ("decompose", decomposed), ("smoothing_scales", smoothing),
                        ("hadamard", hadamard)):
        answers = [lambda y: y.T[..., None], lambda y: y[None], lambda y: y[1:], lambda y: y.sum()]
        assert check(name, lambda *given, right=right: kind(right(*given))).passed
        for answer in answers:
            assert check(name, lambda *given, right=right, answer=answer: kind(answer(right(*given)))).passed is False


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_real_data_has_no_near_ties(dtype):
    weights, activations = samples.load("weights")[:64].astype(dtype), samples.load("activations").astype(dtype)
    for x, s in ((weights, dtype(1.1875) / dtype(7)), (activations, dtype(0.11))):
        steps = x / s
        assert np.abs(np.abs(steps - np.floor(steps)) - 0.5).min() > 5e-5


@pytest.mark.parametrize(("value", "text"), [
    (-0.0, "0"), (7159808.0, "7159808"), (0.08503937, "0.0850394"), (3.4e38, "3.4e+38"), (np.nan, "nan"),
    (np.inf, "inf"), ((1, 2.5), "(1, 2.5)"), ([1, 2.5], "[1, 2.5]"), (np.arange(8), "[0, 1, 2, 3, 4, 5, 6, 7]"),
    (np.arange(9), "[0, 1, 2, 3, 4, 5, 6, 7, …]"), ((0.5, np.arange(2)), "(0.5, [0, 1])"), ("text", "'text'"),
    ([0.5, "text"], "[0.5, 'text']"),
])
def test_answers_are_shown_in_few_characters(value, text):
    assert checking.show(value) == text


def test_a_misconception_that_is_right_so_far_is_not_told():
    cases = [checking.Case("x = 1", (1,), (1, 2))]
    ideas = [(lambda x: (1, ...), "first"), (lambda x: (..., 3), "second")]
    assert "second" in checking.check(lambda x: (1, 3), cases, ideas, "Right.").text
    assert "first" not in checking.check(lambda x: (1, 4), cases, ideas, "Right.").text


def solutions():
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        for cell, following in pairwise(cells):
            for call in re.findall(r"exercises\.(check_\w+)\((\w+)\)", cell.source):
                yield pytest.param(cells[0:cells.index(cell)], following.source, *call, id=f"{path.stem}-{call[0]}")


@pytest.mark.parametrize(("before", "text", "check_name", "function"), list(solutions()))
def test_the_folded_solution_passes(before, text, check_name, function):
    solution = re.search(r"<summary>Solution</summary>\s+```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for cell in before:
        if cell.cell_type == "code" and cell.source.startswith("import"):
            imports = [line for line in ast.parse(cell.source).body if isinstance(line, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), "<imports>", "exec"), names)
    exec(solution[1], names)
    assert getattr(exercises, check_name)(names[function]).passed


def test_every_exercise_has_a_test_here():
    found = {name.removeprefix("check_") for name in dir(exercises) if name.startswith("check_")}
    assert found == set(CHECKS)
    assert len(list(solutions())) >= len(CHECKS)


def test_the_summary_shows_the_latest_verdict_of_each_check(monkeypatch):
    monkeypatch.setattr(checking, "_LATEST", {})
    assert repr(exercises.summary()) == "No exercise was checked yet: run the cells above."
    exercises.check_hadamard(lambda k: np.ones((2**k, 2**k)))
    exercises.check_absmax(lambda x, bits: None)
    before = exercises.summary()
    exercises.check_hadamard(hadamard)
    assert repr(before).splitlines() == [
        "check_hadamard  ✗ not right yet", "check_absmax    … not answered yet", "0 of 2 passed"]
    assert repr(exercises.summary()).splitlines() == [
        "check_hadamard  ✓ passed", "check_absmax    … not answered yet", "1 of 2 passed"]


def test_every_lesson_with_exercises_ends_with_their_summary():
    for path in NOTEBOOKS:
        cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        checks = [i for i, source in enumerate(cells) if "exercises.check_" in source]
        summaries = [i for i, source in enumerate(cells) if "exercises.summary()" in source]
        assert len(summaries) == bool(checks), path.name
        assert not checks or summaries[0] > checks[-1], path.name
