"""Lesson 06: difficulty on its way from the activations to the weights."""

from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.ticker import LogLocator

from qlab import samples
from qlab.affine import absmax_params, fake_quantize
from qlab.explorers.colors import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION
from qlab.explorers.parts import bits_slider, moving
from qlab.explorers.places import channel_at, checked_places, place_control
from qlab.live import Explorer, FloatSlider, Handle, new_figure
from qlab.smoothquant import smoothing_scales
from qlab.studies import smoothquant as study
from qlab.studies.tables import load

OFF, RIGHT, PRINTED = "off", "X / s, W · s", "X · s, W / s (slides)"
TENSOR, VECTOR = "tensor", "token, output"
ALPHAS = np.linspace(0, 1, 21)
_LEAST, _MOST = 0.1, 200.0  # percent: ends of the axis of the error
_TEXTS = {"prose": BLUE, "code": GREEN, "documentation": PURPLE}


@dataclass(frozen=True)
class Place:
    """A product x wᵀ, and what is known of the whole matrix whose rows w are.

    The largest of a row of W s is that of ``values * s[at]``, which leaves out what cannot be the largest.
    """

    x: torch.Tensor
    w: torch.Tensor
    columns: torch.Tensor  # largest |W| of each channel, over all matrices that read the place
    values: torch.Tensor
    at: torch.Tensor


@dataclass(frozen=True)
class Smoothing:
    """What `smoothing` shows for one position of its controls."""

    place: tuple
    alpha: float
    direction: str
    x_absmax: np.ndarray  # of each channel, as the quantizer sees it
    w_absmax: np.ndarray
    rows: np.ndarray  # the largest of each row of the first matrix, as the quantizer sees it
    curve: np.ndarray  # error of the output in percent, for each of ALPHAS; empty without a direction
    off: float  # the same without smoothing
    now: float


