"""A shared host: what another user there, and on the laptop, can see or do. Each line of the README's table is here."""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from urllib.parse import urlsplit

import pytest
from client import api, base_url, check_failure, compute, is_up, listed, token_of
from jupyters import jupyter_for_everyone, jupyter_of, standin
from sides import VENV_BIN, Host, Laptop, User, quiet_port, ssh_of, wait_until, without_port

import rjupyter

# Runs as the other user until its stdin ends: every argv, and every file below the directories that can be read.
SPY = """
import os, select, sys
argvs, texts = set(), {}
while not select.select([sys.stdin], [], [], 0.02)[0]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % pid, "rb") as stream:
                argvs.add(stream.read())
        except OSError:
            pass
    for top in sys.argv[1:]:
        for where, _, names in os.walk(top):
            for name in names:
                path = os.path.join(where, name)
                try:
                    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
                        texts[path] = stream.read(100000)
                except OSError:
                    pass
print(repr([sorted(argvs), texts]))
"""


@contextlib.contextmanager
def spying(user: User, *places: Path) -> Iterator[Dict[str, Any]]:
    """What `user` sees meanwhile: "argvs", and "files" as far as they can be read."""
    import ast

    argv = ["/usr/bin/python3", "-c", SPY, *map(str, places)]
    pipe = subprocess.PIPE
    seen: Dict[str, Any] = {}
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, user=user.uid, group=65534, extra_groups=[], cwd="/") as spy:
        try:
            yield seen
        finally:
            output = spy.communicate(b"\n", timeout=60)[0].decode()
            seen["argvs"], seen["files"] = ast.literal_eval(output)


