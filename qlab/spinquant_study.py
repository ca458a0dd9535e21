"""Lesson 07's table: rotations of a language model, over kinds and seeds. ``python -m qlab.spinquant_study`` makes it.

For each seed, the command learns one rotation on the proxy and one end to end. It measures perplexities on evaluation
text, and writes ``spinquant.json`` and the first rotation of the proxy, ``spinquant_r1.safetensors``, beside the
samples: about forty minutes on two cores. The lesson loads both files and repeats rows.

Weights have 8 bits, one scale for each row; activations 4 bits, dynamic, one range for each token. That is where a
model of 135 million parameters shows what rotations do: at 8 bits per token little is lost to begin with.
"""

import json
import platform
import time
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from qlab import samples, smollm
from qlab.outliers import dynamic_quantizers
from qlab.spinquant import (
    fold_gains,
    kv_quantizers,
    learn_end_to_end,
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
PLACES = [(layer, site) for layer in range(smollm.LAYERS) for site in smollm.SITES]
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


def rotated(folded, method, seed, r1=None):
    """The model of `fold_gains`, rotated by one of ``METHODS`` but "none"; ``r1`` is that of the learned one."""
    if method.startswith("Hadamard"):
        r1 = random_hadamard(smollm.CHANNELS, seed)
    elif method.startswith("orthogonal"):
        r1 = random_orthogonal(smollm.CHANNELS, seed)
    make = random_orthogonal if method.startswith("orthogonal") else random_hadamard
    return rotate(folded, r1, make(smollm.HEAD_CHANNELS, seed), r4=method.endswith("R4"))


def quantized_perplexity(model, tokens, bits=BITS):
    """Of a rotated model, with its weights and activations quantized."""
    model = smollm.quantize_weights(model, WEIGHT_BITS, per_channel=True)
    functions = dynamic_quantizers("token", bits, places=PLACES)
    with smollm.inserted(model, online(model, functions)):
        return smollm.perplexity(model, tokens)


def learn(inputs, seed):
    """The last step of learning R1 on `proxy_inputs`, from a random Hadamard matrix."""
    *_, last = learn_rotation(inputs, start=random_hadamard(smollm.CHANNELS, seed), steps=STEPS, seed=seed)
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
                   for r in (random_hadamard(smollm.CHANNELS, seed), step.rotation)]
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
        start, r1, r2 = (time.perf_counter(), random_hadamard(smollm.CHANNELS, seed),
                         random_hadamard(smollm.HEAD_CHANNELS, seed))
        *_, last = learn_end_to_end(folded, calibration.reshape(-1, END_TO_END_LENGTH), r1=r1, r2=r2, bits=BITS,
                                    steps=END_TO_END_STEPS, seed=seed)
        end_to_end.append({"seed": seed, "steps": END_TO_END_STEPS, "seconds": round(time.perf_counter() - start)})
        value = quantized_perplexity(rotate(folded, last.rotation, last.r2, r4=True), evaluation)
        rows.append({"method": END_TO_END, "seed": seed, "perplexity": round(value, 2)})
        print(rows[-1], end_to_end[-1], flush=True)
    cache = []
    for bits in (4, 3):
        for r3 in (False, True):
            with smollm.inserted(model, kv_quantizers(bits, r3=r3)):
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
