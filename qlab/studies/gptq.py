"""Lesson 08's table: weights of four bits, alone and with activations and KV cache. ``python -m qlab.studies.gptq``.

A `Judge` compares each model with the float model on 512 tokens of each of the three texts of `qlab.evaluation`;
`qlab.gptq` calibrates on 2,048 tokens of the fourth. What is found is written to ``gptq.json``, beside the samples,
after each row: an hour of one core. The lesson reads the file and repeats a row.

Where nothing else is said, weights have one range for each row, zero-points, and GPTQ goes by falling H_jj with
weighted ranges; activations are dynamic, one range for each token; the cache has ranges for each token and head, its
keys rotated by R3. "Hadamard" and "learned" are R1, with a Hadamard R2 in each layer and R4, as in lesson 07: R1 is
learned on the proxy, which knows activations only, so that weights are float while it is learned, as in the paper.
"""

import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qlab import outliers, samples, smollm, smoothquant
from qlab.affine import fake_quantize
from qlab.evaluation import TEXTS, Comparison, Contrast, Judge, texts
from qlab.gptq import activation_aware, quantized
from qlab.outliers import dynamic_quantizers, params_of
from qlab.spinquant import fold_gains, kv_quantizers, online, proxy_inputs
from qlab.studies import spinquant
from qlab.studies.spinquant import PLACES

CALIBRATION, SEQUENCES = 8, 2
SEEDS, LEARNED_SEEDS = 5, 3
BEST = {"act_order": True, "ranges": "weighted"}
CLIP = 0.9  # of the range of each token
WEIGHTS, ALL, PIECES = "W4A16", "W4A4KV4", "pieces"
CONTRASTS = {  # the one, the other: what the lesson says of the two
    WEIGHTS: (
        ("nearest, 64", "nearest"), ("nearest, 32", "nearest, 64"), ("nearest, MSE", "nearest"),
        ("nearest, weighted", "nearest"), ("GPTQ, plain", "nearest"), ("GPTQ, order", "GPTQ, plain"),
        ("GPTQ", "GPTQ, order"), ("GPTQ", "nearest"), ("GPTQ", "nearest, weighted"), ("GPTQ, 64", "GPTQ"),
        ("GPTQ, 64", "nearest, 64"), ("AWQ", "nearest"), ("AWQ, 64", "nearest, 64"), ("GPTQ, 64", "AWQ, 64"),
        ("AWQ, 64, weighted", "AWQ, 64"), ("nearest, 64, weighted", "nearest, 64"), ("AWQ, GPTQ, 64", "GPTQ, 64"),
        ("GPTQ, 64", "AWQ, 64, weighted"), ("AWQ, 64, weighted", "nearest, 64, weighted"),
        ("folded, nearest", "nearest"), ("Hadamard, nearest", "folded, nearest"), ("Hadamard, nearest", "nearest"),
        ("Hadamard, GPTQ", "GPTQ"), ("learned, GPTQ", "GPTQ"), ("3 bits, 64, GPTQ", "3 bits, 64, nearest"),
        ("GPTQ, half the text", "GPTQ"),
    ),
    ALL: (
        ("GPTQ", "nearest"), ("smoothed, GPTQ", "GPTQ"), ("Hadamard, nearest", "nearest"),
        ("Hadamard, GPTQ", "Hadamard, nearest"), ("Hadamard, GPTQ", "GPTQ"), ("Hadamard, GPTQ", "smoothed, GPTQ"),
        ("learned, GPTQ", "Hadamard, GPTQ"), ("learned, GPTQ", "nearest"),
        ("learned, GPTQ, symmetric", "learned, GPTQ"),
        ("learned, GPTQ, clipped", "learned, GPTQ"), ("learned, GPTQ, weights 64", "learned, GPTQ"),
        ("groups of 32, GPTQ", "learned, GPTQ"), ("groups of 32, GPTQ", "Hadamard, GPTQ"),
        ("groups of 32, GPTQ, weights 64", "learned, GPTQ, weights 64"),
        ("groups of 32, GPTQ, weights 64", "groups of 32, GPTQ"),
        ("learned, GPTQ, keys per channel", "learned, GPTQ"),
    ),
    PIECES: (("W4A8KV8", "W4A16KV16"), ("W4A4KV16", "W16A4KV16"), ("W16A4KV16", "W4A16KV16"),
             ("W4A16KV16", "W16A16KV4"), ("W16A4KV16", "W16A16KV4")),
}
_JSON = Path(samples.__file__).with_name("gptq.json")


