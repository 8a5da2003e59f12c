"""Schedulers other than Slurm, by --submit: a real Grid Engine, see private_gridengine.py; shims of the others.

The user of the Grid Engine is a real one, whose jobs get no more than what his account and his start-up files say.
"""

import json
import os
import re
import signal
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
import shim_scheduler
from client import check_failure, compute, held, listed, whereabouts
from jupyters import jupyter_for_everyone, standin
from notebooks import printed, write_notebook
from private_gridengine import PrivateGridEngine, find_gridengine_obstacle
from private_machines import Cluster, find_obstacle
from readme import README
from sides import Host, Laptop, User, quiet_port, wait_until, without_port

import rjupyter

WHERE = "import os; print(os.uname().nodename, os.getcwd())"
QSUB = ["--submit", "qsub -o /dev/null -j y -l h_rt=4:00:00"]


@pytest.fixture
def engine(directory: Path) -> Iterator[PrivateGridEngine]:
    """A Grid Engine with one free slot."""
    obstacle = find_gridengine_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    engine = PrivateGridEngine(directory / "engine")
    try:
        yield engine.start()
    finally:
        engine.stop()


def login_for(
    engine: PrivateGridEngine, make_host: Callable[..., Host], make_user: Callable[[str], User], jupyter: Path
) -> Host:
    """Return the login node, for a user whose login shell knows where Jupyter is."""
    user = make_user("/bin/bash")
    user.write(".bash_profile", "export PATH=%s:$PATH\n" % jupyter)
    user.write("work/readme", "")
    return make_host(user=user, prefix=engine.login_prefix, **engine.environment())


@pytest.fixture
def login(engine: PrivateGridEngine, make_host: Callable[..., Host], make_user: Callable[[str], User]) -> Host:
    """The login node, with the stand-in for Jupyter."""
    return login_for(engine, make_host, make_user, standin())


def see_nothing_left(engine: PrivateGridEngine) -> None:
    wait_until(lambda: nothing_left(engine), "no job and no process of it", 20, 0.5)


def nothing_left(engine: PrivateGridEngine) -> bool:
    return not engine.qstat() and "jupyter" not in engine.processes() and "agent.py" not in engine.processes()


@pytest.mark.jupyter
def test_grid_engine_runs_the_server_and_a_notebook(
    laptop: Laptop, engine: PrivateGridEngine, make_host: Callable[..., Host], make_user: Callable[[str], User]
) -> None:
    """And stop ends the server."""
    login = login_for(engine, make_host, make_user, jupyter_for_everyone())
    with laptop.opened("--local-port", str(quiet_port()), *QSUB, "host:work") as run:
        url = run.url()
        assert compute(url, WHERE) == "node1 %s\n" % (login.home / "work")
        run.expect(r"Forwarding 127\.0\.0\.1:\d+ to %s:\d+ \(node1\) through host\." % engine.nodes["node1"])
        (job,) = listed(laptop, "job")
        assert (job["job"], job["word"], job["node"]) == ("1", "RUNNING", "node1")
    with laptop.opened(*QSUB, "host:work") as again:
        assert without_port(again.url()) == without_port(url)
        assert "Found Jupyter Notebook" in again.stderr
    stop = laptop.run("host", "stop")
    assert stop.status == 0, stop.text
    see_nothing_left(engine)
    assert not listed(laptop, "job")
    write_notebook(laptop.home / "train.ipynb", WHERE, "print(6 * 7)")
    run = laptop.run(*QSUB, "host:work", "execute", "train.ipynb")
    assert run.status == 0, run.text
    assert printed(laptop.home / "train.executed.ipynb") == ["node1 %s\n" % (login.home / "work"), "42\n"]
    see_nothing_left(engine)


@pytest.mark.waits
def test_grid_engine_is_waited_for_and_a_job_that_ends_is_said(
    laptop: Laptop, engine: PrivateGridEngine, login: Host
) -> None:
    """One that is deleted, and one whose time is up, wherever it is then."""
    blocking = engine.occupy()
    run = laptop.start(*QSUB, "host", has_terminal=False)
    run.expect(r"^Job 2 pending \(2 .* qw .*\)\.$")
    engine.cancel(blocking)
    assert whereabouts(run.url()).startswith("node1 ")
    engine.cancel(2)
    assert run.wait() == 4
    assert "job: it has ended: cancelled, failed or out of time" in run.stderr
    # Grid Engine kills the group of the job's process; Jupyter has one of its own, and ends all the same.
    see_nothing_left(engine)
    run = laptop.start("--submit", "qsub -o /dev/null -j y -l h_rt=0:00:12", "host", has_terminal=False)
    assert run.wait() == 4
    assert "job: it has ended: cancelled, failed or out of time" in run.stderr
    see_nothing_left(engine)


