"""Every structure of protocol 7.45: its size, and the type and offset of every field, as a C compiler (x86-64) lays out
the kernel's include/uapi/linux/fuse.h."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
from rawfuse._kernel import ffi, lib

from rawfuse import abi
from rawfuse.wire import Codec

LAYOUT = """
fuse_in_header 40: len u32@0, opcode u32@4, unique u64@8, nodeid u64@16, uid u32@24, gid u32@28, pid u32@32,
    total_extlen u16@36, padding u16@38
fuse_out_header 16: len u32@0, error i32@4, unique u64@8
fuse_attr 88: ino u64@0, size u64@8, blocks u64@16, atime u64@24, mtime u64@32, ctime u64@40, atimensec u32@48,
    mtimensec u32@52, ctimensec u32@56, mode u32@60, nlink u32@64, uid u32@68, gid u32@72, rdev u32@76, blksize
    u32@80, flags u32@84
fuse_entry_out 128: nodeid u64@0, generation u64@8, entry_valid u64@16, attr_valid u64@24, entry_valid_nsec u32@32,
    attr_valid_nsec u32@36, attr fuse_attr@40
fuse_attr_out 104: attr_valid u64@0, attr_valid_nsec u32@8, dummy u32@12, attr fuse_attr@16
fuse_sx_time 16: tv_sec i64@0, tv_nsec u32@8, __reserved i32@12
fuse_statx 256: mask u32@0, blksize u32@4, attributes u64@8, nlink u32@16, uid u32@20, gid u32@24, mode u16@28,
    __spare0 u16[1]@30, ino u64@32, size u64@40, blocks u64@48, attributes_mask u64@56, atime fuse_sx_time@64, btime
    fuse_sx_time@80, ctime fuse_sx_time@96, mtime fuse_sx_time@112, rdev_major u32@128, rdev_minor u32@132,
    dev_major u32@136, dev_minor u32@140, __spare2 u64[14]@144
fuse_statx_in 24: getattr_flags u32@0, reserved u32@4, fh u64@8, sx_flags u32@16, sx_mask u32@20
fuse_statx_out 288: attr_valid u64@0, attr_valid_nsec u32@8, flags u32@12, spare u64[2]@16, stat fuse_statx@32
fuse_kstatfs 80: blocks u64@0, bfree u64@8, bavail u64@16, files u64@24, ffree u64@32, bsize u32@40, namelen u32@44,
    frsize u32@48, padding u32@52, spare u32[6]@56
fuse_statfs_out 80: st fuse_kstatfs@0
fuse_file_lock 24: start u64@0, end u64@8, type u32@16, pid u32@20
fuse_forget_in 8: nlookup u64@0
fuse_batch_forget_in 8: count u32@0, dummy u32@4
fuse_forget_one 16: nodeid u64@0, nlookup u64@8
fuse_getattr_in 16: getattr_flags u32@0, dummy u32@4, fh u64@8
fuse_setattr_in 88: valid u32@0, padding u32@4, fh u64@8, size u64@16, lock_owner u64@24, atime u64@32, mtime
    u64@40, ctime u64@48, atimensec u32@56, mtimensec u32@60, ctimensec u32@64, mode u32@68, unused4 u32@72, uid
    u32@76, gid u32@80, unused5 u32@84
fuse_mknod_in 16: mode u32@0, rdev u32@4, umask u32@8, padding u32@12
fuse_mkdir_in 8: mode u32@0, umask u32@4
fuse_rename_in 8: newdir u64@0
fuse_rename2_in 16: newdir u64@0, flags u32@8, padding u32@12
fuse_link_in 8: oldnodeid u64@0
fuse_open_in 8: flags u32@0, open_flags u32@4
fuse_create_in 16: flags u32@0, mode u32@4, umask u32@8, open_flags u32@12
fuse_open_out 16: fh u64@0, open_flags u32@8, backing_id i32@12
fuse_release_in 24: fh u64@0, flags u32@8, release_flags u32@12, lock_owner u64@16
fuse_flush_in 24: fh u64@0, unused u32@8, padding u32@12, lock_owner u64@16
fuse_read_in 40: fh u64@0, offset u64@8, size u32@16, read_flags u32@20, lock_owner u64@24, flags u32@32, padding
    u32@36
