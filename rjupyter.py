#!/usr/bin/env python3
"""Put the Jupyter of a remote host into the browser in front of you, over SSH.

    laptop                                              HOST
    rjupyter.py ---- ssh -M -N (one login) -----------> sshd
        |  ssh -S socket HOST  <agent on stdin> ------> agent (python3) -> finds a port, launches, replies one line
        |                                                  `-- jupyter notebook, detached, on 127.0.0.1:8888
    browser -> 127.0.0.1:8889 == -L through the same ssh ==> 127.0.0.1:8888

    rjupyter.py gpu1                       open Jupyter on gpu1; the same line comes back to it tomorrow
    rjupyter.py --lab gpu1:work            JupyterLab in ~/work on gpu1
    rjupyter.py gpu1:work/train.ipynb      open this notebook
    rjupyter.py gpu1 execute train.ipynb   run it to its end there, and bring the result
    rjupyter.py gpu1 list                  the servers there
    rjupyter.py gpu1 stop                  end the server

What runs on the host outlives this program; `stop` ends it.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: a Ctrl-C among the imports leaves no traceback

import argparse
import contextlib
import errno
import itertools
import json
import os
import queue
import re
import shlex
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, TextIO, Tuple
from urllib.parse import quote, unquote

if sys.version_info < (3, 8):
    sys.exit("rjupyter needs Python 3.8 or newer on this side; this is %s" % sys.version.split()[0])

__version__ = "0.1.0"

# ---------------------------------------------------------------------------------------------------------------------
# constants
#
# Every number and every name that someone may want to change.
# ---------------------------------------------------------------------------------------------------------------------

LOCAL_PORT = 8889  # the first one tried here: not 8888, where a local Jupyter may sit
CONNECT_TIMEOUT_S = 15
BATCH_LOGIN_TIMEOUT_S = 120  # sshd's own LoginGraceTime
START_TIMEOUT_S = 120
SILENCE_TIMEOUT_S = 45  # the agent says something every few seconds while it works
CONTROL_TIMEOUT_S = 15  # for `ssh -O`, which only talks to our own master
CLOSING_TIMEOUT_S = 2  # for sshd to notice that a session of ours has ended, where it allows one (MaxSessions)
ANSWER_TIMEOUT_S = 30  # for Jupyter's answer through the tunnel
PROBE_EVERY_S = 10
PROBE_TIMEOUT_S = 10
CHECK_TIMEOUT_S = 15  # for the host's word on whether the server runs
REDIAL_MAX_S = 30.0  # the longest pause between two attempts to connect again
DENIALS_MAX = 3  # unattended logins that may be refused before we give up
WARN_BEFORE_END_S = 600  # of the time limit of a server's job
BROWSER_TIMEOUT_S = 120  # how long the one-time redirect waits for the browser
SSH_SOCKET_SUFFIX = 17  # bytes that ssh adds to the control path while it binds (OpenSSH mux.c)

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_NO_JUPYTER = 3
EXIT_SERVER_ENDED = 4
EXIT_CELL_FAILED = 5
EXIT_TIMEOUT = 6
EXIT_INTERRUPTED = 130
EXIT_SSH = 255

Json = Dict[str, Any]

APP_NAMES = {"notebook": "Jupyter Notebook", "lab": "JupyterLab"}

# ---------------------------------------------------------------------------------------------------------------------
# failures
#
# What is expected to go wrong is raised as a Failure, anywhere, and caught once, in main. Any other exception is a bug.
# ---------------------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """An expected failure: `what` went wrong, `why`, what to `try_`, and the exit status that says so."""

    def __init__(self, what: str, why: str = "", try_: str = "", status: int = EXIT_FAILURE) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.try_ = try_
        self.status = status


class SessionRefused(Failure):
    """sshd opens no session: it allows none (MaxSessions), or not yet another one."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; like KeyboardInterrupt it must pass every `except Exception`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


# ---------------------------------------------------------------------------------------------------------------------
# messages
#
# Everything a person reads passes here. stdout carries the result and nothing else; the steps, the spinner and the
# errors go to stderr. Text from the host is data: control characters are taken out before it reaches a terminal.
# ---------------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return `text` without control characters, so that it cannot drive the terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text.replace("\r\n", "\n"))


def command_line(*arguments: str) -> str:
    """Return a command of ours as a person would type it: under the name it was called by, quoted for a shell."""
    return " ".join([os.path.basename(sys.argv[0]) or "rjupyter.py"] + [shlex.quote(a) for a in arguments])


class Messages:
    """The voice of the program: steps, details, results and failures, each in its place.

    `quiet` leaves failures and results; `verbose` adds details; `as_json` turns stdout into one object per line.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.as_json = as_json
        self.is_terminal = sys.stderr.isatty()
        can_move = self.is_terminal and os.environ.get("TERM") != "dumb"
        self.has_colour = can_move and "NO_COLOR" not in os.environ
        self.has_spinner = can_move and not quiet
        self._lock = threading.Lock()
        self._transient = ""

    def step(self, text: str, event: str, **facts: Any) -> None:
        """Say that a step is done: one line on stderr, and with --json one object on stdout."""
        if not self.quiet:
            self._write(sys.stderr, text)
        if self.as_json:
            self._write_json(event, facts)

    def result(self, text: str, event: str, **facts: Any) -> None:
        """Print what was asked for on stdout: the text, or with --json one object."""
        if self.as_json:
            self._write_json(event, facts)
        else:
            self._write(sys.stdout, text)

    def note(self, text: str) -> None:
        """Say something that the user should know and that is not a step."""
        if not self.quiet:
            self._write(sys.stderr, text)

    def detail(self, text: str) -> None:
        """Say something that only -v asks for."""
        if self.verbose:
            self._write(sys.stderr, text)

    def end_line(self) -> None:
        """Leave the line on which the terminal showed ^C."""
        if self.is_terminal and not self.quiet:
            self._write(sys.stderr, "")

    def failure(self, failure: Failure) -> None:
        """Print an error as what, why, try; long reasons are indented under their label."""
        name = "\033[31mrjupyter:\033[0m" if self.has_colour else "rjupyter:"
        text = "%s %s" % (name, printable(failure.what))
        for label, words in (("why", failure.why), ("try", failure.try_)):
            lines = printable(words).splitlines()
            text += "".join("\n  %s%s" % ("     " if i else label + ": ", line) for i, line in enumerate(lines))
        self._write(sys.stderr, text, is_clean=True)
        if self.as_json:
            facts = {"what": failure.what, "why": failure.why, "try": failure.try_, "status": failure.status}
            self._write_json("failure", facts)

    @contextlib.contextmanager
    def working(self, text: str, is_animated: bool = True) -> Iterator[Callable[[str], None]]:
        """Show that a step runs, from its first second on: a spinner with the elapsed time, elsewhere one plain line.

        Yields a function that adds a word on where the step stands. Without `is_animated` the terminal keeps still,
        because ssh may be asking a question there. Without a text, nothing is shown.
        """
        if not text:
            yield lambda words: None
            return
        began = time.monotonic()
        done = threading.Event()
        where = [""]

        def show() -> None:
            delay_s = 0.0 if self.has_spinner and not is_animated else 1.0
            if done.wait(delay_s) or self.quiet:
                return
            if not self.has_spinner:
                self._write(sys.stderr, text + "...")
            elif not is_animated:
                self._show_transient(text + "... ")
            while self.has_spinner and is_animated:
                frame = "|/-\\"[int((time.monotonic() - began) * 5) % 4]
                state = " (%s)" % where[0] if where[0] else ""
                self._show_transient("%s %s%s  %d s " % (frame, text, state, time.monotonic() - began))
                if done.wait(0.2):
                    return

        ticker = threading.Thread(target=show, daemon=True)
        ticker.start()
        try:
            yield lambda words: where.__setitem__(0, words)
        finally:
            done.set()
            ticker.join()
            self._show_transient("")

    def _show_transient(self, text: str) -> None:
        with self._lock:
            if text or self._transient:
                width = max(20, _terminal_width() - 1)
                sys.stderr.write("\r\033[K" + printable(text)[:width])
                sys.stderr.flush()
            self._transient = text

    def _write(self, stream: TextIO, text: str, is_clean: bool = False) -> None:
        with self._lock:
            if self._transient:
                sys.stderr.write("\r\033[K")
                sys.stderr.flush()
                self._transient = ""
            with contextlib.suppress(OSError):  # a closed pipe, a terminal that is gone
                stream.write((text if is_clean else printable(text)) + "\n")
                stream.flush()

    def _write_json(self, event: str, facts: Dict[str, Any]) -> None:
        self._write(sys.stdout, json.dumps(dict({"event": event}, **facts)))


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def has_terminal() -> bool:
    """True when someone could answer a question here: there is a controlling terminal."""
    if os.name != "posix":
        return sys.stdin.isatty()
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def can_ask() -> bool:
    """True when ssh can put a question to someone: on the terminal, or by the askpass program that the user chose."""
    return has_terminal() or bool(os.environ.get("SSH_ASKPASS"))


def _duration(seconds: Any) -> str:
    """Return a duration as people say it, in its largest unit; empty for what is no number."""
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e10:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return "%d %s" % (seconds // size, unit)
    return "%d s" % seconds


def says_yes(question: str) -> bool:
    """Ask on the terminal, wherever stdin and stdout lead."""
    with open("/dev/tty", "w") as output, open("/dev/tty") as terminal:
        output.write(question)
        output.flush()
        return terminal.readline().strip().lower() in ("y", "yes")


# ---------------------------------------------------------------------------------------------------------------------
# ssh
#
# One class makes every ssh argv and owns the control socket; nothing below this room names an ssh option. ssh itself
# keeps everything about connections: host keys, passwords, second factors, jump hosts, ~/.ssh/config.
# ---------------------------------------------------------------------------------------------------------------------

# On every call: no agent and no X11 on the way to a shared host, and nothing of the user's config that would replace
# or break a command of ours (RemoteCommand ends in "Cannot execute command-line and remote command").
ALWAYS = ["-o", "RemoteCommand=none", "-a", "-x", "-T", "-o", "ControlPersist=no"]

# ssh words that come just before ssh gives up. They are kept for our own error; all other lines pass at once, because
# a banner or the text of a second factor must be read before the prompt that follows it.
FATAL_WORDS = re.compile(
    r"ssh: |ssh_|kex_|mux|unix_listener|bind |channel|Could not request|@@@|.*Permission denied \(|Host key|Timeout,"
    r"|Connection (closed|reset|timed out)|Received disconnect|Disconnected from|Someone could be|It is also possible"
    r"|The fingerprint for|Please contact your|Add correct host|Offending|remove with|  ssh-keygen|Bad |command-line"
    r"|Unsupported option|.*terminating|client_loop|Too many auth|Unable to negotiate|no matching|Their offer|SHA256:"
    r"|Password authentication is disabled|.* host key for .* has changed|You have requested strict|stdio forwarding"
    r"|Keyboard-interactive authentication is"
)


@contextlib.contextmanager
def signals_left_to_us() -> Iterator[None]:
    """Start children under this: Ctrl-C and a closed terminal reach the whole group, but we end our children.

    They are born with these signals blocked. One that comes meanwhile, SIGTERM too, is raised at the end: no child is
    started and then forgotten.
    """
    if os.name != "posix":
        yield
        return
    caught: List[int] = []
    signums = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM]
    handlers = [signal.signal(signum, lambda number, frame: caught.append(number)) for signum in signums]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signums[:2])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in zip(signums, handlers):
            signal.signal(signum, handler)
        if caught:
            signal.raise_signal(caught[0])


class Child:
    """A child process whose output arrives line by line, in one queue, as ("stdout" or "stderr", text).

    When it `is_merged`, both streams are one, in the order in which the child wrote. Without `can_ask` it has neither
    a terminal nor an askpass program: BatchMode does not reach the ssh to a jump host, this does.
    """

    def __init__(
        self, argv: List[str], stdin: Any = subprocess.DEVNULL, is_merged: bool = False, can_ask: bool = True
    ) -> None:
        with signals_left_to_us():
            self.process = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if is_merged else subprocess.PIPE,
                start_new_session=not can_ask,
                env=None if can_ask else dict(os.environ, SSH_ASKPASS_REQUIRE="never", SSH_ASKPASS=""),
            )
        self._lines: "queue.Queue[Optional[Tuple[str, str]]]" = queue.Queue()
        self._open_streams = 0
        for name, stream in (("stdout", self.process.stdout), ("stderr", self.process.stderr)):
            if stream is not None:
                self._open_streams += 1
                threading.Thread(target=self._read, args=(name, stream), daemon=True).start()

    def _read(self, name: str, stream: Any) -> None:
        with stream:
            for line in stream:
                self._lines.put((name, line.decode("utf-8", "replace").rstrip("\r\n")))
        self._lines.put(None)

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
        return self._open_streams == 0 or self.process.poll() is not None

    def send(self, data: bytes, is_last: bool = True) -> None:
        """Give the child its stdin, the last of it or not; a child that is gone shows in its status, not here."""
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(data)
            stdin.flush()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if is_last:
                stdin.close()

    def end(self) -> None:
        """Terminate the child and reap it; kill it when it does not go within two seconds."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Ssh:
    """The connection to one destination: makes every ssh argv, owns the control socket and the master behind it.

    `options` are the user's own, passed on as they are. `can_ask` is False where nobody could answer a question.
    Without `has_mux` each step is a connection of its own, and the tunnel is `ssh -N -L`. Where the user's own config
    has a live master for this destination, that one is used.
    """

    def __init__(
        self, destination: str, options: List[str], can_ask: bool, messages: Messages, has_mux: bool = True
    ) -> None:
        self.destination = destination
        self.options = options
        self.can_ask = can_ask
        self.messages = messages
        self.always = ALWAYS
        self.has_mux = has_mux
        self.control_path = ""  # empty: no multiplexing
        self.further: List[str] = []  # forwards beside the one to Jupyter, as -L writes them
        self.is_borrowed = False  # the user's own master, which was there before us and stays
        self.needs_login = False  # the last failure was a login that was refused
        self.is_refused = False  # the last failure was the host's key: nothing to try again
        self.master: Optional[Child] = None  # the connection's process: the master, or without one `ssh -N -L`
        self.meanwhile: Callable[[], None] = lambda: None  # what there is to do while ssh logs in
        self._config: Dict[str, str] = {}
        self._forwards: List[str] = []
        self._guard: Optional[subprocess.Popen] = None  # type: ignore[type-arg]
        self._last_words: List[str] = []
        self._is_woken = threading.Event()
        self._is_again = False

    # -- argv ---------------------------------------------------------------------------------------------------------

    def config_argv(self) -> List[str]:
        """Return the argv that asks ssh what its configuration says of this destination."""
        return ["ssh", "-G"] + self.always + self.options + ["--", self.destination]

    def master_argv(self) -> List[str]:
        """Return the argv of the foreground `ssh -M -N`."""
        # ClearAllForwardings: the user's own LocalForward must not stop us. Only here: on a call that carries -L it
        # drops that -L in silence.
        argv = ["ssh", "-M", "-N", "-S", self.control_path, "-o", "ClearAllForwardings=yes"] + self._patience()
        return argv + self.always + self.options + ["--", self.destination]

    def tunnel_argv(self, spec: str, ready: str) -> List[str]:
        """Return the argv of the tunnel without a master; ssh prints `ready` when it has logged in and listens."""
        argv = ["ssh", "-N", *local_forwards([spec, *self.further]), "-S", "none", "-o", "ControlMaster=no"]
        argv += self._patience()
        argv += ["-o", "PermitLocalCommand=yes", "-o", "LocalCommand=echo " + ready, "-o", "ExitOnForwardFailure=no"]
        return argv + self.always + self.options + ["--", self.destination]

    def session_argv(self, *specific: str, command: str = "") -> List[str]:
        """Return the argv of a session: through the master, or with a login of its own where there is none.

        When the master refuses the session, ssh would quietly log in again: ProxyCommand=false leaves it no way.
        """
        argv = ["ssh", "-S", self.control_path or "none", "-o", "ControlMaster=no", "-o", "ClearAllForwardings=yes"]
        options = self.options
        if self.control_path:
            argv += ["-o", "ProxyCommand=false", "-o", "BatchMode=yes"]
            options = [word for option in _pairs(options) if option[0] != "-J" for word in option]
        else:
            argv += self._patience()
        return argv + self.always + options + list(specific) + ["--", self.destination] + ([command] if command else [])

    def control_argv(self, action: str, *specific: str) -> List[str]:
        """Return the argv of an `ssh -O`; without the user's config, whose forwards -O would send or cancel as well."""
        argv = ["ssh", "-F", "/dev/null", "-S", self.control_path, "-O", action]
        return argv + list(specific) + ["--", self.destination]

    def _patience(self) -> List[str]:
        """Return the options that let ssh notice a dead link, unless the user's config has its own; and BatchMode."""
        argv = []
        if self._config.get("serveraliveinterval", "0") == "0":
            argv += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]
        if self._config.get("connecttimeout", "none") in ("none", "0"):
            argv += ["-o", "ConnectTimeout=%d" % CONNECT_TIMEOUT_S]
        return argv if self.can_ask else argv + ["-o", "BatchMode=yes"]

    # -- the connection -----------------------------------------------------------------------------------------------

    def connect(self, is_again: bool = False) -> None:
        """Log in, once: start the master in the foreground, and wait until it has.

        Its control socket appears, in one piece, when authentication is done. Raises Failure (255) when ssh gives up.
        Silent when it `is_again`. Where there can be no master, each later step logs in by itself.
        """
        self._config = self._read_config()
        self._is_woken.clear()
        self._is_again = is_again
        if not self.has_mux or self._borrow_master():
            return
        try:
            directory = private_runtime_dir()
        except Failure as failure:
            self._do_without_master("%s: %s" % (failure.what, failure.why))
            return
        remove_stale_sockets(directory)
        self.control_path = os.path.join(directory, "%x.ctl" % os.getpid())
        try:
            self._start(
                self.master_argv(), "Connecting to " + self.destination, lambda line: os.path.exists(self.control_path)
            )
        except Failure:
            # It had logged in, and could not listen (no Unix sockets there, or as on Windows none at all).
            words = [line for line in self._last_words if line.startswith(("unix_listener", "muxserver_listen"))]
            if not words:
                raise
            self.close()
            self._do_without_master(words[-1])

    def reconnect(self, why: str, resume: Callable[[], bool], **facts: Any) -> None:
        """Connect again, at once and then after growing delays, until `resume` says that all goes on.

        Nobody is asked: only when ssh says that it needs a login, and there is a terminal, one line offers it. Raises
        the Failure that ends it: the server has ended (4), or the host lets nobody in (255).
        """
        text = "The connection to %s is lost (%s). Trying again." % (self.destination, why)
        self.messages.step(text, "lost", why=why, **facts)
        began = time.monotonic()
        could_ask = self.can_ask
        self.can_ask = False
        denials = 0
        delay_s = 0.0
        while True:
            try:
                is_shown = self.messages.has_spinner and not self.can_ask  # else ssh asks there
                with self.messages.working("Trying to reach " + self.destination if is_shown else ""):
                    self.close()
                    time.sleep(delay_s)
                    delay_s = min(REDIAL_MAX_S, max(1.0, 2 * delay_s))
                    self.connect(is_again=True)
                    if resume():
                        break
            except Failure as failure:
                if failure.status == EXIT_SERVER_ENDED or self.is_refused:
                    raise
                self.messages.detail("%s: %s" % (failure.what, failure.why))
                denials += self.needs_login
                if denials >= DENIALS_MAX or (self.needs_login and self.can_ask):
                    raise
                if self.needs_login and has_terminal():
                    self._offer_login()
                    delay_s = 0.0
        self.can_ask = could_ask
        seconds = time.monotonic() - began
        text = "Connected to %s again (after %s)." % (self.destination, _duration(seconds))
        self.messages.step(text, "reconnected", seconds=seconds, **facts)

    def quicken(self) -> None:
        """Run a session that does nothing: before its first session on a connection, sshd holds small packets back.

        Each answer through a forward is then 40 ms late (TCP_NODELAY, set in session.c; measured, OpenSSH 9.2).
        """
        if self.control_path:
            self._run(self.session_argv(command="true"))

    def _offer_login(self) -> None:
        """Wait for the Enter of a person who can log in; the next attempt may ask, once."""
        with open("/dev/tty", "w") as output, open("/dev/tty") as terminal:
            output.write("%s wants a login. Press Enter to log in again: " % self.destination)
            output.flush()
            terminal.readline()
        self.can_ask = True

    def version(self) -> str:
        """Return what ssh calls itself; raises Failure when there is none."""
        status, _, words = run_command(["ssh", "-V"], CONTROL_TIMEOUT_S)
        if status:
            raise Failure("no ssh on this machine", words.strip(), "install OpenSSH's client")
        return words.strip()

    def _borrow_master(self) -> bool:
        """Use the user's own live master for this destination, if there is one: no login is needed at all."""
        if self._config.get("controlpath", "none") == "none":
            return False
        argv = ["ssh", "-O", "check"] + self.always + self.options + ["--", self.destination]
        is_alive, _ = self._run(argv)
        if is_alive:
            self.control_path = self._config["controlpath"]
            self.is_borrowed = True
            self.messages.detail("Using the master of your own at %s." % self.control_path)
        return is_alive

    def _do_without_master(self, why: str) -> None:
        self.messages.note("No multiplexing (%s): each step logs in by itself." % why)
        self.has_mux = False
        self.control_path = ""

    def _start(self, argv: List[str], doing: str, is_ready: Callable[[str], bool]) -> None:
        """Start the process that is the connection, and wait until it is ready; `is_ready` sees each line it prints.

        Raises Failure (255) when it ends before.
        """
        self._log_argv(argv)
        self._last_words = []
        self.needs_login = self.is_refused = False
        with signals_left_to_us():
            self._guard = start_guard('read pid; read _; kill "$pid"; kill -CONT "$pid"')
            if self._guard is None:
                self.master = Child(argv, is_merged=True, can_ask=self.can_ask)
            else:  # the guard knows its pid before it is ssh: there is no moment without
                argv = ["/bin/sh", "-c", 'echo $$ >&0; exec "$@" </dev/null', "sh", *argv]
                self.master = Child(argv, stdin=self._guard.stdin, is_merged=True, can_ask=self.can_ask)
        self.meanwhile()
        deadline = None if self.can_ask else time.monotonic() + BATCH_LOGIN_TIMEOUT_S
        with self.messages.working("" if self._is_again else doing, is_animated=not self.can_ask):
            while True:
                line = self.master.next_line(0.01)
                if is_ready(line[1] if line else ""):
                    return
                self._take_words(line, is_connected=self._is_again)
                if self.master.has_ended:
                    self._last_words += [text for _, text in self.master.remaining_lines()]
                    raise self.connect_failure(self._last_words)
                if deadline and time.monotonic() > deadline:
                    why = "no login within %d s" % BATCH_LOGIN_TIMEOUT_S
                    raise Failure("cannot connect to " + self.destination, why, self.plain_command, EXIT_TIMEOUT)

    def __enter__(self) -> "Ssh":
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _take_words(self, line: Optional[Tuple[str, str]], is_connected: bool) -> None:
        """Keep what the connection's ssh says for our own errors; the rest is for the user, before the login."""
        if not line or not line[1]:
            return
        if is_connected or FATAL_WORDS.match(line[1]):
            self._last_words = (self._last_words + [line[1]])[-30:]
            self.messages.detail("ssh: " + line[1])
        else:
            self.messages.note(line[1])

    def _read_config(self) -> Dict[str, str]:
        argv = self.config_argv()
        status, said, words = run_command(argv, CONTROL_TIMEOUT_S)
        if status == 127:
            raise Failure("no ssh on this machine", "there is no `ssh` on PATH", "install OpenSSH's client")
        if "bad configuration option: remotecommand" in words.lower() and self.always == ALWAYS:
            self.always = ALWAYS[2:]  # OpenSSH before 7.6: no such option, and nothing to turn off
            return self._read_config()
        if status:
            raise Failure("ssh does not take this", words.strip(), shlex.join(argv), EXIT_SSH)
        return dict(line.split(" ", 1) for line in said.splitlines() if " " in line)

    def connect_failure(self, words: List[str]) -> Failure:
        """Turn the last words of an ssh that did not log in into a Failure (255) with a cause and a remedy."""
        text = "\n".join(words)
        lines = [line for line in words if line.strip() and not line.startswith("@@@")]
        why = lines[-1].strip() if lines else "ssh ended and said nothing"
        try_ = self.plain_command
        host = self.destination.rsplit("@", 1)[-1]
        if self._config.get("proxyjump", "none") != "none":
            host += ", or of a jump host before it,"
        if "HOST IDENTIFICATION HAS CHANGED" in text or "has changed and you have requested" in text:
            self.is_refused = True
            why = "the host key of %s is not the one known here: a new installation, or someone in between" % host
            removal = [line.strip() for line in words if "ssh-keygen" in line] or [
                shlex.join(["ssh-keygen", "-R", self.destination.rsplit("@", 1)[-1]])
            ]
            try_ = "ask the host's administrator whether the key is new; if so:\n" + removal[0]
        elif "Host key verification failed" in text:
            self.is_refused = True
            why = "the host key of %s is not known here, and it was not accepted" % host
            try_ += "   (once, in a terminal: it shows the key and asks)"
        elif "Permission denied" in text:
            self.needs_login = True
            why = [line.strip() for line in words if "Permission denied" in line][-1]
            try_ = shlex.join(["ssh", "-v"] + self.options + [self.destination, "true"]) + "   (shows the keys offered)"
            if not self.can_ask:
                why += "\nthere is no terminal here to ask for a password or a second factor"
                try_ = "a key without a question: ssh-keygen, ssh-copy-id, ssh-agent"
        elif "Connection refused" in text:
            try_ += "   (is sshd running there, and is this its port?)"
        return Failure("cannot connect to " + self.destination, why, try_, EXIT_SSH)

    @property
    def plain_command(self) -> str:
        """The command that shows a person whether ssh itself gets there."""
        return shlex.join(["ssh"] + self.options + [self.destination, "true"])

    def _log_argv(self, argv: List[str]) -> None:
        self.messages.detail("+ " + shlex.join(argv))

    def wait(self, timeout_s: float) -> bool:
        """Wait for `timeout_s`, less when the connection ends or `wake` is called; return whether it still stands."""
        deadline = time.monotonic() + timeout_s
        while self._stands and not self._is_woken.is_set() and time.monotonic() < deadline:
            if self.master is not None:
                self._take_words(self.master.next_line(deadline - time.monotonic()), is_connected=True)
            else:
                self._is_woken.wait(min(0.2, deadline - time.monotonic()))
        self._is_woken.clear()
        if self.master is not None and not self._stands:
            for line in self.master.remaining_lines():  # it says why as it ends
                self._take_words(line, is_connected=True)
        return self._stands

    @property
    def _stands(self) -> bool:
        if self.master is not None:
            return not self.master.has_ended
        return not self.is_borrowed or os.path.exists(self.control_path)

    def wake(self) -> None:
        """Let `wait` return now; from any thread."""
        self._is_woken.set()
        if self.master is not None:
            self.master.wake()

    @property
    def last_words(self) -> str:
        """What the connection's ssh said last, in one line."""
        return self._last_words[-1] if self._last_words else "ssh ended and said nothing"

    def close(self) -> None:
        """End the connection, and with it every forward; a master that was not ours stays."""
        if self.is_borrowed:
            for spec in list(self._forwards):
                self.cancel(spec)
        if self.master is not None:
            self.master.end()
            self.master = None
            with contextlib.suppress(OSError):
                os.unlink(self.control_path)
        if self._guard is not None:  # to the last: a second Ctrl-C may come while ours is ended
            self._guard.kill()
            self._guard.wait()
            self._guard = None
        self._forwards = []
        self.is_borrowed = False
        self.control_path = ""

    # -- what goes through it -----------------------------------------------------------------------------------------

    def session(self, command: str) -> Child:
        """Run `command` on the host, through the master."""
        argv = self.session_argv(command=command)
        self._log_argv(argv)
        return Child(argv, stdin=subprocess.PIPE, can_ask=self.can_ask)

    def run(self, command: str) -> Tuple[bool, str]:
        """Run a short command on the host; return whether it succeeded, and what it printed."""
        return self._run(self.session_argv(command=command))

    def forward(self, local_port: int, target: str) -> Tuple[bool, str]:
        """Forward 127.0.0.1:`local_port` to `target`; return whether it listens, and ssh's words when it does not.

        The numeric 127.0.0.1 in front: without it, ssh takes ::1 alone when 127.0.0.1:PORT is a stranger's, and says
        that all is well. Without a master it raises Failure (255) when it cannot log in.
        """
        spec = "127.0.0.1:%d:%s" % (local_port, target)
        if not self.control_path:
            return self._start_tunnel(spec, local_port)
        is_open, words = self._run(self.control_argv("forward", "-L", spec))
        if is_open:
            self._forwards.append(spec)
            for further in self.further:
                self._expect_forward(further, *self._run(self.control_argv("forward", "-L", further)))
                self._forwards.append(further)
            if self.is_borrowed:
                self._guard = start_guard('read _; "$@"', *self.control_argv("cancel", *local_forwards(self._forwards)))
        return is_open, words

    def _expect_forward(self, spec: str, is_open: bool, words: str) -> None:
        if not is_open:
            raise Failure("cannot forward " + spec, words, "another port in -L")

    def _start_tunnel(self, spec: str, local_port: int) -> Tuple[bool, str]:
        # LocalCommand runs when the forwards are set up (OpenSSH ssh.c). ExitOnForwardFailure=no: with yes, a forward
        # of the user's own config that fails would end us as well.
        ready = "rjupyter-" + os.urandom(8).hex()
        self._start(self.tunnel_argv(spec, ready), "Opening the tunnel", lambda line: line == ready)
        words = "\n".join(self._last_words)
        if "cannot listen to port: %d" % local_port in words:
            self.close()
            return False, "forwarding request failed: " + words
        for further in self.further:
            is_open = "cannot listen to port: %s" % further.split(":")[1] not in words
            self._expect_forward(further, is_open, words)
        return True, ""

    def cancel(self, spec: str) -> None:
        """Take a local forward away again."""
        self._forwards.remove(spec)
        self._run(self.control_argv("cancel", "-L", spec))

    def can_reach(self, target: str) -> Tuple[bool, str]:
        """Ask sshd for one connection to `target` (host:port) there; return whether it came, and ssh's words.

        `-O forward` returns 0 although sshd forbids forwarding; `-W` fails at once (measured, OpenSSH 9.2).
        """
        self._last_words = []
        can_reach, words = self._run(self.session_argv("-W", target))
        if self.master is not None and not can_reach:
            self.wait(0.2)  # the reason is told to the master, not to the session
            words = next((line for line in reversed(self._last_words) if "open failed" in line), words)
        return can_reach, words

    def _run(self, argv: List[str]) -> Tuple[bool, str]:
        self._log_argv(argv)
        child = Child(argv, is_merged=True, can_ask=self.can_ask)
        try:
            words = [text for _, text in child.remaining_lines(CONTROL_TIMEOUT_S)]
            if not child.has_ended:
                return False, "no answer from ssh within %d s" % CONTROL_TIMEOUT_S
            return child.process.wait(CONTROL_TIMEOUT_S) == 0, "\n".join(words).strip()
        finally:
            child.end()


