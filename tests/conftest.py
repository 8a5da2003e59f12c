"""Fixtures: a laptop and a host, each with a home of its own, and a check that nothing is left behind by a test."""

import collections
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import uuid
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, cast

import pytest
from browser import chromium
from client import held
from jupyters import kept_agent, nbclient_alone, standin
from machine import report
from private_slurm import PrivateSlurm, find_slurm_obstacle
from private_sshd import PrivateSshd
from sides import (
    MARK,
    ON_HOST,
    SYSTEM_PATH,
    TOP,
    VENV_BIN,
    Host,
    Laptop,
    Run,
    Shared,
    User,
    left_of,
)

sys.path.insert(0, str(TOP))
sys.dont_write_bytecode = False  # whatever the shell says: to make each process compile the tests takes 3 s of a core

# The fixtures that bring each part. A test that uses none of them, directly or not, is "unit" unless it says otherwise.
PARTS = {
    "sshd": {"make_host", "make_user"},
    "cluster": {"slurm", "engine", "shims"},
    "browser": {"driver"},
}
# The tests in which the laptop has rjupyter.py as most people do: one file that is started by its path.
COPIED = {"test_terminal"}
# From where to where in the whole run the tests of a kind begin, mixed: while some wait, others compute. The cores are
# busy to the end, and what takes longest is not alone there.
SPREAD = {"shared": (0, 0), "waits": (0, 0.8), "cluster": (0, 0.8), "unit": (1, 2), "": (0, 1)}


@pytest.hookimpl(tryfirst=True)  # before -m chooses by them
def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for item in items:
        used = set(item.fixturenames) if isinstance(item, pytest.Function) else set()
        for name, fixtures in PARTS.items():
            if used & fixtures:
                item.add_marker(name)
        if not any(item.get_closest_marker(name) for name in PARTS):
            item.add_marker("unit")
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # one process has them all
    by_kind = collections.defaultdict(list)
    for item in items:
        by_kind[next((kind for kind in SPREAD if item.get_closest_marker(kind)), "")].append(item)
    places = {}
    for kind, those in by_kind.items():
        begin, end = SPREAD[kind]
        those.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))  # the same order in each process
        places.update({item: begin + (end - begin) * number / len(those) for number, item in enumerate(those)})
    items.sort(key=places.__getitem__)


def pytest_report_header(config: pytest.Config) -> List[str]:
    """Say what is skipped on this machine, and how long the whole takes, where the whole is run."""
    is_whole = not (config.option.keyword or config.option.markexpr or config.option.collectonly)
    if hasattr(config, "workerinput") or not is_whole or [Path(word).name for word in config.args] != ["tests"]:
        return []
    return report(config.getoption("numprocesses", None) or 1)


@contextlib.contextmanager
def fresh_directory(mark: str) -> Iterator[Path]:
    """A short temporary directory: a control socket must fit below it. Checks that the test leaves nothing running."""
    path = Path(tempfile.mkdtemp(prefix="rj-"))
    yield path
    try:
        left = left_of(mark, 30)  # long enough for a command of a scheduler whose controller has just been stopped
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left:
            pytest.fail("left running: %s" % left)
    finally:
        for unreadable in path.rglob("*"):
            if unreadable.is_dir() and not unreadable.is_symlink():
                unreadable.chmod(0o700)
        shutil.rmtree(path)


@contextlib.contextmanager
def fresh_laptop(directory: Path, mark: str, request: pytest.FixtureRequest) -> Iterator[Laptop]:
    laptop = Laptop(directory, mark)
    laptop.is_copied = request.path.stem in COPIED
    yield laptop
    laptop.end_runs()
    for run in laptop.runs:
        run.close()
    left = [str(path) for path in laptop.runtime.rglob("*") if not path.is_dir()]
    assert not left, "left in the runtime directory: %s" % left


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """What a test of its own has, once for a file; what is left behind is looked for after the last of its tests."""
    mark = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(fresh_directory(mark))
        laptop = stack.enter_context(fresh_laptop(directory, mark, request))
        yield Shared(mark, laptop, stack.enter_context(fresh_hosts(directory, mark, laptop, request))())


@pytest.fixture(scope="module")
def tunnel(shared: Shared) -> Iterator[Run]:
    """A server on the shared host that is open until the last of the tests; and no trouble of ours is in its log.

    Asked for its kernels while it starts one, Jupyter Server 2.21 fails with a traceback there.
    """
    yield held(shared.laptop, "host")
    for log in shared.host.home.glob(".local/state/rjupyter/servers/*/log"):
        trouble = log.read_text().partition("Uncaught exception")[2]
        assert not trouble, trouble[:8000]


def shared_by(request: pytest.FixtureRequest) -> Optional[Shared]:
    """Return what the test shares with others of its file, where it is marked so."""
    if not request.node.get_closest_marker("shared"):
        return None
    assert "PYTEST_XDIST_WORKER" not in os.environ or "@" in request.node.nodeid, "xdist has scattered the group"
    return cast(Shared, request.getfixturevalue("shared"))


@pytest.fixture
def mark(request: pytest.FixtureRequest) -> str:
    common = shared_by(request)
    return common.mark if common else uuid.uuid4().hex


