"""Jupyter inside something: --wrap and --container, on commands that are real where the machine has them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from client import api, busy_kernel, check_failure, compute, events_of, held, listed, new_session, whereabouts
from jupyters import standin
from notebooks import printed, write_notebook
from private_podman import IMAGE, PrivatePodman, small_tar
from private_slurm import PrivateSlurm
from readme import README
from sides import TOP, VENV_BIN, Host, Laptop, User, nicer, processes_with, quiet_port, wait_until, without_port

import rjupyter

OWN_PIDS = ["--wrap", "bwrap --dev-bind / / --unshare-pid --proc /proc"]
PIDS_OF_OTHERS = ["--wrap", "bwrap --dev-bind / / --unshare-pid"]  # and /proc is the host's
PID = "import os; print(os.getpid())"


@pytest.fixture
def host(make_host: Callable[..., Host], request: pytest.FixtureRequest) -> Host:
    """A host whose stand-in for Jupyter is taken for one inside something as well."""
    return make_host(path="" if request.node.get_closest_marker("jupyter") else str(standin(has_python=True)))


@pytest.fixture
def login(slurm: PrivateSlurm, make_host: Callable[..., Host], request: pytest.FixtureRequest) -> Host:
    """A login node with that stand-in."""
    path = "" if request.node.get_closest_marker("jupyter") else str(standin(has_python=True))
    return make_host(path=path, prefix=slurm.login_prefix, **slurm.environment())


@pytest.fixture
def bwrap(host: Host) -> Host:
    if not shutil.which("bwrap"):
        pytest.skip("needs bwrap")
    tried = subprocess.run(shlex.split(OWN_PIDS[1]) + ["true"], stderr=subprocess.PIPE, text=True, check=False)
    if tried.returncode:
        pytest.skip("bwrap runs nothing here: %s" % tried.stderr)
    return host


@pytest.fixture
def podman(directory: Path) -> PrivatePodman:
    podman = PrivatePodman(directory / "podman")
    obstacle = podman.find_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    return podman


@pytest.fixture
def boxed(podman: PrivatePodman, make_host: Callable[..., Host]) -> Iterator[Host]:
    """A host with podman and the image; no container outlives the test."""
    host = make_host(**podman.environment())
    yield host
    left = podman.containers(host.home)
    for name in left:
        podman.command("rm", "--force", name)
    assert not left


def wrappers(host: Host) -> List[Path]:
    """Return the directories of what is wrapped."""
    return sorted(host.home.glob(".local/state/rjupyter/wrappers/*"))


def words_of(pid: int) -> str:
    return Path("/proc/%d/cmdline" % pid).read_bytes().replace(b"\0", b" ").decode()


def jupyters(mark: str) -> List[int]:
    """Return the processes of Jupyter, as the host numbers them."""
    return [pid for pid, words in processes_with(mark).items() if "--no-browser" in words and "jupyter-" in words]


def is_clean(host: Host, mark: str) -> None:
    """Nothing runs on the host, and nothing is kept of what ran."""
    wait_until(lambda: not jupyters(mark), "Jupyter is gone", 10)
    wait_until(lambda: not [w for w in processes_with(mark).values() if "/agent.py" in w], "our agents are gone", 10)
    assert not wrappers(host) and not host.servers()


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_words_as_a_shell_quotes_them_the_first_outermost(laptop: Laptop, host: Host, mark: str) -> None:
    (host.home / "it's here").mkdir()
    wraps = ["--wrap", """A='it'"'"'s $HOME' B=$HOME env""", "--wrap", "B=inner nice -n 7"]
    destination = "host:it's here"
    url = held(laptop, *wraps, destination).url()
    code = "import os; print(os.environ['A'], os.environ['B'], os.nice(0), os.getcwd())"
    assert compute(url, code).split("\n")[0] == "it's $HOME inner %d %s/it's here" % (nicer(7), host.home)
    (server,) = listed(laptop)
    assert server["wrap"] == " ".join([wraps[1], wraps[3]]) and server["state"] == "live"
    table = laptop.run("host", "list").stdout
    assert "INSIDE" in table and wraps[1] in table
    again = held(laptop, destination, "--local-port", str(quiet_port()))
    assert without_port(again.url()) == without_port(url)
    hint = again.expect("To end it.*\n").group()
    assert " stop" in hint
    again.interrupt()
    assert again.wait() == 0
    back = shlex.split(re.search("To come back: (.*)", again.text).group(1))  # type: ignore[union-attr]
    assert [word for before, word in zip(back, back[1:]) if before == "--wrap"] == [wraps[1], wraps[3]]
    assert "Launched" in held(laptop, "--wrap", "env A=2", destination, "--local-port", str(quiet_port())).text
    assert "Stopped Jupyter Notebook" in laptop.run("host", "stop", "--all", "--yes").stderr
    is_clean(host, mark)


def test_what_is_no_command(laptop: Laptop) -> None:
    for text in ("env 'A", "", "true; false", "true | cat", "a && b", "sleep 1 &"):
        check_failure(laptop.run("--wrap", text, "nowhere.invalid"), 2, "--wrap")


def test_what_is_a_command(laptop: Laptop) -> None:
    for text in ("env 'A=;' B='|'", "nice -n 5", "sh -c 'a; exec \"$@\"' x", "env X=$(id -u)"):
        tried = laptop.run("-o", "ProxyCommand=echo closed >&2; false", "--wrap", text, "nowhere.invalid")
        check_failure(tried, rjupyter.EXIT_SSH, "cannot connect")


def test_wrapper_in_the_configuration(laptop: Laptop, host: Host) -> None:
    config = laptop.home / ".config/rjupyter/config"
    config.parent.mkdir(parents=True)
    config.write_text("[host]\nwrap = env A=of-the-file\n")
    held(laptop, "host")
    (server,) = listed(laptop)
    assert server["wrap"] == "env A=of-the-file"
    assert b"A=of-the-file" in Path("/proc/%d/environ" % server["pid"]).read_bytes().split(b"\0")
    assert "env A=of-the-file" in laptop.run("host", "config").text


# -- processes of its own ---------------------------------------------------------------------------------------------


@pytest.mark.jupyter
@pytest.mark.parametrize("wrap", [OWN_PIDS, PIDS_OF_OTHERS], ids=["own /proc", "the host's /proc"])
def test_pids_of_its_own(laptop: Laptop, bwrap: Host, mark: str, wrap: List[str]) -> None:
    write_notebook(bwrap.home / "train.ipynb")
    url = held(laptop, *wrap, "host").url()
    kernel = new_session(url, "train.ipynb")
    assert int(compute(url, PID, kernel)) < 100
    (server,) = listed(laptop)
    assert words_of(server["pid"]).startswith("bwrap ") and server["kernels"] == 1
    (row,) = [e for e in events_of(laptop.run("host", "list", "--kernels", "--json")) if e["event"] == "kernel"]
    assert row["memory"] > 1e6 and row["id"] == kernel
    assert laptop.run("host", "eval", "-k", "train.ipynb", "print(6 * 7)").stdout == "42\n"
    assert "42" in laptop.run("host", "output", "train.ipynb").stdout
    assert "Launched" not in held(laptop, *wrap, "host", "--local-port", str(quiet_port())).text
    assert laptop.run("host", "stop", "--yes").status == 0
    is_clean(bwrap, mark)


IN_A_ROOT_OF_OURS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import rjupyter
assert os.stat("/").st_uid == os.getuid() != 0
print(list(rjupyter.environments_of_project("/data/proj")))
"""


