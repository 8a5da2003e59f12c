"""Machines that are namespaces of this one, on a network of their own: what a private cluster is made of.

                          198.18.x.1         .2  head    the scheduler's daemon
    the host's sshd --- bridge of the rig -- .3  node1   jobs run here
    (the login node)                         .4  node2   the same

Each has a host name, an address, a loopback and process ids of its own, so that what works by accident on one machine
fails here as it would on a cluster: 127.0.0.1 of a node is not that of the login node, and a pid means nothing
elsewhere. The files are shared, as a cluster's home directories are. The names resolve on all of them, and on a login
node whose sshd is started through `login_prefix`; the laptop knows none of them. Root alone can make them.

Everything of a machine ends with the first process of its pid namespace, jobs and what they left behind included: no
cluster leaks, even one that is killed with the test that it was for (of that one, an empty network bridge remains).
"""

import contextlib
import fcntl
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence

from jupyters import CACHE
from private_sshd import children
from sides import TOP

DEADLINE_S = 90.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The first process of a machine: it says that the machine is up, and takes in what nobody waits for.
# Process ids start where those of the other machines do not reach, if the kernel allows (Linux 6.14, or a large
# pid_max): a pid that is used on the wrong machine is then nobody's.
INIT = """
mount --bind "$3" /etc/hosts
hostname "$1"
{ echo "$2" >/proc/sys/kernel/ns_last_pid; } 2>/dev/null
sleep infinity &
echo up
exec >&-
while :; do wait; done
"""


def why_not_unshared(*words: str) -> str:
    """Run unshare(1) with these words; return why it failed, or ""."""
    run = subprocess.run(["unshare", *words], env={"PATH": PATH}, capture_output=True, text=True)
    return run.stderr.strip() or "status %d" % run.returncode if run.returncode else ""


def find_namespaces_obstacle() -> str:
    """Return why a host cannot have namespaces of its own here (a container, a chroot), or ""."""
    if os.getuid() != 0:
        return "only root can put sshd into namespaces of its own"
    if not shutil.which("unshare", path=PATH):
        return "namespaces for sshd need unshare"
    why = why_not_unshared("--mount", "--uts", "--pid", "--fork", "--mount-proc", "true")
    return why and "no namespaces for sshd here: " + why


def find_obstacle(programs: Sequence[str]) -> str:
    """Return why there can be no machines with these programs here, or ""."""
    if os.getuid() != 0:
        return "only root can make the machines of a private cluster"
    missing = [name for name in (*programs, "ip", "unshare", "nsenter") if not shutil.which(name, path=PATH)]
    if missing:
        return "a private cluster needs %s; tests/setup.sh installs them" % ", ".join(missing)
    link = ["ip", "link", "add", "type", "veth"]
    why = why_not_unshared("--net", "--uts", "--pid", "--fork", "--mount-proc", *link)
    return why and "no namespaces with a network for a cluster here: " + why


