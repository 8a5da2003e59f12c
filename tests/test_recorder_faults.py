"""What cells print is kept whatever becomes of the page, the link, us, the disk; and a reopened page shows it."""

import contextlib
import json
import os
import re
import signal
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytest
from browser import chromium, run_first_cell, shown_in, wait_for_page
from client import api, check_failure, compute, held, new_session, send
from execution import add_bash, add_r, mounted
from jupyters import jupyter_with_pairs
from notebooks import write_notebook
from sides import VENV_BIN, Host, Laptop, Run, command_of, process_of, quiet_port, ssh_of, wait_until

import rjupyter

pytestmark = pytest.mark.jupyter

LINES = 40
CODE = """import os, time
for i in range(%d):
    print("line", i, flush=True)
    while i == 9 and not os.path.exists("gate"):
        time.sleep(.05)
print("the end")""" % LINES  # fmt: skip


def kinds(host: Host, kernel: str = "*") -> List[str]:
    """Return the kinds of what is written down, of a kernel or of all."""
    files = host.home.glob(".local/state/rjupyter/servers/*/cells/%s.journal" % kernel)
    return [json.loads(line)["kind"] for file in files for line in file.read_text().splitlines()]


def has_all(text: str) -> bool:
    return re.findall(r"^line (\d+)$", text, re.MULTILINE) == [str(i) for i in range(LINES)] and "the end" in text


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jupyter", "names"),
    [(lambda: VENV_BIN, ["closed", "reloaded"]), (jupyter_with_pairs, ["closed"])],
    ids=["plain", "collaboration"],
)
def test_page_that_went_in_the_middle_of_a_cell(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path, jupyter: Callable[[], Path], names: List[str]
) -> None:
    """Who comes back finds what it printed in the page; also where the server itself holds what a page shows."""
    host = make_host(path=str(jupyter()))
    for name in names:
        write_notebook(host.home / (name + ".ipynb"), CODE)
    run = held(laptop, "host:closed.ipynb")
    pages = {name: run.url().replace("closed.ipynb", name + ".ipynb") for name in names}
    with chromium(laptop) as driver:
        for name in names:
            driver.switch_to.new_window("tab")
            run_first_cell(driver, pages[name], "line 9")
        paths = [name + ".ipynb" for name in names]  # a page gives its session the notebook's path a moment later
        wait_until(lambda: sorted(each["path"] for each in api(run.url(), "sessions")) == paths, "sessions have names")
        if "reloaded" in names:
            driver.refresh()
    wait_until(lambda: not any(each["connections"] for each in api(run.url(), "kernels")), "the pages are gone")
    (host.home / "gate").write_text("")
    wait_until(lambda: kinds(host).count("finished") == len(names), "the cells have ended", 60)
    told = held(laptop, "host", "--local-port", str(quiet_port())).text
    for name in pages:
        assert has_all(laptop.run("host", "output", name + ".ipynb").stdout), name
        wanted = (
            r"While you were away: %s\.ipynb In \[1\] done after \d+ s \(41 lines\); it is in the notebook\." % name
        )
        assert re.search(wanted, told), told
    with chromium(laptop) as driver:
        for name, url in pages.items():
            driver.get(url)
            wait_for_page(driver, lambda _: has_all(shown_in(driver)))
            driver.save_screenshot(str(tmp_path / (name + ".png")))


SAVES_BY_ITSELF = """
import os
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
class Manager(AsyncLargeFileManager):
    async def get(self, path, content=True, **more):
        model = await super().get(path, content, **more)
        if content and path.strip("/") == "train.ipynb" and not os.path.exists("saved"):
            open("saved", "w").close()
            os.utime(self._get_os_path(path))
        return model
c.ServerApp.contents_manager_class = Manager
"""


def test_a_notebook_that_the_server_itself_saves_meanwhile_is_looked_at_again(laptop: Laptop, host: Host) -> None:
    """As one that collaborates does, a moment after the last page has gone."""
    (host.home / ".jupyter").mkdir()
    (host.home / ".jupyter/jupyter_server_config.py").write_text(SAVES_BY_ITSELF)
    write_notebook(host.home / "train.ipynb", "print('kept')")
    run = held(laptop, "host")
    compute(run.url(), "print('kept')", new_session(run.url(), "train.ipynb"))
    wait_until(lambda: "finished" in kinds(host), "it is written down")
    saved = laptop.run("host", "output", "--save")
    assert "Saved the outputs of 1 cell into train.ipynb." in saved.stderr, saved.text
    assert (host.home / "saved").exists()


