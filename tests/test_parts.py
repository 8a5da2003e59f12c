"""The parts that need no host: parsing, checking, quoting, ports."""

import contextlib
import datetime
import errno
import getpass
import io
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from jupyters import interpreters

import rjupyter


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("12\xa0% \u3000\u6771 \U0001f468\u200d\U0001f4bb \ue0b0 a\xadb\t\n", None),
        ("a\x1b[2Jb\x9b\x07\r\n", "a?[2Jb??\n"),
        ("a\u202eb\u2066\u2028\u200f\ud800", "a?b????"),
    ],
)
def test_what_drives_a_terminal_is_taken_out_and_nothing_else(text: str, shown: Optional[str]) -> None:
    assert rjupyter.printable(text) == (text if shown is None else shown)


def test_configuration_of_windows_and_a_switch_that_is_off(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("\ufeff[*]\r\ninstall = no\r\nno-browser = no\r\nlab = no\r\n", encoding="utf-8", newline="")
    found = {name: value for name, (value, _) in rjupyter.config_defaults(str(file), "gpu1").items()}
    assert found == {"may_install": False, "no_browser": False, "app": ""}, found


def test_line_to_type_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher of pip is called without its .exe, and no shell there knows a single quote."""
    (tmp_path / "rjupyter.exe").touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "rjupyter")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        line = rjupyter.command_line("gpu1:my work", "stop")
    assert line == 'rjupyter.exe "gpu1:my work" stop'


def test_time_of_day_that_has_not_come_is_yesterdays(monkeypatch: pytest.MonkeyPatch) -> None:
    midnight = datetime.datetime.combine(datetime.date.today(), datetime.time(0, 30)).timestamp()
    monkeypatch.setattr("time.time", lambda: midnight)
    assert rjupyter._moment("00:10") == midnight - 20 * 60
    assert rjupyter._moment("23:00") == midnight - 90 * 60


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("gpu1", "gpu1", None),
        ("ana@gpu1", "ana@gpu1", None),
        ("gpu1:work", "gpu1", "work"),
        ("gpu1:", "gpu1", ""),
        ("gpu1:a:b", "gpu1", "a:b"),
        ("gpu1:/a b/c", "gpu1", "/a b/c"),
        ("gpu1:new\nline", "gpu1", "new\nline"),
        ("ana@[::1]:work", "ana@::1", "work"),
        ("[fe80::1%eth0]", "fe80::1%eth0", None),
        ("::1", "::1", None),
        ("ana@::1", "ana@::1", None),
        ("ssh://ana@gpu1:2222", "ssh://ana@gpu1:2222", None),
        ("ssh://ana@gpu1:2222/", "ssh://ana@gpu1:2222", None),
        ("ssh://gpu1/a%20b", "ssh://gpu1", "a b"),
        ("ssh://gpu1//abs", "ssh://gpu1", "/abs"),
    ],
)
def test_destination(text: str, host: str, path: Optional[str]) -> None:
    assert rjupyter.parse_destination(text) == (host, path)


@pytest.mark.parametrize(
    "text", ["", ":work", "-oProxyCommand=x", "ana@-x", "ssh://-x", "a b", "a\nb:x", "ssh://", "a/b", "[]:x", "h:a\0b"]
)
def test_destination_that_ssh_could_take_for_something_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|NUL"):
        rjupyter.parse_destination(text)


REPLY: Dict[str, Any] = {
    "id": "07af",
    "pid": 12,
    "app": "notebook",
    "version": "7.0",
    "host": "127.0.0.1",
    "port": 8888,
    "sock": "",
    "token": "abc",
    "base_url": "/",
    "root_dir": "/home/ana",
    "file": "",
    "is_secure": False,
    "has_password": False,
    "local_port": 8889,
    "node": "gpu1",
    "is_launched": True,
    "is_only": True,
    "start_s": 1.5,
}


@pytest.mark.parametrize(
    ("change", "url"),
    [
        ({}, "http://127.0.0.1:8889/tree?token=abc"),
        ({"app": "lab"}, "http://127.0.0.1:8889/lab?token=abc"),
        ({"file": "a b#%.ipynb"}, "http://127.0.0.1:8889/notebooks/a%20b%23%25.ipynb?token=abc"),
        ({"file": "ü\n.ipynb", "app": "lab"}, "http://127.0.0.1:8889/lab/tree/%C3%BC%0A.ipynb?token=abc"),
        ({"file": "\udcff.py"}, "http://127.0.0.1:8889/edit/%FF.py?token=abc"),
        ({"base_url": "/user/ana/", "is_secure": True}, "https://127.0.0.1:8889/user/ana/tree?token=abc"),
        ({"token": "a&b=c d"[:5]}, "http://127.0.0.1:8889/tree?token=a%26b%3Dc"),
        ({"token": ""}, "http://127.0.0.1:8889/tree"),
    ],
)
def test_url(change: Dict[str, Any], url: str) -> None:
    assert rjupyter.Server.read({**REPLY, **change}).url(8889) == url


@pytest.mark.parametrize(
    "change",
    [
        {"port": "8888"},
        {"host": "a b"},
        {"host": "-x"},
        {"port": 0},
        {"port": 70000},
        {"port": True},
        {"token": "a b"},
        {"token": "a\r\nHost: x"},
        {"token": None},
        {"base_url": "evil.example.org/"},
        {"base_url": "//evil.example.org/"},
        {"base_url": "/a/../?"},
        {"app": "vim"},
        {"id": "../../x"},
        {"pid": None},
    ],
)
def test_reply_that_makes_no_sense(change: Dict[str, Any]) -> None:
    with pytest.raises(rjupyter.Failure, match="makes no sense"):
        rjupyter.Server.read({**REPLY, **change})


def test_text_from_the_host_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    failure = rjupyter.Failure("a\033]0;title\007", "b\x9b2J\u202e", "c\r\nd")
    rjupyter.Messages().failure(failure)
    assert stream.getvalue() == "rjupyter: a?]0;title?\n  why: b?2J?\n  try: c\n       d\n"


def test_port_in_time_wait_is_free_and_a_taken_one_is_not() -> None:
    listener = rjupyter.listen_on(0)
    port = listener.getsockname()[1]
    assert rjupyter.find_free_port(port) != port
    client = socket.create_connection(("127.0.0.1", port))
    connection, _ = listener.accept()
    connection.close()  # this side closes first, so it is the one in TIME_WAIT
    client.recv(1)
    client.close()
    listener.close()
    with pytest.raises(OSError, match="in use"), socket.socket() as plain:
        plain.bind(("127.0.0.1", port))
    assert rjupyter.find_free_port(port) == port


def test_remote_command_is_valid_in_every_shell() -> None:
    command = rjupyter.agent_command()
    assert not re.search(r"[!\\\n]", command)
    assert command.count("'") == 2
    assert len(command) < 1000  # old csh takes 1024 characters in a word


def agent_input(command: str) -> bytes:
    request = rjupyter.Request(nonce="n", action="open", path="nowhere")
    return rjupyter.AgentFile().input_of(command, request, is_whole=True)


@pytest.mark.parametrize("minor", sorted(interpreters()))
def test_agent_answers_under_python_3(minor: int, tmp_path: Path) -> None:
    answer = subprocess.run(
        [interpreters()[minor], "-W", "error", "-IS", "-c", rjupyter.BOOTSTRAP],
        input=agent_input(""),
        capture_output=True,
        env={"HOME": str(tmp_path), "LC_ALL": "C"},
    )
    hello, reply = answer.stdout.decode().splitlines()
    assert '"kind": "hello"' in hello
    assert "no such directory on the host" in reply
    assert answer.stderr == b""


# What ssh says as it gives up (the sources of OpenSSH 10.5), and a word of what is then said to be tried, or why.
LAST_WORDS = [
    ("@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @", "ssh-keygen -R"),
    ("Host key for gpu1 has changed and you have requested strict checking.", "ssh-keygen -R"),
    ("@       WARNING: REVOKED HOST KEY DETECTED!               @", "RevokedHostKeys"),
    ("Host key verification failed.", "it shows the key and asks"),
    ("Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures", "IdentitiesOnly"),
    ("Received disconnect from 192.0.2.1 port 22:14: No supported authentication methods available", "true"),
    ("Unable to negotiate with 192.0.2.1 port 22: no matching host key type found. Their offer: ssh-rsa", "Kex"),
    ("Protocol major versions differ: 2 vs. 1", "the port of its sshd"),
    ('sign_and_send_pubkey: signing failed for ED25519-SK "/home/ana/.ssh/id_sk": device not found', "touch the key"),
    ('Load key "/home/ana/.ssh/id_ed25519": bad permissions', "chmod 600"),
    ("ana@gpu1: Permission denied (publickey,password).", "a key without a question"),
    ("Authentication failed.", "ssh -v gpu1 true"),
    ("Your account has expired; please contact your system administrator.", "administrator"),
    ("ssh: connect to host gpu1 port 22: Connection refused", "is sshd running there"),
    ("Connection timed out during banner exchange", "says nothing"),
    ("Too many logins for 'ana'.", "end other sessions"),
    ("kex_exchange_identification: Connection closed by remote host", "in a minute"),
    ("ssh: Could not resolve hostname gpu1: Name or service not known", "true"),
    ("ssh_dispatch_run_fatal: Connection to 192.0.2.1 port 22: message authentication code incorrect", "true"),
    ("kex_exchange_identification: banner line contains invalid characters", "true"),
    ("banner exchange: Connection to 192.0.2.1 port 22: could not read protocol version", "true"),
    ("mux_client_request_session: session request failed: Session open refused by peer", "true"),
    ('unix_listener: path "/a/long/one" too long for Unix domain socket', "true"),
    ("Could not request local forwarding.", "true"),
    ("Timeout, server gpu1 not responding.", "true"),
    ("Connection closed by 192.0.2.1 port 22", "true"),
    ("Connection to gpu1 closed by remote host.", "true"),
    ("Received disconnect from 192.0.2.1 port 22:11: disconnected by user", "true"),
    ("client_loop: send disconnect: Broken pipe", "true"),
]


@pytest.mark.parametrize(("line", "advice"), LAST_WORDS)
def test_what_ssh_says_as_it_ends_is_explained_whatever_a_host_says_before(line: str, advice: str) -> None:
    ssh = rjupyter.Ssh("gpu1", [], False, rjupyter.Messages(quiet=True), False)
    failure = ssh.connect_failure(["Welcome to gpu1", line, "Connection closed by 192.0.2.1 port 22"])
    assert advice in failure.why + failure.try_, failure
    assert advice != "true" or line in failure.why, failure


def test_a_key_to_remove_has_the_name_that_ssh_knows_it_by() -> None:
    """Where no line of ssh itself says how, as only Debian's does."""
    ssh = rjupyter.Ssh("gpu1", [], False, rjupyter.Messages(quiet=True), False)
    words = ["Host key for [10.0.0.5]:2222 has changed and you have requested strict checking."]
    failure = ssh.connect_failure([*words, "Host key verification failed."])
    assert "ssh-keygen -R '[10.0.0.5]:2222'" in failure.why + failure.try_, failure


@pytest.mark.parametrize("words", ["Confirm user presence for key ED25519-SK", "visit https://login.example/x"])
def test_what_a_login_waits_for_is_said_also_under_q(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    ssh = rjupyter.Ssh("gpu1", [], True, rjupyter.Messages(quiet=True), False)
    ssh.hear_login(("stdout", "Welcome to gpu1"))
    ssh.hear_login(("stdout", words))
    assert capsys.readouterr().err == words + "\n"


def test_a_console_does_not_name_the_kernel_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [{"path": path, "type": kind, "kernel": {"id": "k"}} for path, kind in
                [("a.ipynb", "notebook"), ("console-1", "console")]]  # fmt: skip
    monkeypatch.setattr("rjupyter.ask_for_list", lambda info, path: list(sessions))
    assert rjupyter.notebooks_of(None) == {"k": "a.ipynb"}


def test_what_is_kept_of_a_job_that_is_forgotten_has_ended() -> None:
    record: Any = types.SimpleNamespace(node="another", pid=0, identity="", job="", wrapper="")
    assert not rjupyter.place_of(record).is_known
    record.job = "j000f"
    place = rjupyter.place_of(record)
    assert place.is_known and not place.is_running()


def test_a_tar_of_heads_alone_is_damaged(tmp_path: Path) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type = tarfile.GNUTYPE_LONGNAME
    head = member.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(rjupyter.Wrong):
        rjupyter.unpack(io.BytesIO(head * 3000), str(tmp_path), True, ["*"])


def test_a_systems_directory_stays_where_the_terminals_path_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a module put before it, as a gcc, is what a kernel finds."""
    monkeypatch.setenv("PATH", "/apps/gcc/12/bin:/usr/bin:/bin")
    paths = [
        rjupyter.new_launcher("notebook", [place + "/jupyter-notebook"], "").environment["PATH"].split(":")[0]
        for place in ("/usr/bin", "/usr/local/bin", "/opt/conda/bin")
    ]
    assert paths == ["/apps/gcc/12/bin", "/usr/local/bin", "/opt/conda/bin"]


def test_a_project_of_roots_own_outside_of_its_home(tmp_path: Path) -> None:
    """Up to the last directory that is the user's alone, which /tmp is not."""
    (tmp_path / "proj/.venv").mkdir(parents=True)
    (tmp_path / "proj/notebooks").mkdir()
    tmp_path.chmod(0o777)
    (tmp_path / ".venv").mkdir()
    for path in (tmp_path / "proj/.venv", tmp_path / ".venv"):
        (path / "pyvenv.cfg").write_text("")
    found = [place for _, place in rjupyter.environments_of_project(str(tmp_path / "proj/notebooks"))]
    assert str(tmp_path / "proj/.venv") in found and str(tmp_path / ".venv") not in found


@pytest.mark.parametrize(
    ("behind", "can_ask", "seconds"),
    [
        ("", False, 15),
        ("", True, 15),
        ("proxyjump", False, 15),
        ("proxyjump", True, 120),
        ("proxycommand", False, 60),  # it may start the host
        ("proxycommand", True, 120),
    ],
)
def test_patience_with_a_login(behind: str, can_ask: bool, seconds: int) -> None:
    ssh = rjupyter.Ssh("gpu1", [], can_ask, rjupyter.Messages(quiet=True), False)
    ssh.config = {behind: "bastion"}
    assert "ConnectTimeout=%d" % seconds in ssh.patience()


def test_way_to_a_node_asks_nobody_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The login node would be offered an empty password, three times, at each attempt."""
    monkeypatch.setattr(rjupyter, "has_terminal", lambda: False)
    for can_ask, ways in ((True, []), (False, ["ProxyCommand=ssh -o BatchMode=yes -W %h:%p login"])):
        ssh = rjupyter.Ssh("node1", [], can_ask, rjupyter.Messages(quiet=True), False)
        ssh.jump = ["ssh", "-W", "%h:%p", "login"]
        assert [word for word in ssh.patience() if word.startswith("ProxyCommand")] == ways


JUMPS = {
    "bastion": (getpass.getuser(), "bastion", "22"),
    "bob@bastion:2222": ("bob", "bastion", "2222"),
    "bob@example.org@bastion": ("bob@example.org", "bastion", "22"),
    "bob+gpu1@[2001:db8::1]:2222": ("bob+gpu1", "2001:db8::1", "2222"),
}


@pytest.mark.parametrize("jump", sorted(JUMPS))
def test_jump_host_is_the_one_that_ssh_would_take(jump: str) -> None:
    def config(*words: str) -> Dict[str, str]:
        text = subprocess.run(["ssh", "-F", "none", "-G", *words], capture_output=True, text=True).stdout
        return dict(line.split(" ", 1) for line in text.splitlines())

    ssh = rjupyter.Ssh("gpu1", ["-F", "none"], False, rjupyter.Messages(quiet=True), False)
    ssh.config = config("-J", jump, "gpu1")
    command = ssh.patience()[-1].replace("%h", "gpu1").replace("%p", "22")
    found = config(*shlex.split(command)[1:])
    assert (found["user"], found["hostname"], found["port"]) == JUMPS[jump]


class EndsBehindOurBack(rjupyter.Child):
    """A child that replies and ends when a first wait for it has just run out."""

    has_run_out = False

    def next_line(self, timeout_s: float) -> Optional[Tuple[str, str]]:
        if not self.has_run_out:
            self.has_run_out = True
            self.process.wait(30)
            return None
        return super().next_line(timeout_s)


class StandInForSsh(rjupyter.Ssh):
    """A connection that is none: its sessions run here."""

    def _read_config(self) -> None:
        pass

    def session(self, command: str) -> rjupyter.Child:
        return EndsBehindOurBack(["/bin/sh", "-c", command], stdin=subprocess.PIPE)


def test_stub_of_ssh_whose_reply_comes_as_a_wait_for_it_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    messages = rjupyter.Messages(quiet=True)
    agent = rjupyter.Agent(StandInForSsh("host", [], False, messages, False), messages)
    assert agent.ask(rjupyter.Request(action="list"), rjupyter.reply_of(runs="List[RunView]")).runs == []


class SlowSsh(StandInForSsh):
    """One whose host says this, and then goes on so for a while, a little at a time."""

    says = ""

    def session(self, command: str) -> rjupyter.Child:
        script = "import sys, time\nnonce = sys.argv[1]\n%s" % self.says
        return rjupyter.Child([sys.executable, "-IS", "-c", script, "nonce"], stdin=subprocess.PIPE)


# A message that is long, and its link slow; and what is none, by lines, by a piece of one, and beside it.
SLOW = {
    "a message": ("""'nonce {"kind": "reply", "reply": {"count": 3'""", "'   '", "print('}}')", ""),
    "lines": ("'hello'", "'a line\\n'", "", "said nothing for 2 s"),
    "a line": ("'hello'", "'a'", "", "said nothing for 2 s"),
    "after it has begun": (
        """'nonce {"kind": "progress", "text": ""}\\n'""",
        "'a line\\n'",
        "",
        "said nothing for 2 s",
    ),
}


@pytest.mark.parametrize("name", sorted(SLOW))
def test_any_byte_of_a_message_is_life_and_noise_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, last, why = SLOW[name]
    write = "sys.stdout.write(%s) and sys.stdout.flush()"
    monkeypatch.setattr(os, "urandom", lambda count: b"")
    monkeypatch.setattr(rjupyter.Request, "but", lambda request, **_: request)
    messages = rjupyter.Messages(quiet=True)
    ssh = SlowSsh("host", [], False, messages, False)
    ssh.says = "\n".join([write % first, "for _ in range(20):", "    time.sleep(0.2)", "    " + write % again, last])
    agent = rjupyter.Agent(ssh, messages)
    monkeypatch.setattr(rjupyter.AgentFile, "input_of", lambda *_: b"")
    request = rjupyter.Request(action="stop", nonce="nonce")
    if not why:
        assert agent.ask(request, rjupyter.reply_of(count="int"), silence_s=2).count == 3
        return
    with pytest.raises(rjupyter.NotConnected, match="no answer") as failed:
        agent.ask(request, rjupyter.Record, silence_s=2)
    assert why in failed.value.why


def test_directory_into_which_something_is_written_as_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "wceb2"
    directory.mkdir()
    (directory / "wrapper.json").touch()
    rmdir = os.rmdir

    def late(path: Any, **more: Any) -> None:
        monkeypatch.undo()
        (directory / "looked").touch()
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", late)
    rjupyter.remove_tree(str(directory))
    assert os.rmdir is rmdir and not directory.exists()


@pytest.mark.parametrize("mode", [0o1777, 0o2770])
def test_directory_that_is_shared_with_others_is_not_taken_for_ours(tmp_path: Path, mode: int) -> None:
    """As /tmp is, or a group's: nor is it closed to them."""
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match="is shared with others"):
        rjupyter.private_dir(str(tmp_path))
    assert tmp_path.stat().st_mode & 0o7777 == mode and not list(tmp_path.iterdir())


@pytest.mark.skipif(6 not in interpreters(), reason="needs Python 3.6")
def test_environment_beyond_ascii_of_condas_list_is_found_by_python_3_6(tmp_path: Path) -> None:
    (tmp_path / "\u00dcmwelt").mkdir()
    (tmp_path / ".conda").mkdir()
    (tmp_path / ".conda/environments.txt").write_text("%s/\u00dcmwelt\n" % tmp_path, encoding="utf-8")
    show = "import os; load(sys.argv[1]); print(*map(os.path.isdir, sys.modules['rjupyter'].known_to_conda()))"
    argv = [interpreters()[6], "-BIS", "-c", rjupyter.LOAD + show, rjupyter.__file__]
    environment = {"HOME": str(tmp_path), "LC_ALL": "C"}
    answer = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert answer.stdout == "True\n"


def test_stub_of_an_old_python_is_passed_over(tmp_path: Path) -> None:
    stub = tmp_path / "python3"
    stub.write_text("#!/bin/sh\nexit 99\n")
    stub.chmod(0o755)
    answer = subprocess.run(
        ["/bin/sh", "-c", rjupyter.agent_command()],
        input=agent_input(""),
        capture_output=True,
        env={"HOME": str(tmp_path), "PATH": "%s:/usr/bin:/bin" % tmp_path},
    )
    assert b"no such directory on the host" in answer.stdout


def test_redirect_serves_its_secret_once() -> None:
    listener = rjupyter.listen_on(0)
    listener.settimeout(10)
    origin = "http://127.0.0.1:%d" % listener.getsockname()[1]
    thread = threading.Thread(target=rjupyter._redirect_once, args=(listener, "/secret", "http://127.0.0.1:9/?token=t"))
    thread.start()
    with contextlib.closing(socket.create_connection(listener.getsockname())):
        pass  # a browser that connects ahead, for nothing
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(origin + "/favicon.ico")
    with contextlib.closing(socket.create_connection(listener.getsockname())) as browser:
        browser.sendall(b"GET /secret HTTP/1.1\r\n\r\n")
        assert b"Location: http://127.0.0.1:9/?token=t\r\n" in browser.recv(4096)
    thread.join(10)
    assert not thread.is_alive()
    assert listener.fileno() == -1


def test_version_and_help_name_the_program() -> None:
    script = rjupyter.__file__
    version = subprocess.run([sys.executable, script, "--version"], capture_output=True, text=True)
    assert version.stdout == "rjupyter %s\n" % rjupyter.__version__
    text = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True).stdout
    for line in (rjupyter.__doc__ or "").splitlines():
        assert line in text


