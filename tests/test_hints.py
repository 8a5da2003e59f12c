"""What we tell people to type: each command that is printed is typed as it stands, and does what it says."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest
import shim_scheduler
from client import api, compute, token_of
from jupyters import jupyter_for_everyone
from private_machines import Cluster, find_obstacle
from sides import SCRIPT, SYSTEM_PATH, VENV_BIN, Host, Laptop, Run, quiet_port, wait_until, words_of

HINTS = {
    "back": r"Back (?:again|to it) with: (.+?)(?:   To cancel it: .*)?$",
    "stop": r"To (?:end|cancel) it: (.+)$",
    "close": r"To close it: (.+)$",
    "try": r"try: (.*rjupyter\.py .+?)(?:   \(.*\))?$",
}


def hint(run: Run, kind: str) -> List[str]:
    """Return the words of a command that was printed, as a shell would have them."""
    found = re.findall(HINTS[kind], run.text, re.MULTILINE)
    assert found, "no hint %r in:\n%s" % (kind, run.text)
    return words_of(found[-1])


def typed(laptop: Laptop, words: List[str]) -> Run:
    """Start what a hint says; the -F of the tests stands in it."""
    laptop.config = ""
    return laptop.start(*words, has_terminal=False)


def held(laptop: Laptop, *arguments: str) -> Run:
    run = laptop.start(*arguments, has_terminal=False)
    run.url()
    run.expect("To end it|To close it")
    return run


def closed(run: Run) -> Run:
    run.interrupt()
    assert run.wait(30) == 0
    return run


# -- the program itself -----------------------------------------------------------------------------------------------

CALLS = {
    "by python": ("python3 rjupyter.py", 0o644),
    "by python, though it runs by itself": ("python3 rjupyter.py", 0o755),
    "in here": ("./rjupyter.py", 0o755),
    "in another directory": ("'../my tools/rjupyter.py'", 0o755),
    "by an absolute path": ("'{tools}/rjupyter.py'", 0o755),
    "by python and an absolute path": ("python3 '{tools}/rjupyter.py'", 0o644),
    "on PATH": ("PATH='{tools}':$PATH rjupyter.py", 0o755),
    "by a link": ("./gpu", 0o755),
    "by a link on PATH": ("PATH='{tools}':$PATH gpu", 0o755),
    "by sh": ("sh rjupyter.py", 0o755),
    "by a python that is not on PATH": ("{python} rjupyter.py", 0o644),
    "as a module": ("python3 -m rjupyter", 0o644),
    "another of that name is on PATH": ("PATH={other}:$PATH ./rjupyter.py", 0o755),
}


@pytest.mark.parametrize("name", CALLS)
def test_hint_begins_as_the_program_was_called(tmp_path: Path, name: str) -> None:
    tools, other, pythons = tmp_path / "my tools", tmp_path / "other", tmp_path / "pythons"
    for directory in (tools, other, pythons):
        directory.mkdir()
    call, mode = CALLS[name]
    shutil.copy(SCRIPT, tools)
    (tools / "rjupyter.py").chmod(mode)
    (tools / "gpu").symlink_to("rjupyter.py")
    (other / "rjupyter.py").write_text("#!/bin/sh\necho a stranger\n")
    (other / "rjupyter.py").chmod(0o755)
    (pythons / "python3").symlink_to(sys.executable)
    call = call.format(tools=tools, other=other, python=VENV_BIN / "python")
    setting, _, call = call.rpartition("$PATH ")
    path = "%s$PATH; export PATH; " % setting if setting else ""

    def said(line: str) -> str:
        environment = {"HOME": str(tmp_path), "PATH": "%s:%s" % (pythons, SYSTEM_PATH), "LANG": "C.UTF-8"}
        argv = ["sh", "-c", path + line]
        run = subprocess.run(argv, cwd=tools, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return run.stdout + run.stderr

    told = said(call + " --nonsense").split("try: ")[1].rstrip("\n")
    assert said(told).startswith("usage: "), told
    if name not in ("by sh", "as a module"):  # which it cannot know
        assert told == call + " --help"


# -- destinations and options -----------------------------------------------------------------------------------------


def arguments_of(name: str, host: Host) -> List[str]:
    """Return how a server is opened: what chooses the host, the place and the environment, in many forms."""
    prefix = jupyter_for_everyone().parent
    port = str(host.sshd.port)
    return {
        "plain": ["host"],
        "path": ["host:proj"],
        "home": ["host:"],
        "IPv6": ["[::1]:proj"],
        "IPv6 with a user": ["%s@[::1]:proj" % host.sshd.user],
        "ssh://": ["ssh://%s@host:%s/proj" % (host.sshd.user, port)],
        "ssh:// with a space": ["ssh://host:%s/a%%20b" % port],
        "space": ["host:a b"],
        "quote": ["host:it's"],
        "percent": ["host:100%25"],
        "colon": ["host:a:b"],
        "dash": ["host:-x"],
        "-p": ["-p", port, "host:proj"],
        "-o": ["-o", "ServerAliveInterval=7", "-l", host.sshd.user, "host:proj"],
        "lab": ["--lab", "host:proj"],
        "app": ["--app", "lab", "host:proj"],
        "env": ["--env", str(prefix), "host:proj"],
        "python": ["--python", str(prefix / "bin/python"), "host:proj"],
        "init": ["--init", "export A='b c'", "host:proj"],
        "socket": ["--socket", "host:proj"],
        "no-mux": ["--no-mux", "host:proj"],
        "new": ["--new", "host:proj"],
        "local-port": ["--local-port", str(quiet_port()), "host:proj"],
        "notebook": ["host:proj/n.ipynb"],
    }[name]


NAMES = """
plain|path|home|IPv6|IPv6 with a user|ssh://|ssh:// with a space|space|quote|percent|colon|dash|-p|-o|lab|app|env|python
|init|socket|no-mux|new|local-port|notebook
""".replace("\n", "").split("|")


def prepare(laptop: Laptop, host: Host) -> None:
    """Make the directories; and let ssh know the host by its IPv6 address, which the tests' sshd does not listen on.

    The login shell, which --init asks, finds the same Jupyter: none is installed.
    """
    (host.home / ".profile").write_text("PATH=%s:$PATH\n" % VENV_BIN)
    for directory in ("proj", "a b", "it's", "100%25", "a:b", "-x"):
        (host.home / directory).mkdir()
    (host.home / "proj/n.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    text = Path(laptop.config).read_text()
    Path(laptop.config).write_text(text.replace("Host host\n", "Host host ::1\n"))


@pytest.mark.jupyter
@pytest.mark.parametrize("name", NAMES)
def test_hints_of_an_open_lead_back_to_its_server_and_to_its_end(laptop: Laptop, host: Host, name: str) -> None:
    prepare(laptop, host)
    run = closed(held(laptop, *arguments_of(name, host)))
    (record,) = host.servers()
    again = typed(laptop, hint(run, "back"))
    assert again.expect(r"^Found|^Launched|^rjupyter: .*").group() == "Found", again.text
    again.expect("To end it")
    closed(again)
    assert [one["id"] for one in host.servers()] == [record["id"]]
    stop = typed(laptop, hint(run, "stop"))
    assert stop.wait() == 0 and "Stopped" in stop.stderr, stop.text
    assert not host.servers()


@pytest.mark.jupyter
@pytest.mark.parametrize(
    "name, more",
    [("env", []), ("init", ["--lab", "-p", "{port}"]), ("python", ["--state-dir", "my state"])],
    ids=["env", "init", "python"],
)
def test_hints_after_coming_back_have_what_was_typed_then(
    laptop: Laptop, host: Host, name: str, more: List[str]
) -> None:
    """It was launched with options that the second open does not need; that one's own are in the hints all the same."""
    prepare(laptop, host)
    more = [word.format(port=host.sshd.port) for word in more]
    *chosen, path = arguments_of(name, host)
    closed(held(laptop, *more, *chosen, path))
    run = held(laptop, *more, path)
    run.expect("^Found")
    closed(run)
    for kind in ("back", "stop"):
        words = hint(run, kind)
        kept = [word for word in more if kind == "back" or word != "--lab"]
        assert words[words.index("-F") + 1] == str(host.sshd.config) and set(kept) <= set(words), words
    again = typed(laptop, hint(run, "back"))
    assert token_of(again.url()) == token_of(run.url())
    again.expect("To end it")
    closed(again)
    stop = typed(laptop, hint(run, "stop"))
    assert stop.wait() == 0 and "Stopped" in stop.stderr, stop.text


