"""Lesson 02: from real values to integer codes and back, and how many values share one scale."""

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib
import numpy as np
from matplotlib.lines import Line2D

from qlab.affine import (
    QParams,
    absmax_params,
    dequantize,
    fake_quantize,
    mse,
    quantize,
    range_params,
    real_array,
    zero_point_params,
)
from qlab.explorers.colors import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION
from qlab.explorers.parts import bits_slider, moving, own_data, paths, ratio_db
from qlab.live import Explorer, FloatSlider, Handle, IntSlider, in_a_row, new_figure

SEVEN = (5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8)  # the lecture notes' numbers

ABSMAX, ZERO_POINT, FREE = "absmax", "zero-point", "α, β"
_PEAKS = 1e-30, 1e30  # of |x|: float32 scales, and squares in float64, hold these
_MOST_THREADS, _MOST_POINTS, _MOST_CODES_LISTED = 40, 500, 8
_FEW_BITS = 4  # up to here each code is labelled and joined to its level
_LEVEL, _CODE_WIDTH = 0.84, 0.92  # where a thread has reached its level; how much of the width the codes take
_EDGE = 0.68  # steps: where the mark of a larger error stands
_MOST_LISTED, _LABEL_WIDTH = 12, 0.14  # errors written; how much of half the width one takes

BITS = range(2, 9)
GROUP_SIZES = (16, 32, 64, 96, 128, 192, 256, 512)
_LOOKS = {"tensor": (BLACK, "s"), "channel": (BLUE, "o"), "group": (VERMILION, "^")}
_WORST = 0.4  # steps: RMS error at the end of the colours
_UNIFORM = 1 / np.sqrt(12)  # RMS error of rounding, in steps
_MOST_ROWS = 380  # of patches, one pixel each at least
_COLORS = (matplotlib.colormaps["viridis"](np.arange(256)) * 255).round().astype(np.uint8)

DATA_CHIPS = {
    "seven numbers": {"data": ", ".join(map(str, SEVEN))},
    "[1, 2, 3]": {"data": "[1, 2, 3]"},
    "ties: absmax at 4 bits": {"data": "-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7", "bits": 4, "scheme": ABSMAX},
    "all ≥ 0": {"data": "0, 0.4, 1.3, 2.2, 0, 3.1, 4.7, 5.9"},
    "outlier": {"data": "-0.9, -0.5, -0.3, 0.2, 0.4, 0.8, 1.1, 12"},
}


@dataclass(frozen=True)
class Values:
    """The data of `mapping`, and what follows from it whatever the grid."""

    x: np.ndarray
    low: float  # the range, widened to hold 0
    high: float
    limit: float  # of the real line, if no hand has moved a value
    points: np.ndarray  # order statistics
    threads: np.ndarray  # fewer of them

    def ends(self, scheme):
        """The range that a scheme takes from the data."""
        peak = max(self.high, -self.low)
        if scheme == ABSMAX:
            return -peak, peak
        return (self.low, self.high) if scheme == ZERO_POINT or peak else (-self.limit, self.limit)


@dataclass(frozen=True)
class Mapping:
    """What `mapping` shows for one position of its controls."""

    values: Values
    limit: float  # of the sliders and the real line
    alpha: float
    beta: float
    params: QParams
    mse: float
    sqnr_db: float
    clipped: int
    chosen: float | None  # the value whose line is told


