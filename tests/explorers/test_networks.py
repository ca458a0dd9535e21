"""The live figures of lesson 04 against qlab.ptq, autograd and plain training loops; ways to stop a watched one."""

import asyncio
import copy
import math
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from sklearn.metrics import confusion_matrix
from torch import nn
from tqdm.auto import tqdm

from qlab import digits, ptq
from qlab import qat as quantizers
from qlab.explorers import digits_ptq, networks, qat, training_run, watch
from qlab.explorers.qat_figure import LSQ, PACT
from qlab.live import VERMILION
from qlab.training import Step, train
from tests.explorers.checks import (
    assert_same_whichever_way,
    assert_sound,
    assert_words,
    figures,
    in_a_cell,
    pictures_along,
    values,
)

DATA = digits.data()
HISTORY = [
    {"step": 0, "accuracy": 31.5, "ranges": {"conv": (0.0, 1.0), "linear": (-0.2, 6.0)}},
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 1.25},
    {"step": 3, "loss": 0.75, "accuracy": 60.0, "ranges": {"conv": (0.0, 1.25), "linear": (-0.5, 4.0)}},
    {"step": 4, "loss": 0.5},
    {"step": 6, "loss": 0.25, "accuracy": 92.5, "ranges": {"conv": (0.0, 1.5), "linear": (-1.0, 2.0)}},
]
MAKERS = {"digits_ptq": digits_ptq, "qat": qat, "training_run": partial(training_run, HISTORY)}
SETTINGS = [
    ("digits_ptq", {"weight_bits": 4, "activation_bits": 4}),
    ("digits_ptq", {"weight_bits": 3, "activation_bits": 5, "calibrator": "percentile", "weights": "per channel",
                    "weight_range": "MSE"}),
    ("digits_ptq", {"mode": "dynamic", "activation_bits": 3}),
    ("qat", {}),
    ("qat", {"scheme": PACT, "bits": 4, "alpha": 1.3, "x": 0.9}),
    ("training_run", {}),
]
START = {
    "digits_ptq": {"weight_bits": 8, "activation_bits": 8, "calibrator": "min-max", "weights": "per tensor",
                   "weight_range": "min-max", "mode": "static"},
    "qat": {"scheme": LSQ, "bits": 3, "s": 0.5, "alpha": 2.0, "x": 0.65},
    "training_run": {"step": 6},
}
CONTROLS = [(name, setting, control) for name, setting in SETTINGS for control in START[name]
            if (control, setting.get("scheme", LSQ)) not in [("s", PACT), ("alpha", LSQ)]
            and (control, setting.get("mode")) != ("calibrator", "dynamic")]
ORDINARY = [  # for comparisons with qlab.ptq
    {}, {"weight_bits": 2}, {"activation_bits": 2}, {"weight_bits": 4, "activation_bits": 4},
    {"weight_bits": 4, "activation_bits": 4, "weights": "per channel"},
    {"weight_bits": 3, "activation_bits": 3, "weights": "per channel", "weight_range": "MSE", "calibrator": "MSE"},
    {"weight_bits": 3, "activation_bits": 4, "weight_range": "MSE", "calibrator": "percentile"},
    {"weight_bits": 5, "activation_bits": 3, "calibrator": "KL"}, {"activation_bits": 3, "calibrator": "EMA"},
    {"activation_bits": 4, "weight_bits": 4, "mode": "dynamic"},
    {"activation_bits": 2, "weights": "per channel", "mode": "dynamic", "calibrator": "MSE"},
]


shared, put = figures(MAKERS, START)


def texts(axes, visible=True):
    return [text.get_text().replace("−", "-") for text in axes.texts if text.get_visible() == visible]


@pytest.mark.parametrize("name, setting, control", CONTROLS)
def test_a_control_over_its_whole_range(name, setting, control):
    pictures = pictures_along(put(name, setting), control, redrawn=["scheme", "bits"])
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("name, setting", SETTINGS)
def test_the_picture_does_not_depend_on_the_way_there(name, setting):
    fresh = MAKERS[name]()
    fresh.set(**setting)
    # The MSE calibrator searches long, and is met elsewhere.
    assert_same_whichever_way(shared(name), fresh, refuses=lambda _, *move: move == ("calibrator", "MSE"))


@pytest.mark.parametrize("name", MAKERS)
def test_words(name):
    explorer = MAKERS[name]()
    assert values(explorer) == START[name]
    assert_words(explorer)


