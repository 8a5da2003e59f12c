"""What goes along with an execution and comes back with it; many at once; parameters from files; logs of a run."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from client import check_failure
from execution import (
    cells_of,
    code,
    notebook_of,
    printed,
    printed_in,
    results,
    run_dirs,
    start_waiting,
    waiting_for,
    write_notebook,
)
from jupyters import environment, interpreters
from sides import Host, Laptop, Run, processes_with, wait_until

pytestmark = pytest.mark.nbclient

RESULT = "a.executed.ipynb"


def check_refused(run: Run, *words: str, is_usage: bool = False) -> None:
    """It was refused for what it asks, not because the option is unknown."""
    assert run.status in ((2,) if is_usage else (1, 2)), run.text
    check_failure(run, run.status or 0, *words)
    assert "unrecognized" not in run.stderr, run.stderr


LIST_ALL = """
import os
for place, places, names in sorted(os.walk('.')):
    for name in sorted(names + places):
        path = os.path.join(place, name)
        said = os.path.isdir(path) or open(path, errors='replace').read()
        print(os.path.relpath(path), said, os.access(path, os.X_OK))
"""


def write(path: Path, words: str = "x", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)
    path.chmod(mode)
    return path


# -- --with -----------------------------------------------------------------------------------------------------------


def test_files_and_directories_go_along(laptop: Laptop, host: Host) -> None:
    """`--with` (repeatable) puts files and directories beside the notebook, in a directory of the run's own. (16)

    Decided: a path is relative to where we are, as any argument, and lies on the host as it lies to the notebook here:
    what the notebook reads here by a relative name, it reads there. Over the one connection; PATH is left as it is.
    """
    (host.home / "work").mkdir()
    write(laptop.home / "proj/data.csv", "1,2")
    write(laptop.home / "proj/src/model.py", "ANSWER = 42")
    write(laptop.home / "proj/src/deep/run.sh", "echo", 0o755)
    (laptop.home / "proj/src/empty").mkdir()
    write(laptop.home / "proj/odd/-it's é 日.txt", "odd")
    (laptop.home / "proj/src/link.py").symlink_to("model.py")
    sources = [LIST_ALL, "import os; print(os.getcwd())", "import src.model as m; m.ANSWER"]
    write_notebook(laptop.home / "proj/a.ipynb", *sources)
    goes = ["--with", "proj/data.csv", "--with", "proj/src", "--with", "proj/odd/-it's é 日.txt"]
    run = laptop.run("host:work", "execute", "proj/a.ipynb", *goes)
    assert (run.status, run.stdout) == (0, "proj/a.executed.ipynb\n"), run.text
    seen, place, _ = printed(laptop.home / "proj/a.executed.ipynb")
    expected = ["data.csv 1,2 False", "odd True True", "odd/-it's é 日.txt odd False", "src True True"]
    expected += ["src/deep True True", "src/deep/run.sh echo True", "src/empty True True"]
    expected += ["src/link.py ANSWER = 42 False", "src/model.py ANSWER = 42 False"]
    assert [line for line in sorted(seen.splitlines()) if not line.startswith("a.ipynb")] == sorted(expected)
    assert place.strip() != str(host.home / "work")
    assert list((host.home / "work").iterdir()) == []
    assert host.sshd.logins() == 1


def test_large_files_go_along(laptop: Laptop, host: Host) -> None:
    """As a stream: 20 MB of what cannot be packed. (16)"""
    data = os.urandom(1 << 20) * 20
    (laptop.home / "big.bin").write_bytes(data)
    write_notebook(laptop.home / "a.ipynb", "import zlib; print(zlib.crc32(open('big.bin', 'rb').read()))")
    run = laptop.run("host", "execute", "a.ipynb", "--with", "big.bin")
    assert run.status == 0, run.text
    assert printed(laptop.home / RESULT) == ["%d\n" % zlib.crc32(data)]
    assert host.sshd.logins() == 1


def test_two_runs_with_files_are_apart(laptop: Laptop, host: Host) -> None:
    """Each run has a directory of its own: what one writes is not in the next one's way. (16)"""
    write(laptop.home / "data.csv", "one")
    write_notebook(laptop.home / "a.ipynb", "print(open('data.csv').read()); open('data.csv', 'w').write('spoilt')")
    for words in ("one", "two"):
        write(laptop.home / "data.csv", words)
        run = laptop.run("host", "execute", "a.ipynb", "--with", "data.csv")
        assert run.status == 0, run.text
        assert printed(laptop.home / RESULT)[0] == words + "\n"
    assert (laptop.home / "data.csv").read_text() == "two"


def link_out(home: Path) -> None:
    (home / "d/out").symlink_to("../../secret")


