"""The teacher's track of lesson 00: its minutes add up, and its moves work on the figures of their lessons."""

import re
from pathlib import Path

import nbformat

from qlab import explorers, samples

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LIVE = {  # lesson and variable: what makes the figure there
    ("01", "live"): lambda: explorers.float_bits(-118.625),
    ("02", "live"): lambda: explorers.mapping([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8]),
    ("02", "live_weights"): lambda: explorers.granularity(samples.load("weights"), bits=4),
    ("03", "live"): lambda: explorers.clipping(samples.load("activations"), bits=4),
    ("03", "live_drift"): lambda: explorers.drift(samples.load("activations"), samples.load("new_activations"), bits=8),
    ("04", "live"): explorers.digits_ptq,
    ("05", "live_landscape"): explorers.landscape,
    ("05", "live"): explorers.outliers,
    ("06", "live"): explorers.smoothing,
    ("07", "live_2d"): explorers.rotation_2d,
    ("07", "live"): explorers.rotation,
}


def sources(lesson):
    (path,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


def teachers_rows():
    """The tables of the teacher's track: a list of rows (minutes, section, question, usual answer, move) for each."""
    (text,) = (source for source in sources("00") if "## To teach with it" in source)
    tables = [[]]
    for line in text.split("## To teach with it")[1].splitlines():
        if re.match(r"\| \d", line):
            tables[-1].append([part.strip() for part in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return tables[:-1]


def test_every_class_takes_75_minutes():
    assert [sum(int(row[0]) for row in table) for table in teachers_rows()] == 5 * [75]


def test_the_teachers_moves_move_the_figures_of_their_lessons():
    for table in teachers_rows():
        figures = {}
        for _, where, *_, move in table:
            lesson = where[:2]
            for call in re.findall(r"`(live\w*\..*?)`", move):
                name = call.split(".")[0]
                assert sum(source.endswith(f"\n{name}") for source in sources(lesson)) == 1, (lesson, name)
                figure = figures.setdefault((lesson, name), LIVE[lesson, name]())
                before = dict(figure.readout)
                eval(call, {name: figure})
                assert not figure.errors
                assert figure.readout != before, call
