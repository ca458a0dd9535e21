"""Lesson 05: what outliers in the activations of a language model do to a grid.

(As ``outliers.py`` this file would hide the figure's own name.)
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch
from mpl_toolkits.mplot3d import proj3d

from qlab.affine import fake_quantize, sqnr_db
from qlab.explorers.colors import BLACK, BLUE, GREY, ON_GREY, ORANGE
from qlab.explorers.parts import bits_slider, moving, paths
from qlab.explorers.places import (
    ErrorBars,
    channel_at,
    checked_places,
    error_under,
    group_size,
    place_control,
    place_params,
    token_errors,
)
from qlab.live import Explorer, FloatLogSlider, Handle, new_figure
from qlab.outliers import GRANULARITIES, fp8

KEEP, CLIP, ZERO, FLOAT = "keep", "clip", "zero", "in float"
INTEGER, FP8 = "integer", "FP8 E4M3"
_MOST_COLUMNS = 800  # of the heat map
_MOST_RIDGES = 200  # of the surface
_CODES = (matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, 256)) * 255).round().astype(np.uint8)
_WHITE, _IN_FLOAT = np.uint8([255, 255, 255, 255]), np.uint8([230, 159, 0, 255])


def landscape(places=None):
    """Look at activations as a surface over tokens and channels: the picture of the papers on outliers.

    On a logarithmic axis, unlike theirs: beside a massive activation, all else would be flat. Only what lies below
    three times the median is.

    Parameters
    ----------
    places : dict of (layer, site) to pair (x, w), optional
        As in `outliers`; only x is shown.

    Returns
    -------
    Explorer
        Control ``place``.

    Raises
    ------
    ValueError
        As `outliers`.

    References
    ----------
    Xiao et al. 2023, "SmoothQuant", figure 4; Sun et al. 2024, "Massive activations in large language models",
    figure 1.

    Examples
    --------
    >>> explorer = landscape()
    >>> explorer.readout["largest"], explorer.readout["at_channel"]
    (9.90625, 247)
    """
    places = checked_places(places)

    def compute(*, place):
        x = places[place][0].abs()
        tokens, channels = (np.arange(0, length, -(-length // _MOST_RIDGES)) for length in x.shape)
        largest, median = x.max().item(), x.median().item()
        floor = max(min(3 * median, largest / 10), 1e-6 * largest)
        heights = np.maximum.reduceat(np.maximum.reduceat(x.numpy(), tokens, axis=0), channels, axis=1)
        heights = np.log10(np.maximum(heights, floor))
        token, channel = divmod(int(x.argmax()), x.shape[1])
        return SimpleNamespace(x=x, tokens=[*tokens, x.shape[0]], channels=[*channels, x.shape[1]],
                               heights=np.pad(heights, (0, 1), "edge"),  # a surface even of a single row
                               floor=np.log10(floor), largest=largest, median=median, token=token, channel=channel)

    def read(result):
        return {"largest": result.largest, "at_token": result.token, "at_channel": result.channel,
                "median": result.median, "largest_to_median": result.largest / result.median}

    with new_figure(height=480) as figure:
        figure.set_layout_engine("none")  # before matplotlib 3.11.2 it leaves no room for axes in 3D
        axes = figure.add_axes((0.004, 0.067, 0.992, 0.924), projection="3d", computed_zorder=False)
        axes.set(xlabel="\nchannel", ylabel="\ntoken", zlabel="\n|x|, log")
        axes.view_init(elev=28, azim=-60)
        axes.set_box_aspect((2.4, 1.1, 0.9), zoom=1.35)
        figure.add_axes((0, 0, 1, 1)).set_axis_off()  # for the pointer: the surface reaches beyond its own axes

    surfaces = []

    def draw(result):
        for surface in surfaces:
            surface.remove()
        grid = np.meshgrid(result.channels, result.tokens)
        surfaces[:] = [axes.plot_surface(*grid, result.heights, cmap="viridis", rstride=1, cstride=1, linewidth=0,
                                         antialiased=False, clip_on=False)]
        top = np.log10(1.05 * result.largest)
        decades = np.arange(np.ceil(result.floor), top)
        steps = np.log10([1, 2, 5]) if top - result.floor < 2 else np.zeros(1)
        ticks = [tick for tick in np.add.outer(np.append(np.floor(result.floor), decades), steps).ravel()
                 if result.floor <= tick <= top]
        axes.set(xlim=(0, result.channels[-1]), ylim=(0, result.tokens[-1]), zlim=(result.floor, top))
        axes.set_zticks(ticks, [f"{10**tick:.4g}" for tick in ticks])

    def hover(over, x, y, result):
        if not (found := _vertex_at(axes, over.transData.transform((x, y)), result)):
            return ""
        token, channel = found
        column = result.x[:, channel]
        return (f"channel {channel}, token {token}: |x| = {result.x[token, channel].item():.4g}\n"
                f"largest in the channel: {column.max().item():.4g}, median {column.median().item():.3g}")

    return Explorer(
        figure, {"place": place_control(places)}, compute, draw, read, hover=hover,
        title="Activations as a surface",
        description="The magnitude of each activation as a height over tokens and channels, on a logarithmic axis. An "
        "outlier channel is a ridge that runs along all tokens; a massive activation is a single needle.",
        parts={"surface": figure.axes},
    )


def _vertex_at(axes, here, result):
    """Token and channel of what stands in front at a pixel, each part as a bar as high as the surface; or None."""
    columns, rows = (grid.ravel() for grid in np.meshgrid(result.channels[:-1], result.tokens[:-1]))
    heights = result.heights[:-1, :-1].ravel()
    *bases, _ = proj3d.proj_transform(columns, rows, np.full_like(heights, result.floor), axes.get_proj())
    *tops, depth = proj3d.proj_transform(columns, rows, heights, axes.get_proj())
    bases, tops = (axes.transData.transform(np.column_stack(ends)) for ends in (bases, tops))
    along = tops - bases
    share = np.clip(((here - bases) * along).sum(1) / np.maximum((along**2).sum(1), 1e-9), 0, 1)
    far = np.hypot(*(bases + share[:, None] * along - here).T)
    near = np.flatnonzero(far <= 0.0025 * axes.figure.bbox.width)
    if not near.size:
        return None
    row, column = divmod(int(near[np.argmin(np.asarray(depth)[near])]), len(result.channels) - 1)
    part = result.x[result.tokens[row]:result.tokens[row + 1], result.channels[column]:result.channels[column + 1]]
    token, channel = divmod(int(part.argmax()), part.shape[1])
    return result.tokens[row] + token, result.channels[column] + channel


@dataclass(frozen=True)
class Outliers:
    """What `outliers` shows for one position of its controls."""

    place: tuple
    granularity: str
    most_codes: int  # the largest |q − z|, or the number of positive values of FP8
    threshold: float | None
    codes: np.ndarray  # as a share of ``most_codes``, tokens × channels; 0 means that nothing is left
    in_float: np.ndarray  # bool for each channel
    apart: bool  # token 0 stays in float
    half_steps: tuple  # at 0, of each channel, least and most over the tokens; NaN where nothing but 0 is quantized
    sqnr_db: float
    output_error: dict  # granularity: ‖(x − x̂) Wᵀ‖ / ‖x Wᵀ‖ of each token in percent, mean and largest
    to_zero: float  # share of the other values that become 0
    touched: float  # share of the values clipped, zeroed or kept in float


def outliers(places=None, bits=8):
    """Explore what a few large activations do to all others, and what can be done with them.

    Above, the code of every activation, tokens × channels: white is code 0 (x̂ = 0), orange stays in float. Below, the
    largest and the typical |x| of each channel, and half a step of its grid at 0: what lies below becomes 0. Right, how
    wrong the layer's output is, for each granularity. The line of the threshold can be dragged.

    Parameters
    ----------
    places : dict of (layer, site) to pair (x, w), optional
        Float arrays or tensors: activations (tokens, channels), and rows (outputs, channels) of the weights that they
        meet. By default `qlab.samples.products`.
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``place``, ``granularity`` ("tensor", "token", "channel" or "group" of 64 channels of a token),
        ``number_format`` ("integer" or "FP8 E4M3"), ``bits`` of the integers, ``treatment`` of what reaches the
        threshold ("keep", "clip" it to the threshold, "zero" it, or leave its channel "in float", as LLM.int8() does),
        ``threshold``, in units of x, and ``without_token_0``, which goes ahead in float, so that neither the scales nor
        the errors know of it. The weights stay in float.

    Raises
    ------
    ValueError
        If ``places`` is empty, a matrix has not two dimensions, is empty or has a NaN or infinity, a pair does not fit
        together, or ``bits`` is not from 2 to 8.

    References
    ----------
    Dettmers et al. 2022, "LLM.int8()", section 3; Xiao et al. 2023, "SmoothQuant", section 3.

    Examples
    --------
    >>> explorer = outliers()
    >>> round(explorer.readout["output_error_percent"], 1)
    4.7
    >>> explorer.set(granularity="token")
    """
    places = checked_places(places)
    outputs = {place: x @ w.T for place, (x, w) in places.items()}

    def treated(x, treatment, threshold):
        """What goes to the quantizer, and where the treatment acts."""
        large = x.abs() >= threshold
        if treatment == CLIP:
            return x.clamp(-threshold, threshold), large
        if treatment == ZERO:
            return x.masked_fill(large, 0), large
        if treatment == FLOAT:
            columns = large.any(0).expand_as(x)
            return x.masked_fill(columns, 0), columns
        return x, torch.zeros_like(large)

    def compute(*, place, granularity, number_format, bits, treatment, threshold, without_token_0):
        (x, w), output = places[place], outputs[place]
        small, touched = treated(x, treatment, threshold)
        ahead = torch.zeros_like(touched)
        ahead[0] = without_token_0
        in_float = ahead | touched if treatment == FLOAT else ahead
        small, touched = small.masked_fill(ahead, 0), touched | ahead
        counted = output.any(1) & ~ahead[:, 0]
        error = {}
        for each in GRANULARITIES:
            quantized, finest = _quantized(small, each, number_format, bits)
            x_hat = torch.where(in_float, x, quantized)
            error[each] = token_errors(x_hat @ w.T, output, counted)
            if each == granularity:
                chosen, codes, steps = x_hat, _codes(quantized, finest, number_format), finest.expand_as(x)
        rows = slice(1 if without_token_0 and len(x) > 1 else 0, None)
        half = [torch.where(small.any(0), ends / 2, torch.nan).numpy()
                for ends in (steps[rows].amin(0), steps[rows].amax(0))]
        columns = in_float.all(0) if treatment == FLOAT else torch.zeros(x.shape[1], dtype=torch.bool)
        ordinary = (x != 0) & ~touched
        most = 126 if number_format == FP8 else 2**bits - 1
        return Outliers(
            place, granularity, most, None if treatment == KEEP else threshold,
            codes=(codes / most).numpy(), in_float=columns.numpy(), apart=without_token_0,
            half_steps=tuple(half), sqnr_db=float(sqnr_db(x[~ahead], chosen[~ahead])) if not ahead.all() else np.inf,
            output_error=error, to_zero=float((chosen[ordinary] == 0).double().mean()) if ordinary.any() else 0.0,
            touched=float(touched.double().mean()),
        )

    def read(result):
        return {
            "output_error_percent": result.output_error[result.granularity][0],
            "worst_token_percent": result.output_error[result.granularity][1],
            "sqnr_db": result.sqnr_db,
            "others_to_zero_percent": 100 * result.to_zero,
            "treated_percent": 100 * result.touched,
            "scale_leaves_the_sum": {"channel": "no", "group": "of each group's part"}.get(result.granularity, "yes"),
        }

    controls = {
        "place": place_control(places),
        "granularity": widgets.ToggleButtons(options=list(GRANULARITIES), style={"button_width": "72px"}),
        "number_format": widgets.ToggleButtons(options=[INTEGER, FP8], style={"button_width": "90px"}),
        "bits": bits_slider(bits),
        "treatment": widgets.ToggleButtons(options=[KEEP, CLIP, ZERO, FLOAT], style={"button_width": "72px"}),
        "threshold": FloatLogSlider(6, base=2, min=-2, max=12, step=0.125, description="at |x| ≥", disabled=True,
                                    readout_format=".2f", layout={"width": "370px"},
                                    style={"description_width": "60px"}),
        "without_token_0": widgets.Checkbox(False, description="without token 0", indent=False,
                                            layout={"width": "150px"}),
    }

    def couple(name, state):
        if name == "number_format":
            return {"bits": {"disabled": state["number_format"] == FP8}}
        return {"threshold": {"disabled": state["treatment"] == KEEP}} if name == "treatment" else {}

    def at_threshold(result):
        return [(None, result.threshold)] if result.threshold is not None else []

    figure, artists = _outliers_figure()
    return Explorer(
        figure, controls, compute, partial(_draw_outliers, artists, places), read, couple=couple,
        handles=[Handle("the threshold", artists.profile, at_threshold, lambda x, y, start: {"threshold": y})],
        hover=partial(_under_the_pointer, places), main=("output_error_percent", "%"),
        ghost=[artists.threshold, artists.least, artists.most, *artists.errors.lines],
        title="Outliers in the activations of a language model",
        description="Above, a heat map of the codes, tokens against channels; white cells hold code 0, orange columns, "
        "marked by triangles, stay in float, and so does an orange token 0. Below, the largest and the typical "
        "magnitude of each channel on a logarithmic axis, with half a step of its grid at 0: smaller values become 0. "
        "Right, bars with the error of the layer's output for one scale per tensor, token, channel and group.",
        parts={"codes": [artists.image], "half a step": [artists.least, artists.most]},
    )


def _quantized(x, granularity, number_format, bits):
    """x̂, and the step of each value at 0, which broadcasts."""
    if number_format == FP8:
        x_hat, scale = fp8(x, granularity, group_size=group_size(x))
        return x_hat, scale * 2.0**-9  # its smallest number above 0
    params = place_params(x, granularity, bits)
    scale = {"tensor": lambda s: s.expand(1, 1), "token": lambda s: s[:, None], "channel": lambda s: s[None],
             "group": lambda s: s.repeat_interleave(group_size(x), 1)}[granularity](params.scale)
    return fake_quantize(x, params), scale


def _codes(x_hat, steps, number_format):
    """How many numbers of the grid lie from 0 to each value."""
    codes = (x_hat / steps).abs().round()
    if number_format == FP8:  # up to 16 one by one, then every second, then every fourth, …: 8 in each power of two
        halvings = (torch.frexp(codes).exponent - 4).clamp(min=0)
        return codes / 2.0**halvings + 8 * halvings
    return codes


def _under_the_pointer(places, axes, x, y, result):
    sizes = places[result.place][0].abs().numpy()
    heat, _, profile = axes.figure.axes
    if axes not in (heat, profile):
        return f"one scale per {error_under(y, result.output_error)}"
    if axes is heat:
        token = int(np.clip(y, 0, len(sizes) - 1))
        channel = channel_at(axes, x, sizes[token])
        code = f"code {round(float(result.codes[token, channel]) * result.most_codes)} of {result.most_codes}"
        code = "in float" if result.in_float[channel] or (result.apart and token == 0) else code
        return f"channel {channel}, token {token}\n|x| = {sizes[token, channel]:.4g}, {code}"
    channel = channel_at(axes, x, sizes.max(0))
    least, most = (half[channel] for half in result.half_steps)
    half = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    grid = "in float" if result.in_float[channel] else f"half a step at 0: {half}" if most > 0 else "nothing but 0"
    column = sizes[:, channel]
    return f"channel {channel}\nlargest |x|: {column.max():.4g}, median {np.median(column):.3g}\n{grid}"


def _outliers_figure():
    with new_figure(height=480) as figure:
        axes = figure.subplot_mosaic("AC;BC", height_ratios=[1, 1.15], width_ratios=[2.7, 1])
        heat, profile, bars = axes["A"], axes["B"], axes["C"]
        heat.set(ylabel="token", title="codes |q − z| (white: 0, orange: in float)", xticks=[])
        image = heat.imshow(np.zeros((1, 1, 4), np.uint8), aspect="auto", interpolation="nearest", animated=True)
        in_float = moving(heat, "v", ms=7, color=BLACK, clip_on=False, transform=heat.get_xaxis_transform(),
                          in_layout=False)
        profile.set(xlabel="channel", ylabel="|x|", yscale="log")
        peaks = profile.plot([], [], color=GREY, lw=1, label="largest in channel")[0]
        typical = profile.plot([], [], ".", ms=3, color=BLACK, label="typical (median)")[0]
        least = moving(profile, color=BLUE, lw=1.6, label="half a step at 0", **ON_GREY)
        most = moving(profile, color=BLUE, lw=1.6, **ON_GREY)
        threshold = profile.axhline(1, color=ORANGE, ls="--", animated=True, label="threshold")
        profile.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, handlelength=1.2,
                       columnspacing=1, fontsize=12)
        errors = ErrorBars(bars, GRANULARITIES, width=20, top=-0.6)
        bars.set_yticks(range(len(GRANULARITIES)), GRANULARITIES)
        bars.tick_params(axis="y", length=0)
    return figure, SimpleNamespace(place=None, heat=heat, image=image, in_float=in_float, profile=profile, peaks=peaks,
                                   typical=typical, least=least, most=most, threshold=threshold, errors=errors)


def _draw_outliers(artists, places, result):
    x = places[result.place][0]
    tokens, channels = x.shape
    if result.place != artists.place:  # a new background
        artists.place = result.place
        sizes = x.abs().numpy()
        peaks, typical = sizes.max(0), np.median(sizes, axis=0)
        columns = np.arange(channels) + 0.5
        low = max(np.median(typical) / 30, peaks.max() * 1e-6)
        artists.peaks.set_data(*paths([columns, columns], [np.full(channels, low), peaks]))
        artists.typical.set_data(columns, typical)
        artists.profile.set(xlim=(0, channels), ylim=(low, 3 * peaks.max()))
        artists.image.set_extent((0, channels, tokens, 0))
        artists.heat.set(xlim=(0, channels), ylim=(tokens, 0))
    artists.image.set_data(_heat_map(result))
    columns = np.flatnonzero(result.in_float)
    artists.in_float.set_data(columns + 0.5, np.ones(columns.size))
    starts = np.arange(channels + 1).repeat(2)[1:-1]
    for line, half in zip((artists.least, artists.most), result.half_steps, strict=True):
        line.set_data(starts, np.repeat(half, 2))
    artists.threshold.set_visible(result.threshold is not None)
    if result.threshold is not None:
        artists.threshold.set_ydata([result.threshold] * 2)
    artists.errors.draw(result.output_error, result.granularity)


def _heat_map(result):
    """Colours of the codes; of neighbouring channels that share a pixel, the largest code."""
    pool = -(-result.codes.shape[1] // _MOST_COLUMNS)
    starts = np.arange(0, result.codes.shape[1], pool)
    codes = np.maximum.reduceat(result.codes, starts, axis=1)
    in_float = np.logical_or.reduceat(result.in_float, starts)
    shade = np.log1p(255 * codes) / np.log(256)  # so that small codes can be told from each other
    colors = _CODES[np.clip(255 * shade, 0, 255).astype(np.uint8)]
    colors[codes == 0] = _WHITE
    colors[:, in_float] = _IN_FLOAT
    if result.apart:
        colors[0] = _IN_FLOAT
    return colors
