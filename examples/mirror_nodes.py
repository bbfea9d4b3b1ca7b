"""What the kernel knows of a mirror: inodes and open handles, each with a descriptor. With a keeper they survive the
process: the descriptors are deposited under numbers that no process before has used."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import stat
import struct
from collections.abc import Iterator

from examples.mirror_syscalls import directory_entries
from rawfuse import FuseError
from rawfuse.abi import ROOT_ID, UNIQUE_RESEND
from rawfuse.handover import Keeper

MOST_NODES = 1 << 20
"""Inodes that the kernel may know at a time; ENFILE for one more."""

_NODE, _FILE, _DIRECTORY, _LOOKUPS = b"node/", b"file/", b"directory/", b"lookups"
_WORD = struct.Struct("=Q")
_LISTING = 1 << 15


def first_number(keeper: Keeper | None) -> int:
    """Numbers from here on are this process's own."""
    return ((keeper.servers - 1) << 40 if keeper is not None else 0) + 1


class Node:
    """An inode of the source that the kernel knows."""

    __slots__ = ("fd", "key", "nodeid", "slot")

    def __init__(self, nodeid: int, fd: int, key: tuple[int, int], slot: int) -> None:
        self.nodeid = nodeid
        self.fd = fd
        """O_PATH."""
        self.key = key
        """``(st_dev, st_ino)``, taken for as long as the descriptor is open."""
        self.slot = slot
        """Where its look-ups are counted."""

    @property
    def path(self) -> str:
        """Leads to this very inode, a symbolic link not followed further."""
        return f"/proc/self/fd/{self.fd}"


class Nodes:
    """All of them by nodeid; ``source`` is the directory that becomes the root.

    Their look-up counts stand in memory that the keeper holds as well, because they change too often to be deposited.
    What was in work when a process died may have been counted twice (LOOKUP) or not at all (FORGET): such an inode then
    stays known longer than it need be.
    """

    def __init__(self, source: str, keeper: Keeper | None) -> None:
        self._keeper = keeper
        self._by_id: dict[int, Node] = {}
        self._by_key: dict[tuple[int, int], Node] = {}
        self._numbers = itertools.count(first_number(keeper) + ROOT_ID)
        self._lookups = self._shared_counts()
        self._free: list[int] = []
        self._slots = 0
        self._inherit()
        if ROOT_ID not in self._by_id:
            root = os.open(source, os.O_PATH | os.O_DIRECTORY)
            self._lookups[self._add(ROOT_ID, root, os.fstat(root)).slot] = 1

    def __getitem__(self, nodeid: int) -> Node:
        return self._by_id[nodeid]

    def known(self, status: os.stat_result) -> Node | None:
        """The node of an inode; its look-up is counted."""
        node = self._by_key.get((status.st_dev, status.st_ino))
        if node is not None:
            self._lookups[node.slot] += 1
        return node

    def adopt(self, fd: int, status: os.stat_result) -> Node:
        """The node of an O_PATH descriptor, which is the node's from now on; its look-up is counted."""
        node = self.known(status)
        if node is not None:
            os.close(fd)
            return node
        node = self._add(next(self._numbers), fd, status)
        self._lookups[node.slot] = 1
        return node

    def forget(self, nodeid: int, count: int) -> None:
        node = self._by_id[nodeid]
        left = self._lookups[node.slot] - count
        if left > 0 or nodeid == ROOT_ID:
            self._lookups[node.slot] = max(left, 0)
            return
        del self._by_id[nodeid], self._by_key[node.key]
        if self._keeper is not None:
            self._keeper.drop(_NODE + str(nodeid).encode())
        self._lookups[node.slot] = 0
        self._free.append(node.slot)
        os.close(node.fd)

    def close(self) -> None:
        for node in self._by_id.values():
            os.close(node.fd)

    def _add(self, nodeid: int, fd: int, status: os.stat_result) -> Node:
        if self._free:
            slot = self._free.pop()
        elif self._slots < MOST_NODES:
            slot, self._slots = self._slots, self._slots + 1
        else:
            os.close(fd)
            raise FuseError(errno.ENFILE)
        node = Node(nodeid, fd, (status.st_dev, status.st_ino), slot)
        self._by_id[nodeid] = self._by_key[node.key] = node
        if self._keeper is not None:
            self._keeper.put(_NODE + str(nodeid).encode(), _WORD.pack(node.slot), fd)
        return node

    def _shared_counts(self) -> memoryview:
        keeper = self._keeper
        if keeper is None:
            return memoryview(mmap.mmap(-1, MOST_NODES * _WORD.size)).cast("Q")
        if _LOOKUPS in keeper.kept:
            fd = keeper.kept[_LOOKUPS].fd
        else:
            fd = os.memfd_create("mirror-lookups", os.MFD_CLOEXEC)
            os.ftruncate(fd, MOST_NODES * _WORD.size)
            keeper.put(_LOOKUPS, fd=fd)
        return memoryview(mmap.mmap(fd, MOST_NODES * _WORD.size)).cast("Q")

    def _inherit(self) -> None:
        used: set[int] = set()
        for number, value, fd in inherited(self._keeper, _NODE):
            status = os.fstat(fd)
            node = Node(number, fd, (status.st_dev, status.st_ino), _WORD.unpack(value)[0])
            self._by_id[number] = self._by_key[node.key] = node
            used.add(node.slot)
        self._slots = max(used, default=-1) + 1
        self._free += set(range(self._slots)) - used


