"""Post-training quantization against torch's own quantizers, observers and plain composition."""

import copy
import math
import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from qlab import calibration, digits
from qlab.affine import QParams, absmax_params, quantize, sqnr_db, zero_point_params
from qlab.ptq import (
    CALIBRATORS,
    LAYERS,
    QuantizedLayer,
    calibrate,
    fold_batch_norm,
    layers,
    observe,
    outputs,
    quantize_dynamic,
    quantize_static,
    weight_params,
)

BITS = range(2, 9)
NAMES = ["conv", "depthwise1", "pointwise1", "depthwise2", "pointwise2", "depthwise3", "pointwise3", "linear"]


@cache
def data():
    return digits.data()


@cache
def folded():
    return fold_batch_norm(digits.load())


@cache
def observed():
    return observe(folded(), data().train_images[:256])


@cache
def ranges(bits, calibrator):
    return calibrate(observed(), bits, calibrator)


def percent(model):
    return digits.accuracy(model, data().test_images, data().test_labels)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sqnr_of_layers(model, quantized, images):
    noisy = outputs(quantized, images)
    return {name: float(sqnr_db(x, noisy[name][0])) for name, (x,) in outputs(model, images).items()}


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def snapshot(model):
    """What must not change: values, modes, hooks, types."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rest = [(name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()]
    return state, rest


def assert_unchanged(model, before):
    state, rest = snapshot(model)
    assert rest == before[1] and state.keys() == before[0].keys()
    for name, value in state.items():
        torch.testing.assert_close(value, before[0][name], rtol=0, atol=0, equal_nan=True)


# Folding


def randomized(model):
    """The model with batch norms that do something."""
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(normal(module.num_features, seed=i))
            module.running_var.copy_(normal(module.num_features, seed=i + 1).exp())
            if module.affine:
                module.weight.data.copy_(normal(module.num_features, seed=i + 2))
                module.bias.data.copy_(normal(module.num_features, seed=i + 3))
    return model


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, eps=0.3), nn.ReLU6())
        self.right = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, affine=False)), nn.Identity())

    def forward(self, x):
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("model", [
    digits.Net(), digits.load(), Branches(),
    nn.Sequential(nn.Conv2d(1, 4, 3, groups=1, bias=True), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, stride=2),
                  nn.BatchNorm2d(8)),
], ids=["initial", "trained", "branches", "grouped"])
def test_folding_keeps_the_outputs(model):
    if model.training:
        randomized(model)
    before = snapshot(model)
    ours = fold_batch_norm(model)
    assert_unchanged(model, before)
    assert not any(isinstance(m, nn.BatchNorm2d) or m.training for m in ours.modules())
    images = data().test_images
    expected = copy.deepcopy(model).eval()(images)
    assert (ours(images) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_folded_weights_are_those_of_jacob():
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=0.1)
    randomized(norm)
    ours = fold_batch_norm(nn.Sequential(conv, norm))[0]
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    torch.testing.assert_close(ours.weight, gain[:, None, None, None] * conv.weight)
    torch.testing.assert_close(ours.bias, norm.bias + gain * (conv.bias - norm.running_mean))


def test_folding_keeps_the_names():
    names = {name for name, _ in digits.load().named_modules()}
    assert {name for name, _ in folded().named_modules()} == {name for name in names if not name.endswith("_norm")}
    assert list(layers(folded())) == NAMES


def test_folding_leaves_other_batch_norm():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
    assert [type(m) for m in fold_batch_norm(model)] == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.BatchNorm2d]


def test_batch_norm_without_running_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="running statistics to be folded, got none in '1'"):
        fold_batch_norm(model)


class AlsoAlone(nn.Module):
    """A convolution that is followed by batch norm in one place, and used alone in another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.both = nn.Sequential(self.conv, nn.BatchNorm2d(4))

    def forward(self, x):
        return self.both(x) + self.conv(x)


