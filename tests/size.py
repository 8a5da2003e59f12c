"""How large rjupyter.py is, beside what it may be: printed at the end of `make lint`, asserted nowhere."""

import ast
import re
from collections import Counter
from typing import List, Tuple

from sides import SCRIPT


def figures() -> List[Tuple[str, int, int]]:
    """Return what is counted, how many there are, and how many there may be."""
    source = SCRIPT.read_text(encoding="utf-8")
    tree = ast.parse(source)
    words = Counter(re.findall(r"\b\w+\b", re.sub(r"(?m)^\s*#.*$", "", source)))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [
        ("lines", source.count("\n"), 7400),
        ("classes", sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)), 100),
        ("functions at the top that one place uses", sum(words[name] <= 2 for name in functions), 90),
    ]


if __name__ == "__main__":
    for what, count, most in figures():
        print("rjupyter.py: %6d %s (at most %d)" % (count, what, most))
