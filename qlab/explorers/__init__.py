"""The live figures of the lessons. Each function takes data and returns a `qlab.live.Explorer`.

A module is imported when one of its figures is first used: those of lessons 04 to 08 need torch.
"""

from importlib import import_module

_FIGURES = {  # each module's: it has the name of the core module, unless that is the name of a figure
    "floats": ("float_bits",),
    "affine": ("granularity", "mapping"),
    "blocks": ("codebooks",),
    "calibration": ("clipping", "drift"),
    "ptq": ("digits_ptq",),
    "qat_figure": ("qat",),
    "training": ("training_run", "watch"),
    "outliers_figure": ("landscape", "outliers"),
    "smoothquant": ("smoothing",),
    "gptq": ("clip_search", "compensation"),
    "spinquant": ("rotation", "rotation_2d", "watch_rotation"),
}
_MODULE_OF = {figure: module for module, figures in _FIGURES.items() for figure in figures}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name):
    if name in _MODULE_OF:
        return getattr(import_module(f"qlab.explorers.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'qlab.explorers' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
