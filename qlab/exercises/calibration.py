"""Checks of lesson 03: clipping and the choice of the range."""

from itertools import pairwise

import numpy as np

from qlab import calibration, samples
from qlab.affine import fake_quantize, range_params
from qlab.exercises.checking import Case, Verdict, by_part, call, check, numbers, recorded, show
from qlab.exercises.predicting import Option, Question

PREDICTIONS = {
    "a crowd of 500": Question(
        "With 500 close values and one 6.0, the smaller MSE has", (
            Option("the range that covers everything", lambda gain: gain < 0,
                   "The clipped value still loses 3.5. But by how many values is that loss divided now?"),
            Option("the range that clips", lambda gain: gain > 0,
                   "Each value of the crowd gains from the finer step; is that more than the share of the one loss?"),
        )),
    "rounding on the way": Question(
        "As β is pulled inwards, the rounding error", (
            Option("falls all the way", lambda errors: all(a > b for a, b in pairwise(errors))),
            Option("rises all the way", lambda errors: all(a < b for a, b in pairwise(errors)),
                   "As many levels share a shorter range. Do they come closer together or move apart?"),
            Option("falls, then rises", lambda errors: min(errors) not in (errors[0], errors[-1]),
                   "That is the sum of both errors. Rounding alone only sees how close together the levels are."),
        )),
    "where the sum is least": Question(
        "At 4 bits, the sum of both errors is least", (
            Option("at the farthest value", lambda share: share > 0.95,
                   "Compare mse at both places: 99.4 % of the values lie within ±0.4, and their levels come closer."),
            Option("below a third of it", lambda share: share < 1 / 3),
            Option("near one half of it", lambda share: 0.4 < share < 0.6,
                   "Read beta where mse is least, and divide it by the farthest value, 1.768."),
        ), move="Pull β in the figure to where mse is least (or press “MSE”)."),
    "8 bits in place of 4": Question(
        "With 8 bits in place of 4, the best β moves", (
            Option("inwards", lambda ratio: ratio < 0.98,
                   "The step is finer, so rounding costs less. Does it pay more or less then to clip?"),
            Option("nowhere", lambda ratio: 0.98 <= ratio <= 1.02,
                   "Rounding costs less with each bit, clipping does not. Can the balance be at the same place?"),
            Option("outwards", lambda ratio: ratio > 1.02),
        )),
    "99.9 %": Question(
        "At 4 bits, the 99.9 % range is", (
            Option("narrower than that of MSE", lambda beta: beta["99.9 %"] < beta["MSE"],
                   "It leaves out 0.1 % of the values. Which share does the MSE range leave out?"),
            Option("wider than that of MSE, and min-max is the widest",
                   lambda beta: beta["MSE"] < beta["99.9 %"] < max(beta.values()) == beta["min-max"]),
            Option("the widest of the five", lambda beta: beta["99.9 %"] == max(beta.values()),
                   "One of the five leaves out nothing."),
        )),
    "99.9 % at 8 bits": Question(
        "At 8 bits, the MSE of the 99.9 % range, against that of min-max, is", (
            Option("still less", lambda ratio: ratio < 0.9,
                   "The best β at 8 bits stands in the last table of section 3. Which of the two ranges is nearer to "
                   "it?"),
            Option("about the same", lambda ratio: 0.9 <= ratio <= 1.1,
                   "The step has become 16 times as fine, but what is clipped stays clipped."),
            Option("larger", lambda ratio: ratio > 1.1),
        )),
    "least KL": Question(
        "The KL divergence is least for", (
            Option("the cut after 4 bins, the finest levels", lambda cut: cut == 4,
                   "After four bins, each level is one bin, but the tail lands in the last of them. What is there in "
                   "Q?"),
            Option("a cut in between", lambda cut: 4 < cut < 8),
            Option("the cut after 8 bins, which clips nothing", lambda cut: cut == 8,
                   "Nothing is clipped there, but every level stands for two bins: the price of rounding."),
        )),
    "two free ends": Question(
        "With both ends free, the best α is", (
            Option("−β", lambda ends: abs(ends[0] + ends[1]) < 0.02 * ends[1],
                   "Compare the smallest value with the largest. Why should the two cuts be at the same distance?"),
            Option("nearer to 0 than β", lambda ends: -ends[0] < 0.98 * ends[1]),
            Option("further from 0 than β", lambda ends: -ends[0] > 1.02 * ends[1],
                   "On which side are the far values?"),
        ), move="In the figure of section 3, at 4 bits, take the tick out of linked, and press “MSE”."),
    "ten million": Question(
        "For ten million values of the same kind, the best β", (
            Option("moves outwards by half or more", lambda ratio: ratio >= 1.5,
                   "There are more far values, but also more of the crowd. What has become of the shares?"),
            Option("hardly moves", lambda ratio: 0.9 < ratio < 1.1),
            Option("moves inwards by a third or more", lambda ratio: ratio <= 2 / 3,
                   "There are more values in the crowd, but also more far ones. What has become of the shares?"),
        ), move="Press “MSE” in the figure."),
    "new data": Question(
        "At 8 bits, the static range costs", (
            Option("nothing", lambda lost: lost < 0.2,
                   "Few values are outside, but how far? Errors are squared. Read lost db under the figure."),
            Option("about 1 dB", lambda lost: 0.5 < lost < 2,
                   "Few values are outside, but how far? Errors are squared. Read lost db under the figure."),
            Option("about 5 dB", lambda lost: 4 < lost < 6),
        )),
}
_TINY = np.array([-4.0, -1.0, 0.0, 0.5, 2.0, 6.0])


