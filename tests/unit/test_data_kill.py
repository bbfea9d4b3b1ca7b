"""kill -9 of a process that writes: everything that it had been told was written is there afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.unit.data_helpers import Volume
from tests.unit.test_data_files import assert_sound

SIZES = [100, 4096, 5000, 70_000, 300_000, 1_500_000]


def block(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


async def worker(path: Path) -> None:
    """Random changes for ever; prints each one after it was acknowledged."""
    volume = Volume(path, flush_after=0.02)
    await volume.open()
    volume.files.start()
    inos = [(await volume.meta.lookup(1, b"%d" % number)).ino for number in range(4)]
    print("ready", flush=True)
    chooser = random.Random(time.time_ns())
    for seed in range(1, 1 << 30):
        ino = chooser.choice(inos)
        offset, length = chooser.choice([0, 10, 4096, 100_000]), chooser.choice(SIZES)
        kind = chooser.choice(["write", "write", "write", "truncate", "sync"])
        print("begin", kind, ino, offset, length, seed, flush=True)
        if kind == "write":
            await volume.write(ino, offset, block(seed, length))
        elif kind == "truncate":
            await volume.truncate(ino, length)
        else:
            await volume.files.sync(ino, False)
        print("end", flush=True)
        await asyncio.sleep(0)


async def prepare(path: Path) -> list[int]:
    volume = Volume(path)
    await volume.open()
    inos = [await volume.make(b"%d" % number) for number in range(4)]
    await volume.close()
    return inos


def apply(contents: dict[int, bytearray], kind: str, ino: int, offset: int, length: int, seed: int) -> None:
    content = contents[ino]
    if kind == "write":
        content.extend(bytes(max(offset - len(content), 0)))
        content[offset : offset + length] = block(seed, length)
    elif kind == "truncate":
        del content[length:]
        content.extend(bytes(length - len(content)))


async def verify(path: Path, contents: dict[int, bytearray], pending: list[str] | None) -> None:
    volume = Volume(path)
    await volume.open()
    for ino, content in contents.items():
        found = await volume.read(ino)
        if found == content or pending is None or int(pending[1]) != ino:
            assert found == content
        else:
            # Killed in the middle of this one, which nobody was told of: any part of it may have happened.
            before = bytes(content)
            apply(contents, pending[0], *map(int, pending[1:]))
            assert len(found) in (len(before), len(content))
            both = zip_longest(found, before[: len(found)], content[: len(found)], fillvalue=0)
            assert all(byte in (old, new) for byte, old, new in both)
    await volume.close()
    await assert_sound(path, volume)


@pytest.mark.parametrize("count", [3, 40, 150])
def test_kill(tmp_path: Path, count: int) -> None:
    inos = asyncio.run(prepare(tmp_path))
    contents = {ino: bytearray() for ino in inos}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.test_data_kill", str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pending: list[str] | None = None
        done = 0
        for line in process.stdout:
            if line.startswith("begin"):
                # A line that was cut off tells of nothing that had begun.
                pending = line.split()[1:] if line.endswith("\n") else None
            elif line.startswith("end"):
                assert pending is not None
                apply(contents, pending[0], *map(int, pending[1:]))
                pending = None
                done += 1
                if done == count:
                    # It goes on while the signal is on its way; what it says meanwhile counts as well.
                    process.send_signal(signal.SIGKILL)
    assert done >= count
    asyncio.run(verify(tmp_path, contents, pending))


if __name__ == "__main__":
    asyncio.run(worker(Path(sys.argv[1])))
