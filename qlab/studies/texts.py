"""Make the texts that language models are judged and calibrated on: ``python -m qlab.studies.texts``, in a clone.

``text_prose.txt``          paragraphs of this course's lessons 00 to 07, without tables, code, formulas and HTML
``text_code.txt``           definitions of this course's own modules
``text_documentation.txt``  paragraphs of Python's documentation, without tables, grammar and code
``text_calibration.txt``    paragraphs of other topics of that documentation, and definitions of Python's own modules

Each takes turns at its sources, about 1,200 characters at a time, so that a beginning is a sample of many of them. No
twelve words in a row stand in two files. The course's own text is that of one commit, so that it stays as it is when
lessons change; the rest was taken from Python 3.11.7, and other versions have other words. `qlab.evaluation` loads the
finished files.
"""

import hashlib
import inspect
import json
import pydoc_data.topics
import re
import subprocess
from importlib import import_module
from itertools import chain, zip_longest

from qlab.samples import FOLDER

COMMIT = "4ee5ec6baee5727261e4d9cb71cf3b5556649454"
LESSONS = (
    "00_start_here", "01_ieee754_bits", "02_absmax_and_zero_point", "03_clipping_and_calibration", "04_ptq_and_qat",
    "05_activation_outliers", "06_smoothquant", "07_spinquant",
)
OWN_MODULES = ("affine", "calibration", "floats", "integer", "qat", "smollm", "smoothquant", "spinquant")
PYTHONS_MODULES = ("textwrap", "colorsys", "heapq", "statistics", "fractions", "shlex", "calendar", "bisect")
EXCERPT, WHOLE = 1_200, 42_000  # characters, at least
REPEATED = 12  # so many words in a row are no coincidence
_NO_PROSE = re.compile(r"^(?:[\s#>!<]|[-+*] |\d+\. )|```|\||\$\$|\\|</|::=|[-=*+~]{3}", re.MULTILINE)


def committed(path):
    return subprocess.run(["git", "show", f"{COMMIT}:{path}"], cwd=FOLDER, capture_output=True, check=True,
                          encoding="utf-8").stdout


def paragraphs(text):
    """Those that are prose: no list, table, rule, formula or code in them, and some length."""
    return [part for part in re.split(r"\n\s*\n", text.strip())
            if len(part) >= 80 and not _NO_PROSE.search(part) and part.count("$") <= 4]


def runs(text):
    """All that ``REPEATED`` words in a row say."""
    words = text.split()
    return {tuple(words[i:i + REPEATED]) for i in range(len(words) - REPEATED + 1)}


def definitions(source):
    """What stands between two blank lines at the top of a module: functions, classes, and what is before them."""
    return [part.strip("\n") + "\n" for part in source.split("\n\n\n")]


def lesson(name):
    cells = json.loads(committed(f"notebooks/{name}.ipynb"))["cells"]
    return paragraphs("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))


def excerpts(parts):
    """Whole parts, joined until they reach ``EXCERPT``."""
    found = [""]
    for part in parts:
        if len(found[-1]) >= EXCERPT:
            found.append("")
        found[-1] += part + "\n\n"
    return [text for text in found if text]


def in_turns(sources):
    """The first excerpt of each source, the second of each, and so on, up to ``WHOLE``."""
    turns, text = zip_longest(*map(excerpts, sources), fillvalue=""), ""
    for excerpt in chain.from_iterable(turns):
        if len(text) >= WHOLE:
            break
        text += excerpt
    return text


def topics():
    """Paragraphs by topic, for evaluation and for calibration; what topics repeat of each other stands in one."""
    seen, found = set(), []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        found.append([part for part in paragraphs(text) if runs(part).isdisjoint(seen)])
        seen |= runs("\n\n".join(found[-1]))
    return found[::2], found[1::2]


def make():
    """The texts by name."""
    documentation, others = topics()
    modules = [definitions(inspect.getsource(import_module(name))) for name in PYTHONS_MODULES]
    halves = [in_turns(sources) for sources in (others, modules)]
    return {
        "prose": in_turns([lesson(name) for name in LESSONS]),
        "code": in_turns([definitions(committed(f"qlab/{name}.py")) for name in OWN_MODULES]),
        "documentation": in_turns(documentation),
        "calibration": in_turns([half.split("\n\n") for half in halves]),
    }


def main():
    for name, text in make().items():
        content = text.encode()
        (FOLDER / f"text_{name}.txt").write_bytes(content)
        print(f"text_{name}.txt: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
