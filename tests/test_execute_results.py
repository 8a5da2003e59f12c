"""What comes back of an execution, and where to: whole, once, and over nothing that somebody wants to keep."""

import contextlib
import json
import os
import re
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from browser import chromium, wait_for_output, wait_for_page
from client import api, check_failure, held
from execution import (
    cells_of,
    code,
    mount,
    mounted,
    notebook_of,
    printed,
    results,
    run_dirs,
    start_waiting,
    stream,
    text,
    the_run,
    waiting_for,
    without_root_rights,
    write_notebook,
    written_anywhere,
)
from jupyters import jupyter_for_everyone, jupyter_with_pairs, nbclient_alone
from sides import Host, Laptop, User

import rjupyter

# -- G1: a journal on a full disk -------------------------------------------------------------------------------------

pytestmark = pytest.mark.nbclient

# Fill the disk but for 300 kB; the kernel's end makes room again.
FILL = """
import atexit, os
def clear():
    os.remove('fill')
with open('fill', 'wb', 0) as fill:
    atexit.register(clear)
    try:
        while True: fill.write(b'x' * 65536)
    except OSError: pass
    while True:
        try: fill.write(b'x' * 4096)
        except OSError: break
    os.truncate('fill', os.stat('fill').st_size - 300000)
"""
SAYS_1_MB = {
    "display": "from IPython.display import display\ndisplay({'text/html': 'y' * 1000000}, raw=True)",  # by IPython
    "print": "print('y' * 1000000)",
    "error": "raise ValueError('y' * 1000000)",
}


@pytest.mark.parametrize("kind", list(SAYS_1_MB))
def test_disk_that_is_full_for_a_moment(
    laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host], kind: str
) -> None:
    """A line of the journal is whole or not there: what is whole in it can be had, now and later. (G1)

    The run may go on or end; if what was shown is not in the result, the disk is named as the cause.
    """
    user = make_user("/bin/bash")
    with mounted(user.home, "-t", "tmpfs", "-o", "size=12m,mode=755,uid=%d" % user.uid, "tmpfs"):
        user.write(".profile", "PATH=%s:$PATH\n" % (jupyter_for_everyone() if kind == "display" else nbclient_alone()))
        host = make_host(user=user)
        write_notebook(laptop.home / "a.ipynb", "print('before')", FILL + SAYS_1_MB[kind], "print('after')")
        run = laptop.run("host", "execute", "a.ipynb")
        result = laptop.home / "a.executed.ipynb"
        assert run.status in (0, 1, 5), run.text
        assert printed(result)[0] == "before\n"
        if "y" * 1000000 not in result.read_text():
            assert re.search("No space left|disk is full", run.stderr), run.stderr
            assert run.status != 0
        late = laptop.run("host", "execute", "--attach", the_run(host).name, "-o", "late.ipynb")
        assert late.status == run.status, late.text
        assert printed(laptop.home / "late.ipynb") == printed(result)


def test_bad_line_of_a_journal_costs_that_line(laptop: Laptop, host: Host) -> None:
    """As after a crash of the machine: blocks of zeros, half a line, another's bytes. It is passed over, and said."""
    write_notebook(laptop.home / "a.ipynb", "print('one')", "print('two')", "print('three')")
    assert laptop.run("host", "execute", "a.ipynb").status == 0
    journal = the_run(host) / "journal"
    lines = journal.read_bytes().splitlines()
    assert len(lines) > 4
    bad = next(number for number, line in enumerate(lines) if b"two\\n" in line and number)
    for damage in (b"\0" * 40, b'{"kind": "cell", "ind', b"\xff\xfe[]", b"[7]\n{}\n"):
        lines[bad] = damage
        journal.write_bytes(b"\n".join(lines) + b"\n")
        late = laptop.run("host", "execute", "--attach", the_run(host).name, "-o", "late.ipynb")
        assert late.status in (0, 1), (damage, late.text)
        assert [printed(laptop.home / "late.ipynb")[number] for number in (0, 2)] == ["one\n", "three\n"], damage
        assert re.search(r"\bline|journal|damaged", late.stderr), (damage, late.stderr)
        (laptop.home / "late.ipynb").unlink()


