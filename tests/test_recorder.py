"""What cells print is kept, whoever looks: by a process beside each server, and shown by `output`."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from client import api, check_failure, compute, events_of, held, listed, new_session, send
from notebooks import write_notebook
from sides import Host, Laptop, Run, processes_with, quiet_port, wait_until

import rjupyter

pytestmark = pytest.mark.jupyter


def journal(host: Host, kernel: str) -> List[Dict[str, Any]]:
    """Return what is written of a kernel."""
    files = host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def wait_for_end(host: Host, kernel: str, count: int = 1) -> None:
    """Wait until that many cells have ended, by the journal."""
    wait_until(lambda: [e["kind"] for e in journal(host, kernel)].count("finished") >= count, "the cell has ended", 60)


def recorders(mark: str) -> List[int]:
    return [pid for pid, words in processes_with(mark).items() if "/agent.py" in words]


@pytest.fixture
def run(laptop: Laptop, host: Host) -> Run:
    for name in ("train.ipynb", "it's here.ipynb"):
        write_notebook(host.home / name)
    return held(laptop, "host")


def test_recorder_sleeps_where_there_is_no_kernel(laptop: Laptop, host: Host, mark: str) -> None:
    """pyzmq's poll returns at once where it has nothing to look at."""
    held(laptop, "host")
    (pid,) = recorders(mark)

    def pauses() -> int:
        text = Path("/proc/%d/status" % pid).read_text()
        return int(re.search(r"\nvoluntary_ctxt_switches:\s*(\d+)", text).group(1))  # type: ignore[union-attr]

    before = pauses()
    wait_until(lambda: pauses() >= before + 8, "it sleeps between two looks", 20)


def test_output_shows_what_a_cell_printed_with_no_page(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "for i in range(3): print('line', i)\n6 * 7", kernel)
    wait_for_end(host, kernel)
    shown = laptop.run("host", "output", "train.ipynb")
    assert re.fullmatch(r"In \[\d+\]  \d\d:\d\d, 0 s\nline 0\nline 1\nline 2\n42\n", shown.stdout), shown.text
    (path,) = host.home.glob(".local/state/rjupyter/servers/*/cells/*.journal")
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


CELLS = {
    "progress": ("for i in range(5): print('\\r%d %%' % (25 * i), end='')\nprint()", "100 %\n"),
    "error": (
        "%xmode Minimal\nprint('before')\n1 / 0",  # the word that begins the usual form no test of ours may print
        "Exception reporting mode: Minimal\nbefore\nZeroDivisionError: division by zero\n",
    ),
    "stderr": ("import sys; print('w', file=sys.stderr)", "w\n"),
    "cleared": (
        "from IPython.display import clear_output\nprint('old'); clear_output(wait=True); print('new')",
        "new\n",
    ),
    "updated": (
        "from IPython.display import display\nh = display('one', display_id=True); h.update('two')",
        "'two'\n",
    ),
    "image": (
        "from IPython.display import Image, display\ndisplay(Image(data=b'x' * 24000, format='png'))",
        r"\[image/png, 24 kB\]\n",
    ),
}


@pytest.mark.parametrize("name", CELLS)
def test_output_is_as_the_page_would_show_it(laptop: Laptop, host: Host, run: Run, name: str) -> None:
    code, wanted = CELLS[name]
    kernel = new_session(run.url(), "it's here.ipynb")
    compute(run.url(), code, kernel)
    wait_for_end(host, kernel)
    shown = laptop.run("host", "output", "it's here").stdout
    assert re.fullmatch("In [^\n]*\n" + wanted, shown, re.DOTALL), shown
    assert ("failed" in shown.split("\n")[0]) == (name == "error")


def test_output_as_json(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "print('hello')", kernel)
    wait_for_end(host, kernel)
    first, printed, last = [e for e in events_of(laptop.run("--json", "host", "output", kernel[:8])) if "cell" in e]
    assert (first["event"], first["code"], first["notebook"]) == ("input", "print('hello')", "train.ipynb")
    assert printed["content"] == {"name": "stdout", "text": "hello\n"}
    assert (last["event"], last["is_done"], last["cell"]) == ("finished", True, first["cell"])