def test_root_directory_that_is_the_users_own(bwrap: Host, make_user: Callable[[str], User]) -> None:
    """bwrap makes it, and what is above what it binds: who looks upwards comes to an end there."""
    user = make_user("/bin/sh")
    argv = ["bwrap", "--die-with-parent", "--dev", "/dev", "--proc", "/proc", "--bind", str(user.home), "/data/proj"]
    places = [place for place in ("/usr", "/lib", "/lib64", "/bin", "/etc", str(TOP)) if os.path.exists(place)]
    argv += [word for place in places for word in ("--ro-bind", place, place)]
    argv += ["/usr/bin/python3", "-c", IN_A_ROOT_OF_OURS, str(TOP)]
    told = subprocess.run(
        argv, user=user.uid, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=60
    )
    if "bwrap:" in told.stderr:
        pytest.skip("a user's bwrap runs nothing here: %s" % told.stderr)
    assert told.stdout == "[]\n", told.stderr


def test_jupyter_that_dies_among_pids_of_its_own(laptop: Laptop, bwrap: Host, mark: str) -> None:
    run = held(laptop, *OWN_PIDS, "host")
    assert jupyters(mark)
    for pid in jupyters(mark):
        os.kill(pid, signal.SIGKILL)
    run.expect("ended", 60)
    assert run.wait() == rjupyter.EXIT_SERVER_ENDED
    assert [server["state"] for server in listed(laptop)] == ["ended"]
    wait_until(lambda: not [w for w in processes_with(mark).values() if w.startswith("bwrap")], "it has ended", 10)


@pytest.mark.parametrize("wrap", [OWN_PIDS, PIDS_OF_OTHERS], ids=["own /proc", "the host's /proc"])
def test_jupyter_that_does_not_start_among_pids_of_its_own(
    laptop: Laptop, bwrap: Host, mark: str, wrap: List[str]
) -> None:
    """Where /proc is the host's, another process has its number there."""
    failed = laptop.run(*wrap, "--server-arg=--ServerApp.port=none", "host")
    check_failure(failed, rjupyter.EXIT_SERVER_ENDED, "Jupyter did not start inside bwrap", "it exited with status 1")
    is_clean(bwrap, mark)


@pytest.mark.parametrize("wrap", [OWN_PIDS, ["--wrap", "nice -n 1"]], ids=["own pids", "nice"])
def test_jupyter_that_hangs_is_ended(laptop: Laptop, bwrap: Host, mark: str, wrap: List[str]) -> None:
    held(laptop, *wrap, "host")
    assert jupyters(mark)
    for pid in jupyters(mark):
        os.kill(pid, signal.SIGSTOP)
    assert "Stopped" in laptop.run("host", "stop", "--yes").stderr
    is_clean(bwrap, mark)


