"""What the tests of the live figures share."""

import pytest

from tests.explorers.checks import without_pixels


@pytest.fixture
def unseen():
    """For tests that never look at the picture."""
    with without_pixels():
        yield
