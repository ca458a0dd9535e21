"""Lesson 07: what a rotation in front of the quantizer does to outliers, and how one is learned."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import torch

from qlab import samples
from qlab.affine import QParams, absmax_params, dequantize, fake_quantize
from qlab.explorers.colors import BLACK, BLUE, GREEN, GREY, ON_GREY, ORANGE, VERMILION
from qlab.explorers.parts import bits_slider, moving, paths
from qlab.explorers.places import ErrorBars, channel_at, checked_places, error_under, place_control, token_errors
from qlab.explorers.watching import Watching
from qlab.live import Explorer, FloatSlider, Handle, IntSlider, new_figure
from qlab.outliers import kurtosis, params_of
from qlab.spinquant import fast_hadamard, random_hadamard, random_orthogonal

NO_AXIS, ONE_AXIS, DIAGONAL = "none", "on one axis", "diagonal"
NONE, FOLDED = "none", "gains folded"
HADAMARD, RANDOM_HADAMARD, RANDOM_ORTHOGONAL = "Hadamard", "random Hadamard", "random orthogonal"
BUILT_IN = (NONE, FOLDED, HADAMARD, RANDOM_HADAMARD, RANDOM_ORTHOGONAL)
WEIGHTS = {"float": None, "8 bits": 8, "4 bits": 4}
_ANGLES = np.arange(91.0)  # degrees
_LONG, _SHORT = 5.0, 1.0  # standard deviations along the outlier axis and across
_MOST_LINES = 64  # of a grid in each direction: more would be a grey area
_RATIOS = (0.5, 0.7, 1, 1.4, 2)
_HEAD = 64  # channels of a head, which is what R2 turns
_GROUP = 32
_HELD_OUT = ("held_out", "output_error_percent")


@dataclass(frozen=True)
class Rotation2d:
    """What `rotation_2d` shows for one position of its controls."""

    theta: float
    x: np.ndarray  # the cloud, tokens × 2
    r: np.ndarray
    params: QParams  # of x R
    error: float  # ‖x R − Q(x R)‖ / ‖x‖ in percent
    kurtosis: float
    without: float  # the error at θ = 0
    curves: tuple  # error, max |x R| and kurtosis at each angle, as multiples of what they are at θ = 0


def rotation_2d():
    """Explore in two dimensions how a rotation in front of the quantizer changes its error.

    Left, tokens of two channels in the rotated coordinates, x R, with the levels of one absmax grid for both channels
    (up to 6 bits) and the square |x R| ≤ max. Middle, the same tokens and levels turned back by Rᵀ: the tokens are
    where they were, and the grid stands at an angle. Right, the error, max |x R| and the kurtosis at all angles, as
    multiples of what they are without rotation ("curves", for a veil). The cloud on the left, the grid in the
    middle and the line on the right are turned and moved by hand.

    Returns
    -------
    Explorer
        Controls ``theta`` (degrees), ``bits`` and ``outlier``: "none" (as wide in all directions), "on one axis" (five
        times as wide along the first channel as along the second) or "diagonal" (the same cloud turned by 45°). All
        clouds have the same mean square. The chip "best θ" goes to the whole degree with the least error.

    References
    ----------
    Liu et al. 2025, "SpinQuant: LLM quantization with learned rotations", section 2.

    Examples
    --------
    >>> explorer = rotation_2d()
    >>> round(explorer.readout["error_percent"], 1)
    17.1
    >>> explorer.set(theta=45)
    >>> round(explorer.readout["error_percent"], 1)
    12.8
    """
    clouds = _clouds()

    @lru_cache
    def curves(outlier, bits):
        turned = np.stack([(clouds[outlier] @ _turn(theta)).ravel() for theta in _ANGLES])
        x_hat = fake_quantize(turned, absmax_params(turned, bits, axis=0))
        error = np.linalg.norm(turned - x_hat, axis=1)
        largest = np.abs(turned).max(1)
        tails = np.array([kurtosis(row) for row in turned])
        return tuple(curve / curve[0] for curve in (error, largest, tails))

    def error_percent(x, params):
        return float(100 * np.linalg.norm(x - fake_quantize(x, params)) / np.linalg.norm(x))

    def compute(*, theta, bits, outlier):
        x, r = clouds[outlier], _turn(theta)
        params = absmax_params(x @ r, bits)
        return Rotation2d(theta, x, r, params, error_percent(x @ r, params), kurtosis(x @ r),
                          error_percent(x, absmax_params(x, bits)), curves(outlier, bits))

    def read(result):
        return {"theta": result.theta, "max": float(np.abs(result.x @ result.r).max()), "kurtosis": result.kurtosis,
                "error_percent": result.error, "without_rotation_percent": result.without}

    def best(*, bits, outlier, **_):
        return {"theta": float(_ANGLES[curves(outlier, bits)[0].argmin()])}

    controls = {
        "theta": FloatSlider(0, min=0, max=90, step=1, description="θ (degrees)", readout_format=".0f",
                             layout={"width": "380px"}, style={"description_width": "90px"}),
        "bits": bits_slider(4),
        "outlier": widgets.ToggleButtons(options=[NO_AXIS, ONE_AXIS, DIAGONAL], value=ONE_AXIS,
                                         style={"button_width": "96px"}),
    }
    figure, artists = _figure_2d(1.12 * max(np.linalg.norm(x, axis=1).max() for x in clouds.values()))
    turned, back, over_angle = figure.axes
    return Explorer(
        figure, controls, compute, partial(_draw_2d, artists), read, chips={"best θ": best}, handles=[
            Handle("the cloud", turned, _whole, partial(_turned_by_hand, 1)),
            Handle("the grid", back, _whole, partial(_turned_by_hand, -1)),
            Handle("θ", over_angle, lambda result: (result.theta, None), lambda x, y, start: {"theta": x}),
        ],
        ghost=[artists.panels[0].tokens, artists.panels[1].square, artists.now, artists.marker],
        main=("error_percent", "%"), parts={"curves": [*artists.lines, artists.marker]},
        title="A rotation in front of the quantizer, in two dimensions",
        description="Left, a cloud of tokens turned by the angle θ over the square grid of the quantizer, which "
        "reaches the largest coordinate. Middle, both turned back: the cloud as it was, the grid at an angle. Right, "
        "curves over the angle of the error, the largest magnitude and the kurtosis, relative to no rotation.",
    )


def _whole(result):
    return (-1e3, 1e3), (-1e3, 1e3)


def _turned_by_hand(direction, x, y, start):
    turn = math.degrees(math.atan2(y, x) - math.atan2(start.y, start.x))
    return {"theta": start.values["theta"] + direction * ((turn + 180) % 360 - 180)}


def _clouds():
    """The same 400 normally distributed tokens, stretched in three ways."""
    x = np.random.default_rng(0).standard_normal((400, 2))
    x = x.clip(-3, 3)  # no single token decides
    x -= x.mean(0)
    long = x * [_LONG, _SHORT]
    return {NO_AXIS: x * np.linalg.norm(long) / np.linalg.norm(x), ONE_AXIS: long, DIAGONAL: long @ _turn(45)}


def _turn(theta):
    """R that turns row vectors counter-clockwise by ``theta`` degrees: x R."""
    cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
    return np.array([[cos, sin], [-sin, cos]])


def _figure_2d(limit):
    with new_figure(height=450) as figure:
        turned, back, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.05])
        panels = []
        for axes, title in ((turned, "rotated: x R"), (back, "turned back: x")):
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[], title=title)
            axes.spines[:].set_visible(True)
            panels.append(SimpleNamespace(
                grid=moving(axes, color=BLUE, lw=0.5),
                square=moving(axes, color=BLUE, lw=2),
                axis=moving(axes, color=ORANGE, lw=2, ls="--"),
                levels=moving(axes, "s", color=VERMILION, ms=5),
                tokens=moving(axes, ".", color=BLACK, ms=3),
            ))
        first, second = panels
        below = {"loc": "upper center", "ncols": 3, "frameon": False, "columnspacing": 1, "handlelength": 1.4}
        turned.legend([first.tokens, first.levels], ["token", "level in use"], bbox_to_anchor=(0.5, 0), **below)
        back.legend([second.square, second.axis], ["max |x R|", "channel 1"], bbox_to_anchor=(0.5, 0), **below)
        curves.set(xlim=(0, 90), ylim=(0.48, 2.1), yscale="log", xlabel="θ (degrees)", title="relative to θ = 0")
        curves.set_xticks([0, 45, 90])
        curves.set_yticks(_RATIOS, [f"{ratio:g}×" for ratio in _RATIOS])
        curves.set_yticks([], minor=True)
        curves.axhline(1, color=BLACK, lw=0.8)
        lines = [moving(curves, label=label, **look) for label, look in (
            ("error", {"color": VERMILION, "lw": 3}), ("max |x R|", {"color": BLUE, "ls": "--"}),
            ("kurtosis", {"color": GREEN, "ls": ":"}))]
        now = curves.axvline(0, color=BLACK, lw=1.2, animated=True)
        marker = moving(curves, "o", color=VERMILION, mec=BLACK, ms=11, clip_on=False)
        curves.legend(bbox_to_anchor=(0.43, -0.17), fontsize=12, **below)
    return figure, SimpleNamespace(panels=panels, lines=lines, now=now, marker=marker)


def _draw_2d(artists, result):
    levels = dequantize(np.arange(result.params.qmin, result.params.qmax + 1), result.params)
    low, high = levels[0], levels[-1]
    lines = levels if len(levels) <= _MOST_LINES else levels[:0]
    upright = paths([lines, lines], [np.full(lines.size, low), np.full(lines.size, high)])
    grid = np.hstack([upright, upright[::-1]]).T
    square = np.array([[low, low], [low, high], [high, high], [high, low], [low, low]])
    turned, far = result.x @ result.r, 2 * np.abs(result.x).max()
    shapes = {"grid": grid, "square": square, "axis": np.array([[-far, 0], [far, 0]]) @ result.r, "tokens": turned,
              "levels": np.unique(fake_quantize(turned, result.params), axis=0)}
    for panel, back in zip(artists.panels, (np.eye(2), result.r.T), strict=True):
        for name, points in shapes.items():
            getattr(panel, name).set_data(*(points @ back).T)
    for line, curve in zip(artists.lines, result.curves, strict=True):
        line.set_data(_ANGLES, curve)
    artists.now.set_xdata([result.theta] * 2)
    artists.marker.set_data([result.theta], [result.error / result.without])


@dataclass(frozen=True)
class Turned:
    """A layer's input and weights after a rotation, and what follows from them whatever the grid."""

    x: torch.Tensor
    w: torch.Tensor
    largest: np.ndarray  # of each channel
    counts: np.ndarray  # of |x| in each bin
    kurtosis: float


