"""A private sshd on loopback, with keys and a home directory of its own: for the tests, the demo and the benchmarks.

Nothing of the user's is read or written: not ~/.ssh, not ~/.jupyter, not ~/.local. Works as root and as an ordinary
user (sshd then serves that user alone).
"""

import contextlib
import functools
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import List, Optional, Sequence


def find_sshd() -> str:
    """Return the path of sshd; it must be called by an absolute one."""
    unpacked = Path(__file__).resolve().parent.parent / ".sshd"
    path = shutil.which("sshd", path="%s:/usr/sbin:/usr/local/sbin:/sbin:%s" % (os.environ.get("PATH", ""), unpacked))
    if not path:
        raise RuntimeError("there is no sshd on this machine; tests/setup.sh installs it")
    return path


@functools.lru_cache(maxsize=None)
def fast_kex() -> str:
    """Return a line of sshd_config for a key exchange that takes no time.

    The one that OpenSSH 9 prefers (sntrup761) takes 70 ms of a core, three quarters of a login. Those with its
    successor (mlkem768) are fast with it, and warn of any other: they keep what they prefer.
    """
    known = subprocess.run(["ssh", "-Q", "kex"], capture_output=True, text=True).stdout
    return "" if "mlkem768" in known else "KexAlgorithms curve25519-sha256\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children(pid: int) -> List[int]:
    """Return the pids of the children of a process."""
    try:
        tasks = list(Path("/proc/%d/task" % pid).iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return []


class PrivateSshd:
    """An sshd below `directory`; logins get `environment`: PATH, and a HOME of their own when it is the user's.

    `prefix` is a command that starts sshd elsewhere, in the namespaces of another machine, at `address` and `port`; it
    must become sshd itself (exec), so that its pid is sshd's.
    """

    def __init__(
        self,
        directory: Path,
        path: str = "",
        host: str = "host",
        settings: str = "",
        address: str = "127.0.0.1",
        port: int = 0,
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.home = directory / "home"
        self.host = host
        self.settings = settings
        self.program = find_sshd()
        self.user = getpass.getuser()
        self.environment = {"HOME": str(self.home), "PATH": path}
        self.address = address
        self.port = port or free_port()
        self.prefix = list(prefix)
        self.config = directory / "ssh_config"
        self.log = directory / "sshd.log"
        self.process: Optional[subprocess.Popen[bytes]] = None
        self._connections: List[int] = []
        self.home.mkdir(parents=True, exist_ok=True)
        for name in ("host_key", "user_key"):
            if not (directory / name).exists():
                argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(directory / name)]
                subprocess.run(argv, check=True)
        self._write_client_files()

    def serve(self, user: str, home: Path) -> None:
        """Let another user log in, with what that user's account and start-up files say; as root only."""
        self.user = user
        self.home = home
        self.environment = {}
        self._write_client_files()

    def _write_client_files(self) -> None:
        key = (self.directory / "host_key.pub").read_text().split()
        name = self.address if self.port == 22 else "[%s]:%d" % (self.address, self.port)  # ssh looks for no other
        (self.directory / "known_hosts").write_text("%s %s %s\n" % (name, key[0], key[1]))
        self.config.write_text(
            "Host %s\n  HostName %s\n  Port %d\n  User %s\n  IdentityFile %s\n  IdentitiesOnly yes\n"
            "  UserKnownHostsFile %s\n  StrictHostKeyChecking yes\n"
            % (self.host, self.address, self.port, self.user, self._file("user_key"), self._file("known_hosts"))
        )

    def _file(self, name: str) -> str:
        return '"%s"' % (self.directory / name)

    def start(self) -> "PrivateSshd":
        """Start sshd and wait until it greets."""
        pairs = " ".join('"%s=%s"' % pair for pair in self.environment.items())
        config = self.directory / "sshd_config"
        config.write_text(
            "%s\nPort %d\nListenAddress %s\nHostKey %s\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\n"
            "PidFile none\nLogLevel VERBOSE\nPermitRootLogin yes\nPrintMotd no\nAcceptEnv LANG LC_*\nSetEnv %s\n"
            "%s%s"
            % (
                self.settings,
                self.port,
                self.address,
                self.directory / "host_key",
                self.directory / "user_key.pub",
                pairs,
                "" if "MaxStartups" in self.settings else "MaxStartups 100\n",  # of two, the last one would hold
                fast_kex(),
            )
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation needs it to exist
        argv = [*self.prefix, self.program, "-D", "-f", str(config), "-E", str(self.log)]
        # In a session of its own: a Ctrl-C on the terminal is for the client.
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 10
        while not self._greets():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("sshd did not start:\n" + self.log_text())
            time.sleep(0.01)
        return self

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.address, self.port), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def stop(self) -> None:
        """End sshd; the connections it serves go on, as with a real one."""
        if self.process is not None:
            self._connections = self.connection_pids()
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def connection_pids(self) -> List[int]:
        """Return the pids of the processes that serve the connections, also of those that sshd left behind."""
        return self._connections + (children(self.process.pid) if self.process else [])

    def end_connections(self, signum: int = signal.SIGKILL) -> None:
        """Kill what serves the connections, or send it another signal."""
        connections = self.connection_pids()
        for pid in [child for connection in connections for child in children(connection)] + connections:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                if b"sshd" in Path("/proc/%d/cmdline" % pid).read_bytes():
                    os.kill(pid, signum)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def attempts(self) -> int:
        """Return how many connections have come in."""
        return len(re.findall("Connection from ", self.log_text()))

    def logins(self) -> int:
        """Return how many logins sshd has accepted."""
        return len(re.findall(r"Accepted \S+ for ", self.log_text()))

    def ssh(self, command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command on the host by plain ssh."""
        argv = ["ssh", "-F", str(self.config), self.host, command]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
