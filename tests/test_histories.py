"""Staying connected, on a virtual clock: thousands of histories of what a link, a host and a laptop do, in seconds.

The loop that holds, watches and redials is the real one. In place of ssh, the port, the host and time itself stands a
world that is dealt from a seed: RJUPYTER_HISTORIES=100000 is the long run, and RJUPYTER_SEED begins at another one.
"""

import contextlib
import io
import os
import random
import re
import socket
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Tuple

import pytest

import rjupyter

PORT = 8889
TARGET = "127.0.0.1:8888"
CALM_S = 400.0  # at the end of each history: everything works, and so must we, again

# What the way to the host is like for a while: what a login says before it ends, and after how long. The rest is None:
# it goes through.
WAYS: Dict[str, Tuple[Optional[List[str]], float]] = {
    "well": (None, 0.3),
    "slow": (None, 4.0),
    "refused": (["ssh: connect to host gpu1 port 22: Connection refused"], 0.01),
    "no name": (["ssh: Could not resolve hostname gpu1: Name or service not known"], 0.05),
    "swallowed": (["ssh: connect to host gpu1 port 22: Connection timed out"], 15.0),
    "crowded": (["kex_exchange_identification: Connection closed by remote host"], 0.02),
    "full": (["Connection closed by 10.0.0.1 port 22"], 3.0),
    "visit": (["Visit https://login.example.org/a/123 to log in.", "Connection closed by 10.0.0.1 port 22"], 40.0),
    "touch": (["Confirm user presence for key ED25519-SK SHA256:abc", "Connection closed by 10.0.0.1 port 22"], 20.0),
    "denied": (["ana@gpu1: Permission denied (publickey)."], 0.2),
    "changed": (["@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", "Host key verification failed."], 0.1),
}
GREETING = "Docs: https://hpc.example.org/docs"  # what each login begins with that gets so far
BAD = sorted(set(WAYS) - {"well", "changed"})
REFUSALS = ("denied", "visit", "touch")
LOGINS_A_MINUTE = 20  # a tunnel without a master logs in once more to ask how the server is


class Over(BaseException):
    """The history is at its end."""


