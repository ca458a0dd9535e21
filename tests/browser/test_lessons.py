"""Every lesson in a real JupyterLab: Run All, what is drawn, what axe-core says of it, and a control of a figure."""

import ast
from pathlib import Path

import nbformat
import pytest

from tests.browser.lab import chromium, errors_of_the_console, jupyterlab, open_notebook, run_all, set_theme, violations
from tests.browser.test_browser import Figure  # which skips this module, too, where there is no browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
VIEWS = """() => Array.from(jupyterapp.shell.currentWidget.content.model.cells).filter(c => c.type === 'code')
  .flatMap(c => c.sharedModel.outputs)
  .filter(o => o.data?.['application/vnd.jupyter.widget-view+json'] && o.data['image/png']).length"""


def without_long_cells(notebook):
    """The lesson without the cells that load the language model or are tagged as long, and those that need them.

    They take minutes, nbval runs them, and what they print is text: nothing that a browser shows in another way.
    """
    made = set()
    for cell in [cell for cell in notebook.cells if cell.cell_type == "code"]:
        nodes = list(ast.walk(ast.parse(cell.source)))
        loads = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "smollm.load" for node in nodes)
        long = loads or "long" in cell.metadata.get("tags", [])
        if long or made & {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}:
            made |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
            notebook.cells.remove(cell)
    return notebook


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server of a copy of the lessons."""
    folder = tmp_path_factory.mktemp("lab")
    for lesson in LESSONS:
        nbformat.write(without_long_cells(nbformat.read(NOTEBOOKS / lesson, as_version=4)), folder / lesson)
    with jupyterlab(folder) as address, chromium(height=1400) as page:
        page.set_default_timeout(30_000)
        yield address, page


def test_there_are_lessons():
    assert LESSONS


@pytest.mark.parametrize("lesson", LESSONS)
def test_lesson(lab, lesson):
    address, page = lab
    said = errors_of_the_console(page)
    open_notebook(page, address, lesson)
    assert run_all(page) == []
    outputs = page.locator(".jp-OutputArea-output:visible", has=page.locator(".jupyter-widgets img"))
    shown = page.evaluate(VIEWS)
    assert shown > 0
    outputs.nth(shown - 1).wait_for()  # the kernel may be idle before the browser has drawn
    assert outputs.count() == shown
    for i in range(shown):
        width, height, colors, _ = map(int, Figure(page, outputs.nth(i)).pixels().split(","))
        assert width > 300 < 3 * height
        assert colors > 20
    set_theme(page, "Light")
    assert not (found := violations(page)), "\n".join(found)
    set_theme(page, "Dark")
    assert not (found := violations(page, ["color-contrast"])), "\n".join(found)
    with_bits = outputs.filter(has=page.locator(".widget-label:text-is('bits')"))
    first = Figure(page, (with_bits if with_bits.count() else outputs).first)
    before = first.pixels()
    if first.handle("bits").count():
        assert first.press("bits", "ArrowLeft")
    elif first.output.locator(".noUi-handle").count():
        first.output.locator(".noUi-handle").first.press("ArrowLeft")
        assert first.wait_for_change(before)
    else:
        first.output.get_by_title("mantissa, bit 0", exact=True).click()
        assert first.wait_for_change(before)
    if lesson.startswith("04"):  # its async cell has handled messages that no cell answers for
        staircase = Figure(page, outputs.filter(has=page.locator(".widget-label:text-is('α')")).first)
        assert len({staircase.pixels(), *(staircase.press("x", "ArrowRight") for _ in range(3))}) == 4
        assert len({staircase.pixels(), *(staircase.press("s", "ArrowRight") for _ in range(3))}) == 4
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    assert not said
