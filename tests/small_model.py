"""A LLaMA of two layers with random weights and gains, for tests that need not the real one."""

import math

import torch

from qlab.smollm import Sizes, SmolLM, inserted

SIZES = Sizes(vocab_size=60, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2)


def small_model(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = SmolLM(SIZES)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (values.exp() if "norm" in name else values / math.sqrt(parameter.shape[1])).to(dtype)
    return model.eval().requires_grad_(False)


def some_tokens(sequences=2, length=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES.vocab_size, (sequences, length), generator=generator)


def logits(model, tokens, functions=()):
    with torch.inference_mode(), inserted(model, dict(functions)):
        return model(tokens)


def relative(y, reference):
    return float((y - reference).abs().max() / reference.abs().max())


def state_bytes(model):
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}