# -- the link, and us -------------------------------------------------------------------------------------------------


def freeze_ssh(run: Run, mark: str) -> Callable[[], None]:
    ssh = ssh_of(mark)
    os.kill(ssh, signal.SIGSTOP)
    return lambda: os.kill(ssh, signal.SIGCONT)


def kill_us(run: Run, mark: str) -> Callable[[], None]:
    os.kill(run.pid, signal.SIGKILL)
    return lambda: None


def test_link_that_died_in_the_middle_of_a_cell(laptop: Laptop, host: Host, mark: str) -> None:
    port = 0
    for fault in (freeze_ssh, kill_us):
        name = fault.__name__
        run = held(laptop, "host")
        kernel = new_session(run.url(), name + ".ipynb")
        port = port or host.servers()[0]["port"]
        there = re.sub(r":\d+/", ":%d/" % port, run.url())  # past the tunnel
        gate = host.home / (name + ".gate")
        page = send(run.url(), CODE.replace('"gate")', repr(str(gate)) + ")"), kernel)
        wait_until_printed(host, kernel)
        mend = fault(run, mark)
        try:
            wait_until_gone(there, kernel)
            gate.write_text("")
            wait_until_ended(host, kernel)
        finally:
            mend()
        page.close()
        shown = laptop.run("host", "output", name + ".ipynb")
        assert has_all(shown.stdout), shown.text
        again = held(laptop, "host", "--local-port", str(quiet_port()), "--no-mux")
        assert "While you were away: %s.ipynb" % name in again.text, again.text
        laptop.end_runs()


def wait_until_printed(host: Host, kernel: str) -> None:
    wait_until(lambda: "printed" in kinds(host, kernel), "it prints")


def wait_until_ended(host: Host, kernel: str, count: int = 1) -> None:
    wait_until(lambda: kinds(host, kernel).count("finished") == count, "the cell has ended")


def wait_until_gone(url: str, kernel: str) -> None:
    wait_until(lambda: api(url, "kernels/" + kernel)["connections"] == 0, "Jupyter knows it", 40)


# -- the host ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_gap_and_the_kernel_goes_on(laptop: Laptop, host: Host) -> None:
    state = host.home / ".local/state/rjupyter"
    state.mkdir(parents=True)
    state.chmod(0o700)
    with mounted(state, "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs"):
        run = held(laptop, "host")
        kernel = new_session(run.url())
        assert compute(run.url(), "print('before')", kernel) == "before\n"
        wait_until(lambda: kinds(host).count("finished") == 1, "it is written down")
        fill(state / "filler")
        assert compute(run.url(), "print('x' * 30000)\nprint('lost')", kernel).endswith("lost\n")
        (state / "filler").unlink()
        assert compute(run.url(), "print('after')", kernel) == "after\n"
        wait_until(lambda: "after" in laptop.run("host", "output").stdout, "it goes on")
        shown = laptop.run("host", "output").stdout
        assert re.search(r"before\n(.|\n)*\[No space left on device\](.|\n)*after\n", shown), shown
        waits = "import os, time\nwhile not os.path.exists(%r): time.sleep(.05)\n" % str(host.home / "gate")
        dots = "for _ in range(60): print('.', end='', flush=True)"  # until there is no room for the shortest line
        asked = laptop.start("host", "eval", waits + dots, has_terminal=False)
        wait_until(lambda: kinds(host).count("begun") == 4, "it runs")
        fill(state / "filler")
        (host.home / "gate").write_text("")
        wait_until(lambda: api(run.url(), "kernels/" + kernel)["execution_state"] == "idle", "it has ended")
        assert laptop.run("host", "wait", "--timeout", "30").status == 0  # that is known without what is written down
        (state / "filler").unlink()
        assert asked.wait() == 0, asked.text  # how it ended is written down all the same
        laptop.run("host", "stop")
        run.wait(20)


def fill(path: Path) -> None:
    """Write until there is no room for a byte more."""
    with open(path, "wb", buffering=0) as stream:
        for size in (65536, 4096, 512, 1):
            try:
                while stream.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


