"""Quantization-aware training: values and gradients against torch, autograd and the papers' closed forms."""

import copy
import math
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization.observer import MovingAverageMinMaxObserver
from torch.nn.functional import conv2d, linear
from torch.nn.utils import prune

from qlab import calibration, digits, integer, ptq
from qlab.affine import quantize
from qlab.qat import EMA, LSQ, PACT, SCHEMES, Absmax, LSQPlus, QATLayer, convert, prepare, ranges, round_ste
from qlab.training import train

PROPERTY = settings(max_examples=60)
BITS = range(2, 9)
VALUES = torch.cat([torch.linspace(-9, 9, 577), torch.tensor([-1e4, 1e4, 0.0])])  # eighths of a step, ties, far out
FLOATS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20).map(torch.tensor)
STEPS = st.floats(0.015625, 50, width=32)


@cache
def data():
    return digits.data()


@cache
def folded():
    return ptq.fold_batch_norm(digits.load())


def percent(model):
    return digits.accuracy(model, data().test_images, data().test_labels)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_model():
    """Signed inputs to the first layer, and to the second only values from 0 up."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def prepared_digits(scheme, weight_bits, activation_bits, *, epochs=0, seed=0, images=256, **options):
    """The digits network with quantizers, trained on a few images."""
    x, y = data().train_images[:images], data().train_labels[:images]
    model = prepare(folded(), scheme, x, weight_bits=weight_bits, activation_bits=activation_bits, **options)
    if epochs:
        for _ in train(model, x, y, epochs=epochs, lr=0.01, seed=seed):
            pass
    return model


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rest = [(name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()]
    return state, rest, [parameter.requires_grad for parameter in model.parameters()]


def assert_unchanged(model, before):
    state, *rest = snapshot(model)
    assert rest == list(before[1:]) and state.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())


def gradients(quantizer, x, weights):
    """Gradients of Σ weights · x̂ for x and for each parameter by name."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    (quantizer(x) * weights).sum().backward()
    return x.grad, {name: parameter.grad for name, parameter in quantizer.named_parameters()}


def torch_fake_quantize(x, scale, zero_point, qmin, qmax):
    """Values and the gradient mask of torch's own."""
    x = x.clone().requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    y.sum().backward()
    return y.detach(), x.grad


def slope(function, at, step=1e-3):
    return (function(at + step) - function(at - step)) / (2 * step)


# Quantizers: values


def test_round_ste_rounds_half_to_even_and_passes_the_gradient():
    u = VALUES.clone().requires_grad_()
    rounded = round_ste(u)
    rounded.sum().backward()
    assert torch.equal(rounded, VALUES.round())
    assert torch.equal(u.grad, torch.ones_like(VALUES))


@pytest.mark.parametrize("bits", BITS)
def test_values_equal_torch(bits):
    """Powers of two as scales, so that x / s here and x · (1 / s) there are the same."""
    p, s, half = 2**bits - 1, 0.25, 2 ** (bits - 1)
    lowest = max(-half, -127)
    cases = [
        (LSQ(bits, s, n=1), 0, lowest, half - 1),
        (LSQ(bits, s, n=1, signed=False), 0, 0, p),
        (PACT(bits, s * p), 0, 0, p),
        (EMA(bits, 0.0, s * p).eval(), 0, 0, p),
        (EMA(bits, -s * half, s * (half - 1)).eval(), half, 0, p),
        *((LSQPlus(bits, s, -s * z, n=1), z, 0, p) for z in (0, 2, p - 1)),  # even: odd ones take ties elsewhere
    ]
    for quantizer, zero_point, qmin, qmax in cases:
        assert torch.equal(quantizer(VALUES), torch_fake_quantize(VALUES, s, zero_point, qmin, qmax)[0])


def test_lsq_plus_rounds_after_the_offset_is_added():
    """round(x/s + z), where affine quantization has round(x/s) + z: ties differ if z is odd."""
    lsq_plus, x = LSQPlus(3, 1.0, -1.0, n=1), torch.tensor([0.5, 1.5, 2.5])
    assert lsq_plus(x).tolist() == [1.0, 1.0, 3.0]
    assert ptq.fake_quantize(x, lsq_plus.params()).tolist() == [0.0, 2.0, 2.0]


