"""Shims of PBS, LSF, HTCondor and of a scheduler that nobody knows: the commands, and what they print, are theirs.

    shim_scheduler.py DIRECTORY COMMAND WORDS...

A job waits until DIRECTORY/go is there, then runs for real, on the machine that DIRECTORY/node.json enters, in the way
of its scheduler: PBS feeds the script to a shell, here csh; LSF runs its words as a command; HTCondor gives it hardly
any environment. DIRECTORY/held holds the jobs that wait. DIRECTORY/asked has all that was asked, a JSON list a line.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

KEPT = ("HOME", "RJUPYTER_TEST", "RJUPYTER_SIDE", "RJUPYTER_TMP")  # the tests' own marks, and the home of their host
COMMANDS = {
    "pbs": ["qsub", "qstat", "qdel"],
    "lsf": ["bsub", "bjobs", "bkill"],
    "condor": ["condor_submit", "condor_q", "condor_rm"],
    "other": ["spool"],
}


def install(directory: Path, kind: str, node: List[str]) -> Path:
    """Make the commands of a scheduler whose node is entered by a command; return the directory to put on PATH."""
    binaries = directory / "bin"
    binaries.mkdir(parents=True)
    (directory / "node.json").write_text(json.dumps(node))
    for name in COMMANDS[kind]:
        file = binaries / name
        file.write_text('#!/bin/sh\nexec %s %s %s %s "$@"\n' % (sys.executable, __file__, directory, name))
        file.chmod(0o755)
    return binaries


def submit(directory: Path, command: str, words: List[str]) -> int:
    """Take a job, and say so as the scheduler does."""
    scripts = [word.partition("=")[2] for word in words if word.startswith("executable=")] or words[-1:]
    is_complete = command != "condor_submit" or words[-2:] == ["-queue", "1"]
    if not is_complete or not scripts or not os.access(scripts[0], os.X_OK):
        print("ERROR: no job in %s" % words, file=sys.stderr)
        return 1
    number = 41 + len(list(directory.glob("*.job")))
    (directory / ("%d.job" % number)).mkdir()
    argv = [sys.executable, __file__, str(directory), "run", str(number), command, scripts[0]]
    null = subprocess.DEVNULL
    subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True)
    said = {
        "qsub": "%d.pbs.example.org",
        "bsub": "Job <%d> is submitted to default queue <normal>.",
        "condor_submit": "Submitting job(s).\n1 job(s) submitted to cluster %d.",
        "spool": "request %d is spooled",
    }
    print(said[command] % number)
    return 0


def run(directory: Path, number: str, command: str, script: str) -> None:
    """Wait, run a job, and note its end."""
    job = directory / (number + ".job")
    while not (directory / "go").exists():
        if not job.exists() or (job / "ended").exists():
            return
        time.sleep(0.02)
    argv = {
        "qsub": ["csh"],
        "bsub": ["sh", "-c", script],
        "condor_submit": ["env", "-i", *("%s=%s" % (name, os.environ[name]) for name in KEPT), script],
        "spool": [script],
    }
    argv = json.loads((directory / "node.json").read_text()) + argv[command]
    with open(script if command == "qsub" else os.devnull) as stdin:
        process = subprocess.Popen(argv, stdin=stdin, start_new_session=True)
    (job / "pid").write_text(str(process.pid))
    process.wait()
    (job / "ended").touch()


def jobs(directory: Path) -> Dict[int, str]:
    """Return the jobs that have not ended, each as waits, held or runs."""
    is_held = (directory / "held").exists()
    found = {}
    for job in sorted(directory.glob("*.job")):
        if not (job / "ended").exists():
            found[int(job.stem)] = "runs" if (job / "pid").exists() else "held" if is_held else "waits"
    return found


def qstat(found: Dict[int, str]) -> int:
    """PBS Professional and Torque."""
    if found:
        print("Job id            Name             User              Time Use S Queue")
        print("----------------  ---------------- ----------------  -------- - -----")
    for number, state in found.items():
        used, letter = {"waits": ("0", "Q"), "held": ("0", "H"), "runs": ("00:00:01", "R")}[state]
        print("%-17s %-16s %-17s %8s %s workq" % ("%d.pbs" % number, "job.sh", "ana", used, letter))
    return 0


def bjobs(found: Dict[int, str]) -> int:
    """LSF: a status of 255 when there is none."""
    if not found:
        print("No unfinished job found", file=sys.stderr)
        return 255
    print("JOBID   USER    STAT  QUEUE      FROM_HOST   EXEC_HOST   JOB_NAME   SUBMIT_TIME")
    for number, state in found.items():
        word, host = {"waits": ("PEND", ""), "held": ("PSUSP", ""), "runs": ("RUN", "node1")}[state]
        print("%-7d ana     %-5s normal     login       %-11s job.sh     Nov 24 22:22" % (number, word, host))
    return 0


def condor_q(found: Dict[int, str]) -> int:
    """HTCondor, with -autoformat ClusterId JobStatus HoldReason."""
    for number, state in found.items():
        print(number, {"waits": "1 undefined", "held": "5 No credits are left", "runs": "2 undefined"}[state])
    return 0


def cancel(directory: Path, number: str) -> int:
    """End a job: its process group is all that is known of it."""
    job = directory / (number + ".job")
    if not job.exists() or (job / "ended").exists():
        print("no job %s" % number, file=sys.stderr)
        return 1
    if (job / "pid").exists():
        os.killpg(int((job / "pid").read_text()), signal.SIGTERM)
    else:
        (job / "ended").touch()
    return 0


def main() -> int:
    directory, command, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if command == "run":
        run(directory, *words)
        return 0
    with (directory / "asked").open("a") as asked:
        asked.write(json.dumps([command, *words]) + "\n")
    queries = {"qstat": qstat, "bjobs": bjobs, "condor_q": condor_q}
    if command in queries:
        return queries[command](jobs(directory))
    if command in ("qdel", "bkill", "condor_rm"):
        return cancel(directory, words[-1])
    return submit(directory, command, words)


if __name__ == "__main__":
    sys.exit(main())
