"""Quantization-aware training (QAT): fine-tuning a network with its quantizers in place.

The forward pass rounds as the deployed network will. The backward pass takes rounding for the identity (the
straight-through estimator, STE), so that an optimizer can adapt the weights, and the ranges, to the error:

    folded = fold_batch_norm(model)
    prepared = prepare(folded, "LSQ", images, weight_bits=3, activation_bits=3)
    for step in train(prepared, images, labels, epochs=20, lr=0.01, seed=0):
        ...  # ranges(prepared) is where the ranges stand
    quantized = convert(prepared)

Batch norm is folded once, before the training, and the folded network is fine-tuned: one convolution a layer, and the
weights that are quantized are those of the deployed network. Jacob et al. train with batch norm and fold the statistics
of each batch (section 3.2), which takes a second convolution.

Symbols: s scale, z zero-point, b bits; [α, β] the range, as in all of qlab. PACT's α is the upper end of its range, and
the offset β of LSQ+ the lower end.
"""

import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

from qlab import calibration, ptq
from qlab.affine import QParams, check_integer, fake_quantize, is_number, real_array, zero_point_params

SCHEMES = ("Jacob", "PACT", "LSQ", "LSQ+")
_LEAST = 1e-36  # learned ends and scales from here on: their steps and gradients are not lost in float32
_HELD = 1e-12  # what is used in place of one that an optimizer step took below that


def round_ste(u):
    """Round half to even, with the gradient of the identity: the straight-through estimator.

    Parameters
    ----------
    u : float tensor, any shape

    Returns
    -------
    float tensor, shape of ``u``

    References
    ----------
    Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons for conditional computation".

    Examples
    --------
    >>> u = torch.tensor([0.4, 1.5], requires_grad=True)
    >>> rounded = round_ste(u)
    >>> rounded.sum().backward()
    >>> rounded.tolist(), u.grad.tolist()
    ([0.0, 2.0], [1.0, 1.0])
    """
    return u + (u.round() - u).detach()


class Absmax(nn.Module):
    """Jacob's quantizer for weights: the range reaches max|w| at each step, so nothing is clipped or learned.

    Parameters
    ----------
    bits : int, 2 to 8

    Raises
    ------
    ValueError
        If ``bits`` is out of range. When called: if ``weight`` is empty or has a NaN or infinity.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
    section 3.1; without the code −2^(b−1). There the range is [min w, max w] with a zero-point; here it is symmetric.

    Examples
    --------
    >>> Absmax(bits=2)(torch.tensor([0.3, 0.6, -1.0])).tolist()
    [0.0, 1.0, -1.0]
    """

    def __init__(self, bits):
        super().__init__()
        self.bits = check_integer(bits, "bits", 2, 8)

    def forward(self, weight):
        return fake_quantize(weight, self.params(weight))

    def params(self, weight):
        """`qlab.affine.QParams` of the weights as they are."""
        return ptq.weight_params(weight, self.bits)


class EMA(nn.Module):
    """Jacob's quantizer for activations: the range is a moving average of each batch's smallest and largest value.

    In training mode, a call moves α to α + momentum · (min x − α), and β likewise, then quantizes. In eval mode, the
    range stays.

    Parameters
    ----------
    bits : int, 2 to 8
    alpha, beta : float, ``alpha <= beta``
        The range to start from. It is widened to hold 0 where it is used.
    momentum : float, 0 < momentum ≤ 1
    start_delay : int, ≥ 0
        Training steps before quantization sets in: until then, a call in training mode moves the range and returns x.
        Eval mode quantizes from the start, to show where the deployed network stands.

    Raises
    ------
    ValueError
        If a number is out of range. When called: if the data is empty or has a NaN or infinity; all stays as it was.

    References
    ----------
    Jacob et al. 2018, section 3.1. The paper delays by 50,000 to 2 million steps, starting from random weights.

    Examples
    --------
    >>> ema = EMA(bits=2, alpha=0.0, beta=1.0, momentum=0.5)
    >>> ema(torch.tensor([0.0, 5.0, 1.2])).tolist(), ema.range()
    ([0.0, 3.0, 1.0], (0.0, 3.0))
    """

    def __init__(self, bits, alpha, beta, *, momentum=0.01, start_delay=0):
        super().__init__()
        ends = torch.stack([_number(alpha, "alpha"), _number(beta, "beta")])
        if ends[0] > ends[1]:
            raise ValueError(f"alpha must be at most beta, got {alpha} and {beta}")
        if not is_number(momentum) or not 0 < momentum <= 1:
            raise ValueError(f"momentum must be more than 0 and at most 1, got {momentum!r}")
        self.bits, self.momentum = check_integer(bits, "bits", 2, 8), momentum
        self.start_delay = check_integer(start_delay, "start_delay", 0)
        self.register_buffer("ends", ends)
        self.register_buffer("steps", torch.tensor(0))
        self.params()  # refuses a range whose width is infinite in float32

    def forward(self, x):
        if not self.training:
            return fake_quantize(x, self.params())
        seen = torch.stack(real_array(x.detach(), "x").aminmax())
        ends = (self.ends + self.momentum * (seen - self.ends)).to(self.ends)  # float64 may go beyond float32
        params = zero_point_params(ends, self.bits)  # may refuse, and then the range has not moved
        self.ends.copy_(ends)
        self.steps += 1
        return x if self.steps <= self.start_delay else fake_quantize(x, params)

    def params(self):
        """`qlab.affine.QParams` of the range as it is."""
        return zero_point_params(self.ends, self.bits)

    def range(self):
        """(α, β), as floats."""
        return tuple(self.ends.tolist())


