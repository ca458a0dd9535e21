"""Make the README's pictures: each lesson's figure, and one dragged in a browser (``python -m tests.pictures``)."""

import io
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

from qlab import explorers, samples
from tests.browser.lab import chromium, jupyterlab, open_notebook, run_all

FOLDER = Path(__file__).parents[1] / "notebooks" / "pictures"
FIGURES = {
    "01": lambda: explorers.float_bits(-118.625),
    "02": lambda: explorers.mapping(bits=4),
    "03": lambda: explorers.clipping(samples.load("activations"), bits=4),
    "04": explorers.digits_ptq,
    "05": explorers.outliers,
    "06": explorers.smoothing,
    "07": explorers.rotation,
    "08": explorers.compensation,
    "09": lambda: explorers.codebooks(samples.load("weights")),
}
MOVES = {"03": {"beta": 0.52}, "04": {"weight_bits": 3, "activation_bits": 3}, "08": {"columns": 32}}
DRAGGED = "from qlab import explorers, samples\nlive = explorers.clipping(samples.load('activations'), bits=4)\nlive"
GRIP = ".qlab-grip[data-name='β']"
HAND = """() => { const hand = document.createElement('div');
  hand.innerHTML = '<svg width="26" height="38"><path d="M2 2v29l7-6 5 11 5-2-5-11h9z" fill="#fff" stroke="#000"/>';
  Object.assign(hand.style, { position: 'fixed', zIndex: 99999, pointerEvents: 'none' });
  document.body.append(hand);
  const follow = e => Object.assign(hand.style, { left: `${e.clientX - 2}px`, top: `${e.clientY - 2}px` });
  addEventListener('pointermove', follow, true); }"""


def lessons():
    """A picture for each lesson, with fewer colours: half of the bytes."""
    for lesson, make in FIGURES.items():
        explorer = make()
        explorer.set(**MOVES.get(lesson, {}))
        Image.open(io.BytesIO(explorer.png())).convert("RGB").quantize(64).save(FOLDER / f"{lesson}.png", optimize=True)


def dragged(frames=30):
    """A hand that pulls β inwards, past the least error, and back to it."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(DRAGGED)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, f"{folder}/drag.ipynb")
        with jupyterlab(folder) as address, chromium() as page:
            open_notebook(page, address, "drag.ipynb")
            assert run_all(page) == []
            page.locator(GRIP).first.wait_for()
            page.evaluate(HAND)
            output = page.locator(".jp-OutputArea-output:visible", has=page.locator(".qlab-frame")).bounding_box()
            grip, frame = (page.locator(part).last.bounding_box() for part in (GRIP, ".qlab-frame"))
            x, y = grip["x"] + grip["width"] / 2, grip["y"] + 0.7 * grip["height"]
            clip = output | {"height": min(output["height"], page.viewport_size["height"] - output["y"])}
            page.mouse.move(x, y)
            page.mouse.down()
            shots = []
            for i in range(frames):
                far = 0.36 * frame["width"] * (i / 20 if i < 20 else 1 - (i - 20) / 40)
                page.mouse.move(x - far, y)
                page.wait_for_timeout(250)
                shots.append(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))
            page.mouse.up()
    shots = [shot.resize((800, round(800 * shot.height / shot.width)), Image.Resampling.LANCZOS) for shot in shots]
    shots = [shot.quantize(64, dither=Image.Dither.NONE) for shot in shots]
    shots[0].save(FOLDER / "drag.gif", save_all=True, append_images=shots[1:], loop=0, optimize=True,
                  duration=[900, *[110] * (frames - 2), 1800])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    lessons()
    dragged()
