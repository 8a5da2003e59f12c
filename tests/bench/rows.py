"""What is measured: one function for each topic, which returns its lines of the table.

Each interleaves all that it compares (A B C A B C ...), and divides round by round: machines are noisy.
"""

import collections
import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, ContextManager, DefaultDict, Dict, Iterator, List, Set

from browser import chromium
from client import compute
from execution import write_notebook
from figures import Row, judged, ratios, slope, spread
from proxy import Proxy
from rig import STAND_IN, Opened, Rig, first_answer
from sides import ON_HOST, processes_with, quiet_port, wait_until

import rjupyter

Samples = DefaultDict[str, List[float]]
DELAYS_S = [0.0, 0.025, 0.05]  # each way
IDLE_S = 40.0
BULK_MB = 100
BUSY_PORTS = 1000
MANY_SERVERS = 50


def no_samples() -> Samples:
    return collections.defaultdict(list)


def sample(samples: Samples, name: str, value: float) -> None:
    samples[name].append(value)


class Others:
    """What we are measured beside. One that fails has no figures, is not tried again, and costs us none of ours."""

    def __init__(self, *samples: Samples) -> None:
        self._samples = samples
        self._failed: Set[str] = set()

    def measure(self, do: Callable[[], object], *names: str) -> None:
        """Take the samples of these names, as `do` does."""
        if not self._failed.isdisjoint(names):
            return
        try:
            do()
        except Exception:
            traceback.print_exc()
            print("%s failed: it is left out" % names[0], file=sys.stderr, flush=True)
            self._failed.update(names)
            for samples in self._samples:
                for name in names:
                    samples.pop(name, None)


# -- opening ----------------------------------------------------------------------------------------------------------


def measure_cold(rig: Rig, rounds: int) -> List[Row]:
    """Cold start, reattach, and the logins that they need."""
    times: Samples = no_samples()
    logins: Samples = no_samples()

    others = Others(times, logins)

    @contextlib.contextmanager
    def measured(name: str, open_: Callable[[int], ContextManager[Opened]]) -> Iterator[Opened]:
        before = rig.sshd.logins()
        with open_(rig.port) as opened:
            sample(times, name, opened.seconds)
            yield opened
        sample(logins, name, rig.sshd.logins() - before)

    def by_hand() -> None:
        with measured("by hand", rig.open_by_hand):
            pass

    def by_jupyter_forward() -> None:
        with measured("jupyter-forward", rig.open_by_jupyter_forward) as opened:
            began = time.monotonic()
            opened.run.expect("Jupyter Lab URL")
            sample(times, "its browser", opened.seconds + time.monotonic() - began)

    for _ in range(rounds):
        with rig.open_here() as opened:
            sample(times, "floor", opened.seconds)
        rig.end_servers()
        sample(times, "true", rig.ssh(rig.port, "true"))
        with measured("ours", rig.open_ours):
            pass
        sample(times, "pass", rig.ssh(rig.port, "python3 -c pass"))
        with measured("again", rig.open_ours):
            pass
        rig.end_servers()
        others.measure(by_hand, "by hand")
        rig.end_servers()
        others.measure(by_jupyter_forward, "jupyter-forward", "its browser")
        rig.end_servers()
    return cold_rows(times, logins)


def cold_rows(times: Samples, logins: Samples) -> List[Row]:
    least = [floor + true for floor, true in zip(times["floor"], times["true"])]
    others = {name: spread(ratios(times[name], least)) for name in ("by hand", "jupyter-forward", "its browser")}
    others_by_hand = {
        name: spread(ratios(times[name], times["by hand"])) for name in ("jupyter-forward", "its browser")
    }
    words = "jupyter-forward %(jupyter-forward)s to HTTP, %(its browser)s to its browser"
    counts = {name: "%g" % max(logins[name], default=0) for name in ("ours", "again")}
    counts.update({name: "%g" % max(logins[name]) if logins[name] else "-" for name in ("by hand", "jupyter-forward")})
    return [
        Row(
            "cold start to the first answer through the tunnel / (Jupyter alone, without ssh + `ssh HOST true`)",
            "<= 1.04",
            judged(ratios(times["ours"], least), 1.04),
            "by hand %s, %s" % (others["by hand"], words % others),
        ),
        Row(
            "cold start / by hand (`ssh HOST jupyter notebook`, then `ssh -N -L`, without a person's pauses)",
            "<= 0.95",
            judged(ratios(times["ours"], times["by hand"]), 0.95),
            words % others_by_hand,
        ),
        Row(
            "reattach / `ssh HOST python3 -c pass`",
            "<= 1.35",
            judged(ratios(times["again"], times["pass"]), 1.35),
            "nobody reattaches",
        ),
        Row(
            "the same in seconds: cold, reattach, Jupyter alone, `ssh HOST true`",
            "",
            "%s, %s" % (spread(times["ours"]), spread(times["again"])),
            "alone %s, ssh %s" % (spread(times["floor"]), spread(times["true"])),
        ),
        Row(
            "logins for a cold start and for a reattach",
            "1",
            "%s and %s" % (counts["ours"], counts["again"]),
            "by hand %(by hand)s, jupyter-forward %(jupyter-forward)s" % counts,
        ),
    ]


