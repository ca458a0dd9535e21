"""What the tests of exercises share: each begins as a fresh kernel does, with no failure counted."""

from collections import Counter

import pytest

from qlab.exercises import checking


@pytest.fixture(autouse=True)
def no_failure_before(monkeypatch):
    monkeypatch.setattr(checking, "_UNEXPLAINED", Counter())
