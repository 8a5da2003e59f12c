"""A tunnel of ours that is up is a connection: what comes after it logs in no more, and never takes another's."""

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Callable, List

import pytest
from client import check_failure, held, is_up
from notebooks import write_notebook
from sides import Host, Laptop, Run, quiet_port, ssh_of, wait_until

import rjupyter


@pytest.fixture
def tunnel(laptop: Laptop, host: Host) -> Run:
    """A tunnel that is up."""
    return held(laptop, "host")


def logins_of(host: Host, action: Callable[[], object]) -> int:
    before = host.sshd.logins()
    action()
    return host.sshd.logins() - before


@pytest.mark.jupyter
def test_what_comes_after_an_open_logs_in_no_more(laptop: Laptop, host: Host, tunnel: Run, tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "a.ipynb", "print('executed')")
    for arguments in (["list"], ["logs"], ["execute", str(notebook), "-o", str(tmp_path / "b.ipynb")]):
        assert logins_of(host, lambda words=arguments: laptop.run("host", *words)) == 0, arguments  # type: ignore[misc]
    assert "executed" in (tmp_path / "b.ipynb").read_text()


def test_stop_logs_in_for_it_ends_that_tunnel(laptop: Laptop, host: Host, tunnel: Run) -> None:
    """Through the tunnel, it would cut itself off."""
    assert logins_of(host, lambda: laptop.run("host", "stop")) == 1
    assert not host.servers()
    assert tunnel.wait(20) == 4


def test_an_open_right_after_a_stop_does_not_join_the_tunnel_that_ends(laptop: Laptop, host: Host, tunnel: Run) -> None:
    """Its address would lead nowhere; a tunnel needs a moment to see that its server is gone."""
    assert laptop.run("host", "stop").status == 0
    second = laptop.start("host", has_terminal=False)
    second.expect("To end it")
    assert "The tunnel is up already" not in second.text and second.url() != tunnel.url()
    assert is_up(second.url()) and tunnel.wait(20) == 4


def test_a_second_open_goes_through_the_first_and_outlives_it(laptop: Laptop, host: Host, tunnel: Run) -> None:
    (host.sshd.home / "other").mkdir()
    port = str(quiet_port())
    before = host.sshd.logins()
    second = laptop.start("--local-port", port, "--new", "host:other", has_terminal=False)
    url = second.url()
    second.expect("To end it")
    assert host.sshd.logins() == before
    tunnel.interrupt()
    tunnel.wait(20)
    second.expect("Connected to host again")
    assert ":%s/" % port in url
    wait_until(lambda: is_up(url), "the same address answers", 30)
    assert host.sshd.logins() == before + 1


def test_a_tunnel_in_the_background_has_a_connection_of_its_own(laptop: Laptop, host: Host, tunnel: Run) -> None:
    """It outlives the terminal of the first, where nobody can be asked for a second factor."""
    (host.sshd.home / "other").mkdir()
    background = laptop.start("-f", "--local-port", str(quiet_port()), "--new", "host:other", has_terminal=False)
    assert background.wait() == 0, background.text
    before = host.sshd.logins()
    tunnel.interrupt()
    tunnel.wait(20)
    assert is_up(background.url())
    assert host.sshd.logins() == before
    assert laptop.run("host:other", "close").status == 0


def test_an_open_that_joins_says_what_comes_too_late(laptop: Laptop, host: Host, tunnel: Run) -> None:
    joined = laptop.run("--idle-timeout", "12h", "host")
    assert joined.stdout == tunnel.url() + "\n"
    assert "--idle-timeout takes effect only at launch" in joined.stderr and " --new " in joined.stderr, joined.text


def test_what_goes_through_a_tunnel_that_connects_again_does_so_too(
    laptop: Laptop, host: Host, mark: str, tunnel: Run
) -> None:
    """Its session is lost, although the control socket is there again as we look."""
    follow = laptop.start("host", "logs", "-f", has_terminal=False)
    follow.expect("is running at")
    os.kill(ssh_of(mark), signal.SIGKILL)
    tunnel.expect("Connected to host again")
    follow.expect("Connected to host again")
    follow.interrupt()
    follow.wait(20)


def test_the_forward_of_a_second_open_goes_with_it(laptop: Laptop, host: Host, tunnel: Run) -> None:
    (host.sshd.home / "other").mkdir()
    second = laptop.start("--local-port", str(quiet_port()), "--new", "host:other", has_terminal=False)
    url = second.url()
    second.expect("To end it")
    os.kill(second.pid, signal.SIGKILL)
    wait_until(lambda: not is_up(url), "its forward is taken away", 20)
    assert is_up(tunnel.url())
    laptop.run("host", "list")  # which takes away the record that a kill -9 left


def echoes(port: int, there: socket.socket) -> bool:
    """True when what is sent to a port here arrives there, and the other way."""
    there.settimeout(20)
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=20) as near:
        far, _ = there.accept()
        with far:
            near.sendall(b"x")
            return far.recv(1) == b"x"
    return False