def test_wrapper_that_is_killed_leaves_its_inside_to_stop(laptop: Laptop, bwrap: Host, mark: str) -> None:
    """bwrap's first process does not end with it."""
    url = held(laptop, *OWN_PIDS, "host").url()
    (server,) = listed(laptop)
    os.kill(server["pid"], signal.SIGKILL)
    wait_until(lambda: not Path("/proc/%d/cmdline" % server["pid"]).exists(), "it is gone", 10)
    assert [server["state"] for server in listed(laptop)] == ["live"]
    assert without_port(held(laptop, "host", "--local-port", str(quiet_port())).url()) == without_port(url)
    assert "Stopped" in laptop.run("host", "stop", "--yes").stderr
    is_clean(bwrap, mark)


# -- what is not there ------------------------------------------------------------------------------------------------


def test_state_that_cannot_be_written_for_a_while_ends_nothing(laptop: Laptop, host: Host, mark: str) -> None:
    url = held(laptop, "--wrap", "nice", "host").url()
    (wrapper,) = wrappers(host)
    (wrapper / "alive").unlink()
    (wrapper / "alive/full").mkdir(parents=True)
    since = wrapper.stat().st_mtime_ns
    wait_until(lambda: wrapper.stat().st_mtime_ns != since, "a sign of life was tried", 20)
    (wrapper / "alive/full").rmdir()
    (wrapper / "alive").rmdir()
    wait_until((wrapper / "alive").is_file, "there is one again", 20)
    assert api(url, "status")


@pytest.mark.parametrize("action", [[], ["execute", "a.ipynb"]], ids=["open", "execute"])
def test_wrapper_that_cannot_be_run(laptop: Laptop, host: Host, mark: str, action: List[str]) -> None:
    write_notebook(laptop.home / "a.ipynb", "print(1)")
    for wrap, words in (
        ("no-such-wrapper -x", "no-such-wrapper: not found"),
        ("""sh -c 'echo "no room: node7" >&2; exit 5'""", "no room: node7"),
        ("false", "it ended and said nothing"),
    ):
        failed = laptop.run("--wrap", wrap, "host", *action)
        check_failure(failed, rjupyter.EXIT_NO_JUPYTER, "nothing ran inside " + wrap, words)
        is_clean(host, mark)


@pytest.mark.jupyter
def test_stop_by_the_id_of_what_a_busy_server_runs_in_is_refused_as_well(laptop: Laptop, host: Host) -> None:
    """Where nobody can answer; its recording is kept when it is ended."""
    busy_kernel(held(laptop, "--wrap", "nice -n 1", "host").url())
    (wrapper,) = wrappers(host)
    check_failure(laptop.run("host", "stop", wrapper.name), 1, "nothing was stopped", "Its kernel is busy", "--yes")
    assert [server["busy"] for server in listed(laptop)] == [1]
    assert "Ended" in laptop.run("host", "stop", wrapper.name, "--yes").stderr
    assert list(host.home.glob(".local/state/rjupyter/servers/*/cells/*.journal"))


def test_no_jupyter_inside_and_nothing_is_installed(laptop: Laptop, host: Host, mark: str) -> None:
    outside = laptop.run("--env", "/nowhere/else", "host")
    check_failure(outside, rjupyter.EXIT_NO_JUPYTER, "no environment")
    failed = laptop.run("--wrap", "env --unset=BASH_ENV PATH=/usr/bin:/bin HOME=/var/empty SHELL=/bin/sh", "host")
    check_failure(failed, rjupyter.EXIT_NO_JUPYTER, "no Jupyter inside env", "nothing is installed into it")
    assert not (host.home / ".local/share/rjupyter").exists()
    is_clean(host, mark)


def test_script_whose_python_is_another_inside_is_passed_over(laptop: Laptop, host: Host) -> None:
    """A home that a container sees has scripts that were installed outside of it."""
    script = host.home / "bin/jupyter-notebook"
    script.parent.mkdir()
    script.write_text("#!/usr/bin/python3 -IS\nimport notebook.app\n")
    script.chmod(0o755)
    run = held(laptop, "-v", "--wrap", "env PATH=%s:$PATH" % script.parent, "host")
    assert "its Python has no such module in there" in run.text and "Launched" in run.text


def test_directory_that_is_not_seen_inside(laptop: Laptop, bwrap: Host, mark: str) -> None:
    (bwrap.home / "work").mkdir()
    (bwrap.home / "work/data.csv").write_text("")
    for place in (".", ".local", "work"):
        wrap = "%s --tmpfs %s" % (OWN_PIDS[1], bwrap.home / place)
        failed = laptop.run("--wrap", wrap, "host:work")
        check_failure(failed, 1 if place == "work" else 3, "inside bwrap", str(bwrap.home), "--bind")
        is_clean(bwrap, mark)


