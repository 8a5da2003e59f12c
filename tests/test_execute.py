"""Notebooks executed on the host, by real kernels, and their results here; whatever happens meanwhile."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, List, Tuple

import pytest
from client import check_failure, events_of, listed
from execution import mounted
from jupyters import AGES, jupyter_for_everyone, jupyter_of, nbclient_alone
from notebooks import PYTHON_SPEC, cells_of, code, printed, write_notebook
from readme import README
from sides import BOTH_MODES, ON_HOST, Host, Laptop, Run, User, processes_with, wait_until, wait_until_gone, words_of

import rjupyter

pytestmark = pytest.mark.nbclient


def the_run(host: Host) -> Path:
    """Return the directory of the only run on the host."""
    (directory,) = (host.home / ".local/state/rjupyter/runs").iterdir()
    return directory


def runner_pid(host: Host) -> int:
    return int(json.loads((the_run(host) / "run.json").read_text())["pid"])


# -- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_result_is_beside_the_notebook(laptop: Laptop, host: Host) -> None:
    (host.home / "work").mkdir()
    notebook = write_notebook(laptop.home / "train.ipynb", "import os", "print(os.getcwd())", "6 * 7")
    before = notebook.read_bytes()
    run = laptop.run("host:work", "execute", "train.ipynb")
    assert run.status == 0, run.text
    assert run.stdout == "train.executed.ipynb\n"
    result = laptop.home / "train.executed.ipynb"
    assert printed(result) == ["", "%s\n" % (host.home / "work"), ""]
    assert cells_of(result)[2]["outputs"][0]["data"]["text/plain"] == ["42"]
    assert notebook.read_bytes() == before
    assert host.sshd.logins() == 1
    lines = [line for line in run.stderr.splitlines() if not line.endswith("...")]  # of a step that took its time
    patterns = [r"Executing train\.ipynb on host \(r[0-9a-f]{4}\)\."]
    patterns += [r"Cell %d/3 done \(\d+\.\d s\)\." % number for number in (1, 2, 3)]
    patterns += [r"Executed train\.ipynb: 3 cells in \d+\.\d s\."]
    assert len(lines) == len(patterns) + 1, lines
    for line, pattern in zip(lines[1:], patterns):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_several_in_place_one_after_the_other(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "a.ipynb", "open('flag', 'w').write('x')").chmod(0o640)
    write_notebook(laptop.home / "b.ipynb", "print(open('flag').read())")
    run = laptop.run("host", "execute", "--inplace", "a.ipynb", "b.ipynb")
    assert (run.status, run.stdout) == (0, "a.ipynb\nb.ipynb\n"), run.text
    assert printed(laptop.home / "b.ipynb") == ["x\n"]
    assert (laptop.home / "a.ipynb").stat().st_mode & 0o777 == 0o640
    assert host.sshd.logins() == 1


def test_output_and_notebook_that_is_on_the_host(laptop: Laptop, host: Host) -> None:
    (host.home / "work").mkdir()
    there = write_notebook(host.home / "work/it's #1 %.ipynb", "print('there')")
    before = there.read_bytes()
    run = laptop.run("host:work", "execute", ":it's #1 %.ipynb", "-o", "out.ipynb")
    assert (run.status, run.stdout) == (0, "out.ipynb\n"), run.text
    assert printed(laptop.home / "out.ipynb") == ["there\n"]
    assert there.read_bytes() == before
    there.chmod(0o640)
    run = laptop.run("host:work", "execute", ":it's #1 %.ipynb", "--inplace")
    assert (run.status, run.stdout) == (0, ""), run.text
    assert printed(there) == ["there\n"]
    assert there.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in there.parent.iterdir()] == [there.name]
    check_failure(laptop.run("host:work", "execute", ":nothing.ipynb"), 1, "cannot read", "nothing.ipynb")


def test_large_output_arrives_whole(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "big.ipynb", "for _ in range(20):\n    print('x' * 1000000)", "print('after')", "1")
    run = laptop.run("host", "execute", "big.ipynb")
    assert run.status == 0, run.text
    first, second, _ = printed(laptop.home / "big.executed.ipynb")
    assert (len(first), second) == (20 * 1000001, "after\n")


def test_parameters(laptop: Laptop, host: Host) -> None:
    write_notebook(
        laptop.home / "p.ipynb", "a = 0", code("epochs = 1\nname = 'x'", "parameters"), "print(epochs, repr(name), b)"
    )
    run = laptop.run("host", "execute", "p.ipynb", "-p", "epochs=20", "-p", 'name=it\'s "q" é', "-p", "b=[1, null]")
    assert run.status == 0, run.text
    result = laptop.home / "p.executed.ipynb"
    assert printed(result)[-1] == "20 'it\\'s \"q\" é' [1, None]\n"
    injected = cells_of(result)[2]
    assert injected["metadata"]["tags"] == ["injected-parameters"]
    # Again: the earlier injection is replaced.
    assert (
        laptop.run("host", "execute", "--inplace", "p.executed.ipynb", "-p", "epochs=3", "-p", "b=Infinity").status == 0
    )
    assert len(cells_of(result)) == 4
    assert printed(result)[-1] == "3 'x' inf\n"


@pytest.mark.parametrize("age", AGES)
def test_jupyter_of_another_age(laptop: Laptop, make_host: Callable[..., Host], age: str) -> None:
    make_host(path=str(jupyter_of(age)))
    write_notebook(laptop.home / "old.ipynb", "import sys; print(sys.prefix)", code("p = 1", "parameters"), minor=4)
    run = laptop.run("host", "execute", "old.ipynb", "-p", "p=2")
    assert run.status == 0, run.text
    assert printed(laptop.home / "old.executed.ipynb")[0] == "%s\n" % jupyter_of(age).parent


def test_kernel_that_the_host_has_not(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "a.ipynb", "print(1)", kernelspec=dict(PYTHON_SPEC, name="my-env"))
    run = laptop.run("host", "execute", "a.ipynb")
    assert run.status == 0
    assert "There is no kernel my-env there; using python3." in run.stderr
    run = laptop.run("host", "execute", "a.ipynb", "--kernel", "python3")
    assert run.status == 0 and "There is no kernel" not in run.stderr
    spec = {"name": "lfortran-9", "display_name": "Fortran", "language": "fortran"}
    write_notebook(laptop.home / "f.ipynb", "1", kernelspec=spec)
    run = laptop.run("host", "execute", "f.ipynb")
    check_failure(run, 1, "cannot be executed", "written in fortran", "no kernel lfortran-9", "python3")


# -- where it runs ----------------------------------------------------------------------------------------------------


def test_environment_that_was_asked_for(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    (directory / "bin").mkdir()
    (directory / "bin/python3").symlink_to(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    host = make_host(path=str(directory / "bin"))
    (host.home / "miniconda3/envs").mkdir(parents=True)
    (host.home / "miniconda3/envs/ml").symlink_to(nbclient_alone().parent)
    write_notebook(laptop.home / "a.ipynb", "import sys; print(sys.prefix)")
    check_failure(laptop.run("--no-install", "host", "execute", "a.ipynb"), 3, "no Jupyter on the host")
    for option, value in (("--env", "ml"), ("--python", "~/miniconda3/envs/ml/bin/python")):
        run = laptop.run(option, value, "host", "execute", "a.ipynb")
        assert run.status == 0, run.text
        assert printed(laptop.home / "a.executed.ipynb") == ["%s/miniconda3/envs/ml\n" % host.home]


def test_jupyter_without_nbclient_leads_to_the_next(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    (directory / "bin").mkdir()
    bare = directory / "bin/jupyter-notebook"
    bare.write_text("#!/usr/bin/python3 -I\n")
    bare.chmod(0o755)
    host = make_host(path=str(directory / "bin"))
    (host.home / "miniconda3").symlink_to(jupyter_for_everyone().parent)
    write_notebook(laptop.home / "a.ipynb", "import sys; print(sys.prefix)")
    run = laptop.run("host", "execute", "a.ipynb")
    assert run.status == 0, run.text
    assert "Using %s/miniconda3/bin/jupyter-notebook (the usual places)." % host.home in run.stderr
    assert printed(laptop.home / "a.executed.ipynb") == ["%s\n" % jupyter_for_everyone().parent]


@pytest.mark.parametrize(
    ("head", "beside", "expected"),
    [
        ("#!{0}/venv/bin/python3.11\n", "", "venv/bin/python3.11"),
        ("#!/usr/bin/env python3\n", "", "path/python3"),
        ("#!/usr/bin/env -S python3 -I\n", "", "path/python3"),
        ("#!/bin/sh\n'''exec' \"{0}/a b/bin/python\" \"$0\" \"$@\"\n' '''\n", "", "a b/bin/python"),
        ("#!/bin/sh\n'''exec' '{0}/a b/bin/python' \"$0\" \"$@\"\n' '''\n", "", "a b/bin/python"),
        ("#!/bin/sh\n'''exec' {0}/venv/bin/python3.11 \"$0\" \"$@\"\n' '''\n", "", "venv/bin/python3.11"),
        ("#!/usr/bin/env bash\nexec pyenv exec\n", "bin/python3", "bin/python3"),
        ("#!/bin/sh\nexec apptainer exec x jupyter\n", "", ""),
    ],
)  # fmt: skip
def test_interpreter_behind_a_command(tmp_path: Path, head: str, beside: str, expected: str) -> None:
    for name in ["venv/bin/python3.11", "path/python3", "a b/bin/python"] + [beside] * bool(beside):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to("/bin/true")
    (tmp_path / "bin").mkdir(exist_ok=True)
    command = tmp_path / "bin/jupyter-notebook"
    command.write_text(head.format(tmp_path))
    found = rjupyter.Launcher(
        app="notebook", argv=[str(command)], where="PATH", environment={"PATH": str(tmp_path / "path")}
    )
    assert rjupyter.interpreter_of(found) == (str(tmp_path / expected) if expected else "")


# -- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_cell_that_fails(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "bad.ipynb", "print('before')", "{}['no such key']", "print('never')")
    run = laptop.run("host", "execute", "bad.ipynb")
    assert (run.status, run.stdout) == (5, "bad.executed.ipynb\n")
    assert (
        "rjupyter: cell 2 of 3 failed in bad.ipynb\n  why: KeyError: 'no such key'\n       line 1: {}['no such key']\n"
        in run.stderr
    )
    assert "the result so far is in bad.executed.ipynb" in run.stderr
    _, second, third = cells_of(laptop.home / "bad.executed.ipynb")
    assert printed(laptop.home / "bad.executed.ipynb")[0] == "before\n"
    assert second["outputs"][0]["ename"] == "KeyError"
    assert third["outputs"] == [] and third["execution_count"] is None


KILLED = "it was killed, by hand or because memory ran out"


@pytest.mark.jupyter
def test_other_ways_of_a_cell_to_fail(laptop: Laptop, host: Host) -> None:
    ways = {
        "exit": ("import sys; sys.exit(3)", "cell 2 of 3 failed in exit.ipynb: SystemExit: 3"),
        "text": ("raise ValueError('one\\ntwo \\033[31mred')", "cell 2 of 3 failed in text.ipynb: two ?[31mred"),
        "kill": ("import os; os.kill(os.getpid(), 9)", "the kernel of kill.ipynb died in cell 2 of 3: " + KILLED),
    }
    for name, (source, _) in ways.items():
        write_notebook(laptop.home / (name + ".ipynb"), "print('before')", source, "print('never')")
    run = laptop.run("host", "execute", "-j", "3", *[name + ".ipynb" for name in ways])
    assert run.status == 5, run.text
    for name, (_, words) in ways.items():
        assert "%s.ipynb: %s\n" % (name, words) in run.stderr, run.stderr
        assert printed(laptop.home / (name + ".executed.ipynb"))[::2] == ["before\n", ""]


def test_failure_ends_the_row(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "bad.ipynb", "1 / 0")
    write_notebook(laptop.home / "good.ipynb", "1")
    assert laptop.run("host", "execute", "bad.ipynb", "good.ipynb").status == 5
    assert not (laptop.home / "good.executed.ipynb").exists()


@pytest.mark.jupyter
def test_time_limit(laptop: Laptop, host: Host) -> None:
    write_notebook(
        laptop.home / "slow.ipynb", "print('before')", "import time\nprint('in it', flush=True)\ntime.sleep(600)"
    )
    run = laptop.run("host", "execute", "slow.ipynb", "--timeout", "10")
    assert run.status == 6, run.text
    assert "rjupyter: slow.ipynb took too long\n  why: its time ran out in cell 2 of 2\n" in run.stderr
    assert printed(laptop.home / "slow.executed.ipynb") == ["before\n", "in it\n"]


WAITS = "import os, time\nprint('waits', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('went')"


def start_waiting(laptop: Laptop, *options: str, has_terminal: bool = False) -> Tuple[Run, str]:
    """Start a notebook whose second cell waits for the file `go`; return the run when that cell runs, and its id."""
    write_notebook(laptop.home / "w.ipynb", "x = 1", WAITS, "print(x)")
    run = laptop.start(*options, "host", "execute", "-v", "w.ipynb", has_terminal=has_terminal)
    run.expect("^waits$")
    return run, run.expect(r"\((r[0-9a-f]{4})\)").group(1)


@pytest.mark.jupyter
def test_stop_keeps_what_there_is(laptop: Laptop, host: Host) -> None:
    run, identity = start_waiting(laptop)
    (record,) = listed(laptop, "run")
    assert (record["id"], record["state"], record["cell"], record["count"]) == (identity, "running", 2, 3)
    stop = laptop.run("host", "stop", identity)
    assert stop.status == 0
    assert "Stopped the execution of w.ipynb (%s); its result so far is kept." % identity in stop.stderr
    assert run.wait() == 1
    assert "the execution of w.ipynb was stopped" in run.stderr
    assert printed(laptop.home / "w.executed.ipynb") == ["", "waits\n", ""]
    assert cells_of(laptop.home / "w.executed.ipynb")[1]["outputs"][-1]["ename"] == "KeyboardInterrupt"
    assert [run["state"] for run in listed(laptop, "run")] == ["stopped"]
    check_failure(laptop.run("host", "stop", identity), 1, identity)


def test_stop_of_a_kernel_that_does_not_hear(laptop: Laptop, host: Host, mark: str) -> None:
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)"
    )
    write_notebook(laptop.home / "d.ipynb", "print(1)", deaf)
    run = laptop.start("host", "execute", "-v", "d.ipynb", has_terminal=False)
    run.expect("^deaf$")
    assert laptop.run("host", "stop", "--all", "--yes").status == 0
    assert run.wait() == 1
    assert printed(laptop.home / "d.executed.ipynb")[0] == "1\n"
    wait_until_gone(mark, "runner and kernel are gone")


def test_disk_that_is_full(laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host]) -> None:
    user = make_user("/bin/bash")
    with mounted(user.home, "-t", "tmpfs", "-o", "size=8m,mode=755,uid=%d" % user.uid, "tmpfs"):
        user.write(".profile", "PATH=%s:$PATH\n" % nbclient_alone())
        make_host(user=user)
        write_notebook(laptop.home / "a.ipynb", "print('before')", "print('x' * 30000000)", "print('after')")
        run = laptop.run("host", "execute", "a.ipynb")
        assert run.status in (1, 5)
        assert "No space left" in run.stderr or "the disk is full" in run.stderr
        assert printed(laptop.home / "a.executed.ipynb")[0] == "before\n"


# -- what runs on the host outlives us --------------------------------------------------------------------------------


def test_ctrl_c_leaves_it_running_and_attach_brings_the_result(laptop: Laptop, host: Host) -> None:
    run, identity = start_waiting(laptop, has_terminal=True)
    run.interrupt()
    assert run.wait() == 130
    assert "w.ipynb keeps running.\nTo follow it again: " in run.text
    assert "execute --attach %s\n" % identity in run.text and "stop %s" % identity in run.text
    again = laptop.start("host", "execute", "--attach", identity, "-v", has_terminal=False)
    again.expect("^waits$")  # from its begin
    (host.home / "go").write_text("")
    assert (again.wait(), again.stdout) == (0, "w.executed.ipynb\n"), again.text
    assert printed(laptop.home / "w.executed.ipynb") == ["", "waits\nwent\n", "1\n"]
    late = laptop.run("host", "execute", "--attach", identity, "-o", "late.ipynb")
    assert late.status == 0
    assert (laptop.home / "late.ipynb").read_bytes() == (laptop.home / "w.executed.ipynb").read_bytes()
    check_failure(laptop.run("host", "execute", "--attach", "r0000"), 1, "no run of yours has this id: r0000")


@BOTH_MODES
def test_lost_connection_is_dialled_again_and_nothing_is_said_twice(
    laptop: Laptop, host: Host, mode: List[str]
) -> None:
    run, _ = start_waiting(laptop, *mode)
    host.sshd.end_connections()
    run.expect("Connected to host again")
    (host.home / "go").write_text("")
    assert run.wait() == 0, run.text
    assert printed(laptop.home / "w.executed.ipynb") == ["", "waits\nwent\n", "1\n"]
    assert run.text.count("Cell 1/3 done") == 1 and run.text.count("\nwaits\n") == 1


def test_agent_that_is_killed(laptop: Laptop, host: Host, mark: str) -> None:
    """The run goes on, and what is said leads to it."""
    run, identity = start_waiting(laptop)
    (agent,) = [pid for pid, words in processes_with(mark).items() if re.match(r"\S*python3 -IS -c import sys", words)]
    os.kill(agent, signal.SIGKILL)
    assert run.wait() == 1, run.text
    assert "the agent on host ended early" in run.stderr
    (host.home / "go").write_text("")
    words = words_of(run.expect("To follow it again: (.*)").group(1))
    assert words[-4:] == ["host", "execute", "--attach", identity]
    laptop.config = ""  # it stands in the words
    assert laptop.run(*words).status == 0
    assert printed(laptop.home / "w.executed.ipynb")[2] == "1\n"


def test_result_that_cannot_be_written_is_not_called_written(laptop: Laptop, host: Host) -> None:
    """Nor is one that there is not; and what is said brings it where there is room."""
    write_notebook(laptop.home / "w.ipynb", "1")
    (laptop.home / "sub").mkdir()
    run = laptop.run("--json", "host", "execute", "w.ipynb", "--kernel", "none")
    (executed,) = [event for event in events_of(run) if event["event"] == "executed"]
    assert (executed["outcome"], executed["path"]) == ("invalid", None)
    assert not (laptop.home / "w.executed.ipynb").exists()
    write_notebook(laptop.home / "w.ipynb", "x = 1", WAITS, "print(x)")
    run = laptop.start("host", "execute", "-v", "w.ipynb", "-o", "sub/r.ipynb", has_terminal=False)
    run.expect("^waits$")
    identity = run.expect(r"\((r[0-9a-f]{4})\)").group(1)
    (laptop.home / "sub").rmdir()
    (host.home / "go").write_text("")
    assert run.wait() == 1 and "Executed" not in run.text, run.text
    words = words_of(run.stderr.rpartition("try: ")[2])
    assert words[-4:] == ["host", "execute", "--attach", identity]
    laptop.config = ""
    assert laptop.run(*words).status == 0
    assert printed(laptop.home / "w.executed.ipynb")[2] == "1\n"


def test_kill_9_of_us(laptop: Laptop, host: Host, mark: str) -> None:
    run, identity = start_waiting(laptop)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    wait_until_gone(mark, "nothing is left on the laptop", 15, without=ON_HOST)
    (host.home / "go").write_text("")
    assert laptop.run("host", "execute", "--attach", identity).status == 0
    assert printed(laptop.home / "w.executed.ipynb")[2] == "1\n"


def test_two_runs_of_one_notebook_do_not_overlap(laptop: Laptop, host: Host) -> None:
    run, identity = start_waiting(laptop)
    second = laptop.run("host", "execute", "w.ipynb")
    assert (second.status, second.stdout) == (0, "")
    assert re.search(r"w\.ipynb is already running \(%s, for \d+ s\)" % identity, second.stderr)
    third = laptop.start("host", "execute", "--overlap", "w.ipynb", "-o", "third.ipynb", has_terminal=False)
    wait_until(lambda: len([run for run in listed(laptop, "run") if run["state"] == "running"]) == 2, "both run")
    (host.home / "go").write_text("")
    assert [run.wait(), third.wait()] == [0, 0]


def test_two_at_the_same_moment(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "w.ipynb", WAITS)
    both = [laptop.start("host", "execute", "w.ipynb", has_terminal=False) for _ in range(2)]

    def has_given_way() -> bool:
        for run in both:
            run._read(0.05)
        return any("is already running" in run.text for run in both)

    wait_until(has_given_way, "one gives way")
    (host.home / "go").write_text("")
    assert [run.wait() for run in both] == [0, 0]
    assert sorted(run.stdout for run in both) == ["", "w.executed.ipynb\n"]
    assert len(list((host.home / ".local/state/rjupyter/runs").iterdir())) == 1


def test_ended_runs_are_kept_for_a_week(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "a.ipynb", "1")
    assert laptop.run("host", "execute", "a.ipynb").status == 0
    old = the_run(host)
    assert laptop.run("host", "execute", "a.ipynb").status == 0
    assert old.exists()
    past = time.time() - 7 * 86400 - 60
    os.utime(old, (past, past))
    assert laptop.run("host", "execute", "a.ipynb").status == 0
    assert old.exists()  # it ran for longer than that, and was killed now
    for name in ("journal", "log"):
        os.utime(old / name, (past, past))
    assert laptop.run("host", "execute", "a.ipynb").status == 0
    assert not old.exists()
    assert laptop.run("host", "list").stdout == ""
    table = laptop.run("host", "list", "--all").stdout.splitlines()
    assert table[1].split() == ["ID", "STATE", "CELL", "NOTEBOOK", "DIRECTORY", "AGE"]
    assert [line.split()[1:4] for line in table[2:]] == [["done", "1/1", "a.ipynb"]] * 3


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_no_notebook_is_said_before_anything_is_connected(laptop: Laptop, host: Host) -> None:
    cases = {
        "{": "it is not JSON",
        "[1]": "it has no nbformat",
        "\xff": "it is not JSON",
        "[" * 100000: "it is not JSON",
        "": "it is empty",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "it is a pointer of Git LFS",
        '{"cells": [\n<<<<<<< HEAD\n1\n=======\n2\n>>>>>>> theirs\n]}': "it has a merge conflict",
    }
    for text, words in cases.items():
        (laptop.home / "no.ipynb").write_bytes(text.encode("latin-1"))
        check_failure(laptop.run("host", "execute", "no.ipynb"), 1, "no.ipynb is not a notebook", words)
    assert host.sshd.logins() == 0


def test_notebook_that_jupyter_does_not_take(laptop: Laptop, host: Host) -> None:
    (laptop.home / "odd.ipynb").write_text('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 7}')
    check_failure(laptop.run("host", "execute", "odd.ipynb"), 1, "odd.ipynb cannot be executed on host")
    assert not (laptop.home / "odd.executed.ipynb").exists()


WRONG: List[Tuple[List[str], int, str]] = [
    ([], 2, "execute takes notebooks"),
    (["nowhere.ipynb"], 1, "cannot read nowhere.ipynb"),
    (["a.ipynb", "a.ipynb", "-o", "x"], 2, "-o goes with one notebook"),
    (["a.ipynb", "-p", "1=2"], 2, "a parameter is NAME=VALUE"),
    (["a.ipynb", "-p", "import=2"], 2, "a parameter is NAME=VALUE"),
    (["a.ipynb", "-p", "x=[1,"], 2, "begins like JSON, and is none"),
    (["a.ipynb", "--timeout", "soon"], 2, "a duration is a number"),
    (["a.ipynb", "-o", "nowhere/x.ipynb"], 1, "no place for the result"),
    (["a.ipynb", "--attach", "r1234"], 2, "execute takes notebooks, or --attach ID"),
]


def test_wrong_usage(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "a.ipynb", "1")
    for arguments, status, words in WRONG:
        check_failure(laptop.run("host", "execute", *arguments), status, words)
    assert host.sshd.logins() == 0


@pytest.mark.parametrize("language", list(rjupyter.LANGUAGES))
def test_each_language_has_a_form_for_each_value(language: str) -> None:
    """A value within a list is written as it is alone; a line for each, and no newline within one."""
    _, sequence, _, _ = rjupyter.LANGUAGES[language]
    for value in (None, True, False, 0, -1, 2**40, 1.5, float("nan"), float("inf"), float("-inf"), "", "a\nb", "$x"):
        alone = rjupyter.literal(value, language)
        assert rjupyter.literal([value, value], language) == sequence % ", ".join([alone, alone])
        assert "\n" not in alone


def test_name_of_a_grid_has_its_values() -> None:
    names = [
        rjupyter.label_of("a.ipynb", {"x": value}) for value in (0.1, "a/b", "a_b", None, "null", "", 1, "1", True)
    ]
    assert names[0] == "a.x=0.1.ipynb"
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"a\.x=[\w.-]*\.ipynb", name) for name in names)


def test_pattern_matches_as_in_a_shell(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", "d/c.png", "d/e/f.png", "g[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "out").symlink_to("/etc")
    found = {
        pattern: sorted(
            os.path.relpath(path, tmp_path) for path in rjupyter.matching(str(tmp_path), pattern.split("/"))
        )
        for pattern in ("*.png", ".*.png", "d/*", "**/*.png", "d/**", "out/**", "nothing", "g[[]1].txt", "d/e/f.png")
    }
    assert found["*.png"] == ["a.png"] and found[".*.png"] == [".b.png"]
    assert found["d/*"] == ["d/c.png", "d/e"] and found["d/**"] == ["d"]
    assert found["**/*.png"] == ["a.png", "d/c.png", "d/e/f.png"]
    assert found["out/**"] == ["out"] and found["nothing"] == []
    assert found["g[[]1].txt"] == ["g[1].txt"] and found["d/e/f.png"] == ["d/e/f.png"]


def test_host_does_not_choose_where_a_result_is_written(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "a.ipynb", "1")
    assert laptop.run("host", "execute", "a.ipynb").status == 0
    record = the_run(host) / "run.json"
    for name in ("../../.bashrc", ".bashrc", "/tmp/x"):
        record.write_text(json.dumps(dict(json.loads(record.read_text()), name=name)))
        check_failure(laptop.run("host", "execute", "--attach", the_run(host).name), 1, "makes no sense")
    assert sorted(path.name for path in laptop.home.iterdir()) == [".ssh"] * (laptop.home / ".ssh").exists() + [
        "a.executed.ipynb",
        "a.ipynb",
    ]


def test_json_events(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "a.ipynb", "1", "1 / 0")
    run = laptop.run("host", "execute", "--json", "a.ipynb")
    events = events_of(run)
    assert [event["event"] for event in events] == ["connected", "started", "cell", "cell", "executed", "failure"]
    assert [event["is_done"] for event in events[2:4]] == [True, False]
    assert (events[4]["path"], events[4]["outcome"]) == ("a.executed.ipynb", "failed")
    assert events[5]["status"] == run.status == 5


def test_crontab_line_of_the_readme(laptop: Laptop, host: Host, directory: Path) -> None:
    """As cron runs it: /bin/sh, no terminal, an environment of four words, rjupyter.py and gpu1 as a user has them."""
    (line,) = re.findall(r"^    0 6 \* \* \* (cd .* execute .*)$", README, re.MULTILINE)
    (host.home / "work").mkdir()
    (laptop.home / "reports").mkdir()
    notebook = write_notebook(laptop.home / "reports/daily.ipynb", "import os; print(os.getcwd())")
    program = laptop.home / ".local/bin/rjupyter"
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/bin/sh\nexport RJUPYTER_TMP=%s\nexec %s %s -F %s -o HostKeyAlias=[127.0.0.1]:%d -o HostName=127.0.0.1 "
        '-p %d -i %s -o UserKnownHostsFile=%s "$@"\n'
        % (directory, sys.executable, rjupyter.__file__, "/dev/null", host.sshd.port, host.sshd.port,
           host.sshd.directory / "user_key", host.sshd.directory / "known_hosts")
    )  # fmt: skip
    program.chmod(0o755)
    environment = {
        "HOME": str(laptop.home),
        "LOGNAME": "x",
        "SHELL": "/bin/sh",
        "PATH": "/usr/bin:/bin",
    }
    argv = ["/usr/bin/setsid", "--wait", "/bin/sh", "-c", line]
    for source, status, words in (("print(1)", 0, ""), ("1 / 0", 5, "rjupyter: cell 1 of 1 failed in daily.ipynb")):
        write_notebook(notebook, source)
        null = subprocess.DEVNULL
        answer = subprocess.run(argv, env=environment, stdin=null, capture_output=True, text=True, timeout=120)
        assert (answer.returncode, answer.stdout) == (status, ""), answer.stderr
        assert answer.stderr.partition("\n")[0] == words
        assert cells_of(laptop.home / "reports/daily.executed.ipynb")[0]["execution_count"] == 1
    keys = [record["key"] for record in host.runs()]
    assert keys == ["%s:%s" % (socket.gethostname(), notebook)] * 2