# -- G2: two results of one name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [(":a/report.ipynb", ":b/report.ipynb"), (":a/report.ipynb", "report.ipynb")],
    ids=["there", "here and there"],
)  # fmt: skip
def test_results_that_would_have_one_name(laptop: Laptop, host: Host, names: List[str]) -> None:
    """Two notebooks of one name are refused before anything runs, or their results are kept apart. (G2)"""
    words = []
    for number, name in enumerate(names):
        home = host.home if name.startswith(":") else laptop.home
        write_notebook(home / name.lstrip(":"), "print('this is %d')" % number)
        words.append(["this is %d\n" % number])
    run = laptop.run("host", "execute", *names)
    if run.status == 2:
        check_failure(run, 2, "report.executed.ipynb")
        assert not run_dirs(host) and not list(laptop.home.glob("*.executed.ipynb"))
    else:
        assert run.status == 0, run.text
        assert [printed(path) for path in results(laptop, run)] == words


# -- G3: places that are no plain file --------------------------------------------------------------------------------


def answer_is_notebook(words: str) -> None:
    notebook = json.loads(words)
    assert [cell["outputs"][0]["text"] for cell in notebook["cells"]] == [["1\n"]]


def test_result_on_stdout(laptop: Laptop, host: Host) -> None:
    """`-o -`: the notebook is on stdout, and nothing else, for `| jq`. (G3)"""
    write_notebook(laptop.home / "a.ipynb", "print(1)")
    run = laptop.run("host", "execute", "a.ipynb", "-o", "-")
    assert run.status == 0, run.text
    answer_is_notebook(run.stdout)
    assert not (laptop.home / "-").exists()


def test_result_into_a_device_and_a_fifo(laptop: Laptop, host: Host) -> None:
    """What is not a plain file is written to, not replaced. The device is one of the test's own. (G3)"""
    device, fifo = laptop.home / "null", laptop.home / "fifo"
    write_notebook(laptop.home / "a.ipynb", "print(1)")
    os.mkfifo(fifo)
    got: List[str] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()), daemon=True)
    reader.start()
    run = laptop.run("host", "execute", "a.ipynb", "-o", "fifo")
    assert run.status == 0, run.text
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    reader.join(10)
    answer_is_notebook(got[0])
    if os.getuid() == 0:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        run = laptop.run("host", "execute", "a.ipynb", "-o", "null")
        assert run.status == 0, run.text
        assert stat.S_ISCHR(device.lstat().st_mode)


def test_links_are_written_through(laptop: Laptop, host: Host) -> None:
    """`--inplace` on a symbolic and on a hard link, and -o on a link: the notebook that is meant is written. (G3)"""
    real = write_notebook(laptop.home / "real/a.ipynb", "print(1)")
    (laptop.home / "soft.ipynb").symlink_to("real/a.ipynb")
    assert laptop.run("host", "execute", "--inplace", "soft.ipynb").status == 0
    assert (laptop.home / "soft.ipynb").is_symlink() and printed(real) == ["1\n"]
    other = write_notebook(laptop.home / "b.ipynb", "print(2)")
    os.link(other, laptop.home / "hard.ipynb")
    assert laptop.run("host", "execute", "--inplace", "hard.ipynb").status == 0
    assert other.stat().st_nlink == 2 and printed(other) == ["2\n"]
    (laptop.home / "out.ipynb").symlink_to("real/out.ipynb")
    (laptop.home / "real/out.ipynb").write_text("old")
    assert laptop.run("host", "execute", "b.ipynb", "-o", "out.ipynb").status == 0
    assert (laptop.home / "out.ipynb").is_symlink() and printed(laptop.home / "real/out.ipynb") == ["2\n"]


def test_links_on_the_host_are_written_through(laptop: Laptop, host: Host) -> None:
    """The same for a notebook that is on the host. (G3)"""
    real = write_notebook(host.home / "real/a.ipynb", "print(1)")
    (host.home / "soft.ipynb").symlink_to("real/a.ipynb")
    os.link(real, host.home / "hard.ipynb")
    assert laptop.run("host", "execute", "--inplace", ":soft.ipynb").status == 0
    assert (host.home / "soft.ipynb").is_symlink() and printed(real) == ["1\n"]
    assert printed(host.home / "hard.ipynb") == ["1\n"]


