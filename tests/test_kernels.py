"""One kernel at a time: `list --kernels`, `wait`, `stop KERNEL`."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import uuid
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
from client import (
    api,
    check_failure,
    compute,
    connected,
    end_kernels,
    events_of,
    held,
    new_session,
    send,
    wait_for_server,
)
from notebooks import write_notebook
from proxy import Proxy
from sides import Host, Laptop, Run, process_of, processes_with, quiet_port, wait_until

import rjupyter

pytestmark = [pytest.mark.jupyter, pytest.mark.shared]


@pytest.fixture
def run(tunnel: Run, host: Host) -> Run:
    """The server that the tests share, with no kernel."""
    write_notebook(host.home / "it's here.ipynb")
    wait_for_server(tunnel.url())
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
        with contextlib.suppress(OSError):  # it was closed with its other half, a moment ago
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
    assert "GPU memory is not shown: nvidia-smi does not answer.\n" in listing.stderr
    write_tool(tools / "nvidia-smi", "echo 'No devices were found'; exit 6\n")
    assert "nvidia-smi" not in laptop.run("host", "list", "--kernels").stderr


def test_ports_on_which_a_cell_listens(laptop: Laptop, host: Host, run: Run) -> None:
    """What the kernel serves itself and what it started, and none of those through which Jupyter talks to it."""
    kernel, other = new_session(run.url(), "it's here.ipynb"), new_session(run.url(), "other.ipynb")
    ports = sorted((quiet_port(), quiet_port()))
    code = """
import http.server, subprocess, sys, threading
server = http.server.HTTPServer(("127.0.0.1", %d), http.server.BaseHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
script = "import socket, sys; s = socket.create_server(('::1', %d), family=socket.AF_INET6); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", script + "; print()"], stdin=subprocess.PIPE)
""" % tuple(ports)
    compute(run.url(), code, kernel)
    compute(run.url(), "%time 1", other)

    def listed() -> Dict[str, List[int]]:
        return {
            event["id"]: event["ports"] for event in events_of(laptop.run("--json", "host", "list", "--kernels"))[1:]
        }

    wait_until(lambda: listed() == {kernel: ports, other: []}, "both listen", 30)
    shown = laptop.run("host", "list", "--kernels").stdout
    assert re.search(r"^%s .* %s +\w{4}$" % (kernel[:8], " ".join(map(str, ports))), shown, re.MULTILINE), shown
    compute(run.url(), "child.stdin.close(); child.wait(); server.shutdown(); server.server_close()", kernel)
    assert listed() == {kernel: [], other: []}


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
    process_of(kernel)  # Jupyter fails where it is to end a kernel that it has not quite started again
    assert laptop.run("host", "eval", "-k", kernel[:8], "1").status == 0


def test_wait_no_longer_than_it_may(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "it's here.ipynb")
    gate = compute_until(run, host, kernel)
    check_failure(laptop.run("host", "wait", "--timeout", "1"), 6, "it's here.ipynb is still busy")
    open(gate, "w").close()


def test_wait_for_a_cell_in_a_kernel_that_jupyter_calls_idle(laptop: Laptop, host: Host, run: Run) -> None:
    """It does since its page asked for a subshell, as for a widget's messages; the cell runs on."""
    kernel = new_session(run.url(), "it's here.ipynb")
    gate = compute_until(run, host, kernel)
    page = connected(run.url(), kernel)
    head = {"msg_id": "2", "msg_type": "create_subshell_request", "username": "", "session": "s"}
    request = {"header": head, "parent_header": {}, "metadata": {}, "content": {}, "channel": "control"}
    page.send(json.dumps(request))
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["execution_state"] == "idle", "Jupyter calls it idle")
    check_failure(laptop.run("host", "wait", "--timeout", "3"), 6, "it's here.ipynb is still busy")
    for what in ([kernel[:8]], []):
        check_failure(laptop.run("host", "stop", *what), 1, "nothing was stopped", "ts kernel is busy", "--yes")
    open(gate, "w").close()
    assert "done after" in laptop.run("host", "wait").stdout
    page.close()


