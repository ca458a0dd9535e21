"""The exercises on batch norm folded: what is right, and the misconceptions that their checks know."""

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qlab import digits, ptq
from tests.exercises.checks import asked


def fold(weight, bias, gamma, beta, mean, variance, eps, *, gain=lambda g, v, eps: g / (v + eps) ** 0.5,  # noqa: PLR0917
         weights=lambda w, k: np.stack([f * kernels for f, kernels in zip(k, w, strict=True)]),
         biases=lambda k, b, beta, mu: k * b + beta - k * mu):
    """The folded (weight, bias), with one thing wrong."""
    k = gain(gamma, variance, eps)
    return weights(weight, k), biases(k, bias, beta, mean)


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


MISTAKES = [
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
]
RIGHT = [
    ("fold_batch_norm", fold),
    ("fold_batch_norm", by_torch),
    ("fold_batch_norm", by_modules),
    ("fold_batch_norm", by_what_it_does),
]
STEPS = [  # wrong in a way that no misconception explains, and the step that is told at the second failure
    ("fold_batch_norm", partial(fold, weights=lambda w, k: 2 * w), "the weight first"),
    ("fold_batch_norm", partial(fold, biases=lambda k, b, beta, mu: 7 * k), "The weight is right"),
]
FIRST_CASES = [  # how the first case of a check is told
    ("fold_batch_norm", "For weight = [[1.0, 2.0], [3.0, 4.0]] (two outputs, two inputs, 1 × 1 kernels), bias = [5.0, "
                        "1.0], gamma = [8.0, 9.0], beta = [0.5, -2.0], mean = [1.0, 3.0], variance = [3.0, 8.0], "
                        "eps = 1: expected ([[4, 8], [9, 12]], [16.5, -8]), "),
]


def test_what_is_asked():
    folded = asked("fold_batch_norm", fold)
    assert [np.shape(weight) for weight, *_ in folded] == [(2, 2, 1, 1), (2, 1, 2, 2)]
    assert [eps for *_, eps in folded] == [1, 1e-5]


def test_folding_is_asked_of_the_real_network():
    weight, bias, *statistics, eps = asked("fold_batch_norm", fold)[1]
    model = digits.load()
    folded = ptq.fold_batch_norm(model).conv
    assert bias == (0, 0) and model.conv.bias is None and eps == model.conv_norm.eps
    mine = fold(np.array(weight), np.zeros(2), *map(np.array, statistics), eps)
    np.testing.assert_allclose(mine[0], folded.weight.detach()[:2, :, :2, :2], rtol=1e-5)
    np.testing.assert_allclose(mine[1], folded.bias.detach()[:2], rtol=1e-5)