def mapping(x=SEVEN, bits=8):
    """Explore how real values become integer codes, and what that costs each of them.

    Above, the real line with the levels of the grid, the line of the integer codes, stretched to the same width for
    every number of bits, and a thread from each value over its level to its code. Below, the error x − x̂ of each
    value in steps of the grid, written beside it where the value is clipped. Values (up to 40), α and β can be taken
    in the picture.

    Parameters
    ----------
    x : float array, or the path of a ``.npy`` file
        Up to a million values. The error is that of all of them; of more than 40 above and 500 below, order statistics
        are drawn.
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``data`` (numbers as text), ``scheme`` ("absmax", "zero-point" or "α, β"), ``bits``, ``alpha`` and
        ``beta`` (the range in use, in units of the data; moving one switches to "α, β", and it stops a step before the
        other) and ``narrow`` (leave out the lowest code, as absmax always does). New data sets new limits for
        ``alpha`` and ``beta``: set it first. ``value`` chooses one, counted from 1, whose whole way from x / s to x̂
        then stands under the picture, as ``line`` in the numbers (0: none); the pointer tells the same of any.
        ``clipped`` counts the values that lie more than half a step outside of the levels. Chips: data worth a look.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, its largest magnitude is not 0 or from 1e-30 to 1e30, or ``bits``
        is not from 2 to 8. Typed data likewise, and if it is not numbers.

    References
    ----------
    Gholami et al. 2022, "A survey of quantization methods for efficient neural network inference", section III-B;
    Jacob et al. 2018, section 2.1.

    Examples
    --------
    >>> explorer = mapping()
    >>> explorer.readout["codes"], round(explorer.readout["mse"], 6)
    ('64 36 -89 0 -23 -54 127', 0.000298)
    >>> explorer.set(scheme="zero-point")
    >>> explorer.readout["zero_point"], round(explorer.readout["mse"], 6)
    (-23, 0.000272)
    """
    given = _values(own_data(x, "x"))
    name = ", ".join(f"{v:.6g}" for v in given.x) if given.x.size <= _MOST_THREADS else f"{given.x.size:,} values"
    values_of = lru_cache(lambda text: given if text == name else _values(_numbers(text)))

    wide = {"readout_format": ".4g", "style": {"description_width": "18px"}, "layout": {"width": "400px"}}
    controls = {
        "data": widgets.Text(name, description="data", continuous_update=False, style={"description_width": "34px"},
                             layout={"width": "480px"}),
        "scheme": widgets.ToggleButtons(options=[ABSMAX, ZERO_POINT, FREE], style={"button_width": "96px"}),
        "bits": bits_slider(bits),
        "alpha": FloatSlider(description="α", **wide, **_limits(given)),
        "beta": FloatSlider(description="β", **wide, **_limits(given)),
        "narrow": widgets.Checkbox(False, indent=False, layout={"width": "140px"}, **_narrow(ABSMAX)),
        "value": IntSlider(0, description="value", **_choice(given)),
    }
    for slider in (controls["bits"], controls["value"]):
        slider.style.description_width, slider.layout.width = "40px", "200px"
    controls["alpha"].value, controls["beta"].value = given.ends(ABSMAX)

    def compute(*, data, value, **choice):
        values = values_of(data)
        params = _grid(values, **choice)
        x, x_hat = values.x, fake_quantize(values.x, params)
        error = float(mse(x, x_hat))
        clipped = int(np.count_nonzero(_is_clipped((x - x_hat) / params.scale)))
        return Mapping(values, controls["alpha"].max, choice["alpha"], choice["beta"], params, error,
                       float(ratio_db(np.mean(np.square(x, dtype=np.float64)), error)), clipped,
                       x[value - 1] if value else None)

    def read(result):
        params, x = result.params, result.values.x
        numbers = {
            "scale": float(params.scale),
            "zero_point": int(params.zero_point),
            "qmin": params.qmin,
            "qmax": params.qmax,
            "mse": result.mse,
            "sqnr_db": result.sqnr_db,
            "clipped": f"{result.clipped:,} of {x.size:,}",
        }
        if x.size <= _MOST_CODES_LISTED:
            numbers["codes"] = " ".join(map(str, quantize(x, params).tolist()))
        if result.chosen is not None:
            numbers["line"] = " → ".join(_line(result.chosen, params))
        return numbers

    understood = {"data": name}  # the last text that was numbers
    dragged = {}  # the text that a hand on a value has made last: under it, the real line stays as it is

    def couple(name, state):
        try:
            values, scheme = values_of(state["data"]), state["scheme"]
        except ValueError:
            if name == "data":
                raise
            return understood | couple(name, state | understood)  # another control moves while the text is bad
        understood["data"] = state["data"]
        if name not in ("data", "scheme", "alpha", "beta"):
            return {}
        held = name == "data" and state["data"] == dragged.get("data")
        limits = {end: getattr(controls["alpha"], end) for end in ("min", "max", "step")} if held else _limits(values)
        ends = dict(zip(("alpha", "beta"), np.clip(values.ends(scheme), limits["min"], limits["max"]).tolist(),
                        strict=True))
        if name in ends:
            return {} if scheme != FREE and state[name] == ends[name] else {
                "scheme": FREE, "narrow": _narrow(FREE), name: _apart(name, state, limits)}
        if name == "data":
            known = scheme == FREE and controls["alpha"].max == limits["max"]
            choice = _choice(values)
            moved = {"value": {**choice, "value": min(state["value"], choice["max"])}}
            return moved if known else moved | {end: {**limits, "value": value} for end, value in ends.items()}
        stays = scheme == FREE and (values.low < values.high or state["alpha"] < state["beta"])
        return {"narrow": _narrow(scheme)} | ({} if stays else ends)

    def move_value(x, y, start):
        step, limit = controls["alpha"].step / 10, controls["alpha"].max
        numbers = values_of(start.values["data"]).x.tolist()
        numbers[start.mark] = min(limit, max(-limit, round(x / step) * step))
        dragged["data"] = ", ".join(f"{v:.6g}" for v in numbers)
        return dict(dragged)

    def values_in_reach(result):
        x = result.values.x
        return [(v, 1) for v in x.tolist()] if x.size <= _MOST_THREADS else []

    def move_end(name):
        return lambda x, y, start: {} if x == start.x else {name: x}  # a mere click does not leave the scheme

    figure, artists = _mapping_figure()
    return Explorer(
        figure, controls, compute, partial(_draw_mapping, artists), read, couple=couple,
        arrange=_arrange_mapping, hover=_value_under,
        handles=[
            Handle("a value", artists.above, values_in_reach, move_value),
            Handle("α", artists.below, lambda result: (result.alpha, None), move_end("alpha")),
            Handle("β", artists.below, lambda result: (result.beta, None), move_end("beta")),
        ],
        ghost=[artists.dots, artists.threads, artists.cut, artists.ends, artists.errors], main=("sqnr_db", "dB"),
        parts={"threads": [artists.threads, artists.cut, artists.landed], "errors": [artists.errors]},
        chips={label: lambda jump=jump, **_: jump for label, jump in DATA_CHIPS.items()},
        title="From values to codes",
        description="Above: the real line with the levels of the grid, the integer codes below it, and a thread from "
        "each value to its code, dashed where it is clipped. Below: the error of each value in steps of the grid; "
        "triangles mark clipped values, with their error in numbers; dashed lines are α and β.",
    )