class Residual(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[0](x)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return conv2d(x, self.weight - self.weight.mean(), self.bias)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def conv(*change, **options):
    layer = nn.Conv2d(4, 4, 3, padding=1, **options)
    for function in change:
        function(layer)
    return layer


def folding_cases():
    relu, norm, shared, pair = nn.ReLU(), nn.BatchNorm2d(4), conv(), nn.Sequential(conv(), nn.BatchNorm2d(4))
    one_norm = [nn.Sequential(conv(), norm), nn.Sequential(conv(), norm)]
    hooked = [
        lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    ]
    pruned = [lambda layer, name=name: prune.l1_unstructured(layer, name, 0.5) for name in ("weight", "bias", "weight")]
    left = {  # name: model, batch norms that cannot be folded
        "a module's second place": nn.Sequential(conv(), relu, conv(), relu, nn.BatchNorm2d(4)),
        "a convolution twice": nn.Sequential(shared, shared, nn.BatchNorm2d(4)),
        "a batch norm twice": nn.Sequential(conv(), nn.ReLU(), norm, conv(), norm),
        "a batch norm of two": nn.Sequential(*one_norm),
        "a convolution used alone": AlsoAlone(),
        "another forward": Residual(conv(), nn.BatchNorm2d(4)),
        "a convolution's subclass": nn.Sequential(Standardized(4, 4, 1), nn.BatchNorm2d(4)),
        "a batch norm's subclass": nn.Sequential(conv(), DoubledNorm(4)),
        "a transposed convolution": nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)),
        "a hook": nn.Sequential(conv(hooked[0]), nn.BatchNorm2d(4)),
        "a hook before": nn.Sequential(conv(hooked[1]), nn.BatchNorm2d(4)),
        "weight norm": nn.Sequential(conv(parametrizations.weight_norm), nn.BatchNorm2d(4)),
        "weight norm by a hook": nn.Sequential(conv(weight_norm), nn.BatchNorm2d(4)),
        "spectral norm by a hook": nn.Sequential(conv(spectral_norm), nn.BatchNorm2d(4)),
    }
    folded = {
        "a pair twice": nn.Sequential(pair, nn.ReLU(), pair),
        "reflected padding": nn.Sequential(conv(padding_mode="reflect"), nn.BatchNorm2d(4)),
        "pruned": nn.Sequential(conv(*pruned), nn.BatchNorm2d(4)),
    }
    return [(model, "left", name) for name, model in left.items()] + [(m, "folded", name) for name, m in folded.items()]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", range(17))
def test_batch_norm_is_folded_only_where_nothing_else_changes(case):
    model, what, name = folding_cases()[case]
    randomized(model).eval()
    ours, x = fold_batch_norm(model), normal(2, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in ours.modules()) == (what == "left"), name


# One layer

EXACT_LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (7, 12), linear, {}),
    "linear on tokens": (lambda: nn.Linear(12, 5, bias=False), (2, 3, 12), linear, {}),
    "conv": (lambda: nn.Conv2d(2, 6, 3, stride=2, padding=1), (4, 2, 9, 9), conv2d, {"stride": 2, "padding": 1}),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (3, 4, 7, 7), conv2d,
                  {"groups": 4, "dilation": 2}),
}


def torch_fake_quantize(x, params):
    """torch's operators: they multiply by 1 / s, which is the same where s is a power of two."""
    if params.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, float(params.scale), int(params.zero_point), params.qmin,
                                                     params.qmax)
    return torch.fake_quantize_per_channel_affine(x, params.scale, params.zero_point, params.axis, params.qmin,
                                                  params.qmax)


