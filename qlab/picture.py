"""A figure's picture: pixels that moving artists are drawn on, and the widget that shows them and reports a hand.

Artists marked ``animated=True`` move; everything else is background, drawn once and kept as pixels. A step restores
the background, draws the moving artists over it and sends one PNG. If a background artist has changed (axis limits,
say), the figure is stale and the background is drawn anew: correct, and about ten times slower.
"""

import struct
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import anywidget
import ipywidgets as widgets
import matplotlib
import numpy as np
import traitlets
from isal import isal_zlib
from matplotlib.backends.backend_agg import FigureCanvasAgg

DPI = 100
MOST_BYTES = 64_000  # of a step, at one pixel of the picture to one of the page
STYLE = {  # sizes for the back row of a classroom
    "font.size": 14,
    "axes.titlesize": 15,
    "axes.labelsize": 14,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 13,
    "lines.linewidth": 2.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": DPI,
}
with matplotlib.rc_context():
    matplotlib.rcdefaults()
    _SETTINGS = dict.copy(matplotlib.rcParams)  # dict's own copy looks up no backend
for _name in ("backend", "interactive"):  # how the learner's own plots are shown
    del _SETTINGS[_name]
ARITHMETIC = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}  # NumPy's own
_FAINT = 0.3

LOCK = threading.RLock()  # one step at a time: messages come on several threads, and rcParams are of the process


@contextmanager
def own_settings(style=()):
    """Inside, matplotlib and NumPy behave as they do by default, whatever the learner has set, but for ``style``.

    Examples
    --------
    >>> with np.errstate(all="raise"), own_settings():
    ...     float(np.float64(1e-300) * 1e-300)
    0.0
    """
    # printing needs none of this: texts of figures are made by format strings
    with LOCK, np.errstate(**ARITHMETIC):
        before = dict.copy(matplotlib.rcParams)
        dict.update(matplotlib.rcParams, _SETTINGS | dict(style))  # unchecked: 300 values a step, all valid
        try:
            yield
        finally:
            dict.update(matplotlib.rcParams, before)


