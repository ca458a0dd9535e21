"""Hadamard matrices against SciPy; rotations of a small LLaMA, and of the real one; Cayley SGD's closed form."""

import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester
from torch import nn

from qlab import explorers, smollm
from qlab.evaluation import texts
from qlab.outliers import capture, dynamic_quantizers
from qlab.smollm import READERS, SITES, reweighted
from qlab.spinquant import (
    CayleySGD,
    ProxyInputs,
    chain,
    fast_hadamard,
    fold_gains,
    hadamard,
    kv_quantizers,
    learn_rotation,
    online,
    output_error,
    proxy_inputs,
    proxy_loss,
    random_hadamard,
    random_orthogonal,
    rotate,
)
from qlab.studies import spinquant as study
from qlab.studies.spinquant import learn_end_to_end
from qlab.studies.tables import load
from tests.small_model import logits, relative, small_model, some_tokens, state_bytes

ORDERS = [1, 2, 4, 12, 20, 24, 32, 40, 64, 80, 96, 144, 160, 240, 288, 400, 512, 576, 1536]
DOUBLE = torch.float64


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def tokens():
    return some_tokens()


@pytest.fixture
def folded(model):
    return fold_gains(model)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Hadamard matrices


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard_matrices(n):
    h = hadamard(n)
    assert h.dtype == torch.float32 and h.shape == (n, n) and torch.equal(h.abs(), torch.ones(n, n))
    assert torch.equal(h @ h.T, n * torch.eye(n))
    if n & (n - 1) == 0:
        assert np.array_equal(h, sylvester(n))


@pytest.mark.parametrize("q", [11, 19])
def test_paley_orders_hold_the_squares(q):
    core = hadamard(q + 1)[1:, 1:] - torch.eye(q)
    for i, j in itertools.product(range(q), repeat=2):
        euler = pow(i - j, (q - 1) // 2, q)  # Euler's criterion: 1 for squares, −1 for the others, 0 for 0
        assert core[i, j] == (euler if euler < 2 else -1)


@pytest.mark.parametrize("n, near", [(3, "2 or 4"), (6, "4 or 8"), (36, "32 or 40"), (60, "48 or 64"),
                                     (100, "96 or 128"), (575, "512 or 576"), (11008, "10240 or 11520")])
def test_orders_that_cannot_be_built(n, near):
    for function in (hadamard, lambda n: random_hadamard(n, 0), lambda n: fast_hadamard(torch.zeros(n))):
        with pytest.raises(ValueError, match=f"n must be a product of factors 2, 12 and 20, such as {near}, got {n}$"):
            function(n)


@pytest.mark.parametrize("n", [10**9 + 1, 10**18 + 1, 2**40 - 1])
def test_large_orders_are_refused_at_once(n):
    with pytest.raises(ValueError, match=f"such as [0-9]+ or [0-9]+, got {n}$"):
        hadamard(n)


def test_the_orders_named_are_the_nearest():
    orders = sorted({2**i * 12**j * 20**k for i in range(13) for j in range(5) for k in range(4)})
    for below, above in itertools.pairwise(order for order in orders if order < 4000):
        if above - below > 1:
            with pytest.raises(ValueError, match=f"such as {below} or {above}, got {below + 1}$"):
                hadamard(below + 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int8, "float32", np.float32], ids=str)
def test_precisions_that_cannot_be(dtype):
    for make in (lambda: random_hadamard(4, 0, dtype), lambda: random_orthogonal(4, 0, dtype)):
        with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype of floats, got"):
            make()
    if dtype == torch.int8:
        assert torch.equal(hadamard(4, dtype).float(), hadamard(4))
    else:
        with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype with a sign, got"):
            hadamard(4, dtype)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1, 2**80, np.uint64(2**64 - 1)])
def test_any_integer_is_a_seed(seed):
    signs = 2 * torch.randint(2, (4, 1), generator=torch.Generator().manual_seed(int(seed) % 2**64)) - 1
    assert torch.equal(random_hadamard(4, seed), signs * hadamard(4) / 2)


@pytest.mark.parametrize("n", [0, -4, 2.0, True, "4"])
def test_orders_that_are_none(n):
    for function in (hadamard, lambda n: random_orthogonal(n, 0)):
        with pytest.raises(ValueError, match=re.escape(f"n must be an integer of at least 1, got {n!r}")):
            function(n)


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_orders_and_seeds_may_be_integers_of_numpy(integer):
    assert torch.equal(hadamard(integer(64)), hadamard(64))
    for make in (random_hadamard, random_orthogonal):
        assert torch.equal(make(integer(4), integer(7)), make(4, 7))
    with pytest.raises(ValueError, match=r"such as 192 or 240, got 200$"):
        hadamard(integer(200))


