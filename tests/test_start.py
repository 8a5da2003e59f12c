"""How the copied file starts: through sh, with its bytecode kept in ~/.cache/rjupyter, or as `python3 FILE`."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from jupyters import interpreters
from sides import SCRIPT

pytestmark = pytest.mark.unit


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The file in an empty directory, under a name that shells and caches may stumble over."""
    file = tmp_path / "o'neil home" / 'my "rjupyter"'
    file.parent.mkdir()
    shutil.copy(SCRIPT, file)
    return file


def start(words: List[object], tmp_path: Path, python: str = sys.executable) -> str:
    """Start it with --version, with `python` as python3; return all that it said."""
    places = tmp_path / "bin"
    places.mkdir(exist_ok=True)
    (places / "python3").unlink(missing_ok=True)
    (places / "python3").symlink_to(python)
    environment = {"PATH": "%s:/usr/bin:/bin" % places, "HOME": str(tmp_path)}
    argv = [str(word) for word in words] + ["--version"]
    run = subprocess.run(argv, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return run.stdout.decode()


def version(number: str) -> str:
    return "rjupyter %s\n" % number


def change_version(file: Path, number: str, mtime: int) -> None:
    """Make another version of the file, as old as is said."""
    text = SCRIPT.read_text()
    assert text.count('__version__ = "') == 1
    before, _, after = text.partition('__version__ = "')
    file.write_text('%s__version__ = "%s%s' % (before, number, after[after.index('"') :]))
    file.chmod(0o755)
    os.utime(file, (mtime, mtime))


def bytecode(tmp_path: Path) -> List[Path]:
    return [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]


def test_bytecode_is_kept_and_follows_the_file(copied: Path, tmp_path: Path) -> None:
    """An older file that comes to the place of a newer one is another file, too."""
    change_version(copied, "7.7.7", 2_000_000_000)
    assert start([copied], tmp_path) == version("7.7.7")
    (kept,) = bytecode(tmp_path)
    assert kept.is_relative_to(tmp_path / ".cache/rjupyter") and kept.parents[0].name == copied.parent.name
    assert (tmp_path / ".cache/rjupyter").stat().st_mode & 0o777 == 0o700
    assert list(copied.parent.iterdir()) == [copied]  # nothing beside it
    written = kept.stat().st_mtime_ns
    (tmp_path / "link").symlink_to(copied)
    assert start([tmp_path / "link"], tmp_path) == version("7.7.7")
    assert bytecode(tmp_path) == [kept] and kept.stat().st_mtime_ns == written
    change_version(copied, "6.6.6", 1_000_000_000)
    assert start([copied], tmp_path) == version("6.6.6")


@pytest.mark.parametrize("place", ["open to others", "not a directory", "not to be written"])
def test_cache_that_is_not_ours_is_not_used(copied: Path, tmp_path: Path, place: str) -> None:
    """What a stranger put there is not executed, and a start needs no cache."""
    cache = tmp_path / ".cache/rjupyter"
    cache.parent.mkdir()
    if place == "not a directory":
        cache.write_text("")
    elif place == "not to be written":
        cache.mkdir(0o500)
    else:
        change_version(copied, "6.6.6", 1_000_000_000)
        assert start([copied], tmp_path) == version("6.6.6")
        (kept,) = bytecode(tmp_path)
        stale = kept.read_bytes()
        change_version(copied, "7.7.7", 1_000_000_000)  # as long, and as old: only the content tells
        assert start([copied], tmp_path) == version("6.6.6")  # as with each module of Python's
        cache.chmod(0o755)
        assert kept.read_bytes() == stale
    assert start([copied], tmp_path).startswith("rjupyter ")
    if place == "open to others":
        assert start([copied], tmp_path) == version("7.7.7")


def test_bytecode_that_a_full_disk_has_cut_is_passed_over(copied: Path, tmp_path: Path) -> None:
    assert start([copied], tmp_path).startswith("rjupyter ")
    (kept,) = bytecode(tmp_path)
    whole = kept.read_bytes()
    for left in (whole[:16], whole[:5000], whole[:16] + bytes(5000)):
        kept.write_bytes(left)
        assert start([copied], tmp_path).startswith("rjupyter ")


def test_each_python_has_its_own(copied: Path, tmp_path: Path) -> None:
    pythons = [path for minor, path in sorted(interpreters().items()) if minor >= 8]
    for python in pythons:
        assert start([copied], tmp_path, python).startswith("rjupyter "), python
    assert len(bytecode(tmp_path)) == len(pythons)


def test_other_ways_to_start_it_keep_nothing(copied: Path, tmp_path: Path) -> None:
    ways: List[List[object]] = [[sys.executable, copied]]
    if importlib.util.find_spec("uv"):
        uv = Path(sys.executable).with_name("uv")
        ways += [[uv, "run", "--quiet", "--offline", "--no-project", "--python", sys.executable, "--script", copied]]
    for words in ways:
        assert start(words, tmp_path).endswith(start([sys.executable, copied], tmp_path)), words
    assert not [path for path in bytecode(tmp_path) if path.name.endswith(".pyc") and "rjupyter" in path.name]