def load():
    """The table as it is shipped: {"versions": …, "tokens": …, "rows": […], "contrasts": […]}.

    Examples
    --------
    >>> load()["rows"][0][:4]
    ['W4A4KV4', 'nearest', 0, 'prose']
    """
    return json.loads(_JSON.read_text(encoding="utf-8"))


def row(part, method, text):
    """What the table has of a method on one text: the mean over its seeds, and the hull of their intervals.

    Parameters
    ----------
    part, method : str
        As in ``CONTRASTS``.
    text : str, of `qlab.evaluation.TEXTS`

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If the table has no such row.

    Examples
    --------
    >>> row("W4A16", "GPTQ", "code").kl < row("W4A16", "nearest", "code").kl
    True
    """
    *numbers, agreement = _found("rows", [part, method], [text])
    return Comparison(*_hull(numbers), float(np.mean(agreement)))


def contrast(part, method, than, text):
    """One method of the table against another on one text, seed by seed, put together as by `row`.

    Returns
    -------
    Contrast

    Examples
    --------
    >>> contrast("W4A4KV4", "Hadamard, GPTQ", "Hadamard, nearest", "prose").resolved
    True
    """
    return Contrast(*_hull(_found("contrasts", [part, method], [than, text])))


def _found(kind, first, last):
    """Columns of numbers of all entries that begin so, have a seed, and go on so."""
    found = [entry[3 + len(last):] for entry in load()[kind] if entry[:2] == first and entry[3:3 + len(last)] == last]
    if not found:
        raise ValueError(f"the table must have {kind} of {', '.join(first + last)}, it has none")
    return zip(*found, strict=True)


def _hull(columns):
    return [float(of(column)) for of, column in zip((np.mean, min, max) * 2, columns, strict=True)]


class _Table:
    """Comparisons as they are found; what there is of them is written each time."""

    def __init__(self, judges):
        self._judges, self._found, self._rows, self._contrasts = judges, {}, [], []

    def add(self, part, method, model, functions=(), seed=0):
        """Judge a model on each text, and contrast it with those that came before."""
        with smollm.inserted(model, online(model, functions)):
            for text, judge in self._judges.items():
                self._found[part, method, seed, text] = found = judge.compare(model)
                print(f"{part:8} {method:30} {seed} {text:14} {found}", flush=True)
                self._rows.append([part, method, seed, text, *_numbers(found), round(found.agreement, 4)])
                for than in (than for one, than in CONTRASTS[part] if one == method):
                    other = self._found.get((part, than, seed, text)) or self._found[part, than, 0, text]
                    self._contrasts.append([part, method, seed, than, text, *_numbers(found.versus(other))])
        table = {"versions": {"python": platform.python_version(), "torch": torch.__version__},
                 "tokens": SEQUENCES * 256, "calibration": CALIBRATION * 256,
                 "rows": self._rows, "contrasts": self._contrasts}
        _JSON.write_text(json.dumps(table).replace("], [", "],\n[") + "\n", encoding="utf-8")


def _numbers(one):
    return [float(f"{x:.4g}") for x in (one.ratio, one.low, one.high, one.kl, one.kl_low, one.kl_high)]


def activations(bits=4, granularity="token", **options):
    return dynamic_quantizers(granularity, bits, places=PLACES, **options)


def clipped(x):
    """4 bits per token, in ``CLIP`` of the range."""
    rows = x.flatten(0, -2)
    params = params_of(rows, "token", 4)
    return fake_quantize(rows, replace(params, scale=CLIP * params.scale)).view_as(x)


def weights_only(table, model, text, rounded, by_gptq):
    """Rows of ``WEIGHTS`` that need no rotation but one; the model by GPTQ."""

    def nearest(net, **options):
        return quantized(net, text, method="nearest", progress=False, **options)

    table.add(WEIGHTS, "nearest", rounded)
    for size in (192, 64, 32):
        table.add(WEIGHTS, f"nearest, {size}", nearest(model, group_size=size))
    table.add(WEIGHTS, "nearest, MSE", nearest(model, ranges="MSE"))
    table.add(WEIGHTS, "nearest, weighted", nearest(model, ranges="weighted"))
    table.add(WEIGHTS, "GPTQ, plain", quantized(model, text, progress=False))
    table.add(WEIGHTS, "GPTQ, order", quantized(model, text, act_order=True, progress=False))
    table.add(WEIGHTS, "GPTQ", by_gptq)
    table.add(WEIGHTS, "AWQ", nearest(activation_aware(model, text, progress=False)))
    scaled = activation_aware(model, text, group_size=64, progress=False)
    table.add(WEIGHTS, "AWQ, 64", nearest(scaled, group_size=64))
    return scaled


