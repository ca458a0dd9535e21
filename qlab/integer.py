"""Integer-only inference: a statically quantized network run in int8 codes and int32 accumulators, without a float.

The network of `qlab.ptq` computes in floats on values that lie on integer grids. Here are the integers themselves:

    net = convert(quantized, input_shape=(1, 8, 8))
    codes = net.quantize_input(images)  # the last operation on floats
    logits = net(codes)                 # int32; the largest is the prediction

A layer multiplies weight codes q₁ by input codes q₂ (`accumulate`), adds an int32 bias in units of S₁S₂, and brings the
sum onto the grid of the next layer's inputs, of scale S₃: it multiplies by M = S₁S₂ / S₃ (`requantize`). M is real, and
two integers stand for it: M ≈ 2^(−shift) m₀ / 2³¹ (`quantize_multiplier`). ReLU and ReLU6 cost nothing: they narrow the
limits that the codes are saturated to.

Jacob et al. quantize what enters a global average to 8 bits. The networks of `qlab.ptq` have no quantizer there, so
none is added here: the int32 accumulators are summed, and the 1 / n of the mean is a part of M. ReLU and ReLU6 then act
on the accumulators; 6 is rounded to a multiple of S₁S₂.
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from qlab.affine import QParams, as_numpy, check_integer, dequantize, numpy_array, plain_array, quantize
from qlab.ptq import QuantizedLayer, is_altered, record_calls

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
ROUNDINGS = ("even", "up", "gemmlowp")
_ACTIVATIONS = {nn.ReLU: np.inf, nn.ReLU6: 6.0}  # the values that they cut off at
_FOLLOW = (*_ACTIVATIONS, nn.AdaptiveAvgPool2d, nn.Flatten)


def quantize_multiplier(m):
    """The integers that stand for a positive real factor: m ≈ 2^(−shift) · m₀ / 2³¹.

    The fraction m₀ / 2³¹ is in [½, 1), so that m₀ uses all of its 31 bits. It is rounded half away from zero.

    Parameters
    ----------
    m : float or float array, > 0
        Such as S₁S₂ / S₃; an array for one factor per channel.

    Returns
    -------
    m0 : int, or int32 array of the shape of ``m``
        In [2³⁰, 2³¹). The relative error of m is 2⁻³¹ at most.
    shift : int, or int32 array of the shape of ``m``
        Positive shifts go to the right; 0 or less where m ≥ ½.

    Raises
    ------
    ValueError
        If ``m`` is empty, has a NaN or infinity, or is not greater than 0.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
    equation 6 (2^(−n) M₀: n is ``shift``, M₀ is m₀ / 2³¹).

    Examples
    --------
    >>> quantize_multiplier(0.75), quantize_multiplier(0.0072474273)
    ((1610612736, 0), (1992157647, 7))
    >>> print(f"{1992157647 / 2**31 * 2**-7:.10f}")
    0.0072474273
    """
    m = numpy_array(m, "m").astype(np.float64)
    if not (m > 0).all():
        raise ValueError(f"m must be greater than 0, got {m.min():.6g}")
    fraction, exponent = np.frexp(m)  # m = fraction · 2^exponent, with the fraction in [½, 1)
    m0 = np.floor(fraction * 2**31 + 0.5).astype(np.int64)
    overflow = m0 == 2**31
    m0, shift = np.where(overflow, 2**30, m0), -(exponent + overflow)
    return (int(m0), int(shift)) if m.ndim == 0 else (m0.astype(np.int32), shift.astype(np.int32))


def requantize(acc, m0, shift, zero_point, qmin, qmax, *, rounding="even"):  # noqa: PLR0917
    """Codes clip(round(acc · M) + z, qmin, qmax) with M = 2^(−shift) · m₀ / 2³¹, by integer arithmetic alone.

    Parameters
    ----------
    acc : integer array, any shape
        Accumulators, within int32.
    m0, shift : int or integer arrays that broadcast against ``acc``
        From `quantize_multiplier`; ``shift`` ≥ −30.
    zero_point, qmin, qmax : int
        Of the codes.
    rounding : {"even", "up", "gemmlowp"}
        "even": once, ties to even, as ``rint(acc * M)``. "up": once, ties up, as TensorFlow Lite built with
        TFLITE_SINGLE_ROUNDING, which is off by default. "gemmlowp": twice, as the published reference, and as
        TensorFlow Lite by default: `saturating_rounding_doubling_high_mul` by m₀, then `rounding_divide_by_pot` by
        2^shift. (A negative shift goes first, and saturates.)

    Returns
    -------
    int32 array, shape of ``acc``
        ``astype`` to int8 to store it.

    Raises
    ------
    ValueError
        If an argument is not an integer or out of range, the shapes do not broadcast, ``qmin > qmax``, or there is no
        such rounding.

    References
    ----------
    Jacob et al. 2018, section 2.2 and appendix B. TensorFlow Lite, MultiplyByQuantizedMultiplier, with and without
    TFLITE_SINGLE_ROUNDING.

    Examples
    --------
    >>> m0, shift = quantize_multiplier(0.25)
    >>> for rounding in ROUNDINGS:
    ...     print(rounding, requantize([-10, -6, 6, 10, 999], m0, shift, 1, -128, 127, rounding=rounding).tolist())
    even [-1, -1, 3, 3, 127]
    up [-1, 0, 3, 4, 127]
    gemmlowp [-2, -1, 3, 4, 127]
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    acc = _int64(acc, "acc", INT32_MIN, INT32_MAX)
    m0 = _int64(m0, "m0", 2**30, INT32_MAX)
    shift = np.minimum(_int64(shift, "shift", -30, INT32_MAX), 32)  # at 32 every result is 0 already
    zero_point, qmin, qmax = (_int64(value, name, INT32_MIN, INT32_MAX)
                              for name, value in (("zero_point", zero_point), ("qmin", qmin), ("qmax", qmax)))
    _check_broadcast(acc=acc, m0=m0, shift=shift, zero_point=zero_point, qmin=qmin, qmax=qmax)
    if (qmin > qmax).any():
        raise ValueError(f"qmin must be at most qmax, got {qmin} and {qmax}")
    if rounding == "gemmlowp":
        left, right = np.maximum(-shift, 0), np.maximum(shift, 0)
        shifted = np.clip(acc << left, INT32_MIN, INT32_MAX)
        q = rounding_divide_by_pot(saturating_rounding_doubling_high_mul(shifted, m0), right)
    else:
        product, bits = acc * m0, 31 + shift  # at most 2⁶² in size: int64 holds it
        half = np.left_shift(np.int64(1), bits - 1)
        if rounding == "even":
            half = half - 1 + (product >> bits & 1)  # a tie goes up from an odd number only
        q = (product + half) >> bits
    return np.clip(q + zero_point, qmin, qmax).astype(np.int32)


