"""The shipped table of lesson 09 is complete, and its functions store what they say."""

import numpy as np
import pytest
import torch

from qlab import blocks, gptq
from qlab.affine import sqnr_db
from qlab.floats import FP4_E2M1, decode, encode
from qlab.studies import blocks as study
from tests.small_model import small_model, some_tokens

X = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)


@pytest.mark.parametrize("name, least", [
    ("int8, tensor", 38), ("FP8, tensor", 30), ("int4, token", 15), ("MXFP4", 17), ("NVFP4", 19),
    ("int4 zero-point, 32", 20), ("int4 absmax, 16", 20),
])
def test_what_acts_on_activations(name, least):
    y = study.ACTIVATIONS[name](X)
    assert (y.dtype, y.shape) == (np.float32, X.shape)
    assert least < sqnr_db(X, y) < 50


def test_fp8_reaches_from_the_largest_value_down():
    y = study.fp8_per_tensor(np.float32([448, 1, 2.0**-9, -3.1]))
    np.testing.assert_array_equal(y, np.float32([448, 1, 2.0**-9, -3.0]))


def test_ternary_has_three_levels():
    assert np.unique(study.ternary(X)).size == 3
    assert not np.any(study.ternary(X)[np.abs(X) < 0.49 * np.abs(X).mean()])


def test_a_stored_model_has_the_weights_that_the_function_leaves():
    model = small_model()
    copy = study.stored(model, lambda w: 2 * w)
    assert copy.blocks[0].gate.weight.equal(2 * model.blocks[0].gate.weight)
    assert copy.embedding.weight is not None and copy.head.weight.equal(model.head.weight)


def column_by_column(w, h, block):
    """MXFP4 by GPTQ in float64, with the inverse of what is left of H after each column: no factor, no errors kept."""
    w_hat, now, left = np.empty(w.shape), w.astype(np.float64), np.linalg.inv(h)
    for j in range(w.shape[1]):
        if j % block == 0:
            steps = 2.0 ** (np.floor(np.log2(np.abs(now[:, j:j + block]).max(axis=1))) - 2)
        w_hat[:, j] = steps * decode(encode(now[:, j] / steps, FP4_E2M1, saturate=True), FP4_E2M1)
        now[:, j + 1:] -= np.outer(now[:, j] - w_hat[:, j], left[0, 1:] / left[0, 0])
        left = left[1:, 1:] - np.outer(left[1:, 0], left[0, 1:]) / left[0, 0]
    return w_hat


def test_gptq_in_blocks_is_that_of_the_inverse_hessian():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((300, 128)) @ rng.standard_normal((128, 128))).astype(np.float32)
    h = gptq.hessian(x)
    damped = h.astype(np.float64) + 0.01 * np.mean(np.diag(h)) * np.eye(128)
    w_hat = study.compensated(X, h, blocks.MXFP4)
    np.testing.assert_allclose(w_hat, column_by_column(X, damped, 32), rtol=1e-6)
    for fmt in (blocks.MXFP4, blocks.NVFP4):
        errors = [np.linalg.norm(x @ (some - X).T) for some in (study.compensated(X, h, fmt), study.through(fmt)(X))]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("fmt", [blocks.MXFP4, blocks.NVFP4])
def test_gptq_in_blocks_of_columns_that_never_meet_is_rounding_to_nearest(fmt):
    w = np.where(np.arange(128) < 32, np.float32(0), X)  # a block of zeros, too
    np.testing.assert_array_equal(study.compensated(w, np.eye(128, dtype=np.float32), fmt), study.through(fmt)(w))


def test_the_tensors_scale_is_that_of_the_weights_before_gptq():
    w, h = np.zeros((1, 32), np.float32), np.eye(32, dtype=np.float32)
    w[0, [0, 15, 16]] = 6, 4.9, 5.9
    h[15, 16] = h[16, 15] = 0.999  # the error of 4.9, which becomes 4, takes 5.9 beyond the largest weight
    np.testing.assert_allclose(study.compensated(w, h, blocks.NVFP4)[0, [0, 15, 16]], [6, 4, 6], rtol=1e-6)


def test_a_row_changes_what_its_kind_says():
    model, tokens = small_model(torch.float32), some_tokens()
    weights, functions = study.changed(model, "both", "FP8, tensor", tokens)
    assert weights.blocks[0].gate.weight.equal(torch.from_numpy(
        study.fp8_per_tensor(model.blocks[0].gate.weight.numpy())))
    assert functions.keys() == dict.fromkeys(study.PLACES).keys()
    assert study.changed(model, "activations", "int4, token", tokens)[0] is model
    assert study.changed(model, "weights", "ternary", tokens)[1] == {}


def test_bits_are_known_of_all_rows():
    assert {name for _, name, _ in study.ROWS} <= study.BITS.keys()
