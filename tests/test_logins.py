"""Logging in, and again: what ssh wants from a person, how a login is refused, and what is lost meanwhile."""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
import shim_scheduler
from client import check_failure, is_up
from jupyters import standin
from notebooks import write_notebook
from private_machines import Cluster, find_obstacle
from private_pam import asks_pam
from proxy import Proxy
from sides import (
    BOTH_MODES,
    VENV_BIN,
    Host,
    Laptop,
    Run,
    User,
    processes_with,
    quiet_port,
    ssh_of,
    wait_until,
    words_of,
)

import rjupyter


def held(laptop: Laptop, *arguments: str, has_terminal: bool = False) -> Run:
    """Open, and return when the tunnel is up."""
    run = laptop.start("--local-port", str(quiet_port()), *arguments, "host", has_terminal=has_terminal)
    run.url()
    run.expect("To end it")
    return run


def ended(run: Run) -> None:
    run.interrupt()
    assert run.wait(30) == 0


def restart(host: Host, settings: str) -> None:
    """Let sshd go on with other settings; the connections end."""
    host.sshd.stop()
    host.sshd.end_connections()
    host.sshd.settings = settings
    host.sshd.start()


def notebook(laptop: Laptop, source: str, name: str = "n.ipynb") -> str:
    return write_notebook(laptop.home / name, source).name


# -- a touch ----------------------------------------------------------------------------------------------------------


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def security_key(path: Path) -> str:
    """Write the key file of a security key that nobody has; return its public half, as in authorized_keys."""
    kind, point, application = b"sk-ssh-ed25519@openssh.com", os.urandom(32), b"ssh:"
    public = string(kind) + string(point) + string(application)
    inner = b"\x01\x02\x03\x04" * 2 + string(kind) + string(point) + string(application)
    inner += b"\x01" + string(os.urandom(64)) + string(b"") + string(b"a stand-in")  # flags: presence is required
    inner += bytes(range(1, 1 + -len(inner) % 8))
    whole = b"openssh-key-v1\0" + string(b"none") + string(b"none") + string(b"") + struct.pack(">I", 1)
    whole += string(public) + string(inner)
    import base64

    text = base64.encodebytes(whole).decode()
    path.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n%s-----END OPENSSH PRIVATE KEY-----\n" % text)
    path.chmod(0o600)
    line = "%s %s\n" % (kind.decode(), base64.b64encode(public).decode())
    path.with_name(path.name + ".pub").write_text(line)
    return line


@pytest.fixture
def touched(laptop: Laptop, host: Host, directory: Path) -> Path:
    """A file that stands for a touch: a login by the security key takes until it is there.

    A stand-in for ssh-sk-helper and the key behind it: after the touch it fails, and ssh goes on to the user's key.
    """
    touch = directory / "touched"
    helper = laptop.home / "sk-helper"
    helper.write_text("#!/bin/sh\nwhile [ ! -e %s ] && kill -0 $PPID; do sleep 0.05; done\nexit 1\n" % touch)
    helper.chmod(0o755)
    line = security_key(laptop.home / "id_sk")
    (host.sshd.directory / "user_key.pub").write_text((host.sshd.directory / "user_key.pub").read_text() + line)
    text = Path(laptop.config).read_text()
    sk = '  IdentityFile "%s"\n' % (laptop.home / "id_sk")
    Path(laptop.config).write_text(text.replace("  IdentityFile", sk + "  IdentityFile", 1))
    laptop.environment.update(SSH_SK_HELPER=str(helper))
    return touch


@BOTH_MODES
def test_touch_of_a_stand_in_for_a_security_key_is_asked_for(laptop: Laptop, touched: Path, mode: List[str]) -> None:
    run = laptop.start(*mode, "host")
    run.expect("Confirm user presence for key ED25519-SK SHA256:", 40)
    touched.touch()
    assert is_up(run.url())


