"""Live figures under a learner's hands: keys, mouse and Run All in a real JupyterLab."""

import json
import os

import pytest

from qlab import calibration, samples
from tests.browser.lab import ask_kernel, errors_of_the_console, find_chromium

if not find_chromium() and not os.environ.get("CI"):
    pytest.skip("no Chromium: install it, or name it in QLAB_CHROMIUM", allow_module_level=True)

SMALL = {  # variable: the code that makes its figure
    "live": 'clipping(samples.load("activations"), bits=4)',
    "moved": 'drift(samples.load("activations"), samples.load("new_activations"))',
    "boxes": "float_bits()",
    "mapped": "mapping()",
    "rows": 'granularity(samples.load("weights"), bits=5)',
}
SLIDERS = [("live", "α", "alpha", "mse"), ("live", "β", "beta", "mse"), ("live", "bits", "bits", "mse"),
           ("moved", "gain", "gain", "static_sqnr_db"), ("moved", "bits", "bits", "dynamic_sqnr_db"),
           ("mapped", "bits", "bits", "mse"), ("rows", "bits", "bits", "sqnr_db")]
PIXELS = """image => { if (!image?.complete || !image.naturalWidth) return null;
  if (image.of === image.src) return image.pixels;  // each picture has an address of its own
  const canvas = document.createElement('canvas'), [w, h] = [image.naturalWidth, image.naturalHeight];
  canvas.width = w; canvas.height = h; const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
  const words = new Uint32Array(context.getImageData(0, 0, w, h).data.buffer);
  image.of = image.src;
  return image.pixels = [w, h, new Set(words).size,
                         words.reduce((hash, word) => Math.imul(hash ^ word, 16777619), 7)].join(); }"""
CHANGED = f"([image, before]) => {{ const now = ({PIXELS})(image); return now && now !== before && now; }}"
NUMBER = """([figure, name]) => { const cell = Array.from(figure.querySelectorAll('.widget-html span'))
  .find(span => span.querySelector('b') && span.firstElementChild.textContent === name);
  return cell ? cell.querySelector('b').textContent : null; }"""
COUNT = """image => { image.pictures = 0;
  new MutationObserver(seen => { image.pictures += seen.length; }).observe(image, {attributeFilter: ['src']}); }"""
BREAK = """def broken(**_): raise KeyError('no <b>levels</b>')
kept, live._compute = live._compute, broken"""


class Figure:
    """One live figure in the page; ``variable`` is its name in the kernel."""

    def __init__(self, page, output, variable=None):
        self.page, self.output, self.variable = page, output, variable

    def image(self):
        return self.output.locator("img").element_handle()

    def pixels(self):
        self.page.wait_for_function(PIXELS, arg=self.image())
        return self.image().evaluate(PIXELS)

    def wait_for_change(self, before):
        return self.page.wait_for_function(CHANGED, arg=[self.image(), before], timeout=30_000).json_value()

    def number(self, name):
        return self.page.evaluate(NUMBER, [self.output.element_handle(), name.replace("_", " ")])

    def handle(self, label):
        row = self.output.locator(".widget-hslider", has=self.page.locator(f".widget-label:text-is('{label}')"))
        return row.locator(".noUi-handle")

    def press(self, label, key):
        """Press a key on a slider; gives the pixels that it has led to."""
        before = self.pixels()
        self.handle(label).press(key)
        return self.wait_for_change(before)

    def wait_for_rest(self, rounds=6):
        """Until nothing has moved for some round trips: sliders that a step has set may answer with steps."""
        seen = []
        for _ in range(10 * rounds):
            seen.append((self.kernel("readout"), self.pixels()))
            if len(seen) >= rounds and all(state == seen[-1] for state in seen[-rounds:]):
                return
        states = {json.dumps(readout): pixels for readout, pixels in seen}
        pytest.fail(f"the figure does not come to rest, {len(states)} states:\n" + "\n".join(states))

    def kernel(self, expression):
        return json.loads(ask_kernel(self.page, f"import json; print(json.dumps({self.variable}.{expression}))"))

    def type(self, label, text):
        """Type into a text field, and Enter."""
        field = self.output.locator(".widget-text", has=self.page.locator(f".widget-label:text-is('{label}')"))
        field.locator("input").fill(text)
        field.locator("input").press("Enter")

    def alert(self):
        return self.output.locator("[role=alert]")

    def assert_agrees_with_the_kernel(self, *names):
        self.wait_for_rest()
        readout = self.kernel("readout")
        for name in names:
            assert float(self.number(name)) == pytest.approx(readout[name], rel=1e-3)


