"""Every check: right in many ways, unanswered, nonsense, and every misconception it claims to know.

What each check is tried with stands in the file named after its module: MISTAKES (check, wrong function, phrase of the
hint), RIGHT (check, function), the plainest first, and where there are any NEARLY (check, function with integers that
are not quite right) and FIRST_CASES (check, what it says of the first case).
"""

import ast
import re
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from qlab import exercises
from qlab.exercises import checking
from tests.exercises.checks import check

NOTEBOOKS = sorted(Path(__file__).parents[2].joinpath("notebooks").glob("*.ipynb"))
MODULE_OF = {name.removeprefix("check_"): sys.modules[getattr(exercises, name).__module__]
             for name in exercises.__all__ if name.startswith("check_")}
CHECKS = list(MODULE_OF)
TESTS = [import_module(f"tests.exercises.test_{module.__name__.split('.')[-1]}")
         for module in dict.fromkeys(MODULE_OF.values())]


def collected(kind):
    return [entry for module in TESTS for entry in getattr(module, kind, [])]


MISTAKES, RIGHT = collected("MISTAKES"), collected("RIGHT")
PLAINEST = dict(reversed(RIGHT))


def solutions():
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        for cell, following in pairwise(cells):
            for call in re.findall(r"exercises\.(check_\w+)\((\w+)\)", cell.source):
                yield pytest.param(cells[0:cells.index(cell)], following.source, *call, id=f"{path.stem}-{call[0]}")


SOLUTIONS = list(solutions())


def test_every_check_is_tried_and_has_a_solution():
    assert len(CHECKS) > 10
    assert {name for name, *_ in MISTAKES} == {name for name, *_ in RIGHT} == set(CHECKS)
    assert {solution.values[2].removeprefix("check_") for solution in SOLUTIONS} == set(CHECKS)
    for module in TESTS:
        own = {name for kind in ("MISTAKES", "RIGHT") for name, *_ in getattr(module, kind)}
        assert {MODULE_OF[name].__name__.split(".")[-1] for name in own} == {module.__name__.split(".test_")[-1]}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "right"), RIGHT)
def test_right_in_many_ways(name, right):
    verdict = check(name, right)
    assert verdict.passed, verdict.text


@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_misconception_is_recognised(name, wrong, hint):
    verdict = check(name, wrong)
    assert verdict.passed is False
    assert hint in verdict.text


