"""The live figures of a training: a replay, and one that is watched against the same training unwatched."""

import asyncio
import copy
import math
from functools import lru_cache, partial

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from torch import nn
from tqdm.auto import tqdm

from qlab import digits
from qlab import qat as quantizers
from qlab.explorers import training_run, watch
from qlab.training import Step, train
from tests.explorers.checks import (
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    figures,
    in_a_cell,
    pictures_along,
    texts,
    values,
)

HISTORY = [
    {"step": 0, "accuracy": 31.5, "ranges": {"conv": (0.0, 1.0), "linear": (-0.2, 6.0)}},
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 1.25},
    {"step": 3, "loss": 0.75, "accuracy": 60.0, "ranges": {"conv": (0.0, 1.25), "linear": (-0.5, 4.0)}},
    {"step": 4, "loss": 0.5},
    {"step": 6, "loss": 0.25, "accuracy": 92.5, "ranges": {"conv": (0.0, 1.5), "linear": (-1.0, 2.0)}},
]
MAKERS = {"training_run": partial(training_run, HISTORY)}
START = {"training_run": {"step": 6}}

shared, put = figures(MAKERS, START)


def test_the_step_over_its_whole_range():
    pictures = pictures_along(put("training_run", {}), "step")
    assert len(set(pictures)) == len(pictures)


def test_words_and_that_the_picture_does_not_depend_on_the_way_there():
    fresh = MAKERS["training_run"]()
    assert values(fresh) == START["training_run"]
    assert_words(fresh)
    assert_same_whichever_way(shared("training_run"), fresh)


@pytest.mark.usefixtures("unseen")
def test_a_replay_reads_what_was_recorded_last():
    explorer = put("training_run", {})
    assert (explorer.controls["step"].min, explorer.controls["step"].max) == (0, 6)
    for step in range(7):
        explorer.set(step=step)
        before = [record for record in HISTORY if record["step"] <= step]
        loss, accuracy, ranges = (next((record[key] for record in reversed(before) if key in record), None)
                                  for key in ("loss", "accuracy", "ranges"))
        readout = dict(explorer.readout)
        assert readout.pop("step") == step
        assert readout.pop("loss", None) == loss
        assert readout.pop("accuracy") == accuracy
        assert {name: tuple(map(float, text.replace("−", "-").split(" … "))) for name, text in readout.items()} == {
            "range conv": ranges["conv"], "range linear": ranges["linear"]}

        above, below, right = explorer.figure.axes
        curve, marker, dot = above.lines
        np.testing.assert_array_equal(curve.get_data(), [[1, 2, 3, 4, 6], [2.5, 1.25, 0.75, 0.5, 0.25]])
        assert list(marker.get_xdata()) == [step, step]
        np.testing.assert_array_equal(np.ravel(dot.get_data()), [step, np.nan if loss is None else loss])
        curve, marker, dot = below.lines
        np.testing.assert_array_equal(curve.get_data(), [[0, 3, 6], [31.5, 60, 92.5]])
        assert np.ravel(dot.get_data()).tolist() == [step, accuracy]
        first, now = (np.array(bars.get_segments()) for bars in right.collections)
        np.testing.assert_array_equal(first, [[[0, 0], [1, 0]], [[-0.2, 1], [6, 1]]])
        np.testing.assert_array_equal(now, [[(end, row) for end in pair] for row, pair in enumerate(ranges.values())])
        assert [label.get_text() for label in right.get_yticklabels()] == ["conv", "linear"]
        assert texts(right) == [text.replace("−", "-") for text in list(explorer.readout.values())[-2:]]
        low, high = right.get_xlim()
        assert low < -1
        assert high > 6


@pytest.mark.usefixtures("unseen")
def test_levels_to_compare_with_are_drawn_and_named():
    levels = {"float": 98.61, "PTQ": 55}
    watched = watch(train(small_network(), IMAGES, LABELS, epochs=1, lr=0.05, seed=1), lambda: {"accuracy": 50.0},
                    levels=levels).explorer
    for explorer in (training_run(HISTORY, levels), watched):
        below = explorer.figure.axes[1]
        assert [line.get_ydata()[0] for line in below.lines[:2]] == [98.61, 55]
        assert [text.get_text() for text in below.get_legend().get_texts()] == ["float: 98.6 %", "PTQ: 55.0 %"]


