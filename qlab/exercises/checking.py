"""The machinery of the checks: call the learner's function, compare, and find the hint that fits."""

import dis
from dataclasses import dataclass
from functools import wraps

import numpy as np

_LATEST = {}  # the verdict of each check that has run, in the order of their first runs
ASKED = {}  # the predictions by name, likewise


@dataclass(frozen=True)
class Verdict:
    """What a check found. ``passed`` is True, False, or None while the exercise is not answered."""

    passed: bool | None
    text: str

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
    """The check, whose verdicts `summary` shows from now on."""

    @wraps(check)
    def checked(function):
        _LATEST[check.__name__] = Verdict(False, "The check did not come to its end.")  # if it is interrupted
        _LATEST[check.__name__] = check(function)
        return _LATEST[check.__name__]

    return checked


@dataclass(frozen=True)
class Case:
    """One call: how it is written for the learner, its arguments, and what is right."""

    written: str
    arguments: tuple
    expected: object


def check(function, cases, misconceptions, praise, rtol=1e-4):
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

    Examples
    --------
    >>> cases = [Case("x = 3", (3,), 9)]
    >>> misconceptions = [(lambda x: 2 * x, "This is twice x.")]
    >>> check(lambda x: x + x, cases, misconceptions, "Right.")
    ✗ For x = 3: expected 9, your function gave 6.
      This is twice x.
    """
    for case in cases:
        answer, problem = call(function, case.arguments, case.written)
        if problem:
            return problem
        if not same(answer, case.expected, rtol):
            wrong = [(idea(*case.arguments), hint) for idea, hint in misconceptions]
            hints = [hint for w, hint in wrong if same(answer, w, rtol) and not same(case.expected, w, rtol)]
            return Verdict(False, "\n  ".join([f"For {case.written}: {_compared(answer, case.expected)}", *hints[:1]]))
    return Verdict(True, praise)


def call(function, arguments, written):
    """The function's answer, or a verdict if there is none to judge."""
    copies = [np.copy(value) if isinstance(value, np.ndarray) else value for value in arguments]
    try:
        answer = function(*copies)
    except Exception as error:
        return None, Verdict(False, f"For {written}, your function raised {type(error).__name__}: {error}")
    if any(part is ... for part in (answer if isinstance(answer, tuple) else [answer])) or is_empty(function):
        return None, Verdict(None, "Not answered yet.")
    if answer is None:
        return None, Verdict(False, f"For {written}, your function gave None: it gives what stands after return.")
    return answer, None


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
    return np.array_equal(answer, expected) if whole else np.allclose(answer, expected, rtol=rtol, atol=0)


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
    first = ""
    pairs = zip(expected, _parts(answer), strict=False) if isinstance(expected, tuple) else [(expected, answer)]
    for wanted, came in ((numbers(wanted), numbers(came)) for wanted, came in pairs):
        if came is not None and came.shape != wanted.shape:
            first = f"\n  The shape should be {wanted.shape}, yours is {came.shape}."
        elif wanted.size > 8 and came is not None and (came != wanted).any():
            wrong = np.flatnonzero(came != wanted)
            first = (f"\n  {wrong.size:,} of {wanted.size:,} numbers differ. The first at index {wrong[0]}: "
                     f"expected {show(wanted.flat[wrong[0]])}, your function gave {show(came.flat[wrong[0]], 12)}.")
    digits = 12 if show(answer) == show(expected) and not first else 6
    return f"expected {show(expected, digits)}, your function gave {show(answer, digits)}.{first}"
