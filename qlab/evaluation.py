"""How far a changed language model is from the one that it was, measured so that small differences show.

Three texts ship with the course, and a fourth to calibrate with. A `Judge` knows what the model as it is expects at
every token of a text, and compares another model with it:

    judge = Judge(model, texts(model)["prose"][:8])
    hadamard, learned = judge.compare(one), judge.compare(another)
    print(hadamard)
    print(learned.versus(hadamard))

Every number comes with an interval. Where it does not tell two models apart, it is printed as "not resolved".
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from qlab import samples
from qlab.smollm import check_model, check_tokens, predicted, wide

TEXTS = ("prose", "code", "documentation", "calibration")
"""Paragraphs of this course, which no model has met; its own code; paragraphs of Python's documentation; other
paragraphs of that, and code of Python's own, to calibrate with."""
LENGTH = 256
BLOCK = 16
"""Tokens in a row that are drawn together: what happens at one token tells about its neighbours."""
_SEQUENCES = 32
_DRAWS = 2000
_ROWS = 8  # logits of so many at a time go through the softmax: 1.5 MB stay in the processor's cache


def texts(model):
    """Tokens of the texts that ship: three to judge on, one to calibrate with.

    A text takes turns at its sources, 1,200 characters at a time: the first eight sequences are a sample of many.

    Parameters
    ----------
    model : SmolLM
        For its tokenizer.

    Returns
    -------
    dict of str to int64 tensor, shape (32, 256)
        By the names in ``TEXTS``. No twelve words in a row stand in two of them. The files are the same with every
        version of Python; `qlab.studies.texts` made them.

    Raises
    ------
    ValueError
        If ``model`` is none, or has no tokenizer.
    """
    check_model(model)
    found = {}
    for name in TEXTS:
        text = (samples.FOLDER / f"text_{name}.txt").read_text(encoding="utf-8")
        found[name] = model.encode(text)[0, :_SEQUENCES * LENGTH].view(_SEQUENCES, LENGTH)
    return found


@dataclass(frozen=True)
class Comparison:
    """What `Judge.compare` finds; printed, one line. Intervals are of 95 %.

    Attributes
    ----------
    ratio, low, high : float
        Perplexity of the other model divided by the reference's, and its interval.
    kl, kl_low, kl_high : float
        Mean Kullback-Leibler divergence, in nats, from the reference's distribution of the next token to the other's,
        Σ p ln(p / q); 0 for the same model.
    agreement : float, 0 to 1
        How often both think the same token the likeliest.
    nll, divergence, reference_nll : float64 arrays, shape (N, T − 1)
        At each token: −ln of its probability in the other model; the divergence; −ln of its probability in the
        reference.

    Examples
    --------
    >>> print(Comparison(1.005, 0.996, 1.015, 0.0139, 0.0127, 0.0153, 0.922))
    KL 0.0139 [0.0127, 0.0153]  same top-1 92.2 %  perplexity × 1.005 [0.996, 1.015] not resolved
    """

    ratio: float
    low: float
    high: float
    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    nll: np.ndarray = field(default=None, repr=False, compare=False)
    divergence: np.ndarray = field(default=None, repr=False, compare=False)
    reference_nll: np.ndarray = field(default=None, repr=False, compare=False)

    @property
    def resolved(self):
        """Whether the interval of the perplexity ratio excludes 1."""
        return _excludes_1(self.low, self.high)

    def versus(self, other):
        """This model against another one that the same judge has compared, token by token.

        Parameters
        ----------
        other : Comparison

        Returns
        -------
        Contrast
            This one's numbers divided by those of ``other``: below 1 where this one is nearer to the reference.

        Raises
        ------
        ValueError
            If ``other`` is none, or of another text or reference.
        """
        if not isinstance(other, Comparison):
            raise ValueError(f"other must be a Comparison, got {type(other).__name__}")
        if self.reference_nll is None or not np.array_equal(self.reference_nll, other.reference_nll):
            raise ValueError("other must come from the same judge: its text or its reference is another one")
        return Contrast(*_perplexity_ratio(self.nll, other.nll),
                        *_interval(self.divergence, other.divergence, positive=True))

    def __str__(self):
        return (f"KL {_with_interval(self.kl, self.kl_low, self.kl_high)}  same top-1 {100 * self.agreement:.1f} %  "
                f"perplexity {_verdict(self.ratio, self.low, self.high)}")