@dataclass(frozen=True)
class Rotation:
    """What `rotation` shows for one position of its controls."""

    place: tuple
    rotate: str
    turned: Turned
    half_steps: tuple  # least and most
    to_zero: float  # share of the values that become 0
    output_error: dict  # rotation: ‖Q(x R) Q(W R)ᵀ − x Wᵀ‖ / ‖x Wᵀ‖ of each token in percent, mean and largest


def rotation(places=None, bits=4):
    """Explore what a rotation does to the activations of a real layer, to its weights, and to the layer's error.

    Left, the largest |x| of each channel, before (grey) and after the rotation. Middle, how many values have which
    magnitude, before and after. The blue lines are half a step of the grids, the least and the most: what lies below
    becomes 0. Right, how wrong the layer's output is without a rotation, and with each ("bars", for a veil).

    Behind a norm, what is rotated is what R1 rotates: activations divided by the norm's gains (`qlab.samples.gains`),
    and weights that were multiplied by them. At the input of o each head is turned, as by R2.

    Parameters
    ----------
    places : dict of (layer, site) to pair (x, w), optional
        Float arrays or tensors: activations (tokens, channels), and rows (outputs, channels) of the weights that they
        meet. By default `qlab.samples.products`.
    bits : int, 2 to 8
        Of the activations, to start with.

    Returns
    -------
    Explorer
        Controls ``place``, ``rotate`` ("none", "gains folded", "Hadamard", "random Hadamard" or "random orthogonal"),
        ``seed`` of the random ones, ``bits`` and ``granularity`` of the activations ("tensor",
        "token" or "group", of 32 channels), and ``weights`` ("float", "8 bits" or "4 bits", one scale for each row,
        rounded to nearest).

    Raises
    ------
    ValueError
        If ``places`` is empty, a matrix has not two dimensions, is empty or has a NaN or infinity, a pair does not fit
        together, `qlab.spinquant.hadamard` has no matrix for its channels, or ``bits`` is not from 2 to 8.

    References
    ----------
    Liu et al. 2025, "SpinQuant: LLM quantization with learned rotations", sections 2 and 3.1; Ashkboos et al. 2024,
    "QuaRot: outlier-free 4-bit inference in rotated LLMs", section 3.

    Examples
    --------
    >>> explorer = rotation()
    >>> round(explorer.readout["output_error_percent"], 1)
    37.9
    >>> explorer.set(rotate="Hadamard")
    >>> round(explorer.readout["output_error_percent"], 1)
    10.6
    """
    gains = {} if places is not None else {place: torch.from_numpy(gain) for place, gain in samples.gains().items()}
    places = checked_places(places)
    widths = {place: _width(place, x.shape[1]) for place, (x, _) in places.items()}
    for place, n in widths.items():
        try:
            fast_hadamard(torch.zeros(n))
        except ValueError as error:
            raise ValueError(f"places[{place!r}] must have channels that a Hadamard matrix fits: {error}") from None
    outputs = {place: x @ w.T for place, (x, w) in places.items()}

    def folded(place):
        (x, w), gain = places[place], gains.get(place, 1)
        return x / gain, w * gain

    scales = {place: _Magnitudes(x, folded(place)[0]) for place, (x, _) in places.items()}

    def rotated(a, rotate, seed, n):
        """a R, as R turns n channels at a time."""
        if rotate == FOLDED:
            return a
        a = a.unflatten(1, (-1, n))
        if rotate == HADAMARD:
            return fast_hadamard(a).flatten(1)
        return (a @ (random_hadamard if rotate == RANDOM_HADAMARD else random_orthogonal)(n, seed)).flatten(1)

    @lru_cache(32)
    def turned(place, rotate, seed):
        x, w = places[place]
        if rotate != NONE:
            x, w = (rotated(a, rotate, seed, widths[place]) for a in folded(place))
        size = x.abs().numpy()
        return Turned(x, w, size.max(0), np.histogram(size, scales[place].bins)[0], kurtosis(x))

    def compute(*, place, rotate, seed, bits, granularity, weights):
        output, errors = outputs[place], {}
        for name in BUILT_IN:
            after = turned(place, name, seed if name in (RANDOM_HADAMARD, RANDOM_ORTHOGONAL) else 0)
            n = after.x.shape[1]
            params = params_of(after.x, granularity, bits, group_size=n if n % _GROUP else _GROUP)
            x_hat, w_hat = fake_quantize(after.x, params), after.w
            if WEIGHTS[weights]:
                w_hat = fake_quantize(w_hat, absmax_params(w_hat, WEIGHTS[weights], axis=0))
            errors[name] = token_errors(x_hat @ w_hat.T, output, output.any(1))
            if name == rotate:
                chosen, half = after, (params.scale.min().item() / 2, params.scale.max().item() / 2)
                to_zero = float((x_hat[after.x != 0] == 0).double().mean())
        return Rotation(place, rotate, chosen, half, to_zero, errors)

    def read(result):
        error, worst = result.output_error[result.rotate]
        return {"max": float(result.turned.largest.max()), "kurtosis": result.turned.kurtosis,
                "output_error_percent": error, "worst_token_percent": worst,
                "without_rotation_percent": result.output_error[NONE][0], "to_zero_percent": 100 * result.to_zero}

    controls = {
        "place": place_control(places),
        "rotate": widgets.ToggleButtons(options=BUILT_IN, style={"button_width": "auto"}),
        "seed": IntSlider(0, min=0, max=9, description="seed", disabled=True, layout={"width": "240px"},
                          style={"description_width": "40px"}),
        "bits": bits_slider(bits),
        "granularity": widgets.ToggleButtons(options=["tensor", "token", "group"], value="token",
                                             style={"button_width": "72px"}),
        "weights": widgets.ToggleButtons(options=[(f"W {name}", name) for name in WEIGHTS],
                                         style={"button_width": "76px"}),
    }

    figure, artists = _rotation_figure()
    before = {place: turned(place, NONE, 0) for place in places}
    return Explorer(
        figure, controls, compute, partial(_draw_rotation, artists, before, scales), read, couple=_couple,
        hover=partial(_under_the_pointer, before),
        ghost=[artists.after, artists.counts, *artists.halves], main=("output_error_percent", "%"),
        parts={"bars": [figure.axes[2]]},
        title="Rotations of the activations of a language model",
        description="Left, the largest magnitude of each channel on a logarithmic axis, before a rotation as grey bars "
        "and after it as dots. Middle, how many values have which magnitude, before as a grey area and after as a "
        "line, with half a step of the grid: smaller values become 0. Right, bars with the error of the layer's output "
        "for each rotation.",
    )


