"""What the tests of `execute` share: notebooks that they write, kernels that they register, and what came back."""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from sides import Host, Laptop, Run

PYTHON_SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


def code(source: str, *tags: str, **parts: Any) -> Dict[str, Any]:
    """Return a code cell; `parts` are further ones of it, such as old outputs."""
    cell: Dict[str, Any] = {"cell_type": "code", "id": "", "metadata": {}, "execution_count": None, "outputs": []}
    return dict(cell, source=source, metadata={"tags": list(tags)} if tags else {}, **parts)


def text(source: str, kind: str = "markdown", **parts: Any) -> Dict[str, Any]:
    """Return a cell that is not executed."""
    return dict({"cell_type": kind, "id": "", "metadata": {}, "source": source}, **parts)


def stream(words: str) -> Dict[str, Any]:
    """Return what a cell printed once."""
    return {"output_type": "stream", "name": "stdout", "text": words}


def write_notebook(path: Path, *cells: Any, minor: int = 5, **metadata: Any) -> Path:
    """Write a notebook; a cell may be given as its source alone."""
    whole = [code(cell) if isinstance(cell, str) else dict(cell) for cell in cells]
    for number, cell in enumerate(whole):
        cell["id"] = "c%d" % number
        if minor < 5:
            del cell["id"]
    notebook = {"cells": whole, "metadata": {"kernelspec": PYTHON_SPEC, **metadata}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(notebook, nbformat=4, nbformat_minor=minor)))
    return path


def notebook_of(path: Path) -> Dict[str, Any]:
    """Return a notebook that was written."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def cells_of(path: Path) -> List[Dict[str, Any]]:
    """Return the code cells of a notebook that was written."""
    return [cell for cell in notebook_of(path)["cells"] if cell["cell_type"] == "code"]


def printed_in(notebook: Dict[str, Any]) -> List[str]:
    """Return what each code cell printed."""
    return [
        "".join("".join(output.get("text", "")) for output in cell["outputs"] if output["output_type"] == "stream")
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def printed(path: Path) -> List[str]:
    """Return what each code cell of a notebook that was written printed."""
    return printed_in(notebook_of(path))


def results(laptop: Laptop, run: Run) -> List[Path]:
    """Return the files that stdout names."""
    return [laptop.home / line for line in run.stdout.splitlines()]


def run_dirs(host: Host) -> List[Path]:
    """Return the directories of the runs that are kept on the host."""
    return sorted((host.home / ".local/state/rjupyter/runs").glob("r*"))


def the_run(host: Host) -> Path:
    """Return the directory of the only run on the host."""
    (directory,) = run_dirs(host)
    return directory


def runner_pid(host: Host) -> int:
    return int(json.loads((the_run(host) / "run.json").read_text())["pid"])


def listed_runs(laptop: Laptop) -> List[Dict[str, Any]]:
    """Return what `list` tells of runs."""
    found = [json.loads(line) for line in laptop.run("host", "list", "--json").stdout.splitlines()]
    return [thing for thing in found if thing["event"] == "run"]


def waiting_for(path: object = "go") -> str:
    """Return a cell that prints "waits", waits for a file, and prints "went"."""
    lines = ["import os, time", "print('waits', flush=True)"]
    return "\n".join([*lines, "while not os.path.exists(%r): time.sleep(0.01)" % str(path), "print('went')"])


def start_waiting(
    laptop: Laptop,
    *arguments: str,
    destination: str = "host",
    notebook: str = "w.ipynb",
    is_written: bool = True,
    path: object = "go",
) -> Tuple[Run, str]:
    """Start a notebook whose second cell waits for a file; return the run when that cell runs, and its id."""
    if is_written:
        write_notebook(laptop.home / notebook, "x = 1", waiting_for(path), "print(x)")
    run = laptop.start(destination, "execute", "-v", notebook, *arguments, has_terminal=False)
    run.expect("^waits$")
    return run, run.expect(r"\((r[0-9a-f]{4})\)").group(1)


# -- kernels ----------------------------------------------------------------------------------------------------------

IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def add_kernel(home: Path, name: str, argv: Sequence[str] = (), language: str = "python", **environment: str) -> None:
    """Register a kernel below a home on the host: Python's own, unless `argv` says another."""
    directory = home / ".local/share/jupyter/kernels" / name
    directory.mkdir(parents=True)
    spec = {"argv": list(argv or IPYKERNEL), "display_name": name, "language": language, "env": environment}
    (directory / "kernel.json").write_text(json.dumps(spec))


