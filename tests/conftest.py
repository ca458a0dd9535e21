"""What all tests share."""

import pytest
import torch

pytest.register_assert_rewrite("tests.explorer_checks")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The workers share the cores, and two threads that wait for one core are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