@pytest.fixture
def directory(mark: str, request: pytest.FixtureRequest) -> Iterator[Path]:
    common = shared_by(request)
    with contextlib.nullcontext(common.laptop.directory) if common else fresh_directory(mark) as directory:
        yield directory


@pytest.fixture
def laptop(directory: Path, mark: str, request: pytest.FixtureRequest) -> Iterator[Laptop]:
    common = shared_by(request)
    if not common:
        with fresh_laptop(directory, mark, request) as laptop:
            yield laptop
        return
    before = list(common.laptop.runs)
    yield common.laptop
    for run in common.laptop.runs[len(before) :]:
        if run.status is None:
            run.interrupt()
            run.wait(20)
        run.close()
    common.laptop.runs[:] = before


@pytest.fixture
def make_user(directory: Path) -> Iterator[Callable[[str], User]]:
    """Makes real users with the login shell that is asked for. Root alone may."""
    users = []

    def make(shell: str) -> User:
        if os.getuid() != 0:
            pytest.skip("only root can make a user with the login shell " + shell)
        directory.chmod(0o711)
        users.append(User(directory / ("rj" + uuid.uuid4().hex[:8]), shell))
        return users[-1]

    yield make
    for user in users:
        user.remove()


@contextlib.contextmanager
def fresh_hosts(
    directory: Path, mark: str, laptop: Laptop, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Host]]:
    """Makes hosts; `path` in front of the system's is where Jupyter is, and `front` goes before that; `settings` goes
    into sshd_config; `prefix` is a command that starts sshd, as PrivateSshd has it."""
    hosts = []

    def make(
        path: str = "",
        settings: str = "",
        name: str = "host",
        user: Optional[User] = None,
        prefix: Sequence[str] = (),
        front: str = "",
        **environment: str,
    ) -> Host:
        if not path:
            is_real = request.node.get_closest_marker("jupyter")
            executes = request.node.get_closest_marker("nbclient")
            path = str(VENV_BIN if is_real else nbclient_alone() if executes else standin())
        path = "%s:%s" % (front, path) if front else path
        base = directory / name
        base.mkdir()
        sshd = PrivateSshd(base, "%s:%s" % (path, SYSTEM_PATH), host=name, settings=settings, prefix=prefix)
        if user:
            sshd.serve(user.name, user.home)
        cache = sshd.home / ".cache/rjupyter"
        if sshd.home.stat().st_dev == base.stat().st_dev:  # not one that is full, or keeps no permissions
            shutil.copytree(kept_agent(), cache, ignore=shutil.ignore_patterns("complete"))
            for place in [cache.parent, cache, *cache.rglob("*")]:
                os.chown(place, user.uid if user else -1, -1)
        temporary = base / "tmp"  # what is killed leaves its files there; TEMP where a test says a TMPDIR that is none
        temporary.mkdir()
        temporary.chmod(0o1777)
        marks = {MARK: mark, "RJUPYTER_SIDE": "host", "TMPDIR": str(temporary), "TEMP": str(temporary)}
        sshd.environment.update(marks, **environment)
        if not user:
            sshd.environment["RJUPYTER_TMP"] = str(base)
        host = Host(sshd)
        hosts.append(host)
        laptop.config = str(sshd.config)
        sshd.start()
        return host

    yield make
    # The laptop's side first: what is left of it after its runs is a leak, and would end with sshd.
    laptop.end_runs()
    local = left_of(mark, 10, without=ON_HOST)
    for host in hosts:
        host.end_servers()
        host.sshd.stop()
        host.sshd.end_connections()
    assert not local, "left on the laptop: %s" % local


@pytest.fixture
def make_host(
    directory: Path, mark: str, laptop: Laptop, make_user: Any, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Host]]:
    common = shared_by(request)
    if common:
        yield lambda: common.host
        return
    with fresh_hosts(directory, mark, laptop, request) as make:
        yield make


@pytest.fixture
def slow_host(make_host: Callable[..., Host], directory: Path, request: pytest.FixtureRequest) -> Host:
    """A host whose Jupyter starts when there is the file `go` in home."""
    programs = Path(VENV_BIN) if request.node.get_closest_marker("jupyter") else standin()
    command = directory / "bin/jupyter-notebook"
    command.parent.mkdir()
    wait = 'while ! test -e "$HOME/go"; do sleep 0.05; done'
    command.write_text('#!/bin/sh\n%s\nexec %s "$@"\n' % (wait, programs / "jupyter-notebook"))
    command.chmod(0o755)
    return make_host(path=str(command.parent))


@pytest.fixture
def slurm(directory: Path) -> Iterator[PrivateSlurm]:
    """A Slurm with two idle nodes."""
    obstacle = find_slurm_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    slurm = PrivateSlurm(directory / "slurm")
    try:
        yield slurm.start()
    finally:
        slurm.stop()


@pytest.fixture
def login(slurm: PrivateSlurm, make_host: Callable[..., Host]) -> Host:
    """The login node: a host with Slurm's commands, on which the nodes' names resolve."""
    return make_host(prefix=slurm.login_prefix, **slurm.environment())


@pytest.fixture
def driver(laptop: Laptop) -> Iterator[Any]:
    """A real browser on the laptop, driven by Selenium."""
    with chromium(laptop) as driver:
        yield driver


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host with the Jupyter of the tests' environment on its PATH."""
    return make_host()
