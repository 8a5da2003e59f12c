"""What others leave on a host: the files of servers that are gone, and a ps that counts how often it is asked."""

import json
from pathlib import Path

from sides import Host


def runtime_directory(host: Host) -> Path:
    return host.home / ".local/share/jupyter/runtime"


def leave_runtime_files(host: Host, count: int) -> None:
    """Put there what servers leave that nobody could end: VS Code's, those of a host that was started anew."""
    runtime_directory(host).mkdir(parents=True, exist_ok=True)
    facts = {"hostname": "localhost", "port": 9, "token": "t", "base_url": "/", "root_dir": str(host.home)}
    for pid in range(5000000, 5000000 + count):  # more than there can be: proc(5), pid_max
        (runtime_directory(host) / ("jpserver-%d.json" % pid)).write_text(json.dumps(dict(facts, pid=pid)))


def counting_ps(directory: Path, ps: str = "/bin/ps") -> Path:
    """Make a directory with a ps that leaves a line in the file `asked` beside it, and return that file."""
    directory.mkdir(exist_ok=True)
    (directory / "ps").write_text('#!/bin/sh\necho "$@" >>%s/asked\nexec %s "$@"\n' % (directory, ps))
    (directory / "ps").chmod(0o755)
    return directory / "asked"
