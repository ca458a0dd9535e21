"""Lesson 08: what GPTQ does with the error of each column, and which error a range ought to make small."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap

from qlab import samples
from qlab.affine import dequantize, fake_quantize, quantize, real_array, sqnr_db
from qlab.explorers.colors import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from qlab.explorers.parts import bits_slider, moving, ratio_db
from qlab.gptq import Compensated, Factor, compensated, factor, hessian, weight_params
from qlab.live import Explorer, FloatLogSlider, FloatSlider, Handle, IntSlider, new_figure

STORED, BY_SIZE = "as stored", "largest H first"
ROW = "row"
RANGES = ("min-max", "weighted")
SHARES = np.arange(16, 41) / 40
_GROUPS = (128, 64, 32, 16)
_POINTS = 33  # of a curve
_ROWS = 16  # that can be told apart, and make a small picture
_LOOKS = ({"color": BLACK}, {"color": BLUE, "ls": "--"}, {"color": VERMILION, "ls": "-."}, {"color": GREEN, "ls": ":"})
_SHIFTS = LinearSegmentedColormap.from_list("shifts", [BLUE, "white", VERMILION], N=21)
_REACH = 15  # pixels, from the pointer to a point
_ROUNDING = 12**-0.5  # root mean square error of rounding, in steps


@dataclass(frozen=True)
class Run:
    """GPTQ of a matrix with one setting: all that its replay needs."""

    factor: Factor
    full: Compensated
    passed_on: torch.Tensor  # (w_j − ŵ_j) / U_jj, columns in their order
    fresh: object  # function of weights: `weight_params` with this setting


@dataclass(frozen=True)
class Compensation:
    """What `compensation` shows for one position of its controls. Columns stand in the order of their rounding."""

    columns: int
    bits: int
    order: np.ndarray
    shift: np.ndarray  # of the weights against the original, in steps; of the first columns with their rounding
    places: np.ndarray  # on the axis of the curves
    curves: dict  # of each text: error of the output in percent
    errors: dict  # the same at ``columns``
    sqnr_db: float
    now: Compensated


def compensation(w=None, x=None, held_out=None, bits=4):
    """Explore how GPTQ rounds a layer, column by column, and lets the columns still to come make up for the error.

    Left, how far each weight is from what it was, in steps of its grid: left of the line the columns that are rounded,
    right of it those to come, which have taken over error. Below, the root mean square of each column; rounding to
    nearest alone gives 0.29 steps. Right, the error of the layer's output if the columns to come were now rounded to
    nearest, over the columns done: it begins with plain rounding to nearest and ends with GPTQ. The calibration text
    is as many tokens as H is from; other texts are held out. The line can be dragged. A step over the columns takes one
    product; with more than a few hundred rows and columns all else takes seconds.

    Parameters
    ----------
    w : float array or tensor, shape (outputs, n), optional
        By default a part of the language model, `qlab.samples.part_of_o`, with its texts.
    x : float array or tensor, shape (tokens, n), optional
        Inputs to calibrate with.
    held_out : dict of str to float array or tensor, shape (tokens, n), or one such array, optional
        Inputs of up to three other texts.
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``columns`` (done), ``bits``, ``group`` ("row", or the columns that share a scale), ``damping``,
        ``order`` ("as stored" or "largest H first"), ``tokens`` (of ``x``, from the first on) and ``ranges`` ("min-max"
        or "weighted"). Parts "curves" and "shifts". Numbers in percent are errors of
        the output: ``calibration_percent`` and those of held-out texts, each with the one before, of rounding to
        nearest; ``weight_sqnr_db`` is that of the weights alone.

    Raises
    ------
    ValueError
        If an array is no matrix, is empty or has a NaN or infinity, they do not fit together, only one of ``w`` and
        ``x`` is given, a product x wᵀ is 0, there are more than three texts or one has the name "calibration", or
        ``bits`` is out of range.

    References
    ----------
    Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers", section 3.

    Examples
    --------
    >>> explorer = compensation()
    >>> explorer.readout["calibration_percent"] == explorer.readout["nearest_calibration_percent"]
    True
    >>> explorer.set(columns=64)
    >>> explorer.readout["calibration_percent"] < 0.6 * explorer.readout["nearest_calibration_percent"]
    True
    """
    w, x, others = _layer(w, x, held_out)
    n, counts = w.shape[1], _token_counts(len(x))
    targets = {name: _Target(w, hessian(other.double())) for name, other in others.items()}
    places = np.unique(np.linspace(0, n, _POINTS).round().astype(int))

    @lru_cache
    def h(tokens):
        return hessian(x[:tokens].double())

    @lru_cache
    def calibration(tokens):
        return _Target(w, h(tokens))

    @lru_cache
    def factored(tokens, damping, order):
        return factor(h(tokens), damping=damping, act_order=order == BY_SIZE)

    def errors(copies, tokens):
        """Of matrices, shape (…, outputs, n), for each text."""
        every = {"calibration": calibration(tokens), **targets}
        return {name: target.percent(copies) for name, target in every.items()}

    @lru_cache(8)
    def run(setting):
        bits, group, damping, order, tokens, ranges = setting
        known, options = factored(tokens, damping, order), {"ranges": ranges, "group_size": _size(group)}
        full = compensated(w, known, bits, **options)
        errors = (full.weights - dequantize(full.codes, full.params))[:, known.order]
        fresh = partial(weight_params, bits=bits, diagonal=known.diagonal, **options)
        return Run(known, full, errors / known.upper.diagonal().float(), fresh)

    @lru_cache(8)
    def curves(setting):
        steps = [_replayed(w, run(setting), place) for place in places.tolist()]
        found = errors(torch.stack([dequantize(step.codes, step.params) for step in steps]), tokens=setting[4])
        return {name: curve.numpy() for name, curve in found.items()}

    @lru_cache
    def most(bits):
        nearest = fake_quantize(w, weight_params(w, bits))
        return max(float(error) for error in errors(nearest, len(x)).values())

    def compute(*, columns, bits, group, damping, order, tokens, ranges):
        setting = bits, group, damping, order, tokens, ranges
        some = run(setting)
        now = _replayed(w, some, columns)
        w_hat, steps = dequantize(now.codes, now.params), _expanded(now.params.scale, now.params.group_size)
        reached = some.factor.order[:columns]
        moved = now.weights.clone()
        moved[:, reached] = w_hat[:, reached]
        return Compensation(
            columns, bits, some.factor.order.numpy(), ((moved - w) / steps)[:, some.factor.order].numpy(), places,
            curves(setting), {name: float(error) for name, error in errors(w_hat, tokens).items()},
            float(sqnr_db(w, w_hat)), now)

    def read(result):
        found = {}
        for name, error in result.errors.items():
            found |= {f"{name}_percent": error, f"nearest_{name}_percent": float(result.curves[name][0])}
        return found | {"weight_sqnr_db": result.sqnr_db, "largest_shift_steps": float(np.abs(result.shift).max())}

    controls = {
        "columns": IntSlider(0, min=0, max=n, description="columns", layout={"width": "380px"}),
        "bits": bits_slider(bits),
        "group": _group_control(n),
        "damping": FloatLogSlider(0.01, min=-4, max=0, step=0.5, description="damping", readout_format=".2g",
                                  layout={"width": "300px"}),
        "order": widgets.ToggleButtons(options=[STORED, BY_SIZE], style={"button_width": "112px"}),
        "tokens": widgets.SelectionSlider(options=counts, value=counts[-1], description="tokens",
                                          layout={"width": "300px"}),
        "ranges": widgets.ToggleButtons(options=RANGES, style={"button_width": "84px"}),
    }

    def hover(axes, x, y, result):
        if axes not in artists.stretches or not 0 <= x < n:
            return ""
        place = int(x)
        column = f"column {result.order[place]}, " + ("rounded" if place < result.columns else "to come")
        row = int(y)
        if axes is not artists.image.axes or not 0 <= row < len(artists.rows):
            return f"{column}\nshift: {np.sqrt(np.square(result.shift[:, place]).mean()):.2f} steps"
        was, now = (float(a[row, result.order[place]]) for a in (w, result.now.weights))
        code = f", code {result.now.codes[row, result.order[place]]}" if place < result.columns else ""
        return f"row {row}, {column}\n{was:.4g} → {now:.4g}{code}\nshift: {result.shift[row, place]:+.2f} steps"

    figure, artists = _compensation_figure(min(_ROWS, len(w)), n, ["calibration", *targets])
    return Explorer(
        figure, controls, compute, partial(_draw_compensation, artists, most), read, hover=hover,
        handles=[Handle("columns", axes, lambda result: (result.columns, None), lambda x, y, start: {"columns": x})
                 for axes in figure.axes[:3]],
        ghost=[*artists.dots, artists.lines_at[2]], main=("calibration_percent", "%"),
        parts={"curves": [*artists.curves, *artists.dots, *artists.nearest],
               "shifts": [artists.image, artists.done, artists.to_come]},
        title="GPTQ, column by column",
        description="Left above, weights of some rows as coloured cells: how far each is from its original, in steps; "
        "a line stands between the columns that are rounded and those to come. Below, the root mean square of this "
        "over the rows, for each column. Right, curves of the error of the output over the number of columns done, on "
        "the calibration text and on others, each with the error of rounding to nearest.",
    )


def _replayed(w, run, columns):
    """`qlab.gptq.compensated` of so many ``columns``, by one product."""
    (upper, order, diagonal), (_, params, weights) = run.factor, run.full
    later = order[columns:]
    if not len(later):
        return run.full
    weights = weights.clone()
    original = torch.where(diagonal > 0, w, 0)[:, later]
    weights[:, later] = original - run.passed_on[:, :columns] @ upper[:columns, columns:].float()
    if params.group_size is not None:
        fresh, begun = run.fresh(weights), torch.zeros(params.scale.shape[1], dtype=torch.bool)
        begun[order[:columns] // params.group_size] = True
        params = replace(params, scale=torch.where(begun, params.scale, fresh.scale),
                         zero_point=torch.where(begun, params.zero_point, fresh.zero_point))
    return Compensated(quantize(weights, params), params, weights)


def _compensation_figure(rows, n, names):
    with new_figure(height=400) as figure:
        left, right = figure.add_gridspec(1, 2, width_ratios=[1.35, 1])
        cells, profile = left.subgridspec(2, 1, height_ratios=[1.9, 1]).subplots()
        curve = figure.add_subplot(right)
        cells.set(title="shift of the weights, in steps", yticks=[], ylabel=f"{rows} rows", xlim=(0, n))
        cells.tick_params(axis="x", labelbottom=False)
        image = cells.imshow(np.zeros((rows, n)), cmap=_SHIFTS, vmin=-1, vmax=1, aspect="auto", animated=True,
                             extent=(0, n, rows, 0), interpolation="nearest")
        figure.colorbar(image, ax=cells, location="left", ticks=[-1, 0, 1], pad=0.02, aspect=12)
        profile.set(xlim=(0, n), ylim=(0, 1), xlabel="columns, in the order of rounding", ylabel="rms (steps)")
        edges = np.arange(n + 1)
        done, to_come = (profile.stairs(np.zeros(n), edges, fill=True, color=color, animated=True, label=label)
                         for color, label in ((GREY, "rounded"), (SKY, "to come")))
        profile.axhline(_ROUNDING, color=BLACK, lw=1, ls=":", animated=True)
        profile.legend(loc="upper left", ncols=2, fontsize=12, frameon=False)
        curve.set(xlim=(-0.02 * n, 1.02 * n), xlabel="columns rounded by GPTQ", title="error of the output (%)")
        looks = _LOOKS[:len(names)]
        nearest = [moving(curve, color=look["color"], lw=1, ls=(0, (1, 3))) for look in looks]
        curves = [moving(curve, label=name, **look) for name, look in zip(names, looks, strict=True)]
        dots = [moving(curve, "o", ms=10, color=look["color"], clip_on=False) for look in looks]
        curve.legend([*curves, nearest[0]], [*names, "to nearest"], loc="upper center", ncols=2, fontsize=12,
                     frameon=False)
        lines_at = [axes.axvline(0, color=BLACK, lw=2.5, animated=True) for axes in (cells, profile)]
        lines_at.append(curve.axvline(0, color=BLACK, lw=1.2, animated=True))
    return figure, SimpleNamespace(bits=None, stretches=(cells, profile), rows=range(rows), image=image, done=done,
                                   to_come=to_come, nearest=nearest, curves=curves, dots=dots, lines_at=lines_at)


def _draw_compensation(artists, most, result):
    if result.bits != artists.bits:  # a new background
        artists.bits = result.bits
        artists.curves[0].axes.set_ylim(0, 1.6 * most(result.bits) or 1)
    artists.image.set_data(result.shift[:len(artists.rows)])
    shift = np.sqrt(np.square(result.shift).mean(0))
    rounded = np.arange(len(shift)) < result.columns
    artists.done.set_data(np.where(rounded, shift, 0))
    artists.to_come.set_data(np.where(rounded, 0, shift))
    for i, (name, curve) in enumerate(result.curves.items()):
        artists.curves[i].set_data(result.places, curve)
        artists.nearest[i].set_data(result.places[[0, -1]], curve[[0, 0]])
        top = artists.curves[i].axes.get_ylim()[1]
        artists.dots[i].set_data([result.columns], [min(result.errors[name], top)])
    for line in artists.lines_at:
        line.set_xdata([result.columns] * 2)


# The clip


@dataclass(frozen=True)
class ClipSearch:
    """What `clip_search` shows for one position of its controls."""

    share: float
    bits: int
    columns: np.ndarray  # root mean square error of each column's weights, in percent of that of all weights
    curves: np.ndarray  # percent, for each of SHARES: error of the weights, weighted by diag(H), of the output
    clipped: float  # share of the weights


def clip_search(w=None, x=None, bits=4):
    """Explore how a smaller range changes the error of the weights, and that of the output.

    Left, for each column of the weights, how large its inputs are and how wrong its weights: with the range that holds
    all weights (grey) and with the present share of it (black). Right, over the share of the range, the error of the
    weights, the same weighted by diag(H), and the error of the output. All are root mean squares in percent of those of
    weights and output. Weights are rounded to nearest. The line can be dragged.

    Parameters
    ----------
    w : float array or tensor, shape (outputs, n), optional
        By default, with ``x``, a place of `qlab.samples.products`: gate in layer 29.
    x : float array or tensor, shape (tokens, n), optional
    bits : int, 2 to 8
        To start with.

    Returns
    -------
    Explorer
        Controls ``share`` (of the range of each row or group, 0.4 to 1), ``bits`` and ``group`` ("row", or the columns
        that share a scale). The chips go to the share with the least error of one kind, the same for all rows;
        `qlab.gptq.weight_params` searches for each row or group. Parts "curves" and "columns".

    Raises
    ------
    ValueError
        As `compensation`.

    Examples
    --------
    >>> explorer = clip_search()
    >>> before = explorer.readout
    >>> explorer.press("best for weights")
    >>> explorer.readout["weight_sqnr_db"] > before["weight_sqnr_db"]
    True
    >>> explorer.readout["output_error_percent"] > before["output_error_percent"]
    True
    """
    if w is None and x is None:
        x, w = samples.products()[29, "mlp_in"]
    w, x, _ = _layer(w, x, None)
    h = hessian(x.double())
    targets = {"weight": _Target(w, torch.ones(len(h))), "weighted": _Target(w, h.diagonal()), "output": _Target(w, h)}
    inputs = x.square().mean(0).sqrt().numpy()

    @lru_cache
    def largest(bits, group):
        return weight_params(w, bits, group_size=_size(group))

    def copy(share, bits, group):
        params = largest(bits, group)
        return fake_quantize(w, replace(params, scale=params.scale * share))

    @lru_cache
    def curves(bits, group):
        copies = [copy(share, bits, group) for share in SHARES]
        return np.array([[float(target.percent(w_hat)) for w_hat in copies] for target in targets.values()])

    @lru_cache
    def columns(share, bits, group):
        params, errors = largest(bits, group), w - copy(share, bits, group)
        beyond = errors.abs() > 0.5005 * share * _expanded(params.scale, params.group_size)
        return 100 * (errors.square().mean(0) / w.square().mean()).sqrt().numpy(), float(beyond.double().mean())

    def compute(*, share, bits, group):
        now, clipped = columns(share, bits, group)
        return ClipSearch(share, bits, now, curves(bits, group), clipped)

    def read(result):
        now = dict(zip(targets, result.curves[:, _place(result.share)].tolist(), strict=True))
        return {f"{name}_error_percent": error for name, error in now.items()} | {
            "weight_sqnr_db": float(ratio_db(100**2, now["weight"]**2)), "clipped_percent": 100 * result.clipped}

    def least(which, *, bits, group, **_):
        return {"share": float(SHARES[::-1][curves(bits, group)[which, ::-1].argmin()])}

    controls = {
        "share": FloatSlider(1, min=0.4, max=1, step=0.025, description="share", readout_format=".3f",
                             layout={"width": "320px"}, style={"description_width": "45px"}),
        "bits": bits_slider(bits), "group": _group_control(w.shape[1]),
    }
    def hover(axes, x, y, result):
        if axes is not artists.now.axes:
            return ""
        points = axes.transData.transform(np.column_stack([inputs, result.columns]))
        far = np.hypot(*(points - axes.transData.transform((x, y))).T)
        i = int(far.argmin())
        return f"column {i}\ninputs: {inputs[i]:.3g}, error: {result.columns[i]:.1f} %" if far[i] < _REACH else ""

    figure, artists = _clip_figure(inputs)
    return Explorer(
        figure, controls, compute, partial(_draw_clip, artists, lambda bits: curves(bits, ROW)[:, -1].max(),
                                           lambda result: columns(1.0, result.bits, ROW)[0]), read,
        chips={"best for weights": partial(least, 0), "best by diag(H)": partial(least, 1)}, hover=hover,
        handles=[Handle("the share", figure.axes[1], lambda result: (result.share, None),
                        lambda x, y, start: {"share": x})],
        ghost=[artists.now, *artists.dots], main=("output_error_percent", "%"),
        parts={"curves": [*artists.curves, *artists.dots], "columns": [artists.now]},
        title="Ranges that clip weights",
        description="Left, a dot for each column of the weights: the size of its inputs and the error of its weights, "
        "in grey with the whole range and in black with a share of it. Right, over the share of the range, three "
        "curves: the error of the weights, the same weighted by diag(H), and the error of the output.",
    )


def _clip_figure(inputs):
    with new_figure(height=370) as figure:
        columns, curve = figure.subplots(1, 2, width_ratios=[1, 1.2], sharey=True)
        live = inputs[inputs > 0]
        columns.set(title="error of each column (%)", xlabel="its inputs (root mean square)", xscale="log",
                    xlim=(live.min() / 1.5, live.max() * 1.5))
        unknown = np.full_like(inputs, np.nan)
        whole = columns.plot(inputs, unknown, ".", ms=5, color=GREY, label="whole range")[0]
        now = columns.plot(inputs, unknown, ".", ms=5, color=BLACK, clip_on=False, label="now", animated=True)[0]
        columns.legend(loc="lower right", ncols=2, markerscale=2)
        curve.tick_params(labelleft=True)
        curve.set(title="error of the whole (%)", xlabel="share of the range", xlim=(SHARES[0] - 0.02, 1.02))
        looks = (("weights", {"color": BLUE, "ls": "--"}), ("weights, by diag(H)", {"color": PURPLE, "ls": ":"}),
                 ("output", {"color": BLACK}))
        curves = [moving(curve, label=label, **look) for label, look in looks]
        dots = [moving(curve, "o", ms=10, color=look["color"], clip_on=False) for _, look in looks]
        line = curve.axvline(1, color=ORANGE, lw=1.5, animated=True)
        curve.legend(loc="lower left", fontsize=12)
    return figure, SimpleNamespace(bits=None, whole=whole, now=now, curves=curves, dots=dots, line=line)


def _draw_clip(artists, most, whole, result):
    if result.bits != artists.bits:  # a new background
        artists.bits = result.bits
        artists.curves[0].axes.set_ylim(0, 2.5 * most(result.bits) or 1)
        artists.whole.set_ydata(whole(result))
    top = artists.curves[0].axes.get_ylim()[1]
    artists.now.set_ydata(result.columns.clip(max=top))
    for line, dot, curve in zip(artists.curves, artists.dots, result.curves, strict=True):
        line.set_data(SHARES, curve)
        dot.set_data([result.share], [min(curve[_place(result.share)], top)])
    artists.line.set_xdata([result.share] * 2)


def _place(share):
    return round(40 * share) - 16


# What both share


def _layer(w, x, held_out):
    """Weights, inputs and other inputs by their names, as float32 tensors that fit together."""
    if w is None and x is None and held_out is None:
        w, x, held_out = samples.part_of_o()
    if w is None or x is None:
        raise ValueError(f"{'w' if w is None else 'x'} must be given with the others, or none of them")
    if not isinstance(held_out, Mapping):
        held_out = {} if held_out is None else {"held_out": held_out}
    if len(held_out) >= len(_LOOKS) or not all(isinstance(name, str) and name for name in held_out):
        raise ValueError(f"held_out must be up to {len(_LOOKS) - 1} texts by their names, got {list(held_out)}")
    if "calibration" in held_out:
        raise ValueError('held_out must have names of their own, got "calibration"')
    w = _matrix(w, "w")
    return w, _inputs(x, "x", w), {name: _inputs(other, f"held_out[{name!r}]", w) for name, other in held_out.items()}


def _matrix(a, name):
    a = torch.asarray(real_array(a, name), dtype=torch.float32, copy=True, requires_grad=False)
    if a.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(a.shape)}")
    return a


def _inputs(x, name, w):
    x = _matrix(x, name)
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"{name} must be of shape (tokens, {w.shape[1]}) for w of shape {tuple(w.shape)}, got "
                         f"{tuple(x.shape)}")
    if not 0 < (most := float((x @ w.T).abs().max())) < torch.inf:
        raise ValueError(f"{name} must have a product with wᵀ that is finite and not all 0, got one of at most {most}")
    return x


class _Target:
    """What copies of W are to come near to: √(tr(Δ H Δᵀ) / tr(W H Wᵀ)), for H or only its diagonal."""

    def __init__(self, w, h):
        self.w, self.h = w, h.float()
        self.whole = self.square(w)

    def square(self, a):
        return ((a @ self.h) * a).sum((-2, -1)) if self.h.ndim == 2 else (a.square() @ self.h).sum(-1)

    def percent(self, copies):
        """Of copies of the shape (…, outputs, n)."""
        return 100 * (self.square(self.w - copies).clamp(min=0) / self.whole).sqrt()


def _expanded(scale, group_size):
    return scale[:, None] if group_size is None else scale.repeat_interleave(group_size, 1)


def _group_control(n):
    return widgets.Dropdown(options=[ROW, *(size for size in _GROUPS if n % size == 0 and size < n)],
                            description="scale per", layout={"width": "160px"}, style={"description_width": "70px"})


def _size(group):
    return None if group == ROW else group


def _token_counts(tokens):
    powers = [2**i for i in range(4, 31)]
    return [*(count for count in powers if count < tokens), tokens]
