"""What holds for the project as a whole: requirements, light imports, floors, no unused name, no machine's paths."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {  # where they differ from PyPI's
    "isal": "python-isal", "matplotlib": "matplotlib-base", "playwright": "playwright-python", "torch": "pytorch",
}
FLOORS = {
    "floats": 1, "affine": 1, "samples": 1,
    "calibration": 2, "blocks": 2,
    "training": 3, "ptq": 3, "qat": 3, "integer": 3,
    "fetching": 3, "smollm": 3, "evaluation": 3, "outliers": 3, "smoothquant": 3, "spinquant": 3, "gptq": 3,
    "digits": 4, "studies": 4,
    "picture": 5, "handles": 5, "live": 5, "explorers": 5, "exercises": 5,
}
OF_OTHERS = {"extra_repr", "add_param_group"}  # names that torch calls
AT_HAND = {"logits_scale"}  # an integer network's logits as real numbers
TEST_AND_CLASS = {"nbval"}  # of the extra "test": what a class runs, too
SOURCES = sorted((ROOT / "qlab").rglob("*.py"))
MACHINE_PATH = re.compile(r"(?<![\w.~:/)}>*$-])/(?:work|root|tmp|home|Users|mnt|opt)/\w|\b[A-Z]:\\Users")


def pypi_requirements():
    """Conda's name: version limits, of what pyproject.toml asks for from everybody, and of what a class runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [line for line in project["optional-dependencies"]["test"] if Requirement(line).name in TEST_AND_CLASS]
    wanted = [Requirement(line) for line in (*project["dependencies"], *tests, f"python{project['requires-python']}")]
    return {CONDA_NAMES.get(r.name, r.name): r.specifier for r in wanted}


def conda_requirements(environment):
    """Name: version limits, of packages from conda, without pip and the project."""
    *lines, _ = environment["dependencies"]
    names_and_limits = {}
    for line in lines:
        if line != "pip":
            name, limits = re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups()
            assert name not in names_and_limits, f"{name} is listed twice"
            names_and_limits[name] = SpecifierSet(re.sub(r"^=(?!=)", "==", limits))
    return names_and_limits


def words(*trees):
    """How often each identifier stands in syntax trees: names, attributes, what is imported, keywords."""
    spelled = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name", ast.keyword: "arg"}
    found = (getattr(node, spelled[type(node)]) for tree in trees for node in ast.walk(tree) if type(node) in spelled)
    return Counter(word.split(".")[-1] for word in found if word)


def definitions(tree):
    """Public names of a module and of its classes, each with the node that defines it."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            names = [getattr(node, "name", "_")]
        yield from ((name, node) for name in names if not name.startswith("_"))
        if isinstance(node, ast.ClassDef):
            fields = ast.Module([part for part in node.body if not isinstance(part, ast.AnnAssign)], [])
            yield from definitions(fields)
            yield from ((part.target.id, part) for part in node.body if isinstance(part, ast.AnnAssign))


def unused(modules, lessons):
    """Public names that stand nowhere in the lessons and in no module outside of their own definition."""
    everywhere = words(*modules, *lessons)
    return [name for module in modules for name, node in definitions(module)
            if everywhere[name] <= words(node)[name]]


def imported(source):
    """Modules of qlab that a source file imports, anywhere in it: {"affine", …}."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports out from qlab on"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("qlab.")}
    return found


def upward_imports(module, source):
    """What ``module`` imports from a floor above its own; "" is the package itself, which imports nothing."""
    return {name for name in imported(source) if FLOORS[name] > FLOORS.get(module, 0)}


def loaded_by(statement):
    """Top-level names of the modules in a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout.split())


def project_files():
    """Paths of the files that are in version control or are about to be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of the repository")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if name != "LICENSE" and (ROOT / name).is_file()]


def test_conda_and_pip_ask_for_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda, pypi = conda_requirements(environment), pypi_requirements()
    (exact,) = conda.pop("python")
    assert exact.operator == "==" and exact.version in pypi.pop("python")
    assert conda == pypi


def test_conda_installs_the_project_itself():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    assert environment["dependencies"][-2:] == ["pip", {"pip": ["--editable ."]}]


def test_every_package_of_the_source_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert folders == set(packages)


