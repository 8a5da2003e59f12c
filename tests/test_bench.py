"""`make bench`: a row that cannot be measured is said, and costs no other row."""

import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest
from sides import TOP


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
    assert rows[0] == rows[3] == "| a row | <= 1 | 0.50 | - | - |"
    assert rows[1] == "| browser | - | **failed** | - | FileNotFoundError: no chromedriver \\| here |"
    assert rows[2].startswith("| command | - | **failed** | - | CalledProcessError: ") and rows[2].endswith(
        ": refused |"
    )
    assert len(rows) == 4
    monkeypatch.setattr(sys, "argv", ["bench.py", "well"])
    assert bench.main() == 0