AFAR = {"bash": "echo from afar", "ir": "cat('from afar\\n')"}
FAILS = {
    "bash": "while ! test -e '%s'; do sleep .05; done; false",
    "ir": "while (!file.exists('%s')) Sys.sleep(.05)\nstop('no')",
}


@pytest.mark.parametrize("add", [add_bash, add_r])
def test_a_kernel_in_another_language(laptop: Laptop, host: Host, add: Callable[[Path], Dict[str, str]]) -> None:
    """Its cells are recorded; and code that is behind one that fails is told that it was not run."""
    name = add(host.home)["name"]
    run = held(laptop, "host")
    kernel = new_session(run.url(), name=name)
    compute(run.url(), AFAR[name], kernel)
    wait_until_ended(host, kernel)
    assert "from afar\n" in laptop.run("host", "output").stdout
    assert laptop.run("host", "eval", "# first").status == 0  # what is sent next needs no connection to be made before
    gate = host.home / "gate"
    page = send(run.url(), FAILS[name] % gate, kernel)
    asked = laptop.start("host", "eval", "1", has_terminal=False)
    wait_until_sent(host, 2)
    gate.write_text("")
    asked.wait()
    check_failure(asked, 1, "it was not run: a cell before it failed")
    page.close()
    laptop.run("host", "stop", "--yes")  # R's kernel does not look whether its server is there
    run.wait(20)


def wait_until_sent(host: Host, count: int = 1) -> None:
    """Wait until code of ours has come into a kernel's queue, so many times."""
    asked = ".local/state/rjupyter/servers/*/cells/*.asked"
    wait_until(lambda: len(list(host.home.glob(asked))) >= count, "the kernel was asked")


def leave_connection_files(host: Host, count: int) -> None:
    """Put there what kernels leave that nobody could end: their files, with ports at which nobody listens any more."""
    runtime = host.home / ".local/share/jupyter/runtime"
    runtime.mkdir(parents=True, exist_ok=True)
    ports = {name + "_port": 1 for name in ("shell", "iopub", "stdin", "control", "hb")}
    facts = dict(ports, transport="tcp", ip="127.0.0.1", key="k", signature_scheme="hmac-sha256")
    for _ in range(count):
        (runtime / ("kernel-%s.json" % uuid.uuid4())).write_text(json.dumps(facts))


def test_files_that_other_kernels_left_cost_nothing(laptop: Laptop, host: Host) -> None:
    """With three sockets for each, 342 such files were the end of the recorder; what is its own is recorded whole.

    Some are there before it starts, and as many again come while it works.
    """
    leave_connection_files(host, 600)
    run = held(laptop, "host")
    pid = recorder_pid(host)
    assert compute(run.url(), "print('first')") == "first\n"
    wait_until(lambda: kinds(host).count("finished") == 1, "it is written down")
    leave_connection_files(host, 600)
    kernel = str(api(run.url(), "kernels", "POST", {})["id"])  # of no notebook, and used as soon as it is there
    most = 0

    def has_ended() -> bool:
        nonlocal most
        most = max(most, len(os.listdir("/proc/%d/fd" % pid)))
        return kinds(host).count("finished") == 2

    compute(run.url(), "for i in range(%d): print('line', i)\nprint('the end')" % LINES, kernel)
    wait_until(has_ended, "the cell has ended")
    assert has_all(laptop.run("host", "output", kernel).stdout)
    assert 0 < most < 60


def recorder_pid(host: Host) -> int:
    (mark,) = host.home.glob(".local/state/rjupyter/servers/*/recorder.json")
    return int(json.loads(mark.read_text())["pid"])


def outputs(*texts: str) -> List[Dict[str, Any]]:
    return [{"output_type": "stream", "name": "stdout", "text": text} for text in texts]


COUNT = 7
PRINTED = ["line %d\n" % number for number in range(300)]
SHOWN: Dict[str, Any] = {"output_type": "display_data", "data": {"text/plain": "shown"}, "metadata": {}}
HAD: Dict[
    str, Any
] = {  # what the file has, and the number of the cell there; what it has then: "TAIL" stands for what is kept
    "nothing": ([], None, ["MARK", "TAIL"]),
    "all of it": (outputs("".join(PRINTED)), COUNT, ["".join(PRINTED)]),
    "its beginning": (outputs("".join(PRINTED[:50])), None, ["".join(PRINTED[:50]), "MARK", "TAIL"]),
    "more than its beginning": ([SHOWN, *outputs("".join(PRINTED[:290]))], None, [None, "".join(PRINTED)]),
    "an earlier execution": (outputs("an older one\n"), 3, ["MARK", "TAIL"]),
}


