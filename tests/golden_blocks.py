"""What torchao, bitsandbytes and compressed-tensors make of the same tensors: ``golden_blocks.json``.

Made again in an environment of its own, with this project's requirements and torchao, bitsandbytes and
compressed-tensors (``--no-deps``; loguru beside): ``python -m tests.golden_blocks``. The file has the versions, a
digest of each library's codes and scales, and, where a library differs from `qlab.blocks`, the places and what it has
there.
"""

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from qlab import blocks
from qlab.floats import FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2, decode

FILE = Path(__file__).with_name("golden_blocks.json")
MX = (blocks.MXFP4, blocks.MXFP6_E2M3, blocks.MXFP6_E3M2, blocks.MXFP8_E4M3, blocks.MXFP8_E5M2)
RULES = ("floor", "ceil", "even")
LARGEST = float(np.finfo(np.float32).max)


def random_values(n=1_000_000, width=64):
    """Float32 numbers out of raw bits, whose stream no release of NumPy changes: 16 powers of two, both signs."""
    bits = np.random.PCG64(0).random_raw(n).astype(np.uint64)
    mantissa, sign = bits & np.uint64(0x7FFFFF), bits >> np.uint64(63)
    exponent = (bits >> np.uint64(23) & np.uint64(15)) + np.uint64(118)
    words = (sign << np.uint64(31) | exponent << np.uint64(23) | mantissa).astype(np.uint32)
    return words.view(np.float32).reshape(-1, width)


def around(levels):
    """Levels, midpoints and what is next to these, of both signs."""
    levels = np.unique(np.abs(np.float32(levels)))
    middles = (levels[1:] + levels[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(end)) for end in (0, np.inf)]
    some = np.concatenate([levels, middles, *beside])
    return np.concatenate([some, -some])