def test_signal_while_a_child_starts_is_not_lost_and_does_not_reach_the_child() -> None:
    with pytest.raises(KeyboardInterrupt), rjupyter.signals_left_to_us():
        status = subprocess.check_output(["cat", "/proc/self/status"], text=True)
        signal.raise_signal(signal.SIGINT)  # to this thread: another one would take its time
    blocked = int(re.findall(r"SigBlk:\s+(\w+)", status)[0], 16)
    assert [bool(blocked & 1 << signum - 1) for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)] == [1, 1, 0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_signal_as_a_child_is_made_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    start = rjupyter.start_thread

    def start_interrupted(do: Any, *arguments: Any) -> threading.Thread:
        made.append(do.__self__)
        signal.raise_signal(signal.SIGINT)
        return start(do, *arguments)

    monkeypatch.setattr(rjupyter, "start_thread", start_interrupted)
    before = signal.signal(signal.SIGINT, rjupyter.Signals.take)
    try:
        with pytest.raises(KeyboardInterrupt):
            rjupyter.Ssh("host", [], False, rjupyter.Messages(quiet=True), False).call(["sleep", "60"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [child.process.returncode for child in made] == [-signal.SIGTERM]


def test_system_without_fork_has_no_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(rjupyter.Failure, match="cannot go to the background"):
        rjupyter.Background()


# -- what the host begins ---------------------------------------------------------------------------------------------


def test_nothing_is_begun_when_nobody_listens_any_more(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        (tmp_path / "s1234").mkdir()
        with pytest.raises(rjupyter.Failure, match="nothing was started"):
            rjupyter.Channel("", stream).announce(str(tmp_path / "s1234"), "goes on starting")
    assert not list(tmp_path.iterdir())


def test_what_was_announced_once_goes_on_whoever_leaves(tmp_path: Path) -> None:
    """The first environment lacks what is needed, and the user has left: the next one is tried all the same."""
    reading, writing = os.pipe()
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as stream:  # of its last flush
        channel = rjupyter.Channel("", stream)
        channel.announce("s1111", "goes on starting")
        assert b'"s1111"' in os.read(reading, 1000)
        os.close(reading)
        channel.announce("s2222", "goes on starting")


# -- the journal ------------------------------------------------------------------------------------------------------


def told(journal: rjupyter.Journal, *numbers: int) -> None:
    for number in numbers:
        journal.tell("remark", text="%03d" % number)


def read(reader: rjupyter.JournalReader) -> List[str]:
    """Return what a reader finds: the texts, and why something is missing."""
    found = [json.loads(line) for line in reader.lines()]
    return [facts.get("text") or facts.get("why", "")[:5] or facts["kind"] for facts in found]


def test_a_journal_tells_what_its_reader_has_missed(tmp_path: Path) -> None:
    """It keeps two halves; one who reads often enough misses nothing, also where a half is full meanwhile."""
    path = str(tmp_path / "a.journal")
    journal = rjupyter.Journal(path, most=400)  # a few lines
    often, seldom = rjupyter.JournalReader(path), rjupyter.JournalReader(path)
    journal.head = rjupyter.Entry(kind="begun", id="1", time=1.0)
    numbers = ["%03d" % number for number in range(40)]
    found: List[str] = []
    for number in range(40):
        told(journal, number)
        found += read(often)
        if number == 2:
            assert read(seldom) == numbers[:3]
            late = rjupyter.JournalReader(path, os.path.getsize(path))
    assert found == numbers
    readers = [seldom, late, rjupyter.JournalReader(path)]
    for reader in readers:
        gap, head, *rest = read(reader)
        assert (gap, head, rest) == ("older", "begun", numbers[-len(rest) :])
        assert 5 < len(rest) < 20
    assert {reader.at for reader in [often, rjupyter.JournalReader(path, os.path.getsize(path)), *readers]} == {
        often.at
    }
    told(journal, 40)
    assert [read(reader) for reader in [often, *readers]] == [["040"]] * 4
    places = [at for at, _ in rjupyter.JournalReader(path).placed()]
    assert places == sorted(places) and len(set(places)) == len(places)


def test_a_cell_whose_begin_fills_a_half_is_not_taken_for_one_that_is_told_again(tmp_path: Path) -> None:
    journal = rjupyter.Journal(str(tmp_path / "a.journal"), most=400)
    reader = rjupyter.JournalReader(journal.path)
    found: List[str] = []
    for number in range(12):
        journal.head = journal.tell("begun", id=str(number), time=1.0, code="x" * 100)
        journal.tell("finished", id=str(number), time=1.0)
        journal.head = None
        found += [json.loads(line)["id"] for line in reader.lines() if '"kind": "begun"' in line]
    assert found == [str(number) for number in range(12)]


def test_a_journal_that_another_recorder_began(tmp_path: Path) -> None:
    path = str(tmp_path / "a.journal")
    told(rjupyter.Journal(path, most=220), *range(12))
    reader = rjupyter.JournalReader(path)
    read(reader)
    journal = rjupyter.Journal(path, most=220)
    found: List[str] = []
    for number in range(12, 24):
        told(journal, number)
        found += read(reader)
    assert found == ["%03d" % number for number in range(12, 24)]


@pytest.mark.parametrize("known", [0, 3])
def test_a_journal_that_turns_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """Of neither half a line is lost, or comes twice, however little of one is read at once."""
    journal = rjupyter.Journal(str(tmp_path / "a.journal"), most=600)
    reader = rjupyter.JournalReader(journal.path)
    monkeypatch.setattr(rjupyter, "PART_BYTES", 50)
    numbers = iter(range(1000))
    told(journal, *itertools.islice(numbers, known))
    found = read(reader)
    told(journal, *itertools.islice(numbers, 6))
    plain = rjupyter.Growing.lines

    def lines(growing: rjupyter.Growing, has_ended: bool = False) -> Iterator[str]:
        for line in plain(growing, has_ended):
            yield line
            if not os.path.exists(journal.path + ".old"):
                while not os.path.exists(journal.path + ".old"):
                    told(journal, next(numbers))
                told(journal, *itertools.islice(numbers, 5))

    monkeypatch.setattr(rjupyter.Growing, "lines", lines)
    for _ in range(3):
        found += read(reader)
    assert found == ["%03d" % number for number in range(next(numbers))]


def test_a_journal_whose_disk_is_full_when_a_half_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS tells of a quota as late as that."""
    path = str(tmp_path / "a.journal")
    journal = rjupyter.Journal(path, most=220)

    def close_and_fail(file: int, close: Callable[[int], None] = os.close) -> None:
        close(file)
        monkeypatch.undo()
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "close", close_and_fail)
    told(journal, *range(12))
    assert os.close is not close_and_fail
    found = read(rjupyter.JournalReader(path))
    assert found[-1] == "011" and "Disk " in found, found


def test_what_a_pattern_brings_and_what_goes_along(tmp_path: Path) -> None:
    """A link to what is no match is none; one that goes along by its name is its file."""
    for name in ("one", "two", "raw"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.json").write_text(name)
    (tmp_path / "raw/r.json").rename(tmp_path / "raw/data.csv")
    (tmp_path / "data.csv").symlink_to("raw/data.csv")
    (tmp_path / "raw/link").symlink_to(tmp_path / "raw")
    for typed in ("*/r.json", "./*/r.json"):
        pattern = rjupyter._pattern(typed)
        found = list(rjupyter.matching(str(tmp_path), pattern.split("/")))
        assert found == [str(tmp_path / "one/r.json"), str(tmp_path / "two/r.json")]
        assert rjupyter.is_matched("one/r.json", [pattern])
    assert (rjupyter._pattern("one/"), rjupyter._pattern("./")) == ("one", "**")
    stream = io.BytesIO()
    assert rjupyter.pack(str(tmp_path), [str(tmp_path / "data.csv")], stream) == []
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        assert [(member.name, member.isreg()) for member in tar] == [("data.csv", True)]


def test_printed_text_that_comes_in_pieces(tmp_path: Path) -> None:
    """A line is one when its end is there, and the last one when nothing more comes, however it was printed."""
    pieces = ["a", "", "b\nc", "\n", "\n", "d\n", "e\nf\ng", "h"]
    path = tmp_path / "journal"
    reader = rjupyter.PrintedText(str(path))
    found: List[List[str]] = []
    with open(path, "ab", buffering=0) as stream:
        for piece in pieces:
            content = {"name": "stdout", "text": piece}
            stream.write(rjupyter.line_of({"kind": "printed", "id": "0", "type": "stream", "content": content}))
            found.append(list(reader.lines()))
    assert found == [[], [], ["ab"], ["c"], [""], ["d"], ["e", "f"], []]
    assert list(reader.lines(has_ended=True)) == ["gh"]
    assert list(rjupyter.PrintedText(str(path)).lines(has_ended=True)) == "".join(pieces).split("\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"ename": "E", "evalue": "v", "traceback": ["one", "two"]}, "one\ntwo\n"),
        ({"ename": "E", "evalue": "v", "traceback": []}, "E: v\n"),
        ({"ename": "", "evalue": "1", "traceback": []}, "1\n"),  # bash_kernel's, of a command that failed
        ({"ename": "E"}, "E\n"),
        ({"ename": None, "evalue": 1}, ""),
    ],
)
def test_text_of_an_error(error: Dict[str, Any], text: str) -> None:
    assert rjupyter.text_of(rjupyter.Entry(kind="printed", type="error", content=error)) == text


def test_equal_cells_of_which_one_was_executed() -> None:
    """It is the one that has the number of the execution, or none yet; not the first."""
    cells: List[Dict[str, Any]] = [
        {"cell_type": "code", "source": "f()", "execution_count": count, "outputs": [], "metadata": {}}
        for count in (1, None)
    ]
    begun = rjupyter.Entry(kind="begun", id="1", time=1.0, count=7, code="f()")
    ended = rjupyter.Entry(kind="finished", id="1", time=2.0, is_done=True)
    executions = rjupyter.Executions(json.dumps(entry.facts()) for entry in (begun, ended))
    assert rjupyter.fill_in(cells, list(executions.cells.values())) == (1, ["1"])
    assert [cell["execution_count"] for cell in cells] == [1, 7]


@pytest.mark.parametrize(
    ("counts", "executed", "shown"),
    [
        ([2, 1], [1, 2], ["2", "1"]),  # the second one first
        ([None, 1], [1, 2], ["2", "1"]),  # and its page has gone before it saved the first
        ([None, None], [1, 2], ["1", "2"]),
        ([1, 2], [1, 2, 3, 4], ["3", "4"]),  # all once more
        ([5, None], [1, 3, 5], ["5", "3"]),
        ([5, 8], [5, 6, 7, 8], ["5", "8"]),
    ],
)
def test_equal_cells_keep_what_is_their_own(counts: List[Optional[int]], executed: List[int], shown: List[str]) -> None:
    cells: List[Dict[str, Any]] = [
        {"cell_type": "code", "source": "f()", "execution_count": count, "outputs": [], "metadata": {}}
        for count in counts
    ]
    lines = []
    for count in executed:
        lines.append({"kind": "begun", "id": str(count), "time": 1.0, "count": count, "code": "f()"})
        lines.append({"kind": "finished", "id": str(count), "time": 2.0, "is_done": True})
    rjupyter.fill_in(cells, list(rjupyter.Executions(map(json.dumps, lines)).cells.values()))
    assert [str(cell["execution_count"]) for cell in cells] == shown


def test_a_notebook_that_a_page_saves_just_now_is_read_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jupyter empties it first. What is no notebook is read as it is, after a while."""
    path = tmp_path / "a.ipynb"
    writes = iter(["", '{"cells": [', '{"cells": []}\n'])
    path.write_text(next(writes))
    monkeypatch.setattr("rjupyter.time.sleep", lambda _: path.write_text(next(writes)))
    assert rjupyter.read_notebook(str(path)) == '{"cells": []}\n'
    monkeypatch.undo()
    path.write_text("<<<<<<< ours")
    assert rjupyter.read_notebook(str(path)) == "<<<<<<< ours"


def test_displays_that_are_no_text(tmp_path: Path) -> None:
    data = {"application/vnd.plotly.v1+json": {"a": None, "b": [True]}, "text/html": "\ud800"}
    written = rjupyter.write_display(rjupyter.Entry(kind="printed", content={"data": data}), str(tmp_path / "x"))
    texts = {kind: Path(path).read_text() for kind, path in written.items()}
    assert texts == {"application/vnd.plotly.v1+json": '{"a": null, "b": [true]}', "text/html": "?"}


def test_the_signals_of_a_session_that_ends_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """logind sends SIGTERM and SIGHUP at once: the second leaves the first its work. Twice the same leaves at once."""
    monkeypatch.setattr(rjupyter.Signals, "first", 0)
    take = rjupyter.Signals.take
    for signum, is_heard in ((signal.SIGTERM, True), (signal.SIGHUP, False), (signal.SIGTERM, True)):
        with pytest.raises(rjupyter.Terminated) if is_heard else contextlib.ExitStack():
            take(signum, None)
    with pytest.raises(KeyboardInterrupt):
        take(signal.SIGINT, None)


def test_a_file_that_becomes_shorter_while_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows it in the tar would be misread."""
    for name in "abc":
        (tmp_path / name).write_text("x" * 100)

    def shorter(tar: Any, path: str, name: str, look: Any = tarfile.TarFile.gettarinfo) -> Any:
        member = look(tar, path, name)
        if name == "b":
            (tmp_path / "b").write_text("x")
        return member

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", shorter)
    with pytest.raises(OSError, match="b changed while it was read"):
        rjupyter.pack(str(tmp_path), [str(tmp_path / name) for name in "abc"], io.BytesIO())


def test_a_display_that_is_updated_often_costs_what_one_does_that_is_not(tmp_path: Path) -> None:
    """An update is looked at once, and not once for each display: of one id, of many, in one cell or several."""

    def line(kind: str, cell: int, identity: str, value: int) -> str:
        content = {"data": {"text/plain": str(value)}, "transient": {"display_id": identity} if identity else {}}
        return json.dumps({"kind": "printed", "id": str(cell), "type": kind, "content": content})

    def counted(lines: List[str]) -> Tuple[int, List[str]]:
        calls = 0

        def count(frame: object, event: str, argument: object) -> Any:
            nonlocal calls
            calls += event == "line"
            return count

        sys.settrace(count)
        try:
            executions = rjupyter.Executions(lines)
        finally:
            sys.settrace(None)
        outputs = [output for cell in executions.cells.values() for output in cell.outputs]
        return calls, [rjupyter.text_of(output).strip() for output in outputs]

    def cost(count: int, identity: str) -> int:
        identities = [identity % number if "%" in identity else identity for number in range(count)]
        shows = [line("display_data", number % 3, name, 0) for number, name in enumerate(identities)]
        updates = [line("update_display_data", 0, name, 7) for name in identities]
        calls, texts = counted(shows + updates)
        assert texts == ["7" if identity else "0"] * count
        return calls

    for identity in ("one", "%d", ""):
        assert cost(200, identity) < 3 * cost(100, identity), identity


def test_what_is_kept_stays_where_its_age_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that does not answer for a moment is no home of last year."""
    kept = tmp_path / "runs/r1234"
    kept.mkdir(parents=True)
    monkeypatch.setattr(rjupyter, "own_state_dir", str(tmp_path))
    os.utime(kept, (1, 1))
    with monkeypatch.context() as away:
        away.setattr(rjupyter, "time_of", lambda path: 0.0)
        rjupyter.forget_ended(rjupyter.KINDS["run"])
    assert kept.is_dir()
    rjupyter.forget_ended(rjupyter.KINDS["run"])
    assert not kept.exists()