def test_state_that_cannot_be_written_inside(laptop: Laptop, bwrap: Host, mark: str) -> None:
    wrap = "bwrap --dev-bind / / --ro-bind %s %s" % (bwrap.home, bwrap.home)
    check_failure(laptop.run("--wrap", wrap, "host"), 3, "rjupyter: cannot write", "--state-dir")
    is_clean(bwrap, mark)


def test_network_that_nothing_leads_into(laptop: Laptop, bwrap: Host, mark: str) -> None:
    wrap = ["--wrap", "bwrap --dev-bind / / --unshare-net"]
    check_failure(laptop.run(*wrap, "host"), 1, "no network leads to what runs inside bwrap", "--socket")
    is_clean(bwrap, mark)
    url = held(laptop, *wrap, "--socket", "host").url()
    assert api(url, "status")["kernels"] == 0
    assert laptop.run("host", "stop", "--yes").status == 0
    is_clean(bwrap, mark)


# -- while it starts --------------------------------------------------------------------------------------------------


def slow(host: Host) -> List[str]:
    """Return a wrapper that waits for a file."""
    script = host.home / "slow.sh"
    script.write_text('#!/bin/sh\necho pulling layer 3 of 7\nwhile [ ! -e gate ]; do sleep .1; done\nexec "$@"\n')
    script.chmod(0o755)
    return ["--wrap", str(script)]


def test_wrapper_that_takes_its_time(laptop: Laptop, host: Host, mark: str) -> None:
    """Its last line is shown, `list` shows it, a second open waits for the same one, and Ctrl-C leaves it."""
    run = laptop.start(*slow(host), "host")
    run.expect("pulling layer 3 of 7")
    (row,) = listed(laptop, "wrapper")
    assert row["wrap"].endswith("slow.sh") and row["action"] == "open"
    assert "STARTS INSIDE" in laptop.run("host", "list").stdout
    second = laptop.start(*slow(host), "host", has_terminal=False)
    second.expect("Connected")
    run.interrupt()
    assert run.wait() == 130 and row["id"] in run.text
    (host.home / "gate").write_text("")
    second.url()
    assert len(host.servers()) == 1 and not listed(laptop, "wrapper")
    assert laptop.run("host", "stop", "--yes").status == 0
    is_clean(host, mark)


@pytest.mark.parametrize("words", [["stop", "--all", "--yes"], ["stop", "{id}", "--yes"]])
def test_what_starts_is_stopped(laptop: Laptop, host: Host, mark: str, words: List[str]) -> None:
    run = laptop.start(*slow(host), "host", has_terminal=False)
    (row,) = wait_until(lambda: listed(laptop, "wrapper"), "it is listed")
    stopped = laptop.run("host", *[word.replace("{id}", row["id"]) for word in words])
    assert "Ended what started inside" in stopped.stderr
    assert run.wait() == rjupyter.EXIT_SERVER_ENDED and "was stopped before it ran" in run.text
    is_clean(host, mark)


def test_connection_that_is_lost_while_it_starts(laptop: Laptop, host: Host) -> None:
    run = laptop.start(*slow(host), "host", has_terminal=False)
    wait_until(lambda: wrappers(host) and listed(laptop, "wrapper"), "it starts")
    host.sshd.end_connections()
    run.expect("lost|Reconnecting|again", 60)
    (host.home / "gate").write_text("")
    run.url()
    assert len(wrappers(host)) == 1 and len(host.servers()) == 1


# -- executions -------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
@pytest.mark.parametrize("wrap", [OWN_PIDS, PIDS_OF_OTHERS, ["--wrap", "nice"]], ids=["own", "others", "nice"])
def test_execution_inside_and_its_stop(laptop: Laptop, bwrap: Host, mark: str, wrap: List[str]) -> None:
    source = write_notebook(laptop.home / "train.ipynb", PID, "x = 1", "print(os.nice(0), x)")
    done = laptop.run(*wrap, "host", "execute", str(source))
    assert done.status == 0, done.text
    first, _, last = printed(laptop.home / "train.executed.ipynb")
    assert (int(first) < 100) == ("bwrap" in wrap[1]) and last == "%d 1\n" % nicer(10 * (wrap[1] == "nice"))
    endless = write_notebook(laptop.home / "endless.ipynb", "print('kept')", "import time; time.sleep(1000)")
    run = laptop.start(*wrap, "host", "execute", str(endless), has_terminal=False)
    run.expect("Cell 1/2")
    (row,) = [row for row in listed(laptop, "run") if row["state"] == "running"]
    assert row["wrap"] == wrap[1]
    wait_until(lambda: [r for r in listed(laptop, "run") if r["cell"] == 2], "its second cell")
    assert "Stopped the execution" in laptop.run("host", "stop", row["id"]).stderr
    assert run.wait() == 1 and "was stopped" in run.text and "in cell 2 of 2" in run.text
    assert printed(laptop.home / "endless.executed.ipynb")[0] == "kept\n"
    wait_until(lambda: not [w for w in processes_with(mark).values() if "/agent.py" in w], "nothing is left", 10)