def test_grid_engine_holds_a_job_and_stop_deletes_it(laptop: Laptop, engine: PrivateGridEngine, login: Host) -> None:
    run = laptop.start("--submit", "qsub -h -o /dev/null -j y {script}", "host", has_terminal=False)
    run.expect(r"^Job 1 pending \(1 .* hqw .*\)\.$")
    run.interrupt()
    assert run.wait() == 130
    assert "Job 1 stays." in run.stderr
    stop = laptop.run("host", "stop", listed(laptop, "job")[0]["id"])
    assert (stop.status, "Cancelled job 1" in stop.stderr) == (0, True), stop.text
    assert not engine.qstat()
    check_failure(laptop.run("--submit", "qsub -q nosuch.q", "host"), 1, "qsub did not take the job", "nosuch.q")


# -- what they print --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("qsub", "123.pbs.example.org"),
        ("qsub", "123"),
        ("qsub", 'This is cluster 7.\nYour job 123 ("job2.sh") has been submitted'),
        ("bsub", "Budget of project <42> is used.\nJob <123> is submitted to default queue <normal>."),
        ("condor_submit", "Submitting job(s).\n1 job(s) submitted to cluster 123."),
    ],
)
def test_id_of_a_job(command: str, said: str) -> None:
    match = re.search(rjupyter.SCHEDULERS[command].id, said)
    assert match is not None and match.group(1) == "123"


# -- a job that was never taken ---------------------------------------------------------------------------------------

REFUSALS = {
    "refused": ["sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1"],
    "refused by one that nobody knows": ["spool", "echo 'the spool is full'; exit 1"],
    "without a number": ["spool", "echo 'thank you'"],
    "not executable": ["qsub", ""],
}


def submits(directory: Path, command: str, script: str) -> List[str]:
    """Let a command of a scheduler do this, where nothing tells of its jobs; return how it is used."""
    (directory / "bin").mkdir(exist_ok=True)
    if script:
        (directory / "bin" / command).write_text("#!/bin/sh\n%s\n" % script)
        (directory / "bin" / command).chmod(0o755)
    return ["--submit", "%s {script}" % (directory / "bin" / command), "host"]


@pytest.mark.parametrize("action", ["open", pytest.param("execute", marks=pytest.mark.jupyter)])
def test_of_a_job_that_was_not_taken_nothing_is_left(
    laptop: Laptop, directory: Path, make_host: Callable[..., Host], action: str
) -> None:
    host = make_host(front=str(directory / "bin"))
    words = ["execute", "a.ipynb"] if action == "execute" else []
    write_notebook(laptop.home / "a.ipynb", "print(1)")
    for how, (command, script) in REFUSALS.items():
        run = laptop.run(*submits(directory, command, script), *words)
        check_failure(run, 1, "did not take the job")
        assert not list(host.home.glob(".local/state/rjupyter/jobs/*")), how
    assert not listed(laptop, "job")
    run = laptop.run("host", *words) if words else held(laptop, "host")
    assert ("Executed" if words else "Launched") in run.stderr and "Job" not in run.stderr, run.text


def test_a_submission_that_was_killed_is_not_waited_for(
    laptop: Laptop, directory: Path, make_host: Callable[..., Host]
) -> None:
    """With all that the login had started, as its node does it that is started anew."""
    pids = directory / "pids"
    script = "test -e {0} && exit 1; echo $$ $PPID >{0}.new; mv {0}.new {0}; exec sleep 1000".format(pids)
    words = submits(directory, "spool", script)
    make_host(front=str(directory / "bin"))
    run = laptop.start(*words, has_terminal=False)
    wait_until(pids.exists, "it is being submitted")
    for pid in reversed(pids.read_text().split()):
        os.kill(int(pid), signal.SIGKILL)
    assert run.wait(60)
    assert not listed(laptop, "job")
    assert "Job" not in held(laptop, "host").stderr


# -- a job on disks that are full or late -----------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> rjupyter.JobRecord:
    """A job that waits, by qstat's word, and is gone when qdel has been called."""
    queue = "test -e %s || echo '7.pbs job.sh ana 0 Q workq'" % (tmp_path / "cancelled")
    for command, script in (("qstat", queue), ("qdel", "touch %s" % (tmp_path / "cancelled"))):
        (tmp_path / command).write_text("#!/bin/sh\n%s\n" % script)
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path, os.environ["PATH"]))
    monkeypatch.setenv("RJUPYTER_TMP", str(tmp_path))
    job = rjupyter.JobRecord(created=0.0, node="", number="7", command="qsub", request=rjupyter.Request())
    job.id, job.directory = "j12ab", str(tmp_path / "j12ab")
    (tmp_path / "j12ab").mkdir()
    return job


