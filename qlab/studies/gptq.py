"""Lesson 08's table: weights of four bits, alone and with activations and KV cache. ``python -m qlab.studies.gptq``.

A `Judge` compares each model with the float model on 512 tokens of each of the three texts of `qlab.evaluation`;
`qlab.gptq` calibrates on 2,048 tokens of the fourth. What is found is written to ``gptq.json`` by
`qlab.studies.tables`: an hour of one core. The lesson reads the file and repeats a row.

Where nothing else is said, weights have one range for each row, zero-points, and GPTQ goes by falling H_jj with
weighted ranges; activations are dynamic, one range for each token; the cache has ranges for each token and head, its
keys rotated by R3. "Hadamard" and "learned" are R1, with a Hadamard R2 in each layer and R4, as in lesson 07: R1 is
learned on the proxy, which knows activations only, so that weights are float while it is learned, as in the paper.
"""

from dataclasses import replace

import torch

from qlab import outliers, smollm, smoothquant
from qlab.affine import fake_quantize
from qlab.evaluation import TEXTS, Judge, texts
from qlab.gptq import activation_aware, quantized
from qlab.outliers import dynamic_quantizers, params_of
from qlab.spinquant import fold_gains, kv_quantizers, online
from qlab.studies import spinquant
from qlab.studies.spinquant import PLACES
from qlab.studies.tables import Table

CALIBRATION, SEQUENCES = 8, 2
SEEDS = 5  # of random Hadamard matrices
BEST = {"act_order": True, "ranges": "weighted"}
CLIP = 0.9  # of the range of each token
ATTENTION = ("attn_in", "o_in")  # what q, k, v and o read
WEIGHTS, ALL, PIECES = "W4A16", "W4A4KV4", "pieces"  # how the names of methods begin
_OF_PARTS = {  # the one, the other: what the lesson says of the two
    WEIGHTS: (
        ("nearest, 64", "nearest"), ("nearest, 32", "nearest, 64"), ("nearest, MSE", "nearest"),
        ("nearest, weighted", "nearest"), ("GPTQ, plain", "nearest"), ("GPTQ, order", "GPTQ, plain"),
        ("GPTQ", "GPTQ, order"), ("GPTQ", "nearest"), ("GPTQ", "nearest, weighted"), ("AWQ", "nearest"),
        ("AWQ, 64", "nearest, 64"), ("GPTQ, 64", "GPTQ"), ("GPTQ, 64", "nearest, 64"), ("GPTQ, 64", "AWQ, 64"),
        ("AWQ, GPTQ, 64", "GPTQ, 64"), ("3 bits, 64, GPTQ", "3 bits, 64, nearest"),
        ("nearest, 64, weighted", "nearest, 64"), ("AWQ, 64, weighted", "nearest, 64, weighted"),
        ("GPTQ, 64", "nearest, 64, weighted"), ("GPTQ, 64", "AWQ, 64, weighted"),
        ("3 bits, 64, GPTQ", "3 bits, 64, nearest, weighted"),
        ("folded, nearest", "nearest"), ("Hadamard, nearest", "folded, nearest"), ("Hadamard, nearest", "nearest"),
        ("Hadamard, GPTQ", "GPTQ"), ("learned, GPTQ", "GPTQ"),
    ),
    ALL: (
        ("GPTQ", "nearest"), ("smoothed, GPTQ", "GPTQ"), ("Hadamard, nearest", "nearest"),
        ("Hadamard, GPTQ", "Hadamard, nearest"), ("Hadamard, GPTQ", "GPTQ"), ("Hadamard, GPTQ", "smoothed, GPTQ"),
        ("learned, GPTQ", "Hadamard, GPTQ"), ("learned, GPTQ", "nearest"),
        ("groups of 32, GPTQ", "learned, GPTQ"), ("groups of 32, GPTQ", "Hadamard, GPTQ"),
        ("learned, GPTQ, keys per channel", "learned, GPTQ"), ("learned, GPTQ, clipped", "learned, GPTQ"),
        ("learned, GPTQ, weights 64", "learned, GPTQ"), ("learned, GPTQ, symmetric", "learned, GPTQ"),
        ("groups of 32, GPTQ, weights 64", "learned, GPTQ, weights 64"),
        ("groups of 32, GPTQ, weights 64", "groups of 32, GPTQ"),
    ),
    PIECES: (("W4A8KV8", "W4A16KV16"), ("W4A4KV16", "W16A4KV16"), ("W16A4KV16", "W4A16KV16"),
             ("W4A16KV16", "W16A16KV4"), ("W16A4KV16", "W16A16KV4")),
}
CONTRASTS = [(f"{part} {one}", f"{part} {than}") for part, pairs in _OF_PARTS.items() for one, than in pairs]


def activations(bits=4, granularity="token", **options):
    return dynamic_quantizers(granularity, bits, places=PLACES, **options)


def clipped(x):
    """4 bits per token, in ``CLIP`` of the range."""
    rows = x.flatten(0, -2)
    params = params_of(rows, "token", 4)
    return fake_quantize(rows, replace(params, scale=CLIP * params.scale)).view_as(x)


