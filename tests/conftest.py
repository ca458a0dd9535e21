"""What all tests share."""

import hypothesis
import pytest
import torch

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
