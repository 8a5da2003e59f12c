"""What cells print is kept whatever becomes of the page, the link, us, the disk; and a reopened page shows it."""

import json
import os
import re
import signal
import uuid
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from browser import chromium, patience, run_first_cell, shown_in
from client import api, compute, held, new_session, send
from execution import add_bash, add_r, mounted
from notebooks import write_notebook
from sides import Host, Laptop, Run, quiet_port, ssh_of, wait_until

pytestmark = pytest.mark.jupyter

LINES = 40
CODE = """import os, time
for i in range(%d):
    print("line", i, flush=True)
    while i == 9 and not os.path.exists("gate"):
        time.sleep(.05)
print("the end")""" % LINES  # fmt: skip


def kinds(host: Host) -> List[str]:
    files = host.home.glob(".local/state/rjupyter/servers/*/cells/*.journal")
    return [json.loads(line)["kind"] for file in files for line in file.read_text().splitlines()]


def has_all(text: str) -> bool:
    return re.findall(r"^line (\d+)$", text, re.MULTILINE) == [str(i) for i in range(LINES)] and "the end" in text


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "reloaded"])
def test_page_that_went_in_the_middle_of_a_cell(laptop: Laptop, host: Host, how: str, tmp_path: Path) -> None:
    write_notebook(host.home / "train.ipynb", CODE)
    run = held(laptop, "host:train.ipynb")
    with chromium(laptop) as driver:
        run_first_cell(driver, run.url(), "line 9")
        if how == "reloaded":
            driver.refresh()
    wait_until(lambda: api(run.url(), "kernels")[0]["connections"] == 0, "the page is gone")
    (host.home / "gate").write_text("")
    wait_until(lambda: "finished" in kinds(host), "the cell has ended", 60)
    assert has_all(laptop.run("host", "output", "train.ipynb").stdout)
    assert "While you were away: train.ipynb In [" in held(laptop, "host", "--local-port", str(quiet_port())).text
    saved = laptop.run("host", "output", "train.ipynb", "--save")
    assert "Saved the outputs of 1 cell into train.ipynb." in saved.stderr, saved.text
    with chromium(laptop) as driver:
        driver.get(run.url())
        patience(driver).until(lambda _: has_all(shown_in(driver)))
        driver.save_screenshot(str(tmp_path / "reopened.png"))


# -- the link, and us -------------------------------------------------------------------------------------------------


def freeze_ssh(run: Run, mark: str) -> Callable[[], None]:
    ssh = ssh_of(mark)
    os.kill(ssh, signal.SIGSTOP)
    return lambda: os.kill(ssh, signal.SIGCONT)


def kill_us(run: Run, mark: str) -> Callable[[], None]:
    os.kill(run.pid, signal.SIGKILL)
    return lambda: None


@pytest.mark.parametrize("fault", [freeze_ssh, kill_us])
def test_link_that_died_in_the_middle_of_a_cell(
    laptop: Laptop, host: Host, mark: str, fault: Callable[[Run, str], Callable[[], None]]
) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url())
    page = send(run.url(), CODE, kernel)
    wait_until(lambda: kinds(host).count("printed") > 0, "it prints")
    mend = fault(run, mark)
    try:
        there = re.sub(r":\d+/", ":%d/" % host.servers()[0]["port"], run.url())  # past the tunnel
        wait_until(lambda: api(there, "kernels/" + kernel)["connections"] == 0, "Jupyter knows it", 40)
        (host.home / "gate").write_text("")
        wait_until(lambda: "finished" in kinds(host), "the cell has ended")
    finally:
        mend()
    page.close()
    shown = laptop.run("host", "output")
    assert has_all(shown.stdout), shown.text
    assert (
        "While you were away: train.ipynb" in held(laptop, "host", "--local-port", str(quiet_port()), "--no-mux").text
    )


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


@pytest.mark.parametrize(("add", "code"), [(add_bash, "echo from afar"), (add_r, "cat('from afar\\n')")])
def test_a_kernel_in_another_language(
    laptop: Laptop, host: Host, add: Callable[[Path], Dict[str, str]], code: str
) -> None:
    name = add(host.home)["name"]
    run = held(laptop, "host")
    kernel = new_session(run.url(), name=name)
    compute(run.url(), code, kernel)
    wait_until(lambda: "finished" in kinds(host), "the cell has ended")
    assert "from afar\n" in laptop.run("host", "output").stdout
    laptop.run("host", "stop", "--yes")  # R's kernel does not look whether its server is there
    run.wait(20)


