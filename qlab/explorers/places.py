"""Places in the language model, as the figures of lessons 05 to 07 take and name them."""

import ipywidgets as widgets
import numpy as np
import torch

from qlab import samples
from qlab.affine import real_array
from qlab.outliers import params_of

GROUP_SIZE = 64
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
