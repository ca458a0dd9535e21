"""A real language model, SmolLM2-135M-Instruct, as a plain LLaMA that can be read from top to bottom.

`load` finds the converted model in a cache folder, or fetches it once (93 MB; `qlab.fetching`). ``python -m
qlab.smollm`` does the same beforehand, for a classroom without a network.
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

from qlab.affine import absmax_params, check_bits, check_integer, described, fake_quantize, real_array
from qlab.fetching import cache_folder, converted_model

SITES = ("attn_in", "o_in", "mlp_in", "down_in")
"""Where a layer's activations meet weights: the input of q, k and v; of o; of gate and up; of down."""
READERS = {"attn_in": ("q", "k", "v"), "o_in": ("o",), "mlp_in": ("gate", "up"), "down_in": ("down",)}
"""The linear layers that read each site."""
CACHE_SITES = ("queries", "keys", "values")
"""Inside the attention, after the rotary embedding: what meets, and what a KV cache stores."""

_ENDS = ("<|im_end|>", "<|endoftext|>")  # what the model says when it has finished its turn, or its text
_HEAD_POSITIONS = 128  # logits of so many tokens at a time: 25 MB


@dataclass(frozen=True)
class Sizes:
    """How large a `SmolLM` is, under the names of Hugging Face's configurations; by default, that of the real one.

    Raises
    ------
    ValueError
        If a number is out of range, the heads of keys do not divide those of queries, or ``head_dim`` is odd.

    Examples
    --------
    >>> model = SmolLM(Sizes(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    """

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100_000.0

    def __post_init__(self):
        for name, value in list(vars(self).items())[:7]:
            check_integer(value, name, 1)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads and head_dim be even, got "
                             f"{self.num_attention_heads}, {self.num_key_value_heads} and {self.head_dim}")
        floats = self.rms_norm_eps, self.rope_theta
        if not all(isinstance(value, (int, float)) and 0 < value < float("inf") for value in floats):
            raise ValueError(f"rms_norm_eps and rope_theta must be greater than 0, got {self.rms_norm_eps!r} and "
                             f"{self.rope_theta!r}")


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight: the length of every token set to the same, then a gain for each channel.

    References
    ----------
    Zhang and Sennrich 2019, "Root mean square layer normalization", equation 4.
    """

    def __init__(self, channels, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x):
        x32 = wide(x)  # squares of float16 overflow from 256 on
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Block(nn.Module):
    """One layer: attention, then a gated MLP, each added to the residual stream.

    ``attn_in``, ``o_in``, ``mlp_in``, ``down_in``, ``queries``, ``keys`` and ``values`` do nothing: they are places
    where a hook can look, or another module can stand (see `inserted`).

    References
    ----------
    Touvron et al. 2023, "LLaMA", section 2.2; Ainslie et al. 2023, "GQA" (three queries share one key and value);
    Shazeer 2020, "GLU variants improve Transformer" (SwiGLU).
    """

    def __init__(self, sizes):
        super().__init__()
        channels, hidden, self.head_dim = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
        queries, keys = sizes.num_attention_heads * self.head_dim, sizes.num_key_value_heads * self.head_dim
        self.attn_norm = RMSNorm(channels, sizes.rms_norm_eps)
        self.q = nn.Linear(channels, queries, bias=False)
        self.k = nn.Linear(channels, keys, bias=False)
        self.v = nn.Linear(channels, keys, bias=False)
        self.o = nn.Linear(queries, channels, bias=False)
        self.mlp_norm = RMSNorm(channels, sizes.rms_norm_eps)
        self.gate = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(channels, hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)
        for site in SITES + CACHE_SITES:
            setattr(self, site, nn.Identity())

    def forward(self, x, rotation, cache=None):
        """Map the residual stream (N, T, channels) to the next; ``cache`` is a dict that keeps keys and values."""
        x = x + self.o(self.o_in(self.attention(self.attn_in(self.attn_norm(x)), rotation, cache)))
        h = self.mlp_in(self.mlp_norm(x))
        return x + self.down(self.down_in(F.silu(self.gate(h)) * self.up(h)))

    def attention(self, h, rotation, cache):
        q, k, v = (linear(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k, v = self.queries(_rotate(q, rotation)), self.keys(_rotate(k, rotation)), self.values(v)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
            cache.update(k=k, v=v)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        past = k.shape[2] - q.shape[2]  # all of which the new tokens may look at
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past) if past else None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not past).transpose(1, 2).flatten(2)


class SmolLM(nn.Module):
    """The model: 134,515,008 parameters, of which 28 million are the embedding, used for the logits too.

    Parameters
    ----------
    sizes : Sizes
        Smaller ones make a model with random weights that is quick to try things on.

    Attributes
    ----------
    sizes : Sizes
    embedding : nn.Embedding
    blocks : nn.ModuleList of 30 `Block`
    norm : RMSNorm
    head : nn.Linear
        Its weights are the embedding's.
    tokenizer : tokenizers.Tokenizer
        Set by `load`.
    changes : tuple of str
        What `reweighted` was told: () for the model as loaded.

    Raises
    ------
    ValueError
        If ``sizes`` is something else.

    References
    ----------
    Allal et al. 2025, "SmolLM2: when Smol goes big".
    """

    def __init__(self, sizes=Sizes()):
        if not isinstance(sizes, Sizes):
            raise ValueError(f"sizes must be Sizes, got {sizes!r}")
        super().__init__()
        self.sizes = sizes
        # normally distributed initial weights on the meta device would import half of torch: 70 MB
        self.embedding = nn.Embedding.from_pretrained(torch.zeros(sizes.vocab_size, sizes.hidden_size), freeze=False)
        if not self.embedding.weight.is_meta:
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.tokenizer = None
        self.changes = ()

    def forward(self, tokens, caches=None):
        """Logits (N, T, 49152) of the token after each of ``tokens`` (N, T)."""
        return self.head(self.hidden(tokens, caches))

    def hidden(self, tokens, caches=None):
        """What the head receives, (N, T, 576); ``caches``: a dict for each block, filled and used."""
        past = caches[0]["k"].shape[2] if caches and caches[0] else 0
        x = self.embedding(tokens)
        rotation = [table.to(x) for table in rotary_tables(self.sizes, past, tokens.shape[1])]
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, caches[i] if caches is not None else None)
        return self.norm(x)

    def encode(self, text):
        """Tokens of a text, int64 of shape (1, T)."""
        if self.tokenizer is None:
            raise ValueError("model must have a tokenizer, as that of load() has")
        return torch.tensor([self.tokenizer.encode(text).ids], dtype=torch.int64)


def rotary_tables(sizes, start, length):
    """Cosine and sine (T, 64) of the rotary embedding for positions from ``start``: Su et al. 2021, section 3.4.2."""
    frequencies = 1.0 / sizes.rope_theta ** (torch.arange(0, sizes.head_dim, 2).float() / sizes.head_dim)
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
    path = converted_model(progress)
    try:
        return _open(path)
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:  # cut short by something else than `load`
        raise RuntimeError(f"{path} is damaged ({error}): delete it and call load() again") from error
    except OSError as error:  # safetensors says "no such file" of one that it may not read
        raise OSError(f"cannot read {path} ({error}): make it readable, or name another folder in "
                      f"QLAB_CACHE") from error


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


@torch.inference_mode()
def perplexity(model, tokens):
    """exp of the mean of −ln p(token | those before it in its sequence): between how many tokens the model wavers.

    Parameters
    ----------
    model : SmolLM
    tokens : int64 tensor, shape (N, T)
        The first token of each sequence is given, not predicted.

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
    check_tokens(model, tokens)
    loss = 0.0
    for states, targets in predicted(model, tokens):
        loss += F.cross_entropy(wide(model.head(states)), targets, reduction="sum").item()
    return torch.tensor(loss / (tokens.shape[0] * (tokens.shape[1] - 1)), dtype=torch.float64).exp().item()