def leave_connection_files(host: Host, count: int) -> None:
    """Put there what kernels leave that nobody could end: their files, with ports at which nobody listens any more."""
    runtime = host.home / ".local/share/jupyter/runtime"
    runtime.mkdir(parents=True, exist_ok=True)
    ports = {name + "_port": 1 for name in ("shell", "iopub", "stdin", "control", "hb")}
    facts = dict(ports, transport="tcp", ip="127.0.0.1", key="k", signature_scheme="hmac-sha256")
    for _ in range(count):
        (runtime / ("kernel-%s.json" % uuid.uuid4())).write_text(json.dumps(facts))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_files_that_other_kernels_left_cost_nothing(laptop: Laptop, host: Host, when: str) -> None:
    """With three sockets for each, 342 such files were the end of the recorder; what is its own is recorded whole."""
    if when == "before":
        leave_connection_files(host, 600)
    run = held(laptop, "host")
    (mark,) = host.home.glob(".local/state/rjupyter/servers/*/recorder.json")
    pid = json.loads(mark.read_text())["pid"]
    if when == "meanwhile":
        assert compute(run.url(), "print('first')") == "first\n"
        leave_connection_files(host, 600)
    kernel = str(api(run.url(), "kernels", "POST", {})["id"])  # of no notebook, and used as soon as it is there
    most = 0

    def has_ended() -> bool:
        nonlocal most
        most = max(most, len(os.listdir("/proc/%d/fd" % pid)))
        return kinds(host).count("finished") == (1 if when == "before" else 2)

    compute(run.url(), "for i in range(%d): print('line', i)\nprint('the end')" % LINES, kernel)
    wait_until(has_ended, "the cell has ended")
    assert has_all(laptop.run("host", "output", kernel).stdout)
    assert most < 60


# -- what ends before its cell does -----------------------------------------------------------------------------------


def test_a_kernel_that_dies_in_its_cell_is_told_of(laptop: Laptop, host: Host) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url())
    send(run.url(), "import os, time\nprint('last words', flush=True)\ntime.sleep(.5)\nos._exit(1)", kernel).close()
    wait_until(lambda: "finished" in kinds(host), "it is known", 30)
    shown = laptop.run("host", "output").stdout
    assert re.match(r"In \[\d+\]  \d\d:\d\d, \d+ s, failed\nlast words\n", shown), shown


def test_a_server_that_is_killed_in_a_cell(laptop: Laptop, host: Host) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url())
    send(run.url(), "import time\nprint('last words', flush=True)\ntime.sleep(600)", kernel).close()
    wait_until(lambda: "printed" in kinds(host), "it prints")
    os.kill(host.servers()[0]["pid"], signal.SIGKILL)
    wait_until(lambda: "finished" in kinds(host), "it is known", 30)
    assert ", failed\nlast words\n" in laptop.run("host", "output").stdout


def test_a_recorder_that_was_killed_is_there_again_after_the_next_open(laptop: Laptop, host: Host) -> None:
    run = held(laptop, "host")
    kernel = new_session(run.url())
    compute(run.url(), "print('before')", kernel)
    wait_until(lambda: kinds(host).count("finished") == 1, "it is written down")
    (mark,) = host.home.glob(".local/state/rjupyter/servers/*/recorder.json")
    os.kill(json.loads(mark.read_text())["pid"], signal.SIGKILL)
    compute(run.url(), "print('lost')", kernel)
    held(laptop, "host", "--local-port", str(quiet_port()))
    wait_until(lambda: "gap" in kinds(host), "there is another")
    compute(run.url(), "print('after')", kernel)
    wait_until(lambda: kinds(host).count("finished") == 2, "it is written down")
    shown = laptop.run("host", "output").stdout
    assert re.search(r"before\n\n\[the output printed here is lost: .*\]\n\nIn .*\nafter\n", shown), shown