def _couple(name, state):
    random = state["rotate"] in (RANDOM_HADAMARD, RANDOM_ORTHOGONAL)
    return {"seed": {"disabled": not random}} if name == "rotate" else {}


class _Magnitudes:
    """The axis of |x| at a place: no rotation takes a value beyond the largest norm of a token."""

    def __init__(self, x, folded):
        self.high = 1.2 * float(max(x.norm(dim=1).max(), folded.norm(dim=1).max()))
        self.low = max(float(x.abs().median()) / 30, 1e-6 * self.high)
        self.bins = np.geomspace(self.low, self.high, 61)


def _width(place, channels):
    """Of what a rotation turns at a place."""
    return _HEAD if place[1] == "o_in" and channels % _HEAD == 0 else channels


def _rotation_figure():
    with new_figure(height=460) as figure:
        profile, histogram, bars = figure.subplots(1, 3, width_ratios=[1.7, 1, 1.25])
        profile.set(xlabel="channel", ylabel="|x|", yscale="log", title="largest in each channel")
        before = profile.plot([], [], color=GREY, lw=1)[0]
        after = moving(profile, ".", ms=4, color=BLACK)
        halves = [moving(axes, color=BLUE, lw=1.8, transform=axes.get_yaxis_transform(), **ON_GREY)
                  for axes in (profile, histogram)]
        histogram.set(xscale="log", yscale="log", xlabel="number of values", title="all values", yticklabels=[])
        counts_before = histogram.fill_betweenx([], [], fc=(GREY, 0.5), ec=GREY, lw=1, step="pre")
        counts = moving(histogram, color=BLACK)
        profile.legend([before, after, halves[0]], ["before", "after", "½ step (least, most)"], loc="upper center",
                       ncols=3, frameon=False, handlelength=1, columnspacing=0.9, handletextpad=0.5, fontsize=12)
        errors = ErrorBars(bars, BUILT_IN, width=14.4, top=-0.7)
        bars.set_yticks([])
    return figure, SimpleNamespace(
        place=None, profile=profile, histogram=histogram, before=before, after=after, halves=halves,
        counts_before=counts_before, counts=counts, errors=errors)