fuse_write_in 40: fh u64@0, offset u64@8, size u32@16, write_flags u32@20, lock_owner u64@24, flags u32@32, padding
    u32@36
fuse_write_out 8: size u32@0, padding u32@4
fuse_fsync_in 16: fh u64@0, fsync_flags u32@8, padding u32@12
fuse_setxattr_in 16: size u32@0, flags u32@4, setxattr_flags u32@8, padding u32@12
fuse_getxattr_in 8: size u32@0, padding u32@4
fuse_getxattr_out 8: size u32@0, padding u32@4
fuse_lk_in 48: fh u64@0, owner u64@8, lk fuse_file_lock@16, lk_flags u32@40, padding u32@44
fuse_lk_out 24: lk fuse_file_lock@0
fuse_access_in 8: mask u32@0, padding u32@4
fuse_init_in 64: major u32@0, minor u32@4, max_readahead u32@8, flags u32@12, flags2 u32@16, unused u32[11]@20
fuse_init_out 64: major u32@0, minor u32@4, max_readahead u32@8, flags u32@12, max_background u16@16,
    congestion_threshold u16@18, max_write u32@20, time_gran u32@24, max_pages u16@28, map_alignment u16@30, flags2
    u32@32, max_stack_depth u32@36, request_timeout u16@40, unused u16[11]@42
fuse_interrupt_in 8: unique u64@0
fuse_bmap_in 16: block u64@0, blocksize u32@8, padding u32@12
fuse_bmap_out 8: block u64@0
fuse_ioctl_in 32: fh u64@0, flags u32@8, cmd u32@12, arg u64@16, in_size u32@24, out_size u32@28
fuse_ioctl_iovec 16: base u64@0, len u64@8
fuse_ioctl_out 16: result i32@0, flags u32@4, in_iovs u32@8, out_iovs u32@12
fuse_poll_in 24: fh u64@0, kh u64@8, flags u32@16, events u32@20
fuse_poll_out 8: revents u32@0, padding u32@4
fuse_fallocate_in 32: fh u64@0, offset u64@8, length u64@16, mode u32@24, padding u32@28
fuse_lseek_in 24: fh u64@0, offset u64@8, whence u32@16, padding u32@20
fuse_lseek_out 8: offset u64@0
fuse_copy_file_range_in 56: fh_in u64@0, off_in u64@8, nodeid_out u64@16, fh_out u64@24, off_out u64@32, len u64@40,
    flags u64@48
