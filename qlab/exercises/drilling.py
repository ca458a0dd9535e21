"""Practice by hand: new numbers each time, and a wrong result is told which step went wrong.

The answer of a task has parts, one for each step that leads to it. The first part that is wrong names the step.
"""

import html
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np

from qlab.affine import range_params
from qlab.exercises.checking import Verdict
from qlab.floats import FP4_E2M1, FP6_E3M2, FP8_E4M3, FP8_E5M2, decode, encode, fields
from qlab.live import in_a_row

_FORMATS = (FP8_E4M3, FP8_E5M2, FP6_E3M2, FP4_E2M1)


@dataclass(frozen=True)
class Part:
    """One part of an answer.

    Attributes
    ----------
    name : str
    value : float
    step : str
        What to do again, if this part is wrong.
    slips : tuple of (float, str)
        Known wrong values, each with what has been done there. A slip that gives the right value is none.
    tolerance : float
        How far off the value may be.
    base : int
        Of the digits: 2 for a field of bits.
    """

    name: str
    value: float
    step: str
    slips: tuple = ()
    tolerance: float = 0.0
    base: int = 10

    def read(self, word):
        return float(int(word, 2)) if self.base == 2 else float(word.replace("−", "-"))

    def is_right(self, number):
        return abs(number - self.value) <= self.tolerance

    def what_went_wrong(self, number):
        known = (text for slip, text in self.slips
                 if abs(number - slip) <= max(self.tolerance, 1e-9) and not self.is_right(slip))
        return next(known, self.step)


@dataclass(frozen=True)
class Task:
    """What is asked, and the parts of its answer in the order of the steps."""

    text: str
    parts: tuple[Part, ...]

    def check(self, typed):
        """The verdict on an answer: its parts, separated by spaces."""
        words, names = typed.replace(",", " ").split(), " and ".join(part.name for part in self.parts)
        try:
            numbers = [part.read(word) for part, word in zip(self.parts, words, strict=True)]
        except ValueError:
            return Verdict(None, f"Type {names}, with spaces between.")
        for part, number in zip(self.parts, numbers, strict=True):
            if not part.is_right(number):
                return Verdict(False, f"{part.name} is wrong. {part.what_went_wrong(number)}")
        return Verdict(True, "Right.")


def _is_tie(steps):
    """Or so near that hand and machine may round apart."""
    return abs(steps - np.floor(steps) - 0.5) < 0.02


def encoding(rng):
    """A number to write in a small format."""
    fmt = _FORMATS[rng.integers(len(_FORMATS))]
    lowest, highest = (int(encode(x, fmt, saturate=True)) for x in (0.125, 96))
    code = int(rng.integers(max(lowest, 1 << fmt.mantissa_bits), highest))  # a normal number, with a larger neighbour
    here, above = (float(decode(c, fmt)) for c in (code, code + 1))
    x = float(rng.choice([-1, 1])) * (here + (above - here) * float(rng.choice([0, 0.25, 0.75])))
    sign, exponent, mantissa = (int(field) for field in fields(encode(x, fmt), fmt))
    power = int(np.floor(np.log2(abs(x))))
    cut = int(fields(code, fmt).mantissa)
    return Task(
        f"Write {x:.12g} in {fmt.name} ({fmt.exponent_bits} exponent bits, {fmt.mantissa_bits} mantissa bits): sign, "
        "exponent and mantissa, in bits.", (
            Part("sign", sign, "Step 1: 1 for a negative number, 0 for a positive one.", base=2),
            Part("exponent", exponent, f"Steps 3 and 5: move the point until one digit is left of it, and add the bias "
                 f"2^({fmt.exponent_bits} − 1) − 1 to the power. Rounding up can carry into the exponent.", (
                     (power, "Step 5: the bias is missing."),
                     (power + fmt.bias + 1, "Step 5: the bias is 2^(E − 1) − 1, not 2^(E − 1)."),
                     (power + fmt.bias, "Step 4: rounding up has made the mantissa 10.0…; the exponent grows by one.")),
                 base=2),
            Part("mantissa", mantissa, f"Step 4: the {fmt.mantissa_bits} digits after the leading 1, rounded.", (
                (mantissa + 2**fmt.mantissa_bits, "Step 4: the leading 1 is not stored."),
                (cut, "Step 4: the digits that do not fit were cut off. Round to the nearest.")), base=2),
        ))