def claimed():
    """(check, wrong idea, hint) of all checks that keep a list of misconceptions."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "_LATEST", {})  # what comes here is no verdict
        for module in MODULE_OF.values():
            patch.setattr(module, "check", lambda _, cases, misconceptions, *rest, **options: misconceptions,
                          raising=False)
        for name in CHECKS:
            told = check(name, None)
            found += [(name, idea, hint) for idea, hint in told] if isinstance(told, list) else []
    return found


CLAIMED = claimed()


def test_nearly_every_check_keeps_a_list_of_misconceptions():
    assert set(CHECKS) - {name for name, *_ in CLAIMED} == {"best_range"}  # which tells by the answer's size


@pytest.mark.parametrize(("name", "idea", "hint"), CLAIMED)
def test_every_claimed_misconception_is_among_the_mistakes(name, idea, hint):
    assert any(phrase in hint for mistaken, _, phrase in MISTAKES if mistaken == name)


@pytest.mark.parametrize(("name", "idea", "hint"), CLAIMED)
def test_no_hint_is_hidden_by_another(name, idea, hint):
    if name == "straight_through":
        idea = idea.args[0]  # the idea itself, not what its values and gradients are

    def mistaken(*arguments):
        answer = idea(*arguments)
        if isinstance(answer, tuple) and any(part is ... for part in answer):
            return tuple(a if w is ... else w for w, a in zip(answer, PLAINEST[name](*arguments), strict=True))
        return answer

    assert hint in check(name, mistaken).text


def with_a_docstring(*_):
    """Say what is to be done."""
    ...  # your code here


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("answer", [lambda *_: None, lambda *_: ..., lambda *_: (0.5, ...), with_a_docstring])
def test_unanswered_is_no_error(name, answer):
    verdict = check(name, answer)
    assert verdict.passed is None
    assert repr(verdict) == "… Not answered yet."


@pytest.mark.parametrize("name", CHECKS)
def test_a_forgotten_return_is_told(name):
    verdict = check(name, lambda *_: [].append(1))
    assert verdict.passed is False
    assert "your function gave None" in verdict.text
    assert check(name, lambda *_: (None, None)).passed is False


class Hostile:
    def __array__(self, *_, **__):
        raise RuntimeError("no array")


ITSELF = [1]
ITSELF.append(ITSELF)
NONSENSE = [
    "text", object(), [], (), [1, [2]], np.nan, -1.0, {"a": 1}, 1j, np.zeros((2, 2)), np.array(None), b"", int, [None],
    10**400, (10**400, 1, 1), ("0", "1"), (0.1, "text"), (np.nan,) * 3, (1, 2, 3, 4), np.inf, -np.inf, Hostile(),
    ITSELF, (0.1, np.zeros((2, 2))), {1, 2}, np.array(["a", "b"]), (x for x in (1, 2)), np.datetime64("2020-01-01"),
    np.zeros(7),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CHECKS)
def test_nonsense_is_wrong_not_a_crash(name):
    for nonsense in NONSENSE:
        assert check(name, lambda *_, nonsense=nonsense: nonsense).passed is False, type(nonsense)


@pytest.mark.parametrize("name", CHECKS)
def test_an_exception_is_told(name):
    verdict = check(name, lambda *_: 1 / 0)
    assert verdict.passed is False
    assert "ZeroDivisionError" in verdict.text


@pytest.mark.parametrize(("name", "said"), collected("FIRST_CASES"))
def test_the_first_case_is_tiny_and_tells_what_came(name, said):
    assert check(name, lambda *_: (7, 7.5)).text.split("\n")[0] == said + "your function gave (7, 7.5)."


@pytest.mark.parametrize(("name", "wrong"), collected("NEARLY"))
def test_integers_are_compared_exactly(name, wrong):
    assert check(name, wrong).passed is False


@pytest.mark.parametrize("name", ["token_scales", "decompose", "smoothing_scales", "hadamard"])
@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float32], ids=["numpy", "torch", "float32"])
def test_other_shapes_are_wrong(name, kind):
    right = PLAINEST[name]
    assert check(name, lambda *given: kind(right(*given))).passed
    for answer in (lambda y: y.T[..., None], lambda y: y[None], lambda y: y[1:], lambda y: y.sum()):
        assert check(name, lambda *given, answer=answer: kind(answer(right(*given)))).passed is False


def test_only_the_check_that_needs_torch_imports_it():
    code = """if True:
        import sys
        class NoTorch:
            asked = False
            def find_spec(self, name, *_):
                if name.split(".")[0] == "torch":
                    NoTorch.asked = True
                    raise ImportError("torch is not there")
        sys.meta_path.insert(0, NoTorch())
        from qlab import exercises
        for name in exercises.__all__:
            if name.startswith("check_") and name != "check_straight_through":
                getattr(exercises, name)(lambda *_: 0)
        assert not NoTorch.asked
        assert "torch is not there" in exercises.check_straight_through(lambda *_: 0).text"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("before", "text", "check_name", "function"), SOLUTIONS)
def test_the_folded_solution_passes(before, text, check_name, function):
    solution = re.search(r"<summary>Solution</summary>\s+```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for cell in before:
        if cell.cell_type == "code" and cell.source.startswith("import"):
            imports = [line for line in ast.parse(cell.source).body if isinstance(line, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), "<imports>", "exec"), names)
    exec(solution[1], names)
    assert getattr(exercises, check_name)(names[function]).passed


def test_every_lesson_with_exercises_ends_with_their_summary():
    for path in NOTEBOOKS:
        cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        checks = [i for i, source in enumerate(cells) if "exercises.check_" in source]
        summaries = [i for i, source in enumerate(cells) if "exercises.summary()" in source]
        assert len(summaries) == bool(checks), path.name
        assert not checks or summaries[0] > checks[-1], path.name
