"""The predictions of the lessons: each decided by its lesson's own numbers, none answered before its buttons."""

import ast
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import nbformat
import pytest

from qlab import exercises
from qlab.exercises import checking, predicting
from qlab.exercises.predicting import Number, Question
from tests.explorers.checks import without_pixels

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
QUESTION = re.compile(r"\*\*Predict(\.|:)?\*\*")
ASKS = re.compile(r"exercises\.predict\(\s*\"([^\"]+)\"")
ANSWERS = re.compile(r"with exercises\.answer_to\((.*)\):\n")
NO_ANSWER = "max|x|"  # how a printed text begins that comes in between and answers nothing
MOVES = {  # prediction: what takes its figure to where the answer shows
    "codes of 0": {"bits": 2},
    "exponent bit": {"binary": "1 10000100 11011010100000000000000"},
    "first mantissa bit": {"binary": "1 10000101 01011010100000000000000"},
    "last mantissa bit": {"value": "-121472"},
    "signs turned": {"data": "-5.47, -3.08, 7.59, 0, 1.95, 4.57, -10.8", "scheme": "zero-point"},
    "one bit less": {"scheme": "absmax", "bits": 7},
    "codes of [1, 2, 3]": {"data": "[1, 2, 3]", "scheme": "zero-point", "narrow": False},
    "an end before the data's": {"data": "5.47 3.08 -7.59 0 -1.95 -4.57 10.8", "scheme": "zero-point", "beta": 5.0},
    "bits for groups": {"per": "group", "group_size": 32},
    "where the sum is least": {"beta": 0.52},
    "two free ends": {"linked": False, "alpha": -0.34, "beta": 0.73},
    "ten million": {"beta": 0.52},
    "weights or activations": {"weight_bits": 8, "activation_bits": 4},
    "the least help": {"weight_bits": 3, "activation_bits": 3, "weights": "per channel"},
    "one layer alone": {"weight_bits": 3, "activation_bits": 3, "weights": "per tensor"},
    "training at 3 bits": {"step": 460},
    "most dB at 4.5 bits": {"format": "NVFP4"},
    "best alpha": {"direction": "X / s, W · s"},
    "the slides' direction": {"direction": "X · s, W / s (slides)"},
}


def lessons(*, without=None):
    """Those with predictions; or only those whose code up to the last of them does not hold a text."""
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        asks = [place for place, source in enumerate(code) if ASKS.search(source)]
        if asks and not (without and any(without in source for source in code[:asks[-1]])):
            yield pytest.param(cells, id=path.stem[:2])


@pytest.fixture(scope="module", params=lessons())
def cells(request):
    return request.param


@pytest.fixture(scope="module", params=lessons(without="smollm.load("))
def asked(request):
    """The lesson's predictions, after all its cells up to the last of them have run with nothing answered.

    Lessons with the language model take too long: nbval runs them, and a prediction without its one answer fails there.
    """
    cells = request.param
    before, shown = dict(checking.ASKED), list(predicting._ALL_SHOWN)
    checking.ASKED.clear()
    predicting._ALL_SHOWN.clear()
    code = [cell.source for cell in cells if cell.cell_type == "code" and "long" not in cell.metadata.get("tags", [])]
    last = max(place for place, source in enumerate(code) if ASKS.search(source))
    scope = {"__name__": "__main__"}
    with without_pixels():
        for source in code[:last + 1]:  # without the training: its end is in a table that ships
            exec(source.replace("async for _ in run:", "for _ in ():"), scope)
        yield dict(checking.ASKED)
    checking.ASKED.clear()
    checking.ASKED.update(before)
    predicting._ALL_SHOWN[:] = shown


def wrong_choices(question, answer):
    if isinstance(question, Number):
        return [number for number, _ in question.wrong] + [answer * 1.37 + 0.1]
    return [option.text for place, option in enumerate(question.options) if place != answer]


def test_every_question_is_asked_once_and_named_once():
    asked = [name for lesson in lessons() for cell in lesson.values[0] for name in ASKS.findall(cell.source)]
    written = [name for module in iter_modules(exercises.__path__)
               for name in getattr(import_module(f"qlab.exercises.{module.name}"), "PREDICTIONS", {})]
    assert sorted(asked) == sorted(written) == sorted(exercises.QUESTIONS)
    assert len(asked) > 30


