"""Searching the best of a thousand ranges: prefix sums against computing each range, and against torch's observer."""

import statistics
import time

import numpy as np
import torch
from torch.ao.quantization import HistogramObserver

from qlab.affine import fake_quantize, mse, range_params
from qlab.calibration import ErrorProfile

BITS, RANGES, DIRECT_SAMPLE = 4, 1000, 10


def seconds(function, repeats=3):
    """Median time of a call, and its last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def measure(size):
    """One row: seconds of each way, and how far the errors of the ranges differ (relative)."""
    x = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    ends = np.linspace(0.005, 1, RANGES) * float(np.abs(x).max())
    build, profile = seconds(lambda: ErrorProfile(x))
    search, errors = seconds(lambda: profile.mse(-ends, ends, BITS))
    some = np.linspace(0, RANGES - 1, DIRECT_SAMPLE).astype(int)

    def directly():
        return [float(mse(x, fake_quantize(x, range_params(-end, end, BITS)))) for end in ends[some].tolist()]

    direct, expected = seconds(directly, repeats=1)

    def observer():
        watch = HistogramObserver(bins=2048, dtype=torch.quint8, quant_min=0, quant_max=2**BITS - 1)
        watch(torch.from_numpy(x))
        return watch.calculate_qparams()

    return {
        "size": size,
        "build": build,
        "search": search,
        "direct": direct * RANGES / DIRECT_SAMPLE,
        "observer": seconds(observer)[0],
        "difference": float(np.max(np.abs(errors[some] / expected - 1))),
    }


def table(rows):
    """Ratios, in lines of text."""
    yield (f"{'values':>12} {'direct / search':>16} {'direct / (sort + search)':>26} "
           f"{'HistogramObserver / (sort + search)':>37} {'largest difference':>20}")
    for row in rows:
        whole = row["build"] + row["search"]
        yield (f"{row['size']:>12,} {row['direct'] / row['search']:>16,.0f} {row['direct'] / whole:>26,.0f} "
               f"{row['observer'] / whole:>37.2f} {row['difference']:>20.1e}")
