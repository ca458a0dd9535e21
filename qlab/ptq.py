"""Post-training quantization (PTQ) of a network's Linear and Conv2d layers, dynamic or static, simulated in floats.

Fold batch norm, watch what each layer receives, choose ranges, quantize:

    folded = fold_batch_norm(model)
    inputs = observe(folded, calibration_images)
    ranges = calibrate(inputs, bits=4, calibrator="MSE")
    quantized = quantize_static(folded, ranges, weight_bits=4, activation_bits=4)

or, without calibration, ``quantize_dynamic(folded)``. Every function returns something new; no model is changed.
"""

import copy
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qlab import calibration
from qlab.affine import absmax_params, check_integer, fake_quantize, real_array, zero_point_params
from qlab.training import check_images, evaluating, read

LAYERS = (nn.Linear, nn.Conv2d)
CALIBRATORS = {  # name: function of the observed batches and the bits, which returns (alpha, beta)
    "min-max": lambda batches, bits: calibration.minmax(_values(batches)),
    "EMA": lambda batches, bits: calibration.moving_minmax(batches),
    "percentile": lambda batches, bits: calibration.percentile(_values(batches), 99.9),
    "MSE": lambda batches, bits: calibration.mse(_values(batches), bits),
    "KL": lambda batches, bits: calibration.entropy(_values(batches), bits),
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH = 64  # images at a time: a moving average moves once for each batch
_SHARES = torch.linspace(1, 0.01, 100)  # of max|w|; the largest first, so that it wins a tie


class Replacement(nn.Module):
    """What takes the place of a Linear or Conv2d layer: `QuantizedLayer` and `qlab.qat.QATLayer`.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        Left as it is; ``self.layer`` is a copy.

    Raises
    ------
    ValueError
        If ``layer`` is of another type or cannot be quantized, as `check_layer`.
    """

    def __init__(self, layer):
        super().__init__()
        check_layer(layer, "layer")
        self.layer = copied(layer)

    @property
    def weight(self):
        """Refused: a module that computes with the weights of a layer by itself would leave the inputs in float."""
        raise ValueError(f"layer must be called to be quantized, but its weight was read from a {type(self).__name__}")


class QuantizedLayer(Replacement):
    """A Linear or Conv2d layer with quantized weights and inputs: y = layer(x̂; ŵ, bias), in floats.

    The weights are quantized once, here; the inputs at each call. The bias stays in float.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        Left as it is; the quantized layer holds a copy, ``self.layer``, with the weights ŵ.
    weight_params : QParams or None
        None leaves the weights in float.
    input_params : QParams or None
        Static quantization of the inputs, by parameters that are known before.
    dynamic_bits : int, 2 to 8, or None
        Dynamic quantization of the inputs, by parameters that hold the range of each batch.
        If this and ``input_params`` are None, the inputs stay in float.

    Raises
    ------
    ValueError
        As `Replacement`; or if ``dynamic_bits`` is out of range, or given beside ``input_params``.

    References
    ----------
    Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", figure 1.1 b.

    Examples
    --------
    >>> linear = nn.Linear(2, 1, bias=False)
    >>> linear.weight.data = torch.tensor([[0.3, -1.0]])
    >>> quantized = QuantizedLayer(linear, absmax_params(linear.weight.detach(), bits=2))
    >>> quantized(torch.tensor([[1.0, 5.0]])).tolist()
    [[-5.0]]
    """

    def __init__(self, layer, weight_params=None, input_params=None, *, dynamic_bits=None):
        super().__init__(layer)
        if input_params is not None and dynamic_bits is not None:
            raise ValueError("input_params and dynamic_bits exclude each other, got both")
        self.layer.requires_grad_(False)
        self.weight_params = weight_params
        self.input_params = input_params
        self.dynamic_bits = _check_bits(dynamic_bits, "dynamic_bits")
        if weight_params is not None:
            self.layer.weight.copy_(fake_quantize(self.layer.weight, weight_params))

    def forward(self, input):  # named as torch names it: a model may call ``layer(input=x)``
        x = input
        if self.input_params is not None:
            x = fake_quantize(x, self.input_params)
        elif self.dynamic_bits is not None:
            x = fake_quantize(x, zero_point_params(x, self.dynamic_bits))
        return self.layer(x.to(self.layer.weight.dtype))

    def extra_repr(self):
        inputs = self.input_params if self.dynamic_bits is None else f"dynamic, {self.dynamic_bits} bits"
        return f"weights: {self.weight_params}, inputs: {inputs}"


def fold_batch_norm(model):
    """A copy of the model, in eval mode, in which batch norm is a part of the convolutions.

    In every nn.Sequential, a BatchNorm2d right after a Conv2d is folded: w ← γ w / √(σ² + ε) for each output channel,
    and the bias becomes β + γ (bias − μ) / √(σ² + ε). The batch norm is taken out; all other names stay. What is used
    elsewhere in the model as well, or has hooks, is left as it is.

    Parameters
    ----------
    model : nn.Module
        Trained: the running mean μ and variance σ² are used. It must call each nn.Sequential as a whole. Pruning
        (torch.nn.utils.prune) becomes permanent in the copy.

    Returns
    -------
    nn.Module
        With the same outputs as ``model`` in eval mode, up to floating-point rounding.

    Raises
    ------
    ValueError
        If a batch norm keeps no running statistics, or the model cannot be copied.

    References
    ----------
    Jacob et al. 2018, section 3.2 and equation 14.

    Examples
    --------
    >>> fold_batch_norm(nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6()))
    Sequential(
      (0): Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
      (2): ReLU6()
    )
    """
    model = copied(model)
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())

    def folds(module, kind):  # a subclass may compute something else
        return type(module) is kind and places[id(module)] == 1 and not is_altered(module)

    for path, sequential in list(model.named_modules()):
        if not isinstance(sequential, nn.Sequential) or type(sequential).forward is not nn.Sequential.forward:
            continue
        # Not named_children(), which leaves out a module's second place and so brings others together.
        for (name, conv), (norm_name, norm) in pairwise(list(sequential._modules.items())):
            if folds(conv, nn.Conv2d) and folds(norm, nn.BatchNorm2d):
                if norm.running_var is None:
                    raise ValueError(f"model must keep running statistics to be folded, "
                                     f"got none in {f'{path}.{norm_name}'.lstrip('.')!r}")
                setattr(sequential, name, fuse_conv_bn_eval(conv, norm))
                delattr(sequential, norm_name)  # unlike ``del sequential[i]``, which renames the layers after it
    return model


