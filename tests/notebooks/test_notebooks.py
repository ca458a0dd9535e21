"""Every lesson keeps to the rules of the course, one test for each rule; and each rule notices what breaks it."""

import copy
import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MOST_LINES, MOST_LINES_IN_THE_MIDDLE, MOST_CODE_CELLS_IN_A_ROW, MOST_BYTES = 25, 5, 2, 1_500_000
CODE_OR_MATHS = re.compile(r"```.*?```|~~~.*?~~~|``.*?``|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|<!--.*?-->", re.DOTALL)
SHOUT = re.compile(r"[^\s!]!+(?=[\s\"'”’)\]*_]|$)", re.MULTILINE)
BELITTLING = re.compile(r"\b(simply|obviously|trivially)\b", re.IGNORECASE)
PICTURE = re.compile(r"!\[([^\]]*)\]\s*[(\[]")
TORCH = re.compile(r"^\s*(import|from)\s+torch\b|^\s*import\b.*,\s*torch\b", re.MULTILINE)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def prose(notebook):
    return [PICTURE.sub(r" \1 (", CODE_OR_MATHS.sub("x", source)) for source in markdown(notebook)]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def is_a_valid_notebook(notebook, name):
    """Format 4.5."""
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield str(error)
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield f"format {notebook.nbformat}.{notebook.nbformat_minor}"


def runs_on_the_usual_kernel(notebook, name):
    """A learner has the kernel python3."""
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield f"kernelspec {notebook.metadata.get('kernelspec')}"


def has_no_error(notebook, name):
    """No output is an error."""
    yield from (f"{output.ename}: {output.evalue}" for output in outputs(notebook) if output.output_type == "error")


def has_no_warning(notebook, name):
    """No output went to stderr."""
    yield from (output.text for output in outputs(notebook) if output.get("name") == "stderr")


def keeps_no_widgets(notebook, name):
    """A reopened notebook must not look for widgets of a kernel that has gone."""
    if "widgets" in notebook.metadata:
        yield "metadata.widgets"
    yield from (WIDGET_VIEW for output in outputs(notebook) if WIDGET_VIEW in output.get("data", {}))


def ran_from_top_to_bottom(notebook, name):
    """Execution counts 1, 2, 3, …"""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if not counts or counts != list(range(1, len(counts) + 1)):
        yield f"execution counts {counts}"


def has_short_cells(notebook, name):
    """No cell over 25 lines, half of them at most 5."""
    lines = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    yield from (f"a cell of {n} lines" for n in lines if n > MOST_LINES)
    if lines and statistics.median(lines) > MOST_LINES_IN_THE_MIDDLE:
        yield f"cells have a median of {statistics.median(lines)} lines"


def introduces_its_code(notebook, name):
    """Text comes first, and at most two code cells come in a row."""
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    if not kinds.startswith("m"):
        yield "the first cell is not text"
    if "c" * (MOST_CODE_CELLS_IN_A_ROW + 1) in kinds:
        yield f"{kinds}: more than {MOST_CODE_CELLS_IN_A_ROW} code cells in a row"


def describes_its_plots(notebook, name):
    """Alt text in the metadata of every picture."""
    for output in outputs(notebook):
        for kind in output.get("data", {}):
            if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt", "").strip():
                yield f"{kind} without alt text"


def describes_its_pictures(notebook, name):
    """Alt text for every picture in the prose."""
    for source in markdown(notebook):
        source = CODE_OR_MATHS.sub("", source)  # noqa: PLW2901
        yield from (f"{match[0]}…" for match in PICTURE.finditer(source) if not match[1].strip())
        for tag in re.findall(r"<img\b[^>]*>", source, re.IGNORECASE):
            if not re.search(r"""\balt\s*=\s*(["'])\s*[^"'\s]""", tag):
                yield tag


def is_small(notebook, name):
    """Below 1.5 MB, so that GitHub shows it."""
    size = len(json.dumps(notebook))
    if size >= MOST_BYTES:
        yield f"{size} bytes"


def needs_no_torch_at_first(notebook, name):
    """Lessons 00 to 03 do without it."""
    if name[:2] in ("00", "01", "02", "03"):
        yield from (cell.source for cell in code_cells(notebook) if TORCH.search(cell.source))


def loads_qlab_before_torch(notebook, name):
    """Then torch's threads sleep while they wait: beside another program, spinning makes them many times slower."""
    for cell in code_cells(notebook):
        if TORCH.search(cell.source):
            yield cell.source
        if re.search(r"^(from|import) qlab\b", cell.source, re.MULTILINE):
            return


def does_not_shout(notebook, name):
    """No exclamation marks."""
    yield from (match[0] for text in prose(notebook) for match in SHOUT.finditer(text))


def does_not_belittle(notebook, name):
    """Nothing is simple to who meets it first."""
    yield from (match[0] for text in prose(notebook) for match in BELITTLING.finditer(text))


RULES = {rule.__name__: rule for rule in (
    is_a_valid_notebook, runs_on_the_usual_kernel, has_no_error, has_no_warning, keeps_no_widgets,
    ran_from_top_to_bottom, has_short_cells, introduces_its_code, describes_its_plots, describes_its_pictures, is_small,
    needs_no_torch_at_first, loads_qlab_before_torch, does_not_shout, does_not_belittle,
)}


