"""A grid of executions on a cluster: a job each, so many in the queue at once, whatever happens to links and nodes.

The Slurm is a real one, see private_slurm.py.
"""

import re
import threading
from typing import List, Set

import pytest
from execution import code, printed, results, write_notebook
from private_slurm import PrivateSlurm
from sides import Host, Laptop, Run, wait_until

GRID = ["--grid", "lr=[1,2,3]", "--grid", "model=[cnn]", "-j", "2"]
ALL = {"%d cnn" % lr for lr in (1, 2, 3)}


def begun(login: Host) -> List[str]:
    """Return what the notebooks wrote down when they began."""
    log = login.home / "log"
    return log.read_text().splitlines() if log.exists() else []


def start_grid(laptop: Laptop, login: Host, seconds: float) -> Run:
    """Start a grid of three, each of which writes down that it began, and takes its time."""
    log = "with open(%r, 'a') as log: log.write('%%s %%s\\n' %% (lr, model))" % str(login.home / "log")
    sources = ["lr, model = 0, ''", log, "import time; time.sleep(%s)" % seconds, "print(lr, model)"]
    write_notebook(laptop.home / "a.ipynb", code(sources[0], "parameters"), *sources[1:])
    return laptop.start("--slurm", "-t 1:00:00", "host", "execute", "a.ipynb", *GRID, has_terminal=False)


def wait_for_begun(run: Run, login: Host, count: int) -> None:
    def have_begun() -> bool:
        run._read(0.02)
        assert run._fds, run.text
        return len(begun(login)) >= count

    wait_until(have_begun, "%d have begun" % count, 300)


@pytest.mark.nbclient
def test_grid_of_three_has_two_jobs_at_most_and_survives_a_cut_connection(
    laptop: Laptop, slurm: PrivateSlurm, login: Host
) -> None:
    """`-j 2`: never more than two of ours in the queue, waiting or running; each is run once; three results. (16)"""
    run = start_grid(laptop, login, 1)
    most, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(1):
            live = [state for state in slurm.squeue().values() if state in ("PENDING", "RUNNING", "CONFIGURING")]
            most[0] = max(most[0], len(live))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for count in (1, 3):
            wait_for_begun(run, login, count)
            login.sshd.end_connections()
        assert run.wait(600) == 0, run.text
        assert "nstall" not in run.stderr  # nbclient is there, and that is all that it takes
    finally:
        is_over.set()
        watcher.join()
    assert {printed(path)[-1].strip() for path in results(laptop, run)} == ALL
    assert sorted(begun(login)) == sorted(ALL)
    assert most[0] == 2


@pytest.mark.nbclient
def test_grid_of_three_and_a_node_that_is_killed(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    """Three results, or a status that is not 0 and a summary that says which are missing; it ends by itself. (16)"""
    run = start_grid(laptop, login, 3)
    wait_for_begun(run, login, 2)
    slurm.fail("node1")
    status = run.wait(600)
    whole: Set[str] = {printed(path)[-1].strip() for path in results(laptop, run)} & ALL
    missing = ALL - whole
    assert (status == 0) == (not missing), run.text
    assert len(whole) >= 1, run.text
    end = "\n".join(run.stderr.splitlines()[-20:])
    for values in missing:
        lr, model = values.split()
        assert re.search(r"\b%s\b.*%s|%s.*\b%s\b" % (lr, model, model, lr), end), end
