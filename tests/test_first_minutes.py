"""The first minutes on a host: whose environment it is, which options came too late, what goes on after Ctrl-C."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, List

import pytest
from client import compute, is_up
from jupyters import jupyter_for_everyone, standin_environment
from sides import (
    ON_HOST,
    SCRIPT,
    SYSTEM_PATH,
    VENV_BIN,
    Host,
    Laptop,
    Run,
    bare_python,
    processes_with,
    quiet_port,
    wait_until,
    words_of,
)


def venv_without_jupyter(prefix: Path) -> None:
    """Make a project's environment as uv and poetry leave it: its own module, no Jupyter and no pip."""
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(prefix)], check=True)
    (packages,) = prefix.glob("lib/python3*/site-packages")
    (packages / "mymodel.py").write_text("answer = 42\n")


def closed(run: Run) -> None:
    run.interrupt()
    assert run.wait(30) == 0


# -- the project's environment ----------------------------------------------------------------------------------------

PLACES = ["proj/.venv", "proj/venv", "proj/env", ".venv", "proj/deep/.venv"]


def test_environment_of_the_project_without_jupyter_is_named_with_what_adds_it(laptop: Laptop, host: Host) -> None:
    (host.home / "proj/deep/er").mkdir(parents=True)
    for place in PLACES:
        venv_without_jupyter(host.home / place)
        with laptop.opened("--new", "--stop-on-exit", "host:proj/deep/er" if "deep" in place else "host:proj") as run:
            pass
        lines = [line for line in run.stderr.splitlines() if place in line]
        assert lines and re.search("pip install|uv (pip|add)|ipykernel", run.stderr), run.stderr
        shutil.rmtree(host.home / place)


@pytest.mark.jupyter
def test_environment_of_the_project_with_jupyter_is_used(laptop: Laptop, host: Host) -> None:
    """It is that of the directory, or of one above; the kernels of the last one tell it themselves."""
    (host.home / "proj/deep/er").mkdir(parents=True)
    for place in PLACES[:-1]:
        (host.home / place).symlink_to(standin_environment())
        with laptop.opened("--new", "--stop-on-exit", "host:proj") as run:
            pass
        assert "Using %s/bin/python (the project's environment)." % (host.home / place) in run.stderr, run.text
        (host.home / place).unlink()
    (host.home / PLACES[-1]).symlink_to(jupyter_for_everyone().parent)
    url = laptop.start("host:proj/deep/er", has_terminal=False).url()
    assert compute(url, "import sys; print(sys.prefix)").strip() == str(host.home / PLACES[-1])


def test_environment_above_home_or_of_no_python_is_not_the_projects(laptop: Laptop, host: Host) -> None:
    """A directory that is merely called env, and an environment that is not below home."""
    (host.home / "proj/env").mkdir(parents=True)
    (host.home / "proj/env/settings").write_text("")
    venv_without_jupyter(host.home.parent / "venv")
    run = laptop.start("host:proj", has_terminal=False)
    run.url()
    run.expect("To end it")
    assert "proj/env" not in run.stderr and "%s/venv" % host.home.parent not in run.stderr


