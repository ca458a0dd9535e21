"""Lesson 09's table: block formats in a language model. ``python -m qlab.studies.blocks``.

The command puts each format in place of float32 and judges the model on three texts; `qlab.studies.tables` writes
``blocks.json``: about twenty minutes on one core. The lesson loads the file and repeats rows.

Of weights, all that the 30 blocks multiply with are stored; embedding and head stay in float32. Of activations, what
these weights read, at each call; of "both", both. "folded" has the gains of the norms in the weights; "rotated" is
that, and turned by random Hadamard matrices at all of R1, R2 and R4; "learned" has the R1 of lesson 07 in place of the
first. GPTQ calibrates on 2,048 tokens of the fourth text.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch

from qlab import blocks, smollm
from qlab.affine import absmax_params, fake_quantize, zero_point_params
from qlab.evaluation import LENGTH, TEXTS, Judge, texts
from qlab.floats import FP8_E4M3, FP16, decode, encode
from qlab.gptq import factor, hessians
from qlab.spinquant import fold_gains, online, random_hadamard, rotate
from qlab.studies.spinquant import learned_rotation
from qlab.studies.tables import Table

CALIBRATION, SEQUENCES = 8, 2
JUDGED = TEXTS[:3]
PLACES = list(product(range(30), smollm.SITES))


def through(fmt):
    """A function that stores an array in a block format and reads it again."""
    return lambda x: blocks.dequantize(blocks.quantize(x, fmt))


def in_groups(find, size, x):
    """Integers of 4 bits in groups along the last axis, as in lesson 02."""
    return fake_quantize(x, find(x, 4, axis=None, group_size=size))


def fp8_per_tensor(x):
    """E4M3 with one scale for all values: the largest magnitude becomes 448."""
    scale = np.abs(x).max() / np.float32(FP8_E4M3.max)
    return decode(encode(x / scale, FP8_E4M3), FP8_E4M3).astype(np.float32) * scale


def ternary(x):
    """−1, 0 and 1 times the mean magnitude of the matrix, as BitNet b1.58 rounds (Ma et al. 2024, equations 1 to 3)."""
    scale = np.abs(x).mean()
    return np.clip(np.rint(x / scale), -1, 1) * scale


WEIGHTS = {  # name: bits per value, function
    "MXFP4": (blocks.MXFP4.bits_per_value, through(blocks.MXFP4)),
    "NVFP4": (blocks.NVFP4.bits_per_value, through(blocks.NVFP4)),
    "NF4, 64": (4.25, through(replace(blocks.NF4, scale=FP16))),
    "int4 zero-point, 64": (4 + 20 / 64, partial(in_groups, zero_point_params, 64)),
    "int4 absmax, 32": (4.5, partial(in_groups, absmax_params, 32)),
    "Q4_0": (blocks.Q4_0.bits_per_value, through(blocks.Q4_0)),
    "ternary": (np.log2(3), ternary),
}
BY_GPTQ = {"MXFP4, GPTQ": blocks.MXFP4, "NVFP4, GPTQ": blocks.NVFP4}
ACTIVATIONS = {
    "int8, tensor": lambda x: fake_quantize(x, zero_point_params(x, 8)),
    "FP8, tensor": fp8_per_tensor,
    "int4, token": lambda x: fake_quantize(x, zero_point_params(x, 4, axis=-2)),
    "MXFP4": through(blocks.MXFP4),
    "NVFP4": through(blocks.NVFP4),
    "int4 zero-point, 32": partial(in_groups, zero_point_params, 32),
    "int4 absmax, 16": partial(in_groups, absmax_params, 16),
}
_MXFP8_CEIL = through(replace(blocks.MXFP8_E4M3, rule="ceil"))
BOTH = {  # name: functions of the weights, of the activations
    "FP8, tensor": (fp8_per_tensor, fp8_per_tensor),
    "MXFP8, floor": (through(blocks.MXFP8_E4M3), through(blocks.MXFP8_E4M3)),
    "MXFP8, ceil": (_MXFP8_CEIL, _MXFP8_CEIL),
    "MXFP6, MXFP8": (through(blocks.MXFP6_E2M3), _MXFP8_CEIL),
    "MXFP4, MXFP8": (through(blocks.MXFP4), _MXFP8_CEIL),
    "MXFP4": (through(blocks.MXFP4), through(blocks.MXFP4)),
    "NVFP4": (through(blocks.NVFP4), through(blocks.NVFP4)),
}
BITS = {  # per value; of "both", those of the weights
    **{name: bits for name, (bits, _) in WEIGHTS.items()},
    **{name: fmt.bits_per_value for name, fmt in BY_GPTQ.items()},
    "int8, tensor": 8, "FP8, tensor": 8, "int4, token": 4 + 20 / 576,  # a scale in FP16, a zero-point in 4 bits
    "int4 zero-point, 32": 4 + 20 / 32, "int4 absmax, 16": 4 + 16 / 16,
    **dict.fromkeys(("MXFP8, floor", "MXFP8, ceil"), blocks.MXFP8_E4M3.bits_per_value),
    "MXFP6, MXFP8": blocks.MXFP6_E2M3.bits_per_value, "MXFP4, MXFP8": blocks.MXFP4.bits_per_value,
}
CHIPS = {  # what their matrix units multiply, of 8 bits and fewer, as documented in November 2026
    "NVIDIA Ampere (A100), 2020": ("int8", "int4"),
    "NVIDIA Hopper (H100), 2022": ("int8", "FP8"),
    "NVIDIA Ada (L40S), 2023": ("int8", "int4", "FP8"),
    "NVIDIA Blackwell (B200), 2024": ("int8", "FP8", "MXFP8", "MXFP6", "MXFP4", "NVFP4"),
    "AMD CDNA 3 (MI300X), 2023": ("int8", "FP8 without −0"),
    "AMD CDNA 4 (MI355X), 2025": ("int8", "FP8", "MXFP8", "MXFP6", "MXFP4"),
    "Intel Xeon with AMX, 2023": ("int8",),
}
ROWS = (  # of the kind, the name and the place
    *product(["weights"], [*WEIGHTS, *BY_GPTQ], ["as it is"]), *product(["activations"], ACTIVATIONS, ["as it is"]),
    *product(["both"], BOTH, ["as it is"]),
    *product(["weights"], [*list(WEIGHTS)[:-1], *BY_GPTQ], ["rotated"]),
    *product(["activations"], list(ACTIVATIONS)[2:], ["rotated"]),
    *product(["weights", "activations"], ["NVFP4"], ["folded"]),
    ("activations", "int4, token", "learned"),
)
_PAIRS = (  # of names: the first divided by the second, at the same place
    ("weights", "NVFP4", "MXFP4"), ("weights", "NVFP4", "int4 absmax, 32"), ("weights", "NVFP4", "Q4_0"),
    ("weights", "NF4, 64", "MXFP4"), ("weights", "int4 zero-point, 64", "MXFP4"),
    ("weights", "int4 absmax, 32", "MXFP4"), ("weights", "Q4_0", "MXFP4"), ("weights", "NVFP4", "NF4, 64"),
    *product(["weights"], ["MXFP4, GPTQ"], ["MXFP4"]), *product(["weights"], ["NVFP4, GPTQ"], ["NVFP4", "MXFP4, GPTQ"]),
    ("activations", "FP8, tensor", "int8, tensor"),
    *product(["activations"], ["NVFP4"], ["MXFP4", "int4, token", "int4 zero-point, 32", "int4 absmax, 16"]),
    ("activations", "int4 zero-point, 32", "MXFP4"), ("activations", "int4 zero-point, 32", "int4, token"),
    ("both", "MXFP8, floor", "FP8, tensor"), ("both", "MXFP8, ceil", "FP8, tensor"),
    ("both", "MXFP8, ceil", "MXFP8, floor"), ("both", "MXFP6, MXFP8", "MXFP8, ceil"), ("both", "MXFP4, MXFP8", "MXFP4"),
    *product(["both"], ["NVFP4"], ["MXFP4", "MXFP4, MXFP8", "FP8, tensor"]),
)
CONTRASTS = [
    *((f"{kind}, {a}, {place}", f"{kind}, {b}, {place}") for kind, a, b in _PAIRS for place in ("as it is", "rotated")
      if {(kind, a, place), (kind, b, place)} <= {*ROWS}),
    *((f"{kind}, {name}, {place}", f"{kind}, {name}, as it is") for kind, name, place in ROWS if place != "as it is"),
    *((f"{kind}, NVFP4, rotated", f"{kind}, NVFP4, folded") for kind in ("weights", "activations")),
    *product(["activations, int4, token, learned"],
             ["activations, int4, token, rotated", "activations, NVFP4, as it is"]),
]


def stored(model, function):
    """A copy of the model with its blocks' weights as a function of arrays leaves them."""
    names = [name for place in smollm.places_of(model) for name in smollm.weight_names(*place)]
    weights = model.state_dict()
    return smollm.reweighted(model, {name: torch.from_numpy(function(weights[name].numpy())) for name in names},
                             "weights in blocks")