def layers(model):
    """The layers that can be quantized, by name, in the order of the model.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to nn.Linear or nn.Conv2d
        The name is the path in the model, such as "features.0"; it is "" if the model itself is such a layer. A layer
        with several names is listed under the first.

    Raises
    ------
    ValueError
        If there is none, a batch norm is not folded, another type of layer has weights, which would stay in float, the
        model is compiled, or as `check_layer`.

    Examples
    --------
    >>> list(layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10))))
    ['0', '3']
    """
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must not be compiled, but {kind} at {name!r} is: quantize what it was made from")
        if isinstance(module, Replacement):
            raise ValueError(f"model must be in float, but {name!r} is quantized already: {kind}")
        if isinstance(module, _BATCH_NORMS):
            raise ValueError(f"model must not hold batch norm, got {kind} at {name!r}: call fold_batch_norm first (it "
                             f"folds a BatchNorm2d right after a Conv2d in an nn.Sequential, both without hooks and "
                             f"used nowhere else)")
        if type(module) in LAYERS:
            check_layer(module, f"layer {name!r}")
            found[name] = module
        elif "forward" in vars(module):  # it could call the float layers, whatever stands in their places
            raise ValueError(f"model must have the forward of its classes, got another for {kind} at {name!r}")
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(f"model must hold no weights outside of Linear and Conv2d, got {kind} at {name!r}")
    if not found:
        raise ValueError(f"model must hold a Linear or Conv2d layer, got none in {type(model).__name__}")
    return found