class PACT(nn.Module):
    """Parameterized clipping: y = clip(x, 0, α) with a learned α, quantized from 0 to α.

    ∂y/∂α = 1 where x ≥ α and 0 elsewhere; rounding adds nothing to it.

    Parameters
    ----------
    bits : int, 2 to 8
    alpha : float, ≥ 1e-36
        The upper end to start from, in the units of x.

    Raises
    ------
    ValueError
        If a number is out of range. When called: if the data is empty or has a NaN or infinity; all stays as it was.

    Notes
    -----
    The paper adds a penalty λ α² to the loss, to draw α in; here there is none. If an optimizer step takes α to 0 or
    below, 1e-12 is used in its place, and the gradient goes on to α, so that it can come back.

    References
    ----------
    Choi et al. 2018, "PACT: parameterized clipping activation for quantized neural networks", equations 1 to 3.

    Examples
    --------
    >>> pact = PACT(bits=2, alpha=3.0)
    >>> y = pact(torch.tensor([-1.0, 1.2, 3.0, 7.0]))
    >>> y.sum().backward()
    >>> y.tolist(), pact.alpha.grad.item()
    ([0.0, 1.0, 3.0, 3.0], 2.0)
    """

    def __init__(self, bits, alpha):
        super().__init__()
        self.bits = check_integer(bits, "bits", 2, 8)
        self.alpha = nn.Parameter(_number(alpha, "alpha", _LEAST))

    def forward(self, x):
        x = real_array(x, "x")
        alpha = _positive(self.alpha)
        y = torch.where(x < alpha, x.clamp(min=0), alpha)
        s = alpha.detach() / (2**self.bits - 1)
        return s * round_ste(y / s)

    def params(self):
        """`qlab.affine.QParams` with the same levels, in codes around 0."""
        return _unsigned(_positive(self.alpha.detach()) / (2**self.bits - 1), 0, self.bits)

    def range(self):
        """(0, α), as floats."""
        return 0.0, _positive(self.alpha).item()


class LSQ(nn.Module):
    """Learned step size: x̂ = s · round(clip(v / s, −Q_N, Q_P)) with a learned s, for weights or activations.

    Autograd through the straight-through round gives the paper's ∂x̂/∂s: round(v/s) − v/s where v/s is inside, −Q_N or
    Q_P where it is clipped.

    Parameters
    ----------
    bits : int, 2 to 8
    scale : float, ≥ 1e-36
        s to start from, in the units of v.
    n : int, ≥ 1
        How many values share s: the weights, or the features of one image. The gradient of s is multiplied by
        g = 1 / √(n Q_P).
    signed : bool
        Q_N = 2^(b−1) and Q_P = 2^(b−1) − 1; or, for data from 0 up, Q_N = 0 and Q_P = 2^b − 1. For 8 bits signed,
        Q_N = 127, because integer kernels do without the code −128.

    Raises
    ------
    ValueError
        If a number is out of range. When called: if the data is empty or has a NaN or infinity; all stays as it was.

    Notes
    -----
    An s that is 0 or less is treated as α in `PACT`. Adam divides a gradient by its own size and so undoes g: there the
    learning rate alone sets how far s moves.

    References
    ----------
    Esser et al. 2020, "Learned step size quantization", equations 1 to 3 and section 2.2.

    Examples
    --------
    >>> lsq = LSQ(bits=2, scale=1.0, n=1)
    >>> v_hat = lsq(torch.tensor([0.75, -5.0]))
    >>> v_hat.sum().backward()
    >>> v_hat.tolist(), lsq.scale.grad.item()
    ([1.0, -2.0], -1.75)
    """

    def __init__(self, bits, scale, *, n, signed=True):
        super().__init__()
        self.bits = check_integer(bits, "bits", 2, 8)
        self.qn, self.qp = _lsq_limits(self.bits, signed)
        self.gradient_scale = 1 / math.sqrt(check_integer(n, "n", 1) * self.qp)
        self.scale = nn.Parameter(_number(scale, "scale", _LEAST))

    def forward(self, v):
        v = real_array(v, "v")
        s = _with_gradient_times(_positive(self.scale), self.gradient_scale)
        return s * _codes(v, s, -self.qn, self.qp)

    def params(self, weight=None):
        """`qlab.affine.QParams` with the same levels. ``weight`` plays no part."""
        s = _positive(self.scale.detach())
        if self.qn == 0:
            return _unsigned(s, 0, self.bits)
        return QParams(s, torch.zeros_like(s), -self.qn, self.qp)

    def range(self):
        """(−s Q_N, s Q_P), as floats."""
        s = _positive(self.scale).item()
        return -s * self.qn, s * self.qp