def measure_trips(rig: Rig, rounds: int) -> List[Row]:
    """Round trips: how much longer each takes for each second that the way there and back takes longer."""
    times: Samples = no_samples()
    trips: List[float] = []
    others = Others(times)
    ways = {"by hand": rig.open_by_hand, "jupyter-forward": rig.open_by_jupyter_forward}

    def open_by(name: str, port: int) -> None:
        with ways[name](port) as opened:
            sample(times, name, opened.seconds)

    with contextlib.ExitStack() as stack:
        stack.enter_context(rig.instant_jupyter())
        proxies = [stack.enter_context(contextlib.closing(Proxy(rig.sshd.port, delay_s))) for delay_s in DELAYS_S]
        for _ in range(rounds):
            for proxy in proxies:
                trips.append(2 * proxy.delay_s)
                sample(times, "true", statistics.median(rig.ssh(proxy.port, "true") for _ in range(3)))
                for name in ("ours", "again"):
                    with rig.open_ours(proxy.port) as opened:
                        sample(times, name, opened.seconds)
                rig.end_servers()
                for name in ways:
                    others.measure(functools.partial(open_by, name, proxy.port), name)
                    rig.end_servers()
    more = {name: round_trips(trips, values) - round_trips(trips, times["true"]) for name, values in times.items()}
    return [
        Row(
            "round trips above those of `ssh HOST true`, by slope over 0, 25 and 50 ms each way "
            "(the fastest run at each; a stand-in for Jupyter that starts at once)",
            "<= 3",
            "cold %s, reattach %s" % (judged([more["ours"]], 3, "%.1f"), judged([more["again"]], 3, "%.1f")),
            ", ".join("%s %s" % (name, spread([more[name]] if name in more else [], "%.1f")) for name in ways),
        )
    ]


def round_trips(trips: List[float], seconds: List[float]) -> float:
    """Return the slope through the fastest run at each delay: a busy machine adds time, and never takes any away."""
    ways = sorted(set(trips))
    return slope(ways, [min(s for trip, s in zip(trips, seconds) if trip == way) for way in ways])


# -- what goes through it ---------------------------------------------------------------------------------------------


def measure_tunnel(rig: Rig, rounds: int) -> List[Row]:
    """Throughput, and the time of a new connection: ours, plain `ssh -L` and no tunnel, to the same Jupyter."""
    static = rig.sshd.home / "static"
    static.mkdir(exist_ok=True)
    with open(static / "bulk.bin", "wb") as stream:
        stream.truncate(BULK_MB * 1000000)
    config = rig.sshd.home / ".jupyter/jupyter_server_config.py"
    before = config.read_text()
    config.write_text(before + "c.ServerApp.extra_static_paths = [%r]\n" % str(static))
    rates: Samples = no_samples()
    waits: Samples = no_samples()

    def by_jupyter_forward() -> None:
        with rig.open_by_jupyter_forward(rig.port) as opened:
            for _ in range(3):
                sample(rates, "jupyter-forward", megabytes_per_s(opened.port))
                sample(waits, "jupyter-forward", new_connection_s(opened.port))

    try:
        with rig.open_ours(rig.port) as ours, rig.plain_tunnel(server_port(rig)) as plain_port:
            for _ in range(rounds):
                for name, port in (("direct", server_port(rig)), ("plain", plain_port), ("ours", ours.port)):
                    sample(rates, name, megabytes_per_s(port))
                    sample(waits, name, new_connection_s(port))
        rig.end_servers()
        Others(rates, waits).measure(by_jupyter_forward, "jupyter-forward")
    finally:
        rig.end_servers()
        config.write_text(before)
        shutil.rmtree(static)
    jupyter_forward = spread(ratios(rates["jupyter-forward"], rates["plain"]))
    milliseconds = {
        name: spread([1000 * wait for wait in waits[name]], "%.1f", " ms")
        for name in ("ours", "plain", "direct", "jupyter-forward")
    }
    return [
        Row(
            "throughput of the tunnel / plain `ssh -L` (a static file of %d MB from Jupyter)" % BULK_MB,
            ">= 0.98",
            judged(ratios(rates["ours"], rates["plain"]), 0.98, is_least=True),
            "jupyter-forward %s; plain `ssh -L` %s MB/s, without a tunnel %s MB/s"
            % (jupyter_forward, spread(rates["plain"], "%.0f"), spread(rates["direct"], "%.0f")),
        ),
        Row(
            "a new connection and its first answer / the same without a tunnel",
            "<= 2",
            "%s; %s" % (judged(ratios(waits["ours"], waits["direct"]), 2), milliseconds["ours"]),
            "plain `ssh -L` %(plain)s, jupyter-forward %(jupyter-forward)s, without a tunnel %(direct)s" % milliseconds,
        ),
    ]


