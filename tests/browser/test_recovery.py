"""What a learner finds again after a kernel, a page or a server has gone: the lesson runs, the answer is there."""

import nbformat
import pytest

from tests.browser.lab import KERNEL_READY, ask_kernel, jupyterlab, open_notebook, run_all
from tests.browser.test_browser import Figure
from tests.browser.test_lessons import NOTEBOOKS

pytestmark = pytest.mark.long
LESSON = "03_clipping_and_calibration.ipynb"
ANSWER = """def clipping_error(x, alpha, beta):
    return np.mean((x - np.clip(x, alpha, beta)) ** 2)


exercises.check_clipping_error(clipping_error)"""
OPEN_QUESTION, RIGHT = "… Not answered yet.", "✓ Right, on the tiny case and on 73,728 real activations."
EXERCISE = """() => { const {sharedModel: {source, outputs}} = Array.from(
  jupyterapp.shell.currentWidget.content.model.cells).find(c => c.sharedModel.source.includes('def clipping_error'));
  return [source, outputs.map(o => [o.data['text/plain']].flat().join('')).join()]; }"""
RESTART = """() => { const {sessionContext} = jupyterapp.shell.currentWidget;
  window.restarted = sessionContext.session.kernel.restart(); }"""
SAVED = "() => !jupyterapp.shell.currentWidget.context.model.dirty"


@pytest.fixture
def notebook():
    """With the lesson's imports, its first figure and its first exercise."""
    notebook = nbformat.read(NOTEBOOKS / LESSON, as_version=4)
    needed = ("import numpy", "x = samples.load", "live = clipping(", "def clipping_error")
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and
                      (cell.source == "live" or any(code in cell.source for code in needed))]
    return notebook


def answer_and_save(page):
    assert page.evaluate(EXERCISE)[0] != ANSWER
    editor = page.locator(".jp-CodeCell .cm-content", has_text="def clipping_error")
    editor.fill(ANSWER)
    editor.press("Control+s")
    page.wait_for_function(SAVED)


def assert_the_lesson_runs(page, exercise):
    """From top to bottom, to the exercise's verdict and a figure that follows its slider."""
    assert run_all(page) == []
    assert page.evaluate(EXERCISE)[1] == exercise
    outputs = page.locator(".jp-OutputArea-output:visible", has=page.locator(".jupyter-widgets img"))
    live = Figure(page, outputs.first, "live")
    assert live.press("bits", "ArrowRight")
    live.assert_agrees_with_the_kernel("alpha", "beta", "mse")
    return live


def test_the_kernel_is_restarted_in_mid_drag(desk, notebook):
    page = desk.open("restarted.ipynb", notebook)
    live = assert_the_lesson_runs(page, OPEN_QUESTION)
    ask_kernel(page, "of_the_first_kernel = 1")
    before, box, mouse = live.pixels(), live.handle("β").bounding_box(), page.mouse
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse.move(x, y)
    mouse.down()
    mouse.move(x - 30, y, steps=3)
    live.wait_for_change(before)
    page.evaluate(RESTART)
    mouse.move(x - 80, y, steps=25)
    mouse.up()
    page.evaluate("() => window.restarted")
    page.wait_for_function(KERNEL_READY)
    assert ask_kernel(page, "print('of_the_first_kernel' in globals())") == "False\n"
    assert_the_lesson_runs(page, OPEN_QUESTION)


def test_the_page_is_reloaded_and_the_server_started_again(desk, notebook):
    page = desk.open(LESSON, notebook)
    assert run_all(page) == []
    answer_and_save(page)
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(KERNEL_READY)
    assert page.evaluate(EXERCISE) == [ANSWER, OPEN_QUESTION]
    assert_the_lesson_runs(page, RIGHT)
    with jupyterlab(desk.folder) as address:
        page = desk.page.context.new_page()
        open_notebook(page, address, LESSON)
        assert page.evaluate(EXERCISE)[0] == ANSWER
        assert_the_lesson_runs(page, RIGHT)
        page.close()
