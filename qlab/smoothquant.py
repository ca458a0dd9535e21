"""SmoothQuant: what is hard to quantize in the activations moves into the weights, channel by channel.

X Wᵀ = (X S⁻¹)(W S)ᵀ for any diagonal S: each channel of the activations is divided by its s, and the column of the
weights that meets it multiplied. The division disappears into the layer before:

    found = statistics(model, calibration)
    smoothed = smooth(model, found, alpha=0.8)
    quantized_model, functions = quantized(smoothed, "O3", statistics(smoothed, calibration))
    with inserted(quantized_model, functions):
        perplexity(quantized_model, evaluation)
"""

from dataclasses import replace

import numpy as np
import torch

from qlab.affine import alike, array_namespace, is_number, real_array
from qlab.outliers import dynamic_quantizers, static_quantizers
from qlab.smollm import SITES, check_places, places_of, plain_weights, quantize_weights, reweighted, weight_names

PAIRS = {"attn_in": "attn_norm", "mlp_in": "mlp_norm", "down_in": "up"}
"""For each site, the layer whose outputs are divided by s: the columns of those that read the site are multiplied.

The first two are the paper's. The third is an extension: the product silu(gate) · up is linear in up.
"""
LEVELS = {"O1": "per token, dynamic", "O2": "per tensor, dynamic", "O3": "per tensor, static"}
"""How the levels of the paper's table 2 quantize activations; they quantize weights per tensor."""
_OF_DEAD = 1e-5


def smoothing_scales(x_absmax, w_absmax, alpha):
    """s = a^α / w^(1−α), the numbers that the channels of the activations are divided by.

    α = 1 makes all channels of the activations equally large, α = 0 all columns of the weights. A column of zeros
    counts as w = 1e-5, and a channel in which no activation was seen has s = 1e-5, unless α = 0. (In the published
    code, no w and no s is less than 1e-5, so that it does not work in units in which all numbers are small.)

    Parameters
    ----------
    x_absmax : float array, shape (channels,), ≥ 0
        a, the largest magnitude in each channel of the activations.
    w_absmax : float array, shape (channels,), ≥ 0
        w, the largest magnitude in each column of the weights that meet them.
    alpha : float, 0 to 1
        The migration strength α.

    Returns
    -------
    float array, shape (channels,)
        Greater than 0 and finite.

    Raises
    ------
    ValueError
        If the shapes differ or are not of one axis, a number is negative, NaN or infinite, or ``alpha`` is out of
        range.

    References
    ----------
    Xiao et al. 2023, "SmoothQuant: accurate and efficient post-training quantization for large language models",
    equation 4.

    Examples
    --------
    >>> smoothing_scales(np.array([16.0, 1.0]), np.array([1.0, 4.0]), alpha=0.5)
    array([4. , 0.5])
    """
    x_absmax, w_absmax = alike(real_array(x_absmax, "x_absmax"), real_array(w_absmax, "w_absmax"))
    for name, value in (("x_absmax", x_absmax), ("w_absmax", w_absmax)):
        if value.ndim != 1 or bool((value < 0).any()):
            raise ValueError(f"{name} must be of one axis and nowhere less than 0, got shape {tuple(value.shape)} and "
                             f"a least value of {float(value.min())}")
    if x_absmax.shape != w_absmax.shape:
        raise ValueError(f"x_absmax and w_absmax must have the same shape, got {tuple(x_absmax.shape)} and "
                         f"{tuple(w_absmax.shape)}")
    alpha = _check_alpha(alpha)
    xp = array_namespace(x_absmax, w_absmax)
    w_absmax = xp.where(w_absmax > 0, w_absmax, xp.full_like(w_absmax, _OF_DEAD))
    with np.errstate(over="ignore"):
        s = x_absmax**alpha / w_absmax ** (1 - alpha)
    limits = xp.finfo(s.dtype)
    s = xp.where((x_absmax > 0) | (alpha == 0), s, xp.full_like(s, _OF_DEAD))
    return xp.clip(s, limits.smallest_normal, limits.max)


def smooth(model, found, alpha=0.5, *, sites=("attn_in", "mlp_in")):
    """A copy of the model that computes the same with smoother activations.

    Each s comes from the weights of the model as loaded, whichever sites are smoothed.

    Parameters
    ----------
    model : SmolLM
        As loaded.
    found : dict of (layer, site) to Statistics
        From `qlab.outliers.statistics`, on text for calibration.
    alpha : float, or dict of site to float, 0 to 1
        As `smoothing_scales`.
    sites : iterable of str, of ``PAIRS``
        The paper's two; or "down_in" as well.

    Returns
    -------
    SmolLM
        "smoothed" is added to its ``changes``.

    Raises
    ------
    ValueError
        If the model was changed before or is not a plain one (see `qlab.smollm.reweighted`), ``alpha`` is out of range
        or lacks a site, ``found`` lacks a place or has one that the model has not, or there is no pair for a site.

    References
    ----------
    Xiao et al. 2023, section 4 and figure 5.
    """
    return divided(model, _scales(model, found, alpha, sites))


