"""Makes ``gptq_golden.npz``: asymmetric codes of one small layer by other libraries, for `tests.test_gptq`.

In an environment of its own, because they ask for other versions of what the lessons run on:

    pip install torch==2.13.0 gptqmodel==7.6.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0
    python -m tests.gptq_golden

(pip says that they contradict each other; installed one after the other without their dependencies, both run.) The
libraries are called at the function that quantizes one linear layer, on the CPU, with float32 weights. Left out is
where they do something else: symmetric scales, which both divide by 7.5; the groups of llmcompressor, whose ranges it
finds beforehand; those of gptqmodel with an order, which follow it. In gptqmodel a group inside a block of 128 columns
has its range from the weights as they were when the block began; so the block is as long as the group here.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

PATH = Path(__file__).with_name("gptq_golden.npz")
OUTPUTS, INPUTS, TOKENS, SILENT = 16, 48, 96, 7
BITS = 4


def layer():
    """Weights and inputs: channels of unequal size that meet, one that is silent."""
    generator = torch.Generator().manual_seed(8)
    mix = torch.eye(INPUTS) + 0.3 * torch.randn(INPUTS, INPUTS, generator=generator)
    sizes = torch.logspace(-1, 1, INPUTS)[torch.randperm(INPUTS, generator=generator)]
    w, x = torch.randn(OUTPUTS, INPUTS, generator=generator), torch.randn(TOKENS, INPUTS, generator=generator)
    w[:, SILENT] /= 10  # the libraries find ranges before they set that column to 0
    x = x @ mix * sizes
    x[:, SILENT] = 0
    return w, x


def of_gptqmodel(w, x, *, act_order, group_size):
    """Codes from 0 to 15, in the layer's own places."""
    from gptqmodel.quantization import QuantizeConfig  # noqa: PLC0415
    from gptqmodel.quantization.gptq import GPTQ  # noqa: PLC0415

    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = w.clone()
    task = GPTQ(linear, QuantizeConfig(bits=BITS, group_size=group_size or -1, sym=False, desc_act=act_order,
                                       act_group_aware=False, damp_percent=0.01))
    task.quantizer.configure(perchannel=True)
    task.fallback = None
    task.add_batch(x[None], linear(x[None]))
    w_hat, scale, zero, *_ = task.quantize(blocksize=group_size or 128)
    scale, zero = (t.repeat_interleave(group_size or INPUTS, 1) for t in (scale, zero))
    return codes_of(w_hat, scale, zero)


def of_llmcompressor(w, x, *, act_order):
    """Codes of rows, from 0 to 15."""
    from compressed_tensors.quantization import QuantizationArgs  # noqa: PLC0415
    from compressed_tensors.quantization.utils import calculate_qparams  # noqa: PLC0415
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # noqa: PLC0415

    args = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="channel",
                            actorder="weight" if act_order else None)
    scale, zero = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    h = 2 * x.T @ x / TOKENS
    w_hat, *_ = quantize_weight(w[None].clone(), h[None].clone(), scale[None], zero[None], None, args)
    return codes_of(w_hat[0], scale, zero)


def codes_of(w_hat, scale, zero):
    codes = w_hat / scale + zero
    assert (codes - codes.round()).abs().max() < 1e-3
    return codes.round().to(torch.int8)


def main():
    w, x = layer()
    arrays = {"w": w, "x": x}
    for act_order, group_size in ((False, 0), (True, 0), (False, 16)):
        arrays[f"gptqmodel {int(act_order)} {group_size}"] = of_gptqmodel(
            w, x, act_order=act_order, group_size=group_size)
    for act_order in (False, True):
        arrays[f"llmcompressor {int(act_order)} 0"] = of_llmcompressor(w, x, act_order=act_order) + 8
    np.savez_compressed(PATH, **{key: np.asarray(value.detach()) for key, value in arrays.items()})


if __name__ == "__main__":
    main()
