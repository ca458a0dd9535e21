"""GPTQ against OBQ and other libraries' codes; AWQ against its definition; a small LLaMA, and the real one."""

import itertools
import math
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab import smollm
from qlab.affine import absmax_params, dequantize, fake_quantize, quantize, zero_point_params
from qlab.evaluation import texts
from qlab.gptq import (
    RANGES,
    activation_aware,
    awq_scales,
    awq_search,
    compensated,
    factor,
    gptq,
    hessian,
    hessians,
    quantized,
    weight_params,
)
from qlab.outliers import capture
from qlab.smollm import READERS, SITES, inserted, reweighted
from tests.gptq_golden import PATH
from tests.small_model import logits, relative, small_model, some_tokens, state_bytes

GROUPS = [None, 4, 12]
INPUTS = 24
OPTIONS = st.fixed_dictionaries({"group_size": st.sampled_from(GROUPS), "symmetric": st.booleans(),
                                 "ranges": st.sampled_from(RANGES)})


def layer(seed=0, outputs=5, tokens=40, inputs=INPUTS):
    """Weights and inputs whose channels are of unequal size and meet."""
    rng = np.random.default_rng(seed)
    mix = np.eye(inputs) + 0.4 * rng.standard_normal((inputs, inputs))
    x = rng.standard_normal((tokens, inputs)) @ mix * np.exp(rng.standard_normal(inputs))
    return rng.standard_normal((outputs, inputs)), x


def output_error(w, w_hat, h):
    delta = np.asarray(w - w_hat, np.float64)
    return np.trace(delta @ np.asarray(h, np.float64) @ delta.T)


# H


def test_hessian_is_the_matrix_of_second_derivatives():
    w, x = layer()
    x = torch.from_numpy(x)
    row = torch.from_numpy(w[0]).requires_grad_()
    (slope,) = torch.autograd.grad((x @ row).square().sum(), row, create_graph=True)
    second = torch.stack([torch.autograd.grad(one, row, retain_graph=True)[0] for one in slope])
    torch.testing.assert_close(hessian(x), second)
    np.testing.assert_allclose(hessian(x.numpy()), second.numpy())
    assert hessian(x.float()).dtype == torch.float32 and hessian(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_of_the_inverse(act_order):
    h = hessian(layer()[1])
    h[3], h[:, 3] = 0, 0
    upper, order, diagonal = factor(h, damping=0.1, act_order=act_order)
    np.testing.assert_array_equal(diagonal, h.diagonal())
    sizes = h.diagonal()[order]
    assert (np.diff(sizes) <= 0).all() if act_order else order.tolist() == [*range(INPUTS)]
    h[3, 3] = 1
    damped = (h + 0.1 * h.diagonal().mean() * np.eye(INPUTS))[np.ix_(order, order)]
    assert torch.equal(upper, upper.triu())
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped), rtol=1e-9, atol=1e-14)


# Codes of GPTQ


