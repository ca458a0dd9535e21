"""GPTQ against OBQ's closed form and other libraries' codes; AWQ against its definition; a small LLaMA, and the real one."""

import itertools
import math
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab import smollm
from qlab.affine import absmax_params, dequantize, fake_quantize, quantize, zero_point_params
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
    second = torch.autograd.functional.hessian(lambda row: (x @ row).square().sum(), torch.from_numpy(w[0]))
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
    tried = [s * (1 - 0.025 * i) for i in range(33)]
    errors = [(h * (w - rounded(w, t[:, None], z[:, None], bits, symmetric)[1]) ** 2).sum(1) for t in tried]
    return np.choose(np.argmin(errors, 0), tried) if len(s) > 32 else np.array(tried)[np.argmin(errors, 0),
                                                                                     np.arange(len(s))], z


def rounded(w, s, z, bits, symmetric):
    qmax = 2 ** (bits - 1) - 1
    q = np.clip(np.rint(w / s) + z, -qmax if symmetric else -qmax - 1, qmax)
    return q, s * (q - z)


def obq(w, h, bits, group_size, symmetric, damping, act_order, ranges):
    """Optimal brain quantization in a given order: the inverse of what is left of H, computed anew for each column."""
    w, h, inputs = w.copy(), h.copy(), w.shape[1]
    dead = h.diagonal() == 0
    w[:, dead] = 0
    weighting = {"min-max": None, "MSE": np.ones(inputs), "weighted": h.diagonal().copy()}[ranges]
    h[dead, dead] = 1
    h += damping * h.diagonal().mean() * np.eye(inputs)
    order = np.argsort(np.where(dead, 0, -h.diagonal()), kind="stable") if act_order else np.arange(inputs)
    size, params, codes, w_hat = group_size or inputs, {}, np.empty(w.shape, int), np.empty(w.shape)
    for step, j in enumerate(order):
        left, group = order[step:], slice(j // size * size, (j // size + 1) * size)
        if group.start not in params:
            params[group.start] = searched(w[:, group], bits, symmetric, None if weighting is None else weighting[group])
        codes[:, j], w_hat[:, j] = rounded(w[:, j], *params[group.start], bits, symmetric)
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[:, left] -= np.outer(w[:, j] - w_hat[:, j], inverse[0] / inverse[0, 0])
    return codes, w_hat


@pytest.mark.parametrize("act_order, symmetric", itertools.product([False, True], repeat=2))
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


@given(st.integers(0, 2**32 - 1), st.sampled_from(GROUPS), st.booleans(), st.sampled_from(RANGES), st.integers(2, 8))
def test_without_inputs_that_meet_it_is_rounding_to_nearest(seed, group_size, symmetric, ranges, bits):
    w, x = layer(seed)
    options = {"group_size": group_size, "symmetric": symmetric, "ranges": ranges}
    codes, params = gptq(w, np.diag(x[0] ** 2), bits, act_order=symmetric, **options)
    expected = weight_params(w, bits, diagonal=x[0] ** 2, **options)
    np.testing.assert_array_equal(codes, quantize(w, expected))
    np.testing.assert_array_equal(params.scale, expected.scale)
    h = hessian(x)
    nearest = compensated(w, factor(h), bits, columns=0, **options)
    expected = weight_params(w, bits, diagonal=h.diagonal(), **options)
    np.testing.assert_array_equal(nearest.codes, quantize(w, expected))
    np.testing.assert_array_equal(nearest.weights, w)


@given(st.integers(0, 2**32 - 1), st.sampled_from(GROUPS), st.booleans(), st.booleans(), st.sampled_from(RANGES),
       st.integers(2, 16), st.integers(1, 60))
def test_codes_and_errors_add_up(seed, group_size, symmetric, act_order, ranges, bits, tokens):
    w, x = layer(seed, tokens=tokens)
    h, options = hessian(x), {"group_size": group_size, "symmetric": symmetric, "ranges": ranges}
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
        assert torch.equal(codes[:, done], full.codes[:, done]) and torch.equal(weights[:, done], full.weights[:, done])
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
    x[:, np.abs(w).max(0).argmax()] *= 30
    h = hessian(x)
    found = [fake_quantize(w, weight_params(w, 3, ranges=ranges, diagonal=h.diagonal()).__class__(
        **{**vars(weight_params(w, 3, ranges=ranges, diagonal=h.diagonal()))})) for ranges in RANGES]
    of_weights = [float(((w - np.asarray(w_hat)) ** 2).sum()) for w_hat in found]
    of_outputs = [output_error(w, np.asarray(w_hat), h) for w_hat in found]
    assert of_weights[1] < min(of_weights[0], of_weights[2]) and of_outputs[2] < min(of_outputs[:2])
