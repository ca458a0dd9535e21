"""The machinery of the checks: call the learner's function, compare, and find the hint that fits."""

import dis
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path

import numpy as np

_LATEST = {}  # the verdict of each check that has run, in the order of their first runs
ASKED = {}  # the predictions by name, likewise
_UNEXPLAINED = Counter()  # by check: its failures since it last passed for which no misconception speaks
_RAISED = {  # what stands in the message of an error, and the hint for it
    "math domain error": "A negative number has no logarithm and no root. Take |x| first.",
    "expected a positive input": "A negative number has no logarithm and no root. Take |x| first.",
    "NaN to integer": "The logarithm of a negative number is NaN, and NaN is no integer. Take |x| first.",
    "operand type(s) for ^": "In Python ^ combines bits. A power is written with two stars: 2**3 is 8.",
    "numpy() on Tensor": "NumPy keeps no gradients: use torch.round and torch.clamp in place of np.rint and np.clip. "
                         "(With detach() no gradient would arrive.)",
    "__round__ method": "Python's round takes numbers. torch has its own: u.round().",
    "Quantiles must be": "np.quantile counts from 0 to 1, so that 99 percent are 0.99. np.percentile takes percent.",
}


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes
    ----------
    passed : bool or None
        None while the exercise is not answered.
    text : str
    ladder : tuple of str
        Of a failure that no misconception explains: what the second one adds to the text, and what the third one.
    """

    passed: bool | None
    text: str
    ladder: tuple[str, ...] = ()

    def __repr__(self):
        return f"{ {True: '✓', False: '✗', None: '…'}[self.passed]} {self.text}"


@dataclass(frozen=True)
class Summary:
    """The latest verdicts, by names of checks and of predictions."""

    verdicts: dict[str, Verdict]
    predictions: dict[str, Verdict]

    def __repr__(self):
        width = max(map(len, [*self.verdicts, *self.predictions]), default=0)
        words = {True: "✓ passed", False: "✗ not right yet", None: "… not answered yet"}
        lines = [f"{name:{width}}  {words[verdict.passed]}" for name, verdict in self.verdicts.items()]
        if lines:
            lines.append(f"{_passed(self.verdicts)} of {len(lines)} passed")
        if self.predictions:
            lines += [f"{name:{width}}  {verdict}" for name, verdict in self.predictions.items()]
            lines.append(f"{_passed(self.predictions)} of {len(self.predictions)} predicted right at the first try")
        return "\n".join(lines) or "No exercise was checked yet: run the cells above."


def _passed(verdicts):
    return sum(verdict.passed is True for verdict in verdicts.values())


def summary():
    """What the checks of this notebook said last, and how its predictions went, since its kernel was started.

    Examples
    --------
    >>> from qlab import exercises
    >>> exercises.check_absmax(lambda x, bits: ...)
    … Not answered yet.
    >>> exercises.summary().verdicts["check_absmax"]
    … Not answered yet.
    """
    return Summary(dict(_LATEST), {name: prediction.verdict() for name, prediction in ASKED.items()})


def recorded(check):
    """The check, whose verdicts `summary` shows from now on, and which says more if it fails again."""

    @wraps(check)
    def checked(function):
        name = check.__name__
        _LATEST[name] = Verdict(False, "The check did not come to its end.")  # if it is interrupted
        verdict = check(function)
        _UNEXPLAINED[name] = 0 if verdict.passed else _UNEXPLAINED[name] + bool(verdict.ladder)
        more = verdict.ladder[:max(_UNEXPLAINED[name] - 1, 0)]
        _LATEST[name] = replace(verdict, text="\n  ".join([verdict.text, *more]))
        return _LATEST[name]

    return checked


@dataclass(frozen=True)
class Case:
    """One call: how it is written for the learner, its arguments, and what is right."""

    written: str
    arguments: tuple
    expected: object


def check(function, cases, misconceptions, praise, rtol=1e-4, *, ladder):
    """Try ``function`` on the cases in turn; the verdict tells of the first that goes wrong, or praises.

    Parameters
    ----------
    function : function
        The learner's.
    cases : list of Case
    misconceptions : list of (function, str)
        What a known wrong idea answers, and the hint for it. In a tuple, ``...`` stands for anything. The first one
        that gives the learner's answer, and not the right one, is told.
    praise : str
    rtol : float
        Relative tolerance for real numbers. Where integers are expected, they are compared exactly.
    ladder : (str or function, str)
        For failures that none of the misconceptions explains. The second one is told which step to look at, a text or
        ``step(answer, case)`` (see `by_part`); the third one is told the hint, too.

    Examples
    --------
    >>> cases = [Case("x = 3", (3,), 9)]
    >>> misconceptions = [(lambda x: 2 * x, "This is twice x.")]
    >>> ladder = "Look at the power.", "The power of 2 is x times x."
    >>> check(lambda x: x + x, cases, misconceptions, "Right.", ladder=ladder)
    ✗ For x = 3: expected 9, your function gave 6.
      This is twice x.
    >>> check(lambda x: 7, cases, misconceptions, "Right.", ladder=ladder).ladder
    ('Look at the power.', 'The power of 2 is x times x.')
    """
    step, last = ladder
    for case in cases:
        answer, problem = call(function, case.arguments, case.written, last)
        if problem:
            return problem
        if not same(answer, case.expected, rtol):
            wrong = [(idea(*case.arguments), hint) for idea, hint in misconceptions]
            hints = [hint for w, hint in wrong if same(answer, w, rtol) and not same(case.expected, w, rtol)]
            hints += _one_part(answer, case.expected, rtol)
            text = "\n  ".join([f"For {case.written}: {_compared(answer, case.expected)}", *hints[:1]])
            told = step if isinstance(step, str) else step(answer, case)
            return Verdict(False, text, () if hints else (told, last))
    return Verdict(True, praise)


def by_part(*steps):
    """The step to look at, where each step leads to a part of the answer: that of the first part which is wrong."""

    def step(answer, case):
        parts = _parts(answer)
        if len(parts) != len(steps):
            return f"Look at what you return: it should have {len(steps)} parts, with commas between."
        return next((text for text, part, expected in zip(steps, parts, case.expected, strict=True)
                     if not same(part, expected, 1e-4)), steps[-1])

    return step


def _one_part(answer, expected, rtol):
    """The hint for one part of what is asked, in a list that is empty if the answer is something else."""
    if isinstance(expected, tuple) and any(same(answer, part, rtol) for part in expected):
        return [f"This is right, but only one of {len(expected)} parts: return them all, with commas between."]
    return []


def call(function, arguments, written, last):
    """The function's answer, or a verdict if there is none to judge; ``last`` is the last step of its ladder."""
    copies = [np.copy(value) if isinstance(value, np.ndarray) else value for value in arguments]
    try:
        answer = function(*copies)
    except Exception as error:
        text = f"For {written}, your function raised {type(error).__name__}: {error}"
        hint = next((f"\n  {hint}" for message, hint in _RAISED.items() if message in str(error)), "")
        return None, Verdict(False, text + hint, () if hint else (_where(error), last))
    if any(part is ... for part in (answer if isinstance(answer, tuple) else [answer])) or is_empty(function):
        return None, Verdict(None, "Not answered yet.")
    if answer is None:
        return None, Verdict(False, f"For {written}, your function gave None: it gives what stands after return.")
    return answer, None


