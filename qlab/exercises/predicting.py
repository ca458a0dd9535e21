"""The machinery of the predictions: a question, what was committed to, and the verdict.

The questions stand in ``PREDICTIONS`` of the lessons' modules, and not in the notebook's cell, where their hints would
give the answer away. The answer is a value that the lesson computes: which option is right for it is what the options
say of themselves.
"""

import html
import io
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
from IPython.display import display

from qlab.exercises.checking import ASKED, Verdict, show
from qlab.live import in_a_row
from qlab.picture import LOCK

_ALL_SHOWN = []  # a teacher has called `reveal`
_FOLDED = []  # what cells have printed, each after the names of the questions that it answers
_LOOK = """
.qlab-prediction .widget-button { width: auto; height: auto; white-space: normal; text-align: left; line-height: 1.5;
  font-size: 15px; padding: 3px 12px; }
.qlab-prediction .qlab-chosen { box-shadow: inset 0 -3px var(--jp-ui-font-color1, black); font-weight: 600; }
.qlab-prediction .widget-html, .qlab-prediction .widget-html-content { height: auto; line-height: 1.5; }
.qlab-prediction .widget-box { overflow: visible; }
.qlab-prediction > .widget-html:has(> .widget-html-content:empty) { display: none; }
"""


@dataclass(frozen=True)
class Option:
    """One answer to choose.

    Attributes
    ----------
    text : str
        As in the notebook's text.
    right : function
        ``right(value) -> bool``, for the value that the lesson computes. It holds for one option only.
    look : str
        What to look at, for whom chose it wrongly. Empty where it is right.
    """

    text: str
    right: Callable
    look: str = ""


@dataclass(frozen=True)
class Question:
    """A question with options. ``move`` says where to take the figure, if a figure shows the answer."""

    text: str
    options: tuple[Option, ...]
    move: str = ""

    def answer(self, value):
        """The place of the option that is right for ``value``."""
        right = [place for place, option in enumerate(self.options) if option.right(value)]
        if len(right) != 1:
            raise ValueError(f"answer must make one option of {self.text!r} right, got {show(value)}, which makes "
                             f"{len(right)} of {len(self.options)} right")
        return right[0]

    def read(self, choice):
        """The place of an option, from its text."""
        texts = [option.text for option in self.options]
        if choice not in texts:
            raise ValueError(f"choice must be one of {'; '.join(texts)}, got {choice!r}")
        return texts.index(choice)

    def written(self, place):
        return f"({'abcdefgh'[place]}) {self.options[place].text}"

    def is_right(self, place, answer):
        return place == answer

    def look(self, place, answer):
        return self.options[place].look

    def __str__(self):
        return ", ".join(map(self.written, range(len(self.options))))


@dataclass(frozen=True)
class Number:
    """A question whose answer is a number.

    Attributes
    ----------
    text : str
    otherwise : str
        What to look at, for a number that is none of the known wrong ones.
    wrong : tuple of (number, str)
        Known wrong numbers, each with what to look at.
    rtol : float
        How far off a right answer may be, as a share of it.
    move : str
        Where to take the figure, if a figure shows the answer.
    """

    text: str
    otherwise: str
    wrong: tuple = ()
    rtol: float = 0.005
    move: str = ""

    def answer(self, value):
        """The number itself."""
        if not np.isfinite(value):
            raise ValueError(f"answer of {self.text!r} must be a finite number, got {value}")
        return float(value)

    def read(self, choice):
        """The number, as typed."""
        try:
            number = float(str(choice).strip().replace("−", "-").replace(",", ""))
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise ValueError(f"choice must be a number such as 12.5 or −3, got {choice!r}")
        return number

    def written(self, number):
        return show(number)

    def is_right(self, number, answer):
        return abs(number - answer) <= self.rtol * abs(answer)

    def look(self, number, answer):
        known = [look for wrong, look in self.wrong if self.is_right(number, wrong)]
        return known[0] if known else self.otherwise

    def __str__(self):
        return "a number"


