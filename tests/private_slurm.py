"""A private Slurm: munged, slurmctld and two slurmd, on three machines of private_machines.py. Root alone can.

Each node has a /tmp of its own, as the nodes of clusters have.

Nothing of the system's is read or written: not /etc/munge, /etc/slurm, /var/spool or /etc/hosts.

Measured with Debian's Slurm 22.05: start() takes 0.1 s, stop() 0.15 s; a job runs within a second of sbatch.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from private_machines import DEADLINE_S, PATH, Cluster, find_obstacle, give_own_tmp, wait_for
from private_sshd import PrivateSshd, children

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")

# The quick half is for the tests: a pending job is looked at each second, a killed one has a second to end.
# The rest is what clusters have, such as a job that is queued again when its node fails.
CONFIG = """
ClusterName={name}
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
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=1:00:00 MaxTime=1-0
"""


def find_slurm_obstacle() -> str:
    """Return why there can be no private Slurm here, or ""."""
    groups = Path("/sys/fs/cgroup")  # slurmd does not start without, whatever slurm.conf says; a chroot has none
    has_groups = groups.is_dir() and any(groups.iterdir())
    return find_obstacle(PROGRAMS) or ("" if has_groups else "slurmd needs the control groups in %s" % groups)


class PrivateSlurm(Cluster):
    """A Slurm below `directory`; `settings` are lines for slurm.conf (a later line wins).

    A login node needs `environment()` and, for the names of the nodes, `login_prefix`. The methods about jobs and nodes
    act from outside, as an administrator or as another user's job would.

    Time limits: Slurm rounds them up to minutes (`-t 0:00:05` is one) and looks each 30 s, counted from its own start,
    whose time is up: a limit of a minute ends a job after 60 to 90 s. A test uses limit(): 30 s at most.
    """

    def __init__(
        self, directory: Path, settings: str = "", name: str = "rig", nodes: Sequence[str] = ("node1", "node2")
    ) -> None:
        super().__init__(directory, ("head", *nodes))
        self.settings = settings
        self.name = name
        self.config = directory / "slurm.conf"
        self.sshds: List[PrivateSshd] = []
        self._controller: Optional[subprocess.Popen[bytes]] = None

    def environment(self) -> Dict[str, str]:
        """Return what a login on the login node has to have."""
        return {"SLURM_CONF": str(self.config)}

    # Start and stop.

    def start(self) -> "PrivateSlurm":
        """Start everything, and wait until both nodes are idle."""
        try:
            self.start_machines()
            for name in self.nodes:
                give_own_tmp(self.machines[name], self.directory)
            self._write_files()
            self._start_munged()
            self.start_controller()
            for name in self.nodes:
                self.spawn(name, "slurmd", "-D")
            wait_for(lambda: set(self.node_states().values()) == {"IDLE"}, "both nodes idle")
        except RuntimeError as problem:
            raise RuntimeError("%s\n%s" % (problem, self.log_text()))
        return self

    def stop(self) -> None:
        """End everything, and return when it is gone."""
        self.thaw_controller()
        for sshd in self.sshds:
            sshd.stop()
        super().stop()

    def _write_files(self) -> None:
        line = "NodeName=%s NodeAddr=%s CPUs=2 RealMemory=4000"
        nodes = "\n".join(line % pair for pair in self.nodes.items())
        words = {"directory": self.directory, "settings": self.settings, "name": self.name, "nodes": nodes}
        self.config.write_text(CONFIG.format(head=self.addresses["head"], **words))
        (self.directory / "state").mkdir(exist_ok=True)
        for name in self.nodes:
            (self.directory / ("spool." + name)).mkdir(exist_ok=True)
        key = os.open(str(self.directory / "munge.key"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
        with open(key, "wb") as stream:
            stream.write(os.urandom(128))

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
        munged = self.spawn("head", "munged", "--foreground", "--force", *places)
        wait_for((self.directory / "munge.socket").exists, "munged", munged)

    def start_controller(self) -> None:
        """Start slurmctld, which goes on with the jobs that it knew, and wait until it answers."""
        self._controller = self.spawn("head", "slurmctld", "-D")
        # Slurm's own commands would try again after a second: not before it listens.
        wait_for(lambda: self.listens("head", 6817), "slurmctld listening", self._controller)

    def stop_controller(self) -> None:
        """End slurmctld; jobs run on, and every command of Slurm's fails."""
        if self._controller is not None:
            for pid in children(self._controller.pid):
                os.kill(pid, signal.SIGTERM)
            self._controller.wait(DEADLINE_S)
            self._controller = None

    def freeze_controller(self) -> None:
        """Let slurmctld take connections and answer nothing, until thaw_controller: what it was sent is done then."""
        assert self._controller is not None
        for pid in children(self._controller.pid):
            os.kill(pid, signal.SIGSTOP)

    def thaw_controller(self) -> None:
        """Let slurmctld go on; nsenter has stopped with it, and must go on first or the machine could never end."""
        if self._controller is not None and self._controller.poll() is None:
            for pid in [self._controller.pid, *children(self._controller.pid)]:
                os.kill(pid, signal.SIGCONT)

    def forget_jobs(self) -> None:
        """Let slurmctld begin anew, with job 1: what an administrator does when its state is lost."""
        self.stop_controller()
        for path in (self.directory / "state").iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        self.start_controller()
        wait_for(lambda: set(self.node_states().values()) == {"IDLE"}, "both nodes idle")

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