def test_read_only_file_is_an_error_before_the_run(laptop: Laptop, host: Host) -> None:
    """A notebook that may not be written is said to be so before anything runs. (G3)"""
    for name in ("a.ipynb", "b.ipynb"):
        write_notebook(laptop.home / name, "print(1)")
    (laptop.home / "a.ipynb").chmod(0o444)
    without_root_rights(laptop)
    for arguments in (["--inplace", "a.ipynb"], ["b.ipynb", "-o", "a.ipynb"]):
        check_failure(laptop.run("host", "execute", *arguments), 1, "a.ipynb")
    assert host.sshd.logins() == 0


def test_read_only_mount_is_an_error_before_the_run(laptop: Laptop, host: Host) -> None:
    """As in a container, where a single file may be mounted read-only: root cannot write it either. (G3)"""
    place = write_notebook(laptop.home / "a.ipynb", "print(1)")
    with mounted(place, "--bind", place):
        mount("-o", "remount,ro,bind", place)
        check_failure(laptop.run("host", "execute", "--inplace", "a.ipynb"), 1, "a.ipynb")
    assert host.sshd.logins() == 0


# -- G4: edited meanwhile ---------------------------------------------------------------------------------------------


def edit(path: Path) -> str:
    notebook = notebook_of(path)
    notebook["cells"].append(text("an edit", id="edit"))
    path.write_text(json.dumps(notebook))
    return path.read_text()


def test_notebook_that_is_edited_here_while_it_runs(laptop: Laptop, host: Host) -> None:
    """The edit stays; the result is written beside, under a name that stdout tells and stderr explains. (G4)"""
    run, _ = start_waiting(laptop, "--inplace")
    edited = edit(laptop.home / "w.ipynb")
    (host.home / "go").touch()
    assert run.wait() in (0, 1), run.text
    assert (laptop.home / "w.ipynb").read_text() == edited
    (result,) = results(laptop, run)
    assert printed(result) == ["", "waits\nwent\n", "1\n"]
    assert re.search(r"w\.ipynb .*(changed|edited)|(changed|edited) .*w\.ipynb", run.stderr), run.stderr


def test_notebook_that_is_edited_there_while_it_runs(laptop: Laptop, host: Host) -> None:
    """The same on the host: it is where notebooks are open in a browser. (G4)"""
    there = write_notebook(host.home / "w.ipynb", "x = 1", waiting_for(), "print(x)")
    run, _ = start_waiting(laptop, "--inplace", notebook=":w.ipynb", is_written=False)
    edited = edit(there)
    (host.home / "go").touch()
    assert run.wait() in (0, 1), run.text
    assert there.read_text() == edited
    found = written_anywhere(host.home, laptop.home, words="went", beside=there)
    assert any(path.name in run.text for path in found), run.text


def test_notebook_that_is_touched_while_it_runs(laptop: Laptop, host: Host) -> None:
    """What counts is what it says: a new time of its own (git, rsync, a save without a change) is no edit. (G4)"""
    run, _ = start_waiting(laptop, "--inplace")
    os.utime(laptop.home / "w.ipynb", (1, 1))
    (host.home / "go").touch()
    assert (run.wait(), run.stdout) == (0, "w.ipynb\n"), run.text
    assert printed(laptop.home / "w.ipynb")[2] == "1\n"


# -- what the page shows ----------------------------------------------------------------------------------------------

HTML = "from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'))"
SKIPPED = dict(
    code("", "skip-execution"),
    source="1",
    outputs=[{"output_type": "display_data", "data": {"text/html": "<script>1</script>"}, "metadata": {}}],
)