@pytest.mark.parametrize("level", [-1, 100.1, math.nan, "98", None])
def test_bad_levels(level):
    with pytest.raises(ValueError, match=r"levels must be from 0 to 100, got .* for .float."):
        training_run(HISTORY, {"float": level})


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("ends, spelled", [
    ((0.0, 6.0), "0 … 6"), ((0, 2.345678), "0 … 2.35"), ((-0.0074, 2.5), "−0.01 … 2.5"), ((-0.001, 2.0), "0 … 2"),
    ((-153.26, 17.77), "−153 … 18"), ((0.00123456, 0.0456789), "0.0012 … 0.0457"), ((-3, -1), "−3 … −1"),
    ((0, 0), "0 … 0"),
])
def test_ranges_are_spelled_briefly(ends, spelled):
    assert training_run([{"step": 0, "ranges": {"a": ends}}]).readout["range a"] == spelled


@pytest.mark.usefixtures("unseen")
def test_a_replay_can_be_played(monkeypatch):
    links = []
    monkeypatch.setattr(widgets, "jslink", lambda *ends: links.append(ends))
    explorer = training_run([{"step": step, "loss": 1 / (step + 1)} for step in range(0, 1001, 4)])
    play = explorer.widget.children[0].children[0]
    assert isinstance(play, widgets.Play)
    assert (play.min, play.max, play.step) == (0, 1000, 12)
    assert links == [((play, "value"), (explorer.controls["step"], "value"))]


@pytest.mark.parametrize("history", [
    [{"step": 3}], [{"step": 3, "loss": 0.0}], [{"step": 0, "accuracy": 100}], [{"step": 5, "ranges": {"a": (0, 0)}}],
    [{"step": 0, "loss": 1e-30}, {"step": 1, "loss": 1e30}], [{"step": 2, "ranges": {"": (-3, -1)}}, {"step": 9}],
    [{"step": 1, "loss": np.float32(1)}, {"step": 2, "ranges": {str(i): (0, i) for i in range(12)}, "more": "else"}],
    ({"step": 1, "loss": 1},),
], ids=str)
def test_unusual_histories(history):
    explorer = training_run(history)
    for record in history:
        explorer.set(step=record["step"])
        assert_sound(explorer)
        assert explorer.readout["step"] == record["step"]
    losses = [record["loss"] for record in history if "loss" in record]
    low, high = explorer.figure.axes[0].get_ylim()
    assert all(low <= max(loss, 1e-6) <= high for loss in losses)


@pytest.mark.parametrize("history, part", [
    ([], r"history must be a list of at least one dict, got \[\]"), (None, "history must be a list"),
    ({"step": 1}, "history must be a list"), ([3], "history must hold dicts with an integer 'step', got 3"),
    ([{"loss": 1.0}], "integer 'step'"), ([{"step": 1.0}], "integer 'step'"), ([{"step": True}], "integer 'step'"),
    ([{"step": 2}, {"step": 2}], "steps that increase, got 2 after 2"), ([{"step": 2}, {"step": 1}], "got 1 after 2"),
    ([{"step": 1, "loss": math.nan}], "loss must be at least 0 and finite, got nan at step 1"),
    ([{"step": 1, "loss": math.inf}], "loss must be"), ([{"step": 1, "loss": -0.1}], "loss must be"),
    ([{"step": 1, "loss": "1"}], "loss must be .* got '1'"), ([{"step": 1, "loss": None}], "loss must be .* got None"),
    ([{"step": 1, "accuracy": 100.1}], "accuracy must be from 0 to 100, got 100.1 at step 1"),
    ([{"step": 1, "accuracy": -1}], "accuracy must be"), ([{"step": 1, "accuracy": math.nan}], "accuracy must be"),
    ([{"step": 1, "ranges": {"a": (1.0, 0.5)}}], r"alpha at most beta, got \(1.0, 0.5\) for 'a' at step 1"),
    ([{"step": 1, "ranges": {"a": (0, math.inf)}}], "ranges must be finite"),
    ([{"step": 1, "ranges": {"a": (math.nan, 1)}}], "ranges must be finite"),
    ([{"step": 1, "ranges": {"a": (0, 1, 2)}}], "ranges must be finite"),
    ([{"step": 1, "ranges": {"a": (0, 1)}}, {"step": 2, "ranges": {"b": (0, 1)}}], "same layers"),
    ([{"step": 1, "ranges": {"a": (0, 1)}}, {"step": 2}, {"step": 3, "ranges": {}}], "same layers"),
])
def test_bad_histories(history, part):
    with pytest.raises(ValueError, match=part):
        training_run(history)


