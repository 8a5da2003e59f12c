"""`make bench`: a row that cannot be measured is said, and costs no other row; nor does what we are measured beside."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import pytest
from sides import TOP, Laptop


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks' main module, with a rig on which nothing can be measured."""
    monkeypatch.syspath_prepend(str(TOP / "tests/bench"))
    import bench

    class NoRig:
        def __init__(self, directory: Path) -> None:
            self.directory = directory

        def end_servers(self) -> None:
            assert self.directory.is_dir()

        close = end_servers

    monkeypatch.setattr(bench, "Rig", NoRig)
    return bench


def test_row_that_fails_is_a_row_with_the_reason(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def well(rig: Any, rounds: int) -> List[Any]:
        return [bench.Row("a row", "<= 1", "0.50", "")]

    def browser(rig: Any, rounds: int) -> List[Any]:
        raise FileNotFoundError("no chromedriver |\nhere")

    def command(rig: Any, rounds: int) -> List[Any]:
        subprocess.run(["sh", "-c", "echo first >&2; echo refused >&2; exit 7"], check=True, capture_output=True)
        return []

    monkeypatch.setattr(bench, "ROWS", {"well": well, "browser": browser, "command": command, "again": well})
    monkeypatch.setattr(bench, "machine", lambda: "a machine")
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    assert bench.main() == 1
    rows = capsys.readouterr().out.splitlines()[4:]
    assert rows[0] == rows[3] == "| a row | <= 1 | 0.50 | - |"
    assert rows[1] == "| browser | - | **failed** | FileNotFoundError: no chromedriver \\| here |"
    assert rows[2].startswith("| command | - | **failed** | CalledProcessError: ") and rows[2].endswith(": refused |")
    assert len(rows) == 4
    monkeypatch.setattr(sys, "argv", ["bench.py", "well"])
    assert bench.main() == 0


@pytest.fixture
def bench_beside_one_that_fails(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks with a rig on which all ways take a second, but for jupyter-forward: a program that fails."""
    import rig
    import rows

    program = tmp_path / "jupyter-forward"
    program.write_text(
        "#!/bin/sh\necho $PPID >>%s.tries\necho 'hostname: Name or service not known'\nexit 1\n" % program
    )
    program.chmod(0o755)

    class StubRig(rig.Rig):
        def __init__(self, directory: Path) -> None:
            self.laptop = Laptop(directory, "none")
            self.sshd = SimpleNamespace(home=directory, config=directory / "config", port=1, logins=lambda: 0)  # type: ignore[assignment]
            self.sshd.config.write_text("Port 1\n")
            (directory / ".jupyter").mkdir()
            (directory / ".jupyter/jupyter_server_config.py").write_text("")
            self.port = 1

        @contextlib.contextmanager
        def open_ours(self, *_: Any, **__: Any) -> Iterator[Any]:
            yield rig.Opened(1.0, 1, SimpleNamespace())  # type: ignore[arg-type]

        open_by_hand = open_here = plain_tunnel = open_ours

        @contextlib.contextmanager
        def instant_jupyter(self) -> Iterator[None]:
            yield

        def ssh(self, *_: object) -> float:
            return 1.0

        def end_servers(self) -> None:
            pass

        close = end_servers

    monkeypatch.setattr(bench, "Rig", StubRig)
    monkeypatch.setattr(bench, "machine", lambda: "a machine")
    monkeypatch.setattr(rig, "environment", lambda *_: tmp_path)
    for name in ("server_port", "megabytes_per_s", "new_connection_s"):
        monkeypatch.setattr(rows, name, lambda _: 2)
    return bench


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        (
            "cold",
            [
                "| 0.50 (0.50 to 0.50) | by hand 0.50 (0.50 to 0.50), jupyter-forward - to HTTP, - to its browser |",
                "| 1.00 (1.00 to 1.00), **missed** | jupyter-forward - to HTTP, - to its browser |",
                "| 1.00 (1.00 to 1.00) | nobody reattaches |",
                "| alone 1.00 (1.00 to 1.00), ssh 1.00 (1.00 to 1.00) |",
                "| 0 and 0 | by hand 0, jupyter-forward - |",
            ],
        ),
        ("trips", ["| cold 0.0, reattach 0.0 | by hand 0.0, jupyter-forward - |"]),
        (
            "tunnel",
            [
                "| 1.00 (1.00 to 1.00) | jupyter-forward -; plain `ssh -L` 2 (2 to 2) MB/s, "
                "without a tunnel 2 (2 to 2) MB/s |",
                "2000.0 ms (2000.0 to 2000.0), jupyter-forward -, without a tunnel 2000.0 ms (2000.0 to 2000.0) |",
            ],
        ),
    ],
)
def test_what_we_are_measured_beside_costs_no_figure_of_ours(
    bench_beside_one_that_fails: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    cells: List[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "3", name])
    assert bench_beside_one_that_fails.main() == 0
    said = capsys.readouterr()
    rows = said.out.splitlines()[4:]
    assert len(rows) == len(cells), said.out
    for row, cell in zip(rows, cells):
        assert row.endswith(cell), row
    assert re.search("hostname: Name or service not known(.|\n)*jupyter-forward failed: it is left out", said.err)
    assert len((tmp_path / "jupyter-forward.tries").read_text().splitlines()) == 1  # it is not tried again
