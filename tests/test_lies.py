"""A host that lies: whatever it answers, to whatever action, there is one error, and nothing unchecked is shown."""

import base64
import contextlib
import functools
import io
import json
import os
import re
import resource
import shutil
import socket
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sides import Laptop

import rjupyter

Lines = List[Tuple[str, str]]

JUPYTER: Dict[str, Any] = {"hostname": "127.0.0.1", "port": 8888, "token": "abc", "base_url": "/", "root_dir": "/a"}
OPEN: Dict[str, Any] = {
    "id": "07af",
    "away": [{"notebook": "a.ipynb", "cells": 2, "count": 3, "seconds": 2.5, "lines": 4, "is_done": True}],
    "pid": 12,
    "app": "notebook",
    "app_version": "7.0",
    "host": "127.0.0.1",
    "port": 8888,
    "sock": "",
    "token": "abc",
    "base_url": "/",
    "root_dir": "/home/ana",
    "file": "",
    "is_secure": False,
    "seconds": 1.5,
    "has_password": False,
    "local_port": 8889,
    "node": "gpu1",
    "is_launched": True,
    "is_only": True,
}
SERVER = {"id": "07af", "pid": 12, "node": "gpu1", "app": "lab", "root_dir": "/a", "is_ours": True, "age_s": 3.0}
RUN = {"id": "r07af", "pid": 12, "node": "gpu1", "name": "a.ipynb", "root_dir": "/a", "age_s": 3.0, "state": "done"}
JOB = {"id": "j07af", "job": "12", "command": "sbatch", "action": "open", "path": "a", "age_s": 3.0, "left_s": 60}
TROUBLE = {"what": "no room", "why": "the disk is full", "try": "remove something", "status": 1}
EXAMINED: Dict[str, Any] = {
    "shell": "/bin/sh",
    "state": "/a",
    "free_bytes": 10**9,
    "other_users": 1,
    "jupyter": "JupyterLab 4: /a/jupyter-lab (PATH)",
    "state_trouble": TROUBLE,
    "jupyter_trouble": None,
    "no_install": "",
    "sshd_port": 22,
    "foreign": ["/a"],
    "scheduler": "",
}
KERNEL: Dict[str, Any] = {
    "id": "9f7bdd7c",
    "server": "07af",
    "notebook": "a.ipynb",
    "name": "python3",
    "state": "busy",
    "idle_s": 1.5,
    "connections": 1,
    "memory": 2**20,
    "gpu_memory": 2**20,
}
REPLIES: Dict[str, Dict[str, Any]] = {
    "open": OPEN,
    "away": {"away": []},
    "list": {"servers": [SERVER], "runs": [RUN], "jobs": [JOB], "wrappers": []},
    "logs": {"id": "07af"},
    "save_output": {"notebook": "a.ipynb", "cells": 2},
    "list_kernels": {"kernels": [KERNEL], "missing": ""},
    "wait_for_kernel": {"kernel": KERNEL, "state": "idle", "count": 3, "seconds": 2.5, "is_done": False},
    "eval_code": {"kernel": KERNEL, "state": "failed"},
    "interrupt_kernel": {"kernel": KERNEL, "state": "interrupted"},
    "send_output": {"id": "07af", "kernel": "1f", "notebook": "a.ipynb"},
    "stop": {"count": 1, "busy": [SERVER], "runs": [RUN]},
    "describe_end": {"is_running": False, "reason": "it was stopped", "log": "bye"},
    "examine": EXAMINED,
    "start_run": {"id": "r07af", "is_started": True, "age_s": 1},
    "put_files": {},
    "bring_files": {"refused": ["out/odd: it is not a file"], "unmatched": ["*.pt"]},
    "follow_runs": {"ended": {"r07af": {**RUN, "brings": ["*.pt"]}}, "failed": {}},
    "forecast_job": {"said": "soon", "is_refused": True, "limits": "main"},
}
CELL = {"cell_type": "code", "source": ["1\n"], "outputs": [], "metadata": {}, "execution_count": 1}
JOURNAL: List[Dict[str, Any]] = [
    {"kind": "remark", "text": "There is no kernel x on the host; using python3."},
    {"kind": "begun", "id": "0", "time": 1700000000.5, "code": "1", "index": 0, "cell": 1, "cells": 1},
    {"kind": "printed", "id": "0", "type": "stream", "content": {"name": "stdout", "text": "1\n"}},
    {"kind": "finished", "id": "0", "time": 1700000001.5, "is_done": True, "count": 1},
    {"kind": "gap", "time": 1700000004.5, "why": "No space left on device"},
]
DATA = {"image/png": "aGVsbG8=", "text/plain": ["<Figure>"]}
RECORDED: List[Dict[str, Any]] = [
    {"kind": "begun", "id": "1", "time": 1700000000.5, "count": 1, "code": "1", "notebook": "a.ipynb"},
    {"kind": "printed", "id": "1", "type": "stream", "content": {"name": "stdout", "text": "1\n"}},
    {"kind": "printed", "id": "1", "type": "display_data", "content": {"data": DATA, "transient": {"display_id": "x"}}},
    {"kind": "printed", "id": "1", "type": "update_display_data", "content": {"data": DATA, "transient": {}}},
    {"kind": "printed", "id": "1", "type": "clear_output", "content": {"wait": True}},
    {"kind": "printed", "id": "1", "type": "error", "content": {"traceback": ["it failed"]}},
    {"kind": "finished", "id": "1", "time": 1700000003.5, "is_done": False, "connections": 0},
    {"kind": "gap", "time": 1700000004.5, "why": "No space left on device"},
    {},
]
TOLD: List[Dict[str, Any]] = [
    {"kind": "hello", "user": "ana", "node": "gpu1", "python": "3.11.7", "is_root": True, "clock": 1.0},
    {"kind": "progress", "text": "waiting"},
    {"kind": "queue", "id": "j07af", "job": "12", "is_waiting": True, "word": "PENDING", "reason": "Priority"},
    {"kind": "found", "where": "the usual places", "command": "/a/jupyter-lab", "tried": ["/a"]},
    {"kind": "installing", "path": "/a", "tool": "pip"},
    {"kind": "installed", "path": "/a", "seconds": 3},
    {"kind": "stopped", "what": "server", "id": "07af", "pid": 12, "app": "lab", "root_dir": "/a"},
    {"kind": "stopped", "what": "kernel", "name": "a.ipynb (9f7bdd7c)", "kernel": "9f7bdd7c", "notebook": "a.ipynb"},
    {"kind": "note", "text": "sbatch: the account expires", "destination": "of a newer agent", "later": [1]},
    {"kind": "line", "text": "[I] listening"},
    *({"kind": "recorded", "entry": entry} for entry in RECORDED),
]
OF_A_TUNNEL = {"describe_end", "away"}  # asked while one is up; `open` has what was missed in its reply, too
# What a person types, and what it asks the host for.
COMMANDS: Dict[str, List[str]] = {
    "open": ["--no-browser", "host"],
    "list": ["host", "list"],
    "logs": ["host", "logs"],
    "send_output": ["host", "output", "a.ipynb"],
    "eval_code": ["host", "eval", "1"],
    "interrupt_kernel": ["host", "eval", "--interrupt"],
    "list_kernels": ["host", "list", "--kernels"],
    "wait_for_kernel": ["host", "wait"],
    "save_output": ["host", "output", "--save"],
    "stop": ["host", "stop", "--yes"],
    "describe_end": ["host", "execute", "--attach", "r07af"],
    "examine": ["--wrap", "nice", "host", "doctor"],
    "forecast_job": ["--slurm", "-t 5", "host", "doctor"],
    "start_run": ["host", "execute", ":a.ipynb", "--grid", "x=[1]"],
    "follow_runs": ["host", "execute", "--attach", "r07af"],
    "put_files": ["host", "execute", "a.ipynb", "--with", "a.csv"],
    "bring_files": ["host", "execute", "--attach", "r07af", "--bring", "*"],
}
NASTY = st.sampled_from(
    ["\x1b]0;title\x07", "a\nb", "../../x", "-oProxyCommand=x", "\u202e", "", "%s", "\ud800", "[31m"]
)
NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "1e300", "9" * 400, "9" * 5000]
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([2**63, -1, 10**30, 1e300, 1e308, *map(float, NO_NUMBERS)])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, NASTY, st.text(max_size=8))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)


