"""The two sides of a test: a laptop with rjupyter.py on it, and a host; their users, and what runs on either."""

import contextlib
import json
import os
import pty
import pwd
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import pytest
from private_sshd import PrivateSshd

TOP = Path(__file__).resolve().parent.parent
SCRIPT = TOP / "rjupyter.py"
# The program as a test starts it most often: with its bytecode, as `make install` has it, which takes a quarter of the
# time. `ps` shows the same words after "-c" as for the file.
MODULE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
del sys.argv[0]
sys.path[0] = %r
import rjupyter
rjupyter.command()
""" % str(TOP)
VENV_BIN = Path(sys.executable).parent  # the environment that tests/setup.sh made: the host's Jupyter is in it
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
DEADLINE_S = float(os.environ.get("RJ_DEADLINE", "90"))
MARK = "RJUPYTER_TEST"
ON_HOST = "RJUPYTER_SIDE=host"
LOOKS = r"\x1b\[[0-9;]*m|\x1b\]8;;[^\x1b]*\x1b\\"  # colours and the like, and what makes a link of a word
BOTH_MODES = pytest.mark.parametrize("mode", [[], ["--no-mux"]], ids=["mux", "no-mux"])

for ignored in (signal.SIGHUP, signal.SIGINT):  # as under nohup, or in the background of a script; children inherit it
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S, pause_s: float = 0.02) -> Any:
    """Poll until `condition` gives something true, and return it; fail after `timeout_s`.

    What costs a command each time, and may take long, is asked with a longer pause."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "not within %d s: %s" % (timeout_s, what)
        time.sleep(pause_s)


def processes_with(mark: str, without: str = "\0") -> Dict[int, str]:
    """Return the processes whose environment holds `mark`, and not `without`, with their command lines."""
    found: Dict[int, str] = {}
    words, unwanted = mark.encode(), without.encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:  # plainly: each test looks several times at all that the others have started
            environ = os.open("/proc/%s/environ" % name, os.O_RDONLY)
            try:
                environment = os.read(environ, 1 << 20)
            finally:
                os.close(environ)
        except OSError:
            continue
        if words in environment and (without == "\0" or unwanted not in environment):
            with contextlib.suppress(OSError):
                directory = Path("/proc", name)
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(name)] = command.decode(errors="replace").strip()
    return found


def left_of(mark: str, timeout_s: float, without: str = "\0") -> Dict[int, str]:
    """Return what `processes_with` finds after so long; nothing as soon as all of them have ended.

    Meanwhile those are looked for by their pids: to look at all that the tests have started takes milliseconds.
    """
    deadline = time.monotonic() + timeout_s
    seen = processes_with(mark, without)
    while seen and time.monotonic() < deadline:
        time.sleep(0.02)
        if not any(is_running(pid) for pid in seen):
            seen = processes_with(mark, without)
    return seen and processes_with(mark, without)


def wait_until_gone(mark: str, what: str, timeout_s: float = DEADLINE_S, without: str = "\0") -> None:
    """Wait until `processes_with` finds nothing."""
    left = left_of(mark, timeout_s, without)
    assert not left, "not within %d s: %s; there is %s" % (timeout_s, what, left)


