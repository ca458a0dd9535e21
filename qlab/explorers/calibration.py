"""Lesson 03: where to end the range, and what happens when the data leaves it."""

from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from qlab import calibration
from qlab.affine import ErrorSplit, QParams, dequantize, range_params
from qlab.explorers.colors import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from qlab.explorers.parts import bits_slider, moving, own_data, ratio_db
from qlab.live import Explorer, FloatLogSlider, FloatSlider, Handle, new_figure

_BINS = 360
_CURVE_POINTS = 60
_STEPS = 400  # of a range slider
_FEW_LEVELS = 32  # up to here every level is a full line, beyond it a short tick
_OVER = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 5, "frameon": False, "borderaxespad": 0,
         "columnspacing": 1.1, "handletextpad": 0.5}  # a legend in a row of its own

CALIBRATORS = {
    "min-max": lambda profile, bits, linked: calibration.minmax(profile, symmetric=linked),
    "99.9 %": lambda profile, bits, linked: calibration.percentile(profile, 99.9, symmetric=linked),
    "MSE": lambda profile, bits, linked: calibration.mse(profile, bits, symmetric=linked),
    "KL": lambda profile, bits, linked: calibration.entropy(profile, bits),
    "ACIQ": lambda profile, bits, linked: calibration.aciq(profile, bits),
}


@dataclass(frozen=True)
class Clipping:
    """What `clipping` shows for one position of its controls."""

    params: QParams
    levels: np.ndarray
    alpha: float
    beta: float
    error: ErrorSplit
    sqnr_db: float
    clipped: float  # share of the values
    left: ErrorSplit  # error while alpha moves
    right: ErrorSplit  # error while beta moves
    marks: dict  # calibrator: the ends of its range, and their error
    linked: bool
    log: bool
    view: str