class LSQPlus(nn.Module):
    """Learned step size and offset: x̂ = s · round(clip((x − β) / s, 0, 2^b − 1)) + β, for activations.

    ∂x̂/∂s is that of `LSQ` with x − β in place of v. ∂x̂/∂β = 1 where x is clipped and 0 inside.

    Parameters
    ----------
    bits : int, 2 to 8
    scale : float, ≥ 1e-36
        s to start from, in the units of x.
    offset : float
        β to start from: the lower end of the range, in the units of x.
    n : int, ≥ 1
        As `LSQ`; g multiplies both gradients.

    Raises
    ------
    ValueError
        If a number is out of range. When called: if the data is empty or has a NaN or infinity; all stays as it was.

    Notes
    -----
    An s that is 0 or less is treated as α in `PACT`. With a real β, 0 is not a level: neither integer arithmetic with
    an integer zero-point nor the zeros that pad a convolution can be had exactly. `params` therefore rounds.

    References
    ----------
    Bhalgat et al. 2020, "LSQ+: improving low-bit quantization through learnable offsets and better initialization",
    section 3.1.

    Examples
    --------
    >>> lsq_plus = LSQPlus(bits=2, scale=1.0, offset=-0.5, n=1)
    >>> x_hat = lsq_plus(torch.tensor([-9.0, 0.25, 9.0]))
    >>> x_hat.sum().backward()
    >>> x_hat.tolist(), lsq_plus.offset.grad.item()
    ([-0.5, 0.5, 2.5], 1.154700517654419)
    """

    def __init__(self, bits, scale, offset, *, n):
        super().__init__()
        self.bits = check_integer(bits, "bits", 2, 8)
        self.qp = 2**self.bits - 1
        self.gradient_scale = 1 / math.sqrt(check_integer(n, "n", 1) * self.qp)
        self.scale = nn.Parameter(_number(scale, "scale", _LEAST))
        self.offset = nn.Parameter(_number(offset, "offset"))

    def forward(self, x):
        x = real_array(x, "x")
        s = _with_gradient_times(_positive(self.scale), self.gradient_scale)
        beta = _with_gradient_times(self.offset, self.gradient_scale)
        return s * _codes(x - beta, s, 0, self.qp) + beta

    def params(self):
        """`qlab.affine.QParams` with −β / s rounded to an integer zero-point, within the codes so that 0 is a level."""
        s = _positive(self.scale.detach())
        return _unsigned(s, (-self.offset.detach() / s).round().clamp(0, self.qp), self.bits)

    def range(self):
        """(β, β + s (2^b − 1)), as floats."""
        s, beta = _positive(self.scale).item(), self.offset.item()
        return beta, beta + s * self.qp


class QATLayer(ptq.Replacement):
    """A Linear or Conv2d layer in training with its quantizers: y = layer(x̂; ŵ, bias).

    The bias stays in float, as in the paper. Integers store it in units of the accumulator, S₁S₂: fine at 8 bits,
    coarse at 4 and fewer, where `qlab.integer.round_biases` tells what it costs.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        Left as it is; ``self.layer`` is a copy, with the weights w in float that the optimizer moves.
    weight_quantizer : Absmax or LSQ
    input_quantizer : EMA, PACT, LSQ or LSQPlus
        Both become float64 if the layer is.

    Raises
    ------
    ValueError
        As `qlab.ptq.Replacement`.

    References
    ----------
    Jacob et al. 2018, figure 1.1 b.
    """

    def __init__(self, layer, weight_quantizer, input_quantizer):
        super().__init__(layer)
        self.layer.requires_grad_()
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.to(self.layer.weight)

    def forward(self, input):  # named as torch names it: a model may call ``layer(input=x)``
        if self.layer._forward_pre_hooks:
            raise ValueError("layer must get no hooks after prepare, which would write weights that are not quantized")
        weight = self.weight_quantizer(self.layer.weight)
        return functional_call(self.layer, {"weight": weight}, self.input_quantizer(input).to(weight.dtype))


