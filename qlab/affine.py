"""Affine quantization: q = clip(rint(x / s) + z, qmin, qmax) and x̂ = s (q − z).

One body of code serves NumPy arrays and torch tensors. Rounding is half to even, the zero-point is added after
rounding, and 0 is always represented exactly: bit for bit what ONNX QuantizeLinear does. torch.fake_quantize multiplies
by 1 / s where these divide by s, which can differ by one step at ties.

Symbols: x real value, q integer code, x̂ dequantized value, s scale, z zero-point, α and β the ends of the range,
b bits.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace as compat_namespace
from array_api_compat import is_array_api_obj, is_torch_array

MIN_BITS, MAX_BITS = 2, 16
LARGEST_END = float(np.finfo(np.float32).max) / 2  # the levels of any range up to here are finite in float32
_EXACT_IN_FLOAT32 = 2**24  # integers up to here
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class QParams:
    """Scale, zero-point and code limits of an affine quantizer.

    Parameters
    ----------
    scale : float array, > 0
        Step between neighbouring levels, in the units of the data: 0-d for a whole tensor, of shape ``(C,)`` per
        axis, of shape ``(..., n / group_size)`` per group. A Python number becomes float32; codes are computed in the
        wider one of the dtypes of the scale and the data (in torch, a 0-d scale leaves it to the data).
    zero_point : int32 array
        The code that means 0. Same shape as ``scale``.
    qmin, qmax : int
        The smallest and the largest code, within int32.
    axis : int or None
        The axis of the data that ``scale`` runs along.
    group_size : int or None
        Length of the groups that the last axis of the data is cut into.

    Raises
    ------
    ValueError
        If a scale is not finite and positive (in float32, for a Python number), a level is not finite in the dtype of
        the scale, ``qmin >= qmax``, a limit is not in int32, a zero-point is not an integer within [qmin, qmax], or
        both ``axis`` and ``group_size`` are given.

    Examples
    --------
    >>> QParams(np.float32(0.5), 3, -128, 127)
    QParams(scale=0.5, zero_point=3, qmin=-128, qmax=127)
    """

    scale: Any
    zero_point: Any
    qmin: int
    qmax: int
    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self):
        scale = real_array(self.scale, "scale")
        if not is_array_api_obj(self.scale):
            with np.errstate(over="ignore"):
                scale = scale.astype(np.float32)
        xp = array_namespace(scale)
        if not bool(xp.all((scale > 0) & xp.isfinite(scale))):
            raise ValueError(f"scale must be greater than 0 and finite in {scale.dtype}, got {_short(self.scale)}")
        qmin = check_integer(self.qmin, "qmin", _INT32_MIN, _INT32_MAX - 1)
        qmax = check_integer(self.qmax, "qmax", qmin + 1, _INT32_MAX)
        if self.axis is not None and self.group_size is not None:
            raise ValueError(f"axis and group_size exclude each other, got {self.axis} and {self.group_size}")
        zero_point = plain_array(self.zero_point, "zero_point")
        boolean = str(zero_point.dtype).endswith("bool")
        zero_point = xp.astype(_like(scale, real_array(zero_point, "zero_point")), xp.float64)  # holds all of int32
        whole = (zero_point >= qmin) & (zero_point <= qmax) & (zero_point == xp.round(zero_point))
        if boolean or not bool(xp.all(whole)):
            raise ValueError(f"zero_point must be an integer from {qmin} to {qmax}, got {_short(self.zero_point)}")
        if tuple(zero_point.shape) != tuple(scale.shape):
            raise ValueError(f"zero_point must have the shape of scale, {tuple(scale.shape)}, "
                             f"got {tuple(zero_point.shape)}")
        steps = xp.maximum(zero_point - qmin, qmax - zero_point)
        if not bool(xp.all(scale <= xp.finfo(scale.dtype).max / steps)):
            raise ValueError(f"scale must give levels that are finite in {scale.dtype}, got {_short(self.scale)} "
                             f"with codes from {qmin} to {qmax}")
        values = {"scale": scale, "zero_point": xp.asarray(zero_point, dtype=xp.int32), "qmin": qmin, "qmax": qmax}
        for field, value in values.items():
            object.__setattr__(self, field, value)

    def __repr__(self):
        what = f"scale={_short(self.scale)}, zero_point={_short(self.zero_point)}, qmin={self.qmin}, qmax={self.qmax}"
        return f"QParams({what}{_if_set('axis', self.axis)}{_if_set('group_size', self.group_size)})"


class ErrorSplit(NamedTuple):
    """Mean squared error in two parts: inside the range (rounding) and outside of it (clipping)."""

    rounding: Any
    clipping: Any

    @property
    def total(self):
        """The mean squared error: rounding + clipping."""
        return self.rounding + self.clipping


def absmax_params(x, bits=8, *, axis=None, group_size=None):
    """Symmetric quantization parameters that reach the largest magnitude in ``x``.

    s = max|x| / qmax, z = 0 and codes from −qmax to qmax: the code −2^(b−1) is not used.

    Parameters
    ----------
    x : float array, any shape
    bits : int, 2 to 16
    axis : int or None
        One scale for each index along this axis; one for the whole array if None.
    group_size : int or None
        One scale for each run of ``group_size`` neighbours along the last axis, which it must divide.

    Returns
    -------
    QParams
        scale in the units of ``x`` (1 where all values are 0); zero_point 0.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, ``bits`` is out of range, or ``axis`` or ``group_size`` does
        not fit the shape of ``x``.

    References
    ----------
    Gholami et al. 2022, "A survey of quantization methods for efficient neural network inference", section III-C.

    Examples
    --------
    >>> p = absmax_params(np.float32([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8]))
    >>> round(float(p.scale), 6), int(p.zero_point), p.qmin, p.qmax
    (0.085039, 0, -127, 127)
    """
    alpha, beta = _observed_range(x, axis, group_size)
    return _params(alpha, beta, bits, symmetric=True, axis=axis, group_size=group_size)


def zero_point_params(x, bits=8, *, axis=None, group_size=None):
    """Asymmetric quantization parameters that cover the range of ``x``.

    s = (β − α) / (2^b − 1) and z = qmin − rint(α / s), where [α, β] is [min x, max x] widened to hold 0, so that 0
    is represented exactly.

    Parameters
    ----------
    x : float array, any shape
    bits : int, 2 to 16
    axis : int or None
        One scale and zero-point for each index along this axis; one for the whole array if None.
    group_size : int or None
        One scale and zero-point for each run of ``group_size`` neighbours along the last axis.

    Returns
    -------
    QParams
        scale in the units of ``x``; zero_point and limits in integer steps. All values 0: scale 1, zero-point 0.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, ``bits`` is out of range, or ``axis`` or ``group_size`` does
        not fit the shape of ``x``.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", section 2.1 and equation 13.

    Examples
    --------
    >>> p = zero_point_params(np.float32([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8]))
    >>> round(float(p.scale), 6), int(p.zero_point)
    (0.072118, -23)
    """
    alpha, beta = _observed_range(x, axis, group_size)
    return _params(alpha, beta, bits, axis=axis, group_size=group_size)


def range_params(alpha, beta, bits=8, *, symmetric=False, narrow=False, signed=True, axis=None):
    """Quantization parameters for a range [α, β] that you choose.

    Parameters
    ----------
    alpha, beta : float or float array of shape ``(C,)``
        Ends of the range, in the units of the data, ``alpha < beta``. The range is widened to hold 0.
    bits : int, 2 to 16
    symmetric : bool
        s = max(|α|, |β|) / (2^(b−1) − 1) and a zero-point in the middle, as `absmax_params`; always narrow.
    narrow : bool
        Leave out the lowest code: 2^b − 2 steps (254 for 8 bits) instead of 2^b − 1 (255).
    signed : bool
        Codes around 0 (int8: −128…127) or from 0 up (uint8: 0…255). The levels are the same.
    axis : int or None
        The axis of the data that the entries of ``alpha`` and ``beta`` belong to.

    Returns
    -------
    QParams
        When ``alpha`` and ``beta`` are Python numbers, computed in float64, with the scale in float32, as int8 hardware
        stores it; else in the dtype of the arrays. The last digit of a scale can differ, and a zero-point at a tie:
        for [−1, 1] it is 0 from Python numbers, and −1 in float32, as in ONNX Runtime.

    Raises
    ------
    ValueError
        If an end is NaN or infinite (as a Python number: beyond half of the largest float32), ``alpha >= beta``, or
        ``bits`` is out of range.

    References
    ----------
    Gholami et al. 2022, equation 3; Nagel et al. 2021, "A white paper on neural network quantization", section 2.2.

    Examples
    --------
    >>> range_params(-1.577, 192.344, narrow=True)
    QParams(scale=0.763469, zero_point=-125, qmin=-127, qmax=127)
    >>> range_params(-1.577, 192.344, signed=False)
    QParams(scale=0.760475, zero_point=2, qmin=0, qmax=255)
    """
    plain = not (is_array_api_obj(alpha) or is_array_api_obj(beta))
    alpha, beta = alike(real_array(alpha, "alpha"), real_array(beta, "beta"))
    if not bool((alpha < beta).all()):
        raise ValueError(f"alpha must be less than beta, got alpha={_short(alpha)} and beta={_short(beta)}")
    if plain and bool((alpha < -LARGEST_END).any() or (beta > LARGEST_END).any()):
        raise ValueError(f"alpha and beta must be from {-LARGEST_END:.3g} to {LARGEST_END:.3g}, "
                         f"got alpha={_short(alpha)} and beta={_short(beta)}")
    params = _params(alpha, beta, bits, symmetric=symmetric, narrow=narrow, signed=signed, axis=axis)
    if not plain:
        return params
    return replace(params, scale=np.maximum(params.scale, np.finfo(np.float32).smallest_normal).astype(np.float32))


def quantize(x, params):
    """Integer codes q = clip(rint(x / s) + z, qmin, qmax).

    Parameters
    ----------
    x : float array, any shape
        NumPy or torch.
    params : QParams

    Returns
    -------
    int32 array, shape of ``x``
        int32, so that ``q - z`` cannot overflow in your own arithmetic; ``astype`` to int8 to store it.

    Raises
    ------
    ValueError
        If ``x`` is empty, has a NaN or infinity, or has not the shape that ``params`` asks for.

    References
    ----------
    ONNX operator QuantizeLinear.

    Examples
    --------
    >>> x = np.float32([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])
    >>> quantize(x, absmax_params(x)).tolist()
    [64, 36, -89, 0, -23, -54, 127]
    """
    x = real_array(x, "x")
    xp = array_namespace(x)
    scale, zero_point = _broadcast(params, x, xp)
    return xp.astype(_codes(xp.round(_in_steps(x, scale, params, xp)), zero_point, params, xp), xp.int32)


def dequantize(q, params):
    """Real values x̂ = s (q − z).

    Parameters
    ----------
    q : integer array, any shape
    params : QParams

    Returns
    -------
    float array, shape of ``q``, dtype of ``params.scale``

    Raises
    ------
    ValueError
        If ``q`` is empty or has not the shape that ``params`` asks for.

    Examples
    --------
    >>> dequantize(np.array([-128, -23, 127]), QParams(0.07211765, -23, -128, 127)).round(4)
    array([-7.5724,  0.    , 10.8176], dtype=float32)
    """
    q = real_array(q, "q")
    xp = array_namespace(q)
    scale, zero_point = _broadcast(params, q, xp)
    return scale * xp.astype(xp.astype(q, xp.float64) - zero_point, scale.dtype)


def fake_quantize(x, params):
    """Quantize and dequantize: the value x̂ that takes the place of x, in floating point.

    Equal bit for bit to ``dequantize(quantize(x, params), params)``. For torch tensors the gradient is that of the
    straight-through estimator: 1 where the rounded value is inside [qmin, qmax], 0 outside, as in torch; a scale that
    requires gradients receives those that follow from it. (LSQ asks before rounding, half a step earlier: `qlab.qat`.)

    Parameters
    ----------
    x : float array, any shape
    params : QParams

    Returns
    -------
    float array, shape of ``x``, dtype of ``params.scale``

    Raises
    ------
    ValueError
        As `quantize`.

    References
    ----------
    Jacob et al. 2018, equation 12; Bengio et al. 2013 (straight-through estimator); Esser et al. 2020, "Learned
    step size quantization", equation 3.

    Examples
    --------
    >>> fake_quantize(np.float32([0.2, 0.5, 0.8, 9.0]), range_params(-4, 3, bits=3)).tolist()
    [0.0, 0.0, 1.0, 3.0]
    """
    x = real_array(x, "x")
    xp = array_namespace(x)
    scale, zero_point = _broadcast(params, x, xp)
    u = _in_steps(x, scale, params, xp)
    if is_torch_array(u) and not u.requires_grad and u.dtype == scale.dtype == zero_point.dtype:
        # In place: new memory for each step would take most of the time.
        return u.round_().add_(zero_point).clamp_(params.qmin, params.qmax).sub_(zero_point).mul_(scale)
    rounded = xp.round(u)
    if is_torch_array(u) and u.requires_grad:
        if not _slopes_are_finite(u, scale, xp):
            return _with_slopes(x, scale, u.detach(), _codes(rounded.detach(), zero_point, params, xp) - zero_point, xp)
        rounded = u + (rounded - u).detach()  # straight through: the value is exact, the gradient that of u
    return scale * xp.astype(_codes(rounded, zero_point, params, xp) - zero_point, scale.dtype)


def mse(x, y):
    """Mean squared error, mean (x − y)², accumulated in float64.

    Parameters
    ----------
    x, y : float arrays of the same shape

    Returns
    -------
    float64 scalar, in the squared units of ``x``

    Raises
    ------
    ValueError
        If the shapes differ, an array is empty or has a NaN or infinity, or the error is beyond float64.

    Examples
    --------
    >>> x = np.float32([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])
    >>> print(f"{mse(x, fake_quantize(x, absmax_params(x))):.3g}")
    0.000298
    """
    x, y, xp = _same_shape(x, y)
    with np.errstate(over="ignore"):
        error = xp.mean((x - y) ** 2)
    if not bool(xp.isfinite(error)):
        raise ValueError(f"x and y must have a mean squared error that float64 holds, got {_short(x)} and {_short(y)}")
    return error


def sqnr_db(x, y):
    """Signal-to-quantization-noise ratio, 10 log₁₀(Σ x² / Σ (x − y)²), in decibels.

    Parameters
    ----------
    x : float array
        The signal.
    y : float array of the same shape
        The signal after quantization.

    Returns
    -------
    float64 scalar, in dB
        Infinite if ``x`` and ``y`` are equal, else −infinite if ``x`` is 0. One more bit is worth about 6 dB.

    Raises
    ------
    ValueError
        If the shapes differ, or an array is empty or has a NaN or infinity.

    Examples
    --------
    >>> print(f"{sqnr_db(np.float32([3, 4]), np.float32([3, 4.5])):.2f} dB")
    20.00 dB
    """
    x, y, xp = _same_shape(x, y)
    far = max(_largest(x), _largest(y)) > 2.0**1000
    x, y = (x / 4, y / 4) if far else (x, y)  # their difference is finite
    (signal, signal_unit), (noise, noise_unit) = _sum_of_squares(x, xp), _sum_of_squares(x - y, xp)
    if bool(noise == 0):
        return noise + np.inf
    with np.errstate(divide="ignore"):
        return 10 * xp.log10(signal / noise) + 20 * math.log10(2) * (signal_unit - noise_unit)


def error_split(x, params):
    """Mean squared error of ``fake_quantize(x, params)``, split into rounding and clipping.

    A value outside of the levels' span [s (qmin − z), s (qmax − z)] is clipped, and its whole error counts as
    clipping; the error of every other value is rounding. The two parts sum to the mean squared error.

    Parameters
    ----------
    x : float array, any shape
    params : QParams

    Returns
    -------
    ErrorSplit
        ``rounding``, ``clipping`` and ``total``, float64, in the squared units of ``x``.

    Raises
    ------
    ValueError
        As `quantize`.

    References
    ----------
    Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
    the section on ACIQ (clipping and rounding noise).

    Examples
    --------
    >>> error_split(np.float32([0.25, 1.0, 5.0]), range_params(-4, 3, bits=3)).clipping.round(4)
    np.float64(1.3333)
    """
    x_hat = fake_quantize(x, params)
    x = real_array(x, "x")
    xp = array_namespace(x)
    scale, zero_point = _broadcast(params, x, xp)
    inside = xp.minimum(xp.maximum(x, scale * (params.qmin - zero_point)), scale * (params.qmax - zero_point))
    return ErrorSplit(rounding=mse(inside, x_hat), clipping=mse(x, inside))


def _sum_of_squares(x, xp):
    """Σ (x / 2ⁿ)², and n: 0, but where the squares would leave float64."""
    n = 512 * round(math.frexp(_largest(x))[1] / 512)
    half = 2.0 ** (-n // 2)  # since 2⁻ⁿ may be beyond float64
    return xp.sum((x * half * half) ** 2), n


def _largest(x):
    return float(np.abs(as_numpy(x)).max())


def _params(alpha, beta, bits, *, symmetric=False, narrow=False, signed=True, axis=None, group_size=None):
    """Parameters for observed ends ``alpha <= beta``, float arrays of one shape."""
    bits = check_bits(bits)
    xp = array_namespace(alpha, beta)
    alpha, beta = xp.minimum(alpha, xp.zeros_like(alpha)), xp.maximum(beta, xp.zeros_like(beta))
    half = 2 ** (bits - 1)
    qmin, qmax = -half + (narrow or symmetric), half - 1
    with np.errstate(over="ignore"):
        scale = xp.maximum(-alpha, beta) / qmax if symmetric else (beta - alpha) / (qmax - qmin)
    if not bool(xp.all(xp.isfinite(scale))):
        raise ValueError(f"beta - alpha must be finite in {scale.dtype}, got {_short(alpha)} and {_short(beta)}")
    tiny = xp.finfo(scale.dtype).smallest_normal
    empty = beta == alpha
    scale = xp.where(empty, xp.ones_like(scale), xp.maximum(scale, xp.full_like(scale, tiny)))
    zero, zero_point = xp.zeros_like(scale), xp.clip(qmin - xp.round(alpha / scale), qmin, qmax)
    zero_point = zero if symmetric else xp.where(empty, zero, zero_point)
    shift = 0 if signed else half
    return QParams(scale, xp.astype(zero_point, xp.int32) + shift, qmin + shift, qmax + shift, axis, group_size)


def _in_steps(x, scale, params, xp):
    """x / s, which may be infinite."""
    if _has_wide_codes(params):
        x = xp.astype(x, xp.float64)
    with np.errstate(over="ignore"):
        return x / scale


def _codes(rounded, zero_point, params, xp):
    """Codes as floats, on the way to an integer type or straight back to real values."""
    return xp.clip(rounded + zero_point, params.qmin, params.qmax)


def _has_wide_codes(params):
    return max(-params.qmin, params.qmax) > _EXACT_IN_FLOAT32


def _slopes_are_finite(u, scale, xp):
    """Whether u / s, by which torch differentiates x / s, stays within the dtype: it multiplies even a 0 by it."""
    return float(xp.max(xp.abs(u.detach()))) / float(scale.detach().min()) <= xp.finfo(u.dtype).max


def _with_slopes(x, scale, u, steps, xp):
    """s · steps with the straight-through gradients written out: 1 or 0 for x, steps − u or steps for s."""
    inside = xp.round(u) == steps
    slope = xp.astype(xp.where(inside, steps - u, steps), scale.dtype)
    passed = xp.where(inside, x - x.detach(), xp.zeros_like(x))
    return scale.detach() * xp.astype(steps, scale.dtype) + (scale - scale.detach()) * slope + passed


def _observed_range(x, axis, group_size):
    """Smallest and largest value of ``x``, of each slice along ``axis``, or of each group."""
    x = real_array(x, "x")
    xp = array_namespace(x)
    if axis is not None and group_size is not None:
        raise ValueError(f"axis and group_size exclude each other, got {axis} and {group_size}")
    over = None
    if axis is not None:
        axis = _check_axis(axis, x)
        over = tuple(i for i in range(x.ndim) if i != axis)
    elif group_size is not None:
        _check_group_size(group_size, x)
        x, over = xp.reshape(x, (*x.shape[:-1], -1, group_size)), -1
    if over == ():
        return x, x
    return xp.min(x, axis=over), xp.max(x, axis=over)


def _broadcast(params, x, xp):
    """Scale and zero-point, both as floats, in a shape that broadcasts against ``x``."""
    if not isinstance(params, QParams):
        raise ValueError(f"params must be QParams, got {_short(params)}")
    scale, zero_point = params.scale, params.zero_point
    scale, zero_point = _like(x, scale), _like(x, zero_point)
    zero_point = xp.astype(zero_point, xp.float64 if _has_wide_codes(params) else scale.dtype)
    if params.group_size is not None:
        _check_group_size(params.group_size, x)
        expected = (*x.shape[:-1], x.shape[-1] // params.group_size)
    elif params.axis is not None:
        axis = _check_axis(params.axis, x)
        expected = (x.shape[axis],)
    else:
        expected = ()
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale must have shape {expected} for an array of shape {tuple(x.shape)}, "
                         f"got {tuple(scale.shape)}")
    if params.group_size is not None:
        return (xp.repeat(scale, params.group_size, axis=-1), xp.repeat(zero_point, params.group_size, axis=-1))
    if params.axis is not None:
        shape = tuple(-1 if i == axis else 1 for i in range(x.ndim))
        return xp.reshape(scale, shape), xp.reshape(zero_point, shape)
    return scale, zero_point


def real_array(x, name, *, finite=True):
    """``x`` as a non-empty array of float32 or float64, of NumPy or torch; finite, unless asked otherwise."""
    x = plain_array(x, name)
    xp = array_namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        if (not is_torch_array(x) and x.dtype.kind not in "biuf") or (is_torch_array(x) and x.is_complex()):
            raise ValueError(f"{name} must be an array of real numbers, got {_short(x)} of dtype {x.dtype}")
        exact_in_float32 = x.dtype.itemsize <= 2
        with np.errstate(over="ignore"):
            x = xp.astype(x, xp.float32 if exact_in_float32 else xp.float64)
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    # In torch a sum is the quicker test: NaN and infinity show in it. If it overflows, each value is asked.
    if finite and not (is_torch_array(x) and bool(xp.isfinite(xp.sum(x)))) and not bool(xp.all(xp.isfinite(x))):
        nan, inf = int(xp.sum(xp.isnan(x))), int(xp.sum(xp.isinf(x)))
        raise ValueError(f"{name} must be finite, got {nan} NaN and {inf} infinite values")
    return x


def numpy_array(x, name, *, finite=True):
    """`real_array` as an array of NumPy, without a gradient."""
    return as_numpy(real_array(x, name, finite=finite))


def plain_array(x, name):
    """``x`` as an array of NumPy in the machine's byte order, or as a dense torch tensor: the one entrance of all data.

    Its numbers are not looked at.
    """
    if is_torch_array(x):
        if x.is_meta or x.is_quantized or x.is_nested or str(x.layout) != "torch.strided":
            kind = "quantized" if x.is_quantized else "nested" if x.is_nested else x.layout
            raise ValueError(f"{name} must be a dense tensor with values, got a {kind} one on device {x.device}")
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(f"{name} must be an array without a mask, got {repr(x)[:60]}")
    if isinstance(x, np.generic):
        return x
    try:
        array = np.asarray(x)
    except (RuntimeError, TypeError, ValueError):  # rows of different lengths; tensors in a list
        raise ValueError(f"{name} must be an array of real numbers, got {repr(x)[:60]}") from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def array_namespace(*arrays):
    """The module with the array functions: NumPy 2 as it is, torch through array_api_compat.

    (The compat layer of NumPy would import all of NumPy: 10 MB that no function here needs.)
    """
    return compat_namespace(*arrays) if any(map(is_torch_array, arrays)) else np


def alike(*arrays):
    """The arrays as they are; as torch tensors, if one of them is one."""
    tensor = next(filter(is_torch_array, arrays), None)
    return arrays if tensor is None else tuple(_like(tensor, x) for x in arrays)


def _like(x, array):
    """``array`` of NumPy or of torch, and on the device, as ``x`` is."""
    if not is_torch_array(x):
        return as_numpy(array)
    if not is_torch_array(array):
        array = array_namespace(x).asarray(np.array(array, order="C"))  # torch wants it writable, and steps forward
    return array.to(x.device)


def _same_shape(x, y):
    x, y = alike(real_array(x, "x"), real_array(y, "y"))
    if tuple(x.shape) != tuple(y.shape):
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    xp = array_namespace(x, y)
    return xp.astype(x, xp.float64), xp.astype(y, xp.float64), xp


def check_integer(value, name, low, high=None):
    """``value`` as an int: the one check of counts, bits, seeds and sizes.

    Parameters
    ----------
    value : int, of Python or NumPy
        A bool is none.
    name : str
        Of the argument, for the message.
    low : int or None
    high : int, optional
        Ends of what is allowed, both of it; None: no end.

    Raises
    ------
    ValueError
        If ``value`` is no integer or out of range.

    Examples
    --------
    >>> check_integer(np.int64(3), "bits", 2, 8)
    3
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        allowed = f" from {low} to {high}" if high is not None else f" of at least {low}" if low is not None else ""
        raise ValueError(f"{name} must be an integer{allowed}, got {repr(value)[:60]}")
    return int(value)