def with_power_of_two_scales(layer, bits, per_channel):
    """Weights whose largest magnitudes are qmax times 1/8, 1/16, …; returns the scales to be."""
    qmax = 2 ** (bits - 1) - 1
    rows = layer.weight.data.flatten(1)
    scales = 2.0 ** -(3 + torch.arange(len(rows)) % 3) if per_channel else torch.full((len(rows),), 2.0**-4)
    rows.copy_(normal(*rows.shape).clamp(-1, 1) * qmax * scales[:, None])
    rows[:, 1] = -qmax * scales
    return scales if per_channel else scales[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", EXACT_LAYERS)
def test_static_layer_equals_torch(name, per_channel, bits):
    make, shape, function, options = EXACT_LAYERS[name]
    layer = make()
    scales = with_power_of_two_scales(layer, bits, per_channel)
    x = normal(*shape, seed=1)
    alpha, beta = -0.25, 0.25 * (2**bits - 2)  # s = 1/4 and z one above qmin
    quantized = quantize_static(layer, {"": (alpha, beta)}, weight_bits=bits, activation_bits=bits,
                                per_channel=per_channel)
    assert torch.equal(quantized.weight_params.scale, scales)
    assert (quantized.weight_params.qmin, quantized.weight_params.qmax) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert quantized.weight_params.axis == (0 if per_channel else None)
    inputs = quantized.input_params
    assert (float(inputs.scale), int(inputs.zero_point)) == (0.25, 1 - 2 ** (bits - 1))
    assert (inputs.qmin, inputs.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = torch_fake_quantize(layer.weight.detach(), quantized.weight_params)
    assert torch.equal(quantized.layer.weight, weight)
    with torch.no_grad():
        expected = function(torch_fake_quantize(x, inputs), weight, layer.bias, **options)
    assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", EXACT_LAYERS)
def test_dynamic_layer_takes_the_range_of_each_batch(name, per_channel, bits):
    make, shape, function, options = EXACT_LAYERS[name]
    layer = make()
    quantized = quantize_dynamic(layer, weight_bits=bits, activation_bits=bits, per_channel=per_channel)
    weight = torch_fake_quantize(layer.weight.detach(), absmax_params(layer.weight.detach(), bits,
                                                                      axis=0 if per_channel else None))
    for size in (1, 5, 0.1):
        x = size * normal(*shape, seed=2)
        x_hat = torch_fake_quantize(x, zero_point_params(x, bits))
        with torch.no_grad():
            torch.testing.assert_close(quantized(x), function(x_hat, weight, layer.bias, **options))
        assert (x_hat.unique().numel() <= 2**bits) and not torch.equal(x_hat, x)


def test_static_over_the_range_of_a_batch_equals_dynamic_on_it():
    layer, x = nn.Linear(8, 4), normal(20, 8)
    fixed = quantize_static(layer, calibrate({"": [x]}), activation_bits=5)
    assert torch.equal(fixed(x), quantize_dynamic(layer, activation_bits=5)(x))
    assert not torch.equal(fixed(x[:3]), quantize_dynamic(layer, activation_bits=5)(x[:3]))


@pytest.mark.parametrize("range_, scale, zero_point", [
    ((0.5, 7.5), 0.5, -8), ((-7.5, -1), 0.5, 7), ((0, 0), 1, 0), ((-2.5, 5), 0.5, -3),
])
def test_ranges_are_widened_to_hold_zero(range_, scale, zero_point):
    quantized = quantize_static(nn.Linear(2, 2), {"": range_}, activation_bits=4)
    params = quantized.input_params
    assert quantized(normal(3, 2)).dtype == torch.float32
    assert (float(params.scale), int(params.zero_point)) == (scale, zero_point)


def test_none_leaves_floats():
    model, x = small_model(), normal(10, 4)
    for quantized in (quantize_dynamic(model, weight_bits=None, activation_bits=None),
                      quantize_static(model, {}, weight_bits=None, activation_bits=None)):
        assert torch.equal(quantized(x), model(x))
    weights_only = quantize_dynamic(model, weight_bits=3, activation_bits=None)
    assert torch.equal(weights_only[0](x), linear(x, weights_only[0].layer.weight, model[0].bias))
    inputs_only = quantize_dynamic(model, weight_bits=None, activation_bits=3)
    assert torch.equal(inputs_only[0].layer.weight, model[0].weight)
    assert not torch.equal(inputs_only(x), model(x))


def test_integers_can_be_had_from_the_layer():
    weight = normal(5, 12)
    layer = nn.Linear(12, 5)
    layer.weight.data.copy_(weight)
    quantized = quantize_dynamic(layer, weight_bits=4, per_channel=True)
    codes = quantize(weight, quantized.weight_params)
    assert torch.equal(quantize(quantized.layer.weight, quantized.weight_params), codes)
    assert codes.abs().amax(1).tolist() == [7] * 5


def test_layers_print_what_they_do():
    model = quantize_dynamic(nn.Linear(2, 2), weight_bits=3, activation_bits=5)
    assert "dynamic, 5 bits" in repr(model) and "qmin=-3, qmax=3" in repr(model)
    model = quantize_static(nn.Linear(2, 2), {"": (0, 1)}, weight_bits=None)
    assert "weights: None" in repr(model) and "qmin=-128, qmax=127" in repr(model)


# Weights


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_weight_range_with_the_least_error(bits, per_channel):
    """Against every share tried one by one; 20,000 weights are searched in several parts."""
    weight = torch.distributions.StudentT(3.0).sample((4, 5, 1000)) * torch.tensor([0.1, 1, 3, 0])[:, None, None]
    found = weight_params(weight, bits, per_channel=per_channel, weight_range="MSE")
    qmax = 2 ** (bits - 1) - 1
    rows = weight.flatten(1) if per_channel else weight.flatten()[None]
    largest = rows.abs().amax(1, keepdim=True)
    largest[largest == 0] = qmax
    errors = []
    for percent_ in range(100, 0, -1):
        scale = largest / qmax * np.float32(percent_ / 100)
        errors.append(((rows / scale).round().clamp(-qmax, qmax) * scale - rows).square().sum(1))
    errors = torch.stack(errors)
    scale = found.scale.reshape(-1, 1)
    error = ((rows / scale).round().clamp(-qmax, qmax) * scale - rows).square().sum(1)
    torch.testing.assert_close(error, errors.amin(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.scale.flatten(), ((100 - errors.argmin(0)) / 100 * largest[:, 0] / qmax))
    assert found.scale.shape == ((4,) if per_channel else ()) and found.zero_point.dtype == torch.int32
    assert (found.axis, found.qmin, found.qmax) == (0 if per_channel else None, -qmax, qmax)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_weight_search_is_as_good_as_the_exact_one(name, bits):
    weight = layers(folded())[name].weight.detach()
    profile = calibration.ErrorProfile(weight)
    scale = float(weight_params(weight, bits, weight_range="MSE").scale) * (2 ** (bits - 1) - 1)
    exact = profile.mse(*calibration.mse(profile, bits, symmetric=True), bits, symmetric=True)
    assert exact * 0.999 <= profile.mse(-scale, scale, bits, symmetric=True) <= exact * 1.15


# Observing and calibrating


def test_observed_inputs_are_what_the_layers_receive():
    model, x = small_model(), normal(150, 4)
    before = snapshot(model)
    found = observe(model, x)
    assert_unchanged(model, before)
    assert [len(batch) for batch in found["0"]] == [64, 64, 22]
    assert torch.equal(torch.cat(found["0"]), x)
    torch.testing.assert_close(torch.cat(found["2"]), linear(x, model[0].weight, model[0].bias).relu())
    assert not found["2"][0].requires_grad


def test_observing_sees_no_dropout():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 2))
    x = normal(10, 4)
    assert torch.equal(observe(model, x)["1"][0], x)
    assert model.training


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = x.clone()
        y = self.layer(x)
        x.zero_()
        return y.zero_()


def test_what_is_overwritten_later_was_observed():
    model, x = Overwriting(), normal(10, 4)
    assert torch.equal(observe(model, x)["layer"][0], x)
    quantized = quantize_dynamic(model, weight_bits=8, activation_bits=None)
    expected = sqnr_db(model.layer(x).detach(), quantized.layer(x))
    assert sqnr_of_layers(model, quantized, x) == {"layer": pytest.approx(float(expected))}


def test_hooks_are_removed_after_an_error():
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="images must be what the model takes"):
        observe(model, normal(10, 5))
    assert_unchanged(model, before)


