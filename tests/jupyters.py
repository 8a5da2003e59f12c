"""Jupyters of several ages, each in a virtual environment of its own that is kept between runs.

They are in /var/tmp, readable by all, because the tests' users on the host run them too.

usage: jupyters.py VENV, to lighten that environment
"""

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

CACHE = Path("/var/tmp/rjupyter-tests-%d" % os.getuid())
TODAY = ["notebook>=7.2", "jupyterlab>=4.2"]
# From 4.25 on, Jupyter imports a parser with it: a second of a core, and the tests start Jupyter a thousand times.
LIGHT = "jsonschema<4.25"
# The stand-in for a kernel, as a kernel.json says it; jupyter_client puts the Python of its own environment there. By
# this name it is taken for one that knows sockets, as it does.
STANDIN_KERNEL = ["python3", "-I", "-m", "ipykernel_standin", "{connection_file}"]


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
    "notebook-7.0": Age(["notebook==7.0.*", LIGHT], [9, 10, 11, 8]),
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
    return environment("today", "/usr/bin/python3", [*TODAY, LIGHT])


def jupyter_with_pairs() -> Path:
    """Return the bin directory of today's Jupyter with what holds notebooks elsewhere, too: jupytext, collaboration."""
    return environment("pairs", os.path.realpath(sys.executable), [*TODAY, LIGHT, "jupytext", "jupyter-collaboration"])


def jupyter_as_installed() -> Path:
    """Return the bin directory of today's Jupyter with all that pip installs: what is measured."""
    return environment("whole", os.path.realpath(sys.executable), TODAY, is_light=False)


def standin(has_python: bool = False) -> Path:
    """Return the bin directory of the stand-in for Jupyter, under the system's Python: every user can run it.

    Its commands are scripts of sh, with no Python beside them: so nothing is recorded, which would take longer to start
    than the stand-in does. What runs inside something needs one that has the modules: `has_python`.
    """
    source = Path(__file__).with_name("standin_jupyter.py")
    script = (
        '#!/bin/sh\nexec /usr/bin/python3 -IS -c \'import sys; sys.path.insert(0, "%s"); import standin_jupyter; '
        'standin_jupyter.serve(sys.argv[2:])\' "$0" "$@"\n'
    )
    python = '#!/bin/sh\nPYTHONPATH=%s exec /usr/bin/python3 -S "$@"\n'

    def make(prefix: Path) -> None:
        (prefix / "bin").mkdir(parents=True)
        for name, version in (("notebook", "7.99.0"), ("jupyterlab", "4.99.0")):
            (prefix / "lib/python3/site-packages" / ("%s-%s.dist-info" % (name, version))).mkdir(parents=True)
            program = prefix / "bin" / {"notebook": "jupyter-notebook", "jupyterlab": "jupyter-lab"}[name]
            program.write_text(script % (prefix / "lib"))
            program.chmod(0o755)
            (prefix / "lib" / name).mkdir()
            (prefix / "lib" / name / "__init__.py").touch()
        if has_python:
            (prefix / "bin/python").write_text(python % (prefix / "lib"))
            (prefix / "bin/python").chmod(0o755)
        shutil.copy(source, prefix / "lib")
        subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", str(prefix / "lib")], check=True)

    return kept("standin-with-python" if has_python else "standin", source.read_text(), make) / "bin"


def kept_agent() -> Path:
    """Return a directory with what a host keeps of rjupyter.py (tests/test_kept.py), under the system's Python.

    So each host of the tests is one that has seen it before, unless a test takes it away.
    """
    source = Path(__file__).parents[1] / "rjupyter.py"

    def make(prefix: Path) -> None:
        for old in [path for path in CACHE.glob("agent-*") if time.time() - path.stat().st_mtime > 86400]:
            (shutil.rmtree if old.is_dir() else os.unlink)(old)
        prefix.mkdir(mode=0o700)
        name = "agent-%s.py" % hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        shutil.copy(source, prefix / name)
        (prefix / name).chmod(0o600)
        subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", name], cwd=prefix, check=True)

    return kept("agent", source.read_text(), make)


def standin_environment() -> Path:
    """Return an environment with the stand-in for Jupyter, and a Python beside it that imports it, as venv makes one.

    It is for the tests of which environment is taken; every user can run it.
    """
    source = Path(__file__).with_name("standin_jupyter.py")

    def make(prefix: Path) -> None:
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(prefix)], check=True)
        (packages,) = prefix.glob("lib/python3*/site-packages")
        shutil.copy(source, packages)
        serve = "import sys\nimport standin_jupyter\nstandin_jupyter.serve(sys.argv[1:])\n"
        for name, command, version in (("notebook", "jupyter-notebook", "7"), ("jupyterlab", "jupyter-lab", "4")):
            (packages / ("%s-%s.99.0.dist-info" % (name, version))).mkdir()
            (packages / name).mkdir()
            (packages / name / "__init__.py").touch()
            (packages / name / "__main__.py").write_text(serve)
            (prefix / "bin" / command).write_text("#!%s/bin/python\n%s" % (prefix, serve))
            (prefix / "bin" / command).chmod(0o755)
        subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", str(packages)], check=True)

    return kept("standin-environment", source.read_text(), make)


