"""How an execution ends: in time, out of time, killed, told to; what is shown on the way; and what is left then."""

import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from client import check_failure
from execution import (
    IPYKERNEL,
    add_kernel,
    add_kernel_that_ignores_its_parent,
    add_r,
    add_slow_kernel,
    cells_of,
    code,
    listed_runs,
    printed,
    run_dirs,
    runner_pid,
    start_waiting,
    waiting_for,
    write_notebook,
)
from sides import ON_HOST, Host, Laptop, Run, processes_with, wait_until, wait_until_gone

pytestmark = pytest.mark.nbclient

RESULT = "w.executed.ipynb"


# -- G6, G15: limits --------------------------------------------------------------------------------------------------


def test_time_limit_is_for_the_whole(laptop: Laptop, host: Host) -> None:
    """Twelve cells, none of which takes as long as the limit, are over it together: status 6. (G6)

    Nor does a cell win time by what it makes of an interrupt.
    """
    sources = {
        "short": "import time; time.sleep(2); print({0})",
        "fail": "import time; time.sleep(2); print({0}); raise ValueError({0})",
        "catch": "import time\ntry: time.sleep(2)\nexcept KeyboardInterrupt: time.sleep(1)\nprint({0})",
    }
    for kind, source in sources.items():
        tags = ["raises-exception"] * (kind == "fail")
        cells = [code(source.format(number), *tags) for number in range(12)]
        write_notebook(laptop.home / (kind + ".ipynb"), *cells)
    names = [kind + ".ipynb" for kind in sources]
    # A kernel may take seconds to start.
    run = laptop.run("host", "execute", "-j", "3", *names, "--timeout", "12")
    assert run.status == 6, run.text
    for kind in sources:
        words = r"%s\.ipynb took too long: its time ran out in cell \d+ of 12\n" % kind
        assert re.search(words, run.stderr), run.stderr
        said = printed(laptop.home / (kind + ".executed.ipynb"))
        assert said[11] == "" and said == sorted(said, key=lambda words: not words), kind


def test_time_limit_counts_the_start_of_the_kernel(laptop: Laptop, host: Host) -> None:
    """A kernel that is slow to start is part of the whole; --start-timeout, when longer, does not prolong it. (G6)"""
    add_kernel(host.home, "slow", ["/bin/sleep", "600"])
    write_notebook(laptop.home / "w.ipynb", "print(1)")
    began = time.monotonic()
    both = [
        laptop.start(*options, "host", "execute", "--overlap", "w.ipynb", *(["--kernel", "slow", "--timeout", "5"]),
                     has_terminal=False)
        for options in ([], ["--start-timeout", "80"])
    ]  # fmt: skip
    for run in both:
        assert run.wait() == 6, run.text
        assert "w.ipynb took too long" in run.stderr and "kernel" in run.stderr
    assert time.monotonic() - began < 65


def test_kernel_that_does_not_start(laptop: Laptop, host: Host, mark: str) -> None:
    """`--start-timeout` holds for the kernel, too; the status is that of what did not start. (G15)

    One is slow, one ends at once, one never answers.
    """
    add_slow_kernel(host.home, "slow", 40)
    add_kernel(host.home, "ends", ["/bin/sh", "-c", "echo no such library: libodd >&2; exit 3", "{connection_file}"])
    add_kernel(host.home, "never", ["/bin/sleep", "600"])
    kinds = ("slow", "ends", "never")
    for kind in kinds:
        write_notebook(laptop.home / (kind + ".ipynb"), "print(1)")
    words = ["--start-timeout", "6", "host", "execute"]
    started = {
        kind: laptop.start(*words, kind + ".ipynb", "--kernel", kind, has_terminal=False) for kind in kinds
    }  # fmt: skip
    for kind, run in started.items():
        assert run.wait() == 4, run.text
        assert "kernel" in run.stderr and "AssertionError" not in run.stderr
        assert run.stderr.count("libodd" if kind == "ends" else "--start-timeout") == 1, run.stderr
    wait_until_gone(mark, "the kernels are gone", 15)


