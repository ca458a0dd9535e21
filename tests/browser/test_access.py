"""Live figures for every learner: by keyboard alone, by screen reader, in the dark theme, at twice the size."""

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from tests.browser.lab import set_theme, violations
from tests.browser.test_browser import Figure  # which skips this module, too, where there is no browser

FIGURES = {  # variable: the code that makes its figure, and what Tab reaches in turn, a slider before its number
    "live": ('clipping(samples.load("activations"), bits=4)',
             "α, α, value, β, β, value, bits, bits, value, linked: α = −β, log counts, all, crowd, min-max, 99.9 %, "
             "MSE, KL, ACIQ, Reset"),
    "boxes": ('float_bits("1.5", "FP8 E4M3")',
              "format, value, hex, binary, −118.625, 0.1, π, 1, −0, smallest, smallest normal, largest, ∞, NaN, "
              "sign, bit 0, exponent, bit 3, exponent, bit 2, exponent, bit 1, exponent, bit 0, mantissa, bit 2, "
              "mantissa, bit 1, mantissa, bit 0, Reset"),
    "mapped": ("mapping()",
               "data, seven numbers, [1, 2, 3], ties: absmax at 4 bits, all ≥ 0, outlier, absmax, zero-point, α, β, "
               "bits, bits, value, value, value, value, α, α, value, β, β, value, Reset"),
    "run": ('training_run([{"step": i, "loss": 3 - i, "ranges": {"conv": (0.0, 3.0)}} for i in range(3)])',
            "play, stop, repeat, step, step, value, Reset"),
}
FOCUSED = [  # one control of each kind
    ("live", ".noUi-handle"), ("live", ".widget-readout"), ("live", "[type=checkbox]"),
    ("live", ".widget-toggle-button.mod-active"), ("live", ".widget-toggle-button:not(.mod-active)"),
    ("live", "button:text-is('MSE')"), ("boxes", "select"), ("boxes", "[type=text]"),
    ("boxes", "button[title='sign, bit 0']"), ("boxes", "button[title='mantissa, bit 2']"),
    ("run", ".widget-play button"),
]
NAME = """() => { const focused = document.activeElement;
  return focused.ariaLabel || focused.title || focused.closest('.jupyter-widgets')?.querySelector(
    `label[for="${focused.id}"]`)?.textContent || focused.closest('label')?.textContent || focused.textContent; }"""
RECTANGLES = """figure => Array.from(figure.querySelectorAll(
    'button, input, select, img, .widget-slider, .widget-label, .widget-readout, .widget-html-content span:has(b)'))
  .filter(e => e.offsetParent).map(e => { const {left, top, right, bottom} = e.getBoundingClientRect();
    return [e.className || e.tagName, left, top, right, bottom]; })"""


@pytest.fixture(scope="module")
def figures(desk):
    imports = "from qlab import samples\nfrom qlab.explorers import clipping, float_bits, mapping, training_run"
    page = desk.show("access.ipynb", imports, *(f"{name} = {code}\n{name}" for name, (code, _) in FIGURES.items()))
    outputs = page.locator(".jp-OutputArea-output", has=page.locator("img"))
    outputs.nth(len(FIGURES) - 1).wait_for()
    return {name: Figure(page, outputs.nth(i), name) for i, name in enumerate(FIGURES)}


@pytest.fixture(params=[pytest.param("Light", marks=pytest.mark.long), "Dark"])
def theme(request, figures):
    page = figures["live"].page
    set_theme(page, request.param)
    yield request.param
    set_theme(page, "Light")


def focus(figure, target):
    """As the Tab key does, after which the browser shows the focus: another test presses Tab all the way."""
    figure.output.locator("button, input, select, .noUi-handle").first.focus()
    figure.page.keyboard.press("Tab")
    target.evaluate("element => element.focus()")
    assert target.evaluate("element => element.matches(':focus-visible')")


@pytest.mark.parametrize("variable", FIGURES)
def test_tab_reaches_every_control_in_order(figures, variable):
    figure = figures[variable]
    controls = figure.output.locator("button, input, select, .noUi-handle, .widget-readout").locator("visible=true")
    enabled = [control for control in controls.all() if control.is_enabled()
               and control.get_attribute("disabled") is None and control.get_attribute("tabindex") != "-1"]
    controls.first.focus()
    seen = []
    while figure.output.evaluate("output => output.contains(document.activeElement)"):
        seen.append(figure.page.evaluate(NAME).strip())
        assert len(seen) <= 60, "Tab does not leave the figure"
        figure.page.keyboard.press("Tab")
    assert ", ".join(seen) == FIGURES[variable][1]
    assert len(seen) == len(enabled)


