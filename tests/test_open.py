"""The main job, on real parts: sshd, Jupyter, kernels, a browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, List
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from browser import run_cell
from client import api, check_failure, compute, is_up, listed
from jupyters import CACHE, standin, standin_wheels
from notebooks import write_notebook
from sides import (
    SYSTEM_PATH,
    VENV_BIN,
    Host,
    Laptop,
    Run,
    bare_python,
    is_running,
    processes_with,
    quiet_port,
    wait_until,
    wait_until_gone,
)


def test_session_is_the_one_of_the_design(laptop: Laptop, host: Host) -> None:
    (host.home / "work").mkdir()
    port = str(quiet_port())  # or a page of another test comes to it, and that is told
    run = laptop.start("--no-browser", "--local-port", port, "host:work")
    run.expect(r"To end it: .*\n")  # all of the line, or ^C would stand in it
    run.interrupt()
    assert run.wait() == 0
    shown = [line.rpartition("\033[K")[2] for line in run.text.rstrip().split("\n")]  # what a terminal shows in the end
    lines = [line for line in shown if not line.startswith(("You are root on host", "sbatch is there"))]
    patterns = [
        r"Connected to host \(\w+@\S+, python 3\.\d+\.\d+\)\.",
        r"Launched Jupyter Notebook \d\S* in ~/work \(pid \d+, port \d+, \d+\.\d s\)\.",
        r"Forwarding 127\.0\.0\.1:\d+ to host:\d+\.",
        r"http://127\.0\.0\.1:\d+/tree\?token=[0-9a-f]{48}",
        r"Ctrl-C closes the tunnel; the server keeps running\.",
        r"To end it: \S*rjupyter\.py -F \S+ host stop",
        r"\^C",
        r"Closed\. To come back: \S*rjupyter\.py -F \S+ --local-port %s host:work" % port,
    ]
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_one_login_and_the_server_outlives_us(laptop: Laptop, host: Host) -> None:
    with laptop.opened("host") as run:
        url = run.url()
    assert run.stdout == url + "\n"
    assert host.sshd.logins() == 1
    (record,) = host.servers()
    assert is_running(record["pid"])


def test_second_run_comes_back(laptop: Laptop, host: Host) -> None:
    with laptop.opened("--local-port", str(quiet_port()), "host") as first:
        url = first.url()
        (record,) = host.servers()
    second = laptop.start("host", has_terminal=False)
    assert second.url() == url
    assert re.search(r"Found Jupyter Notebook \d\S* in ", second.stderr)
    assert "(pid %d," % record["pid"] in second.stderr
    assert host.sshd.logins() == 2


def test_local_port_is_the_same_although_a_lower_one_became_free(laptop: Laptop, host: Host) -> None:
    for name in ("one", "two"):
        (host.home / name).mkdir()
    with laptop.opened("host:one") as one, laptop.opened("--local-port", str(quiet_port()), "host:two") as two:
        url = two.url()
        assert urlsplit(url).port != urlsplit(one.url()).port
    again = laptop.start("host:two", has_terminal=False)
    assert again.url() == url


@pytest.mark.jupyter
def test_kernel_computes_through_the_tunnel_and_stop_ends_it(laptop: Laptop, host: Host, mark: str) -> None:
    """It has the user's umask, and not our token; of the server nothing is left, and stopping again finds nothing."""
    with laptop.opened("host") as run:
        url = run.url()
        token = parse_qs(urlsplit(url).query)["token"][0]
        told = compute(url, "import os; print(6 * 7, '%03o' % os.umask(0)); print(dict(os.environ))")
        assert told.splitlines()[0] == "42 %03o" % current_umask() and token not in told
    stop = laptop.run("host", "stop")
    assert stop.status == 0
    assert "Stopped Jupyter Notebook in ~ (pid " in stop.stderr
    assert host.servers() == []
    wait_until_gone(mark, "all gone")
    again = laptop.run("host", "stop")
    assert (again.status, "No server of yours runs there." in again.stderr) == (0, True)


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def test_new_starts_another(laptop: Laptop, host: Host) -> None:
    first = laptop.start("host", has_terminal=False)
    first.url()
    second = laptop.start("--new", "host", has_terminal=False)
    assert second.url() != first.url()
    assert len({record["pid"] for record in host.servers()}) == 2
    # With two of them, the hint must name the one.
    identity = second.expect(r"To end it: .* host stop ([0-9a-f]{4})").group(1)
    assert identity in [record["id"] for record in host.servers()]