def decoding(rng):
    """A word to read."""
    fmt = _FORMATS[rng.integers(len(_FORMATS))]
    lowest, highest = (int(encode(x, fmt, saturate=True)) for x in (2.0**-6, 128))
    code = int(rng.integers(lowest, highest + 1)) + int(rng.integers(2)) * fmt.sign_code
    sign, exponent, mantissa = (int(field) for field in fields(code, fmt))
    value, fraction, m = float(decode(code, fmt)), mantissa / 2**fmt.mantissa_bits, fmt.mantissa_bits
    size = 2.0 ** (max(exponent, 1) - fmt.bias)
    return Task(
        f"Which number is {sign} {exponent:0{fmt.exponent_bits}b} {mantissa:0{m}b} in {fmt.name}?", (
            Part("the number", value, "(−1)^sign × 2^(e − bias) × 1.m, with the bias 2^(E − 1) − 1.", (
                (-value, "The sign bit: 1 means negative."),
                ((-1) ** sign * size * (1 + fraction), "With an exponent of zeros there is no leading 1."),
                ((-1) ** sign * 2.0 ** (exponent - fmt.bias) * fraction,
                 "With an exponent of zeros, the power is that of exponent 1." if exponent == 0 else
                 "The leading 1 has to be put back: 1.m."),
                ((-1) ** sign * 2.0**exponent * (1 + fraction), "The bias has to be taken away from the exponent."),
                ((-1) ** sign * size / 2 * (1 + fraction), "The bias is 2^(E − 1) − 1, not 2^(E − 1)."),
            ), tolerance=0.005 * abs(value)),
        ))