def _arrange_mapping(controls, chips):
    rows = [("data",), ("scheme", "bits", "narrow", "value"), ("alpha", "beta")]
    parts = [[controls[name] for name in names] for names in rows]
    parts[0] += chips.values()
    return widgets.VBox([in_a_row(part) for part in parts])


def _numbers(text):
    words = text.translate(str.maketrans({**dict.fromkeys("[](),", " "), "−": "-"})).split()
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            raise ValueError(f"data must be numbers separated by commas or spaces, got {word!r}") from None
        if not np.isfinite(numbers[-1]):
            raise ValueError(f"data must be finite numbers, got {word!r}")
    if not numbers:
        raise ValueError(f"data must hold at least one number, got {text!r}")
    return numbers


def _values(x):
    x = np.asarray(real_array(x, "x")).ravel()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    peak = max(-low, high)
    if peak and not _PEAKS[0] <= peak <= _PEAKS[1]:
        raise ValueError(f"the largest |x| must be 0 or from {_PEAKS[0]:g} to {_PEAKS[1]:g}, got {peak:g}")
    ordered = np.sort(x)
    points, threads = (ordered[np.linspace(0, x.size - 1, min(x.size, most)).round().astype(int)]
                       for most in (_MOST_POINTS, _MOST_THREADS))
    return Values(x, low, high, 1.5 * peak or 1.0, points, threads)


