"""Lesson 06: difficulty on its way from the activations to the weights."""

from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import torch

from qlab.affine import absmax_params, fake_quantize
from qlab.explorers.parts import bits_slider
from qlab.explorers.places import channel_at, checked_places, place_control
from qlab.live import BLACK, GREY, ORANGE, VERMILION, Explorer, FloatSlider, Handle, new_figure
from qlab.smoothquant import smoothing_scales

OFF, RIGHT, PRINTED = "off", "X / s, W · s", "X · s, W / s (slides)"
TENSOR, VECTOR = "tensor", "token, output"
ALPHAS = np.linspace(0, 1, 21)
_LEAST, _MOST = 0.1, 200.0  # percent: ends of the axis of the error


@dataclass(frozen=True)
class Smoothing:
    """What `smoothing` shows for one position of its controls."""

    place: tuple
    alpha: float
    direction: str
    x_absmax: np.ndarray  # of each channel, as the quantizer sees it
    w_absmax: np.ndarray
    curve: np.ndarray  # error of the output in percent, for each of ALPHAS; empty without a direction
    off: float  # the same without smoothing
    now: float


def smoothing(places=None, bits=8):
    """Explore how α divides the difficulty between activations and weights, and what it does to their product.

    Left, the largest |X| and the largest |W| of each channel, before (grey) and after. Right, the error of the output
    Y = X Wᵀ against α, once a direction is chosen; activations and weights are both quantized (absmax). Without
    quantization Y is the same for every α. The dot on the curve can be dragged.

    Parameters
    ----------
    places : dict of (layer, site) to pair (x, w), optional
        As `qlab.explorers.outliers`.
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``place``, ``alpha``, ``direction`` ("off", as in the paper, or as printed on the slides), ``per``
        (one scale for each matrix, or one for each token of X and each output of W) and ``bits``.

    Raises
    ------
    ValueError
        As `qlab.explorers.outliers`.

    References
    ----------
    Xiao et al. 2023, "SmoothQuant", equations 3 and 4, figure 5.

    Examples
    --------
    >>> explorer = smoothing()
    >>> before = explorer.readout["output_error_percent"]
    >>> explorer.set(direction="X / s, W · s", alpha=0.45)
    >>> explorer.readout["output_error_percent"] < before / 3
    True
    """
    places = checked_places(places)
    peaks = {place: (x.abs().amax(0), w.abs().amax(0)) for place, (x, w) in places.items()}
    outputs = {place: x @ w.T for place, (x, w) in places.items()}

    def scales(place, alpha, direction):
        if direction == OFF:
            return torch.ones_like(peaks[place][0])
        s = smoothing_scales(*peaks[place], alpha)
        return 1 / s if direction == PRINTED else s

    @lru_cache(maxsize=4096)
    def error(place, alpha, direction, per, bits):
        x, w = places[place]
        s = scales(place, alpha, direction)
        x_hat, w_hat = (fake_quantize(m, absmax_params(m, bits, axis=None if per == TENSOR else 0))
                        for m in (x / s, w * s))
        return 100 * float((x_hat @ w_hat.T - outputs[place]).norm() / outputs[place].norm())

    def compute(*, place, alpha, direction, per, bits):
        s = scales(place, alpha, direction)
        alphas = ALPHAS if direction != OFF else []  # it would answer the question that it is to raise
        return Smoothing(
            place, alpha, direction, (peaks[place][0] / s).numpy(), (peaks[place][1] * s).numpy(),
            curve=np.array([error(place, float(a), direction, per, bits) for a in alphas]),
            off=error(place, 0.0, OFF, per, bits), now=error(place, alpha, direction, per, bits),
        )

    def read(result):
        return {
            "output_error_percent": result.now,
            "off_percent": result.off,
            "best_alpha": round(float(ALPHAS[result.curve.argmin()]), 2) if result.curve.size else "—",
            "largest_x": float(result.x_absmax.max()),
            "largest_w": float(result.w_absmax.max()),
        }

    controls = {
        "place": place_control(places),
        "direction": widgets.ToggleButtons(options=[OFF, RIGHT, PRINTED], style={"button_width": "160px"}),
        "alpha": FloatSlider(0.5, min=0, max=1, step=0.05, description="α", disabled=True, layout={"width": "330px"},
                             style={"description_width": "20px"}),
        "per": widgets.ToggleButtons(options=[TENSOR, VECTOR], style={"button_width": "110px"}),
        "bits": bits_slider(bits),
    }

    def couple(name, state):
        return {"alpha": {"disabled": state["direction"] == OFF}} if name == "direction" else {}

    def dot(result):
        return [(result.alpha, np.clip(result.now, _LEAST, _MOST))] if result.direction != OFF else []

    def hover(axes, x, y, result):
        before = [peak.numpy() for peak in peaks[result.place]]
        if axes not in artists.panels:
            return ""
        channel = channel_at(axes, x, before[artists.panels.index(axes)])
        rows = zip("XW", before, (result.x_absmax, result.w_absmax), strict=True)
        return "\n".join([f"channel {channel}", *(f"largest |{name}|: {was[channel]:.4g}" + (
            f" → {now[channel]:.4g}" if result.direction != OFF else "") for name, was, now in rows)])

    figure, artists = _figure()
    return Explorer(
        figure, controls, compute, partial(_draw, artists, peaks), read, couple=couple, hover=hover,
        handles=[Handle("α", artists.dot.axes, dot, lambda x, y, start: {"alpha": x}, radius=16)],
        ghost=[*artists.after, artists.line, artists.dot], main=("output_error_percent", "%"),
        title="SmoothQuant on one layer",
        description="Left, above, the largest activation of each channel, and below, the largest weight that it meets, "
        "before and after smoothing, on logarithmic axes. Right, the error of the layer's output against alpha, with a "
        "dot at the present alpha and a dashed line for no smoothing.",
    )