class Prediction:
    """A question as a learner meets it."""

    def __init__(self, name, question, answer, *, figure, veil, when):
        self.name, self.question, self.answer = name, question, question.answer(answer)
        self.figure, self.hidden = figure, tuple(veil)
        self.commitments, self.shown = [], bool(_ALL_SHOWN)
        self._when, self._seen = when, when is None
        self._verdict = widgets.HTML()
        self._buttons = []
        choices = self._options() if isinstance(question, Question) else self._field()
        reveal = widgets.Button(description="Show", tooltip="Show the answer without a prediction",
                                layout={"margin": "2px 2px 2px 24px"})  # apart from the options
        reveal.on_click(lambda _: self.reveal())
        self.widget = widgets.VBox([
            widgets.HTML(f"<style>{_LOOK}</style><b>{html.escape(question.text)}</b>"),
            in_a_row([*choices, reveal]),
            self._verdict,
        ])
        for look in ("qlab", "qlab-prediction"):
            self.widget.add_class(look)
        if figure and when:
            figure.follow(self.update)

    def commit(self, choice):
        """Commit to an option, by its text, or to a number: what a button does.

        Raises
        ------
        ValueError
            If there is no such option, or ``choice`` is no number.
        """
        choice = self.question.read(choice)
        with LOCK:
            if not self._solved() and choice not in self.commitments:
                self.commitments.append(choice)
            self.unveil()
            self.update()

    def reveal(self):
        """Show the answer. It does not count as predicted."""
        with LOCK:
            self.shown = True
            self.unveil()
            self.update()

    def is_open(self):
        """Whether nothing is committed to or shown yet."""
        return not (self.commitments or self.shown)

    def unveil(self):
        """Leave hidden, of what predictions hide in this figure and in what is printed, what belongs to open ones."""
        of_this_figure = [other for other in ASKED.values() if other.figure is self.figure and other.hidden]
        if self.figure and of_this_figure:
            self.figure.veil(*(part for other in of_this_figure if other.is_open() for part in other.hidden))
        for names, printed in [now for now in _FOLDED if not _are_open(now[0])]:
            _FOLDED.remove((names, printed))
            printed.unfold()

    def update(self):
        """Say what is due: the verdict, once the figure has been where it shows the answer."""
        if self.is_open():
            return
        self._seen = self._seen or self.shown or bool(self._when(self.figure.shown))
        for place, button in enumerate(self._buttons):
            if place in self.commitments:
                button.add_class("qlab-chosen")
        self._tell(self._said())

    def verdict(self):
        """That of the first commitment, which is the prediction."""
        if not self.commitments or not self._seen:
            return Verdict(None, "shown" if self.shown else "not answered yet")
        right = self.question.is_right(self.commitments[0], self.answer)
        return Verdict(right, "right" if right else "not at first")

    def _solved(self):
        return any(self.question.is_right(choice, self.answer) for choice in self.commitments)

    def _said(self):
        question, lines = self.question, []
        if self._solved() and self._seen:
            lines.append(f"✓ Right: {question.written(self.answer)}.")
        elif self.commitments and self._seen:
            lines.append(f"✗ Not {question.written(self.commitments[-1])}. "
                         f"{question.look(self.commitments[-1], self.answer)}")
        elif self.commitments:
            lines.append(f"Committed to {question.written(self.commitments[-1])}. {question.move}")
        if self.shown and not self._solved():
            lines.append(f"The answer: {question.written(self.answer)}.")
        return "\n".join(lines)

    def _tell(self, text):
        lines = html.escape(text).replace("\n", "<br>")
        self._verdict.value = f'<div role="alert" style="font-size:15px">{lines}</div>'

    def _options(self):
        for place, option in enumerate(self.question.options):
            button = widgets.Button(description=self.question.written(place))
            button.on_click(lambda _, text=option.text: self.commit(text))
            self._buttons.append(button)
        return self._buttons

    def _field(self):
        field = widgets.Text(description="Your number", style={"description_width": "auto"}, layout={"width": "240px"})
        button = widgets.Button(description="Commit")

        def take(*_):
            try:
                self.commit(field.value)
            except ValueError as error:
                self._tell(str(error))

        button.on_click(take)
        field.on_msg(lambda _, content, buffers: take() if content.get("event") == "submit" else None)  # Enter
        return [field, button]

    def __repr__(self):
        return f"… not answered yet: {self.question}" if self.is_open() else self._said()

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"application/vnd.jupyter.widget-view+json": self.widget.get_view_spec(), "text/plain": repr(self)}


class Printed:
    """What a cell has printed: a fold, which opens when the questions that it answers are no longer open."""

    def __init__(self, text):
        self.text, self.is_folded = text, True
        self._place = display(self, display_id=True)

    def unfold(self):
        self.is_folded = False
        if self._place:  # not outside of a notebook
            self._place.update(self)

    def __repr__(self):
        return self.text

    def _repr_html_(self):
        state = "" if self.is_folded else " open"  # a blank line first: JupyterLab shows the first of what it hides
        return (f" \n<details{state}><summary>Output, after your prediction</summary>"
                f'<pre style="white-space:pre-wrap">{html.escape(self.text)}</pre></details>')


def _are_open(names):
    return not _ALL_SHOWN and any(name not in ASKED or ASKED[name].is_open() for name in names)


@contextmanager
def fold(names):
    """See `qlab.exercises.answer_to`."""
    if not _are_open(names):
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        if text.getvalue():
            _FOLDED.append((names, Printed(text.getvalue().removesuffix("\n"))))


def ask(question, name, answer, *, figure, veil, when):
    """See `qlab.exercises.predict`."""
    figure = getattr(figure, "explorer", figure)  # one that watches a training has it
    if figure is None and (veil or when):
        raise ValueError("figure must be given where veil or when are")
    if when and not question.move:
        raise ValueError(f"{name!r} must say where to move the figure, for its verdict comes there")
    prediction = Prediction(name, question, answer, figure=figure, veil=veil, when=when)
    earlier = ASKED.get(name)
    if earlier:  # its cell is run again: what was committed to stays
        prediction.commitments, prediction.shown = earlier.commitments, earlier.shown or prediction.shown
        earlier.widget.close()
    ASKED[name] = prediction
    prediction.unveil()
    prediction.update()
    return prediction


def reveal():
    """Show the answers to all predictions of this notebook, and to those that are still to be asked: for teachers.

    Returns
    -------
    dict of str to str
        The right answers so far, by name of the prediction.
    """
    _ALL_SHOWN[:] = [True]
    for prediction in ASKED.values():
        prediction.reveal()
    return {name: prediction.question.written(prediction.answer) for name, prediction in ASKED.items()}