def _limits(values):
    step = 10.0 ** np.floor(np.log10(values.limit / 100))
    steps = np.ceil(round(values.limit / step, 6))  # whole ones, so that the slider can stop at 0
    limit = float(f"{step * steps:.12g}")
    return {"min": -limit, "max": limit, "step": float(step)}


def _choice(values):
    """The slider that chooses a value: of so many that each has its thread."""
    few = values.x.size <= _MOST_THREADS
    return {"max": values.x.size if few else 0, "disabled": not few}


def _line(value, params):
    """Each step of a value's way to its level, and the error, in words."""
    rounded = float(np.rint(value / params.scale))
    z, code = int(params.zero_point), int(quantize(value, params))
    x_hat = float(dequantize(code, params))
    words = (f"x = {value:.6g}", f"x / s = {value / params.scale:.6g}", f"round {rounded:.15g}",
             f"+ z = {rounded + z:.15g}", f"clip: q = {code}", f"x̂ = {x_hat:.6g}",
             f"x − x̂ = {round(float((value - x_hat) / params.scale), 6) + 0:+.3g} steps")
    return [word.replace("-", "−") for word in words]


def _value_under(axes, x, y, result):
    points, params = result.values.points, result.params
    value = points[np.abs(points - x).argmin()]
    on_the_codes = axes.get_ylim()[1] == 1 and y < _LEVEL
    if on_the_codes or abs(value - x) > 0.02 * result.limit:
        return ""
    return "\n".join(_line(value, params))


def _apart(name, state, limits):
    """The value of an end that has been moved, a step from the other at least."""
    if name == "alpha":
        return max(limits["min"], min(state["alpha"], state["beta"] - limits["step"]))
    return min(limits["max"], max(state["beta"], state["alpha"] + limits["step"]))


def _narrow(scheme):
    always = scheme == ABSMAX
    return {"disabled": always, "description": "always narrow" if always else "narrow range"}


def _grid(values, *, scheme, bits, alpha, beta, narrow):
    ends = np.array((alpha, beta) if scheme == FREE else (values.low, values.high), values.x.dtype)
    if scheme == ABSMAX:
        return absmax_params(ends, bits)
    if scheme == ZERO_POINT and not ends.any():
        return zero_point_params(ends, bits)  # range_params refuses α = β
    return range_params(*ends, bits, narrow=narrow)


def _is_clipped(steps):
    """Whether an error, in steps, is more than rounding can make; a little more allows for floating point."""
    return np.abs(steps) > 0.501


