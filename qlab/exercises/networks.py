"""Checks of lesson 04: batch norm, the straight-through estimator, and a real factor in integers."""

import math
from functools import partial

import numpy as np
from safetensors.numpy import load_file

from qlab import samples
from qlab.exercises.checking import Case, check, recorded


@recorded
def check_fold_batch_norm(function):
    """Check ``function(weight, bias, gamma, beta, mean, variance, eps)``, the (weight, bias) of a folded convolution.

    The convolution with this weight and bias does what the given one and the batch norm after it do. The weight has the
    shape (outputs, inputs, height, width), all else but eps the shape (outputs,).

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", section 3.2 and equation 14.

    Examples
    --------
    >>> def fold(weight, bias, gamma, beta, mean, variance, eps):
    ...     gain = gamma / np.sqrt(variance + eps)
    ...     return weight * gain[:, None, None, None], beta + gain * (bias - mean)
    >>> check_fold_batch_norm(fold)
    ✓ Right, on the tiny case and on weights of a real convolution.
    """

    def right(weight, bias, gamma, beta, mean, variance, eps):  # noqa: PLR0917
        gain = gamma / np.sqrt(variance + eps)
        return weight * gain[:, None, None, None], beta + gain * (bias - mean)

    def with_gain(gain):
        return lambda weight, bias, gamma, beta, mean, variance, eps: (
            weight * gain(gamma, variance, eps)[:, None, None, None], ...)

    def with_weight(scaled):
        return lambda weight, bias, gamma, beta, mean, variance, eps: (
            scaled(weight, gamma / np.sqrt(variance + eps)), ...)

    def with_bias(shifted):
        return lambda weight, bias, gamma, beta, mean, variance, eps: (
            ..., shifted(gamma / np.sqrt(variance + eps), bias, beta, mean))

    misconceptions = [
        (lambda *arguments: right(*arguments)[::-1], "Both are right, in the other order: return the weight first."),
        (with_weight(lambda weight, gain: weight * gain),
         "NumPy lines up the last axes, so the factors met the columns of the kernels here. They belong to the "
         "outputs, axis 0: gain[:, None, None, None]."),
        (with_weight(lambda weight, gain: weight * gain[:, None, None]),
         "The factors went along axis 1, the inputs. Batch norm comes after the convolution, so each output has its "
         "own: axis 0, gain[:, None, None, None]."),
        (with_weight(lambda weight, gain: weight),
         "The weight is still the old one. Batch norm multiplies each output by γ / √(σ² + ε): so must the weight."),
        (with_gain(lambda gamma, variance, eps: gamma / (variance + eps)),
         "The square root is missing. Batch norm divides by the standard deviation, √(σ² + ε)."),
        (with_gain(lambda gamma, variance, eps: gamma / np.sqrt(variance)),
         "The argument eps has no effect here. The network was trained with √(σ² + ε), and folding must not change "
         "what it computes: add eps to the variance."),
        (with_gain(lambda gamma, variance, eps: gamma / (np.sqrt(variance) + eps)),
         "eps is added to the root here. It belongs under it: √(σ² + ε)."),
        (with_gain(lambda gamma, variance, eps: np.sqrt(variance + eps) / gamma),
         "The factor is upside down: batch norm multiplies by γ and divides by √(σ² + ε)."),
        (with_gain(lambda gamma, variance, eps: 1 / np.sqrt(variance + eps)),
         "γ is missing: batch norm multiplies by it after dividing by √(σ² + ε)."),
        (with_bias(lambda gain, bias, beta, mean: beta),
         "The weight is right. β alone is not the bias: the old bias and the mean also go through batch norm, as "
         "γ (bias − μ) / √(σ² + ε)."),
        (with_bias(lambda gain, bias, beta, mean: bias),
         "The weight is right, and the bias is still the old one. Batch norm shifts the outputs, too: "
         "β + γ (bias − μ) / √(σ² + ε)."),
        (with_bias(lambda gain, bias, beta, mean: beta + gain * bias),
         "The weight is right. In the bias the mean is missing: batch norm subtracts μ before it multiplies."),
        (with_bias(lambda gain, bias, beta, mean: beta - gain * mean),
         "The weight is right, but the old bias is lost. Batch norm sees the convolution with its bias: bias − μ."),
        (with_bias(lambda gain, bias, beta, mean: beta + bias - gain * mean),
         "The weight is right. The old bias must be scaled as the weight is, by γ / √(σ² + ε)."),
        (with_bias(lambda gain, bias, beta, mean: beta + gain * bias - mean),
         "The weight is right. Batch norm subtracts the mean before it multiplies, so μ is scaled as well: "
         "γ (bias − μ) / √(σ² + ε)."),
        (with_bias(lambda gain, bias, beta, mean: gain * (bias - mean)),
         "The weight is right. In the bias β is missing: batch norm adds it last."),
    ]
    weight, *tiny = (np.array(numbers, float) for numbers in (
        [[1, 2], [3, 4]], [5, 1], [8, 9], [0.5, -2], [1, 3], [3, 8]))
    tiny = weight[:, :, None, None], *tiny, 1.0
    names = ("bias", "gamma", "beta", "mean", "variance")
    written = ", ".join(f"{name} = {numbers.tolist()}" for name, numbers in zip(names, tiny[1:], strict=False))
    stored = load_file(samples.path("digits_cnn.safetensors"))
    real = (stored["conv.weight"][:2, :, :2, :2], np.zeros(2, np.float32),
            *(stored[f"conv_norm.{name}"][:2] for name in ("weight", "bias", "running_mean", "running_var")), 1e-5)
    cases = [
        Case(f"weight = {weight.tolist()} (two outputs, two inputs, 1 × 1 kernels), {written}, eps = 1", tiny,
             right(*tiny)),
        Case("a corner, 2 × 2, of two kernels of the first convolution of qlab.digits", real, right(*real)),
    ]
    return check(function, cases, misconceptions, "Right, on the tiny case and on weights of a real convolution.")