def standin_wheels() -> Path:
    """Return a directory with wheels of the stand-in, named as those of Jupyter: what is installed from there."""
    source = Path(__file__).with_name("standin_jupyter.py").read_text()

    def make(directory: Path) -> None:
        directory.mkdir()
        for name, command, version in (("notebook", "jupyter-notebook", "7.9"), ("jupyterlab", "jupyter-lab", "4.9")):
            facts = "%s-%s.dist-info" % (name, version)
            files = {
                name + "/__init__.py": source + "\n\ndef main() -> None:\n    serve(sys.argv[1:])\n",
                facts + "/METADATA": "Metadata-Version: 2.1\nName: %s\nVersion: %s\n" % (name, version),
                facts + "/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                facts + "/entry_points.txt": "[console_scripts]\n%s = %s:main\n" % (command, name),
            }
            files[facts + "/RECORD"] = "".join("%s,,\n" % file for file in [*files, facts + "/RECORD"])
            with zipfile.ZipFile(directory / ("%s-%s-py3-none-any.whl" % (name, version)), "w") as wheel:
                for file, text in files.items():
                    wheel.writestr(file, text)

    return kept("standin-wheels", source, make)


def nbclient_alone() -> Path:
    """Return the bin directory of an environment that executes notebooks: nbclient, and a stand-in for the kernel.

    Without IPython, which jupyter_client would import, and without what Jupyter adds, a run takes half the time.
    """
    source = Path(__file__).with_name("standin_kernel.py")
    packages = ["nbclient"]

    def make(venv: Path) -> None:
        install(venv, "/usr/bin/python3", packages)
        (place,) = venv.glob("lib/python3*/site-packages")
        shutil.copy(source, place / (STANDIN_KERNEL[3] + ".py"))
        for needless in place.glob("_virtualenv.*"):  # imported with each start, for distutils' sake
            needless.unlink()
        subprocess.run([venv / "bin/python", "-m", "compileall", "-q", str(place)], check=True)
        kernel = venv / "share/jupyter/kernels/python3/kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps({"argv": STANDIN_KERNEL, "display_name": "Python 3", "language": "python"}))

    return kept("nbclient-alone", source.read_text() + repr((packages, STANDIN_KERNEL)), make) / "bin"


def lighten(venv: Path) -> None:
    """Let a Jupyter and its kernels start sooner.

    As without Node.js, it looks for no language server, nor for yarn's settings. Notebook has no page of JupyterLab's
    (which `jupyter lab` brings whatever is set). Together with LIGHT, a start takes 0.7 s of a core instead of 3.0.
    Kernels have no debugger, which none of the tests asks for, and start in 0.4 s of a core instead of 0.6.
    """
    settings = venv / "etc/jupyter/jupyter_server_config.d"
    if settings.is_dir():
        for name in ("jupyter_lsp", "jupyterlab"):  # as `jupyter server extension disable` writes it
            extensions = {"ServerApp": {"jpserver_extensions": {name: False}}}
            (settings / (name + ".json")).write_text(json.dumps(extensions))
        node = venv / "bin/node"
        node.write_text("#!/bin/sh\n")
        node.chmod(0o755)
    for needless in venv.glob("lib/python3*/site-packages/debugpy*"):
        shutil.rmtree(needless)


def environment(name: str, python: str, packages: List[str], is_light: bool = True) -> Path:
    """Return the bin directory of a cached virtual environment, made when it is missing."""

    def make(venv: Path) -> None:
        install(venv, python, packages)
        if is_light:
            lighten(venv)

    return kept(name, repr((python, packages)) + (inspect.getsource(lighten) if is_light else ""), make) / "bin"


def install(venv: Path, python: str, packages: List[str]) -> None:
    """Make a virtual environment with these packages."""
    uv = Path(sys.executable).with_name("uv")
    run([uv, "venv", "--quiet", "--python", python, venv])
    run([uv, "pip", "install", "--quiet", "--link-mode=copy", "--python", venv / "bin/python", *packages])


def kept(name: str, what: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that is kept between runs, made when it is missing or was made of something else.

    One process at a time makes it.
    """
    CACHE.mkdir(mode=0o755, exist_ok=True)
    CACHE.chmod(0o755)
    if CACHE.stat().st_uid != os.getuid() or CACHE.is_symlink():
        raise RuntimeError("%s is not ours" % CACHE)
    place = CACHE / ("%s-%s" % (name, hashlib.sha256(what.encode()).hexdigest()[:8]))
    if not (place / "complete").exists():
        with open(str(place) + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "complete").exists():
                shutil.rmtree(place, ignore_errors=True)
                with open_for_all():
                    make(place)
                (place / "complete").touch()
    return place


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


if __name__ == "__main__":
    lighten(Path(sys.argv[1]))
