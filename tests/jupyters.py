"""Jupyters of several ages, each in a virtual environment of its own that is kept between runs.

They are in /var/tmp, readable by all, because the tests' users on the host run them too.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

CACHE = Path("/var/tmp/rjupyter-tests-%d" % os.getuid())


class Age(NamedTuple):
    """A set of packages, and the Pythons (3.x) that can run them, best first."""

    packages: List[str]
    pythons: List[int]


AGES: Dict[str, Age] = {
    # The classic notebook: NotebookApp, nbserver-PID.json.
    "notebook-6.4": Age(["notebook==6.4.*", "jupyter_client<8", "traitlets<5.10", "ipykernel<6.22"], [9, 10, 8, 11]),
    # JupyterLab 3 alone, on Jupyter Server 1.x.
    "lab-3.2": Age(
        [
            "jupyterlab==3.2.*",
            "jupyter_server==1.13.*",
            "jupyter_client<8",
            "traitlets<5.10",
            "ipykernel<6.22",
            "jsonschema<4.18",
            "six",  # jupyter_server 1.13 imports it and does not ask for it
        ],
        [9, 10, 8, 11],
    ),
    # The first Notebook on Jupyter Server 2.x, with JupyterLab 4.0.
    "notebook-7.0": Age(["notebook==7.0.*"], [9, 10, 11, 8]),
}


def interpreters() -> Dict[int, str]:
    """Return every Python 3.x of this machine, by its minor version; the system's own before others."""
    found: Dict[int, str] = {}
    for minor in range(6, 20):
        for place in [
            Path("/usr/bin"),
            Path("/usr/local/bin"),
            *Path.home().glob(".pyenv/versions/3.%d.*/bin" % minor),
        ]:
            program = place / ("python3.%d" % minor)
            if program.exists():
                found.setdefault(minor, str(program))
    return found


def jupyter_of(age: str) -> Path:
    """Return the bin directory of one of the AGES."""
    packages, minors = AGES[age]
    found = interpreters()
    python = next((found[minor] for minor in minors if minor in found), "3.%d" % minors[0])
    return environment(age, python, packages)


def jupyter_for_everyone() -> Path:
    """Return the bin directory of today's Jupyter, under the system's Python: every user can run it."""
    return environment("today", "/usr/bin/python3", ["notebook>=7.2", "jupyterlab>=4.2"])


def environment(name: str, python: str, packages: List[str]) -> Path:
    """Return the bin directory of a cached virtual environment, made when it is missing; one process at a time."""
    CACHE.mkdir(mode=0o755, exist_ok=True)
    CACHE.chmod(0o755)
    if CACHE.stat().st_uid != os.getuid() or CACHE.is_symlink():
        raise RuntimeError("%s is not ours" % CACHE)
    digest = hashlib.sha256(repr((python, packages)).encode()).hexdigest()[:8]
    venv = CACHE / ("%s-%s" % (name, digest))
    with open(str(venv) + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / "complete").exists():
            shutil.rmtree(venv, ignore_errors=True)
            uv = Path(sys.executable).with_name("uv")
            with open_for_all():
                run([uv, "venv", "--quiet", "--python", python, venv])
                run([uv, "pip", "install", "--quiet", "--link-mode=copy", "--python", venv / "bin/python", *packages])
            (venv / "complete").touch()
    return venv / "bin"


@contextlib.contextmanager
def open_for_all():  # type: ignore[no-untyped-def]
    umask = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(umask)


def run(argv: List[object]) -> None:
    """Run uv; it trusts the certificates that the system trusts."""
    certificates = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}
    answer = subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, env={**os.environ, **certificates}
    )
    if answer.returncode:
        raise RuntimeError(answer.stderr)