def test_focus_is_visible(figures, theme):
    """As many pixels as three quarters of the control's outline has, at the least, change with a contrast of 3 : 1."""
    unseen = []
    for variable, selector in FOCUSED:
        figure = figures[variable]
        target = figure.output.locator(selector).first
        target.scroll_into_view_if_needed()
        focus(figure, target)
        box = target.bounding_box()
        clip = {"x": box["x"] - 4, "y": box["y"] - 4, "width": box["width"] + 8, "height": box["height"] + 8}
        focused = luminance(figure.page, clip)
        target.evaluate("element => element.blur()")
        plain = luminance(figure.page, clip)
        ratio = (np.maximum(focused, plain) + 0.05) / (np.minimum(focused, plain) + 0.05)
        if np.count_nonzero(ratio >= 3) < 1.5 * (box["width"] + box["height"]):
            unseen.append((variable, selector))
    assert not unseen


def luminance(page, clip):
    """Relative luminance of the pixels, as WCAG defines it."""
    page.mouse.move(0, 0)
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip, animations="disabled", caret="hide")))
    linear = (np.asarray(shot.convert("RGB")) / 255) ** 2.2
    return linear @ [0.2126, 0.7152, 0.0722]


def test_what_a_screen_reader_gets(figures):
    live, run = figures["live"], figures["run"]
    assert live.image().get_attribute("alt") == "Clipping 73,728 values"
    assert [handle.get_attribute("aria-label") for handle in live.output.get_by_role("slider").all()] == [
        "α", "β", "bits"]
    assert [button.get_attribute("aria-label") for button in run.output.locator(".widget-play button").all()] == [
        "play", "stop", "repeat"]
    assert not live.output.locator(".widget-label[title=null]:visible").count()


def test_which_button_is_chosen(figures):
    """It is said, and shown by more than its shade."""
    live = figures["live"]
    before = live.pixels()
    live.output.get_by_role("button", name="crowd", pressed=False).click()
    live.wait_for_change(before)
    live.output.get_by_role("button", name="crowd", pressed=True).wait_for()
    shadows = [live.output.get_by_role("button", name=name).evaluate("button => getComputedStyle(button).boxShadow")
               for name in ("crowd", "all")]
    assert "inset" in shadows[0] and "inset" not in shadows[1]
    live.output.get_by_role("button", name="all", pressed=False).click()
    live.output.get_by_role("button", name="all", pressed=True).wait_for()


def test_an_error_message_can_be_read(figures, theme):
    boxes = figures["boxes"]
    boxes.type("value", "seven")
    boxes.alert().wait_for()
    try:
        found = violations(boxes.page)
    finally:
        boxes.type("value", "1.5")
        boxes.alert().wait_for(state="detached")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule, html", [
    ("color-contrast", "<p style='color:#999; background:#FFF'>pale</p>"),
    ("image-alt", "<img src='data:,' width=9 height=9>"),
    ("button-name", "<button></button>"),
])
def test_axe_finds_what_is_wrong(figures, rule, html):
    page = figures["live"].page
    page.evaluate("html => document.querySelector('.qlab-below .widget-html-content').insertAdjacentHTML('afterend', "
                  "`<div id=wrong>${html}</div>`)", html)
    page.evaluate("document.querySelector('#wrong').parentElement.style.overflow = 'visible'")
    try:
        found = violations(page)
    finally:
        page.evaluate("document.querySelector('#wrong').remove()")
    assert [line.split(":")[0] for line in found] == [rule]


@pytest.mark.parametrize("variable", FIGURES)
def test_nothing_is_cut_or_covered_at_200_percent(figures, variable):
    """A window of 1280 × 800 pixels at 200 % is one of 640 × 400."""
    figure = figures[variable]
    size = figure.page.viewport_size
    figure.page.set_viewport_size({"width": 640, "height": 400})
    try:
        figure.output.scroll_into_view_if_needed()
        box = figure.output.locator(".qlab").evaluate(
            "box => { const {left, right} = box.getBoundingClientRect(); return [left, right]; }")
        rectangles = figure.output.locator(".qlab").evaluate(RECTANGLES)
        cut = figure.output.locator(".qlab *").evaluate_all(
            """all => all.filter(e => e.offsetParent && e.clientWidth > 1 && !e.matches('input, .widget-readout')
              && getComputedStyle(e).overflowX !== 'visible' && e.scrollWidth > e.clientWidth + 1)
              .map(e => e.className + ' ' + e.textContent.slice(0, 30))""")
    finally:
        figure.page.set_viewport_size(size)
    assert not cut
    for what, left, _, right, _ in rectangles:
        assert box[0] - 1 <= left < right <= box[1] + 1, what
    for (one, l1, t1, r1, b1), (other, l2, t2, r2, b2) in combinations(rectangles, 2):
        inside = l1 <= l2 and r2 <= r1 and t1 <= t2 and b2 <= b1  # a slider's own label
        across, down = min(r1, r2) - max(l1, l2), min(b1, b2) - max(t1, t2)
        assert inside or across <= 1 or down <= 1, (one, other)