def link_to_root(home: Path) -> None:
    (home / "d/out").symlink_to("/etc/hostname")


def link_of_a_directory(home: Path) -> None:
    (home / "d/out").symlink_to("../..", target_is_directory=True)


def link_by_a_link(home: Path) -> None:
    """Each looks harmless alone."""
    (home / "d/sub").mkdir()
    (home / "d/sub/up").symlink_to("..")
    (home / "d/out").symlink_to("sub/up/../../secret")


def device(home: Path) -> None:
    os.mknod(home / "d/out", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def fifo(home: Path) -> None:
    os.mkfifo(home / "d/out")


def unix_socket(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "d/out"))


ODD = [link_out, link_to_root, link_of_a_directory, link_by_a_link, device, fifo, unix_socket]


def test_what_does_not_go_along(laptop: Laptop, host: Host) -> None:
    """Links that lead out, devices, pipes, sockets: refused by name before anything is connected. (16)"""
    write(laptop.home / "secret", "not for the host")
    write_notebook(laptop.home / "a.ipynb", "1")
    for make in ODD:
        if make is device and os.getuid():
            continue  # only root can make a device file
        write(laptop.home / "d/fine")
        make(laptop.home)
        check_refused(laptop.run("host", "execute", "a.ipynb", "--with", "d"), "d/out")
        shutil.rmtree(laptop.home / "d")
    assert host.sshd.logins() == 0


def test_paths_that_do_not_go_along(laptop: Laptop, host: Host) -> None:
    """What is not below the notebook's directory has no place beside it there: refused. (16)"""
    write(laptop.directory / "above")
    (laptop.home / "sub").mkdir()
    write_notebook(laptop.home / "a.ipynb", "1")
    for path in ("../above", "sub/../../above", "/etc/hostname", "nowhere", ""):
        check_refused(laptop.run("host", "execute", "a.ipynb", "--with", path), path)
    assert host.sshd.logins() == 0


# -- --bring ----------------------------------------------------------------------------------------------------------

MAKES = """
import os
os.makedirs('out/deep', exist_ok=True)
for name in ('out/a.png', 'out/b.png', 'out/c.txt', 'out/deep/d.png', 'model.bin'):
    open(name, 'w').write('made ' + name)
os.chmod('model.bin', 0o755)
"""


def test_what_the_run_wrote_comes_back(laptop: Laptop, host: Host) -> None:
    """`--bring GLOB` (repeatable): what matches comes back beside the result, under its relative name. (16)

    Decided: `*` stays in one directory and `**` does not, as in a shell; a directory that matches comes whole; modes
    are kept; stdout names the result first and then each file. With and without --with, PATH is where they are.
    """
    write_notebook(laptop.home / "sub/a.ipynb", MAKES)
    brings = ["--bring", "out/*.png", "--bring", "model.*"]
    run = laptop.run("host", "execute", "sub/a.ipynb", *brings)
    assert run.status == 0, run.text
    names = {"sub/out/a.png", "sub/out/b.png", "sub/model.bin"}
    assert run.stdout.splitlines()[0] == "sub/a.executed.ipynb"
    assert set(run.stdout.splitlines()[1:]) == names
    assert {str(p.relative_to(laptop.home)) for p in laptop.home.glob("sub/**/*") if p.is_file()} == names | {
        "sub/a.ipynb",
        "sub/a.executed.ipynb",
    }
    assert (laptop.home / "sub/out/a.png").read_text() == "made out/a.png"
    assert os.access(laptop.home / "sub/model.bin", os.X_OK)
    assert host.sshd.logins() == 1
    write(laptop.home / "sub/data.csv")
    run = laptop.run("host", "execute", "sub/a.ipynb", "--with", "sub/data.csv", "-o", "x/r.ipynb", "--bring", "out/**")
    assert run.status == 1, run.text  # there is no directory x
    (laptop.home / "x").mkdir()
    run = laptop.run("host", "execute", "sub/a.ipynb", "--with", "sub/data.csv", "-o", "x/r.ipynb", "--bring", "out/**")
    assert run.status == 0, run.text
    assert (laptop.home / "x/out/deep/d.png").read_text() == "made out/deep/d.png"
    assert not (laptop.home / "x/data.csv").exists()