def searched(w, bits, symmetric, h):
    """Scales and zero-points of rows, from their definition; with the least error weighted by ``h``, if it is given."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    qmax = 2 ** (bits - 1) - 1
    s = np.maximum(-low, high) / qmax if symmetric else (high - low) / (2**bits - 1)
    s = np.where(low == high, 1, s)
    z = np.zeros(len(s)) if symmetric else np.where(low == high, 0, -qmax - 1 - np.rint(low / s))
    if h is None:
        return s, z
    tried = np.array([s * (40 - i) / 40 for i in range(33)])
    errors = [(h * (w - rounded(w, t[:, None], z[:, None], bits, symmetric)[1]) ** 2).sum(1) for t in tried]
    return tried[np.argmin(errors, 0), np.arange(len(s))], z


def rounded(w, s, z, bits, symmetric):
    qmax = 2 ** (bits - 1) - 1
    q = np.clip(np.rint(w / s) + z, -qmax if symmetric else -qmax - 1, qmax)
    return q, s * (q - z)


def obq(w, h, bits, *, group_size, symmetric, damping, act_order, ranges):
    """Optimal brain quantization in a given order: the inverse of what is left of H, computed anew for each column."""
    w, h, inputs = w.copy(), h.copy(), w.shape[1]
    dead = h.diagonal() == 0
    w[:, dead] = 0
    weight = {"min-max": None, "MSE": np.ones(inputs), "weighted": h.diagonal().copy()}[ranges]
    h[dead, dead] = 1
    h += damping * h.diagonal().mean() * np.eye(inputs)
    order = np.argsort(np.where(dead, 0, -h.diagonal()), kind="stable") if act_order else np.arange(inputs)
    size, params, codes, w_hat = group_size or inputs, {}, np.empty(w.shape, int), np.empty(w.shape)
    for step, j in enumerate(order):
        left, group = order[step:], slice(j // size * size, (j // size + 1) * size)
        if group.start not in params:
            params[group.start] = searched(w[:, group], bits, symmetric, None if weight is None else weight[group])
        codes[:, j], w_hat[:, j] = rounded(w[:, j], *params[group.start], bits, symmetric)
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[:, left] -= np.outer(w[:, j] - w_hat[:, j], inverse[0] / inverse[0, 0])
    return codes, w_hat


@pytest.mark.parametrize("act_order, symmetric", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("ranges", RANGES)
def test_gptq_is_obq(group_size, symmetric, act_order, ranges):
    for seed, bits, damping, tokens in ((0, 4, 0.01, 40), (1, 3, 0.1, 5), (2, 2, 0.01, 1), (3, 8, 0, 90)):
        w, x = layer(seed, tokens=tokens)
        x[:, 5] *= damping == 0  # a dead column
        options = {"group_size": group_size, "symmetric": symmetric, "damping": damping, "act_order": act_order,
                   "ranges": ranges}
        codes, params = gptq(w, hessian(x), bits, **options)
        expected, w_hat = obq(w, hessian(x), bits, **options)
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_allclose(dequantize(codes, params), w_hat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 20, 50])
@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_of_columns_only_regroup_sums(group_size, act_order):
    w, x = layer(4, outputs=3, tokens=300, inputs=200)
    options = {"group_size": group_size, "symmetric": False, "damping": 0.01, "act_order": act_order,
               "ranges": "min-max"}
    codes, params = gptq(w, hessian(x), 3, **options)
    expected, w_hat = obq(w, hessian(x), 3, **options)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(dequantize(codes, params), w_hat, rtol=0, atol=1e-6)


GOLDEN = dict(np.load(PATH))


@pytest.mark.parametrize("name", [name for name in GOLDEN if " " in name])
def test_codes_of_other_libraries(name):
    act_order, group_size = map(int, name.split()[1:])
    codes, _ = gptq(GOLDEN["w"], hessian(GOLDEN["x"]), 4, act_order=bool(act_order), group_size=group_size or None)
    np.testing.assert_array_equal(codes + 8, GOLDEN[name])


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), OPTIONS, st.booleans(), st.integers(2, 8))
def test_without_inputs_that_meet_it_is_rounding_to_nearest(seed, options, act_order, bits):
    w, x = layer(seed)
    codes, params = gptq(w, np.diag(x[0] ** 2), bits, act_order=act_order, **options)
    expected = weight_params(w, bits, diagonal=x[0] ** 2, **options)
    np.testing.assert_array_equal(codes, quantize(w, expected))
    np.testing.assert_array_equal(params.scale, expected.scale)
    h = hessian(x)
    nearest = compensated(w, factor(h), bits, columns=0, **options)
    expected = weight_params(w, bits, diagonal=h.diagonal(), **options)
    np.testing.assert_array_equal(nearest.codes, quantize(w, expected))
    np.testing.assert_array_equal(nearest.weights, w)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), OPTIONS, st.booleans(), st.integers(2, 16), st.integers(1, 60))
def test_codes_and_errors_add_up(seed, options, act_order, bits, tokens):
    w, x = layer(seed, tokens=tokens)
    h, symmetric = hessian(x), options["symmetric"]
    upper, order, _ = known = factor(h, act_order=act_order)
    codes, params, before = compensated(w, known, bits, **options)
    qmin = 1 - 2 ** (bits - 1) if symmetric else -(2 ** (bits - 1))
    assert (params.qmin, params.qmax) == (qmin, 2 ** (bits - 1) - 1)
    assert qmin <= codes.min() and codes.max() <= params.qmax and codes.dtype == torch.int32
    w_hat = dequantize(codes, params)
    errors = ((before - w_hat)[:, order] / upper.diagonal()).square().sum()
    damped = h + 0.01 * h.diagonal().mean() * np.eye(INPUTS)
    np.testing.assert_allclose(errors, output_error(w, w_hat.numpy(), damped), rtol=1e-8)
    for other in (gptq(w, 4 * h, bits, act_order=act_order, **options),  # in other units of x
                  gptq(torch.tensor(w[[2]]), h, bits, act_order=act_order, **options)):  # a row alone
        np.testing.assert_array_equal(other[0], codes if len(other[0]) > 1 else codes[[2]])


@pytest.mark.parametrize("options", [{}, {"group_size": 4, "act_order": True, "ranges": "weighted"}], ids=str)
def test_the_way_of_a_replay(options):
    w, x = layer()
    known = factor(hessian(x), act_order=options.pop("act_order", False))
    full, upper = compensated(w, known, 3, **options), known.upper
    for columns in (0, 1, 7, INPUTS - 1, INPUTS):
        codes, params, weights = compensated(w, known, 3, columns=columns, **options)
        done = known.order[:columns]
        assert torch.equal(codes[:, done], full.codes[:, done])
        np.testing.assert_allclose(weights[:, done], full.weights[:, done], atol=1e-12)
        e = ((weights - dequantize(codes, params))[:, done] / upper.diagonal()[:columns])
        for k in range(columns, INPUTS):  # all corrections so far
            expected = w[:, known.order[k]] - (e @ upper[:columns, k]).numpy()
            np.testing.assert_allclose(weights[:, known.order[k]], expected, atol=1e-12)
        rest = quantize(weights, params)[:, known.order[columns:]]
        assert torch.equal(codes[:, known.order[columns:]], rest)


def test_it_is_better_than_nearest_on_real_weights_of_four_bits():
    w, x = layer(outputs=40, tokens=200)
    h = hessian(x)
    nearest = output_error(w, fake_quantize(w, zero_point_params(w, 4, axis=0)), h)
    for options in ({}, {"act_order": True}, {"act_order": True, "ranges": "weighted"}):
        better = output_error(w, dequantize(*gptq(w, h, 4, **options)), h)
        assert better < 0.6 * nearest
        nearest = better / 0.6


# Ranges


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(GROUPS), st.booleans(), st.integers(2, 8))
def test_ranges_have_the_least_error(seed, group_size, symmetric, bits):
    w, x = layer(seed)
    h = {"MSE": np.ones(INPUTS), "weighted": (x**2).sum(0)}
    params = {ranges: weight_params(w, bits, group_size=group_size, symmetric=symmetric, ranges=ranges,
                                    diagonal=h["weighted"]) for ranges in RANGES}
    size = group_size or INPUTS
    for group, start in enumerate(range(0, INPUTS, size)):
        columns = slice(start, start + size)
        for ranges, p in params.items():
            s, z = searched(w[:, columns], bits, symmetric, h[ranges][columns] if ranges in h else None)
            np.testing.assert_allclose(p.scale.reshape(5, -1)[:, group], s, rtol=1e-12)
            np.testing.assert_array_equal(p.zero_point.reshape(5, -1)[:, group], z)


def test_min_max_is_that_of_the_affine_module():
    w = torch.randn(6, 8)
    for ours, theirs in ((weight_params(w, 4), zero_point_params(w, 4, axis=0)),
                         (weight_params(w, 4, symmetric=True, group_size=4), absmax_params(w, 4, group_size=4))):
        assert repr(ours) == repr(theirs) and torch.equal(ours.scale, theirs.scale)


def test_errors_of_weights_and_of_outputs_part_ways():
    w, x = layer(outputs=60)
    w[:, 4] *= 4  # the largest weights, which MSE clips, meet the largest inputs
    x[:, 4] *= 30
    h = hessian(x)
    found = [fake_quantize(w, weight_params(w, 3, ranges=ranges, diagonal=h.diagonal())) for ranges in RANGES]
    of_weights = [((w - w_hat) ** 2).sum() for w_hat in found]
    of_outputs = [output_error(w, w_hat, h) for w_hat in found]
    assert of_weights[1] < 0.95 * of_weights[0] and of_outputs[1] > 1.1 * of_outputs[0]
    assert of_outputs[2] < min(of_outputs[:2])


# AWQ


@pytest.mark.parametrize("group_size", GROUPS)
def test_awq_is_its_definition(group_size):
    w, x = layer(5)
    x[:, 2] = 0
    found = awq_search(w, x, 3, group_size=group_size, grid=10)
    errors, scales = [], []
    for alpha in np.arange(10) / 10:
        size = np.abs(x).mean(0)
        s = np.where(size > 0, size, np.sort(size)[1]) ** alpha
        s /= math.sqrt(s.max() * s.min())
        groups = (w * s).reshape(-1, group_size or INPUTS)
        _, w_hat = rounded(groups, *(t[:, None] for t in searched(groups, 3, False, None)), 3, False)
        errors.append(((x @ (w - w_hat.reshape(w.shape) / s).T) ** 2).sum() / ((x @ w.T) ** 2).sum())
        scales.append(s)
    np.testing.assert_allclose(found.alphas, np.arange(10) / 10)
    np.testing.assert_allclose(found.errors, errors, rtol=1e-9)
    np.testing.assert_allclose(found.scales, scales, rtol=1e-12)
    best = awq_scales(w, x, 3, group_size=group_size, grid=10)
    np.testing.assert_allclose(best, scales[np.argmin(errors)], rtol=1e-12)
    in_torch = awq_scales(torch.tensor(w).float(), torch.tensor(x).float(), 3, group_size=group_size, grid=10)
    assert in_torch.dtype == torch.float32
    torch.testing.assert_close(in_torch, torch.tensor(best).float(), rtol=1e-4, atol=0)


def test_awq_where_nothing_passed():
    w, _ = layer()
    np.testing.assert_array_equal(awq_scales(w, np.zeros((3, INPUTS)), 4), np.ones(INPUTS))


# Other arrays, and what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_arrays_of_torch_and_numpy(dtype):
    w, x = layer()
    w, x = torch.tensor(w).to(dtype).requires_grad_(), torch.tensor(x).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    codes, params = gptq(w, hessian(x), 4, group_size=np.int64(12))
    assert dequantize(codes, params).dtype == wide and params.scale.shape == (5, 2) and not codes.requires_grad
    w_numpy = w.detach().to(wide).numpy()
    w_numpy.flags.writeable = False
    in_numpy, params_numpy = gptq(w_numpy, hessian(x.to(wide).numpy()), 4, group_size=12)
    assert isinstance(in_numpy, np.ndarray) and isinstance(params_numpy.scale, np.ndarray)
    np.testing.assert_array_equal(in_numpy, codes)
    np.testing.assert_array_equal(dequantize(in_numpy, params_numpy), dequantize(codes, params))


def test_dead_columns_and_rows():
    w, x = layer()
    x[:, [1, 8]], w[2] = 0, 0
    codes, params = gptq(w, hessian(x), 4, act_order=True)
    w_hat = dequantize(codes, params)
    assert not w_hat[:, [1, 8]].any() and not w_hat[2].any() and params.scale[2] == 1
    live = [j for j in range(INPUTS) if j not in (1, 8)]
    assert w_hat[:, live].any(0).all()
    codes, params = gptq(w, hessian(x * 0), 4)
    assert not dequantize(codes, params).any()


def test_a_column_without_inputs_takes_no_part_in_the_range():
    w, x = layer()
    x[:, 3], w[:, 3] = 0, 100
    assert gptq(w, hessian(x), 4)[1].scale.max() < 1


W, X = layer()
NAN, INFINITE, H = np.full((2, 2), np.nan), np.full((2, 2), np.inf), hessian(X)


@pytest.mark.parametrize("call, message", [
    (lambda: hessian(NAN), "x must be finite, got 4 NaN"),
    (lambda: hessian(np.ones((0, 3))), "x must not be empty, got shape (0, 3)"),
    (lambda: hessian(np.ones(3)), "x must be a matrix, got shape (3,)"),
    (lambda: hessian(np.full((1, 2), 1e300)), "hessian(x) must be finite"),
    (lambda: hessian(np.full((3, 2), 1e-25, np.float32)), "x must be large enough for its squares to be above 0 in "
                                                          "torch.float32, got 1e-25 at most"),
    (lambda: gptq(NAN, np.eye(2), 4), "w must be finite, got 4 NaN"),
    (lambda: gptq(INFINITE, np.eye(2), 4), "w must be finite, got 0 NaN and 4 infinite"),
    (lambda: gptq(W[0], H, 4), "w must be a matrix, got shape (24,)"),
    (lambda: gptq(W[:0], H, 4), "w must not be empty"),
    (lambda: gptq(W[:, :5], H, 4), "hessian must be of shape (5, 5) for w of shape (5, 5), got (24, 24)"),
    (lambda: gptq(W, NAN, 4), "hessian must be finite"),
    (lambda: gptq(W, H[:3], 4), "hessian must be square and symmetric with a diagonal of at least 0, got shape (3"),
    (lambda: gptq(W, -H, 4), "hessian must be square and symmetric with a diagonal of at least 0"),
    (lambda: gptq(W, H + 99 * np.tri(INPUTS), 4), "hessian must be square and symmetric"),
    (lambda: gptq(W, hessian(X[:3]), 4, damping=0), "damping must be large enough for H + damping · mean(diag H)"),
    (lambda: gptq(W, H, 4, damping=-1), "damping must be a finite number of at least 0, got -1"),
    (lambda: gptq(W, H, 4, damping=math.nan), "damping must be a finite number of at least 0, got nan"),
    (lambda: gptq(W, H, 4, group_size=5), "group_size must divide the 24 inputs, as 4, 6, 8 would, got 5"),
    (lambda: gptq(W, H, 4, group_size=0), "group_size must be an integer of at least 1, got 0"),
    (lambda: gptq(W, H, 4, group_size=4.0), "group_size must be an integer of at least 1, got 4.0"),
    (lambda: gptq(W, H, 1), "bits must be an integer from 2 to 16, got 1"),
    (lambda: gptq(W, H, 4, ranges="best"), "ranges must be one of min-max, MSE, weighted, got 'best'"),
    (lambda: compensated(W, factor(H), 4, columns=25), "columns must be an integer from 0 to 24, got 25"),
    (lambda: compensated(W, H, 4), "factor must be a Factor, as factor(hessian(x)) is, got ndarray"),
    (lambda: weight_params(W, 4, ranges="weighted"), "diagonal must be given for weighted ranges"),
    (lambda: weight_params(W, 4, ranges="weighted", diagonal=-np.ones(24)), "nowhere less than 0"),
    (lambda: weight_params(W, 4, ranges="weighted", diagonal=np.ones(3)), "diagonal must be of shape (24,)"),
    (lambda: weight_params(W, 4, group_size=7), "group_size must divide the 24 inputs"),
    (lambda: awq_scales(W, X[:, :7], 4), "x must be of shape (tokens, 24) for w of shape (5, 24), got 7 channels"),
    (lambda: awq_scales(W, X, 4, grid=0), "grid must be an integer of at least 1, got 0"),
    (lambda: awq_scales(W, X, 4, group_size=7), "group_size must divide the 24 inputs"),
    (lambda: awq_scales(W * np.nan, X, 4), "w must be finite"),
])
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Another program's kernel


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_four_bits_in_a_kernel(block, symmetric):
    w, x = (t.astype(np.float32) for t in layer(6, outputs=10, tokens=50, inputs=192))
    codes, params = gptq(w, hessian(x), 4, group_size=block, symmetric=symmetric, act_order=True)

    def packed(values):
        """Two codes of 4 bits in a byte, the first one in the lower half."""
        values = np.pad(values + 8, ((0, 0), (0, values.shape[1] % 2))).astype(np.uint8)
        return values[:, ::2] | values[:, 1::2] << 4

    inputs = {"B": packed(codes).reshape(10, -1, block // 2), "scales": params.scale,
              "zeros": packed(params.zero_point)}
    node = onnx.helper.make_node("MatMulNBits", ["A", *inputs], ["Y"], domain="com.microsoft", K=192, N=10, bits=4,
                                 block_size=block, accuracy_level=0)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in "AY"]
    graph = onnx.helper.make_graph([node], "linear", values[:1], values[1:],
                                   [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items()])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)])
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"A": x})
    expected = x @ dequantize(codes, params).T
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


# The model


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def tokens():
    return some_tokens()


def test_hessians_are_those_of_what_the_layers_read(model, tokens):
    double = {(1, "o_in"): lambda x: 2 * x, (0, "down_in"): lambda x: x.abs()}
    for functions in ({}, double):
        with inserted(model, functions):
            inputs = capture(model, tokens, [(layer, site) for layer in range(2) for site in SITES])
            layers = list(hessians(model, tokens))
        assert [{*found} for found in layers] == [{(layer, site) for site in SITES} for layer in range(2)]
        for place, (h, size) in (layers[0] | layers[1]).items():
            torch.testing.assert_close(h, hessian(inputs[place]), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(size, inputs[place].abs().mean(0))
    assert {*next(hessians(model, tokens, ["o_in"]))} == {(0, "o_in")}


@pytest.mark.parametrize("method", ["gptq", "nearest"])
def test_the_layers_of_a_model(model, tokens, method):
    before = state_bytes(model)
    options = {"group_size": 16, "act_order": True, "ranges": "weighted", "damping": 0.1, "symmetric": True}
    copy = quantized(model, tokens, 3, method=method, progress=False, **options)
    assert copy.changes == ("3-bit weights",) and model.changes == () and state_bytes(model) == before
    inputs = capture(model, tokens, [(layer, site) for layer in range(2) for site in SITES])
    changed = set()
    for (layer, site), x in inputs.items():
        for name in READERS[site]:
            w = getattr(model.blocks[layer], name).weight
            if method == "gptq":
                expected = dequantize(*gptq(w, hessian(x), 3, **options))
            else:
                expected = fake_quantize(w, weight_params(w, 3, group_size=16, symmetric=True, ranges="weighted",
                                                          diagonal=hessian(x).diagonal()))
            torch.testing.assert_close(getattr(copy.blocks[layer], name).weight, expected, rtol=0, atol=1e-9)
            changed.add(f"blocks.{layer}.{name}.weight")
    assert {name for name, value in state_bytes(copy).items() if value != before[name]} == changed
    fewer = quantized(model, tokens, 3, sites=["o_in"], progress=False)
    assert {name for name, value in state_bytes(fewer).items() if value != before[name]} == {
        f"blocks.{layer}.o.weight" for layer in range(2)}


def test_scaling_changes_nothing_before_it_is_rounded(model, tokens):
    scaled = activation_aware(model, tokens, 3, group_size=16, progress=False)
    assert relative(logits(scaled, tokens), logits(model, tokens)) < 1e-11 and scaled.changes == ("smoothed",)
    x = capture(model, tokens, [(1, "attn_in")])[1, "attn_in"]
    w = torch.cat([getattr(model.blocks[1], name).weight for name in "qkv"])
    s = awq_scales(w, x, 3, group_size=16)
    torch.testing.assert_close(scaled.blocks[1].attn_norm.weight, model.blocks[1].attn_norm.weight / s)
    torch.testing.assert_close(scaled.blocks[1].k.weight, model.blocks[1].k.weight * s)


@pytest.mark.parametrize("arguments, options, message", [
    (([[1, 2]],), {}, "tokens must be int64 of shape (N, T)"),
    ((some_tokens(), 1), {}, "bits must be an integer from 2 to 16, got 1"),
    ((some_tokens(),), {"method": "best"}, "method must be one of nearest, gptq, got 'best'"),
    ((some_tokens(),), {"sites": ["head"]}, "places must be pairs (layer, site)"),
    ((some_tokens(),), {"group_size": 64}, "group_size must divide the 48 inputs, as 16, 24, 48 would, got 64"),
])
def test_a_model_is_refused(model, arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantized(model, *arguments, **options, progress=False)


def test_models_that_are_refused(model, tokens):
    with pytest.raises(ValueError, match="model must be as loaded, got one that was changed: 8-bit weights"):
        activation_aware(reweighted(model, {}, "8-bit weights"), tokens, progress=False)
    with pytest.raises(ValueError, match=r"the activations at \(0, 'down_in'\) must be finite"), \
            inserted(model, {(0, "down_in"): lambda x: x * math.nan}):
        quantized(model, tokens, progress=False)
    with pytest.raises(ValueError, match="model must be a SmolLM, got NoneType"):
        quantized(None, tokens)


def test_models_in_half_precision(tokens):
    model = small_model(torch.bfloat16)
    copy = quantized(activation_aware(model, tokens, progress=False), tokens, 8, group_size=16, progress=False)
    assert copy.blocks[0].q.weight.dtype == torch.bfloat16
    assert relative(logits(copy, tokens).float(), logits(model, tokens).float()) < 0.1


# The real model


@pytest.mark.long
def test_the_real_model():
    model = smollm.load(progress=False)
    del model.blocks[2:]
    calibration, held_out = (texts(model)[name][:1, :128] for name in ("calibration", "documentation"))
    expected, error = logits(model, held_out), {}
    for name, options in (("nearest", {"method": "nearest"}),
                          ("order and clipping", {"act_order": True, "ranges": "weighted"})):
        copy = quantized(model, calibration, 4, progress=False, **options)
        error[name] = (logits(copy, held_out) - expected).square().mean().item()
    assert error["order and clipping"] < 0.7 * error["nearest"]


@pytest.mark.parametrize("power", [-280, -83, 0, 120, 300])
def test_codes_do_not_depend_on_the_units_of_h(power):
    w, x = (torch.tensor(a) for a in layer())
    h, options = hessian(x), {"ranges": "weighted", "group_size": 4}
    for dtype in (torch.float32, torch.float64):
        expected, found = (gptq(w.to(dtype), hessian_, 3, **options)[0] for hessian_ in (h, h * 2.0**power))
        assert torch.equal(found, expected) and len(expected.unique()) > 4


@pytest.mark.parametrize("power", [-90, -70, 55, 70, 100])
def test_searches_do_not_depend_on_the_units(power):
    w, x = (torch.tensor(a, dtype=torch.float32) for a in layer())
    h = torch.arange(1.0, 1 + w.shape[1])
    for ranges in ("MSE", "weighted"):
        here, there = (weight_params(m, 3, ranges=ranges, diagonal=h).scale for m in (w, w * 2.0**power))
        assert torch.equal(there, here * 2.0**power)
    assert torch.equal(awq_scales(w * 2.0**power, x, 3), awq_scales(w, x, 3))
