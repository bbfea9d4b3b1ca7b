"""The short way of GETs and PUTs: answers of every shape from a scripted server."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
import uvloop

from polefs.objects import s3connections
from polefs.objects.s3connections import BrokenAnswer, ConnectError, Connections

T = TypeVar("T")
BODY = os.urandom(300_000)
CHUNKED = b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSE, RESET = object(), object()
LENGTH = re.compile(rb"Content-Length: (\d+)")
LOOP: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run on asyncio's event loop, the daemon on uvloop's."""
    if request.param == "uvloop":
        monkeypatch.setattr(f"{__name__}.LOOP", uvloop.new_event_loop)


def answer(body: bytes, status: str = "206 Partial Content", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Server:
    """Answers each request with the next of ``answers``: bytes to send in one piece or in several, and what to do with
    the connection then. The last one is repeated."""

    def __init__(self, answers: Sequence[Sequence[object]]) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.asked = asyncio.Event()
        self.requests: list[bytes] = []
        self.bodies: list[bytes] = []
        self.reads_bodies = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                self.asked.set()
                if self.reads_bodies and (length := LENGTH.search(self.requests[-1])):
                    self.bodies.append(await reader.readexactly(int(length[1])))
                for piece in self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]:
                    if piece is RESET:
                        writer.transport.abort()
                    elif piece is CLOSE:
                        writer.close()
                    else:
                        assert isinstance(piece, bytes)
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(0)
                if not self.reads_bodies:
                    await asyncio.get_running_loop().create_future()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def use(
    answers: Sequence[Sequence[object]], work: Callable[[Server, Connections], Awaitable[T]], *, limit: int = 4
) -> T:
    @asynccontextmanager
    async def listening(server: Server) -> AsyncIterator[int]:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()

    async def main() -> T:
        server = Server(answers)
        async with asyncio.timeout(60), listening(server) as port:
            connections = Connections("127.0.0.1", port, None, limit)
            try:
                return await work(server, connections)
            finally:
                connections.close()

    with asyncio.Runner(loop_factory=LOOP) as runner:
        return runner.run(main())


def get(answers: Sequence[Sequence[object]], length: int = len(BODY)) -> tuple[int, bytes]:
    async def work(server: Server, connections: Connections) -> tuple[int, bytes]:
        response = await connections.get("/bucket/key", {"Host": "example"}, length)
        return response.status, bytes(response.body)

    return use(answers, work)


@pytest.mark.parametrize("step", [1, 7, 100, 5000, 1 << 20])
def test_pieces_of_any_size(step: int) -> None:
    body = BODY[: min(len(BODY), 400 * step)]
    whole = answer(body)
    assert get([[whole[start : start + step] for start in range(0, len(whole), step)]]) == (206, body)


