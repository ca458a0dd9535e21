"""Outliers in the activations of a language model: look at them, count them, and quantize in spite of them.

Everything here takes a `qlab.smollm.SmolLM`; a place in it is a pair (layer, site), such as (11, "down_in").
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from qlab.affine import (
    absmax_params,
    check_bits,
    fake_quantize,
    quantize,
    real_array,
    zero_point_params,
)
from qlab.smollm import READERS, SITES, check_tokens, inserted

GRANULARITIES = ("tensor", "token", "channel", "group")


@dataclass(frozen=True)
class Statistics:
    """What passed one site.

    Parameters
    ----------
    low, high : float tensors, shape (channels,)
        The least and the largest value of each channel.
    token_absmax : float tensor, shape (N, T)
        The largest magnitude in each token.
    kurtosis : float
        Of all values together: 3 for a normal distribution.
    """

    low: torch.Tensor
    high: torch.Tensor
    token_absmax: torch.Tensor
    kurtosis: float

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


class Decomposed(NamedTuple):
    """A product of matrices, part in integers, part in float."""

    product: torch.Tensor
    float_channels: torch.Tensor  # the columns of x that stayed in float


def capture(model, tokens, places, *, progress=False):
    """The activations at some places while the model reads.

    Parameters
    ----------
    model : SmolLM
    tokens : int64 tensor, shape (N, T)
    places : iterable of (layer, site)
    progress : bool

    Returns
    -------
    dict of (layer, site) to float32 tensor, shape (N · T, channels)

    Raises
    ------
    ValueError
        If ``tokens`` has another shape or holds what is not a token, or there is no such place.
    """
    found = {place: [] for place in places}
    _watch(model, tokens, {place: parts.append for place, parts in found.items()}, progress)
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
        As `capture`, or if ``outputs`` is less than 1.
    """
    if outputs < 1:
        raise ValueError(f"outputs must be at least 1, got {outputs}")
    captured = capture(model, tokens, places)
    return {(layer, site): (x, getattr(model.blocks[layer], READERS[site][0]).weight[:outputs])
            for (layer, site), x in captured.items()}


def statistics(model, tokens, sites=SITES, *, progress=False):
    """`Statistics` of every layer at some sites, without keeping the activations.

    Parameters
    ----------
    model : SmolLM
    tokens : int64 tensor, shape (N, T)
    sites : iterable of str, of `qlab.smollm.SITES`
    progress : bool

    Returns
    -------
    dict of (layer, site) to Statistics

    Raises
    ------
    ValueError
        As `capture`.
    """
    sums = {place: _Sums() for place in product(range(len(model.blocks)), sites)}
    _watch(model, tokens, {place: place_sums.add for place, place_sums in sums.items()}, progress)
    return {place: place_sums.result() for place, place_sums in sums.items()}


class _Sums:
    def __init__(self):
        self.low, self.high, self.tokens = [], [], []
        self.count, self.powers = 0, torch.zeros(4, dtype=torch.float64)

    def add(self, x):
        self.low.append(x.amin((0, 1)))
        self.high.append(x.amax((0, 1)))
        self.tokens.append(x.abs().amax(2))
        x = x.flatten().double()
        square = x.square()
        self.powers += torch.stack([x.sum(), square.sum(), square @ x, square @ square])
        self.count += x.numel()

    def result(self):
        first, second, third, fourth = (self.powers / self.count).tolist()
        low, high, variance = torch.stack(self.low).amin(0), torch.stack(self.high).amax(0), second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return Statistics(low, high, torch.cat(self.tokens),
                          central / variance**2 if low.min() < high.max() else float("nan"))


@torch.inference_mode()
def _watch(model, tokens, callbacks, progress):
    """Call ``callbacks[place](x)`` with what passes there, sequence by sequence."""
    check_tokens(tokens)
    layers = range(len(model.blocks))
    for place in callbacks:
        if place not in {(layer, site) for layer in layers for site in SITES}:
            raise ValueError(f"places must be pairs (layer, site), a layer from 0 to {layers[-1]} and a site of "
                             f"{', '.join(SITES)}, got {place!r}")

    def look(callback, x):
        callback(x)
        return x

    with inserted(model, {place: partial(look, callback) for place, callback in callbacks.items()}):
        for sequence in tqdm(tokens, desc="reading", disable=not progress, leave=False):
            model.hidden(sequence[None])


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
    x = torch.as_tensor(real_array(x, "x")).double()
    if x.min() == x.max():
        return float("nan")
    deviation = x - x.mean()
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
    if not factor > 1:
        raise ValueError(f"factor must be greater than 1, got {factor}")
    typical = x.abs().median(0).values
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
    if not (magnitude > 0 and ratio > 0):
        raise ValueError(f"magnitude and ratio must be greater than 0, got {magnitude} and {ratio}")
    size = x.abs()
    median = size.median()
    places = torch.nonzero((size > magnitude) & (size > ratio * median)).tolist()
    places.sort(key=lambda place: -size[*place])
    return [MassiveActivation(t, c, x[t, c].item(), round((size[t, c] / median).item(), 1)) for t, c in places]