@pytest.mark.jupyter
@pytest.mark.parametrize("name", ["IPv6", "ssh://", "space", "lab", "-p"])
def test_hint_of_a_tunnel_in_the_background_closes_it(laptop: Laptop, host: Host, name: str) -> None:
    prepare(laptop, host)
    run = laptop.run("-f", *arguments_of(name, host))
    assert run.status == 0, run.text
    done = typed(laptop, hint(run, "close"))
    assert done.wait() == 0 and "losed" in done.stderr, done.text


@pytest.mark.jupyter
@pytest.mark.parametrize("name", ["path", "lab", "IPv6", "ssh://", "env", "python", "init", "socket", "space", "-p"])
def test_hint_after_the_end_of_a_server_starts_such_another(laptop: Laptop, host: Host, name: str) -> None:
    prepare(laptop, host)
    run = held(laptop, *arguments_of(name, host))
    (first,) = host.servers()
    api(run.url(), "shutdown", "POST")
    assert run.wait(30) == 4
    again = typed(laptop, hint(run, "try"))
    again.expect("^Launched")
    again.url()
    (second,) = [record for record in host.servers() if record["id"] != first["id"]]
    assert (second["app"], second["root_dir"]) == (first["app"], first["root_dir"])
    for key in ("python", "env", "init", "socket"):
        assert second["request"].get(key) == first["request"].get(key), key


