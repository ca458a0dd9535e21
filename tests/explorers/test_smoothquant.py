"""The live figure of lesson 06: each control over its whole range, and what it shows against NumPy alone."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch

from qlab import samples
from qlab.explorers import smoothing
from qlab.explorers.smoothquant import ALPHAS, OFF, PRINTED, RIGHT, TENSOR, VECTOR
from qlab.studies import smoothquant as study
from qlab.studies.tables import load
from tests.explorers.checks import (
    assert_compute_draws_nothing,
    assert_pairs_meet,
    assert_refuses,
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    made,
    own,
    pairwise,
    pictures_along,
    values,
    without_pixels,
)

PRODUCTS, WHOLE = samples.products(), samples.largest_weights()
PLACES = list(PRODUCTS)
START = {"place": PLACES[0], "direction": OFF, "alpha": 0.5, "per": TENSOR, "bits": 8}
VALUES = {"place": PLACES, "direction": (OFF, RIGHT, PRINTED), "alpha": [round(0.05 * i, 2) for i in range(21)],
          "per": (TENSOR, VECTOR), "bits": range(2, 9)}
MET = VALUES | {"alpha": VALUES["alpha"][::4]}  # each α meets the readout below
ALL_PAIRS = sorted(pairwise(MET), key=lambda setting: PLACES.index(setting["place"]))  # few new backgrounds
X, W = own(4, 8)


@lru_cache
def shared():
    return made(smoothing)


def put(**setting):
    shared().set(**START | setting)
    return shared()


# NumPy alone, in float64


def scales(x, columns, alpha, direction):
    """Equation 4, with the least values of the published code; on the slides they multiply X."""
    if direction == OFF:
        return np.ones(x.shape[1])
    a = np.abs(x).max(0)
    s = np.maximum(a**alpha / np.maximum(columns, 1e-5) ** (1 - alpha), 1e-5)
    return 1 / s if direction == PRINTED else s


def on_grid(matrix, most, bits):
    step = most / (2 ** (bits - 1) - 1)
    step = np.where(step == 0, 1, step)
    return np.rint(matrix / step) * step


def directly(x, w, whole, *, alpha, direction, per, bits):
    """The error of Y in percent, and the peaks of what is quantized: channels of X and W, rows of the whole W."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    columns, values, at = whole or (np.abs(w).max(0), np.abs(w), np.broadcast_to(np.arange(w.shape[1]), w.shape))
    s = scales(x, columns.astype(np.float64), alpha, direction)
    rows = (values * s[at]).max(1)
    most = [np.abs(x / s).max(), rows.max()] if per == TENSOR else [
        np.abs(m).max(1, keepdims=True) for m in (x / s, w * s)]
    y, y_hat = x @ w.T, on_grid(x / s, most[0], bits) @ on_grid(w * s, most[1], bits).T
    error = 100 * np.sqrt(((y_hat - y) ** 2).sum() / (y**2).sum())
    return error, np.abs(x / s).max(0), columns * s, rows


def panels_of(explorer):
    return [next(axes for axes in explorer.figure.axes if words in axes.get_title())
            for words in ("|X| of each channel", "|W| of each channel", "|W| of each row", "error of Y")]


def assert_reads_and_shows(explorer, x, w, whole=None):
    setting = {name: value for name, value in values(explorer).items() if name != "place"}
    now, x_peaks, w_peaks, rows = directly(x, w, whole, **setting)
    off, _, _, before_rows = directly(x, w, whole, **setting | {"direction": OFF})
    shown = {name: number for name, number in explorer.readout.items() if name != "best_alpha"}
    assert shown == pytest.approx({
        "output_error_percent": now, "off_percent": off, "largest_x": x_peaks.max(), "largest_w": w_peaks.max(),
        "row_to_median": rows.max() / max(np.median(rows), np.finfo(np.float32).tiny)}, rel=2e-3, abs=1e-4)

    *three, curve = panels_of(explorer)
    columns = whole[0] if whole else np.abs(w).max(0)
    was_peaks = np.abs(x).max(0), columns, before_rows
    for panel, was, peaks in zip(three, was_peaks, (x_peaks, w_peaks, rows), strict=True):
        before, after = panel.lines
        np.testing.assert_allclose(before.get_ydata(), was, rtol=1e-6)
        np.testing.assert_allclose(after.get_ydata(), peaks, rtol=1e-5)
        for line in (before, after):
            np.testing.assert_array_equal(line.get_xdata(), np.arange(was.size))

    line, off_line, dot = curve.lines
    assert list(off_line.get_ydata()) == pytest.approx([np.clip(off, 0.1, 200)] * 2, rel=2e-3)
    if setting["direction"] == OFF:
        assert len(dot.get_xydata()) == len(line.get_xydata()) == 0
        assert explorer.readout["best_alpha"] == "—"
    else:
        np.testing.assert_array_equal(line.get_xdata(), ALPHAS)
        error, *_ = directly(x, w, whole, **setting | {"alpha": ALPHAS[16]})
        assert line.get_ydata()[16] == pytest.approx(np.clip(error, 0.1, 200), rel=2e-3)
        assert dot.get_xydata()[0] == pytest.approx([setting["alpha"], np.clip(now, 0.1, 200)], rel=2e-3)


