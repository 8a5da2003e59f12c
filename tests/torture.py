"""Lets the Nth call of what starts or writes something fail once, in a process that runs rjupyter.py.

It is loaded from outside: on the laptop as `sitecustomize`, on the host by a python3 that stands first on PATH. The
number stands in a file, which the first process that finds it takes; for 0 nothing fails, and the calls are counted.
"""

import builtins
import errno
import os
import subprocess
import sys
import threading
from typing import Any, Callable

PLACE = os.environ.get("RJUPYTER_TORTURE_IN", "")  # a directory with the file "number", and what is reported
FAILS = {
    "Popen": OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
    "fork": OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
    "open": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "write": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "replace": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "mkdir": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "thread": RuntimeError("can't start new thread"),
}


def begin() -> None:
    """Wrap those calls, as far as rjupyter.py makes them itself."""
    try:
        os.rename(PLACE + "/number", PLACE + "/taken")
    except OSError:
        return
    with open(PLACE + "/taken") as stream:
        number = int(stream.read())
    report = os.open(PLACE + "/report", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.unlink(PLACE + "/taken")
    write, pid, count = os.write, os.getpid(), 0

    def look(name: str, depth: int = 2) -> None:
        nonlocal count
        caller = sys._getframe(depth)
        if caller.f_globals.get("__name__") != "rjupyter" or os.getpid() != pid:
            return
        count += 1
        if not number or count == number:
            write(report, ("%s in %s, line %d\n" % (name, caller.f_code.co_name, caller.f_lineno)).encode())
        if count == number:
            raise FAILS[name]

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            look(name)
            return call(*arguments, **named)

        return wrapper

    plain_open = builtins.open

    def open_file(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        look("open")
        stream = plain_open(path, mode, *arguments, **named)
        if set(mode) & set("wax+"):
            stream.write = wrapped("write", stream.write)  # type: ignore[method-assign]
        return stream

    builtins.open = open_file  # type: ignore[assignment]
    subprocess.Popen.__init__ = wrapped("Popen", subprocess.Popen.__init__)  # type: ignore[method-assign]
    threading.Thread.start = wrapped("thread", threading.Thread.start)  # type: ignore[method-assign]
    for name in ("fork", "open", "write", "replace", "mkdir"):
        setattr(os, name, wrapped(name, getattr(os, name)))


if PLACE:
    begin()
