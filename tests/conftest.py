"""What all tests share."""

import os
import re
from itertools import groupby
from pathlib import Path

import hypothesis
import nbformat
import pytest
import torch

from tests.notebooks.measured import differences, text_of

os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels of notebooks share the cores with the other worker, too
pytest.register_assert_rewrite("tests.exercises.checks", "tests.explorers.checks")
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker waits for the other; browser tests share what they start.

    Of a figure's test with many settings, the first, the last and every third are run; the rest are ``long``.
    """
    first = ("tests/browser/", "notebooks/")
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in first])
    figures = (item for item in items if item.nodeid.startswith("tests/explorers/") and "[" in item.nodeid)
    for _, settings in groupby(figures, lambda item: item.nodeid.partition("[")[0]):
        *rest, _ = settings
        for item in (item for place, item in enumerate(rest) if place % 3):
            item.add_marker("long")


def pytest_configure(config):
    config.pluginmanager.register(StatedMemory())
    config.pluginmanager.register(Measured())