def test_nothing_here_is_overwritten(laptop: Laptop, host: Host) -> None:
    """A file of here stays, is named, and the status is 1; the result and the rest are brought. (16)

    Decided: `--attach ID` brings again what the run was told to bring, with --force over what is here.
    """
    write(laptop.home / "out/a.png", "mine")
    write_notebook(laptop.home / "a.ipynb", MAKES)
    run = laptop.run("host", "execute", "a.ipynb", "--bring", "out/*.png")
    assert run.status == 1, run.text
    assert "out/a.png" in run.stderr and "--force" in run.stderr
    assert (laptop.home / "out/a.png").read_text() == "mine"
    assert (laptop.home / "out/b.png").read_text() == "made out/b.png"
    assert cells_of(laptop.home / RESULT)[0]["execution_count"] == 1
    identity = run_dirs(host)[0].name
    again = laptop.run("host", "execute", "--attach", identity, "--force")
    assert again.status == 0, again.text
    assert (laptop.home / "out/a.png").read_text() == "made out/a.png"
    write(laptop.home / "out/a.png", "mine again")
    assert laptop.run("host", "execute", "a.ipynb", "--bring", "out/*.png", "--force").status == 0
    assert (laptop.home / "out/a.png").read_text() == "made out/a.png"


def test_what_was_written_comes_back_from_a_run_that_failed(laptop: Laptop, host: Host) -> None:
    """The checkpoint before the failure is what one wants: brought, and the status is that of the failure. (16)"""
    write_notebook(laptop.home / "a.ipynb", MAKES, "1 / 0")
    run = laptop.run("host", "execute", "a.ipynb", "--bring", "model.bin")
    assert run.status == 5, run.text
    assert (laptop.home / "model.bin").read_text() == "made model.bin"


def test_glob_without_a_match(laptop: Laptop, host: Host) -> None:
    """Decided as scp has it: it is said, and the status is 1; the result is there. (16)"""
    write_notebook(laptop.home / "a.ipynb", MAKES)
    run = laptop.run("host", "execute", "a.ipynb", "--bring", "*.pt")
    assert run.status == 1 and "*.pt" in run.stderr, run.text
    assert cells_of(laptop.home / RESULT)[0]["execution_count"] == 1


def test_globs_that_lead_out(laptop: Laptop, host: Host) -> None:
    """What is not in the run's directory is not brought: wrong usage. (16)"""
    write_notebook(laptop.home / "a.ipynb", "1")
    for glob in ("../*", "out/../../*", "/etc/hostname", "~/x", ""):
        check_refused(laptop.run("host", "execute", "a.ipynb", "--bring", glob), "--bring", is_usage=True)
    assert host.sshd.logins() == 0


LEADS_OUT = {
    "link": "os.symlink('/etc/hostname', 'out/link')",
    "up": "os.symlink('../../../../../../etc/hostname', 'out/up')",
    "directory": "os.symlink('/etc', 'out/directory')",
    "pipe": "os.mkfifo('out/pipe')",
    "device": "import stat; os.getuid() or os.mknod('out/device', stat.S_IFCHR | 0o666, os.makedev(1, 3))",
    "socket": "import socket; s = socket.socket(socket.AF_UNIX); s.bind('out/socket')",
}


def test_what_is_not_brought(laptop: Laptop, host: Host) -> None:
    """Links that lead out, pipes, devices: not brought, named, status 1; the rest is. Nothing hangs. (16)"""
    write_notebook(laptop.home / "a.ipynb", MAKES, "import os", *LEADS_OUT.values())
    run = laptop.run("host", "execute", "a.ipynb", "--bring", "out/**")
    assert run.status == 1, run.text
    for kind in LEADS_OUT:
        if kind != "device" or not os.getuid():
            assert "out/" + kind in run.stderr, run.stderr
        assert not os.path.lexists(laptop.home / "out" / kind), kind
    assert (laptop.home / "out/deep/d.png").exists()


def test_one_thing_that_is_not_brought_is_enough(laptop: Laptop, host: Host) -> None:
    """Each kind by itself makes the status 1: --attach with one --bring for each. (16)"""
    write_notebook(laptop.home / "a.ipynb", MAKES, "import os", *LEADS_OUT.values())
    run = laptop.run("host", "execute", "a.ipynb", "--bring", "out/link", "--bring", "model.bin")
    assert run.status == 1 and (laptop.home / "model.bin").exists(), run.text
    identity = run_dirs(host)[0].name
    for kind in LEADS_OUT:
        if kind != "device" or not os.getuid():
            again = laptop.run("host", "execute", "--attach", identity, "--bring", "out/" + kind)
            assert again.status == 1 and "out/" + kind in again.stderr, again.text


def test_link_here_is_not_followed_out(laptop: Laptop, host: Host) -> None:
    """What is brought does not go through a link of here into another directory. (16)"""
    (laptop.directory / "elsewhere").mkdir()
    (laptop.home / "out").symlink_to(laptop.directory / "elsewhere")
    write_notebook(laptop.home / "a.ipynb", MAKES)
    for options in ([], ["--force"]):
        run = laptop.run("host", "execute", "a.ipynb", "--bring", "out/*.png", *options)
        assert list((laptop.directory / "elsewhere").iterdir()) == []
        assert run.status == 1 and "out" in run.stderr, run.text


