"""Lesson 06's two files: ``python -m qlab.studies.smoothquant``, a quarter of an hour on two cores.

``smoothquant.json``: how far SmolLM2, quantized in several ways, is from itself in float, on 1,024 tokens of each of
the three texts of `qlab.evaluation`. Ranges from the first eight sequences of the calibration text (the lesson: four),
one scale for each row of the weights, and α = 0.7 where nothing else is said, which calibration text has chosen.

``smoothing.npz``: of the matrices at the places of `qlab.samples.products`, what decides their s and the reach of
their rows at each α, for `qlab.samples.largest_weights`.
"""

from functools import partial

import numpy as np
import torch

from qlab import outliers, samples, smollm, smoothquant
from qlab.evaluation import LENGTH, TEXTS, Judge, texts
from qlab.studies.tables import Table

ALPHA, ALPHAS = 0.7, [round(0.1 * i, 1) for i in range(11)]
CALIBRATION, SEQUENCES = 8, 4
PAPER, ALL = ("attn_in", "mlp_in"), tuple(smoothquant.PAIRS)
NO_DOWN = ("attn_in", "o_in", "mlp_in")
CONTRASTS = [  # the one, the other: what the lesson says of the two
    ("α 0.7", "none"), ("α 0.3", "none"), ("α 0.2", "none"), ("α 1.0", "α 0.5"), ("the paper's pairs", "none"),
    ("up and down", "none"), ("α 0.7", "up and down"), ("6 bits, smoothed", "6 bits, none"),
    ("O1, smoothed", "O1, none"), ("O2, smoothed", "O2, none"), ("O2, none, token 0 in float", "O2, none"),
    ("O2, smoothed, token 0 in float", "O2, smoothed"),
    ("O2, smoothed, token 0 in float", "O2, none, token 0 in float"), ("int8, smoothed", "int8"),
    ("int8, smoothed, down in float", "int8, smoothed"), ("int8, smoothed, one scale per matrix", "int8"),
]


def kinds(model, found):
    """Name, quantized model and functions to insert, of everything that is compared."""

    def static(alpha=ALPHA, smooth_at=ALL, level="O3", **quantized):
        net, ranges = model, found
        if alpha is not None:
            net = smoothquant.smooth(model, found, alpha, sites=smooth_at)
            ranges = smoothquant.smoothed_statistics(model, found, alpha, sites=smooth_at)
        return smoothquant.quantized(net, level, ranges, per_channel=True, **quantized)

    yield "none", *static(None)
    for alpha in ALPHAS:
        yield f"α {alpha}", *static(alpha)
    yield "the paper's pairs", *static(smooth_at=PAPER)
    yield "up and down", *static(smooth_at=["down_in"])
    for name, alpha in (("none", None), ("smoothed", ALPHA)):
        yield f"6 bits, {name}", *static(alpha, PAPER, bits=6, sites=NO_DOWN)
        for level in ("O1", "O2"):
            net, functions = static(alpha, level=level)
            yield f"{level}, {name}", net, functions
        yield f"O2, {name}, token 0 in float", net, {place: partial(but_the_first, f) for place, f in functions.items()}
    smoothed = smoothquant.smooth(model, found, ALPHA, sites=ALL)
    yield "int8", smollm.torch_int8(model, per_channel=True), {}
    yield "int8, smoothed", smollm.torch_int8(smoothed, per_channel=True), {}
    yield "int8, smoothed, down in float", smollm.torch_int8(smoothed, per_channel=True, in_float=["down"]), {}
    yield "int8, smoothed, one scale per matrix", smollm.torch_int8(smoothed), {}


def but_the_first(function, x):
    """``function`` of all tokens but the first, which stays as it is."""
    return torch.cat([x[:, :1], function(x[:, 1:])], dim=1)


def largest_weights(model, place, x):
    """Largest |W| of each column over all that read the place; of each row of the first, what can be its largest.

    log(|w| s) is linear in α. So only a few entries of a row, those of an upper envelope, can be its largest, be it
    with s, with 1 / s or as it is.
    """
    layer, site = place
    weights = [getattr(model.blocks[layer], name).weight.abs() for name in smollm.READERS[site]]
    columns, w = torch.cat(weights).amax(0), weights[0]
    reach = [w.argmax(1)]
    for alpha in np.linspace(0, 1, 41):
        s = smoothquant.smoothing_scales(torch.tensor(np.abs(x).max(0)), columns, alpha)
        reach += [(w * s).argmax(1), (w / s).argmax(1)]
    rows = [sorted(set(row)) for row in torch.stack(reach, 1).tolist()]
    at = np.array([row + row[:1] * (max(map(len, rows)) - len(row)) for row in rows])  # some twice, to be as long
    return {"columns": columns.numpy().astype(np.float16), "at": at.astype(np.int16),
            "values": np.take_along_axis(w.numpy(), at, axis=1).astype(np.float16)}


def main():
    torch.set_num_threads(1)  # sums in a fixed order
    model = smollm.load()
    np.savez_compressed(samples.FOLDER / "smoothing.npz", **{
        f"{layer}_{site}_{name}": array for (layer, site), (x, _) in samples.products().items()
        for name, array in largest_weights(model, (layer, site), x).items()})

    tokens = texts(model)
    found = outliers.statistics(model, tokens["calibration"][:CALIBRATION])
    judges = {text: Judge(model, tokens[text][:SEQUENCES]) for text in TEXTS[:3]}
    table = Table("smoothquant", judges, CONTRASTS, tokens=SEQUENCES * LENGTH)
    for method in kinds(model, found):
        table.add(*method)


if __name__ == "__main__":
    main()
