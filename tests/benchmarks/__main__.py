"""Print how fast live figures, error search and number formats are, as ratios: ``python -m tests.benchmarks``."""

import statistics
import warnings

from tests.benchmarks import encode, footprint, hadamard, language_model, search, slider


def main():
    print("Slider to pixels: key press → changed pixels in JupyterLab, 100,000 values, ratio to interact + inline")
    print(*slider.table(slider.measure()), sep="\n")
    print("\nThe live figure alone, by number of values (ratio to 100,000)")
    medians = {size: statistics.median(slider.measure(size=size, paths=("live figure",))["live figure"])
               for size in (100_000, 1_000_000, 10_000_000)}
    for size, median in medians.items():
        print(f"{size:>12,} {median / medians[100_000]:6.2f}   (median {median:.1f} ms)")
    print(f"\nExact search over {search.RANGES:,} ranges, {search.BITS} bits "
          f"(direct: {search.DIRECT_SAMPLE} of them, scaled up)")
    warnings.simplefilter("ignore")  # torch's observers are deprecated; they are a reference here
    print(*search.table(search.measure(10**power) for power in (5, 6, 7)), sep="\n")
    print(f"\nEncoding {encode.SIZE:,} float32 values")
    print(*encode.table(encode.measure()), sep="\n")
    print(f"\nBlock formats of {encode.SIZE:,} float32 values")
    print(*encode.table_of_blocks(encode.measure_blocks()), sep="\n")
    print("\nFast Hadamard transform against the matrix product, one thread")
    print(*hadamard.table(hadamard.measure()), sep="\n")
    print("\nLanguage model")
    print(*language_model.table(), sep="\n")
    print("\nFootprint")
    print(*footprint.table(), sep="\n")


if __name__ == "__main__":
    main()