HIDES = """
import os
for name in ('.profile', '.git/hooks/pre-commit', 'out/.cache/c', 'out/a.png', 'out/deep/b.png'):
    os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
    open(name, 'w').write('made ' + name)
os.symlink('a.png', 'out/latest.png')
"""


BROUGHT = {
    "**": {"out/a.png", "out/deep/b.png", "out/latest.png", "data.csv"},
    "out": {"out/a.png", "out/deep/b.png", "out/latest.png"},
    "**/*.png": {"out/a.png", "out/deep/b.png", "out/latest.png"},
    "out/.cache/*": {"out/.cache/c"},
    ".git/**": {".git/hooks/pre-commit"},
}


def test_hidden_files_come_back_where_they_are_named(laptop: Laptop, host: Host) -> None:
    """As in a shell, `*` and `**` stand for no name that begins with a dot; and of a link comes the file."""
    write(laptop.home / "data.csv")
    write_notebook(laptop.home / "a.ipynb", HIDES)
    identity = ""
    for number, (typed, names) in enumerate(BROUGHT.items()):
        place = "x%d" % number
        (laptop.home / place).mkdir()
        begin = ["--attach", identity] if identity else ["a.ipynb", "--with", "data.csv"]
        run = laptop.run("host", "execute", *begin, "-o", place + "/r.ipynb", "--bring", typed)
        assert run.status == 0, (typed, run.text)
        identity = run_dirs(host)[0].name
        brought = [path for path in (laptop.home / place).rglob("*") if path.is_file()]
        assert {str(path.relative_to(laptop.home / place)) for path in brought} == names | {"r.ipynb"}, typed
        assert not [path for path in brought if path.is_symlink()], typed


def test_what_was_asked_for_elsewhere_is_typed_again(laptop: Laptop, host: Host) -> None:
    """Another laptop takes no word of the host's for what it shall write here."""
    write_notebook(laptop.home / "a.ipynb", MAKES)
    assert laptop.run("host", "execute", "a.ipynb", "--bring", "model.bin").status == 0
    identity = run_dirs(host)[0].name
    laptop.home = laptop.directory / "another laptop"
    laptop.home.mkdir()
    laptop.environment["HOME"] = str(laptop.home)
    run = laptop.run("host", "execute", "--attach", identity)
    assert run.status == 0 and "--bring" in run.stderr and "model.bin" in run.stderr, run.text
    assert [path.name for path in laptop.home.iterdir()] == [RESULT]
    run = laptop.run("host", "execute", "--attach", identity, "--bring", "model.bin", "--bring", "out/*.png")
    assert run.status == 0, run.text
    assert (laptop.home / "model.bin").exists() and (laptop.home / "out/b.png").exists()


# -- -j ---------------------------------------------------------------------------------------------------------------

MEETS = """
import os, time
open('here-{0}', 'w')
end = time.monotonic() + 60
while len([name for name in os.listdir('.') if name.startswith('here-')]) < {1}:
    assert time.monotonic() < end, 'alone'
    time.sleep(0.02)
print('met', {0})
"""


def test_several_at_once(laptop: Laptop, host: Host) -> None:
    """`-j 3` runs three at once: each of them waits for the others. One connection, a line for each end. (16)

    Decided: stdout names the results in the order of the arguments.
    """
    names = ["%s.ipynb" % letter for letter in "abc"]
    for number, name in enumerate(names):
        write_notebook(laptop.home / name, MEETS.format(number, 3))
    run = laptop.run("host", "execute", "-j", "3", *names)
    assert run.status == 0, run.text
    assert run.stdout.split() == ["a.executed.ipynb", "b.executed.ipynb", "c.executed.ipynb"]
    assert re.match(r"Connected to host .*\nExecuting 3 notebooks on host, 3 at once\.\n", run.stderr), run.stderr
    assert [printed(path) for path in results(laptop, run)] == [["met %d\n" % number] for number in range(3)]
    assert host.sshd.logins() == 1
    for name in names:
        assert len(re.findall(r"^Executed %s: " % name, run.stderr, re.MULTILINE)) == 1, run.stderr