def check_layer(layer, name):
    """A ValueError unless a `QuantizedLayer` can do what the layer ``name`` does.

    It must be an nn.Linear or nn.Conv2d itself, in float32 or float64 and finite, with no hooks but those of
    torch.nn.utils.prune: others change inputs, weights or outputs at each call, and quantization would not know.
    """
    if type(layer) not in LAYERS:
        raise ValueError(f"{name} must be nn.Linear or nn.Conv2d, got {type(layer).__name__}")
    if is_altered(layer):
        raise ValueError(f"{name} must have no hooks, nor a weight that hooks compute: remove them first, for instance "
                         f"by torch.nn.utils.remove_weight_norm")
    weight = layer.weight.detach()
    if weight.is_meta or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must have weights in float32 or float64, got {weight.dtype} on {weight.device}")
    real_array(weight, f"the weight of {name}")


def observe(model, images):
    """What each layer receives while the model reads the calibration images, 64 at a time.

    Parameters
    ----------
    model : nn.Module
        In float, batch norm folded. It runs in eval mode.
    images : float tensor, shape (N, ...)

    Returns
    -------
    dict of str to list of float tensors
        For each of the `layers`, its inputs, call by call: one for each batch, if the model calls it once.

    Raises
    ------
    ValueError
        As `layers`; or if ``images`` is empty, has a NaN or infinity, or has not the shape that the model asks for; or
        if a layer receives a NaN or infinity.

    Examples
    --------
    >>> inputs = observe(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.rand(100, 2))
    >>> {name: [tuple(batch.shape) for batch in batches] for name, batches in inputs.items()}
    {'0': [(64, 2), (36, 2)], '2': [(64, 4), (36, 4)]}
    """
    return record_calls(model, layers(model), images, _BATCH, lambda inputs, output: inputs[0])


def outputs(model, images):
    """What each layer puts out, before its activation function, while the model reads the images.

    Parameters
    ----------
    model : nn.Module
        In float, batch norm folded; or from `quantize_static`, `quantize_dynamic` or `qlab.qat`. It runs in eval mode.
    images : float tensor, shape (N, ...)
        Read as one batch.

    Returns
    -------
    dict of str to list of float tensors
        For each of the `layers`, its outputs, call by call: one, if the model calls it once.

    Raises
    ------
    ValueError
        As `observe`.

    Examples
    --------
    The SQNR of each layer; the errors of all layers before it count too.

    >>> from qlab.affine import sqnr_db
    >>> linear = nn.Linear(1, 1, bias=False)
    >>> linear.weight.data = torch.tensor([[2.0]])
    >>> quantized = quantize_static(nn.Sequential(linear), {"0": (0, 3)}, activation_bits=2)
    >>> images = torch.tensor([[1.1], [2.0]])
    >>> exact, noisy = outputs(nn.Sequential(linear), images), outputs(quantized, images)
    >>> {name: round(float(sqnr_db(x, noisy[name][0])), 2) for name, (x,) in exact.items()}
    {'0': 27.17}
    """
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Replacement)}
    return record_calls(model, quantized or layers(model), images, None, lambda inputs, output: output)


def calibrate(inputs, bits=8, calibrator="min-max"):
    """A range [α, β] for the inputs of each layer.

    Parameters
    ----------
    inputs : dict of str to list of float tensors
        From `observe`.
    bits : int, 2 to 8
        Of the activations to be; "min-max", "EMA" and "percentile" give the same range for any.
    calibrator : str
        A key of ``CALIBRATORS``: "min-max", "EMA" (moving average of the batches' ends, c = 0.01), "percentile" (99.9),
        "MSE" or "KL". KL needs many distinct values: pixels with 17 gray levels make it stop at the first of them.

    Returns
    -------
    dict of str to (alpha, beta)
        To set one yourself: ``ranges | {"conv": (0, 1)}``.

    Raises
    ------
    ValueError
        If a layer received nothing, or a NaN or infinity, ``bits`` is out of range or there is no such calibrator.

    References
    ----------
    Jacob et al. 2018, section 3.1 (EMA); `qlab.calibration` for the others.

    Examples
    --------
    >>> calibrate({"fc": [torch.tensor([0.5, -1.0]), torch.tensor([3.0])]})
    {'fc': (-1.0, 3.0)}
    """
    bits = check_integer(bits, "bits", 2, 8)
    if calibrator not in CALIBRATORS:
        raise ValueError(f"calibrator must be one of {', '.join(CALIBRATORS)}, got {calibrator!r}")
    for name, batches in inputs.items():
        if not batches:
            raise ValueError(f"inputs must hold at least one batch for each layer, got none for {name!r}")
    return {name: CALIBRATORS[calibrator]([real_array(x.detach(), f"what {name!r} receives") for x in batches], bits)
            for name, batches in inputs.items()}


