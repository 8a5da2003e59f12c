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
from client import (
    api,
    check_failure,
    compute,
    end_kernels,
    events_of,
    held,
    listed,
    new_kernel,
    new_session,
    send,
    wait_for_server,
)
from jupyters import jupyter_with_pairs
from notebooks import code, printed, write_notebook
from sides import VENV_BIN, Host, Laptop, Run, processes_with, quiet_port, wait_until

import rjupyter

pytestmark = pytest.mark.jupyter

KEPT_S = 7 * 86400  # a week


def journal(host: Host, kernel: str) -> List[Dict[str, Any]]:
    """Return what is written of a kernel."""
    files = host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def journal_of(host: Host, kernel: str) -> Path:
    """Return the file in which a kernel is written down."""
    (path,) = host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel)
    return path


def wait_for_end(host: Host, kernel: str, count: int = 1) -> None:
    """Wait until that many cells have ended, by the journal."""
    wait_until(lambda: [e["kind"] for e in journal(host, kernel)].count("finished") >= count, "the cell has ended", 60)


def wait_until_printed(host: Host, kernel: str, words: str) -> None:
    wait_until(lambda: words in str([e.get("content") for e in journal(host, kernel)]), "it is written down")


def recorders(mark: str) -> List[int]:
    return [pid for pid, words in processes_with(mark).items() if "/agent.py" in words]


@pytest.fixture
def run(tunnel: Run, host: Host) -> Run:
    """The server that the tests share, with no kernel."""
    write_notebook(host.home / "train.ipynb")
    wait_for_server(tunnel.url())
    end_kernels(tunnel.url())
    return tunnel


@pytest.mark.shared
def test_recorder_sleeps_where_there_is_no_kernel(run: Run, mark: str) -> None:
    """pyzmq's poll returns at once where it has nothing to look at."""
    (pid,) = wait_until(lambda: recorders(mark), "it runs")

    def pauses() -> int:
        text = Path("/proc/%d/status" % pid).read_text()
        return int(re.search(r"\nvoluntary_ctxt_switches:\s*(\d+)", text).group(1))  # type: ignore[union-attr]

    before = pauses()
    wait_until(lambda: pauses() >= before + 8, "it sleeps between two looks", 20)


@pytest.mark.shared
def test_notebook_that_gets_its_name_while_a_cell_runs(laptop: Laptop, host: Host, run: Run) -> None:
    """As a page has it that is asked for a cell as soon as it is there; or a notebook that is moved meanwhile."""
    kernel = new_session(run.url(), "5e1c0f3a-of-a-page")
    wait = "import os, time\nprint('begun')\nwhile not os.path.exists('moved'): time.sleep(.05)"
    connection = send(run.url(), wait, kernel)
    wait_until_printed(host, kernel, "begun")
    (session,) = [each for each in api(run.url(), "sessions") if each["kernel"]["id"] == kernel]
    facts = {"path": "late.ipynb", "name": "late.ipynb", "type": "notebook"}
    api(run.url(), "sessions/" + session["id"], "PATCH", facts)
    wait_until(lambda: "begun" in laptop.run("host", "output", "late.ipynb").stdout, "it is known by that", 20, 0.5)
    connection.close()
    (host.home / "moved").touch()
    wait_for_end(host, kernel)
    again = held(laptop, "host")
    assert "While you were away: late.ipynb In [" in again.text, again.text