def test_touch_of_a_stand_in_for_a_security_key_is_asked_for_at_a_redial(
    laptop: Laptop, host: Host, touched: Path
) -> None:
    touched.touch()
    run = held(laptop, has_terminal=True)
    shown = run.text.count("Confirm user presence")
    touched.unlink()
    host.sshd.end_connections()
    run.expect("is lost")
    with contextlib.suppress(AssertionError):
        run.expect("Press Enter", 5)
        run.type("\n")
    run.expect("Confirm user presence", 40, times=shown + 1)
    touched.touch()
    run.expect("Connected to host again", 30)
    ended(run)


@pytest.mark.jupyter
@pytest.mark.parametrize("action", [["list"], ["execute", "n.ipynb"]], ids=lambda words: words[0])
def test_touch_of_a_stand_in_for_a_security_key_is_asked_for_by_each_action(
    laptop: Laptop, touched: Path, action: List[str]
) -> None:
    notebook(laptop, "print(1)")
    run = laptop.start("host", *action)
    run.expect("Confirm user presence", 40)
    touched.touch()
    assert run.wait() == 0, run.text


# -- refusals ---------------------------------------------------------------------------------------------------------


def offer_many_keys(laptop: Laptop, in_agent: bool = False) -> Dict[str, str]:
    """Let ssh offer eight keys that open nothing before the right one, from files or from a real agent."""
    keys = [str(laptop.home / ("key%d" % number)) for number in range(8)]
    for key in keys:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    text = Path(laptop.config).read_text()
    if not in_agent:
        lines = "".join('  IdentityFile "%s"\n' % key for key in keys)
        Path(laptop.config).write_text(text.replace("  IdentityFile", lines + "  IdentityFile", 1))
        return {}
    Path(laptop.config).write_text(text.replace("IdentitiesOnly yes", "IdentitiesOnly no"))
    socket = str(laptop.directory / "agent")
    environment = dict(laptop.environment, SSH_AUTH_SOCK=socket)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    AGENTS.append(agent)
    wait_until(lambda: os.path.exists(socket), "the agent")
    subprocess.run(["ssh-add", "-q", *keys], check=True, env=environment, capture_output=True)
    return {"SSH_AUTH_SOCK": socket}


AGENTS: List["subprocess.Popen[bytes]"] = []


@pytest.fixture(autouse=True)
def no_agent_left() -> Iterator[None]:
    yield
    while AGENTS:
        agent = AGENTS.pop()
        agent.kill()
        agent.wait()


@BOTH_MODES
@pytest.mark.parametrize("in_agent", [False, True], ids=["files", "agent"])
def test_too_many_keys_are_named_as_the_cause(
    laptop: Laptop, make_host: Callable[..., Host], in_agent: bool, mode: List[str]
) -> None:
    make_host(settings="MaxAuthTries 3")
    environment = offer_many_keys(laptop, in_agent)
    run = laptop.start(*mode, "host", has_terminal=False, **environment)
    run.wait()
    check_failure(run, 255, "Too many authentication failures", "IdentitiesOnly")


REFUSALS = {
    "too many keys": ("", "Too many authentication failures"),
    "DenyUsers": ("DenyUsers *", "Permission denied"),
    "another method": ("AuthenticationMethods publickey,password\nPasswordAuthentication yes", "Permission denied"),
    "no cipher in common": ("Ciphers aes128-ctr\nMACs hmac-sha1", "no matching"),
}


@BOTH_MODES
@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_every_kind_of_refusal_counts_unattended_and_the_third_ends_it(
    laptop: Laptop, host: Host, name: str, mode: List[str]
) -> None:
    settings, words = REFUSALS[name]
    if name == "no cipher in common":
        with open(laptop.config, "a") as config:
            config.write("  Ciphers aes256-gcm@openssh.com,aes256-ctr\n  MACs hmac-sha2-256\n")
    run = held(laptop, *mode)
    if name == "too many keys":
        settings = "MaxAuthTries 3"
        offer_many_keys(laptop)
    before = host.sshd.attempts()
    restart(host, settings)
    assert run.wait(60) == 255, run.text
    assert words in run.stderr
    assert host.sshd.attempts() - before <= 3 + 1  # the look whether sshd is up is one