@pytest.mark.parametrize("is_ended", [True, False])
@pytest.mark.parametrize("had", list(HAD))
def test_nothing_that_a_notebook_has_is_lost_for_what_was_not_kept(tmp_path: Path, had: str, is_ended: bool) -> None:
    """With a journal of 20 kB in place of 64 MB: what is missing is marked, where it is missing."""
    there, number, wanted = HAD[had]
    journal = rjupyter.Journal(str(tmp_path / "k.journal"), most=10000)
    journal.head = journal.tell("begun", id="1.1", time=1.0, count=COUNT, code="x")
    for each in outputs(*PRINTED):
        journal.tell("printed", id="1.1", type=each["output_type"], content=each)
    if is_ended:
        journal.tell("finished", id="1.1", time=2.0, is_done=True)
    executions = rjupyter.Executions(rjupyter.JournalReader(journal.path).lines())
    tail = "".join(output.content["text"] for output in executions.cells["1.1"].outputs[1:])
    assert "".join(PRINTED).endswith(tail) and 1000 < len(tail) < len("".join(PRINTED)) - 500
    words = {"TAIL": tail, "MARK": "[older output was dropped: more than 64 MB came]\n"}
    cell: Dict[str, Any] = {
        "cell_type": "code",
        "source": "x",
        "metadata": {},
        "execution_count": number,
        "outputs": there,
    }
    for _ in range(2):  # and again: then it is there already
        changed, placed = rjupyter.fill_in([cell], list(executions.cells.values()))
        texts: List[Optional[str]] = [output.get("text") for output in cell["outputs"]]
        assert texts == [words.get(text, text) for text in wanted] and placed == ["1.1"]
    assert (changed, cell["execution_count"]) == (0, COUNT if is_ended or number == COUNT else None)


def test_what_is_known_already_stays_out_of_a_notebook() -> None:
    """Outputs that were cleared, and what was executed before a restart: they were not missed."""
    executions = rjupyter.Executions()
    for number, code in enumerate("xy", 1):
        executions.take({"kind": "begun", "id": str(number), "time": number, "count": number, "code": code})
        content = {"name": "stdout", "text": code}
        executions.take({"kind": "printed", "id": str(number), "type": "stream", "content": content})
        executions.take({"kind": "finished", "id": str(number), "time": number + 0.5, "is_done": True})
    cells: List[Dict[str, Any]] = [
        {"cell_type": "code", "source": code, "metadata": {}, "execution_count": None, "outputs": []} for code in "xy"
    ]
    assert rjupyter.fill_in(cells, list(executions.cells.values()), ["1"]) == (1, ["1", "2"])
    assert [cell["outputs"] for cell in cells] == [[], outputs("y")]


def test_a_recorder_that_was_killed_takes_nothing_from_a_notebook(tmp_path: Path) -> None:
    """What a page showed and saved meanwhile is more than what is written down."""
    begun = {"kind": "begun", "id": "1.1", "time": 1, "count": COUNT, "code": "x"}
    content = {"name": "stdout", "text": PRINTED[0]}
    printed = {"kind": "printed", "id": "1.1", "type": "stream", "content": content}
    lines = [json.dumps(each) for each in (begun, printed, {"kind": "gap", "time": 2, "why": "killed"})]
    executions = list(rjupyter.Executions(lines).cells.values())
    for number in (COUNT, None):
        cell = {"cell_type": "code", "source": "x", "outputs": outputs("".join(PRINTED)), "execution_count": number}
        assert rjupyter.fill_in([cell], executions) == (0, ["1.1"])
    for number in (COUNT - 1, None):
        cell = {"cell_type": "code", "source": "x", "outputs": outputs("old"), "execution_count": number}
        assert rjupyter.fill_in([cell], executions) == (1, ["1.1"])
        assert cell["outputs"] == outputs(PRINTED[0])


# -- what ends before its cell does -----------------------------------------------------------------------------------


