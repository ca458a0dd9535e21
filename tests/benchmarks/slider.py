"""From key press to changed pixels, in a real browser: the live figure against two ways learners know.

The empty step is what any answer costs: a slider whose kernel sends one number back. The next four paths show the same
demo (histogram with grid and clipped tails, error curves, moving marker; 100,000 values) in one JupyterLab, the others
further live figures. Key presses, and moves of the mouse in a drag, go to the paths in turn, so that whatever else the
machine does hits all of them. A press is answered when the picture has had its last change, an image is loaded and
decoded, and the browser has painted a frame.
"""

import statistics
import tempfile
from pathlib import Path

import nbformat

from tests.browser.lab import chromium, jupyterlab, open_notebook, run_all

SETUP = """
import warnings
import bqplot, ipywidgets as widgets, matplotlib.pyplot as plt, numpy as np
from qlab.affine import dequantize, fake_quantize, mse, range_params
from qlab.calibration import ErrorProfile
from qlab import samples
from qlab.explorers import clipping, float_bits, granularity, mapping, outliers
%config InlineBackend.figure_format = "png"
x = np.random.default_rng(0).standard_t(5, SIZE).astype(np.float32).clip(-12, 12)
profile = ErrorProfile(x)
reach = max(-profile.min, profile.max)
ends = reach * np.linspace(1 / 60, 1, 60)
edges = np.linspace(-1.04 * reach, 1.04 * reach, 361)
counts, _ = profile.histogram(edges)
curve = profile.split(-ends, ends, 4, symmetric=True)
ylim = curve.total.min() / 100, 3 * profile.std ** 2
def slider():
    return widgets.FloatSlider(reach / 2, min=reach / 400, max=reach, step=reach / 400, readout_format=".3f")
def grid(beta):
    params = range_params(-beta, beta, 4, symmetric=True)
    return dequantize(np.arange(params.qmin, params.qmax + 1), params), profile.split(-beta, beta, 4, symmetric=True)
"""

LIVE = """
live = clipping(profile, bits=4)
live.set(beta=reach / 2)
live
"""

INTERACT = """
def show(beta):
    params = range_params(-beta, beta, 4, symmetric=True)
    levels, error = dequantize(np.arange(params.qmin, params.qmax + 1), params), mse(x, fake_quantize(x, params))
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 4.7), sharex=True, layout="constrained")
    above.hist(x, edges, log=True)
    above.set(ylim=(0.7, 2 * counts.max()), xlim=(edges[0], edges[-1]))
    above.vlines(levels, 0.7, 2 * counts.max(), colors="black", lw=1, alpha=0.6)
    above.axvspan(edges[0], -beta, color="tab:red", alpha=0.22); above.axvspan(beta, edges[-1], color="tab:red", alpha=0.22)
    for side in (-1, 1):
        for part in ("rounding", "clipping", "total"):
            below.plot(side * ends, getattr(curve, part))
        below.axvline(side * beta, ls="--"); above.axvline(side * beta, ls="--")
        below.plot(side * beta, error, "ko", ms=11)
    below.set(yscale="log", ylim=ylim, title=f"MSE {error:.3g}")
    plt.show()
widgets.interact(show, beta=slider());
"""