@pytest.mark.waits
@pytest.mark.jupyter
def test_refused_login_among_others_that_time_out_counts_once(laptop: Laptop, host: Host) -> None:
    """One refusal, then a host that is not there for a while: that is not three refusals."""
    go = host.home / "go"
    proxy = Proxy(host.sshd.port)
    try:
        through = ["-p", str(proxy.port), "-o", "HostKeyAlias=[127.0.0.1]:%d" % proxy.target, "-o", "ConnectTimeout=1"]
        name = notebook(laptop, "import os, time\nwhile not os.path.exists(%r): time.sleep(0.05)" % str(go))
        run = laptop.start("--no-mux", *through, "host", "execute", name, has_terminal=False)
        run.expect("Executing")
        keys = host.sshd.directory / "user_key.pub"
        key = keys.read_text()
        keys.write_text("")
        failed = len(re.findall("Failed|closed by authenticating|\\[preauth\\]", host.sshd.log_text()))
        host.sshd.end_connections()

        def is_refused() -> bool:
            log = host.sshd.log_text()
            return len(re.findall("Failed|closed by authenticating|\\[preauth\\]", log)) > failed

        wait_until(is_refused, "one login is refused", 30)
        proxy.is_frozen = True
        keys.write_text(key)
        with contextlib.suppress(AssertionError):
            run.expect("^rjupyter: ", 25)  # it should not: several attempts time out meanwhile
        proxy.is_frozen = False
        go.touch()
        assert run.wait() == 0, run.text
    finally:
        proxy.close()


# -- an address to visit ----------------------------------------------------------------------------------------------

ADDRESS = "https://login.example.com/a/cae2d9c2019d"


class Visits:
    """A login that takes until someone has visited an address, as a tailnet's check mode has it, on a real sshd."""

    def __init__(self, directory: Path) -> None:
        self.is_wanted = directory / "wanted"
        self.banner = directory / "banner"
        self.script = directory / "held.sh"
        self.directory = directory

    def settings(self, grace_s: int = 120) -> str:
        self.banner.write_text("# This host requires an additional check.\n# To authenticate, visit: %s\n" % ADDRESS)
        self.script.write_text(
            "while [ -e %s ] && kill -0 $PPID; do sleep 0.05; done\ncat %s/host/user_key.pub\n"
            % (self.is_wanted, self.directory)
        )
        return (
            "AuthorizedKeysFile none\nAuthorizedKeysCommand /bin/sh %s\nAuthorizedKeysCommandUser root\n"
            "LoginGraceTime %d" % (self.script, grace_s)
        )


@pytest.fixture
def visits(directory: Path) -> Iterator[Visits]:
    if os.getuid() != 0:
        pytest.skip("only root's sshd can ask another program for keys")
    visits = Visits(directory)
    yield visits
    with contextlib.suppress(FileNotFoundError):
        visits.is_wanted.unlink()


@pytest.mark.parametrize("end", ["\n", ""], ids=["", "without a newline"])
@BOTH_MODES
def test_address_to_visit_is_shown_at_the_first_login(
    laptop: Laptop, make_host: Callable[..., Host], visits: Visits, end: str, mode: List[str]
) -> None:
    visits.is_wanted.touch()
    settings = visits.settings()
    visits.banner.write_text(visits.banner.read_text().rstrip("\n") + end)
    make_host(settings="%s\nBanner %s" % (settings, visits.banner))
    run = laptop.start(*mode, "host")
    run.expect(re.escape(ADDRESS), 40)
    visits.is_wanted.unlink()
    assert is_up(run.url())


def test_address_to_visit_is_shown_once_after_a_drop(
    laptop: Laptop, make_host: Callable[..., Host], visits: Visits
) -> None:
    host = make_host(settings=visits.settings())
    run = held(laptop, has_terminal=True)
    visits.is_wanted.touch()
    restart(host, visits.settings() + "\nBanner %s" % visits.banner)
    run.expect("is lost")
    found = run.expect(re.escape(ADDRESS) + "|Press Enter", 60).group()
    if found == "Press Enter":
        run.type("\n")
        run.expect(re.escape(ADDRESS), 60)
    visits.is_wanted.unlink()
    run.expect("Connected to host again", 40)
    assert run.text.count(ADDRESS) <= 2  # the one that was visited; and one before Enter, if that is how it goes
    ended(run)


