"""SpinQuant: rotations that spread the outliers of a language model over all channels, and learning a better one.

A rotation R and its transpose cancel, so the model computes what it computed before, on activations x R that are easier
to quantize. R1, of the residual stream, and R2, of the values of each head, merge into the weights; R3, of queries and
keys, and R4, in front of ``down``, run beside the model as fast Hadamard transforms:

    folded = fold_gains(model)
    rotated = rotate(folded, random_hadamard(576, seed=0), random_hadamard(64, seed=0), r4=True)
    with inserted(rotated, online(rotated, dynamic_quantizers("token", 4, places=places))):
        perplexity(rotated, tokens)

Vectors are rows, as everywhere in torch: a linear layer maps x to x Wᵀ, and a rotation maps x to x R.
"""

import math
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from qlab.affine import check_integer, described, fake_quantize, is_number, real_array
from qlab.outliers import capture, check_floats, dynamic_quantizers, params_of
from qlab.smollm import READERS, check_model, check_tokens, plain_weights, reweighted, weight_names, wide
from qlab.training import Steps

_PALEY = (12, 20)
_BUTTERFLIES = 32  # five levels of two-point butterflies in one small product: fewer passes through memory
_ORTHOGONAL = 1e-4
_TOKENS_OF_KEYS = 32  # that share the range of a channel


