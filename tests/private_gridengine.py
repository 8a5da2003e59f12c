"""A private Grid Engine: sge_qmaster and one sge_execd, each on a machine of private_machines.py. Root alone can.

The programs are those of Debian's packages, unpacked into a cache by tests/setup.sh: installed, they would bring a mail
server and daemons of the system's. The node has one slot, so that a second job waits for the first.

As with Grid Engine's own defaults, the queue's shell is csh, and a job does not get the environment of the login.

Measured with Debian's Grid Engine 8.1.9: start() takes 1.5 s; a job runs within two seconds of qsub.
"""

import re
import shlex
from pathlib import Path
from typing import Dict, List

from jupyters import CACHE
from private_machines import Cluster, find_obstacle, wait_for

UNPACKED = CACHE / "gridengine"
# Debian's programs look for each other below /usr: on the machines they lie over it.
MOUNT = ["mount", "-t", "overlay", "overlay", "-o", "lowerdir=%s/usr:/usr" % UNPACKED, "/usr"]
PORT = 6444

BOOTSTRAP = """
admin_user none
default_domain none
ignore_fqdn true
spooling_method berkeleydb
spooling_lib libspoolb
spooling_params {root}/spooldb
binary_path /usr/lib/gridengine
qmaster_spool_dir {root}/qmaster
security_mode none
listener_threads 2
worker_threads 2
scheduler_threads 1
jvm_threads 0
"""
# What of the default configurations is changed: the scheduler looks each second, root may have jobs, and what left the
# process group of a job outlives it. That is the default of most Grid Engines, if not of this one.
SETTINGS = {
    "execd_params": "ENABLE_ADDGRP_KILL=false",
    "execd_spool_dir": "{root}/execd",
    "gid_range": "20000-20100",
    "min_uid": "0",
    "min_gid": "0",
    "schedule_interval": "0:0:1",
    "flush_submit_sec": "1",
    "flush_finish_sec": "1",
}
EXEC_HOST = """
hostname node1
load_scaling NONE
complex_values NONE
user_lists NONE
xuser_lists NONE
projects NONE
xprojects NONE
usage_scaling NONE
report_variables NONE
"""
HOST_GROUP = """
group_name @allhosts
hostlist node1
"""
QUEUE = """
qname main.q
hostlist @allhosts
seq_no 0
load_thresholds NONE
suspend_thresholds NONE
nsuspend 1
suspend_interval 00:05:00
priority 0
min_cpu_interval 00:05:00
processors UNDEFINED
qtype BATCH INTERACTIVE
ckpt_list NONE
pe_list NONE
rerun FALSE
slots 1
tmpdir /tmp
shell /bin/csh
prolog NONE
epilog NONE
shell_start_mode posix_compliant
starter_method NONE
suspend_method NONE
resume_method NONE
terminate_method NONE
notify 00:00:60
owner_list NONE
user_lists NONE
xuser_lists NONE
subordinate_list NONE
complex_values NONE
projects NONE
xprojects NONE
calendar NONE
initial_state default
"""
LIMITS = ("rt", "cpu", "fsize", "data", "stack", "core", "rss", "vmem")


def find_gridengine_obstacle() -> str:
    """Return why there can be no private Grid Engine here, or ""."""
    if not (UNPACKED / "complete").exists():
        return "a private Grid Engine needs %s: tests/setup.sh unpacks it, as root, where apt-get has it" % UNPACKED
    return find_obstacle(("mount", "csh"))