def predicted(model, tokens):
    """What the head receives, and the tokens that come next, some positions at a time."""
    for sequence in tokens:
        hidden = model.hidden(sequence[None, :-1])[0]
        yield from zip(hidden.split(_HEAD_POSITIONS), sequence[1:].split(_HEAD_POSITIONS), strict=True)


def wide(x):
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        If ``prompt`` is not a text or empty, or ``new_tokens`` is not an integer of at least 1.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must hold some text, got {prompt!r}")
    new_tokens = check_integer(new_tokens, "new_tokens", 1)
    tokens, found = model.encode(prompt), []
    ends = [model.tokenizer.token_to_id(token) for token in _ENDS]
    caches = [{} for _ in model.blocks]
    while len(found) < new_tokens:
        tokens = model.head(model.hidden(tokens, caches)[:, -1:]).argmax(-1)
        if tokens.item() in ends:
            break
        found.append(tokens.item())
    return model.tokenizer.decode(found)


def plain_weights(model):
    """The weights of a model by name, such as "blocks.0.q.weight"; a ValueError unless they are all that makes it.

    A copy is made from weights alone. Hooks, pruning, parametrizations, layers that were replaced, biases: a copy would
    lose them. What is `inserted` is left out.
    """
    check_model(model)
    weights = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not {*SITES, *CACHE_SITES}.isdisjoint(name.split(".")):
            continue
        own = {key: value.detach() for key, value in module.named_parameters(recurse=False)}
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        plain = module is model or type(module) in (nn.ModuleList, Block, nn.Embedding, RMSNorm, nn.Linear)
        if hooks or not plain or own.keys() - {"weight"}:
            raise ValueError(f"model must be made of plain layers without hooks, masks and biases, got a "
                             f"{type(module).__name__} {'with hooks ' if hooks else ''}at {name!r}")
        if isinstance(module, RMSNorm) and module.eps != model.sizes.rms_norm_eps:
            raise ValueError(f"model must have the eps of its sizes, {model.sizes.rms_norm_eps}, got {module.eps} at "
                             f"{name!r}")
        weights |= {f"{name}.{key}": value for key, value in own.items()}
    return weights