fuse_copy_file_range_out 8: bytes_copied u64@0
fuse_syncfs_in 8: padding u64@0
fuse_setupmapping_in 40: fh u64@0, foffset u64@8, len u64@16, flags u64@24, moffset u64@32
fuse_removemapping_in 4: count u32@0
fuse_removemapping_one 16: moffset u64@0, len u64@8
fuse_dirent 24: ino u64@0, off u64@8, namelen u32@16, type u32@20, name char[]@24
fuse_direntplus 152: entry_out fuse_entry_out@0, dirent fuse_dirent@128
fuse_secctx_header 8: size u32@0, nr_secctx u32@4
fuse_secctx 8: size u32@0, padding u32@4
fuse_ext_header 8: size u32@0, type u32@4
fuse_supp_groups 4: nr_groups u32@0, groups u32[]@4
fuse_notify_poll_wakeup_out 8: kh u64@0
fuse_notify_inval_inode_out 24: ino u64@0, off i64@8, len i64@16
fuse_notify_inval_entry_out 16: parent u64@0, namelen u32@8, flags u32@12
fuse_notify_delete_out 24: parent u64@0, child u64@8, namelen u32@16, padding u32@20
fuse_notify_store_out 24: nodeid u64@0, offset u64@8, size u32@16, padding u32@20
fuse_notify_retrieve_out 32: notify_unique u64@0, nodeid u64@8, offset u64@16, size u32@24, padding u32@28
fuse_notify_retrieve_in 40: dummy1 u64@0, offset u64@8, size u32@16, dummy2 u32@20, dummy3 u64@24, dummy4 u64@32
fuse_notify_prune_out 16: count u32@0, padding u32@4, spare u64@8
fuse_backing_map 16: fd i32@0, flags u32@4, padding u64@8
fuse_uring_req_header 288: in_out char[128]@0, op_in char[128]@128, ring_ent_in_out fuse_uring_ent_in_out@256
fuse_uring_ent_in_out 32: flags u64@0, commit_id u64@8, payload_sz u32@16, padding u32@20, reserved u64@24
fuse_uring_cmd_req 24: flags u64@0, commit_id u64@8, qid u16@16, padding u8[6]@18
cuse_init_in 16: major u32@0, minor u32@4, unused u32@8, flags u32@12
cuse_init_out 72: major u32@0, minor u32@4, unused u32@8, flags u32@12, max_read u32@16, max_write u32@20, dev_major
    u32@24, dev_minor u32@28, spare u32[10]@32