@pytest.mark.parametrize("n", [*ORDERS, 4096])
def test_fast_transform(n):
    x, matrix = normal(3, 2, n), hadamard(n, DOUBLE) / math.sqrt(n)
    torch.testing.assert_close(fast_hadamard(x), x @ matrix, rtol=0, atol=1e-12)
    single = fast_hadamard(x.float())
    assert single.dtype == torch.float32 and single.shape == x.shape
    torch.testing.assert_close(single, (x @ matrix).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(fast_hadamard(x[0, 0]), x[0, 0] @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast_hadamard(x.transpose(0, 1)), x.transpose(0, 1) @ matrix, rtol=0, atol=1e-12)


def test_fast_transform_in_half_precision():
    x = torch.full((1536,), 40.0).half()
    x[0] = 60_000  # what the factors sum up on the way is more than the result
    for dtype in (torch.float16, torch.bfloat16):
        y = fast_hadamard(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y, fast_hadamard(x.to(dtype).double()).to(dtype), rtol=0, atol=0)
    assert torch.equal(fast_hadamard(nn.Parameter(torch.ones(4))), torch.tensor([2.0, 0, 0, 0]))


def test_gradients_after_a_first_use_in_inference_mode():
    code = """import torch; from qlab.spinquant import fast_hadamard, hadamard
with torch.inference_mode(): fast_hadamard(torch.ones(24)), hadamard(12)
x = torch.ones(24, requires_grad=True); (fast_hadamard(x) * torch.ones(24)).sum().backward()
assert torch.allclose(x.grad, hadamard(24).sum(1) / 24**0.5)"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("x", [torch.zeros(4, dtype=torch.int64), np.zeros(4), torch.tensor(1.0), torch.zeros(3, 0)],
                         ids=["integers", "NumPy", "0-d", "empty"])
def test_fast_transform_of_something_else(x):
    with pytest.raises(ValueError, match=r"x must be a tensor of floats|n must be an integer of at least 1, got 0"):
        fast_hadamard(x)


@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
def test_random_rotations(make):
    r = make(48, 7, DOUBLE)
    assert r.dtype == DOUBLE and make(48, 7).dtype == torch.float32
    torch.testing.assert_close(r @ r.T, torch.eye(48, dtype=DOUBLE), rtol=0, atol=1e-13)
    assert torch.equal(r, make(48, 7, DOUBLE)) and not torch.equal(r, make(48, 8, DOUBLE))
    with pytest.raises(ValueError, match=re.escape("seed must be an integer, got 1.5")):
        make(48, 1.5)


def test_random_hadamard_is_signs_times_hadamard():
    ratio = random_hadamard(576, 3, DOUBLE) * math.sqrt(576) / hadamard(576, DOUBLE)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(576, 576))
    assert 200 < (ratio[:, 0] > 0).sum() < 376


def test_random_orthogonal_is_uniform():
    entries = torch.stack([random_orthogonal(3, seed, DOUBLE) for seed in range(1000)])
    assert entries.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 1000)
    assert (entries.square().mean(0) - 1 / 3).abs().max() < 0.04
    assert 0.45 < (torch.linalg.det(entries) > 0).double().mean() < 0.55


# Rotating a model


def test_folded_gains(model, folded, tokens):
    before = state_bytes(model)
    assert relative(logits(folded, tokens), logits(model, tokens)) <= 1e-11
    for norm in (folded.norm, *(n for block in folded.blocks for n in (block.attn_norm, block.mlp_norm))):
        assert torch.equal(norm.weight, torch.ones(48, dtype=DOUBLE))
    assert torch.equal(folded.head.weight, model.head.weight * model.norm.weight)
    assert torch.equal(folded.embedding.weight, model.embedding.weight)
    assert folded.changes == ("gains folded",) and model.changes == () and state_bytes(model) == before
    for change in ("8-bit weights", "gains folded", "rotated by R1"):
        with pytest.raises(ValueError, match=f"model must be as loaded, or smoothed.*changed: {change}"):
            fold_gains(reweighted(model, {}, change))
    assert fold_gains(reweighted(model, {}, "smoothed")).changes == ("smoothed", "gains folded")


R1, R2 = random_orthogonal(48, 0, DOUBLE), random_orthogonal(64, 1, DOUBLE)
R2_BY_LAYER = torch.stack([random_orthogonal(64, seed, DOUBLE) for seed in (2, 3)])


@pytest.mark.parametrize("r1", [R1, random_hadamard(48, 0, DOUBLE)], ids=["orthogonal", "Hadamard"])
@pytest.mark.parametrize("r2", [None, R2, R2_BY_LAYER], ids=["without R2", "R2", "R2 by layer"])
@pytest.mark.parametrize("r4", [False, True])
def test_rotations_change_nothing_in_float64(folded, tokens, r1, r2, r4):
    r3, before = r4, state_bytes(folded)
    rotated = rotate(folded, r1, r2, r4=r4)
    functions = {(i, site): fast_hadamard for i in range(2) for site in ("queries", "keys")} if r3 else {}
    assert relative(logits(rotated, tokens, online(rotated, functions)), logits(folded, tokens)) <= 1e-11
    assert state_bytes(folded) == before and folded.changes == ("gains folded",)
    names = "rotated by R1" + ", R2" * (r2 is not None) + ", R4" * r4
    assert rotated.changes == ("gains folded", names)


def test_what_is_rotated(model, folded, tokens):
    places = [(1, site) for site in (*READERS, "values")]
    rotated = rotate(folded, R1, R2_BY_LAYER, r4=True)
    seen = {}
    keep = {place: lambda x, place=place: seen.setdefault(place, x) for place in places}
    logits(rotated, tokens, online(rotated, keep))
    expected = {}
    logits(folded, tokens, {place: lambda x, place=place: expected.setdefault(place, x) for place in places})
    h = hadamard(96, DOUBLE) / math.sqrt(96)
    for place, right in {"attn_in": R1, "mlp_in": R1, "values": R2_BY_LAYER[1], "down_in": h,
                         "o_in": torch.block_diag(*[R2_BY_LAYER[1]] * 4)}.items():
        torch.testing.assert_close(seen[1, place], expected[1, place] @ right, rtol=0, atol=1e-11)


def test_r4_asks_for_its_transform(folded, tokens):
    rotated = rotate(folded, R1, r4=True)
    assert relative(logits(rotated, tokens), logits(folded, tokens)) > 0.1
    assert online(rotate(folded, R1)) == {} and set(online(rotated)) == {(0, "down_in"), (1, "down_in")}


def test_quantizers_after_the_online_rotation(folded):
    rotated = reweighted(rotate(folded, R1, r4=True), {}, "8-bit weights")
    quantizers = dynamic_quantizers("token", 4, places=[(0, "down_in"), (0, "o_in")])
    functions, x = online(rotated, quantizers), normal(2, 5, 96)
    assert torch.equal(functions[0, "down_in"](x), quantizers[0, "down_in"](fast_hadamard(x)))
    assert functions[0, "o_in"] is quantizers[0, "o_in"] and torch.equal(functions[1, "down_in"](x), fast_hadamard(x))
    assert set(quantizers) == {(0, "down_in"), (0, "o_in")}


def test_r4_comes_in_front_once(folded):
    rotated = rotate(folded, R1, r4=True)
    for functions in (online(rotated), online(rotated, dynamic_quantizers(places=[(0, "down_in")]))):
        with pytest.raises(ValueError, match=r"functions must not come from online\(\) .* at \(0, 'down_in'\)"):
            online(rotated, functions)


def test_rotating_refuses_what_is_not_finite(model, folded):
    folded.blocks[1].down.weight[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"weights\['blocks.1.down.weight'\] must be finite"):
        rotate(folded, R1)
    model.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"weights\['head.weight'\] must be finite, got 60 NaN"):
        fold_gains(model)


def test_forgetting_the_gains_breaks_the_model(model, folded, tokens):
    with pytest.raises(ValueError, match=re.escape("rotate(fold_gains(model), …); got one that was changed: not at")):
        rotate(model, R1)
    forgotten = rotate(model, R1, check=False)
    assert relative(logits(forgotten, tokens), logits(model, tokens)) > 0.1
    assert torch.equal(rotate(folded, R1, check=False).head.weight, rotate(folded, R1).head.weight)


@pytest.mark.parametrize("change", ["rotated by R1", "8-bit weights", "int8 kernels"])
@pytest.mark.parametrize("check", [True, False])
def test_a_rotation_comes_first_and_once(folded, change, check):
    with pytest.raises(ValueError, match=f"model must not be rotated a second time.*changed: gains folded, {change}"):
        rotate(reweighted(folded, {}, change), R1, check=check)


@pytest.mark.parametrize("r1, r2, message", [
    (R1 + 0.01, None, "r1 must be orthogonal, max |RᵀR − I| at most 0.0001, got 0.0"),
    (2 * R1, None, "r1 must be orthogonal, max |RᵀR − I| at most 0.0001, got 3"),
    (hadamard(48), None, "r1 must be orthogonal"),
    (R2, None, "r1 must be a tensor of shape (48, 48), got torch.float64 of shape (64, 64)"),
    (R1.numpy(), None, "r1 must be a tensor of shape (48, 48), got ndarray"),
    (R1 * math.nan, None, "r1 must be finite"),
    (R1, R1, "r2 must be a tensor of shape (64, 64) or (2, 64, 64), got torch.float64 of shape (48, 48)"),
    (R1, R2.expand(3, -1, -1), "(64, 64) or (2, 64, 64), got torch.float64 of shape (3, 64, 64)"),
    (R1, torch.stack([R2, 1.1 * R2]), "r2 must be orthogonal, max |RᵀR − I| at most 0.0001, got 0.21"),
])
def test_what_is_no_rotation(folded, r1, r2, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rotate(folded, r1, r2)


def test_chain():
    assert chain(lambda x: x + 1, lambda x: 10 * x)(2) == 30 and chain()(5) == 5


@pytest.mark.parametrize("r3", [False, True])
def test_kv_quantizers(model, r3):
    functions = kv_quantizers(model, 3, r3=r3)
    assert set(functions) == {(i, site) for i in range(2) for site in ("keys", "values", *["queries"] * r3)}
    x = normal(2, 3, 5, 64)
    rotated = x @ hadamard(64, DOUBLE) / 8 if r3 else x
    for site, before in (("keys", rotated), ("values", x)):
        low, high = before.amin(-1, keepdim=True).clamp(max=0), before.amax(-1, keepdim=True).clamp(min=0)
        s = (high - low) / 7
        z = -(low / s).round()
        expected = s * (((before / s).round() + z).clamp(0, 7) - z)
        torch.testing.assert_close(functions[1, site](x), expected, rtol=0, atol=1e-11)
    if r3:
        torch.testing.assert_close(functions[1, "queries"](x), rotated, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 16, got 1"):
        kv_quantizers(model, 1)
    with pytest.raises(ValueError, match="keys must be 'token' or 'channel', got 'head'"):
        kv_quantizers(model, 4, keys="head")


@pytest.mark.parametrize("r3", [False, True])
def test_keys_by_channel(model, r3):
    functions, x = kv_quantizers(model, 3, r3=r3, keys="channel"), normal(2, 3, 70, 64)
    rotated, expected = x @ hadamard(64, DOUBLE) / 8 if r3 else x, []
    for first, last in ((0, 32), (32, 64), (64, 70)):
        block = rotated[:, :, first:last]
        low, high = block.amin(-2, keepdim=True).clamp(max=0), block.amax(-2, keepdim=True).clamp(min=0)
        s = (high - low) / 7
        z = -(low / s).round()
        expected.append(s * (((block / s).round() + z).clamp(0, 7) - z))
    torch.testing.assert_close(functions[1, "keys"](x), torch.cat(expected, 2), rtol=0, atol=1e-11)
    by_token = kv_quantizers(model, 3, r3=r3)
    assert torch.equal(functions[1, "values"](x), by_token[1, "values"](x)) and functions.keys() == by_token.keys()


# Cayley SGD


def one_step(r, gradient, **options):
    r = nn.Parameter(r.clone())
    r.grad = gradient.clone()
    optimizer = CayleySGD([r], **options)
    optimizer.step()
    return r.detach(), optimizer.state[r]


@pytest.mark.parametrize("p, n", [(6, 6), (3, 7), (1, 4)])
@pytest.mark.parametrize("lr", [1e-3, 1.5])
def test_a_step_is_the_cayley_transform(p, n, lr):
    r, gradient = random_orthogonal(n, 0, DOUBLE)[:p], normal(p, n, seed=1)
    stepped, state = one_step(r, gradient, lr=lr)
    x, g = r.T, gradient.T
    direction = -(g @ x.T) + 0.5 * x @ (x.T @ g @ x.T)
    w = direction - direction.T
    a = min(1 / w.abs().sum(0).max().item(), lr)
    assert state["step_size"] == pytest.approx(a, rel=1e-7)
    identity = torch.eye(n, dtype=DOUBLE)
    closed = torch.linalg.solve(identity - a / 2 * w, (identity + a / 2 * w) @ x).T
    y = x - a * g
    for _ in range(5):
        y = x + a / 2 * w @ (x + y)
    torch.testing.assert_close(stepped, y.T, rtol=0, atol=1e-7)
    torch.testing.assert_close(stepped, closed, rtol=0, atol=1e-6 if lr == 1e-3 else 0.05)


def test_it_stays_orthogonal_and_finds_the_nearest_rotation():
    start, target, weights = random_hadamard(12, 0), random_orthogonal(12, 5), torch.linspace(1, 3, 12)
    if torch.linalg.det(start) * torch.linalg.det(target) < 0:
        target = torch.cat([-target[:1], target[1:]])  # a path from start to target stays in one half of the group
    r = nn.Parameter(start)
    optimizer = CayleySGD([r], lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (weights[:, None] * (r - target).square()).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert (r.detach() @ r.detach().T - torch.eye(12)).abs().max() <= 1e-5
    assert losses[0] > 20 and losses[-1] < 1e-3


def test_cayley_takes_numbers_of_numpy():
    r, gradient = random_orthogonal(5, 0, DOUBLE), normal(5, 5, seed=1)
    expected, state = one_step(r, gradient, lr=0.125, momentum=0.5, seed=3)
    stepped, numpy_state = one_step(r, gradient, lr=np.float32(0.125), momentum=np.float16(0.5), seed=np.int64(3))
    assert torch.equal(stepped, expected) and numpy_state["step_size"] == state["step_size"]
    assert type(numpy_state["step_size"]) is float
    assert torch.equal(one_step(r, gradient, lr=np.int64(2))[0], one_step(r, gradient, lr=2)[0])


def test_momentum_is_the_papers():
    r, gradient = random_orthogonal(5, 0, DOUBLE), normal(5, 5, seed=1)
    parameter = nn.Parameter(r.clone())
    optimizer = CayleySGD([parameter], lr=1e-3, momentum=0.9)
    parameter.grad = gradient.clone()
    optimizer.step()
    x = r.T
    w = -gradient.T @ r + 0.5 * x @ (x.T @ gradient.T @ r)
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], (w - w.T) @ x, rtol=0, atol=1e-7)
    second, buffer = parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone()
    optimizer.step()
    expected, _ = one_step(second, gradient - 0.9 * buffer.T, lr=1e-3)
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)
    assert (parameter.detach() - one_step(second, gradient, lr=1e-3)[0]).abs().max() > 1e-6


def test_qr_once_in_a_hundred_and_one_steps():
    skewed = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=DOUBLE)
    scaled, _ = one_step(3 * skewed, torch.zeros(2, 2, dtype=DOUBLE), lr=1.0, seed=0)
    torch.testing.assert_close(scaled, skewed, rtol=0, atol=1e-7)  # rows of length 1
    results = [one_step(skewed, torch.zeros(2, 2, dtype=DOUBLE), lr=1.0, seed=seed)[0] for seed in range(2000)]
    straightened = [r for r in results if not torch.allclose(r, skewed, atol=1e-6)]
    assert 5 <= len(straightened) <= 40
    for r in straightened:
        torch.testing.assert_close(r, torch.eye(2, dtype=DOUBLE), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    first, second = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(4))
    optimizer = CayleySGD([first, second], lr=0.1, momentum=0.5)
    first.grad, second.grad = normal(3, 3, dtype=torch.float32), normal(4, 4, dtype=torch.float32)
    optimizer.step()
    before = [r.detach().clone() for r in (first, second)]
    state = {r: dict(optimizer.state[r]) for r in (first, second)}
    chance = optimizer._chance.get_state()
    second.grad[1, 2] = bad
    with pytest.raises(ValueError, match="params and their gradients must be finite"):
        optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    assert torch.equal(optimizer._chance.get_state(), chance)
    assert all(optimizer.state[r][name] is value for r in state for name, value in state[r].items())


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e30, 1e38])
def test_gradients_of_any_size_keep_it_orthogonal(size):
    r, _ = one_step(torch.eye(6), size * normal(6, 6, dtype=torch.float32).sign(), lr=0.1)
    assert (r @ r.T - torch.eye(6)).abs().max() < 0.05


def test_a_group_that_is_refused_is_not_added():
    r, other = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(4))
    optimizer = CayleySGD([r], lr=0.1)
    for group, message in (({"params": [other], "lr": -1}, "lr must be"), ({"params": [r]}, "more than one"),
                           ({"params": [nn.Parameter(torch.ones(3))]}, "params must be matrices")):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other], "lr": 1})
    assert optimizer.param_groups[1]["lr"] == 1.0


def test_a_closure_and_parameters_without_gradients():
    moved, still = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(4))
    optimizer = CayleySGD([moved, still], lr=0.1)

    def closure():
        loss = moved[0, 1] - moved[1, 0]
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0 and moved[0, 1] < 0 and torch.equal(still, torch.eye(4))


@pytest.mark.parametrize("r, options, message", [
    (torch.eye(3), {"lr": 0}, "lr must be more than 0 and finite, got 0"),
    (torch.eye(3), {"lr": math.nan}, "lr must be more than 0 and finite, got nan"),
    (torch.eye(3), {"lr": True}, "lr must be more than 0 and finite, got True"),
    (torch.eye(3), {"lr": 1j}, "lr must be more than 0 and finite, got 1j"),
    (torch.eye(3), {"lr": np.float32(np.inf)}, "lr must be more than 0 and finite, got np.float32(inf)"),
    (torch.eye(3), {"lr": 1.0, "momentum": False}, "momentum must be at least 0 and less than 1, got False"),
    (torch.eye(3), {"lr": 1.0, "seed": True}, "seed must be an integer, got True"),
    (torch.eye(3), {"lr": 1.0, "momentum": 1.0}, "momentum must be at least 0 and less than 1, got 1.0"),
    (torch.eye(3), {"lr": 1.0, "seed": None}, "seed must be an integer, got None"),
    (torch.full((2, 2), math.nan), {"lr": 1.0}, "params must be finite, got 4 NaN"),
    (torch.eye(3).half(), {"lr": 1.0}, "in float32 or float64, got torch.float16"),
    (torch.eye(3).bfloat16(), {"lr": 1.0}, "in float32 or float64, got torch.bfloat16"),
    (torch.zeros(3), {"lr": 1.0}, "params must be matrices with at most as many rows as columns, got shape (3,)"),
    (torch.zeros(3, 2), {"lr": 1.0}, "params must be matrices with at most as many rows as columns, got shape (3, 2)"),
])
def test_bad_cayley(r, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CayleySGD([nn.Parameter(r)], **options)


# The proxy


def test_proxy_inputs_are_what_the_layers_receive(folded, tokens):
    inputs = proxy_inputs(folded, tokens, per_site=1000)
    assert inputs.x.shape == (2 * 16 * 4, 48) and inputs.weight.shape == (128,)
    some = proxy_inputs(folded, tokens, per_site=10, seed=3)
    assert some.x.shape == (40, 48)
    places = [(i, site) for i in range(2) for site in ("attn_in", "mlp_in")]
    seen = capture(folded, tokens, places)
    expected = {}
    for i, site in places:
        w = torch.cat([getattr(folded.blocks[i], name).weight for name in READERS[site]]).numpy()
        for x in seen[i, site].numpy():
            expected[x.tobytes()] = np.linalg.norm(w) ** 2 / np.linalg.norm(x @ w.T) ** 2
    for found in (inputs, some):
        for x, weight in zip(found.x.numpy(), found.weight.tolist(), strict=True):
            assert weight == pytest.approx(expected[x.tobytes()], rel=1e-9)
    assert not torch.equal(some.x, proxy_inputs(folded, tokens, per_site=10, seed=4).x)


def test_a_vector_without_products_weighs_nothing(folded):
    folded.embedding.weight[7] = 0
    inputs = proxy_inputs(folded, torch.tensor([[7, 7, 3]]), per_site=3)
    assert inputs.weight[:2].tolist() == [0, 0] and inputs.weight.isfinite().all() and inputs.weight[2] > 0


def test_weights_of_the_proxy_have_no_unit(tokens):
    small = fold_gains(small_model(torch.float32))
    weight = proxy_inputs(small, tokens).weight
    for name in "qkv":
        getattr(small.blocks[0], name).weight.mul_(1e-25)
    torch.testing.assert_close(proxy_inputs(small, tokens).weight[:16], weight[:16])  # of what they read


def test_proxy_loss_and_its_gradient():
    inputs = ProxyInputs(normal(30, 8), normal(30, seed=1).square())
    r = random_orthogonal(8, 2, DOUBLE).requires_grad_()
    loss = proxy_loss(r, inputs)
    turned = inputs.x @ r
    naive = (inputs.weight * (turned.amax(1) - turned.amin(1)).square()).mean()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, r)[0] for value in (loss, naive)), rtol=1e-9, atol=1e-12)


def outliers(count, seed):
    """Vectors with two outlier directions that are not axes."""
    x = normal(count, 16, seed=seed, dtype=torch.float32) * torch.tensor([30.0, 20.0, *[1.0] * 14])
    return ProxyInputs(x @ random_orthogonal(16, 9), torch.ones(count))


def test_learning_lowers_the_proxy_of_other_vectors():
    training, held_out, start = outliers(4000, 0), outliers(4000, 1), random_hadamard(16, 0)
    run = learn_rotation(training, start=start, steps=100, lr=2.5e-4, batch_size=512)
    assert len(run) == 100
    steps = list(run)
    assert [step.step for step in steps] == [*range(1, 101)] and steps[0].steps == 100
    assert all(step.orthogonality <= 1e-4 and 0 < step.step_size <= 2.5e-4 for step in steps)
    for step in (steps[0], steps[-1]):
        deviation = (step.rotation.T @ step.rotation - torch.eye(16)).abs().max().item()
        assert step.orthogonality == pytest.approx(deviation, abs=1e-7)
    before, after = (proxy_loss(r, held_out).item() for r in (start, steps[-1].rotation))
    assert after < 0.8 * before
    again = learn_rotation(training, start=start, steps=100, lr=2.5e-4, batch_size=512)
    assert next(again).loss == steps[0].loss and torch.equal(next(again).rotation, steps[1].rotation)
    numbers = {"steps": np.uint8(100), "lr": np.float64(2.5e-4), "batch_size": np.int64(512), "seed": np.int64(0)}
    assert next(learn_rotation(training, start=start, **numbers)).loss == steps[0].loss
    other = next(learn_rotation(training, start=start, steps=100, lr=1e-3, batch_size=512, seed=1))
    assert other.loss != steps[0].loss


def test_learning_leaves_its_start_as_it_is():
    start = random_orthogonal(16, 0, DOUBLE)
    kept, inputs = start.clone(), ProxyInputs(normal(50, 16), torch.ones(50, dtype=DOUBLE))
    next(learn_rotation(inputs, start=start, steps=1))
    assert torch.equal(start, kept)


def test_the_step_size_falls_along_a_cosine():
    steps = list(learn_rotation(outliers(100, 0), start=torch.eye(16), steps=10, lr=1e-9))
    expected = [1e-9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert [step.step_size for step in steps] == pytest.approx(expected, rel=1e-6)


def test_learning_can_be_watched():
    run = explorers.watch(learn_rotation(outliers(500, 0), start=torch.eye(16), steps=20), dict, every=10)
    losses = [step.loss for step in run]
    assert len(losses) == 20 and [record["loss"] for record in run.history[1:]] == losses
    assert run.explorer.readout["step"] == 20


def test_the_proxy_refuses(model, folded, tokens):
    for version, said in ((model, "not at all"), (rotate(folded, R1), "gains folded, rotated by R1")):
        with pytest.raises(ValueError, match=f"model must come from fold_gains, got one that was changed: {said}"):
            proxy_inputs(version, tokens)
    for arguments, message in [
        ({"tokens": tokens[0]}, "tokens must be int64 of shape"),
        ({"per_site": 0}, "per_site must be an integer of at least 1, got 0"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
    ]:
        with pytest.raises(ValueError, match=message):
            proxy_inputs(folded, **{"tokens": tokens} | arguments)
    for arguments, message in [
        ({"start": torch.eye(8)}, "start must be a tensor of shape (16, 16), got torch.float32 of shape (8, 8)"),
        ({"start": torch.ones(16, 16)}, "start must be orthogonal, max |RᵀR − I| at most 0.0001, got 16"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ({"lr": -1}, "lr must be more than 0 and finite, got -1"),
        ({"seed": None}, "seed must be an integer, got None"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            learn_rotation(outliers(10, 0), **{"start": torch.eye(16)} | arguments)


@pytest.mark.parametrize("x, weight, message", [
    (torch.full((3, 4), math.nan), torch.ones(3), "inputs.x must be finite, got 12 NaN"),
    (torch.ones(3, 4), torch.full((3,), math.inf), "inputs.weight must be finite"),
    (torch.ones(3, 4), torch.ones(2), "inputs must be x of shape (vectors, channels)"),
    (torch.ones(4), torch.ones(4), "inputs must be x of shape (vectors, channels)"),
    (torch.ones(0, 4), torch.ones(0), "inputs.x must not be empty"),
    (np.ones((3, 4)), np.ones(3), "inputs must be tensors, got ndarray, ndarray"),
])
def test_inputs_that_are_none(x, weight, message):
    for call in (lambda inputs: learn_rotation(inputs, start=torch.eye(4)), lambda i: proxy_loss(torch.eye(4), i)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(ProxyInputs(x, weight))


@pytest.mark.parametrize("r", [torch.eye(3), np.eye(4), None])
def test_the_proxy_of_no_rotation(r):
    with pytest.raises(ValueError, match=re.escape("r must be a tensor of shape (4, 4), got")):
        proxy_loss(r, ProxyInputs(torch.ones(3, 4), torch.ones(3)))


def test_learning_from_other_precisions_and_without_gradients():
    x, weight = outliers(50, 0)
    x.requires_grad_()
    with torch.no_grad():
        first, second = (next(learn_rotation(ProxyInputs(kind(x), kind(weight)), start=torch.eye(16), steps=1))
                         for kind in (lambda t: t, lambda t: t.bfloat16()))
    assert first.loss == pytest.approx(second.loss, rel=0.02) and x.grad is None


def test_learning_stops_where_the_loss_overflows():
    x, weight = outliers(50, 0)
    start = torch.eye(16)
    run = learn_rotation(ProxyInputs(1e25 * x, weight), start=start, steps=1)
    with pytest.raises(ValueError, match="params and their gradients must be finite"):
        next(run)
    assert torch.equal(start, torch.eye(16))


# End to end


def test_the_loss_of_end_to_end_learning_is_that_of_the_rotated_and_quantized_model(folded, tokens):
    r2 = random_hadamard(64, 1, DOUBLE)
    first = next(learn_end_to_end(folded, tokens, r1=R1, r2=r2, bits=4, steps=1, batch_size=2, lr=1e-9))
    rotated = rotate(folded, R1, r2, r4=True)
    places = [(i, site) for i in range(2) for site in SITES]
    with smollm.inserted(rotated, online(rotated, dynamic_quantizers("token", 4, places=places))):
        expected = torch.nn.functional.cross_entropy(rotated(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert first.loss == pytest.approx(expected.item(), rel=1e-9)


def test_end_to_end_learning_lowers_the_loss(folded, tokens):
    start, kept = {"r1": R1, "r2": random_hadamard(64, 1, DOUBLE).expand(2, -1, -1)}, R1.clone()
    steps = list(learn_end_to_end(folded, tokens, **start, bits=3, steps=40, lr=0.05))
    assert [step.step for step in steps] == [*range(1, 41)]
    assert sum(step.loss for step in steps[-5:]) < sum(step.loss for step in steps[:5])
    last = steps[-1]
    assert last.rotation.shape == (48, 48) and last.r2.shape == (2, 64, 64)
    deviations = [(r.T @ r - torch.eye(len(r), dtype=DOUBLE)).abs().max().item() for r in (last.rotation, *last.r2)]
    assert last.orthogonality == pytest.approx(max(deviations), abs=1e-12) and max(deviations) < 1e-4
    assert all((r - start["r2"][0]).abs().max() > 1e-3 for r in last.r2)  # each R2 has learned
    assert (last.r2[0] - last.r2[1]).abs().max() > 1e-3
    again = next(learn_end_to_end(folded, tokens, **start, bits=3, steps=40, lr=0.05))
    assert torch.equal(again.rotation, steps[0].rotation)
    assert torch.equal(start["r1"], kept)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("arguments, message", [
    ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens must be int64 of shape"),
    ({"r1": torch.eye(8)}, "r1 must be a tensor of shape (48, 48), got torch.float32 of shape (8, 8)"),
    ({"r2": torch.ones(64, 64)}, "r2 must be orthogonal"),
    ({"bits": 1}, "bits must be an integer from 2 to 16, got 1"),
    ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
    ({"lr": 0}, "lr must be more than 0 and finite, got 0"),
])
def test_end_to_end_learning_refuses(folded, tokens, arguments, message):
    given = {"tokens": tokens, "r1": R1, "r2": random_hadamard(64, 1)} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        learn_end_to_end(folded, **given)


def test_end_to_end_learning_needs_folded_gains(model, tokens):
    with pytest.raises(ValueError, match="model must come from fold_gains"):
        learn_end_to_end(model, tokens, r1=R1, r2=random_hadamard(64, 1))


def test_output_error_is_the_error_of_the_products():
    x, w, r = normal(9, 48), normal(5, 48, seed=1), random_orthogonal(48, 2, DOUBLE)
    x[3] = 0  # counts for nothing
    turned = (x @ r)[x.any(1)]
    low, high = turned.amin(1, keepdim=True).clamp(max=0), turned.amax(1, keepdim=True).clamp(min=0)
    s = (high - low) / 7
    z = -(low / s).round()
    x_hat = s * (((turned / s).round() + z).clamp(0, 7) - z) @ r.T
    expected = 100 * ((x_hat - x[x.any(1)]) @ w.T).norm(dim=1) / (x[x.any(1)] @ w.T).norm(dim=1)
    assert output_error(r, {(0, "attn_in"): (x, w)}, 3) == pytest.approx(expected.mean().item(), rel=1e-9)
    both = {(0, "attn_in"): (x, w), (1, "attn_in"): (x[:3], w)}
    assert output_error(r, both, 3) == pytest.approx(torch.cat([expected, expected[:3]]).mean().item(), rel=1e-9)
    with pytest.raises(ValueError, match="r must be orthogonal"):
        output_error(2 * r, both)


# What the study ships


def test_the_learned_rotation_is_one():
    seeds = load("spinquant").about["learning"]
    assert all(0.5 < one["held_out_after"] / one["held_out_before"] < 0.6 for one in seeds)
    r1 = study.learned_rotation()
    torch.testing.assert_close(r1.T @ r1, torch.eye(576), rtol=0, atol=1e-5)
    assert not torch.allclose(r1, random_hadamard(576, 0), atol=0.01)


def test_r2_differs_between_layers_and_seeds():
    r2 = study.r2_of(random_hadamard, 1)
    assert r2.shape == (30, 64, 64) and torch.equal(r2[4], random_hadamard(64, 34))


# The real model


@pytest.mark.long
def test_the_real_model():
    model = smollm.load(progress=False)
    del model.blocks[5:]
    tokens = texts(model)["prose"][:1, :48]
    reference = logits(model, tokens)
    folded = fold_gains(model)
    rotated = rotate(folded, random_hadamard(576, 0), random_hadamard(64, 0), r4=True)
    r3 = {(i, site): fast_hadamard for i in range(5) for site in ("queries", "keys")}
    assert relative(logits(rotated, tokens, online(rotated, r3)), reference) <= 2e-4
