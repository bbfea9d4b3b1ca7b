"""One typed operation per opcode.

Every operation begins with ``unique`` (the request's id), ``nodeid`` (the inode it is about, or the parent directory of
its name) and the caller's ``uid``, ``gid`` (fsuid and fsgid) and ``pid``; INIT, RELEASE and written-back WRITEs carry
zeros there. The other fields are the protocol's, in its order. Times are nanoseconds since the epoch; sizes and offsets
are bytes; names are bytes without NUL.
"""

from __future__ import annotations

import msgspec

from rawfuse.wire import NO_EXTENSIONS, Extensions


class Op(msgspec.Struct, gc=False):
    """What all operations have."""

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int


class LookUpInode(Op, gc=False):
    """LOOKUP. Reply ``Entry``; nodeid 0 there is a negative entry that the kernel keeps for ``entry_ttl``. Each
    positive reply adds 1 to the lookup count of its nodeid."""

    name: bytes


class ForgetInode(Op, gc=False):
    """FORGET: the kernel gives back ``count`` look-ups of ``nodeid``. No reply."""

    count: int


class BatchForget(Op, gc=False):
    """BATCH_FORGET: many FORGETs, ``(nodeid, count)`` each. No reply."""

    forgets: list[tuple[int, int]]


class GetInodeAttributes(Op, gc=False):
    """GETATTR. Reply ``AttributesReply``. ``fh`` is valid when ``flags`` has ``GetAttrFlag.FH``."""

    flags: int
    fh: int


class SetInodeAttributes(Op, gc=False):
    """SETATTR. Reply ``AttributesReply``. ``valid`` (``SetAttrFlag``) tells which fields to set; with ATIME_NOW or
    MTIME_NOW the server's clock counts."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    mode: int
    new_uid: int
    new_gid: int


class ReadSymlink(Op, gc=False):
    """READLINK. Reply: the target, bytes without NUL."""


class CreateSymlink(Op, gc=False):
    """SYMLINK. Reply ``Entry``."""

    name: bytes
    target: bytes
    extensions: Extensions = NO_EXTENSIONS


class MkNode(Op, gc=False):
    """MKNOD: a regular file, fifo, socket or device. With DONT_MASK ``umask`` is the handler's to apply.
    Reply ``Entry``."""

    mode: int
    rdev: int
    umask: int
    name: bytes
    extensions: Extensions = NO_EXTENSIONS


class MkDir(Op, gc=False):
    """MKDIR. ``mode`` has the permission bits only. Reply ``Entry``."""

    mode: int
    umask: int
    name: bytes
    extensions: Extensions = NO_EXTENSIONS


class Unlink(Op, gc=False):
    """UNLINK. Reply None."""

    name: bytes


class RmDir(Op, gc=False):
    """RMDIR. Reply None."""

    name: bytes


class Rename(Op, gc=False):
    """RENAME and RENAME2. ``flags``: 0, RENAME_NOREPLACE 1, RENAME_EXCHANGE 2, RENAME_WHITEOUT 4. Reply None."""

    new_parent: int
    flags: int
    name: bytes
    new_name: bytes


class CreateLink(Op, gc=False):
    """LINK: ``nodeid`` is the new parent, ``ino`` the inode to link. Reply ``Entry``."""

    ino: int
    name: bytes


class OpenFile(Op, gc=False):
    """OPEN. ``flags``: open(2) flags without O_CREAT and O_EXCL; ``open_flags``: ``OpenInFlag``. Reply
    ``OpenedFile``."""

    flags: int
    open_flags: int


class ReadFile(Op, gc=False):
    """READ. Reply: at most ``size`` bytes as one buffer or a list of buffers; fewer mean the end of the file."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class WriteFile(Op, gc=False):
    """WRITE. ``data`` lies in the request's buffer and is valid until the handler returns. Reply: the number of bytes
    written."""

    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int
    data: memoryview


class StatFs(Op, gc=False):
    """STATFS. Reply ``FileSystemStatus``."""


class ReleaseFileHandle(Op, gc=False):
    """RELEASE, once per successful OPEN, CREATE or TMPFILE. Reply None; errors are ignored by the kernel."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class ReleaseDirHandle(ReleaseFileHandle, gc=False):
    """RELEASEDIR. Reply None."""


class SyncFile(Op, gc=False):
    """FSYNC. ``flags``: ``SyncFlag``. Reply None."""

    fh: int
    flags: int


class SyncDir(SyncFile, gc=False):
    """FSYNCDIR. Reply None."""


class SetXattr(Op, gc=False):
    """SETXATTR. ``flags``: XATTR_CREATE 1, XATTR_REPLACE 2; ``setxattr_flags``: ``SetXattrFlag``. Reply None."""

    flags: int
    setxattr_flags: int
    name: bytes
    value: bytes


class GetXattr(Op, gc=False):
    """GETXATTR. Reply: the value; the library answers a size request (``size`` 0) and ERANGE from it."""

    size: int
    name: bytes


class ListXattr(Op, gc=False):
    """LISTXATTR. Reply: list of names."""

    size: int


class RemoveXattr(Op, gc=False):
    """REMOVEXATTR. Reply None."""

    name: bytes


class FlushFile(Op, gc=False):
    """FLUSH, at every close of a descriptor. Reply None; its error reaches close(2)."""

    fh: int
    lock_owner: int


class Init(Op, gc=False):
    """INIT. Answered by the library."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    """All 64 bits, ``InitFlag``."""


class OpenDir(OpenFile, gc=False):
    """OPENDIR. Reply ``OpenedFile``."""


class ReadDir(Op, gc=False):
    """READDIR. ``offset`` is 0 or the cookie of the last entry seen. Reply ``DirectoryBuffer(op.size)``, empty at the
    end."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class ReadDirPlus(ReadDir, gc=False):
    """READDIRPLUS. Reply ``DirectoryPlusBuffer(op.size)``."""