STREAMS: Dict[str, Any] = {  # what came, of which stream and with which text; and what of it is one output
    "of one": ([("stdout", "a"), ("stdout", "b\n"), ("stdout", "c")], [("stdout", "ab\nc")]),
    "in lists": ([("stdout", ["a"]), ("stdout", ["b\n", "c"])], [("stdout", ["ab\n", "c"])]),
    "by turns": ([("stdout", "a"), ("stderr", "b"), ("stdout", "c")],) * 2,
    "around a display": ([("stdout", "a"), (None, "b"), (None, "b"), ("stdout", "c")],) * 2,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_what_follows_in_one_stream_is_one_output(kind: str) -> None:
    came, wanted = [
        [{"name": name, "text": text} if name else {"data": {"text/plain": text}} for name, text in outputs]
        for outputs in STREAMS[kind]
    ]
    assert rjupyter.merged(came) == wanted


def test_what_is_flushed_bit_by_bit_is_one_output_as_in_a_page(laptop: Laptop, host: Host) -> None:
    """What goes to stderr in between stays in its place."""
    source = "import sys\nfor end in ('', '\\n', '\\n'): print('out', end=end, flush=True)\n"
    write_notebook(laptop.home / "a.ipynb", source + "print('aside', file=sys.stderr, flush=True)\nprint('last')")
    run = laptop.run("host", "execute", "a.ipynb")
    assert run.status == 0, run.text
    (cell,) = cells_of(laptop.home / "a.executed.ipynb")
    wanted = [("stdout", ["outout\n", "out\n"]), ("stderr", ["aside\n"]), ("stdout", ["last\n"])]
    assert [(output["name"], output["text"]) for output in cell["outputs"]] == wanted


@pytest.mark.jupyter
def test_a_notebook_that_was_executed_there_opens_trusted(laptop: Laptop, host: Host) -> None:
    """As one that ran in the page; what did not run is trusted as far as it was before."""
    cells: Dict[str, List[Any]] = {"ran": [HTML, "1 / 0"], "mixed": [HTML, SKIPPED], "known": [SKIPPED, HTML]}
    for name, each in cells.items():
        write_notebook(host.home / (name + ".ipynb"), *each)
    assert host.sshd.ssh("jupyter trust %s/known.ipynb" % host.home).returncode == 0
    for name in cells:
        run = laptop.run("host", "execute", ":%s.ipynb" % name, "--inplace", "--allow-errors")
        assert run.status == 0, run.text
    url = held(laptop, "host").url()
    found = {name: api(url, "contents/%s.ipynb?content=1" % name)["content"]["cells"] for name in cells}
    trusted = {name: [cell["metadata"]["trusted"] for cell in each] for name, each in found.items()}
    assert trusted == {"ran": [True, True], "mixed": [False, False], "known": [True, True]}


@pytest.mark.jupyter
def test_a_notebook_that_is_held_elsewhere_is_executed_as_the_page_shows_it(
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """By jupytext, in a text file; by jupyter-collaboration, in the server. Or it is refused before it runs."""
    host = make_host(path=str(jupyter_with_pairs()))
    (host.home / "jupytext.toml").write_text('formats = "ipynb,py:percent"\n')
    (host.home / "sub").mkdir()
    pair, text = host.home / "sub/pair.ipynb", host.home / "sub/pair.py"
    run = held(laptop, "host")

    def write(source: str) -> None:
        if not text.exists() or source not in text.read_text():
            text.write_text('# %%%% tags=["parameters"]\nx = 0\n\n# %%%%\n%s\n' % source)

    def shows_two(driver: Any) -> bool:
        write("print('two', x)")  # once more where the server saves what it read before, as it does a second later
        return "print('two'" in driver.find_element("css selector", "body").text

    def execute_both(source: str) -> None:
        away = laptop.run("host", "execute", ":sub/pair.ipynb", "-p", "x=1", "-o", "away.ipynb", "--force")
        assert away.status == 0 and printed(laptop.home / "away.ipynb")[-1] == source[7:10] + " 1\n", away.text
        done = laptop.run("host", "execute", ":sub/pair.ipynb", "-p", "x=2", "--inplace")
        assert done.status == 0 and printed(pair)[-1] == source[7:10] + " 2\n", done.text
        assert source in text.read_text() and "x = 2" in text.read_text()

    with chromium(laptop) as driver:
        write_notebook(pair, code("x = 0", "parameters"), "print('zero', x)")
        write("print('one', x)")
        execute_both("print('one', x)")
        driver.get(run.url().replace("/tree", "/notebooks/sub/pair.ipynb"))
        wait_for_output(driver, "one 2")
        wait_for_page(driver, shows_two)
        execute_both("print('two', x)")
        wait_for_output(driver, "two 2")
    write_notebook(pair, "print('three')")
    os.utime(text, (1, 1))
    before = pair.read_text()
    check_failure(laptop.run("host", "execute", ":sub/pair.ipynb", "--inplace"), 1, "cannot be executed", "more recent")
    assert pair.read_text() == before


# -- G12: what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.nbclient
def test_metadata_of_megabytes_stays(laptop: Laptop, host: Host) -> None:
    """3 MB of it, many small parts among it, as widgets leave them; `make bench` measures what that costs. (G12)"""
    model = {"model_name": "HTMLModel", "model_module": "x", "model_module_version": "1", "state": {"value": "x" * 500}}
    states = {"%032x" % number: model for number in range(4500)}
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": states, "version_major": 2, "version_minor": 0}}
    metadata: Dict[str, Any] = {"widgets": widgets, "mine": [[number, "x"] for number in range(90000)]}
    write_notebook(laptop.home / "a.ipynb", *["print(%d)" % number for number in range(20)], **metadata)
    run = laptop.start("host", "execute", "a.ipynb", has_terminal=False)
    assert run.wait(200) == 0, run.text
    result = notebook_of(laptop.home / "a.executed.ipynb")["metadata"]
    assert result["mine"] == metadata["mine"]
    assert result["widgets"]["application/vnd.jupyter.widget-state+json"]["state"] == states


def test_cost_of_a_cell_grows_with_its_outputs() -> None:
    """20,000 outputs of one cell, such as an hour of a progress bar sends, are taken in seconds and not in minutes."""
    messages = rjupyter.Messages(quiet=True)
    agent = rjupyter.Agent(rjupyter.Ssh("host", [], False, messages, False), messages)
    execution = rjupyter.Execution(rjupyter.Task("a.ipynb", rjupyter.Request(), "-"), "r1234", agent)
    printed = {"kind": "printed", "id": "0", "type": "stream", "content": {"name": "stderr", "text": "\r 10% of it"}}
    ended = {"kind": "finished", "id": "0", "time": 2, "is_done": True}
    begun = {"kind": "begun", "id": "0", "time": 1, "index": 0, "cell": 1, "cells": 1}
    lines = "".join(json.dumps(entry) + "\n" for entry in [begun, *[printed] * 20000, ended]).encode()
    since = time.monotonic()
    for at in range(0, len(lines), rjupyter.PART_BYTES):
        data = rjupyter.packed(lines[at : at + rjupyter.PART_BYTES])
        execution.take_part(rjupyter.Told(file="journal", data=data), lambda words: None)
    assert execution.offset == len(lines) and execution.seconds == 1
    assert time.monotonic() - since < 60


# -- G13: where it runs -----------------------------------------------------------------------------------------------


def test_notebook_on_the_host_runs_in_its_own_directory(laptop: Laptop, host: Host) -> None:
    """As nbconvert and jupyter execute have it: what lies beside the notebook is found. (G13)"""
    forms = [":sub/{0}.ipynb", ":{work}/sub/{0}.ipynb", ":../work/sub/{0}.ipynb", ":~/work/sub/{0}.ipynb"]
    (host.home / "work/sub").mkdir(parents=True)
    (host.home / "work/sub/beside.txt").write_text("here")
    names = []
    for number, form in enumerate(forms):
        write_notebook(host.home / ("work/sub/rel%d.ipynb" % number), "print(open('beside.txt').read())")
        names.append(form.format("rel%d" % number, work=host.home / "work"))
    run = laptop.run("host:work", "execute", "-j", "2", *names)
    assert run.status == 0, run.text
    for number, name in enumerate(names):
        assert printed(laptop.home / ("rel%d.executed.ipynb" % number)) == ["here\n"], name


# -- G16: --inplace on the host, and its place is gone ----------------------------------------------------------------


def move(work: Path) -> None:
    work.rename(work.with_name("moved"))


def make_read_only(work: Path) -> None:
    mount("-o", "remount,ro,bind", work)


@pytest.mark.parametrize("change", [move, shutil.rmtree, make_read_only])
def test_place_on_the_host_that_is_gone_when_the_run_ends(
    laptop: Laptop, host: Host, change: Callable[[Path], None]
) -> None:
    """The result is kept and said to be where it is; nothing else is left behind; status 1. (G16)"""
    work, go = host.home / "work", host.home / "go"
    write_notebook(work / "w.ipynb", "x = 1", waiting_for(go), "print(x)")
    with mounted(work, "--bind", work) if change is make_read_only else contextlib.nullcontext():
        names = {"destination": "host:work", "notebook": ":w.ipynb"}
        run, identity = start_waiting(laptop, "--inplace", is_written=False, **names)
        change(work)
        go.touch()
        assert run.wait() == 1, run.text
        assert "Traceback" not in run.text
        found = written_anywhere(host.home, laptop.home, words="went")
        is_named = [path for path in found if path.name in run.text]
        again = laptop.run("host", "execute", "--attach", identity, "-o", "late.ipynb")
        assert is_named or "--attach %s" % identity in run.stderr, run.text
        assert printed(laptop.home / "late.ipynb") == ["", "waits\nwent\n", "1\n"], again.text
        assert "is in the notebook there" not in run.text
        assert not list(host.home.rglob(".w.ipynb*"))


# -- G17, G22: old outputs --------------------------------------------------------------------------------------------

OLD = {"outputs": [stream("of last year\n")], "execution_count": 7}


@pytest.mark.parametrize("end", ["fails", "is stopped", "is killed"])
def test_outputs_of_last_year_are_not_in_the_result(laptop: Laptop, host: Host, end: str) -> None:
    """Behind the cell that was the last one nothing stands that this run has not printed. (G17)"""
    second = "1 / 0" if end == "fails" else waiting_for()
    write_notebook(laptop.home / "a.ipynb", code("print('new')", **OLD), code(second, **OLD), code("print(3)", **OLD))
    run = laptop.start("host", "execute", "-v", "a.ipynb", has_terminal=False)
    if end != "fails":
        run.expect("^waits$")
        identity = run.expect(r"\((r[0-9a-f]{4})\)").group(1)
        if end == "is stopped":
            assert laptop.run("host", "stop", identity).status == 0
        else:
            os.killpg(json.loads((the_run(host) / "run.json").read_text())["pid"], 9)
    assert run.wait() in (1, 5), run.text
    result = laptop.home / "a.executed.ipynb"
    assert "of last year" not in result.read_text()
    assert printed(result)[0] == "new\n"
    assert (cells_of(result)[2]["outputs"], cells_of(result)[2]["execution_count"]) == ([], None)


def test_old_outputs_do_not_travel(laptop: Laptop, host: Host) -> None:
    """12 MB of old outputs are not kept on the host, so they were not sent there, and do not come back. (G22)"""
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "x" * 6000000}}
    old = {"outputs": [stream("y" * 6000000), picture], "execution_count": 1}
    for name, home in (("here", laptop.home), ("there", host.home)):
        write_notebook(home / (name + ".ipynb"), code("print('new')", **old), code("1 / 0"), code("print(3)", **old))
    run = laptop.run("host", "execute", "-j", "2", "here.ipynb", ":there.ipynb")
    assert run.status == 5, run.text
    for name in ("here", "there"):
        assert (laptop.home / (name + ".executed.ipynb")).stat().st_size < 100000
    for directory in run_dirs(host):
        assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) < 2000000