def local_forwards(specs: List[str]) -> List[str]:
    """Return the options of ssh for these local forwards."""
    return [word for spec in specs for word in ("-L", spec)]


def _pairs(options: List[str]) -> List[List[str]]:
    """Split ssh options into one list each; only -4, -6 and -C stand alone."""
    pairs: List[List[str]] = []
    words = iter(options)
    for word in words:
        pairs.append([word] if word in ("-4", "-6", "-C") else [word, next(words)])
    return pairs


def start_guard(script: str, *arguments: str) -> "Optional[subprocess.Popen[bytes]]":
    """Start a shell that runs `script` when this program is gone, however it went (kill -9 as well).

    The shell waits on a pipe whose other end only we hold.
    """
    if os.name != "posix":
        return None
    with signals_left_to_us():
        argv = ["/bin/sh", "-c", "exec 2>/dev/null; " + script, "sh", *arguments]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def private_runtime_dir() -> str:
    """Return our directory for sockets and tunnel records: ours alone (0700), its path short enough for a socket.

    Raises Failure when there is no such place.
    """
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


def record_dirs() -> List[str]:
    """Return the directories where a tunnel of ours may be written down: cron has no XDG_RUNTIME_DIR, a login has."""
    usual = os.environ.get("XDG_RUNTIME_DIR") or "/run/user/%d" % own_uid()
    found = []
    for path in (os.path.join(usual, "rjupyter"), own_tmp_dir()):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == own_uid():
                found.append(path)
    return found


def remove_stale_sockets(directory: str) -> None:
    """Remove the control sockets of runs that are gone: their name is the pid. Ours may be one with the same pid."""
    for name in os.listdir(directory):
        pid, _, ending = name.partition(".")
        if ending == "ctl" and (int(pid, 16) == os.getpid() or not process_identity(int(pid, 16))):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, name))


# ---------------------------------------------------------------------------------------------------------------------
# agent: what stands between "agent begins" and "agent ends", here and in two rooms below, is sent to the host
#
# It runs under the host's own python3, 3.6 or newer, with the standard library alone, and uses nothing else of this
# file. Annotations beyond the builtins are quoted, because Python 3.6 would evaluate them. What stands under "both
# sides" serves the laptop as well.
# ---------------------------------------------------------------------------------------------------------------------

AGENT_IMPORTS = "import contextlib, errno, json, os, socket, stat, struct, sys, time\n"
# agent begins

STATE_DIR = "~/.local/state/rjupyter"
VENV_DIR = "~/.local/share/rjupyter/venv"
KEEP_ENDED_S = 7 * 86400  # how long the log of a server that ended is kept
POLL_S = 0.005
COMMAND_TIMEOUT_S = 30  # for a command of the host's that takes no time, on a home that may be slow
HEARTBEAT_S = 5.0
SHELL_TIMEOUT_S = 10  # for the user's start-up files
DEFAULT_PORT = 8888  # the first one tried: Jupyter's own
SUN_PATH_MAX = 104  # bytes; the smallest sun_path in use (macOS, BSD), its final NUL included
RUNTIME_FILE_MAX = 65536  # bytes; Jupyter's are below 1,000
STATUS_PATH = "api/status?no_track_activity=1"  # without the latter, our looking would keep an idle server alive


class Trouble(Exception):
    """An expected failure on the host; it travels in the reply and becomes a Failure there."""

    def __init__(self, status: int, what: str, why: str = "", try_: str = "") -> None:
        super().__init__(what)
        self.reply = {"what": what, "why": why, "try": try_, "status": status}


# -- both sides -------------------------------------------------------------------------------------------------------


def listen_on(port: int, host: str = "127.0.0.1") -> socket.socket:
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


def http_request(
    address: "Any", path: str, token: str, timeout_s: float, method: str = "GET", is_secure: bool = False
) -> "Tuple[int, bytes]":
    """Ask the server at `address`, (host, port) or a Unix socket; return the HTTP status and the body (1 MB at most).

    Straight to the socket, past any http_proxy. The certificate is not checked: the way there is a loopback, or ours.
    Raises OSError when there is no answer within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    is_unix = isinstance(address, str)
    if is_unix:
        connection = socket.socket(socket.AF_UNIX)
    else:  # as bytes: for a text, Python imports its codec for international names first
        connection = socket.create_connection((address[0].encode(), address[1]), timeout=timeout_s)
    with contextlib.closing(connection):
        if is_unix:
            connection.settimeout(timeout_s)
            connection.connect(address)
        if is_secure:
            import ssl

            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        host = "127.0.0.1" if is_unix else "127.0.0.1:%d" % address[1]
        head = "%s %s HTTP/1.0\r\nHost: %s\r\nContent-Length: 0\r\n" % (method, path, host)
        if token:
            head += "Authorization: token %s\r\n" % token
        connection.sendall((head + "\r\n").encode("utf-8"))
        answer = b""
        while len(answer) < 1000000:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = connection.recv(65536)
            if not chunk:
                break
            answer += chunk
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    words = head_bytes.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ConnectionError("closed without an answer")
    return int(words[1]), body


def owner_of_tcp(local: "Tuple[str, int]", remote_port: int) -> "Optional[int]":
    """Return the uid whose socket is bound to `local`, or to any address with that port; None where nobody can tell.

    `remote_port` is 0 for one that listens. From the tables of proc(5), which Linux alone has.
    """
    host = socket.inet_pton(socket.AF_INET6 if ":" in local[0] else socket.AF_INET, local[0])
    addresses = [host, bytes(len(host)), bytes(16), bytes(10) + b"\xff\xff" + host]
    # Each group of four bytes is printed as one number in this machine's order.
    ends = [b"".join(struct.pack("=I", n) for n in struct.unpack("!%dI" % (len(a) // 4), a)).hex() for a in addresses]
    local_ends = ["%s:%04x" % (end, local[1]) for end in ends]
    port_in_table = ":%04X " % local[1]
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as stream:  # no further than it must: a busy host's table is long, and slow to read
                for row in (line.lower().split() for line in stream if port_in_table in line):
                    if row[1] in local_ends and int(row[2].rpartition(":")[2], 16) == remote_port:
                        return int(row[7])
        except OSError:
            continue
    return None


def run_command(argv: "List[str]", timeout_s: float) -> "Tuple[int, str, str]":
    """Run a command to its end; return its status, and what it printed on stdout and on stderr.

    The status is 127 when it cannot be run, and 124 when it did not end in time, as timeout(1) has it.
    """
    import subprocess

    pipe = subprocess.PIPE
    try:
        answer = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, timeout=timeout_s)
    except OSError as error:
        return 127, "", str(error)
    except subprocess.TimeoutExpired:
        return 124, "", "no answer within %d s" % timeout_s
    return answer.returncode, answer.stdout.decode("utf-8", "replace"), answer.stderr.decode("utf-8", "replace")


def process_identity(pid: int) -> str:
    """Return what tells this process from a later one with the same pid; empty when there is no such process."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as process, open("/proc/sys/kernel/random/boot_id") as boot:
            fields = process.read().rpartition(b")")[2].split()
            # Fields 3 and 22 of proc(5): the state and the start time. A zombie has ended.
            return "" if fields[0] == b"Z" else "%s:%s" % (boot.read().strip(), fields[19].decode())
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return ""
    argv = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]  # macOS and the BSDs have no such /proc
    answer = run_command(argv, COMMAND_TIMEOUT_S)[1]
    return "" if answer.startswith("Z") else " ".join(answer.split()[1:])


def own_uid() -> int:
    """Return our uid; 0 where there is none (Windows)."""
    return os.getuid() if hasattr(os, "getuid") else 0


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
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)
    probe = os.path.join(path, ".%d" % os.getpid())
    try:
        with open(probe, "wb") as stream:
            stream.write(bytes(4096))  # a full disk, or quota, still makes empty files
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(probe)
    return path


def write_private(path: str, text: str) -> None:
    """Write a file that only its owner can read, in one piece: a reader sees the old one or the new one."""
    beside = "%s.%d" % (path, os.getpid())
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(text)
        os.replace(beside, path)
    except BaseException:  # a signal, a full disk
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


# -- the channel ------------------------------------------------------------------------------------------------------


class Channel:
    """The way back: lines of JSON behind the request's nonce, so that no banner or rc file can pass for one."""

    def __init__(self, nonce: str, stream: "Any" = None) -> None:
        self._nonce = nonce + " " if nonce else ""
        self._last_sent = 0.0
        self._doing = ""
        self._lasting = ("progress", {"text": ""})  # type: Tuple[str, Json]
        self._has_failed = False
        self._stream = stream or os.fdopen(os.dup(1), "w")
        if not stream:
            os.dup2(2, 1)  # whatever else writes to stdout here goes to stderr instead

    def send(self, kind: str, **facts: "Any") -> None:
        """Send one marked line. A client that has gone is no reason to stop: what we began for it goes on."""
        try:
            self._stream.write("%s%s\n" % (self._nonce, json.dumps(dict(facts, kind=kind))))
            self._stream.flush()
        except OSError:
            self._has_failed = True
        self._last_sent = time.monotonic()
        if kind in ("progress", "queue"):
            self._lasting = (kind, facts)

    @property
    def is_closed(self) -> bool:
        """True when nobody listens any more."""
        import select

        poll = select.poll()
        poll.register(self._stream.fileno(), 0)  # for its errors, which are told in any case
        return self._has_failed or bool(poll.poll(0))

    def progress(self, text: str) -> None:
        """Say what takes its time."""
        if text != self._doing:
            self._doing = text
            self.send("progress", text=text)

    def keep_alive(self) -> None:
        """Say again what takes its time, when that was a few seconds ago: the client gives up on a silent agent."""
        if time.monotonic() - self._last_sent > HEARTBEAT_S:
            kind, facts = self._lasting
            self.send(kind, **facts)


@contextlib.contextmanager
def one_at_a_time(directory: str, channel: Channel, waiting: str) -> "Iterator[None]":
    """Hold the lock in a directory of ours meanwhile; say `waiting` while another run has it.

    No crash leaves it behind. Where files cannot be locked, there is none.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(os.path.join(private_dir(directory), "lock"), "w"))
            while not has_lock(lock):
                channel.progress(waiting)
                channel.keep_alive()
                if channel.is_closed:
                    raise Trouble(1, "nobody waits for this any more")
                time.sleep(POLL_S)
        except OSError:
            pass
        channel.progress("")
        yield


def has_lock(lock: "Any") -> bool:
    """Take the lock on an open file, if nobody has it; OSError where files cannot be locked."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def native(text: str) -> str:
    """Turn a name from a request into one for this system, whatever its locale; `portable` is the way back."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def portable(name: str) -> str:
    """Turn a file name of this system into text that survives JSON."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


# -- state: which servers are ours ------------------------------------------------------------------------------------


def state_dirs(kind: str) -> "List[str]":
    """Return our directories for one kind of state, the best first: at home, or in /tmp where home is not writable."""
    return [os.path.join(top, kind) for top in (os.path.expanduser(STATE_DIR), own_tmp_dir())]


def first_private(candidates: "List[str]") -> str:
    """Return the first of these directories that is, or can be made, ours alone and writable; Trouble without one."""
    reasons = []
    for path in candidates:
        try:
            private_dir(os.path.dirname(path))
            return private_dir(path)
        except OSError as error:
            reasons.append(str(error))
    raise Trouble(
        1, "no place to keep our state on the host", "\n".join(reasons), "make room there, or a writable home"
    )


def runtime_dirs() -> "List[str]":
    """Return where Jupyter keeps its runtime files (jupyter_core.paths), and the place that we fall back to."""
    home = os.path.expanduser("~")
    default = os.path.join(home, "Library/Jupyter") if sys.platform == "darwin" else ""
    data = default or os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local/share"), "jupyter")
    data = os.environ.get("JUPYTER_DATA_DIR") or data
    path = os.environ.get("JUPYTER_RUNTIME_DIR") or os.path.join(data, "runtime")
    return [path, os.path.join(own_tmp_dir(), "runtime")]


def runtime_dir(has_sockets: bool) -> str:
    """Return Jupyter's runtime directory, made when it is missing, closed to others.

    Jupyter writes jpserver-PID-open.html there, which holds the token, and only its umask decides who reads that. To
    close the directory does no harm; another umask would, for every file that the user's kernels write.
    XDG_RUNTIME_DIR, which old versions used, vanishes at logout. With `has_sockets` it is one that can hold the
    kernels' sockets.
    """
    first, *others = runtime_dirs()
    try:
        private_dir(first)
        if not has_sockets or can_hold_socket(os.path.join(first, "kernel-%s-ipc-5" % ("0" * 36))):
            return first
    except OSError:
        pass
    return first_private(others)


def can_hold_socket(path: str) -> bool:
    """True when a socket can be made at `path`: short enough, on a file system that knows them, plain for ssh's -L."""
    import re

    if not re.match(r"[\w/.,+@=-]+\Z", path, re.ASCII) or len(path) >= SUN_PATH_MAX:
        return False
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError:
        return False
    return True


def read_json(path: str) -> "Json":
    """Read a small JSON object; empty when there is none, or when it is not an ordinary file of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid() or status.st_size > RUNTIME_FILE_MAX or not stat.S_ISREG(status.st_mode):
                return {}
            found = json.loads(stream.read(RUNTIME_FILE_MAX).decode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def kept_dirs(kind: str) -> "List[str]":
    """Return the directories of one kind of state, of what runs and of what has ended; their names are the ids."""
    found = []
    for top in state_dirs(kind):
        try:
            if os.stat(top).st_uid == os.getuid():
                found += [os.path.join(top, name) for name in os.listdir(top)]
        except OSError:
            continue
    return found


def new_dir(kind: str, prefix: str = "") -> str:
    """Make and return a directory for new state; its name, four hexadecimal digits, is the id."""
    top = first_private(state_dirs(kind))
    while True:
        path = os.path.join(top, prefix + os.urandom(2).hex())
        try:
            os.mkdir(path, 0o700)
            return path
        except FileExistsError:
            continue


def record_path(directory: str) -> str:
    """Return the file that describes what such a directory is kept for: servers/ID/server.json, runs/ID/run.json."""
    kind = os.path.basename(os.path.dirname(directory))
    return os.path.join(directory, kind[:-1] + ".json")


SERVER_TYPES = {
    "pid": int,
    "identity": str,
    "node": str,
    "app": str,
    "created": float,
    "root_dir": str,
    "runtime_dir": str,
    "local_port": int,
}


def kept_records(kind: str, types: "Dict[str, type]") -> "List[Json]":
    """Return what we wrote down of one kind, newest first, of what runs and of what has ended.

    A home is shared between nodes, and files can be damaged: each field is of its type, or the record is skipped.
    """
    records = []
    for directory in kept_dirs(kind):
        record = read_json(record_path(directory))
        if all(type(record.get(name)) is type_ for name, type_ in types.items()) and record.get("pid", 2) > 1:
            facts = {"id": os.path.basename(directory), "directory": directory, "kind": kind[:-1], "is_ours": True}
            records.append(dict(record, **facts))
    return sorted(records, key=lambda record: float(record["created"]), reverse=True)


def server_records() -> "List[Json]":
    """Return the records of our servers, newest first, whether they run or not."""
    return kept_records("servers", SERVER_TYPES)


def is_here(record: "Json") -> bool:
    """True when what this record describes is, or was, on this node; a home is shared between nodes."""
    return bool(record["node"] == os.uname().nodename)


def runs_here(record: "Json") -> bool:
    """True when the process of this record runs on this node."""
    identity = record["identity"]
    return bool(is_here(record) and identity and process_identity(record["pid"]) == identity)


def is_running(record: "Json") -> bool:
    """True when what this record describes still runs: its process on this node, or its job, wherever that is."""
    job = {} if is_here(record) else job_of(record)
    return bool(job_state(job)["is_live"]) if job else runs_here(record)


def our_servers() -> "List[Json]":
    """Return the records of our servers that still run, here or in a job of ours, newest first."""
    return [record for record in server_records() if is_running(record)]


def other_servers() -> "List[Json]":
    """Return records, as ours, of the user's servers that something else started: those whose runtime files we see.

    Their ids are "p" and the pid. Nothing of them is ever removed: they may run on another node of a shared home.
    """
    ours = server_records()
    records = []
    for directory in runtime_dirs() + [native(record["runtime_dir"]) for record in ours]:
        for kind, pid, path in runtime_files(directory):
            info = checked_info(read_json(path))
            if not info or [r for r in ours if r["pid"] in (pid, session_of(pid))]:
                continue
            records.append(
                {
                    "id": "p%d" % pid,
                    "pid": pid,
                    "identity": process_identity(pid),
                    "node": os.uname().nodename,
                    "app": app_of_process(pid, kind),
                    "created": os.stat(path).st_mtime,
                    "root_dir": info["root_dir"],
                    "runtime_dir": portable(directory),
                    "kind": "server",
                    "is_ours": False,
                }
            )
    unique = {record["id"]: record for record in records}
    return sorted(unique.values(), key=lambda record: float(record["created"]), reverse=True)


def app_of_process(pid: int, kind: str) -> str:
    """Return the app of a server that is not ours, as its command line tells; the runtime file does not."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as stream:
            words = stream.read(4096)
    except OSError:
        words = b""
    return "lab" if kind == "jpserver" and (b"jupyter-lab" in words or b"jupyterlab" in words) else "notebook"


def forget_ended(kind: str, running: "List[Json]") -> None:
    """Remove what is kept of a kind and ended on this node more than a week ago; `running` stays."""
    import shutil

    for path in kept_dirs(kind):
        record = read_json(record_path(path))
        try:
            age_s = time.time() - os.stat(path).st_mtime
        except OSError:
            continue
        is_running = path in [record["directory"] for record in running]
        if not is_running and record.get("node") in (None, os.uname().nodename) and age_s > KEEP_ENDED_S:
            shutil.rmtree(path, ignore_errors=True)


def end_of_log(path: str, lines: int = 12) -> str:
    """Return the last lines of a server's log, tokens taken out."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 8192))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    tail = [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
    return without_tokens("\n".join(tail))


def without_tokens(text: str) -> str:
    """Return a text of Jupyter's log without the tokens in its addresses."""
    import re

    return re.sub(r"token=[^&\s\"']+", "token=...", text)


# -- Jupyter: find it, or install it ----------------------------------------------------------------------------------


def problem_of(script: str) -> str:
    """Return why `script` cannot be executed; empty when it can. Environments move and leave dead #! lines behind."""
    if not os.path.isfile(script):
        return "not there"
    if not os.access(script, os.X_OK):
        return "not executable"
    try:
        with open(script, "rb") as stream:
            first = stream.readline(512)
    except OSError as error:
        return str(error)
    words = first[2:].split() if first.startswith(b"#!") else []
    return "" if not words or os.path.exists(words[0]) else "needs %s, which is gone" % portable(os.fsdecode(words[0]))


