"""Lesson 09: which levels a block of values gets, and what formats cost and give."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
from matplotlib.lines import Line2D

from qlab.affine import absmax_params, fake_quantize, numpy_array, zero_point_params
from qlab.blocks import E8M0, FORMATS, dequantize, quantize
from qlab.explorers.colors import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from qlab.explorers.parts import moving, paths, ratio_db
from qlab.live import Explorer, FloatSlider, Handle, IntSlider, new_figure

RULES = ("floor", "ceil", "even")
SIZES = (16, 32, 64, 128)
_BY_NAME = {fmt.name: fmt for fmt in FORMATS}
_GROUPS = {"int4 absmax": (absmax_params, 32, 16), "int4 zero-point": (zero_point_params, 64, 20)}  # bits beside codes
NAMES = (*_BY_NAME, *_GROUPS)
_LOOKS = {  # NVFP4 and NF4 are close: one is seen through the other
    "MX": {"marker": "o", "ms": 8, "color": BLUE, "ls": ""},
    "NVFP4": {"marker": "D", "ms": 6, "color": GREEN, "ls": ""},
    "NF4": {"marker": "s", "ms": 11, "color": PURPLE, "mfc": "none", "mew": 2, "ls": ""},
    "Q": {"marker": "^", "ms": 8, "color": SKY, "ls": ""},
    "int4": {"marker": "v", "ms": 8, "color": GREY, "ls": ""},
}
_PEAKS = 1e-3, 6e4  # of |x|: FP16 holds the scales
_PLACES = 32  # blocks to choose from
_LOSSLESS = 60  # dB: nothing but a format that the data come from gives more; it stands at the edge
_REACH = 1.35  # of the picture, in units of the block's largest magnitude
_MOST_ERROR = 0.27  # in the same units: what saturation makes of the largest value of MXFP4
_BINS = np.linspace(-_REACH, _REACH, 55)


@dataclass(frozen=True)
class Stored:
    """A tensor in one of the formats; the scales of all blocks, one after the other."""

    bits: float  # per value
    db: float
    x_hat: np.ndarray  # shape (blocks, block)
    codes: np.ndarray
    scales: np.ndarray
    levels: object  # function of the number of a block: what each code stands for there


@dataclass(frozen=True)
class Codebooks:
    """What `codebooks` shows for one position of its controls. Lengths are in units of the block's largest |x|."""

    format: str
    bits: float
    sqnr_db: float
    block_db: float
    peak: float  # largest |x| of the block, in units of the data
    scale: float
    values: np.ndarray
    errors: np.ndarray
    levels: np.ndarray
    value: float  # in the hand
    level: float
    code: str
    byte: str
    points: dict  # of each format in its own block: bits per value, dB