# -- G21: a lone surrogate --------------------------------------------------------------------------------------------

HALF = "half an emoji: \ud83d."


@pytest.mark.jupyter
def test_lone_surrogate_is_written(laptop: Laptop, host: Host) -> None:
    r"""JSON can say "\ud83d", and notebooks do: it is written again as it came. (G21)

    Python's kernel cannot be sent it, so the cell that has it fails (5); that is in a result which is written, too.
    The output is one of a cell tagged skip-execution, which keeps what it has, as nbconvert does it.
    """
    skipped = code("x", "skip-execution", outputs=[stream(HALF)])
    write_notebook(laptop.home / "whole.ipynb", text(HALF + "text"), "print(1)", skipped, title=HALF + "title")
    write_notebook(laptop.home / "source.ipynb", text("x"), "print(1)", "x = 1  # " + HALF)
    there = write_notebook(host.home / "there.ipynb", text(HALF), "print(1)")
    run = laptop.run("host", "execute", "-j", "2", "whole.ipynb", "source.ipynb")
    assert run.status == 5 and "failed in source.ipynb" in run.stderr and "failed in whole" not in run.stderr, run.text
    run = laptop.run("host", "execute", ":there.ipynb", "--inplace")
    assert run.status == 0, run.text
    results = {name: laptop.home / (name + ".executed.ipynb") for name in ("whole", "source")}
    for name, result in dict(results, there=there).items():
        assert printed(result)[0] == "1\n", name
        written = notebook_of(result)
        parts = {"whole": [HALF + "text", HALF + "title"], "source": ["x = 1  # " + HALF], "there": [HALF]}[name]
        words = json.dumps(written, ensure_ascii=False)
        assert [part for part in parts if part not in words] == [], name
    assert HALF in json.dumps(cells_of(results["whole"])[1]["outputs"], ensure_ascii=False)