class PrivateGridEngine(Cluster):
    """A Grid Engine below `directory`. A login node needs `environment()`, and its sshd `login_prefix`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, ("head", "node1"))
        self.root = directory / "root"

    def environment(self) -> Dict[str, str]:
        """Return what a login on the login node has to have."""
        ports = {"SGE_QMASTER_PORT": str(PORT), "SGE_EXECD_PORT": str(PORT + 1)}
        return {"SGE_ROOT": str(self.root), "SGE_CELL": "default", **ports}

    @property
    def login_prefix(self) -> List[str]:
        """A command that starts the login node's sshd: with the name of a host that may submit, and with qsub."""
        script = 'hostname login && %s && exec "$@"' % shlex.join(MOUNT)
        return [*super().login_prefix, "unshare", "--uts", "sh", "-c", script, "sh"]

    def start(self) -> "PrivateGridEngine":
        """Start everything, and wait until the node is there."""
        try:
            self.start_machines()
            for machine in self.machines.values():
                machine.run(*MOUNT)
            self._write_files()
            spool = str(self.root / "spooldb")
            self.command("sh", "/usr/share/gridengine/scripts/init_cluster", str(self.root), "default", spool, "root")
            master = self.spawn("head", "env", "SGE_ND=1", "sge_qmaster")
            wait_for(lambda: self.listens("head", PORT), "sge_qmaster listening", master)
            self._configure()
            self.spawn("node1", "env", "SGE_ND=1", "sge_execd")
            wait_for(lambda: "lx-" in self.command("qhost"), "the node in qhost")
        except RuntimeError as problem:
            raise RuntimeError("%s\n%s" % (problem, self.log_text()))
        return self

    def _write_files(self) -> None:
        for name in ("default/common", "qmaster/job_scripts", "execd", "spooldb"):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "lib", "util", "utilbin"):
            (self.root / name).symlink_to(UNPACKED / "var/lib/gridengine" / name)
        (self.root / "default/common/bootstrap").write_text(BOOTSTRAP.format(root=self.root))
        (self.root / "default/common/act_qmaster").write_text("head\n")

    def _configure(self) -> None:
        limits = "".join("%s_%s INFINITY\n" % (kind, name) for name in LIMITS for kind in "sh")
        texts = {
            "global": self._changed(self.command("qconf", "-sconf")),
            "scheduler": self._changed(self.command("qconf", "-ssconf")),
            "node": EXEC_HOST,
            "group": HOST_GROUP,
            "queue": QUEUE + limits,
        }
        files = {name: str(self.directory / name) for name in texts}
        for name, text in texts.items():
            Path(files[name]).write_text(text.lstrip())
        hosts = ["-as", "login", "-as", "head"]
        argv = ["-Mconf", files["global"], "-Msconf", files["scheduler"], *hosts, "-Ae", files["node"]]
        self.command("qconf", *argv, "-Ahgrp", files["group"], "-Aq", files["queue"])

    def _changed(self, configuration: str) -> str:
        for name, value in SETTINGS.items():
            line = "%s %s" % (name, value.format(root=self.root))
            configuration = re.sub(r"(?m)^%s\s.*$" % name, line, configuration)
        return configuration

    def command(self, *argv: str) -> str:
        """Run a command as the administrator, on the head, and return what it printed."""
        environment = dict(self.environment(), HOME=str(self.directory))
        words = ["%s=%s" % pair for pair in environment.items()]
        return self.machines["head"].run("env", *words, *argv).stdout

    def qstat(self) -> Dict[int, str]:
        """Return the states of the jobs of all users."""
        rows = [line.split() for line in self.command("qstat", "-u", "*").splitlines()]
        return {int(row[0]): row[4] for row in rows if row and row[0].isdigit()}

    def occupy(self) -> int:
        """Take the one slot, with a job that never ends, and return it when it runs."""
        said = self.command("qsub", "-terse", "-o", "/dev/null", "-j", "y", "-b", "y", "sleep", "infinity")
        job = int(said)
        wait_for(lambda: self.qstat().get(job) == "r", "job %d running" % job)
        return job

    def cancel(self, job: int) -> None:
        self.command("qdel", str(job))

    def processes(self) -> str:
        """Return the command lines of what runs on the node."""
        return self.machines["node1"].run("ps", "ax", "-o", "args=").stdout