def codebooks(x, format="MXFP4"):
    """Explore the levels that a format gives to a block of values, and what it costs.

    Left, the histogram of a block and the levels that its scale leaves; below, the error of each of its values. Right,
    the signal-to-noise ratio of the whole tensor against bits per value: each format with its own block, and a ring for
    the present setting; below, the formats of about 4 bits once more, larger. Data that were stored in a format before
    come back from it without error: its point stands at the upper edge. A value can be taken in the picture: it is
    stored with the block's scale, in the place of the block's first value.

    Parameters
    ----------
    x : float array, shape (..., n), or dict of str to such arrays
        n a multiple of 64. Of a dict one is shown at a time.
    format : str
        To start with: a name of `qlab.blocks.FORMATS`, "int4 absmax" or "int4 zero-point" (integers with a scale in
        FP16, and a zero-point in 4 bits, for each group).

    Returns
    -------
    Explorer
        Controls ``data`` (a name of the dict), ``format``, ``size`` (of a block: "own", that of the format, or 16 to
        128), ``rule`` ("floor", "ceil" or "even", of the scales in powers of two), ``block`` (32 of them, from first
        to last) and ``value`` (in units of the block's largest magnitude). ``byte`` is the one that holds the value's
        code, as GGUF or bitsandbytes (NF4) has it.

    Raises
    ------
    ValueError
        If an array is empty, has a NaN or infinity, its last axis is no multiple of 64 or its largest magnitude not
        from 1e-3 to 6e4, or there is no such format.

    References
    ----------
    As `qlab.blocks.BlockFormat`.

    Examples
    --------
    >>> explorer = codebooks(np.random.default_rng(0).standard_normal((64, 256)), format="NVFP4")
    >>> explorer.readout["bits_per_value"], round(explorer.readout["sqnr_db"], 1)
    (4.5, 20.5)
    """
    arrays = {name: _checked(a, name) for name, a in (x if isinstance(x, Mapping) else {"x": x}).items()}
    if not arrays:
        raise ValueError("x must hold at least one array, got none")
    if format not in NAMES:
        raise ValueError(f"format must be one of {', '.join(NAMES)}, got {format!r}")

    @lru_cache(maxsize=16)
    def stored(data, name, size, rule):
        return _stored(arrays[data], name, size, rule)

    @lru_cache
    def points(data):
        every = {name: _stored(arrays[data], name, _own_size(name), "floor") for name in NAMES}
        return {name: (some.bits, some.db) for name, some in every.items()}

    sizes = ["own", *(size for size in SIZES if all(a.shape[-1] % size == 0 for a in arrays.values()))]
    controls = {
        "data": widgets.Dropdown(options=list(arrays), description="data", layout={"width": "250px"},
                                 style={"description_width": "40px"}),
        "format": widgets.Dropdown(options=NAMES, value=format, description="format", layout={"width": "230px"},
                                   style={"description_width": "55px"}),
        "size": widgets.SelectionSlider(options=sizes, description="block of",
                                        layout={"width": "260px"}),
        "rule": widgets.ToggleButtons(options=RULES, style={"button_width": "64px"}, **_ruled(format)),
        "block": IntSlider(0, min=0, max=_PLACES - 1, description="which", layout={"width": "300px"}),
        "value": FloatSlider(0.4, min=-_REACH, max=_REACH, step=0.01, description="value", layout={"width": "300px"}),
    }
    if len(arrays) == 1:
        controls["data"].layout.display = "none"

    def compute(*, data, format, size, rule, block, value):
        size = _own_size(format) if size == "own" else size
        now = stored(data, format, size, rule)
        blocks = arrays[data].reshape(-1, size)
        i = block * len(blocks) // _PLACES
        values, peak = blocks[i], float(np.abs(blocks[i]).max()) or 1.0
        levels = np.asarray(now.levels(i), np.float64)
        code = int(np.nanargmin(np.abs(levels - value * peak)))
        errors = values.astype(np.float64) - now.x_hat[i]
        return Codebooks(
            format, now.bits, now.db, float(ratio_db(np.square(values, dtype=np.float64).sum(), np.sum(errors**2))),
            peak, float(now.scales[i]), values / peak, errors / peak, levels[np.isfinite(levels)] / peak, value,
            float(levels[code]) / peak, *_spelled(code, now.codes[i], format), points(data),
        )

    def read(result):
        return {
            "bits_per_value": result.bits,
            "sqnr_db": result.sqnr_db,
            "block_db": result.block_db,
            "scale": result.scale,
            "value": result.value * result.peak,
            "code": result.code,
            "level": result.level * result.peak,
            "error": (result.value - result.level) * result.peak,
            "byte": result.byte,
        }

    def couple(name, state):
        return {"rule": _ruled(state["format"])} if name == "format" else {}

    def hover(axes, x, y, result):
        if axes not in artists.panels:
            return ""
        width, height, top = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim()), axes.get_ylim()[1]
        far = {name: np.hypot((bits - x) / width, (min(db, top) - y) / height)
               for name, (bits, db) in result.points.items() if db < top or db >= _LOSSLESS}
        name = min(far, key=far.get)
        bits, db = result.points[name]
        return f"{name}, blocks of {_own_size(name)}\n{bits:.4g} bits, {db:.1f} dB" if far[name] < 0.03 else ""

    figure, artists = _codebooks_figure([db for data in arrays for _, db in points(data).values()])
    return Explorer(
        figure, controls, compute, partial(_draw, artists), read, couple=couple, hover=hover,
        handles=[Handle("the value", artists.above, lambda result: (result.value, None),
                        lambda x, y, start: {"value": x})],
        ghost=[artists.levels, artists.errors, *artists.rings], main=("sqnr_db", "dB"),
        parts={"formats": artists.panels},
        title="Levels for a block",
        description="Left above: the histogram of the values of a block, with a line for each level that its format "
        "and scale give it; a value in the hand and the level that it goes to. Left below: the error of each value. "
        "Right: signal-to-noise ratio against bits per value of all formats; a ring marks the present setting.",
    )


