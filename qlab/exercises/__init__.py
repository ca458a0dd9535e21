"""Checks for the learner's own functions.

Each ``check_…(function)`` runs the function on a tiny case first and says what was expected and what came; then on
further ones, real data among them. A wrong answer that a known misconception would give is told which one it is. Of
the others, the second is told which step to look at, and the third the hint, too. A function with nothing in it (or
that gives ``...``, or a tuple with one) is not answered yet, which is no error: a notebook runs to its end with open
exercises. `summary` lists which checks have passed, and how predictions went.

`predict` asks a question whose answer the lesson computes, and what a cell prints under `answer_to` is folded until it
is answered. `reveal` shows a teacher the answers. `page_to_keep` is the sheet that a learner takes home.

The module of a check, or of a prediction, has the name of the core module that the exercise is about.

Integers are compared exactly. Real data has no value so near a tie that float32 and float64 round it apart.
"""

from importlib import import_module
from pkgutil import iter_modules

from qlab.exercises.checking import summary
from qlab.exercises.drilling import drill
from qlab.exercises.keeping import page_to_keep
from qlab.exercises.predicting import ask, fold, reveal

_MODULES = [import_module(f"qlab.exercises.{module}")
            for module in sorted(module.name for module in iter_modules(__path__))]
_CHECKS = {
    name: value for module in _MODULES for name, value in vars(module).items() if name.startswith("check_")
}
QUESTIONS = {
    name: question for module in _MODULES for name, question in getattr(module, "PREDICTIONS", {}).items()
}
globals().update(_CHECKS)
__all__ = ["answer_to", "drill", "page_to_keep", "predict", "reveal", "summary", *_CHECKS]  # noqa: PLE0604


def predict(name, answer, *, figure=None, veil=(), when=None):
    """Ask a question; the learner commits to an answer before it can be seen.

    Nothing is computed twice and nothing waits: unanswered, a notebook runs to its end. Asked again, when its cell is
    run again, a prediction keeps what was committed to.

    Parameters
    ----------
    name : str
        Of one of the questions in ``PREDICTIONS`` of the modules of `qlab.exercises`.
    answer : object
        What the lesson has computed. It must make exactly one option right.
    figure : Explorer, optional
        The figure that shows the answer.
    veil : sequence of artists, or names of the figure's parts and numbers
        What answers the question there. It is hidden until the learner commits.
    when : function, optional
        ``when(shown) -> bool``, of the figure's controls and numbers by name: whether the figure now shows the answer.
        The verdict waits for that. Without it, the verdict comes at once.

    Returns
    -------
    Prediction
        The notebook shows it. ``commit(choice)`` does in code what a button does.

    Raises
    ------
    ValueError
        If there is no such question, or ``answer`` makes no option right, or more than one.

    Examples
    --------
    >>> prediction = predict("sum in FP16", 256.0)
    >>> prediction
    … not answered yet: (a) a little off, (b) about half, (c) not even 300
    >>> prediction.commit("not even 300")
    >>> prediction
    ✓ Right: (c) not even 300.
    """
    _check_name(name)
    return ask(QUESTIONS[name], name, answer, figure=figure, veil=veil, when=when)


def _check_name(name):
    if name not in QUESTIONS:
        raise ValueError(f"name must be one of {', '.join(QUESTIONS)}, got {name!r}")


def answer_to(*names):
    """Fold what is printed until the learner has committed to an answer, or was shown it.

    ``with answer_to("sum in FP16"):`` holds the lines of a cell that print the answer. The learner can open the fold;
    it opens by itself when the last of the questions is answered. After that, the lines print as ever.

    Parameters
    ----------
    *names : str
        Of the questions that this answers, as for `predict`.

    Returns
    -------
    context manager

    Raises
    ------
    ValueError
        If there is no such question.

    Examples
    --------
    >>> with answer_to("sum in FP16"):
    ...     print(256.0)
    256.0
    """
    for name in names:
        _check_name(name)
    return fold(names)
