"""What can be taken hold of in a picture: where it is in pixels, and what a hand's place means for the controls."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes

_CURSORS = {(True, False): "ew-resize", (False, True): "ns-resize"}


@dataclass(frozen=True)
class Handle:
    """What can be taken in the picture, and what it moves.

    Where several are within reach, a point is taken before a line, a line before a region, and of two the nearer.

    Parameters
    ----------
    name : str
        What is moved.
    axes : matplotlib Axes
    place : function
        ``place(result)``: where it is, or a list of places, in data coordinates of the axes. ``(x, y)`` is a point,
        ``(x, None)`` a vertical line, ``(None, y)`` a horizontal one. A pair in the place of a number is a stretch:
        ``((0, 2), None)`` is the region from x = 0 to x = 2.
    move : function
        ``move(x, y, start) -> dict`` of control values for a hand at ``(x, y)``, data coordinates. Values are brought
        to the nearest that the controls allow. ``start`` is a `Start`.
    radius : float
        How far from a point or line the hand may be, in pixels of the page.
    """

    name: str
    axes: Axes
    place: Callable
    move: Callable
    radius: float = 12.0

    def marks(self, result):
        """All places."""
        place = self.place(result)
        return place if isinstance(place, list) else [place]


@dataclass(frozen=True)
class Start:
    """Where and when a hand has taken a handle."""

    x: float  # data coordinates
    y: float
    values: dict  # of all controls
    mark: int  # index in the list that ``place`` gave
    handle: Handle = field(repr=False)
    drag: float  # which drag this is
    offset: tuple  # in pixels, from the hand to the mark

    @classmethod
    def of(cls, handle, mark, at, *, result, values, drag):
        """``at``: the hand's place in pixels of the figure."""
        extents = _extent(handle.axes, handle.marks(result)[mark])
        # A mark that is taken a little beside its middle keeps that distance: it does not jump.
        offset = tuple(low - a if low == high else 0.0 for (low, high), a in zip(extents, at, strict=True))
        return cls(*_data(handle.axes, at, offset), values, mark, handle, drag, offset)

    def move(self, at):
        """The control values that the handle asks for, with the hand at ``at``."""
        return self.handle.move(*_data(self.handle.axes, at, self.offset), self)


def grips(handles, result, pixels):
    """What the browser is told of the handles: shares of the picture's width and height, from its upper left."""
    found = []
    for i, handle in enumerate(handles):
        if handle.axes in pixels.veiled or not handle.axes.get_visible():
            continue
        figure, window = handle.axes.figure.bbox, handle.axes.bbox
        edges = np.array([window.intervalx, window.intervaly])
        for mark, place in enumerate(handle.marks(result)):
            extent = np.array(_extent(handle.axes, place))
            if not np.isfinite(extent).all() or (extent[:, 1] < edges[:, 0] - 1).any() \
                    or (extent[:, 0] > edges[:, 1] + 1).any():
                continue  # out of sight
            thin = extent[:, 0] == extent[:, 1]
            radius = handle.radius * pixels.ratio * np.array([-1, 1])
            (left, right), (bottom, top) = np.where(thin[:, None], extent + radius, np.clip(extent.T, *edges.T).T)
            width, height = figure.size
            found.append({
                "id": [i, mark], "name": handle.name, "rank": int(thin.sum()), "thin": thin.tolist(),
                "cursor": _CURSORS.get(tuple(thin.tolist()), "grab"),
                "box": [left / width, 1 - top / height, (right - left) / width, (top - bottom) / height],
            })
    return found


def nearest_allowed(control, value):
    """The value that a hand on the control could give, nearest to ``value``."""
    low, high = getattr(control, "min", None), getattr(control, "max", None)
    if low is None or high is None:
        return value
    if isinstance(control, widgets.FloatLogSlider):  # its limits and step are of the exponent
        exponent = math.log(value, control.base) if value > 0 else low
        return control.base ** _on_grid(exponent, low, high, control.step)
    place = _on_grid(value, low, high, getattr(control, "step", None))
    return int(place) if isinstance(control, (widgets.IntSlider, widgets.Play)) else place


def _on_grid(value, low, high, step):
    if not low < value < high:
        return float(min(high, max(low, value)))
    return min(high, float(f"{low + round((value - low) / step) * step:.14g}")) if step else float(value)


def _extent(axes, mark):
    """(left, right), (bottom, top) of a mark, in pixels of the figure."""
    x, y = ((end, end) if end is not None and np.ndim(end) == 0 else end for end in mark)
    anywhere = [(start, start) for start in (axes.get_xlim()[0], axes.get_ylim()[0])]
    ends = axes.transData.transform(np.column_stack([x or anywhere[0], y or anywhere[1]]))
    window = axes.bbox
    return (tuple(sorted(ends[:, 0])) if x else tuple(window.intervalx),
            tuple(sorted(ends[:, 1])) if y else tuple(window.intervaly))


def _data(axes, at, offset):
    return tuple(map(float, axes.transData.inverted().transform(np.add(at, offset))))