def test_address_to_visit_that_nobody_sees_ends_as_a_refusal(
    laptop: Laptop, make_host: Callable[..., Host], visits: Visits
) -> None:
    host = make_host(settings=visits.settings(grace_s=4))
    run = held(laptop)
    visits.is_wanted.touch()
    before = host.sshd.attempts()
    restart(host, visits.settings(grace_s=4) + "\nBanner %s" % visits.banner)
    assert run.wait(60) == 255, run.text
    assert ADDRESS in run.stderr
    assert host.sshd.attempts() - before <= 3 + 1


def test_address_that_a_proxy_command_shows_reaches_the_person_after_a_drop(
    laptop: Laptop, host: Host, directory: Path
) -> None:
    """As the tunnels of several vendors have it: their own program says on stderr where to log in, and waits."""
    wanted = directory / "wanted"
    program = laptop.home / "access"
    script = (
        "import os, socket, sys, threading, time\n"
        "if os.path.exists(%r):\n    print('Open and log in: %s', file=sys.stderr, flush=True)\n"
        "parent = os.getppid()\nwhile os.path.exists(%r) and os.getppid() == parent:\n    time.sleep(0.05)\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "def copy():\n    while True:\n        data = s.recv(9999)\n"
        "        os.write(1, data) if data else os._exit(0)\n"
        "threading.Thread(target=copy, daemon=True).start()\n"
        "while True:\n    data = os.read(0, 65536)\n    s.sendall(data) if data else os._exit(0)\n"
    )
    program.write_text("#!%s -I\n%s" % (sys.executable, script % (str(wanted), ADDRESS, str(wanted))))
    program.chmod(0o755)
    with open(laptop.config, "a") as config:
        config.write("  ProxyCommand %s %%p\n" % program)
    run = held(laptop, has_terminal=True)
    wanted.touch()
    host.sshd.end_connections()
    run.expect("is lost")
    found = run.expect(re.escape(ADDRESS) + "|Press Enter", 60).group()
    if found == "Press Enter":
        run.type("\n")
        run.expect(re.escape(ADDRESS), 30)
    wanted.unlink()
    run.expect("Connected to host again", 40)
    ended(run)


# -- a greeting with an address in it ----------------------------------------------------------------------------------

GREETING = "Docs: https://hpc.example.org/docs\n** The server may need to be upgraded. See https://example.org/pq.html"


@BOTH_MODES
def test_greeting_with_an_address_is_no_question_when_logins_fail_for_load(
    laptop: Laptop, make_host: Callable[..., Host], visits: Visits, mode: List[str]
) -> None:
    settings = visits.settings(grace_s=3) + "\nBanner %s" % visits.banner
    visits.banner.write_text(GREETING + "\n")
    host = make_host(settings=settings)
    run = held(laptop, *mode)
    visits.is_wanted.touch()  # stands for a host that is slow to let anyone in, and then ends the connection
    before = host.sshd.attempts()
    host.sshd.end_connections()
    run.expect("is lost")
    wait_until(lambda: host.sshd.attempts() - before > rjupyter.DENIALS_MAX + 1 or run_ended(run), "several attempts")
    visits.is_wanted.unlink()
    run.expect("Connected to host again", 60)
    ended(run)


def run_ended(run: Run) -> bool:
    return os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.mark.parametrize("end", ["\n", ""], ids=["", "without a newline"])
@BOTH_MODES
def test_greeting_is_not_why_a_connection_is_lost(
    laptop: Laptop, make_host: Callable[..., Host], mark: str, directory: Path, end: str, mode: List[str]
) -> None:
    (directory / "banner").write_text("Welcome to the cluster.\n" + GREETING + end)
    make_host(settings="Banner %s" % (directory / "banner"))
    run = held(laptop, *mode, "-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no")
    for number in range(1, 4):
        os.kill(ssh_of(mark), signal.SIGKILL)  # it has no last words
        why = run.expect(r"is lost \((.*)\)\. Trying again", times=number).group(1)
        assert why == "ssh ended without a message"
        run.expect("Connected to host again", times=number)
    ended(run)