@pytest.mark.jupyter
def test_hint_of_one_server_among_several_ends_that_one(laptop: Laptop, host: Host) -> None:
    prepare(laptop, host)
    closed(held(laptop, "host:proj"))
    run = closed(held(laptop, "--new", "host:proj"))
    first, _ = sorted(host.servers(), key=lambda record: float(record["created"]))
    assert typed(laptop, hint(run, "stop")).wait() == 0
    assert [record["id"] for record in host.servers()] == [first["id"]]


@pytest.mark.jupyter
@pytest.mark.parametrize("path", ["host", "host:proj"])
def test_hint_after_attach_leads_to_the_same_server(laptop: Laptop, host: Host, path: str) -> None:
    prepare(laptop, host)
    closed(held(laptop, path))
    closed(held(laptop, "--new", path))
    old, _ = sorted(host.servers(), key=lambda record: float(record["created"]))
    run = closed(held(laptop, "--attach", old["id"], path))
    token = token_of(run.url())
    again = typed(laptop, hint(run, "back"))
    assert token_of(again.url()) == token
    again.expect("To end it")
    closed(again)
    assert typed(laptop, hint(again, "stop")).wait() == 0
    assert old["id"] not in [record["id"] for record in host.servers()]


@pytest.mark.jupyter
def test_hint_after_attach_to_a_server_of_another_app(laptop: Laptop, host: Host) -> None:
    prepare(laptop, host)
    closed(held(laptop, "--lab", "host:proj"))
    closed(held(laptop, "host:a b"))
    (lab,) = [record for record in host.servers() if record["app"] == "lab"]
    run = closed(held(laptop, "--attach", lab["id"], "host"))
    again = typed(laptop, hint(run, "back"))
    assert token_of(again.url()) == token_of(run.url()) and "/lab" in again.url()


# -- a login node -----------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(directory: Path, make_host: Callable[..., Host]) -> Iterator[Tuple[Host, Path]]:
    """A login node with the shims of PBS, whose jobs wait for the file `go` and then run on another machine."""
    obstacle = find_obstacle(["csh"])
    if obstacle:
        pytest.skip(obstacle)
    shims = directory / "shims"
    cluster = Cluster(directory / "cluster", ["node1"])
    try:
        cluster.start_machines()
        binaries = shim_scheduler.install(shims, "pbs", cluster.machines["node1"].enter())
        host = make_host(path="%s:%s" % (binaries, VENV_BIN), prefix=cluster.login_prefix)
        (host.home / "my work").mkdir()
        yield host, shims
        for job in shims.glob("*.job"):
            (job / "ended").touch()
    finally:
        cluster.stop()


def submissions(shims: Path) -> int:
    return len([line for line in (shims / "asked").read_text().splitlines() if json.loads(line)[0] == "qsub"])