def compensated(w, h, fmt):
    """A matrix in a block format by GPTQ: each column is rounded, and those behind it make up for its error.

    The steps of a block are found when its first column comes up, by the format's rule, from its columns as corrected
    by then. The scale of the tensor is that of the matrix given: a block that has grown beyond its largest weight
    saturates.
    """
    upper, peak = factor(torch.from_numpy(h)).upper.numpy(), np.abs(w).max()
    now, w_hat = w.copy(), np.empty_like(w)
    for start in range(0, w.shape[1], fmt.block):
        stop = start + fmt.block
        inside = now[:, start:stop].clip(-peak, peak) if fmt.tensor_scale else now[:, start:stop]
        found = blocks.quantize(np.vstack([inside, np.full(fmt.block, peak)]), fmt)  # the last row: for its peak
        steps = np.maximum(found.scales[:-1, 0] * (found.tensor_scale or 1), np.finfo(np.float32).tiny)
        errors = np.empty_like(inside)
        for j in range(start, stop):
            elements = decode(encode(now[:, j] / steps, fmt.element, saturate=True), fmt.element)
            w_hat[:, j] = elements * steps
            errors[:, j - start] = error = (now[:, j] - w_hat[:, j]) / upper[j, j]
            now[:, j:stop] -= np.outer(error, upper[j, j:stop])
        now[:, stop:] -= errors @ upper[start:stop, stop:]
    return w_hat