def _checked(x, name):
    x = numpy_array(x, name).astype(np.float32)
    peak = float(np.abs(x).max())
    if x.ndim == 0 or x.shape[-1] % 64:
        raise ValueError(f"the last axis of {name} must be a multiple of 64, got shape {x.shape}")
    if not _PEAKS[0] <= peak <= _PEAKS[1]:
        raise ValueError(f"the largest magnitude of {name} must be from {_PEAKS[0]:g} to {_PEAKS[1]:g}, got {peak:g}")
    return x


def _own_size(name):
    return _GROUPS[name][1] if name in _GROUPS else _BY_NAME[name].block


def _ruled(name):
    return {"disabled": name in _GROUPS or _BY_NAME[name].scale != E8M0}


def _stored(x, name, size, rule):
    if name in _GROUPS:
        find, _, beside = _GROUPS[name]
        groups = x.reshape(-1, size)
        params = find(groups, 4, axis=None, group_size=size)
        x_hat, scales, bits = fake_quantize(groups, params), params.scale[:, 0], 4 + beside / size
        zeros, every = params.zero_point[:, 0], np.arange(params.qmin, params.qmax + 1)
        codes = np.rint(x_hat / scales[:, None]).astype(int) + zeros[:, None]

        def levels(i):
            return np.roll(np.r_[[np.nan] * (16 - every.size), scales[i] * (every - zeros[i])], 8)  # two's complement
    else:
        fmt = replace(_BY_NAME[name], block=size)
        fmt = replace(fmt, rule=rule) if fmt.scale == E8M0 else fmt
        blocks = quantize(x, fmt)
        x_hat, bits, codes = dequantize(blocks).reshape(-1, size), fmt.bits_per_value, blocks.codes
        scales = blocks.scales.ravel() * (1 if blocks.tensor_scale is None else blocks.tensor_scale)
        minima = np.zeros_like(scales) if blocks.minima is None else blocks.minima.ravel()

        def levels(i):
            return fmt.levels * scales[i] + minima[i]
    error = np.square(x.reshape(-1, size) - x_hat, dtype=np.float64).mean()
    db = float(ratio_db(np.mean(np.square(x, dtype=np.float64)), error))
    return Stored(bits, db, x_hat, codes.reshape(-1, size), scales, levels)


def _spelled(code, codes, name):
    """The bits of a code that is the first of its block, and the byte that it stands in."""
    bits = 4 if name in _GROUPS else _BY_NAME[name].element_bits
    spelled = f"{code} = {code:0{bits}b}₂"
    if bits == 8:
        return spelled, f"0x{code:02X}"
    if name == "NF4":
        return spelled, f"0x{code << 4 | int(codes[1]):02X}"
    if bits == 4 and name not in _GROUPS:
        return spelled, f"0x{int(codes[codes.size // 2]) << 4 | code:02X}"
    return spelled, "no common layout"