@pytest.mark.parametrize("name", exercises.QUESTIONS)
def test_a_question_is_well_formed(name):
    question = exercises.QUESTIONS[name]
    assert question.text and len(name) < 30
    if isinstance(question, Question):
        texts = [option.text for option in question.options]
        assert 2 <= len(set(texts)) == len(texts) <= 4
    else:
        assert question.otherwise
        assert all(look for _, look in question.wrong)


def test_run_unanswered_all_are_open_and_nothing_is_said(asked):
    assert all(prediction.is_open() for prediction in asked.values())
    assert repr(exercises.summary()).endswith(f"\n0 of {len(asked)} predicted right at the first try")


def test_each_right_wrong_and_after_the_figure_has_moved(asked):
    for name, prediction in asked.items():
        question, answer = prediction.question, prediction.answer
        wrong = wrong_choices(question, answer)
        right = answer if isinstance(question, Number) else question.options[answer].text
        for choice in wrong:
            assert not question.is_right(question.read(choice), answer), (name, choice)
            assert len(question.look(question.read(choice), answer).split()) > 3, (name, choice)
        prediction.commit(wrong[0])
        if prediction._when:
            assert prediction.verdict().passed is None, name
            assert repr(prediction) == f"Committed to {question.written(question.read(wrong[0]))}. {question.move}"
            for control, value in MOVES[name].items():
                prediction.figure.set(**{control: value})
        assert repr(prediction).startswith("✗ Not "), name
        prediction.commit(right)
        assert repr(prediction) == f"✓ Right: {question.written(answer)}."
        assert prediction.figure is None or not prediction.figure.errors
    assert {name for name, prediction in asked.items() if prediction._when} <= set(MOVES)
    assert not any(prediction.figure and prediction.figure._hidden for prediction in asked.values())


def test_the_options_stand_in_the_text_before_the_buttons(cells):
    text = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            text += "\n" + cell.source
        for name in ASKS.findall(cell.source) if cell.cell_type == "code" else ():
            words = " ".join(re.sub(r"[$*`\\]", "", text).split()).lower()
            assert "predict" in words, name
            question = exercises.QUESTIONS[name]
            for place, option in enumerate(getattr(question, "options", ())):
                written = rf"\({'abcd'[place]}\) (\w+ ){{0,2}}{re.escape(option.text.lower())}"
                assert re.search(written, words), (name, option.text)
            assert isinstance(question, Question) or "number" in words, name
            text = ""


def test_no_answer_comes_before_its_buttons(cells):
    """Between a question and its buttons no code gives an output, and its fold comes later."""
    open_ones = 0
    for cell in cells:
        if cell.cell_type == "markdown":
            open_ones += len(QUESTION.findall(cell.source))
            assert not (open_ones and "What you saw" in cell.source), cell.source
        elif ASKS.search(cell.source):
            open_ones = 0
            assert [output.data["text/plain"].split(":")[0] for output in cell.outputs] == ["… not answered yet"]
            assert not any("image/png" in output.data for output in cell.outputs)
        else:
            assert not (open_ones and cell.outputs), cell.source
    assert not open_ones


def test_what_is_printed_before_the_explanation_is_folded_until_the_questions_are_answered(cells):
    asked, explained, folds = set(), True, 0
    for cell in cells:
        if cell.cell_type == "markdown":
            explained |= "What you saw" in cell.source or "come in section" in cell.source
            continue
        if names := ASKS.findall(cell.source):
            asked, explained = asked.union(names), False
            continue
        answers = {name for answer in ANSWERS.findall(cell.source) for name in ast.literal_eval(f"[{answer}]")}
        assert answers <= asked, cell.source
        folds += bool(answers)
        assert not answers or cell.metadata.get("jupyter", {}).get("outputs_hidden"), cell.source
        for output in cell.outputs:
            if answers:
                assert output.data["text/html"].startswith(" \n<details><summary>"), cell.source
            elif output.output_type == "stream":
                assert explained or output.text.startswith(NO_ANSWER), cell.source
    assert folds
