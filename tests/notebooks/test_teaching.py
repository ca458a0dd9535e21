"""The teacher's track of lesson 00: its minutes add up, and its moves work on the figures of their lessons."""

import re
from pathlib import Path

import nbformat

from qlab import explorers, samples
from tests.explorers.checks import without_pixels

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
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
    ("08", "live_clip"): explorers.clip_search,
    ("08", "live"): explorers.compensation,
    ("09", "live"): lambda: explorers.codebooks({"weights": samples.load("weights"),
                                                 "activations": samples.load("activations")}),
}
SHOWN = {  # move: what it is to show, of the numbers before and after
    'live.set(binary="1 10000100 11011010100000000000000")': lambda old, new: new["stored"] == "−59.3125",
    'live.set(scheme="zero-point")': lambda old, new: 0.8 * old["mse"] < new["mse"] < old["mse"],
    'live.press("[1, 2, 3]")': lambda old, new: new["zero_point"] == new["qmin"],
    'live_weights.set(per="group", group_size=32)': lambda old, new: round(new["bits_per_weight"], 2) == 4.5,
    'live.press("MSE")': lambda old, new: new["mse"] < 0.3 * old["mse"],
    "live_drift.set(gain=2)": lambda old, new: new["lost_db"] > 2 * old["lost_db"],
    "live.set(weight_bits=3, activation_bits=3)": lambda old, new: new["accuracy"] < 70,
    'live.set(weights="per channel")': lambda old, new: new["accuracy"] > old["accuracy"] + 10,
    'live.set(calibrator="MSE", weight_range="MSE")': lambda old, new: new["accuracy"] > old["accuracy"] + 5,
    'live.set(granularity="token")': lambda old, new: (
        new["others_to_zero_percent"] < 0.3 * old["others_to_zero_percent"]),
    'live.set(treatment="in float")': lambda old, new: (
        new["output_error_percent"] < 0.3 * old["output_error_percent"]),
    'live.set(direction="X / s, W · s", alpha=0.5)': lambda old, new: (
        new["output_error_percent"] < 0.5 * old["output_error_percent"]),
    "live.set(alpha=1)": lambda old, new: new["output_error_percent"] > new["off_percent"],
    "live_2d.set(theta=45)": lambda old, new: new["error_percent"] < 0.8 * old["error_percent"],
    'live_2d.set(outlier="diagonal")': lambda old, new: new["error_percent"] > new["without_rotation_percent"],
    'live.set(rotate="Hadamard")': lambda old, new: (
        new["output_error_percent"] < 0.4 * old["output_error_percent"]),
    'live_clip.press("best for weights")': lambda old, new: (
        new["weight_sqnr_db"] > old["weight_sqnr_db"] and new["output_error_percent"] > old["output_error_percent"]),
    "live.set(columns=64)": lambda old, new: new["prose_percent"] < new["nearest_prose_percent"],
    "live.set(tokens=64)": lambda old, new: new["prose_percent"] > new["nearest_prose_percent"],
    'live.set(data="activations", format="NVFP4")': lambda old, new: new["sqnr_db"] > old["sqnr_db"],
    'live.set(place=(11, "down_in"), granularity="tensor")': lambda old, new: new["output_error_percent"] > 50,
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
    assert [sum(int(row[0]) for row in table) for table in teachers_rows()] == 6 * [75]


def test_the_teachers_moves_show_on_the_figures_of_their_lessons_what_they_are_to_show():
    shown = set()
    with without_pixels():
        for table in teachers_rows():
            shown |= moved(table)
    assert shown == set(SHOWN)


def moved(table):
    """Make the moves of a class; those that have something to show."""
    shown, figures = set(), {}
    for _, where, *_, move in table:
        lesson = where[:2]
        for call in re.findall(r"`(live\w*\..*?)`", move):
            name = call.split(".")[0]
            assert sum(source.split("\n")[-1] == name for source in sources(lesson)) == 1, (lesson, name)
            if (lesson, name) not in figures:
                figures[lesson, name] = LIVE[lesson, name]()
            figure = figures[lesson, name]
            before = dict(figure.readout)
            eval(call, {name: figure})
            assert not figure.errors
            assert figure.readout != before, call
            if call in SHOWN:
                assert SHOWN[call](before, figure.readout), (call, before, figure.readout)
                shown.add(call)
    return shown