# -- turned away, and a way there that is dead -------------------------------------------------------------------------


@contextlib.contextmanager
def crowd(host: Host, count: int = 2) -> Iterator[None]:
    """Have so many logins under way meanwhile, as many as sshd takes."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", host.sshd.port), timeout=20))
            assert one.recv(4) == b"SSH-"
        yield


def turned_away(host: Host) -> int:
    return len(re.findall("drop connection", host.sshd.log_text()))


@BOTH_MODES
@pytest.mark.parametrize("action", [[], ["list"]], ids=["open", "list"])
def test_login_that_is_turned_away_for_others_is_tried_again(
    laptop: Laptop, make_host: Callable[..., Host], action: List[str], mode: List[str]
) -> None:
    host = make_host(settings="MaxStartups 2:100:2")
    with crowd(host):
        run = laptop.start(*mode, "host", *action, has_terminal=False)
        run.expect("^host turns logins away, perhaps for too many at once. Trying again.$")
    if action:
        assert run.wait() == 0, run.text
    else:
        assert is_up(run.url())
    assert run.text.count("turns logins away") == 1


def test_login_that_is_always_turned_away_ends_with_one_failure(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    host = make_host(settings="MaxStartups 2:100:2")
    with crowd(host):
        run = laptop.run("host", "list")
    check_failure(run, 255, "kex_exchange_identification: ", "in a minute: sshd has too many logins")
    assert turned_away(host) == rjupyter.CROWDED_TRIES


@BOTH_MODES
def test_many_hosts_behind_one_bastion_are_all_reached(
    laptop: Laptop, make_host: Callable[..., Host], mode: List[str]
) -> None:
    """As with MaxStartups 10:30:100 and forty of them: sshd turns away whom it has no room for."""
    bastion = make_host(name="bastion", settings="MaxStartups 2:100:2")
    host = make_host(name="host")
    names = ["host%d" % number for number in range(4)]
    text = host.sshd.config.read_text().replace("Host host\n", "Host %s\n  ProxyJump bastion\n" % " ".join(names))
    Path(laptop.config).write_text(bastion.sshd.config.read_text() + text)
    assert Path(laptop.config) == host.sshd.config
    with crowd(bastion):
        run = laptop.start(*mode, ",".join(names), "list", "--json", has_terminal=False)
        wait_until(lambda: turned_away(bastion) >= 2, "some are turned away")
    assert run.wait() == 0, run.text
    found = [event for event in map(json.loads, run.stdout.splitlines()) if event["event"] == "host"]
    assert [(row["host"], row["is_reached"], row["why"]) for row in found] == [(name, True, None) for name in names]


IAP = "ERROR: (gcloud.compute.start-iap-tunnel) Error while connecting [4003: 'failed to connect to backend']."
SSM = "An error occurred (TargetNotConnected) when calling the StartSession operation: i-0abc is not connected."
DEAD = {
    "iap": ('echo "%s" >&2; exit 1' % IAP, IAP),
    "ssm": ("echo; echo '%s' >&2; exit 254" % SSM, SSM),
    "two lines": ("echo 'Please log in again:' >&2; echo '  tsh login' >&2; exit 1", "Please log in again:"),
    "no program": ("exec /nowhere/cloud ssh-proxy", "/nowhere/cloud"),
    "no word": ("exit 1", "does its ProxyCommand work?"),
}


@BOTH_MODES
@pytest.mark.parametrize("name", sorted(DEAD))
def test_proxy_command_that_is_dead_is_told_in_its_own_words(
    laptop: Laptop, host: Host, name: str, mode: List[str]
) -> None:
    script, words = DEAD[name]
    program = laptop.home / "proxy"
    program.write_text("#!/bin/sh\n%s\n" % script)
    program.chmod(0o755)
    with open(laptop.config, "a") as config:
        config.write("  ProxyCommand %s\n" % program)
    run = laptop.run(*mode, "host", "list")
    check_failure(run, 255, words, "host true")
    assert "too many logins" not in run.stderr
    if name != "no word":
        assert "turns logins away" not in run.stderr  # which nobody is told to wait for


JUMPS = {
    "host": "open failed: connect failed: Connection refused",
    "nohost.invalid": "Could not resolve hostname nohost.invalid",
}


@BOTH_MODES
@pytest.mark.parametrize("jump", sorted(JUMPS))
def test_jump_host_that_does_not_get_there_is_no_crowd(laptop: Laptop, host: Host, jump: str, mode: List[str]) -> None:
    text = host.sshd.config.read_text()
    text += text.replace("Host host\n", "Host behind\n  ProxyJump %s\n" % jump).replace(str(host.sshd.port), "1")
    Path(laptop.config).write_text(text)
    run = laptop.run(*mode, "behind", "list")
    check_failure(run, 255, JUMPS[jump], "behind true")
    assert "turns logins away" not in run.stderr


@BOTH_MODES
@pytest.mark.parametrize("hops", [["one"], ["one", "two"]], ids=len)
def test_jump_host_is_sent_no_empty_password_where_nobody_can_answer(
    laptop: Laptop, make_host: Callable[..., Host], hops: List[str], mode: List[str]
) -> None:
    """The last of the jump hosts has no key of ours first, and takes passwords; then it lets us through."""
    *_, last, host = [make_host(name=name, settings="PasswordAuthentication yes") for name in (*hops, "host")]
    texts = [(host.sshd.directory.parent / name / "ssh_config").read_text() for name in (*hops, "host")]
    Path(laptop.config).write_text("".join(texts))
    keys = last.sshd.directory / "user_key.pub"
    key = keys.read_text()
    keys.write_text("")
    check_failure(laptop.run(*mode, "-J", ",".join(hops), "host", "list"), 255, "Permission denied (")
    assert "password" not in last.sshd.log_text()
    keys.write_text(key)
    run = laptop.run(*mode, "-J", ",".join(hops), "host", "list")
    assert (run.status, last.sshd.logins(), host.sshd.logins()) == (0, 1, 1), run.text


# -- a connection that is lost before there is a result ---------------------------------------------------------------


def slow_to_start(host: Host) -> Path:
    """Let Jupyter take until a file is there; return the file."""
    go = host.home / "go"
    (host.home / ".jupyter").mkdir(exist_ok=True)
    text = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.05)\n" % str(go)
    (host.home / ".jupyter/jupyter_server_config.py").write_text(text)
    return go


@pytest.mark.jupyter
@BOTH_MODES
def test_connection_lost_while_jupyter_starts(laptop: Laptop, host: Host, mode: List[str]) -> None:
    go = slow_to_start(host)
    run = laptop.start(*mode, "host", has_terminal=False)
    wait_until(host.servers, "it is launched")
    host.sshd.end_connections()
    with contextlib.suppress(AssertionError):
        run.expect("is lost|^rjupyter: ", 20)
    go.touch()
    assert is_up(run.url())
    assert len(host.servers()) == 1


@pytest.mark.jupyter
def test_sshd_away_for_a_while_while_jupyter_starts(laptop: Laptop, host: Host) -> None:
    go = slow_to_start(host)
    run = laptop.start("host", has_terminal=False)
    wait_until(host.servers, "it is launched")
    host.sshd.stop()
    host.sshd.end_connections()
    run.expect("is lost", 20)
    go.touch()
    host.sshd.start()
    assert is_up(run.url())
    assert len(host.servers()) == 1


@pytest.mark.jupyter
def test_connection_lost_as_an_execution_is_submitted(laptop: Laptop, host: Host, mark: str) -> None:
    """At any moment of the start: one run, and its result."""
    (host.home / "ran").write_text("")
    name = notebook(laptop, "import time\nopen(%r, 'a').write('x')\ntime.sleep(3)" % str(host.home / "ran"))
    run = laptop.start("host", "execute", name, has_terminal=False)
    wait_until(lambda: list(host.home.glob(".local/state/rjupyter/runs/*")), "it is there")
    host.sshd.end_connections()
    assert run.wait() == 0, run.text
    assert (host.home / "ran").read_text() == "x"
    assert (laptop.home / "n.executed.ipynb").exists()


@pytest.mark.nbclient
def test_agent_that_is_killed_leaves_word_of_the_execution_that_goes_on(laptop: Laptop, host: Host, mark: str) -> None:
    name = notebook(laptop, "import os, time\nwhile not os.path.exists(%r): time.sleep(0.05)" % str(host.home / "go"))
    run = laptop.start("host", "execute", name, has_terminal=False)
    run.expect("Executing")
    (directory,) = host.home.glob(".local/state/rjupyter/runs/*")

    def kill_agent() -> bool:
        for pid, words in processes_with(mark).items():
            if " -IS -c " in words and "sys.stdin" in words:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return run_ended(run)

    wait_until(kill_agent, "it ends, whichever agent was killed", 30)
    assert run.wait() == 1, run.text
    assert (
        re.search("the agent (did not run on host|on host ended early)", run.stderr)
        and "the same command again" not in run.stderr
    )
    again = run.expect(r"keeps running\.\s+To follow it again: (.+ --attach %s)\s" % directory.name).group(1)
    (host.home / "go").touch()
    assert laptop.run(*words_of(again)[2:]).status == 0


@pytest.fixture
def queue(
    directory: Path, make_host: Callable[..., Host], request: pytest.FixtureRequest
) -> Iterator[Tuple[Host, Path]]:
    """A login node with the shims of PBS, whose jobs wait for the file `go` and then run on another machine."""
    obstacle = find_obstacle(["csh"])
    if obstacle:
        pytest.skip(obstacle)
    shims = directory / "shims"
    cluster = Cluster(directory / "cluster", ["node1"])
    try:
        cluster.start_machines()
        binaries = shim_scheduler.install(shims, "pbs", cluster.machines["node1"].enter())
        jupyter = VENV_BIN if request.node.get_closest_marker("jupyter") else standin()
        host = make_host(path="%s:%s" % (binaries, jupyter), prefix=cluster.login_prefix)
        (host.home / "my work").mkdir()
        yield host, shims
        for job in shims.glob("*.job"):
            (job / "ended").touch()
    finally:
        cluster.stop()


def submissions(shims: Path) -> int:
    return len([line for line in (shims / "asked").read_text().splitlines() if json.loads(line)[0] == "qsub"])


@BOTH_MODES
def test_connection_lost_while_a_job_is_pending(laptop: Laptop, queue: Tuple[Host, Path], mode: List[str]) -> None:
    host, shims = queue
    run = laptop.start(*mode, "--submit", "qsub {script}", "host:my work", has_terminal=False)
    wait_until(lambda: shim_scheduler.jobs(shims), "it is submitted")
    run.expect("41", 30)
    host.sshd.end_connections()
    with contextlib.suppress(AssertionError):
        run.expect("is lost|^rjupyter: ", 20)
    (shims / "go").touch()
    assert is_up(run.url())
    assert submissions(shims) == 1
    assert laptop.run("host", "stop", "--all").status == 0


@pytest.mark.jupyter
def test_connection_lost_while_the_job_of_an_execution_is_pending(laptop: Laptop, queue: Tuple[Host, Path]) -> None:
    host, shims = queue
    name = notebook(laptop, "open(%r, 'a').write('x')" % str(host.home / "ran"))
    run = laptop.start("--submit", "qsub {script}", "host", "execute", name, has_terminal=False)
    wait_until(lambda: shim_scheduler.jobs(shims), "it is submitted")
    run.expect("41", 30)
    host.sshd.end_connections()
    with contextlib.suppress(AssertionError):
        run.expect("is lost|^rjupyter: ", 20)
    (shims / "go").touch()
    status = run.wait()
    again = laptop.run("--submit", "qsub {script}", "host", "execute", name) if status else run
    assert status == 0, (run.text, again.text, submissions(shims))
    assert submissions(shims) == 1 and (host.home / "ran").read_text() == "x"
    assert (laptop.home / "n.executed.ipynb").exists()


def test_connection_lost_while_the_log_is_followed(laptop: Laptop, host: Host) -> None:
    ended(held(laptop))
    follow = laptop.start("host", "logs", "-f", has_terminal=False)
    follow.expect("is running at")
    host.sshd.end_connections()
    follow.expect("Connected to host again", 30)
    (record,) = host.servers()
    os.killpg(record["pid"], signal.SIGTERM)
    assert follow.wait(30) == 0, follow.text
    assert follow.stdout.count("is running at") == 1


# -- the user's own master --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sessions", [1, 2])
@pytest.mark.parametrize("action", [[], ["list"]], ids=["open", "list"])
def test_own_master_that_has_no_session_left_is_not_the_way(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, sessions: int, action: List[str]
) -> None:
    host = make_host(settings="MaxSessions %d" % sessions)
    control = directory / "mine"
    with open(laptop.config, "a") as config:
        config.write("  ControlPath %s\n  ControlMaster auto\n" % control)
    shells = []
    try:
        for _ in range(sessions):
            argv = ["ssh", "-F", laptop.config, "host", "exec cat"]
            pipe = subprocess.PIPE
            shells.append(subprocess.Popen(argv, stdin=pipe, stdout=pipe, bufsize=0, env=laptop.environment))
            stdin, stdout = shells[-1].stdin, shells[-1].stdout
            assert stdin and stdout
            stdin.write(b"ready\n")
            assert stdout.readline() == b"ready\n"
        logins = host.sshd.logins()
        run = laptop.start("host", *action, has_terminal=False)
        if action:
            assert run.wait() == 0, run.text
        else:
            assert is_up(run.url())
        assert host.sshd.logins() == logins + 1
        assert all(shell.poll() is None for shell in shells)
        laptop.end_runs()
    finally:
        for shell in shells:
            shell.terminate()
            shell.communicate()


# -- accounts that run nothing ----------------------------------------------------------------------------------------

SHELLS = {
    "/usr/sbin/nologin": "This account is currently not available.",
    "/usr/bin/git-shell": "fatal: unrecognized command",
    "/bin/false": "",
}


@BOTH_MODES
@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_account_that_runs_nothing_is_told_in_the_hosts_words_alone(
    laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host], shell: str, mode: List[str]
) -> None:
    if not Path(shell).exists():
        pytest.skip("there is no " + shell)
    make_host(user=make_user(shell))
    run = laptop.run(*mode, "host")
    check_failure(run, run.status or 1, SHELLS[shell])
    assert "start-up file" not in run.stderr, run.stderr


@pytest.mark.parametrize("words", ["This service allows sftp connections only.", "Under maintenance until 18:00."])
def test_command_that_sshd_forces_is_told_in_the_hosts_words_alone(
    laptop: Laptop, make_host: Callable[..., Host], words: str
) -> None:
    make_host(settings="ForceCommand echo '%s' >&2; exit 1" % words)
    run = laptop.run("host")
    check_failure(run, run.status or 1, words)
    assert "start-up file" not in run.stderr, run.stderr


@pytest.mark.parametrize("action", [[], ["list"]], ids=["open", "list"])
def test_password_that_has_expired_is_said_with_the_ssh_that_changes_it(
    laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host], action: List[str]
) -> None:
    user = make_user("/bin/bash")
    subprocess.run(["chpasswd"], input="%s:%s\n" % (user.name, os.urandom(8).hex()), text=True, check=True)
    subprocess.run(["chage", "-d", "0", user.name], check=True)
    host = make_host(user=user)
    service = "auth required pam_permit.so\naccount required pam_unix.so\npassword required pam_unix.so\n"
    with asks_pam(host, service + "session required pam_permit.so\n"):  # sshd alone knows nothing of it
        assert "expired" in host.sshd.ssh("true").stderr
        run = laptop.run("host", *action)
    check_failure(run, run.status or 1, "expired")
    assert "start-up file" not in run.stderr, run.stderr
    try_ = re.search(r"try: (ssh .*)", run.stderr)
    assert try_ and try_.group(1).split("   ")[0].endswith(" host"), run.stderr  # a shell, not a command