@pytest.mark.parametrize(
    ("sent", "status", "body"),
    [
        ([answer(b"")], 206, b""),
        ([answer(b"short")], 206, b"short"),
        ([answer(b"<Error/>", "404 Not Found")], 404, b"<Error/>"),
        ([answer(BODY, "200 OK")], 200, BODY[:65536]),
        ([answer(b"x" * 100_000, "500 Internal Server Error")], 500, b"x" * 65536),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", answer(b"later")], 206, b"later"),
        ([b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"], 403, b"abcde"),
        ([b"HTTP/1.1 503 No\r\n\r\nuntil the end", CLOSE], 503, b"until the end"),
        ([b"HTTP/1.0 206 Partial\r\ncontent-length: 3\r\n\r\nabc", CLOSE], 206, b"abc"),
        ([CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"], 206, b"abcde"),
        ([CHUNKED + b"%x\r\n" % len(BODY), BODY, b"\r\n0\r\n\r\n"], 206, BODY),
        ([answer(b"abc", "206 Partial Content", "X-Long: " + "y" * 40_000)], 206, b"abc"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], 204, b""),
    ],
)
def test_shapes_of_answers(sent: list[object], status: int, body: bytes) -> None:
    assert get([sent]) == (status, body)


def test_more_than_was_asked_for_is_not_taken_into_memory() -> None:
    status, body = get([[answer(BODY)]], length=10)
    assert status == 206
    assert len(body) == 65536


@pytest.mark.parametrize(
    ("sent", "number"),
    [
        ([answer(b"abc", length=4), CLOSE], errno.ECONNRESET),
        ([answer(BODY[:-1], length=len(BODY)), CLOSE], errno.ECONNRESET),
        ([answer(BODY[:1000], length=len(BODY)), RESET], errno.ECONNRESET),
        ([answer(b"abc", "404 Not Found", length=4), CLOSE], errno.ECONNRESET),
        ([b"HTTP/1.1 206 Par", CLOSE], errno.ECONNRESET),
        ([CLOSE], errno.ECONNRESET),
        ([RESET], errno.ECONNRESET),
        ([b"SSH-2.0-OpenSSH\r\n"], errno.EPROTO),
        ([b"\x00" * 100], errno.EPROTO),
        ([b"HTTP/1.1 206 x\r\nContent-Length: many\r\n\r\n"], errno.EPROTO),
        ([b"HTTP/1.1 206 x\r\n\r\nperhaps not all of it", CLOSE], errno.ECONNRESET),
        ([CHUNKED + b"5\r\nabcde\r\n", CLOSE], errno.ECONNRESET),
    ],
)
def test_broken_answers(sent: list[object], number: int) -> None:
    with pytest.raises(BrokenAnswer) as caught:
        get([sent])
    assert caught.value.errno == number


def test_connections_are_kept_and_bounded() -> None:
    async def work(server: Server, connections: Connections) -> None:
        for _ in range(5):
            await connections.get("/k", {}, 10)
        assert server.connections == 1
        found = await asyncio.gather(*(connections.get("/k", {}, 10) for _ in range(20)))
        assert all(bytes(response.body) == b"abc" for response in found)
        assert server.connections <= 4
        assert server.requests[0] == b"GET /k HTTP/1.1\r\n\r\n"

    use([[answer(b"abc")]], work)


def test_a_kept_connection_that_the_server_has_closed() -> None:
    async def work(server: Server, connections: Connections) -> None:
        for _ in range(3):
            assert bytes((await connections.get("/k", {}, 10)).body) == b"abc"
        assert server.connections == 3

    for ending in (CLOSE, RESET):
        # Before the next request is made, and after it has been sent.
        use([[answer(b"abc"), ending]], work)
        use([[answer(b"abc")], [ending], [answer(b"abc")], [ending], [answer(b"abc")]], work)


def test_what_comes_unasked_ends_the_connection() -> None:
    async def work(server: Server, connections: Connections) -> None:
        assert bytes((await connections.get("/k", {}, 10)).body) == b"abc"
        assert bytes((await connections.get("/k", {}, 10)).body) == b"abc"
        assert server.connections == 2

    use([[answer(b"abc") + b"HTTP/1.1 206 unasked\r\nContent-Length: 1\r\n\r\nx"]], work)


def test_a_connection_that_says_close_is_not_kept() -> None:
    async def work(server: Server, connections: Connections) -> None:
        await connections.get("/k", {}, 10)
        await connections.get("/k", {}, 10)
        assert server.connections == 2

    use([[answer(b"abc", "206 Partial Content", "Connection: close")]], work)


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3connections, "SILENCE_SECONDS", 0.2)
    for sent in ([], [answer(b"abc", length=10)]):
        with pytest.raises(TimeoutError):
            get([sent])


def test_cancelling_ends_the_connection_and_frees_its_place() -> None:
    async def work(server: Server, connections: Connections) -> None:
        task = asyncio.create_task(connections.get("/k", {}, 10))
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bytes((await connections.get("/k", {}, 10)).body) == b"abc"
        assert server.connections == 2

    use([[], [answer(b"abc")]], work, limit=1)


def test_no_connection() -> None:
    async def work(server: Server, connections: Connections) -> None:
        for host, port in (("127.0.0.1", 1), ("nohost.invalid", 80)):
            with pytest.raises(ConnectError) as caught:
                await Connections(host, port, None, 1).get("/", {}, 1)
            assert isinstance(caught.value.__cause__, OSError)

    use([[]], work)


def put_headers(body: Sequence[bytes | memoryview]) -> dict[str, str]:
    return {"Host": "example", "Content-Length": str(sum(map(len, body)))}


@pytest.mark.parametrize(
    "body",
    [
        [],
        [b"small"],
        [b"", b"a", b"", b"b"],
        [BODY] * 9,
        [BODY[:1], memoryview(BODY)[1:]],
        [os.urandom(5 << 20), b"end"],
    ],
)
def test_put(body: list[bytes | memoryview]) -> None:
    async def work(server: Server, connections: Connections) -> None:
        for _ in range(2):
            response = await connections.put("/bucket/key?x=1", put_headers(body), body)
            assert (response.status, bytes(response.body), response.headers["etag"]) == (200, b"", "1")
        assert server.requests[0].startswith(b"PUT /bucket/key?x=1 HTTP/1.1\r\n")
        assert server.bodies == [b"".join(body)] * 2
        assert server.connections == 1

    use([[answer(b"", "200 OK", "ETag: 1")]], work)


def test_a_put_that_is_refused_before_all_of_it_was_sent() -> None:
    async def work(server: Server, connections: Connections) -> None:
        server.reads_bodies = False
        body = [bytes(64 << 20)]
        response = await connections.put("/k", put_headers(body), body)
        assert (response.status, bytes(response.body)) == (403, b"no")
        server.reads_bodies = True
        assert (await connections.put("/k", put_headers([b"abc"]), [b"abc"])).status == 403
        assert server.bodies == [b"abc"]
        assert server.connections == 2

    use([[answer(b"no", "403 Forbidden")]], work)


def test_a_put_on_a_connection_that_the_server_has_closed_is_sent_again() -> None:
    async def work(server: Server, connections: Connections) -> None:
        for _ in range(2):
            assert (await connections.put("/k", put_headers([BODY]), [BODY])).status == 200
        assert server.bodies == [BODY, BODY]
        assert server.connections == 2

    use([[answer(b"", "200 OK"), CLOSE], [answer(b"", "200 OK")]], work)


def test_a_put_whose_connection_breaks() -> None:
    async def work(server: Server, connections: Connections) -> None:
        server.reads_bodies = False
        with pytest.raises(OSError) as caught:
            await connections.put("/k", put_headers([bytes(64 << 20)]), [bytes(64 << 20)])
        assert isinstance(caught.value, BrokenAnswer)

    use([[RESET]], work)


def test_a_put_that_nobody_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3connections, "SILENCE_SECONDS", 0.2)

    async def work(server: Server, connections: Connections) -> None:
        server.reads_bodies = False
        with pytest.raises(TimeoutError):
            await connections.put("/k", put_headers([bytes(64 << 20)]), [bytes(64 << 20)])

    use([[]], work)
