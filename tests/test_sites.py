"""Clusters as sites run them: greetings, caches, other clusters, homes that lag, controllers that do not answer.

Real Slurm and Grid Engine with the wrappers and mounts of private_sites.py; shims of what does not install here.
"""

import contextlib
import http.server
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
import shim_scheduler
from client import compute, token_of, whereabouts
from jupyters import standin
from notebooks import printed, write_notebook
from private_gridengine import PrivateGridEngine, find_gridengine_obstacle
from private_machines import Cluster, find_obstacle
from private_sites import LaggingDirectory, Site, cover_home, join_names
from private_slurm import PrivateSlurm, find_slurm_obstacle
from sides import VENV_BIN, Host, Laptop, Run, User, quiet_port, wait_until, without_port

# The Jupyter that executes notebooks, where that of the host is the stand-in.
EXECUTOR = ["--python", str(VENV_BIN / "python")]
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED")


@pytest.fixture
def make_slurm(directory: Path) -> Iterator[Callable[..., PrivateSlurm]]:
    """Makes Slurms; `settings` are lines of slurm.conf."""
    obstacle = find_slurm_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    slurms: List[PrivateSlurm] = []

    def make(place: str = "slurm", settings: str = "", **others: Any) -> PrivateSlurm:
        slurms.append(PrivateSlurm(directory / place, settings, **others))
        return slurms[-1].start()

    yield make
    for slurm in slurms:
        slurm.stop()


@pytest.fixture
def slurm(make_slurm: Callable[..., PrivateSlurm]) -> PrivateSlurm:
    """A Slurm whose commands give up after five seconds."""
    return make_slurm(settings="MessageTimeout=5")


@pytest.fixture
def site(directory: Path) -> Site:
    return Site(directory / "site")


@pytest.fixture
def login(slurm: PrivateSlurm, site: Site, make_host: Callable[..., Host]) -> Host:
    """The login node, with the site's own commands in front of Slurm's."""
    return login_node(slurm, site, make_host)


def login_node(slurm: PrivateSlurm, site: Site, make_host: Callable[..., Host], **others: Any) -> Host:
    return make_host(front=str(site.path), prefix=slurm.login_prefix, **dict(slurm.environment(), **others))


def things(laptop: Laptop, event: str = "", host: str = "host") -> List[Dict[str, Any]]:
    """Return what list --json tells of servers, runs or jobs; of all three without a word."""
    found = [json.loads(line) for line in laptop.run(host, "list", "--json").stdout.splitlines()]
    return [thing for thing in found if thing["event"] == event or not event]


def numbers(laptop: Laptop, host: str = "host") -> List[str]:
    """Return the scheduler's numbers of the jobs that list shows as live."""
    return [str(job["job"]) for job in things(laptop, "job", host)]


def opened(laptop: Laptop, *options: str, host: str = "host") -> Run:
    run = laptop.start("--slurm", "-t 1:00:00", *options, host, has_terminal=False)
    run.url()
    return run


def is_on_a_node(run: Run) -> bool:
    """True when the tunnel leads to a server on a node."""
    return whereabouts(run.url()).startswith("node")


def stop_ends_it(laptop: Laptop, slurm: PrivateSlurm, job: int = 1) -> None:
    assert laptop.run("host", "stop").status == 0
    wait_until(lambda: slurm.squeue()[job] not in LIVE, "the end of the job", 30, 0.1)


def leave(run: Run) -> None:
    run.interrupt()
    run.wait()


def job_that_waits(laptop: Laptop, slurm: PrivateSlurm) -> str:
    """Submit a job that waits because all nodes are drained, leave it, and return its id."""
    for node in slurm.nodes:
        slurm.drain(node)
    run = laptop.start("--slurm", "-t 1:00:00", "host", has_terminal=False)
    run.expect(r"^Job \d+ pending")
    leave(run)
    return str(things(laptop, "job")[0]["id"])


def job_of_a_stranger(slurm: PrivateSlurm) -> int:
    """Let something that is not rjupyter submit a job of the same user, and return its number when it runs."""
    job = int(slurm.command("sbatch", "--parsable", "--output=/dev/null", "--wrap=exec sleep infinity"))
    slurm.wait_for_state(job, "RUNNING")
    return job


def executing(laptop: Laptop, *options: str) -> Run:
    """Start to execute a notebook whose second cell takes ten minutes, and return when that has begun."""
    write_notebook(laptop.home / "a.ipynb", "print('x')", "import time; print('y', flush=True); time.sleep(600)")
    words = ["--slurm", "-t 1:00:00 " + " ".join(options), *EXECUTOR, "host", "execute", "a.ipynb", "-v"]
    run = laptop.start(*words, has_terminal=False)
    run.expect("^y$")
    return run


# -- A3: a number that is used again ----------------------------------------------------------------------------------


