"""Lesson 04: what fewer bits leave of a network."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from qlab import digits, ptq
from qlab.affine import zero_point_params
from qlab.explorers.colors import BLACK, BLUE, SKY, VERMILION
from qlab.live import Explorer, IntSlider, in_a_row, new_figure

_CALIBRATION_IMAGES = 256
_PIXELS = 0.0, 1.0  # the range of the first layer's inputs is known, and not left to a calibrator
_FLOAT_BYTES = 4
_ROWS, _COLUMNS, _CELL = 3, 4, 11  # of the pictures of broken digits; the side of a cell in their pixels
_DECIBELS = -10, 64
_APART = 0.2  # of a row, up and down, for a layer's two bars


@dataclass(frozen=True)
class DigitsPTQ:
    """What `digits_ptq` shows for one position of its controls."""

    accuracy: float  # percent
    broken: list  # test images that float reads right and the quantized network wrong: (index, label, reading)
    mended: int  # and the other way round
    most_confused: str  # "8 read as 1, 12 times"
    sqnr_db: dict  # of each layer's output, all layers quantized
    alone_db: dict  # of the logits, with this layer alone quantized
    alone_accuracy: dict  # percent, likewise
    size_kb: float

    @property
    def least_sqnr(self):
        return min(self.sqnr_db, key=self.sqnr_db.get)

    @property
    def worst_alone(self):
        return min(self.alone_db, key=lambda layer: (self.alone_accuracy[layer], self.alone_db[layer]))


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
    batches of 64 and judged on the 360 test images. Left, the share that is read right, ± one standard error,
    √(p (1 − p) / 360). Below it two signal-to-noise ratios against the float network's for each layer: that of its
    output, before its activation function, where the errors of all layers before it count too; and that of the logits
    when this layer alone is quantized, with the accuracy that is then left. Right, up to 12 of the digits that broke:
    float reads them right, the quantized network not.

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
        ``least_sqnr`` is the layer with the least ratio of its output, ``least_sqnr_db``; ``worst_alone`` the one that
        alone leaves the least accuracy, ``worst_alone_accuracy`` (of equal ones, the least ratio of the logits).
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
    exact = _outputs(model, images)
    entering = {name: torch.cat(batches) for name, batches in ptq.observe(model, images).items()}
    rest = {name: list(model.children())[list(dict(model.named_children())).index(name) + 1:] for name in layers}
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
        for name, layer in quantized_layers.items():  # of the cached model: quantizing its weights anew costs a step
            if mode == "dynamic":
                layer.input_params, layer.dynamic_bits = None, activation_bits
            else:
                ends = torch.tensor(ranges(calibrator, activation_bits)[name])
                layer.input_params, layer.dynamic_bits = zero_point_params(ends, activation_bits), None
        outputs = _outputs(quantized, images)
        alone = {name: _through([layer, *rest[name]], entering[name]) for name, layer in quantized_layers.items()}
        readings = outputs[last].argmax(1)
        right = readings == labels
        broken = (float_right & ~right).nonzero().flatten().tolist()
        noise = {name: (x - outputs[name]).square().sum() for name, x in exact.items()}
        scale_count = sum(layer.weight_params.scale.numel() for layer in quantized_layers.values())
        return DigitsPTQ(
            100 * right.double().mean().item(), [(i, int(labels[i]), int(readings[i])) for i in broken],
            int((right & ~float_right).sum()), _most_confused(labels, readings),
            {name: 10 * math.log10(signal[name] / noise[name]) for name in layers},
            {name: 10 * math.log10(signal[last] / (exact[last] - logits).square().sum())
             for name, logits in alone.items()},
            {name: 100 * (logits.argmax(1) == labels).double().mean().item() for name, logits in alone.items()},
            (weight_count * weight_bits / 8 + (scale_count + bias_count) * _FLOAT_BYTES) / 1000,
        )

    def read(result):
        return {
            "accuracy": result.accuracy,
            "standard_error": _standard_error(result.accuracy, len(labels)),
            "float_accuracy": float_accuracy,
            "broken": len(result.broken),
            "mended": result.mended,
            "most_confused": result.most_confused,
            "least_sqnr": result.least_sqnr,
            "least_sqnr_db": result.sqnr_db[result.least_sqnr],
            "worst_alone": result.worst_alone,
            "worst_alone_accuracy": result.alone_accuracy[result.worst_alone],
            "size_kb": result.size_kb,
        }

    def couple(name, state):
        return {"calibrator": {"disabled": state["mode"] == "dynamic"}} if name == "mode" else {}

    bits = {"min": 2, "max": 8, "style": {"description_width": "100px"}, "layout": {"width": "320px"}}
    toggle = {"style": {"button_width": "100px"}}
    controls = {
        "weight_bits": IntSlider(8, description="weight bits", **bits),
        "activation_bits": IntSlider(8, description="activation bits", **bits),
        "calibrator": widgets.Dropdown(options=list(ptq.CALIBRATORS), description="calibrator",
                                       style={"description_width": "70px"}, layout={"width": "190px"}),
        "weights": widgets.ToggleButtons(options=["per tensor", "per channel"], **toggle),
        "weight_range": widgets.ToggleButtons(options=["min-max", "MSE"], **toggle),
        "mode": widgets.ToggleButtons(options=["static", "dynamic"], **toggle),
    }
    figure, artists = _digits_figure(images, layers, float_accuracy, (weight_count + bias_count) * _FLOAT_BYTES / 1000)
    strip, bars, _ = figure.axes

    def hover(axes, x, y, result):
        if axes is strip:
            return f"{round(result.accuracy * len(labels) / 100)} of {len(labels)} test images are read right"
        if axes is bars:
            name = list(layers)[int(np.clip(round(y), 0, len(layers) - 1))]
            return (f"{name}, {layers[name].weight.numel()} weights\n"
                    f"SQNR of its output: {result.sqnr_db[name]:.1f} dB\n"
                    f"alone: logits {result.alone_db[name]:.1f} dB, {result.alone_accuracy[name]:.1f} % right"
                    ).replace("-", "−")
        row, column = int(y // _CELL), int(x // _CELL)
        i = row * _COLUMNS + column
        if not (0 <= row < _ROWS and 0 <= column < _COLUMNS and i < len(result.broken)):
            return ""
        return "test image {}\nlabel and float: {}, now read as {}".format(*result.broken[i])

    return Explorer(
        figure, controls, compute, partial(_draw_digits, artists), read, couple=couple, arrange=_in_two_rows,
        hover=hover, ghost=[artists.share, artists.ratios], main=("accuracy", "%"),
        parts={"outputs": [artists.ratios, *artists.decibels], "alone": [artists.alone, *artists.percents]},
        title="Fewer bits for a network that reads digits",
        description="Left: a bar for the share of test images read right, with marks for the float network and for "
        "guessing, and below it two bars for each layer: the signal-to-noise ratio of its output, and that of the "
        "logits with this layer alone quantized, with the share then read right. Right: pictures of digits that float "
        "reads right and the quantized network wrong, each with its label and what is read now.",
    )


def _most_confused(labels, readings):
    wrong = labels != readings
    counts = torch.bincount(10 * labels[wrong] + readings[wrong], minlength=100)
    (label, reading), times = divmod(int(counts.argmax()), 10), int(counts.max())
    return f"{label} read as {reading}, {times} time{'s' * (times > 1)}" if times else "none"


def _standard_error(accuracy, count):
    """Of an accuracy in percent, on so many images."""
    return math.sqrt(accuracy * (100 - accuracy) / count)


@torch.no_grad()
def _through(modules, x):
    for module in modules:
        x = module(x)
    return x


def _outputs(model, images):
    """What each layer puts out for the images."""
    return {name: output for name, (output,) in ptq.outputs(model, images).items()}


def _in_two_rows(controls, chips):
    label = {"layout": {"margin": "2px 4px 2px 20px"}}
    above = [controls[name] for name in ("weight_bits", "activation_bits", "calibrator")]
    below = [widgets.Label("weights", **label), controls["weights"], controls["weight_range"],
             widgets.Label("activations", **label), controls["mode"]]
    return widgets.VBox([in_a_row(above), in_a_row(below)])


def _digits_figure(images, layers, float_accuracy, float_kb):
    with new_figure(1000, 540) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 1.05], height_ratios=[0.3, 1])
        strip, bars, pictures = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
        strip.set(xlim=(0, 100), ylim=(0, 2), yticks=[])
        strip.set_xticks([0, 10, 50, float_accuracy], ["0", "10\nguessing", "50", f"{float_accuracy:.1f} %\nfloat"])
        strip.spines[["left", "bottom"]].set_visible(False)
        strip.tick_params(length=0)
        strip.axhspan(0.15, 0.85, color="#E4E4E4", lw=0)
        share = strip.barh(0.5, 0, height=0.7, color=BLUE, animated=True)[0]
        for mark in (10, float_accuracy):
            strip.plot([mark, mark], [0, 1], color=BLACK, lw=2, ls=":" if mark == 10 else "-", zorder=5, animated=True)
        accuracy = strip.text(0, 1.25, "", fontsize=17, fontweight="bold", animated=True)
        size = strip.text(102, 1.25, "", ha="right", animated=True)

        bars.set(xlim=_DECIBELS, ylim=(len(layers) - 0.4, -0.6), xlabel="SQNR (dB)")
        bars.set_xticks(range(-10, 51, 10))
        bars.set_yticks(range(len(layers)), list(layers))
        bars.tick_params(axis="y", length=0)
        bars.spines["left"].set_visible(False)
        bars.axvline(0, color=BLACK, lw=1)
        ratios, alone = (LineCollection([], linewidths=8, capstyle="butt", color=color, animated=True)
                         for color in (SKY, VERMILION))
        for collection in (ratios, alone):
            bars.add_collection(collection, autolim=False)
        decibels, percents = ([bars.text(0, row + shift, "", va="center_baseline", fontsize=11, animated=True)
                               for row in range(len(layers))] for shift in (-_APART, _APART))
        bars.legend([Line2D([], [], color=SKY, lw=8), Line2D([], [], color=VERMILION, lw=8)],
                    ["of its output, all layers quantized", "of the logits, this layer alone; and % right"],
                    loc="lower left", bbox_to_anchor=(-0.2, 0.97), frameon=False, fontsize=12, borderaxespad=0,
                    labelspacing=0.2)

        pictures.set_axis_off()
        broken = pictures.text(1, -3.0, "", fontsize=16, fontweight="bold", animated=True)
        pictures.text(1, -0.7, "label → what is read now")
        mosaic = pictures.imshow(np.zeros((1, 1, 4), np.uint8), interpolation="nearest", animated=True,
                                 extent=(0, _COLUMNS * _CELL, _ROWS * _CELL, 0))
        pictures.set(xlim=(0, _COLUMNS * _CELL), ylim=(_ROWS * _CELL, -4.5))  # room for two lines above
        names = [pictures.text(_CELL * (i % _COLUMNS) + 5, _CELL * (i // _COLUMNS) + 8.3, "", ha="center", va="top",
                               fontsize=15, animated=True) for i in range(_ROWS * _COLUMNS)]
    ink = (240 * (1 - images[:, 0])).round().to(torch.uint8).numpy()
    return figure, SimpleNamespace(
        share=share, accuracy=accuracy, size=size, float_kb=float_kb, ratios=ratios, alone=alone, decibels=decibels,
        percents=percents, images=len(images), broken=broken, mosaic=mosaic, names=names, ink=ink)


def _draw_digits(artists, result):
    artists.share.set_width(result.accuracy)
    artists.accuracy.set_text(f"{result.accuracy:.1f} ± {_standard_error(result.accuracy, artists.images):.1f} % right")
    artists.size.set_text(f"{result.size_kb:.1f} of {artists.float_kb:.1f} kB")
    for shift, bars, texts, ratios in ((-_APART, artists.ratios, artists.decibels, result.sqnr_db),
                                       (_APART, artists.alone, artists.percents, result.alone_db)):
        bars.set_segments([[(0, row + shift), (db, row + shift)] for row, db in enumerate(ratios.values())])
        for text, (name, db) in zip(texts, ratios.items(), strict=True):
            percent = f"   {result.alone_accuracy[name]:.1f} %" if bars is artists.alone else ""
            text.set(x=max(db, 0) + 0.8, text=f"{db:.1f}{percent}".replace("-", "−"))

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