@pytest.mark.jupyter
def test_grid_inside(laptop: Laptop, bwrap: Host) -> None:
    source = write_notebook(laptop.home / "train.ipynb", "print(x)")
    done = laptop.run(*OWN_PIDS, "host", "execute", str(source), "--grid", "x=[1, 2, 3]", "-j", "2")
    assert done.status == 0 and "All 3 are done" in done.text, done.text
    assert [row["wrap"] for row in listed(laptop, "run")] == [OWN_PIDS[1]] * 3


def test_doctor_looks_inside(laptop: Laptop, bwrap: Host, mark: str) -> None:
    good = laptop.run(*OWN_PIDS, "host", "doctor")
    assert re.search(r"ok +jupyter +Jupyter Notebook [\d.]+: .*jupyter-notebook", good.text)
    bad = laptop.run("--wrap", "env PATH=/usr/bin:/bin HOME=/var/empty SHELL=/bin/sh", "host", "doctor")
    assert re.search(r"FAIL +jupyter +none in there", bad.text) and bad.status == 1
    gone = laptop.run("--wrap", "no-such-wrapper", "host", "doctor")
    assert re.search(r"FAIL +jupyter +nothing ran inside no-such-wrapper", gone.text)
    is_clean(bwrap, mark)


# -- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_container(laptop: Laptop, boxed: Host, podman: PrivatePodman, mark: str) -> None:
    """A real podman, as root, on an image that was made of a debootstrap tree."""
    (boxed.home / 'of "a", b').mkdir()
    write_notebook(boxed.home / 'of "a", b/train.ipynb')
    run = held(laptop, "--container", "podman://" + IMAGE, 'host:of "a", b/train.ipynb')
    url = run.url()
    kernel = new_session(url, "train.ipynb")
    found = compute(url, "import sys, os; print(sys.prefix, os.getpid() < 100, os.getcwd())", kernel)
    assert found.split("\n")[0] == '/usr True %s/of "a", b' % boxed.home
    (name,) = podman.containers(boxed.home)
    token = re.search("token=([0-9a-f]+)", url).group(1)  # type: ignore[union-attr]
    seen = podman.command("inspect", name).stdout
    every = [
        words_of(int(pid)) for pid in os.listdir("/proc") if pid.isdigit() and os.path.exists("/proc/%s/exe" % pid)
    ]
    assert (
        token not in seen
        and IMAGE in seen
        and not [words for words in every if token in words and "rjupyter" not in words]
    )
    (server,) = listed(laptop)
    assert server["wrap"] == "podman://" + IMAGE and words_of(server["pid"]).startswith("podman run")
    assert laptop.run("host", "eval", "-k", "train.ipynb", "print(6 * 7)").stdout == "42\n"
    assert "Stopped" in laptop.run("host", "stop", "--yes").stderr
    assert not podman.containers(boxed.home)
    is_clean(boxed, mark)


def test_container_of_an_ordinary_user(
    laptop: Laptop, podman: PrivatePodman, make_host: Callable[..., Host], make_user: Callable[[str], User]
) -> None:
    """Rootless: the uid inside is the user's own, and so is all that is written there."""
    if not shutil.which("newuidmap"):
        pytest.skip("needs newuidmap")
    user = make_user("/bin/bash")
    user.write("run/empty", "")
    user.write("work/data.csv", "")
    facts = {"XDG_RUNTIME_DIR": str(user.home / "run"), "CONTAINERS_CONF": podman.environment()["CONTAINERS_CONF"]}
    host = make_host(user=user, **facts)
    try:
        imported = host.sshd.ssh("podman import --quiet %s rjupyter-test" % small_tar())
        assert imported.returncode == 0, imported.stderr
        tried = host.sshd.ssh("podman run --rm --network=host --userns=keep-id rjupyter-test true")
        if tried.returncode:
            pytest.skip("rootless podman runs nothing here: %s" % tried.stderr)
        run = held(laptop, "--container", "rjupyter-test", "host:work")
        status = api(run.url(), "status")
        assert (status["uid"], status["root_dir"]) == (user.uid, str(user.home / "work"))
        (written,) = user.home.glob(".local/state/rjupyter/**/jpserver-*.json")
        assert written.stat().st_uid == user.uid
        assert laptop.run("host", "stop", "--yes").status == 0
        assert not host.sshd.ssh("podman ps --all --quiet").stdout
    finally:
        host.sshd.ssh("podman rm --all --force; podman system migrate")  # which ends its pause process


@pytest.mark.jupyter
def test_container_executes(laptop: Laptop, boxed: Host, podman: PrivatePodman) -> None:
    source = write_notebook(laptop.home / "train.ipynb", "import sys; print(sys.prefix)")
    done = laptop.run("--container", IMAGE, "host", "execute", str(source))
    assert done.status == 0 and printed(laptop.home / "train.executed.ipynb") == ["/usr\n"], done.text
    wait_until(lambda: not podman.containers(boxed.home), "it is removed", 20)


ENTRYPOINTS = [
    ["jupyter-notebook"],
    ["/usr/bin/env", "-i"],  # as tini and its like: what comes is executed, with less
    ["/bin/sh", "-c", "echo A banner; exec /bin/false"],
]


