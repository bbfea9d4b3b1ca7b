"""The memory file system on a machine that lacks something: ``python -m tests.mounted.transports TRANSPORT FAULT
MOUNTPOINT``. It writes to standard output what carries its requests, and why."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import struct
import sys

from examples.memory import Memory
from rawfuse import MountOptions, Session, Settings, uring
from rawfuse.negotiate import TransportName

_SETUP, _ENTER = 425, 426
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM


def forbid(number: int) -> None:
    """Have the system call fail with EPERM, as container runtimes do."""
    rules = [(_LOAD, 0, 0, 0), (_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = struct.pack("@HP", len(rules), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def settings(transport: TransportName, fault: str) -> Settings:
    """Bring the fault about."""
    match fault:
        case "setup":
            forbid(_SETUP)
        case "enter":
            forbid(_ENTER)
        case "cpus":
            possible = uring.possible_cpus()
            uring.possible_cpus = lambda: possible + 1
        case "small":
            return Settings(transport=transport, max_write=1 << 16)
        case "descriptors":
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            return Settings(transport=transport, readers=100)
    return Settings(transport=transport)


async def main() -> None:
    transport, fault, mountpoint = sys.argv[1:]
    session = Session(Memory(1 << 30), mountpoint, MountOptions(subtype="memory"), settings=settings(transport, fault))
    await session.mount()
    print(f"{session.transport}: {session.transport_fallback}", flush=True)
    await session.serve()


if __name__ == "__main__":
    asyncio.run(main())  # libuv aborts when io_uring_enter is forbidden