def test_job_is_looked_for_where_nothing_can_be_kept_of_the_answer(
    job: rjupyter.JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RJUPYTER_TMP", "/dev/full")
    assert rjupyter.KINDS["job"].describe(job).word == "PENDING"


def test_job_is_cancelled_where_nothing_can_be_written_beside_it(job: rjupyter.JobRecord, tmp_path: Path) -> None:
    """As where a quota of files is used up."""
    (tmp_path / "j12ab").rmdir()
    rjupyter.KINDS["job"].end(job)
    assert (tmp_path / "cancelled").exists()


def test_reply_of_a_job_that_is_over_may_be_late(job: rjupyter.JobRecord, tmp_path: Path) -> None:
    """On a home that shows files late; what never came was not said."""
    (tmp_path / "j12ab/ended").touch()
    gone_at: Dict[str, float] = {}
    assert rjupyter.KINDS["job"].replied(job, gone_at) is None
    gone_at = {name: moment - rjupyter.LATE_S for name, moment in gone_at.items()}
    with pytest.raises(rjupyter.Failure, match="job 7 ended before it had started"):
        rjupyter.KINDS["job"].replied(job, gone_at)
    (tmp_path / "j12ab/said").write_text('{"kind": "reply", "reply": {"id": "r1"}}\n')
    assert rjupyter.KINDS["job"].replied(job, gone_at) == {"id": "r1"}


def test_stop_of_all_in_a_directory_leaves_the_jobs_of_others(
    laptop: Laptop, directory: Path, make_host: Callable[..., Host]
) -> None:
    host = make_host(front=str(directory / "bin"))
    (host.home / "work/deep").mkdir(parents=True)
    (host.home / "other").mkdir()
    *submit, _ = submits(directory, "spool", "echo request 7")
    laptop.start(*submit, "host:other", has_terminal=False).expect(r"^Job 7 submitted\.$")
    laptop.end_runs()
    for place in ("host:work", "host:work/deep", "host:other"):
        held(laptop, "--new", place)
    assert laptop.run("host:work", "stop", "--all").status == 0
    assert [server["root_dir"] for server in listed(laptop)] == [str(host.home / "other")]
    assert [job["job"] for job in listed(laptop, "job")] == ["7"]


# -- shims ------------------------------------------------------------------------------------------------------------

# What the README says for each, what a job that is held shows, and what is asked of the scheduler.
SHIMS = {
    "pbs": ("qsub -o /dev/null -j oe -l walltime=4:00:00", "H", ["qstat"], ["qdel", "41"]),
    "lsf": ("bsub -o /dev/null -W 4:00", "PSUSP", ["bjobs", "-w"], ["bkill", "41"]),
    "condor": (
        "condor_submit executable={script} request_cpus=2 -queue 1",
        "No credits are left",
        ["condor_q", "-autoformat", "ClusterId", "JobStatus", "HoldReason"],
        ["condor_rm", "41"],
    ),
}


def test_readme_has_these_commands() -> None:
    for command in [QSUB[1], *(command for command, *_ in SHIMS.values())]:
        assert '`--submit "%s"`' % command in README


class Shims:
    """The shims of a scheduler on a login node, and a machine on which they run jobs."""

    def __init__(self, directory: Path, make_host: Callable[..., Host]) -> None:
        self.directory = directory / "shims"
        self.make_host = make_host
        self.cluster = Cluster(directory / "cluster", ["node1"])

    def start(self, kind: str) -> Host:
        self.cluster.start_machines()
        binaries = shim_scheduler.install(self.directory, kind, self.cluster.machines["node1"].enter())
        host = self.make_host(front=str(binaries), prefix=self.cluster.login_prefix)
        (host.home / "work").mkdir()
        return host

    def asked(self) -> List[List[str]]:
        return [json.loads(line) for line in (self.directory / "asked").read_text().splitlines()]

    def nothing_left(self) -> bool:
        running = self.cluster.machines["node1"].run("ps", "ax", "-o", "args=").stdout
        return "jupyter" not in running and "agent.py" not in running and not shim_scheduler.jobs(self.directory)


@pytest.fixture
def shims(directory: Path, make_host: Callable[..., Host]) -> Iterator[Shims]:
    obstacle = find_obstacle(["csh"])
    if obstacle:
        pytest.skip(obstacle)
    shims = Shims(directory, make_host)
    try:
        yield shims
    finally:
        shims.cluster.stop()


@pytest.mark.parametrize("kind", SHIMS)
def test_shim_of_a_scheduler_runs_the_server_and_stop_cancels_it(laptop: Laptop, shims: Shims, kind: str) -> None:
    command, held, query, cancel = SHIMS[kind]
    login = shims.start(kind)
    (shims.directory / "held").touch()
    options = ["--submit", command, "--init", "export PATH=%s:%s:$PATH" % (shims.directory / "bin", standin())]
    run = laptop.start(*options, "host:work", has_terminal=False)
    run.expect(r"^Job 41 pending \(41\b.* %s\b.*\)\.$" % held)
    (shims.directory / "go").touch()
    assert whereabouts(run.url()) == "node1 %s" % (login.home / "work")
    (job,) = listed(laptop, "job")
    assert (job["job"], job["word"], job["node"]) == ("41", "RUNNING", "node1")
    run.interrupt()
    assert run.wait() == 0
    stop = laptop.run("host", "stop")
    assert stop.status == 0, stop.text
    wait_until(shims.nothing_left, "no job and no process of it", 20)
    assert not listed(laptop, "job")
    submitted, *others = shims.asked()
    given = [word.replace("{script}", "") for word in command.split()]
    assert [word for word in given if word in " ".join(submitted)] == given
    assert query in others and cancel in others
    assert not [words for words in others if words not in (query, cancel)]


def test_shim_of_lsf_loses_a_job_that_waits(laptop: Laptop, shims: Shims) -> None:
    """Cancelled from outside: it is in no answer any more, and bjobs fails when there is no job at all."""
    shims.start("lsf")
    run = laptop.start("--submit", SHIMS["lsf"][0], "host", has_terminal=False)
    run.expect(r"^Job 41 pending \(41 .*\)\.$")
    shim_scheduler.cancel(shims.directory, "41")
    assert run.wait() == 4
    assert "job 41 ended before it had started\n  why: job: it has ended: cancelled, failed or" in run.stderr


def test_shim_of_a_scheduler_that_shows_jobs_late_and_one_that_is_killed_before(laptop: Laptop, shims: Shims) -> None:
    """It was in no answer yet as its time was up: that it ran, and gives no sign of life any more, is the end."""
    shims.start("pbs")
    (shims.directory / "bin/qstat").write_text("#!/bin/sh\n")
    (shims.directory / "go").touch()
    run = laptop.start("--submit", SHIMS["pbs"][0], "host", has_terminal=False)
    assert whereabouts(run.url()).startswith("node1 ")
    shims.cluster.machines["node1"].run("pkill", "-9", "-f", "agent.py|jupyter")
    assert run.wait() == 4
    assert "job: it has ended: cancelled, failed or out of time" in run.stderr


def test_shim_of_a_job_that_was_killed_a_moment_ago_is_not_returned_to(laptop: Laptop, shims: Shims) -> None:
    """Nothing listens there any more, but that the job has ended is not known yet."""
    shims.start("pbs")
    (shims.directory / "go").touch()
    with laptop.opened("--submit", SHIMS["pbs"][0], "host") as run:
        run.url()
    shims.cluster.machines["node1"].run("pkill", "-9", "-f", "agent.py|jupyter")
    with laptop.opened("--submit", SHIMS["pbs"][0], "host") as again:
        assert without_port(again.url()) != without_port(run.url())
        assert "Job 42 submitted" in again.stderr


def test_shim_of_a_scheduler_that_we_know_nothing_of(laptop: Laptop, shims: Shims) -> None:
    shims.start("other")
    run = laptop.start("--submit", "spool {script}", "host", has_terminal=False)
    run.expect(r"^Job 41 submitted\.$")
    (shims.directory / "go").touch()
    assert whereabouts(run.url()).startswith("node1 ")
    stop = laptop.run("host", "stop")
    assert (stop.status, "Stopped Jupyter Notebook" in stop.stderr) == (0, True), stop.text
    assert run.wait() == 4
    assert "it was stopped" in run.stderr
    wait_until(shims.nothing_left, "no job and no process of it", 20)
    assert not listed(laptop, "job")
    (shims.directory / "go").unlink()
    run = laptop.start("--submit", "spool {script}", "host", has_terminal=False)
    run.expect(r"^Job 42 submitted\.$")
    run.interrupt()
    run.wait()
    (job,) = listed(laptop, "job")
    check_failure(laptop.run("host", "stop", job["id"]), 1, "job 42 was not cancelled", "spool is not known here")
    shim_scheduler.cancel(shims.directory, "42")
