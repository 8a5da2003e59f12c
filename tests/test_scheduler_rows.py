"""What schedulers print, and what we make of it: ids, states of Slurm, and lines, from samples of real forms."""

import json
import os
import re
from pathlib import Path
from typing import List

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


SLURM = "%s|%s|None|2026-11-25T19:58:41|node1|59:58"
ROWS = [
    ("123", "PREEMPTED"),
    ("123", "REQUEUED"),
    ("123", "COMPLETING"),
    ("123_0", "RUNNING"),
    ("123_[1-3%1]", "PENDING"),
    ("123+0", "RUNNING"),
    ("123+0", "PENDING"),
]
LIVE = ("PENDING", "RUNNING", "REQUEUED")


@pytest.mark.parametrize(("number", "word"), ROWS)
def test_row_of_slurm(number: str, word: str) -> None:
    """A job of our number beside one whose number begins with ours."""
    record = rjupyter.JobRecord(number="123", command="sbatch", created=0.0, node="login")
    row = SLURM % (number, word)
    state = rjupyter.state_in(record, 2000.0, "%s\n%s\n" % (row, row.replace("123", "1234", 1)))
    assert (state.word, state.is_live) == (word, word in LIVE)


LINES = [
    "123.pbs-server    my own job       ana                      0 H workq",
    "123[].pbs-server  job.sh           ana                      0 B workq",
    "    123 0.55500 job.sh     ana          hqw   11/24/2026 22:40:30 main.q@node1    1        ",
    "123     ana     PSUSP normal     login       node1       /home/ana/job.sh Nov 24 22:22",
    "123 5 The job exceeded its memory (code 34)",
]


@pytest.mark.parametrize("line", LINES)
def test_line_of_another_scheduler(line: str) -> None:
    """It is shown as it stands; a job whose number begins with ours is another one."""
    record = rjupyter.JobRecord(number="123", command="qsub", created=0.0, node="login")
    answer = "JOBID and a headline\n%s\n%s\n" % (line.replace("123", "1234", 1), line)
    state = rjupyter.state_in(record, 2000.0, answer)
    assert (state.word, state.reason, state.is_waiting) == ("PENDING", " ".join(line.split()), True)
    assert not rjupyter.state_in(record, 2000.0, answer.replace(line, "")).is_live


ENDED = [
    "123.torque    job.sh    ana    00:00:00 C batch",
    "123     ana     EXIT  normal     login       -           /home/ana/job.sh Nov 24 22:22",
    "123 4 Job terminated of its own accord",
]


@pytest.mark.parametrize("line", ENDED)
def test_line_of_a_job_that_is_over_and_kept_for_a_while(line: str) -> None:
    record = rjupyter.JobRecord(number="123", command="qsub", created=0.0, node="login")
    assert not rjupyter.state_in(record, 2000.0, line + "\n").is_live


@pytest.mark.parametrize("output", ["", SLURM % ("123", "REVOKED")])
def test_job_that_lives_though_its_own_cluster_does_not_tell(tmp_path: Path, output: str) -> None:
    """In a federation another cluster may have it: then it says itself that it lives."""
    (tmp_path / "seen").write_text("job.sh")
    record = rjupyter.JobRecord(number="123", command="sbatch", created=0.0, node="login")
    record.directory = str(tmp_path)
    assert not rjupyter.state_in(record, 2000.0, output).is_live
    (tmp_path / "begun.json").write_text(json.dumps(rjupyter.JobState(node="node1").facts()))
    (tmp_path / "alive").write_text("")
    assert rjupyter.state_in(record, 2000.0, output).is_live
    os.utime(tmp_path / "alive", (1, 1))
    assert not rjupyter.state_in(record, 2000.0, output).is_live


def test_a_scheduler_is_not_asked_more_often_where_its_answer_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user has made our directory in /tmp."""
    asked: List[str] = []

    def refuse(path: str) -> str:
        raise OSError("it is another user's")

    monkeypatch.setattr("rjupyter.private_dir", refuse)

    def ask(record: rjupyter.JobRecord) -> str:
        asked.append(record.number)
        return "123 PENDING"

    monkeypatch.setattr("rjupyter.ask_scheduler", ask)
    record = rjupyter.JobRecord(number="123", command="sbatch", created=0.0, node="login", cluster="alone")
    found = [rjupyter.query(record, 0.0) for _ in range(5)]
    assert len(asked) == 1 and {text for _, text in found} == {"123 PENDING"}


def test_job_that_gives_no_signs_for_a_while_has_not_ended_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its home was away, or its scheduler suspended it and has it still; a job that says so itself has ended."""
    record = rjupyter.JobRecord(number="123", command="qsub", created=0.0, node="login")
    record.directory = str(tmp_path)
    (tmp_path / "begun.json").write_text(json.dumps(rjupyter.JobState(node="node1").facts()))
    queue = tmp_path / "qstat"
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path, os.environ["PATH"]))
    seen = []
    rows = {"suspended": "123.srv job.sh ana 0 S workq", "queued": "123.srv job.sh ana 0 Q workq"}
    for number, step in enumerate(("alive", "", "suspended", "queued", "alive", "ended")):
        monkeypatch.setenv("RJUPYTER_TMP", str(tmp_path / str(number)))  # no answer is kept
        (tmp_path / (step or "looked")).write_text("")
        if step in ("", *rows):
            os.utime(str(tmp_path / "alive"), (1, 1))
        queue.write_text("#!/bin/sh\necho '%s'\n" % rows.get(step, "7.srv job.sh ana 0 R workq"))
        queue.chmod(0o755)
        seen.append(rjupyter.job_state(record).is_live)
    assert seen == [True, False, True, False, True, False]
    assert rjupyter.read_record(rjupyter.JobState, str(tmp_path / "end.json"))