def test_process_of_a_kernel_is_not_one_that_it_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That has its command line, and a lower number once these have begun anew."""
    words = "python -m ipykernel_launcher -f /run/kernel-%s.json" % "k"
    processes = {7: (2000, 1, words), 1999: (1, 1, "jupyter"), 2000: (1999, 1, words)}
    monkeypatch.setattr(rjupyter, "all_processes", lambda: processes)
    assert [pid for pid, _ in rjupyter.identities_of("k")] == [2000]


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


def test_wait_leaves_nothing_on_the_host_when_it_is_killed(laptop: Laptop, host: Host, run: Run, mark: str) -> None:
    gate = compute_until(run, host, new_session(run.url(), "it's here.ipynb"))
    before = set(processes_with(mark))
    waiting = laptop.start("host", "wait", has_terminal=False)
    waiting.expect("Waiting for the kernel")
    assert set(processes_with(mark)) - before
    os.kill(waiting.pid, signal.SIGKILL)
    wait_until(lambda: not set(processes_with(mark)) - before, "it is gone there, too")
    open(gate, "w").close()


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
    check_failure(laptop.run("host", "stop", "third.ipynb"), 1, "there is no such server, execution or kernel: third")


def test_kernels_are_ended_by_their_notebooks_whatever_these_are_called(laptop: Laptop, host: Host, run: Run) -> None:
    """Several at once; and those whose names look as ids do: what there is decides, and an id comes first."""
    names = ["a.ipynb", "sub/b.ipynb", "beef.ipynb", "r12ab.ipynb", "p7.ipynb"]
    kernels = {name: new_session(run.url(), name) for name in names}
    stopped = laptop.run("host", "stop", "a.ipynb", "b.ipynb")
    assert [line for line in stopped.stderr.splitlines() if line.startswith("Ended")] == [
        "Ended the kernel of %s (%s)." % (name, kernels[name][:8]) for name in names[:2]
    ], stopped.text
    for name in names[2:]:
        stopped = laptop.run("--json", "host", "stop", name[: -len(".ipynb")])
        (ended,) = [event for event in events_of(stopped) if event["event"] == "ended"]
        assert (ended["notebook"], ended["kernel"]) == (name, kernels[name]), stopped.text
    assert api(run.url(), "kernels") == []
    check_failure(laptop.run("host", "stop", "beef", "--yes"), 1, "no such server, execution or kernel: beef")
    assert len(host.servers()) == 1


def test_a_notebook_that_was_renamed_is_known_by_both_names(laptop: Laptop, host: Host, run: Run) -> None:
    """Also by one that it got when no cell ran; a name that another one has now means that one."""
    kernel = new_session(run.url(), "old.ipynb")
    write_notebook(host.home / "new.ipynb", "print('here')")
    compute(run.url(), "print('here')", kernel)
    wait_until(lambda: "here" in laptop.run("host", "output", "old.ipynb").stdout, "it is written down")
    (session,) = api(run.url(), "sessions")
    api(run.url(), "sessions/" + session["id"], "PATCH", {"path": "new.ipynb", "name": "new.ipynb", "type": "notebook"})
    for name in ("new.ipynb", "old.ipynb"):
        assert "here" in laptop.run("host", "output", name).stdout, name
        assert laptop.run("host", "eval", "-k", name, "6 * 7").stdout == "42\n", name
        assert laptop.run("host", "wait", name).status == 0, name
    saved = laptop.run("host", "output", "old", "--save")
    assert "Saved the outputs of 1 cell into new.ipynb." in saved.stderr, saved.text
    other = new_session(run.url(), "old.ipynb")
    compute(run.url(), "print('there')", other)
    wait_until(lambda: laptop.run("host", "output", "old").stdout.endswith("there\n"), "it means the other one")
    assert "(%s)" % other[:8] in laptop.run("host", "stop", "old").stderr
    assert "(%s)" % kernel[:8] in laptop.run("host", "stop", "old").stderr


def test_a_path_through_a_link_is_the_place_that_it_leads_to(laptop: Laptop, host: Host) -> None:
    """For each action; also where the link is in the middle, and where the path is no shortest one."""
    (host.home / "scratch/real/deep").mkdir(parents=True)
    (host.home / "proj").symlink_to("scratch/real")
    write_notebook(host.home / "proj/deep/n.ipynb", "print('here')")
    run = held(laptop, "host:proj/deep", "--local-port", str(quiet_port()))
    kernel = new_session(run.url(), "n.ipynb")
    compute(run.url(), "print('here')", kernel)
    paths = ["scratch/real/deep", "proj/../scratch/real/deep/", "./proj/deep", str(host.home / "proj/deep")]
    for path in paths:
        place = "host:" + path
        assert laptop.run(place, "eval", "-k", "n.ipynb", "1 + 1").stdout == "2\n", path
        assert "n.ipynb is idle" in laptop.run(place, "wait").stdout, path
        assert "here" in laptop.run(place, "output").stdout, path
        assert kernel[:8] in laptop.run(place, "list", "--kernels").stdout, path
        again = held(laptop, place, "--local-port", str(quiet_port()))
        assert "Found Jupyter" in again.text, path
    assert laptop.run("host:scratch/real/deep", "stop", "--yes").stderr.count("Stopped Jupyter") == 1