def shell_environment(shell: str, init: "List[str]", is_interactive: bool) -> "Tuple[Dict[str, str], str]":
    """Return the environment of the user's login shell, after the commands in `init`, and what it said on stderr.

    Empty when the shell does not get that far in time: its files may wait for input, or leave. The leading dash makes
    any shell a login shell; the dump is framed, for those files print as well. With -c, csh does not count itself as
    interactive; it takes its commands from stdin.
    """
    import signal
    import subprocess
    import tempfile

    nonce = os.urandom(8).hex()
    dump = 'import json, os; print(); print("%s" + json.dumps(dict(os.environ)))' % nonce
    script = " && ".join(init + ["exec '%s' -IS -c '%s'" % (sys.executable, dump)])
    argv = ["-" + os.path.basename(shell)] + (["-i"] if is_interactive else [])
    argv += [] if shell.endswith("csh") else ["-c", script]
    # Files and no pipes: a start-up file may leave a process behind that holds a pipe open for ever.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                argv, executable=shell, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return {}, str(error)
        assert process.stdin is not None
        try:
            # On stdin as well: a start-up file may replace the shell (`exec fish`). One that reads a line gets a blank.
            with process.stdin as stdin:
                stdin.write(("\n\n%s\n" % script).encode("utf-8", "surrogateescape"))
        except OSError:
            pass  # a shell that never looked at it
        try:
            process.wait(SHELL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {}, "no answer within %d s" % SHELL_TIMEOUT_S
        out.seek(0)
        err.seek(0)
        said = err.read().decode("utf-8", "replace").strip()
        for line in out.read().decode("utf-8", "replace").splitlines():
            if line.startswith(nonce):
                return {native(k): native(v) for k, v in json.loads(line[len(nonce) :]).items()}, said
    return {}, said


def user_environment(init: "List[str]", tried: "List[str]") -> "Dict[str, str]":
    """Return what a terminal of the user would have: login and interactive, else login alone; after `init`.

    Empty when neither works out; raises Trouble when there was an `init`, which must not be passed over in silence.
    """
    import pwd

    shell = os.environ.get("SHELL") or pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    said = ""
    for is_interactive in (True, False):
        environment, said = shell_environment(shell, init, is_interactive)
        if environment:
            return environment
        tried.append("the environment of %s: %s" % (shell, said or "it gave none"))
    if init:
        raise Trouble(1, "--init failed on the host", "%s\n%s" % (" && ".join(init), said), "try it in a shell there")
    return {}


def conda_trees() -> "List[str]":
    """Return the directories where conda, mamba and micromamba keep their environments, as far as they exist."""
    home = os.path.expanduser("~")
    trees = [os.environ.get("MAMBA_ROOT_PREFIX", ""), os.path.dirname(os.path.dirname(os.environ.get("CONDA_EXE", "")))]
    for name in ("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba", ".local/share/mamba", ".conda"):
        trees.append(os.path.join(home, name))
    trees += ["/opt/conda", "/opt/miniconda3", "/opt/anaconda3", "/opt/miniforge3"]
    return [tree for tree in dict.fromkeys(trees) if tree and os.path.isdir(tree)]


def environment_python(name: str, root_dir: str) -> str:
    """Return the interpreter of an environment: a path (venv, conda, pixi), or a name (conda, mamba, pixi).

    Raises Trouble (3) when there is none.
    """
    if os.sep in name or name.startswith("~"):
        prefixes = [os.path.join(os.path.expanduser("~"), os.path.expanduser(name))]
    else:
        prefixes = [tree if name == "base" else os.path.join(tree, "envs", name) for tree in conda_trees()]
        for parent in os.environ.get("CONDA_ENVS_PATH", "").split(os.pathsep):
            prefixes.append(os.path.join(parent, name))
        try:
            with open(os.path.expanduser("~/.conda/environments.txt")) as stream:  # conda's own list of all of them
                prefixes += [line.strip() for line in stream if os.path.basename(line.strip()) == name]
        except (OSError, UnicodeDecodeError):
            pass
        prefixes.append(os.path.join(root_dir or os.path.expanduser("~"), ".pixi", "envs", name))
    for prefix in prefixes:
        python = os.path.join(prefix, "bin", "python")
        if os.path.isabs(prefix) and not problem_of(python):
            return python
    looked = "\n".join(portable(prefix) for prefix in prefixes if os.path.isabs(prefix))
    raise Trouble(3, "no environment %s on the host" % portable(name), "looked for bin/python in\n" + looked)


def launcher_of_python(python: str, app: str, where: str) -> "Json":
    """Return how to run Jupyter under one interpreter; raises Trouble (3) when it has none."""
    problem = problem_of(python)
    modules = {"notebook": "notebook", "lab": "jupyterlab"}
    check = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    for candidate in [app] if app else ["notebook", "lab"]:
        if not problem and run_command([python, "-c", check, modules[candidate]], COMMAND_TIMEOUT_S)[0] == 0:
            return launcher(candidate, [python, "-m", modules[candidate]], where, os.environ)
    why = "%s: %s" % (portable(python), problem or "it has no module %s" % modules[app or "notebook"])
    raise Trouble(3, "no Jupyter in this environment", why, "%s -m pip install notebook jupyterlab" % portable(python))


def launcher(app: str, argv: "List[str]", where: str, environment: "Any") -> "Json":
    """Return how to run Jupyter: which app, the argv, where it was found, and the environment that it gets.

    Its own directory comes first on PATH, so that `!pip` in a notebook is the pip beside it.
    """
    path = os.path.dirname(argv[0]) + os.pathsep + environment.get("PATH", os.defpath)
    return {"app": app, "argv": argv, "where": where, "environment": dict(environment, PATH=path)}


def launchers_in(places: "List[str]", app: str, where: str, environment: "Any", tried: "List[str]") -> "Iterator[Json]":
    """Yield the launchers in `places`. Without an `app` asked for, the notebook before the lab in each of them."""
    looked = []
    for place in dict.fromkeys(places):
        if not os.path.isabs(place) or not os.path.isdir(place):
            continue
        looked.append(place)
        for candidate in [app] if app else ["notebook", "lab"]:
            script = os.path.join(place, "jupyter-" + candidate)
            problem = problem_of(script)
            if not problem:
                yield launcher(candidate, [script], where, environment)
            elif problem != "not there":
                tried.append("%s: %s" % (portable(script), problem))
    tried.append("%s: %s" % (where, ", ".join(portable(place) for place in looked) or "nothing there"))


def launchers(request: "Json", root_dir: str, tried: "List[str]") -> "Iterator[Json]":
    """Yield the ways to run Jupyter on this host, best first; what was looked at goes to `tried`, in words."""
    import glob

    app = request["app"]
    environment = os.environ  # type: Any
    if request["init"]:
        environment = user_environment([native(command) for command in request["init"]], tried)
        os.environ.clear()
        os.environ.update(environment)
    if request["python"]:
        python = os.path.join(os.path.expanduser("~"), os.path.expanduser(native(request["python"])))
        yield launcher_of_python(python, app, "--python")
        return
    if request["env"]:
        yield launcher_of_python(environment_python(native(request["env"]), root_dir), app, "--env " + request["env"])
        return
    where = "PATH after --init" if request["init"] else "PATH"
    yield from launchers_in(environment.get("PATH", os.defpath).split(os.pathsep), app, where, environment, tried)
    if not request["init"]:
        of_terminal = user_environment([], tried)
        places = of_terminal.get("PATH", "").split(os.pathsep)
        yield from launchers_in(places, app, "the login shell's PATH", of_terminal, tried)
    home = os.path.expanduser("~")
    places = [os.path.join(root_dir or home, ".venv", "bin")]
    places += [os.path.join(tree, "bin") for tree in conda_trees()]
    places += [os.path.join(home, ".local/bin"), "/opt/homebrew/bin"]
    for pattern in (".pyenv/versions/*/bin", "Library/Python/3.*/bin"):
        places += sorted(glob.glob(os.path.join(glob.escape(home), pattern)), reverse=True)
    yield from launchers_in(places, app, "the usual places", environment, tried)
    places = [os.path.join(os.path.expanduser(VENV_DIR), "bin")]
    yield from launchers_in(places, app, "our own environment", environment, tried)


def app_version(script: str, app: str) -> str:
    """Return the installed version of the app behind `script`; empty when its environment does not tell."""
    import glob

    distribution = {"notebook": "notebook", "lab": "jupyterlab"}[app]
    prefixes = [os.path.dirname(os.path.dirname(path)) for path in (script, os.path.realpath(script))]
    try:
        with open(script, "rb") as stream:
            first = stream.readline(512)
        prefixes.append(os.path.dirname(os.path.dirname(os.fsdecode(first[2:].split()[0]))))
    except (OSError, IndexError):
        pass
    for prefix in prefixes:
        for packages in ("lib/python3*/site-packages", "lib/python3*/dist-packages"):
            pattern = os.path.join(glob.escape(prefix), packages, distribution + "-[0-9]*.*-info")
            found = [os.path.basename(path).split("-")[1] for path in glob.glob(pattern)]
            if found:
                return found[0].replace(".dist", "").replace(".egg", "")
    return ""


def run_with_progress(argv: "List[str]", channel: Channel) -> "Tuple[int, str]":
    """Run a command, each line of its output sent as progress; return its status and the end of its output."""
    import subprocess

    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = [""]
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode("utf-8", "replace").strip()
        lines = (lines + [line])[-12:]
        channel.progress(line[:60])
    return process.wait(), "\n".join(lines)


def install_commands() -> "List[List[str]]":
    """Return the commands that make our private virtual environment: by uv where it is there, venv and pip else.

    A virtual environment, never the system's Python, which its owner may have closed (PEP 668).
    """
    import shutil

    venv = os.path.expanduser(VENV_DIR)
    python = os.path.join(venv, "bin", "python")
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.expanduser("~/.local/bin:~/.cargo/bin"))
    if uv:
        make = [uv, "venv", "--allow-existing", "--system-site-packages", "--python", sys.executable, venv]
        return [make, [uv, "pip", "install", "--python", python, "notebook", "jupyterlab"]]
    make = [sys.executable, "-m", "venv", "--system-site-packages", venv]
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "notebook", "jupyterlab"]
    return [make, install]


def install_jupyter(app: str, channel: Channel) -> "Json":
    """Install Jupyter into our private virtual environment, one at a time, and return its launcher.

    Raises Trouble (3) when it fails.
    """
    venv = os.path.expanduser(VENV_DIR)
    commands = install_commands()
    channel.send("installing", path=portable(venv), tool="uv" if commands[0][0].endswith("uv") else "pip")
    began = time.monotonic()
    with one_at_a_time(os.path.dirname(venv), channel, "another run of ours installs it; waiting"):
        found = own_launcher(app)
        for argv in commands if not found else []:
            status, output = run_with_progress(argv, channel)
            if status:
                why = "%s\n%s" % (" ".join(argv), output)
                raise Trouble(3, "Jupyter could not be installed", why, how_to_install())
        found = own_launcher(app)
        if not found:
            raise Trouble(3, "Jupyter was installed, but its command is not there", portable(venv), "remove it there")
    channel.send("installed", path=portable(venv), elapsed_s=time.monotonic() - began)
    return found


def own_launcher(app: str) -> "Json":
    """Return the launcher in our private virtual environment; empty when there is none."""
    places = [os.path.join(os.path.expanduser(VENV_DIR), "bin")]
    return next(launchers_in(places, app, "our own environment", os.environ, []), {})


def how_to_install() -> str:
    """Return the commands that install Jupyter by hand, as a person on the host would type them."""
    home = os.path.expanduser("~")
    lines = [" ".join("~" + w[len(home) :] if w.startswith(home + "/") else w for w in c) for c in install_commands()]
    if not os.path.isdir(os.path.join(os.path.dirname(os.__file__), "ensurepip")):
        lines.insert(0, "sudo apt install python3-venv   (this Python has no ensurepip)")
    return "on the host:\n" + "\n".join(portable(line) for line in lines)


# -- launch -----------------------------------------------------------------------------------------------------------


def resolve_path(path: str) -> "Tuple[str, str]":
    """Split the PATH of a destination into an existing directory and a file in it (empty for a directory).

    Relative to the home directory, as scp has it. Raises Trouble when there is no such thing.
    """
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
    raise Trouble(1, "no such %s on the host" % kind, why, "another PATH, or make it there first")


def lasting_environment(environment: "Dict[str, str]", has_sockets: bool) -> "Dict[str, str]":
    """Return the environment for what outlives this session: the user's, less what ends with it."""
    gone = ("XDG_RUNTIME_DIR", "XDG_SESSION_ID", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")
    kept = {name: value for name, value in environment.items() if name not in gone}
    return dict(kept, JUPYTER_RUNTIME_DIR=runtime_dir(has_sockets))


def configured_port() -> bool:
    """True when the user's own configuration names a port: then theirs holds, and none goes on the command line."""
    import re

    home = os.environ.get("JUPYTER_CONFIG_DIR") or os.path.expanduser("~/.jupyter")
    for app in ("notebook", "server", "lab"):
        for ending, pattern in ((".py", r"(?m)^\s*c\.\w+\.port\s*="), (".json", r'"port"\s*:')):
            try:
                with open(os.path.join(home, "jupyter_%s_config%s" % (app, ending)), errors="replace") as stream:
                    if re.search(pattern, stream.read(RUNTIME_FILE_MAX)):
                        return True
            except OSError:
                continue
    return False


def launch(
    request: "Json", root_dir: str, channel: Channel, launch_by: "Callable[[Json, Json, str, Channel], Json]"
) -> "Json":
    """Launch a server or a run in the first environment that can, and return its record.

    `launch_by` does it in one of them, and returns nothing where its commands cannot be run at all. Raises Trouble (3)
    when there is none left and none may be installed.
    """
    tried = []  # type: List[str]
    began = time.monotonic()
    for found in launchers(request, root_dir, tried):
        channel.send("found", where=found["where"], command=portable(found["argv"][0]), tried=tried)
        record = launch_by(found, request, root_dir, channel)
        if record:
            return dict(record, start_s=time.monotonic() - began)
        tried.append("%s: it cannot be run" % portable(found["argv"][0]))
    if not request["may_install"]:
        asked = {"": "Jupyter", "notebook": "Jupyter Notebook", "lab": "JupyterLab"}[request["app"]]
        raise Trouble(3, "no %s on the host" % asked, "looked at\n" + "\n".join(tried), how_to_install())
    found = install_jupyter(request["app"], channel)
    began = time.monotonic()
    record = launch_by(found, request, root_dir, channel)
    if not record:
        raise Trouble(3, "Jupyter was installed, but it cannot be run", portable(found["argv"][0]))
    return dict(record, start_s=time.monotonic() - began)


def launch_server(found: "Json", request: "Json", root_dir: str, channel: Channel) -> "Json":
    """Launch Jupyter in one way, where it can first listen; empty when its command cannot be run at all."""
    directory = new_dir("servers")
    log = os.path.join(directory, "log")
    token_file = os.path.join(directory, "token")
    write_private(token_file, os.urandom(24).hex())
    environment = dict(lasting_environment(found["environment"], request["socket"]), JUPYTER_TOKEN_FILE=token_file)
    if request.get("job") and not request["socket"]:
        environment["JUPYTER_RUNTIME_DIR"] = private_dir(os.path.join(directory, "runtime"))  # two nodes, one pid
    deadline = time.monotonic() + request["start_timeout_s"]
    no_socket = request["no_socket"]
    for port, listen in ways_to_listen(request, directory):
        argv = list(found["argv"]) + ["--no-browser"] + listen + server_arguments(request, root_dir)
        in_job = bool(request.get("job"))
        process = start_detached(argv, environment, root_dir or os.path.expanduser("~"), log, in_job)
        record = {
            "pid": process.pid,
            "identity": process_identity(process.pid),
            "node": os.uname().nodename,
            "app": found["app"],
            "port": port,
            "created": time.time(),
            "root_dir": portable(root_dir),
            "runtime_dir": portable(environment["JUPYTER_RUNTIME_DIR"]),
            "local_port": request["local_port"],
            "python": request["python"],
            "env": request["env"],
            "init": request["init"],
            "socket": request["socket"],
            "no_socket": no_socket,
            "has_answered": False,
            "job": request.get("job", ""),
            "submit": request.get("submit", []),
        }
        write_private(record_path(directory), json.dumps(record))
        info = wait_for_answer(process, record, deadline, channel)
        if info:
            record.update(root_dir=info["root_dir"], port=info["port"], has_answered=True)
            record["version"] = app_version(found["argv"][0], found["app"])
            if request["socket"] and not info["sock"]:
                record["no_socket"] = no_socket or "this Jupyter knows none"
            write_private(record_path(directory), json.dumps(record))
            return dict(record, id=os.path.basename(directory))
        tail = end_of_log(log)
        if process.poll() is None:
            end_session(process.pid)
            process.wait()
            set_aside(directory)
            why = "it did not listen within %d s; the end of its log:\n%s" % (request["start_timeout_s"], tail)
            raise Trouble(6, "Jupyter did not start in time", why, "a longer --start-timeout")
        if process.returncode in (126, 127):
            set_aside(directory)
            return {}
        if "are mutually exclusive" in tail:
            no_socket = "its configuration names a port"
        elif "already in use" not in tail and "is not available" not in tail:  # lost between the look and its bind
            break
    kept = set_aside(directory)
    why = "it ended with status %s; the end of its log:\n%s" % (process.returncode, tail or "(empty)")
    raise Trouble(4, "Jupyter did not start", why, "the whole log is on the host in " + portable(kept))


def ways_to_listen(request: "Json", directory: str) -> "Iterator[Tuple[int, List[str]]]":
    """Yield where Jupyter may listen, best first, each as a port (0 for a socket) and Jupyter's arguments for it."""
    if request["socket"] and not request["no_socket"]:
        # The kernels' own ports ask nobody for a password: others could read what they print.
        yield 0, ["--sock=" + socket_path(directory), "--KernelManager.transport=ipc"]
    starting = [server.get("port") for server in our_servers()]
    port = request["port"] or DEFAULT_PORT
    ip = node_address() if request["ip"] == "node" else request["ip"]
    for _ in range(100):
        port = find_free_port(port, ip)
        if port not in starting:  # chosen a moment ago by another run of ours, whose Jupyter does not listen yet
            named = ["--port=%d" % port] if request["port"] or not configured_port() else []
            yield port, ["--ip=" + ip] + named
        port += 1


def socket_path(directory: str) -> str:
    """Return where the socket of a server lies: with the server's files, or below /tmp where they cannot hold one."""
    beside = os.path.join(directory, "socket")
    if can_hold_socket(beside):
        return beside
    return os.path.join(private_dir(own_tmp_dir()), os.path.basename(directory) + ".socket")


def server_arguments(request: "Json", root_dir: str) -> "List[str]":
    """Return what Jupyter's command line says apart from where it listens."""
    arguments = ["--notebook-dir=" + root_dir] if root_dir else []
    arguments += ["--allow-root"] if os.getuid() == 0 else []
    idle_s = request["idle_timeout_s"]
    if idle_s:
        for app in ("ServerApp", "NotebookApp"):  # the latter up to Notebook 6
            arguments.append("--%s.shutdown_no_activity_timeout=%d" % (app, idle_s))
        arguments.append("--MappingKernelManager.cull_idle_timeout=%d" % idle_s)
        arguments.append("--MappingKernelManager.cull_interval=%d" % min(idle_s, 60))
    return arguments + [native(argument) for argument in request["server_args"]]


def wait_for_answer(process: "Any", record: "Json", deadline: float, channel: Channel) -> "Json":
    """Return what the runtime file of a new server says as soon as it answers; empty when it ends, or not in time."""
    while process.poll() is None and time.monotonic() < deadline:
        info = server_info(record)
        if info and answers(info):
            return info
        channel.keep_alive()
        time.sleep(POLL_S)
    return {}


def start_detached(
    argv: "List[str]", environment: "Dict[str, str]", directory: str, log: str, in_job: bool = False
) -> "Any":
    """Start a process in a session of its own that has nothing of ours open; in a job, it ends when we end."""
    import subprocess

    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600), "wb") as stream:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=directory,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent() if in_job else None,  # noqa: PLW1509 # the agent has one thread
        )


def end_with_parent() -> "Optional[Callable[[], object]]":
    """Return what lets a new process get SIGTERM when the one that started it ends, even by SIGKILL; Linux alone can.

    A scheduler may know no more of a job than its process group: what has a session of its own would outlive the job.
    """
    import signal

    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    return lambda: prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def set_aside(directory: str) -> str:
    """Remove the directory of a server that did not start; keep its log and return where."""
    import shutil

    kept = os.path.join(os.path.dirname(os.path.dirname(directory)), "failed.log")
    os.replace(os.path.join(directory, "log"), kept)
    shutil.rmtree(directory, ignore_errors=True)
    return kept


def end_session(pid: int) -> None:
    """Kill the session that process `pid` leads: it is one that we launched ourselves."""
    import signal

    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, signum)
        except OSError:
            return
        deadline = time.monotonic() + 3
        while process_identity(pid) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def runtime_files(directory: str) -> "Iterator[Tuple[str, int, str]]":
    """Yield the runtime files of servers in a directory, each as its kind, the server's pid, and its path."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        kind, _, rest = name.partition("-")
        pid, _, ending = rest.partition(".")
        if kind in ("jpserver", "nbserver") and ending == "json" and pid.isdigit() and len(pid) < 10:
            yield kind, int(pid), os.path.join(directory, name)


def server_info(record: "Json") -> "Json":
    """Return what Jupyter's own runtime file says of a server; empty before it listens.

    The file is named for the pid; a wrapper that does not exec makes it a child's, in the session that we launched.
    """
    for _, pid, path in runtime_files(native(record["runtime_dir"])):
        if record["pid"] == pid or (is_here(record) and session_of(pid) == record["pid"]):
            return checked_info(read_json(path))
    return {}


def session_of(pid: int) -> int:
    """Return the session that process `pid` is in; 0 when there is no such process."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def checked_info(info: "Json") -> "Json":
    """Return the fields of a runtime file that we use, each of its right type; empty when one is not."""
    host = info.get("hostname")
    found = {
        "host": "127.0.0.1" if host in ("", "*", "0.0.0.0", "::", "localhost") else host,
        "port": info.get("port"),
        "sock": info.get("sock") or "",
        "token": info.get("token"),
        "base_url": info.get("base_url"),
        "root_dir": info.get("root_dir", info.get("notebook_dir")),
        "is_secure": info.get("secure", False),
        "has_password": info.get("password", False),
    }
    types = (str, int, str, str, str, str, bool, bool)
    return found if all(type(value) is kind for value, kind in zip(found.values(), types)) else {}


def can_ask_server(record: "Json", info: "Json") -> bool:
    """False for a server on another node that only its own node reaches."""
    is_inner = info["sock"] or info["host"].startswith("127.") or info["host"] == "::1"
    return is_here(record) or not is_inner


def ask_server(info: "Json", path: str, method: str = "GET") -> "Tuple[int, Any]":
    """Ask a server on this host, with its token; return the HTTP status and the JSON, or 0 when there is no answer."""
    address = native(info["sock"]) or (info["host"], info["port"])
    try:
        path = info["base_url"] + path
        status, body = http_request(address, path, info["token"], 5, method=method, is_secure=info["is_secure"])
    except OSError:
        return 0, None
    try:
        return status, json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return status, None


def answers(info: "Json") -> bool:
    """True when the server takes its token: Jupyter writes its runtime file before it binds, and may lose its port.

    Whoever else took the port may take any token: a server of ours listens under our own uid, and refuses another
    token. With a password and no token at all, that it asks for the password must do.
    """
    status, _ = ask_server(info, STATUS_PATH) if info else (0, None)
    if not status or (not info["sock"] and not is_our_port(info)):
        return False
    if info["token"]:
        return status == 200 and ask_server(dict(info, token=os.urandom(8).hex()), STATUS_PATH)[0] in (401, 403)
    return status in ((401, 403) if info["has_password"] else (200,))


def is_our_port(info: "Json") -> bool:
    """False when another user listens where this server should."""
    try:
        return owner_of_tcp((info["host"], info["port"]), 0) in (None, own_uid())
    except OSError:
        return True  # a host name in place of an address


# -- actions ----------------------------------------------------------------------------------------------------------


def matching_servers(request: "Json", root_dir: str) -> "List[Json]":
    """Return the servers of ours that the request means: same PATH, app and environment, each as far as it is named."""
    servers = our_servers()
    if root_dir:
        servers = [s for s in servers if os.path.realpath(native(s["root_dir"])) == os.path.realpath(root_dir)]
    named = {name: request[name] for name in ("app", "python", "env", "init", "socket") if request.get(name)}
    named.update(request.get("scheduler") or {})
    return [s for s in servers if all(s.get(name) == value for name, value in named.items())]


def attachable_servers(request: "Json", root_dir: str) -> "List[Json]":
    """Return the servers to come back to, best first: the one named by `attach`, else ours, else others of this PATH.

    Raises Trouble when the one that was named does not run.
    """
    others = [dict(record, local_port=request["local_port"]) for record in other_servers() if runs_here(record)]
    if request["attach"]:
        found = [record for record in our_servers() + others if record["id"] == request["attach"]]
        if not found:
            raise Trouble(1, "no server of yours has this id: " + request["attach"], "", "list shows the ids")
        return found
    named = [name for name in ("python", "env", "init", "socket") if request[name]]  # of others' we do not know
    if not root_dir or named or request.get("scheduler"):
        others = []
    others = [r for r in others if os.path.realpath(native(r["root_dir"])) == os.path.realpath(root_dir)]
    others = [r for r in others if request["app"] in ("", r["app"]) and answers(server_info(r))]
    return matching_servers(request, root_dir) + others


def open_server(request: "Json", channel: Channel) -> "Json":
    """Come back to a server of ours, or launch one; return its record and what its runtime file says."""
    root_dir, file = resolve_path(request["path"]) if request["path"] is not None else ("", "")
    with contextlib.ExitStack() as stack:
        if not request["is_new"]:  # two at the same moment would launch two
            waiting = "another run of ours opens a server; waiting"
            stack.enter_context(one_at_a_time(own_tmp_dir(), channel, waiting))
        found = find_or_launch(request, root_dir, channel)
    if found.get("kind") == "job":
        found = wait_for_job(found, channel)
    else:
        found["scheduler"] = scheduler_here() if found["is_launched"] and not request.get("job") else ""
    return dict(found, file=portable(file), is_only=len(our_servers()) == 1, left_s=time_left_s(found))


def find_or_launch(request: "Json", root_dir: str, channel: Channel) -> "Json":
    """Return the server that a request means, of ours or launched now, with what its runtime file says.

    Or the job that waits, or was submitted now, in which it is going to be.
    """
    for record in [] if request["is_new"] else attachable_servers(request, root_dir):
        info = await_server(record, request["start_timeout_s"], channel)
        if info:
            return dict(record, **info, age_s=age_of(record), is_launched=False)
    forget_ended("servers", our_servers())
    for job in [] if request["is_new"] or request["attach"] else waiting_jobs(request):
        return job
    if request["scheduler"]:
        return submit_job(request, channel)
    record = launch(request, root_dir, channel, launch_server)
    return dict(record, **server_info(record), is_launched=True)