def saturating_rounding_doubling_high_mul(a, b):
    """round(a · b / 2³¹), ties up: the high 32 bits of 2ab, rounded.

    Parameters
    ----------
    a, b : integer arrays that broadcast, within int32

    Returns
    -------
    int32 array
        −2³¹ · −2³¹ / 2³¹ = 2³¹ does not fit, and gives 2³¹ − 1.

    Raises
    ------
    ValueError
        If an argument is not an integer within int32, or the shapes do not broadcast.

    References
    ----------
    gemmlowp, fixedpoint/fixedpoint.h, SaturatingRoundingDoublingHighMul; the instruction SQRDMULH of ARM NEON.

    Examples
    --------
    >>> saturating_rounding_doubling_high_mul([3, -3], 2**30).tolist()  # 1.5 and −1.5
    [2, -1]
    """
    a, b = _int64(a, "a", INT32_MIN, INT32_MAX), _int64(b, "b", INT32_MIN, INT32_MAX)
    _check_broadcast(a=a, b=b)
    # gemmlowp adds 2³⁰ if ab ≥ 0, else 1 − 2³⁰, and its division drops the fraction: this is the same number.
    return np.minimum((a * b + 2**30) >> 31, INT32_MAX).astype(np.int32)


def rounding_divide_by_pot(x, exponent):
    """round(x / 2^exponent), ties away from zero: a division by a power of two (POT).

    Parameters
    ----------
    x : integer array, within int32
    exponent : integer array that broadcasts against ``x``, 0 to 32

    Returns
    -------
    int32 array

    Raises
    ------
    ValueError
        If an argument is not an integer or out of range, or the shapes do not broadcast.

    References
    ----------
    gemmlowp, fixedpoint/fixedpoint.h, RoundingDivideByPOT. Jacob et al. 2018, appendix B.

    Examples
    --------
    >>> rounding_divide_by_pot([12, -12], 3).tolist()  # 1.5 and −1.5
    [2, -2]
    """
    x, exponent = _int64(x, "x", INT32_MIN, INT32_MAX), _int64(exponent, "exponent", 0, 32)
    _check_broadcast(x=x, exponent=exponent)
    mask = np.left_shift(np.int64(1), exponent) - 1
    remainder = x & mask
    return ((x >> exponent) + (remainder > (mask >> 1) + (x < 0))).astype(np.int32)