def test_not_more_at_once_than_were_asked_for(laptop: Laptop, host: Host) -> None:
    """Six notebooks with `-j 2`: never three at a time. (16)"""
    source = "import time\nbegan = time.time(); time.sleep(0.7); print(began, time.time())"
    names = ["%s.ipynb" % letter for letter in "abcdef"]
    for name in names:
        write_notebook(laptop.home / name, source)
    run = laptop.start("host", "execute", "-j", "2", *names, has_terminal=False)
    assert run.wait(240) == 0, run.text
    spans = [[float(word) for word in printed(path)[0].split()] for path in results(laptop, run)]
    assert len(spans) == 6
    most = max(sum(began <= at < end for began, end in spans) for at, _ in spans)
    assert most <= 2


def test_failure_among_several_at_once(laptop: Laptop, host: Host) -> None:
    """The others go on; the worst status is the last word, and one summary says who failed. (16)

    Decided: with -j a failure ends nothing else, for they are runs of their own; without -j it ends the row, as now.
    """
    write_notebook(laptop.home / "a.ipynb", "print(1)")
    write_notebook(laptop.home / "bad.ipynb", "print(2)", "1 / 0")
    write_notebook(laptop.home / "slow.ipynb", "import time; time.sleep(600)")
    write_notebook(laptop.home / "c.ipynb", "print(3)")
    names = ["bad.ipynb", "a.ipynb", "slow.ipynb", "c.ipynb"]
    run = laptop.start("host", "execute", "-j", "2", "--timeout", "20", *names, has_terminal=False)
    assert run.wait(200) == 6, run.text
    assert printed(laptop.home / RESULT) == ["1\n"] and printed(laptop.home / "c.executed.ipynb") == ["3\n"]
    assert printed(laptop.home / "bad.executed.ipynb")[0] == "2\n"
    last = run.stderr.strip().splitlines()[-4:]
    assert any("bad.ipynb" in line for line in last) or re.search(r"2 .*failed|failed.* 2", "\n".join(last)), run.stderr
    assert "ZeroDivisionError" in run.stderr


def test_done_among_several_is_what_was_executed(laptop: Laptop, host: Host) -> None:
    """One that another command executes already is left to it, and is not counted."""
    run, identity = start_waiting(laptop)
    write_notebook(laptop.home / "a.ipynb", "1")
    other = laptop.run("host", "execute", "-j", "2", "w.ipynb", "a.ipynb")
    assert (other.status, other.stdout) == (0, RESULT + "\n"), other.text
    assert "w.ipynb is already running (%s)" % identity in other.stderr
    assert "\nDone: 1 of 2.\n" in other.stderr, other.stderr
    (host.home / "go").touch()
    assert run.wait() == 0, run.text


def test_wrong_use_of_j(laptop: Laptop, host: Host) -> None:
    for name in ("a.ipynb", "b.ipynb"):
        write_notebook(laptop.home / name, "1")
    for arguments in (["-j", "0"], ["-j", "-1"], ["-j", "two"], ["b.ipynb", "-j", "2", "-o", "x.ipynb"]):
        check_refused(laptop.run("host", "execute", "a.ipynb", *arguments), "", is_usage=True)
    assert host.sshd.logins() == 0


# -- --grid -----------------------------------------------------------------------------------------------------------

SHOWS = ["lr = 0; model = ''", "print(lr, model)"]


def write_grid(laptop: Laptop, *more: str) -> None:
    write_notebook(laptop.home / "a.ipynb", code(SHOWS[0], "parameters"), *more, SHOWS[1])


def test_grid_has_a_run_for_each_combination(laptop: Laptop, host: Host) -> None:
    """`--grid NAME=[...]` twice: six runs, each result named by its values; -p holds for all. (16)"""
    write_grid(laptop, "print(seed)")
    grid = ["--grid", "lr=[0.1, 0.01, 1e-3]", "--grid", "model=[cnn, rnn]"]
    run = laptop.start("host", "execute", "a.ipynb", *grid, "-p", "seed=7", "-j", "2", has_terminal=False)
    assert run.wait(300) == 0, run.text
    paths = results(laptop, run)
    assert len(set(paths)) == 6
    said = {path.name: printed(path)[-2:] for path in paths}
    assert sorted(words for _, words in said.values()) == sorted(
        "%s %s\n" % (lr, model) for lr in (0.1, 0.01, 0.001) for model in ("cnn", "rnn")
    )
    assert {words for words, _ in said.values()} == {"7\n"}
    for name, (_, words) in said.items():
        lr, model = words.split()
        assert model in name and (lr in name or (lr == "0.001" and "1e-3" in name)), said
        assert name.startswith("a.") and name.endswith(".ipynb")
    assert host.sshd.logins() == 1


