"""What the language model takes: seconds to open as a ratio, memory that a learner adds, speed against transformers."""

import json
import statistics
import subprocess
import sys
import time

import torch

from qlab import smollm

# Linux's own counts for this process; the peak is not getrusage's, which would include the parent's at the fork.
OPEN = """
import json, sys, time

def stage(name):
    rollup, status = (dict(line.split(":") for line in open(f"/proc/self/{file}").readlines()[skipped:])
                      for file, skipped in (("smaps_rollup", 1), ("status", 0)))
    kib = (rollup["Private_Dirty"], rollup["Pss"], status["VmHWM"])
    print(json.dumps([name, time.perf_counter() - begin, [1024 * int(text.split()[0]) for text in kib]]), flush=True)

begin = time.perf_counter()
stage("bare interpreter")
import torch
stage("import torch")
from qlab import smollm
stage("import qlab.smollm")
model = smollm.load(progress=False)
stage("load()")
"""
USE = """
from qlab.evaluation import texts
tokens = texts(model)["documentation"][:4]
stage("texts()")
smollm.perplexity(model, tokens)
stage("perplexity of 4 × 256 tokens")
"""
NAMES = {"attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
         "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
         "down": "mlp.down_proj"}


def learner(script=OPEN + USE):
    """A process that has gone through all stages and still holds the model, and the lines that it printed."""
    process = subprocess.Popen([sys.executable, "-c", script + "sys.stdin.read()"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    return process, [json.loads(process.stdout.readline()) for _ in range(script.count('\nstage("'))]


def leave(process):
    process.communicate("")


def memory():
    """For each stage of a learner's process: private, proportional and peak bytes, while another holds the model."""
    first, _ = learner(OPEN)
    second, stages = learner()
    leave(second)
    leave(first)
    return {name: counts for name, _, counts in stages}


def opening(repeats=5):
    """Median seconds of ``load()`` and of ``import torch`` in fresh processes; the file is in the system's cache."""
    loads, torches = [], []
    for _ in range(repeats):
        process, stages = learner(OPEN)
        leave(process)
        end = {name: seconds for name, seconds, _ in stages}
        loads.append(end["load()"] - end["import qlab.smollm"])
        torches.append(end["import torch"] - end["bare interpreter"])
    return statistics.median(loads), statistics.median(torches)


def transformers_model(model):
    """transformers' LLaMA on the same weights in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM  # four seconds, for those who need it

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            vocab_size=49152, rms_norm_eps=1e-5, rope_theta=100_000.0, max_position_embeddings=8192,
            tie_word_embeddings=True))
    state = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": model.head.weight,
             "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        state |= {f"model.layers.{i}.{theirs}.weight": getattr(block, ours).weight for ours, theirs in NAMES.items()}
    llama.load_state_dict(state, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config)  # its buffers are in no state_dict
    return llama.eval().requires_grad_(False)


@torch.inference_mode()
def forward(tokens=512, repeats=7):
    """Median seconds of one sequence through each, in turns."""
    model = smollm.load(progress=False)
    llama = transformers_model(model)
    x = torch.randint(smollm.Sizes.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    runs = {"ours": lambda: model(x), "transformers": lambda: llama(x, use_cache=False).logits}
    seconds = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if i:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def table():
    """Lines of text."""
    load, torches = opening()
    yield f"load(), model in the cache: {load / torches:.2f} of import torch ({1e3 * load:.0f} ms)"
    yield f"{'while another process holds it':30} {'private MB':>10} {'PSS MB':>8} {'peak MB':>8}"
    for name, counts in memory().items():
        private, proportional, peak = (count / 1e6 for count in counts)
        yield f"{name:30} {private:10.0f} {proportional:8.0f} {peak:8.0f}"
    for tokens in (1, 64, 512):
        seconds = forward(tokens)
        yield (f"forward of {tokens:>3} tokens: {seconds['transformers'] / seconds['ours']:.2f} of transformers' speed "
               f"(median {1e3 * seconds['ours']:.0f} ms)")
