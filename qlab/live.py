"""Live figures: controls → compute → draw, one matplotlib picture that follows the hand.

The kernel owns the state of a figure. The browser shows it and reports what a hand does: to a control, or to what can
be taken in the picture (`Handle`). A step is all or nothing, and one at a time.
"""

import base64
import html
import inspect
import weakref
from contextlib import contextmanager, suppress

import ipywidgets as widgets
import numpy as np
from IPython import get_ipython
from matplotlib.figure import Figure
from traitlets import TraitError

from qlab.handles import Handle, Start, grips, nearest_allowed
from qlab.picture import (
    ARITHMETIC,
    DPI,
    LOCK,
    STYLE,
    FloatLogSlider,
    FloatSlider,
    IntSlider,
    Picture,
    Pixels,
    own_settings,
)

__all__ = ["Explorer", "FloatLogSlider", "FloatSlider", "Handle", "IntSlider", "answered_widgets", "new_figure",
           "own_settings"]

# What ipywidgets leaves out: a focus that is easy to see, and a chosen button told by more than its shade.
_LOOK = """
.qlab :focus-visible { outline: 2px solid var(--jp-brand-color1, #1976D2) !important; }
.qlab input:focus-visible { box-shadow: inset 0 0 0 2px var(--jp-brand-color1, #1976D2); }
.qlab .noUi-handle:not(:focus) { border-color: var(--jp-ui-font-color2, #757575); }
.qlab .widget-toggle-button.mod-active { box-shadow: inset 0 -3px var(--jp-ui-font-color1, black); }
.qlab .widget-box, .qlab .widget-inline-hbox { overflow: visible; }
.qlab > .widget-html:has(> .widget-html-content:empty) { display: none; }
.qlab-frame { position: relative; user-select: none; margin: 2px 0; }
.qlab-frame img { width: 100%; height: 100%; max-width: none; display: block; pointer-events: none; }
.qlab-grip { position: absolute; touch-action: none; }
.qlab-held .qlab-grip { cursor: inherit !important; }
.qlab-tip { position: absolute; z-index: 9; pointer-events: none; white-space: pre; font-size: 14px; line-height: 1.4;
  padding: 2px 8px; background: white; color: black; border: 1px solid #757575; }
.qlab-tip:empty { display: none; }
.qlab-below { display: flex; align-items: flex-start; }
.qlab-below .widget-html { flex: 1; min-width: 0; height: auto; }
.qlab-reset { width: auto; flex: none; }
"""
_FOR_SCREEN_READERS = "position:absolute; width:1px; height:1px; margin:0; overflow:hidden; clip-path:inset(50%)"
_shown = {}  # notebook cell: (its execution, the figures that this has shown)