def test_torch_is_imported_when_a_figure_needs_it():
    code = """
import sys
import qlab.explorers
assert {"digits_ptq", "qat", "training_run", "watch"} <= set(dir(qlab.explorers)) & set(qlab.explorers.__all__)
assert "clipping" in dir(qlab.explorers)
assert not hasattr(qlab.explorers, "no_such_figure")
assert "torch" not in sys.modules
from qlab.explorers import digits_ptq
assert "torch" in sys.modules
from qlab.explorers import *
assert qlab.explorers.watch is watch
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@lru_cache
def float_network():
    model = ptq.fold_batch_norm(digits.load())
    return model, ptq.observe(model, DATA.train_images[:256])


def quantized_network(*, weight_bits, activation_bits, calibrator, weights, weight_range, mode):
    """What `digits_ptq` shows, by way of qlab.ptq alone."""
    model, observed = float_network()
    choice = {"weight_bits": weight_bits, "activation_bits": activation_bits, "weight_range": weight_range,
              "per_channel": weights == "per channel"}
    if mode == "dynamic":
        return ptq.quantize_dynamic(model, **choice)
    return ptq.quantize_static(model, ptq.calibrate(observed, activation_bits, calibrator) | {"conv": (0, 1)}, **choice)


def predictions(model):
    with torch.no_grad():
        return model(DATA.test_images).argmax(1).numpy()


@pytest.mark.parametrize("changes", ORDINARY, ids=str)
def test_digits_ptq_reads_what_ptq_computes(changes):
    explorer = put("digits_ptq", changes)
    setting = START["digits_ptq"] | changes
    quantized, model = quantized_network(**setting), float_network()[0]
    sqnr = ptq.layer_sqnr(model, quantized, DATA.test_images)
    truth, before, after = DATA.test_labels.numpy(), predictions(model), predictions(quantized)
    worst = min(sqnr, key=sqnr.get)
    bytes_in_all = sum(
        layer.weight.numel() * setting["weight_bits"] / 8 + 4 * layer.bias.numel()
        + 4 * (len(layer.weight) if setting["weights"] == "per channel" else 1) for layer in ptq.layers(model).values())
    readout = dict(explorer.readout)
    assert readout.pop("worst_layer") == worst
    confusions = confusion_matrix(truth, after, labels=range(10))
    np.fill_diagonal(confusions, 0)
    times = confusions.max()
    label, reading = np.argwhere(confusions == times)[0]
    assert readout.pop("most_confused") == f"{label} read as {reading}, {times} time{'s' if times > 1 else ''}"
    assert readout == pytest.approx({
        "accuracy": digits.accuracy(quantized, DATA.test_images, DATA.test_labels),
        "float_accuracy": digits.accuracy(digits.load(), DATA.test_images, DATA.test_labels),
        "broken": np.sum((before == truth) & (after != truth)), "mended": np.sum((before != truth) & (after == truth)),
        "worst_sqnr_db": sqnr[worst], "size_kb": bytes_in_all / 1000,
    }, rel=1e-4)

    strip, bars, pictures = explorer.figure.axes
    (share,) = strip.patches[1:]
    assert share.get_width() == pytest.approx(readout["accuracy"])
    assert texts(strip)[0] == f"{readout['accuracy']:.1f} % right"
    (ratios,) = [line for line in bars.collections if line.get_animated()]
    np.testing.assert_allclose([segment[1][0] for segment in ratios.get_segments()], list(sqnr.values()), atol=1e-3)
    assert [label.get_text() for label in bars.get_yticklabels()] == list(sqnr)
    red = [tuple(color) == to_rgba(VERMILION) for color in ratios.get_color()]
    assert red == [name == worst for name in sqnr] == [text.endswith("worst") for text in texts(bars)]
    np.testing.assert_allclose([float(text.split()[0]) for text in texts(bars)], list(sqnr.values()), atol=0.0501)
    low, high = bars.get_xlim()
    assert all(low < db < high - 4 for db in sqnr.values())  # room for the number

    broken = np.flatnonzero((before == truth) & (after != truth))
    count, _, *captions = texts(pictures)
    assert count == f"Broken digits: {len(broken)}" + (", 12 of them:" if len(broken) > 12 else "")
    assert captions == [f"{truth[i]} → {after[i]}" for i in broken[:12]]
    mosaic = np.asarray(pictures.images[0].get_array())
    shown = np.zeros(mosaic.shape[:2], bool)
    for place, i in enumerate(broken[:12]):
        x, y = (pictures.texts[2 + place].get_position() - np.array([5, 8.3])).astype(int)
        block = mosaic[y:y + 8, x + 1:x + 9]
        np.testing.assert_allclose(block[..., 0], 240 * (1 - DATA.test_images[i, 0]), atol=0.501)
        assert (block[..., :3] == block[..., :1]).all()
        assert (block[..., 3] == 255).all()
        shown[y:y + 8, x + 1:x + 9] = True
    assert (mosaic[~shown] == 0).all()
    assert shown.sum() == 64 * min(len(broken), 12)


@pytest.mark.parametrize("labels, readings, spelled", [
    ([3, 5], [3, 5], "none"), ([0], [9], "0 read as 9, 1 time"), ([8, 1, 8, 8], [1, 8, 1, 8], "8 read as 1, 2 times"),
    ([9, 2, 2], [0, 7, 3], "2 read as 3, 1 time"),
])
def test_most_confused(labels, readings, spelled):
    assert networks._most_confused(torch.tensor(labels), torch.tensor(readings)) == spelled


def test_few_bits_break_digits_and_eight_do_not():
    broken = [put("digits_ptq", {"weight_bits": bits, "activation_bits": bits}).readout["broken"] for bits in (8, 4, 2)]
    assert broken[0] <= 2
    assert 12 < broken[1] < 100 < broken[2]


@pytest.mark.parametrize("changes, accuracy", [
    ({"weight_bits": 4}, 93.1), ({"activation_bits": 4}, 98.6), ({"weight_bits": 3}, 70.6),
    ({"activation_bits": 3}, 95.3),
    *[({"weight_bits": 3, "activation_bits": 3, **more}, accuracy) for more, accuracy in [
        ({}, 55.0), ({"calibrator": "KL"}, 58.1), ({"weight_range": "MSE"}, 75.8), ({"weights": "per channel"}, 76.1),
        ({"weights": "per channel", "weight_range": "MSE", "calibrator": "MSE"}, 88.6)]],
], ids=str)
def test_what_lesson_04_says_of_digits_ptq(changes, accuracy):
    explorer = put("digits_ptq", changes)
    assert explorer.readout["accuracy"] == pytest.approx(accuracy, abs=0.33)  # an image, by sums in another order
    assert explorer.readout["worst_layer"] == "pointwise3"
    said = (Path(__file__).parents[2] / "notebooks" / "04_ptq_and_qat.ipynb").read_text(encoding="utf-8")
    assert f"{accuracy} %" in said


def test_what_a_scale_per_channel_takes():
    sizes = [put("digits_ptq", {"weight_bits": 3, "weights": weights}).readout["size_kb"]
             for weights in ("per tensor", "per channel")]
    assert f"{sizes[1] - sizes[0]:.1f}" == "0.9"  # as lesson 04 says


@pytest.mark.parametrize("calibrator", ptq.CALIBRATORS)
def test_another_calibrator_helps_little_where_the_weights_fail(calibrator):
    accuracy = put("digits_ptq", {"weight_bits": 3, "activation_bits": 3, "calibrator": calibrator}).readout["accuracy"]
    assert 54 < accuracy < 59


def test_dynamic_quantization_needs_no_calibrator():
    explorer = put("digits_ptq", {"activation_bits": 3})
    assert not explorer.controls["calibrator"].disabled
    static = explorer.readout
    explorer.controls["mode"].value = "dynamic"
    assert explorer.controls["calibrator"].disabled
    dynamic = explorer.readout
    assert dynamic != static
    explorer.set(calibrator="EMA")
    assert explorer.readout == dynamic
    explorer.set(calibrator="min-max", mode="static")
    assert explorer.readout == static
    assert not explorer.controls["calibrator"].disabled


def test_digits_ptq_leaves_torchs_settings_alone(monkeypatch):
    inside = []
    observe = ptq.observe
    monkeypatch.setattr(ptq, "observe", lambda *given: inside.append(torch.get_num_threads()) or observe(*given))
    quantize = ptq.quantize_static
    monkeypatch.setattr(ptq, "quantize_static",
                        lambda *given, **more: inside.append(torch.get_num_threads()) or quantize(*given, **more))
    torch.set_num_threads(2)
    try:
        explorer = digits_ptq()
        assert torch.get_num_threads() == 2
        explorer.set(weight_bits=7, mode="dynamic")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert inside == [1, 1, 1]
    assert torch.is_grad_enabled()


def round_ste(u):
    return (u.round() - u).detach() + u


def ends(scheme, bits, s, alpha):
    return (0, alpha) if scheme == PACT else (-s * min(2 ** (bits - 1), 127), s * (2 ** (bits - 1) - 1))


def formulas(scheme, bits, s, alpha, x):
    """x̂ and its gradients by x and by s or α, out of autograd; float64 tensors of the shape of ``x``."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    p = torch.full_like(x, s if scheme == LSQ else alpha).requires_grad_()
    if scheme == LSQ:
        most = 2 ** (bits - 1) - 1
        x_hat = round_ste((x / p).clamp(-min(most + 1, 127), most)) * p
    else:
        y = torch.where(x < p, x.clamp(min=0), p)
        s = p.detach() / (2**bits - 1)
        x_hat = round_ste(y / s) * s
    return x_hat.detach(), *torch.autograd.grad(x_hat.sum(), (x, p))