def weights_further(table, model, text, scaled, in_groups):
    table.add(WEIGHTS, "GPTQ, 64", in_groups)
    options = {"method": "nearest", "group_size": 64, "progress": False}
    table.add(WEIGHTS, "nearest, 64, weighted", quantized(model, text, ranges="weighted", **options))
    table.add(WEIGHTS, "AWQ, 64, weighted", quantized(scaled, text, ranges="weighted", **options))
    table.add(WEIGHTS, "AWQ, GPTQ, 64", quantized(scaled, text, group_size=64, **BEST, progress=False))
    table.add(WEIGHTS, "3 bits, 64, nearest", quantized(model, text, 3, **options))
    table.add(WEIGHTS, "3 bits, 64, GPTQ", quantized(model, text, 3, group_size=64, **BEST, progress=False))
    table.add(WEIGHTS, "GPTQ, half the text", quantized(model, text[:len(text) // 2], **BEST, progress=False))


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
    table = _Table({name: Judge(model, tokens[name][:SEQUENCES]) for name in TEXTS[:3]})
    fours = activations() | kv_quantizers(model, 4, r3=True)
    in_groups_of_32 = activations(granularity="group", group_size=32) | kv_quantizers(model, 4, r3=True)

    rounded = quantized(model, text, method="nearest", progress=False)
    table.add(ALL, "nearest", rounded, fours)
    plain = by_gptq(model, text)
    table.add(ALL, "GPTQ", plain, fours)
    folded = fold_gains(model)
    found = outliers.statistics(model, text)
    smoothed = smoothquant.smooth(model, found, 0.7, sites=smoothquant.PAIRS)
    table.add(ALL, "smoothed, GPTQ", by_gptq(smoothed, text), fours)
    del smoothed
    hadamard = turned(folded)
    hadamard_rounded = quantized(hadamard, text, method="nearest", progress=False)
    table.add(ALL, "Hadamard, nearest", hadamard_rounded, fours)
    hadamard_fine = by_gptq(hadamard, text)
    table.add(ALL, "Hadamard, GPTQ", hadamard_fine, fours)
    learned = turned(folded, spinquant.learned_rotation())
    fine = by_gptq(learned, text)
    table.add(ALL, "learned, GPTQ", fine, fours)
    table.add(ALL, "groups of 32, GPTQ", plain, in_groups_of_32)

    table.add(PIECES, "W16A16KV4", learned, kv_quantizers(model, 4, r3=True))
    table.add(PIECES, "W4A16KV16", fine)
    table.add(PIECES, "W4A8KV8", fine, activations(8) | kv_quantizers(model, 8, r3=True))
    table.add(PIECES, "W16A4KV16", learned, activations())
    table.add(PIECES, "W4A4KV16", fine, activations())
    table.add(PIECES, "W16A4KV4", learned, fours)

    scaled = weights_only(table, model, text, rounded, plain)
    table.add(WEIGHTS, "folded, nearest", quantized(folded, text, method="nearest", progress=False))
    table.add(WEIGHTS, "Hadamard, nearest", hadamard_rounded)
    table.add(WEIGHTS, "Hadamard, GPTQ", hadamard_fine)
    table.add(WEIGHTS, "learned, GPTQ", fine)
    del hadamard, hadamard_rounded, hadamard_fine, rounded
    in_groups = by_gptq(model, text, group_size=64)
    weights_further(table, model, text, scaled, in_groups)
    del scaled

    for seed in range(1, SEEDS):
        table.add(ALL, "Hadamard, GPTQ", by_gptq(turned(folded, seed=seed), text), fours, seed)
    table.add(ALL, "learned, GPTQ, clipped", fine, fours | dict.fromkeys(PLACES, clipped))
    per_channel = activations() | kv_quantizers(model, 4, r3=True, keys="channel")
    table.add(ALL, "learned, GPTQ, keys per channel", fine, per_channel)
    table.add(ALL, "learned, GPTQ, symmetric", by_gptq(learned, text, symmetric=True), fours)
    table.add(ALL, "learned, GPTQ, weights 64", by_gptq(learned, text, group_size=64), fours)
    table.add(ALL, "groups of 32, GPTQ, weights 64", in_groups, in_groups_of_32)
    inputs = proxy_inputs(folded, tokens["calibration"][:8], per_site=spinquant.PER_SITE)
    for seed in range(1, LEARNED_SEEDS):
        r1 = spinquant.learn(inputs, seed).rotation
        table.add(ALL, "learned, GPTQ", by_gptq(turned(folded, r1, seed), text), fours, seed)


if __name__ == "__main__":
    main()