def test_a_kernel_and_then_its_server_that_die_in_a_cell(laptop: Laptop, host: Host) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url(), "dies.ipynb")
    send(run.url(), "import os, time\nprint('last words', flush=True)\ntime.sleep(.5)\nos._exit(1)", kernel).close()
    wait_until(lambda: "finished" in kinds(host), "it is known", 30)
    shown = laptop.run("host", "output").stdout
    assert re.match(r"In \[\d+\]  \d\d:\d\d, \d+ s, failed\nlast words\n", shown), shown
    other = new_session(run.url(), "killed.ipynb")
    send(run.url(), "import time\nprint('other words', flush=True)\ntime.sleep(600)", other).close()
    wait_until(lambda: "printed" in kinds(host, other), "it prints")
    os.kill(host.servers()[0]["pid"], signal.SIGKILL)
    wait_until(lambda: "finished" in kinds(host, other), "it is known", 30)
    assert ", failed\nother words\n" in laptop.run("host", "output", "killed.ipynb").stdout


def test_a_recorder_that_was_killed_is_there_again_after_the_next_open(laptop: Laptop, host: Host) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url())
    compute(run.url(), "print('before')", kernel)
    wait_until(lambda: kinds(host).count("finished") == 1, "it is written down")
    kill_recorder(host)
    compute(run.url(), "print('lost')", kernel)
    (program,) = host.home.glob(".local/state/rjupyter/servers/*/agent.py")  # it loads what another version kept, and
    program.write_text(program.read_text().replace("/.cache/", "/.emptied/"))  # a cache may be emptied
    held(laptop, "host", "--local-port", str(quiet_port()))
    wait_until(lambda: "gap" in kinds(host), "there is another")
    compute(run.url(), "print('after')", kernel)
    wait_until(lambda: kinds(host).count("finished") == 2, "it is written down")
    shown = laptop.run("host", "output").stdout
    assert re.search(r"before\n\n\[the output printed here is lost: .*\]\n\nIn .*\nafter\n", shown), shown


def test_a_kernel_that_died_at_its_start_is_heard_on_its_new_ports(laptop: Laptop, host: Host) -> None:
    """Without a cache of them, and before there was one, Jupyter deals anew; the file keeps its name."""
    settings = ["--server-arg=--KernelManager." + words for words in ("transport=tcp", "cache_ports=False")]
    run = held(laptop, *settings, "host")
    kernel = new_session(run.url())
    (path,) = host.home.rglob("kernel-%s.json" % kernel)
    before = int(json.loads(path.read_text())["iopub_port"])

    def port() -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):  # Jupyter is about to write it anew
            return int(json.loads(path.read_text())["iopub_port"])
        return before

    os.kill(process_of(kernel), signal.SIGKILL)
    wait_until(lambda: port() != before, "it has another port")
    said = laptop.run("host", "eval", "6 * 7")
    assert said.stdout == "42\n", said.text


def kill_recorder(host: Host) -> None:
    pid = recorder_pid(host)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "agent.py" not in command_of(pid), "it is gone")


def test_code_in_the_queue_when_the_recorder_is_killed_and_code_that_comes_later(laptop: Laptop, host: Host) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url())
    gate = host.home / "gate"
    page = send(run.url(), "x = 42\nimport os, time\nwhile not os.path.exists(%r): time.sleep(.05)" % str(gate), kernel)
    asked = laptop.start("host", "eval", "print('ran')", has_terminal=False)
    wait_until_sent(host)
    kill_recorder(host)
    asked.wait()
    check_failure(asked, 1, "it is not known what becomes of it", "the recorder on the host was killed")
    gate.write_text("")
    page.close()
    assert "42\n" in laptop.run("host", "eval", "print(x)").stdout
    kill_recorder(host)
    assert laptop.run("host", "eval", "x").stdout == "42\n"
    os.kill(recorder_pid(host), signal.SIGSTOP)
    asked = laptop.start("host", "eval", "x = 7", has_terminal=False)
    wait_until(lambda: list(host.home.rglob("*.ask")), "it waits for the recorder")
    kill_recorder(host)
    asked.wait()
    check_failure(asked, 1, "it is not known what becomes of it")
    assert laptop.run("host", "eval", "x").stdout == "42\n"  # by the next one, which does not run what was lost
