"""Checks for the learner's own functions.

Each ``check_…(function)`` runs the function on a tiny case first and says what was expected and what came; then on
further ones, real data among them. A wrong answer that a known misconception would give is told which one it is. A
function that still returns None (or ``...``, or a tuple with one of them) is not answered yet, which is no error: a
notebook runs to its end with open exercises. `summary` lists which checks have passed.

The module of a check has the name of the core module that the exercise is about.

Integers are compared exactly. Real data has no value so near a tie that float32 and float64 round it apart.
"""

from importlib import import_module
from pkgutil import iter_modules

from qlab.exercises.checking import summary

_CHECKS = {
    name: value
    for module in sorted(module.name for module in iter_modules(__path__))
    for name, value in vars(import_module(f"qlab.exercises.{module}")).items() if name.startswith("check_")
}
globals().update(_CHECKS)
__all__ = ["summary", *_CHECKS]  # noqa: PLE0604
