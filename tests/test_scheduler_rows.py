"""What schedulers print, and what the table SCHEDULERS makes of it: ids and states, from samples of real forms."""

import re
from typing import Any

import pytest

import rjupyter

# By the word that submits. A sample of what is said when a job is taken, and the id that it names.
IDS = [
    ("sbatch", "Submitted batch job 123", "123"),
    ("sbatch", "Submitted batch job 123 on cluster gpu", "123"),
    ("sbatch", "123;gpu", "123"),
    ("sbatch", "Welcome to Rig 3000\n\nSubmitted batch job 123", "123"),
    ("sbatch", "Welcome to Rig 3000, 2 users\n123", "123"),
    ("sbatch", "Submitted batch job 123\nYour project has used 12 of 500 node hours.", "123"),
    ("sbatch", "Submitted batch job 17 took 3 min.\nSubmitted batch job 123", "123"),
    ("qsub", "Rig 7: 15 users\n123.pbs-server.example.org", "123"),
    ("qsub", "2026-11-25 maintenance\n123.pbs-server", "123"),
    ("qsub", 'Unable to run job: warning: no suitable queues.\nYour job 123 ("job.sh") has been submitted', "123"),
    ("bsub", "Budget of project <42> is used.\nJob <123> is submitted to queue <normal>.", "123"),
    ("condor_submit", "123.0 - 123.0", "123"),
    ("condor_submit", "Submitting job(s).\n1 job(s) submitted to cluster 123.", "123"),
    ("flux", "\u0192M7Zq9AKHno", "\u0192M7Zq9AKHno"),
    ("flux", "fM7Zq9AKHno", "fM7Zq9AKHno"),
    ("flux", "Welcome, 3 jobs run\n\u0192M7Zq9AKHno", "\u0192M7Zq9AKHno"),
    ("oarsub", "OAR_JOB_ID=123", "123"),
    ("oarsub", "[ADMISSION RULE] Set default walltime to 7200.\n# 12 resources\nOAR_JOB_ID=123", "123"),
]


@pytest.mark.parametrize(("command", "said", "number"), IDS)
def test_id_that_is_named(command: str, said: str, number: str) -> None:
    """The last line that is one: what a site says before it may look like it."""
    found = list(re.finditer(rjupyter.SCHEDULERS[command].id, said))
    assert found
    assert next(group for group in found[-1].groups() if group) == number


PBS = "123.pbs-server    %-16s ana                      %s %s workq"
SLURM = "%s|%s|None|2026-11-25T19:58:41|node1|59:58"
ROWS = [
    ("qsub", PBS % ("my job", "0", "Q"), "PENDING"),
    ("qsub", PBS % ("my own job", "00:00:01", "R"), "RUNNING"),
    ("qsub", PBS % ("R 12 Q", "0", "H"), "PENDING"),
    ("qsub", PBS % ("job.sh", "0", "B"), "RUNNING"),
    ("qsub", PBS % ("job.sh", "0", "M"), "RUNNING"),
    ("qsub", PBS % ("job.sh", "0", "T"), "PENDING"),
    ("qsub", PBS.replace("123.pbs-server ", "123[].pbs-server") % ("job.sh", "0", "B"), "RUNNING"),
    ("qsub", PBS % ("job.sh", "0", "X"), "X"),
    ("sbatch", SLURM % ("123", "PREEMPTED"), "PREEMPTED"),
    ("sbatch", SLURM % ("123", "REQUEUED"), "REQUEUED"),
    ("sbatch", SLURM % ("123", "COMPLETING"), "COMPLETING"),
    ("sbatch", SLURM % ("123_0", "RUNNING"), "RUNNING"),
    ("sbatch", SLURM % ("123_[1-3%1]", "PENDING"), "PENDING"),
    ("sbatch", SLURM % ("123+0", "RUNNING"), "RUNNING"),
    ("sbatch", SLURM % ("123+0", "PENDING"), "PENDING"),
]
LIVE = ("PENDING", "RUNNING", "REQUEUED")


@pytest.mark.parametrize(("command", "row", "word"), ROWS)
def test_row_that_is_read(command: str, row: str, word: str) -> None:
    """A job of our number beside one whose number begins with ours."""
    record = rjupyter.JobRecord(number="123", command=command, created=0.0, node="login")
    state = rjupyter.state_in(record, 2000.0, "%s\n%s\n" % (row, row.replace("123", "1234", 1)))
    assert (state.word, state.is_live) == (word, word in LIVE)


# Which states wait and which run; any other has ended.
STATES = [
    ("flux", "waits", ("DEPEND", "PRIORITY", "SCHED")),
    ("flux", "runs", ("RUN", "CLEANUP")),
    ("flux", "", ("COMPLETED", "FAILED", "CANCELED", "TIMEOUT", "INACTIVE")),
    ("oarsub", "waits", ("Waiting", "Hold", "toLaunch", "toAckReservation", "Launching")),
    ("oarsub", "runs", ("Running", "Suspended", "Resuming", "Finishing")),
    ("oarsub", "", ("Terminated", "Error", "toError")),
]


@pytest.mark.parametrize(("command", "kind", "words"), STATES)
def test_state_of_a_scheduler(command: str, kind: str, words: Any) -> None:
    """In words, or in the letters that stand for them."""
    table = rjupyter.SCHEDULERS[command]
    letters = {"flux": {"DEPEND": "D", "PRIORITY": "P", "SCHED": "S", "RUN": "R", "CLEANUP": "C"}}
    for word in words:
        forms = [word, letters.get(command, {}).get(word, word)]
        for name in ("waits", "runs"):
            matches = [bool(re.fullmatch(getattr(table, name), form)) for form in forms]
            assert any(matches) if name == kind else not matches[0], (word, name)


@pytest.mark.parametrize("command", ["flux", "oarsub"])
def test_scheduler_that_has_a_row(command: str) -> None:
    scheduler = rjupyter.SCHEDULERS[command]
    assert all([scheduler.id, scheduler.query, scheduler.row, scheduler.waits, scheduler.runs, scheduler.cancel])