@pytest.fixture(scope="module")
def figures(desk):
    imports = "from qlab import samples\nfrom qlab.explorers import clipping, drift, float_bits, granularity, mapping"
    page = desk.show("small.ipynb", imports, *(f"{name} = {code}\n{name}" for name, code in SMALL.items()))
    outputs = page.locator(".jp-OutputArea-output", has=page.locator("img"))
    outputs.nth(len(SMALL) - 1).wait_for()
    return {name: Figure(page, outputs.nth(i), name) for i, name in enumerate(SMALL)}


@pytest.fixture(scope="module", autouse=True)
def said(figures, desk):
    """Of these figures: JupyterLab may say something while it closes the notebook before."""
    return errors_of_the_console(desk.page)


@pytest.fixture
def live(figures):
    """The clipping figure, back at the range that it starts with."""
    figure = figures["live"]
    figure.handle("β").press("End")
    figure.alert().wait_for(state="detached")
    figure.wait_for_rest()  # without it, a test may take the picture from before the key as its first one
    return figure


@pytest.mark.parametrize("variable", SMALL)
def test_the_picture_has_the_figures_size(figures, variable):
    figure = figures[variable]
    width, height, colors, _ = map(int, figure.pixels().split(","))
    assert [width, height] == figure.kernel("figure.bbox.size.astype(int).tolist()")
    assert colors > 20
    assert 0.5 * width < figure.image().bounding_box()["width"] <= width + 1


@pytest.mark.parametrize("variable, label, control, number", SLIDERS)
def test_arrow_keys(figures, variable, label, control, number):
    figure = figures[variable]
    start, value = figure.pixels(), figure.kernel(f"controls['{control}'].value")
    there, back = ("ArrowRight", "ArrowLeft") if control in ("alpha", "gain") else ("ArrowLeft", "ArrowRight")
    moved = figure.press(label, there)
    assert figure.kernel(f"controls['{control}'].value") != value
    figure.assert_agrees_with_the_kernel(number)
    figure.press(label, back)
    figure.wait_for_rest()
    assert figure.pixels() == start != moved
    assert figure.kernel(f"controls['{control}'].value") == pytest.approx(value)
    figure.assert_agrees_with_the_kernel(number)


def test_a_touched_key_is_one_picture_and_a_held_one_shows_the_state_before(live):
    live.image().evaluate(COUNT)
    once = live.press("β", "ArrowLeft")
    live.wait_for_rest()
    assert live.image().evaluate("image => image.pictures") == 1
    live.page.keyboard.down("ArrowLeft")
    second = live.wait_for_change(once)
    live.page.keyboard.down("ArrowLeft")
    ghostly = live.wait_for_change(second)
    live.page.keyboard.up("ArrowLeft")
    live.wait_for_change(ghostly)  # which goes when the key is let go
    live.wait_for_rest()
    assert live.image().evaluate("image => image.pictures") == 4


