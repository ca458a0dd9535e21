"""Calibration: choosing the range [α, β] that a quantizer covers.

A narrow range has small steps and clips the tails; a wide one keeps the tails and rounds coarsely. Every calibrator
here takes data and returns ``(alpha, beta)``, Python floats for `qlab.affine.range_params`; they differ in what they
call best. `ErrorProfile` answers the question underneath, exactly: how large is the error of *this* range?

Each calibrator also takes an `ErrorProfile` in place of the array, which saves sorting the data again.
"""

import math

import numpy as np

from qlab.affine import (
    LARGEST_END,
    ErrorSplit,
    as_numpy,
    check_bits,
    dequantize,
    is_number,
    numpy_array,
    plain_array,
    range_params,
)

_BLOCK = 8  # values per stored prefix sum, so that the sums take two bytes for each value
_PART = 2**16  # values at a time, where a whole array of float64 would take too much memory
_MOST_LEVELS = 2**13  # levels handled at once when many ranges are asked for: fits the processor's caches
_LEAST_SCALE = float(np.finfo(np.float32).smallest_normal)
_KL_BINS = 2048
_GAUSS_MAD = math.sqrt(2 / math.pi)  # mean |x − μ| / σ of a normal distribution
_LAPLACE_MAD = math.sqrt(1 / 2)  # and of a Laplace distribution