def trained(scheme, bits, s, alpha, x):
    """The same by way of qlab.qat, in float32."""
    x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    if scheme == LSQ:
        quantizer = quantizers.LSQ(bits, torch.full((len(x),), s), n=1)
        p, share = quantizer.scale, quantizer.gradient_scale
        x_hat = quantizer(x[:, None])[:, 0]
    else:
        quantizer = quantizers.PACT(bits, torch.full((len(x),), alpha))
        p, share, x_hat = quantizer.alpha, 1, quantizer(x)
    by_x, by_p = torch.autograd.grad(x_hat.sum(), (x, p))
    return x_hat.detach(), by_x, by_p / share


def curve_at(line, x):
    """Heights of a line that has gaps, at places that are not its corners."""
    xs, ys = (np.asarray(values, float) for values in line.get_data())
    found = np.full(len(x), np.nan)
    for i in range(len(xs) - 1):
        inside = (xs[i] < x) & (x < xs[i + 1])
        assert not (inside & ~np.isnan(found)).any(), "two heights at one place"
        found[inside] = np.interp(x[inside], xs[i:i + 2], ys[i:i + 2])
    return found


SCALES = st.sampled_from([1 / 64, 0.02, 0.1, 0.3125, 0.5, 0.77, 1.0])


@given(scheme=st.sampled_from([LSQ, PACT]), bits=st.integers(2, 8), s=SCALES, alpha=st.floats(0.25, 3),
       near=st.sampled_from(["anywhere", "low", "high"]), steps=st.floats(-1, 1))