def test_no_second_jupyter_is_installed_beside_an_environment_that_lacks_it_in_silence(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    host = make_host(path=bare_python(directory / "bin"))
    (host.home / "proj").mkdir()
    venv_without_jupyter(host.home / "proj/.venv")
    run = laptop.run("--no-install", "host:proj")
    assert run.status == 3
    assert "%s/proj/.venv" % host.home in run.stderr and "install" in run.stderr.partition("try:")[2], run.stderr


# -- options that came too late ---------------------------------------------------------------------------------------

LATE = [
    ["--idle-timeout", "1h"],
    ["--server-arg=--ServerApp.allow_origin=*"],
    ["--port", "18765"],
    ["--ip", "0.0.0.0"],
    ["--idle-timeout", "1h", "--port", "18765"],
]


def test_option_that_acts_at_a_launch_alone_is_said_not_to_apply(laptop: Laptop, host: Host) -> None:
    with laptop.opened("host"):
        pass
    for options in LATE:
        with laptop.opened(*options, "host") as run:
            run.expect("^Found")
        (line,) = [line for line in run.stderr.splitlines() if "--new" in line]
        for option in options:
            if option.startswith("--"):
                assert option.split("=")[0] in line, (options, line)
        assert "whoever reaches" not in run.stderr, (options, run.stderr)
    assert len(host.servers()) == 1
    run = laptop.start("--json", "--idle-timeout", "1h", "host", has_terminal=False)
    run.expect('"event": "open"')
    run.interrupt()
    run.wait()
    assert re.search(r"idle.timeout", run.stdout), run.stdout


def test_option_that_the_server_was_launched_with_needs_no_word(laptop: Laptop, host: Host) -> None:
    for words in ("Launched", "Found"):
        run = laptop.start("--idle-timeout", "1h", "--port", "18765", "host", has_terminal=False)
        run.expect("^" + words)
        run.url()
        run.expect("To end it")
        assert "--new" not in run.stderr
        closed(run)


# -- Ctrl-C before there is a result ----------------------------------------------------------------------------------


def bytes_read(pid: int) -> int:
    """Return how much a process has read since it was started."""
    return int(Path("/proc/%d/io" % pid).read_text().split()[1])


def test_ctrl_c_while_python_reads_the_file(laptop: Laptop) -> None:
    """Started by its path; a Ctrl-C each time a little later, from when Python compiles it."""
    words = [str(SCRIPT), "-o", "ProxyCommand=cat 3>&1 >/dev/null", "host", "list"]
    environment = dict(laptop.environment, PATH="%s:%s" % (VENV_BIN, SYSTEM_PATH))
    for number in range(8):
        run = Run(words, environment, has_terminal=False, cwd=str(laptop.home))
        laptop.runs.append(run)
        wait_until(partial(lambda pid: bytes_read(pid) > SCRIPT.stat().st_size, run.pid), "Python has the file")
        time.sleep(number * 0.05)  # not a wait: it is what is varied
        run.interrupt()
        assert run.wait(20) in (130, -signal.SIGINT) and not run.text, run.text


def test_ctrl_c_that_was_ignored_as_we_were_started_is_none(laptop: Laptop, host: Host) -> None:
    """As under nohup, or in the background of a script."""
    started = laptop.home / "started"
    started.write_text("#!/bin/sh\ntrap '' INT\nexec %s \"$@\"\n" % SCRIPT)
    started.chmod(0o755)
    laptop.installed = str(started)
    port = str(quiet_port())
    run = laptop.start("--local-port", port, "host", has_terminal=False, PATH="%s:%s" % (VENV_BIN, SYSTEM_PATH))
    url = run.url()
    run.expect("To end it")
    run.interrupt()
    with pytest.raises(AssertionError):
        run.expect("Closed", 2)
    assert is_up(url)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(30) == 0, run.text


def test_ctrl_c_at_the_question_for_a_host_key(laptop: Laptop, host: Host, mark: str) -> None:
    (host.sshd.directory / "known_hosts").write_text("")
    host.sshd.config.write_text(host.sshd.config.read_text().replace("StrictHostKeyChecking yes", ""))
    for number in range(6):
        run = laptop.start(*([] if number % 2 else ["--no-mux"]), "host", "list")
        run.expect("Are you sure you want to continue connecting")
        time.sleep(number * 0.005)  # not a wait: it is what is varied
        run.interrupt()
        assert run.wait(20) == 130, run.text
        assert "rjupyter:" not in run.text and "lock" not in run.text and "Exception" not in run.text, run.text
        assert not processes_with(mark, without=ON_HOST)


def check_what_goes_on(laptop: Laptop, run: Run, goes_on: Callable[[], Any]) -> None:
    """Either nothing goes on over there, or it is said, with a command that ends it; which is typed as it stands."""
    assert run.wait(20) == 130, run.text
    said = re.search(r"(?:To end it: |try: )(.*rjupyter\.py .+?)(?:   \(.*)?$", run.text, re.MULTILINE)
    if said:
        laptop.config = ""
        assert laptop.run(*words_of(said.group(1))).status == 0
    wait_until(lambda: not goes_on(), "nothing goes on that was not said: " + run.text, 20)


@pytest.mark.parametrize(
    "mode, has_terminal", [([], True), (["--no-mux"], False)], ids=["mux in a terminal", "no-mux without one"]
)
def test_ctrl_c_while_jupyter_is_launched(
    laptop: Laptop, slow_host: Host, mark: str, has_terminal: bool, mode: List[str]
) -> None:
    run = laptop.start(*mode, "host", has_terminal=has_terminal)
    wait_until(slow_host.servers, "it is launched")
    run.interrupt()
    check_what_goes_on(laptop, run, lambda: [w for w in processes_with(mark).values() if "jupyter-notebook" in w])


@pytest.mark.parametrize(
    "mode, signum", [([], signal.SIGINT), (["--no-mux"], signal.SIGTERM)], ids=["mux, INT", "no-mux, TERM"]
)
def test_what_is_launched_with_stop_on_exit_ends_with_us(
    laptop: Laptop, slow_host: Host, mark: str, mode: List[str], signum: signal.Signals
) -> None:
    run = laptop.start(*mode, "--stop-on-exit", "host", has_terminal=False)
    wait_until(slow_host.servers, "it is launched")
    os.kill(run.pid, signum)
    assert run.wait() == 128 + signum, run.text
    assert not slow_host.servers() and "To end it" not in run.text
    assert not [words for words in processes_with(mark).values() if "jupyter-notebook" in words]


@pytest.mark.parametrize("mode", [[], ["--no-mux"]], ids=["mux", "no-mux"])
def test_ctrl_c_before_we_read_that_something_was_launched(
    laptop: Laptop, host: Host, mark: str, mode: List[str]
) -> None:
    run = laptop.start(*mode, "host", has_terminal=False)
    run.expect("Connected to host")
    os.kill(run.pid, signal.SIGSTOP)
    # What was announced before is on the laptop by then, also where that is busy.
    wait_until(lambda: any(server["has_answered"] for server in host.servers()), "it is launched, and answers")
    os.kill(run.pid, signal.SIGINT)
    os.kill(run.pid, signal.SIGCONT)
    check_what_goes_on(laptop, run, lambda: [w for w in processes_with(mark).values() if "jupyter-notebook" in w])


def test_ctrl_c_while_jupyter_is_installed(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, mark: str
) -> None:
    """What installs waits for an index that does not answer; it is uv, whose environment is made at once."""
    bare_python(directory / "bin")
    (directory / "bin/uv").symlink_to(VENV_BIN / "uv")
    with socket.create_server(("127.0.0.1", 0)) as index:
        address = "http://127.0.0.1:%d/simple" % index.getsockname()[1]
        make_host(path=str(directory / "bin"), PIP_INDEX_URL=address, UV_INDEX_URL=address)
        run = laptop.start("host")
        run.expect("installing it")

        def pips() -> List[str]:
            return [words for words in processes_with(mark).values() if "pip install" in words or "uv pip" in words]

        wait_until(pips, "pip runs")
        run.expect(r"\S Installing Jupyter\b")
        run.interrupt()
        check_what_goes_on(laptop, run, pips)


@pytest.mark.jupyter
def test_ctrl_c_while_a_notebook_is_sent_or_started(laptop: Laptop, host: Host, mark: str) -> None:
    """The run's kernel takes its time to start; what goes on is said."""
    startup = host.home / ".ipython/profile_default/startup"
    startup.mkdir(parents=True)
    go = host.home / "go"
    (startup / "00.py").write_text("import os, time\nwhile not os.path.exists(%r): time.sleep(0.05)\n" % str(go))
    (laptop.home / "n.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": null, "outputs": [],'
        ' "source": "1"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    run = laptop.start("host", "execute", "n.ipynb", has_terminal=False)
    wait_until(lambda: [w for w in processes_with(mark).values() if "ipykernel" in w], "its kernel starts")
    run.interrupt()
    check_what_goes_on(laptop, run, lambda: [w for w in processes_with(mark).values() if "ipykernel" in w])
    go.touch()