def accumulate(q1, q2, z1, z2):
    """Σₖ (q₁ − Z₁)(q₂ − Z₂) as N Z₁Z₂ − Z₁ Σ q₂ − Z₂ Σ q₁ + Σ q₁q₂: a matrix product of codes, in int32.

    The last sum is all that grows with rows × columns; the others are one number for each row or column.

    Parameters
    ----------
    q1 : int8 array, shape (..., rows, N)
    q2 : int8 array, shape (..., N, columns)
    z1, z2 : int or integer arrays that broadcast against (..., rows, columns)
        Zero-points; shape (rows, 1) for one per row, (columns,) for one per column.

    Returns
    -------
    int32 array, shape (..., rows, columns)
        A sum beyond int32 wraps around, as in hardware. (`convert` refuses networks where one could.)

    Raises
    ------
    ValueError
        If ``q1`` or ``q2`` is not int8 or uint8, a zero-point is not an integer within int32, or the shapes do not fit.

    References
    ----------
    Jacob et al. 2018, equation 7. ONNX operator MatMulInteger.

    Examples
    --------
    >>> accumulate(np.int8([[1, 2]]), np.int8([[3], [4]]), z1=1, z2=-1)
    array([[5]], dtype=int32)
    """
    for name, q in (("q1", q1), ("q2", q2)):
        if getattr(q, "dtype", None) not in (np.int8, np.uint8):
            raise ValueError(f"{name} must be an int8 or uint8 array, got {getattr(q, 'dtype', type(q).__name__)}")
    if q1.shape[-1:] != q2.shape[-2:-1]:
        raise ValueError(f"q1 and q2 must be (..., rows, N) and (..., N, columns), got {q1.shape} and {q2.shape}")
    z1, z2 = (_int64(z, name, INT32_MIN, INT32_MAX).astype(np.int32) for name, z in (("z1", z1), ("z2", z2)))
    q1, q2 = (plain_array(q, name).astype(np.int32) for name, q in (("q1", q1), ("q2", q2)))
    products, n = q1 @ q2, np.int32(q1.shape[-1])
    _check_broadcast(products=products, z1=z1, z2=z2)
    sum_q1, sum_q2 = q1.sum(-1, keepdims=True, dtype=np.int32), q2.sum(-2, keepdims=True, dtype=np.int32)
    with np.errstate(over="ignore"):  # NumPy warns of it in scalars only
        return n * z1 * z2 - z1 * sum_q2 - z2 * sum_q1 + products


class LayerTrace(NamedTuple):
    """What `IntegerLayer.run` computed, all of it integers."""

    inputs: Any  # int8 codes
    accumulators: Any  # int32
    sums: Any  # int32 sums of the clamped accumulators over each image; None if there is no global average
    outputs: Any  # int8 codes of the next layer's inputs; int32 logits from the last layer


