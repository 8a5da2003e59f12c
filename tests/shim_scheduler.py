"""Shims of PBS, LSF, HTCondor, Flux, OAR and of one that nobody knows: the commands, and what they print, are theirs.

    shim_scheduler.py DIRECTORY COMMAND WORDS...

A job waits until DIRECTORY/go is there, then runs for real, on the machine that DIRECTORY/node.json enters, in the way
of its scheduler: PBS feeds the script to a shell, here csh; LSF runs its words as a command; HTCondor gives it hardly
any environment. DIRECTORY/held holds the jobs that wait. DIRECTORY/asked has all that was asked, a JSON list a line.
"""

import json
import os
import re
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
    "flux": ["flux"],
    "oar": ["oarsub", "oarstat", "oardel"],
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
    (directory / ("%d.job" % number) / "script").write_text(scripts[0])
    argv = [sys.executable, __file__, str(directory), "run", str(number), command, scripts[0]]
    null = subprocess.DEVNULL
    subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True)
    said = {
        "qsub": "%d.pbs.example.org",
        "bsub": "Job <%d> is submitted to default queue <normal>.",
        "condor_submit": "Submitting job(s).\n1 job(s) submitted to cluster %d.",
        "flux": "\u0192M7Zq9AK%d",
        "oarsub": "[ADMISSION RULE] Modify resource description with type constraints\nOAR_JOB_ID=%d",
        "spool": "request %d is spooled",
    }
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
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
        "flux": [script],
        "oarsub": ["bash", "-c", script],
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
    """HTCondor, with -autoformat ClusterId JobStatus HoldReason QDate."""
    for number, state in found.items():
        word = {"waits": "1 undefined", "held": "5 No credits are left", "runs": "2 undefined"}[state]
        print(number, word, 1795636725)
    return 0


def flux_jobs(directory: Path, words: List[str]) -> int:
    """flux jobs, with a format as str.format has it: of the fields that we know, the others are empty."""
    template, has_head, is_all = "{id.f58} {username} {name} {status_abbrev}", True, False
    ids: List[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, is_joined, value = word.partition("=")
        if name in ("-o", "--format", "-f", "--filter", "-c", "--count", "--since", "-u", "--user"):
            value = value if is_joined else words.pop(0)
            template = value if name in ("-o", "--format") else template
        elif word.startswith("-o"):
            template = word[2:]
        elif word.startswith("-"):
            has_head = has_head and word not in ("-n", "--no-header")
            is_all = is_all or word in ("-a", "-A")
        else:
            ids.append(word.translate({0x192: "f"}))
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    names = re.findall(r"\{([\w.]+)[^}]*\}", template)
    if has_head:
        print(" ".join(name.upper() for name in names))
    found = jobs(directory)
    for job in sorted(directory.glob("*.job")):
        number = int(job.stem)
        state = found.get(number, "ended")
        plain = "fM7Zq9AK%d" % number
        if (state == "ended" and not is_all) or (ids and plain not in ids):
            continue
        status = {"waits": "SCHED", "held": "SCHED", "runs": "RUN", "ended": "CANCELED"}[state]
        facts = {"id": "\u0192" + plain[1:], "id.f58": "\u0192" + plain[1:], "id.f58plain": plain, "status": status}
        facts.update({"id.dec": "21264%d" % number, "state": status if state != "ended" else "INACTIVE"})
        facts.update({"status_abbrev": {"SCHED": "S", "RUN": "R", "CANCELED": "CA"}[status], "username": "ana"})
        facts.update(name="job.sh", nodelist="node1" if state == "runs" else "")
        facts.update(t_submit=str((job / "script").stat().st_mtime))
        facts.update(result="CANCELED" if state == "ended" else "", t_remaining="3540.2" if state == "runs" else "0.0")
        line = template
        for match in re.finditer(r"\{([\w.]+)[^}]*\}", template):
            line = line.replace(match.group(), facts.get(match.group(1), ""))
        print(line)
    return 0


def oarstat(directory: Path, words: List[str]) -> int:
    """oarstat -u, as a table or with -J; the end of a job is not in it, but in oarstat -j ID."""
    states = {"waits": "Waiting", "held": "Hold", "runs": "Running"}
    asked = [int(word) for word in words if word.isdigit()]
    found = {number: states[state] for number, state in jobs(directory).items()}
    for job in directory.glob("*.job"):
        if asked:
            found.setdefault(int(job.stem), "Terminated")
    found = {number: state for number, state in sorted(found.items()) if not asked or number in asked}
    if "-J" in words or "--json" in words:
        rows = {}
        for number, state in found.items():
            facts = {"id": number, "Job_Id": number, "state": state, "name": None, "owner": "ana", "queue": "default"}
            nodes = ["node1"] if state == "Running" else []
            rows[str(number)] = dict(facts, assigned_network_address=nodes, command=job_script(directory, number))
        print(json.dumps(rows))
        return 0
    if found and "-s" not in words:
        print("Job id    Name           User     Submission Date     S Queue")
        print("--------- -------------- -------- ------------------- - --------")
    for number, state in found.items():
        if "-s" in words:
            print("%d: %s" % (number, state))
        else:
            print("%-9d %-14s %-8s 2026-11-24 22:40:30 %s default" % (number, "my job", "ana", state[0]))
    return 0


def job_script(directory: Path, number: int) -> str:
    file = directory / ("%d.job" % number) / "script"
    return file.read_text() if file.exists() else ""


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
    if command == "flux":
        if words[:1] == ["jobs"]:
            return flux_jobs(directory, words[1:])
        if words[:1] == ["cancel"] or words[:2] == ["job", "cancel"]:
            return cancel(directory, words[-1][-2:])
        if words[:1] not in (["batch"], ["submit"]):
            print("flux: `%s' is not a flux command." % words[0], file=sys.stderr)
            return 1
    if command == "oarstat":
        return oarstat(directory, words)
    queries = {"qstat": qstat, "bjobs": bjobs, "condor_q": condor_q}
    if command in queries:
        return queries[command](jobs(directory))
    if command in ("qdel", "bkill", "condor_rm", "oardel"):
        return cancel(directory, words[-1])
    return submit(directory, command, words)


if __name__ == "__main__":
    sys.exit(main())