@recorded
def check_clipping_error(function):
    """Check ``function(x, alpha, beta)``, the mean squared error that clipping to [alpha, beta] makes.

    Examples
    --------
    >>> check_clipping_error(lambda x, alpha, beta: np.mean((x - np.clip(x, alpha, beta)) ** 2))
    ✓ Right, on the tiny case and on 73,728 real activations.
    >>> check_clipping_error(lambda x, alpha, beta: None)
    … Not answered yet.
    """

    def right(x, alpha, beta):
        return np.mean((x - np.clip(x, alpha, beta)) ** 2)

    def of_the_clipped_only(x, alpha, beta):
        outside = (x < alpha) | (x > beta)
        return np.mean((x - np.clip(x, alpha, beta))[outside] ** 2)

    misconceptions = [
        (of_the_clipped_only, "This is the mean over the clipped values alone. Divide by the number of all values: "
                              "only then do the clipping and the rounding error sum to the MSE."),
        (lambda x, alpha, beta: np.sum((x - np.clip(x, alpha, beta)) ** 2),
         "This is the sum of the squared errors; the MSE is their mean."),
        (lambda x, alpha, beta: np.sum((x - np.clip(x, alpha, beta)) ** 2) / len(x),
         "len(x) counts the rows of a matrix. Divide by the number of all values: x.size, or take np.mean."),
        (lambda x, alpha, beta: np.mean(np.abs(x - np.clip(x, alpha, beta))),
         "This is the mean of |error|; the MSE takes the square."),
        (lambda x, alpha, beta: np.sqrt(np.mean((x - np.clip(x, alpha, beta)) ** 2)),
         "This is the RMS: the MSE is without the root."),
        (lambda x, alpha, beta: np.mean(x - np.clip(x, alpha, beta)),
         "The errors are not squared: those below alpha are negative, those above beta positive, and they cancel."),
        (lambda x, alpha, beta: np.mean(x - np.clip(x, alpha, beta)) ** 2,
         "The mean is squared here. Square first, then take the mean: otherwise errors of both signs cancel."),
        (lambda x, alpha, beta: (x - np.clip(x, alpha, beta)) ** 2,
         "These are the squared errors, one for each value. The MSE is their mean, one number."),
        *((lambda x, alpha, beta, axis=axis: np.mean((x - np.clip(x, alpha, beta)) ** 2, axis=axis),
           "These are many means, one for each row or column. All values count alike: leave axis out.")
          for axis in (0, -1)),
        (lambda x, alpha, beta: np.mean((x - np.minimum(x, beta)) ** 2),
         "Values below alpha are clipped too, not only those above beta."),
        (lambda x, alpha, beta: np.mean((np.abs(x) - np.minimum(np.abs(x), beta)) ** 2),
         "alpha is ignored: |x| is clipped at beta. The range need not be symmetric."),
        (lambda x, alpha, beta: np.mean(np.where((x < alpha) | (x > beta), x, 0) ** 2),
         "A clipped value does not become 0: it becomes the nearest end of the range."),
    ]
    x = samples.load("activations")
    cases = [
        Case(f"x = {_TINY.tolist()}, alpha = -2, beta = 3", (_TINY, -2.0, 3.0), right(_TINY, -2, 3)),
        Case("73,728 real activations, alpha = -0.3, beta = 0.5", (x, -0.3, 0.5), right(x, -0.3, 0.5)),
    ]
    errors = ", ".join(f"{error:g}" for error in _TINY - np.clip(_TINY, -2, 3))
    ladder = (f"Look at the errors before they are squared. For x = {_TINY.tolist()} they are {errors}.",
              "np.clip(x, alpha, beta) is what is left of each x. Subtract it from x, square, and take np.mean of all.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on 73,728 real activations.",
                 ladder=ladder)


