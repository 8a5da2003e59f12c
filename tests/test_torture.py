"""What is cut in two: the Nth call that starts or writes something fails once, on either side, by turns for each N.

Whatever N was, nothing runs afterwards that `list` does not show, what it shows can be stopped, and one error says what
went wrong. A few numbers, dealt by chance; RJUPYTER_TORTURE=1000 is all of them, and RJUPYTER_SEED deals again.
"""

import contextlib
import os
import random
import re
import shutil
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from client import events_of
from jupyters import nbclient_alone, standin
from notebooks import write_notebook
from sides import ON_HOST, Host, Laptop, Run, processes_with, quiet_port, wait_until, wait_until_gone

HOOK = Path(__file__).with_name("torture.py")
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-IS -c" ] && [ -e '%(place)s/number' ]; then
  code=$3
  shift 3
  export RJUPYTER_TORTURE_IN='%(place)s'
  exec /usr/bin/python3 -IS -c "exec(open('%(hook)s').read()); $code" "$@"
fi
exec /usr/bin/python3 "$@"
"""


class Torture:
    """The two sides, and where the number is put for either."""

    def __init__(self, laptop: Laptop, host: Host, mark: str, places: Dict[str, Path]) -> None:
        self.laptop, self.host, self.mark, self.places = laptop, host, mark, places
        (places["laptop"] / "sitecustomize.py").symlink_to(HOOK)
        self.port = str(quiet_port())
        self.told = ""

    def run(self, *arguments: str, side: str = "", number: int = 0) -> Run:
        """Run to its end, or until the tunnel is up and Ctrl-C has closed it; with a failure on that side."""
        environment: Dict[str, str] = {}
        if side:
            (self.places[side] / "number").write_text(str(number))
        if side == "laptop":
            place = str(self.places["laptop"])
            environment = {"PYTHONPATH": place, "RJUPYTER_TORTURE_IN": place}
        run = self.laptop.start(*arguments, has_terminal=False, **environment)
        if "--local-port" in arguments:
            run.expect("Ctrl-C closes|^rjupyter: ")
            if "Ctrl-C closes" in run.text:
                run.interrupt()
        run.wait()
        run.close()
        self.laptop.runs.remove(run)
        self.told = ""
        if side:
            report = self.places[side] / "report"
            self.told = report.read_text() if report.exists() else ""
            report.unlink(missing_ok=True)
        return run

    def open(self, **torture: object) -> Run:
        return self.run("--local-port", self.port, "host", **torture)  # type: ignore[arg-type]

    def stop(self, **torture: object) -> Run:
        return self.run("host", "stop", "--all", "--yes", **torture)  # type: ignore[arg-type]

    def execute(self, **torture: object) -> Run:
        return self.run("host", "execute", "n.ipynb", "--force", **torture)  # type: ignore[arg-type]

    def running(self) -> List[int]:
        """Return the sessions on the host, but for those of logins."""
        here = processes_with(self.mark, without=ON_HOST)
        sessions = set()
        for pid in set(processes_with(self.mark)) - set(here):
            with contextlib.suppress(ProcessLookupError):
                sessions.add(os.getsid(pid))
        return sorted(sessions)

    def shown(self) -> List[int]:
        """Return the processes of what `list` shows as running."""
        run = self.run("host", "list", "--json", "--all")
        assert run.status == 0, run.text
        return [row["pid"] for row in events_of(run) if row.get("state") in ("live", "running", "pending", "no answer")]

    def check(self, run: Run, what: str) -> None:
        """One error at most, nothing left here, and on the host what `list` shows; all of which can be stopped."""
        said = "%s\n%s" % (what, run.text)
        assert not re.search("Traceback|this is a bug", run.text), said
        assert len(re.findall("^rjupyter: ", run.text, re.MULTILINE)) == (run.status not in (0, 5)), said
        wait_until_gone(self.mark, "nothing left on the laptop: " + said, 20, without=ON_HOST)
        wait_until(lambda: set(self.running()) <= set(self.shown()), "all that runs is shown: " + said, 20, 0.2)
        assert self.stop().status == 0, said
        wait_until(lambda: not self.running(), "what is shown can be stopped: " + said, 20)
        assert self.shown() == [], said


@pytest.fixture
def torture(laptop: Laptop, make_host: Callable[..., Host], mark: str, directory: Path) -> Torture:
    places = {side: directory / ("torture-" + side) for side in ("laptop", "host")}
    front = directory / "front"
    for path in (*places.values(), front):
        path.mkdir()
    (front / "python3").write_text(PYTHON % {"place": places["host"], "hook": HOOK})
    (front / "python3").chmod(0o755)
    host = make_host(path="%s:%s" % (standin(), nbclient_alone()), front=str(front))
    write_notebook(laptop.home / "n.ipynb", "print(1)")
    return Torture(laptop, host, mark, places)


@pytest.mark.parametrize("side", ["laptop", "host"])
@pytest.mark.parametrize("action", ["open", "stop", "execute"])
def test_every_call_that_fails_once(torture: Torture, action: str, side: str) -> None:
    seed = int(os.environ.get("RJUPYTER_SEED") or random.randrange(10**6))
    print("RJUPYTER_SEED=%d" % seed)
    act: Callable[..., Run] = getattr(torture, action)
    if action == "stop":
        torture.open()
    run = act(side=side)
    calls = torture.told.splitlines()
    torture.check(run, "counted")
    most = int(os.environ.get("RJUPYTER_TORTURE") or 2)
    numbers = range(1, len(calls) + 1)
    for number in sorted(random.Random(seed).sample(numbers, min(most, len(numbers)))):
        if action == "stop":
            torture.open()
        run = act(side=side, number=number)
        what = "%d: %s" % (number, torture.told or "nothing failed")
        print(what, flush=True)
        torture.check(run, what)
        if action == "execute" and run.status == 0:
            assert "1" in (torture.laptop.home / "n.executed.ipynb").read_text(), what
        shutil.rmtree(torture.host.home / ".local/state/rjupyter", ignore_errors=True)
