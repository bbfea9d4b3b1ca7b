"""A proxy in front of PostgreSQL that loses messages and answers on purpose."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Literal, Self

from tests.postgres.server import PostgresServer

Fault = Literal["request", "answer", "silence"]
"""The connection is lost with a message to the server, or with the answer to it; or nothing arrives any more."""


class Proxy:
    """Fails, ``times`` times, at a message to the server that contains ``marker``."""

    def __init__(self, server: PostgresServer) -> None:
        self._upstream = str(server.socket)
        self._database = "postgres"
        self._path = Path(tempfile.mkdtemp(prefix="polefs-pg-", dir="/tmp"))
        self._fault: Fault | None = None
        self._marker = b""
        self._times = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed = 0

    @property
    def dsn(self) -> str:
        return f"postgresql://test@/{self._database}?host={self._path}"

    def fail(self, fault: Fault, marker: bytes, times: int = 1) -> None:
        self._fault, self._marker, self._times = fault, marker, times

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path / ".s.PGSQL.5432")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        shutil.rmtree(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        except OSError:
            writer.close()
            self._tasks.discard(task)
            return
        back = asyncio.create_task(self._copy(up_reader, writer))
        try:
            while data := await reader.read(1 << 20):
                fault = self._fault if self._times and self._marker in data else None
                if fault is not None:
                    self._times -= 1
                    self.failed += 1
                if fault == "request":
                    return
                if fault in ("answer", "silence"):
                    back.cancel()
                up_writer.write(data)
                await up_writer.drain()
                if fault == "answer":
                    await up_reader.read(1 << 20)
                    return
        except OSError:
            pass
        finally:
            back.cancel()
            writer.close()
            up_writer.close()
            self._tasks.discard(task)

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 20):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