def places_in(value: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """Yield where something stands in a JSON value: each a path of keys and indices."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


def changed(value: Any, path: Tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value that has something else at one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def lies_about(value: Any) -> "st.SearchStrategy[Any]":
    """Return what may come in place of a good value: something else in one place of it, or in all."""
    return st.tuples(st.sampled_from(list(places_in(value))), ANYTHING).map(lambda lie: changed(value, *lie))


class LyingChild:
    """In place of the ssh of a session: says what was made up, behind the nonce of the request that it is given."""

    read_at = 0.0

    def __init__(self, answer: Callable[[Dict[str, Any]], List[Any]]) -> None:
        self.answer = answer
        self.lines: Lines = []
        self.process = self

    def send(self, data: bytes, is_last: bool = True) -> None:
        request = json.loads(zlib.decompress(base64.b64decode(data.split()[-1])))
        for message in self.answer(request):
            text = message if isinstance(message, str) else json.dumps(message)
            self.lines.append(("stdout", "%s %s" % (request["nonce"], text)))

    def next_line(self, timeout_s: float) -> Optional[Tuple[str, str]]:
        return self.lines.pop(0) if self.lines else None

    @property
    def has_ended(self) -> bool:
        return True

    def wait(self) -> int:
        return 0

    def end(self) -> None:
        pass


class LyingSsh(rjupyter.Ssh):
    """A connection that needs no ssh; its sessions lie."""

    answer: Callable[[Dict[str, Any]], List[Any]]

    def _read_config(self) -> None:
        pass

    def session(self, command: str) -> Any:
        return LyingChild(self.answer)

    def forward(self, local_port: int, target: str) -> Tuple[bool, str]:
        return True, ""

    def can_reach(self, target: str) -> Tuple[bool, str]:
        return False, "nothing there"

    def run(self, command: str) -> Tuple[bool, str]:
        return True, ""


def parts(entries: List[Any]) -> List[Any]:
    """Return journal lines, and a result, as the messages that bring them."""
    journal = "".join(json.dumps(entry) + "\n" for entry in entries)
    files = {"journal": journal, "result": json.dumps({"cells": [CELL], "metadata": {}, "nbformat": 4})}
    packed = {name: base64.b64encode(zlib.compress(text.encode())).decode() for name, text in files.items()}
    return [{"kind": "part", "file": name, "data": data, "id": "r07af"} for name, data in packed.items()]


def tar_of(name: str) -> List[Any]:
    """Return a tar with one file as the messages that bring it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    data = base64.b64encode(zlib.compress(stream.getvalue())).decode()
    return [{"kind": "part", "file": "files", "data": data}]


def told_by(action: str) -> List[Any]:
    """Return what is told before the reply to an action, where that is no good without it."""
    return {"follow_runs": parts(JOURNAL), "bring_files": tar_of("model.pt")}.get(action, [])


def write_files(directory: Path) -> None:
    """Write what the commands name."""
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (directory / "a.ipynb").write_text(json.dumps(notebook))
    (directory / "a.csv").write_text("1,2")


def outcome(
    command: List[str], answer: Callable[[Dict[str, Any]], List[Any]], directory: Path
) -> Tuple[int, str, str, List[str]]:
    """Do what a command asks for on a host that answers so; return the status, both outputs, and what was asked."""
    asked: List[str] = []

    def answer_to(request: Dict[str, Any]) -> List[Any]:
        request.setdefault("action", "open")  # as usual
        asked.append(request["action"])
        assert len(asked) < 20, "it never ends"
        return answer(request)

    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    write_files(directory)
    os.chdir(directory)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            args = rjupyter.Args(rjupyter.CommandLine(["--no-config", "--no-reconnect", *command]))
            messages = rjupyter.Messages(args.quiet, args.verbose, args.json)
            ssh = LyingSsh("host", [], False, messages, False)
            ssh.answer = answer_to
            try:
                status = rjupyter.ACTIONS[args.action].run(args, rjupyter.Agent(ssh, messages), messages)
            except rjupyter.Failure as failure:
                messages.failure(failure)
                status = failure.status
            finally:
                ssh.close()
    finally:
        os.chdir(before)
    return status, out.getvalue(), err.getvalue(), asked


def check(status: int, out: str, err: str) -> None:
    """One error or none, and nothing that drives a terminal."""
    assert 0 <= status < 256
    assert err.count("rjupyter: ") <= 1, err
    assert "Traceback" not in err
    assert not re.search(r"[^\n\t -\x7e\xa0-\ud7ff\ue000-\U0010ffff]|\u202e", out + err), (out, err)


class StandInForTheFile:
    """What goes to the host, where nobody reads it."""

    def input_of(self, command: str, request: rjupyter.Request, is_whole: bool) -> bytes:
        return base64.b64encode(zlib.compress(json.dumps(request.facts()).encode()))


@pytest.fixture(autouse=True)
def no_place_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(rjupyter, "CLOSING_TIMEOUT_S", 0)
    monkeypatch.setattr(rjupyter, "AgentFile", StandInForTheFile)
    monkeypatch.setattr(rjupyter, "can_ask", lambda: False)
    monkeypatch.setattr(rjupyter, "has_terminal", lambda: False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["rjupyter.py"])


def many(count: int) -> settings:
    """Return hypothesis's settings for so many examples."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbers_in(value: Any) -> Iterator[Tuple[Any, ...]]:
    """Yield where a number stands in a reply."""
    for path in places_in(value):
        number: Any = functools.reduce(lambda inner, key: inner[key], path, value)
        if not isinstance(number, bool) and isinstance(number, (int, float)):
            yield path


def test_the_truth_is_taken(tmp_path: Path) -> None:
    """The replies that the lies below are made from are good ones, and each action asks what it is said to ask."""
    assert set(REPLIES) == set(rjupyter.REQUESTS)
    for action, command in COMMANDS.items():

        def answer(request: Dict[str, Any]) -> List[Any]:
            told = told_by(request["action"]) or TOLD
            return [*told, {"kind": "reply", "reply": REPLIES[request["action"]]}]

        status, out, err, asked = outcome(command, answer, tmp_path)
        check(status, out, err)
        assert "makes no sense" not in err + out, (action, err)
        assert action in asked or action == "describe_end"


@pytest.mark.parametrize("action", sorted(set(REPLIES) - OF_A_TUNNEL))
def test_reply_that_lies(action: str, tmp_path: Path) -> None:
    @many(24)
    @given(lies_about(REPLIES[action]), st.sampled_from(["", "--json"]))
    def lie(reply: Any, form: str) -> None:
        def answer(request: Dict[str, Any]) -> List[Any]:
            told = told_by(request["action"])
            truth = reply if request["action"] == action else REPLIES[request["action"]]
            return [*told, {"kind": "reply", "reply": truth}]

        command = ([form] if form else []) + COMMANDS[action]
        check(*outcome(command, answer, tmp_path)[:3])

    lie()


def test_reply_whose_number_is_none(tmp_path: Path) -> None:
    """In place of each number of each reply, by turns: refused, as what has no sense."""
    rows = [(action, path) for action in sorted(set(REPLIES) - OF_A_TUNNEL) for path in numbers_in(REPLIES[action])]
    assert len(rows) > 3 * len(NO_NUMBERS)
    for row, (action, path) in enumerate(rows):
        for number in (NO_NUMBERS[row % len(NO_NUMBERS)], NO_NUMBERS[(row + 3) % len(NO_NUMBERS)]):

            def answer(request: Dict[str, Any], row: Any = (action, path), number: str = number) -> List[Any]:
                truth = REPLIES[request["action"]]
                reply = changed(truth, row[1], "number") if request["action"] == row[0] else truth
                text = json.dumps({"kind": "reply", "reply": reply}).replace('"number"', number)
                return [*told_by(request["action"]), text]

            status, out, err, _ = outcome(COMMANDS[action], answer, tmp_path)
            check(status, out, err)
            assert status == 1 and "makes no sense" in out + err, (action, path, number[:9], out + err)


def test_what_a_cell_printed_may_have_numbers_that_json_has_not(tmp_path: Path) -> None:
    """What is passed on as it is, is JSON for the program that reads it."""
    entry = {"kind": "printed", "id": "1", "type": "display_data", "content": {"data": {"x/y": [float("nan"), 1.5]}}}
    told = [{"kind": "recorded", "entry": each} for each in (RECORDED[0], entry, RECORDED[6], {})]
    status, out, err, _ = outcome(
        ["--json", *COMMANDS["send_output"]],
        lambda request: [*told, {"kind": "reply", "reply": REPLIES[request["action"]]}],
        tmp_path,
    )
    assert status == 0, err
    for line in out.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name + " is no JSON"))
    assert "x/y" in out


def test_message_that_lies(tmp_path: Path) -> None:
    actions = ["open", "list", "stop", "start_run", "follow_runs"]

    @many(100)
    @given(st.sampled_from(TOLD).flatmap(lies_about), st.sampled_from(actions), st.sampled_from(["-v", "--json"]))
    def lie(message: Any, action: str, form: str) -> None:
        def answer(request: Dict[str, Any]) -> List[Any]:
            told = told_by(request["action"])
            return [message, *told, {"kind": "reply", "reply": REPLIES[request["action"]]}]

        check(*outcome([form, *COMMANDS[action]], answer, tmp_path)[:3])

    lie()


def test_tar_that_lies(tmp_path: Path) -> None:
    """What is brought comes to where the result is and nowhere else, over nothing, and drives no terminal."""
    lies = {name: tar_of(name) for name in ("../out", "/tmp/out", "a/../../out", "a.ipynb", "", ".", "\x1b[2J", "a\nb")}
    for data in (b"", b"x" * 5000, b"\0" * 10240, b"a" * 600 + b"\0" * 10000):  # no tars
        part = base64.b64encode(zlib.compress(data)).decode()
        lies["a tar of %r" % data[:9]] = [{"kind": "part", "file": "files", "data": part}]
    for name, lie in lies.items():

        def answer(request: Dict[str, Any], lie: List[Any] = lie) -> List[Any]:
            told = lie if request["action"] == "bring_files" else told_by(request["action"])
            return [*told, {"kind": "reply", "reply": REPLIES[request["action"]]}]

        place = tmp_path / "place"
        (place / "home").mkdir(parents=True)
        check(*outcome(COMMANDS["bring_files"], answer, place / "home")[:3])
        assert [path.name for path in place.iterdir()] == ["home"], name
        assert not os.path.exists("/tmp/out"), name
        assert (place / "home/a.ipynb").read_text().startswith("{"), name
        shutil.rmtree(place)


def test_failure_that_lies(tmp_path: Path) -> None:
    @many(30)
    @given(lies_about({"kind": "reply", "failure": TROUBLE}))
    def lie(message: Any) -> None:
        status, out, err, _ = outcome(["host", "list"], lambda request: [message], tmp_path)
        check(status, out, err)
        assert status > 0

    lie()


def test_journal_that_lies(tmp_path: Path) -> None:
    numbers = st.sampled_from(range(len(JOURNAL)))

    @many(80)
    @given(numbers.flatmap(lambda number: st.tuples(st.just(number), lies_about(JOURNAL[number]))))
    def lie(lie: Tuple[int, Any]) -> None:
        def answer(request: Dict[str, Any]) -> List[Any]:
            journal = [*JOURNAL[: lie[0]], lie[1], *JOURNAL[lie[0] + 1 :]]
            return [*parts(journal), {"kind": "reply", "reply": REPLIES["follow_runs"]}]

        check(*outcome(["-v", *COMMANDS["follow_runs"]], answer, tmp_path)[:3])

    lie()


NO_MESSAGES = ["", "{", "[]", "null", '{"kind": 1}', '{"kind": "reply"}', "9" * 5000, "[" * 100000]
NO_MESSAGES += ['{"kind": "reply", "reply": 1}']
NO_MESSAGES += [
    json.dumps({"kind": "part", "file": "journal", "data": data}) for data in ("", "=", "AAAA", "eJw=", "\u00fc")
]


def test_line_that_is_no_message(tmp_path: Path) -> None:
    for line in NO_MESSAGES:
        for command in (["host", "list"], ["host", "execute", "--attach", "r07af"]):
            status, out, err, _ = outcome(command, lambda request, line=line: [line], tmp_path)  # type: ignore[misc]
            check(status, out, err)
            assert status > 0, line[:40]


# -- by bytes ---------------------------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 600), st.one_of(st.binary(max_size=40), st.just(b"\xff" * 512))),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: List[Tuple[int, int, bytes]]) -> bytes:
    """Return bytes in which some are others, missing, or too many."""
    for at, count, new in edits:
        place = at % (len(data) + 1)
        data = data[:place] + new + data[place + count :]
    return data


def as_parts(file: str, data: bytes) -> List[Any]:
    """Return bytes as the messages that bring them."""
    pieces = [data[at : at + 700] for at in range(0, len(data), 700)]
    return [
        {"kind": "part", "file": file, "id": "r07af", "data": base64.b64encode(zlib.compress(piece)).decode()}
        for piece in pieces
    ]


@contextlib.contextmanager
def little_memory(most: int = 30 << 20) -> Iterator[None]:
    """What is done under this needs no more than so many bytes, whatever it is told."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_tar_of_other_bytes(tmp_path: Path) -> None:
    names = ["model.pt", "out/a.pt", "long/" * 30 + "b.pt"]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 600
            tar.addfile(member, io.BytesIO(b"x" * 600))
    numbers = iter(range(10**6))

    @many(40)
    @given(EDITS)
    def lie(edits: List[Tuple[int, int, bytes]]) -> None:
        told = as_parts("files", edited(stream.getvalue(), edits))

        def answer(request: Dict[str, Any]) -> List[Any]:
            before = told if request["action"] == "bring_files" else told_by(request["action"])
            return [*before, {"kind": "reply", "reply": REPLIES[request["action"]]}]

        place = tmp_path / str(next(numbers))
        (place / "home").mkdir(parents=True)
        with little_memory():
            check(*outcome(COMMANDS["bring_files"], answer, place / "home")[:3])
        assert [path.name for path in place.iterdir()] == ["home"]
        assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 100000
        assert not [path for path in place.rglob("*") if path.is_symlink()]

    lie()


def test_journal_of_other_bytes(tmp_path: Path) -> None:
    whole = "".join(json.dumps(entry) + "\n" for entry in JOURNAL).encode()
    result = json.dumps({"cells": [CELL], "metadata": {}, "nbformat": 4}).encode()

    @many(40)
    @given(EDITS, st.booleans())
    def lie(edits: List[Tuple[int, int, bytes]], is_result: bool) -> None:
        files = {"journal": whole, "result": result}
        name = "result" if is_result else "journal"
        files[name] = edited(files[name], edits)

        def answer(request: Dict[str, Any]) -> List[Any]:
            told = [part for file, data in files.items() for part in as_parts(file, data)]
            return [*told, {"kind": "reply", "reply": REPLIES["follow_runs"]}]

        with little_memory():
            check(*outcome(["-v", *COMMANDS["follow_runs"]], answer, tmp_path)[:3])

    lie()


def test_message_of_other_bytes(tmp_path: Path) -> None:
    @many(60)
    @given(EDITS, st.sampled_from(sorted(set(REPLIES) - OF_A_TUNNEL)))
    def lie(edits: List[Tuple[int, int, bytes]], action: str) -> None:
        def answer(request: Dict[str, Any]) -> List[Any]:
            messages = [*TOLD, {"kind": "reply", "reply": REPLIES[request["action"]]}]
            lines = b"\n".join(json.dumps(message).encode() for message in messages)
            return edited(lines, edits).decode("utf-8", "replace").splitlines()

        with little_memory():
            check(*outcome(COMMANDS[action], answer, tmp_path)[:3])

    lie()


def test_http_answer_of_other_bytes() -> None:
    """Whatever answers, and however much of it: a status and a body with a bound, or no answer."""
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        @many(40)
        @given(EDITS, st.integers(0, 3))
        def lie(edits: List[Tuple[int, int, bytes]], megabytes: int) -> None:
            data = edited(good, edits) + b"x" * (megabytes << 20)

            def serve() -> None:
                with contextlib.suppress(OSError), listener.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(data)

            server = threading.Thread(target=serve)
            server.start()
            try:
                status, body = rjupyter.http_request(listener.getsockname(), "/api", "abc", 20)
                assert 0 <= status < 1000 and len(body) < 1100000
            except OSError:
                pass
            server.join(20)
            assert not server.is_alive()

        lie()


def test_lines_of_a_child_whatever_it_prints() -> None:
    """All of it comes, in lines; what is longer than a line may be, in several."""

    long = [b"a" * 70000, b"\n" * 400, b"m1 " + b"b" * 300000]

    @many(15)
    @given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(long))))
    def print_(pieces: List[bytes]) -> None:
        data = b"\n".join(pieces)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            with little_memory():
                child = rjupyter.Child(["cat"], stdin=file)
                child.mark = b"m1"
                lines = [line for _, line in child.remaining_lines(60)]
                child.end()
        wanted = [line.decode("utf-8", "replace").rstrip("\r") for line in data.split(b"\n")]
        assert max(map(len, lines), default=0) <= 400000
        if all(len(piece) < 60000 for piece in pieces):
            assert lines == (wanted if wanted[-1] else wanted[:-1])
        assert "".join(lines) == "".join(wanted) or b"\r" in data or not data.isascii()

    print_()