def test_number_that_is_used_again_by_another_cluster(
    laptop: Laptop, make_slurm: Callable[..., PrivateSlurm], site: Site, make_host: Callable[..., Host]
) -> None:
    """On the home of the old one."""
    slurm = make_slurm()
    login = login_node(slurm, site, make_host)
    job_that_waits(laptop, slurm)
    slurm.stop()
    slurm = make_slurm("new", name="new")
    login_node(slurm, site, make_host, name="other", HOME=str(login.home))
    assert job_of_a_stranger(slurm) == 1
    time.sleep(6)  # an answer of the scheduler's serves for five seconds
    shown = numbers(laptop, "other")
    laptop.run("other", "stop", "--all")
    assert (slurm.squeue()[1], shown) == ("RUNNING", [])


@pytest.mark.parametrize("stopped", ["--all", "by its id"])
def test_number_that_is_used_again_after_the_state_of_the_cluster_was_lost(
    laptop: Laptop, slurm: PrivateSlurm, login: Host, stopped: str
) -> None:
    """By a stranger's script; stopped by its id, it is one that is called job.sh, as ours, and its job rjupyter."""
    identity = job_that_waits(laptop, slurm)
    for node in slurm.nodes:
        slurm.resume(node)
    slurm.forget_jobs()
    if stopped == "--all":
        assert job_of_a_stranger(slurm) == 1
    else:
        script = login.home / "job.sh"
        script.write_text("#!/bin/sh\nexec sleep infinity\n")
        slurm.command("sbatch", "--output=/dev/null", "--job-name=rjupyter", str(script))
        slurm.wait_for_state(1, "RUNNING")
    time.sleep(6)  # an answer of the scheduler's serves for five seconds
    shown = numbers(laptop) if stopped == "--all" else []
    laptop.run("host", "stop", stopped if stopped == "--all" else identity)
    assert (slurm.squeue()[1], shown) == ("RUNNING", [])


# -- A4: a submission that failed, and a job that was taken -----------------------------------------------------------


def frozen(run: Run, slurm: PrivateSlurm, site: Site) -> None:
    """sbatch ends with "Socket timed out" after five seconds; slurmctld reads what it was sent afterwards."""
    time.sleep(9)
    slurm.thaw_controller()


def frozen_and_left(run: Run, slurm: PrivateSlurm, site: Site) -> None:
    """The person gives up meanwhile."""
    time.sleep(4)
    run.interrupt()
    time.sleep(3)
    slurm.thaw_controller()


def answer_is_lost(run: Run, slurm: PrivateSlurm, site: Site) -> None:
    """The job was taken at once; the connection ended before sbatch had heard of it."""


@pytest.mark.parametrize("how", [frozen, frozen_and_left, answer_is_lost])
def test_job_whose_submission_failed_and_that_was_taken(
    laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host, how: Any
) -> None:
    if how is answer_is_lost:
        words = "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received"
        site.wrap("sbatch", '{real} "$@" >/dev/null && echo "%s" >&2; exit 1' % words)
    else:
        slurm.freeze_controller()
    laptop.start("--slurm", "-t 1:00:00", "host", has_terminal=False)
    how(laptop.runs[-1], slurm, site)
    wait_until(lambda: 1 in slurm.squeue(), "the job that was taken", 20, 0.2)

    def is_in_hand() -> bool:
        return slurm.squeue()[1] not in LIVE or "1" in numbers(laptop)

    wait_until(is_in_hand, "a job that ended, or that list shows", 30, 1)
    laptop.run("host", "stop", "--all")
    wait_until(lambda: slurm.squeue()[1] not in LIVE, "the end of the job that was taken", 20, 0.2)


@pytest.mark.parametrize("when", ["the wait", "the hold", "the stop"])
def test_slurmctld_does_not_answer_for_a_while(laptop: Laptop, slurm: PrivateSlurm, login: Host, when: str) -> None:
    if when == "the wait":
        for node in slurm.nodes:
            slurm.drain(node)
        run = laptop.start("--slurm", "-t 1:00:00", "host", has_terminal=False)
        run.expect(r"^Job \d+ pending")
        slurm.freeze_controller()
        run.expect("unknown", 40)
        slurm.thaw_controller()
        for node in slurm.nodes:
            slurm.resume(node)
    else:
        run = opened(laptop)
        slurm.freeze_controller()
    assert is_on_a_node(run)
    if when == "the hold":
        assert numbers(laptop) == ["1"]
        slurm.thaw_controller()
    leave(run)
    assert laptop.run("host", "stop").status == 0
    if when == "the stop":
        assert numbers(laptop) == []
        slurm.thaw_controller()
    wait_until(lambda: slurm.squeue()[1] not in LIVE, "the end of the job", 30)


def test_options_that_would_start_several_jobs_or_none_are_refused(laptop: Laptop) -> None:
    for options in ("-a 1-3", "--array=1-3", "-n1 : -n1", "--wait", "-Q", "--test-only"):
        run = laptop.run("--slurm", options, "nowhere")
        assert run.status == 2 and "sbatch without it" in run.stderr, (options, run.text)
    assert laptop.run("--submit", "qsub -t 1-3", "nowhere").status == 2


# -- E1: whose port is asked ------------------------------------------------------------------------------------------


