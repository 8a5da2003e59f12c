"""Strings travel to the host as they are, and none of them becomes an option of ssh or a command of a shell.

Each example is carried to a real host, and what arrives there is compared.
"""

import contextlib
import json
import os
import re
import string
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from sides import Host, Laptop

import rjupyter

CANARY = "rjupyter-canary"
# Pieces that would do something, in one shell or another, or to ssh; the canary is what they would leave behind.
PIECES = st.sampled_from(
    [
        "$(touch {0})", "`touch {0}`", "; touch {0}", "& touch {0} &", "| touch {0}", "\ntouch {0}\n", "<(touch {0})",
        "' ; touch {0} '", '" ; touch {0} "', "-oProxyCommand=touch {0}", "--", "-", "$HOME", "~", "*", "%h", "!!",
        "\\", "\t", "\r", "\x1b[31m", "\x7f", "ü", "日本", "\udcff", "EOF", "=", ",", "'", '"', "#", "{{}}", "${{IFS}}",
    ]
).map(lambda piece: piece.format(CANARY))  # fmt: skip
TEXTS = st.lists(PIECES | st.text(string.ascii_letters, max_size=3), min_size=1, max_size=5).map("".join).filter(bool)
VARIABLE = r"\$\{?[A-Za-z_]"  # is expanded, as on a terminal there: see test_shells.py
NAMES = TEXTS.filter(lambda text: text not in (".", "..") and "/" not in text and len(os.fsencode(text)) < 200)
NAMES = NAMES.filter(lambda text: not re.search(VARIABLE, text))
CAREFUL = settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a real launch for each step of a shrink would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


@pytest.fixture
def agent(laptop: Laptop, host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[rjupyter.Agent]:
    """An agent behind one real connection; what it says goes nowhere."""
    for name, value in laptop.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(laptop.home)
    messages = rjupyter.Messages(quiet=True)
    with contextlib.closing(rjupyter.Ssh("host", ["-F", laptop.config], False, messages, True)) as ssh:
        ssh.connect()
        yield rjupyter.Agent(ssh, messages)


@pytest.fixture
def no_canary(directory: Path) -> Iterator[Callable[[], None]]:
    def check() -> None:
        assert not list(directory.rglob(CANARY + "*"))
        assert not Path("/tmp", CANARY).exists()

    yield check
    check()


REQUEST = rjupyter.Request(is_new=True, local_port=8889, start_timeout_s=20, may_install=False)


def failure(agent: rjupyter.Agent, **request: Any) -> rjupyter.Failure:
    with pytest.raises(rjupyter.Failure) as caught:
        agent.ask(REQUEST.but(**request), rjupyter.Server)
    assert "bug" not in caught.value.what, caught.value.why
    return caught.value


@CAREFUL
@given(name=NAMES)
@example(name="-rf")
@example(name="\n")
def test_path(agent: rjupyter.Agent, host: Host, no_canary: Callable[[], None], name: str) -> None:
    said = failure(agent, path="./" + name)
    assert "%s/%s is not there" % (host.home, name) in said.why
    no_canary()


@CAREFUL
@given(name=NAMES)
def test_environment_and_interpreter(
    agent: rjupyter.Agent, host: Host, no_canary: Callable[[], None], name: str
) -> None:
    assert "no environment %s on the host" % name == failure(agent, env=name).what
    said = failure(agent, python="./" + name)
    assert said.why.startswith("%s/./%s: not there" % (host.home, name))
    no_canary()


@CAREFUL
@given(argument=TEXTS, name=NAMES)
def test_server_argument_and_directory_reach_a_recorder_in_place_of_jupyter(
    agent: rjupyter.Agent, host: Host, no_canary: Callable[[], None], argument: str, name: str
) -> None:
    recorder = host.home / "env/bin/python"
    if not recorder.exists():
        recorder.parent.mkdir(parents=True)
        recorder.write_text(
            "#!/usr/bin/python3\nimport json, os, sys\nif 'find_spec' in sys.argv[2]: sys.exit(0)\n"
            "with open(os.path.expanduser('~/argv'), 'w') as f: json.dump([sys.argv, os.getcwd()], f)\nsys.exit(3)\n"
        )
        recorder.chmod(0o755)
    place = host.home / name
    place.mkdir(exist_ok=True)
    said = failure(agent, path="./" + name, server_args=[argument], env="./env")
    assert said.what == "Jupyter did not start"
    argv, cwd = json.loads((host.home / "argv").read_text())
    assert argv[-1] == argument
    assert (cwd, "--notebook-dir=" + str(place) in argv) == (str(place), True)
    no_canary()


@CAREFUL
@given(identity=TEXTS)
def test_id(agent: rjupyter.Agent, host: Host, no_canary: Callable[[], None], identity: str) -> None:
    assert failure(agent, is_new=False, attach=identity).what == "no server of yours has this id: " + identity
    no_canary()


@CAREFUL
@given(text=TEXTS | st.text(max_size=12))
@example(text="-oProxyCommand=touch x")
@example(text="a@-oProxyCommand=touch x")
@example(text="ssh://-oProxyCommand=x/")
@example(text="[-v]:x")
@example(text="$(touch x)")
@example(text="a\nProxyCommand touch x")
def test_destination(laptop: Laptop, directory: Path, no_canary: Callable[[], None], text: str) -> None:
    try:
        name, _ = rjupyter.parse_destination(text)
    except ValueError:
        return
    assume(name.isascii())
    # A config that hands the name to a shell, as ProxyCommand and Match exec do, and an option that ends it at once.
    config = directory / "config"
    config.write_text(
        "Match exec \"echo '%h' '%r' >/dev/null\"\n  ConnectTimeout 1\nHost *\n  ProxyCommand false %h %r\n"
    )
    ssh = rjupyter.Ssh(name, ["-F", str(config)], False, rjupyter.Messages(quiet=True), True)
    master = rjupyter.Mux(ssh, str(directory / "s"))
    ours = ssh.argv(rjupyter.MASTER, "-M", "-N", "-S", master.control_path)
    for argv in (ours, master.session_argv(command="true"), master.control_argv("check")):
        at = argv.index("--")
        assert argv[at + 1] == name and not argv[at + 1].startswith("-")
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, cwd=str(directory))
    no_canary()


@pytest.mark.jupyter
@settings(CAREFUL, max_examples=15)
@given(name=NAMES.filter(lambda name: "\udcff" not in name))
@example(name='it\'s a "name" $(touch rjupyter-canary) %41 #?&+.')
def test_notebook_names_in_the_address_that_a_real_server_answers(
    laptop: Laptop, host: Host, no_canary: Callable[[], None], name: str
) -> None:
    """Through the whole program: a file of this name on the host is the one that the printed address means."""
    import re
    from urllib.parse import unquote, urlsplit

    from client import api

    assume(not name.startswith("."))  # Jupyter does not show hidden files
    file = name + ".ipynb"
    text = json.dumps({"cells": [], "metadata": {"title": name}, "nbformat": 4, "nbformat_minor": 5})
    (host.home / file).write_text(text)
    with laptop.opened("host:./" + file) as run:
        url = run.url()
        match = re.match(r"/notebooks/([^/]*)$", urlsplit(url).path)
        assert match and unquote(match.group(1)) == file
        assert api(url, "contents/" + match.group(1))["content"]["metadata"]["title"] == name
    no_canary()
