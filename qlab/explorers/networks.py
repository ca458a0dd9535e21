"""Lesson 04: what fewer bits leave of a network, how a gradient passes through rounding, and a training, live."""

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from IPython import get_ipython
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from qlab import digits, ptq
from qlab.affine import zero_point_params
from qlab.explorers.grids import _paths
from qlab.explorers.ranges import _bits_slider
from qlab.live import BLACK, BLUE, GREY, ORANGE, SKY, VERMILION, Explorer, new_figure

_CALIBRATION_IMAGES = 256
_PIXELS = 0.0, 1.0  # the range of the first layer's inputs is known, and not left to a calibrator
_FLOAT_BYTES = 4
_ROWS, _COLUMNS, _CELL = 3, 4, 11  # of the pictures of broken digits; the side of a cell in their pixels
_DECIBELS = -10, 54

_REACH = 3.0  # of the staircase's x axis
LSQ, PACT = "LSQ: learn s", "PACT: learn α"
_BELOW = {  # label, limits and ticks of the gradient by the learned parameter
    LSQ: ("∂x̂/∂s", (-250, 250), {-128: "−128", -8: "−8", -0.5: "−½", 0: "0", 0.5: "½", 8: "8", 128: "128"}),
    PACT: ("∂x̂/∂α", (-0.25, 1.3), {0: "0", 1: "1"}),
}

_PLAY_FRAMES, _PLAY_MILLISECONDS = 80, 100
_LEAST = 1e-6  # what a logarithm can be taken of


@dataclass(frozen=True)
class DigitsPTQ:
    """What `digits_ptq` shows for one position of its controls."""

    accuracy: float  # percent
    broken: list  # test images that float reads right and the quantized network wrong: (index, label, reading)
    mended: int  # and the other way round
    most_confused: str  # "8 read as 1, 12 times"
    sqnr_db: dict  # of each layer's output
    size_kb: float

    @property
    def worst_layer(self):
        return min(self.sqnr_db, key=self.sqnr_db.get)