@pytest.mark.waits
def test_kernel_that_takes_66_seconds(laptop: Laptop, host: Host) -> None:
    """A longer `--start-timeout` lets a slow kernel start (nbclient's own limit is 60 s). (G15)"""
    add_slow_kernel(host.home, "slow", 66)
    write_notebook(laptop.home / "w.ipynb", "print(1)")
    run = laptop.start("--start-timeout", "200", "host", "execute", "w.ipynb", "--kernel", "slow", has_terminal=False)
    assert run.wait(180) == 0, run.text
    assert printed(laptop.home / RESULT) == ["1\n"]


# -- G7: what is the same run -----------------------------------------------------------------------------------------


def test_three_at_once_that_are_not_the_same(laptop: Laptop, host: Host) -> None:
    """One notebook with other parameters, another place to run in, another kernel: each is a run of its own. (G7)

    What was asked for with another -o alone is decided so: the run in hand brings no result there, so it runs too.
    """
    write_notebook(laptop.home / "w.ipynb", "import os", waiting_for(host.home / "go"), "print(os.getcwd(), x)")
    (host.home / "sub").mkdir()
    add_kernel(host.home, "other")
    asked = [
        ("host", "-p", "x=1", "-o", "a.ipynb"),
        ("host", "-p", "x=2", "-o", "b.ipynb"),
        ("host:sub", "-p", "x=1", "-o", "c.ipynb"),
        ("host", "-p", "x=1", "--kernel", "other", "-o", "d.ipynb"),
        ("host", "-p", "x=1", "-o", "e.ipynb"),
    ]
    started = [
        laptop.start("-q", destination, "execute", "w.ipynb", *options, has_terminal=False)
        for destination, *options in asked
    ]
    try:
        wait_until(lambda: len(run_dirs(host)) == 5 or any(has_ended(run) for run in started), "all run", 120)
    finally:
        (host.home / "go").touch()
    assert [run.wait() for run in started] == [0] * 5, [run.text for run in started]
    there = str(host.home)
    expected = [there + " 1\n", there + " 2\n", there + "/sub 1\n", there + " 1\n", there + " 1\n"]
    assert [printed(laptop.home / (name + ".ipynb"))[-1] for name in "abcde"] == expected


def has_ended(run: Run) -> bool:
    run._read(0.02)
    return not run._fds


def test_run_that_was_not_started_is_never_silent(laptop: Laptop, host: Host) -> None:
    """The same run is in hand already: that is said under -q as well, for no result comes of it. (G7)"""
    run, identity = start_waiting(laptop)
    for quiet in ("-q", "--json"):
        second = laptop.run(quiet, "host", "execute", "w.ipynb")
        assert identity in (second.stderr if quiet == "-q" else second.stdout), second.text
        assert second.stdout == "" or quiet == "--json"
    (host.home / "go").touch()
    assert run.wait() == 0


def test_results_of_runs_at_once_never_meet(laptop: Laptop, host: Host) -> None:
    """Whoever comes second is refused before it runs: here, and in place on the host; with -o it is not."""
    write_notebook(laptop.home / "w.ipynb", waiting_for(host.home / "go"), "print(x)")
    write_notebook(host.home / "there.ipynb", waiting_for(host.home / "go"), "print(x)")
    asked = [["w.ipynb", "-p", "x=%d" % number] for number in range(5)]
    asked += [[":there.ipynb", "--inplace", "-p", "x=%d" % number] for number in range(2)]
    started = [laptop.start("host", "execute", *words, has_terminal=False) for words in asked]
    try:
        wait_until(lambda: len([run for run in started if not has_ended(run)]) == 2, "the others are refused", 120)
        other = laptop.start("host", "execute", "w.ipynb", "-p", "x=7", "-o", "other.ipynb", has_terminal=False)
        wait_until(lambda: len(run_dirs(host)) == 3 or has_ended(other), "with -o it runs", 60)
    finally:
        (host.home / "go").touch()
    assert [run.wait() for run in [*started, other]].count(0) == 3
    assert printed(laptop.home / "other.ipynb")[-1] == "7\n"
    for runs, words, result in (
        (started[:5], "w.executed.ipynb", laptop.home / "w.executed.ipynb"),
        (started[5:], "there.ipynb", host.home / "there.ipynb"),
    ):
        (done,) = [number for number, run in enumerate(runs) if run.wait() == 0]
        assert printed(result)[-1] == "%d\n" % done
        for run in runs[:done] + runs[done + 1 :]:
            check_failure(run, 1, "no place for the result", words, "which goes on, is to write it", "-o FILE")