def decompose(x, weight, threshold=6.0, bits=8):
    """x Wᵀ in integers, but for the channels in which some |x| reaches the threshold: those are multiplied in float.

    Parameters
    ----------
    x : float tensor, shape (tokens, channels)
        One scale for each token.
    weight : float tensor, shape (outputs, channels)
        One scale for each output.
    threshold : float, > 0
        In units of ``x``.
    bits : int, 2 to 16

    Returns
    -------
    Decomposed
        The product, shape (tokens, outputs), and the channels that stayed in float.

    Raises
    ------
    ValueError
        If a matrix has another shape, is empty or has a NaN or infinity, or an argument is out of range.

    References
    ----------
    Dettmers et al. 2022, "LLM.int8(): 8-bit matrix multiplication for transformers at scale", section 3, equation 8.

    Examples
    --------
    >>> x, weight = torch.tensor([[0.5, 60.0], [1.0, -60.0]]), torch.tensor([[1.0, 0.1]])
    >>> product, in_float = decompose(x, weight)
    >>> [round(y, 3) for y in product.flatten().tolist()], in_float.tolist()
    ([6.5, -5.0], [1])
    """
    x, weight, bits = _matrix(x), _matrix(weight, "weight"), check_bits(bits)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"weight must have as many columns as x, {x.shape[1]}, got {weight.shape[1]}")
    if not threshold > 0:
        raise ValueError(f"threshold must be greater than 0, got {threshold}")
    weight = weight.to(x.dtype)
    in_float = (x.abs() >= threshold).any(0)
    product = x[:, in_float] @ weight[:, in_float].T
    if not in_float.all():
        small_x, small_w = x[:, ~in_float], weight[:, ~in_float]
        x_params, w_params = absmax_params(small_x, bits, axis=0), absmax_params(small_w, bits, axis=0)
        sums = (quantize(small_x, x_params).double() @ quantize(small_w, w_params).double().T).to(x.dtype)  # exact
        product = product + x_params.scale[:, None] * w_params.scale * sums
    return Decomposed(product, torch.nonzero(in_float).flatten())


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
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if granularity == "group":
        return zero_point_params(x, bits, group_size=group_size)
    return zero_point_params(x, bits, axis={"tensor": None, "token": 0, "channel": 1}[granularity])


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

    Examples
    --------
    >>> functions = dynamic_quantizers("token", bits=2, places=[(0, "attn_in")])
    >>> functions[0, "attn_in"](torch.tensor([[[0.0, 0.4, 3.0]]]))
    tensor([[[0., 0., 3.]]])
    """
    def function(x):
        rows = x.flatten(0, -2)
        return fake_quantize(rows, params_of(rows, granularity, bits, group_size=group_size)).view(x.shape)

    return dict.fromkeys(places, function)


def static_quantizers(found, bits=8, *, per_channel=False, places=None):
    """Functions for `qlab.smollm.inserted` that quantize what passes by ranges found beforehand.

    Parameters
    ----------
    found : dict of (layer, site) to Statistics
        From `statistics`, on text for calibration.
    bits : int, 2 to 16
    per_channel : bool
        A range for each channel instead of one for the tensor: a simulation that no integer product can follow.
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
        low, high = found[place].low, found[place].high
        ends = torch.stack([low, high]) if per_channel else torch.stack([low.min(), high.max()])
        functions[place] = _static(zero_point_params(ends, bits, axis=1 if per_channel else None))
    return functions


def _static(params):
    return lambda x: fake_quantize(x.flatten(0, -2), params).view(x.shape)


def _matrix(x, name="x"):
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a torch tensor of two dimensions, got {got}")
    return real_array(x, name)
