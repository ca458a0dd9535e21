"""Lesson 04: how a gradient passes through rounding. (As ``qat.py`` it would hide the figure's own name.)"""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
from matplotlib.lines import Line2D

from qlab.explorers.colors import BLACK, BLUE, GREY, ORANGE, VERMILION
from qlab.explorers.parts import bits_slider, moving, paths
from qlab.live import Explorer, FloatLogSlider, FloatSlider, Handle, new_figure

_REACH = 3.0  # of the staircase's x axis
LSQ, PACT = "LSQ: learn s", "PACT: learn α"


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

    In the picture, the dashed line moves x, the diamond on the first step and the ends of the range s, and in PACT the
    upper end α.

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
    slider = {"style": {"description_width": "20px"}, "layout": {"width": "330px"}}
    controls = {
        "scheme": widgets.ToggleButtons(options=[LSQ, PACT], style={"button_width": "112px"}),
        "bits": bits_slider(bits),
        "s": FloatLogSlider(0.5, base=2, min=-6, max=0, step=0.05, description="s", readout_format=".3f", **slider),
        "alpha": FloatSlider(2.0, min=0.25, max=_REACH, step=0.01, description="α", disabled=True, **slider),
        "x": FloatSlider(0.65, min=-_REACH, max=_REACH, step=0.01, description="x", **slider),
    }

    def compute(*, scheme, bits, s, alpha, x):
        lsq = scheme == LSQ
        qmin, qmax = _codes(scheme, bits)
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
        figure, controls, compute, partial(_draw_rounding, artists), read, couple=couple, handles=_handles(figure),
        ghost=[artists.stairs, artists.estimate, artists.by_parameter, *artists.here], main=("x_hat", "units of x"),
        parts={"derivatives": [artists.true, artists.jumps, artists.estimate, artists.dots[1]]},
        title="A gradient through rounding",
        description="Above: the quantized value against the value, a staircase with flat ends. In the middle: its "
        "derivative, 0 between the jumps, and the straight-through estimator, 1 inside the range. Below: the "
        "gradient of the learned scale or range. A dashed line marks x in all three.",
    )


def _handles(figure):
    def ends(result):
        return [(end, None) for end in result.ends] if result.scheme == LSQ else [(result.ends[1], None)]

    def move_end(x, y, start):
        if start.values["scheme"] == PACT:
            return {"alpha": x}
        bits = start.values["bits"]
        return {"s": x / _codes(LSQ, bits)[start.mark]}

    def first_step(result):
        return [(result.s, result.s)] if result.scheme == LSQ else []

    above, *_ = figure.axes
    return [Handle("s, the step", above, first_step, lambda x, y, start: {"s": (x + y) / 2}),
            *(Handle("x", axes, lambda result: (result.x, None), lambda x, y, start: {"x": x}) for axes in figure.axes),
            *(Handle("the end of the range", axes, ends, move_end) for axes in figure.axes)]


def _codes(scheme, bits):
    """q_min and q_max."""
    return (-min(2 ** (bits - 1), 127), 2 ** (bits - 1) - 1) if scheme == LSQ else (0, 2**bits - 1)


