"""The fast Hadamard transform against the product with the matrix, in float32, on the same vectors and one thread."""

import statistics
import time

import torch

from qlab.spinquant import fast_hadamard, hadamard

ORDERS, VECTORS, REPEATS = (576, 1536, 4096), (1, 512), 15


def measure(orders=ORDERS, vectors=VECTORS, repeats=REPEATS):
    """One row per order and number of vectors: median seconds of both, which take turns, and how far they differ."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for n in orders:
        matrix = hadamard(n) / n**0.5
        for count in vectors:
            x = torch.randn(count, n, generator=torch.Generator().manual_seed(0))
            runs = {"fast": lambda x=x: fast_hadamard(x), "matrix": lambda x=x, matrix=matrix: x @ matrix}
            times = {name: [] for name in runs}
            for i in range(repeats + 1):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    if i:  # the first warms up
                        times[name].append(time.perf_counter() - begin)
            rows.append({"order": n, "vectors": count, "difference": float((fast_hadamard(x) - x @ matrix).abs().max()),
                         **{name: statistics.median(seconds) for name, seconds in times.items()}})
    torch.set_num_threads(threads)
    return rows


def table(rows):
    """Ratios, in lines of text."""
    yield f"{'order':>8} {'vectors':>8} {'matrix / fast':>14} {'fast, ms':>10} {'largest difference':>20}"
    for row in rows:
        yield (f"{row['order']:>8} {row['vectors']:>8} {row['matrix'] / row['fast']:>14.1f} {1e3 * row['fast']:>10.2f} "
               f"{row['difference']:>20.1e}")