def quantize_static(model, ranges, *, weight_bits=8, activation_bits=8, per_channel=False, weight_range="min-max"):
    """Quantize weights, and the inputs of each layer over ranges fixed in advance.

    Parameters
    ----------
    model : nn.Module
        In float, batch norm folded.
    ranges : dict of str to (alpha, beta)
        From `calibrate`; widened to hold 0. Not used where ``activation_bits`` is None.
    weight_bits, activation_bits : int, 2 to 8, or None
        None leaves them in float.
    per_channel : bool
        Weights: one scale for each output channel instead of one for each layer.
    weight_range : {"min-max", "MSE"}
        As `weight_params`.

    Returns
    -------
    nn.Module
        A copy of the model in eval mode in which each of the `layers` is a `QuantizedLayer`.

    Raises
    ------
    ValueError
        As `layers`; or if a layer has no range or one without α ≤ β, or another argument is out of range.

    References
    ----------
    Nagel et al. 2021, "A white paper on neural network quantization", section 3.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> ranges = calibrate(observe(model, torch.rand(100, 2)), bits=4)
    >>> quantized = quantize_static(model, ranges, weight_bits=4, activation_bits=4)
    >>> quantized[0].weight_params.qmax, quantized[0].input_params.qmax
    (7, 7)
    """
    _check_bits(activation_bits, "activation_bits")

    def quantized_layer(name, layer):
        params = weight_params(layer.weight, weight_bits, per_channel=per_channel, weight_range=weight_range)
        if activation_bits is None:
            return QuantizedLayer(layer, params)
        if name not in ranges:
            raise ValueError(f"ranges must hold one for each layer, got none for {name!r}")
        alpha, beta = ranges[name]
        if not alpha <= beta:
            raise ValueError(f"ranges must have alpha at most beta, got {alpha} and {beta} for {name!r}")
        return QuantizedLayer(layer, params, zero_point_params(layer.weight.new_tensor([alpha, beta]), activation_bits))

    return _replaced(model, quantized_layer)


def quantize_dynamic(model, *, weight_bits=8, activation_bits=8, per_channel=False, weight_range="min-max"):
    """Quantize weights, and the inputs of each layer over the range of the batch at hand: no calibration.

    Parameters
    ----------
    model, weight_bits, activation_bits, per_channel, weight_range
        As `quantize_static`.

    Returns
    -------
    nn.Module
        As `quantize_static`. A prediction depends on the other images of its batch.

    Raises
    ------
    ValueError
        As `layers`; or if an argument is out of range.

    References
    ----------
    Gholami et al. 2022, "A survey of quantization methods for efficient neural network inference", section III-C.

    Examples
    --------
    >>> quantize_dynamic(nn.Sequential(nn.Linear(2, 4)), activation_bits=3)[0].dynamic_bits
    3
    """
    _check_bits(activation_bits, "activation_bits")

    def quantized_layer(name, layer):
        params = weight_params(layer.weight, weight_bits, per_channel=per_channel, weight_range=weight_range)
        return QuantizedLayer(layer, params, dynamic_bits=activation_bits)

    return _replaced(model, quantized_layer)