def ranging(rng):
    """Scale and zero-point of a range."""
    bits = int(rng.choice([3, 4, 8]))
    alpha, beta = round(float(rng.uniform(-10, 2)), 1), round(float(rng.uniform(3, 12)), 1)
    while (low := min(alpha, 0.0)) and _is_tie(low * (2**bits - 1) / (beta - low)):
        beta = round(beta + 0.1, 1)
    params = range_params(low, beta, bits)
    s, z, levels = float(params.scale), int(params.zero_point), 2**bits
    return Task(
        f"The data reaches from {alpha:g} to {beta:g}. Scale and zero-point for {bits} bits, with codes from "
        f"{params.qmin} to {params.qmax}?", (
            Part("s", s, f"s = (β − α) / (2^{bits} − 1).", (
                ((beta - low) / levels, f"{levels} levels have {levels - 1} steps between them."),
                ((beta - alpha) / (levels - 1), "The range has to be widened to hold 0 first."),
                (max(-low, beta) / (levels // 2 - 1), "This is the scale of absmax."),
                (1 / s, "This is 1 / s."),
            ), tolerance=0.005 * s),
            Part("z", z, f"z = {params.qmin} − round(α / s).", (
                (params.qmin + round(low / s), "The sign: α / s is taken away from the lowest code."),
                (-round(low / s), f"This counts from 0. The lowest code is {params.qmin}."),
                (0, "z is 0 for absmax only. Which code means 0 here?"),
            )),
        ))


def coding(rng):
    """A code and its error."""
    bits = int(rng.choice([3, 4, 8]))
    params = range_params(-float(rng.integers(0, 5)), float(rng.integers(2, 8)), bits)
    s, z = round(float(params.scale), 2), int(params.zero_point)
    x = round(float(rng.uniform(-6, 9)), 2)
    while _is_tie(x / s):
        x = round(x + 0.01, 2)
    steps = x / s
    near = int(np.rint(steps)) + z
    q = min(params.qmax, max(params.qmin, near))
    error = x - s * (q - z)
    return Task(
        f"s = {s:g}, z = {z}, codes from {params.qmin} to {params.qmax}. Code q of x = {x:g}, and its error x − x̂?", (
            Part("q", q, "q = clip(round(x / s) + z).", (
                (int(np.rint(steps)), "z is still to be added."),
                (int(np.rint(steps)) - z, "z is added on the way to the code, and taken away on the way back."),
                (near, "There is no such code: clip it to the ends."),
                (min(params.qmax, max(params.qmin, int(np.trunc(steps)) + z)), "Round to the nearest, do not cut off."),
            )),
            Part("the error", error, "x̂ = s (q − z), and the error is x − x̂.", (
                (-error, "This is x̂ − x: the sign."),
                (x - s * q, "z has to be taken away from q first."),
                (error / s, "This is the error in steps; multiply by s."),
                (s * (q - z), "This is x̂ itself."),
            ), tolerance=0.006 * s),
        ))


def grouping(rng):
    """Bits per value of a grouping."""
    bits, size = int(rng.choice([2, 3, 4, 8])), int(rng.choice([16, 32, 64, 128]))
    scale, zero_point = int(rng.choice([8, 16, 32])), bool(rng.integers(2))
    shared = scale + zero_point * bits
    also = f" and a zero-point of {bits} bits" if zero_point else ""
    return Task(
        f"{bits} bits per code, and for each group of {size} a scale of {scale} bits{also}. Bits per value?", (
            Part("the number of bits", bits + shared / size, "A value's own bits, and its share of the group's.", (
                (shared / size, "This is the share of the group alone; each value has bits of its own."),
                (bits + shared, f"What the group shares is divided by {size}."),
                (bits + scale / size, "The zero-point is stored for each group, too."),
                (bits + scale / size + bits, "The zero-point is shared by the group, too."),
            ), tolerance=0.0051),
        ))


def multiplier(rng):
    """m₀ and n of a factor."""
    from qlab.integer import quantize_multiplier  # noqa: PLC0415

    m = float(f"{2.0 ** rng.uniform(-9, -0.01):.3g}")
    m0, n = quantize_multiplier(m)
    fraction = m0 / 2**31
    return Task(
        f"M = {m:g} = 2^(−n) · m₀/2³¹. Which n, and which m₀/2³¹ (three digits)?", (
            Part("n", n, "How often can M be doubled and stay below 1?", (
                (n + 1, "Doubled once too often: m₀/2³¹ has reached 1."),
                (n - 1, "m₀/2³¹ would be below ½: double once more."),
                (-n, "The sign: a shift to the right has a positive n."))),
            Part("m₀/2³¹", fraction, "M, doubled n times.", (
                (m / 2**n, "Halved n times; double it."),
                (fraction * 2, "m₀ is below 2³¹: this is twice too large.")), tolerance=0.004 * fraction),
        ))


DRILLS = {"encode": encoding, "decode": decoding, "scale and zero-point": ranging, "code and error": coding,
          "bits per value": grouping, "m₀ and n": multiplier}


class Drill:
    """Tasks of one kind, one after the other. `answer` and `next` do in code what key and button do."""

    def __init__(self, kind, seed):
        self._new, self._rng = DRILLS[kind], np.random.default_rng(seed)
        self.right = self.wrong = 0
        self._text, self._said = widgets.HTML(), widgets.HTML()
        self._field = widgets.Text(description="Your answer", style={"description_width": "auto"})
        check, after = widgets.Button(description="Check"), widgets.Button(description="Next")
        check.on_click(lambda _: self.answer(self._field.value))
        after.on_click(lambda _: self.next())
        self._field.on_msg(lambda _, content, buffers: self.answer(self._field.value)
                           if content.get("event") == "submit" else None)
        self.widget = widgets.VBox([self._text, in_a_row([self._field, check, after]), self._said])
        self.widget.add_class("qlab")
        self.next()

    def next(self):
        """Go on to new numbers."""
        self.task, self._field.value, self._said.value, self._done = self._new(self._rng), "", "", False
        self._text.value = f"<b>{html.escape(self.task.text)}</b>"

    def answer(self, typed):
        """Check an answer: its parts, separated by spaces."""
        verdict = self.task.check(typed)
        if verdict.passed is not None and not self._done:
            self.right, self.wrong = self.right + verdict.passed, self.wrong + (not verdict.passed)
        self._done = self._done or verdict.passed is not None  # the first answer is the one that counts
        count = f" ({self.right} of {self.right + self.wrong} at the first try)" if verdict.passed else ""
        self._said.value = f'<div role="alert" style="font-size:15px">{html.escape(repr(verdict) + count)}</div>'
        return verdict

    def __repr__(self):
        return f"… {self.task.text}"

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"application/vnd.jupyter.widget-view+json": self.widget.get_view_spec(), "text/plain": repr(self)}


def drill(kind, seed=0):
    """Practise by hand: tasks with new numbers each time.

    Parameters
    ----------
    kind : str
        "encode", "decode", "scale and zero-point", "code and error", "bits per value" or "m₀ and n".
    seed : int
        Another one gives other tasks.

    Returns
    -------
    Drill
        The notebook shows it. A wrong answer is told which step went wrong.

    Raises
    ------
    ValueError
        If there is no such kind.

    Examples
    --------
    >>> practice = drill("bits per value")
    >>> practice
    … 8 bits per code, and for each group of 64 a scale of 16 bits. Bits per value?
    >>> practice.answer("0.25")
    ✗ the number of bits is wrong. This is the share of the group alone; each value has bits of its own.
    >>> practice.answer("8.25")
    ✓ Right.
    """
    if kind not in DRILLS:
        raise ValueError(f"kind must be one of {', '.join(DRILLS)}, got {kind!r}")
    return Drill(kind, seed)