class Listing:
    """An open directory. A cookie is the offset that the source's file system gives to what comes next."""

    __slots__ = ("_entries", "_next", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._entries: list[tuple[bytes, int, int, int]] = []
        """Read and not taken yet, the first one last; they begin at the cookie ``_next``."""
        self._next = -1

    def entries(self, cookie: int) -> Iterator[tuple[bytes, int, int, int]]:
        """``(name, inode number, type bits, next cookie)`` from a cookie on; 0 begins anew, with what the directory
        holds now. An entry is taken when the one behind it is asked for."""
        if cookie == 0 or cookie != self._next:
            os.lseek(self.fd, cookie, os.SEEK_SET)
            self._entries.clear()
        self._next = cookie
        while True:
            if not self._entries:
                self._entries = directory_entries(self.fd, _LISTING)
                self._entries.reverse()
                if not self._entries:
                    return
            entry = self._entries[-1]
            yield entry
            self._entries.pop()
            self._next = entry[3]


class Handles:
    """Open files and directories by the numbers that the kernel knows them by."""

    def __init__(self, keeper: Keeper | None) -> None:
        self._keeper = keeper
        self._numbers = itertools.count(first_number(keeper))
        self.files: dict[int, int] = {}
        self.listings: dict[int, Listing] = {}
        self._by_request: dict[int, int] = {}
        for number, value, fd in inherited(keeper, _FILE):
            self.files[number] = fd
            self._by_request[_WORD.unpack(value)[0]] = number
        for number, value, fd in inherited(keeper, _DIRECTORY):
            self.listings[number] = Listing(fd)
            self._by_request[_WORD.unpack(value)[0]] = number

    def opened_by(self, unique: int) -> int | None:
        """The handle that a process before has opened for this request, which it has not answered."""
        return self._by_request.get(unique & ~UNIQUE_RESEND) if unique & UNIQUE_RESEND else None

    def add_file(self, fd: int, unique: int) -> int:
        fh = next(self._numbers)
        self.files[fh] = fd
        self._deposit(_FILE, fh, unique, fd)
        return fh

    def add_directory(self, fd: int, unique: int) -> int:
        fh = next(self._numbers)
        self.listings[fh] = Listing(fd)
        self._deposit(_DIRECTORY, fh, unique, fd)
        return fh

    def close_file(self, fh: int) -> None:
        """Nothing happens if it is closed already: that request has been sent again."""
        fd = self.files.pop(fh, None)
        if fd is not None:
            self._withdraw(_FILE, fh)
            os.close(fd)

    def close_directory(self, fh: int) -> None:
        """As ``close_file``."""
        listing = self.listings.pop(fh, None)
        if listing is not None:
            self._withdraw(_DIRECTORY, fh)
            os.close(listing.fd)

    def _deposit(self, kind: bytes, fh: int, unique: int, fd: int) -> None:
        if self._keeper is not None:
            self._keeper.put(kind + str(fh).encode(), _WORD.pack(unique & ~UNIQUE_RESEND), fd)

    def _withdraw(self, kind: bytes, fh: int) -> None:
        if self._keeper is not None:
            self._keeper.drop(kind + str(fh).encode())


def inherited(keeper: Keeper | None, kind: bytes) -> Iterator[tuple[int, bytes, int]]:
    """``(number, value, descriptor)`` of the deposits of a kind."""
    for key, kept in keeper.kept.items() if keeper is not None else ():
        if key.startswith(kind) and kept.fd >= 0:
            yield int(key.removeprefix(kind)), kept.value, kept.fd


def identity(directory: int, name: bytes) -> bytes:
    """Which inode a name has at the moment; empty for none."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return b""
    return struct.pack("=QQI", status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode))