def _mapping_figure():
    with new_figure() as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.45, 1])
        above.set(ylim=(-0.3, 1), yticks=[0, _LEVEL, 1], yticklabels=["code q", "level x̂", "value x"])
        above.spines[["left", "bottom"]].set_visible(False)
        above.spines["top"].set_visible(True)
        above.tick_params(axis="y", length=0)
        above.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
        above.xaxis.offsetText.set_visible(False)  # a power of ten stands at the lower axis
        across = above.get_yaxis_transform()
        ends = (1 - _CODE_WIDTH) / 2, (1 + _CODE_WIDTH) / 2
        above.plot(ends, [0, 0], color=BLACK, lw=1, transform=across, scalex=False)
        levels = moving(above, color=GREY, lw=1)
        threads = moving(above, color=BLUE, lw=1.6)
        cut = moving(above, color=VERMILION, lw=2, ls=(0, (3, 2)))
        dots = moving(above, "o", color=BLACK, ms=8, clip_on=False, zorder=5)
        chosen = moving(above, "o", mfc="none", mec=ORANGE, mew=3, ms=15, clip_on=False, in_layout=False)
        landed = moving(above, "s", color=BLACK, ms=6, clip_on=False)
        zero = moving(above, "D:", color=GREEN, ms=9, markevery=[2], clip_on=False)
        label = {"va": "top", "fontsize": 13, "animated": True}
        codes = [above.text(0, -0.05, "", ha="center", **label) for _ in range(2**_FEW_BITS)]
        zero_code = above.text(0, -0.2, "", ha="center", color="#006B4F", fontweight="bold", **label)

        below.set(ylim=(-0.8, 0.8), xlabel="value x (units of the data)", ylabel="error x − x̂\n(steps)")
        below.set_yticks([-0.5, 0, 0.5], ["−½", "0", "½"])
        below.axhline(0, color=BLACK, lw=0.8)
        for half in (-0.5, 0.5):
            below.axhline(half, color=BLACK, lw=1.2, ls=":")
        sawtooth = moving(below, color=GREY, lw=1)
        stems = moving(below, color=BLUE, lw=2)
        errors = moving(below, "o", color=BLUE, ms=6)
        over = moving(below, "^", color=VERMILION, ms=10, clip_on=False)
        under = moving(below, "v", color=VERMILION, ms=10, clip_on=False)
        off = [below.text(0, 0, "", va="center", fontsize=13, animated=True) for _ in range(_MOST_LISTED)]
        ends = moving(below, color=BLACK, lw=1.6, ls="--", transform=below.get_xaxis_transform())
        names = [below.text(0, 0.8, name, ha="center", va="bottom", animated=True) for name in "αβ"]
        drawn = figure.text(0.005, 0.012, "", fontsize=13)
        figure.legend(
            [Line2D([], [], color=BLUE, marker="o"), Line2D([], [], color=VERMILION, ls=(0, (3, 2)), marker="^", ms=9)],
            ["rounded", "clipped"], loc="lower right", ncols=2, frameon=False, borderaxespad=0.1,
        )
    return figure, SimpleNamespace(
        above=above, levels=levels, threads=threads, cut=cut, dots=dots, landed=landed, zero=zero, codes=codes,
        zero_code=zero_code, sawtooth=sawtooth, stems=stems, errors=errors, over=over, under=under, off=off,
        ends=ends, names=names, drawn=drawn, below=below, shown=None, chosen=chosen,
    )


def _draw_mapping(artists, result):
    values, params, limit = result.values, result.params, result.limit
    count = values.x.size if values.x.size > _MOST_THREADS else 0
    if (limit, count) != artists.shown:  # a new background
        artists.shown = limit, count
        artists.above.set_xlim(-limit, limit)
        few, many = values.threads.size, values.points.size
        artists.drawn.set_text(f"drawn of {count:,}: {few} above, {many} below" if count else "")
    artists.dots.set_data(values.threads, np.ones(values.threads.size))
    artists.chosen.set_data([[], []] if result.chosen is None else [[result.chosen], [1]])
    artists.ends.set_data(*paths([[result.alpha, result.beta]] * 2, [0, 1]))
    for text, end in zip(artists.names, (result.alpha, result.beta), strict=True):
        text.set_x(end)

    def place(q):
        """Where a code stands on the line of the codes, in units of the real line."""
        return _CODE_WIDTH * limit * (2 * (q - params.qmin) / (params.qmax - params.qmin) - 1)

    codes = np.arange(params.qmin, params.qmax + 1)
    levels, few = dequantize(codes, params), codes.size <= 2**_FEW_BITS
    joined = [levels, levels, place(codes)], [1, _LEVEL, 0]
    apart = [levels, levels, np.nan, place(codes), place(codes)], [1, _LEVEL, np.nan, 0.08, 0]
    artists.levels.set_data(*paths(*(joined if few else apart)))
    labels = codes.tolist() if few else [params.qmin, params.qmax]
    for artist, code in zip(artists.codes, labels, strict=False):
        artist.set(text=_signed(code), x=place(code), visible=True)
    for artist in artists.codes[len(labels):]:
        artist.set_visible(False)
    z = int(params.zero_point)
    artists.zero.set_data([0, 0, place(z)], [1, _LEVEL, 0])
    artists.zero_code.set(text=f"z = {_signed(z)}", x=place(z))

    x, x_hat, q = values.threads, fake_quantize(values.threads, params), place(quantize(values.threads, params))
    clipped = _is_clipped((x - x_hat) / params.scale)
    for line, some in ((artists.threads, ~clipped), (artists.cut, clipped)):
        line.set_data(*paths([x[some], x_hat[some], q[some]], [1, _LEVEL, 0]))
    artists.landed.set_data(q, np.zeros(q.size))

    half = params.scale / 2
    starts, stops = np.append(-limit, levels[1:] - half), np.append(levels[:-1] + half, limit)
    artists.sawtooth.set_data(*paths([starts, stops], [(starts - levels) / (2 * half), (stops - levels) / (2 * half)]))
    artists.sawtooth.set_visible(few)
    x = values.points
    steps = (x - fake_quantize(x, params)) / params.scale
    clipped = _is_clipped(steps)
    stems = ~clipped if x.size <= _MOST_THREADS else np.zeros(x.size, bool)
    artists.stems.set_data(*paths([x[stems], x[stems]], [0, steps[stems]]))
    artists.errors.set_data(x[~clipped], steps[~clipped])
    for line, some in ((artists.over, clipped & (steps > 0)), (artists.under, clipped & (steps < 0))):
        line.set_data(x[some], np.clip(steps[some], -_EDGE, _EDGE))
    labelled = _labelled(x, np.where(clipped, steps, 0), limit) if x.size <= _MOST_THREADS else []
    for text, i in zip_longest(artists.off, labelled):
        text.set_visible(i is not None)
        if i is not None:
            left = x[i] > 0.8 * limit or (steps[i] < 0 and x[i] > -0.8 * limit)  # away from α and β
            text.set(x=x[i] + (-0.018 if left else 0.018) * limit, y=np.copysign(_EDGE, steps[i]),
                     ha="right" if left else "left", text=_signed(f"{steps[i]:+.{int(abs(steps[i]) < 100)}f}"))


