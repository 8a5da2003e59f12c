"""The newest Python and OpenSSH, those of Debian sid, on either side, where each warning is an error."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from client import check_failure, compute, is_up, new_session
from execution import printed, write_notebook
from jupyters import LIGHT, interpreters
from private_sid import TREE, find_sid_obstacle, in_sid, sid_pythons, sid_ssh_version, sshd_in_sid, write_program
from proxy import Proxy
from readme import README, readme_range
from sides import BOTH_MODES, SCRIPT, Host, Laptop, Run, quiet_port, ssh_of

OBSTACLE = find_sid_obstacle()
in_a_sid = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
NEWEST = max(sid_pythons(), default=0)
OURS = ".local/share/rjupyter/venv"  # what rjupyter installs there, below home


@pytest.fixture(autouse=True)
def no_warning(laptop: Laptop) -> Iterator[None]:
    """Neither side prints a Python's warning."""
    yield
    for run in laptop.runs:
        assert not re.search(r"\w+Warning\b|^Exception ignored", run.text, re.MULTILINE), run.text


def put_laptop_into_sid(laptop: Laptop, minor: int) -> None:
    """Let rjupyter.py, a copy that is all there is of it, run in sid, under one of its Pythons and with its ssh."""
    copy = str(shutil.copy(SCRIPT, laptop.home))
    argv = in_sid(laptop.directory, sid_pythons()[minor], "-W", "error", copy)
    laptop.installed = str(write_program(laptop.directory / "sid/rjupyter", *argv))
    laptop.environment["PYTHONWARNINGS"] = "error"  # what it starts itself


def make_sid_host(make_host: Callable[..., Host], directory: Path, minor: int, **environment: str) -> Host:
    """Make a host that is a sid: its python3 is one of sid's Pythons."""
    python3 = write_program(directory / ("sid/3.%d/python3" % minor), sid_pythons()[minor], "-W", "error")
    return make_host(path=str(python3.parent), prefix=sshd_in_sid(directory), **environment)


def what_leads_to_packages() -> Dict[str, str]:
    """Return what tells pip on this machine where packages are; sid.sh copied the files."""
    names = "PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT SSL_CERT_FILE HTTP_PROXY HTTPS_PROXY http_proxy https_proxy"
    return {name: os.environ[name] for name in names.split() if name in os.environ}