def hadamard(n, dtype=torch.float32):
    """A Hadamard matrix: entries +1 and −1, rows orthogonal, H Hᵀ = n I.

    n = 2ᵏ is Sylvester's, H₂ₙ = [[H, H], [H, −H]]. Orders 12 and 20 are Paley's first construction, from the squares
    modulo 11 and 19; the Kronecker product of Hadamard matrices is one too.

    Parameters
    ----------
    n : int, ≥ 1
        A product of any number of factors 2, 12 and 20: among them 64, 576 = 12 · 12 · 4 and 1536 = 12 · 128.
    dtype : torch.dtype
        Of numbers that can be −1.

    Returns
    -------
    tensor, shape (n, n)

    Raises
    ------
    ValueError
        If no matrix of that order can be built here, or of that dtype.

    References
    ----------
    Sylvester 1867, "Thoughts on inverse orthogonal matrices"; Paley 1933, "On orthogonal matrices", lemma 2.

    Examples
    --------
    >>> hadamard(4).int()
    tensor([[ 1,  1,  1,  1],
            [ 1, -1,  1, -1],
            [ 1,  1, -1, -1],
            [ 1, -1, -1,  1]], dtype=torch.int32)
    >>> h = hadamard(12)
    >>> torch.equal(h @ h.T, 12 * torch.eye(12))
    True
    >>> hadamard(100)
    Traceback (most recent call last):
    ValueError: n must be a product of factors 2, 12 and 20, such as 96 or 128, got 100
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_signed:
        raise ValueError(f"dtype must be a torch.dtype with a sign, got {dtype}")
    matrix = torch.ones(1, 1)
    for factor in _check_order(n):
        matrix = torch.kron(matrix, _factor(factor))
    return matrix.to(dtype)


def fast_hadamard(x):
    """x H / √n along the last axis, H = `hadamard`\\ (n): the same product in O(n log n) operations for each vector.

    H = A ⊗ B acts as A along one axis and B along the other of the vector written as a table, so that each factor is
    one small product. For n = 2ᵏ and n = 2ᵏ alone, H is symmetric and the transform is its own inverse.

    Parameters
    ----------
    x : float tensor, shape (..., n)
        ``n`` as `hadamard`.

    Returns
    -------
    tensor, shape and dtype of ``x``

    Raises
    ------
    ValueError
        If ``x`` is not a tensor of floats, or there is no such order.

    References
    ----------
    Fino and Algazi 1976, "Unified matrix treatment of the fast Walsh-Hadamard transform".

    Examples
    --------
    >>> fast_hadamard(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    tensor([2., 2., 2., 2.])
    """
    check_floats(x)
    n = x.shape[-1]
    y, right = wide(x) / math.sqrt(n), 1  # sums in half precision lose digits or overflow
    for factor in reversed(_check_order(n)):
        h = _factor(factor).to(y)
        y = y.reshape(-1, factor) @ h if right == 1 else h.T @ y.reshape(-1, factor, right)
        right *= factor
    return y.reshape(x.shape).to(x.dtype)


def random_hadamard(n, seed, dtype=torch.float32):
    """diag(±1) H / √n with random signs: an orthogonal matrix whose entries all have the magnitude 1 / √n.

    Parameters
    ----------
    n : int
        As `hadamard`.
    seed : int
    dtype : torch.dtype
        Of floats.

    Returns
    -------
    tensor, shape (n, n)

    Raises
    ------
    ValueError
        If there is no such order, ``seed`` is not an integer, or ``dtype`` is none of floats.

    References
    ----------
    Liu et al. 2025, "SpinQuant: LLM quantization with learned rotations", section 3.1; Tseng et al. 2024, "QuIP#",
    section 3.

    Examples
    --------
    >>> random_hadamard(2, seed=1)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """
    matrix = hadamard(n, _check_float(dtype))
    signs = 2 * torch.randint(2, (n, 1), generator=_generator(seed)) - 1
    return signs * matrix / math.sqrt(n)


def random_orthogonal(n, seed, dtype=torch.float32):
    """An orthogonal matrix out of the uniform (Haar) distribution.

    Q of the QR decomposition of normally distributed numbers, its columns multiplied by the signs of R's diagonal:
    without them, Q is not uniform.

    Parameters
    ----------
    n : int, ≥ 1
    seed : int
    dtype : torch.dtype
        Of floats.

    Returns
    -------
    tensor, shape (n, n)

    Raises
    ------
    ValueError
        If ``n`` is not at least 1, ``seed`` is not an integer, or ``dtype`` is none of floats.

    References
    ----------
    Mezzadri 2007, "How to generate random matrices from the classical compact groups", section 5.

    Examples
    --------
    >>> r = random_orthogonal(3, seed=0)
    >>> torch.allclose(r.T @ r, torch.eye(3), atol=1e-6)
    True
    """
    n, dtype = check_integer(n, "n", 1), _check_float(dtype)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=_generator(seed), dtype=torch.float64))
    return (q * r.diagonal().sign()).to(dtype)


def fold_gains(model):
    """A copy of the model whose RMSNorms have no gains: they are multiplied into the linear layers that follow.

    RMSNorm without gains commutes with a rotation, ‖x R‖ = ‖x‖; with a gain for each channel it does not. The last
    norm's gains go into the head, which is no longer the embedding.

    Parameters
    ----------
    model : SmolLM
        As loaded, or smoothed.

    Returns
    -------
    SmolLM
        Computes what ``model`` computes; "gains folded" is added to its ``changes``.

    Raises
    ------
    ValueError
        If something else than smoothing was done to the model, or it is not a plain one (see `qlab.smollm.reweighted`).

    References
    ----------
    Ashkboos et al. 2024, "SliceGPT: compress large language models by deleting rows and columns", section 3.2.
    """
    old = plain_weights(model)
    if set(model.changes) - {"smoothed"}:
        raise ValueError(f"model must be as loaded, or smoothed: fold the gains before anything else is done; got one "
                         f"that was changed: {', '.join(model.changes)}")
    weights = {"head.weight": old["head.weight"] * old["norm.weight"],
               "norm.weight": torch.ones_like(old["norm.weight"])}
    for i, (site, norm) in product(range(len(model.blocks)), (("attn_in", "attn_norm"), ("mlp_in", "mlp_norm"))):
        gains = old[f"blocks.{i}.{norm}.weight"]
        weights[f"blocks.{i}.{norm}.weight"] = torch.ones_like(gains)
        for name in weight_names(i, site):
            weights[name] = old[name] * gains
    return reweighted(model, weights, "gains folded")


def rotate(model, r1, r2=None, *, r4=False, check=True):
    """A copy of the model on a rotated residual stream, the rotations merged into its weights.

    ====  ======================================  ==============================================================
    R1    the residual stream becomes x R1        embedding, q, k, v, gate, up and head: W R1; o and down: R1ᵀ W
    R2    the values of each head become v R2     rows of v: R2ᵀ W; columns of o: W R2
    R4    ``down`` expects `fast_hadamard` of     down: W H / √n; `online` puts the transform in front of it
          what it received before
    ====  ======================================  ==============================================================

    Parameters
    ----------
    model : SmolLM
        From `fold_gains`.
    r1 : float tensor, shape (576, 576)
        Orthogonal.
    r2 : float tensor, shape (64, 64) or (30, 64, 64), optional
        Orthogonal; one for all heads, or one for the heads of each layer.
    r4 : bool
        The copy then computes what ``model`` computes only with the functions of `online` inserted.
    check : bool
        False rotates a model whose gains are not folded, to see what becomes of it.

    Returns
    -------
    SmolLM
        "rotated by R1", or "rotated by R1, R2, R4", is added to its ``changes``. The products are computed in float64
        and stored in the model's precision.

    Raises
    ------
    ValueError
        If the gains are not folded, the model was rotated or quantized before or is not a plain one (see
        `qlab.smollm.reweighted`), or a matrix has another shape or is not orthogonal.

    References
    ----------
    Liu et al. 2025, "SpinQuant", section 3.1 and figure 1.
    """
    old = plain_weights(model)
    done = [change for change in model.changes if change not in ("smoothed", "gains folded")]
    if done:
        raise ValueError(f"model must not be rotated a second time, or after quantization, got one that was changed: "
                         f"{', '.join(model.changes)}")
    if check and "gains folded" not in model.changes:
        raise ValueError(f"model must have its gains folded: rotate(fold_gains(model), …); got one that was changed: "
                         f"{', '.join(model.changes) or 'not at all'}")
    layers, head_dim, weight = len(model.blocks), model.sizes.head_dim, model.embedding.weight
    dtype, r1 = weight.dtype, _check_orthogonal(r1, "r1", model.sizes.hidden_size).to(weight.device)
    if r2 is not None:
        r2 = _check_orthogonal(r2, "r2", head_dim, layers).to(weight.device).expand(layers, -1, -1)
    weights = {f"{name}.weight": (old[f"{name}.weight"].double() @ r1).to(dtype) for name in ("embedding", "head")}
    for i in range(layers):
        w = {name: old[f"blocks.{i}.{name}.weight"].double() for names in READERS.values() for name in names}
        w |= {name: w[name] @ r1 for name in ("q", "k", "v", "gate", "up")}
        w |= {name: r1.T @ w[name] for name in ("o", "down")}
        if r2 is not None:
            w["v"] = (r2[i].T @ w["v"].unflatten(0, (-1, head_dim))).flatten(0, 1)
            w["o"] = (w["o"].unflatten(1, (-1, head_dim)) @ r2[i]).flatten(1)
        if r4:
            w["down"] = fast_hadamard(w["down"])
        weights |= {f"blocks.{i}.{name}.weight": weight.to(dtype) for name, weight in w.items()}
    names = ["R1", *["R2"] * (r2 is not None), *["R4"] * r4]
    return reweighted(model, weights, f"rotated by {', '.join(names)}")


def online(model, functions=()):
    """Functions for `qlab.smollm.inserted` that run a rotated model: R4 where it has one, then the functions given.

    Parameters
    ----------
    model : SmolLM
    functions : dict of (layer, site) to function
        What else is to act, such as quantizers. Those at "down_in" receive the rotated activations.

    Returns
    -------
    dict of (layer, site) to function

    Raises
    ------
    ValueError
        If the functions given have the transform in front already.
    """
    check_model(model)
    functions = dict(functions)
    if any(change.startswith("rotated") and change.endswith("R4") for change in model.changes):
        for place in ((layer, "down_in") for layer in range(len(model.blocks))):
            if getattr(functions.get(place), "first", None) is fast_hadamard:
                raise ValueError(f"functions must not come from online() themselves, got those of R4 at {place!r}")
            functions[place] = chain(fast_hadamard, functions.get(place, nn.Identity()))
    return functions


def kv_quantizers(model, bits, *, r3=False, keys="token"):
    """Functions for `qlab.smollm.inserted` that quantize what a KV cache stores, in the ranges of each head.

    Parameters
    ----------
    model : SmolLM
    bits : int, 2 to 16
    r3 : bool
        Rotate keys and queries by `fast_hadamard` first. Both are rotated, so that their products stay what they were.
    keys : {"token", "channel"}
        What shares a range in the keys: all channels of one token, or one channel of 32 tokens in a row. The second
        is for whole texts: a token that comes alone, as in `qlab.smollm.generate`, is a block of its own and hardly
        changes, as KIVI keeps the newest tokens in float. In values, always one token.

    Returns
    -------
    dict of (layer, site) to function
        At "keys" and "values", and with ``r3`` at "queries".

    Raises
    ------
    ValueError
        If ``bits`` is out of range, or there are no such ``keys``.

    References
    ----------
    Liu et al. 2025, "SpinQuant", section 3.1 (R3); Ashkboos et al. 2024, "QuaRot", section 4; Liu et al. 2024, "KIVI:
    a tuning-free asymmetric 2bit quantization for KV cache", section 3 (keys by channel).
    """
    check_model(model)
    if keys not in ("token", "channel"):
        raise ValueError(f"keys must be 'token' or 'channel', got {keys!r}")
    layers = range(len(model.blocks))
    functions = dynamic_quantizers("token", bits, places=[(i, site) for i in layers for site in ("keys", "values")])
    if keys == "channel":
        functions |= {(i, "keys"): partial(_by_channel, functions[i, "keys"]) for i in layers}
    if r3:
        for i in layers:
            functions |= {(i, "queries"): fast_hadamard, (i, "keys"): chain(fast_hadamard, functions[i, "keys"])}
    return functions


def _by_channel(quantizer, x):
    """Quantize ``x``, shape (..., tokens, channels), in the ranges of each channel of 32 tokens in a row."""
    return torch.cat([quantizer(block.mT).mT for block in x.split(_TOKENS_OF_KEYS, -2)], -2)


def chain(*functions):
    """One function that applies several, the first one first.

    Examples
    --------
    >>> chain(abs, float)(-3)
    3.0
    """
    def chained(x):
        for function in functions:
            x = function(x)
        return x

    chained.first = functions[0] if functions else None
    return chained


class CayleySGD(torch.optim.Optimizer):
    """Gradient descent that keeps the rows of a matrix orthonormal: Cayley SGD on the Stiefel manifold.

    A step, for a matrix R of shape (p, n), p ≤ n, with the gradient G, as in the code published with SpinQuant:
    U is R with rows of length 1 (and, once in 101 steps at random, from its QR decomposition);

        V = μ B − Gᵀ      M = V U      Ŵ = M − ½ Uᵀ (U M)      W = Ŵ − Ŵᵀ
        a = min(1 / (‖W‖₁ + 10⁻⁸), lr)      X = Uᵀ      Y = X + a V
        five times: Y ← X + a/2 · W (X + Y)      R ← Yᵀ      B ← W X

    W is skew-symmetric, and the loop goes to Y = (I − a/2 W)⁻¹ (I + a/2 W) X, the Cayley transform of W times X, which
    is orthogonal to the same degree as X. Each round comes closer to it by a/2 ‖W‖₂, which is far below 1/2 for
    hundreds of channels; a matrix of a few channels drifts by 1e-3 where a is at its cap, 1 / ‖W‖₁, the inverse of the
    largest sum of magnitudes in a column. ``lr`` is a cap too, not the step.

    Parameters
    ----------
    params : iterable of tensors, or of dicts
        Matrices with at most as many rows as columns, the rows orthonormal.
    lr : float, > 0
    momentum : float, 0 ≤ momentum < 1
        μ. The published code writes the new B to a temporary tensor, so that its momentum has no effect; here it does,
        as in the paper. The default, 0, is what SpinQuant uses.
    seed : int
        Of the steps that begin with a QR decomposition.

    Attributes
    ----------
    state : dict
        For each matrix: "step_size", the last a; "momentum_buffer", B.

    Raises
    ------
    ValueError
        If a number is out of range or a parameter is not such a matrix.

    References
    ----------
    Li et al. 2020, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform", algorithm 1;
    Liu et al. 2025, "SpinQuant", section 3.2.

    Examples
    --------
    >>> r = torch.eye(2, requires_grad=True)
    >>> optimizer = CayleySGD([r], lr=0.1)
    >>> for step in range(100):
    ...     optimizer.zero_grad()
    ...     loss = (r - torch.tensor([[0.6, 0.8], [-0.8, 0.6]])).square().sum()
    ...     loss.backward()
    ...     optimizer.step()
    >>> r.detach().round(decimals=4)
    tensor([[ 0.6000,  0.8000],
            [-0.8000,  0.6000]])
    """

    def __init__(self, params, lr, momentum=0.0, *, seed=0):
        self._chance = _generator(seed)
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def add_param_group(self, param_group):
        """Add matrices, as torch's optimizers do; refused, nothing is added."""
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        lr, momentum = group["lr"], group["momentum"]
        if not is_number(lr) or not 0 < lr < math.inf:
            raise ValueError(f"lr must be more than 0 and finite, got {lr!r}")
        if not is_number(momentum) or not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum!r}")
        for r in group["params"]:
            if r.ndim != 2 or r.shape[0] > r.shape[1] or r.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"params must be matrices with at most as many rows as columns, got shape "
                                 f"{tuple(r.shape)}, in float32 or float64, got {r.dtype}")
            real_array(r, "params")
        self.param_groups.append(group | {"lr": float(lr), "momentum": float(momentum)})

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every matrix that has a gradient; for none, with a ValueError, if a number is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chance, moved = self._chance.get_state(), []
        for group in self.param_groups:
            for r in group["params"]:
                if r.grad is not None:
                    moved.append((r, *self._moved(r, group["lr"], group["momentum"])))
        if not all(r_new.isfinite().all() and buffer.isfinite().all() for _, r_new, buffer, _ in moved):
            self._chance.set_state(chance)
            raise ValueError("params and their gradients must be finite, and small enough for a step to be, got "
                             f"{[float(r.grad.abs().max()) for r, *_ in moved]} as the largest entries of gradients")
        for r, r_new, buffer, a in moved:
            r.copy_(r_new)
            self.state[r].update(momentum_buffer=buffer, step_size=a)
        return loss

    def _moved(self, r, lr, momentum):
        """Where ``r`` goes, its next buffer and the step size."""
        u = r / (r.norm(dim=1, keepdim=True) + 1e-8)
        if torch.randint(1, 102, (), generator=self._chance) == 1:
            q, triangle = torch.linalg.qr(u.T)
            u = (q * triangle.diagonal().sign()).T
        v = momentum * self.state.get(r, {}).get("momentum_buffer", torch.zeros_like(r).T) - r.grad.T
        m = v @ u
        w = m - 0.5 * u.T @ (u @ m)
        w = w - w.T
        a = min(1 / (w.abs().sum(0).max().item() + 1e-8), lr)
        x = u.T
        y = x + a * v
        for _ in range(5):
            y = x + a / 2 * w @ (x + y)
        return y.T, w @ x, a