@dataclass(frozen=True)
class Contrast:
    """Two compared models, one divided by the other; printed, one line. Intervals are of 95 %.

    Attributes
    ----------
    ratio, low, high : float
        Perplexity of the first divided by that of the second.
    kl, kl_low, kl_high : float
        Divergence of the first from the reference, divided by that of the second: the finer measure.

    Examples
    --------
    >>> print(Contrast(0.995, 0.983, 1.008, 0.111, 0.098, 0.124))
    KL × 0.111 [0.0980, 0.124] lower  perplexity × 0.995 [0.983, 1.008] not resolved
    """

    ratio: float
    low: float
    high: float
    kl: float
    kl_low: float
    kl_high: float

    @property
    def resolved(self):
        """Whether the interval of the divergences' ratio excludes 1."""
        return _excludes_1(self.kl_low, self.kl_high)

    def __str__(self):
        return (f"KL {_verdict(self.kl, self.kl_low, self.kl_high)}  "
                f"perplexity {_verdict(self.ratio, self.low, self.high)}")


class Judge:
    """Compares models with a reference on one text, in little more than the time of one `qlab.smollm.perplexity`.

    The reference is what ``model`` is now, functions that are `inserted` included. What its head receives is kept, and
    little else: 10 MB for 2,048 tokens, where logits would take 400. For a model with another head, such as a rotated
    one, the reference's logits are computed anew, 128 tokens at a time.

    Parameters
    ----------
    model : SmolLM
        The reference. Later changes to it do not matter, except one of the numbers in its head, which is noticed.
    tokens : int64 tensor, shape (N, T)
        Such as ``texts(model)["prose"][:8]``. The first token of each sequence is given, not predicted.

    Attributes
    ----------
    perplexity : float
        The reference's.

    Raises
    ------
    ValueError
        If ``model`` is none or gives logits that are NaN or infinite, or ``tokens`` has another shape or holds what is
        not a token.

    References
    ----------
    Kullback and Leibler 1951, "On information and sufficiency". As a measure of quantized language models:
    Dutta et al. 2024, "Accuracy is not all you need".

    Examples
    --------
    >>> from qlab.smollm import Sizes, SmolLM, quantize_weights
    >>> _ = torch.manual_seed(0)
    >>> model = SmolLM(Sizes(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    >>> judge = Judge(model, torch.randint(100, (4, 65)))
    >>> judge.compare(model).kl
    0.0
    >>> coarse, fine = (judge.compare(quantize_weights(model, bits)) for bits in (4, 8))
    >>> fine.versus(coarse).resolved
    True
    """

    @torch.inference_mode()
    def __init__(self, model, tokens):
        check_tokens(model, tokens)
        self._tokens, self._head = tokens.clone(), model.head.weight.detach()
        self._probed = _probed(self._head)
        self._parts, nll = [], []
        for states, targets in predicted(model, tokens):
            logits = self._logits(states)
            normaliser, loss, top = _readings(logits, targets)
            row = None
            if logits.dtype == self._head.dtype:
                row = logits.sub_(normaliser[:, None]).exp_() @ self._head
            self._parts.append(_Part(states, normaliser, top, row))
            nll.append(loss)
        self._nll = self._by_sequence(nll, "model")
        self.perplexity = float(np.exp(self._nll.mean()))

    @torch.inference_mode()
    def compare(self, other):
        """Perplexity, divergence and agreement of another model, on this text, with paired intervals.

        Parameters
        ----------
        other : SmolLM
            Its own head gives its logits. To compare a model with itself and quantizers, call this within `inserted`.

        Returns
        -------
        Comparison
            Intervals by the bootstrap over blocks of 16 tokens, studentized, seeded. Of few tokens they are wide: no
            less than 500 make a claim.

        Raises
        ------
        ValueError
            If ``other`` is no model, has other tokens than the reference, or gives logits that are NaN or infinite; or
            the reference's head was changed in place.

        References
        ----------
        Künsch 1989, "The jackknife and the bootstrap for general stationary observations" (blocks); Efron and
        Tibshirani 1993, "An introduction to the bootstrap", section 12.5 (studentized).
        """
        check_model(other, "other")
        if len(other.embedding.weight) != len(self._head):
            raise ValueError(f"other must have the reference's {len(self._head)} tokens, got "
                             f"{len(other.embedding.weight)}")
        if not torch.allclose(_probed(self._head), self._probed, rtol=1e-4, atol=1e-4):
            raise ValueError("the reference's head must stay as it was, got one changed in place: make another Judge")
        nll, divergence, agreement = [], [], []
        for (states, targets), part in zip(predicted(other, self._tokens), self._parts, strict=True):
            theirs = wide(other.head(states))
            normaliser, loss, top = _readings(theirs, targets)
            nll.append(loss)
            if part.row is not None and _same(other.head.weight, self._head):
                difference = ((states - part.states) * part.row).sum(-1)
            else:
                difference = _mean_difference(self._logits(part.states), theirs, part.normaliser)
            divergence.append(normaliser - part.normaliser - difference)
            agreement.append(top == part.top)
        nll = self._by_sequence(nll, "other")
        divergence = self._by_sequence(divergence, "other").clip(0)
        return Comparison(
            *_perplexity_ratio(nll, self._nll), *_interval(divergence, np.ones_like(divergence), positive=True),
            float(torch.cat(agreement).double().mean()), nll, divergence, self._nll)

    def _logits(self, states):
        return wide(F.linear(states, self._head))

    def _by_sequence(self, parts, name):
        values = torch.cat(parts).double().view(len(self._tokens), -1)
        if not values.isfinite().all():
            sequence, position = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name} must give finite logits, got NaN or infinity after token {position} of sequence "
                             f"{sequence}")
        return values.numpy(force=True)


