"""Outliers in the activations of a language model: look at them, count them, and quantize in spite of them.

Everything here takes a `qlab.smollm.SmolLM`; a place in it is a pair (layer, site), such as (11, "down_in").
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from qlab.affine import check_bits, check_integer, described, fake_quantize, is_number, real_array, zero_point_params
from qlab.smollm import SITES, check_places, check_tokens, inserted, places_of, plain_weights, weight_names

GRANULARITIES = ("tensor", "token", "channel", "group")


@dataclass(frozen=True)
class Statistics:
    """What passed one site.

    Parameters
    ----------
    low, high : float tensors, shape (channels,)
        The least and the largest value of each channel.
    """

    low: torch.Tensor
    high: torch.Tensor

    @property
    def absmax(self):
        """The largest magnitude of each channel, shape (channels,)."""
        return torch.maximum(self.high, -self.low)


class MassiveActivation(NamedTuple):
    """One value that towers over all others of its site."""

    token: int
    channel: int
    value: float
    ratio: float  # of its magnitude to the median magnitude


def capture(model, tokens, places):
    """The activations at some places while the model reads: what the linear layers receive.

    Parameters
    ----------
    model : SmolLM
        Functions that are `qlab.smollm.inserted` act before the look.
    tokens : int64 tensor, shape (N, T)
    places : iterable of (layer, site)

    Returns
    -------
    dict of (layer, site) to float tensor, shape (N · T, channels)
        In the model's precision.

    Raises
    ------
    ValueError
        If ``tokens`` has another shape or holds what is not a token, or there is no such place.
    """
    found = {place: [] for place in check_places(model, places)}
    _watch(model, tokens, {place: parts.append for place, parts in found.items()})
    return {place: torch.cat(parts).flatten(0, 1) for place, parts in found.items()}


def products(model, tokens, places, outputs=64):
    """Activations and the weights that they meet, for the figures `qlab.explorers.outliers` and ``landscape``.

    Parameters
    ----------
    model : SmolLM
    tokens : int64 tensor, shape (N, T)
    places : iterable of (layer, site)
    outputs : int, ≥ 1
        How many rows of the matrix; of those that read the site, the first one in `qlab.smollm.READERS`.

    Returns
    -------
    dict of (layer, site) to pair (x, w)
        Shapes (N · T, channels) and (outputs, channels).

    Raises
    ------
    ValueError
        As `capture`, or if ``outputs`` is not an integer of at least 1.
    """
    outputs, weights = check_integer(outputs, "outputs", 1), plain_weights(model)
    return {place: (x, weights[weight_names(*place)[0]][:outputs])
            for place, x in capture(model, tokens, places).items()}


def statistics(model, tokens, sites=SITES):
    """`Statistics` of every layer at some sites, without keeping the activations.

    Parameters
    ----------
    model : SmolLM
    tokens : int64 tensor, shape (N, T)
    sites : iterable of str, of `qlab.smollm.SITES`

    Returns
    -------
    dict of (layer, site) to Statistics

    Raises
    ------
    ValueError
        As `capture`, or if an activation is NaN or infinite.
    """
    check_tokens(model, tokens)
    ends = {place: ([], []) for place in places_of(model, sites)}

    def add(low, high, x):
        low.append(x.amin((0, 1)))
        high.append(x.amax((0, 1)))

    _watch(model, tokens, {place: partial(add, *pair) for place, pair in ends.items()})
    found = {place: Statistics(torch.stack(low).amin(0), torch.stack(high).amax(0))
             for place, (low, high) in ends.items()}
    for place, one in found.items():
        real_array(one.absmax, f"the activations at {place!r}")
    return found


@torch.inference_mode()
def _watch(model, tokens, callbacks):
    """Call ``callbacks[place](x)`` with what the linear layers read there, sequence by sequence."""
    check_tokens(model, tokens)
    with watched(model, callbacks):
        for sequence in tokens:
            model.hidden(sequence[None])


def watched(model, callbacks):
    """For a ``with``: `inserted` functions that call ``callbacks[place](x)`` with what the linear layers read there."""
    def look(standing, callback, x):
        x = standing(x)
        callback(x)
        return x

    return inserted(model, {(layer, site): partial(look, getattr(model.blocks[layer], site), callback)
                            for (layer, site), callback in callbacks.items()})


def kurtosis(x):
    """mean((x − μ)⁴) / σ⁴ of all values: 3 for a normal distribution, more the heavier the tails.

    Parameters
    ----------
    x : float array or tensor, any shape

    Returns
    -------
    float
        NaN where all values are equal.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity.

    Examples
    --------
    >>> kurtosis(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    1.0
    >>> round(kurtosis(torch.randn(100_000, generator=torch.Generator().manual_seed(0))), 1)
    3.0
    """
    x = real_array(x, "x")
    x = (x if isinstance(x, torch.Tensor) else torch.from_numpy(x.copy())).detach().double().flatten()
    if x.min() == x.max():
        return float("nan")
    x = x * (0.5 if x.abs().max() > 1 else 2.0**60)  # so that no difference and no power over- or underflows
    deviation = x - x[0]  # exact where all lie close together, however far from 0
    deviation = deviation / deviation.abs().max()
    deviation = deviation - deviation.mean()
    return float(deviation.pow(4).mean() / deviation.square().mean().square())


def outlier_channels(x, factor=8.0):
    """Channels that are large in most tokens: their median |x| is ``factor`` times that of the median channel or more.

    Parameters
    ----------
    x : float tensor, shape (tokens, channels)
    factor : float, > 1

    Returns
    -------
    dict of int to float
        Channel: how many times the median channel. The largest first.

    Raises
    ------
    ValueError
        If ``x`` has another shape, is empty or has a NaN or infinity, or ``factor`` is not greater than 1.

    Examples
    --------
    >>> outlier_channels(torch.tensor([[1.0, 2.0, -20.0], [1.0, -2.0, 30.0], [-1.0, 2.0, 40.0]]))
    {2: 15.0}
    """
    x = _matrix(x)
    if not is_number(factor) or not factor > 1:
        raise ValueError(f"factor must be greater than 1, got {factor!r}")
    typical = x.abs().median(0).values.double()
    ratio = typical / typical.median()
    found = torch.nonzero(ratio >= factor).flatten().tolist()
    return {channel: ratio[channel].item() for channel in sorted(found, key=lambda c: -ratio[c])}


def massive_activations(x, *, magnitude=100.0, ratio=1000.0):
    """The few single values that tower over everything else.

    Parameters
    ----------
    x : float tensor, shape (tokens, channels)
    magnitude, ratio : float, > 0
        |x| must be greater than ``magnitude`` and than ``ratio`` times the median |x|.

    Returns
    -------
    list of MassiveActivation
        The largest first.

    Raises
    ------
    ValueError
        If ``x`` has another shape, is empty or has a NaN or infinity, or a limit is not greater than 0.

    References
    ----------
    Sun et al. 2024, "Massive activations in large language models", section 2.

    Examples
    --------
    >>> massive_activations(torch.tensor([[-500.0, 0.1], [0.2, 0.3], [0.1, 0.1]]))
    [MassiveActivation(token=0, channel=0, value=-500.0, ratio=5000.0)]
    """
    x = _matrix(x)
    if not all(is_number(limit) and limit > 0 for limit in (magnitude, ratio)):
        raise ValueError(f"magnitude and ratio must be greater than 0, got {magnitude!r} and {ratio!r}")
    size = x.abs().double()
    median = size.median()
    places = torch.nonzero((size > magnitude) & (size > ratio * median)).tolist()
    places.sort(key=lambda place: -size[*place])
    return [MassiveActivation(t, c, x[t, c].item(), round((size[t, c] / median).item(), 1)) for t, c in places]


def params_of(x, granularity="tensor", bits=8, *, group_size=64):
    """Quantization parameters that hold the range of each part of ``x``.

    Parameters
    ----------
    x : float tensor, shape (tokens, channels)
    granularity : {"tensor", "token", "channel", "group"}
        What shares a scale and a zero-point; a group is ``group_size`` neighbouring channels of one token.
    bits : int, 2 to 16
    group_size : int
        Must divide the number of channels.

    Returns
    -------
    QParams

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> params_of(torch.tensor([[0.0, 2.55], [-25.5, 0.0]]), "token").scale
    tensor([0.0100, 0.1000])
    """
    _check_granularity(granularity)
    if granularity == "group":
        return zero_point_params(x, bits, group_size=group_size)
    return zero_point_params(x, bits, axis={"tensor": None, "token": 0, "channel": 1}[granularity])


def fp8(x, granularity="tensor", *, group_size=64):
    """``x`` rounded to FP8 E4M3, scaled so that the largest magnitude of each part becomes 448.

    Parameters
    ----------
    x : float tensor, shape (tokens, channels) or (N, T, channels)
    granularity : {"tensor", "token", "channel", "group"}
        What shares a scale; a group is ``group_size`` neighbouring channels of one token.
    group_size : int
        Must divide the number of channels.

    Returns
    -------
    (x_hat, scale)
        x̂ of the shape of ``x``; the scale of each value, which broadcasts to that.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Micikevicius et al. 2022, "FP8 formats for deep learning", section 3.

    Examples
    --------
    >>> fp8(torch.tensor([[448.0, 300.0, -21.0, 1.3]]))[0]
    tensor([[448.0000, 288.0000, -20.0000,   1.2500]])
    """
    _check_granularity(granularity)
    check_floats(x, axes=2)
    rows = real_array(x, "x").detach().flatten(0, -2)
    if granularity == "group":
        group_size = check_integer(group_size, "group_size", 1)
        if rows.shape[1] % group_size:
            raise ValueError(f"group_size must divide the {rows.shape[1]} channels, got {group_size}")
        largest = rows.abs().unflatten(1, (-1, group_size)).amax(2).repeat_interleave(group_size, 1)
    else:
        axes = {"tensor": (0, 1), "token": 1, "channel": 0}[granularity]
        largest = rows.abs().amax(axes, keepdim=True)
    scale = largest / 448
    scale = scale.masked_fill(scale == 0, 1)
    codes = (rows / scale).to(torch.float8_e4m3fn)
    return (scale * codes.to(scale.dtype)).to(x.dtype).view(x.shape), scale


def dynamic_quantizers(granularity="token", bits=8, *, places, group_size=64):
    """Functions for `qlab.smollm.inserted` that quantize what passes by its own range.

    Parameters
    ----------
    granularity, bits, group_size
        As `params_of`.
    places : iterable of (layer, site)

    Returns
    -------
    dict of (layer, site) to function

    Raises
    ------
    ValueError
        If there is no such granularity or ``bits`` is out of range; from a function, if it meets NaN or infinity.

    Examples
    --------
    >>> functions = dynamic_quantizers("token", bits=2, places=[(0, "attn_in")])
    >>> functions[0, "attn_in"](torch.tensor([[[0.0, 0.4, 3.0]]]))
    tensor([[[0., 0., 3.]]])
    """
    _check_granularity(granularity)
    check_bits(bits)
    return dict.fromkeys(places, partial(_by_rows, partial(
        params_of, granularity=granularity, bits=bits, group_size=group_size)))


def static_quantizers(found, bits=8, *, places=None):
    """Functions for `qlab.smollm.inserted` that quantize what passes by ranges found beforehand.

    Parameters
    ----------
    found : dict of (layer, site) to Statistics
        From `statistics`, on text for calibration.
    bits : int, 2 to 16
    places : iterable of (layer, site), optional
        Fewer than all that ``found`` has.

    Returns
    -------
    dict of (layer, site) to function

    Raises
    ------
    ValueError
        If ``bits`` is out of range or ``found`` lacks a place.
    """
    functions = {}
    for place in found if places is None else places:
        if place not in found:
            raise ValueError(f"found must have statistics of each place, got none of {place!r}")
        ends = torch.stack([found[place].low.min(), found[place].high.max()])
        params = zero_point_params(ends, bits)
        functions[place] = partial(_by_rows, lambda rows, params=params: params)
    return functions


def _by_rows(params_for, x):
    """Quantize ``x``, its tokens as the rows of a matrix, in its own precision."""
    check_floats(x)
    rows = x.reshape(-1, x.shape[-1])
    x_hat = fake_quantize(rows, params_for(rows)).view(x.shape)
    most = torch.finfo(x.dtype).max  # of half precision: the outermost level can lie above
    return x_hat if x_hat.dtype == x.dtype else x_hat.clamp(-most, most).to(x.dtype)


def check_floats(x, axes=1):
    """A ValueError unless ``x`` is a tensor of floats with so many axes or more."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < axes or x.layout != torch.strided:
        raise ValueError(f"x must be a tensor of floats with {axes} or more axes, got {described(x)}")


def _check_granularity(granularity):
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")


def _matrix(x):
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise ValueError(f"x must be a torch tensor of two dimensions, got {described(x)}")
    return real_array(x, "x").detach()
