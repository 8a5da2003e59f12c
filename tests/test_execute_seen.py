"""What other users of the host can see of an execution: nothing that it prints, and nothing that it was given."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, List, Set

import pytest
from execution import IPYKERNEL, add_kernel, printed, start_waiting, waiting_for, write_notebook
from jupyters import jupyter_for_everyone
from sides import ON_HOST, Host, Laptop, User, processes_with

pytestmark = pytest.mark.jupyter

TELLS = """
import os, time
print('waits', flush=True)
while not os.path.exists('go'):
    print(secret[::-1], flush=True)
    time.sleep(0.05)
"""

# Run as another user: subscribe to everything, and print what is heard.
LISTENER = """
import sys, time, zmq
context, poller = zmq.Context(), zmq.Poller()
for address in sys.argv[1:]:
    hears = context.socket(zmq.SUB)
    hears.setsockopt(zmq.LINGER, 0)
    hears.subscribe(b'')
    hears.connect(address)
    poller.register(hears, zmq.POLLIN)
end = time.monotonic() + 4
while time.monotonic() < end:
    for hears, _ in poller.poll(200):
        print(hears.recv_multipart())
sys.stdout.flush()
import os; os._exit(0)
"""
READER = """
import os, sys
for top in sys.argv[2:]:
    for place, _, names in os.walk(top):
        for name in names:
            try:
                with open(os.path.join(place, name), 'rb') as stream:
                    if sys.argv[1].encode() in stream.read(): print(os.path.join(place, name))
            except OSError: pass
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        with open('/proc/%s/cmdline' % pid, 'rb') as stream:
            if pid != str(os.getpid()) and sys.argv[1].encode() in stream.read(): print(pid)
    except OSError: pass
"""


def addresses_of(pids: List[int]) -> List[str]:
    """Return, in zmq's words, where these processes listen, on ports and on Unix sockets."""
    inodes: Set[str] = set()
    for pid in pids:
        for fd in Path("/proc/%d/fd" % pid).glob("*"):
            try:
                inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(fd)))
            except OSError:
                pass
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net/" + name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.append("tcp://127.0.0.1:%d" % int(words[1].rpartition(":")[2], 16))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) == 8 and words[3] == "00010000" and words[6] in inodes:
            found.append("ipc://" + words[7])
    return found


def processes_of(user: User) -> List[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat("/proc/" + name).st_uid == user.uid:
                found.append(int(name))
        except OSError:
            pass
    return found


def as_user(user: User, program: str, *arguments: str) -> str:
    """Run Python code as a user of the host and return what it printed."""
    setpriv = shutil.which("setpriv")
    if not setpriv:
        pytest.skip("there is no setpriv, by which the test becomes another user")
    argv = [setpriv, "--reuid", str(user.uid), "--regid", "65534", "--clear-groups"]
    argv += [str(jupyter_for_everyone() / "python"), "-c", program, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd="/", check=True).stdout


@pytest.mark.parametrize("options", [[], ["--socket"]], ids=["", "socket"])
def test_another_user_hears_nothing(
    laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host], mark: str, options: List[str]
) -> None:
    """Who subscribes to all that the run's processes listen on reads nothing, nor in their files and arguments. (G5)

    Also what is given with -p is nowhere to be read.
    """
    user, other = make_user("/bin/bash"), make_user("/bin/sh")
    user.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
    make_host(user=user)
    secret = "s3cret-" + mark
    write_notebook(laptop.home / "w.ipynb", TELLS)
    given = ["-p", "secret=" + secret[::-1]]
    run = laptop.start(*options, "host", "execute", "-v", "w.ipynb", *given, has_terminal=False)
    run.expect("^waits$")
    addresses = addresses_of(processes_of(user))
    heard = as_user(other, LISTENER, *addresses)
    places = [str(user.home), "/tmp/rjupyter-%d" % user.uid]
    read = {name for words in (secret, secret[::-1]) for name in as_user(other, READER, words, *places).split()}
    here = {str(pid) for pid in processes_with(mark, without=ON_HOST)}
    user.write("go", "")
    assert run.wait() == 0, run.text
    assert secret not in heard, "heard on %s" % addresses
    assert not read - here, "read by another user"
    left = [path for path in user.home.rglob("*") if path.is_socket()]
    assert not left, "sockets are left behind"


def kind_of(address: str) -> str:
    """Return what kind of zmq socket listens on a port, by what it says of itself when one connects (ZMTP 3)."""
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32))
        said, found = b"", None
        while not found:
            part = connection.recv(1000)
            assert part, "closed after %r" % said
            said += part
            found = re.search(rb"Socket-Type\0\0\0.(REP|ROUTER|PUB|PULL|XPUB|DEALER|PAIR)", said, re.DOTALL)
    return found.group(1).decode()


def kinds_on_ports(mark: str) -> Set[str]:
    """Return what kernels of this test listen with on ports."""
    kernels = [pid for pid, words in processes_with(mark).items() if "ipykernel" in words]
    assert kernels
    return {kind_of(address) for address in addresses_of(kernels) if address.startswith("tcp")}


@pytest.mark.parametrize("kind", ["short", "long"])
def test_kernel_of_a_run_listens_on_no_port(
    laptop: Laptop, make_host: Callable[..., Host], mark: str, kind: str
) -> None:
    """Also where the home's path is longer than the path of a socket may be (about 104 bytes). (G5)

    One port is ipykernel's own and not ours to move: a PULL socket for what subprocesses print. Nothing is sent there.
    """
    host = make_host(path=str(jupyter_for_everyone()))
    if kind == "long":
        home = host.home / ("a-home-with-a-long-name-" * 5)
        home.mkdir()
        host.sshd.stop()
        host.sshd.environment["HOME"] = str(home)
        host.sshd.home = host.home = home
        host.sshd.start()
    run, _ = start_waiting(laptop)
    kinds = kinds_on_ports(mark)
    sockets = [path for path in host.sshd.directory.rglob("*") if path.is_socket()]
    assert all(path.parent.stat().st_mode & 0o077 == 0 for path in sockets)
    (host.home / "go").touch()
    assert run.wait() == 0, run.text
    assert kinds <= {"PULL"}
    time.sleep(0.5)
    left = [path for path in host.sshd.directory.rglob("*") if path.is_socket()]
    assert not left, "sockets are left behind"


@pytest.mark.parametrize("kind", ["ends", "is deaf"])
def test_kernel_that_knows_ports_alone(laptop: Laptop, host: Host, mark: str, kind: str) -> None:
    """One that ends when it is given a socket runs on ports, as before; one that may be deaf does so at once. (G5)

    The first has a command that looks like ipykernel's; of the other one it is said.
    """
    then = "{ echo I know ports alone >&2; exit 1; }" if kind == "ends" else "exec sleep 600"
    program = host.home / ("python3" if kind == "ends" else "runner")
    program.write_text('#!/bin/sh\ngrep -q \'"transport": *"ipc"\' "$4" && %s\nexec %s "$@"\n' % (then, IPYKERNEL[0]))
    program.chmod(0o755)
    add_kernel(host.home, "ports", [str(program), *IPYKERNEL[1:]])
    write_notebook(laptop.home / "w.ipynb", "x = 1", waiting_for(), "print(x)")
    run, _ = start_waiting(laptop, "--kernel", "ports", is_written=False)
    assert kinds_on_ports(mark) & {"PUB", "XPUB"}
    (host.home / "go").touch()
    assert run.wait() == 0, run.text
    assert ("The kernel ports listens on ports" in run.stderr) == (kind == "is deaf"), run.stderr
    assert printed(laptop.home / "w.executed.ipynb")[2] == "1\n"
