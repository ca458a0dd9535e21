"""What the studies of the language model find: how far models are from themselves in float, on three texts.

`Table` writes it, beside the samples, and `load` reads what ships: one JSON file for each study.
"""

import json
import platform
from dataclasses import dataclass

import numpy as np
import torch

from qlab import samples, smollm
from qlab.evaluation import Comparison, Contrast
from qlab.spinquant import online

_NUMBERS = ("ratio", "low", "high", "kl", "kl_low", "kl_high")


@dataclass(frozen=True)
class Results:
    """What ships of a study.

    Attributes
    ----------
    about : dict
        Versions, number of tokens, and whatever else the study says of itself.
    rows : list of [method, seed, text, 6 numbers, agreement]
    contrasts : list of [method, than, seed, text, 6 numbers]
        The numbers are those of `qlab.evaluation.Comparison` and `qlab.evaluation.Contrast`, in their order.
    """

    about: dict
    rows: list
    contrasts: list

    def row(self, method, text):
        """A method on one text, against the float model: the mean over its seeds, and the hull of their intervals.

        Parameters
        ----------
        method : str
            As the study names it.
        text : str, of `qlab.evaluation.TEXTS`

        Returns
        -------
        Comparison

        Raises
        ------
        ValueError
            If the study has no such row.

        Examples
        --------
        >>> found = load("gptq")
        >>> found.row("W4A16 GPTQ", "code").kl < found.row("W4A16 nearest", "code").kl
        True
        """
        *numbers, agreement = _columns(self.rows, {0: method, 2: text}, "row", 3)
        return Comparison(*_hull(numbers), float(np.mean(agreement)))

    def contrast(self, method, than, text):
        """One method divided by another on one text, put together in the same way.

        Returns
        -------
        Contrast

        Examples
        --------
        >>> load("smoothquant").contrast("α 0.7", "none", "prose").resolved
        True
        """
        return Contrast(*_hull(_columns(self.contrasts, {0: method, 1: than, 3: text}, "contrast", 4)))


def _columns(entries, wanted, kind, start):
    found = [entry[start:] for entry in entries if all(entry[i] == value for i, value in wanted.items())]
    if not found:
        raise ValueError(f"the table must have a {kind} of {' / '.join(wanted.values())}, it has none")
    return zip(*found, strict=True)


def _hull(columns):
    return (float(of(column)) for of, column in zip((np.mean, min, max) * 2, columns, strict=True))


def load(study):
    """The results of one of the studies as they ship.

    Parameters
    ----------
    study : str
        The module's name: "outliers", "smoothquant", "spinquant", "gptq" or "blocks".

    Returns
    -------
    Results

    Examples
    --------
    >>> load("blocks").about["tokens"]
    512
    """
    table = json.loads(_path(study).read_text(encoding="utf-8"))
    return Results(rows=table.pop("rows"), contrasts=table.pop("contrasts"), about=table)


class Table:
    """Comparisons as they are found; what there is of them is written each time.

    Parameters
    ----------
    study : str
        The file's name, without ``.json``.
    judges : dict of str to Judge
        One for each text.
    contrasts : sequence of (str, str)
        Of methods: the first is to be divided by the second.
    **about
        What else the file is to say.
    """

    def __init__(self, study, judges, contrasts, **about):
        self._path, self._judges, self._pairs, self._found = _path(study), judges, contrasts, {}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self._table = {"versions": versions} | about | {"rows": [], "contrasts": []}

    def add(self, method, model, functions=(), seed=0):
        """Judge a model, with functions at its places, on each text, and contrast it with those that came before.

        The seed is the same in both, or 0 in the second, where that has but one.
        """
        with smollm.inserted(model, online(model, functions)):
            for text, judge in self._judges.items():
                self._found[method, seed, text] = found = judge.compare(model)
                print(f"{method:40} {seed} {text:14} {found}", flush=True)
                self._table["rows"].append([method, seed, text, *_rounded(found), round(found.agreement, 4)])
                for one, than in (pair for pair in self._pairs if method in pair):
                    first = self._found.get((one, seed, text))
                    second = self._found.get((than, seed, text), self._found.get((than, 0, text)))
                    if first and second:
                        self._table["contrasts"].append([one, than, seed, text, *_rounded(first.versus(second))])
        written = json.dumps(self._table, ensure_ascii=False).replace("], [", "],\n[")
        self._path.write_text(written + "\n", encoding="utf-8")


def _rounded(found):
    return [float(f"{getattr(found, name):.4g}") for name in _NUMBERS]


def _path(study):
    return samples.FOLDER / f"{study}.json"
