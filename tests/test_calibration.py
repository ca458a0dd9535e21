"""Exact error profiles and the calibrators, against direct computation, torch, numpy and literal algorithms."""

import re
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.ao.quantization import observer

from qlab import affine, samples
from qlab.calibration import (
    ErrorProfile,
    aciq,
    aciq_clip,
    entropy,
    minmax,
    moving_minmax,
    mse,
    percentile,
)

PROPERTY = settings(max_examples=100)
ROUND_BLOCK = [1, 7, 8, 9, 31, 32, 33]  # the profile keeps one sum for every 8 values


@cache
def data(name):
    """Typical data, about 70,000 float32 values each."""
    if name == "sample":
        return samples.load("activations").ravel()
    rng, n = np.random.default_rng(0), 70_000
    values = {"normal": rng.standard_normal, "laplace": lambda n: rng.laplace(0.3, 1, n),
              "uniform": lambda n: rng.uniform(-1, 2, n), "relu": lambda n: np.maximum(rng.standard_normal(n), 0),
              "heavy": lambda n: rng.standard_t(2, n),
              "mixture": lambda n: np.append(rng.normal(-1, 0.1, n // 3), rng.lognormal(0, 1, n - n // 3))}[name](n)
    return values.astype(np.float32)


def direct_split(x, alpha, beta, bits, symmetric=False):
    return affine.error_split(x, affine.range_params(alpha, beta, bits, symmetric=symmetric))


def allowed_at_ties(x, params):
    """How far the direct error may be off, because float32 division puts a value on the other side of a tie."""
    scale, size = float(params.scale), np.abs(x).max().astype(np.float32)
    u = np.abs(x / np.float64(scale))
    near_tie = np.abs(u % 1 - 0.5) <= 4 * np.spacing(u.astype(np.float32))
    return 4 * scale * np.spacing(size) * near_tie.mean()


FLOATS = st.floats(-100, 100, width=32)
VALUES = (arrays(np.float32, st.integers(1, 300), elements=FLOATS)
          | arrays(np.float32, st.integers(1, 300), elements=st.sampled_from([-3.0, -0.5, 0.0, 0.5, 1.25, 40.0]))
          | st.builds(np.full, st.integers(1, 300), FLOATS, dtype=st.just(np.float32)))


@PROPERTY
@given(VALUES, FLOATS, st.floats(0.01, 300), st.integers(2, 12), st.booleans())
def test_profile_error_equals_direct(x, alpha, width, bits, symmetric):
    params = affine.range_params(alpha, alpha + width, bits, symmetric=symmetric)
    profile = ErrorProfile(x)
    rounding, clipping = profile.split(alpha, alpha + width, bits, symmetric=symmetric)
    slack = allowed_at_ties(x, params) + 1e-13 * max(np.abs(x).max(), abs(alpha), abs(alpha + width)) ** 2
    expected = affine.error_split(x, params)
    assert rounding == pytest.approx(expected.rounding, rel=1e-6, abs=slack)
    assert clipping == pytest.approx(expected.clipping, rel=1e-6, abs=slack)
    total = profile.mse(alpha, alpha + width, bits, symmetric=symmetric)
    assert total == pytest.approx(affine.mse(x, affine.fake_quantize(x, params)), rel=1e-6, abs=slack)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("symmetric", [False, True])
def test_profile_error_equals_direct_on_heavy_tails(symmetric, bits):
    x = np.random.default_rng(1).standard_t(3, 200_000).astype(np.float32)
    profile, floor = ErrorProfile(x), 1e-13 * np.mean(x**2)
    for alpha, beta in [(-4, 4), (-1, 6), (0.5, 3), minmax(x)]:
        expected = direct_split(x, alpha, beta, bits, symmetric)
        np.testing.assert_allclose(profile.split(alpha, beta, bits, symmetric=symmetric), expected, 1e-6, floor)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_profile_of_other_dtypes(dtype):
    x = (np.random.default_rng(2).standard_t(3, 5000) * 3).astype(dtype)
    np.testing.assert_allclose(ErrorProfile(x).split(-5, 9, 6), direct_split(x, -5, 9, 6), rtol=1e-6)


@pytest.mark.parametrize("n", [1, *ROUND_BLOCK])
def test_profile_at_block_ends(n):
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    profile = ErrorProfile(x)
    for alpha, beta in [(-0.5, 0.5), (-9, 9), (-1, 3), (5, 6), (-6, -5)]:
        np.testing.assert_allclose(profile.split(alpha, beta, 4), direct_split(x, alpha, beta, 4), rtol=1e-6,
                                   atol=1e-15)
    assert_statistics_equal(profile, x)


@pytest.mark.parametrize("bits", [3, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_many_ranges_at_once_equal_one_by_one(symmetric, bits):
    alpha, beta = np.linspace(-4, 0.1, 4)[:, None], np.array([0.5, 2.0, 9.0])
    profile = ErrorProfile(data("heavy"))
    together = profile.split(alpha, beta, bits, symmetric=symmetric)
    singles = [[profile.split(float(a), float(b), bits, symmetric=symmetric) for b in beta] for a in alpha[:, 0]]
    np.testing.assert_array_equal(np.stack(together, axis=-1), singles)
    np.testing.assert_array_equal(profile.mse(alpha, beta, bits, symmetric=symmetric), together.total)
    assert together.rounding.shape == together.clipping.shape == (4, 3)
    assert isinstance(singles[0][0].total, float)


def assert_statistics_equal(profile, x):
    wide = x.astype(np.float64)
    assert (profile.n, profile.min, profile.max) == (x.size, x.min(), x.max())
    assert profile.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-12)
    assert profile.std == pytest.approx(wide.std(), rel=1e-9, abs=1e-12)
    deviation = np.abs(wide - wide.mean()).mean()
    assert profile.mean_absolute_deviation() == pytest.approx(deviation, rel=1e-9, abs=1e-12)
    for q in (0, 0.001, 0.3, 0.5, 0.77, 0.9999, 1):
        assert profile.quantile(q) == pytest.approx(np.quantile(wide, q), rel=1e-12, abs=1e-15)
    for low, high in [(-1, 1), (-0.25, 3), (x.min(), x.max()), (5, 5), (x.flat[0], x.flat[0])]:
        assert profile.share_outside(low, high) == np.mean((x < low) | (x > high))


def assert_magnitude_quantiles_equal(x, shares):
    profile, magnitudes = ErrorProfile(x), np.abs(x.astype(np.float64))
    for q in shares:
        assert profile.magnitude_quantile(q) == pytest.approx(np.quantile(magnitudes, q), rel=1e-12, abs=1e-15)


NAMES = ["sample", "normal", "laplace", "uniform", "relu", "heavy"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_equal_numpy(name, dtype):
    x = data(name).astype(dtype)
    assert_statistics_equal(ErrorProfile(x), x)
    assert_magnitude_quantiles_equal(x, [0.501, 0.77, 0.9999, 1])


@PROPERTY
@given(VALUES)
def test_statistics_equal_numpy_on_any_data(x):
    assert_statistics_equal(ErrorProfile(x / 100), x / 100)


@PROPERTY
@given(VALUES)
def test_magnitude_quantiles_equal_numpy_on_any_data(x):
    assert_magnitude_quantiles_equal(x, [0, 0.001, 0.3, 0.5, 0.6, 0.8, 0.99, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("offset", "width"), [(1e6, 1e-3), (-1e5, 1e-2), (1e10, 1e-3), (3000, 1)])
def test_the_width_of_data_far_from_0_equals_numpy(offset, width, dtype):
    x = (offset + width * np.random.default_rng(0).standard_normal(200_001)).astype(dtype)
    profile, wide = ErrorProfile(x), x.astype(np.float64)
    assert profile.mean == pytest.approx(wide.mean(), rel=1e-15)
    assert profile.std == pytest.approx(wide.std(), rel=1e-9)
    assert profile.mean_absolute_deviation() == pytest.approx(np.abs(wide - wide.mean()).mean(), rel=1e-9)
    if dtype == np.float64:
        alpha, beta = aciq(x, 4)
        assert (beta - alpha) / 2 == pytest.approx(2.56 * width, rel=0.01)


@pytest.mark.parametrize(("x", "p"), [([1.0, 2], 99), ([0.0, 8, 9, 10], 60)])
def test_symmetric_percentile_of_few_values_equals_numpy(x, p):
    assert percentile(x, p, symmetric=True)[1] == pytest.approx(np.percentile(np.abs(x), p))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bins", [1, 7, 100, np.int8(127), np.uint64(2048), [-3, -1.5, 0, 0.25, 1, 2], [0, 0.5, 0.75]])
def test_histogram_equals_numpy(bins, dtype, name):
    x = data(name).astype(dtype)
    counts, edges = ErrorProfile(x).histogram(bins)
    expected_counts, expected_edges = np.histogram(x, bins)
    np.testing.assert_array_equal(edges, expected_edges)
    np.testing.assert_array_equal(counts, expected_counts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bins", [1, 7, 100, np.int8(127), np.uint64(2048)])
def test_magnitude_histogram_equals_numpy(bins, name):
    for x in (data(name).astype(np.float64), -data(name).astype(np.float64), -np.abs(data(name).astype(np.float64))):
        counts, edges = ErrorProfile(x).magnitude_histogram(bins)
        expected_counts, expected_edges = np.histogram(np.abs(x), bins, range=(0, np.abs(x).max()))
        np.testing.assert_array_equal(edges, expected_edges)
        np.testing.assert_array_equal(counts, expected_counts)


@pytest.mark.parametrize("n", [1, 2, *ROUND_BLOCK])
def test_histograms_of_few_whole_numbers_equal_numpy(n):
    """Values on the edges: the last bin holds its right edge, every other one does not."""
    x = np.random.default_rng(n).integers(-4, 5, n).astype(np.float32)
    x[0] = 4
    profile = ErrorProfile(x)
    np.testing.assert_array_equal(profile.histogram(np.arange(-4, 5))[0], np.histogram(x, np.arange(-4, 5))[0])
    np.testing.assert_array_equal(profile.magnitude_histogram(4)[0], np.histogram(np.abs(x), 4, range=(0, 4))[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edges", [[0, 0.7, 1], [-1e39, 0.0, 1e39]])
def test_histogram_of_float32_data_with_edges_that_float32_has_not_equals_numpy(edges):
    x = np.float32([0.7])  # less than 0.7
    np.testing.assert_array_equal(ErrorProfile(x).histogram(edges)[0], np.histogram(x, edges)[0])


def test_magnitudes_of_zeros():
    counts, edges = ErrorProfile(np.zeros(4)).magnitude_histogram(4)
    assert counts.sum() == 4 and (counts >= 0).all() and (np.diff(edges) > 0).all()
    assert entropy(np.zeros(4)) == (0, 0)


def observed_range(watcher_class, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watcher = watcher_class(**options)
        for batch in batches:
            watcher(torch.from_numpy(batch))
    return watcher.min_val.item(), watcher.max_val.item()


@pytest.mark.parametrize("name", NAMES)
def test_minmax_equals_torch(name):
    x = data(name)
    assert minmax(x) == observed_range(observer.MinMaxObserver, [x])
    assert minmax(x, symmetric=True) == (-np.abs(x).max(), np.abs(x).max())


@pytest.mark.parametrize("averaging_constant", [0.01, 0.3, 1.0])
def test_moving_minmax_equals_torch(averaging_constant):
    rng = np.random.default_rng(3)
    batches = [rng.normal(rng.normal(), 3, (4, 5)).astype(np.float32) for _ in range(50)]
    expected = observed_range(observer.MovingAverageMinMaxObserver, batches, averaging_constant=averaging_constant)
    assert moving_minmax(batches, averaging_constant) == expected
    assert moving_minmax(iter(map(torch.from_numpy, batches)), averaging_constant) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [50.01, 90, 99, 99.99, 99.999, 100])
def test_percentile_equals_numpy(p, name):
    x = data(name).astype(np.float64)
    np.testing.assert_allclose(percentile(x, p), np.percentile(x, [100 - p, p]), rtol=1e-9, atol=1e-15)
    c = np.percentile(np.abs(x), p)
    np.testing.assert_allclose(percentile(x, p, symmetric=True), (-c, c), rtol=1e-9)


@pytest.mark.parametrize(("name", "bits"), [
    *((name, bits) for name in ["sample", "normal", "laplace", "uniform", "relu"] for bits in [2, 3, 4, 8]),
    ("mixture", 2), ("mixture", 3), ("mixture", 4), ("mixture", 8),
])
def test_no_range_has_less_error_than_mse(name, bits):
    profile = ErrorProfile(data(name))
    alpha, beta = mse(profile, bits)
    error, low, high = profile.mse(alpha, beta, bits), min(profile.min, 0), max(profile.max, 0)
    everywhere = np.linspace(low, 0, 40)[:, None], np.linspace(0, high, 41)[1:]
    assert error <= profile.mse(*everywhere, bits).min() * 1.001
    near = np.linspace(0.9, 1.1, 30)
    nearby = np.maximum(alpha * near, low)[:, None], np.minimum(beta * near, high)
    assert error <= profile.mse(*nearby, bits).min() * 1.001


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["sample", "normal", "laplace", "uniform", "relu"])
def test_no_symmetric_range_has_less_error_than_mse(name, bits):
    profile = ErrorProfile(data(name))
    alpha, beta = mse(profile, bits, symmetric=True)
    assert alpha == -beta
    top, error = max(-profile.min, profile.max), profile.mse(alpha, beta, bits, symmetric=True)
    c = np.linspace(0, top, 5001)[1:]
    assert error <= profile.mse(-c, c, bits, symmetric=True).min() * 1.001
    near = np.clip(beta + np.linspace(-1e-3, 1e-3, 301) * top, 1e-6 * top, top)
    assert error <= profile.mse(-near, near, bits, symmetric=True).min() * (1 + 2e-6)


def test_mse_with_one_far_outlier():
    x = np.append(np.random.default_rng(4).standard_normal(100_000), 50.0)
    alpha, beta = mse(x, 8, symmetric=True)
    assert 32 < beta == -alpha < 34.5
    assert minmax(x, symmetric=True) == (-50, 50)
    assert 3.5 < percentile(x, 99.99, symmetric=True)[1] < 4.5


@pytest.mark.parametrize(("x", "expected"), [([0.0, 0.0], (0, 0)), ([2.0], (0, 2)), ([-2.0, -2.0], (-2, 0))])
def test_mse_of_constant_data(x, expected):
    assert mse(x) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("x", [[5e-324], [-5e-324], [1e-320, -3e-323], [1e-45, 3e-45]])
def test_mse_of_data_below_the_least_step(x):
    low, high = min(*x, 0), max(*x, 0)
    assert mse(x) == (low, high)
    assert mse(x, symmetric=True) == (-max(-low, high), max(-low, high))


def test_the_largest_data():
    x = 1.7e38 * np.array([-1, -0.001, 0.3, 0.3333, 1])
    for symmetric in (False, True):
        for ends in ((-1.7e38, 1.7e38), (-1, 1e38)):
            split = ErrorProfile(x).split(*ends, 8, symmetric=symmetric)
            np.testing.assert_allclose(split, direct_split(x, *ends, 8, symmetric), rtol=1e-6, atol=1e-13 * 1.7e38**2)
        assert mse(x, symmetric=symmetric)[1] > 1e38


def literal_entropy(x, bits):
    """The threshold of the entropy calibration, step by step as it is described."""
    counts, edges = np.histogram(np.abs(x), 2048, range=(0, np.abs(x).max()))
    counts[0] = counts[1]
    levels, least, best = 2 ** (bits - 1 if x.min() < 0 else bits), np.inf, None
    for i in range(levels, 2049):
        level = np.digitize(range(i), np.linspace(0, i, levels + 1)) - 1
        filled = counts[:i] > 0
        p = counts[:i].astype(float)
        p[-1] += counts[i:].sum()
        in_level = np.bincount(level, counts[:i], levels) / np.maximum(np.bincount(level, filled, levels), 1)
        q = np.where(filled, in_level[level], 0)
        p, q = p / p.sum(), q / q.sum()
        if (q[p > 0] == 0).any():
            continue
        divergence = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if divergence <= least:
            least, best = divergence, i
    return min((best + 0.5) * edges[1], edges[-1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["sample", "normal", "laplace", "relu"])
def test_entropy_equals_the_literal_algorithm(name, bits):
    x = data(name).astype(np.float64)
    alpha, beta = entropy(x, bits)
    assert beta == pytest.approx(literal_entropy(x, bits), rel=1e-12)
    assert alpha == (0 if name == "relu" else -beta)


def from_counts(counts):
    """Values of both signs whose magnitudes fall into 2048 bins of width 1, as often as ``counts`` says."""
    x = np.repeat(np.arange(2048) + 0.5, counts)
    x[-1] = 2048
    x[::2] *= -1
    return x


# Found by _compute_amax_entropy of NVIDIA Model Optimizer 0.47 (nvidia-modelopt), start_bin=2 ** (bits - 1), on these
# counts with bin edges 0, 1, ... 2048. It sets bin 0 to bin 1, so they are equal here, and returns the edge i, half a
# bin less than the threshold of the original description.
@pytest.mark.parametrize(("name", "bits", "i"), [
    ("normal", 4, 1441), ("normal", 8, 1560), ("laplace", 4, 904), ("laplace", 8, 1141),
    ("gaps", 4, 896), ("gaps", 8, 1140), ("sample", 4, 544), ("sample", 8, 1453),
])
def test_entropy_equals_model_optimizer(name, bits, i):
    k = np.arange(2048)
    if name == "sample":
        magnitudes = np.abs(data("sample"))
        counts = np.histogram(magnitudes, 2048, range=(0, magnitudes.max()))[0]
    else:
        density = np.exp(-((k / 400) ** 2) / 2) if name == "normal" else np.exp(-k / 150)
        counts = np.rint(1000 * density).astype(int) * (1 if name != "gaps" else k % 3 > 0)
    counts[0], counts[-1] = counts[1], max(counts[-1], 1)
    assert entropy(from_counts(counts), bits) == (-(i + 0.5), i + 0.5)


def test_entropy_of_data_without_negative_values_starts_at_zero():
    alpha, beta = entropy(data("relu"))
    assert alpha == 0 < beta <= data("relu").max()
    assert beta > 3.5  # the spike at 0 does not pull the range in


@pytest.mark.parametrize("bits", [12, 13, 16])
def test_entropy_takes_everything_when_levels_are_not_fewer_than_bins(bits):
    top = float(np.abs(data("heavy")).max())
    assert entropy(data("heavy"), bits) == (-top, top)


@pytest.mark.parametrize(("distribution", "table"), [
    ("laplace", [2.83, 3.90, 5.03, 6.20, 7.41, 8.65, 9.90]),
    ("gauss", [1.71, 2.15, 2.56, 2.94, 3.29, 3.62, 3.92]),
])
def test_aciq_constants(distribution, table):
    assert [round(aciq_clip(bits, distribution), 2) for bits in range(2, 9)] == table


@pytest.mark.parametrize(("name", "right"), [("normal", "gauss"), ("laplace", "laplace")])
def test_aciq_finds_the_distribution_and_nearly_the_best_range(name, right):
    x = data(name) * 3 + 1
    ranges = {d: aciq(x, 4, d) for d in ("auto", "gauss", "laplace")}
    assert ranges["auto"] == ranges[right] != ranges["gauss" if right == "laplace" else "laplace"]
    width = x.std(dtype=np.float64) if right == "gauss" else np.abs(x - x.mean(dtype=np.float64)).mean()
    clip = {"gauss": 2.56, "laplace": 5.03}[right] * width
    assert ranges["auto"] == pytest.approx((x.mean() - clip, x.mean() + clip), rel=5e-3)
    profile = ErrorProfile(x)
    assert profile.mse(*ranges["auto"], 4) <= 1.1 * profile.mse(*mse(profile, 4), 4)


CALIBRATORS = {
    "minmax": minmax, "minmax symmetric": partial(minmax, symmetric=True),
    "percentile": partial(percentile, p=99), "percentile symmetric": partial(percentile, p=99, symmetric=True),
    "mse": partial(mse, bits=4), "mse symmetric": partial(mse, bits=4, symmetric=True),
    "entropy": entropy, "aciq": aciq, "aciq laplace": partial(aciq, distribution="laplace"),
}


@pytest.mark.parametrize("calibrate", CALIBRATORS.values(), ids=CALIBRATORS)
def test_calibrators_take_arrays_profiles_and_tensors(calibrate):
    x = data("heavy")[:4000]
    expected = calibrate(x)
    assert all(type(end) is float for end in expected) and expected[0] < expected[1]
    assert calibrate(x.reshape(40, 2, 50)) == calibrate(ErrorProfile(x)) == calibrate(torch.from_numpy(x)) == expected
    assert calibrate(ErrorProfile(torch.from_numpy(x))) == calibrate(x[::-1].tolist()) == expected


@pytest.mark.parametrize("calibrate", [*CALIBRATORS.values(), ErrorProfile], ids=[*CALIBRATORS, "ErrorProfile"])
@pytest.mark.parametrize(("x", "message"), [
    ([1.0, np.nan], "x must be finite, got 1 NaN and 0 infinite"),
    ([1.0, -np.inf], "x must be finite, got 0 NaN and 1 infinite"),
    (torch.tensor([torch.inf]), "x must be finite, got 0 NaN and 1 infinite"),
    ([], r"x must not be empty, got shape \(0,\)"),
    ("abc", "x must be an array of real numbers, got 'abc' of dtype <U3"),
    (None, "x must be an array of real numbers, got None of dtype object"),
])
def test_bad_data_is_named(calibrate, x, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        calibrate(x)


@pytest.mark.parametrize("bits", [1, 17, 8.0, True, "8", None])
@pytest.mark.parametrize("function", [mse, entropy, aciq, lambda x, bits: ErrorProfile(x).mse(-1, 1, bits),
                                      lambda x, bits: ErrorProfile(x).split(-1, 1, bits)],
                         ids=["mse", "entropy", "aciq", "ErrorProfile.mse", "ErrorProfile.split"])
def test_bad_bits_are_named(function, bits):
    with pytest.raises(ValueError, match=re.escape(f"bits must be an integer from 2 to 16, got {bits!r}")):
        function([0.0, 1.0], bits)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bins", [[], None, 3.5, True, 0, -1, [1], [0, np.nan], [0, np.inf], [1, 1], [2, 1], 1 + 2j,
                                  [0, 1j], "auto", ["a", "b"], [[0, 1]], [[0], [1, 2]], 2**70, np.uint8([2, 1])])
def test_bad_bins_are_named(bins):
    profile, allowed = ErrorProfile([0.0, 1.0]), "an integer of at least 1"
    with pytest.raises(ValueError, match=f"^bins must be {allowed}, got {re.escape(repr(bins))}$"):
        profile.magnitude_histogram(bins)
    allowed += ", or at least 2 finite edges that increase"
    with pytest.raises(ValueError, match=f"^bins must be {allowed}, got {re.escape(repr(bins))}$"):
        profile.histogram(bins)


@pytest.mark.parametrize("p", [50, 100.1, np.nan, "99", None, True, -99])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bad_percentile_is_named(symmetric, p):
    with pytest.raises(ValueError, match=re.escape(f"p must be more than 50 and at most 100, got {p!r}")):
        percentile([0.0, 1.0], p, symmetric=symmetric)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: moving_minmax([[1.0]], 0), "averaging_constant must be more than 0 and at most 1, got 0"),
    (lambda: moving_minmax([[1.0]], 1.5), "averaging_constant must be .* got 1.5"),
    (lambda: moving_minmax([[1.0]], np.nan), "averaging_constant must be .* got nan"),
    (lambda: moving_minmax([]), "batches must hold at least one batch, got none"),
    (lambda: moving_minmax([[1.0], []]), r"batch must not be empty, got shape \(0,\)"),
    (lambda: moving_minmax([[1.0], [np.nan]]), "batch must be finite, got 1 NaN"),
    (lambda: moving_minmax([["a"]]), r"batch must be an array of real numbers, got \['a'\] of dtype <U1"),
    (lambda: aciq([0.0, 1.0], 8, "x"), "distribution must be 'auto', 'gauss' or 'laplace', got 'x'"),
    (lambda: aciq([0.0, 1.0], 8, None), "distribution must be .* got None"),
    (lambda: ErrorProfile([1.0]).mse(1, 1), r"alpha must be less than beta, got alpha=\[1\] and beta=\[1\]"),
    (lambda: ErrorProfile([1.0]).split(2, 1), "alpha must be less than beta, got .*2.* and .*1"),
    (lambda: ErrorProfile([1.0]).mse([0, 3], [2, 1]), r"alpha must be less than beta, got alpha=\[0, 3\]"),
    (lambda: ErrorProfile([1.0]).mse(np.nan, 1), "alpha must be finite, got 1 NaN"),
    (lambda: ErrorProfile([1.0]).mse(0, np.inf), "beta must be finite, got 0 NaN and 1 infinite"),
    (lambda: ErrorProfile([1.0]).mse("0", 1), "alpha must be an array of real numbers, got '0' of dtype <U1"),
    (lambda: ErrorProfile([1.0]).mse(-1e39, 1e39), r"alpha and beta must be from .* alpha=\[-1e\+39\] and beta="),
    (lambda: ErrorProfile([1.0]).mse([0, -1], [1, 2e38]), r"alpha and beta must be from .* got .*beta=\[1, 2e\+38\]"),
    (lambda: ErrorProfile([1e200, -1e200, 3]), r"x must be from -1.7e\+38 to 1.7e\+38, .* got -1e\+200 to 1e\+200"),
    (lambda: ErrorProfile(np.float32([-2e38, 1])), r"x must be from .* got -2e\+38 to 1"),
    (lambda: mse([1e39]), r"x must be from .* got 1e\+39 to 1e\+39"),
    (lambda: ErrorProfile([1.0]).magnitude_histogram([0, 1]), r"bins must be an integer of at least 1, got \[0, 1\]"),
])
def test_bad_arguments_are_named_with_their_value(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize(("alpha", "beta", "bits"), [(-0.1, 0.1, 12), (-0.1, 0.1, 14), (-1, 1, 14)])
def test_a_tiny_rounding_part_is_exact_beside_huge_values(alpha, beta, bits):
    x = np.append(np.random.default_rng(0).standard_t(3, 200_000), -1e4).astype(np.float32)
    expected = affine.error_split(x, affine.range_params(alpha, beta, bits))
    assert ErrorProfile(x).split(alpha, beta, bits).rounding == pytest.approx(float(expected.rounding), rel=1e-6, abs=0)


@pytest.mark.parametrize("n", [300_001, 1_000_001])
def test_sums_over_many_equal_values_do_not_drift(n):
    value = np.float32(0.7)
    expected = (float(value) - float(affine.fake_quantize(value, affine.range_params(-1, 1, 4)))) ** 2
    profile = ErrorProfile(np.full(n, value))
    assert profile.mse(-1, 1, 4) == pytest.approx(expected, abs=1e-14 * 0.49)
    assert (profile.mean, profile.std) == (value, 0)


@pytest.mark.parametrize("size", [5e-324, 1e-200, 1e-45, 1e-20])
def test_small_data_is_not_taken_for_0(size):
    x = size * np.array([8.0, -8.0, 4.0, -4.0])
    assert ErrorProfile(x).std == pytest.approx(x.max() * np.sqrt(0.625), rel=0.1)
    for alpha, beta in (entropy(x), aciq(x), percentile(x, 99)):
        assert alpha < 0 < beta


@pytest.mark.parametrize("calibrate", CALIBRATORS.values(), ids=CALIBRATORS)
def test_calibrators_take_parameters_and_bfloat16(calibrate):
    x = torch.tensor([0.25, -1.0, 0.5, 3.0])
    assert calibrate(torch.nn.Parameter(x)) == calibrate(x.bfloat16()) == calibrate(x)


def test_moving_minmax_refuses_what_would_overflow():
    with pytest.raises(ValueError, match=r"^batch must be from -1.7e"):
        moving_minmax([np.float32([-3e38, 0]), np.float32([0, 3e38])])
    with pytest.raises(ValueError, match=r"^batches must be an iterable"):
        moving_minmax(3)