def torch_range(name, **options):
    """{layer: (min, max)} of an observer of torch that saw the batches one after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = pytest.importorskip("torch.ao.quantization.observer")
        found = {}
        for layer, batches in observed().items():
            watcher = getattr(observer, name)(**options)
            for batch in batches:
                watcher(batch)
            found[layer] = watcher.min_val.item(), watcher.max_val.item()
    return found


def test_ranges_equal_those_of_torch():
    assert len(observed()["conv"]) == 4
    assert ranges(8, "min-max") == torch_range("MinMaxObserver")
    assert ranges(8, "EMA") == torch_range("MovingAverageMinMaxObserver", averaging_constant=0.01)
    assert ranges(8, "EMA") != ranges(8, "min-max")


@pytest.mark.parametrize("name", NAMES)
def test_other_ranges_are_those_of_calibration(name):
    x = np.concatenate([batch.numpy().ravel() for batch in observed()[name]])
    np.testing.assert_allclose(ranges(8, "percentile")[name], np.percentile(x.astype(float), [0.1, 99.9]))
    assert ranges(4, "MSE")[name] == calibration.mse(x, 4)
    assert ranges(4, "KL")[name] == calibration.entropy(x, 4)


# Whole models


class Shared(nn.Module):
    """One layer under two names, used twice, beside one in a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.rest = nn.ModuleList([nn.Linear(4, 2)])

    def forward(self, x):
        return self.rest[0](self.again(self.first(x)))


def test_a_shared_layer_is_quantized_everywhere():
    model, x = Shared(), normal(6, 4)
    inputs = observe(model, x)
    assert {name: len(batches) for name, batches in inputs.items()} == {"first": 2, "rest.0": 1}
    quantized = quantize_static(model, calibrate(inputs), weight_bits=2)
    assert quantized.first is quantized.again and isinstance(quantized.first, QuantizedLayer)
    assert isinstance(quantized.rest[0], QuantizedLayer)
    assert torch.equal(quantized(x), quantized.rest[0](quantized.first(quantized.first(x))))


