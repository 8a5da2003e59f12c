"""What sites do around their schedulers: wrappers of the commands, two clusters, homes that lag or are not there.

A wrapper lies in a directory that a login has in front of its PATH, and ends in the real command:

    site = Site(directory / "site")
    site.wrap("sbatch", "echo 'Welcome to Rig 3000'; exec /usr/bin/sbatch \\"$@\\"")
    make_host(path="%s:%s" % (site.path, VENV_BIN), ...)
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from private_machines import Cluster, Machine
from private_slurm import PrivateSlurm

SLURM_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct")

# -M, as slurmdbd would have it: the commands go to that cluster's slurmctld, and sbatch says which one took the job.
CLUSTERS = """
cluster=${{SLURM_CLUSTERS:-}}
[ {command} = sbatch ] && cluster=${{SBATCH_CLUSTERS:-$cluster}}
unset SLURM_CLUSTERS SBATCH_CLUSTERS
count=$#
while [ $count -gt 0 ]; do
    word=$1
    shift
    count=$((count - 1))
    case $word in
        -M | --clusters | --cluster) cluster=$1; shift; count=$((count - 1)) ;;
        -M*) cluster=${{word#-M}} ;;
        --clusters=* | --cluster=*) cluster=${{word#*=}} ;;
        *) set -- "$@" "$word" ;;
    esac
done
case $cluster in
    "") exec {real} "$@" ;;
{cases}
    *) echo "{command}: error: '$cluster' can't be reached now, or it is an invalid entry for --cluster." >&2; exit 1 ;;
esac
export SLURM_CONF
[ {command} = sbatch ] || exec {real} "$@"
said=$({real} "$@") || exit
case $said in
    Submitted*) echo "$said on cluster $cluster" ;;
    *) echo "$said;$cluster" ;;
esac
"""
# As site's "qstat" and "squeue" are: the same answer, to whatever is asked, for a while.
CACHED = """
kept="{directory}/kept.{command}.$(echo "$*" | cksum | tr ' ' -)"
if [ ! -e "$kept" ] || [ -n "$(find "$kept" -not -newermt "-{seconds} seconds")" ]; then
    {real} "$@" >"$kept.$$" || exit
    mv "$kept.$$" "$kept"
fi
exec cat "$kept"
"""
# The rows of squeue without the jobs that are younger than some seconds. All rows hold the number first.
LAGGING = """
now=$(date +%s)
{real} --noheader --states=all --format='%i %V' | while read -r job submitted; do
    [ $((now - $(date -d "$submitted" +%s))) -ge {seconds} ] || echo "$job"
done >"{directory}/young.$$"
{real} "$@" | awk -v young="{directory}/young.$$" 'BEGIN {{ while ((getline line < young) > 0) hidden[line] = 1 }}
    {{ split($0, words, /[^0-9]+/); id = words[1] == "" ? words[2] : words[1]; if (!(id in hidden)) print }}'
rm -f "{directory}/young.$$"
"""
# sacct, as slurmdbd would have it, of what slurmctld still knows: its own commands are said to have forgotten.
SACCT = """
import subprocess, sys

words = sys.argv[1:]
jobs, fields, is_parsable, has_head = "", "JobID,JobName,State,ExitCode", 0, True
while words:
    word = words.pop(0)
    name, is_joined, value = word.partition("=")
    if name in ("-j", "--jobs", "-o", "--format", "-M", "--clusters", "-S", "--starttime", "-E", "-u", "--user", "-s"):
        value = value if is_joined else words.pop(0)
        jobs = value if name in ("-j", "--jobs") else jobs
        fields = value if name in ("-o", "--format") else fields
    elif word.startswith("--"):
        is_parsable = {"--parsable2": 2, "--parsable": 1}.get(word, is_parsable)
        has_head = has_head and word != "--noheader"
    else:
        for number, letter in enumerate(word[1:], 2):
            if letter in "jo":
                value = word[number:] or words.pop(0)
                jobs, fields = (value, fields) if letter == "j" else (jobs, value)
                break
            is_parsable = {"P": 2, "p": 1}.get(letter, is_parsable)
            has_head = has_head and letter != "n"
