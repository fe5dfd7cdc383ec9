"""An HTTP server whose clients cannot hold it up: few at once, each for a short while.

Anybody may connect to where metrics are told. Who dawdles over a request is cut off after ANSWER_S,
and the oldest of MOST connections when one more comes, as an answer takes milliseconds: so threads
and descriptors are bounded, and a scrape gets through beside connections that say nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

ANSWER_S = 10.0  # for a whole request and its answer
MOST = 16  # connections at once
LOOK_S = 0.5


class _Handler(WSGIRequestHandler):
    timeout = ANSWER_S  # of one read

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who asks is nobody's line of log."""


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Answers with this WSGI application in threads of its own from its start until close(). Raises
    OSError, UnicodeError: it cannot listen there."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, application: Any) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        self._since: dict[socket.socket, float] = {}  # the oldest first
        self._lock = threading.Lock()
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        self.set_app(application)
        self._thread = threading.Thread(target=self.serve_forever, args=(LOOK_S,), daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """WSGIServer's would look up the host's full name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._since[request] = time.monotonic()
            if len(self._since) > MOST:
                self._cut_off(next(iter(self._since)))
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Every LOOK_S."""
        late = time.monotonic() - ANSWER_S
        with self._lock:
            for request in [request for request, since in self._since.items() if since < late]:
                self._cut_off(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a connection that breaks is its client's loss."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def _cut_off(self, request: socket.socket) -> None:
        """Its thread, which waits for it, goes on and closes it."""
        self._since.pop(request, None)
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