def test_lsq_plus_with_a_real_offset_is_the_formula():
    x_hat = LSQPlus(3, 0.7, 0.3, n=1)(VALUES)
    expected = 0.7 * (((VALUES.double() - 0.3) / 0.7).round().clamp(0, 7)) + 0.3
    assert torch.allclose(x_hat.double(), expected, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_absmax_equals_torch_and_never_takes_the_lowest_code(bits):
    qmax = 2 ** (bits - 1) - 1
    weight = normal(5, 3, 2, 2, seed=bits).clamp(-3, 3)
    weight[0, 0, 0, 0] = -4 * qmax  # the largest: negative
    assert torch.equal(Absmax(bits)(weight), torch.fake_quantize_per_tensor_affine(weight, 4.0, 0, -qmax, qmax))
    assert quantize(weight, Absmax(bits).params(weight)).min() == -qmax


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_weight_code_is_minus_128(scheme):
    model = small_model()
    model[0].weight.data[0, 0] = -30.0
    prepared = prepare(model, scheme, normal(9, 4).abs(), weight_bits=8, activation_bits=8)
    for layer in (prepared[0], prepared[2]):
        assert quantize(layer.layer.weight.detach(), layer.weight_quantizer.params(layer.layer.weight)).min() >= -127


@PROPERTY
@given(FLOATS, STEPS, st.integers(2, 8), st.integers(-4, 20))
def test_params_have_the_levels_that_training_saw(x, s, bits, z):
    """Bit for bit, at any scale; for LSQ+ where β / s is an integer and 0 a level."""
    quantizers = [EMA(bits, -s, 3 * s).eval(), PACT(bits, s), LSQ(bits, s, n=1), LSQ(bits, s, n=1, signed=False)]
    for quantizer in quantizers:
        assert torch.equal(quantizer(x), ptq.fake_quantize(x, quantizer.params()))
    p = 2**bits - 1
    offset = LSQPlus(bits, 0.5, -0.5 * z, n=1)
    params = offset.params()
    assert int(params.zero_point) - params.qmin == min(max(z, 0), p)
    if 0 <= z <= p and z % 2 == 0:
        assert torch.equal(offset(x), ptq.fake_quantize(x, params))


def test_lsq_plus_rounds_its_offset_to_a_zero_point():
    for offset, z in [(-0.9, 2), (-1.1, 2), (-1.3, 3), (0.4, 0), (-9.0, 7)]:
        params = LSQPlus(3, 0.5, offset, n=1).params()
        assert (int(params.zero_point), params.qmin, params.qmax) == (z - 4, -4, 3)


def test_range_is_where_the_levels_end():
    for quantizer, ends in [
        (EMA(3, 0.5, 2.0), (0.5, 2.0)), (PACT(3, 2.5), (0, 2.5)), (LSQPlus(3, 0.5, -0.75, n=1), (-0.75, 2.75)),
        (LSQ(3, 0.5, n=1), (-2, 1.5)), (LSQ(3, 0.5, n=1, signed=False), (0, 3.5)),
    ]:
        assert quantizer.range() == ends
        if not isinstance(quantizer, EMA):
            x_hat = quantizer(VALUES)
            assert (x_hat.min(), x_hat.max()) == ends


# Quantizers: gradients


@pytest.mark.parametrize("bits", BITS)
def test_gradient_mask_equals_torch_where_ranges_are_observed(bits):
    half, s = 2 ** (bits - 1), 0.25
    grad, _ = gradients(EMA(bits, -s * half, s * (half - 1)).eval(), VALUES, 1.0)
    _, mask = torch_fake_quantize(VALUES, s, half, 0, 2**bits - 1)
    assert torch.equal(grad, mask)
    assert 0 < mask.sum() < mask.numel()
    weight = normal(4, 5)
    assert torch.equal(gradients(Absmax(bits), weight, 1.0)[0], torch.ones(4, 5))


def ste_formula(v, s, qn, qp):
    """Autograd through ((u.round() − u).detach() + u) · s: the gradients of Σ weights · v̂ for v and s."""
    u = (v / s).clamp(-qn, qp)
    return ((u.round() - u).detach() + u) * s


@PROPERTY
@given(FLOATS, STEPS, st.integers(2, 8), st.booleans(), st.integers(1, 1000))
def test_lsq_gradients(v, s, bits, signed, n):
    qn, qp = (min(2 ** (bits - 1), 127), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    weights, g = normal(*v.shape, seed=n), 1 / math.sqrt(n * qp)
    dv, by_name = gradients(LSQ(bits, s, n=n, signed=signed), v, weights)

    v1, s1 = v.clone().requires_grad_(), torch.tensor(s, requires_grad=True)
    (ste_formula(v1, s1, qn, qp) * weights).sum().backward()
    torch.testing.assert_close(dv, v1.grad)
    torch.testing.assert_close(by_name["scale"], g * s1.grad, rtol=1e-4, atol=1e-4 * g * qp)

    u = v / torch.tensor(s)
    at_an_end = (u == -qn) | (u == qp)  # there the paper counts v as clipped, and autograd as inside
    inside = (u > -qn) & (u < qp)
    ds = torch.where(inside, u.round() - u, torch.where(u >= qp, qp, -qn))
    torch.testing.assert_close(dv[~at_an_end], (weights * inside)[~at_an_end])
    if not at_an_end.any():
        torch.testing.assert_close(by_name["scale"], g * (ds * weights).sum(), rtol=1e-4, atol=1e-4 * g * qp)


def test_lsq_clips_before_it_rounds():
    """Half a step beyond the last level torch still passes the gradient; the paper does not."""
    v = torch.tensor([1.2, -2.4, 1.0, -2.0])
    grad, by_name = gradients(LSQ(2, 1.0, n=1), v, 1.0)
    assert grad.tolist() == [0, 0, 1, 1]
    assert torch_fake_quantize(v, 1.0, 0, -2, 1)[1].tolist() == [1, 1, 1, 1]
    assert by_name["scale"].item() == 1 - 2


@PROPERTY
@given(FLOATS, STEPS, st.integers(2, 8))
def test_pact_gradients(x, alpha, bits):
    weights = normal(*x.shape)
    dx, by_name = gradients(PACT(bits, alpha), x, weights)
    alpha = torch.tensor(alpha)
    torch.testing.assert_close(dx, weights * ((x >= 0) & (x < alpha)))
    torch.testing.assert_close(by_name["alpha"], (weights * (x >= alpha)).sum())

    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)  # the paper's equations 1 and 2
    steps = (2**bits - 1) / alpha
    assert ((PACT(bits, alpha)(x) - (y * steps).round() / steps).abs() <= 1.001 / steps).all()  # one step at a tie
    assert (PACT(bits, alpha)(x) - y).abs().max() <= 0.5001 / steps


def test_pact_counts_what_is_at_alpha_as_clipped():
    dx, by_name = gradients(PACT(2, 6.0), torch.tensor([6.0, 6.0, 5.9]), 1.0)
    assert dx.tolist() == [0, 0, 1] and by_name["alpha"].item() == 2


@PROPERTY
@given(FLOATS, STEPS, st.floats(-50, 50, width=32), st.integers(2, 8), st.integers(1, 1000))
def test_lsq_plus_gradients(x, s, beta, bits, n):
    p = 2**bits - 1
    weights, g = normal(*x.shape, seed=n), 1 / math.sqrt(n * p)
    dx, by_name = gradients(LSQPlus(bits, s, beta, n=n), x, weights)

    x1, s1, beta1 = x.clone().requires_grad_(), *(torch.tensor(value, requires_grad=True) for value in (s, beta))
    ((ste_formula(x1 - beta1, s1, 0, p) + beta1) * weights).sum().backward()
    torch.testing.assert_close(dx, x1.grad)
    slack = {"rtol": 1e-4, "atol": 1e-4 * g * p}
    torch.testing.assert_close(by_name["scale"], g * s1.grad, **slack)
    torch.testing.assert_close(by_name["offset"], g * beta1.grad, **slack)

    u = (x - beta) / torch.tensor(s)
    if not ((u == 0) | (u == p)).any():
        inside = (u > 0) & (u < p)
        ds = torch.where(inside, u.round() - u, torch.where(u >= p, p, 0))
        torch.testing.assert_close(dx, weights * inside)
        torch.testing.assert_close(by_name["scale"], g * (ds * weights).sum(), **slack)
        torch.testing.assert_close(by_name["offset"], g * (~inside * weights).sum(), **slack)


@pytest.mark.parametrize("x", [-7.0, 9.0])
def test_gradients_of_clipped_values_are_slopes(x):
    """Where a value is clipped, x̂ is smooth in the range parameters, and finite differences can tell."""
    x = torch.tensor([x])
    _, lsq = gradients(LSQ(3, 0.7, n=1), x, 1.0)
    g = 1 / math.sqrt(3)
    assert lsq["scale"].item() == pytest.approx(g * slope(lambda s: LSQ(3, s, n=1)(x).item(), 0.7), rel=1e-3)
    _, plus = gradients(LSQPlus(3, 0.7, -0.4, n=1), x, 1.0)
    g = 1 / math.sqrt(7)
    expected = g * slope(lambda s: LSQPlus(3, s, -0.4, n=1)(x).item(), 0.7)
    assert plus["scale"].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    expected = g * slope(lambda beta: LSQPlus(3, 0.7, beta, n=1)(x).item(), -0.4)
    assert plus["offset"].item() == pytest.approx(expected, rel=1e-3)
    _, pact = gradients(PACT(3, 2.0), x, 1.0)
    assert pact["alpha"].item() == pytest.approx(slope(lambda a: PACT(3, a)(x).item(), 2.0), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("below", [0.0, -0.5])
def test_a_range_that_a_step_took_to_zero_comes_back(below):
    x = torch.tensor([0.5, 2.0])
    for quantizer, name in [(PACT(2, 1.0), "alpha"), (LSQ(2, 1.0, n=1), "scale"), (LSQPlus(2, 1.0, 0.0, n=1), "scale")]:
        getattr(quantizer, name).data.fill_(below)
        alpha, beta = quantizer.range()
        assert alpha <= 0 < beta < 1e-6
        _, by_name = gradients(quantizer, x, 1.0)
        assert quantizer(x).isfinite().all() and by_name[name] > 0.5
        assert quantizer.params().scale > 0
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            (quantizer(x) - x).square().sum().backward()
            optimizer.step()
        assert getattr(quantizer, name) > 0.3


# Jacob's moving average


def test_ema_equals_torch_observer():
    batches = [(i + 1) * normal(8, 3, seed=i) for i in range(30)]
    for momentum in (0.01, 0.3):
        observer = MovingAverageMinMaxObserver(averaging_constant=momentum)
        observer(batches[0])
        ema = EMA(4, batches[0].min().item(), batches[0].max().item(), momentum=momentum)
        for batch in batches[1:]:
            observer(batch)
            ema(batch)
            assert ema.range() == (observer.min_val.item(), observer.max_val.item())


def test_ema_goes_on_from_calibration():
    images = data().train_images[:200]
    prepared = prepare(folded(), "Jacob", images, weight_bits=8, activation_bits=8)
    observer = MovingAverageMinMaxObserver(averaging_constant=0.01)
    for batch in (*ptq.observe(folded(), images)["linear"], normal(7, 64)):
        observer(batch)
    prepared.linear.train()(normal(7, 64))
    assert ranges(prepared)["linear"] == (observer.min_val.item(), observer.max_val.item())


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_quantization_starts_after_the_delay(delay):
    ema, x = EMA(2, 0.0, 3.0, momentum=1.0, start_delay=delay), torch.tensor([0.0, 1.2, 3.0])
    for step in range(1, 6):
        assert ema.train()(x).tolist() == pytest.approx([0.0, 1.2 if step <= delay else 1.0, 3.0])
        assert ema.eval()(x).tolist() == [0.0, 1.0, 3.0]
        assert ema.steps == step


def test_the_range_moves_while_delayed_and_stays_in_eval_mode():
    ema = EMA(4, 0.0, 1.0, momentum=0.5, start_delay=9)
    ema(torch.tensor([-2.0, 5.0]))
    assert ema.range() == (-1.0, 3.0)
    ema.eval()(torch.tensor([-20.0, 50.0]))
    assert ema.range() == (-1.0, 3.0) and ema.steps == 1


def test_the_moving_average_keeps_no_graph():
    ema = EMA(4, 0.0, 1.0)
    ema(torch.tensor([0.5, 2.0], requires_grad=True))
    assert not ema.ends.requires_grad


# What is refused leaves all as it was


@pytest.mark.parametrize("x, message", [
    ([1.0, math.nan], "must be finite, got 1 NaN"), ([math.inf, 1.0], "must be finite, got 0 NaN and 1 infinite"),
    ([], "must not be empty"),
])
@pytest.mark.parametrize("make", [
    lambda: EMA(4, 0.0, 1.0), lambda: EMA(4, 0.0, 1.0, start_delay=9), lambda: PACT(4, 1.0), lambda: LSQ(4, 1.0, n=1),
    lambda: LSQPlus(4, 1.0, 0.0, n=1), lambda: Absmax(4),
], ids=["EMA", "EMA delayed", "PACT", "LSQ", "LSQ+", "Absmax"])
def test_bad_values_are_refused_before_anything_moves(make, x, message):
    quantizer = make().train()
    before = snapshot(quantizer)
    with pytest.raises(ValueError, match=message):
        quantizer(torch.tensor(x))
    assert_unchanged(quantizer, before)


def test_a_range_that_no_step_can_span_is_refused_before_it_moves():
    ema = EMA(4, 0.0, 1.0, momentum=1.0)
    with pytest.raises(ValueError, match="beta - alpha must be finite"):
        ema(torch.tensor([-3e38, 3e38]))
    assert ema.range() == (0.0, 1.0) and ema.steps == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.bool])
