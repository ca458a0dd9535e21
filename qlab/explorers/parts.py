"""What the figures of several lessons share."""

from pathlib import Path

import numpy as np

from qlab.affine import check_integer
from qlab.live import IntSlider


def bits_slider(bits):
    """A slider over 2 to 8 bits."""
    bits = check_integer(bits, "bits", 2, 8)
    return IntSlider(bits, min=2, max=8, description="bits", layout={"width": "300px"})


def own_data(x, name):
    """The array in a ``.npy`` file, if ``x`` is the path of one; anything else as it is."""
    if not isinstance(x, (str, Path)):
        return x
    try:
        return np.load(x, allow_pickle=False)
    except (OSError, ValueError) as error:
        text = f"{name} must be an array or the path of a .npy file with one, got {str(x)!r}: {error}"
        raise ValueError(text) from None


def paths(xs, ys):
    """Lines through (xs[0], ys[0]), (xs[1], ys[1]), … as the data of one artist, with gaps between them."""
    width = max(np.size(x) for x in xs)
    rows = [np.vstack([np.broadcast_to(v, width) for v in [*line, np.nan]]) for line in (xs, ys)]
    return [row.T.ravel() for row in rows]


def ratio_db(power, error):
    """10 log₁₀(power / error) in decibels; infinite without an error."""
    error = np.asarray(error, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error > 0, 10 * np.log10(power / error), np.inf)[()]


def moving(axes, *marks, **look):
    """A line that `draw` moves: nothing of it is background, and the limits of the axes do not follow it."""
    return axes.plot([], [], *marks, animated=True, scalex=False, scaley=False, **look)[0]
