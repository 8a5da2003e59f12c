"""What tells one thing from another, where names change, files are unlinked by others, and /proc does not help."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from client import api, check_failure
from jupyters import LIGHT, TODAY, environment, standin
from private_machines import find_namespaces_obstacle
from sides import VENV_BIN, Host, Laptop, Run, processes_with, quiet_port, wait_until
from strangers import counting_ps, leave_runtime_files

OBSTACLE = find_namespaces_obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)


@pytest.fixture(autouse=True)
def nothing_left(laptop: Laptop, make_host: Callable[..., Host], mark: str) -> Iterator[None]:
    """End what runs on hosts whose names are not this machine's: only processes with the mark of this test."""
    yield
    with contextlib.suppress(AssertionError):
        laptop.end_runs()
    for pid, words in processes_with(mark).items():
        if "sshd" not in words:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def in_namespace(kind: str, setup: str) -> List[str]:
    """Return a command that runs another in a namespace of its own, after `setup`."""
    return ["unshare", kind, "sh", "-c", setup + ' && exec "$@"', "sh"]


def rename(host: Host, name: str) -> None:
    assert host.sshd.process is not None
    subprocess.run(["nsenter", "--uts=/proc/%d/ns/uts" % host.sshd.process.pid, "hostname", name], check=True)


def configure(host: Host, text: str) -> None:
    (host.home / ".jupyter").mkdir()
    (host.home / ".jupyter/jupyter_server_config.py").write_text(text)