@pytest.mark.parametrize("statement, unwanted", [
    ("import qlab", {"torch", "matplotlib", "ipywidgets", "numpy"}),
    ("from qlab import affine", {"torch", "matplotlib", "ipywidgets"}),
    ("from qlab import calibration", {"torch", "matplotlib", "ipywidgets"}),
    ("from qlab import blocks", {"torch", "matplotlib", "ipywidgets"}),
    ("from qlab import samples", {"torch", "matplotlib", "ipywidgets"}),
    ("from qlab import live", {"torch"}),
    ("from qlab import explorers", {"torch"}),
])
def test_import_stays_light(statement, unwanted):
    loaded = loaded_by(statement)
    assert "qlab" in loaded
    assert not unwanted & loaded


def test_the_package_imports_its_modules_when_they_are_used():
    assert "numpy" in loaded_by("import qlab; qlab.affine.QParams")
    assert loaded_by("import qlab; assert not hasattr(qlab, 'no_such_module')") >= {"qlab"}


def test_floors_cover_the_modules():
    modules = {path.relative_to(ROOT / "qlab").parts[0].removesuffix(".py") for path in SOURCES}
    assert modules - {"__init__"} <= set(FLOORS)
    assert {"affine", "calibration", "live"} <= modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lower_floors_import_no_upper_ones(path):
    parts = path.relative_to(ROOT / "qlab").with_suffix("").parts
    module = ".".join(parts) if ".".join(parts) in FLOORS else parts[0]
    assert not upward_imports(module, path.read_text())


@pytest.mark.parametrize("module, source, upward", [
    ("affine", "from qlab.calibration import minmax", {"calibration"}),
    ("affine", "def f():\n    import qlab.live", {"live"}),
    ("calibration", "from qlab import affine, live", {"live"}),
    ("__init__", "from qlab.affine import mse", {"affine"}),
    ("live", "from qlab.explorers.calibration import drift", set()),
])
def test_upward_imports_are_noticed(module, source, upward):
    assert upward_imports(module, source) == upward


def test_no_public_name_is_without_use():
    notebooks = (json.loads(path.read_text()) for path in sorted((ROOT / "notebooks").glob("*.ipynb")))
    cells = [(cell["cell_type"], "".join(cell["source"])) for notebook in notebooks for cell in notebook["cells"]]
    code = [source for kind, source in cells if kind == "code"]
    moves = re.findall(r"`(live\w*\.\w+\(.*?\))`", " ".join(source for kind, source in cells if kind == "markdown"))
    assert len(code) > 100 and len(moves) > 10
    found = unused([ast.parse(path.read_text()) for path in SOURCES], map(ast.parse, code + moves))
    assert set(found) == OF_OTHERS | AT_HAND


@pytest.mark.parametrize("module, lesson, names", [
    ("def f(): return 1", "f()", []),
    ("def f(): return f()", "", ["f"]),
    ("def f(): pass\ndef g(): f()", "", ["g"]),
    ("A = B = 1", "B", ["A"]),
    ("class C:\n  x: int\n  def m(self): pass", "C(x=1)", ["m"]),
    ("class C:\n  x: int\n  def m(self): return self.x", "C().m()", []),
    ("def _f(): pass", "", []),
])
def test_a_name_without_use_is_noticed(module, lesson, names):
    assert unused([ast.parse(module)], [ast.parse(lesson)]) == names


def test_ruff_finds_nothing():
    said = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def test_no_file_names_a_place_on_one_machine():
    files = project_files()
    assert ROOT / "qlab" / "affine.py" in files
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            lines = enumerate(content.decode().splitlines(), 1)
            found += [f"{path.relative_to(ROOT)}:{i}: {line.strip()[:100]}" for i, line in lines
                      if MACHINE_PATH.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line, is_one", [
    ("open('{}/x.npy')".format("/work"), True),
    ("{}/me/data".format("/home"), True),
    ("cd {}/qlab".format("/root"), True),
    (r"C:{}sers\me".format(r"\U"), True),
    ("https://example.org/work/1", False),
    ("{home}/tmp/x", False),
    ("notebooks/work/a.ipynb", False),
])
def test_machine_paths_are_noticed(line, is_one):
    assert bool(MACHINE_PATH.search(line)) == is_one
