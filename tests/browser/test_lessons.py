"""Every lesson in a real JupyterLab: Run All, what is drawn, what axe-core says of it, and a control of a figure."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from tests.browser.lab import errors_of_the_console, run_all, set_theme, violations
from tests.browser.test_browser import Figure  # which skips this module, too, where there is no browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
QUICK = "08"  # a lesson with figures of all kinds and no training: the others are long
VIEWS = """() => Array.from(jupyterapp.shell.currentWidget.content.model.cells).filter(c => c.type === 'code')
  .flatMap(c => c.sharedModel.outputs)
  .filter(o => o.data?.['application/vnd.jupyter.widget-view+json'] && o.data['image/png']).length"""


def names(cell, context):
    return {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)
            and isinstance(node.ctx, context)}


def defined(cell):
    tree = ast.parse(cell.source)
    imported = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return names(cell, ast.Store) | imported | functions


def for_the_browser(notebook):
    """The lesson without what it prints: nbval runs that, and a browser shows it in no other way.

    Without the cells, too, that load the language model or are tagged as long, and those that need them: they take
    minutes. A training has one epoch. What was saved as output is left out: the browser draws it anew.
    """
    gone, kept, needed = set(), [], set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            loads = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "smollm.load"
                        for node in ast.walk(ast.parse(cell.source)))
            if loads or "long" in cell.metadata.get("tags", []) or gone & names(cell, ast.Load):
                gone |= defined(cell)
                continue
        kept.append(cell)
    notebook.cells = []
    for cell in reversed(kept):
        if cell.cell_type == "code":
            shows = any("image/png" in output.get("data", {}) for output in cell.outputs) or "async for" in cell.source
            if not (shows or defined(cell) & needed):
                continue
            needed |= names(cell, ast.Load)
            cell.outputs, cell.source = [], re.sub(r"epochs=\d+", "epochs=1", cell.source)
        notebook.cells.insert(0, cell)
    return notebook


def test_there_are_lessons():
    assert LESSONS


@pytest.mark.parametrize("lesson", [
    name if name.startswith(QUICK) else pytest.param(name, marks=pytest.mark.long) for name in LESSONS
])
def test_lesson(desk, lesson):
    page = desk.open(lesson, for_the_browser(nbformat.read(NOTEBOOKS / lesson, as_version=4)))
    said = errors_of_the_console(page)  # from here on: JupyterLab may say something while it closes the lesson before
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
    assert not (found := violations(page)), "\n".join(found)
    set_theme(page, "Dark")  # in which plain text has the theme's own colours
    assert not (found := violations(page, ["color-contrast"], text=".jp-MarkdownOutput [style]")), "\n".join(found)
    with_bits = outputs.filter(has=page.locator(".widget-label:text-is('bits')"))
    first = Figure(page, (with_bits if with_bits.count() else outputs).first)
    before = first.pixels()
    label = next((label for label in ("bits", "value") if first.handle(label).count()), None)
    if label:
        assert first.press(label, "ArrowLeft")
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
    assert not said