# -- the whole program, with a stub of ssh on PATH --------------------------------------------------------------------

STUB = """#!/bin/sh
case " $* " in
  *" -G "* | *" -O "*) exit ;;
  *" -M "*)
    while [ "$1" != -S ]; do shift; done
    : >"$2"
    exec sleep 1000 ;;
esac
exec /usr/bin/python3 -IS -c '
import base64, json, os, sys, zlib
words = sys.stdin.buffer.read().split()
request = json.loads(zlib.decompress(base64.b64decode(words[-1]))) if words else sys.exit()
with open(os.environ["LIES"]) as stream:
    for line in stream:
        *actions, words = line.strip("\\n").split("\\t")  # the one that it answers, if not any
        if request.get("action", "open") in actions or not actions:
            print(request["nonce"] + " " + words, flush=True)
'
"""


def put_stub(laptop: Laptop) -> None:
    """Put a stub of ssh on the laptop's PATH, and what the commands name into its home."""
    stub = laptop.home / "bin/ssh"
    write_files(laptop.home)
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    laptop.environment.update(LIES=str(laptop.home / "lies"), PATH="%s:/usr/bin:/bin" % stub.parent)


LIES = [
    {"kind": "reply", "reply": {"id": "07af"}},
    {"kind": "reply", "reply": {**OPEN, "token": "a b"}},
    {"kind": "reply", "reply": {**OPEN, "job": "j07af", "node": "x;reboot"}},
    {"kind": "reply", "failure": {"what": "\x1b[2J", "status": "0"}},
    {"kind": "hello", "user": ["ana"]},
    {"kind": "reply", "reply": {**OPEN, "seconds": float("nan"), "servers": [{**SERVER, "age_s": float("inf")}]}},
    {"kind": "installed", "elapsed_s": "soon"},
    [1],
]