class ProxyInputs(NamedTuple):
    """What a layer-wise proxy needs of a model: normalized residual streams, and how much an error in each one counts.

    ``x`` is of shape (vectors, channels). ``weight``, of shape (vectors,), is ‖W‖²_F / ‖x Wᵀ‖², W being all rows of the
    linear layers that read x.
    """

    x: torch.Tensor
    weight: torch.Tensor


class RotationStep(NamedTuple):
    """Where the learning of a rotation stands, as `qlab.training.Step`, and the rotation."""

    step: int
    steps: int
    loss: float  # of this step's vectors or tokens, before the step
    orthogonality: float  # max |RᵀR − I| after it
    step_size: float  # a in `CayleySGD`
    rotation: torch.Tensor
    r2: torch.Tensor | None = None  # where R2 is learned too: (layers, 64, 64)


def proxy_inputs(model, tokens, *, per_site=2048, seed=0):
    """Vectors for `proxy_loss`: what q, k, v and gate, up of every layer receive for some of the tokens.

    Parameters
    ----------
    model : SmolLM
        From `fold_gains`.
    tokens : int64 tensor, shape (N, T)
    per_site : int, ≥ 1
        Tokens to take, at random; all if there are fewer. 2048 make 283 MB.
    seed : int

    Returns
    -------
    ProxyInputs
        The weight of a vector without products is 0.

    Raises
    ------
    ValueError
        If the model's gains are not folded or it was changed since, or an argument is out of range.
    """
    check_folded(model)
    check_tokens(model, tokens)
    per_site = check_integer(per_site, "per_site", 1)
    chosen = torch.zeros(tokens.numel(), dtype=torch.bool)
    chosen[torch.randperm(tokens.numel(), generator=_generator(seed))[:per_site]] = True
    old = plain_weights(model)
    readers = {(i, site): _in_units(torch.cat([old[name] for name in weight_names(i, site)]))
               for i in range(len(model.blocks)) for site in ("attn_in", "mlp_in")}
    parts, weights = [], []
    for sequence, here in zip(tokens, chosen.view_as(tokens), strict=True):
        for place, x in capture(model, sequence[None], readers).items():
            parts.append(x[here].to(readers[place]))
            products = (parts[-1] @ readers[place].T).square().sum(1)
            weights.append((readers[place].square().sum() / products).where(products > 0, 0))
    return ProxyInputs(torch.cat(parts), torch.cat(weights))