@pytest.mark.parametrize("words", [[], ["-f"]], ids=["in front", "in the background"])
def test_a_forward_is_added_to_the_tunnel_that_is_up(
    laptop: Laptop, host: Host, mark: str, words: List[str], tmp_path: Path
) -> None:
    """At once, without a login; it is there again when the tunnel is, and goes with it."""
    (host.home / "work").mkdir()
    own = quiet_port()
    run = laptop.start(*words, "--local-port", str(own), "host:work", has_terminal=False)
    run.expect("To (end|close) it")
    before = host.sshd.logins()
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as taken:
        port, other, busy = there.getsockname()[1], quiet_port(), taken.getsockname()[1]
        added = laptop.run("-L", "%d:localhost:%d" % (other, port), "host:work")
        assert added.status == 0 and added.stdout == run.url() + "\n", added.text
        words_of_it = "The tunnel is up already", "Forwarding 127.0.0.1:%d to localhost:%d on host.\n" % (other, port)
        assert all(word in added.stderr for word in words_of_it), added.stderr
        socket_here = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as at_socket:
            at_socket.bind(str(socket_here))
            at_socket.listen()
            third = quiet_port()
            # The same server, otherwise asked for; what is added already is not added twice.
            more = ["-L", "%d:localhost:%d" % (other, port), "-L", "%d:%s" % (third, socket_here)]
            assert "%s" % third in laptop.run(*more, "--json", "host").stdout
            check_failure(laptop.run("-L", str(busy), "host:work"), 1, "cannot forward 127.0.0.1:%d" % busy)
            assert echoes(other, there) and echoes(third, at_socket)
            assert host.sshd.logins() == before
            os.kill(ssh_of(mark), signal.SIGKILL)
            wait_until(lambda: host.sshd.logins() == before + 1, "it has connected again")
            wait_until(lambda: echoes(other, there) and echoes(third, at_socket), "the forwards are back")
            assert is_up(run.url())
    if words:
        assert laptop.run("host", "close").status == 0
    else:
        run.interrupt()
        assert run.wait(20) == 0
    for free in (own, other, third):
        with socket.create_server(("127.0.0.1", free)):
            pass


def test_a_port_alone_is_the_same_one_there() -> None:
    forwards = {
        "6006": "127.0.0.1:6006:127.0.0.1:6006",
        "7860:localhost:80": "127.0.0.1:7860:localhost:80",
        "7860:/a/socket": "127.0.0.1:7860:/a/socket",
    }
    for typed, forward in forwards.items():
        assert rjupyter.Args(rjupyter.CommandLine(["--no-config", "-L", typed, "gpu1"])).further == [forward]
    wrong = dict.fromkeys(["0", "70000"], "a port is a number")
    wrong.update(dict.fromkeys(["80:", "a", "80:80", "\u0661"], "a forward is PORT, PORT:HOST:PORT or PORT:/SOCKET"))
    for typed, why in wrong.items():
        with pytest.raises(rjupyter.Failure) as failed:
            rjupyter.Args(rjupyter.CommandLine(["--no-config", "-L", typed, "gpu1"]))
        assert why in failed.value.why and failed.value.status == 2


def other_options(host: Host, ssh: int) -> List[str]:
    return ["-o", "Compression=yes"]


def config_that_was_edited(host: Host, ssh: int) -> List[str]:
    """The name leads elsewhere since: here only its user's environment differs, and that is enough."""
    host.sshd.config.write_text(host.sshd.config.read_text() + "\n    SetEnv RJ_WHERE=elsewhere\n")
    return []


def frozen(host: Host, ssh: int) -> List[str]:
    os.kill(ssh, signal.SIGSTOP)
    return []


def no_multiplexing(host: Host, ssh: int) -> List[str]:
    return ["--no-mux"]


@pytest.mark.parametrize("change", [other_options, config_that_was_edited, frozen, no_multiplexing])
def test_what_may_be_another_connection_is_not_taken(
    laptop: Laptop, host: Host, mark: str, tunnel: Run, change: Callable[[Host, int], List[str]]
) -> None:
    ssh = ssh_of(mark)
    options = change(host, ssh)
    try:
        assert logins_of(host, lambda: laptop.run(*options, "host", "list")) == 1
    finally:
        os.kill(ssh, signal.SIGCONT)


def test_a_record_that_names_a_socket_which_is_gone_is_no_connection(laptop: Laptop, host: Host, tunnel: Run) -> None:
    (record,) = Path(laptop.environment["XDG_RUNTIME_DIR"], "rjupyter").glob("*.json")
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(dict(facts, control=facts["control"] + "x")))
    assert logins_of(host, lambda: laptop.run("host", "list")) == 1


def test_doctor_logs_in_for_the_login_is_what_it_looks_at(laptop: Laptop, host: Host, tunnel: Run) -> None:
    assert logins_of(host, lambda: laptop.run("host", "doctor")) == 1