def weight_params(weight, weight_bits=8, *, per_channel=False, weight_range="min-max"):
    """Symmetric quantization parameters of a layer's weights.

    Parameters
    ----------
    weight : float tensor, shape (C, ...)
    weight_bits : int, 2 to 8, or None
    per_channel : bool
        One scale for each output channel, axis 0.
    weight_range : {"min-max", "MSE"}
        Reach max|w|, or the share of it (of 1 %, 2 %, … 100 %) with the least squared error.

    Returns
    -------
    QParams or None
        Codes from −qmax to qmax. None where ``weight_bits`` is.

    Raises
    ------
    ValueError
        If ``weight`` is empty or has a NaN or infinity, or another argument is out of range.

    Examples
    --------
    >>> weight = torch.tensor([[0.1, 0.1, -0.1, 0.1, -0.1, 0.3], [1.0, -1.0, 1.0, 1.0, -1.0, 1.0]])
    >>> weight_params(weight, 2, per_channel=True).scale
    tensor([0.3000, 1.0000])
    >>> weight_params(weight, 2, per_channel=True, weight_range="MSE").scale
    tensor([0.1320, 1.0000])
    """
    weight_bits = _check_bits(weight_bits, "weight_bits")
    if weight_range not in ("min-max", "MSE"):
        raise ValueError(f"weight_range must be 'min-max' or 'MSE', got {weight_range!r}")
    if weight_bits is None:
        return None
    weight = weight.detach()
    params = absmax_params(weight, weight_bits, axis=0 if per_channel else None)
    if weight_range == "min-max":
        return params
    # In units near the scale, a power of two and so exact, the squares of tiny or huge weights stay within float32.
    unit = torch.ldexp(torch.ones_like(params.scale), -torch.frexp(params.scale).exponent).reshape(-1, 1)
    rows = weight.reshape(len(weight) if per_channel else 1, -1) * unit
    shares = _SHARES.to(weight.device)
    scales = (params.scale.reshape(-1, 1) * unit).T * shares[:, None]  # shares × rows
    chunks = scales.split(max(1, 2**20 // weight.numel()))  # to bound the memory that large layers take
    errors = torch.cat([_squared_errors(rows, chunk, params) for chunk in chunks])
    return replace(params, scale=params.scale * shares[errors.argmin(0)].reshape(params.scale.shape))


def is_altered(module):
    """Whether something else than its class and its parameters, or pruning, decides what the module computes."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or any(not isinstance(hook, prune.BasePruningMethod) for hook in hooks)


def copied(model, replacements=None):
    """A copy in eval mode, with ``replacements[id(module)]`` in place of a module, wherever it stands.

    Pruning becomes permanent: its hooks would write the float weights again at each call.
    """
    # torch refuses to copy what autograd computed, such as the weight of a pruned layer until its first call.
    computed = {id(tensor): tensor.detach().clone() for module in model.modules() for tensor in vars(module).values()
                if isinstance(tensor, torch.Tensor)}
    try:
        model = copy.deepcopy(model, computed | (replacements or {}))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model must be one that can be copied, got {type(model).__name__}: {error}") from error
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return model.eval()


def record_calls(model, named_layers, images, batch_size, pick):
    """``pick(inputs, output)`` at each call of each layer, while the model reads ``batch_size`` images at a time."""
    check_images(images)
    records = {name: [] for name in named_layers}

    def recorder(name):
        def record(module, inputs, named_inputs, output):
            values = pick((*inputs, *named_inputs.values()), output)
            if values.numel():
                real_array(values, f"what {name!r} receives or returns")
                records[name].append(values.clone())  # because the next module may work in place
        return record

    hooks = [layer.register_forward_hook(recorder(name), with_kwargs=True) for name, layer in named_layers.items()]
    try:
        with evaluating(model):
            for batch in images.split(batch_size or len(images)):
                read(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return records


def _replaced(model, quantized_layer):
    """A copy of the model in eval mode with ``quantized_layer(name, layer)`` in place of each layer.

    It gets a copy of the layer: the weight attribute of a pruned one is that of its last call, which may be an old one.
    """
    return copied(model, {id(layer): quantized_layer(name, copied(layer)) for name, layer in layers(model).items()})


def _squared_errors(rows, scales, params):
    """Σ (w − ŵ)² of each row (R, K) under each of its scales (S, R): shape (S, R)."""
    tiled = rows.tile(len(scales), 1)
    zero = params.zero_point.new_zeros(scales.numel())
    params = replace(params, scale=scales.flatten(), zero_point=zero, axis=0)
    return (fake_quantize(tiled, params) - tiled).square().sum(1).reshape(scales.shape)


def _values(batches):
    return torch.cat([batch.flatten() for batch in batches])


def _check_bits(bits, name):
    return None if bits is None else check_integer(bits, f"{name}, unless None,", 2, 8)