names = [field.partition("%")[0] for field in fields.split(",")]
if has_head:
    print("|".join(names) if is_parsable else " ".join("%10s" % name for name in names))
for job in jobs.split(","):
    run = subprocess.run(["/usr/bin/scontrol", "-o", "show", "job", job], capture_output=True, text=True)
    facts = dict(word.split("=", 1) for word in run.stdout.split() if "=" in word)
    if not facts:
        continue
    state = facts["JobState"] + (" by 0" if facts["JobState"] == "CANCELLED" else "")
    known = {"jobid": job, "jobidraw": job, "state": state, "exitcode": facts["ExitCode"]}
    known.update(submit=facts["SubmitTime"], start=facts["StartTime"], end=facts["EndTime"])
    known["nodelist"] = facts.get("NodeList", "")
    known.update(jobname=facts["JobName"], reason=facts["Reason"], user=facts["UserId"].partition("(")[0])
    known.update(cluster="rig", partition=facts["Partition"], elapsed=facts["RunTime"], derivedexitcode="0:0")
    known.update(workdir=facts["WorkDir"], submitline="sbatch " + facts.get("Command", ""))
    cells = [known.get(name.lower(), "") for name in names]
    print("|".join(cells) + "|" * (is_parsable == 1) if is_parsable else " ".join("%10.10s" % cell for cell in cells))
"""


class Site:
    """A site's own commands: `path` is to be in front of the PATH of a login; `hidden` are those that it hides."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "bin"
        self.path.mkdir(parents=True)
        directory.chmod(0o1777)

    def wrap(self, command: str, script: str) -> None:
        """Put a script in the place of a command; {real} is the command, {command} its name."""
        file = self.path / command
        words = {"real": "/usr/bin/" + command, "command": command, "directory": self.directory}
        for name, value in words.items():
            script = script.replace("{%s}" % name, str(value))
        file.write_text("#!/bin/sh\n" + script.replace("{{", "{").replace("}}", "}"))
        file.chmod(0o755)

    def unwrap(self, command: str) -> None:
        (self.path / command).unlink()

    def clusters(self, **slurms: PrivateSlurm) -> None:
        """Let -M NAME lead to these Slurms."""
        cases = "\n".join("    %s) SLURM_CONF=%s ;;" % (name, slurm.config) for name, slurm in slurms.items())
        for command in SLURM_COMMANDS:
            self.wrap(command, CLUSTERS.replace("{cases}", cases))

    def cache(self, command: str, seconds: int) -> None:
        self.wrap(command, CACHED.replace("{seconds}", str(seconds)))

    def lag(self, seconds: int) -> None:
        """Let squeue not know a job before it is so many seconds old."""
        self.wrap("squeue", LAGGING.replace("{seconds}", str(seconds)))

    def forget_ended(self) -> None:
        """Let squeue know live jobs alone, as Slurm's does when MinJobAge has passed; sacct knows them all."""
        live = "PENDING|CONFIGURING|RUNNING|COMPLETING|SUSPENDED|STATE"
        self.wrap("squeue", 'said=$({real} "$@") || exit\necho "$said" | grep -E "%s" || :\n' % live)
        self.wrap(
            "scontrol",
            'said=$({real} "$@") || exit\ncase $said in *JobState=C*|*JobState=[FTNO]*) echo '
            '"slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;; esac\necho "$said"\n',
        )
        (self.directory / "sacct.py").write_text(SACCT)
        self.wrap("sacct", 'exec %s -I {directory}/sacct.py "$@"\n' % sys.executable)

    def away(self, commands: Tuple[str, ...] = SLURM_COMMANDS) -> List[str]:
        """Move commands from /usr/bin to where no PATH leads; return what starts the login node's sshd such that."""
        hidden = self.directory / "hidden"
        (self.directory / "away").mkdir()
        hidden.mkdir()
        for command in commands:
            shutil.copy("/usr/bin/" + command, str(self.directory / "away"))
            os.mknod(str(hidden / command), 0o020000, os.makedev(0, 0))  # what an overlay takes for: not there
        script = 'mount -t overlay overlay -o lowerdir="$0":/usr/bin /usr/bin && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, str(hidden)]