def test_quantizers_take_numbers_of_any_type(dtype):
    x = torch.tensor([0, 1, 3]).to(dtype)
    for quantizer in (EMA(4, 0.0, 2.0).eval(), PACT(4, 2.0), LSQ(4, 0.5, n=1), LSQPlus(4, 0.5, 0.0, n=1), Absmax(4)):
        torch.testing.assert_close(quantizer(x).float(), quantizer(x.float()))
        quantizer.train()(x)


# Layers and networks


def test_layer_is_the_composition():
    conv, fc = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Linear(5, 3, bias=False)
    x, y = normal(2, 4, 8, 8), normal(2, 5)
    for weight_bits in (3, 8):
        weights, inputs = Absmax(weight_bits), LSQ(4, 0.3, n=1)
        expected = conv2d(inputs(x), weights(conv.weight), conv.bias, stride=2, padding=1, groups=2)
        assert torch.equal(QATLayer(conv, weights, inputs)(x), expected)
        assert torch.equal(QATLayer(fc, weights, inputs)(y), linear(inputs(y), weights(fc.weight)))


def test_gradients_reach_the_float_weights_and_the_bias():
    layer = QATLayer(nn.Linear(5, 3).requires_grad_(False), LSQ(3, 0.1, n=15), LSQ(4, 0.3, n=5))
    x = normal(2, 5)
    layer(x).sum().backward()
    inside = (layer.layer.weight / 0.1 >= -4) & (layer.layer.weight / 0.1 <= 3)
    expected = layer.input_quantizer(x).detach().sum(0).expand(3, 5) * inside
    torch.testing.assert_close(layer.layer.weight.grad, expected)
    assert layer.layer.bias.grad.tolist() == [2, 2, 2] and layer.weight_quantizer.scale.grad != 0
    assert 0 < inside.sum() < 15


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepare_replaces_every_layer_and_leaves_the_model(scheme):
    model = folded()
    before = snapshot(model)
    images = data().train_images[:100]
    prepared = prepare(model, scheme, images, weight_bits=3, activation_bits=5)
    assert_unchanged(model, before)
    assert not any(module.training for module in prepared.modules())
    assert list(ranges(prepared)) == list(ptq.layers(model))
    for name, layer in ptq.layers(model).items():
        replaced = prepared.get_submodule(name)
        assert type(replaced) is QATLayer and torch.equal(replaced.layer.weight, layer.weight)
        assert (replaced.weight_quantizer.bits, replaced.input_quantizer.bits) == (3, 5)
        assert type(replaced.weight_quantizer) is (LSQ if scheme in ("LSQ", "LSQ+") else Absmax)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in prepared.parameters()}
    assert not shared and all(p.requires_grad for p in prepared.parameters())


