"""The shipped table of lesson 09 is complete, and its functions store what they say."""

import numpy as np
import pytest

from qlab.affine import sqnr_db
from qlab.studies import blocks as study
from tests.small_model import small_model

X = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)


@pytest.mark.parametrize("name, least", [
    ("int8, tensor", 38), ("FP8, tensor", 30), ("int4, token", 15), ("MXFP4", 17), ("NVFP4", 19),
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