def add_slow_kernel(home: Path, name: str, seconds: float) -> None:
    """Register a Python kernel that takes its time to start; on sockets, for ports are others' meanwhile.

    A client that has met another program there does not try again (libzmq #4196), and waits for the kernel in vain.
    """
    program = home / name / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nsleep %s\nexec %s "$@"\n' % (seconds, IPYKERNEL[0]))
    program.chmod(0o755)
    add_kernel(home, name, [str(program), *IPYKERNEL[1:]])


def add_kernel_that_ignores_its_parent(home: Path, name: str) -> None:
    """Register a Python kernel that does not look whether the one who started it is still there, as R's does not."""
    add_kernel(home, name, ["/usr/bin/env", "-u", "JPY_PARENT_PID", *IPYKERNEL])


def add_bash(home: Path) -> Dict[str, str]:
    """Register the kernel of bash and return its kernelspec for a notebook; skips where it is not installed."""
    if not importlib.util.find_spec("bash_kernel"):
        pytest.skip("there is no bash_kernel in the tests' environment; tests/setup.sh installs it")
    environment = {"PS1": "$"}
    add_kernel(home, "bash", [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"], "bash", **environment)
    return {"name": "bash", "display_name": "Bash", "language": "bash"}


def add_r(home: Path) -> Dict[str, str]:
    """Register the kernel of R and return its kernelspec for a notebook; skips where it is not installed."""
    program = shutil.which("R")
    test = [program or "R", "--slave", "-e", "library(IRkernel)"]
    if not program or subprocess.run(test, capture_output=True).returncode:
        pytest.skip("there is no R with IRkernel on this machine; tests/setup.sh installs it where Debian has it")
    argv = [program, "--slave", "-e", "IRkernel::main()", "--args", "{connection_file}"]
    add_kernel(home, "ir", argv, "R")
    return {"name": "ir", "display_name": "R", "language": "R"}


# -- file systems -----------------------------------------------------------------------------------------------------


def mount(*arguments: object) -> None:
    """Mount something on a directory of the test's own, or skip."""
    words = ["mount", *(str(argument) for argument in arguments)]
    answer = subprocess.run(words, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip("this test mounts, and may not: " + answer.stderr.strip())


@contextlib.contextmanager
def mounted(place: Path, *arguments: object) -> Iterator[None]:
    """Mount something on `place` for a while."""
    mount(*arguments, place)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def without_root_rights(laptop: Laptop) -> None:
    """Let rjupyter.py heed the permissions of files, also where root runs the tests."""
    program = shutil.which("setpriv")
    if not program:
        pytest.skip("there is no setpriv, and root may write everything")
    wrapper = laptop.directory / "python"
    caps = "-dac_override,-dac_read_search,-fowner"
    words = [program, "--bounding-set=" + caps, "--inh-caps=" + caps, laptop.python]
    wrapper.write_text('#!/bin/sh\nexec %s "$@"\n' % " ".join(words))
    wrapper.chmod(0o755)
    laptop.python = str(wrapper)


def written_anywhere(*homes: Path, words: str, beside: Optional[Path] = None) -> List[Path]:
    """Return the notebooks below these homes in which a cell printed `words`."""
    found = []
    for home in homes:
        for path in home.rglob("*"):
            if path.is_file() and path != beside and b'"nbformat"' in path.read_bytes()[-200:]:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if any(words in said for said in printed(path)):
                        found.append(path)
    return found