def _in_units(w):
    """``w`` times a power of 2, its largest entry from 1/2 to 1, so that no square under- or overflows."""
    w = wide(w)
    return torch.ldexp(w, -torch.frexp(w.abs().max()).exponent)


def proxy_loss(r, inputs):
    """Mean of (max x R − min x R)² · ‖W‖²_F / ‖x Wᵀ‖²: the error of quantizing x R per token relative to the products.

    The step of a token's grid goes with the range of x R, each of its rounding errors with the step, and the error of
    the product with ‖W‖_F, which no rotation changes.

    Parameters
    ----------
    r : float tensor, shape (channels, channels)
    inputs : ProxyInputs

    Returns
    -------
    float tensor, 0-d
        Its gradient flows to ``r``.

    Raises
    ------
    ValueError
        If ``r`` has another shape, or the inputs do not fit each other or have a NaN or infinity.

    Examples
    --------
    >>> inputs = ProxyInputs(torch.tensor([[3.0, 0.0], [1.0, -1.0]]), weight=torch.tensor([1.0, 2.0]))
    >>> proxy_loss(torch.eye(2), inputs).item()
    8.5
    """
    x, weight = _check_inputs(inputs)
    if not isinstance(r, torch.Tensor) or tuple(r.shape) != 2 * (x.shape[1],):
        raise ValueError(f"r must be a tensor of shape {2 * (x.shape[1],)}, got {described(r)}")
    return _proxy_loss(r.to(x.dtype), x, weight)