def reweighted(model, weights, change):
    """A copy of the model with some other weights; it shares the memory of all that stay.

    Parameters
    ----------
    model : SmolLM
        Left as it is. Functions that are `inserted` now are not copied.
    weights : dict of str to float tensor
        By names of ``model.state_dict()``, such as "blocks.0.q.weight"; stored in the model's precision. With
        "embedding.weight" or "head.weight" alone, the two are no longer one.
    change : str
        A word for what was done, added to the copy's ``changes``.

    Returns
    -------
    SmolLM

    Raises
    ------
    ValueError
        If there is no such weight, a shape differs, a number is NaN or infinite in the model's precision, or the model
        has hooks or something else than plain layers.
    """
    state = plain_weights(model)
    with torch.device("meta"):
        copy = SmolLM(replace(model.sizes, num_hidden_layers=len(model.blocks)))
    wanted = {name: tuple(weight.shape) for name, weight in copy.state_dict().items()}
    for name, weight in (state | dict(weights)).items():
        if name not in wanted or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != wanted[name]:
            raise ValueError(f"weights must fit the model's, got {name!r} of {described(weight)}: "
                             f"{wanted.get(name, 'no such weight')}")
    for name, weight in weights.items():
        state[name] = weight.detach().to(state[name])
        real_array(state[name], f"weights[{name!r}]")
    copy.load_state_dict(state, assign=True)
    if state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr():
        copy.head.weight = copy.embedding.weight
    copy.tokenizer, copy.changes = model.tokenizer, (*model.changes, change)
    return copy.eval().requires_grad_(False)