@contextmanager
def new_figure(width=1000, height=470):
    """Create a figure of ``width`` × ``height`` pixels, in the course's style while the block builds it.

    Examples
    --------
    >>> with new_figure() as figure:
    ...     axes = figure.subplots()
    """
    with own_settings(STYLE):
        yield Figure(figsize=(width / DPI, height / DPI), layout="constrained")


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
    handles : list of Handle, optional
        What can be taken in the picture.
    hover : function, optional
        ``hover(axes, x, y, result) -> str``: what is under the pointer, in data coordinates; empty for nothing.
    ghost : list of artists, optional
        While a hand holds a control, they leave a faint copy where they were before.
    main : tuple of str, optional
        Name in ``readout`` and unit of the figure's main number: its change stands beside it as long as the ghost.
    parts : dict of str to artists, optional
        What `veil` can hide by its name.
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
        Everything that went wrong in a step, oldest first. The message of the last one stands above the picture
        until a step succeeds.
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
                 arrange=None, handles=(), hover=None, ghost=(), main=None, parts=None):
        self.figure, self.controls, self.title, self.description = figure, dict(controls), title, description
        self.readout, self.errors = {}, []
        self._state = {name: control.value for name, control in self.controls.items()}
        self._began = {name: {"value": value} for name, value in self._state.items()}
        self._compute, self._draw, self._read, self._couple = compute, draw, read, couple
        self._handles, self._hover, self._ghost, self._main = list(handles), hover, list(ghost), main
        self._pixels = Pixels(figure)
        self._result, self._undo, self._quiet = None, [], False
        self._grasp, self._before, self._start, self._over = None, None, None, None
        self._hidden, self._parts = set(), dict(parts or {})
        self._followers = []
        self._chip_values = dict(chips or {})
        self.chips = {label: widgets.Button(description=label, layout={"width": "auto"}) for label in self._chip_values}

        self._picture = Picture(size=self._pixels.size, alt=title, hovers=hover is not None, layout={"width": "100%"})
        caption = widgets.HTML(
            f"<style>{_LOOK}</style>"
            f'<p style="{_FOR_SCREEN_READERS}">{html.escape(title)}. {html.escape(description)}</p>',
            layout={"height": "0", "margin": "0"},
        )
        self._message = widgets.HTML()
        for control in self.controls.values():
            control.tooltip = control.tooltip or ""  # the browser would show None as "null"
        controls = (arrange or _in_one_row)(self.controls, self.chips)
        self.widget = widgets.VBox([controls, caption, self._message, self._picture])
        self.widget.add_class("qlab")

        self._step()
        if self.errors:
            raise self.errors[-1]
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name, change["new"]), names="value")
            if ghost and control.has_trait("held"):
                control.watched = True
                control.observe(lambda change: change["new"] or self._let_go(), names="held")
        for label, button in self.chips.items():
            button.on_click(lambda _, label=label: self._press(label))
        self._picture.observe(lambda change: self._pointed(change["new"]), names="pointer")
        self._picture.observe(self._sharpen, names="ratio")
        self._picture.on_msg(lambda _, content, buffers: self._told(content))
        self._listen()

    def set(self, **values):
        """Move controls from code, as one step. Raises what goes wrong, and shows it above the picture.

        Raises
        ------
        ValueError
            If there is no such control, or it does not allow the value; the controls stay as they were.
        """
        with self._raising():
            self._step(values)

    def press(self, label):
        """Press a chip from code. Raises what goes wrong, as `set`."""
        if label not in self.chips:
            raise ValueError(f"label must be one of {', '.join(self.chips)}, got {label!r}")
        with self._raising():
            self._press(label)

    def reset(self):
        """All controls as they were when the figure was made."""
        self._step({name: dict(traits) for name, traits in self._began.items()}, couple=False)

    def veil(self, *hidden):
        """Hide these parts and numbers, by their names, before the learner has thought about them; show all others."""
        names = [*self._parts, *self.readout]
        unknown = [name for name in hidden if name not in names]
        if unknown:
            raise ValueError(f"hidden must be of {', '.join(names)}, got {unknown[0]!r}")
        with LOCK:
            self._pixels.veil(artist for name in hidden for artist in self._parts.get(name, ()))
            self._hidden = set(hidden)
            self._show()

    def follow(self, function):
        """Call ``function()`` after each step, from now on."""
        self._followers.append(function)

    @property
    def shown(self):
        """The values of the controls, and the numbers of `readout`, by their names."""
        return self._state | self.readout

    def png(self):
        """The picture as it is now: bytes of a PNG file."""
        return self._picture.png

    def close(self):
        """Free what browser and kernel keep of this figure. Shown once more, it comes back."""
        with LOCK:
            for widget in _tree(self.widget):
                widget.close()
            self._pixels.free()
        shell = get_ipython()
        history = getattr(shell, "user_ns", {}).get("_oh", {})
        for number in [number for number, value in history.items() if self in (value, getattr(value, "explorer", 0))]:
            history.pop(number)  # what the cell gave is held by three names
            for names in (shell.user_ns, shell.user_ns_hidden):
                names.pop(f"_{number}", None)

    def __repr__(self):
        values = ", ".join(f"{name}={_text(value)}" for name, value in self._state.items())
        numbers = "\n".join(f"  {name}: {'?' if name in self._hidden else _text(value)}"
                            for name, value in self.readout.items())
        return f"{self.title} ({values})\n{numbers}"

    def _repr_mimebundle_(self, include=None, exclude=None):
        with LOCK:
            self._take_the_place_of_others()
            for widget in reversed(_tree(self.widget)):  # a widget is told of by those that hold it
                widget.open()
            self._listen()
            ratio, self._pixels.ratio = self._pixels.ratio, 1.0
            picture = self.png() if ratio == 1 else self._pixels.png()
            self._pixels.ratio = ratio
        data = {
            "application/vnd.jupyter.widget-view+json": self.widget.get_view_spec(),
            "image/png": base64.b64encode(picture).decode(),
            "text/plain": repr(self),
        }
        return data, {"image/png": {"alt": self.description}}

    def _take_the_place_of_others(self):
        """Close the figures that an earlier run of this notebook cell has shown, if no other cell shows them."""
        kernel = getattr(get_ipython(), "kernel", None)
        parent = kernel.get_parent("shell") if kernel else {}
        cell, run = parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")
        if not cell:
            return
        _, earlier = _shown.get(cell, (run, weakref.WeakSet()))
        if _shown.get(cell, (None,))[0] != run:
            _shown[cell] = run, weakref.WeakSet()
            still = set().union(*(explorers for _, explorers in _shown.values()))
            for explorer in set(earlier) - still - {self}:
                explorer.close()
        _shown[cell][1].add(self)

    def _listen(self):
        """Hear the browser's messages one at a time, on whatever threads they come."""
        for widget in _tree(self.widget):
            widget.comm.on_msg(lambda message, handle=widget._handle_msg: self._hear(handle, message))

    def _hear(self, handle, message):
        with LOCK:
            try:
                handle(message)
            except BaseException:  # an interrupt
                self._agree()
                raise

    @contextmanager
    def _raising(self):
        with LOCK:
            seen = len(self.errors)
            yield
            if len(self.errors) > seen:
                raise self.errors[-1]

    def _step(self, values=None, *, couple=True, grasp=None):
        """Take values, couple, compute, draw, show. An error is shown; an interrupt leaves all as it was before."""
        with LOCK, np.errstate(**ARITHMETIC):
            try:
                result = self._follow(values or {}, couple)
                readout = self._read(result)
                self._leave_ghosts(grasp)
                self._put_in_place(result)
                self._result, self.readout = result, readout
                self._undo.clear()
                self._show("")
                for function in self._followers:
                    function()
            except Exception as error:
                self._undo.clear()
                self._fail(error)
            except BaseException:
                self._agree()
                raise

    def _follow(self, values, couple):
        self._assign(values)
        for name in values:
            if self._couple and couple:
                self._assign(self._couple(name, dict(self._state)))
        return self._compute(**self._state)

    def _put_in_place(self, result):
        try:
            with own_settings():
                self._draw(result)
        except BaseException:
            self._pixels.forget()
            if self._result is not None:  # figures remember what they have drawn: half of it must not be believed
                with suppress(Exception), own_settings():
                    self._draw(self._result)
            raise

    def _agree(self):
        """After an interrupt: controls, picture and numbers as before the step."""
        undo, self._undo = self._undo, []
        quiet, self._quiet = self._quiet, True
        try:
            for name, traits in reversed(undo):
                self._put(name, traits)
            for name, control in self.controls.items():
                if control.value is not self._state[name] and control.value != self._state[name]:
                    self._put(name, self._state[name])
        finally:
            self._undo.clear()
            self._quiet = quiet
        if self._result is not None:
            with own_settings():
                self._draw(self._result)
            self._pixels.forget()
            self.readout = self._read(self._result)
            self._show()

    def _show(self, message=None):
        """Picture, numbers and what can be taken, in one message to the browser."""
        picture = self._pixels.png()
        with self._picture.hold_sync():
            self._picture.grips = grips(self._handles, self._result, self._pixels)
            self._picture.numbers = self._table()
            self._picture.png = picture
        if message is not None:
            self._message.value = message

    def _press(self, label):
        with LOCK:
            try:
                values = self._chip_values[label](**self._state)
            except Exception as error:
                self._fail(error)
            else:
                self._step(values)

    def _moved(self, name, value):
        if self._quiet:
            return
        with LOCK:
            self._undo.append((name, {"value": self._state[name]}))
            self._state[name] = value
            held = getattr(self.controls[name], "held", 0)
            self._step({name: value}, grasp=(name, held) if held else None)

    def _told(self, content):
        if content.get("reset"):
            self.reset()
        if "pointer" in content:
            self._pointed(content["pointer"])

    def _pointed(self, pointer):
        with LOCK:
            if "hover" in pointer:
                self._picture.tip = self._under(pointer["hover"])
                return
            if pointer["drag"] == self._over:  # a move that the browser had held back
                return
            try:
                if not self._start or pointer["drag"] != self._start.drag:
                    self._take(pointer)
                self._drag(self._to_pixels(*pointer["at"]))
            except Exception as error:
                self._fail(error)
            if not pointer["held"]:
                self._over = pointer["drag"]
                self._let_go()

    def _take(self, pointer):
        which, mark = pointer["grip"]
        self._start = Start.of(self._handles[which], mark, self._to_pixels(*pointer["start"]), result=self._result,
                               values=dict(self._state), drag=pointer["drag"])

    def _drag(self, at):
        values = {name: nearest_allowed(self.controls[name], value) for name, value in self._start.move(at).items()}
        if any(self._state[name] != value for name, value in values.items()):
            self._step(values, grasp=self._start.drag)

    def _under(self, place):
        if place is None:
            return ""
        at = self._to_pixels(*place)
        for axes in self.figure.axes:
            if axes.get_visible() and axes.bbox.contains(*at) and axes not in self._pixels.veiled:
                try:
                    return self._hover(axes, *map(float, axes.transData.inverted().transform(at)), self._result) or ""
                except Exception as error:
                    self._fail(error)
        return ""

    def _to_pixels(self, across, down):
        return across * self.figure.bbox.width, (1 - down) * self.figure.bbox.height

    def _leave_ghosts(self, grasp):
        if grasp == self._grasp:
            return
        self._grasp = grasp
        self._pixels.drop_ghosts()
        self._before = None
        if grasp and self._ghost:
            self._before = dict(self.readout)
            with own_settings():
                self._pixels.leave_ghosts(self._ghost)

    def _let_go(self):
        with LOCK:
            self._start = None
            if self._grasp and self._ghost:
                self._leave_ghosts(None)
                self._show()
            self._grasp = None

    def _sharpen(self, change):
        with LOCK:
            self._pixels.ratio = min(2.0, max(1.0, float(change["new"])))
            self._show()

    def _assign(self, values):
        """Set controls without a step for each: all of them, or none and a ValueError."""
        quiet, self._quiet = self._quiet, True
        done = len(self._undo)
        try:
            for name, value in values.items():
                if name not in self.controls:
                    raise ValueError(f"there is no control {name!r}; controls are {', '.join(self.controls)}")
                if not isinstance(value, dict):
                    _check_allowed(name, self.controls[name], value)
                try:
                    self._put(name, value)
                except (TraitError, ValueError, AttributeError) as error:
                    raise ValueError(f"{name} cannot be {value!r}: {error}") from None
        except Exception:
            for name, traits in reversed(self._undo[done:]):
                self._put(name, traits, undo=False)
            del self._undo[done:]
            raise
        finally:
            self._quiet = quiet

    def _put(self, name, value, undo=True):
        control, traits = self.controls[name], value if isinstance(value, dict) else {"value": value}
        before = {trait: getattr(control, trait) for trait in traits}
        for trait, was in before.items():
            self._began[name].setdefault(trait, was)
        if undo:
            self._undo.append((name, before | {"value": self._state[name]}))
        with control.hold_sync(), control.hold_trait_notifications():  # limits and value change together
            for trait, new in traits.items():
                setattr(control, trait, new)
        self._state[name] = control.value

    def _fail(self, error):
        self.errors.append(error)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        self._message.value = (
            '<div role="alert" style="color:#B00020; background:#FFF3F3; padding:4px 8px; font-size:16px; '
            'font-weight:600; line-height:1.4">'
            f"{html.escape(kind + str(error))}</div>"
        )

    def _table(self):
        cell = "padding:1px 22px 1px 0; font-size:16px; line-height:1.5"
        items = (
            f'<span style="{cell}"><span style="opacity:.75">{html.escape(name.replace("_", " "))}</span> '
            f"<b>{'?' if name in self._hidden else html.escape(_text(value))}</b>{self._change(name)}</span>"
            for name, value in self.readout.items()
        )
        return f'<div style="display:flex; flex-wrap:wrap">{"".join(items)}</div>'

    def _change(self, name):
        """How the main number has changed since a hand took hold."""
        if not self._main or name != self._main[0] or name not in (self._before or ()) or name in self._hidden:
            return ""
        change = f"{self.readout[name] - self._before[name]:+.3g}".replace("-", "−")
        return f" ({change} {html.escape(self._main[1])})"


