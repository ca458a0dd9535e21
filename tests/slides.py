"""Mark the cells of notebooks as slides: ``python -m tests.slides notebooks/*.ipynb``.

``jupyter nbconvert --to slides`` and the presentation tools of JupyterLab read the marks. A slide is made of whole
cells, so that a text with two ideas must be two cells: ``python -m tests.slides --split notebooks/*.ipynb`` cuts text
before headings and questions and after folded answers, and changes no word. Run either again after any edit.

A cell with the metadata ``"slideshow": {"slide_type": …, "by_hand": true}`` keeps its type.
"""

import argparse
import base64
import copy
import math
import re
from pathlib import Path

import nbformat

FULL = 22  # lines of text that a slide holds
COLUMNS = 84  # characters in such a line
LINE = 26  # its height, in pixels
NEW_IDEA = re.compile(r"#{1,6} |\*\*(Predict|After this lesson|Read on|Next)\b")
SLIDE = re.compile(r"##? ")
SUBSLIDE = re.compile(r"### |\*\*(Predict|After this lesson)")
IMPORTS = re.compile(r"((import|from) .*\n*)+")
AT_HOME = re.compile(r"\*\*(Read on|Next)\b|## (Words|Where the notes are corrected|To teach with it)")


def split(notebook):
    """A copy of the notebook with one idea in each cell of text."""
    notebook = copy.deepcopy(notebook)
    names = {cell.id for cell in notebook.cells}
    cells = []
    for cell in notebook.cells:
        first, *others = ideas(cell.source) if cell.cell_type == "markdown" else [cell.source]
        cell.source = first
        cells.append(cell)
        for source in others:
            name = next(name for n in range(2, 100) if (name := f"{cell.id}-{n}") not in names)
            names.add(name)
            cells.append(nbformat.v4.new_markdown_cell(source, id=name))
    notebook.cells = cells
    return notebook


def ideas(text):
    """The parts of a text: ``"\\n\\n".join(ideas(text)) == text``."""
    parts, folded, fenced = [], 0, False
    for paragraph in text.split("\n\n"):
        inside = folded or fenced
        after_answer = parts and parts[-1].endswith("</details>") and not paragraph.startswith("<details>")
        only_heading = parts and re.fullmatch(r"#+ .*", parts[-1])
        if parts and (inside or only_heading or not (after_answer or NEW_IDEA.match(paragraph))):
            parts[-1] += f"\n\n{paragraph}"
        else:
            parts.append(paragraph)
        fenced ^= paragraph.count("```") % 2
        folded += paragraph.count("<details>") - paragraph.count("</details>")
    return parts


def mark(notebook):
    """A copy of the notebook with the slide type of each cell in its metadata."""
    notebook = copy.deepcopy(notebook)
    filled = math.inf
    for cell in notebook.cells:
        marks = cell.metadata.get("slideshow", {})
        if not marks.get("by_hand"):
            marks = slide_type(cell, filled)
            cell.metadata.pop("slideshow", None)
            if marks:
                cell.metadata["slideshow"] = marks
        kind = marks.get("slide_type")
        if kind != "skip":
            filled = lines(cell) + (0 if kind else filled)
    return notebook


def slide_type(cell, filled):
    """Marks for a cell that follows ``filled`` lines on the same slide; none to stay on it."""
    if cell.cell_type == "code":
        if IMPORTS.fullmatch(cell.source) and not cell.outputs:
            return {"slide_type": "skip"}
    elif AT_HOME.match(cell.source):
        return {"slide_type": "skip"}
    elif SLIDE.match(cell.source):
        return {"slide_type": "slide"}
    elif SUBSLIDE.match(cell.source):
        return {"slide_type": "subslide"}
    return {"slide_type": "subslide"} if filled + lines(cell) > FULL else {}


def lines(cell):
    """Height of a cell on a slide, in lines of text."""
    if cell.cell_type == "markdown":
        return sum(math.ceil(len(line) / COLUMNS) if line else 0.5 for line in cell.source.splitlines())
    printed = "".join(map(printed_by, cell.outputs)).splitlines()
    pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return 1 + len(cell.source.splitlines()) + len(printed) + sum(map(pixel_rows, pictures)) / LINE


def printed_by(output):
    """What a cell prints, also in a fold, which will be opened."""
    data = output.get("data", {})
    return output.get("text", "") or (data["text/plain"] if "text/html" in data else "")


def pixel_rows(png):
    """Height of a picture, from the header of its file."""
    return int.from_bytes(base64.b64decode(png)[20:24])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--split", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(mark(split(notebook) if arguments.split else notebook), path)
        print(path)