def script(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


class Pixels:
    """A matplotlib figure as PNG files, quickly.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        With all its artists.

    Attributes
    ----------
    veiled : set of artists
        They are not drawn.
    background : region of pixels, or None
        Everything that does not move, as last drawn.
    """

    def __init__(self, figure):
        self.figure, self.veiled, self.background = figure, set(), None
        self._canvas, self._ghostly, self._ratio = FigureCanvasAgg(figure), None, 1.0
        self._moving = sorted(figure.findobj(lambda artist: artist.get_animated()), key=lambda a: a.get_zorder())
        self.size = self._canvas.get_width_height()

    @property
    def ratio(self):
        """Pixels of the picture to one of the page, 1 to 2."""
        return self._ratio

    @ratio.setter
    def ratio(self, ratio):
        if ratio != self._ratio:
            self._ratio = ratio
            self.figure.set_dpi(DPI * ratio)
            self.forget()

    def forget(self):
        """Draw the background anew next time."""
        self.background = self._ghostly = None

    def free(self):
        """Give back the memory of the pixels."""
        self.forget()
        self._canvas = FigureCanvasAgg(self.figure)

    def veil(self, artists):
        """Draw everything but these artists."""
        self.veiled = set(artists)
        self.forget()

    def leave_ghosts(self, artists):
        """Keep faint copies of moving artists, where they are now, under those to come."""
        if self.background is None or self.figure.stale:
            return
        self._canvas.restore_region(self.background)
        for artist in artists:
            alpha = artist.get_alpha()
            artist.set_alpha(_FAINT * (1 if alpha is None else alpha))
            self._draw(artist)
            artist.set_alpha(alpha)
        self._ghostly = self._canvas.copy_from_bbox(self.figure.bbox)

    def drop_ghosts(self):
        self._ghostly = None

    def png(self):
        """Draw: bytes of a PNG file."""
        with own_settings():
            if self.figure.stale or self.background is None:
                self._draw_background()
            else:
                self._canvas.restore_region(self._ghostly or self.background)
            for artist in self._moving:
                self._draw(artist)
            return png(np.asarray(self._canvas.buffer_rgba()), MOST_BYTES * self.ratio**2)

    def _draw(self, artist):
        if artist not in self.veiled and artist.axes not in self.veiled:
            self.figure.draw_artist(artist)

    def _draw_background(self):
        visible = {artist: artist.get_visible() for artist in self.veiled}
        self.forget()
        try:
            for artist in visible:
                artist.set_visible(False)
            self._canvas.draw()
        finally:
            for artist, was in visible.items():
                artist.set_visible(was)
        self.figure.set_layout_engine("none")  # the axes stay where the first drawing put them
        self.background = self._canvas.copy_from_bbox(self.figure.bbox)
        self.figure.stale = False


def png(pixels, most=MOST_BYTES):
    """A PNG file of opaque (height, width, 4) bytes, made to be quick: no row filters, igzip's fastest useful level.

    Matplotlib and Pillow spend most of a step on this (15 times as long for the same picture, measured). A picture that
    would take more than ``most`` bytes, one with a heat map, takes half of them with a palette: the 256 most frequent
    of 65,536 colours, and the nearest of them for the others. No channel of a frequent one is more than 7 off.
    """
    exact = _file(pixels, kind=6)
    if len(exact) <= most:
        return exact
    rgba = pixels.view("<u4")[..., 0]
    codes = (rgba & 0xF8) << 8 | rgba >> 5 & 0x7E0 | rgba >> 19 & 0x1F  # 5 bits of red, 6 of green, 5 of blue
    counts = np.bincount(codes.ravel(), minlength=1 << 16)
    found = np.flatnonzero(counts)
    found = found[np.argsort(-counts[found], kind="stable")]
    palette = _rgb(found[:256])
    places = np.zeros(1 << 16, np.uint8)
    places[found] = (np.square(palette).sum(1) - 2 * _rgb(found) @ palette.T).argmin(1)  # of the nearest
    return _file(np.take(places, codes), kind=3, palette=palette)


def _rgb(codes):
    """Red, green and blue, 0 to 255, of the codes in `png`."""
    red, green, blue = codes >> 11, codes >> 5 & 63, codes & 31
    return np.stack([red << 3 | red >> 2, green << 2 | green >> 4, blue << 3 | blue >> 2], axis=1).astype(np.float32)


def _file(pixels, kind, palette=None):
    height, width = pixels.shape[:2]
    pixels = pixels.reshape(height, -1)
    rows = np.zeros((height, 1 + pixels.shape[1]), np.uint8)  # each row starts with its filter type: 0, none
    rows[:, 1:] = pixels
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)}  # 8 bits; RGBA is 6, a palette 3
    if palette is not None:
        chunks[b"PLTE"] = palette.astype(np.uint8).tobytes()
    chunks |= {b"IDAT": isal_zlib.compress(rows, 1), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items())


class Picture(anywidget.AnyWidget):
    """The picture, its numbers and what can be taken in it, in the browser.

    Everything that a step changes goes out in one message. What comes back is a hand's doing: ``pointer``, ``ratio``
    and the message that Reset was pressed.
    """

    _esm = traitlets.Unicode(script("picture.js")).tag(sync=True)
    png = traitlets.Bytes().tag(sync=True)
    numbers = traitlets.Unicode().tag(sync=True)
    size = traitlets.List().tag(sync=True)  # width and height, in pixels of the page
    alt = traitlets.Unicode().tag(sync=True)
    grips = traitlets.List().tag(sync=True)
    tip = traitlets.Unicode().tag(sync=True)
    hovers = traitlets.Bool(False).tag(sync=True)
    pointer = traitlets.Dict().tag(sync=True, echo_update=False)
    ratio = traitlets.Float(1.0).tag(sync=True, echo_update=False)


class _Slider(anywidget.AnyWidget):
    _esm = traitlets.Unicode(script("slider.js")).tag(sync=True)
    held = traitlets.Int(0).tag(sync=True, echo_update=False)  # which grasp, or key held down, moves it: 0 for none
    watched = traitlets.Bool(False).tag(sync=True)  # whether the end of a grasp is worth a message


class FloatSlider(_Slider, widgets.FloatSlider):
    """A slider that never answers: what code sets is shown, and a message from the browser is a hand's.

    ipywidgets' own slider rounds each value that it is given to its step, clamps it to the limits that it has just
    then, and sends that back, when it can.
    """


class IntSlider(_Slider, widgets.IntSlider):
    """`FloatSlider` for whole numbers."""


class FloatLogSlider(_Slider, widgets.FloatLogSlider):
    """`FloatSlider` for powers of ``base``; ``min``, ``max`` and ``step`` are exponents."""