@pytest.fixture
def make_host_with_ours(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> Callable[[int], Host]:
    """Makes hosts that are a sid, with the Jupyter that rjupyter itself installed there: by the first test, for all."""

    def install(home: str, minor: int) -> None:
        shutil.rmtree(str(TREE) + home, ignore_errors=True)
        os.makedirs(str(TREE) + home)
        Path(str(TREE) + home, "constraints").write_text(LIGHT + "\n")
        packages = {"PIP_CONSTRAINT": home + "/constraints", **what_leads_to_packages()}
        make_sid_host(make_host, directory, minor, name="bare", HOME=home, **packages)
        run = laptop.start("--local-port", str(quiet_port()), "bare", has_terminal=False)
        with contextlib.suppress(AssertionError):
            run.url()
        if re.search("No matching distribution|Failed to build|[Ff]ailed building", run.text):
            pytest.skip("there is no Jupyter for Python 3.%d yet: %s" % (minor, run.text))
        assert compute(run.url(), "import sys; print(*sys.version_info[:2])") == "3 %d\n" % minor, run.text
        assert re.search("^Installed Jupyter", run.text, re.MULTILINE), run.text
        assert "Stopped" in laptop.run("bare", "stop", "--all").stderr

    def make(minor: int) -> Host:
        home = "/home/jupyter-3.%d" % minor
        mark = Path(str(TREE) + home, "complete")
        with open(str(TREE) + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                install(home, minor)
                laptop.end_runs()
                mark.touch()
        host = make_sid_host(make_host, directory, minor)
        (host.home / OURS).parent.mkdir(parents=True)
        (host.home / OURS).symlink_to(Path(home, OURS))
        return host

    return make


def check_all_day(laptop: Laptop, host: Host, where: str) -> None:
    """What a day with a host is: open, compute, be cut off, come back, execute, stop. `where` is sys.prefix there."""
    (host.home / "work").mkdir()
    write_notebook(host.home / "work/n.ipynb", "1")
    port = quiet_port()
    run = laptop.start("--local-port", str(port), "host:work", has_terminal=False)
    url = run.url()
    run.expect("^Launched Jupyter Notebook")
    run.expect("To end it")
    prefix = "import os, sys; print(os.path.realpath(sys.prefix))"
    kernel = new_session(url, "n.ipynb")
    assert compute(url, prefix, kernel) == where + "\n"
    assert laptop.run("host", "eval", "-k", "n.ipynb", "print(6 * 7)").stdout == "42\n"
    assert "42\n" in laptop.run("host", "output", "n.ipynb").stdout
    (row,) = [row for row in laptop.run("host", "list").stdout.splitlines() if "/work" in row]
    assert " live " in row
    assert "n.ipynb" in laptop.run("host", "list", "--kernels").stdout
    host.sshd.end_connections()
    run.expect("^Connected to host again")
    assert compute(url, "print(1)", kernel) == "1\n"
    run.interrupt()
    assert run.wait() == 0, run.text

    browser = laptop.home / "browser"  # one that is there until it is closed
    browser.write_text("#!/bin/sh\nwhile [ -e %s ]; do sleep 0.1; done\n" % browser)
    browser.chmod(0o755)
    elsewhere = socket.create_server(("127.0.0.1", port))  # its usual one is taken: there is another
    with elsewhere, laptop.opened("--browser", str(browser), "host:work", has_terminal=True) as again:
        assert "Found Jupyter Notebook" in again.text
        assert compute(again.url(), "print(2)", kernel) == "2\n"
    browser.unlink()
    assert laptop.run("host", "doctor").status == 0
    write_notebook(laptop.home / "e.ipynb", prefix)
    executed = laptop.run("host:work", "execute", "e.ipynb")
    assert (executed.status, executed.stdout) == (0, "e.executed.ipynb\n"), executed.text
    assert printed(laptop.home / "e.executed.ipynb") == [where + "\n"]
    stop = laptop.run("host", "stop", "--all")
    assert stop.status == 0 and "Stopped Jupyter Notebook" in stop.stderr
    assert laptop.run("host", "list").stdout.count("live") == 0


# Who is where: each of sid's Pythons once here and once on the host, and the newest with a laptop as it is today. (A
# host as it is today with a laptop in sid is below.) Where both sides are in sid, the copied file, Python and ssh are
# all that there is, on either.
PYTHONS = sorted(sid_pythons()) or [0]
PAIRS = [*zip(PYTHONS, PYTHONS[1:] + PYTHONS[:1]), (0, PYTHONS[-1])]


@in_a_sid
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_newest_python_and_ssh(
    laptop: Laptop, make_host_with_ours: Callable[[int], Host], here: int, there: int
) -> None:
    if here:
        put_laptop_into_sid(laptop, here)
    host = make_host_with_ours(there)
    check_all_day(laptop, host, "/home/jupyter-3.%d/%s" % (there, OURS))


# -- what a new ssh says of an old sshd -------------------------------------------------------------------------------

OLD = "KexAlgorithms curve25519-sha256"
WARNING = "not using a post-quantum key exchange"


def check_that_ssh_warns(laptop: Laptop) -> None:
    """Skip where there is nothing to test: ssh itself says nothing of this."""
    argv = in_sid(laptop.directory, "ssh", "-F", laptop.config, "host", "true")
    run = subprocess.run(argv, cwd=laptop.home, env=laptop.environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    if WARNING not in run.stderr:
        pytest.skip("OpenSSH %s warns of no old key exchange" % sid_ssh_version())


def check_warned_once(run: Run) -> None:
    """The warning is shown once at most, whole, and is no part of another line."""
    warned = [line for line in run.text.splitlines() if re.search(r"post-quantum|store now|pq\.html", line)]
    assert len(warned) == len(set(warned)) <= 3, run.text
    assert not re.search(r"\(\*\*|why: .*\*\*|^ +\*\*", run.text, re.MULTILINE), run.text


@in_a_sid
@pytest.mark.parametrize("has_terminal", [True, False], ids=["terminal", "none"])
@BOTH_MODES
def test_old_key_exchange_is_warned_of_once(
    laptop: Laptop, make_host: Callable[..., Host], mark: str, mode: List[str], has_terminal: bool
) -> None:
    """Not at each login: neither by a tunnel that is dialled again, nor where each step logs in by itself."""
    put_laptop_into_sid(laptop, NEWEST)
    host = make_host(settings=OLD)
    check_that_ssh_warns(laptop)
    run = laptop.start(*mode, "--local-port", str(quiet_port()), "host", has_terminal=has_terminal)
    url = run.url()
    run.expect("To end it")
    for times in (1, 2):
        host.sshd.end_connections()
        run.expect("^Connected to host again", times=times)
    os.kill(ssh_of(mark), signal.SIGKILL)  # it says nothing of its end
    run.expect(r"is lost \(ssh ended without a message\)")
    run.expect("^Connected to host again", times=3)
    assert is_up(url)
    run.interrupt()
    assert run.wait() == 0
    check_warned_once(run)


@in_a_sid
def test_old_key_exchange_is_no_question_to_a_person(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, mark: str
) -> None:
    """There is an address in the warning, and the login is slow: as one that waits for someone to visit it."""
    put_laptop_into_sid(laptop, NEWEST)
    host = make_host(settings=OLD)
    check_that_ssh_warns(laptop)
    proxy = Proxy(host.sshd.port)
    try:
        run = laptop.start(*proxy.ssh_options(), "--local-port", str(quiet_port()), "host", has_terminal=False)
        run.url()
        run.expect("To end it")
        proxy.delay_s = 0.7
        proxy.cut()
        run.expect("^Connected to host again")
        run.interrupt()
        assert run.wait() == 0
    finally:
        proxy.close()
    check_warned_once(run)


@in_a_sid
def test_old_key_exchange_is_not_why_a_login_fails(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    put_laptop_into_sid(laptop, NEWEST)
    host = make_host(settings=OLD)
    check_that_ssh_warns(laptop)
    (host.sshd.directory / "user_key.pub").write_text("")
    run = laptop.run("host", "list")
    check_failure(run, 255, "Permission denied")
    check_warned_once(run)


@in_a_sid
def test_host_key_that_is_added_at_each_login_is_no_cause_either(
    laptop: Laptop, make_host: Callable[..., Host], mark: str
) -> None:
    """The other warning of ssh that comes with each login: of a host whose key is not kept."""
    put_laptop_into_sid(laptop, NEWEST)
    make_host()
    key = ["-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no"]
    run = laptop.start(*key, "--no-mux", "--local-port", str(quiet_port()), "host", has_terminal=False)
    run.url()
    run.expect("To end it")
    for times in (1, 2):
        os.kill(ssh_of(mark), signal.SIGKILL)
        run.expect("^Connected to host again", times=times)
    run.interrupt()
    assert run.wait() == 0
    assert "(Warning" not in run.text and run.text.count("Permanently added") <= 1, run.text


# -- what the README says that is tested ------------------------------------------------------------------------------

TO_NEWEST = r"3\.(\d+) to the newest in Debian sid"


@pytest.mark.parametrize("side", ["here", "on the host"])
def test_pythons_of_the_readme_are_those_that_the_file_takes_and_the_tests_run(side: str) -> None:
    """A newer one is run when sid has it, without a change here or there."""
    match = re.fullmatch(TO_NEWEST, readme_range("Python " + side))
    assert match
    oldest = int(match[1])
    source = SCRIPT.read_text()
    if side == "here":
        assert '# requires-python = ">=3.%d"\n' % oldest in source
        assert re.search(r"if sys.version_info < \(3, %d\):\n +sys.exit\(" % oldest, source)
        assert "needs Python 3.%d or newer and OpenSSH's `ssh` here" % oldest in " ".join(README.split())
    else:
        assert "sys.version_info < (3, %d) and sys.exit(99)" % oldest in source
        assert "the host needs Python 3.%d or newer" % oldest in source
        assert "`sshd` and Python 3.%d or newer on the host" % oldest in " ".join(README.split())
    missing = set(range(oldest, NEWEST + 1)) - set(interpreters()) - set(sid_pythons())
    if OBSTACLE or missing:
        pytest.skip(OBSTACLE or "not run, for there is none on this machine: Python 3.%s" % sorted(missing))


def test_ssh_of_the_readme_is_what_the_tests_run() -> None:
    match = re.fullmatch(r"(\d+\.\d+), and the newest in Debian sid", readme_range("OpenSSH, on either side"))
    assert match
    said = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    if OBSTACLE or "OpenSSH_%s" % match[1] not in said:
        pytest.skip(OBSTACLE or "this machine has another ssh: " + said)
    assert [int(word) for word in sid_ssh_version().split(".")] > [int(word) for word in match[1].split(".")]
