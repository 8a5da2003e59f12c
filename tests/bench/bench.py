"""`make bench`: rjupyter.py beside what one would use instead, against a private sshd on this machine.

Prints a Markdown table on stdout, and how far it is on stderr. `make bench BENCH_ARGS="--rounds 3 cold list"` runs some
rows, with fewer rounds.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import List

TOP = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]

from figures import Row, failed, table  # noqa: E402
from jupyters import jupyter_as_installed  # noqa: E402
from rig import Rig  # noqa: E402
from rows import ROWS  # noqa: E402


def machine() -> str:
    """Say what this was measured on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr.split(",")[0]
    argv = [str(jupyter_as_installed() / "jupyter-notebook"), "--version"]
    notebook = subprocess.run(argv, capture_output=True, text=True).stdout.strip()
    facts = (model.group(1).strip() if model else platform.machine(), os.cpu_count(), platform.python_version())
    return "%s, %s cores, Python %s, " % facts + "%s, Jupyter Notebook %s" % (ssh, notebook)


def measure(names: List[str], rounds: int, rows: List[Row]) -> bool:
    """Add to the rows what is measured on a rig of their own, which leaves nothing behind; True when all went well.

    A failure is a row that says so: what was measured before and after it stays.
    """
    directory = Path(tempfile.mkdtemp(prefix="rj-"))
    rig = Rig(directory)
    is_well = True
    try:
        for name in names:
            began = time.monotonic()
            try:
                rig.end_servers()  # those of a row that failed
                rows += ROWS[name](rig, rounds)
            except Exception as error:
                traceback.print_exc()
                rows.append(failed(name, error))
                is_well = False
            print("%s: %.0f s" % (name, time.monotonic() - began), file=sys.stderr, flush=True)
    finally:
        rig.close()
        shutil.rmtree(directory)
    return is_well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS) + " (all)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured (7)")
    args = parser.parse_args()
    title = "%s: %s. Medians of %d rounds with the least and the greatest; all that a line compares is interleaved."
    rows: List[Row] = []
    try:
        is_well = measure(args.rows or list(ROWS), args.rounds, rows)
    finally:  # also after Ctrl-C
        print(table(rows, title % (time.strftime("%F"), machine(), args.rounds)))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