IMAGES = torch.rand(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES[:, 0] > IMAGES[:, 1]).long()


def small_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    return quantizers.prepare(model, "LSQ", IMAGES, weight_bits=4, activation_bits=4)


class Watched:
    """A small network, watched over 12 steps."""

    def __init__(self, **choice):
        self.model, self.measured = small_network(), 0
        self.steps = train(self.model, IMAGES, LABELS, epochs=3, lr=0.05, seed=1, batch_size=16)
        self.run = watch(self.steps, self.measure, **choice)

    def measure(self):
        self.measured += 1
        return {"accuracy": digits.accuracy(self.model, IMAGES, LABELS), "ranges": quantizers.ranges(self.model)}

    def in_a_cell(self, body=lambda step: None):
        """Loop over it as a cell of a notebook does."""
        in_a_cell(tqdm(self.run, disable=True), body)

    @property
    def button(self):
        return self.run.explorer.widget.children[0].children[0]


@lru_cache
def unwatched():
    """The same training without anyone watching: the records of each step, and the weights at the end."""
    model = small_network()
    history = []
    for step in train(model, IMAGES, LABELS, epochs=3, lr=0.05, seed=1, batch_size=16):
        accuracy = digits.accuracy(model, IMAGES, LABELS)
        history.append({"step": step.step, "loss": step.loss, "accuracy": accuracy, "ranges": quantizers.ranges(model)})
    return history, copy.deepcopy(model.state_dict())


def assert_as_unwatched(watched, measured_at):
    history, weights = unwatched()
    for record in watched.run.history[1:]:
        expected = dict(history[record["step"] - 1])
        if record["step"] not in measured_at:
            del expected["accuracy"], expected["ranges"]
        assert record == expected
    assert [record["step"] for record in watched.run.history] == list(range(13))
    torch.testing.assert_close(watched.model.state_dict(), weights, rtol=0, atol=0)
    assert len(watched.run) == 0
    assert not watched.run.explorer.errors


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("every, measured_at", [(1, range(13)), (5, [5, 10, 12]), (12, [12]), (100, [12])])
@pytest.mark.parametrize("plain", [True, False])
def test_watching_changes_nothing(plain, every, measured_at):
    watched, seen = Watched(every=every), []
    assert len(watched.run) == 12
    if plain:
        seen.extend(watched.run)
    else:
        watched.in_a_cell(seen.append)
    assert [step.step for step in seen] == list(range(1, 13))
    assert_as_unwatched(watched, measured_at)
    start = small_network()
    assert watched.run.history[0] == {"step": 0, "accuracy": digits.accuracy(start, IMAGES, LABELS),
                                      "ranges": quantizers.ranges(start)}


def assert_as_replayed(run):
    """The live figure at the end against a replay, in all but the place of the axes, which the first drawing sets."""
    live, replay = run.explorer, training_run(run.history)
    assert live.readout == replay.readout
    for ours, theirs in zip(live.figure.axes, replay.figure.axes, strict=True):
        assert (ours.get_xlim(), ours.get_ylim(), texts(ours)) == (theirs.get_xlim(), theirs.get_ylim(), texts(theirs))
        for a, b in zip(ours.lines, theirs.lines, strict=True):
            np.testing.assert_array_equal(a.get_data(), b.get_data())
        for a, b in zip(ours.collections, theirs.collections, strict=True):
            np.testing.assert_array_equal(a.get_segments(), b.get_segments())


def test_the_live_picture_follows():
    watched, pictures = Watched(every=4), []
    for step in watched.run:
        pictures.append(watched.run.explorer.png())
        assert watched.run.explorer.readout["step"] == step.step // 4 * 4
        assert watched.run.explorer.controls["step"].value == step.step // 4 * 4
    assert len(set(pictures)) == 4  # before the first measurement, and after each of three
    assert_as_replayed(watched.run)
    data, metadata = watched.run._repr_mimebundle_()
    assert data["text/plain"] == repr(watched.run.explorer)
    assert metadata["image/png"]["alt"]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("how", ["click", "call", "interrupt"])