@example(scheme=LSQ, bits=3, s=0.5, alpha=1.0, near="high", steps=0.3)  # outside, though it rounds to the last code
@example(scheme=LSQ, bits=3, s=0.5, alpha=1.0, near="low", steps=-0.3)
@example(scheme=LSQ, bits=3, s=0.5, alpha=1.0, near="high", steps=0.0)
@example(scheme=PACT, bits=3, s=0.5, alpha=1.0, near="high", steps=0.0)
@example(scheme=PACT, bits=3, s=0.5, alpha=1.0, near="low", steps=0.0)
def test_qat_reads_the_gradients_of_autograd(*, scheme, bits, s, alpha, near, steps):
    step = s if scheme == LSQ else alpha / (2**bits - 1)
    low, high = ends(scheme, bits, s, alpha)
    x = min(max({"anywhere": 0, "low": low, "high": high}[near] + steps * (3 if near == "anywhere" else step), -3), 3)
    explorer = put("qat", {"scheme": scheme, "bits": bits, "s": s, "alpha": alpha, "x": x})
    x_hat, by_x, by_p = (value.item() for value in formulas(scheme, bits, s, alpha, [x]))
    readout = explorer.readout
    assert readout["x_hat"] == pytest.approx(x_hat, abs=1e-12)
    assert readout["straight_through"] == by_x
    assert readout["gradient_by_s" if scheme == LSQ else "gradient_by_alpha"] == pytest.approx(by_p, abs=1e-9)
    assert readout["code"] * step == pytest.approx(x_hat, abs=1e-9)
    heights = [line.get_ydata()[0] for axes in explorer.figure.axes for line in axes.lines if line.get_marker() == "o"]
    assert heights == pytest.approx([x_hat, by_x, by_p], abs=1e-9)