def _codebooks_figure(decibels):
    decibels = np.array([db for db in decibels if db < _LOSSLESS])
    with new_figure() as figure:
        left, right = figure.add_gridspec(1, 2, width_ratios=[1.45, 1])
        left, right = left.subgridspec(2, 1, height_ratios=[1.6, 1]), right.subgridspec(2, 1, height_ratios=[1, 1])
        above = figure.add_subplot(left[0])
        below = figure.add_subplot(left[1], sharex=above)
        panels = all_of_them, small = [figure.add_subplot(part) for part in right]
        above.set(xlim=(-_REACH, _REACH), ylim=(0, 1.08), yticks=[], title="values of a block, and their levels")
        above.tick_params(axis="x", labelbottom=False)
        bars = above.stairs(np.zeros(_BINS.size - 1), _BINS, fill=True, color=SKY, animated=True)
        levels = moving(above, color=BLACK)
        hand = moving(above, color=VERMILION, lw=2.5)
        goes = moving(above, color=VERMILION, lw=0, marker="D", ms=9)
        below.set(ylim=(-_MOST_ERROR, _MOST_ERROR), xlabel="value / largest |x| of the block",
                  ylabel="error /\nlargest |x|")
        below.axhline(0, color=BLACK, lw=0.8)
        errors = moving(below, "o", color=BLUE, ms=6)
        here = moving(below, "v", color=VERMILION, ms=11, clip_on=False)

        all_of_them.set(xlim=(3.9, 9.2), ylabel="SQNR (dB)", title=" ",
                        ylim=(np.floor(decibels.min() - 3), np.ceil(decibels.max() + 5)))
        few = np.sort(decibels)[:len(decibels) * 7 // len(NAMES)]
        small.set(xlim=(4.15, 5.9), xlabel="bits per value (with scales)", ylabel="SQNR (dB)",
                  xticks=[4.25, 4.5, 5, 5.5], ylim=(np.floor(few.min() - 1), np.ceil(few.max() + 1)))
        dots = {name: [moving(axes, clip_on=False, **look) for axes in panels] for name, look in _LOOKS.items()}
        small.legend([Line2D([], [], **look) for look in _LOOKS.values()],
                     ["MX", "NVFP4", "NF4", "Q4, Q8", "int4 groups"], loc="center right", handletextpad=0.1)
        rings = [moving(axes, "o", ms=17, mfc="none", mew=3, color=ORANGE, clip_on=axes is small) for axes in panels]
        label = all_of_them.text(0.5, 1.04, "", fontweight="bold", ha="center", animated=True,
                                 transform=all_of_them.transAxes)
    return figure, SimpleNamespace(above=above, panels=panels, bars=bars, levels=levels, hand=hand, goes=goes,
                                   errors=errors, here=here, dots=dots, rings=rings, label=label)


def _draw(artists, result):
    counts = np.histogram(result.values, _BINS)[0]
    artists.bars.set_data(counts / max(counts.max(), 1))
    artists.levels.set_data(*paths([result.levels, result.levels], [0, 1]))
    artists.levels.set_linewidth(1.6 if result.levels.size <= 16 else 0.4)
    artists.hand.set_data([result.value] * 2, [0, 1.08])
    artists.goes.set_data([result.level], [1.0])
    artists.errors.set_data(result.values, result.errors)
    artists.here.set_data([result.value], [np.clip(result.value - result.level, -_MOST_ERROR, _MOST_ERROR)])
    for i, axes in enumerate(artists.panels):
        inside = axes.get_xlim()[1], axes.get_ylim()[1]
        for look, dots in artists.dots.items():
            some = [point for name, point in result.points.items() if name.startswith(look) and point[0] < inside[0]]
            some = [(bits, min(db, inside[1])) for bits, db in some if db < inside[1] or db >= _LOSSLESS]
            dots[i].set_data(*(zip(*some, strict=True) if some else ([], [])))
        artists.rings[i].set_data([result.bits], [min(result.sqnr_db, inside[1])])
    artists.label.set_text(f"{result.format}: {result.sqnr_db:.1f} dB")