def server_port(rig: Rig) -> int:
    """Return the port of the one server that we launched."""
    (record,) = rig.host.servers()
    return int(record["port"])


def megabytes_per_s(port: int) -> float:
    """Fetch the bulk file and return how fast it came."""
    buffer = bytearray(1 << 20)
    began = time.monotonic()
    received = 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /static/bulk.bin HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        while True:
            count = connection.recv_into(buffer)
            if not count:
                break
            received += count
    if received < BULK_MB * 1000000:
        raise ConnectionError("%d bytes of the bulk file came: %r" % (received, bytes(buffer[:200])))
    return received / (time.monotonic() - began) / 1e6


def new_connection_s(port: int) -> float:
    """Return the median time of a new connection with one question and its answer."""
    return statistics.median(first_answer(port, time.monotonic()) for _ in range(20))


# -- holding ----------------------------------------------------------------------------------------------------------


def measure_idle(rig: Rig, rounds: int) -> List[Row]:
    """Processor time and memory of an open tunnel that nobody uses, its own probes included."""
    with rig.open_ours(rig.port) as opened:
        opened.run.expect("To end it")
        compute(opened.run.url(), "print(1)")
        pids = list(processes_with(rig.mark, without=ON_HOST))
        (recorder,) = [pid for pid, words in processes_with(rig.mark).items() if words.endswith("/agent.py")]
        time.sleep(5)  # until it has no more to do
        before, before_there = sum(cpu_s(pid) for pid in pids), cpu_s(recorder)
        time.sleep(IDLE_S)
        percent = 100 * (sum(cpu_s(pid) for pid in pids) - before) / IDLE_S
        there = judged([100 * (cpu_s(recorder) - before_there) / IDLE_S], 0.2, "%.3f", " %")
        there += ", " + judged([resident_mb(recorder)], 40, "%.1f", " MB")
        megabytes = resident_mb(opened.run.pid)
        bare = resident_mb_of_bare_python()
    rig.end_servers()
    return [
        Row(
            "idle: processor time of script and ssh together; resident memory of the script",
            "<= 0.1 % of a core, <= 25 MB",
            "%s, %s" % (judged([percent], 0.1, "%.3f", " %"), judged([megabytes], 25, "%.1f", " MB")),
            "an idle Python alone: %.1f MB" % bare,
        ),
        Row(
            "the recorder beside a server with one idle kernel: processor time, resident memory",
            "<= 0.2 % of a core, <= 40 MB",
            there,
            "nobody records",
        ),
    ]


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used: clock_getcpuclockid(3), finer than the ticks of /proc."""
    return time.clock_gettime((~pid << 3) | 2)


def resident_mb(pid: int) -> float:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/%d/status" % pid).read_text())
    assert match
    return int(match.group(1)) * 1024 / 1e6


def resident_mb_of_bare_python() -> float:
    argv = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        megabytes = resident_mb(process.pid)
        process.communicate(b"\n")
    return megabytes


def measure_redial(rig: Rig, rounds: int) -> List[Row]:
    """Kill ssh, and wait until the same tunnel leads to the server again."""
    times: Samples = no_samples()
    with rig.open_ours(rig.port) as opened:
        opened.run.expect("To end it")
        for done in range(rounds):
            sample(times, "true", rig.ssh(rig.port, "true"))
            (ssh,) = [p for p, w in processes_with(rig.mark, without=ON_HOST).items() if w.startswith("ssh -M ")]
            began = time.monotonic()
            os.kill(ssh, signal.SIGKILL)
            opened.run.expect(r"(?s)\A(.*Connected to host again){%d}" % (done + 1))
            sample(times, "redial", first_answer(opened.port, began))
    rig.end_servers()
    ratio = judged(ratios(times["redial"], times["true"]), 2)
    return [Row("the tunnel is back after ssh was killed / one `ssh HOST true`", "<= 2", ratio, "nobody redials")]


# -- the host with much on it -----------------------------------------------------------------------------------------


def measure_list(rig: Rig, rounds: int) -> List[Row]:
    """`list` with one server, and with many: stand-ins, which cost the host next to nothing."""
    times: Samples = no_samples()
    for _ in range(rounds):
        for count in (1, MANY_SERVERS):
            with stand_ins(rig, count):
                sample(times, str(count), rig.time(ours_argv(rig, "list")))
    ratio = judged(ratios(times[str(MANY_SERVERS)], times["1"]), 1.5)
    what = "`list` of %d servers / of one (stand-ins that answer as Jupyter does, each a process)" % MANY_SERVERS
    return [Row(what, "<= 1.5", ratio, "nobody lists; of one: %s s" % spread(times["1"]))]


def ours_argv(rig: Rig, *action: str) -> List[str]:
    return [rig.laptop.installed, "-F", str(rig.sshd.config), "host", *action]


def measure_joined(rig: Rig, rounds: int) -> List[Row]:
    """`list` while a tunnel of ours is up, beside a session through the same control socket; and what it sends."""
    times: Samples = no_samples()
    run = rig.laptop.start("--local-port", str(quiet_port()), "host", has_terminal=False)
    rig.laptop.runs.remove(run)
    try:
        run.expect("To end it")
        (control,) = rig.laptop.runtime.glob("rjupyter/*.ctl")
        for _ in range(rounds):
            sample(times, "pass", rig.time(["ssh", "-S", str(control), "host", "python3 -c pass"]))
            sample(times, "ours", rig.time(ours_argv(rig, "list")))
        run.interrupt()
        run.wait(20)
    finally:
        run.close()
        rig.end_servers()
    command = rjupyter.agent_command()
    request = rjupyter.Request(action="list", nonce="rjupyter-" + 16 * "0")
    sent = len(command) + len(rjupyter.AgentFile().input_of(command, request, is_whole=False))
    kilobytes = judged([sent / 1000], 2, "%.1f", " kB")
    return [
        Row(
            "`list` while a tunnel of ours is up / `ssh -S SOCKET HOST python3 -c pass`, through the same socket",
            "<= 2",
            judged(ratios(times["ours"], times["pass"]), 2),
            "`ssh -S` %s ms" % spread([1000 * seconds for seconds in times["pass"]], "%.0f"),
        ),
        Row(
            "bytes to the host for a second `list`",
            "<= 2 kB",
            kilobytes,
            "",
        ),
    ]


@contextlib.contextmanager
def stand_ins(rig: Rig, count: int) -> Iterator[None]:
    """Run servers on the host that only seem to be Jupyter."""
    directory = rig.sshd.home / ".local/share/jupyter/runtime"
    directory.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, str(STAND_IN), "many", str(directory), str(count)]
    environment = dict(rig.laptop.environment, **rig.sshd.environment)
    with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE) as process:
        try:
            wait_until(lambda: len(list(directory.glob("jpserver-*.json"))) == count, "the stand-ins listen")
            yield
        finally:
            process.communicate()
            shutil.rmtree(directory)


def measure_ports(rig: Rig, rounds: int) -> List[Row]:
    """The search for a free port, behind many that are busy."""
    times: Samples = no_samples()
    with contextlib.ExitStack() as stack:
        first = busy_ports(stack)
        for _ in range(rounds):
            sample(times, "busy", seconds_of(lambda: rjupyter.find_free_port(first)))
            sample(times, "free", seconds_of(lambda: rjupyter.find_free_port(first + BUSY_PORTS)))
            for name, argv in PORT_TOOLS.items():
                if shutil.which(argv[0]):
                    sample(times, name, rig.time([word.replace("PORT", str(first)) for word in argv]))
    added = [1000 * (busy - free) for busy, free in zip(times["busy"], times["free"])]
    others = [
        "`%s` once for each port %.1f s" % (name, BUSY_PORTS * statistics.median(times[name]))
        for name in PORT_TOOLS
        if name in times
    ]
    what = "%s busy ports before the first free one: time added" % format(BUSY_PORTS, ",")
    return [Row(what, "<= 50 ms", judged(added, 50, "%.1f", " ms"), ", ".join(others))]


PORT_TOOLS = {"ss": ["ss", "-Htln", "sport = :PORT"], "netstat": ["netstat", "-tln"]}


def busy_ports(stack: contextlib.ExitStack) -> int:
    """Listen on as many ports in a row, and return the first of them."""
    while True:
        first = quiet_port() - BUSY_PORTS
        with contextlib.ExitStack() as taken:
            try:
                for port in range(first, first + BUSY_PORTS):
                    taken.callback(rjupyter.listen_on(port).close)
            except OSError:
                continue
            stack.push(taken.pop_all())
            return first


def seconds_of(function: Callable[[], Any]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


# -- the page ---------------------------------------------------------------------------------------------------------


def measure_page(rig: Rig, rounds: int) -> List[Row]:
    """Time until the page shows the files, in a browser that was never there, over a slow link; with -C and without."""
    (rig.sshd.home / "work").mkdir(exist_ok=True)
    times: Samples = no_samples()
    with contextlib.closing(Proxy(rig.sshd.port, delay_s=0.025, bytes_per_s=20e6 / 8)) as proxy:
        for _ in range(max(2, rounds // 2)):
            for name, options in (("plain", []), ("-C", ["-C"])):
                with rig.open_ours(proxy.port, *options) as opened:
                    sample(times, name, page_s(rig, opened.run.url()))
    rig.end_servers()
    ratio = ratios(times["-C"], times["plain"])
    seconds = "%s s with `-C`, %s s without" % (spread(times["-C"], "%.1f"), spread(times["plain"], "%.1f"))
    what = "page usable in Chromium over 20 Mbit/s and 50 ms there and back: with `-C` / without"
    return [Row(what, "say which wins", spread(ratio), seconds)]


def page_s(rig: Rig, url: str) -> float:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    with chromium(rig.laptop) as driver:
        began = time.monotonic()
        driver.get(url)
        wait = WebDriverWait(driver, 120, poll_frequency=0.05)
        wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".jp-DirListing-item"))
        seconds = time.monotonic() - began
    shutil.rmtree(rig.laptop.home / "chromium", ignore_errors=True)
    return seconds


# -- execute ----------------------------------------------------------------------------------------------------------


def measure_execute(rig: Rig, rounds: int) -> List[Row]:
    """By `execute`, and by nbconvert on the host itself: a notebook of much metadata, and one that prints much."""
    path = rig.laptop.home / "heavy.ipynb"
    model = {"model_name": "HTMLModel", "model_module": "x", "model_module_version": "1", "state": {"value": "x" * 500}}
    states = {"%032x" % number: model for number in range(9800)}
    view = "application/vnd.jupyter.widget-state+json"
    write_notebook(
        path,
        *["print(%d)" % number for number in range(20)],
        widgets={view: {"state": states, "version_major": 2, "version_minor": 0}},
    )
    prints = rig.laptop.home / "prints.ipynb"
    write_notebook(prints, "for number in range(5000):\n    print(number, flush=True)")
    nbconvert = [str(rig.jupyter / "jupyter"), "nbconvert", "--execute", "--to", "notebook", "--output", "theirs"]
    rows = []
    cells = "20 cells in a notebook with %.1f MB of metadata" % (path.stat().st_size / 1e6)
    for file, which, most in ((path, cells, 1.2), (prints, "a cell that prints 5,000 times", 1.3)):
        times: Samples = no_samples()
        for _ in range(max(2, rounds // 2)):
            sample(times, "nbconvert", rig.time([*nbconvert, str(file)]))
            sample(times, "ours", rig.time(ours_argv(rig, "execute", str(file))))
        ratio = judged(ratios(times["ours"], times["nbconvert"]), most)
        what = "`execute` of %s / `nbconvert --execute` there" % which
        rows.append(Row(what, "<= %.1f" % most, ratio, "nbconvert %s s" % spread(times["nbconvert"])))
    return rows


# -- the program itself -----------------------------------------------------------------------------------------------


def measure_start(rig: Rig, rounds: int) -> List[Row]:
    """How long the script takes to come to its first line."""
    times: Samples = no_samples()
    for _ in range(3 * rounds):
        sample(times, "ours", rig.time([rig.laptop.installed, "--version"]))
        sample(times, "pass", rig.time([sys.executable, "-c", "pass"]))
    ratio = judged(ratios(times["ours"], times["pass"]), 6)
    milliseconds = [1000 * seconds for seconds in times["pass"]]
    others = "`python3 -c pass` %s" % spread(milliseconds, "%.0f", " ms")
    return [Row("`rjupyter --version` / `python3 -c pass`", "<= 6", ratio, others)]


ROWS: Dict[str, Callable[[Rig, int], List[Row]]] = {
    "cold": measure_cold,
    "trips": measure_trips,
    "tunnel": measure_tunnel,
    "idle": measure_idle,
    "redial": measure_redial,
    "list": measure_list,
    "joined": measure_joined,
    "ports": measure_ports,
    "page": measure_page,
    "execute": measure_execute,
    "start": measure_start,
}