def _proxy_loss(r, x, weight):
    with torch.no_grad():
        turned = x @ r
        highest, lowest = turned.argmax(1), turned.argmin(1)
    # two columns of R for each vector: the gradient takes no second large product
    span = (x * (r.T[highest] - r.T[lowest])).sum(1)
    return (weight * span.square()).mean()


def _check_inputs(inputs):
    """x and weight of `ProxyInputs`, detached; a ValueError unless they are finite and fit each other."""
    if not all(isinstance(values, torch.Tensor) for values in inputs):
        raise ValueError(f"inputs must be tensors, got {', '.join(type(values).__name__ for values in inputs)}")
    x, weight = real_array(inputs[0], "inputs.x").detach(), real_array(inputs[1], "inputs.weight").detach()
    if x.ndim != 2 or tuple(weight.shape) != (len(x),):
        raise ValueError(f"inputs must be x of shape (vectors, channels) and weight of shape (vectors,), got "
                         f"{tuple(x.shape)} and {tuple(weight.shape)}")
    return x, weight


def output_error(r, products, bits=4):
    """How wrong layers become when x R is quantized per token: ‖(Q(x R) − x R) Rᵀ Wᵀ‖ / ‖x Wᵀ‖, in percent.

    What `proxy_loss` only expects; weights stay in float.

    Parameters
    ----------
    r : float tensor, shape (channels, channels)
        Orthogonal.
    products : dict of (layer, site) to pair (x, w)
        From `qlab.outliers.products`, of a model whose gains are folded.
    bits : int, 2 to 16

    Returns
    -------
    float
        Mean over all tokens of all places; tokens whose products are 0 do not count.

    Raises
    ------
    ValueError
        If ``r`` is no rotation of the channels, or ``bits`` is out of range.

    Examples
    --------
    >>> x, w = torch.tensor([[15.0, 1.4]]), torch.eye(2)
    >>> round(output_error(torch.eye(2), {(0, "attn_in"): (x, w)}), 2)
    2.66
    """
    errors = []
    for place in products.values():
        x, w = map(wide, place)
        turned = x @ _check_orthogonal(r, "r", x.shape[1]).to(x)
        wrong = fake_quantize(turned, params_of(turned, "token", bits)) - turned
        size = (x @ w.T).norm(dim=1)
        errors.append(((wrong @ r.T.to(x) @ w.T).norm(dim=1) / size)[size > 0])
    return 100 * torch.cat(errors).mean().item()