@pytest.mark.parametrize("scheme", [LSQ, PACT])
@pytest.mark.parametrize("bits, s, alpha", [
    (2, 0.7, 2.5), (3, 0.5, 2.0), (4, 0.3, 0.9), (8, 0.015625, 3.0), (8, 0.5, 1.0),
])
def test_the_curves_of_qat(scheme, bits, s, alpha):
    explorer = put("qat", {"scheme": scheme, "bits": bits, "s": s, "alpha": alpha})
    above, middle, below = explorer.figure.axes
    x = np.linspace(-2.9987, 2.9971, 4001)
    stairs, ones, by_p = (value.numpy() for value in formulas(scheme, bits, s, alpha, x))
    moving = [[line for line in axes.lines if line.get_animated() and line.get_linestyle() != "None"]
              for axes in (above, middle, below)]
    (x_hat, _), (jumps, true, straight_through, _), (gradient, _) = moving
    np.testing.assert_allclose(curve_at(x_hat, x), stairs, atol=1e-6)
    np.testing.assert_allclose(curve_at(straight_through, x), ones)
    np.testing.assert_allclose(curve_at(gradient, x), by_p, atol=1e-6)
    np.testing.assert_array_equal(curve_at(true, x), 0)
    for theirs, ours in zip(trained(scheme, bits, s, alpha, x), (stairs, ones, by_p), strict=True):
        assert np.mean(np.abs(theirs.numpy() - ours) < 1e-4) > 0.995  # float32 rounds ties and ends its own way

    places = np.unique(np.asarray(jumps.get_xdata())[np.isfinite(jumps.get_xdata())])
    crossed = x[1:][np.diff(stairs) != 0]
    assert np.sum((x[0] < places) & (places < x[-1])) == len(crossed)
    assert all(np.abs(places - place).min() < 2 * (x[1] - x[0]) for place in crossed)
    low, high = ends(scheme, bits, s, alpha)
    for axes in (above, middle, below):
        left, right = [patch for patch in axes.patches if patch.get_animated()]
        assert (left.get_x() + left.get_width() if low > -3 else low) == pytest.approx(low)
        assert (right.get_x() if high < 3 else high) == pytest.approx(high)
    assert below.get_ylabel() == ("∂x̂/∂s" if scheme == LSQ else "∂x̂/∂α")
    assert explorer.readout["range"] == f"{low:.4g} … {high:.4g}".replace("-", "−")


@given(bits=st.integers(2, 8), s=SCALES, steps=st.floats(-200, 200))
def test_the_squared_error_asks_for_a_smaller_step_inside_and_a_larger_one_outside(bits, s, steps):
    explorer = put("qat", {"bits": bits, "s": s})
    explorer.set(x=min(max(steps * s, -3), 3))
    readout, x = explorer.readout, explorer.controls["x"].value
    slope = (readout["x_hat"] - x) * readout["gradient_by_s"]
    if readout["straight_through"]:
        assert slope == pytest.approx(s * (round(x / s) - x / s) ** 2, abs=1e-9)
    else:
        assert slope < 0


def test_the_true_derivative_does_not_exist_at_a_jump():
    explorer = put("qat", {"s": 0.5, "bits": 3})
    for x, at_a_jump in ((0.25, True), (0.26, False), (-1.75, True), (1.25, True), (1.75, False), (-2.25, False)):
        explorer.set(x=x)
        assert (explorer.readout["true_derivative"] != 0) == at_a_jump


def test_one_parameter_is_learned_at_a_time():
    explorer = put("qat", {})
    assert (explorer.controls["s"].disabled, explorer.controls["alpha"].disabled) == (False, True)
    explorer.controls["scheme"].value = PACT
    assert (explorer.controls["s"].disabled, explorer.controls["alpha"].disabled) == (True, False)


@pytest.mark.parametrize("bits", [1, 9, 4.5, "4", None])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
        qat(bits)


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


