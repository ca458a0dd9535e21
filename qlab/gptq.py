"""GPTQ and AWQ: weights of four bits, rounded so that the outputs stay, not the weights.

What counts of an error Δ = W − Ŵ is what it does to the outputs for the inputs X of some calibration text,
‖X Δᵀ‖² = ½ tr(Δ H Δᵀ), H = 2 XᵀX. GPTQ rounds a matrix column by column and lets the columns still to come make up for
the error of each. AWQ multiplies the columns that meet large activations before it rounds, as SmoothQuant does:

    calibration, evaluation = texts(model, 4, 512)
    perplexity(quantized(model, calibration, 4, act_order=True, ranges="weighted"), evaluation)
    scaled = activation_aware(model, calibration, 4, group_size=64)
    perplexity(quantized(scaled, calibration, 4, method="nearest", group_size=64), evaluation)
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from array_api_compat import is_torch_array
from tqdm.auto import tqdm

from qlab.affine import (
    QParams,
    absmax_params,
    check_bits,
    check_integer,
    dequantize,
    fake_quantize,
    is_number,
    quantize,
    real_array,
    zero_point_params,
)
from qlab.outliers import watched
from qlab.smollm import SITES, check_tokens, places_of, plain_weights, reweighted, rotary_tables, weight_names
from qlab.smoothquant import PAIRS, divided

RANGES = ("min-max", "MSE", "weighted")
"""How a range is chosen: it holds all weights; has the least Σ(w − ŵ)²; or the least Σ H_jj (w_j − ŵ_j)²."""
METHODS = ("nearest", "gptq")
_SHARES = [share / 40 for share in range(40, 7, -1)]  # of the min-max range; the largest first, so that it wins a tie
_BLOCK = 64  # columns whose errors reach those behind the block in one product


class Factor(NamedTuple):
    """What GPTQ needs of H, for columns in the order in which they are rounded.

    Parameters
    ----------
    upper : tensor, shape (n, n)
        U, upper triangular: UᵀU is the inverse of the damped H, its rows and columns in that order.
    order : int64 tensor, shape (n,)
        The columns, the first to be rounded first.
    diagonal : float tensor, shape (n,)
        Of H before damping, in the original order. Where it is 0, no input was seen.
    """

    upper: torch.Tensor
    order: torch.Tensor
    diagonal: torch.Tensor


class Compensated(NamedTuple):
    """Weights after GPTQ, or on the way.

    Parameters
    ----------
    codes : int32 tensor, shape (outputs, inputs)
    params : QParams
        ``dequantize(codes, params)`` are the quantized weights.
    weights : float tensor, shape (outputs, inputs)
        Each column with the corrections that it had received when it was rounded. Over the columns j in their order,
        Σ ((weights_j − ŵ_j) / U_jj)² is tr(Δ H Δᵀ) with the damped H: the error, column by column.
    """

    codes: torch.Tensor
    params: QParams
    weights: torch.Tensor


class Search(NamedTuple):
    """All that AWQ has tried for the layers that read one site.

    Parameters
    ----------
    alphas : float64 tensor, shape (grid,)
    errors : float64 tensor, shape (grid,)
        tr(Δ H Δᵀ) / tr(W H Wᵀ): the squared error of the outputs as a share of them.
    scales : float tensor, shape (grid, inputs)
    """

    alphas: torch.Tensor
    errors: torch.Tensor
    scales: torch.Tensor


def hessian(x):
    """H = 2 XᵀX: how much errors in two columns of a matrix count together, on the inputs x.

    It is the matrix of second derivatives of ‖X wᵀ − y‖² by the weights w of one output, the same for all outputs.

    Parameters
    ----------
    x : float array, shape (tokens, n)

    Returns
    -------
    float array, shape (n, n)
        Of NumPy or torch as ``x``.

    Raises
    ------
    ValueError
        If ``x`` has another shape, is empty or has a NaN or infinity, or H is beyond the dtype: infinite, or 0 though
        ``x`` is not.

    References
    ----------
    Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers", sections 3
    and 4.

    Examples
    --------
    >>> hessian(np.array([[1.0, 2.0], [0.0, 1.0]]))
    array([[ 2.,  4.],
           [ 4., 10.]])
    """
    tensor = _matrix(x, "x")
    h = real_array(2 * tensor.T @ tensor, "hessian(x)")
    if not h.diagonal().any() and tensor.any():
        raise ValueError(f"x must be large enough for its squares to be above 0 in {tensor.dtype}, got "
                         f"{tensor.abs().max().item():.3g} at most")
    return h if is_torch_array(x) else h.numpy()


def factor(hessian, *, damping=0.01, act_order=False):
    """The order of the columns and U with UᵀU = H⁻¹: all of GPTQ that does not depend on the weights.

    H_jj = 0 becomes 1, then ``damping`` times the mean of the diagonal is added to it, so that H can be inverted when
    there are fewer tokens than columns.

    Parameters
    ----------
    hessian : float array, shape (n, n)
        From `hessian`; any multiple of it gives the same codes.
    damping : float, ≥ 0
    act_order : bool
        Columns by falling H_jj, so that those that count most are rounded while all others can still make up for it.

    Returns
    -------
    Factor

    Raises
    ------
    ValueError
        If ``hessian`` is not symmetric with a diagonal ≥ 0, has a NaN or infinity, or is singular in spite of
        ``damping``; or ``damping`` is out of range.

    References
    ----------
    Frantar et al. 2023, section 4, step 3 (Cholesky factor and damping). The order: the code published with it.

    Examples
    --------
    >>> upper, order, _ = factor(np.array([[1.0, 0.0], [0.0, 4.0]]), damping=0, act_order=True)
    >>> order, upper
    (tensor([1, 0]), tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]], dtype=torch.float64))
    """
    diagonal, h = _checked_hessian(hessian)
    if not is_number(damping) or not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a finite number of at least 0, got {damping!r}")
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(h))
    h = h.clone()
    h.diagonal()[diagonal == 0] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    backwards = order.flip(0)  # H = R Rᵀ with R upper triangular comes from the columns in reverse; then U = R⁻¹
    lower, failed = torch.linalg.cholesky_ex(h[backwards][:, backwards])
    if failed:
        raise ValueError(f"damping must be large enough for H + damping · mean(diag H) to be positive definite, got "
                         f"{damping!r}: with fewer tokens than columns H is singular, and 0.01 is usual")
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h), dtype=h.dtype), upper=True)
    return Factor(upper, order, diagonal)


def gptq(w, hessian, bits, *, group_size=None, symmetric=False, damping=0.01, act_order=False, ranges="min-max"):
    """Quantize a matrix column by column; the columns still to come make up for the error of each.

    In the order of the columns, with U from `factor`:

        q_j = quantize(w_j)      e = (w_j − ŵ_j) / U_jj      w_k ← w_k − e U_jk  for all k after j

    This is the best correction of all that are left; see `compensated` for what happens on the way.

    Parameters
    ----------
    w : float array, shape (outputs, inputs)
        A column whose inputs are all 0 is set to 0, before any range is found. (The published code sets it to 0, too,
        but finds the range of a row with it.)
    hessian : float array, shape (inputs, inputs)
        From `hessian`.
    bits : int, 2 to 16
    group_size : int, optional
        One scale for each row and each run of so many columns, which must divide the inputs. It is found when the first
        column of the group comes up, from the group's columns as corrected by then. None: one for each row, before the
        first column.
    symmetric : bool
        Codes as `qlab.affine.absmax_params`, from −7 to 7 for 4 bits; else as `qlab.affine.zero_point_params`, −8 to 7.
    damping, act_order
        As `factor`. With ``act_order`` the groups are still those of neighbouring columns.
    ranges : {"min-max", "MSE", "weighted"}
        As `weight_params`.

    Returns
    -------
    codes : int32 array, shape (outputs, inputs)
    params : QParams
        Along axis 0, or with ``group_size``. ``dequantize(codes, params)`` is Ŵ. Of NumPy or torch as ``w``.

    Raises
    ------
    ValueError
        If a shape does not fit, ``w`` or ``hessian`` is empty or has a NaN or infinity, ``group_size`` does not divide
        the inputs, another argument is out of range, or ``hessian`` is refused by `factor`.

    References
    ----------
    Frantar et al. 2023, algorithm 1; Frantar and Alistarh 2022, "Optimal brain compression", section 5 (OBQ).

    Examples
    --------
    >>> w, x = np.array([[0.4, 0.4, 1.0]]), np.array([[1.0, 1.0, 0.0], [1.0, 0.9, 0.1]])
    >>> for h in (np.eye(3), hessian(x)):  # columns that never meet: nearest
    ...     codes, params = gptq(w, h, 2, symmetric=True)
    ...     print(codes, (x @ (w - dequantize(codes, params)).T).round(2).tolist())
    [[0 0 1]] [[0.8], [0.76]]
    [[0 1 0]] [[-0.2], [-0.04]]
    """
    codes, params, _ = compensated(w, factor(hessian, damping=damping, act_order=act_order), bits,
                                   group_size=group_size, symmetric=symmetric, ranges=ranges)
    if is_torch_array(w):
        return codes, params
    return codes.numpy(), replace(params, scale=params.scale.numpy(), zero_point=params.zero_point.numpy())


@torch.no_grad()
def compensated(w, factor, bits, *, group_size=None, symmetric=False, ranges="min-max", columns=None):
    """`gptq` by a `Factor` that is at hand, as far as some column: only the first ``columns`` pass on their error.

    Those behind them are rounded to nearest with the corrections received so far; 0 is plain rounding to nearest.

    Parameters
    ----------
    w, bits, group_size, symmetric, ranges
        As `gptq`.
    factor : Factor
    columns : int, 0 to inputs, optional
        All, if None.

    Returns
    -------
    Compensated

    Raises
    ------
    ValueError
        As `gptq`.

    Examples
    --------
    >>> w, x = torch.tensor([[0.4, 0.4, 1.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.9, 0.1]])
    >>> for columns in range(3):
    ...     now = compensated(w, factor(hessian(x)), 2, symmetric=True, columns=columns)
    ...     print(now.codes.tolist(), now.weights.numpy().round(2))
    [[0, 0, 1]] [[0.4 0.4 1. ]]
    [[0, 1, 1]] [[0.4  0.81 1.14]]
    [[0, 1, 0]] [[0.4  0.81 0.38]]
    """
    w, bits = _matrix(w, "w"), check_bits(bits)
    outputs, inputs = w.shape
    if not isinstance(factor, Factor):
        raise ValueError(f"factor must be a Factor, as factor(hessian(x)) is, got {type(factor).__name__}")
    if len(factor.order) != inputs:
        raise ValueError(f"hessian must be of shape {(inputs, inputs)} for w of shape {tuple(w.shape)}, got "
                         f"{tuple(factor.upper.shape)}")
    columns = inputs if columns is None else check_integer(columns, "columns", 0, inputs)
    size = inputs if group_size is None else _check_group_size(group_size, inputs)
    _check_ranges(ranges)
    order, diagonal, upper = factor.order, _near_one(factor.diagonal).to(w.dtype), _near_one(factor.upper).to(w.dtype)
    place, group_of, pivots = torch.argsort(order), (order // size).tolist(), upper.diagonal().tolist()
    live = torch.where(factor.diagonal > 0, w, 0)
    now = live.T[order].contiguous()  # a column lies together in memory here: as a row
    found = {}

    def grid_of(group, start=0, stop=inputs, errors=None):
        """Parameters of a group, and its least and largest q − z; once the errors since ``start`` have reached it."""
        if group not in found:
            here = slice(group * size, (group + 1) * size)
            rows, current = place[here], now[place[here]]
            if errors is not None and (late := rows >= stop).any():
                current[late] -= upper[start:start + len(errors), rows[late]].T @ errors
            p = weight_params(current.T, bits, symmetric=symmetric, ranges=ranges, diagonal=diagonal[here])
            zero_point = p.zero_point.to(w.dtype)
            found[group] = p, p.qmin - zero_point, p.qmax - zero_point
        return found[group]

    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(stop - start, outputs, dtype=w.dtype)
        for j in range(start, stop):
            p, low, high = grid_of(group_of[j], start, stop, errors[:j - start])
            steps = torch.clamp(torch.div(now[j], p.scale).round_(), low, high)  # q − z of `quantize`
            error = torch.sub(now[j], steps.mul_(p.scale), out=errors[j - start]).div_(pivots[j])
            now[j + 1:stop].addr_(upper[j, j + 1:stop], error, alpha=-1)
        now[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    params = [grid_of(group)[0] for group in range(inputs // size)]
    together = params[0] if group_size is None else QParams(
        torch.stack([p.scale for p in params], 1), torch.stack([p.zero_point for p in params], 1), params[0].qmin,
        params[0].qmax, group_size=size)
    weights = now[place].T.contiguous()
    return Compensated(quantize(weights, together), together, weights)


@torch.no_grad()
def weight_params(w, bits, *, group_size=None, symmetric=False, ranges="min-max", diagonal=None):
    """Quantization parameters of a matrix, one for each row or group.

    The range that holds all weights is best for none of them: "MSE" and "weighted" try 33 shares of it, from 1 to 0.2,
    and take the one with the least Σ_j h_j (w_j − ŵ_j)², where h is 1 or the diagonal of H.

    Parameters
    ----------
    w : float array, shape (outputs, inputs)
    bits : int, 2 to 16
    group_size : int, optional
        Of neighbouring columns, dividing the inputs; None: one range for each row.
    symmetric : bool
        As `gptq`.
    ranges : {"min-max", "MSE", "weighted"}
    diagonal : float array, shape (inputs,), ≥ 0
        For "weighted": the diagonal of `hessian`.

    Returns
    -------
    QParams
        Along axis 0, or with ``group_size``; of torch.

    Raises
    ------
    ValueError
        As `gptq`; or if ``diagonal`` has another shape, a number that is negative, NaN or infinite, or is missing.

    References
    ----------
    The search over shares: the code published with Frantar et al. 2023. Weighting by diag(H): as GPTQ's objective
    would have it if no two columns met.

    Examples
    --------
    >>> w, h = torch.tensor([[0.1, -0.1, 0.2, -0.2, 1.0]]), torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0])
    >>> for ranges in RANGES:
    ...     params = weight_params(w, 3, symmetric=True, ranges=ranges, diagonal=h)
    ...     print(ranges, fake_quantize(w, params).numpy().round(2))
    min-max [[ 0.    0.    0.33 -0.33  1.  ]]
    MSE [[ 0.    0.    0.31 -0.31  0.92]]
    weighted [[ 0.    0.    0.24 -0.24  0.72]]
    """
    w, bits = _matrix(w, "w"), check_bits(bits)
    outputs, inputs = w.shape
    _check_ranges(ranges)
    if group_size is not None:
        _check_group_size(group_size, inputs)
    along = {"axis": 0} if group_size is None else {"group_size": int(group_size)}
    params = (absmax_params if symmetric else zero_point_params)(w, bits, **along)
    if ranges == "min-max":
        return params
    h = torch.ones(inputs, dtype=w.dtype) if ranges == "MSE" else _checked_diagonal(diagonal, inputs)
    scale, zero_point = (t.reshape(outputs, -1, 1).to(w.dtype) for t in (params.scale, params.zero_point))
    w, h = w.unflatten(1, (scale.shape[1], -1)), _near_one(h).to(w.dtype).view(scale.shape[1], -1, 1)
    exponents = torch.frexp(scale).exponent.clamp(min=-126)
    w, scale = torch.ldexp(w, -exponents), torch.ldexp(scale, -exponents)  # squares stay within the dtype
    low, high, u = params.qmin - zero_point, params.qmax - zero_point, torch.empty_like(w)
    best, shares = torch.full_like(scale, math.inf), torch.ones_like(scale)
    for share in _SHARES:
        s = share * scale
        torch.maximum(torch.div(w, s, out=u).round_(), low, out=u)
        torch.minimum(u, high, out=u).mul_(s).sub_(w).square_()
        error = (u.transpose(0, 1) @ h).transpose(0, 1)
        shares[error < best] = share
        best = torch.minimum(best, error)
    return replace(params, scale=params.scale * shares.view_as(params.scale))


@torch.no_grad()
def awq_search(w, x, bits, *, group_size=None, grid=20):
    """The outputs' error after each scaling that AWQ tries: its curve over α.

    Parameters
    ----------
    w, x, bits, group_size, grid
        As `awq_scales`.

    Returns
    -------
    Search

    Raises
    ------
    ValueError
        As `awq_scales`.
    """
    x = _matrix(x, "x")
    return _search(w, (hessian(x), x.abs().mean(0)), bits, group_size=group_size, grid=grid)


def _search(w, found, bits, *, group_size, grid=20):
    """`awq_search` from what `hessians` finds."""
    w, grid = _near_one(_matrix(w, "w")), check_integer(grid, "grid", 1)
    h, size = (_near_one(t).to(w.dtype) for t in found)
    if len(size) != w.shape[1]:
        raise ValueError(f"x must be of shape (tokens, {w.shape[1]}) for w of shape {tuple(w.shape)}, got "
                         f"{len(size)} channels")
    live = size[size > 0]
    size = torch.where(size > 0, size, live.min() if len(live) else 1)
    signal = ((w @ h) * w).sum()
    alphas, scales, errors = torch.arange(grid, dtype=torch.float64) / grid, [], []
    for alpha in alphas.tolist():
        s = size**alpha
        s = s / s.max().sqrt() / s.min().sqrt()
        delta = w - fake_quantize(w * s, weight_params(w * s, bits, group_size=group_size)) / s
        scales.append(s)
        errors.append(((delta @ h) * delta).sum() / signal)
    return Search(alphas, torch.stack(errors).double(), torch.stack(scales))


def _near_one(t):
    """``t`` times a power of two, its largest magnitude from 1/2 to 1: squares and sums stay within float32."""
    exponent = torch.frexp(t.abs().max()).exponent.item()
    return t * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2)


def awq_scales(w, x, bits, *, group_size=None, grid=20):
    """s, by which the columns of a matrix are multiplied before it is rounded, and its inputs divided.

    s = mean|x|^α, divided by √(max s · min s): columns that meet large inputs get finer steps, those of their group pay
    for it. α is that of 0, 1/grid, … (grid − 1)/grid with the least error of the outputs, tr(Δ H Δᵀ).

    Parameters
    ----------
    w : float array, shape (outputs, inputs)
        All rows that read the same inputs, together.
    x : float array, shape (tokens, inputs)
        A channel that is 0 in all tokens counts as the smallest other one.
    bits : int, 2 to 16
    group_size : int, optional
        As `gptq`; rounding is asymmetric.
    grid : int, ≥ 1

    Returns
    -------
    float array, shape (inputs,)
        Of NumPy or torch as ``w``.

    Raises
    ------
    ValueError
        If a shape does not fit, an array is empty or has a NaN or infinity, ``group_size`` does not divide the inputs,
        or another argument is out of range.

    References
    ----------
    Lin et al. 2024, "AWQ: activation-aware weight quantization for LLM compression and acceleration", section 3.2,
    equations 4 and 5; the normalisation: the code published with it.

    Examples
    --------
    >>> w, x = np.array([[0.3, 1.0, -1.0]]), np.array([[9.0, 1.0, 1.0], [-9.0, 1.0, 0.5]])
    >>> awq_scales(w, x, bits=3).round(2)
    array([2.11, 0.56, 0.47])
    """
    search = awq_search(w, x, bits, group_size=group_size, grid=grid)
    s = search.scales[search.errors.argmin()]
    return s if is_torch_array(w) else s.numpy()


# The model


@torch.no_grad()
def hessians(model, tokens, sites=SITES):
    """H and mean |x| at the sites of one layer after the other, while the model reads: never of two layers at a time.

    Parameters
    ----------
    model : SmolLM
        Functions that are `qlab.smollm.inserted` act before the look.
    tokens : int64 tensor, shape (N, T)
    sites : iterable of str, of `qlab.smollm.SITES`

    Yields
    ------
    dict of (layer, site) to pair of float tensors, shapes (channels, channels) and (channels,)

    Raises
    ------
    ValueError
        If ``tokens`` has another shape or holds what is not a token, there is no such site, or an activation is NaN or
        infinite.
    """
    check_tokens(model, tokens)
    places = places_of(model, sites)
    states = [model.embedding(sequence[None]) for sequence in tokens]
    rotation = [table.to(states[0]) for table in rotary_tables(model.sizes, 0, tokens.shape[1])]

    def add(place, x):
        rows = real_array(x.flatten(0, 1), f"the activations at {place!r}")
        h, size = found.get(place, (0, 0))
        found[place] = h + hessian(rows), size + rows.abs().sum(0) / tokens.numel()

    for layer, block in enumerate(model.blocks):
        found = {}
        with watched(model, {place: partial(add, place) for place in places if place[0] == layer}):
            states = [block(state, rotation) for state in states]
        yield found


def quantized(model, tokens, bits=4, *, method="gptq", group_size=None, symmetric=False, damping=0.01, act_order=False,
              ranges="min-max", sites=SITES, progress=True):
    """A copy of the model with quantized weights in its blocks; embedding, norms and head stay in float.

    q, k and v, and gate and up, read the same inputs: they share an H. All inputs are those of the model given, not of
    a model whose earlier layers are quantized already.

    Parameters
    ----------
    model : SmolLM
        Scaled, rotated or not; what is `qlab.smollm.inserted`, such as a rotation that runs beside it, acts.
    tokens : int64 tensor, shape (N, T)
        Text for calibration.
    bits : int, 2 to 16
    method : {"gptq", "nearest"}
        "nearest" rounds each weight by itself, with the same ranges.
    group_size, symmetric, damping, act_order, ranges
        As `gptq`. A group must divide the inputs of all linear layers.
    sites : iterable of str, of `qlab.smollm.SITES`
        Whose weights are quantized.
    progress : bool
        Show a bar.

    Returns
    -------
    SmolLM
        "4-bit weights", with the number of bits, is added to its ``changes``.

    Raises
    ------
    ValueError
        As `gptq` and `hessians`, if there is no such method, or the model is not a plain one (see
        `qlab.smollm.reweighted`).
    """
    old, bits, weights = plain_weights(model), check_bits(bits), {}
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    options = {"group_size": group_size, "symmetric": symmetric, "ranges": ranges}
    for place, (h, _) in _places(model, tokens, sites, "Quantizing", progress):
        names = weight_names(*place)
        w = torch.cat([old[name] for name in names])
        if method == "nearest":
            w_hat = fake_quantize(w, weight_params(w, bits, diagonal=h.diagonal(), **options))
        else:
            codes, params, _ = compensated(w, factor(h, damping=damping, act_order=act_order), bits, **options)
            w_hat = dequantize(codes, params)
        rows = w_hat.split([len(old[name]) for name in names])
        weights |= {name: row.to(old[name].dtype) for name, row in zip(names, rows, strict=True)}
    return reweighted(model, weights, f"{bits}-bit weights")


def activation_aware(model, tokens, bits=4, *, group_size=None, progress=True):
    """A copy of the model that computes the same with weights scaled by AWQ, for `quantized` to round.

    ``o`` is left alone: three heads of queries share one of values, so that no layer before it could be divided.

    Parameters
    ----------
    model : SmolLM
        As loaded.
    tokens : int64 tensor, shape (N, T)
        Text for calibration.
    bits, group_size
        As `awq_scales`.
    progress : bool
        Show a bar.

    Returns
    -------
    SmolLM
        "smoothed" is added to its ``changes``: only the choice of the scales is another than in `qlab.smoothquant`.

    Raises
    ------
    ValueError
        As `awq_scales`, `hessians` and `qlab.smoothquant.divided`.

    References
    ----------
    Lin et al. 2024, section 3.2.
    """
    old, scales = plain_weights(model), {}
    for place, found in _places(model, tokens, PAIRS, "Scaling", progress):
        w = torch.cat([old[name] for name in weight_names(*place)])
        search = _search(w, found, bits, group_size=group_size)
        scales[place] = search.scales[search.errors.argmin()]
    return divided(model, scales)


def _places(model, tokens, sites, what, progress):
    """Each place and what `hessians` found there, with a bar over the layers."""
    for found in tqdm(hessians(model, tokens, sites), desc=what, total=len(model.blocks), unit="layer",
                      disable=not progress):
        yield from found.items()


# Checks


def _matrix(x, name):
    """``x`` as a torch tensor of two axes, without a gradient."""
    x = _tensor(x, name)
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(x.shape)}")
    return x


def _tensor(x, name):
    x = real_array(x, name)
    return x.detach() if is_torch_array(x) else torch.from_numpy(np.array(x, order="C"))  # torch wants it writable


def _checked_hessian(hessian):
    """Its diagonal, and all of it."""
    h = _matrix(hessian, "hessian")
    diagonal = h.diagonal().clone()
    if h.shape[0] != h.shape[1] or (h - h.T).abs().max() > 1e-3 * diagonal.max() or diagonal.min() < 0:
        raise ValueError(f"hessian must be square and symmetric with a diagonal of at least 0, got shape "
                         f"{tuple(h.shape)} and a least diagonal of {diagonal.min().item():.3g}")
    return diagonal, h


def _checked_diagonal(diagonal, inputs):
    if diagonal is None:
        raise ValueError("diagonal must be given for weighted ranges: hessian(x).diagonal(); got None")
    h = _tensor(diagonal, "diagonal")
    if tuple(h.shape) != (inputs,) or h.min() < 0:
        raise ValueError(f"diagonal must be of shape {(inputs,)} and nowhere less than 0, got shape {tuple(h.shape)} "
                         f"and a least value of {h.min().item():.3g}")
    return h


def _check_group_size(group_size, inputs):
    size = check_integer(group_size, "group_size", 1)
    if inputs % size:
        near = [divisor for divisor in range(1, inputs + 1) if inputs % divisor == 0]
        near = sorted(near, key=lambda divisor: abs(math.log(divisor / size)))[:3]
        raise ValueError(f"group_size must divide the {inputs} inputs, as {', '.join(map(str, sorted(near)))} would, "
                         f"got {size}")
    return size


def _check_ranges(ranges):
    if ranges not in RANGES:
        raise ValueError(f"ranges must be one of {', '.join(RANGES)}, got {ranges!r}")
