"""Predictions: what is committed to, when the verdict comes, what it says, and what the summary counts."""

from types import SimpleNamespace

import numpy as np
import pytest

from qlab import exercises
from qlab.exercises import checking, predicting
from qlab.exercises.predicting import Number, Option, Question
from qlab.live import Explorer, FloatSlider, new_figure

SIGN = Question("The sign is", (
    Option("minus", lambda x: x < 0, "Look below 0."),
    Option("plus", lambda x: x > 0, "Look above <0>."),
    Option("none", lambda x: x == 0, "Look at 0."),
), move="Take x to 2.")
SQUARE = Number("The square of 3 is", "Multiply.", wrong=((6, "That is twice."), (-9, "Squares are not negative.")),
                move="Take x to 2.")


@pytest.fixture(autouse=True)
def _no_predictions_yet(monkeypatch):
    asked, shown = dict(checking.ASKED), list(predicting._ALL_SHOWN)
    checking.ASKED.clear()
    predicting._ALL_SHOWN.clear()
    predicting._FOLDED.clear()
    monkeypatch.setitem(exercises.QUESTIONS, "sign", SIGN)
    monkeypatch.setitem(exercises.QUESTIONS, "square", SQUARE)
    yield
    checking.ASKED.clear()
    checking.ASKED.update(asked)
    predicting._ALL_SHOWN[:] = shown


@pytest.fixture
def figure():
    with new_figure(320, 200) as picture:
        axes = picture.subplots()
        (line,) = axes.plot([0, 1], [0, 1], animated=True)
    return Explorer(
        picture, {"x": FloatSlider(0.0, min=-4, max=4)}, lambda x: x, lambda x: line.set_ydata([0, x]),
        lambda x: {"double": 2 * x}, parts={"line": [line]}, title="A line", description="A line.")


def buttons(prediction):
    return {button.description: button for button in prediction.widget.children[1].children
            if hasattr(button, "click")}


def said(prediction):
    return prediction.widget.children[2].value


def test_an_open_prediction_shows_its_options_and_no_verdict():
    prediction = exercises.predict("sign", 3)
    assert repr(prediction) == "… not answered yet: (a) minus, (b) plus, (c) none"
    assert said(prediction) == ""
    assert list(buttons(prediction)) == ["(a) minus", "(b) plus", "(c) none", "Show"]
    assert "The sign is" in prediction.widget.children[0].value
    data = prediction._repr_mimebundle_()
    assert data.pop("application/vnd.jupyter.widget-view+json")["model_id"] == prediction.widget.model_id
    assert data == {"text/plain": repr(prediction)}


def test_a_wrong_commitment_is_told_what_to_look_at_and_another_is_allowed():
    prediction = exercises.predict("sign", -1.0)
    buttons(prediction)["(b) plus"].click()
    assert repr(prediction) == "✗ Not (b) plus. Look above <0>."
    assert 'role="alert"' in said(prediction) and "&lt;0&gt;" in said(prediction)
    buttons(prediction)["(a) minus"].click()
    assert repr(prediction) == "✓ Right: (a) minus."
    buttons(prediction)["(c) none"].click()
    assert repr(prediction) == "✓ Right: (a) minus."
    chosen = [text for text, button in buttons(prediction).items() if "qlab-chosen" in button._dom_classes]
    assert chosen == ["(a) minus", "(b) plus"]


@pytest.mark.parametrize("choice", [9, "9", "9.0", " 9,0 ".replace(",", "."), "9.01", np.float32(9)])
def test_a_right_number(choice):
    prediction = exercises.predict("square", 9)
    prediction.commit(choice)
    assert repr(prediction) == "✓ Right: 9."


@pytest.mark.parametrize("choice, text", [
    (6, "✗ Not 6. That is twice."), ("−9", "✗ Not -9. Squares are not negative."), ("1,000", "✗ Not 1000. Multiply."),
    (9.1, "✗ Not 9.1. Multiply."),
])
def test_a_wrong_number(choice, text):
    prediction = exercises.predict("square", 9)
    prediction.commit(choice)
    assert repr(prediction) == text