# what ships


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("setting", ALL_PAIRS, ids=lambda setting: " ".join(map(str, setting.values())))
def test_smoothing_reads_and_shows_what_numpy_computes(setting):
    explorer = put(**setting)
    assert_reads_and_shows(explorer, *PRODUCTS[setting["place"]], WHOLE[setting["place"]])
    assert not explorer.errors


def test_each_value_meets_each_other():
    assert_pairs_meet(ALL_PAIRS, MET)
    assert len(ALL_PAIRS) < 100
    for name, control in shared().controls.items():
        if name == "place":
            assert [value for _, value in control.options] == PLACES
        elif name in ("alpha", "bits"):
            assert (control.min, control.max) == (VALUES[name][0], VALUES[name][-1])
        else:
            assert control.options == VALUES[name]
    assert shared().controls["alpha"].step == 0.05


@pytest.mark.parametrize("control", START)
def test_a_control_over_its_whole_range(control):
    pictures = pictures_along(put(direction=RIGHT, place=PLACES[2], bits=5), control, redrawn=["place"])
    assert len(set(pictures)) == len(pictures)


def test_the_picture_does_not_depend_on_the_way_there():
    fresh = smoothing()
    for setting in ({}, {"place": PLACES[1], "direction": PRINTED, "alpha": 0.2, "per": VECTOR}):
        fresh.set(**setting)
        assert_same_whichever_way(shared(), fresh)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("direction", [RIGHT, PRINTED])
def test_the_point_of_the_curve_at_alpha_is_the_readout(place, direction):
    readouts, curves = [], []
    first = PLACES.index(place) + 4 * (direction == PRINTED)
    for i, alpha in enumerate(VALUES["alpha"]):
        explorer = put(place=place, direction=direction, alpha=alpha)
        if i % 8 == first:
            assert_reads_and_shows(explorer, *PRODUCTS[place], WHOLE[place])
        readouts.append(explorer.readout["output_error_percent"])
        curves.append(explorer._compute(**START | {"place": place, "direction": direction, "alpha": alpha}).curve)
    np.testing.assert_allclose(curves, [readouts] * len(curves), rtol=1e-4)
    assert explorer.readout["best_alpha"] == VALUES["alpha"][np.argmin(readouts)]
    assert len(set(readouts)) > 5  # where the wrong direction loses all of Y it loses 100 % for many α


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("per", VALUES["per"])
def test_off_does_not_smooth_whatever_alpha(place, per):
    x, _ = PRODUCTS[place]
    kept = put(place=place, per=per).readout
    assert kept["output_error_percent"] == kept["off_percent"]
    assert (kept["largest_x"], kept["largest_w"]) == (np.abs(x).max(), WHOLE[place][0].max())
    for alpha in VALUES["alpha"]:
        assert put(place=place, per=per, alpha=alpha).readout == kept
        setting = {"place": place, "per": per, "alpha": alpha, "direction": RIGHT}
        assert put(**setting).readout["off_percent"] == kept["off_percent"]


@pytest.mark.parametrize("per", VALUES["per"])
def test_the_picture_of_off_is_the_same_whatever_alpha(per):
    assert len({put(per=per, alpha=alpha).png() for alpha in VALUES["alpha"]}) == 1


@pytest.mark.usefixtures("unseen")
def test_alpha_needs_a_direction():
    explorer = put()
    alpha = explorer.controls["alpha"]
    assert alpha.disabled
    for direction in (RIGHT, PRINTED):
        explorer.controls["direction"].value = direction
        assert not alpha.disabled
        explorer.controls["alpha"].value = 0.7
        explorer.controls["place"].value = PLACES[1]
        assert not alpha.disabled
        explorer.controls["direction"].value = OFF
        assert alpha.disabled and alpha.value == 0.7


def test_every_position_has_its_picture():
    pictures = {}
    settings = [START | {"place": place, "direction": direction, "alpha": alpha, "per": per, "bits": bits}
                for place in PLACES for direction in (RIGHT, PRINTED) for alpha, per, bits in (
                    (0.2, TENSOR, 8), (0.8, TENSOR, 8), (0.8, VECTOR, 8), (0.8, TENSOR, 5))]
    for setting in settings:
        pictures[tuple(setting.values())] = put(**setting).png()
    assert len(set(pictures.values())) == len(settings)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("per", VALUES["per"])
@pytest.mark.parametrize("place", PLACES)
def test_smoothing_helps_in_one_direction_only(place, per):
    """But for the input of down under one scale: a single row of W takes the needle in."""
    off = put(place=place, per=per).readout["off_percent"]
    helped = put(place=place, per=per, direction=RIGHT, alpha=0.5).readout["output_error_percent"] < off
    assert helped == ((place, per) != ((11, "down_in"), TENSOR))
    assert put(place=place, per=per, direction=PRINTED, alpha=0.5).readout["output_error_percent"] > off


