"""Servers on loopback that pretend to be a deployment's proxy, right or wrong in one point."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[[str, str], int]
"""Method and path -> status."""


def proxy(method: str, path: str) -> int:
    """What the generated proxy answers with a SuperLink behind it."""
    return 401 if (method, path.startswith("/v1/fleet/")) == ("POST", True) else 404


@contextmanager
def pretending(certificate: Path, key: Path, answer: Answer = proxy, date: float | None = None) -> Iterator[int]:
    """Serve TLS with `certificate` on a free port, which is given; `date` (seconds since 1970) is the clock it shows."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            self.send_response_only(answer(self.command, self.path))
            self.send_header("Date", formatdate(date, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a refused certificate ends a connection in the middle

    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
