"""Places in the language model, as the figures of lessons 05 to 07 take and name them."""

import ipywidgets as widgets
import numpy as np
import torch

from qlab import samples
from qlab.affine import real_array
from qlab.explorers.colors import BLACK, GREY, VERMILION
from qlab.explorers.parts import moving
from qlab.outliers import params_of

GROUP_SIZE = 64
_LEAST, _MOST = 0.03, 300.0  # percent: ends of the axis of the output error
SITE_NAMES = {"attn_in": "attention input", "o_in": "input of o", "mlp_in": "MLP input", "down_in": "input of down"}


def checked_places(places):
    """The places, by default those that ship, as pairs of float32 tensors."""
    try:
        pairs = {(layer, site): (x, w) for (layer, site), (x, w) in (places or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"places must be a dict of (layer, site) to pair (x, w), got {places!r:.80}") from None
    if places is not None and not pairs:
        raise ValueError("places must hold at least one pair (x, w), got none")
    return {place: _pair(place, *pair) for place, pair in (pairs or samples.products()).items()}


def place_control(places):
    return widgets.Dropdown(options=[(place_name(place), place) for place in places], description="place",
                            style={"description_width": "40px"}, layout={"width": "290px"})


def _pair(place, x, w):
    """Both as float32 tensors of two dimensions that fit together."""
    x, w = (torch.asarray(real_array(a, name), dtype=torch.float32, copy=True, requires_grad=False)
            for a, name in ((x, "x"), (w, "w")))
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"places must hold x (tokens, channels) and w (outputs, channels) with as many channels, "
                         f"got {tuple(x.shape)} and {tuple(w.shape)} at {place}")
    if not 0 < (largest := (x @ w.T).abs().max()) < torch.inf:
        raise ValueError(f"places must hold x and w with a product x wᵀ that is finite and not all 0, "
                         f"got one of at most {largest} at {place}")
    return x, w


def channel_at(axes, x, sizes):
    """The channel with the largest of ``sizes`` under a pointer at ``x``: a pixel can hold several."""
    reach = 0.004 * np.ptp(axes.get_xlim())
    low, high = (int(np.clip(end, 0, len(sizes) - 1)) for end in (x - reach, x + reach))
    return low + int(np.argmax(sizes[low:high + 1]))


def group_size(x):
    return GROUP_SIZE if x.shape[1] % GROUP_SIZE == 0 else x.shape[1]


def place_params(x, granularity, bits):
    return params_of(x, granularity, bits, group_size=group_size(x))


def place_name(place):
    layer, site = place
    return f"layer {layer}, {SITE_NAMES.get(site, site)}"


def token_errors(product, output, counted):
    """‖product − output‖ / ‖output‖ of the tokens that count, in percent: mean and largest."""
    errors = (100 * (product - output).norm(dim=1) / output.norm(dim=1))[counted]
    return (errors.mean().item(), errors.max().item()) if counted.any() else (0.0, 0.0)


class ErrorBars:
    """Errors of an output by names, as `token_errors` gives them: a bar for the mean and a mark for the worst token."""

    def __init__(self, axes, names, width, top):
        axes.set(title="error of the output", xscale="log", xlim=(_LEAST, _MOST), ylim=(len(names) - 0.4, top),
                 xlabel="of one token:\nmean, ◆ worst")
        axes.set_xticks([0.1, 1, 10, 100], ["0.1 %", "1", "10", "100"])
        self.lines = [moving(axes, color=GREY, lw=width, solid_capstyle="butt") for _ in names]
        self.worst = moving(axes, "d", ms=9, color=BLACK)
        self.texts = [axes.text(_LEAST * 1.1, row - 0.36, "", va="center", fontsize=13, animated=True)
                      for row in range(len(names))]

    def draw(self, errors, chosen, words="{percent}"):
        self.worst.set_data(np.clip([worst for _, worst in errors.values()], _LEAST, _MOST), range(len(errors)))
        for row, (name, (mean, _)) in enumerate(errors.items()):
            percent = f"{mean:.2g} %" if mean < 99.5 else f"{mean:.0f} %"
            self.lines[row].set_data([_LEAST, np.clip(mean, _LEAST, _MOST)], [row, row])
            self.lines[row].set_color(VERMILION if name == chosen else GREY)
            self.texts[row].set(text=words.format(name=name, percent=percent),
                                fontweight="bold" if name == chosen else "normal")


def error_under(y, errors):
    """What the bar under a pointer stands for."""
    name, (mean, worst) = list(errors.items())[int(np.clip(round(y), 0, len(errors) - 1))]
    return f"{name}\nmean of the tokens: {mean:.3g} %\nworst token: {worst:.3g} %"