def test_dragging(live):
    before, beta = live.pixels(), live.kernel("controls['beta'].value")
    box, mouse = live.handle("β").bounding_box(), live.page.mouse
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse.move(x, y)
    mouse.down()
    mouse.move(x - 30, y, steps=3)
    halfway = live.wait_for_change(before)  # while the button is still down
    mouse.move(x - 80, y, steps=25)
    live.wait_for_change(halfway)
    mouse.up()
    live.assert_agrees_with_the_kernel("alpha", "beta", "mse", "rounding", "clipping", "sqnr_db", "clipped_percent")
    assert live.kernel("controls['beta'].value") < 0.8 * beta
    assert live.kernel("readout['alpha']") == pytest.approx(-live.kernel("readout['beta']"))


def test_chip(live):
    before = live.pixels()
    live.output.get_by_role("button", name="MSE").click()
    live.wait_for_change(before)
    live.assert_agrees_with_the_kernel("beta", "mse")
    best = calibration.mse(samples.load("activations"), bits=4, symmetric=True)
    assert live.kernel("readout['beta']") == pytest.approx(best[1], rel=1e-6)  # and not the slider's nearest step


@pytest.mark.parametrize("label, key", [("α", "End"), ("β", "Home")])
def test_a_range_keeps_a_width(live, label, key):
    live.press(label, key)
    live.assert_agrees_with_the_kernel("alpha", "beta", "mse")
    assert live.kernel("readout['alpha']") < 0 < live.kernel("readout['beta']")
    assert not live.alert().count()


def test_a_broken_callback_says_so(live):
    ask_kernel(live.page, BREAK)
    before = live.pixels()
    try:
        live.handle("bits").press("ArrowRight")
        live.alert().wait_for()
        assert "KeyError" in live.alert().inner_text()
        assert "no <b>levels</b>" in live.alert().inner_text()
        above, here, below = (part.bounding_box()["y"] for part in (live.handle("bits"), live.alert(), live.image()))
        assert above < here < below
        assert live.pixels() == before
    finally:
        ask_kernel(live.page, "live._compute = kept")
    live.press("bits", "ArrowRight")
    live.alert().wait_for(state="detached")


def test_a_bit_by_mouse_and_by_keyboard(figures):
    figure = figures["boxes"]
    start = figure.pixels()
    box = figure.output.get_by_title("mantissa, bit 22", exact=True)
    box.click()
    flipped = figure.wait_for_change(start)
    assert figure.kernel("readout['hex']") == "0xC2AD4000"
    assert box.inner_text() == "0"
    box.press("Space")
    assert figure.wait_for_change(flipped) == start
    assert figure.kernel("readout['hex']") == "0xC2ED4000"
    figure.page.keyboard.press("Tab")
    assert figure.page.evaluate("() => document.activeElement.title") == "mantissa, bit 21"


def test_typing_a_number_a_word_and_nonsense(figures):
    figure = figures["boxes"]
    before = figure.pixels()
    figure.type("value", "0.1")
    figure.wait_for_change(before)
    assert figure.kernel("readout['hex']") == "0x3DCCCCCD"
    before = figure.pixels()
    figure.type("value", "seven")
    figure.alert().wait_for()
    assert "value must be a number" in figure.alert().inner_text()
    assert figure.pixels() == before
    figure.type("hex", "C2ED4000")
    figure.wait_for_change(before)
    figure.alert().wait_for(state="detached")
    assert figure.kernel("readout['stored']") == "−118.625"


def test_own_numbers_in_the_mapping(figures):
    figure = figures["mapped"]
    before = figure.pixels()
    figure.type("data", "1, two")
    figure.alert().wait_for()
    assert figure.pixels() == before
    figure.type("data", "1 2 3")
    figure.wait_for_change(before)
    figure.alert().wait_for(state="detached")
    figure.wait_for_rest()
    assert figure.kernel("readout['codes']") == "42 85 127"


def test_moving_an_end_switches_the_scheme_and_rests(figures):
    figure = figures["mapped"]
    figure.press("β", "ArrowLeft")
    figure.assert_agrees_with_the_kernel("mse", "scale")
    assert figure.kernel("controls['scheme'].value") == "α, β"


def test_the_console_is_quiet(figures, said):
    assert not said