def _under_the_pointer(before, axes, x, y, result):
    profile, _, bars = axes.figure.axes
    if axes is profile:
        old, now = before[result.place].largest, result.turned.largest
        channel = channel_at(axes, x, np.maximum(old, now))
        after = f" → {now[channel]:.4g}" if result.rotate != NONE else ""
        return f"channel {channel}\nlargest |x|: {old[channel]:.4g}{after}"
    return error_under(y, result.output_error) if axes is bars else ""


def _draw_rotation(artists, before, scales, result):
    old, scale = before[result.place], scales[result.place]
    columns = np.arange(old.largest.size) + 0.5
    if result.place != artists.place:  # a new background
        artists.place = result.place
        artists.before.set_data(*paths([columns, columns], [np.full(columns.size, scale.low), old.largest]))
        artists.profile.set(xlim=(0, columns.size), ylim=(scale.low, 4 * scale.high))
        artists.counts_before.remove()
        artists.counts_before = artists.histogram.fill_betweenx(
            scale.bins, 0.7, np.append(old.counts, 0).clip(0.7), step="post", fc=(GREY, 0.5), ec=GREY, lw=1)
        artists.histogram.set(xlim=(0.7, 1.5 * old.x.numel()), ylim=(scale.low, 4 * scale.high), yticklabels=[])
    artists.after.set_data(columns, result.turned.largest)
    artists.counts.set_data(result.turned.counts.clip(0.7).repeat(2), scale.bins.repeat(2)[1:-1])
    for line in artists.halves:
        line.set_data(*paths([[0, 0], [1, 1]], [result.half_steps] * 2))
    artists.errors.draw(result.output_error, result.rotate, "{name}: {percent}")