def await_server(record: "Json", start_timeout_s: float, channel: Channel) -> "Json":
    """Return what the runtime file of a server that runs says; empty when there is none, or when it ends.

    One that was launched a moment ago, by a client that has gone, may not listen yet. One that hangs is returned too:
    the client waits for it. Raises Trouble when someone else has its port.
    """
    while is_running(record):
        info = server_info(record)
        if info and (not can_ask_server(record, info) or answers(info)):
            return info
        if record.get("has_answered", True) or age_of(record) > start_timeout_s:
            if info and ask_server(info, STATUS_PATH)[0]:
                why = "what listens there is not the server %(id)s: it takes any token, or another, or is not yours"
                what = "a stranger answers on port %d of the host" % info["port"]
                raise Trouble(1, what, why % record, "stop it; or --new, which starts another")
            return info
        channel.keep_alive()
        time.sleep(POLL_S)
    return {}


def age_of(record: "Json") -> float:
    """Return how long ago a server was launched, in seconds."""
    return max(0.0, time.time() - float(record["created"]))


def describe_server(record: "Json") -> "Json":
    """Say how a server does, for people: it is live when it answered with its token, not when some pid exists."""
    found = {name: record[name] for name in ("id", "pid", "node", "app", "root_dir", "is_ours")}
    found.update(state="live", port=0, sock="", kernels=0, busy=0, idle_s=None, age_s=age_of(record))
    if not is_here(record) and not job_of(record):
        return dict(found, state="on " + record["node"])
    if not is_running(record):
        return dict(found, state="ended" if record["is_ours"] else "stale")
    info = server_info(record)
    if not info:
        return dict(found, state="starting")
    found.update(port=info["port"], sock=info["sock"])
    if not can_ask_server(record, info):
        return found
    if not answers(info):
        return dict(found, state="no answer")
    _, kernels = ask_server(info, "api/kernels?no_track_activity=1")
    kernels = [kernel for kernel in kernels if isinstance(kernel, dict)] if isinstance(kernels, list) else []
    found["kernels"] = len(kernels)
    found["busy"] = len([kernel for kernel in kernels if kernel.get("execution_state") == "busy"])
    _, status = ask_server(info, STATUS_PATH)
    if isinstance(status, dict):
        found["idle_s"] = seconds_since(status.get("last_activity"))
    return found


def seconds_since(moment: "Any") -> "Optional[float]":
    """Return how long ago a moment was, in seconds, from the form that Jupyter's API has (ISO 8601, UTC)."""
    import calendar

    try:
        return max(0.0, time.time() - calendar.timegm(time.strptime(str(moment)[:19], "%Y-%m-%dT%H:%M:%S")))
    except (ValueError, OverflowError):
        return None


