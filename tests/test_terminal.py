"""How it is printed: terminals that are narrow and wide, without colour, pipes, a reader that leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from execution import code, write_notebook
from sides import DEADLINE_S, MODULE, SCRIPT, Host, Laptop, Run

PROGRAM = [sys.executable, "-c", MODULE, str(SCRIPT)]
HERE = {"PATH": os.environ["PATH"], "TERM": "xterm", "HOME": "/h"}


def in_terminal(columns: int, *words: str, **environment: str) -> Run:
    """Start a command on a terminal of this width."""
    argv = ["sh", "-c", 'stty cols %d; exec "$@"' % columns, "sh", *words]
    return Run(argv, dict(HERE, **environment), has_terminal=True, cwd="/")


def ended(run: Run) -> List[str]:
    """Wait for the end of a run; return its lines."""
    assert run.wait() == 0, run.text
    return run.stdout.split("\n")


HELPS = {"all": ["--help"], "open": ["HOST", "--help"], "execute": ["HOST", "execute", "--help"]}


@pytest.mark.parametrize("words", HELPS.values(), ids=HELPS)
def test_help_breaks_no_word(words: List[str]) -> None:
    widths = (40, 60, 80, 200, 400)
    runs = {columns: in_terminal(columns, *PROGRAM, *words) for columns in widths}
    printed = {columns: ended(run) for columns, run in runs.items()}
    wide = " ".join(printed.pop(400))
    for columns, lines in printed.items():
        widest = max(40, min(columns, 120))
        assert not [line for line in lines if len(line) > widest and not re.match("usage:|scheduler", line)], columns
        if columns == 40:  # too narrow for the path of the configuration
            assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", wide)
        else:
            assert " ".join(lines).split() == wide.split(), columns


SPINNER = """
import sys, rjupyter
with rjupyter.Messages().working("A step with a name that is much longer than the window is wide") as tell:
    tell("and a word on where it stands")
    sys.stdin.readline()
print("done")
"""


@pytest.mark.parametrize("columns", [24, 40, 200])
def test_spinner_stays_on_one_line(columns: int) -> None:
    run = in_terminal(columns, sys.executable, "-c", SPINNER, PYTHONPATH=str(Path(SCRIPT).parent))
    run.expect("^\u2819 A step")
    assert "\r\x1b[K\u2819 A step" in run.text
    run.type("\n")
    lines = ended(run)
    frames = [frame for line in lines for frame in line.split("\r\x1b[K") if " A step" in frame]
    assert frames and max(map(len, frames)) < columns
    assert lines[-2].endswith("done")
    assert any("where it stands" in frame for frame in frames) == (columns == 200)


COLOURS: Dict[str, Dict[str, str]] = {"none wanted": {"NO_COLOR": "1"}, "none there": {"TERM": "dumb"}}


def test_no_colour() -> None:
    words = [*PROGRAM, "--no-config", "--nosuch"]
    coloured = in_terminal(80, *words)
    assert coloured.wait() == 2 and "\x1b[31mrjupyter:\x1b[0m wrong usage" in coloured.raw
    for name, environment in COLOURS.items():
        plain = in_terminal(80, *words, **environment)
        assert plain.wait() == 2 and plain.text.startswith("rjupyter: wrong usage"), name
        assert "\x1b" not in plain.text, name


PLAIN: Dict[str, Any] = {"wanted": {}, **COLOURS, "a link": {"VTE_VERSION": "7200"}}


@pytest.mark.parametrize("name", PLAIN)
def test_address_stands_out_and_the_steps_before_it_do_not(laptop: Laptop, host: Host, name: str) -> None:
    """The address is bold, and a link where the terminal has links; steps are dim, and what is to do is not."""
    run = laptop.start("--no-browser", "host", **PLAIN[name])
    url = run.url()
    run.expect("To end it.*\n")
    run.interrupt()
    assert run.wait() == 0
    raw = run.raw.replace("\r", "")
    assert ("\x1b[1m" in raw) == ("\x1b[2mConnected" in raw) == (name not in COLOURS), raw
    assert "\nCtrl-C closes" in raw and "\nTo end it" in raw and raw.count("\x1b]8;;" + url) == (name == "a link")
    if name not in COLOURS:
        link = ("\x1b]8;;%s\x1b\\" % url, "\x1b]8;;\x1b\\") if name == "a link" else ("", "")
        assert "\x1b[1m%s%s%s\x1b[0m\n" % (link[0], url, link[1]) in raw, raw


def test_doctor_is_green_and_red(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    make_host(settings="AllowTcpForwarding no")
    run = laptop.start("host", "doctor")
    assert run.wait() == 1
    assert "\x1b[31mFAIL\x1b[0m  forwarding " in run.raw and "\x1b[32mok\x1b[0m    jupyter " in run.raw
    assert run.raw.count("\x1b[31m") == 1


def test_nothing_but_text_goes_into_a_pipe(laptop: Laptop, host: Host) -> None:
    for words in (["host", "list"], ["host", "doctor"], ["host", "nosuch"], []):
        run = laptop.run(*words)
        assert not re.search(r"[^\n\t -~]", run.stdout + run.stderr), run.text


LOST = {">/dev/full": "No space left", ">&-": "Bad file descriptor", "</dev/null >&0": "Bad file descriptor"}
ALONE = [
    "--help",
    "--version",
    "HOST execute --help",
    "--help status",
    "completion bash",
    "h config",
]


def redirected(redirect: str, argv: List[str], environment: Dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command with a stream that leads elsewhere, or is closed."""
    words = ["sh", "-c", 'exec "$@" %s' % redirect, "sh", *argv]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=environment["HOME"]
    )


