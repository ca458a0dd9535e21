"""The lessons without a kernel: pages of HTML that read well, and marks that make slides of them."""

import base64
import html
import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.slides import FULL, ideas, lines, mark, split

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
ONLY_A_MODEL = re.compile(r"model not found|error displaying widget|loading widget", re.IGNORECASE)
ANSWER = "<details><summary>Hint</summary>\n\nHalve it.\n</details>"
SECTIONS = [
    ("# Title\n\nWhy.\n\n**After this lesson you can**\n\n- read", 2),
    ("One paragraph.\n\nAnother.", 1),
    ("What was.\n\n## 2. What comes\n\nText.\n\n### Exercise 1\n\nWrite it.", 3),
    ("## 2. What comes\n\n### At once\n\nText.", 1),  # no slide with a heading alone
    ("Text.\n\n**Predict.** Which?", 2),
    (f"{ANSWER}\n\n{ANSWER}", 1),
    (f"{ANSWER}\n\nThe numbers behind it.", 2),
    ("<details><summary>Solution</summary>\n\n## Not cut\n\n```python\nx = 1\n\n# not a title\n```\n</details>", 1),
    ("Text.\n\n```python\nx = 1\n\n# not a title\n```", 1),
    ("## Take with you\n\n- This.\n\n**Read on.** Them.\n\n**Next.** That.", 3),
]


def kinds(*cells):
    marked = mark(new_notebook(cells=list(cells))).cells
    return [cell.metadata.get("slideshow", {}).get("slide_type") for cell in marked]


def text(n):
    return new_markdown_cell("\n".join(["word"] * n))


@pytest.fixture(scope="module", params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    return nbformat.read(request.param, as_version=4)


@pytest.fixture(scope="module")
def to_page():
    """As the README makes it: nbconvert's default template ignores the descriptions of pictures."""
    return HTMLExporter(template_name="classic")


@pytest.fixture(scope="module")
def page(to_page, lesson):
    return to_page.from_notebook_node(lesson)[0]


@pytest.fixture
def figures(lesson):
    outputs = [output for cell in lesson.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_there_are_lessons():
    assert LESSONS


def test_every_figure_is_on_the_page(page, figures):
    assert figures
    assert all(output.data["image/png"].strip().replace("\n", "") in page.replace("\n", "") for output in figures)
    assert page.count("<img ") == len(figures)


def test_every_figure_is_described(page, figures):
    for output in figures:
        alt = output.metadata["image/png"]["alt"]
        assert len(alt.split()) >= 8
        assert f'alt="{html.escape(alt, quote=False)}"' in page.replace("&#39;", "'").replace("&#34;", '"')
        assert len(output.data["text/plain"].split()) >= 3


def test_the_page_waits_for_no_kernel(page):
    assert not ONLY_A_MODEL.search(page)
    assert "widget-view+json" not in page.replace("script[type=", "")


def test_answers_stay_folded(page, lesson):
    printed = sum(output.get("data", {}).get("text/html", "").count("<details>")
                  for cell in lesson.cells for output in cell.get("outputs", []))
    answers = printed + sum(cell.source.count("<details>") for cell in lesson.cells if cell.cell_type == "markdown")
    assert page.count("<details>") == page.count("</details>") == answers > 0


def test_text_has_one_idea_in_each_cell(lesson):
    assert [cell.source for cell in split(lesson).cells] == [cell.source for cell in lesson.cells]


def test_the_marks_are_those_of_the_rule(lesson):
    assert mark(lesson) == lesson


def test_no_slide_is_fuller_than_allowed(lesson):
    filled = 0
    for cell in lesson.cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type")
        if kind != "skip":
            filled = lines(cell) + (0 if kind else filled)
            assert filled <= FULL or kind


@pytest.mark.parametrize("source, parts", SECTIONS)
def test_ideas(source, parts):
    assert len(ideas(source)) == parts
    assert "\n\n".join(ideas(source)) == source


@given(st.lists(st.sampled_from(["Text.", "", "## Title", "### Exercise 1", "**Predict.** Why?", "```", "# x", ANSWER,
                                 "<details><summary>Open", "</details>", "| a |\n|---|", "**Next.** On."]), min_size=1))
def test_splitting_changes_no_word_and_is_done_once(paragraphs):
    source = "\n\n".join(paragraphs)
    parts = ideas(source)
    assert "\n\n".join(parts) == source
    once = split(new_notebook(cells=[new_markdown_cell(source, id="a"), new_code_cell("# Title\n\n## Code", id="a-2")]))
    nbformat.validate(once)
    assert [cell.source for cell in once.cells] == [*parts, "# Title\n\n## Code"]
    assert split(once) == once


def test_a_part_keeps_the_name_of_its_cell_and_the_first_part_its_marks():
    cell = new_markdown_cell("A.\n\n## B\n\nText.\n\n## C", id="x", metadata={"tags": ["kept"]})
    once = split(new_notebook(cells=[cell]))
    assert [part.id for part in once.cells] == ["x", "x-2", "x-3"]
    assert [part.metadata for part in once.cells] == [{"tags": ["kept"]}, {}, {}]


def test_headings_and_questions_begin_a_slide():
    cells = [new_markdown_cell(source) for source in ("# A", "b", "## C", "### D", "**Predict.** E", ANSWER, "f")]
    assert kinds(*cells) == ["slide", None, "slide", "subslide", "subslide", None, None]


def test_what_is_for_the_desk_is_left_out():
    assert kinds(new_markdown_cell("# A"), new_code_cell("import numpy as np\n\nfrom qlab import smollm"),
                 new_code_cell("import numpy as np\n\nx = 1"), new_markdown_cell("**Read on.** B"),
                 new_markdown_cell("## Words\n\n| a |"), new_markdown_cell("**Next.** C")) == [
                     "slide", "skip", None, "skip", "skip", "skip"]


def test_a_full_slide_is_followed_by_another():
    assert kinds(text(FULL), text(1), text(FULL - 1), text(1)) == ["subslide", "subslide", None, "subslide"]
    printed = new_code_cell("x", outputs=[new_output("stream", text="word\n" * FULL)])
    assert kinds(text(1), printed, text(1)) == ["subslide", "subslide", "subslide"]


@pytest.mark.parametrize("rows, kind", [(100, None), (600, "subslide")])
def test_a_picture_takes_room(rows, kind):
    header = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + (1000).to_bytes(4) + rows.to_bytes(4)
    picture = new_output("display_data", {"image/png": base64.b64encode(header).decode()})
    assert kinds(text(10), new_code_cell("figure", outputs=[picture])) == ["subslide", kind]


def test_marks_made_by_hand_stay():
    by_hand = {"slideshow": {"slide_type": "fragment", "by_hand": True}}
    joined = {"slideshow": {"by_hand": True}}
    assert kinds(new_markdown_cell("# A"), new_markdown_cell("b", metadata=by_hand),
                 new_markdown_cell("## C", metadata=joined)) == ["slide", "fragment", None]
    old = {"slideshow": {"slide_type": "skip"}}
    assert kinds(new_markdown_cell("# A"), new_markdown_cell("b", metadata=old)) == ["slide", None]


def test_marking_is_done_once_and_touches_nothing_else(lesson):
    once = mark(split(lesson))
    assert mark(once) == once
    bare = [{name: value for name, value in cell.items() if name != "metadata"} for cell in once.cells]
    assert bare == [{name: value for name, value in cell.items() if name != "metadata"} for cell in split(lesson).cells]
    for cell, before in zip(once.cells, split(lesson).cells, strict=True):
        assert {**cell.metadata, "slideshow": 0} == {**before.metadata, "slideshow": 0}
