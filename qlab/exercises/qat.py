"""Checks of lesson 04: the straight-through estimator."""

from functools import partial

import numpy as np

from qlab import samples
from qlab.exercises.checking import Case, check, is_empty, recorded
from qlab.exercises.predicting import Option, Question

PREDICTIONS = {
    "slope of round": Question(
        "The derivative of round(x) is", (
            Option("1", lambda slopes: np.mean(slopes == 1) > 0.9,
                   "On the whole the staircase rises by 1 for each 1. Between two jumps, what changes when x does?"),
            Option("0, but at the jumps there is none", lambda slopes: 0.9 < np.mean(slopes == 0) < 1),
            Option("undefined everywhere", lambda slopes: np.isnan(slopes).all(),
                   "Between two jumps the staircase is flat. What is the slope of a flat line?"),
        )),
    "training at 3 bits": Question(
        "With 3 bits, training ends at", (
            Option("less than 90 %", lambda accuracy: accuracy < 90,
                   "That is what the best of PTQ had. But PTQ cannot move weights to the levels."),
            Option("90 to 95 %", lambda accuracy: 90 <= accuracy <= 95, "Read the accuracy at the last step."),
            Option("more than 95 %", lambda accuracy: accuracy > 95),
        ), move="Run the training, and wait for its last step."),
    "more floats": Question(
        "Trained on in floats, and then 3 bits by PTQ:", (
            Option("its best seed reaches the worst of LSQ", lambda right: right[0] >= right[1],
                   "Compare the most of the row “more floats, PTQ, MSE” with the least of LSQ."),
            Option("no seed reaches any of LSQ", lambda right: right[0] < right[1]),
        )),
    "PACT at 2 bits": Question(
        "PACT at 2 bits, with the weights' ranges fixed by MSE:", (
            Option("still about 10 %", lambda right: right < 20,
                   "With max|w| at 2 bits most weights become 0. Where do they go when the range ends earlier?"),
            Option("about 80 %", lambda right: 70 < right < 86),
            Option("about 91 %, which LSQ has", lambda right: right >= 86,
                   "Compare with the row of LSQ: its activations learn their step, too."),
        )),
}
BY_X, BY_S = (f"the gradient of sum(x̂) with respect to {name}" for name in "xs")


@recorded
def check_straight_through(function):
    """Check ``function(x, s, qmin, qmax)``, which returns x̂ = s · clip(rint(x / s), qmin, qmax) for a torch tensor x.

    s is a tensor, too. The gradient of sum(x̂) with respect to x shall be 1 for x / s inside [qmin, qmax] and 0 outside,
    and that with respect to s the sum of rint(x / s) − x / s inside, and of qmin or qmax outside. Nothing is asked
    between an end of the range and half a step beyond: there, both depend on which comes first, clip or rint.

    References
    ----------
    Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons for conditional computation";
    Esser et al. 2020, "Learned step size quantization", equation 3.

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
        codes, inside = np.clip(np.rint(u), qmin, qmax), (qmin <= u) & (u <= qmax)
        return s * codes if asked == "x̂" else inside * 1.0 if asked == BY_X else np.sum(codes - u * inside)

    def quantized(x, s, qmin, qmax):
        return s * (x / s).round().clamp(qmin, qmax)

    def inverse_gradient(x, s, qmin, qmax):
        u = (x / s).clamp(qmin, qmax)
        return u + (s * u.round() - u).detach()

    def fixed_scale(x, s, qmin, qmax):
        u = (x / s.detach()).clamp(qmin, qmax)
        return s.detach() * (u + (u.round() - u).detach())

    misconceptions = [  # those of the gradient first: some of the others have a wrong gradient as well
        (fixed_scale,
         "x̂ and the gradient with respect to x are right, but none arrives at s, which LSQ learns: s is detached. "
         "Detach only what rounding adds to u."),
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
        (lambda x, s, qmin, qmax: x.clamp(qmin * s, qmax * s) + (
            quantized(x, s, qmin, qmax) - x.clamp(qmin * s, qmax * s)).detach(),
         "x̂ and the gradient with respect to x are right. From inside the range none arrives at s, which LSQ learns: "
         "round u = x / s itself, by u + (u.round() − u).detach(), and multiply by s after that."),
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
        for asked in (("x̂", BY_X, BY_S) if x is tiny else ("x̂", BY_X))
    ]
    return check(partial(_values_or_gradient, function), cases,
                 [(partial(_values_or_gradient, idea), hint) for idea, hint in misconceptions],
                 "Right: the values and the gradients, on the tiny case and on real activations.",
                 ladder=(_wrong_way, "u = torch.clamp(x / s, qmin, qmax), whose gradient is already right. Round it by "
                                     "u + (u.round() − u).detach(), and multiply by s."))


def _wrong_way(answer, case):
    """Whether to look at the way forward or at the way back."""
    if case.arguments[0] == "x̂":
        return "Look at the way forward: divide by s, clip, round, multiply by s. Print what each of them gives."
    if case.arguments[0] == BY_S:
        return "All but the gradient with respect to s is right. Look at s: none of it may be detached."
    return ("The values are right. Look at the way back: what does each of x / s, clip, rounding and · s make of a "
            "gradient? Together they must give 1 inside the range and 0 outside.")


def _values_or_gradient(function, asked, x, s, *limits):
    """The function's values, if x̂ is asked, or else a gradient of their sum: in numbers, or a text if there is none."""
    import torch  # noqa: PLC0415 - the lessons before this one do without it

    x, s = (torch.tensor(given, dtype=torch.float32, requires_grad=True) for given in (x, s))
    with torch.enable_grad():
        answer = ... if is_empty(function) else function(x, s, *limits)
        if asked == "x̂":
            return answer.tolist() if isinstance(answer, torch.Tensor) else answer
        if not isinstance(answer, torch.Tensor) or not answer.requires_grad:
            return "no gradient"
        gradient, = torch.autograd.grad(answer.sum(), x if asked == BY_X else s, allow_unused=True)
        if gradient is None and asked == BY_S:
            return 0.0
    return "no gradient" if gradient is None else gradient.tolist()
