"""The proxy that `fedtune deploy init` writes, under connections that say nothing: nodes get through. Loopback only."""

from __future__ import annotations

import http.client
import os
import re
import resource
import selectors
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from loopback import change, environment, free_ports, programs, wait_until
from pretenders import Answer, pretending

from fedtune.deploy.check import State, check_deployment
from fedtune.deploy.server import HEADER_SECONDS, REQUESTS

pytestmark = pytest.mark.deployment
ATTACKER, NODE = "127.0.0.1", "127.0.0.2"
HANDSHAKE = b"\x16\x03\x01\x02"  # its first bytes: nginx takes such a connection for one in use
HALF_OPEN = 3000  # more than the 2,048 connections that two processes with nginx's usual numbers have


class Proxy:
    """nginx from the written files, before a server that pretends to be the SuperLink."""

    def __init__(self, server: Path, port: int) -> None:
        self.port = port
        self.context = ssl.create_default_context(cafile=str(server / "ca.pem"))

    def ask(self, path: str = "/v1/fleet/pull-messages", source: str = NODE, seconds: float = 20.0) -> int:
        """The status of an answer to a node's request."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=seconds, context=self.context, source_address=(source, 0)
        )
        try:
            connection.request("POST", path, b"")
            return connection.getresponse().status
        finally:
            connection.close()

    def half(self, says: bytes, tls: bool = True) -> socket.socket:
        """A connection of the attacker that stops in the middle."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20, source_address=(ATTACKER, 0))
        opened = self.context.wrap_socket(plain, server_hostname="localhost") if tls else plain
        opened.sendall(says)
        return opened


@contextmanager
def proxied(written: Path, answer: Answer, edit: Callable[[str], str] = lambda text: text) -> Iterator[Proxy]:
    server = written / "server"
    with pretending(server / "superlink.pem", server / "superlink.key", answer) as superlink:
        public = free_ports(1)[0]
        change(server / "server.env", BIN=programs(), PUBLIC_PORT=str(public), SUPERLINK_PORT=str(superlink))
        text = (server / "nginx.conf").read_text()
        text = text.replace(":8443 ", f":{public} ").replace(":8000;", f":{superlink};")
        (server / "nginx.conf").write_text(edit(text))
        with (server / "output.log").open("wb") as log:
            nginx = subprocess.Popen([server / "proxy.sh"], env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            proxy = Proxy(server, public)
            assert wait_until(lambda: _answers(proxy), 30), (server / "output.log").read_text()
            yield proxy
        finally:
            nginx.terminate()
            nginx.wait(30)


def _answers(proxy: Proxy) -> bool:
    try:
        return proxy.ask(seconds=2.0) == 401
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _nginx_and_files() -> Iterator[None]:
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("no nginx: apt install nginx-light")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * HALF_OPEN)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def refuse(method: str, path: str) -> int:
    return 401


def ended(connections: list[socket.socket], seconds: float) -> int:
    """How many of the connections the proxy ended within so many seconds."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        end, gone = time.monotonic() + seconds, 0
        while gone < len(connections) and time.monotonic() < end:
            for key, _ in selector.select(0.5):
                try:
                    if key.fileobj.recv(4096):  # type: ignore[union-attr]
                        continue
                except (BlockingIOError, ssl.SSLWantReadError):
                    continue
                except OSError:
                    pass
                selector.unregister(key.fileobj)
                gone += 1
        return gone


def test_a_node_gets_through_thousands_of_half_open_connections(written: Path) -> None:
    half = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nX-"
    with proxied(written, refuse) as proxy, ExitStack() as stack:
        held = [stack.enter_context(proxy.half(HANDSHAKE, tls=False)) for _ in range(HALF_OPEN - 100)]
        held += [stack.enter_context(proxy.half(half)) for _ in range(100)]
        slowest = 0.0
        for _ in range(10):
            begun = time.monotonic()
            assert proxy.ask() == 401
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 3.0
        assert ended(held, 2 * HEADER_SECONDS + 5.0) == len(held)


def test_a_peer_that_stops_in_handshake_header_body_or_after_an_answer_is_let_go(written: Path) -> None:
    """With times of a second, in place of those that are written."""

    def faster(text: str) -> str:
        return re.sub(r"(client_header_timeout|client_body_timeout|keepalive_timeout) \d+s", r"\1 1s", text)

    whole = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\n"
    with proxied(written, refuse, faster) as proxy, ExitStack() as stack:
        cases = {
            "nothing": proxy.half(b"", tls=False),
            "half a handshake": proxy.half(HANDSHAKE, tls=False),
            "nothing after the handshake": proxy.half(b""),
            "half a header": proxy.half(whole),
            "no body": proxy.half(whole + b"Content-Length: 5000\r\n\r\n"),
            "an answer, and no more": proxy.half(whole + b"Content-Length: 0\r\n\r\n"),
            "a path that is not there": proxy.half(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"),
        }
        for name, connection in cases.items():
            stack.enter_context(connection)
            assert ended([connection], 12.0) == 1, name


def test_one_address_has_a_limited_number_of_requests_and_the_others_theirs(written: Path) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def wait(method: str, path: str) -> int:
        if path.endswith("slow"):
            begun.release()
            go_on.wait(60)
        return 401

    whole = b"POST /v1/fleet/slow HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    with proxied(written, wait) as proxy, ExitStack() as stack:
        stack.callback(go_on.set)
        for _ in range(REQUESTS):
            stack.enter_context(proxy.half(whole))
        for _ in range(REQUESTS):
            assert begun.acquire(timeout=30)
        assert proxy.ask(source=ATTACKER) == 429
        assert proxy.ask(source=NODE) == 401


def test_bodies_of_64_mb_pass_and_no_larger_ones(written: Path) -> None:
    """The limit is on what a request announces; the 401 is of the SuperLink."""
    with proxied(written, refuse) as proxy:
        for length, status in ((64 << 20, b"401"), ((64 << 20) + 1, b"413")):
            with proxy.half(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length) as one:
                assert one.recv(64).startswith(b"HTTP/1.1 " + status)


def test_check_names_a_proxy_of_an_earlier_fedtune(written: Path) -> None:
    server = written / "server"
    text = (server / "nginx.conf").read_text()
    assert not _warnings(server)
    (server / "nginx.conf").write_text(re.sub(r"(?m)^ *(client_header_timeout|limit_conn) .*$", "", text))
    assert "has no client_header_timeout, limit_conn: connections that say nothing can keep nodes out" in _warnings(server)[0]


def _warnings(server: Path) -> list[str]:
    found = check_deployment(server)
    return [finding.text for finding in found if finding.check == "proxy" and finding.state is State.warning]