# -- G14: killed within a cell ----------------------------------------------------------------------------------------

SAYS = """
from IPython.display import HTML, clear_output, display
import sys
print('gone')
clear_output()
print('new')
display(HTML('<b>shown</b>'))
print('to stderr', file=sys.stderr, flush=True)
print('half a line', end='', flush=True)
"""


def is_written(directory: Path, words: str) -> bool:
    """True when a run's journal has these words."""
    return words in (directory / "journal").read_text()


@pytest.mark.jupyter
def test_run_that_is_killed_within_a_cell_keeps_what_the_cell_said(laptop: Laptop, host: Host) -> None:
    """What a cell says is in the result while it runs; a killed run has it, and so has `logs ID`. (G14)"""
    write_notebook(laptop.home / "w.ipynb", "print('one')", waiting_for() + "\n", "print('never')")
    write_notebook(laptop.home / "all.ipynb", "print('one')", SAYS + waiting_for(), "print('never')")
    for name, shown in (("w", ["waits"]), ("all", ["new", "<b>shown</b>", "to stderr", "half a line"])):
        run = laptop.start("host", "execute", "-v", name + ".ipynb", has_terminal=False)
        identity = run.expect(r"\((r[0-9a-f]{4})\)").group(1)
        run.expect("waits$")
        directory = host.home / ".local/state/rjupyter/runs" / identity
        wait_until(functools.partial(is_written, directory, "waits"), "it is written down")
        os.killpg(json.loads((directory / "run.json").read_text())["pid"], signal.SIGKILL)
        assert run.wait() == 1, run.text
        assert "the execution of %s.ipynb ended early" % name in run.stderr
        assert "it was killed, by hand or because memory ran out" in run.stderr
        result = laptop.home / (name + ".executed.ipynb")
        assert printed(result)[0] == "one\n"
        said = json.dumps(cells_of(result)[1]["outputs"])
        assert [words for words in shown if words not in said] == [] and "gone" not in said
        assert cells_of(result)[2]["outputs"] == []
        logs = laptop.run("host", "logs", identity)
        assert logs.status == 0, logs.text
        for words in ["one", *shown]:
            assert words in logs.stdout or words == "<b>shown</b>", logs.stdout
    assert [record["state"] for record in listed_runs(laptop)] == ["killed", "killed"]


def test_logs_of_a_run_that_goes_on_and_of_one_that_has_ended(laptop: Laptop, host: Host) -> None:
    """`logs RUNID`: what was printed so far, on stdout, and the end of it; status 0 either way. (G14)"""
    run, identity = start_waiting(laptop)
    logs = laptop.run("host", "logs", identity)
    assert logs.status == 0 and "waits\n" in logs.stdout and "went" not in logs.stdout, logs.text
    (host.home / "go").touch()
    assert run.wait() == 0
    logs = laptop.run("host", "logs", identity)
    assert logs.status == 0 and logs.stdout.endswith("waits\nwent\n1\n"), logs.text
    check_failure(laptop.run("host", "logs", "r0000"), 1, "r0000")


DEATHS = {
    "import os; os._exit(3)": "it ended with status 3",
    "import os; os._exit(0)": "it ended with status 0",
    "import os; os.kill(os.getpid(), 11)": "it was ended by SIGSEGV",
    "import os; os.kill(os.getpid(), 9)": "it was killed, by hand or because memory ran out",
}