@recorded
def check_percentile_range(function):
    """Check ``function(x, p)``, the range (alpha, beta) between the (100 − p)-th and the p-th percentile.

    Examples
    --------
    >>> check_percentile_range(lambda x, p: (np.percentile(x, 100 - p), np.percentile(x, p)))
    ✓ Right, on the tiny case and on 73,728 real activations.
    """
    misconceptions = [
        (lambda x, p: (x.min(), np.percentile(x, p)), "Only the upper end is cut. The lower end is the percentile "
                                                       "100 − p, not the minimum."),
        (lambda x, p: (np.percentile(x, (100 - p) / 2), np.percentile(x, (100 + p) / 2)),
         "Here both tails together hold 100 − p percent. That is a convention too (ONNX Runtime's); in this lesson "
         "each tail holds 100 − p percent."),
        (lambda x, p: (np.quantile(x, 1 - p / 1e4), np.quantile(x, p / 1e4)),
         "p is in percent: 99 means 99 of 100, so np.quantile needs p / 100."),
        (lambda x, p: (-np.percentile(np.abs(x), p), np.percentile(np.abs(x), p)),
         "This is the percentile of |x|, a symmetric range. Treat the two tails apart."),
        (lambda x, p: (np.percentile(x, p), np.percentile(x, 100 - p)), "The two ends are swapped: alpha comes first."),
        (lambda x, p: (np.percentile(x, 1 - p / 100), np.percentile(x, p / 100)),
         "np.percentile takes percent, as p is: leave the division by 100 out. (np.quantile counts from 0 to 1.)"),
        *((lambda x, p, axis=axis: (np.percentile(x, 100 - p, axis=axis), np.percentile(x, p, axis=axis)),
           "This is a range for each row or column. Asked is one for all values: leave axis out.") for axis in (0, -1)),
    ]
    x = samples.load("activations")
    tiny = np.arange(0.0, 101.0) - 20
    cases = [
        Case("x = −20, −19, …, 80, p = 95", (tiny, 95.0), calibration.percentile(tiny, 95)),
        Case("73,728 real activations, p = 99.9", (x, 99.9), calibration.percentile(x, 99.9)),
    ]
    steps = by_part("Look at alpha: 100 − p percent of all values lie below it.",
                    "alpha is right. Look at beta: p percent of all values lie below it.")
    return check(function, cases, misconceptions, "Right, on the tiny case and on 73,728 real activations.",
                 ladder=(steps, "np.percentile(x, p) is the value below which p percent lie. alpha takes 100 − p."))