def rows(laptop: Laptop, event: str = "server") -> List[Dict[str, Any]]:
    """Return what `list` has."""
    run = laptop.run("host", "list", "--json")
    assert run.status == 0, run.text
    return [row for row in map(json.loads, run.stdout.splitlines()) if row["event"] == event]


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; one that nobody has waited for has."""
    try:
        return Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def closed(run: Run) -> str:
    """Close a tunnel when it is up; return its address."""
    url = run.url()
    run.expect("To end it")
    run.interrupt()
    assert run.wait() == 0
    return url


def opened(laptop: Laptop, *arguments: str, **environment: str) -> str:
    """Open and close; return the address."""
    return closed(laptop.start("--local-port", str(quiet_port()), *arguments, has_terminal=False, **environment))


def check_live(laptop: Laptop, host: Host) -> None:
    """The server that runs is listed as live."""
    (record,) = host.servers()
    (row,) = rows(laptop)
    assert (row["id"], row["state"]) == (record["id"], "live")


def check_one_server(laptop: Laptop, host: Host, *arguments: str) -> None:
    """The server that runs is listed as live, the same line and its id lead to it, and stop ends it."""
    (record,) = host.servers()
    check_live(laptop, host)
    again = laptop.start(*arguments, "host", has_terminal=False)
    again.expect("Found Jupyter")
    assert api(again.url(), "status")["kernels"] == 0
    assert (
        laptop.start("--attach", record["id"], "host", has_terminal=False).expect(r"Found|Launched").group() == "Found"
    )
    laptop.end_runs()
    assert [one["id"] for one in host.servers()] == [record["id"]]
    stop = laptop.run("host", "stop", "--all")
    assert (stop.status, stop.text.count("Stopped")) == (0, 1), stop.text
    wait_until(lambda: is_gone(record["pid"]), "its process is gone", 10)


def notebook(laptop: Laptop, *sources: str) -> str:
    """Write a notebook on the laptop; return its name."""
    cells: List[Dict[str, Any]] = [
        {"cell_type": "code", "id": "c%d" % i, "metadata": {}, "execution_count": None, "outputs": [], "source": s}
        for i, s in enumerate(sources)
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
    (laptop.home / "n.ipynb").write_text(json.dumps(whole))
    return "n.ipynb"


# -- the host's name --------------------------------------------------------------------------------------------------

NAMES = ["laptop.home", "name-7.local", "login2"]


@pytest.fixture
def named(make_host: Callable[..., Host]) -> Host:
    """A host whose name can be changed."""
    return make_host(prefix=in_namespace("--uts", "hostname first-name"))


def test_host_that_gets_another_name(laptop: Laptop, named: Host) -> None:
    opened(laptop, "host")
    for name in NAMES:
        rename(named, name)
        check_live(laptop, named)
    check_one_server(laptop, named)


def test_host_that_gets_another_name_while_the_tunnel_is_up(laptop: Laptop, named: Host) -> None:
    run = laptop.start("--local-port", str(quiet_port()), "host", has_terminal=False)
    url = run.url()
    run.expect("To end it")
    rename(named, "second-name")
    named.sshd.end_connections()
    run.expect("Connected to host again")
    assert api(url, "status")["kernels"] == 0
    stop = laptop.run("host", "stop")
    assert "Stopped" in stop.stderr, stop.text
    assert run.wait(20) == 4 and "it was stopped" in run.stderr


@pytest.mark.jupyter
def test_host_that_gets_another_name_while_notebooks_are_executed(laptop: Laptop, named: Host, mark: str) -> None:
    """The one goes on and its results come; the other is stopped."""
    go = named.home / "go"
    source = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.05)\nprint('done')"
    name = notebook(laptop, source % str(go))
    run = laptop.start("host", "execute", name, has_terminal=False)
    run.expect("Executing")
    rename(named, "second-name")
    assert [row["state"] for row in rows(laptop, "run")] == ["running"]
    named.sshd.end_connections()
    run.expect("Connected to host again")
    go.touch()
    assert run.wait() == 0, run.text
    assert "done" in (laptop.home / "n.executed.ipynb").read_text()
    laptop.start("host", "execute", notebook(laptop, source % "never"), has_terminal=False).expect("Executing")
    rename(named, "third-name")
    assert "Stopped" in laptop.run("host", "stop", "--all", "--yes").stderr
    wait_until(lambda: not [w for w in processes_with(mark).values() if "ipykernel" in w], "no kernel")


# -- what an identity is read from ------------------------------------------------------------------------------------

NO_BOOT_ID = in_namespace("--mount", "mount -t tmpfs none /proc/sys/kernel/random")


def test_boot_id_that_cannot_be_read(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    host = make_host(prefix=NO_BOOT_ID)
    opened(laptop, "host")
    check_one_server(laptop, host)


@pytest.mark.jupyter
def test_execution_where_the_boot_id_cannot_be_read(laptop: Laptop, make_host: Callable[..., Host], mark: str) -> None:
    make_host(prefix=NO_BOOT_ID)
    run = laptop.start("host", "execute", notebook(laptop, "import time; time.sleep(600)"), has_terminal=False)
    run.expect("Executing")
    assert [row["state"] for row in rows(laptop, "run")] == ["running"]
    assert "Stopped" in laptop.run("host", "stop", "--all", "--yes").stderr
    wait_until(lambda: not [w for w in processes_with(mark).values() if "ipykernel" in w], "no kernel")


def test_boot_id_that_cannot_be_read_on_the_laptop(laptop: Laptop, host: Host) -> None:
    """A second copy knows that the tunnel is up, `close` closes it, and what runs is never taken for what was left."""
    wrapper = laptop.home / "python"
    wrapper.write_text('#!/bin/sh\nexec %s %s "$@"\n' % (" ".join(map(_quoted, NO_BOOT_ID)), sys.executable))
    wrapper.chmod(0o755)
    laptop.python = str(wrapper)
    run = laptop.run("-f", "host")
    url = run.url()
    second = laptop.run("host")
    assert "The tunnel is up already" in second.stderr
    assert second.status == 0 and second.stdout == url + "\n"
    assert "Closed the tunnel" in laptop.run("host", "close").stderr


def _quoted(word: str) -> str:
    return "'%s'" % word.replace("'", "'\\''")


def without_proc(directory: Path, make_host: Callable[..., Host]) -> Host:
    """A host without /proc. Its ps, as on macOS, needs none: the real one, run where a /proc is."""
    root = directory / "root"
    root.mkdir()
    ps = directory / "bin/ps"
    ps.parent.mkdir()
    ps.write_text('#!/bin/sh\nexec /usr/sbin/chroot %s /bin/ps "$@"\n' % root)
    ps.chmod(0o755)
    setup = "mount --bind / %s && mount --bind /proc %s/proc && mount -t tmpfs none /proc" % (root, root)
    return make_host(
        path="%s:%s" % (ps.parent, standin()), prefix=in_namespace("--mount", setup), settings="AcceptEnv TZ"
    )


def test_host_without_proc(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """Whatever time zone and language the next who asks has."""
    host = without_proc(directory, make_host)
    opened(laptop, "host")
    check_live(laptop, host)
    with open(laptop.config, "a") as config:
        config.write("  SendEnv TZ LANG LC_*\n")
    laptop.environment["TZ"] = "Asia/Tokyo"
    check_live(laptop, host)
    del laptop.environment["TZ"]
    laptop.environment.update(LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8")
    check_one_server(laptop, host)


def test_ps_that_says_another_second(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """Where a start is reckoned from the boot's time, as by procps and FreeBSD's kernel, a set clock moves it."""
    host = without_proc(directory, make_host)
    opened(laptop, "host")
    ps = directory / "bin/ps"
    real = ps.rename(directory / "bin/real-ps")
    for moved in ("1 sec ago", "1 sec"):
        lines = ["#!/bin/bash", 'case "$*" in *lstart*) ;; *) exec %s "$@" ;; esac' % real]
        lines += ['out=$(%s "$@") || exit' % real, 'read -r stat start <<<"$out"']
        lines += ['echo "$stat $(date -d "$start UTC %s" "+%%c")"' % moved]
        ps.write_text("\n".join([*lines, ""]))
        ps.chmod(0o755)
        check_live(laptop, host)
    check_one_server(laptop, host)


def test_files_that_other_servers_left_cost_no_ps_where_there_is_no_proc(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    host = without_proc(directory, make_host)
    real = (directory / "bin/ps").rename(directory / "bin/real-ps")
    asked = counting_ps(directory / "bin", str(real))
    leave_runtime_files(host, 300)
    opened(laptop, "host")
    assert [row["id"] for row in rows(laptop)] == [record["id"] for record in host.servers()]
    laptop.run("host", "stop", "--all")
    looks = asked.read_text().splitlines()
    assert looks and not [words for words in looks if " -p 50000" in words]


def test_pid_of_a_server_that_ended_and_is_another_process_now(
    laptop: Laptop, make_host: Callable[..., Host], mark: str
) -> None:
    """What cannot be told by the boot is still told: nothing of the user's is ended in place of a server."""
    host = make_host(prefix=NO_BOOT_ID)
    opened(laptop, "host")
    (record,) = host.servers()
    os.killpg(record["pid"], signal.SIGKILL)
    wait_until(lambda: is_gone(record["pid"]), "the server is gone")
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        file = host.home / ".local/state/rjupyter/servers" / record["id"] / "server.json"
        file.write_text(json.dumps(dict(json.loads(file.read_text()), pid=other.pid)))
        laptop.run("host", "stop", "--all")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# -- the runtime file -------------------------------------------------------------------------------------------------


