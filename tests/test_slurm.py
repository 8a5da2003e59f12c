"""A cluster: the host is a login node, and Slurm runs what users submit. The Slurm is a real one, see private_slurm.py.

The tests here are those of the rig: what a test of rjupyter.py may take for granted.
"""

import os
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from conftest import Host, Laptop, User, processes_with, quiet_port, wait_until
from private_slurm import PrivateSlurm, find_obstacle


@pytest.fixture
def slurm(directory: Path) -> Iterator[PrivateSlurm]:
    """A Slurm with two idle nodes."""
    obstacle = find_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    slurm = PrivateSlurm(directory / "slurm")
    try:
        yield slurm.start()
    finally:
        slurm.stop()


@pytest.fixture
def login(slurm: PrivateSlurm, make_host: Callable[..., Host]) -> Host:
    """The login node: a host with Slurm's commands, on which the nodes' names resolve."""
    return make_host(prefix=slurm.login_prefix, **slurm.environment())


def submit(login: Host, script: str, *options: str) -> int:
    """Submit a job on the login node; what it prints goes to job.ID in the home directory."""
    argv = ["cd; sbatch", "--parsable", "--output=job.%j", *options, "--wrap", "'%s'" % script]
    run = login.sshd.ssh(" ".join(argv))
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def output(login: Host, job: int) -> List[str]:
    return (login.home / ("job.%d" % job)).read_text().splitlines()


def test_a_job_runs_at_once_on_another_machine(slurm: PrivateSlurm, login: Host, mark: str) -> None:
    job = submit(login, "hostname; echo $SLURMD_NODENAME; echo $HOME; echo $PATH; echo $RJUPYTER_TEST; echo $$")
    slurm.wait_for_state(job, "COMPLETED")
    name, node, home, path, mark_there, pid = output(login, job)
    assert name == node == slurm.job(job)["NodeList"] and name in slurm.nodes and name != os.uname().nodename
    assert home == str(login.home) and path == login.sshd.environment["PATH"] and mark_there == mark
    assert slurm.job(job)["ExitCode"] == "0:0" and int(pid) > 1


def test_a_node_is_reached_by_its_address_and_its_loopback_is_its_own(slurm: PrivateSlurm, login: Host) -> None:
    """Names resolve on the login node and on the nodes; a server on a node's loopback is not seen elsewhere."""
    port = quiet_port()
    serve = "python3 -m http.server %d --bind %s"
    script = "%s & %s" % (serve % (port, "127.0.0.1"), serve % (port, "$(hostname -i)"))
    submit(login, script, "--nodelist=node1")
    ask = "python3 -c \"import urllib.request as r; print(r.urlopen('http://%s:%d', timeout=5).status)\""
    wait_until(lambda: login.sshd.ssh(ask % ("node1", port)).stdout == "200\n", "the address of the node", 20)
    assert login.sshd.ssh(ask % (slurm.nodes["node1"], port)).stdout == "200\n"
    assert "refused" in login.sshd.ssh(ask % ("127.0.0.1", port)).stderr
    job = submit(login, "getent hosts node1", "--nodelist=node2")
    slurm.wait_for_state(job, "COMPLETED")
    assert output(login, job)[0].split() == [slurm.nodes["node1"], "node1"]


def test_a_job_waits_while_the_nodes_are_busy(slurm: PrivateSlurm, login: Host) -> None:
    blocking = slurm.occupy()
    job = submit(login, "hostname", "--nodelist=node2")
    assert slurm.wait_for_state(job, "PENDING")
    wait_until(lambda: slurm.job(job)["Reason"] == "Resources", "the reason", 10)
    wait_until(lambda: slurm.job(job)["StartTime"] != "Unknown", "when it is expected to start", 10)
    slurm.cancel(blocking[1])
    slurm.wait_for_state(job, "COMPLETED")
    assert output(login, job) == ["node2"] and slurm.squeue()[blocking[0]] == "RUNNING"


def test_a_cancelled_job_ends_with_all_that_it_started(slurm: PrivateSlurm, login: Host, mark: str) -> None:
    job = submit(login, "setsid sleep 1000 & exec sleep 1001")
    here = wait_until(lambda: [word for word in processes_with(mark).values() if word == "sleep 1001"], "the job", 20)
    assert here
    slurm.cancel(job)
    slurm.wait_for_state(job, "CANCELLED")
    wait_until(lambda: not [word for word in processes_with(mark).values() if word.startswith("sleep")], "its end", 10)