def clipping(x, bits=4):
    """Explore how the ends of the range trade rounding error for clipping error.

    Above, the histogram of ``x``, the grid, and the clipped tails. Below, the error as a function of where the range
    ends: right of 0 while β moves, left of 0 while α moves, the other end held. Both ends can be taken in the picture,
    and if they are not linked the range as a whole.

    Parameters
    ----------
    x : float array, ErrorProfile, or the path of a ``.npy`` file
        Any size: a step costs the same for a thousand values and for ten million.
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``alpha``, ``beta`` (units of ``x``), ``bits``, ``linked`` (the range is [−β, β] and the quantizer
        symmetric), ``log`` (logarithmic counts) and ``view`` ("all" or "crowd"). An end stops a step before the range
        would have no width. Chips: one for each calibrator.

    Raises
    ------
    ValueError
        If ``x`` is empty, has a NaN or infinity or is 0 everywhere, or ``bits`` is not from 2 to 8.

    Examples
    --------
    >>> explorer = clipping(np.random.default_rng(0).standard_normal(10_000), bits=4)
    >>> explorer.set(beta=2.5)
    >>> print(f"{explorer.readout['mse']:.4f}")
    0.0127
    """
    profile = calibration.as_profile(own_data(x, "x"))
    reach = max(-profile.min, profile.max)
    if reach == 0:
        raise ValueError("x must hold a value other than 0, got only zeros")
    slider = {"step": reach / _STEPS, "readout_format": ".3f" if reach < 100 else ".1f", "layout": {"width": "400px"}}
    controls = {
        "alpha": FloatSlider(-reach, min=-reach, max=0.0, description="α", **slider),
        "beta": FloatSlider(reach, min=0.0, max=reach, description="β", **slider),
        "bits": bits_slider(bits),
        "linked": widgets.Checkbox(True, description="linked: α = −β", indent=False, layout={"width": "150px"}),
        "log": widgets.Checkbox(True, description="log counts", indent=False, layout={"width": "120px"}),
        "view": widgets.ToggleButtons(options=["all", "crowd"], style={"button_width": "70px"}),
    }
    found = {}  # (bits, linked): marks, filled as chips are pressed

    def jump(calibrator, *, bits, linked, **_):
        alpha, beta = CALIBRATORS[calibrator](profile, bits, linked)
        alpha, beta = float(np.clip(alpha, -reach, 0)), float(np.clip(beta, 0, reach))
        if linked:
            beta = max(-alpha, beta)
            alpha = -beta
        error = float(profile.mse(alpha, beta, bits, symmetric=linked))
        found.setdefault((bits, linked), {})[calibrator] = alpha, beta, error
        return {"alpha": alpha, "beta": beta}

    ends = reach * np.linspace(1 / _CURVE_POINTS, 1, _CURVE_POINTS)

    @lru_cache(maxsize=32)
    def curve(alpha, beta, bits):
        """Error while the end that is None moves; while both move if both are None."""
        symmetric = alpha is None and beta is None
        return profile.split(-ends if alpha is None else alpha, ends if beta is None else beta, bits,
                             symmetric=symmetric)

    def compute(*, alpha, beta, bits, linked, log, view):
        params = range_params(alpha, beta, bits, symmetric=linked)
        levels = dequantize(np.arange(params.qmin, params.qmax + 1), params)
        error = profile.split(alpha, beta, bits, symmetric=linked)
        return Clipping(
            params, levels, alpha, beta, error, float(ratio_db(_power(profile), error.total)),
            clipped=profile.share_outside(levels[0], levels[-1]),
            left=curve(None, None if linked else beta, bits),
            right=curve(None if linked else alpha, None, bits),
            marks=dict(found.get((bits, linked), {})),
            linked=linked, log=log, view=view,
        )

    def read(result):
        return {
            "alpha": result.alpha,
            "beta": result.beta,
            "mse": result.error.total,
            "rounding": result.error.rounding,
            "clipping": result.error.clipping,
            "sqnr_db": result.sqnr_db,
            "clipped_percent": 100 * result.clipped,
            "scale": float(result.params.scale),
            "zero_point": int(result.params.zero_point),
        }

    def couple(name, values):
        alpha, beta, least = values["alpha"], values["beta"], slider["step"]
        if values["linked"]:
            beta = max(-alpha if name == "alpha" else beta, least)
            return {"alpha": -beta, "beta": beta}
        if beta - alpha < least:
            return {"alpha": -least} if name == "alpha" else {"beta": least}
        return {}

    def shift(x, y, start):
        alpha, beta = start.values["alpha"], start.values["beta"]
        way = np.clip(x - start.x, max(-reach - alpha, -beta), min(-alpha, reach - beta))
        return {"alpha": float(alpha + way), "beta": float(beta + way)}

    def whole(result):
        """The range, where it has room to move."""
        alpha, beta = result.alpha, result.beta
        room = max(min(reach + alpha, beta), min(-alpha, reach - beta))
        return [((alpha, beta), None)] if room and not result.linked else []

    figure, artists = _clipping_figure(profile, reach, ends)
    handles = [handle for axes in (artists.above, artists.below) for handle in (
        Handle("α", axes, lambda result: (result.alpha, None), lambda x, y, start: {"alpha": x}),
        Handle("β", axes, lambda result: (result.beta, None), lambda x, y, start: {"beta": x}),
        Handle("the range", axes, whole, shift),
    )]
    return Explorer(
        figure, controls, compute, partial(_draw_clipping, artists), read,
        chips={name: partial(jump, name) for name in CALIBRATORS}, couple=couple, handles=handles,
        ghost=[*artists.lines, artists.curves["total"], artists.dots], main=("sqnr_db", "dB"),
        parts={"curves": artists.curves.values()},
        title=f"Clipping {profile.n:,} values",
        description="Above: histogram of the data, the quantizer's levels as vertical lines, and the clipped tails "
        "shaded. Below: rounding error, clipping error and their sum against the ends of the range; a dot marks the "
        "present range, hollow signs the calibrators' ranges and errors.",
    )