def test_where_the_ranges_start():
    model, images = small_model(), normal(100, 4)
    x = ptq.observe(model, images)["2"]
    inputs, weight = torch.cat(x), model[2].weight.detach()

    def second_layer(scheme):
        positive = images if scheme != "PACT" else images.abs()
        return prepare(model, scheme, positive, weight_bits=3, activation_bits=4)[2]

    assert second_layer("Jacob").input_quantizer.range() == calibration.moving_minmax(x)
    pact_inputs = torch.cat(ptq.observe(model, images.abs())["2"])
    assert second_layer("PACT").input_quantizer.range() == (0.0, pact_inputs.max().item())

    layer = second_layer("LSQ")
    torch.testing.assert_close(layer.input_quantizer.scale.detach(), 2 * inputs.mean() / math.sqrt(15))
    torch.testing.assert_close(layer.weight_quantizer.scale.detach(), 2 * weight.abs().mean() / math.sqrt(3))
    assert layer.input_quantizer.gradient_scale == pytest.approx(1 / math.sqrt(6 * 15))
    assert layer.weight_quantizer.gradient_scale == pytest.approx(1 / math.sqrt(18 * 3))

    layer = second_layer("LSQ+")
    assert layer.input_quantizer.range() == pytest.approx(calibration.mse(inputs, 4), rel=1e-6)
    assert layer.input_quantizer.gradient_scale == pytest.approx(1 / math.sqrt(6 * 15))
    ends = (weight.mean() + 3 * weight.std(correction=0) * torch.tensor([-1, 1])).abs()
    torch.testing.assert_close(layer.weight_quantizer.scale.detach(), ends.max() / 4)