@dataclass(frozen=True, eq=False, repr=False)
class IntegerLayer:
    """A Linear or Conv2d layer in integers, with the activation and global average that follow it. Print it to read it.

    Attributes
    ----------
    name : str
    input_shape : tuple of int
        Of one image: (inputs,) for Linear, (channels, height, width) for Conv2d.
    weight : int8 array, shape (outputs, inputs) or (outputs, channels / groups, height, width)
        Codes q₁ from −127 to 127.
    weight_zero_point : int32 array, shape (outputs,)
        Z₁.
    input_zero_point : int
        Z₂, which also fills the padding: it is the code of 0.
    bias : int32 array, shape (outputs,)
        In units of S₁S₂; its zero-point is 0.
    clamp : None, or pair of integers or int32 arrays of shape (outputs,)
        For a layer with a global average after it: what the accumulators are clamped to before they are summed.
    m0, shift : int, or int32 array of shape (outputs,)
        M = 2^(−shift) m₀ / 2³¹ = S₁S₂ / S₃, divided by the number of values in a global average.
    output_zero_point, qmin, qmax : int
        Z₃ and the limits of the codes that come out, activation included: ReLU6 is qmin = q(0) = Z₃ and qmax = q(6).
    rounding : str
        As in `requantize`.
    stride, padding, groups
        Of the convolution.

    References
    ----------
    Jacob et al. 2018, section 2.4.

    Examples
    --------
    >>> layer = IntegerLayer("linear", (2,), weight=np.int8([[1, -2]]), weight_zero_point=np.int32([0]),
    ...                      input_zero_point=-128, bias=np.int32([410]), clamp=None, m0=2**30, shift=0,
    ...                      output_zero_point=0, qmin=-128, qmax=127, rounding="even")
    >>> trace = layer.run(np.int8([[-128, 127]]))  # the reals 0 and 255, in units of S₂
    >>> trace.accumulators, trace.outputs
    (array([[-100]], dtype=int32), array([[-50]], dtype=int8))
    """

    name: str
    input_shape: tuple
    weight: np.ndarray
    weight_zero_point: np.ndarray
    input_zero_point: int
    bias: np.ndarray
    clamp: Any
    m0: Any
    shift: Any
    output_zero_point: int
    qmin: int
    qmax: int
    rounding: str
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    groups: int = 1

    def accumulate(self, codes):
        """The int32 accumulators for int8 codes of shape (N, *input_shape), bias included."""
        q1 = self.weight.reshape(self.groups, len(self.bias) // self.groups, -1)
        z1 = self.weight_zero_point.reshape(self.groups, -1, 1)
        if self.weight.ndim == 2:
            return accumulate(q1[0], codes.T, z1[0], self.input_zero_point).T + self.bias
        windows = self._windows(codes)  # images, channels, output height and width, kernel height and width
        images, _, height, width, *_ = windows.shape
        q2 = windows.transpose(0, 1, 4, 5, 2, 3).reshape(images, self.groups, -1, height * width)
        sums = accumulate(q1, q2, z1, self.input_zero_point)
        return sums.reshape(images, -1, height, width) + self.bias.reshape(-1, 1, 1)

    def run(self, codes):
        """All integers from the int8 codes of the inputs to those of the outputs: a `LayerTrace`."""
        codes = codes.reshape(len(codes), *self.input_shape)
        accumulators, sums = self.accumulate(codes), None
        column = (-1, 1, 1) if self.weight.ndim == 4 else (-1,)  # channels are axis 1
        if self.clamp is not None:
            low, high = (np.reshape(limit, column) for limit in self.clamp)
            sums = np.clip(accumulators, low, high).sum((2, 3), keepdims=True, dtype=np.int32)
        outputs = requantize(accumulators if sums is None else sums, np.reshape(self.m0, column),
                             np.reshape(self.shift, column), self.output_zero_point, self.qmin, self.qmax,
                             rounding=self.rounding)
        fits_int8 = self.qmin >= -128 and self.qmax <= 127
        return LayerTrace(codes, accumulators, sums, outputs.astype(np.int8) if fits_int8 else outputs)

    def _windows(self, codes):
        (top, left), size = self.padding, self.weight.shape[2:]
        padded = np.pad(codes, ((0, 0), (0, 0), (top, top), (left, left)), constant_values=self.input_zero_point)
        return sliding_window_view(padded, size, axis=(2, 3))[:, :, ::self.stride[0], ::self.stride[1]]

    def __repr__(self):
        lines = []
        for name, value in vars(self).items():
            if name == "weight":  # a row for each output
                lines.append(f"weight: int8 {value.shape}\n{value.reshape(len(value), -1)}")
            else:
                lines.append(f"{name}: {value}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class IntegerNet:
    """A network of integer layers, from `convert`. ``net(codes)`` gives the logits as int32.

    Attributes
    ----------
    input_params : QParams
        The grid of the images.
    input_shape, output_shape : tuple of int
        Of one image and of its logits.
    layers : dict of str to IntegerLayer
    logits_scale : float
        ``net(codes) * net.logits_scale`` are the logits as real numbers. To find the largest, you need no scale.

    Examples
    --------
    >>> from qlab.affine import QParams
    >>> linear = nn.Linear(2, 2, bias=False)
    >>> linear.weight.data = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])
    >>> grid = QParams(0.5, 0, -127, 127)
    >>> net = convert(nn.Sequential(QuantizedLayer(linear, grid, grid)), input_shape=(2,))
    >>> codes = net.quantize_input([[3.0, 1.0]])
    >>> codes, net(codes), net.logits_scale
    (array([[6, 2]], dtype=int8), array([[ 14, -12]], dtype=int32), 0.25)
    """

    input_params: QParams
    input_shape: tuple
    output_shape: tuple
    layers: dict
    logits_scale: float

    def quantize_input(self, images):
        """The int8 codes of real images, shape (N, *input_shape): the only operation on floats."""
        codes = as_numpy(quantize(numpy_array(images, "images"), self.input_params))
        self._check_shape(codes, "images")
        return codes.astype(np.int8)

    def __call__(self, codes):
        """The int32 logits, shape (N, *output_shape), for int8 codes from `quantize_input`."""
        *_, last = self.trace(codes).values()
        return last.outputs.reshape(len(codes), *self.output_shape).astype(np.int32)

    def trace(self, codes):
        """A `LayerTrace` for each layer, by name."""
        if getattr(codes, "dtype", None) != np.int8:
            raise ValueError(f"codes must be an int8 array, got {getattr(codes, 'dtype', type(codes).__name__)}")
        self._check_shape(plain_array(codes, "codes"), "codes")
        traces = {}
        for name, layer in self.layers.items():
            traces[name] = layer.run(codes)
            codes = traces[name].outputs
        return traces

    def predict(self, images):
        """The class with the largest logit, int64 of shape (N,), for each of the real images."""
        return self(self.quantize_input(images)).argmax(1)

    def __repr__(self):
        return "\n".join(f"{name}: int8 weights {layer.weight.shape}" for name, layer in self.layers.items())

    def _check_shape(self, array, name):
        if array.shape[1:] != self.input_shape or not len(array):
            raise ValueError(f"{name} must have shape (N, {', '.join(map(str, self.input_shape))}), got {array.shape}")


def convert(model, input_shape, *, rounding="even"):
    """The same network in integers.

    Parameters
    ----------
    model : nn.Sequential
        From `qlab.ptq.quantize_static`, with weights and inputs quantized: `QuantizedLayer`, each with at most one ReLU
        or ReLU6 and then at most one AdaptiveAvgPool2d(1) after it, and Flatten.
    input_shape : tuple of int
        Of one image, such as (1, 8, 8).
    rounding : {"even", "up", "gemmlowp"}
        As in `requantize`. With "even" the codes are those of the simulation in floats, see `round_biases`.

    Returns
    -------
    IntegerNet
        Its logits are the accumulators of the last layer (M = 1), since the largest is the largest in any unit. With
        one weight scale per channel their units differ: then M brings them to a common one, still in int32.

    Raises
    ------
    ValueError
        If the model holds another type of module, a layer that is not statically quantized or whose codes are not int8
        (weights −127 to 127), or the shapes do not fit; or if an accumulator could overflow int32.

    References
    ----------
    Jacob et al. 2018, sections 2.2 to 2.4 (equation 11: the biases) and figure 1.1 a.

    Examples
    --------
    >>> from qlab.ptq import calibrate, observe, quantize_static
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> images = torch.rand(100, 1, 8, 8)
    >>> quantized = quantize_static(model, calibrate(observe(model, images)))
    >>> net = convert(quantized, input_shape=(1, 8, 8))
    >>> net(net.quantize_input(images)).dtype, (net.predict(images) == quantized(images).argmax(1).numpy()).mean()
    (dtype('int32'), np.float64(1.0))
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    stages, output_shape = _stages(model, input_shape)
    layers = {}
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        output = following and following.layer.input_params
        layers[stage.name], output = _integer_layer(stage, output, rounding)
    return IntegerNet(stages[0].layer.input_params, tuple(input_shape), output_shape, layers, float(output.scale))


def round_biases(model, dtype=torch.float32):
    """The simulation in floats with its biases rounded to the grid of the accumulators, as integers store them.

    `qlab.ptq` keeps biases in float. Rounding them moves few codes at 8 bits and many at 4 bits and fewer, where the
    step S₁S₂ is coarse against the step S₃ of the codes.

    Parameters
    ----------
    model : nn.Sequential
        As in `convert`.
    dtype : torch.float32 or torch.float64
        In float32 the sums are rounded too, which moves a code where a sum comes close to a tie. In float64 the codes
        are those of the integers, unless a sum is within 2⁻³⁰ of itself of a tie, or an average takes in values that
        ReLU6 clamped.

    Returns
    -------
    nn.Sequential
        A copy. It reads float32 images in either case, so that their codes are the same.

    Raises
    ------
    ValueError
        As `convert` for the layers of the model; or if ``dtype`` is another one.

    References
    ----------
    Jacob et al. 2018, equation 11.

    Examples
    --------
    >>> from qlab.affine import QParams
    >>> layer = nn.Linear(1, 1)
    >>> layer.bias.data[:] = 0.3
    >>> grid = QParams(torch.tensor(0.5), 0, -128, 127)
    >>> rounded = round_biases(nn.Sequential(QuantizedLayer(layer, grid, grid)))
    >>> rounded[0].layer.bias
    Parameter containing:
    tensor([0.2500])
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
    model = copy.deepcopy(model).to(dtype)
    for module in dict.fromkeys(module for _, module in _modules(model) if isinstance(module, QuantizedLayer)):
        layer, unit = module.layer.requires_grad_(False), torch.as_tensor(_sum_scale(module))
        codes = quantize(layer.weight, module.weight_params)
        for params in ("weight_params", "input_params"):
            old = getattr(module, params)
            setattr(module, params, replace(old, scale=torch.as_tensor(as_numpy(old.scale)).to(dtype)))
        layer.weight.copy_(dequantize(codes, module.weight_params))
        if layer.bias is not None:
            layer.bias.copy_((layer.bias.double() / unit).round() * unit)
    return model


def simulated_codes(model, images):
    """The codes that each layer's inputs stand for in a simulation in floats: what `IntegerNet.trace` calls inputs.

    Parameters
    ----------
    model : nn.Sequential
        As in `convert`; or from `round_biases`.
    images : float array, shape (N, ...)
        Taken as float32.

    Returns
    -------
    dict of str to int8 array

    Raises
    ------
    ValueError
        If ``images`` is empty or has a NaN or infinity; or as `convert` for the layers of the model.

    Examples
    --------
    >>> from qlab.affine import range_params
    >>> layer = QuantizedLayer(nn.Linear(2, 4), range_params(-1, 1, symmetric=True), range_params(0, 1))
    >>> simulated_codes(nn.Sequential(layer), torch.tensor([[0.0, 1.0]]))
    {'0': array([[-128,  127]], dtype=int8)}
    """
    images = torch.tensor(numpy_array(images, "images"), dtype=torch.float32)
    layers = {name: module for name, module in _modules(model) if isinstance(module, QuantizedLayer)}
    found = record_calls(model, layers, images, None, lambda inputs, output: inputs[0])
    codes, calls = {}, Counter()
    for name, layer in layers.items():
        x = found[name][calls[layer]]  # under two names, a layer is called twice
        calls[layer] += 1
        codes[name] = as_numpy(quantize(x, layer.input_params)).astype(np.int8)
    return codes


@dataclass
class _Stage:
    """A quantized layer and what follows it, up to the next one."""

    name: str
    layer: QuantizedLayer
    input_shape: tuple
    activation: type | None = None
    averaged: int | None = None  # how many values a global average takes in


def _stages(model, input_shape):
    """The model as a list of `_Stage`, and the shape that comes out of it."""
    if not isinstance(input_shape, (tuple, list)) or not input_shape:
        raise ValueError(f"input_shape must be a tuple of integers of at least 1, got {input_shape!r}")
    shape = tuple(check_integer(size, "each size of input_shape", 1) for size in input_shape)
    stages = []
    for name, module in _modules(model):
        stage = stages[-1] if stages else None
        what = f"{type(module).__name__} at {name!r}"
        if isinstance(module, QuantizedLayer):
            stages.append(_Stage(name, module, shape))
            shape = _output_shape(what, module, shape)
        elif isinstance(module, nn.Flatten):
            if (module.start_dim, module.end_dim) != (1, -1):
                raise ValueError(f"model must flatten all axes but the first, got {module} at {name!r}")
            shape = (prod(shape),)
        elif stage is None or stage.averaged or (stage.activation and type(module) in _ACTIVATIONS):
            raise ValueError(f"model must hold a quantized layer, an activation and a global average in this order, "
                             f"got {what}")
        elif type(module) in _ACTIVATIONS:
            stage.activation = type(module)
        else:
            if module.output_size not in (1, (1, 1)) or len(shape) != 3:
                raise ValueError(f"model must average over whole images, got {module} at {name!r} for shape {shape}")
            stage.averaged, shape = prod(shape[1:]), (shape[0], 1, 1)
    if not stages:
        raise ValueError("model must hold a quantized layer, got none")
    return stages, shape


def _modules(model):
    """Names and modules in the order of the computation; a ValueError for what integers cannot do here."""
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if is_altered(module):
            raise ValueError(f"model must have no hooks, got some on the {type(module).__name__} at {name!r}")
        if type(module) is nn.Sequential or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, QuantizedLayer):
            _check_layer(name, module)
            inside = f"{name}." if name else ""
        elif type(module) not in _FOLLOW:
            raise ValueError(f"model must be an nn.Sequential of QuantizedLayer, ReLU, ReLU6, AdaptiveAvgPool2d and "
                             f"Flatten, got {type(module).__name__} at {name!r}")
        yield name, module


def _check_layer(name, module):
    layer, inputs, weights = module.layer, module.input_params, module.weight_params
    if inputs is None:
        kind = "dynamic" if module.dynamic_bits else "float"
        raise ValueError(f"model must have static ranges for all inputs, got {kind} inputs at {name!r}")
    if weights is None:
        raise ValueError(f"model must have quantized weights, got float weights at {name!r}")
    if inputs.qmin < -128 or inputs.qmax > 127 or as_numpy(inputs.scale).ndim:
        raise ValueError(f"model must have one int8 grid for all inputs of a layer, got {inputs} at {name!r}")
    if weights.axis not in (None, 0) or weights.group_size or weights.qmin < -128 or weights.qmax > 127:
        raise ValueError(f"model must have int8 weights with one grid or one for each output, "
                         f"got {weights} at {name!r}")
    if isinstance(layer, nn.Conv2d):
        plain = layer.dilation == (1, 1) and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        if not plain:
            raise ValueError(f"model must have convolutions without dilation, padded with zeros by numbers, "
                             f"got {layer} at {name!r}")


def _output_shape(what, module, shape):
    """The shape that a quantized layer gives for inputs of ``shape``."""
    layer = module.layer
    if isinstance(layer, nn.Linear):
        if shape != (layer.in_features,):
            raise ValueError(f"{what} must receive shape ({layer.in_features},), got {shape}")
        return (layer.out_features,)
    sizes = [(size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride
             in zip(shape[1:], layer.padding, layer.kernel_size, layer.stride, strict=False)]
    if len(shape) != 3 or shape[0] != layer.in_channels or min(sizes) < 1:
        raise ValueError(f"{what} must receive shape ({layer.in_channels}, height, width), no smaller than its kernel, "
                         f"got {shape}")
    return (layer.out_channels, *sizes)


def _sum_scale(module):
    """S₁S₂, the unit of a quantized layer's accumulators and bias: a float64 array, shape () or (outputs,).

    Where all weights are 0 their scale says nothing, and may be far too coarse for the bias, all that comes out: there,
    another unit holds the bias in 16 bits.
    """
    scale = as_numpy(module.weight_params.scale).astype(np.float64) * float(module.input_params.scale)
    if module.layer.bias is None:
        return scale
    dead = (numpy_array(module.layer.weight, "weight") == 0).reshape(module.layer.weight.shape[0], -1).all(1)
    bias = np.abs(numpy_array(module.layer.bias, "bias"))
    if scale.ndim == 0:
        dead, bias = dead.all(), bias.max()
    return np.where(dead & (bias > 0), np.minimum(scale, bias * 2.0**-15), scale)


def _integer_layer(stage, output, rounding):
    """The layer and ``output``, the grid of what comes out: the next layer's, or one for the logits if it is None."""
    module, inputs = stage.layer, stage.layer.input_params
    weight = as_numpy(quantize(module.layer.weight.detach(), module.weight_params))
    if weight.min() < -127:
        raise ValueError(f"model must have weights with codes from -127 to 127, got -128 at {stage.name!r}")
    z1, z2 = np.broadcast_to(as_numpy(module.weight_params.zero_point), len(weight)), int(inputs.zero_point)
    scale = _sum_scale(module)
    bias = np.zeros(len(weight))
    if module.layer.bias is not None:
        bias = np.rint(numpy_array(module.layer.bias, "bias") / scale)

    low, high = INT32_MIN, INT32_MAX
    if stage.activation:
        low, high = 0, np.minimum(np.rint(_ACTIVATIONS[stage.activation] / scale), INT32_MAX).astype(np.int32)

    largest_input = max(z2 - inputs.qmin, inputs.qmax - z2)
    largest = np.abs(weight.reshape(len(weight), -1) - z1[:, None]).sum(1) * largest_input + np.abs(bias)
    if stage.averaged:
        largest_sum = stage.averaged * np.minimum(largest, np.maximum(high, -low))
        largest, scale = np.maximum(largest, largest_sum), scale / stage.averaged
    if largest.max() > INT32_MAX:
        raise ValueError(f"model must have accumulators that stay within int32 for all inputs, biases included, "
                         f"got up to {largest.max():.4g} at {stage.name!r}")

    if output is None:  # per channel: the finest common unit that keeps all logits well within int32
        unit = scale if scale.ndim == 0 else (np.maximum(largest, 1) * scale).max() / 2**29
        output = QParams(unit, 0, INT32_MIN, INT32_MAX)
    m0, shift = quantize_multiplier(scale / float(output.scale))
    layer = IntegerLayer(
        name=stage.name, input_shape=stage.input_shape, weight=weight.astype(np.int8), weight_zero_point=z1,
        input_zero_point=z2, bias=bias.astype(np.int32), clamp=(low, high) if stage.averaged else None,
        m0=m0, shift=shift, output_zero_point=int(output.zero_point),
        qmin=int(output.zero_point) if stage.activation else output.qmin,
        qmax=int(quantize(np.float32(6), output)) if stage.activation is nn.ReLU6 else output.qmax, rounding=rounding)
    if isinstance(module.layer, nn.Conv2d):
        options = {name: getattr(module.layer, name) for name in ("stride", "padding", "groups")}
        layer = replace(layer, **options)
    return layer, output


def _int64(value, name, low, high):
    """``value`` as an int64 array with entries from ``low`` to ``high``."""
    try:
        array = as_numpy(plain_array(value, name))
    except ValueError:  # rows of different lengths
        raise ValueError(f"{name} must be an integer or an array of integers, got {repr(value)[:60]}") from None
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be an integer or an array of integers, got dtype {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    if array.min() < low or array.max() > high:
        wrong = array.min() if array.min() < low else array.max()
        raise ValueError(f"{name} must be from {low} to {high}, got {wrong}")
    return array.astype(np.int64)


def _check_broadcast(**arrays):
    try:
        np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{array.shape} for {name}" for name, array in arrays.items())
        raise ValueError(f"{', '.join(arrays)} must have shapes that broadcast, got {shapes}") from None