def test_output_is_followed_while_the_cell_runs(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    gate = host.home / "gate"
    code = "import os, time\nprint('first', flush=True)\nwhile not os.path.exists(%r): time.sleep(.05)\nprint('last')"
    connection = send(run.url(), code % str(gate), kernel)
    connection.close()
    following = laptop.start("host", "output", "-f", has_terminal=False)
    following.expect("first\n")
    gate.write_text("")
    following.expect(r"last\n(.|\n)*In \[\d+\] done after")
    following.interrupt()
    assert following.wait() == 0


def test_the_way_back_tells_once_what_ended_meanwhile(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    gate = host.home / "gate"
    code = "import os, time\nprint(1)\nwhile not os.path.exists(%r): time.sleep(.05)\nprint(2)"
    send(run.url(), code % str(gate), kernel).close()
    wait_until(lambda: journal(host, kernel), "it has begun")
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["connections"] == 0, "the page is gone")
    run.interrupt()
    run.wait(20)
    gate.write_text("")
    wait_for_end(host, kernel)
    told = re.compile(r"While you were away: train\.ipynb In \[\d+\] done after \d+ s \(2 lines\)\. To see it: (.*)\n")
    again = held(laptop, "host")
    match = told.search(again.text)
    assert match and match.group(1).endswith("host output train.ipynb"), again.text
    assert not told.search(held(laptop, "--local-port", str(quiet_port()), "host").text)


def test_the_log_of_jupyter_has_no_trouble_of_ours(laptop: Laptop, host: Host, run: Run) -> None:
    """Asked for its kernels while it starts one, Jupyter Server 2.21 fails with a traceback in its log."""
    kernels = [new_session(run.url(), "%d.ipynb" % number) for number in range(12)]  # the moment is short: 20 ms
    for kernel in kernels[-2:]:
        compute(run.url(), "print(1)", kernel)
        wait_for_end(host, kernel)
    (log,) = host.home.glob(".local/state/rjupyter/servers/*/log")
    assert "Uncaught exception" not in log.read_text()


def shut_down(laptop: Laptop, run: Run, pid: int) -> None:
    api(run.url(), "shutdown", "POST")


def kill(laptop: Laptop, run: Run, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(laptop: Laptop, run: Run, pid: int) -> None:
    assert laptop.run("host", "stop", "--yes").status == 0


@pytest.mark.parametrize("end", [shut_down, kill, stop])
def test_what_was_recorded_is_kept_when_its_server_ends(
    laptop: Laptop, host: Host, run: Run, mark: str, end: Callable[[Laptop, Run, int], None]
) -> None:
    """For a week, as a log is, with no secret beside it; also of a cell that ran at that moment."""
    wait_until(lambda: len(recorders(mark)) == 1, "it runs")
    kernel = new_session(run.url(), "train.ipynb")
    send(run.url(), "%xmode Minimal\nimport time; print('kept', flush=True); time.sleep(600)", kernel).close()
    wait_until(lambda: "kept" in str([e.get("content") for e in journal(host, kernel)]), "it is written down")
    (record,) = host.servers()
    end(laptop, run, record["pid"])
    wait_until(lambda: not recorders(mark), "the recorder has ended", 20)
    for words in (["host"], ["host:"], ["host:train.ipynb"]):
        shown = laptop.run(*words, "output")
        assert re.fullmatch(r"In \[\d+\] [^\n]*, failed\n(.*\n)?kept\n(.*Interrupt.*\n)?", shown.stdout), shown.text
    check_failure(laptop.run("host:it's here.ipynb", "output"), 1, "nothing is recorded of it's here.ipynb")
    assert [server["state"] for server in listed(laptop)] == ([] if end is stop else ["ended"])
    directory = host.home / ".local/state/rjupyter/servers" / record["id"]
    assert "Serving notebooks" in (directory / "log").read_text()
    if end is stop:
        assert {path.name for path in directory.iterdir()} == {"cells", "log", "server.json", "stop"}
    assert run.wait(60) == 4  # why it ended is told all the same
    assert ("it was stopped" in run.stderr) == (end is stop)
    held(laptop, "host")
    assert directory.exists()
    past = time.time() - rjupyter.KEEP_ENDED_S - 60
    os.utime(directory, (past, past))
    held(laptop, "--new", "host")
    assert not directory.exists()


def test_what_was_recorded_is_kept_for_a_week_from_the_end(laptop: Laptop, host: Host, run: Run, mark: str) -> None:
    """Not from the start: a server may run for months."""
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "print('kept')", kernel)
    wait_for_end(host, kernel)
    (record,) = host.servers()
    directory = host.home / ".local/state/rjupyter/servers" / record["id"]
    past = time.time() - 2 * rjupyter.KEEP_ENDED_S
    os.utime(directory, (past, past))
    os.kill(record["pid"], signal.SIGKILL)
    wait_until(lambda: not recorders(mark), "the recorder has ended", 20)
    run.wait(60)
    held(laptop, "host")
    assert "kept" in laptop.run("host", "output", "train.ipynb").stdout


def test_a_server_that_was_stopped_and_ran_no_cell_leaves_nothing(laptop: Laptop, host: Host, run: Run) -> None:
    new_session(run.url(), "train.ipynb")
    assert laptop.run("host", "stop").status == 0
    assert not list(host.home.glob(".local/state/rjupyter/servers/*"))


def test_a_server_may_be_left_without(laptop: Laptop, host: Host, mark: str) -> None:
    run = held(laptop, "--no-record", "host")
    compute(run.url(), "print(1)")
    assert not recorders(mark)
    check_failure(laptop.run("host", "output"), 1, "nothing is recorded", "--no-record")


def test_a_name_that_is_nowhere_is_told_with_those_that_are(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    compute(run.url(), "print(1)", kernel)
    wait_for_end(host, kernel)
    check_failure(
        laptop.run("host", "output", "other.ipynb"), 1, "nothing is recorded of other.ipynb", "it's here.ipynb"
    )


def test_100_mb_as_fast_as_python_can_arrive_or_are_cut_by_the_bound(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    code = "for i in range(1000000): print('%08d' % i + 'x' * 91)"
    compute(run.url(), code, kernel)
    wait_until(lambda: "finished" in tail(host, kernel), "it has ended", 120)
    shown = laptop.run("host", "output", "train.ipynb").stdout
    numbers = [int(line[:8]) for line in shown.splitlines() if re.match(r"\d{8}x", line)]
    assert numbers[-1] == 999999
    assert numbers == list(range(numbers[0], 1000000))
    assert "older output was dropped" in shown
    sizes = [path.stat().st_size for path in host.home.glob(".local/state/rjupyter/servers/*/cells/*")]
    assert 32e6 < sum(sizes) < 70e6


def tail(host: Host, kernel: str) -> str:
    """Return the end of a journal; empty for the moment in which it becomes the older half."""
    for path in host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 1000))
            return stream.read().decode()
    return ""


def test_a_kernel_that_is_restarted_goes_on_in_the_same_journal(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "print('before')", kernel)
    api(run.url(), "kernels/%s/restart" % kernel, "POST", {})
    compute(run.url(), "print('after')", kernel)
    wait_for_end(host, kernel, 2)
    shown = laptop.run("host", "output", "train.ipynb").stdout
    assert re.search(r"before\n\nIn .*\nafter\n", shown), shown


def test_two_servers_record_each_its_own(laptop: Laptop, host: Host, run: Run) -> None:
    (host.home / "other").mkdir()
    write_notebook(host.home / "other/train.ipynb")
    second = held(laptop, "--new", "host:other")
    kernels = [new_session(each.url(), "train.ipynb") for each in (run, second)]
    for each, kernel, word in zip((run, second), kernels, ("one", "two")):
        compute(each.url(), "print(%r)" % word, kernel)
        wait_for_end(host, kernel)
    assert "two" in laptop.run("host:other", "output").stdout
    for kernel, word in zip(kernels, ("one", "two")):
        assert len(list(host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel))) == 1
        assert word in laptop.run("host", "output", kernel).stdout


