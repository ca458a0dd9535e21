"""Checks of lesson 04: batch norm as a part of the convolution before it."""

import numpy as np
from safetensors.numpy import load_file

from qlab import samples
from qlab.exercises.checking import Case, by_part, check, recorded
from qlab.exercises.predicting import Option, Question

PREDICTIONS = {
    "weights or activations": Question(
        "1. Fewer digits are read right with", (
            Option("4-bit weights", lambda right: right[0] < right[1] - 2),
            Option("4-bit activations", lambda right: right[1] < right[0] - 2,
                   "The activations start at 0 and end at 6 at most. What sets the scale of a layer's weights?"),
            Option("neither", lambda right: abs(right[0] - right[1]) <= 2,
                   "Compare the two accuracies: do they differ by more than two standard errors?"),
        ), move="Take weight bits to 4. Then back to 8, and activation bits to 4."),
    "the least help": Question(
        "2. At 3 bits, what helps least is", (
            Option("another calibrator", lambda gains: min(gains, key=gains.get) == "calibrator"),
            Option("MSE ranges for the weights", lambda gains: min(gains, key=gains.get) == "weights",
                   "Question 1 says which side has the error. MSE ranges work on that side."),
            Option("one scale per channel", lambda gains: min(gains, key=gains.get) == "channels",
                   "A scale for each channel frees the small kernels from the largest weight of the layer."),
        ), move="Take both to 3 bits. Try each of the three alone, one scale per channel last."),
    "the least ratio": Question(
        "3. At 8 bits the output with the least ratio is that of", (
            Option("conv or depthwise1", lambda name: name in {"conv", "depthwise1"},
                   "No error comes into the first layer. The next ones have two: their own, and what comes in."),
            Option("pointwise1, depthwise2 or pointwise2",
                   lambda name: name in {"pointwise1", "depthwise2", "pointwise2"},
                   "Each layer gets the errors of all before it, and adds one of its own."),
            Option("depthwise3, pointwise3 or linear", lambda name: name in {"depthwise3", "pointwise3", "linear"}),
        )),
    "one layer alone": Question(
        "4. Quantized alone, the layer that costs the most digits is", (
            Option("pointwise3", lambda layer: layer == "pointwise3",
                   "Its output was the worst since it came last but one. Which share of that error was its own?"),
            Option("the last layer, linear", lambda layer: layer == "linear",
                   "Nothing comes after it that could make its error larger. Read the per cent beside each lower bar."),
            Option("one of the first three layers", lambda layer: layer in {"conv", "depthwise1", "pointwise1"}),
        ), move="Take both to 3 bits, one scale per tensor, min-max; read the per cent beside the lower bars."),
}


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
    ...     factor = gamma / np.sqrt(variance + eps)
    ...     return weight * factor[:, None, None, None], beta + factor * (bias - mean)
    >>> check_fold_batch_norm(fold)
    ✓ Right, on the tiny case and on weights of a real convolution.
    """

    def right(weight, bias, gamma, beta, mean, variance, eps):  # noqa: PLR0917
        factor = gamma / np.sqrt(variance + eps)
        return weight * factor[:, None, None, None], beta + factor * (bias - mean)

    def with_factor(factor):
        return lambda weight, bias, gamma, beta, mean, variance, eps: (
            weight * factor(gamma, variance, eps)[:, None, None, None], ...)

    def with_weight(scaled):
        return lambda weight, bias, gamma, beta, mean, variance, eps: (
            scaled(weight, gamma / np.sqrt(variance + eps)), ...)

    def with_bias(shifted):
        return lambda weight, bias, gamma, beta, mean, variance, eps: (
            ..., shifted(gamma / np.sqrt(variance + eps), bias, beta, mean))

    misconceptions = [
        (lambda *arguments: right(*arguments)[::-1], "Both are right, in the other order: return the weight first."),
        (with_weight(lambda weight, factor: weight * factor),
         "NumPy lines up the last axes, so the factors met the columns of the kernels here. They belong to the "
         "outputs, axis 0: factor[:, None, None, None]."),
        (with_weight(lambda weight, factor: weight * factor[:, None, None]),
         "The factors went along axis 1, the inputs. Batch norm comes after the convolution, so each output has its "
         "own: axis 0, factor[:, None, None, None]."),
        (with_weight(lambda weight, factor: weight),
         "The weight is still the old one. Batch norm multiplies each output by γ / √(σ² + ε): so must the weight."),
        (with_factor(lambda gamma, variance, eps: gamma / (variance + eps)),
         "The square root is missing. Batch norm divides by the standard deviation, √(σ² + ε)."),
        (with_factor(lambda gamma, variance, eps: gamma / np.sqrt(variance)),
         "The argument eps has no effect here. The network was trained with √(σ² + ε), and folding must not change "
         "what it computes: add eps to the variance."),
        (with_factor(lambda gamma, variance, eps: gamma / (np.sqrt(variance) + eps)),
         "eps is added to the root here. It belongs under it: √(σ² + ε)."),
        (with_factor(lambda gamma, variance, eps: np.sqrt(variance + eps) / gamma),
         "The factor is upside down: batch norm multiplies by γ and divides by √(σ² + ε)."),
        (with_factor(lambda gamma, variance, eps: 1 / np.sqrt(variance + eps)),
         "γ is missing: batch norm multiplies by it after dividing by √(σ² + ε)."),
        (with_bias(lambda factor, bias, beta, mean: beta),
         "The weight is right. β alone is not the bias: the old bias and the mean also go through batch norm, as "
         "γ (bias − μ) / √(σ² + ε)."),
        (with_bias(lambda factor, bias, beta, mean: bias),
         "The weight is right, and the bias is still the old one. Batch norm shifts the outputs, too: "
         "β + γ (bias − μ) / √(σ² + ε)."),
        (with_bias(lambda factor, bias, beta, mean: beta + factor * bias),
         "The weight is right. In the bias the mean is missing: batch norm subtracts μ before it multiplies."),
        (with_bias(lambda factor, bias, beta, mean: beta - factor * mean),
         "The weight is right, but the old bias is lost. Batch norm sees the convolution with its bias: bias − μ."),
        (with_bias(lambda factor, bias, beta, mean: beta + bias - factor * mean),
         "The weight is right. The old bias must be scaled as the weight is, by γ / √(σ² + ε)."),
        (with_bias(lambda factor, bias, beta, mean: beta + factor * bias - mean),
         "The weight is right. Batch norm subtracts the mean before it multiplies, so μ is scaled as well: "
         "γ (bias − μ) / √(σ² + ε)."),
        (with_bias(lambda factor, bias, beta, mean: factor * (bias - mean)),
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
    steps = by_part("Look at the weight first: which factor multiplies each output, and along which axis?",
                    "The weight is right. Look at the bias: what does batch norm make of the output bias alone?")
    hint = ("factor = gamma / np.sqrt(variance + eps). The weight is weight * factor[:, None, None, None], and the "
            "bias beta + factor * (bias − mean).")
    return check(function, cases, misconceptions, "Right, on the tiny case and on weights of a real convolution.",
                 ladder=(steps, hint))
