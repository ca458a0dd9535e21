"""What all tests share."""

import gc
import os
import re
from collections import defaultdict
from pathlib import Path

import hypothesis
import nbformat
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from tests.notebooks.measured import differences, text_of

gc.set_threshold(50_000, 20, 10)  # to look for cycles at every 700th object takes 7 % of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels of notebooks share the cores with the other worker, too
pytest.register_assert_rewrite("tests.exercises.checks", "tests.explorers.checks")
SAMPLED = (
    "tests/explorers/", "tests/browser/test_browser.py::test_arrow_keys", "tests/test_blocks.py::test_each_value",
    *(f"tests/exercises/test_every_check.py::test_{test}" for test in ("a_misconception_is", "no_hint", "nonsense",
                                                                       "right_in_many")),
    *(f"tests/notebooks/test_pages.py::test_{test}" for test in ("every_figure", "the_page", "answers")),
    *(f"tests/test_calibration.py::test_{test}" for test in ("no_range", "no_symmetric", "entropy_equals")),
    "tests/test_floats.py::test_codes_are_the_nearest_by_fractions", "tests/test_gptq.py::test_gptq_is_obq",
    "tests/test_ptq.py::test_eight_bits", "tests/test_qat.py::test_training_mends",
)
hypothesis.settings.register_profile("qlab", deadline=None, derandomize=True)  # the same examples on every run
hypothesis.settings.load_profile("qlab")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The workers share the cores, and two threads that wait for one core are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StatedMemory:
    """Each lesson says how much memory it takes: the kernel that nbval ran it in is asked after the last cell."""

    @staticmethod
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(item, nextitem):
        notebook = item.parent
        last = hasattr(notebook, "kernel") and not (nextitem and nextitem.parent is notebook)
        status = Path(f"/proc/{notebook.kernel.km.provisioner.pid}/status") if last else Path()
        peak = status.is_file() and int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 1024
        yield  # the kernel ends, whatever it took
        if not peak:  # another cell follows; and only Linux keeps a peak
            return
        prose = " ".join(cell.source for cell in nbformat.read(notebook.path, as_version=4).cells).replace("\n", " ")
        stated = int(re.search(r"less than (\d+) MB of memory", prose)[1])
        assert peak < stated, f"{notebook.path.name} takes {peak} MB, and says less than {stated}"


class Measured:
    """What a cell tagged ``measured`` prints may differ between machines by what its intervals allow."""

    @staticmethod
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(item):
        yield
        if "measured" in getattr(item, "cell", {}).get("metadata", {}).get("tags", []):
            found = differences(text_of(item.cell.outputs), text_of(item.test_outputs))
            assert not found, "\n".join(found)


class OneBrowser(LoadFileScheduling):
    """A file is for one worker; so are all browser tests, which share a browser and a JupyterLab."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "browser" if file.startswith("tests/browser/") else file


def pytest_xdist_make_scheduler(config, log):
    return OneBrowser(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker waits for the other.

    Of a test with many settings in `SAMPLED`, the first, the last and every sixth are run; the rest are ``long``.
    """
    first = ("tests/browser/", "notebooks/")
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in first])
    settings = defaultdict(list)
    for item in items:
        if item.nodeid.startswith(SAMPLED) and "[" in item.nodeid:
            settings[item.nodeid.partition("[")[0]].append(item)
    for of_a_test in settings.values():
        for place, item in enumerate(of_a_test[:-1]):
            if place % 6:
                item.add_marker("long")


def pytest_configure(config):
    config.pluginmanager.register(StatedMemory())
    config.pluginmanager.register(Measured())