def prepare(model, scheme, images, *, weight_bits, activation_bits, start_delay=0):
    """Put quantizers into a network, ready to be trained.

    ========  ===========================  ===================================================================
    scheme    weights                      inputs of each layer, and where their range starts
    ========  ===========================  ===================================================================
    "Jacob"   `Absmax`                     `EMA`, from the moving average over the images in batches of 64
    "PACT"    `Absmax`                     `PACT`, from the largest value
    "LSQ"     `LSQ`, from 2⟨|w|⟩ / √Q_P    `LSQ`, from 2⟨|x|⟩ / √Q_P; unsigned where no value is below 0
    "LSQ+"    `LSQ`, from (|μ| + 3σ) /     `LSQPlus`, from the range with the least squared error
              2^(b−1) of the weights
    ========  ===========================  ===================================================================

    Parameters
    ----------
    model : nn.Module
        In float, batch norm folded. It is left as it is. Layers that share weights share them in the copy.
    scheme : str
        A member of ``SCHEMES``.
    images : float tensor, shape (N, ...)
        To start the ranges of the activations from.
    weight_bits, activation_bits : int, 2 to 8
    start_delay
        As `EMA`; only "Jacob" uses it.

    Returns
    -------
    nn.Module
        A copy of the model in eval mode in which each of the `qlab.ptq.layers` is a `QATLayer`.

    Raises
    ------
    ValueError
        As `qlab.ptq.observe`; or if there is no such scheme, a number is out of range, the model never calls one of its
        layers, a layer is pruned (training would bring the weights back), or "PACT" is asked to quantize inputs below
        0, all of which it would clip.

    References
    ----------
    Those of the quantizers; Bhalgat et al. 2020, section 3.2 (initialization). The PACT paper takes DoReFa's weight
    quantizer, whose ±1 needs the batch norm that is folded here.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> prepare(model, "PACT", torch.rand(100, 2), weight_bits=4, activation_bits=3)[2].input_quantizer.bits
    3
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    weight_bits = check_integer(weight_bits, "weight_bits", 2, 8)
    activation_bits = check_integer(activation_bits, "activation_bits", 2, 8)

    def weight_quantizer(weight):
        if scheme in ("Jacob", "PACT"):
            return Absmax(weight_bits)
        w = weight.detach().flatten()
        if scheme == "LSQ":
            scale = _lsq_scale(w, weight_bits, signed=True)
        else:
            scale = (w.mean().abs() + 3 * w.std(correction=0)) / 2 ** (weight_bits - 1)
        return LSQ(weight_bits, _or_one(scale), n=w.numel())

    def input_quantizer(name, batches):
        if scheme == "Jacob":
            return EMA(activation_bits, *calibration.moving_minmax(batches), start_delay=start_delay)
        x = torch.cat([batch.flatten() for batch in batches])
        n, low = max(1, x.numel() // len(images)), float(x.min())
        if scheme == "LSQ":
            signed = low < 0
            return LSQ(activation_bits, _or_one(_lsq_scale(x, activation_bits, signed)), n=n, signed=signed)
        if scheme == "PACT":
            if low < 0:
                raise ValueError(f"PACT clips what is below 0, but {name!r} receives {low:g}: take another scheme")
            return PACT(activation_bits, _or_one(x.max()))
        alpha, beta = calibration.mse(x, activation_bits)
        return LSQPlus(activation_bits, _or_one((beta - alpha) / (2**activation_bits - 1)), alpha, n=n)

    inputs, prepared, shared = ptq.observe(model, images), {}, {}
    for name, layer in ptq.layers(model).items():
        if not inputs[name]:
            raise ValueError(f"model must call each of its layers, but {name!r} received nothing")
        if prune.is_pruned(layer):
            raise ValueError(f"model must not be pruned, but {name!r} is: call torch.nn.utils.prune.remove first")
        new = prepared[id(layer)] = QATLayer(layer, weight_quantizer(layer.weight), input_quantizer(name, inputs[name]))
        for kind, parameter in layer.named_parameters():
            setattr(new.layer, kind, shared.setdefault(id(parameter), getattr(new.layer, kind)))
    return ptq.copied(model, prepared)


def convert(prepared):
    """The network as it is deployed: the weights quantized once, the range of each layer's inputs fixed.

    Parameters
    ----------
    prepared : nn.Module
        From `prepare`, trained for as long as you wish. It is left as it is.

    Returns
    -------
    nn.Module
        As `qlab.ptq.quantize_static`, with an integer zero-point everywhere: each `QATLayer` becomes a
        `qlab.ptq.QuantizedLayer`. In eval mode it returns bit for bit what ``prepared`` does, except for "LSQ+", where
        −β / s is rounded to an integer zero-point: a shift of each level by up to s / 2, or more where [α, β] does not
        hold 0.

    Raises
    ------
    ValueError
        If the model holds no `QATLayer`, or one that has hooks.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> prepared = prepare(model, "LSQ", torch.rand(100, 2), weight_bits=4, activation_bits=3)
    >>> x = torch.rand(10, 2)
    >>> torch.equal(convert(prepared)(x), prepared(x))
    True
    """
    quantized = {}
    for name, layer in _qat_layers(prepared).items():
        if ptq.is_altered(layer) or ptq.is_altered(layer.layer):
            raise ValueError(f"prepared must have no hooks on its layers, which would be lost, got some on {name!r}")
        weight_params = layer.weight_quantizer.params(layer.layer.weight)
        quantized[id(layer)] = ptq.QuantizedLayer(layer.layer, weight_params, layer.input_quantizer.params())
    return ptq.copied(prepared, quantized)


def ranges(prepared):
    """The range of each layer's inputs as it is now, to be drawn while the network trains.

    Parameters
    ----------
    prepared : nn.Module
        From `prepare`.

    Returns
    -------
    dict of str to (alpha, beta)
        Floats, in the units of the inputs. "Jacob": the moving average, not yet widened to hold 0. "PACT": (0, α).
        "LSQ": (−s Q_N, s Q_P). "LSQ+": (β, β + s (2^b − 1)).

    Raises
    ------
    ValueError
        If the model holds no `QATLayer`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    >>> prepared = prepare(model, "PACT", torch.tensor([[0.5], [2.0]]), weight_bits=4, activation_bits=3)
    >>> ranges(prepared)["0"]
    (0.0, 2.0)
    """
    return {name: layer.input_quantizer.range() for name, layer in _qat_layers(prepared).items()}


def _qat_layers(prepared):
    found = {name: module for name, module in prepared.named_modules() if isinstance(module, QATLayer)}
    if not found:
        raise ValueError(f"prepared must hold layers that prepare has made, got none in {type(prepared).__name__}")
    return found


def _positive(x):
    """x, or a small number where x is too small, with the gradient of x even there, so that it can come back."""
    return torch.where(x.detach() >= _LEAST, x.detach(), _HELD) + (x - x.detach())


def _with_gradient_times(x, g):
    """x, with its gradient multiplied by g."""
    return x.detach() + g * (x - x.detach())


def _lsq_limits(bits, signed=True):
    """Q_N and Q_P."""
    return (min(2 ** (bits - 1), 127), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _lsq_scale(v, bits, signed):
    """2⟨|v|⟩ / √Q_P."""
    _, qp = _lsq_limits(bits, signed)
    return 2 * v.abs().mean() / math.sqrt(qp)


def _or_one(scale):
    """A scale to start from, where there may be nothing but zeros."""
    return scale if scale >= _LEAST else 1.0


def _unsigned(scale, zero_point, bits):
    """Parameters of the levels scale · (0 … 2^b − 1 − zero_point), in codes around 0, as all of qlab has them."""
    half = 2 ** (bits - 1)
    return QParams(scale, torch.as_tensor(zero_point) - half, -half, half - 1)


def _codes(v, s, low, high):
    """round(clamp(v / s)), straight through where it is inside."""
    u = v / s
    least, most = u.detach().aminmax()
    if (torch.maximum(-least, most) <= torch.finfo(u.dtype).max * s.detach()).all():
        return round_ste(u.clamp(low, high))
    ends = u.detach().clamp(low, high)  # outside, u / s, by which torch would multiply a slope of 0, is infinite
    inside = u.detach() == ends
    return torch.where(inside, round_ste(torch.where(inside, v, 0) / s), ends)


def _number(value, name, low=-math.inf):
    """``value`` as a float32 tensor; a ValueError unless it is one finite number of at least ``low``."""
    try:
        number = torch.as_tensor(value, dtype=torch.float32).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if number.ndim or not low <= number < math.inf or number == -math.inf:
        least = "" if low == -math.inf else f"at least {low} and "
        raise ValueError(f"{name} must be {least}finite, got {number.tolist()}")
    return number
