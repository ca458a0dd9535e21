"""Lesson 07's table: rotations of a language model, over kinds, seeds and texts. ``python -m qlab.studies.spinquant``.

For each seed, the command learns a rotation on the proxy, and for some of them another one end to end. A `Judge`
compares what comes of them, and of methods that do without rotations, with the float model on the three texts of
`qlab.evaluation`. It writes ``spinquant.json`` and the first rotation of the proxy, ``spinquant_r1.safetensors``,
beside the samples. The lesson loads both files and repeats some rows.

It judges on 16,896 tokens, with five seeds of the two rotations that the lesson compares, the first three of the
others, and one that is learned end to end: more than an hour of one core.

Activations: weights have 8 bits, one scale for each row; activations 4 bits, dynamic, one range for each token. That is
where a model of 135 million parameters shows what rotations do: at 8 bits per token little is lost to begin with.
Weights: 4 bits, one scale for each row, rounded to nearest, and activations in float. Cache: keys and values alone.
"""

import argparse
import time
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from qlab import evaluation, outliers, samples, smollm, smoothquant
from qlab.affine import check_integer
from qlab.evaluation import Judge
from qlab.outliers import dynamic_quantizers
from qlab.smollm import check_tokens
from qlab.spinquant import (
    check_folded,
    descend,
    fold_gains,
    kv_quantizers,
    learn_rotation,
    online,
    proxy_inputs,
    proxy_loss,
    random_hadamard,
    random_orthogonal,
    rotate,
)
from qlab.studies.tables import Table

ACTIVATIONS, WEIGHTS, CACHE_4, CACHE_3 = "activations", "weights", "cache, 4 bits", "cache, 3 bits"
HADAMARD, LEARNED, END_TO_END = "Hadamard R1 R2 R4", "learned R1, same R2 R4", "end to end R1 R2 R4"
METHODS = {
    ACTIVATIONS: ("no rotation", "smoothed", "groups of 32", "Hadamard R1 R2", HADAMARD, "orthogonal R1 R2 R4",
                  LEARNED),
    WEIGHTS: ("as loaded", "gains folded", HADAMARD, LEARNED),
    CACHE_4: ("per token", "R3", "keys per channel"), CACHE_3: ("per token", "R3", "keys per channel"),
}
CONTRASTS = [(f"{part}: {one}", f"{part}: {than}") for part, one, than in (
    (ACTIVATIONS, HADAMARD, "smoothed"), (ACTIVATIONS, HADAMARD, "Hadamard R1 R2"),
    (ACTIVATIONS, "orthogonal R1 R2 R4", HADAMARD), (ACTIVATIONS, LEARNED, HADAMARD),
    (ACTIVATIONS, END_TO_END, HADAMARD), (ACTIVATIONS, END_TO_END, LEARNED),
    (ACTIVATIONS, HADAMARD, "groups of 32"), (ACTIVATIONS, LEARNED, "groups of 32"),
    (WEIGHTS, "gains folded", "as loaded"), (WEIGHTS, HADAMARD, "as loaded"), (WEIGHTS, HADAMARD, "gains folded"),
    (WEIGHTS, LEARNED, HADAMARD), (WEIGHTS, LEARNED, "as loaded"),
    *((part, *pair) for part in (CACHE_4, CACHE_3)
      for pair in (("R3", "per token"), ("keys per channel", "R3"))),
)]
FEWER_SEEDS = 3  # of rotations that are not contrasted with the learned one
WEIGHT_BITS, BITS = 8, 4
PER_SITE, STEPS = 1024, 200
END_TO_END_STEPS = 60
CHANNELS, HEAD_DIM, LAYERS = smollm.Sizes.hidden_size, smollm.Sizes.head_dim, smollm.Sizes.num_hidden_layers
PLACES = tuple(product(range(LAYERS), smollm.SITES))
_TO_LEARN, _HELD_OUT = slice(8), slice(8, 10)  # sequences of the calibration text
_ROTATION = samples.FOLDER / "spinquant_r1.safetensors"