def learn_rotation(inputs, *, start, steps=200, lr=1.5, batch_size=4096, seed=0):
    """Learn R1 by `CayleySGD` on `proxy_loss`; ``lr`` falls to 0 along half a cosine.

    Leave the loop to stop early. `qlab.explorers.watch` draws it.

    Parameters
    ----------
    inputs : ProxyInputs
    start : float tensor, shape (channels, channels)
        Orthogonal, such as a `random_hadamard`.
    steps : int, ≥ 1
    lr : float, > 0
        The most that the step size may be.
    batch_size : int, ≥ 1
        Vectors drawn for each step.
    seed : int

    Returns
    -------
    iterator of RotationStep
        One after each step. It has a length, so that ``tqdm(learn_rotation(...))`` knows the end.

    Raises
    ------
    ValueError
        If ``start`` is not orthogonal or does not fit the inputs, the inputs do not fit each other or have a NaN or
        infinity, or a number is out of range; from the iterator, if a gradient becomes infinite.

    References
    ----------
    Liu et al. 2025, "SpinQuant", section 4.1, which minimizes the cross-entropy of the whole quantized network instead,
    on 800 sequences of 2048 tokens.

    Examples
    --------
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1.0, 1.0, 1.0])
    >>> inputs = ProxyInputs(x, torch.ones(1000))
    >>> for step in learn_rotation(inputs, start=random_orthogonal(4, seed=0), steps=50):
    ...     pass
    >>> proxy_loss(random_orthogonal(4, seed=0), inputs).item() > proxy_loss(step.rotation, inputs).item()
    True
    """
    x, weight = _check_inputs(inputs)
    start = _check_orthogonal(start, "start", x.shape[1])
    batch_size, chance = check_integer(batch_size, "batch_size", 1), _generator(seed)
    r = nn.Parameter(start.to(x.dtype, copy=True))

    def loss():
        batch = torch.randint(len(x), (batch_size,), generator=chance)
        return _proxy_loss(r, x[batch], weight[batch])

    return descend(loss, [r], steps=steps, lr=lr, seed=seed)