# -- G22: names -------------------------------------------------------------------------------------------------------


def test_output_that_is_a_directory(laptop: Laptop, host: Host) -> None:
    """Refused before the run, or taken as `cp` does: into it, under the usual name. (G22)"""
    (laptop.home / "out").mkdir()
    write_notebook(laptop.home / "a.ipynb", "print(1)")
    for name in ("nowhere/", "out", "out/", "."):
        logins = host.sshd.logins()
        run = laptop.run("host", "execute", "a.ipynb", "-o", name)
        if run.status == 0 and name != "nowhere/":
            (result,) = results(laptop, run)
            assert result.resolve() == (laptop.home / name / "a.executed.ipynb").resolve()
            assert printed(result) == ["1\n"], name
            result.unlink()
        else:
            assert run.status in (1, 2), run.text
            check_failure(run, run.status, name.rstrip("/"))
            assert host.sshd.logins() == logins, name


def test_name_that_begins_with_no_letter(laptop: Laptop, host: Host) -> None:
    """Where it was made a copy of, say: --attach writes its result under its name, without -o."""
    write_notebook(laptop.home / "(copy) a.ipynb", "print(1)")
    assert laptop.run("host", "execute", "(copy) a.ipynb", "-o", "x.ipynb").status == 0
    run = laptop.run("host", "execute", "--attach", the_run(host).name)
    assert (run.status, run.stdout) == (0, "(copy) a.executed.ipynb\n"), run.text
    assert printed(laptop.home / "(copy) a.executed.ipynb") == ["1\n"]


def test_notebook_without_its_suffix(laptop: Laptop, host: Host) -> None:
    """`execute train` takes train.ipynb, as `jupyter execute` does; a file that is called so comes first. (G22)"""
    write_notebook(laptop.home / "train.ipynb", "print('here')")
    write_notebook(host.home / "sub/far.ipynb", "print('there')")
    run = laptop.run("host", "execute", "train", ":sub/far")
    assert (run.status, run.stdout) == (0, "train.executed.ipynb\nfar.executed.ipynb\n"), run.text
    assert printed(laptop.home / "train.executed.ipynb") == ["here\n"]
    assert printed(laptop.home / "far.executed.ipynb") == ["there\n"]
    write_notebook(laptop.home / "train", "print('the plain one')")
    run = laptop.run("host", "execute", "train", "-o", "x.ipynb")
    assert printed(laptop.home / "x.ipynb") == ["the plain one\n"]
    check_failure(laptop.run("host", "execute", "neither"), 1, "cannot read neither")