@recorded
def check_straight_through(function):
    """Check ``function(x, s, qmin, qmax)``, which returns x̂ = s · clip(rint(x / s), qmin, qmax) for a torch tensor x.

    The gradient of sum(x̂) with respect to x shall be 1 for x / s inside [qmin, qmax] and 0 outside. Nothing is asked
    between an end of the range and half a step beyond: there, the gradient depends on which comes first, clip or rint.

    References
    ----------
    Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons for conditional computation".

    Examples
    --------
    >>> def straight_through(x, s, qmin, qmax):
    ...     u = (x / s).clamp(qmin, qmax)
    ...     return s * (u + (u.round() - u).detach())
    >>> check_straight_through(straight_through)
    ✓ Right: the values and the gradients, on the tiny case and on real activations.
    """

    def right(asked, x, s, qmin, qmax):
        u = x / s
        return s * np.clip(np.rint(u), qmin, qmax) if asked == "x̂" else np.where((qmin <= u) & (u <= qmax), 1.0, 0.0)

    def quantized(x, s, qmin, qmax):
        return s * (x / s).round().clamp(qmin, qmax)

    def inverse_gradient(x, s, qmin, qmax):
        u = (x / s).clamp(qmin, qmax)
        return u + (s * u.round() - u).detach()

    misconceptions = [  # those of the gradient first: some of the others have a wrong gradient as well
        (quantized,
         "The values are right, but no gradient arrives. Rounding is a staircase, flat almost everywhere, and its "
         "derivative is 0: no weight before it would ever learn. Give it the gradient of the identity: "
         "u + (u.round() − u).detach()."),
        (lambda *arguments: quantized(*arguments).detach(),
         "The values are right, but x̂ does not depend on x any more: all of it went through detach(), no_grad() or "
         "NumPy, and backward() finds no way to it. Detach only what rounding adds: u + (u.round() − u).detach()."),
        (lambda x, s, qmin, qmax: x + (quantized(x, s, qmin, qmax) - x).detach(),
         "The gradient is 1 outside of the range, too: the clip is inside of detach(). This straight-through estimator "
         "is in use as well, but the clip is never felt: a value can run away beyond the end, and x̂ does not change. "
         "Go straight through the rounding alone, and leave the clip to autograd."),
        (inverse_gradient,
         "The gradient is 1 / s inside. x was divided by s, so the way back must multiply by s, outside of detach(), "
         "and the two cancel."),
        (lambda x, s, qmin, qmax: (x / s).round().clamp(qmin, qmax),
         "These are the integer codes q. Multiply by s again: x̂ = s · q."),
        (lambda x, s, qmin, qmax: s * (x / s).round(),
         "Nothing is clipped here: a value outside the range gets the nearest end of it."),
        (lambda x, s, qmin, qmax: s * (x / s).clamp(qmin, qmax),
         "This is clipped but not rounded. The straight-through estimator changes the way back only; on the way "
         "forward the values are rounded."),
        (lambda x, s, qmin, qmax: s * ((x / s).sign() * ((x / s).abs() + 0.5).floor()).clamp(qmin, qmax),
         "A half goes away from 0 here, as at school: 0.5 → 1, −0.5 → −1. Quantizers round half to even, as "
         "torch.round does: 0.5 → 0, 1.5 → 2, 2.5 → 2."),
        (lambda x, s, qmin, qmax: s * (x / s + 0.5).floor().clamp(qmin, qmax),
         "A half goes up here: 0.5 → 1, −0.5 → 0. Quantizers round half to even, as torch.round does: 0.5 → 0, "
         "1.5 → 2, 2.5 → 2."),
    ]
    tiny = np.array([-3, -0.75, -0.25, 0.2, 0.25, 0.75, 1.2, 9])
    real = samples.load("activations").ravel()
    beyond = np.abs(real.astype(np.float64) / 0.11 + 0.5) - 7.5  # steps outside of −8 … 7
    real = real[(beyond < 0) | (beyond > 0.5)]
    cases = [
        Case(f"{asked} where {written}", (asked, x, s, *limits), right(asked, x.astype(np.float64), s, *limits))
        for written, x, s, *limits in [
            (f"x = {tiny.tolist()}, s = 0.5, qmin = -4, qmax = 3", tiny, 0.5, -4, 3),
            (f"x holds {len(real):,} real activations, s = 0.11, qmin = -8, qmax = 7", real, 0.11, -8, 7)]
        for asked in ("x̂", "the gradient of sum(x̂) with respect to x")
    ]
    return check(partial(_values_or_gradient, function), cases,
                 [(partial(_values_or_gradient, idea), hint) for idea, hint in misconceptions],
                 "Right: the values and the gradients, on the tiny case and on real activations.")