def descend(loss, rotations, *, steps, lr, seed):
    """Minimize ``loss()`` over rotations by `CayleySGD`; the first is R1, the others are the R2 of the layers.

    Returns
    -------
    iterator of RotationStep
        As `learn_rotation`, with the step size of R1 and the largest deviation of any of them from orthogonal.
    """
    steps = check_integer(steps, "steps", 1)
    optimizer = CayleySGD(rotations, lr, seed=seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def run():
        for step in range(1, steps + 1):
            with torch.enable_grad():
                value = loss()
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            schedule.step()
            r1, *r2 = found = [r.detach().clone() for r in rotations]
            deviation = max((r.T @ r - torch.eye(len(r)).to(r)).abs().max().item() for r in found)
            yield RotationStep(step, steps, value.item(), deviation, optimizer.state[rotations[0]]["step_size"], r1,
                               torch.stack(r2) if r2 else None)

    return Steps(run(), steps)


@lru_cache
@torch.inference_mode(False)  # a tensor made in inference mode could never take part in a backward pass
def _factor(n):
    """The Hadamard matrix of one factor of the order: Paley's for 12 and 20, Sylvester's else."""
    if n in _PALEY:
        q = n - 1
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))])
        skew = torch.zeros(n, n)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = character[(torch.arange(q)[:, None] - torch.arange(q)) % q]
        return skew + torch.eye(n)
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    return h


