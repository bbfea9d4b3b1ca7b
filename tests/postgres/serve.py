"""A meta server as a process, for the tests: ``python -m tests.postgres.serve DSN VOLUME LEASE``. It stands by until it
is the active one, then prints its port."""

from __future__ import annotations

import asyncio
import os
import sys

from aiohttp import web

from polefs.meta.server import MetaServer, Served
from polefs.meta.store.postgres import PostgresStore


async def serve(dsn: str, volume: str, lease: float) -> None:
    store = await PostgresStore.open(dsn, volume, lease=lease, wait=True)
    server = MetaServer({"files": Served(store)}, lease=600.0)
    await server.start()
    runner = web.AppRunner(server.application, shutdown_timeout=0.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await store.deposed()
    # What it was asked for meanwhile must get no other answer than the end of its connection.
    os._exit(3)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], float(sys.argv[3])))