def smoothing(places=None, bits=8):
    """Explore how α divides the difficulty between activations and weights, and what it does to their product.

    Left, the largest |X| and the largest |W| of each channel, and of each row of W, before (grey) and after. Right, the
    error of the output Y = X Wᵀ against α, once a direction is chosen; activations and weights are both quantized
    (absmax). Without quantization Y is the same for every α. The dot on the curve can be dragged. Below it, what α is
    to the whole model in static 8 bits, as `qlab.studies.smoothquant` has measured it on three texts.

    The layer's own s: the largest |W| of a channel is over all matrices that read it (q, k and v), and one scale for W
    is that of the whole matrix. Only the error is that of some outputs.

    Parameters
    ----------
    places : dict of (layer, site) to pair (x, w), optional
        As `qlab.explorers.outliers`. With places of one's own their w is the whole matrix, and the model is left out.
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
    >>> explorer.readout["output_error_percent"] < before / 2
    True
    """
    of_the_model = places is None
    places = {place: _whole(place, *pair, ships=of_the_model) for place, pair in checked_places(places).items()}
    peaks = {place: (one.x.abs().amax(0), one.columns, one.values.amax(1)) for place, one in places.items()}
    outputs = {place: one.x @ one.w.T for place, one in places.items()}

    @lru_cache(maxsize=256)
    def scales(place, alpha, direction):
        if direction == OFF:
            return torch.ones_like(peaks[place][0])
        s = smoothing_scales(*peaks[place][:2], alpha)
        return 1 / s if direction == PRINTED else s

    @lru_cache(maxsize=4096)
    def error(place, alpha, direction, per, bits):
        one, s = places[place], scales(place, alpha, direction)
        axis = None if per == TENSOR else 0
        smoothed = one.x / s, one.w * s
        params = [absmax_params(smoothed[0], bits, axis=axis),
                  absmax_params(smoothed[1] if per == VECTOR else one.values * s[one.at], bits, axis=axis)]
        x_hat, w_hat = map(fake_quantize, smoothed, params)
        return 100 * float((x_hat @ w_hat.T - outputs[place]).norm() / outputs[place].norm())

    def compute(*, place, alpha, direction, per, bits):
        one, s = places[place], scales(place, alpha, direction)
        alphas = ALPHAS if direction != OFF else []  # it would answer the question that it is to raise
        return Smoothing(
            place, alpha, direction, (peaks[place][0] / s).numpy(), (peaks[place][1] * s).numpy(),
            rows=(one.values * s[one.at]).amax(1).numpy(),
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
            "row_to_median": float(result.rows.max() / max(np.median(result.rows), np.finfo(np.float32).tiny)),
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
        panel = artists.panels.index(axes)
        index = channel_at(axes, x, before[panel] if panel < 2 else result.rows)
        rows = [("X", before[0], result.x_absmax), ("W", before[1], result.w_absmax)]
        if panel == 2:
            rows = [("W", before[2], result.rows)]
        return "\n".join([f"{'row' if panel == 2 else 'channel'} {index}", *(
            f"largest |{name}|: {was[index]:.4g}" + (f" → {now[index]:.4g}" if result.direction != OFF else "")
            for name, was, now in rows)])

    figure, artists = _figure(of_the_model)
    return Explorer(
        figure, controls, compute, partial(_draw, artists, peaks), read, couple=couple, hover=hover,
        handles=[Handle("α", artists.dot.axes, dot, lambda x, y, start: {"alpha": x}, radius=16)],
        ghost=[*artists.after, artists.line, artists.dot], main=("output_error_percent", "%"),
        parts={"curves": [artists.line, artists.dot, *artists.model]},
        title="SmoothQuant on one layer",
        description="Left, from above, the largest activation of each channel, the largest weight that it meets, and "
        "the largest weight of each row, before and after smoothing, on logarithmic axes. Right, the error of the "
        "layer's output against alpha, with a dot at the present alpha and a dashed line for no smoothing; below, the "
        "divergence of the whole model against alpha, on three texts.",
    )


def _whole(place, x, w, *, ships):
    if ships:
        columns, values, at = map(torch.from_numpy, samples.largest_weights()[place])
        return Place(x, w, columns, values, at)
    return Place(x, w, w.abs().amax(0), w.abs(), torch.arange(w.shape[1]).expand_as(w))


def _figure(of_the_model):
    with new_figure(height=560) as figure:
        mosaic = "XE\nXE\nWE\nWM\nRM\nRM" if of_the_model else "XE\nWE\nRE"
        axes = figure.subplot_mosaic(mosaic, width_ratios=[1.5, 1])
        panels, curve = [axes[name] for name in "XWR"], axes["E"]
        panels[0].set(title="largest |X| of each channel", yscale="log", xticks=[])
        panels[1].set(title="largest |W| of each channel", yscale="log", xticks=[])
        panels[2].set(title="largest |W| of each row", yscale="log")
        before, after = ([panel.plot([], [], lw=1, antialiased=False, **look)[0] for panel in panels] for look in (
            {"color": GREY, "label": "before"}, {"color": BLACK, "label": "as quantized", "animated": True}))
        for panel in panels:  # few marks: each step sends the picture
            panel.yaxis.set_major_locator(LogLocator(numticks=4))
            panel.minorticks_off()
        panels[0].legend(loc="upper right", ncols=2, fontsize=11, framealpha=0.8)
        curve.set(title="error of Y = X Wᵀ", xlim=(-0.03, 1.03), ylim=(_LEAST, _MOST), yscale="log")
        curve.set_yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
        line = moving(curve, color=BLACK, antialiased=False)
        off = curve.axhline(1, color=ORANGE, ls="--", animated=True, label="off")
        curve.legend(loc="upper right")
        dot = moving(curve, "o", ms=12, color=VERMILION)
        below = axes["M"] if of_the_model else curve
        below.set_xlabel("α  (0: all to X,  1: all to W)")
        model = _model(below) if of_the_model else []
    return figure, SimpleNamespace(place=None, panels=panels, before=before, after=after, line=line, off=off, dot=dot,
                                   model=model)


def _model(axes):
    """The divergence of the whole model over α, on three texts; last, where the present α is."""
    found = load("smoothquant")
    axes.set(title="KL of the whole model, 8 bits", xlim=(-0.03, 1.03), ylim=(0.02, 4), yscale="log")
    axes.set_yticks([0.1, 1], ["0.1", "1"])
    lines = [axes.plot(study.ALPHAS, [found.row(f"α {alpha}", text).kl for alpha in study.ALPHAS], color=color, lw=1.5,
                       label=text, antialiased=False, animated=True)[0] for text, color in _TEXTS.items()]
    off = np.mean([found.row("none", text).kl for text in _TEXTS])
    axes.axhline(off, color=ORANGE, ls="--")
    axes.legend(loc="upper right", fontsize=11, framealpha=0.8)
    return [*lines, axes.axvline(0.5, color=VERMILION, lw=1.5, animated=True)]


def _draw(artists, peaks, result):
    if result.place != artists.place:  # a new background
        artists.place = result.place
        x, w, rows = (peak.numpy() for peak in peaks[result.place])
        both = x * w  # X / s and W · s lie between this, at one end of α, and 1, at the other
        for panel, line, peak, more in zip(artists.panels, artists.before, (x, w, rows), (30, 1, 1), strict=True):
            line.set_data(np.arange(peak.size), peak)
            least, most = min(peak.min() / 30, both.min() / 3, 1 / 3), 3 * max(more * peak.max(), both.max(), 1)
            panel.set(xlim=(0, peak.size), ylim=(max(least, most * 1e-9), most))
    for line, values in zip(artists.after, (result.x_absmax, result.w_absmax, result.rows), strict=True):
        line.set_data(np.arange(values.size), values)
    artists.line.set_data(ALPHAS[:result.curve.size], np.clip(result.curve, _LEAST, _MOST))
    artists.off.set_ydata([np.clip(result.off, _LEAST, _MOST)] * 2)
    artists.dot.set_data([result.alpha] if result.direction != OFF else [], [np.clip(result.now, _LEAST, _MOST)]
                         if result.direction != OFF else [])
    for one in artists.model:
        one.set_visible(result.direction == RIGHT)
    if artists.model:
        artists.model[-1].set_xdata([result.alpha] * 2)