def is_running(pid: int) -> bool:
    """True for a process that has not ended; one that nobody has asked for its status has."""
    try:
        with open("/proc/%d/stat" % pid, errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def process_of(kernel: str) -> int:
    """Return the process of a kernel, once it is there."""

    def found() -> List[int]:
        pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        return [pid for pid in pids if "kernel-%s.json" % kernel in command_of(pid)]

    return int(wait_until(found, "the kernel's process")[0])


def command_of(pid: int) -> str:
    try:
        with open("/proc/%d/cmdline" % pid, errors="replace") as stream:  # another test's may be Latin-1
            return stream.read()
    except OSError:
        return ""


def nicer(by: int) -> int:
    """Return the nice value that `nice -n` gives here: the tests themselves may run under nice."""
    return min(os.nice(0) + by, 19)


def quiet_port() -> int:
    """Return a free port that no other test takes meanwhile: not near 8889, and not one that the kernel deals."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def without_port(url: str) -> str:
    """Return an address without its local port, which another test may have taken meanwhile."""
    return re.sub(r":\d+/", "/", url, count=1)


def words_of(command: str) -> List[str]:
    """Return what a printed command of ours has behind the program, as a shell would have it."""
    words = shlex.split(command, comments=True)
    return words[words.index(str(SCRIPT)) + 1 :]


class Run:
    """A running rjupyter.py: `text` is what it printed so far, both streams as they came when it has a terminal."""

    def __init__(self, argv: List[str], environment: Dict[str, str], has_terminal: bool, cwd: str) -> None:
        self._printed: Dict[str, List[str]] = {name: [""] for name in ("raw", "text", "stdout", "stderr")}
        self.status: Optional[int] = None
        self._fds: Dict[int, str] = {}
        if has_terminal:
            self.pid, self.terminal = pty.fork()
            if not self.pid:
                os.chdir(cwd)
                os.execvpe(argv[0], argv, environment)
            self._fds[self.terminal] = "stdout"
        else:
            self.process = subprocess.Popen(
                argv,
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self.pid = self.process.pid
            assert self.process.stdout is not None and self.process.stderr is not None
            self._fds = {self.process.stdout.fileno(): "stdout", self.process.stderr.fileno(): "stderr"}

    def _so_far(self, name: str) -> str:
        """Join what came when it is asked for: it may be 64 MB in a thousand pieces. Looks and links are taken out."""
        pieces = self._printed[name]
        if len(pieces) > 1:
            pieces[:] = ["".join(pieces) if name == "raw" else re.sub(LOOKS, "", "".join(pieces))]
        return pieces[0]

    @property
    def raw(self) -> str:
        """Return all that it printed as a terminal gets it."""
        return self._so_far("raw")

    @property
    def text(self) -> str:
        return self._so_far("text")

    @property
    def stdout(self) -> str:
        return self._so_far("stdout")

    @property
    def stderr(self) -> str:
        return self._so_far("stderr")

    def _read(self, timeout_s: float) -> None:
        ready = select.select(list(self._fds), [], [], timeout_s)[0] if self._fds else []
        for fd in ready:
            try:
                data = os.read(fd, 65536)
            except OSError:  # the terminal of a program that ended
                data = b""
            if not data:
                del self._fds[fd]
            words = data.decode(errors="replace").replace("\r\n", "\n")
            self._printed["raw"].append(words)
            self._printed["text"].append(words)
            self._printed[self._fds.get(fd, "stdout")].append(words)

    def expect(self, pattern: str, timeout_s: float = DEADLINE_S, times: int = 1) -> "re.Match[str]":
        """Wait until the output matches, so many times, and return the last of these matches."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.text.replace("\r\x1b[K", "\n")  # each line stands for itself, also after a spinner
            matches = list(re.finditer(pattern, shown, re.MULTILINE))
            if len(matches) >= times:
                return matches[times - 1]
            assert self._fds and time.monotonic() < deadline, "no %r in:\n%s" % (pattern, self.text)
            self._read(0.2)

    def url(self) -> str:
        return self.expect(r"^https?://127\.0\.0\.1:\d+/\S*$").group()

    def type(self, text: str) -> None:
        """Type on the terminal."""
        os.write(self.terminal, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C: on the terminal where there is one, else as the signal."""
        if hasattr(self, "terminal"):
            self.type("\x03")
        else:
            os.killpg(self.pid, signal.SIGINT)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for the end and return the exit status, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while self.status is None:
            self._read(0.02)
            if not self._fds:
                time.sleep(0.002)  # it has closed its outputs, and is about to end
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                if hasattr(self, "process"):
                    self.process.returncode = self.status
                break
            assert time.monotonic() < deadline, "still running:\n" + self.text
        while self._fds and select.select(list(self._fds), [], [], 0)[0]:
            self._read(0)
        assert "Traceback" not in self.text, self.text
        return self.status

    def close(self) -> None:
        """Kill what still runs, and close our end."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if hasattr(self, "terminal"):
            os.close(self.terminal)


class Laptop:
    """The near side: a home and a runtime directory of its own, and rjupyter.py in it."""

    def __init__(self, directory: Path, mark: str) -> None:
        self.directory = directory
        self.home = directory / "laptop"
        self.runtime = directory / "run"
        self.home.mkdir()
        self.runtime.mkdir(mode=0o700)
        self.runs: List[Run] = []
        self.config = ""
        self.python = sys.executable
        self.is_copied = False  # start the file by its path, as people do who copied it
        self.installed = ""  # the launcher that `make install` made, where that is to be used
        self.environment = {
            "HOME": str(self.home),
            "PATH": SYSTEM_PATH,
            "XDG_RUNTIME_DIR": str(self.runtime),
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "RJUPYTER_TMP": str(directory),
            "TMPDIR": str(directory),
            MARK: mark,
        }

    def start(self, *arguments: str, has_terminal: bool = True, **environment: str) -> Run:
        """Start rjupyter.py with the ssh_config of the host at hand."""
        module = [] if self.is_copied or self.python != sys.executable else ["-c", MODULE]
        program = [self.installed] if self.installed else [self.python, *module, str(SCRIPT)]
        argv = program + (["-F", self.config] if self.config else []) + list(arguments)
        run = Run(argv, dict(self.environment, **environment), has_terminal, str(self.home))
        self.runs.append(run)
        return run

    @contextlib.contextmanager
    def opened(self, *arguments: str, has_terminal: bool = False, **environment: str) -> Iterator[Run]:
        """Open, for a block that gets the run; then Ctrl-C closes the tunnel, with status 0."""
        run = self.start(*arguments, has_terminal=has_terminal, **environment)
        run.url()
        if "-q" not in arguments:
            run.expect(r"Ctrl-C closes the tunnel.*\n")  # all of the line, or a terminal's ^C would stand in it
        yield run
        run.interrupt()
        assert run.wait() == 0, run.text

    def end_runs(self) -> None:
        """Ctrl-C for what still runs."""
        for run in self.runs:
            if run.status is None:
                run.interrupt()
                run.wait(20)

    def run(self, *arguments: str, has_terminal: bool = False, **environment: str) -> Run:
        """Run rjupyter.py to its end."""
        run = self.start(*arguments, has_terminal=has_terminal, **environment)
        run.wait()
        return run


class Host:
    """The far side: a private sshd, and what our agent keeps in its home."""

    def __init__(self, sshd: PrivateSshd) -> None:
        self.sshd = sshd
        self.home = sshd.home

    def servers(self) -> List[Dict[str, Any]]:
        """Return the records of the servers that rjupyter.py launched, with their ids, but for those it stopped."""
        files = sorted(self.home.glob(".local/state/rjupyter/servers/*/server.json"))
        files = [file for file in files if not (file.parent / "stop").exists()]
        records = [(json.loads(file.read_text()), file.parent.name) for file in files]
        # Tests put files there that make no sense; killpg of what such a file calls a pid would be a disaster.
        return [dict(r, id=name) for r, name in records if isinstance(r, dict) and type(r.get("identity")) is str]

    def runs(self) -> List[Dict[str, Any]]:
        """Return the records of the notebooks that rjupyter.py executes."""
        return [json.loads(file.read_text()) for file in self.home.glob(".local/state/rjupyter/runs/*/run.json")]

    def end_servers(self) -> None:
        """Kill what was meant to outlive the client: the sessions that the servers and the runs lead.

        Not those on the nodes of a cluster, which end with it, nor those in a wrapper, which do with that: a pid of
        theirs is another process here.
        """
        wrappers = [json.loads(file.read_text()) for file in self.home.glob(".local/state/rjupyter/wrappers/*/*r.json")]
        for record in wrappers + [record for record in self.servers() + self.runs() if not record.get("wrapper")]:
            if record.get("node") not in (None, os.uname().nodename) or record["pid"] < 2:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(record["pid"], signal.SIGKILL)


class User:
    """A user of this machine that a test made, with a home below the test's directory."""

    def __init__(self, home: Path, shell: str) -> None:
        self.name = home.name
        self.home = home
        argv = ["useradd", "--no-create-home", "--home-dir", str(home), "--shell", shell, "--password", "*", self.name]
        subprocess.run(argv, check=True, capture_output=True)
        self.uid = pwd.getpwnam(self.name).pw_uid
        home.mkdir(mode=0o755)
        os.chown(home, self.uid, -1)

    def write(self, path: str, text: str) -> None:
        """Write a file of the user's, below home."""
        file = self.home / path
        for parent in reversed(file.relative_to(self.home).parents):
            (self.home / parent).mkdir(exist_ok=True)
            os.chown(self.home / parent, self.uid, -1)
        file.write_text(text)
        os.chown(file, self.uid, -1)

    def remove(self) -> None:
        subprocess.run(["userdel", "--force", self.name], check=True, capture_output=True)
        shutil.rmtree("/tmp/rjupyter-%d" % self.uid, ignore_errors=True)


class Shared(NamedTuple):
    """A laptop and a host that the tests of a file have in common, those that are marked `shared`."""

    mark: str
    laptop: Laptop
    host: Host


def ssh_of(mark: str) -> int:
    """Return the pid of the ssh that holds the tunnel."""
    found = [pid for pid, words in processes_with(mark, without=ON_HOST).items() if re.match(r"ssh -(M -)?N ", words)]
    assert len(found) == 1, found
    return found[0]


def bare_python(directory: Path) -> str:
    """Make a directory with a python3 that has no Jupyter, and return it for a PATH."""
    base = getattr(sys, "_base_executable", sys.executable)
    directory.mkdir()
    (directory / "python3").symlink_to(os.path.realpath(base))
    return str(directory)