def join_names(first: Cluster, second: Cluster) -> None:
    """Let the names of one cluster's machines resolve on the login node and the machines of another."""
    with (first.directory / "hosts").open("a") as hosts:
        hosts.write("".join("%s %s\n" % (address, name) for name, address in second.nodes.items()))


def cover_home(machine: Machine, home: Path, kind: str) -> None:
    """Give a node no home ("none"), a read-only one ("readonly"), or one of its own ("local")."""
    if kind == "readonly":
        machine.run("mount", "--bind", str(home), str(home))
        machine.run("mount", "-o", "remount,bind,ro", str(home))
    else:
        mode = "ro,mode=0000" if kind == "none" else "mode=0777"
        machine.run("mount", "-t", "tmpfs", "-o", "size=64m," + mode, "tmpfs", str(home))


class LaggingDirectory:
    """A directory that nodes see as a copy of their own, which is brought up to date some seconds late, either way.

    So a shared home behaves whose clients keep what they know of it: a file that one side made is not there, or not so
    long, on the other side for a while. Files that both sides write are not meant.
    """

    def __init__(self, directory: Path, copy: Path, machines: List[Machine], delay_s: float) -> None:
        self.sides = (directory, copy)
        self.delay_s = delay_s
        self._known: Dict[Path, Tuple[int, int]] = {}  # by path below: size and time on both sides when last the same
        self._due: Dict[Tuple[int, Path], float] = {}
        self._end = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        copy.mkdir()
        for side in self.sides:
            os.chmod(side, 0o700)
        shutil.copystat(str(directory), str(copy))
        os.chown(copy, directory.stat().st_uid, -1)
        for machine in machines:
            machine.run("mount", "--bind", str(copy), str(directory))
        self._thread = threading.Thread(target=self._synchronise, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _synchronise(self) -> None:
        while not self._end.wait(0.1):
            with contextlib.suppress(OSError):  # files come and go
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        seen = [dict(_files(side)) for side in self.sides]
        for number in (0, 1):
            for path, fact in seen[number].items():
                if self._known.get(path) != fact:
                    self._due.setdefault((number, path), now + self.delay_s)
            for path in self._known:
                if path not in seen[number]:
                    self._due.setdefault((number, path), now + self.delay_s)
        for (number, path), due in sorted(self._due.items(), key=lambda item: item[1]):
            if due <= now:
                del self._due[number, path]
                self._bring(path, self.sides[number] / path, self.sides[1 - number] / path)

    def _bring(self, path: Path, source: Path, target: Path) -> None:
        try:
            status = source.lstat()
        except OSError:
            self._known.pop(path, None)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            return
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            with source.open("rb") as stream:
                data = stream.read(status.st_size)  # it may grow meanwhile
            with os.fdopen(os.open(str(target), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
                stream.write(data)
                stream.truncate()
        os.chmod(target, status.st_mode & 0o7777)
        os.chown(target, status.st_uid, status.st_gid)
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
        self._known[path] = _fact(source, status)


def _files(top: Path) -> Iterator[Tuple[Path, Tuple[int, int]]]:
    for path in top.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_dir() or path.is_file():
                yield path.relative_to(top), _fact(path, path.lstat())


def _fact(path: Path, status: os.stat_result) -> Tuple[int, int]:
    return (-1, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