@pytest.mark.parametrize("entrypoint", ENTRYPOINTS, ids=["jupyter", "env", "banner"])
def test_image_whose_entry_point_is_another(
    laptop: Laptop, boxed: Host, podman: PrivatePodman, directory: Path, entrypoint: List[str]
) -> None:
    """It is not used; the image's PATH is, on which its Jupyter lies; and /dev/shm is as large as the host's."""
    image = "localhost/rj-%s" % directory.name.encode().hex()  # a name of tempfile's may be none of an image
    stand_in(boxed, "nvidia-smi", "exit 0\n")
    moved = "cp /usr/local/bin/jupyter-notebook /opt/jupyter-notebook && rm /usr/local/bin/jupyter-*"
    try:
        made = podman.command("run", "--name=" + directory.name, IMAGE, "sh", "-c", moved)
        assert made.returncode == 0, made.stderr
        changes = ["ENTRYPOINT " + json.dumps(entrypoint), "ENV PATH=/opt:/usr/local/bin:/usr/bin:/bin"]
        made = podman.command("commit", *["--change=" + change for change in changes], directory.name, image)
        assert made.returncode == 0, made.stderr
        init = ["--init", "export PATH=%s:$PATH" % (boxed.home / "programs")]
        run = held(laptop, *init, "--container", image, "host")
        run.expect("No GPU in the container: podman finds no CDI specification.* sudo nvidia-ctk cdi generate")
        seen = json.loads(podman.command("inspect", *podman.containers(boxed.home)).stdout)[0]
        inside = Path("/proc/%d/root/dev/shm" % seen["State"]["Pid"])
        within, outside = os.statvfs(inside), os.statvfs("/dev/shm")
        assert within.f_frsize * within.f_blocks == outside.f_frsize * outside.f_blocks
        assert laptop.run("host", "stop", "--yes").status == 0
    finally:
        podman.command("rm", "--force", directory.name)
        podman.command("rmi", "--force", image)


def test_container_whose_client_was_killed_is_stopped(laptop: Laptop, boxed: Host, podman: PrivatePodman) -> None:
    held(laptop, "--container", IMAGE, "host")
    (server,) = listed(laptop)
    os.kill(server["pid"], signal.SIGKILL)
    assert [server["state"] for server in listed(laptop)] == ["live"]
    assert "Stopped" in laptop.run("host", "stop", "--yes").stderr
    assert not podman.containers(boxed.home)


@pytest.mark.waits
def test_container_that_is_killed(laptop: Laptop, boxed: Host, podman: PrivatePodman) -> None:
    run = held(laptop, "--container", IMAGE, "host")
    (name,) = podman.containers(boxed.home)
    podman.command("kill", name)
    run.expect("ended", 90)
    assert run.wait() == rjupyter.EXIT_SERVER_ENDED
    assert [server["state"] for server in listed(laptop)] == ["ended"]


def test_container_by_a_wrapper_that_is_written_out(laptop: Laptop, boxed: Host, podman: PrivatePodman) -> None:
    wrap = "podman run --rm --network=host --volume $HOME:$HOME --env HOME=$HOME " + IMAGE
    held(laptop, "--wrap", wrap, "host")
    assert len(podman.containers(boxed.home)) == 1
    assert laptop.run("host", "stop", "--yes").status == 0
    wait_until(lambda: not podman.containers(boxed.home), "it is removed", 20)
    hidden = laptop.run("--wrap", "podman run --rm --network=host " + IMAGE, "host")
    check_failure(hidden, 3, "rjupyter: cannot read", "docker -v")


def test_image_that_is_not_there(laptop: Laptop, boxed: Host, podman: PrivatePodman, mark: str) -> None:
    check_failure(laptop.run("--container", "localhost/rjupyter-none", "host"), 3, "inside localhost/rjupyter-none")
    is_clean(boxed, mark)


def stand_in(host: Host, name: str, script: str) -> str:
    """Put a program into a directory of the host, and return that directory."""
    place = host.home / "programs"
    place.mkdir(exist_ok=True)
    (place / name).write_text("#!/bin/sh\n" + script)
    (place / name).chmod(0o755)
    return str(place)


def test_stand_in_of_apptainer_gets_its_words(laptop: Laptop, bwrap: Host, mark: str) -> None:
    """Debian has no package of apptainer: its stand-in keeps what it was told, and runs the command in bwrap."""
    text = 'printf "%s\\n" "$@" >$HOME/told\nwhile [ "$1" != my.sif ]; do shift; done; shift\n'
    place = stand_in(bwrap, "apptainer", text + 'exec bwrap --dev-bind / / --unshare-pid --proc /proc "$@"\n')
    stand_in(bwrap, "nvidia-smi", "exit 0\n")
    init = ["--init", "export PATH=%s:%s:$PATH" % (place, VENV_BIN)]
    held(laptop, *init, "--container", "my.sif", "host")
    told = (bwrap.home / "told").read_text().splitlines()
    home = str(bwrap.home)
    assert told[:5] == ["exec", "--pwd=" + home, "--bind=" + home, "--nv", "my.sif"]
    assert laptop.run("host", "stop", "--yes").status == 0
    is_clean(bwrap, mark)


