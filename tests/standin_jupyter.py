"""A stand-in for a Jupyter server, for the tests in which Jupyter is not the point: 50 ms in place of 1 s.

It does what rjupyter.py asks of a server, and no more: it reads the command line and the token file, looks for its port
as Jupyter does, writes the runtime file before it binds, answers `/api/status` (which says where it runs as well),
`/api/kernels` and `/api/sessions` (there are none), refuses who has no token, shows a page, ends by `/api/shutdown` or
SIGTERM, and removes its files. It runs the user's configuration, of which it heeds no setting. It has no kernels, and
nothing is recorded. A test that needs more is marked `jupyter`, and has the real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from urllib.parse import parse_qs, unquote, urlsplit

TYPE_CHECKING = False  # as mypy knows it: a tenth of a start is for typing
if TYPE_CHECKING:
    from typing import Any


def settings_of(argv: list[str]) -> dict[str, Any]:
    """Return the options by their last names; Jupyter's own short ones are among them."""
    settings: dict[str, Any] = {"ip": "localhost", "port": "8888", "base_url": "/", "sock": "", "notebook-dir": ""}
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        settings[name.rpartition(".")[2]] = value
    return settings


class Unheeded:
    """What the user's configuration sets, in vain."""

    def __getattr__(self, name: str) -> "Unheeded":
        return self


def serve(argv: list[str]) -> None:
    """Be the server until it is shut down."""
    configuration = os.path.expanduser("~/.jupyter/jupyter_server_config.py")
    if os.path.exists(configuration):
        with open(configuration) as stream:
            exec(stream.read(), {"c": Unheeded()})

    def log(words: str) -> None:
        sys.stderr.write("[I %s ServerApp] %s\n" % (time.strftime("%Y-%m-%d %H:%M:%S.000"), words))
        sys.stderr.flush()

    settings = settings_of(argv)
    if os.getuid() == 0 and "allow-root" not in settings:
        sys.exit("[C] Running as root is not recommended. Use --allow-root to bypass.")
    root_dir = os.path.abspath(settings["notebook-dir"] or os.getcwd())
    token_file = os.environ.get("JUPYTER_TOKEN_FILE")
    token = settings.get("token", os.environ.get("JUPYTER_TOKEN", ""))
    if token_file:
        with open(token_file) as stream:
            token = stream.read().strip()
    base_url = "/%s/" % settings["base_url"].strip("/") if settings["base_url"].strip("/") else "/"
    data = os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "jupyter")
    runtime = os.path.join(os.environ.get("JUPYTER_DATA_DIR") or data, "runtime")
    runtime = os.environ.get("JUPYTER_RUNTIME_DIR") or runtime
    os.makedirs(runtime, mode=0o700, exist_ok=True)
    file = os.path.join(runtime, "jpserver-%d.json" % os.getpid())
    page = file[: -len(".json")] + "-open.html"
    started = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())

    class Handler(socketserver.StreamRequestHandler):
        """HTTP/1.1 as it is spoken to us: to import http.server takes as long as all else together."""

        def handle(self) -> None:
            try:
                while self.take():
                    pass
            except OSError:
                pass

        def answer(self, status: int, body: bytes, kind: str = "application/json", location: str = "") -> None:
            if status >= 400:
                log("%d %s %s" % (status, self.method, self.path))
            lines = ["HTTP/1.1 %d ." % status, "Content-Type: " + kind, "Content-Length: %d" % len(body)]
            head = "\r\n".join([*lines, *(["Location: " + location] if location else []), "", ""])
            self.wfile.write(head.encode() + (b"" if self.method == "HEAD" else body))

        def take(self) -> bool:
            """Answer one request, and return whether there may be another one."""
            words = self.rfile.readline().decode("latin-1").split()
            if len(words) != 3:
                return False
            self.method, self.path, version = words
            headers = {"content-length": "0", "connection": "", "authorization": ""}
            for line in iter(lambda: self.rfile.readline().decode("latin-1").strip(), ""):
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers["content-length"]))
            address = urlsplit(self.path)
            given = parse_qs(address.query).get("token", [""])[0] or headers["authorization"].partition(" ")[2]
            path = unquote(address.path[len(base_url) :])
            if not address.path.startswith(base_url):
                self.answer(404, b"{}")
            elif not token or given == token:
                self.respond(path, body)
            elif path.startswith("api"):
                self.answer(403, b'{"message": "Forbidden", "reason": null}')
            else:
                self.answer(302, b"", "text/html", base_url + "login")
            return version == "HTTP/1.1" and headers["connection"].lower() != "close"

        def respond(self, path: str, body: bytes) -> None:
            state = {"started": started, "last_activity": started, "connections": 0, "kernels": 0}
            facts: Any = {
                "api": {"version": "2.99.0"},
                "api/status": dict(
                    state,
                    node=os.uname().nodename,
                    root_dir=root_dir,
                    pid=os.getpid(),
                    uid=os.getuid(),
                    nice=os.nice(0),
                ),
                "api/kernels": [],
                "api/sessions": [],
                "api/kernelspecs": {"default": "python3", "kernelspecs": {}},
            }.get(path)
            if self.method == "POST" and path == "api/shutdown":
                self.answer(200, b"")
                log("Shutting down on /api/shutdown request.")
                threading.Thread(target=end).start()
            elif path.startswith("api") and (self.method != "GET" or facts is None):
                self.answer(404, json.dumps({"message": "not in the stand-in", "body": len(body)}).encode())
            elif path.startswith("api"):
                self.answer(200, json.dumps(facts).encode())
            else:
                self.answer(200, b"<title>stand-in for Jupyter</title>", "text/html")

    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 100

    class SocketServer(Server):
        address_family = getattr(socket, "AF_UNIX", -1)
        allow_reuse_address = False

        def get_request(self) -> Any:
            return self.socket.accept()[0], ("", 0)

    def end(*_: Any) -> None:
        server.shutdown()

    if not settings["port"].isdigit():
        sys.exit("[C] Bad config encountered during initialization: the 'port' trait expected an int")
    first = port = int(settings["port"])
    for port in [] if settings["sock"] else range(first, first + 100):
        with socket.socket() as probe:  # Jupyter looks in the same way, and takes another port, before it binds
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings["ip"], port))
                break
            except OSError:
                log("The port %d is already in use, trying another port." % port)
    facts = {
        "base_url": base_url,
        "hostname": settings["ip"],
        "password": False,
        "pid": os.getpid(),
        "port": port,
        "root_dir": root_dir,
        "secure": False,
        "sock": settings["sock"],
        "token": token,
        "url": "http://%s:%d%s" % (settings["ip"], port, base_url),
        "version": "2.99.0",
    }
    with open(file, "w") as stream:
        json.dump(facts, stream)
    with open(page, "w") as stream:
        stream.write("<a href='%s?token=%s'>" % (facts["url"], token))
    try:
        server: Server
        if settings["sock"]:
            server = SocketServer(settings["sock"], Handler)
            os.chmod(settings["sock"], 0o600)
        else:
            server = Server((settings["ip"], port), Handler)
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end).start())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log("Serving notebooks from local directory: " + root_dir)
        log("Jupyter Server 2.99.0 is running at:")
        log("%stree?token=..." % facts["url"])
        server.serve_forever(0.05)
        server.server_close()
    finally:
        for path in (file, page, settings["sock"]):
            if path and os.path.exists(path):
                os.unlink(path)
