"""Lesson 07's table: rotations of a language model, over kinds and seeds. ``python -m qlab.studies.spinquant``.

For each seed, the command learns one rotation on the proxy and one end to end. It measures perplexities on evaluation
text, and writes ``spinquant.json`` and the first rotation of the proxy, ``spinquant_r1.safetensors``, beside the
samples: about forty minutes on two cores. The lesson loads both files and repeats rows.

Weights have 8 bits, one scale for each row; activations 4 bits, dynamic, one range for each token. That is where a
model of 135 million parameters shows what rotations do: at 8 bits per token little is lost to begin with.
"""

import json
import platform
import time
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from qlab import samples, smollm
from qlab.affine import check_integer
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

SEEDS = range(5)
SEQUENCES, LENGTH = 8, 512
WEIGHT_BITS, BITS = 8, 4
PER_SITE, STEPS = 1024, 200
END_TO_END_STEPS, END_TO_END_LENGTH = 60, 256
CHANNELS, HEAD_DIM = smollm.Sizes.hidden_size, smollm.Sizes.head_dim
METHODS = ("none", "Hadamard R1 R2", "Hadamard R1 R2 R4", "orthogonal R1 R2 R4", "learned R1, same R2 R4")
END_TO_END = "end to end R1 R2 R4"
_JSON = Path(samples.__file__).with_name("spinquant.json")
_ROTATION = Path(samples.__file__).with_name("spinquant_r1.safetensors")


def load():
    """The table as it is shipped: {"versions": …, "rows": [{"method", "seed", "perplexity"}, …], "cache": […], …}.

    Examples
    --------
    >>> sorted(load()["rows"][0])
    ['method', 'perplexity', 'seed']
    """
    return json.loads(_JSON.read_text())


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


def rotated(folded, method, seed, r1=None):
    """The model of `fold_gains`, rotated by one of ``METHODS`` but "none"; ``r1`` is that of the learned one."""
    if method.startswith("Hadamard"):
        r1 = random_hadamard(CHANNELS, seed)
    elif method.startswith("orthogonal"):
        r1 = random_orthogonal(CHANNELS, seed)
    make = random_orthogonal if method.startswith("orthogonal") else random_hadamard
    return rotate(folded, r1, make(HEAD_DIM, seed), r4=method.endswith("R4"))


def quantized_perplexity(model, tokens):
    """Of a rotated model, with its weights and activations quantized."""
    model = smollm.quantize_weights(model, WEIGHT_BITS, per_channel=True)
    places = [(layer, site) for layer in range(len(model.blocks)) for site in smollm.SITES]
    with smollm.inserted(model, online(model, dynamic_quantizers("token", BITS, places=places))):
        return smollm.perplexity(model, tokens)


def learn(inputs, seed):
    """The last step of learning R1 on `proxy_inputs`, from a random Hadamard matrix."""
    *_, last = learn_rotation(inputs, start=random_hadamard(CHANNELS, seed), steps=STEPS, seed=seed)
    return last


def main():
    model = smollm.load()
    calibration, evaluation = smollm.texts(model, SEQUENCES, LENGTH)
    folded = fold_gains(model)
    inputs = proxy_inputs(folded, calibration[:-2], per_site=PER_SITE)
    held_out = proxy_inputs(folded, calibration[-2:], per_site=PER_SITE)

    @lru_cache
    def learned(seed):
        start = time.perf_counter()
        step = learn(inputs, seed)
        seconds = round(time.perf_counter() - start)
        proxies = [round(proxy_loss(r, held_out).item(), 2)
                   for r in (random_hadamard(CHANNELS, seed), step.rotation)]
        return step, {"seed": seed, "seconds": seconds, "held_out_before": proxies[0], "held_out_after": proxies[1],
                      "orthogonality": step.orthogonality}

    rows = []
    for method, seed in tqdm([("none", 0), *product(METHODS[1:], SEEDS)]):
        r1 = learned(seed)[0].rotation if method.startswith("learned") else None
        version = model if method == "none" else rotated(folded, method, seed, r1)
        value = quantized_perplexity(version, evaluation)
        rows.append({"method": method, "seed": seed, "perplexity": round(value, 2)})
        tqdm.write(str(rows[-1]))
    end_to_end = []
    for seed in SEEDS:
        start, r1, r2 = (time.perf_counter(), random_hadamard(CHANNELS, seed),
                         random_hadamard(HEAD_DIM, seed))
        *_, last = learn_end_to_end(folded, calibration.reshape(-1, END_TO_END_LENGTH), r1=r1, r2=r2, bits=BITS,
                                    steps=END_TO_END_STEPS, seed=seed)
        end_to_end.append({"seed": seed, "steps": END_TO_END_STEPS, "seconds": round(time.perf_counter() - start)})
        value = quantized_perplexity(rotate(folded, last.rotation, last.r2, r4=True), evaluation)
        rows.append({"method": END_TO_END, "seed": seed, "perplexity": round(value, 2)})
        print(rows[-1], end_to_end[-1], flush=True)
    cache = []
    for bits in (4, 3):
        for r3 in (False, True):
            with smollm.inserted(model, kv_quantizers(model, bits, r3=r3)):
                cache.append({"bits": bits, "r3": r3, "perplexity": round(smollm.perplexity(model, evaluation), 2)})
    table = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "evaluation": [SEQUENCES, LENGTH], "weight_bits": WEIGHT_BITS, "activation_bits": BITS,
        "float32": round(smollm.perplexity(model, evaluation), 2), "steps": STEPS,
        "learning": [learned(seed)[1] for seed in SEEDS], "end_to_end": end_to_end, "rows": rows, "cache": cache,
    }
    _JSON.write_text(json.dumps(table, indent=0) + "\n")
    save_file({"r1": learned(0)[0].rotation.contiguous()}, _ROTATION)
    print(f"{len(rows)} rows written to {_JSON.name}")


if __name__ == "__main__":
    main()
