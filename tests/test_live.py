"""The live figure by itself: steps, refusals, failures, pixels, what it hands to Jupyter."""

import base64
import io
import re
import threading
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib
import matplotlib.style
import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Text
from PIL import Image

from qlab import explorers, live, samples
from qlab.explorers import colors
from qlab.explorers.floats import BitBoxes
from qlab.floats import FP32
from qlab.live import Explorer, FloatLogSlider, FloatSlider, Handle, IntSlider, new_figure
from qlab.picture import Picture, png
from tests.explorers.checks import without_pixels

WIDTH, HEIGHT = 320, 200


class Line:
    """An explorer of a line, and a log of what it did: it fails for some slopes, and ``far`` moves an axis limit."""

    def __init__(self, **changes):
        with new_figure(WIDTH, HEIGHT) as self.figure:
            self.axes = self.figure.subplots()
            self.axes.set(xlim=(0, 10), ylim=(-10, 10))
            (self.line,) = self.axes.plot([2, 8], [0, 0], animated=True)
        self.computed, self.pictures = [], []
        controls = {
            "slope": FloatSlider(1.0, min=-4, max=4, description="slope"),
            "mirror": FloatSlider(0.0, min=-4, max=4, description="mirror"),
            "zoom": FloatLogSlider(1.0, base=2, min=-3, max=3, description="zoom"),
            "width": IntSlider(2, min=1, max=5, description="width"),
            "style": widgets.Dropdown(options=["-", ":"], description="style"),
            "far": widgets.Checkbox(False, description="far"),
        }
        parts = {
            "compute": self.compute, "draw": self.draw,
            "read": lambda result: {"slope": result["slope"], "tenth & more": result["slope"] / 10, "looks": "thin"},
            "chips": {"steep": lambda **_: {"slope": 3.0}, "broken": self.broken_chip,
                      "too far": lambda **_: {"slope": -1.0, "mirror": 99.0}},
            "title": "A <line>", "description": "A line & its slope.",
            "parts": {"the line": [self.line]},
        }
        self.explorer = Explorer(self.figure, controls, **(parts | self.more() | changes))
        self.computed.clear()
        self.images()[0].observe(lambda change: self.pictures.append(change.new), names="png")

    def more(self):
        return {}

    def compute(self, **values):
        self.computed.append(values)
        if values["slope"] == 2:
            raise ZeroDivisionError("a <b>bold</b> slope")
        if values["slope"] == -3:
            raise ValueError("slope must not be <-3>")
        return values

    def draw(self, result):
        self.line.set_ydata([-result["slope"] * result["zoom"], result["slope"]])
        self.line.set_linestyle(result["style"])
        if self.axes.get_xlim()[1] != (20 if result["far"] else 10):
            self.axes.set_xlim(0, 20 if result["far"] else 10)
        if result["slope"] == -2:
            raise RuntimeError("cannot draw <b>down</b>")

    @staticmethod
    def broken_chip(**values):
        raise KeyError("no <such> chip")

    def images(self):
        return [child for child in self.explorer.widget.children if isinstance(child, Picture)]

    def text(self):
        return "".join(child.numbers if isinstance(child, Picture) else getattr(child, "value", "")
                       for child in self.explorer.widget.children)

    def values(self):
        return {name: control.value for name, control in self.explorer.controls.items()}

    def move(self, **values):
        """As by hand: the widget changes, and no exception may come out of its callback."""
        for name, value in values.items():
            self.explorer.controls[name].value = value