def weights_only(table, model, text, made):
    """Rows of four-bit weights without a rotation; some models are made already."""

    def nearest(net, **options):
        return quantized(net, text, method="nearest", progress=False, **options)

    table.add(f"{WEIGHTS} nearest", made["nearest"])
    for size in (192, 64, 32):
        table.add(f"{WEIGHTS} nearest, {size}", nearest(model, group_size=size))
    table.add(f"{WEIGHTS} nearest, MSE", nearest(model, ranges="MSE"))
    table.add(f"{WEIGHTS} nearest, weighted", nearest(model, ranges="weighted"))
    table.add(f"{WEIGHTS} nearest, 64, weighted", nearest(model, group_size=64, ranges="weighted"))
    table.add(f"{WEIGHTS} GPTQ, plain", quantized(model, text, progress=False))
    table.add(f"{WEIGHTS} GPTQ, order", quantized(model, text, act_order=True, progress=False))
    table.add(f"{WEIGHTS} GPTQ", made["GPTQ"])
    table.add(f"{WEIGHTS} AWQ", nearest(activation_aware(model, text, progress=False)))
    scaled = activation_aware(model, text, group_size=64, progress=False)
    table.add(f"{WEIGHTS} AWQ, 64", nearest(scaled, group_size=64))
    table.add(f"{WEIGHTS} AWQ, 64, weighted", nearest(scaled, group_size=64, ranges="weighted"))
    table.add(f"{WEIGHTS} GPTQ, 64", made["GPTQ, 64"])
    table.add(f"{WEIGHTS} AWQ, GPTQ, 64", by_gptq(scaled, text, group_size=64))
    table.add(f"{WEIGHTS} 3 bits, 64, nearest", nearest(model, bits=3, group_size=64))
    table.add(f"{WEIGHTS} 3 bits, 64, nearest, weighted", nearest(model, bits=3, group_size=64, ranges="weighted"))
    table.add(f"{WEIGHTS} 3 bits, 64, GPTQ", by_gptq(model, text, bits=3, group_size=64))


def turned(folded, r1=None, seed=0):
    return spinquant.rotated(folded, spinquant.HADAMARD, seed, r1)


def by_gptq(model, text, **options):
    """GPTQ on what the layers read when R4, if there is one, runs beside the model."""
    with smollm.inserted(model, online(model)):
        return quantized(model, text, **BEST | {"progress": False} | options)


def main():
    torch.set_num_threads(1)  # sums in a fixed order
    model = smollm.load()
    tokens = texts(model)
    text = tokens["calibration"][:CALIBRATION]
    judges = {name: Judge(model, tokens[name][:SEQUENCES]) for name in TEXTS[:3]}
    table = Table("gptq", judges, CONTRASTS, tokens=SEQUENCES * 256, calibration=CALIBRATION * 256)
    fours = activations() | kv_quantizers(model, 4, r3=True)

    rounded = quantized(model, text, method="nearest", progress=False)
    table.add(f"{ALL} nearest", rounded, fours)
    plain = by_gptq(model, text)
    table.add(f"{ALL} GPTQ", plain, fours)
    smoothed = smoothquant.smooth(model, outliers.statistics(model, text), 0.7, sites=smoothquant.PAIRS)
    table.add(f"{ALL} smoothed, GPTQ", by_gptq(smoothed, text), fours)
    in_groups = by_gptq(model, text, group_size=64)
    weights_only(table, model, text, {"nearest": rounded, "GPTQ": plain, "GPTQ, 64": in_groups})

    folded = fold_gains(model)
    table.add(f"{WEIGHTS} folded, nearest", quantized(folded, text, method="nearest", progress=False))
    hadamard = turned(folded)
    rounded = quantized(hadamard, text, method="nearest", progress=False)
    table.add(f"{ALL} Hadamard, nearest", rounded, fours)
    table.add(f"{WEIGHTS} Hadamard, nearest", rounded)
    fine = by_gptq(hadamard, text)
    table.add(f"{ALL} Hadamard, GPTQ", fine, fours)
    table.add(f"{WEIGHTS} Hadamard, GPTQ", fine)
    for seed in range(1, SEEDS):
        table.add(f"{ALL} Hadamard, GPTQ", by_gptq(turned(folded, seed=seed), text), fours, seed)

    learned = turned(folded, spinquant.learned_rotation())
    fine = by_gptq(learned, text)
    table.add(f"{ALL} learned, GPTQ", fine, fours)
    table.add(f"{WEIGHTS} learned, GPTQ", fine)
    table.add(f"{PIECES} W16A16KV4", learned, kv_quantizers(model, 4, r3=True))
    table.add(f"{PIECES} W4A16KV16", fine)
    table.add(f"{PIECES} W4A8KV8", fine, activations(8) | kv_quantizers(model, 8, r3=True))
    table.add(f"{PIECES} W16A4KV16", learned, activations())
    table.add(f"{PIECES} W4A4KV16", fine, activations())
    table.add(f"{PIECES} W16A4KV4", learned, fours)
    table.add(f"{PIECES} W4A4KV4, attention", by_gptq(learned, text, sites=ATTENTION), fours)

    per_channel = activations() | kv_quantizers(model, 4, r3=True, keys="channel")
    table.add(f"{ALL} learned, GPTQ, keys per channel", fine, per_channel)
    table.add(f"{ALL} learned, GPTQ, clipped", fine, fours | dict.fromkeys(PLACES, clipped))
    table.add(f"{ALL} learned, GPTQ, weights 64", by_gptq(learned, text, group_size=64), fours)
    table.add(f"{ALL} learned, GPTQ, symmetric", by_gptq(learned, text, symmetric=True), fours)
    in_groups_of_32 = activations(granularity="group", group_size=32) | kv_quantizers(model, 4, r3=True)
    table.add(f"{ALL} groups of 32, GPTQ", plain, in_groups_of_32)
    table.add(f"{ALL} groups of 32, GPTQ, weights 64", in_groups, in_groups_of_32)


if __name__ == "__main__":
    main()