class Called(nn.Module):
    """Two layers in another order than they are named, and called by ``call(layer, x)``."""

    def __init__(self, call):
        super().__init__()
        self.last, self.first, self.call = nn.Linear(6, 3), nn.Linear(4, 6), call

    def forward(self, x):
        return self.call(self.last, self.call(self.first, x).relu())


def quantizers():
    return [lambda model: quantize_dynamic(model, weight_bits=3, activation_bits=4),
            lambda model: quantize_static(model, calibrate(observe(model, normal(50, 4)), 4), weight_bits=3,
                                          activation_bits=4)]


@pytest.mark.parametrize("quantize_", quantizers())
def test_how_a_layer_is_called_does_not_matter(quantize_):
    by_keyword, x = Called(lambda layer, x: layer(input=x)), normal(10, 4, seed=1)
    plain = nn.Sequential(by_keyword.first, nn.ReLU(), by_keyword.last)
    assert torch.equal(quantize_(by_keyword)(x), quantize_(plain)(x))


def test_a_layer_that_is_never_called_is_named():
    """As where a module reads the weights and computes by itself."""
    model = Called(lambda layer, x: linear(x, layer.weight, layer.bias))
    inputs = observe(model, normal(5, 4))
    assert inputs == {"last": [], "first": []}
    with pytest.raises(ValueError, match="at least one batch for each layer, got none for 'last'"):
        calibrate(inputs)
    with pytest.raises(ValueError, match="layer must be called to be quantized"):
        quantize_dynamic(model)(normal(5, 4))


def test_a_layer_that_is_called_at_two_sizes():
    conv_ = nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=(0, 1))
    model, x = nn.Sequential(conv_, nn.ReLU(), conv_), normal(8, 2, 8, 8)
    inputs = observe(model, x)
    assert [tuple(batch.shape) for batch in inputs["0"]] == [(8, 2, 8, 8), (8, 2, 6, 8)]
    quantized = quantize_static(model, calibrate(inputs), weight_bits=None)
    low, high = min(float(batch.min()) for batch in inputs["0"]), max(float(batch.max()) for batch in inputs["0"])
    assert float(quantized[0].input_params.scale) == pytest.approx((high - low) / 255)
    assert [tuple(y.shape) for y in outputs(quantized, x)["0"]] == [(8, 2, 6, 8), (8, 2, 4, 8)]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("quantize_", quantizers())
def test_pruned_layers_are_quantized_as_they_are(quantize_, called):
    """Until its first call without gradients, torch refuses to copy such a layer."""
    model, x = small_model(), normal(10, 4)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[0], "bias", 1)
    plain = small_model()
    plain[0].weight.data, plain[0].bias.data = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    if called:
        observe(model, x)
    quantized = quantize_(model)
    assert torch.equal(quantized(x), quantize_(plain)(x))
    assert quantized[0].layer.weight.unique().numel() <= 7 and prune.is_pruned(model[0])


def test_weights_that_two_layers_share_are_quantized_in_both():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), normal(10, 4)
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    quantized = quantize_dynamic(model, weight_bits=3)
    assert torch.equal(quantized[0].layer.weight, quantized[2].layer.weight)
    assert torch.equal(quantized(x), quantize_dynamic(copy.deepcopy(nn.Sequential(*model)), weight_bits=3)(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("quantize_", [
    lambda m, x: quantize_dynamic(m), lambda m, x: quantize_static(m, calibrate(observe(m, x))),
], ids=["dynamic", "static"])
def test_models_and_images_in_double(quantize_, dtype):
    model, x = small_model().to(dtype), normal(20, 4).to(dtype)
    quantized = quantize_(model, x)
    for images in (x, x.double(), x.clone().requires_grad_()):
        assert quantized(images).dtype == dtype
        torch.testing.assert_close(quantized(images), model(x), rtol=0, atol=0.05)


def test_tensors_that_require_gradients():
    x = normal(20, 4)
    for calibrator in CALIBRATORS:
        assert calibrate({"": [x.clone().requires_grad_()]}, 4, calibrator) == calibrate({"": [x]}, 4, calibrator)
    assert not observe(small_model(), x.clone().requires_grad_())["2"][0].requires_grad


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e25])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_least_error_does_not_depend_on_the_unit(size, per_channel):
    weight = torch.distributions.StudentT(3.0).sample((4, 100))
    options = {"per_channel": per_channel, "weight_range": "MSE"}
    expected = weight_params(weight, 3, **options).scale
    assert not torch.equal(expected, weight_params(weight, 3, per_channel=per_channel).scale)
    torch.testing.assert_close(weight_params(weight * size, 3, **options).scale.double() / size, expected.double())


