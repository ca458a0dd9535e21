"""Live figures: controls → compute → draw, one matplotlib picture that follows the hand.

An `Explorer` owns one figure on matplotlib's Agg canvas. Artists marked ``animated=True`` move; everything else is
background, drawn once and kept as pixels. A step restores the background, draws the moving artists over it and sends
one PNG to the browser. If ``draw`` changes a background artist (axis limits, say), the figure becomes stale and the
background is drawn anew: correct, and about ten times slower.
"""

import base64
import html
import math
import struct
import time
import zlib
from collections import deque
from contextlib import contextmanager

import ipywidgets as widgets
import matplotlib
import numpy as np
from isal import isal_zlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from traitlets import TraitError

# Okabe and Ito's palette, told apart with every kind of colour blindness; sky and orange darker, for 3 : 1 on white.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#3A98D2", "#009E73"
ORANGE, VERMILION, PURPLE, GREY = "#C08400", "#D55E00", "#CC79A7", "#8C8C8C"

ON_GREY = {"path_effects": [withStroke(linewidth=4, foreground="white")]}  # for lines that cross grey bars

# What ipywidgets leaves out: a focus that is easy to see, and a chosen button told by more than its shade.
_LOOK = """
.qlab :focus-visible { outline: 2px solid var(--jp-brand-color1, #1976D2) !important; }
.qlab input:focus-visible { box-shadow: inset 0 0 0 2px var(--jp-brand-color1, #1976D2); }
.qlab .noUi-handle:not(:focus) { border-color: var(--jp-ui-font-color2, #757575); }
.qlab .widget-toggle-button.mod-active { box-shadow: inset 0 -3px var(--jp-ui-font-color1, black); }
.qlab .widget-box, .qlab .widget-inline-hbox { overflow: visible; }
"""
# And what it tells no screen reader, and nothing in Python reaches: names of the picture, of handles and of play's
# buttons, and which button is chosen.
_NAMES = """
const box = this.closest('.qlab'), title = this.dataset.title;
function name() {
  for (const picture of box.querySelectorAll('.widget-image')) picture.alt = title;
  for (const handle of box.querySelectorAll('.noUi-handle'))
    handle.ariaLabel = handle.closest('.widget-slider').querySelector('.widget-label').textContent;
  for (const button of box.querySelectorAll('.widget-play button'))
    button.ariaLabel = button.firstElementChild.className.replace('fa fa-', '').replace('retweet', 'repeat');
  for (const button of box.querySelectorAll('.widget-toggle-button'))
    button.ariaPressed = button.classList.contains('mod-active');
}
new MutationObserver(name).observe(box, {subtree: true, childList: true, attributeFilter: ['class']});
name();
"""
_FOR_SCREEN_READERS = "position:absolute; width:1px; height:1px; margin:0; overflow:hidden; clip-path:inset(50%)"
_ANSWER_SECONDS = 1.0  # how long the browser may take to answer a value set from code
_DPI = 100
_STYLE = {  # sizes for the back row of a classroom
    "font.size": 14,
    "axes.titlesize": 15,
    "axes.labelsize": 14,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 13,
    "lines.linewidth": 2.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": _DPI,
}


@contextmanager
def new_figure(width=1000, height=470):
    """Create a figure of ``width`` × ``height`` pixels, in the course's style while the block builds it.

    Examples
    --------
    >>> with new_figure() as figure:
    ...     axes = figure.subplots()
    """
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width / _DPI, height / _DPI), layout="constrained")