def wait_for(condition: Callable[[], bool], what: str, process: "Optional[subprocess.Popen[bytes]]" = None) -> None:
    """Poll until `condition` holds, as long as `process` runs."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise RuntimeError("not within %d s, or ended: %s" % (DEADLINE_S, what))
        time.sleep(0.005)


@contextlib.contextmanager
def network_lock(kind: int) -> Iterator[None]:
    """Hold the lock of this machine's addresses: LOCK_EX for who changes them, LOCK_SH for who cannot bear that.

    When one comes or goes, Chromium fails what it is loading just then (ERR_NETWORK_CHANGED).
    """
    CACHE.mkdir(mode=0o755, exist_ok=True)
    with (CACHE / "network.lock").open("w") as lock:
        fcntl.flock(lock, kind)
        yield


def change_links(lines: str, may_fail: bool = False) -> None:
    """Carry out lines of ip(8); those that `may_fail` do so by themselves, and the others go on."""
    argv = ["ip", *["-force"] * may_fail, "-batch", "-"]
    subprocess.run(argv, env={"PATH": PATH}, input=lines.encode(), capture_output=may_fail, check=not may_fail)


class Machine:
    """Namespaces with a host name, an address, a loopback and process ids of their own, kept by a process."""

    def __init__(self, name: str, address: str, first_pid: int, hosts: Path) -> None:
        self.name = name
        self.address = address
        argv = ["setpriv", "--pdeathsig", "KILL"]  # with us, even if we are killed
        argv += ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
        argv += ["sh", "-c", INIT, "sh", name, str(first_pid), str(hosts)]
        self.process = subprocess.Popen(
            argv,
            env={"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            if stdout.readline() != b"up\n":
                raise RuntimeError("cannot make the machine %s" % name)
        self.pid = children(self.process.pid)[0]

    def enter(self, *options: str) -> List[str]:
        """Return the start of a command that is to run there, with its root: in a chroot, ours leads out of it."""
        namespaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), "--root", "--wd", *namespaces, *options]

    def run(self, *argv: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command there, with `given` as its input; raises RuntimeError, with its words, where it fails."""
        run = subprocess.run(
            [*self.enter(), *argv],
            env={"PATH": PATH},
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        if run.returncode:
            text = "%s ended with %d: %s%s" % (shlex.join(argv), run.returncode, run.stdout, run.stderr)
            raise RuntimeError(text)
        return run

    def kill(self) -> None:
        """End it with every process on it, at once: the kernel waits for all before it lets go of the first."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait(10)


def give_own_tmp(machine: Machine, shared: Path) -> None:
    """Give a machine a /tmp of its own, beside `shared` as tmp.NAME; what is shared of the old one is seen in it.

    So is this checkout with its environment, should it lie there.
    """
    own = shared / ("tmp." + machine.name)
    own.mkdir()
    own.chmod(0o1777)
    for part in {path.relative_to("/tmp").parts[0] for path in (shared, TOP) if path.is_relative_to("/tmp")}:
        (own / part).mkdir()
        machine.run("mount", "--bind", "/tmp/" + part, str(own / part))
    machine.run("mount", "--rbind", str(own), "/tmp")


class Cluster:
    """Machines with these names, below `directory`; `environment()` is what their daemons and a login node have."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.names = names
        self.machines: Dict[str, Machine] = {}
        self.bridge = ""
        self.login_address = ""
        self.addresses: Dict[str, str] = {}
        self._daemons: List[subprocess.Popen[bytes]] = []
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)  # other users have to reach what the daemons keep there

    @property
    def nodes(self) -> Dict[str, str]:
        """The names of the compute nodes, with their addresses."""
        return {name: address for name, address in self.addresses.items() if name.startswith("node")}

    def environment(self) -> Dict[str, str]:
        """Return what a login on the login node has to have."""
        return {}

    @property
    def login_prefix(self) -> List[str]:
        """A command that starts the login node's sshd such that the nodes' names resolve in its logins."""
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, str(self.directory / "hosts")]

    def start_machines(self) -> None:
        """Start the machines, and connect them with each other and with the login node."""
        with network_lock(fcntl.LOCK_EX):
            self._add_bridge()
        names = "".join("%s %s\n" % (address, name) for name, address in self.addresses.items())
        hosts = Path("/etc/hosts").read_text().rstrip("\n")
        (self.directory / "hosts").write_text("%s\n%s login\n%s" % (hosts, self.login_address, names))
        for number, (name, address) in enumerate(self.addresses.items(), 1):
            self.machines[name] = Machine(name, address, number * 1000000, self.directory / "hosts")
        self._connect_machines()

    def stop(self) -> None:
        """End everything, and return when it is gone."""
        # The links first: those of a machine that ended go later, when the kernel finds time.
        names = [self._port(name) for name in self.machines] + [self.bridge]
        lines = "".join("link delete %s\n" % name for name in names if name)
        with network_lock(fcntl.LOCK_EX):
            change_links(lines, may_fail=True)
        for machine in self.machines.values():
            machine.kill()
        for daemon in self._daemons:
            daemon.wait(10)

    def _add_bridge(self) -> None:
        """Take a network of eight addresses that no other cluster has: the bridge's name says whose it is."""
        for _ in range(100):
            number = random.randrange(2**14)  # of 198.18.0.0/15, which is set aside for tests of networks
            start = number * 8
            net = "198.%d.%d.%%d" % (18 + (start >> 16), start >> 8 & 255)
            bridge = "rj%d" % number
            argv = ["ip", "link", "add", bridge, "type", "bridge"]
            if not subprocess.run(argv, env={"PATH": PATH}, capture_output=True).returncode:
                break
        else:
            raise RuntimeError("cannot add a network bridge")
        self.bridge = bridge
        self.login_address, *others = [net % ((start & 255) + offset) for offset in range(1, 2 + len(self.names))]
        self.addresses = dict(zip(self.names, others))
        self._take_no_address(bridge)
        change_links("addr add %s/29 dev %s\nlink set %s up\n" % (self.login_address, bridge, bridge))

    def _connect_machines(self) -> None:
        ports = {self._port(machine.name): machine for machine in self.machines.values()}
        links = ["link add %s type veth peer name eth0 netns %d\n" % (port, ports[port].pid) for port in ports]
        joins = ["link set %s master %s up\n" % (port, self.bridge) for port in ports]
        with network_lock(fcntl.LOCK_EX):
            change_links("".join(links))
            self._take_no_address(*ports)
            change_links("".join(joins))
        for machine in self.machines.values():
            lines = "link set lo up\naddr add %s/29 dev eth0\nlink set eth0 up\n" % machine.address
            machine.run("ip", "-batch", "-", given=lines)

    def _take_no_address(self, *links: str) -> None:
        """Give links none by themselves, a moment after they are up and with a machine's end, where there is IPv6."""
        change_links("".join("link set %s addrgenmode none\n" % link for link in links), may_fail=True)

    def _port(self, machine: str) -> str:
        """Return the name of the link that leads to a machine."""
        return self.bridge + machine[0] + machine[-1]

    def spawn(self, machine: str, *argv: str) -> "subprocess.Popen[bytes]":
        """Start a daemon on a machine: without the mark of a test, so that it is nobody's leak."""
        environment = {"PATH": PATH, **self.environment()}
        with (self.directory / ("%s.err" % Path(argv[0]).name)).open("ab") as log:
            daemon = subprocess.Popen(
                [*self.machines[machine].enter(), *argv],
                env=environment,
                cwd=str(self.directory),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def listens(self, machine: str, port: int) -> bool:
        """True when a machine takes connections at a port."""
        try:
            with socket.create_connection((self.addresses[machine], port), timeout=1):
                return True
        except OSError:
            return False

    def log_text(self) -> str:
        """Return what the daemons said."""
        files = sorted(self.directory.glob("*.log")) + sorted(self.directory.glob("*.err"))
        return "".join("%s:\n%s\n" % (file.name, file.read_text(errors="replace")) for file in files)
