"""What the rows are measured on: a laptop and a host on this machine, and the ways from one to the other."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Iterator, List, NamedTuple

from jupyters import environment, jupyter_as_installed
from private_sshd import PrivateSshd
from sides import MARK, SYSTEM_PATH, TOP, VENV_BIN, Host, Laptop, Run, processes_with, quiet_port, wait_until

from rjupyter import http_request

STAND_IN = Path(__file__).with_name("stand_in.py")
LOOK_EVERY_S = 0.005
ANSWER_TIMEOUT_S = 60.0


class Opened(NamedTuple):
    """A Jupyter that answered on the laptop: after how long, on which port there, and the process that holds it."""

    seconds: float
    port: int
    run: Run


class Rig:
    """A laptop and a host, and each way to a Jupyter there. `port` is where ssh goes: sshd's own port, or a proxy's."""

    def __init__(self, directory: Path) -> None:
        self.mark = uuid.uuid4().hex
        base = directory / "host"
        base.mkdir()
        self.bin = base / "bin"  # before all else on the host's PATH
        self.jupyter = jupyter_as_installed()
        self.sshd = PrivateSshd(base, "%s:%s:%s" % (self.bin, self.jupyter, SYSTEM_PATH))
        self.sshd.environment.update({MARK: self.mark, "RJUPYTER_SIDE": "host", "RJUPYTER_TMP": str(base)})
        self.host = Host(self.sshd)
        self.laptop = Laptop(directory, self.mark)
        self.laptop.config = str(self.sshd.config)
        self.laptop.environment["PATH"] = "%s:%s" % (VENV_BIN, SYSTEM_PATH)  # rjupyter takes the same Python
        self.laptop.installed = str(install(directory / "prefix"))
        self._write_home()
        self.sshd.start()
        self.port = self.sshd.port

    def _write_home(self) -> None:
        """Let everyone find and run the same Jupyter: root too, and from a login shell.

        `activate` does nothing: jupyter-forward (2025.1) ends unless it is told of a conda environment to activate.
        """
        home = self.sshd.home
        (home / ".jupyter").mkdir()
        (home / ".jupyter/jupyter_server_config.py").write_text("c.ServerApp.allow_root = True\n")
        self.bin.mkdir()
        (self.bin / "activate").write_text("")
        (home / ".bash_profile").write_text("PATH=%s:%s:%s\n" % (self.bin, self.jupyter, SYSTEM_PATH))

    # -- plain ssh ----------------------------------------------------------------------------------------------------

    def options(self, port: int) -> List[str]:
        """Return ssh's options that lead through `port`."""
        return ["-p", str(port), "-o", "HostKeyAlias=[127.0.0.1]:%d" % self.sshd.port]

    def ssh_argv(self, port: int, *words: str) -> List[str]:
        return ["ssh", "-F", str(self.sshd.config), *self.options(port), *words]

    def ssh(self, port: int, command: str) -> float:
        """Run a command by plain ssh; return the seconds that it took."""
        return self.time(self.ssh_argv(port, "host", command))

    def time(self, argv: List[str]) -> float:
        """Run a command on the laptop to its end; return the seconds that it took."""
        began = time.monotonic()
        subprocess.run(argv, env=self.laptop.environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        return time.monotonic() - began

    # -- ways to a Jupyter --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def open_ours(self, port: int, *arguments: str) -> Iterator[Opened]:
        """Open with rjupyter; it prints the address when it has heard the first answer itself."""
        began = time.monotonic()
        local = quiet_port()
        words = [*self.options(port), "--local-port", str(local), *arguments]
        run = self.laptop.start(*words, "host", has_terminal=False)
        self.laptop.runs.remove(run)
        try:
            run.url()
            seconds = time.monotonic() - began
            first_answer(local, began)
            yield Opened(seconds, local, run)
            run.interrupt()
            run.wait(20)
        finally:
            run.close()

    @contextlib.contextmanager
    def open_by_hand(self, port: int) -> Iterator[Opened]:
        """Open as guides say, without a person's pauses: Jupyter by ssh, its address read, then `ssh -N -L`."""
        began = time.monotonic()
        local = quiet_port()
        command = "jupyter notebook --no-browser --port=%d" % quiet_port()
        with self._started(self.ssh_argv(port, "host", command)) as server:
            remote = server.expect(r"http://127\.0\.0\.1:(\d+)/tree\?token=").group(1)
            with self._started(self.ssh_argv(port, "-N", "-L", "%d:127.0.0.1:%s" % (local, remote), "host")) as tunnel:
                yield Opened(first_answer(local, began), local, tunnel)

    @contextlib.contextmanager
    def open_by_jupyter_forward(self, port: int) -> Iterator[Opened]:
        """Open with jupyter-forward. Its run says "Jupyter Lab URL" when it opens the browser, which here is `true`."""
        program = str(
            environment("jupyter-forward", os.path.realpath(sys.executable), ["jupyter-forward"]) / "jupyter-forward"
        )
        (self.laptop.home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        config = self.sshd.config.read_text().replace("Port %d" % self.sshd.port, "Port %d" % port)
        (self.laptop.home / ".ssh/config").write_text(config)
        began = time.monotonic()
        local = quiet_port()
        with self._started([program, "--port", str(local), "--conda-env", "base", "host"], BROWSER="true") as run:
            run.expect("Setting up port forwarding")
            yield Opened(first_answer(local, began), local, run)

    @contextlib.contextmanager
    def open_here(self) -> Iterator[Opened]:
        """Start Jupyter where it runs, without any ssh: the floor."""
        began = time.monotonic()
        port = quiet_port()
        argv = [str(self.jupyter / "jupyter-notebook"), "--no-browser", "--port=%d" % port]
        with self._started(argv, **self.sshd.environment) as run:
            yield Opened(first_answer(port, began), port, run)

    @contextlib.contextmanager
    def instant_jupyter(self) -> Iterator[None]:
        """Put a Jupyter on the host that answers as soon as it is started."""
        names = [self.bin / "jupyter", self.bin / "jupyter-notebook"]
        for name in names:
            name.write_text('#!/bin/sh\nexec "%s" "%s" jupyter "$@"\n' % (sys.executable, STAND_IN))
            name.chmod(0o755)
        try:
            yield
        finally:
            for name in names:
                name.unlink()

    @contextlib.contextmanager
    def _started(self, argv: List[str], **more: str) -> Iterator[Run]:
        run = Run(argv, dict(self.laptop.environment, **more), False, str(self.laptop.home))
        try:
            yield run
        finally:
            run.close()

    @contextlib.contextmanager
    def plain_tunnel(self, remote_port: int) -> Iterator[int]:
        """Hold a plain `ssh -N -L` to a port of the host; yields the local port."""
        local = quiet_port()
        with self._started(self.ssh_argv(self.port, "-N", "-L", "%d:127.0.0.1:%d" % (local, remote_port), "host")):
            first_answer(local, time.monotonic())
            yield local

    def end_servers(self) -> None:
        """End what runs on the host and take away what it left, so that the next one starts cold and alone."""
        for pid in self._jupyters():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._jupyters(), "the servers end", 10)
        for left in (".local/state/rjupyter", ".local/share/jupyter/runtime", ".jupyter_forward"):
            shutil.rmtree(self.sshd.home / left, ignore_errors=True)

    def _jupyters(self) -> List[int]:
        found = processes_with(self.mark).items()
        return [pid for pid, words in found if re.match(r"\S*python\S* \S*/(jupyter|stand_in)", words)]

    def close(self) -> None:
        """End everything that was started here."""
        self.sshd.stop()
        self.sshd.end_connections()
        for pid in processes_with(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_with(self.mark), "everything has ended", 10)


def install(prefix: Path) -> Path:
    """Install as the README says, and return the program."""
    argv = ["make", "-C", str(TOP), "install", "PREFIX=%s" % prefix]
    subprocess.run(argv, check=True, capture_output=True)
    return prefix / "bin/rjupyter"


def first_answer(port: int, began: float) -> float:
    """Ask on a local port until a Jupyter answers there; return the seconds since `began`."""
    while not is_answering(port):
        if time.monotonic() > began + ANSWER_TIMEOUT_S:
            raise TimeoutError("no answer on port %d" % port)
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - began


def is_answering(port: int) -> bool:
    """True when a Jupyter answers: /api needs no token."""
    try:
        return http_request(("127.0.0.1", port), "/api", "", ANSWER_TIMEOUT_S)[0] == 200
    except OSError:
        return False