def runtime_files(host: Host) -> List[Path]:
    """Return what Jupyter wrote down of its servers; with a socket, its runtime directory is elsewhere."""
    return [path for path in host.sshd.directory.rglob("jpserver-*") if path.suffix in (".json", ".html")]


def unlink_runtime_files(host: Host) -> None:
    """What `jupyter server list` of another login node does to a server that does not run there."""
    assert runtime_files(host)
    for file in runtime_files(host):
        file.unlink()


SETTINGS = "c.ServerApp.base_url = '/user/ana/'\nc.IdentityProvider.token = 'my_own_token'\n"


@pytest.mark.parametrize("arguments", [[], ["--socket"]], ids=["port", "socket"])
def test_runtime_file_that_is_unlinked(laptop: Laptop, host: Host, arguments: List[str]) -> None:
    opened(laptop, *arguments, "host")
    unlink_runtime_files(host)
    check_one_server(laptop, host, *arguments)


@pytest.mark.jupyter
def test_runtime_file_of_a_server_with_a_socket_that_the_user_configured(laptop: Laptop, host: Host) -> None:
    configure(host, SETTINGS)
    opened(laptop, "--socket", "host")
    unlink_runtime_files(host)
    check_one_server(laptop, host, "--socket")


@pytest.mark.jupyter
def test_runtime_file_that_is_unlinked_by_the_real_command_of_another_node(
    laptop: Laptop, named: Host, directory: Path, mark: str
) -> None:
    """Another node that shares the home: it has other processes, so that it takes each server for one that ended."""
    configure(named, SETTINGS)
    opened(laptop, "host")
    argv = ["unshare", "--pid", "--fork", "--mount-proc", str(VENV_BIN / "jupyter-server"), "list"]
    subprocess.run(argv, check=True, capture_output=True, env={"HOME": str(named.home), "PATH": "/usr/bin:/bin"})
    assert not list((named.home / ".local/share/jupyter/runtime").glob("jpserver-*.json"))
    check_one_server(laptop, named)


@pytest.mark.waits
def test_runtime_file_that_is_unlinked_while_the_tunnel_is_up(laptop: Laptop, host: Host) -> None:
    run = laptop.start("--local-port", str(quiet_port()), "host", has_terminal=False)
    url = run.url()
    run.expect("To end it")
    unlink_runtime_files(host)
    host.sshd.end_connections()
    run.expect("Connected to host again")
    (record,) = host.servers()
    os.kill(record["pid"], signal.SIGSTOP)
    run.expect("although the connection works")
    os.kill(record["pid"], signal.SIGCONT)
    run.expect("answers again")
    assert api(url, "status")["kernels"] == 0 and run.text.count("is lost") == 1