"""

TYPES = {
    "u8": "uint8_t",
    "u16": "uint16_t",
    "u32": "uint32_t",
    "u64": "uint64_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "char": "char",
}


def _structures() -> dict[str, tuple[int, list[tuple[str, str, int]]]]:
    found = {}
    for line in LAYOUT.strip().replace("\n    ", " ").splitlines():
        head, _, fields = line.partition(": ")
        name, size = head.split()
        parts = [re.fullmatch(r"(\w+) ([\w\[\]]+)@(\d+)", field) for field in fields.split(", ")]
        found[name] = (int(size), [(part[1], part[2], int(part[3])) for part in parts if part is not None])
        assert None not in parts, line
    return found


STRUCTURES = _structures()


def _c_name(kind: str) -> str:
    base, bracket, length = kind.partition("[")
    name = TYPES.get(base, f"struct {base}")
    return name + bracket + length


def test_all_structures_are_there() -> None:
    compiled = {name for names in ffi.list_types() for name in names}
    assert set(STRUCTURES) == {name for name in compiled if name.startswith(("fuse_", "cuse_"))} - {
        "fuse_opcode",
        "fuse_notify_code",
    }


@pytest.mark.parametrize("name", STRUCTURES)
def test_layout(name: str) -> None:
    size, fields = STRUCTURES[name]
    ctype = ffi.typeof(f"struct {name}")
    assert ffi.sizeof(ctype) == size
    flexible = [field for field, kind, _ in fields if kind.endswith("[]")]
    assert [(field, found.type.cname, found.offset) for field, found in ctype.fields] == [
        (field, _c_name(kind), offset) for field, kind, offset in fields
    ]
    assert all(field == fields[-1][0] for field in flexible)


@pytest.mark.parametrize("name", sorted(set(STRUCTURES) - {"fuse_uring_req_header"}))
def test_codec_packs_as_the_compiler(name: str) -> None:
    """A codec writes each value where the compiled structure has its field, and zeros elsewhere."""
    codec = Codec(name)
    values = [number + 1 for number in range(len(codec.fields))]
    packed = codec.pack(*values)
    assert len(packed) == codec.size == ffi.sizeof(f"struct {name}")
    data = ffi.new("char[]", packed)
    whole = ffi.cast(f"struct {name} *", data)
    for field, value in zip(codec.fields, values, strict=True):
        assert _member(whole, field) == value, field
    assert codec.unpack_from(packed) == tuple(values)
    assert sum(packed) == sum(values)


def _member(structure: Any, path: str) -> int:
    for name in path.split("."):
        structure = getattr(structure, name)
    return int(structure)


def test_codec_of_signed_times() -> None:
    codec = Codec("fuse_attr", ["atime", "mtime", "ctime"])
    values = dict.fromkeys(codec.fields, 0) | {"mtime": -5}
    packed = codec.pack(*values.values())
    assert packed[32:40] == struct.pack("=q", -5)
    assert dict(zip(codec.fields, codec.unpack_from(packed), strict=True)) == values


def test_golden_headers() -> None:
    """Bytes as they were seen on a little-endian kernel."""
    header = Codec("fuse_in_header")
    assert header.fields == ["len", "opcode", "unique", "nodeid", "uid", "gid", "pid", "total_extlen"]
    golden = bytes.fromhex("30000000 24000000 0500000000000000 0100000000000000 e8030000 64000000 39300000 0000 0000")
    assert header.unpack_from(golden) == (48, 36, 5, 1, 1000, 100, 12345, 0)
    assert Codec("fuse_out_header").pack(16, -2, 4) == bytes.fromhex("10000000 feffffff 0400000000000000")


def test_opcodes() -> None:
    numbers = [number for number in range(1, 54) if number not in (7, 19)]
    assert sorted(abi.Opcode) == [*numbers, 4096]
    assert {name: int(abi.Opcode[name]) for name in ("LOOKUP", "INIT", "RENAME2", "STATX")} == {
        "LOOKUP": 1,
        "INIT": 26,
        "RENAME2": 45,
        "STATX": 52,
    }


def test_notification_codes() -> None:
    assert [code.name for code in abi.NotifyCode] == [
        "POLL",
        "INVAL_INODE",
        "INVAL_ENTRY",
        "STORE",
        "RETRIEVE",
        "DELETE",
        "RESEND",
        "INC_EPOCH",
        "PRUNE",
    ]
    assert list(abi.NotifyCode) == list(range(1, 10))


def test_init_flags_are_bits_0_to_42() -> None:
    assert sorted(int(flag) for flag in abi.InitFlag) == [1 << bit for bit in range(43)]
    assert abi.InitFlag.POSIX_ACL == 1 << 20
    assert abi.InitFlag.INIT_EXT == 1 << 30
    assert abi.InitFlag.REQUEST_TIMEOUT == 1 << 42


@pytest.mark.parametrize(
    ("enumeration", "values"),
    [
        (abi.OpenFlag, [1, 2, 4, 8, 16, 32, 64, 128]),
        (abi.SetAttrFlag, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]),
        (abi.GetAttrFlag, [1]),
        (abi.OpenInFlag, [1]),
        (abi.ReadFlag, [2]),
        (abi.WriteFlag, [1, 2, 4]),
        (abi.ReleaseFlag, [1, 2]),
        (abi.SyncFlag, [1]),
        (abi.LockFlag, [1]),
        (abi.SetXattrFlag, [1]),
        (abi.IoctlFlag, [1, 2, 4, 8, 16, 32]),
        (abi.PollFlag, [1]),
        (abi.AttrFlag, [1, 2]),
    ],
)
def test_flag_words(enumeration: type[abi.OpenFlag], values: list[int]) -> None:
    assert sorted(int(flag) for flag in enumeration) == values


def test_device_ioctls() -> None:
    assert abi.DEV_IOC_CLONE == 0x8004E500
    assert abi.DEV_IOC_BACKING_OPEN == 0x4010E501
    assert abi.DEV_IOC_BACKING_CLOSE == 0x4004E502
    assert abi.DEV_IOC_SYNC_INIT == 0xE503


def test_constants() -> None:
    assert (abi.KERNEL_MAJOR, abi.KERNEL_MINOR) == (7, 45)
    assert abi.ROOT_ID == 1
    assert abi.MIN_READ_BUFFER == 8192
    assert abi.UNIQUE_RESEND == 1 << 63
    assert abi.INVALID_UIDGID == 0xFFFFFFFF
    assert lib.FUSE_COMPAT_SETXATTR_IN_SIZE == 8
    assert lib.FUSE_EXT_GROUPS == 32