def _labelled(x, steps, limit):
    """Which clipped values have room for their error beside them; the farthest off come first."""
    chosen = []
    for i in np.argsort(-np.abs(steps), kind="stable").tolist():
        near = any(steps[i] * steps[j] > 0 and abs(x[i] - x[j]) < _LABEL_WIDTH * limit for j in chosen)
        if steps[i] and not near and len(chosen) < _MOST_LISTED:
            chosen.append(i)
    return chosen


def _signed(code):
    return str(code).replace("-", "−")


@dataclass(frozen=True)
class Granularity:
    """What `granularity` shows for one position of its controls."""

    size: int  # how many neighbours share a scale
    bits: int
    scheme: str
    scales: int
    bits_per_weight: float
    sqnr_db: float
    mse: float
    patches: np.ndarray  # RMS error of each patch of the picture, in steps of the per-tensor grid
    rows: np.ndarray  # and of each row
    curves: dict  # tensor, channel, group: bits per weight and SQNR in dB for 2 to 8 bits


def granularity(w, bits=4):
    """Explore what it gains, and costs, to give fewer weights a scale of their own.

    Left, the error of the quantized matrix as colours: RMS, the root of the mean square, over patches of 16 weights of
    a row (of one weight in narrow matrices, of several rows in tall ones). Middle, the RMS error of each row, and about
    what it would be with a scale of its own: rows with small weights suffer from the one with the largest. Both are in
    steps of the absmax grid of the whole tensor at the present bits, so that one range of colours serves all settings;
    the middle axis is the key to the colours. Right, the signal-to-noise ratio against what a weight costs, for 2 to 8
    bits. Under the pointer, left and middle, stand the numbers of the weights that share a scale there.

    Parameters
    ----------
    w : float array, shape (output channels, input channels), or the path of a ``.npy`` file
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``per`` ("tensor", "channel": one row, or "group": ``group_size`` neighbours of a row),
        ``group_size``, ``bits`` and ``scheme`` ("absmax" or "zero-point"). ``bits_per_weight`` counts 16 bits for
        each scale (float16) and, for zero-point, ``bits`` for each zero-point.

    Raises
    ------
    ValueError
        If ``w`` does not have two dimensions, is empty or has a NaN or infinity, its largest magnitude is not from
        1e-30 to 1e30 (so all zeros are refused), or ``bits`` is not from 2 to 8.

    References
    ----------
    Gholami et al. 2022, section III-E.

    Examples
    --------
    >>> rows = np.float32([[1], [4]]) * np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    >>> explorer = granularity(rows)
    >>> explorer.set(per="channel")
    >>> explorer.readout["scales"], explorer.readout["bits_per_weight"]
    (2, 4.25)
    """
    w = np.asarray(real_array(own_data(w, "w"), "w"))
    if w.ndim != 2:
        raise ValueError(f"w must have two dimensions (output channels, input channels), got shape {w.shape}")
    row_peaks = np.abs(w).max(axis=1)
    order = np.argsort(-row_peaks, kind="stable")
    w = w[order]
    peak = float(row_peaks.max())
    if not _PEAKS[0] <= peak <= _PEAKS[1]:
        raise ValueError(f"the largest |w| must be from {_PEAKS[0]:g} to {_PEAKS[1]:g}, got {peak:g}")
    power = np.mean(np.square(w, dtype=np.float64))

    @lru_cache
    def ends(size):
        """Smallest and largest of each run of ``size`` weights, shape (runs, 2)."""
        runs = w.reshape(-1, size)
        return np.stack([runs.min(axis=1), runs.max(axis=1)], axis=1)

    def quantized(size, bits, scheme):
        """The squared error of each weight if ``size`` neighbours share a scale."""
        params = (absmax_params if scheme == ABSMAX else zero_point_params)(ends(size), bits, axis=0)
        runs = w.reshape(-1, size)
        return np.square(runs - fake_quantize(runs, params), dtype=np.float64).reshape(w.shape)

    @lru_cache(maxsize=512)
    def bits_and_db(size, bits, scheme):
        bits_per_scale = 16 + (bits if scheme == ZERO_POINT else 0)
        error = quantized(size, bits, scheme).mean()
        return bits + bits_per_scale / size, float(ratio_db(power, error))

    def compute(*, per, group_size, bits, scheme):
        sizes = {"tensor": w.size, "channel": w.shape[1], "group": group_size}
        squares = quantized(sizes[per], bits, scheme)
        step = absmax_params(ends(w.size), bits).scale
        return Granularity(
            sizes[per], bits, scheme, w.size // sizes[per], *bits_and_db(sizes[per], bits, scheme),
            mse=float(squares.mean()), patches=np.sqrt(_patch_means(squares)) / step,
            rows=np.sqrt(squares.mean(axis=1)) / step,
            curves={per: np.transpose([bits_and_db(size, b, scheme) for b in BITS]) for per, size in sizes.items()},
        )

    def read(result):
        return {
            "scales": result.scales,
            "bits_per_weight": result.bits_per_weight,
            "mse": result.mse,
            "sqnr_db": result.sqnr_db,
            "memory_kb": result.bits_per_weight * w.size / 8000,
        }

    sizes = [size for size in GROUP_SIZES if size < w.shape[1] and w.shape[1] % size == 0] or [w.shape[1]]
    controls = {
        "per": widgets.ToggleButtons(options=list(_LOOKS), style={"button_width": "80px"}),
        "group_size": widgets.SelectionSlider(options=sizes, value=32 if 32 in sizes else sizes[0], disabled=True,
                                              description="group of", layout={"width": "260px"}),
        "bits": bits_slider(bits),
        "scheme": widgets.ToggleButtons(options=[ABSMAX, ZERO_POINT], style={"button_width": "96px"}),
    }

    def couple(name, state):
        return {"group_size": {"disabled": state["per"] != "group"}} if name == "per" else {}

    def hover(axes, x, y, result):
        row, column = int(np.clip(y, 0, w.shape[0] - 1)), int(np.clip(x, 0, w.shape[1] - 1))
        if axes is artists.right:
            return ""
        size = w.shape[1] if axes is artists.middle else min(result.size, w.shape[1])
        start = column // size * size if size < w.shape[1] else 0
        some = w[row, start:start + size]
        shares = ends(result.size)[(row * w.shape[1] + start) // result.size]
        params = (absmax_params if result.scheme == ABSMAX else zero_point_params)(shares, result.bits)
        rms = np.sqrt(np.mean(np.square(some - fake_quantize(some, params), dtype=np.float64)))
        where = f", inputs {start}–{start + size - 1}" if size < w.shape[1] else ""
        step = absmax_params(ends(w.size), result.bits).scale
        return (f"output channel {order[row]}{where}\n"
                f"largest |w| {np.abs(some).max():.4g}, scale {params.scale:.4g}\n"
                f"RMS error {rms / step:.3f} steps of the per-tensor grid")

    figure, artists = _granularity_figure(w, sizes[0])
    return Explorer(
        figure, controls, compute, partial(_draw_granularity, artists), read, couple=couple, hover=hover,
        ghost=[artists.error, artists.ring], main=("sqnr_db", "dB"), parts={"what a bit buys": [artists.right]},
        title=f"Scales for {w.shape[0]:,} × {w.shape[1]:,} weights",
        description="Left: a heat map of the error, output channels against input channels. Middle: the error of each "
        "output channel beside what a scale of its own would give. Right: signal-to-noise ratio against bits for each "
        "weight, scales included, one scale for the tensor, for each channel and for each group; a ring marks the "
        "present setting.",
    )


def _patch_means(squares):
    """Means over patches of a row, or of a few rows if there are more than the picture has pixels."""
    rows, columns = squares.shape
    tall, wide = -(-rows // _MOST_ROWS), GROUP_SIZES[0] if columns >= 8 * GROUP_SIZES[0] else 1
    for axis, size in enumerate((tall, wide)):
        starts = np.arange(0, squares.shape[axis], size)
        counts = np.diff(np.append(starts, squares.shape[axis]))
        squares = np.add.reduceat(squares, starts, axis) / np.expand_dims(counts, 1 - axis)
    return squares


def _granularity_figure(w, shortest):
    with new_figure() as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1.15])
        rows, columns = w.shape
        left.set(title="error of the weights", xlabel="input channel", ylabel="output channel, largest |w| first",
                 yticks=[])
        image = left.imshow(np.zeros((1, 1, 4), np.uint8), extent=(0, columns, rows, 0), aspect="auto",
                            interpolation="nearest", animated=True)
        middle.set(xlim=(0, _WORST), ylim=(rows, 0), yticks=[],
                   xlabel="RMS error √mean(e²), in steps of\nthe per-tensor grid; also the colours")
        own_scale = _UNIFORM * np.abs(w).max(axis=1) / np.abs(w).max()
        grey = middle.fill_betweenx(np.arange(rows) + 0.5, 0, own_scale, fc=(GREY, 0.4), ec=GREY, lw=1)
        error = middle.plot(own_scale, np.arange(rows) + 0.5, color=ORANGE, animated=True)[0]
        middle.legend([Line2D([], [], color=ORANGE), grey], ["now", "a scale per row"], loc="lower center", ncols=2,
                      bbox_to_anchor=(0.5, 1), frameon=False, handlelength=1.2, columnspacing=1)
        middle.tick_params(axis="x", length=0, pad=20)
        colors = middle.inset_axes([0, -0.05, 1, 0.04])
        colors.imshow(_COLORS[None], extent=(0, 1, 0, 1), aspect="auto")
        colors.set_axis_off()

        right.set(title="what a bit buys", xlim=(1.6, 8.6 + 24 / shortest), ylim=(0, 52), ylabel="SQNR (dB)",
                  xlabel="bits per weight\n(with scales)")
        curves = {unit: moving(right, marker=marker, ms=7, color=color) for unit, (color, marker) in _LOOKS.items()}
        right.legend([Line2D([], [], color=color, marker=marker) for color, marker in _LOOKS.values()], list(_LOOKS),
                     loc="upper left")
        ring = moving(right, "o", ms=17, mfc="none", mew=3, color=ORANGE)
    return figure, SimpleNamespace(middle=middle, right=right, image=image, error=error, curves=curves, ring=ring)


def _draw_granularity(artists, result):
    artists.image.set_data(_COLORS[np.minimum(result.patches * (255 / _WORST), 255).astype(np.uint8)])
    artists.error.set_xdata(result.rows)
    for unit, curve in artists.curves.items():
        curve.set_data(*result.curves[unit])
    artists.ring.set_data([result.bits_per_weight], [result.sqnr_db])