@pytest.mark.parametrize("how", ["ended", "unlinked", "unlinked and hung", "listed", "of another host"])
def test_attach_never_launches(laptop: Laptop, host: Host, how: str) -> None:
    opened(laptop, "host")
    (record,) = host.servers()
    directory = host.home / ".local/state/rjupyter/servers" / record["id"]
    if "unlinked" in how:
        unlink_runtime_files(host)
        os.kill(record["pid"], signal.SIGSTOP if "hung" in how else signal.SIGCONT)
    else:
        os.killpg(record["pid"], signal.SIGKILL)
        wait_until(lambda: is_gone(record["pid"]), "the server is gone")
    if how == "listed":
        laptop.run("host", "list")
    if how == "of another host":
        file = directory / "server.json"
        file.write_text(json.dumps(dict(record, node="elsewhere", identity="another-boot:1")))
    run = laptop.start("--attach", record["id"], "--start-timeout", "5", "host", has_terminal=False)
    found = run.expect(r"Launched|rjupyter: |Found").group()
    os.kill(record["pid"], signal.SIGCONT) if "unlinked" in how else None
    assert found != "Launched"
    assert [one["id"] for one in host.servers()] in ([record["id"]], [])


# -- an end that is seen in the middle of it --------------------------------------------------------------------------


SLOW_END = """
import atexit, os, time

@atexit.register
def linger():
    open(os.path.expanduser("~/lingers"), "w").close()
    time.sleep(0)
    os.closerange(3, 1024)
    time.sleep(4)
"""


def server_slow_to_end(laptop: Laptop, host: Host, *arguments: str, deaf_s: int = 0) -> "tuple[Run, str]":
    """Open a server whose process is there for a while after its last answer: much memory, or a slow disk.

    For `deaf_s` it takes connections still.
    """
    configure(host, SLOW_END.replace("sleep(0)", "sleep(%d)" % deaf_s))
    run = laptop.start(*arguments, "host", has_terminal=False)
    url = run.url()
    run.expect("To end it")
    return run, url


@pytest.mark.parametrize("arguments", [[], ["--no-mux"], ["--socket"]], ids=["mux", "no-mux", "socket"])
def test_stop_in_another_terminal_is_told_as_an_end(
    laptop: Laptop, host: Host, mark: str, arguments: List[str]
) -> None:
    run, _ = server_slow_to_end(laptop, host, *arguments)
    logins = host.sshd.logins()
    assert laptop.run("host", "stop", "--yes").status == 0
    assert run.wait(30) == 4, run.text
    assert "it was stopped" in run.stderr and "is lost" not in run.stderr
    assert arguments == ["--no-mux"] or host.sshd.logins() == logins + 1


def test_shutdown_in_the_browser_that_takes_its_time_is_told_as_an_end(laptop: Laptop, host: Host, mark: str) -> None:
    run, url = server_slow_to_end(laptop, host)
    api(url, "shutdown", "POST")
    assert run.wait(30) == 4, run.text
    assert "it was shut down" in run.stderr and "is lost" not in run.stderr


@pytest.mark.parametrize("deaf_s", [0, 2])
def test_list_and_open_while_a_server_ends(laptop: Laptop, host: Host, mark: str, deaf_s: int) -> None:
    """What ends is not found, and not in the way of the next."""
    run, _ = server_slow_to_end(laptop, host, "--port", str(quiet_port()), deaf_s=deaf_s)  # nobody takes it then
    run.interrupt()
    run.wait()
    (record,) = host.servers()
    os.kill(record["pid"], signal.SIGTERM)
    wait_until((host.home / "lingers").exists, "it ends")
    if not deaf_s:
        assert [row["state"] for row in rows(laptop)] in (["ended"], ["no answer"], [])
    again = laptop.start("host", has_terminal=False)
    assert api(again.url(), "status")["kernels"] == 0


def test_server_that_is_slow_for_a_moment_is_come_back_to(laptop: Laptop, host: Host, mark: str) -> None:
    """It answers the second time; as nobody in particular is asked then, what it says fits a stranger, too."""
    with laptop.opened("host"):
        pass
    (record,) = host.servers()
    os.kill(record["pid"], signal.SIGSTOP)
    run = laptop.start("host", has_terminal=False)
    try:
        here = ":%04X " % record["port"]
        asked = {row.split()[2] for row in rows_of_tcp(here)}
        wait_until(lambda: len({row.split()[2] for row in rows_of_tcp(here)} - asked) > 1, "it is asked again")
    finally:
        os.kill(record["pid"], signal.SIGCONT)
    assert run.url()
    run.expect("Found Jupyter")
    assert len(host.servers()) == 1


