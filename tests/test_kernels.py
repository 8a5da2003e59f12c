"""One kernel at a time: `list --kernels`, `wait`, `stop KERNEL`."""

import contextlib
import os
import re
import shutil
import signal
import socket
import uuid
from pathlib import Path
from typing import Iterator

import pytest
from client import api, check_failure, compute, end_kernels, events_of, new_session, send
from notebooks import write_notebook
from proxy import Proxy
from sides import Host, Laptop, Run, process_of, wait_until

pytestmark = [pytest.mark.jupyter, pytest.mark.shared]


@pytest.fixture
def run(tunnel: Run, host: Host) -> Run:
    """The server that the tests share, with no kernel."""
    write_notebook(host.home / "it's here.ipynb")
    end_kernels(tunnel.url())
    return tunnel


@pytest.fixture
def tools(host: Host) -> Iterator[Path]:
    """A directory of the user's own that is searched first for commands, for a while."""
    tools = host.home / "bin"
    tools.mkdir()
    (host.home / ".bashrc").write_text("export PATH=%s:$PATH\n" % tools)
    yield tools
    (host.home / ".bashrc").unlink()
    shutil.rmtree(tools)


def write_tool(path: Path, script: str) -> None:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def compute_until(run: Run, host: Host, kernel: str, then: str = "") -> str:
    """Let a kernel compute until a file is there, and then do something; return the file."""
    gate = str(host.home / ("gate-" + uuid.uuid4().hex))
    send(run.url(), "import os, time\nwhile not os.path.exists(%r): time.sleep(.05)\n%s" % (gate, then), kernel).close()
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["execution_state"] == "busy", "it computes")
    return gate


def test_list_of_kernels(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    alone = str(api(run.url(), "kernels", "POST", {})["id"])
    compute(run.url(), "x = bytes(200 * 1000 * 1000).replace(b'\\0', b'x')", kernel)
    shown = laptop.run("host", "list", "--kernels").stdout
    assert re.search(r"^%s +idle .* it's here\.ipynb +0 +(2|3)\d\d\.\d MB +- " % kernel[:8], shown, re.MULTILINE), shown
    kernels = {event["id"]: event for event in events_of(laptop.run("--json", "host", "list", "--kernels"))[1:]}
    assert set(kernels) == {kernel, alone}
    assert (kernels[alone]["notebook"], kernels[alone]["gpu_memory"]) == ("", None)
    assert kernels[kernel]["memory"] > 200e6 > kernels[alone]["memory"] > 20e6


def test_gpu_memory_is_what_a_stand_in_for_nvidia_smi_says(laptop: Laptop, run: Run, tools: Path) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    write_tool(tools / "nvidia-smi", "echo '%d, 1024'; echo '1, 77'; echo '[N/A], [N/A]'\n" % process_of(kernel))
    (event,) = events_of(laptop.run("--json", "host", "list", "--kernels"))[1:]
    assert (event["id"], event["gpu_memory"]) == (kernel, 1 << 30)


class HearingProxy(Proxy):
    """Counts what comes from the host."""

    heard = 0

    def _take(self, source: socket.socket) -> None:
        self.heard += source.getsockname()[1] != self.port
        super()._take(source)


def test_a_tool_that_hangs_is_given_up_and_the_agent_is_heard_to_live(
    laptop: Laptop, host: Host, run: Run, tools: Path
) -> None:
    """As nvidia-smi does where a driver is stuck, which is given up, and ps where a process is."""
    kernel = new_session(run.url(), "it's here.ipynb")
    gate, begun = host.home / "gate of tools", host.home / "begun"
    write_tool(tools / "ps", "touch %s; while ! test -e '%s'; do sleep .1; done; exit 1\n" % (begun, gate))
    write_tool(tools / "nvidia-smi", "touch %s; exec sleep 600\n" % begun)
    with contextlib.closing(HearingProxy(host.sshd.port)) as proxy:
        through = [*proxy.ssh_options(), "-o", "ServerAliveInterval=600"]  # ssh itself is silent
        listing = laptop.start(*through, "--json", "host", "list", "--kernels", has_terminal=False)
        wait_until(begun.exists, "a tool hangs")
        before = proxy.heard
        wait_until(lambda: proxy.heard >= before + 2, "the agent is heard, twice")
        gate.write_text("")
        listing.wait()
    (event,) = events_of(listing)[1:]
    assert (event["id"], event["gpu_memory"]) == (kernel, None)


def test_wait_returns_when_the_kernel_is_idle(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    gate = compute_until(run, host, kernel)
    waiting = laptop.start("-v", "host", "wait", "it's here", has_terminal=False)
    waiting.expect("Connected to host")
    open(gate, "w").close()
    assert waiting.wait() == 0
    assert re.fullmatch(r"it's here\.ipynb is idle: In \[\d+\] done after \d+ s\.\n", waiting.stdout), waiting.text


def test_wait_for_a_kernel_that_no_page_has_ever_asked(laptop: Laptop, host: Host, run: Run) -> None:
    """Jupyter goes on to call it "starting"."""
    assert laptop.run("host", "eval", "print(1)").status == 0
    waited = laptop.run("host", "wait")
    assert waited.status == 0 and "done after" in waited.stdout, waited.text


def test_wait_tells_that_the_last_cell_failed(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    open(compute_until(run, host, kernel, "1 / 0"), "w").close()
    waited = laptop.run("host", "wait")
    assert waited.status == 5
    assert "failed after" in waited.stdout


def test_wait_tells_that_the_kernel_died(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    compute_until(run, host, kernel)
    waiting = laptop.start("host", "wait", kernel[:8], has_terminal=False)
    waiting.expect("Waiting for the kernel")
    os.kill(process_of(kernel), signal.SIGKILL)
    assert waiting.wait() == 4
    assert waiting.stdout == "it's here.ipynb: its kernel died, or was restarted.\n"


def test_wait_no_longer_than_it_may(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    gate = compute_until(run, host, kernel)
    check_failure(laptop.run("host", "wait", "--timeout", "1"), 6, "it's here.ipynb is still busy")
    open(gate, "w").close()


def test_wait_outlives_the_connection(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    gate = compute_until(run, host, kernel)
    waiting = laptop.start("-v", "host", "wait", has_terminal=False)
    waiting.expect("Connected to host")
    host.sshd.end_connections(signal.SIGKILL)
    waiting.expect("Connected to host again")
    open(gate, "w").close()
    assert waiting.wait() == 0, waiting.text
    assert "done after" in waiting.stdout


def test_a_kernel_is_ended_by_its_notebook(laptop: Laptop, host: Host, run: Run) -> None:
    kernel, other = new_session(run.url(), "it's here.ipynb"), new_session(run.url(), "other.ipynb")
    stopped = laptop.run("host", "stop", "it's here.ipynb")
    assert "Ended the kernel of it's here.ipynb (%s)." % kernel[:8] in stopped.stderr
    assert [kernel["id"] for kernel in api(run.url(), "kernels")] == [other]


def test_names_of_kernels_that_are_none_or_several(laptop: Laptop, host: Host, run: Run) -> None:
    check_failure(laptop.run("host", "wait"), 1, "no kernel of yours runs")
    for path in ("it's here.ipynb", "other.ipynb"):
        new_session(run.url(), path)
    check_failure(laptop.run("host", "wait"), 1, "several kernels could be meant", "it's here.ipynb (", "other.ipynb (")
    check_failure(laptop.run("host", "stop", "third.ipynb"), 1, "there is no such kernel: third.ipynb")
