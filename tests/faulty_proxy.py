"""A reverse proxy in a thread that answers some requests badly, as a busy object store does."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

KINDS = ("error_500", "error_503", "drop", "truncate", "stall")
ERRORS = {
    "error_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "error_503": (503, "SlowDown", "Please reduce your request rate."),
    "unreachable": (502, "BadGateway", "The server behind the proxy does not answer."),
}
PIECE = 1 << 16
LINGER_SECONDS = 5.0
HEAD_END = b"\r\n\r\n"
CONNECTION = re.compile(rb"(?i)\r\nconnection:[^\r]*")
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


@dataclass(frozen=True)
class Faults:
    """The probability of each fault for a request, which gets one at most."""

    error_500: float = 0.0
    error_503: float = 0.0
    drop: float = 0.0  # closes the connection without an answer; the server never sees the request
    truncate: float = 0.0  # announces the whole body, sends half of it (none, if its length is not stated) and closes
    stall: float = 0.0  # pauses where `truncate` would close
    stall_seconds: float = 2.0
    reads_only: bool = True  # only GET
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(self.chances) > 1:
            raise ValueError("the probabilities of the faults add up to more than 1")

    @property
    def chances(self) -> list[float]:
        return [getattr(self, kind) for kind in KINDS]


@contextmanager
def faulty(upstream: str, faults: Faults) -> Iterator[Proxy]:
    """A proxy for the server at `upstream`, http://HOST:PORT, on a free loopback port."""
    proxy = Proxy(upstream, faults)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="faulty-proxy", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(10)
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Proxy:
    """Passes bytes on as they came (the signature covers path, query and Host), one request to a connection."""

    def __init__(self, upstream: str, faults: Faults) -> None:
        address = urlsplit(upstream)
        if address.hostname is None or address.port is None:
            raise ValueError(f"{upstream}: not http://HOST:PORT")
        self.upstream = (address.hostname, address.port)
        self.faults = faults
        self.counts: Counter[str] = Counter()  # requests by fault, else "passed" ("unreachable": no server to pass to)
        self.endpoint = ""
        self._random = random.Random(faults.seed)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=4 * PIECE, backlog=256)
        self.endpoint = "http://{}:{}".format(*self._server.sockets[0].getsockname())

    async def stop(self) -> None:
        await asyncio.sleep(0.05)  # a connection in the middle of being accepted cannot be cancelled yet
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections)
        await asyncio.sleep(0)  # lets the transports close

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):  # somebody hung up
                if await self._exchange(reader, writer):
                    await _linger(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; false if the client is to find the connection closed."""
        request = await reader.readuntil(HEAD_END)
        method = request.partition(b" ")[0]
        fault = self._draw(method)
        if fault == "drop":
            self.counts[fault] += 1
            return False
        if fault in ERRORS:
            return await self._refuse(fault, method, writer)
        try:
            server, to_server = await asyncio.open_connection(*self.upstream, limit=4 * PIECE)
        except OSError:
            return await self._refuse("unreachable", method, writer)
        to_server.write(_closing(request))
        # Both ways at once: a client may wait for "100 Continue", a server may answer before it has the body.
        upload = asyncio.create_task(_upload(reader, to_server))
        try:
            return await self._answer(fault, method, server, writer)
        finally:
            upload.cancel()
            await asyncio.wait([upload])
            to_server.close()

    async def _refuse(self, kind: str, method: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answers with an error of S3."""
        self.counts[kind] += 1
        status, code, message = ERRORS[kind]
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(_closing(head.encode()))
        if method != b"HEAD":
            writer.write(body.encode())
        await writer.drain()
        return True

    async def _answer(
        self, fault: str, method: bytes, server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Passes the server's answer on, with the fault if there is a body to break."""
        while (head := await server.readuntil(HEAD_END)).split(b" ", 2)[1].startswith(b"1"):
            writer.write(head)
        stated = LENGTH.search(head)
        length = int(stated[1]) if stated else 0
        if method == b"HEAD" or head.split(b" ", 2)[1] in (b"204", b"304") or (stated and length == 0):
            fault = "passed"
        self.counts[fault] += 1
        writer.write(_closing(head))
        await _relay(server, writer, length // 2)
        if fault == "truncate":
            return False
        if fault == "stall":
            await asyncio.sleep(self.faults.stall_seconds)
        await _relay(server, writer)
        return True

    def _draw(self, method: bytes) -> str:
        if self.faults.reads_only and method != b"GET":
            return "passed"
        chances = self.faults.chances
        return self._random.choices([*KINDS, "passed"], [*chances, 1 - sum(chances)])[0]


def _closing(head: bytes) -> bytes:
    """The head of a last message: where its body ends the connection does, so nobody here has to parse bodies."""
    return CONNECTION.sub(b"", head).removesuffix(b"\r\n") + b"Connection: close\r\n\r\n"  # not a signed field


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int | None = None) -> None:
    """Passes on `size` bytes, or all until the sender closes."""
    left = size
    while piece := await reader.read(PIECE if left is None else min(PIECE, left)):  # reads b"" if none are left
        writer.write(piece)
        await writer.drain()
        left = None if left is None else left - len(piece)


async def _upload(reader: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
    """Passes a request's body on until somebody hangs up; cancelled when there is an answer."""
    with suppress(OSError):
        await _relay(reader, to_server)
    to_server.close()


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ends our side and waits for the client's: closing with its bytes unread would reset what it has yet to read."""
    await writer.drain()
    writer.write_eof()
    async with asyncio.timeout(LINGER_SECONDS):
        while await reader.read(PIECE):
            pass