def _where(error):
    """Which line of the learner's function to look at."""
    frames = traceback.extract_tb(error.__traceback__)
    own = next((frame.line for frame in frames if Path(frame.filename).parent != Path(__file__).parent), None)
    return f"Look at this line: {own}" if own else "Call your function yourself, with these arguments."


def is_empty(function):
    """Whether a function has no statement but ``...`` or pass."""
    nothing = {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}
    code = getattr(function, "__code__", None)
    return bool(code) and set(code.co_consts) <= {None, ..., function.__doc__} and (
        {step.opname for step in dis.get_instructions(code)} <= nothing)


def same(answer, expected, rtol):
    """Whether the answer is the expected one; a tuple is compared part by part, and ``...`` stands for anything."""
    if expected is ...:
        return True
    if isinstance(expected, str):
        return isinstance(answer, str) and answer == expected
    if isinstance(expected, tuple):
        parts = _parts(answer)
        return len(parts) == len(expected) and all(same(*pair, rtol) for pair in zip(parts, expected, strict=True))
    whole = np.asarray(expected).dtype.kind in "iu"
    answer, expected = numbers(answer), numbers(expected)
    if answer is None or answer.shape != expected.shape:
        return False
    return np.array_equal(answer, expected) if whole else bool(
        np.allclose(answer, expected, rtol=rtol, atol=0, equal_nan=True))  # NaN is known only as a wrong answer


def numbers(value):
    """``value`` as a float64 array, or None if it is not made of real numbers."""
    try:
        array = np.asarray(value)
        return array.astype(np.float64) if array.dtype.kind in "biufO" else None  # O: large integers, fractions
    except Exception:  # whatever an unknown object may raise
        return None


def show(value, digits=6):
    """``value`` in few characters: integers in full, of an array the first eight."""
    array = numbers(value)
    if array is not None and array.ndim > 1 and 0 < array.size <= 8:  # one list for each index along the first axis
        return f"[{', '.join(show(row, digits) for row in array.reshape(len(array), -1))}]"
    if array is not None:
        listed = [_number(number, digits) for number in array.ravel()[:8].tolist()]
        text = ", ".join(listed) + ", …" * (array.size > 8)
        return text if array.ndim == 0 else f"({text})" if isinstance(value, tuple) else f"[{text}]"
    if isinstance(value, (tuple, list)) and all(numbers(part) is not None for part in value):
        return f"({', '.join(show(part, digits) for part in value[:8])})"
    return repr(value)[:80]


def _number(number, digits):
    number += 0.0  # −0 is 0
    return f"{number:.0f}" if abs(number) < 1e15 and number == round(number) else f"{number:.{digits}g}"


def _parts(answer):
    """The parts of a tuple, list or array; none of anything else."""
    if isinstance(answer, (tuple, list)):
        return answer
    array = numbers(answer)
    return () if array is None or array.ndim == 0 else array


def _compared(answer, expected):
    """What was expected and what came; the shapes if they differ; of a long array the first number that differs."""
    first, parts = "", _parts(answer)
    pairs = [(expected, answer)] if not isinstance(expected, tuple) else (
        zip(expected, parts, strict=True) if len(parts) == len(expected) else [])
    for wanted, came in ((numbers(wanted), numbers(came)) for wanted, came in pairs):
        if came is not None and came.shape != wanted.shape:
            first = f"\n  The shape should be {wanted.shape}, yours is {came.shape}."
        elif wanted.size > 8 and came is not None and (came != wanted).any():
            wrong = np.flatnonzero(came != wanted)
            first = (f"\n  {wrong.size:,} of {wanted.size:,} numbers differ. The first at index {wrong[0]}: "
                     f"expected {show(wanted.flat[wrong[0]])}, your function gave {show(came.flat[wrong[0]], 12)}.")
    digits = 12 if show(answer) == show(expected) and not first else 6
    return f"expected {show(expected, digits)}, your function gave {show(answer, digits)}.{first}"
