"""What the tests of all exercises share: a check by its short name, and what it asks."""

import numpy as np

from qlab import exercises


def check(name, function):
    return getattr(exercises, f"check_{name}")(function)


def asked(name, right):
    """The arguments of all calls that a check makes, arrays as tuples."""
    calls = []

    def recorded(*arguments):
        calls.append(tuple(tuple(a.tolist()) if isinstance(a, np.ndarray) else a for a in arguments))
        return right(*arguments)

    assert check(name, recorded).passed
    return calls