@pytest.mark.shared
def test_output_shows_what_a_cell_printed_with_no_page(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    compute(run.url(), "for i in range(3): print('line', i)\n6 * 7", kernel)
    wait_for_end(host, kernel)
    shown = laptop.run("host", "output", "it's here.ipynb")
    assert re.fullmatch(r"In \[\d+\]  \d\d:\d\d, \d+ s\nline 0\nline 1\nline 2\n42\n", shown.stdout), shown.text
    path = journal_of(host, kernel)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    # A name that is nowhere is told with those that are.
    other = laptop.run("host", "output", "other.ipynb")
    check_failure(other, 1, "nothing is recorded of other.ipynb", "it's here.ipynb")
    # A damaged line is passed over.
    path.write_text('{"kind": "beg\n[]\n{}\n{"kind": "begun"}\n' + path.read_text())
    shown = laptop.run("host", "output", "it's here.ipynb")
    assert shown.status == 0 and "line 2\n42\n" in shown.stdout


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


@pytest.mark.shared
def test_output_is_as_the_page_would_show_it(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "page.ipynb")
    for source, _ in CELLS.values():
        compute(run.url(), source, kernel)
    wait_for_end(host, kernel, len(CELLS))
    shown = laptop.run("host", "output", "page").stdout
    cells = re.split(r"\n(?=In \[)", shown)
    assert len(cells) == len(CELLS), shown
    for (name, (_, wanted)), cell in zip(CELLS.items(), cells):
        head, _, printed = cell.partition("\n")
        assert re.fullmatch(wanted, printed), (name, shown)
        assert head.endswith(", failed") == (name == "error"), (name, shown)


@pytest.mark.shared
def test_output_as_json(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    compute(run.url(), "print('hello')", kernel)
    wait_for_end(host, kernel)
    first, printed, last = [e for e in events_of(laptop.run("--json", "host", "output", kernel[:8])) if "cell" in e]
    assert (first["event"], first["code"], first["notebook"]) == ("input", "print('hello')", "train.ipynb")
    assert printed["content"] == {"name": "stdout", "text": "hello\n"}
    assert (last["event"], last["is_done"], last["cell"]) == ("finished", True, first["cell"])


@pytest.mark.shared
def test_output_is_followed_while_the_cell_runs(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "train.ipynb")
    gate = host.home / "gate of the followed"
    code = "import os, time\nprint('first', flush=True)\nwhile not os.path.exists(%r): time.sleep(.05)\nprint('last')"
    connection = send(run.url(), code % str(gate), kernel)
    connection.close()
    following = laptop.start("host", "output", kernel[:8], "-f", has_terminal=False)
    following.expect("first\n")
    gate.write_text("")
    following.expect(r"last\n(.|\n)*In \[\d+\] done after")
    following.interrupt()
    assert following.wait() == 0


# What is executed in a notebook of that name, a cell each, and how the next open tells of it.
HTML = "from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'))"
DIES = "import os, time\nprint(1, flush=True)\ntime.sleep(.5)\nos._exit(3)"
NOT = r"; not put into the notebook: "
SEE = r"\.\nTo see it: (.*)\n"
MISSED = {
    "one": (["print(1)\nprint(2)"], r"\[1\] done after \d+ s \(2 lines\); it is in the notebook\.\n"),
    "three": (
        [HTML, "1", "print(3)"],
        r"\[1\] done .* \(1 line\), the last of 3 cells; they are in the notebook\.\n",
    ),
    "failed": (["%xmode Minimal\n1 / 0"], r"\[1\] failed after \d+ s \(\d lines\); it is in the notebook\.\n"),
    "died": ([DIES], r"\[1\] failed .*: its kernel died \(1 line\); it is in the notebook\.\n"),
    "edited": (["print(1)"], r".* \(1 line\)" + NOT + "the code was changed since" + SEE),
    "removed": (["print(1)"], r".*" + NOT + "it is no longer there" + SEE),
    "open": (["print(1)"], r".*" + NOT + "a page is connected to its kernel.*" + SEE),
}


def test_the_way_back_tells_once_what_ended_meanwhile(laptop: Laptop, host: Host) -> None:
    """And puts it into the notebooks, whose pages trust it; code of `eval` is not what anybody missed."""
    for name, (sources, _) in MISSED.items():
        write_notebook(host.home / (name + ".ipynb"), *sources)
    run = held(laptop, "host", "--no-save")
    kernels = {name: new_session(run.url(), name + ".ipynb") for name in MISSED}
    for name, (sources, _) in MISSED.items():
        send(run.url(), sources[0], kernels[name], *sources[1:]).close()
        wait_for_end(host, kernels[name], len(sources))
    assert laptop.run("host", "eval", "-k", "one", "print('mine')").status == 0
    write_notebook(host.home / "edited.ipynb", "print(2)")
    (host.home / "removed.ipynb").unlink()
    wait_until(lambda: len(list(host.home.glob(NOTES))) == len(MISSED), "all pages are gone", 30)
    last = [entry["id"] for entry in journal(host, kernels["three"]) if entry["kind"] == "begun"][-1]
    notes = next(host.home.glob(NOTES.replace("*.away", kernels["three"] + ".away")))
    wait_until(lambda: last in notes.read_text(), "its last cell is noted")
    page = send(run.url(), "import time; time.sleep(600)", kernels["open"])
    before = (host.home / "open.ipynb").read_text()
    again = held(laptop, "host", "--local-port", str(quiet_port()))
    for name, (_, told) in MISSED.items():
        match = re.search(r"While you were away: %s\.ipynb In %s" % (name, told), again.text)
        assert match, name + again.text
        assert all(hint.endswith("host output %s.ipynb" % name) for hint in match.groups()), again.text
    page.close()
    assert again.stderr.index("While you were away") < again.stderr.index("Forwarding "), again.text
    assert (host.home / "open.ipynb").read_text() == before
    assert [texts(cell) for cell in cells_of(host, "three.ipynb")] == [["display_data"], ["execute_result"], ["3\n"]]
    assert texts(cells_of(host, "one.ipynb")[0]) == ["1\n2\n"] and texts(cells_of(host, "edited.ipynb")[0]) == []
    page_of_three = api(again.url(), "contents/three.ipynb?content=1")["content"]
    assert [cell["metadata"]["trusted"] for cell in page_of_three["cells"]] == [True, True, True]
    assert "away" not in held(laptop, "host", "--local-port", str(quiet_port())).text


def test_an_open_that_joins_a_tunnel_tells_what_was_missed(laptop: Laptop, host: Host) -> None:
    """A tunnel in the background is up for days, and nobody comes back in another way. Nobody logs in for it."""
    write_notebook(host.home / "night.ipynb", "print(6 * 7)")
    run = held(laptop, "host")
    kernel = new_session(run.url(), "night.ipynb")
    send(run.url(), "print(6 * 7)", kernel).close()
    wait_for_end(host, kernel, 1)
    wait_until(lambda: list(host.home.glob(NOTES)), "the page is gone", 30)
    logins = host.sshd.logins()
    assert "While" not in laptop.run("host").stderr  # nobody would read it
    for told in (1, 0):
        again = laptop.start("host", has_terminal=True)
        assert again.wait() == 0
        assert again.text.count("While you were away: night.ipynb In [1] done") == told, again.text
        assert "Connected" not in again.text
    assert texts(cells_of(host, "night.ipynb")[0]) == ["42\n"]
    assert host.sshd.logins() == logins


def test_a_text_notebook_that_keeps_no_outputs_is_not_said_to_have_them(
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    host = make_host(path=str(jupyter_with_pairs()))
    (host.home / "note.py").write_text("# %%\nprint(6 * 7)\n")
    run = held(laptop, "host")
    kernel = new_session(run.url(), "note.py")
    send(run.url(), "print(6 * 7)", kernel).close()
    wait_for_end(host, kernel, 1)
    wait_until(lambda: list(host.home.glob(NOTES)), "the page is gone", 30)
    saved = laptop.run("host", "output", "note.py", "--save")
    assert saved.status == 1 and "it is a text notebook, which keeps no outputs" in saved.stderr
    again = held(laptop, "host", "--local-port", str(quiet_port()))
    told = r"While you were away: note\.py In \[1\] done .*; not put into the notebook: it is a text notebook.*\nTo see"
    assert re.search(told, again.text), again.text


def test_what_another_kernel_executed_since_stays_in_its_notebook(laptop: Laptop, host: Host) -> None:
    """The one whose cell nobody saw end is gone since."""
    write_notebook(host.home / "a.ipynb", "print(next(n))")
    run = held(laptop, "host")
    first = new_session(run.url(), "a.ipynb")
    for source in ("n = iter([1])", "print(next(n))"):
        compute(run.url(), source, first)
    wait_for_end(host, first, 2)
    wait_until(lambda: list(host.home.glob(NOTES)), "the page is gone", 30)
    api(run.url(), "kernels/" + first, "DELETE")
    second = new_session(run.url(), "a.ipynb")
    page = send(run.url(), "n = iter([2])", second, "print(next(n))")
    wait_for_end(host, second, 2)
    shown = {"output_type": "stream", "name": "stdout", "text": "2\n"}
    write_notebook(host.home / "a.ipynb", dict(code("print(next(n))"), outputs=[shown]))
    page.close()
    notes = [path for path in host.home.glob(NOTES) if second in path.name]
    for path in notes:
        path.unlink()
    again = held(laptop, "host", "--local-port", str(quiet_port()))
    assert "; not put into the notebook: another kernel has executed it since." in again.text
    assert re.search("^To see it: .* output %s$" % first[:8], again.text, re.MULTILINE), again.text
    assert "1\n" in laptop.run("host", "output", first[:8]).stdout
    assert texts(cells_of(host, "a.ipynb")[0]) == ["2\n"]


NOTES = ".local/state/rjupyter/servers/*/cells/*.away"


def test_notebooks_are_left_alone_where_that_was_asked_for(laptop: Laptop, host: Host) -> None:
    """On the command line, or in the configuration for this host."""
    write_notebook(host.home / "a.ipynb", "print(1)")
    run = held(laptop, "host")
    kernel = new_session(run.url(), "a.ipynb")
    before = (host.home / "a.ipynb").read_text()
    config = laptop.home / ".config/rjupyter/config"
    for count, words in enumerate((["--no-save"], []), 1):
        compute(run.url(), "print(1)", kernel)
        wait_for_end(host, kernel, count)
        wait_until(lambda: list(host.home.glob(NOTES)), "the page is gone", 30)
        again = held(laptop, "host", *words, "--local-port", str(quiet_port()))
        told = r"While you were away: a\.ipynb In \[\d\] done after \d+ s \(1 line\)\.\nTo see it: .* output a.ipynb\n"
        assert re.search(told, again.text), again.text
        assert (host.home / "a.ipynb").read_text() == before
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text("[ho*]\nno-save\n")


def shut_down(laptop: Laptop, run: Run, pid: int) -> None:
    api(run.url(), "shutdown", "POST")


def kill(laptop: Laptop, run: Run, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(laptop: Laptop, run: Run, pid: int) -> None:
    assert laptop.run("host", "stop", "--yes").status == 0


def test_what_was_recorded_is_kept_when_its_server_ends(laptop: Laptop, host: Host, mark: str) -> None:
    """For a week from the end, as a log is, with no secret beside it; also of a cell that ran at that moment."""
    past = time.time() - 2 * KEPT_S
    directories = []
    for number, end in enumerate([shut_down, kill, stop]):
        name = end.__name__
        (host.home / name).mkdir()
        for notebook in ("train.ipynb", "it's here.ipynb"):
            write_notebook(host.home / name / notebook)
        run = held(laptop, "--local-port", str(quiet_port()), "host:" + name)
        wait_until(lambda: len(recorders(mark)) == 1, "it runs: " + name)
        kernel = new_session(run.url(), "train.ipynb")
        send(run.url(), "%xmode Minimal\nimport time; print('kept', flush=True); time.sleep(600)", kernel).close()
        wait_until_printed(host, kernel, "kept")
        (record,) = [server for server in host.servers() if server["root_dir"] == str(host.home / name)]
        directories.append(host.home / ".local/state/rjupyter/servers" / record["id"])
        os.utime(directories[-1], (past, past))  # it has run for months
        end(laptop, run, record["pid"])
        wait_until(lambda: not recorders(mark), "the recorder has ended: " + name, 20)
        words = ["host:" + name, "host:%s/train.ipynb" % name, *(["host", "host:"] if number == 0 else [])]
        for place in words:
            shown = laptop.run(place, "output")
            assert re.fullmatch(r"In \[\d+\] [^\n]*, failed\n(.*\n)?kept\n(.*Interrupt.*\n)?", shown.stdout), shown.text
        said = laptop.run("host:%s/it's here.ipynb" % name, "output")
        check_failure(said, 1, "nothing is recorded of it's here.ipynb")
        assert "Serving notebooks" in (directories[-1] / "log").read_text()
        assert run.wait(60) == 4  # why it ended is told all the same
        assert ("it was stopped" in run.stderr) == (end is stop), run.text
    assert {path.name for path in directories[-1].iterdir()} == {"cells", "log", "server.json", "stop"}
    assert [server["state"] for server in listed(laptop)] == ["ended", "ended"]  # not the one that was stopped
    held(laptop, "host")
    assert all(directory.exists() for directory in directories)
    past = time.time() - KEPT_S - 60
    for directory in directories:
        for path in (directory, directory / "log"):
            os.utime(path, (past, past))
    last = held(laptop, "--local-port", str(quiet_port()), "--new", "host")
    assert not any(directory.exists() for directory in directories)
    # One that was stopped and ran no cell leaves nothing.
    new_session(last.url(), "train.ipynb")
    assert laptop.run("host", "stop", "--all", "--yes").status == 0
    assert not list(host.home.glob(".local/state/rjupyter/servers/*"))


def test_a_server_may_be_left_without(laptop: Laptop, host: Host, mark: str) -> None:
    check_failure(laptop.run("host", "eval", "1"), 1, "no server of yours runs there")
    check_failure(laptop.run("host", "eval"), 2, "eval takes CODE")
    run = held(laptop, "--no-record", "host")
    compute(run.url(), "print(1)")
    assert not recorders(mark)
    check_failure(laptop.run("host", "output"), 1, "nothing is recorded", "--no-record")
    check_failure(laptop.run("host", "eval", "1"), 1, "not recorded")


@pytest.mark.shared
def test_100_mb_as_fast_as_python_can_arrive_or_are_cut_by_the_bound(
    laptop: Laptop, host: Host, run: Run, mark: str
) -> None:
    kernel = new_session(run.url(), "long.ipynb")
    code = "for i in range(1000000): print('%08d' % i + 'x' * 91)"
    send(run.url(), code, kernel).close()  # a page would be slower
    wait_until(lambda: "finished" in tail(host, kernel), "it has ended", 120)
    shown = laptop.run("host", "output", "long.ipynb").stdout
    numbers = [int(line[:8]) for line in shown.splitlines() if re.match(r"\d{8}x", line)]
    assert numbers == list(range(numbers[0], 1000000))
    assert re.match(r"In \[\d+\]  .*\n\[older output was dropped: more than 64 MB came\]\n%08d" % numbers[0], shown)
    sizes = [path.stat().st_size for path in host.home.glob(".local/state/rjupyter/servers/*/cells/%s*" % kernel)]
    assert 32e6 < sum(sizes) < 70e6
    (pid,) = recorders(mark)
    wait_until(lambda: memory_of(pid) < 64e6, "it has given back what waited: %d" % memory_of(pid), 20)


def memory_of(pid: int) -> float:
    """Return how much memory a process has, in bytes."""
    return float(Path("/proc/%d/statm" % pid).read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tail(host: Host, kernel: str) -> str:
    """Return the end of a journal; empty for the moment in which it becomes the older half."""
    for path in host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 1000))
            return stream.read().decode()
    return ""


@pytest.mark.shared
def test_a_kernel_that_is_restarted_goes_on_in_the_same_journal(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "again.ipynb")
    compute(run.url(), "print('before')", kernel)
    api(run.url(), "kernels/%s/restart" % kernel, "POST", {})
    compute(run.url(), "print('after')", kernel)
    wait_for_end(host, kernel, 2)
    shown = laptop.run("host", "output", "again.ipynb").stdout
    assert re.search(r"before\n\nIn .*\nafter\n", shown), shown


@pytest.mark.shared
def test_two_servers_record_each_its_own(laptop: Laptop, host: Host, run: Run) -> None:
    (host.home / "other").mkdir()
    write_notebook(host.home / "other/train.ipynb")
    second = held(laptop, "--local-port", str(quiet_port()), "--new", "host:other")
    kernels = [new_session(each.url(), "train.ipynb") for each in (run, second)]
    for each, kernel, word in zip((run, second), kernels, ("one", "two")):
        compute(each.url(), "print(%r)" % word, kernel)
        wait_for_end(host, kernel)
    assert "two" in laptop.run("host:other", "output").stdout
    for kernel, word in zip(kernels, ("one", "two")):
        assert len(list(host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel))) == 1
        assert word in laptop.run("host", "output", kernel).stdout
    assert laptop.run("host:other", "stop", "--yes").status == 0


@pytest.mark.shared
def test_a_cell_that_no_page_heard_for_a_while_is_told_of_whatever_page_came_then(
    laptop: Laptop, host: Host, run: Run
) -> None:
    """A new page does not show what a cell prints that another one began; one that it begins itself, it does."""
    code = "import os, time\nprint('begun', flush=True)\nwhile not os.path.exists('go'): time.sleep(.05)\nprint('end')"
    write_notebook(host.home / "train.ipynb", code, "print(2)")
    kernel = new_session(run.url(), "train.ipynb")
    send(run.url(), code, kernel).close()
    wait_until(lambda: "begun" in laptop.run("host", "output", "train").stdout, "it prints")
    time.sleep(2 * rjupyter.SERVER_EVERY_S)  # the recorder asks so often whether there is a page, and tells nobody
    page = send(run.url(), "print(2)", kernel)
    (host.home / "go").write_text("")
    wait_for_end(host, kernel, 2)
    assert [entry["connections"] for entry in journal(host, kernel) if entry["kind"] == "finished"] == [1, 1]
    page.close()
    (host.home / "go").unlink()
    assert list(journal_of(host, kernel).parent.glob("*.away"))
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["connections"] == 0, "the page is gone")
    told = held(laptop, "host", "--local-port", str(quiet_port())).text
    assert "While you were away: train.ipynb In [1]" in told, told
    assert printed(host.home / "train.ipynb") == ["begun\nend\n", "2\n"]  # which its page has not saved either


def test_what_was_missed_is_told_although_its_server_has_ended(laptop: Laptop, host: Host) -> None:
    """By the next one there; and what it does not put into the notebook is found with the command that it prints."""
    (host.home / "work").mkdir()
    for name in ("train", "edited"):
        write_notebook(host.home / ("work/%s.ipynb" % name), "print('kept')")
    run = held(laptop, "host:work")
    for name in ("train", "edited"):
        compute(run.url(), "print('kept')", new_session(run.url(), name + ".ipynb"))
    wait_until(lambda: len(list(host.home.rglob("*.away"))) == 2, "it is noted")
    write_notebook(host.home / "work/edited.ipynb", "print('edited')")
    os.kill(host.servers()[0]["pid"], signal.SIGKILL)
    assert run.wait(30) == 4
    other = held(laptop, "host")
    assert "While you were away" not in other.text, other.text
    told = held(laptop, "host:work").text
    assert re.search(r"While you were away: train.ipynb In \[1\] done .*; it is in the notebook\.", told), told
    assert printed(host.home / "work/train.ipynb") == ["kept\n"]
    (words,) = re.findall(
        r"edited.ipynb In .*; not put into the notebook: .*\nTo see it: .* (host\S* output \S+)$", told, re.M
    )
    assert "kept\n" in laptop.run(*words.split()).stdout, words
    assert "While you were away" not in held(laptop, "--new", "host:work").text


def test_a_jupyter_behind_a_script_of_the_sites_is_recorded(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    """It names no Python; that of the process does."""
    front = directory / "site"
    front.mkdir()
    (front / "jupyter-notebook").write_text('#!/bin/sh\nexec %s "$@"\n' % (VENV_BIN / "jupyter-notebook"))
    (front / "jupyter-notebook").chmod(0o755)
    host = make_host(path=str(front))
    run = held(laptop, "host")
    assert "not kept" not in run.text, run.text
    kernel = new_kernel(run.url())
    compute(run.url(), "print('kept')", kernel)
    wait_for_end(host, kernel)
    assert "kept" in laptop.run("host", "output").stdout


@pytest.mark.shared
def test_a_cell_that_ended_into_a_dead_link_is_told_of(laptop: Laptop, host: Host, run: Run) -> None:
    """The page answers no ping; Jupyter's own patience is 90 s, and it would send into the void until then."""
    kernel = new_session(run.url(), "train.ipynb")
    connection = send(run.url(), "print(1)", kernel)  # which hears nothing from now on
    wait_for_end(host, kernel)
    assert journal(host, kernel)[-1]["connections"] == 1
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["connections"] == 0, "the page is gone", 30)
    wait_until(lambda: list(host.home.glob(".local/state/rjupyter/servers/*/cells/%s*.away" % kernel)), "it is known")
    connection.close()
    assert "While you were away: train.ipynb In [" in held(laptop, "host", "--local-port", str(quiet_port())).text


def test_a_server_on_a_socket_is_recorded(laptop: Laptop, host: Host) -> None:
    """Its kernels have sockets as well, not ports."""
    run = held(laptop, "--socket", "host")
    kernel = str(api(run.url(), "kernels", "POST", {})["id"])
    compute(run.url(), "print('through')", kernel)
    wait_for_end(host, kernel)
    assert "through" in laptop.run("host", "output").stdout


# An agent whose clock is another, as on a host that is not set: it alone tells us the time.
OTHER_CLOCK = """#!/bin/sh
test "$2" = -c || exec /usr/bin/python3 "$@"
code=$3; shift 3
exec /usr/bin/python3 -IS -c "import time; now = time.time; time.time = lambda: now() + %d
$code" "$@"
"""


@pytest.mark.parametrize("ahead_s", [7200, -7200, 0])
def test_since_is_by_the_clock_here(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, ahead_s: int
) -> None:
    python = directory / "front/python3"
    python.parent.mkdir()
    python.write_text(OTHER_CLOCK % ahead_s)
    python.chmod(0o755)
    host = make_host(front=str(python.parent))
    there = time.time() + ahead_s
    kept = host.home / ".local/state/rjupyter/servers/ab12"
    (kept / "cells").mkdir(parents=True)
    facts = {"node": "node", "pid": 2**22 + 1, "app": "notebook", "runtime_dir": "", "local_port": 8889}
    rjupyter.write_down(rjupyter.ServerRecord(created=there - 9000, **facts), str(kept))
    lines: List[Dict[str, Any]] = []
    for count, age_s in ((1, 2400), (2, 60)):
        code = "%d" % count
        lines.append({"kind": "begun", "id": code, "time": there - age_s - 1, "code": code, "count": count})
        lines.append({"kind": "finished", "id": code, "time": there - age_s, "is_done": True})
    (kept / "cells/0123abcd.journal").write_bytes(b"".join(map(rjupyter.line_of, lines)))
    shown = laptop.run("host", "output", "--since", "30m").stdout
    began = time.strftime("%H:%M", time.localtime(time.time() - 61))
    assert "In [1]" not in shown and "In [2]" in shown, shown
    assert began in shown or time.strftime("%H:%M", time.localtime(time.time() - 62)) in shown, shown


# -- --save -----------------------------------------------------------------------------------------------------------


def cells_of(host: Host, name: str) -> List[Dict[str, Any]]:
    """Return the cells of a notebook there; a source is one text, as a file need not have it."""
    cells = json.loads((host.home / name).read_text())["cells"]
    return [dict(cell, source="".join(cell["source"])) for cell in cells]


def texts(cell: Dict[str, Any]) -> List[str]:
    return ["".join(output.get("text", "")) or output["output_type"] for output in cell["outputs"]]


@pytest.mark.shared
def test_outputs_are_saved_into_the_cells_that_still_have_the_code(laptop: Laptop, host: Host, run: Run) -> None:
    equal = "n = globals().get('n', 0) + 1; print('run', n)"
    sources = [equal, "1 + 1", "%xmode Minimal\n1 / 0", equal, "'never run'", "'edited since'"]
    write_notebook(host.home / "saved.ipynb", *sources)
    kernel = new_session(run.url(), "saved.ipynb")
    for count, source in enumerate([*sources[:4], "'edited'"], 1):
        compute(run.url(), source, kernel)
        wait_for_end(host, kernel, count)
    before = cells_of(host, "saved.ipynb")
    saved = laptop.run("host", "output", "saved.ipynb", "--save")
    assert "Saved the outputs of 4 cells into saved.ipynb." in saved.stderr, saved.text
    after = cells_of(host, "saved.ipynb")
    assert [texts(cell) for cell in after[:2]] == [["run 1\n"], ["execute_result"]]
    assert texts(after[2])[-1] == "error"
    assert texts(after[3]) == ["run 2\n"]
    assert after[4:] == before[4:]
    assert laptop.run("host", "eval", "-k", "saved.ipynb", equal).stdout == "run 3\n"  # which is of no cell
    again = laptop.run("host", "output", "saved.ipynb", "--save")
    assert (again.status, "saved.ipynb has all of these outputs already." in again.stderr) == (0, True), again.text
    write_notebook(host.home / "saved.ipynb", "'all edited'")
    check_failure(laptop.run("host", "output", "saved.ipynb", "--save"), 1, "nothing was saved into saved.ipynb")


@pytest.mark.shared
def test_nothing_is_saved_under_an_open_page(laptop: Laptop, host: Host, run: Run) -> None:
    write_notebook(host.home / "open.ipynb", "print(1)")
    kernel = new_session(run.url(), "open.ipynb")
    before = (host.home / "open.ipynb").read_text()
    connection = send(run.url(), "print(1)", kernel)
    wait_for_end(host, kernel)
    check_failure(laptop.run("host", "output", kernel[:8], "--save"), 1, "open.ipynb is open", "close its page")
    assert (host.home / "open.ipynb").read_text() == before
    connection.close()


@pytest.mark.shared
def test_nothing_is_saved_into_a_notebook_that_is_gone(laptop: Laptop, host: Host, run: Run) -> None:
    write_notebook(host.home / "gone.ipynb")
    kernel = new_session(run.url(), "gone.ipynb")
    compute(run.url(), "print(1)", kernel)
    wait_for_end(host, kernel)
    (host.home / "gone.ipynb").unlink()
    said = laptop.run("host", "output", kernel[:8], "--save")
    check_failure(said, 1, "cannot read the notebook", "it is no longer there")
