#!/bin/sh
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
# fmt: off
''':'
# For sh: started so, a copied file has Python's bytecode kept in ~/.cache/rjupyter, as a module has, where that is ours
# alone; and a Ctrl-C leaves no traceback, even while Python compiles. `python3 rjupyter.py` does the same, slower.
exec python3 -IS -c '
import _signal, os, sys
if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:  # as under nohup
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
del sys.argv[0]
path = os.path.realpath(sys.argv[0])
cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rjupyter")
try:
    os.makedirs(cache, 0o700, exist_ok=True)
    state = os.lstat(cache)
    is_ours = (state.st_mode & 0o170077, state.st_uid) == (0o040000, os.getuid())
except OSError:
    is_ours = False
if is_ours and os.path.isabs(cache):
    import importlib.machinery
    module = sys.modules["rjupyter"] = type(sys)("rjupyter")
    module.__file__ = path
    sys.pycache_prefix = cache
    try:
        code = importlib.machinery.SourceFileLoader("rjupyter", path).get_code("rjupyter")
    except (EOFError, ValueError, TypeError):  # a full disk has cut the bytecode
        code = compile(open(path, "rb").read(), path, "exec")
    sys.pycache_prefix = None
    exec(code, module.__dict__)
    module.command()
else:
    __file__ = path
    exec(compile(open(path, "rb").read(), path, "exec"))
' "$0" "$@"
'''  # noqa: D300
# fmt: on
__doc__ = """Open the Jupyter of a remote host in your browser, over SSH.

  rjupyter gpu1:work                 open Jupyter in ~/work, or come back to it
  rjupyter gpu1 execute train.ipynb  run a notebook there, and bring the result
  rjupyter gpu1 stop                 end the server, which runs until then

HOST is whatever ssh takes; PATH is a directory or a notebook there, as in scp.
"""

# How it works is drawn in README.md. What runs on the host outlives this program; `stop` ends it.
#
# The rooms of this file, in reading order. A room uses those above it, and none below it. What a later room has to add
# to an earlier one it adds to a table: REQUESTS (what the host can be asked), KINDS (what is kept there), PLACES
# (where it runs), BESIDE (what is started with a server) and TELLING (what is told to who comes back to one).
#
#   names          numbers, exit statuses, the one Failure
#   records        every fact that crosses a boundary, typed and checked once
#   both sides     ports, HTTP, processes, files, waiting; nothing that knows Jupyter
#   messages       everything that a person or a program reads
#   ssh            the connection: a master of ours, the user's own, or none
#   channel        the host's way back
#   kept           what we started on the host, and where it runs
#   environments   the ways to run Jupyter there, best first
#   servers        launch, answer, shut down
#   host actions   open, list, logs, stop, and what doctor asks
#   agent          what is sent to the host, and the conversation with it
#   tunnel         forward, check, hold; the browser; the background
#   journal        an annex: what cells print is kept, and shown
#   execute        an annex: notebooks that are run to their end
#   kernels        an annex: one kernel at a time: list, wait for, end
#   schedulers     an annex: Jupyter in a job of a cluster
#   wrappers       an annex: Jupyter inside a container, a limit, a tool of the site's
#   command line   options, actions, main
#
# The host keeps a copy of this file. What stands between "agent begins" and "agent ends" runs there, under the host's
# own python3, 3.6 or newer; the rest must be imported there all the same.

import sys

if __name__ == "__main__":
    # Python puts the directory of this file first, and PYTHONPATH next, where an empty entry is the current directory:
    # a queue.py of someone's project would be imported, and executed. The standard library begins with its archive.
    archive = "python%d%d.zip" % sys.version_info[:2]
    sys.path[: next((place for place, path in enumerate(sys.path) if path.endswith(archive)), 0)] = []

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: a Ctrl-C among the imports leaves no traceback

import contextlib
import errno
import itertools
import os
import re
import stat
import threading
import time
import types
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    TextIO,
    Tuple,
    Type,
    TypeVar,
    Union,
)

__version__ = "1.0.0"


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; like KeyboardInterrupt it must pass every `except Exception`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Those that end us become exceptions, wherever the main thread is; but not while they are held."""

    depth = 0
    caught: "List[int]" = []
    first = 0  # that ended us: the end of a session sends SIGTERM and SIGHUP at once

    @classmethod
    def take(cls, signum: int, frame: "Any") -> None:
        """Raise what a signal stands for, now or when they are held no more."""
        if cls.depth:
            cls.caught.append(signum)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        elif cls.first in (0, signum):
            cls.first = signum
            raise Terminated(signum)

    @classmethod
    def keep(cls, lost: "Any") -> None:
        """Keep one that was raised where Python forgets it, as a thing was finalized, for those who hold them next."""
        if isinstance(lost.exc_value, (KeyboardInterrupt, Terminated)):
            cls.caught.append(getattr(lost.exc_value, "signum", signal.SIGINT))
        else:
            sys.__unraisablehook__(lost)


@contextlib.contextmanager
def signals_held() -> "Iterator[None]":
    """Hold them for what must not be left half done, and takes no time: an exception in it would leave a lock wrong.

    Much of the standard library holds one without showing it: a thread that starts, an Event, an import.
    """
    is_main = threading.current_thread() is threading.main_thread()  # they come nowhere else
    Signals.depth += is_main
    try:
        yield
    finally:
        Signals.depth -= is_main
        if is_main and Signals.caught and not Signals.depth:
            signum = Signals.caught[0]
            Signals.caught.clear()
            Signals.take(signum, None)


class Later:
    """A module that is imported when something of it is used first: to start ssh nothing else is waited for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        with signals_held():
            module = globals()[self._name.partition(".")[0]] = __import__(self._name)
        return getattr(module, name)


if TYPE_CHECKING:
    import ast
    import asyncio
    import base64
    import binascii
    import calendar
    import configparser
    import datetime
    import difflib
    import fcntl
    import fnmatch
    import glob
    import hashlib
    import hmac
    import ipaddress
    import json
    import keyword
    import mimetypes
    import pwd
    import queue
    import select
    import shlex
    import shutil
    import socket
    import ssl
    import struct
    import subprocess
    import tarfile
    import tempfile
    import textwrap
    import traceback
    import urllib.parse
    import warnings
    import webbrowser
    import zlib
else:
    LATER = (
        "ast asyncio base64 binascii calendar configparser datetime difflib fcntl fnmatch glob hashlib hmac ipaddress "
        "json keyword mimetypes pwd queue select shlex shutil socket ssl struct subprocess tarfile tempfile textwrap "
        "traceback urllib.parse warnings webbrowser zlib"
    )
    for later in LATER.split():
        globals()[later.partition(".")[0]] = Later(later)

Json = Dict[str, Any]
R = TypeVar("R", bound="Record")
F = TypeVar("F")
K = TypeVar("K", bound="Kept")

# ---------------------------------------------------------------------------------------------------------------------
# names
#
# Every number that someone may want to change, the exit statuses, and the one exception for what is expected to go
# wrong: it is raised anywhere, on either side, and caught once, in main. Any other exception is a bug.
# ---------------------------------------------------------------------------------------------------------------------

LOCAL_PORT = 8889  # the first one tried here: not 8888, where a local Jupyter may sit
CONNECT_TIMEOUT_S = 15
BATCH_LOGIN_TIMEOUT_S = 120  # sshd's own LoginGraceTime
SILENCE_TIMEOUT_S = 45  # the agent says something every few seconds while it works
SLOW_LOGIN_S = 3.0  # after which also a small command says where it has logged in
JOIN_TIMEOUT_S = 3  # for an answer through a tunnel of ours that is up, before we log in ourselves
CONTROL_TIMEOUT_S = 15  # for `ssh -O`, which only talks to our own master
CLOSING_TIMEOUT_S = 2  # for sshd to notice that a session of ours has ended, where it allows one (MaxSessions)
ANSWER_TIMEOUT_S = 30  # for Jupyter's answer through the tunnel
PROBE_EVERY_S = 10
PROBE_TIMEOUT_S = 10
MUTE_S = 1800  # that a connection says nothing to Jupyter, which closes such a one after an hour (tornado's httpserver)
CHECK_TIMEOUT_S = 15  # for the host's word on whether the server runs
DENIED_PAUSE_S = 3.0  # before the redial after a refusal, at least
REDIAL_MAX_S = 30.0  # the longest pause between two attempts to connect again
DENIALS_MAX = 3  # unattended logins that may be refused before we give up
WARN_BEFORE_END_S = 600  # of the time limit of a server's job
BROWSER_TIMEOUT_S = 120  # how long the one-time redirect waits for the browser
LINE_BYTES = 64 << 20  # of the host's messages, the longest one; a journal's entries have half of that
NOISE_BYTES = 16 << 20  # of what a host may print that is no message
QUEUED_LINES = 200  # that are read before they are looked at
CROWDED_TRIES = 4  # of a first login that sshd turns away
SSH_SOCKET_SUFFIX = 17  # bytes that ssh adds to the control path while it binds (OpenSSH mux.c)

# agent begins

STATE_DIR = "~/.local/state/rjupyter"
VENV_DIR = "~/.local/share/rjupyter/venv"
KEEP_ENDED_S = 7 * 86400  # how long the log of a server that ended is kept
POLL_S = 0.005
FOLLOW_MAX_S = 0.5  # the longest pause between two looks at a file that grows
LATE_S = 12.0  # in which a shared home comes to show what another machine wrote
COMMAND_TIMEOUT_S = 30  # for a command of the host's that takes no time, on a home that may be slow
HEARTBEAT_S = 5.0
LIFE_S = 5 * HEARTBEAT_S  # after which what gives no sign of life has ended, where nothing else tells
START_TIMEOUT_S = 120
ASK_TIMEOUT_S = 5  # for a server's answer on the host itself
SHELL_TIMEOUT_S = 10  # for the user's start-up files
DEFAULT_PORT = 8888  # the first one tried on the host: Jupyter's own
SUN_PATH_MAX = 104  # bytes; the smallest sun_path in use (macOS, BSD), its final NUL included
RUNTIME_FILE_MAX = 65536  # bytes; Jupyter's are below 1,000, and ours below 4,000
PART_BYTES = 131072  # of a file that is followed, sent in one message
LOG_LINES = 12
STATUS_PATH = "api/status?no_track_activity=1"  # without the latter, our looking would keep an idle server alive

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_NO_JUPYTER = 3
EXIT_SERVER_ENDED = 4
EXIT_CELL_FAILED = 5
EXIT_TIMEOUT = 6
EXIT_INTERRUPTED = 130
EXIT_SSH = 255


class Failure(Exception):
    """An expected failure: `what` went wrong, `why`, what to `try_`, and the exit status that says so.

    One of the host travels in the reply and is raised here again.
    """

    def __init__(self, what: str, why: str = "", try_: str = "", status: int = EXIT_FAILURE) -> None:
        super().__init__(what)
        self.what = what
        self.why = why.partition("] ")[2] if why.startswith("[Errno ") else why  # as str(OSError) has it
        self.try_ = try_
        self.status = status

    def facts(self) -> "Json":
        """Return it as it is written, to the wire and to a program."""
        return {"what": self.what, "why": self.why, "try": self.try_, "status": self.status}

    def last_line(self) -> str:
        """Return it in one line, where a line is all there is room for."""
        return self.why.splitlines()[-1] if self.why else self.what


# ---------------------------------------------------------------------------------------------------------------------
# records
#
# A fact that crosses a boundary - wire, file, process - is a field of a record. Its type stands once, here, and is
# checked once, where the record comes in. What a record does not know is dropped; what an older one lacks has a
# default. So a file of any version can be read, and nothing past the border looks into a dict from outside.
# ---------------------------------------------------------------------------------------------------------------------


class Wrong(Failure):
    """What came from outside is not the record that it should be; `why` names what is wrong in it.

    A file that is wrong is passed over where it is read. What is left to be told came from the host.
    """

    def __init__(self, why: object, try_: str = "") -> None:
        super().__init__("the host's reply makes no sense", str(why), try_)


class Record:
    """Typed facts: the annotations of a class are its fields, its class values their defaults.

    An annotation is a builtin or, quoted, "Any", "Json", "Failure", "Optional[...]", "List[...]", "Dict[str, ...]" of
    these and of other records: Python 3.6 would evaluate what is not quoted.
    """

    kinds = {}  # type: Dict[str, Any] # every record by its name, for fields that hold others
    fields = {}  # type: Dict[str, Any]
    usual = set()  # type: Set[str] # those whose default the class has for all of its records

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.fields = {}
        for base in cls.__mro__:  # its own first, as a person would list them
            # An attribute, not the class's namespace: Python 3.14 and newer make it when it is asked for (PEP 649).
            declared = getattr(base, "__annotations__", {})
            cls.fields.update({name: kind for name, kind in declared.items() if name not in cls.fields})
        cls.usual = {name for name in cls.fields if not isinstance(getattr(cls, name, []), (list, dict))}
        Record.kinds[cls.__name__] = cls

    def __init__(self, **facts: "Any") -> None:
        """Raises Wrong when a fact is missing or not of its type, TypeError when there is no such field."""
        unknown = set(facts) - set(self.fields)
        if unknown:
            raise TypeError("%s has no %s" % (type(self).__name__, ", ".join(sorted(unknown))))
        wrong = []
        for name, kind in self.fields.items():
            try:
                if name in facts or name not in self.usual:
                    setattr(self, name, checked(kind, facts[name] if name in facts else getattr(type(self), name)))
            except (AttributeError, Wrong):
                wrong.append(name)
        wrong = wrong or self.odd()
        if wrong:
            raise Wrong("wrong in it: " + ", ".join(wrong))

    @classmethod
    def read(cls: "Type[R]", facts: "Any") -> "R":
        """Return the record that a JSON object from outside holds; raises Wrong."""
        if not isinstance(facts, dict):
            raise Wrong("it is no object")
        return cls(**{name: facts[name] for name in cls.fields if name in facts})

    def odd(self) -> "List[str]":
        """Return the names of the fields whose values are of the right type and still make no sense."""
        return []

    def facts(self) -> "Json":
        """Return it as JSON has it."""
        return {name: plain(getattr(self, name)) for name in self.fields}

    def but(self: "R", **changes: "Any") -> "R":
        """Return another one that differs in these fields."""
        return type(self)(**dict({name: getattr(self, name) for name in self.fields}, **changes))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.facts() == other.facts()

    __hash__ = None  # type: ignore[assignment]


def checked(kind: "Any", value: "Any") -> "Any":
    """Return a value as a field of this kind holds it; raises Wrong when it is not one.

    Numbers are finite and below 2 ** 53, so that all that is computed with them is a number.
    """
    name = kind if isinstance(kind, str) else kind.__name__
    outer, _, inner = name.partition("[")
    inner = inner[:-1]
    if outer == "Any":
        return value
    if outer == "Optional":
        return None if value is None else checked(inner, value)
    if outer == "List" and isinstance(value, (list, tuple)):
        return [checked(inner, item) for item in value]
    if outer == "Dict" and isinstance(value, dict):
        return {checked("str", key): checked(inner.partition(", ")[2], item) for key, item in value.items()}
    if outer in Record.kinds:
        return value if type(value) is Record.kinds[outer] else Record.kinds[outer].read(value)
    if outer == "Failure" and isinstance(value, dict):
        what, why, try_ = (checked("str", value.get(word)) for word in ("what", "why", "try"))
        status = checked("int", value.get("status", EXIT_FAILURE))
        if not 0 < status < 256:  # only a status of ours becomes one of ours
            raise Wrong("wrong in it: status")
        return Failure(what, why, try_, status)
    if outer == "Json" and isinstance(value, dict):
        return dict(value)
    is_number = type(value) in (int, float) and -(2**53) < value < 2**53
    if outer == "float" and is_number:
        return float(value)
    if type(value).__name__ != outer or (outer in ("int", "float") and not is_number):
        raise Wrong("no %s: %r" % (name, value))
    return value


def reply_of(**fields: str) -> "Any":
    """Return the record of a reply that one place reads: its fields, each with the name of its type."""
    return type("Reply", (Record,), {"__annotations__": fields})


def plain(value: "Any") -> "Any":
    """Return a value of a field as JSON has it."""
    if isinstance(value, (Record, Failure)):
        return value.facts()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


# -- names of Jupyter's -----------------------------------------------------------------------------------------------


class App(NamedTuple):
    """A front end of Jupyter, or what executes without one: what starts it, its pages, and what tells it.

    The pages are that of a directory, a notebook and another file, whose quoted name takes the place of %s.
    """

    title: str
    command: str
    module: str
    pages: "Tuple[str, ...]" = ()


# Those that come first are looked for first where none is asked for.
APPS = {
    "notebook": App("Jupyter Notebook", "jupyter-notebook", "notebook", ("tree", "notebooks/%s", "edit/%s")),
    "lab": App("JupyterLab", "jupyter-lab", "jupyterlab", ("lab", "lab/tree/%s", "lab/tree/%s")),
}

# What an execution can do with: an app's environment has nbclient, and nbclient has a command of its own.
PROGRAMS = dict(APPS, nbclient=App("nbclient", "jupyter-execute", "nbclient"))


class RuntimeInfo(Record):
    """What Jupyter's own runtime file says of a server: the truth about what it binds, and its token."""

    host: str  # the address on the host that it binds
    port: int
    sock: str = ""  # the Unix socket that it listens on instead of a port; empty for none
    token: str
    base_url: str
    root_dir: str
    is_secure: bool = False
    has_password: bool = False

    @property
    def is_inner(self) -> bool:
        """True for one that only its own node reaches."""
        return bool(self.sock) or self.host.startswith("127.") or self.host == "::1"

    @property
    def good_statuses(self) -> "Tuple[int, ...]":
        """What our own server answers: without a token, it may want a password, which its file does not always say."""
        return (200,) if self.token else (200, 401, 403)

    def unusable(self) -> "List[str]":
        """Return the settings of Jupyter's that cannot be put into a header or an address."""
        forms = {"token": r"[!-~]*\Z", "base_url": r"/([A-Za-z0-9_.~%@+-]+/)*\Z"}
        return [name for name, form in forms.items() if not re.match(form, getattr(self, name))]

    @classmethod
    def read(cls: "Type[R]", facts: "Any") -> "R":
        """Take Jupyter's form, too: jpserver-PID.json, nbserver-PID.json of Notebook 6 (serverapp.py, server_info)."""
        if isinstance(facts, dict) and "is_secure" not in facts:  # which we keep
            host, sock = facts.get("hostname"), facts.get("sock") or ""
            host = "127.0.0.1" if host in ("", "*", "0.0.0.0", "localhost") else "::1" if host == "::" else host
            root_dir = facts.get("root_dir", facts.get("notebook_dir"))
            is_secure, has_password = facts.get("secure", False), facts.get("password", False)
            facts = dict(facts, host=host, sock=sock, root_dir=root_dir, is_secure=is_secure, has_password=has_password)
        return super().read(facts)


class Launcher(Record):
    """A way to run Jupyter on the host: which app, by which command, where that was found, and in which environment."""

    app: str
    argv: "List[str]"
    where: str
    environment: "Dict[str, str]"


# -- what is asked ----------------------------------------------------------------------------------------------------


class Request(Record):
    """What is asked of the host. What a request started keeps it, so that the same can be found, or done again."""

    action: str = "open"
    nonce: str = ""
    errand: str = ""  # tells it from all others, also when it is sent again because a connection was lost
    state_dir: str = ""  # where our state is on the host, in place of the usual directory
    # Which server, and where it is.
    path: "Optional[str]" = None
    app: str = ""
    attach: str = ""
    is_new: bool = False
    # In which environment.
    python: str = ""
    env: str = ""
    init: "List[str]" = []
    may_install: bool = True
    # What it runs inside.
    wrap: "List[str]" = []  # commands, the outermost first
    container: str = ""  # an image, inside those
    wrapper: str = ""  # the id of what we are inside, for who is
    # How it is launched.
    port: int = 0
    ip: str = "127.0.0.1"
    socket: bool = False
    server_args: "List[str]" = []
    idle_timeout_s: int = 0
    no_record: bool = False
    no_save: bool = False  # what was missed is told, and put into no notebook
    start_timeout_s: float = float(START_TIMEOUT_S)
    local_port: int = 0  # the one it is to be reached by; the next open of it looks for the same
    # Through which scheduler.
    submit: "List[str]" = []
    via_node: bool = False
    node_address: str = ""  # an interface or a name of the job's node; in the job, the address itself
    job: str = ""  # the id of the job of ours that does this
    shell: str = ""
    # Of stop, logs and the like.
    id: str = ""
    ids: "List[str]" = []
    is_all: bool = False
    asks: bool = False
    is_followed: bool = False
    line: int = 0
    # Of an execution.
    notebook: str = ""
    file: str = ""
    name: str = ""
    key: str = ""
    variant: str = ""
    result: str = ""
    original: str = ""  # the digest of what is replaced by the result on the host
    is_in_place: bool = False
    overlaps: bool = False
    parameters: "List[List[Any]]" = []
    parameter_files: "List[List[str]]" = []  # the name and the text of each
    files: str = ""  # the digest of the tar that goes along
    offset: int = 0
    data: str = ""  # of that tar, from there on, in base64
    brings: "List[str]" = []  # patterns of what comes back
    is_one_of_many: bool = False  # nobody waits for the job in which it starts
    kernel: str = ""
    timeout_s: int = 0
    cell_timeout_s: int = 0
    allows_errors: bool = False
    offsets: "Dict[str, int]" = {}

    def facts(self) -> "Json":
        """Return what is asked for, without what is as usual."""
        return {name: value for name, value in super().facts().items() if value != getattr(type(self), name)}

    @property
    def is_held(self) -> bool:
        """True where what is started ends with the agent that started it: in a job, in a wrapper."""
        return bool(self.job or self.wrapper)

    @property
    def outside(self) -> str:
        """What it is to run inside, in the words that were typed; empty for nothing."""
        return " ".join([*self.wrap, *filter(None, [self.container])])

    def to_keep(self) -> "Request":
        """Return what may be kept of it: no secrets, and nothing that is long."""
        return self.but(nonce="", notebook="", parameters=[], parameter_files=[])

    # What acts at a launch alone: `too_late`. What leads back to one thing and not to another, as far as it is named:
    # `allows`. What makes two requests the same from the start: `same_as`.
    LAUNCHING = ("port", "ip", "server_args", "idle_timeout_s", "no_record")
    CHOOSING = ("app", "python", "env", "init", "socket", "submit", "wrap", "container")
    TELLING = CHOOSING + ("action", "path", "attach", "ip", "port", "server_args", "via_node", "key", "state_dir")

    def allows(self, other: "Request") -> bool:
        """True when what `other` asked for is what this one means: each thing as far as it is named here."""
        return all(getattr(self, name) in (getattr(other, name), None, "", [], False) for name in self.CHOOSING)

    def is_done_by(self, asked: "Request") -> bool:
        """True when what `asked` is about to start is meant here; a stop means a server, without a PATH any."""
        path = asked.path if self.action == "stop" and self.path is None else self.path
        action = "open" if self.action == "stop" else self.action
        same = (action, path, self.key, self.variant)
        return (asked.action, asked.path, asked.key, asked.variant) == same and self.allows(asked)

    def too_late(self, launched: "Request") -> "List[str]":
        """Return what is asked for here and was not at the launch of what is found, as far as it acts there alone."""
        asked = [name for name in self.LAUNCHING if getattr(self, name) != getattr(type(self), name)]
        return [name for name in asked if getattr(self, name) != getattr(launched, name)]

    def same_as(self, other: "Request") -> bool:
        """True when both ask for the same."""
        return all(getattr(self, name) == getattr(other, name) for name in self.TELLING)


# -- what is kept on the host -----------------------------------------------------------------------------------------


class Kept(Record):
    """What we started on the host, as its file has it. The directory of that file is named for the id."""

    kind = ""
    id = ""
    directory = ""
    is_ours = True

    version: int = 1  # of the form of the file
    created: float
    node: str
    pid: int = 0
    identity: str = ""
    root_dir: str = ""
    job: str = ""  # the id of the job of ours that it is in; empty for none
    wrapper: str = ""  # the id of what it runs inside; empty for nothing
    request: "Request" = Request()

    def age_s(self) -> float:
        """Return how long ago it was started, in seconds."""
        return max(0.0, time.time() - self.created)

    def file(self, *names: str) -> str:
        """Return the path of one of its files: its log, its journal."""
        return os.path.join(self.directory, *names)


class ServerRecord(Kept):
    """A server: servers/ID/server.json. One that something else started has the same form, and no file."""

    kind = "server"
    app: str
    app_version: str = ""
    port: int = 0
    runtime_dir: str
    local_port: int
    has_answered: bool = True
    info: "Optional[RuntimeInfo]" = None  # what Jupyter's file said when it answered first
    manager: str = ""  # what else it belongs to: JupyterHub

    def odd(self) -> "List[str]":
        """Return what is not as we write it; killpg of what a damaged file calls a pid would be a disaster."""
        return (["pid"] if self.pid < 2 else []) + (["app"] if self.app not in APPS else [])


class RunRecord(Kept):
    """An execution: runs/ID/run.json."""

    kind = "run"
    name: str
    key: str
    variant: str = ""  # how it is executed; one notebook may be, in more ways than one

    def odd(self) -> "List[str]":
        """Return what is not as we write it."""
        return ["pid"] if self.pid < 2 else []


class JobRecord(Kept):
    """A job of a scheduler: jobs/ID/job.json. `number` is the scheduler's own name for it."""

    kind = "job"
    number: str  # empty as long as its submission has not told it
    command: str
    cluster: str = ""  # the one that took it, where its scheduler has several
    environment: "Dict[str, str]" = {}  # what a terminal set for its scheduler's commands


class WrapperRecord(Kept):
    """A command that something of ours runs inside: wrappers/ID/wrapper.json."""

    kind = "wrapper"
    home: str  # outside
    network: str = ""  # which one that is, outside
    entries: "List[str]" = []  # some of what is in root_dir, outside
    remove: "List[str]" = []  # the command that removes its container; empty for none


class JobState(Record):
    """Where a job stands: its scheduler's word for it, and whether that means that it waits, or is live at all.

    It is written down twice: begun.json by the job itself, end.json by who sees its end.
    """

    is_live: bool = True
    is_waiting: bool = True
    word: str = "submitted"
    reason: str = ""
    start: str = ""
    node: str = ""
    left_s: "Optional[float]" = None


class RunState(Record):
    """Where a run stands, as it writes it down itself: state.json."""

    outcome: str = ""
    cell: int = 0
    count: int = 0
    error: str = ""
    unwritten: str = ""
    written: int = 0  # bytes of the journal and the result, where both are whole


# -- what the host tells ----------------------------------------------------------------------------------------------


class Told(Record):
    """What the host tells while it works, and that is more than a row of SAYINGS: each kind has some of these facts.

    "queue": how the job stands that we wait for; without a word it has begun. "line": one of a log. "recorded": one of
    a journal; `at` is how many came before, also those that were dropped since. "part": the next bytes of a file,
    compressed and in base64.
    """

    id: str = ""  # of the job, of the server whose log it is, or of the run as it was asked for
    job: str = ""
    is_waiting: bool = False
    word: str = ""
    reason: str = ""
    start: str = ""
    text: str = ""
    entry: "Json" = {}
    at: int = 0
    file: str = ""
    data: str = ""


class Away(Record):
    """A notebook whose cells ended while no page was connected to its kernel: how many, and how the last one did."""

    notebook: str
    kernel: str = ""  # how its id begins, where the notebook's name leads to another one's output
    cells: int = 1
    count: "Optional[int]" = None
    seconds: float
    lines: int
    is_done: bool
    has_died: bool = False  # its kernel, before it ended by itself
    why: str = ""  # the notebook has not got their outputs


class Server(RuntimeInfo):
    """The server that an open came back to, or launched: what Jupyter's runtime file and our record say together.

    Each of its facts is of a form that can be put into an address or an argv.
    """

    id: str
    pid: int
    app: str
    app_version: str = ""
    file: str = ""  # the notebook that PATH names, relative to root_dir; empty for none
    local_port: int  # the one it was reached by before, or is to be reached by
    node: str  # the host's own name, or that of the node that its job runs on
    job: str = ""  # the id of the job that it runs in; empty for none
    wrapper: str = ""  # the id of what it runs inside; empty for nothing
    left_s: float = 0.0  # until the job's time is up; 0 for no limit that we know of
    is_launched: bool  # by this request
    is_only: bool = True  # no other one of ours runs there
    seconds: float = 0.0  # the launch took; or, when it ran already, since it was launched
    request: "Request" = Request()  # what launched it
    foreign: "List[str]" = []  # files of Jupyter's that another user owns
    scheduler: str = ""  # a scheduler's command that is there and was not used
    away: "List[Away]" = []

    def odd(self) -> "List[str]":
        """Return what would mean more than it should."""
        forms = {
            "id": re.fullmatch(r"[0-9a-f]{4}|p[0-9]{1,9}", self.id),
            "app": self.app in APPS,
            "host": re.fullmatch(r"[\w.:%-]+", self.host) and not self.host.startswith("-"),
            "node": not self.job or re.fullmatch(r"\w[\w.-]*", self.node),  # --via-node goes there
            "port": 0 < self.port < 65536 or self.sock,
            "sock": re.fullmatch(r"(/[^\x00-\x1f\x7f:\\%$]+)?", self.sock),  # the rest means more to ssh's -L
            "local_port": 0 < self.local_port < 65536,
        }
        return [name for name, is_right in forms.items() if not is_right] + self.unusable()

    @property
    def title(self) -> str:
        """Its name as a person calls it."""
        return ("%s %s" % (APPS[self.app].title, self.app_version)).strip()

    @property
    def target(self) -> str:
        """Where it listens on the host, as ssh's -L writes it."""
        return self.sock or "%s:%d" % ("[%s]" % self.host if ":" in self.host else self.host, self.port)

    @property
    def is_on_node(self) -> bool:
        """True for one at an address that others may reach: of a job's node, or of a network that it is wrapped in."""
        return bool(self.job) or (bool(self.wrapper) and not self.is_inner)

    def url(self, local_port: int, has_token: bool = True) -> str:
        """Return the address of its page in a browser here, made from checked parts."""
        quote = urllib.parse.quote
        page, notebook_page, file_page = APPS[self.app].pages
        if self.file:
            page = notebook_page if self.file.endswith(".ipynb") else file_page
            page %= quote(self.file.encode("utf-8", "surrogateescape"), safe="/")  # byte by byte where it is not UTF-8
        query = "?token=" + quote(self.token, safe="") if has_token and self.token else ""
        scheme = "https" if self.is_secure else "http"
        return "%s://127.0.0.1:%d%s%s%s" % (scheme, local_port, quote(self.base_url, safe="/%"), page, query)


class ServerView(Record):
    """A server, as `list` shows it. It is live when it answered with its token, not when some pid exists."""

    id: str
    pid: int
    node: str
    app: str
    root_dir: str
    is_ours: bool
    manager: str = ""
    state: str = "live"
    job: str = ""
    wrap: str = ""  # what it runs inside
    port: int = 0
    sock: str = ""
    kernels: int = 0
    busy: int = 0
    idle_s: "Optional[float]" = None
    age_s: float


class RunView(Record):
    """An execution, as `list` shows it: its state in a word, where it stands, and the size of its journal in bytes."""

    id: str
    pid: int
    node: str
    name: str
    root_dir: str
    cell: int = 0
    count: int = 0
    error: str = ""
    unwritten: str = ""  # why the notebook there could not be replaced by its result
    age_s: float
    job: str = ""
    wrap: str = ""  # what it runs inside
    state: str = ""
    size: int = 0


class FollowReply(RunView):
    """How an execution ended, and the patterns of what is to come back of it."""

    brings: "List[str]" = []


class StarterView(JobState):
    """A job, as `list` shows it; or what starts in a wrapper, as long as nothing runs in there yet."""

    id: str
    job: str = ""
    command: str = ""
    wrap: str = ""
    action: str
    path: "Optional[str]" = None
    age_s: float


class KernelState(Record):
    """A kernel that lives, as `list --kernels` shows it; memory in bytes, that of all its processes."""

    id: str
    server: str
    notebook: str = ""
    name: str = ""
    state: str = ""
    idle_s: "Optional[float]" = None  # since it did something
    connections: int = 0
    memory: "Optional[int]" = None
    gpu_memory: "Optional[int]" = None
    ports: "List[int]" = []  # on which it listens, or what it started

    @property
    def title(self) -> str:
        """Its notebook, and how its id begins."""
        return "%s (%s)" % (self.notebook or "no notebook", self.id[:8])


class EndReply(Record):
    """Whether a thing still runs and answers, on this node or elsewhere; or why it ended, and the end of its log."""

    is_running: bool
    is_answering: bool = False
    is_elsewhere: bool = False
    node: str = ""
    reason: str = ""
    log: str = ""


class StartReply(Record):
    """The run that was started, or the one that executes the notebook already."""

    id: str
    is_started: bool = False
    age_s: float = 0.0


class Said(Record):
    """A line of an agent's: its kind, and in the last one the reply, or the failure in its place."""

    kind: str
    reply: "Optional[Json]" = None
    failure: "Optional[Failure]" = None

    def result(self) -> "Json":
        """Return the reply; raises the Failure that is there instead."""
        if self.failure:
            raise self.failure
        if self.reply is None:
            raise Wrong("there is none")
        return self.reply


# ---------------------------------------------------------------------------------------------------------------------
# both sides
#
# What the laptop and the host do alike: ports, HTTP, commands, processes, files, waiting. Nothing here knows Jupyter.
# ---------------------------------------------------------------------------------------------------------------------


def until(condition: "Callable[[], Any]", timeout_s: float, slowest_s: float = POLL_S) -> "Any":
    """Look until `condition` gives something true, and return it; what it gave last when `timeout_s` passed.

    The pauses between two looks grow from POLL_S up to `slowest_s`.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = POLL_S
    while True:
        found = condition()
        if found or time.monotonic() >= deadline:
            return found
        time.sleep(pause_s)
        pause_s = min(slowest_s, 1.3 * pause_s)


# -- ports and HTTP ---------------------------------------------------------------------------------------------------


def listen_on(port: int, host: str = "127.0.0.1") -> "socket.socket":
    """Return a socket that listens on `host`:`port`; raise OSError when that is taken or not ours to take.

    SO_REUSEADDR, because ssh and Jupyter set it too: a port in TIME_WAIT is free for them.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(8)
    except OSError:
        listener.close()
        raise
    return listener


def find_free_port(start_port: int, host: str = "127.0.0.1") -> int:
    """Return the first port from `start_port` up that `host` can listen on; raise OSError when none is left."""
    for port in range(start_port, 65536):
        try:
            listen_on(port, host).close()
            return port
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise OSError(errno.EADDRINUSE, "no free port from %d up" % start_port)


def connected_to(address: "Any", timeout_s: float) -> "socket.socket":
    """Return a connection to (host, port) or to a Unix socket; raise OSError when there is none within `timeout_s`."""
    if not isinstance(address, str):  # as bytes: for a text, Python imports its codec for international names first
        return socket.create_connection((address[0].encode(), address[1]), timeout=timeout_s)
    with contextlib.ExitStack() as failed:
        connection = failed.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
        connection.settimeout(timeout_s)
        connection.connect(address)
        failed.pop_all()
        return connection


def http_request(
    address: "Any",
    path: str,
    token: str,
    timeout_s: float,
    method: str = "GET",
    is_secure: bool = False,
    sent: bytes = b"",
    most: int = 1000000,
) -> "Tuple[int, bytes]":
    """Ask the server at `address`, (host, port) or a Unix socket; return the HTTP status and the body, `most` bytes.

    Straight to the socket, past any http_proxy. The certificate is not checked: the way there is a loopback, or ours.
    Raises OSError when there is no answer within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    connection = connected_to(address, timeout_s)
    with contextlib.closing(connection):
        if is_secure:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        host = "127.0.0.1" if isinstance(address, str) else "127.0.0.1:%d" % address[1]
        head = "%s %s HTTP/1.0\r\nHost: %s\r\nContent-Length: %d\r\n" % (method, path, host, len(sent))
        if token:
            head += "Authorization: token %s\r\n" % token
        else:  # Jupyter then wants any word twice, as no page of another site can say it (tornado, "XSRF")
            head += "Cookie: _xsrf={0}\r\nX-XSRFToken: {0}\r\n".format(os.urandom(8).hex())
        connection.sendall((head + "\r\n").encode("utf-8") + sent)
        answer = bytearray()
        while len(answer) < most:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = connection.recv(65536)
            if not chunk:
                break
            answer += chunk
    head_bytes, _, body = bytes(answer).partition(b"\r\n\r\n")
    words = head_bytes.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ConnectionError("closed without an answer")
    return int(words[1][:3]), body


def tcp_rows(words: str) -> "Iterator[List[str]]":
    """Yield the rows of the system's tables of TCP sockets (proc(5)) that have these words in them, in lower case.

    No further than they are taken: a busy host's tables are long, and slow to read.
    """
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as stream:
            for line in stream:
                if words in line:
                    yield line.lower().split()


def owner_of_tcp(local: "Tuple[str, int]", remote_port: int) -> "Optional[int]":
    """Return the uid whose socket is bound to `local`, or to any address with that port; None where nobody can tell.

    `remote_port` is 0 for one that listens. From the tables of proc(5), which Linux alone has. Raises OSError for
    what is no address, or another machine's.
    """
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    host = socket.inet_pton(family, local[0])
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((local[0], 0))
    addresses = [host, bytes(len(host)), bytes(16), bytes(10) + b"\xff\xff" + host]
    # Each group of four bytes is printed as one number in this machine's order.
    ends = [b"".join(struct.pack("=I", n) for n in struct.unpack("!%dI" % (len(a) // 4), a)).hex() for a in addresses]
    local_ends = ["%s:%04x" % (end, local[1]) for end in ends]
    for row in tcp_rows(":%04X " % local[1]):
        if row[1] in local_ends and int(row[2].rpartition(":")[2], 16) == remote_port:
            return int(row[7])
    return None


def node_address(asked: str) -> str:
    """Return the address of this node that the login node reaches.

    The one that was asked for, by its interface or name; that which Slurm has; that of its name; that of an interface.
    """
    interfaces = {}  # the IPv4 address of each, by its name (Linux: netdevice(7))
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                interfaces[name] = socket.inet_ntoa(answer[20:24])
    names = [interfaces.get(asked, asked)] if asked else [os.uname().nodename, *interfaces.values()]
    slurm_name = os.environ.get("SLURMD_NODENAME")
    if slurm_name and not asked:
        _, said, _ = run_command(["scontrol", "--oneliner", "show", "node", slurm_name], COMMAND_TIMEOUT_S)
        names[:0] = [*re.findall(r"\bNodeAddr=(\S+)", said), slurm_name]
    for name in names:
        with contextlib.suppress(OSError):
            address = str(socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)[0][4][0])
            if not address.startswith("127."):
                return address
    why = "tried %s; its interfaces: %s" % (", ".join(names), ", ".join(sorted(interfaces)) or "none")
    raise Failure("this node has no address of its own", why, "--node-address INTERFACE, or --via-node")


# -- commands and processes -------------------------------------------------------------------------------------------


def run_command(argv: "List[str]", timeout_s: float, env: "Optional[Dict[str, str]]" = None) -> "Tuple[int, str, str]":
    """Run a command to its end, in our environment or another; return its status, its stdout and its stderr.

    The status is 127 when it cannot be run, and 124 when it did not end in time, as timeout(1) has it.
    """
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env) as process:
            try:
                said = process.communicate(timeout=timeout_s)
            except BaseException:  # subprocess.run of Python 3.6 waits for what a child of it may hold open
                process.kill()
                raise
    except OSError as error:
        return 127, "", str(error)
    except subprocess.TimeoutExpired:
        return 124, "", "no answer within %d s" % timeout_s
    return process.returncode, said[0].decode("utf-8", "replace"), said[1].decode("utf-8", "replace")


def boot_identity() -> str:
    """Return what tells this boot of this machine from others, and a container from its neighbours; empty for nothing.

    Some containers, Android and early WSL let nobody read the first (random(4)); the second is pid_namespaces(7).
    """
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        namespace = os.readlink("/proc/self/ns/pid")
        return boot.read().strip() + ("" if namespace == "pid:[4026531836]" else "/" + namespace[5:-1])
    return ""


def process_identity(pid: int) -> str:
    """Return what tells this process from a later one with the same pid: the boot, and when it was started.

    Empty when there is no such process; nothing behind the colon where /proc tells of others (`is_own_proc`).
    """
    if not is_own_proc():
        try:
            has_ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None  # and is a zombie
        except ChildProcessError:
            has_ended = not session_of(pid)
        return "" if has_ended else boot_identity() + ":"
    with contextlib.suppress(OSError), open("/proc/%d/stat" % pid, "rb") as process:
        fields = process.read().rpartition(b")")[2].split()
        # Fields 3 and 22 of proc(5): the state and the start time. A zombie has ended.
        return "" if fields[0] == b"Z" else "%s:%s" % (boot_identity(), fields[19].decode())
    if os.path.exists("/proc/self/stat"):
        return ""
    # macOS and the BSDs have no such /proc. Their times follow the locale and the time zone.
    argv = ["env", "LC_ALL=C", "TZ=UTC", "ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    state, _, start = run_command(argv, COMMAND_TIMEOUT_S)[1].strip().partition(" ")
    if not start or state.startswith("Z"):
        return ""
    return ":%d" % calendar.timegm(time.strptime(start.strip(), "%a %b %d %H:%M:%S %Y"))


def parents() -> "Dict[int, int]":
    """Return the parent of each process: from /proc (proc(5)), for a container may have no ps; else from ps."""
    found = {}
    if is_own_proc() and os.path.exists("/proc/self/stat"):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open("/proc/%s/stat" % pid, "rb") as process:
                found[int(pid)] = int(process.read().rpartition(b")")[2].split()[1])
        return found
    argv = ["ps", "-A", "-o", "pid=", "-o", "ppid="]  # POSIX: = ends its -o; busybox's has no -A, and needs none
    for line in run_command(argv, COMMAND_TIMEOUT_S)[1].splitlines():
        pair = line.split()
        if len(pair) == 2 and all(word.isdigit() for word in pair):
            found[int(pair[0])] = int(pair[1])
    return found


def is_own_proc() -> bool:
    """False where /proc tells of the processes outside of our pid namespace: bwrap --unshare-pid without --proc."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self") in (str(os.getpid()), "curproc")  # the latter is FreeBSD's
    return True  # there is none


def is_same_process(pid: int, identity: str) -> bool:
    """True when the process with this pid is the one that had this identity.

    A boot that could not be read, then or now, does not tell two apart. Where no start can be told, one that leads a
    session may be ours: so do those that we started.
    """
    now = process_identity(pid)
    (boot, _, start), (old_boot, _, old_start) = now.partition(":"), identity.partition(":")
    if not (start and old_start.isdecimal()):
        return bool(now) and identity == now and session_of(pid) == pid
    is_same_boot = not boot or not old_boot or boot.split("/")[0] == old_boot.split("/")[0]
    return is_same_boot and abs(int(start) - int(old_start)) <= START_ERROR


# Ticks of /proc or seconds of ps: procps and FreeBSD's kernel reckon a start from the time of the boot, which a clock
# that is set moves.
START_ERROR = 2


def has_exited(pid: int) -> bool:
    """True when a child of ours has. It reaps all others that have: we may be a container's first process."""
    ended = -1
    with contextlib.suppress(ChildProcessError):
        while ended not in (0, pid):
            ended, _ = os.waitpid(-1, os.WNOHANG)
    return ended != 0


def session_of(pid: int) -> int:
    """Return the session that process `pid` is in; 0 when there is no such process."""
    with contextlib.suppress(OSError, AttributeError):  # Windows has no sessions
        return os.getsid(pid)
    return 0


def command_of_process(pid: int) -> str:
    """Return the command line of a process; empty where it cannot be had."""
    with contextlib.suppress(OSError), open("/proc/%d/cmdline" % pid, "rb") as stream:
        return stream.read(4096).decode("utf-8", "replace")
    return run_command(["ps", "-o", "args=", "-p", str(pid)], COMMAND_TIMEOUT_S)[1]


def environment_of(pid: int) -> "Dict[str, str]":
    """Return the environment that a process of ours was started with (proc(5)); empty where that cannot be had."""
    entries = []  # type: List[str]
    with contextlib.suppress(OSError), open("/proc/%d/environ" % pid, "rb") as stream:
        if os.fstat(stream.fileno()).st_uid == own_uid():
            entries = os.fsdecode(stream.read()).split("\0")
    return {name: value for name, _, value in [entry.partition("=") for entry in entries] if name}


def own_uid() -> int:
    """Return our uid; 0 where there is none (Windows)."""
    return os.getuid() if hasattr(os, "getuid") else 0


# -- files ------------------------------------------------------------------------------------------------------------


def native(text: str) -> str:
    """Turn a name from a request into one for this system, whatever its locale; `portable` is the way back."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def portable(name: str) -> str:
    """Turn a file name of this system into text that survives JSON."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def own_tmp_dir() -> str:
    """Return the directory that is ours below /tmp, where no better one is to be had; private_dir makes it.

    Not TMPDIR: that is often long, and on a cluster it ends with the job. RJUPYTER_TMP says another place.
    """
    top = "/tmp" if os.name == "posix" else os.environ.get("TEMP", ".")
    return os.path.join(os.environ.get("RJUPYTER_TMP") or top, "rjupyter-%d" % own_uid())


def private_dir(path: str) -> str:
    """Make `path` a directory that is ours alone and can be written, and return it; raise OSError where it cannot.

    What others may have put there first, a link or a directory of theirs, is refused.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise PermissionError("%s is not a directory of ours" % path)
    if 0o1002 & ~status.st_mode == 0 or 0o2020 & ~status.st_mode == 0:  # as /tmp is, or a group's
        raise PermissionError("%s is shared with others" % path)
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)
        if hasattr(os, "getuid") and os.lstat(path).st_mode & 0o077:  # CIFS, WSL's drives: chmod(2) did nothing
            raise PermissionError("%s cannot be closed to others: its file system keeps no permissions" % path)
    probe = os.path.join(path, ".%d" % os.getpid())
    try:
        with open(probe, "wb") as stream:
            stream.write(bytes(4096))  # a full disk, or quota, still makes empty files
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(probe)
    return path


def remove_files(paths: "List[str]") -> None:
    """Remove files, as far as they are there."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def write_whole(path: str, text: str, mode: int = 0o600, beside: str = "") -> None:
    """Write a file in one piece: a reader sees the old one or the new one. By default its owner alone can read it.

    It is made `beside` its place first, PATH.PID where that is not said. Raises OSError or UnicodeEncodeError.
    """
    beside = beside or "%s.%d" % (path, os.getpid())
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        if mode != 0o600:
            os.chmod(beside, mode)
        os.replace(beside, path)
    except BaseException:  # a signal, a full disk
        remove_files([beside])
        raise


def packed(data: bytes) -> str:
    """Return data as one word, compressed, as it travels."""
    return binascii.b2a_base64(zlib.compress(data), newline=False).decode("ascii")


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it; raises OSError when not all could be written."""
    while data:
        data = data[os.write(descriptor, data) :]


def look_anew(directory: str) -> None:
    """List a directory: that lets NFS show what other machines have made in it since (nfs(5), "ac")."""
    with contextlib.suppress(OSError):
        os.listdir(directory)


def size_of(path: str) -> int:
    """Return how large a file is, in bytes; 0 for one that is not there."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return 0


def time_of(path: str) -> float:
    """Return when a file was written, by the clock of its file system; 0 for one that is not there."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0


def read_text(path: str, most: int = RUNTIME_FILE_MAX) -> str:
    """Return what is in a small file; empty when there is none."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        return stream.read(most)
    return ""


def read_json(path: str) -> "Json":
    """Read a small JSON object; empty when there is none, or when it is not an ordinary file of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if status.st_uid != own_uid() or status.st_size > RUNTIME_FILE_MAX or not stat.S_ISREG(status.st_mode):
                return {}
            found = json.loads(stream.read(RUNTIME_FILE_MAX).decode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_record(kind: "Type[R]", path: str) -> "Optional[R]":
    """Return the record in a small file of ours; None when there is none, or when it makes no sense."""
    facts = read_json(path)
    with contextlib.suppress(Wrong):
        return kind.read(facts) if facts else None
    return None


class Growing:
    """A file that grows, read from where we left off: bytes as they come, or the lines that are complete.

    A line of more than `most` bytes is taken for several.
    """

    def __init__(self, path: str, offset: int = 0, most: float = float("inf")) -> None:
        self.path = path
        self.offset = offset
        self._most = most

    def part(self) -> bytes:
        """Return the next bytes; none where there are none yet."""
        with contextlib.suppress(OSError), open(self.path, "rb") as stream:
            stream.seek(self.offset)
            part = stream.read(PART_BYTES)
            self.offset += len(part)
            return part
        return b""

    def lines(self, has_ended: bool = False) -> "Iterator[str]":
        """Yield the lines that are complete; of a file that has ended, the last one without a newline as well.

        They are of one file, also where another one takes its name meanwhile.
        """
        begun = bytearray()  # of a line, which may be longer than many parts
        with contextlib.suppress(OSError), open(self.path, "rb") as stream:
            stream.seek(self.offset)
            for part in iter(lambda: stream.read(PART_BYTES), b""):
                self.offset += len(part)
                *ends, rest = part.split(b"\n")
                for end in ends:
                    yield (begun + end).decode("utf-8", "replace").rstrip("\r\n")
                    begun.clear()
                begun += rest
                if len(begun) > self._most:
                    yield begun.decode("utf-8", "replace")
                    begun.clear()
        if not has_ended:
            self.offset -= len(begun)
        elif begun:
            yield begun.decode("utf-8", "replace").rstrip("\r\n")


def has_lock(lock: "Any") -> bool:
    """Take the lock on an open file, if nobody has it; OSError where files cannot be locked."""
    with contextlib.suppress(BlockingIOError, PermissionError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


# agent ends

# ---------------------------------------------------------------------------------------------------------------------
# messages
#
# Everything a person or a program reads passes here. stdout carries the result and nothing else; the steps, the spinner
# and the errors go to stderr. Text from the host is data: control characters are taken out before it reaches a
# terminal. What --json prints is one of EVENTS, with the keys that stand there.
# ---------------------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """A kind of object that --json prints: when it comes, and its keys. A value is null where there is no such fact."""

    when: str
    keys: Tuple[str, ...]


EVENTS = {
    "connected": Event("logged in", ("user", "node", "python", "home")),
    "installing": Event("no Jupyter there; it is being installed", ("path", "tool")),
    "installed": Event("it is there now", ("path", "seconds")),
    "launched": Event("a server was started", ("id", "pid", "port", "sock", "app", "root_dir")),
    "found": Event("a server ran already", ("id", "pid", "port", "sock", "app", "root_dir", "ignored")),
    "forwarding": Event("its port, or its socket, can be reached here", ("local_port", "port", "sock")),
    "open": Event("it answered through the tunnel", ("pid", "url", "local_port", "id")),
    "joined": Event("a tunnel of another copy is up; its `open` follows", ("tunnel_pid",)),
    "lost": Event("the connection is lost", ("why", "local_port")),
    "reconnected": Event("it is back", ("seconds", "local_port")),
    "silent": Event("Jupyter does not answer, although the connection works", ("id",)),
    "answering": Event("it answers again", ("id",)),
    "tunnel": Event(
        "a tunnel that is up here, without a host",
        ("destination", "path", "local_port", "id", "state", "is_background", "tunnel_pid", "age_s"),
    ),
    "closed": Event("a tunnel was closed", ("local_port", "tunnel_pid")),
    "stopped": Event("`stop` ended one of these", ("what", "id", "pid", "app", "root_dir", "name", "job", "wrap")),
    "server": Event("one line of `list`", tuple(ServerView.fields)),
    "run": Event("one execution in `list`", tuple(RunView.fields)),
    "job": Event("one job in `list`", tuple(name for name in StarterView.fields if name != "wrap")),
    "wrapper": Event("what starts in a wrapper, in `list`", ("id", "wrap", "action", "path", "age_s")),
    "queue": Event("how the job stands that we wait for", ("id", "job", "state", "reason", "start")),
    "ending": Event("the job's time is up soon", ("id", "left_s")),
    "started": Event("an execution was started", ("id",)),
    "overlap": Event("it runs already; this one was not started", ("id",)),
    "cell": Event("a cell has ended", ("id", "cell", "count", "seconds", "is_done")),
    "brought": Event("a file that a run wrote is here", ("path", "id")),
    "executed": Event("an execution has ended", ("path", "id", "outcome", "cells", "seconds")),
    "host": Event("one of several hosts in `list`; what it has follows", ("host", "is_reached", "why")),
    "kernel": Event("one line of `list --kernels`", tuple(KernelState.fields)),
    "ended": Event("`stop` ended a kernel", ("kernel", "notebook", "server")),
    "waited": Event("a kernel is idle, or dead", ("kernel", "notebook", "state", "count", "seconds", "is_done")),
    "line": Event("one line of `logs`", ("line",)),
    "input": Event("a cell that began, in `output`", ("notebook", "cell", "count", "code", "time")),
    "output": Event("what a cell printed", ("cell", "type", "content")),
    "finished": Event("a cell that ended", ("cell", "is_done", "time", "seconds", "connections")),
    "image": Event("`eval --save-images` wrote what is no text", ("type", "path")),
    "saved": Event("`output --save` has put outputs into a notebook", ("notebook", "cells")),
    "gap": Event("something is missing in `output`", ("why", "time")),
    "check": Event("one line of `doctor`", ("check", "is_ok", "says", "remedy")),
    "option": Event("one line of `config`", ("option", "value", "source")),
    "failure": Event("what the exit status means", ("what", "why", "try", "status")),
}


def printable(text: str) -> str:
    """Return `text` without what drives a terminal: control characters, but lines and tabs, and turns of direction."""
    if text.isprintable():
        return text
    driving = "\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    return re.sub("[%s]" % driving, "?", text.replace("\r\n", "\n"))


def command_line(*arguments: str) -> str:
    """Return a command of ours as a person would type it: as it was called, quoted for a shell.

    A file that is not on PATH needs its python in front of it, unless it is one that `python3` alone runs.
    """
    names = (sys.argv[0], sys.argv[0] + ".exe")  # whose name pip's launchers take away
    called = next(filter(os.path.isfile, names), os.path.abspath(__file__))
    program, python = as_typed(called), as_typed(sys.executable)
    runs_itself = os.path.dirname(called) and os.access(called, os.X_OK) and as_typed(sys.executable, "python3")
    words = [*([] if program != called or runs_itself == "python3" else [python]), program, *arguments]
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)


def as_typed(path: str, name: str = "") -> str:
    """Return a program as it is typed: by its bare name, or another one, where PATH leads to this very file with it."""
    name = name or os.path.basename(path)
    places = [os.path.join(directory, name) for directory in os.get_exec_path()]
    found = next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), "")
    return name if found and os.path.exists(path) and os.path.samefile(found, path) else path


def duration(seconds: Optional[float], units: int = 1) -> str:
    """Return a duration as people say it, in its largest unit or two: 2 h 3 min; empty for none."""
    if seconds is None or seconds < 0:
        return ""
    sizes = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    while seconds < sizes[0][1] and sizes[1:]:
        del sizes[0]
    text, rest = "%d %s" % (seconds // sizes[0][1], sizes[0][0]), seconds % sizes[0][1]
    return "%s %s" % (text, duration(rest)) if units > 1 and sizes[1:] and rest >= sizes[1][1] else text


def count_of(number: int, thing: str) -> str:
    """Return a number with the thing that it counts: 1 cell, 2 cells."""
    return "%d %s%s" % (number, thing, "" if number == 1 else "s")


BOLD, DIM, RED, GREEN = "1", "2", "31", "32"  # looks, as a terminal calls them (ECMA-48, "SGR")
# The steps on the way to what was asked for: they are dimmed.
PASSING = {"connected", "installing", "installed", "launched", "found", "forwarding", "started", "queue"}
# Of the terminals that make a link of what is marked as one (OSC 8), a variable that they set, or their TERM_PROGRAM.
LINKS = {"VTE_VERSION", "KITTY_WINDOW_ID", "WT_SESSION", "KONSOLE_VERSION", "iTerm.app", "vscode", "WezTerm", "ghostty"}
FRAMES = ("|/-\\", "\u280b\u2819\u2839\u2838\u283c\u2834\u2826\u2827\u2807\u280f")  # of the spinner


def has_no_reader(descriptor: int) -> bool:
    """Return whether nobody reads what is written there any more, before anything is written."""
    poll = select.poll()
    poll.register(descriptor, 0)  # for its errors, which are told in any case
    return any(word & (select.POLLERR | select.POLLHUP) for _, word in poll.poll(0))


class Messages:
    """The voice of the program: steps, details, results and failures, each in its place.

    `quiet` leaves failures and results; `verbose` adds details; `as_json` turns stdout into one object per line.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.as_json = as_json
        self.is_terminal = sys.stderr.isatty()
        self.has_spinner = self.is_terminal and os.environ.get("TERM") != "dumb" and not quiet
        self.has_looks = os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        self.home = ""  # on the host: what is in it is shown with a ~
        self.ends_with_reader = False
        self._lock = threading.RLock()
        self._transient = ""

    def step(self, text: str, event: str, **facts: Any) -> None:
        """Say that a step is done: one line on stderr, and with --json one object on stdout."""
        if text and not self.quiet:
            self.warn(text, look=DIM if event in PASSING else "")
        self.event(event, **facts)

    def result(self, text: str, event: str, look: str = "", **facts: Any) -> None:
        """Print what was asked for on stdout: the text, its first word with a look, or with --json one object."""
        if self.as_json:
            self.event(event, **facts)
        else:
            self.line(text, look=look)

    def line(self, text: str, end: str = "\n", look: str = "", is_file: bool = False) -> None:
        """Print a line of a result that programs read in another form, or not at all; a file as it is, in a file.

        Raises Failure where it is lost. A reader that has left wants no more of it; what only reads ends then.
        """
        try:
            if is_file and not sys.stdout.isatty():
                write_all(sys.stdout.fileno(), (text + end).encode())
            else:
                self._write(sys.stdout, text, end, look)
        except BrokenPipeError:
            if self.ends_with_reader:
                raise Terminated(13) from None  # SIGPIPE
        except OSError as error:
            raise Failure("cannot write to stdout: %s" % error.strerror) from None

    def check_reader(self) -> None:
        """End where what only reads has nobody to read it to: `| head -1` may have its line, and no more comes."""
        if self.ends_with_reader and os.name == "posix" and has_no_reader(sys.stdout.fileno()):
            raise Terminated(13)

    def event(self, event: str, **facts: Any) -> None:
        """Print one of EVENTS where a program reads us; a key that has no fact here is null."""
        keys = EVENTS[event].keys
        unknown = set(facts) - set(keys)
        if unknown:
            raise TypeError("the event %s has no %s" % (event, ", ".join(sorted(unknown))))
        if self.as_json:
            self.line(json.dumps(dict({"event": event}, **{key: facts.get(key) for key in keys})))

    def note(self, text: str) -> None:
        """Say something that the user should know and that is not a step."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str, end: str = "\n", look: str = "") -> None:
        """Say what must not be missed, also under -q; what is lost there must not stop us."""
        with contextlib.suppress(OSError):
            self._write(sys.stderr, text, end, look)

    def detail(self, text: str) -> None:
        """Say something that only -v asks for."""
        if self.verbose:
            self.warn(text)

    def end_line(self) -> None:
        """Leave the line on which the terminal showed ^C."""
        if self.is_terminal and not self.quiet:
            self.warn("")

    def failure(self, failure: Failure) -> None:
        """Print an error as what, why, try; long reasons are indented under their label."""
        text = "rjupyter: " + failure.what
        for label, words in (("why", failure.why), ("try", failure.try_)):
            lines = printable(words).splitlines()
            text += "".join("\n  %s%s" % ("     " if i else label + ": ", line) for i, line in enumerate(lines))
        self.warn(text, look=RED)
        with contextlib.suppress(Failure):  # of stdout, which may be the very one
            self.event("failure", **failure.facts())

    @contextlib.contextmanager
    def working(self, text: str, is_animated: bool = True) -> Iterator[Callable[..., None]]:
        """Show that a step runs, from its first second on: a spinner with the elapsed time, elsewhere one plain line.

        Yields a function that adds a word on where the step stands, or gives the step another name meanwhile. Without
        `is_animated` the terminal keeps still, because ssh may be asking a question there. Without a text, nothing is
        shown.
        """
        if not text:
            yield lambda words, name="": None
            return
        began = time.monotonic()
        done = threading.Lock()  # free when it is: a signal leaves it whole, but no Event
        done.acquire()
        step, stands = text, ""

        def tell(words: str, name: str = "") -> None:
            nonlocal step, stands
            step, stands = name or text, words

        def show() -> None:
            has_braille = (sys.stderr.encoding or "").lower() == "utf-8"
            delay_s = 0.0 if self.has_spinner and not is_animated else 1.0
            if done.acquire(timeout=delay_s) or self.quiet:
                return
            if not self.has_spinner:
                self.warn(step + "...")
            elif not is_animated:
                self._show_transient(step + "... ")
            while self.has_spinner and is_animated:
                frame = FRAMES[has_braille][int((time.monotonic() - began) * 5) % len(FRAMES[has_braille])]
                where = " (%s)" % stands if stands else ""
                self._show_transient("%s %s%s  %d s " % (frame, step, where, time.monotonic() - began))
                if done.acquire(timeout=0.2):
                    return

        ticker = threading.Thread(target=show, daemon=True)
        try:
            with signals_held(), contextlib.suppress(RuntimeError, MemoryError):  # no more threads: nothing is shown
                ticker.start()
            yield tell
        finally:
            done.release()
            if ticker.ident:
                ticker.join()
            self._show_transient("")

    def _show_transient(self, text: str) -> None:
        """Show a line that the next one takes away; or take it away."""
        with self._lock, contextlib.suppress(OSError):  # a terminal that is gone
            if text or self._transient:
                self._transient = text
                sys.stderr.write("\r\033[K" + printable(text).replace("\n", " ")[: max(20, terminal_width() - 1)])
                sys.stderr.flush()

    def _write(self, stream: TextIO, text: str, end: str, look: str) -> None:
        """Write text without control characters; where it has a look, that is of its first word, but for DIM."""
        text, rest = printable(text), ""
        if look and self.has_looks and stream.isatty():
            if look != DIM:
                text, _, rest = re.split("( |$)", text, maxsplit=1)
            if text.startswith("http") and {*os.environ, os.environ.get("TERM_PROGRAM")} & LINKS:
                text = "\033]8;;%s\033\\%s\033]8;;\033\\" % (text, text)
            text = "\033[%sm%s\033[0m%s" % (look, text, rest and " " + rest)
        with self._lock:
            self._show_transient("")
            stream.write(text + end)
            stream.flush()


def terminal_width() -> int:
    """Return the columns of the terminal that stderr is; 80 where it is none."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def has_terminal() -> bool:
    """True when someone could answer a question here: there is a controlling terminal."""
    if os.name != "posix":
        return sys.stdin.isatty()
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    return False


def can_ask() -> bool:
    """True when ssh can put a question to someone: on the terminal, or by the askpass program that the user chose."""
    return has_terminal() or bool(os.environ.get("SSH_ASKPASS"))


def ask_person(question: str) -> str:
    """Ask on the terminal, wherever stdin and stdout lead; return the answer."""
    names = ("/dev/tty", "/dev/tty") if os.name == "posix" else ("CONOUT$", "CONIN$")
    with open(names[0], "w") as output, open(names[1]) as terminal:
        output.write(printable(question))
        output.flush()
        return terminal.readline().strip()


def says_yes(question: str) -> bool:
    """Ask for a yes."""
    return ask_person(question).lower() in ("y", "yes")


# -- tables -----------------------------------------------------------------------------------------------------------


def from_home(path: str, home: str) -> str:
    """Return a path on the host as a person writes it there: ~/work."""
    return "~" + path[len(home) :] if home and (path + "/").startswith(home + "/") else path


def shortened(text: str) -> str:
    """Return a text as it fits into a column."""
    return text if len(text) <= 40 else text[:37] + "..."


def value_in_words(value: Any) -> str:
    """Return the value of an option as it is shown."""
    words = ["no", "yes"][value] if isinstance(value, bool) else value or "-"
    return " ".join(words) if isinstance(words, list) else str(words)


STARTED = {"open": "a server", "start_run": "a notebook"}  # what an action starts, for people
# What each table shows of a row, by the title of its column.
COLUMNS = {
    "server": {
        "ID": lambda server: server.id,
        "STATE": lambda server: server.state,
        "APP": lambda server: APPS[server.app].title if server.app in APPS else server.app and "?",
        "DIRECTORY": lambda server: server.root_dir,
        "NODE": lambda server: server.node if server.job else "",
        "JOB": lambda server: server.job,
        "INSIDE": lambda server: shortened(server.wrap),
        "PORT": lambda server: "socket" if server.sock else server.port or "-",
        "KERNELS": lambda s: (
            "-" if s.state != "live" else "%d (%d busy)" % (s.kernels, s.busy) if s.busy else s.kernels
        ),
        "ACTIVE": lambda server: duration(server.idle_s) + " ago" if duration(server.idle_s) else "-",
        "AGE": lambda server: "-" if server.id == "-" else duration(server.age_s),
        "": lambda server: server.manager or ("" if server.is_ours else "not started by rjupyter"),
    },
    "run": {
        "ID": lambda run: run.id,
        "STATE": lambda run: run.state,
        "CELL": lambda run: "%d/%d" % (run.cell, run.count),
        "NOTEBOOK": lambda run: run.name,
        "DIRECTORY": lambda run: run.root_dir,
        "NODE": lambda run: run.node if run.job else "",
        "JOB": lambda run: run.job,
        "INSIDE": lambda run: shortened(run.wrap),
        "SIZE": lambda run: "%.1f MB" % (run.size / 1e6) if run.size > 5e4 else "",
        "AGE": lambda run: duration(run.age_s),
    },
    "job": {
        "ID": lambda job: job.id,
        "JOB": lambda job: job.job,
        "STATE": lambda job: job.word.lower() + (" (%s)" % job.reason if job.is_waiting and job.reason else ""),
        "NODE": lambda job: job.node or "-",
        "LEFT": lambda job: duration(job.left_s) or "-",
        "FOR": lambda job: STARTED.get(job.action, "?"),
        "PATH": lambda job: job.path or "~",
        "AGE": lambda job: duration(job.age_s),
    },
    "wrapper": {
        "ID": lambda wrapper: wrapper.id,
        "STARTS INSIDE": lambda wrapper: shortened(wrapper.wrap),
        "FOR": lambda wrapper: STARTED.get(wrapper.action, "?"),
        "PATH": lambda wrapper: wrapper.path or "~",
        "AGE": lambda wrapper: duration(wrapper.age_s),
    },
    "kernel": {
        "KERNEL": lambda kernel: kernel.id[:8],
        "STATE": lambda kernel: kernel.state,
        "SINCE": lambda kernel: duration(kernel.idle_s) + " ago" if duration(kernel.idle_s) else "-",
        "NOTEBOOK": lambda kernel: kernel.notebook or "-",
        "PAGES": lambda kernel: kernel.connections,
        "MEMORY": lambda kernel: "-" if kernel.memory is None else "%.1f MB" % (kernel.memory / 1e6),
        "GPU": lambda kernel: "-" if kernel.gpu_memory is None else "%.1f MB" % (kernel.gpu_memory / 1e6),
        "PORTS": lambda kernel: " ".join(map(str, kernel.ports)),
        "SERVER": lambda kernel: kernel.server,
    },
    "tunnel": {
        "HOST": lambda row: row["destination"],
        "PATH": lambda row: "~" if row["path"] is None else row["path"],
        "STATE": lambda row: row["state"],
        "LOCAL PORT": lambda row: row["local_port"],
        "UP": lambda row: duration(row["age_s"]),
        "CLOSED BY": lambda row: "close" if row["is_background"] else "Ctrl-C (pid %d)" % row["tunnel_pid"],
    },
    "option": {
        "OPTION": lambda row: row["option"],
        "VALUE": lambda row: value_in_words(row["value"]),
        "FROM": lambda row: row["source"],
    },
}  # type: Dict[str, Dict[str, Callable[[Any], object]]]


def print_rows(event: str, rows: List[Any], messages: Messages, **more: "Callable[[Any], object]") -> None:
    """Print records, or rows, as a table with `more` columns before those of its kind; for a program, as events.

    The host's words are data, whatever they hold. A column that says nothing of any is left out.
    """
    if messages.as_json:
        for row in rows:
            facts = {key: getattr(row, key) for key in EVENTS[event].keys} if isinstance(row, Record) else row
            messages.event(event, **facts)
    if messages.as_json or not rows:
        return
    columns = {**more, **COLUMNS[event]}
    table = [[title, *(str(cell(row)).replace("\n", "?") for row in rows)] for title, cell in columns.items()]
    table = [[from_home(cell, messages.home) for cell in column] for column in table if any(column[1:])]
    widths = [max(len(printable(cell)) for cell in column) for column in table]
    for line in zip(*table):
        messages.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# ssh
#
# `Ssh` is the connection to one destination. Its way is one of two classes with the same methods: Mux, through the
# control socket of a master, ours or one that was there; or Direct, where each step logs in by itself. Every ssh argv
# is made here; nothing below this room names an ssh option. ssh itself keeps everything about connections: host keys,
# passwords, second factors, jump hosts, ~/.ssh/config.
# ---------------------------------------------------------------------------------------------------------------------

ASKING, MASTER, SESSION, TUNNEL = "ssh -G", "ssh -M -N", "ssh HOST COMMAND, and ssh -W", "ssh -N -L"

# All keywords of ssh_config(5) whose value in the user's config would change what a call *is*, with ours and the calls,
# apart from those that a flag says (-a, -x, -T, -N, -M, -S). The rest is the user's. An ssh that does not know one is
# given none of it.
KEYWORDS = [
    ("RemoteCommand", "none", (MASTER, SESSION, TUNNEL)),  # 7.6; "Cannot execute command-line and remote command"
    ("ControlPersist", "no", (MASTER, SESSION, TUNNEL)),
    ("ForkAfterAuthentication", "no", (MASTER, SESSION, TUNNEL)),  # 8.7; leaves us, logged in
    ("StdinNull", "no", (SESSION,)),  # 8.7; the agent never arrives
    # 8.7; none waits for ever, and subsystem takes our command for the name of one. Not beside -N: "Cannot specify -N".
    ("SessionType", "default", (SESSION,)),
    ("ControlMaster", "no", (SESSION, TUNNEL)),
    ("ClearAllForwardings", "yes", (MASTER, SESSION)),  # beside -L, it drops that -L in silence
    ("ClearAllForwardings", "no", (TUNNEL,)),
    ("PermitLocalCommand", "no", (SESSION,)),  # its output would stand in ours
    ("ExitOnForwardFailure", "no", (TUNNEL,)),  # with yes, a forward of the user's own that fails ends ours
    ("Tunnel", "no", (TUNNEL,)),
]

# One of several in a ProxyJump, as `ssh -G` says it: its user, its name and its port.
HOP = r"(?:ssh://)?(?:([^,]*)@)?\[?([^,]+?)\]?(?::(\d+))?/?(?:,|$)"


class NotConnected(Failure):
    """There is no connection, or it is lost: another attempt may have it."""


class LoginRefused(NotConnected):
    """The host wants a login that it did not get: a person may mend that."""


class HostRefused(NotConnected):
    """The host and ssh do not agree on who or what it is: another attempt ends alike."""


class Crowded(NotConnected):
    """The host turned a login away, as sshd does while too many are under way (MaxStartups)."""


class SessionRefused(Failure):
    """sshd opens no session: it allows none (MaxSessions), or not yet another one."""


class AgentEnded(Failure):
    """The agent did not come to its reply, although the connection stands."""


REMOVE_KEY = "ask the host's administrator whether the key is new; if so:\n{removal}"
ASK_FOR_KEY = "ask the host's administrator for its new key"
UNKNOWN_KEY = "the host key of {host} is not known here, and it was not accepted"
ACCEPT_KEY = "{ssh}   (once, in a terminal: it shows the key and asks)"
CHANGED_KEY = "the host key of {host} is not the one known here: a new installation, or someone in between"
ONE_KEY = "-o IdentitiesOnly=yes -i KEY   (or both for this host in ~/.ssh/config), so that ssh offers no other"
ALGORITHMS = "an update of the older side; or KexAlgorithms, HostKeyAlgorithms, Ciphers or MACs in ~/.ssh/config"
CROWDED = "{ssh}   (in a minute: sshd has too many logins, or shuts out an address after refused ones)"
SILENT = "{ssh}   (something listens there and says nothing: no sshd, or one that is overloaded)"
SIGN = "touch the key when its light blinks, or unlock its agent (ssh-add -l)"

# What explains the end of an ssh (the sources of OpenSSH 10.5; measured with 9.2): a pattern of what it says, which
# failure that is, what to try, and why, where the line does not say it. The first row that anything it said matches
# holds, so what tells more comes first. {host}, {ssh} (the plain ssh to it), {verbose} (the same with -v) and {removal}
# (of its key) stand in them.
ENDINGS: List[Tuple[str, Type[NotConnected], str, str]] = [
    (".*(HOST IDENTIFICATION HAS CHANGED|has changed and you have req)", HostRefused, REMOVE_KEY, CHANGED_KEY),
    (".*REVOKED HOST KEY", HostRefused, ASK_FOR_KEY, "the host key of {host} is revoked here (RevokedHostKeys)"),
    ("Host key verification failed", HostRefused, ACCEPT_KEY, UNKNOWN_KEY),
    ("(Received disconnect .*)?Too many auth", LoginRefused, ONE_KEY, ""),
    ("Received disconnect .*:1[34]: ", LoginRefused, "{ssh}", ""),
    ("Unable to negotiate", HostRefused, ALGORITHMS, ""),
    ("Protocol major versions differ", HostRefused, "{ssh}   (is this the port of its sshd?)", ""),
    ("(sign_and_send_pubkey: )?signing failed for", LoginRefused, SIGN, ""),
    ('Load key ".*": bad permissions', LoginRefused, "chmod 600, for the file of the key", ""),
    (r".*Permission denied \(|Authentication failed", LoginRefused, "{verbose}   (shows the keys offered)", ""),
    (".*account has expired", LoginRefused, "ask the host's administrator", ""),
    ("ssh: connect to .*refused", NotConnected, "{ssh}   (is sshd running there, and is this its port?)", ""),
    ("Connection timed out during banner", NotConnected, SILENT, ""),
    ("Too many logins", NotConnected, "end other sessions of yours there, or wait", ""),
    (r"channel \d+: open failed: ", NotConnected, "{ssh}   (a jump host did not get there)", ""),
    ("ssh: ", NotConnected, "{ssh}", ""),  # a jump host's own, before what follows from it
    ("kex_exchange_identification: (Connection closed|read: )", Crowded, CROWDED, ""),
]
# What only repeats that the connection has ended: the cause is the line before.
ECHOES = "kex_exchange_identification: (Connection closed|read: )|stdio forwarding|Disconnected from|"
ECHOES += "Connection (closed|reset|timed out|to .* (closed|timed out))"
# All that ssh says of its end: it is kept for our own error, which says it once. Everything else passes as it comes: a
# banner or the text of a second factor must be read before the prompt that follows.
FATAL_WORDS = "|".join(pattern for pattern, _, _, why in ENDINGS if not why)
FATAL_WORDS += "|ssh_|kex_|banner exchange|mux|unix_listener|bind |channel|Could not request|Host key|Bad "
FATAL_WORDS += "|client_loop|Timeout,|Received disconnect|" + ECHOES
# What ssh warns of in a login that goes on: never why one ended, and said once (OpenSSH 10.1 sshconnect.c).
WARNINGS = r"(\*\* )?WARNING: .*post-quantum|\*\* (This session may be|The server may need)|Warning: Permanently added"
# What a login says that waits for a person: an address to visit, a key to touch (OpenSSH sshconnect2.c).
WANTS_PERSON = "https?://|Confirm user presence"
LAST_WORDS_S = 0.5  # for what ssh has in hand for us when it ends, or is interrupted as we are
ASKING_S = 1.0  # a login that says nothing more for so long waits for someone


def cause_of(words: List[str]) -> str:
    """Return the line that tells why ssh ended: of its last words, the one before those that only echo the end."""
    lines = [line.strip() for line in words if line.strip() and not re.match(WARNINGS, line)]
    lines = lines or ["ssh ended without a message"]
    echoes = list(itertools.takewhile(lambda line: re.match(ECHOES, line), reversed(lines)))
    before = lines[: len(lines) - len(echoes)]
    is_told = before and re.match(FATAL_WORDS, before[-1]) and not before[-1].startswith("channel")
    return before[-1] if is_told or not echoes else echoes[-1]


@contextlib.contextmanager
def signals_left_to_us() -> Iterator[None]:
    """Start children under this: Ctrl-C and a closed terminal reach the whole group, but we end our children.

    They are born with these signals blocked. One that comes meanwhile, SIGTERM too, is raised at the end: no child is
    started and then forgotten.
    """
    with signals_held():
        if os.name != "posix":
            yield
            return
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def new_process(argv: List[str], **how: Any) -> "subprocess.Popen[bytes]":
    """Start a process; raises Failure where there is no room for one."""
    try:
        return subprocess.Popen(argv, **how)
    except (OSError, MemoryError) as error:
        raise Failure("cannot start " + argv[0], str(error)) from None


def start_thread(do: Callable[..., object], *arguments: Any) -> threading.Thread:
    """Start a thread that does not keep us from ending; raises Failure where there is no room for one."""
    thread = threading.Thread(target=do, args=arguments, daemon=True)
    with signals_held():
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            raise Failure("cannot start a thread", str(error)) from None
    return thread


class Child:
    """A child process whose output arrives line by line, in one queue, as ("stdout" or "stderr", text).

    What it prints has bounds, without which a host would fill our memory: a line is cut, at LINE_BYTES where it begins
    with `mark`; nobody reads ahead of us without end; of what is said beside a result, what is too much is dropped.

    When it `is_merged`, both streams are one, in the order in which the child wrote. Without `can_ask` it has neither
    a terminal nor an askpass program: BatchMode does not reach the ssh to a jump host, this does. With `is_shown` its
    stderr is a terminal of ours, for ssh says nowhere else that it waits for a touch (OpenSSH readpass.c).

    Make one under signals_held, and end it: one that a signal took from us is waited for by nobody.
    """

    def __init__(
        self, argv: List[str], stdin: Any = None, is_merged: bool = False, can_ask: bool = True, is_shown: bool = False
    ) -> None:
        self._lines: "queue.SimpleQueue[Optional[Tuple[str, str]]]" = queue.SimpleQueue()  # which a signal leaves whole
        self.last_lines: List[Tuple[str, str]] = []  # also one that a signal took from us
        self.mark = b""  # what a line begins with that is waited for
        self.read_at = 0.0  # when a part of such a line came last
        self._has_left = False  # nobody listens any more
        self._drops = is_merged
        self._open_streams = 0
        ours, theirs = -1, -1
        with signals_left_to_us():
            with contextlib.suppress(AttributeError, OSError):  # Windows; none left
                ours, theirs = os.openpty() if is_shown else (-1, -1)
            shown = theirs if theirs >= 0 else None
            try:
                self.process = new_process(
                    argv,
                    stdin=stdin or subprocess.DEVNULL,
                    stdout=shown if shown and is_merged else subprocess.PIPE,
                    stderr=shown or (subprocess.STDOUT if is_merged else subprocess.PIPE),
                    start_new_session=not can_ask,
                    env=None if can_ask else dict(os.environ, SSH_ASKPASS_REQUIRE="never", SSH_ASKPASS=""),
                )
            finally:
                if shown:
                    os.close(theirs)
            terminal = os.fdopen(ours, "rb", 0) if shown else None
            try:
                for name, stream in (("stdout", self.process.stdout), ("stderr", self.process.stderr or terminal)):
                    if stream is not None:
                        self._open_streams += 1
                        start_thread(self._read, name, stream, is_merged)
            except Failure:
                self.end()
                raise

    def _read(self, name: str, stream: Any, is_merged: bool) -> None:
        begun = bytearray()  # of a line, which may be longer than many parts
        with stream, contextlib.suppress(OSError):  # a terminal whose other end is closed
            while True:
                if begun and (is_merged or name == "stderr") and os.name == "posix":
                    if not select.select([stream], [], [], ASKING_S / 4)[0]:
                        self._put(name, begun)  # a banner may end without a newline, and what it asks for is awaited
                        begun.clear()
                data = os.read(stream.fileno(), 65536)
                if not data:
                    break
                *ends, rest = data.split(b"\n")
                for end in ends:
                    self._put(name, begun + end)
                    begun.clear()
                begun += rest
                is_message = bool(self.mark) and begun.startswith(self.mark)
                if is_message:
                    self.read_at = time.monotonic()
                if len(begun) > (LINE_BYTES if is_message else 65536):
                    self._put(name, begun)
                    begun.clear()
        if begun:
            self._put(name, begun)
        self._lines.put(None)

    def _put(self, name: str, said: bytearray) -> None:
        line = (name, said.decode("utf-8", "replace").rstrip("\r"))
        self.last_lines = [*self.last_lines[-9:], line]
        is_long = len(line[1]) > 2 * PART_BYTES
        while self._lines.qsize() > (0 if is_long else QUEUED_LINES) and not self._has_left:
            if self._drops:
                return
            time.sleep(POLL_S)
        self._lines.put(line)

    def next_line(self, timeout_s: float) -> Optional[Tuple[str, str]]:
        """Return the next line, or None when `timeout_s` passed or the last stream has ended."""
        deadline = time.monotonic() + timeout_s
        while self._open_streams:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if line is not None:
                return line
            self._open_streams -= 1
        return None

    def wake(self) -> None:
        """Let next_line return now, with an empty line; from any thread."""
        self._lines.put(("stdout", ""))

    def remaining_lines(self, timeout_s: float = 1.0) -> Iterator[Tuple[str, str]]:
        """Yield what is still to come, until every stream ended or `timeout_s` passed."""
        deadline = time.monotonic() + timeout_s
        while self._open_streams and time.monotonic() < deadline:
            line = self.next_line(deadline - time.monotonic())
            if line:
                yield line

    @property
    def has_ended(self) -> bool:
        """True when the process is gone or has closed all its output."""
        with signals_held():
            return self._open_streams == 0 or self.process.poll() is not None

    def send(self, data: bytes) -> None:
        """Give the child its stdin; a child that is gone shows in its status, not here.

        A thread does: a pipe holds 64 KiB, and ssh takes nothing from it while a login waits for someone.
        """

        def write(stdin: Any) -> None:
            with contextlib.suppress(OSError), stdin:
                stdin.write(data)

        start_thread(write, self.process.stdin)

    def end(self) -> None:
        """Terminate the child and reap it; kill it when it does not go within two seconds."""
        self._has_left = True
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Ssh:
    """The connection to one destination: logs in, once; lets commands and forwards through; tells why it ended.

    `options` are the user's own, passed on as they are. `can_ask` is False where nobody could answer a question. Where
    it may not be multiplexed, each step logs in by itself.
    """

    def __init__(self, destination: str, options: List[str], can_ask: bool, messages: Messages, is_mux: bool) -> None:
        self.destination = destination
        self.options = options
        self.can_ask = can_ask
        self.messages = messages
        self.is_mux = is_mux
        self.masters = list(MASTERS)  # where there may be one to go through
        self.jump: List[str] = []  # the ssh that is the way there, where we made it
        self.before: Optional[Ssh] = None  # the master of ours that it goes through: made again, it has the same socket
        self.way: "Union[Mux, Direct]" = Direct(self)
        self.process: Optional[Child] = None  # the ssh that is the connection, as far as it is ours
        self._guard: "Optional[subprocess.Popen[bytes]]" = None
        self._is_again = False  # the connection was lost
        self._is_alone = False  # it goes through nobody else's master
        self.unknown: List[str] = []  # keywords that this ssh does not know, in lower case
        self.config_text = ""  # what `ssh -G` says of the destination
        self.config: Dict[str, str] = {}  # the same by keyword, in lower case
        self.further: List[str] = []  # forwards beside the one to Jupyter, as -L writes them
        self.meanwhile: Callable[[], object] = lambda: None  # what there is to do while ssh logs in
        self.words: List[str] = []  # what the connection's process said last
        self.asked: List[str] = []  # what a login showed that waits for a person
        self.greeting: List[str] = []  # what was said with an address in it, and the login went through
        self._shown: List[str] = []
        self._warned: List[str] = []
        self._heard_at = 0.0
        self._is_woken = False
        self._again_at = float("-inf")  # when it was last connected again
        self._delay_s = 0.0  # before the next attempt
        self.until_s = float("inf")  # when what goes through it is waited for no more (monotonic)

    # -- argv ---------------------------------------------------------------------------------------------------------

    def argv(self, call: str, *specific: str, command: str = "") -> List[str]:
        """Return an argv of ssh to this destination: what is specific to the call first, because the first value holds.

        `call` is its kind in KEYWORDS; to ask, all of them are given, for an ssh that refuses one says so then. A -J of
        the user's would go against a ProxyCommand of ours.
        """
        has_way = any(word.startswith("ProxyCommand=") for word in specific)
        rows = [row for row in KEYWORDS if call in (*row[2], ASKING) and row[0].lower() not in self.unknown]
        # No agent and no X11 on the way to a shared host, and no terminal there.
        argv = ["ssh", *specific, "-a", "-x", "-T", *each("-o", ("%s=%s" % row[:2] for row in rows))]
        argv += [word for pair in pairs_of(self.options) if not (has_way and pair[0] == "-J") for word in pair]
        return argv + ["--", self.destination] + ([command] if command else [])

    def lasting(self) -> List[str]:
        """Return the options without which ssh ends what is quiet: where the user's config has it so (OpenSSH 9.6)."""
        return each("-o", ["ChannelTimeout=none"]) if self.config.get("channeltimeout", "none") != "none" else []

    def patience(self) -> List[str]:
        """Return the options for a login: to notice a dead link, unless the user's config does; and to ask nobody.

        Below INFO, ssh keeps to itself what a host asks for as it lets one in (a banner), and why a link ended. In
        BatchMode it does not say that it waits for a touch: where someone may see it, it gets no answers.
        """
        argv = self.lasting()
        if self.config.get("loglevel", "").upper() in ("QUIET", "FATAL", "ERROR"):
            argv += each("-o", ["LogLevel=INFO"])
        if self.config.get("serveraliveinterval", "0") == "0":
            argv += each("-o", ["ServerAliveInterval=15", "ServerAliveCountMax=3"])
        if self.config.get("connecttimeout", "0") in ("none", "0"):
            is_behind = {"proxyjump", "proxycommand"} & set(self.config)  # a person may have to log in there first
            limit_s = BATCH_LOGIN_TIMEOUT_S if is_behind and self.can_ask else CONNECT_TIMEOUT_S
            limit_s *= 1 if self.can_ask or "proxycommand" not in self.config else 4  # which may start the host
            argv += each("-o", ["ConnectTimeout=%d" % limit_s])
        if self.can_ask:
            return argv
        silent = each("-o", ["NumberOfPasswordPrompts=0" if has_terminal() else "BatchMode=yes"])
        files = [word for pair in pairs_of(self.options) if pair[0] == "-F" for word in pair]
        hops = self.config.get("proxyjump", "none") if os.name == "posix" else "none"
        # Else each hop would be offered an empty password, three times.
        jump = ["-o", "ProxyCommand=" + shlex.join([*self.jump[:1], *silent, *self.jump[1:]])] if self.jump else []
        for user, host, port in [] if hops == "none" else re.findall(HOP, hops):  # ssh:// takes no brackets, and one @
            before = [word.replace("%", "%%") for word in jump]
            login = [*(["-l", user] if user else []), *(["-p", port] if port else [])]
            words = ["ssh", *files, *silent, *before, *login, "-W", "[%h]:%p", "--", host]
            jump = ["-o", "ProxyCommand=" + shlex.join(words)]
        return argv + silent + jump

    # -- the connection -----------------------------------------------------------------------------------------------

    def connect(self, is_again: bool = False) -> None:
        """Log in, once, where that can be: through a master that is there, or a new one. Silent when it `is_again`.

        Raises Failure (255) when ssh gives up. Where there can be no master, each later step logs in by itself.
        """
        self._read_config()
        self._is_woken = False
        self._is_again = is_again
        for find in self.masters if self.is_mux and not self._is_alone else []:
            path = find(self)
            if path:
                self.way = Mux(self, path)
                return
        if self.is_mux:
            self._start_master()

    def _start_master(self) -> None:
        """Start a master in the foreground, the process that Ctrl-C ends, and wait until its control socket appears."""
        try:
            directory = private_runtime_dir()
            own = "%x%s.ctl" % (os.getpid(), "n" if self.before else "")  # beside that of the one before
            for name in os.listdir(directory):  # of runs that are gone: its name is the pid, which may be ours again
                match = re.fullmatch(r"([0-9a-f]{1,8})n?\.ctl", name)
                if match and (name == own or not process_identity(int(match.group(1), 16))):
                    remove_files([os.path.join(directory, name)])
            self.way = way = Mux(self, os.path.join(directory, own))
            doing = "Connecting to " + self.destination
            # The socket appears in one piece, when it has logged in.
            argv = self.argv(MASTER, "-M", "-N", "-S", way.control_path, *self.patience())
            self.dial(argv, doing, lambda line: not line and os.path.exists(way.control_path))
            self.end_login()
            return
        except NotConnected:
            # It had logged in, and could not listen (no Unix sockets there, or as on Windows none at all).
            words = [line for line in self.words if line.startswith(("unix_listener", "muxserver_listen"))]
            if not words:
                raise
            why = words[-1]
        except Failure as failure:
            if self._is_again:
                raise
            why = "%s: %s" % (failure.what, failure.why)
        self.close()
        self.messages.note("No multiplexing (%s): each step logs in by itself." % why)
        self.is_mux = False

    def dial(self, argv: List[str], doing: str, is_ready: Callable[[str], bool]) -> None:
        """Start the process that is the connection, and wait until it is ready; `is_ready` sees each line it prints.

        Raises Failure (255) when it ends before. One that is turned away because others log in is tried again.
        """
        for tries in itertools.count(1):
            try:
                self._dial(argv, doing, is_ready)
                break
            except Crowded:
                self.hang_up()
                if not self.has_paused(tries):
                    raise

    def has_paused(self, tries: int) -> bool:
        """Wait a while after so many logins that were turned away; False when that was enough of them."""
        if tries >= CROWDED_TRIES or self._is_again:  # a redial has pauses of its own
            return False
        if tries == 1:
            self.messages.note("%s turns logins away, perhaps for too many at once. Trying again." % self.destination)
        pause_s = 2 ** (tries - 1) * (1 + os.urandom(1)[0] / 256)  # not at the same moment as others
        time.sleep(pause_s)
        return True

    def _dial(self, argv: List[str], doing: str, is_ready: Callable[[str], bool]) -> None:
        self.log_argv(argv)
        self.begin_login()
        with signals_left_to_us():
            # Our own end by kill -9 must end ssh too. The guard knows ssh's pid before ssh is ssh, for a shell tells it
            # and becomes ssh then: there is no moment without. CONT, because a stopped ssh does not take TERM.
            stdin = self.start_guard('read pid; read _; kill "$pid"; kill -CONT "$pid"')
            if stdin:
                argv = ["/bin/sh", "-c", 'echo $$ >&0; exec "$@" </dev/null', "sh", *argv]
            self.process = Child(argv, stdin, is_merged=True, can_ask=self.can_ask, is_shown=has_terminal())
        self.meanwhile()
        deadline = None if self.can_ask else time.monotonic() + BATCH_LOGIN_TIMEOUT_S
        with self.messages.working("" if self._is_again else doing, is_animated=not self.can_ask):
            while True:
                line = self.process.next_line(0.01)
                if is_ready(line[1] if line else ""):
                    return
                self.hear_login(line, is_first=not self._is_again)
                if self.process.has_ended:
                    for last in self.process.remaining_lines():
                        self.hear_login(last, is_first=not self._is_again)
                    raise self.connect_failure(self.words)
                if deadline and time.monotonic() > deadline:
                    raise self.no_login()

    def start_guard(self, script: str, *arguments: str) -> Any:
        """Start a shell that runs `script` when this program is gone, however it went (kill -9 as well).

        It waits on a pipe whose other end only we hold, which is returned.
        """
        if os.name != "posix":
            return None
        argv = ["/bin/sh", "-c", "exec 2>/dev/null; " + script, "sh", *arguments]
        self._end_guard()
        with signals_left_to_us():
            quiet = subprocess.DEVNULL
            self._guard = new_process(argv, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        return self._guard.stdin

    def _end_guard(self) -> None:
        if self._guard is not None:
            with self._guard:  # closes its pipe as well
                self._guard.kill()
            self._guard = None

    def reconnect(
        self,
        why: str,
        resume: Callable[[], bool],
        port: "Optional[LocalPort]" = None,
        ask_before: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect again, at once and then after growing delays, until `resume` says that all goes on.

        Nobody is asked: only when ssh says that it needs a login, and there is a terminal, one line offers it. While
        somebody else has the `port`, nobody logs in. `ask_before` asks what is known where this one goes through.
        Raises the Failure that ends it: the server has ended (4), the host's key is another one, or nobody is let in
        (255).
        """
        local_port = port.number if port else None
        text = "The connection to %s is lost (%s). Trying again." % (self.destination, why)
        self.messages.step(text, "lost", why=why, local_port=local_port)
        began = time.monotonic()
        could_ask = self.can_ask
        try:
            self._redial(resume, port, ask_before)
        finally:
            self.can_ask = could_ask
            self._is_again = self._is_alone = False
        seconds = time.monotonic() - began
        text = "Connected to %s again (after %s)." % (self.destination, duration(seconds))
        self.messages.step(text, "reconnected", seconds=seconds, local_port=local_port)

    def _redial(self, resume: Callable[[], bool], port: "Optional[LocalPort]", ask_before: Callable[[], None]) -> None:
        self._shown.clear()
        self.can_ask = False
        denials = 0
        told: List[str] = []  # of what is no matter of the connection, and a person may mend
        if time.monotonic() - self._again_at > PROBE_EVERY_S:  # else it goes on where it was
            self._delay_s = 0.0
        while True:
            try:
                is_shown = self.messages.has_spinner and not self.can_ask  # else ssh asks there
                with self.messages.working("Trying to reach " + self.destination if is_shown else ""):
                    self.close()
                    if port:
                        port.hold()
                    pause_s = self._delay_s
                    time.sleep(pause_s)
                    self._delay_s = min(REDIAL_MAX_S, max(0.25, 2 * pause_s))
                    if port and not port.hold():
                        raise port.taken()
                    if self.before:
                        self.before.can_ask = self.can_ask
                        self.before.connect(is_again=True)
                        ask_before()  # an end may have taken the node along, or our login there
                    self.connect(is_again=True)
                    if resume():
                        self._again_at = time.monotonic()
                        return
            except Failure as failure:
                if failure.status == EXIT_SERVER_ENDED or isinstance(failure, HostRefused):
                    raise
                self._is_alone = isinstance(self.way, Mux) and not self.process  # by turns, for that may be stuck
                text = "%s: %s" % (failure.what, failure.why.replace("\n", "; "))
                is_news = not isinstance(failure, NotConnected) and text not in told
                told += [text] if is_news else []
                (self.messages.note if is_news else self.messages.detail)("Not yet: " + text)
                is_denied = isinstance(failure, LoginRefused)
                denials += is_denied
                self._delay_s = max(self._delay_s, DENIED_PAUSE_S * is_denied)  # it may pass: a keyring that is locked
                if is_denied and (denials >= DENIALS_MAX or self.can_ask):
                    raise
                if time.monotonic() > self.until_s:
                    raise Failure(failure.what, failure.why, "", EXIT_TIMEOUT) from None
                self.can_ask = is_denied and has_terminal()  # the next attempt may ask, once
                if self.can_ask:
                    ask_person("%s needs a new login. Press Enter to log in: " % self.destination)
                    self._shown.clear()
                    self._delay_s = 0.0

    def version(self) -> str:
        """Return what ssh calls itself; raises Failure when there is none."""
        status, _, words = run_command(["ssh", "-V"], CONTROL_TIMEOUT_S)
        if status:
            raise Failure("no ssh on this machine", words.strip(), "install OpenSSH's client")
        return words.strip()

    def _read_config(self) -> None:
        limit_s = BATCH_LOGIN_TIMEOUT_S if self.can_ask else CONTROL_TIMEOUT_S  # a Match exec may open a page
        status, said, words = run_command(self.argv(ASKING, "-G"), limit_s)
        if status == 127 and "No such file" not in words and os.name == "posix":
            raise Failure("cannot start ssh", words)  # there is no room for it
        if status == 127:
            raise Failure("no ssh on this machine", "there is no `ssh` on PATH", "install OpenSSH's client")
        refused = re.search(r"command-line.*bad configuration option: (\w+)", words.lower())
        ours = {name.lower() for name, _, _ in KEYWORDS}
        if refused and refused.group(1) in ours - set(self.unknown):
            self.unknown.append(refused.group(1))  # an older ssh: no such keyword, and nothing to turn off
            self._read_config()
            return
        if status:
            plain = shlex.join(["ssh", "-G", *self.options, self.destination])
            is_slow = status == 124  # that Match exec, or a name server that is away
            kind = Failure if self.config or is_slow else HostRefused  # what it took before, it takes again
            raise kind("ssh does not take this", words.strip(), plain, EXIT_SSH)
        self.config_text = said
        self.config = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)

    def close(self) -> None:
        """End the connection, and with it every forward; a master that was not ours stays."""
        for spec in [] if self.process else sorted(self.way.forwards):
            self.way.cancel(spec)
        self.hang_up()
        if self.before:  # it may be as dead; without its socket the jump logs in
            self.before.close()
        self.way = Direct(self)

    def hang_up(self) -> None:
        """End the process that is the connection."""
        if self.process is not None:
            self.process.end()
            remove_files([self.way.control_path])  # if it was killed
            self.process = None
        self._end_guard()  # to the last: a second Ctrl-C may come while ours is ended

    # -- what ssh says ------------------------------------------------------------------------------------------------

    def take_words(self, line: Optional[Tuple[str, str]]) -> None:
        """Keep what the connection's ssh says of its end, for our own errors; of a greeting, some may come late."""
        if line and line[1]:
            if re.match(FATAL_WORDS, line[1]):
                self.words = (self.words + [line[1]])[-30:]
            elif "://" in line[1]:
                self.greeting = (self.greeting + [line[1]])[-30:]
            self.messages.detail("ssh: " + line[1])

    def hear_login(self, line: Optional[Tuple[str, str]], is_first: bool = True) -> None:
        """Keep what ssh says while it logs in, and show what is for a person: all but its last words.

        While nobody is to be asked, that is what the login wants of a person, once, when nothing more comes: it waits.
        A greeting of the host's may have an address in it, too: one that a login went through with is no question.
        """
        text = line[1] if line else ""
        if text:
            self._heard_at = time.monotonic()
            self.words = (self.words + [text])[-30:]
            if re.match(FATAL_WORDS, text) or text in self._warned:
                self.messages.detail("ssh: " + text)
            elif is_first or self.can_ask:
                is_question = self.can_ask and re.search(WANTS_PERSON, text)
                (self.messages.warn if is_question else self.messages.note)(text)
                self._warned += [text] if re.match(WARNINGS, text) else []
        elif self.words and not (is_first or self.can_ask) and time.monotonic() - self._heard_at > ASKING_S:
            for word in self.words:
                if re.match(FATAL_WORDS + "|" + WARNINGS, word) or not re.search(WANTS_PERSON, word):
                    continue
                if word not in self._shown:
                    self.messages.warn(word)
                    self._shown.append(word)
                if word not in self.greeting + self.asked:
                    self.asked.append(word)

    def begin_login(self) -> None:
        """Forget what the login before said, which did not go through, or an end of what is over."""
        self.words, self.asked = [], []

    def end_login(self) -> None:
        """Forget what the login said, for it is through: with an address in it, it was a greeting."""
        self.greeting = [word for word in self.words if "://" in word] or self.greeting
        self.begin_login()

    def connect_failure(self, words: List[str]) -> NotConnected:
        """Turn the last words of an ssh that did not log in into a failure (255) with a cause and a remedy."""
        host = self.destination.rsplit("@", 1)[-1]
        removal = [line.strip() for line in words if line.startswith("  ssh-keygen")]  # as Debian's ssh says it
        known = (re.findall(r"ost key for (\S+) has changed", "\n".join(words)) or [host])[0]
        facts = {
            "host": host + (", or of a jump host before it," if self.config.get("proxyjump", "none") != "none" else ""),
            "ssh": self.typed("true"),
            "verbose": "ssh -v" + self.typed("true")[len("ssh") :],
            "removal": (removal or [shlex.join(["ssh-keygen", "-R", known])])[0],
        }
        cause = cause_of(words)
        what = "cannot connect to " + self.destination
        if self.asked:
            try_ = self.typed() + "   (in a terminal, where someone can do that)"
            return LoginRefused(what, "\n".join([*self.asked, cause]), try_, EXIT_SSH)
        told = ((*row[1:], line) for row in ENDINGS for line in words if re.match(row[0], line))
        kind, try_, why, line = next(told, (NotConnected, "{ssh}", "", cause))
        is_at_start = any(re.match("kex_exchange_id|banner exchange", said) for said in words)
        if is_at_start and self.config.get("proxycommand", "none") != "none":
            try_ = "{ssh}   (does its ProxyCommand work?)"
            own = [said for said in words if said.strip() and not re.match(FATAL_WORDS + "|" + WARNINGS, said)]
            if own:
                return NotConnected(what, "\n".join(own[-LOG_LINES:]), try_.format(**facts), EXIT_SSH)
        why = why.format(**facts) or (cause if re.match(ECHOES, line) else line.strip())
        try_ = try_.format(**facts)
        if "Permission denied (" in line and kind is LoginRefused and not self.can_ask:
            why += "\nthere is no terminal here to ask for a password or a second factor"
            try_ = "a key without a question: ssh-keygen, ssh-copy-id, ssh-agent"
        return kind(what, why, try_, EXIT_SSH)

    def no_login(self) -> NotConnected:
        """Return the failure of a login that took too long: for want of a person, when it asked for one."""
        why = "no login within %d s" % BATCH_LOGIN_TIMEOUT_S
        if self.asked:
            return self.connect_failure([why])
        return NotConnected("cannot connect to " + self.destination, why, self.typed("true"), EXIT_TIMEOUT)

    def lost(self, words: Sequence[str] = ()) -> NotConnected:
        """Return the failure of a connection that ended under us; of one session's, with its last words."""
        why = cause_of(list(words) or self.words)
        return NotConnected("the connection to %s ended" % self.destination, why, "", EXIT_SSH)

    def typed(self, *words: str) -> str:
        """Return the ssh that a person types to get there: `true` shows whether it does."""
        return shlex.join(["ssh", *self.options, self.destination, *words])

    # -- what goes through it -----------------------------------------------------------------------------------------

    def session(self, command: str) -> Child:
        """Run `command` on the host."""
        argv = self.way.session_argv(command=command)
        self.log_argv(argv)
        is_shown = not self.way.has_login and has_terminal()
        return Child(argv, stdin=subprocess.PIPE, can_ask=self.can_ask, is_shown=is_shown)

    def forward(self, local_port: int, target: str) -> Tuple[bool, str]:
        """Forward 127.0.0.1:`local_port` to `target`; return whether it listens, and ssh's words when it does not.

        The numeric 127.0.0.1 in front: without it, ssh takes ::1 alone when 127.0.0.1:PORT is a stranger's, and says
        that all is well. Raises Failure when a further forward cannot be had, or (255) without a login.
        """
        failed, words = self.way.forward(["127.0.0.1:%d:%s" % (local_port, target), *self.further])
        if failed not in self.further:
            return not failed, words
        if not self._is_again:
            raise Failure("cannot forward " + failed, words, "another port in -L")
        self.further = [spec for spec in self.further if spec != failed]
        self.messages.note("Not forwarded any more: %s (%s)" % (failed, words))
        return self.forward(local_port, target)

    def can_reach(self, target: str) -> Tuple[bool, str]:
        """Ask sshd for one connection to `target` (host:port) there; return whether it came, and ssh's words.

        `-O forward` returns 0 although sshd forbids forwarding; `-W` fails at once (measured, OpenSSH 9.2).
        """
        self.words = []
        limit_s = CONTROL_TIMEOUT_S if self.way.has_login else BATCH_LOGIN_TIMEOUT_S
        can_reach, words = self.call(self.way.session_argv("-W", target, "-o", "LogLevel=INFO"), limit_s)
        if not can_reach and self.process is not None:
            self.wait(0.2)  # the reason is told to the master, not to the session
            words = next((line for line in reversed(self.words) if "open failed" in line), words)
        return can_reach, words

    def is_alive(self) -> bool:
        """True where sshd answers through the connection, whatever: it does so without the host's home.

        It is asked for a port that nobody has: a Jupyter that hangs takes a connection, and does not end it.
        """
        came, words = self.can_reach("127.0.0.1:1") if self.way.has_login else (False, "")
        return came or "open failed" in words or "open refused" in words  # the latter by a master that is not ours

    def wait(self, timeout_s: float) -> bool:
        """Wait for `timeout_s`, less when the connection ends or `wake` is called; return whether it still stands."""
        deadline = time.monotonic() + timeout_s
        process = self.process
        while self.stands and not self._is_woken and time.monotonic() < deadline:
            if process is not None:
                self.take_words(process.next_line(deadline - time.monotonic()))
            else:
                until(lambda: self._is_woken or not self.stands, deadline - time.monotonic(), slowest_s=0.1)
        self._is_woken = False
        stands = self.stands
        if process is not None and not stands:
            for line in process.remaining_lines():  # it says why as it ends
                self.take_words(line)
        return stands

    @property
    def stands(self) -> bool:
        """True while the connection stands, as far as can be seen without asking."""
        if self.process is not None:
            return not self.process.has_ended
        return not isinstance(self.way, Mux) or self.way.made_at == time_of(self.way.control_path) > 0

    def wake(self) -> None:
        """Let `wait` return now, or soon; from any thread."""
        self._is_woken = True
        if self.process is not None:
            self.process.wake()

    def call(self, argv: List[str], limit_s: float = CONTROL_TIMEOUT_S) -> Tuple[bool, str]:
        """Run an ssh that takes no time, but for a login; return whether it succeeded, and what it printed."""
        self.log_argv(argv)
        child = None
        try:
            with signals_held():
                child = Child(argv, is_merged=True, can_ask=self.can_ask)
            words: List[str] = []
            for _, text in child.remaining_lines(limit_s):
                words = [*words[-99:], text]
            if not child.has_ended:
                return False, "no answer from ssh within %d s" % limit_s
            return child.process.wait(CONTROL_TIMEOUT_S) == 0, "\n".join(words).strip()
        finally:
            if child:
                child.end()

    def log_argv(self, argv: List[str]) -> None:
        """Show a command where -v asks for it."""
        if self.messages.verbose:
            self.messages.detail("+ " + shlex.join(argv))


class Direct:
    """A way without a master: each step logs in by itself, and the tunnel is `ssh -N -L` literally."""

    has_login = False  # true when connect() has logged in, and nothing after it asks for more
    control_path = ""
    forwards: Set[str] = set()

    def __init__(self, ssh: Ssh) -> None:
        self.ssh = ssh

    def session_argv(self, *specific: str, command: str = "") -> List[str]:
        """Return the argv of a session, which logs in."""
        return self.ssh.argv(SESSION, "-S", "none", *specific, *self.ssh.patience(), command=command)

    def forward(self, specs: List[str]) -> Tuple[str, str]:
        """Start the tunnel; return which one cannot be had, and why. Raises Failure (255) when it cannot log in.

        LocalCommand runs when the forwards are set up (OpenSSH ssh.c). A banner without a newline may precede its word.
        """
        ready = "rjupyter-" + os.urandom(8).hex()
        told = each("-o", ["PermitLocalCommand=yes", "LocalCommand=echo " + ready])
        argv = ["-N", *each("-L", specs), "-S", "none", *self.ssh.patience(), *told]
        self.ssh.dial(self.ssh.argv(TUNNEL, *argv), "Opening the tunnel", lambda line: line.endswith(ready))
        words = "\n".join(self.ssh.words)
        self.ssh.end_login()
        for spec in specs:
            if "cannot listen to port: %s" % spec.split(":")[1] in words:
                self.ssh.hang_up()
                return spec, words
        return "", ""

    def cancel(self, spec: str) -> None:
        """End the tunnel: it holds nothing else."""
        self.ssh.hang_up()

    def is_lost(self, status: int, words: List[str]) -> bool:
        """True when a session ended with its connection, or had none, and not for a reason of its own."""
        return status == EXIT_SSH and any(re.match(FATAL_WORDS, line) for line in words)


class Mux:
    """A way through the control socket of a master: ours, `ssh -M -N`, or one that was there before us and stays."""

    has_login = True

    def __init__(self, ssh: Ssh, control_path: str) -> None:
        self.ssh = ssh
        self.control_path = control_path
        self.made_at = time_of(control_path)  # the socket of a master that was there before us
        self.forwards: Set[str] = set()

    def session_argv(self, *specific: str, command: str = "") -> List[str]:
        """Return the argv of a session through the master.

        When the master refuses the session, ssh would quietly log in again: ProxyCommand=false leaves it no way.
        """
        through = ["-S", self.control_path, *specific, *each("-o", ["ProxyCommand=false", "BatchMode=yes"])]
        return self.ssh.argv(SESSION, *through, *self.ssh.lasting(), command=command)

    def control_argv(self, action: str, *specific: str) -> List[str]:
        """Return the argv of an `ssh -O`; without the user's config, whose forwards -O would send or cancel as well."""
        argv = ["ssh", "-F", "/dev/null", "-S", self.control_path, "-O", action]
        return argv + list(specific) + ["--", self.ssh.destination]

    def forward(self, specs: List[str]) -> Tuple[str, str]:
        """Add forwards to the master, which loses them when we are gone, however; return which one failed, and why."""
        for spec in specs:
            self.forwards.add(spec)
            is_open, words = self.ssh.call(self.control_argv("forward", *each("-L", [spec])))
            if not is_open:
                self.forwards.remove(spec)
                return spec, words
        if self.ssh.process is None:
            self.ssh.start_guard('read _; "$@"', *self.control_argv("cancel", *each("-L", specs)))
        return "", ""

    def cancel(self, spec: str) -> None:
        """Take a forward away from the master."""
        self.forwards.discard(spec)
        self.ssh.call(self.control_argv("cancel", *each("-L", [spec])))

    def is_lost(self, status: int, words: List[str]) -> bool:
        """True when a session ended with the connection, which may end a moment later."""
        if not self.ssh.wait(CLOSING_TIMEOUT_S if status == EXIT_SSH else 0):
            return True
        return status == EXIT_SSH and not self.ssh.call(self.control_argv("check"))[0]  # a killed one leaves its socket


def own_master(ssh: Ssh) -> str:
    """Return the control socket of the user's own live master for this destination: no login at all."""
    path = "none" if ssh.jump else ssh.config.get("controlpath", "none")  # its name is one of another network
    if path == "none" or not ssh.call(ssh.argv(ASKING, "-O", "check"))[0]:
        return ""
    ssh.way = Mux(ssh, path)
    with ssh.messages.working("" if ssh._is_again else "Asking your own control master at %s" % path):
        is_alive = ssh.is_alive()
    if not is_alive:  # its process is there, but what it leads through has gone with a network, or in a sleep
        ssh.way = Direct(ssh)
        show = ssh.messages.detail if ssh._is_again else ssh.messages.note
        show("Your own control master at %s does not answer: logging in anew." % path)
        return ""
    ssh.messages.detail("Using your own control master at %s." % path)
    return path


MASTERS: List[Callable[[Ssh], str]] = [own_master]


def each(option: str, values: Iterable[str]) -> List[str]:
    """Return an option of ssh once for each of these values."""
    return [word for value in values for word in (option, value)]


def pairs_of(options: List[str]) -> List[List[str]]:
    """Split ssh options into one list each; only -4, -6 and -C stand alone."""
    words = iter(options)
    return [[word] if word in ("-4", "-6", "-C") else [word, next(words)] for word in words]


# -- the port here that it listens on ---------------------------------------------------------------------------------


class LocalPort:
    """A port here that is kept for ssh, from the first moment to the last: what a page sends to it is for nobody else.

    Linux lets several sockets have one port as long as all of them have SO_REUSEADDR and none listens, and it looks at
    that whenever one more is bound. So ours has the port all the time, and lets ssh in when that is about to listen; a
    second one of ours keeps others off while ours begins to listen. Where a port cannot be shared, ours is closed for
    ssh, and there again when ssh has ended.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._sockets: "List[socket.socket]" = []  # the first listens

    def hold(self) -> bool:
        """Keep others off, and let a page that comes wait; False where it is another's already."""
        try:
            if not self._sockets:
                self._sockets = [listen_on(self.number)]
                if sys.platform == "linux":
                    self._sockets.append(socket.socket())
                    with contextlib.suppress(AttributeError, OSError):  # WSL 1 has no such option, nor have old Condas
                        for ours in self._sockets:
                            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)  # among those of one user
                        self._share(self._sockets, True)
                        self._sockets[1].bind(("127.0.0.1", self.number))
            self._share(self._sockets[:1], True)  # those connections that ssh has just lost have the port, too
            self._sockets[0].listen(8)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise Failure("cannot listen on local port %d" % self.number, str(error)) from None
            return False
        finally:
            self._share(self._sockets, False)
        return True

    @staticmethod
    def _share(sockets: "List[socket.socket]", is_shared: bool) -> None:
        for one in sockets if os.name == "posix" else []:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_shared)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let ssh listen on it meanwhile, when it is held; afterwards, ssh has it or nobody."""
        try:
            self._share(self._sockets, True)
            if self._sockets:
                self._sockets[0].shutdown(socket.SHUT_RDWR)  # it listens no more, and is still bound
                listen_on(self.number).close()  # as ssh will
        except OSError:
            self.close()
        try:
            yield
        finally:
            self._share(self._sockets, False)

    def close(self) -> None:
        """Leave it to others."""
        while self._sockets:
            self._sockets.pop().close()

    def taken_by(self) -> str:
        """Return " by" and the name of the other user who listens there, as far as that can be seen."""
        uid = owner_of_tcp(("127.0.0.1", self.number), 0)
        if uid is None or uid == own_uid():
            return ""
        with contextlib.suppress(KeyError):
            return " by " + pwd.getpwuid(uid).pw_name
        return " by the user %d" % uid

    def taken(self, try_: str = "") -> Failure:
        """Return the failure of a port that is another's."""
        why = "127.0.0.1:%d is taken on this machine%s" % (self.number, self.taken_by())
        return Failure("cannot listen on local port %d" % self.number, why, try_)


# -- our directory here -----------------------------------------------------------------------------------------------


def private_runtime_dir() -> str:
    """Return our directory for sockets and tunnel records: ours alone, its path short enough. Raises Failure."""
    candidates = [own_tmp_dir()]
    if os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(0, os.path.join(os.environ["XDG_RUNTIME_DIR"], "rjupyter"))
    longest_name = len("/ffffffff.ctl") + SSH_SOCKET_SUFFIX + 1
    reasons = []
    for path in candidates:
        if len(os.fsencode(path)) + longest_name > SUN_PATH_MAX:
            reasons.append("%s is too long for a socket" % path)
            continue
        try:
            return private_dir(path)
        except OSError as error:
            reasons.append(str(error))
    raise Failure("no place for the control socket", "\n".join(reasons), "export XDG_RUNTIME_DIR=/a/short/directory")


# ---------------------------------------------------------------------------------------------------------------------
# channel
#
# The host's way back: one message a line, marked so that nothing else the host prints can pass for one.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins


class Channel:
    """Lines of JSON behind the request's nonce, so that no banner or rc file can pass for one.

    Whatever the agent does, the client hears every few seconds that it lives: it gives up on one that is silent.
    In a job there is no nonce: the way back is a file of ours, which nobody waits for.
    """

    def __init__(self, nonce: str, stream: "Any" = None) -> None:
        self._nonce = nonce + " " if nonce else ""
        self._lock = threading.Lock()  # a line is sent whole
        self._is_over = threading.Event()
        self._lasting = ("progress", {"text": ""})  # type: Tuple[str, Json]
        self._has_failed = False
        self._has_announced = False
        self._stream = stream or os.fdopen(os.dup(1), "w", closefd=False)  # open to our end
        if not stream:
            os.dup2(2, 1)  # whatever else writes to stdout here goes to stderr instead
            with contextlib.suppress(RuntimeError, MemoryError):  # no more threads: then it is not said
                threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        """Say again what takes its time, until there is a reply, or nobody who listens."""
        while not self._is_over.wait(HEARTBEAT_S) and not self._has_failed:
            kind, facts = self._lasting
            self.tell(kind, **facts)

    def tell(self, kind: str, **facts: "Any") -> None:
        """Send one marked line: a row of SAYINGS, or the reply, after which nothing comes.

        A client that has gone is no reason to stop: what we began for it goes on.
        """
        line = "%s%s\n" % (self._nonce, json.dumps(dict(facts, kind=kind)))
        with self._lock:
            if self._is_over.is_set():
                return
            if kind == "reply":
                self._is_over.set()
            elif kind in ("progress", "queue"):
                self._lasting = (kind, facts)
            try:
                self._stream.write(line)
                self._stream.flush()
            except OSError:
                self._has_failed = True

    def announce(self, directory: str, doing: str) -> None:
        """Say the id of what is about to be started; raises Failure when nobody is left to hear it.

        So nothing goes on that nobody knows of. What was announced once goes on, whoever leaves.
        """
        if self.is_closed and not self._has_announced:
            os.rmdir(directory)
            raise Failure("nothing was started", "the client has gone")
        self._has_announced = True
        self.tell("launching", id=os.path.basename(directory), doing=doing)

    @property
    def is_closed(self) -> bool:
        """True when nobody listens any more."""
        return self._has_failed or has_no_reader(self._stream.fileno())

    def progress(self, text: str) -> None:
        """Say what takes its time."""
        if self._lasting != ("progress", {"text": text}):
            self.tell("progress", text=text)


@contextlib.contextmanager
def one_at_a_time(directory: str, channel: Channel, waiting: str) -> "Iterator[None]":
    """Hold the lock in a directory of ours meanwhile; say `waiting` while another run has it.

    No crash leaves it behind. Where files cannot be locked, there is none.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(os.path.join(private_dir(directory), "lock"), "w"))
            while not has_lock(lock):
                channel.progress(waiting)
                if channel.is_closed:
                    raise Failure("nobody is waiting for this any more")
                time.sleep(POLL_S)
        channel.progress("")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# kept
#
# What we started on the host is written down there, in a directory for each thing: servers/ID, runs/ID, jobs/ID. A
# kind of thing is a row of KINDS: how it is described, and how it is ended. Where a thing runs is a class: Here,
# Elsewhere (another node of a shared home), or that of the kind of thing which it is in, a job or a wrapper.
# ---------------------------------------------------------------------------------------------------------------------


class Kind:
    """A kind of thing that is kept on the host. An annex adds its own; the core asks all of them alike."""

    name = ""  # with an "s", that of its directory in our state
    prefix = ""  # of its ids
    record = Kept  # type: Type[Kept]
    describe = None  # type: Any # (record): describes one for `list`
    end = None  # type: Any # (record): ends one, and what belongs to it

    def records(self) -> "List[Any]":
        """Return what we wrote down of this kind, newest first, of what runs and of what has ended.

        A home is shared between nodes, and files can be damaged: one that makes no sense is skipped.
        """
        found = filter(None, (record_in(self, directory) for directory in kept_dirs(self)))
        return sorted(found, key=lambda record: float(record.created), reverse=True)

    def running(self) -> "List[Any]":
        """Return the records of what has not ended, newest first."""
        return [record for record in self.records() if self.goes_on(record)]

    def goes_on(self, record: "Any") -> bool:
        """True while one has not ended."""
        return place_of(record).is_running()

    def listed(self) -> "List[Any]":
        """Return what `list` shows."""
        return self.records()

    def log_of(self, record: "Any") -> Growing:
        """Return what `logs` shows of one."""
        return Growing(record.file("log"), most=32 * PART_BYTES)


KINDS = {}  # type: Dict[str, Any] # each a Kind
STARTERS = []  # type: List[Any] # of these, the kinds in which others are started, the outermost first: jobs, wrappers


# -- where it runs ----------------------------------------------------------------------------------------------------


class Elsewhere:
    """Where a thing runs: on another node of a shared home, where nothing is known of it. Other places know more."""

    is_here = False
    is_known = False  # true where is_running is an answer, and not a want of knowledge
    settle_s = 0.0  # how long it may take until is_running tells of an end

    def __init__(self, record: Kept, outer: "Any" = None) -> None:
        self.record = record
        self.outer = outer  # the record of what it is in
        self.held = record  # that of the process which we started for it

    def is_running(self) -> bool:
        """True when it runs, as far as we can tell."""
        return False

    def why_ended(self, log: str) -> str:
        """Return why it ended, as far as the place tells; empty where it does not."""
        return ""

    def why_in_doubt(self) -> str:
        """Return why it ended where nothing tells."""
        return "it was killed, by hand or because memory ran out"

    def why_cut(self) -> str:
        """Return by what the place itself was ended, with all that ran there; empty where it was not."""
        return ""

    def left_s(self) -> float:
        """Return how long it may run on, in seconds; 0 for no limit that we know of."""
        return 0.0

    def children(self) -> "List[Tuple[int, str]]":
        """Return what its process started, with identities, as far as seen: of Jupyter, kernels and terminals."""
        return []

    def end(self, children: "List[Tuple[int, str]]", polite_s: float) -> None:
        """End it, when it has not done so by itself within `polite_s`; and what is left of its children."""


class Forgotten(Elsewhere):
    """In a job, or in a wrapper, of which nothing is kept any more: it ended a week ago."""

    is_known = True


class Here(Elsewhere):
    """On this node: its process tells."""

    is_here = True
    is_known = True

    def is_running(self) -> bool:
        return is_same_process(self.record.pid, self.record.identity)

    def why_ended(self, log: str) -> str:
        boots = (self.record.identity.partition(":")[0], boot_identity())
        return "the host was started anew" if all(boots) and boots[0] != boots[1] else ""

    def children(self) -> "List[Tuple[int, str]]":
        pids = [pid for pid, parent in parents().items() if parent == self.record.pid]
        return [(pid, process_identity(pid)) for pid in pids]

    def end(self, children: "List[Tuple[int, str]]", polite_s: float) -> None:
        record = self.record
        until(lambda: not self.is_running(), polite_s)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self.is_running():
                # We made the group of ours; another's may hold a terminal.
                (os.killpg if record.is_ours else os.kill)(record.pid, signum)
                until(lambda: not self.is_running(), 3)
        for pid, identity in children:
            with contextlib.suppress(OSError):  # it has just ended, or is another user's, by sudo
                if is_same_process(pid, identity):
                    os.kill(pid, signal.SIGKILL)


own_wrapper = ""  # the id of the one that we are in ourselves


def is_here(record: Kept) -> bool:
    """True on the machine that the record names, whatever it is called now: a home is shared by several."""
    boot = record.identity.partition(":")[0]
    is_same_boot = bool(boot) and boot == boot_identity()
    return record.node == os.uname().nodename or is_same_boot or is_same_process(record.pid, record.identity)


def place_of(record: Kept) -> Elsewhere:
    """Return where the thing of a record runs."""
    for kind in reversed(STARTERS):
        identity = getattr(record, kind.name)
        outer = kept_record(kind, identity)
        if outer and outer.id != own_wrapper:
            return kind.place(record, outer)  # type: ignore[no-any-return]
        is_lost = identity and not outer and not is_here(record)  # a node may see a new job late
        if is_lost and identity not in map(os.path.basename, kept_dirs(kind)):
            return Forgotten(record)
    return Here(record) if is_here(record) else Elsewhere(record)


# -- its directories --------------------------------------------------------------------------------------------------


own_state_dir = ""  # where our state is on this host, if the user said where


def state_dirs(kind: str) -> "List[str]":
    """Return our directories for one kind of state, the best first: at home, or in /tmp where home is not writable.

    The one that was named, and no other, where one was.
    """
    tops = [own_state_dir] if own_state_dir else [os.path.expanduser(STATE_DIR), own_tmp_dir()]
    return [os.path.join(top, kind) for top in tops]


def first_private(candidates: "List[str]") -> str:
    """Return the first of these directories that is, or can be made, ours alone and writable; Failure without one."""
    reasons = []
    for path in candidates:
        try:
            top = os.path.dirname(path)
            if own_state_dir and os.path.isdir(top) and os.stat(top).st_mode & 0o077 and os.listdir(top):
                raise PermissionError("%s is open to others, and not empty: name a new directory in it" % top)
            private_dir(top)
            return private_dir(path)
        except OSError as error:
            reasons.append(str(error))
    raise Failure("no place to keep our state on the host", "\n".join(reasons), "make room there, or a writable home")


def kept_dirs(kind: Kind) -> "List[str]":
    """Return the directories of one kind of thing, of what runs and of what has ended; their names are the ids."""
    found = []
    for top in state_dirs(kind.name + "s"):
        with contextlib.suppress(OSError):
            # No link, and in no directory of another's: what is old in there is removed.
            if os.lstat(top).st_uid == os.lstat(os.path.dirname(top)).st_uid == os.getuid():
                found += [os.path.join(top, name) for name in os.listdir(top)]
    return found


def kept_record(kind: Kind, identity: str) -> "Any":
    """Return the record of one thing; None where there is none."""
    for directory in kept_dirs(kind) if identity else []:
        if os.path.basename(directory) == identity:
            return record_in(kind, directory)
    return None


def record_in(kind: Kind, directory: str) -> "Any":
    """Return the record in the directory of one thing; None where there is none that makes sense."""
    record = read_record(kind.record, os.path.join(directory, kind.name + ".json"))
    if record:
        record.id, record.directory = os.path.basename(directory), directory
    return record


def new_dir(kind: Kind, channel: Channel, doing: str = "goes on starting") -> str:
    """Make and return a directory for a new thing; its name, a prefix and four hexadecimal digits, is the id.

    What is `doing` is announced under that; raises Failure when nobody is left to hear it.
    """
    top = first_private(state_dirs(kind.name + "s"))
    while True:
        path = os.path.join(top, kind.prefix + os.urandom(2).hex())
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            channel.announce(path, doing)
            return path


def write_down(record: "K", directory: str) -> "K":
    """Write a record into its directory, and return it."""
    record.id, record.directory = os.path.basename(directory), directory
    write_whole(os.path.join(directory, record.kind + ".json"), json.dumps(record.facts()))
    return record


def mark(record: Kept, name: str) -> None:
    """Leave a word beside a record, which others look for: "stop", "ended", "cancelled". A full home takes none."""
    with contextlib.suppress(OSError):
        write_whole(record.file(name), "")


def is_marked(record: Kept, name: str) -> bool:
    """True when that word is there."""
    return bool(record.directory) and os.path.exists(record.file(name))


def gives_signs(record: Kept) -> bool:
    """False when an agent that was left has said that it ended, or has given no more signs of life for a while.

    Their age is that of a file beside them: the clock of a shared home may not be ours.
    """
    sign, now = (record.file(name) for name in ("alive", "looked"))
    if is_marked(record, "ended") or not record.directory:
        return not record.directory
    with contextlib.suppress(OSError):
        write_whole(now, "")
    return not time_of(sign) or time_of(now) - time_of(sign) < LIFE_S


def remove_tree(path: str) -> None:
    """Remove a file, or a directory and all that is in it: again, where another agent wrote into it meanwhile."""

    def is_gone() -> bool:
        remove_files([path])
        shutil.rmtree(path, ignore_errors=True)
        return not os.path.lexists(path)

    until(is_gone, 0.5)


def forget_ended(kind: Kind) -> None:
    """Remove what is kept of a kind and ended on this node, or was stopped, more than a week ago; what runs stays."""
    for path in kept_dirs(kind):
        record = record_in(kind, path)
        # A run that is cut off has written into these alone for a while.
        changed_at = max(map(time_of, [path, os.path.join(path, "journal"), os.path.join(path, "log")]))
        is_old = changed_at and time.time() - changed_at > KEEP_ENDED_S  # not where that cannot be told
        is_known = record is None or place_of(record).is_known or is_marked(record, "stop")
        if is_old and is_known and not (record and kind.goes_on(record)):
            remove_tree(path)


def end_of_log(path: str, lines: int = LOG_LINES) -> str:
    """Return the last lines of a log, tokens taken out."""
    text = b""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 8192))
        text = stream.read()
    tail = [line.rstrip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()][-lines:]
    return without_tokens("\n".join(tail))


def without_tokens(text: str) -> str:
    """Return a text of Jupyter's log without the tokens in its addresses."""
    return re.sub(r"token=[^&\s\"']+", "token=...", text)


# -- starting it ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_detached(
    argv: "List[str]", environment: "Dict[str, str]", directory: str, log: str, is_held: bool = False
) -> "Iterator[Any]":
    """Start a process in a session of its own that has nothing of ours open.

    Where it cannot be written down under this, it is ended: nobody would find it.

    With `is_held` it gets SIGTERM when we end, even by SIGKILL, where that can be had: on Linux. A scheduler may know
    no more of a job than its process group: what has a session of its own would outlive the job.
    """
    prctl = None  # type: Any
    if is_held:
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            prctl = ctypes.CDLL(None).prctl
    warnings.simplefilter("ignore", ResourceWarning)  # that it still runs at our end
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600), "wb") as stream:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=directory,
            env=environment,
            start_new_session=True,
            # PR_SET_PDEATHSIG. Who holds it has one thread.
            preexec_fn=prctl and (lambda: prctl(1, int(signal.SIGTERM))),  # noqa: PLW1509
        )
    try:
        yield process
    except BaseException:
        end_session(process)
        raise


def facts_of(pid: int, root_dir: str, request: Request) -> "Json":
    """Return what is kept of each thing: its process is the one that we started, or us until that is."""
    return {
        "created": time.time(),
        "node": os.uname().nodename,
        "pid": pid,
        "identity": process_identity(pid),
        "root_dir": portable(root_dir),
        "job": request.job,
        "wrapper": request.wrapper,
    }


def end_session(process: "Any") -> None:
    """Kill the session that a process leads which we launched ourselves, and take its status."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signum)
            until(lambda: not process_identity(process.pid), 3)
    process.wait()


def resolve_path(path: "Optional[str]") -> "Tuple[str, str]":
    """Split the PATH of a destination into an existing directory and a file in it: each is empty where there is none.

    Relative to the home directory, as scp has it. Raises Failure when there is no such thing.
    """
    if path is None:
        return "", ""
    full = os.path.normpath(os.path.join(os.path.expanduser("~"), os.path.expanduser(native(path))))
    if os.path.isdir(full):
        return full, ""
    if os.path.isfile(full):
        return os.path.split(full)
    kind = "notebook" if full.endswith(".ipynb") else "directory"
    parent = full
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    why = "%s is not there; %s is" % (portable(full), portable(parent))
    raise Failure("no such %s on the host" % kind, why, "another PATH, or create it there first")


# ---------------------------------------------------------------------------------------------------------------------
# environments
#
# The ways to run Jupyter on the host, best first, as launchers; the last one of them is an installation of our own.
# What was looked at goes to `tried`, in words, for the error that there is none.
# ---------------------------------------------------------------------------------------------------------------------


def launchers(request: Request, root_dir: str, channel: Channel, tried: "List[str]") -> "Iterator[Launcher]":
    """Yield the ways to run Jupyter on this host, best first; raises Failure (3) when there is none left.

    The app that is asked for; where none is, the first in each place. For an execution, nbclient will do.

    --python and --env name one and no other. Else: the project's own, of the opened directory or one above; PATH as a
    command of ssh has it; the PATH of the login shell, where conda and the like are set up; the places where
    environments usually are; at last our own, which is installed then.
    """
    apps = [request.app] if request.app else list(PROGRAMS if request.action == "start_run" else APPS)
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not request.wrapper:  # which has what was set outside
        enter_terminal(request, channel, tried)
    if request.python:
        python = os.path.join(os.path.expanduser("~"), os.path.expanduser(native(request.python)))
        yield launcher_of_python(python, apps, "--python")
    elif request.env:
        yield launcher_of_python(environment_python(native(request.env), root_dir), apps, "--env " + request.env)
    else:
        yield from launchers_of_project(root_dir, apps, channel, tried)
        where = "PATH after --init"
        if not request.init or request.wrapper:
            yield from launchers_in(places, apps, "PATH", tried)
            enter_terminal(request, channel, tried)
            where = "the login shell's PATH"
        places = os.environ.get("PATH", os.defpath).split(os.pathsep)
        yield from launchers_in(places, apps, where, tried)
        places = [os.path.join(tree, "bin") for tree in conda_trees()]
        places += [os.path.expanduser("~/.local/bin"), "/opt/homebrew/bin"]
        for pattern in (".pyenv/versions/*/bin", "Library/Python/3.*/bin"):
            places += reversed(found_in(["~"], pattern))
        yield from launchers_in(places, apps, "the usual places", tried)
        yield from own_launcher(apps, "our own environment", tried)
    if request.may_install and not request.python and not request.env:
        yield install_jupyter(apps, channel)
    what = "no %s on the host" % (APPS[request.app].title if request.app else "Jupyter")
    raise Failure(what, "looked at\n" + "\n".join(tried), how_to_install(), EXIT_NO_JUPYTER)


def launch(
    request: Request,
    root_dir: str,
    channel: Channel,
    launch_by: "Callable[[Launcher, Request, str, Channel], Optional[K]]",
) -> "Tuple[K, float]":
    """Launch a server or a run in the first environment that can; return its record, and how long that took.

    `launch_by` does it in one of them, and returns nothing where its commands cannot be run at all. Raises Failure (3)
    when there is none left.
    """
    tried = []  # type: List[str]
    began = time.monotonic()
    for found in launchers(request, root_dir, channel, tried):
        python = interpreter_of(found) if request.wrapper else ""
        argv = [python, "-c", HAS_MODULE, PROGRAMS[found.app].module]
        if request.wrapper and not (python and run_command(argv, COMMAND_TIMEOUT_S, found.environment)[0] == 0):
            # A home that is seen in there has scripts of a Python outside.
            tried.append("%s: its Python has no such module in there" % portable(found.argv[0]))
            continue
        began = began if found.where != INSTALLED else time.monotonic()
        channel.tell("found", where=found.where, command=portable(found.argv[0]), tried=tried)
        record = None
        try:
            record = launch_by(found, request, root_dir, channel)
        except OSError as error:  # it is for other machines, or its #! line leads nowhere
            if error.filename not in (found.argv[0], interpreter_of(found)):
                raise
        if record:
            return record, time.monotonic() - began
        tried.append("%s: it cannot be run" % portable(found.argv[0]))
    raise AssertionError("launchers ends with a failure")


def problem_of(script: str) -> str:
    """Return why `script` cannot be executed; empty when it can. Environments move and leave dead #! lines behind."""
    if os.path.islink(script) and not os.path.exists(script):
        return "leads to %s, which is gone" % portable(os.path.realpath(script))
    if not os.path.isfile(script):
        return "a directory" if os.path.isdir(script) else "not there"
    if not os.access(script, os.X_OK | os.R_OK):
        return "not executable"
    mach_o = "(\udccf\udcfa\udced\udcfe|\xcf\xfa\xed\xfe)"  # its first bytes, in UTF-8 and in Latin-1
    if sys.platform != "darwin" and match_head(script, mach_o):
        return "a program of macOS"
    interpreter = match_head(script, r"#![ \t]*(\S+)")
    return "needs %s, which is gone" % portable(interpreter) if interpreter and not os.path.exists(interpreter) else ""


def match_head(script: str, *forms: str) -> str:
    """Return what the first of these forms that fits the beginning of a script finds in it; empty when none does."""
    head = ""
    with contextlib.suppress(OSError), open(script, "rb") as stream:
        head = os.fsdecode(stream.read(1024))
    found = next(filter(None, (re.match(form, head) for form in forms)), None)
    return found.group(1) if found else ""


# -- the environment of the user's terminal ---------------------------------------------------------------------------

# Start-up files are told that they run in a multiplexer, or they would `exec` one. It is no part of what they set up.
MULTIPLEXED = {"TMUX": "/", "STY": "0", "ZELLIJ": "0", "ABDUCO_SESSION": "x", "TERM": "screen", "TERM_PROGRAM": "tmux"}
NO_ANSWER = "no answer within "
OF_A_JOB = r"(CUDA|ROCR|HIP)_VISIBLE_DEVICES$|GPU_DEVICE_ORDINAL$|ZE_AFFINITY_MASK$|SLURM_|PBS_|LSB_"
of_terminal = None  # type: Optional[Dict[str, str]] # what one sets in another way than our session, once we know


def mended(environment: "Any") -> "Any":
    """Take out what a start-up file sets for one Python and what breaks all others, and return the environment."""
    for name in ("PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONEXECUTABLE"):
        environment.pop(name, None)
    if "~" in environment.get("PATH", ""):  # it was quoted: bash expands it when it looks for a command
        environment["PATH"] = os.pathsep.join(map(os.path.expanduser, environment["PATH"].split(os.pathsep)))
    return environment


def shell_environment(shell: str, init: "List[str]", is_interactive: bool) -> "Tuple[Dict[str, str], str]":
    """Return the environment of the user's login shell, after the commands in `init`, and what it said on stderr.

    Empty when the shell does not get that far in time: its files may wait for input, or leave. The dump is framed, for
    those files print as well. What they leave running is told that its terminal is gone.
    """
    nonce = os.urandom(8).hex()
    begin = ["echo begun-" + nonce] if init else []  # what was typed may take its time; start-up files may hang
    script = " && ".join(begin + init + [dump_command(nonce)])
    # A leading dash makes any shell a login shell. With -c, csh does not count itself as interactive; it takes its
    # commands from stdin.
    argv = ["-" + os.path.basename(shell)] + (["-i"] if is_interactive else [])
    argv += [] if shell.endswith("csh") else ["-c", script]
    environment = dict(MULTIPLEXED, **os.environ)
    temporary = tempfile.TemporaryFile
    # Files and no pipes: a start-up file may leave a process behind that holds a pipe open for ever.
    with temporary() as stdin, temporary() as out, temporary() as err:
        try:
            # On stdin as well: a start-up file may replace the shell (`exec fish`). One that reads a line gets a blank.
            stdin.write(("\n\n%s\n" % script).encode("utf-8", "surrogateescape"))
            stdin.seek(0)
            process = subprocess.Popen(
                argv, executable=shell, env=environment, stdin=stdin, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return {}, str(error)
        timeout_s = SHELL_TIMEOUT_S
        has_ended = until(lambda: process.poll() is not None, timeout_s)
        if not has_ended and ("begun-" + nonce).encode() in os.pread(out.fileno(), 1 << 20, 0):
            timeout_s = START_TIMEOUT_S
            has_ended = until(lambda: process.poll() is not None, timeout_s)
        if not has_ended:
            inner = [pid for pid in parents() if session_of(pid) == process.pid and pid != process.pid]
            words = [command_of_process(pid).replace("\0", " ").strip()[:60] for pid in inner]
            os.killpg(process.pid, signal.SIGKILL)
            for pid in inner:  # one may have a process group of its own
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            return {}, "%s%d s" % (NO_ANSWER, timeout_s) + (" (it runs %s)" % ", ".join(words) if words else "")
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGHUP)
        out.seek(0)
        err.seek(0)
        said = err.read().decode("utf-8", "replace").strip()
        found = environment_in(out.read().decode("utf-8", "replace") + "\n" + said, nonce)  # as after `exec 1>&2`
        said = "\n".join(line for line in said.splitlines() if nonce not in line)
        return {n: found[n] for n in found if n in os.environ or MULTIPLEXED.get(n) != found[n]}, said


def dump_command(nonce: str) -> str:
    """Return a command, valid in every shell, that prints the environment behind a nonce."""
    dump = 'import json, os; print(); print("%s" + json.dumps(dict(os.environ)))' % nonce
    return "exec '%s' -IS -c '%s'" % (sys.executable, dump)


def environment_in(text: str, nonce: str) -> "Dict[str, str]":
    """Return the environment that dump_command printed among other things; empty when it did not come to that."""
    for line in text.splitlines():
        if line.startswith(nonce) and line.endswith("}"):  # all of it: there may have been no more room
            return dict(mended({native(k): native(v) for k, v in json.loads(line[len(nonce) :]).items()}))
    return {}


def enter_terminal(request: Request, channel: Channel, tried: "List[str]") -> None:
    """Make our environment, once, that of a terminal of the user's on this host, after the commands of --init.

    So all that we start has what start-up files set, in whatever way Jupyter is found; to come back to a server needs
    none of it. Where they do not work out, not even without their interactive part, our environment stays as it is.
    Raises Failure when there was an --init, which must not be passed over in silence.
    """
    global of_terminal
    if of_terminal is not None:
        return
    of_terminal = {}
    home = os.path.expanduser("~")  # in which our own files stay
    init = [] if request.wrapper else [native(command) for command in request.init]
    shell = os.environ.get("SHELL", "")
    with contextlib.suppress(KeyError):  # in a container, an uid without a name
        shell = shell or pwd.getpwuid(os.getuid()).pw_shell
    shell = shell or "/bin/sh"
    channel.progress("waiting for the start-up files of " + shell)
    for how in ("an interactive login shell", "a login shell"):
        began = time.monotonic()
        found, said = shell_environment(shell, init, "interactive" in how)
        if found:
            channel.tell("terminal", shell=shell, how=how, seconds=time.monotonic() - began)
            if request.job:  # whose GPUs are its scheduler's to say, or those of --init
                given = [name for name in os.environ if re.match(OF_A_JOB, name) and name not in " ".join(init)]
                found.update({name: os.environ[name] for name in given})
            of_terminal = {name: found[name] for name in found if os.environ.get(name) != found[name]}
            path = found.get("PATH", "").split(os.pathsep)
            # What the session alone has there stays in front: /etc/profile may set PATH anew.
            path = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place not in path] + path
            os.environ.clear()
            os.environ.update(found, HOME=home, PATH=os.pathsep.join(filter(None, path)))
            break
        tried.append("the environment of %s: %s" % (shell, said or "it gave none"))
        if said.startswith("%s%d s" % (NO_ANSWER, START_TIMEOUT_S)):
            break
        if said.startswith(NO_ANSWER) and "interactive" in how:  # once
            channel.tell("note", text="The start-up files of %s do not end: %s; going on without them." % (shell, said))
        elif "interactive" not in how and not init and not said.startswith((NO_ANSWER, "[Errno")):
            text = "The start-up files of %s exit before any command; going on without them."
            channel.tell("note", text=text % shell)
    channel.progress("")
    if init and not found:
        raise Failure("--init failed on the host", "%s\n%s" % (" && ".join(init), said), "try it in a shell there")


def with_variables(request: Request, channel: Channel) -> Request:
    """Return a request whose paths have the values of a terminal's variables in them: $NAME or ${NAME}, as in a shell.

    What is there under a name with a $ is meant as it stands. Raises Failure for a variable that is not set.
    """

    def value_of(found: "Any") -> str:
        name = found.group(1) or found.group(2)
        if name not in ("HOME", "USER", "LOGNAME"):  # which every session has
            enter_terminal(request, channel, [])
        if not os.environ.get(name):
            why = "%s: your terminal there does not set it either" % portable(path)
            raise Failure("$%s is not set on the host" % name, why, "the path itself, or --init with what sets it")
        return os.environ[name]

    top = os.path.expanduser("~")
    for field in ("state_dir", "python", "env", "container", "path", "file"):
        path = native(getattr(request, field) or "")
        place = os.path.join(top, os.path.expanduser(path))
        if "$" in path and not os.path.lexists(place) and not os.path.lexists(place + ".ipynb"):
            path = re.sub(r"(?a)\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value_of, path)
            request = request.but(**{field: portable(path)})
        top = os.path.join(top, os.path.expanduser(path)) if field == "path" else top  # of the file
    return request


# -- named environments -----------------------------------------------------------------------------------------------


def found_in(places: "Iterable[str]", form: str) -> "List[str]":
    """Return what matches a pattern in each of these places, which may begin with ~ or have variables in them."""
    bases = [glob.escape(os.path.expanduser(os.path.expandvars(place))) for place in places]
    return [path for base in bases for path in sorted(glob.glob(os.path.join(base, form))) if os.path.isabs(path)]


def found_program(name: str) -> str:
    """Return where a program is on this host, on PATH or in a usual place; empty where it is not."""
    places = [os.environ.get("PATH", os.defpath)]
    places += map(os.path.expanduser, ("~/.local/bin", "~/.cargo/bin", "~/.pixi/bin"))
    places += [os.path.join(tree, place) for tree in conda_trees() for place in ("condabin", "bin")]
    return shutil.which(name, path=os.pathsep.join(places)) or ""


def known_to_conda() -> "List[str]":
    """Return the environments in conda's own list of all of them."""
    return [native(line.strip()) for line in read_text(os.path.expanduser("~/.conda/environments.txt")).splitlines()]


def conda_trees() -> "List[str]":
    """Return the directories where conda, mamba and micromamba keep their environments, as far as they exist."""
    home = os.path.expanduser("~")
    programs = [os.environ.get("CONDA_EXE", ""), os.path.realpath(shutil.which("conda") or "/")]
    trees = [os.environ.get("MAMBA_ROOT_PREFIX", ""), *[os.path.dirname(os.path.dirname(path)) for path in programs]]
    for name in ("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba", ".local/share/mamba", ".conda"):
        trees.append(os.path.join(home, name))
    trees += ["/opt/conda", "/opt/miniconda3", "/opt/anaconda3", "/opt/miniforge3"]
    listed = [place for prefix in known_to_conda() for place in (prefix, os.path.dirname(os.path.dirname(prefix)))]
    trees += [place for place in listed if found_in([place], "envs") or found_in([place], "condabin")]
    return [tree for tree in dict.fromkeys(trees) if tree.strip("/") and os.path.isdir(tree)]


def conda_envs_dirs() -> "List[str]":
    """Return the directories of named environments: those that conda was told of, as its manual says, and its own."""
    places = ["~", "~/.conda", "~/.config/conda", "$XDG_CONFIG_HOME/conda", "/etc/conda", *conda_trees()]
    files = [os.environ.get("CONDARC", "")]
    for name in (".condarc", "condarc", ".mambarc", "condarc.d/*.y*ml"):
        files += found_in(places, name)
    text = native(re.sub(r"(?m)(^|\s)#.*", "", "\n".join(map(read_text, files))))
    told = [os.environ.get(name, "").split(os.pathsep) for name in ("CONDA_ENVS_DIRS", "CONDA_ENVS_PATH")]
    for block in re.findall(r"(?ms)^envs_(?:dirs|path) *:(.*?)(?=^\w|\Z)", text):  # YAML: [a, b], or a line for each
        told.append(re.findall(r"""[^\s\[\],'"-](?:[^\n\],'"]*[^\s\],'"])?""", block))
    own = [os.path.join(tree, "envs") for tree in [*conda_trees(), os.path.expanduser("~/.pixi")]]
    own += map(os.path.dirname, known_to_conda())
    return found_in(itertools.chain(*told), "") + own


def environment_python(name: str, root_dir: str) -> str:
    """Return the interpreter of an environment: a path (venv, conda, pixi), or a name (conda, mamba, the project).

    It may be a link that leads nowhere, where there is no other. Raises Failure (3) when there is none.
    """
    if os.sep in name or name.startswith("~"):
        prefixes = [os.path.join(os.path.expanduser("~"), os.path.expanduser(name))]
    else:
        prefixes = [prefix for _, prefix in environments_of_project(root_dir) if os.path.basename(prefix) == name]
        prefixes += conda_trees() if name == "base" else []
        prefixes += [os.path.join(parent, name) for parent in conda_envs_dirs()]
    pythons = [os.path.join(prefix, "bin", "python") for prefix in dict.fromkeys(prefixes) if os.path.isabs(prefix)]
    for python in [python for python in pythons if not problem_of(python)] + list(filter(os.path.lexists, pythons)):
        return python
    why = "looked for\n" + "\n".join(map(portable, pythons))
    raise Failure("no environment %s on the host" % portable(name), why, status=EXIT_NO_JUPYTER)


# Where poetry and pipenv keep environments, each with a hash of a path of its project in its name (poetry's
# env_manager.py and locations.py, pipenv's project.py).
OUT_OF_TREE = ["$POETRY_VIRTUALENVS_PATH", "$POETRY_CACHE_DIR/virtualenvs", "$XDG_CACHE_HOME/pypoetry/virtualenvs"]
OUT_OF_TREE += ["~/.cache/pypoetry/virtualenvs", "~/Library/Caches/pypoetry/virtualenvs", "$WORKON_HOME"]
OUT_OF_TREE += ["$XDG_DATA_HOME/virtualenvs", "~/.local/share/virtualenvs"]
POETRY_SETTING = r"""(?m)^\s*(?:virtualenvs\.)?(cache-dir|path)\s*=\s*["'](.+?)["']"""


def environments_of_project(root_dir: str) -> "Iterator[Tuple[str, str]]":
    """Yield the environments of the opened directory and of those above it: whose each is, and where.

    It goes up to home; elsewhere, to the last directory that is the user's own.
    """
    home = os.path.realpath(os.path.expanduser("~"))
    above = [os.path.realpath(root_dir or home)]
    with contextlib.suppress(OSError):
        while above[-1] != home and os.path.dirname(above[-1]) != os.sep:
            parent = os.path.dirname(above[-1])
            state = os.stat(parent)
            is_own = state.st_uid == os.getuid() and not state.st_mode & stat.S_IWOTH  # all is root's, also /tmp
            if not (parent + os.sep).startswith(home + os.sep) and not is_own:
                break
            above.append(parent)
    configs = found_in(["$POETRY_CONFIG_DIR"], "config.toml")
    configs += found_in(["$XDG_CONFIG_HOME", "~/.config", "~/Library/Application Support"], "pypoetry/config.toml")
    for directory in above:
        forms = [".venv", "venv", "env", ".env", "ENV", ".conda", ".direnv/python-*", ".devenv/state/venv"]
        forms += [".pixi/envs/default", ".pixi/envs/*"] if directory != home else []  # in ~/.pixi pixi has tools
        prefixes = [prefix for form in forms for prefix in found_in([directory], form)]
        named = native(read_text(os.path.join(directory, ".venv")).strip())  # pipenv's file
        prefixes += found_in([directory, *OUT_OF_TREE], named) if named else []
        places = list(OUT_OF_TREE)
        for config in [*configs, os.path.join(directory, "poetry.toml")]:
            told = re.findall(POETRY_SETTING, native(read_text(config)))
            places += [path if name == "path" else path + "/virtualenvs" for name, path in told]
        for path in (directory, os.path.join(directory, "Pipfile")):
            hashed = base64.urlsafe_b64encode(hashlib.sha256(os.fsencode(path)).digest())[:8].decode()
            prefixes += sorted(found_in(places, "*-%s*" % hashed), key=time_of, reverse=True)
        for prefix in dict.fromkeys(map(os.path.normpath, prefixes)):
            if found_in([prefix], "pyvenv.cfg") or found_in([prefix], "bin/python"):
                yield directory, prefix


def activated(prefix: str) -> "Dict[str, str]":
    """Return our environment with another one activated in it: a venv's name; of conda's, also what its packages set.

    As `conda activate` does (docs.conda.io, "Managing environments"): its variables, then the scripts in activate.d.
    """
    outer = os.environ.get("CONDA_PREFIX", "")
    if not os.path.isdir(os.path.join(prefix, "conda-meta")) or outer == prefix:
        is_venv = os.path.exists(os.path.join(prefix, "pyvenv.cfg"))
        return dict(os.environ, VIRTUAL_ENV=prefix) if is_venv else dict(os.environ)
    above, name = os.path.split(prefix)
    name = "base" if found_in([prefix], "condabin") else name if os.path.basename(above) == "envs" else prefix
    own_environ = dict(os.environ, CONDA_PREFIX=prefix, CONDA_DEFAULT_ENV=name, CONDA_SHLVL="1")
    own_environ["PATH"] = os.path.join(prefix, "bin") + os.pathsep + own_environ.get("PATH", os.defpath)
    state = os.path.join(prefix, "conda-meta/state")  # `conda env config vars set`
    for path in [*found_in([prefix], "etc/conda/env_vars.d/*.json"), state]:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # it may be the administrator's
            several = json.loads(read_text(path))
            several = several.get("env_vars", {}) if path == state else several
            own_environ.update({name: str(value) for name, value in several.items() if value != "***unset***"})
    script = 'for file in %s/etc/conda/deactivate.d/*.sh "$CONDA_PREFIX"/etc/conda/activate.d/*.sh; '
    script = script % shlex.quote(outer) + 'do [ ! -r "$file" ] || . "$file"; done; '
    pixi = found_program("pixi") if found_in([prefix], "conda-meta/pixi") else ""
    if pixi:  # which repeats that, and adds what the project's manifest sets
        words = 'shell-hook --shell bash --environment "${CONDA_PREFIX##*/}" --frozen --no-install'
        script += 'hook=$(cd "$CONDA_PREFIX" && %s %s) && eval "$hook"; ' % (shlex.quote(pixi), words)
    nonce = os.urandom(8).hex()
    argv = [shutil.which("bash") or "/bin/sh", "-c", script + dump_command(nonce)]
    return environment_in(run_command(argv, SHELL_TIMEOUT_S, own_environ)[1], nonce) or own_environ


# -c and -m put the current directory first among what is imported, as an empty entry. A plain directory of a module's
# name makes a namespace, which has no location.
HAS_MODULE = (
    "import sys; sys.path[:] = filter(None, sys.path); from importlib.util import find_spec; "
    "spec = find_spec(sys.argv[1]); sys.exit(0 if spec and spec.has_location else %d)" % EXIT_NO_JUPYTER
)
RUN_MODULE = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    "runpy.run_module('%s', run_name='__main__', alter_sys=True)"
)

# What makes environments: a file of it, in the environment or in its project's directory; the program; what makes one
# anew; what adds Jupyter to one. The first row holds whose file and program are there, and that has what is wanted.
MAKERS = [
    ("prefix/conda-meta/pixi", "pixi", "{cmd} clean && ", "cd {project} && {anew}{cmd} add {what}"),
    ("prefix/conda-meta", "conda", "{cmd} create -p {prefix} && ", "{anew}{cmd} install -p {prefix} {what}"),
    ("prefix/conda-meta", "micromamba", "", "{cmd} install -p {prefix} -c conda-forge {what}"),
    ("project/poetry.lock", "poetry", "{cmd} install && ", "cd {project} && {anew}{cmd} add --group dev {what}"),
    ("project/Pipfile", "pipenv", "{cmd} --rm && ", "cd {project} && {anew}{cmd} install --dev {what}"),
    ("project/uv.lock", "uv", "{cmd} sync && ", "cd {project} && {anew}{cmd} pip install --python {python} {what}"),
    ("prefix/lib*/*/EXTERNALLY-MANAGED", "", "", "{python} -m venv ~/jupyter && ~/jupyter/bin/pip install {what}"),
    ("prefix/lib/python3*/*-packages/pip", "", "", "{python} -m pip install {what}"),
    ("prefix/pyvenv.cfg", "uv", "{cmd} venv --clear {prefix} && ", "{anew}{cmd} pip install --python {python} {what}"),
    ("prefix/bin", "", "", "{python} -m ensurepip && {python} -m pip install {what}"),
    ("prefix/pyvenv.cfg", "", "python3 -m venv --clear {prefix} && ", "{anew}{python} -m pip install {what}"),
    ("prefix/conda-meta", "", "conda create -p {prefix} && ", "{anew}conda install -p {prefix} {what}"),
]


def how_to_add(python: str, project: str, is_gone: bool) -> str:
    """Return the command that adds Jupyter to an environment, and that first makes it anew where its Python is gone."""
    prefix = os.path.dirname(os.path.dirname(python))
    # A tool takes an environment for its project's by the usual name alone.
    project = prefix if os.path.basename(prefix) in ("venv", "env") else project or os.path.dirname(prefix)
    facts = {"prefix": prefix, "python": python, "project": project}
    for sign, program, anew, add in MAKERS:
        place, _, file = sign.partition("/")
        is_told = bool(found_in([facts[place]], file)) and (anew != "" or not is_gone)
        facts["cmd"] = found_program(program) if program and is_told else ""
        if is_told and bool(facts["cmd"]) == bool(program):
            quoted = {name: shlex.quote(portable(fact)) for name, fact in facts.items()}
            return add.replace("{anew}", anew if is_gone else "").format(what="notebook jupyterlab", **quoted)
    return ""


def launcher_of_python(python: str, apps: "List[str]", where: str, project: str = "") -> Launcher:
    """Return how to run Jupyter under one interpreter: by the command beside it, where that is a script of Python.

    It need not be beside it, as with `pip install --user`. Raises Failure (3) when there is no Jupyter.
    """
    problem, status = problem_of(python), 0
    if os.path.isdir(python):
        inner = os.path.join(python, "bin", "python")
        try_ = "another --python, or --env" if problem_of(inner) else "--python " + shlex.quote(portable(inner))
        why = "%s: %s" % (portable(python), problem)
        raise Failure("no Python to run Jupyter with", why, try_, EXIT_NO_JUPYTER)
    for candidate in apps if not problem else []:
        status, _, said = run_command([python, "-c", HAS_MODULE, PROGRAMS[candidate].module], COMMAND_TIMEOUT_S)
        if status == 0:
            script = os.path.join(os.path.dirname(python), PROGRAMS[candidate].command)
            how = [script] if python_named_by(script) else ["-c", RUN_MODULE % PROGRAMS[candidate].module]
            return new_launcher(candidate, [python, *how], where)
        if status != EXIT_NO_JUPYTER:
            problem = "it does not run: " + (said.strip() or "status %d" % status).splitlines()[-1]
            break
    why = "%s: %s" % (portable(python), problem or "it has no module %s" % PROGRAMS[apps[0]].module)
    add = how_to_add(python, project, bool(problem))
    what = "the Python of this environment is gone" if problem and add else "no Jupyter in this environment"
    if status not in (0, EXIT_NO_JUPYTER):  # it wants its module, another machine: nothing that is there is made anew
        what, add = "the Python of this environment does not run", shlex.quote(portable(python)) + " --version"
    raise Failure(what, why, add or "another --python, or --env", EXIT_NO_JUPYTER)


def launchers_of_project(
    root_dir: str, apps: "List[str]", channel: Channel, tried: "List[str]"
) -> "Iterator[Launcher]":
    """Yield the launchers of the project's own environments, in the opened directory and above it.

    One that has no Jupyter is named, with what adds it: its modules cannot be imported in the Jupyter of another
    environment, which is taken then. Of several in a directory, the first is named.
    """
    named = ""
    for project, prefix in environments_of_project(root_dir):
        try:
            yield launcher_of_python(os.path.join(prefix, "bin", "python"), apps, "the project's environment", project)
        except Failure as failure:
            tried.append("%s: %s; to add it: %s" % (portable(prefix), failure.why, failure.try_))
            if project != named:
                purpose = "see why" if failure.try_.endswith(" --version") else "change that"
                channel.tell("lacking", path=portable(prefix), trouble=failure.what, add=failure.try_, purpose=purpose)
            named = project


# -- places -----------------------------------------------------------------------------------------------------------


def new_launcher(app: str, argv: "List[str]", where: str) -> Launcher:
    """Return a launcher in its environment, activated. Its directory is first on PATH: `!pip` is the pip beside it.

    One of the system's stays where it is: a module's gcc comes before it.
    """
    place = os.path.dirname(argv[0])
    environment = activated(os.path.dirname(place))
    places = environment.get("PATH", os.defpath).split(os.pathsep)
    is_of_system = place in ("/bin", "/usr/bin", "/usr/local/bin") and place in places
    environment["PATH"] = os.pathsep.join(places if is_of_system else [place, *places])
    return Launcher(app=app, argv=argv, where=where, environment=environment)


def launchers_in(places: "List[str]", apps: "List[str]", where: str, tried: "List[str]") -> "Iterator[Launcher]":
    """Yield the launchers in `places`; in each of them, the apps in their order."""
    looked = []
    for place in dict.fromkeys(places):
        if not os.path.isabs(place) or not os.path.isdir(place):
            continue
        looked.append(place)
        for candidate in apps:
            script = os.path.join(place, PROGRAMS[candidate].command)
            problem = problem_of(script)
            if not problem:
                yield new_launcher(candidate, [script], where)
            elif problem != "not there":
                tried.append("%s: %s" % (portable(script), problem))
    tried.append("%s: %s" % (where, ", ".join(portable(place) for place in looked) or "nothing there"))


def python_named_by(script: str) -> str:
    """Return the Python that a script names in its first lines: a path, or a name for PATH; empty where it names none.

    Besides the plain #! line there is the form of pip and uv for long names: sh, then '''exec'.
    """
    plain, by_env = r"#!\s*(/\S*/python[\d.]*)\s", r"#!\s*/\S*/env\s+(?:-S\s+)?(python[\d.]*)\s"
    return match_head(script, plain, by_env, r"(?s).*?'''exec' [\"']?([^\"'\n]*/python[\d.]*)[\"']? ")


def interpreter_of(found: Launcher) -> str:
    """Return the Python behind a way to run Jupyter: the one its script names, else one beside it; empty for none."""
    command, *others = found.argv
    if others:
        return command  # PYTHON SCRIPT
    named = python_named_by(command)
    places = [named if os.path.isabs(named) else shutil.which(named, path=found.environment["PATH"]) or ""]
    places += [os.path.join(os.path.dirname(command), name) for name in ("python3", "python")]
    return next((place for place in places if not problem_of(place)), "")


def version_of(found: Launcher) -> str:
    """Return the installed version of the app that a launcher runs; empty when its environment does not tell."""
    commands = [found.argv[0], os.path.realpath(found.argv[0]), interpreter_of(found)]
    prefixes = [os.path.dirname(os.path.dirname(command)) for command in commands if command]
    name = PROGRAMS[found.app].module + "-[0-9]*.*-info"
    paths = found_in(prefixes, os.path.join("lib/python3*/*-packages", name))
    return os.path.basename(paths[0]).split("-")[1].replace(".dist", "").replace(".egg", "") if paths else ""


# -- an environment of our own ----------------------------------------------------------------------------------------

INSTALLED = "installed now"


def own_launcher(apps: "List[str]", where: str, tried: "List[str]") -> "List[Launcher]":
    """Return the launcher in our private virtual environment, if it is there."""
    places = [os.path.join(os.path.expanduser(VENV_DIR), "bin")]
    return list(itertools.islice(launchers_in(places, apps, where, tried), 1))


def install_commands() -> "List[List[str]]":
    """Return the commands that make our private virtual environment: by uv where it is there, venv and pip else.

    A virtual environment, never the system's Python, which its owner may have closed (PEP 668).
    """
    venv = os.path.expanduser(VENV_DIR)
    python = os.path.join(venv, "bin", "python")
    uv = found_program("uv")
    is_dead = os.path.lexists(python) and not os.path.exists(python)  # its Python is gone; a venv keeps such a link
    clear = ["--clear"] if is_dead else []
    if uv:
        make = [uv, "venv", *(clear or ["--allow-existing"]), "--system-site-packages", "--python", sys.executable]
        return [[*make, venv], [uv, "pip", "install", "--python", python, "notebook", "jupyterlab"]]
    make = [sys.executable, "-I", "-m", "venv", *clear, "--system-site-packages", venv]
    # Whatever the user's settings say of --user; pip 9, which RHEL 8 has for Python 3.6, knows no --no-user.
    install = ["env", "PIP_USER=no", python, "-I", "-m", "pip", "install", "--disable-pip-version-check"]
    upgrade = [[*install, "--upgrade", "pip"]] if sys.version_info < (3, 7) else []  # its own takes no wheels of today
    return [make, *upgrade, [*install, "notebook", "jupyterlab"]]


def install_jupyter(apps: "List[str]", channel: Channel) -> Launcher:
    """Install Jupyter into our private virtual environment, one at a time, and return its launcher.

    Raises Failure (3) when it fails.
    """
    venv = os.path.expanduser(VENV_DIR)
    commands = install_commands()
    channel.tell("installing", path=portable(venv), tool="uv" if commands[0][0].endswith("uv") else "pip")
    began = time.monotonic()
    with one_at_a_time(os.path.dirname(venv), channel, "another run of rjupyter is installing it; waiting"):
        found = own_launcher(apps, INSTALLED, [])
        asked = [interpreter_of(found[0]), "-c", HAS_MODULE, PROGRAMS[found[0].app].module] if found else []
        has_it = asked and not run_command(asked, COMMAND_TIMEOUT_S)[0]  # its Python may be a newer one by now
        for argv in [] if has_it else commands:
            status, output = run_with_progress(argv, channel)
            if status:
                why = "%s\n%s" % (" ".join(argv), output)
                raise Failure("Jupyter could not be installed", why, how_to_install(), EXIT_NO_JUPYTER)
        found = own_launcher(apps, INSTALLED, [])
        if not found:
            what = "Jupyter was installed, but its command is not there"
            raise Failure(what, portable(venv), "remove it there", EXIT_NO_JUPYTER)
    channel.tell("installed", path=portable(venv), seconds=time.monotonic() - began)
    return found[0]


def run_with_progress(argv: "List[str]", channel: Channel) -> "Tuple[int, str]":
    """Run a command, its last line sent as progress; return its status and the end of its output.

    It is ended when nobody waits for it any more: the next one who does begins it again.
    """
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        growing = Growing(output.name)
        lines = []  # type: List[str]

        def look() -> bool:
            has_ended = process.poll() is not None
            lines.extend(line.strip() for line in growing.lines(has_ended))
            channel.progress(lines[-1][:60] if lines else "")
            return has_ended or channel.is_closed

        until(look, float("inf"), slowest_s=0.2)
        if process.poll() is None:
            end_session(process)
        return process.wait(), "\n".join(lines[-LOG_LINES:])


def how_to_install() -> str:
    """Return the commands that install Jupyter by hand, as a person on the host would type them."""
    home = os.path.expanduser("~")
    lines = [" ".join("~" + w[len(home) :] if w.startswith(home + "/") else w for w in c) for c in install_commands()]
    if not os.path.isdir(os.path.join(os.path.dirname(os.__file__), "ensurepip")):
        lines.insert(0, "sudo apt install python3-venv   (this Python has no ensurepip)")
    return "on the host:\n" + "\n".join(portable(line) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# servers
#
# A Jupyter server on the host: launched, found again, asked, shut down. What it binds and its token, Jupyter's own
# runtime file says; that it answers, and with our token alone, is seen by asking it.
# ---------------------------------------------------------------------------------------------------------------------


# -- Jupyter's own files ----------------------------------------------------------------------------------------------


def data_dir(environment: "Any" = os.environ) -> str:
    """Return where Jupyter keeps what is the user's (jupyter_core.paths)."""
    home = os.path.expanduser("~")
    default = os.path.join(home, "Library/Jupyter") if sys.platform == "darwin" else ""
    data = default or os.path.join(environment.get("XDG_DATA_HOME") or os.path.join(home, ".local/share"), "jupyter")
    return environment.get("JUPYTER_DATA_DIR") or data


def runtime_dirs(environment: "Any" = os.environ) -> "List[str]":
    """Return where Jupyter keeps its runtime files (jupyter_core.paths), and the places that we fall back to."""
    usual = os.path.join(data_dir(environment), "runtime")
    return [environment.get("JUPYTER_RUNTIME_DIR") or usual, usual, os.path.join(own_tmp_dir(), "runtime")]


def runtime_dir(has_sockets: bool) -> str:
    """Return Jupyter's runtime directory, made when it is missing, closed to others.

    Jupyter writes jpserver-PID-open.html there, which holds the token, and only its umask decides who reads that. To
    close the directory does no harm; another umask would, for every file that the user's kernels write.
    XDG_RUNTIME_DIR, which old versions used, vanishes at logout. With `has_sockets` it is one that can hold the
    kernels' sockets.
    """
    *places, last = runtime_dirs()
    session = os.path.join(os.environ.get("XDG_RUNTIME_DIR") or os.devnull, "")
    for place in places:
        with contextlib.suppress(OSError):
            is_lasting = not place.startswith(session)
            if is_lasting and private_dir(place) and (not has_sockets or can_hold_kernels(place)):
                return place
    return first_private([last])


def foreign_files() -> "List[str]":
    """Return the files that Jupyter writes for each notebook and that we may not write: `sudo jupyter` leaves such."""
    data = data_dir()
    paths = [data, os.path.join(data, "nbsignatures.db"), os.path.join(data, "notebook_secret")]
    paths += [os.path.expanduser(path) for path in ("~/.jupyter", "~/.ipython")]
    theirs = [path for path in paths if os.path.exists(path) and os.stat(path).st_uid != own_uid()]
    return [portable(path) for path in theirs if not os.access(path, os.W_OK)]


def can_hold_kernels(directory: str) -> bool:
    """True when a directory can hold the sockets of kernels."""
    return can_hold_socket(os.path.join(directory, "kernel-%036d-ipc-5" % os.getpid()))


def can_hold_socket(path: str) -> bool:
    """True when a socket can be made at `path`: short enough, on a file system that knows them, plain for ssh's -L."""
    if not re.match(r"[\w/.,+@=-]+\Z", path, re.ASCII):
        return False
    with contextlib.suppress(OSError):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.bind(path)
        os.unlink(path)
        return True
    return False


def runtime_files(directory: str) -> "Iterator[Tuple[str, int, str]]":
    """Yield the runtime files of servers in a directory, each as its kind, the server's pid, and its path.

    One that is not ours is never removed: it may be another node's, on a shared home.
    """
    for path in glob.glob(os.path.join(glob.escape(directory), "*.json")):
        match = re.fullmatch(r"(jpserver|nbserver)-([0-9]{1,9})\.json", os.path.basename(path))
        if match:
            yield match.group(1), int(match.group(2)), path


def left_by_jupyter(record: ServerRecord) -> "List[str]":
    """Return the files that Jupyter removes when it ends: not when it is killed, nor when it cannot bind."""
    files = [path for _, pid, path in runtime_files(native(record.runtime_dir)) if pid == record.pid]
    return files + [path[: -len(".json")] + "-open.html" for path in files]


def server_info(record: ServerRecord) -> "Optional[RuntimeInfo]":
    """Return what leads to a server; None before it listens.

    Where Jupyter's own file is gone, what we wrote down leads there: on another node of a shared home, `jupyter server
    list` removes that file.
    """
    info = runtime_info(record) or record.info
    return info and (info if place_of(record).is_here else from_elsewhere(record, info))


def from_elsewhere(record: ServerRecord, info: RuntimeInfo) -> RuntimeInfo:
    """Return what leads to a server from other nodes: one that listens on all addresses is reached by its node's.

    Its 127.0.0.1 is ours only on its own node.
    """
    address = record.request.node_address
    has_other = record.job and address and not info.sock and info.host in ("127.0.0.1", "::1")
    return info.but(host=address) if has_other else info


def runtime_info(record: ServerRecord) -> "Optional[RuntimeInfo]":
    """Return what Jupyter's own runtime file says of a server; None where there is none.

    The file is named for the pid; a wrapper that does not exec makes it a child's, in the session that we launched.
    """
    is_here = place_of(record).is_here
    for _, pid, path in runtime_files(native(record.runtime_dir)):
        if record.pid == pid or (is_here and session_of(pid) == record.pid):
            return read_record(RuntimeInfo, path)
    return None


# -- ask it -----------------------------------------------------------------------------------------------------------


def can_ask_server(record: ServerRecord, info: RuntimeInfo) -> bool:
    """False for a server on another node that only its own node reaches."""
    return place_of(record).is_here or not info.is_inner


# How Jupyter's log has what `answers` asks with another token; a line before it ends in "Forbidden".
OUR_PROBE = "403 GET /api/status?no_track_activity=1"


def ask_server(
    info: RuntimeInfo, path: str, method: str = "GET", timeout_s: float = ASK_TIMEOUT_S, **more: "Any"
) -> "Tuple[int, Any]":
    """Ask a server on this host, with its token; return the HTTP status and the JSON, or 0 when there is no answer.

    Another user who listens in its place is told no token.
    """
    address = native(info.sock) or (info.host, info.port)
    if info.token and not is_our_port(info):
        return 0, None
    try:
        status, body = http_request(
            address, info.base_url + path, info.token, timeout_s, method=method, is_secure=info.is_secure, **more
        )
    except OSError:
        return 0, None
    with contextlib.suppress(ValueError, RecursionError):
        return status, json.loads(body.decode("utf-8", "replace"))
    return status, None


def answers(info: RuntimeInfo) -> bool:
    """True when the server takes its token: Jupyter writes its runtime file before it binds, and may lose its port.

    Whoever else took the port may take any token: a server of ours listens under our own uid, and refuses another
    token. With a password and no token at all, that it asks for the password must do.
    """
    if ask_server(info, STATUS_PATH)[0] not in info.good_statuses or not is_our_port(info):
        return False
    return not info.token or ask_server(info.but(token=os.urandom(8).hex()), STATUS_PATH)[0] in (401, 403)


def listens(info: RuntimeInfo) -> bool:
    """True when something takes connections where a server should; it need not answer."""
    try:
        connected_to(native(info.sock) or (info.host, info.port), ASK_TIMEOUT_S).close()
    except socket.timeout:
        return True  # it is so busy that even its queue is full
    except OSError:
        return False
    return True


def is_our_port(info: RuntimeInfo) -> bool:
    """False when another user listens where this server should."""
    with contextlib.suppress(OSError):
        return bool(info.sock) or owner_of_tcp((info.host, info.port), 0) in (None, own_uid())
    return True  # a host name in place of an address, or a node that a job runs on


def wait_for_server(record: ServerRecord, timeout_s: float) -> "Optional[RuntimeInfo]":
    """Wait until a server answers, and return what leads to it; None when it ended, or not within `timeout_s`.

    Raises Failure when that is nothing which fits into an address.
    """
    place = place_of(record)

    def look() -> "Any":
        if not place.is_running():
            return "it ended"
        info = server_info(record)
        if info and info.unusable():
            name = info.unusable()[0]
            why = "its configuration has a %s with a space, or a character that no address can hold" % name
            raise Failure("Jupyter cannot be opened with this %s" % name, why, "another %s there" % name)
        return None if info and can_ask_server(record, info) and not answers(info) else info

    found = until(look, timeout_s)
    return found if isinstance(found, RuntimeInfo) else None


def come_back(record: ServerRecord, start_timeout_s: float) -> "Optional[RuntimeInfo]":
    """Return what leads to a server that runs, waiting where it was launched a moment ago; None when it ended.

    One that hangs is returned too: the client waits for it. Raises Failure when someone else has its port.
    """
    # It may have been launched by a client that has gone since. One that has answered once gets no patience.
    patience_s = 0.0 if record.has_answered else max(0.0, start_timeout_s - record.age_s())
    place = place_of(record)
    info = wait_for_server(record, patience_s)
    if info or not place.is_running():
        return info
    info = server_info(record)
    if info and place.settle_s and can_ask_server(record, info) and not listens(info):
        until(lambda: not place.is_running(), LIFE_S)  # it has ended with its job; that is known a little later
        return info if place.is_running() else None
    status = ask_server(info.but(token=""), STATUS_PATH)[0] if info else 0
    if info and status and answers(info):  # it was slow for a moment
        return info
    if info and not runtime_info(record) and (status or until(lambda: not listens(info), ASK_TIMEOUT_S)):
        return None  # it is about to end, and its port is another's already, or soon nobody's
    if info and status:
        why = "what listens there is not the server %s: it accepts any token, or another, or is not yours" % record.id
        what = "something else answers on port %d of the host" % info.port
        raise Failure(what, why, "rjupyter HOST --new   (starts another)")
    return info


# -- launch -----------------------------------------------------------------------------------------------------------


BESIDE = []  # type: List[Callable[[ServerRecord, Launcher], None]] # each starts something beside a new server
COMPUTING = []  # type: List[Callable[[ServerRecord], List[str]]] # each knows kernels of a server that compute
ENDING = []  # type: List[Callable[[Request, Channel], None]] # each ends what has no record, by its name
TELLING = []  # type: List[Callable[[Request, str], List[Away]]] # each has something for who comes back to a server


def launch_server(found: Launcher, request: Request, root_dir: str, channel: Channel) -> "Optional[ServerRecord]":
    """Launch Jupyter by one launcher, where it can first listen; None when its command cannot be run at all.

    A way to listen may fail: then the next one is tried, as long as Jupyter says that this was the cause. Raises
    Failure: 4 when it ended for another reason, 6 when it did not listen in time.
    """
    directory = new_dir(KINDS["server"], channel)
    log = os.path.join(directory, "log")
    environment = environment_of_server(found, request, directory)
    deadline = time.monotonic() + request.start_timeout_s
    settings = transport_of_kernels(found, request, environment["JUPYTER_RUNTIME_DIR"], channel)
    settings += server_arguments(request, root_dir, directory)
    for port, listen in ways_to_listen(request, directory):
        argv = [*found.argv, "--no-browser", *listen, *settings]
        with start_detached(argv, environment, root_dir or os.path.expanduser("~"), log, request.is_held) as process:
            record = ServerRecord(
                request=request.but(nonce="", app=found.app),
                app=found.app,
                port=port,
                runtime_dir=portable(environment["JUPYTER_RUNTIME_DIR"]),
                local_port=request.local_port,
                has_answered=False,
                **facts_of(process.pid, root_dir, request),
            )
            write_down(record, directory)
        try:
            info = wait_for_server(record, deadline - time.monotonic())
            if info:
                tell_of_launch(request, info, log, channel)
            elif process.poll() is None:
                words = request.start_timeout_s, end_of_log(log)
                why = "it was not listening after %d s; the end of its log:\n%s" % words
                raise Failure("Jupyter did not start in time", why, "a longer --start-timeout", EXIT_TIMEOUT)
        except Failure:
            end_session(process)
            remove_files(left_by_jupyter(record))
            set_aside(directory)
            raise
        if info:
            record.root_dir, record.port, record.has_answered, record.info = info.root_dir, info.port, True, info
            record.app_version = version_of(found)
            write_down(record, directory)
            for start in BESIDE:
                try:
                    start(record, found)
                except OSError as error:
                    channel.tell("note", text="What cells print is not kept for later: %s" % error)
            return record
        remove_files(left_by_jupyter(record))
        tail = end_of_log(log)
        # A shell's own status for what it cannot run; or the script of an earlier Python, whose packages are gone.
        lacks = r"(No module named|metadata was found for|PackageNotFoundError:|NotFound: The) '?%s\b"
        if process.returncode in (126, 127) or re.search(lacks % PROGRAMS[found.app].module, tail):
            set_aside(directory)
            return None
        lost = r"Address already in use|no available port|port %d is (already in use\.|not available)" % port
        if not re.search(lost, tail) or "The socket" in tail:  # not lost between the look and its bind
            break
    why = "it exited with status %s; the end of its log:\n%s" % (process.returncode, tail or "(empty)")
    try_ = "another preferred_dir in its configuration\n" if re.search("referred.dir", tail) else ""
    try_ += "the whole log is on the host in " + portable(set_aside(directory))
    raise Failure("Jupyter did not start", why, try_, EXIT_SERVER_ENDED)


def tell_of_launch(request: Request, info: RuntimeInfo, log: str, channel: Channel) -> None:
    """Say what a server leaves out of its configuration, and who reaches it; raises Failure where that is anyone.

    Or where it is none by the socket that is asked for.
    """
    if request.socket and not info.sock:
        why = "this Jupyter knows none, or its configuration says where it listens"
        raise Failure("Jupyter listens on no socket", why, "open without --socket", EXIT_SERVER_ENDED)
    broken = re.findall(r"Exception while loading config file (.+)\n((?: .*\n)+)", read_text(log))
    for path, said in dict(broken).items():
        lines = re.findall(r'File "%s", line (\d+)' % re.escape(path), said)
        place = portable(path) + (", line %s" % lines[-1] if lines else "")
        channel.tell("unread", place=place, why=said.strip().split("\n")[-1].strip())
    if info.sock or owner_of_tcp(("0.0.0.0", info.port), 0) != own_uid():
        return
    if not info.token and ask_server(info, STATUS_PATH)[0] == 200:
        why = "it listens on all addresses, and its configuration takes away its token"
        raise Failure("Jupyter would let anyone in", why, "a token there, or no other ip", EXIT_SERVER_ENDED)
    if request.ip.startswith("127."):
        channel.tell("wide", node=os.uname().nodename)


def environment_of_server(found: Launcher, request: Request, directory: str) -> "Dict[str, str]":
    """Return the environment of a server. Files of its directory have what we add to its configuration, and its token.

    The token is made there, and is in no argv: that can be read.
    """
    token_file = os.path.join(directory, "token")
    write_whole(token_file, os.urandom(24).hex())
    environment = dict(lasting_environment(found.environment, request.socket), JUPYTER_TOKEN_FILE=token_file)
    for name in ("server", "notebook"):  # the latter up to Notebook 6
        write_whole(os.path.join(directory, "jupyter_%s_config.py" % name), ADDED)
    places = [directory, environment.get("JUPYTER_CONFIG_PATH")]
    environment["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, places))
    if request.is_held:
        own = private_dir(os.path.join(directory, "r"))  # two nodes may have one pid; short, for the kernels' sockets
        if not request.socket or can_hold_kernels(own):
            environment["JUPYTER_RUNTIME_DIR"] = own
    return environment


def lasting_environment(environment: "Dict[str, str]", has_sockets: bool) -> "Dict[str, str]":
    """Return the environment for what outlives this session: the user's, less what ends with it."""
    gone = ("XDG_RUNTIME_DIR", "XDG_SESSION_ID", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")
    kept = {name: value for name, value in environment.items() if name not in gone}
    home = (of_terminal or {}).get("HOME") or os.path.expanduser("~")
    return dict(kept, HOME=home, JUPYTER_RUNTIME_DIR=runtime_dir(has_sockets))


def ways_to_listen(request: Request, directory: str) -> "Iterator[Tuple[int, List[str]]]":
    """Yield where Jupyter may listen, best first, each as a port (0 for a socket) and Jupyter's arguments for it.

    A socket lies with the server's files, or below /tmp where they cannot hold one. Which port it is, the user's own
    configuration may say; without, Jupyter looks for a free one itself. What that has for NotebookApp wins over what
    Jupyter Server is told for ServerApp, so both are told.
    """
    if request.socket:
        path = os.path.join(directory, "socket")
        if not can_hold_socket(path):
            path = os.path.join(private_dir(own_tmp_dir()), os.path.basename(directory) + ".socket")
        usual = ["--%s.port=%d" % (app, DEFAULT_PORT) for app in ("ServerApp", "NotebookApp")]  # no other beside it
        yield 0, ["--sock=" + path, *usual]
        return
    port = request.port or DEFAULT_PORT
    listen = ["--ServerApp.ip=" + request.ip, "--NotebookApp.ip=" + request.ip]
    if not request.port:
        yield port, listen
    for _ in range(100):
        port = find_free_port(port, request.ip)
        yield port, [*listen, "--ServerApp.port=%d" % port, "--NotebookApp.port=%d" % port]
        port += 1


# How the command of a kernel begins that takes sockets, by its kernel.json: ipykernel, what is built on it, IRkernel
# since 1.0, IJulia, xeus-python. Jupyter would wait in vain for one on the JVM, one of Deno's, or one behind ssh.
TAKES_SOCKETS = r"\S*(python[\d.]* (-\S+ )*-m (ipy|bash_|octave_)kernel|R .*IRkernel::|julia\S* .*IJulia|xpython )"


def takes_sockets(argv: "List[str]") -> bool:
    """True for the command of a kernel that is known to take sockets; there may be spaces in a path."""
    return bool(re.match(TAKES_SOCKETS, " ".join(str(word).replace(" ", "_") for word in argv)))


def transport_of_kernels(found: Launcher, request: Request, runtime: str, channel: Channel) -> "List[str]":
    """Return what Jupyter's command line says of where kernels listen: on sockets in a directory that is ours alone.

    Their ports ask nobody for a password: any user of the host reads there what they print, and the code. Where it must
    be ports, a line says so. It is one way for all kernels of a server.
    """
    sockets = "--KernelManager.transport=ipc"
    prefixes = [os.path.dirname(os.path.dirname(interpreter_of(found))), "/usr/local", "/usr"]
    own = os.environ.get("JUPYTER_CONFIG_DIR") or "~/.jupyter"
    homes = [own, "/etc/jupyter", *[prefix + "/etc/jupyter" for prefix in prefixes]]
    homes += filter(None, found.environment.get("JUPYTER_CONFIG_PATH", "").split(":"))
    files = [path for form in ("jupyter_*config*", "jupyter_*config.d/*.json") for path in found_in(homes, form)]
    theirs = re.sub(r"(?m)^\s*#.*", "", "\n".join(read_text(path, 1 << 20) for path in files))
    if re.search(r"KernelManager\W+(transport|ip)\b", theirs + "".join(request.server_args)) and not request.socket:
        return []
    can_hold = request.socket or can_hold_kernels(runtime)
    why = "" if can_hold else "%s can hold no sockets. To put them elsewhere: --socket" % runtime
    tops = [data_dir(), *[prefix + "/share/jupyter" for prefix in prefixes]]
    tops += filter(None, found.environment.get("JUPYTER_PATH", "").split(":"))
    for path in found_in(tops, "kernels/*/kernel.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # what Jupyter cannot start either
            if not why and not takes_sockets(json.loads(read_text(path))["argv"]):
                name = os.path.basename(os.path.dirname(path))
                why = "the kernel %s may know no sockets. If it does: --server-arg=%s" % (name, sockets)
    if why:
        text = "Kernels listen on ports, where other users of the host can read what they print: "
        why = "Kernels listen on sockets, and %s." % why.partition(". ")[0] if request.socket else text + why
        channel.tell("note", text=portable(why))
    return [sockets] if request.socket or not why else []


def server_arguments(request: Request, root_dir: str, directory: str) -> "List[str]":
    """Return what Jupyter's command line says apart from where it listens.

    Each server signs its cookies with a secret of its own, which Jupyter makes in the server's directory. Jupyter's
    usual one is the user's: a cookie of a server that has ended would open the next one for a month.
    """
    arguments = ["--notebook-dir=" + root_dir] if root_dir else []
    arguments += ["--allow-root"] if os.getuid() == 0 else []
    settings = {"cookie_secret_file": os.path.join(directory, "cookie_secret")}  # type: Dict[str, Any]
    idle_s = request.idle_timeout_s
    if idle_s:
        settings["shutdown_no_activity_timeout"] = idle_s
        arguments.append("--MappingKernelManager.cull_idle_timeout=%d" % idle_s)
        arguments.append("--MappingKernelManager.cull_interval=%d" % min(idle_s, 60))
    for app in ("ServerApp", "NotebookApp"):  # the latter up to Notebook 6
        arguments += ["--%s.%s=%s" % (app, name, value) for name, value in settings.items()]
    return arguments + [native(argument) for argument in request.server_args]


# What is added to the user's configuration of Jupyter, from whatever places that comes: it is read last, and merged. A
# page whose link died is taken for gone after 12 s, not 90, and from then on Jupyter keeps for it what its kernels
# print (Jupyter Server's base/websocket.py). Before traitlets 5, a later value would take the place of theirs.
ADDED = """\
from traitlets.config.loader import LazyConfigValue
class Added(LazyConfigValue):
    def get_value(self, initial):
        return {"ws_ping_interval": 3000, "ws_ping_timeout": 9000, **initial, **(self._update or {})}

    def merge_into(self, other):
        if isinstance(other, LazyConfigValue):
            self.update(other._update or {})
            return self
        return self.get_value(other) if isinstance(other, dict) else other
if hasattr(LazyConfigValue, "merge_into"):
    c.ServerApp.tornado_settings = c.NotebookApp.tornado_settings = Added()
"""


def set_aside(directory: str) -> str:
    """Remove the directory of a server that did not start; keep its log and return where."""
    kept = os.path.join(os.path.dirname(os.path.dirname(directory)), "failed.log")
    os.replace(os.path.join(directory, "log"), kept)
    remove_tree(directory)
    return kept


# -- all of them ------------------------------------------------------------------------------------------------------


class ServerKind(Kind):
    """Jupyter servers: ours, and those of the user's that something else started."""

    name = "server"
    record = ServerRecord

    def listed(self) -> "List[ServerRecord]":
        """Return those that run, and those that ended without a stop: who stopped one knows why it is gone."""
        return [record for record in self.records() if not is_marked(record, "stop") or self.goes_on(record)]

    def describe(self, record: ServerRecord) -> ServerView:
        names = ("id", "node", "app", "root_dir", "is_ours", "manager", "job")
        facts = {name: getattr(record, name) for name in names}
        place = place_of(record)
        view = ServerView(age_s=record.age_s(), wrap=record.request.outside, pid=place.held.pid, **facts)
        is_running = place.is_known and place.is_running()
        info = server_info(record) if is_running else None
        if info:
            view.port, view.sock = info.port, info.sock
        if not place.is_known:
            view.state = "on " + record.node
        elif not info:
            view.state = "starting" if is_running else "ended"
        elif can_ask_server(record, info) and not answers(info):
            view.state = "no answer"
        elif can_ask_server(record, info):
            _, kernels = ask_server(info, "api/kernels?no_track_activity=1")
            kernels = [kernel for kernel in kernels if isinstance(kernel, dict)] if isinstance(kernels, list) else []
            view.kernels = len(kernels)
            view.busy = len([kernel for kernel in kernels if kernel.get("execution_state") == "busy"])
            _, status = ask_server(info, STATUS_PATH)
            view.idle_s = seconds_since(status.get("last_activity")) if isinstance(status, dict) else None
        return view

    def end(self, record: ServerRecord) -> None:
        """End one: ask Jupyter itself, which ends its kernels too; then its place ends it.

        No kernel outlives it; and what Jupyter removes when it ends by itself is removed when it was killed, too.
        """
        if record.is_ours:
            mark(record, "stop")  # for a tunnel that notices before we are done
        info = server_info(record)
        leftovers = left_by_jupyter(record)
        place = place_of(record)
        children = place.children()
        if info and can_ask_server(record, info):
            ask_server(info, "api/shutdown", "POST")
        place.end(children, polite_s=5)
        leftovers += [native(info.sock)] if info and info.sock and record.is_ours else []
        remove_files([] if place.is_here and place.is_running() else leftovers)
        if not record.is_ours:
            return
        # What its cells printed is kept, with its record and its log; without cells, nothing: and first no record, for
        # one without the word "stop" beside it would tell another end.
        gone = ["server.json", ""]
        if found_in([record.file("cells")], "*.journal"):
            kept = ("cells", "log", "server.json", "stop")
            gone = [name for name in os.listdir(record.directory) if name not in kept]
        for name in gone:
            remove_tree(record.file(name))


KINDS["server"] = ServerKind()

# Words in the command line of a server that it may end, and whose page leads elsewhere.
JUPYTERHUB = ("jupyterhub-singleuser", "jupyterhub.singleuser", "jupyter-labhub")


def other_servers(ended: str = "") -> "List[ServerRecord]":
    """Return records, as ours, of the user's servers that something else started: those whose runtime files we see.

    Their ids are "p" and the pid; of one that has `ended`, its id must be given. Nothing of them is ever removed: they
    may run on another node of a shared home. Hundreds may have been left there: one without a process costs a look.
    """
    ours = KINDS["server"].records()
    found = {}  # type: Dict[str, ServerRecord]
    pids = filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else [])
    theirs = [environment_of(int(pid)) for pid in pids]  # a terminal may have set another place than we have
    places = [runtime_dirs(each)[0] for each in theirs if each.get("HOME") == os.environ.get("HOME")]
    for directory in dict.fromkeys([*runtime_dirs(), *places, *[native(record.runtime_dir) for record in ours]]):
        for kind, pid, path in runtime_files(directory):
            try:
                if ended != "p%d" % pid:
                    os.kill(pid, 0)  # it is there, and ours to end: asked of the system, without a ps
                created = os.stat(path).st_mtime
            except (OSError, OverflowError):
                continue
            info = read_record(RuntimeInfo, path)
            if pid < 2 or not info or [r for r in ours if r.pid in (pid, session_of(pid))]:
                continue
            words = command_of_process(pid)
            program = r"(?i)(\A|[/\0 ])(jupyter|notebook|nbclassic)[\w.-]*(?<!\.ipynb)([\0\s]|\Z)"
            if words and not re.search(program, words):
                continue  # its pid is another process's now, be it a kernel of ~/jupyter
            # Of a jpserver the file does not tell: its command line names Lab's command, or its module.
            is_lab = kind == "jpserver" and any(sign in words for sign in APPS["lab"][1:3])
            record = ServerRecord(
                app="lab" if is_lab else "notebook",
                manager="JupyterHub" if any(sign in words for sign in JUPYTERHUB) else "",
                runtime_dir=portable(directory),
                local_port=0,
                **dict(facts_of(pid, native(info.root_dir), Request()), created=created),
            )
            record.id, record.is_ours = "p%d" % pid, False
            if record.identity or record.id == ended:  # without one, it is a zombie
                found[record.id] = record
    return sorted(found.values(), key=lambda record: float(record.created), reverse=True)


def seconds_since(moment: "Any") -> "Optional[float]":
    """Return how long ago a moment was, in seconds, from the form that Jupyter's API has (ISO 8601, UTC)."""
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, time.time() - calendar.timegm(time.strptime(str(moment)[:19], "%Y-%m-%dT%H:%M:%S")))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# host actions
#
# What the host can be asked: each is a function of a request and the channel, which returns its reply, and a row of
# REQUESTS.
# ---------------------------------------------------------------------------------------------------------------------


# -- open -------------------------------------------------------------------------------------------------------------


def open_server(request: Request, channel: Channel) -> Server:
    """Come back to a server of the user's, or launch one; by a job, when one is asked for."""
    root_dir, file = resolve_path(request.path)
    with contextlib.ExitStack() as stack:
        if not request.is_new:  # two at the same moment would launch two
            text = "another run of rjupyter is opening a server; waiting"
            stack.enter_context(one_at_a_time(own_tmp_dir(), channel, text))
        found = None  # type: Optional[Server]
        begun = begun_by(request)
        starter = begun if begun and begun.kind != "server" else None
        servers = [begun] if begun else [] if request.is_new else servers_to_attach(request, root_dir)
        for record in [] if starter else servers:
            info = None if found else come_back(record, request.start_timeout_s)
            if info:
                port = record.local_port if record.is_ours else request.local_port
                facts = {"is_launched": bool(begun), "seconds": record.age_s(), "local_port": port}
                found = open_reply(record, info, **facts)
        if request.attach and not found:
            what = "the server %s is about to end" % request.attach
            raise Failure(what, "it takes no connections", "rjupyter HOST list")
        for kind in [] if found else STARTERS:
            waiting = [] if starter or request.is_new or request.attach else kind.waiting(request)
            if not starter and (waiting or kind.takes(request)):
                starter = waiting[0] if waiting else kind.begin(request, channel)
        if not found and not starter:
            if not request.wrapper:  # what runs outside cannot be seen from in there
                forget_ended(KINDS["server"])
                unknown = [record for record in KINDS["server"].listed() if not place_of(record).is_known]
                for record in matching_servers(request, root_dir or os.path.expanduser("~"), unknown)[:1]:
                    text = "Your server %s runs on another node, %s, if it has not ended. To open it, log in there."
                    channel.tell("note", text=text % (record.id, record.node))
            launched, seconds = launch(request, root_dir, channel, launch_server)
            info = server_info(launched)
            assert info is not None  # it has answered, and that is written down
            hint = "" if request.is_held else scheduler_here()
            found = open_reply(launched, info, is_launched=True, seconds=seconds, scheduler=hint)
    if starter:  # outside of the lock, for a queue may be long
        found = Server.read(KINDS[starter.kind].await_reply(starter, channel))
    assert found is not None
    check_reach(found, request)
    if file and request.attach:  # its pages are below its own directory
        root_dir, top = (os.path.realpath(place) for place in (root_dir, native(found.root_dir)))
        file = os.path.relpath(os.path.join(root_dir, file), top)
    found.file = portable(file)
    found.is_only = [record.id for record in KINDS["server"].running()] == [found.id]
    record = kept_record(KINDS["server"], found.id)
    if record:  # what another one began, it told as it sees it in there
        place = place_of(record)
        found.left_s, found.pid = place.left_s(), place.held.pid
        remedy = what_keeps(found.pid) if place.is_here and found.is_launched and not request.wrapper else ""
        if remedy:
            channel.tell("note", text="It ends when you log out of the host. To keep it: " + remedy)
    if file and record and can_ask_server(record, found):
        name = "".join("%%%02x" % byte for byte in os.fsencode(file))
        if ask_server(found, "api/contents/%s?content=0" % name)[0] == 404:
            channel.tell("note", text="Jupyter has no %s to show: it is hidden, or not in its contents." % found.file)
    found.away = [] if request.is_held else away_since(request.but(attach=found.id), channel)["away"]
    found.foreign = foreign_files()
    return found


def away_since(request: Request, channel: Channel) -> "Json":
    """Tell who comes back to a server what was missed there, each once."""
    return {"away": [away for tell in TELLING for away in tell(request, request.attach)]}


def scheduler_here() -> str:
    """Return the command of a scheduler that is on PATH here; empty for none."""
    return next(filter(None, (kind.hint() for kind in STARTERS)), "")


def what_keeps(pid: int) -> str:
    """Return what keeps a process that would end when its user logs out; empty where nothing ends it.

    logind ends a user's own manager then, unless it lingers; and what is left of a session where it was told so
    (logind.conf(5), "KillUserProcesses"; root's it spares).
    """
    group, name = read_text("/proc/%d/cgroup" % pid), "org.freedesktop.login1"
    lingers = "loginctl enable-linger   (once, there)"
    if "/user@" in group:
        return "" if os.path.exists("/var/lib/systemd/linger/" + pwd.getpwuid(os.getuid()).pw_name) else lingers
    ask = ["busctl", "get-property", name, "/" + name.replace(".", "/"), name + ".Manager", "KillUserProcesses"]
    ends = "/session-" in group and own_uid() and run_command(ask, COMMAND_TIMEOUT_S)[1].strip() == "b true"
    return lingers + '; and --wrap "systemd-run --user --scope" --new' if ends else ""


def check_reach(found: Server, request: Request) -> None:
    """Raise Failure where this host does not reach the port of a server in a job, or in a network of its own."""
    is_outside = (found.job or found.wrapper) and not request.is_held and not found.sock
    if not is_outside or request.via_node or found.request.via_node or found.node == os.uname().nodename:
        return
    try:
        socket.create_connection((found.host, found.port), timeout=ASK_TIMEOUT_S).close()
    except OSError as error:
        what = "%s does not reach port %d of %s" % (os.uname().nodename, found.port, found.node)
        why = "%s: %s\nthe server %s runs there" % (found.host, error, found.id)
        try_ = "--via-node, which logs in to the node itself; or --node-address, for a new one"
        raise Failure(what, why, try_ if found.job else "--socket; or a wrapper that leaves the host's network")


def begun_by(request: Request) -> "Any":
    """Return what this same request began when it was sent before, if it did; what is in a job has no errand.

    Another is begun in place of a server that has ended, or of a job that was never taken.
    """
    kept = [record for kind in KINDS.values() for record in kind.records()] if request.errand else []
    for record in [record for record in kept if record.request.errand == request.errand]:
        stays = record.number if isinstance(record, JobRecord) else record.kind != "server"
        if not is_marked(record, "unwanted") and (stays or KINDS[record.kind].goes_on(record)):
            return record
    return None


def open_reply(record: ServerRecord, info: RuntimeInfo, **facts: "Any") -> Server:
    """Return what our record and Jupyter's runtime file say together."""
    if not info.token and not info.has_password:  # as `jupyter server password` has it
        info.has_password = ask_server(info, STATUS_PATH)[0] in (401, 403)
    info = from_elsewhere(record, info)
    of_record = {name: value for name, value in record.facts().items() if name in Server.fields}
    return Server(**dict(of_record, id=record.id, **dict(info.facts(), **facts)))


def matching_servers(
    request: Request, root_dir: str, among: "Optional[List[ServerRecord]]" = None
) -> "List[ServerRecord]":
    """Return the servers that the request means: same PATH, app and environment, each as far as it is named.

    Of ours that run, or `among` others.
    """
    servers = KINDS["server"].running() if among is None else among
    servers = [server for server in servers if request.allows(server.request)]
    return [server for server in servers if not root_dir or is_same_dir(server.root_dir, root_dir)]


def is_same_dir(root_dir: str, wanted: str) -> bool:
    """True when the directory of a record is the one that is wanted, through whatever links."""
    return os.path.realpath(native(root_dir)) == os.path.realpath(wanted)


def servers_to_attach(request: Request, root_dir: str) -> "List[ServerRecord]":
    """Return the servers to come back to, best first: the one named by `attach`, else ours, else others of this PATH.

    Raises Failure when the one that was named does not run.
    """
    if request.attach:
        found = [record for record in KINDS["server"].running() + other_servers() if record.id == request.attach]
        if not found:
            check_elsewhere([request.attach])
            raise Failure("no server of yours has this id: " + request.attach, "", "rjupyter HOST list")
        if found[0].manager:
            why = "its page is reached through the %s that started it" % found[0].manager
            raise Failure("%s is a server of %s" % (request.attach, found[0].manager), why, "its address there")
    else:
        found = matching_servers(request, root_dir)
        if root_dir and request.allows(Request(app=request.app)):  # of others we know neither environment nor job
            others = [other for other in other_servers() if not other.manager and request.app in ("", other.app)]
            for record in [other for other in others if is_same_dir(other.root_dir, root_dir)]:
                info = server_info(record)
                found += [record] if info and not info.unusable() and answers(info) else []
    return found


# -- list and logs ----------------------------------------------------------------------------------------------------


def list_all(request: Request, channel: Channel) -> "Json":
    """Describe everything of the user's on this host; servers, which are asked, all at the same time."""
    within = resolve_path(request.path)[0]
    records = [record for record in KINDS["server"].listed() + other_servers() if is_below(record, within)]
    if len(records) < 2:  # nearly always: what follows takes longer to import than all else takes here
        views = list(map(KINDS["server"].describe, records))
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(len(records), 16)) as pool:
            views = list(pool.map(KINDS["server"].describe, records))
    others = {
        kind.name + "s": [kind.describe(r) for r in kind.listed() if is_below(r, within)]
        for kind in KINDS.values()
        if kind.name != "server"
    }
    return dict(others, servers=views)


def is_below(record: Kept, directory: str) -> bool:
    """True for what is in a directory, or below it, or is to be there; where none is named, for all."""
    place = native(record.root_dir or os.path.join(os.path.expanduser("~"), record.request.path or ""))
    top = os.path.join(os.path.realpath(directory), "")
    return not directory or os.path.join(os.path.realpath(place), "").startswith(top)


def follow_log(request: Request, channel: Channel) -> Record:
    """Send the log of the newest server, or of what has the id, tokens taken out; of a run, what its cells printed.

    With `is_followed` until the client or what writes it has gone. `line` is the number of those that are known
    already.
    """
    records = KINDS["server"].listed() or KINDS["server"].records()
    if request.id:
        records = [record for kind in KINDS.values() for record in kind.records() if record.id == request.id]
    if not records:
        what = "nothing of yours has this id: " + request.id if request.id else "no server of yours is known there"
        raise Failure(what, "logs are kept of the servers and runs that rjupyter launched", "rjupyter HOST list")
    record = records[0]
    log = KINDS[record.kind].log_of(record)
    numbers = itertools.count()

    def send_lines() -> bool:
        # Before the look: what it wrote last is seen.
        is_last = not request.is_followed or not KINDS[record.kind].goes_on(record)
        for line in log.lines(has_ended=is_last):
            if next(numbers) >= request.line:
                channel.tell("line", text=without_tokens(line), id=record.id)
            if channel.is_closed:
                break
        return is_last or channel.is_closed

    until(send_lines, float("inf"), slowest_s=0.2)
    return Record()


# -- stop -------------------------------------------------------------------------------------------------------------


def stop_all(request: Request, channel: Channel) -> "Json":
    """End servers, runs and jobs: those named by id, the server of the PATH, or the only one; all with `is_all`.

    What is no id is the name of something else (ENDING).
    With `asks`, nothing is ended while a kernel computes, be it in a job that is named: the reply names the busy ones,
    and the client comes again.
    """
    if request.ids:
        running = [record for kind in KINDS.values() for record in kind.running()] + other_servers()
        found = [record for record in running if record.id in request.ids]
    else:
        found = what_to_stop(request)
    names = [word for word in request.ids if word not in {record.id for record in found}]
    check_elsewhere(names)
    inside = [record for record in KINDS["server"].running() if {record.job, record.wrapper} & set(request.ids)]
    views = [KINDS[record.kind].describe(record) for record in found + inside if request.asks]
    for record, view in zip(found + inside, views):
        if isinstance(view, ServerView):  # Jupyter calls a kernel idle that computes, for one
            view.busy = max([view.busy, *(len(seen(record)) for seen in COMPUTING)])
            view.kernels = max(view.kernels, view.busy)
    busy = [view for view in views if isinstance(view, ServerView) and view.busy]
    runs = [view for view in views if isinstance(view, RunView) and not request.ids]
    if busy or runs:
        return {"count": 0, "busy": busy, "runs": runs}
    for name in names:
        for end in ENDING:
            end(request.but(name=name), channel)
    failures = []
    for record in found:
        held = place_of(record).held
        try:
            KINDS[record.kind].end(record)
        except (Failure, OSError) as error:
            failures.append(error if isinstance(error, Failure) else Failure("the host refused", str(error)))
            continue
        facts = {name: getattr(record, name, None) or None for name in ("app", "root_dir", "name")}
        facts["job"] = getattr(record, "number", record.job) or None
        wrap, pid = record.request.outside or None, held.pid or None
        channel.tell("stopped", what=record.kind, id=record.id, pid=pid, wrap=wrap, **facts)
    if len(failures) > 1:
        why = "\n".join("%s: %s" % (failure.what, failure.why) for failure in failures)
        raise Failure("%d of %d were not stopped" % (len(failures), len(found)), why, failures[0].try_)
    if failures:
        raise failures[0]
    return {"count": len(found) + len(names), "busy": [], "runs": []}


def what_to_stop(request: Request) -> "List[Any]":
    """Return what a stop without an id means: the server of the PATH, the only one, a job that waits; or all."""
    root_dir = resolve_path(request.path)[0]
    if request.is_all:  # as `list` shows them
        goes_on = [record for kind in KINDS.values() for record in kind.listed() if kind.goes_on(record)]
        return [r for r in goes_on if is_below(r, root_dir) and request.app in ("", r.request.app)]
    found = matching_servers(request, root_dir)  # type: List[Any]
    found = found or [record for kind in STARTERS for record in kind.waiting(request)]
    there = found or matching_servers(Request(), root_dir)
    if len(there) > 1 or len(there) > len(found):
        names = ["%s   %s in %s" % (r.id, r.request.app or r.kind, r.root_dir or r.request.path or "~") for r in there]
        title = APPS[request.app].title if request.app else "such server"
        what = "%d servers run or wait there" % len(found) if found else "no %s runs there" % title
        raise Failure(what, "\n".join(names), "`stop` with an id, or with --all")
    return found


def check_elsewhere(ids: "List[str]") -> None:
    """Raise Failure where one of these ids is of a server on another node: this one can neither reach nor end it."""
    for record in [record for record in KINDS["server"].listed() if record.id in ids]:
        if not place_of(record).is_known:
            raise Failure("%s is on another node, %s" % (record.id, record.node), "", "log in there, and do the same")


def describe_end(request: Request, channel: Channel) -> EndReply:
    """Say of a server whether it still runs and answers, on this node or elsewhere; or why it ended, and its log.

    Why: first what we did, then what its place tells, then what its log does.
    """
    known = [record for record in KINDS["server"].records() + other_servers(request.id) if record.id == request.id]
    if not known:
        return EndReply(is_running=False, reason="it was stopped")
    record = known[0]
    place = place_of(record)
    if not place.is_known:
        return EndReply(is_running=True, is_elsewhere=True, node=record.node)
    info = wait_for_server(record, place.settle_s)
    if place.is_running():
        return EndReply(is_running=True, is_answering=info is not None)
    log = end_of_log(record.file("log")) if record.is_ours else ""
    is_gone = record.is_ours and not is_marked(record, "server.json")  # a stop removes its record at last
    reason = "it was stopped" if is_gone or is_marked(record, "stop") else place.why_ended(log)
    for words, meaning in (("; shutting down", "nobody used it"), ("hutting down", "it was shut down")):
        reason = reason or (meaning if words in log else "")
    # Jupyter removes this file when it ends by itself; what it logs, its configuration may hide.
    pages = ["%s-%d-open.html" % (kind, record.pid) for kind in ("jpserver", "nbserver")]
    was_killed = any(os.path.exists(os.path.join(native(record.runtime_dir), page)) for page in pages)
    if not reason:
        reason = "it was shut down" if place.is_here and not was_killed else place.why_in_doubt()
    return EndReply(is_running=False, reason=reason, log=log)


def examine_host(request: Request, channel: Channel) -> "Json":
    """Say what `doctor` asks of this host, or inside a wrapper; what cannot be told is left out."""
    for kind in STARTERS:
        if kind.takes(request):
            record = kind.begin(request, channel)
            reply = kind.await_reply(record, channel)  # type: Json
            kind.end(record)
            return reply
    facts = {"shell": os.environ.get("SHELL", ""), "foreign": foreign_files()}  # type: Json
    facts.update(state="", free_bytes=0, state_trouble=None, jupyter="", jupyter_trouble=None)
    facts["no_install"] = "" if os.path.isdir(os.path.join(os.path.dirname(os.__file__), "ensurepip")) else "ensurepip"
    try:
        place = first_private(state_dirs("servers"))
        facts.update(state=portable(place), free_bytes=shutil.disk_usage(place).free)
    except Failure as failure:
        facts["state_trouble"] = failure
    try:
        found = next(launchers(request.but(may_install=False), resolve_path(request.path)[0], channel, []))
        told = (APPS[found.app].title, version_of(found), portable(found.argv[0]), found.where)
        facts["jupyter"] = "%s %s: %s (%s)" % told
    except Failure as failure:
        if request.python or request.env or failure.status != EXIT_NO_JUPYTER:
            facts["jupyter_trouble"] = failure
    facts["sshd_port"] = int((os.environ.get("SSH_CONNECTION", "").split() or ["22"])[-1])
    uids = set()
    for process in found_in(["/proc"], "[0-9]*"):
        with contextlib.suppress(OSError):
            uids.add(os.stat(process).st_uid)
    facts["other_users"] = len([uid for uid in uids if uid >= 1000 and uid not in (os.getuid(), 65534)])
    facts["scheduler"] = scheduler_here()
    return facts


REQUESTS = {}  # type: Dict[str, Callable[[Request, Channel], Any]]
REQUESTS["open"] = open_server
REQUESTS["away"] = away_since
REQUESTS["list"] = list_all
REQUESTS["logs"] = follow_log
REQUESTS["stop"] = stop_all
REQUESTS["describe_end"] = describe_end
REQUESTS["examine"] = examine_host


# ---------------------------------------------------------------------------------------------------------------------
# agent
#
# What is sent to the host, and the conversation with it. The first half runs there: one request, messages while it
# works, one reply. The second half is the laptop's: it sends, and each kind of message has a handler. All that the host
# says is data from another machine; what is not a record of its kind ends the conversation with one error.
# ---------------------------------------------------------------------------------------------------------------------


agent_source = b""  # of this file, where it is not kept: for what is to run on the host after this agent


def agent_main(source: bytes, packed_request: bytes) -> None:
    """Run the action of one request and send one reply. Ends with status 0 whenever it replied."""
    global agent_source
    agent_source = source
    mended(os.environ)
    request = Request.read(json.loads(packed_request.decode("ascii")))
    perform(request, Channel(request.nonce))


def perform(request: Request, channel: Channel, enter: "Callable[[Request], Request]" = lambda same: same) -> "Any":
    """Run the action of a request and send one reply; return it, or nothing for a failure.

    `enter` comes first, and may change the request; what it raises is told like the rest.
    """
    global own_state_dir
    user = str(os.getuid())
    with contextlib.suppress(ImportError, KeyError):
        user = pwd.getpwuid(os.getuid()).pw_name
    version = "%d.%d.%d" % sys.version_info[:3]
    facts = {"user": user, "node": os.uname().nodename, "python": version, "is_root": os.getuid() == 0}
    channel.tell("hello", home=portable(os.path.expanduser("~")), clock=time.time(), **facts)
    try:
        request = with_variables(enter(request), channel)
        if request.state_dir:  # relative to home, as PATH is: what is launched starts in another directory
            home = os.path.expanduser("~")
            own_state_dir = os.path.normpath(os.path.join(home, os.path.expanduser(native(request.state_dir))))
        reply = REQUESTS[request.action](request, channel)
        channel.tell("reply", reply=plain(reply))
        return reply
    except Failure as expected:
        failure = expected
    except OSError as error:
        failure = Failure("the host refused", str(error))
    except Exception:
        failure = Failure("the agent failed; this is a bug of rjupyter", traceback.format_exc())
    if request.wrapper and failure.what.startswith("no ") and failure.status == EXIT_NO_JUPYTER:
        failure.try_ = "one in which there is; nothing is installed into it"
    if request.wrapper:
        failure.what = "%s inside %s" % (failure.what.replace(" on the host", ""), request.outside)
    channel.tell("reply", failure=failure.facts())
    return None


def leave_agent(directory: str, main: "Callable[[str], None]", request: Request, is_elsewhere: bool = False) -> str:
    """Leave a program in a directory, with a request beside it, and return its path: it calls `main` with that.

    This file goes there as well where it is not kept, or where the program runs `is_elsewhere`, in a job or a
    container, which may not see the place.
    """
    path = os.path.abspath(__file__)
    source = agent_source
    if is_elsewhere and not source:
        with open(path, "rb") as stream:
            source = stream.read()
    if source:
        path = os.path.join(directory, "rjupyter.py")
        write_whole(path, source.decode("utf-8"))
    program = os.path.join(directory, "agent.py")
    write_whole(program, "%sload(%r).%s(%r)\n" % (LOAD, path, main.__name__, directory))
    write_whole(os.path.join(directory, "request.json"), json.dumps(request.but(nonce="").facts()))
    return program


def left_request(directory: str) -> Request:
    """Return the request that was left there."""
    with open(os.path.join(directory, "request.json"), encoding="utf-8") as stream:
        return Request.read(json.load(stream))


def heard(said: Growing, channel: "Optional[Channel]" = None) -> "Optional[Said]":
    """Return what an agent that was left has replied since the last look at what it said; None when it has not.

    What it tells while it works is passed on to a channel: not that it is there. A damaged line is passed over.
    """
    reply = None
    for line in said.lines():
        with contextlib.suppress(ValueError, Wrong):
            message = json.loads(line)
            found = Said.read(message)
            if found.kind == "reply":
                reply = found
            elif channel and found.kind in ("progress", "note", "terminal", "found", "installing", "installed"):
                channel.tell(**message)
    return reply


def reply_in(record: Kept) -> "Optional[Said]":
    """Return what an agent that was left beside a record replied; None when it has not yet."""
    return heard(Growing(record.file("said")))


class Starter(Kind):
    """A kind of thing in which our agent does what was asked for, and stays with what it began."""

    place = Elsewhere  # type: Type[Elsewhere] # where is what is in one
    takes = None  # type: Any # (request): says whether what is asked for is to be started by a thing of this kind
    begin = None  # type: Any # (request, channel): begins one, and returns its record
    watch = None  # type: Any # (record, channel): tells, again and again, how one stands, and yields whether it is over
    no_begin = None  # type: Any # (record): returns the Failure of one that ended before its agent had said all
    enter = None  # type: Any # (record, request), in there: makes it ready, and returns the request as it is done there

    def hint(self) -> str:
        """Return the command of a scheduler that is there and could have been used; empty for none."""
        return ""

    def describe(self, record: "Any") -> StarterView:
        asked = record.request
        facts = {"wrap": asked.outside, "action": asked.action, "path": asked.path}
        return StarterView(id=record.id, age_s=record.age_s(), **facts)

    def leave(self, record: "Any", request: Request, **changes: "Any") -> str:
        """Leave our agent beside a record, with what it is to do in there, and return the path of its program."""
        changes.update({self.name: record.id})
        within = request.but(errand="", is_new=True, overlaps=True, may_install=False, **changes)
        return leave_agent(record.directory, starter_main, within, is_elsewhere=True)

    def waiting(self, request: Request) -> "List[Kept]":
        """Return those that do what is asked for, as far as that is named, and have not replied yet."""
        same = [record for record in self.running() if request.is_done_by(record.request)]
        same = [record for record in same if record.request.via_node >= request.via_node]
        return [record for record in same if not is_marked(record, "unwanted") and not reply_in(record)]

    def replied(self, record: "Any", gone_at: "Dict[str, float]") -> "Optional[Json]":
        """Return the reply of what one started, when it is there; raises the Failure that is there instead.

        What is over was so at `gone_at` first: a shared home may show late what was said in a job.
        """
        is_over = not self.goes_on(record)  # before the look: what it said last is heard
        look_anew(record.directory)
        reply = reply_in(record)
        gone_s = time.monotonic() - gone_at.setdefault(record.id, time.monotonic()) if is_over else 0.0
        if is_over and not reply and gone_s >= (LATE_S if record.kind == "job" else 0):
            raise self.no_begin(record)
        return reply.result() if reply else None

    def await_reply(self, record: "Any", channel: Channel) -> "Json":
        """Wait for the reply of what one started, and return it; pass on what is said meanwhile."""
        said, watched = Growing(record.file("said")), self.watch(record, channel)

        def look() -> "Optional[Said]":
            has_ended = next(watched)  # before the look: what it said last is heard
            look_anew(record.directory)
            reply = heard(said, channel)
            if has_ended and not reply:
                raise self.no_begin(record)
            if channel.is_closed and not reply:
                raise Failure("nobody is waiting for this any more")
            return reply

        reply = until(look, float("inf"), FOLLOW_MAX_S)  # type: Said
        return reply.result()


def starter_main(directory: str) -> None:
    """In a job or a wrapper: do what was asked for, and stay until what that started has ended; end that when unwanted.

    What there is to say goes into a file beside the record, and signs of life are given there. That it ends is written
    down as well, also when a signal ends it.
    """
    request = left_request(directory)
    kind = next(kind for kind in reversed(STARTERS) if getattr(request, kind.name))
    starter = until(lambda: record_in(kind, directory), LATE_S)
    assert starter  # it was written before we were started
    if os.path.exists(starter.file("said")):
        return  # a job that was queued again has nothing more to do
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    beat_at = 0.0
    is_asked = False

    def has_ended() -> bool:
        nonlocal beat_at, is_asked
        if time.monotonic() - beat_at > HEARTBEAT_S:
            beat_at = time.monotonic()
            mark(starter, "alive")  # in a full home who looks takes the last sign, and asks again
            look_anew(directory)
        if not is_asked and (is_marked(starter, "unwanted") or (begun.kind == "run" and is_marked(begun, "stop"))):
            is_asked = True
            KINDS[begun.kind].end(begun)
        return has_exited(pid)

    try:
        if is_marked(starter, "unwanted"):
            return
        try:
            said = os.open(starter.file("said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            sys.exit("rjupyter: cannot write: %s" % error)
        reply = perform(request, Channel("", os.fdopen(said, "a")), lambda asked: kind.enter(starter, asked))
        if not isinstance(reply, (Server, StartReply)):
            sys.exit(reply is None)
        begun = kept_record(KINDS["server" if isinstance(reply, Server) else "run"], reply.id)
        if begun:  # it was not ended already
            pid = place_of(begun).held.pid
            until(has_ended, float("inf"), slowest_s=FOLLOW_MAX_S)
    finally:
        mark(starter, "ended")


# agent ends

# -- what is sent -----------------------------------------------------------------------------------------------------

# Tried in this order by the remote command. python3 may be a shim that fails, or too old: then the next one.
PYTHONS = [
    "python3",
    "/usr/bin/python3",
    "/usr/local/bin/python3",
    '"$HOME"/*3/bin/python3',  # miniconda3, anaconda3, miniforge3
    '"$HOME"/mambaforge/bin/python3',
    "/opt/conda/bin/python3",
    '"$HOME"/.pyenv/versions/*/bin/python3',
    "/opt/homebrew/bin/python3",
    "/usr/libexec/platform-python",
]
# Takes its own arguments, or what stands behind the command in stdin; the last word but one is a program that takes
# the rest. -I and -S: nothing of the user's site gets in, and half of the interpreter's start is saved. There is no
# quote in it, for it is quoted twice on its way.
BOOTSTRAP = (
    "import sys; sys.version_info < (3, 6) and sys.exit(99); import binascii, zlib; "
    "decode = lambda word: zlib.decompress(binascii.a2b_base64(word)); "
    "words = sys.argv[1:] or sys.stdin.buffer.read().decode().split() or sys.exit(0); exec(decode(words[-2]))"
)
NO_PYTHON = "rjupyter: no python3"
# Imports a file as a module, whose bytecode Python keeps beside it; by its source where a full disk has cut that.
LOAD = """import importlib.machinery, sys
def load(path, code=None):
    module = sys.modules["rjupyter"] = type(sys)("rjupyter")
    module.__file__ = path
    try:
        code = code or importlib.machinery.SourceFileLoader("rjupyter", path).get_code("rjupyter")
    except Exception:
        code = open(path, "rb").read()
    exec(code, module.__dict__)
    return module
"""
# The host keeps this file by its digest, in a directory that is the user's alone. What it does not have it says, unless
# that was sent as well, and KEEP, which puts it there.
RUN = (
    LOAD
    + """import os
digest, _, request = words[-3:]
request = decode(request)
cache = os.environ.get("XDG_CACHE_HOME", "")
cache = (cache if cache[:1] == "/" else os.path.expanduser("~/.cache")) + "/rjupyter"
path = "%s/agent-%s.py" % (cache, digest)
def check():
    state = os.lstat(cache)
    if state.st_mode & 0o170077 != 0o040000 or state.st_uid != os.getuid():
        raise OSError("others can look in there")
source = b""
try:
    check()
    main = load(path).agent_main
except Exception:
    if words[-4:-3] in ([], ["sh"]):
        import json
        print(json.loads(request.decode())["nonce"], '{"kind": "absent"}')
        sys.exit()
    exec(decode(words[-4]))
main(source, request)
"""
)
# With the last few versions of it; it runs from memory where it cannot be kept.
KEEP = """import glob
source = decode("".join(words[words.index("sh") + 1 if "sh" in words else 0 : -4]))
new = "%s.%d" % (path, os.getpid())
try:
    os.makedirs(cache, 0o700, exist_ok=True)
    check()
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(source)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path)
    finally:
        if os.path.exists(new):
            os.unlink(new)
    for old in sorted(glob.glob(cache + "/agent-*.py"), key=os.path.getmtime)[:-5]:
        for name in [old, *glob.glob("%s/__pycache__/%s.*" % (cache, os.path.basename(old)[:-3]))]:
            os.unlink(name)
    main = load(path).agent_main
    source = b""
except Exception:
    main = load("rjupyter.py", compile(source, "rjupyter.py", "exec")).agent_main
"""
WORD_MAX = 100000  # bytes: Linux takes 128 KiB in an argument


def agent_command(python: str = "") -> str:
    """Return the remote command that starts the agent: valid in sh, csh and fish (no `!`, no backslash, no quote).

    `python`, which the user named, comes last, where its name is one that no shell changes.
    """
    pythons = PYTHONS + ([python] if re.fullmatch(r"(~/)?[\w./+][\w./+-]*", python, re.ASCII) else [])
    loop = 'for p in %s; do command -v "$p" >/dev/null 2>&1 || continue; "$p" -IS -c "%s" "$@" && exit; done; echo "%s"'
    return "exec /bin/sh -c '%s' sh" % (loop % (" ".join(pythons), BOOTSTRAP, NO_PYTHON))


class AgentFile:
    """What goes to the host: this file, which is read once, for it may be replaced while we run."""

    def __init__(self) -> None:
        with open(os.path.abspath(__file__), "rb") as stream:
            self._source = stream.read()
        self._digest = hashlib.sha256(self._source).hexdigest()[:16]
        self._word = ""  # the whole of it, once it was asked for

    def input_of(self, command: str, request: Request, is_whole: bool) -> bytes:
        """Return what `command` reads: one line, whose last words are the file, if it `is_whole`, and the request.

        It is a command itself, because a start-up file may have replaced the login shell (`exec fish`) by one that
        takes stdin for its script; and blank lines come first, because a start-up file may read one.
        """
        words = []
        if is_whole:
            self._word = self._word or packed(self._source)
            words = [self._word[at : at + WORD_MAX] for at in range(0, len(self._word), WORD_MAX)]
            words.append(packed(KEEP.encode()))
        words += [self._digest, packed(RUN.encode()), packed(json.dumps(request.facts()).encode())]
        return ("\n\n%s %s\n" % (command, " ".join(words))).encode()


# -- the conversation -------------------------------------------------------------------------------------------------


Show = Callable[..., None]  # shows a word on where a step stands (Messages.working)
Handler = Callable[[Any, Show], None]

# What the host tells while it works, by its kind: the text, and its event for a program; without, it is a note.
SAYINGS = {
    "hello": ("Connected to {destination} ({user}@{node}, python {python}).", "connected"),
    "found": ("Using {command} ({where}).", ""),
    "note": ("{text}", ""),
    "terminal": ("The environment is that of {shell} as {how} ({seconds:.1f} s).", ""),
    "unread": ("Jupyter could not read its configuration, and goes on without it: {place}: {why}", ""),
    "wide": ("Jupyter listens on all addresses of {node}, not by --ip: whoever reaches one can connect, past ssh.", ""),
    "lacking": ("{path}: {trouble}, so another one is used.\nTo {purpose}, on the host: {add}", ""),
    "installing": ("No Jupyter on the host; installing it in {path} ({tool}).", "installing"),
    "installed": ("Installed Jupyter ({seconds:.0f} s).", "installed"),
    "stopped server": ("Stopped {title} in {root_dir} (pid {pid}).", "stopped"),
    "stopped run": ("Stopped the execution of {name} ({id}); its result so far is kept.", "stopped"),
    "stopped job": ("Cancelled job {job} ({id}).", "stopped"),
    "stopped kernel": ("Ended the kernel of {name}.", "ended"),
    "stopped wrapper": ("Ended what started inside {wrap} ({id}).", "stopped"),
}
# The facts in it that are no texts, or may be none.
FACTS = {"is_root": "bool", "tried": "List[str]", "seconds": "float", "clock": "float", "pid": "Optional[int]"}
FACTS.update(dict.fromkeys(("app", "root_dir", "name", "job", "wrap"), "Optional[str]"))


class Agent:
    """Runs actions on the host through the connection, and tells the user how they go."""

    def __init__(self, ssh: Ssh, messages: Messages, state_dir: str = "") -> None:
        self.ssh = ssh
        self.messages = messages
        self.state_dir = state_dir  # where our state is on the host; empty for the usual place
        self.hello: Json = {"user": "", "node": "", "python": "", "is_root": False}  # who and where we are there
        self.ahead_s = 0.0  # the host's clock, of ours
        self.noise: List[str] = []  # what else the host printed in the last conversation
        self.greets_after_s = 0.0  # says once who and where we are: it goes without saying where that was quick
        self._began = time.monotonic()
        self.redials = True  # a connection that is lost while we ask
        self.launching = ""  # the id of what was started there, until the reply
        self.doing = ""  # what it does
        self._step = ""  # the name of the step, while Jupyter is installed
        self._found: List[str] = []  # the commands that were said to be used
        self._file: Optional[AgentFile] = None
        self._absences = 0  # how often the host has said that it does not have it
        self.port = LocalPort(0)  # the tunnel's, which is kept for it while there is none
        ssh.meanwhile = self.get_ready

    def get_ready(self) -> AgentFile:
        """Do what can be done while ssh logs in: read what the host may lack, import what comes next."""
        self._file = self._file or AgentFile()
        for name in ("json", "socket"):
            with signals_held():
                __import__(name)
        return self._file

    def ask(
        self,
        request: Request,
        reply: Type[R],
        doing: str = "",
        silence_s: float = SILENCE_TIMEOUT_S,
        handlers: Optional[Dict[str, Handler]] = None,
    ) -> R:
        """Run one action on the host and return its reply; raises Failure for its failures, and for silence.

        `handlers` take further kinds of messages.
        """
        request = request.but(nonce="rjupyter-" + os.urandom(8).hex(), state_dir=self.state_dir)
        command = agent_command(request.python)
        file = self.get_ready()
        is_whole = False
        turned_away = 0  # where the session is a login
        until_s = time.monotonic() + CLOSING_TIMEOUT_S
        while True:
            # Each session may be a login; and a host that was sent the file and lacks it again cannot keep it.
            is_whole = is_whole or not self.ssh.way.has_login or self._absences > 1
            may_be_asked = self.ssh.can_ask and not self.ssh.way.has_login  # ssh logs in, and has the terminal
            with self.messages.working(doing, is_animated=not may_be_asked) as show:
                child = None
                try:
                    # Until it is known here, and has what it is for; Python starts there meanwhile.
                    with signals_held():
                        child = self.ssh.session(command)
                        child.mark = request.nonce.encode()
                        child.send(file.input_of(command, request, is_whole))
                    found = self._hear(child, request.nonce, reply, show, silence_s, handlers or {})
                    if found:
                        return found
                    self._absences += 1
                    is_whole = True
                    continue
                except Crowded:
                    turned_away += 1
                    if not self.ssh.has_paused(turned_away):
                        raise
                    continue
                except SessionRefused:
                    is_guest = self.ssh.way.has_login and not (self.ssh.process or self.ssh.way.forwards)
                    if time.monotonic() > until_s and not is_guest:
                        raise
                except (KeyboardInterrupt, Terminated):
                    if child:
                        self._hear_what_begins(child, request.nonce, show)
                    raise
                finally:
                    if child:
                        child.end()
            if time.monotonic() > until_s:  # a master that is not ours has no room: we log in by ourselves, from now on
                self.ssh.masters = []
                self.ssh.close()
                self.ssh.connect()
            time.sleep(POLL_S)

    def ask_on(
        self,
        request: Callable[[], Request],
        reply: Type[R],
        doing: str = "",
        handlers: Optional[Dict[str, Handler]] = None,
    ) -> R:
        """Ask as `ask` does; when the connection is lost meanwhile, connect and ask again, unless told not to.

        `request` is made anew each time. What the first one began, the host finds by its errand.
        """

        def is_there() -> bool:
            return bool(self.ask(Request(action="describe_end"), EndReply, silence_s=CHECK_TIMEOUT_S))

        while True:
            try:
                return self.ask(request(), reply, doing, handlers=handlers)
            except NotConnected as failure:
                if not self.redials or not self.hello["user"] or isinstance(failure, HostRefused):
                    raise  # we were not connected before
                self.ssh.reconnect(failure.last_line(), is_there)

    def _hear(
        self, child: Child, nonce: str, reply: Type[R], show: Show, silence_s: float, handlers: Dict[str, Handler]
    ) -> Optional[R]:
        """Take what the host says, and return its reply; nothing when it does not have this file."""
        noise = self.noise = []
        noise_bytes = 0
        complaints: List[str] = []  # of that, what came on stderr
        is_login = not self.ssh.way.has_login  # until the first message
        has_begun = False
        heard_at = time.monotonic()
        self.ssh.begin_login()
        while True:
            patience_s = silence_s
            if is_login and self.ssh.can_ask:
                patience_s += 2 * BATCH_LOGIN_TIMEOUT_S  # a person is here, who may be asked on the way, too
            elif self.ssh.asked:
                patience_s = BATCH_LOGIN_TIMEOUT_S  # one who may see what it shows
            line = child.next_line(min(ASKING_S, patience_s - (time.monotonic() - heard_at)))
            if line is None:
                self.messages.check_reader()
            if line is None and (child.has_ended or time.monotonic() - heard_at >= patience_s):
                line = child.next_line(LAST_WORDS_S)  # it may have replied since we looked: we may have been stopped
            if line is None and child.has_ended:
                raise self._no_reply(noise, complaints, child.process.wait(), has_begun)
            is_message = line is not None and line[0] == "stdout" and line[1].startswith(nonce + " ")
            heard_at = max(heard_at, child.read_at)  # what it has to say may be long, and the link slow
            noise_bytes += len(line[1]) if line and not is_message else 0
            if not is_message and (time.monotonic() - heard_at >= patience_s or noise_bytes > NOISE_BYTES):
                if self.ssh.asked:
                    raise self.ssh.no_login()
                why = "the agent said nothing for %d s" % patience_s
                if noise_bytes > NOISE_BYTES:
                    why = "%d MB came that are not for us: %s" % (NOISE_BYTES >> 20, noise[-1][:200])
                try_ = self.ssh.typed("true") + "   (does it answer?)"
                raise NotConnected("no answer from " + self.ssh.destination, why, try_, EXIT_TIMEOUT)
            if line and is_message:
                heard_at = time.monotonic()
                if is_login:  # what it said is no cause of what may come
                    self.ssh.end_login()
                    noise[:] = [said for said in noise if said not in complaints]
                has_begun, is_login = True, False
                try:
                    message = json.loads(line[1][len(nonce) + 1 :], parse_constant=str)  # "NaN" is no number
                except (ValueError, RecursionError) as error:  # no JSON
                    raise Wrong(error) from None
                said = Said.read(message)
                if said.kind == "reply":
                    return reply.read(said.result())
                if said.kind == "absent":
                    return None
                if said.kind in handlers:
                    handlers[said.kind](Told.read(message), show)
                else:  # a kind that nobody knows is a newer agent's, in a job
                    self._tell(message, show)
                continue
            if is_login:
                self.ssh.hear_login(line if line and line[0] == "stderr" else None, is_first=False)
            if line:
                noise.append(line[1])
                del noise[:-12]
                complaints = [*complaints[-99:], line[1]] if line[0] == "stderr" else complaints
                self.messages.detail("host: " + line[1])

    def _hear_what_begins(self, child: Child, nonce: str, show: Show) -> None:
        """Take what the host had announced before we leave: it is on its way to us, perhaps."""
        for _ in child.remaining_lines(LAST_WORDS_S):
            pass  # they are among the last lines; so is one that was taken as the signal came
        for _, line in child.last_lines:
            with contextlib.suppress(ValueError, RecursionError, Failure):
                message = json.loads(line.partition(nonce + " ")[2])
                if Said.read(message).kind == "launching":
                    self._tell(message, show)

    def _tell(self, message: Json, show: Show) -> None:
        """Tell the user what the host says, by the table."""
        kind = message["kind"]
        say = self.messages.detail if kind == "terminal" else self.messages.note
        told = {name: value for name, value in message.items() if name in FACTS or isinstance(value, str)}
        facts = {name: checked(FACTS.get(name, "str"), value) for name, value in told.items()}
        title = APPS[facts["app"]].title if facts.get("app") in APPS else "Jupyter"
        text, event = SAYINGS.get(("%s %s" % (kind, facts.get("what", ""))).strip(), ("", ""))
        try:
            near = {"root_dir": from_home(facts.get("root_dir") or "", self.messages.home)}
            text = text.format_map(dict(facts, destination=self.ssh.destination, title=title, **near))
            if kind == "hello":
                is_first = not self.hello["user"]
                self.hello.update(facts)
                self.ahead_s = facts["clock"] - time.time()
                self.messages.home = facts.get("home", "")
                if not is_first or self.greets_after_s == float("inf"):
                    return
                text = text if time.monotonic() - self._began >= self.greets_after_s else ""
            elif kind == "progress":
                show(facts["text"], self._step)
            elif kind == "launching":
                self.launching, self.doing = facts["id"], facts["doing"]
            elif kind in ("installing", "installed"):
                self._step = "Installing Jupyter" if kind == "installing" else ""
                show("", self._step)
            elif kind == "found":
                if facts["command"] in self._found:
                    return
                self._found.append(facts["command"])
                for line in facts["tried"]:
                    self.messages.detail("looked at " + line)
                say = self.messages.detail if facts["where"] in ("PATH", INSTALLED) else say
        except KeyError as error:
            raise Wrong("wrong in it: %s" % error) from None
        if event:
            self.messages.step(text, event, **{key: facts.get(key) for key in EVENTS[event].keys})
        elif text:
            say(text)

    @contextlib.contextmanager
    def leaving(self, goes_on: Callable[[], str]) -> Iterator[None]:
        """Under this, Ctrl-C says what goes on there without us, as far as there is something; a killed agent, too."""
        self.launching = ""
        try:
            yield
        except (KeyboardInterrupt, Terminated, AgentEnded) as end:
            text = goes_on()
            if text and isinstance(end, AgentEnded):
                end.try_ = ""  # the same command would begin another
            elif text:
                self.messages.end_line()
            if text:
                self.messages.note(text)
            raise

    def what_goes_on(self, what: str, hint: Callable[..., str]) -> str:
        """Say what was begun there, as far as it was, and how to end it."""
        facts = (what, self.doing, self.ssh.destination, hint("stop", self.launching))
        return "%s %s on %s.\nTo end it: %s" % facts if self.launching else ""

    def _no_reply(self, noise: List[str], complaints: List[str], status: int, has_begun: bool) -> Failure:
        """Return why a session ended without a reply: no Python, no login, no connection, no room, or the shell."""
        host, way = self.ssh.destination, self.ssh.way
        told = [line[:200] for line in noise if not re.match(WARNINGS, line)]
        why = "\n".join(told) or "the remote command ended with status %d" % status
        if (has_begun or not way.has_login) and way.is_lost(status, noise):
            return self.ssh.lost([] if way.has_login else noise) if has_begun else self.ssh.connect_failure(noise)
        if has_begun:
            return AgentEnded("the agent on %s ended early" % host, why, "the same command again; -v shows more")
        if NO_PYTHON in noise:
            what = "no python3 on " + host
            why = "the host needs Python 3.6 or newer; tried: " + ", ".join(PYTHONS).replace('"', "")
            return Failure(what, why, "install python3 there, or put it on PATH in ~/.bashrc", EXIT_NO_JUPYTER)
        if not self.ssh.wait(0.2):
            return self.ssh.lost()
        if any("Session open refused" in text or "session request failed" in text for text in noise):
            return SessionRefused("%s opens no session" % host, why, "MaxSessions in its sshd_config", EXIT_SSH)
        # The account did not come to our command: in the host's words where it has said any.
        try_ = self.ssh.typed("true") + "   (must succeed)"
        if "is not recognized as an internal or external command" in why:
            return Failure("the shell on %s is Windows's" % host, why, "a host with a Unix shell, as in WSL")
        if re.search("password has expired|Password change required", why):
            try_ = self.ssh.typed() + "   (once, in a terminal: it asks for a new password)"
        if not noise:
            why += " and printed nothing: its shell may run no commands, or ~/.bashrc may exit early"
        elif not complaints and "This account is" not in why:  # nologin(8) says that on stdout
            why += "\nthe login shell there did not reach our command; a start-up file (~/.bashrc) may exit early"
        return AgentEnded("the agent did not run on " + host, why, try_)


# ---------------------------------------------------------------------------------------------------------------------
# tunnel
#
# The local end: a port, the forward, the proof that our own server answers through it, the browser, and the hold.
# ---------------------------------------------------------------------------------------------------------------------


class Tunnel:
    """A forward from a local port to a server, held until the connection or the server ends."""

    def __init__(self, ssh: Ssh, agent: Agent, server: Server, messages: Messages, hint: Callable[..., str]) -> None:
        self.ssh = ssh
        self.agent = agent
        self.server = server
        self.messages = messages
        self.hint = hint  # makes the command that leads to the same place again
        self.port = agent.port
        self._hearing: Optional[threading.Thread] = None
        self._has_left = False  # the server has closed a connection that is there to tell its end
        self._ends_at = time.time() + server.left_s if server.left_s else float("inf")

    def open(self, fixed_port: Optional[int]) -> None:
        """Forward a local port to the server: `fixed_port` and no other; or its usual one, else the first free one."""
        usual = self.server.local_port
        asked = [int(spec.split(":")[1]) for spec in self.ssh.further]
        numbers = (number for number in itertools.chain([usual], range(LOCAL_PORT, 65536)) if number not in asked)
        for number in [fixed_port] if fixed_port else numbers:
            if number != self.port.number:
                self.port.close()
                self.port.number = number
            if self.port.hold():
                is_open, words = self._forward()
                if is_open:
                    return
                if not self.ssh.wait(0.1):
                    raise self.ssh.lost()
                if not re.search("forwarding request failed|cannot listen to port", words):
                    raise Failure("cannot forward a port", words, "-v shows every ssh command")
            by = "" if fixed_port or number != usual else self.port.taken_by()
            if by:
                text = "Local port %d is taken%s now: close the pages of this server that are still open."
                self.messages.note(text % (number, by))
        raise self.port.taken("another --local-port, or none")

    def _forward(self) -> Tuple[bool, str]:
        with self.port.lent():
            return self.ssh.forward(self.port.number, self.server.target)

    # -- the proof ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Ask the server for its status through the tunnel: ours takes our token. Raises Failure, with the cause."""
        destination = self.ssh.destination
        another = self.hint("--new") + "   (starts another)"
        try:
            status = self.probe(ANSWER_TIMEOUT_S)
        except socket.timeout:
            why = "no answer through the tunnel within %d s" % ANSWER_TIMEOUT_S
            raise Failure("Jupyter does not answer", why, another, EXIT_TIMEOUT) from None
        except OSError as error:
            what = "%s does not forward to %s" % (destination, self.server.target)
            if self.server.sock:
                why = "its sshd may forbid it (AllowStreamLocalForwarding); the server runs: %s" % self.server.id
                raise Failure(what, why, "stop it, then open without --socket") from None
            can_reach, words = self.ssh.can_reach(self.server.target)
            is_refused = "Connection refused" in words and self.ssh.way.has_login and not self.server.job
            if can_reach or is_refused:  # it ended just now
                raise Failure("Jupyter does not answer", str(error), another, EXIT_SERVER_ENDED) from None
            try_ = "AllowTcpForwarding and PermitOpen in its sshd_config; ask its administrator"
            if self.server.job:
                try_ += "\n--via-node, where users may ssh to the nodes of their jobs"
            raise Failure(what, words, try_) from None
        if status not in self.server.good_statuses:
            what = "something else answers on port %d of %s" % (self.server.port, destination)
            raise Failure(what, "it does not take our token (HTTP status %d)" % status, another)

    def probe(self, timeout_s: float) -> int:
        """Return the HTTP status of /api/status through the tunnel; OSError when there is none."""
        path = self.server.base_url + STATUS_PATH
        address = ("127.0.0.1", self.port.number)
        return http_request(address, path, self.server.token, timeout_s, is_secure=self.server.is_secure)[0]

    def _is_answering(self) -> bool:
        with contextlib.suppress(OSError):
            return self.probe(PROBE_TIMEOUT_S) in self.server.good_statuses
        return False

    # -- the hold -----------------------------------------------------------------------------------------------------

    def hold(self, redials: bool) -> None:
        """Keep the tunnel until the server ends; `redials` when the connection does, on the same local port.

        Meanwhile nobody is asked for a password. Raises Failure (4) when the server has ended, 255 when the connection
        is lost for good.
        """
        could_ask = self.ssh.can_ask
        self.ssh.can_ask = False
        try:
            while True:
                why = self._watch()
                if not redials:
                    raise Failure("the connection to %s was lost" % self.ssh.destination, why, self.hint(), EXIT_SSH)
                self.ssh.reconnect(why, self._comes_through, self.port, self._ask_login_node)
                # Before its first session on a connection, sshd holds small packets back: each answer through a forward
                # is then 40 ms late (TCP_NODELAY, set in session.c; measured, OpenSSH 9.2).
                if self.ssh.way.has_login:
                    self.ssh.call(self.ssh.way.session_argv(command="true"))
        finally:
            self.ssh.can_ask = could_ask

    def _watch(self) -> str:
        """Wait until the connection is lost, or stuck, and return why; raises Failure (4) when the server has ended.

        Whatever happens to ssh's own idea of the connection, only an answer through it counts. Without one, a session
        of its own asks the host: the server may have ended; it may hang, with a connection that is well, and then we
        wait for it; or it answers there and not here, and then the tunnel is stuck. Where the server has left, a
        stranger may have its port already: before the host has said, nobody gets there, the browser's page neither.
        """
        is_silent, pause_s, is_open = False, float(PROBE_EVERY_S), True
        self._wake_at_end()
        while self.ssh.wait(pause_s):
            left_s = self._ends_at - time.time()
            if left_s < WARN_BEFORE_END_S:
                self._ends_at = float("inf")
                place = "%s on %s" % (self.server.title, self.server.node)
                text = "%s left for %s: save what you need." % (duration(max(0.0, left_s)), place)
                self.messages.step(text, "ending", id=self.server.id, left_s=left_s)
            if not self._has_left and self._is_answering():
                if not (self._hearing and self._hearing.is_alive()):
                    self._wake_at_end()
                if is_silent:
                    self.messages.step("%s answers again." % self.server.title, "answering", id=self.server.id)
                is_silent, pause_s = False, PROBE_EVERY_S
                continue
            if self._has_left and is_open and self.ssh.way.has_login:
                self.ssh.way.cancel("127.0.0.1:%d:%s" % (self.port.number, self.server.target))
                is_open = not self.port.hold()
            if not self.ssh.wait(0.2):
                break
            try:
                end = self._ask_end(SILENCE_TIMEOUT_S if is_silent else CHECK_TIMEOUT_S)
            except Failure as failure:
                if failure.status == EXIT_SERVER_ENDED:
                    raise
                return failure.last_line()
            if not end.is_answering:
                if not is_silent:
                    text = "%s does not answer, although the connection works. Waiting." % self.server.title
                    self.messages.step(text, "silent", id=self.server.id)
                pause_s = min(2 * pause_s, PROBE_EVERY_S) if is_silent else 1  # it may be about to end
                is_silent = True
                continue
            self._has_left = False
            is_open = is_open or self._forward()[0]
            if not is_open or not self._is_answering():
                return "nothing comes through the tunnel" if self.ssh.wait(0) else cause_of(self.ssh.words)
        return cause_of(self.ssh.words)

    def _ask_end(self, silence_s: float = CHECK_TIMEOUT_S) -> EndReply:
        """Ask the host how the server does; raises Failure: 4 when it has ended, another when the link is dead.

        A host that is slow or full may not come to say so: where its sshd answers, the server runs on, for all we know.
        """
        try:
            end = self.agent.ask(Request(action="describe_end", id=self.server.id), EndReply, silence_s=silence_s)
        except Failure as failure:
            may_be_dead = isinstance(failure, NotConnected) or self.ssh.way.has_login  # a master killed says little
            if may_be_dead and not self.ssh.is_alive():
                raise
            return EndReply(is_running=True)
        if not end.is_running:
            what = "%s on %s has ended" % (self.server.title, self.ssh.destination)
            why = end.reason + ("; the end of its log:\n%s" % end.log if end.log else "")
            raise Failure(what, why, self.hint("--new") + "   (starts another)", EXIT_SERVER_ENDED)
        if end.is_elsewhere and self.ssh.way.has_login:  # one name for several login nodes
            raise Failure("this is another node of " + self.ssh.destination, "the server runs on %s" % end.node)
        return end

    def _ask_login_node(self) -> None:
        """Raise Failure (4) when the server has ended, as far as that is known without its node."""
        there, self.agent.ssh = self.agent.ssh, self.ssh.before or self.ssh
        try:
            self._ask_end()
        except Failure as failure:
            if failure.status == EXIT_SERVER_ENDED:
                raise
        finally:
            self.agent.ssh = there

    def _wake_at_end(self) -> None:
        """Keep a connection to the server that says nothing: its end tells at once that the server may have ended."""

        def hear() -> None:
            with contextlib.suppress(OSError):
                address = ("127.0.0.1", self.port.number)
                with socket.create_connection(address, timeout=PROBE_TIMEOUT_S) as connection:
                    connection.settimeout(MUTE_S)
                    with contextlib.suppress(ConnectionError):
                        connection.recv(1)
                    self._has_left = True
                    self.ssh.wake()

        self._has_left = False
        with contextlib.suppress(Failure):  # then the next look tells
            self._hearing = start_thread(hear)

    def has_page(self) -> bool:
        """True when somebody here is connected to the local port, as an open page is; where proc(5) tells."""
        inodes = [row[9] for row in tcp_rows(":%04X 01 " % self.port.number)]
        with contextlib.suppress(OSError):
            ours = [os.path.realpath("/proc/self/fd/" + name) for name in os.listdir("/proc/self/fd")]
            return not all(any("socket:[%s]" % inode in path for path in ours) for inode in inodes)
        return False

    def _comes_through(self) -> bool:
        """Forward again, and say whether the server answers there; raises Failure (4) when it has ended."""
        if self.ssh.way.has_login:  # before a page gets to another's port on another node
            self._ask_end()
        ours = [record for record in tunnels() if record.pid == os.getpid()]
        for record in ours:
            self.ssh.further = record.further  # a second open may have added some
        is_open = self._forward()[0]
        for record in [record for record in ours if record.further != self.ssh.further]:
            record.further = self.ssh.further  # what is lost may be added again
            write_tunnel(record)
        if not is_open:
            raise self.port.taken()
        if self._is_answering():
            return True
        end = self._ask_end()
        return not (end.is_answering or end.is_elsewhere)  # it hangs by itself; the connection is well


# -- the browser ------------------------------------------------------------------------------------------------------

# In a terminal, where they would take our place, and show no notebook: not opened unless they are asked for.
TEXT_BROWSERS = ("www-browser", "links", "elinks", "lynx", "w3m")


def open_browser(url: str, command: Optional[str], messages: Messages) -> threading.Thread:
    """Open `url` in a browser here without handing it over in an argv, where others could read the token.

    The browser gets the address of a listener of ours, which sends it on, once. Does not wait: the thread that is
    returned ends when the browser has come.
    """
    listener = listen_on(0)
    secret = "/" + os.urandom(16).hex()
    redirect = start_thread(_redirect_once, listener, secret, url)
    # In a process and a session of its own: the browser must outlive our Ctrl-C, and not write on our terminal.
    warnings.simplefilter("ignore", ResourceWarning)  # that it still runs at our end
    script = "import sys, webbrowser; browser = webbrowser.get(sys.argv[2] or None); "
    script += "name = getattr(browser, 'name', '').rpartition('/')[2]; "
    script += "sys.exit(name in sys.argv[3:] or not browser.open(sys.argv[1]))"
    if command and os.path.isfile(command):  # a space in it is no gap between words
        command = shlex.quote(command) + " %s"
    elif command and " " in command and "%s" not in command:
        command += " %s"
    address = "http://127.0.0.1:%d%s" % (listener.getsockname()[1], secret)
    argv = [sys.executable, "-I", "-c", script, address, command or "", *([] if command else TEXT_BROWSERS)]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    opener: "Optional[subprocess.Popen[bytes]]" = None
    with contextlib.suppress(Failure):
        opener = new_process(argv, start_new_session=True, **quiet)

    def complain() -> None:
        # Else the browser came, and ended; or nobody waits for it any more.
        if (opener is None or opener.wait()) and redirect.is_alive():
            name = "%r could not be started" % command if command else "No browser could be started"
            messages.note("%s. Open the address above." % name)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # nobody will come

    start_thread(complain)
    return redirect


def _redirect_once(listener: "socket.socket", secret: str, url: str) -> None:
    """Answer the one request for `secret` with a redirect to `url`; browsers also come for nothing, or an icon."""
    came: "Dict[socket.socket, Any]" = {}  # and have said nothing: they keep nobody waiting
    with contextlib.suppress(OSError), listener:
        while True:
            ready = select.select([listener, *came], [], [], BROWSER_TIMEOUT_S)[0]
            if not ready:
                return
            if ready == [listener]:
                connection, peer = listener.accept()
                came[connection] = peer
                if len(came) <= 100:
                    continue
                ready = list(came)
            connection = next(each for each in ready if each is not listener)
            connection.setblocking(False)
            peer = came.pop(connection)
            with contextlib.suppress(OSError), connection:
                words = connection.recv(65536).split(None, 2)
                # The secret stood in the browser's argv. WSL's own relay, which runs as root, comes for Windows.
                is_ours = owner_of_tcp(peer, listener.getsockname()[1]) in (None, 0, own_uid())
                if is_ours and len(words) > 1 and words[1] == secret.encode():
                    head = "HTTP/1.1 302 Found\r\nLocation: %s\r\nCache-Control: no-store\r\nContent-Length: 0\r\n"
                    connection.sendall(((head + "Connection: close\r\n\r\n") % url).encode())
                    return
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


# -- tunnels that are up ----------------------------------------------------------------------------------------------


class TunnelRecord(Record):
    """A tunnel of ours that is up here, for a second copy of us and for `close`: PID.json."""

    pid: int
    identity: str
    destination: str
    typed: str = ""  # with its path
    ssh: "List[str]" = []
    further: "List[str]" = []
    request: "Request" = Request()
    is_background: bool = False
    url: str
    base_url: str = "/"
    local_port: int
    id: str
    created: float = 0.0
    control: str = ""  # the control socket of its ssh, where that is a master of ours
    config: str = ""  # what `ssh -G` said when it connected


def write_tunnel(record: TunnelRecord) -> str:
    """Write down what a tunnel is; return the file, or nothing where there is no place."""
    with contextlib.suppress(OSError, Failure):
        path = os.path.join(os.path.dirname(record.control) or private_runtime_dir(), "%d.json" % record.pid)
        write_whole(path, json.dumps(record.facts()))
        return path
    return ""


def add_forward(record: TunnelRecord, spec: str, ssh: Ssh) -> None:
    """Add a forward to a tunnel that is up, at once; its process takes it along when it connects again."""
    is_open, words = ssh.call(Mux(ssh, record.control).control_argv("forward", *each("-L", [spec])))
    if not is_open:
        is_up = os.path.exists(record.control)
        raise Failure("cannot forward " + spec, words, "another port in -L" if is_up else "the same command again")
    record.further = [*record.further, spec]
    write_tunnel(record)


def gateway_settings(url: str, base_url: str) -> str:
    """Return the line of a shell that sends a JupyterLab here to a server for its kernels (Jupyter Server, "Gateway").

    It tries again as long as we do; five times, as is usual, are half a minute. Raises Failure without a token.
    """
    address, _, token = url.partition("?token=")
    if not token:
        raise Failure("no JupyterLab here can use the server", "it takes a password, and has no token")
    settings = {"URL": "/".join(address.split("/")[:3]) + base_url, "AUTH_TOKEN": urllib.parse.unquote(token)}
    settings.update(RETRY_MAX="1000", RETRY_INTERVAL_MAX="10", VALIDATE_CERT="no")  # it is on the loopback
    return "export" + "".join(" JUPYTER_GATEWAY_%s=%s" % (name, shlex.quote(settings[name])) for name in settings)


def tunnels() -> List[TunnelRecord]:
    """Return the records of our tunnels that are up; those of processes that are gone are removed."""
    usual = os.environ.get("XDG_RUNTIME_DIR") or "/run/user/%d" % own_uid()  # cron has none, a login has
    paths: List[str] = []
    for directory in (os.path.join(usual, "rjupyter"), own_tmp_dir()):
        with contextlib.suppress(OSError):
            status = os.lstat(directory)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == own_uid():
                paths += [os.path.join(directory, name) for name in os.listdir(directory)]
    records = []
    for path in paths:
        # The latter two are being written, or a look whether one can write: kill -9 may leave them.
        match = re.fullmatch(r"([1-9]\d*)\.json(\.\d+)?|\.([1-9]\d*)", os.path.basename(path))
        if not match:
            continue
        record = read_record(TunnelRecord, path)
        pid = int(match.group(1) or match.group(3))
        if not process_identity(pid) or (record and not is_same_process(pid, record.identity)):
            remove_files([path])
        elif record and not match.group(2):
            records.append(record)
    return records


def end_tunnel(record: TunnelRecord) -> None:
    """End the process of a tunnel; raises Failure when it does not go."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    if not until(lambda: not is_same_process(record.pid, record.identity), CONTROL_TIMEOUT_S):
        why = "process %d did not end within %d s" % (record.pid, CONTROL_TIMEOUT_S)
        raise Failure("cannot close the tunnel", why, "kill -9 %d" % record.pid)


def master_of_a_tunnel(ssh: Ssh) -> str:
    """Return the control socket of a tunnel of ours that is up: no login either.

    It has the same destination and the same options, and `ssh -G` says of them, word for word, what it said then: so it
    leads where a login of our own would. That it lives, only an answer through it proves.
    """
    for record in tunnels():
        is_same = (record.destination, record.ssh, record.config) == (ssh.destination, ssh.options, ssh.config_text)
        if is_same and record.pid != os.getpid() and os.path.exists(record.control) and does_answer(record):
            ssh.messages.detail("Using the connection of the tunnel that is up (pid %d)." % record.pid)
            return record.control
    return ""


MASTERS.append(master_of_a_tunnel)


def does_answer(record: TunnelRecord) -> bool:
    """True when an answer comes through a tunnel; any, for the server's own matters are not asked about."""
    is_secure = record.url.startswith("https:")
    with contextlib.suppress(OSError):
        return bool(http_request(("127.0.0.1", record.local_port), "/api", "", JOIN_TIMEOUT_S, is_secure=is_secure)[0])
    return False


def is_leaving(record: TunnelRecord) -> bool:
    """True when a tunnel ends within seconds, as one does whose server was stopped just now."""
    until(lambda: does_answer(record) or not is_same_process(record.pid, record.identity), JOIN_TIMEOUT_S)
    return not is_same_process(record.pid, record.identity)


class Background:
    """Going to the background like `ssh -f`: the child works on the terminal until the tunnel is up, then lets it go.

    The fork comes first, so that ssh is a child of the process that will hold it.
    """

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise Failure("cannot go to the background", "Windows has no fork", "a window of its own, without -f")
        reading, writing = os.pipe()
        self.pid = os.fork()
        self._ready = reading if self.pid else writing
        os.close(writing if self.pid else reading)

    def wait(self) -> int:
        """In the parent: wait until the child is up or has ended; return the exit status."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child has it too, and answers
        if os.read(self._ready, 1):
            return EXIT_OK
        _, status = os.waitpid(self.pid, 0)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else EXIT_FAILURE

    def detach(self) -> None:
        """In the child: leave the terminal, and let the parent go."""
        os.setsid()
        sys.stdout.flush()
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.write(self._ready, b"1")
        os.close(self._ready)


# ---------------------------------------------------------------------------------------------------------------------
# journal (an annex: the core is whole without it)
#
# What cells print is kept, whoever looks: those of a server's kernels, and those of a notebook that is executed. Beside
# each server a process of its own, under the Python of its environment, hears what the kernels tell everyone (their
# iopub socket) and writes it down, a journal for each kernel. The second half of the room reads that here: `output`.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins

CANNOT_RUN = 127  # a shell's own status for a command that is not there
JOURNAL_BYTES = 64 << 20  # of one kernel; when half of that is full, the half before it goes
RECORD_EVERY_S = 0.25  # between two looks for new kernels
BIRTH_EVERY_S = 0.05  # while one may be about to begin
HEAD_BYTES = 200  # which tell one half of a journal from another
REPLY_LATE_MS = 1000  # in which a kernel that is idle has answered who asked it
DIRECTORY_TICK_S = 5.0  # in which a directory may change again and its time not (coarse clocks; another machine's)
SERVER_EVERY_S = 2.0  # between two looks whether the server is there
KEEP_EVERY_S = 3600.0  # between two signs that its recording is not to be forgotten
PAGE_GONE_S = 20.0  # in which Jupyter notices that a page is gone (ADDED)
SETTLES_S = 1.0  # in which Jupyter starts a kernel: asked meanwhile, Jupyter Server 2.21 fails, and logs a traceback
UNKNOWN_KERNEL_S = 20.0  # in which Jupyter comes to know a kernel that it starts; another's is left alone then
CELL_FRESH_S = 1.0  # for which the server's word on its notebooks holds
SAVE_TIMEOUT_S = 60.0
SAVE_LOOKS = 2  # a server that collaborates saves by itself a moment after its pages have gone
NOTEBOOK_MAX = 1 << 30  # bytes
SIGNED = b"<IDS|MSG>"  # what follows it in a message is its signature, and what that signs
RECONNECT_MS = 10  # to a kernel that is started anew: it may be asked for something as soon as it is there
IDS_MAX = 1000  # cells whose threads may still print
OVERLAP = 1000  # characters by which the end of one text is found again in another
WAS_KILLED = "the output printed here is lost: the recorder was killed"
TOO_LARGE = "an output of %d MB was not kept"
IS_CUT = "older output was dropped: more than %d MB came" % (JOURNAL_BYTES >> 20)


# -- forms that are not ours ------------------------------------------------------------------------------------------
#
# Notebooks, messages of kernels (jupyter-client.readthedocs.io, "Messaging"), and what Jupyter Server's API tells.


def fact(facts: "Any", name: str, default: "F") -> "F":
    """Return what stands there under a name; the default where there is no such thing, or one of another type."""
    value = facts.get(name) if isinstance(facts, dict) else None
    return value if isinstance(value, type(default)) else default


def objects(facts: "Any", name: str) -> "List[Json]":
    """Return the list of objects that stands there under a name; an empty one where one of them is none."""
    found = fact(facts, name, [])  # type: List[Any]
    return found if all(isinstance(each, dict) for each in found) else []


def tags_of(cell: "Json") -> "List[Any]":
    """Return the tags of a cell."""
    return fact(fact(cell, "metadata", {}), "tags", [])


def is_executed(cell: "Json") -> bool:
    """Return what nbclient makes of a cell."""
    is_code = fact(cell, "cell_type", "") == "code" and bool(joined_text(cell.get("source", "")).strip())
    return is_code and "skip-execution" not in tags_of(cell)


def joined_text(value: "Any") -> str:
    """Return a text of a notebook's, which may stand there as a list of lines."""
    return "".join(map(str, value)) if isinstance(value, list) else str(value)


def notebook_text(notebook: "Json") -> str:
    """Return a notebook in the form that Jupyter gives its files; a lone surrogate, which no file can hold, escaped."""
    text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(notebook, indent=1, sort_keys=True)
    return text + "\n"


# -- its lines --------------------------------------------------------------------------------------------------------


class Entry(Record):
    """A line of a journal: what a kind always has, ENTRIES says. The kind ends the line, which is told apart by that.

    What was printed is as the kernel sent it (jupyter-client.readthedocs.io, "Messaging"). Code of `eval` that will
    never begin has ended too: then the `id` is that of the message that asked for it.
    """

    id: str = ""  # of the cell that runs: it tells this execution from others of its journal
    time: float = 0.0  # in seconds since 1970
    count: "Optional[int]" = None  # the cell's number, which it may have at its end alone
    code: str = ""
    notebook: str = ""
    asked_by: str = ""  # the id of the message that asked for it
    is_eval: bool = False  # nobody misses what came of it
    # In a notebook that is executed: its place, and its number among those with code.
    index: int = -1
    cell: int = 0
    cells: int = 0
    type: str = ""  # of what was printed
    content: "Json" = {}
    is_done: bool = False
    connections: int = -1  # how many pages the kernel had at the end; negative where nobody could tell
    has_died: bool = False  # its kernel, before it ended by itself
    why: str = ""  # something is missing
    text: str = ""  # a remark
    kind: str = ""  # of one that makes no sense, none

    def odd(self) -> "List[str]":
        """Name the time, if no calendar has it."""
        return [] if 0 <= self.time < 2**33 else ["time"]

    def facts(self) -> "Json":
        """Return what its kind has, and what else is not as usual."""
        has = ENTRIES.get(self.kind, set())
        rows = [(name, getattr(self, name), getattr(type(self), name)) for name in self.fields]
        return {name: value for name, value, usual in rows if name in has or value != usual}


# Besides, "half": the later half of a journal begins, `at` so many bytes; the `cell` that runs begins there once more.
ENTRIES = {
    "begun": {"id", "time"},
    "printed": {"id", "type", "content"},
    "finished": {"id", "time", "is_done"},
    "gap": {"time", "why"},  # something is missing here
    "remark": {"text"},  # on how a notebook is executed
}
OUTPUT_TYPES = ("stream", "display_data", "execute_result", "error", "update_display_data", "clear_output")


def entry_in(facts: "Json") -> Entry:
    """Return what a line of a journal says; an empty one where it makes no sense: a full disk, a crash of the machine.

    What is no entry of ours, a later version's perhaps, is such a line as well.
    """
    has = ENTRIES.get(fact(facts, "kind", ""))
    with contextlib.suppress(Wrong):
        return Entry.read(facts) if has and has <= set(facts) else Entry()
    return Entry()


class RecorderMark(Record):
    """The process that records beside a server, and its Python: recorder.json."""

    pid: int
    identity: str
    python: str


class KernelMark(Record):
    """What a quick look at a kernel needs, beside its journal: KERNEL.json. It is there when the kernel is heard."""

    notebook: str = ""
    former: "List[str]" = []  # its names before

    def named(self, notebook: str) -> "KernelMark":
        """Return it with the name that the notebook has now, where there is one."""
        former = [name for name in [*self.former, self.notebook] if name not in ("", notebook)]
        return self.but(notebook=notebook, former=former) if notebook else self


class Connection(Record):
    """A kernel's connection file, as far as a listener needs it (jupyter-client, "Connection files")."""

    transport: str = "tcp"
    ip: str = "127.0.0.1"
    iopub_port: int
    shell_port: int = 0
    key: str = ""
    signature_scheme: str = "hmac-sha256"

    def address(self, port: int) -> str:
        """Return where one of its sockets listens, as ZeroMQ writes it."""
        return "%s://%s%s%d" % (self.transport, self.ip, "-" if self.transport == "ipc" else ":", port)

    def signature(self, parts: "List[bytes]") -> bytes:
        """Return what signs these parts of a message (jupyter-client, "The wire protocol")."""
        digest = getattr(hashlib, self.signature_scheme.rpartition("-")[2], hashlib.sha256)
        return hmac.new(self.key.encode(), b"".join(parts), digest).hexdigest().encode() if self.key else b""


def ask_for_list(info: "Optional[RuntimeInfo]", path: str) -> "List[Json]":
    """Ask a server's API for a list of its kernels, or the like; an empty one when it does not answer."""
    return objects({"said": info and ask_server(info, path + "?no_track_activity=1")[1]}, "said")


def notebooks_of(info: "Optional[RuntimeInfo]") -> "Dict[str, str]":
    """Return the notebook of each kernel of a server, relative to the server's directory, by the kernel's id."""
    sessions = ask_for_list(info, "api/sessions")
    sessions.sort(key=lambda session: fact(session, "type", "") == "notebook")  # before a console on the same kernel
    return {fact(fact(session, "kernel", {}), "id", ""): fact(session, "path", "") for session in sessions}


def connections_of(info: "Optional[RuntimeInfo]", kernel: str) -> int:
    """Return how many pages a kernel has; -1 where the server does not say."""
    return fact(info and ask_server(info, "api/kernels/%s?no_track_activity=1" % kernel)[1], "connections", -1)


def is_in_path(record: ServerRecord, request: Request) -> bool:
    """True for a server in the PATH that was asked for; for all, if none was."""
    return not request.path or is_same_dir(record.root_dir, resolve_path(request.path)[0])


def start_recorder(record: ServerRecord, found: Launcher) -> None:
    """Start what writes down what the cells of a new server print."""
    if not record.request.no_record:
        run_recorder(record, interpreter_of(found), found.environment)


def run_recorder(record: ServerRecord, python: str, environment: "Dict[str, str]") -> None:
    """Start the recorder of a server, and write down which process it is; raises OSError.

    It is left there anew each time: what it was loaded from may be gone with ~/.cache.
    """
    named = command_of_process(record.pid).split("\0")[0]  # by a script that is not Python's, which has become it
    python = python or (named if os.path.isabs(named) and "python" in os.path.basename(named) else "")
    if not python:
        raise OSError("%s does not say which Python runs Jupyter" % (portable(named) or record.app))
    private_dir(record.file("cells"))
    argv = [python, leave_agent(record.directory, recorder_main, record.request)]
    log = record.file("recorder.log")
    directory = native(record.root_dir) or "/"  # a pyenv chooses its Python by it
    with start_detached(argv, environment, directory, log, record.request.is_held) as process:
        mark = RecorderMark(pid=process.pid, identity=process_identity(process.pid), python=python)
        write_whole(record.file("recorder.json"), json.dumps(mark.facts()))


def revive_recorder(record: ServerRecord) -> None:
    """Start a recorder again that was killed, or never came; what was printed meanwhile is a gap."""
    mark = read_record(RecorderMark, record.file("recorder.json"))
    is_due = mark or (record.has_answered and record.age_s() > START_TIMEOUT_S)  # else its launch starts it
    is_wanted = record.directory and is_due and not record.request.no_record and not record.request.is_held
    if is_wanted and not (mark and is_same_process(mark.pid, mark.identity)):
        with contextlib.suppress(OSError), open(record.file("recorder.lock"), "w") as lock:
            environment = environment_of(record.pid) or dict(os.environ)
            python = mark.python if mark else ""
            mark = read_record(RecorderMark, record.file("recorder.json"))  # another one of ours may have done so
            if place_of(record).is_here and has_lock(lock) and not (mark and is_same_process(mark.pid, mark.identity)):
                run_recorder(record, python, environment)


def recorder_main(directory: str) -> None:
    """Record beside the server of a directory, until it has ended. Ends with CANNOT_RUN where there is no pyzmq."""
    try:
        import zmq
    except ImportError as error:
        print(error)
        sys.exit(CANNOT_RUN)
    Recorder(directory, zmq).run()


class Recorder:
    """Hears the kernels of one server, and writes down what they say."""

    def __init__(self, directory: str, zmq: "Any") -> None:
        self.directory = directory
        self.zmq = zmq
        self.poller = zmq.Poller()
        self.context = zmq.Context()
        record = read_record(ServerRecord, os.path.join(directory, "server.json"))
        assert record is not None  # it was written before we were started
        self.record = record
        self._known = {}  # type: Dict[str, RecordedKernel] # by the name of the connection file
        self._notebooks = {}  # type: Dict[str, str] # by the kernel
        self._told_at = float("-inf")
        self._seen_at = {}  # type: Dict[str, float] # the connection files, also those of other servers
        self._changed_at = 0.0  # their directory
        self._asked_api_at = float("-inf")
        self._asked_at = 0.0  # and ours, when we looked for what is to be asked

    def run(self) -> None:
        """Record until the server has ended, or `stop` took its directory away."""
        looked_at = kept_at = 0.0
        while True:
            if time.monotonic() - kept_at > KEEP_EVERY_S:
                kept_at = time.monotonic()
                self.keep()
            if time.monotonic() - looked_at > SERVER_EVERY_S:
                looked_at = time.monotonic()
                if not os.path.isdir(self.directory) or not is_same_process(self.record.pid, self.record.identity):
                    break
                for kernel in self._known.values():
                    kernel.look_again()
            self.pass_on()  # not to one that we are only about to hear: it could answer before it knows of us
            pause_s = BIRTH_EVERY_S if self.look_for_kernels() else RECORD_EVERY_S
            if not self.poller.sockets:
                until(lambda: None, pause_s)  # of nothing, pyzmq's poll returns at once
            heard = dict(self.poller.poll(int(1000 * pause_s)))
            for kernel in self._known.values():
                if kernel.socket in heard or kernel.shell in heard:
                    kernel.hear()
                if kernel.monitor in heard:
                    kernel.notice_end()
        for kernel in self._known.values():
            kernel.close()
        self.keep()

    def keep(self) -> None:
        """Let the directory be as young as the server: what ended is kept for a week, and that begins at its end."""
        with contextlib.suppress(OSError):
            os.utime(self.directory)

    def look_for_kernels(self) -> bool:
        """Listen to new kernels of this server, forget those gone; return whether one may be about to begin.

        The directory is the user's: others' connection files, and what was left there, lie beside ours. What Jupyter
        starts is its own before it knows that itself, and has much to say by then; later its API tells.
        """
        now = time.monotonic()
        runtime = native(self.record.runtime_dir)
        with contextlib.suppress(OSError):
            changed_at = os.stat(runtime).st_mtime
            if changed_at != self._changed_at or time.time() - changed_at < DIRECTORY_TICK_S:
                self._changed_at = changed_at
                self._seen_at = {n: self._seen_at.get(n, now) for n in os.listdir(runtime) if kernel_id_of(n)}
                for name in set(self._known) & set(self._seen_at):
                    self._known[name].follow(read_record(Connection, os.path.join(runtime, name)))
            for name in set(self._known) - set(self._seen_at):
                self._known.pop(name).close()
        ages_s = {name: now - at for name, at in self._seen_at.items() if name not in self._known}
        ages_s = {name: age_s for name, age_s in ages_s.items() if age_s < UNKNOWN_KERNEL_S}
        is_birth = bool(ages_s) and min(ages_s.values()) < SETTLES_S
        ours = ""
        if is_birth:
            # What Jupyter started, not what that did; of all processes, where nobody tells (`is_own_proc`).
            knows, jupyter = is_own_proc(), self.record.pid
            started = [pid for pid, parent in parents().items() if not knows or session_of(parent) == jupyter]
            ours = " ".join(command_of_process(pid) for pid in started)
        elif ages_s and now - self._asked_api_at > SETTLES_S:
            self._asked_api_at = now
            views = ask_for_list(server_info(self.record), "api/kernels")
            ours = " ".join("kernel-%s.json" % fact(view, "id", "") for view in views)
        for name in [name for name in ages_s if name in ours]:
            connection = read_record(Connection, os.path.join(runtime, name))
            if connection:
                self._known[name] = RecordedKernel(self, connection, kernel_id_of(name))
        return is_birth

    def pass_on(self) -> None:
        """Send kernels the code that `eval` left for them, each piece once: KERNEL.ID.ask holds it."""
        directory = os.path.join(self.directory, "cells")
        with contextlib.suppress(OSError):
            changed_at = os.stat(directory).st_mtime
            if changed_at == self._asked_at and time.time() - changed_at >= DIRECTORY_TICK_S:
                return
            self._asked_at = changed_at
            kernels = {kernel.id: kernel for kernel in self._known.values()}
            for name in [name for name in os.listdir(directory) if name.endswith(".ask")]:
                kernel, identity = name.split(".")[:2]
                path = os.path.join(directory, name)
                if kernel in kernels:
                    os.rename(path, path + "ed")  # before it is sent: not twice, whatever happens
                    with open(path + "ed", encoding="utf-8", newline="") as stream:
                        kernels[kernel].ask(identity, stream.read())

    def notebook_of(self, kernel: str) -> str:
        """Return the path of the notebook that a kernel belongs to; empty for none. An answer holds for a moment."""
        if kernel not in self._notebooks or time.monotonic() - self._told_at > CELL_FRESH_S:
            self._notebooks = notebooks_of(server_info(self.record))
            self._told_at = time.monotonic()
        return self._notebooks.get(kernel, "")


def kernel_id_of(name: str) -> str:
    """Return the id of the kernel whose connection file has this name; empty for another file."""
    is_kernel = name.startswith("kernel-") and name.endswith(".json") and len(name) == len("kernel-.json") + 36
    return name[len("kernel-") : -len(".json")] if is_kernel else ""


class RecordedKernel:
    """One kernel that is heard. What it says waits in ZeroMQ, without a bound.

    A PUB socket drops what a slow subscriber does not take: ours takes all at once.
    """

    def __init__(self, recorder: Recorder, connection: Connection, identity: str) -> None:
        zmq = recorder.zmq
        self.recorder = recorder
        self.id = identity
        self.socket = recorder.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(connection.address(connection.iopub_port))
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for socket in (self.socket, self.monitor):
            recorder.poller.register(socket, zmq.POLLIN)
        self._connection = connection
        self._ids = {}  # type: Dict[str, str] # of the cells, by the message that asked for each
        self._begun = 0  # how many
        self._running = {}  # type: Dict[str, Entry]
        self._session = None  # type: Any
        self._failed: "Set[str]" = set()
        self._unseen = {}  # type: Dict[str, float] # when cells ended with a page that may be gone, for its link died
        self._alone = set()  # type: Set[str] # the cells during which there was no page for a while
        self._ended_at = 0.0
        self.shell = None  # type: Any # what it is asked through, and answers
        self._asked = set()  # type: Set[str] # the ids of messages of ours that it has not begun with
        # What it replied to each of them beside its outputs; None where it has not replied yet.
        self._payloads = {}  # type: Dict[str, Optional[List[Json]]]
        self._journal = Journal(os.path.join(recorder.directory, "cells", identity + ".journal"))
        if os.path.exists(self._journal.path):
            self._journal.tell("gap", time=time.time(), why=WAS_KILLED)
        self._journal.mark(recorder.notebook_of(identity))

    def close(self) -> None:
        """Let go of a kernel that is gone, or was restarted under another name: how its cell ended is unknown."""
        self._lose_all()
        for socket in (self.socket, self.monitor):
            self.recorder.poller.unregister(socket)
        self.socket.disable_monitor()
        self.socket.close()
        with contextlib.suppress(OSError):
            self._journal.close()

    def follow(self, connection: "Optional[Connection]") -> None:
        """Hear it where it is now: one that dies in its first seconds is started again on other ports."""
        if connection and connection != self._connection:
            self._lose_all()
            with contextlib.suppress(self.recorder.zmq.ZMQError):
                self.socket.disconnect(self._connection.address(self._connection.iopub_port))
            self._connection = connection
            self.socket.connect(connection.address(connection.iopub_port))

    def notice_end(self) -> None:
        """Its process has gone: what ran has ended. Jupyter starts another one, which says nothing of that."""
        self.monitor.recv_multipart()
        self._lose_all()

    def hear(self) -> None:
        """Write down what it has said, so far: to everyone, and to us."""
        for socket in [socket for socket in (self.socket, self.shell) if socket]:
            with contextlib.suppress(self.recorder.zmq.Again):
                for _ in range(1000):  # then others are heard
                    self.take(socket.recv_multipart(self.recorder.zmq.NOBLOCK))

    def take(self, frames: "List[bytes]") -> None:
        """Take one message; what is not signed by its key is not its own."""
        at = frames.index(SIGNED) + 1 if SIGNED in frames else len(frames)
        parts = frames[at + 1 : at + 5]
        if len(parts) < 4 or not hmac.compare_digest(self._connection.signature(parts), frames[at]):
            return
        try:
            header, parent, _, content = [json.loads(part.decode("utf-8", "replace")) for part in parts]
            # What no cell asked for is an extension's, or of the kernel's start: no cell shows it.
            if parent.get("msg_type") == "execute_request":
                if header["msg_type"] == "execute_input" and header.get("session") != self._session:
                    self._session = header.get("session")  # of another process, or of one that takes the asker's
                    self._end_all()  # without a word: the kernel was started anew. Subshells run at the same time
                self.understand(str(header["msg_type"]), str(parent.get("msg_id")), content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Wrong):
            return  # no message of the protocol's

    def understand(self, kind: str, asked_by: str, content: "Json") -> None:
        """Write down what a message tells, which a message of this id asked for."""
        identity = self._ids.get(asked_by, "")
        is_refused = kind == "execute_reply" and asked_by in self._asked and content.get("status") != "ok"
        if kind == "execute_input":
            self._begin(asked_by, content)
        elif is_refused and not content.get("ename"):
            # Out of the queue, for what was before it failed, and only who asked hears of that: "aborted" in ipykernel,
            # R and Julia, in xeus an "error" without a name.
            self._give_up(asked_by)
        elif kind in OUTPUT_TYPES:
            if kind == "error":
                self._failed.add(identity)
            self._journal.tell("printed", id=identity, type=kind, content=content)
        elif kind == "status" and content.get("execution_state") == "idle" and identity in self._running:
            while self._payloads.get(asked_by, ()) is None and self.shell.poll(REPLY_LATE_MS):
                self.take(self.shell.recv_multipart())  # it comes on another socket
            for shown in self._payloads.pop(asked_by, None) or []:  # the help of `?`; the text of %load
                data = fact(shown, "data", {}) or {"text/plain": fact(shown, "text", "")}
                if data != {"text/plain": ""}:
                    self.understand("display_data", asked_by, {"data": data, "metadata": {}})
            self._end(identity)
        elif kind == "execute_reply" and asked_by in self._payloads:
            self._payloads[asked_by] = objects(content, "payload")
            if content.get("status") != "ok":  # interrupted, R and bash say so here alone
                self._failed.add(identity)

    def _begin(self, asked_by: str, content: "Json") -> None:
        self._begun += 1
        identity = self._ids[asked_by] = "%d.%d" % (os.getpid(), self._begun)  # another recorder may go on after us
        for old in list(self._ids)[:-IDS_MAX]:
            del self._ids[old]
        notebook = self.recorder.notebook_of(self.id)
        facts = {"count": fact(content, "execution_count", 0) or None, "code": fact(content, "code", "")}
        facts.update(asked_by=asked_by, is_eval=asked_by in self._asked, notebook=notebook)
        self._asked.discard(asked_by)
        self._journal.mark(notebook)
        begun = self._journal.tell("begun", id=identity, time=time.time(), **facts)
        self._journal.head = self._running[identity] = begun

    def ask(self, identity: str, code: str) -> None:
        """Ask it to execute code, by a message of this id (jupyter-client, "execute_request")."""
        connection, zmq = self._connection, self.recorder.zmq
        if not self.shell:
            self.shell = self.recorder.context.socket(zmq.DEALER)
            self.shell.setsockopt(zmq.LINGER, 0)
            self.shell.connect(connection.address(connection.shell_port))
            self.recorder.poller.register(self.shell, zmq.POLLIN)
        header = {"msg_id": identity, "session": "rjupyter", "username": "", "msg_type": "execute_request"}
        header.update(version="5.3", date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        content.update(allow_stdin=False, stop_on_error=False)  # what others asked for is not ours to take back
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        self.shell.send_multipart([SIGNED, connection.signature(parts), *parts])
        self._asked.add(identity)
        self._payloads[identity] = None

    def _lose_all(self) -> None:
        """Its process has gone: nothing that it was asked for goes on, or will be begun with."""
        deadline = time.monotonic() + SETTLES_S
        while self.socket.poll(0) and time.monotonic() < deadline:  # all that it said comes before its end
            self.hear()
        self._end_all()
        if self.shell:
            self.recorder.poller.unregister(self.shell)
            self.shell.close()  # with what waits in it: the next process is not to get that
            self.shell = None
            self._payloads.clear()
        for asked in list(self._asked):
            self._give_up(asked, has_died=True)

    def _give_up(self, asked: str, has_died: bool = False) -> None:
        self._asked.discard(asked)
        self._payloads.pop(asked, None)
        self._journal.tell("finished", id=asked, time=time.time(), is_done=False, has_died=has_died)

    def _end_all(self) -> None:
        for identity in list(self._running):
            self._end(identity, has_died=True)

    def _end(self, identity: str, has_died: bool = False) -> None:
        begun = self._running.pop(identity)
        is_done = identity not in self._failed and not has_died
        connections = connections_of(server_info(self.recorder.record), self.id)
        facts = {"is_done": is_done, "connections": connections, "has_died": has_died}
        self._journal.tell("finished", id=identity, time=time.time(), **facts)
        self._journal.head = next(iter(self._running.values()), None)
        self._failed.discard(identity)
        self._ended_at = time.monotonic()
        if begun.notebook and not begun.is_eval:
            recent = {name: at for name, at in self._unseen.items() if self._ended_at - at < PAGE_GONE_S}
            self._unseen = dict(recent, **{identity: self._ended_at})
            self._tell_unseen(0 if identity in self._alone else connections)

    def _tell_unseen(self, connections: int) -> None:
        """Note for the next open what ended with no page connected; where there is one, that was not missed.

        A page that came in the middle of a cell shows the rest of it only if it is the one that was there before.
        """
        path = beside(self._journal.path, ".away")
        noted = [name for name in read_text(path).split() if connections <= 0 or name in self._alone]
        if connections == 0:
            noted += self._unseen
            self._unseen = {}
        with contextlib.suppress(OSError):
            if noted:
                write_whole(path, "\n".join([*noted, ""]))
            else:
                remove_files([path])

    def look_again(self) -> None:
        """Learn what changes in and after a cell: the notebook's name, and whether a page is there.

        A page begins with a session of another name, and a cell may be quicker than its own; a notebook may be moved.
        A page whose link had died counts for a while.
        """
        has_just_ended = time.monotonic() - self._ended_at < PAGE_GONE_S
        notebook = self.recorder.notebook_of(self.id) if self._running or has_just_ended else ""
        if notebook:
            self._journal.mark(notebook)
            for begun in self._running.values():
                begun.notebook = notebook
        heard = set(self._running) - self._alone
        if heard and connections_of(server_info(self.recorder.record), self.id) == 0:
            self._alone.update(heard)
        with contextlib.suppress(OSError):
            self._journal.pay()
        if self._unseen and has_just_ended:
            self._tell_unseen(connections_of(server_info(self.recorder.record), self.id))


class Journal:
    """What one kernel said, in a file that is 0600 as all of ours; two, of which the older goes when one is full."""

    def __init__(self, path: str, most: float = JOURNAL_BYTES // 2) -> None:
        self.path = path
        self.most = most  # bytes of each
        self.head = None  # type: Optional[Entry] # the cell that runs
        self._file = -1
        self._size = 0
        self._lost = ""
        self._owed = b""
        self._before = 0  # the bytes of what was written before this half
        self._mark = None  # type: Optional[KernelMark]

    def tell(self, kind: str, **facts: "Any") -> Entry:
        """Write a line, whole or not at all; where the disk is full, the next line that has room says so before."""
        entry = Entry(kind=kind, **facts)
        line = line_of(entry.facts())
        if len(line) > self.most:
            line = gap_line(self.head, TOO_LARGE % (len(line) >> 20))
        try:
            if self._size + len(line) > self.most and self._size:
                self._turn()
            self.pay()
            self._write(line)
        except OSError as error:
            self._lost = self._lost or error.strerror or str(error)
            self._owed += line if kind == "finished" else b""
        return entry

    def pay(self) -> None:
        """Say what was lost, and how cells ended meanwhile, as soon as there is room again. Raises OSError."""
        if self._lost:
            self._write(gap_line(self.head, self._lost) + self._owed)
            self._lost, self._owed = "", b""

    def close(self) -> None:
        """Close the file, which the next line opens again. Raises OSError, where NFS tells of a full disk only now."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _write(self, line: bytes) -> None:
        if self._file < 0:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._size = os.fstat(self._file).st_size
            if self._size and not self._before:  # another recorder's, perhaps
                self._before = JournalReader(self.path, self._size).at - self._size
        try:
            write_all(self._file, line)
            self._size += len(line)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise

    def _turn(self) -> None:
        """Begin a newer half, which says what is missing when it is the older one."""
        os.replace(self.path, self.path + ".old")
        self._before += self._size
        self._size = 0
        self.close()
        self._write(line_of({"at": self._before, "cell": self.head.id if self.head else "", "kind": "half"}))
        if self.head:
            self._write(line_of(self.head.facts()))

    def mark(self, notebook: str) -> None:
        """Write down what is to be found quickly."""
        mark = (self._mark or read_record(KernelMark, beside(self.path, ".json")) or KernelMark()).named(notebook)
        if mark != self._mark:
            with contextlib.suppress(OSError):
                write_whole(beside(self.path, ".json"), json.dumps(mark.facts()))
                self._mark = mark


def beside(journal: str, suffix: str) -> str:
    """Return where something of the same kernel lies as its journal."""
    return journal[: -len(".journal")] + suffix


def line_of(facts: "Json") -> bytes:
    """Return a line of a journal."""
    return (json.dumps(facts) + "\n").encode("ascii")


def gap_line(running: "Optional[Entry]", why: str) -> bytes:
    """Return a line that says what is missing, of the cell that runs."""
    return line_of(Entry(kind="gap", id=running.id if running else "", time=time.time(), why=why).facts())


# -- what it was ----------------------------------------------------------------------------------------------------


def text_of(output: Entry) -> str:
    """Return the text of an output; of what is no text, what it is and how large; of another line, none."""
    content = output.content
    if output.kind != "printed" or output.type in ("clear_output", "update_display_data"):
        return ""
    if output.type == "stream":
        return joined_text(content.get("text", ""))
    if output.type == "error":
        lines = fact(content, "traceback", [])  # type: List[Any]
        if not lines:  # as bash_kernel has it, which tells a status and no name
            words = ": ".join(filter(None, (fact(content, name, "") for name in ("ename", "evalue"))))
            lines = [words] if words else []
        return "".join("%s\n" % line for line in lines)
    data = fact(content, "data", {})  # type: Json
    images = [name for name in data if name.startswith("image/")]
    if images:
        size = len(joined_text(data[images[0]])) * (1 if "svg" in images[0] else 0.75)
        return "[%s, %s]\n" % (images[0], "%d kB" % (size / 1e3) if size >= 1000 else "%d bytes" % size)
    text = joined_text(data.get("text/plain", ""))
    return text + "\n" if text or not data else "[%s]\n" % ", ".join(data)


class PrintedText(Growing):
    """What the cells of a journal printed, read line by line."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._rest = []  # type: List[str]

    def lines(self, has_ended: bool = False) -> "Iterator[str]":
        """Yield the lines that are complete; of a journal that has ended, the last one as well."""
        for line in super().lines(has_ended):
            *whole, rest = text_of(entry_in(facts_in(line))).split("\n")
            if whole:
                yield from ["".join(self._rest) + whole[0], *whole[1:]]
                self._rest.clear()
            self._rest.append(rest)
        if has_ended and any(self._rest):
            yield "".join(self._rest)


class CellOutput:
    """One execution of a cell, and what came of it so far."""

    def __init__(self, gap: "Optional[Entry]" = None) -> None:
        self.begun = None  # type: Optional[Entry]
        self.gap = gap  # in place of a cell: nobody knows what was here
        self.outputs = []  # type: List[Entry]
        self.finished = None  # type: Optional[Entry]
        self._clears = False

    def take(self, printed: Entry) -> None:
        """Take an output; those before it go when that was asked for (jupyter-client, clear_output)."""
        if printed.type == "clear_output":
            self._clears = fact(printed.content, "wait", False)
            self.outputs = self.outputs if self._clears else []
        elif printed.type != "update_display_data":
            if self._clears:
                self.outputs, self._clears = [], False
            self.outputs.append(printed)


class Executions:
    """The executions of a journal, in their order."""

    def __init__(self, lines: "Iterable[str]" = ()) -> None:
        self.cells = {}  # type: Dict[str, CellOutput]
        # By the id of a display: what it shows since it was updated, and those that do not show that yet.
        self._displays = {}  # type: Dict[str, Tuple[Json, List[Entry]]]
        for line in lines:
            self.take(facts_in(line))

    def take(self, facts: "Json") -> "Tuple[Optional[CellOutput], Entry]":
        """Take a line; return it, and what it belongs to: nothing for one that makes no sense, which is passed over."""
        entry = entry_in(facts)
        if entry.kind == "gap":
            name = entry.id or "gap %d" % len(self.cells)
            cell = self.cells.setdefault(name, CellOutput(gap=None if entry.id else entry))
            if not cell.gap:
                content = {"name": "stderr", "text": "[%s]\n" % entry.why, "is_gap": True}
                cell.outputs.append(Entry(kind="printed", id=entry.id, type="stream", content=content))
            return cell, entry
        if not entry.id or (entry.kind == "finished" and entry.id not in self.cells):
            return None, entry
        cell = self.cells.setdefault(entry.id, CellOutput())
        if entry.kind == "begun":
            cell.begun = entry
        elif entry.kind == "finished":
            cell.finished = entry
            if cell.begun and entry.count is not None:
                cell.begun.count = entry.count
        elif entry.kind == "printed":
            cell.take(entry)
            display = fact(fact(entry.content, "transient", {}), "display_id", "")
            shown, older = self._displays.setdefault(display, ({}, [])) if display else ({}, [])
            older.append(entry)
            if entry.type == "update_display_data":
                shown.update(entry.content)
                while older:  # all of one id have the same content from now on: each is looked at once
                    older.pop().content = shown
        return cell, entry


# -- what the host sends of it ----------------------------------------------------------------------------------------


def send_output(request: Request, channel: Channel) -> Record:
    """Send the journal of a kernel, from a line on; when it is followed, what comes, until its server has ended."""
    record, path, _ = journal_asked_for(request)
    journal = JournalReader(path)

    def send_entries() -> bool:
        is_last = not (request.is_followed and place_of(record).is_running())  # before the look
        for at, line in journal.placed():
            if at >= request.line:
                channel.tell("recorded", entry=facts_in(line), at=at)
        return is_last or channel.is_closed

    is_whole = send_entries()
    channel.tell("recorded", entry={})  # from here on it is news
    if not is_whole:
        until(send_entries, float("inf"), slowest_s=0.2)
    return Record()


def facts_in(line: str) -> "Json":
    """Return what a line of a journal holds; for a damaged one, that it is damaged."""
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError):
        facts = None
    return facts if isinstance(facts, dict) and facts else {"kind": "damaged"}


class JournalReader:
    """Reads both halves of a journal as it grows; of one that is known up to an offset, what comes after that.

    Where lines were dropped before they could be read, one says so in their place.
    """

    def __init__(self, path: str, offset: int = 0) -> None:
        self.path = path
        self._offset = offset  # in the newer half
        self._head = self._head_of(path) if offset else ""
        self.at = offset + fact(facts_in(self._head), "at", 0)  # where the next line begins, in all that ever came

    @staticmethod
    def _head_of(path: str) -> str:
        """Return how its first line begins, which no other half has; empty while it is written."""
        with contextlib.suppress(OSError), open(path, "rb") as stream:
            head = stream.readline(HEAD_BYTES)
            return head.decode("ascii", "replace") if head.endswith(b"\n") or len(head) == HEAD_BYTES else ""
        return ""

    def _lines_in(self, path: str, head: str, offset: int) -> "Tuple[List[str], int]":
        """Return the lines of a half from an offset on, and where they end; none where its name is another's now."""
        growing = Growing(path, offset)
        lines = list(growing.lines())
        return (lines, growing.offset) if self._head_of(path) == head else ([], offset)

    def lines(self) -> "List[str]":
        """Return the lines that came since we looked last."""
        return [line for _, line in self.placed()]

    def placed(self) -> "List[Tuple[int, str]]":
        """Return the lines that came since we looked last, each with where it begins."""
        head, old = self._head_of(self.path), []  # type: Tuple[str, List[str]]
        if head not in ("", self._head):  # the half that we know has become the older one, or is gone
            older = self._head_of(self.path + ".old")
            is_known = bool(self._head) and older == self._head
            old, _ = self._lines_in(self.path + ".old", older, self._offset if is_known else 0)
            self._offset, self._head = 0, head
        new, self._offset = self._lines_in(self.path, self._head, self._offset)
        found = []
        is_again = False
        for line in old + new:
            if line.endswith('"kind": "half"}'):
                half = facts_in(line)
                at, running = fact(half, "at", 0), fact(half, "cell", "")
                is_again = at <= self.at and bool(running)  # what begins there once more is for those who missed it
                if at > self.at:
                    found.append((at, gap_line(Entry(id=running), IS_CUT).decode()))
                self.at = at
            elif not (is_again and line.endswith('"kind": "begun"}')):
                found.append((self.at, line))
                is_again = False
            self.at += len(line) + 1
        return found


def journal_asked_for(request: Request) -> "Tuple[ServerRecord, str, KernelMark]":
    """Return the newest journal of the notebook or kernel that is named, in PATH's servers. The Failure names all."""
    wanted = request.name or (resolve_path(request.path)[1] if request.path else "")
    records = [record for record in KINDS["server"].records() if is_in_path(record, request)]
    found = [(record, path, mark) for record in records for path, mark in marks_of(record)]
    found.sort(key=lambda row: os.stat(row[1]).st_mtime, reverse=True)
    named = [row for row in found if is_named(wanted, row[2].notebook, os.path.basename(row[1]))]
    named.sort(key=lambda row: not is_whole_name(wanted, row[2].notebook))
    named = named or [row for row in found if any(is_named(wanted, former, "") for former in row[2].former)]
    if named:
        return named[0]
    there = ", ".join(dict.fromkeys(mark.notebook or os.path.basename(path)[:8] for _, path, mark in found))
    what = "nothing is recorded" + (" of " + portable(wanted) if wanted else "")
    why = "there is: " + there
    if not there:
        why = "no cell was executed yet in a server that rjupyter launched, or --no-record was given"
    for record in [] if found else KINDS["server"].running():
        why = end_of_log(record.file("recorder.log")) or why
    raise Failure(what, why, "name one of these" if there else "")


def marks_of(record: ServerRecord) -> "List[Tuple[str, KernelMark]]":
    """Return the journals of a server, and what their notebooks are called now."""
    directory = record.file("cells")
    names = os.listdir(directory) if os.path.isdir(directory) else []
    kernels = sorted(name[: -len(".journal")] for name in names if name.endswith(".journal"))
    info = server_info(record) if kernels and place_of(record).is_running() else None
    notebooks = notebooks_of(info) if info and can_ask_server(record, info) else {}
    marks = [mark_of(record, kernel).named(notebooks.get(kernel, "")) for kernel in kernels]
    return [(os.path.join(directory, kernel + ".journal"), mark) for kernel, mark in zip(kernels, marks)]


def mark_of(record: ServerRecord, kernel: str) -> KernelMark:
    """Return what the recorder wrote down of a kernel."""
    return read_record(KernelMark, record.file("cells", kernel + ".json")) or KernelMark()


def is_whole_name(name: str, notebook: str) -> bool:
    """True when a name is all of a notebook's path, with its ending or without: it goes before one that ends so."""
    name = os.path.normpath(name)  # ./a.ipynb
    return notebook in (name, name + ".ipynb")


def is_named(name: str, notebook: str, kernel: str) -> bool:
    """True when a name means this notebook, or the kernel whose id begins so."""
    name = os.path.normpath(name) if name else ""  # ./a.ipynb
    paths = (notebook, notebook[: -len(".ipynb")] if notebook.endswith(".ipynb") else notebook)
    is_notebook = bool(notebook) and any(("/" + path).endswith("/" + name.lstrip("/")) for path in paths)
    return not name or is_notebook or (len(name) >= 4 and kernel.startswith(name))


# -- what it puts into the notebook -----------------------------------------------------------------------------------


def save_output(request: Request, channel: Channel) -> "Json":
    """Put what cells printed into their notebook; raises Failure where that cannot be."""
    record, path, mark = journal_asked_for(request)
    executions = Executions(JournalReader(path).lines())
    changed, placed = save_into(record, mark.notebook, executions)
    if not placed:
        raise Failure("nothing was saved into " + mark.notebook, "no cell has code that ran", "output, without --save")
    return {"notebook": mark.notebook, "cells": changed}


def away_from(request: Request, identity: str) -> "List[Away]":
    """Return what the recorder noted for this open, each once; what was missed goes into the notebooks.

    Also that of servers of the same directory which have ended: their notebooks are this one's.
    """
    found = []  # type: List[Away]
    records = KINDS["server"].records()
    for server in [record for record in records if record.id == identity]:
        revive_recorder(server)
        there = [record for record in records if record.root_dir == server.root_dir]
        noted = [record for record in there if found_in([record.file("cells")], "*.away")]
        places = [(record, place_of(record)) for record in noted]
        ended = [record for record, place in places if place.is_known and not place.is_running()]
        journals = [(record, *row) for record in there for row in marks_of(record)] if noted else []
        newest = {mark.notebook: path for _, path, mark in sorted(journals, key=lambda row: time_of(row[1]))}
        mine = [row for row in journals if row[0] in [*ended, server] and os.path.exists(beside(row[1], ".away"))]
        for _, path, mark in mine:
            executions = Executions(JournalReader(path).lines())
            ids = [name for name in read_text(beside(path, ".away")).split() if name in executions.cells]
            remove_files([beside(path, ".away")])
            last = executions.cells[ids[-1]] if ids else CellOutput()
            if not last.begun or not last.finished:
                continue
            facts = {"count": last.begun.count, "is_done": last.finished.is_done, "has_died": last.finished.has_died}
            facts["lines"] = sum(text_of(output).count("\n") for output in last.outputs)
            away = Away(notebook=mark.notebook, cells=len(ids), seconds=last.finished.time - last.begun.time, **facts)
            changed = 1
            away.kernel = "" if newest.get(mark.notebook) == path else os.path.basename(path)[:8]
            try:
                if not request.no_save:
                    if away.kernel:
                        raise Failure("another kernel has executed it since")
                    changed, placed = save_into(server, mark.notebook, executions, ids)
                    lost = [name for name in ids if name not in placed]
                    count = "%d of %d: " % (len(lost), len(ids)) if 0 < len(lost) < len(ids) else ""
                    away.why = count + "the code was changed since" if lost else ""
            except (Failure, OSError, ValueError) as error:  # nobody is to be kept from the page by that
                why = (error.why or error.what) if isinstance(error, Failure) else str(error)
                away.why = why.split("\n")[0]
            if changed or away.why or last.finished.connections <= 0:  # else a page that came back had it all
                found.append(away)
    return found


def save_into(
    record: ServerRecord, notebook: str, executions: Executions, missed: "Optional[List[str]]" = None
) -> "Tuple[int, List[str]]":
    """Put what cells printed into their notebook, through Jupyter; only where a cell still has the code that ran.

    What an `eval` printed is no cell's.
    Where these ids were `missed`, no other that a page has saved since: what it lacks then was taken out, or is older.
    Return how many cells changed, and the ids of the executions that the notebook shows now. Raises Failure, and
    changes nothing, while a page is connected to the kernel, and when the file changes meanwhile.
    """
    info = server_info(record) if place_of(record).is_running() else None
    if not info or not notebook or not can_ask_server(record, info):
        why = "its server has ended, or only its own node reaches it" if notebook else "its kernel has no notebook"
        raise Failure("cannot save into a notebook", why, "output, without --save")
    api = "api/contents/" + urllib.parse.quote(notebook)
    ran = [cell for cell in executions.cells.values() if not (cell.begun and cell.begun.is_eval)]
    ended = [cell.finished for cell in ran if cell.finished and missed is not None]
    for _ in range(SAVE_LOOKS):
        check_alone(info, notebook)
        before = contents_of(info, api, "?type=notebook&content=1")
        cells = objects(before.get("content"), "cells")
        unsaved_s = seconds_since(before["last_modified"]) or 0.0
        known = [each.id for each in ended if each.id not in (missed or []) and time.time() - each.time > unsaved_s]
        changed, placed = fill_in(cells, ran, known)
        if not changed:
            return changed, placed
        check_alone(info, notebook)
        if contents_of(info, api, "?content=0")["last_modified"] == before["last_modified"]:
            break
    else:
        raise Failure("%s was changed meanwhile" % notebook, "nothing was saved", "the same command again")
    content = dict(before["content"], cells=cells)
    sent = json.dumps({"type": "notebook", "format": "json", "content": content}).encode()
    status, said = ask_server(info, api, "PUT", SAVE_TIMEOUT_S, sent=sent)
    if status not in (200, 201):
        why = fact(said, "message", "") or "HTTP status %d" % status
        raise Failure("cannot save into " + notebook, why)
    if not notebook.endswith(".ipynb"):
        kept = objects(contents_of(info, api, "?type=notebook&content=1").get("content"), "cells")
        if fill_in(kept, ran, known)[0]:
            raise Failure("cannot save into " + notebook, "it is a text notebook, which keeps no outputs")
    return changed, placed


def contents_of(info: RuntimeInfo, api: str, query: str) -> "Json":
    """Return a notebook, or its facts without its content (Jupyter Server, "Contents API"); raises Failure."""
    status, said = ask_server(info, api + query, timeout_s=SAVE_TIMEOUT_S, most=NOTEBOOK_MAX)
    if status != 200 or not fact(said, "last_modified", ""):
        why = "it is no longer there" if status == 404 else fact(said, "message", "") or "HTTP status %d" % status
        raise Failure("cannot read the notebook", why)
    return dict(said)


def check_alone(info: RuntimeInfo, notebook: str) -> None:
    """Raise Failure while a page has a notebook: it shows these outputs itself, and would save its own over ours."""
    status, said = ask_server(info, "api/sessions?no_track_activity=1")
    if not status:
        raise Failure("cannot save into " + notebook, "Jupyter does not answer")
    for session in objects({"said": said}, "said"):
        if fact(session, "path", "") == notebook and fact(fact(session, "kernel", {}), "connections", 0) > 0:
            why = "a page is connected to its kernel, which shows and saves these outputs itself"
            raise Failure("%s is open" % notebook, why, "close its page, then the same command again")


def fill_in(
    cells: "List[Json]", executions: "List[CellOutput]", known: "Sequence[str]" = ()
) -> "Tuple[int, List[str]]":
    """Give cells the outputs of the executions of their code; trusted, as in a page.

    Of equal cells, each has the execution of its number; the others are taken in order. What is `known` already stays
    as it is. Where equal cells were executed more often than there are, the last executions count.
    Return how many cells changed, and the ids of the executions of what is still there.
    """
    by_code = {}  # type: Dict[str, List[Json]]
    for cell in cells:
        if fact(cell, "cell_type", "") == "code":
            by_code.setdefault(joined_text(cell.get("source", "")), []).append(cell)
    changed, placed = 0, []  # type: int, List[str]
    begun = [(execution.begun, execution) for execution in executions if execution.begun]
    for code, same in by_code.items():
        ran = [row for row in begun if row[0].code == code]
        placed += [its.id for its, _ in ran]
        if len(ran) < len(same):  # a cell that ran has the number of its execution, or none yet
            counts = [None, *(its.count for its, _ in ran)]
            same.sort(key=lambda cell, counts=counts: cell.get("execution_count") not in counts)  # type: ignore[misc]
        pairs, left = [], []  # type: List[Any], List[Any]
        numbers = [cell.get("execution_count") for cell in same]
        has_last = bool(ran) and ran[-1][0].count in numbers
        for row in reversed(ran if has_last else ran[-len(same) :]):  # a number comes again after a restart
            own = [at for at, cell in enumerate(same) if cell.get("execution_count") == row[0].count]
            if own and row[0].count is not None:
                pairs.append((same.pop(own[-1]), row))
            else:
                left.insert(0, row)
        for cell, (its, execution) in [*pairs, *zip(same, left[-len(same) :])]:
            if its.id in known:
                continue
            has_ended = execution.finished or cell.get("execution_count") == its.count
            count = its.count if has_ended else None  # as a page has it
            ours = outputs_in_file(execution)
            outputs = whole_outputs(cell, execution, ours, its.count)
            if (cell.get("outputs"), cell.get("execution_count")) != (outputs, count):
                metadata = fact(cell, "metadata", {})  # type: Json
                metadata["trusted"] = outputs == ours or metadata.get("trusted") is True
                cell.update(outputs=outputs, execution_count=count, metadata=metadata)
                changed += 1
    return changed, placed


def whole_outputs(cell: "Json", execution: CellOutput, ours: "List[Json]", count: "Optional[int]") -> "List[Json]":
    """Return the outputs of an execution for its cell: where some are missing, with those that the cell has of it."""
    gap = max([-1, *(place for place, output in enumerate(execution.outputs) if "is_gap" in output.content)])
    theirs = objects(cell, "outputs")
    if (execution.finished and gap < 0) or not theirs or cell.get("execution_count") not in (None, count):
        return ours
    later = outputs_in_file(execution, gap + 1)
    end = joined_text(later[0].get("text", "")) if later else ""
    for place, output in enumerate(theirs if later else []):
        text = joined_text(output.get("text", ""))
        at = text.find(end[:OVERLAP])
        if output == later[0] or (end and at >= 0 and end.startswith(text[at:])):
            return [*theirs[:place], dict(later[0], text=text[:at] + end) if end else output, *later[1:]]
    if cell.get("execution_count") is None and gap == 0:
        return theirs + ours
    return max(ours, theirs, key=lambda outputs: len(json.dumps(outputs)))


def outputs_in_file(execution: CellOutput, first: int = 0) -> "List[Json]":
    """Return the outputs of an execution, from one on, in a notebook's own form (nbformat 4)."""
    found = []  # type: List[Json]
    for output in execution.outputs[first:]:
        content = output.content
        names = {"stream": ("name", "text"), "error": ("ename", "evalue", "traceback")}.get(output.type)
        facts = {name: content.get(name) for name in names} if names else {}
        if not names:
            facts = {name: content.get(name) or {} for name in ("data", "metadata")}
        if output.type == "execute_result":
            facts["execution_count"] = execution.begun.count if execution.begun else None
        found.append(dict(facts, output_type=output.type))
    return merged(found)


def merged(outputs: "List[Json]") -> "List[Json]":
    """Return outputs with what follows each other in one stream made one, as a page has it."""
    found = []
    for _, group in itertools.groupby(outputs, lambda output: output.get("name") or id(output)):
        first, *others = group
        if others:
            text = "".join(joined_text(output.get("text", "")) for output in [first, *others])
            first = dict(first, text=text.splitlines(True) if isinstance(first.get("text"), list) else text)
        found.append(first)
    return found


REQUESTS.update(send_output=send_output, save_output=save_output)
BESIDE.append(start_recorder)
TELLING.append(away_from)


# agent ends

# -- what is shown of it ----------------------------------------------------------------------------------------------


COLOURS = r"\x1b\[[0-?]*[ -/]*[@-~]"  # ECMA-48, control sequences


class Screen:
    """What cells print, line by line as a terminal would show it."""

    def __init__(self, show_line: Callable[[str], None]) -> None:
        self._show_line = show_line
        self._line: List[str] = []
        self._column = 0
        self._shown = ""

    def write(self, text: str) -> None:
        """Take what was printed; its colours (ECMA-48, control sequences) are not shown."""
        for character in re.sub(COLOURS, "", text):
            if character == "\n":
                self.end_line()
            elif character == "\r":
                self._column = 0
            elif character == "\b":
                self._column = max(0, self._column - 1)
            else:
                self._line[self._column : self._column + 1] = [character]
                self._column += 1

    def show(self) -> None:
        """Show what stands in a line that has not ended."""
        line = "".join(self._line)
        if line != self._shown:
            self._show_line(line)
            self._shown = line

    def end_line(self) -> None:
        """Show a line that has ended, unless it was shown before."""
        self.show()
        self._line, self._column, self._shown = [], 0, ""


def as_shown(line: str) -> str:
    """Return a line as a terminal would show it in the end."""
    shown = [""]
    screen = Screen(shown.append)
    screen.write(line)
    screen.show()
    return shown[-1]


def head_of(count: Optional[int]) -> str:
    """Return the number of a cell as a notebook shows it."""
    return "In [%s]" % (" " if count is None else count)


def ending_of(count: Optional[int], is_done: bool, seconds: float) -> str:
    """Say how a cell ended: In [12] done after 2 h 3 min."""
    return "%s %s after %s" % (head_of(count), "done" if is_done else "failed", duration(max(0.0, seconds), 2))


def moment(seconds: float) -> str:
    """Return a time of day, with its date when that is not today."""
    then = time.localtime(seconds)
    form = "%H:%M" if time.strftime("%F", then) == time.strftime("%F") else "%b %d %H:%M"
    return time.strftime(form, then)


def tell_entry(entry: Entry, cell: CellOutput, messages: Messages) -> None:
    """Print a line of the journal for the program that reads us (--json)."""
    if entry.kind == "begun":
        facts = {"notebook": entry.notebook, "cell": entry.id, "count": entry.count, "code": entry.code}
        messages.event("input", time=entry.time, **facts)
    elif entry.kind == "printed":
        messages.event("output", cell=entry.id, type=entry.type, content=entry.content)
    elif entry.kind == "finished":
        seconds = entry.time - cell.begun.time if cell.begun else None
        facts = {"is_done": entry.is_done, "connections": entry.connections if entry.connections >= 0 else None}
        messages.event("finished", cell=entry.id, time=entry.time, seconds=seconds, **facts)
    elif entry.kind == "gap":
        messages.event("gap", why=entry.why, time=entry.time)


def write_display(output: Entry, name: str) -> Dict[str, str]:
    """Write what is no text of an output into new files, with what their kind is called behind; return them by that."""
    data: Json = fact(output.content, "data", {})
    media = "(image|audio|video)/|application/pdf$"
    written = {}
    for kind in [kind for kind in data if re.match(media, kind)] or [kind for kind in data if "text/plain" not in data]:
        text = data[kind] if isinstance(data[kind], str) else json.dumps(data[kind])
        content = text.encode("utf-8", "replace")
        ending = mimetypes.guess_extension(kind) or ".bin"
        names = (name + ("-%d" % number if number > 1 else "") + ending for number in itertools.count(1))
        path = written[kind] = next(path for path in names if not os.path.lexists(path))
        try:
            with open(path, "xb") as stream:
                stream.write(base64.b64decode(content) if re.match(media, kind) and "svg" not in kind else content)
        except (OSError, ValueError) as error:
            raise Failure("cannot write " + path, getattr(error, "strerror", "") or str(error)) from None
    return written


class ShownCells:
    """What `output` shows of a journal: each cell when it has ended, the one that runs at last, and then what comes."""

    def __init__(self, messages: Messages, since: float, agent: Agent) -> None:
        self.messages = messages
        self.since = since  # seconds since 1970: what ended before is not shown
        self.agent = agent  # the times are by its clock
        self.lines = 0  # of the journal, that were taken
        self._executions = Executions()
        self._is_live = False
        self._screen = Screen(messages.line)

    def take(self, message: Told, show: Show) -> None:
        """Take a line of the journal; one that makes no sense is passed over. An empty one: these were all so far."""
        if message.entry:
            self.lines = message.at + 1
            cell, entry = self._executions.take(message.entry)
            if self._is_live and cell:
                self._show_live(cell, entry)
        elif not self._is_live:
            cells = list(self._executions.cells.values())
            for cell in cells:
                if not cell.finished or cell.finished.time - self.agent.ahead_s >= self.since:
                    self._show(cell, is_last=cell is cells[-1])
            self._is_live = True  # from now on, what comes is shown as it comes

    def _show(self, cell: CellOutput, is_last: bool) -> None:
        if self.messages.as_json:
            for entry in filter(None, (cell.begun, *cell.outputs, cell.finished, cell.gap)):
                tell_entry(entry, cell, self.messages)
            return
        title = "[%s]" % cell.gap.why if cell.gap else head_of(cell.begun.count if cell.begun else None)
        if cell.begun:
            seconds = (cell.finished.time if cell.finished else time.time() + self.agent.ahead_s) - cell.begun.time
            state = "" if cell.finished and cell.finished.is_done else ", failed" if cell.finished else ", runs"
            began = moment(cell.begun.time - self.agent.ahead_s)
            title += "  %s, %s%s" % (began, duration(max(0.0, seconds), 2), state)
        self.messages.line(title)
        for output in cell.outputs:
            self._screen.write(text_of(output))
        self._screen.end_line()
        if not is_last:
            self.messages.line("")

    def _show_live(self, cell: CellOutput, entry: Entry) -> None:
        if self.messages.as_json:
            tell_entry(entry, cell, self.messages)
        elif entry.kind == "begun":
            self._screen.end_line()
            self.messages.line("%s  %s" % (head_of(entry.count), moment(entry.time - self.agent.ahead_s)))
        elif entry.kind == "printed":
            self._screen.write(text_of(entry))
        elif entry.kind == "finished" and cell.begun:
            self._screen.end_line()
            self.messages.note(ending_of(cell.begun.count, entry.is_done, entry.time - cell.begun.time) + ".")
        elif entry.kind == "gap":
            self.messages.line("[%s]" % entry.why)


# ---------------------------------------------------------------------------------------------------------------------
# execute (an annex: the core is whole without it)
#
# A notebook that is run to its end on the host, and its result here. The first half lives on the host: a process of its
# own, under the Python of Jupyter's environment, lets nbclient execute the notebook, and writes a journal meanwhile and
# the result at the end. The second half follows the journal from here, and takes the result.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins

STOP_TIMEOUT_S = 10  # for a cell that was interrupted
SAVING_S = 2.0  # in which Jupyter writes a notebook, which it empties first
GOING_ON = ("starting", "running")
TAG = "parameters"  # of the cell that sets them; papermill's, as is the other one


# -- runs on the host -------------------------------------------------------------------------------------------------


class RunKind(Kind):
    """Executions of notebooks."""

    name = "run"
    prefix = "r"
    record = RunRecord

    def log_of(self, record: RunRecord) -> Growing:
        return PrintedText(record.file("journal"))

    def goes_on(self, record: RunRecord) -> bool:
        """True while a run has not ended, here or in a job of ours.

        One that wrote down its outcome has ended, though its process may take a moment more.
        """
        return place_of(record).is_running() and self.describe(record).state in GOING_ON

    def describe(self, record: RunRecord) -> RunView:
        names = ("id", "pid", "node", "name", "root_dir", "job")
        facts = {name: getattr(record, name) for name in names}
        place = place_of(record)
        view = RunView(age_s=record.age_s(), wrap=record.request.outside, **dict(facts, pid=place.held.pid))
        has_ended = place.is_known and not place.is_running()  # before the look: what it wrote last is seen
        state = read_record(RunState, record.file("state.json"))
        view.state = (state.outcome or "running") if state else "starting"
        if state:
            view.cell, view.count, view.error, view.unwritten = state.cell, state.count, state.error, state.unwritten
        if has_ended and view.state in GOING_ON:
            view.state = "killed"
            last_line = end_of_log(record.file("log"), 1)
            own = re.match(r"\w+(Error|Exception)\b", last_line)
            is_full = shutil.disk_usage(record.directory).free < PART_BYTES
            why = last_line if own else "the disk is full" if is_full else place.why_in_doubt()
            view.error = place.why_ended("received signal") or why
        why = place.why_cut() if view.state in ("killed", "died", "ended") else ""
        if why:
            view.state, view.error = "cut", why
        view.size = size_of(record.file("journal"))
        return view

    def end(self, record: RunRecord) -> None:
        """End a run: interrupt its cell, so that what it has is kept; then its place ends it. No kernel outlives it."""
        mark(record, "stop")  # on another node, the agent in its job sees that
        place = place_of(record)
        children = place.children()
        for pid, _ in children:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGINT)
        # Where nobody sees its kernel, the run itself is told, by a signal: bwrap --unshare-pid without --proc.
        is_told = bool(children) or not place.is_here or place.held is not record
        polite_s = STOP_TIMEOUT_S if is_told else 0.0
        until(lambda: self.describe(record).state not in GOING_ON, polite_s)
        place.end(children, polite_s)


KINDS["run"] = RunKind()


def start_run(request: Request, channel: Channel) -> StartReply:
    """Start to execute a notebook, detached, or submit a job that does, and say which run or job it is.

    It is the same when asked again. Where the notebook is executed so already, say what does it.
    """
    waits = not request.is_one_of_many
    request = request.but(is_one_of_many=False)
    root_dir = resolve_path(request.path)[0] or os.path.expanduser("~")
    is_project = bool(request.path)
    request = with_notebook(request, root_dir)
    project_dir = root_dir if is_project else native(request.path or "")  # else the notebook's own
    jobs = [kind for kind in STARTERS if kind.takes(request)]
    same = []  # type: List[Kept]
    with one_at_a_time(own_tmp_dir(), channel, "another run of rjupyter is starting; waiting"):
        begun = begun_by(request)
        if not begun and not request.overlaps:
            same += [r for r in KINDS["run"].running() if (r.key, r.variant) == (request.key, request.variant)]
            same += [record for kind in STARTERS for record in kind.waiting(request)]
        is_new = not begun and not same
        place = place_of_result(request)
        looks = is_new and place and not request.overlaps
        others = [record for kind in KINDS.values() if looks for record in kind.running()]  # type: List[Kept]
        others = [record for record in others if place_of_result(record.request) == place and not reply_in(record)]
        if others:
            why = "the execution %s, which goes on, is to write it" % others[0].id
            raise Failure("no place for the result " + place.partition(":")[2], why, "-o FILE; or --overlap")
        if is_new and not request.wrapper:
            forget_ended(KINDS["run"])
        if is_new and jobs:
            begun = jobs[0].begin(request, channel)
        elif is_new:
            begun = launch(request, project_dir, channel, launch_run)[0]
    if begun and begun.kind != "run" and waits:  # outside of the lock, for a queue may be long
        return StartReply.read(KINDS[begun.kind].await_reply(begun, channel)).but(is_started=True)
    found = begun or same[0]
    return StartReply(id=found.id, is_started=bool(begun), age_s=found.age_s())


def place_of_result(request: Request) -> str:
    """Return where the result of an execution goes, here or there; empty where no other could get in its way."""
    return request.key if request.is_in_place else request.result


def with_notebook(request: Request, root_dir: str) -> Request:
    """Return a request with the text of a notebook that is on this host, and with what tells its execution from others.

    Raises Failure when there is no such notebook.
    """
    directory = root_dir
    if request.file:
        place = os.path.join(root_dir, os.path.expanduser(native(request.file)))
        suffix = "" if os.path.exists(place) else ".ipynb" if os.path.exists(place + ".ipynb") else ""
        if not request.notebook:
            try:
                text = read_notebook(place + suffix)
            except (OSError, ValueError) as error:
                raise Failure("cannot read %s on the host" % portable(place + suffix), str(error))
            request = request.but(notebook=without_old_outputs(text), original=digest_of(text))
        key = request.key or "host:" + portable(os.path.realpath(place + suffix))
        name = request.name if request.name.endswith(".ipynb") else request.name + suffix
        request = request.but(file=portable(place + suffix), name=name, key=key)
        directory = os.path.dirname(place)
    request = request.but(path=portable(directory))
    names = ("path", "kernel", "parameters", "parameter_files", "files", "brings", "result")
    # A digest, for a value may be a secret.
    variant = request.variant or digest_of(json.dumps([getattr(request, name) for name in names]))
    return request.but(variant=variant)


def without_old_outputs(text: str) -> str:
    """Return a notebook without the outputs that its execution replaces: nobody needs them to travel, or to be kept."""
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError):
        return text  # what is wrong with it, nbformat says
    cells = objects(notebook, "cells")
    for cell in filter(is_executed, cells):
        cell.update(outputs=[], execution_count=None)
    return json.dumps(dict(notebook, cells=cells) if cells else notebook)


def digest_of(text: str) -> str:
    """Return what tells a text from others."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_notebook(path: str) -> str:
    """Return the text of a notebook, a moment later where it is being saved; raises OSError, or ValueError."""
    text = ""

    def is_whole() -> bool:
        nonlocal text
        with open(path, encoding="utf-8-sig") as stream:
            text = stream.read()
        return text.rstrip().endswith("}")

    until(is_whole, SAVING_S)
    return text


def launch_run(found: Launcher, request: Request, root_dir: str, channel: Channel) -> "Optional[RunRecord]":
    """Start a run in one environment and return its record; None where that has no nbclient."""
    python = interpreter_of(found)
    if not python:
        return None
    directory = new_dir(KINDS["run"], channel)
    if request.files:  # a directory of its own, in which what goes along lies
        work = os.path.join(directory, "work")
        os.mkdir(work, 0o700)
        with open(os.path.join(files_dir(), os.path.basename(request.files)), "rb") as stream:
            _, refused = unpack(stream, work, overwrites=False)
        if refused:
            raise Failure("not all files sent along could be written on the host", "\n".join(refused))
        request = request.but(path=portable(work))
    program = leave_agent(directory, run_main, request)
    environment = lasting_environment(found.environment, False)
    log = os.path.join(directory, "log")
    root_dir = native(request.path or "")  # the notebook's own directory, where it is on the host, or the run's
    with start_detached([python, program], environment, root_dir, log, request.is_held) as process:
        facts = {name: getattr(request, name) for name in ("name", "key", "variant")}
        facts.update(facts_of(process.pid, root_dir, request))
        record = RunRecord(request=request.to_keep().but(app=found.app), **facts)
        write_down(record, directory)
    state = os.path.join(directory, "state.json")
    until(lambda: process.poll() is not None or os.path.exists(state), request.start_timeout_s)
    if process.poll() == CANNOT_RUN:
        remove_tree(directory)
        return None
    return record


def follow_runs(request: Request, channel: Channel) -> "Json":
    """Send what the journals of runs hold beyond the offsets, until some have ended; of those the result, and how.

    An id may be that of a job or a wrapper that starts a run. Of several, a job has ended when it is out of the queue.
    """

    def known() -> "Dict[str, Any]":
        records = [record for kind in KINDS.values() for record in kind.records()]
        return {record.id: record for record in records if record.id in request.ids}

    is_alone = len(request.ids) == 1
    late_s = LATE_S if KINDS["job"].records() else 0  # another machine may have written it a moment ago
    until(lambda: len(known()) == len(request.ids), late_s, FOLLOW_MAX_S)
    things = known()
    followed = {}  # type: Dict[str, Followed]
    ended = {}  # type: Dict[str, Record] # how each ended, by the id that was asked for
    failed = {}  # type: Dict[str, Failure] # before there was a run
    gone_at = {}  # type: Dict[str, float] # when each had ended, as we saw it, by our monotonic clock

    def look_at(identity: str) -> bool:
        if identity not in things:
            why = "ended runs are kept for %d days" % (KEEP_ENDED_S // 86400)
            raise Failure("no run of yours has this id: " + identity, why, "rjupyter HOST list")
        kind = KINDS[things[identity].kind]
        thing = record_in(kind, things[identity].directory) or things[identity]  # anew: a job may have got its number
        if identity not in followed:
            run = thing
            if kind.name != "run":
                reply = kind.await_reply(thing, channel) if is_alone else kind.replied(thing, gone_at)
                run = kept_record(KINDS["run"], StartReply.read(reply).id) if reply else None
            if not run:
                return False
            followed[identity] = Followed(run, request.offsets.get(identity, 0))
        found = followed[identity].look(identity, channel)
        if isinstance(found, FollowReply) and (kind.name == "run" or is_alone or not kind.goes_on(thing)):
            followed[identity].send_result(identity, channel)
            ended[identity] = found
        return bool(found == "more")

    def look() -> str:
        has_news = False
        for identity in request.ids:
            try:
                has_news = look_at(identity) or has_news
            except Failure as failure:
                failed[identity] = failure
        return "ended" if ended or failed or channel.is_closed else "more" if has_news else ""

    while until(look, float("inf"), FOLLOW_MAX_S) == "more":
        pass  # the pauses begin anew with each part
    return {"ended": ended, "failed": failed}


class Followed:
    """A run that is followed: what its journal holds beyond an offset is sent, and its result when it has ended."""

    def __init__(self, record: RunRecord, offset: int) -> None:
        self.record = record
        self._journal = Growing(record.file("journal"), offset)
        self._late_until = 0.0  # where another machine wrote it, what it wrote last may be seen late

    def look(self, identity: str, channel: Channel) -> "Any":
        """Send what is new; return "more" where there was something, and how it ended when all of it was sent."""
        look_anew(self.record.directory)
        view = KINDS["run"].describe(self.record)  # before the look at its journal: what it wrote last is seen
        part = self._journal.part()
        if part:
            channel.tell("part", file="journal", id=identity, data=packed(part))
            return "more"
        if view.state in GOING_ON and not channel.is_closed:
            return None
        self._late_until = self._late_until or time.monotonic() + (LATE_S if self.record.job else 0)
        state = read_record(RunState, self.record.file("state.json")) or RunState()
        size = size_of(self.record.file("journal")) + size_of(self.record.file("result.ipynb"))
        is_whole = state.written and state.written == size
        if not is_whole and time.monotonic() < self._late_until and not channel.is_closed:
            return None
        return FollowReply(brings=self.record.request.brings, **view.facts())

    def send_result(self, identity: str, channel: Channel) -> None:
        """Send the result as the run wrote it at its end; of one that was killed, with what its journal has."""
        result = Growing(self.record.file("result.ipynb"))
        parts = iter(result.part, b"")
        state = read_record(RunState, self.record.file("state.json")) or RunState()
        if not state.outcome and size_of(result.path):
            notebook = facts_in(b"".join(parts).decode("utf-8", "replace"))
            cells = objects(notebook, "cells")
            for execution in Executions(Growing(self.record.file("journal")).lines()).cells.values():
                if execution.begun and 0 <= execution.begun.index < len(cells):
                    outputs = outputs_in_file(execution)
                    cells[execution.begun.index].update(outputs=outputs, execution_count=execution.begun.count)
            text = notebook_text(dict(notebook, cells=cells)).encode("utf-8")
            parts = iter([text[at : at + PART_BYTES] for at in range(0, len(text), PART_BYTES)])
        for part in parts:
            channel.tell("part", file="result", id=identity, data=packed(part))


# -- what goes along, and what comes back -----------------------------------------------------------------------------
#
# A tar either way, made and read by the same functions on both sides. Nothing in it leads outside its directory, and
# nothing is written through a link that is there already: each side checks that for itself.


def files_dir() -> str:
    """Return where the host keeps what goes along, each tar under its digest; those not used for a week are removed."""
    directory = first_private(state_dirs("files"))
    paths = [os.path.join(directory, name) for name in os.listdir(directory)]
    old = [path for path in paths if time.time() - time_of(path) > KEEP_ENDED_S]
    records = [record for kind in KINDS.values() for record in kind.records()] if old else []
    used = {os.path.basename(record.request.files) for record in records}  # a queue may be long
    remove_files([path for path in old if os.path.basename(path) not in used])
    return directory


def put_files(request: Request, channel: Channel) -> Record:
    """Take a part of a tar. Whoever sends it writes the same bytes, for its name is their digest."""
    descriptor = os.open(os.path.join(files_dir(), os.path.basename(request.files)), os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.seek(request.offset)
        stream.write(binascii.a2b_base64(request.data))
    return Record()


def bring_files(request: Request, channel: Channel) -> "Json":
    """Send what a run wrote and the request's patterns match, as a tar."""
    record = kept_record(KINDS["run"], request.id)
    if not record:
        raise Failure("no run of yours has this id: " + request.id, "", "rjupyter HOST list")
    base = native(record.root_dir)
    found = {pattern: list(matching(base, native(pattern).split("/"))) for pattern in request.brings}
    paths = [path for found_paths in found.values() for path in found_paths]
    stream = types.SimpleNamespace(write=lambda data: channel.tell("part", file="files", data=packed(data)))
    refused = pack(base, paths, stream, request.brings)
    return {"refused": refused, "unmatched": [pattern for pattern, paths in found.items() if not paths]}


REQUESTS.update(start_run=start_run, follow_runs=follow_runs, put_files=put_files, bring_files=bring_files)


def matching(base: str, pattern: "List[str]") -> "Iterator[str]":
    """Yield the paths below `base` that a pattern matches, as a shell has it; `**` is any number of directories.

    A link is not followed, and so it is yielded where the pattern goes on behind it.
    """
    if not pattern or pattern == ["**"]:
        yield base
    elif pattern[0] == "**":
        for place, places, _ in os.walk(base):
            places[:] = sorted(name for name in places if not name.startswith("."))
            yield from matching(place, pattern[1:])
    else:
        for name in sorted(os.listdir(base)) if os.access(base, os.R_OK) else ():
            path = os.path.join(base, name)
            if not fnmatch.fnmatchcase(name, pattern[0]) or (name.startswith(".") and not pattern[0].startswith(".")):
                continue
            if len(pattern) == 1 or (os.path.islink(path) and os.path.isdir(path) and any(matching(path, pattern[1:]))):
                yield path
            elif os.path.isdir(path) and not os.path.islink(path):
                yield from matching(path, pattern[1:])


def is_matched(name: str, patterns: "List[str]") -> bool:
    """True when one of the patterns matches a path, or a directory in which it lies; with the rules of `matching`.

    A name that begins with a dot is matched by one that does, and by nothing else.
    """

    def is_match(parts: "List[str]", pattern: "List[str]") -> bool:
        if not pattern:
            return not any(part.startswith(".") for part in parts)
        if pattern[0] == "**":
            dots = [at for at, part in enumerate(parts) if part.startswith(".")] + [len(parts)]
            return any(is_match(parts[at:], pattern[1:]) for at in range(dots[0] + 1))
        if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
            return False
        return fnmatch.fnmatchcase(parts[0], pattern[0]) and is_match(parts[1:], pattern[1:])

    parts = [part for part in name.split("/") if part not in ("", ".")]
    return any(is_match(parts, native(pattern).split("/")) for pattern in patterns)


def pack(base: str, paths: "List[str]", stream: "Any", patterns: "Optional[List[str]]" = None) -> "List[str]":
    """Write a tar of what lies at these paths below `base`, directories with all that is in them.

    With `patterns`, only what they match, and no links: of one to a file, the file. Return what was not taken, each
    with the reason. Raises OSError for a file that becomes shorter meanwhile.
    """
    refused = []
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, bufsize=PART_BYTES) as tar:
        found = []
        for top in paths:
            within = os.walk(top) if not os.path.islink(top) else ()
            below = [os.path.join(place, name) for place, places, names in within for name in places + names]
            found += [top, *sorted(below)]
        for path in dict.fromkeys(found):
            name = os.path.relpath(path, base)
            if patterns is not None and path not in paths and not is_matched(name, patterns):
                continue
            tar.inodes = {}  # type: ignore[attr-defined] # a file of two names is two files
            with contextlib.ExitStack() as stack:
                try:
                    check_within(base, path)
                    source = os.path.realpath(path) if patterns is not None or path in paths else path
                    if os.path.islink(path) and source != path and not os.path.isfile(source):
                        raise OSError("it is a link, and not to a file")
                    member = tar.gettarinfo(source, name)
                    member.uid = member.gid = 0
                    member.uname = member.gname = ""
                    content = stack.enter_context(open(source, "rb")) if member.isreg() else None
                except OSError as error:
                    refused.append("%s: %s" % (portable(name), error.strerror or error))
                    continue
                try:
                    tar.addfile(member, content)
                except OSError as error:
                    raise OSError("%s changed while it was read: %s" % (portable(name), error)) from None
    return refused


def check_within(base: str, path: str) -> None:
    """Raise OSError unless a path is a file, a directory or a link that does not lead out of `base`."""
    mode = os.lstat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise OSError("it is not a file")
    top = os.path.join(os.path.realpath(base), "")
    is_absolute = stat.S_ISLNK(mode) and os.path.isabs(os.readlink(path))
    if is_absolute or not os.path.join(os.path.realpath(path), "").startswith(top):
        raise OSError("it leads outside " + portable(base))


def unpack(
    stream: "Any", base: str, overwrites: bool, patterns: "Optional[List[str]]" = None
) -> "Tuple[List[str], List[str]]":
    """Lay down what a tar holds below `base`; return the files, and what was not laid down, each with the reason.

    With `patterns`, only files and directories that they match: whoever made the tar may have put anything into it.
    Raises Wrong where it is no tar.
    """
    written, refused = [], []
    left = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                left -= member.size
                if member.size < 0 or left < 0:
                    raise Wrong("%s: it has %d bytes, more than came" % (member.name, member.size))
            stream.seek(tar.offset)  # where tarfile took a damaged head for the end
            if any(block.strip(b"\0") for block in iter(lambda: stream.read(PART_BYTES), b"")):
                raise Wrong("it is damaged")
            # Links come last: nothing goes through a link of it.
            for member in sorted(tar.getmembers(), key=lambda member: member.issym()):
                try:
                    if patterns is not None and not is_matched(member.name, patterns):
                        raise OSError("it was not asked for")
                    if patterns is not None and not (member.isreg() or member.isdir()):
                        raise OSError("it is not a file")
                    written += lay_down(tar, member, base, overwrites)
                except OSError as error:
                    refused.append("%s: %s" % (portable(member.name), error.strerror or error))
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise Wrong(error) from None
    return written, refused


def lay_down(tar: "Any", member: "Any", base: str, overwrites: bool) -> "List[str]":
    """Lay down one member of a tar below `base`; return its path where it is no directory. Raises OSError."""
    path = os.path.join(base, member.name)
    directory = os.path.normpath(os.path.join(os.path.realpath(base), os.path.dirname(member.name)))
    names = member.name.replace(os.sep, "/").split("/")
    if os.path.isabs(member.name) or ".." in names or os.path.splitdrive(member.name)[0]:
        raise OSError("it leads outside " + portable(base))
    if os.path.realpath(os.path.dirname(path)) != directory or (member.isdir() and os.path.islink(path)):
        raise OSError("a symbolic link is in the way, which may lead elsewhere")
    os.makedirs(path if member.isdir() else directory, exist_ok=True)
    if member.isdir():
        return []
    if os.path.lexists(path) and not overwrites:
        raise OSError("it is there already")
    beside = hidden_beside(path)
    try:
        if member.issym():
            os.symlink(member.linkname, beside)
            check_within(base, beside)
        elif member.isreg() and not member.issparse():
            with open(beside, "wb") as stream:
                shutil.copyfileobj(tar.extractfile(member), stream)
            os.chmod(beside, member.mode & 0o777 & ~own_umask())
        else:
            raise OSError("it is not a file")
        os.replace(beside, path)
    finally:
        remove_files([beside])
    return [path]


# -- a run itself, under the Python of Jupyter's environment ----------------------------------------------------------


class TimeIsUp(Exception):
    """The limit of the whole has passed, or the run was told to stop, between two cells."""


class Run:
    """The execution of one notebook; its journal tells what happened."""

    def __init__(self, directory: str, nbformat: "Any") -> None:
        self.directory = directory
        self.nbformat = nbformat
        self.request = left_request(directory)
        self.deadline = time.monotonic() + (self.request.timeout_s or float("inf"))
        self.notebook = nbformat.reads(self.request.notebook, as_version=4)
        self.pair = self._read_pair() if self.request.file else None
        self.remarks = []  # type: List[str]
        self.kernel, self.language = self._choose_kernel()
        self.parameters = {}  # type: Json # the last word for a name holds, and -p is over the files
        for name, text in self.request.parameter_files:
            self.parameters.update(parameters_in(name, text))
        self.parameters.update(dict(self.request.parameters))
        if self.parameters:
            self._inject_parameters()
        code = [index for index, cell in enumerate(self.notebook.cells) if is_executed(cell)]
        self.numbers = {index: number for number, index in enumerate(code, 1)}
        for index in code:  # what an earlier execution left is no result of this one
            self.notebook.cells[index].update(outputs=[], execution_count=None)
        self.state = RunState(count=len(code))
        self.signal = ""  # by which we were told to end
        self.has_kernel = False
        self.exit_status = None  # type: Optional[int] # of a kernel that died
        self.journal = Journal(os.path.join(directory, "journal"), float("inf"))

    def _read_pair(self) -> "Any":
        """Read a notebook that jupytext keeps in another file, too, as its page does; return what writes both."""
        try:
            import jupytext  # type: ignore[import-not-found]

            manager = jupytext.TextFileContentsManager(root_dir="/", allow_hidden=True)
        except ImportError:
            return None
        name = native(self.request.file).lstrip("/")
        model = manager.get(name)
        if name not in manager.paired_notebooks:
            return None
        self.notebook, self.shown = model["content"], model["last_modified"]
        return manager

    def _choose_kernel(self) -> "Tuple[str, str]":
        """Return the kernel to take, and its language: the one that is named, else the only one of its language."""
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_core.application import JupyterApp
        from traitlets import Type

        class NotebookApp(JupyterApp):
            kernel_spec_manager_class = Type(KernelSpecManager).tag(config=True)

        app = type("ServerApp", (NotebookApp,), {})()  # it has what the server's configuration sets, by both names
        for name in ("notebook", "lab", "server"):
            app.config_file_name = "jupyter_%s_config" % name
            app.load_config_file()
        self.specs = app.kernel_spec_manager_class(parent=app)

        there = {name: entry["spec"].get("language") or "" for name, entry in self.specs.get_all_specs().items()}
        spec = fact(self.notebook.metadata, "kernelspec", {})  # type: Json
        language = fact(spec, "language", "") or fact(fact(self.notebook.metadata, "language_info", {}), "name", "")
        wanted = self.request.kernel or fact(spec, "name", "") or "python3"
        for name in there:
            if name.lower() == wanted.lower():  # as jupyter_client compares them
                return name, there[name] or language or "python"
        version = "0123456789.-_"  # julia-1.8 and ir33 name their language, where the notebook does not say it
        kin = (language or wanted.rstrip(version)).lower()
        like = [name for name in there if kin in (there[name].lower(), not language and name.lower().rstrip(version))]
        like = [] if self.request.kernel else like
        if len(like) == 1:
            self.remarks.append("There is no kernel %s there; using %s." % (wanted, like[0]))
            return like[0], there[like[0]] or language
        why = "there is no kernel %s on the host; there are%s: %s"
        why %= (wanted, " of its language" if like else "", ", ".join(sorted(like or there)) or "none")
        is_other = language and not like and not self.request.kernel
        raise ValueError("it is written in %s, and %s" % (language, why) if is_other else why)

    def _inject_parameters(self) -> None:
        """Put the parameters behind the cell that is tagged "parameters", in place of an earlier injection.

        As papermill does it (papermill.readthedocs.io, "Parameterize"); without such a cell, at the top.
        """
        language = self.language.lower()
        if language not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            raise ValueError("its language is %s; parameters can be written in %s" % (self.language, known))
        lines = ["# Parameters"]
        for name, value in self.parameters.items():  # in R, none begins with an underscore
            lines.append("%s = %s" % (name.lstrip("_") if language == "r" else name, literal(value, language)))
        cell = self.nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-" + TAG]})
        if self.notebook.nbformat_minor < 5:
            cell.pop("id", None)
        cells = self.notebook.cells
        tagged = {}  # type: Dict[str, int]
        for index, other in enumerate(cells):
            for tag in tags_of(other):
                tagged.setdefault(tag, index)
        given, injected = (tagged.get(tag, -1) for tag in (TAG, "injected-" + TAG))
        name = self.request.name
        unset = unset_in(cells[given].source, list(self.parameters)) if given >= 0 and language == "python" else []
        if max(given, injected) < 0:
            text = "%s has no cell tagged `parameters`: the parameters are set in a new first cell."
            self.remarks.append(text % name)
        if unset:
            text = "The cell of %s that is tagged `parameters` does not set: %s"
            self.remarks.append(text % (name, ", ".join(unset)))
        if injected >= 0:
            cells[injected] = cell
        else:
            cells.insert(given + 1, cell)

    # -- what is written down of it --

    def text(self) -> str:
        """Return the notebook as it is now, in the form that a file has."""
        notebook = json.loads(self.nbformat.v4.writes(self.notebook))
        for cell in notebook["cells"]:
            if cell.get("outputs"):
                cell["outputs"] = merged(cell["outputs"])
        return notebook_text(notebook)

    def keep_state(self, **facts: "Any") -> None:
        """Write down where the run stands, for `list`."""
        self.state = self.state.but(**facts)
        write_whole(os.path.join(self.directory, "state.json"), json.dumps(self.state.facts()))

    def begin(self) -> None:
        """Write down what is going to be executed."""
        write_whole(os.path.join(self.directory, "result.ipynb"), self.text())
        for remark in self.remarks:
            self.journal.tell("remark", text=remark)
        self.keep_state()

    def before_cell(self, index: int, engine: "Any") -> None:
        """Called before each cell: write it down, and give the engine the time that is left."""
        if os.path.exists(os.path.join(self.directory, "stop")):
            raise TimeIsUp()
        left_s = self.deadline - time.monotonic()
        if index in self.numbers:
            self.keep_state(cell=self.numbers[index])
            place = {"index": index, "cell": self.numbers[index], "cells": self.state.count}
            code = self.notebook.cells[index].source
            self.journal.tell("begun", id=str(index), time=time.time(), code=code, **place)
        if left_s <= 0:
            raise TimeIsUp()
        left_s = min(left_s, self.request.cell_timeout_s or left_s)
        engine.timeout = None if left_s == float("inf") else int(left_s + 0.999)

    def end(self, outcome: str, error: str) -> None:
        """Write the result, and how it ended."""
        path = os.path.join(self.directory, "result.ipynb")
        write_whole(path, self.text())
        unwritten = self._write_in_place() if self.request.is_in_place else ""
        written = size_of(path) + size_of(self.journal.path)
        self.keep_state(outcome=outcome, error=error[:1000], unwritten=unwritten, written=written)

    def _write_in_place(self) -> str:
        """Let the result take the notebook's place, and return why it could not: it was moved, or edited meanwhile."""
        place = native(self.request.file)
        name = place.lstrip("/")
        try:
            before = read_notebook(place)
            is_shown = not self.pair or self.pair.get(name, content=False)["last_modified"] == self.shown
            if digest_of(before) != self.request.original or not is_shown:
                return "it was changed during the execution"
            if self.pair:
                self.pair.save({"type": "notebook", "content": self.notebook}, name)
            else:
                write_through(place, self.text())
            signing = threading.Thread(target=self._sign, args=(before, read_notebook(place)), daemon=True)
            signing.start()
            signing.join(COMMAND_TIMEOUT_S)  # a database, on a home that may be slow
        except Exception as error:  # the system's, or jupytext's
            return str(error)
        return ""

    def _sign(self, before: str, after: str) -> None:
        """Let Jupyter trust the outputs of the cells that ran, as a page would, and of others if it did before."""
        from nbformat.sign import TrustNotebookApp

        app = TrustNotebookApp()
        app.load_config_file()
        notary = app.notary  # type: Any
        old, new = (self.nbformat.reads(text, as_version=4) for text in (before, after))
        notary.mark_cells(new, notary.check_signature(old))
        for index in self.numbers:
            new.cells[index].metadata["trusted"] = True
        if notary.check_cells(new):
            notary.sign(new)


def write_through(path: str, text: str) -> None:
    """Write a file in one piece where it can be replaced; links and special files are written to. Raises OSError."""
    status = os.stat(path) if os.path.exists(path) else None
    real = os.path.realpath(path)
    is_plain = status is None or (stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
    if is_plain and os.access(os.path.dirname(real), os.W_OK) and not os.path.ismount(real):
        mode = stat.S_IMODE(status.st_mode) if status else 0o666 & ~own_umask()
        write_whole(real, text, mode, hidden_beside(real))
    else:
        with open(path, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)


def own_umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def hidden_beside(path: str) -> str:
    """Return where a notebook is made before it takes its place: Jupyter does not list it there."""
    return os.path.join(os.path.dirname(path), ".%s.%d" % (os.path.basename(path), os.getpid()))


def check_name(name: "Any") -> str:
    """Return the name of a parameter; raises ValueError where Python would not take it."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError("a parameter has a name that Python takes, not %r" % name)
    return name


def parameters_in(name: str, text: str) -> "Json":
    """Return the parameters that a file holds: JSON, or YAML where this Python can read it; raises ValueError."""
    try:
        try:
            found = json.loads(text)
        except ValueError:
            if name.lower().endswith(".json"):
                raise
            found = yaml_in(text)
        if not isinstance(found, dict):
            raise ValueError("it is not a map of names to values")
        return {check_name(key): found[key] for key in found}
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: %s" % (name, error)) from None


def yaml_in(text: str) -> "Any":
    """Return what a YAML file holds, where a date is text as papermill has it; raises ValueError."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError("it is YAML, which Jupyter's environment on the host cannot read (it needs PyYAML)") from None
    yaml.SafeLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


# How languages write down values: papermill's forms (its translators.py) where they hold, else as the language has it.
# Words, by their names in Python; a list; a map; a pair in it. By the name in kernel.json, in lower case.
LANGUAGES = {
    "python": ({name: 'float("%s")' % name for name in ("nan", "inf", "-inf")}, "[%s]", "{%s}", "%s: %s"),
    "r": (
        {"None": "NULL", "True": "TRUE", "False": "FALSE", "nan": "NaN", "inf": "Inf", "-inf": "-Inf"},
        *("list(%s)", "list(%s)", "%s = %s"),
    ),
    "julia": (
        {"None": "nothing", "True": "true", "False": "false", "nan": "NaN", "inf": "Inf", "-inf": "-Inf"},
        *("[%s]", "Dict(%s)", "%s => %s"),
    ),
}


def literal(value: "Any", language: str) -> str:
    """Return a value as source; raises ValueError for one that no language has a form for."""
    words, sequence, mapping, pair = LANGUAGES[language]
    if isinstance(value, str):
        text = repr(value) if language == "python" else json.dumps(value, ensure_ascii=False)
        return text.replace("$", "\\$") if language == "julia" else text
    if isinstance(value, list):
        return sequence % ", ".join(literal(each, language) for each in value)
    if isinstance(value, dict):
        return mapping % ", ".join(pair % (literal(str(key), language), literal(value[key], language)) for key in value)
    if value is not None and not isinstance(value, (int, float)):
        raise ValueError("there is no form for a %s among the parameters" % type(value).__name__)
    return words.get(str(value), str(value))


def unset_in(source: str, names: "List[str]") -> "List[str]":
    """Return those of the names that no statement of Python's sets; none where it is no Python, but for its magics."""
    try:
        tree = ast.parse(re.sub(r"(?m)^(\s*)[%!?].*", r"\1pass", source))
    except (SyntaxError, ValueError, RecursionError):
        return []
    within = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)
    found, rest = [], [tree]  # type: Tuple[List[str], List[Any]]
    for node in rest:  # it grows meanwhile
        rest += [child for child in ast.iter_child_nodes(node) if not isinstance(child, within)]
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
    return [name for name in names if name not in found]


def run_main(directory: str) -> None:
    """Execute the notebook of a run's directory. Ends with CANNOT_RUN where this Python has no nbclient."""
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        print(error)
        sys.exit(CANNOT_RUN)
    try:
        run = Run(directory, nbformat)
    except Exception as error:  # not a notebook, or not one for here
        state = RunState(outcome="invalid", error=str(error).strip().split("\n")[0])
        write_whole(os.path.join(directory, "state.json"), json.dumps(state.facts()))
        return
    is_private = takes_sockets(run.specs.get_kernel_spec(run.kernel).argv)
    if not is_private:
        text = "The kernel %s listens on ports, where other users of the host can read what it prints."
        run.remarks.append(text % run.kernel)
    run.begin()
    tell_kernel = guard_kernel(directory)
    outcome = outcome_of(run, nbclient, tell_kernel, is_private)
    has_died = outcome[0] == "unstarted" and "Kernel died" in outcome[1]  # nbclient's and jupyter_client's words
    if is_private and has_died and run.deadline > time.monotonic():
        outcome = outcome_of(run, nbclient, tell_kernel, is_private=False)  # not every kernel knows sockets
    run.end(*outcome)


def guard_kernel(directory: str) -> "Callable[[int], None]":
    """Start a process that ends the kernel when we end, even by SIGKILL; return what tells it which one that is.

    It removes the kernel's sockets, too. ipykernel looks for its parent, R's and others do not; and what a cell started
    looks for nobody.
    """
    reading, writing = os.pipe()
    if os.fork():
        os.close(reading)
        return lambda pid: write_all(writing, struct.pack("=i", pid))
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    os.close(writing)
    known = {}  # type: Dict[int, str]
    for data in iter(lambda: os.read(reading, 4), b""):
        pid = struct.unpack("=i", data)[0]
        known[pid] = process_identity(pid)
    for pid, identity in known.items():
        if identity and identity == process_identity(pid):
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
    remove_files(found_in([directory, own_tmp_dir()], os.path.basename(directory) + "-k-*"))
    os._exit(0)


def socket_prefix(directory: str) -> str:
    """Return the beginning of the names of a kernel's sockets, in a directory that is ours alone; empty for none."""
    for place in (directory, own_tmp_dir()):
        with contextlib.suppress(OSError):
            prefix = os.path.join(private_dir(place), os.path.basename(directory) + "-k")
            if can_hold_socket(prefix + "-0"):
                return prefix
    return ""


def new_engine(run: Run, nbclient: "Any", tell_kernel: "Callable[[int], None]", is_private: bool) -> "Any":
    """Return nbclient's engine for a run, with a word to the journal at each step; its kernel on sockets or ports."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    class Engine(nbclient.NotebookClient):  # type: ignore[misc]
        async def async_start_new_kernel_client(self) -> "Any":
            process = getattr(self.km, "provisioner", None) or self.km.kernel
            if getattr(process, "pid", None):
                tell_kernel(process.pid)
            loop = asyncio.get_event_loop()
            task = (getattr(asyncio, "current_task", None) or asyncio.Task.current_task)()  # type: ignore[attr-defined] # 3.6

            def end(name: str) -> None:
                run.signal = name
                self.shutdown_kernel = "immediate"
                if task:
                    task.cancel()

            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # in place of nbclient's own
                loop.add_signal_handler(signum, end, signal.Signals(signum).name)
            client = await super().async_start_new_kernel_client()
            client.iopub_channel.socket.rcvhwm = 0  # else a cell that is quicker than we are loses what it shows
            run.has_kernel = True
            self.shutdown_kernel = "graceful"
            return client

        async def async_execute_cell(self, cell: "Any", cell_index: int, *arguments: "Any", **options: "Any") -> "Any":
            run.before_cell(cell_index, self)
            is_done = False
            try:
                cell = await super().async_execute_cell(cell, cell_index, *arguments, **options)
                is_done = True
                return cell
            except (CellTimeoutError, DeadKernelError):
                process = getattr(self.km, "provisioner", None) or self.km.kernel
                run.exit_status = getattr(process, "process", process).poll()
                self.shutdown_kernel = "immediate"  # it would not hear a polite word
                raise
            finally:
                if cell_index in run.numbers:
                    count = run.notebook.cells[cell_index].execution_count
                    run.journal.tell("finished", id=str(cell_index), time=time.time(), is_done=is_done, count=count)

        def process_message(self, msg: "Any", cell: "Any", cell_index: int) -> "Any":
            try:
                return super().process_message(msg, cell, cell_index)
            finally:
                if msg["msg_type"] in OUTPUT_TYPES:
                    run.journal.tell("printed", id=str(cell_index), type=msg["msg_type"], content=msg["content"])

    prefix = socket_prefix(run.directory) if is_private else ""
    config = Config({"KernelManager": {"transport": "ipc", "ip": prefix}} if prefix else {})
    start_s = min(run.request.start_timeout_s, run.deadline - time.monotonic())
    engine = Engine(
        run.notebook,
        config=config,
        timeout=None,
        startup_timeout=max(1, int(start_s)),
        iopub_timeout=int(START_TIMEOUT_S),  # for what has come by then, and is not taken yet
        allow_errors=run.request.allows_errors,
        kernel_name=run.kernel,
        shutdown_kernel="immediate",  # until it has answered
        resources={"metadata": {"path": native(run.request.path or "")}},
    )
    engine.create_kernel_manager().kernel_spec_manager = run.specs
    return engine


def outcome_of(run: Run, nbclient: "Any", tell_kernel: "Callable[[int], None]", is_private: bool) -> "Tuple[str, str]":
    """Let nbclient execute a run's notebook; return how that ended, in a word, and why.

    nbclient raises for each end but the good one, and for all that is wrong in between; a stop raises too, and is told
    by the file that asked for it, because an interrupted cell looks like one that failed.
    """
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        new_engine(run, nbclient, tell_kernel, is_private).execute()
    except (Exception, asyncio.CancelledError) as raised:
        error = raised
    else:
        outputs = [output for cell in run.notebook.cells for output in cell.get("outputs", [])]
        errors = [output for output in outputs if output.output_type == "error"]
        allowed = "%d error%s allowed" % (len(errors), " was" if len(errors) == 1 else "s were")
        return "done", allowed if errors and run.request.allows_errors else ""
    place = "in cell %d of %d" % (run.state.cell, run.state.count)
    if os.path.exists(os.path.join(run.directory, "stop")):
        return "stopped", place
    if run.signal:
        return "ended", "it was ended by %s %s" % (run.signal, place)
    last_line = str(error).strip().split("\n")[-1]
    if not run.has_kernel and time.monotonic() >= run.deadline - 1:
        return "timeout", "its time ran out before the kernel %s had started" % run.kernel
    if not run.has_kernel:  # what it said itself is the end of our log
        said = end_of_log(os.path.join(run.directory, "log"), 5)
        return "unstarted", "\n".join(filter(None, [last_line, said]))
    if isinstance(error, (CellTimeoutError, TimeIsUp)):
        return "timeout", "its time ran out " + place
    if isinstance(error, DeadKernelError):
        status = run.exit_status or 0
        number = -status if status < 0 else status - 128 if status > 128 else 0  # the latter a shell's word for it
        names = {one.value: one.name for one in signal.Signals}
        if run.exit_status is None or names.get(number) == "SIGKILL":
            return "died", "it was killed, by hand or because memory ran out"
        return "died", "it was ended by %s" % names[number] if number in names else "it ended with status %d" % status
    if isinstance(error, CellExecutionError):
        if error.ename == "SystemExit" and error.evalue in ("", "0", "None"):
            return "done", "it called sys.exit " + place
        return "failed", ": ".join(filter(None, (error.ename, error.evalue))).strip().split("\n")[-1]
    traceback.print_exception(type(error), error, error.__traceback__)  # the disk is full
    return "failed", "%s: %s" % (type(error).__name__, last_line)


# agent ends

# -- here -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A notebook to execute: its text, or for one on the host its name there; and where its result goes here."""

    name: str
    text: str
    output: str  # empty for one on the host that is executed in place

    @property
    def is_on_host(self) -> bool:
        """True when it is on the host already."""
        return self.name.startswith(":")

    @classmethod
    def from_argument(cls, name: str, output: Optional[str], is_in_place: bool) -> "Source":
        """Read the notebook that an argument names; raises Failure when there is none, or no room for its result."""
        if name.startswith(":"):
            result = "" if is_in_place else executed_name(os.path.basename(name[1:]))
            text = ""
        else:
            text = "?"  # until it is read
            name = name if os.path.exists(name) or not os.path.exists(name + ".ipynb") else name + ".ipynb"
            result = name if is_in_place else executed_name(name)
            try:
                text = read_notebook(name)
                notebook = json.loads(text)
            except OSError as error:
                raise Failure("cannot read " + name, str(error), "for one on the host, write :%s" % name) from None
            except (ValueError, RecursionError) as error:
                signs = {"version https://git-lfs": "it is a pointer of Git LFS", "<<<<<<<": "it has a merge conflict"}
                why = next((why for sign, why in signs.items() if sign in text), "it is not JSON: %s" % error)
                raise Failure("%s is not a notebook" % name, why if text.strip() else "it is empty") from None
            if not isinstance(notebook, dict) or "nbformat" not in notebook:
                raise Failure("%s is not a notebook" % name, "it has no nbformat")
        if output and os.path.isdir(output):
            output = os.path.join(output, executed_name(os.path.basename(name.lstrip(":"))))
        output = output or result
        if output in ("", "-"):
            return cls(name, text, output)
        why = ""
        if os.path.exists(output):
            why = "" if os.access(output, os.W_OK) else "it cannot be written"
        elif not os.access(os.path.dirname(os.path.realpath(output)), os.W_OK) or output.endswith(os.sep):
            why = "there is no directory %s here, or it cannot be written" % (os.path.dirname(output) or ".")
        if why:
            raise Failure("no place for the result " + output, why, "execute ... -o FILE")
        return cls(name, text, output)


def executed_name(name: str) -> str:
    """Return where the result of a notebook goes: train.ipynb becomes train.executed.ipynb."""
    return (name[: -len(".ipynb")] if name.endswith(".ipynb") else name) + ".executed.ipynb"


def parse_value(text: str) -> Any:
    """Return a value: JSON, a list of words in brackets, or else the text itself; raises ValueError.

    Python's own words mean what they mean there. What begins like JSON, or with a quote, is never taken as it stands.
    """
    try:
        return json.loads(text)
    except ValueError:
        parts = [part.strip() for part in text[1:-1].split(",")]
        if text[:1] == "[" and text[-1:] == "]" and all(parts):
            return [parse_value(part) for part in parts]
        if text[:1] in ("[", "{", '"', "'"):
            raise
    return {"None": None, "True": True, "False": False}.get(text, text)


class Along(NamedTuple):
    """What goes along with a notebook: a tar, its digest and its size in bytes."""

    stream: Any
    digest: str
    size: int

    @classmethod
    def of(cls, source: Source, paths: List[str]) -> "Along":
        """Pack what lies at these paths, which are below the notebook's directory; raises Failure."""
        if source.is_on_host:
            why = "%s is on the host, where its own directory has what it needs" % source.name
            raise Failure("wrong usage", "--with goes with notebooks that are here: " + why, "", EXIT_USAGE)
        base = os.path.dirname(os.path.abspath(source.name))
        for path in paths:
            is_below = os.path.join(os.path.abspath(path), "").startswith(os.path.join(base, ""))
            why = "" if os.path.lexists(path) else "there is no such file"
            if why or not is_below:
                why = why or "it is not below %s, the notebook's directory" % base
                raise Failure("%s cannot be sent along" % path, why, "a copy of it in that directory")
        stream = tempfile.TemporaryFile()  # noqa: SIM115 # as long as we run
        try:
            refused = pack(base, [os.path.abspath(path) for path in paths], stream)
        except OSError as error:
            refused = [str(error)]
        if refused:
            raise Failure("not everything can be sent along", "\n".join(refused), "--with for each of the other files")
        size = stream.tell()
        stream.seek(0)
        digest = hashlib.sha256()
        for part in iter(lambda: stream.read(PART_BYTES), b""):
            digest.update(part)
        return cls(stream, digest.hexdigest(), size)

    def send(self, agent: Agent) -> None:
        """Send it to the host, in parts, each of which may be sent again."""
        for at in range(0, self.size, SENT_BYTES):
            self.stream.seek(at)
            data = binascii.b2a_base64(self.stream.read(SENT_BYTES)).decode("ascii")
            request = Request(action="put_files", files=self.digest, offset=at, data=data)
            doing = "Sending %.1f MB" % (self.size / 1e6)
            agent.ask_on(lambda: request, Record, doing)  # noqa: B023 # it asks at once


SENT_BYTES = 12 << 20  # in one request


class Task(NamedTuple):
    """What is executed for one combination of a grid's values: its name, what is asked, and where its result goes."""

    name: str
    request: Request
    output: Optional[str]  # None: beside us, under a name that follows from the notebook's
    original: str = ""  # what stands here where the result goes, when it is to be replaced


class Execution:
    """A run on the host, followed from here: what its journal tells is shown, and its result is taken."""

    def __init__(self, task: Task, identity: str, agent: Agent) -> None:
        self.id = identity
        self.name = task.name
        self.output, self.original = task.output, task.original
        self.agent = agent
        self.messages = agent.messages
        self.result: List[bytes] = []  # the parts of it that are here
        self.seconds = 0.0  # that its cells took
        self._began = time.monotonic()
        self._failed_at = ""  # the line of code
        self.shows_output = False
        self.brings: List[str] = []  # patterns: those that were typed here, and no word of the host's
        self.again = ""  # the command that brings all of it again
        self.overwrites = False  # what is brought may replace what is here
        self.is_one_of_many = False  # its messages carry its name, and its cells are not reported
        self.offset = 0  # in its journal
        self.path: Optional[str] = None  # where its result is
        self._rest = bytearray()  # of a line, which may be longer than many parts
        self._screen = Screen(self._show_line)
        self._bad_lines = 0
        self._begun: Dict[str, Entry] = {}

    def follow(self, handlers: Dict[str, Handler]) -> None:
        """Follow the run to its end, and write its result. Raises Failure: 5 a cell, 6 its time, 255 the connection."""
        ended, failed = hear_runs({self.id: self}, self.agent, "Executing " + self.name, handlers)
        for failure in failed.values():
            raise failure
        view = ended[self.id]
        self.id = view.id
        try:
            self.write(view)
        except Failure:
            if view.state != "done":
                self.messages.warn(what_and_why(self.failure(view)))
            raise
        self.settle(view)

    # -- the journal --------------------------------------------------------------------------------------------------

    def take_part(self, message: Told, show: Show) -> None:
        """Take a part of the result, or of the journal; each line that this completes says something."""
        part = unpacked(message)
        if message.file == "result":
            self.result.append(part)
            if len(self.result) * PART_BYTES > NOTEBOOK_MAX:
                raise Wrong("a result of more than %d MB" % (NOTEBOOK_MAX >> 20))
            return
        self.offset += len(part)
        self._rest += part
        if b"\n" in part:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                self._take(entry_in(facts_in(line.decode("utf-8", "replace"))), show)
        self._screen.show()

    def _take(self, entry: Entry, show: Show) -> None:
        if entry.kind == "begun":
            self._begun[entry.id] = entry
            show("cell %d/%d" % (entry.cell, entry.cells))
        elif entry.kind == "printed" and entry.type == "error":  # the rest of it is said at the end
            marked = re.findall(r"(?m)^-+> *(\d+) (.*)", re.sub(COLOURS, "", text_of(entry)))
            self._failed_at = "\nline %s: %s" % marked[0] if marked else ""
        elif entry.kind == "printed":
            self._screen.write(text_of(entry) if entry.type == "stream" else "")
        elif entry.kind == "finished" and entry.id in self._begun:
            self._screen.end_line()
            begun = self._begun.pop(entry.id)
            seconds = max(0.0, entry.time - begun.time)
            self.seconds += seconds
            facts = {"cell": begun.cell, "count": begun.cells, "seconds": seconds, "is_done": entry.is_done}
            self.messages.event("cell", id=self.id, **facts)
            is_silent = self.messages.has_spinner or self.messages.as_json or self.is_one_of_many
            if entry.is_done and not is_silent:
                self.messages.note("Cell %d/%d done (%.1f s)." % (begun.cell, begun.cells, seconds))
        elif entry.kind == "remark":
            self.messages.note(entry.text)
        elif entry.kind == "gap":
            self.messages.warn("%s: %s" % (self.name, entry.why))
        else:
            self._bad_lines += 1

    def _show_line(self, line: str) -> None:
        say = self.messages.note if self.shows_output else self.messages.detail
        say("%s: %s" % (self.name, line) if self.is_one_of_many else line)

    # -- the result ---------------------------------------------------------------------------------------------------

    def write(self, view: FollowReply) -> None:
        """Write the result, and say how the run ended; raises Failure where it cannot be written."""
        path = self.output
        if path is None or (view.unwritten and not path):
            if not re.fullmatch(r"[^-./\\\x00-\x1f][^/\\\x00-\x1f]*", view.name):
                raise Wrong("a notebook cannot be called %r" % view.name, "-o FILE")
            self.name, path = view.name, executed_name(view.name)
        here = ""
        if self.original:
            with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8-sig") as stream:
                here = stream.read()
        if here != self.original:
            text = "%s was changed here during the execution and is left as it is; the result is beside it."
            self.messages.warn(text % path)
            path = executed_name(path)
        if self._bad_lines:
            self.messages.warn("%d lines of the journal of %s are damaged." % (self._bad_lines, self.id))
        self.path = path
        text = b"".join(self.result).decode("utf-8", "replace")
        if text and "cells" not in facts_in(text):
            raise Wrong("the result is no notebook")
        if text and path == "-":
            try:
                self.messages.line(text.rstrip("\n"), is_file=True)
            except Failure as lost:
                lost.try_ = self.again
                raise
        elif text and path:
            try:
                write_through(path, text)
            except OSError as error:
                raise Failure("cannot write " + path, str(error), self.again) from None
        facts = {"id": self.id, "outcome": view.state, "cells": view.cell, "seconds": self.seconds}
        facts["path"] = path if text and path else None
        if view.state == "done":
            waited_s = time.monotonic() - self._began
            text = "Executed %s: %s in %.1f s" % (self.name, count_of(view.count, "cell"), waited_s)
            text += "; %s." % view.error if view.error else "."
            self.messages.step(text, "executed", **facts)
        else:
            self.messages.event("executed", **facts)

    def settle(self, view: FollowReply) -> None:
        """Print where the result is, bring what the run wrote, and raise the Failure that its end stands for."""
        path = self.path or ""
        is_silent = self.messages.as_json or path == "-"
        if path and self.result and not is_silent:
            try:
                self.messages.line(path)
            except Failure as lost:
                if view.state == "done":
                    raise
                self.messages.warn(lost.what)  # how the run ended is more to know
        lacking = self._bring(path, is_silent) if self.brings else []
        if view.brings and not self.brings:
            text = "%s was to bring %s; execute --attach %s takes --bring as well."
            self.messages.note(text % (self.name, " ".join(view.brings), self.id))
        if view.state != "done":
            if lacking:
                self.messages.note("\n".join(lacking))
            raise self.failure(view)
        if lacking:
            what = "not everything that %s was to bring is here" % self.name
            raise Failure(what, "\n".join(lacking), self.again + " --force   (replaces them)")
        if view.unwritten:
            why = "%s\nthe result is in %s" % (view.unwritten, path)
            raise Failure("cannot write the result of %s on %s" % (self.name, self.agent.ssh.destination), why)

    def _bring(self, path: str, is_silent: bool) -> List[str]:
        """Bring what the run wrote to where its result is; return what is not here, each with the reason."""
        base = os.path.dirname(path) or "."
        here, top = os.stat(base).st_dev, tempfile.gettempdir()
        room = shutil.disk_usage(top).free // (2 if here == os.stat(top).st_dev else 1)  # or it lies there twice
        with tempfile.TemporaryFile() as stream:

            def request() -> Request:
                stream.seek(0)
                stream.truncate()
                return Request(action="bring_files", id=self.id, brings=self.brings)

            def take(message: Told, show: Show) -> None:
                if stream.tell() > room:
                    raise Wrong("more than the disk here has room for")
                stream.write(unpacked(message))

            doing = "Bringing what %s wrote" % self.name
            lists = reply_of(refused="List[str]", unmatched="List[str]")
            reply = self.agent.ask_on(request, lists, doing, {"part": take})
            stream.seek(0)
            written, refused = unpack(stream, base, self.overwrites, self.brings)
        for brought in map(os.path.normpath, written):
            self.messages.event("brought", path=brought, id=self.id)
            if not is_silent:
                self.messages.line(brought.replace("\n", "; "))
        return [*reply.refused, *refused, *("%s: nothing matches" % pattern for pattern in reply.unmatched)]

    def failure(self, view: RunView) -> Failure:
        """Return the failure that a run ended with before it was done."""
        cell = "cell %d of %d" % (view.cell, view.count)
        why = view.error + (self._failed_at if view.state == "failed" else "")
        if self.result:
            why += "\nthe result so far is in %s" % (self.path or "the notebook there")
            why += ", because of the notebook there: " + view.unwritten if view.unwritten else ""
        ends = {
            "failed": ("%s failed in %s" % (cell, self.name), EXIT_CELL_FAILED),
            "died": ("the kernel of %s died in %s" % (self.name, cell), EXIT_CELL_FAILED),
            "timeout": ("%s took too long" % self.name, EXIT_TIMEOUT),
            "cut": ("the job of %s ended" % self.name, EXIT_SERVER_ENDED),
            "stopped": ("the execution of %s was stopped" % self.name, EXIT_FAILURE),
            "unstarted": ("the kernel of %s did not start" % self.name, EXIT_SERVER_ENDED),
            "invalid": ("%s cannot be executed on %s" % (self.name, self.agent.ssh.destination), EXIT_FAILURE),
        }
        what, status = ends.get(view.state, ("the execution of %s ended early" % self.name, EXIT_FAILURE))
        try_ = "--start-timeout, if it takes longer" if view.state == "unstarted" and "respond" in why else ""
        try_ = "--kernel NAME" if view.state == "invalid" and "there are of its language" in why else try_
        return Failure(what, why, try_, status)


def hear_runs(
    runs: Dict[str, Execution], agent: Agent, doing: str, handlers: Dict[str, Handler]
) -> Tuple[Dict[str, FollowReply], Dict[str, Failure]]:
    """Take what runs, by the ids that they were asked for, have to tell until some have ended; return how those did.

    What failed before there was a run has its failure instead.
    """

    def request() -> Request:
        for run in runs.values():
            run.result.clear()
        return Request(action="follow_runs", ids=list(runs), offsets={name: run.offset for name, run in runs.items()})

    def take_part(message: Told, show: Show) -> None:
        if message.id not in runs:
            raise Wrong("wrong in it: id")
        runs[message.id].take_part(message, show if len(runs) == 1 else lambda words: None)

    kind = reply_of(ended="Dict[str, FollowReply]", failed="Dict[str, Failure]")
    doing = doing if agent.messages.has_spinner else ""
    reply = agent.ask_on(request, kind, doing, dict(handlers, part=take_part))
    ids = [*reply.ended, *reply.failed]
    if not ids or not set(ids) <= set(runs) or len(set(ids)) < len(ids):
        raise Wrong("wrong in it: ended")
    return reply.ended, reply.failed


class Batch:
    """Several executions, so many at once, followed in one conversation: each result is written when it is there."""

    def __init__(self, tasks: List[Task], width: int, agent: Agent, new: Callable[[Task, str], Execution]) -> None:
        self.running: Dict[int, Execution] = {}  # by the number of their task, as all is here
        self.agent = agent
        self.messages = agent.messages
        self._tasks = tasks
        self._width = width
        self._new = new  # makes what follows a task, by the id of its run
        self._ended: Dict[int, Tuple[Execution, FollowReply]] = {}
        self._failures: Dict[int, Failure] = {}
        self.has_ended = False

    def follow(self) -> None:
        """Begin and follow all, to their ends; raises Failure with the worst status, which says what failed."""
        count = len(self._tasks)
        waiting = list(range(count))
        while waiting or self.running:
            if waiting and len(self.running) < self._width:
                self._begin(waiting[0])
                if len(waiting) == count:  # the host has answered: what is said of it holds
                    facts = (count_of(count, "notebook"), self.agent.ssh.destination, self._width)
                    self.messages.note("Executing %s on %s, %d at once." % facts)
                del waiting[0]
            else:
                self._hear(count - len(waiting))
        for index, (execution, view) in sorted(self._ended.items()):
            if index not in self._failures:
                self._try(index, execution.settle, view)
        self.has_ended = True
        if self._failures:
            failures = sorted(self._failures.items())
            why = ["%s: %s" % (self._tasks[index].name, what_and_why(failure)) for index, failure in failures]
            status = max(failure.status for _, failure in failures)
            what = "%d of %d executions failed" % (len(failures), count)
            raise Failure(what, "\n".join(why), status=status)
        done = len(self._ended)
        self.messages.note("All %d are done." % done if done == count else "Done: %d of %d." % (done, count))

    def _try(self, index: int, do: Callable[[FollowReply], None], view: FollowReply) -> None:
        try:
            do(view)
        except Failure as failure:
            self._failures[index] = failure

    def _fail(self, index: int, failure: Failure) -> None:
        self._failures[index] = failure
        self.messages.note("%s: %s" % (self._tasks[index].name, what_and_why(failure)))

    def _begin(self, index: int) -> None:
        task = self._tasks[index]
        doing = "Launching the execution of " + task.name if self.messages.has_spinner else ""
        try:
            reply = self.agent.ask_on(lambda: task.request, StartReply, doing)
        except NotConnected:
            raise
        except Failure as failure:
            self._fail(index, failure)
            return
        if not reply.is_started:
            text = "%s is already running (%s); --overlap starts it anyway."
            self.messages.warn(text % (task.name, reply.id))
            self.messages.event("overlap", id=reply.id)
            return
        self.messages.event("started", id=reply.id)
        self.running[index] = self._new(task, reply.id)
        self.running[index].is_one_of_many = True

    def _hear(self, begun: int) -> None:
        """Take what those that run have to tell, until some of them have ended."""
        by_id = {execution.id: index for index, execution in self.running.items()}
        doing = "Executing (%d done, %d running)" % (begun - len(self.running), len(self.running))
        runs = {execution.id: execution for execution in self.running.values()}
        ended, failed = hear_runs(runs, self.agent, doing, {})
        for identity, view in ended.items():
            index = by_id[identity]
            execution = self.running.pop(index)
            execution.id = view.id
            self._ended[index] = execution, view
            self._try(index, execution.write, view)
            if view.state != "done" and index not in self._failures:
                self.messages.note("%s: %s" % (execution.name, what_and_why(execution.failure(view))))
        for identity, failure in failed.items():
            del self.running[by_id[identity]]
            self._fail(by_id[identity], failure)


def what_and_why(failure: Failure) -> str:
    """Return a failure in one line, without the advice."""
    return "%s: %s" % (failure.what, failure.why.split("\n")[0]) if failure.why else failure.what


def label_of(name: str, values: Dict[str, Any]) -> str:
    """Return a notebook's name with the values that it is executed with: train.lr=0.1,model=cnn.ipynb.

    What a file's name should not have is left out, and a digest stands for it.
    """
    stem = name[: -len(".ipynb")] if name.endswith(".ipynb") else name

    def is_word(value: Any) -> bool:
        with contextlib.suppress(ValueError):
            return isinstance(value, str) and bool(parse_value(value) == value)
        return False

    words = {key: value if is_word(value) else json.dumps(value) for key, value in values.items()}
    label = ",".join("%s=%s" % pair for pair in words.items())
    short = re.sub(r"[^\w.+=,-]", "_", label)[:50]
    short += "" if short == label else "-" + digest_of(label)[:6]
    return "%s.%s.ipynb" % (stem, short) if values else name


def unpacked(message: Told) -> bytes:
    """Return the bytes of a message; raises Wrong."""
    try:
        return zlib.decompressobj().decompress(binascii.a2b_base64(message.data), PART_BYTES)
    except (zlib.error, ValueError) as error:
        raise Wrong(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# kernels (an annex: the core is whole without it)
#
# One kernel at a time: `list --kernels`, `wait`, `stop KERNEL`. A kernel is named by its notebook or by how its id
# begins.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins

WAIT_EVERY_S = 0.5
INTERRUPT_TIMEOUT_S = 5.0  # in which a kernel heeds one; numpy's long steps and the like take it when they are done
STARTING_S = 10.0  # after which one that no page has ever asked has started: Jupyter Server 2.21 does not say so
GPU_TIMEOUT_S = 5.0
LATE_WORD_S = 3.0  # in which a recorder has written down what a kernel that is idle did last


def live_kernels(request: Request) -> "List[Tuple[ServerRecord, KernelState]]":
    """Return the kernels of the user's servers that answer, or of PATH's; raises Failure where only a page sees any."""
    found = []
    is_locked = False
    for record in KINDS["server"].running() + other_servers():
        info = server_info(record)
        if not info or not is_in_path(record, request) or not can_ask_server(record, info):
            continue
        kernels = ask_for_list(info, "api/kernels")
        notebooks = notebooks_of(info) if kernels else {}
        for kernel in kernels:
            view = KernelState(id=fact(kernel, "id", ""), server=record.id, name=fact(kernel, "name", ""))
            view.notebook = notebooks.get(view.id, "")
            view.state = fact(kernel, "execution_state", "")
            view.idle_s = seconds_since(kernel.get("last_activity"))
            view.connections = max(0, fact(kernel, "connections", 0))
            found.append((record, view))
        is_locked = is_locked or (info.has_password and not info.token)
    if is_locked and not found:
        why = "its configuration sets a password and takes away the token, so only a page can log in"
        raise Failure("a server there takes no token", why, "take the empty token out of its configuration, then --new")
    return found


def kernel_named(request: Request, thing: str = "kernel") -> "Tuple[ServerRecord, KernelState]":
    """Return the kernel that is named, or the only one; raises Failure, with those that there are."""
    kernels = live_kernels(request)
    named = [row for row in kernels if is_named(request.name, row[1].notebook, row[1].id)]
    for record, kernel in [] if named else kernels:
        former = mark_of(record, kernel.id).named(kernel.notebook).former
        named += [(record, kernel)] if any(is_named(request.name, notebook, "") for notebook in former) else []
    named = [row for row in named if is_whole_name(request.name, row[1].notebook)] or named
    if len(named) == 1:
        return named[0]
    there = ", ".join(kernel.title for _, kernel in kernels)
    what = "there is no such %s: %s" % (thing, request.name) if request.name else "no kernel of yours runs"
    if named:
        what = "several kernels could be meant"
    raise Failure(what, "there is: " + there if there else "", "name one of these" if there else "")


def list_kernels(request: Request, channel: Channel) -> "Json":
    """Describe each kernel, with what it holds of the memory and where it listens."""
    found = []  # type: List[Optional[Dict[int, int]]]
    asking = threading.Thread(target=lambda: found.append(gpu_memory()), daemon=True)
    asking.start()
    kernels = live_kernels(request)
    processes = all_processes()
    listening = {}  # type: Dict[str, Any] # the ports and paths, by the sockets as /proc/PID/fd has them (proc(5))
    for row in tcp_rows(" 0A "):  # those that listen
        listening["socket:[%s]" % row[9]] = int(row[1][-4:], 16)
    with contextlib.suppress(OSError), open("/proc/net/unix", errors="replace") as stream:
        rows = [row.split(None, 7) for row in stream]
        listening.update({"socket:[%s]" % row[6]: row[7].strip() for row in rows if len(row) == 8})
    asking.join(GPU_TIMEOUT_S + 1)  # longer only where a driver holds the command, and no signal ends it
    on_gpu = found[0] if found else None
    for record, kernel in kernels:
        pids = processes_of_kernel(kernel.id, processes)
        kernel.memory = sum(processes[pid][1] for pid in pids) if pids else None
        kernel.gpu_memory = sum(on_gpu.get(pid, 0) for pid in pids) if on_gpu and pids else None
        connection = read_json(os.path.join(native(record.runtime_dir), "kernel-%s.json" % kernel.id))
        own = {port for name, port in connection.items() if name.endswith("_port")}
        own |= {"%s-%s" % (connection.get("ip"), port) for port in own}  # on sockets, it is a part of their names
        kernel.ports = ports_of(pids, own, listening)
    missing = "GPU memory is not shown: nvidia-smi does not answer." if on_gpu is None else ""
    return {"kernels": [kernel for _, kernel in kernels], "missing": missing}


def all_processes() -> "Dict[int, Tuple[int, int, str]]":
    """Return of each process its parent, its resident bytes and its command line: from /proc (proc(5)), or from ps."""
    found = {}
    if os.path.exists("/proc/self/statm"):
        for pid, parent in parents().items():
            with contextlib.suppress(OSError), open("/proc/%d/statm" % pid, "rb") as process:
                pages = int(process.read().split()[1])
                found[pid] = (parent, pages * os.sysconf("SC_PAGE_SIZE"), command_of_process(pid))
        return found
    columns = ["-o", "pid=", "-o", "ppid=", "-o", "rss=", "-o", "args="]
    _, said, _ = run_command(["ps", "-axww", *columns], COMMAND_TIMEOUT_S)
    rows = [line.split(None, 3) for line in said.splitlines()]
    rows = [row for row in rows if len(row) == 4 and all(word.isdigit() for word in row[:3])]
    return {int(pid): (int(parent), int(rss) * 1024, words) for pid, parent, rss, words in rows}


def processes_of_kernel(identity: str, processes: "Dict[int, Tuple[int, int, str]]") -> "List[int]":
    """Return the process of a kernel, by its connection file, and those below it."""
    found = [pid for pid, (_, _, words) in processes.items() if "kernel-%s.json" % identity in words]
    for parent in found:  # it grows meanwhile
        found += [pid for pid, (above, _, _) in processes.items() if above == parent and pid not in found]
    return found


def ports_of(pids: "List[int]", own: "Set[Any]", listening: "Dict[str, Any]") -> "List[int]":
    """Return the ports on which processes of a kernel listen, but for those through which Jupyter talks to it.

    ipykernel has one more than its connection file names: what ZeroMQ waits for together with them is no cell's.
    """
    found = set()  # type: Set[Any]
    for pid in pids:
        names = {}
        with contextlib.suppress(OSError):
            for fd in os.listdir("/proc/%d/fd" % pid):
                names[fd] = os.readlink("/proc/%d/fd/%s" % (pid, fd))
        ports = {fd: listening[name] for fd, name in names.items() if name in listening}
        for fd in [fd for fd, name in names.items() if name == "anon_inode:[eventpoll]"]:
            waiting = re.findall(r"^tfd: +(\d+)", read_text("/proc/%d/fdinfo/%s" % (pid, fd)), re.MULTILINE)
            together = {ports[each] for each in waiting if each in ports}
            own = own | together if own & together else own
        found.update(ports.values())
    return sorted(port for port in found - own if isinstance(port, int))


def gpu_memory() -> "Optional[Dict[int, int]]":
    """Return how many bytes of a GPU each process holds, as nvidia-smi tells in MiB; None where it does not answer."""
    if not shutil.which("nvidia-smi"):
        return {}
    argv = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    status, said, _ = run_command(argv, GPU_TIMEOUT_S)
    found = {}  # type: Dict[int, int]
    for line in said.splitlines():
        pid, _, size = line.partition(",")
        if pid.strip().isdigit() and size.strip().isdigit():
            found[int(pid)] = found.get(int(pid), 0) + (int(size) << 20)
    return None if status == 124 else found


def end_kernel(request: Request, channel: Channel) -> None:
    """End one kernel, as its page would (Jupyter Server, "Kernels API")."""
    record, kernel = kernel_named(request, "server, execution or kernel")
    if request.asks and (kernel.state == "busy" or kernel.id in computing_kernels(record)):
        raise Failure("nothing was stopped", "its kernel is busy: %s" % kernel.title, "the same with --yes")
    info = server_info(record)
    status = ask_server(info, "api/kernels/" + kernel.id, "DELETE", COMMAND_TIMEOUT_S)[0] if info else 0
    if status not in (204, 404):
        raise Failure("the kernel was not ended", "HTTP status %d" % status, "rjupyter HOST stop " + record.id)
    facts = {"kernel": kernel.id, "notebook": kernel.notebook, "server": record.id}
    channel.tell("stopped", what="kernel", name=kernel.title, **facts)


def wait_for_kernel(request: Request, channel: Channel) -> "Json":
    """Wait until a kernel is idle, or has died, or the time is up; say how its last cell ended."""
    record, kernel = kernel_named(request)
    processes = identities_of(kernel.id)
    began = time.monotonic()
    was_idle = False
    journal, executions = JournalReader(record.file("cells", kernel.id + ".journal")), Executions()

    def look() -> str:
        nonlocal was_idle
        kernel.state = state_of_kernel(record, kernel.id, processes)
        is_late = time.monotonic() - began > STARTING_S
        last = cells_so_far(journal, executions)[-1]
        if kernel.state in ("idle", "starting") and is_computing(record, last):
            with contextlib.suppress(OSError):  # on a full disk, no end can be written down
                private_dir(record.file("cells"))
                kernel.state = "busy"
        if kernel.state == "starting" and (is_late or last.finished):
            return "idle"
        has_ended = kernel.state == "dead" or (kernel.state == "idle" and was_idle)  # once may be between two cells
        was_idle = kernel.state == "idle"
        return kernel.state if has_ended else "closed" if channel.is_closed else ""

    def last_ended() -> "Optional[CellOutput]":
        ran = [cell for cell in cells_so_far(journal, executions) if cell.begun]
        return ran[-1] if ran and ran[-1].finished else None

    state = until(look, request.timeout_s or float("inf"), WAIT_EVERY_S) or "busy"
    last = until(last_ended, LATE_WORD_S) if state == "idle" else None
    reply = {"kernel": kernel, "state": state, "count": None, "seconds": None, "is_done": None}
    if last:
        seconds = last.finished.time - last.begun.time
        reply.update(count=last.begun.count, seconds=seconds, is_done=last.finished.is_done)
    return reply


def is_computing(record: ServerRecord, last: CellOutput) -> bool:
    """True when a kernel's last cell goes on, and its recorder would know otherwise.

    Jupyter calls a kernel idle when a debugger or a widget's subshell is, and starting until a page has come.
    """
    recorder = read_record(RecorderMark, record.file("recorder.json")) if last.begun and not last.finished else None
    return bool(recorder and is_same_process(recorder.pid, recorder.identity))


def computing_kernels(record: ServerRecord) -> "List[str]":
    """Return the ids of a server's kernels that compute, as its recorder saw."""
    there = [kernel_id_of(os.path.basename(path)) for path in found_in([native(record.runtime_dir)], "kernel-*.json")]
    journals = [(kernel, JournalReader(record.file("cells", kernel + ".journal"))) for kernel in there]
    return [kernel for kernel, j in journals if is_computing(record, cells_so_far(j, Executions())[-1])]


def cells_so_far(journal: JournalReader, executions: Executions) -> "List[CellOutput]":
    """Take what came into a journal since the last look, but not what cells printed; return the cells, at least one."""
    for line in journal.lines():
        if not line.endswith('"kind": "printed"}'):
            executions.take(facts_in(line))
    return list(executions.cells.values()) or [CellOutput()]


def identities_of(kernel: str) -> "List[Tuple[int, str]]":
    """Return the process of a kernel, and what tells it from a later one; nothing if that cannot be seen."""
    processes = all_processes()
    found = processes_of_kernel(kernel, processes)
    tops = [pid for pid in found if processes[pid][0] not in found]  # what it forked has its command line
    return [(pid, process_identity(pid)) for pid in tops[:1]]


def state_of_kernel(record: ServerRecord, identity: str, processes: "List[Tuple[int, str]]") -> str:
    """Return what a kernel does: busy, idle or starting; empty if that is unknown; dead if its process is gone.

    Jupyter starts such a kernel anew, and goes on to call it busy (measured, Jupyter Server 2.21).
    """
    if not all(is_same_process(*process) for process in processes):
        return "dead"
    info = server_info(record)
    status, said = ask_server(info, "api/kernels/%s?no_track_activity=1" % identity) if info else (404, None)
    return "dead" if status == 404 or not place_of(record).is_running() else fact(said, "execution_state", "")


# -- eval -------------------------------------------------------------------------------------------------------------


def eval_code(request: Request, channel: Channel) -> "Json":
    """Let a kernel execute code, once, however often we are asked; send what it printed after a line, to its end.

    The recorder of its server asks for it: what it prints is in the journal whatever becomes of us.
    """
    record, kernel = kernel_for_eval(request, channel)
    path = record.file("cells", kernel.id)
    channel.tell("launching", id=kernel.id[:8], doing="goes on there")
    processes = identities_of(kernel.id)  # before it is asked: it may die of that
    recorder = read_record(RecorderMark, record.file("recorder.json"))
    is_visible = place_of(record).is_here and not record.request.is_held  # in a wrapper, its pid is another one here
    offset = 0
    asked = "%s.%s.ask" % (path, request.errand)
    if not os.path.exists(asked) and not os.path.exists(asked + "ed"):
        offset = size_of(path + ".journal")
        write_whole(asked, request.data)
    journal = JournalReader(path + ".journal", offset)
    executions = Executions()
    cell = executions.cells[request.errand] = CellOutput()  # until it begins

    alive_at = time.monotonic()

    def look() -> str:
        nonlocal cell, alive_at
        is_lost = is_visible and recorder and not is_same_process(recorder.pid, recorder.identity)
        state = state_of_kernel(record, kernel.id, processes)  # before the look at what it wrote
        for at, line in journal.placed():
            facts = facts_in(line)
            found, entry = executions.take(facts)
            if found and entry.kind == "begun" and entry.asked_by == request.errand:
                cell = found
            is_ours = (found is cell and cell.begun) or (entry.kind == "gap" and (cell.begun or request.line))
            if is_ours and at >= request.line:
                channel.tell("recorded", entry=facts, at=at)
            if cell.finished:
                break
        if cell.finished:
            how = "done" if cell.finished.is_done else "failed" if cell.begun else "aborted"
            return "dead" if cell.finished.has_died else how
        alive_at = alive_at if state == "dead" else time.monotonic()
        is_over = time.monotonic() - alive_at > LATE_WORD_S or is_lost  # else what it said last may be on its way
        if state == "dead" and is_over:
            return "dead"
        return "lost" if is_lost else "closed" if channel.is_closed else ""

    state = until(look, request.timeout_s or float("inf"), FOLLOW_MAX_S)
    if state == "lost":  # the next recorder is not to send it when nobody waits any more
        remove_files([asked])
    return {"kernel": kernel, "state": state or ("busy" if cell.begun else "queued")}


def kernel_for_eval(request: Request, channel: Channel) -> "Tuple[ServerRecord, KernelState]":
    """Return the kernel that is named, or the only one, or a new one where there is none; heard by a recorder."""
    if not request.name and not live_kernels(request):
        servers = [record for record in KINDS["server"].running() if is_in_path(record, request)]
        if not servers:
            raise Failure("no server of yours runs there", "", "open one first, or `execute` a notebook")
        info = server_info(servers[0])
        there = list(fact(info and ask_server(info, "api/kernelspecs")[1], "kernelspecs", {}))  # type: List[str]
        sent = json.dumps({"name": there[0]} if len(there) == 1 else {}).encode()  # else the server's usual one
        status, said = ask_server(info, "api/kernels", "POST", START_TIMEOUT_S, sent=sent) if info else (0, None)
        if status != 201:
            why = "HTTP status %d; the server has: %s" % (status, ", ".join(sorted(there)) or "no kernel")
            raise Failure("no kernel could be started", why, "rjupyter HOST logs")
        request = request.but(name=fact(said, "id", ""))
    record, kernel = kernel_named(request)
    revive_recorder(record)
    path = record.file("cells", kernel.id + ".json")
    if not record.directory or not until(lambda: os.path.exists(path), UNKNOWN_KERNEL_S / 2):
        why = "what its kernels print is not recorded (--no-record, or another program's server)"
        raise Failure("cannot use the server %s" % record.id, why, "rjupyter HOST --new   (starts another)")
    return record, kernel


def interrupt_kernel(request: Request, channel: Channel) -> "Json":
    """Interrupt what a kernel computes; raises Failure when it goes on with that."""
    record, kernel = kernel_named(request)
    info = server_info(record)
    journal = JournalReader(record.file("cells", kernel.id + ".journal"))
    processes = identities_of(kernel.id)
    last = cells_so_far(journal, Executions())[-1]
    is_recorded = bool(last.begun and not last.finished)  # Jupyter calls a kernel "starting" until a page has come
    is_idle = not is_recorded and state_of_kernel(record, kernel.id, processes) != "busy"
    status = ask_server(info, "api/kernels/%s/interrupt" % kernel.id, "POST")[0] if info else 0
    if status != 204:
        raise Failure("the kernel was not interrupted", "HTTP status %d" % status, "stop, for the kernel itself")

    def has_heeded() -> str:
        state = state_of_kernel(record, kernel.id, processes)
        has_ended = any(line.endswith('"kind": "finished"}') for line in journal.lines())  # another may have begun
        if state == "dead":
            return state
        return "interrupted" if has_ended or not (is_recorded or state == "busy") else ""

    state = "idle" if is_idle else until(has_heeded, INTERRUPT_TIMEOUT_S, WAIT_EVERY_S)
    if not state:
        why = "it was told to, and computes on after %d s" % INTERRUPT_TIMEOUT_S
        try_ = "rjupyter HOST stop %s --yes   (ends the kernel)" % kernel.id[:8]
        raise Failure("the kernel was not interrupted", why, try_)
    return {"kernel": kernel, "state": state}


REQUESTS.update(eval_code=eval_code, interrupt_kernel=interrupt_kernel)
REQUESTS.update(list_kernels=list_kernels, wait_for_kernel=wait_for_kernel)
ENDING.append(end_kernel)
COMPUTING.append(computing_kernels)


# ---------------------------------------------------------------------------------------------------------------------
# schedulers (an annex: the core is whole without it)
#
# A host that is a login node: Jupyter, or a notebook, runs in a job that the cluster's own scheduler starts on another
# node. The job runs the agent there, as ssh would, with the same request; it answers into a file of the shared home,
# and stays until what it launched has ended. This room alone knows Slurm and the others.
# ---------------------------------------------------------------------------------------------------------------------


class Scheduler(Record):
    """A scheduler, by the command that submits: how it names a job, what lists the user's jobs, and what cancels one.

    In the commands, {id} is the scheduler's number of a job, {user} the user, {cluster} the one that took the job: a
    word with that is left out where there is none.
    """

    id: str  # a pattern: the line by which a submission names the job, and its cluster; the last, for sites print more
    query: "List[str]"  # of a job that waits, the line that begins with its number is shown as it stands
    cancel: "List[str]"
    none: str = ""  # what a query that fails says for want of jobs
    variables: str = "$"  # of the user's, which would change what these commands do or print
    forecast: "List[str]" = []  # options that let a submission say when a job would start, and take none
    limits: "List[str]" = []  # asks what the site allows
    refused: "Dict[str, str]" = {}  # options of a submission that a job of ours cannot have, each with the reason


SQUEUE = ["squeue", "--clusters={cluster}", "--noheader", "--user={user}", "--states=all"]
SEVERAL = "it starts several"
RETURNS = "it does not return before the job has ended"
SCHEDULERS = {
    "sbatch": Scheduler(
        id=r"(?m)^(?:Submitted batch job )?(?P<id>\d+)(?: on cluster |;)?(?P<cluster>(?<=[ ;])\S+)?\s*$",
        query=[*SQUEUE, "--format=%i|%T|%r|%S|%N|%L|%o"],
        cancel=["scancel", "--clusters={cluster}", "{id}"],
        variables=r"SQUEUE_|SCANCEL_|SACCT_|SLURM_(TIME_FORMAT|JOB|CPUS_|MEM_|NTASKS|TASKS_)"
        r"|SBATCH_(WAIT|ARRAY_INX|REQUEUE|NO_REQUEUE|TEST_ONLY|OUTPUT|ERROR|INPUT|EXPORT)$",
        forecast=["--test-only", "--wrap=true"],
        limits=["sinfo", "--clusters={cluster}", "--noheader", "--format=%P up to %l, %D nodes"],
        refused={
            "-a|--array": "a job array: " + SEVERAL,
            ":$": "a heterogeneous job: " + SEVERAL,
            "-W|--wait$": RETURNS,
            "-Q|--quiet$": "it does not say which job it is",
            "--test-only$": "nothing is started",
        },
    ),
    # PBS (123.server) and Grid Engine (Your job 123 ("name") has been submitted).
    "qsub": Scheduler(
        id=r'(?m)^(?:Your job )?(?P<id>\d+)(?:\[\d*\])?(?:\.[\w.-]+| \(".*"\) has been submitted)?\s*$',
        query=["qstat"],
        cancel=["qdel", "{id}"],
        refused={"-[tJ]$": "a job array: " + SEVERAL, "-sync$|block=": RETURNS},
    ),
    "bsub": Scheduler(
        id=r"(?m)^Job <(?P<id>\d+)> is submitted\b",
        query=["bjobs", "-w"],
        none=r"No unfinished job found",
        cancel=["bkill", "{id}"],
        refused={r".*\[\d": "a job array: " + SEVERAL, "-K$": RETURNS},
    ),
    "condor_submit": Scheduler(
        id=r"(?m)^(?:\d+ job\(s\) submitted to cluster )?(?P<id>\d+)\.(?:\d+ - \d+\.\d+)?\s*$",
        query=["condor_q", "-autoformat", "ClusterId", "JobStatus", "HoldReason"],
        cancel=["condor_rm", "{id}"],
    ),
    # flux-jobs(1): an id has two spellings, of which one is plain ASCII.
    "flux": Scheduler(
        id=r"(?m)^(?P<id>[f\u0192][1-9A-HJ-NP-Za-km-z]+)\s*$",
        query=["flux", "jobs", "--no-header", "-o", "{id.f58plain} {status}"],
        cancel=["flux", "cancel", "{id}"],
        variables=r"FLUX_JOBS_FORMAT_DEFAULT",
    ),
    "oarsub": Scheduler(
        id=r"(?m)^\[?OAR_JOB_ID=(?P<id>\d+)\s*$",
        query=["oarstat", "-u"],
        cancel=["oardel", "{id}"],
        variables=r"OAR_OARSTAT_OUTPUT_FORMAT",
        refused={"--array": "a job array: " + SEVERAL, "-I$|--interactive$": "it waits for a terminal"},
    ),
}
# A row of our query to Slurm, squeue(1): %o is the script's full path, whose name is our id. A job is live in these
# states; in any other it has ended, and sacct(1) tells how, where squeue does not any more.
SLURM_ROW = (
    r"(?m)^(?P<number>\d+)(?:[_+][^|]*)?\|(?P<state>\w+)\|(?P<reason>[^|]*)\|(?P<start>[^|]*)\|(?P<node>[^|]*)"
    r"\|(?P<left>[^|]*)(?:\|(?P<script>.*))?$"
)
SLURM_WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
SLURM_RUNS = ("RUNNING", "SUSPENDED", "RESIZING", "SIGNALING", "STOPPED")
SACCT = ["sacct", "--clusters={cluster}", "--allocations", "--noheader", "--parsable2"]
SACCT += ["--jobs={id}", "--format=JobIDRaw,State"]
ENDED = JobState(is_live=False, is_waiting=False, word="ended")
# One that we do not know: the first word that begins with a digit is the job.
UNKNOWN = Scheduler(id=r"(?s)\A.*?(?P<id>\d\S*)", query=[], cancel=[])
# What a terminal sets for their commands, but no secret: kept with a job, so that nobody waits for a terminal again.
OF_SCHEDULERS = r"PATH$|LD_LIBRARY_PATH$|SLURM_(?!JWT)|SGE_|PBS_|LS[FB]_|EGO_|_?CONDOR_|FLUX_|OAR"
JOB_ENDS = {
    "TIMEOUT": "its time ran out",
    "DEADLINE": "its deadline passed",
    "CANCELLED": "it was cancelled",
    "CANCELED": "it was cancelled",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "OUT_OF_MEMORY": "it ran out of memory",
    "PREEMPTED": "another job took its place",
    "FAILED": "it failed",
    "COMPLETED": "",  # by itself
}
QUERY_MIN_S = 5.0  # between two questions to a scheduler, from all of ours on this node
QUERY_MAX_S = 30.0
QUERY_TIMEOUT_S = 20
SUBMIT_TIMEOUT_S = 40  # longer than a busy scheduler takes: sbatch itself tries again and again
SETTLE_S = 2 * QUERY_MIN_S  # in which a scheduler comes to know what happened
UNSEEN_S = 120.0  # in which it may not know a job yet: sites keep the answers of qstat and squeue for a minute


# -- jobs as things that are kept -------------------------------------------------------------------------------------


class InJob(Here):
    """In a job of ours, on this node or another, from where its scheduler tells of its end, and ends it."""

    def __init__(self, record: Kept, outer: "Any") -> None:
        super().__init__(record, outer)
        self.is_here = is_here(record)
        self.settle_s = 0.0 if self.is_here else SETTLE_S

    def is_running(self) -> bool:
        """True when its process runs on this node, or elsewhere its job does."""
        if self.is_here:
            return super().is_running()
        state = job_state(self.outer)
        return state.is_live and not state.is_waiting

    def why_ended(self, log: str) -> str:
        """Return why the job ended, when the scheduler says so, or a signal came from outside."""
        if JOB_ENDS.get(job_state(self.outer).word) or "received signal" in log:
            return self.why_in_doubt()
        return super().why_ended(log) if self.is_here else ""

    def why_in_doubt(self) -> str:
        return why_job_ended(self.outer)

    def why_cut(self) -> str:
        is_cut = not self.is_here and end_of_job(self.outer) not in ("COMPLETED", "FAILED")
        return self.why_in_doubt() if is_cut else ""

    def left_s(self) -> float:
        return job_state(self.outer).left_s or 0.0

    def children(self) -> "List[Tuple[int, str]]":
        return super().children() if self.is_here else []

    def end(self, children: "List[Tuple[int, str]]", polite_s: float) -> None:
        if self.is_here:
            super().end(children, polite_s)
        else:
            KINDS["job"].end(self.outer)


class JobKind(Starter):
    """Jobs that we submitted, each of which is to start a server or a run."""

    name = "job"
    prefix = "j"
    record = JobRecord
    place = InJob

    def goes_on(self, record: JobRecord) -> bool:
        return job_state(record).is_live

    def listed(self) -> "List[JobRecord]":
        """Return those that `list` shows: what an ended one started says itself how it ended."""
        return self.running()

    def describe(self, record: JobRecord) -> StarterView:
        state = job_state(record)  # which may find out the number
        return super().describe(record).but(job=record.number, command=record.command, **state.facts())

    def end(self, record: JobRecord) -> None:
        """Cancel a job; what ran in it ends with it. Raises Failure where it cannot be done.

        One that has begun looks for the word "unwanted", and ends itself where its scheduler does not do it.
        """
        mark(record, "unwanted")
        cancel = SCHEDULERS.get(record.command, UNKNOWN).cancel
        if cancel and record.number:
            status, said, why = run_scheduler(record, cancel, QUERY_TIMEOUT_S)
        else:
            status, said, why = int(bool(record.number)), "", "%s is not known here" % record.command
        patience_s = SETTLE_S if status and begun_of(record) else 0
        if not until(lambda: not job_state(record).is_live, patience_s) and status:
            why = (said + why).strip()
            raise Failure("job %s was not cancelled" % record.number, why, "it ends by itself as soon as it starts")
        mark(record, "cancelled")

    def takes(self, request: Request) -> bool:
        return bool(request.submit) and not request.job

    def begin(self, request: Request, channel: Channel) -> JobRecord:
        """Submit a job in which our agent does what `request` asks for. Raises Failure when it is not taken.

        Jupyter is installed before, where there is none: nodes often have no network. The record is there before the
        job is. A submission that fails may have been taken all the same (sbatch says "Socket timed out" of a slurmctld
        that goes on later): it is marked "unwanted", which ends such a job when it begins.
        """
        for kind in KINDS.values():  # what was in a job before the job
            forget_ended(kind)
        if request.may_install and not request.python and not request.env and not request.outside:
            next(launchers(request, resolve_path(request.path)[0], channel, []))
        enter_terminal(request, channel, [])
        directory = new_dir(self, channel, "is being submitted in a job")
        record = JobRecord(
            request=request.to_keep(),
            number="",
            command=os.path.basename(native(request.submit[0])),
            environment={n: portable(os.environ[n]) for n in of_terminal or {} if re.match(OF_SCHEDULERS, n)},
            **facts_of(os.getpid(), "", request),
        )
        try:
            write_down(record, directory)
            words = self._submit(record, request)
        except BaseException:
            mark(record, "unwanted")
            kept = record_in(self, directory)
            if not kept or not self.goes_on(kept):
                remove_tree(directory)  # one that is taken later does not find its program, and ends
            raise
        for line in words.splitlines():
            channel.tell("note", text=portable(line))
        channel.tell("queue", id=record.id, job=record.number, is_waiting=True, word="submitted")
        return record

    def _submit(self, record: JobRecord, request: Request) -> str:
        """Write a job's script, submit it, and write down its number; return what the command said beside that."""
        program = self.leave(record, request, shell=os.environ.get("SHELL", ""))
        script = record.file(record.id + ".sh")  # by its name a scheduler's answer tells it again
        words = [shlex.quote(word) for word in (sys.executable, program, record.file("log"))]
        # Valid in any shell: a scheduler may give it to the queue's own, csh by Grid Engine's default.
        write_whole(script, "#!/bin/sh\nexec /bin/sh -c '%s' %s %s %s\n" % (JOB_SCRIPT, *words), 0o700)
        output = early_words(record).replace("%", "%%")  # sbatch puts the job's facts in the place of %j and so on
        argv = [native(word) for word in request.submit]
        argv = [word.replace("{script}", script).replace("{output}", output) for word in argv]
        status, said, why = run_scheduler(record, argv, SUBMIT_TIMEOUT_S)
        matches = list(re.finditer(SCHEDULERS.get(record.command, UNKNOWN).id, said))
        if status or not matches:
            why = why.strip() or said.strip() or "status %d" % status
            what = "%s did not take the job" % portable(argv[0])
            raise Failure(what, why, "other options in --slurm or --submit")
        number, *cluster = matches[-1].groups("")
        record.number, record.cluster = number.replace("\u0192", "f"), "".join(cluster)
        record.pid, record.identity = 0, ""
        write_down(record, record.directory)
        return why

    def watch(self, record: JobRecord, channel: Channel) -> "Iterator[bool]":
        """Tell how a job stands. Of one that has ended, a shared home may show late what was said in it."""
        told = {}  # type: Json
        max_age_s = QUERY_MIN_S
        ended_at = 0.0  # by our monotonic clock
        while True:
            state = job_state(record, max_age_s)
            max_age_s = min(QUERY_MAX_S, max_age_s * 1.01)
            facts = {name: getattr(state, name) for name in ("is_waiting", "word", "reason", "start")}
            news = dict(facts, id=record.id, job=record.number)
            if state.is_live and news != told:
                told = news
                channel.tell("queue", **news)
            ended_at = 0.0 if state.is_live else ended_at or time.monotonic()
            was_cut = JOB_ENDS.get(state.word) and state.word != "FAILED"
            is_late = time.monotonic() - ended_at > LATE_S
            yield not state.is_live and bool(was_cut or is_marked(record, "ended") or is_late)

    def await_reply(self, record: JobRecord, channel: Channel) -> "Json":
        """Wait for the reply of the agent in a job, as long as its queue takes; without a word it has begun."""
        reply = super().await_reply(record, channel)
        channel.tell("queue", id=record.id, job=record.number)
        return reply

    def no_begin(self, record: JobRecord) -> Failure:
        """Return the failure of a job that ended before it said all, with its own words, where it left any."""
        with contextlib.suppress(OSError):
            if not time_of(record.file("log")):
                os.replace(early_words(record), record.file("log"))
        words = end_of_log(record.file("log"))
        try_ = ""
        if not words and not begun_of(record):
            words = "nothing of it is in %s" % portable(record.directory)
            try_ = "--state-dir PATH, where its node does not see or cannot write this directory"
        what = "job %s ended before it had started" % record.number
        return Failure(what, "%s\n%s" % (why_job_ended(record), words), try_, EXIT_SERVER_ENDED)

    def enter(self, record: JobRecord, request: Request) -> Request:
        """On its node, write down that a job has begun, and when its time is up.

        A server there listens on an address that the login node reaches, also what listens on all.
        """
        if request.shell:  # a scheduler may name the shell of its queue instead, or none
            os.environ["SHELL"] = request.shell
        remove_files([early_words(record), record.file("end.json")])  # nothing more comes there; it was queued again
        left_s = None
        if record.command == "sbatch":
            seen = record.but(environment={})  # without its directory, in which the login node alone writes what it saw
            seen.id = record.id
            left_s = state_in(seen, time.time(), ask_scheduler(seen)).left_s
        begun = JobState(node=os.uname().nodename, left_s=left_s)
        write_whole(record.file("begun.json"), json.dumps(begun.facts()))
        if request.action != "open" or request.via_node:
            return request.but(node_address="")
        address = node_address(request.node_address)
        return request.but(node_address=address, ip=address if request.ip == "127.0.0.1" else request.ip)

    def hint(self) -> str:
        return next((command for command in SCHEDULERS if shutil.which(command)), "")


KINDS["job"] = JobKind()
STARTERS.append(KINDS["job"])


# -- a job's life -----------------------------------------------------------------------------------------------------

# What the script of a job does, in sh: the shared home may show its files some seconds late, and listing a directory
# lets NFS look anew. No `!` and no quote in it: a scheduler may give the script to csh.
JOB_SCRIPT = (
    'for n in 1 2 3 4 5 6 7 8 9 10; do test -s "$1" && break; ls "${1%/*}/" >/dev/null 2>&1; sleep 1; done; '
    'exec "$0" -IS "$1" >>"$2" 2>&1 </dev/null'
)


def early_words(record: JobRecord) -> str:
    """Return where a job's words are that come before our program runs in it.

    Not in the job's own directory: a node may not see that yet, and Slurm ends a job whose output it cannot open.
    """
    return os.path.join(os.path.dirname(os.path.dirname(record.directory)), record.id + ".out")


# What a row says of a job that has begun and does not run now: it waits again, is held or over; not: it is suspended.
RUNS_NO_MORE = r" (?:[CEFHQWX]|E?h?R?(?:qw|wq)|PEND|PSUSP|DONE|EXIT)(?: |$)|^\d+ [1345](?: |$)"
IS_OVER = r" (?:[CFX]|DONE|EXIT)(?: |$)|^\d+ [34](?: |$)"  # and kept in the queue for a while


def job_state(record: JobRecord, max_age_s: float = QUERY_MIN_S) -> JobState:
    """Say where a job stands. A scheduler that does not answer leaves it as it was: live, with "unknown" for a word.

    What was written down of its end is final. Slurm knows of a job whether it is live; of others only a job that waits
    or gives no signs is looked for in the queue: one that has begun says itself that it lives. An answer may be a
    minute old.
    """
    end = read_record(JobState, record.file("end.json"))
    if end:
        return end
    begun = begun_of(record)
    is_slurm = record.command == "sbatch"
    is_mute = bool(begun) and not is_slurm and not gives_signs(record)  # its scheduler may have suspended it
    if record.command in SCHEDULERS and (is_slurm or not begun or is_mute):
        state = state_in(record, *query(record, max_age_s))
        if is_mute and re.search(RUNS_NO_MORE, state.reason):
            state = ENDED
    else:
        is_live = not is_mute if begun else may_be_taken(record) and gives_signs(record)
        state = JobState() if is_live else ENDED
    if state.is_live and is_marked(record, "cancelled"):
        state = ENDED.but(word="CANCELLED")
    elif state.is_live and is_marked(record, "ended"):
        state = ENDED
    elif state.is_live and begun and not state.node and (not is_slurm or gives_signs(record)):  # its row is older
        state = begun.but(is_waiting=False, word="RUNNING")
    if not state.is_live:
        note_end(record, state)
    return state


def may_be_taken(record: JobRecord) -> bool:
    """True for a job that was taken, or that is being submitted: not where that failed or was killed."""
    return bool(record.number) or (not is_marked(record, "unwanted") and place_of(record).is_running())


def begun_of(record: JobRecord) -> "Optional[JobState]":
    """Return what a job wrote down when it began, as it is now; None when it has not, as far as this machine sees."""
    path = record.file("begun.json")
    state = read_record(JobState, path) if record.directory else None
    if state and state.left_s:
        state.left_s -= time.time() - time_of(path)
    return state


def note_end(record: JobRecord, state: JobState) -> None:
    """Write down how a job ended where its scheduler or itself says so: who misses it may be another cluster."""
    is_told = is_marked(record, "ended") and record.age_s() > UNSEEN_S  # in which a scheduler may tell more
    if record.directory and (state.word in JOB_ENDS or is_told):
        with contextlib.suppress(OSError):
            write_whole(record.file("end.json"), json.dumps(state.facts()))


def row_of(record: JobRecord, output: str) -> "Optional[Dict[str, str]]":
    """Return what an answer says about our job, the whole line as its `reason` where the scheduler is not Slurm.

    A number of Slurm's may come again, on a new cluster: then the script is another one than was first seen with it.
    """
    if record.command != "sbatch":
        line = re.search(r"(?m)^[ \t]*%s\b.*$" % re.escape(record.number), output) if record.number else None
        return {"script": "a line", "reason": " ".join(line.group().split())} if line else None
    seen = read_text(record.file("seen")) if record.directory else ""
    for match in reversed(list(re.finditer(SLURM_ROW, output))):
        row = match.groupdict("")
        is_named = bool(record.id) and bool(re.search(r"\b%s(/job)?\.sh$" % record.id, row["script"]))
        if is_named or (row["number"] == record.number and seen in ("", row["script"])):
            record.number = row["number"]  # where the submission did not tell it
            return row
    return None


def state_in(record: JobRecord, looked: float, output: str) -> JobState:
    """Return what an answer of a scheduler, given at `looked`, says of a job; 0 when it did not answer."""
    if not looked:
        is_there = may_be_taken(record)
        return JobState(is_live=is_there, is_waiting=is_there, word="unknown", reason="the scheduler does not answer")
    row = row_of(record, output)
    if not row or row.get("state") == "REVOKED":  # another cluster of the federation has it
        is_unseen = looked < record.created + UNSEEN_S and not is_marked(record, "seen")
        has_begun = begun_of(record) is not None
        is_mute = has_begun and not gives_signs(record)
        has_said = has_begun and is_marked(record, "alive")  # one that is killed as it begins has not
        is_live = not is_mute and (has_said or (is_unseen and may_be_taken(record)))
        return JobState() if is_live else ENDED
    if record.directory and not is_marked(record, "seen"):
        with contextlib.suppress(OSError):
            write_whole(record.file("seen"), row["script"])
    if record.command != "sbatch":
        return ENDED if re.search(IS_OVER, row["reason"]) else JobState(word="PENDING", reason=row["reason"])
    waits, runs = row["state"] in SLURM_WAITS, row["state"] in SLURM_RUNS
    facts = {name: row[name] for name in ("reason", "start", "node")}
    left = re.match(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)\Z", row["left"] if runs else "")  # not where it is UNLIMITED
    parts = [int(part or 0) for part in left.groups()] if left else []  # days, hours, minutes and seconds
    left_s = sum(part * unit_s for part, unit_s in zip(parts, (86400.0, 3600, 60, 1))) if left else None
    return JobState(is_live=waits or runs, is_waiting=waits, word=row["state"], left_s=left_s, **facts)


unshared = {}  # type: Dict[int, Tuple[float, str]] # when, and what a scheduler said: /tmp took no file


def query(record: JobRecord, max_age_s: float) -> "Tuple[float, str]":
    """Return when a job's scheduler was asked, and its answer, which serves all of ours; (0, "") for none."""
    which = zlib.crc32(repr((record.command, record.cluster, sorted(record.environment.items()))).encode("utf-8"))

    def fresh(when: float, text: str) -> "Optional[Tuple[float, str]]":
        return (when if text else 0.0, text) if 0 <= time.time() - when < max(max_age_s, QUERY_MIN_S) else None

    kept = fresh(*unshared.get(which, (0.0, "")))
    if kept:
        return kept
    text = None
    with contextlib.suppress(OSError):  # a full /tmp, or another user's directory there
        path = os.path.join(private_dir(own_tmp_dir()), "%s-%08x.answer" % (record.command, which))
        with open(path + ".lock", "w") as lock:

            def look() -> "Any":  # another one of ours may be asking
                with contextlib.suppress(OSError), open(path, encoding="utf-8") as stream:
                    kept = fresh(os.fstat(stream.fileno()).st_mtime, stream.read())
                    if kept:
                        return kept
                return has_lock(lock)

            found = until(look, float("inf"))
            if isinstance(found, tuple):
                return found
            text = ask_scheduler(record)
            write_whole(path, text)
            return (time.time() if text else 0.0), text
    text = ask_scheduler(record) if text is None else text
    unshared[which] = time.time(), text
    return (time.time() if text else 0.0), text


def filled(word: str, facts: "Dict[str, str]") -> str:
    """Return a word of a table with facts in it."""
    return re.sub(r"\{(\w+)\}", lambda found: facts.get(found.group(1), found.group()), word)


def run_scheduler(record: JobRecord, argv: "List[str]", timeout_s: float) -> "Tuple[int, str, str]":
    """Run a command of the scheduler of a job, in the environment of its submission; return status, stdout, stderr."""
    facts = {"id": record.number, "cluster": record.cluster, "user": pwd.getpwuid(os.getuid()).pw_name}
    argv = [filled(word, facts) for word in argv if record.cluster or "{cluster}" not in word]
    pattern = SCHEDULERS.get(record.command, UNKNOWN).variables
    both = dict(os.environ, **{name: native(value) for name, value in record.environment.items()})
    return run_command(argv, timeout_s, {name: value for name, value in both.items() if not re.match(pattern, name)})


def ask_scheduler(record: JobRecord) -> str:
    """Return what the scheduler of a job says of the user's jobs; empty when it does not answer."""
    scheduler = SCHEDULERS[record.command]
    status, answer, said = run_scheduler(record, scheduler.query, QUERY_TIMEOUT_S)
    return "" if status and not (scheduler.none and re.search(scheduler.none, said)) else answer + "\n"


def end_of_job(job: JobRecord) -> str:
    """Return the word for how a job ended; one that Slurm lists no more is looked up in its history."""

    def look() -> str:
        word = job_state(job).word
        if job.command == "sbatch" and word not in JOB_ENDS:
            _, rows, _ = run_scheduler(job, SACCT, QUERY_TIMEOUT_S)
            words = [row.split("|")[1].split()[:1] for row in rows.splitlines() if row.startswith(job.number + "|")]
            word = "".join(words[-1]) if words else ""
        return word if word in JOB_ENDS else ""

    word = until(look, SETTLE_S if job.command == "sbatch" else 0, slowest_s=1.0) or "ended"
    note_end(job, ENDED.but(word=word))
    return word


def why_job_ended(job: JobRecord) -> str:
    """Return why a job ended, in words."""
    untold = "it has ended: cancelled, failed or out of time, its scheduler does not say which"
    return "job: " + (dict(JOB_ENDS, ended=untold).get(end_of_job(job)) or "it has ended")


def forecast_job(request: Request, channel: Channel) -> "Json":
    """Ask the scheduler what it would do with a job, and what its site allows; nothing is submitted."""
    command = os.path.basename(request.submit[0])
    scheduler = SCHEDULERS.get(command, UNKNOWN)
    if not scheduler.forecast:
        return {"said": "", "is_refused": False, "limits": ""}
    enter_terminal(request, channel, [])
    asked = JobRecord(created=time.time(), node="", number="", command=command, request=request)
    words = [native(word) for word in request.submit if word != "{script}"]
    status, _, said = run_scheduler(asked, [*words, *scheduler.forecast], QUERY_TIMEOUT_S)
    limits = run_scheduler(asked, scheduler.limits, QUERY_TIMEOUT_S)[1]
    return {"said": portable(said.strip()), "is_refused": status != 0, "limits": portable(limits.strip())}


REQUESTS["forecast_job"] = forecast_job

# agent ends

# -- here -------------------------------------------------------------------------------------------------------------


class Queue:
    """A job that we wait for: how it stands is shown, and Ctrl-C meanwhile asks whether it is to stay."""

    def __init__(self, agent: Agent, messages: Messages, hint: Callable[..., str], again: Callable[[str], str]) -> None:
        self.agent = agent
        self.messages = messages
        self.hint = hint
        self.again = again  # makes the command that waits for the job of an id again
        self.handlers: Dict[str, Handler] = {"queue": self._take}
        self.state = Told()
        self._said = ""

    def _take(self, state: Told, show: Show) -> None:
        """Show how the job stands."""
        self.state = state
        match = re.match(r"(?:%s|(\d+-\d+-\d+))T(\d+:\d+)" % datetime.date.today().isoformat(), state.start)
        text = "Job %s %s" % (state.job or state.id, state.word.lower())
        text += " (%s)" % state.reason if state.reason not in ("", "None") else ""
        text += ", expected %s" % " ".join(filter(None, match.groups())) if match else ""
        show(text if state.is_waiting else "")
        if state.is_waiting and text != self._said:
            self._said = text
            if self.messages.as_json or not self.messages.has_spinner:
                facts = {"id": state.id, "job": state.job, "state": state.word}
                self.messages.step(text + ".", "queue", reason=state.reason, start=state.start, **facts)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Under this, Ctrl-C asks once whether the job stays; where nobody can answer, it stays."""
        try:
            yield
        except (KeyboardInterrupt, Terminated) as interruption:
            if not self.state.is_waiting:
                raise
            self.messages.end_line()
            is_kept = True
            if isinstance(interruption, KeyboardInterrupt) and has_terminal():
                with contextlib.suppress(KeyboardInterrupt):
                    is_kept = not says_yes("Cancel job %s? [y/N] " % (self.state.job or self.state.id))
            if is_kept:
                text = "Job %s stays.\nTo come back: %s\nTo cancel it: %s"
                stop = self.hint("stop", self.state.id)
                self.messages.note(text % (self.state.job or self.state.id, self.again(self.state.id), stop))
            else:
                self.agent.ask(Request(action="stop", ids=[self.state.id]), Record, "Cancelling")
            raise


def move_to_node(ssh: Ssh, server: Server) -> Ssh:
    """Leave the login node, and return a connection to the node of a server's job, by a jump over the login node.

    `ssh -J` would give the jump none of our options (ssh(1)): a key of -i, say. A master that is there is used once
    more, and ends with us.
    """
    of_login = r"(?i)-[pJ]|-o(host(name|keyalias)|port|proxy(jump|command))\b"
    options = [word for pair in pairs_of(ssh.options) if not re.match(of_login, "".join(pair)) for word in pair]
    options += ["-o", "User=" + ssh.config["user"]] if "user" in ssh.config else []  # which -l may have set before
    master = ["-S", ssh.way.control_path, "-o", "ControlMaster=no"] if ssh.way.control_path else []
    words = [word.replace("%", "%%") for word in (*master, *ssh.options, ssh.destination)]
    jump = ["ssh", *words[:-1], "-W", "%h:%p", words[-1]]
    options += ["-o", "ProxyCommand=" + shlex.join(jump)]
    there = Ssh(server.node, options, ssh.can_ask, ssh.messages, ssh.is_mux)
    there.further, there.jump, there.before = ssh.further, jump, ssh if ssh.process else None
    there.connect()
    text = "Connected to %s through %s." % (server.node, ssh.destination)
    there.messages.step(text, "connected", node=server.node)
    return there


# ---------------------------------------------------------------------------------------------------------------------
# wrappers (an annex: the core is whole without it)
#
# What Jupyter and executions run inside: a container, a limit, a tool of the site's. The host starts that command
# with our agent behind it, which does what was asked for in there: it looks for Jupyter, launches it, and stays with
# it. So a process is ended only where its number means something; from outside, the command's own process tells.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins

WRAPPER_ENDS_S = 30.0  # in which a wrapper ends whose agent was told so: a cell is interrupted, then come signals

# What the command runs: our program, in sh, under the first Python in there that can.
IN_WRAPPER = (
    'program=$1; shift; test -r "$program" || { echo "rjupyter: cannot read $program"; exit 1; }; '
    'for p in "$@"; do command -v "$p" >/dev/null 2>&1 || continue; '
    '"$p" -IS -c "import sys; sys.exit(sys.version_info < (3, 6))" 2>/dev/null && exec "$p" -IS "$program"; done; '
    'echo "rjupyter: no python3"; exit 1'
)
PYTHONS_IN_WRAPPER = ["python3", "python", "/usr/bin/python3", "/usr/local/bin/python3", "/opt/conda/bin/python3"]


OF_DOCKER = ["run", "--rm", "--name={name}", "--network=host", "--shm-size={shm}", "--security-opt=label=disable"]
OF_DOCKER += ["--workdir={home}", "--entrypoint="]  # an image's own may be Jupyter, or begin with a banner
OF_DOCKER += ["--user={uid}:{gid}", "--env=HOME={home}", "--env=USER={user}"]
MOUNT = ["--mount=type=bind,{field}source={path}{field},{field}target={path}{field}"]
# How each program runs a command in a container, and removes that: podman-run(1), docs.docker.com ("docker container
# run"), apptainer.org/docs ("exec"). `mount` is for each directory that is to be seen inside; `gpus` for where there
# are some, and a file that `gpus_need` is there; `as_user` for all but root; `group` for each group. An image's USER
# may be another one, and SELinux keeps a container from a home; whoever wants that writes --wrap.
CONTAINERS = {
    "podman": {
        "run": ["podman", *OF_DOCKER],
        "mount": MOUNT,
        "gpus": ["--device=nvidia.com/gpu=all"],
        "gpus_need": ["/etc/cdi/*nvidia*", "/var/run/cdi/*nvidia*"],  # podman-run(1), "CDI"
        "as_user": ["--userns=keep-id", "--annotation=run.oci.keep_original_groups=1"],  # crun(1); runc passes it over
        "remove": ["podman", "rm", "--force", "--ignore", "{name}"],
    },
    "docker": {
        "run": ["docker", *OF_DOCKER],
        "mount": MOUNT,
        "gpus": ["--gpus=all"],
        "group": ["--group-add={group}"],
        "remove": ["docker", "rm", "--force", "{name}"],
    },
    "apptainer": {"run": ["apptainer", "exec", "--pwd={home}"], "mount": ["--bind={path}"], "gpus": ["--nv"]},
    "singularity": {"run": ["singularity", "exec", "--pwd={home}"], "mount": ["--bind={path}"], "gpus": ["--nv"]},
}  # type: Dict[str, Dict[str, List[str]]]


class InWrapper(Elsewhere):
    """Inside a command that we started, perhaps among processes and under a name of its own: that command tells."""

    settle_s = 1.0

    def __init__(self, record: Kept, outer: "Any") -> None:
        super().__init__(record, outer)
        self.held = outer
        self.place = place_of(outer)
        self.is_here, self.is_known = self.place.is_here, self.place.is_known

    def is_running(self) -> bool:
        """True while the command runs: its agent stays as long as what it began. Elsewhere, nobody can tell."""
        return self.is_known and bool(KINDS["wrapper"].goes_on(self.held))

    def why_ended(self, log: str) -> str:
        return self.place.why_ended(log)

    def why_in_doubt(self) -> str:
        """Return what is known of the command's end, and its last words."""
        words = end_of_log(self.held.file("log"), 1)
        return self.place.why_in_doubt() + (" (%s)" % words if words else "")

    def why_cut(self) -> str:
        return self.place.why_cut()

    def left_s(self) -> float:
        return self.place.left_s()

    def end(self, children: "List[Tuple[int, str]]", polite_s: float) -> None:
        KINDS["wrapper"].end(self.held)


class WrapperKind(Starter):
    """Commands in which something of ours runs, or is about to."""

    name = "wrapper"
    prefix = "w"
    record = WrapperRecord
    place = InWrapper

    def goes_on(self, record: WrapperRecord) -> bool:
        """True while the command runs, or the agent in it gives signs of life: a container may outlive its client."""
        return place_of(record).is_running() or (is_marked(record, "alive") and gives_signs(record))

    def listed(self) -> "List[WrapperRecord]":
        """Return those in which nothing runs yet: what does is listed itself."""
        return [record for record in self.running() if not reply_in(record)]

    def end(self, record: WrapperRecord) -> None:
        """End a wrapper: by its agent, which ends what it began; then by its place, and its container is removed."""
        mark(record, "unwanted")
        place = place_of(record)
        is_alone = not place.is_running()  # its client was killed, perhaps, which would have removed it
        until(lambda: not self.goes_on(record), WRAPPER_ENDS_S if os.path.exists(record.file("said")) else 0)
        if record.remove and (is_alone or self.goes_on(record)):
            with open(os.devnull, "w") as nobody:
                enter_terminal(record.request, Channel("", nobody), [])
            run_command([native(word) for word in record.remove], SHELL_TIMEOUT_S)
        place.end([], polite_s=0)
        if not place.is_running() and not any(run.wrapper == record.id for run in KINDS["run"].records()):
            remove_tree(record.directory)  # else the record of a run leads to it

    def takes(self, request: Request) -> bool:
        """True when a wrapper is asked for, and we are not in it. A job, which takes it before, has it inside."""
        return bool(request.outside) and not request.wrapper

    def begin(self, request: Request, channel: Channel) -> WrapperRecord:
        """Start a wrapper in which our agent does what is asked for; raises Failure (3) where nothing can run it."""
        forget_ended(self)
        root_dir, file = resolve_path(request.path)
        path = os.path.normpath(os.path.join(root_dir, file)) if root_dir else ""
        enter_terminal(request, channel, [])
        environment = dict(os.environ)
        if request.container and not container_program(request, environment):
            why = "looked on PATH for " + ", ".join(CONTAINERS)
            try_ = "--init COMMAND, where `module load` or the like brings it"
            raise Failure("no program for containers on the host", why, try_, EXIT_NO_JUPYTER)
        directory = new_dir(self, channel, "starts inside " + request.outside)
        record = WrapperRecord(
            request=request.to_keep(),
            home=portable(os.path.expanduser("~")),
            network=network_identity(),
            entries=[portable(name) for name in os.listdir(root_dir)[:10]] if root_dir else [],
            **facts_of(os.getpid(), root_dir, request),
        )
        write_down(record, directory)
        state_dir = portable(os.path.dirname(os.path.dirname(directory)))
        program = self.leave(record, request, path=portable(path) or None, state_dir=state_dir)
        within_words = container_words(record, environment, lambda text: channel.tell("note", text=text))
        # An assignment before a command is none behind `exec`, or behind another wrapper.
        outer = [re.sub(r"\A(?=\w+=)", "env ", native(words)) for words in request.wrap]
        command = " ".join(["exec", *outer, *within_words])
        argv = ["/bin/sh", "-c", command + ' "$@"', "sh", "/bin/sh", "-c", IN_WRAPPER, "sh", program]
        argv += [sys.executable, *PYTHONS_IN_WRAPPER]
        with start_detached(argv, environment, os.path.expanduser("~"), record.file("log"), request.is_held) as process:
            record.pid, record.identity = process.pid, process_identity(process.pid)
            return write_down(record, directory)

    def watch(self, record: WrapperRecord, channel: Channel) -> "Iterator[bool]":
        """Tell the last words of its command, as long as our agent has said nothing in there."""
        while True:
            if not os.path.exists(record.file("said")):
                words = end_of_log(record.file("log"), 1).strip()[:60]
                channel.progress("%s %s" % (os.path.basename(record.request.outside.split()[0]), words))
            is_gone = not os.path.isdir(record.directory) or is_marked(record, "unwanted")
            yield is_gone or not place_of(record).is_running()

    def await_reply(self, record: WrapperRecord, channel: Channel) -> "Json":
        """Wait for the reply of the agent in there, as long as its command takes; end it where that is a failure."""
        try:
            return super().await_reply(record, channel)
        except Failure:
            if not channel.is_closed and os.path.isdir(record.directory):
                self.end(record)
            raise

    def enter(self, record: WrapperRecord, request: Request) -> Request:
        """In there, look for the directory; in a network of its own, take an address that is seen from outside."""
        global own_wrapper
        own_wrapper = record.id
        mended(os.environ)
        if not os.access(os.path.expanduser("~"), os.W_OK) and os.access(native(record.home), os.W_OK):
            os.environ["HOME"] = native(record.home)  # docker's own is / for an uid that its image does not know
        root_dir = native(record.root_dir)
        entries = [os.path.join(root_dir, native(name)) for name in record.entries]
        is_other = bool(entries) and not any(os.path.lexists(entry) for entry in entries)
        if root_dir and (is_other or not os.path.isdir(root_dir)):
            why = "%s is another directory in there" % record.root_dir if os.path.isdir(root_dir) else record.root_dir
            raise Failure("PATH is not there", why, "let it see that directory (docker -v, apptainer --bind)")
        network = network_identity()
        is_shared = record.network == network or not (record.network and network)
        if is_shared or request.socket or request.action != "open":
            return request
        try:
            return request.but(ip=node_address(request.node_address))
        except Failure as failure:
            try_ = "--socket; or the host's network (docker --network=host)"
            raise Failure("no network leads to what runs", failure.why, try_)

    def no_begin(self, record: WrapperRecord) -> Failure:
        """Return the failure of a wrapper that ended before our agent had said all: with its own words."""
        inside = " inside " + record.request.outside
        if not os.path.isdir(record.directory) or is_marked(record, "unwanted"):
            return Failure("it was stopped before it ran" + inside, "", "", EXIT_SERVER_ENDED)
        words = end_of_log(record.file("log"))
        place = portable(os.path.dirname(os.path.dirname(record.directory)))
        sees = "let it see and write that directory (docker -v, apptainer --bind)"
        told = {
            "rjupyter: cannot": sees + "; or --state-dir PATH",
            "rjupyter: no python3": "one that has Python 3.6 or newer, and Jupyter",
            "could not select device driver": "nvidia-container-toolkit there, for GPUs in docker",
        }
        try_ = next((try_ for start, try_ in told.items() if start in words), "")
        if os.path.exists(record.file("said")) and not os.access(record.file("said"), os.R_OK):
            words, try_ = "what it writes to %s is not yours" % place, "an option that runs it as yourself"
        if not record.request.container:
            silent = "it ended and said nothing; it must stay as long as what runs in it"
            words = words or silent + " (systemd-run --scope, no docker -d)"
            alone = "on the host: %s true   (it must run that, and stay as long as it runs)" % record.request.outside
            try_ = try_ or alone
        return Failure("nothing ran" + inside, words, try_, EXIT_NO_JUPYTER)


KINDS["wrapper"] = WrapperKind()
STARTERS.append(KINDS["wrapper"])


def container_program(request: Request, environment: "Dict[str, str]") -> str:
    """Return the program that is to run a container: the one that is named, or the first that is there; else nothing.

    Of an image in a file, apptainer.
    """
    named = request.container.partition("://")[0]
    names = [named] * (named in CONTAINERS) + [*CONTAINERS] * (named == "docker" or named not in CONTAINERS)
    if request.container.endswith(".sif"):
        names = [name for name in names if "remove" not in CONTAINERS[name]]
    return next((name for name in names if shutil.which(name, path=environment.get("PATH", os.defpath))), "")


def container_words(record: WrapperRecord, environment: "Dict[str, str]", say: "Callable[[str], Any]") -> "List[str]":
    """Return the words of a shell that run the container, if one is asked for; note its removal, say what it lacks."""
    request = record.request
    if not request.container:
        return []
    program = container_program(request, environment)
    row = CONTAINERS[program]
    home = native(record.home)
    image = request.container[len(program + "://") :] if request.container.startswith(program + "://") else ""
    facts = {"name": "rjupyter-%d-%s" % (os.getuid(), record.id), "image": image or request.container, "home": home}
    if "remove" not in row and not re.search(r"://|\.sif$", facts["image"]) and not os.path.exists(facts["image"]):
        facts["image"] = "docker://" + facts["image"]  # apptainer takes a name for that of a file
    facts.update(uid=str(os.getuid()), gid=str(os.getgid()), user=environment.get("USER", "user"))
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None  # podman's and docker's own has 64 MB
    facts["shm"] = str(shared.f_frsize * shared.f_blocks) if shared else "64m"
    words = row["run"] + (row.get("as_user", []) if os.getuid() else [])
    words = words + [filled(word, {"group": str(gid)}) for gid in os.getgroups() for word in row.get("group", [])]
    seen_inside = [home, os.path.dirname(os.path.dirname(record.directory)), native(record.root_dir)]
    outer = [path for path in dict.fromkeys(seen_inside) if path not in ("", "/")]
    for path in [path for path in outer if not any(path.startswith(other + "/") for other in outer)]:
        field = '"' if set(path) & set(',"') else ""
        escaped = path.replace('"', '""') if field else path
        words = words + [word.replace("{field}", field).replace("{path}", escaped) for word in row["mount"]]
    has_gpus = shutil.which("nvidia-smi", path=environment.get("PATH")) or glob.glob("/dev/nvidia[0-9]*")
    is_cut_off = has_gpus and "gpus_need" in row and not any(map(glob.glob, row["gpus_need"]))
    if is_cut_off:
        remedy = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        say("No GPU in the container: %s finds no CDI specification. To make one, on the host: %s" % (program, remedy))
    words = words + (row["gpus"] if has_gpus and not is_cut_off else []) + ["{image}"]
    record.remove = [portable(filled(word, facts)) for word in row.get("remove", [])]
    return [shlex.quote(filled(native(word), facts)) for word in words]


def network_identity() -> str:
    """Return what tells the network that we are in from others (network_namespaces(7)); empty where nothing does."""
    with contextlib.suppress(OSError):
        return "%s %s" % (boot_identity().partition("/")[0], os.readlink("/proc/self/ns/net"))
    return ""


# agent ends

# ---------------------------------------------------------------------------------------------------------------------
# command line
#
# An option is a row of OPTIONS, what a person can ask for a row of ACTIONS. Help, the configuration file, `config` and
# the request that goes to the host are made from the rows. `main` is where failures end.
# ---------------------------------------------------------------------------------------------------------------------


def parse_destination(text: str) -> Tuple[str, Optional[str]]:
    """Split DESTINATION[:PATH], as scp and ssh write them: [user@]host:path, [user@][v6]:path, ssh://user@host:port/path.

    Returns what ssh gets, and the path, None where there is none. Raises ValueError with the reason when ssh could take
    it for something else.
    """
    scheme = "ssh://" if text.startswith("ssh://") else ""
    bracketed = re.fullmatch(r"((?:[^@:/]*@)?)\[([^\]]*)\](?::(.*))?", text, re.DOTALL)
    if bracketed:
        name, path = bracketed.group(1) + bracketed.group(2), bracketed.group(3)
    elif re.fullmatch(r"(?:[^@]*@)?(?=.*::|(?:[^:]*:){7})[0-9A-Fa-f:.]+(?:%[\w.-]+)?", text):  # of IPv6
        name, path = text, None
    else:
        name, mark, rest = text[len(scheme) :].partition("/" if scheme else ":")
        path = rest if mark and (rest or not scheme) else None
    if scheme and path:
        path = urllib.parse.unquote(path)
    user, _, address = name.rpartition("@")
    if not name or name.startswith("-") or address.startswith("-"):
        raise ValueError("no host in %r" % text)
    # ssh hands names on to the user's shell (ProxyCommand, Match exec); from 9.6 on it refuses these itself (ssh.c).
    if not name.isprintable() or re.search(r"""[\s/'`"$\\;&<>|(){}]""", address) or user.endswith("\\"):
        raise ValueError("a host cannot be called %r" % name)
    if re.search(r"""[\s/'`";&<>|(){}]""", user):
        raise ValueError("a user cannot be called %r" % user)
    if path is not None and "\0" in path:
        raise ValueError("a path cannot hold a NUL")
    return scheme + name, path


# -- how a value is read: each of these raises ValueError with what is wrong ------------------------------------------


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("needs a value")
    return text


def _wrap(text: str) -> str:
    """Check a command that a shell is to run with more words behind it."""
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
        lexer.commenters = ""
        words = list(lexer)
    except ValueError as error:
        raise ValueError("%s: %s" % (str(error).lower(), text)) from None
    if not words or "\0" in text or any(word.strip(";&|") == "" and word for word in words):
        raise ValueError("a wrapper is one command, not %r" % text)
    return text


def _number(what: str, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 0 < int(text) <= most):
            raise ValueError("%s from 1 to %d, not %r" % (what, most, text))
        return int(text)

    return read


_port = _number("a port is a number", 65535)


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _forward(text: str) -> str:
    """Check a local forward; one without an address here gets 127.0.0.1, and none on ::1. PORT is both ends."""
    match = re.fullmatch(r"(?:(127\.0\.0\.\d+|localhost):)?(\d+):(/[^:\s]+|(?:\[[0-9a-fA-F:.]+\]|[\w.-]+):\d+)", text)
    if text.isascii() and text.isdigit():
        return "127.0.0.1:%d:127.0.0.1:%d" % (_port(text), _port(text))
    if not match:
        raise ValueError("a forward is PORT, PORT:HOST:PORT or PORT:/SOCKET, not %r" % text)
    address = match.group(1) if match.group(1) not in (None, "localhost") else "127.0.0.1"
    return "%s:%d:%s" % (address, _port(match.group(2)), match.group(3))


def _duration_s(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})(|s|m|min|h|d)", text.strip())
    seconds = int(match.group(1)) * {"m": 60, "min": 60, "h": 3600, "d": 86400}.get(match.group(2), 1) if match else 0
    if not seconds:
        raise ValueError("a duration is a number with s, m, h or d, as in 90m, not %r" % text)
    return seconds


def _seconds(text: str) -> float:
    """Read a duration, or a part of a second."""
    is_part = re.fullmatch(r"[0-9]{1,9}\.[0-9]+", text) and float(text)
    return float(text) if is_part else float(_duration_s(text))


def _pattern(text: str) -> str:
    if not text or text.startswith(("/", "~")) or ".." in text.split("/") or "\0" in text:
        raise ValueError("a pattern is of names below the run's directory, not %r" % text)
    return "/".join(part for part in text.split("/") if part not in ("", ".")) or "**"


def _moment(text: str) -> float:
    """Return a time as seconds since 1970: 14:02 is the last one, 2h is so long ago, a date may stand before a time."""
    with contextlib.suppress(ValueError):
        return time.time() - _duration_s(text)
    for days_ago in (0, 1):
        for words in (text, "%s %s" % (datetime.date.today() - datetime.timedelta(days_ago), text)):
            with contextlib.suppress(ValueError):
                when = datetime.datetime.fromisoformat(words).timestamp()
                if words == text or when <= time.time():
                    return when
    raise ValueError("a time is 14:02, 2026-11-26, 2026-11-26 14:02 or, so long ago, 2h; not %r" % text)


def _grid(text: str) -> Tuple[str, List[Any]]:
    name, values = _pair(text)
    if not isinstance(values, list) or not values:
        raise ValueError("a grid is NAME=[VALUE, ...], not %r" % text)
    if len({repr(value) for value in values}) < len(values):
        raise ValueError("a value stands twice in %r" % text)
    return name, values


def _pair(text: str) -> Tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        check_name(name if equals else "")
    except ValueError:
        why = "a parameter is NAME=VALUE, with a name that Python takes, not %r" % text
        raise ValueError(why) from None
    try:
        return name, parse_value(value)
    except (ValueError, RecursionError) as error:
        quoted = "%s=%s" % (name, json.dumps(value, ensure_ascii=False))
        why = "%s begins like JSON, and is none: %s\nas text it is %s, quoted for the shell"
        raise ValueError(why % (text, error, quoted)) from None


# -- options ----------------------------------------------------------------------------------------------------------


def config_path() -> str:
    """Return the path of the user's configuration file."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(home, "rjupyter", "config")


class Option:
    """A row of OPTIONS. It is a switch without a METAVAR behind its flags; with a list for a default, it is repeatable.

    An option that `chooses` goes with the commands that we tell people to type: "host" with each of them, "server" with
    those that open. Its value is kept as `key`, its long name where there is no other; of a switch it is `const`. What
    an action takes that is no option has no dash, and `many` says how many of them: "*", "?", or one.
    """

    def __init__(
        self,
        typed: str,
        text: str,
        read: Callable[[str], Any] = str,
        default: Any = None,
        chooses: str = "",
        key: str = "",
        const: Any = True,
        choices: Sequence[str] = (),
        many: str = "",
    ) -> None:
        self.text, self.read, self.chooses = text, read, chooses
        self.const, self.choices, self.many = const, choices, many
        self.flags = [word for word in typed.split() if word[0] == "-"]
        self.metavar = "".join(word for word in typed.split() if word[0] != "-")  # empty for a switch
        self.head = "  " + ", ".join(("%s %s" % (flag, self.metavar)).strip() for flag in self.flags or [""])
        self.name = next((flag[2:] for flag in self.flags if flag[:2] == "--"), "")  # as the configuration file has it
        unit = "_s" if self.metavar in ("S", "DURATION") else ""
        self.key = key or self.name.replace("-", "_") + unit
        self.default = [] if many == "*" else default if self.metavar or default is not None else False

    def put(self, text: Optional[str], values: Dict[str, Any]) -> None:
        """Put what was typed behind it among the values; raises ValueError with what is wrong."""
        if bool(self.metavar) != (text is not None):
            raise ValueError("expected one argument" if self.metavar else "it takes no value, not %r" % text)
        value = self.const if text is None else self.read(text)
        if self.choices and value not in self.choices:
            raise ValueError("invalid choice: %r (choose from %s)" % (value, ", ".join(map(repr, self.choices))))
        if self.key == "ssh":
            values["ssh"] = [*values.get("ssh", []), *self.flags, *([] if text is None else [text])]
        elif isinstance(self.default, list):
            values[self.key] = [*values.get(self.key, []), value]
        else:
            values[self.key] = value


JOINED = ("--slurm", "--submit", "--server-arg")  # their values are made of options, and may begin like one
OPTIONS: Dict[str, List[Option]] = {
    "server": [
        Option("--app APP", "what to open (notebook)", default="", choices=list(APPS), chooses="server"),
        Option("--lab", "short for --app lab", default="", chooses="server", key="app", const="lab"),
        Option("--new", "start another server instead of coming back", key="is_new"),
        Option("--attach ID", "come back to this server; `list` shows the ids", _text, None, "server"),
        Option("--stop-on-exit", "end the server when the tunnel closes"),
        Option("--port N", "first port to try on the host (%d)" % DEFAULT_PORT, _port, 0, "server"),
        Option("--ip ADDR", "address Jupyter listens on (127.0.0.1)", _address, "127.0.0.1", "server"),
        Option("--socket", "listen on a Unix socket of yours instead of a port", chooses="server"),
        Option("--no-record", "do not keep what cells print", chooses="server"),
        Option("--no-save", "do not put what you missed into the notebooks there"),
        Option("--idle-timeout DURATION", "end the server after this long without use: 12h", _duration_s, 0, "server"),
        Option("--server-arg ARG", "pass this argument to Jupyter; repeatable", str, [], "server", "server_args"),
        Option("--state-dir PATH", "where to keep our files (~/.local/state/rjupyter)", _text, None, "host"),
        Option("--start-timeout S", "how long Jupyter may take to start (120 s)", _seconds, float(START_TIMEOUT_S)),
    ],
    "environment on the host": [
        Option("--python PATH", "run Jupyter under this interpreter", _text, None, "server"),
        Option("--env NAME_OR_PATH", "environment: conda or mamba by name, any by path", _text, None, "server"),
        Option("--init COMMAND", "run this in your shell there first; repeatable", _text, [], "server"),
        Option("--wrap COMMAND", "run Jupyter inside this command; repeatable", _wrap, [], "server"),
        Option("--container IMAGE", "run it in a container: IMAGE, or docker://IMAGE", _text, None, "server"),
        Option("--install", "install Jupyter if it is missing (the default)", default=True, key="may_install"),
        Option("--no-install", "do not install Jupyter; print how to", default=True, key="may_install", const=False),
    ],
    "cluster, where the host is a login node": [
        Option("--slurm OPTIONS", "run in a Slurm job, with these options of sbatch", str, None, "server"),
        Option("--submit COMMAND", "run in a job that this command submits: qsub ...", _text, None, "server"),
        Option("--via-node", "end the tunnel on the job's node itself", chooses="server"),
        Option("--node-address NAME", "interface or name to reach the job's node by", _text, None, "server"),
    ],
    "tunnel and browser": [
        Option("--local-port N", "local port (the first free one from %d up)" % LOCAL_PORT, _port, None, "server"),
        Option("--no-browser", "only print the address"),
        Option("--browser COMMAND", "browser to open (the system's)"),
        Option("-L SPEC", "another forward, as in ssh, or a port; repeatable", _forward, [], "server", "further"),
        Option("--gateway", "print settings for a local JupyterLab (implies -f)"),
        Option("--no-reconnect", "end when the connection is lost"),
        Option("-f", "go to the background once the tunnel is up", key="background"),
    ],
    "ssh, with the same letters": [
        Option("-F FILE", "configuration file (~/.ssh/config)", str, [], "host", "ssh"),
        Option("-i KEY", "private key", str, [], "host", "ssh"),
        Option("-J HOST", "jump host", str, [], "host", "ssh"),
        Option("-l USER", "user to log in as", str, [], "host", "ssh"),
        Option("-o OPTION", "any option of ssh_config(5)", str, [], "host", "ssh"),
        Option("-p PORT", "port of sshd", _port, [], "host", "ssh"),
        Option("-4", "IPv4 only", str, [], "host", "ssh"),
        Option("-6", "IPv6 only", str, [], "host", "ssh"),
        Option("-C", "compress", str, [], "host", "ssh"),
        Option("--no-mux", "log in for each step, as on Windows", chooses="host"),
    ],
    "output": [
        Option("-q --quiet", "print only the address and errors"),
        Option("-v --verbose", "print every ssh command, and what the host prints"),
        Option("--json", "print one JSON object a line on stdout"),
        Option("--no-config", "ignore " + config_path(), chooses="host"),
        Option("-V --version", "print the version"),
        Option("-h --help", "print this help"),
    ],
}
EVERY_OPTION = [option for group in OPTIONS.values() for option in group]
# Of these, one can be given.
APART = (
    ("--new", "--attach"),
    ("--install", "--no-install"),
    ("--slurm", "--submit"),
    ("--python", "--env"),
    ("--browser", "--no-browser"),
)
SYNONYMS = {"ls": "list", "ps": "list", "status": "list", "run": "execute", "exec": "execute", "kill": "stop"}
SYNONYMS.update(log="logs", open="", start="")  # an open takes no word
NO_HOST = "no-host.invalid"  # in place of a destination, for what needs none


def by_flag(rows: Iterable[Option]) -> Dict[str, Option]:
    """Return rows of options by each of their flags; what is no option has none."""
    return {flag: option for option in rows for flag in option.flags}


def nearest(word: str, words: List[str]) -> str:
    """Return the word that another one resembles, or begins; empty if there is none."""
    begun = [known for known in words if known.startswith(word) and len(word) > 3]
    return min(begun, key=len) if begun else (difflib.get_close_matches(word, words, 1, 0.7) or [""])[0]


# -- help -------------------------------------------------------------------------------------------------------------

EXITS = {
    EXIT_OK: "done; also Ctrl-C on an open tunnel",
    EXIT_FAILURE: "any other failure",
    EXIT_USAGE: "wrong usage",
    EXIT_NO_JUPYTER: "no usable Jupyter on the host, and it could not be installed",
    EXIT_SERVER_ENDED: "the server or a kernel did not start, or ended while its tunnel was up",
    EXIT_CELL_FAILED: "a notebook's cell failed",
    EXIT_TIMEOUT: "a deadline passed",
    EXIT_INTERRUPTED: "Ctrl-C before there was a result",
    EXIT_SSH: "ssh could not connect or log in",
}


def help_text(topic: str = "") -> str:
    """Return what --help prints: of the whole, of an action, or one of its topics."""
    if topic == "events":
        longest = max(map(len, EVENTS))
        return "".join("%-*s  %s: %s\n" % (longest, n, e.when, ", ".join(e.keys)) for n, e in EVENTS.items())
    if topic == "status":
        return "".join("%3d  %s\n" % row for row in EXITS.items())
    if topic == "version":
        return "rjupyter %s\n" % __version__
    width = max(40, min(120, terminal_width()))

    def filled(text: str) -> str:
        """Return its lines, which stay as far as the terminal has room for them."""
        lines = text.splitlines()
        return "\n".join(textwrap.fill(x, width, subsequent_indent=" " * 6 * x.startswith(" ")) for x in lines)

    if topic:
        action = ACTIONS[topic]
        usage, about = "HOST[:PATH] " + action.usage, action.help[:1].upper() + action.help[1:] + "."
        rows = [OPTIONS["output"][-1], *OPTIONS_OF.get(topic, ()), *OPTIONS["output"][:3]]
        groups = {"arguments": [row for row in rows if not row.flags]}
        groups["options"] = [row for row in rows if row.flags]
        last = "\n".join(["examples:", *("  rjupyter " + example for example in EXAMPLES.get(topic, ()))])
    else:
        usage, about, groups = "[options] HOST[:PATH] [action]", (__doc__ or "").strip(), OPTIONS
        last = "actions, after the host; `rjupyter HOST ACTION --help` says more about one:\n"
        last += "".join("  %-32s %s\n" % (row.usage, row.help) for row in ACTIONS.values() if row.usage)
        last += "\n`--help events` lists what --json prints, `--help status` the exit statuses."
    parts = ["usage: %s %s" % (os.path.basename(sys.argv[0]), usage), filled(about)]
    column = min(max(len(row.head) for rows in groups.values() for row in rows) + 2, 28)
    for title, rows in groups.items():
        lines = [title + ":"] if rows else []
        for row in rows:
            lines += [row.head] if len(row.head) > column - 2 else []
            head = ("" if row.head in lines else row.head).ljust(column)
            lines += textwrap.wrap(row.text, width, initial_indent=head, subsequent_indent=" " * column)
        parts.append("\n".join(lines))
    return "\n\n".join(filter(None, [*parts, "" if last == "examples:" else filled(last)])) + "\n"


# -- the command line -------------------------------------------------------------------------------------------------


class Typed(NamedTuple):
    """An option as it was typed: its row, if it is one of ours, its flag, its value, and the words.

    Or an operand, which is a value without a flag; "--" has neither.
    """

    option: Optional[Option]
    flag: str
    value: Optional[str]
    words: List[str]


class CommandLine:
    """A command line, split: options before the action, destination, action, and what stands behind the action.

    A letter that both have is the action's there. Options and operands may be mixed. What needs no host has none.
    """

    def __init__(self, argv: List[str]) -> None:
        self.before: List[Typed] = []
        self.destination = ""
        self.action = ""
        self.behind: List[Typed] = []
        self.known = by_flag(EVERY_OPTION)
        self.rest = list(argv)
        is_over = False
        while self.rest:
            word = self.rest.pop(0)
            is_alone = word in ACTIONS and ACTIONS[word].alone and not set(self.rest) & set(ACTIONS)
            if word == "--" and not is_over:
                is_over = True
                self.behind.append(Typed(None, "", None, [word]))
            elif self._is_option(word) and not is_over:
                (self.behind if self.action else self.before).append(self._option(word))
            elif not self.destination and not is_alone:
                self.destination = word
            elif not self.action:
                self.destination, self.action = self.destination or NO_HOST, word
                self.known.update(by_flag(OPTIONS_OF.get(word, ())))
            else:
                self.behind.append(Typed(None, "", word, [word]))

    @property
    def operands(self) -> List[str]:
        """What stands behind the action and is no option."""
        return [typed.value for typed in self.behind if not typed.flag and typed.value is not None]

    def _is_option(self, word: str) -> bool:
        """True for what begins with a dash; with a space in it, only if it begins with one of ours that has a value."""
        flag = word.partition("=")[0] if word.startswith("--") else word[:2]
        has_value = flag in self.known and bool(self.known[flag].metavar)
        return word[:1] == "-" and word != "-" and (" " not in word or has_value)

    def _option(self, word: str) -> Typed:
        """Return an option, with its value; of switches in one word, the next one stays in the rest."""
        is_long = word.startswith("--")
        flag, equals, value = word.partition("=") if is_long else (word[:2], word[2:], word[2:])
        option = self.known.get(flag)
        if option and option.metavar and not equals and self.rest:
            if flag in JOINED or not self._is_option(self.rest[0]):
                value = self.rest.pop(0)
                return Typed(option, flag, value, [word, value])
        elif option and not option.metavar and not is_long and value:  # as in -qv
            self.rest.insert(0, "-" + value)
            return Typed(option, flag, None, [flag])
        return Typed(option, flag, value if equals else None, [word])

    def words(self, destination: str, action: str, moved: Sequence[Typed] = ()) -> List[str]:
        """Return the words of another line, with the same options and operands; some are moved behind the action."""
        words = [word for typed in self.before if typed not in moved for word in typed.words]
        words += [word for word in (destination, action) if word not in ("", NO_HOST)]
        return words + [word for typed in [*moved, *self.behind] for word in typed.words]

    def topic(self) -> Optional[str]:
        """Return what help_text is asked for, which is empty for the whole; None where it is not."""
        topics = (*ACTIONS, "events", "status", "version")
        if self.destination in ("help", "version") and self.action in ("", *topics) and not self.operands:
            return self.action if self.destination == "help" else "version"
        for typed in [*self.before, *self.behind]:
            if typed.option and typed.option.name == "version":
                return "version"
            if typed.option and typed.option.name == "help":
                name = self.action if typed in self.behind or self.destination == NO_HOST else self.destination
                return name if name in topics else ""
        return None

    def values(self) -> Dict[str, Any]:
        """Return the values of what was typed; raises Failure (2), with the line as it should be, for what is none."""
        self._check()
        typed = [*self.before, *self.behind]
        for pair in APART:
            both = [one.flag for one in typed if one.flag in pair and one.option in EVERY_OPTION]
            if len(set(both)) > 1:
                raise wrong_usage("argument %s: not allowed with argument %s" % (both[-1], both[0]))
        values: Dict[str, Any] = {}
        unknown = [one.flag for one in typed if one.flag and not one.option]
        row = next((row for row in OPTIONS_OF.get(self.action, ()) if not row.flags), None)
        taken = self.operands[: None if row and row.many == "*" else 1 if row else 0]
        given = [(one.option, one.value) for one in typed if one.option] + [(row, word) for word in taken if row]
        for option, text in given:
            try:
                option.put(text, values)
            except ValueError as error:
                of_action = option in OPTIONS_OF.get(self.action, ())
                help_ = command_line(self.destination or "HOST", self.action, "--help") if of_action else ""
                name = "/".join(option.flags) or option.metavar
                raise wrong_usage("argument %s: %s" % (name, error), help_) from None
        unknown += self.operands[len(taken) :]
        if unknown:
            near = nearest(unknown[0], list(self.known)) if unknown[0].startswith("-") else ""
            right = self.words(self.destination, self.action)
            right = [near + word[len(unknown[0]) :] if word.startswith(unknown[0]) else word for word in right]
            why = "unknown option: %s" if unknown[0].startswith("-") else "one argument too many: %s"
            is_host = (self.destination, self.action) == (NO_HOST, "close") and not unknown[0].startswith("-")
            right = [unknown[0], "close"] if is_host else right if near else []
            raise wrong_usage(why % " ".join(unknown), command_line(*right) if right else "")
        if row and not row.many and not taken:
            raise wrong_usage("%s needs %s: %s" % (self.action, row.metavar, row.text))
        if not self.destination:
            eaten = next((one for one in reversed(self.before) if one.flag in JOINED), None)
            right = [word for one in self.before if one is not eaten for word in one.words]
            why = "no host was given" + ("; %s took %r as its value" % (eaten.flag, eaten.value) if eaten else "")
            right += [eaten.flag, "VALUE", str(eaten.value)] if eaten else ["HOST"]
            raise wrong_usage(why, command_line(*right))
        return values

    def _check(self) -> None:
        """Raise Failure (2) for what stands where it does not belong. No words at all show the tunnels."""
        is_plain = all(typed.flag in ("-F", *by_flag(OPTIONS["output"][:4])) for typed in self.before)
        if not self.destination and is_plain:
            self.destination, self.action = NO_HOST, "tunnels"
        actions = [name for name in ACTIONS if name]
        name = SYNONYMS.get(self.destination, self.destination)
        if name in actions and self.action not in actions:
            plain = [word for word in [self.action, *self.operands] if word]
            host = next((word for word in plain if not word.endswith(".ipynb")), "HOST")
            words = [Typed(None, "", self.action, [self.action]), *self.behind]
            self.behind = [typed for typed in words if typed.words not in ([host], [""])]
            unknown = [typed for typed in self.before if not typed.option]
            right = command_line(*self.words(host, name, unknown))
            raise wrong_usage("%s is an action: the host comes before it" % name, right)
        for typed in self.before:
            value = typed.value or ""
            is_ours = {"-f": True, "-p": value.isdigit(), "-o": bool(re.search("[= ]", value))}  # and the action's
            named = [word for word in [self.action, *self.operands] if word in actions][:1]
            for name in [self.action] if typed.option else named or actions:
                row = by_flag(OPTIONS_OF.get(name, ())).get(typed.flag)
                if row and not (typed.option and is_ours.get(typed.flag)):
                    right = command_line("HOST", name, typed.flag, *filter(None, [row.metavar]))
                    if name == self.action and (typed.option or not row.metavar):
                        right = command_line(*self.words(self.destination, name, [typed]))
                    raise wrong_usage("%s is an option of %s, and goes after it" % (typed.flag, name), right)
        if self.action and self.action not in actions and all(typed.option for typed in self.before):
            destination, wrong = self.destination, self.action
            near, swapped = [SYNONYMS.get(word, nearest(word, actions) or None) for word in (wrong, destination)]
            if near is None and swapped is not None:  # as in `lsit gpu1`
                destination, wrong, near = wrong, destination, swapped
            right = "" if near is None else command_line(*self.words(destination, near))
            if near is None and ("/" in wrong or "." in wrong):
                right = command_line(*self.words(destination + "/:"[":" not in destination] + wrong, ""))
            raise wrong_usage("there is no action %s; there are %s" % (wrong, ", ".join(actions)), right)


def wrong_usage(why: str, try_: str = "") -> Failure:
    """Return the failure of a line that is none, with what leads on."""
    return Failure("wrong usage", why, try_ or command_line("--help"), EXIT_USAGE)


class Args(types.SimpleNamespace):
    """What a command line says: the value of each option by its key, and what it is done to. Raises Failure (2).

    What was `typed` alone goes with the commands that we tell people to type; `sources` says where each value is from.
    """

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        self.typed = line.values()
        self.action = line.action or None
        try:
            self.host, self.path = parse_destination(line.destination)
        except ValueError as error:
            raise wrong_usage("argument DESTINATION[:PATH]: %s" % error) from None
        if "," in self.host and self.action != "list":
            raise wrong_usage("only list takes several hosts", command_line(line.destination, "list"))
        found = {} if "no_config" in self.typed else config_defaults(config_path(), self.host)
        for pair in APART:  # what is typed takes the place of both
            keys = {line.known[flag].key for flag in pair}
            if keys & set(self.typed):
                found = {key: value for key, value in found.items() if key not in keys}
        self.sources = {key: source for key, (_, source) in found.items()}
        self.sources.update(dict.fromkeys(self.typed, "command line"))
        rows = [*EVERY_OPTION, *OPTIONS_OF.get(line.action, ())]
        nothing = {row.key: row.default for row in rows if row.name not in ("help", "version")}
        super().__init__(**{**nothing, **{key: value for key, (value, _) in found.items()}, **self.typed})

    def again(self, *action: str) -> str:
        """Return a command to type: it opens the same again, with all that chooses it, or does another action there."""
        opens = not action or action[0].startswith("-")
        words: List[str] = list(action) if opens else []
        for chooses in ("host", "server") if opens else ("host",):
            for typed in [*self.line.before, *self.line.behind]:
                is_dropped = typed.flag == "--attach" and "--new" in action
                if typed.option and typed.option.chooses == chooses and not is_dropped:
                    words += typed.words
        is_near = opens or action[0] == "close" or action == ("list", "--all")
        is_near = is_near or (action[0] == "output" and "attach" not in self.typed)  # a server's path may be above it
        words.append(self.line.destination if is_near else self.host)
        return command_line(*words, *(() if opens else action))


# -- the configuration file -------------------------------------------------------------------------------------------


def config_defaults(path: str, destination: str) -> Dict[str, Tuple[Any, str]]:
    """Return the options that the file at `path` sets for a destination: each with its value and where it is from.

    Sections are patterns as in ssh_config's Host: `*`, `?`, and `!` for an exception; of several values, the first one
    holds. A line is read as the option of its name would be, and one that is repeatable has a value a line. Raises
    Failure (2).
    """
    if not os.path.exists(path):
        return {}
    config = configparser.RawConfigParser(delimiters="=", default_section="\0", allow_no_value=True)
    config.optionxform = str  # type: ignore[assignment]
    try:
        with open(path, encoding="utf-8-sig") as stream:  # as Windows' editors begin it
            config.read_file(stream)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise Failure("cannot read the configuration", str(error), "fix it, or --no-config", EXIT_USAGE) from None
    rows = {option.name: option for option in EVERY_OPTION if option.name not in ("help", "version", "no-config")}
    found: Dict[str, Tuple[Any, str]] = {}
    host = destination[len("ssh://") :].partition(":")[0] if destination.startswith("ssh://") else destination
    host = host.rsplit("@", 1)[-1]
    for section in config.sections():
        signs = [word[0] for word in section.split() if fnmatch.fnmatchcase(host, word.lstrip("!"))]
        for name, text in config.items(section) if signs and "!" not in signs else ():
            values: Dict[str, Any] = {}
            try:
                if not name or name not in rows:
                    raise ValueError("there is no option --%s" % name)
                if rows[name].metavar:
                    for line in (text or "").strip().split("\n"):
                        rows[name].put(line, values)
                elif text in (None, "yes", "true", "on"):
                    rows[name].put(None, values)
                elif text not in ("no", "false", "off"):
                    raise ValueError("yes or no, not %r" % text)
                elif isinstance(rows[name].const, bool):
                    values[rows[name].key] = not rows[name].const
            except ValueError as error:
                why = "%s, [%s], %s: %s" % (path, section, name, error)
                raise Failure("wrong configuration", why, "fix it, or --no-config", EXIT_USAGE) from None
            value = values.get(rows[name].key, rows[name].default)
            found.setdefault(rows[name].key, (value, "[%s] %s" % (section, path)))
    return found


# -- what is asked for ------------------------------------------------------------------------------------------------


def request_of(args: Args, action: str, **facts: Any) -> Request:
    """Return the request that the options make: the action's own; all, where something starts. Raises Failure (2)."""
    rows = list(OPTIONS_OF.get(args.action or "", ()))
    if args.action in (None, "execute", "doctor"):
        rows += EVERY_OPTION
        facts["submit"] = submit_words(args)
    asked = {row.key: getattr(args, row.key) for row in rows if row.key in Request.fields}
    facts = {**{key: value for key, value in asked.items() if value is not None}, **facts}
    return Request(action=action, path=args.path, **facts)


# Without a requeue: what a job held is gone, and a server that comes back elsewhere has nobody's tabs.
SBATCH = ["sbatch", "--job-name=rjupyter", "--output={output}", "--no-requeue"]


def submit_words(args: Args) -> List[str]:
    """Return the command that submits a job, {script} in it; none where no job is asked for. Raises Failure (2)."""
    try:
        words = shlex.split(args.submit or "")
        words = words if args.slurm is None else [*SBATCH, *shlex.split(args.slurm)]
    except ValueError as error:
        raise Failure("wrong usage", "%s: %s" % (error, args.slurm or args.submit), "", EXIT_USAGE) from None
    command = os.path.basename(words[0]) if words else ""
    for pattern, why in SCHEDULERS.get(command, UNKNOWN).refused.items():
        for word in words:
            if re.match(pattern, word):
                raise wrong_usage("%s: %s" % (word, why), "%s without it" % command)
    if words and args.socket and not args.via_node:
        raise wrong_usage("a socket can be reached only on its own node", "--via-node, or no --socket")
    return words + ([] if not words or any("{script}" in word for word in words) else ["{script}"])


# -- open -------------------------------------------------------------------------------------------------------------


def run_open(args: Args, agent: Agent, messages: Messages) -> int:
    """Open: come back to a server or launch one, forward, check, print the address, open the browser, hold.

    Ctrl-C before there is a tunnel ends it with 130; after that it closes the tunnel, which is a good end.
    """
    request = request_of(args, "open")
    args.background, args.no_browser = args.background or args.gateway, args.no_browser or args.gateway
    if joins_tunnel(args, request, agent, messages):
        return EXIT_OK
    background = Background() if args.background else None
    if background and background.pid:
        return background.wait()
    tunnel: Optional[Tunnel] = None

    def end_server(can_tell: bool) -> None:
        identity = tunnel.server.id if tunnel else agent.launching
        has_ended = False
        try:
            if can_tell:
                agent.ask(Request(action="stop", ids=[identity]), Record, "Stopping")
                has_ended = True
        finally:
            if not has_ended:
                messages.note("The server keeps running.\nTo end it: %s" % args.again("stop", identity))

    if args.background:
        agent.ssh.masters.remove(master_of_a_tunnel)  # which would end with its terminal, and this one with it
    try:
        agent.ssh.connect()
        server = get_server(args, request, agent, messages)
        if args.further and joins_tunnel(args, request, agent, messages, server.id):
            return EXIT_OK
        if args.via_node and server.job:
            agent.ssh = move_to_node(agent.ssh, server)
        tunnel = open_tunnel(server, args, agent, messages)
        url = server.url(tunnel.port.number, has_token=not server.has_password)
        text = gateway_settings(url, server.base_url) if args.gateway else url
        facts = {"url": url, "local_port": tunnel.port.number, "id": server.id}
        messages.result(text, "open", BOLD, pid=server.pid, **facts)
        if wants_browser(args):
            open_browser(url, args.browser, messages)
        facts.update(destination=args.host, typed=args.line.destination, ssh=args.ssh, further=args.further)
        names = set(Request.LAUNCHING) - set(Request.TELLING)
        launched = {name: getattr(server.request, name) for name in names}
        facts.update(request=request.but(**launched), is_background=args.background, base_url=server.base_url)
        facts.update(config=agent.ssh.config_text, control=agent.ssh.way.control_path if agent.ssh.process else "")
        identity = process_identity(os.getpid())
        record = TunnelRecord(created=time.time(), pid=os.getpid(), identity=identity, **facts)
        with contextlib.ExitStack() as up:
            with signals_held():  # or it stays behind
                up.callback(remove_files, [write_tunnel(record)])
            if args.background:
                messages.note("The tunnel is in the background.\nTo close it: %s" % args.again("close"))
            elif args.stop_on_exit:
                messages.note("Ctrl-C closes the tunnel and ends the server.")
            else:
                stop = args.again("stop", *([] if server.is_only else [server.id]))
                messages.note("Ctrl-C closes the tunnel; the server keeps running.\nTo end it: %s" % stop)
            if background:
                background.detach()
                agent.ssh.can_ask = can_ask()
            tunnel.hold(redials=not args.no_reconnect)
    except Failure as failure:
        can_tell = failure.status != EXIT_SSH or (agent.ssh.way.has_login and agent.ssh.stands)
        is_left = failure.status != EXIT_SERVER_ENDED if tunnel else bool(agent.launching)
        if args.stop_on_exit and is_left:
            with contextlib.suppress(Failure):  # the first one is the cause
                end_server(can_tell and not tunnel)
        raise
    except (KeyboardInterrupt, Terminated):
        is_ended = args.stop_on_exit and bool(tunnel or agent.launching)
        if tunnel or is_ended:
            messages.end_line()
        if is_ended:
            end_server(True)
        if not tunnel:
            raise
        text = "Closed." if is_ended else "Closed. To come back: %s" % args.again()
        messages.step(text, "closed", local_port=tunnel.port.number, tunnel_pid=os.getpid())
        if not is_ended and (wants_browser(args) or tunnel.has_page()):
            text = "Close its pages, too: whoever listens on port %d here next is sent their cookie."
            messages.note(text % tunnel.port.number)
    return EXIT_OK


def joins_tunnel(args: Args, request: Request, agent: Agent, messages: Messages, server: str = "") -> bool:
    """True when a tunnel is up already that does what is asked for, or leads to a server: its page is shown again.

    Nobody logs in: through what is up, a further forward is added, and a person is told what was missed.
    """
    for record in [] if args.is_new else tunnels():
        further = [spec for spec in args.further if spec not in record.further]
        is_there = (record.destination, record.ssh) == (args.host, args.ssh) and (record.control or not further)
        is_same = request.same_as(record.request) or record.id == server
        if is_there and is_same and args.local_port in (None, record.local_port) and not is_leaving(record):
            messages.step("The tunnel is up already (pid %d)." % record.pid, "joined", tunnel_pid=record.pid)
            say_ignored([] if server else ignored_options(request, record.request), args, messages)
            if not does_answer(record):
                waits = "" if record.is_background else "waits for a login in its terminal, "
                messages.note("It does not answer: it is connecting again, %sor Jupyter hangs." % waits)
            elif record.control and agent.ssh.is_mux and has_terminal() and not (further or server):
                agent.ssh.masters = [lambda _, record=record: record.control]  # type: ignore[misc]
                agent.ssh.can_ask, agent.greets_after_s = False, float("inf")
                with contextlib.suppress(Failure):  # nobody is to be kept from the page by that
                    agent.ssh.connect()
                    asked = request.but(action="away", attach=record.id)
                    reply = agent.ask(asked, reply_of(away="List[Away]"), silence_s=CHECK_TIMEOUT_S)
                    say_away(reply.away, args, messages)
            for spec in further:
                add_forward(record, spec, agent.ssh)
                address, port, target = spec.split(":", 2)
                text = "Forwarding %s:%s to %s on %s." % (address, port, target, args.host)
                messages.step(text, "forwarding", local_port=int(port))
            text = gateway_settings(record.url, record.base_url) if args.gateway else record.url
            messages.result(text, "open", BOLD, url=record.url, local_port=record.local_port, id=record.id)
            if wants_browser(args) and not further:
                page = open_browser(record.url, args.browser, messages)
                page.join(JOIN_TIMEOUT_S)
                if page.is_alive():
                    messages.note("Waiting for the browser to ask for the page; Ctrl-C ends the wait.")
                page.join(BROWSER_TIMEOUT_S)
            return True
    return False


def open_tunnel(server: Server, args: Args, agent: Agent, messages: Messages) -> Tunnel:
    """Open a checked tunnel to a server."""
    ssh = agent.ssh
    tunnel = Tunnel(ssh, agent, server, messages, args.again)
    tunnel.open(args.local_port)
    tunnel.check()
    where = "%s:%s" % (ssh.destination, server.sock or server.port)
    if server.is_on_node and not args.via_node:
        where = "%s (%s) through %s" % (server.target, server.node, ssh.destination)
    text = "Forwarding 127.0.0.1:%d to %s." % (tunnel.port.number, where)
    messages.step(text, "forwarding", local_port=tunnel.port.number, port=server.port, sock=server.sock)
    if server.has_password:
        messages.note("The server has a password; the page asks for it.")
    elif not server.token:
        messages.note("The server asks for no token and no password: everyone on %s can use it." % ssh.destination)
    return tunnel


def get_server(args: Args, request: Request, agent: Agent, messages: Messages) -> Server:
    """Come back to a server on the host, or launch one, and say which."""
    # The local port is kept for us while Jupyter starts: the agent writes it down, and the next run looks for it.
    local_port = args.local_port or find_free_port(LOCAL_PORT)
    waiting = Queue(agent, messages, args.again, lambda identity: args.again())
    asking = contextlib.nullcontext() if args.stop_on_exit else waiting.asking()
    leaving = agent.leaving(lambda: "" if args.stop_on_exit else agent.what_goes_on("Jupyter", args.again))
    agent.port.number = local_port
    if not agent.port.hold() and args.local_port and not args.further:  # else a tunnel to the same server may have it
        raise agent.port.taken("another --local-port, or none")
    with asking, leaving:
        request = request.but(local_port=local_port, errand=os.urandom(8).hex())
        server = agent.ask_on(lambda: request, Server, "Launching Jupyter", waiting.handlers)
    # From now on, print commands that choose what the server was launched with, even if this open did not ask for it:
    # else the line that starts such another one would start it in another environment, or outside of a job.
    names = ("python", "env", "init", "wrap", "container", "socket", "via_node")
    launched_with = {name: getattr(server.request, name) for name in names if getattr(server.request, name)}
    words = [word for word in server.request.submit if word != "{script}"]
    if words[: len(SBATCH)] == SBATCH:
        launched_with["slurm"] = shlex.join(words[len(SBATCH) :])
    elif words:
        launched_with["submit"] = shlex.join(server.request.submit)
    for option in EVERY_OPTION:
        value = launched_with.get(option.key)
        if value is not None and getattr(args, option.key) == option.default:
            setattr(args, option.key, value)
            values = value if isinstance(value, list) else [None if value is True else value]
            flag = option.flags[0]
            args.line.before += [Typed(option, flag, one, [flag, *([] if one is None else [one])]) for one in values]
    say_server(server, request, args, agent, messages)
    return server


def ignored_options(request: Request, launched: Request) -> List[str]:
    """Return the options that are asked for, and act only at a launch that was without them."""
    fields = request.too_late(launched)
    return ["--" + option.name for option in EVERY_OPTION if option.key in fields]


def say_ignored(options: List[str], args: Args, messages: Messages) -> None:
    """Say which options come too late for a server that runs, and what has them."""
    if options:
        text = "%s takes effect only at launch, and this server was running already.\nFor a new one: %s"
        messages.note(text % (", ".join(options), args.again("--new")))


def how_to_own(paths: List[str], user: str) -> str:
    """Return the command that gives files back to their user."""
    return "sudo chown -R %s" % shlex.join([user, *paths])


def say_server(server: Server, request: Request, args: Args, agent: Agent, messages: Messages) -> None:
    """Say which server it is, and what the user should know about it."""
    destination = agent.ssh.destination
    where = "socket" if server.sock else "port %d" % server.port
    title = "%s on %s" % (server.title, server.node) if server.job else server.title
    title += " inside %s" % server.request.outside if server.request.outside else ""
    text = "%s in %s (pid %d, %s, " % (title, from_home(server.root_dir, messages.home), server.pid, where)
    facts = {name: getattr(server, name) for name in EVENTS["launched"].keys}
    if server.is_launched:
        messages.step("Launched %s%.1f s)." % (text, server.seconds), "launched", **facts)
        address = ipaddress.ip_address(args.ip)
        if not address.is_loopback:
            where = "any address of " + destination if address.is_unspecified else args.ip
            text = "--ip %s: whoever reaches %s can connect to Jupyter, past ssh; the token alone keeps them out."
            messages.note(text % (args.ip, where))
    else:
        ignored = ignored_options(request, server.request)
        messages.step("Found %sup %s)." % (text, duration(server.seconds)), "found", ignored=ignored, **facts)
        say_ignored(ignored, args, messages)
    if server.is_on_node and not args.via_node:
        text = "Jupyter is on %s, an address of %s: whoever reaches that can connect; the token alone keeps them out."
        messages.note(text % (server.host, server.node))
    if server.scheduler:
        text = "%s is there: if %s is a login node, run Jupyter in a job (--slurm OPTIONS, --submit COMMAND)."
        messages.note(text % (server.scheduler, destination))
    if server.foreign:
        text = "Notebooks may fail on %s: another user owns files of Jupyter's.\nTo fix it, on the host: %s"
        messages.note(text % (destination, how_to_own(server.foreign, agent.hello["user"])))
    say_away(server.away, args, messages)
    if server.is_launched and agent.hello["is_root"]:
        messages.note("You are root on %s: Jupyter runs as root there (--allow-root)." % destination)


def say_away(found: List[Away], args: Args, messages: Messages) -> None:
    """Say which cells ended while no page was connected, and where their outputs are."""
    for away in found:
        more, it = (", the last of %d cells" % away.cells, "they are") if away.cells > 1 else ("", "it is")
        ending = ending_of(away.count, away.is_done, away.seconds) + (": its kernel died" if away.has_died else "")
        text = "While you were away: %s %s (%s)%s" % (away.notebook, ending, count_of(away.lines, "line"), more)
        where = "" if args.no_save else "; %s in the notebook" % it
        where = "; not put into the notebook: " + away.why if away.why else where
        see = "\nTo see it: " + args.again("output", away.kernel or away.notebook) if away.why or args.no_save else ""
        messages.note("%s%s.%s" % (text, where, see))


def wants_browser(args: Args) -> bool:
    """True when a browser is to be opened: asked for by name, or where a person sits in front of this machine."""
    return not args.no_browser and ("browser" in args.typed or (has_terminal() and "SSH_CONNECTION" not in os.environ))


# -- list, logs, stop, close ------------------------------------------------------------------------------------------


def run_list(args: Args, agent: Agent, messages: Messages) -> int:
    """List the user's servers and runs on the host: tables for people, one object a line with --json."""
    if "," in args.host:
        return list_hosts(args, messages)
    agent.ssh.connect()
    views: Dict[str, List[Any]]
    hidden = 0
    if args.kernels:
        kernels = reply_of(kernels="List[KernelState]", missing="str")
        reply = agent.ask(request_of(args, "list_kernels"), kernels, "Asking the servers")
        views = {"kernel": reply.kernels}
        if reply.missing:
            messages.note(reply.missing)
    else:
        kinds = {"jobs": "List[StarterView]", "servers": "List[ServerView]", "wrappers": "List[StarterView]"}
        reply = agent.ask(request_of(args, "list"), reply_of(runs="List[RunView]", **kinds), "Asking the servers")
        views = {"job": reply.jobs, "server": reply.servers, "wrapper": reply.wrappers, "run": reply.runs}
        views["run"] = [run for run in reply.runs if run.state in GOING_ON or args.all or args.json]
        hidden = len(reply.runs) - len(views["run"])
        ids = [view.id for found in views.values() for view in found if re.fullmatch(r"\w{3,10}", view.id)][:100]
        if kept_here().hosts.get(agent.ssh.destination) != ids:  # to complete a line with
            keep_here("hosts", agent.ssh.destination, ids)
    for event, found in views.items():
        if ((event in ("wrapper", "run") and found) or (event == "server" and views["job"])) and not args.json:
            messages.line("")
        print_rows(event, found, messages)
        if event in ("server", "kernel") and not found:
            messages.note("No %s of yours runs there." % event)
    if hidden:
        words = count_of(hidden, "finished execution"), "them" if hidden > 1 else "it", args.again("list", "--all")
        messages.note("%s not shown.\nTo list %s: %s" % words)
    return EXIT_OK


HOSTS_TIMEOUT_S = 20.0  # in which each of several hosts has answered, or is not reached
LOGIN_EVERY_S = 0.1  # of many hosts, that few log in at once


def list_hosts(args: Args, messages: Messages) -> int:
    """Ask several hosts at the same time, each by a process of ours with a deadline; an unreachable host is a row."""
    program = [sys.executable, os.path.abspath(__file__), "--json"]
    pipes: Dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    asked: "Dict[str, subprocess.Popen[bytes]]" = {}
    found: Dict[str, List[Any]] = {}  # by their event
    status = EXIT_OK
    with contextlib.ExitStack() as ends:
        for host in dict.fromkeys(filter(None, args.host.split(","))):
            words = args.line.words(args.line.destination.replace(args.host, host, 1), "list")
            pause_s = LOGIN_EVERY_S if len(asked) > 8 else 0  # beyond ten logins at once, a bastion turns some away
            time.sleep(pause_s)
            asked[host] = ends.enter_context(new_process([*program, *words], start_new_session=True, **pipes))
            ends.callback(asked[host].terminate)
        until_s = time.monotonic() + HOSTS_TIMEOUT_S
        for host, child in asked.items():
            why, said = "no answer within %d s" % HOSTS_TIMEOUT_S, b""
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = child.communicate(timeout=max(1, until_s - time.monotonic()))
                why = "it ended with status %d" % child.returncode if child.returncode else ""
            events = [facts_in(line) for line in said.decode("utf-8", "replace").splitlines()]
            failed = [str(facts["why"] or facts["what"]) for facts in events if facts.get("event") == "failure"]
            why = failed[0].replace("\n", "; ") if failed else why
            messages.event("host", host=host, is_reached=not why, why=why or None)
            rows = [facts for facts in events if facts.get("event") in COLUMNS]
            for facts in rows:
                messages.event(**facts)
            rows = [row for row in rows if row["event"] != "run" or row["state"] in GOING_ON or args.all]
            status = EXIT_SSH if why else status
            home = next((str(facts["home"]) for facts in events if facts.get("event") == "connected"), "")
            if why or not rows:
                nothing = {"id": "-", "pid": 0, "node": "", "app": "", "root_dir": "-", "is_ours": True, "age_s": 0.0}
                view = ServerView(manager=why, state="not reached" if why else "none", **nothing)
                rows.append(dict(view.facts(), event="server"))
            for facts in rows:
                facts.update(behind=host, root_dir=from_home(facts.get("root_dir") or "", home))
                found.setdefault(facts["event"], []).append(types.SimpleNamespace(**facts))
    for event in ("job", "server", "wrapper", "run", "kernel") if not args.json else ():
        print_rows(event, found.get(event, []), messages, HOST=lambda row: row.behind)
    return status


def within(timeout_s: int, agent: Agent, request: Callable[[], Request]) -> Callable[[], Request]:
    """Return what makes a request, each time with what is left of the time from now on; 0 is no limit."""
    began = time.monotonic()
    agent.ssh.until_s = began + (timeout_s or float("inf"))
    return lambda: request().but(timeout_s=timeout_s and max(1, timeout_s - int(time.monotonic() - began)))


def run_wait(args: Args, agent: Agent, messages: Messages) -> int:
    """Wait until a kernel is idle; say in one line, and by the exit status, how its last cell ended."""
    request = request_of(args, "wait_for_kernel")
    agent.ssh.connect()
    last = {"count": "Optional[int]", "seconds": "Optional[float]", "is_done": "Optional[bool]"}  # its last cell
    kind = reply_of(kernel="KernelState", state="str", **last)
    reply = agent.ask_on(within(args.timeout_s, agent, lambda: request), kind, "Waiting for the kernel")
    name = reply.kernel.notebook or reply.kernel.id[:8]
    if reply.state == "busy":
        raise Failure("%s is still busy" % name, "after %s" % duration(args.timeout_s), "", EXIT_TIMEOUT)
    text = "%s: its kernel died, or was restarted." if reply.state == "dead" else "%s is idle."
    if reply.is_done is not None:
        text = "%s is idle: " + ending_of(reply.count, reply.is_done, reply.seconds or 0.0) + "."
    facts: Json = {"state": reply.state, "count": reply.count, "seconds": reply.seconds, "is_done": reply.is_done}
    messages.result(text % name, "waited", kernel=reply.kernel.id, notebook=reply.kernel.notebook, **facts)
    return EXIT_SERVER_ENDED if reply.state == "dead" else EXIT_CELL_FAILED if reply.is_done is False else EXIT_OK


def run_eval(args: Args, agent: Agent, messages: Messages) -> int:
    """Run code in a live kernel: its output comes as it is printed, errors go to stderr (status 5)."""
    became = reply_of(kernel="KernelState", state="str")
    if args.interrupt:
        agent.ssh.connect()
        reply = agent.ask(request_of(args, "interrupt_kernel"), became)
        if reply.state == "dead":
            raise Failure("the kernel died", "of the interrupt", args.again("list", "--kernels"), EXIT_SERVER_ENDED)
        text = "Nothing to interrupt: %s is idle." if reply.state == "idle" else "Interrupted the kernel of %s."
        messages.note(text % reply.kernel.title)
        return EXIT_OK
    if args.code is None:
        raise wrong_usage("eval takes CODE, - for stdin, or --interrupt", args.again("eval", "--help"))
    try:
        if args.save_images:
            os.makedirs(args.save_images, exist_ok=True)
        code = sys.stdin.read() if args.code == "-" else args.code
        code.encode()
    except UnicodeError as error:
        raise Failure("the code is not UTF-8", str(error)) from None
    except OSError as error:
        raise Failure("cannot write into " + args.save_images, error.strerror or str(error)) from None
    request = request_of(args, "eval_code", errand=os.urandom(16).hex(), data=code)
    executions, lines = Executions(), 0
    updates: Dict[str, Entry] = {}  # what displays show at last, by the id of each

    def take(message: Told, show: Show) -> None:
        """Print what comes: results on stdout, the rest on stderr; with --json, each output."""
        nonlocal lines
        lines = message.at + 1
        cell, entry = executions.take(message.entry)
        if args.json and cell:
            tell_entry(entry, cell, messages)
        if entry.type == "update_display_data" and not args.save_images:
            name = fact(fact(entry.content, "transient", {}), "display_id", "")
            updates[name] = entry.but(type="display_data")
        for each in [entry, *(updates.values() if entry.kind == "finished" else [])]:
            show_entry(cell, each)

    def show_entry(cell: Optional[CellOutput], entry: Entry) -> None:
        written = {}
        if args.save_images and cell and cell.begun and entry.kind == "printed":
            written = write_display(entry, os.path.join(args.save_images, "cell-%s" % cell.begun.count))
        for kind, path in written.items():
            messages.result("[%s: %s]" % (kind, path), "image", type=kind, path=path)
        if entry.kind == "gap" and not args.json:
            messages.warn("[%s]" % entry.why)
        elif cell and entry.kind == "printed" and not written and not args.json:
            text = re.sub(COLOURS + "|.\b", "", re.sub("\r\n?", "\n", text_of(entry)))
            if entry.type == "error" or entry.content.get("name") == "stderr":
                messages.warn(text, end="")
            else:
                messages.line(text, end="")

    def goes_on() -> str:
        follow, kernel = args.again("output", agent.launching, "-f"), agent.launching
        stop = args.again("eval", "--interrupt", "-k", kernel)
        if not executions.cells:
            return "It waits for a cell before it.\nTo follow it: %s" % follow if kernel else ""
        return "It keeps running.\nTo follow it: %s\nTo interrupt it: %s" % (follow, stop)

    with agent.leaving(goes_on):
        agent.ssh.connect()
        asking = within(args.timeout_s, agent, lambda: request.but(line=lines))
        reply = agent.ask_on(asking, became, "", {"recorded": take})
    if reply.state in ("busy", "queued"):
        raise Failure("it is not done after " + duration(args.timeout_s), goes_on(), "", EXIT_TIMEOUT)
    if reply.state == "dead":
        kernels = args.again("list", "--kernels")
        raise Failure("the kernel died", "its memory is gone with it", kernels, EXIT_SERVER_ENDED)
    if reply.state == "lost":
        raise Failure("it is not known what becomes of it", "the recorder on the host was killed")
    if reply.state == "aborted":
        raise Failure("it was not run: a cell before it failed")
    return EXIT_OK if reply.state == "done" else EXIT_CELL_FAILED


def run_logs(args: Args, agent: Agent, messages: Messages) -> int:
    """Print the log of a server or a run, and with -f what comes, until it ends or Ctrl-C."""
    identity, lines = args.id, 0
    held: List[str] = []  # "Forbidden": the next line tells whether it was said to us

    def take(line: Told, show: Show) -> None:
        nonlocal identity, lines
        identity, lines = line.id or identity, lines + 1
        said = [] if OUR_PROBE in line.text else [*held, line.text]
        held[:] = [text for text in said[-1:] if re.search(r"Forbidden'?$", text)]
        for text in said[: len(said) - len(held)]:
            messages.result(as_shown(text), "line", line=text)

    agent.ssh.connect()
    agent.redials = agent.redials and args.is_followed
    agent.ask_on(lambda: request_of(args, "logs", id=identity, line=lines), Record, handlers={"line": take})
    for text in held:
        messages.result(as_shown(text), "line", line=text)
    return EXIT_OK


def run_output(args: Args, agent: Agent, messages: Messages) -> int:
    """Print what the cells of a notebook printed, and with -f what comes, until the server ends or Ctrl-C."""
    agent.ssh.connect()
    if args.save:
        reply = agent.ask(request_of(args, "save_output"), reply_of(notebook="str", cells="int"), "Saving")
        text = "Saved the outputs of %s into %s." % (count_of(reply.cells, "cell"), reply.notebook)
        text = text if reply.cells else "%s has all of these outputs already." % reply.notebook
        messages.step(text, "saved", notebook=reply.notebook, cells=reply.cells)
        return EXIT_OK
    shown = ShownCells(messages, args.since, agent)
    request = request_of(args, "send_output")
    agent.redials = agent.redials and args.is_followed
    agent.ask_on(lambda: request.but(line=shown.lines), Record, "", {"recorded": shown.take})
    return EXIT_OK


def run_stop(args: Args, agent: Agent, messages: Messages) -> int:
    """Stop servers on the host; ask before one whose kernels compute. Or kernels.

    Raises Failure where there is something to ask, and nobody who could answer.
    """
    if args.typed.get("attach") and not (args.ids or args.is_all):
        args.ids = [args.attach]
    # Through a tunnel to what is ended, which ends as well, we would cut ourselves off. These words are ids.
    if not args.ids or any(re.fullmatch(r"[rjw]?[0-9a-f]{4}|p[0-9]+", word) for word in args.ids):
        agent.ssh.masters.remove(master_of_a_tunnel)
    agent.ssh.connect()
    chosen = {name: args.typed[name] for name in Request.CHOOSING if name in args.typed and name != "submit"}
    request = request_of(args, "stop", **chosen)
    kind = reply_of(count="int", busy="List[ServerView]", runs="List[RunView]")
    reply = agent.ask(request.but(asks=not args.yes), kind, "Stopping")
    if reply.busy or reply.runs:
        words = ["%d of %d kernels are busy in %s (%s)." % (s.busy, s.kernels, s.root_dir, s.id) for s in reply.busy]
        words = [line.replace("1 of 1 kernels are busy", "Its kernel is busy") for line in words]
        words += ["%s is being executed in %s (%s)." % (run.name, run.root_dir, run.id) for run in reply.runs]
        if not has_terminal():
            why = "\n".join([*words, "There is no terminal on which to ask."])
            raise Failure("nothing was stopped", why, command_line(*sys.argv[1:], "--yes"))
        for line in words:
            messages.note(line)
        if not says_yes("Stop it anyway? [y/N] "):
            messages.note("Nothing was stopped.")
            return EXIT_FAILURE
        reply = agent.ask(request, kind, "Stopping")
    if not reply.count:
        messages.note("No server of yours runs there.")
    return EXIT_OK


def run_close(args: Args, agent: Agent, messages: Messages) -> int:
    """Close the tunnels in the background: those to a host, or all that are up here."""
    if args.line.destination == NO_HOST and not args.all:
        raise wrong_usage("close whose tunnels?", command_line("close", "--all"))
    closed = 0
    for record in tunnels():
        is_meant = record.destination == args.host and args.path in (None, record.request.path)
        if not args.all and not (is_meant and ("ssh" not in args.typed or args.ssh == record.ssh)):
            continue
        if not record.is_background:
            text = "The tunnel on 127.0.0.1:%d is open in another terminal (pid %d): Ctrl-C there closes it."
            messages.note(text % (record.local_port, record.pid))
        else:
            end_tunnel(record)
            text = "Closed the tunnel on 127.0.0.1:%d." % record.local_port
            messages.step(text, "closed", local_port=record.local_port, tunnel_pid=record.pid)
            closed += 1
    if not closed:
        messages.note("No tunnel to %s in the background." % ("any host" if args.all else args.host))
    return EXIT_OK


def run_tunnels(args: Args, agent: Agent, messages: Messages) -> int:
    """Show the tunnels that are up here, and how to come back to one, or to close it."""
    records = sorted(tunnels(), key=lambda record: record.created)
    rows: List[Json] = []
    for record in records:
        row = {name: getattr(record, name) for name in ("destination", "local_port", "id", "is_background")}
        row.update(state="up" if does_answer(record) else "no answer", tunnel_pid=record.pid, path=record.request.path)
        rows.append(dict(row, age_s=max(0.0, time.time() - record.created)))
    print_rows("tunnel", rows, messages)
    if not rows:
        messages.note("No tunnel of yours is up here.\nTo open one: %s" % command_line("HOST"))
    elif not args.json:
        state_dir = records[-1].request.state_dir
        place = ["--state-dir", state_dir] if state_dir else []
        back = command_line(*records[-1].ssh, *place, records[-1].typed)
        messages.note("To come back: %s" % back)
        if any(record.is_background for record in records):
            messages.note("To close those in the background: %s" % command_line("close", "--all"))
    return EXIT_OK


# -- execute ----------------------------------------------------------------------------------------------------------


def run_execute(args: Args, agent: Agent, messages: Messages) -> int:
    """Execute notebooks on the host, and bring their results.

    One after the other, the first failure ends it; with -j or --grid several at once, each of them to its end.
    """
    check_execute(args)
    is_many = bool(args.grid or args.at_once)
    request = request_of(args, "start_run", brings=args.bring, is_one_of_many=is_many)
    sources = [Source.from_argument(name, args.output, args.inplace) for name in args.notebooks]
    seen: Dict[str, str] = {}
    for source in [source for source in sources if source.output]:
        other = seen.setdefault(os.path.realpath(source.output), source.name)
        if other != source.name:
            why = "%s would be the result of %s and of %s" % (source.output, other, source.name)
            raise wrong_usage(why, "one after the other, each with -o FILE")
    request = request.but(parameter_files=[read_parameter_file(path) for path in args.parameters_file])
    alongs = [Along.of(source, args.along) for source in sources if args.along]
    digests = [along.digest for along in alongs] or [""] * len(sources)
    tasks = [task for s, digest in zip(sources, digests) for task in tasks_of(s, args, request.but(files=digest))]
    waiting = Queue(agent, messages, args.again, lambda identity: args.again("execute", "--attach", identity))
    agent.ssh.connect()
    for along in alongs:
        along.send(agent)
    if is_many:
        execute_many(tasks, args, agent)
        return EXIT_OK
    with waiting.asking():
        if args.run_id:
            follow(Task(args.run_id, request, args.output), args.run_id, args, agent, waiting)
        for number, task in enumerate(tasks, 1):
            try:
                execute_one(task, args, agent, waiting)
            except Failure:
                left = ", ".join(task.name for task in tasks[number:])
                if left:
                    messages.warn("Not executed after the failure of %s: %s" % (task.name, left))
                raise
    return EXIT_OK


def check_execute(args: Args) -> None:
    """Raise Failure (2) where the options do not go together."""
    names = [name for name, _ in args.grid]
    given = names + [name for name, _ in args.parameters]
    wrong = {
        "execute takes notebooks, or --attach ID": bool(args.notebooks) == bool(args.run_id),
        "-o - prints the notebook and no events; --json goes with a file": args.json and args.output == "-",
        "-o goes with one notebook, and not with --inplace": args.output and (args.inplace or len(args.notebooks) > 1),
        "--attach brings the result of one run; -o says where it goes": args.inplace and args.run_id,
        "--grid has many results, each named by its values; neither -o nor --inplace goes with it": names
        and (args.inplace or args.output),
        "a name of --grid has its values there alone, and once": any(given.count(name) > 1 for name in names),
        "--attach follows one run; --grid and -j go with notebooks": args.run_id and (names or args.at_once),
    }
    for why in filter(wrong.get, wrong):
        raise wrong_usage(why, args.again("execute", "--help"))


def tasks_of(source: Source, args: Args, request: Request) -> List[Task]:
    """Return what is executed of a notebook: once, or once for each combination of the grid's values."""
    request = request.but(
        notebook=source.text and without_old_outputs(source.text),
        file=source.name[1:] if source.is_on_host else "",
        # What tells it from other notebooks, so that two runs of one do not overlap.
        key="" if source.is_on_host else "%s:%s" % (socket.gethostname(), os.path.realpath(source.name)),
        is_in_place=source.is_on_host and args.inplace,
    )
    original = source.text if args.inplace else ""
    tasks = []
    for combination in itertools.product(*(values for _, values in args.grid)):
        values = {name: value for (name, _), value in zip(args.grid, combination)}
        name = label_of(os.path.basename(source.name.lstrip(":")), values)
        output = os.path.join(os.path.dirname(source.output), executed_name(name)) if values else source.output
        parameters = [list(pair) for pair in (*args.parameters, *values.items())]
        result = "%s:%s" % (socket.gethostname(), os.path.realpath(output)) if output not in ("", "-") else ""
        task = request.but(name=name, parameters=parameters, result=result, errand=os.urandom(8).hex())
        tasks.append(Task(name, task, output, original))
    return tasks


BATCH_S = 20 * 3600  # for which the same command goes on with what it began


def execute_many(tasks: List[Task], args: Args, agent: Agent) -> None:
    """Execute several notebooks, so many at once. Until all have ended, the same command goes on with them."""
    messages = agent.messages
    asked = [task.request.but(errand="").facts() for task in tasks]
    key = digest_of(json.dumps([agent.ssh.destination, agent.state_dir, asked]))
    seed = "" if args.overlaps else kept_here().batches.get(key, "")
    begun = re.match(r"([0-9a-f]{1,9})\.", seed)
    if begun and time.time() - int(begun.group(1), 16) < BATCH_S:  # else the next night's, of one that was killed
        messages.note("Continuing what the same command began; --overlap starts afresh.")
    else:
        seed = "%x.%s" % (int(time.time()), os.urandom(8).hex())
        keep_here("batches", key, seed)
    errands = [digest_of("%s %d" % (seed, number)) for number in range(len(tasks))]
    tasks = [task._replace(request=task.request.but(errand=errand)) for task, errand in zip(tasks, errands)]
    batch = Batch(tasks, args.at_once or 1, agent, lambda task, name: execution_of(task, name, args, agent))

    def goes_on() -> str:
        ids = [execution.id for execution in batch.running.values()]
        text = "What is running keeps running. The same command follows it again, and starts the rest."
        return text + ("\nTo end it: " + args.again("stop", *ids) if ids else "")

    try:
        with agent.leaving(goes_on):
            batch.follow()
    finally:
        if batch.has_ended:  # the same command begins anew
            keep_here("batches", key, None)


def read_parameter_file(path: str) -> List[str]:
    """Return the name and the text of a file of parameters; raises Failure where it cannot be read, or is wrong JSON.

    What is no JSON by its name may be YAML, which the host reads.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            text = stream.read()
        if path.lower().endswith(".json"):
            parameters_in(path, text)
    except OSError as error:
        raise Failure("cannot read " + path, str(error)) from None
    except ValueError as error:
        raise Failure("%s holds no parameters" % path, str(error)) from None
    return [path, text]


def execute_one(task: Task, args: Args, agent: Agent, waiting: Queue) -> None:
    """Execute a notebook on the host, unless it is being executed already, and no overlap was asked for."""
    messages = agent.messages
    with agent.leaving(lambda: agent.what_goes_on("The execution of " + task.name, args.again)):
        doing = "Launching the execution of " + task.name
        reply = agent.ask_on(lambda: task.request, StartReply, doing, waiting.handlers)
    if not reply.is_started:
        text = "%s is already running (%s, for %s); --overlap starts it anyway.\nTo follow it: %s"
        again = args.again("execute", "--attach", reply.id)
        messages.warn(text % (task.name, reply.id, duration(reply.age_s), again))
        messages.event("overlap", id=reply.id)
        return
    messages.step("Executing %s on %s (%s)." % (task.name, agent.ssh.destination, reply.id), "started", id=reply.id)
    follow(task, reply.id, args, agent, waiting)


def follow(task: Task, identity: str, args: Args, agent: Agent, waiting: Queue) -> None:
    """Follow a run to its end; when we leave before, it goes on, and a line says how to come back to it."""
    execution = execution_of(task, identity, args, agent)

    def goes_on() -> str:
        facts = (execution.name, execution.again, args.again("stop", execution.id))
        text = "%s keeps running.\nTo follow it again: %s\nTo end it: %s" % facts
        return "" if waiting.state.is_waiting else text

    with agent.leaving(goes_on):
        execution.follow(waiting.handlers)


def execution_of(task: Task, identity: str, args: Args, agent: Agent) -> Execution:
    """Return what follows a run. It brings what this command says, or else the one that began it."""
    execution = Execution(task, identity, agent)
    execution.overwrites, execution.shows_output = args.force, args.show_output
    execution.again = args.again("execute", "--attach", identity)
    key = "%s %s" % (agent.ssh.destination, identity)
    kept = kept_here().brings.get(key, []) if args.run_id else []  # else the host would say which
    if args.bring and args.bring != kept:
        keep_here("brings", key, args.bring)
    execution.brings = list(args.bring or kept)
    return execution


# -- doctor -----------------------------------------------------------------------------------------------------------


def run_doctor(args: Args, agent: Agent, messages: Messages) -> int:
    """Walk every step of an open, each with its verdict; return 1 when one failed."""
    agent.ssh.masters.remove(master_of_a_tunnel)  # the login is one of the steps
    agent.greets_after_s = float("inf")  # the lines below say it
    status = EXIT_OK
    for name, words, try_ in checks(args, agent):
        says = words.replace("\n", "; ")
        text = "%s  %-12s %s" % ("FAIL" if try_ else "ok  ", name, says)
        text += "\n      %-12s try: %s" % ("", try_) if try_ else ""
        messages.result(text, "check", RED if try_ else GREEN, check=name, is_ok=not try_, says=says, remedy=try_)
        status = EXIT_FAILURE if try_ else status
    return status


def checks(args: Args, agent: Agent) -> Iterator[Tuple[str, str, str]]:
    """Check this machine, the connection and the host; the first step there that fails is the last one.

    Each comes as its name, what is to say, and for what failed, how to mend it.
    """
    ssh = agent.ssh

    def failed(name: str, why: Failure, try_: str) -> Tuple[str, str, str]:
        return name, "%s: %s" % (why.what, why.why), why.try_ or try_

    yield "ssh", ssh.version(), ""
    try:
        yield "runtime dir", private_runtime_dir() if ssh.is_mux else "not needed without multiplexing", ""
    except Failure as failure:
        yield "runtime dir", failure.why, failure.try_
    name = "none found"
    with contextlib.suppress(webbrowser.Error):
        name = str(getattr(webbrowser.get(args.browser), "name", "the system's"))
    if name == "none found" and os.path.isfile(args.browser or ""):
        name = args.browser
    is_one = name not in ("none found", *([] if args.browser else TEXT_BROWSERS))
    remedy = "--browser with a command that is there" if args.browser and not is_one else ""
    yield "browser", name if is_one else name + "; the address is printed", remedy
    began = time.monotonic()
    step = "connection"
    try:
        ssh.connect()
        if ssh.way.has_login:
            how = "multiplexed" if ssh.process else "your own master"
            yield "connection", "logged in after %.1f s (%s)" % (time.monotonic() - began, how), ""
            step = "command"
        asked = request_of(args, "examine")
        is_inside = bool(asked.outside) and not asked.submit
        request = asked.but(submit=[], wrap=[], container="")
        request = request.but(python="", env="", init=[]) if is_inside else request  # they are for in there
        told = dict.fromkeys(("shell", "state", "no_install", "jupyter", "scheduler"), "str")
        told.update(dict.fromkeys(("free_bytes", "sshd_port", "other_users"), "int"), foreign="List[str]")
        kind = reply_of(state_trouble="Optional[Failure]", jupyter_trouble="Optional[Failure]", **told)
        facts = agent.ask(request, kind, "Looking around on the host")
    except Failure as failure:
        yield failed(step, failure, "-v, which shows more")
        return
    if not ssh.way.has_login:
        yield "connection", "each step logs in by itself", ""
    yield "login shell", "%s of %s@%s" % (facts.shell or "?", agent.hello["user"], agent.hello["node"]), ""
    noise = "prints %d lines to a command, the last: %s" % (len(agent.noise), (agent.noise or [""])[-1])
    yield "noise", noise + " (harmless here; scp may fail)" if agent.noise else "none from the start-up files", ""
    yield "python", agent.hello["python"], ""
    found, trouble = facts.jupyter, facts.jupyter_trouble
    if is_inside:
        try:
            inside = agent.ask(asked, kind, "Looking around inside")
            found, trouble = inside.jupyter, inside.jupyter_trouble
        except Failure as failure:
            found, trouble = "", failure
    if found:
        yield "jupyter", found, ""
    elif trouble:
        yield failed("jupyter", trouble, "another one")
    elif is_inside:
        yield "jupyter", "none in there", "another image or command"
    elif facts.no_install:
        yield "jupyter", "none, and Python has no ensurepip to install it", "sudo apt install python3-venv, there"
    else:
        yield "jupyter", "none; an open installs it for you alone", ""
    if facts.state_trouble:
        yield "disk", facts.state_trouble.why, facts.state_trouble.try_
    else:
        text = "%.1f GB free at %s" % (facts.free_bytes / 1e9, facts.state)
        yield "disk", text, "make room there" if facts.free_bytes < 5e7 else ""
    if facts.foreign:
        yield "own files", "another user owns some of Jupyter's", how_to_own(facts.foreign, agent.hello["user"])
    can_reach, words = ssh.can_reach("127.0.0.1:%d" % facts.sshd_port)
    if can_reach or "connect failed" in words:  # that sshd tried will do
        yield "forwarding", "allowed", ""
    else:
        yield "forwarding", words, "AllowTcpForwarding and PermitOpen in its sshd_config; ask its administrator"
    others = count_of(facts.other_users, "other user") + " there; --socket keeps them off the port"
    yield "others", others if facts.other_users else "nobody else runs anything there", ""
    if args.slurm is not None or args.submit:
        try:
            reply = reply_of(said="str", is_refused="bool", limits="str")
            forecast = agent.ask(request_of(args, "forecast_job"), reply, "Asking the scheduler")
            said, is_refused, limits = forecast.said, forecast.is_refused, forecast.limits
        except Failure as failure:
            said, is_refused, limits = "%s: %s" % (failure.what, failure.why), True, ""
        if limits:
            yield "limits", limits, ""
        if said:
            yield "forecast", said, "other options in --slurm or --submit" if is_refused else ""
    elif facts.scheduler:
        yield "scheduler", "%s is there: a login node, perhaps" % facts.scheduler, ""


# -- completion -------------------------------------------------------------------------------------------------------

# What a shell runs: it asks us for what may come next, behind the words that are typed so far.
COMPLETIONS = {
    "bash": """_rjupyter() {
    local IFS=$'\\n'
    COMPREPLY=($("$1" completion line "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY-} != *.ipynb ]] || compopt -o filenames
    [[ ${COMPREPLY-} != / ]] || { COMPREPLY=(); compopt -o default; }
}
complete -F _rjupyter rjupyter rjupyter.py
""",
    "zsh": """#compdef rjupyter rjupyter.py
_rjupyter() {
    local -a found=("${(@f)$("${words[1]}" completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ "$found[1]" == / ]]; then _files; elif [[ -n "$found[1]" ]]; then compadd -a found; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _rjupyter rjupyter rjupyter.py
""",
    "fish": """function __rjupyter
    set -l typed (commandline -opc)
    set -l found ($typed[1] completion words $typed[2..-1] (commandline -ct) 2>/dev/null)
    test "$found[1]" = / && __fish_complete_path (commandline -ct) || printf '%s\\n' $found
end
complete -f -c rjupyter -c rjupyter.py -a '(__rjupyter)'
""",
}


def run_completion(args: Args, agent: Agent, messages: Messages) -> int:
    """Print what makes a shell complete our command lines."""
    messages.line(COMPLETIONS[args.shell].rstrip())
    return EXIT_OK


def words_of_line(line: str) -> List[str]:
    """Return the words of a line that is being typed, for a shell: a quote may still be open; the last may be empty."""
    for end in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            return shlex.split(line + end) + [""] * (not end and line[-1:].isspace())
    return []


def candidates(words: List[str]) -> List[str]:
    """Return what the last word may become: a host, an action, an option, an id of the last `list`, a value.

    A slash alone asks the shell for the names of files.
    """
    *typed, current = words or [""]
    line = CommandLine(typed)
    own = OPTIONS_OF.get(line.action, [])
    known = by_flag([*(OPTIONS["output"] if line.action else EVERY_OPTION), *own])
    ids = kept_here().hosts.get(line.destination.partition(":")[0], [])
    last = known.get(typed[-1]) if typed else None
    is_value = bool(last and last.metavar)
    takes = last if is_value else next((row for row in own if not row.flags), None)
    if current.startswith("-") and not is_value:
        found = [flag for flag in known if flag.startswith("--")]
    elif takes and (takes.metavar in ("FILE", "KEY") or takes.key in ("along", "notebooks")):
        names = glob.glob(glob.escape(current) + "*.ipynb") if takes.key == "notebooks" else []
        return sorted(names) or ["/"]
    elif takes:
        found = ids if takes.metavar == "ID" else list(takes.choices)
    elif not line.destination:
        found = [name for name in ACTIONS if name and ACTIONS[name].alone] + ssh_hosts(line)
    else:
        found = [name for name in ACTIONS if name and not (ACTIONS[name].alone and name != "close")]
        found = [] if line.action else found
    return sorted({word for word in found if word.startswith(current)})


def ssh_hosts(line: CommandLine) -> List[str]:
    """Return the names that ssh's configuration has, with those of the files that it includes (ssh_config(5))."""
    config = [typed.value for typed in line.before if typed.flag == "-F" and typed.value]
    paths = config[-1:] or [os.path.expanduser("~/.ssh/config")]
    found: List[str] = []
    for path in paths:  # which grows
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
            for text in stream:
                key, *names = [word.strip('"') for word in re.split(r"[\s=]+", text.strip())]
                if key.lower() == "host":
                    found += [name for name in names if name and not set(name) & set("*?!")]
                for name in names if key.lower() == "include" else ():
                    pattern = os.path.join(os.path.expanduser("~/.ssh"), os.path.expanduser(name))
                    paths += set(glob.glob(pattern)) - set(paths)
    return found


def ids_path() -> str:
    """Return where the ids of the last `list` of each host are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "rjupyter", "ids.json")


class KeptHere(Record):
    """The ids of the last `list` of each host, which complete a command line, and what executions bring: ids.json."""

    hosts: "Dict[str, List[str]]" = {}
    brings: "Dict[str, List[str]]" = {}
    batches: "Dict[str, str]" = {}  # what tells those executions from others that a command has begun and not ended


KEPT_MAX = 100  # of each, those that came last


def kept_here() -> KeptHere:
    """Return what is kept here."""
    return read_record(KeptHere, ids_path()) or KeptHere()


def keep_here(name: str, key: str, value: Any) -> None:
    """Keep one more, or none any more, where there is a place."""
    kept = kept_here()
    others = [pair for pair in getattr(kept, name).items() if pair[0] != key]
    rows = [*others, *([] if value is None else [(key, value)])][-KEPT_MAX:]
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(ids_path()), 0o700, exist_ok=True)
        write_whole(ids_path(), json.dumps(kept.but(**{name: dict(rows)}).facts()))


# -- config -----------------------------------------------------------------------------------------------------------


def run_config(args: Args, agent: Agent, messages: Messages) -> int:
    """Show every option that holds for the destination, and where its value is from."""
    rows: Dict[str, Json] = {}
    for option in EVERY_OPTION:
        if option.name and hasattr(args, option.key):
            source = args.sources.get(option.key, "default")
            rows.setdefault(option.key, {"option": option.name, "value": getattr(args, option.key), "source": source})
    print_rows("option", list(rows.values()), messages)
    return EXIT_OK


# -- actions and main -------------------------------------------------------------------------------------------------


class Action(NamedTuple):
    """A row of ACTIONS: what does it, and its line in the help."""

    run: Callable[[Args, Agent, Messages], int]
    usage: str = ""
    help: str = ""
    alone: bool = False  # it needs no host


ACTIONS: Dict[Optional[str], Action] = {
    None: Action(run_open),
    "execute": Action(run_execute, "execute NOTEBOOK ...", "run notebooks there and bring results back"),
    "list": Action(run_list, "list [--kernels] [--all]", "list your servers there, or their kernels"),
    "wait": Action(run_wait, "wait [NOTEBOOK] [--timeout S]", "wait until a kernel is idle"),
    "logs": Action(run_logs, "logs [ID] [-f]", "print the log of a server, job or execution"),
    "output": Action(run_output, "output [NOTEBOOK] [-f] [--save]", "print what the cells of a notebook printed"),
    "eval": Action(run_eval, "eval [-k NOTEBOOK] CODE", "run code in a live kernel"),
    "stop": Action(run_stop, "stop [ID ...] [--all] [--yes]", "end servers on the host"),
    "close": Action(run_close, "close [--all]", "close the tunnels that are in the background", alone=True),
    "tunnels": Action(run_tunnels, "tunnels", "list the tunnels that are up here", alone=True),
    "completion": Action(run_completion, "completion SHELL", "print what makes Tab complete in a shell", alone=True),
    "doctor": Action(run_doctor, "doctor", "check every step, and say what is wrong"),
    "config": Action(run_config, "config", "show the defaults that apply to the host"),
}
FOLLOW = Option("-f", "follow it, until Ctrl-C", key="is_followed")
OPTIONS_OF: Dict[str, List[Option]] = {}
OPTIONS_OF["execute"] = [
    Option("NOTEBOOK", "one on this machine, or :NAME on the host", key="notebooks", many="*"),
    Option("-o --output FILE", "where the result goes (NOTEBOOK.executed.ipynb)", _text),
    Option("--inplace", "replace the notebook by the result"),
    Option("-p NAME=VALUE", "set a variable; the value is JSON, or text; repeatable", _pair, [], key="parameters"),
    Option("--parameters-file FILE", "set those in a JSON or YAML file; repeatable", _text, []),
    Option("--with PATH", "send this file or directory along; repeatable", _text, [], key="along"),
    Option("--bring GLOB", "bring back what it writes: `out/*.png`; repeatable", _pattern, []),
    Option("--force", "let what is brought back replace what is here"),
    Option("--grid NAME=[...]", "run it once for each combination of such values", _grid, []),
    Option("-j N", "run this many at the same time", _number("a number", 999), 0, key="at_once"),
    Option("--kernel NAME", "kernel to use (the notebook's)", default=""),
    Option("--timeout S", "how long one notebook may take (no limit)", _duration_s, 0),
    Option("--cell-timeout S", "how long one cell may take (no limit)", _duration_s, 0),
    Option("--allow-errors", "go on after a cell that failed, as nbconvert does", key="allows_errors"),
    Option("--attach ID", "follow this run again, and bring its result", _text, key="run_id"),
    Option("--show-output", "print what its cells print, as they print it"),
    Option("--overlap", "run it even if it is running already", key="overlaps"),
]
OPTIONS_OF["list"] = [
    Option("--kernels", "list kernels: their notebook, state, memory"),
    Option("--all", "also list executions that have finished"),
]
OPTIONS_OF["wait"] = [
    Option("NOTEBOOK", "a notebook or kernel (the only one)", default="", key="name", many="?"),
    Option("--timeout S", "how long to wait (no limit)", _duration_s, 0),
]
OPTIONS_OF["logs"] = [
    Option("ID", "a server, job or execution (the newest server)", str, "", key="id", many="?"),
    FOLLOW,
]
OPTIONS_OF["output"] = [
    Option("NOTEBOOK", "a notebook or kernel (the newest)", default="", key="name", many="?"),
    FOLLOW,
    Option("--save", "save it into the notebook on the host"),
    Option("--since TIME", "only what ended since 14:02, 2026-11-26, or 2h ago", _moment, 0.0),
]
OPTIONS_OF["eval"] = [
    Option("CODE", "the code to run; - reads it from stdin", key="code", many="?"),
    Option("-k NOTEBOOK", "in the kernel of this notebook, or with this id", default="", key="name"),
    Option("--timeout S", "how long to wait for it (no limit)", _duration_s, 0),
    Option("--save-images DIR", "write displays that are no text into this directory", _text),
    Option("--interrupt", "interrupt what it runs"),
]
OPTIONS_OF["stop"] = [
    Option("ID", "what to end: an id, or a notebook for its kernel alone", key="ids", many="*"),
    Option("--all", "end all of yours there", key="is_all"),
    Option("--yes", "do not ask, even if a kernel is busy"),
]
OPTIONS_OF["close"] = [Option("--all", "close those to all hosts")]
OPTIONS_OF["completion"] = [Option("SHELL", "bash, zsh or fish", key="shell", choices=list(COMPLETIONS))]
# For the help of an action. What stands behind a wide gap is a remark.
EXAMPLES = {
    "execute": [
        "gpu1:work execute train.ipynb -p epochs=20",
        "gpu1:work execute :train.ipynb            one that is there",
        "gpu1 execute train.ipynb --grid 'lr=[0.1, 0.01]' -j 2",
        "gpu1 execute --attach r5d98               follow it again",
    ],
    "list": ["gpu1 list", "gpu1,gpu2 list             several hosts at the same time", "gpu1 list --kernels"],
    "wait": ["gpu1 wait train.ipynb && notify-send done", "gpu1 wait --timeout 2h"],
    "logs": ["gpu1 logs -f", "gpu1 logs r5d98            what the cells of an execution print"],
    "output": ["gpu1 output train.ipynb -f", "gpu1 output train.ipynb --save      into the notebook there"],
    "eval": ['gpu1 eval -k train.ipynb "model.evaluate(test)"', "gpu1 eval - <script.py"],
    "stop": ["gpu1 stop", "gpu1 stop 07af r5d98", "gpu1 stop train.ipynb      only its kernel"],
    "doctor": ["gpu1 doctor", '--slurm "-t 5" login doctor'],
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
                signal.signal(getattr(signal, name), Signals.take)
        sys.unraisablehook = Signals.keep
        return carry_out(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Terminated as terminated:
        return 128 + terminated.signum


def carry_out(words: List[str]) -> int:
    """Do what a command line says, and return the exit status; a failure is told."""
    messages = Messages(as_json="--json" in words)  # until they are read
    args: Optional[Args] = None
    try:
        if words[:2] in (["completion", "words"], ["completion", "line"]):  # that is none yet: not for the parser
            words = words[2:] if words[1] == "words" else words_of_line(words[2])[1:]
            messages.line("".join(word + "\n" for word in candidates(words)), end="")
            return EXIT_OK
        line = CommandLine(words)
        topic = line.topic()
        if topic is not None:
            messages.line(help_text(topic), end="")
            return EXIT_OK
        args = Args(line)
        messages = Messages(args.quiet, args.verbose, args.json)
        messages.ends_with_reader = args.action in ("logs", "output")
        is_mux = os.name == "posix" and not args.no_mux
        ssh = Ssh(args.host, args.ssh, can_ask(), messages, is_mux)
        ssh.further = args.further
        agent = Agent(ssh, messages, args.state_dir or "")
        agent.redials = not args.no_reconnect
        agent.greets_after_s = 0.0 if args.action in (None, "execute") or args.verbose else SLOW_LOGIN_S
        try:
            return ACTIONS[args.action].run(args, agent, messages)
        finally:
            agent.ssh.close()  # it may be another one
            agent.port.close()
    except KeyboardInterrupt:
        if not getattr(args, "is_followed", False):
            raise
        messages.end_line()
        return EXIT_OK  # of what -f follows, it is the end
    except (Failure, OSError, MemoryError) as error:
        failure = error if isinstance(error, Failure) else Failure("this machine refused", str(error) or "no memory")
        if args and failure.try_.startswith("rjupyter HOST "):  # the host's advice, as it is typed here
            advice, gap, remark = failure.try_.partition("   ")
            failure.try_ = args.again(*advice.split()[2:]) + gap + remark
        name = args.host.rpartition("@")[2] if args else ""
        is_unknown = name and "resolve hostname %s:" % name.lower() in failure.why  # and not a jump host on the way
        if args and is_unknown and args.action not in ("stop", "execute", "eval"):  # those are not for a guess
            near = nearest(name, ssh_hosts(args.line))
            host = args.host[: -len(name)] + near
            right = args.line.words(args.line.destination.replace(args.host, host, 1), args.line.action)
            failure.try_ = command_line(*right) if near not in ("", name) else failure.try_
        messages.failure(failure)
        if (args.gateway if args else "--gateway" in words) and not messages.as_json:
            messages.line("false")  # eval "$(...)" && jupyter lab: no kernels here, where there are none there
        return failure.status


def command() -> NoReturn:
    """Run the program, and leave at once: to take the interpreter apart first takes 5 ms, and nobody needs it."""
    if sys.version_info < (3, 8):
        sys.exit("rjupyter needs Python 3.8 or newer on this side; this is %s" % sys.version.split()[0])
    # What was closed as we were started (>&-) is opened, or the next file would get its number. What is said on a
    # stderr that is closed is lost; a result on a closed stdout is an error when it is written.
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # Windows' has no UTF-8 in a file
    try:
        status = main()
        Signals.depth += 1  # to the end: nobody is left to take one
    except (KeyboardInterrupt, Terminated):  # one more, as the first was answered
        status = EXIT_INTERRUPTED
    os._exit(status)  # all that was written is flushed


if __name__ == "__main__":
    command()
