"""The caps of the house, and that tests and benches come in by the front door."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LINE, FILE, FUNCTION, KERNELS = 100, 400, 60, 500
HERE = "tests/test_house.py"
KINDS = ("*.py", "*.cpp", "*.h")
ROOMS = ("artifacts", "prep", "runtime")

# What is above a cap, or behind a door, today. Nothing may be added; what is mended is taken out.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
WIDE_FILES: set[str] = set()
PRIVATE: dict[str, set[str]] = {
    "tests/support/pico.py": {"_text"},  # the end of a family's name
}


@pytest.fixture(scope="module")
def tracked(root) -> list[str]:
    command = ["git", "-C", root, "ls-files", *KINDS]
    names = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if not names:
        pytest.skip("not a git checkout: what belongs to the project cannot be told")
    return [name for name in names if (root / name).is_file()]


def test_no_line_is_longer_than_the_cap(root, tracked):
    wide = {
        name
        for name in tracked
        if any(len(line) > LINE for line in (root / name).read_text("utf-8").splitlines())
    }
    assert wide <= WIDE_FILES, f"lines over {LINE} characters"


def test_no_file_is_longer_than_the_cap(root, tracked):
    def cap(name: str) -> int:
        return KERNELS if "/native/" in name else FILE

    lines = {name: len((root / name).read_text("utf-8").splitlines()) for name in tracked}
    assert {name for name in lines if lines[name] > cap(name)} <= LONG_FILES


def test_no_function_is_longer_than_the_cap(root, tracked):
    long = set()
    for name in tracked:
        if name.endswith(".py"):
            for node in _nodes(root / name, ast.FunctionDef):
                if node.end_lineno - node.lineno + 1 > FUNCTION:
                    long.add(f"{name}:{node.name}")
    assert long <= LONG_FUNCTIONS


def test_tests_and_benches_use_no_private_name_of_another_module(root, tracked):
    hidden = {
        name
        for file in tracked
        if file.split("/")[0] in ROOMS and file.endswith(".py")
        for name in _private_definitions(root / file)
    }
    for file in tracked:
        if file.startswith(("tests/", "bench/")) and file.endswith(".py") and file != HERE:
            own = set(_private_definitions(root / file))
            used = (set(_private_uses(root / file)) & hidden) - own
            assert used <= PRIVATE.get(file, set()), file


def _nodes(file: Path, *kinds: type) -> Iterator:
    tree = ast.parse(file.read_text("utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def _is_private(name: object) -> bool:
    return (
        isinstance(name, str) and name.startswith("_") and not name.endswith("__") and name != "_"
    )


def _private_definitions(file: Path) -> Iterator[str]:
    """Private functions, classes, variables and attributes that a file makes."""
    for node in _nodes(file, ast.FunctionDef, ast.ClassDef, ast.Name, ast.Attribute, ast.arg):
        stored = isinstance(getattr(node, "ctx", ast.Store()), ast.Store)
        name = next(
            getattr(node, field) for field in ("name", "id", "attr", "arg") if hasattr(node, field)
        )
        if stored and _is_private(name):
            yield name


def _private_uses(file: Path) -> Iterator[str]:
    """Private names that a file imports, reads of something else, or names in a string to patch."""
    for node in _nodes(file, ast.ImportFrom, ast.Attribute, ast.Constant):
        names: list[object] = []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node.value, str) and node.value.isidentifier():
            names = [node.value]
        yield from (name for name in names if _is_private(name))