def test_a_job_that_fails_says_so(slurm: PrivateSlurm, login: Host) -> None:
    job = submit(login, "exit 3")
    slurm.wait_for_state(job, "FAILED")
    assert slurm.job(job)["ExitCode"] == "3:0" and slurm.job(job)["Reason"] == "NonZeroExitCode"


def test_a_time_limit_ends_a_job(slurm: PrivateSlurm, login: Host) -> None:
    job = submit(login, "exec sleep 1000", "-t", "10")
    slurm.wait_for_state(job, "RUNNING")
    slurm.limit(job)
    wait_until(lambda: slurm.squeue()[job] == "TIMEOUT", "the time limit", 60)


def test_a_controller_goes_and_comes_back_while_jobs_run_and_wait(slurm: PrivateSlurm, login: Host) -> None:
    blocking = slurm.occupy()
    job = submit(login, "hostname")
    slurm.stop_controller()
    assert "DOWN" in login.sshd.ssh("scontrol ping").stdout
    slurm.start_controller()
    assert slurm.squeue()[job] == "PENDING"
    slurm.cancel(*blocking)
    slurm.wait_for_state(job, "COMPLETED")


def test_a_drained_node_runs_nothing_new(slurm: PrivateSlurm, login: Host) -> None:
    running = submit(login, "exec sleep 1000", "--nodelist=node1")
    slurm.wait_for_state(running, "RUNNING")
    slurm.drain("node1")
    job = submit(login, "hostname", "--nodelist=node1")
    reason = "ReqNodeNotAvail, UnavailableNodes:node1\n"
    ask = "squeue --noheader --format=%%r --job=%d" % job
    wait_until(lambda: login.sshd.ssh(ask).stdout == reason, "the reason", 10)
    assert slurm.squeue()[running] == "RUNNING"
    slurm.resume("node1")
    slurm.wait_for_state(job, "COMPLETED")


def test_a_dead_node_ends_its_jobs(slurm: PrivateSlurm, login: Host, mark: str) -> None:
    job = submit(login, "exec sleep 1000", "--nodelist=node2", "--no-requeue")
    slurm.wait_for_state(job, "RUNNING")
    slurm.fail("node2")
    slurm.wait_for_state(job, "NODE_FAIL")
    assert "sleep 1000" not in processes_with(mark).values()
    assert slurm.node_states() == {"node1": "IDLE", "node2": "DOWN"}


def test_a_node_takes_logins_through_the_login_node(slurm: PrivateSlurm, login: Host, laptop: Laptop) -> None:
    sshd = slurm.start_sshd("node1", login.sshd)
    config = laptop.directory / "both"
    config.write_text(login.sshd.config.read_text() + sshd.config.read_text())
    argv = ["ssh", "-F", str(config), "-J", login.sshd.host, "node1", "hostname; echo $HOME"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert run.stdout == "node1\n%s\n" % login.home, run.stderr
    assert login.sshd.logins() == 1 and sshd.logins() == 1


def test_an_ordinary_user_submits(
    slurm: PrivateSlurm, make_host: Callable[..., Host], make_user: Callable[[str], User]
) -> None:
    user = make_user("/bin/bash")
    login = make_host(user=user, prefix=slurm.login_prefix, **slurm.environment())
    job = submit(login, "id -un; echo $HOME")
    slurm.wait_for_state(job, "COMPLETED")
    assert output(login, job) == [user.name, str(user.home)]


def test_two_rigs_side_by_side_and_nothing_is_left(slurm: PrivateSlurm, directory: Path) -> None:
    other = PrivateSlurm(directory / "other").start()
    pids = [machine.process.pid for machine in other.machines.values()]
    other.occupy("node1")
    assert slurm.squeue() == {} and len(other.squeue()) == 1
    bridge = other.bridge
    began = time.monotonic()
    other.stop()
    assert time.monotonic() - began < 5
    links = os.listdir("/sys/class/net")
    assert not [name for name in links if name.startswith(bridge)] and slurm.bridge in links
    assert not [pid for pid in pids if Path("/proc/%d" % pid).exists()]
    assert slurm.node_states() == {"node1": "IDLE", "node2": "IDLE"}
