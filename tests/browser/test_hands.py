"""A figure in the hand: taken in the picture by mouse and touch, moved by its sliders, whatever the browser's delay."""

import json
from functools import cached_property

import pytest
from nbformat.v4 import new_markdown_cell

from tests.browser.lab import Desk, ask_kernel, jupyterlab
from tests.browser.test_browser import Figure  # which skips this module, too, where there is no browser

FIGURE = """
import ipywidgets as widgets
import numpy as np
from qlab.live import Explorer, FloatSlider, Handle, new_figure

def make():
    with new_figure(600, 300) as figure:
        axes = figure.subplots()
        axes.set(xlim=(-2, 2), ylim=(0, 1))
        line = axes.plot([], [], "o-", animated=True)[0]
        edges = [axes.axvline(0, animated=True) for _ in range(2)]
    def draw(r):
        line.set_data([r["alpha"], r["alpha"], r["beta"], r["beta"]], [0, r["height"], r["height"], 0])
        for edge, name in zip(edges, ("alpha", "beta")):
            edge.set_xdata([r[name]] * 2)
    def couple(name, values):
        if name == "data":
            size = float(values["data"])
            return {end: {"min": -size, "max": size, "step": size / 200, "value": side * size}
                    for end, side in (("alpha", -1), ("beta", 1))}
        return {"beta": -values["alpha"]} if values["linked"] and name == "alpha" else (
            {"alpha": -values["beta"]} if values["linked"] and name == "beta" else {})
    def end(name):
        return Handle(name, axes, lambda r: (r[name], None), lambda x, y, start: {name: x})
    return Explorer(
        figure,
        {"data": widgets.Dropdown(options=["2", "1", "0.3"], description="data"),
         "alpha": FloatSlider(-1.0, min=-2, max=2, step=0.01, description="alpha"),
         "beta": FloatSlider(1.0, min=-2, max=2, step=0.01, description="beta"),
         "height": FloatSlider(0.5, min=0, max=1, step=0.01, description="height"),
         "linked": widgets.Checkbox(False, description="linked")},
        lambda **values: values, draw, lambda r: {n: r[n] for n in ("alpha", "beta", "height")}, couple=couple,
        chips={"tiny": lambda **_: {"data": "0.3"}, "odd": lambda **_: {"alpha": -0.123456, "beta": 0.654321}},
        handles=[
            Handle("the range", axes, lambda r: ((r["alpha"], r["beta"]), None), lambda x, y, start: {
                n: start.values[n] + x - start.x for n in ("alpha", "beta")}),
            end("alpha"), end("beta"),
            Handle("a point", axes, lambda r: [(r["alpha"], r["height"]), (r["beta"], r["height"])],
                   lambda x, y, start: {("alpha", "beta")[start.mark]: x, "height": y}),
        ],
        hover=lambda axes, x, y, r: f"x = {x:.2f}", title="A box", description="A box with two ends and a height.")
"""

MODELS = "from ipywidgets.widgets.widget import _instances; print(len(_instances))"
FRESH = """import json
fresh = make()
fresh.set(data=box.controls["data"].value)
fresh.set(linked=box.controls["linked"].value, height=box.controls["height"].value)
fresh.set(**{name: box.readout[name] for name in ("alpha", "beta")})
print(json.dumps([fresh.png() == box.png(), fresh.readout == box.readout, [str(error) for error in box.errors]]))
fresh.close()"""
RUN_AGAIN = """async () => { const panel = jupyterapp.shell.currentWidget; panel.content.activeCellIndex = 1;
  await jupyterapp.commands.execute('notebook:run-cell'); }"""
CLOSE_VIEW = """() => { for (const area of ['main', 'down', 'right', 'left'])
  for (const widget of [...jupyterapp.shell.widgets(area)])
    if (widget.title.label === 'Output View') widget.dispose(); }"""
TWO_FRAMES = """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(
  () => setTimeout(done, 100))))"""
SCROLLED = "() => document.querySelector('.jp-WindowedPanel-outer').scrollTop"


def touch(page, start, stop, steps=8):
    """A finger goes from one place of the page to another."""
    page.evaluate(TWO_FRAMES)
    (x, y), (to_x, to_y) = start, stop
    points = [{"x": x + (to_x - x) * i / steps, "y": y + (to_y - y) * i / steps} for i in range(steps + 1)]
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points[:1]})
    for point in points[1:]:
        session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    page.evaluate(TWO_FRAMES)  # the browser hands on one move in a frame
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(100)
    session.detach()