def test_names_of_a_grid_are_names(laptop: Laptop, host: Host) -> None:
    """Values with `/`, `..`, nothing, much, and two that look alike: beside the notebook, none lost. (16)"""
    write_grid(laptop)
    values: List[Any] = ["a/b", "..", "", "a b", "é", "x" * 300, None, "a/b "]
    grid = "model=" + json.dumps(values)
    run = laptop.start("host", "execute", "a.ipynb", "--grid", grid, "-j", "4", has_terminal=False)
    assert run.wait(400) == 0, run.text
    assert sorted(path.parent for path in results(laptop, run)) == [laptop.home] * len(values)
    said = [printed(path)[-1] for path in results(laptop, run)]
    assert sorted(said) == sorted("0 %s\n" % value for value in values)


WRONG_GRIDS = [
    ["--grid", "lr=3"],
    ["--grid", "lr=[]"],
    ["--grid", "lr=[1, 1]"],
    ["--grid", "lr"],
    ["--grid", "1=[1]"],
    ["--grid", "lr=[1]", "--grid", "lr=[2]"],
    ["--grid", "lr=[1, 2]", "-p", "lr=3"],
    ["--grid", "lr=[1, 2]", "--inplace"],
    ["--grid", "lr=[1, 2]", "-o", "x.ipynb"],
]


def test_wrong_use_of_grid(laptop: Laptop, host: Host) -> None:
    """No list, an empty one, a value twice, a name twice, and a single place for many results: said at once. (16)"""
    write_grid(laptop)
    for options in WRONG_GRIDS:
        check_refused(laptop.run("host", "execute", "a.ipynb", *options), "--grid", is_usage=True)
    assert host.sshd.logins() == 0


def begun(host: Host) -> List[str]:
    """Return the values of the runs of a grid that have begun, as their notebooks wrote them down."""
    log = host.home / "log"
    return log.read_text().split() if log.exists() else []


def wait_for_runs(run: Run, host: Host, count: int) -> None:
    """Wait until so many runs have begun, and read what is printed meanwhile."""

    def have_begun() -> bool:
        run._read(0.02)
        assert run._fds, run.text
        return len(begun(host)) >= count

    wait_until(have_begun, "%d runs" % count, 200)


def logs_itself(host: Host) -> str:
    """Return a cell that writes down that its run has begun."""
    return "with open(%r, 'a') as log: log.write('%%s\\n' %% lr)" % str(host.home / "log")


GRID = ["--grid", "lr=[1, 2, 3, 4]", "-j", "2"]


def start_grid(laptop: Laptop, host: Host, *options: str) -> Run:
    """Start a grid of four that wait, at most two at once; return the run when two of them do."""
    write_grid(laptop, logs_itself(host), waiting_for(host.home / "go"))
    run = laptop.start("host", "execute", "a.ipynb", *GRID, *options, has_terminal=False)
    wait_for_runs(run, host, 2)
    return run


def test_stop_of_what_a_grid_runs(laptop: Laptop, host: Host) -> None:
    """Ctrl-C names what runs; `stop` ends it, no more begin, and the same command brings what there is. (16)"""
    run = start_grid(laptop, host)
    run.interrupt()
    assert run.wait() == 130, run.text
    (ids,) = re.findall(r"host stop((?: r[0-9a-f]{4}){2})$", run.stderr, re.MULTILINE)
    stop = laptop.run("host", "stop", *ids.split())
    assert stop.status == 0, stop.text
    (host.home / "go").touch()
    time.sleep(3)
    assert len(begun(host)) == 2
    again = laptop.start("host", "execute", "a.ipynb", *GRID, has_terminal=False)
    assert again.wait(300) == 1 and "2 of 4 executions failed" in again.stderr, again.text
    assert sorted(begun(host)) == list("1234")


