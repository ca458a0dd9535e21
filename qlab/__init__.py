"""Neural-network quantization, shown live: the helper package of the qlab notebooks.

``import qlab`` loads nothing else; a module such as ``qlab.affine`` is imported when it is first used.
"""

import os
from importlib import import_module
from pkgutil import iter_modules

__version__ = "0.1.0"

# OpenMP's threads, which torch uses, burn the processor while they wait for work. Where several kernels share it, that
# makes each many times slower; so let them sleep. It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_MODULES = {module.name for module in iter_modules(__path__)}


def __getattr__(name):
    if name in _MODULES:
        return import_module(f"qlab.{name}")
    raise AttributeError(f"module 'qlab' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_MODULES})
