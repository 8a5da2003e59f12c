"""Several servers on a shared host: list, logs, attach, stop; and what is written there by others, or damaged."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from client import api, busy_kernel, check_failure, compute, listed
from execution import code, printed, write_notebook
from jupyters import standin
from sides import VENV_BIN, Host, Laptop, processes_with, quiet_port, wait_until, wait_until_gone
from strangers import counting_ps, leave_runtime_files, runtime_directory

import rjupyter


def test_state_directory_that_is_named_from_home(laptop: Laptop, host: Host) -> None:
    """As PATH is; whatever directory Jupyter is then started in."""
    (host.home / "work").mkdir()
    for place in ("scratch/my state", "~/scratch/state/"):
        with laptop.opened("--state-dir", place, "host:work") as run:
            assert api(run.url(), "status")["kernels"] == 0
            kept = list(host.home.glob("scratch/*/servers/*/server.json"))
            assert len(kept) == 1 and not host.servers(), (place, kept)
        stop = laptop.run("--state-dir", place, "host:work", "stop")
        assert stop.status == 0 and "Stopped" in stop.stderr, (place, stop.text)
    assert not [path for path in host.home.rglob("scratch") if path.parent != host.home]


def test_state_directory_that_others_use_is_left_as_it_is(laptop: Laptop, host: Host) -> None:
    scratch = host.home / "scratch"
    scratch.mkdir()
    scratch.chmod(0o755)
    (scratch / "data").write_text("")
    check_failure(laptop.run("--state-dir", "scratch", "host"), 1, "scratch is open to others, and not empty")
    assert scratch.stat().st_mode & 0o777 == 0o755
    for _ in range(2):
        with laptop.opened("--state-dir", "scratch/ours", "host"):
            pass
    assert laptop.run("--state-dir", "scratch/ours", "host", "stop").status == 0


@pytest.mark.jupyter
def test_notebook_whose_state_directory_is_named_from_home(laptop: Laptop, host: Host) -> None:
    (host.home / "work").mkdir()
    write_notebook(laptop.home / "a.ipynb", code("print(6 * 7)"))
    executed = laptop.run("--state-dir", "scratch/my state", "host:work", "execute", "a.ipynb")
    assert executed.status == 0 and printed(laptop.home / "a.executed.ipynb") == ["42\n"], executed.text
    assert (host.home / "scratch/my state").is_dir()
    assert not [path for path in host.home.rglob("scratch") if path.parent != host.home]


@pytest.fixture
def by_hand(laptop: Laptop, host: Host, mark: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A JupyterLab that the user started on the host without us, in ~/hand."""
    with started_by_hand(host, mark, VENV_BIN) as process:
        yield process