def quantize_weights(model, bits=8, *, per_channel=False, sites=SITES):
    """A copy of the model with fake-quantized weights (absmax) behind some sites; embedding and head stay in float.

    Parameters
    ----------
    model : SmolLM
    bits : int, 2 to 16
    per_channel : bool
        One scale for each output channel instead of one for each matrix.
    sites : iterable of str, of ``SITES``

    Returns
    -------
    SmolLM

    Raises
    ------
    ValueError
        If ``bits`` is out of range, there is no such site, or the model is not a plain one (see `reweighted`).
    """
    bits, state, weights = check_bits(bits), plain_weights(model), {}
    for place in places_of(model, sites):
        for name in weight_names(*place):
            params = absmax_params(state[name], bits, axis=0 if per_channel else None)
            weights[name] = fake_quantize(state[name], params).to(state[name].dtype)
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
        If there is no such linear layer, or the model is not of float32 or not a plain one (see `reweighted`).

    References
    ----------
    ``torch.ao.quantization.quantize_dynamic``. It is deprecated, and its kernels are still what PyTorch has for CPUs.
    """
    names = [name for readers in READERS.values() for name in readers]
    if unknown := set(in_float) - set(names):
        raise ValueError(f"in_float must be of {', '.join(names)}, got {', '.join(map(repr, sorted(unknown)))}")
    copy = reweighted(model, {}, "torch int8")
    if found := {weight.dtype for weight in copy.parameters()} - {torch.float32}:
        raise ValueError(f"model must be of float32, got {', '.join(map(str, found))}")
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
        If there is no such layer or site, something is no function, or the model runs through one block twice.
    """
    places = check_places(model, functions, SITES + CACHE_SITES, "functions must have keys")
    for place, function in functions.items():
        if not callable(function):
            raise ValueError(f"functions must be callable, got {function!r} at {place!r}")
    before = [(model.blocks[layer], site, getattr(model.blocks[layer], site)) for layer, site in places]
    try:
        for (block, site, _), function in zip(before, functions.values(), strict=True):
            setattr(block, site, function if isinstance(function, nn.Module) else _Function(function))
        yield model
    finally:
        for block, site, module in before:
            setattr(block, site, module)


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def check_model(model, name="model"):
    """Raise a ValueError unless ``model`` is a `SmolLM`."""
    if not isinstance(model, SmolLM):
        raise ValueError(f"{name} must be a SmolLM, got {type(model).__name__}")


def check_places(model, places, sites=SITES, what="places must be pairs"):
    """``places`` as a list; a ValueError unless each is a pair (layer, site) of a model whose blocks are all different.

    (A function at a block that is used twice would act twice.)
    """
    check_model(model)
    places, layers = list(places), range(len(model.blocks))
    if places and (different := len(set(model.blocks))) < len(layers):
        raise ValueError(f"model must have different blocks, got {different} for {len(layers)} layers")
    for place in places:
        pair = isinstance(place, tuple) and len(place) == 2 and isinstance(place[1], str)
        whole = pair and isinstance(place[0], (int, np.integer)) and not isinstance(place[0], bool)
        if not whole or place[0] not in layers or place[1] not in sites:
            raise ValueError(f"{what} (layer, site), a layer from 0 to {len(layers) - 1} and a site of "
                             f"{', '.join(sites)}, got {place!r}")
    return places


def places_of(model, sites=SITES):
    """All pairs (layer, site) of a model at some sites."""
    check_model(model)
    return check_places(model, product(range(len(model.blocks)), sites))


def weight_names(layer, site):
    """The names of the weights that read a site."""
    return [f"blocks.{layer}.{reader}.weight" for reader in READERS[site]]


def check_tokens(model, tokens):
    """Raise a ValueError unless ``tokens`` is an int64 tensor (N, T), N ≥ 1, T ≥ 2, of the model's tokens."""
    check_model(model)
    if (not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64 or tokens.layout != torch.strided
            or tokens.ndim != 2 or not tokens.numel() or tokens.shape[1] < 2):
        raise ValueError(f"tokens must be int64 of shape (N, T) with N at least 1 and T at least 2, got "
                         f"{described(tokens)}")
    weight = model.embedding.weight
    if tokens.device != weight.device:
        raise ValueError(f"tokens must be on the model's device, {weight.device}, got {tokens.device}")
    if tokens.min() < 0 or tokens.max() >= len(weight):
        raise ValueError(f"tokens must be from 0 to {len(weight) - 1}, got {tokens.min()} to {tokens.max()}")


if __name__ == "__main__":
    load()
    print(f"The model is in {cache_folder()}.")
