"""Schedulers other than Slurm, by --submit: a real Grid Engine, see private_gridengine.py; shims of the others.

The user of the Grid Engine is a real one, whose jobs get no more than what his account and his start-up files say.
"""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from client import check_failure, compute
from conftest import Host, Laptop, User, quiet_port, wait_until
from jupyters import jupyter_for_everyone
from private_gridengine import PrivateGridEngine, find_gridengine_obstacle
from test_execute import printed, write_notebook

WHERE = "import os; print(os.uname().nodename, os.getcwd())"
QSUB = ["--submit", "qsub -o /dev/null -j y"]


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


@pytest.fixture
def login(engine: PrivateGridEngine, make_host: Callable[..., Host], make_user: Callable[[str], User]) -> Host:
    """The login node, for a user whose login shell knows where Jupyter is."""
    user = make_user("/bin/bash")
    user.write(".bash_profile", "export PATH=%s:$PATH\n" % jupyter_for_everyone())
    user.write("work/readme", "")
    return make_host(user=user, prefix=engine.login_prefix, **engine.environment())


def jobs(laptop: Laptop) -> List[Dict[str, Any]]:
    found = [json.loads(line) for line in laptop.run("host", "list", "--json").stdout.splitlines()]
    return [thing for thing in found if thing["event"] == "job"]


def nothing_left(engine: PrivateGridEngine) -> bool:
    return not engine.qstat() and "jupyter" not in engine.processes() and "agent.py" not in engine.processes()


def test_grid_engine_runs_the_server_and_stop_ends_it(laptop: Laptop, engine: PrivateGridEngine, login: Host) -> None:
    run = laptop.start("--local-port", str(quiet_port()), *QSUB, "host:work", has_terminal=False)
    url = run.url()
    assert compute(url, WHERE) == "node1 %s\n" % (login.home / "work")
    run.expect(r"Forwarding 127\.0\.0\.1:\d+ to %s:\d+ \(node1\) through host\." % engine.nodes["node1"])
    (job,) = jobs(laptop)
    assert (job["job"], job["word"], job["node"]) == ("1", "RUNNING", "node1")
    run.interrupt()
    assert run.wait() == 0
    again = laptop.start(*QSUB, "host:work", has_terminal=False)
    assert again.url() == url
    assert "Found Jupyter Notebook" in again.stderr
    again.interrupt()
    again.wait()
    stop = laptop.run("host", "stop")
    assert stop.status == 0, stop.text
    wait_until(lambda: nothing_left(engine), "no job and no process of it", 20)
    assert not jobs(laptop)


def test_grid_engine_is_waited_for_and_a_job_that_is_deleted_is_said(
    laptop: Laptop, engine: PrivateGridEngine, login: Host
) -> None:
    blocking = engine.occupy()
    run = laptop.start(*QSUB, "host", has_terminal=False)
    run.expect(r"^Job 2 pending\.$")
    engine.cancel(blocking)
    assert compute(run.url(), WHERE).startswith("node1 ")
    engine.cancel(2)
    assert run.wait() == 4
    assert "job: it has ended: cancelled, failed or out of time" in run.stderr
    # Grid Engine kills the group of the job's process; Jupyter has one of its own, and ends all the same.
    wait_until(lambda: nothing_left(engine), "no job and no process of it", 20)


def test_grid_engine_holds_a_job_and_stop_deletes_it(laptop: Laptop, engine: PrivateGridEngine, login: Host) -> None:
    run = laptop.start("--submit", "qsub -h -o /dev/null -j y {script}", "host", has_terminal=False)
    run.expect(r"^Job 1 pending \(hqw\)\.$")
    run.interrupt()
    assert run.wait() == 130
    assert "Job 1 stays." in run.stderr
    stop = laptop.run("host", "stop", jobs(laptop)[0]["id"])
    assert (stop.status, "Cancelled job 1" in stop.stderr) == (0, True), stop.text
    assert not engine.qstat()
    check_failure(laptop.run("--submit", "qsub -q nosuch.q", "host"), 1, "qsub did not take the job", "nosuch.q")


def test_grid_engine_executes_a_notebook(laptop: Laptop, engine: PrivateGridEngine, login: Host) -> None:
    write_notebook(laptop.home / "train.ipynb", WHERE, "print(6 * 7)")
    run = laptop.run(*QSUB, "host:work", "execute", "train.ipynb")
    assert run.status == 0, run.text
    assert printed(laptop.home / "train.executed.ipynb") == ["node1 %s\n" % (login.home / "work"), "42\n"]
    wait_until(lambda: nothing_left(engine), "the end of its job", 20)


def test_grid_engine_ends_a_job_whose_time_is_up(laptop: Laptop, engine: PrivateGridEngine, login: Host) -> None:
    """Wherever it is then: Jupyter may still be starting on a machine that is busy."""
    run = laptop.start("--submit", "qsub -o /dev/null -j y -l h_rt=0:0:12", "host", has_terminal=False)
    assert run.wait() == 4
    assert "job: it has ended: cancelled, failed or out of time" in run.stderr
    wait_until(lambda: nothing_left(engine), "no job and no process of it", 20)