@pytest.mark.usefixtures("unseen")
def test_one_row_of_down_takes_the_needle_in():
    place = (11, "down_in")
    assert put(place=place).readout["row_to_median"] < 10
    explorer = put(place=place, direction=RIGHT, alpha=0.7)
    assert explorer.readout["row_to_median"] > 300
    rows = panels_of(explorer)[2].lines[1].get_ydata()
    assert rows.argmax() == 507 and np.sort(rows)[-2] < rows.max() / 10


@pytest.mark.usefixtures("unseen")
def test_the_ends_of_alpha():
    for direction, alpha, panel in ((RIGHT, 1, 0), (RIGHT, 0, 1)):
        axes = panels_of(put(direction=direction, alpha=alpha))[panel]
        np.testing.assert_allclose(axes.lines[1].get_ydata(), 1, rtol=1e-5)


@pytest.mark.usefixtures("unseen")
def test_the_whole_model_over_alpha_is_that_of_the_study():
    found = load("smoothquant")
    axes = next(axes for axes in put(direction=RIGHT, alpha=0.3).figure.axes if "whole model" in axes.get_title())
    *texts, off, now = axes.lines
    for line in texts:
        expected = [found.row(f"α {alpha}", line.get_label()).kl for alpha in study.ALPHAS]
        np.testing.assert_array_equal(line.get_ydata(), expected)
        assert line.get_visible()
    assert list(now.get_xdata()) == [0.3, 0.3]
    kls = [found.row("none", line.get_label()).kl for line in texts]
    assert min(kls) <= off.get_ydata()[0] <= max(kls)
    for direction in (OFF, PRINTED):
        put(direction=direction)
        assert not any(line.get_visible() for line in (*texts, now))


@pytest.mark.usefixtures("unseen")
def test_words():
    explorer = smoothing()
    assert values(explorer) == START
    assert_words(explorer)


def test_compute_draws_nothing():
    assert_compute_draws_nothing(put(direction=RIGHT), [{"place": place} for place in PLACES])


# places of one's own


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens, channels, outputs", [(7, 100, 5), (1, 1, 1), (1, 64, 3), (9, 1, 2), (500, 8, 4)])
def test_one_place_of_ones_own(tokens, channels, outputs):
    x, w = own(tokens, channels, outputs)
    explorer = smoothing({(3, "my site"): (x, w)}, bits=4)
    assert explorer.controls["bits"].value == 4
    assert explorer.controls["place"].options == (("layer 3, my site", (3, "my site")),)
    with without_pixels():
        for direction, per, alpha in itertools.product(VALUES["direction"], VALUES["per"], (0.3, 1)):
            explorer.set(direction=direction, per=per, alpha=alpha)
            assert_reads_and_shows(explorer, x, w)
    explorer.set()
    assert not explorer.errors


@pytest.mark.filterwarnings("error")
def test_channels_of_zeros():
    x, w = own(6, 16)
    x[:, 3], w[:, 5], x[:, 7], w[:, 7] = 0, 0, 0, 0
    explorer = smoothing({(0, "attn_in"): (x, w)})
    for direction, per, alpha in itertools.product(VALUES["direction"], VALUES["per"], (0, 0.5, 1)):
        explorer.set(direction=direction, per=per, alpha=alpha)
        assert_sound(explorer)
        assert_reads_and_shows(explorer, x, w)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("size_x", [1e-3, 1, 1e3])
@pytest.mark.parametrize("size_w", [1e-3, 1, 1e3])
def test_what_is_smoothed_lies_in_the_picture(size_x, size_w):
    explorer = smoothing({(0, "attn_in"): (size_x * X, size_w * W)})
    for alpha in VALUES["alpha"]:
        explorer._draw(explorer._compute(**START | {"place": (0, "attn_in"), "direction": RIGHT, "alpha": alpha}))
        for panel in panels_of(explorer):
            low, high = panel.get_ylim()
            assert all(low <= np.min(line.get_ydata()) and np.max(line.get_ydata()) <= high for line in panel.lines)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_data_is_left_alone_and_may_change_later(kind):
    x, w = map(kind, own(6, 64))
    kept = [a.tolist() for a in (x, w)]
    explorer = smoothing({(0, "attn_in"): (x, w)})
    explorer.set(direction=RIGHT, alpha=0.3)
    before = explorer.readout
    assert [a.tolist() for a in (x, w)] == kept
    x *= 3
    w *= 2
    explorer.set(bits=4)
    explorer.set(bits=8, alpha=0.35)
    explorer.set(alpha=0.3)
    assert explorer.readout == before


@pytest.mark.parametrize("control, value", [("direction", "left"), ("alpha", 1.1), ("alpha", -0.1), ("per", "row"),
                                            ("bits", 9), ("place", (0, "a"))])
def test_a_bad_setting_is_told(control, value):
    assert_refuses(put(), control, value)