@pytest.mark.parametrize("way", ["--no-mux", ""], ids=["Direct", "Master"])
def test_stub_of_ssh_whose_host_lies(laptop: Laptop, way: str) -> None:
    """Each action is told one of the lies, and each lie is told to three actions; half of them by either way."""
    put_stub(laptop)
    for number, action in enumerate(sorted(COMMANDS)):
        if number % 2 == bool(way):
            (laptop.home / "lies").write_text(json.dumps(LIES[number % len(LIES)]) + "\n")
            run = laptop.run(*([way] if way else []), *COMMANDS[action])
            assert run.status in (0, 1, 255), run.text  # 0: a reply of another kind may be an empty list
            assert "\x1b" not in run.text
            assert len(re.findall("^(?:rjupyter:|FAIL)", run.text, re.MULTILINE)) == (run.status != 0), run.text
            assert "http://" not in run.text


# -- a host that means harm -------------------------------------------------------------------------------------------


def file_of(name: str, data: bytes = b"harm", **facts: Any) -> bytes:
    """Return a member of a tar."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o4777
    for key, value in facts.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


def sparse_of(name: str, size: int) -> bytes:
    """Return a member that is a hole of so many bytes, as GNU's tar writes one."""
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    head[156:157] = b"S"
    head[386:410] = b"%011o\0%011o\0" % (size - 1, 0)  # the only piece that is no hole has no bytes
    head[483:495] = b"%011o\0" % size
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def harmed(laptop: Laptop, members: List[bytes], *arguments: str) -> Tuple[Any, Dict[str, Path]]:
    """Execute on a host that wants everything brought, and sends these; return the run, and what is new here."""
    put_stub(laptop)
    data = base64.b64encode(zlib.compress(b"".join(members) + b"\0" * 1024)).decode()
    asks_for_all = {**RUN, "brings": ["**", ".*", ".*/**"]}
    told = {
        "start_run": [{"kind": "reply", "reply": REPLIES["start_run"]}],
        "follow_runs": [*parts(JOURNAL), {"kind": "reply", "reply": {"ended": {"r07af": asks_for_all}, "failed": {}}}],
        "bring_files": [
            {"kind": "part", "file": "files", "data": data},
            {"kind": "reply", "reply": {"refused": [], "unmatched": []}},
        ],
    }
    lines = ["%s\t%s\n" % (action, json.dumps(message)) for action in told for message in told[action]]
    (laptop.home / "lies").write_text("".join(lines))
    before = set(laptop.home.rglob("*"))
    run = laptop.run("--no-mux", "host", "execute", "a.ipynb", *arguments)
    names = {str(path.relative_to(laptop.home)): path for path in set(laptop.home.rglob("*")) - before}
    return run, {name: path for name, path in names.items() if not name.startswith(".cache") and path.is_file()}