class Explorer:
    """A live figure: move a control and the picture and its numbers follow.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        With its artists; those that move are created with ``animated=True``.
    controls : dict of str to ipywidgets widget
        Each has a ``value``; the names are the keyword arguments of ``compute``.
    compute : function
        ``compute(**values) -> result``. Pure: it never draws.
    draw : function
        ``draw(result)``. It only moves artists.
    read : function
        ``read(result) -> dict`` of the numbers and texts that the figure shows.
    chips : dict of str to function, optional
        Buttons. ``function(**values) -> dict`` of the control values to jump to.
    couple : function, optional
        ``couple(name, values) -> dict`` of further control values that follow from moving the control ``name``. A dict
        of the control's traits may stand for a value: ``{"beta": {"max": 4.0, "value": 1.0}}``.
    arrange : function, optional
        ``arrange(controls, chips) -> widget`` that holds all of them; by default they stand in one wrapping row.
    title : str
        What the figure is, in a few words.
    description : str
        What the figure shows, for those who cannot see it.

    Attributes
    ----------
    controls : dict of str to widget
    chips : dict of str to button
    readout : dict of str to number or text
        What the figure shows now.
    figure : matplotlib.figure.Figure
    errors : list of Exception
        Everything that went wrong in a step, oldest first. The message of the last one stands under the figure until
        a step succeeds.
    widget : ipywidgets widget
        Controls, picture, numbers and message together.

    Examples
    --------
    >>> with new_figure() as figure:
    ...     (line,) = figure.subplots().plot([0, 1], [0, 1], animated=True)
    >>> explorer = Explorer(
    ...     figure,
    ...     controls={"slope": widgets.FloatSlider(1.0, min=0, max=2, description="slope")},
    ...     compute=lambda slope: slope,
    ...     draw=lambda slope: line.set_ydata([0, slope]),
    ...     read=lambda slope: {"slope": slope},
    ...     title="A line",
    ...     description="A line through the origin.",
    ... )
    >>> explorer.set(slope=0.5)
    >>> explorer.readout
    {'slope': 0.5}
    """

    def __init__(self, figure, controls, compute, draw, read, *, title, description, chips=None, couple=None,
                 arrange=None):
        self.figure, self.controls, self.title, self.description = figure, dict(controls), title, description
        self.readout, self.errors = {}, []
        self._state = {name: control.value for name, control in self.controls.items()}
        self._sent = {name: deque(maxlen=256) for name in self.controls}  # (time, position) of values set from code
        self._compute, self._draw, self._read, self._couple = compute, draw, read, couple
        self._canvas = FigureCanvasAgg(figure)
        self._moving = sorted(figure.findobj(lambda artist: artist.get_animated()), key=lambda a: a.get_zorder())
        self._background = None
        self._quiet = False
        self._chip_values = dict(chips or {})
        self.chips = {label: widgets.Button(description=label, layout={"width": "auto"}) for label in self._chip_values}

        width, _ = self._canvas.get_width_height()
        self._image = widgets.Image(
            format="png", layout={"max_width": f"{width}px", "width": "100%", "margin": "2px 0"})
        caption = widgets.HTML(
            f'<style data-title="{html.escape(title)}" onload="{_NAMES}">{_LOOK}</style>'
            f'<p style="{_FOR_SCREEN_READERS}">{html.escape(title)}. {html.escape(description)}</p>',
            layout={"height": "0", "margin": "0"},
        )
        self._numbers, self._message = widgets.HTML(), widgets.HTML()
        for control in self.controls.values():
            control.tooltip = control.tooltip or ""  # the browser would show None as "null"
        controls = (arrange or _in_one_row)(self.controls, self.chips)
        self.widget = widgets.VBox([controls, caption, self._image, self._numbers, self._message])
        self.widget.add_class("qlab")

        self._step(None)
        if self.errors:
            raise self.errors[-1]
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name, change["new"]), names="value")
        for label, button in self.chips.items():
            button.on_click(lambda _, label=label: self._press(label))

    def set(self, **values):
        """Move controls from code, as one step. Raises what goes wrong, and shows it under the figure.

        Raises
        ------
        ValueError
            If there is no such control, or it does not allow the value; the controls stay as they were.
        """
        seen = len(self.errors)
        try:
            self._assign(values)
        except ValueError as error:
            self._fail(error)
        else:
            self._step(*values or [None])
        if len(self.errors) > seen:
            raise self.errors[-1]

    def press(self, label):
        """Press a chip from code. Raises what goes wrong, as `set`."""
        if label not in self.chips:
            raise ValueError(f"label must be one of {', '.join(self.chips)}, got {label!r}")
        seen = len(self.errors)
        self._press(label)
        if len(self.errors) > seen:
            raise self.errors[-1]

    def png(self):
        """The picture as it is now: bytes of a PNG file."""
        return bytes(self._image.value)

    def __repr__(self):
        values = ", ".join(f"{name}={_text(value)}" for name, value in self._state.items())
        numbers = "\n".join(f"  {name}: {_text(value)}" for name, value in self.readout.items())
        return f"{self.title} ({values})\n{numbers}"

    def _repr_mimebundle_(self, include=None, exclude=None):
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        data = {
            "application/vnd.jupyter.widget-view+json": view,
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": repr(self),
        }
        return data, {"image/png": {"alt": self.description}}

    def _step(self, *moved):
        """One step after the controls named in ``moved``: couple, compute, draw, show."""
        try:
            for name in moved:
                if self._couple and name:
                    self._assign(self._couple(name, dict(self._state)))
            result = self._compute(**self._state)
            self._draw(result)
            readout = self._read(result)
            picture = self._render()
        except Exception as error:
            self._fail(error)
            return
        self.readout = readout
        self._numbers.value = _table(readout)
        self._message.value = ""
        self._image.value = picture  # last, so that the browser draws the numbers in the same frame

    def _press(self, label):
        try:
            values = self._chip_values[label](**self._state)
            self._assign(values)
        except Exception as error:
            self._fail(error)
        else:
            self._step(*values)

    def _moved(self, name, value):
        if self._quiet or self._is_answer(name, value):
            return
        self._sent[name].clear()  # the browser answers in order: what came before this move is settled
        self._state[name] = value
        self._step(name)

    def _is_answer(self, name, value):
        """Whether the browser answers a value set from code, rather than reports a hand.

        A slider in the browser rounds each value that it is given to its step and sends that back, perhaps late. Taken
        for a move, the answer would shift the value of a chip, and two coupled sliders would answer each other forever.
        """
        if not self.controls[name]._property_lock:  # ipywidgets holds it while it applies what the browser says
            return False
        sent, position = self._sent[name], _position(self.controls[name], value)
        while sent and sent[0][0] < time.monotonic() - _ANSWER_SECONDS:
            sent.popleft()
        for i, (_, wanted) in enumerate(sent):
            if abs(position - wanted) <= 0.51:
                for _ in range(i + 1):  # older ones will not be answered any more
                    sent.popleft()
                return True
        return False

    def _assign(self, values):
        """Set controls without a step for each: all of them, or none and a ValueError."""
        before = dict(self._state)
        quiet, self._quiet = self._quiet, True
        try:
            for name, value in values.items():
                if name not in self.controls:
                    raise ValueError(f"there is no control {name!r}; controls are {', '.join(self.controls)}")
                if not isinstance(value, dict):
                    _check_allowed(name, self.controls[name], value)
                try:
                    self._put(name, value)
                except (TraitError, ValueError) as error:
                    raise ValueError(f"{name} cannot be {value!r}: {error}") from None
        except ValueError:
            for name, value in before.items():
                self._put(name, value)
            raise
        finally:
            self._quiet = quiet

    def _put(self, name, value):
        control = self.controls[name]
        shown = control.value
        with control.hold_sync(), control.hold_trait_notifications():  # limits and value change together
            for trait, new in (value if isinstance(value, dict) else {"value": value}).items():
                setattr(control, trait, new)
        self._state[name] = control.value
        if control.value != shown and hasattr(control, "step"):
            position = _position(control, control.value)
            if position not in (control.min / control.step, control.max / control.step):  # the ends need no rounding
                self._sent[name].append((time.monotonic(), position))

    def _fail(self, error):
        self.errors.append(error)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        self._message.value = (
            '<div role="alert" style="color:#B00020; background:#FFF3F3; padding:4px 8px; font-size:16px; '
            'font-weight:600; line-height:1.4">'
            f"{html.escape(kind + str(error))}</div>"
        )

    def _render(self):
        if self.figure.stale or self._background is None:
            self._canvas.draw()
            self.figure.set_layout_engine("none")  # the axes stay where the first drawing put them
            self._background = self._canvas.copy_from_bbox(self.figure.bbox)
            self.figure.stale = False
        else:
            self._canvas.restore_region(self._background)
        for artist in self._moving:
            self.figure.draw_artist(artist)
        return _png(np.asarray(self._canvas.buffer_rgba()))