def _clipping_figure(profile, reach, ends):
    with new_figure() as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.15])
        crowd = 4 * max(abs(profile.quantile(0.01)), abs(profile.quantile(0.99)), reach / 100)
        views = {"all": 1.04 * reach, "crowd": min(crowd, 1.04 * reach)}
        histograms = {}
        for view, limit in views.items():
            counts, edges = profile.histogram(np.linspace(-limit, limit, _BINS + 1))
            histograms[view] = above.stairs(counts, edges, fill=True, color=SKY, baseline=1e-9)
        above.set_ylabel("values per bin")
        levels = LineCollection([], colors=BLACK, linewidths=1, alpha=0.6, animated=True,
                                transform=above.get_xaxis_transform())
        above.add_collection(levels, autolim=False)
        tails = [above.axvspan(0, 1, color=VERMILION, alpha=0.22, lw=0, animated=True) for _ in range(2)]
        above.legend([levels, tails[0]], ["levels", "clipped"], **_OVER).set_animated(False)
        lines = [_two_verticals(axes) for axes in (above, below)]

        best = profile.mse(-ends, ends, 8).min()
        power = profile.std**2 + profile.mean**2
        below.set(yscale="log", ylim=(min(best, power / 10) / 10, 3 * power), ylabel="mean squared error")
        look = {"rounding": {"color": BLUE, "ls": "--"}, "clipping": {"color": VERMILION, "ls": ":"},
                "total": {"color": BLACK, "ls": "-"}}
        places = np.concatenate([-ends[::-1], [np.nan], ends])
        curves = {part: below.plot(places, places, animated=True, **look[part])[0] for part in look}
        dots = moving(below, "o", ms=9, color=BLACK)
        marks = {  # background: they change when a chip is pressed, not while a slider moves
            name: below.plot([], [], sign, color=color, ms=11, mfc="none", mew=2.5, clip_on=False, visible=False)[0]
            for name, sign, color in zip(CALIBRATORS, "sD^vp", (ORANGE, SKY, GREEN, PURPLE, VERMILION), strict=True)
        }
        below.add_artist(below.legend([Line2D([], [], **look[part]) for part in look], ["rounding", "clipping", "sum"],
                                      **_OVER))
        signs = [Line2D([], [], ls="", marker=mark.get_marker(), color=mark.get_color(), ms=11, mfc="none", mew=2.5)
                 for mark in marks.values()]
        below.legend(signs, list(marks), **_OVER | {"loc": "lower right", "bbox_to_anchor": (1, 1), "handlelength": 1})
    return figure, SimpleNamespace(
        above=above, below=below, views=views, histograms=histograms, levels=levels, tails=tails, lines=lines,
        curves=curves, dots=dots, marks=marks, scene=None, shown={},
    )


def _draw_clipping(artists, result):
    scene = result.log, result.view, result.linked
    if scene != artists.scene:
        _draw_scene(artists, *scene)
    low, high = result.levels[[0, -1]]
    limit = artists.views[result.view]
    for tail, start, stop in zip(artists.tails, (-limit, high), (low, limit), strict=True):
        tail.set_bounds(start, 0, stop - start, 1)
    height = 1 if result.levels.size <= _FEW_LEVELS else 0.07
    artists.levels.set_segments([((level, 0), (level, height)) for level in result.levels.tolist()])
    for line in artists.lines:
        line.set_xdata([result.alpha, result.alpha, np.nan, result.beta, result.beta])
    for part, curve in artists.curves.items():
        left, right = getattr(result.left, part), getattr(result.right, part)
        curve.set_ydata(np.maximum(np.concatenate([left[::-1], [np.nan], right]), 1e-300))
    artists.dots.set_data([result.alpha, result.beta], [max(result.error.total, 1e-300)] * 2)
    if result.marks != artists.shown:
        artists.shown = result.marks
        for name, mark in artists.marks.items():
            mark.set_visible(name in result.marks)
            *range_, error = result.marks.get(name, (np.nan,) * 3)
            mark.set_data(range_, [max(error, 1e-300)] * 2)


