"""Two meta servers, processes, on one volume: the active one dies or hangs, clients go on with the other, and no
operation is lost or done twice."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from polefs.meta.model import ROOT_INO, Caller
from polefs.meta.remote import RemoteMeta
from tests.postgres.server import PostgresServer
from tests.postgres.volumes import run, until, volume
from tests.unit.test_meta_remote import Relay

ROOT = Caller(0, 0)
CLIENTS = 4


async def start(dsn: str, name: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.postgres.serve", dsn, name, "2.0"),
        stdout=PIPE,
        cwd=Path(__file__).parents[2],
    )


async def port(process: Process) -> int:
    assert process.stdout is not None
    return int(await process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_clients_go_on_with_the_server_that_stood_by(postgres_server: PostgresServer, number: int) -> None:
    async def test() -> None:
        dsn = postgres_server.dsn()
        async with volume(dsn) as made:
            name = made.store.name
        relay = Relay()
        await relay.start()
        first = await start(dsn, name)
        relay.target = await port(first)
        second = await start(dsn, name)
        takes_over = asyncio.ensure_future(port(second))
        done: list[list[bytes]] = [[] for _ in range(CLIENTS)]
        stop = asyncio.Event()

        async def work(client: int) -> None:
            meta = await RemoteMeta.connect(f"http://127.0.0.1:{relay.port}/files")
            for count in itertools.count():
                if stop.is_set():
                    break
                # Each fails with EEXIST or ENOENT where it was done twice.
                mine = b"%d-%d" % (client, count)
                made = await meta.make_node(ROOT, ROOT_INO, mine, 0o100644, 0)
                await meta.link(made.ino, ROOT_INO, b"l" + mine)
                await meta.rename(ROOT, ROOT_INO, mine, ROOT_INO, b"r" + mine)
                await meta.unlink(ROOT_INO, b"l" + mine)
                done[client].append(b"r" + mine)
            await meta.close()

        def all_have(count: int) -> bool:
            return all(len(names) >= count for names in done)

        workers = [asyncio.ensure_future(work(client)) for client in range(CLIENTS)]
        try:
            # On a busy machine the other may take over before anybody dies.
            await until(lambda: all_have(10) or takes_over.done() or any(worker.done() for worker in workers))
            if first.returncode is None:
                first.send_signal(number)
            relay.target = await takes_over
            relay.cut()
            reached = max(map(len, done)) + 10
            await until(lambda: all_have(reached) or any(worker.done() for worker in workers))
            if number == signal.SIGSTOP:
                # It finds out by itself that it has been deposed, and ends.
                if first.returncode is None:
                    first.send_signal(signal.SIGCONT)
                assert await first.wait() == 3
            stop.set()
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            for process in (first, second):
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            await relay.close()
        async with volume(dsn, name, force=True) as after:
            assert await after.names() == sorted(itertools.chain(*done))
            assert (await after.service.usage()).inodes == 1 + sum(map(len, done))

    run(test)