@pytest.mark.parametrize("quantized", [
    lambda model: quantize_dynamic(model, weight_bits=3),
    lambda model: quantize_static(model, calibrate(observe(model, normal(10, 4))), weight_bits=3),
])
def test_the_given_model_stays_as_it_is(quantized):
    model = small_model()
    before = snapshot(model)
    result = quantized(model)
    assert not result.training
    with torch.no_grad():
        for value in result.state_dict().values():
            value.zero_()
    result(normal(10, 4))
    outputs(model, normal(10, 4)), outputs(result, normal(10, 4))
    assert_unchanged(model, before)


def test_quantizing_twice_gives_the_same():
    first, second = (quantize_static(folded(), calibrate(observe(folded(), data().train_images[:100]), 4, "MSE"),
                                     weight_bits=4, activation_bits=4, weight_range="MSE") for _ in range(2))
    assert torch.equal(first(data().test_images), second(data().test_images))


def test_every_layer_of_the_network_is_quantized():
    model = quantize_static(folded(), ranges(4, "MSE"), weight_bits=3, activation_bits=4, per_channel=True)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert list(found) == NAMES
    for name, layer in found.items():
        assert (layer.weight_params.qmin, layer.weight_params.qmax) == (-3, 3)
        assert (layer.input_params.qmin, layer.input_params.qmax) == (-8, 7)
        assert float(layer.input_params.scale) == pytest.approx(ranges(4, "MSE")[name][1] / 15)
        assert layer.weight_params.scale.shape == layer.layer.weight.shape[:1]
        assert layer.layer.weight.unique().numel() <= 7 * len(layer.layer.weight)
    assert not any(type(m) in LAYERS for n, m in model.named_modules() if not n.endswith(".layer"))


def test_outputs_are_what_the_layers_put_out():
    quantized = quantize_static(folded(), ranges(4, "min-max"), weight_bits=4, activation_bits=4)
    images = data().test_images[:100]
    for model in (folded(), quantized):
        found, x = outputs(model, images), images
        assert list(found) == NAMES
        with torch.no_grad():
            for name, module in model.named_children():
                x = module(x)
                if name in found:
                    (y,) = found[name]
                    assert torch.equal(y, x)


def test_sqnr_grows_six_decibels_a_bit():
    images = data().test_images[:100]
    quantized = [quantize_static(folded(), ranges(b, "min-max"), weight_bits=b, activation_bits=b) for b in range(4, 9)]
    means = [np.mean(list(sqnr_of_layers(folded(), q, images).values())) for q in quantized]
    assert np.diff(means) == pytest.approx([6] * 4, abs=1.5)


# Accuracy on the digits


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_eight_bits_are_as_good_as_floats(per_channel, calibrator):
    quantized = quantize_static(folded(), ranges(8, calibrator), per_channel=per_channel)
    assert percent(quantized) == pytest.approx(percent(folded()), abs=1)
    assert percent(quantize_dynamic(folded(), per_channel=per_channel)) == pytest.approx(percent(folded()), abs=1)


def test_accuracy_falls_with_the_bits():
    by_bits = [percent(quantize_static(folded(), ranges(b, "min-max"), weight_bits=b, activation_bits=b))
               for b in (8, 4, 3, 2)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[1] > 85 and by_bits[2] < 80 and by_bits[3] < 35
    dynamic = [percent(quantize_dynamic(folded(), weight_bits=b, activation_bits=b)) for b in (8, 4, 3, 2)]
    assert dynamic == sorted(dynamic, reverse=True)


def test_least_error_ranges_help_at_three_bits():
    def accuracy(calibrator, weight_range):
        return percent(quantize_static(folded(), ranges(3, calibrator), weight_bits=3, activation_bits=3,
                                       weight_range=weight_range))

    assert accuracy("MSE", "MSE") > accuracy("min-max", "min-max") + 10


def test_kl_ends_the_range_of_pixels_at_the_first_of_their_17_values():
    """A known weakness: where only one bin of the histogram is filled, it cannot diverge."""
    found = ranges(4, "KL")
    assert found["conv"] == pytest.approx((0, 1 / 16), rel=0.02)
    bits = {"weight_bits": 4, "activation_bits": 4}
    assert percent(quantize_static(folded(), found, **bits)) < 30
    assert percent(quantize_static(folded(), found | {"conv": (0, 1)}, **bits)) > 80


# What is refused


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"memory": nn.LSTM(4, 4), "out": nn.Linear(4, 2)})


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)