UNASKED = [".bash_profile", ".git/hooks/pre-commit", ".ssh/rc", "out/.git/hooks/pre-commit", "out/./.x", "./.profile"]
UNASKED += ["other.txt", "bin/ls", "out/../.bashrc"]


def test_stub_of_ssh_whose_host_sends_what_was_not_asked_for(laptop: Laptop) -> None:
    run, new = harmed(laptop, [file_of(name) for name in [*UNASKED, "out/a.png"]])
    assert run.status == 0, run.text
    assert set(new) == {"a.executed.ipynb"}


@pytest.mark.parametrize("typed", ["out/**", "out/*", "**/*.png"])
def test_stub_of_ssh_whose_host_sends_more_than_was_asked_for(laptop: Laptop, typed: str) -> None:
    run, new = harmed(laptop, [file_of(name) for name in [*UNASKED, "out/a.png"]], "--bring", typed)
    assert run.status == 1 and ".bash_profile: it was not asked for" in run.stderr, run.text
    assert set(new) == {"a.executed.ipynb", "out/a.png"}
    assert new["out/a.png"].stat().st_mode & 0o7022 == 0


BOMBS = {
    "a hole": sparse_of("out/a", 5 << 30),
    "a size": file_of("out/a", size=5 << 30),
    "less than nothing": file_of("out/a", size=-512),
    "a link": file_of("out/a", b"", type=tarfile.SYMTYPE, linkname="b"),
    "a link to a file of here": file_of("out/a", b"", type=tarfile.LNKTYPE, linkname="a.ipynb"),
    "a device": file_of("out/a", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": file_of("out/a", b"", type=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_stub_of_ssh_whose_host_sends_what_is_no_file(laptop: Laptop, kind: str) -> None:
    run, new = harmed(laptop, [file_of("out/b"), BOMBS[kind]], "--bring", "**")
    assert run.status == 1, run.text
    assert not os.path.lexists(laptop.home / "out/a")
    assert sum(path.stat().st_size for path in new.values()) < 100000


# -- a host that prints without end -----------------------------------------------------------------------------------

# What the stub says in place of an answer: `{nonce}` is the request's.
ENDLESS = {
    "lines": "yes 'nothing of ours'",
    "no newline": "yes | tr -d '\\n'",
    "on stderr": "yes 'nothing of ours' >&2",
    "a message that does not end": 'printf \'%s {{"kind": "note", "text": "\' {nonce}; yes | tr -d \'\\n\'',
    "after it has begun": "echo '{nonce} {hello}'; yes 'nothing of ours'",
    "zeros": "cat /dev/zero",
}
MEMORY_BYTES = 700 << 20  # of addresses; the longest message is let in, and none of the above


@pytest.mark.waits
@pytest.mark.parametrize("name", sorted(ENDLESS))
def test_stub_of_ssh_whose_host_prints_without_end(laptop: Laptop, name: str) -> None:
    """It ends with one error, in the memory that there is; how long it takes is no matter of the host's."""
    put_stub(laptop)
    way = "--no-mux" if sorted(ENDLESS).index(name) % 2 else ""
    endless = ENDLESS[name].format(nonce="'$nonce'", hello=json.dumps(TOLD[0]))
    stub = laptop.home / "bin/ssh"
    says = 'nonce=$(/usr/bin/python3 -IS -c "$READ"); exec /bin/sh -c "nonce=$nonce; $SAY"'
    stub.write_text(STUB.partition("exec /usr/bin/python3")[0] + says + "\n")
    read = (
        "import base64, json, sys, zlib; words = sys.stdin.buffer.read().split(); "
        "print(json.loads(zlib.decompress(base64.b64decode(words[-1])))['nonce'])"
    )
    say = endless.replace("'$nonce'", "$nonce").replace("echo '$nonce ", 'echo "$nonce"\' ')
    run = laptop.start(*([way] if way else []), "host", "list", has_terminal=False, READ=read, SAY=say)
    resource.prlimit(run.pid, resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    run.wait()
    assert run.status in (1, rjupyter.EXIT_TIMEOUT), run.text[-2000:]
    assert len(re.findall("^rjupyter: ", run.stderr, re.MULTILINE)) == 1, run.text[-2000:]
    assert re.search("not for us|makes no sense|ended early", run.stderr), run.text[-2000:]
    assert "no memory" not in run.stderr and len(run.text) < 100000