def rows_of_tcp(here: str) -> List[str]:
    """Return the connections to a port here, as proc(5) has them, from the side that listens."""
    rows = Path("/proc/net/tcp").read_text().splitlines()
    return [row for row in rows if here in row.split()[1] + " " and row.split()[3] != "0A"]


STOPS_LISTENING = """
import socket, socketserver
setup = socketserver.StreamRequestHandler.setup
def setup_and_look(handler):
    setup(handler)
    write = handler.wfile.write
    def write_and_look(data):
        write(data)
        if data.startswith(b"HTTP/1.1 403"):
            handler.server.socket.shutdown(socket.SHUT_RDWR)
    handler.wfile.write = write_and_look
socketserver.StreamRequestHandler.setup = setup_and_look
"""


def test_server_that_listens_no_more_when_its_tunnel_is_checked(laptop: Laptop, host: Host, mark: str) -> None:
    configure(host, STOPS_LISTENING)
    run = laptop.run("host")
    check_failure(run, 4, "Jupyter does not answer", "  why: ", " --new ")  # reset, or closed without an answer
    assert "AllowTcpForwarding" not in run.text


# -- a server of JupyterHub -------------------------------------------------------------------------------------------


HUB_TOKEN = "0123456789abcdef"


class HubStandIn(http.server.BaseHTTPRequestHandler):
    """As much of a hub as its single-user server asks for at its start."""

    def do_GET(self) -> None:
        facts = {"version": "5.2.1", "name": "ana", "kind": "user", "scopes": ["access:servers!server=ana/"]}
        body = json.dumps(facts).encode()
        is_known = self.path.rstrip("/").endswith("/api") or HUB_TOKEN in self.headers.get("Authorization", "")
        self.send_response(200 if is_known else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-JupyterHub-Version", "5.2.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def of_hub(host: Host, mark: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The real single-user server of JupyterHub in ~/hand; behind it a stand-in of the hub."""
    binaries = environment("hub", "/usr/bin/python3", ["jupyterhub==5.*", *TODAY, LIGHT])
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubStandIn)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    (host.home / "hand").mkdir()
    port = quiet_port()
    environ = {
        "HOME": str(host.home),
        "PATH": "%s:/usr/bin:/bin" % binaries,
        "RJUPYTER_TEST": mark,
        "RJUPYTER_SIDE": "host",
        "JUPYTERHUB_API_TOKEN": HUB_TOKEN,
        "JUPYTERHUB_API_URL": "http://127.0.0.1:%d/hub/api" % hub.server_port,
        "JUPYTERHUB_BASE_URL": "/",
        "JUPYTERHUB_CLIENT_ID": "jupyterhub-user-ana",
        "JUPYTERHUB_HOST": "",
        "JUPYTERHUB_OAUTH_ACCESS_SCOPES": '["access:servers!server=ana/"]',
        "JUPYTERHUB_OAUTH_CALLBACK_URL": "/user/ana/oauth_callback",
        "JUPYTERHUB_SERVICE_PREFIX": "/user/ana/",
        "JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:%d/user/ana/" % port,
        "JUPYTERHUB_USER": "ana",
    }
    argv = [str(binaries / "jupyterhub-singleuser"), "--allow-root", "--no-browser"]
    log = host.home / "hub.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, cwd=host.home / "hand", env=environ, stdout=stream, stderr=stream)
    try:
        wait_until(lambda: "is running at" in log.read_text() or process.poll() is not None, "it runs")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()
        hub.shutdown()
        hub.server_close()


def test_server_of_a_hub_is_not_ours_to_open_or_stop(
    laptop: Laptop, host: Host, of_hub: "subprocess.Popen[bytes]"
) -> None:
    """`list` and --attach say what it is, and it is not offered for its path."""
    name = "p%d" % of_hub.pid
    (line,) = [line for line in laptop.run("host", "list").stdout.splitlines() if name in line]
    assert "JupyterHub" in line
    check_failure(laptop.run("--attach", name, "host"), 1, "JupyterHub")
    assert not host.servers()
    run = laptop.start("host:hand", has_terminal=False)
    assert "/user/ana" not in run.url()
    assert run.expect(r"Launched|Found").group() == "Launched"
    assert laptop.run("host", "stop", "--all").status == 0 and of_hub.poll() is None
