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
from qlab.spinquant import fold_gains, kv_quantizers, online
from qlab.studies import spinquant
from qlab.studies.spinquant import PLACES

CALIBRATION, SEQUENCES = 8, 2
SEEDS = 5  # of random Hadamard matrices
BEST = {"act_order": True, "ranges": "weighted"}
CLIP = 0.9  # of the range of each token
WEIGHTS, ALL, PIECES = "W4A16", "W4A4KV4", "pieces"
CONTRASTS = {  # the one, the other: what the lesson says of the two
    WEIGHTS: (
        ("nearest, 64", "nearest"), ("nearest, 32", "nearest, 64"), ("nearest, MSE", "nearest"),
        ("nearest, weighted", "nearest"), ("GPTQ, plain", "nearest"), ("GPTQ, order", "GPTQ, plain"),
        ("GPTQ", "GPTQ, order"), ("GPTQ", "nearest"), ("GPTQ", "nearest, weighted"), ("AWQ", "nearest"),
        ("AWQ, 64", "nearest, 64"), ("GPTQ, 64", "GPTQ"), ("GPTQ, 64", "nearest, 64"), ("GPTQ, 64", "AWQ, 64"),
        ("AWQ, GPTQ, 64", "GPTQ, 64"), ("3 bits, 64, GPTQ", "3 bits, 64, nearest"),
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
    hull = (of(column) for of, column in zip((np.mean, min, max) * 2, numbers, strict=True))
    return Comparison(*map(float, hull), float(np.mean(agreement)))


def contrast(part, method, than, text):
    """One method of the table against another on one text, with the first seed of both.

    Returns
    -------
    Contrast

    Examples
    --------
    >>> contrast("W4A4KV4", "Hadamard, GPTQ", "Hadamard, nearest", "prose").resolved
    True
    """
    return Contrast(*(column[0] for column in _found("contrasts", [part, method], [than, text])))


def _found(kind, first, last):
    """Columns of numbers of all entries that begin so, have a seed, and go on so."""
    found = [entry[3 + len(last):] for entry in load()[kind] if entry[:2] == first and entry[3:3 + len(last)] == last]
    if not found:
        raise ValueError(f"the table must have {kind} of {', '.join(first + last)}, it has none")
    return zip(*found, strict=True)


class _Table:
    """Comparisons as they are found; what there is of them is written each time."""

    def __init__(self, judges):
        self._judges, self._found, self._rows, self._contrasts = judges, {}, [], []

    def add(self, part, method, model, functions=(), seed=0):
        """Judge a model on each text; with the first seed, contrast it with those that came before."""
        with smollm.inserted(model, online(model, functions)):
            for text, judge in self._judges.items():
                found = judge.compare(model)
                print(f"{part:8} {method:30} {seed} {text:14} {found}", flush=True)
                self._rows.append([part, method, seed, text, *_numbers(found), round(found.agreement, 4)])
                if seed == 0:
                    self._found[part, method, text] = found
                    self._contrasts += [[part, method, 0, than, text, *_numbers(
                        found.versus(self._found[part, than, text]))] for one, than in CONTRASTS[part] if one == method]
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


def weights_only(table, model, text, made):
    """Rows of ``WEIGHTS`` without a rotation; some models are made already."""

    def nearest(net, **options):
        return quantized(net, text, method="nearest", progress=False, **options)

    table.add(WEIGHTS, "nearest", made["nearest"])
    for size in (192, 64, 32):
        table.add(WEIGHTS, f"nearest, {size}", nearest(model, group_size=size))
    table.add(WEIGHTS, "nearest, MSE", nearest(model, ranges="MSE"))
    table.add(WEIGHTS, "nearest, weighted", nearest(model, ranges="weighted"))
    table.add(WEIGHTS, "GPTQ, plain", quantized(model, text, progress=False))
    table.add(WEIGHTS, "GPTQ, order", quantized(model, text, act_order=True, progress=False))
    table.add(WEIGHTS, "GPTQ", made["GPTQ"])
    table.add(WEIGHTS, "AWQ", nearest(activation_aware(model, text, progress=False)))
    scaled = activation_aware(model, text, group_size=64, progress=False)
    table.add(WEIGHTS, "AWQ, 64", nearest(scaled, group_size=64))
    table.add(WEIGHTS, "GPTQ, 64", made["GPTQ, 64"])
    table.add(WEIGHTS, "AWQ, GPTQ, 64", by_gptq(scaled, text, group_size=64))
    table.add(WEIGHTS, "3 bits, 64, nearest", nearest(model, bits=3, group_size=64))
    table.add(WEIGHTS, "3 bits, 64, GPTQ", by_gptq(model, text, bits=3, group_size=64))


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

    rounded = quantized(model, text, method="nearest", progress=False)
    table.add(ALL, "nearest", rounded, fours)
    plain = by_gptq(model, text)
    table.add(ALL, "GPTQ", plain, fours)
    smoothed = smoothquant.smooth(model, outliers.statistics(model, text), 0.7, sites=smoothquant.PAIRS)
    table.add(ALL, "smoothed, GPTQ", by_gptq(smoothed, text), fours)
    in_groups = by_gptq(model, text, group_size=64)
    weights_only(table, model, text, {"nearest": rounded, "GPTQ": plain, "GPTQ, 64": in_groups})

    folded = fold_gains(model)
    table.add(WEIGHTS, "folded, nearest", quantized(folded, text, method="nearest", progress=False))
    hadamard = turned(folded)
    rounded = quantized(hadamard, text, method="nearest", progress=False)
    table.add(ALL, "Hadamard, nearest", rounded, fours)
    table.add(WEIGHTS, "Hadamard, nearest", rounded)
    fine = by_gptq(hadamard, text)
    table.add(ALL, "Hadamard, GPTQ", fine, fours)
    table.add(WEIGHTS, "Hadamard, GPTQ", fine)
    for seed in range(1, SEEDS):
        table.add(ALL, "Hadamard, GPTQ", by_gptq(turned(folded, seed=seed), text), fours, seed)

    learned = turned(folded, spinquant.learned_rotation())
    fine = by_gptq(learned, text)
    table.add(ALL, "learned, GPTQ", fine, fours)
    table.add(WEIGHTS, "learned, GPTQ", fine)
    table.add(PIECES, "W16A16KV4", learned, kv_quantizers(model, 4, r3=True))
    table.add(PIECES, "W4A16KV16", fine)
    table.add(PIECES, "W4A8KV8", fine, activations(8) | kv_quantizers(model, 8, r3=True))
    table.add(PIECES, "W16A4KV16", learned, activations())
    table.add(PIECES, "W4A4KV16", fine, activations())
    table.add(PIECES, "W16A4KV4", learned, fours)

    per_channel = activations() | kv_quantizers(model, 4, r3=True, keys="channel")
    table.add(ALL, "learned, GPTQ, keys per channel", fine, per_channel)
    table.add(ALL, "learned, GPTQ, clipped", fine, fours | dict.fromkeys(PLACES, clipped))
    table.add(ALL, "learned, GPTQ, weights 64", by_gptq(learned, text, group_size=64), fours)
    table.add(ALL, "learned, GPTQ, symmetric", by_gptq(learned, text, symmetric=True), fours)
    in_groups_of_32 = activations(granularity="group", group_size=32) | kv_quantizers(model, 4, r3=True)
    table.add(ALL, "groups of 32, GPTQ", plain, in_groups_of_32)
    table.add(ALL, "groups of 32, GPTQ, weights 64", in_groups, in_groups_of_32)


if __name__ == "__main__":
    main()
