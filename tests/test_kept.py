"""The host keeps rjupyter.py itself: it is sent once, and runs from memory where it cannot be kept."""

import os
import shutil
from pathlib import Path
from typing import Callable, List

import pytest
from jupyters import interpreters
from sides import SCRIPT, Host, Laptop, wait_until

PLACE = ".cache/rjupyter"


@pytest.fixture
def cache(host: Host) -> Path:
    """The place on a host that has seen nothing of ours yet."""
    shutil.rmtree(host.home / ".cache", ignore_errors=True)
    return host.home / PLACE


def kept(cache: Path) -> List[str]:
    return sorted(path.name for path in cache.glob("agent-*"))


def check(laptop: Laptop, *options: str) -> None:
    """It is the same to the user, however it runs there."""
    run = laptop.run("-v", *options, "host", "list")
    assert (run.status, run.stdout) == (0, ""), run.text
    assert "Connected to host" in run.stderr and "No server" in run.stderr


def test_it_is_sent_once(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    front = directory / "front"
    front.mkdir()
    (front / "python3").write_text('#!/bin/sh\ntee -a "$HOME/sent" | /usr/bin/python3 "$@"\n')
    (front / "python3").chmod(0o755)
    host = make_host(front=str(front))
    cache = host.home / PLACE
    shutil.rmtree(cache, ignore_errors=True)
    check(laptop)
    (name,) = kept(cache)
    assert (cache / name).read_bytes() == SCRIPT.read_bytes()
    assert cache.stat().st_mode & 0o777 == 0o700 and (cache / name).stat().st_mode & 0o777 == 0o600
    assert list((cache / "__pycache__").glob(name[:-3] + ".*.pyc"))
    (host.home / "sent").unlink()
    check(laptop)
    assert (host.home / "sent").stat().st_size < 1500 and kept(cache) == [name]


def test_each_session_that_logs_in_by_itself_brings_it(laptop: Laptop, cache: Path) -> None:
    check(laptop, "--no-mux")
    assert len(kept(cache)) == 1


def test_what_a_crash_of_the_host_left_of_it_is_replaced(laptop: Laptop, cache: Path) -> None:
    check(laptop)
    (name,) = kept(cache)
    (bytecode,) = (cache / "__pycache__").iterdir()
    for file, content in ((bytecode, b""), (bytecode, bytecode.read_bytes()[:5000]), (cache / name, b"")):
        file.write_bytes(content)
        check(laptop)
        assert (cache / name).read_bytes() == SCRIPT.read_bytes()


@pytest.mark.parametrize(
    "obstacle", ["others can write", "others can look", "a file", "a link", "another's", "no directory"]
)
def test_where_it_cannot_be_kept_it_runs_from_memory(laptop: Laptop, host: Host, cache: Path, obstacle: str) -> None:
    check(laptop)
    (name,) = kept(cache)
    (cache / name).write_text("open(%r, 'w')\n" % str(host.home / "pwned"))
    shutil.rmtree(cache / "__pycache__")
    if obstacle == "others can write":
        cache.chmod(0o770)
    elif obstacle == "others can look":  # Python makes directories below by the umask, and others may write into those
        cache.chmod(0o755)
    elif obstacle == "another's":
        if os.getuid():
            pytest.skip("only root can give a directory away")
        os.chown(cache, 12345, 12345)
    else:
        cache.rename(host.home / "elsewhere")
        if obstacle == "a link":
            cache.symlink_to(host.home / "elsewhere")
        elif obstacle == "a file":
            cache.touch()
        else:
            cache.symlink_to("/dev/full/there")
    check(laptop)
    check(laptop, "--no-mux")
    with laptop.opened("host") as run:
        run.url()
    assert laptop.run("host", "stop").status == 0
    assert not (host.home / "pwned").exists()


@pytest.mark.jupyter
def test_server_of_a_host_that_keeps_nothing_is_recorded(laptop: Laptop, host: Host, cache: Path) -> None:
    cache.parent.mkdir()
    cache.touch()
    with laptop.opened("host") as run:
        run.url()
        (server,) = (host.home / ".local/state/rjupyter/servers").iterdir()
        wait_until((server / "recorder.json").exists, "the recorder runs")
        done = laptop.run("host", "eval", "6 * 7")
    assert (done.status, done.stdout) == (0, "42\n"), done.text
    assert (server / "rjupyter.py").read_bytes() == SCRIPT.read_bytes()


def test_the_last_few_versions_are_kept(laptop: Laptop, cache: Path) -> None:
    (cache / "__pycache__").mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    for number in range(7):
        for file in (cache / ("agent-%d.py" % number), cache / ("__pycache__/agent-%d.cpython-36.pyc" % number)):
            file.touch()
            os.utime(file, (number, number))
    check(laptop)
    assert len(kept(cache)) == 5
    assert {"agent-%d.py" % number for number in range(3, 7)} < set(kept(cache))
    assert len(list((cache / "__pycache__").glob("agent-*.cpython-36.pyc"))) == 4


def test_a_relative_cache_is_none(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    host = make_host(XDG_CACHE_HOME="cache")
    shutil.rmtree(host.home / ".cache", ignore_errors=True)
    check(laptop)
    assert kept(host.home / PLACE) and not (host.home / "cache").exists()


def test_each_python_of_a_host_has_its_own_bytecode(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    host = make_host()
    shutil.rmtree(host.home / ".cache", ignore_errors=True)
    for python in interpreters().values():
        check(laptop, "--python", python)
    assert len(kept(host.home / PLACE)) == 1