class GetLock(Op, gc=False):
    """GETLK. Reply ``FileLock``: the first lock in the way, or type F_UNLCK. ``end`` is inclusive, 2**63 - 1 for the
    end of the file."""

    fh: int
    owner: int
    start: int
    end: int
    type: int
    lock_pid: int
    lock_flags: int


class SetLock(GetLock, gc=False):
    """SETLK and, with ``wait``, SETLKW. ``lock_flags``: ``LockFlag`` (flock(2)). Reply None; EAGAIN when it does not
    wait and another owner is in the way. A waiting one must be cancellable (INTERRUPT)."""

    wait: bool = False


class Access(Op, gc=False):
    """ACCESS (not sent with default_permissions). ``mask``: R_OK, W_OK, X_OK. Reply None."""

    mask: int


class CreateFile(Op, gc=False):
    """CREATE: make and open a regular file. Reply ``(Entry, OpenedFile)``."""

    flags: int
    mode: int
    umask: int
    open_flags: int
    name: bytes
    extensions: Extensions = NO_EXTENSIONS


class CreateTmpfile(CreateFile, gc=False):
    """TMPFILE: a file without a name in directory ``nodeid``; ``name`` means nothing. Reply ``(Entry, OpenedFile)``."""


class Interrupt(Op, gc=False):
    """INTERRUPT of request ``target``. Handled by the library."""

    target: int


class MapBlock(Op, gc=False):
    """BMAP (block devices only). Reply: the block number."""

    block: int
    blocksize: int


class Destroy(Op, gc=False):
    """DESTROY (block devices and virtiofs only; the library also calls the handler when the session ends). Reply
    None."""


class Ioctl(Op, gc=False):
    """IOCTL. ``flags``: ``IoctlFlag``; sizes follow from the command number. Reply ``IoctlResult`` with at most
    ``out_size`` bytes; exactly so many for FS_IOC_GETFLAGS and FS_IOC_FSGETXATTR, which chattr(1) needs both."""

    fh: int
    flags: int
    command: int
    argument: int
    out_size: int
    data: bytes


class Poll(Op, gc=False):
    """POLL. With ``PollFlag.SCHEDULE_NOTIFY`` remember ``kh`` and notify later. Reply: the ready events."""

    fh: int
    kh: int
    flags: int
    events: int


class NotifyReply(Op, gc=False):
    """NOTIFY_REPLY: the answer to a RETRIEVE notification, ``unique`` being that notification's. No reply."""

    offset: int
    data: bytes


class Fallocate(Op, gc=False):
    """FALLOCATE. ``mode``: FALLOC_FL_KEEP_SIZE 1, PUNCH_HOLE 2, ZERO_RANGE 16, combined as the kernel allows.
    Reply None."""

    fh: int
    offset: int
    length: int
    mode: int


class Seek(Op, gc=False):
    """LSEEK. ``whence``: SEEK_DATA 3 or SEEK_HOLE 4. Reply: the offset; ENXIO past the end."""

    fh: int
    offset: int
    whence: int


class CopyFileRange(Op, gc=False):
    """COPY_FILE_RANGE and COPY_FILE_RANGE_64. Reply: the number of bytes copied, less than ``length`` where it must."""

    fh_in: int
    offset_in: int
    nodeid_out: int
    fh_out: int
    offset_out: int
    length: int
    flags: int


class SetupMapping(Op, gc=False):
    """SETUPMAPPING (virtiofs DAX). Reply None."""

    fh: int
    offset: int
    length: int
    flags: int
    memory_offset: int


class RemoveMapping(Op, gc=False):
    """REMOVEMAPPING (virtiofs DAX): ``(memory_offset, length)`` each. Reply None."""

    mappings: list[tuple[int, int]]


class SyncFs(Op, gc=False):
    """SYNCFS (never sent to a plain FUSE mount by Linux 6.18). Reply None."""


class StatX(Op, gc=False):
    """STATX, sent when more than the basic fields is wanted. Reply ``AttributesReply``, whose btime counts then."""

    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int