def _tree(widget):
    """A widget and all that it holds, each before those that it holds."""
    found = [widget]
    for part in found:
        held = [getattr(part, name) for name in part.keys if name in ("children", "layout", "style")]
        for some in held:
            found += [w for w in (some if isinstance(some, (tuple, list)) else [some])
                      if isinstance(w, widgets.Widget) and w not in found]
    return found


@contextmanager
def answered_widgets():
    """Inside, the browser is told of each message from a widget that it has been handled.

    ipykernel 7.4 handles these messages while an async cell runs, but leaves out the status that says so, and a slider
    whose message stays without it never sends another.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    dispatch = getattr(kernel, "dispatch_shell", None)
    if dispatch is None or "concurrent" not in inspect.signature(dispatch).parameters:
        yield
        return
    cell = kernel.get_parent("shell")

    async def dispatch_and_answer(*given, concurrent=False, **named):
        await dispatch(*given, concurrent=concurrent, **named)
        if concurrent:
            kernel._publish_status("idle", "shell")  # of the message
            kernel._publish_status("busy", "shell", parent=cell)

    kernel.dispatch_shell = dispatch_and_answer
    try:
        yield
    finally:
        del kernel.dispatch_shell


def _in_one_row(controls, chips):
    for first in list(chips.values())[:1]:
        first.layout.margin = "2px 2px 2px 24px"  # apart from the controls
    return in_a_row([*controls.values(), *chips.values()])


def in_a_row(parts):
    """Widgets side by side, in several rows where the page is narrow."""
    return widgets.HBox(parts, layout={"flex_flow": "row wrap", "align_items": "center"})


def _check_allowed(name, control, value):
    """What widgets would take without a word: sliders move to their end or a whole number, and None chooses nothing."""
    if hasattr(control, "_options_values"):
        if getattr(value, "ndim", 0) or value not in control._options_values:
            allowed = ", ".join(map(str, control._options_values))
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        return
    low, high = getattr(control, "min", None), getattr(control, "max", None)
    if low is None or high is None:
        return
    if isinstance(control, widgets.FloatLogSlider):  # its ends are exponents
        low, high = control.base**low, control.base**high
    whole = isinstance(control, (widgets.IntSlider, widgets.BoundedIntText, widgets.Play))
    numbers = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, numbers) or not low <= value <= high:
        kind = "a whole number " if whole else ""
        raise ValueError(f"{name} must be {kind}from {_text(low)} to {_text(high)}, got {_text(value)}")


def _text(value):
    if isinstance(value, bool) or not isinstance(value, (float, np.floating)):
        return str(value)
    return f"{value:.4g}"
