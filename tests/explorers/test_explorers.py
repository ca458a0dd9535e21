"""All live figures: each is tested, imported when it is used, and stands on no other lesson's figure."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from qlab import explorers

SHARED = {"colors", "parts", "places", "watching"}  # what a figure may stand on
SOURCES = sorted(Path(explorers.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("figure", explorers.__all__)
def test_every_figure_is_tested(figure):
    """In the file of its module: ruff asks that what is imported there is used."""
    module = getattr(explorers, figure).__module__.removeprefix("qlab.explorers.")
    assert getattr(import_module(f"tests.explorers.test_{module}"), figure) is getattr(explorers, figure)


def test_torch_is_imported_when_a_figure_needs_it():
    code = """
import sys
class NoTorch:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not there")
sys.meta_path.insert(0, NoTorch())
import qlab.explorers
assert {"digits_ptq", "qat", "training_run", "watch"} <= set(dir(qlab.explorers)) & set(qlab.explorers.__all__)
assert "clipping" in dir(qlab.explorers)
assert not hasattr(qlab.explorers, "no_such_figure")
try:
    from qlab.explorers import digits_ptq
except ImportError as error:
    assert "torch" in str(error)
else:
    raise AssertionError("it needs no torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_figures_at_once():
    found = {}
    exec("from qlab.explorers import *", found)
    assert found["watch"] is explorers.watch
    assert set(found) - {"__builtins__"} == set(explorers.__all__)


def other_figures(source, module):
    """The modules of qlab.explorers that a source imports and ought not to."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {(name + ".").split(".")[2] for name in names if name.startswith("qlab.explorers")}
    return found - SHARED - {module}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_figure_stands_on_another_lessons(path):
    assert not other_figures(path.read_text(encoding="utf-8"), path.stem)


@pytest.mark.parametrize("source, found", [
    ("from qlab.explorers.affine import SEVEN", {"affine"}), ("from qlab.explorers import qat", {"qat"}),
    ("import qlab.explorers", {""}), ("def f():\n    import qlab.explorers.floats", {"floats"}),
    ("from qlab.explorers.parts import paths\nfrom qlab import affine", set()),
])
def test_an_import_of_another_figure_is_noticed(source, found):
    assert other_figures(source, "ptq") == found


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("figure", [explorers.mapping, explorers.clipping, explorers.granularity])
def test_own_data_is_an_array_a_tensor_or_the_path_of_a_file(figure, tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    np.save(tmp_path / "mine.npy", x)
    (tmp_path / "text.npy").write_text("1 2 3")
    expected = figure(x).readout
    for mine in (tmp_path / "mine.npy", str(tmp_path / "mine.npy"), torch.from_numpy(x)):
        assert figure(mine).readout == expected
    for path in ("nowhere.npy", tmp_path / "text.npy"):
        with pytest.raises(ValueError, match=r"must be an array or the path of a \.npy file with one, got"):
            figure(path)
