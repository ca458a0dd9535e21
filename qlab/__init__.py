"""Neural-network quantization, shown live: the helper package of the qlab notebooks.

``import qlab`` loads nothing else; a module such as ``qlab.affine`` is imported when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = (
    "affine", "calibration", "digits", "exercises", "explorers", "floats", "integer", "live", "outliers", "ptq", "qat",
    "qat_study", "samples", "smollm", "training",
)


def __getattr__(name):
    if name in _MODULES:
        return import_module(f"qlab.{name}")
    raise AttributeError(f"module 'qlab' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_MODULES])