@pytest.mark.parametrize("typed", ["", "nine", "inf", "nan"])
def test_what_is_no_number_is_refused_and_commits_to_nothing(typed):
    prediction = exercises.predict("square", 9)
    with pytest.raises(ValueError, match=r"choice must be a number such as 12.5 or −3, got"):
        prediction.commit(typed)
    field = prediction.widget.children[1].children[0]
    field.value = typed
    field._handle_custom_msg({"event": "submit"}, [])
    assert "choice must be a number" in said(prediction)
    assert prediction.is_open()


def test_a_number_is_taken_by_enter_and_by_the_button():
    for press in (lambda field, button: field._handle_custom_msg({"event": "submit"}, []),
                  lambda field, button: button.click()):
        prediction = exercises.predict("square", 9)
        prediction.commitments.clear()
        field, button, _ = prediction.widget.children[1].children
        field.value = "9"
        press(field, button)
        assert repr(prediction) == "✓ Right: 9."


def test_choices_that_do_not_exist_are_refused():
    prediction = exercises.predict("sign", 1)
    with pytest.raises(ValueError, match="choice must be one of minus; plus; none, got 'both'"):
        prediction.commit("both")
    assert prediction.is_open()


def test_an_answer_must_make_one_option_right():
    with pytest.raises(ValueError, match="one option of 'The sign is' right, got nan, which makes 0 of 3"):
        exercises.predict("sign", np.nan)
    with pytest.raises(ValueError, match="answer of 'The square of 3 is' must be a finite number, got nan"):
        exercises.predict("square", np.nan)
    with pytest.raises(ValueError, match="got 5, which makes 2 of 2 right"):
        Question("Q", (Option("some", lambda x: x > 0, "Look."), Option("many", lambda x: x > 4, "Look."))).answer(5)
    assert not checking.ASKED


