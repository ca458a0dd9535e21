"""Make ``smollm2.npz``, ``outliers_*.npz`` and two more out of a real LLM: ``python -m qlab.studies.samples``.

The lessons only load the finished files.  The model is that of `qlab.smollm`, whose matrices were stored in 4 bits (a
scale and a real-valued offset for every 32 weights of a row).  One trap: quantizing weights to 4 bits in groups of 32
with a real-valued offset finds that same grid again and looks almost free of error.  An integer zero point, or another
group size, does not.

All arrays are float16 (use them as float32).  ``smollm2.npz`` belongs to decoder layer 5:

``activations``      (128, 576)  input of the MLP (gate, up) for English prose, row = token
``new_activations``  (64, 576)   the same place, while the model reads Python source code
``weights``          (192, 576)  the first rows of gate, a matrix that these inputs meet

Why this place: 99.4 % of the values lie within +-0.4, one channel (507) lives near 0.9, and three tokens push it to
1.76, so calibration methods disagree visibly.  Source code drives another channel (371) below all that the prose has
shown: the range drifts.  Other prose leaves it much less.

``outliers_<layer>_<site>.npz`` hold, for four places, ``x``: the activations of the first 64 tokens of the same prose,
position 0 included, and ``w``: rows of the matrix (attn_in: q) that they meet.  ``gains.npz`` holds the gains of the
norms in front of two of them.

``part_of_o.npz`` holds inputs of o in decoder layer 17, every third of the three heads that share their values, for
the texts of `qlab.evaluation`, ``x`` for the one to calibrate with; and ``w``, the first rows of the columns that they
meet.  Why these: they go up and down together, so that columns can make up for each other, and with few tokens whatever
is gained on them is lost on other texts.  Why not neighbours: 64 of them are two of the groups of 32 that were stored
on grids of their own, and rows of 4 bits find such a grid again.

The texts ship with Python and can change with its version; the saved files were made with Python 3.11.  The published
``smollm2.npz`` comes from an earlier, differently ordered forward pass: of 110,592 activations, 763 differ from what
this script makes now, by the last bit of a float16; so lessons 02 and 03 keep it, and only ``--all`` makes it anew.
"""

import colorsys
import hashlib
import inspect
import pydoc_data.topics
import sys

import numpy as np
import torch

from qlab import outliers, smollm
from qlab.evaluation import texts
from qlab.samples import FOLDER

PROSE = pydoc_data.topics.topics["objects"]
CODE = inspect.getsource(colorsys.hls_to_rgb)
PLACE, TOKENS, NEW_TOKENS, ROWS = (5, "mlp_in"), 128, 64, 192
OUTLIERS = {(12, "attn_in"): 192, (12, "o_in"): 192, (29, "mlp_in"): 192, (11, "down_in"): 64}  # place: rows of w
PART = slice(1, 192, 3)  # of the inputs of o in layer 17
PART_TEXTS = {"x": ("calibration", 8), "prose": ("prose", 2), "code": ("code", 2)}  # text, sequences of 256 tokens


def halves(tensor):
    return tensor.numpy().astype(np.float16)


def save(name, **arrays):
    path = FOLDER / name
    np.savez_compressed(path, **arrays)
    print(f"{name}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    for key, array in arrays.items():
        x = torch.from_numpy(array.astype(np.float32))
        print(f"  {key:16}{tuple(x.shape)!s:11} min {x.min():.3f} max {x.max():.3f} std {x.std():.3f} "
              f"kurtosis {outliers.kurtosis(x):.1f}")


def main():
    torch.set_num_threads(1)  # sums in a fixed order: the same bits on every run
    model = smollm.load()

    def sample(text, tokens):
        """Input of PLACE for tokens 1, 2, …: the first one is a special case in an LLM."""
        return halves(outliers.capture(model, model.encode(text)[:, :tokens + 1], [PLACE])[PLACE][1:])

    if "--all" in sys.argv:
        save("smollm2.npz", activations=sample(PROSE, TOKENS), new_activations=sample(CODE, NEW_TOKENS),
             weights=halves(model.blocks[PLACE[0]].gate.weight[:ROWS]))
    for (layer, site), (x, w) in outliers.products(model, model.encode(PROSE)[:, :64], OUTLIERS, outputs=192).items():
        save(f"outliers_{layer}_{site}.npz", x=halves(x), w=halves(w[:OUTLIERS[layer, site]]))
    save("gains.npz", **{f"{layer}_{site}": halves(getattr(model.blocks[layer], norm).weight)
                         for layer, site, norm in ((12, "attn_in", "attn_norm"), (29, "mlp_in", "mlp_norm"))})
    tokens = texts(model)
    part = {name: outliers.capture(model, tokens[text][:sequences], [(17, "o_in")])[17, "o_in"][:, PART]
            for name, (text, sequences) in PART_TEXTS.items()}
    save("part_of_o.npz", w=halves(model.blocks[17].o.weight[:192, PART]),
         **{name: halves(x) for name, x in part.items()})


if __name__ == "__main__":
    main()