class watch_rotation(Watching):
    """Watch `qlab.spinquant.learn_rotation` while it runs, with a Stop button; otherwise as `watch`.

    Left, the proxy of each step's vectors, and of held-out ones. Right, the error of the layers' output on held-out
    tokens, which is what the proxy stands for.

    Parameters
    ----------
    steps : iterator of RotationStep
        From `qlab.spinquant.learn_rotation`.
    measure : function
        ``measure(rotation) -> (proxy, error)``, on held-out tokens: two floats, such as `qlab.spinquant.proxy_loss` and
        `qlab.spinquant.output_error`, in percent. ``rotation`` is None before the first step.
    every : int, ≥ 1
        Steps between two measurements and two pictures.

    Raises
    ------
    ValueError
        As `watch`.

    References
    ----------
    Liu et al. 2025, "SpinQuant: LLM quantization with learned rotations", section 3.2.

    Examples
    --------
    >>> import torch
    >>> from qlab.spinquant import ProxyInputs, learn_rotation, proxy_loss
    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1.0, 1.0, 1.0])
    >>> inputs, start = ProxyInputs(x, torch.ones(200)), torch.eye(4)
    >>> def measure(r):
    ...     r = start if r is None else r
    ...     return proxy_loss(r, inputs).item(), (x @ r).abs().max().item()
    >>> run = watch_rotation(learn_rotation(inputs, start=start, steps=30), measure)
    >>> for step in run:
    ...     pass
    >>> run.history[0]["held_out"] > run.explorer.readout["held_out"]
    True
    """

    def __init__(self, steps, measure, every=10):
        self._rotation = None

        def held_out():
            return dict(zip(_HELD_OUT, map(float, measure(self._rotation)), strict=True))

        super().__init__(steps, held_out, every)

    def _of_step(self, step):
        self._rotation = step.rotation
        return {"step": step.step, "loss": step.loss, "orthogonality": step.orthogonality}

    def _new_explorer(self, controls, arrange):
        figure, artists = _learning_figure(self._total, *(self.history[0][name] for name in _HELD_OUT))

        def read(history):
            found = {name: value for record in history for name, value in record.items()}
            return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}

        return Explorer(
            figure, controls, lambda step: [record for record in self.history if record["step"] <= step],
            lambda history: _draw_learning(artists, history), read, arrange=arrange, title="A rotation is learned",
            description="Left, the proxy of each step and of held-out vectors. Right, the error of the layers' output "
            "on held-out tokens, in percent.",
        )


def _learning_figure(total, start, error):
    with new_figure(height=400) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
        for axes, title, first in ((left, "error that the proxy expects", start),
                                   (right, "error of the output, held-out (%)", error)):
            most = 1.25 * first if math.isfinite(first) and first > 0 else 1
            axes.set(title=title, xlabel="step", xlim=(0, total), ylim=(0, most))
            axes.axhline(first, color=ORANGE, ls="--", label="start")
        loss = moving(left, color=GREY, lw=1.2, label="these vectors")
        held_out = moving(left, "o-", color=BLUE, label="held-out vectors")
        errors = moving(right, "o-", color=BLUE)
        left.legend(loc="lower left")
    return figure, {"loss": loss, "held_out": held_out, "output_error_percent": errors}


def _draw_learning(artists, history):
    for name, line in artists.items():
        line.set_data(*np.array([(record["step"], record[name])
                                 for record in history if name in record]).reshape(-1, 2).T)
