"""The command line as people type it: words in another order, nearly right, too few, several hosts; completion."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from client import check_failure, events_of, held, listed
from jupyters import standin
from notebooks import write_notebook
from sides import MODULE, SCRIPT, Host, Laptop, quiet_port, wait_until, words_of

import rjupyter

# -- order ------------------------------------------------------------------------------------------------------------


def read(line: str) -> Dict[str, Any]:
    """Return what a line is read as."""
    args = vars(rjupyter.Args(rjupyter.CommandLine(["--no-config", *line.split()])))
    return {name: value for name, value in args.items() if name != "line"}


@pytest.mark.parametrize(
    "typed, right",
    [
        ("gpu1 list --lab -J jump", "--lab -J jump gpu1 list"),
        ("gpu1 --lab list", "--lab gpu1 list"),
        ("gpu1 stop -qv --json", "--json -q -v gpu1 stop"),
        ("gpu1:work execute a.ipynb --python /opt/python", "--python /opt/python gpu1:work execute a.ipynb"),
        ("gpu1 execute a.ipynb -p x=1 b.ipynb", "gpu1 execute -p x=1 a.ipynb b.ipynb"),
        ("-p22 gpu1 execute a.ipynb -p x=1", "-p 22 gpu1 execute a.ipynb -px=1"),
        ("gpu1 execute a.ipynb -p x=1 -p y=-1", "gpu1 execute -p x=1 -p y=-1 -- a.ipynb"),
        ("gpu1 eval -k a.ipynb -4", "-4 gpu1 eval -k a.ipynb"),
        ("gpu1 list --slurm -t5 -Jjump", "--slurm=-t5 -J jump gpu1 list"),
        ("-o A=b gpu1 list -l ann -o C=d", "-o A=b -l ann -o C=d gpu1 list"),
        ("-- gpu1 list", "gpu1 -- list"),
    ],
)
def test_line_in_another_order_is_read_alike(typed: str, right: str) -> None:
    assert read(typed) == read(right)


def test_a_letter_of_both_is_the_actions_behind_it() -> None:
    both = read("-p 22 -o User=ann gpu1 execute a.ipynb -p x=1 -o b.ipynb")
    assert (both["ssh"], both["output"]) == (["-p", "22", "-o", "User=ann"], "b.ipynb")
    assert both["parameters"] == [("x", 1)]
    assert read("-f gpu1")["background"] and read("--attach 12ab gpu1")["attach"] == "12ab"
    logs = read("gpu1 logs -f")
    assert (logs["is_followed"], logs["background"]) == (True, False)
    alias = read("-f gpu1 logs")  # an alias that has it works with each action
    assert (alias["is_followed"], alias["background"]) == (False, True)
    assert read("gpu1 eval -- -1")["code"] == "-1"
    for code in ("-1 + 2", "-4 + 5", "-f(x) + 1", "-v - w", "-q + 1", "-h * 2"):
        args = rjupyter.Args(rjupyter.CommandLine(["--no-config", "gpu1", "eval", code]))
        assert (args.code, args.ssh, args.background) == (code, [], False), code


@pytest.mark.parametrize(
    "typed, words",
    [
        (["list"], ["list is an action: the host comes before it", "HOST list"]),
        (["stop", "gpu1"], ["gpu1 stop"]),
        (["execute", "t.ipynb", "gpu1"], ["gpu1 execute t.ipynb"]),
        (["execute", "gpu1", "t.ipynb"], ["gpu1 execute t.ipynb"]),
        (["--lab", "stop", "gpu1"], ["--lab gpu1 stop"]),
        (["stop", "--yes", "gpu1", "--all"], ["gpu1 stop --yes --all"]),
        (["lsit", "gpu1"], ["no action lsit", "rjupyter.py gpu1 list\n"]),
        (["gpu1", "lst"], ["no action lst", "rjupyter.py gpu1 list\n"]),
        (["gpu1", "train.ipynb"], ["gpu1:train.ipynb"]),
        (["gpu1", "work/a"], ["gpu1:work/a"]),
        (["gpu1", "zzzz"], ["no action zzzz", "--help"]),
        (["gpu1", "ls"], ["no action ls", "rjupyter.py gpu1 list\n"]),
        (["-p", "22", "ps", "gpu1"], ["list is an action: the host comes before it", "rjupyter.py -p 22 gpu1 list\n"]),
        (["ls"], ["rjupyter.py HOST list\n"]),
        (["gpu1", "run", "a.ipynb"], ["no action run", "rjupyter.py gpu1 execute a.ipynb\n"]),
        (["gpu1", "kill", "--all"], ["no action kill", "rjupyter.py gpu1 stop --all\n"]),
        (["gpu1", "status", "--all"], ["no action status", "rjupyter.py gpu1 list --all\n"]),
        (["--lab", "gpu1:work", "open"], ["no action open", "rjupyter.py --lab gpu1:work\n"]),
        (["start", "gpu1"], ["no action start", "rjupyter.py gpu1\n"]),
        (["--nwe", "gpu1"], ["unknown option: --nwe", "rjupyter.py --new gpu1\n"]),
        (["--local-prot", "9000", "gpu1"], ["unknown option: --local-prot", "rjupyter.py --local-port 9000 gpu1\n"]),
        (["gpu1", "execute", "a.ipynb", "--inplce"], ["rjupyter.py gpu1 execute a.ipynb --inplace\n"]),
        (["gpu1", "execute", "a.ipynb", "--ouput", "r.ipynb"], ["gpu1 execute a.ipynb --output r.ipynb\n"]),
        (["gpu1", "run", "a.ipynb", "-o", "r.ipynb", "--", "-b"], ["gpu1 execute a.ipynb -o r.ipynb -- -b\n"]),
        (["execute", "gpu1", "a.ipynb", "-o", "r.ipynb"], ["rjupyter.py gpu1 execute a.ipynb -o r.ipynb\n"]),
        (["stop", "gpu1", "r5d98"], ["stop is an action", "rjupyter.py gpu1 stop r5d98\n"]),
        (["gpu1:work", "train.ipynb"], ["no action train.ipynb", "rjupyter.py gpu1:work/train.ipynb\n"]),
        (["gpu1", "train.ipynb"], ["rjupyter.py gpu1:train.ipynb\n"]),
        (["--python", "/opt/p", "gpu1", "--env", "ml"], ["argument --env: not allowed with argument --python"]),
        (["gpu1", "list", "--kernel"], ["unknown option: --kernel", "rjupyter.py gpu1 list --kernels\n"]),
        (["gpu1", "logs", "--grid"], ["unknown option: --grid\n", "--help\n"]),
        (["gpu1", "stop", "--al"], ["unknown option: --al", "rjupyter.py gpu1 stop --all\n"]),
        (["gpu1", "stop", "--a"], ["unknown option: --a\n"]),
        (["gpu1,gpu2"], ["only list takes several hosts", "gpu1,gpu2 list"]),
        (["close"], ["close whose tunnels?", "close --all"]),
        (["close", "gpu1:work"], ["one argument too many: gpu1:work", "rjupyter.py gpu1:work close\n"]),
        (["--lab"], ["no host was given\n", "rjupyter.py --lab HOST\n"]),
        (
            ["--lab", "--slurm", "gpu1:work"],
            ["--slurm took 'gpu1:work' as its value", "rjupyter.py --lab --slurm VALUE gpu1:work\n"],
        ),
        (["-p", "x", "gpu1", "list"], ["argument -p: a port is a number from 1 to 65535, not 'x'"]),
        (["gpu1", "list", "gpu2"], ["one argument too many: gpu2"]),
        (["completion"], ["completion needs SHELL: bash, zsh or fish"]),
        (["completion", "ksh"], ["argument SHELL: invalid choice: 'ksh'"]),
        (["gpu1", "execute", "-o"], ["argument -o/--output: expected one argument"]),
        (["--port", "--lab", "gpu1"], ["argument --port: expected one argument"]),
        (["--lab=yes", "gpu1"], ["argument --lab: "]),
        (["--slurm", "", "gpu1", "list", "--submit", "qsub"], ["argument --submit: not allowed with argument --slurm"]),
        (["--no-install", "gpu1", "--install"], ["argument --install: not allowed with argument --no-install"]),
        (["-p", "x=1", "gpu1", "execute", "a.ipynb"], ["-p is an option of execute", "gpu1 execute -p x=1 a.ipynb"]),
        (["-o", "b", "--lab", "gpu1", "execute", "a"], ["-o is an option of execute", "--lab gpu1 execute -o b a"]),
        (["--attach", "r12ab", "gpu1", "execute"], ["gpu1 execute --attach r12ab"]),
        (["--all", "close"], ["--all is an option of close", "close --all"]),
        (["--grid", "x=[1]", "gpu1", "execute"], ["--grid is an option of execute", "HOST execute --grid"]),
        (["gpu1", "--timeout", "5", "wait"], ["--timeout is an option of wait", "HOST wait --timeout S"]),
    ],
)
def test_line_that_is_none_is_printed_as_it_should_be(laptop: Laptop, typed: List[str], words: List[str]) -> None:
    check_failure(laptop.run(*typed), rjupyter.EXIT_USAGE, *words)


def test_line_that_is_none_is_told_as_an_event(laptop: Laptop) -> None:
    to_stdout = ["gpu1", "execute", "a.ipynb", "-o", "-"]  # a notebook is no event
    for typed in (["list"], ["gpu1", "lst"], ["gpu1,gpu2"], ["--nwe", "gpu1"], to_stdout):
        (failure,) = events_of(laptop.run("--json", *typed))
        assert failure["event"] == "failure" and failure["status"] == rjupyter.EXIT_USAGE


def test_help_of_an_action_needs_no_host(laptop: Laptop) -> None:
    for words in (["execute", "--help"], ["--help", "execute"], ["-h", "execute"], ["gpu1", "execute", "-h"]):
        assert "-p NAME=VALUE" in laptop.run(*words).stdout
    assert "--slurm" in laptop.run("--help", "gpu1", "execute").stdout
    for words in (["gpu1", "list", "--version"], ["-V"], ["version"]):
        assert laptop.run(*words).stdout == "rjupyter %s\n" % rjupyter.__version__
    for words in (["help"], ["help", "execute"], ["help", "status"]):
        assert laptop.run(*words).stdout == laptop.run("--help", *words[1:]).stdout != ""


def test_reason_is_in_words(laptop: Laptop) -> None:
    failed = laptop.run("nowhere.invalid", "execute", "none.ipynb")
    assert "why: No such file or directory: 'none.ipynb'" in failed.stderr


def test_host_that_is_nearly_one_of_the_configuration(laptop: Laptop, host: Host) -> None:
    failed = laptop.run("-o", "ConnectTimeout=9", "hsot:work", "list", "--all")
    check_failure(failed, rjupyter.EXIT_SSH, " -o ConnectTimeout=9 host:work list --all\n")


@pytest.mark.parametrize("text, seconds", [("2m", 120.0), ("90", 90.0), ("3h", 10800.0), ("10s", 10.0)])
def test_durations_are_read_alike(text: str, seconds: float) -> None:
    assert rjupyter._seconds(text) == seconds == rjupyter._duration_s(text)


# -- here -------------------------------------------------------------------------------------------------------------


def test_no_words_show_the_tunnels(laptop: Laptop, host: Host) -> None:
    (host.home / "work").mkdir()
    laptop.config, config = "", laptop.config
    alone = laptop.run()
    assert alone.status == 0 and "No tunnel of yours is up here." in alone.text
    laptop.config = config
    first = laptop.run("--no-browser", "-f", "host:work")
    assert first.status == 0, first.text
    with laptop.opened("host", "--state-dir", "~/kept", "--local-port", str(quiet_port())):
        shown = laptop.run()
        assert re.search("(?m)^To come back: .* --state-dir '?~/kept'? host$", shown.text), shown.text
        rows = [line.split() for line in shown.stdout.splitlines()]
        assert [row[:3] for row in rows] == [["HOST", "PATH", "STATE"], ["host", "work", "up"], ["host", "~", "up"]]
        assert "close --all" in shown.text
        (one, two) = events_of(laptop.run("--json"))
        assert (one["path"], one["is_background"], two["path"], two["is_background"]) == ("work", True, None, False)
        closed = laptop.run("close", "--all")
        assert closed.text.count("Closed the tunnel") == closed.text.count("is open in another terminal (pid ") == 1
        assert [event["path"] for event in events_of(laptop.run("--json"))] == [None]
    assert laptop.run("host", "--state-dir", "~/kept", "stop", "--all", "--yes").status == 0


def test_probe_of_one_that_was_killed_is_removed(laptop: Laptop) -> None:
    """Each start looks whether it can write there; kill -9 in that moment leaves the file."""
    place = laptop.runtime / "rjupyter"
    place.mkdir(mode=0o700)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (place / (".%d" % ended.pid)).write_text("")
    assert laptop.run().status == 0 and not list(place.iterdir())


@pytest.mark.unit
def test_what_is_left_out_of_the_list_of_a_path_is_listed_by_that_path() -> None:
    args = rjupyter.Args(rjupyter.CommandLine(["--no-config", "gpu1:work", "list"]))
    assert args.again("list", "--all").endswith(" gpu1:work list --all")
    assert args.again("list").endswith(" gpu1 list")


# -- several hosts ----------------------------------------------------------------------------------------------------


@pytest.mark.nbclient
def test_several_hosts_side_by_side(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    first, second = make_host(name="one", path=str(standin())), make_host(name="two")
    config = laptop.directory / "both"
    config.write_text(Path(first.sshd.config).read_text() + "\n" + Path(second.sshd.config).read_text())
    laptop.config = str(config)
    held(laptop, "one")
    shown = laptop.run("one,two,three.invalid", "list")
    assert shown.status == rjupyter.EXIT_SSH, shown.text
    assert laptop.run("one,two", "list").status == 0
    rows = {line.split()[0]: line for line in shown.stdout.splitlines()}
    assert list(rows) == ["HOST", "one", "two", "three.invalid"]
    assert " live " in rows["one"] and " none " in rows["two"] and " not reached " in rows["three.invalid"]
    assert "three.invalid" in rows["three.invalid"][20:]
    write_notebook(laptop.home / "once.ipynb", "1")
    assert laptop.run("two", "execute", "once.ipynb").status == 0
    assert "once.ipynb" not in laptop.run("one,two", "list").text
    assert "1 finished execution not shown.\nTo list it: " in laptop.run("two", "list").stderr
    assert "once.ipynb" in laptop.run("one,two", "list", "--all").stdout
    events = events_of(laptop.run("one,three.invalid", "list", "--json"))
    assert [event["event"] for event in events] == ["host", "server", "host"]
    assert [event["is_reached"] for event in events if event["event"] == "host"] == [True, False]
    assert laptop.run("three.invalid,four.invalid", "list").status == rjupyter.EXIT_SSH


@pytest.mark.jupyter
def test_list_of_a_path_and_the_newest_executions(laptop: Laptop, host: Host) -> None:
    for name in ("work", "work/below", "other"):
        (host.home / name).mkdir()
    for name in ("work/below", "other"):
        held(laptop, "host:" + name, "--local-port", str(quiet_port()))
    assert [server["root_dir"][-10:] for server in listed_in(laptop, "host:work")] == ["work/below"]
    assert len(listed(laptop)) == 2
    write_notebook(laptop.home / "many.ipynb", "1")
    done = laptop.run("host", "execute", "many.ipynb")
    assert done.status == 0, done.text
    (one,) = host.home.glob(".local/state/rjupyter/runs/*")
    for number in range(2):  # as if there had been three
        shutil.copytree(one, one.with_name("%s%x" % (one.name[:-1], (int(one.name[-1], 16) + number + 1) % 16)))
    shown = laptop.run("host", "list")
    assert "many.ipynb" not in shown.text and "3 finished executions not shown.\n" in shown.stderr
    laptop.config = ""
    assert laptop.run(*words_of(re.findall("To list them: (.*)", shown.stderr)[0])).text.count("many.ipynb") == 3


def listed_in(laptop: Laptop, destination: str) -> List[Dict[str, Any]]:
    return [event for event in events_of(laptop.run(destination, "list", "--json")) if event["event"] == "server"]


# -- executions -------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_what_is_not_executed_is_named_and_what_runs_can_be_followed(laptop: Laptop, host: Host) -> None:
    for name, source in (("a", "1 / 0"), ("b", "2"), ("c", "3")):
        write_notebook(laptop.home / ("%s.ipynb" % name), source)
    failed = laptop.run("host", "execute", "a.ipynb", "b.ipynb", "c.ipynb")
    assert failed.status == rjupyter.EXIT_CELL_FAILED
    assert "Not executed after the failure of a.ipynb: b.ipynb, c.ipynb" in failed.stderr
    write_notebook(laptop.home / "d.ipynb", "import os, time\nwhile not os.path.exists('go'): time.sleep(.05)")
    first = laptop.start("host", "execute", "d.ipynb", has_terminal=False)
    identity = first.expect(r"Executing d.ipynb on host \((r\w+)\)").group(1)
    second = laptop.run("host", "execute", "d.ipynb")
    assert second.status == 0 and "To follow it: " in second.text and "execute --attach " + identity in second.text
    (host.home / "go").write_text("")
    assert first.wait() == 0


# -- completion -------------------------------------------------------------------------------------------------------


def completed(laptop: Laptop, *words: str) -> List[str]:
    """Return what the program says that the last word may become."""
    argv = [sys.executable, "-c", MODULE, str(SCRIPT), "completion", "words", *words]
    said = subprocess.run(argv, env=laptop.environment, cwd=laptop.home, stdout=subprocess.PIPE, text=True, check=True)
    return said.stdout.split()


@pytest.fixture
def names(laptop: Laptop) -> Laptop:
    """A laptop whose ssh configuration has names, some in an included file."""
    ssh = laptop.home / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "config").write_text("Include more/*\nHost gpu1 gpu2\n  User ann\nHost *.org !bad\nHost=login\n")
    (ssh / "more").mkdir()
    (ssh / "more/site").write_text('host "big"\n')
    return laptop


def test_completion_knows_hosts_actions_options_and_ids(names: Laptop) -> None:
    assert completed(names, "g") == ["gpu1", "gpu2"]
    assert {"big", "login", "close"} <= set(completed(names, ""))
    assert "bad" not in completed(names, "") and "*.org" not in completed(names, "")
    assert completed(names, "gpu1", "l") == ["list", "logs"]
    assert completed(names, "--lab", "gpu1", "ex") == ["execute"]
    assert "--slurm" in completed(names, "--s") and completed(names, "--app", "la") == ["lab"]
    assert completed(names, "gpu1", "stop", "--a") == ["--all"]
    assert completed(names, "completion", "") == ["bash", "fish", "zsh"]
    cache = names.home / ".cache/rjupyter/ids.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"hosts": {"gpu1": ["12ab", "r4711"]}}))
    assert completed(names, "gpu1:work", "stop", "") == ["12ab", "r4711"]
    assert completed(names, "gpu1", "execute", "--attach", "r") == ["r4711"]
    assert completed(names, "gpu2", "stop", "") == []
    cache.write_text("[broken")
    assert completed(names, "gpu1", "stop", "") == []
    for name in ("b.ipynb", "a.ipynb", "data.csv"):
        (names.home / name).touch()
    (names.home / "sub").mkdir()
    assert completed(names, "gpu1", "execute", "") == ["a.ipynb", "b.ipynb"]
    assert completed(names, "gpu1:work", "execute", "a.ipynb", "b") == ["b.ipynb"]
    for words in (["execute", "sub"], ["execute", "a.ipynb", "--with", ""], ["execute", "-o", "x"]):
        assert completed(names, "gpu1", *words) == ["/"], words  # the shell's own names of files
    for words in (["gpu1:"], ["gpu1:work"], ["gpu1", "output", ""], ["--python", ""]):
        assert completed(names, *words) == [], words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rj gpu1 sto", ["rj", "gpu1", "sto"]),
        ("rj gpu1 ", ["rj", "gpu1", ""]),
        ('rj --slurm "-t 5" gpu1 ', ["rj", "--slurm", "-t 5", "gpu1", ""]),
        ("rj --init 'module load x' gpu1 st", ["rj", "--init", "module load x", "gpu1", "st"]),
        ("rj gpu1 execute my\\ no", ["rj", "gpu1", "execute", "my no"]),
        ("rj gpu1 execute 'my no", ["rj", "gpu1", "execute", "my no"]),
        ('rj gpu1 execute "my no', ["rj", "gpu1", "execute", "my no"]),
    ],
)
def test_line_that_is_being_typed_is_split_as_a_shell_does(line: str, words: List[str]) -> None:
    assert rjupyter.words_of_line(line) == words


def test_small_command_answers_without_a_preface(laptop: Laptop, host: Host) -> None:
    for words in (["list"], ["output"], ["stop"]):
        began = time.monotonic()
        run = laptop.run("host", *words)
        is_slow = time.monotonic() - began > rjupyter.SLOW_LOGIN_S  # on a machine that is busy
        assert is_slow or "Connected" not in run.text, run.text
    assert "Connected to host (" in laptop.run("-v", "host", "list").stderr


def test_list_keeps_its_ids_for_the_completion(laptop: Laptop, host: Host) -> None:
    held(laptop, "host")
    (server,) = listed(laptop)
    assert completed(laptop, "host", "stop", "") == [server["id"]]


SHELLS = {
    "bash": 'eval "$(rjupyter.py completion bash)"; COMP_LINE="rjupyter.py --slurm \\"-t 5\\" gpu1:work st"; '
    "COMP_POINT=${#COMP_LINE}; "
    '_rjupyter rjupyter.py; printf "%s\\n" "${COMPREPLY[@]}"; complete -p rjupyter.py >/dev/null && echo registered',
    "fish": "rjupyter.py completion fish | source; complete -C 'rjupyter.py gpu1 st'",
}


@pytest.mark.parametrize("shell", list(SHELLS))
def test_completion_in_a_shell(names: Laptop, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip("needs " + shell)
    place = names.directory / "bin"
    place.mkdir()
    (place / "rjupyter.py").write_text('#!/bin/sh\nexec "%s" "%s" "$@"\n' % (sys.executable, SCRIPT))
    (place / "rjupyter.py").chmod(0o755)
    environment = dict(names.environment, PATH="%s:%s" % (place, names.environment["PATH"]))
    said = subprocess.run([shell, "-c", SHELLS[shell]], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert "stop" in said.stdout.split() and "list" not in said.stdout.split()
    assert shell != "bash" or "registered" in said.stdout


def test_completion_in_zsh(names: Laptop) -> None:
    """zsh completes at its prompt alone: it has a terminal, and a Tab is typed."""
    if not shutil.which("zsh"):
        pytest.skip("needs zsh")
    import pty
    import select

    place = names.directory / "bin"
    place.mkdir()
    (place / "rjupyter.py").write_text('#!/bin/sh\nexec "%s" "%s" "$@"\n' % (sys.executable, SCRIPT))
    (place / "rjupyter.py").chmod(0o755)
    environment = dict(names.environment, PATH="%s:%s" % (place, names.environment["PATH"]), ZDOTDIR=str(names.home))
    (names.home / ".zshrc").write_text(
        'PS1="ready> "\nautoload -Uz compinit && compinit -u\neval "$(rjupyter.py completion zsh)"\n'
    )
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe("zsh", ["zsh", "-i"], environment)
    text = ""

    def look() -> str:
        nonlocal text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 4096).decode("utf-8", "replace")
        return text

    try:
        wait_until(lambda: "ready> " in look(), "its prompt", 30)
        os.write(terminal, b"rjupyter.py gpu1 exec\t")
        wait_until(lambda: "execute" in look(), "the word is whole", 30)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)