def _rounding_figure():
    with new_figure(1000, 490) as figure:
        above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[1.8, 0.6, 1.3])
        ends = [axes.axvspan(0, 0, color=GREY, alpha=0.22, lw=0, animated=True)
                for axes in (above, middle, below) for _ in range(2)]
        above.set(xlim=(-_REACH, _REACH), ylim=(-_REACH, _REACH), ylabel="x̂")
        above.plot([-_REACH, _REACH], [-_REACH, _REACH], color=BLACK, lw=1, ls=":")
        stairs = moving(above, color=BLUE)
        middle.set(ylim=(-0.25, 1.3), yticks=[0, 1], ylabel="∂x̂/∂x")
        jumps = moving(middle, color=GREY, lw=1)
        true = moving(middle, color=BLACK)
        estimate = moving(middle, color=VERMILION, ls=(0, (4, 1.5)))
        below.set_yscale("symlog", linthresh=1, linscale=2.2)
        below.set(xlabel="x (shaded: outside the range)")
        below.axhline(0, color=BLACK, lw=0.8)
        by_parameter = moving(below, color=ORANGE)
        first_step = moving(above, "D", color=BLUE, mfc="white", mew=2, ms=8, zorder=4)
        here = [axes.axvline(0, color=BLACK, lw=1.4, ls="--", animated=True) for axes in (above, middle, below)]
        look = {"ls": "", "marker": "o", "ms": 10, "zorder": 5, "clip_on": False}
        dots = [moving(axes, color=color, **look)
                for axes, color in ((above, BLUE), (middle, VERMILION), (below, ORANGE))]
        above.legend([stairs, Line2D([], [], color=BLACK, lw=1, ls=":")], ["quantized", "x itself"], loc="upper left")
        middle.legend([true, estimate], ["the derivative (grey: x̂ jumps)", "straight-through"], ncols=2,
                      loc="lower left", bbox_to_anchor=(0, 0.97), frameon=False, borderaxespad=0)
        for axes in (above, middle):
            axes.get_legend().set_animated(False)
        for axes in (above, middle, below):
            axes.yaxis.set_label_coords(-0.06, 0.5)  # beyond the longest tick, −127
    return figure, SimpleNamespace(ends=ends, stairs=stairs, jumps=jumps, true=true, estimate=estimate, below=below,
                                   by_parameter=by_parameter, first_step=first_step, here=here, dots=dots, codes=None)


def _draw_rounding(artists, result):
    if (result.scheme, result.qmax) != artists.codes:  # a new background
        artists.codes = result.scheme, result.qmax
        if result.scheme == LSQ:
            ticks = {result.qmin: f"−{-result.qmin}", -0.5: "−½", 0: "0", 0.5: "½", result.qmax: f"{result.qmax}"}
            artists.below.set(ylabel="∂x̂/∂s", ylim=(1.6 * result.qmin, -1.6 * result.qmin))
        else:
            ticks = {0: "0", 1: "1"}
            artists.below.set(ylabel="∂x̂/∂α", ylim=(-0.25, 1.3))
        artists.below.set_yticks(list(ticks), list(ticks.values()))
    alpha, beta = result.ends
    codes = np.arange(result.qmin, result.qmax + 1)
    jumps = (codes[1:] - 0.5) * result.s
    starts, stops = np.append(-_REACH, jumps), np.append(jumps, _REACH)
    artists.stairs.set_data(np.stack([starts, stops], 1).ravel(), np.repeat(codes * result.s, 2))
    artists.true.set_data(*paths([starts, stops], [0, 0]))
    artists.jumps.set_data(*paths([jumps, jumps], [-0.25, 1.3]))
    artists.estimate.set_data([-_REACH, alpha, alpha, beta, beta, _REACH], [0, 0, 1, 1, 0, 0])
    if result.scheme == LSQ:
        starts, stops = np.append(alpha, jumps), np.append(jumps, beta)
        inside = paths([starts, stops], [codes - starts / result.s, codes - stops / result.s])
        tails = paths([[-_REACH, beta], [alpha, _REACH]], [[result.qmin, result.qmax]] * 2)
        artists.by_parameter.set_data(*np.concatenate([tails, inside], axis=1))
    else:
        artists.by_parameter.set_data([-_REACH, beta, beta, _REACH], [0, 0, 1, 1])
    for i, span in enumerate(artists.ends):
        left, right = ((-_REACH, alpha), (beta, _REACH))[i % 2]
        span.set_bounds(left, 0, max(right - left, 0), 1)
    artists.first_step.set_data(*([[result.s]] * 2 if result.scheme == LSQ else [[], []]))
    heights = result.x_hat, float(result.inside), result.by_parameter
    for line, dot, height in zip(artists.here, artists.dots, heights, strict=True):
        line.set_xdata([result.x, result.x])
        dot.set_data([result.x], [height])