def sound_notebook():
    """What every rule accepts, near misses included."""
    figure = new_output("display_data", {"image/png": "aGk=", "text/plain": "figure"},
                        metadata={"image/png": {"alt": "A histogram."}})
    cells = [
        new_markdown_cell("# Lesson\n\nWhere $n!$ and `a != b!` stand. ![A grid](grid.png) Simple.\n\n"
                          "```python\nprint('simply!')\n```\n<img src='x.png' alt='A curve'>"),
        new_code_cell("from qlab import samples", execution_count=1),
        new_code_cell("figure  # import torch", execution_count=2, outputs=[figure]),
        new_markdown_cell("What you saw."),
        new_code_cell("\n".join(["torch_free = 1"] * MOST_LINES), execution_count=3),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def with_output(notebook, **output):
    notebook.cells[1].outputs.append(new_output(**output))


def with_text(text):
    return lambda notebook: notebook.cells.append(new_markdown_cell(text))


def with_code(source):
    return lambda notebook: notebook.cells[1].update(source=source)


def plot(metadata):
    data = {"image/png": "aGk="}
    return lambda notebook: with_output(notebook, output_type="display_data", data=data, metadata=metadata)


VIOLATIONS = [
    (is_a_valid_notebook, lambda notebook: notebook.update(nbformat_minor=4)),
    (is_a_valid_notebook, lambda notebook: notebook.cells[0].update(cell_type="poem")),
    (is_a_valid_notebook, lambda notebook: notebook.cells[0].pop("source")),
    (runs_on_the_usual_kernel, lambda notebook: notebook.metadata.kernelspec.update(name="venv")),
    (runs_on_the_usual_kernel, lambda notebook: notebook.metadata.clear()),
    (has_no_error, lambda notebook: with_output(notebook, output_type="error", ename="KeyError", evalue="x")),
    (has_no_warning, lambda notebook: with_output(notebook, output_type="stream", name="stderr", text="careful")),
    (keeps_no_widgets, lambda notebook: notebook.metadata.update(widgets={})),
    (keeps_no_widgets, lambda notebook: with_output(notebook, output_type="display_data", data={WIDGET_VIEW: {}})),
    (ran_from_top_to_bottom, lambda notebook: notebook.cells[2].update(execution_count=None)),
    (ran_from_top_to_bottom, lambda notebook: notebook.cells[2].update(execution_count=4)),
    (ran_from_top_to_bottom, lambda notebook: notebook.update(cells=notebook.cells[:1])),
    (has_short_cells, with_code("x = 1\n" * (MOST_LINES + 1))),
    (has_short_cells, with_code("x = 1\n" * (MOST_LINES_IN_THE_MIDDLE + 1))),
    (introduces_its_code, lambda notebook: notebook.cells.pop(0)),
    (introduces_its_code, lambda notebook: notebook.cells.pop(3)),
    (describes_its_plots, plot({})),
    (describes_its_plots, plot({"image/png": {"alt": " "}})),
    (describes_its_pictures, with_text("![](grid.png)")),
    (describes_its_pictures, with_text("<img src='grid.png'>")),
    (describes_its_pictures, with_text("<img src='grid.png' alt=''>")),
    (is_small, with_code("#" * MOST_BYTES)),
    (needs_no_torch_at_first, with_code("import torch")),
    (needs_no_torch_at_first, with_code("if True:\n    from torch.nn import Linear")),
    (needs_no_torch_at_first, with_code("import numpy, torch")),
    (loads_qlab_before_torch, with_code("import torch\n\nfrom qlab import samples")),
    (does_not_shout, with_text("Well done!")),
    (does_not_shout, with_text("**Look at $x$!** It moves.")),
    (does_not_shout, with_text("A plot!!\nIt moves.")),
    (does_not_belittle, with_text("This is Simply a clip.")),
    (does_not_belittle, with_text("Obviously, it clips.")),
    (does_not_belittle, with_text("It is trivially so.")),
]


def problems(rule, notebook, name="03_lesson"):
    return list(rule(notebook, name))


def test_there_are_lessons():
    assert NOTEBOOKS, "no notebook in the folder notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES)
def test_lesson(path, rule):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert not problems(RULES[rule], notebook, path.stem)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lesson_has_a_numbered_name(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_notebook_has_no_problems(rule):
    assert not problems(RULES[rule], sound_notebook())


@pytest.mark.parametrize("rule, spoil", VIOLATIONS)
def test_a_rule_notices_what_breaks_it(rule, spoil):
    notebook = sound_notebook()
    before = copy.deepcopy(notebook)
    spoil(notebook)
    assert notebook != before
    assert problems(rule, notebook)


def test_every_rule_is_seen_to_fail():
    assert {rule.__name__ for rule, _ in VIOLATIONS} == set(RULES)


def test_later_lessons_may_use_torch():
    notebook = sound_notebook()
    with_code("import torch")(notebook)
    assert not problems(needs_no_torch_at_first, notebook, "04_ptq_and_qat")
