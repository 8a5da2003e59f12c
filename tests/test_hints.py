"""What we tell people to type: each command that is printed is typed as it stands, and does what it says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest
import shim_scheduler
from client import api, token_of
from jupyters import standin, standin_environment
from private_machines import Cluster, find_obstacle
from sides import SCRIPT, SYSTEM_PATH, VENV_BIN, Host, Laptop, Run, quiet_port, wait_until, words_of

HINTS = {
    "back": r"To come back: (.+)$",
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
    if name in ("by sh", "as a module"):  # which it cannot know
        assert said(told).startswith("usage: "), told
    else:
        assert told == call + " --help"


# -- destinations and options -----------------------------------------------------------------------------------------


def arguments_of(name: str, host: Host) -> List[str]:
    """Return how a server is opened: what chooses the host, the place and the environment, in many forms."""
    prefix = standin_environment()
    port = str(host.sshd.port)
    return {
        "plain": ["host"],
        "home": ["host:"],
        "IPv6, a space": ["[::1]:a b"],
        "IPv6 with a user, a quote": ["%s@[::1]:it's" % host.sshd.user],
        "ssh://": ["ssh://host:%s/proj" % port],
        "ssh:// with a user, a space": ["ssh://%s@host:%s/a%%20b" % (host.sshd.user, port)],
        "dash, percent, colon": ["host:-x 100%25:b"],
        "-p, -o, -l": ["-p", port, "-o", "ServerAliveInterval=7", "-l", host.sshd.user, "host:proj"],
        "lab, no-mux, local-port": ["--lab", "--no-mux", "--local-port", str(quiet_port()), "host:proj"],
        "app, socket": ["--app", "lab", "--socket", "host:proj"],
        "env, new": ["--env", str(prefix), "--new", "host:proj"],
        "python, init": ["--python", str(prefix / "bin/python"), "--init", "export A='b c'", "host:proj"],
        "env": ["--env", str(prefix), "host:proj"],
        "init": ["--init", "export A='b c'", "host:proj"],
        "notebook": ["host:proj/n.ipynb"],
    }[name]


NAMES = [
    pytest.param("plain", marks=pytest.mark.jupyter),
    "home",
    "IPv6, a space",
    "IPv6 with a user, a quote",
    "ssh://",
    "ssh:// with a user, a space",
    "dash, percent, colon",
    "-p, -o, -l",
    "lab, no-mux, local-port",
    "app, socket",
    "env, new",
    "init",
    "python, init",
    "notebook",
]


def prepare(laptop: Laptop, host: Host) -> None:
    """Make the directories; and let ssh know the host by its IPv6 address, which the tests' sshd does not listen on.

    The login shell, which --init asks, finds the same Jupyter: none is installed.
    """
    (host.home / ".profile").write_text("PATH=%s:$PATH\n" % standin())
    for directory in ("proj", "a b", "it's", "-x 100%25:b"):
        (host.home / directory).mkdir()
    (host.home / "proj/n.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    text = Path(laptop.config).read_text()
    Path(laptop.config).write_text(text.replace("Host host\n", "Host host ::1\n"))


@pytest.mark.parametrize("name", NAMES)
def test_hints_of_an_open_lead_back_to_its_server_and_to_its_end(laptop: Laptop, host: Host, name: str) -> None:
    """And after its end to such another."""
    prepare(laptop, host)
    run = closed(held(laptop, *arguments_of(name, host)))
    (first,) = host.servers()
    again = typed(laptop, hint(run, "back"))
    assert again.expect(r"^Found|^Launched|^rjupyter: .*").group() == "Found", again.text
    again.expect("To end it")
    assert [one["id"] for one in host.servers()] == [first["id"]]
    api(again.url(), "shutdown", "POST")
    assert again.wait() == 4
    other = typed(laptop, hint(again, "try"))
    other.expect("^Launched")
    other.expect("To end it")
    (second,) = [record for record in host.servers() if record["id"] != first["id"]]
    for key in ("app", "root_dir"):
        assert second[key] == first[key], key
    for key in ("python", "env", "init", "socket"):
        assert second["request"].get(key) == first["request"].get(key), key
    closed(other)
    stop = typed(laptop, hint(other, "stop"))
    assert stop.wait() == 0 and "Stopped" in stop.stderr, stop.text
    assert second["id"] not in [record["id"] for record in host.servers()]


@pytest.mark.parametrize(
    "name, more",
    [("env", ["--lab", "-p", "{port}"]), ("python, init", ["--state-dir", "my state"])],
    ids=["env", "python, init"],
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


def test_hint_of_a_tunnel_in_the_background_closes_it(laptop: Laptop, host: Host) -> None:
    prepare(laptop, host)
    config = laptop.config
    for name in ("IPv6, a space", "ssh://", "lab, no-mux, local-port", "-p, -o, -l"):
        laptop.config = config
        run = laptop.run("-f", *arguments_of(name, host))
        assert run.status == 0, run.text
        done = typed(laptop, hint(run, "close"))
        assert done.wait() == 0 and "losed" in done.stderr, (name, done.text)


@pytest.mark.parametrize("path", ["host", "host:proj"])
def test_hint_after_attach_leads_to_the_same_server(laptop: Laptop, host: Host, path: str) -> None:
    """Of three in one place, each hint is for one."""
    prepare(laptop, host)
    closed(held(laptop, path))
    (old,) = host.servers()
    newer = closed(held(laptop, "--new", path))
    newest = closed(held(laptop, "--new", path))
    run = closed(held(laptop, "--attach", old["id"], path))
    token = token_of(run.url())
    again = typed(laptop, hint(run, "back"))
    assert token_of(again.url()) == token
    again.expect("To end it")
    closed(again)
    assert typed(laptop, hint(again, "stop")).wait() == 0
    left = [record["id"] for record in host.servers()]
    assert len(left) == 2 and old["id"] not in left
    assert typed(laptop, hint(newer, "stop")).wait() == 0
    (last,) = host.servers()
    assert last["id"] in left and "pid %d," % last["pid"] in newest.text


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
        host = make_host(path="%s:%s" % (binaries, standin()), prefix=cluster.login_prefix)
        (host.home / "my work").mkdir()
        yield host, shims
        for job in shims.glob("*.job"):
            (job / "ended").touch()
    finally:
        cluster.stop()


def submissions(shims: Path) -> int:
    return len([line for line in (shims / "asked").read_text().splitlines() if json.loads(line)[0] == "qsub"])


def none_on_the_login_node(host: Host) -> bool:
    return all(record["job"] for record in host.servers())


SUBMIT = ["--submit", "qsub -l 'select=1:ncpus=1' {script}", "host:my work"]


def test_hints_of_a_job_lead_back_to_it_and_to_its_end_and_then_submit_another(
    laptop: Laptop, queue: Tuple[Host, Path]
) -> None:
    host, shims = queue
    (shims / "go").touch()
    run = closed(held(laptop, *SUBMIT))
    again = typed(laptop, hint(run, "back"))
    assert token_of(again.url()) == token_of(run.url())
    again.expect("To end it")
    assert submissions(shims) == 1 and none_on_the_login_node(host)
    delete(shims, 41)
    assert again.wait() == 4, again.text
    second = typed(laptop, hint(again, "try"))
    second.expect("To end it")
    assert submissions(shims) == 2 and none_on_the_login_node(host)
    closed(second)
    delete(shims, 42)
    third = typed(laptop, hint(second, "back"))
    third.expect("To end it")
    assert submissions(shims) == 3 and none_on_the_login_node(host)
    closed(third)
    stop = typed(laptop, hint(third, "stop"))
    assert stop.wait() == 0 and "Stopped" in stop.stderr, stop.text
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone")


def delete(shims: Path, number: int) -> None:
    """End a job as its user does."""
    subprocess.run([str(shims / "bin/qdel"), str(number)], check=True)
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone")


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
        assert api(typed(laptop, hint(run, kind)).url(), "status")["kernels"] == 0
        laptop.end_runs()
    assert submissions(shims) == 1 and none_on_the_login_node(host)
    assert typed(laptop, hint(run, "stop")).wait() == 0
    wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone", 20)


def test_stop_without_a_path_while_jobs_wait(laptop: Laptop, queue: Tuple[Host, Path]) -> None:
    """It names them where there are several, and stops the only one."""
    host, shims = queue
    (host.home / "other").mkdir()

    def submit(number: int, path: str) -> None:
        run = laptop.start(*SUBMIT[:2], path, has_terminal=False)
        wait_until(lambda: number in shim_scheduler.jobs(shims), "it is submitted")
        run.expect(str(number))
        run.interrupt()
        run.wait()

    submit(41, "host:my work")
    submit(42, "host:other")
    stop = laptop.run("host", "stop")
    assert stop.status == 1 and "my work" in stop.stderr and "other" in stop.stderr, stop.text
    assert len(shim_scheduler.jobs(shims)) == 2
    assert laptop.run("host", "stop", "--all").status == 0
    wait_until(lambda: not shim_scheduler.jobs(shims), "the jobs are gone")
    for number, words in ((43, ["stop"]), (44, ["stop", "--yes"])):
        submit(number, "host:my work")
        stop = laptop.run("host", *words)
        assert stop.status == 0 and "No server" not in stop.stderr, stop.text
        wait_until(lambda: not shim_scheduler.jobs(shims), "the job is gone")