BQPLOT = """
xs, ys, counts_scale = bqplot.LinearScale(min=edges[0], max=edges[-1]), bqplot.LogScale(min=ylim[0], max=ylim[1]), \
    bqplot.LogScale(min=0.7, max=2 * float(counts.max()))
middle = (edges[1:] + edges[:-1]) / 2
above = {"x": xs, "y": counts_scale}
below = {"x": xs, "y": ys}
bars = bqplot.Lines(x=middle, y=np.maximum(counts, 0.7), scales=above, fill="bottom", interpolation="step-after")
levels = bqplot.Lines(x=[[0, 0]], y=[[0.7, 2 * counts.max()]], scales=above, colors=["black"], stroke_width=1)
tails = bqplot.Lines(x=[[0, 0]] * 2, y=[[2 * counts.max()] * 2] * 2, scales=above, fill="bottom", fill_opacities=[0.2] * 2, colors=["red"])
ends_above = bqplot.Lines(x=[[0, 0]] * 2, y=[[0.7, 2 * counts.max()]] * 2, scales=above, colors=["black"])
curves = bqplot.Lines(x=[side * ends for side in (-1, 1) for _ in range(3)],
                      y=[np.maximum(getattr(curve, part), ylim[0]) for _ in (-1, 1) for part in ("rounding", "clipping", "total")], scales=below)
ends_below = bqplot.Lines(x=[[0, 0]] * 2, y=[ylim] * 2, scales=below, colors=["black"])
dots = bqplot.Scatter(x=[0, 0], y=[1, 1], scales=below, default_size=120, colors=["black"])
top = bqplot.Figure(marks=[bars, levels, tails, ends_above], axes=[bqplot.Axis(scale=xs), bqplot.Axis(scale=counts_scale, orientation="vertical")], animation_duration=0)
bottom = bqplot.Figure(marks=[curves, ends_below, dots], axes=[bqplot.Axis(scale=xs), bqplot.Axis(scale=ys, orientation="vertical")], animation_duration=0)
for figure in (top, bottom):
    figure.layout.width, figure.layout.height = "1000px", "235px"
mover, number = slider(), widgets.HTML()
def move(change):
    beta = change["new"]
    steps, error = grid(beta)
    levels.x, levels.y = np.column_stack([steps, steps]), [[0.7, 2 * counts.max()]] * steps.size
    tails.x = [[edges[0], -beta], [beta, edges[-1]]]
    ends_above.x = ends_below.x = [[-beta, -beta], [beta, beta]]
    with dots.hold_sync():
        dots.x, dots.y = [-beta, beta], [error.total] * 2
    number.value = f"MSE {error.total:.3g}"
mover.observe(move, "value"); move({"new": mover.value})
widgets.VBox([mover, top, bottom, number])
"""

EMPTY = """
number, echo = slider(), widgets.HTML('<b>0</b>')
number.observe(lambda change: setattr(echo, "value", f"<b>{change.new:.3f}</b>"), "value")
widgets.VBox([number, echo])
"""

PATHS = {
    "empty step": EMPTY,
    "live figure": LIVE, "live figure, dragged": LIVE, "interact + inline": INTERACT, "bqplot": BQPLOT,
    "mapping": "mapping(x, bits=5)", "granularity": "granularity(samples.load('weights'), bits=5)",
    "float_bits": "float_bits()", "outliers": "outliers(bits=5)",
}
CONTROLS = {  # what is pressed, where it is not the first slider: selector, which one, keys in turn
    "live figure": (".noUi-handle", 1, ("ArrowLeft", "ArrowRight")),  # β
    "granularity": (".noUi-handle", 1, ("ArrowLeft", "ArrowRight")),  # bits
    "float_bits": (".jupyter-button", 20, ("Space", "Space")),  # a bit of the mantissa, after ten chips
}
DRAGGED = {"live figure, dragged": '.qlab-grip[data-name="β"]'}  # what the mouse holds
SLIDER = ".noUi-handle", 0, ("ArrowLeft", "ArrowRight")