class World:
    """All that is around us, at a time of its own: a list of (until when, what the way is like), and what happens."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.now = 1000.0
        self.wall_s = 1.7e9  # what the clock on the wall shows beside it
        self.is_mux = chance.random() < 0.7
        self.has_terminal = chance.random() < 0.3
        self.shares_ports = chance.random() < 0.8
        self.ways: List[Tuple[float, str]] = []
        self.drops: List[float] = []  # when a connection that stands is lost
        self.evil: List[Tuple[float, float]] = []  # when another user tries to get the port, and then keeps it
        self.hangs: List[Tuple[float, float]] = []
        self.shaky: List[Tuple[float, float]] = []  # when whoever gets in is thrown out at once
        self.server_ends = float("inf")
        self.logins: List[float] = []
        self.in_vain = 0  # logins, while the port was another's
        self.denied = 0
        self.in_a_row = self.most_in_a_row = 0  # of them
        self.asked = 0
        self.is_asking = False
        self.port = "free"  # or "ours", "ssh", "eve"
        self.tunnel: Any = None
        self.connection: "Optional[StandInForSsh]" = None
        self.deal()

    def deal(self) -> None:
        """Deal what happens, of which the last part is calm."""
        chance = self.chance
        at = self.now + chance.uniform(1, 100)
        is_fatal = chance.random()
        self.ways.append((at, "well"))
        for _ in range(chance.randint(1, 4)):
            self.drops.append(at + chance.uniform(0, 1))
            if chance.random() < 0.3:
                self.shaky.append((at, at + chance.choice((1, 30, 300))))
            for _ in range(chance.randint(0, 3)):
                way = chance.choice(BAD)
                at += chance.choice((0.5, 5, 60, 60, 600)) * chance.random()
                self.ways.append((at, way))
            if chance.random() < 0.3:
                self.evil.append((self.drops[-1], self.drops[-1] + chance.choice((1, 50, 500))))
            if chance.random() < 0.2:
                self.hangs.append((at, at + chance.choice((1, 100))))
            at += chance.choice((0.5, 20, 400))
            self.ways.append((at, "well"))
        if is_fatal < 0.1:
            self.server_ends = chance.uniform(self.now, at)
        elif is_fatal < 0.2:
            self.ways.append((at + 1e5, "changed"))
            self.drops.append(at)
        self.end = at + CALM_S + max([0.0] + [late - at for _, late in self.evil + self.hangs + self.shaky])
        self.drops.sort()

    # -- time ---------------------------------------------------------------------------------------------------------

    def pass_to(self, moment: float) -> None:
        """Let time pass."""
        self.now = max(self.now, moment)
        if self.chance.random() < 0.05:
            self.wall_s += self.chance.choice((-1e6, 3600.0, 1e7))  # set by hand, or the laptop slept
        if self.now > self.end:
            raise Over

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.wall_s

    def sleep(self, seconds: float) -> None:
        self.pass_to(self.now + seconds)

    # -- the way, the port, the server --------------------------------------------------------------------------------

    @property
    def way(self) -> str:
        return next((way for until, way in self.ways if self.now < until), "well")

    def is_in(self, spans: List[Tuple[float, float]]) -> bool:
        return any(begin <= self.now < end for begin, end in spans)

    def leave_port(self) -> None:
        """Nobody of ours has it: another user who is after it gets it."""
        self.port = "eve" if self.is_in(self.evil) else "free"

    def look_at_port(self) -> None:
        if self.port == "eve" and not self.is_in(self.evil):
            self.port = "free"

    def listen(self) -> bool:
        """An ssh that has logged in listens, if it can."""
        self.look_at_port()
        if self.port == "ours" and not self.tunnel.port.is_lent:
            return False
        if self.port in ("free", "ours"):
            self.port = "ssh"
        return self.port == "ssh"

    def is_in_there(self) -> bool:
        """True when the control socket is there: it has logged in."""
        return self.connection is not None and self.connection.is_in

    def stands(self) -> bool:
        return self.connection is not None and not self.connection.has_ended

    def probe(self, *_: Any, **__: Any) -> Tuple[int, bytes]:
        """What comes back through the tunnel."""
        if not self.stands() or self.port != "ssh" or self.now > self.server_ends:
            raise ConnectionError("refused")
        if self.is_in(self.hangs):
            self.sleep(10)
            raise socket.timeout("timed out")
        return 200, b"{}"

    def ask_end(self, request: rjupyter.Request, reply: Any, **_: Any) -> rjupyter.EndReply:
        """What the host says of the server, by a session."""
        if not self.is_mux:
            self.logins.append(self.now)
        self.sleep(0.1)
        if not self.stands() or WAYS[self.way][0]:
            raise rjupyter.NotConnected("the connection ended", "broken pipe", "", rjupyter.EXIT_SSH)
        is_running = self.now <= self.server_ends
        return rjupyter.EndReply(is_running=is_running, reason="it ended", is_answering=not self.is_in(self.hangs))


class StandInForSsh:
    """In place of the ssh that is the connection: logs in, stands, and is lost, as the world has it."""

    def __init__(self, world: World, argv: List[str]) -> None:
        self.world = world
        self.words = "\0".join(argv)
        world.logins.append(world.now)
        world.in_vain += world.tunnel is not None and world.port == "eve" and not world.tunnel.port.was_held
        words, takes_s = WAYS[world.way]
        self.is_in = False
        self.has_ended = False
        self.ends_at = float("inf")
        self.lines = list(words or [""])
        if world.way in ("well", "slow", "full", "denied", "visit"):
            self.lines.insert(0, GREETING)
        self.ready_at = world.now + takes_s if words is None else float("inf")
        self.gives_up_at = float("inf") if words is None else world.now + takes_s
        self.way = world.way
        world.connection = self

    def next_line(self, timeout_s: float) -> Optional[Tuple[str, str]]:
        world = self.world
        if self.has_ended:
            return next(self.remaining_lines(), None)
        if len(self.lines) > 1:  # what it says as it begins
            return "stderr", self.lines.pop(0)
        if not self.is_in:
            # It waits in steps, so that we see that it waits.
            world.pass_to(min(self.ready_at, self.gives_up_at, world.now + max(timeout_s, 1.1)))
            if world.now >= self.gives_up_at:
                self.has_ended = True
                world.denied += self.way in REFUSALS
                world.in_a_row += self.way in REFUSALS
                world.most_in_a_row = max(world.most_in_a_row, world.in_a_row)
                world.connection = None
                return self.next_line(0)
            if world.now >= self.ready_at:
                return self.log_in()
            return None
        until = world.now + timeout_s
        lost = next((drop for drop in world.drops if drop <= until), float("inf"))
        if world.is_in(world.shaky):
            lost = world.now + 0.3
            world.drops.insert(0, lost)
        if world.now <= world.server_ends <= min(until, lost) and not world.tunnel._has_left:
            world.pass_to(world.server_ends + 0.01)
            world.tunnel._has_left = True
            world.tunnel.ssh.wake()
            return "stdout", ""
        world.pass_to(min(until, lost))
        if lost <= until:
            world.drops.remove(lost)
            self.end()
            self.lines = ["client_loop: send disconnect: Broken pipe"] if world.chance.random() < 0.5 else []
        return None

    def log_in(self) -> Optional[Tuple[str, str]]:
        self.is_in = True
        self.world.in_a_row = 0
        self.world.drops = [drop for drop in self.world.drops if drop > self.world.now]
        if self.world.is_mux:
            return None
        is_open = self.world.listen()
        told = re.search("LocalCommand=echo ([^\0]+)", self.words)
        assert told
        self.lines = [told.group(1), ""]
        if not is_open:
            self.lines.insert(0, "channel_setup_fwd_listener_tcpip: cannot listen to port: %d" % PORT)
        return "stderr", self.lines.pop(0)

    def remaining_lines(self, timeout_s: float = 1.0) -> Iterator[Tuple[str, str]]:
        while self.has_ended and any(self.lines):
            yield "stderr", self.lines.pop(0)

    def wake(self) -> None:
        pass

    def end(self) -> None:
        """It is gone, and its port with it, unless we have that, too."""
        self.has_ended = True
        if self.world.connection is self:
            self.world.connection = None
        if self.world.port == "ssh":
            if self.world.tunnel.port.is_kept:
                self.world.port = "ours"
            else:
                self.world.leave_port()


class StandInForPort(rjupyter.LocalPort):
    """In place of the port: whether one can be shared, the world says, and who is after it."""

    world: World
    is_kept = False  # ours has it, too, whoever listens
    is_lent = False
    was_held = False

    def hold(self) -> bool:
        self.world.look_at_port()
        if self.world.port == "free":
            self.world.port = "ours"
        if self.world.port == "ssh":
            return False
        self.is_kept = self.was_held = self.world.port == "ours"
        return self.is_kept

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        if not self.world.shares_ports:
            self.is_kept = False
        self.is_lent = True
        if self.world.is_in(self.world.evil) and self.world.chance.random() < 0.5 and self.world.port == "ours":
            self.world.leave_port()  # she is quick
            self.is_kept = False
        if self.world.port == "ours":
            self.world.port = "free"
        try:
            yield
        finally:
            self.is_lent = False
            if self.world.port == "free" and self.is_kept:
                self.world.port = "ours"

    def close(self) -> None:
        self.is_kept = False

    def taken_by(self) -> str:
        return " by eve" if self.world.port == "eve" else ""


class Connection(rjupyter.Ssh):
    """The real one, but for what runs a command."""

    world: World

    def _read_config(self) -> None:
        self.config = {}

    def start_guard(self, script: str, *arguments: str) -> None:
        pass

    def call(self, argv: List[str], limit_s: float = 0.0) -> Tuple[bool, str]:
        self.world.sleep(0.02)
        if "forward" in argv:
            is_open = self.world.stands() and self.world.listen()
            return is_open, "" if is_open else "mux_client_forward: forwarding request failed: Port forwarding failed"
        if "cancel" in argv and self.world.port == "ssh":
            self.world.port = "ours" if self.world.tunnel.port.is_kept else "free"
        return self.world.stands(), ""


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Tuple[World, str, object]]:
    """Lives one history: returns the world, what was said, and what ended it."""
    silent = types.SimpleNamespace(is_alive=lambda: True)
    monkeypatch.setattr(rjupyter, "start_thread", lambda do, *arguments: silent)
    monkeypatch.setattr(rjupyter, "private_runtime_dir", lambda: str(tmp_path))
    control = str(tmp_path / ("%x.ctl" % os.getpid()))

    exists = os.path.exists

    def one(seed: int) -> Tuple[World, str, object]:
        world = World(seed)
        monkeypatch.setattr(os.path, "exists", lambda path: world.is_in_there() if path == control else exists(path))
        monkeypatch.setattr(rjupyter, "time", world)
        monkeypatch.setattr(rjupyter, "Child", lambda argv, *_, **__: StandInForSsh(world, argv))
        monkeypatch.setattr(rjupyter, "http_request", world.probe)
        monkeypatch.setattr(rjupyter, "has_terminal", lambda: world.has_terminal)

        def ask_person(question: str) -> str:
            world.asked += 1
            world.is_asking = True
            world.sleep(world.chance.choice((1, 1000)))
            world.is_asking = False
            return ""

        monkeypatch.setattr(rjupyter, "ask_person", ask_person)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            return (world, *held(world, said))

    return one


def held(world: World, said: io.StringIO) -> Tuple[str, object]:
    messages = rjupyter.Messages()
    messages.has_spinner = False
    messages.working = lambda *_, **__: contextlib.nullcontext()  # type: ignore[method-assign, assignment]
    ssh = Connection("gpu1", [], world.has_terminal, messages, world.is_mux)
    ssh.world = world
    ssh.masters = []
    agent = rjupyter.Agent(ssh, messages)
    ssh.meanwhile = lambda: None
    agent.ask = world.ask_end  # type: ignore[method-assign, assignment]
    agent.port = StandInForPort(PORT)
    agent.port.world = world
    facts = {"id": "07af", "pid": 3, "host": "127.0.0.1", "port": 8888, "token": "abc", "node": "gpu1", "seconds": 1.0}
    server = rjupyter.Server(app="notebook", root_dir="/a", base_url="/", local_port=PORT, is_launched=True, **facts)
    tunnel = rjupyter.Tunnel(ssh, agent, server, messages, lambda *words: "again")
    world.tunnel = tunnel
    end: object = None
    try:
        ssh.connect()
        tunnel.open(None)
        tunnel.hold(redials=True)
    except (rjupyter.Failure, Over) as ended:
        end = ended
    return said.getvalue(), end


def check_end(world: World, end: object, said: str) -> None:
    """It goes on, by the same port, or it has ended for a reason that is true and said."""
    if isinstance(end, Over):
        is_up = world.stands() and world.port == "ssh"
        is_logging_in = world.now - world.logins[-1] < 1  # a person has answered, perhaps, a moment ago
        assert world.is_asking or world.now > world.server_ends or is_up or is_logging_in, "it does not come back"
        return
    assert isinstance(end, rjupyter.Failure), end
    if end.status == rjupyter.EXIT_SERVER_ENDED:
        assert world.now >= world.server_ends and "has ended" in end.what
    elif isinstance(end, rjupyter.HostRefused):
        assert world.way == "changed" and "is not the one known here" in end.why
    else:
        assert isinstance(end, rjupyter.LoginRefused), end.facts()
        assert world.denied >= (1 if world.asked else rjupyter.DENIALS_MAX)
        assert re.search("Permission denied|https://login|Confirm user presence", end.why), end.why


def check_said(said: str) -> None:
    """Each loss is said once, and its end; what a person can act on is said once between the two."""
    for loss in said.split("is lost (")[1:]:
        assert loss.count("Connected to gpu1 again") <= 1, loss
        lines = loss.partition("Connected to gpu1 again")[0].splitlines()[1:]
        lines = [line for line in lines if "Press Enter" not in line]
        twice = {line for line in lines if lines.count(line) > 1 and not re.match("Visit|Confirm|Docs", line)}
        assert not twice, twice


def check_pace(world: World) -> None:
    """No minute has more logins than a person would think well of, and there is none that must be in vain."""
    assert not world.in_vain, "%d logins while the port was another's" % world.in_vain
    assert world.has_terminal or world.most_in_a_row <= rjupyter.DENIALS_MAX, "it goes on although it is refused"
    for place, moment in enumerate(world.logins[LOGINS_A_MINUTE:]):
        assert moment - world.logins[place] > 60, world.logins[place : place + LOGINS_A_MINUTE + 1]


def test_histories(live: Callable[[int], Tuple[World, str, object]]) -> None:
    first = int(os.environ.get("RJUPYTER_SEED") or random.randrange(10**9))
    seen = {"logins": 0, "ends": 0, "taken": 0}
    for seed in range(first, first + int(os.environ.get("RJUPYTER_HISTORIES") or 5000)):
        world, said, end = live(seed)
        try:
            check_end(world, end, said)
            check_said(said)
            check_pace(world)
        except AssertionError as error:
            fail(seed, world, said, error)
        seen["logins"] += len(world.logins)
        seen["ends"] += not isinstance(end, Over)
        seen["taken"] += "is taken on this machine by eve" in said
    assert all(seen.values()), seen


def fail(seed: int, world: World, said: str, error: AssertionError) -> NoReturn:
    facts = {name: value for name, value in vars(world).items() if name not in ("chance", "tunnel", "connection")}
    facts["logins"] = world.logins[-40:]
    pytest.fail("RJUPYTER_SEED=%d RJUPYTER_HISTORIES=1\n%s\n%s\n%s" % (seed, facts, said, error), pytrace=False)