def _factors(n):
    """Orders of `_factor` whose product is n; None if there are none."""
    counts = {}
    for prime in (2, 3, 5):
        counts[prime] = 0
        while n % prime == 0:
            n, counts[prime] = n // prime, counts[prime] + 1
    twos = counts[2] - 2 * counts[3] - 2 * counts[5]
    if n > 1 or twos < 0:
        return None
    fives, rest = divmod(twos, _BUTTERFLIES.bit_length() - 1)
    return [12] * counts[3] + [20] * counts[5] + [2**rest] * (rest > 0) + [_BUTTERFLIES] * fives


def check_folded(model):
    """A ValueError unless the model comes from `fold_gains`, and nothing was done to it since."""
    check_model(model)
    if not model.changes or model.changes[-1] != "gains folded":
        raise ValueError(f"model must come from fold_gains, got one that was changed: "
                         f"{', '.join(model.changes) or 'not at all'}")


def _check_order(n):
    n = check_integer(n, "n", 1)
    factors = _factors(n)
    if factors is None:
        twos, twelves, twenties = (range(n.bit_length() // bits + 1) for bits in (1, 3, 4))
        orders = [2**i * 12**j * 20**k for i, j, k in product(twos, twelves, twenties)]
        below, above = max(m for m in orders if m < n), min(m for m in orders if m > n)
        raise ValueError(f"n must be a product of factors 2, 12 and 20, such as {below} or {above}, got {n}")
    return factors


def _check_orthogonal(r, name, n, layers=None):
    """``r`` in float64; a ValueError unless it is an orthogonal (n, n) matrix, or one for each of some layers."""
    shapes = [(n, n)] + [(layers, n, n)] * (layers is not None)
    if not isinstance(r, torch.Tensor) or tuple(r.shape) not in shapes:
        raise ValueError(f"{name} must be a tensor of shape {' or '.join(map(str, shapes))}, got {described(r)}")
    r = real_array(r.detach(), name).double()
    deviation = (r.mT @ r - torch.eye(n).to(r)).abs().max().item()
    if deviation > _ORTHOGONAL:
        raise ValueError(f"{name} must be orthogonal, max |RᵀR − I| at most {_ORTHOGONAL}, got {deviation:.3g}")
    return r


def _check_float(dtype):
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a torch.dtype of floats, got {dtype}")
    return dtype


def _generator(seed):
    return torch.Generator().manual_seed(check_integer(seed, "seed", None) % 2**64)  # as torch does with negative ones
