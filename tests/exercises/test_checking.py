"""The machinery of the checks: how answers are shown, which misconception is told, and the summary of all verdicts."""

import numpy as np
import pytest

from qlab import exercises
from qlab.exercises import checking
from tests.exercises.test_spinquant import hadamard

LADDER = "the step", "the hint"


@pytest.mark.parametrize(("value", "text"), [
    (-0.0, "0"), (7159808.0, "7159808"), (0.08503937, "0.0850394"), (3.4e38, "3.4e+38"), (np.nan, "nan"),
    (np.inf, "inf"), ((1, 2.5), "(1, 2.5)"), ([1, 2.5], "[1, 2.5]"), (np.arange(8), "[0, 1, 2, 3, 4, 5, 6, 7]"),
    (np.arange(9), "[0, 1, 2, 3, 4, 5, 6, 7, …]"), ((0.5, np.arange(2)), "(0.5, [0, 1])"), ("text", "'text'"),
    ([0.5, "text"], "[0.5, 'text']"), (np.eye(2), "[[1, 0], [0, 1]]"), (np.ones((2, 1, 2)), "[[1, 1], [1, 1]]"),
    (np.zeros((0, 2)), "[]"), (np.zeros((3, 3)), "[0, 0, 0, 0, 0, 0, 0, 0, …]"),
])
def test_answers_are_shown_in_few_characters(value, text):
    assert checking.show(value) == text


def test_a_misconception_that_is_right_so_far_is_not_told():
    cases = [checking.Case("x = 1", (1,), (1, 2))]
    ideas = [(lambda x: (1, ...), "first"), (lambda x: (..., 3), "second")]
    assert "second" in checking.check(lambda x: (1, 3), cases, ideas, "Right.", ladder=LADDER).text
    assert "first" not in checking.check(lambda x: (1, 4), cases, ideas, "Right.", ladder=LADDER).text


def test_the_summary_shows_the_latest_verdict_of_each_check(monkeypatch):
    monkeypatch.setattr(checking, "_LATEST", {})
    monkeypatch.setattr(checking, "ASKED", {})
    assert repr(exercises.summary()) == "No exercise was checked yet: run the cells above."
    exercises.check_hadamard(lambda k: np.ones((2**k, 2**k)))
    exercises.check_absmax(lambda x, bits: None)
    before = exercises.summary()
    exercises.check_hadamard(hadamard)
    assert repr(before).splitlines() == [
        "check_hadamard  ✗ not right yet", "check_absmax    … not answered yet", "0 of 2 passed"]
    assert repr(exercises.summary()).splitlines() == [
        "check_hadamard  ✓ passed", "check_absmax    … not answered yet", "1 of 2 passed"]


def test_where_only_the_shape_is_wrong_the_shapes_are_told():
    verdict = checking.check(lambda x: x[:, None], [checking.Case("x", (np.arange(3.0),), np.arange(3.0))], [], "",
                             ladder=LADDER)
    assert "shape should be (3,), yours is (3, 1)" in verdict.text


@pytest.mark.parametrize("answer", [(0.5, [1, 2], 3), [64, 36, -89], 7])
def test_of_an_answer_with_another_number_of_parts_no_shapes_are_told(answer):
    cases = [checking.Case("x", (1,), (0.25, np.arange(3)))]
    steps = checking.by_part("the first", "the second")
    verdict = checking.check(lambda x: answer, cases, [], "", ladder=(steps, "the hint"))
    assert "shape" not in verdict.text
    assert verdict.ladder == ("Look at what you return: it should have 2 parts, with commas between.", "the hint")


def test_a_check_that_is_interrupted_has_not_passed(monkeypatch):
    monkeypatch.setattr(checking, "_LATEST", {})

    @checking.recorded
    def check_something(function):
        return checking.check(function, [checking.Case("1", (1,), 1)], [], "Right.", ladder=LADDER)

    def interrupted(_):
        raise KeyboardInterrupt

    assert check_something(lambda x: x).passed
    with pytest.raises(KeyboardInterrupt):
        check_something(interrupted)
    assert exercises.summary().verdicts["check_something"].passed is False