def list_servers(request: "Json", channel: Channel) -> "Json":
    """Describe every server of the user on this host, ours or not, all at the same time."""
    import threading

    records = server_records() + other_servers()
    described = [{} for _ in records]  # type: List[Json]
    errors = []  # type: List[Exception]

    def describe(place: int) -> None:
        try:
            described[place] = describe_server(records[place])
        except Exception as error:  # raised below: a thread would only print it
            errors.append(error)

    threads = [threading.Thread(target=describe, args=(place,)) for place in range(len(records))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    runs = [describe_run(record) for record in run_records()]
    jobs = [describe_job(job) for job in live_jobs()]
    return {"servers": described, "runs": runs, "jobs": jobs}


def follow_log(request: "Json", channel: Channel) -> "Json":
    """Send a server's log, tokens taken out; with `is_followed` until the client or the server has gone."""
    records = server_records()
    if request["id"]:
        records = [record for record in records if record["id"] == request["id"]]
    if not records:
        what = (
            "no server of yours has this id: " + request["id"] if request["id"] else "no server of yours is known there"
        )
        raise Trouble(1, what, "logs are kept of what rjupyter launched", "list shows the ids")
    record = records[0]
    with open(os.path.join(record["directory"], "log"), errors="replace") as log:
        while True:
            line = log.readline()
            if line:
                channel.send("line", text=without_tokens(line.rstrip("\n")))
            elif not request["is_followed"] or not runs_here(record) or channel.is_closed:
                return {"id": record["id"]}
            else:
                channel.keep_alive()
                time.sleep(0.2)


def describe_end(request: "Json", channel: Channel) -> "Json":
    """Say of a server whether it still runs and answers, on this node or elsewhere; or why it ended, and its log."""
    known = [record for record in server_records() + other_servers() if record["id"] == request["id"]]
    if not known:
        return {"is_running": False, "reason": "it was stopped", "log": ""}
    record = known[0]
    if not is_here(record) and not job_of(record):
        return {"is_running": True, "is_elsewhere": True, "node": record["node"]}
    if not is_here(record):
        settle_job(record, channel)
    if is_running(record):
        info = server_info(record)
        return {"is_running": True, "is_answering": not can_ask_server(record, info) or answers(info)}
    log = end_of_log(os.path.join(record["directory"], "log")) if record["is_ours"] else ""
    return {"is_running": False, "reason": why_it_ended(record, log), "log": log}


def why_it_ended(record: "Json", log: str) -> str:
    """Return why a server ended, as far as its log, the host and its scheduler tell."""
    if record["is_ours"] and os.path.exists(os.path.join(record["directory"], "stop")):
        return "it was stopped"
    job = job_of(record)
    state = job_state(job) if job else {}
    if job and (state["word"] in JOB_ENDS or "received signal" in log):
        return why_job_ended(state)
    boot = process_identity(os.getpid()).partition(":")[0]
    if is_here(record) and record["identity"].partition(":")[0] != boot and os.path.exists("/proc/self/stat"):
        return "the host was started anew"
    for words, reason in (("; shutting down", "nobody used it"), ("hutting down", "it was shut down")):
        if words in log:
            return reason
    if job:
        return why_job_ended(state)
    return "it was killed, by hand or for want of memory"


STOPPED_FACTS = ("id", "pid", "app", "root_dir", "name", "job")


def stop_servers(request: "Json", channel: Channel) -> "Json":
    """End servers, runs and jobs: those named by id, the server of the PATH, or the only one; all with `is_all`.

    With `asks`, nothing is ended while a kernel computes: the reply names the busy ones, and the client comes again.
    """
    if request["ids"]:
        known = (
            our_servers() + [record for record in other_servers() if runs_here(record)] + running_runs() + live_jobs()
        )
        found = [record for record in known if record["id"] in request["ids"]]
        missing = sorted(set(request["ids"]) - {record["id"] for record in found})
        if missing:
            raise Trouble(1, "nothing of yours that runs has this id: " + ", ".join(missing), "", "list shows the ids")
    else:
        found = servers_to_stop(request)
    servers = [describe_server(record) for record in found if record["kind"] == "server"]
    busy = [server for server in servers if server["busy"]]
    runs = [record for record in found if record["kind"] == "run" and not request["ids"]]
    if request["asks"] and (busy or runs):
        return {"count": 0, "busy": busy, "runs": runs}
    ends = {"server": shut_down, "run": stop_run, "job": cancel_job}
    for record in found:
        ends[record["kind"]](record)
        channel.send("stopped", what=record["kind"], **{name: record.get(name) for name in STOPPED_FACTS})
    return {"count": len(found), "busy": [], "runs": []}


def servers_to_stop(request: "Json") -> "List[Json]":
    """Return what a stop without an id means: the server of the PATH, the only one, a job that waits; or all."""
    root_dir = resolve_path(request["path"])[0] if request["path"] is not None else ""
    found = matching_servers(request, root_dir)
    if request["is_all"]:
        return found + running_runs() + live_jobs()
    if len(found) > 1:
        names = ["%s   %s in %s" % (s["id"], s["app"], s["root_dir"]) for s in found]
        raise Trouble(1, "%d servers run there" % len(found), "\n".join(names), "stop ID, or stop --all")
    return found or waiting_jobs(dict(request, action="open"))


def shut_down(record: "Json") -> None:
    """End one server: ask Jupyter itself, which ends its kernels too, then TERM, then KILL.

    No kernel outlives it; and what Jupyter removes when it ends by itself is removed when it was killed, too.
    """
    import shutil

    if record["is_ours"]:
        write_private(os.path.join(record["directory"], "stop"), "")  # for a tunnel that notices before we are done
    info = server_info(record)
    files = [path for _, pid, path in runtime_files(native(record["runtime_dir"])) if pid == record["pid"]]
    kernels = kernels_of(record)
    if info and can_ask_server(record, info):
        ask_server(info, "api/shutdown", "POST")
    if not is_here(record):
        cancel_job(job_of(record))
    wait_for_end(record, 5)
    end_process(record, kernels)
    leftovers = files + [path[: -len(".json")] + "-open.html" for path in files]
    leftovers += [native(info["sock"])] if info and record["is_ours"] else []
    for leftover in [] if runs_here(record) else leftovers:
        with contextlib.suppress(OSError):
            os.unlink(leftover)
    if record["is_ours"]:
        shutil.rmtree(record["directory"], ignore_errors=True)


def kernels_of(record: "Json") -> "List[Tuple[int, str]]":
    """Return the processes that the process of a record started, each with its identity; none of another node's."""
    return [(pid, process_identity(pid)) for pid in children_of(record["pid"])] if is_here(record) else []


def end_process(record: "Json", kernels: "List[Tuple[int, str]]") -> None:
    """End the process of a record if it still runs, by TERM, then KILL; and what is left of its kernels."""
    import signal

    for signum in (signal.SIGTERM, signal.SIGKILL):
        if runs_here(record):
            end = os.killpg if record["is_ours"] else os.kill  # we made the group of ours; another may hold a terminal
            end(record["pid"], signum)
            wait_for_end(record, 3)
    for pid, identity in kernels:
        if identity and process_identity(pid) == identity:
            os.kill(pid, signal.SIGKILL)


def wait_for_end(record: "Json", timeout_s: float) -> None:
    """Wait until the process of a record has ended, or `timeout_s` passed."""
    deadline = time.monotonic() + timeout_s
    while runs_here(record) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def children_of(pid: int) -> "List[int]":
    """Return the processes that process `pid` started and that run: for Jupyter its kernels and terminals."""
    argv = ["ps", "-A", "-o", "pid=,ppid="]  # POSIX; busybox's has no -A, and needs none
    pairs = [line.split() for line in run_command(argv, COMMAND_TIMEOUT_S)[1].splitlines()]
    return [int(pair[0]) for pair in pairs if len(pair) == 2 and pair[1] == str(pid)]


def examine_host(request: "Json", channel: Channel) -> "Json":
    """Say what `doctor` asks of this host; what cannot be told is left out."""
    import shutil

    tried = []  # type: List[str]
    facts = {"shell": os.environ.get("SHELL", ""), "clock": time.time(), "uid": os.getuid()}  # type: Json
    facts["no_install"] = "" if os.path.isdir(os.path.join(os.path.dirname(os.__file__), "ensurepip")) else "ensurepip"
    try:
        place = first_private(state_dirs("servers"))
        facts.update(state=portable(place), free_bytes=shutil.disk_usage(place).free)
    except Trouble as trouble:
        facts["state_trouble"] = trouble.reply
    try:
        found = next(launchers(request, "", tried), None)
        if found:
            command = found["argv"][0]
            version = app_version(command, found["app"])
            facts["jupyter"] = {"app": found["app"], "version": version, "command": portable(command)}
            facts["where"] = found["where"]
    except Trouble as trouble:
        facts["jupyter_trouble"] = trouble.reply
    facts.update(tried=tried, port=find_free_port(request["port"] or DEFAULT_PORT))
    facts["sshd_port"] = int((os.environ.get("SSH_CONNECTION", "").split() or ["22"])[-1])
    uids = set()
    for pid in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        with contextlib.suppress(OSError):
            uids.add(os.stat("/proc/" + pid).st_uid if pid.isdigit() else os.getuid())
    facts["other_users"] = len([uid for uid in uids if uid >= 1000 and uid not in (os.getuid(), 65534)])
    facts["scheduler"] = scheduler_here()
    return facts


def agent_main(source: bytes, packed_request: bytes) -> None:
    """Run the action of one request and send one reply. Ends with status 0 whenever it replied."""
    request = json.loads(packed_request.decode("ascii"))
    request["source"] = source.decode("utf-8")  # for what is to run on after us
    perform(request, Channel(request["nonce"]))


def perform(request: "Json", channel: Channel) -> "Json":
    """Run the action of a request and send one reply; return it, or nothing for a failure."""
    try:
        import pwd

        user = pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        user = str(os.getuid())
    version = "%d.%d.%d" % sys.version_info[:3]
    channel.send("hello", user=user, node=os.uname().nodename, python=version, is_root=os.getuid() == 0)
    actions = {
        "open": open_server,
        "list": list_servers,
        "logs": follow_log,
        "stop": stop_servers,
        "describe_end": describe_end,
        "examine": examine_host,
        "start_run": start_run,
        "follow_run": follow_run,
    }
    try:
        reply = actions[request["action"]](request, channel)
        channel.send("reply", reply=reply)
        return reply
    except Trouble as trouble:
        failure = trouble.reply
    except OSError as error:
        failure = {"what": "the host refused", "why": str(error), "try": "", "status": 1}
    except Exception:
        import traceback

        what = "the agent failed; this is a bug of rjupyter"
        failure = {"what": what, "why": traceback.format_exc(), "try": "", "status": 1}
    channel.send("reply", failure=failure)
    return {}


# agent ends

# ---------------------------------------------------------------------------------------------------------------------
# server
#
# The laptop's side of the agent: send it a request, hear its lines, check what it says of a server. Everything in a
# reply is data from another machine; only what has the right type and form gets past this room.
# ---------------------------------------------------------------------------------------------------------------------

# Tried in this order by the remote command. python3 may be a shim that fails, or too old: then the next one.
PYTHONS = [
    "python3",
    "/usr/bin/python3",
    "/usr/local/bin/python3",
    '"$HOME"/miniconda3/bin/python3',
    '"$HOME"/anaconda3/bin/python3',
    '"$HOME"/miniforge3/bin/python3',
    '"$HOME"/mambaforge/bin/python3',
    "/opt/conda/bin/python3",
    '"$HOME"/.pyenv/versions/*/bin/python3',
    "/opt/homebrew/bin/python3",
    "/usr/libexec/platform-python",
]
# Takes the last two words of stdin, or of its own arguments: the agent and the request. -I and -S: nothing of the
# user's site gets in, and half of the interpreter's start is saved. Without a quote, for it is quoted twice on its way.
BOOTSTRAP = (
    "import sys; sys.version_info < (3, 6) and sys.exit(99); import binascii, zlib; decode = binascii.a2b_base64; "
    "words = sys.argv[1:] or sys.stdin.buffer.read().split()[-2:] or sys.exit(0); "
    "source, request = [zlib.decompress(decode(word)) for word in words]; exec(source); agent_main(source, request)"
)
NO_PYTHON = "rjupyter: no python3"


def agent_command(python: str = "") -> str:
    """Return the remote command that starts the agent: valid in sh, csh and fish (no `!`, no backslash, no quote).

    `python`, which the user named, comes last, where its name is one that no shell changes.
    """
    pythons = PYTHONS + ([python] if re.fullmatch(r"(~/)?[\w./+][\w./+-]*", python, re.ASCII) else [])
    loop = 'for p in %s; do command -v "$p" >/dev/null 2>&1 || continue; "$p" -IS -c "%s" "$@" && exit; done; echo "%s"'
    return "exec /bin/sh -c '%s' sh" % (loop % (" ".join(pythons), BOOTSTRAP, NO_PYTHON))


def agent_source() -> bytes:
    """Return the agent's room of this file, compressed, as one word."""
    import binascii
    import zlib

    with open(os.path.abspath(__file__), encoding="utf-8") as stream:
        parts = [part.split("\n# agent ends\n")[0] for part in stream.read().split("\n# agent begins\n")[1:]]
    return binascii.b2a_base64(zlib.compress((AGENT_IMPORTS + "\n".join(parts)).encode("utf-8"), 9), newline=False)


def agent_input(command: str, source: bytes, request: Json) -> bytes:
    """Return what `command` reads: one line whose last words are the agent and the request.

    It is a command itself, because a start-up file may have replaced the login shell (`exec fish`) by one that takes
    stdin for its script; and blank lines come first, because a start-up file may read one.
    """
    import binascii
    import zlib

    packed = binascii.b2a_base64(zlib.compress(json.dumps(request).encode()), newline=False)
    words = [command.encode(), source, packed]
    return b"\n\n%s\n" % b" ".join(words)


class Server(NamedTuple):
    """A Jupyter server on the host, as the agent's reply describes it, each field checked."""

    id: str
    pid: int
    app: str
    version: str
    host: str  # the address on the host that it binds
    port: int
    sock: str  # the Unix socket that it listens on instead of a port; empty for none
    no_socket: str  # why there is none although it was asked for
    token: str
    base_url: str
    root_dir: str
    file: str  # the notebook that PATH names, relative to root_dir; empty for none
    is_secure: bool
    has_password: bool
    local_port: int  # the one it was reached by before, or is to be reached by
    node: str  # the host's own name, or that of the node that its job runs on
    job: str  # the id of the job that it runs in; empty for none
    left_s: float  # until the job's time is up; 0 for no limit that we know of
    is_launched: bool  # by this run
    is_only: bool  # no other one of ours runs there
    seconds: float  # the launch took; or, when it ran already, since it was launched

    @classmethod
    def from_reply(cls, reply: Json) -> "Server":
        """Check a reply and return the server in it; raises Failure when a field is not what it must be."""
        reply = dict(
            {"version": "", "no_socket": "", "job": "", "left_s": 0.0},
            seconds=reply.get("start_s", reply.get("age_s", 0.0)),
            **reply,
        )
        hints = cls.__annotations__
        values = {name: reply.get(name) for name in cls._fields}
        wrong = [name for name, value in values.items() if type(value) is not hints[name]]
        if not wrong:
            server = cls(**values)  # type: ignore[arg-type]
            forms = {
                "id": re.fullmatch(r"[0-9a-f]{4}|p[0-9]{1,9}", server.id),
                "app": server.app in APP_NAMES,
                "host": re.fullmatch(r"[\w.:%-]+", server.host) and not server.host.startswith("-"),
                "port": 0 < server.port < 65536 or server.sock,
                "sock": re.fullmatch(r"(/[^\x00-\x1f\x7f:\\%$]+)?", server.sock),  # the rest means more to ssh's -L
                "local_port": 0 < server.local_port < 65536,
                "token": re.fullmatch(r"[^\s\x00-\x1f\x7f]*", server.token),
                "base_url": re.fullmatch(r"/([\w.~%@+-]+/)*", server.base_url),
            }
            wrong = [name for name, is_right in forms.items() if not is_right]
        if wrong:
            raise Failure("the host's reply makes no sense", "wrong in it: " + ", ".join(wrong))
        return server

    @property
    def title(self) -> str:
        """Its name as a person calls it."""
        return ("%s %s" % (APP_NAMES[self.app], self.version)).strip()

    @property
    def target(self) -> str:
        """Where it listens on the host, as ssh's -L writes it."""
        return self.sock or "%s:%d" % ("[%s]" % self.host if ":" in self.host else self.host, self.port)

    def url(self, local_port: int, has_token: bool = True) -> str:
        """Return the address of its page in a browser here, made from checked parts."""
        is_notebook = self.file.endswith(".ipynb")
        if self.app == "lab":
            page = "lab/tree/" + quote_name(self.file) if self.file else "lab"
        elif self.file:
            page = ("notebooks/" if is_notebook else "edit/") + quote_name(self.file)
        else:
            page = "tree"
        query = "?token=" + quote(self.token, safe="") if has_token and self.token else ""
        scheme = "https" if self.is_secure else "http"
        return "%s://127.0.0.1:%d%s%s%s" % (scheme, local_port, quote(self.base_url, safe="/%"), page, query)


def quote_name(name: str) -> str:
    """Return a file name percent-encoded for a URL, byte by byte where it is not UTF-8."""
    return quote(name.encode("utf-8", "surrogateescape"), safe="")


STOPPED_TEXTS = {
    "server": "Stopped %(app)s in %(root_dir)s (pid %(pid)s).",
    "run": "Stopped the execution of %(name)s (%(id)s); its result so far is kept.",
    "job": "Cancelled job %(job)s (%(id)s).",
}


class Agent:
    """Runs actions on the host through the connection, and tells the user how they go."""

    def __init__(self, ssh: Ssh, messages: Messages) -> None:
        self.ssh = ssh
        self.messages = messages
        self.user = ""
        self.node = ""
        self.python = ""
        self.is_root = False
        self.noise: List[str] = []  # what else the host printed in the last conversation
        self._source = b""
        self.greets = True  # says once who and where we are
        ssh.meanwhile = self.prepare

    def prepare(self) -> None:
        """Get ready what can be before there is a connection."""
        self._source = self._source or agent_source()

    def ask(
        self,
        action: str,
        doing: str,
        silence_s: float = SILENCE_TIMEOUT_S,
        take: Optional[Callable[[Json, Callable[[str], None]], None]] = None,
        **request: Any,
    ) -> Json:
        """Run one action on the host and return its reply; raises Failure for its failures, and for silence.

        `take` gets what it tells meanwhile that is not known here, and a function that shows a word on it.
        """
        self.prepare()
        nonce = "rjupyter-" + os.urandom(8).hex()
        command = agent_command(str(request.get("python", "")))
        packed = agent_input(command, self._source, dict(request, action=action, nonce=nonce))
        until = time.monotonic() + CLOSING_TIMEOUT_S
        may_be_asked = self.ssh.can_ask and not self.ssh.control_path  # ssh logs in, and has the terminal
        with self.messages.working(doing, is_animated=not may_be_asked) as show:
            while True:
                child = self.ssh.session(command)
                try:
                    child.send(packed)
                    return self._hear(child, nonce, show, silence_s, take or (lambda message, show: None))
                except SessionRefused:
                    if time.monotonic() > until:
                        raise
                    time.sleep(POLL_S)
                finally:
                    child.end()

    def _hear(
        self,
        child: Child,
        nonce: str,
        show: Callable[[str], None],
        silence_s: float,
        take: Callable[[Json, Callable[[str], None]], None],
    ) -> Json:
        noise = self.noise = []
        has_begun = False
        deadline = time.monotonic() + silence_s
        while True:
            line = child.next_line(deadline - time.monotonic())
            if line is None and child.has_ended:
                raise self._no_reply(noise, child.process.wait(), has_begun)
            if line is None:
                raise Failure(
                    "no answer from " + self.ssh.destination,
                    "the agent said nothing for %d s" % silence_s,
                    self.ssh.plain_command + "   (does it answer?)",
                    EXIT_TIMEOUT,
                )
            if line[0] == "stdout" and line[1].startswith(nonce + " "):
                deadline = time.monotonic() + silence_s
                has_begun = True
                message = json.loads(line[1][len(nonce) + 1 :])
                take(message, show)
                reply = self._take(message, show)
                if reply is not None:
                    return reply
            else:
                noise.append(line[1])
                del noise[:-12]
                self.messages.detail("host: " + line[1])

    def _take(self, message: Json, show: Callable[[str], None]) -> Optional[Json]:
        kind = message.get("kind")
        if kind == "reply" and "failure" in message:
            failure = message["failure"]
            raise Failure(failure["what"], failure["why"], failure["try"], int(failure["status"]))
        if kind == "reply":
            return dict(message["reply"])
        if kind == "hello":
            self._say_hello(message)
        elif kind == "progress":
            show(str(message["text"]))
        elif kind == "line":
            self.messages.result(str(message["text"]), "line", line=message["text"])
        elif kind == "found":
            self._say_found(message)
        elif kind == "installing":
            text = "No Jupyter on the host; installing it in %(path)s (%(tool)s)." % message
            self.messages.step(text, "installing", path=message["path"], tool=message["tool"])
        elif kind == "installed":
            text = "Installed Jupyter (%.0f s)." % message["elapsed_s"]
            self.messages.step(text, "installed", path=message["path"], seconds=message["elapsed_s"])
        elif kind == "stopped":
            text = STOPPED_TEXTS[str(message["what"])] % dict(
                message, app=APP_NAMES.get(str(message["app"]), "Jupyter")
            )
            facts = {name: message[name] for name in STOPPED_FACTS if message[name]}
            self.messages.step(text, "stopped", what=message["what"], **facts)
        return None

    def _say_hello(self, message: Json) -> None:
        self.user, self.node = str(message["user"]), str(message["node"])
        self.python = str(message["python"])
        self.is_root = message["is_root"] is True
        if not self.greets:
            return
        self.greets = False
        text = "Connected to %s (%s@%s, python %s)." % (self.ssh.destination, self.user, self.node, message["python"])
        self.messages.step(text, "connected", user=self.user, node=self.node, python=message["python"])

    def _say_found(self, message: Json) -> None:
        for line in message["tried"]:
            self.messages.detail("looked at " + line)
        text = "Using %s (%s)." % (message["command"], message["where"])
        if message["where"] != "PATH":
            self.messages.note(text)
        else:
            self.messages.detail(text)

    def _no_reply(self, noise: List[str], status: int, has_begun: bool) -> Failure:
        host = self.ssh.destination
        if NO_PYTHON in noise:
            what = "no python3 on " + host
            why = "the host needs Python 3.6 or newer; tried: " + ", ".join(PYTHONS).replace('"', "")
            return Failure(what, why, "install python3 there, or put it on PATH in ~/.bashrc", EXIT_NO_JUPYTER)
        if not self.ssh.control_path and status == EXIT_SSH and any(map(FATAL_WORDS.match, noise)):
            return self.ssh.connect_failure(noise)
        why = "\n".join(noise) or "the remote command ended with status %d and said nothing" % status
        if has_begun or not self.ssh.wait(0.2):
            words = noise[-1] if has_begun and noise else self.ssh.last_words
            return Failure("the connection to %s ended" % host, words, "", EXIT_SSH)
        if any("Session open refused" in text or "session request failed" in text for text in noise):
            return SessionRefused("%s opens no session" % host, why, "MaxSessions in its sshd_config", EXIT_SSH)
        why += "\nthe login shell there did not come to our command; a start-up file (~/.bashrc) may leave early"
        try_ = self.ssh.plain_command + "   (must succeed)"
        return Failure("the agent did not run on " + host, why, try_)


# ---------------------------------------------------------------------------------------------------------------------
# tunnel
#
# The local end: a port, the forward, the proof that our own server answers through it, the browser, and the hold.
# ---------------------------------------------------------------------------------------------------------------------


class Tunnel:
    """A forward from a local port to a server, held until the connection or the server ends."""

    def __init__(self, ssh: Ssh, agent: Agent, server: Server, messages: Messages) -> None:
        self.ssh = ssh
        self.agent = agent
        self.server = server
        self.messages = messages
        self.local_port = 0
        self._ends_at = time.monotonic() + server.left_s if server.left_s else float("inf")

    def open(self, fixed_port: Optional[int]) -> None:
        """Forward a local port to the server: `fixed_port` and no other, or the first free one."""
        port = fixed_port or self._usual_port()
        while True:
            if not fixed_port:
                port = find_free_port(port)
            is_open, words = self.ssh.forward(port, self.server.target)
            if is_open:
                self.local_port = port
                return
            if not self.ssh.wait(0.1):
                raise Failure("the connection to %s ended" % self.ssh.destination, self.ssh.last_words, "", EXIT_SSH)
            if fixed_port:
                why = "127.0.0.1:%d is taken on this machine" % port
                raise Failure("cannot listen on local port %d" % port, why, "another --local-port, or none")
            if "forwarding request failed" not in words:
                raise Failure("cannot forward a port", words, "-v shows every ssh command")
            port += 1  # taken between the look and ssh's bind

    def close(self) -> None:
        """Take the forward away; the connection stays."""
        self.ssh.cancel("127.0.0.1:%d:%s" % (self.local_port, self.server.target))

    def _usual_port(self) -> int:
        usual = self.server.local_port
        return usual if find_free_port(usual) == usual else LOCAL_PORT

    def check(self) -> None:
        """Ask the server for its status through the tunnel; only one that takes our token is ours.

        Raises Failure with the cause when it does not.
        """
        destination = self.ssh.destination
        try:
            status = self.probe(ANSWER_TIMEOUT_S)
        except socket.timeout:
            why = "no answer through the tunnel within %d s" % ANSWER_TIMEOUT_S
            raise Failure("Jupyter does not answer", why, self._another(), EXIT_TIMEOUT) from None
        except OSError as error:
            what = "%s does not forward to %s" % (destination, self.server.target)
            if self.server.sock:
                why = "its sshd may forbid it (AllowStreamLocalForwarding); the server runs: %s" % self.server.id
                raise Failure(what, why, "stop it, then open without --socket") from None
            can_reach, words = self.ssh.can_reach(self.server.target)
            if can_reach:
                raise Failure("Jupyter does not answer", str(error), self._another(), EXIT_SERVER_ENDED) from None
            try_ = "AllowTcpForwarding and PermitOpen in its sshd_config; ask its administrator"
            if self.server.job:
                try_ += "\n--via-node, where users may ssh to the nodes of their jobs"
            raise Failure(what, words, try_) from None
        if status not in self._good_statuses:
            what = "a stranger answers on port %d of %s" % (self.server.port, destination)
            raise Failure(what, "it does not take our token (HTTP status %d)" % status, self._another())

    @property
    def _good_statuses(self) -> Tuple[int, ...]:
        """What our own server answers: with a password and no token, it cannot take ours."""
        return (401, 403) if self.server.has_password and not self.server.token else (200,)

    def probe(self, timeout_s: float) -> int:
        """Return the HTTP status of /api/status through the tunnel; OSError when there is none."""
        path = self.server.base_url + STATUS_PATH
        server = self.server
        address = ("127.0.0.1", self.local_port)
        return http_request(address, path, server.token, timeout_s, is_secure=server.is_secure)[0]

    def _another(self) -> str:
        return command_line("--new", *self.ssh.options, self.ssh.destination) + "   (starts another)"

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
                    try_ = command_line(*sys.argv[1:])
                    raise Failure("the connection to %s was lost" % self.ssh.destination, why, try_, EXIT_SSH)
                self._redial(why)
        finally:
            self.ssh.can_ask = could_ask

    def _watch(self) -> str:
        """Wait until the connection is lost, or stuck, and return why; raises Failure (4) when the server has ended.

        Whatever happens to ssh's own idea of the connection, only an answer through it counts.
        """
        is_silent = False
        self._wake_at_end()
        while self.ssh.wait(PROBE_EVERY_S):
            self._warn_of_limit()
            if self._is_answering():
                if is_silent:
                    self.messages.step("%s answers again." % self.server.title, "answering", id=self.server.id)
                is_silent = False
                continue
            if not self.ssh.wait(0.2):
                break
            try:
                state = self.agent.ask("describe_end", "", CHECK_TIMEOUT_S, id=self.server.id)
            except Failure as failure:
                return failure.why.splitlines()[-1] if failure.why else failure.what
            self._check_end(state)
            if state.get("is_answering") is not True:
                if not is_silent:
                    text = "%s does not answer; its connection is well. Waiting." % self.server.title
                    self.messages.step(text, "silent", id=self.server.id)
                is_silent = True
            elif not self._is_answering():
                return "nothing comes through the tunnel"
        return self.ssh.last_words

    def _warn_of_limit(self) -> None:
        """Say once when the time of the server's job is up soon."""
        left_s = self._ends_at - time.monotonic()
        if left_s < WARN_BEFORE_END_S:
            self._ends_at = float("inf")
            text = "%s left for %s on %s: save what you need." % (
                _duration(left_s),
                self.server.title,
                self.server.node,
            )
            self.messages.step(text, "ending", id=self.server.id, left_s=left_s)

    def _wake_at_end(self) -> None:
        """Keep a connection to the server that says nothing: its end tells at once that the server may have ended."""

        def hear() -> None:
            with contextlib.suppress(OSError):
                address = ("127.0.0.1", self.local_port)
                with socket.create_connection(address, timeout=PROBE_TIMEOUT_S) as connection:
                    connection.settimeout(None)
                    connection.recv(1)
                    self.ssh.wake()

        threading.Thread(target=hear, daemon=True).start()

    def _is_answering(self) -> bool:
        try:
            return self.probe(PROBE_TIMEOUT_S) in self._good_statuses
        except OSError:
            return False

    def _check_end(self, state: Json) -> None:
        if state.get("is_running") is not True:
            what = "%s on %s has ended" % (self.server.title, self.ssh.destination)
            why = str(state.get("reason"))
            why += "; the end of its log:\n%s" % state["log"] if state.get("log") else ""
            try_ = command_line(*self.ssh.options, self.ssh.destination) + "   (starts another)"
            raise Failure(what, why, try_, EXIT_SERVER_ENDED)

    def _redial(self, why: str) -> None:
        """Connect again, until the same local port leads to the server again; nobody else gets it meanwhile."""
        with contextlib.closing(Reserved(self.local_port)) as reserved:

            def resume() -> bool:
                reserved.close()
                with contextlib.ExitStack() as stack:
                    stack.callback(reserved.take)
                    stack.callback(self.ssh.close)
                    if self._comes_through():
                        stack.pop_all()
                        return True
                return False

            self.ssh.reconnect(why, resume, local_port=self.local_port)
        self.ssh.quicken()

    def _comes_through(self) -> bool:
        """Forward again, and say whether the server answers there; raises Failure (4) when it has ended."""
        is_open, words = self.ssh.forward(self.local_port, self.server.target)
        if not is_open:
            raise Failure("cannot listen on local port %d" % self.local_port, words)
        if self._is_answering():
            return True
        state = self.agent.ask("describe_end", "", CHECK_TIMEOUT_S, id=self.server.id)
        if state.get("is_elsewhere") is True:  # one name for several login nodes
            raise Failure(
                "this is another node of " + self.ssh.destination, "the server runs on %s" % state.get("node")
            )
        self._check_end(state)
        return state.get("is_answering") is not True  # it hangs by itself; the connection is well


class Reserved:
    """Keeps others off a local port while no ssh listens on it, as far as it is free."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._listener: Optional[socket.socket] = None
        self.take()

    def take(self) -> None:
        """Take the port, if it is free."""
        if not self._listener:
            with contextlib.suppress(OSError):
                self._listener = listen_on(self.port)

    def close(self) -> None:
        """Let it go."""
        if self._listener:
            self._listener.close()
            self._listener = None


def open_browser(url: str, command: Optional[str], messages: Messages) -> threading.Thread:
    """Open `url` in a browser here without handing it over in an argv, where others could read the token.

    The browser gets the address of a listener of ours, which sends it on, once. Does not wait: the thread that is
    returned ends when the browser has come.
    """
    listener = listen_on(0)
    listener.settimeout(BROWSER_TIMEOUT_S)
    secret = "/" + os.urandom(16).hex()
    redirect = threading.Thread(target=_redirect_once, args=(listener, secret, url), daemon=True)
    redirect.start()
    # In a process and a session of its own: the browser must outlive our Ctrl-C, and not write on our terminal.
    script = "import sys, webbrowser; sys.exit(not webbrowser.get(sys.argv[2] or None).open(sys.argv[1]))"
    address = "http://127.0.0.1:%d%s" % (listener.getsockname()[1], secret)
    opener = subprocess.Popen(
        [sys.executable, "-c", script, address, command or ""],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def complain() -> None:
        if opener.wait():
            messages.note("No browser could be started; open the address above.")
            listener.shutdown(socket.SHUT_RDWR)  # nobody will come

    threading.Thread(target=complain, daemon=True).start()
    return redirect


def _redirect_once(listener: socket.socket, secret: str, url: str) -> None:
    """Answer the one request for `secret` with a redirect to `url`; browsers also come for nothing, or an icon."""
    with contextlib.suppress(OSError), listener:
        while True:
            connection, peer = listener.accept()
            with contextlib.suppress(OSError), connection:
                connection.settimeout(5)
                words = connection.recv(65536).split(None, 2)
                # The secret stood in the browser's argv. WSL's own relay, which runs as root, comes for Windows.
                is_ours = owner_of_tcp(peer, listener.getsockname()[1]) in (None, 0, own_uid())
                if is_ours and len(words) > 1 and words[1] == secret.encode():
                    head = "HTTP/1.1 302 Found\r\nLocation: %s\r\nCache-Control: no-store\r\nContent-Length: 0\r\n"
                    connection.sendall(((head + "Connection: close\r\n\r\n") % url).encode())
                    return
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


# -- tunnels that are up ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_down(facts: Json) -> Iterator[None]:
    """Keep a record of our tunnel while it is up, for a second copy of us and for `close`; where there is a place."""
    try:
        path = os.path.join(private_runtime_dir(), "%d.json" % os.getpid())
    except Failure:
        yield
        return
    try:
        write_private(path, json.dumps(dict(facts, pid=os.getpid(), identity=process_identity(os.getpid()))))
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def tunnels() -> List[Json]:
    """Return the records of our tunnels that are up; those of processes that are gone are removed."""
    records = []
    for path in [os.path.join(directory, name) for directory in record_dirs() for name in os.listdir(directory)]:
        match = re.fullmatch(r"([1-9]\d*)\.json(\.\d+)?", os.path.basename(path))  # the latter: being written
        if not match:
            continue
        record = read_json(path)
        identity = process_identity(int(match.group(1)))
        if not identity or record.get("identity", identity) != identity:
            with contextlib.suppress(OSError):
                os.unlink(path)
        elif record and not match.group(2):
            records.append(record)
    return records


def close_tunnels(destination: str, path: Optional[str], messages: Messages) -> None:
    """End the background tunnels to `destination`; those for `path` alone when there is one."""
    closed = 0
    for record in tunnels():
        if record["is_background"] and record["destination"] == destination and path in (None, record["path"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(record["pid"], signal.SIGTERM)
            deadline = time.monotonic() + CONTROL_TIMEOUT_S
            while process_identity(record["pid"]) == record["identity"]:
                if time.monotonic() > deadline:
                    why = "process %d did not end within %d s" % (record["pid"], CONTROL_TIMEOUT_S)
                    raise Failure("cannot close the tunnel", why, "kill -9 %d" % record["pid"])
                time.sleep(POLL_S)
            text = "Closed the tunnel on 127.0.0.1:%d." % record["local_port"]
            messages.step(text, "closed", local_port=record["local_port"], tunnel_pid=record["pid"])
            closed += 1
    if not closed:
        messages.note("No tunnel to %s in the background." % destination)


class Background:
    """Going to the background like `ssh -f`: the child works on the terminal until the tunnel is up, then lets it go.

    The fork comes first, so that ssh is a child of the process that will hold it.
    """

    def __init__(self) -> None:
        self._ready, ready = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(ready)
        else:
            os.close(self._ready)
            self._ready = ready

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
# execute
#
# A notebook that is run to its end on the host, and its result here. The first half lives on the host: a process of
# its own, under the Python of Jupyter's environment, lets nbclient execute the notebook and writes down what happens,
# cell by cell. The second half follows that journal from here; whoever read it to the end has the result.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins

RUN_TYPES = {"pid": int, "identity": str, "node": str, "created": float, "name": str, "key": str, "root_dir": str}
PART_BYTES = 131072  # of a journal, sent in one message
FOLLOW_MAX_S = 0.5  # the longest pause between two looks at it
STOP_TIMEOUT_S = 10  # for a cell that was interrupted
CANNOT_RUN = 127  # a shell's own status for a command that is not there


def run_records() -> "List[Json]":
    """Return the records of the runs that are kept, newest first."""
    return kept_records("runs", RUN_TYPES)


def running_runs() -> "List[Json]":
    """Return the records of the runs that have not ended, here or in a job of ours.

    One that wrote down its outcome has ended, though its process may take a moment more.
    """
    return [r for r in run_records() if is_running(r) and describe_run(r)["state"] in ("starting", "running")]


def start_run(request: "Json", channel: Channel) -> "Json":
    """Start to execute a notebook, detached, and return the run's record; or that of a run that has it in hand."""
    root_dir = resolve_path(request["path"])[0] if request["path"] is not None else os.path.expanduser("~")
    key, text, place = request["key"], request["notebook"], ""
    if request["file"]:
        place = os.path.join(root_dir, os.path.expanduser(native(request["file"])))
        key, text = "host:" + portable(os.path.realpath(place)), text or read_notebook(place)
    details = dict(request, path=portable(root_dir), key=key, notebook=text)
    details["place"] = portable(place) if request["is_in_place"] else ""
    with one_at_a_time(own_tmp_dir(), channel, "another run of ours is started; waiting"):
        same = []  # type: List[Json]
        if not request["overlaps"]:
            same = [record for record in running_runs() if record["key"] == key] + waiting_jobs(details)
        if same:
            return dict(same[0], is_started=False, age_s=age_of(same[0]))
        forget_ended("runs", running_runs())
        if not request["scheduler"]:
            return dict(launch(details, root_dir, channel, launch_run), is_started=True)
        job = submit_job(details, channel)
    return dict(wait_for_job(job, channel), is_started=True)


def read_notebook(path: str) -> str:
    """Return the text of a notebook on this host; raises Trouble when there is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Trouble(1, "cannot read %s on the host" % portable(path), str(error))


def launch_run(found: "Json", request: "Json", root_dir: str, channel: Channel) -> "Json":
    """Start a run in one environment and return its record; empty where that has no nbclient."""
    import shutil

    python = interpreter_of(found)
    if not python:
        return {}
    directory = new_dir("runs", "r")
    program = leave_agent(directory, "run_main", dict(request, directory=root_dir))
    log = os.path.join(directory, "log")
    environment = lasting_environment(found["environment"], False)
    process = start_detached([python, program], environment, root_dir, log, bool(request.get("job")))
    record = {
        "pid": process.pid,
        "identity": process_identity(process.pid),
        "node": os.uname().nodename,
        "created": time.time(),
        "name": request["name"],
        "key": request["key"],
        "root_dir": portable(root_dir),
        "job": request.get("job", ""),
    }
    write_private(record_path(directory), json.dumps(record))
    while process.poll() is None and not os.path.exists(os.path.join(directory, "journal")):
        channel.keep_alive()
        time.sleep(POLL_S)
    if process.poll() == CANNOT_RUN:
        shutil.rmtree(directory, ignore_errors=True)
        return {}
    return dict(record, id=os.path.basename(directory), directory=directory)


def leave_agent(directory: str, main: str, request: "Json") -> str:
    """Leave our own source in a directory of a run or a job, with a request beside it, and return the program.

    It calls `main`, run_main or job_main, with the directory.
    """
    program = os.path.join(directory, "agent.py")
    write_private(program, "%s\n%s(%r)\n" % (request["source"], main, directory))
    write_private(os.path.join(directory, "request.json"), json.dumps(dict(request, source="")))
    return program


def interpreter_of(found: "Json") -> str:
    """Return the Python behind a way to run Jupyter: the one that its script names, else the one beside it.

    Empty where there is none. Besides the plain #! line there is pip's form for long names: sh, then '''exec'.
    """
    import re
    import shutil

    command, *others = found["argv"]
    if others:
        return str(command)  # PYTHON -m notebook
    try:
        with open(command, "rb") as stream:
            head = os.fsdecode(stream.read(1024))
    except OSError:
        head = ""
    named = re.match(r"#!\s*(/\S*/python[\d.]*)\s", head) or re.search(r"'''exec' \"?([^\"\n]*/python[\d.]*)\"? ", head)
    by_env = re.match(r"#!\s*/\S*/env\s+(?:-S\s+)?(python[\d.]*)\s", head)
    places = [named.group(1)] if named else []
    places += [shutil.which(by_env.group(1), path=found["environment"]["PATH"]) or ""] if by_env else []
    places += [os.path.join(os.path.dirname(command), name) for name in ("python3", "python")]
    return next((place for place in places if not problem_of(place)), "")


def follow_run(request: "Json", channel: Channel) -> "Json":
    """Send what the files of a run hold beyond the given offsets, as it comes, until it has ended; say how it ended."""
    identity = request["id"]
    for job in job_records():
        if job["id"] == identity:
            identity = wait_for_job(job, channel).get("id")
    known = [record for record in run_records() if record["id"] == identity]
    if not known:
        what = "no run of yours has this id: " + request["id"]
        raise Trouble(1, what, "ended runs are kept for %d days" % (KEEP_ENDED_S // 86400), "list shows the ids")
    record = known[0]
    offsets = dict(request["offsets"])
    state = {}  # type: Json
    pause_s = POLL_S
    while not channel.is_closed:
        state = describe_run(record)  # before the look at its files: what it wrote last is seen
        sent = [send_part(record, name, offsets, channel) for name in offsets]
        if any(sent):
            pause_s = POLL_S
        elif state["state"] not in ("starting", "running"):
            break
        else:
            channel.keep_alive()
            time.sleep(pause_s)
            pause_s = min(FOLLOW_MAX_S, 1.5 * pause_s)
    return state


def send_part(record: "Json", name: str, offsets: "Dict[str, int]", channel: Channel) -> int:
    """Send the next bytes of one file of a run, and return how many."""
    import binascii
    import zlib

    try:
        with open(os.path.join(record["directory"], name), "rb") as stream:
            stream.seek(offsets[name])
            part = stream.read(PART_BYTES)
    except OSError:
        return 0
    if part:
        channel.send("part", file=name, data=binascii.b2a_base64(zlib.compress(part)).decode("ascii"))
        offsets[name] += len(part)
    return len(part)


def describe_run(record: "Json") -> "Json":
    """Say how a run does: its state in a word, where it stands, the size of its journal in bytes, and its age."""
    found = {name: record[name] for name in ("id", "pid", "node", "name", "root_dir")}
    found.update(cell=0, count=0, error="", age_s=age_of(record))
    has_ended = (is_here(record) or job_of(record)) and not is_running(record)
    state = read_json(os.path.join(record["directory"], "state.json"))
    found.update({name: value for name, value in state.items() if name in ("cell", "count", "error")})
    found["state"] = state.get("outcome") or ("killed" if has_ended else "running" if state else "starting")
    if found["state"] == "killed":
        job = job_of(record)
        found["error"] = why_job_ended(job_state(job)) if job else why_nothing(record["directory"])
    try:
        found["size"] = os.stat(os.path.join(record["directory"], "journal")).st_size
    except OSError:
        found["size"] = 0
    return found


def why_nothing(directory: str) -> str:
    """Return why a run ended without a word: an error of its own that ends its log, a full disk, or a signal."""
    import re
    import shutil

    last_line = end_of_log(os.path.join(directory, "log"), 1)
    if re.match(r"\w+(Error|Exception)\b", last_line):
        return last_line
    is_full = shutil.disk_usage(directory).free < PART_BYTES
    return "the disk is full" if is_full else "it was killed, by hand or for want of memory"


def stop_run(record: "Json") -> None:
    """End a run: interrupt its cell, so that what it has is kept; then TERM, then KILL. No kernel outlives it."""
    import signal

    write_private(os.path.join(record["directory"], "stop"), "")
    if not is_here(record):  # the agent in its job sees the file
        wait_for_outcome(record)
        cancel_job(job_of(record))
    kernels = kernels_of(record)
    for pid, _ in kernels:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGINT)
    wait_for_end(record, STOP_TIMEOUT_S)
    end_process(record, kernels)


def wait_for_outcome(record: "Json") -> None:
    """Wait until a run on another node has written down how it ended."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while describe_run(record)["state"] in ("starting", "running") and time.monotonic() < deadline:
        time.sleep(POLL_S)


class Stopped(Exception):
    """The run was told to stop, between two cells."""


class Run:
    """The execution of one notebook, under the Python of Jupyter's environment; its journal tells what happened.

    The journal is a line of JSON for each event: "begin" with the notebook, "start" and "cell" for each cell that is
    executed, "end" with the notebook's metadata. Cells are written as in a file, so they need no Jupyter to be read.
    """

    def __init__(self, directory: str, nbformat: "Any") -> None:
        self.directory = directory
        self.nbformat = nbformat
        with open(os.path.join(directory, "request.json")) as stream:
            self.request = json.load(stream)  # type: Json
        timeout_s = self.request["timeout_s"]
        self.deadline = time.monotonic() + timeout_s if timeout_s else None  # type: Optional[float]
        self.state = {"outcome": "", "cell": 0, "count": 0, "error": ""}  # type: Json
        self.notebook = nbformat.reads(self.request["notebook"], as_version=4)
        self.kernel, self.missing = self._choose_kernel()
        self._inject_parameters()
        code = [index for index, cell in enumerate(self.notebook.cells) if self._has_code(cell)]
        self.numbers = {index: number for number, index in enumerate(code, 1)}
        self.state["count"] = len(code)
        self._written = {}  # type: Dict[int, str]
        self._began = 0.0
        descriptor = os.open(os.path.join(directory, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._output = os.fdopen(descriptor, "ab", 0)

    @staticmethod
    def _has_code(cell: "Any") -> bool:
        return bool(cell.cell_type == "code" and cell.source.strip())

    def _choose_kernel(self) -> "Tuple[str, str]":
        """Return the kernel to take, and the one that was wanted and is not there."""
        from jupyter_client.kernelspec import KernelSpecManager

        spec = self.notebook.metadata.get("kernelspec", {})
        wanted = self.request["kernel"] or spec.get("name") or "python3"
        if wanted in KernelSpecManager().find_kernel_specs():
            return wanted, ""
        language = self.notebook.metadata.get("language_info", {}).get("name") or spec.get("language") or "python"
        if language.lower() != "python" and not self.request["kernel"]:
            raise ValueError("it is written in %s, and there is no kernel %s on the host" % (language, wanted))
        return "python3", wanted

    def _inject_parameters(self) -> None:
        """Put the parameters behind the cell that is tagged "parameters", in place of an earlier injection.

        As papermill does it (papermill.readthedocs.io, "Parameterize"); without such a cell, at the top.
        """
        if not self.request["parameters"]:
            return
        lines = ["%s = %s" % (name, python_literal(value)) for name, value in self.request["parameters"]]
        cell = self.nbformat.v4.new_code_cell(
            "\n".join(["# Parameters"] + lines), metadata={"tags": ["injected-parameters"]}
        )
        if self.notebook.nbformat_minor < 5:
            cell.pop("id", None)
        cells = self.notebook.cells
        tagged = {}  # type: Dict[str, int]
        for index, other in enumerate(cells):
            for tag in other.metadata.get("tags", []):
                tagged.setdefault(tag, index)
        if "injected-parameters" in tagged:
            cells[tagged["injected-parameters"]] = cell
        else:
            cells.insert(tagged.get("parameters", -1) + 1, cell)

    # -- the journal --

    def as_in_file(self, cells: "List[Any]") -> "Json":
        """Return a notebook of these cells in the form that a file has: texts as lists of lines."""
        parts = {"metadata": self.notebook.metadata, "nbformat": 4, "nbformat_minor": self.notebook.nbformat_minor}
        return dict(json.loads(self.nbformat.v4.writes(self.nbformat.from_dict(dict(parts, cells=cells)))))

    def tell(self, kind: str, **facts: "Any") -> None:
        """Write a line of the journal. A new one appears with its first line in it."""
        path = os.path.join(self.directory, "journal")
        line = json.dumps(dict(facts, kind=kind)) + "\n"
        if not os.path.exists(path):
            write_private(path, line)
        else:
            with open(path, "a") as journal:
                journal.write(line)

    def keep_state(self, **facts: "Any") -> None:
        """Write down where the run stands, for who asks in passing."""
        self.state.update(facts)
        write_private(os.path.join(self.directory, "state.json"), json.dumps(self.state))

    def begin(self) -> None:
        """Write down what is going to be executed."""
        self.keep_state()
        self.tell("begin", notebook=self.as_in_file(self.notebook.cells), kernel=self.kernel, missing=self.missing)

    def before_cell(self, index: int, engine: "Any") -> None:
        """Called before each cell: write it down, and give the engine the time that is left."""
        if os.path.exists(os.path.join(self.directory, "stop")):
            raise Stopped()
        self._began = time.monotonic()
        if index in self.numbers:
            self.keep_state(cell=self.numbers[index])
            self.tell("start", cell=self.numbers[index], count=self.state["count"])
        if self.deadline is not None:
            engine.timeout = max(1, int(self.deadline - time.monotonic() + 0.999))

    def after_cell(self, index: int, is_done: bool) -> None:
        """Called after each cell, however it ended: its result is in the journal before the next one begins."""
        if index in self.numbers:
            seconds = time.monotonic() - self._began
            facts = {"cell": self.numbers[index], "count": self.state["count"]}
            self._write_cell(index, seconds=seconds, is_done=is_done, **facts)

    def _write_cell(self, index: int, **facts: "Any") -> None:
        content = self.as_in_file([self.notebook.cells[index]])["cells"][0]
        written = json.dumps(content, sort_keys=True)
        if self._written.get(index) != written:
            self._written[index] = written
            self.tell("cell", index=index, content=content, **facts)

    def print_stream(self, message: "Json") -> None:
        """Keep what a cell prints while it runs, for who watches."""
        if message["msg_type"] == "stream":
            self._output.write(message["content"]["text"].encode("utf-8", "replace"))

    def end(self, outcome: str, error: str) -> None:
        """Write down how it ended; cells whose displays a later one changed are written again."""
        for index in self.numbers:
            if index in self._written:
                self._write_cell(index)
        metadata = self.as_in_file([])["metadata"]
        error = error[:1000]
        if self.request["place"]:
            self._write_in_place()
        self.tell("end", metadata=metadata, outcome=outcome, error=error)
        self.keep_state(outcome=outcome, error=error)

    def _write_in_place(self) -> None:
        import shutil

        place = native(self.request["place"])
        beside = os.path.join(os.path.dirname(place), ".%s.%d" % (os.path.basename(place), os.getpid()))
        self.nbformat.write(self.notebook, beside)
        shutil.copymode(place, beside)
        os.replace(beside, place)


def python_literal(value: "Any") -> str:
    """Return a parameter as Python source."""
    is_odd = isinstance(value, float) and (value != value or abs(value) == float("inf"))
    return 'float("%s")' % value if is_odd else repr(value)


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
        said = {"outcome": "invalid", "cell": 0, "count": 0, "error": str(error).strip().split("\n")[0]}
        write_private(os.path.join(directory, "state.json"), json.dumps(said))
        write_private(os.path.join(directory, "journal"), "")
        return
    run.begin()
    run.end(*outcome_of(run, nbclient))


def outcome_of(run: Run, nbclient: "Any") -> "Tuple[str, str]":
    """Let nbclient execute a run's notebook; return how that ended, in a word, and the error's last line."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    class Engine(nbclient.NotebookClient):  # type: ignore[misc]
        """The engine, with a word to the journal around each cell."""

        async def async_execute_cell(self, cell: "Any", cell_index: int, *arguments: "Any", **options: "Any") -> "Any":
            run.before_cell(cell_index, self)
            is_done = False
            try:
                cell = await super().async_execute_cell(cell, cell_index, *arguments, **options)
                is_done = True
                return cell
            except (CellTimeoutError, DeadKernelError):
                self.shutdown_kernel = "immediate"  # it would not hear a polite word
                raise
            finally:
                run.after_cell(cell_index, is_done)

        def output(self, outs: "Any", msg: "Any", display_id: "Any", cell_index: "Any") -> "Any":
            run.print_stream(msg)
            return super().output(outs, msg, display_id, cell_index)

    resources = {"metadata": {"path": native(run.request["directory"])}}
    engine = Engine(run.notebook, timeout=None, kernel_name=run.kernel, resources=resources)
    try:
        engine.execute()
        return "done", ""
    except Exception as error:
        place = "in cell %(cell)d of %(count)d" % run.state
        if os.path.exists(os.path.join(run.directory, "stop")):
            return "stopped", place
        if isinstance(error, CellTimeoutError):
            return "timeout", "its time was up " + place
        if isinstance(error, DeadKernelError):
            return "died", "it was killed, by hand or for want of memory"
        if isinstance(error, CellExecutionError):
            return "failed", ("%s: %s" % (error.ename, error.evalue)).strip().split("\n")[-1]
        import traceback

        traceback.print_exc()  # the kernel did not start, the disk is full
        return "failed", "%s: %s" % (type(error).__name__, str(error).strip().split("\n")[-1])


# agent ends


class Source(NamedTuple):
    """A notebook to execute: its text, or for one on the host its name there; and where its result goes here."""

    name: str
    text: str
    output: str  # empty for one on the host that is executed in place

    @property
    def is_on_host(self) -> bool:
        """True when it is on the host already."""
        return self.name.startswith(":")

    @property
    def key(self) -> str:
        """What tells it from other notebooks, so that two runs of one do not overlap."""
        return "" if self.is_on_host else "%s:%s" % (socket.gethostname(), os.path.realpath(self.name))

    @classmethod
    def from_argument(cls, name: str, output: Optional[str], is_in_place: bool) -> "Source":
        """Read the notebook that an argument names; raises Failure when there is none, or no room for its result."""
        if name.startswith(":"):
            default = "" if is_in_place else executed_name(os.path.basename(name[1:]))
            source = cls(name, "", output or default)
        else:
            source = cls(name, read_local_notebook(name), output or (name if is_in_place else executed_name(name)))
        directory = os.path.dirname(source.output) or "."
        if source.output and not os.access(directory, os.W_OK):
            why = "there is no directory %s here, or it cannot be written" % directory
            raise Failure("no place for the result " + source.output, why, "execute ... -o FILE")
        return source


def executed_name(name: str) -> str:
    """Return where the result of a notebook goes: train.ipynb becomes train.executed.ipynb."""
    return (name[: -len(".ipynb")] if name.endswith(".ipynb") else name) + ".executed.ipynb"


def read_local_notebook(path: str) -> str:
    """Return the text of a notebook here; raises Failure when it is none."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            text = stream.read()
        notebook = json.loads(text)
    except OSError as error:
        raise Failure("cannot read " + path, str(error), "for one on the host, write :%s" % path) from None
    except (ValueError, RecursionError) as error:
        raise Failure("%s is not a notebook" % path, "it is no JSON: %s" % error) from None
    if not isinstance(notebook, dict) or "nbformat" not in notebook:
        raise Failure("%s is not a notebook" % path, "it has no nbformat")
    return text


def parse_parameter(text: str) -> Tuple[str, Any]:
    """Split NAME=VALUE, the value typed as YAML 1.2 reads it (core schema; a list or map as in JSON).

    Raises ValueError with the reason.
    """
    import keyword

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError("a parameter is NAME=VALUE, with a name that Python takes, not %r" % text)
    if value in ("", "~", "null", "Null", "NULL"):
        return name, None
    if value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return name, value.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", value):
        return name, int(value)
    if re.fullmatch(r"0o[0-7]+|0x[0-9a-fA-F]+", value):
        return name, int(value, 0)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", value):
        return name, float(value)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", value):
        return name, float(value.replace(".", ""))
    if value[0] in '[{"':
        try:
            return name, json.loads(value)
        except ValueError as error:
            raise ValueError("%s is not the JSON that it begins as: %s" % (text, error)) from None
    if len(value) > 1 and value[0] == value[-1] == "'":
        return name, value[1:-1].replace("''", "'")
    return name, value


class Execution:
    """A run on the host, followed from here: what its journal tells is shown, and makes the result."""

    def __init__(self, identity: str, name: str, output: Optional[str], agent: Agent, messages: Messages) -> None:
        self.id = identity
        self.name = name
        self.output = output  # None: beside us, under a name that follows from the notebook's
        self.agent = agent
        self.messages = messages
        self.notebook: Json = {}
        self.seconds = 0.0
        self.queue = Queue(agent, messages)
        names = ["output", "journal"] if messages.verbose else ["journal"]
        self._offsets = dict.fromkeys(names, 0)
        self._rest = {name: bytearray() for name in names}

    def follow(self, redials: bool) -> None:
        """Follow the run to its end, and write its result; a lost connection is dialled again when it `redials`.

        Raises Failure: 5 when a cell failed, 6 when its time was up, 255 when the connection is lost.
        """
        while True:
            try:
                doing = "Executing " + self.name if self.messages.has_spinner else ""
                offsets = self._offsets
                reply = self.agent.ask("follow_run", doing, take=self._take, id=self.id, offsets=offsets)
                break
            except Failure as failure:
                if failure.status not in (EXIT_SSH, EXIT_TIMEOUT) or not redials:
                    raise
                why = failure.why.splitlines()[-1] if failure.why else failure.what
                self.agent.ssh.reconnect(why, self._is_there)
        self._finish(reply)

    def _is_there(self) -> bool:
        self.agent.ask("describe_end", "", CHECK_TIMEOUT_S, id=self.id)
        return True

    def _take(self, message: Json, show: Callable[[str], None]) -> None:
        """Take a part of a file of the run; each line that it completes is an event, or what a cell printed."""
        import binascii
        import zlib

        self.queue.take(message, show)
        if message.get("kind") != "part" or message.get("file") not in self._offsets:
            return
        name = str(message["file"])
        part = zlib.decompress(binascii.a2b_base64(str(message["data"])))
        self._offsets[name] += len(part)
        *lines, rest = part.split(b"\n")
        for line in lines:
            whole = bytes(self._rest[name] + line)
            self._rest[name] = bytearray()
            if name == "output":
                self.messages.detail(whole.decode("utf-8", "replace").rpartition("\r")[2])
            else:
                self._take_event(json.loads(whole.decode("utf-8")), show)
        self._rest[name] += rest

    def _take_event(self, event: Json, show: Callable[[str], None]) -> None:
        kind, number, count = event.get("kind"), event.get("cell"), event.get("count")
        if kind == "begin":
            self.notebook = dict(event["notebook"])
            if event["missing"]:
                text = "There is no kernel %s on %s; taking %s." % (event["missing"], self.host, event["kernel"])
                self.messages.note(text)
        elif kind == "start":
            show("cell %s/%s" % (number, count))
        elif kind == "cell":
            self.notebook["cells"][int(event["index"])] = event["content"]
            if number is not None:
                self._say_cell(number, count, float(event["seconds"]), event["is_done"] is True)
        elif kind == "end":
            self.notebook["metadata"] = event["metadata"]

    def _say_cell(self, number: Any, count: Any, seconds: float, is_done: bool) -> None:
        self.seconds += seconds
        if self.messages.as_json:
            facts = {"id": self.id, "cell": number, "count": count, "seconds": seconds, "is_done": is_done}
            self.messages.result("", "cell", **facts)
        elif is_done and not self.messages.has_spinner:
            self.messages.note("Cell %s/%s done (%.1f s)." % (number, count, seconds))

    @property
    def host(self) -> str:
        """The destination, as the user calls it."""
        return self.agent.ssh.destination

    def _finish(self, reply: Json) -> None:
        """Write the result, say where it is, and raise the Failure that the end of the run stands for."""
        outcome = str(reply.get("state"))
        path = self.output
        if path is None:
            name = str(reply.get("name"))
            if not re.fullmatch(r"\w[^/\\\x00-\x1f]*", name):
                raise Failure("the host's reply makes no sense", "a notebook cannot be called %r" % name, "-o FILE")
            self.name, path = name, executed_name(name)
        if self.notebook and path:
            write_result(path, self.notebook)
        facts = {"id": self.id, "outcome": outcome, "cells": reply.get("cell"), "seconds": self.seconds}
        if outcome == "done":
            text = "Executed %s: %s cells in %.1f s." % (self.name, reply.get("count"), self.seconds)
            self.messages.step(text, "executed", path=path, **facts)
        elif self.messages.as_json:
            self.messages.result("", "executed", path=path, **facts)
        if path and self.notebook and not self.messages.as_json:
            self.messages.result(path, "result")
        failure = self._failure(outcome, reply, path)
        if failure:
            raise failure

    def _failure(self, outcome: str, reply: Json, path: str) -> Optional[Failure]:
        cell = "cell %s of %s" % (reply.get("cell"), reply.get("count"))
        why = str(reply.get("error"))
        if self.notebook:
            why += "\nthe result so far is in %s" % (path or "the notebook there")
        ends = {
            "failed": ("%s failed in %s" % (cell, self.name), EXIT_CELL_FAILED),
            "died": ("the kernel of %s died in %s" % (self.name, cell), EXIT_CELL_FAILED),
            "timeout": ("%s took too long" % self.name, EXIT_TIMEOUT),
            "stopped": ("the execution of %s was stopped" % self.name, EXIT_FAILURE),
            "invalid": ("%s cannot be executed on %s" % (self.name, self.host), EXIT_FAILURE),
        }
        if outcome == "done":
            return None
        what, status = ends.get(outcome, ("the execution of %s ended early" % self.name, EXIT_FAILURE))
        return Failure(what, why, "", status)


def write_result(path: str, notebook: Json) -> None:
    """Write a notebook in one piece, in the form that Jupyter gives it; raises Failure when it cannot be written."""
    beside = os.path.join(os.path.dirname(path), ".%s.%d" % (os.path.basename(path), os.getpid()))
    try:
        try:
            with open(beside, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
            if os.path.exists(path):
                os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
            os.replace(beside, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(beside)
    except (OSError, UnicodeEncodeError) as error:
        raise Failure("cannot write " + path, str(error), "execute --attach brings it again") from None


# ---------------------------------------------------------------------------------------------------------------------
# scheduler
#
# A host that is a login node: Jupyter, or a notebook, runs in a job that the cluster's own scheduler starts on another
# node. The job runs the agent there, as ssh would, with the same request; it answers into a file of the shared home,
# and stays until what it launched has ended. This room alone knows Slurm and the others.
# ---------------------------------------------------------------------------------------------------------------------
# agent begins

# By the command that submits: how its output names the job, what asks for the user's jobs and how to read a row of
# that, which states mean that a job waits or runs (any other, and no row: it has ended), and what cancels one. "plain",
# where states are letters or digits: the states of a job that just waits, with nothing more to say. "none": what a
# query that fails says for want of jobs.
SCHEDULERS = {
    "sbatch": {
        "id": r"(\d+)",
        "query": ["squeue", "--noheader", "--user={user}", "--states=all", "--format=%i|%T|%r|%S|%N|%L"],
        "row": r"(?m)^(?P<id>\d+)\|(?P<state>\w+)\|(?P<reason>[^|]*)\|(?P<start>[^|]*)\|(?P<node>[^|]*)\|(?P<left>.*)$",
        "waits": r"PENDING|CONFIGURING|REQUEUED|REQUEUE_HOLD|REQUEUE_FED|RESV_DEL_HOLD|SPECIAL_EXIT",
        "runs": r"RUNNING|SUSPENDED|RESIZING|SIGNALING|STOPPED",
        "cancel": ["scancel", "{id}"],
    },
    # PBS (123.server) and Grid Engine (Your job 123 ("name") has been submitted): the state is the fifth word of a row
    # in both, in Grid Engine with several letters: hqw, Eqw, Rr, dr. T is a job that PBS moves, or a suspended one.
    "qsub": {
        "id": r"(?m)^(?:Your job )?(\d+)\b",
        "query": ["qstat"],
        "row": r"(?m)^\s*(?P<id>\d+)\S*\s+\S+\s+\S+\s+\S+\s+(?P<state>\w+)",
        "plain": r"Q|qw",
        "waits": r"[QHWT]|\w*[qw]\w*",
        "runs": r"[ERSU]|[dhR]*[rstST]+",
        "cancel": ["qdel", "{id}"],
    },
    "bsub": {
        "id": r"Job <(\d+)>",
        "query": ["bjobs", "-w"],
        "none": r"No unfinished job found",
        "row": r"(?m)^(?P<id>\d+)\s+\S+\s+(?P<state>\w+)",
        "plain": r"PEND",
        "waits": r"PEND|PSUSP|WAIT",
        "runs": r"RUN|PROV|USUSP|SSUSP|UNKWN",
        "cancel": ["bkill", "{id}"],
    },
    # 1 idle, 2 running, 5 held, 6 bringing its output, 7 suspended.
    "condor_submit": {
        "id": r"cluster (\d+)",
        "query": ["condor_q", "-autoformat", "ClusterId", "JobStatus", "HoldReason"],
        "row": r"(?m)^(?P<id>\d+)[ \t]+(?P<state>\d)[ \t]+(?:undefined\b|(?P<reason>.*\S))",
        "plain": r"1",
        "waits": r"[15]",
        "runs": r"[267]",
        "cancel": ["condor_rm", "{id}"],
    },
}  # type: Dict[str, Any]
JOB_ENDS = {
    "TIMEOUT": "its time was up",
    "DEADLINE": "its deadline passed",
    "CANCELLED": "it was cancelled",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "OUT_OF_MEMORY": "it ran out of memory",
    "PREEMPTED": "another job took its place",
    "FAILED": "it failed",
}
# What a request must be, to come back to a job that waits; and what it must be where it names that at all.
JOB_EXACT = ("action", "path", "key")
JOB_NAMED = ("app", "python", "env", "init", "socket", "via_node")
JOB_TYPES = {"job": str, "command": str, "node": str, "created": float, "asked": dict}
QUERY_MIN_S = 5.0  # between two questions to a scheduler, from all of ours on this node
QUERY_MAX_S = 30.0
QUERY_TIMEOUT_S = 20
SUBMIT_TIMEOUT_S = 40  # longer, because a job that was taken after all would be nobody's
SETTLE_S = 2 * QUERY_MIN_S  # in which a scheduler comes to know what happened


def submit_job(request: "Json", channel: Channel) -> "Json":
    """Submit a job in which our agent does what `request` asks for; return its record. Raises Trouble if not taken."""
    import re
    import shlex

    forget_ended("jobs", live_jobs())
    directory = new_dir("jobs", "j")
    details = dict(
        request,
        scheduler={},
        submit=request["scheduler"]["submit"],
        job=os.path.basename(directory),
        shell=os.environ.get("SHELL", ""),
        is_new=True,
        overlaps=True,
    )
    program, script = leave_agent(directory, "job_main", details), os.path.join(directory, "job.sh")
    words = [shlex.quote(word) for word in (sys.executable, program, os.path.join(directory, "log"))]
    # Valid in any shell: a scheduler may give it to the queue's own, csh by Grid Engine's default, or to the login's.
    redirected = """exec "$0" -IS "$1" >"$2" 2>&1 </dev/null"""
    write_private(script, "#!/bin/sh\nexec /bin/sh -c '%s' %s %s %s\n" % (redirected, *words))
    os.chmod(script, 0o700)
    argv = [native(word).replace("{script}", script) for word in request["scheduler"]["submit"]]
    status, said, why = run_command(argv, SUBMIT_TIMEOUT_S)
    command = os.path.basename(argv[0])
    number = re.search(SCHEDULERS.get(command, {}).get("id", r"(\d\S*)"), said)
    if status or not number:
        why = why.strip() or said.strip() or "status %d" % status
        raise Trouble(1, "%s did not take the job" % portable(argv[0]), why, portable(" ".join(argv[1:-1])))
    record = {
        "job": number.group(1),
        "command": command,
        "node": os.uname().nodename,
        "created": time.time(),
        "asked": dict({name: request.get(name) for name in JOB_EXACT + JOB_NAMED}, **request["scheduler"]),
    }
    write_private(record_path(directory), json.dumps(record))
    return next(job for job in job_records() if job["directory"] == directory)


def job_records() -> "List[Json]":
    """Return the records of the jobs that we submitted, newest first."""
    return kept_records("jobs", JOB_TYPES)


def live_jobs() -> "List[Json]":
    """Return the records of the jobs that wait or run."""
    return [record for record in job_records() if job_state(record)["is_live"]]


def waiting_jobs(request: "Json") -> "List[Json]":
    """Return the jobs that have not begun and do what a request asks for, each thing as far as it is named there."""
    named = {name: request[name] for name in JOB_NAMED if request.get(name)}
    named.update({name: request.get(name) for name in JOB_EXACT}, **request.get("scheduler", {}))
    jobs = [job for job in live_jobs() if all(job["asked"].get(name) == value for name, value in named.items())]
    return [job for job in jobs if not reply_of(job)]


def job_of(record: "Json") -> "Json":
    """Return the record of the job in which a server or a run is; empty when it is in none."""
    found = [job for job in (job_records() if record.get("job") else []) if job["id"] == record["job"]]
    return found[0] if found else {}


def job_state(record: "Json", max_age_s: float = QUERY_MIN_S) -> "Json":
    """Say where a job stands: its scheduler's word for it, whether it waits or is live at all, the time it has left.

    A scheduler that does not answer leaves it as it was: live, with "unknown" for a word.
    """
    looked, output = query(record["command"], max_age_s) if record["command"] in SCHEDULERS else (0.0, "")
    state = state_in(record, looked, output)
    if record["command"] not in SCHEDULERS:
        is_live = not os.path.exists(os.path.join(record["directory"], "ended"))
        state.update(is_live=is_live, is_waiting=is_live, word="submitted" if is_live else "ended", reason="")
    if state["is_live"] and os.path.exists(os.path.join(record["directory"], "cancelled")):
        return dict(state, is_live=False, is_waiting=False, word="CANCELLED")
    has_gap = state["is_live"] and (state["is_waiting"] or not state["node"])
    begun = read_json(os.path.join(record["directory"], "begun.json")) if has_gap else {}
    if begun:  # the job knows better than an answer that was kept, and more than most schedulers
        left_s = begun["ends_at"] - time.time() if begun["ends_at"] else None
        state.update(is_waiting=False, word="RUNNING", reason="", node=begun["node"], left_s=left_s)
    return state


def state_in(record: "Json", looked: float, output: str) -> "Json":
    """Return what an answer of a scheduler, given at `looked`, says of a job."""
    import re

    state = {
        "is_live": True,
        "is_waiting": True,
        "word": "submitted",
        "reason": "",
        "start": "",
        "node": "",
        "left_s": None,
    }
    if not looked:
        return dict(state, word="unknown", reason="the scheduler does not answer")
    table = SCHEDULERS[record["command"]]
    rows = [match.groupdict() for match in re.finditer(table["row"], output)]
    found = [row for row in rows if row["id"] == record["job"]]
    if not found and looked < record["created"] + 1:
        return state  # the job is younger than the answer
    if not found:
        return dict(state, is_live=False, is_waiting=False, word="ended")
    row = dict({"reason": "", "start": "", "node": "", "left": ""}, **found[-1])
    waits, runs = (bool(re.match("(%s)\\Z" % table[name], row["state"])) for name in ("waits", "runs"))
    state.update({name: row[name] or "" for name in ("reason", "start", "node")}, word=row["state"])
    if "plain" in table and (waits or runs):
        state["word"] = "PENDING" if waits else "RUNNING"
        if waits and not state["reason"] and not re.fullmatch(table["plain"], row["state"]):
            state["reason"] = row["state"]
    return dict(state, is_live=waits or runs, is_waiting=waits, left_s=seconds_of(row["left"]) if runs else None)


def query(command: str, max_age_s: float) -> "Tuple[float, str]":
    """Return what a scheduler says of the user's jobs, and when; its answer serves all of ours here for a while.

    (0, "") when it does not answer.
    """
    path = os.path.join(private_dir(own_tmp_dir()), command + ".answer")
    with open(path + ".lock", "w") as lock:
        while True:
            kept = kept_answer(path, max(max_age_s, QUERY_MIN_S))
            if kept is not None:
                return kept
            if has_lock(lock):
                break
            time.sleep(POLL_S)  # another one of ours asks
        write_private(path, ask_scheduler(command))
    return kept_answer(path, QUERY_MAX_S) or (0.0, "")


def kept_answer(path: str, max_age_s: float) -> "Optional[Tuple[float, str]]":
    """Return an answer that was kept, and when it was given, unless it is too old."""
    try:
        with open(path) as stream:
            when, text = os.fstat(stream.fileno()).st_mtime, stream.read()
    except OSError:
        return None
    return ((when if text else 0.0), text) if 0 <= time.time() - when < max_age_s else None


def ask_scheduler(command: str) -> str:
    """Return what a scheduler says of the user's jobs; empty when it does not answer."""
    import pwd
    import re

    user = pwd.getpwuid(os.getuid()).pw_name
    argv = [word.replace("{user}", user) for word in SCHEDULERS[command]["query"]]
    status, answer, said = run_command(argv, QUERY_TIMEOUT_S)
    none = SCHEDULERS[command].get("none")
    return "" if status and not (none and re.search(none, said)) else answer + "\n"


def seconds_of(text: str) -> "Optional[float]":
    """Return a time as Slurm writes it ([days-][hours:]minutes:seconds) in seconds; None for UNLIMITED and the like."""
    import re

    match = re.match(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)\Z", text)
    if not match:
        return None
    days, hours, minutes, seconds = [int(group or 0) for group in match.groups()]
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds


def wait_for_job(job: "Json", channel: Channel) -> "Json":
    """Wait until the agent in a job replies, as long as that takes, and return its reply; tell how the job stands.

    Raises Trouble: what the agent there says, or that the job ended before it said anything.
    """
    offset = 0
    max_age_s, pause_s = QUERY_MIN_S, POLL_S
    told = {}  # type: Json
    while not channel.is_closed:
        state = job_state(job, max_age_s)  # before the look at what was said: of an ended job, that is all
        messages, offset = new_messages(os.path.join(job["directory"], "said"), offset)
        for message in messages:
            kind = message.pop("kind")
            if kind == "reply":
                channel.send("queue", id=job["id"], job=job["job"], is_waiting=False, word="", reason="", start="")
                return reply_in(message)
            if kind == "progress":
                channel.progress(message["text"])
            elif kind != "hello":
                channel.send(kind, **message)
        if not state["is_live"]:
            why = "%s\n%s" % (why_job_ended(state), end_of_log(os.path.join(job["directory"], "log")))
            raise Trouble(4, "job %s ended before it had begun" % job["job"], why.strip())
        if state != told:
            told = state
            facts = {name: state[name] for name in ("is_waiting", "word", "reason", "start")}
            channel.send("queue", id=job["id"], job=job["job"], **facts)
            pause_s = POLL_S
        channel.keep_alive()
        time.sleep(pause_s)
        pause_s = min(FOLLOW_MAX_S, 1.1 * pause_s)
        max_age_s = min(QUERY_MAX_S, max_age_s * 1.01)
    return {}


def new_messages(path: str, offset: int) -> "Tuple[List[Json], int]":
    """Return the messages that an agent wrote to a file beyond `offset`, and the offset behind them."""
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return [], offset
    return [json.loads(line.decode("utf-8")) for line in lines], offset + sum(len(line) + 1 for line in lines)


def reply_of(job: "Json") -> "Json":
    """Return the message in which the agent in a job replied; empty when it has not yet."""
    messages, _ = new_messages(os.path.join(job["directory"], "said"), 0)
    return next((message for message in messages if message["kind"] == "reply"), {})


def reply_in(message: "Json") -> "Json":
    """Return the reply in a message; raises the Trouble that is there instead."""
    failure = message.get("failure")
    if failure:
        raise Trouble(failure["status"], failure["what"], failure["why"], failure["try"])
    return dict(message["reply"])


def why_job_ended(state: "Json") -> str:
    """Return why a job ended, in words."""
    if state["word"] == "ended":
        return "job: it has ended: cancelled, failed or out of time, its scheduler does not say which"
    return "job: " + JOB_ENDS.get(state["word"], "it has ended")


def cancel_job(job: "Json") -> None:
    """Cancel a job; what ran in it ends with it. Raises Trouble where it cannot be done.

    Of a scheduler that we know nothing of we can only await the end: a server in the job was told to shut down.
    """
    table = SCHEDULERS.get(job["command"], {"cancel": ["false"]})
    status, said, why = run_command([word.replace("{id}", job["job"]) for word in table["cancel"]], QUERY_TIMEOUT_S)
    deadline = time.monotonic() + (SETTLE_S if job["command"] not in SCHEDULERS else 0)
    while job_state(job)["is_live"] and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if status and job_state(job)["is_live"]:
        why = (said + why).strip() or "%(command)s is not known here" % job
        raise Trouble(1, "job %s was not cancelled" % job["job"], why)
    write_private(os.path.join(job["directory"], "cancelled"), "")


def scheduler_here() -> str:
    """Return the command of a scheduler that is on PATH here; empty for none."""
    import shutil

    return next((command for command in SCHEDULERS if shutil.which(command)), "")


def time_left_s(record: "Json") -> float:
    """Return how much time the job of a server has left; 0 for no job, or no limit that we know of."""
    job = job_of(record)
    return float(job_state(job)["left_s"] or 0.0) if job else 0.0


def settle_job(record: "Json", channel: Channel) -> None:
    """Wait until a server in a job answers, or its scheduler knows that the job has ended; not for long."""
    deadline = time.monotonic() + SETTLE_S
    while is_running(record) and time.monotonic() < deadline:
        info = server_info(record)
        if info and (not can_ask_server(record, info) or answers(info)):
            return
        channel.keep_alive()
        time.sleep(POLL_S)


def describe_job(job: "Json") -> "Json":
    """Say how a job does, for people."""
    found = {name: job[name] for name in ("id", "job", "command")}
    found.update(job_state(job), action=job["asked"]["action"], path=job["asked"]["path"], age_s=age_of(job))
    return found


def node_address() -> str:
    """Return the address of this node that the login node reaches: the one that Slurm has, else that of its name."""
    import re

    names = [os.uname().nodename]
    slurm_name = os.environ.get("SLURMD_NODENAME")
    if slurm_name:
        _, said, _ = run_command(["scontrol", "--oneliner", "show", "node", slurm_name], QUERY_TIMEOUT_S)
        names[:0] = [*re.findall(r"\bNodeAddr=(\S+)", said), slurm_name]
    for name in names:
        try:
            address = str(socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)[0][4][0])
        except OSError:
            continue
        if not address.startswith("127."):
            return address
    raise Trouble(1, "this node has no address of its own", "tried " + ", ".join(names), "--via-node")


def job_main(directory: str) -> None:
    """In a job, on its node: do what the request asks for, and stay until what was launched has ended."""
    with open(os.path.join(directory, "request.json")) as stream:
        request = json.load(stream)
    with open(os.path.join(directory, "agent.py")) as stream:
        request["source"] = stream.read().rpartition("\njob_main(")[0]
    if request["shell"]:  # a scheduler may name the shell of its queue instead, or none
        os.environ["SHELL"] = request["shell"]
    said = os.fdopen(os.open(os.path.join(directory, "said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")
    channel = Channel("", said)
    if request["action"] == "open" and not request["via_node"] and request["ip"] == "127.0.0.1":
        request["ip"] = "node"
    job = job_of(request)
    command = job.get("command")  # none yet in a job that runs before its submission has returned
    left_s = state_in(job, time.time(), ask_scheduler(command))["left_s"] if command in SCHEDULERS else 0
    begun = {"node": os.uname().nodename, "ends_at": time.time() + left_s if left_s else 0}
    write_private(os.path.join(directory, "begun.json"), json.dumps(begun))
    reply = perform(request, channel)
    if not reply:
        sys.exit(1)
    stop = os.path.join(reply.get("directory", directory), "stop")
    while os.waitpid(reply["pid"], os.WNOHANG) == (0, 0):
        if os.path.exists(stop):
            stop_run(dict(reply, is_ours=True))
        time.sleep(FOLLOW_MAX_S)
    write_private(os.path.join(directory, "ended"), "")  # a scheduler that we know nothing of tells nothing


# agent ends


class Queue:
    """A job that we wait for: how it stands is shown, and Ctrl-C meanwhile asks whether it is to stay."""

    def __init__(self, agent: Agent, messages: Messages) -> None:
        self.agent = agent
        self.messages = messages
        self.id = ""
        self.job = ""
        self.is_waiting = False
        self._said = ""

    def take(self, message: Json, show: Callable[[str], None]) -> None:
        """Take what the agent tells of the job."""
        if message.get("kind") != "queue":
            return
        self.id, self.job = str(message["id"]), str(message["job"])
        self.is_waiting = message["is_waiting"] is True
        word, reason, start = (str(message[name]) for name in ("word", "reason", "start"))
        facts = {"id": self.id, "job": self.job, "state": word, "reason": reason, "start": start}
        match = re.match(r"\d+-\d+-\d+T(\d+:\d+)", start)
        text = "Job %s %s" % (self.job, word.lower())
        text += " (%s)" % reason if reason not in ("", "None") else ""
        text += ", expected %s" % match.group(1) if match else ""
        show(text if self.is_waiting else "")
        if self.is_waiting and text != self._said:
            self._said = text
            if self.messages.as_json or not self.messages.has_spinner:
                self.messages.step(text + ".", "queue", **facts)

    @contextlib.contextmanager
    def asking(self, args: argparse.Namespace) -> Iterator[None]:
        """Under this, Ctrl-C asks once whether the job stays; where nobody can answer, it stays."""
        try:
            yield
        except (KeyboardInterrupt, Terminated) as interruption:
            if not self.is_waiting:
                raise
            self.messages.end_line()
            is_kept = True
            if isinstance(interruption, KeyboardInterrupt) and has_terminal():
                with contextlib.suppress(KeyboardInterrupt):
                    is_kept = not says_yes("Cancel job %s? [y/N] " % self.job)
            if is_kept:
                text = "Job %s stays. Back to it with: %s   To cancel it: %s"
                again = command_line(*sys.argv[1:])
                self.messages.note(text % (self.job, again, back_again(args, "stop", self.id)))
            else:
                self.agent.ask("stop", "Cancelling", ids=[self.id], path=None, app="", is_all=False, asks=False)
            raise


def scheduler_request(args: argparse.Namespace) -> Json:
    """Return the part of a request that says through which scheduler Jupyter is to run; raises Failure (2)."""
    submit: List[str] = []
    try:
        if args.slurm is not None:
            # Without a requeue: what a job held is gone, and a server that comes back elsewhere has nobody's tabs.
            fixed = ["sbatch", "--job-name=rjupyter", "--output=/dev/null", "--no-requeue"]
            submit = [*fixed, *shlex.split(args.slurm), "{script}"]
        elif args.submit is not None:
            submit = shlex.split(args.submit)
            submit += [] if any("{script}" in word for word in submit) else ["{script}"]
    except ValueError as error:
        raise Failure("wrong usage", "%s: %s" % (error, args.slurm or args.submit), "", EXIT_USAGE) from None
    if submit and args.socket and not args.via_node:
        why = "a socket is reached on its own node alone"
        raise Failure("wrong usage", why, "--via-node, or no --socket", EXIT_USAGE)
    return {"scheduler": {"submit": submit} if submit else {}, "via_node": args.via_node}


def move_to_node(ssh: Ssh, server: Server) -> Ssh:
    """Leave the login node, and return a connection to the node of a server's job, by a jump over the login node."""
    ssh.close()
    there = node_ssh(ssh, server.node)
    there.connect()
    text = "Connected to %s through %s." % (server.node, ssh.destination)
    there.messages.step(text, "connected", node=server.node)
    return there


def node_ssh(ssh: Ssh, node: str) -> Ssh:
    """Return what makes the connection to a compute node."""
    login = ssh.destination
    options: List[str] = []
    jump: Dict[str, str] = {}
    for option in _pairs(ssh.options):
        if option[0] in ("-l", "-p", "-J"):
            jump[option[0]] = option[1]
        else:
            options += option
    if "-l" in jump and "@" not in login:
        login = "%s@%s" % (jump["-l"], login)
    if "-p" in jump and not login.startswith("ssh://"):
        login = "%s:%s" % (login, jump["-p"])
    hops = ",".join([jump[name] for name in ("-J",) if name in jump] + [login])
    there = Ssh(node, [*options, "-J", hops], ssh.can_ask, ssh.messages, ssh.has_mux)
    there.further = ssh.further
    return there


def print_jobs(jobs: List[Json], messages: Messages) -> None:
    """Print the table of jobs."""
    rows = [["ID", "JOB", "STATE", "NODE", "LEFT", "FOR", "PATH", "AGE"]]
    for job in jobs:
        reason = job.get("reason")
        state = str(job.get("word")).lower() + (" (%s)" % reason if job.get("is_waiting") and reason else "")
        what = {"open": "a server", "start_run": "a notebook"}.get(str(job.get("action")), "?")
        cells = [
            job.get("id"),
            job.get("job"),
            state,
            job.get("node") or "-",
            _duration(job.get("left_s")) or "-",
            what,
        ]
        cells += [job.get("path") or "~", _duration(job.get("age_s"))]
        rows.append([str(cell).replace("\n", "?") for cell in cells])
    print_table(rows, messages)


# ---------------------------------------------------------------------------------------------------------------------
# command line
#
# Options, the destination, and one function for each action. `main` is where failures end.
# ---------------------------------------------------------------------------------------------------------------------


class Destination(NamedTuple):
    """Where to: `host` is what ssh gets; `path` is None when there was none."""

    host: str
    path: Optional[str]


def parse_destination(text: str) -> Destination:
    """Split DESTINATION[:PATH], as scp and ssh write them: [user@]host:path, [user@][v6]:path, ssh://user@host:port/path.

    Raises ValueError with the reason when ssh could take it for something else.
    """
    path: Optional[str] = None
    if text.startswith("ssh://"):
        host, slash, rest = text[len("ssh://") :].partition("/")
        host, path = "ssh://" + host, unquote(rest) if slash and rest else None
        name = host[len("ssh://") :]
    else:
        match = re.fullmatch(r"((?:[^@:/]*@)?)\[([^\]]*)\](?::(.*))?", text, re.DOTALL)
        if match:
            host, path = match.group(1) + match.group(2), match.group(3)
        elif text.count(":") > 1 and _is_ipv6(text.rsplit("@", 1)[-1]):
            host = text
        else:
            host, colon, rest = text.partition(":")
            path = rest if colon else None
        name = host
    if not name or name.startswith("-") or name.rsplit("@", 1)[-1].startswith("-"):
        raise ValueError("no host in %r" % text)
    # ssh hands names on to the user's shell (ProxyCommand, Match exec); from 9.6 on it refuses these itself (ssh.c).
    user, _, address = name.rpartition("@")
    if not name.isprintable() or re.search(r"""[\s/'`"$\\;&<>|(){}]""", address) or user.endswith("\\"):
        raise ValueError("a host cannot be called %r" % name)
    if re.search(r"""[\s/'`";&<>|(){}]""", user):
        raise ValueError("a user cannot be called %r" % user)
    if path is not None and "\0" in path:
        raise ValueError("a path cannot hold a NUL")
    return Destination(host, path)


def _is_ipv6(text: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(text.partition("%")[0]).version == 6
    except ValueError:
        return False


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the drawing of the docstring, and leaves room for the options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=max(80, min(120, _terminal_width())))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in our own form, and points at --help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)  # argparse's own imports shutil

    def error(self, message: str) -> NoReturn:
        """Raise Failure (2)."""
        raise Failure("wrong usage", message, command_line("--help"), EXIT_USAGE)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every help text ends with its default where there is one."""
    parser = Parser(
        usage="%(prog)s [options] DESTINATION[:PATH] [ACTION ...]",
        description=__doc__,
        epilog="actions:\n  execute NOTEBOOK ...     list     logs [ID] [-f]     stop [ID ...] [--all] [--yes]\n"
        "  close     doctor     config          `rjupyter.py HOST execute --help` tells more of one\n\n"
        "DESTINATION is whatever ssh takes; PATH, as scp has it, is a directory or a notebook there.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("destination", metavar="DESTINATION[:PATH]", type=_destination, help=argparse.SUPPRESS)

    server = parser.add_argument_group("server")
    server.add_argument("--app", choices=["notebook", "lab"], default="", help="what to open (notebook)")
    server.add_argument("--lab", dest="app", action="store_const", const="lab", help="the same as --app lab")
    which = server.add_mutually_exclusive_group()
    which.add_argument("--new", action="store_true", help="start another server; do not come back to one")
    which.add_argument("--attach", type=_text, metavar="ID", help="come back to this server; `list` shows the ids")
    server.add_argument("--stop-on-exit", action="store_true", help="end the server together with the tunnel")
    port_help = "first port to try on the host (%d, or the one in the host's own Jupyter configuration)" % DEFAULT_PORT
    server.add_argument("--port", type=_port, default=0, metavar="N", help=port_help)
    ip_help = "address that Jupyter binds (127.0.0.1; any other one is seen by others)"
    server.add_argument("--ip", type=_address, default="127.0.0.1", metavar="ADDR", help=ip_help)
    socket_help = "let Jupyter listen on a Unix socket that is yours alone, not on a port"
    server.add_argument("--socket", action="store_true", help=socket_help)
    idle_help = "end the server and its kernels after this long without use (90m, 12h, 2d, or seconds)"
    server.add_argument("--idle-timeout", type=_duration_s, default=0, metavar="DURATION", help=idle_help)
    arg_help = "an argument for Jupyter itself; repeatable"
    server.add_argument("--server-arg", action="append", default=[], metavar="ARG", help=arg_help)
    timeout_help = "how long Jupyter may take to start, in seconds (%d)" % START_TIMEOUT_S
    server.add_argument("--start-timeout", type=_seconds, default=START_TIMEOUT_S, metavar="S", help=timeout_help)

    environment = parser.add_argument_group("environment on the host")
    python_help = "run Jupyter under this interpreter"
    environment.add_argument("--python", type=_text, metavar="PATH", help=python_help)
    env_help = "conda, mamba or pixi environment by name, any environment by path"
    environment.add_argument("--env", type=_text, metavar="NAME_OR_PATH", help=env_help)
    init_help = "run this in your shell there first (`module load ...`); repeatable"
    environment.add_argument("--init", type=_text, action="append", default=[], metavar="COMMAND", help=init_help)
    no_install_help = "do not install Jupyter where there is none; say how"
    install = environment.add_mutually_exclusive_group()
    install_help = "install Jupyter for you alone where there is none (the default)"
    install.add_argument("--install", dest="no_install", action="store_false", default=False, help=install_help)
    install.add_argument("--no-install", action="store_true", help=no_install_help)

    scheduler = parser.add_argument_group("scheduler, on a host that is a login node")
    how = scheduler.add_mutually_exclusive_group()
    slurm_help = "run Jupyter, or the notebooks, in a Slurm job with these options of sbatch"
    how.add_argument("--slurm", metavar="OPTIONS", help=slurm_help)
    submit_help = "the same by another scheduler: the command that submits {script} (qsub, bsub, condor_submit)"
    how.add_argument("--submit", type=_text, metavar="COMMAND", help=submit_help)
    via_help = "end the tunnel on the job's node itself, by a jump over the login node"
    scheduler.add_argument("--via-node", action="store_true", help=via_help)

    tunnel = parser.add_argument_group("tunnel and browser")
    local_help = "local port, this one or none (the first free one from %d up)" % LOCAL_PORT
    tunnel.add_argument("--local-port", type=_port, metavar="N", help=local_help)
    tunnel.add_argument("--no-browser", action="store_true", help="print the address only")
    tunnel.add_argument("--browser", metavar="COMMAND", help="browser to open (the system's)")
    forward_help = "a further forward, as ssh writes it (8787:localhost:8787); repeatable"
    tunnel.add_argument(
        "-L", dest="further", type=_forward, action="append", default=[], metavar="SPEC", help=forward_help
    )
    tunnel.add_argument("--no-reconnect", action="store_true", help="end when the connection is lost")
    tunnel.add_argument("-f", dest="background", action="store_true", help="go to the background once the tunnel is up")

    ssh = parser.add_argument_group("ssh, letter for letter")
    for letter, metavar in (("F", "FILE"), ("i", "KEY"), ("J", "HOST"), ("l", "USER"), ("o", "OPTION"), ("p", "PORT")):
        action = _SshOption
        ssh.add_argument("-" + letter, dest="ssh", action=action, default=[], metavar=metavar, help=SSH_HELP[letter])
    for letter in "46C":
        ssh.add_argument("-" + letter, dest="ssh", action=_SshOption, nargs=0, help=SSH_HELP[letter])
    ssh.add_argument("--no-mux", action="store_true", help="each step a connection of its own (as on Windows)")

    output = parser.add_argument_group("output")
    output.add_argument("-q", "--quiet", action="store_true", help="the address and errors only")
    output.add_argument("-v", "--verbose", action="store_true", help="every ssh command, and what the host prints")
    output.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    output.add_argument("--dry-run", action="store_true", help="print the ssh commands and run none")
    output.add_argument("--no-config", action="store_true", help="do not read %s" % config_path())
    output.add_argument("--version", action="version", version="rjupyter " + __version__, help="print the version")
    output.add_argument("-h", "--help", action="help", help="print this help")

    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser, help=argparse.SUPPRESS)
    stop = actions.add_parser("stop", help="end servers on the host")
    stop.add_argument("ids", nargs="*", metavar="ID", help="which ones (the one of PATH, or the only one)")
    stop.add_argument("--all", action="store_true", help="all of yours there")
    stop.add_argument("--yes", action="store_true", help="without a question, also when a kernel computes")
    listing = actions.add_parser("list", help="the servers on the host")
    logs = actions.add_parser("logs", help="a server's log")
    logs.add_argument("id", nargs="?", default="", metavar="ID", help="which one (the newest)")
    logs.add_argument("-f", dest="is_followed", action="store_true", help="go on as it grows, until Ctrl-C")
    doctor = actions.add_parser("doctor", help="walk every step, and say what is wrong and how to mend it")
    config = actions.add_parser("config", help="the defaults that hold for DESTINATION, and where each is from")
    close = actions.add_parser("close", help="end the tunnels that went to the background with -f")
    execute = actions.add_parser("execute", help="run notebooks on the host, and bring their results")
    execute.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="one here; one on the host with : before it")
    output_help = "where the result goes (NOTEBOOK.executed.ipynb)"
    execute.add_argument("-o", "--output", type=_text, metavar="FILE", help=output_help)
    execute.add_argument("--inplace", action="store_true", help="the result replaces the notebook")
    parameter_help = "a variable for the notebook, as YAML reads it; repeatable"
    execute.add_argument(
        "-p", dest="parameters", type=_parameter, action="append", default=[], metavar="NAME=VALUE", help=parameter_help
    )
    execute.add_argument("--kernel", metavar="NAME", help="kernel to take (the notebook's)")
    limit_help = "how long one notebook may take (90m, 12h, or seconds; no limit)"
    execute.add_argument("--timeout", dest="time_limit", type=_duration_s, default=0, metavar="S", help=limit_help)
    execute.add_argument(
        "--attach", dest="run_id", type=_text, metavar="ID", help="follow this run, and bring its result"
    )
    overlap_help = "also when the notebook is being executed already"
    execute.add_argument("--overlap", action="store_true", help=overlap_help)
    for parsed in (listing, logs, stop, doctor, config, close, execute):
        for names, help_ in (
            (("--json",), "one JSON object a line"),
            (("-q", "--quiet"), ""),
            (("-v", "--verbose"), ""),
        ):
            parsed.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=help_ or argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    """Parse the command line over the defaults of the configuration file; `sources` says where each value is from.

    Raises Failure (2).
    """
    argv = joined_arguments(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.sources = {}
    defaults = {} if args.no_config else config_defaults(config_path(), args.destination.host)
    if not defaults and args.action != "config":
        return args
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # then only what was typed is there
    given = vars(parser.parse_args(argv))
    args.sources = dict.fromkeys(given, "command line")
    for dest, (value, source) in defaults.items():
        if dest not in given:
            setattr(args, dest, value)
            args.sources[dest] = source
    return args


def joined_arguments(argv: List[str]) -> List[str]:
    """Join the options whose value is made of options, with an equals sign: argparse takes it for ours otherwise."""
    joined: List[str] = []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word in ("--slurm", "--submit", "--server-arg") else None
        joined.append(word if value is None else "%s=%s" % (word, value))
    return joined


def config_path() -> str:
    """Return where the user's defaults are."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(home, "rjupyter", "config")


def config_defaults(path: str, destination: str) -> Dict[str, Tuple[Any, str]]:
    """Return the options that the file at `path` sets for a destination: each with its value and where it is from.

    Sections are patterns as in ssh_config's Host; of several values, the first one holds. Raises Failure (2).
    """
    if not os.path.exists(path):
        return {}
    import configparser

    config = configparser.RawConfigParser(delimiters="=", default_section="\0", allow_no_value=True)
    config.optionxform = str  # type: ignore[assignment]
    try:
        with open(path, encoding="utf-8") as stream:
            config.read_file(stream)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise Failure("cannot read the configuration", str(error), "mend it, or --no-config", EXIT_USAGE) from None
    parser = build_parser()
    nothing = vars(parser.parse_args(["host"]))
    found: Dict[str, Tuple[Any, str]] = {}
    for section in config.sections():
        if not matches_host(section, destination):
            continue
        for key, value in config.items(section):
            try:
                parsed = vars(parser.parse_args([*_config_words(parser, key, value), "host"]))
            except Failure as failure:
                why = "%s, [%s], %s: %s" % (path, section, key, failure.why)
                raise Failure("wrong configuration", why, "mend it, or --no-config", EXIT_USAGE) from None
            dest = _option(parser, key).dest
            found.setdefault(dest, (parsed[dest] if dest in parsed else nothing[dest], "[%s] %s" % (section, path)))
    return found


def _option(parser: argparse.ArgumentParser, key: str) -> Any:
    """Return the option of a long name; raises Failure (2)."""
    for action in parser._actions:
        if "--" + key in action.option_strings and key not in ("help", "version", "no-config"):
            return action
    raise Failure("wrong usage", "there is no option --%s" % key, "", EXIT_USAGE)


def _config_words(parser: argparse.ArgumentParser, key: str, value: Optional[str]) -> List[str]:
    """Return the command line that a line of the configuration stands for; repeatable options have a value a line."""
    if _option(parser, key).nargs == 0:
        answers_ = {None: True, "yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
        if value not in answers_:
            raise Failure("wrong usage", "yes or no, not %r" % value, "", EXIT_USAGE)
        return ["--" + key] if answers_[value] else []
    return ["--%s=%s" % (key, line) for line in (value or "").strip().split("\n")]


def matches_host(patterns: str, destination: str) -> bool:
    """True when a Host line of ssh_config with these patterns would hold: `*`, `?`, and `!` for an exception."""
    import fnmatch

    host = destination[len("ssh://") :].partition(":")[0] if destination.startswith("ssh://") else destination
    host = host.rsplit("@", 1)[-1]
    words = patterns.split()
    if any(fnmatch.fnmatchcase(host, word[1:]) for word in words if word.startswith("!")):
        return False
    return any(fnmatch.fnmatchcase(host, word) for word in words if not word.startswith("!"))


SSH_HELP = {
    "F": "configuration file instead of ~/.ssh/config",
    "i": "private key",
    "J": "jump host",
    "l": "user to log in as",
    "o": "any option of ssh_config(5)",
    "p": "port of sshd",
    "4": "IPv4 only",
    "6": "IPv6 only",
    "C": "compress",
}


class _SshOption(argparse.Action):
    """Collects ssh's own options, in the order in which they came."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Optional[str] = None) -> None:
        words = [option_string or ""] + ([values] if isinstance(values, str) else [])
        setattr(namespace, self.dest, getattr(namespace, self.dest, []) + words)


def _destination(text: str) -> Destination:
    try:
        return parse_destination(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("needs a value")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535, not %r" % text)
    return int(text)


def _address(text: str) -> str:
    import ipaddress

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError("%r is not an address" % text) from None


def _forward(text: str) -> str:
    """Check a local forward; one without an address here gets 127.0.0.1, and no second one on ::1."""
    match = re.fullmatch(r"(?:(127\.0\.0\.\d+|localhost):)?(\d+):(/[^:\s]+|(?:\[[0-9a-fA-F:.]+\]|[\w.-]+):\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError("a forward is PORT:HOST:PORT or PORT:/SOCKET, not %r" % text)
    address = match.group(1) if match.group(1) not in (None, "localhost") else "127.0.0.1"
    return "%s:%d:%s" % (address, _port(match.group(2)), match.group(3))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("a time is a positive number of seconds, not %r" % text)
    return seconds


def _duration_s(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})(|s|m|min|h|d)", text.strip())
    seconds = int(match.group(1)) * {"m": 60, "min": 60, "h": 3600, "d": 86400}.get(match.group(2), 1) if match else 0
    if not seconds:
        raise argparse.ArgumentTypeError("a duration is a number with s, m, h or d, as in 90m, not %r" % text)
    return seconds


def _parameter(text: str) -> Tuple[str, Any]:
    try:
        return parse_parameter(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_open(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Open: come back to a server or launch one, forward, check, print the address, open the browser, hold."""
    record = tunnel_that_is_up(args)
    if record:
        return join(record, args, messages)
    background = Background() if args.background else None
    if background and background.pid:
        return background.wait()
    tunnel: Optional[Tunnel] = None
    try:
        ssh.connect()
        server = get_server(args, agent, messages)
        if args.via_node and server.job:
            ssh = move_to_node(ssh, server)
            agent = Agent(ssh, messages)
            agent.greets = False
        tunnel = open_tunnel(server, args, ssh, agent, messages)
        url = tunnel.server.url(tunnel.local_port, has_token=not tunnel.server.has_password)
        facts = {"url": url, "local_port": tunnel.local_port, "id": tunnel.server.id}
        messages.result(url, "open", pid=tunnel.server.pid, **facts)
        if wants_browser(args):
            open_browser(url, args.browser, messages)
        destination, path = args.destination
        facts.update(destination=destination, path=path, asked=what_is_asked(args), is_background=args.background)
        with written_down(facts):
            say_how_to_end(args, tunnel, messages)
            if background:
                background.detach()
                ssh.can_ask = can_ask()
            tunnel.hold(redials=not args.no_reconnect)
    except (KeyboardInterrupt, Terminated):
        if not tunnel or not tunnel.local_port:
            raise
        messages.end_line()
        if args.stop_on_exit:
            agent.ask("stop", "Stopping", ids=[tunnel.server.id], path=None, app="", is_all=False, asks=False)
        text = "Closed." if args.stop_on_exit else "Closed. Back again with: %s" % back_again(args)
        messages.step(text, "closed", local_port=tunnel.local_port, tunnel_pid=os.getpid())
        return EXIT_OK
    finally:
        ssh.close()
    return EXIT_OK


def say_how_to_end(args: argparse.Namespace, tunnel: Tunnel, messages: Messages) -> None:
    """Say what Ctrl-C will do, and how the server is ended."""
    if args.background:
        messages.note("The tunnel is in the background. To close it: %s" % back_again(args, "close"))
    elif args.stop_on_exit:
        messages.note("Ctrl-C closes the tunnel and ends the server.")
    else:
        stop = back_again(args, "stop", *([] if tunnel.server.is_only else [tunnel.server.id]))
        messages.note("Ctrl-C closes the tunnel; the server keeps running. To end it: %s" % stop)


def what_is_asked(args: argparse.Namespace) -> List[Any]:
    """Return what tells one open from another: a second copy with the same is the same."""
    names = ("app", "attach", "python", "env", "init", "socket", "ip", "port", "server_arg", "further", "ssh")
    return [args.destination.host, args.destination.path] + [getattr(args, name) for name in names]


def tunnel_that_is_up(args: argparse.Namespace) -> Json:
    """Return the record of a tunnel that is up already and does what `args` ask for; empty when there is none."""
    asked = json.loads(json.dumps(what_is_asked(args)))
    for record in [] if args.new else tunnels():
        if record.get("asked") == asked and args.local_port in (None, record["local_port"]):
            return record
    return {}


def join(record: Json, args: argparse.Namespace, messages: Messages) -> int:
    """Say that the tunnel is up already, and show its page again; nothing is connected."""
    messages.step("The tunnel is up already (pid %d)." % record["pid"], "joined", tunnel_pid=record["pid"])
    messages.result(record["url"], "open", url=record["url"], local_port=record["local_port"], id=record["id"])
    if wants_browser(args):
        open_browser(record["url"], args.browser, messages).join(BROWSER_TIMEOUT_S)
    return EXIT_OK


def open_tunnel(server: Server, args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> Tunnel:
    """Open a checked tunnel to a server; where sshd forwards to no socket, to one on a port in its place."""
    tunnel = Tunnel(ssh, agent, server, messages)
    tunnel.open(args.local_port)
    try:
        tunnel.check()
    except Failure:
        if not (server.sock and server.is_launched and ssh.wait(0)):
            raise
        no_socket = "sshd on %s forwards none (AllowStreamLocalForwarding)" % ssh.destination
        tunnel.close()
        agent.ask("stop", "Stopping", ids=[server.id], path=None, app="", is_all=False, asks=False)
        server = get_server(args, agent, messages, no_socket)
        tunnel = Tunnel(ssh, agent, server, messages)
        tunnel.open(args.local_port)
        tunnel.check()
    where = "%s:%s" % (ssh.destination, server.sock or server.port)
    if server.job and not args.via_node:
        where = "%s (%s) through %s" % (server.target, server.node, ssh.destination)
    text = "Forwarding 127.0.0.1:%d to %s." % (tunnel.local_port, where)
    messages.step(text, "forwarding", local_port=tunnel.local_port, port=server.port, sock=server.sock)
    if server.has_password:
        messages.note("The server has a password; the page asks for it.")
    elif not server.token:
        messages.note("The server wants no token and no password: everyone on %s can use it." % ssh.destination)
    return tunnel


def warn_of_address(args: argparse.Namespace, host: str, messages: Messages) -> None:
    """Say who can connect to Jupyter when it is not on a loopback."""
    import ipaddress

    if not ipaddress.ip_address(args.ip).is_loopback:
        where = "any address of " + host if ipaddress.ip_address(args.ip).is_unspecified else args.ip
        messages.note(
            "--ip %s: whoever reaches %s can connect to Jupyter, past ssh; the token alone keeps them out."
            % (args.ip, where)
        )


def get_server(args: argparse.Namespace, agent: Agent, messages: Messages, no_socket: str = "") -> Server:
    """Come back to a server on the host, or launch one, and say which; `no_socket` is why --socket cannot be had."""
    warn_of_address(args, agent.ssh.destination, messages)
    # The local port is kept for us while Jupyter starts: the agent writes it down, and the next run looks for it.
    local_port = args.local_port or find_free_port(LOCAL_PORT)
    queue = Queue(agent, messages)
    with contextlib.closing(Reserved(local_port)), queue.asking(args):
        reply = agent.ask(
            "open",
            "Launching Jupyter",
            take=queue.take,
            path=args.destination.path,
            is_new=args.new,
            port=args.port,
            ip=args.ip,
            socket=args.socket,
            no_socket=no_socket,
            local_port=local_port,
            server_args=args.server_arg,
            attach=args.attach or "",
            idle_timeout_s=args.idle_timeout,
            start_timeout_s=args.start_timeout,
            **environment_request(args),
        )
    server = Server.from_reply(reply)
    say_server(server, args, agent, messages, scheduler=str(reply.get("scheduler") or ""))
    return server


def say_server(server: Server, args: argparse.Namespace, agent: Agent, messages: Messages, scheduler: str) -> None:
    """Say which server it is, and what one should know of it; `scheduler` is one that was there and not used."""
    verb, seconds = (
        ("Launched", "%.1f s" % server.seconds) if server.is_launched else ("Found", "up " + _duration(server.seconds))
    )
    where = "socket" if server.sock else "port %d" % server.port
    title = "%s on %s" % (server.title, server.node) if server.job else server.title
    text = "%s %s in %s (pid %d, %s, %s)." % (verb, title, server.root_dir, server.pid, where, seconds)
    event = "launched" if server.is_launched else "found"
    facts = {name: getattr(server, name) for name in ("id", "pid", "port", "sock", "app", "root_dir")}
    messages.step(text, event, **facts)
    if args.socket and server.no_socket:
        messages.note("No socket: %s. It listens on port %d instead." % (server.no_socket, server.port))
    if server.job and not args.via_node:
        text = "Jupyter is on %s, an address of %s: whoever reaches that can connect; the token alone keeps them out."
        messages.note(text % (server.host, server.node))
    if scheduler:
        text = "%s is there: if %s is a login node, run Jupyter in a job (--slurm OPTIONS, --submit COMMAND)."
        messages.note(text % (scheduler, agent.ssh.destination))
    if server.is_launched and agent.is_root:
        messages.note("You are root on %s: Jupyter runs as root there (--allow-root)." % agent.ssh.destination)


def wants_browser(args: argparse.Namespace) -> bool:
    """True when a browser is to be opened: asked for by name, or where a person sits in front of this machine."""
    if args.no_browser:
        return False
    return bool(args.browser) or (has_terminal() and "SSH_CONNECTION" not in os.environ)


def back_again(args: argparse.Namespace, *action: str) -> str:
    """Return the command that reaches the same server again, with the options that choose the host."""
    destination, path = args.destination
    options = list(args.ssh) + (["--lab"] if args.app == "lab" and not action else [])
    if path is None or action[:1] == ("stop",):
        return command_line(*options, destination, *action)
    return command_line(*options, "%s:%s" % (destination, path), *action)


def run_list(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """List the user's servers and runs on the host: tables for people, one object a line with --json."""
    with ssh:
        reply = agent.ask("list", "Asking the servers")
    servers, runs, jobs = reply["servers"], reply["runs"], reply["jobs"]
    for event, found in (("server", servers), ("run", runs), ("job", jobs)):
        for facts in found if args.json else []:
            messages.result("", event, **facts)
    if args.json:
        return EXIT_OK
    if jobs:
        print_jobs(jobs, messages)
        messages.result("", "row")
    if not servers:
        messages.note("No server of yours runs there.")
    else:
        head = ["ID", "STATE", "APP", "DIRECTORY", "PORT", "KERNELS", "ACTIVE", "AGE", ""]
        print_table([head] + [_row_of(server) for server in servers], messages)
    if runs:
        messages.result("", "row")
        print_table(
            [["ID", "STATE", "CELL", "NOTEBOOK", "DIRECTORY", "SIZE", "AGE"]] + list(map(_row_of_run, runs)), messages
        )
    return EXIT_OK


def _row_of(server: Json) -> List[str]:
    """Return what the table says of one server; the host's words are data, whatever their types."""
    is_live = server.get("state") == "live"
    kernels, busy = server.get("kernels"), server.get("busy")
    active = _duration(server.get("idle_s"))
    cells = [
        server.get("id"),
        server.get("state"),
        APP_NAMES.get(str(server.get("app")), "?"),
        str(server.get("root_dir")).replace("\n", "?"),
        "socket" if server.get("sock") else server.get("port") or "-",
        ("%s (%s busy)" % (kernels, busy) if busy else kernels) if is_live else "-",
        active + " ago" if is_live and active else "-",
        _duration(server.get("age_s")),
        "" if server.get("is_ours") else "not started by rjupyter",
    ]
    return [str(cell) for cell in cells]


def _row_of_run(run: Json) -> List[str]:
    """Return what the table says of one run."""
    size = run.get("size")
    cells = [
        run.get("id"),
        run.get("state"),
        "%s/%s" % (run.get("cell"), run.get("count")),
        str(run.get("name")).replace("\n", "?"),
        str(run.get("root_dir")).replace("\n", "?"),
        "%.1f MB" % (size / 1e6) if isinstance(size, int) else "-",
        _duration(run.get("age_s")),
    ]
    return [str(cell) for cell in cells]


def run_logs(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Print a server's log, and with -f what comes, until Ctrl-C."""
    try:
        with ssh:
            agent.ask("logs", "", id=args.id, is_followed=args.is_followed)
    except KeyboardInterrupt:
        if not args.is_followed:
            raise
        messages.end_line()
    return EXIT_OK


def run_stop(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Stop servers on the host; where someone can answer, ask before one whose kernels compute."""
    request = {"ids": args.ids, "path": args.destination.path, "app": args.app, "is_all": args.all}
    with ssh:
        reply = agent.ask("stop", "Stopping", asks=has_terminal() and not args.yes, **request)
        if reply.get("busy") or reply.get("runs"):
            for server in reply["busy"]:
                words = "%(busy)s of %(kernels)s kernels compute in %(root_dir)s (%(id)s)." % server
                messages.note(words.replace("1 of 1 kernels compute", "Its kernel computes"))
            for run in reply["runs"]:
                messages.note("%(name)s is being executed in %(root_dir)s (%(id)s)." % run)
            if not says_yes("Stop it all the same? [y/N] "):
                messages.note("Nothing was stopped.")
                return EXIT_FAILURE
            reply = agent.ask("stop", "Stopping", asks=False, **request)
    if not reply.get("count"):
        messages.note("No server of yours runs there.")
    return EXIT_OK


def run_close(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Close the tunnels in the background."""
    close_tunnels(args.destination.host, args.destination.path, messages)
    return EXIT_OK


def run_execute(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Execute notebooks on the host, one after the other, and bring their results; the first failure ends it."""
    wrong = ""
    if bool(args.notebooks) == bool(args.run_id):
        wrong = "execute takes notebooks, or --attach ID"
    elif args.output and (args.inplace or len(args.notebooks) > 1):
        wrong = "-o goes with one notebook, and not with --inplace"
    elif args.inplace and args.run_id:
        wrong = "--attach brings a result; where to is said with -o"
    if wrong:
        raise Failure("wrong usage", wrong, command_line(args.destination.host, "execute", "--help"), EXIT_USAGE)
    sources = [Source.from_argument(name, args.output, args.inplace) for name in args.notebooks]
    with ssh:
        if args.run_id:
            follow(Execution(args.run_id, args.run_id, args.output, agent, messages), args)
        for source in sources:
            execution = start_execution(source, args, agent, messages)
            if execution:
                follow(execution, args)
    return EXIT_OK


def start_execution(source: Source, args: argparse.Namespace, agent: Agent, messages: Messages) -> Optional[Execution]:
    """Start to execute a notebook on the host; None when that is done there already, and no overlap was asked for."""
    queue = Queue(agent, messages)
    with queue.asking(args):
        reply = agent.ask(
            "start_run",
            "Launching the execution of " + source.name,
            take=queue.take,
            path=args.destination.path,
            notebook=source.text,
            file=source.name[1:] if source.is_on_host else "",
            name=os.path.basename(source.name.lstrip(":")),
            key=source.key,
            is_in_place=source.is_on_host and args.inplace,
            overlaps=args.overlap,
            parameters=args.parameters,
            kernel=args.kernel or "",
            timeout_s=args.time_limit,
            **environment_request(args),
        )
    identity = str(reply.get("id"))
    if reply.get("is_started") is not True:
        text = "%s is being executed already (%s, for %s); --overlap does it all the same."
        messages.step(text % (source.name, identity, _duration(reply.get("age_s"))), "overlap", id=identity)
        return None
    messages.step("Executing %s on %s (%s)." % (source.name, agent.ssh.destination, identity), "started", id=identity)
    return Execution(identity, source.name, source.output, agent, messages)


def follow(execution: Execution, args: argparse.Namespace) -> None:
    """Follow a run to its end; when we leave before, it goes on, and a line says how to come back to it."""
    try:
        with execution.queue.asking(args):
            execution.follow(redials=not args.no_reconnect)
    except (KeyboardInterrupt, Terminated):
        if execution.queue.is_waiting:
            raise
        execution.messages.end_line()
        again = back_again(args, "execute", "--attach", execution.id)
        text = "%s goes on without us. To follow it again: %s   To end it: %s"
        execution.messages.note(text % (execution.name, again, back_again(args, "stop", execution.id)))
        raise


def environment_request(args: argparse.Namespace) -> Json:
    """Return the part of a request that says in which environment of the host Jupyter is."""
    return {
        "app": args.app,
        "python": args.python or "",
        "env": args.env or "",
        "init": args.init,
        "may_install": not args.no_install,
        **scheduler_request(args),
    }


class Check(NamedTuple):
    """One line of `doctor`; `try_` mends what failed, and is empty for what is well."""

    name: str
    text: str
    try_: str = ""


def run_doctor(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Walk every step of an open, each with its verdict; return 1 when one failed."""
    failures = 0
    try:
        for check in itertools.chain(checks_here(ssh), checks_there(args, ssh, agent)):
            failures += bool(check.try_)
            mark = "FAIL" if check.try_ else "ok  "
            text = "%s  %-12s %s" % (mark, check.name, check.text)
            text += "\n      %-12s try: %s" % ("", check.try_) if check.try_ else ""
            messages.result(text, "check", check=check.name, is_ok=not check.try_, says=check.text, remedy=check.try_)
    finally:
        ssh.close()
    return EXIT_FAILURE if failures else EXIT_OK


def checks_here(ssh: Ssh) -> Iterator[Check]:
    """Check this machine: ssh, its configuration, the place for sockets, the local port, the browser."""
    import webbrowser

    yield Check("ssh", ssh.version())
    try:
        yield Check("runtime dir", private_runtime_dir() if ssh.has_mux else "not needed without multiplexing")
    except Failure as failure:
        yield Check("runtime dir", failure.why.replace("\n", "; "), failure.try_)
    yield Check("local port", "127.0.0.1:%d is free" % find_free_port(LOCAL_PORT))
    try:
        yield Check("browser", type(webbrowser.get()).__name__)
    except webbrowser.Error:
        yield Check("browser", "none found; the address is printed")


def checks_there(args: argparse.Namespace, ssh: Ssh, agent: Agent) -> Iterator[Check]:
    """Check the connection and the host; the first step that fails is the last one that is tried."""
    began = time.monotonic()
    step = "connection"
    try:
        ssh.connect()
        if ssh.control_path:
            how = "your own master" if ssh.is_borrowed else "multiplexed"
            yield Check("connection", "logged in within %.1f s (%s)" % (time.monotonic() - began, how))
            step = "command"
        agent.greets = False  # the lines below say it
        facts = agent.ask("examine", "Looking around on the host", port=args.port, **environment_request(args))
    except Failure as failure:
        why = ("%s: %s" % (failure.what, failure.why)).replace("\n", "; ")
        yield Check(step, why, failure.try_ or "-v, which shows more")
        return
    if not ssh.control_path:
        yield Check("connection", "each step logs in by itself")
    yield Check("login shell", "%s of %s@%s" % (facts.get("shell") or "?", agent.user, agent.node))
    noise = "prints %d lines to a command, the last: %s" % (len(agent.noise), (agent.noise or [""])[-1])
    yield Check("noise", noise + " (no harm to us; scp may stumble)" if agent.noise else "none from the start-up files")
    yield Check("python", agent.python)
    yield check_sessions(ssh)
    yield check_jupyter(facts)
    trouble = facts.get("state_trouble")
    if trouble:
        yield Check("disk", str(trouble["why"]).replace("\n", "; "), str(trouble["try"]))
    else:
        free_gb = int(facts["free_bytes"]) / 1e9
        text = "%.1f GB free at %s" % (free_gb, facts["state"])
        yield Check("disk", text, "make room there" if free_gb < 0.05 else "")
    yield Check("port", "%d is free on the host" % int(facts["port"]))
    can_reach, words = ssh.can_reach("127.0.0.1:%d" % int(facts["sshd_port"]))
    is_forbidden = not can_reach and "connect failed" not in words  # that sshd tried will do
    try_ = "AllowTcpForwarding and PermitOpen in its sshd_config; ask its administrator"
    why = words.replace("\n", "; ") if is_forbidden else "allowed"
    yield Check("forwarding", why, try_ if is_forbidden else "")
    skew_s = float(facts["clock"]) - time.time()
    far = "its clock is %s off; set it (NTP)" % _duration(abs(skew_s)) if abs(skew_s) > 120 else ""
    yield Check("clock", "%.0f s from ours" % abs(skew_s), far)
    others = int(facts["other_users"])
    shared = "%s something there; --socket keeps them off the port"
    who = "1 other user runs" if others == 1 else "%d other users run" % others
    yield Check("other users", shared % who if others else "nobody else runs anything there")
    if facts.get("scheduler"):
        yield Check("scheduler", "%s is there: a login node, perhaps" % facts["scheduler"])


def check_sessions(ssh: Ssh) -> Check:
    """Say whether the connection carries a second session; an open needs one at a time."""
    if not ssh.control_path:
        return Check("sessions", "each one is a login of its own")
    first = ssh.session("exec cat")
    try:
        first.send(b"open\n", is_last=False)
        lines = iter(lambda: first.next_line(CONTROL_TIMEOUT_S), None)
        has_two = ("stdout", "open") in lines and ssh.run("exit 0")[0]
    finally:
        first.end()
    return Check("sessions", "several at a time" if has_two else "one at a time (MaxSessions), which is enough")


def check_jupyter(facts: Json) -> Check:
    """Say which Jupyter an open would run."""
    found, trouble = facts.get("jupyter"), facts.get("jupyter_trouble")
    if found:
        title = "%s %s" % (APP_NAMES.get(str(found["app"]), "?"), found["version"])
        return Check("jupyter", "%s: %s (%s)" % (title, found["command"], facts["where"]))
    if trouble:
        return Check(
            "jupyter", ("%(what)s: %(why)s" % trouble).replace("\n", "; "), str(trouble["try"]) or "another one"
        )
    if facts.get("no_install"):
        return Check(
            "jupyter", "none, and Python has no ensurepip to install it", "sudo apt install python3-venv, there"
        )
    return Check("jupyter", "none; an open installs it for you alone")


def run_config(args: argparse.Namespace, ssh: Ssh, agent: Agent, messages: Messages) -> int:
    """Show every option that holds for the destination, and where its value is from."""
    nothing = build_parser().parse_args(["host"])
    rows = [["OPTION", "VALUE", "FROM"]]
    seen = set()
    for action in build_parser()._actions:
        name = next((word[2:] for word in action.option_strings if word.startswith("--")), "")
        if not hasattr(nothing, action.dest) or not name or action.dest in seen:
            continue
        seen.add(action.dest)
        value = getattr(args, action.dest)
        source = args.sources.get(action.dest, "default")
        if args.json:
            messages.result("", "option", option=name, value=value, source=source)
        if isinstance(value, list):
            value = " ".join(value)
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value or "-")
        rows.append([name, shown, source])
    if not args.json:
        print_table(rows, messages)
    return EXIT_OK


def print_table(rows: List[List[str]], messages: Messages) -> None:
    """Print rows with their columns aligned."""
    widths = [max(len(printable(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        messages.result("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), "row")


def show_commands(args: argparse.Namespace, ssh: Ssh, messages: Messages) -> int:
    """Print the ssh commands of an action, quoted for pasting, without running one."""
    if args.action in ("config", "close"):
        messages.note("%s runs no ssh." % args.action)
        return EXIT_OK
    commands = [ssh.config_argv()]
    with contextlib.suppress(Failure):  # where there is no place for a socket, each step logs in by itself
        if ssh.has_mux:
            ssh.control_path = os.path.join(private_runtime_dir(), "%x.ctl" % os.getpid())
            commands.append(ssh.master_argv())
    commands.append(ssh.session_argv(command=agent_command(args.python or "")))
    spec = "127.0.0.1:%d:127.0.0.1:%d" % (args.local_port or LOCAL_PORT, args.port or DEFAULT_PORT)
    if args.action is None:
        commands.append(ssh.control_argv("forward", "-L", spec) if ssh.control_path else ssh.tunnel_argv(spec, "ready"))
    if args.action == "doctor":
        commands.append(ssh.session_argv("-W", "127.0.0.1:22"))
    for argv in commands:
        messages.result(shlex.join(argv), "command", argv=argv)
    return EXIT_OK


ACTIONS: Dict[Optional[str], Callable[[argparse.Namespace, Ssh, Agent, Messages], int]] = {
    None: run_open,
    "list": run_list,
    "logs": run_logs,
    "stop": run_stop,
    "close": run_close,
    "doctor": run_doctor,
    "execute": run_execute,
    "config": run_config,
}


def _on_signal(signum: int, frame: Any) -> None:
    raise Terminated(signum)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    messages = Messages()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), _on_signal)
    try:
        args = parse_arguments(argv)
        messages = Messages(args.quiet, args.verbose, args.json)
        ssh = Ssh(args.destination.host, args.ssh, can_ask(), messages, not args.no_mux and os.name == "posix")
        ssh.further = args.further
        if args.dry_run:
            return show_commands(args, ssh, messages)
        return ACTIONS[args.action](args, ssh, Agent(ssh, messages), messages)
    except Failure as failure:
        messages.failure(failure)
        return failure.status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Terminated as terminated:
        return 128 + terminated.signum


if __name__ == "__main__":
    sys.exit(main())