def learned_rotation():
    """R1 as it was learned from ``random_hadamard(576, seed=0)``: float32 of shape (576, 576).

    Examples
    --------
    >>> learned_rotation().shape
    torch.Size([576, 576])
    """
    return load_file(_ROTATION)["r1"]


def learn_end_to_end(model, tokens, *, r1, r2, bits=4, steps=60, lr=1.5, batch_size=2, seed=0):
    """Learn R1 and the R2 of each layer by `CayleySGD` on what SpinQuant minimizes: the quantized network's own loss.

    The loss is the mean cross-entropy of the next token, with what the linear layers of the blocks read quantized per
    token and R4 in front of ``down``; weights stay in float. The gradient passes rounding straight through, and flows
    through the scale of each token into its largest and least value. (In the published code, scales are constants.)
    ``lr`` falls to 0 along half a cosine. A step on 2 × 256 tokens takes about 4 s on two cores.

    Parameters
    ----------
    model : SmolLM
        From `fold_gains`. Its weights take no part in the learning.
    tokens : int64 tensor, shape (N, T)
    r1, r2 : float tensors, as `rotate`
        Where to start.
    bits : int, 2 to 16
    steps : int, ≥ 1
    lr : float, > 0
    batch_size : int, ≥ 1
        Sequences drawn for each step; all if there are fewer.
    seed : int

    Returns
    -------
    iterator of RotationStep
        As `learn_rotation`; with ``r2``, the step size of R1, and the largest deviation of any matrix from orthogonal.

    Raises
    ------
    ValueError
        If the model's gains are not folded or it was changed since, or an argument is out of range.

    References
    ----------
    Liu et al. 2025, "SpinQuant: LLM quantization with learned rotations", section 3.2, equation 2.
    """
    check_folded(model)
    check_tokens(model, tokens)
    batch_size, layers, head_dim = check_integer(batch_size, "batch_size", 1), len(model.blocks), model.sizes.head_dim
    rotate(model, r1, r2)  # refuses what is no rotation
    r1, *r2 = (nn.Parameter(r.detach().to(model.embedding.weight, copy=True))
               for r in (r1, *r2.expand(layers, -1, -1)))
    quantizer = dynamic_quantizers("token", bits, places=["any"])["any"]

    def residual(x):
        return quantizer(x @ r1) @ r1.T  # back again, so that the weights need not be rotated in every step

    def values(r, x):
        turned = quantizer((x.unflatten(-1, (-1, head_dim)) @ r).flatten(-2))
        return (turned.unflatten(-1, (-1, head_dim)) @ r.T).flatten(-2)

    network = rotate(model, torch.eye(len(r1)), r4=True)
    functions = {(i, site): residual for i in range(layers) for site in ("attn_in", "mlp_in")}
    functions |= {(i, "o_in"): partial(values, r) for i, r in enumerate(r2)}
    functions = online(network, functions | {(i, "down_in"): quantizer for i in range(layers)})
    chance = torch.Generator().manual_seed(check_integer(seed, "seed", 0))

    def loss():
        batch = tokens[torch.randperm(len(tokens), generator=chance)[:batch_size]]
        with smollm.inserted(network, functions):
            logits = network.head(network.hidden(batch)[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return descend(loss, [r1, *r2], steps=steps, lr=lr, seed=seed)


def r2_of(make, seed):
    """A rotation for the heads of each layer, (30, 64, 64): the paper has one for each layer, too."""
    return torch.stack([make(HEAD_DIM, LAYERS * seed + layer) for layer in range(LAYERS)])


def rotated(folded, method, seed, r1=None):
    """The model of `fold_gains`, rotated by one of ``METHODS`` that are rotations; ``r1`` is that of a learned one."""
    make = random_orthogonal if method.startswith("orthogonal") else random_hadamard
    return rotate(folded, make(CHANNELS, seed) if r1 is None else r1, r2_of(make, seed), r4=method.endswith("R4"))


def learn(inputs, seed):
    """The last step of learning R1 on `proxy_inputs`, from a random Hadamard matrix."""
    *_, last = learn_rotation(inputs, start=random_hadamard(CHANNELS, seed), steps=STEPS, seed=seed)
    return last


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=22, help="of 256 tokens, of each of three texts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--end-to-end", type=int, default=1, help="of so many seeds, learn one rotation end to end")
    run = vars(parser.parse_args())
    model = smollm.load()
    texts = evaluation.texts(model)
    calibration = texts.pop("calibration")
    judges = {text: Judge(model, tokens[:run["sequences"]]) for text, tokens in texts.items()}
    learning, end_to_end = [], []
    table = Table("spinquant", judges, CONTRASTS, run=run | {"length": evaluation.LENGTH}, weight_bits=WEIGHT_BITS,
                  activation_bits=BITS, steps=STEPS, learning=learning, end_to_end=end_to_end)
    per_token = dynamic_quantizers("token", BITS, places=PLACES)

    def add_weights(method, net, seed=0):
        table.add(f"{WEIGHTS}: {method}", smollm.quantize_weights(net, 4, per_channel=True), seed=seed)

    def add_activations(method, net, seed=0, functions=per_token):
        net = smollm.quantize_weights(net, WEIGHT_BITS, per_channel=True)
        table.add(f"{ACTIVATIONS}: {method}", net, functions, seed)

    for part, bits in ((CACHE_4, 4), (CACHE_3, 3)):
        for method, options in zip(METHODS[part], ({}, {"r3": True}, {"keys": "channel"}), strict=True):
            table.add(f"{part}: {method}", model, kv_quantizers(model, bits, **options))
    folded = fold_gains(model)
    add_weights("as loaded", model)
    add_weights("gains folded", folded)
    add_activations("no rotation", model)
    in_groups = dynamic_quantizers("group", BITS, places=PLACES, group_size=32)
    add_activations("groups of 32", model, functions=in_groups)
    found = outliers.statistics(model, calibration[:4])
    add_activations("smoothed", smoothquant.smooth(model, found, 0.7, sites=smoothquant.PAIRS))

    inputs, held_out = (proxy_inputs(folded, calibration[part], per_site=PER_SITE) for part in (_TO_LEARN, _HELD_OUT))
    for seed in range(run["seeds"]):
        start = time.perf_counter()
        r1 = learn(inputs, seed).rotation
        learning.append({"seed": seed, "seconds": round(time.perf_counter() - start)} | {
            name: round(proxy_loss(r, held_out).item(), 2)
            for name, r in (("held_out_before", random_hadamard(CHANNELS, seed)), ("held_out_after", r1))})
        if seed == 0:
            save_file({"r1": r1.contiguous()}, _ROTATION)
        for method in METHODS[ACTIVATIONS][3:] if seed < FEWER_SEEDS else (HADAMARD, LEARNED):
            turned = rotated(folded, method, seed, r1 if method == LEARNED else None)
            add_activations(method, turned, seed)
            if method in METHODS[WEIGHTS]:
                add_weights(method, turned, seed)
            del turned  # half a gigabyte

    for seed in range(run["end_to_end"]):
        start = time.perf_counter()
        *_, last = learn_end_to_end(folded, calibration[_TO_LEARN], r1=random_hadamard(CHANNELS, seed),
                                    r2=r2_of(random_hadamard, seed), bits=BITS, steps=END_TO_END_STEPS, seed=seed)
        end_to_end.append({"seed": seed, "steps": END_TO_END_STEPS, "seconds": round(time.perf_counter() - start)})
        add_activations(END_TO_END, rotate(folded, last.rotation, last.r2, r4=True), seed)


if __name__ == "__main__":
    main()