@contextmanager
def _one_thread():
    """Inside, torch computes on one thread: on layers this small, threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def digits_ptq():
    """Explore what post-training quantization leaves of a network that reads handwritten digits.

    The trained network of `qlab.digits`, its batch norm folded, is calibrated on the first 256 training images in
    batches of 64 and judged on the 360 test images. Left, the share that is read right, and the signal-to-noise ratio
    of each layer's output, before its activation function, against the float network's: the errors of all layers
    before it count too. Right, up to 12 of the digits that broke: float reads them right, the quantized network not.

    A step computes on one thread, and restores torch's setting: two threads that wait for each other can take ten times
    as long. The first step with "MSE" or "KL" and a number of bits searches for the ranges, which takes longer.

    Returns
    -------
    Explorer
        Controls ``weight_bits`` and ``activation_bits`` (2 to 8), ``calibrator`` (a key of `qlab.ptq.CALIBRATORS`;
        of no use with dynamic quantization), ``weights`` ("per tensor" or "per channel": what shares a scale),
        ``weight_range`` ("min-max" or "MSE") and ``mode`` ("static", or "dynamic": each layer takes the range of the
        360 images at hand). With static ranges, the first layer's input has that of the pixels, 0 to 1, whatever the
        calibrator. ``accuracy`` is ``float_accuracy`` less the ``broken`` images plus the ``mended`` ones.
        ``most_confused`` is the quantized network's most frequent wrong reading; of equally frequent ones, that of the
        smallest digit, then the smallest reading.
        ``size_kb`` counts ``weight_bits`` for each weight, and 4 bytes for each scale of the weights and each bias,
        in units of 1000 bytes.

    References
    ----------
    Nagel et al. 2021, "A white paper on neural network quantization", section 3; Krishnamoorthi 2018, "Quantizing
    deep convolutional networks for efficient inference", section 3.

    Examples
    --------
    >>> explorer = digits_ptq()
    >>> explorer.set(weight_bits=3, activation_bits=3)
    >>> explorer.readout["accuracy"] < 65
    True
    >>> explorer.set(weights="per channel", weight_range="MSE", calibrator="MSE")
    >>> explorer.readout["accuracy"] > 80
    True
    """
    data = digits.data()
    images, labels = data.test_images, data.test_labels
    model = ptq.fold_batch_norm(digits.load())
    layers = ptq.layers(model)
    (first, *_), (*_, last) = layers, layers
    observed = ptq.observe(model, data.train_images[:_CALIBRATION_IMAGES])
    exact = _outputs(model, layers, images)
    float_right = exact[last].argmax(1) == labels
    float_accuracy = 100 * float_right.double().mean().item()
    signal = {name: x.square().sum() for name, x in exact.items()}
    weight_count, bias_count = (sum(getattr(layer, kind).numel() for layer in layers.values())
                                for kind in ("weight", "bias"))

    @lru_cache
    def ranges(calibrator, bits):
        return ptq.calibrate(observed, bits, calibrator) | {first: _PIXELS}

    @lru_cache
    def with_quantized_weights(bits, weights, weight_range):
        return ptq.quantize_static(model, {}, weight_bits=bits, activation_bits=None,
                                   per_channel=weights == "per channel", weight_range=weight_range)

    @lru_cache(maxsize=1024)
    @_one_thread()
    def compute(*, weight_bits, activation_bits, calibrator, weights, weight_range, mode):
        quantized = with_quantized_weights(weight_bits, weights, weight_range)
        quantized_layers = {name: quantized.get_submodule(name) for name in layers}
        for name, layer in quantized_layers.items():
            if mode == "dynamic":
                layer.input_params, layer.dynamic_bits = None, activation_bits
            else:
                ends = torch.tensor(ranges(calibrator, activation_bits)[name])
                layer.input_params, layer.dynamic_bits = zero_point_params(ends, activation_bits), None
        outputs = _outputs(quantized, quantized_layers, images)
        readings = outputs[last].argmax(1)
        right = readings == labels
        broken = (float_right & ~right).nonzero().flatten().tolist()
        noise = {name: (x - outputs[name]).square().sum() for name, x in exact.items()}
        scale_count = sum(layer.weight_params.scale.numel() for layer in quantized_layers.values())
        return DigitsPTQ(
            100 * right.double().mean().item(), [(i, int(labels[i]), int(readings[i])) for i in broken],
            int((right & ~float_right).sum()), _most_confused(labels, readings),
            {name: 10 * math.log10(signal[name] / noise[name]) for name in layers},
            (weight_count * weight_bits / 8 + (scale_count + bias_count) * _FLOAT_BYTES) / 1000,
        )

    def read(result):
        return {
            "accuracy": result.accuracy,
            "float_accuracy": float_accuracy,
            "broken": len(result.broken),
            "mended": result.mended,
            "most_confused": result.most_confused,
            "worst_layer": result.worst_layer,
            "worst_sqnr_db": result.sqnr_db[result.worst_layer],
            "size_kb": result.size_kb,
        }

    def couple(name, state):
        return {"calibrator": {"disabled": state["mode"] == "dynamic"}} if name == "mode" else {}

    bits = {"min": 2, "max": 8, "style": {"description_width": "100px"}, "layout": {"width": "320px"}}
    toggle = {"style": {"button_width": "100px"}}
    controls = {
        "weight_bits": widgets.IntSlider(8, description="weight bits", **bits),
        "activation_bits": widgets.IntSlider(8, description="activation bits", **bits),
        "calibrator": widgets.Dropdown(options=list(ptq.CALIBRATORS), description="calibrator",
                                       style={"description_width": "70px"}, layout={"width": "190px"}),
        "weights": widgets.ToggleButtons(options=["per tensor", "per channel"], **toggle),
        "weight_range": widgets.ToggleButtons(options=["min-max", "MSE"], **toggle),
        "mode": widgets.ToggleButtons(options=["static", "dynamic"], **toggle),
    }
    figure, artists = _digits_figure(images, layers, float_accuracy, (weight_count + bias_count) * _FLOAT_BYTES / 1000)
    return Explorer(
        figure, controls, compute, partial(_draw_digits, artists), read, couple=couple, arrange=_in_two_rows,
        title="Fewer bits for a network that reads digits",
        description="Left: a bar for the share of test images read right, with marks for the float network and for "
        "guessing, and below it a bar for the signal-to-noise ratio of each layer's output. Right: pictures of "
        "digits that float reads right and the quantized network wrong, each with its label and what is read now.",
    )


def _most_confused(labels, readings):
    wrong = labels != readings
    counts = torch.bincount(10 * labels[wrong] + readings[wrong], minlength=100)
    (label, reading), times = divmod(int(counts.argmax()), 10), int(counts.max())
    return f"{label} read as {reading}, {times} time{'s' * (times > 1)}" if times else "none"


def _outputs(model, named_layers, images):
    """What each layer puts out for the images."""
    records = ptq._record(model, named_layers, images, None, lambda inputs, output: output)
    return {name: output for name, (output,) in records.items()}


def _in_two_rows(controls, chips):
    row = {"flex_flow": "row wrap", "align_items": "center"}
    label = {"layout": {"margin": "2px 4px 2px 20px"}}
    above = [controls[name] for name in ("weight_bits", "activation_bits", "calibrator")]
    below = [widgets.Label("weights", **label), controls["weights"], controls["weight_range"],
             widgets.Label("activations", **label), controls["mode"]]
    return widgets.VBox([widgets.HBox(some, layout=row) for some in (above, below)])


def _digits_figure(images, layers, float_accuracy, float_kb):
    with new_figure() as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 1.05], height_ratios=[0.42, 1])
        strip, bars, pictures = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
        strip.set(xlim=(0, 100), ylim=(0, 2), yticks=[])
        strip.set_xticks([0, 10, 50, float_accuracy], ["0", "10\nguessing", "50", f"{float_accuracy:.1f} %\nfloat"])
        strip.spines[["left", "bottom"]].set_visible(False)
        strip.tick_params(length=0)
        strip.axhspan(0.15, 0.85, color="#E4E4E4", lw=0)
        share = strip.barh(0.5, 0, height=0.7, color=BLUE, animated=True)[0]
        for mark in (10, float_accuracy):
            strip.plot([mark, mark], [0, 1], color=BLACK, lw=2, ls=":" if mark == 10 else "-", zorder=5, animated=True)
        accuracy = strip.text(0, 1.25, "", fontsize=20, fontweight="bold", animated=True)
        size = strip.text(102, 1.25, "", ha="right", animated=True)

        bars.set(xlim=_DECIBELS, ylim=(len(layers) - 0.4, -0.6), xlabel="SQNR of the layer's output (dB)")
        bars.set_yticks(range(len(layers)), list(layers))
        bars.tick_params(axis="y", length=0)
        bars.spines["left"].set_visible(False)
        bars.axvline(0, color=BLACK, lw=1)
        ratios = LineCollection([], linewidths=14, capstyle="butt", animated=True)
        bars.add_collection(ratios, autolim=False)
        decibels = [bars.text(0, row, "", va="center_baseline", fontsize=13, animated=True)
                    for row in range(len(layers))]

        pictures.set_axis_off()
        broken = pictures.text(1, -3.0, "", fontsize=16, fontweight="bold", animated=True)
        pictures.text(1, -0.7, "label → what is read now")
        mosaic = pictures.imshow(np.zeros((1, 1, 4), np.uint8), interpolation="nearest", animated=True,
                                 extent=(0, _COLUMNS * _CELL, _ROWS * _CELL, 0))
        pictures.set(xlim=(0, _COLUMNS * _CELL), ylim=(_ROWS * _CELL, -4.5))  # room for two lines above
        names = [pictures.text(_CELL * (i % _COLUMNS) + 5, _CELL * (i // _COLUMNS) + 8.3, "", ha="center", va="top",
                               fontsize=15, animated=True) for i in range(_ROWS * _COLUMNS)]
    ink = (240 * (1 - images[:, 0])).round().to(torch.uint8).numpy()
    return figure, SimpleNamespace(share=share, accuracy=accuracy, size=size, float_kb=float_kb, ratios=ratios,
                                   decibels=decibels, broken=broken, mosaic=mosaic, names=names, ink=ink)


def _draw_digits(artists, result):
    artists.share.set_width(result.accuracy)
    artists.accuracy.set_text(f"{result.accuracy:.1f} % right")
    artists.size.set_text(f"{result.size_kb:.1f} of {artists.float_kb:.1f} kB")
    artists.ratios.set_segments([[(0, row), (db, row)] for row, db in enumerate(result.sqnr_db.values())])
    artists.ratios.set_color([VERMILION if name == result.worst_layer else SKY for name in result.sqnr_db])
    for text, (name, db) in zip(artists.decibels, result.sqnr_db.items(), strict=True):
        text.set(x=max(db, 0) + 0.8, text=f"{db:.1f}{'  worst' if name == result.worst_layer else ''}"
                 .replace("-", "−"))

    shown = result.broken[: len(artists.names)]
    mosaic = np.zeros((_ROWS * _CELL, _COLUMNS * _CELL, 4), np.uint8)
    for place, (image, _, _) in enumerate(shown):
        row, column = _CELL * (place // _COLUMNS), _CELL * (place % _COLUMNS) + 1
        mosaic[row:row + 8, column:column + 8] = 255
        mosaic[row:row + 8, column:column + 8, :3] = artists.ink[image, :, :, None]
    artists.mosaic.set_data(mosaic)
    for i, text in enumerate(artists.names):
        text.set_visible(i < len(shown))
        if i < len(shown):
            text.set_text("{1} → {2}".format(*shown[i]))
    some = f", {len(shown)} of them:" if len(result.broken) > len(shown) else ""
    artists.broken.set_text(f"Broken digits: {len(result.broken)}{some}")


@dataclass(frozen=True)
class Rounding:
    """What `qat` shows for one position of its controls."""

    scheme: str
    s: float
    qmin: int
    qmax: int
    x: float
    code: int
    x_hat: float
    jump: bool  # x lies where x̂ jumps
    inside: bool  # of the range, where the straight-through estimator passes the gradient
    by_parameter: float  # the gradient of x̂ by s or α

    @property
    def ends(self):
        return self.qmin * self.s, self.qmax * self.s


def qat(bits=3):
    """Explore how a gradient passes through rounding, and what a learned range feels.

    Above, x̂ against x, with zero-point 0. In the middle, its true derivative, which is 0 wherever there is one, and
    the one that quantization-aware training puts in its place, the straight-through estimator: 1 inside the range and
    0 outside. Below, the gradient by which the range is learned.

    LSQ, s is learned: x̂ = s · round(clip(x / s, −Q_N, Q_P)) with Q_P = 2^(b−1) − 1 and Q_N = 2^(b−1), or 127 for
    8 bits. With u = x / s, ∂x̂/∂s = round(u) − u inside the range, −Q_N below and Q_P above it. (`qlab.qat.LSQ`
    trains with a share of it, 1 / √(n · Q_P) for n values that share s.)

    PACT, α is learned: x̂ = s · round(clip(x, 0, α) / s) with s = α / (2^b − 1). ∂x̂/∂α = 1 where x ≥ α, 0 elsewhere.

    Parameters
    ----------
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``scheme`` (``LSQ`` or ``PACT`` of this module), ``bits``, ``s`` (1/64 to 1) or ``alpha`` (0.25 to 3)
        in units of x, and ``x`` (−3 to 3), the place of the marker.

    Raises
    ------
    ValueError
        If ``bits`` is not from 2 to 8.

    References
    ----------
    Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons for conditional computation";
    Esser et al. 2020, "Learned step size quantization", equations 3 and 5; Choi et al. 2018, "PACT: parameterized
    clipping activation for quantized neural networks", equations 1 to 3.

    Examples
    --------
    >>> explorer = qat(bits=3)
    >>> explorer.set(s=0.5, x=0.6)
    >>> explorer.readout["x_hat"], explorer.readout["straight_through"], round(explorer.readout["gradient_by_s"], 3)
    (0.5, 1, -0.2)
    >>> explorer.set(x=2.2)
    >>> explorer.readout["x_hat"], explorer.readout["straight_through"], explorer.readout["gradient_by_s"]
    (1.5, 0, 3.0)
    """
    slider = {"style": {"description_width": "20px"}, "layout": {"width": "220px"}}
    controls = {
        "scheme": widgets.ToggleButtons(options=[LSQ, PACT], style={"button_width": "112px"}),
        "bits": _bits_slider(bits),
        "s": widgets.FloatLogSlider(0.5, base=2, min=-6, max=0, step=0.05, description="s", readout_format=".3f",
                                    **slider),
        "alpha": widgets.FloatSlider(2.0, min=0.25, max=_REACH, step=0.01, description="α", disabled=True, **slider),
        "x": widgets.FloatSlider(0.65, min=-_REACH, max=_REACH, step=0.01, description="x", **slider),
    }
    controls["bits"].style.description_width, controls["bits"].layout.width = "30px", "180px"

    def compute(*, scheme, bits, s, alpha, x):
        lsq = scheme == LSQ
        qmin, qmax = (-min(2 ** (bits - 1), 127), 2 ** (bits - 1) - 1) if lsq else (0, 2**bits - 1)
        s = s if lsq else alpha / qmax
        u = x / s
        inside = qmin <= u <= qmax if lsq else 0 <= x < alpha
        code = round(min(max(u, qmin), qmax))
        by_s = code - u if inside else code
        by_alpha = int(x >= alpha)
        jump = inside and u - math.floor(u) == 0.5
        return Rounding(scheme, s, qmin, qmax, x, code, s * code, jump, inside, float(by_s if lsq else by_alpha))

    def read(result):
        alpha, beta = result.ends
        return {
            "range": f"{alpha:.4g} … {beta:.4g}".replace("-", "−"),
            "code": result.code,
            "x_hat": result.x_hat,
            "true_derivative": "none, a jump" if result.jump else 0,
            "straight_through": int(result.inside),
            "gradient_by_s" if result.scheme == LSQ else "gradient_by_alpha": result.by_parameter,
        }

    def couple(name, state):
        lsq = state["scheme"] == LSQ
        return {"s": {"disabled": not lsq}, "alpha": {"disabled": lsq}} if name == "scheme" else {}

    figure, artists = _rounding_figure()
    return Explorer(
        figure, controls, compute, partial(_draw_rounding, artists), read, couple=couple,
        title="A gradient through rounding",
        description="Above: the quantized value against the value, a staircase with flat ends. In the middle: its "
        "derivative, 0 between the jumps, and the straight-through estimator, 1 inside the range. Below: the "
        "gradient of the learned scale or range. A dashed line marks x in all three.",
    )


def _rounding_figure():
    with new_figure(1000, 510) as figure:
        above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[1.8, 0.6, 1.3])
        moving = {"animated": True, "scalex": False, "scaley": False}
        ends = [axes.axvspan(0, 0, color=GREY, alpha=0.22, lw=0, animated=True)
                for axes in (above, middle, below) for _ in range(2)]
        above.set(xlim=(-_REACH, _REACH), ylim=(-_REACH, _REACH), ylabel="x̂")
        above.plot([-_REACH, _REACH], [-_REACH, _REACH], color=BLACK, lw=1, ls=":")
        stairs = above.plot([], [], color=BLUE, **moving)[0]
        middle.set(ylim=(-0.25, 1.3), yticks=[0, 1], ylabel="∂x̂/∂x")
        jumps = middle.plot([], [], color=GREY, lw=1, **moving)[0]
        true = middle.plot([], [], color=BLACK, **moving)[0]
        estimate = middle.plot([], [], color=VERMILION, ls=(0, (4, 1.5)), **moving)[0]
        below.set_yscale("symlog", linthresh=1, linscale=2.2)
        below.set(xlabel="x (shaded: outside the range)")
        below.axhline(0, color=BLACK, lw=0.8)
        by_parameter = below.plot([], [], color=ORANGE, **moving)[0]
        here = [axes.axvline(0, color=BLACK, lw=1.4, ls="--", animated=True) for axes in (above, middle, below)]
        look = {"ls": "", "marker": "o", "ms": 10, "zorder": 5, "clip_on": False}
        dots = [axes.plot([], [], color=color, **look, **moving)[0]
                for axes, color in ((above, BLUE), (middle, VERMILION), (below, ORANGE))]
        above.legend([stairs, Line2D([], [], color=BLACK, lw=1, ls=":")], ["quantized", "x itself"], loc="upper left")
        middle.legend([true, estimate], ["true: 0, and none at a jump (grey)", "straight-through"], ncols=2,
                      loc="lower left", bbox_to_anchor=(0, 0.97), frameon=False, borderaxespad=0)
        for axes in (above, middle):
            axes.get_legend().set_animated(False)
    return figure, SimpleNamespace(ends=ends, stairs=stairs, jumps=jumps, true=true, estimate=estimate, below=below,
                                   by_parameter=by_parameter, here=here, dots=dots, scheme=None)


def _draw_rounding(artists, result):
    if result.scheme != artists.scheme:  # a new background
        artists.scheme = result.scheme
        label, limits, ticks = _BELOW[result.scheme]
        artists.below.set(ylabel=label, ylim=limits)
        artists.below.set_yticks(list(ticks), list(ticks.values()))
    alpha, beta = result.ends
    codes = np.arange(result.qmin, result.qmax + 1)
    jumps = (codes[1:] - 0.5) * result.s
    starts, stops = np.append(-_REACH, jumps), np.append(jumps, _REACH)
    artists.stairs.set_data(np.stack([starts, stops], 1).ravel(), np.repeat(codes * result.s, 2))
    artists.true.set_data(*_paths([starts, stops], [0, 0]))
    artists.jumps.set_data(*_paths([jumps, jumps], [-0.25, 1.3]))
    artists.estimate.set_data([-_REACH, alpha, alpha, beta, beta, _REACH], [0, 0, 1, 1, 0, 0])
    if result.scheme == LSQ:
        starts, stops = np.append(alpha, jumps), np.append(jumps, beta)
        inside = _paths([starts, stops], [codes - starts / result.s, codes - stops / result.s])
        tails = _paths([[-_REACH, beta], [alpha, _REACH]], [[result.qmin, result.qmax]] * 2)
        artists.by_parameter.set_data(*np.concatenate([tails, inside], axis=1))
    else:
        artists.by_parameter.set_data([-_REACH, beta, beta, _REACH], [0, 0, 1, 1])
    for i, span in enumerate(artists.ends):
        left, right = ((-_REACH, alpha), (beta, _REACH))[i % 2]
        span.set_bounds(left, 0, max(right - left, 0), 1)
    heights = result.x_hat, float(result.inside), result.by_parameter
    for line, dot, height in zip(artists.here, artists.dots, heights, strict=True):
        line.set_xdata([result.x, result.x])
        dot.set_data([result.x], [height])


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


def training_run(history):
    """Replay a training: drag its step, or press play.

    Left, the loss of each mini-batch and the accuracy, with a marker at the present step. Right, the range of each
    layer at that step, over the one that it began with.

    Parameters
    ----------
    history : list of dicts, in the order of their steps
        Each has "step" (int) and what was recorded at that step: "loss" (nats, ≥ 0), "accuracy" (percent), "ranges"
        (dict of layer to (alpha, beta), always of the same layers). What `watch` records, or a loop of your own.

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
    history = list(history)
    for i, record in enumerate(history):
        _check_record(record, history[:i])
    curves = _curves(history)
    first, last = history[0]["step"], history[-1]["step"]
    slider = widgets.IntSlider(last, min=first, max=last, description="step", style={"description_width": "36px"},
                               layout={"width": "600px"})
    play = widgets.Play(value=last, min=first, max=last, step=max(1, (last - first) // _PLAY_FRAMES),
                        interval=_PLAY_MILLISECONDS)
    widgets.jslink((play, "value"), (slider, "value"))
    figure, artists = _run_figure(list(curves.first_ranges), first, last)
    return Explorer(
        figure, {"step": slider}, lambda step: Run(curves, _latest(history, step)), partial(_draw_run, artists),
        _read_run, arrange=lambda controls, chips: widgets.HBox([play, slider]), **_RUN_WORDS,
    )


class watch(Iterator, AsyncIterator):
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

    def __init__(self, steps, measure, every=10):
        if not hasattr(steps, "__len__"):
            raise ValueError(f"steps must have a length, as those of qlab.training.train, got {type(steps).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self.history = []
        self._steps, self._measure, self._every, self._total = iter(steps), measure, every, len(steps)
        self._record({"step": 0, **measure()})
        self._stopping = False
        self._button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self._button.on_click(lambda _: self.stop())
        progress = widgets.IntProgress(0, min=0, max=self._total, description="step",
                                       style={"description_width": "36px"}, layout={"width": "600px"})
        self.explorer = self._new_explorer(
            {"step": progress}, arrange=lambda controls, chips: widgets.HBox([self._button, progress]))

    def _new_explorer(self, controls, arrange):
        figure, artists = _run_figure(list(self.history[0].get("ranges", {})), 0, self._total)
        return Explorer(figure, controls, lambda step: Run(_curves(self.history), _latest(self.history, step)),
                        partial(_draw_run, artists), _read_run, arrange=arrange, **_RUN_WORDS)

    def _of_step(self, step):
        """What is recorded of a step."""
        return {"step": step.step, "loss": step.loss}

    def stop(self):
        """End the loop after the present step."""
        self._stopping = not self._button.disabled  # a click while nothing runs must not stop the next loop

    def __len__(self):
        return self._total - self.history[-1]["step"]

    def __next__(self):
        self._button.disabled, ended = False, True
        try:
            step = None if self._stopping else next(self._steps, None)
            if step:
                self._record(self._of_step(step))
                if step.step % self._every == 0:
                    self._show()
                ended = False
        except KeyboardInterrupt:  # the kernel's
            pass
        finally:
            if ended:
                self._button.disabled, self._stopping = True, False
        if ended:
            self._show()
            raise StopIteration
        return step

    async def __anext__(self):
        try:
            with _answered_widgets():
                await asyncio.sleep(0)  # here the kernel handles messages from the browser
        except asyncio.CancelledError:  # the kernel's interrupt
            self.stop()
        for step in self:
            return step
        raise StopAsyncIteration

    def _repr_mimebundle_(self, include=None, exclude=None):
        return self.explorer._repr_mimebundle_(include, exclude)

    def _record(self, record):
        _check_record(record, self.history)
        self.history.append(record)

    def _show(self):
        """Measure at the present step, and draw."""
        present = {**self.history[-1], **self._measure()}
        _check_record(present, self.history[:-1])
        self.history[-1] = present
        self.explorer.set(step=present["step"])


@contextmanager
def _answered_widgets():
    """Inside, the browser is told of each message from a widget that it has been handled.

    ipykernel 7.4 handles these messages while an async cell runs, but leaves out the status that says so, and a slider
    whose message stays without it never sends another.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    dispatch = getattr(kernel, "dispatch_shell", None)
    if dispatch is None or "concurrent" not in inspect.signature(dispatch).parameters:
        yield
        return
    cell = kernel.get_parent("shell")

    async def dispatch_and_answer(*given, concurrent=False, **named):
        await dispatch(*given, concurrent=concurrent, **named)
        if concurrent:
            kernel._publish_status("idle", "shell")  # of the message
            kernel._publish_status("busy", "shell", parent=cell)

    kernel.dispatch_shell = dispatch_and_answer
    try:
        yield
    finally:
        del kernel.dispatch_shell


def _check_record(record, before):
    """A ValueError unless a record can follow those before it."""
    step = record.get("step") if isinstance(record, dict) else None
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"history must hold dicts with an integer 'step', got {record!r}")
    if before and step <= before[-1]["step"]:
        raise ValueError(f"history must have steps that increase, got {step} after {before[-1]['step']}")
    for name, most in (("loss", math.inf), ("accuracy", 100)):
        if name in record and not (_is_finite(record[name]) and 0 <= record[name] <= most):
            limits = "at least 0 and finite" if most == math.inf else f"from 0 to {most}"
            raise ValueError(f"{name} must be {limits}, got {record[name]!r} at step {step}")
    if "ranges" not in record:
        return
    for layer, ends in record["ranges"].items():
        if len(ends) != 2 or not all(map(_is_finite, ends)) or ends[0] > ends[1]:
            raise ValueError(f"ranges must be finite, alpha at most beta, got {ends!r} for {layer!r} at step {step}")
    layers = list(record["ranges"])
    known = next((list(earlier["ranges"]) for earlier in before if "ranges" in earlier), layers)
    if layers != known:
        raise ValueError(f"ranges must be of the same layers throughout, got {layers} at step {step} after {known}")


def _is_finite(value):
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _curves(history):
    losses, accuracies = (np.array([(r["step"], r[name]) for r in history if name in r], float).reshape(-1, 2).T
                          for name in ("loss", "accuracy"))
    ranges = [record["ranges"] for record in history if "ranges" in record]
    ends = [end for layers in ranges for pair in layers.values() for end in pair]
    low, high = min(ends, default=0), max(ends, default=0)
    seen = np.clip(losses[1], _LEAST, None) if losses.size else np.ones(1)
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
    decimals = 2 - math.floor(math.log10(max(-alpha, beta, _LEAST)))
    return " … ".join(f"{round(end, decimals) + 0.0:.6g}" for end in (alpha, beta)).replace("-", "−")


_RUN_WORDS = {
    "title": "A training",
    "description": "Left: the loss and the accuracy against the step, with a dashed line at the present one. Right: a "
    "bar for the present range of each layer's input, over a pale, wider bar for the range that it began with.",
}


def _run_figure(layers, first, last):
    with new_figure() as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 0.95] if layers else [1, 0.01])
        above, below, right = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
        moving = {"animated": True, "scalex": False, "scaley": False}
        above.set(yscale="log", ylabel="loss (nats)")
        below.set(ylim=(0, 102), ylabel="accuracy (%)", xlabel="step")
        for axes in (above, below):
            axes.set_xlim(first, max(last, first + 1))
        above.tick_params(axis="x", labelbottom=False)
        losses = above.plot([], [], color=BLUE, lw=1.2, **moving)[0]
        accuracies = below.plot([], [], "o-", color=ORANGE, ms=4, clip_on=False, **moving)[0]
        here = [axes.axvline(first, color=BLACK, lw=1.6, ls="--", animated=True) for axes in (above, below)]
        dots = [axes.plot([], [], "o", color=color, ms=10, clip_on=False, zorder=5, **moving)[0]
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
    artists.losses.set_data(*np.maximum(curves.losses, [[-np.inf], [_LEAST]]))
    artists.accuracies.set_data(*curves.accuracies)
    for line, dot, name in zip(artists.here, artists.dots, ("loss", "accuracy"), strict=True):
        line.set_xdata([now["step"]] * 2)
        dot.set_data([now["step"]], [max(now[name], _LEAST) if name in now else np.nan])
    ranges = now.get("ranges", {})
    for bar, pairs in zip(artists.bars, (curves.first_ranges if ranges else {}, ranges), strict=True):
        bar.set_segments([[(alpha, row), (beta, row)] for row, (alpha, beta) in enumerate(pairs.values())])
    gap = 0.01 * np.ptp(artists.right.get_xlim())
    for row, text in enumerate(artists.names):
        text.set_visible(bool(ranges))
        if ranges:
            layer, ends = list(ranges.items())[row]
            text.set(x=max(ends[1], curves.first_ranges[layer][1]) + gap, text=_spell_range(*ends))
