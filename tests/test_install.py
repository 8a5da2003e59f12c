"""`make install`: the module with its bytecode, and a launcher that finds it from anywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sides import SCRIPT, TOP

pytestmark = pytest.mark.unit


def make(target: str, prefix: Path, **variables: str) -> None:
    words = ["%s=%s" % pair for pair in {"PREFIX": str(prefix), "PYTHON": sys.executable, **variables}.items()]
    subprocess.run(["make", "-C", str(TOP), target, *words], check=True, capture_output=True)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    prefix = tmp_path / "o'neil home"
    make("install", prefix)
    return prefix


def said(program: Path, *arguments: str, cwd: Path) -> str:
    environment = dict(os.environ, PATH="%s:%s" % (Path(sys.executable).parent, os.environ["PATH"]))
    argv = [str(program), *arguments]
    run = subprocess.run(argv, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout


def test_launcher_runs_the_module_whose_bytecode_lies_beside_it(prefix: Path, tmp_path: Path) -> None:
    (bytecode,) = (prefix / "lib/rjupyter/__pycache__").iterdir()
    before = bytecode.stat().st_mtime_ns
    assert re.fullmatch(r"rjupyter \d+\.\d+\.\d+\n", said(prefix / "bin/rjupyter", "--version", cwd=tmp_path))
    assert bytecode.stat().st_mtime_ns == before
    assert str(prefix / "lib/rjupyter/rjupyter.py").encode() in bytecode.read_bytes()  # for tracebacks


def test_launcher_is_found_by_a_link_and_goes_by_its_name(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "gpu").symlink_to(prefix / "bin/rjupyter")
    assert "try: %s --help" % (tmp_path / "gpu") in said(tmp_path / "gpu", "--nonsense", cwd=tmp_path)


def test_launcher_imports_nothing_from_where_it_is_run(prefix: Path, tmp_path: Path) -> None:
    for name in ("argparse", "rjupyter", "queue"):
        (tmp_path / (name + ".py")).write_text("raise SystemExit('a stranger')\n")
    assert "a stranger" not in said(prefix / "bin/rjupyter", "--version", cwd=tmp_path)


def test_uninstall_leaves_nothing_of_ours(prefix: Path) -> None:
    (prefix / "bin/other").write_text("")
    make("uninstall", prefix)
    assert [path.name for path in prefix.rglob("*") if not path.is_dir()] == ["other"]
    assert not (prefix / "lib/rjupyter").exists()


def test_packagers_can_install_below_another_root(tmp_path: Path) -> None:
    make("install", Path("/usr"), DESTDIR=str(tmp_path / "root"))
    (bytecode,) = (tmp_path / "root/usr/lib/rjupyter/__pycache__").iterdir()
    assert str(tmp_path).encode() not in bytecode.read_bytes()


def test_the_file_says_which_python_it_takes() -> None:
    """PEP 723, for `uv run`: the same as what the file itself checks."""
    head = SCRIPT.read_text().partition('"""')[0]
    assert '# /// script\n# requires-python = ">=3.8"\n# dependencies = []\n# ///\n' in head
    assert "sys.version_info < (3, 8)" in SCRIPT.read_text()
