"""The tests themselves: what several of them need has a module of its own."""

import ast
from pathlib import Path
from typing import Iterator

TESTS = Path(__file__).parent


def imported_by(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_test_file_imports_another() -> None:
    for file in TESTS.glob("test_*.py"):
        modules = list(imported_by(file))
        assert modules, file
        assert not [module for module in modules if module == "conftest" or module.startswith("test_")], file