def as_user(user: User, code: str, *arguments: str) -> str:
    """Run Python as another user, and return what it printed."""
    argv = ["/usr/bin/python3", "-c", code, *arguments]
    return subprocess.run(
        argv, user=user.uid, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def ana(make_user: Callable[[str], User]) -> User:
    """The user whose Jupyter it is; her start-up files leave everything open to everyone."""
    user = make_user("/bin/bash")
    user.write(".bashrc", "umask 000\n")
    return user


@pytest.fixture
def eve(make_user: Callable[[str], User]) -> User:
    """The other user."""
    return make_user("/bin/bash")


@pytest.fixture
def shared(make_host: Callable[..., Host], ana: User, request: pytest.FixtureRequest) -> Host:
    jupyter = jupyter_for_everyone() if request.node.get_closest_marker("jupyter") else standin()
    ana.write(".profile", "PATH=%s:$PATH\n" % jupyter)
    return make_host(user=ana)


@pytest.mark.jupyter
@pytest.mark.parametrize("options", [[], ["--socket"]])
def test_the_token_is_seen_by_nobody_else(
    laptop: Laptop, shared: Host, ana: User, eve: User, options: List[str], tmp_path: Path
) -> None:
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\nexec curl --silent --max-time 20 --location "$@"\n')
    browser.chmod(0o755)
    tmp_path.chmod(0o755)
    ours = [Path("/tmp/rjupyter-%d" % uid) for uid in (ana.uid, os.getuid())]
    with spying(eve, ana.home, laptop.directory, *ours) as seen:
        with laptop.opened("-v", *options, "--browser", str(browser), "host", has_terminal=True) as run:
            url = run.url()
            compute(url, "open('mine.txt', 'w').write('x')")
        assert laptop.run("host", "logs").status == 0
        assert laptop.run("host", "stop").status == 0
    token = token_of(url).encode()
    assert len(token) == 48
    assert any(b"jupyter-notebook" in argv for argv in seen["argvs"])  # it did look
    assert any(str(ana.home / ".bashrc") == path for path in seen["files"])
    assert not [argv for argv in seen["argvs"] if token in argv]
    assert not [path for path, text in seen["files"].items() if token in text]
    said = run.text.replace(url, "")
    assert token_of(url) not in said


CONNECT = """
import socket, sys
s = socket.socket(socket.AF_UNIX if sys.argv[1][0] == "/" else socket.AF_INET)
try:
    s.connect(sys.argv[1] if sys.argv[1][0] == "/" else ("127.0.0.1", int(sys.argv[1])))
    s.sendall(b"GET %s HTTP/1.0\\r\\n\\r\\n" % sys.argv[2].encode())
    print(s.recv(1000).split()[1].decode())
except OSError as error:
    print(error.strerror)
"""


def listening_ports(uid: int) -> List[int]:
    """Return the TCP ports on which a user's processes listen."""
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    return [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and int(row[7]) == uid]


@pytest.mark.jupyter
def test_another_user_reaches_the_port_and_gets_nothing(laptop: Laptop, shared: Host, ana: User, eve: User) -> None:
    url = laptop.start("host", has_terminal=False).url()
    (record,) = shared.servers()
    assert record["port"] in listening_ports(ana.uid)
    for port in (record["port"], urlsplit(url).port):
        for path in ("/api/kernels", "/api/contents", "/api/sessions"):
            assert as_user(eve, CONNECT, str(port), path) == "403\n"
        assert as_user(eve, CONNECT, str(port), "/tree") == "302\n"  # to the page that asks for the token


@pytest.mark.jupyter
def test_a_socket_is_out_of_reach_for_another_user(laptop: Laptop, shared: Host, ana: User, eve: User) -> None:
    with laptop.opened("--socket", "--local-port", str(quiet_port()), "host") as run:
        url = run.url()
        assert compute(url, "print(40 + 2)") == "42\n"
        (record,) = shared.servers()
        path = ana.home / ".local/state/rjupyter/servers" / record["id"] / "socket"
        assert path.is_socket()
        run.expect(r"\(pid %d, socket, " % record["pid"])
        run.expect("Forwarding 127.0.0.1:%s to host:%s\\." % (urlsplit(url).port, path))
        assert as_user(eve, CONNECT, str(path), "/api") == "Permission denied\n"
        assert as_user(ana, CONNECT, str(path), "/api") == "200\n"
        assert api(url, "kernels")
        # No port of the server's, none of the kernel's channels. ipykernel's one is for what subprocesses print: it
        # only takes in, from those who know its key.
        assert len(listening_ports(ana.uid)) <= 1
    again = laptop.start("--socket", "host", has_terminal=False)
    again.expect("Found Jupyter")
    assert without_port(again.url()) == without_port(url)
    (server,) = listed(laptop)
    assert (server["state"], server["port"], server["sock"]) == ("live", 0, str(path))
    assert " socket " in laptop.run("host", "list").stdout
    assert laptop.run("host", "stop").status == 0
    assert not path.exists()


@pytest.mark.jupyter
@pytest.mark.parametrize("age", ["", "notebook-6.4", "lab-3.2"])
def test_a_kernel_is_out_of_reach_for_another_user(
    laptop: Laptop, make_host: Callable[..., Host], ana: User, eve: User, age: str
) -> None:
    """Its sockets lie where only you get to; what is typed on the host goes on finding the server and the kernel."""
    ana.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
    host = make_host(path=str(jupyter_of(age))) if age else make_host(user=ana)
    url = laptop.start("host", has_terminal=False).url()
    kernel = api(url, "kernels", "POST", {})["id"]
    assert compute(url, "print(40 + 2)", kernel) == "42\n"
    sockets = list(host.home.glob(".local/share/jupyter/runtime/kernel-%s-ipc-*" % kernel))
    assert len(sockets) == 5
    for path in sockets:
        assert as_user(eve, CONNECT, str(path), "/") == "Permission denied\n"
    assert age or len(listening_ports(ana.uid)) <= 2  # Jupyter's own, and ipykernel's, as above
    shell = "sh %s '%%s'" % ("-c" if age else "-lc")
    lists = "jupyter server list" if age != "notebook-6.4" else "jupyter notebook list"
    assert token_of(url) in host.sshd.ssh(shell % lists).stdout
    existing = host.sshd.ssh(shell % ('echo "print(6 * 7)" | jupyter run --existing kernel-%s.json' % kernel))
    assert existing.stdout == "42\n", existing
    assert laptop.run("host", "stop", "--yes").status == 0
    assert not list(host.home.glob(".local/share/jupyter/runtime/*"))


def add_kernel(user: User, name: str, *argv: str) -> None:
    spec = {"argv": argv, "display_name": name, "language": "python"}
    user.write(".local/share/jupyter/kernels/%s/kernel.json" % name, json.dumps(spec))


@pytest.mark.jupyter
def test_kernels_listen_on_ports_where_one_may_know_nothing_else(
    laptop: Laptop, shared: Host, ana: User, eve: User
) -> None:
    add_kernel(ana, "scala", "java", "-cp", "almond.jar", "almond.ScalaKernel", "{connection_file}")
    run = laptop.start("host", has_terminal=False)
    url = run.url()
    kernel = api(url, "kernels", "POST", {})["id"]
    assert compute(url, "print(40 + 2)", kernel) == "42\n"
    assert len(listening_ports(ana.uid)) > 5
    said = run.expect("other users of the host can read what they print: the kernel scala may .* (--server-arg=.*)")
    remedy = said.group(1)
    run.interrupt()
    assert laptop.run("host", "stop", "--yes").status == 0
    run = laptop.start("host", remedy, has_terminal=False)
    kernel = api(run.url(), "kernels", "POST", {})["id"]
    assert compute(run.url(), "print(40 + 2)", kernel) == "42\n"
    assert len(listening_ports(ana.uid)) <= 2 and "Kernels listen" not in run.text


SPECS = {
    "ports": [
        ["java", "-jar", "ijava.jar", "{connection_file}"],
        ["deno", "jupyter", "--kernel", "--conn", "{connection_file}"],
        ["ssh", "node1", "python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        ["/opt/python/bin/python3", "-m", "remote_ikernel", "--kernel_cmd", "python -m ipykernel_launcher"],
        ["docker", "run", "-v", "{connection_file}:/c", "img", "python", "-m", "ipykernel_launcher", "-f", "/c"],
        ["python3", "-m", "run_kotlin_kernel"],
        ["/bin/sh", "-c", "exec python3 -m ipykernel_launcher -f {connection_file}"],
    ],
    "sockets": [
        ["/opt/env/bin/python3.11", "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        ["python", "-m", "ipykernel", "-f", "{connection_file}"],
        ["/home/ana maria/env/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        ["/usr/lib/R/bin/R", "--slave", "-e", "IRkernel::main()", "--args", "{connection_file}"],
        ["julia", "-i", "--color=yes", "--project=@.", "/home/a/.julia/packages/IJulia/AQu2H/src/kernel.jl"],
        ["/usr/bin/python3", "-m", "bash_kernel", "-f", "{connection_file}"],
    ],
}


@pytest.mark.parametrize("kind", SPECS)
def test_which_kernels_are_known_to_take_sockets(directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(directory))
    file = directory / "kernels/one/kernel.json"
    file.parent.mkdir(parents=True)
    settings = directory / "site/jupyter_server_config.py"  # as Jupyter generates it
    settings.parent.mkdir()
    settings.write_text("# c.KernelManager.transport = 'tcp'\n" * 3000)
    found = rjupyter.Launcher(app="notebook", argv=["/nowhere/bin/python3", "x"], where="", environment={})
    found.environment["JUPYTER_CONFIG_PATH"] = str(settings.parent)
    for argv in SPECS[kind]:
        file.write_text(json.dumps({"argv": argv}))
        told: List[str] = []
        channel: Any = SimpleNamespace(tell=lambda kind, text, told=told: told.append(text))
        arguments = rjupyter.transport_of_kernels(found, rjupyter.Request(), str(directory), channel)
        assert (bool(arguments), bool(told)) == ((True, False) if kind == "sockets" else (False, True)), argv
    config = directory / "site/jupyter_server_config.d/ip.json"
    config.parent.mkdir()
    for file, text in ((config, '{"KernelManager": {"ip": "10.0.0.5"}}'), (settings, "c.KernelManager.ip = 'node1'\n")):
        before = file.read_text() if file.exists() else ""
        file.write_text(before + text)
        told.clear()
        assert rjupyter.transport_of_kernels(found, rjupyter.Request(), str(directory), channel) == told == []
        file.write_text(before or "{}")


def test_a_socket_below_tmp_where_home_has_a_long_path(make_host: Callable[..., Host], laptop: Laptop) -> None:
    host = make_host()
    home = host.home / ("long" * 25)
    home.mkdir()
    host.sshd.stop()
    host.sshd.environment["HOME"] = str(home)
    host.sshd.start()
    with laptop.opened("--socket", "host") as run:
        assert is_up(run.url())
        path = Path(run.expect(r"Forwarding \S+ to host:(/\S+/rjupyter-\d+/[0-9a-f]{4}\.socket)\.").group(1))
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert laptop.run("host", "stop").status == 0
    assert not path.exists()


WAYS = ["Direct", "Borrowed", "Master"]


@contextlib.contextmanager
def way_of(name: str, laptop: Laptop, directory: Path) -> Iterator[List[str]]:
    """Be connected in one of the three ways meanwhile; gives the options for it."""
    if name != "Borrowed":
        yield ["--no-mux"] if name == "Direct" else []
        return
    config = Path(laptop.config)
    config.write_text("%s  ControlPath %s\n" % (config.read_text(), directory / "mine"))
    argv = ["ssh", "-F", laptop.config, "-M", "-N", "host"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=laptop.environment) as mine:
        try:
            wait_until((directory / "mine").exists, "the master is up")
            yield []
        finally:
            mine.kill()


@pytest.mark.parametrize("way", WAYS)
def test_socket_where_sshd_forwards_none_is_named(
    make_host: Callable[..., Host], laptop: Laptop, directory: Path, way: str
) -> None:
    host = make_host(settings="AllowStreamLocalForwarding no")
    with way_of(way, laptop, directory) as options:
        run = laptop.run(*options, "--socket", "host")
        check_failure(run, 1, "AllowStreamLocalForwarding", "stop it, then open without --socket")
    assert len(host.servers()) == 1


@pytest.mark.parametrize("way", WAYS)
def test_further_forward_whose_port_is_taken(host: Host, laptop: Laptop, directory: Path, way: str) -> None:
    with way_of(way, laptop, directory) as options, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = laptop.run(*options, "-L", "%d:localhost:22" % port, "host")
        check_failure(run, 1, "cannot forward 127.0.0.1:%d" % port, "another port in -L")
    assert len(host.servers()) == 1  # it stays, as ever


@pytest.mark.jupyter
@pytest.mark.parametrize("age", ["", "notebook-6.4"])
def test_socket_holds_where_the_configuration_names_a_port(
    laptop: Laptop, make_host: Callable[..., Host], age: str
) -> None:
    host = make_host(path=str(jupyter_of(age))) if age else make_host()
    (host.home / ".jupyter").mkdir()
    for name, apps in (("server", ["ServerApp", "NotebookApp"]), ("notebook", ["NotebookApp"])):
        text = "".join("c.%s.port = %d\n" % (app, quiet_port()) for app in apps)
        (host.home / (".jupyter/jupyter_%s_config.py" % name)).write_text(text)
    with laptop.opened("--socket", "host") as run:
        assert is_up(run.url())
        assert re.search(r"Launched .* socket,", run.stderr)


@pytest.mark.jupyter
def test_no_socket_with_a_jupyter_that_knows_none_shown_by_a_wrapper_that_drops_the_argument(
    make_host: Callable[..., Host], laptop: Laptop, directory: Path
) -> None:
    (directory / "bin").mkdir()
    wrapper = directory / "bin/jupyter-notebook"
    wrapper.write_text(
        '#!/bin/sh\nfor a; do shift; case $a in --sock=*|--*.port=*) ;; *) set -- "$@" "$a";; esac; done\n'
        'exec %s --port=%d "$@"\n' % (VENV_BIN / "jupyter-notebook", quiet_port())
    )
    wrapper.chmod(0o755)
    host = make_host(path=str(directory / "bin"))
    failed = laptop.run("--socket", "host")
    words = "Jupyter listens on no socket", "this Jupyter knows none", "open without --socket"
    check_failure(failed, rjupyter.EXIT_SERVER_ENDED, *words)
    assert not host.servers()


# -- strangers --------------------------------------------------------------------------------------------------------

# Answers 200 to whatever it is asked, like a server that fits every token.
STRANGER = """
import socket, sys
s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("up", flush=True)
while True:
    c, _ = s.accept()
    request = c.recv(4096)
    known = b"token " + sys.argv[2].encode() in request if len(sys.argv) > 2 else True
    c.sendall(b"HTTP/1.0 %s\\r\\n\\r\\n{}" % (b"200 OK" if known else b"403 Forbidden"))
    c.close()
"""


def take_over(laptop: Laptop, host: Host, eve: User, *token: str) -> "subprocess.Popen[str]":
    """Launch a server, freeze what it is, and let another user listen on its port."""
    with laptop.opened("host") as run:
        pass
    (record,) = host.servers()
    info = next(host.home.glob(".local/share/jupyter/runtime/jpserver-*.json"))
    facts = json.loads(info.read_text())
    words = [token_of(run.url())] if token else []
    port = quiet_port()
    info.write_text(json.dumps(dict(facts, port=port)))  # as if Jupyter had lost its port to the other one
    argv = ["/usr/bin/python3", "-c", STRANGER, str(port), *words]
    stranger = subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, user=eve.uid, group=65534, extra_groups=[], cwd="/"
    )
    assert stranger.stdout is not None and stranger.stdout.readline() == "up\n"
    assert record["pid"] > 1
    return stranger


@pytest.mark.parametrize(("who", "knows_token"), [("eve", False), ("eve", True), ("ana", False)])
def test_a_stranger_on_the_port_is_never_opened(
    laptop: Laptop, shared: Host, eve: User, ana: User, who: str, knows_token: bool
) -> None:
    user = {"eve": eve, "ana": ana}[who]  # of her own, another program may listen there
    with take_over(laptop, shared, user, *(["yes"] if knows_token else [])) as stranger:
        try:
            states = [server["state"] for server in listed(laptop)]
            run = laptop.run("host", "--start-timeout", "1")
        finally:
            stranger.kill()
    assert states == ["no answer"]
    check_failure(run, 1, "something else answers on port", "is not the server")


def test_port_of_another_machine_is_not_the_one_that_a_stranger_has_here(eve: User) -> None:
    listen = "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    argv, pipe = ["/usr/bin/python3", "-c", listen], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, user=eve.uid, group=65534, extra_groups=[], cwd="/") as hers:
        assert hers.stdout is not None
        port = int(hers.stdout.readline())
        facts: Dict[str, Any] = {"port": port, "token": "", "base_url": "/", "root_dir": "/"}
        infos = [rjupyter.RuntimeInfo(host=host, **facts) for host in ("127.0.0.1", "192.0.2.1")]
        ours = [rjupyter.is_our_port(info) for info in infos]
        hers.communicate(b"\n")
    assert ours == [False, True]


# Listens as soon as the port is free, takes every token, and prints what it is sent.
SUCCESSOR = """
import socket, sys
print("up", flush=True)
while True:
    try:
        s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
        break
    except OSError:
        pass
while True:
    c, _ = s.accept()
    c.settimeout(1)
    try:
        print(c.recv(4096), flush=True)
        c.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n{}")
    except OSError:
        pass
    c.close()
"""


@pytest.mark.parametrize("mode", [[], ["--no-mux"]], ids=["mux", "no-mux"])
def test_a_stranger_on_the_port_of_a_server_that_ended_is_asked_nothing(
    laptop: Laptop, shared: Host, eve: User, mode: List[str]
) -> None:
    run = laptop.start(*mode, "--local-port", str(quiet_port()), "host", has_terminal=False)
    token = token_of(run.url())
    run.expect("To end it")
    (record,) = shared.servers()
    argv = ["/usr/bin/python3", "-c", SUCCESSOR, str(record["port"])]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, user=eve.uid, group=65534, extra_groups=[], cwd="/"
    ) as stranger:
        try:
            assert stranger.stdout is not None and stranger.stdout.readline() == "up\n"
            os.killpg(record["pid"], signal.SIGKILL)
            assert run.wait(30) == 4, run.text
            assert [server for server in listed(laptop) if server["state"] == "live"] == []
        finally:
            stranger.kill()
            heard = stranger.communicate()[0]
    assert "has ended" in run.stderr
    assert token not in heard


def ask_with(cookies: str, url: str, path: str, data: Optional[bytes] = None) -> Tuple[int, str, List[str]]:
    """Ask the server behind a printed URL, without its token; return the status, where it sends, and its cookies."""
    parts = urlsplit(url)
    xsrf = "".join(re.findall(r"_xsrf=([^;]+)", cookies))
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    with contextlib.closing(connection):
        headers = {"Cookie": cookies, "X-XSRFToken": xsrf}
        connection.request("POST" if data else "GET", base_url(url) + path, data, headers)
        answer = connection.getresponse()
        set_cookies = [words.partition(";")[0] for words in answer.headers.get_all("Set-Cookie", [])]
        return answer.status, answer.headers.get("Location", ""), set_cookies


@pytest.mark.jupyter
@pytest.mark.parametrize(
    ("age", "options"),
    [("", []), ("notebook-6.4", []), ("lab-3.2", ["--lab"])],
    ids=["today", "notebook-6.4", "lab-3.2"],
)
def test_a_cookie_of_a_server_that_ended_opens_no_other(
    laptop: Laptop, make_host: Callable[..., Host], age: str, options: List[str]
) -> None:
    host = make_host(path=str(jupyter_of(age))) if age else make_host()
    arguments = ["--local-port", str(quiet_port()), *options, "host"]  # a cookie's name has the port in it
    with laptop.opened(*arguments) as run:
        url = run.url()
        page = urlsplit(url)
        path = page.path[len(base_url(url)) :]
        cookies = "; ".join(ask_with("", url, "%s?%s" % (path, page.query))[2])
        cookies += "; " + "; ".join(ask_with(cookies, url, path)[2])  # _xsrf comes with a page
        assert ask_with(cookies, url, "api/contents")[0] == 200
        # A kernel once; of the others, what is asked for with the same right and costs less.
        posted = ("api/contents", b'{"type": "directory"}') if age or options else ("api/kernels", b"{}")
        assert ask_with(cookies, url, *posted)[0] == 201
        (directory,) = host.home.glob(".local/state/rjupyter/servers/*")
        secret = directory / "cookie_secret"
        assert secret.stat().st_mode & 0o77 == 0 and directory.stat().st_mode & 0o77 == 0
    assert laptop.run("host", "stop").status == 0
    assert not secret.exists()
    with laptop.opened(*arguments) as run:
        assert ask_with(cookies, run.url(), "api/contents")[0] == 403
        assert ask_with(cookies, run.url(), "api/kernels", b"{}")[0] == 403
        status, place, _ = ask_with(cookies, run.url(), path)
        assert status == 302 and "/login" in place
        assert api(run.url(), "kernels") == []


def test_the_browser_of_another_user_on_the_laptop_is_not_sent_on(eve: User) -> None:
    listener = rjupyter.listen_on(0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=rjupyter._redirect_once, args=(listener, "/secret", "http://127.0.0.1:1/?token=t"))
    thread.start()
    assert as_user(eve, CONNECT, str(port), "/secret") == "404\n"
    mapped = CONNECT.replace("AF_INET)", "AF_INET6)").replace('"127.0.0.1"', '"::ffff:127.0.0.1"')
    assert as_user(eve, mapped, str(port), "/secret") == "404\n"
    assert rjupyter.http_request(("127.0.0.1", port), "/secret", "", 10)[0] == 302
    thread.join(10)
    assert not thread.is_alive()


# Wants a port whenever it is free, and listens there; what it is sent, it throws away.
GRABBER = """
import socket, sys
print("up", flush=True)
while True:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("127.0.0.1", int(sys.argv[1])))
        s.listen(8)
        break
    except OSError:
        s.close()
print("got it", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def grabbing(user: User, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Let another user be after a local port meanwhile. What she says is not read ahead of: got_it looks for more."""
    argv = ["/usr/bin/python3", "-IS", "-c", GRABBER, str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, bufsize=0, stdin=pipe, stdout=pipe, user=user.uid, group=65534, extra_groups=[], cwd="/"
    ) as grabber:
        try:
            assert grabber.stdout is not None and grabber.stdout.readline() == b"up\n"
            yield grabber
        finally:
            grabber.kill()


def got_it(grabber: "subprocess.Popen[bytes]") -> bool:
    assert grabber.stdout is not None
    return bool(select.select([grabber.stdout], [], [], 0)[0])


def kill_ssh(host: Host, mark: str) -> None:
    os.kill(ssh_of(mark), signal.SIGKILL)


def end_session(host: Host, mark: str) -> None:
    host.sshd.end_connections()


def end_server(host: Host, mark: str) -> None:
    """The forward is closed before the host has said what became of the server."""
    os.killpg(host.servers()[0]["pid"], signal.SIGKILL)


@pytest.mark.parametrize("end", [kill_ssh, end_session])
def test_another_user_does_not_get_the_local_port_while_ssh_is_down(
    laptop: Laptop, host: Host, eve: User, mark: str, end: Callable[[Host, str], None]
) -> None:
    port = quiet_port()
    run = laptop.start("-v", "--local-port", str(port), "host", has_terminal=False)
    url = run.url()
    run.expect("To end it")
    with grabbing(eve, port) as grabber:
        host.sshd.stop()
        end(host, mark)
        run.expect("Not yet: cannot connect", 60, times=3)
        assert not got_it(grabber)
    host.sshd.start()
    run.expect("Connected to host again")
    assert is_up(url)


BIND = """
import socket, sys
s = socket.socket()
for option in socket.SO_REUSEADDR, socket.SO_REUSEPORT:
    s.setsockopt(socket.SOL_SOCKET, option, 1)
try:
    s.bind(("127.0.0.1", int(sys.argv[1])))
    print("got it")
except OSError as error:
    print(error.strerror)
"""


def test_another_user_does_not_get_the_local_port_as_we_begin_to_listen(
    eve: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment ours can be shared, as with what ssh has just lost; on a busy machine, for longer."""
    port = rjupyter.LocalPort(quiet_port())
    tried = []

    def listen_late(self: socket.socket, backlog: int) -> None:
        tried.append(as_user(eve, BIND, str(port.number)))
        listen(self, backlog)

    assert port.hold()
    with port.lent(), rjupyter.listen_on(port.number) as ssh:
        client = socket.create_connection(("127.0.0.1", port.number))
        lost, _ = ssh.accept()
    listen = socket.socket.listen
    monkeypatch.setattr(socket.socket, "listen", listen_late)
    assert port.hold()
    monkeypatch.undo()
    assert tried == ["Address already in use\n"]
    for each in (lost, client, port):
        each.close()


def test_local_port_is_held_where_it_cannot_be_shared_among_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a Python without that option: Anaconda's of 2020."""
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    port = rjupyter.LocalPort(quiet_port())
    assert port.hold() and port.hold()
    with port.lent(), rjupyter.listen_on(port.number):
        pass
    port.close()


def test_another_user_does_not_get_the_local_port_of_a_server_that_ended(
    laptop: Laptop, host: Host, eve: User, mark: str
) -> None:
    port = quiet_port()
    run = laptop.start("--local-port", str(port), "host", has_terminal=False)
    run.expect("To end it")
    with grabbing(eve, port) as grabber:
        grabber.send_signal(signal.SIGSTOP)
        end_server(host, mark)
        assert run.wait(30) == 4
        grabber.send_signal(signal.SIGCONT)
        wait_until(lambda: got_it(grabber), "it is free when we are gone", 20)


def test_another_user_who_got_the_local_port_is_named_and_nobody_logs_in_meanwhile(
    laptop: Laptop, host: Host, eve: User, mark: str, directory: Path
) -> None:
    """She is quick: between our leaving it and ssh's taking it, which a stub of ssh makes long."""
    stub, held = directory / "bin/ssh", directory / "held"
    stub.parent.mkdir()
    wait = 'case "$*" in *"-O forward"*) while [ -e %s ]; do sleep 0.02; done;; esac' % held
    stub.write_text('#!/bin/sh\n%s\nexec /usr/bin/ssh "$@"\n' % wait)
    stub.chmod(0o755)
    laptop.environment["PATH"] = "%s:%s" % (stub.parent, laptop.environment["PATH"])
    port = quiet_port()
    run = laptop.start("-v", "--local-port", str(port), "host", has_terminal=False)
    url = run.url()
    run.expect("To end it")
    held.touch()
    with grabbing(eve, port) as grabber:
        host.sshd.end_connections()
        wait_until(lambda: got_it(grabber), "she has it", 30)
        held.unlink()
        words = "^Not yet: cannot listen on local port %d: 127.0.0.1:%d is taken on this machine by %s"
        run.expect(words % (port, port, eve.name))
        logins = host.sshd.logins()
        run.expect("Not yet", times=4)
        assert host.sshd.logins() == logins
    run.expect("Connected to host again", 60)
    assert is_up(url)
    run.interrupt()
    run.wait()
    with grabbing(eve, port) as grabber:
        wait_until(lambda: got_it(grabber), "she has it", 30)
        check_failure(laptop.run("--local-port", str(port), "host"), 1, "is taken on this machine by " + eve.name)
        again = laptop.start("host", has_terminal=False)
        again.expect("^Local port %d is taken by %s now: close the pages" % (port, eve.name))
        assert ":%d/" % port not in again.url()


@pytest.mark.parametrize("has_page", [True, False])
def test_pages_that_stay_open_are_told_of_at_ctrl_c(laptop: Laptop, host: Host, has_page: bool) -> None:
    port = quiet_port()
    run = laptop.start("--local-port", str(port), "host", has_terminal=False)
    run.expect("To end it")
    with socket.create_connection(("127.0.0.1", port)) if has_page else contextlib.nullcontext():
        run.interrupt()
        assert run.wait() == 0
    assert ("Close its pages, too: whoever listens on port %d here" % port in run.stderr) == has_page


def test_connections_that_say_nothing_keep_nobody_from_the_one_time_address() -> None:
    listener = rjupyter.listen_on(0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=rjupyter._redirect_once, args=(listener, "/secret", "http://127.0.0.1:1/?token=t"))
    thread.start()
    with contextlib.ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        assert rjupyter.http_request(("127.0.0.1", port), "/other", "", 4)[0] == 404
        assert rjupyter.http_request(("127.0.0.1", port), "/secret", "", 4)[0] == 302
        thread.join(10)
    assert not thread.is_alive()


def test_runtime_directory_of_another_user_is_refused(laptop: Laptop, host: Host, eve: User) -> None:
    trap = laptop.runtime / "rjupyter"
    trap.mkdir(mode=0o777)
    os.chown(trap, eve.uid, -1)
    run = laptop.start("host", "list", has_terminal=False)
    assert run.wait() == 0, run.text  # in /tmp instead
    assert not list(trap.iterdir())
    shutil.rmtree(trap)


def test_control_sockets_that_were_left_are_removed(laptop: Laptop, host: Host) -> None:
    directory = laptop.runtime / "rjupyter"
    directory.mkdir(mode=0o700)
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive = directory / ("%x.ctl" % os.getpid())
    for path in (directory / ("%x.ctl" % dead.pid), alive):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as left:
            left.bind(str(path))
    assert laptop.run("host", "list").status == 0
    assert list(directory.glob("*.ctl")) == [alive]
    alive.unlink()


# -- who could connect ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0.0.0.0", "--ip 0.0.0.0: whoever reaches any address of host can connect to Jupyter, past ssh"),
        ("127.0.0.2", ""),
    ],
)
def test_an_address_that_others_reach_is_warned_of(laptop: Laptop, host: Host, address: str, words: str) -> None:
    run = laptop.start("--ip", address, "host", has_terminal=False)
    assert is_up(run.url())
    assert words in run.stderr if words else "--ip" not in run.stderr


# -- what is removed ---------------------------------------------------------------------------------------------------


def test_what_another_user_put_into_our_place_leads_to_nothing_of_ours(
    laptop: Laptop, host: Host, directory: Path, eve: User
) -> None:
    """Ours in /tmp is hers if she was first; what is a week old in there would be removed."""
    ours = directory / ("host/rjupyter-%d" % os.getuid())
    ours.mkdir()
    thesis = host.home / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("all of it")
    for path in (thesis / "chapter.tex", thesis):
        os.utime(path, (1, 1))
    for name in ("servers", "runs"):
        (ours / name).symlink_to(host.home)
        os.chown(ours / name, eve.uid, -1, follow_symlinks=False)
    os.chown(ours, eve.uid, -1)
    with laptop.opened("host"):
        pass
    assert (thesis / "chapter.tex").read_text() == "all of it"
    os.chown(ours, os.getuid(), -1)
    for name in ("servers", "runs"):
        (ours / name).unlink()


# -- idle -------------------------------------------------------------------------------------------------------------


# Jupyter looks once a minute, and a test cannot wait for that.
LOOKS_OFTEN = """
from tornado import ioloop
PeriodicCallback = ioloop.PeriodicCallback
ioloop.PeriodicCallback = lambda function, time_ms, *more: PeriodicCallback(function, min(time_ms, 1000), *more)
"""


@pytest.mark.waits
@pytest.mark.jupyter
@pytest.mark.parametrize("age", ["", "notebook-6.4", "lab-3.2"])
def test_an_idle_server_ends_by_itself_although_its_tunnel_stays(
    make_host: Callable[..., Host], laptop: Laptop, age: str
) -> None:
    """The older ones listen on a socket."""
    host = make_host(path=str(jupyter_of(age))) if age else make_host()
    (host.home / ".jupyter").mkdir()
    (host.home / ".jupyter/jupyter_config.py").write_text(LOOKS_OFTEN)
    run = laptop.start(*(["--socket"] if age else []), "--idle-timeout", "25s", "host", has_terminal=False)
    if age:
        run.expect(r"\(pid \d+, socket, ")
    assert compute(run.url(), "print(1)") == "1\n"
    assert api(run.url(), "kernels")
    assert run.wait(180) == 4, run.text
    assert "has ended" in run.stderr
    assert re.search("No kernels.*; shutting down", run.stderr), run.stderr
    assert not [record for record in host.servers() if rjupyter.process_identity(record["pid"])]


def test_a_duration_that_is_none(laptop: Laptop) -> None:
    for words in ("", "0", "5x", "-1", "1.5h", "99999999999"):
        check_failure(laptop.run("--idle-timeout=" + words, "host"), 2, "a duration is a number with s, m, h or d")


# -- many -------------------------------------------------------------------------------------------------------------


def test_twenty_servers_listed_in_one_call(laptop: Laptop, host: Host) -> None:
    laptop.start("host", has_terminal=False).url()
    (record,) = host.servers()
    for number in range(19):
        directory = host.home / ".local/state/rjupyter/servers" / ("%04x" % (0xAB00 + number))
        directory.mkdir()
        facts = {name: value for name, value in record.items() if name != "id"}
        facts.update(created=time.time() - 60 * number, node="n%d" % number if number % 2 else record["node"])
        facts.update(identity=record["identity"] if number % 3 else "boot:1")  # a pid that was used again
        (directory / "server.json").write_text(json.dumps(facts))
    logins = host.sshd.logins()
    servers = listed(laptop)
    assert len(servers) == 20
    assert host.sshd.logins() <= logins + 1  # none, where the tunnel is taken
    states = [server["state"] for server in servers]
    assert {state.split()[0] for state in states} == {"live", "ended", "on"}
    for directory in host.home.glob(".local/state/rjupyter/servers/ab*"):
        shutil.rmtree(directory)