def altered(*functions):
    """A model whose first layer has been altered by the functions."""
    model = small_model()
    for function in functions:
        function(model[0])
    return model


def in_place(layer):
    layer.forward = lambda x: x


class Infinite(nn.Module):
    def forward(self, x):
        return x / 0


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = [
    (nn.Sequential(nn.ReLU(), nn.Flatten()), "model must hold a Linear or Conv2d layer, got none in Sequential"),
    (nn.Sequential(nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)), "got ConvTranspose2d at '1'"),
    (Recurrent(), "got LSTM at 'inner.memory'"),
    (nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), "got Embedding at '0'"),
    (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "got LayerNorm at '1'"),
    (nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1)), "got MultiheadAttention at '1'"),
    (nn.Sequential(nn.Conv1d(1, 1, 1)), "got Conv1d at '0'"),
    (Custom(), "got Custom at ''"),
    (nn.Sequential(Doubled(4, 4), nn.Linear(4, 4)), "got Doubled at '0'"),
    (altered(lambda m: m.register_forward_hook(print)), "layer '0' must have no hooks"),
    (altered(lambda m: m.register_forward_pre_hook(print)), "layer '0' must have no hooks"),
    (altered(in_place), "layer '0' must have no hooks"),
    (altered(parametrizations.weight_norm), "got ParametrizedLinear at '0'"),
    (altered(parametrizations.spectral_norm), "got ParametrizedLinear at '0'"),
    (altered(lambda m: m.bfloat16()), "layer '0' must have weights in float32 or float64, got torch.bfloat16"),
    (altered(lambda m: m.half()), "layer '0' must have weights in float32 or float64, got torch.float16"),
    (altered(lambda m: m.weight.data.fill_(math.nan)), "the weight of layer '0' must be finite, got 24 NaN"),
    (digits.Net(), "got BatchNorm2d at 'conv_norm': call fold_batch_norm first"),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), "got BatchNorm1d at '1': call fold_batch_norm"),
    (quantize_dynamic(nn.Sequential(nn.Linear(4, 4))), "model must be in float, but '0' is quantized already"),
    (quantize_dynamic(nn.Linear(4, 4)), "model must be in float, but '' is quantized already"),
]


of_a_model = pytest.mark.parametrize("function", [
    layers, quantize_dynamic, lambda model: quantize_static(model, {}), lambda model: observe(model, normal(3, 4)),
], ids=["layers", "dynamic", "static", "observe"])


