"""The tests themselves: what several of them need has a module of its own."""

import ast
from pathlib import Path
from typing import Iterator

import pytest

TESTS = Path(__file__).parent


def imported_by(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("name", sorted(file.name for file in TESTS.glob("test_*.py")))
def test_no_test_file_imports_another(name: str) -> None:
    modules = list(imported_by(TESTS / name))
    assert modules
    assert not [module for module in modules if module == "conftest" or module.startswith("test_")]