def _figure():
    with new_figure(height=470) as figure:
        axes = figure.subplot_mosaic("XE;WE", width_ratios=[1.5, 1])
        x, w, curve = axes["X"], axes["W"], axes["E"]
        x.set(title="largest |X| of each channel", yscale="log", xticks=[])
        w.set(title="largest |W| of each channel", yscale="log", xlabel="channel")
        before = [panel.plot([], [], color=GREY, lw=1, label="before")[0] for panel in (x, w)]
        after = [panel.plot([], [], color=BLACK, lw=1, animated=True, label="as quantized")[0] for panel in (x, w)]
        for panel in (x, w):
            panel.legend(loc="lower right", ncols=2, fontsize=11, framealpha=0.8)
        curve.set(title="error of Y = X Wᵀ", xlabel="α  (0: all to X,  1: all to W)", xlim=(-0.03, 1.03),
                  ylim=(_LEAST, _MOST), yscale="log")
        curve.set_yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
        line = curve.plot([], [], color=BLACK, animated=True)[0]
        off = curve.axhline(1, color=ORANGE, ls="--", animated=True, label="off")
        curve.legend(loc="upper right")
        dot = curve.plot([], [], "o", ms=12, color=VERMILION, animated=True)[0]
    return figure, SimpleNamespace(place=None, panels=(x, w), before=before, after=after, line=line, off=off, dot=dot)


def _draw(artists, peaks, result):
    if result.place != artists.place:  # a new background
        artists.place = result.place
        x, w = (peak.numpy() for peak in peaks[result.place])
        both = x * w  # X / s and W · s lie between this, at one end of α, and 1, at the other
        for panel, line, peak, more in zip(artists.panels, artists.before, (x, w), (30, 1), strict=True):
            line.set_data(np.arange(peak.size), peak)
            least, most = min(peak.min() / 30, both.min() / 3, 1 / 3), 3 * max(more * peak.max(), both.max(), 1)
            panel.set(xlim=(0, peak.size), ylim=(max(least, most * 1e-9), most))
    for line, values in zip(artists.after, (result.x_absmax, result.w_absmax), strict=True):
        line.set_data(np.arange(values.size), values)
    artists.line.set_data(ALPHAS[:result.curve.size], np.clip(result.curve, _LEAST, _MOST))
    artists.off.set_ydata([np.clip(result.off, _LEAST, _MOST)] * 2)
    artists.dot.set_data([result.alpha] if result.direction != OFF else [], [np.clip(result.now, _LEAST, _MOST)]
                         if result.direction != OFF else [])