def check_bits(bits):
    """``bits`` as an int; a ValueError unless it is an integer from 2 to 16."""
    return check_integer(bits, "bits", MIN_BITS, MAX_BITS)


def is_number(value):
    """Whether ``value`` is a real number of Python or NumPy; a bool is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_axis(axis, x):
    if x.ndim == 0:
        raise ValueError(f"axis must be None for an array of shape (), got {axis!r}")
    return check_integer(axis, f"axis of an array of shape {tuple(x.shape)}", -x.ndim, x.ndim - 1) % x.ndim


def _check_group_size(group_size, x):
    size, length = check_integer(group_size, "group_size", None), x.shape[-1] if x.ndim else 0
    if length == 0 or size < 1 or length % size:
        raise ValueError(f"group_size must divide the last axis of an array of shape {tuple(x.shape)}, got {size}")


def described(x):
    """Dtype and shape of an array, or the type of something else, for messages."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if is_torch_array(x) else type(x).__name__


def _short(value):
    """A number or array in few characters, for messages."""
    if not hasattr(value, "shape"):
        return repr(value)[:60]
    flat = as_numpy(value).ravel().tolist()
    text = [f"{v:.6g}" if isinstance(v, (int, float)) else repr(v)[:60] for v in flat[:3]]
    return text[0] if not value.shape else f"[{', '.join(text)}{', …' if len(flat) > 3 else ''}]"


def as_numpy(x):
    """``x`` of NumPy or torch as an array of NumPy, without a gradient."""
    if not is_torch_array(x):
        return x
    x = x.detach().cpu().resolve_neg()
    return (x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x).numpy()  # NumPy has no bfloat16


def _if_set(name, value):
    return "" if value is None else f", {name}={value}"
