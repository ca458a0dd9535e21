"""Lesson 04: a training, replayed and live."""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from qlab.explorers.colors import BLACK, BLUE, GREY, ORANGE
from qlab.explorers.parts import moving
from qlab.explorers.watching import LEAST, Watching, check_record
from qlab.live import Explorer, Handle, IntSlider, new_figure

_PLAY_FRAMES, _PLAY_MILLISECONDS = 80, 100


class Curves(NamedTuple):
    """What a history holds, and the limits of the axes that show it."""

    losses: np.ndarray  # steps, nats
    accuracies: np.ndarray  # steps, percent
    first_ranges: dict
    loss_limits: tuple
    range_limits: tuple


@dataclass(frozen=True)
class Run:
    """What `training_run` and `watch` show at one step of a training."""

    curves: Curves
    now: dict  # what was recorded last, up to that step


def training_run(history, levels=None):
    """Replay a training: drag its step, or press play.

    Left, the loss of each mini-batch and the accuracy, with a line at the present step, to be dragged. Right, the range
    of each layer at that step, over the one that it began with.

    Parameters
    ----------
    history : list of dicts, in the order of their steps
        Each has "step" (int) and what was recorded at that step: "loss" (nats, ≥ 0), "accuracy" (percent), "ranges"
        (dict of layer to (alpha, beta), always of the same layers). What `watch` records, or a loop of your own.
    levels : dict of str to float, optional
        Accuracies in percent to compare with, such as those before the training: a line for each.

    Returns
    -------
    Explorer
        Control ``step``. What a step has no record of is shown as it was last recorded.

    Raises
    ------
    ValueError
        If ``history`` is empty, its steps do not increase, a number is out of range or not finite, or layers change.

    References
    ----------
    Jacob et al. 2018, section 3.1 (ranges that follow the activations); Choi et al. 2018, section 3, and Esser et al.
    2020, section 2 (ranges that are learned).

    Examples
    --------
    >>> explorer = training_run([
    ...     {"step": 0, "accuracy": 41.0, "ranges": {"conv": (0.0, 6.0)}},
    ...     {"step": 1, "loss": 1.7},
    ...     {"step": 2, "loss": 0.9, "accuracy": 80.5, "ranges": {"conv": (0.0, 3.5)}},
    ... ])
    >>> explorer.readout
    {'step': 2, 'loss': 0.9, 'accuracy': 80.5, 'range conv': '0 … 3.5'}
    >>> explorer.set(step=1)
    >>> explorer.readout
    {'step': 1, 'loss': 1.7, 'accuracy': 41.0, 'range conv': '0 … 6'}
    """
    if not isinstance(history, (list, tuple)) or not history:
        raise ValueError(f"history must be a list of at least one dict, got {history!r}")
    history, levels = list(history), _checked_levels(levels)
    for i, record in enumerate(history):
        check_record(record, history[:i])
    curves = _curves(history)
    first, last = history[0]["step"], history[-1]["step"]
    slider = IntSlider(last, min=first, max=last, description="step", style={"description_width": "36px"},
                       layout={"width": "600px"})
    play = widgets.Play(value=last, min=first, max=last, step=max(1, (last - first) // _PLAY_FRAMES),
                        interval=_PLAY_MILLISECONDS)
    widgets.jslink((play, "value"), (slider, "value"))
    figure, artists = _run_figure(list(curves.first_ranges), first, last, levels)
    return Explorer(
        figure, {"step": slider}, lambda step: Run(curves, _latest(history, step)), partial(_draw_run, artists),
        _read_run, arrange=lambda controls, chips: widgets.HBox([play, slider]),
        handles=[Handle("the step", line.axes, lambda run: (run.now["step"], None), lambda x, y, start: {"step": x})
                 for line in artists.here],
        ghost=[*artists.here, *artists.dots, artists.bars[1]],
        main=("accuracy", "%") if "accuracy" in history[0] else None, **_RUN_WORDS,
    )


class watch(Watching):
    """Watch a training while it runs: hand its steps on, record them and draw them, with a Stop button.

    Show it in one cell, and loop over it in the next:

        run = watch(train(model, images, labels, epochs=20, lr=0.01, seed=0), measure)
        run

        async for step in tqdm(run):
            pass

    ``async for`` lets the kernel hear the Stop button between two steps (with ipykernel from 7 on); during a plain
    ``for`` it does not listen. The kernel's own interrupt stops either. The loop ends without an error and the model
    keeps the weights it has. After an ``async for``, another one over ``run`` goes on with the training.

    Parameters
    ----------
    steps : iterator of Step
        From `qlab.training.train`.
    measure : function
        ``measure() -> dict`` of what is to be recorded beside the loss: "accuracy" and "ranges", as in `training_run`.
        It is called before the first step, after every ``every``-th one and after the last.
    every : int, ≥ 1
        Steps between two measurements and two pictures.
    levels : dict of str to float, optional
        As `training_run`.

    Attributes
    ----------
    history : list of dicts
        For `training_run`. The first is that of step 0, before the training.
    explorer : Explorer
        The live picture.

    Raises
    ------
    ValueError
        If ``steps`` has no length, ``every`` is out of range, or a record is not as `training_run` wants it: for one,
        if the training diverges and the loss is not finite any more.

    Examples
    --------
    >>> import torch
    >>> from qlab import digits
    >>> from qlab.training import train
    >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    >>> model = torch.nn.Linear(1, 2)
    >>> run = watch(train(model, x, y, epochs=100, lr=0.1, seed=0),
    ...             lambda: {"accuracy": digits.accuracy(model, x, y)}, every=20)
    >>> for step in run:
    ...     pass
    >>> run.explorer.readout["step"], run.explorer.readout["accuracy"], len(run.history)
    (100, 100.0, 101)
    """

    def __init__(self, steps, measure, every=10, *, levels=None):
        self._levels = _checked_levels(levels)
        super().__init__(steps, measure, every)

    def _new_explorer(self, controls, arrange):
        figure, artists = _run_figure(list(self.history[0].get("ranges", {})), 0, self._total, self._levels)
        return Explorer(figure, controls, lambda step: Run(_curves(self.history), _latest(self.history, step)),
                        partial(_draw_run, artists), _read_run, arrange=arrange, **_RUN_WORDS)

    def _of_step(self, step):
        """What is recorded of a step."""
        return {"step": step.step, "loss": step.loss}


def _checked_levels(levels):
    levels = dict(levels or {})
    for name, percent in levels.items():
        if not (isinstance(percent, (int, float, np.number)) and 0 <= percent <= 100):
            raise ValueError(f"levels must be from 0 to 100, got {percent!r} for {name!r}")
    return levels


def _curves(history):
    losses, accuracies = (np.array([(r["step"], r[name]) for r in history if name in r], float).reshape(-1, 2).T
                          for name in ("loss", "accuracy"))
    ranges = [record["ranges"] for record in history if "ranges" in record]
    ends = [end for layers in ranges for pair in layers.values() for end in pair]
    low, high = min(ends, default=0), max(ends, default=0)
    seen = np.clip(losses[1], LEAST, None) if losses.size else np.ones(1)
    return Curves(
        losses, accuracies, ranges[0] if ranges else {},
        (10.0 ** math.floor(math.log10(seen.min()) - 1e-9), 10.0 ** math.ceil(math.log10(seen.max()) + 1e-9)),
        (-_round_up(-low) if low < 0 else 0.0, _round_up(high) if high > 0 else 0.0),
    )


def _round_up(x):
    """The next rounder number."""
    power = 10.0 ** math.floor(math.log10(x))
    return next(digit * power for digit in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if digit * power >= x * (1 - 1e-9))


def _latest(history, step):
    """What was recorded last of everything, up to a step."""
    now = {}
    for record in history:
        if record["step"] > step:
            break
        now |= record
    return now | {"step": step}


def _read_run(result):
    now = {name: result.now[name] for name in ("step", "loss", "accuracy") if name in result.now}
    return now | {f"range {layer}": _spell_range(*ends) for layer, ends in result.now.get("ranges", {}).items()}


def _spell_range(alpha, beta):
    """Three digits of the larger end, and as many decimals of the other."""
    decimals = 2 - math.floor(math.log10(max(-alpha, beta, LEAST)))
    return " … ".join(f"{round(end, decimals) + 0.0:.6g}" for end in (alpha, beta)).replace("-", "−")


_RUN_WORDS = {
    "title": "A training",
    "description": "Left: the loss and the accuracy against the step, with a dashed line at the present one. Right: a "
    "bar for the present range of each layer's input, over a pale, wider bar for the range that it began with.",
}


def _run_figure(layers, first, last, levels):
    with new_figure() as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 0.95] if layers else [1, 0.01])
        above, below, right = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
        above.set(yscale="log", ylabel="loss (nats)")
        below.set(ylim=(0, 102), ylabel="accuracy (%)", xlabel="step")
        for axes in (above, below):
            axes.set_xlim(first, max(last, first + 1))
        above.tick_params(axis="x", labelbottom=False)
        for (name, percent), dashes in zip(levels.items(), itertools.cycle(["-", "--", ":"])):
            below.axhline(percent, color=BLACK, lw=1, ls=dashes, label=f"{name}: {percent:.1f} %")
        if levels:
            below.legend(loc="lower right", fontsize=12)
        losses = moving(above, color=BLUE, lw=1.2)
        accuracies = moving(below, "o-", color=ORANGE, ms=4, clip_on=False)
        here = [axes.axvline(first, color=BLACK, lw=1.6, ls="--", animated=True) for axes in (above, below)]
        dots = [moving(axes, "o", color=color, ms=10, clip_on=False, zorder=5)
                for axes, color in ((above, BLUE), (below, ORANGE))]

        right.set_visible(bool(layers))
        right.set(ylim=(len(layers) - 0.4, -0.6), xlabel="range of the layer's input")
        right.set_yticks(range(len(layers)), layers)
        right.tick_params(axis="y", length=0)
        bars = [LineCollection([], colors=color, linewidths=width, capstyle="butt", animated=True)
                for color, width in ((GREY, 24), (BLUE, 10))]
        for bar in bars:
            right.add_collection(bar, autolim=False)
        right.legend([Line2D([], [], color=GREY, lw=12), Line2D([], [], color=BLUE, lw=6)],
                     ["at first", "now"], loc="lower right", ncols=2, bbox_to_anchor=(1, 1), frameon=False)
        names = [right.text(0, row, "", va="center_baseline", fontsize=13, animated=True) for row in range(len(layers))]
    return figure, SimpleNamespace(above=above, right=right, losses=losses, accuracies=accuracies, here=here, dots=dots,
                                   bars=bars, names=names, limits=None)