def test_how_a_kernel_died_is_said(laptop: Laptop, host: Host) -> None:
    """By its own status, or its signal; also where a shell stands between, which turns 11 into 139."""
    add_kernel(host.home, "shell", ["/bin/sh", "-c", '"$@"; exit $?', "sh", *IPYKERNEL])
    names = ["%d.ipynb" % number for number in range(len(DEATHS))]
    for name, source in zip(names, DEATHS):
        write_notebook(laptop.home / name, source)
    for options in ([], ["--kernel", "shell"]):
        run = laptop.run("host", "execute", "-j", "4", *options, *names)
        assert run.status == 5, run.text
        for name, why in zip(names, DEATHS.values()):
            assert "the kernel of %s died in cell 1 of 1: %s\n" % (name, why) in run.stderr, run.stderr


# -- G18: told to end -------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
@pytest.mark.parametrize(
    ("signum", "is_for_all"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_run_that_is_told_to_end(laptop: Laptop, host: Host, mark: str, signum: int, is_for_all: bool) -> None:
    """A shutdown of the host, or an administrator: it was ended, and by which signal; what there is, is kept. (G18)"""
    run, _ = start_waiting(laptop)
    kernels = [pid for pid, words in processes_with(mark).items() if "ipykernel_launcher" in words]
    for pid in (kernels if is_for_all else []) + [runner_pid(host)]:
        os.kill(pid, signum)
    assert run.wait() == 1, run.text
    assert "AssertionError" not in run.text
    assert re.search(signal.Signals(signum).name, run.stderr), run.stderr
    assert re.search(r"ended|stopped", run.stderr)
    assert printed(laptop.home / RESULT)[:2] == ["", "waits\n"]
    (listed,) = listed_runs(laptop)
    assert listed["state"] not in ("failed", "running")
    wait_until_gone(mark, "no kernel is left", 15)


# -- G19: -v ----------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_what_cells_print_is_shown_as_a_terminal_shows_it(laptop: Laptop, host: Host) -> None:
    r"""Lines that end in \r\n, bars that move with \r, backspaces, a line that is only half overwritten. (G19)"""
    source = (
        r"print('one\r\ntwo', end='\r\n')",
        r"print('10%\r20%\r100%')",
        r"print('abcdef\rXY')",
        r"print('ab\b\bcd')",
        r"print('step 1\r', end=''); print('step 2\r', end=''); print('all')",
        r"print('last\r\r\n', end='')",
    )
    write_notebook(laptop.home / "w.ipynb", *source)
    run = laptop.run("host", "execute", "-v", "w.ipynb")
    assert run.status == 0, run.text
    shown = [line for line in run.stderr.splitlines() if not re.match(r"Cell|Exec|Connec|\$|Using|debug|ssh", line)]
    end = [line for line in shown if line in ("one", "two", "100%", "XYcdef", "cd", "allp 2", "last")]
    assert end == ["one", "two", "100%", "XYcdef", "cd", "allp 2", "last"], run.stderr
    assert not [line for line in shown if line in ("", "XY", "ab", "all", "abcd")], run.stderr


def test_text_without_a_newline_is_shown(laptop: Laptop, host: Host) -> None:
    """It is shown while the cell runs, as a terminal would show it at once. (G19)"""
    shows = {"Password for x: ": "Password for x:", "progress...\\r": "progress", "\\33[1mbold": "bold"}
    cells = []
    for number, source in enumerate(shows):
        wait = "import os, time\nwhile not os.path.exists('go-%d'): time.sleep(0.01)" % number
        cells += ["print('%s', end='', flush=True)\n%s" % (source, wait), "print('next %d')" % number]
    write_notebook(laptop.home / "w.ipynb", *cells)
    run = laptop.start("host", "execute", "-v", "w.ipynb", has_terminal=False)
    for number, words in enumerate(shows.values()):
        run.expect(words)
        (host.home / ("go-%d" % number)).touch()
        run.expect("^next %d$" % number)
    assert run.wait() == 0, run.text


# -- G20: none outlives it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["python", "R"])
@pytest.mark.parametrize("is_watched", [True, False], ids=["we are there", "nobody is there"])
def test_no_kernel_outlives_a_run_that_was_killed(
    laptop: Laptop, host: Host, mark: str, kind: str, is_watched: bool
) -> None:
    """kill -9 of the run alone, with a kernel that does not look whether its parent is there. (G20)

    Neither when the laptop has gone.
    """
    if kind == "R":
        spec = add_r(host.home)
        wait = "cat('waits\\n'); flush.console(); Sys.sleep(600)"
    else:
        add_kernel_that_ignores_its_parent(host.home, "own")
        spec = {"name": "own", "display_name": "own", "language": "python"}
        wait = waiting_for()
    write_notebook(laptop.home / "w.ipynb", "1", wait, kernelspec=spec)
    run = laptop.start("host", "execute", "-v", "w.ipynb", has_terminal=False)
    run.expect("^waits$")
    pid = runner_pid(host)
    if not is_watched:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        wait_until_gone(mark, "nothing is left on the laptop", 15, without=ON_HOST)
    os.kill(pid, signal.SIGKILL)
    if is_watched:
        assert run.wait() == 1, run.text
    wait_until_gone(mark, "no kernel is left", 20)
    assert not [path for path in host.sshd.directory.rglob("*") if path.is_socket() and "-k-" in path.name]


def test_what_a_cell_started_ends_with_the_kernel_of_a_run_that_was_killed(
    laptop: Laptop, host: Host, mark: str
) -> None:
    """A program that a cell runs goes with it. (G20)"""
    source = "import subprocess\nprint('waits', flush=True)\nsubprocess.run(['sleep', '600'])"
    add_kernel_that_ignores_its_parent(host.home, "own")
    write_notebook(laptop.home / "w.ipynb", source)
    run = laptop.start("host", "execute", "-v", "w.ipynb", "--kernel", "own", has_terminal=False)
    run.expect("^waits$")
    wait_until(lambda: "sleep 600" in processes_with(mark).values(), "the cell runs")
    os.kill(runner_pid(host), signal.SIGKILL)
    assert run.wait() == 1
    wait_until_gone(mark, "nothing is left", 20)


# -- G22: sys.exit ----------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_exit_with_success_ends_the_notebook_well(laptop: Laptop, host: Host) -> None:
    """Decided as papermill has it: sys.exit(0) ends the notebook there, and is no error. (G22)

    The cells behind it are not executed, status 0, and a line says where it ended. nbclient calls it a failed cell.
    """
    names = []
    for number, source in enumerate(["import sys; sys.exit(0)", "import sys; sys.exit()", "raise SystemExit"]):
        names.append("%d.ipynb" % number)
        write_notebook(laptop.home / names[-1], "print('before')", source, "print('never')")
    run = laptop.run("host", "execute", *names)  # none of them ends the row
    assert (run.status, run.stdout) == (0, "0.executed.ipynb\n1.executed.ipynb\n2.executed.ipynb\n"), run.text
    assert len(re.findall(r"cell 2 (?:of|/) ?3|Cell 2/3.*exit|exit.*[Cc]ell 2", run.stderr)) >= 3, run.stderr
    for number in range(3):
        result = laptop.home / ("%d.executed.ipynb" % number)
        said = printed(result)  # of the second cell, at most IPython's hint at its own ways to exit
        assert (said[0], said[2]) == ("before\n", "")
        assert cells_of(result)[2]["execution_count"] is None


def test_exit_with_anything_else_is_a_failure(laptop: Laptop, host: Host) -> None:
    """What a shell would see as another status than 0; for sys.exit(3), see test_execute.py. (G22)"""
    write_notebook(laptop.home / "w.ipynb", "exit_ = 'no data'; raise SystemExit(exit_)", "print('never')")
    run = laptop.run("host", "execute", "w.ipynb")
    assert run.status == 5, run.text
