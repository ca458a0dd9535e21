"""What the package and its lessons weigh: start-up time as a ratio, peak memory of each notebook's kernel."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parents[2].joinpath("notebooks").glob("*.ipynb"))
# Linux's own peak of this process in KiB; getrusage would count what the parent had at the fork.
PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def start(code, repeats=15):
    """Median seconds of a fresh interpreter that runs ``code``."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def run(path):
    """Seconds of running all cells of a notebook, and the peak memory of its kernel in MiB."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    begin = time.perf_counter()
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    return time.perf_counter() - begin, int(notebook.cells[-1].outputs[0].text) // 1024


def table():
    """Lines of text."""
    bare, package = start("pass"), start("import qlab")
    yield f"import qlab: {package / bare:.2f} of the bare interpreter's start, {1e3 * (package - bare):+.1f} ms"
    for path in NOTEBOOKS:
        seconds, peak = run(path)
        yield f"{path.stem}: all cells in {seconds:.1f} s, kernel at most {peak} MiB"