class ErrorProfile:
    """Exact quantization error of any range, at a cost that hardly grows with the data.

    The data is sorted once and prefix sums of x and x² are kept. The values that a grid rounds to one level are then
    a slice of the sorted array, found by binary search at the midpoints between levels, and their squared error

        Σ (x − level)² = Σ x² − 2 · level · Σ x + n · level²

    is three differences of prefix sums. One grid costs O(2^b log N) instead of O(N); nothing is approximated, apart
    from floating-point rounding, which stays below 1e-13 of the largest x².

    Parameters
    ----------
    x : float array, any shape
        The data. A sorted copy is kept, and two bytes of sums for each value.
    overwrite_x : bool
        Sort ``x`` itself in place of a copy, to save memory.

    Attributes
    ----------
    n : int
        Number of values.
    min, max, mean, std : float
        Of the data, in its units.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN, an infinity or a magnitude of more than 1.7e38, where no range may end.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal(100_000, dtype=np.float32)
    >>> profile = ErrorProfile(x)
    >>> print(f"{profile.mse(-4, 4, bits=4):.4f} {profile.mse(-2.5, 2.5, bits=4):.4f}")
    0.0237 0.0116
    """

    def __init__(self, x, *, overwrite_x=False):
        x = numpy_array(x, "x")
        self.n, (self.min, self.max) = x.size, _reachable_ends(x, "x")
        self._x = x.reshape(-1) if overwrite_x and x.flags.writeable else x.flatten()
        self._x.sort()
        blocks = self._x[: self._x.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        zero = np.searchsorted(blocks[:, 0], 0)
        self._sums = _running(blocks.sum(axis=1, dtype=np.float64), zero)
        self._squares = _running(np.einsum("ij,ij->i", blocks, blocks, dtype=np.float64), zero)
        middle = float(self._x[self.n // 2])
        self.mean = middle + sum(float(part.sum()) for part in self._from(middle)) / self.n
        self._unit = 2.0**-600 if self.max - self.min < 2.0**-400 else 1.0  # in which no square of a deviation is 0
        self.std = self._unit * math.sqrt(self._mean_deviation(2))

    def __repr__(self):
        return f"ErrorProfile({self.n} values from {self.min:.6g} to {self.max:.6g})"

    def mse(self, alpha, beta, bits=8, *, symmetric=False):
        """Mean squared error of quantizing the data over the range [alpha, beta].

        Parameters
        ----------
        alpha, beta : float or arrays that broadcast
            Ends of the range, as for `qlab.affine.range_params`. Arrays ask for many ranges at once.
        bits : int, 2 to 16
        symmetric : bool
            As for `qlab.affine.range_params`.

        Returns
        -------
        float, or float64 array of the broadcast shape
            In the squared units of the data: what ``mse(x, fake_quantize(x, params))`` gives.

        Raises
        ------
        ValueError
            If an end is not finite or beyond ±1.7e38, ``alpha >= beta`` or ``bits`` is out of range.
        """
        return self.split(alpha, beta, bits, symmetric=symmetric).total

    def split(self, alpha, beta, bits=8, *, symmetric=False):
        """The same error in two parts: `qlab.affine.ErrorSplit` with ``rounding``, ``clipping`` and ``total``.

        Parameters, errors and units as `mse`.

        Examples
        --------
        >>> ErrorProfile([0.25, 1.0, 5.0]).split(-4, 3, bits=3).clipping
        1.3333333333333333
        """
        bits = check_bits(bits)
        alpha, beta = numpy_array(alpha, "alpha"), numpy_array(beta, "beta")
        try:
            alpha, beta = np.broadcast_arrays(alpha, beta)
        except ValueError:
            raise ValueError(f"alpha and beta must have shapes that broadcast, got {alpha.shape} and {beta.shape}"
                             ) from None
        ends = np.stack([alpha.ravel(), beta.ravel()])
        parts = np.empty_like(ends, dtype=np.float64)
        step = max(1, _MOST_LEVELS // 2**bits)
        for first in range(0, ends.shape[1], step):
            some = slice(first, first + step)
            params = range_params(*ends[:, some].tolist(), bits, symmetric=symmetric, axis=0)
            codes = np.arange(params.qmin, params.qmax + 1)
            levels = dequantize(np.tile(codes, (params.scale.size, 1)), params)
            parts[:, some] = self._squared_error(levels)
        rounding, clipping = (parts / self.n).reshape(2, *alpha.shape)
        if alpha.ndim == 0:
            return ErrorSplit(float(rounding), float(clipping))
        return ErrorSplit(rounding, clipping)

    def histogram(self, bins):
        """Counts of the data in bins, as `numpy.histogram`, in O(bins · log N).

        Parameters
        ----------
        bins : int or array of increasing edges
            A number of equal bins from min to max, at least 1, or their edges, at least 2.

        Returns
        -------
        counts : int64 array, shape (bins,)
        edges : float array, shape (bins + 1,)

        Raises
        ------
        ValueError
            If ``bins`` is neither.

        Examples
        --------
        >>> ErrorProfile([0, 1, 1, 4]).histogram([0, 1, 2, 4])[0].tolist()
        [1, 2, 1]
        """
        edges = np.histogram_bin_edges(self._x[[0, -1]], _check_bins(bins, or_edges=True))
        below = self._count_below(edges)
        below[-1] = self._count_below(edges[-1:], or_equal=True)[0]
        return np.diff(below), edges

    def magnitude_histogram(self, bins):
        """Counts of |x| in ``bins`` equal bins from 0 to max |x|. Returns ``(counts, edges)``."""
        edges = np.linspace(0.0, max(-self.min, self.max) or 1.0, _check_bins(bins) + 1)
        above = self._count_below(edges)  # non-negative values below each edge, plus all negative ones
        below = self._count_below(-edges, or_equal=True)
        above[-1], below[0], below[-1] = self.n, above[0], 0
        return np.diff(above) - np.diff(below), edges

    def quantile(self, q):
        """The value below which a share ``q`` of the data lies, 0 ≤ q ≤ 1, interpolated as `numpy.quantile`."""
        return _interpolate(self._x, _check_share(q) * (self.n - 1))

    def magnitude_quantile(self, q):
        """The quantile of |x|, 0 ≤ q ≤ 1."""
        rank = _check_share(q) * (self.n - 1)
        tail = self.n - math.floor(rank)  # as many of the largest |x| are wanted: they lie at the two ends
        ends = self._x if 2 * tail >= self.n else np.concatenate([self._x[:tail], self._x[-tail:]])
        return _interpolate(np.sort(np.abs(ends))[-tail:], rank - math.floor(rank))

    def share_outside(self, low, high):
        """The share of values that are less than ``low`` or more than ``high``, 0 to 1."""
        below = self._count_below(np.array([low]))[0]
        return float(below + self.n - self._count_below(np.array([high]), or_equal=True)[0]) / self.n

    def mean_absolute_deviation(self):
        """Mean |x − mean|, in the units of the data."""
        return self._unit * self._mean_deviation(1)

    def _mean_deviation(self, power):
        """Mean |x − mean|^power: from the values, since differences of sums are too coarse where the mean is large."""
        return sum(float((np.abs(part / self._unit) ** power).sum()) for part in self._from(self.mean)) / self.n

    def _from(self, centre):
        """x − centre in float64, some values at a time."""
        return (np.subtract(self._x[i:i + _PART], centre, dtype=np.float64) for i in range(0, self.n, _PART))

    def _squared_error(self, levels):
        """Σ (x − nearest level)² for the values inside the levels and for those outside; levels (k, L) ascending."""
        levels = levels.astype(np.float64)
        ends = np.zeros_like(levels[:, :1], dtype=np.int64)
        borders = np.concatenate([levels[:, :1], (levels[:, 1:] + levels[:, :-1]) / 2, levels[:, -1:]], axis=1)
        borders = np.concatenate([ends, self._count_below(borders), ends + self.n], axis=1)
        nearest = np.concatenate([levels[:, :1], levels, levels[:, -1:]], axis=1)  # low tail, levels, high tail
        sums, squares = self._sums_below(borders)
        error = np.diff(squares) - 2 * nearest * np.diff(sums) + np.diff(borders) * nearest**2
        return np.maximum(error[:, 1:-1].sum(axis=1), 0.0), np.maximum(error[:, 0] + error[:, -1], 0.0)

    def _count_below(self, values, or_equal=False):
        """How many values are less than (or equal to) each of ``values``, compared exactly in the data's precision."""
        dtype = self._x.dtype.type
        with np.errstate(over="ignore"):
            rounded = values.astype(dtype)
        toward, misses = (-np.inf, rounded > values) if or_equal else (np.inf, rounded < values)
        exact = np.where(misses, np.nextafter(rounded, dtype(toward)), rounded)
        return np.searchsorted(self._x, exact, side="right" if or_equal else "left")

    def _sums_below(self, index):
        """Σ x and Σ x² up to a constant of the first ``index`` values: blocks from the table, the rest added here."""
        block = index // _BLOCK
        position = np.minimum(block[..., None] * _BLOCK + np.arange(_BLOCK), self.n - 1)
        rest = np.where(np.arange(_BLOCK) < (index % _BLOCK)[..., None], self._x[position], 0).astype(np.float64)
        return self._sums[block] + rest.sum(axis=-1), self._squares[block] + (rest * rest).sum(axis=-1)


def minmax(x, *, symmetric=False):
    """The smallest and the largest value: nothing is clipped.

    Parameters
    ----------
    x : float array or ErrorProfile
    symmetric : bool
        Return (−max|x|, max|x|), the range of absmax.

    Returns
    -------
    alpha, beta : float

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity.

    References
    ----------
    Nagel et al. 2021, "A white paper on neural network quantization", section 3.1.

    Examples
    --------
    >>> minmax([5.47, 3.08, -7.59, 0, -1.95, -4.57, 10.8])
    (-7.59, 10.8)
    """
    low, high = (x.min, x.max) if isinstance(x, ErrorProfile) else _ends(numpy_array(x, "x"))
    return _around_zero(max(-low, high)) if symmetric else (low, high)


def moving_minmax(batches, averaging_constant=0.01):
    """Exponential moving average of the batches' minima and maxima.

    The first batch sets the range; each further one moves it by ``averaging_constant`` of the difference.

    Parameters
    ----------
    batches : iterable of float arrays
    averaging_constant : float, 0 < c ≤ 1

    Returns
    -------
    alpha, beta : float

    Raises
    ------
    ValueError
        If there is no batch, one is empty or has a NaN, an infinity or a magnitude of more than 1.7e38, or the
        constant is out of range.

    References
    ----------
    Jacob et al. 2018, section 3.1.

    Examples
    --------
    >>> moving_minmax([[-1.0, 1.0], [-3.0, 11.0]], averaging_constant=0.1)
    (-1.2, 2.0)
    """
    if not is_number(averaging_constant) or not 0 < averaging_constant <= 1:
        raise ValueError(f"averaging_constant must be more than 0 and at most 1, got {averaging_constant!r}")
    if not np.iterable(batches):
        raise ValueError(f"batches must be an iterable of arrays, got {repr(batches)[:60]}")
    average = None
    for batch in batches:
        values = numpy_array(batch, "batch")
        _reachable_ends(values, "batch")
        ends = np.stack([values.min(), values.max()])
        average = ends if average is None else average + averaging_constant * (ends - average)
    if average is None:
        raise ValueError("batches must hold at least one batch, got none")
    return _ends(average)


def percentile(x, p, *, symmetric=False):
    """The (100 − p)-th and the p-th percentile: a share of 100 − p percent is clipped at each end.

    Parameters
    ----------
    x : float array or ErrorProfile
    p : float, 50 < p ≤ 100
        In percent; 99.99 is a usual choice.
    symmetric : bool
        The p-th percentile of |x| on both sides.

    Returns
    -------
    alpha, beta : float

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, or ``p`` is outside (50, 100].

    References
    ----------
    Wu et al. 2020, "Integer quantization for deep learning inference", section 3.4.

    Examples
    --------
    >>> percentile(np.arange(-100.0, 101.0), 95)
    (-90.0, 90.0)
    """
    if not is_number(p) or not 50 < p <= 100:
        raise ValueError(f"p must be more than 50 and at most 100, got {p!r}")
    p, profile = float(p), as_profile(x)
    if symmetric:
        return _around_zero(profile.magnitude_quantile(p / 100))
    return profile.quantile((100 - p) / 100), profile.quantile(p / 100)


def mse(x, bits=8, *, symmetric=False):
    """The range inside min-max with the least mean squared error, by search over exact errors.

    With ``symmetric``, a thousand ranges are tried, then finer ones around the best. Otherwise the best of a coarse
    grid over both ends, and of min-max shrunk, is where they start to move in turn, each over many places, until
    neither finds less error.

    Parameters
    ----------
    x : float array or ErrorProfile
    bits : int, 2 to 16
    symmetric : bool
        Search ranges [−c, c] for the symmetric quantizer.

    Returns
    -------
    alpha, beta : float

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, or ``bits`` is out of range.

    References
    ----------
    Nagel et al. 2021, section 3.1.

    Examples
    --------
    >>> x = np.append(np.random.default_rng(0).standard_normal(100_000), 50.0)
    >>> alpha, beta = mse(x, bits=8, symmetric=True)
    >>> print(f"{beta:.1f}")
    33.2
    """
    bits = check_bits(bits)
    profile = as_profile(x)
    low, high = min(profile.min, 0.0), max(profile.max, 0.0)
    if symmetric:
        low, high = _around_zero(max(-low, high))
    if high - low <= _LEAST_SCALE * (2**bits - 1 - symmetric):  # every range has the same step
        return low, high
    if symmetric:
        return _around_zero(high * _search(lambda r: profile.mse(-r * high, r * high, bits, symmetric=True)))
    shrink, coarse = np.linspace(0.002, 1, 500), np.linspace(0, 1, 17)
    alphas, betas = np.meshgrid(low * coarse, high * coarse[1:] if high > 0 else 0.0)
    alphas, betas = np.append(low * shrink, alphas), np.append(high * shrink, betas)
    some = alphas < betas
    alphas, betas = alphas[some], betas[some]
    best = np.argmin(profile.mse(alphas, betas, bits))
    alpha, beta = float(alphas[best]), float(betas[best])
    least = profile.mse(alpha, beta, bits)
    places = 1000 if bits <= 5 else 200  # few levels make the error jagged, many make it smooth
    while True:
        if high > 0:
            beta = high * _search(lambda r, alpha=alpha: profile.mse(alpha, r * high, bits), places, beta / high)
        if low < 0:
            alpha = low * _search(lambda r, beta=beta: profile.mse(r * low, beta, bits), places, alpha / low)
        before, least = least, profile.mse(alpha, beta, bits)
        if least >= before * (1 - 1e-6):
            return alpha, beta


def entropy(x, bits=8):
    """The range whose quantized histogram loses the least information: TensorRT's calibration.

    |x| is counted in 2048 bins. For each i from 2^(b−1) to 2048, P is the first i bins with everything beyond added
    to the last of them, and Q is those bins without the addition, merged evenly to 2^(b−1) levels and spread again
    over the bins that were not empty. The i with the smallest KL divergence of P from Q gives the threshold
    (i + ½) bin widths.

    Parameters
    ----------
    x : float array or ErrorProfile
    bits : int, 2 to 16
        8 bits have 128 levels of magnitude, not 256, unless no value is negative. Where the levels are no fewer than
        the bins, the whole range is the only candidate.

    Returns
    -------
    alpha, beta : float
        (−T, T), or (0, T) for data without negative values; T is at most max |x|.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, or ``bits`` is out of range.

    References
    ----------
    Migacz 2017, "8-bit inference with TensorRT", pseudocode of the entropy calibration. How bins are merged is not
    said there; the even split, and bin 0 set to the count of bin 1, are those of NVIDIA's Model Optimizer. Libraries
    that merge whole numbers of bins of a signed histogram (MXNet, ONNX Runtime) find other thresholds.

    Examples
    --------
    >>> x = np.append(np.random.default_rng(0).standard_normal(100_000), 50.0)
    >>> alpha, beta = entropy(x)
    >>> print(f"{beta:.2f}")
    4.04
    """
    bits = check_bits(bits)
    profile = as_profile(x)
    if profile.min == profile.max == 0:
        return 0.0, 0.0
    counts, edges = profile.magnitude_histogram(_KL_BINS)
    counts[0] = counts[1]  # a spike at 0, the output of a ReLU, is exact in every grid and must not count
    levels = min(2 ** (bits - (profile.min < 0)), _KL_BINS)
    candidates = range(levels, _KL_BINS + 1)
    best = min(reversed(candidates), key=lambda i: _divergence(counts, i, levels))
    threshold = min((best + 0.5) / _KL_BINS * float(edges[-1]), float(edges[-1]))
    return (0.0, threshold) if profile.min >= 0 else _around_zero(threshold)


def aciq(x, bits=8, distribution="auto"):
    """The range that would be best if the data were normal or Laplace distributed (ACIQ).

    The mean and the width are taken from the data; the optimal clip for 2^b levels follows from minimizing clipping
    error + α² / (3 · 4^b) for that distribution. Which distribution to take, the authors' code leaves to the user:
    "auto" is a rule of this package.

    Parameters
    ----------
    x : float array or ErrorProfile
    bits : int, 2 to 16
    distribution : {"auto", "gauss", "laplace"}
        "auto" takes the one whose mean |x − μ| / σ is nearer to the data's.

    Returns
    -------
    alpha, beta : float
        μ − t and μ + t.

    Raises
    ------
    ValueError
        If ``x`` is empty or has a NaN or infinity, ``bits`` is out of range or ``distribution`` has another value.

    References
    ----------
    Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
    the section on ACIQ and its supplement.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal(100_000)
    >>> print("{:.2f} {:.2f}".format(*aciq(x, bits=4)))
    -2.56 2.56
    """
    bits = check_bits(bits)
    if distribution not in ("auto", "gauss", "laplace"):
        raise ValueError(f"distribution must be 'auto', 'gauss' or 'laplace', got {distribution!r}")
    profile = as_profile(x)
    deviation = profile.mean_absolute_deviation()
    if distribution == "auto":
        closer_to_gauss = deviation > profile.std * (_GAUSS_MAD + _LAPLACE_MAD) / 2
        distribution = "gauss" if closer_to_gauss else "laplace"
    width = profile.std if distribution == "gauss" else deviation
    clip = width * aciq_clip(bits, distribution)
    return profile.mean - clip, profile.mean + clip


def aciq_clip(bits, distribution):
    """The optimal clip of ACIQ in units of σ ("gauss") or of Laplace's b ("laplace").

    Examples
    --------
    >>> [round(aciq_clip(bits, "laplace"), 2) for bits in range(2, 9)]
    [2.83, 3.9, 5.03, 6.2, 7.41, 8.65, 9.9]
    """

    def slope(t):  # half the derivative of the expected error
        if distribution == "laplace":
            return t / (3 * 4**bits) - math.exp(-t)
        tail = _GAUSS_MAD * math.exp(-(t**2) / 2) - t * math.erfc(t / math.sqrt(2))
        return t / (3 * 4**bits) - tail

    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


def as_profile(x):
    """``x`` itself if it is an `ErrorProfile`, else its profile."""
    return x if isinstance(x, ErrorProfile) else ErrorProfile(x)


def _ends(x):
    return float(x.min()), float(x.max())


def _reachable_ends(x, name):
    low, high = _ends(x)
    if max(-low, high) > LARGEST_END:
        raise ValueError(f"{name} must be from {-LARGEST_END:.3g} to {LARGEST_END:.3g}, where ranges may end, "
                         f"got {low:.3g} to {high:.3g}")
    return low, high


def _around_zero(threshold):
    return -threshold, threshold


def _running(block_sums, zero):
    """Prefix sums, up to a constant, added from block ``zero`` outwards: small, and so exact, where the values are."""
    below, above = -_prefix_sums(block_sums[:zero][::-1])[::-1], _prefix_sums(block_sums[zero:])
    return np.concatenate([below, [0.0], above])


def _prefix_sums(x):
    """Cumulative sums, each as if rounded once: what every addition lost is known exactly (TwoSum), and added too.

    Ogita, Rump and Oishi 2005, "Accurate sum and dot product", algorithms 3.1 and 4.4.
    """
    sums = np.cumsum(x)
    before, after = sums[:-1], sums[1:]
    added = after - before
    lost = (before - (after - added)) + (x[1:] - added)
    after += np.cumsum(lost)
    return sums


def _check_share(q):
    if not is_number(q) or not 0 <= q <= 1:
        raise ValueError(f"q must be from 0 to 1, got {q!r}")
    return float(q)


def _check_bins(bins, or_edges=False):
    """``bins`` as an int or as an array of edges; a ValueError unless it is one that is allowed."""
    try:
        array = as_numpy(plain_array(bins, "bins"))
    except ValueError:
        array = np.array("")
    if array.ndim == 0 and array.dtype.kind in "iu" and array >= 1:
        return int(array)
    edges = or_edges and array.ndim == 1 and array.size >= 2 and array.dtype.kind in "iuf"
    if edges and np.isfinite(array).all() and (array[:-1] < array[1:]).all():
        return array
    allowed = "an integer of at least 1" + ", or at least 2 finite edges that increase" * or_edges
    raise ValueError(f"bins must be {allowed}, got {repr(bins)[:60]}")


def _interpolate(ascending, rank):
    below = math.floor(rank)
    low, high = float(ascending[below]), float(ascending[min(below + 1, ascending.size - 1)])
    return low + (high - low) * (rank - below)


def _search(error, places=1000, start=None):
    """The ratio in (0, 1] with the least ``error(ratios)``: evenly spaced ones and ``start``, then finer around it."""
    ratios = np.arange(1, places + 1) / places
    if start is not None:
        ratios = np.append(ratios, start)
    best, width = ratios[np.argmin(error(ratios))], 1 / places
    for _ in range(2):
        ratios = np.append(np.linspace(max(best - width, 1e-6), min(best + width, 1), 41), best)
        best, width = ratios[np.argmin(error(ratios))], width / 20
    return float(best)


def _divergence(counts, i, levels):
    """KL divergence of the first ``i`` bins, the tail added to the last one, from themselves merged to ``levels``."""
    p = counts[:i].astype(np.float64)
    p[-1] += counts[i:].sum()
    filled = counts[:i] > 0
    if not filled[-1] and p[-1]:
        return math.inf  # the tail has landed in a bin that the merged histogram leaves empty
    starts = -(-np.arange(levels) * i // levels)  # bin k belongs to level ⌊k · levels / i⌋
    filled_in_level = np.add.reduceat(filled, starts, dtype=np.int64)
    mean_in_level = np.add.reduceat(counts[:i], starts) / np.maximum(filled_in_level, 1)
    q = np.repeat(mean_in_level, np.diff(np.append(starts, i)))[filled]
    p = p[filled]
    return float((p / p.sum() * np.log(p / p.sum() * q.sum() / q)).sum())