def test_stop_and_go_on(how):
    watched, seen = Watched(every=3), []

    def stop(step):
        seen.append(step.step)
        if step.step not in (4, 9):
            return
        assert not watched.button.disabled
        if how == "interrupt":
            asyncio.current_task().cancel()  # what ipykernel makes of an interrupt of an async cell
        else:
            watched.button.click() if how == "click" else watched.run.stop()

    for last in (4, 9, 12):
        watched.in_a_cell(stop)
        assert seen == list(range(1, last + 1))
        assert watched.run.history[-1]["accuracy"] == unwatched()[0][last - 1]["accuracy"]
        assert watched.run.explorer.readout["step"] == last
        assert len(watched.run) == 12 - last
        assert watched.button.disabled
    assert_as_unwatched(watched, [3, 4, 6, 9, 12])


@pytest.mark.usefixtures("unseen")
def test_a_click_while_nothing_runs_stops_nothing():
    watched, seen = Watched(), []
    watched.button.click()
    watched.run.stop()
    watched.in_a_cell(seen.append)
    assert len(seen) == 12
    watched.button.click()
    watched.in_a_cell(seen.append)
    assert len(seen) == 12


@pytest.mark.usefixtures("unseen")
def test_an_interrupt_of_a_plain_loop():
    watched = Watched(every=2)
    measure, watched.run._measure = watched.run._measure, None
    calls = []

    def interrupted():
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure()

    watched.run._measure = interrupted
    assert [step.step for step in watched.run] == [1, 2, 3]
    assert watched.run.history[-1] == unwatched()[0][3]  # the step that was interrupted is kept
    assert [step.step for step in watched.run] == list(range(5, 13))


@pytest.mark.usefixtures("unseen")
def test_an_interrupt_within_a_step():
    class Interrupted:
        def __len__(self):
            return 3

        def __iter__(self):
            yield from list(train(small_network(), IMAGES, LABELS, epochs=1, lr=0.1, seed=0))[:1]
            raise KeyboardInterrupt

    run = watch(Interrupted(), lambda: {"accuracy": 50.0})
    assert [step.step for step in run] == [1]
    assert run.history[-1]["accuracy"] == 50.0
    assert list(run) == []


def test_axes_make_room_as_the_training_goes_on():
    losses, highs = [2.0, 3.0, 50.0, 0.001, 7.0, 1.0, 1.0, 1.0], iter([2.0, 3.0, 1.0, 31.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    steps = [Step(i, len(losses), loss) for i, loss in enumerate(losses, 1)]
    run = watch(steps, lambda: {"ranges": {"a": (-1.0, next(highs))}}, every=1)
    seen = []
    for _ in run:
        seen.append((*run.explorer.figure.axes[0].get_ylim(), run.explorer.figure.axes[2].get_xlim()[1] > 30))
    assert seen == [(1, 10, False), (1, 10, False), (1, 100, True)] + [(0.0001, 100, True)] * 5
    assert_as_replayed(run)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("choice, part", [
    ({"every": 0}, "every must be an integer of at least 1, got 0"), ({"every": 2.0}, "every"),
    ({"every": True}, "every"),
    ({"steps": iter([1])}, "steps must have a length, .* got list_iterator"), ({"steps": None}, "got NoneType"),
    ({"measure": lambda: {"accuracy": 101}}, "accuracy must be from 0 to 100, got 101 at step 0"),
    ({"measure": lambda: {"ranges": {"a": (1, 0)}}}, "alpha at most beta"),
])
def test_bad_watching(choice, part):
    steps = train(small_network(), IMAGES, LABELS, epochs=1, lr=0.1, seed=0)
    with pytest.raises(ValueError, match=part):
        watch(**{"steps": steps, "measure": dict} | choice)


@pytest.mark.usefixtures("unseen")
def test_a_diverged_training_says_so():
    watched = Watched()
    with pytest.raises(ValueError, match="v must be finite, got 48 NaN"):
        for step in watched.run:
            if step.step == 2:
                watched.model[0].layer.weight.data.fill_(math.nan)
    assert watched.run.history[-1]["step"] == 2
    assert watched.button.disabled


@pytest.mark.usefixtures("unseen")
def test_a_bad_measurement_ends_the_loop():
    accuracies = iter([50, 60, 170])
    run = watch([Step(i, 4, 1.0) for i in range(1, 5)], lambda: {"accuracy": next(accuracies)}, every=1)
    with pytest.raises(ValueError, match="accuracy must be from 0 to 100, got 170 at step 2"):
        list(run)
