"""ONNX Runtime's kernels compute the products of our codes; what the stopwatch times is what it says."""

import numpy as np
import pytest
import torch

from qlab import smollm
from qlab.affine import dequantize, fake_quantize, quantize, zero_point_params
from qlab.gptq import gptq, hessian
from qlab.studies import kernels


@pytest.mark.parametrize("group_size", [64, 32])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_four_bits_are_the_product_with_our_dequantized_weights(group_size, method):
    chance = np.random.default_rng(0)
    x, w = (chance.normal(size=shape).astype(np.float32) for shape in ((5, 576), (40, 576)))
    params = zero_point_params(w, 4, group_size=group_size)
    codes = quantize(w, params)
    if method == "gptq":
        codes, params = gptq(w, hessian(x), 4, group_size=group_size)
    expected = x @ dequantize(codes, params).T
    assert np.abs(kernels.four_bit(x, codes, params) - expected).max() < 1e-5 * np.abs(expected).max()
    rounded = kernels.four_bit(x, codes, params, accuracy_level=4)
    assert np.abs(rounded - expected).max() < 0.05 * np.abs(expected).max()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return smollm.SmolLM(smollm.Sizes(vocab_size=9, hidden_size=64, intermediate_size=128, num_hidden_layers=2))


@pytest.mark.parametrize("kind, error", [("FP32", 1e-5), ("int8", 0.05), ("4 bits", 0.15)])
def test_the_stopwatch_multiplies_every_matrix_of_the_blocks(model, kind, error):
    watch = kernels.Stopwatch(model, kind)
    matrices = [torch.cat([getattr(block, name).weight.detach() for name in names]).numpy()
                for block in model.blocks for names in smollm.READERS.values()]
    x = {f"x{n}": np.random.default_rng(n).normal(size=(3, n)).astype(np.float32)
         for n in {w.shape[1] for w in matrices}}
    products = watch._session.run(None, x)
    assert len(products) == len(matrices) == 8
    for product, w in zip(products, matrices, strict=True):
        expected = x[f"x{w.shape[1]}"][:1] @ w.T
        assert np.abs(product - expected).max() < error * np.abs(expected).max()
    assert watch.milliseconds(2, repeats=1) > 0


def test_packing_is_that_of_the_operator():
    w = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    params = zero_point_params(w, 4, group_size=32)
    codes, zeros = kernels.packed(quantize(w, params), params)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(3, 3, 32).astype(int)
    z = np.stack([zeros & 15, zeros >> 4], -1).reshape(3, -1)[:, :3, None].astype(int)
    np.testing.assert_allclose(((nibbles - z) * params.scale.numpy()[..., None]).reshape(3, 96),
                               fake_quantize(w, params).numpy(), rtol=1e-6)


def test_an_unknown_kind(model):
    with pytest.raises(ValueError, match="kind must be one of FP32, int8, 4 bits, got 'int2'"):
        kernels.Stopwatch(model, "int2")