@contextlib.contextmanager
def started_by_hand(
    host: Host, mark: str, binaries: Path, runtime: str = ".local/share/jupyter/runtime", **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    directory = host.home / "hand"
    directory.mkdir(exist_ok=True)
    environment.update({"HOME": str(host.home), "PATH": "/usr/bin:/bin", "RJUPYTER_TEST": mark})
    environment["RJUPYTER_SIDE"] = "host"
    argv = [str(binaries / "jupyter-lab"), "--no-browser", "--allow-root", "--port=%d" % quiet_port()]
    null = subprocess.DEVNULL
    process = subprocess.Popen(argv, cwd=directory, env=environment, stdin=null, stdout=null, stderr=null)
    info = host.home / runtime / ("jpserver-%d.json" % process.pid)

    def is_up() -> bool:
        try:
            with urllib.request.urlopen(json.loads(info.read_text())["url"] + "api", timeout=10) as answer:
                return bool(answer.status)
        except urllib.error.HTTPError:  # it answers, and wants its token
            return True
        except (OSError, ValueError):
            return False

    try:
        wait_until(is_up, "the server started by hand answers")
        yield process
    finally:
        process.kill()
        process.wait()


def test_list_of_nothing(laptop: Laptop, host: Host) -> None:
    run = laptop.run("host", "list")
    assert (run.status, run.stdout) == (0, "")
    assert "No server of yours runs there." in run.stderr


@pytest.mark.jupyter
def test_list(laptop: Laptop, host: Host, by_hand: "subprocess.Popen[bytes]") -> None:
    """And it is offered, ours and the one that was started by hand; of these, stop ends what is named."""
    (host.home / "work").mkdir()
    url = laptop.start("host:work", has_terminal=False).url()
    compute(url, "print(1)")
    kernel = api(url, "kernels")[0]["id"]
    wait_until(lambda: api(url, "kernels/" + kernel)["execution_state"] == "idle", "the kernel is idle")
    (record,) = host.servers()
    ours, other = sorted(listed(laptop), key=lambda server: not server["is_ours"])
    assert (ours["id"], ours["state"], ours["app"], ours["kernels"]) == (record["id"], "live", "notebook", 1)
    assert (ours["busy"], ours["root_dir"], ours["port"]) == (0, str(host.home / "work"), record["port"])
    assert 0 <= ours["idle_s"] < 60 and 0 <= ours["age_s"] < 60
    assert (other["id"], other["state"], other["app"]) == ("p%d" % by_hand.pid, "live", "lab")
    assert (other["is_ours"], other["root_dir"]) == (False, str(host.home / "hand"))
    table = laptop.run("host", "list").stdout.splitlines()
    assert table[0].split() == ["ID", "STATE", "APP", "DIRECTORY", "PORT", "KERNELS", "ACTIVE", "AGE"]
    assert [line.index("live") for line in table[1:]] == [table[0].index("STATE")] * 2
    assert len([line for line in table if line.endswith("not started by rjupyter")]) == 1
    with laptop.opened("--attach", other["id"], "host") as run:
        assert compute(run.url(), "import os; print(os.getcwd())") == "%s\n" % (host.home / "hand")
        assert "Found JupyterLab" in run.stderr
        assert run.stderr.rstrip().endswith("host stop " + other["id"]), run.stderr  # there is ours, which is not meant
    write_notebook(host.home / "hand/sub/a.ipynb")
    with laptop.opened("--attach", other["id"], "host:hand/sub/a.ipynb") as run:
        assert urlsplit(run.url()).path == "/lab/tree/sub/a.ipynb"
    with laptop.opened("host:hand") as run:
        assert "Found JupyterLab" in run.stderr and "(pid %d," % by_hand.pid in run.stderr
    with laptop.opened("host") as run:  # without a PATH: the newest of ours
        assert "(pid %d," % record["pid"] in run.stderr
    assert len(host.servers()) == 1
    assert laptop.run("host", "stop", "--all").status == 0
    assert by_hand.poll() is None and not host.servers()
    assert laptop.run("host", "stop", other["id"]).status == 0
    by_hand.wait(20)
    assert not list(runtime_directory(host).glob("jpserver-*"))


# What a terminal sets, and where Jupyter then keeps its runtime files.
PLACES = {
    "JUPYTER_RUNTIME_DIR": ("rt", "rt"),
    "JUPYTER_DATA_DIR": ("data", "data/runtime"),
    "XDG_DATA_HOME": ("xdg", "xdg/jupyter/runtime"),
}


def test_server_that_was_started_in_a_terminal_with_a_place_of_its_own_is_found(
    laptop: Laptop, host: Host, mark: str
) -> None:
    """One in a home that is not ours is not: several people may share an account."""
    for name, (place, runtime) in PLACES.items():
        with started_by_hand(host, mark, standin(), runtime, **{name: str(host.home / place)}) as process:
            (other,) = listed(laptop)
            assert (other["id"], other["state"], other["is_ours"]) == ("p%d" % process.pid, "live", False), name
            with laptop.opened("host:hand") as run:
                assert "(pid %d," % process.pid in run.stderr, (name, run.text)
            os.kill(process.pid, signal.SIGKILL)  # which leaves its file there
            process.wait()
            assert not listed(laptop), name
    assert not host.servers()


def test_place_of_a_terminal_that_ends_with_the_session_is_not_taken(laptop: Laptop, host: Host) -> None:
    """Ours is where the terminal's `jupyter server list` sees it, but for what vanishes at logout."""
    for variable, expected in (("$HOME/rt", "rt"), ("$HOME/run/jupyter", ".local/share/jupyter/runtime")):
        exports = "export XDG_RUNTIME_DIR=$HOME/run JUPYTER_RUNTIME_DIR=%s\n" % variable
        (host.home / ".profile").write_text(exports)
        with laptop.opened("--new", "--stop-on-exit", "host") as run:
            (record,) = host.servers()
            assert record["runtime_dir"] == str(host.home / expected), run.text
            assert [server["is_ours"] for server in listed(laptop)] == [True]


def test_server_on_another_node_and_one_that_ended(laptop: Laptop, host: Host) -> None:
    for _ in range(2):
        laptop.start("--new", "host", has_terminal=False).url()
    elsewhere, ended = host.servers()
    file = host.home / ".local/state/rjupyter/servers" / elsewhere["id"] / "server.json"
    moved = {"node": "node7", "identity": "another-boot:%s" % elsewhere["identity"].partition(":")[2]}
    file.write_text(json.dumps(dict(json.loads(file.read_text()), **moved)))
    os.killpg(ended["pid"], signal.SIGKILL)
    states = {server["id"]: server["state"] for server in listed(laptop) if server["is_ours"]}
    assert states == {elsewhere["id"]: "on node7", ended["id"]: "ended"}
    for words in (["host", "stop", elsewhere["id"]], ["--attach", elsewhere["id"], "host"]):
        check_failure(laptop.run(*words), 1, "%s is on another node, node7" % elsewhere["id"], "log in there")
    laptop.end_runs()
    with laptop.opened("host") as run:
        assert "Your server %s runs on another node, node7, if" % elsewhere["id"] in run.stderr, run.text
    os.killpg(elsewhere["pid"], signal.SIGKILL)


def test_files_that_make_no_sense_are_skipped(laptop: Laptop, host: Host) -> None:
    with laptop.opened("host"):
        pass
    (record,) = host.servers()
    good = json.loads((runtime_directory(host) / ("jpserver-%d.json" % record["pid"])).read_text())
    odd = runtime_directory(host)
    (odd / "jpserver-11.json").write_text("{" * 70000)
    (odd / "jpserver-12.json").write_text(json.dumps(dict(good, port="8888")))
    (odd / "jpserver-13.json").symlink_to("/etc/passwd")
    os.mkfifo(odd / "jpserver-14.json")
    (odd / "jpserver-15.json").write_bytes(b"\xff\xfe nonsense")
    (odd / "jpserver-x.json").write_text(json.dumps(good))
    (odd / ("jpserver-%s.json" % ("9" * 40))).write_text(json.dumps(good))
    (odd / "jpserver-16.json").write_text("[" * 30000)
    # Left by a server whose pid this kernel has now: to stop that would end this.
    words = ["/home/ana/jupyter/env", "/home/ana/.local/share/jupyter/runtime/kernel-1.json", "my notebook.ipynb"]
    stranger = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    (odd / ("jpserver-%d.json" % stranger.pid)).write_text(json.dumps(dict(good, pid=stranger.pid)))
    for name, text in (
        ("aaaa", "[]"),
        ("bbbb", json.dumps(dict(record, identity=1))),
        ("cccc", json.dumps({"pid": 1})),
    ):
        directory = host.home / ".local/state/rjupyter/servers" / name
        directory.mkdir()
        (directory / "server.json").write_text(text)
    servers = listed(laptop)
    stranger.kill()
    stranger.wait()
    assert [server["id"] for server in servers] == [record["id"]], servers
    again = laptop.start("host", has_terminal=False)
    again.expect("Found Jupyter")
    assert laptop.run("host", "stop", "--all").status == 0
    assert (odd / "jpserver-12.json").exists()  # not ours to remove


def test_files_that_other_servers_left_cost_no_process(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    asked = counting_ps(directory / "bin")
    host = make_host(path="%s:%s" % (directory / "bin", standin()))
    leave_runtime_files(host, 1000)
    with laptop.opened("host"):
        assert [server["id"] for server in listed(laptop)] == [record["id"] for record in host.servers()]
    with laptop.opened("host") as again:
        again.expect("Found Jupyter")
    check_failure(laptop.run("--attach", "p5000007", "host"), 1, "no server of yours has this id: p5000007")
    assert not asked.exists(), asked.read_text().splitlines()[:3]


def test_names_from_the_host_cannot_drive_the_terminal(laptop: Laptop, host: Host) -> None:
    name = "a\033]0;title\007\nb"
    (host.home / name).mkdir()
    laptop.start("host:./" + name, has_terminal=False).url()
    run = laptop.run("host", "list")
    assert "\033" not in run.text and "\007" not in run.text
    assert len(run.stdout.splitlines()) == 2


def test_one_started_by_hand_whose_token_no_address_can_hold(laptop: Laptop, host: Host, mark: str) -> None:
    """It is not in the way of another one in its directory; who asks for it is told."""
    with started_by_hand(host, mark, standin(), JUPYTER_TOKEN="two words") as process:
        with laptop.opened("host:hand") as run:
            assert "Launched Jupyter" in run.stderr
        check_failure(laptop.run("--attach", "p%d" % process.pid, "host"), 1, "with this token", "another token there")


def test_attach_to_what_is_not_there(laptop: Laptop, host: Host) -> None:
    check_failure(laptop.run("--attach", "zzzz", "host"), 1, "no server of yours has this id: zzzz", " host list\n")


@pytest.mark.jupyter
def test_stop_asks_when_a_kernel_computes(laptop: Laptop, host: Host) -> None:
    """Where nobody can answer, from cron or in a script, nothing that is computed is lost without a word for it."""
    busy_kernel(laptop.start("host", has_terminal=False).url())
    (server,) = listed(laptop)
    assert (server["kernels"], server["busy"]) == (1, 1)
    why = "Its kernel is busy in %s (%s)." % (host.home, server["id"])
    for words in (["host", "stop"], ["host:", "stop", "--all"], ["host", "stop", "--all"]):
        stop = laptop.run(*words)
        check_failure(stop, 1, "nothing was stopped", why, "no terminal", " %s --yes" % " ".join(words))
    no = laptop.start("host", "stop")
    no.expect(re.escape(why))
    no.expect("Stop it anyway")
    no.type("n\n")
    assert no.wait() == 1
    assert "Nothing was stopped." in no.text and [server["busy"] for server in listed(laptop)] == [1]
    yes = laptop.start("host", "stop")
    yes.expect("Stop it anyway")
    yes.type("y\n")
    assert yes.wait() == 0
    assert not listed(laptop)


def test_what_chooses_a_launch_does_not_hide_what_is_there(laptop: Laptop, host: Host) -> None:
    """The app of the configuration is for the next launch; one that is typed is meant, and others are named."""
    config = laptop.home / ".config/rjupyter/config"
    config.parent.mkdir(parents=True)
    config.write_text("[*]\napp = lab\nenv = none\nsocket\n")
    laptop.start("--no-config", "host", has_terminal=False).url()
    (server,) = listed(laptop)
    check_failure(laptop.run("--lab", "host", "stop"), 1, "no JupyterLab runs there", server["id"], "`stop` with an id")
    stop = laptop.run("host", "stop")
    assert (stop.status, "Stopped Jupyter Notebook in" in stop.stderr) == (0, True), stop.text
    assert "No server of yours runs there." in laptop.run("--lab", "host", "stop").stderr


def test_stop_ends_the_server_that_an_alias_attaches(laptop: Laptop, host: Host) -> None:
    for place in ("a", "b"):
        (host.home / place).mkdir()
        with laptop.opened("host:" + place):
            pass
    for server in host.servers():
        stop = laptop.run("--attach", server["id"], "host", "stop")
        assert stop.status == 0 and "Stopped" in stop.stderr, stop.text
        assert server["id"] not in [left["id"] for left in host.servers()]
    check_failure(laptop.run("--attach", server["id"], "host", "stop"), 1, "no such server")


def test_stop_ends_no_server_of_another_environment_than_is_typed(laptop: Laptop, host: Host) -> None:
    """As an alias has it that names one: the other's kernels would be lost without a question."""
    with laptop.opened("--init", "export NUMBER=1", "host", "--local-port", str(quiet_port())):
        pass
    assert laptop.run("--init", "export NUMBER=1", "host", "stop").status == 0
    with laptop.opened("--init", "export NUMBER=2", "host", "--local-port", str(quiet_port())):
        pass
    (server,) = host.servers()
    stop = laptop.run("--init", "export NUMBER=1", "host", "stop")
    check_failure(stop, 1, "no such server runs there", server["id"], "`stop` with an id")
    assert laptop.run("--init", "export NUMBER=2", "host", "stop").status == 0 and not host.servers()


@pytest.mark.jupyter
def test_stop_without_a_question(laptop: Laptop, host: Host, mark: str) -> None:
    """In a terminal and without one."""
    for number in range(2):
        (host.home / str(number)).mkdir()
        busy_kernel(laptop.start("host:%d" % number, has_terminal=False).url())
    stop = laptop.run("host:0", "stop", "--yes", has_terminal=True)
    assert stop.status == 0 and "same?" not in stop.text
    assert laptop.run("host", "stop", "--all", "--yes").status == 0
    wait_until(lambda: not [w for w in processes_with(mark).values() if "ipykernel" in w], "no kernel")


@pytest.mark.jupyter
def test_stop_of_a_notebook_asks_for_a_word_while_its_kernel_computes(laptop: Laptop, host: Host) -> None:
    url = laptop.start("host", has_terminal=False).url()
    busy_kernel(url)
    (kernel,) = api(url, "kernels")
    check_failure(laptop.run("host", "stop", kernel["id"][:8]), 1, "nothing was stopped", "its kernel is busy", "--yes")
    assert laptop.run("host", "stop", kernel["id"][:8], "--yes").status == 0
    assert api(url, "kernels") == []


@pytest.mark.jupyter
def test_stop_of_a_server_that_hangs_ends_its_kernels_and_removes_its_files(
    laptop: Laptop, host: Host, mark: str
) -> None:
    with laptop.opened("host") as run:
        busy_kernel(run.url())
        (record,) = host.servers()
    os.kill(record["pid"], signal.SIGSTOP)
    assert [server["state"] for server in listed(laptop)] == ["no answer"]
    assert laptop.run("host", "stop", "--yes").status == 0
    wait_until_gone(mark, "server and kernel are gone")
    assert not list(runtime_directory(host).glob("jpserver-*"))


@pytest.mark.jupyter
def test_logs(laptop: Laptop, host: Host) -> None:
    url = laptop.start("host", has_terminal=False).url()
    token = parse_qs(urlsplit(url).query)["token"][0]
    (record,) = host.servers()
    path = host.home / ".local/state/rjupyter/servers" / record["id"] / "log"
    wait_until(lambda: rjupyter.OUR_PROBE in path.read_text(), "both lines of our probe are there")
    with open(path, "a") as log:
        log.write("at http://127.0.0.1/?token=%s and \033[31mred\n" % token)
    for arguments in ([], [record["id"]]):
        run = laptop.run("host", "logs", *arguments)
        assert run.status == 0
        assert "/tree?token=..." in run.stdout
        assert token not in run.text and "\033" not in run.stdout
        assert "Forbidden" not in run.stdout and "403 GET" not in run.stdout  # said to us, who try another token
    check_failure(laptop.run("host", "logs", "zzzz"), 1, "nothing of yours has this id: zzzz")


def test_log_for_which_the_host_has_no_memory(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """It comes as it is read: 16 MB, one line of which is 2 MB long, through an agent that has 60 MB for all."""
    (directory / "bin").mkdir()
    host = make_host(path="%s:%s" % (directory / "bin", standin()))
    with laptop.opened("host"):
        (record,) = host.servers()
    python = directory / "bin/python3"
    python.write_text('#!/bin/sh\nulimit -v 60000\nMALLOC_ARENA_MAX=1 exec %s "$@"\n' % (VENV_BIN / "python3"))
    python.chmod(0o755)
    lines = ["\u00e4" * 1000000, *("%05d %s" % (number, "x" * 994) for number in range(14000)), "last"]
    (host.home / "log").write_text("\n".join(lines), encoding="utf-8")  # the server may write into its own
    (host.home / "log").rename(host.home / ".local/state/rjupyter/servers" / record["id"] / "log")
    shown = laptop.run("host", "logs")
    assert shown.status == 0, shown.stderr
    is_whole = shown.stdout.splitlines() == lines
    assert is_whole


@pytest.mark.jupyter
def test_logs_that_are_followed(laptop: Laptop, host: Host, mark: str) -> None:
    url = laptop.start("host", has_terminal=False).url()
    follow = laptop.start("host", "logs", "-f")
    follow.expect("is running at")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen("http://%s/api/contents/nothing-here?token=x" % urlsplit(url).netloc)
    follow.expect("403 GET /api/contents/nothing-here")
    follow.interrupt()
    assert follow.wait() == 0
    assert follow.text.count("Forbidden") == 1
    # The agent on the host notices that nobody listens.
    wait_until(lambda: not [w for w in processes_with(mark).values() if "zlib" in w], "no agent", 20)


def test_logs_end_with_the_server(laptop: Laptop, host: Host) -> None:
    url = laptop.start("host", has_terminal=False).url()
    follow = laptop.start("host", "logs", "-f", has_terminal=False)
    follow.expect("is running at")
    api(url, "shutdown", "POST")
    assert follow.wait() == 0, follow.text
