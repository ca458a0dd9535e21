"""Each figure of the lessons, and all that can be taken in its picture: by mouse, and by finger in the dark, sharp."""

import pytest

from tests.browser.lab import ask_kernel, set_theme
from tests.browser.test_browser import Figure  # which skips this module, too, where there is no browser
from tests.browser.test_hands import touch

pytestmark = pytest.mark.long
IMPORTS = """from qlab import samples
from qlab.explorers import *
activations, weights = samples.load("activations"), samples.load("weights")"""
FIGURES = {  # and what can be taken in each
    "clipping(activations, bits=4)": {"α", "β", "the range"},
    "drift(activations, 1.5 * activations)": {"the data, times the gain", "the gain"},
    "mapping()": {"a value", "α", "β"},
    "float_bits(1.5)": {"the power of two"},
    "float_bits(1.5, 'FP8 E4M3')": {"the number"},
    "codebooks(weights)": {"the value"},
    "outliers()": {"the threshold"},
    "qat()": {"s, the step", "x", "the end of the range"},
    "smoothing()": {"α"},
    "rotation_2d()": {"the cloud", "the grid", "θ"},
    "compensation()": {"columns"},
    "clip_search()": {"the share"},
    "training_run([{'step': i, 'loss': 9 - i} for i in range(9)])": {"the step"},
}
BEFORE = {  # where all of it can be taken, and moved either way
    "clipping": "linked=False, alpha=-1, beta=1", "drift": "gain=1.0", "float_bits": "value='1.7'",
    "outliers": "treatment='clip'", "smoothing": "direction='X / s, W · s'", "training_run": "step=4",
}
SPOTS = """figure => { const spots = {}, shares = [.5, .3, .7, .1, .9];
  for (const grip of figure.querySelectorAll('.qlab-grip')) {
    const box = grip.getBoundingClientRect();
    for (const down of shares) for (const along of shares) {
      const [x, y] = [box.left + along * box.width, box.top + down * box.height];
      if (document.elementFromPoint(x, y) === grip) spots[grip.dataset.name] ??= [x, y]; } }
  return spots; }"""
WAYS = {"Light": 1, "Dark": 2}  # theme: pixels of the screen to one of the page


def by_mouse(page, start, stop):
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*stop, steps=8)
    page.mouse.up()


@pytest.fixture(scope="module", params=WAYS)
def figures(request, desk):
    """All of them, and what moves a hand: a mouse, or a finger on a sharp screen."""
    cells = [f"live_{i} = {code}\nlive_{i}" for i, code in enumerate(FIGURES)]
    page = desk.show(f"handles_{request.param}.ipynb", IMPORTS, *cells)
    set_theme(page, request.param)
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setDeviceMetricsOverride", {
        "width": 1280, "height": 1390, "deviceScaleFactor": WAYS[request.param], "mobile": False})
    outputs = page.locator(".jp-OutputArea-output", has=page.locator(".qlab-frame img"))
    outputs.nth(len(FIGURES) - 1).wait_for()
    yield ({code: Figure(page, outputs.nth(i), f"live_{i}") for i, code in enumerate(FIGURES)},
           touch if request.param == "Dark" else by_mouse)
    session.send("Emulation.clearDeviceMetricsOverride")
    set_theme(page, "Light")


@pytest.mark.parametrize("code", FIGURES)
def test_what_can_be_taken_is_dragged(figures, code):
    figures, drag = figures
    figure = figures[code]
    figure.output.locator(".qlab-frame").scroll_into_view_if_needed()

    def values():
        return ask_kernel(figure.page, f"print({{name: c.value for name, c in {figure.variable}.controls.items()}})")

    def begin():
        figure.output.get_by_role("button", name="Reset").click()
        figure.wait_for_rest(rounds=3)
        ask_kernel(figure.page, f"{figure.variable}.set({BEFORE.get(code.partition('(')[0], '')})")
        figure.wait_for_rest(rounds=3)
        return values(), figure.output.evaluate(SPOTS)

    _, spots = begin()
    assert set(spots) == FIGURES[code]
    for name in spots:
        for away in (60, -60):
            before, spots = begin()
            x, y = spots[name]
            drag(figure.page, (x, y), (x + away, y - away / 3))
            figure.wait_for_rest(rounds=3)
            if values() != before:
                break
        assert values() != before, name
        assert not figure.alert().count()
    assert ask_kernel(figure.page, f"print({figure.variable}.errors)").strip() == "[]"