def test_what_predict_refuses(figure, monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of .*sign.*, got 'no such'"):
        exercises.predict("no such", 1)
    for wrong in ({"veil": ["double"]}, {"when": lambda now: True}):
        with pytest.raises(ValueError, match="figure must be given where veil or when are"):
            exercises.predict("sign", 1, **wrong)
    monkeypatch.setitem(exercises.QUESTIONS, "still", Question("Q", SIGN.options))
    with pytest.raises(ValueError, match="'still' must say where to move the figure"):
        exercises.predict("still", 1, figure=figure, when=lambda now: True)


def test_a_figure_hides_the_answer_until_it_is_committed_to(figure):
    shown = figure.png()
    sign = exercises.predict("sign", 1, figure=figure, veil=["line"])
    square = exercises.predict("square", 9, figure=figure, veil=["double"])
    assert figure.png() != shown and "double: ?" in repr(figure)
    figure.set(x=1.0)
    figure.set(x=0.0)
    assert figure.png() != shown
    sign.commit("minus")
    assert figure.png() == shown and "double: ?" in repr(figure)
    square.commit(8)
    assert "double: 0" in repr(figure)


def test_what_is_printed_opens_with_the_last_of_its_questions(monkeypatch):
    shown = []
    place = SimpleNamespace(update=lambda printed: shown.append(printed._repr_html_()))
    monkeypatch.setattr(predicting, "display", lambda printed, display_id: shown.append(printed._repr_html_()) or place)
    sign = exercises.predict("sign", 1)
    with exercises.answer_to("sign", "square"):
        print("1 < 9")
    square = exercises.predict("square", 9)
    sign.commit("minus")
    assert [html.startswith(" \n<details><summary>") for html in shown] == [True]
    with exercises.answer_to("sign", "square"):
        print("1 < 10")
    square.reveal()
    sign.commit("plus")
    assert [html.startswith(" \n<details open><summary>") for html in shown] == [False, False, True, True]
    assert ["1 &lt; 9</pre>" in html for html in shown] == [True, False, True, False]


def test_what_is_printed_for_answered_questions_prints_as_ever(capsys):
    exercises.predict("sign", 1).commit("plus")
    with exercises.answer_to("sign"):
        print("at once")
        assert capsys.readouterr().out == "at once\n"


def test_what_was_printed_before_an_error_is_shown(capsys):
    with pytest.raises(ZeroDivisionError), exercises.answer_to("sign"):
        print("so far")
        raise ZeroDivisionError
    assert capsys.readouterr().out == "so far\n"


def test_only_questions_are_answered():
    with pytest.raises(ValueError, match=r"name must be one of .*sign.*, got 'no such'"):
        exercises.answer_to("sign", "no such")


def test_the_verdict_waits_for_the_figure(figure):
    watching = SimpleNamespace(explorer=figure)
    prediction = exercises.predict("sign", 1, figure=watching, when=lambda now: now["x"] == 2 and now["double"] == 4)
    figure.set(x=2.0)
    figure.set(x=1.0)  # seen before the commitment
    prediction.commit("minus")
    assert repr(prediction) == "Committed to (a) minus. Take x to 2."
    assert prediction.verdict().passed is None
    figure.set(x=2.0)
    assert "✗ Not (a) minus. Look below 0." in said(prediction)
    figure.set(x=-1.0)
    prediction.commit("plus")
    assert repr(prediction) == "✓ Right: (b) plus."
    assert prediction.verdict().passed is False
    assert not figure.errors


def test_the_verdict_comes_at_once_where_the_figure_shows_it_already(figure):
    prediction = exercises.predict("sign", 1, figure=figure, when=lambda now: now["x"] == 0)
    assert repr(prediction).startswith("… not answered yet")
    prediction.commit("plus")
    assert repr(prediction) == "✓ Right: (b) plus."


def test_a_condition_that_fails_is_told_in_the_figure(figure):
    prediction = exercises.predict("sign", 1, figure=figure, when=lambda now: now["x"] == 1 and now["y"])
    prediction.commit("plus")
    with pytest.raises(KeyError, match="y"):
        figure.set(x=1.0)


def test_show_gives_the_answer_and_counts_as_no_prediction(figure):
    prediction = exercises.predict("sign", 1, figure=figure, veil=["double"], when=lambda now: now["x"] == 2)
    buttons(prediction)["Show"].click()
    assert repr(prediction) == "The answer: (b) plus."
    assert "double: 0" in repr(figure)
    assert repr(prediction.verdict()) == "… shown"


def test_a_teacher_shows_all_with_one_call(figure):
    exercises.predict("sign", 1, figure=figure, veil=["double"])
    assert exercises.reveal() == {"sign": "(b) plus"}
    assert "double: 0" in repr(figure)
    later = exercises.predict("square", 9, figure=figure, veil=["line"], when=lambda now: now["x"] == 2)
    assert repr(later) == "The answer: 9."
    assert exercises.reveal() == {"sign": "(b) plus", "square": "9"}


def test_asked_again_a_prediction_keeps_what_was_committed_to(figure):
    exercises.predict("sign", 1, figure=figure, veil=["double"]).commit("minus")
    again = exercises.predict("sign", 1, figure=figure, veil=["double"])
    assert repr(again) == "✗ Not (a) minus. Look below 0." and said(again)
    assert "double: 0" in repr(figure)


def test_the_summary_counts_first_commitments(monkeypatch):
    monkeypatch.setattr(checking, "_LATEST", {})
    sign = exercises.predict("sign", 1)
    assert repr(exercises.summary()).splitlines() == [
        "sign  … not answered yet", "0 of 1 predicted right at the first try"]
    exercises.check_absmax(lambda x, bits: None)
    square = exercises.predict("square", 9)
    square.commit(9)
    sign.commit("minus")
    sign.commit("plus")
    assert repr(exercises.summary()).splitlines() == [
        "check_absmax  … not answered yet", "0 of 1 passed",
        "sign          ✗ not at first", "square        ✓ right", "1 of 2 predicted right at the first try"]