@pytest.mark.parametrize("end", ["Ctrl-C", "we are killed", "the agent is killed"])
def test_same_command_goes_on_with_a_grid(laptop: Laptop, host: Host, mark: str, end: str) -> None:
    """We are gone; what runs goes on, and the same command brings all, also what had not begun, and once. (16)

    Then it is over: the command executes all of them anew.
    """
    run = start_grid(laptop, host)
    agents = [pid for pid, words in processes_with(mark).items() if re.match(r"\S*python3 -IS -c import sys", words)]
    for pid in agents if end == "the agent is killed" else [run.pid]:
        os.kill(pid, signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
    run.wait()
    assert "same command" in run.stderr or end == "we are killed"
    (host.home / "go").touch()
    for times in (1, 2):
        again = laptop.start("host", "execute", "a.ipynb", *GRID, has_terminal=False)
        assert again.wait(300) == 0, again.text
        said = sorted(printed(path)[-1].strip() for path in results(laptop, again))
        assert said == ["1", "2", "3", "4"]
        assert sorted(begun(host)) == sorted("1234" * times)
        assert ("Continuing" in again.stderr) == (times == 1)


def test_grid_of_eight_survives_a_cut_connection(laptop: Laptop, host: Host) -> None:
    """The connection is cut twice meanwhile: eight results, none run twice. (16)"""
    write_grid(laptop, logs_itself(host), "import time; time.sleep(1)")
    grid = ["--grid", "lr=[1,2,3,4]", "--grid", "model=[cnn, rnn]", "-j", "3"]
    run = laptop.start("host", "execute", "a.ipynb", *grid, has_terminal=False)
    for count in (2, 5):
        wait_for_runs(run, host, count)
        host.sshd.end_connections()
    assert run.wait(500) == 0, run.text
    assert len({printed(path)[-1] for path in results(laptop, run)}) == 8
    assert sorted(begun(host)) == sorted("12341234")


# -- --parameters-file ------------------------------------------------------------------------------------------------


def test_parameters_from_a_file(laptop: Laptop, host: Host) -> None:
    """JSON: its values as they are; -p is over it, and a later file over an earlier one, as papermill has it. (16)"""
    values: Dict[str, Any] = {"a": 1, "b": [1, {"c": None}], "t": "it's é \U0001f600 $x", "u": True, "v": 1e300}
    values["w"] = "3"
    (laptop.home / "p.json").write_text(json.dumps(values))
    (laptop.home / "q.json").write_text('{"a": 2, "z": "from q"}')
    write_notebook(laptop.home / "a.ipynb", "print(repr([a, b, t, u, v, w, z]))")
    files = ["--parameters-file", "p.json", "--parameters-file", "q.json"]
    run = laptop.run("host", "execute", "a.ipynb", *files, "-p", "u=null")
    assert run.status == 0, run.text
    expected = [2, values["b"], "it's é \U0001f600 $x", None, 1e300, "3", "from q"]
    assert printed(laptop.home / RESULT)[-1] == repr(expected) + "\n"


YAML = "# of today\na: &x [1, two]\nb: *x\nt: |\n  two\n  lines\nd: 2024-01-01\nn: ~\nm:\n  deep: {k: 1.5}\n"


@pytest.mark.parametrize("has_yaml", [True, False])
def test_parameters_from_a_yaml_file(laptop: Laptop, make_host: Callable[..., Host], has_yaml: bool) -> None:
    """YAML where the host's environment can read it; a date stays text, as papermill has it. Else it is refused. (16)

    Decided: a name that ends in .yaml or .yml, or what is no JSON, is YAML; it is never half read by a reader of ours.
    """
    python = next((found for minor, found in sorted(interpreters().items()) if minor >= 9), "/usr/bin/python3")
    packages = ["nbclient", "ipykernel", "notebook>=7"] if has_yaml else ["nbclient", "ipykernel"]
    bare = environment("nbclient" if not has_yaml else "with-yaml", python, packages)
    host = make_host(path=str(bare))
    (laptop.home / "p.yaml").write_text(YAML)
    write_notebook(laptop.home / "a.ipynb", "open('ran', 'w')", "print(repr([a, b, t, d, n, m]))")
    run = laptop.run("--no-install", "host", "execute", "a.ipynb", "--parameters-file", "p.yaml")
    if has_yaml:
        assert run.status == 0, run.text
        expected = [[1, "two"], [1, "two"], "two\nlines\n", "2024-01-01", None, {"deep": {"k": 1.5}}]
        assert printed(laptop.home / RESULT)[-1] == repr(expected) + "\n"
    else:
        check_refused(run, "p.yaml", "YAML")
        assert not (host.home / "ran").exists()


NO_PARAMETERS = {"[1, 2]": "p.json", '{"a b": 1}': "a b", '{"a": ': "p.json", '{"import": 1}': "import", "\0": "p.json"}


def test_file_that_holds_no_parameters(laptop: Laptop, host: Host) -> None:
    """Said before anything is connected where its name says JSON. (16)"""
    write_notebook(laptop.home / "a.ipynb", "1")
    for text, words in NO_PARAMETERS.items():
        (laptop.home / "p.json").write_text(text)
        check_refused(laptop.run("host", "execute", "a.ipynb", "--parameters-file", "p.json"), words)
    check_refused(laptop.run("host", "execute", "a.ipynb", "--parameters-file", "nothere.json"), "nothere.json")
    assert host.sshd.logins() == 0


# -- --allow-errors, --cell-timeout -----------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_errors_that_are_allowed(laptop: Laptop, host: Host) -> None:
    """As nbconvert --allow-errors: every cell is executed, status 0; a line counts the errors. (16)

    Decided: a cell that leaves by sys.exit is an error like others; a kernel that dies is not allowed (5).
    """
    sources = ["1 / 0", "print('on')", "import sys; sys.exit(3)", "{}['x']", "print('end')"]
    write_notebook(laptop.home / "a.ipynb", *sources)
    run = laptop.run("host", "execute", "--allow-errors", "a.ipynb")
    assert (run.status, run.stdout) == (0, RESULT + "\n"), run.text
    said = printed(laptop.home / RESULT)  # of the third cell, at most IPython's hint at its own ways to exit
    assert [*said[:2], *said[3:]] == ["", "on\n", "", "end\n"]
    outputs = [output for cell in cells_of(laptop.home / RESULT) for output in cell["outputs"]]
    names = [output["ename"] for output in outputs if "ename" in output]
    assert names == ["ZeroDivisionError", "SystemExit", "KeyError"]
    assert re.search(r"\b3\b.*(error|failed)", run.stderr), run.stderr
    write_notebook(laptop.home / "a.ipynb", "print('one')", "import os; os.kill(os.getpid(), 9)", "print('never')")
    assert laptop.run("host", "execute", "--allow-errors", "a.ipynb").status == 5


def test_limit_for_one_cell(laptop: Laptop, host: Host) -> None:
    """`--cell-timeout`: the cell that takes longer ends the run, with 6; many that take less do not. (16)

    Decided: also with --allow-errors, for nothing is known of a kernel that was not done.
    """
    lines = "import time; time.sleep(1); print('done')"
    write_notebook(laptop.home / "a.ipynb", lines, lines, lines, lines, lines)
    assert laptop.run("host", "execute", "--cell-timeout", "4", "a.ipynb").status == 0
    write_notebook(laptop.home / "a.ipynb", lines, "print('in it', flush=True); time.sleep(600)", lines)
    for options in (["--timeout", "1h"], ["--allow-errors"]):
        run = laptop.run("host", "execute", "--cell-timeout", "3", *options, "a.ipynb")
        assert run.status == 6, run.text
        assert "cell 2 of 3" in run.stderr
        assert printed(laptop.home / RESULT) == ["done\n", "in it\n", ""]


# -- logs of a run ----------------------------------------------------------------------------------------------------


def test_logs_that_are_followed(laptop: Laptop, host: Host) -> None:
    """`logs RUNID -f`: what the cells print, from the begin and as it comes; it ends with the run, status 0. (16)"""
    run, identity = start_waiting(laptop)
    logs = laptop.start("host", "logs", identity, "-f", has_terminal=False)
    logs.expect("^waits$")
    assert logs.stderr == "" or "waits" not in logs.stderr
    (host.home / "go").touch()
    assert run.wait() == 0
    assert logs.wait(60) == 0, logs.text
    assert logs.stdout.endswith("waits\nwent\n1\n")


def test_ctrl_c_on_logs_that_are_followed(laptop: Laptop, host: Host) -> None:
    """It ends the following, not the run: status 0, as for a server's log. (16)"""
    run, identity = start_waiting(laptop)
    logs = laptop.start("host", "logs", "-f", identity)
    logs.expect("^waits$")
    logs.interrupt()
    assert logs.wait() == 0, logs.text
    time.sleep(0.5)
    (host.home / "go").touch()
    assert run.wait() == 0, run.text


def test_logs_of_a_run_while_the_connection_is_cut(laptop: Laptop, host: Host) -> None:
    """Dialled again like a run that is followed; nothing is shown twice. Or it ends with 255, and says so. (16)"""
    run, identity = start_waiting(laptop)
    logs = laptop.start("host", "logs", identity, "-f", has_terminal=False)
    logs.expect("^waits$")
    host.sshd.end_connections()
    run.expect("Connected to host again")
    (host.home / "go").touch()
    assert run.wait() == 0
    status = logs.wait(60)
    assert status == 255 or (status == 0 and logs.stdout.count("waits\n") == 1 and "went\n" in logs.stdout), logs.text


def test_result_on_stdout_can_be_read_by_a_program(laptop: Laptop, host: Host) -> None:
    """`execute ... -o - -p x=1 | jq`: with what goes along and comes back, stdout is the notebook alone. (16)"""
    write_notebook(laptop.home / "a.ipynb", MAKES, "print('é')")
    run = laptop.run("host", "execute", "a.ipynb", "-o", "-", "--bring", "model.bin")
    assert run.status == 0, run.text
    assert printed_in(json.loads(run.stdout)) == ["", "é\n"]
    assert notebook_of(laptop.home / "a.ipynb")["cells"][0]["outputs"] == []
    assert (laptop.home / "model.bin").exists()
