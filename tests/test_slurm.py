"""A cluster: the host is a login node, and Slurm runs what users submit. The Slurm is a real one, see private_slurm.py.

The first half tests the rig: what the second half, which tests rjupyter.py, may take for granted.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Callable, List

import pytest
from client import api, check_failure, compute, events_of, listed, token_of, whereabouts
from notebooks import code, printed, write_notebook
from private_slurm import PrivateSlurm
from readme import help_events
from sides import Host, Laptop, Run, User, processes_with, quiet_port, wait_until, without_port


def submit(login: Host, script: str, *options: str) -> int:
    """Submit a job on the login node; what it prints goes to job.ID in the home directory."""
    argv = ["cd; sbatch", "--parsable", "--output=job.%j", *options, "--wrap", "'%s'" % script]
    run = login.sshd.ssh(" ".join(argv))
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def output(login: Host, job: int) -> List[str]:
    return (login.home / ("job.%d" % job)).read_text().splitlines()


def test_jobs_run_at_once_on_another_machine_fail_and_are_cancelled(
    slurm: PrivateSlurm, login: Host, mark: str
) -> None:
    """A cancelled one ends with all that it started."""
    job = submit(login, "hostname; echo $SLURMD_NODENAME; echo $HOME; echo $PATH; echo $RJUPYTER_TEST; echo $$")
    slurm.wait_for_state(job, "COMPLETED")
    name, node, home, path, mark_there, pid = output(login, job)
    assert name == node == slurm.job(job)["NodeList"] and name in slurm.nodes and name != os.uname().nodename
    assert home == str(login.home) and path == login.sshd.environment["PATH"] and mark_there == mark
    assert slurm.job(job)["ExitCode"] == "0:0" and int(pid) > 1
    job = submit(login, "exit 3")
    slurm.wait_for_state(job, "FAILED")
    assert slurm.job(job)["ExitCode"] == "3:0" and slurm.job(job)["Reason"] == "NonZeroExitCode"
    job = submit(login, "setsid sleep 1000 & exec sleep 1001")
    wait_until(lambda: [word for word in processes_with(mark).values() if word == "sleep 1001"], "the job", 20)
    slurm.cancel(job)
    slurm.wait_for_state(job, "CANCELLED")
    wait_until(lambda: not [word for word in processes_with(mark).values() if word.startswith("sleep")], "its end", 10)


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


def test_a_job_waits_while_the_nodes_are_busy_and_the_controller_is_away(slurm: PrivateSlurm, login: Host) -> None:
    blocking = slurm.occupy()
    job = submit(login, "hostname", "--nodelist=node2")
    assert slurm.wait_for_state(job, "PENDING")
    wait_until(lambda: slurm.job(job)["Reason"] == "Resources", "the reason", 10)
    wait_until(lambda: slurm.job(job)["StartTime"] != "Unknown", "when it is expected to start", 10)
    slurm.stop_controller()
    assert "DOWN" in login.sshd.ssh("scontrol ping").stdout
    slurm.start_controller()
    assert slurm.squeue()[job] == "PENDING"
    slurm.cancel(blocking[1])
    slurm.wait_for_state(job, "COMPLETED")
    assert output(login, job) == ["node2"] and slurm.squeue()[blocking[0]] == "RUNNING"


def test_a_drained_node_runs_nothing_new_and_a_dead_one_ends_its_jobs(
    slurm: PrivateSlurm, login: Host, mark: str
) -> None:
    running = submit(login, "exec sleep 1000", "--nodelist=node1")
    slurm.wait_for_state(running, "RUNNING")
    slurm.drain("node1")
    job = submit(login, "hostname", "--nodelist=node1")
    reason = "ReqNodeNotAvail, UnavailableNodes:node1\n"
    ask = "squeue --noheader --format=%%r --job=%d" % job
    wait_until(lambda: login.sshd.ssh(ask).stdout == reason, "the reason", 10, 0.2)
    assert slurm.squeue()[running] == "RUNNING"
    slurm.resume("node1")
    slurm.wait_for_state(job, "COMPLETED")
    job = submit(login, "exec sleep 1002", "--nodelist=node2", "--no-requeue")
    slurm.wait_for_state(job, "RUNNING")
    slurm.fail("node2")
    slurm.wait_for_state(job, "NODE_FAIL")
    assert "sleep 1002" not in processes_with(mark).values()
    assert slurm.squeue()[running] == "RUNNING" and slurm.node_states()["node2"] == "DOWN"


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
    other.stop()
    links = os.listdir("/sys/class/net")
    assert not [name for name in links if name.startswith(bridge)] and slurm.bridge in links
    assert not [pid for pid in pids if Path("/proc/%d" % pid).exists()]
    assert slurm.node_states() == {"node1": "IDLE", "node2": "IDLE"}


# -- rjupyter.py ------------------------------------------------------------------------------------------------------

WHERE = "import os; print(os.uname().nodename, os.getcwd())"


def start_in_job(laptop: Laptop) -> Run:
    run = laptop.start("--slurm", "-t 1:00:00", "host", has_terminal=False)
    run.expect("To end it")
    return run


@pytest.mark.jupyter
def test_open_in_a_job_and_come_back(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    (login.home / "work").mkdir()
    options = ["--local-port", str(quiet_port()), "--slurm", "-t 1:00:00 -w node2"]
    with laptop.opened(*options, "host:work") as run:
        url = run.url()
        assert compute(url, WHERE) == "node2 %s\n" % (login.home / "work")
        assert "Job 1 " in run.stderr
        assert "on node2 in ~/work (pid " in run.stderr
        run.expect(r"Forwarding 127\.0\.0\.1:\d+ to %s:\d+ \(node2\) through host\." % slurm.nodes["node2"])
        run.expect("an address of node2: whoever reaches that can connect; the token alone keeps them out")
        (job,) = listed(laptop, "job")
        assert (job["job"], job["word"], job["node"]) == ("1", "RUNNING", "node2")
        assert 0 < job["left_s"] <= 3600
        table = laptop.run("host", "list").stdout
        assert re.search(r"^j[0-9a-f]{4}  1    running  node2  5\d min  a server", table, re.MULTILINE), table
        assert re.search(r"^[0-9a-f]{4}  live ", table, re.MULTILINE)
    for arguments in (["--slurm", "-t 1:00:00 -w node2", "host:work"], ["host:work"]):
        with laptop.opened(*arguments) as again:
            assert without_port(again.url()) == without_port(url)
            assert "Found Jupyter Notebook" in again.stderr
    assert len(slurm.squeue()) == 1
    stop = laptop.run("host", "stop")
    assert stop.status == 0, stop.text
    slurm.wait_for_state(1, "CANCELLED", "COMPLETED")
    assert not listed(laptop, "job")
    assert not login.servers()


def test_wait_for_a_busy_cluster_whose_controller_goes_and_comes_back(
    laptop: Laptop, slurm: PrivateSlurm, login: Host
) -> None:
    blocking = slurm.occupy()
    run = laptop.start("--slurm", "-t 10", "host", has_terminal=False)
    run.expect(r"^Job 3 pending \((Resources|Priority|None)\)|^Job 3 pending")
    run.expect(r"^Job 3 pending \((Resources|Priority)\), expected ([\d-]+ )?\d\d:\d\d\.$")
    # Another laptop, or we again: the same job.
    second = laptop.start("host", has_terminal=False)
    second.expect("^Job 3 pending")
    slurm.stop_controller()
    run.expect("Job 3 unknown")
    slurm.start_controller()
    slurm.cancel(*blocking)
    assert token_of(run.url()) == token_of(second.url())
    assert whereabouts(run.url()).startswith("node")
    assert sorted(slurm.squeue()) == [1, 2, 3]


def test_ctrl_c_while_it_waits(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    """On a terminal it asks once; without one the job stays, and stop cancels it."""
    slurm.occupy()
    run = laptop.start("--slurm", "-t 10", "host")
    run.expect("job 3 pending|Job 3 pending")
    run.interrupt()
    run.expect(r"Cancel job 3\? \[y/N\] ")
    run.type("n\n")
    assert run.wait() == 130
    run.expect("Job 3 stays.\nTo come back: .*rjupyter.py .*--slurm '-t 10' host\nTo cancel it: .* stop j[0-9a-f]{4}")
    assert slurm.squeue()[3] == "PENDING"
    run = laptop.start("--slurm", "-t 10", "host", has_terminal=False)
    run.expect("Job 3 pending")
    run.interrupt()
    assert run.wait() == 130
    assert "Job 3 stays." in run.stderr
    (job,) = listed(laptop, "job")
    assert (job["word"], job["is_waiting"]) == ("PENDING", True)
    again = laptop.start("host")
    again.expect("Job 3 pending")
    again.interrupt()
    again.expect("Cancel job 3")
    again.type("y\n")
    assert again.wait() == 130
    again.expect("Cancelled job 3")
    assert slurm.squeue()[3] == "CANCELLED"
    run = laptop.start("--slurm", "-t 10", "host", has_terminal=False)
    run.expect("Job 4 pending")
    run.interrupt()
    assert run.wait() == 130
    stop = laptop.run("host", "stop")
    assert (stop.status, bool(re.search(r"Cancelled job 4 \(j[0-9a-f]{4}\)", stop.stderr))) == (0, True), stop.text
    assert slurm.squeue()[4] == "CANCELLED"


def test_shut_down_in_the_browser_ends_the_job(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    run = start_in_job(laptop)
    api(run.url(), "shutdown", "POST")
    assert run.wait() == 4
    assert "it was shut down" in run.stderr
    slurm.wait_for_state(1, "COMPLETED")


def test_job_that_cannot_be(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    check_failure(laptop.run("--slurm", "-p nosuch", "host"), 1, "sbatch did not take the job", "nosuch")
    check_failure(laptop.run("--slurm", "-t '1", "host"), 2, "wrong usage", "quotation")
    check_failure(laptop.run("--slurm", "-n1", "--socket", "host"), 2, "wrong usage", "--via-node")
    run = laptop.run("--slurm", "-t 10", "--python", "/no/python", "host")
    assert run.status == 3 and "/no/python: not there" in run.stderr, run.text


def test_job_script_that_fails(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    blocking = slurm.occupy()
    run = laptop.start("--slurm", "-t 10", "host", has_terminal=False)
    run.expect("Job 3 pending")
    (program,) = login.home.glob(".local/state/rjupyter/jobs/*/agent.py")
    program.write_text("import sys\nsys.exit('no such module')\n")
    slurm.cancel(*blocking)
    assert run.wait() == 4
    assert "rjupyter: job 3 ended before it had started\n  why: job: it failed\n       no such module" in run.stderr


def test_drained_node(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    for node in slurm.nodes:
        slurm.drain(node)
    run = laptop.start("--slurm", "-t 10 -w node1", "host", has_terminal=False)
    run.expect(r"^Job 1 pending \(.*node1.*\)\.$")
    slurm.resume("node1")
    assert whereabouts(run.url()).startswith("node1 ")


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.jupyter), ["--socket"]])
def test_tunnel_that_ends_on_the_node(
    laptop: Laptop, slurm: PrivateSlurm, login: Host, directory: Path, options: List[str]
) -> None:
    nodes = [slurm.start_sshd(node, login.sshd) for node in slurm.nodes]
    config = directory / "both"
    texts = [sshd.config.read_text() for sshd in [login.sshd, *nodes]]
    where = whereabouts if options else lambda url: compute(url, WHERE)
    if options:
        key = re.search(r"(?m)^ *IdentityFile (.*)\n", texts[0])
        assert key
        texts[0] = texts[0].replace(key.group(), "")
        options = [*options, "-i", key.group(1).strip('"')]
    config.write_text("".join(texts))
    laptop.config = str(config)
    is_socket = bool(options)
    options = [*options, "--local-port", str(quiet_port())]
    with laptop.opened("--slurm", "-t 1:00:00", "--via-node", *options, "host") as run:
        assert where(run.url()).startswith("node1 ")
        run.expect("^Connected to node1 through host.")
        run.expect(r"^Forwarding 127\.0\.0\.1:\d+ to node1:%s\.$" % ("/.*" if "--socket" in options else r"\d+"))
        assert "whoever reaches" not in run.stderr
        assert login.sshd.logins() == 1
    again = laptop.start("--via-node", *options, "host", has_terminal=False)
    assert without_port(again.url()) == without_port(run.url())
    nodes[0].end_connections()
    again.expect("Connected to node1 again")
    assert where(again.url()).startswith("node1 ")
    if is_socket:  # nobody gets to the node any more, as where its users have to have jobs there
        nodes[0].stop()
        slurm.cancel(1)
        nodes[0].end_connections()
    else:
        slurm.cancel(1)
    assert again.wait() == 4


def test_another_login_node_finds_the_server(
    laptop: Laptop, slurm: PrivateSlurm, login: Host, make_host: Callable[..., Host]
) -> None:
    with laptop.opened("--slurm", "-t 1:00:00", "host") as run:
        url = run.url()
    prefix = [*slurm.login_prefix, "unshare", "--uts", "sh", "-c", 'hostname login2; exec "$@"', "sh"]
    make_host(name="other", prefix=prefix, HOME=str(login.home), **slurm.environment())
    again = laptop.start("other", has_terminal=False)
    again.expect(r"^Connected to other \(\w+@login2,")
    again.expect("^Found Jupyter Notebook")
    assert again.url().partition("token=")[2] == url.partition("token=")[2]
    assert whereabouts(again.url()).startswith("node")
    assert laptop.run("other", "stop").status == 0
    slurm.wait_for_state(1, "CANCELLED", "COMPLETED")


def test_scheduler_of_which_only_a_terminal_knows(
    laptop: Laptop, slurm: PrivateSlurm, make_host: Callable[..., Host]
) -> None:
    """Its commands have what the terminal sets up; and who comes back, lists or stops does not wait for a terminal."""
    login = make_host(prefix=slurm.login_prefix)
    exports = "export SLURM_CONF=%s SBATCH_TIMELIMIT=7 HF_HOME=/data/hf\necho ran >>~/ran\n" % slurm.config
    (login.home / ".profile").write_text(exports)
    with laptop.opened("--slurm=", "host"):
        (job,) = listed(laptop, "job")
        assert job["word"] == "RUNNING"
        assert slurm.job(int(job["job"]))["TimeLimit"] == "00:07:00"
        (record,) = login.servers()
        environ = slurm.machines[job["node"]].run("cat", "/proc/%d/environ" % record["pid"]).stdout
        assert "HF_HOME=/data/hf" in environ.split("\0")
        starts = (login.home / "ran").read_text()
    with laptop.opened("host") as run:
        assert "Found" in run.stderr, run.text
    assert laptop.run("host", "stop").status == 0
    wait_until(lambda: not listed(laptop, "job"), "the job is cancelled", 20)
    assert (login.home / "ran").read_text() == starts == "ran\n" * 2  # on the login node, and on the job's


@pytest.mark.jupyter
def test_execute_in_a_job(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    (login.home / "work").mkdir()
    write_notebook(laptop.home / "train.ipynb", WHERE, code("p = 1", "parameters"), "print(p)")
    run = laptop.run("--slurm", "-t 1:00:00", "host:work", "execute", "train.ipynb", "-p", "p=20")
    assert run.status == 0, run.text
    assert run.stdout == "train.executed.ipynb\n"
    first, *_, last = printed(laptop.home / "train.executed.ipynb")
    assert (re.sub(r"\d ", "N ", first), last) == ("nodeN %s\n" % (login.home / "work"), "20\n")
    slurm.wait_for_state(1, "COMPLETED")
    there = write_notebook(login.home / "work/b.ipynb", "print('b')")
    run = laptop.run("--slurm", "-t 1:00:00", "host:work", "execute", ":b.ipynb", "--inplace")
    assert (run.status, printed(there)) == (0, ["b\n"]), run.text


@pytest.mark.jupyter
def test_execution_that_waits_is_left_and_followed_again(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    blocking = slurm.occupy()
    write_notebook(laptop.home / "a.ipynb", "print('x')", "import time; print('y', flush=True); time.sleep(600)")
    run = laptop.start("--slurm", "-t 1:00:00", "host", "execute", "a.ipynb", has_terminal=False)
    run.expect("Job 3 pending")
    run.interrupt()
    assert run.wait() == 130
    second = laptop.run("--slurm", "-t 1:00:00", "host", "execute", "a.ipynb")
    assert second.status == 0 and "is already running" in second.stderr
    (job,) = listed(laptop, "job")
    follow = laptop.start("host", "execute", "--attach", job["id"], "-v", has_terminal=False)
    follow.expect("Job 3 pending")
    slurm.cancel(*blocking)
    follow.expect("^y$")
    (found,) = listed(laptop, "run")
    assert (found["state"], found["cell"]) == ("running", 2)
    assert laptop.run("host", "stop", found["id"]).status == 0
    assert follow.wait() == 1
    assert "was stopped" in follow.stderr
    assert printed(laptop.home / "a.executed.ipynb")[0] == "x\n"


def test_login_node_without_slurm_option_is_told_of_it(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    run = laptop.start("host", has_terminal=False)
    run.url()
    run.expect(
        r"^sbatch is there: if host is a login node, run Jupyter in a job \(--slurm OPTIONS, --submit COMMAND\)\.$"
    )


def test_json_events_of_a_cluster_are_the_ones_of_the_help(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    blocking = slurm.occupy()
    run = laptop.start("--json", "-q", "--slurm", "-t 5", "host", has_terminal=False)
    run.expect('"event": "queue"')
    seen = events_of(laptop.run("--json", "-q", "host", "list"))
    slurm.cancel(*blocking)
    run.expect('"event": "ending"')
    seen += events_of(run)
    again = laptop.start("host", has_terminal=False)
    again.expect(r"^4 min left for Jupyter Notebook \S+ on node\d: save what you need\.$")
    of_help = help_events()
    for name in ("job", "queue", "ending"):
        assert {tuple(key for key in event if key != "event") for event in seen if event["event"] == name} == {
            tuple(of_help[name])
        }
