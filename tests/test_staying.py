"""Staying connected: faults on a real connection, and what is left on the laptop however we end."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from browser import run_cell
from client import api, busy_kernel, check_failure, compute, is_up, new_kernel, send
from notebooks import write_notebook
from private_machines import find_namespaces_obstacle
from proxy import Proxy
from sides import BOTH_MODES, ON_HOST, Host, Laptop, Run, quiet_port, ssh_of, wait_until, wait_until_gone

import rjupyter


def check_same(run: Run, url: str, kernel: str) -> None:
    """The tunnel leads to the same server by the same port, and the kernel has its variable."""
    wait_until(lambda: is_up(url), "the same address answers", 60)
    if kernel.startswith("pid "):
        assert "pid %d" % api(url, "status")["pid"] == kernel
    else:
        assert compute(url, "print(x)", kernel) == "42\n"


@pytest.fixture
def proxy(host: Host) -> Iterator[Proxy]:
    proxy = Proxy(host.sshd.port)
    yield proxy
    proxy.close()


def arguments_of_open(*arguments: str) -> List[str]:
    """Return the arguments of an open that keeps its port for itself, whatever other tests do meanwhile."""
    return ["--local-port", str(quiet_port()), *arguments, "host"]


def remember(run: Run) -> "tuple[str, str]":
    """Set a variable in a new kernel of what is opened; return the address and the kernel.

    The stand-in has none, and says its pid in its place.
    """
    url = run.url()
    run.expect("To end it")
    status = api(url, "status")
    if "pid" in status:
        return url, "pid %d" % status["pid"]
    kernel = new_kernel(url)
    compute(url, "x = 42", kernel)
    return url, kernel


def start_and_remember(laptop: Laptop, *arguments: str) -> "tuple[Run, str, str]":
    """Open and set a variable in a kernel; return the run, its address and the kernel."""
    run = laptop.start(*arguments_of_open(*arguments), has_terminal=False)
    return (run, *remember(run))


def kill_ssh(host: Host, mark: str, proxy: Proxy) -> None:
    os.kill(ssh_of(mark), signal.SIGKILL)


def kill_sshd_session(host: Host, mark: str, proxy: Proxy) -> None:
    host.sshd.end_connections()


def cut(host: Host, mark: str, proxy: Proxy) -> None:
    proxy.cut()


def freeze_ssh(host: Host, mark: str, proxy: Proxy) -> None:
    os.kill(ssh_of(mark), signal.SIGSTOP)


def freeze_sshd_session(host: Host, mark: str, proxy: Proxy) -> None:
    host.sshd.end_connections(signal.SIGSTOP)


def unlink_runtime_file(host: Host, mark: str, proxy: Proxy) -> None:
    """What `jupyter server list` does on another node of a shared home; then the way back is asked for."""
    for path in (host.home / ".local/share/jupyter/runtime").glob("jpserver-*.json"):
        path.unlink()
    host.sshd.end_connections()


def rename_host(host: Host, mark: str, proxy: Proxy) -> None:
    assert host.sshd.process is not None
    argv = ["nsenter", "--uts=/proc/%d/ns/uts" % host.sshd.process.pid, "hostname", "name-%d" % random.randrange(10**6)]
    subprocess.run(argv, check=True)
    host.sshd.end_connections()


def refuse_login_once(host: Host, mark: str, proxy: Proxy) -> None:
    key = host.sshd.directory / "user_key.pub"
    aside = key.with_name("aside")
    key.rename(aside)
    try:
        refused = host.sshd.log_text().count("[preauth]")
        host.sshd.end_connections()
        wait_until(lambda: host.sshd.log_text().count("[preauth]") > refused, "a login is refused")
    finally:
        aside.rename(key)


FAULTS = [kill_ssh, kill_sshd_session, cut, freeze_ssh, freeze_sshd_session, unlink_runtime_file, refuse_login_once]
FAULTS_OF_ROOT = [*FAULTS, rename_host]


@pytest.mark.waits
@pytest.mark.jupyter
@BOTH_MODES
@pytest.mark.parametrize("is_frozen", [False, True], ids=["lost", "frozen"])
def test_redial(laptop: Laptop, host: Host, mark: str, proxy: Proxy, is_frozen: bool, mode: List[str]) -> None:
    """Each fault in turn, with one server and one kernel."""
    frozen = [freeze_ssh, freeze_sshd_session]
    with laptop.opened(*arguments_of_open(*proxy.ssh_options(), *mode)) as run:
        url, kernel = remember(run)
        for number, fault in enumerate(frozen if is_frozen else [fault for fault in FAULTS if fault not in frozen], 1):
            print(fault.__name__)
            fault(host, mark, proxy)
            lost = run.expect(r"^The connection to host is lost \((.+)\)\. Trying again\.$", times=number)
            if fault is kill_sshd_session:
                assert re.match("Connection to .* closed|client_loop: send disconnect", lost.group(1)), lost.group(1)
            run.expect(r"^Connected to host again \(after \d+ s\)\.$", times=number)
            check_same(run, url, kernel)
            host.sshd.end_connections(signal.SIGCONT)
    assert "Closed. To come back" in run.stderr
    assert len(host.servers()) == 1


def test_host_away_for_a_while_and_sshd_started_anew(laptop: Laptop, host: Host) -> None:
    run, url, kernel = start_and_remember(laptop)
    host.sshd.stop()
    host.sshd.end_connections()
    run.expect("is lost")
    port = int(re.search(r":(\d+)/", url).group(1))  # type: ignore[union-attr]
    wait_until(lambda: not can_listen(port), "nobody else can take the port meanwhile", 20)
    config = Path(laptop.config)
    text = config.read_text()
    config.write_text("Nonsense yes\n")  # as where `ssh -G` resolves names, and there is no network yet
    run.expect("^Not yet: ssh does not take this: ")
    config.write_text(text)
    host.sshd.start()
    run.expect("Connected to host again")
    check_same(run, url, kernel)


def can_listen(port: int) -> bool:
    try:
        rjupyter.listen_on(port).close()
    except OSError:
        return False
    return True


@pytest.mark.waits
def test_packets_swallowed(laptop: Laptop, host: Host, proxy: Proxy) -> None:
    run, url, kernel = start_and_remember(laptop, *proxy.ssh_options())
    proxy.is_frozen = True
    run.expect("is lost")
    proxy.is_frozen = False
    run.expect("Connected to host again")
    check_same(run, url, kernel)


@pytest.mark.waits
@pytest.mark.jupyter
def test_jupyter_that_hangs_is_said_and_waited_for(laptop: Laptop, host: Host) -> None:
    run, url, kernel = start_and_remember(laptop)
    (record,) = host.servers()
    os.kill(record["pid"], signal.SIGSTOP)
    run.expect("does not answer, although the connection works. Waiting.")
    os.kill(record["pid"], signal.SIGCONT)
    run.expect("answers again")
    check_same(run, url, kernel)
    assert "is lost" not in run.text


START_UP_FILES = {
    "full": "echo 'No space left on device' >&2; exit 1\n",
    "slow": "while [ -e ~/.bashrc ]; do sleep 0.05; done\n",
}


@pytest.mark.waits
@pytest.mark.parametrize("trouble", sorted(START_UP_FILES))
def test_connection_that_stands_is_kept_where_the_host_can_not_say_how_jupyter_does(
    laptop: Laptop, host: Host, trouble: str
) -> None:
    run, url, kernel = start_and_remember(laptop)
    (record,) = host.servers()
    logins = host.sshd.logins()
    (host.home / ".bashrc").write_text(START_UP_FILES[trouble])
    os.kill(record["pid"], signal.SIGSTOP)
    run.expect("does not answer, although the connection works. Waiting.|is lost")
    (host.home / ".bashrc").unlink()
    os.kill(record["pid"], signal.SIGCONT)
    run.expect("answers again")
    check_same(run, url, kernel)
    assert "is lost" not in run.text and host.sshd.logins() == logins


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda laptop, host, url: api(url, "shutdown", "POST"), "it was shut down"),
        (lambda laptop, host, url: os.killpg(host.servers()[0]["pid"], signal.SIGKILL), "it was killed"),
        (lambda laptop, host, url: laptop.run("host", "stop"), "it was stopped"),
    ],
)
def test_end_of_the_server_is_said(laptop: Laptop, host: Host, end: Any, words: str) -> None:
    run = laptop.start("host", has_terminal=False)
    end(laptop, host, run.url())
    assert run.wait() == 4
    assert "has ended" in run.stderr and words in run.stderr


def test_server_that_ended_while_the_link_was_down(laptop: Laptop, host: Host) -> None:
    run = laptop.start("host", has_terminal=False)
    run.expect("To end it")
    host.sshd.stop()
    host.sshd.end_connections()
    run.expect("is lost")
    os.killpg(host.servers()[0]["pid"], signal.SIGKILL)
    host.sshd.start()
    assert run.wait() == 4
    assert "it was killed" in run.stderr


def test_host_that_was_started_anew_meanwhile(laptop: Laptop, host: Host) -> None:
    """As far as it shows: the record is of another boot, and the server is gone."""
    run = laptop.start("host", has_terminal=False)
    run.expect("To end it")
    (record,) = host.servers()
    host.sshd.stop()
    host.sshd.end_connections()
    run.expect("is lost")
    os.killpg(record["pid"], signal.SIGKILL)
    file = host.home / ".local/state/rjupyter/servers" / record["id"] / "server.json"
    file.write_text(json.dumps(dict(rjupyter.read_json(str(file)), identity="another-boot:1234")))
    host.sshd.start()
    assert run.wait() == 4
    assert "the host was started anew" in run.stderr


def test_unattended_login_that_is_refused_is_not_tried_for_ever(laptop: Laptop, host: Host) -> None:
    run = laptop.start("host", has_terminal=False)
    run.expect("To end it")
    (host.sshd.directory / "user_key.pub").write_text("")
    before = host.sshd.attempts()
    host.sshd.end_connections()
    assert run.wait() == 255
    assert "Permission denied" in run.stderr
    assert host.sshd.attempts() - before == rjupyter.DENIALS_MAX


def test_ctrl_c_while_it_is_lost(laptop: Laptop, host: Host) -> None:
    run = laptop.start("host")
    run.expect("To end it")
    host.sshd.stop()
    host.sshd.end_connections()
    run.expect("is lost")
    run.interrupt()
    assert run.wait(10) == 0
    assert "To come back" in run.text


def test_second_ctrl_c_leaves_at_once(laptop: Laptop, host: Host, mark: str) -> None:
    run = laptop.start("host")
    run.expect("To end it")
    os.kill(ssh_of(mark), signal.SIGSTOP)  # so that the clean-up has something to wait for
    run.interrupt()
    run.expect(r"\^C")
    run.interrupt()
    assert run.wait(10) in (0, 130)
    wait_until_gone(mark, "nothing on the laptop", 10, without=ON_HOST)
    laptop.start("host", has_terminal=False).expect("To end it")  # and clears away a file that was left in the hurry


@BOTH_MODES
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signal_at_every_step(laptop: Laptop, host: Host, mark: str, signum: int, mode: List[str]) -> None:
    """Whichever it was, the next open finds all in order, and is the next to get a signal."""
    for moment in ("^Connected", "^Launched", "^Forwarding", "^http", "To end it", ""):
        run = laptop.start(*mode, "host", has_terminal=False)
        if not moment:
            run.url()
            break
        run.expect(moment)
        os.kill(run.pid, signum)
        status = run.wait(20)
        assert status in ((-9,) if signum == signal.SIGKILL else (0, 130, 128 + signum)), moment
        wait_until_gone(mark, "nothing is left on the laptop", 15, without=ON_HOST)
        if moment == "^Connected":  # it may have been launched all the same, and the next is to launch one
            again = laptop.start(*mode, "host", has_terminal=False)
            again.url()
            again.interrupt()
            again.wait()
            assert len(host.servers()) == 1, moment
            assert laptop.run("host", "stop").status == 0
        else:
            assert len(host.servers()) == 1, moment


@BOTH_MODES
def test_max_sessions_1(laptop: Laptop, make_host: Callable[..., Host], mode: List[str]) -> None:
    make_host(settings="MaxSessions 1")
    run = laptop.start(*mode, "host", has_terminal=False)
    assert is_up(run.url())
    api(run.url(), "shutdown", "POST")  # then one session more is needed, to ask why it ended
    assert run.wait() == 4


@BOTH_MODES
@pytest.mark.parametrize("settings", ["AllowTcpForwarding no", "PermitOpen 127.0.0.1:1", "DisableForwarding yes"])
def test_forwarding_forbidden(laptop: Laptop, make_host: Callable[..., Host], settings: str, mode: List[str]) -> None:
    host = make_host(settings=settings)
    words = ("host does not forward to 127.0.0.1:", "administratively prohibited", "try: AllowTcpForwarding and Permit")
    check_failure(laptop.run(*mode, "host"), 1, *words)
    assert len(host.servers()) == 1
    check_failure(laptop.run(*mode, "--stop-on-exit", "--new", "host"), 1, *words)
    assert len(host.servers()) == 1  # the second one has ended with it


@BOTH_MODES
def test_forwarding_that_is_allowed_in_our_direction_alone(
    laptop: Laptop, make_host: Callable[..., Host], mode: List[str]
) -> None:
    make_host(settings="AllowTcpForwarding local\nPermitOpen 127.0.0.1:*")
    assert is_up(laptop.start(*mode, "host", has_terminal=False).url())


def test_no_session_at_all(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    make_host(settings="MaxSessions 0")
    check_failure(laptop.run("host"), 255, "host opens no session", "try: MaxSessions in its sshd_config")


@BOTH_MODES
@pytest.mark.parametrize("setting", ["ExitOnForwardFailure", "ClearAllForwardings"])
def test_forward_and_command_of_the_users_own_config(laptop: Laptop, host: Host, setting: str, mode: List[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = Path(laptop.config).read_text()
        text += "  RemoteCommand echo no\n  RequestTTY force\n  LocalForward 127.0.0.1:%d 127.0.0.1:1\n" % port
        Path(laptop.config).write_text(text + "  %s yes\n" % setting)
        run = laptop.start(*mode, "host", has_terminal=False)
        assert is_up(run.url())


def test_own_live_master_is_used_and_left_alone(laptop: Laptop, host: Host, directory: Path) -> None:
    control = directory / "mine"
    text = Path(laptop.config).read_text() + "  ControlPath %s\n  ControlMaster auto\n" % control
    Path(laptop.config).write_text(text)
    argv = ["ssh", "-F", laptop.config, "-M", "-N", "host"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=laptop.environment) as mine:
        try:
            wait_until(control.exists, "the master is up")
            logins = host.sshd.logins()
            with laptop.opened(*arguments_of_open()) as run:
                url, _ = remember(run)
                assert host.sshd.logins() == logins
            assert not is_up(url) and mine.poll() is None
            killed, url, kernel = start_and_remember(laptop)
            os.kill(killed.pid, signal.SIGKILL)
            wait_until(lambda: not is_up(url), "its forward is gone from the master", 10)
            killed.wait()
            lost, url, kernel = start_and_remember(laptop)
            mine.kill()
            lost.expect("Connected to host again")
            check_same(lost, url, kernel)
        finally:
            mine.kill()


@pytest.mark.waits
def test_own_master_whose_link_is_dead_is_not_the_way(laptop: Laptop, host: Host, directory: Path) -> None:
    """Its process answers `ssh -O check` all the same, as after a sleep or in another network."""
    control = directory / "mine"
    with open(laptop.config, "a") as config:
        config.write("  ControlPath %s\n  ControlMaster auto\n" % control)
    argv = ["ssh", "-F", laptop.config, "-M", "-N", "host"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=laptop.environment) as mine:
        try:
            wait_until(control.exists, "the master is up")
            host.sshd.end_connections(signal.SIGSTOP)
            run = laptop.run("host", "list")
            assert run.status == 0 and "does not answer: logging in anew" in run.stderr, run.text
            assert mine.poll() is None
        finally:
            mine.kill()
            host.sshd.end_connections()


@pytest.mark.jupyter
def test_wait_has_its_deadline_also_while_the_host_is_away(laptop: Laptop, host: Host) -> None:
    run = laptop.start(*arguments_of_open(), has_terminal=False)
    busy_kernel(run.url())
    waiting = laptop.start("host", "wait", "--timeout", "4", has_terminal=False)
    waiting.expect("Waiting for the kernel")
    host.sshd.stop()
    host.sshd.end_connections()
    assert waiting.wait() == 6, waiting.text


def test_stub_ssh_whose_multiplexing_is_broken(laptop: Laptop, host: Host, directory: Path) -> None:
    """An ssh that gives every master a socket it cannot make: the steps log in one by one, and a line says so."""
    stub = directory / "bin/ssh"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\nif [ "$1" = -M ]; then shift 4; exec /usr/bin/ssh -M -N -S /proc/nowhere/x "$@"; fi\n'
        'exec /usr/bin/ssh "$@"\n'
    )
    stub.chmod(0o755)
    laptop.environment["PATH"] = "%s:%s" % (stub.parent, laptop.environment["PATH"])
    run = laptop.start("host", has_terminal=False)
    assert is_up(run.url())
    assert "No multiplexing (unix_listener" in run.stderr


def test_nowhere_for_a_control_socket(laptop: Laptop, host: Host, directory: Path) -> None:
    long = directory / ("long" * 30)
    long.mkdir()
    run = laptop.start("host", has_terminal=False, XDG_RUNTIME_DIR=str(long), RJUPYTER_TMP=str(long))
    assert is_up(run.url())
    assert "No multiplexing" in run.stderr and "too long" in run.stderr


@pytest.mark.jupyter
def test_tab_of_a_real_browser_goes_on_without_a_reload(laptop: Laptop, host: Host, driver: Any, mark: str) -> None:
    write_notebook(host.home / "train.ipynb", "")
    run = laptop.start("host:train.ipynb", has_terminal=False)
    driver.get(run.url())
    run_cell(driver, "x = 42; print('x is set')", "x is set")
    driver.execute_script("window.isTheSamePage = true")
    os.kill(ssh_of(mark), signal.SIGKILL)
    run.expect("Connected to host again")
    run_cell(driver, "print('one more is', x + 1)", "one more is 43")
    assert driver.execute_script("return window.isTheSamePage") is True


def random_faults(laptop: Laptop, host: Host, mark: str, proxy: Proxy, count: int, seed: int) -> None:
    """Lose the connection while Jupyter starts, and then in so many ways."""
    print("seed %d" % seed)
    chance = random.Random(seed)
    faults = FAULTS if find_namespaces_obstacle() else FAULTS_OF_ROOT
    with starting(laptop, host, *proxy.ssh_options()) as run:
        url, kernel = remember(run)
        (record,) = host.servers()
        talker = new_kernel(url)
        send(url, TALKING, talker).close()
        before = len(re.findall(r"again \(after", run.text))
        for number in range(count):
            fault = chance.choice(faults)
            print(number, fault.__name__, flush=True)
            fault(host, mark, proxy)
            run.expect(r"again \(after", 120, times=before + number + 1)
            host.sshd.end_connections(signal.SIGCONT)
            check_same(run, url, kernel)
    assert [r["pid"] for r in host.servers()] == [record["pid"]]
    (host.home / "gate").write_text("")
    check_every_line(laptop, talker)
    assert "Stopped" in laptop.run("host", "stop", "--yes").stderr
    wait_until_gone(mark, "nothing is left on the laptop", 10, without=ON_HOST)


TALKING = """import itertools, os, time
for i in itertools.count():
    print(i, flush=True)
    time.sleep(.05)
    if os.path.exists("gate"):
        break