class Box(Figure):
    """The figure of this module."""

    @cached_property
    def axes(self):
        return self.kernel("figure.axes[0].get_position().bounds")

    def at(self, x, y):
        """The place of a point of the data on the page."""
        (left, bottom, width, height), box = self.axes, self.image().bounding_box()
        return (box["x"] + box["width"] * (left + width * (x + 2) / 4),
                box["y"] + box["height"] * (1 - bottom - height * y))

    def drag(self, start, *stops, steps=10):
        mouse = self.page.mouse
        mouse.move(*self.at(*start))
        mouse.down()
        for stop in stops:
            mouse.move(*self.at(*stop), steps=steps)
        mouse.up()

    def touch(self, start, stop):
        """A finger, on what has been drawn: where nothing can be taken yet, the browser scrolls."""
        self.wait_for_rest(rounds=2)
        touch(self.page, self.at(*start), self.at(*stop))

    def wait_for(self, **values):
        """Until the kernel has them, as near as a pixel and a slider's step are."""
        for _ in range(100):
            readout = self.kernel("readout")
            if all(abs(readout[name] - value) <= 0.015 for name, value in values.items()):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"{readout} and not {values}")

    def assert_sound(self):
        """At rest; numbers, sliders and picture agree with each other and with those of a new figure."""
        self.wait_for_rest()
        assert json.loads(ask_kernel(self.page, FRESH)) == [True, True, []]
        for name, value in self.kernel("readout").items():
            assert float(self.number(name).replace("−", "-")) == pytest.approx(value, rel=1e-3)
            shown = float(self.handle(name).get_attribute("aria-valuenow"))
            assert shown == value


def shown(desk):
    page = desk.show("hands.ipynb", FIGURE, "box = make()\nbox", new_markdown_cell("a long page\n\n" * 60))
    page.locator(".qlab-frame img").wait_for()
    return page


def box_on(page):
    return Box(page, page.locator(".jp-OutputArea-output", has=page.locator(".qlab-frame")).first, "box")


@pytest.fixture(scope="module")
def page(desk):
    return shown(desk)


@pytest.fixture
def box(page):
    """The figure, as at first, by its Reset."""
    box = box_on(page)
    box.output.get_by_role("button", name="Reset").click()
    box.wait_for(alpha=-1, beta=1, height=0.5)
    ask_kernel(page, "box.errors.clear()")
    yield box
    page.evaluate("() => { window.late = 0; }")


def test_sharp_on_a_screen_with_two_pixels_to_one(box):
    before = box.pixels().split(",")[:2]
    session = box.page.context.new_cdp_session(box.page)
    session.send("Emulation.setDeviceMetricsOverride",
                 {"width": 1280, "height": 1390, "deviceScaleFactor": 2, "mobile": False})
    try:
        box.page.wait_for_function("image => image.naturalWidth === 1200", arg=box.image())
        box.drag((-1, 0.25), (-0.4, 0.9))
        box.wait_for(alpha=-0.4, beta=1)
        assert box.image().bounding_box()["width"] == 600
    finally:
        session.send("Emulation.clearDeviceMetricsOverride")
    box.page.wait_for_function("image => image.naturalWidth === 600", arg=box.image())
    assert box.pixels().split(",")[:2] == before == ["600", "300"]
    box.assert_sound()


@pytest.mark.parametrize("start, stop, values", [
    ((-1, 0.25), (-0.4, 0.9), {"alpha": -0.4, "beta": 1, "height": 0.5}),
    ((1.03, 0.75), (1.63, 0.75), {"alpha": -1, "beta": 1.6, "height": 0.5}),  # taken beside its middle: no jump
    ((0, 0.3), (0.5, 0.3), {"alpha": -0.5, "beta": 1.5, "height": 0.5}),
    ((1, 0.5), (0.5, 0.8), {"alpha": -1, "beta": 0.5, "height": 0.8}),
    ((-1, 0.25), (-9, 0.25), {"alpha": -2, "beta": 1, "height": 0.5}),  # out of the picture
])
def test_dragging_in_the_picture(box, start, stop, values):
    box.drag(start, stop)
    box.wait_for(**values)
    box.assert_sound()


@pytest.mark.parametrize("start, stop, values", [
    ((-1, 0.25), (-0.4, 0.25), {"alpha": -0.4, "beta": 1}), ((0, 0.3), (0.5, 0.3), {"alpha": -0.5, "beta": 1.5}),
    ((1, 0.5), (0.5, 0.8), {"beta": 0.5, "height": 0.8}),
])
def test_dragging_by_touch(box, start, stop, values):
    before = box.page.evaluate(SCROLLED)
    box.touch(start, stop)
    box.wait_for(**values)
    box.assert_sound()
    assert box.page.evaluate(SCROLLED) == before


def test_what_cannot_be_taken_scrolls_the_page(box):
    before = box.page.evaluate(SCROLLED)
    box.touch((1.8, 0.1), (1.8, 0.9))
    box.page.wait_for_function(f"before => ({SCROLLED})() !== before", arg=before)
    assert box.kernel("readout") == {"alpha": -1, "beta": 1, "height": 0.5}


