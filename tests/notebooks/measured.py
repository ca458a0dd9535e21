"""Numbers that a lesson measures on the language model, with their intervals: read, and compared with a rerun.

Their last digits differ between processors and numbers of threads. A cell that prints them is tagged
``nbval-ignore-output`` and ``measured``: nbval then runs it, and `differences` says what has changed by more than the
intervals allow. A test of a sentence reads the printed intervals by `intervals`.
"""

import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NUMBER = r"(?<![\w.])[-−]?\d+(?:,\d{3})*(?:\.\d*)?(?:e[+-]?\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}|-?inf), ({NUMBER}|inf)\]")
VERDICT = re.compile(r"\b(lower|higher|not resolved)\b")  # follows from the interval, which is compared


def text_of(outputs):
    """What a cell has printed."""
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def intervals(lesson, start):
    """(value, low, high) for each interval in the line that a lesson prints with this start, spaces taken as one."""
    (path,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    printed = "\n".join(text_of(cell.get("outputs", [])) for cell in nbformat.read(path, as_version=4).cells)
    lines = [line for line in printed.splitlines() if " ".join(line.split()).startswith(start)]
    assert lines, f"lesson {lesson} prints no line that starts with {start!r}"
    return [tuple(map(_number, match)) for line in lines for match in INTERVAL.findall(line)]


def differences(before, now):
    """How two printed texts differ: in words, by a value out of its interval, or by 5 % where there is no interval."""
    (words, numbers), (new_words, new_numbers) = _parts(before), _parts(now)
    if words != new_words or len(numbers) != len(new_numbers):
        return [f"other words:\n{before}\nnow:\n{now}"]
    return [f"{old} is {new} now" for old, new in zip(numbers, new_numbers, strict=True) if not _agree(old, new)]


def _parts(text):
    either = re.compile(f"{INTERVAL.pattern}|{NUMBER}")
    return VERDICT.sub("", either.sub("#", text)).split(), [match[0] for match in either.finditer(text)]


def _agree(old, new):
    with_interval = [bool(INTERVAL.fullmatch(text)) for text in (old, new)]
    if with_interval != [True, True]:
        if any(with_interval):
            return False
        last_place = 10.0 ** -len(old.partition(".")[2])
        return abs(_number(new) - _number(old)) <= max(0.05 * abs(_number(old)), 1.01 * last_place)
    (_, low, high), (value, *ends) = ([_number(number) for number in INTERVAL.fullmatch(text).groups()]
                                      for text in (old, new))
    return low <= value <= high and all(a == b or abs(a - b) <= (high - low) / 2
                                        for a, b in zip(ends, (low, high), strict=True))


def _number(text):
    return float(text.replace(",", "").replace("−", "-"))
