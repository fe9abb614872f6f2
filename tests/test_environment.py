"""docs/environment.md names every environment variable that the sources read and no other one, and where it is read."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
NAME = r"[A-Z][A-Z0-9_]+"
ROWS = re.findall(rf"^\| ((?:`{NAME}`(?:, )?)+) \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE)
NAMED = {name for names, _ in ROWS for name in re.findall(NAME, names)}


def of_python(source: str) -> set[str]:
    """The names by which a module asks `os.environ` or `os.getenv`; ValueError for one that cannot be told."""
    if "environ" not in source and "getenv" not in source:
        return set()
    tree = ast.parse(source)
    known: dict[str, list[str]] = {}  # variables that stand for one name or several
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = texts(node.value)
        elif isinstance(node, (ast.comprehension, ast.For)) and isinstance(node.target, ast.Name):
            known[node.target.id] = texts(node.iter)
    found: set[str] = set()
    for key in keys(tree):
        names = known.get(key.id, []) if isinstance(key, ast.Name) else texts(key)
        if not names:
            raise ValueError(f"line {key.lineno}: which variable does {ast.unparse(key)} name?")
        found.update(names)
    return found


def texts(node: ast.expr) -> list[str]:
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def keys(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield node.slice
        elif isinstance(node, ast.Call) and re.fullmatch(
            r"os\.(getenv|environ\.(get|setdefault|pop))", ast.unparse(node.func)
        ):
            yield node.args[0]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[-1]) == "os.environ":
            yield node.left


def of_makefile(source: str) -> set[str]:
    """What may be given to make: read but not set, or set as what the environment or the command line may replace."""
    code = re.sub(r"^\s*#.*$", "", source, flags=re.MULTILINE)
    read = set(re.findall(rf"(?<!\$)\$\(({NAME})\)", code)) - {"MAKE", "CURDIR"}
    own = set(re.findall(rf"^(?:\S+: )?({NAME}) :=", code, re.MULTILINE)) | set(re.findall(rf"\b({NAME})=\$\$", code))
    return (read - own) | set(re.findall(rf"\$\$\{{({NAME})", code))


@functools.cache
def read_by() -> dict[str, set[str]]:
    """The variables that each file reads."""
    return dict(sources())


def sources() -> Iterator[tuple[str, set[str]]]:
    for folder in ("bench", "lambda_kernels", "python", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), of_python(path.read_text(encoding="utf-8"))
    yield "setup.py", of_python((ROOT / "setup.py").read_text(encoding="utf-8"))
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        text = path.read_text(encoding="utf-8")
        yield str(path.relative_to(ROOT)), set(re.findall(rf'getenv\("({NAME})"\)', text))
        assert text.count("getenv(") == text.count('getenv("'), f"{path}: which variable is read?"
    yield "Makefile", of_makefile((ROOT / "Makefile").read_text(encoding="utf-8"))
    for batch in ("docs/bench.sbatch", "docs/train.sbatch"):
        yield batch, set(re.findall(rf"\$\{{({NAME}):", (ROOT / batch).read_text(encoding="utf-8")))


def test_the_page_names_every_variable_that_is_read_and_no_other():
    read: dict[str, list[str]] = {}
    for file, names in read_by().items():
        for name in names:
            read.setdefault(name, []).append(file)
    assert {name: files for name, files in read.items() if name not in NAMED} == {}, "add it to docs/environment.md"
    assert sorted(NAMED - read.keys()) == [], "nothing reads it: take it out of docs/environment.md"


@pytest.mark.parametrize(("names", "places"), ROWS, ids=[names.replace("`", "") for names, _ in ROWS])
def test_each_place_reads_its_variables(names, places):
    for name in re.findall(NAME, names):
        for place in re.findall(r"`([^`]+)`", places):
            assert (ROOT / place).exists(), place
            readers = [file for file, found in read_by().items() if name in found]
            assert any(file.startswith(place) for file in readers), f"{place} does not read {name}, but {readers} do"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os\nos.environ.get('A_B')\nos.environ['C_D']", {"A_B", "C_D"}),
        ("import os\nos.getenv('A_B', '')\n'C_D' in os.environ", {"A_B", "C_D"}),
        ("import os\nKEY = 'A_B'\nos.environ.get(KEY)", {"A_B"}),
        ("import os\n[os.environ[n] for n in ('A_B', 'C_D')]", {"A_B", "C_D"}),
        ("import os\n{**os.environ, 'A_B': '1'}", set()),
    ],
)
def test_readers_are_found(source, names):
    assert of_python(source) == names


def test_a_reader_that_hides_its_variable_is_refused():
    with pytest.raises(ValueError, match="line 2: which variable does name.upper"):
        of_python("import os\nos.environ.get(name.upper())")


def test_variables_of_a_makefile_are_found():
    text = "P ?= python3\nPYTHON ?= python3\nVENV := .venv\nx:\n\t$(PYTHON) $(VENV) $(ARGS) $${CXX:-g++} $(MAKE)\n"
    assert of_makefile(text) == {"PYTHON", "ARGS", "CXX"}