def test_stand_in_of_systemd_run(laptop: Laptop, host: Host, mark: str) -> None:
    """No user manager of systemd runs here: its stand-in executes the command in its place, as --scope does."""
    place = stand_in(host, "systemd-run", 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"\n')
    wrap = "systemd-run --user --scope -p MemoryMax=64G --"
    held(laptop, "--init", "export PATH=%s:%s:$PATH" % (place, VENV_BIN), "--wrap", wrap, "host")
    assert [server["wrap"] for server in listed(laptop)] == [wrap]
    assert laptop.run("host", "stop", "--yes").status == 0
    is_clean(host, mark)


@pytest.fixture
def group(mark: str) -> Iterator[Path]:
    """A control group that is called as those of a user's own manager of systemd."""
    tops = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup")
    top = next((top for top in tops if os.access(top, os.W_OK) and os.path.exists(top + "/cgroup.procs")), "")
    if not top:
        pytest.skip("no control group can be made here")
    group = Path(top, mark, "user@0.service")
    group.mkdir(parents=True)
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "nothing runs in it", 30)
    group.rmdir()
    group.parent.rmdir()


def test_what_ends_when_one_logs_out_is_said(laptop: Laptop, group: Path, host: Host, mark: str) -> None:
    """Below a user's own manager, it does so where they do not linger."""
    lingers = Path("/var/lib/systemd/linger", host.sshd.user).exists()
    move = "sh -c 'echo $$ >%s/cgroup.procs; exec \"$@\"' sh" % group
    with laptop.opened("--wrap", move, "host") as run:
        assert run.stderr.count("To keep it: loginctl enable-linger") == (not lingers), run.text
    assert laptop.run("host", "stop").status == 0
    with laptop.opened("host") as run:
        assert "enable-linger" not in run.stderr
    assert laptop.run("host", "stop").status == 0
    is_clean(host, mark)


@pytest.mark.parametrize(
    ("group", "told", "words"),
    [
        ("0::/user.slice/user-7.slice/session-3.scope\n", "b true\n", "systemd-run --user --scope"),
        ("0::/user.slice/user-7.slice/session-3.scope\n", "b false\n", ""),
        ("0::/system.slice/slurmstepd.scope/job_7\n", "b true\n", ""),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/run-1.scope\n", "", "loginctl enable-linger"),
    ],
)
def test_what_a_site_ends_at_logout(monkeypatch: pytest.MonkeyPatch, group: str, told: str, words: str) -> None:
    """No logind runs here: what is asked of it, and the group of a process, are its words as the manuals have them."""

    def answer(argv: List[str], limit_s: float) -> Tuple[int, str, str]:
        assert argv[:2] == ["busctl", "get-property"] and argv[-1] == "KillUserProcesses"
        return 0, told, ""

    monkeypatch.setattr(rjupyter, "read_text", lambda path: group)
    monkeypatch.setattr(rjupyter, "own_uid", lambda: 7)
    monkeypatch.setattr(rjupyter, "run_command", answer)
    assert (words in rjupyter.what_keeps(12)) if words else rjupyter.what_keeps(12) == ""


def words_for(image: str, uid: int, monkeypatch: pytest.MonkeyPatch, programs: Path, **request: Any) -> List[str]:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(os, "getgid", lambda: uid)
    facts: Dict[str, Any] = {"created": 0.0, "node": "n", "home": "/home/ann", "root_dir": '/data/a,"b'}
    record = rjupyter.WrapperRecord(request=rjupyter.Request(container=image, **request), **facts)
    record.id, record.directory = "w12ab", "/home/ann/.local/state/rjupyter/wrappers/w12ab"
    said: List[str] = []
    words = rjupyter.container_words(record, {"PATH": str(programs), "USER": "ann"}, said.append)
    return shlex.split(" ".join(words)) + said