@recorded
def check_best_range(function):
    """Check ``function(x, bits)``, the beta for which [−beta, beta] quantizes x with the least mean squared error.

    A search over a grid is accepted: the error at the returned beta may exceed the least one by 2 percent.

    Examples
    --------
    >>> check_best_range(lambda x, bits: calibration.mse(x, bits, symmetric=True)[1])
    ✓ Right: within 2 % of the least possible error at 2, 3, 4 and 8 bits.
    >>> check_best_range(lambda x, bits: np.abs(x).max()).passed
    False
    """
    x = samples.load("activations")
    error = calibration.ErrorProfile(x).mse(-0.5, 0.5, 4, symmetric=True)
    last = ("The error of a candidate is mse(x, fake_quantize(x, range_params(-beta, beta, bits, symmetric=True))). "
            "Try 200 of them up to max|x|, and return the one at the place np.argmin(errors).")
    ladder = (f"Look at one candidate: beta = 0.5 with 4 bits has an MSE of {error:.4g} on the real activations.", last)
    for name, data, bits in [("73,728 real activations", x, bits) for bits in (4, 3, 8, 2)] + [
            ("the same with their signs turned", -x, 8)]:
        answer, problem = call(function, (data, bits), f"{name}, bits = {bits}", last)
        if problem:
            return problem
        beta = numbers(answer)
        if beta is None or beta.ndim or not np.isfinite(beta) or beta <= 0:
            return Verdict(False, f"Expected one positive number, beta; your function gave {show(answer)}.", ladder)
        beta, profile = float(beta), calibration.ErrorProfile(data)
        best = calibration.mse(profile, bits, symmetric=True)[1]
        least, error = (profile.mse(-end, end, bits, symmetric=True) for end in (best, beta))
        if error <= 1.02 * least:
            continue
        said = (f"For {name}, bits = {bits}: your beta = {beta:.4g} gives an MSE of {error:.4g}; "
                f"beta = {best:.4g} gives {least:.4g}.")
        hint = _range_hint(profile, beta, bits, best, least)
        if not hint and _is_best_for_absolute_errors(data, beta, bits):
            hint = " Yours minimizes |error|; the MSE squares it."
        return Verdict(False, said + (hint or " Try more candidates above 0, up to max|x|."), () if hint else ladder)
    return Verdict(True, "Right: within 2 % of the least possible error at 2, 3, 4 and 8 bits.")


def _range_hint(profile, beta, bits, best, least):
    """What a wrong end of the range comes from, if that is known."""
    reach = max(-profile.min, profile.max)
    candidates = reach * np.arange(1, 201) / 200
    lopsided = candidates[np.argmin([profile.mse(-end, end, bits) for end in candidates])]
    if np.isclose(beta, reach):
        return " Yours is max|x|: nothing is clipped, and all levels lie far apart."
    if np.isclose(beta, profile.max, rtol=0.01) and profile.max < best:
        return " Your candidates end at max(x), but the value furthest from 0 is negative here. Go up to max|x|."
    if np.isclose(beta, least, rtol=0.05):
        return " Yours looks like the least error itself; return the beta that has it."
    if np.isclose(beta, lopsided, rtol=0.03):
        return (f" Yours is best for a grid with all {2**bits} levels, which is not symmetric. The symmetric one has "
                f"{2**bits - 1}: range_params(-beta, beta, bits, symmetric=True).")
    if beta < 0.1 * best:
        return " Yours is very small: is only the rounding error being minimized? Count what is clipped, too."
    return ""


def _is_best_for_absolute_errors(x, beta, bits):
    """Whether the mean |error| is larger a little inside of this end and a little outside."""
    inside, here, outside = (np.abs(x - fake_quantize(x, range_params(-end, end, bits, symmetric=True))).mean()
                             for end in (0.9 * beta, beta, 1.1 * beta))
    return here < min(inside, outside)