def is_submitted(shims: Path, number: int) -> bool:
    return number in shim_scheduler.jobs(shims)


def none_on_the_login_node(host: Host) -> bool:
    return all(record["job"] for record in host.servers())


SUBMIT = ["--submit", "qsub -l 'select=1:ncpus=1' {script}", "host:my work"]


@pytest.mark.jupyter
def test_hints_of_a_job_lead_back_to_it_and_to_its_end(laptop: Laptop, queue: Tuple[Host, Path]) -> None:
    host, shims = queue
    (shims / "go").touch()
    run = closed(held(laptop, *SUBMIT))
    again = typed(laptop, hint(run, "back"))
    assert token_of(again.url()) == token_of(run.url())
    again.expect("To end it")
    closed(again)
    assert submissions(shims) == 1 and none_on_the_login_node(host)
    stop = typed(laptop, hint(run, "stop"))
    assert stop.wait() == 0 and "Stopped" in stop.stderr, stop.text
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone", 20)


@pytest.mark.jupyter
@pytest.mark.parametrize("kind", ["back", "try"])
def test_hints_after_the_end_of_a_job_submit_another(laptop: Laptop, queue: Tuple[Host, Path], kind: str) -> None:
    host, shims = queue
    (shims / "go").touch()
    run = held(laptop, *SUBMIT)
    if kind == "back":
        closed(run)
    subprocess.run([str(shims / "bin/qdel"), "41"], check=True)
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone", 20)
    if kind == "try":
        assert run.wait(40) == 4, run.text
    again = typed(laptop, hint(run, kind))
    again.url()
    again.expect("To end it")
    assert submissions(shims) == 2 and none_on_the_login_node(host)
    closed(again)
    assert laptop.run(*hint(again, "stop")).status == 0


@pytest.mark.jupyter
def test_hint_after_ctrl_c_while_a_job_waits_leads_back_to_it(laptop: Laptop, queue: Tuple[Host, Path]) -> None:
    host, shims = queue
    run = laptop.start(*SUBMIT, has_terminal=False)
    wait_until(lambda: shim_scheduler.jobs(shims), "it is submitted")
    run.expect("41", 30)
    run.interrupt()
    run.wait(20)
    kinds = [kind for kind in ("back", "try", "stop") if re.search(HINTS[kind], run.text, re.MULTILINE)]
    assert kinds, "no hint in:\n" + run.text
    kind = kinds[0]
    if kind != "stop":
        (shims / "go").touch()
        assert compute(typed(laptop, hint(run, kind)).url(), "print(1)") == "1\n"
        laptop.end_runs()
    assert submissions(shims) == 1 and none_on_the_login_node(host)
    assert typed(laptop, hint(run, "stop")).wait() == 0
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone", 20)


@pytest.mark.parametrize("words", [["stop"], ["stop", "--yes"]], ids=" ".join)
def test_stop_without_a_path_stops_the_only_job_that_waits(
    laptop: Laptop, queue: Tuple[Host, Path], words: List[str]
) -> None:
    _, shims = queue
    run = laptop.start(*SUBMIT, has_terminal=False)
    wait_until(lambda: shim_scheduler.jobs(shims), "it is submitted")
    run.expect("41", 30)
    run.interrupt()
    run.wait(20)
    stop = laptop.run("host", *words)
    assert stop.status == 0 and "No server" not in stop.stderr, stop.text
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone", 20)


def test_stop_without_a_path_names_the_jobs_when_several_wait(laptop: Laptop, queue: Tuple[Host, Path]) -> None:
    host, shims = queue
    (host.home / "other").mkdir()
    for number, path in ((41, "host:my work"), (42, "host:other")):
        run = laptop.start(*SUBMIT[:2], path, has_terminal=False)
        wait_until(partial(is_submitted, shims, number), "it is submitted")
        run.expect(str(number), 30)
        run.interrupt()
        run.wait(20)
    stop = laptop.run("host", "stop")
    assert stop.status == 1 and "my work" in stop.stderr and "other" in stop.stderr, stop.text
    assert len(shim_scheduler.jobs(shims)) == 2
    assert laptop.run("host", "stop", "--all").status == 0
    wait_until(lambda: not shim_scheduler.jobs(shims), "the jobs are gone", 20)