def check_lost(redirect: str, argv: List[str], environment: Dict[str, str]) -> None:
    """What was asked for cannot be written: a line says why, and the status is 1. Nobody to tell is no trouble more."""
    run = redirected(redirect, argv, environment)
    lost = [line for line in run.stderr.splitlines() if line.startswith("rjupyter: ")]
    assert run.returncode == 1 and run.stdout == "" and "Traceback" not in run.stderr, run
    assert lost == ["rjupyter: cannot write to stdout: " + lost[0].split(": ", 2)[2]] and LOST[redirect] in lost[0]


@pytest.mark.parametrize("words", ALONE)
def test_result_that_cannot_be_written(words: str, tmp_path: Path) -> None:
    environment = dict(HERE, HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path))
    argv = [*PROGRAM, *words.split()]
    for redirect in LOST:
        check_lost(redirect, argv, environment)
    shown = redirected("", argv, environment)
    for redirect in ("2>/dev/full", "2>&-", "<&- 2>&-"):
        run = redirected(redirect, argv, environment)
        assert (run.returncode, len(run.stdout)) == (0, len(shown.stdout)), run
    assert redirected(">&- 2>&-", argv, environment).returncode == 1


@pytest.mark.jupyter
def test_results_of_a_host_that_cannot_be_written(laptop: Laptop, host: Host) -> None:
    write_notebook(laptop.home / "good.ipynb", code("print(6 * 7, '\u6771\u4eac\u3000 12\xa0% \u2588')"))
    write_notebook(laptop.home / "bad.ipynb", code("1 / 0"))
    with laptop.opened("host"):
        argv = [*PROGRAM, "-F", str(laptop.config)]
        good = str(laptop.home / "good.ipynb")
        check_lost(">/dev/full", [*argv, "host", "execute", good, "-q", "-o", "-"], laptop.environment)
        assert not (laptop.home / "good.executed.ipynb").exists()
        for words in (["host", "list"], ["--json", "host", "list"], ["host", "logs"], ["host"], ["tunnels"]):
            check_lost(">/dev/full", [*argv, *words], laptop.environment)
        check_lost(">&-", [*argv, "host", "list"], laptop.environment)
        silent = redirected("2>&-", [*argv, "host", "execute", good, "-o", "-"], laptop.environment)
        assert silent.returncode == 0 and "42" in silent.stdout
        windows = dict(laptop.environment, PYTHONIOENCODING="cp1252")  # whose files are not in UTF-8 before 3.15
        told = subprocess.run([*argv, "host", "execute", good, "-o", "-"], env=windows, capture_output=True, check=True)
        output = json.loads(told.stdout.decode("utf-8"))["cells"][0]["outputs"][0]
        assert "".join(output["text"]) == "42 \u6771\u4eac\u3000 12\xa0% \u2588\n"
        (identity,) = set(re.findall(r"\((r\w+)\)", told.stderr.decode()))
        shown = subprocess.run([*argv, "host", "logs", identity], env=windows, capture_output=True, check=True)
        assert b"42 \\u6771\\u4eac\\u3000 12\xa0% \\u2588" in shown.stdout
        check_follower_whose_reader_has_left([*argv, "host", "logs"], laptop.environment)
        bad = [*argv, "host", "execute", str(laptop.home / "bad.ipynb")]
        failed = redirected(">/dev/full", bad, laptop.environment)
        assert "cannot write to stdout" in failed.stderr and "ZeroDivisionError" in failed.stderr, failed
        assert failed.returncode == 5
    new = redirected(">/dev/full", [*argv, "--new", "host"], laptop.environment)  # the address itself
    assert new.returncode == 1 and "cannot write to stdout" in new.stderr and "Launched" in new.stderr, new


def check_follower_whose_reader_has_left(argv: List[str], environment: Dict[str, str]) -> None:
    """It has read all that there is, as `| head -1` may: the follower ends, although nothing more comes."""
    known = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    with subprocess.Popen([*argv, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as run:
        assert run.stdout and run.stderr
        try:
            assert [run.stdout.readline().decode().rstrip("\n") for _ in known] == known
            run.stdout.close()
            assert run.wait(DEADLINE_S) in (-13, 141)
        finally:
            run.kill()
        assert not run.stderr.read()


def check_reader_that_has_left(argv: List[str], environment: Dict[str, str]) -> None:
    """What `| head -1` does, at its earliest."""
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert "Traceback" not in run.stderr.decode() and "BrokenPipe" not in run.stderr.decode()


@pytest.mark.parametrize("words", [["--help"], ["--help", "events"], ["completion", "bash"], ["tunnels"]], ids=" ".join)
def test_reader_that_has_left(words: List[str], tmp_path: Path) -> None:
    environment = dict(HERE, HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path))
    check_reader_that_has_left([*PROGRAM, *words], environment)


def test_reader_of_a_list_that_has_left(laptop: Laptop, host: Host) -> None:
    argv = [*PROGRAM, "-F", str(laptop.config), "host", "list"]
    check_reader_that_has_left(argv, laptop.environment)