def anchored(values, largest, width=64):
    """Rows in which each run of 16 values has ``largest`` in it, so that it sets the scale."""
    runs = np.full((-(-values.size // 15), 16), np.float32(largest))
    runs[:, :15].flat[:values.size] = values
    runs = np.concatenate([runs, np.full((-len(runs) % (width // 16), 16), largest)])
    return runs.reshape(-1, width).astype(np.float32)


def edges():
    """All midpoints of each element at several scales; zeros, −0, subnormals, ±largest, one value repeated."""
    found = []
    for fmt in (FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2):
        levels = decode(np.arange(fmt.max_code + 1), fmt)
        found += [anchored(around(levels) * np.float32(2.0**k), fmt.max * 2.0**k) for k in (0, -3, 20)]
    for levels in (blocks.NF4.levels, np.arange(9), np.arange(16), np.arange(128)):
        found += [anchored(around(levels) * np.float32(s), np.max(levels) * s) for s in (1, 0.37)]
    repeated = [0.0, -0.0, 1.0, -1.75, 1.8, 7.0, -6.0, 0.3, 65504.0, 448.0, 2.0**-126, 2.0**-130, -1e-44, LARGEST,
                -LARGEST, 3.4e-39]
    found.append(np.repeat(np.float32(repeated)[:, None], 64, axis=1))
    small = np.zeros((3, 64), np.float32)
    small[0, ::3], small[1, 5], small[2, 1::2] = 1e-41, -1e-45, -0.0
    return np.concatenate([*found, small])


def finite_in_it(x):
    """Rows of which compressed-tensors makes no infinity."""
    return x[np.abs(x).max(axis=1) < LARGEST / 2]


def nvfp4_edges():
    """Midpoints of E2M1 under scales that E4M3 has; the scale of the tensor is 1."""
    one = anchored(around(decode(np.arange(8), FP4_E2M1)), 6)
    scales = np.float32([448, 1, 1.125, 0.40625, 2.0**-6, 3 * 2.0**-8, 2.0**-9, 2.0**-12, 0])
    return np.concatenate([one * s for s in scales])


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def differences(ours, theirs):
    """Flat places where two arrays differ in a bit, and what the second has there."""
    places = np.flatnonzero(ours.ravel().view(f"u{ours.itemsize}") != theirs.ravel().view(f"u{ours.itemsize}"))
    return {"places": places.tolist(), "theirs": theirs.ravel()[places].tolist()}


def torchao_mx(x, fmt, rule):
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    elements = dict(zip(MX, (torch.float4_e2m1fn_x2, DTYPE_FP6_E2M3, DTYPE_FP6_E3M2, torch.float8_e4m3fn,
                             torch.float8_e5m2), strict=True))
    scales, codes = to_mx(torch.from_numpy(x.copy()), elements[fmt], 32, ScaleCalculationMode[rule.upper()])
    codes, scales = codes.view(torch.uint8).numpy(), scales.view(torch.uint8).numpy()
    if fmt == blocks.MXFP4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    return codes.reshape(x.shape), scales


def torchao_nvfp4(x):
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    x = torch.from_numpy(x.copy())
    tensor_scale = per_tensor_amax_to_scale(x.abs().max())
    scales, codes = nvfp4_quantize(x, 16, tensor_scale)
    codes = codes.view(torch.uint8).numpy()
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(x.shape)
    return codes, scales.view(torch.uint8).numpy().reshape(len(x), -1), float(tensor_scale)


def bitsandbytes_nf4(x):
    import bitsandbytes
    import torch
    packed, state = bitsandbytes.functional.quantize_4bit(torch.from_numpy(x.copy()), blocksize=64, quant_type="nf4")
    values = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    packed = packed.numpy().ravel()
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(x.shape)
    return codes, state.absmax.numpy().reshape(len(x), 1), values


def compressed_tensors_mxfp4(x):
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams
    args = preset_name_to_scheme("MXFP4", ["Linear"]).weights
    x = torch.from_numpy(x.copy())
    runs = x.reshape(len(x), -1, 32)
    scale, zero_point = calculate_qparams(runs.amin(-1), runs.amax(-1), args)
    return fake_quantize(x, scale, zero_point, args).numpy(), scale.float().numpy()


def scale_codes(quantized):
    """As stored, one byte each."""
    return blocks._scale_bytes(quantized.scales, quantized.format).reshape(quantized.scales.shape)


def main():
    golden = {"versions": {name: version(name) for name in
                           ("torch", "torchao", "bitsandbytes", "compressed-tensors", "numpy")}}
    for name, x in {"random": random_values(), "edges": edges()}.items():
        for fmt in MX:
            for rule in RULES:
                ours = blocks.quantize(x, replace(fmt, rule=rule))
                codes, scales = torchao_mx(x, fmt, rule)
                golden[f"torchao {fmt.name} {rule} {name}"] = {
                    "codes": digest(codes), "scales": digest(scales), "other codes": differences(ours.codes, codes)}
        codes, scales, values = bitsandbytes_nf4(x)
        golden[f"bitsandbytes NF4 {name}"] = {
            "codes": digest(codes), "scales": digest(scales), "values": digest(values)}
        moderate = finite_in_it(x)
        values, scales = compressed_tensors_mxfp4(moderate)
        ours = blocks.quantize(moderate, replace(blocks.MXFP4, rule="even"))
        golden[f"compressed-tensors MXFP4 even {name}"] = {
            "values": digest(values), "scales": digest(scales),
            "other values": differences(blocks.dequantize(ours), values)}
    for name, x in {"random": random_values(), "edges": nvfp4_edges()}.items():
        ours = blocks.quantize(x, blocks.NVFP4)
        codes, scales, tensor_scale = torchao_nvfp4(x)
        golden[f"torchao NVFP4 {name}"] = {
            "codes": digest(codes), "scales": digest(scales), "tensor_scale": tensor_scale,
            "other codes": differences(ours.codes, codes), "other scales": differences(scale_codes(ours), scales)}
    FILE.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
