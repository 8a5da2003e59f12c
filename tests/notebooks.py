"""Notebooks: written for a test, and what there is in them afterwards."""

import json
from pathlib import Path
from typing import Any, Dict, List

PYTHON_SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


def code(source: str, *tags: str) -> Dict[str, Any]:
    cell: Dict[str, Any] = {"cell_type": "code", "id": "", "metadata": {}, "execution_count": None, "outputs": []}
    return dict(cell, source=source, metadata={"tags": list(tags)} if tags else {})


def write_notebook(path: Path, *cells: Any, minor: int = 5, **metadata: Any) -> Path:
    """Write a notebook; a cell may be given as its source alone."""
    whole = [code(cell) if isinstance(cell, str) else dict(cell) for cell in cells]
    for number, cell in enumerate(whole):
        cell["id"] = "c%d" % number
        if minor < 5:
            del cell["id"]
    notebook = {"cells": whole, "metadata": {"kernelspec": PYTHON_SPEC, **metadata}}
    path.write_text(json.dumps(dict(notebook, nbformat=4, nbformat_minor=minor), ensure_ascii=False), encoding="utf-8")
    return path


def cells_of(path: Path) -> List[Dict[str, Any]]:
    """Return the code cells of a notebook that was written."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(path: Path) -> List[str]:
    """Return what each code cell printed."""
    return [
        "".join("".join(output.get("text", "")) for output in cell["outputs"] if output["output_type"] == "stream")
        for cell in cells_of(path)
    ]