def test_words_of_each_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("docker", "podman", "apptainer", "nvidia-smi"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(os, "getgroups", lambda: [1000, 27])
    docker = words_for("docker://reg/img:1", 1000, monkeypatch, tmp_path)
    assert docker[:4] == ["docker", "run", "--rm", "--name=rjupyter-1000-w12ab"] and docker[-1] == "reg/img:1"
    assert '--mount=type=bind,"source=/data/a,""b","target=/data/a,""b"' in docker and "--gpus=all" in docker
    assert "--mount=type=bind,source=/home/ann,target=/home/ann" in docker and "--user=1000:1000" in docker
    assert "--entrypoint=" in docker and {"--group-add=1000", "--group-add=27"} < set(docker)
    # podman has them by a specification that somebody has made, or the container has none, and a line says so.
    gpus, told = "--device=nvidia.com/gpu=all", "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    monkeypatch.setitem(rjupyter.CONTAINERS["podman"], "gpus_need", [str(tmp_path / "*nvidia*.yaml")])
    podman = words_for("podman://img", 1000, monkeypatch, tmp_path)
    assert podman[0] == "podman" and "--userns=keep-id" in podman
    assert "--annotation=run.oci.keep_original_groups=1" in podman and not re.search("--group-add", " ".join(podman))
    assert gpus not in podman and podman[-2] == "img" and podman[-1].endswith(told)
    (tmp_path / "nvidia.com-gpu.yaml").touch()
    podman = words_for("img", 1000, monkeypatch, tmp_path)
    assert gpus in podman and podman[-1] == "img"
    (tmp_path / "nvidia-smi").unlink()
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        podman = words_for("img", 1000, monkeypatch, tmp_path)
        assert gpus not in podman and podman[-1] == "img"
    assert "--userns=keep-id" not in words_for("img", 0, monkeypatch, tmp_path)
    assert words_for("/data/my.sif", 1000, monkeypatch, tmp_path)[:2] == ["apptainer", "exec"]
    assert words_for("apptainer://docker://img", 1000, monkeypatch, tmp_path)[-1] == "docker://img"
    for name in ("docker", "podman"):  # as on most clusters
        (tmp_path / name).unlink()
    for image in ("reg/img:1", "docker://reg/img:1"):
        apptainer = words_for(image, 1000, monkeypatch, tmp_path)
        assert (apptainer[:2], apptainer[-1]) == (["apptainer", "exec"], "docker://reg/img:1")
    assert words_for("", 1000, monkeypatch, tmp_path) == []


def test_no_program_for_containers(laptop: Laptop, host: Host, mark: str) -> None:
    failed = laptop.run("--container", "singularity://x.sif", "host")
    check_failure(failed, rjupyter.EXIT_NO_JUPYTER, "no program for containers on the host")
    is_clean(host, mark)


# -- a cluster --------------------------------------------------------------------------------------------------------


def test_srun_of_an_allocation(laptop: Laptop, login: Host, slurm: PrivateSlurm, mark: str) -> None:
    """Jupyter is on another node, in a network and under a name of its own, and srun leads there."""
    (job, _) = slurm.occupy()
    run = held(laptop, "--wrap", "srun --overlap --jobid=%d" % job, "host")
    node = slurm.job(job)["NodeList"]
    assert whereabouts(run.url()).split()[0] == node
    assert "Jupyter is on %s, an address of %s" % (slurm.nodes[node], node) in run.text
    run.expect(r"Forwarding 127\.0\.0\.1:\d+ to %s:\d+ \(%s\) through host\." % (slurm.nodes[node], node))
    again = held(laptop, "host", "--local-port", str(quiet_port()))
    assert without_port(again.url()) == without_port(run.url())
    assert laptop.run("host", "stop", "--yes").status == 0
    wait_until(lambda: not [w for w in processes_with(mark).values() if w.startswith("srun")], "srun has ended", 20)
    wait_until(lambda: not [w for w in processes_with(mark).values() if "/agent.py" in w], "our agents are gone", 10)
    assert slurm.squeue()[job] == "RUNNING"


def test_srun_that_is_refused(laptop: Laptop, login: Host, slurm: PrivateSlurm) -> None:
    check_failure(laptop.run("--wrap", "srun --overlap --jobid=4711", "host"), 3, "inside srun", "nvalid job id")


def test_wrapper_inside_a_job(laptop: Laptop, login: Host, slurm: PrivateSlurm, mark: str) -> None:
    words = ["--slurm", "-t 10", "--wrap", "nice -n 3 unshare --pid --fork --mount-proc"]
    run = held(laptop, *words, "host")
    status = api(run.url(), "status")
    assert status["node"] in slurm.nodes and status["pid"] < 100 and status["nice"] == nicer(3)
    (server,) = listed(laptop)
    assert server["job"] and server["wrap"] == words[-1] and server["state"] == "live"
    assert "Launched" not in held(laptop, *words, "host", "--local-port", str(quiet_port())).text
    assert laptop.run("host", "stop", "--yes").status == 0
    wait_until(lambda: "RUNNING" not in slurm.squeue().values(), "the job has ended", 30)
    wait_until(lambda: not [w for w in processes_with(mark).values() if "/agent.py" in w], "our agents are gone", 10)


@pytest.mark.jupyter
def test_execution_in_a_wrapper_in_a_job(laptop: Laptop, login: Host, slurm: PrivateSlurm) -> None:
    source = write_notebook(laptop.home / "train.ipynb", "import os; print(os.nice(0), os.uname().nodename)")
    done = laptop.run("--slurm", "-t 10", "--wrap", "nice -n 3", "host", "execute", str(source))
    assert done.status == 0, done.text
    nice, node = printed(laptop.home / "train.executed.ipynb")[0].split()
    assert nice == str(nicer(3)) and node in slurm.nodes


# -- the README -------------------------------------------------------------------------------------------------------


def test_lines_of_the_readme_are_taken_as_they_stand(laptop: Laptop) -> None:
    """Each is run above with other names, or with a stand-in; here each gets as far as a connection."""
    lines = re.findall(r"(?:^ {4}|`)(rjupyter --(?:wrap|container) [^`\n]*?(?:gpu1|login):work)", README, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)[1:]
        tried = laptop.run("-o", "ProxyCommand=echo closed >&2; false", *words)
        check_failure(tried, rjupyter.EXIT_SSH, "cannot connect")