# Watches the output of a cell. Its promise resolves with the milliseconds from the key press or the move to the frame that holds
# the picture's last change.
WATCH = """async ({cell, selector, which, event}) => {
  const output = document.querySelectorAll('.jp-Notebook .jp-CodeCell')[cell].querySelector('.jp-Cell-outputArea');
  const handle = output.querySelectorAll(selector)[which];
  handle.scrollIntoView({block: 'center'});
  handle.focus();
  await new Promise(done => setTimeout(done, 60));
  window.watched = new Promise((resolve, reject) => {
    let start = 0, last = 0, quiet = null, pending = 0;
    const settle = () => { clearTimeout(quiet); quiet = setTimeout(() => {
      if (pending) return settle(); observer.disconnect(); resolve(last - start); }, 250); };
    const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));  // after its painting
    const loaded = image => new Promise(done => image.complete ? done() : image.addEventListener('load', done, {once: true}));
    const shown = image => image?.src
      ? Promise.all([loaded(image).then(frame), image.decode().catch(() => 0)]) : frame();
    const observer = new MutationObserver(records => {
      const outside = r => !(r.target.closest ? r.target : r.target.parentElement).closest('.widget-hslider');
      if (!start || !records.some(outside)) return;
      pending++;
      shown(output.querySelector('img')).then(() => { last = performance.now(); pending--; settle(); });
    });
    observer.observe(output, {subtree: true, childList: true, attributes: true, characterData: true});
    window.addEventListener(event, event => { start = event.timeStamp; }, {once: true, capture: true});
    setTimeout(() => { if (!last) { observer.disconnect(); reject(new Error('no change in 10 s')); } }, 10000);
  });
}"""


def measure(rounds=30, size=100_000, paths=tuple(PATHS)):
    """Milliseconds of each key press: {path: list}."""
    times = {path: [] for path in paths}
    with tempfile.TemporaryDirectory() as folder:
        cells = [SETUP.replace("SIZE", str(size)), *(PATHS[path] for path in paths)]
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(notebook, Path(folder, "demo.ipynb"))
        with jupyterlab(folder) as address, chromium() as page:
            open_notebook(page, address, "demo.ipynb")
            failed = run_all(page)
            if failed:
                raise RuntimeError(f"the demo notebook failed: {failed}")
            page.wait_for_timeout(3000)
            for turn in range(-3, rounds):
                for cell, path in enumerate(paths, start=1):
                    to = _hold(page, cell, DRAGGED[path], 8 - 16 * (turn % 2)) if path in DRAGGED else None
                    selector, which, keys = CONTROLS.get(path, SLIDER)
                    before = page.evaluate(PICTURE, cell)
                    event = "pointermove" if to else "keydown"
                    page.evaluate(WATCH, {"cell": cell, "selector": selector, "which": which, "event": event})
                    if to:
                        page.mouse.move(*to)
                    else:
                        page.keyboard.press(keys[turn % 2])
                    took = page.evaluate("() => window.watched")
                    page.mouse.up()
                    if page.evaluate(PICTURE, cell) == before:
                        raise RuntimeError(f"the picture of {path} did not change")
                    if turn >= 0:  # the first rounds warm caches and compilers
                        times[path].append(took)
    return times


def _hold(page, cell, grip, pixels):
    """Take what the selector ``grip`` finds by the mouse and begin a drag to the right: where the next move leads."""
    found = page.locator(".jp-Notebook .jp-CodeCell").nth(cell).locator(grip).first
    found.evaluate("found => found.scrollIntoView({block: 'center'})")
    box = found.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 4
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y)
    page.wait_for_timeout(500)
    return x + 2 * pixels, y


# What the picture shows, to be sure that it changed: the image's pixels, or the shapes that bqplot draws.
PICTURE = """cell => { const output = document.querySelectorAll('.jp-Notebook .jp-CodeCell')[cell]
  .querySelector('.jp-Cell-outputArea'); const image = output.querySelector('img');
  if (!image && output.querySelector('b')) return output.querySelector('b').textContent;
  if (!image) return output.querySelector('svg.svg-figure').outerHTML;
  const canvas = document.createElement('canvas'); canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL(); }"""


def table(times):
    """Medians as ratios to interact + inline, in lines of text."""
    base = statistics.median(times["interact + inline"])
    return [
        f"{path:20} {statistics.median(values) / base:6.3f}   (median {statistics.median(values):6.1f} ms, "
        f"quartiles {' – '.join(f'{q:.1f}' for q in statistics.quantiles(values, n=4)[::2])})"
        for path, values in times.items()
    ]
