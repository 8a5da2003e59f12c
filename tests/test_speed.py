"""What speed is made of, counted: logins, processes, round trips, sleeps, imports. No timing is asserted."""

import ast
import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from proxy import Proxy
from sides import SCRIPT, VENV_BIN, Host, Laptop, quiet_port, wait_until

# Those of `ssh HOST true` are not among them. An agent has three: stdin waits for sshd's word that there is room for
# it. The check through the tunnel has two: the connection, and the question. The rest is for two that cross.
TURNS_OF_OPEN = 7


def run_open(laptop: Laptop) -> None:
    """Open, and close the tunnel again; the server stays."""
    with laptop.opened("--local-port", str(quiet_port()), "host"):
        pass


# -- logins -----------------------------------------------------------------------------------------------------------


def test_one_login_each(laptop: Laptop, host: Host) -> None:
    for done, do in enumerate([run_open, run_open, run_list, run_stop]):
        assert host.sshd.logins() == done
        do(laptop)
    assert host.sshd.logins() == 4


def run_list(laptop: Laptop) -> None:
    assert laptop.run("host", "list").status == 0


def run_stop(laptop: Laptop) -> None:
    assert laptop.run("host", "stop").status == 0


# -- processes --------------------------------------------------------------------------------------------------------


def write_counter(directory: Path, program: str, counted: str) -> Path:
    """Put a program in `directory` that notes how it was called and becomes `counted`; return the notes."""
    directory.mkdir(exist_ok=True)
    notes = directory / (program + ".notes")
    notes.write_text("")
    script = directory / program
    script.write_text('#!/bin/sh\necho "$*" >>"%s"\nexec "%s" "$@"\n' % (notes, counted))
    script.chmod(0o755)
    return notes


def calls(notes: Path) -> List[str]:
    """Return how the program was called since we last looked."""
    lines = notes.read_text().splitlines()
    notes.write_text("")
    return lines


def test_processes(directory: Path, laptop: Laptop, make_host: Callable[..., Host]) -> None:
    ssh = subprocess.run(["which", "ssh"], capture_output=True, text=True, check=True).stdout.strip()
    of_ssh = write_counter(directory / "here", "ssh", ssh)
    of_python = write_counter(directory / "there", "python3", str(VENV_BIN / "python3"))
    laptop.environment["PATH"] = "%s:%s" % (directory / "here", laptop.environment["PATH"])
    make_host(path="%s:%s" % (directory / "there", VENV_BIN))
    steps = ["-G", "-M", "-S", "-F /dev/null -S"]  # its configuration, the master, the agent, the forward
    for do, count in ((run_open, 4), (run_open, 4), (run_list, 3), (run_stop, 3)):
        do(laptop)
        called = calls(of_ssh)
        assert len(called) == count
        assert all(words.startswith(step + " ") for words, step in zip(called, steps)), called
        assert len(calls(of_python)) == 1
    with laptop.opened("--local-port", str(quiet_port()), "host"):  # whose connection serves the others
        calls(of_ssh)
        run_list(laptop)
        assert [words.split(" ")[0] for words in calls(of_ssh)] == ["-G", "-S"]
        assert len(calls(of_python)) == 2


# -- round trips ------------------------------------------------------------------------------------------------------


class CountingProxy(Proxy):
    """Counts how often the word passes from the laptop to the host and back."""

    turns = 0
    _is_hosts_turn = False

    def _take(self, source: socket.socket) -> None:
        is_from_laptop = source.getsockname()[1] == self.port
        self.turns += self._is_hosts_turn and not is_from_laptop
        self._is_hosts_turn = is_from_laptop
        super()._take(source)


@pytest.fixture
def proxy(host: Host) -> Iterator[CountingProxy]:
    with contextlib.closing(CountingProxy(host.sshd.port, delay_s=0.05)) as proxy:
        yield proxy


def test_round_trips(laptop: Laptop, host: Host, proxy: CountingProxy) -> None:
    through = [*proxy.ssh_options(), "-o", "ServerAliveInterval=600"]  # Jupyter may take its time
    argv = ["ssh", "-F", str(host.sshd.config), *through, "host", "true"]
    subprocess.run(argv, env=laptop.environment, check=True, stdin=subprocess.DEVNULL)
    least = proxy.turns
    assert least > 3
    for _ in ("cold", "again"):
        before = proxy.turns
        run = laptop.start(*through, "--local-port", str(quiet_port()), "host", has_terminal=False)
        run.url()
        turns = proxy.turns - before - least
        assert turns <= TURNS_OF_OPEN
        run.interrupt()
        assert run.wait() == 0


def test_a_session_follows_each_login(laptop: Laptop, host: Host, mark: str) -> None:
    """Before its first session, sshd holds small packets back, and each answer through the tunnel is 40 ms late."""
    run = laptop.start("--local-port", str(quiet_port()), "host", has_terminal=False)
    run.expect("To end it")
    host.sshd.end_connections(signal.SIGKILL)
    run.expect("Connected to host again")
    wait_until(lambda: "Starting session" in host.sshd.log_text().split("Accepted ")[-1], "a session")
    assert host.sshd.logins() == 2


# -- the source -------------------------------------------------------------------------------------------------------


def sleeps() -> Iterator[str]:
    """Yield each sleep of rjupyter.py as "function: argument"."""
    for function in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "sleep":
                    yield "%s: %s" % (function.name, ast.unparse(call.args[0]))


def test_no_fixed_sleeps() -> None:
    """What sleeps looks every POLL_S, or with pauses that grow from there, or is named here."""
    named = {"follow_log: 0.2", "job_main: FOLLOW_MAX_S"}
    assert {sleep for sleep in sleeps() if not sleep.endswith((": POLL_S", ": pause_s"))} <= named


HEAVY = {
    "argparse",
    "asyncio",
    "configparser",
    "ctypes",
    "email",
    "hashlib",
    "http",
    "inspect",
    "logging",
    "multiprocessing",
}
HEAVY |= {"random", "shutil", "ssl", "tempfile", "urllib.request", "webbrowser", "zipfile"}


def test_nothing_heavy_is_imported() -> None:
    argv = [sys.executable, "-IS", "-X", "importtime", str(SCRIPT), "--version"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "threading" in imported
    assert not imported & HEAVY, imported & HEAVY


DIALLING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import rjupyter
def dial(*_):
    print(*sys.modules, flush=True)
    os._exit(0)
rjupyter.Ssh.dial = dial
rjupyter.main(sys.argv[2:])
"""


def test_before_the_dial_nothing_is_imported_that_starting_ssh_does_not_need(laptop: Laptop, host: Host) -> None:
    argv = [sys.executable, "-IS", "-c", DIALLING, str(SCRIPT.parent), "-F", laptop.config, "host", "list"]
    run = subprocess.run(argv, env=laptop.environment, capture_output=True, text=True, check=True)
    imported = set(run.stdout.split())
    assert "subprocess" in imported
    assert not imported & {*HEAVY, "binascii", "json", "shlex", "socket", "struct", "urllib", "zlib"}
