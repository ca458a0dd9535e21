"""What a lesson says of its memory holds."""

import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks.footprint import NOTEBOOKS, run


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason=f"no peak memory of a process on {sys.platform}")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_kernel_stays_below_what_the_lesson_states(path):
    stated = re.search(r"less than (\d+) MB of memory", " ".join(path.read_text(encoding="utf-8").split("\\n")))
    assert run(path)[1] < int(stated[1])
