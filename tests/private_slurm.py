"""A private Slurm: munged, slurmctld and two slurmd, on three machines that are namespaces of this one. Root alone can.

                          198.18.x.1         .2  head    munged, slurmctld
    the host's sshd --- bridge of the rig -- .3  node1   slurmd, jobs, an sshd that start_sshd() starts
    (the login node)                         .4  node2   the same

Each of the three has a host name, an address, a loopback and process ids of its own, so that what works by accident
on one machine fails here as it would on a cluster: 127.0.0.1 of a node is not that of the login node, and a pid means
nothing elsewhere. The files are shared, as a cluster's home directories are. The names resolve on the three, and on a
login node whose sshd is started through `login_prefix`; the laptop knows none of them.

Nothing of the system's is read or written: not /etc/munge, /etc/slurm, /var/spool or /etc/hosts. Everything of a
machine ends with the first process of its pid namespace, jobs and what they left behind included: no rig leaks, even
one that is killed with the test that it was for (of that one, an empty network bridge remains).

Measured with Debian's Slurm 22.05: start() takes 0.1 s, stop() 0.15 s; a job runs within a second of sbatch.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

from private_sshd import PrivateSshd, children

DEADLINE_S = 30.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "ip", "unshare", "nsenter")

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

# The quick half is for the tests: a pending job is looked at each second, a killed one has a second to end.
# The rest is what clusters have, such as a job that is queued again when its node fails.
CONFIG = """
ClusterName=rig
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool.%n
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes have what they say, whatever this machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=1
{settings}
NodeName=node1 NodeAddr={node1} CPUs=2 RealMemory=4000
NodeName=node2 NodeAddr={node2} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES DefaultTime=1:00:00 MaxTime=1-0
"""


def find_obstacle() -> str:
    """Return why there can be no private Slurm here, or ""."""
    if os.getuid() != 0:
        return "only root can make the machines of a private Slurm"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return "a private Slurm needs %s; tests/setup.sh installs them" % ", ".join(missing)
    argv = ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "type", "veth"]
    run = subprocess.run(argv, env={"PATH": PATH}, capture_output=True, text=True)
    return "no namespaces with a network for a private Slurm here: " + run.stderr.strip() if run.returncode else ""


def wait_for(condition: Callable[[], bool], what: str, process: "Optional[subprocess.Popen[bytes]]" = None) -> None:
    """Poll until `condition` holds, as long as `process` runs."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise RuntimeError("not within %d s, or ended: %s" % (DEADLINE_S, what))
        time.sleep(0.005)


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
        """Return the start of a command that is to run there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", *options]

    def run(self, *argv: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command there, with `given` as its input."""
        argv = (*self.enter(), *argv)
        return subprocess.run(
            argv, env={"PATH": PATH}, input=given, capture_output=True, text=True, check=True, timeout=DEADLINE_S
        )

    def kill(self) -> None:
        """End it with every process on it, at once: the kernel waits for all before it lets go of the first."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait(10)


class PrivateSlurm:
    """A Slurm below `directory`; `settings` are lines for slurm.conf (a later line wins).

    A login node needs `environment()` and, for the names of the nodes, `login_prefix`. The methods about jobs and nodes
    act from outside, as an administrator or as another user's job would.

    Time limits: Slurm rounds them up to minutes (`-t 0:00:05` is one) and looks each 30 s, counted from its own start,
    whose time is up: a limit of a minute ends a job after 60 to 90 s. A test uses limit(): 30 s at most.
    """

    def __init__(self, directory: Path, settings: str = "") -> None:
        self.directory = directory
        self.settings = settings
        self.config = directory / "slurm.conf"
        self.machines: Dict[str, Machine] = {}
        self.sshds: List[PrivateSshd] = []
        self.bridge = ""
        self.addresses: Dict[str, str] = {}
        self._daemons: List[subprocess.Popen[bytes]] = []
        self._controller: Optional[subprocess.Popen[bytes]] = None
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)  # other users have to reach the configuration and munged's socket

    @property
    def nodes(self) -> Dict[str, str]:
        """The names of the compute nodes, with their addresses."""
        return {name: address for name, address in self.addresses.items() if name.startswith("node")}

    def environment(self) -> Dict[str, str]:
        """Return what a login on the login node has to have."""
        return {"SLURM_CONF": str(self.config)}

    @property
    def login_prefix(self) -> List[str]:
        """A command that starts the login node's sshd such that the nodes' names resolve in its logins."""
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, str(self.directory / "hosts")]

    # Start and stop.

    def start(self) -> "PrivateSlurm":
        """Start everything, and wait until both nodes are idle."""
        try:
            self._add_bridge()
            self._write_files()
            for number, (name, address) in enumerate(self.addresses.items(), 1):
                self.machines[name] = Machine(name, address, number * 1000000, self.directory / "hosts")
            self._connect_machines()
            self._start_munged()
            self.start_controller()
            for name in self.nodes:
                self._spawn(name, "slurmd", "-D")
            wait_for(lambda: set(self.node_states().values()) == {"IDLE"}, "both nodes idle")
        except RuntimeError as problem:
            raise RuntimeError("%s\n%s" % (problem, self.log_text()))
        return self

    def stop(self) -> None:
        """End everything, and return when it is gone."""
        for sshd in self.sshds:
            sshd.stop()
        # The links first: those of a machine that ended go later, when the kernel finds time.
        names = [self._port(name) for name in self.machines] + [self.bridge]
        lines = "".join("link delete %s\n" % name for name in names if name)
        subprocess.run(["ip", "-force", "-batch", "-"], env={"PATH": PATH}, input=lines.encode(), capture_output=True)
        for machine in self.machines.values():
            machine.kill()
        for daemon in self._daemons:
            daemon.wait(10)

    def _add_bridge(self) -> None:
        """Take a network of eight addresses that no other rig has: the bridge's name says whose it is."""
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
        login, *others = [net % ((start & 255) + offset) for offset in (1, 2, 3, 4)]
        self.addresses = dict(zip(("head", "node1", "node2"), others))
        lines = "addr add %s/29 dev %s\nlink set %s up\n" % (login, bridge, bridge)
        subprocess.run(["ip", "-batch", "-"], env={"PATH": PATH}, input=lines.encode(), check=True)

    def _write_files(self) -> None:
        names = "".join("%s %s\n" % (address, name) for name, address in self.addresses.items())
        hosts = Path("/etc/hosts").read_text()
        (self.directory / "hosts").write_text(hosts.rstrip("\n") + "\n" + names)
        self.config.write_text(CONFIG.format(directory=self.directory, settings=self.settings, **self.addresses))
        (self.directory / "state").mkdir(exist_ok=True)
        for name in self.nodes:
            (self.directory / ("spool." + name)).mkdir(exist_ok=True)
        key = os.open(str(self.directory / "munge.key"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
        with open(key, "wb") as stream:
            stream.write(os.urandom(128))

    def _connect_machines(self) -> None:
        lines = ""
        for machine in self.machines.values():
            port = self._port(machine.name)
            lines += "link add %s type veth peer name eth0 netns %d\n" % (port, machine.pid)
            lines += "link set %s master %s up\n" % (port, self.bridge)
        subprocess.run(["ip", "-batch", "-"], env={"PATH": PATH}, input=lines.encode(), check=True)
        for machine in self.machines.values():
            lines = "link set lo up\naddr add %s/29 dev eth0\nlink set eth0 up\n" % machine.address
            machine.run("ip", "-batch", "-", given=lines)

    def _port(self, machine: str) -> str:
        """Return the name of the link that leads to a machine."""
        return self.bridge + machine[0] + machine[-1]

    def _spawn(self, machine: str, *argv: str) -> "subprocess.Popen[bytes]":
        """Start a daemon on a machine: without the mark of a test, so that it is nobody's leak."""
        environment = dict(self.environment(), PATH=PATH)
        with (self.directory / ("%s.err" % argv[0])).open("ab") as log:
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

    def _start_munged(self) -> None:
        places = [
            "--%s=%s" % (option, self.directory / ("munge." + ending))
            for option, ending in (
                ("key-file", "key"),
                ("socket", "socket"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        ]
        # A test's directory may be closed to other users, which munged would not have without --force.
        munged = self._spawn("head", "munged", "--foreground", "--force", *places)
        wait_for((self.directory / "munge.socket").exists, "munged", munged)

    def start_controller(self) -> None:
        """Start slurmctld, which goes on with the jobs that it knew, and wait until it answers."""
        self._controller = self._spawn("head", "slurmctld", "-D")
        # Slurm's own commands would try again after a second: not before it listens.
        wait_for(self._listens, "slurmctld listening", self._controller)

    def _listens(self) -> bool:
        try:
            with socket.create_connection((self.addresses["head"], 6817), timeout=1):
                return True
        except OSError:
            return False

    def stop_controller(self) -> None:
        """End slurmctld; jobs run on, and every command of Slurm's fails."""
        if self._controller is not None:
            for pid in children(self._controller.pid):
                os.kill(pid, signal.SIGTERM)
            self._controller.wait(DEADLINE_S)
            self._controller = None

    def start_sshd(self, node: str, login: PrivateSshd) -> PrivateSshd:
        """Start an sshd on a node, on port 22, for the user, the key and the environment of the login node's."""
        directory = self.directory / ("sshd." + node)
        directory.mkdir()
        for name in ("user_key", "user_key.pub"):
            shutil.copy(str(login.directory / name), str(directory / name))
        machine = self.machines[node]
        # Without a fork, so that the process is sshd itself; those that serve the connections are born on the node.
        prefix = machine.enter("--no-fork")
        sshd = PrivateSshd(directory, host=node, address=machine.address, port=22, prefix=prefix)
        sshd.serve(login.user, login.home)
        sshd.environment = dict(login.environment)
        self.sshds.append(sshd)
        return sshd.start()

    def log_text(self) -> str:
        """Return what the daemons said."""
        files = sorted(self.directory.glob("*.log")) + sorted(self.directory.glob("*.err"))
        return "".join("%s:\n%s\n" % (file.name, file.read_text(errors="replace")) for file in files)

    # What users and administrators do.

    def command(self, *argv: str) -> str:
        """Run a command of Slurm's, as the administrator, and return what it printed; again where it had no time."""
        environment = dict(self.environment(), PATH=PATH, HOME=str(self.directory))
        deadline = time.monotonic() + DEADLINE_S
        while True:
            run = subprocess.run(
                argv, env=environment, cwd=str(self.directory), capture_output=True, text=True, timeout=60
            )
            if not run.returncode:
                return run.stdout.strip()
            if "timed out" not in run.stderr or time.monotonic() > deadline:
                raise RuntimeError("%s: status %d: %s" % (" ".join(argv), run.returncode, run.stderr))

    def squeue(self) -> Dict[int, str]:
        """Return the states of the jobs that Slurm still knows."""
        lines = self.command("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
        return {int(line.split()[0]): line.split()[1] for line in lines}

    def job(self, job: int) -> Dict[str, str]:
        """Return what `scontrol show job` says of a job, by field."""
        words = self.command("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job: int, *states: str) -> str:
        """Wait until a job is in one of these states (RUNNING, TIMEOUT ...), and return it."""
        wait_for(lambda: self.squeue().get(job) in states, "job %d in state %s" % (job, " or ".join(states)))
        return self.squeue()[job]

    def node_states(self) -> Dict[str, str]:
        """Return the states of the nodes: IDLE, ALLOCATED, IDLE+DRAIN, DOWN ..."""
        lines = self.command("scontrol", "--oneliner", "show", "node").splitlines()
        fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return {field["NodeName"]: field["State"] for field in fields if "NodeName" in field}

    def occupy(self, node: str = "") -> List[int]:
        """Fill a node, or all, with jobs that never end, and return them when they run."""
        jobs = []
        for name in [node] if node else list(self.nodes):
            argv = ["sbatch", "--parsable", "--exclusive", "--output=/dev/null", "--nodelist=" + name]
            jobs.append(int(self.command(*argv, "--wrap=exec sleep infinity")))
        for job in jobs:
            self.wait_for_state(job, "RUNNING")
        return jobs

    def cancel(self, *jobs: int) -> None:
        self.command("scancel", *map(str, jobs))

    def limit(self, job: int) -> None:
        """Let a running job's time be up in a second; slurmctld sees it when it looks next, which it does each 30 s."""
        self.command("scontrol", "update", "jobid=%d" % job, "endtime=now+1")

    def drain(self, node: str) -> None:
        """Take a node out of service: what runs there runs on, and nothing else is started."""
        self.command("scontrol", "update", "nodename=" + node, "state=drain", "reason=maintenance")

    def fail(self, node: str) -> None:
        """Let a node die, for good: all that runs there, its address, and then what slurmctld thinks of it.

        A job of that node ends with NODE_FAIL, or it is queued again, with --requeue or by default, and may start after
        two minutes.
        """
        self.machines[node].kill()
        self.command("scontrol", "update", "nodename=" + node, "state=down", "reason=broken")

    def resume(self, node: str) -> None:
        """Put a node that was drained into service again."""
        self.command("scontrol", "update", "nodename=" + node, "state=resume")
