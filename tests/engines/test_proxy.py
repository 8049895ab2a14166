"""The counting proxy: every byte, both ways, also when a side says less, more or nothing, or is gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from simulations.proxy import CountingProxy

Talk = Callable[[socket.socket], None]


@contextmanager
def server(talk: Talk) -> Iterator[int]:
    """A server of one connection at a time; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    talk(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@contextmanager
def proxy_to(port: int) -> Iterator[CountingProxy]:
    proxy = CountingProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


def connect(proxy: CountingProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def echo_then_more(connection: socket.socket) -> None:
    """Everything back once the client has said all, and 7 bytes more: only possible while one half is closed."""
    connection.sendall(read_all(connection) + b"goodbye")


def answer(connection: socket.socket) -> None:
    """Each request of 100 bytes gets 30."""
    while len(connection.recv(100, socket.MSG_WAITALL)) == 100:
        connection.sendall(bytes(30))


def wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def ends(connection: socket.socket) -> bool:
    """Whether the other side closes or breaks off, and says nothing before."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_every_byte_is_counted_and_none_is_changed() -> None:
    data = bytes(range(256)) * 12_289  # three megabytes: more than any buffer on the way
    with server(echo_then_more) as port, proxy_to(port) as proxy, connect(proxy) as client:
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read_all(client) == data + b"goodbye"
        sender.join(5)
        assert (proxy.counts.up, proxy.counts.down) == (len(data), len(data) + 7)
        assert proxy.counts.connections == 1


def test_requests_and_answers_are_exchanges_with_their_moments() -> None:
    request = b"POST /v1/fleet/pull-messages HTTP/1.1\r\n".ljust(100, b" ")
    with server(answer) as port, proxy_to(port) as proxy:
        before = time.time()
        with connect(proxy) as client:
            for data in (request, bytes(100), request):
                client.sendall(data[:60])
                client.sendall(data[60:])
                assert len(client.recv(30, socket.MSG_WAITALL)) == 30
        with connect(proxy) as client:
            client.sendall(request)
            assert len(client.recv(30, socket.MSG_WAITALL)) == 30
        found = proxy.counts.exchanges
        assert [(one.up, one.down) for one in found] == [(100, 30)] * 4
        assert [one.connection for one in found] == [0, 0, 0, 1]
        assert [one.call for one in found] == ["/v1/fleet/pull-messages", "", *["/v1/fleet/pull-messages"] * 2]
        assert before <= found[0].began <= found[0].ended <= found[1].began <= found[3].ended <= time.time()


def test_a_handshake_belongs_to_the_first_request() -> None:
    """As in TLS 1.3: hello, what ends the handshake (80 bytes), the request; each is answered."""
    parts = [b"\x16" + bytes(516), b"\x14" + bytes(79), b"\x17" + bytes(99), b"\x17" + bytes(99)]

    def talk(connection: socket.socket) -> None:
        for part in parts:
            connection.recv(len(part), socket.MSG_WAITALL)
            connection.sendall(bytes(10))

    with server(talk) as port, proxy_to(port) as proxy, connect(proxy) as client:
        for part in parts:
            client.sendall(part)
            client.recv(10, socket.MSG_WAITALL)
        assert [(one.up, one.down) for one in proxy.counts.exchanges] == [(517 + 80 + 100, 30), (100, 10)]


def test_a_client_that_is_gone_ends_the_way_to_the_server() -> None:
    ended = threading.Event()

    def talk(connection: socket.socket) -> None:
        try:
            while connection.recv(1000):
                pass
        except OSError:
            pass
        ended.set()

    with server(talk) as port, proxy_to(port) as proxy:
        client = connect(proxy)
        client.sendall(bytes(10))
        assert wait(lambda: proxy.counts.up == 10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # the connection is reset, not closed
        client.close()
        assert ended.wait(5)
        with connect(proxy) as client:  # the proxy goes on
            client.sendall(bytes(5))
            assert wait(lambda: proxy.counts.up == 15)


def test_a_server_that_is_not_there_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with proxy_to(port) as proxy, connect(proxy) as client:
        assert ends(client)
        assert (proxy.counts.up, proxy.counts.down) == (0, 0)


def test_a_slow_reader_is_waited_for() -> None:
    """The server sends without end; what nobody reads stays there and not in the proxy."""

    def talk(connection: socket.socket) -> None:
        connection.settimeout(1)
        try:
            while True:
                connection.sendall(bytes(1 << 20))
        except OSError:
            pass

    with server(talk) as port, proxy_to(port) as proxy, connect(proxy):
        time.sleep(0.5)
        passed = proxy.counts.down
        time.sleep(0.3)
        assert proxy.counts.down == passed < 64 << 20


def test_closing_ends_open_connections_and_may_be_repeated() -> None:
    with server(answer) as port:
        proxy = CountingProxy(port)
        with connect(proxy) as client:
            client.sendall(bytes(100))
            assert len(client.recv(30, socket.MSG_WAITALL)) == 30
            proxy.close()
            proxy.close()
            assert ends(client)