def divided(model, scales):
    """A copy of the model whose activations are divided by s at some sites, and whose weights there multiplied by it.

    Parameters
    ----------
    model : SmolLM
        As loaded.
    scales : dict of (layer, site) to float tensor, shape (channels,), > 0
        s; sites of ``PAIRS``.

    Returns
    -------
    SmolLM
        Computes what ``model`` computes; "smoothed" is added to its ``changes``.

    Raises
    ------
    ValueError
        If the model was changed before or is not a plain one (see `qlab.smollm.reweighted`), there is no such place or
        no pair for a site, or an s has another shape or a number that is not finite and greater than 0.
    """
    weights, changed = plain_weights(model), set()
    _check_unchanged(model)
    for layer, site in check_places(model, scales, PAIRS, "scales must have keys"):
        before = PAIRS[site]
        names = [f"blocks.{layer}.{before}.weight", *weight_names(layer, site)]
        s = real_array(scales[layer, site], f"scales[{(layer, site)!r}]")
        if tuple(s.shape) != (weights[names[0]].shape[0],) or not bool((s > 0).all()):
            raise ValueError(f"scales must be of shape {(weights[names[0]].shape[0],)} and greater than 0, got shape "
                             f"{tuple(s.shape)} and a least value of {float(s.min())} at {(layer, site)!r}")
        changed |= set(names)
        weights[names[0]] = weights[names[0]] / (s if before.endswith("norm") else s[:, None])
        for name in names[1:]:
            weights[name] = weights[name] * s
    return reweighted(model, {name: weights[name] for name in changed}, "smoothed")


def smoothed_statistics(model, found, alpha=0.5, *, sites=("attn_in", "mlp_in")):
    """The `Statistics` of the model that `smooth` makes of the same arguments, without another calibration.

    Smoothing divides what passes a site by s, so the range of each channel is divided by it too.

    Parameters
    ----------
    model, found, alpha, sites
        As `smooth`.

    Returns
    -------
    dict of (layer, site) to Statistics
        All places of ``found``.

    Raises
    ------
    ValueError
        As `smooth`.
    """
    scales = _scales(model, found, alpha, sites)
    return found | {place: replace(found[place], low=found[place].low / s, high=found[place].high / s)
                    for place, s in scales.items()}


def _scales(model, found, alpha, sites):
    """s for each (layer, site), from the weights as they are."""
    weights, sites = plain_weights(model), list(sites)
    _check_unchanged(model)
    for site in sites:
        if site not in PAIRS:
            raise ValueError(f"sites must be of {', '.join(PAIRS)}, got {site!r}")
    alphas = alpha if isinstance(alpha, dict) else dict.fromkeys(sites, alpha)
    _check_found(model, found)
    scales = {}
    for site in sites:
        if site not in alphas:
            raise ValueError(f"alpha must have a number for {site!r}, got {alphas}")
        for layer in range(len(model.blocks)):
            if (layer, site) not in found:
                raise ValueError(f"found must have statistics of each place, got none of {(layer, site)!r}")
            columns = torch.cat([weights[name] for name in weight_names(layer, site)])
            scales[layer, site] = smoothing_scales(found[layer, site].absmax, columns.abs().amax(0), alphas[site])
    return scales


def _check_unchanged(model):
    if model.changes:
        raise ValueError(f"model must be as loaded, got one that was changed: {', '.join(model.changes)}")


def _check_found(model, found):
    """A ValueError if ``found`` has places that the model has not: it is then of another model."""
    if not isinstance(found, dict):
        raise ValueError(f"found must be a dict of statistics, got {type(found).__name__}")
    check_places(model, found, SITES, "found must be statistics of this model, by")


def quantized(model, level, found=None, bits=8, *, per_channel=False, sites=SITES):
    """Quantize weights, and say how to quantize activations: the levels O1, O2 and O3 of the paper.

    The paper also quantizes the two products inside the attention; here they stay in float, as embedding and head do.

    Parameters
    ----------
    model : SmolLM
        Smoothed or not.
    level : {"O1", "O2", "O3"}
        As ``LEVELS``.
    found : dict of (layer, site) to Statistics
        For O3, of this very model: smoothing changes the ranges.
    bits : int, 2 to 16
        Of weights and activations.
    per_channel : bool
        One scale for each row of the weights, where the paper has one for each matrix. A few rows of ``down``, whose
        columns "down_in" has multiplied, and of ``up``, which it has divided, would else set the scale of all others.
    sites : iterable of str, of `qlab.smollm.SITES`
        Where activations, and the weights that they meet, are quantized.

    Returns
    -------
    model : SmolLM
        A copy with quantized weights.
    functions : dict of (layer, site) to function
        For `qlab.smollm.inserted`.

    Raises
    ------
    ValueError
        If there is no such level or site, ``found`` is missing, lacks a place or has one that the model has not,
        ``bits`` is out of range, or the model is not a plain one (see `qlab.smollm.reweighted`).

    References
    ----------
    Xiao et al. 2023, table 2.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if level == "O3" and found is None:
        raise ValueError("found must be the statistics of the model for level O3, got None")
    sites = list(sites)
    places = places_of(model, sites)
    if level == "O3":
        _check_found(model, found)
        functions = static_quantizers(found, bits, places=places)
    else:
        functions = dynamic_quantizers("token" if level == "O1" else "tensor", bits, places=places)
    return quantize_weights(model, bits, per_channel=per_channel, sites=sites), functions


def _check_alpha(alpha):
    if not is_number(alpha) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
    return float(alpha)