def _values_or_gradient(function, asked, x, *arguments):
    """The function's values, if x̂ is asked, or else the gradient of their sum: a list, or a text if there is none."""
    import torch  # noqa: PLC0415 - the lessons before this one do without it

    x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        answer = function(x, *arguments)
        if asked == "x̂":
            return answer.tolist() if isinstance(answer, torch.Tensor) else answer
        if not isinstance(answer, torch.Tensor) or not answer.requires_grad:
            return "no gradient"
        gradient, = torch.autograd.grad(answer.sum(), x, allow_unused=True)
    return "no gradient" if gradient is None else gradient.tolist()


@recorded
def check_multiplier(function):
    """Check ``function(m)``, the integers (m0, shift) that stand for a positive factor: m ≈ 2^(−shift) · m0 / 2^31.

    m0 is in [2^30, 2^31) and rounded to the nearest integer; no m that is asked makes a tie.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", equation 6.

    Examples
    --------
    >>> def multiplier(m):
    ...     fraction, exponent = np.frexp(m)  # m = fraction · 2^exponent, with the fraction in [½, 1)
    ...     m0 = round(fraction * 2**31)
    ...     return (m0, -exponent) if m0 < 2**31 else (m0 // 2, -exponent - 1)
    >>> check_multiplier(multiplier)
    ✓ Right: powers of two, small factors, one just below 1, and two above.
    """

    def right(m):
        m0, shift = rounded(m)
        return (m0, shift) if m0 < 2**31 else (2**30, shift - 1)

    def rounded(m, power=31):
        fraction, exponent = math.frexp(m)
        return round(fraction * 2**power), -exponent

    sixteen = ("m0 has 16 bits here. The accumulator has 32 bits, and so has its factor: multiply the fraction by "
               "2^31, which leaves a relative error of 2^−31 at most.")
    misconceptions = [
        (rounded,
         "m is so close to 1 that m0 was rounded up to 2^31, which does not fit int32. Take 2^30 then, and a shift "
         "that is less by 1."),
        (lambda m: right(m)[::-1], "Both are right, in the other order: return m0 first, then shift."),
        (lambda m: (math.frexp(m)[0], ...),
         "This is the fraction, in [½, 1). The hardware multiplies integers: m0 is the fraction · 2^31, rounded."),
        (lambda m: (math.frexp(m)[0] * 2**31, ...), "m0 is an integer: round the fraction · 2^31."),
        (lambda m: (round(m * 2**31), 0),
         "This is m · 2^31 with no shift. A small m leaves the upper bits of m0 empty, and so loses as many below: "
         "double m until it is in [½, 1), and count the doublings as shift."),
        (lambda m: (right(m)[0], -right(m)[1]),
         "shift has the other sign. It counts places to the right, so it is positive for a small m: 2^(−shift)."),
        (lambda m: (right(m)[0], 31 + right(m)[1]),
         "This shift is the total, with the 31 of 2^31 in it: m0 · 2^−shift. That is a convention, too; here shift is "
         "what remains after the division by 2^31, so subtract 31."),
        (lambda m: (rounded(m, 15)[0], ...), sixteen),
        (lambda m: (rounded(m, 16)[0], ...), sixteen),
        (lambda m: (rounded(m, 32)[0], ...),
         "m0 is 2^31 or more here, and does not fit int32, whose largest number is 2^31 − 1. The fraction m0 / 2^31 "
         "lies in [½, 1): 0.25 is 0.5 · 2^−1, not 1 · 2^−2."),
        (lambda m: (min(rounded(m)[0], 2**31 - 1), rounded(m)[1]),
         "m0 is held at 2^31 − 1 where it was rounded up to 2^31. Nearer is 2^30, with a shift that is less by 1."),
        (lambda m: (int(math.frexp(m)[0] * 2**31), rounded(m)[1]),
         "The fraction of m0 is cut off here (int() does that). Round to the nearest integer: half the error."),
    ]
    cases = [Case(f"m = {m}", (m,), right(m)) for m in (0.25, 0.3, 0.0072474273418460, 0.75, 1.7, 2.0**5)]
    cases.append(Case("m = 1 − 2^−33", (1 - 2.0**-33,), right(1 - 2.0**-33)))
    praise = "Right: powers of two, small factors, one just below 1, and two above."
    return check(function, cases, misconceptions, praise, rtol=1e-12)