def _png(pixels):
    """A PNG file of (height, width, 4) bytes, made to be quick: no row filters, and igzip's fastest useful level.

    Matplotlib and Pillow spend most of a step on this (15 times as long for the same picture, measured).
    """
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row starts with its filter type: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, RGBA

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = isal_zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _in_one_row(controls, chips):
    for first in list(chips.values())[:1]:
        first.layout.margin = "2px 2px 2px 24px"  # apart from the controls
    row = {"flex_flow": "row wrap", "align_items": "center"}
    return widgets.HBox([*controls.values(), *chips.values()], layout=row)


def _position(control, value):
    """The value of a slider in steps; what is no slider has no position."""
    if not hasattr(control, "step"):
        return math.nan
    return (math.log(value, control.base) if isinstance(control, widgets.FloatLogSlider) else value) / control.step


def _check_allowed(name, control, value):
    """What widgets would take without a word: sliders move to their end or a whole number, and None chooses nothing."""
    if hasattr(control, "_options_values"):
        if value not in control._options_values:
            allowed = ", ".join(map(str, control._options_values))
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        return
    low, high = getattr(control, "min", None), getattr(control, "max", None)
    if low is None or high is None:
        return
    if isinstance(control, widgets.FloatLogSlider):  # its ends are exponents
        low, high = control.base**low, control.base**high
    whole = isinstance(control, (widgets.IntSlider, widgets.BoundedIntText, widgets.Play))
    numbers = (int, np.integer) if whole else (int, float, np.number)
    if isinstance(value, bool) or not isinstance(value, numbers) or not low <= value <= high:
        kind = "a whole number " if whole else ""
        raise ValueError(f"{name} must be {kind}from {_text(low)} to {_text(high)}, got {_text(value)}")


def _text(value):
    if isinstance(value, bool) or not isinstance(value, (float, np.floating)):
        return str(value)
    return f"{value:.4g}"


def _table(readout):
    cell = "padding:1px 22px 1px 0; font-size:16px; line-height:1.5"
    items = (
        f'<span style="{cell}"><span style="opacity:.75">{html.escape(name.replace("_", " "))}</span> '
        f"<b>{html.escape(_text(value))}</b></span>"
        for name, value in readout.items()
    )
    return f'<div style="display:flex; flex-wrap:wrap">{"".join(items)}</div>'
