"""A TCP proxy that counts: every byte between a SuperNode and a SuperLink, with the moment at which it passed.

What passes is not changed, and of a connection no more than a few buffers are in memory. A request and its answer are one
`Exchange` (in HTTP/1.1 they alternate), so that polling can be told from messages; with TLS their names cannot be read.
Bytes are those above TCP: IP and TCP headers (40 bytes a packet) are not among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

CHUNK = 1 << 16  # bytes read at a time
WAIT_SECONDS = 10.0  # for the proxy's own thread to answer
HELLO, CHANGE_CIPHER = b"\x16", b"\x14"  # first bytes of what a client sends in a handshake of TLS 1.3
FINISHED = 200  # more bytes than its second part has without a request behind it (80)

T = TypeVar("T")
_REQUEST = re.compile(rb"(?:GET|POST|PUT|HEAD|DELETE) (\S+) HTTP/1\.[01]\r\n")


@dataclass
class Exchange:
    """What was sent up until the other side answered, and the answer.

    Attributes:
        connection: number of its connection, from 0.
        began, ended: seconds since 1970 of its first and of its latest bytes.
        up, down: bytes to the server and from it.
        call: path of the request, "" where it cannot be read (TLS).
    """

    connection: int
    began: float
    ended: float
    up: int = 0
    down: int = 0
    call: str = ""


@dataclass
class Counts:
    """What passed through a proxy: exchanges in the order in which they began, and connections, open or not."""

    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0

    @property
    def up(self) -> int:
        """Bytes to the server."""
        return sum(exchange.up for exchange in self.exchanges)

    @property
    def down(self) -> int:
        """Bytes from the server."""
        return sum(exchange.down for exchange in self.exchanges)


class _Connection:
    """Splits what passes through one connection into exchanges; the handshake of TLS belongs to the first request."""

    def __init__(self, counts: Counts) -> None:
        self._counts, self._number = counts, counts.connections
        self._exchange: Exchange | None = None
        self._greeting = False  # a handshake began, and its request is still to come
        counts.connections += 1

    def sent(self, data: bytes) -> None:
        """Bytes to the server; after an answer they begin the next exchange."""
        if self._exchange is None or (self._exchange.down and not self._greeting):
            request = _REQUEST.match(data)
            self._begin(request[1].decode("ascii", "replace") if request else "")
        assert self._exchange is not None
        self._greeting = data[:1] == HELLO or (data[:1] == CHANGE_CIPHER and len(data) < FINISHED)
        self._exchange.up += len(data)
        self._exchange.ended = time.time()

    def received(self, data: bytes) -> None:
        """Bytes from the server."""
        if self._exchange is None:
            self._begin("")
        assert self._exchange is not None
        self._exchange.down += len(data)
        self._exchange.ended = time.time()

    def _begin(self, call: str) -> None:
        now = time.time()
        self._exchange = Exchange(self._number, now, now, call=call)
        self._counts.exchanges.append(self._exchange)


class CountingProxy:
    """Listens on a free port of loopback and passes every connection on to `target`, a port of loopback.

    Start with the constructor, end with `close`. It works in a thread of its own, so that whoever waits in the main thread
    can be interrupted.

    Attributes:
        port: where it listens.
        counts: what passed so far; other threads may read it.
    """

    def __init__(self, target: int) -> None:
        self.counts = Counts()
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="counting proxy", daemon=True)
        self._thread.start()
        self._open: set[asyncio.Task[None]] = set()
        self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Close every connection and stop listening. Closing again does nothing."""
        if self._loop.is_closed():
            return
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the proxy's thread; its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    async def _end(self) -> None:
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until both sides have said all, or one of them is gone."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await self._join(reader, writer)
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass  # nobody listens at `target`, a side broke off, or `close` ended it: both sides see their connection end
        finally:
            self._open.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self.counts)
        async with _ending(writer):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            async with _ending(far_writer), asyncio.TaskGroup() as both:  # a side that breaks off ends both ways
                both.create_task(_pass(reader, far_writer, connection.sent))
                both.create_task(_pass(far_reader, writer, connection.received))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[bytes], None]) -> None:
    """Pass on what comes, waiting where the other side is slow, and then its end: the other way may still be open."""
    while data := await reader.read(CHUNK):
        count(data)
        writer.write(data)
        await writer.drain()
    writer.write_eof()


@contextlib.asynccontextmanager
async def _ending(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close `writer` after a regular end; break it off after any other."""
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
