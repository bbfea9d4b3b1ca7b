"""INIT: nothing is agreed to that is not offered, wanted, served and possible together."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawfuse import FileSystem, FuseError, InitFlag, Opcode, Settings, ops
from rawfuse.negotiate import DEFAULT, FEATURES, PAGE, encode_init, encode_old_major, negotiate, page_limit

ALL = (1 << 43) - 1
LOCKS = InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS


def init(flags: int = ALL, *, major: int = 7, minor: int = 45, max_readahead: int = 131072) -> ops.Init:
    return ops.Init(2, 0, 0, 0, 0, major, minor, max_readahead, flags)


class Everything(FileSystem):
    """Implements every operation."""

    def implements(self, opcode: Opcode) -> bool:
        return True


class Wishes(Everything):
    def __init__(self, features: InitFlag) -> None:
        self.features = features


def test_every_flag_stands_in_the_table() -> None:
    assert set(FEATURES) == set(InitFlag)


def test_defaults_are_agreed_when_possible() -> None:
    agreed = negotiate(init(), Everything(), Settings())
    assert agreed.flags == DEFAULT
    assert agreed.refused == {}
    assert agreed.minor == 45


def test_what_the_file_system_lacks_is_left_out() -> None:
    agreed = negotiate(init(), FileSystem(), Settings())
    assert not agreed.flags & (LOCKS | InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO | InitFlag.ATOMIC_O_TRUNC)
    assert "GETLK" in agreed.refused[InitFlag.POSIX_LOCKS]


def test_declined_opcodes_count_as_lacking() -> None:
    class Locks(FileSystem):
        async def get_lock(self, op: ops.GetLock) -> None:  # type: ignore[override]
            return None

        async def set_lock(self, op: ops.SetLock) -> None:
            return None

    assert negotiate(init(), Locks(), Settings()).flags & LOCKS == LOCKS
    filesystem = Locks()
    filesystem.declined = frozenset({Opcode.SETLKW})
    assert not negotiate(init(), filesystem, Settings()).flags & LOCKS


def test_kernel_that_offers_nothing() -> None:
    agreed = negotiate(init(0), Wishes(InitFlag.POSIX_ACL), Settings())
    assert agreed.flags == 0
    assert agreed.max_pages == 32
    assert agreed.max_write == 32 * PAGE
    assert agreed.refused[InitFlag.POSIX_ACL] == "the kernel does not offer it"


@pytest.mark.parametrize("flag", [flag for flag, feature in FEATURES.items() if not feature.served])
def test_what_is_not_served_is_never_agreed_to(flag: InitFlag) -> None:
    agreed = negotiate(init(), Wishes(flag), Settings())
    assert not agreed.flags & flag
    assert agreed.refused[flag] == "rawfuse does not serve it"


def test_a_flag_stands_behind_what_it_requires() -> None:
    order = list(FEATURES)
    for flag, feature in FEATURES.items():
        assert all(order.index(other) < order.index(flag) for other in feature.requires | _init_ext(flag))


def _init_ext(flag: InitFlag) -> InitFlag:
    return InitFlag.INIT_EXT if flag >= 1 << 32 else InitFlag(0)


@pytest.mark.parametrize("flag", [flag for flag, feature in FEATURES.items() if feature.served])
def test_what_is_served_can_be_had(flag: InitFlag) -> None:
    feature = FEATURES[flag]
    settings = Settings(refuse=feature.excludes, request_timeout=flag == InitFlag.REQUEST_TIMEOUT and 60)
    agreed = negotiate(init(), Wishes(flag | feature.requires), settings, ring_stands=True)
    assert agreed.flags & flag
    assert flag not in agreed.refused


def test_io_uring_needs_a_ring() -> None:
    """Without one the kernel would hold back every request for ever (dev.c: fuse_block_alloc)."""
    ring = InitFlag.OVER_IO_URING
    agreed = negotiate(init(), Wishes(ring), Settings(transport="uring"))
    assert not agreed.flags & ring
    assert "no ring" in agreed.refused[ring]
    assert not negotiate(init(), Everything(), Settings()).flags & ring
    assert negotiate(init(), Everything(), Settings(), ring_stands=True).flags & ring
    for refused in (
        negotiate(init(0), Everything(), Settings(), ring_stands=True),
        negotiate(init(minor=41), Everything(), Settings(), ring_stands=True),
        negotiate(init(), Everything(), Settings(refuse=ring), ring_stands=True),
        negotiate(init(), Everything(), Settings(refuse=InitFlag.INIT_EXT), ring_stands=True),
    ):
        assert not refused.flags & ring


def test_idmapped_mounts_need_the_permission_checks_of_the_kernel() -> None:
    """It would refuse the connection otherwise (inode.c: process_init_reply)."""
    wishes = InitFlag.ALLOW_IDMAP
    assert negotiate(init(), Wishes(wishes), Settings()).flags & wishes
    agreed = negotiate(init(), Wishes(wishes), Settings(), default_permissions=False)
    assert not agreed.flags & wishes
    assert "default_permissions" in agreed.refused[wishes]
    wishes |= InitFlag.POSIX_ACL
    assert negotiate(init(), Wishes(wishes), Settings(), default_permissions=False).flags & wishes == wishes


def test_security_contexts_need_the_header_that_tells_their_size() -> None:
    wishes = InitFlag.SECURITY_CTX | InitFlag.CREATE_SUPP_GROUP
    for minor, expected in ((36, InitFlag(0)), (37, InitFlag(0)), (38, wishes)):
        agreed = negotiate(init(minor=minor), Wishes(wishes), Settings())
        assert agreed.flags & wishes == expected
        assert set(agreed.refused) == set(wishes & ~expected)


def test_settings_refuse() -> None:
    agreed = negotiate(init(), Everything(), Settings(refuse=LOCKS))
    assert agreed.flags == DEFAULT & ~LOCKS


def test_exclusions() -> None:
    agreed = negotiate(init(), Wishes(InitFlag.HANDLE_KILLPRIV | InitFlag.HANDLE_KILLPRIV_V2), Settings())
    assert agreed.flags & InitFlag.HANDLE_KILLPRIV_V2
    assert not agreed.flags & InitFlag.HANDLE_KILLPRIV
    assert "HANDLE_KILLPRIV_V2" in agreed.refused[InitFlag.HANDLE_KILLPRIV]


def test_passthrough_yields_to_write_back() -> None:
    agreed = negotiate(init(), Wishes(InitFlag.PASSTHROUGH | InitFlag.WRITEBACK_CACHE), Settings())
    assert agreed.flags & InitFlag.WRITEBACK_CACHE
    assert "WRITEBACK_CACHE" in agreed.refused[InitFlag.PASSTHROUGH]


def test_passthrough_needs_privilege(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rawfuse.negotiate.privileged", lambda: False)
    agreed = negotiate(init(), Wishes(InitFlag.PASSTHROUGH), Settings())
    assert agreed.flags == DEFAULT
    assert "CAP_SYS_ADMIN" in agreed.refused[InitFlag.PASSTHROUGH]


@pytest.mark.parametrize("depth", [1, 2])
def test_passthrough_names_a_stack_depth(depth: int) -> None:
    for wanted in InitFlag.PASSTHROUGH, InitFlag(0):
        settings = Settings(max_stack_depth=depth)
        body = encode_init(negotiate(init(), Wishes(wanted), settings), settings)
        assert struct.unpack_from("=I", body, 36) == (depth if wanted else 0,)


def test_stack_depths_that_the_kernel_would_ignore() -> None:
    with pytest.raises(ValueError, match="1 or 2"):
        Settings(max_stack_depth=3)


def test_what_is_excluded_by_something_refused_can_be_had() -> None:
    wishes = Wishes(InitFlag.EXPLICIT_INVAL_DATA)
    assert not negotiate(init(), wishes, Settings()).flags & InitFlag.EXPLICIT_INVAL_DATA
    offered = ALL & ~InitFlag.AUTO_INVAL_DATA
    assert negotiate(init(offered), wishes, Settings()).flags & InitFlag.EXPLICIT_INVAL_DATA


def test_what_the_kernel_offers_is_kept() -> None:
    agreed = negotiate(init(1 << 60 | 1, minor=50), Wishes(InitFlag(1 << 60)), Settings())
    assert (agreed.offered, agreed.kernel_minor, agreed.minor) == (1 << 60 | 1, 50, 45)
    assert agreed.flags == InitFlag.ASYNC_READ


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_background": 1 << 16},
        {"congestion_threshold": -1},
        {"request_timeout": 100_000},
        {"max_write": 0},
        {"max_write": 1 << 32},
        {"max_readahead": -1},
    ],
)
def test_settings_that_the_reply_has_no_room_for(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, ALL),
    st.integers(31, 50),
    st.booleans(),
    st.booleans(),
)
def test_any_wishes_and_offers(
    offered: int, wanted: int, refused: int, minor: int, everything: bool, permissions: bool
) -> None:
    filesystem = Everything() if everything else FileSystem()
    filesystem.features = InitFlag(wanted)
    settings = Settings(refuse=InitFlag(refused))
    agreed = negotiate(init(offered, minor=minor), filesystem, settings, default_permissions=permissions)
    flags = agreed.flags
    assert flags & ~offered == 0
    assert flags & ~(DEFAULT | wanted) == 0
    assert flags & refused == 0
    assert flags >> 43 == 0
    assert permissions or not flags & InitFlag.ALLOW_IDMAP or flags & InitFlag.POSIX_ACL
    missing = {flag for flag in FEATURES if flag & (DEFAULT | wanted) & ~refused & ~flags}
    assert set(agreed.refused) == missing
    for flag, feature in FEATURES.items():
        if flags & flag:
            assert feature.served
            assert minor >= feature.minor
            assert flags & feature.excludes == 0
            assert flags & feature.requires == feature.requires
            assert all(filesystem.implements(opcode) for opcode in feature.needs)
    assert PAGE <= agreed.max_write <= agreed.max_pages * PAGE


@pytest.mark.parametrize(
    ("asked", "expected"), [(1, PAGE), (PAGE, PAGE), (65536, 65536), ((1 << 32) - 1, page_limit() * PAGE)]
)
def test_max_write(asked: int, expected: int) -> None:
    agreed = negotiate(init(), Everything(), Settings(max_write=asked))
    assert agreed.max_write == expected
    assert agreed.max_pages == expected // PAGE
    assert agreed.buffer_size >= max(8192, 80 + agreed.max_write)


@pytest.mark.parametrize("minor", [31, 40, 45, 60])
def test_minor_is_the_lesser(minor: int) -> None:
    assert negotiate(init(minor=minor), Everything(), Settings()).minor == min(45, minor)


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (7, 0), (6, 50), (0, 0)])
def test_kernels_that_are_too_old(major: int, minor: int) -> None:
    with pytest.raises(FuseError) as caught:
        negotiate(init(major=major, minor=minor), Everything(), Settings())
    assert caught.value.errno == errno.EPROTO
    assert f"{major}.{minor}" in str(caught.value)


def test_reply() -> None:
    settings = Settings(max_write=65536, max_background=5, congestion_threshold=4, request_timeout=60)
    agreed = negotiate(init(), Wishes(InitFlag.HANDLE_KILLPRIV_V2), settings)
    body = encode_init(agreed, settings)
    assert len(body) == 64
    flags = int(DEFAULT | InitFlag.HANDLE_KILLPRIV_V2 | InitFlag.REQUEST_TIMEOUT)
    assert struct.unpack_from("=IIIIHHIIHHIIH", body) == (
        7,
        45,
        agreed.max_readahead,
        flags & 0xFFFFFFFF,
        5,
        4,
        65536,
        1,
        65536 // PAGE,
        0,
        flags >> 32,
        0,
        60,
    )
    assert body[42:] == bytes(22)


def test_second_flags_need_init_ext() -> None:
    """Without INIT_EXT in the reply the kernel reads no flags2: then none of those may count as agreed."""
    high = InitFlag.HAS_EXPIRE_ONLY | InitFlag.HAS_RESEND | InitFlag.DIRECT_IO_ALLOW_MMAP
    agreed = negotiate(init(), Everything(), Settings(refuse=InitFlag.INIT_EXT))
    assert not agreed.flags & high


def test_reply_to_a_newer_major() -> None:
    body = encode_old_major()
    assert struct.unpack_from("=II", body) == (7, 45)