@pytest.fixture
def line():
    return Line()


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def drawn_anew(figure):
    """The figure as matplotlib itself saves it, moving artists and all."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    return pixels(file.getvalue())


def test_set_is_one_step(line):
    line.explorer.set(slope=0.5, mirror=-1.0, style=":")
    assert [(c["slope"], c["mirror"], c["style"]) for c in line.computed] == [(0.5, -1.0, ":")]
    assert len(line.pictures) == 1
    assert line.explorer.readout == {"slope": 0.5, "tenth & more": 0.05, "looks": "thin"}
    assert "<b>0.05</b>" in line.text()
    assert "tenth &amp; more" in line.text()


def test_set_without_a_value_steps_too(line):
    line.explorer.set()
    assert len(line.computed) == 1


def test_a_hand_on_the_widget_is_one_step_each(line):
    line.move(slope=0.5)
    line.move(far=True)
    assert len(line.computed) == len(line.pictures) == 2
    assert line.explorer.readout["slope"] == 0.5


@pytest.mark.parametrize("values, part", [
    ({"slop": 1.0}, "slop"),
    ({"slope": 4.5}, "from -4 to 4, got 4.5"),
    ({"slope": -99}, "slope"),
    ({"slope": float("nan")}, "slope"),
    ({"slope": "steep"}, "slope"),
    ({"slope": None}, "slope"),
    ({"slope": True}, "slope"),
    ({"style": "wavy"}, "wavy"),
    ({"style": None}, "one of -, :, got None"),
    ({"width": 2.5}, "a whole number from 1 to 5, got 2.5"),
    ({"width": True}, "a whole number from 1 to 5, got True"),
    ({"width": None}, "a whole number"),
    ({"far": "perhaps"}, "far"),
    ({"zoom": 8.5}, "zoom"),
    ({"zoom": 0.1}, "zoom"),
    ({"mirror": -1.0, "slope": 77.0}, "77"),
    ({"mirror": -1.0, "nonsense": 0}, "nonsense"),
])
def test_a_refused_value(line, values, part):
    line.explorer.set(slope=0.5)
    before, picture, readout = line.values(), line.explorer.png(), line.explorer.readout
    with pytest.raises(ValueError, match=part) as caught:
        line.explorer.set(**values)
    assert line.values() == before
    assert line.explorer.png() == picture
    assert line.explorer.readout == readout
    assert line.explorer.errors == [caught.value]
    assert 'role="alert"' in line.text()
    assert part in line.text()

    line.explorer.set(slope=1.5)
    assert 'role="alert"' not in line.text()
    assert line.explorer.png() != picture
    assert len(line.explorer.errors) == 1


@pytest.mark.parametrize("control, value", [
    ("slope", -4), ("slope", 4.0), ("slope", np.float32(0.5)), ("zoom", 0.125), ("zoom", 3.0), ("zoom", 8.0),
    ("width", 5), ("width", np.int64(1)), ("style", ":"), ("far", True),
])
def test_an_allowed_value(line, control, value):
    line.explorer.set(**{control: value})
    assert line.values()[control] == value


@pytest.mark.parametrize("slope, kind, shown", [
    (2.0, ZeroDivisionError, "ZeroDivisionError: a &lt;b&gt;bold&lt;/b&gt; slope"),
    (-2.0, RuntimeError, "RuntimeError: cannot draw &lt;b&gt;down&lt;/b&gt;"),
    (-3.0, ValueError, ">slope must not be &lt;-3&gt;"),
])
def test_a_step_that_fails(line, slope, kind, shown):
    picture, readout = line.explorer.png(), line.explorer.readout
    line.move(slope=slope)
    assert [type(error) for error in line.explorer.errors] == [kind]
    assert shown in line.text()
    assert line.explorer.png() == picture
    assert line.explorer.readout == readout

    line.move(slope=0.25)
    assert 'role="alert"' not in line.text()
    np.testing.assert_array_equal(pixels(line.explorer.png()), drawn_anew(line.figure))

    with pytest.raises(kind) as caught:
        line.explorer.set(slope=slope)
    assert line.explorer.errors[1:] == [caught.value]
    assert shown in line.text()


@pytest.mark.parametrize("part", ["compute", "draw", "read"])
def test_broken_from_the_start(part):
    def broken(*_, **__):
        raise ZeroDivisionError("from the start")

    with pytest.raises(ZeroDivisionError, match="from the start"):
        Line(**{part: broken})


def test_chip(line):
    assert {label: button.description for label, button in line.explorer.chips.items()} == {
        "steep": "steep", "broken": "broken", "too far": "too far"}
    line.explorer.press("steep")
    assert line.explorer.readout["slope"] == line.values()["slope"] == 3
    line.explorer.set(slope=1.0)
    line.explorer.chips["steep"].click()
    assert line.explorer.readout["slope"] == 3
    assert len(line.computed) == 3


@pytest.mark.parametrize("label, kind, shown", [
    ("broken", KeyError, "no &lt;such&gt; chip"), ("too far", ValueError, "mirror must be"),
])
def test_a_chip_that_fails(line, label, kind, shown):
    before, picture = line.values(), line.explorer.png()
    line.explorer.chips[label].click()
    assert shown in line.text()
    assert line.explorer.png() == picture
    with pytest.raises(kind):
        line.explorer.press(label)
    assert len(line.explorer.errors) == 2
    line.explorer.press("steep")
    assert 'role="alert"' not in line.text()
    assert line.values() == before | {"slope": 3.0}


def test_a_chip_that_fails_leaves_the_controls(line):
    before = line.values()
    with pytest.raises(ValueError, match="mirror"):
        line.explorer.press("too far")
    assert line.values() == before


def test_no_such_chip(line):
    with pytest.raises(ValueError, match="steep, broken, too far, got 'flat'"):
        line.explorer.press("flat")


def test_coupled_controls_move_as_one_step():
    def couple(name, values):
        return {"mirror": -values["slope"]} if name == "slope" else {"slope": -values["mirror"]}

    line = Line(couple=couple)
    for control, other, by in (("slope", "mirror", line.move), ("mirror", "slope", line.explorer.set)):
        line.computed.clear()
        by(**{control: 1.5})
        assert line.values()[other] == -1.5
        assert [c[other] for c in line.computed] == [-1.5]
    assert line.explorer.readout["slope"] == -1.5


def test_a_coupling_out_of_range_is_an_error():
    line = Line(couple=lambda name, values: {"mirror": 3 * values["slope"]})
    with pytest.raises(ValueError, match="mirror must be from -4 to 4, got 6"):
        line.explorer.set(slope=2.0)
    assert line.values()["mirror"] == 0


@pytest.mark.parametrize("values", [{}, {"slope": 3.0}, {"far": True}, {"far": True, "slope": -1.0, "style": ":"}])
def test_the_picture_is_what_matplotlib_draws(line, values):
    line.explorer.set(**values)
    shown = pixels(line.explorer.png())
    assert shown.shape == (HEIGHT, WIDTH, 4)
    assert np.ptp(shown[..., :3]) == 255
    np.testing.assert_array_equal(shown, drawn_anew(line.figure))


def test_a_file_that_would_be_too_large_has_fewer_colours(line):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 1), np.uint8)  # a heat map: one colour for each number
    colours = (matplotlib.colormaps["viridis"](np.arange(256)) * 255).round().astype(np.uint8)
    heat = np.concatenate([colours[noise[..., 0]], np.full((50, 300, 4), 255, np.uint8)])
    exact, smaller = png(heat, most=1_000_000), png(heat, most=100_000)
    np.testing.assert_array_equal(pixels(exact), heat)
    assert 2 * len(smaller) < len(exact) > 100_000
    off = np.abs(pixels(smaller).astype(int) - heat)
    assert 0 < off.max() <= 7 and not off[200:].any()  # white stays white


def test_a_rare_colour_becomes_its_nearest_neighbour():
    grid = np.arange(0, 256, 16, dtype=np.uint8)
    frequent = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2).repeat(3, axis=0)  # 256 colours, each three times
    image = np.zeros((1, 769, 4), np.uint8)
    image[0, :768, :2], image[..., 3] = frequent, 255
    image[0, 768, :3] = 100, 200, 40
    came = pixels(png(image, most=0))[0, 768].tolist()
    assert came == pytest.approx([100, 200, 0, 255], abs=8 + 4)  # half a step of the grid, and rounding


def test_png_is_bytes(line):
    assert isinstance(line.explorer.png(), bytes)


def test_back_and_forth_gives_the_same_picture(line):
    first = line.explorer.png()
    for values in ({"far": True}, {"slope": -3.5}, {"style": ":"}, {"far": False}):
        line.explorer.set(**values)
        assert line.explorer.png() != first
    line.explorer.set(slope=1.0, style="-")
    assert line.explorer.png() == first


def test_the_background_is_drawn_only_when_it_changes(line, monkeypatch):
    drawn = []
    draw = line.axes.xaxis.draw
    monkeypatch.setattr(line.axes.xaxis, "draw", lambda renderer: drawn.append(1) or draw(renderer))
    line.explorer.set(slope=0.5)
    line.explorer.set(slope=0.6)
    assert not drawn
    line.explorer.set(far=True)
    assert drawn


def test_what_jupyter_gets(line):
    line.explorer.set(slope=0.123456789)
    data, metadata = line.explorer._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == line.explorer.widget.model_id
    assert base64.b64decode(data["image/png"], validate=True) == line.explorer.png()
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).format == "PNG"
    for part in ("A <line>", "slope=0.1235", "slope: 0.1235", "tenth & more: 0.01235", "looks: thin"):
        assert part in data["text/plain"]
    assert metadata == {"image/png": {"alt": "A line & its slope."}}


def test_words_for_screen_readers(line):
    assert "A &lt;line&gt;. A line &amp; its slope." in line.text()


def test_the_widget_holds_controls_chips_and_picture(line):
    rows = [child.children for child in line.explorer.widget.children if isinstance(child, widgets.HBox)]
    assert {control for row in rows for control in row} == {*line.explorer.controls.values(),
                                                            *line.explorer.chips.values()}
    assert [image.png for image in line.images()] == [line.explorer.png()]


def browser_says(line, **values):
    """As the browser reports a slider."""
    for name, value in values.items():
        line.explorer.controls[name].set_state({"value": value})


def test_a_value_from_code_is_never_rounded(line):
    line.explorer.set(slope=0.53217)
    assert line.values()["slope"] == line.explorer.readout["slope"] == 0.53217


class Held(Line):
    """A point to take, at (8, slope), and a region between the mirror and the slope."""

    def more(self):
        def move(x, y, start):
            return {"slope": y, "mirror": start.values["mirror"] + x - start.x}

        return {"ghost": [self.line], "main": ("slope", "dB"), "hover": lambda axes, x, y, r: f"{x:.1f} {y:.1f}",
                "handles": [
                    Handle("region", self.axes, lambda r: (None, (r["mirror"] - 1, r["slope"])),
                           lambda x, y, start: {"mirror": start.values["mirror"] + y - start.y}),
                    Handle("point", self.axes, lambda r: [(8, r["slope"])], move),
                    Handle("far", self.axes, lambda r: (15, None), lambda x, y, start: {"far": True})]}

    def share(self, x, y):
        across, up = self.axes.transData.transform((x, y)) / self.figure.bbox.size
        return [float(across), float(1 - up)]

    def point(self, start, at, drag=1, held=True, grip=(1, 0)):
        """As the browser tells of a pointer: by a state, which may wait for the one before, and of the end at once."""
        pointer = {"drag": drag, "grip": list(grip), "start": self.share(*start), "at": self.share(*at), "held": held}
        if held:
            self.explorer._picture.set_state({"pointer": pointer})
        else:
            self.explorer._picture._handle_custom_msg({"pointer": pointer}, [])


def test_a_drag_ends_where_the_last_event_says():
    held = Held()
    for i in range(0, 60, 7):  # those between are skipped by a slow connection
        held.point((8, 1), (8 + i / 60, 1 + i / 40))
    held.point((8, 1), (9, 2.5), held=False)
    assert held.values()["slope"] == pytest.approx(2.5)
    assert held.values()["mirror"] == pytest.approx(1.0)
    assert not held.explorer.errors


def test_a_move_that_the_browser_held_back_until_after_the_end():
    held = Held()
    held.point((8, 1), (8, 2.5), held=False)
    held.point((8, 1), (8, 1.5))
    assert held.values()["slope"] == 2.5
    held.point((8, 2.5), (8, 1.5), drag=2)
    assert held.values()["slope"] == 1.5


def test_a_mark_taken_beside_its_middle_does_not_jump():
    held = Held()
    held.point((8.1, 1.3), (8.1, 1.3))
    assert (held.values()["slope"], held.values()["mirror"]) == (1, 0)
    held.point((8.1, 1.3), (8.1, 2.8))
    assert held.values()["slope"] == 2.5


def test_a_drag_ends_at_the_controls_limits_and_steps():
    held = Held()
    held.point((8, 1), (8, 3.33))
    assert held.values()["slope"] == pytest.approx(3.3)
    held.point((8, 1), (8, 99))
    assert held.values()["slope"] == 4
    assert not held.explorer.errors


def test_two_drags_start_anew():
    held = Held()
    held.point((8, 1), (8, 1.5), held=False)
    held.point((8, 1.5), (8, 1.6), drag=2)
    assert held.values()["slope"] == pytest.approx(1.6)


def test_grips_lie_over_what_they_take():
    grips = {grip["name"]: grip for grip in Held().explorer._picture.grips}
    assert set(grips) == {"region", "point"}  # the other is out of sight
    held = Held()
    left, top, width, height = grips["point"]["box"]
    assert [left + width / 2, top + height / 2] == pytest.approx(held.share(8, 1))
    left, top, width, height = grips["region"]["box"]
    assert [top, top + height] == pytest.approx([held.share(0, 1)[1], held.share(0, -1)[1]])
    assert grips["point"]["rank"] > grips["region"]["rank"]


def test_what_is_under_the_pointer():
    held = Held()
    held.explorer._picture.set_state({"pointer": {"hover": held.share(3, -5)}})
    assert held.explorer._picture.tip == "3.0 -5.0"
    held.explorer._picture.set_state({"pointer": {"hover": [0.0, 0.0]}})
    assert held.explorer._picture.tip == ""


def test_a_ghost_as_long_as_a_hand_holds():
    held, fresh = Held(), Held()
    fresh.explorer.set(slope=3.0)
    held.explorer.controls["slope"].set_state({"value": 3.0, "held": 7})
    assert held.explorer.png() != fresh.explorer.png()
    assert "(+2 dB)" in held.text()
    ghostly = pixels(held.explorer.png()) != pixels(fresh.explorer.png())
    assert 0 < ghostly.mean() < 0.05
    held.explorer.controls["slope"].set_state({"held": 0})
    assert held.explorer.png() == fresh.explorer.png()
    assert "dB" not in held.text()


def test_reset(line):
    before, picture = line.values(), line.explorer.png()
    line.move(slope=-1.0, far=True, zoom=2.0)
    line.explorer.set(style=":", mirror={"min": -9.0, "value": -8.0})
    line.images()[0]._handle_custom_msg({"reset": True}, [])
    assert line.values() == before
    assert line.explorer.controls["mirror"].min == -4
    assert line.explorer.png() == picture


def test_a_veil(line):
    shown = line.explorer.png()
    line.explorer.veil("the line", "slope")
    veiled = line.explorer.png()
    assert veiled != shown
    assert "<b>?</b>" in line.text() and "slope: ?" in repr(line.explorer)
    line.move(mirror=2.0)
    assert line.explorer.png() == veiled
    line.explorer.veil("the line")
    assert line.explorer.png() == veiled and "slope: 1" in repr(line.explorer)
    line.explorer.veil()
    assert line.explorer.png() == shown
    with pytest.raises(ValueError, match=r"hidden must be of the line, slope, .*got 'nothing'"):
        line.explorer.veil("nothing")


def test_who_follows_is_called_after_each_step_that_succeeds(line):
    seen = []
    line.explorer.follow(lambda: seen.append((line.explorer.shown["slope"], line.explorer.shown["mirror"])))
    line.move(slope=3.0)
    line.explorer.set(mirror=1.0)
    with pytest.raises(ValueError, match="mirror"):
        line.explorer.set(mirror=99.0)
    assert seen == [(3.0, 0.0), (3.0, 1.0)]


@pytest.mark.parametrize("part", ["compute", "draw", "read"])
@pytest.mark.parametrize("by", ["hand", "code", "chip"])
def test_an_interrupt_leaves_all_as_it_was(part, by, monkeypatch):
    line = Line()
    before, picture, readout = line.values(), line.explorer.png(), line.explorer.readout
    work, calls = getattr(line.explorer, f"_{part}"), []

    def interrupted(*given, **named):
        result = work(*given, **named)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(line.explorer, f"_{part}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        {"hand": lambda: line.move(slope=3.0), "code": lambda: line.explorer.set(slope=3.0, far=True),
         "chip": lambda: line.explorer.press("steep")}[by]()
    assert line.values() == before == line.explorer._state
    assert line.explorer.png() == picture
    assert line.explorer.readout == readout
    np.testing.assert_array_equal(pixels(line.explorer.png()), drawn_anew(line.figure))
    line.move(slope=0.5)
    assert line.explorer.readout["slope"] == 0.5


def test_the_learners_settings_change_no_figure(line):
    line.explorer.set(far=True, slope=0.5)
    with matplotlib.rc_context(), np.errstate(all="raise"), np.printoptions(precision=1):
        matplotlib.style.use("dark_background")
        matplotlib.rcParams.update({"font.size": 30, "lines.linewidth": 9, "axes.unicode_minus": False})
        chosen = dict.copy(matplotlib.rcParams)
        other = Line(compute=lambda **values: line.compute(**values) | {"tiny": np.float64(1e-300) * 1e-300})
        other.explorer.set(far=True, slope=0.5)
        assert dict.copy(matplotlib.rcParams) == chosen
    assert other.explorer.png() == line.explorer.png()


def test_steps_on_several_threads_are_one_at_a_time():
    lines = [Line(), Line()]
    before = dict.copy(matplotlib.rcParams)

    def work(name, values):
        for value in values:
            for line in lines:
                line.explorer.set(**{name: value})

    threads = [threading.Thread(target=work, args=given) for given in (
        ("slope", np.linspace(-1.05, 1.05, 40)), ("zoom", np.linspace(0.5, 2, 40)), ("far", [True, False] * 20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = Line()
    fresh.explorer.set(slope=1.05, zoom=2.0, far=False)
    assert [line.explorer.png() == fresh.explorer.png() for line in lines] == [True, True]
    assert dict.copy(matplotlib.rcParams) == before


def test_sharp_and_back(line):
    small = line.explorer.png()
    line.images()[0].set_state({"ratio": 2.0})
    assert pixels(line.explorer.png()).shape == (2 * HEIGHT, 2 * WIDTH, 4)
    data, _ = line.explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == small  # notebooks stay as they are
    line.move(slope=0.5)
    assert pixels(line.explorer.png()).shape == (2 * HEIGHT, 2 * WIDTH, 4)
    line.images()[0].set_state({"ratio": 1.0})
    line.move(slope=1.0)
    assert line.explorer.png() == small


def test_a_figure_whose_cell_runs_again_is_closed(monkeypatch):
    parent = {"metadata": {"cellId": "a cell"}, "header": {}}
    kernel = SimpleNamespace(get_parent=lambda channel: parent)
    history = {}
    shell = SimpleNamespace(kernel=kernel, user_ns={"_oh": history}, user_ns_hidden={})
    monkeypatch.setattr(live, "get_ipython", lambda: shell)
    monkeypatch.setattr(live, "_shown", {})
    counts, lines = [], []
    for run in range(4):
        parent["header"] = {"msg_id": run}
        lines.append(Line())
        lines[-1].explorer._repr_mimebundle_()
        history[run] = lines[-1].explorer
        counts.append(len(_instances))
    assert counts[0] == counts[-1]
    assert list(history) == [3]
    lines[0].move(slope=0.5)  # nobody sees it, and nothing breaks
    parent["metadata"] = {"cellId": "another cell"}
    data, _ = lines[0].explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == lines[0].explorer.png()
    browser_says(lines[0], slope=0.7)
    assert lines[0].explorer.readout["slope"] == 0.7
    assert all(widget.comm is not None for widget in live._tree(lines[0].explorer.widget))


def test_code_may_set_a_widget_back_at_once(line):
    line.explorer.set(slope=0.5)
    line.explorer.set(slope=0.7)
    line.move(slope=0.5)
    assert line.explorer.readout["slope"] == 0.5


def test_a_coupled_control_gets_new_limits_and_its_value_at_once():
    line = Line(couple=lambda name, values: {"mirror": {"min": 10, "max": 20, "value": 15}} if name == "far" else {})
    line.move(far=True)
    mirror = line.explorer.controls["mirror"]
    assert (mirror.min, mirror.max, mirror.value) == (10, 20, 15)
    assert [c["mirror"] for c in line.computed] == [15]
    line.explorer.set(mirror=18.0)
    with pytest.raises(ValueError, match="from 10 to 20"):
        line.explorer.set(mirror=0.0)


def test_an_arrangement_of_its_own():
    line = Line(arrange=lambda controls, chips: widgets.VBox([*chips.values(), *controls.values()]))
    first = line.explorer.widget.children[0]
    assert isinstance(first, widgets.VBox)
    assert set(first.children) == {*line.explorer.controls.values(), *line.explorer.chips.values()}


def contrast(color, background="white"):
    """The ratio of WCAG 2, from 1 to 21."""
    parts = [np.array(to_rgb(c)) for c in (color, background)]
    linear = [np.where(p <= 0.04045, p / 12.92, ((p + 0.055) / 1.055) ** 2.4) for p in parts]
    dark, light = sorted(float(p @ [0.2126, 0.7152, 0.0722]) for p in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("color, background, ratio", [("black", "white", 21), ("#777777", "white", 4.48),
                                                      ("#767676", "white", 4.54), ("blue", "white", 8.59)])
def test_contrast_as_others_compute_it(color, background, ratio):
    assert contrast(color, background) == pytest.approx(contrast(background, color)) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("name", ["BLACK", "BLUE", "SKY", "GREEN", "ORANGE", "VERMILION", "PURPLE", "GREY"])
def test_colors_of_figures_stand_out_from_white(name):
    assert contrast(getattr(colors, name)) >= 3


FIGURES = {  # what each is called with; texts name samples
    "float_bits": [], "mapping": [], "clipping": ["activations"], "drift": ["activations", "new_activations"],
    "granularity": ["weights"], "digits_ptq": [], "qat": [], "landscape": [], "outliers": [], "smoothing": [],
    "codebooks": ["weights"], "rotation_2d": [], "rotation": [], "compensation": [], "clip_search": [],
    "training_run": [[{"step": 0, "loss": 1.0, "ranges": {"conv": (0.0, 3.0)}}]],
}


def test_every_figure_is_looked_at():
    assert {*FIGURES, "watch", "watch_rotation"} == {*explorers.__all__}


@pytest.mark.parametrize("name", FIGURES)
def test_text_of_figures_can_be_read(name):
    arguments = [samples.load(value) if isinstance(value, str) else value for value in FIGURES[name]]
    with without_pixels():
        figure = getattr(explorers, name)(*arguments).figure
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert len(texts) > 5
    for text in texts:
        box = text.get_bbox_patch()
        assert contrast(text.get_color(), box.get_facecolor() if box else "white") >= 4.5, text
        assert to_rgba(text.get_color(), text.get_alpha())[3] == 1, text


def test_bits_can_be_read():
    boxes = BitBoxes(0x40490FDB, FP32)
    for button in (button for group in boxes.children for button in group.children[1].children):
        assert contrast(button.style.text_color, button.style.button_color) >= 4.5


def test_an_error_can_be_read_in_every_theme(line):
    """It brings its own background."""
    line.move(slope=-3.0)
    color, background = re.search(r'role="alert" style="color:(#\w+); background:(#\w+);', line.text()).groups()
    assert contrast(color, background) >= 4.5


def test_numbers_take_their_color_from_the_theme(line):
    assert "color:" not in line.explorer.widget.children[3].numbers


def test_no_tooltip_says_null(line):
    assert {control.tooltip for control in line.explorer.controls.values()} == {""}


def test_a_tooltip_is_kept():
    slope = widgets.FloatSlider(description="slope", tooltip="rise over run")
    with new_figure(WIDTH, HEIGHT) as figure:
        Explorer(figure, {"slope": slope}, lambda slope: slope, lambda slope: None, lambda slope: {}, title="",
                 description="")
    assert slope.tooltip == "rise over run"
