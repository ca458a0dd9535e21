"""Numbers that a lesson measures on the language model, with their intervals: read, and compared with a rerun.

Processors add in different orders, a code that flips in one layer flips others behind it, and with four-bit activations
the KL divergence of 200 tokens moves by a tenth. A cell that prints such numbers is tagged ``nbval-ignore-output`` and
``measured``: nbval then runs it, and `differences` says what has changed by more than that. A test of a sentence reads
the printed intervals by `intervals`.
"""

import math
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NUMBER = r"(?<![\w.])[-−]?\d+(?:,\d{3})*(?:\.\d*)?(?:e[+-]?\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}|-?inf), ({NUMBER}|inf)\]")
TOP_1 = rf"same top-1 {NUMBER} %"
TOKENS = 159  # as few as a lesson judges
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
    """How two printed texts differ: in words, or in numbers by more than another processor explains.

    Intervals: see `agree`. Tokens with the same top-1: two standard errors. Others: 5 %, or one in the last place.
    """
    (words, numbers), (new_words, new_numbers) = _parts(before), _parts(now)
    if words != new_words or len(numbers) != len(new_numbers):
        return [f"other words:\n{before}\nnow:\n{now}"]
    return [f"{old} is {new} now" for old, new in zip(numbers, new_numbers, strict=True) if not _agree(old, new)]


def agree(old, new):
    """Whether two (value, low, high) can be of the same: they overlap, and neither is more than three times as wide."""
    (_, low, high), (_, new_low, new_high) = old, new
    narrow, wide = sorted((high - low, new_high - new_low))
    return old == new or (low <= new_high and new_low <= high and wide <= 3 * narrow)


def _parts(text):
    either = re.compile(f"{INTERVAL.pattern}|{TOP_1}|{NUMBER}")
    return VERDICT.sub("", either.sub("#", text)).split(), [match[0] for match in either.finditer(text)]


def _agree(old, new):
    matches = [INTERVAL.fullmatch(text) for text in (old, new)]
    if any(matches):
        return all(matches) and agree(*([_number(number) for number in match.groups()] for match in matches))
    if old.startswith("same"):
        before, now = (_number(text.split()[2]) for text in (old, new))
        return abs(now - before) <= max(2 * math.sqrt(before * (100 - before) / TOKENS), 1)
    last_place = 10.0 ** -len(old.partition(".")[2])
    return abs(_number(new) - _number(old)) <= max(0.05 * abs(_number(old)), 1.01 * last_place)


def _number(text):
    return float(text.replace(",", "").replace("−", "-"))