def test_stop_names_the_servers_when_there_are_several(laptop: Laptop, host: Host) -> None:
    for _ in range(2):
        run = laptop.start("--new", "host", has_terminal=False)
        run.url()
    stop = laptop.run("host", "stop")
    assert stop.status == 1
    for record in host.servers():
        assert record["id"] in stop.stderr
    one, two = host.servers()
    stop = laptop.run("host", "stop", one["id"])
    assert stop.status == 0, stop.text
    assert [record["id"] for record in host.servers()] == [two["id"]]
    wrong = laptop.run("host", "stop", "zzzz")
    assert (wrong.status, "zzzz" in wrong.stderr) == (1, True)


def test_stop_on_exit(laptop: Laptop, host: Host) -> None:
    with laptop.opened("--stop-on-exit", "host") as run:
        run.expect("ends the server")
        (record,) = host.servers()
    assert not is_running(record["pid"])
    assert host.servers() == []


def test_stop_on_exit_where_the_host_cannot_be_reached(laptop: Laptop, host: Host) -> None:
    run = laptop.start("--stop-on-exit", "host", has_terminal=False)
    run.expect("ends the server")
    host.sshd.stop()
    host.sshd.end_connections()
    run.expect("onnection .*lost|onnecting")
    run.interrupt()
    assert run.wait() != 0
    assert re.search(r"The server keeps running\.\nTo end it: .* host stop \w{4}\n", run.stderr), run.text
    host.sshd.start()
    assert "Stopped" in laptop.run("host", "stop").stderr


def test_background_and_close(laptop: Laptop, host: Host, mark: str) -> None:
    run = laptop.start("-f", "--no-browser", "host")
    assert run.wait() == 0
    url = run.url()
    assert api(url, "status")["kernels"] == 0
    other = laptop.run("other", "close")
    assert (other.status, "No tunnel to other" in other.stderr) == (0, True)
    close = laptop.run("host", "close")
    assert close.status == 0
    assert "Closed the tunnel on 127.0.0.1:%s." % urlsplit(url).port in close.stderr
    with pytest.raises(OSError):
        api(url, "status")
    assert is_running(host.servers()[0]["pid"])


def test_close_with_options_of_ssh_closes_the_tunnels_that_have_them(laptop: Laptop, host: Host) -> None:
    ways: List[List[str]] = [[], ["-o", "Compression=yes"]]
    one, two = [laptop.run(*way, "-f", "--local-port", str(quiet_port()), "host").url() for way in ways]
    assert laptop.run(*ways[1], "host", "close").text.count("Closed the tunnel") == 1
    assert is_up(one) and not is_up(two)
    assert laptop.run("other", "close", "--all").text.count("Closed the tunnel") == 1
    assert not is_up(one)


