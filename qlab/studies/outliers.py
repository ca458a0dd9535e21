"""Lesson 05's table: eight bits in a language model, as they come. ``python -m qlab.studies.outliers``.

``outliers.json``: how far SmolLM2 is from itself in float on 1,024 tokens of each of the three texts of
`qlab.evaluation`, some minutes on one core. But for PyTorch's kernels, weights stay in float; activations are quantized
at all four sites of each layer, by their own ranges.
"""

import torch

from qlab import outliers, smollm
from qlab.evaluation import LENGTH, TEXTS, Judge, texts
from qlab.studies.tables import Table

SEQUENCES = 4
PLACES = [(layer, site) for layer in range(30) for site in smollm.SITES]
CONTRASTS = [
    ("per group", "per token"), ("FP8 per tensor", "per tensor"), ("FP8 per tensor", "per token"),
    ("outliers in float", "per token"),
]


def in_two_parts(x, threshold=6):
    """Channels that reach the threshold in float, the others in 8 bits per token, from their own range: LLM.int8()."""
    rows = x.flatten(0, -2)
    in_float = (rows.abs() >= threshold).any(0)
    small = rows.masked_fill(in_float, 0)
    quantized = outliers.dynamic_quantizers("token", 8, places=["here"])["here"](small)
    return torch.where(in_float, rows, quantized).view(x.shape)


def main():
    torch.set_num_threads(1)  # sums in a fixed order
    model = smollm.load()
    judges = {text: Judge(model, tokens[:SEQUENCES]) for text, tokens in texts(model).items() if text in TEXTS[:3]}
    table = Table("outliers", judges, CONTRASTS, tokens=SEQUENCES * LENGTH,
                  perplexity={text: round(judge.perplexity, 1) for text, judge in judges.items()})
    table.add("PyTorch int8", smollm.torch_int8(model))
    for granularity in ("tensor", "token", "group"):
        table.add(f"per {granularity}", model, outliers.dynamic_quantizers(granularity, 8, places=PLACES))
    table.add("FP8 per tensor", model, dict.fromkeys(PLACES, lambda x: outliers.fp8(x)[0]))
    table.add("outliers in float", model, dict.fromkeys(PLACES, in_two_parts))


if __name__ == "__main__":
    main()
