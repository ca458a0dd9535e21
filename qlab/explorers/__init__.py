"""The live figures of the lessons. Each function takes data and returns a `qlab.live.Explorer`.

Those of lessons 04 to 07 need torch, and are imported when they are first used.
"""

from importlib import import_module

from qlab.explorers.bits import float_bits
from qlab.explorers.grids import granularity, mapping
from qlab.explorers.ranges import clipping, drift

_LAZY = dict.fromkeys(("digits_ptq", "qat", "training_run", "watch"), "qlab.explorers.networks")
_LAZY |= dict.fromkeys(("landscape", "outliers"), "qlab.explorers.activations")
_LAZY["smoothing"] = "qlab.explorers.smoothquant"
_LAZY |= dict.fromkeys(("rotation", "rotation_2d"), "qlab.explorers.rotations")
_LAZY["watch_rotation"] = "qlab.explorers.learning"

__all__ = [
    "clipping", "digits_ptq", "drift", "float_bits", "granularity", "landscape", "mapping", "outliers", "qat",
    "rotation", "rotation_2d", "smoothing", "training_run", "watch",
    "watch_rotation",
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qlab.explorers' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LAZY})
