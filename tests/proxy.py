"""A TCP proxy on loopback that can do what networks do: swallow, cut, delay, and be narrow."""

import contextlib
import heapq
import select
import socket
import threading
import time
from typing import Dict, List, Tuple

QUEUE_BYTES = 262144  # what a narrow link holds; then nothing more is read


class Proxy:
    """Forwards a port of its own to another; `delay_s` is added each way, and `bytes_per_s` is all that each way holds.

    Zero bytes per second is without a limit.
    """

    def __init__(self, target: int, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.is_frozen = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: Dict[socket.socket, socket.socket] = {}
        self._late: List[Tuple[float, int, socket.socket, bytes]] = []
        self._free_at: Dict[socket.socket, float] = {}  # when the narrow link to this end has sent what it holds
        self._count = 0
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ssh_options(self) -> List[str]:
        """Return the options that lead ssh through the proxy to the host whose sshd is its target."""
        return ["-p", str(self.port), "-o", "HostKeyAlias=[127.0.0.1]:%d" % self.target]

    def _run(self) -> None:
        while not self._has_ended:
            wait_s = max(0.0, min(0.05, self._late[0][0] - time.monotonic())) if self._late else 0.05
            try:
                ready = select.select([self._listener, *filter(self._has_room, self._pairs)], [], [], wait_s)[0]
            except (OSError, ValueError):
                continue
            if self.is_frozen:
                time.sleep(0.02)  # nothing is read and nothing answered, as when packets are swallowed
                continue
            for source in ready:
                self._accept() if source is self._listener else self._take(source)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, sink, data = heapq.heappop(self._late)
                self._deliver(sink, data)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(5)
        self._pairs[near], self._pairs[far] = far, near

    def _has_room(self, source: socket.socket) -> bool:
        held_s = self._free_at.get(self._pairs[source], 0.0) - time.monotonic()
        return not self.bytes_per_s or held_s * self.bytes_per_s < QUEUE_BYTES

    def _take(self, source: socket.socket) -> None:
        try:
            data = source.recv(16384 if self.bytes_per_s else 262144)
        except OSError:
            data = b""
        if source not in self._pairs:
            return
        sink = self._pairs[source]
        if self.delay_s or self.bytes_per_s:
            self._count += 1
            sent_at = max(time.monotonic(), self._free_at.get(sink, 0.0))
            if self.bytes_per_s:
                sent_at += len(data) / self.bytes_per_s
                self._free_at[sink] = sent_at
            heapq.heappush(self._late, (sent_at + self.delay_s, self._count, sink, data))
            if not data:
                del self._pairs[source]
        else:
            self._deliver(sink, data)

    def _deliver(self, sink: socket.socket, data: bytes) -> None:
        try:
            if data:
                sink.sendall(data)
                return
        except OSError:
            pass
        source = self._pairs.pop(sink, None)
        for end in (sink, source):
            if end is not None:
                self._pairs.pop(end, None)
                end.close()

    def cut(self) -> None:
        """End every connection."""
        for end in list(self._pairs):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._has_ended = True
        self._thread.join(10)
        self._listener.close()
        for end in list(self._pairs):
            end.close()