@pytest.mark.parametrize("model, message", REFUSED, ids=[message[-30:] for _, message in REFUSED])
@of_a_model
def test_models_that_cannot_be_quantized(function, model, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        function(model)
    assert_unchanged(model, before)


@of_a_model
def test_compiled_models_are_refused(function):
    with pytest.raises(ValueError, match="model must not be compiled, but OptimizedModule at '' is"):
        function(torch.compile(small_model()))
    with pytest.raises(ValueError, match="model must not be compiled, but Linear at '0' is"):
        function(altered(lambda layer: layer.compile()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused():
    with pytest.raises(ValueError, match="model must not be compiled, but RecursiveScriptModule at '1' is"):
        layers(nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU())))


ONE = {"0": (0.0, 1.0), "2": (0.0, 1.0)}
IMAGES = normal(10, 4)


@pytest.mark.parametrize("call, message", [
    (lambda m: quantize_dynamic(m, weight_bits=1), "weight_bits, unless None, must be an integer from 2 to 8, got 1"),
    (lambda m: quantize_dynamic(m, weight_bits=9), "weight_bits, unless None, must be an integer from 2 to 8, got 9"),
    (lambda m: quantize_dynamic(m, activation_bits=1), "activation_bits, unless None, must be an integer from 2 to 8"),
    (lambda m: quantize_dynamic(m, activation_bits=4.0), "activation_bits, unless None, must be an integer from 2"),
    (lambda m: quantize_dynamic(m, weight_range="KL"), "weight_range must be 'min-max' or 'MSE', got 'KL'"),
    (lambda m: quantize_static(m, ONE, weight_bits=16), "weight_bits, unless None, must be an integer from 2 to 8"),
    (lambda m: quantize_static(m, ONE, activation_bits=0), "activation_bits, unless None, must be an integer"),
    (lambda m: quantize_static(m, ONE, weight_range="mse"), "weight_range must be 'min-max' or 'MSE', got 'mse'"),
    (lambda m: quantize_static(m, {"0": (0, 1)}), "ranges must hold one for each layer, got none for '2'"),
    (lambda m: quantize_static(m, ONE | {"2": (1, 0.5)}), "ranges must have alpha at most beta, got 1 and 0.5 for '2'"),
    (lambda m: quantize_static(m, ONE | {"0": (math.nan, 1)}), "got nan and 1 for '0'"),
    (lambda m: quantize_static(m, ONE | {"0": (0, math.inf)}), "must be finite"),
    (lambda m: observe(m, IMAGES[:0]), "images must not be empty"),
    (lambda m: observe(m, IMAGES / 0), "images must be finite"),
    (lambda m: observe(m, IMAGES[:, :3]), "images must be what the model takes, got shape (10, 3)"),
    (lambda m: observe(m, torch.tensor(1.0)), "images must be what the model takes, got shape ()"),
    (lambda m: quantize_dynamic(copy.deepcopy(m).to("meta")), "got torch.float32 on meta"),
    (lambda m: observe(m, IMAGES.to("meta")), "images must be what the model takes, got shape (10, 4) on meta"),
    (lambda m: observe(m, IMAGES.to_sparse()), "images must be what the model takes, got shape (10, 4) on cpu"),
    (lambda m: observe(m, IMAGES.double()), "images must be what the model takes, got shape (10, 4) and torch.f"),
    (lambda m: observe(m, IMAGES.long()), "images must be what the model takes, got shape (10, 4) and torch.int64"),
    (lambda m: observe(nn.Sequential(*m, Infinite(), nn.Linear(3, 1)), IMAGES), "what '4' receives or returns"),
    (lambda m: calibrate({"0": [IMAGES, IMAGES / 0]}), "what '0' receives must be finite"),
    (lambda m: observe(m, IMAGES.tolist()), "images must be a torch tensor, got list"),
    (lambda m: calibrate({"0": []}), "inputs must hold at least one batch for each layer, got none for '0'"),
    (lambda m: calibrate({"0": [IMAGES]}, 1), "bits must be an integer from 2 to 8, got 1"),
    (lambda m: calibrate({"0": [IMAGES]}, None), "bits must be an integer from 2 to 8, got None"),
    (lambda m: calibrate({"0": [IMAGES]}, 8, "max"), "calibrator must be one of min-max, EMA, percentile, MSE, KL"),
    (lambda m: outputs(quantize_dynamic(m), IMAGES[:, :3]), "images must be what the model takes"),
    (lambda m: outputs(m, torch.tensor(1.0)), "images must be what the model takes"),
    (lambda m: QuantizedLayer(m[1]), "layer must be nn.Linear or nn.Conv2d, got ReLU"),
    (lambda m: QuantizedLayer(m[0], dynamic_bits=17), "dynamic_bits, unless None, must be an integer from 2 to 8"),
    (lambda m: QuantizedLayer(m[0], None, QParams(1.0, 0, -8, 7), dynamic_bits=4), "exclude each other, got both"),
])
def test_bad_arguments_are_refused(call, message):
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("images", [normal(10, 8, 8), normal(10, 3, 8, 8), normal(10, 64), normal(10, 1, 8, 8, 1)])
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(ValueError, match=re.escape(f"images must be what the model takes, got shape "
                                                   f"{tuple(images.shape)}")):
        observe(folded(), images)


def test_a_pruned_layer_is_quantized_as_its_next_call_computes():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.3)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight_orig.mul_(100)  # layer.weight is the old one, until the layer is called
    for quantized in (quantize_dynamic(model), quantize_static(model, ONE | {"0": (0, 1)})):
        weight = layer.weight_orig * layer.weight_mask
        torch.testing.assert_close(quantized[0].layer.weight, weight, rtol=0, atol=weight.abs().max().item() / 250)


def test_a_forward_of_an_object_is_refused():
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.forward = lambda x: model.first(x).relu()
    with pytest.raises(ValueError, match="forward of its classes, got another for Module at ''"):
        quantize_dynamic(model)


def test_images_with_too_few_axes():
    with pytest.raises(ValueError, match=r"images must be what the model takes, got shape \(5,\)"):
        observe(nn.Sequential(nn.Flatten(), nn.Linear(1, 2)), torch.rand(5))


def test_the_search_takes_weights_with_one_axis():
    weights = torch.rand(4)
    found, expected = (weight_params(w, 4, per_channel=True, weight_range="MSE") for w in (weights, weights[:, None]))
    assert torch.equal(found.scale, expected.scale)
