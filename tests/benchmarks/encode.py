"""A million float32 values: `qlab.floats` and `qlab.blocks` against the casts of ml_dtypes and of NumPy."""

import statistics
import time

import ml_dtypes
import numpy as np

from qlab import blocks
from qlab.floats import (
    BF16,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FP32,
    FP64,
    encode,
)

SIZE, REPEATS = 1_000_000, 15
HARDWARE = {FP64: np.float64, FP32: np.float32, FP16: np.float16}
SOFTWARE = {
    BF16: ml_dtypes.bfloat16, FP8_E5M2: ml_dtypes.float8_e5m2, FP8_E4M3: ml_dtypes.float8_e4m3fn,
    FP6_E3M2: ml_dtypes.float6_e3m2fn, FP6_E2M3: ml_dtypes.float6_e2m3fn, FP4_E2M1: ml_dtypes.float4_e2m1fn,
}
CASTS = HARDWARE | SOFTWARE


def seconds(function):
    """Time of a call, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(size=SIZE, repeats=REPEATS):
    """One row per format: median seconds of both ways, which take turns so that a busy moment hits both."""
    x = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    times = {fmt: ([], []) for fmt in CASTS}
    for _ in range(repeats):
        for fmt, dtype in CASTS.items():
            encoding, codes = seconds(lambda fmt=fmt: encode(x, fmt))
            casting, numbers = seconds(lambda dtype=dtype: x.astype(dtype))
            assert np.array_equal(codes, numbers.view(codes.dtype)), fmt.name
            times[fmt][0].append(encoding)
            times[fmt][1].append(casting)
    return [{"format": fmt, "size": size, "encode": statistics.median(encoding), "cast": statistics.median(casting)}
            for fmt, (encoding, casting) in times.items()]


def measure_blocks(size=SIZE, repeats=REPEATS):
    """One row per block format: median seconds of `qlab.blocks.quantize`, and of ml_dtypes' cast to E2M1."""
    x = np.random.default_rng(0).standard_normal((size // 64, 64), dtype=np.float32)
    times = {fmt: ([], []) for fmt in blocks.FORMATS}
    for _ in range(repeats):
        for fmt, (quantizing, casting) in times.items():
            quantizing.append(seconds(lambda fmt=fmt: blocks.quantize(x, fmt))[0])
            casting.append(seconds(lambda: x.astype(ml_dtypes.float4_e2m1fn))[0])
    return [{"format": fmt, "size": x.size, "quantize": statistics.median(quantizing),
             "cast": statistics.median(casting)} for fmt, (quantizing, casting) in times.items()]


def table_of_blocks(rows):
    yield f"{'format':>10} {'quantize / cast to E2M1 by ml_dtypes':>38} {'ns a value':>12}"
    for row in rows:
        ratio, each = row["quantize"] / row["cast"], 1e9 * row["quantize"] / row["size"]
        yield f"{row['format'].name:>10} {ratio:>38.1f} {each:>12.1f}"


def table(rows):
    """Ratios, in lines of text: those to ml_dtypes first, then those to NumPy, whose casts are single
    instructions of the processor, FP32's a copy."""
    for casts, by in ((SOFTWARE, "ml_dtypes"), (HARDWARE, "NumPy")):
        yield f"{'format':>10} {f'encode / cast by {by}':>28} {'ns a value':>12}"
        for row in rows:
            if row["format"] in casts:
                ratio, each = row["encode"] / row["cast"], 1e9 * row["encode"] / row["size"]
                yield f"{row['format'].name:>10} {ratio:>28.1f} {each:>12.1f}"