def _draw_scene(artists, log, view, linked):
    """What calls for a new background: the scale of the counts, the part of the axis shown, and what it means."""
    artists.scene = log, view, linked
    for name, stairs in artists.histograms.items():
        stairs.set_visible(name == view)
    top = artists.histograms[view].get_data().values.max()
    artists.above.set_yscale("log" if log else "linear")
    artists.above.set_ylim((0.7, 2 * top) if log else (0, 1.06 * top))
    artists.above.set_xlim(-artists.views[view], artists.views[view])
    artists.below.set_xlabel(
        "end of the range, α = −β (units of the data)" if linked else
        "left of 0: the error while α moves, β held  |  right of 0: while β moves, α held"
    )


@dataclass(frozen=True)
class Drift:
    """What `drift` shows for one position of its controls."""

    alpha: float
    beta: float
    gain: float
    counts: np.ndarray
    static_db: float
    dynamic_db: float
    outside: float
    static_curve: np.ndarray


def drift(calibrated_on, new, bits=8):
    """Explore what a static range does to data that it was not calibrated on.

    The range comes from ``calibrated_on``, widened to hold 0, and stays. The data that arrives is ``new``, multiplied
    by a gain. Above, its histogram and the static range; below, the signal-to-noise ratio against the gain, with the
    static range and with a range measured anew (dynamic). The data, above, is taken and stretched; so is the gain,
    below.

    Parameters
    ----------
    calibrated_on, new : float array or ErrorProfile
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``gain`` (0.25 to 4, no unit), ``bits``, ``calibrator`` and ``data`` ("new" or "calibration").

    Raises
    ------
    ValueError
        If an array is empty, has a NaN or infinity or is 0 everywhere, or ``bits`` is not from 2 to 8.

    References
    ----------
    Gholami et al. 2022, "A survey of quantization methods for efficient neural network inference", section III-D.
    """
    profiles = {"new": calibration.as_profile(new), "calibration": calibration.as_profile(calibrated_on)}
    for name, profile in profiles.items():
        if profile.min == profile.max == 0:
            raise ValueError(f"{name} data must hold a value other than 0, got only zeros")

    @lru_cache
    def calibrated(calibrator, bits, data):
        alpha, beta = CALIBRATORS[calibrator](profiles[data], bits, False)
        return min(alpha, 0.0), max(beta, 0.0)

    gains = np.geomspace(0.25, 4, 65)
    limit = 1.6 * max(abs(end) for profile in profiles.values() for end in (profile.min, profile.max))
    edges = limit * np.linspace(-1, 1, _BINS + 1)

    def sqnr(data, alpha, beta, bits):
        return ratio_db(_power(profiles[data]), profiles[data].mse(alpha, beta, bits))

    @lru_cache
    def static_curve(calibrator, bits, data):
        alpha, beta = calibrated(calibrator, bits, "calibration")
        return sqnr(data, alpha / gains, beta / gains, bits)

    def compute(*, gain, bits, calibrator, data):
        alpha, beta = calibrated(calibrator, bits, "calibration")
        # Quantizing gain · x over [α, β] is quantizing x over [α, β] / gain: the profile of x serves every gain.
        counts, _ = profiles[data].histogram(edges / gain)
        dynamic_db = float(sqnr(data, *calibrated(calibrator, bits, data), bits))
        return Drift(
            alpha, beta, gain, counts, float(sqnr(data, alpha / gain, beta / gain, bits)), dynamic_db,
            profiles[data].share_outside(alpha / gain, beta / gain), static_curve(calibrator, bits, data),
        )

    def read(result):
        return {
            "gain": result.gain,
            "alpha": result.alpha,
            "beta": result.beta,
            "outside_percent": 100 * result.outside,
            "static_sqnr_db": result.static_db,
            "dynamic_sqnr_db": result.dynamic_db,
            "lost_db": 0.0 if result.static_db == result.dynamic_db else result.dynamic_db - result.static_db,
        }

    controls = {
        "gain": FloatLogSlider(1.0, base=2, min=-2, max=2, step=0.05, description="gain",
                                       readout_format=".2f", layout={"width": "400px"}),
        "bits": bits_slider(bits),
        "calibrator": widgets.Dropdown(options=list(CALIBRATORS), description="calibrator", layout={"width": "220px"}),
        "data": widgets.ToggleButtons(options=["new", "calibration"], style={"button_width": "100px"}),
    }
    figure, artists = _drift_figure(profiles, gains, edges)

    def beside_zero(result):
        return [((edges[0], -limit / 8), None), ((limit / 8, edges[-1]), None)]

    def stretch(x, y, start):
        return {"gain": start.values["gain"] * max(x / start.x, 0.0)}

    return Explorer(
        figure, controls, compute, partial(_draw_drift, artists), read,
        handles=[
            Handle("the data, times the gain", artists.above, beside_zero, stretch),
            Handle("the gain", artists.below, lambda result: (result.gain, None), lambda x, y, start: {"gain": x}),
        ],
        ghost=[artists.dot, artists.here], main=("static_sqnr_db", "dB"),
        parts={"curves": [artists.static, artists.dynamic, artists.dot]},
        title="A static range meets new data",
        description="Above: histogram of the data that arrives, the calibrated range, and what falls outside of it. "
        "Below: signal-to-noise ratio against the gain of the data, with the static range and with a dynamic one.",
    )


