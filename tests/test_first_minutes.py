"""The first minutes on a host: whose environment it is, which options came too late, what goes on after Ctrl-C."""

import base64
import contextlib
import hashlib
import http.server
import os
import re
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from client import compute, is_up
from jupyters import environment, jupyter_for_everyone, standin_environment, standin_wheels
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


def named_in(run: Run, trouble: str) -> Dict[str, str]:
    """Return the environments that are named for that trouble, each with the command that is said to help."""
    found = r"^(.+): %s, so another one is used\.\s+To change that, on the host: (.+)$" % trouble
    return dict(re.findall(found, run.stderr, re.MULTILINE))


def closed(run: Run) -> None:
    run.interrupt()
    assert run.wait(30) == 0


# -- the project's environment ----------------------------------------------------------------------------------------

PLACES = ["proj/.venv", "proj/venv", "proj/env", ".venv", "proj/deep/.venv"]


def test_environment_of_the_project_without_jupyter_is_named_with_what_adds_it(laptop: Laptop, host: Host) -> None:
    """One in each directory, of several the first. Neither uv nor pip is there; then the Pythons are gone as well.

    What is said of the innermost is typed.
    """
    (host.home / "proj/deep/er").mkdir(parents=True)
    for place in (*PLACES, "proj/deep/er/env"):
        venv_without_jupyter(host.home / place)
    named = [host.home / place for place in ("proj/deep/er/env", "proj/deep/.venv", "proj/.venv", ".venv")]
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(standin_wheels()), "PATH": SYSTEM_PATH}
    for trouble, words in (
        ("no Jupyter in this environment", "{0}/bin/python -m ensurepip && {0}/bin/python -m pip install {1}"),
        ("the Python of this environment is gone", "python3 -m venv --clear {0} && {0}/bin/python -m pip install {1}"),
    ):
        with laptop.opened("--new", "--stop-on-exit", "host:proj/deep/er") as run:
            pass
        commands = named_in(run, trouble)
        assert commands == {str(prefix): words.format(prefix, "notebook jupyterlab") for prefix in named}, run.stderr
        done = subprocess.run(["/bin/sh", "-c", commands[str(named[0])]], env=wheels, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        subprocess.run([named[0] / "bin/python", "-c", "import notebook"], check=True, cwd="/")
        for prefix in named:
            (prefix / "bin/python").unlink()
            (prefix / "bin/python").symlink_to("/usr/local/bin/python3.99")


@pytest.mark.jupyter
def test_environment_of_the_project_with_jupyter_is_used(laptop: Laptop, host: Host) -> None:
    """It is that of the directory, or of one above; the kernels of the last one tell it themselves."""
    (host.home / "proj/deep/er").mkdir(parents=True)
    of_poetry, of_pipenv = [
        base64.urlsafe_b64encode(hashlib.sha256(os.fsencode(os.path.realpath(path))).digest())[:8].decode()
        for path in (host.home / "proj", host.home / "proj/Pipfile")
    ]
    in_venvs = '[virtualenvs]\nin-project = false\npath = "~/venvs"\n'
    cases = [(place, "", "") for place in PLACES[:-1]] + [
        ("proj/.pixi/envs/dev", "", ""),
        (".virtualenvs/model", "proj/.venv", "../.virtualenvs/model\n"),
        (".local/share/virtualenvs/model", "proj/.venv", "model"),
        (".local/share/virtualenvs/proj-%s-3.11" % of_pipenv, "proj/Pipfile", ""),
        ("venvs/model-%s-py3.11" % of_poetry, ".config/pypoetry/config.toml", in_venvs),
        ("cache/virtualenvs/model-%s-py3.9" % of_poetry, "proj/poetry.toml", "cache-dir = '%s/cache'" % host.home),
    ]
    for place, file, text in cases:
        for path in [place, file] if file else [place]:
            (host.home / path).parent.mkdir(parents=True, exist_ok=True)
        (host.home / place).symlink_to(standin_environment())
        if file:
            (host.home / file).write_text(text)
        with laptop.opened("--new", "--stop-on-exit", "host:proj") as run:
            pass
        assert "Using %s/bin/python (the project's environment)." % (host.home / place) in run.stderr, run.text
        for path in [place, file] if file else [place]:
            (host.home / path).unlink()
    (host.home / PLACES[-1]).symlink_to(jupyter_for_everyone().parent)
    url = laptop.start("host:proj/deep/er", has_terminal=False).url()
    assert compute(url, "import sys; print(sys.prefix)").strip() == str(host.home / PLACES[-1])


def test_environment_above_home_or_of_no_python_is_not_the_projects(laptop: Laptop, host: Host) -> None:
    """A directory that is merely called env, what pixi keeps for its tools, and what is not below home."""
    (host.home / ".pixi/envs").mkdir(parents=True)
    venv_without_jupyter(host.home / ".pixi/envs/ruff")
    (host.home / "proj/env").mkdir(parents=True)
    (host.home / "proj/env/settings").write_text("")
    venv_without_jupyter(host.home.parent / "venv")
    run = laptop.start("host:proj", has_terminal=False)
    run.url()
    run.expect("To end it")
    assert ".pixi" not in run.stderr and "proj/env" not in run.stderr and "%s/venv" % host.home.parent not in run.stderr


def test_no_second_jupyter_is_installed_beside_an_environment_that_lacks_it_in_silence(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    host = make_host(path=bare_python(directory / "bin"))
    (host.home / "proj").mkdir()
    venv_without_jupyter(host.home / "proj/.venv")
    run = laptop.run("--no-install", "host:proj")
    assert run.status == 3
    assert "%s/proj/.venv" % host.home in run.stderr and "install" in run.stderr.partition("try:")[2], run.stderr


# -- what people make environments with -----------------------------------------------------------------------------

# Stand-ins, for neither is on PyPI: they make environments of uv, with the files that tell theirs.
CONDA = """#!/bin/sh
verb=$1 prefix=$3
shift 3
case $verb in
    create) ~/.local/bin/uv venv -q --clear "$prefix" && mkdir "$prefix/conda-meta" ;;
    install) test $# = 0 || exec ~/.local/bin/uv pip install -q --python "$prefix" "$@" ;;
esac
"""
PIXI = """#!/bin/sh
test -f pixi.toml || exit
prefix=$PWD/.pixi/envs/default verb=$1
shift
case $verb in
    clean) rm -rf .pixi/envs ;;
    add)
        test -d "$prefix" || ~/miniconda3/condabin/conda create -p "$prefix"
        touch "$prefix/conda-meta/pixi"
        exec ~/miniconda3/condabin/conda install -p "$prefix" "$@" ;;
esac
"""


@contextlib.contextmanager
def index_of_wheels(directory: Path) -> Iterator[str]:
    """Serve the stand-in's wheels as PyPI does (PEP 503), and return the address."""
    for wheel in standin_wheels().glob("*.whl"):
        project = directory / "simple" / wheel.name.partition("-")[0]
        project.mkdir(parents=True)
        (project / wheel.name).symlink_to(wheel)
        (project / "index.html").write_text('<a href="%s">%s</a>' % (wheel.name, wheel.name))
    handler = partial(QuietHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "http://127.0.0.1:%d/simple/" % server.server_address[1]
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


class Workshop:
    """A host with tools for environments, each in a usual place of its own and none on PATH; and who types there."""

    def __init__(self, host: Host, index: str) -> None:
        self.host, self.index = host, index
        local = host.home / ".local/bin"
        local.mkdir(parents=True)
        (local / "uv").symlink_to(VENV_BIN / "uv")
        for name in ("poetry", "pipenv"):
            (local / name).symlink_to(environment(name, "/usr/bin/python3", [name], is_light=False) / name)
        for path, text in (("miniconda3/condabin/conda", CONDA), (".pixi/bin/pixi", PIXI)):
            program = host.home / path
            program.parent.mkdir(parents=True)
            program.write_text(text)
            program.chmod(0o755)
        wheels = str(standin_wheels())
        self.environment = {"HOME": str(host.home), "PATH": SYSTEM_PATH, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels}
        self.environment.update(
            UV_OFFLINE="1",
            UV_NO_INDEX="1",
            UV_FIND_LINKS=wheels,
            VIRTUALENV_NO_PERIODIC_UPDATE="1",
            TMPDIR=host.sshd.environment["TMPDIR"],
        )

    def type(self, command: str, place: Path) -> None:
        """Type a command on the host, which succeeds."""
        done = subprocess.run(
            ["/bin/sh", "-c", command], cwd=place, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    def make(self, kind: str, place: Path) -> Path:
        """Make an environment in a project's directory as its tool does, and return where it is."""
        place.mkdir()
        project = '[project]\nname = "My.Model"\nversion = "1"\nrequires-python = ">=3.8"\n'
        source = 'name = "here"\nurl = "%s"\n' % self.index
        file, text, command, place_of_it = {
            "venv": ("", "", "python3 -m venv venv", "venv"),
            "uv": ("", "", "~/.local/bin/uv venv .venv", ".venv"),
            "uv project": ("pyproject.toml", project, "~/.local/bin/uv sync", ".venv"),
            "VS Code": ("", "", "~/miniconda3/condabin/conda create -p .conda", ".conda"),
            "conda": ("", "", "~/miniconda3/condabin/conda create -p env", "env"),
            "pixi": ("pixi.toml", "", "~/.pixi/bin/pixi add", ".pixi/envs/default"),
            "poetry": (
                "pyproject.toml",
                "%s[tool.poetry]\npackage-mode = false\n[[tool.poetry.source]]\n%s" % (project, source),
                "~/.local/bin/poetry install",
                str(self.host.home / ".cache/pypoetry/virtualenvs"),
            ),
            "pipenv": (
                "Pipfile",
                "[[source]]\n%sverify_ssl = false\n" % source,
                "~/.local/bin/pipenv install",
                str(self.host.home / ".local/share/virtualenvs"),
            ),
        }[kind]
        if file:
            (place / file).write_text(text)
        self.type(command, place)
        found = place / place_of_it
        return found if (found / "pyvenv.cfg").exists() else next(found.iterdir())


@pytest.fixture
def workshop(host: Host, directory: Path) -> Iterator[Workshop]:
    with index_of_wheels(directory / "index") as index:
        yield Workshop(host, index)


# What tells each kind's command, and another one in front of it where its Python is gone.
WHAT_ADDS = {
    "venv": ("pip install ", "/uv venv --clear "),
    "uv": ("/uv pip install --python ", "/uv venv --clear "),
    "uv project": ("/uv pip install --python ", "/uv sync "),
    "VS Code": ("/conda install -p ", "/conda create -p "),
    "conda": ("/conda install -p ", "/conda create -p "),
    "pixi": ("/pixi add ", "/pixi clean "),
    "poetry": ("/poetry add --group dev ", "/poetry install "),
    "pipenv": ("/pipenv install --dev ", "/pipenv --rm "),
}


@pytest.mark.waits
def test_what_is_said_to_add_jupyter_adds_it_in_every_kind_of_environment(laptop: Laptop, workshop: Workshop) -> None:
    """One project inside another, so that one start names them all; then their Pythons are gone. Each is taken then."""
    home = workshop.host.home
    places, place = {}, home
    for kind in WHAT_ADDS:
        place = place / ("my " + kind)
        places[kind] = (place, workshop.make(kind, place))
    for is_gone in (False, True):
        with laptop.opened("--new", "--stop-on-exit", "host:%s" % place.relative_to(home)) as run:
            pass
        named = named_in(run, "the Python of this environment is gone" if is_gone else "no Jupyter in this environment")
        for kind, (_, prefix) in places.items():
            add, anew = WHAT_ADDS[kind]
            command = named.pop(str(prefix))
            assert add in command and (anew in command) == is_gone, (kind, command)
            workshop.type(command, home)
            subprocess.run([prefix / "bin/python", "-c", "import notebook"], check=True, cwd="/")
            for name in ("python", "python3") if not is_gone else ():
                (prefix / "bin" / name).unlink()
                (prefix / "bin" / name).symlink_to("/Users/ana/.pyenv/versions/3.11.4/bin/python")
        assert not named
    for kind in ("pixi", "poetry"):
        place, prefix = places[kind]
        with laptop.opened("--new", "--stop-on-exit", "host:%s" % place.relative_to(home)) as run:
            pass
        assert "Using %s/bin/python (the project's environment)." % prefix in run.stderr, run.text


# -- options that came too late ---------------------------------------------------------------------------------------

LATE = [
    ["--idle-timeout", "1h"],
    ["--server-arg=--ServerApp.allow_origin=*"],
    ["--port", "18765"],
    ["--ip", "0.0.0.0"],
    ["--no-record"],
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
                assert option in run.stderr.partition("For a new one: ")[2].splitlines()[0], run.stderr
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