class _Part(NamedTuple):
    """Some tokens in a row, as the reference sees them.

    ``row`` is the mean of the head's rows under the reference's distribution. A model with the very same head needs no
    more: Σ p (w · h' − w · h) = (Σ p w) · (h' − h). That saves a quarter of the time.
    """

    states: torch.Tensor
    normaliser: torch.Tensor
    top: torch.Tensor
    row: torch.Tensor | None


def _probed(head):
    """What each row of a head gives for one vector, to tell whether it is still the same."""
    return head @ torch.cos(torch.arange(head.shape[1])).to(head)


def _readings(logits, targets):
    """For each row, ln Σ exp(logits), −ln p(target), and the likeliest token."""
    found = []
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        most, top = rows.max(-1)
        normaliser = (rows - most[:, None]).exp_().sum(-1).log_() + most
        found.append((normaliser, normaliser - rows.gather(-1, wanted[:, None])[:, 0], top))
    return map(torch.cat, zip(*found, strict=True))


def _mean_difference(ours, theirs, normaliser):
    """For each row, Σ p · (their logit − ours), p the reference's distribution: exactly 0 for equal logits."""
    found = []
    for a, b, n in zip(ours.split(_ROWS), theirs.split(_ROWS), normaliser.split(_ROWS), strict=True):
        found.append((b - a).mul_((a - n[:, None]).exp_()).sum(-1))
    return torch.cat(found)


def _perplexity_ratio(nll, reference_nll):
    """exp of the mean difference, and its interval."""
    difference = nll - reference_nll
    with np.errstate(over="ignore"):
        return tuple(float(np.exp(value)) for value in _interval(difference, np.ones_like(difference)))


def _interval(values, others, *, positive=False):
    """mean(values) / mean(others) with low and high end of 95 %; of ``positive`` numbers, by way of the logarithm.

    Each draw's distance from the estimate is counted in standard errors that the draw itself shows: where values are
    skewed or blocks few, that makes the interval as wide as it has to be. Of one block there is no telling.
    """
    u, v = _block_sums(values), _block_sums(others)
    if not v.any():
        return (np.inf if u.any() else 1.0,) * 3
    ratio = u.sum() / v.sum()
    error = np.sqrt(np.square(u - ratio * v).sum()) / v.sum()
    if len(u) == 1:
        return float(ratio), 0.0 if positive else -np.inf, np.inf
    if error == 0:
        return (float(ratio),) * 3
    draws = np.random.default_rng(0).multinomial(len(u), np.full(len(u), 1 / len(u)), _DRAWS)
    tiny = np.finfo(float).tiny  # instead of 0, in draws of equal blocks
    with np.errstate(all="ignore"):
        totals = draws @ v
        ratios = np.maximum(draws @ u / totals, tiny) if positive else draws @ u / totals
        squares = draws @ u**2 - 2 * ratios * (draws @ (u * v)) + ratios**2 * (draws @ v**2)
        errors = np.maximum(np.sqrt(np.maximum(squares, 0)) / totals, tiny)
        distances = np.log(ratios / ratio) * ratios / errors if positive else (ratios - ratio) / errors
        distances[np.isnan(distances)] = np.inf  # draws in which ``others`` are all 0
        far = np.quantile(distances, [0.975, 0.025], method="inverted_cdf")
        low, high = ratio * np.exp(-far * error / ratio) if positive else ratio - far * error
    return float(ratio), float(low), float(high)


def _block_sums(values):
    """Sums over ``BLOCK`` tokens in a row; the last block of a sequence can be shorter."""
    fill = -values.shape[1] % BLOCK
    return np.pad(values, ((0, 0), (0, fill))).reshape(-1, BLOCK).sum(1)


def _excludes_1(low, high):
    """To three decimals, so that no verdict says more than the interval beside it."""
    return round(low, 3) > 1 or round(high, 3) < 1


def _verdict(value, low, high):
    word = ("higher" if low > 1 else "lower") if _excludes_1(low, high) else "not resolved"
    return f"× {_with_interval(value, low, high)} {word}"


def _with_interval(value, low, high):
    """Three digits of each, and three decimals of what is near 1."""
    value, low, high = (f"{x:.3f}" if 0.5 <= x < 10 else f"{x:#.3g}" for x in (value, low, high))
    return f"{value} [{low}, {high}]"


def _same(weight, head):
    return weight.data_ptr() == head.data_ptr() and weight.dtype == head.dtype and weight.shape == head.shape