def test_the_cursor_and_the_tip_tell_what_is_there(box):
    cursor = "() => getComputedStyle(document.elementFromPoint(window.spot[0], window.spot[1])).cursor"
    box.page.evaluate("() => addEventListener('pointermove', e => { window.spot = [e.clientX, e.clientY]; }, true)")
    for spot, expected in (((-1, 0.25), "ew-resize"), ((0, 0.3), "grab"), ((1, 0.5), "grab"), ((1.7, 0.5), "auto")):
        box.page.mouse.move(*box.at(*spot))
        box.page.wait_for_function(f"expected => ({cursor})() === expected", arg=expected)
    tip = box.output.locator(".qlab-tip")
    box.page.wait_for_function("tip => tip.textContent === 'x = 1.70'", arg=tip.element_handle())


def late_browser(box, late):
    """Chips, new limits, coupled sliders and a drag, with messages that take so many ms in each direction."""
    box.page.evaluate("late => { window.late = late; }", late)
    box.output.get_by_role("button", name="tiny").click()
    box.wait_for(alpha=-0.3, beta=0.3)
    box.output.get_by_role("button", name="Reset").click()
    box.output.get_by_role("button", name="odd").click()
    box.wait_for(alpha=-0.123456, beta=0.654321)
    box.output.get_by_text("linked").click()
    box.drag((0.654321, 0.25), (1.2, 0.25), (0.9, 0.25), steps=30)
    box.page.wait_for_timeout(3 * late)
    box.wait_for(alpha=-0.9, beta=0.9)
    box.page.evaluate("() => { window.late = 0; }")
    box.assert_sound()


def chip_and_key(box, gap):
    """At once, or nearly: they are handled on two threads of the kernel."""
    chip = box.output.get_by_role("button", name="odd").element_handle()
    box.handle("height").focus()
    chip.evaluate("chip => chip.click()")
    box.page.wait_for_timeout(gap)
    box.page.keyboard.press("ArrowRight")


def test_a_late_browser(box):
    """The last word is the hand's, and then there is rest."""
    late_browser(box, 300)


def test_a_chip_and_a_key_at_once(box):
    for gap in range(0, 100, 10):
        chip_and_key(box, gap)
    box.wait_for(alpha=-0.123456, beta=0.654321, height=0.6)
    box.assert_sound()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_whatever_the_order_of_sets_and_the_delay(browser, tmp_path, monkeypatch, seed):
    """ipywidgets' sets of traits come in an order that the seed gives."""
    monkeypatch.setenv("PYTHONHASHSEED", str(seed))
    with jupyterlab(tmp_path) as address:
        page = browser.new_page()
        box = box_on(shown(Desk(page, address, tmp_path)))
        for late in (0, 150, 750):
            late_browser(box, late)
            box.output.get_by_text("linked").click()
            box.output.get_by_role("button", name="Reset").click()
            box.wait_for(alpha=-1, beta=1, height=0.5)
        for gap in range(0, 100, 10):
            chip_and_key(box, gap)
        box.wait_for(alpha=-0.123456, beta=0.654321, height=0.6)
        box.assert_sound()
        page.close()


def test_keys_and_typing_on_a_slider(box):
    box.handle("alpha").press("PageUp")
    box.wait_for(alpha=-0.95)
    box.handle("alpha").press("End")
    box.wait_for(alpha=2)
    row = box.output.locator(".widget-hslider").filter(has=box.page.locator(".widget-label:text-is('beta')"))
    row.locator(".widget-readout").fill("0.7777")
    row.locator(".widget-readout").press("Enter")
    box.wait_for(beta=0.7777)
    assert box.kernel("readout['beta']") == 0.7777
    row.locator(".widget-readout").fill("much")
    row.locator(".widget-readout").press("Enter")
    assert row.locator(".widget-readout").inner_text() == "0.78"
    box.assert_sound()


def test_a_second_view_stays_in_step(box):
    box.page.evaluate("() => { const panel = jupyterapp.shell.currentWidget; panel.content.activeCellIndex = 1; "
                      "return jupyterapp.commands.execute('notebook:create-output-view'); }")
    frames = box.page.locator(".qlab-frame img:visible")
    frames.nth(1).wait_for()
    try:
        box.handle("alpha").press("PageUp")
        box.wait_for(alpha=-0.95)
        box.wait_for_rest()
        both = [Figure(box.page, frames.nth(i).locator("xpath=..")).pixels() for i in range(2)]
        assert both[0] == both[1]
    finally:
        box.page.evaluate(CLOSE_VIEW)
        frames.nth(1).wait_for(state="detached")


def test_a_cell_that_runs_again_leaves_nothing_behind(box):
    box.assert_sound()
    before = ask_kernel(box.page, MODELS)
    for _ in range(5):
        box.page.evaluate(RUN_AGAIN)
        box.page.locator(".qlab-frame img").wait_for()
    assert ask_kernel(box.page, MODELS) == before
    box.handle("alpha").press("PageUp")
    box.wait_for(alpha=-0.95)