def test_lsq_is_signed_where_the_data_is():
    prepared = prepare(small_model(), "LSQ", normal(50, 4), weight_bits=4, activation_bits=4)
    assert (prepared[0].input_quantizer.qn, prepared[0].input_quantizer.qp) == (8, 7)
    assert (prepared[2].input_quantizer.qn, prepared[2].input_quantizer.qp) == (0, 15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_that_see_only_zeros_can_be_prepared(scheme):
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.data.zero_()
    prepared = prepare(model, scheme, torch.zeros(5, 3), weight_bits=2, activation_bits=2)
    assert prepared(torch.zeros(5, 3)).tolist() == convert(prepared)(torch.zeros(5, 3)).tolist() == [[0, 0]] * 5


def test_a_layer_used_twice_stays_one():
    one = nn.Linear(4, 4)
    prepared = prepare(nn.Sequential(one, nn.ReLU(), one), "LSQ", normal(50, 4), weight_bits=4, activation_bits=4)
    assert prepared[0] is prepared[2]
    quantized = convert(prepared)
    assert quantized[0] is quantized[2]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.b(input=self.a(x).relu())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shared_parameters_stay_shared(scheme):
    prepared = prepare(Tied(), scheme, normal(50, 4).abs(), weight_bits=4, activation_bits=4).train()
    a, b = prepared.a.layer, prepared.b.layer
    assert a.weight is b.weight and a.bias is b.bias and prepared.a.weight_quantizer is not prepared.b.weight_quantizer
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    prepared(normal(50, 4)).square().sum().backward()
    optimizer.step()
    x = normal(5, 4)
    converted = convert(prepared)
    if scheme != "LSQ+":
        assert torch.equal(converted(x), prepared.eval()(x))
    assert not torch.equal(a.weight, converted.a.layer.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_called_at_two_sizes(scheme):
    conv = nn.Conv2d(2, 2, 3)
    conv.weight.data.abs_()
    x = normal(8, 2, 8, 8).abs()
    prepared = prepare(nn.Sequential(conv, nn.ReLU(), conv), scheme, x, weight_bits=8, activation_bits=8)
    assert prepared(x).shape == (8, 2, 4, 4)
    if scheme.startswith("LSQ"):  # of one image: both calls
        assert prepared[0].input_quantizer.gradient_scale == pytest.approx(1 / math.sqrt(2 * (64 + 36) * 255))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1e-14, 1e25])