def _draw_run(artists, result):
    curves, now = result.curves, result.now
    limits = curves.loss_limits, curves.range_limits
    if limits != artists.limits:  # a new background
        artists.limits = limits
        artists.above.set_ylim(*curves.loss_limits)
        low, high = curves.range_limits
        margin = 0.02 * (high - low) or 1.0
        artists.right.set_xlim(low - margin, high + 21 * margin)  # room for the numbers
    artists.losses.set_data(*np.maximum(curves.losses, [[-np.inf], [LEAST]]))
    artists.accuracies.set_data(*curves.accuracies)
    for line, dot, name in zip(artists.here, artists.dots, ("loss", "accuracy"), strict=True):
        line.set_xdata([now["step"]] * 2)
        dot.set_data([now["step"]], [max(now[name], LEAST) if name in now else np.nan])
    ranges = now.get("ranges", {})
    for bar, pairs in zip(artists.bars, (curves.first_ranges if ranges else {}, ranges), strict=True):
        bar.set_segments([[(alpha, row), (beta, row)] for row, (alpha, beta) in enumerate(pairs.values())])
    gap = 0.01 * np.ptp(artists.right.get_xlim())
    for row, text in enumerate(artists.names):
        text.set_visible(bool(ranges))
        if ranges:
            layer, ends = list(ranges.items())[row]
            text.set(x=max(ends[1], curves.first_ranges[layer][1]) + gap, text=_spell_range(*ends))
