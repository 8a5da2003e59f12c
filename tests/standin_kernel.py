"""A stand-in for Python's kernel, for the tests in which the kernel is not the point: 0.1 s of a core in place of 0.45.

It speaks what an execution needs of Jupyter's protocol (jupyter-client.readthedocs.io, "Messaging"), on pyzmq alone:
kernel_info, execute_request with its streams, its result and its error, SIGINT, shutdown_request, the heartbeat. There
is no IPython in it: no display data, no magics, no await, no widgets, and a plain traceback. A test that needs more is
marked `jupyter`, and has the real one.
"""

import ast
import hashlib
import hmac
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, Dict, List

import zmq

DELIMITER = b"<IDS|MSG>"
LANGUAGE = {"name": "python", "version": sys.version.split()[0], "mimetype": "text/x-python", "file_extension": ".py"}
INFO = {"status": "ok", "protocol_version": "5.3", "implementation": "standin", "implementation_version": "1"}
FLUSH_S = 0.1  # what is printed is sent that often, as ipykernel does it


class Stream:
    """sys.stdout or sys.stderr of the cells: what is written goes out when it is flushed, or soon."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, kernel: "Kernel", name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.pieces: List[str] = []

    def write(self, words: str) -> int:
        if not isinstance(words, str):
            raise TypeError("write() argument must be str, not %s" % type(words).__name__)
        with self.kernel.lock:
            other = self.kernel.streams[self.name == "stdout"]
            if other.pieces:
                other.flush()
            self.pieces.append(words)
        return len(words)

    def flush(self) -> None:
        with self.kernel.lock:
            if self.pieces:
                words = "".join(self.pieces)
                self.pieces = []
                self.kernel.publish("stream", {"name": self.name, "text": words})

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


class Kernel:
    """The kernel of one connection file."""

    def __init__(self, connection: Dict[str, Any]) -> None:
        self.key = connection["key"].encode()
        self.lock = threading.RLock()  # one thread at a time sends on iopub
        self.count = 0
        self.messages = 0
        self.parent: Dict[str, Any] = {}
        self.streams = [Stream(self, "stdout"), Stream(self, "stderr")]
        self.names: Dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        self.is_over = False
        context = zmq.Context()
        self.sockets: Dict[str, Any] = {}
        for name, kind in (
            ("iopub", zmq.PUB),
            ("hb", zmq.REP),
            ("stdin", zmq.ROUTER),
            ("control", zmq.ROUTER),
            ("shell", zmq.ROUTER),
        ):
            self.sockets[name] = context.socket(kind)
            self.sockets[name].linger = 1000
            between = ":" if connection["transport"] == "tcp" else "-"
            address = "%s://%s%s%s" % (
                connection["transport"],
                connection["ip"],
                between,
                connection[name + "_port"],
            )
            self.sockets[name].bind(address)

    # -- messages --

    def frames(self, kind: str, content: Any, parent: Any) -> List[bytes]:
        self.messages += 1
        date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + ".%06dZ" % (time.time() % 1 * 1000000)
        header = {"msg_id": "%d_%d" % (os.getpid(), self.messages), "msg_type": kind, "username": "standin"}
        header.update(session=str(os.getpid()), date=date, version="5.3")
        parts = [json.dumps(part).encode() for part in (header, parent, {}, content)]
        signature = hmac.new(self.key, b"".join(parts), hashlib.sha256).hexdigest().encode() if self.key else b""
        return [DELIMITER, signature, *parts]

    def publish(self, kind: str, content: Any) -> None:
        with self.lock:
            self.sockets["iopub"].send_multipart([kind.encode(), *self.frames(kind, content, self.parent)])

    def serve(self) -> None:
        """Answer until it is told to shut down."""
        signal.signal(signal.SIGINT, lambda *_: None)  # for a cell alone
        threading.Thread(target=self.beat, daemon=True).start()
        poller = zmq.Poller()
        for name in ("control", "shell"):
            poller.register(self.sockets[name], zmq.POLLIN)
        while not self.is_over:
            ready = dict(poller.poll())
            name = "control" if self.sockets["control"] in ready else "shell"
            if self.answer(name, self.sockets[name].recv_multipart()):
                while self.sockets["shell"].poll(0):  # what was asked for behind a cell that failed
                    self.answer("shell", self.sockets["shell"].recv_multipart(), is_aborted=True)

    def beat(self) -> None:
        """Be the heartbeat, and send what was printed a while ago."""
        while True:
            if self.sockets["hb"].poll(FLUSH_S * 1000):
                self.sockets["hb"].send(self.sockets["hb"].recv())
            for stream in self.streams:
                stream.flush()

    def answer(self, name: str, frames: List[bytes], is_aborted: bool = False) -> bool:
        """Answer one message; True when it was a cell that failed, behind which nothing is executed."""
        at = frames.index(DELIMITER)
        wanted = hmac.new(self.key, b"".join(frames[at + 2 : at + 6]), hashlib.sha256).hexdigest().encode()
        if self.key and not hmac.compare_digest(wanted, frames[at + 1]):
            return False
        self.parent, content = json.loads(frames[at + 2]), json.loads(frames[at + 5])
        kind = self.parent["msg_type"]
        self.publish("status", {"execution_state": "busy"})
        if kind == "execute_request":
            reply = {"status": "aborted"} if is_aborted else self.execute(content)
        elif kind == "kernel_info_request":
            reply = dict(INFO, language_info=LANGUAGE, banner="a stand-in", help_links=[])
        elif kind == "shutdown_request":
            reply, self.is_over = {"status": "ok", "restart": content.get("restart", False)}, True
        elif kind == "interrupt_request":
            reply = {"status": "ok"}
        else:
            reply = {"status": "error", "ename": "NotImplementedError", "evalue": kind, "traceback": []}
        answer = self.frames(kind.replace("_request", "_reply"), reply, self.parent)
        self.sockets[name].send_multipart(frames[:at] + answer)
        self.publish("status", {"execution_state": "idle"})
        return kind == "execute_request" and reply["status"] == "error" and bool(content.get("stop_on_error", True))

    # -- cells --

    def execute(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Run a cell, and return the content of the reply."""
        self.count += bool(request.get("store_history", True))
        self.publish("execute_input", {"code": request["code"], "execution_count": self.count})
        reply: Dict[str, Any] = {"status": "ok", "payload": [], "user_expressions": {}}
        try:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                value = self.value_of(request["code"])
            finally:
                signal.signal(signal.SIGINT, lambda *_: None)
            words = None if value is None else repr(value)
        except BaseException as error:  # SystemExit and KeyboardInterrupt among them
            reply = {"status": "error", "ename": type(error).__name__, "evalue": str(error)}
            reply["traceback"] = traceback.format_exc().splitlines()
            words = None
        for stream in self.streams:
            stream.flush()
        if words is not None:
            data = {"text/plain": words}
            self.publish("execute_result", {"data": data, "metadata": {}, "execution_count": self.count})
        if reply["status"] == "error":
            self.publish("error", {name: value for name, value in reply.items() if name != "status"})
        return dict(reply, execution_count=self.count)

    def value_of(self, source: str) -> Any:
        """Run a cell's code, and return the value of the expression that it ends with."""
        tree = ast.parse(source, "<cell %d>" % self.count)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<cell %d>" % self.count, "exec"), self.names)
        if isinstance(last, ast.Expr):
            return eval(compile(ast.Expression(last.value), "<cell %d>" % self.count, "eval"), self.names)
        return None


def main() -> None:
    """Be the kernel of the connection file that the command line names first; nbclient adds words of its own."""
    sys.path.insert(0, "")
    with open(sys.argv[1]) as stream:
        kernel = Kernel(json.load(stream))
    sys.stdout, sys.stderr = kernel.streams
    kernel.serve()


if __name__ == "__main__":
    main()
