"""The checks of the exercises: right, unanswered, nonsense, and every misconception they claim to know."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest

from qlab import exercises

NOTEBOOKS = sorted(Path(__file__).parent.parent.joinpath("notebooks").glob("*.ipynb"))


def clip_error(x, alpha, beta):
    return x - np.clip(x, alpha, beta)


MISTAKES = [
    ("clipping_error", lambda x, a, b: np.mean(clip_error(x, a, b)[(x < a) | (x > b)] ** 2), "clipped values alone"),
    ("clipping_error", lambda x, a, b: np.sum(clip_error(x, a, b) ** 2), "sum of the squared errors"),
    ("clipping_error", lambda x, a, b: np.mean(np.abs(clip_error(x, a, b))), "mean of |error|"),
    ("clipping_error", lambda x, a, b: np.mean((x - np.minimum(x, b)) ** 2), "below alpha"),
    ("clipping_error", lambda x, a, b: np.mean(np.where((x < a) | (x > b), x, 0) ** 2), "nearest end"),
    ("percentile_range", lambda x, p: (x.min(), np.percentile(x, p)), "Only the upper end"),
    ("percentile_range", lambda x, p: np.percentile(x, [(100 - p) / 2, (100 + p) / 2]), "both tails together"),
    ("percentile_range", lambda x, p: np.quantile(x, [1 - p / 1e4, p / 1e4]), "p is in percent"),
    ("percentile_range", lambda x, p: np.percentile(np.abs(x), p) * np.array([-1, 1]), "percentile of |x|"),
    ("percentile_range", lambda x, p: np.percentile(x, [p, 100 - p]), "swapped"),
    ("best_range", lambda x, bits: np.abs(x).max(), "nothing is clipped"),
    ("best_range", lambda x, bits: 0.01, "only the rounding error"),
    ("best_range", lambda x, bits: 8.16e-4, "least error itself"),
    ("best_range", lambda x, bits: 1.2, "more candidates"),
]
CHECKS = ["clipping_error", "percentile_range", "best_range"]


def check(name, function):
    return getattr(exercises, f"check_{name}")(function)


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_misconception_is_recognised(name, wrong, hint):
    verdict = check(name, wrong)
    assert verdict.passed is False
    assert hint in verdict.text


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("answer", [None, ...])
def test_unanswered_is_no_error(name, answer):
    verdict = check(name, lambda *_: answer)
    assert verdict.passed is None
    assert repr(verdict) == "… Not answered yet."


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("nonsense", ["text", object(), [], [1, [2]], np.nan, -1.0, {"a": 1}, 1j, np.zeros((2, 2))])
def test_nonsense_is_wrong_not_a_crash(name, nonsense):
    assert check(name, lambda *_: nonsense).passed is False


@pytest.mark.parametrize("name", CHECKS)
def test_an_exception_is_told(name):
    verdict = check(name, lambda *_: 1 / 0)
    assert verdict.passed is False
    assert "ZeroDivisionError" in verdict.text


def test_the_tiny_case_is_printed_and_survives_a_function_that_writes_to_it():
    def writes(x, alpha, beta):
        x[:] = 0
        return 0.0

    said = [check("clipping_error", writes).text for _ in range(2)]
    assert said[0] == said[1]
    assert "x = [-4.0, -1.0, 0.0, 0.5, 2.0, 6.0], alpha = -2, beta = 3: expected 2.1667" in said[0]


def solutions():
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        for cell, following in pairwise(cells):
            for call in re.findall(r"exercises\.(check_\w+)\((\w+)\)", cell.source):
                yield pytest.param(cells[0:cells.index(cell)], following.source, *call, id=f"{path.stem}-{call[0]}")


@pytest.mark.parametrize(("before", "text", "check_name", "function"), list(solutions()))
def test_the_folded_solution_passes(before, text, check_name, function):
    solution = re.search(r"<summary>Solution</summary>\s+```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for cell in before:
        if cell.cell_type == "code" and cell.source.startswith("import"):
            exec(cell.source, names)
    exec(solution[1], names)
    assert getattr(exercises, check_name)(names[function]).passed


def test_every_exercise_has_a_test_here():
    found = {name.removeprefix("check_") for name in dir(exercises) if name.startswith("check_")}
    assert found == set(CHECKS)
    assert len(list(solutions())) >= len(CHECKS)