def stored_by_gptq(model, tokens, fmt):
    """A copy of the model with its blocks' weights in a block format, calibrated on tokens of shape (N, T)."""
    old, weights = model.state_dict(), {}
    with smollm.inserted(model, online(model)):
        for layer in hessians(model, tokens):
            for place, (h, _) in layer.items():
                for name in smollm.weight_names(*place):
                    weights[name] = torch.from_numpy(compensated(old[name].numpy(), h.numpy(), fmt))
    return smollm.reweighted(model, weights, "weights in blocks")


def acting(function):
    """Functions for `qlab.smollm.inserted` that send what the weights read through a function of arrays."""
    return dict.fromkeys(PLACES, lambda x: torch.from_numpy(function(x.numpy())))


def placed(model, place):
    """The model as it is, with its gains folded, or on turned axes."""
    if place == "as it is":
        return model
    folded = fold_gains(model)
    r1 = learned_rotation() if place == "learned" else random_hadamard(576, 0)
    return folded if place == "folded" else rotate(folded, r1, random_hadamard(64, 0), r4=True)


def changed(net, kind, name, tokens):
    """The model that a row judges, and the functions that are inserted into it."""
    if name in BY_GPTQ:
        return stored_by_gptq(net, tokens, BY_GPTQ[name]), {}
    of_weights, of_activations = BOTH[name] if kind == "both" else (WEIGHTS.get(name, [None])[-1],
                                                                    ACTIVATIONS.get(name))
    return (net if kind == "activations" else stored(net, of_weights),
            {} if kind == "weights" else acting(of_activations))


def main():
    torch.set_num_threads(1)  # sums in a fixed order
    model = smollm.load()
    given = texts(model)
    judges = {text: Judge(model, given[text][:SEQUENCES]) for text in JUDGED}
    table = Table("blocks", judges, CONTRASTS, tokens=SEQUENCES * LENGTH)
    net, at = model, "as it is"
    for kind, name, place in ROWS:
        if place != at:
            net, at = placed(model, place), place
        table.add(f"{kind}, {name}, {place}", *changed(net, kind, name, given["calibration"][:CALIBRATION]))


if __name__ == "__main__":
    main()