@pytest.mark.parametrize("ends, spelled", [
    ((0.0, 6.0), "0 … 6"), ((0, 2.345678), "0 … 2.35"), ((-0.0074, 2.5), "−0.01 … 2.5"), ((-0.001, 2.0), "0 … 2"),
    ((-153.26, 17.77), "−153 … 18"), ((0.00123456, 0.0456789), "0.0012 … 0.0457"), ((-3, -1), "−3 … −1"),
    ((0, 0), "0 … 0"),
])
def test_ranges_are_spelled_briefly(ends, spelled):
    assert training_run([{"step": 0, "ranges": {"a": ends}}]).readout["range a"] == spelled


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


def test_a_click_while_nothing_runs_stops_nothing():
    watched, seen = Watched(), []
    watched.button.click()
    watched.run.stop()
    watched.in_a_cell(seen.append)
    assert len(seen) == 12
    watched.button.click()
    watched.in_a_cell(seen.append)
    assert len(seen) == 12


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


def test_other_messages_are_handled_between_two_steps():
    watched, order = Watched(), []

    async def cell():
        async for step in watched.run:
            order.append(step.step)
            asyncio.get_running_loop().call_soon(order.append, f"message {step.step}")

    asyncio.run(cell())
    assert order[:4] == [1, "message 1", 2, "message 2"]


class FakeKernel:
    """What `watch` uses of ipykernel: a message from a widget is handled without a status while an async cell runs."""

    def __init__(self):
        self.parent, self.said = "cell", []

    def get_parent(self, channel):
        return self.parent

    async def dispatch_shell(self, message, *, concurrent=False):
        self.parent = message
        await asyncio.sleep(0)
        self.said.append(("handled", message))

    def _publish_status(self, status, channel, parent=None):
        self.said.append((status, parent or self.parent))


def test_a_message_from_a_widget_is_answered_while_a_cell_trains(monkeypatch):
    kernel = FakeKernel()
    monkeypatch.setattr(networks, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    watched = Watched()

    async def dispatch(message, concurrent):
        await kernel.dispatch_shell(message, concurrent=concurrent)

    async def cell():
        async for step in watched.run:
            if step.step in (2, 5):  # what arrives now is handled before the next step
                asyncio.get_running_loop().create_task(dispatch(f"message {step.step}", concurrent=step.step == 2))

    asyncio.run(cell())
    assert kernel.said == [("handled", "message 2"), ("idle", "message 2"), ("busy", "cell"), ("handled", "message 5")]
    assert "dispatch_shell" not in vars(kernel)


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(
    kernel=SimpleNamespace(dispatch_shell=lambda message: None))], ids=["none", "no kernel", "an older kernel"])
def test_other_shells_are_left_alone(monkeypatch, shell):
    monkeypatch.setattr(networks, "get_ipython", lambda: shell)
    watched = Watched()
    watched.in_a_cell()
    assert len(watched.run) == 0


def test_tqdm_awaits_the_steps():
    assert hasattr(Watched().run, "__anext__")  # where older releases of tqdm look
    assert tqdm(Watched().run, disable=True).iterable_awaitable


def test_axes_make_room_as_the_training_goes_on():
    losses, highs = [2.0, 3.0, 50.0, 0.001, 7.0, 1.0, 1.0, 1.0], iter([2.0, 3.0, 1.0, 31.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    steps = [Step(i, len(losses), loss) for i, loss in enumerate(losses, 1)]
    run = watch(steps, lambda: {"ranges": {"a": (-1.0, next(highs))}}, every=1)
    seen = []
    for _ in run:
        seen.append((*run.explorer.figure.axes[0].get_ylim(), run.explorer.figure.axes[2].get_xlim()[1] > 30))
    assert seen == [(1, 10, False), (1, 10, False), (1, 100, True)] + [(0.0001, 100, True)] * 5
    assert_as_replayed(run)


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


def test_a_diverged_training_says_so():
    watched = Watched()
    with pytest.raises(ValueError, match="loss must be at least 0 and finite, got nan at step 3"):
        for step in watched.run:
            if step.step == 2:
                watched.model[0].layer.weight.data.fill_(math.nan)
    assert watched.run.history[-1]["step"] == 2
    assert watched.button.disabled


def test_a_bad_measurement_ends_the_loop():
    accuracies = iter([50, 60, 170])
    run = watch([Step(i, 4, 1.0) for i in range(1, 5)], lambda: {"accuracy": next(accuracies)}, every=1)
    with pytest.raises(ValueError, match="accuracy must be from 0 to 100, got 170 at step 2"):
        list(run)