def _drift_figure(profiles, gains, edges):
    with new_figure() as figure:
        above, below = figure.subplots(2, 1, height_ratios=[1, 1.1])
        most = max(profile.histogram(_BINS)[0].max() for profile in profiles.values())
        above.set(xlim=edges[[0, -1]], yscale="log", ylim=(0.7, 8 * most), ylabel="values per bin",
                  xlabel="value (units of the data)")
        histogram = above.stairs(np.zeros(_BINS), edges, fill=True, color=SKY, baseline=1e-9, animated=True)
        tails = [above.axvspan(0, 1, color=VERMILION, alpha=0.22, lw=0, animated=True) for _ in range(2)]
        line = _two_verticals(above)
        below.set(xscale="log", xlim=(gains[0], gains[-1]), ylim=(0, 55), ylabel="SQNR (dB)",
                  xlabel="gain: new data × gain")
        below.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
        below.minorticks_off()
        static = below.plot(gains, gains, color=VERMILION, animated=True)[0]
        dynamic = below.plot(gains[[0, -1]], [0, 0], color=BLUE, ls="--", animated=True)[0]
        here = below.axvline(1, color=BLACK, lw=1.6, ls="--", animated=True)
        dot = below.plot([1], [1], "o", ms=11, color=BLACK, animated=True)[0]
        below.legend([Line2D([], [], color=VERMILION), Line2D([], [], color=BLUE, ls="--")],
                     ["static range", "dynamic range"], **_OVER)
    return figure, SimpleNamespace(above=above, below=below, edges=edges, histogram=histogram, tails=tails, line=line,
                                   static=static, dynamic=dynamic, here=here, dot=dot)


def _draw_drift(artists, result):
    artists.histogram.set_data(result.counts)
    for tail, start, stop in zip(artists.tails, (artists.edges[0], result.beta), (result.alpha, artists.edges[-1]),
                                 strict=True):
        tail.set_bounds(start, 0, stop - start, 1)
    artists.line.set_xdata([result.alpha, result.alpha, np.nan, result.beta, result.beta])
    artists.static.set_ydata(result.static_curve)
    artists.dynamic.set_ydata([result.dynamic_db] * 2)
    artists.here.set_xdata([result.gain] * 2)
    artists.dot.set_data([result.gain], [result.static_db])


def _power(profile):
    return profile.std**2 + profile.mean**2


def _two_verticals(axes):
    """The ends of the range: one artist, since each costs a quarter of a millisecond a step."""
    return axes.plot([0, 0, np.nan, 0, 0], [0, 1, np.nan, 0, 1], color=BLACK, lw=1.6, ls="--", animated=True,
                     transform=axes.get_xaxis_transform(), scalex=False, scaley=False)[0]