class Listener:
    """A stranger's server on a port of the login node: keeps what it is sent."""

    def __init__(self) -> None:
        self.heard: List[str] = []
        heard = self.heard

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                heard.append("%s %s\n%s" % (self.command, self.path, self.headers))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_GET  # noqa: N815

            def log_message(self, *words: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", quiet_port()), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.stop()


def keys(login: Host) -> List[str]:
    """Return the tokens of the servers that we launched."""
    return [file.read_text() for file in login.home.glob(".local/state/rjupyter/servers/*/token")]


def test_token_is_not_sent_to_the_login_nodes_port(
    laptop: Laptop, slurm: PrivateSlurm, login: Host, listener: Listener
) -> None:
    """A job that binds all addresses of its node: 0.0.0.0 of another machine is not ours; list and stop ask as well."""
    options = ["--ip", "0.0.0.0", "--port", str(listener.port)]
    run = laptop.start("--slurm", "-t 1:00:00", *options, "host", has_terminal=False)
    wait_until(lambda: listener.heard or any(server.get("has_answered") for server in login.servers()), "Jupyter", 60)
    laptop.run("host", "list")
    assert not [words for words in listener.heard for token in keys(login) if token in words], listener.heard
    assert is_on_a_node(run)
    assert [token_of(run.url())] == keys(login)
    leave(run)
    laptop.run("host", "stop")
    assert listener.heard == []
    wait_until(lambda: slurm.squeue()[1] not in LIVE, "the end of the job", 20)


def test_token_of_a_server_on_a_nodes_loopback_is_not_sent_to_the_login_nodes(
    directory: Path, laptop: Laptop, slurm: PrivateSlurm, login: Host, listener: Listener
) -> None:
    """Opened with --via-node, and come back to without it."""
    nodes = [slurm.start_sshd(node, login.sshd) for node in slurm.nodes]
    config = directory / "both"
    config.write_text("".join(sshd.config.read_text() for sshd in [login.sshd, *nodes]))
    laptop.config = str(config)
    run = opened(laptop, "--via-node", "--port", str(listener.port))
    leave(run)
    again = laptop.start("host", has_terminal=False)
    with contextlib.suppress(AssertionError):
        again.url()
    assert not [words for words in listener.heard for token in keys(login) if token in words], listener.heard
    assert again.status is None and is_on_a_node(again)


# -- E2: greetings ----------------------------------------------------------------------------------------------------

# What sbatch says around its word, and what of that is shown.
GREETINGS = {
    "a welcome": "echo '-----------------\n  Welcome to Rig 3000\n-----------------\n\n"
    'No reservation for this job\n--> Verifying valid submit host (login1)...OK\'\nexec {real} "$@"',
    "a note behind": "{real} \"$@\" || exit\necho 'Your project has used 12 of 500 node hours.'",
    "a sentence on another job": "echo 'Your job 17 of yesterday was charged: Submitted batch job 17 took 3 min.'\n"
    'exec {real} "$@"',
    "notes of its own": "echo 'sbatch: Your account expires in 3 days.' >&2\n"
    'echo "sbatch: warning: can\'t honor --ntasks" >&2\nexec {real} "$@"',
}


def test_sbatch_that_greets(laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host) -> None:
    """The job is found in what it says; its own notes are shown."""
    for job, (greeting, script) in enumerate(GREETINGS.items(), 1):
        site.wrap("sbatch", script)
        run = opened(laptop)
        assert is_on_a_node(run), greeting
        assert numbers(laptop) == [str(job)], greeting
        leave(run)
        stop_ends_it(laptop, slurm, job)
    assert "Your account expires in 3 days." in run.stderr and "warning: can't honor --ntasks" in run.stderr


# -- E3: another cluster ----------------------------------------------------------------------------------------------


def test_job_of_another_cluster(
    laptop: Laptop, make_slurm: Callable[..., PrivateSlurm], site: Site, make_host: Callable[..., Host]
) -> None:
    """Two Slurms behind one login node, where a number of the one is a stranger's job of the other."""
    slurm = make_slurm()
    other = make_slurm("other", name="gpu", nodes=["node3", "node4"])
    join_names(slurm, other)
    site.clusters(rig=slurm, gpu=other)
    login = login_node(slurm, site, make_host)
    ways = ["-M gpu", "--clusters=gpu", "-M gpu --parsable", ""]
    assert [job_of_a_stranger(slurm) for _ in ways] == [1, 2, 3, 4]
    for number, options in enumerate(ways, 1):
        if not options:
            login.sshd.stop()
            login.sshd.environment["SBATCH_CLUSTERS"] = "gpu"
            login.sshd.start()
        run = laptop.start("--slurm", "-t 1:00:00 " + options, "host", has_terminal=False)
        assert whereabouts(run.url()).split()[0] in ("node3", "node4"), options
        (job,) = things(laptop, "job")
        assert (job["job"], job["word"]) == (str(number), "RUNNING"), options
        leave(run)
        stop_ends_it(laptop, other, number)
        assert slurm.squeue()[number] == "RUNNING", options


# -- E4: answers that lag ---------------------------------------------------------------------------------------------


def test_qstat_that_is_cached(
    directory: Path, laptop: Laptop, site: Site, make_host: Callable[..., Host], make_user: Any
) -> None:
    """A real Grid Engine, and a qstat that says for a minute what it said before."""
    obstacle = find_gridengine_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    engine = PrivateGridEngine(directory / "engine")
    try:
        engine.start()
        user = make_user("/bin/bash")
        user.write(".bash_profile", "export PATH=%s:%s:$PATH\n" % (site.path, standin()))
        site.cache("qstat", 60)
        login = make_host(user=user, path=str(site.path), prefix=engine.login_prefix, **engine.environment())
        login.sshd.environment["PATH"] = "%s:/usr/bin:/bin" % site.path
        login.sshd.stop()
        login.sshd.start()
        assert login.sshd.ssh("qstat").stdout == ""
        run = laptop.start("--submit", "qsub -o /dev/null -j y", "host", has_terminal=False)
        assert whereabouts(run.url()).startswith("node1 ")
        leave(run)
        assert laptop.run("host", "stop").status == 0
        wait_until(lambda: not engine.qstat(), "the end of the job", 20)
    finally:
        engine.stop()


@pytest.mark.parametrize("how", ["it does not know the job yet", "its answer is a minute old"])
def test_squeue_that_lags(laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host, how: str) -> None:
    """A job that waits, and of which nothing is heard at first."""
    if how.startswith("its"):
        site.cache("squeue", 60)
        user = login.sshd.user
        asked = "squeue --noheader --user=%s --states=all '--format=%%i|%%T|%%r|%%S|%%N|%%L'" % user
        login.sshd.ssh(asked)
    else:
        site.lag(15)
    for node in slurm.nodes:
        slurm.drain(node)
    run = laptop.start("--slurm", "-t 1:00:00", "host", has_terminal=False)
    wait_until(lambda: 1 in slurm.squeue(), "the job", 20)
    with pytest.raises(AssertionError):
        run.wait(10)  # the job waits, and so do we
    assert numbers(laptop) == ["1"]
    for node in slurm.nodes:
        slurm.resume(node)
    assert is_on_a_node(run)


def test_job_that_is_missed_once_is_not_written_off(
    laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host
) -> None:
    """It waits for long, and the squeue that was asked may have been another cluster's."""
    job_that_waits(laptop, slurm)
    (file,) = login.home.glob(".local/state/rjupyter/jobs/*/job.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps(dict(record, created=record["created"] - 1000)))
    site.wrap("squeue", "")
    wait_until(lambda: numbers(laptop) == [], "it is missed", 30, 1)
    assert not (file.parent / "end.json").exists()
    site.unwrap("squeue")
    wait_until(lambda: numbers(laptop) == ["1"], "it is seen again", 30, 1)
    stop_ends_it(laptop, slurm)


# -- E5: a home that lags ---------------------------------------------------------------------------------------------


@pytest.fixture
def make_lag(slurm: PrivateSlurm, login: Host, directory: Path) -> Iterator[Callable[[float], LaggingDirectory]]:
    lags: List[LaggingDirectory] = []

    def make(delay_s: float) -> LaggingDirectory:
        nodes = [slurm.machines[name] for name in slurm.nodes]
        lags.append(LaggingDirectory(login.home / ".local/state/rjupyter", directory / "copy", nodes, delay_s))
        return lags[-1]

    yield make
    for lag in lags:
        lag.stop()


def test_home_that_lags_and_a_server(laptop: Laptop, slurm: PrivateSlurm, make_lag: Any) -> None:
    make_lag(4)
    run = opened(laptop)
    assert is_on_a_node(run)
    leave(run)
    stop_ends_it(laptop, slurm)


@pytest.mark.jupyter
def test_home_that_lags_and_a_notebook(laptop: Laptop, slurm: PrivateSlurm, site: Site, make_lag: Any) -> None:
    """The job has ended before its result is seen; of a cell that fails as well. It is still in squeue's old answer."""
    make_lag(4)
    site.cache("squeue", 60)
    for source, status, words in (("print(6 * 7)", 0, "42"), ("1 / 0", 5, "ZeroDivisionError")):
        write_notebook(laptop.home / "a.ipynb", source)
        run = laptop.run("--slurm", "-t 1:00:00", "host", "execute", "a.ipynb")
        assert run.status == status, run.text
        assert words in (laptop.home / "a.executed.ipynb").read_text()


# -- E6: nodes without a home -----------------------------------------------------------------------------------------


def shared_place(directory: Path) -> Path:
    """Return a directory that every node sees and can write."""
    place = directory / "scratch"
    place.mkdir()
    (place / "work").mkdir()
    return place


@pytest.mark.parametrize("kind", ["readonly", "none", "local"])
def test_nodes_without_a_home_are_told_of_and_a_state_directory_helps(
    laptop: Laptop, slurm: PrivateSlurm, login: Host, directory: Path, kind: str
) -> None:
    """Or with one that is read-only, or one of each node's own, which is writable and not the login node's."""
    place = shared_place(directory)
    for node in slurm.nodes:
        cover_home(slurm.machines[node], login.home, kind)
    told = laptop.run("--slurm", "-t 1:00:00", "host")
    assert told.status == 4
    assert "--state-dir" in told.stderr, told.stderr
    options = ["--state-dir", str(place / "state")]
    work = "host:%s/work" % place
    run = laptop.start(*options, "--slurm", "-t 1:00:00", work, has_terminal=False)
    assert is_on_a_node(run)
    leave(run)
    again = laptop.start(*options, work, has_terminal=False)
    assert without_port(again.url()) == without_port(run.url())
    leave(again)
    assert laptop.run(*options, work, "stop").status == 0
    wait_until(lambda: slurm.squeue()[2] not in LIVE, "the end of the job", 20)


def test_words_of_a_job_that_ends_early_are_shown(laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host) -> None:
    """What is said before our own program can write: the script cannot be run on the nodes at all."""
    for node in slurm.nodes:
        slurm.machines[node].run("mount", "--bind", "/dev/null", os.path.realpath("/bin/sh"))
    run = laptop.run("--slurm", "-t 1:00:00", "host")
    assert run.status == 4
    assert re.search("denied|cannot execute|not found", run.stderr), run.stderr


# -- E7: no Jupyter, and nodes without a network ----------------------------------------------------------------------


# uv, as a site's: it says where it ran, has a network on the login node alone, and installs what the tests have.
UV = """
echo "$(hostname) ${{SLURM_JOB_ID:-none}} $*" >>{directory}/said
if [ -n "$SLURM_JOB_ID" ]; then
    echo "error: Failed to fetch: dns error: failed to lookup address information" >&2
    exit 2
fi
for last; do :; done
if [ "$1" = venv ]; then
    mkdir -p "$last/bin"
    ln -sf BIN/python "$last/bin/python"
else
    while [ "$1" != --python ]; do shift; done
    for name in jupyter-notebook jupyter-lab; do ln -sf BIN/$name "$(dirname "$2")/$name"; done
fi
"""


@pytest.mark.jupyter
def test_jupyter_is_installed_on_the_login_node(
    laptop: Laptop, slurm: PrivateSlurm, site: Site, make_host: Callable[..., Host]
) -> None:
    """Where there is none, before the job is submitted: for a server, and for a notebook."""
    site.wrap("uv", UV.replace("BIN", str(VENV_BIN)))
    for name in ("host", "other"):
        make_host(name=name, path=str(site.path), prefix=slurm.login_prefix, **slurm.environment())
        if name == "host":
            assert compute(opened(laptop).url(), "import os; print(os.uname().nodename)").startswith("node")
        else:
            write_notebook(laptop.home / "a.ipynb", "print(6 * 7)")
            run = laptop.run("--slurm", "-t 1:00:00", name, "execute", "a.ipynb")
            assert run.status == 0, run.text
        said = (site.directory / "said").read_text().splitlines()
        assert len(said) == 2 and {line.split()[1] for line in said} == {"none"}, said
        (site.directory / "said").unlink()


# -- E8: a job that cannot be cancelled -------------------------------------------------------------------------------


def test_stop_goes_on_past_a_job_that_cannot_be_cancelled(
    laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host
) -> None:
    """Of all, and of those that are named by their ids."""
    for node in slurm.nodes:
        slurm.drain(node)
    words = "scancel: error: Kill job error on job id 2: Access/permission denied"
    site.wrap("scancel", 'case " $* " in *" 2 "*) echo "%s" >&2; exit 1 ;; esac\nexec {real} "$@"' % words)
    for paths in ("abc", "de"):
        for path in paths:
            (login.home / path).mkdir()
            run = laptop.start("--slurm", "-t 1:00:00", "host:" + path, has_terminal=False)
            run.expect(r"^Job \d+ pending")
            leave(run)
        ids = [job["id"] for job in things(laptop, "job")]
        assert len(ids) == 3
        stop = laptop.run("host", "stop", *(["--all"] if paths == "abc" else ids))
        assert [number for number, state in slurm.squeue().items() if state in LIVE] == [2], stop.text
        assert stop.status == 1
        assert "job 2" in stop.stderr and "denied" in stop.stderr
    assert sorted(slurm.squeue()) == [1, 2, 3, 4, 5]


@pytest.mark.waits
def test_stop_of_a_job_whose_scheduler_hangs(laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host) -> None:
    """For a minute, with each of its commands: the agent is heard to live, and says itself what did not answer."""
    job = job_that_waits(laptop, slurm)
    for command in ("squeue", "scancel"):
        site.wrap(command, "exec sleep 600\n")
    stop = laptop.run("host", "stop", job)
    assert stop.status == 1, stop.text
    assert "job 1 was not cancelled" in stop.stderr and "no answer within 20 s" in stop.stderr, stop.stderr


# -- E9: other schedulers ---------------------------------------------------------------------------------------------


class Shims:
    """The shims of a scheduler on a login node, and a machine on which they run jobs."""

    def __init__(self, directory: Path, make_host: Callable[..., Host]) -> None:
        self.directory = directory / "shims"
        self.make_host = make_host
        self.cluster = Cluster(directory / "cluster", ["node1"])

    def start(self, kind: str) -> Host:
        self.cluster.start_machines()
        binaries = shim_scheduler.install(self.directory, kind, self.cluster.machines["node1"].enter())
        return self.make_host(front=str(binaries), prefix=self.cluster.login_prefix)

    def running(self) -> str:
        return self.cluster.machines["node1"].run("ps", "ax", "-o", "args=").stdout

    def nothing_left(self) -> bool:
        running = self.running()
        return "jupyter" not in running and "agent.py" not in running and not shim_scheduler.jobs(self.directory)

    def kill(self) -> None:
        """End all that runs on the node at once, as a scheduler may."""
        for line in self.cluster.machines["node1"].run("ps", "ax", "-o", "pid=,args=").stdout.splitlines():
            if "jupyter" in line or "agent.py" in line or "ipykernel" in line:
                self.cluster.machines["node1"].run("sh", "-c", "kill -KILL %s || :" % line.split()[0])


@pytest.fixture
def shims(directory: Path, make_host: Callable[..., Host]) -> Iterator[Shims]:
    obstacle = find_obstacle(["csh"])
    if obstacle:
        pytest.skip(obstacle)
    shims = Shims(directory, make_host)
    yield shims
    shims.cluster.stop()
    for job in shims.directory.glob("*.job"):
        (job / "ended").touch()  # for what waits to run it


MORE_SCHEDULERS = {
    "flux": "flux batch -N1 -t 4h --output=/dev/null",
    "flux submit": "flux submit -n1 -t 4h --output=/dev/null {script}",
    "oar": "oarsub -l nodes=1,walltime=4:00:00",
}


@pytest.mark.parametrize("kind", MORE_SCHEDULERS)
def test_flux_and_oar(laptop: Laptop, shims: Shims, kind: str) -> None:
    """A job that waits, and is cancelled by the scheduler itself, from outside: its end is seen; and one that runs."""
    login = shims.start(kind.partition(" ")[0])
    waiting = laptop.start("--submit", MORE_SCHEDULERS[kind], "host", has_terminal=False)
    waiting.expect(r"^Job \S+ pending", 30)
    shim_scheduler.cancel(shims.directory, "41")
    assert waiting.wait(60) == 4
    assert "ended before it had started" in waiting.stderr
    run = laptop.start("--submit", MORE_SCHEDULERS[kind], "host", has_terminal=False)
    run.expect(r"^Job \S+ pending", 30)
    (shims.directory / "go").touch()
    assert whereabouts(run.url()) == "node1 %s" % login.home
    (job,) = things(laptop, "job")
    assert (job["word"], job["node"]) == ("RUNNING", "node1")
    leave(run)
    assert laptop.run("host", "stop").status == 0
    wait_until(shims.nothing_left, "no job and no process of it", 20)
    assert numbers(laptop) == []


def test_unknown_scheduler_ends_a_job(laptop: Laptop, shims: Shims) -> None:
    """With KILL, so that nothing of it could say so: its sign of life is missed; and with a signal that it hears."""
    shims.start("other")
    (shims.directory / "go").touch()
    run = laptop.start("--submit", "spool {script}", "host", has_terminal=False)
    run.url()
    shims.kill()
    assert run.wait(60) == 4
    assert "has ended" in run.stderr
    assert numbers(laptop) == []
    run = laptop.start("--submit", "spool {script}", "host", has_terminal=False)
    run.url()
    shim_scheduler.cancel(shims.directory, "42")
    assert run.wait(60) == 4
    wait_until(lambda: numbers(laptop) == [], "no live job", 30, 4)


# -- E10: sockets and nodes -------------------------------------------------------------------------------------------


def test_socket_on_a_node_is_reached_again(
    directory: Path,
    laptop: Laptop,
    slurm: PrivateSlurm,
    make_host: Callable[..., Host],
    make_user: Callable[[str], User],
) -> None:
    """With a home whose path is too long for a socket: it is below the node's own /tmp, which only the node sees."""
    user = make_user("/bin/bash")
    home = user.home / ("h" * 90)
    user.write("%s/.bash_profile" % home.name, "export PATH=%s:$PATH\n" % standin())
    login = make_host(
        user=user, prefix=slurm.login_prefix, HOME=str(home), PATH="%s:/usr/bin:/bin" % standin(), **slurm.environment()
    )
    login.home = home  # what is left there is ended
    nodes = [slurm.start_sshd(node, login.sshd) for node in slurm.nodes]
    config = directory / "both"
    config.write_text("".join(sshd.config.read_text() for sshd in [login.sshd, *nodes]))
    laptop.config = str(config)
    run = laptop.start("--slurm", "-t 1:00:00", "--via-node", "--socket", "host", has_terminal=False)
    assert is_on_a_node(run)
    leave(run)
    for options in (["--socket"], ["--slurm", "-t 1:00:00"]):
        again = laptop.start("--via-node", *options, "host", has_terminal=False)
        assert token_of(again.url()) == token_of(run.url()), options
        assert is_on_a_node(again), options
        leave(again)
    assert list(slurm.squeue()) == [1]
    assert laptop.run("host", "stop", "--all").status == 0
    wait_until(lambda: slurm.squeue()[1] not in LIVE, "the end of the job", 20)


# -- E11: jobs that end ---------------------------------------------------------------------------------


def cancelled(slurm: PrivateSlurm, *jobs: int) -> str:
    slurm.cancel(*jobs)
    return "it was cancelled"


def time_is_up(slurm: PrivateSlurm, *jobs: int) -> str:
    for job in jobs:
        slurm.limit(job)
    return "its time ran out"


def node_dies(slurm: PrivateSlurm, *jobs: int) -> str:
    slurm.fail(slurm.job(jobs[0])["NodeList"])
    return "its node failed"


def rows_name_node_and_job(laptop: Laptop, slurm: PrivateSlurm) -> None:
    """list says of what runs in a job where it runs, and in which."""
    found = things(laptop)
    jobs = {thing["job"]: thing["id"] for thing in found if thing["event"] == "job"}
    table = laptop.run("host", "list").stdout
    for event, number in (("server", "1"), ("run", "2")):
        (thing,) = [thing for thing in found if thing["event"] == event]
        (row,) = re.findall(r"(?m)^%s .*$" % thing["id"], table)
        node = slurm.job(int(number))["NodeList"]
        assert node in row and re.search(r"\b(%s|%s)\b" % (jobs[number], number), row.replace(thing["id"], "")), table
        if event == "server":
            assert thing["node"] == node and thing.get("job") in (jobs[number], number)


def live(laptop: Laptop) -> List[str]:
    """Return which kinds of things are live, as list has it."""
    states = [(thing["event"], thing.get("state", "")) for thing in things(laptop)]
    words = ("live", "starting", "running", "no answer")
    return [event for event, state in states if event == "job" or (event in ("server", "run") and state in words)]


@pytest.mark.parametrize("end", [cancelled, time_is_up, node_dies])
def test_server_and_notebook_whose_jobs_end(laptop: Laptop, slurm: PrivateSlurm, login: Host, end: Any) -> None:
    """What has ended does not come back, not even while slurmctld is down."""
    server = laptop.start("--slurm", "-t 1:00:00 -w node1", "host", has_terminal=False)
    server.url()
    notebook = executing(laptop, "-w node1")
    rows_name_node_and_job(laptop, slurm)
    words = end(slurm, 1, 2)
    assert (server.wait(), notebook.wait()) == (4, 4), server.text + notebook.text
    assert "has ended" in server.stderr and "job: " + words in server.stderr, server.stderr
    assert "job: " + words in notebook.stderr, notebook.stderr
    assert "AssertionError" not in notebook.stderr and "failed in a.ipynb" not in notebook.stderr
    assert "the result so far is in a.executed.ipynb" in notebook.stderr
    assert printed(laptop.home / "a.executed.ipynb")[0] == "x\n"
    if end is cancelled:
        wait_until(lambda: live(laptop) == [], "an end that list shows", 20, 0.5)
        slurm.stop_controller()
        time.sleep(6)  # an answer of the scheduler's serves for five seconds
        assert live(laptop) == []


# -- A8: one end ------------------------------------------------------------------------------------------------------


def requeued(slurm: PrivateSlurm, job: int) -> None:
    slurm.command("scontrol", "requeue", str(job))


def preempted(slurm: PrivateSlurm, job: int) -> None:
    slurm.command("sbatch", "--partition=urgent", "--exclusive", "-N2", "--output=/dev/null", "--wrap=sleep infinity")


@pytest.mark.waits
def test_job_that_is_queued_again(
    laptop: Laptop, make_slurm: Callable[..., PrivateSlurm], site: Site, make_host: Callable[..., Host]
) -> None:
    """With the user's own --requeue: the job waits, and what it held is gone."""
    settings = "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
    settings += "PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=1-0"
    slurm = make_slurm(settings=settings)
    login_node(slurm, site, make_host)
    for job, how in enumerate([requeued, preempted], 1):
        run = laptop.start("--slurm", "-t 1:00:00 --requeue", "host", has_terminal=False)
        run.url()
        how(slurm, job)
        assert run.wait() == 4
        slurm.wait_for_state(job, "PENDING")
        time.sleep(6)  # an answer of the scheduler's serves for five seconds
        found = things(laptop)
        jobs = [(thing["word"], thing["is_waiting"]) for thing in found if thing["event"] == "job"]
        assert jobs in ([], [("PENDING", True)])
        servers = [thing["state"] for thing in found if thing["event"] == "server"]
        assert not [state for state in servers if state in ("live", "starting")]
        slurm.cancel(job)


# -- B6: where the scheduler's commands are ---------------------------------------------------------------------------


def test_scheduler_that_is_on_no_path_but_the_users(
    laptop: Laptop, slurm: PrivateSlurm, site: Site, make_host: Callable[..., Host], make_user: Callable[[str], User]
) -> None:
    """By --init or the login shell; what comes without the option later (list, stop) reaches the job too."""
    user = make_user("/bin/bash")
    line = "export PATH=%s:$PATH\n" % (site.directory / "away")
    jupyter = "export PATH=%s:$PATH\n" % standin()
    away = site.away()
    make_host(user=user, prefix=[*slurm.login_prefix, *away], **slurm.environment())
    for job, options in enumerate([["--init", line.strip()], []], 1):
        user.write(".bash_profile", jupyter if options else jupyter + line)
        run = laptop.start(*options, "--slurm", "-t 1:00:00", "host", has_terminal=False)
        assert is_on_a_node(run), options
        leave(run)
        assert numbers(laptop) == [str(job)], options
        stop_ends_it(laptop, slurm, job)


# -- E12: what is said ------------------------------------------------------------------------------------------------


def test_log_of_a_jobs_server_is_followed(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    opened(laptop)
    logs = laptop.start("host", "logs", "-f", has_terminal=False)
    logs.expect("Jupyter Server")
    (log,) = login.home.glob(".local/state/rjupyter/servers/*/log")
    with log.open("a") as stream:
        stream.write("a line of later\n")
    logs.expect("^a line of later$")
    slurm.cancel(1)
    assert logs.wait(60) == 0


def test_ctrl_c_while_sbatch_takes_its_time(laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host) -> None:
    site.wrap("sbatch", '>{directory}/asked\nsleep 4\nexec {real} "$@"')
    run = laptop.start("--slurm", "-t 1:00:00", "host")
    run.expect("Connected to")
    wait_until((site.directory / "asked").exists, "sbatch is asked")
    run.interrupt()
    assert run.wait() == 130
    assert re.search(r"(?i)\bjob\b|submi", run.text.partition("Connected to")[2]), run.text
    time.sleep(6)
    if slurm.squeue().get(1) in LIVE:
        assert numbers(laptop) == ["1"]


def test_node_whose_own_name_is_127_0_1_1(laptop: Laptop, shims: Shims) -> None:
    """As Debian's installer writes it into /etc/hosts: the address that others reach is another."""
    login = shims.start("other")
    hosts = shims.directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node1\n")
    shims.cluster.machines["node1"].run("mount", "--bind", str(hosts), "/etc/hosts")
    (shims.directory / "go").touch()
    run = laptop.start("--submit", "spool {script}", "host", has_terminal=False)
    assert whereabouts(run.url()) == "node1 %s" % login.home
    assert laptop.run("host", "stop").status == 0


def test_via_node_is_named_where_the_login_node_reaches_no_port(
    laptop: Laptop, slurm: PrivateSlurm, login: Host
) -> None:
    """A firewall between the login node and the nodes, which drops what comes: by one who comes back, and at first."""
    (login.home / "work").mkdir()
    leave(opened(laptop))
    for node in slurm.nodes:
        slurm.machines[node].run("ip", "route", "add", "blackhole", slurm.login_address + "/32")
    runs = [laptop.start("--slurm", "-t 1:00:00", place, has_terminal=False) for place in ("host", "host:work")]
    for run in runs:
        assert run.wait(120) != 0
        assert "--via-node" in run.stderr, run.stderr


def test_node_address_is_chosen(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    """By an interface, or as an address."""
    said = slurm.machines["node1"].run("ip", "-o", "-4", "address", "show", "scope", "global").stdout.split()
    for place, name in (("a", said[1]), ("b", said[3].partition("/")[0]), ("c", "ib7")):
        (login.home / place).mkdir()
        words = ["--slurm", "-t 1:00:00 -w node1", "--node-address", name, "host:" + place]
        if name == "ib7":
            slurm.cancel(1, 2)  # the node has room for two
            run = laptop.run(*words)
            assert run.status == 1
            assert "this node has no address" in run.stderr and "ib7" in run.stderr and said[1] in run.stderr
        else:
            run = laptop.start(*words, has_terminal=False)
            assert whereabouts(run.url()) == "node1 %s" % (login.home / place), name
            leave(run)


# -- E13: list --------------------------------------------------------------------------------------------------------


# -- E14: a job that left squeue --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [cancelled, time_is_up])
def test_end_of_a_job_that_left_squeue(laptop: Laptop, slurm: PrivateSlurm, site: Site, login: Host, end: Any) -> None:
    """MinJobAge is short: sacct is asked, where there is one. Of a server, of a notebook, and of a job that waits."""
    site.forget_ended()
    runs = [opened(laptop), executing(laptop)]
    if end is cancelled:  # of one that waits, the time does not begin
        for node in slurm.nodes:
            slurm.drain(node)
        (login.home / "work").mkdir()
        runs.append(laptop.start("--slurm", "-t 1:00:00", "host:work", has_terminal=False))
        runs[-1].expect("Job 3 pending")
    words = end(slurm, *range(1, len(runs) + 1))
    for run in runs:
        assert run.wait() == 4, run.text
        assert words in run.stderr, run.stderr


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_asks_the_scheduler_without_a_job(laptop: Laptop, slurm: PrivateSlurm, login: Host) -> None:
    doctor = laptop.run("--slurm", "-t 5", "host", "doctor")
    assert doctor.status == 0, doctor.text
    assert re.search(r"limits +main\S* up to ", doctor.text), doctor.text
    assert re.search(r"ok +forecast +sbatch: Job \d+ to start at ", doctor.text), doctor.text
    refused = laptop.run("--slurm", "-p nosuch", "host", "doctor")
    assert refused.status == 1
    assert re.search(r"FAIL +forecast .*invalid partition", refused.text), refused.text
    assert "other options in --slurm" in refused.text
    assert slurm.squeue() == {}