def test_a_page_whose_link_died_is_soon_taken_for_gone(laptop: Laptop, host: Host, run: Run) -> None:
    """It answers no ping; Jupyter's own patience is 90 s, and it would send into the void until then."""
    kernel = new_session(run.url(), "train.ipynb")
    connection = send(run.url(), "print(1)", kernel)
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["connections"] == 0, "the page is gone", 25)
    connection.close()


@pytest.mark.parametrize("where", ["configuration", "argument"])
def test_pings_of_the_user_s_own_stay(laptop: Laptop, host: Host, where: str) -> None:
    (host.home / ".jupyter").mkdir(exist_ok=True)
    if where == "configuration":
        path = host.home / ".jupyter/jupyter_server_config.py"
        path.write_text("c.ServerApp.tornado_settings = {'ws_ping_interval': 7000}\n")
    arguments = [] if where == "configuration" else ["--server-arg=--ServerApp.tornado_settings={'x': 1}"]
    held(laptop, *arguments, "host")
    words = Path("/proc/%d/cmdline" % host.servers()[0]["pid"]).read_text()
    assert "ws_ping" not in words


def test_a_cell_that_ended_into_a_dead_link_is_told_of(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    connection = send(run.url(), "print(1)", kernel)  # which hears nothing from now on
    wait_for_end(host, kernel)
    assert journal(host, kernel)[-1]["connections"] == 1
    wait_until(lambda: list(host.home.glob(".local/state/rjupyter/servers/*/cells/*.away")), "it is known", 30)
    connection.close()
    assert "While you were away: train.ipynb In [" in held(laptop, "host", "--local-port", str(quiet_port())).text


def test_a_server_on_a_socket_is_recorded(laptop: Laptop, host: Host) -> None:
    """Its kernels have sockets as well, not ports."""
    run = held(laptop, "--socket", "host")
    kernel = str(api(run.url(), "kernels", "POST", {})["id"])
    compute(run.url(), "print('through')", kernel)
    wait_for_end(host, kernel)
    assert "through" in laptop.run("host", "output").stdout


# -- --save -----------------------------------------------------------------------------------------------------------


def cells_of(host: Host, name: str) -> List[Dict[str, Any]]:
    """Return the cells of a notebook there; a source is one text, as a file need not have it."""
    cells = json.loads((host.home / name).read_text())["cells"]
    return [dict(cell, source="".join(cell["source"])) for cell in cells]


def texts(cell: Dict[str, Any]) -> List[str]:
    return ["".join(output.get("text", "")) or output["output_type"] for output in cell["outputs"]]


def test_outputs_are_saved_into_the_cells_that_still_have_the_code(laptop: Laptop, host: Host, run: Run) -> None:
    equal = "n = globals().get('n', 0) + 1; print('run', n)"
    sources = [equal, "1 + 1", "%xmode Minimal\n1 / 0", equal, "'never run'", "'edited since'"]
    write_notebook(host.home / "train.ipynb", *sources)
    kernel = new_session(run.url(), "train.ipynb")
    for count, source in enumerate([*sources[:4], "'edited'"], 1):
        compute(run.url(), source, kernel)
        wait_for_end(host, kernel, count)
    before = cells_of(host, "train.ipynb")
    saved = laptop.run("host", "output", "train.ipynb", "--save")
    assert "Saved the outputs of 4 cells into train.ipynb." in saved.stderr, saved.text
    after = cells_of(host, "train.ipynb")
    assert [texts(cell) for cell in after[:2]] == [["run 1\n"], ["execute_result"]]
    assert texts(after[2])[-1] == "error"
    assert texts(after[3]) == ["run 2\n"]
    assert after[4:] == before[4:]
    assert "Saved the outputs of 0 cells" in laptop.run("host", "output", "train.ipynb", "--save").stderr


def test_nothing_is_saved_under_an_open_page(laptop: Laptop, host: Host, run: Run) -> None:
    write_notebook(host.home / "train.ipynb", "print(1)")
    kernel = new_session(run.url(), "train.ipynb")
    before = (host.home / "train.ipynb").read_text()
    connection = send(run.url(), "print(1)", kernel)
    wait_for_end(host, kernel)
    check_failure(laptop.run("host", "output", "--save"), 1, "train.ipynb is open", "close its page")
    assert (host.home / "train.ipynb").read_text() == before
    connection.close()


def test_nothing_is_saved_into_a_notebook_that_is_gone(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "print(1)", kernel)
    wait_for_end(host, kernel)
    (host.home / "train.ipynb").unlink()
    check_failure(laptop.run("host", "output", "--save"), 1, "cannot read the notebook", "it is no longer there")


def test_a_damaged_line_of_a_journal_is_passed_over(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "print('kept')", kernel)
    wait_for_end(host, kernel)
    (path,) = host.home.glob(".local/state/rjupyter/servers/*/cells/*.journal")
    path.write_text('{"kind": "beg\n[]\n{}\n{"kind": "begun"}\n' + path.read_text())
    shown = laptop.run("host", "output")
    assert shown.status == 0 and "kept" in shown.stdout
