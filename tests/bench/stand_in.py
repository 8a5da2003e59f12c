"""Servers that answer as far as our questions go, and start at once.

    stand_in.py many RUNTIME_DIR COUNT    COUNT of them, each a process; fifty real Jupyters would fill a small machine
    stand_in.py jupyter ARGUMENTS         one that is started as Jupyter is: round trips can be told from its start

They end when their stdin does, or when they are killed.
"""

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import List

TOKEN = "5f1c09ab62e9"


class StandIn:
    """Listens at once; its runtime file is as Jupyter writes it."""

    def __init__(self, runtime_dir: Path, port: int = 0, host: str = "127.0.0.1", token: str = TOKEN) -> None:
        self.token = token
        self.host = host
        self.listener = socket.create_server((host, port))
        self.port = self.listener.getsockname()[1]
        info = {"hostname": host, "port": self.port, "sock": "", "token": token, "base_url": "/", "root_dir": "/"}
        info.update(secure=False, password=False, pid=os.getpid())
        name = "jpserver-%d.json" % os.getpid()
        (runtime_dir / ("." + name)).write_text(json.dumps(info))
        os.replace(runtime_dir / ("." + name), runtime_dir / name)

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            words = connection.recv(65536).split()
            if words:
                connection.sendall(self._answer(words[1].decode(), self.token.encode() in words))

    def _answer(self, path: str, is_known: bool) -> bytes:
        """Answer who has the token; /api is for everyone."""
        facts = {"version": "2", "last_activity": "2026-11-24T00:00:00.000000Z", "kernels": 0}
        body = json.dumps([] if path.startswith("/api/kernels") else facts)
        status = "200 OK" if is_known or path == "/api" else "403 Forbidden"
        head = "HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
        return (head + body).encode()


def run_many(runtime_dir: Path, count: int) -> None:
    """Run so many of them until stdin ends."""
    pids: List[int] = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            StandIn(runtime_dir).serve()
        pids.append(pid)
    sys.stdin.read()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def run_as_jupyter(arguments: List[str]) -> None:
    """Do what a Jupyter does that is started with these arguments, as far as those who start it look."""
    options = dict(word.lstrip("-").partition("=")[::2] for word in arguments)
    runtime_dir = Path(os.environ.get("JUPYTER_RUNTIME_DIR") or Path.home() / ".local/share/jupyter/runtime")
    runtime_dir.mkdir(parents=True, exist_ok=True)
    token_file = os.environ.get("JUPYTER_TOKEN_FILE")
    token = Path(token_file).read_text() if token_file else TOKEN
    server = StandIn(runtime_dir, int(options.get("port", 0)), options.get("ip", "127.0.0.1"), token)
    print("Jupyter Server is running at:")
    for host in (server.host, "127.0.0.1"):
        print("    http://%s:%d/tree?token=%s" % (host, server.port, token), flush=True)
    server.serve()


if __name__ == "__main__":
    if sys.argv[1] == "many":
        run_many(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        run_as_jupyter(sys.argv[2:])