def test_tiny_and_huge_data_keep_their_levels(scheme, size):
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), normal(50, 4).abs()
    expected = prepare(model, scheme, x, weight_bits=4, activation_bits=4)(x)
    y = prepare(model, scheme, x * size, weight_bits=4, activation_bits=4)(x * size)
    torch.testing.assert_close(y / size, expected, rtol=1e-3, atol=1e-3)
    model[0].weight.data *= size
    tiny = prepare(model, scheme, x, weight_bits=4, activation_bits=4)
    torch.testing.assert_close(tiny(x) / size, expected, rtol=1e-3, atol=1e-3)
    tiny.train()(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tiny.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_models_in_double(scheme):
    model, x = small_model().double(), normal(50, 4).double()
    prepared = prepare(model, scheme, x.abs(), weight_bits=4, activation_bits=4)
    assert all(tensor.dtype == torch.float64 for tensor in prepared.state_dict().values() if tensor.is_floating_point())
    quantized = convert(prepared)
    assert prepared(x).dtype == quantized(x).dtype == torch.float64
    if scheme != "LSQ+":
        assert torch.equal(quantized(x), prepared(x))
    prepared.train()(x).sum().backward()


@pytest.mark.parametrize("scheme", ["Jacob", "PACT", "LSQ"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_converted_equals_prepared(scheme, bits):
    prepared = prepared_digits(scheme, bits, bits, epochs=1, images=128, start_delay=1)
    before = snapshot(prepared.train())
    quantized = convert(prepared)
    assert_unchanged(prepared, before)
    assert not any(module.training for module in quantized.modules())
    images = data().test_images
    assert torch.equal(quantized(images), prepared.eval()(images))
    for module in ptq.layers(folded()):
        layer = quantized.get_submodule(module)
        assert type(layer) is ptq.QuantizedLayer
        assert layer.input_params.qmax - layer.input_params.qmin == 2**bits - 1
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_converted_lsq_plus_equals_prepared_where_the_offsets_are_whole_steps():
    prepared = prepared_digits("LSQ+", 4, 4, epochs=1, images=128)
    moved = convert(prepared)
    images = data().test_images
    assert not torch.equal(moved(images), prepared(images))
    for layer in prepared.modules():
        if isinstance(layer, QATLayer):
            quantizer = layer.input_quantizer
            steps = (quantizer.offset.data / quantizer.scale.data).round().clamp(-15, 0)
            quantizer.offset.data = steps * quantizer.scale.data
    torch.testing.assert_close(convert(prepared)(images), prepared(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(convert(prepared)(images), moved(images), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_converted_networks_run_in_integers(scheme):
    quantized = convert(prepared_digits(scheme, 4, 4, epochs=1))
    net = integer.convert(quantized, input_shape=(1, 8, 8))
    images = data().test_images
    logits, simulated = net(net.quantize_input(images)), integer.round_biases(quantized)(images)
    assert (torch.as_tensor(logits).argmax(1) == simulated.argmax(1)).double().mean() > 0.99


# Training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_mends_what_quantization_broke(scheme):
    prepared = prepared_digits(scheme, 3, 3)
    broken = percent(prepared)
    before = ranges(prepared)
    images, labels, *_ = data()
    losses = [step.loss for step in train(prepared, images, labels, epochs=2, lr=0.01, seed=0)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert percent(prepared) > max(80, broken + 10)
    assert ranges(prepared)["linear"] != before["linear"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_with_the_same_seed_are_equal(scheme):
    one, two, other = (prepared_digits(scheme, 3, 3, epochs=1, seed=seed, images=128).state_dict()
                       for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_prepared_network_can_be_copied_and_restored():
    prepared = prepared_digits("Jacob", 4, 4, epochs=1, images=128)
    twin = prepared_digits("Jacob", 4, 4)
    twin.load_state_dict(prepared.state_dict())
    images = data().test_images[:20]
    assert torch.equal(twin(images), prepared(images))
    assert ranges(copy.deepcopy(prepared)) == ranges(twin) == ranges(prepared)


# Bad input


@pytest.mark.parametrize("make, message", [
    (lambda: LSQ(1, 1.0, n=1), "bits must be an integer from 2 to 8, got 1"),
    (lambda: LSQ(9, 1.0, n=1), "bits must be an integer from 2 to 8, got 9"),
    (lambda: Absmax(True), "bits must be an integer from 2 to 8, got True"),
    (lambda: Absmax(4.0), "bits must be an integer from 2 to 8, got 4.0"),
    (lambda: EMA(0, 0.0, 1.0), "bits must be an integer from 2 to 8, got 0"),
    (lambda: PACT(9, 1.0), "bits must be an integer from 2 to 8, got 9"),
    (lambda: LSQPlus("4", 1.0, 0.0, n=1), "bits must be an integer from 2 to 8, got '4'"),
    (lambda: PACT(4, 0.0), "alpha must be at least 1e-36 and finite, got 0.0"),
    (lambda: PACT(4, -1.0), "alpha must be at least 1e-36 and finite, got -1.0"),
    (lambda: PACT(4, math.inf), "alpha must be at least 1e-36 and finite, got inf"),
    (lambda: PACT(4, math.nan), "alpha must be at least 1e-36 and finite, got nan"),
    (lambda: LSQ(4, 0.0, n=1), "scale must be at least 1e-36 and finite, got 0.0"),
    (lambda: LSQ(4, torch.tensor([1.0, -1.0]), n=1), "scale must be at least 1e-36 and finite, got [1.0, -1.0]"),
    (lambda: LSQ(4, 1.0, n=0), "n must be an integer of at least 1, got 0"),
    (lambda: LSQPlus(4, -1.0, 0.0, n=1), "scale must be at least 1e-36 and finite, got -1.0"),
    (lambda: LSQPlus(4, 1.0, math.nan, n=1), "offset must be finite, got nan"),
    (lambda: LSQPlus(4, 1.0, 0.0, n=2.5), "n must be an integer of at least 1, got 2.5"),
    (lambda: PACT(4, "1"), "alpha must be a number, got '1'"),
    (lambda: PACT(4, [1.0, 2.0]), "alpha must be at least 1e-36 and finite, got [1.0, 2.0]"),
    (lambda: LSQ(4, 1e-37, n=1), "scale must be at least 1e-36 and finite, got "),
    (lambda: LSQPlus(4, 1.0, 1e39, n=1), "offset must be finite, got inf"),
    (lambda: EMA(4, -3e38, 3e38), "beta - alpha must be finite"),
    (lambda: EMA(4, 1.0, 0.0), "alpha must be at most beta, got 1.0 and 0.0"),
    (lambda: EMA(4, math.nan, 0.0), "alpha must be finite, got nan"),
    (lambda: EMA(4, 0.0, math.inf), "beta must be finite, got inf"),
    (lambda: EMA(4, 0.0, 1.0, momentum=0), "momentum must be more than 0 and at most 1, got 0"),
    (lambda: EMA(4, 0.0, 1.0, momentum=1.5), "momentum must be more than 0 and at most 1, got 1.5"),
    (lambda: EMA(4, 0.0, 1.0, momentum="slow"), "momentum must be more than 0 and at most 1, got 'slow'"),
    (lambda: EMA(4, 0.0, 1.0, start_delay=-1), "start_delay must be an integer of at least 0, got -1"),
    (lambda: EMA(4, 0.0, 1.0, start_delay=0.5), "start_delay must be an integer of at least 0, got 0.5"),
])
def test_quantizers_refuse(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


class Half(nn.Module):
    """One of its layers is never called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return linear(self.a(x), self.b.weight)


def pruned(model):
    prune.l1_unstructured(model[2], "weight", 0.5)
    ptq.observe(model, torch.ones(1, 4))  # torch cannot copy it before
    return model


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.embedding(x.long()))


@pytest.mark.parametrize("changes, message", [
    ({"scheme": "lsq"}, "scheme must be one of Jacob, PACT, LSQ, LSQ+, got 'lsq'"),
    ({"scheme": None}, "scheme must be one of Jacob, PACT, LSQ, LSQ+, got None"),
    ({"weight_bits": 1}, "weight_bits must be an integer from 2 to 8, got 1"),
    ({"weight_bits": None}, "weight_bits must be an integer from 2 to 8, got None"),
    ({"activation_bits": 9}, "activation_bits must be an integer from 2 to 8, got 9"),
    ({"activation_bits": 2.0}, "activation_bits must be an integer from 2 to 8, got 2.0"),
    ({"images": torch.zeros(0, 4)}, "images must not be empty"),
    ({"images": torch.zeros(5, 3)}, "images must be what the model takes, got shape (5, 3)"),
    ({"images": torch.full((5, 4), math.nan)}, "images must be finite"),
    ({"images": [[0.0] * 4]}, "images must be a torch tensor, got list"),
    ({"model": nn.Sequential(nn.ReLU(), nn.Flatten())}, "model must hold a Linear or Conv2d layer, got none"),
    ({"model": Embedded()}, "model must hold no weights outside of Linear and Conv2d, got Embedding at 'embedding'"),
    *(({"model": Half(), "scheme": s}, "model must call each of its layers, but 'b' received") for s in SCHEMES),
    ({"model": pruned(small_model())}, "model must not be pruned, but '2' is"),
    ({"model": small_model().bfloat16()}, "layer '0' must have weights in float32 or float64, got torch.bfloat16"),
    ({"model": digits.load(), "images": torch.zeros(1, 1, 8, 8)}, "call fold_batch_norm first"),
    ({"scheme": "PACT", "images": -torch.ones(5, 4)}, "PACT clips what is below 0, but '0' receives -1"),
    ({"scheme": "Jacob", "start_delay": -1}, "start_delay must be an integer of at least 0, got -1"),
], ids=lambda value: None if isinstance(value, dict) else value)
def test_prepare_refuses_and_leaves_the_model(changes, message):
    arguments = {"model": small_model(), "scheme": "LSQ", "images": torch.ones(5, 4), "weight_bits": 4,
                 "activation_bits": 4} | changes
    before = snapshot(arguments["model"])
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(**arguments)
    assert_unchanged(arguments["model"], before)


def test_prepare_refuses_what_is_quantized_already():
    prepared = prepare(small_model(), "Jacob", normal(5, 4), weight_bits=4, activation_bits=4)
    for model, message in [(prepared, "already: QATLayer"), (convert(prepared), "already: QuantizedLayer")]:
        with pytest.raises(ValueError, match=message):
            prepare(model, "Jacob", normal(5, 4), weight_bits=4, activation_bits=4)


def test_hooks_that_came_after_prepare_are_refused():
    x = normal(5, 4)
    doubled, masked = (prepare(small_model(), "LSQ", x, weight_bits=4, activation_bits=4) for _ in range(2))
    doubled[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="no hooks on its layers, which would be lost, got some on '2'"):
        convert(doubled)
    prune.l1_unstructured(masked[0].layer, "weight", 0.5)
    with pytest.raises(ValueError, match="layer must get no hooks after prepare"):
        masked(x)


@pytest.mark.parametrize("function", [convert, ranges])
def test_models_that_are_not_prepared_are_refused(function):
    with pytest.raises(ValueError, match="prepared must hold layers that prepare has made, got none in Sequential"):
        function(small_model())


def test_lower_ends_that_are_learned_hardly_leave_0():
    """As lesson 04 says."""
    learner = prepared_digits("LSQ+", 3, 3, epochs=20)
    assert any(low for low, _ in ranges(learner).values())
    assert all(abs(low) < 0.05 * high for low, high in ranges(learner).values())


@pytest.mark.parametrize("s, v", [(1e-20, 1.0), (1e-12, 1e15), (1e-10, 1e20)])
def test_gradients_far_outside_of_a_small_grid(s, v):
    lsq, plus = LSQ(8, s, n=1), LSQPlus(8, s, 0.0, n=1)
    for quantizer, most in ((lsq, 127), (plus, 255)):
        quantizer(torch.tensor([v])).sum().backward()
        assert quantizer.scale.grad.item() == pytest.approx(most / math.sqrt(most), rel=1e-5)


def test_a_range_beyond_float32_leaves_the_ema_as_it_was():
    ema = EMA(8, 0.0, 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        ema(torch.tensor([1e300, 0.0], dtype=torch.float64))
    assert ema.range() == (0.0, 1.0)