def test_background_tells_its_failure_by_its_status(laptop: Laptop, host: Host) -> None:
    run = laptop.run("-f", "host:nowhere")
    assert (run.status, "no such directory" in run.stderr) == (1, True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_signals_close_the_tunnel_like_ctrl_c(laptop: Laptop, host: Host, signum: int) -> None:
    run = laptop.start("host", has_terminal=False)
    run.expect("To end it")
    os.kill(run.pid, signum)
    assert run.wait() == 0
    assert is_running(host.servers()[0]["pid"])


def test_kill_9_leaves_nothing_on_the_laptop(laptop: Laptop, host: Host, mark: str) -> None:
    run = laptop.start("--local-port", str(quiet_port()), "host", has_terminal=False)
    url = run.url()
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    wait_until(lambda: not [w for w in processes_with(mark).values() if w.startswith("ssh ")], "ssh is gone", 10)
    again = laptop.start("host", has_terminal=False)
    assert again.url() == url


@pytest.mark.jupyter
def test_ctrl_c_before_there_is_a_result(laptop: Laptop, slow_host: Host) -> None:
    run = laptop.start("host")
    run.expect("Launching Jupyter")
    run.interrupt()
    assert run.wait() == 130
    # The launch goes on without us; the next run finds that server, and starts no second one.
    (slow_host.home / "go").touch()
    again = laptop.start("host", has_terminal=False)
    again.expect("Found Jupyter Notebook")
    again.url()
    assert len(slow_host.servers()) == 1


NASTY = [
    "a b",
    'it\'s "q"',
    "#1 50% ?x&y=z",
    "$(touch pwned) `id` $HOME",
    "new\nline",
    "Übung 日本",
    "~tilde",
    "-dash",
    "a;b|c",
]


def test_names_that_hurt(laptop: Laptop, host: Host) -> None:
    for name in NASTY:
        directory = host.home / name
        directory.mkdir()
        write_notebook(directory / (name + ".ipynb"), "")
        with laptop.opened("host:./%s/%s.ipynb" % (name, name)) as run:
            url = run.url()
            (record,) = [record for record in host.servers() if record["root_dir"] == str(directory)]
            assert os.readlink("/proc/%d/cwd" % record["pid"]) == str(directory), name
            assert unquote(urlsplit(url).path) == "/notebooks/%s.ipynb" % name
            with urllib.request.urlopen(url, timeout=30) as page:
                assert page.status == 200, name
    assert not list(host.home.rglob("pwned"))


@pytest.mark.jupyter
def test_name_that_hurts_in_jupyter(laptop: Laptop, host: Host) -> None:
    name = '#1 50% ?x&y=z; it\'s "q" $(touch pwned) `id` | Übung\n日本'
    (host.home / name).mkdir()
    write_notebook(host.home / name / (name + ".ipynb"), "")
    url = laptop.start("host:./%s/%s.ipynb" % (name, name), has_terminal=False).url()
    assert [entry["name"] for entry in api(url, "contents")["content"]] == [name + ".ipynb"]
    with urllib.request.urlopen(url, timeout=30) as page:
        assert page.status == 200 and b"Jupyter" in page.read()
    assert not list(host.home.rglob("pwned"))


def test_file_that_is_no_notebook(laptop: Laptop, host: Host) -> None:
    (host.home / "notes.txt").write_text("x")
    assert urlsplit(laptop.start("host:notes.txt", has_terminal=False).url()).path == "/edit/notes.txt"


@pytest.mark.jupyter
def test_lab(laptop: Laptop, host: Host) -> None:
    url = laptop.start("--lab", "host", has_terminal=False).url()
    assert urlsplit(url).path == "/lab"
    with urllib.request.urlopen(url, timeout=30) as page:
        assert b"JupyterLab" in page.read()


def test_six_at_once(laptop: Laptop, host: Host) -> None:
    runs = [laptop.start("--new", "host", has_terminal=False) for _ in range(6)]
    urls = [run.url() for run in runs]
    assert len({urlsplit(url).port for url in urls}) == 6
    assert len({url.partition("token=")[2] for url in urls}) == 6
    assert len({record["pid"] for record in host.servers()}) == 6
    for url in urls:
        assert api(url, "status")["kernels"] == 0
    for run in runs:
        run.interrupt()
    assert [run.wait() for run in runs] == [0] * 6


def test_taken_ports_lead_to_the_next(laptop: Laptop, host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        run = laptop.start("--port", str(taken), "host", has_terminal=False)
        run.url()
        assert int(run.expect(r"port (\d+),").group(1)) > taken


def test_fixed_local_port(laptop: Laptop, host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = str(stranger.getsockname()[1])
        run = laptop.run("--local-port", taken, "host")
        assert run.status == 1
        assert "cannot listen on local port " + taken in run.stderr
    again = laptop.start("--local-port", taken, "host", has_terminal=False)
    assert str(urlsplit(again.url()).port) == taken


def test_private_files_stay_private(laptop: Laptop, host: Host) -> None:
    run = laptop.start("host", has_terminal=False)
    token = parse_qs(urlsplit(run.url()).query)["token"][0]
    for top in (host.home, laptop.home, laptop.runtime):
        for path in top.rglob("*"):
            if path.is_file() and token.encode() in path.read_bytes():
                modes = [p.stat().st_mode & 0o077 for p in [path, *path.parents] if str(p).startswith(str(top))]
                assert 0 in modes, path  # closed itself, or in a directory that is


class StubBrowser:
    """A program that stands in for a browser: it writes down its argv and the page it gets."""

    def __init__(self, directory: Path) -> None:
        self.argv = directory / "browser.argv"
        self.page = directory / "browser.page"
        self.program = directory / "browser"
        self.program.write_text(
            "#!%s\nimport sys, urllib.request\nopen(%r, 'w').write(' '.join(sys.argv))\n"
            "page = urllib.request.urlopen(sys.argv[1])\nopen(%r, 'w').write(page.url)\n"
            % (sys.executable, str(self.argv), str(self.page))
        )
        self.program.chmod(0o755)


def test_stub_browser_gets_the_page_but_no_token_in_its_argv(laptop: Laptop, host: Host) -> None:
    browser = StubBrowser(laptop.home)
    run = laptop.start("--browser", "%s %%s" % browser.program, "host", has_terminal=False)
    token = parse_qs(urlsplit(run.url()).query)["token"][0]
    wait_until(lambda: browser.page.exists() and browser.page.read_text(), "the browser has the page")
    assert urlsplit(browser.page.read_text()).port == urlsplit(run.url()).port
    assert token not in browser.argv.read_text()


def openers(mark: str) -> Dict[int, str]:
    """Return the processes that start a browser."""
    return {pid: words for pid, words in processes_with(mark).items() if "webbrowser" in words}


def test_browser_that_ends_badly_after_it_had_the_page(laptop: Laptop, host: Host, mark: str) -> None:
    browser = StubBrowser(laptop.home)
    with browser.program.open("a") as program:
        program.write("while not os.path.exists(%r): time.sleep(0.02)\nsys.exit(3)\n" % str(laptop.home / "go"))
    browser.program.write_text(browser.program.read_text().replace("import sys,", "import os, sys, time,"))
    with laptop.opened("--browser", "%s %%s" % browser.program, "host") as run:
        wait_until(lambda: browser.page.exists() and browser.page.read_text(), "the browser has the page")
        (laptop.home / "go").touch()
        wait_until(lambda: not openers(mark), "the browser has ended")
    assert "No browser" not in run.text, run.text


def test_browser_that_cannot_be_started(laptop: Laptop, host: Host) -> None:
    with laptop.opened("--browser", "false %s", "host") as run:
        run.expect("^'false %s' could not be started")


@pytest.mark.parametrize("name", ["w3m", "lynx", "www-browser"])
def test_browser_of_text_is_not_opened(laptop: Laptop, host: Host, name: str) -> None:
    """It would take over the terminal, and show no notebook; doctor says so."""
    program = laptop.home / "bin" / name
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n>%s/eaten\n" % laptop.home)
    program.chmod(0o755)
    laptop.environment["PATH"] = "%s:%s" % (program.parent, SYSTEM_PATH)
    run = laptop.start("host")
    run.expect("No browser could be started. Open the address above.")
    run.interrupt()
    assert run.wait() == 0 and not (laptop.home / "eaten").exists()
    assert re.search("browser +%s; the address is printed" % name, laptop.run("host", "doctor").stdout)


def test_browser_with_a_space_in_its_path(laptop: Laptop, host: Host) -> None:
    place = laptop.home / "my browser"
    place.mkdir()
    browser = StubBrowser(place)
    with laptop.opened("--browser", str(browser.program), "host"):
        wait_until(lambda: browser.page.exists() and browser.page.read_text(), "the browser has the page")


@pytest.mark.jupyter
def test_real_browser_runs_a_cell(laptop: Laptop, host: Host, driver: Any) -> None:
    write_notebook(host.home / "train.ipynb", "")
    url = laptop.start("host:train.ipynb", has_terminal=False).url()
    driver.get(url)
    run_cell(driver, "print('six times seven is', 6 * 7)", "six times seven is 42")


# -- failures ---------------------------------------------------------------------------------------------------------


def test_unknown_host(laptop: Laptop) -> None:
    run = laptop.run("no-such-host.invalid")
    check_failure(run, 255, "cannot connect to no-such-host.invalid", "why: ssh: Could not resolve", "try: ssh no-such")


def test_a_name_that_is_mistyped_is_guessed_but_not_for_what_ends_something(laptop: Laptop, host: Host) -> None:
    """The user stays; and where a jump host is out of reach, the name is right."""
    for typed, words in (["hosst:work", "host:work"], ["bob@hosst", "bob@host"]):
        assert laptop.run(typed).stderr.rstrip().endswith(" " + words)
    for action in (["stop", "--all"], ["eval", "1"]):
        assert " host " not in laptop.run("hosst", *action).stderr.partition("try: ")[2]
    with host.sshd.config.open("a") as stream:
        stream.write("\nHost hos*\nProxyJump no-such-host.invalid\n")
    assert not laptop.run("host2").stderr.rstrip().endswith(" host")


def test_a_local_port_that_is_taken_is_told_before_anything_is_launched(laptop: Laptop, host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = laptop.run("--local-port", str(taken.getsockname()[1]), "host")
    check_failure(run, 1, "cannot listen on local port", "another --local-port")
    assert "Launch" not in run.stderr and not host.servers()


def test_refused(laptop: Laptop, host: Host) -> None:
    host.sshd.stop()
    run = laptop.run("host")
    check_failure(run, 255, "cannot connect to host", "Connection refused", "try: ssh -F")
    assert run.text.count("refused") == 1  # although what ssh says passes as it comes


def test_wrong_key(laptop: Laptop, host: Host) -> None:
    other = host.sshd.directory / "other_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    host.sshd.config.write_text(host.sshd.config.read_text().replace("user_key", "other_key"))
    check_failure(laptop.run("host"), 255, "Permission denied", "no terminal here", "try: a key without a question")


def test_changed_host_key(laptop: Laptop, host: Host) -> None:
    known = host.sshd.directory / "known_hosts"
    words = known.read_text().split()
    other = (host.sshd.directory / "user_key.pub").read_text().split()[1]
    known.write_text(" ".join([words[0], words[1], other]) + "\n")
    run = laptop.run("host")
    check_failure(run, 255, "host key of host is not the one known here", "ssh-keygen")
    assert run.text.index("@@@") < run.text.index("Offending") < run.text.index("rjupyter: ")  # all that ssh says of it


def test_unknown_host_key_without_a_terminal(laptop: Laptop, host: Host) -> None:
    (host.sshd.directory / "known_hosts").write_text("")
    check_failure(laptop.run("host"), 255, "is not known here", "once, in a terminal")


def test_unknown_host_key_is_asked_by_ssh_itself(laptop: Laptop, host: Host) -> None:
    (host.sshd.directory / "known_hosts").write_text("")
    host.sshd.config.write_text(host.sshd.config.read_text().replace("StrictHostKeyChecking yes", ""))
    run = laptop.start("--no-browser", "host")
    run.expect(r"Are you sure you want to continue connecting")
    run.type("yes\n")
    run.url()


def test_no_such_directory(laptop: Laptop, host: Host) -> None:
    check_failure(laptop.run("host:nowhere/at all"), 1, "no such directory", str(host.home / "nowhere/at all"))
    check_failure(laptop.run("host:x.ipynb"), 1, "no such notebook")


@pytest.mark.jupyter
def test_jupyter_that_dies_at_start(laptop: Laptop, host: Host) -> None:
    run = laptop.run("--server-arg=--ServerApp.port=nonsense", "host")
    check_failure(run, 4, "Jupyter did not start", "exited with status 1", "nonsense", "failed.log")
    assert "nonsense" in (host.home / ".local/state/rjupyter/failed.log").read_text()
    assert host.servers() == []


def stub_jupyter(directory: Path, script: str) -> str:
    """Make a directory with a stub for `jupyter-notebook`, and return it for a PATH."""
    directory.mkdir()
    (directory / "jupyter-notebook").write_text("#!/bin/sh\n" + script)
    (directory / "jupyter-notebook").chmod(0o755)
    return str(directory)


def test_stub_jupyter_that_never_listens(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    make_host(path=stub_jupyter(directory / "bin", "echo still importing; exec sleep 600"))
    run = laptop.run("--start-timeout", "1", "host")
    check_failure(run, 6, "did not start in time", "still importing", "--start-timeout")


def test_stub_jupyter_loses_its_port_at_the_last_moment(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    script = 'test -e "$HOME/second" && exec %s/jupyter-notebook "$@"\n' % standin()
    script += 'touch "$HOME/second"; echo "OSError: [Errno 98] Address already in use"; exit 1'
    make_host(path=stub_jupyter(directory / "bin", script))
    port = quiet_port()
    run = laptop.start("--port", str(port), "host", has_terminal=False)
    run.url()
    assert "port %d," % (port + 1) in run.stderr


LOSES_ITS_PORT = """
import os, time
from jupyter_server.serverapp import ServerApp

def find_and_wait(self, find=ServerApp._find_http_port):
    find(self)
    if not os.path.exists("first"):
        open("first", "w").close()
        while not os.path.exists("taken"):
            time.sleep(0.02)

ServerApp._find_http_port = find_and_wait
"""


@pytest.mark.jupyter
def test_port_that_jupyter_loses_between_its_look_and_its_bind(laptop: Laptop, host: Host) -> None:
    (host.home / ".jupyter").mkdir()
    (host.home / ".jupyter/jupyter_server_config.py").write_text(LOSES_ITS_PORT)
    port = quiet_port()
    run = laptop.start("--port", str(port), "host", has_terminal=False)
    wait_until((host.home / "first").exists, "it has looked")
    with socket.create_server(("127.0.0.1", port)):
        (host.home / "taken").touch()
        run.expect("Launched .* port %d," % (port + 1))
    assert [server["state"] for server in listed(laptop)] == ["live"]  # the first left its runtime file


def test_no_jupyter_and_no_install(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    make_host(path=bare_python(directory / "bin"))
    run = laptop.run("--no-install", "host")
    check_failure(
        run, 3, "no Jupyter on the host", str(directory / "bin"), "-m venv --system-site-packages ~/.local/share"
    )


def installed(laptop: Laptop, host: Host, tool: str) -> str:
    """Open where there is no Jupyter; return the address."""
    run = laptop.start("host", has_terminal=False)
    url = str(run.expect(r"^http://127\.0\.0\.1:\d+/\S*$", 400).group())
    venv = host.home / ".local/share/rjupyter/venv"
    assert "installing it in %s (%s)." % (venv, tool) in run.stderr
    assert "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text()
    return url


@pytest.mark.jupyter
def test_no_jupyter_installs_a_private_one_by_uv(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    path = bare_python(directory / "bin")
    (directory / "bin" / "uv").symlink_to(VENV_BIN / "uv")
    cache = str(CACHE / "uv")  # what was loaded from the index once is linked from there
    host = make_host(path=path, UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1", UV_CACHE_DIR=cache)
    url = installed(laptop, host, "uv")
    assert compute(url, "import sys; print(sys.prefix)") == "%s/.local/share/rjupyter/venv\n" % host.home


def test_no_jupyter_installs_a_private_one_by_pip(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    """Which the next run takes, and installs none; until its Python is gone, as after an upgrade of the system's."""
    path = bare_python(directory / "bin")
    host = make_host(path=path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(standin_wheels()))
    assert api(installed(laptop, host, "pip"), "status")["kernels"] == 0
    laptop.end_runs()
    assert "Stopped" in laptop.run("host", "stop").stderr
    again = laptop.start("host", has_terminal=False)
    again.url()
    assert "installing" not in again.stderr
    laptop.end_runs()
    assert "Stopped" in laptop.run("host", "stop").stderr
    for python in (host.home / ".local/share/rjupyter/venv/bin").glob("python*"):
        python.unlink()
        python.symlink_to("/usr/bin/python-of-before")
    assert api(installed(laptop, host, "pip"), "status")["kernels"] == 0


def test_install_that_fails(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """By uv, whose environment is made at once."""
    path = bare_python(directory / "bin")
    (directory / "bin/uv").symlink_to(VENV_BIN / "uv")
    make_host(path=path, UV_OFFLINE="1")
    check_failure(laptop.run("host"), 3, "could not be installed", "bin/uv pip install --python ~/.local")


def test_stranger_behind_the_port_is_not_opened(laptop: Laptop, host: Host) -> None:
    with laptop.opened("host"):
        pass
    (record,) = host.servers()
    info = Path(record["runtime_dir"]) / ("jpserver-%d.json" % record["pid"])
    facts = json.loads(info.read_text())
    info.write_text(json.dumps(dict(facts, token="0" * 48)))
    check_failure(laptop.run("host"), 1, "something else answers", "is not the server")


def test_server_that_ends_while_we_hold_it(laptop: Laptop, host: Host) -> None:
    run = laptop.start("host", has_terminal=False)
    url = run.url()
    api(url, "shutdown", "POST")
    assert run.wait() == 4
    assert "has ended" in run.stderr


def test_connection_that_ends_while_we_hold_it(laptop: Laptop, host: Host) -> None:
    run = laptop.start("--no-reconnect", "host", has_terminal=False)
    run.expect("To end it")
    host.sshd.stop()
    host.sshd.end_connections()
    assert run.wait() == 255
    assert "was lost" in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["-oProxyCommand=touch pwned"],
        ["--port", "99999", "host"],
        ["--nonsense", "host"],
        ["host", "dance"],
        ["--", "-x"],
    ],
)
def test_wrong_usage(laptop: Laptop, arguments: Any) -> None:
    check_failure(laptop.run(*arguments), 2, "wrong usage", "try: ")
    assert not (laptop.home / "pwned").exists()


def test_no_ssh_on_path(laptop: Laptop) -> None:
    check_failure(laptop.run("host", PATH="/nonexistent"), 1, "no ssh on this machine")


def test_example_config_is_valid() -> None:
    example = Path(__file__).parent.parent / ".ssh_config.example"
    aliases = re.findall(r"^Host (\w\S*)", example.read_text(), re.MULTILINE)
    assert len(aliases) >= 5
    for alias in aliases:
        argv = ["ssh", "-F", str(example), "-G", alias]
        answer = subprocess.run(argv, capture_output=True, text=True, env={"PATH": SYSTEM_PATH, "HOME": "/nonexistent"})
        assert answer.returncode == 0, answer.stderr


@pytest.mark.sshd  # make demo has its own
@pytest.mark.jupyter
def test_make_demo(laptop: Laptop, mark: str) -> None:
    """The README's first host, in a terminal: what its welcome advises is typed; afterwards nothing of it is left."""
    top = Path(__file__).parent.parent
    argv = ["make", "-C", str(top), "demo", "PYTHON=%s" % sys.executable]
    run = Run(argv, laptop.environment, has_terminal=True, cwd=str(top))
    laptop.runs.append(run)
    prompts = 1

    def type_line(line: str) -> None:
        run.expect(r"^(\x1b\[\?2004h)?demo\$ ", times=prompts)
        run.type(line + "\n")

    advised = [line.strip() for line in run.expect(r"Try:\s*\n((?:.*\n)+?)\s*\S*demo\$").group(1).splitlines()]
    lines = [re.split(" {2,}", line)[0] for line in advised if line]
    assert lines[0] == lines[1] == "rjupyter demo:work" and lines[-1] == "exit", lines
    ends = (
        "Launched Jupyter",
        "Found Jupyter",
        " live ",
        "Executed hello.ipynb: 1 cell ",
        "Stopped Jupyter",
        "are gone",
    )
    for line, said in zip(lines, ends):
        is_open = line == "rjupyter demo:work"
        type_line(line.replace("rjupyter", "rjupyter --no-browser") if is_open else line)
        run.expect(said)
        if is_open:
            run.expect("To end it: rjupyter demo stop", times=prompts)
            run.interrupt()
            run.expect("To come back: rjupyter demo:work", times=prompts)
        prompts += 1
    assert run.wait() == 0 and run.text.count("rjupyter: ") == 0, run.text
    assert not list(laptop.directory.glob("rj-demo-*"))


@pytest.mark.sshd
def test_make_demo_of_one_line_and_of_a_script(laptop: Laptop, mark: str) -> None:
    top = Path(__file__).parent.parent
    for words, script in (["DEMO_ARGS=demo list"], ""), ([], "rjupyter demo list\n"):
        argv = ["make", "-C", str(top), "demo", "PYTHON=%s" % sys.executable, *words]
        run = subprocess.run(argv, env=laptop.environment, input=script, capture_output=True, text=True)
        assert run.returncode == 0 and "No server of yours runs there." in run.stderr, run.stderr
        assert "are gone.\n" in run.stdout