print("the end")"""


def check_every_line(laptop: Laptop, kernel: str) -> None:
    """Nothing that the kernel printed meanwhile is lost."""
    laptop.run("host", "wait", kernel)
    *numbers, last = laptop.run("host", "output", kernel).stdout.splitlines()[1:]
    assert numbers and numbers == [str(i) for i in range(len(numbers))]
    assert last == "the end"


@contextlib.contextmanager
def starting(laptop: Laptop, host: Host, *arguments: str) -> Iterator[Run]:
    """Open, and lose the connection while Jupyter starts; at the end, Ctrl-C."""
    run = laptop.start(*arguments_of_open(*arguments), has_terminal=False)
    wait_until(host.servers, "it is launched")
    host.sshd.end_connections()
    run.url()
    yield run
    run.interrupt()
    assert run.wait() == 0, run.text


@pytest.mark.waits
@pytest.mark.jupyter
def test_random_faults(laptop: Laptop, make_host: Callable[..., Host], mark: str) -> None:
    """RJUPYTER_FAULTS=50 is the long run; RJUPYTER_SEED repeats one."""
    seed = int(os.environ.get("RJUPYTER_SEED") or random.randrange(10**6))
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname first-name && exec "$@"', "sh"]
    host = make_host(prefix=[] if find_namespaces_obstacle() else renamed)
    with contextlib.closing(Proxy(host.sshd.port)) as proxy:
        random_faults(laptop, host, mark, proxy, int(os.environ.get("RJUPYTER_FAULTS") or 4), seed)


@BOTH_MODES
def test_further_forwards(laptop: Laptop, host: Host, mode: List[str]) -> None:
    """A dashboard beside Jupyter: there as long as the tunnel, also after the connection was lost."""
    ports = [quiet_port(), quiet_port()]
    with socket.create_server(("127.0.0.1", 0)) as dashboard:
        to = dashboard.getsockname()[1]
        forwards = ["-L", "%d:localhost:%d" % (ports[0], to), "-L", "127.0.0.1:%d:127.0.0.1:%d" % (ports[1], to)]
        with laptop.opened(*arguments_of_open(*mode, *forwards)) as run:
            url, kernel = remember(run)
            check_forwards(dashboard, ports)
            host.sshd.end_connections()
            run.expect("Connected to host again")
            check_forwards(dashboard, ports)
            check_same(run, url, kernel)
        assert can_listen(ports[0])
        with socket.create_server(("127.0.0.1", ports[0])):
            failed = laptop.run(*mode, *forwards, "host")
        assert failed.status == 1
        assert "rjupyter: cannot forward 127.0.0.1:%d:localhost:%d" % (ports[0], to) in failed.stderr


@BOTH_MODES
def test_further_forward_whose_port_another_took_meanwhile_is_no_longer_there(
    laptop: Laptop, host: Host, mode: List[str]
) -> None:
    ports = [quiet_port(), quiet_port()]
    with socket.create_server(("127.0.0.1", 0)) as dashboard:
        forwards = ["%d:localhost:%d" % (port, dashboard.getsockname()[1]) for port in ports]
        run, url, kernel = start_and_remember(laptop, *mode, "-L", forwards[0], "-L", forwards[1])
        host.sshd.stop()
        host.sshd.end_connections()
        run.expect("is lost")
        wait_until(lambda: can_listen(ports[0]), "ssh has left the port", 20)
        with socket.create_server(("127.0.0.1", ports[0])):
            host.sshd.start()
            run.expect("Connected to host again")
        check_same(run, url, kernel)
        check_forwards(dashboard, ports[1:])
        if not mode:  # to what is multiplexed, it can be added again
            assert laptop.run("-L", forwards[0], "host").stdout == url + "\n"
            check_forwards(dashboard, ports)
    assert re.findall("^Not forwarded any more: (.*?) ", run.text, re.MULTILINE) == ["127.0.0.1:" + forwards[0]]


def check_forwards(dashboard: socket.socket, ports: List[int]) -> None:
    dashboard.settimeout(20)
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as near:
            far, _ = dashboard.accept()
            with far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
