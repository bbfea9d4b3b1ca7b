"""A volume directory: its layout, how it is made, and the refusals of what cannot be one.

::

    volume.json    format, name, uuid: written last when a volume is made, so it is whole when this file exists
    lock           held while the volume is mounted or checked
    meta.db        metadata (SQLite), with its -wal and -shm
    objects/       contents: immutable objects, unless they are in a bucket of S3
    local/         contents not yet written back, and their journal
    cache/         contents of a bucket that have been read or written here, unless they are cached elsewhere
    control.sock   the daemon of a mounted volume
    log/           polefs.log, rotated
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Literal
from uuid import uuid4

import msgspec

from polefs.data.keys import WrappedKey, new_key
from polefs.node.errors import Refusal
from polefs.node.lock import Holder, Locked, VolumeLock, lock_holder
from polefs.objects.localio import replace_file, sync_directory
from polefs.objects.location import DirectoryLocation, Location, S3Location

FORMAT = 1
"""The format of the volume directory that this software writes; it reads no newer one."""

_UNFINISHED = "volume.json.new"
"""Stands in the directory while a volume is being made, says what is to be made, and becomes ``volume.json``. Without
it a directory that lacks ``volume.json`` is never taken for an interrupted creation, so a damaged volume is not made
anew over its contents."""

_DIRECTORIES = ("objects", "local", "log")
_METADATA = ("meta.db", "meta.db-wal", "meta.db-shm", "meta.db-journal", "meta.db-redo")

_OWN_NAMES = frozenset([_UNFINISHED, f"{_UNFINISHED}.new", "lock", *_METADATA, *_DIRECTORIES])
"""What an interrupted creation may have left behind."""

_IGNORED_NAMES = frozenset(["lost+found"])
"""What stands in the root directory of a fresh disk."""


Compression = Literal["none", "zstd", "lz4"]
Durability = Literal["s3", "local"]


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how a volume keeps the contents of files."""

    objects: Location = DirectoryLocation()
    compression: Compression = "none"
    key: WrappedKey | None = None
    """The key that encrypts them; None: they are not encrypted."""
    durability: Durability = "local"
    """What fsync waits for: ``s3``, that contents are in the bucket and committed; ``local``, that they are on the disk
    of this machine."""
    grace: float = 0.0
    """Seconds that objects are kept which nothing refers to any more."""


_LOCAL = Contents()


class VolumeInfo(msgspec.Struct, frozen=True):
    """The contents of ``volume.json``."""

    format: int
    name: str
    uuid: str
    contents: Contents = _LOCAL


class Volume:
    """A volume that exists, and the paths of its parts. ``path`` is absolute and without symbolic links."""

    def __init__(self, path: str, info: VolumeInfo, lock: VolumeLock | None = None) -> None:
        self.path = path
        self.info = info
        self.meta = os.path.join(path, "meta.db")
        self.objects = os.path.join(path, "objects")
        self.local = os.path.join(path, "local")
        self.cache = os.path.join(path, "cache")
        self.log_file = os.path.join(path, "log", "polefs.log")
        self._lock = lock

    @property
    def bucket(self) -> S3Location | None:
        """Where contents are, if not in the directory."""
        location = self.info.contents.objects
        return location if isinstance(location, S3Location) else None

    def lock(self, holder: Holder) -> None:
        """Take the volume's lock. ``Refusal`` EBUSY says who has it; EACCES, EROFS: not ours to write."""
        self._lock = _take_lock(self.path, holder)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def default_volume() -> str:
    """``$XDG_DATA_HOME/polefs/default`` (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/share")
    return os.path.join(base, "polefs", "default")


def open_volume(path: str) -> Volume:
    """An existing volume, not locked. ``Refusal``: ENOENT, ENOTDIR, EINVAL (no volume, or a damaged one), EPROTO (of a
    newer format), EACCES."""
    path = os.path.realpath(path)
    file = os.path.join(path, "volume.json")
    try:
        with open(file, "rb") as stream:
            info = msgspec.json.decode(stream.read())
    except FileNotFoundError:
        if os.path.isdir(path):
            raise Refusal(errno.EINVAL, f"{path} is no polefs volume: make one with polefs format {path}") from None
        raise Refusal(errno.ENOENT, f"there is no volume {path}: make one with polefs format {path}") from None
    except NotADirectoryError:
        raise Refusal(errno.ENOTDIR, f"volume {path} is not a directory: give the directory of a volume") from None
    except msgspec.DecodeError as error:
        raise Refusal(errno.EINVAL, f"{file} is damaged ({error}): restore it from a copy") from None
    except OSError as error:
        raise _unusable(path, error) from None
    version = info.get("format") if isinstance(info, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise Refusal(
            errno.EPROTO, f"volume {path} has format {version}, this polefs reads up to {FORMAT}: upgrade polefs"
        )
    try:
        return Volume(path, msgspec.convert(info, VolumeInfo))
    except msgspec.ValidationError as error:
        raise Refusal(errno.EINVAL, f"{file} is damaged ({error}): restore it from a copy") from None


def open_or_make_volume(path: str, holder: Holder) -> Volume:
    """The volume, locked; made first when the directory is empty or does not exist. ``Refusal`` EINVAL when it was to
    become one in a bucket, and that has failed."""
    if not os.path.exists(os.path.join(path, "volume.json")) and not _has_foreign_files(path):
        unfinished = _read_unfinished(path)
        if unfinished is not None and isinstance(unfinished.contents.objects, S3Location):
            raise Refusal(
                errno.EINVAL,
                f"volume {path} was to keep its contents in {unfinished.contents.objects.url}, and could not be made: "
                "run polefs format --store again",
            )
        try:
            return make_volume(path, holder)
        except Refusal as error:
            if error.errno != errno.EEXIST:
                raise
    volume = open_volume(path)
    volume.lock(holder)
    return volume


def make_volume(
    path: str,
    holder: Holder,
    *,
    name: str | None = None,
    bytes_limit: int = 0,
    inodes_limit: int = 0,
    contents: Contents = _LOCAL,
    secret: bytes | None = None,
) -> Volume:
    """Make a volume and return it locked. Limits of 0 mean none; with a ``secret`` contents are encrypted. Must not be
    called on an event loop. ``Refusal``: EEXIST when it is a volume already, ENOTEMPTY, ENOTDIR, EACCES, EROFS, ENOSPC,
    EBUSY (somebody else is making it); and when the place of the objects cannot be used."""
    path = os.path.realpath(path)
    if name is None:
        name = os.path.basename(path) or "polefs"
    lock = _begin(path, holder)
    try:
        if secret is not None:
            contents = msgspec.structs.replace(contents, key=new_key(secret))
        return Volume(path, _fill(path, name, bytes_limit, inodes_limit, contents), lock)
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError) and not isinstance(error, Refusal):
            raise _unusable(path, error) from None
        raise


def restore_volume(path: str, holder: Holder, info: VolumeInfo, build: Callable[[Volume], None]) -> Volume:
    """Make a volume that has been before, and return it locked. ``build`` makes its database; its objects are where
    they were. After a failure nothing is left of it. ``Refusal`` as of ``make_volume``, and what ``build`` raises."""
    path = os.path.realpath(path)
    existed = os.path.isdir(path)
    lock = _begin(path, holder)
    volume = Volume(path, info, lock)
    try:
        try:
            earlier = _read_unfinished(path)
            if earlier is not None and earlier.uuid != info.uuid:
                raise Refusal(
                    errno.ENOTEMPTY, f"{path} was to become another volume ({earlier.uuid}): give a new directory"
                )
            _lay_out(path, info)
        except Refusal:
            raise
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            build(volume)
            _finish(path)
        except BaseException:
            _clear(path)
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, _UNFINISHED))
            raise
    except BaseException:
        volume.unlock()
        if not existed:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, "lock"))
                os.rmdir(path)
        raise
    return volume


def is_encrypted(path: str) -> bool:
    """Whether a volume needs a secret. False also for what is no volume, or none that can be opened."""
    try:
        return open_volume(path).info.contents.key is not None
    except Refusal:
        return False


def is_locked(path: str) -> bool:
    """Whether a process works on the volume now. False for what is no volume or not ours to read."""
    try:
        return lock_holder(os.path.join(path, "lock"))[0]
    except OSError:
        return False


def _fill(path: str, name: str, bytes_limit: int, inodes_limit: int, contents: Contents) -> VolumeInfo:
    """All parts of a new volume, durable; ``volume.json`` last."""
    from polefs.node.storage import claim_objects, make_store

    # An earlier attempt may have marked the bucket as this volume's.
    earlier = _read_unfinished(path)
    info = VolumeInfo(FORMAT, name, str(uuid4()) if earlier is None else earlier.uuid, contents)
    _lay_out(path, info)
    meta = os.path.join(path, "meta.db")
    make_store(meta, name=name, uuid=info.uuid, bytes_limit=bytes_limit, inodes_limit=inodes_limit)
    try:
        info = msgspec.structs.replace(info, contents=claim_objects(contents, name, info.uuid))
    except Refusal:
        _clear(path)
        raise
    _describe(os.path.join(path, _UNFINISHED), info)
    _finish(path)
    return info


def _begin(path: str, holder: Holder) -> VolumeLock:
    """The directory of a volume that is to be made, with its lock."""
    if _has_foreign_files(path):
        if os.path.lexists(os.path.join(path, "volume.json")):
            raise Refusal(
                errno.EEXIST, f"{path} is a polefs volume already: give another directory, or remove it first"
            )
        raise Refusal(errno.ENOTEMPTY, f"{path} is not empty and is no polefs volume: give an empty or a new directory")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        lock = _take_lock(path, holder)
    except Refusal:
        raise
    except OSError as error:
        raise _unusable(path, error) from None
    if os.path.lexists(os.path.join(path, "volume.json")):
        lock.release()
        raise Refusal(errno.EEXIST, f"{path} has just been made a volume by another process: try again")
    return lock


def _lay_out(path: str, info: VolumeInfo) -> None:
    """Say what is to be made, and make its directories."""
    unfinished = os.path.join(path, _UNFINISHED)
    os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _describe(unfinished, info)
    _remove_metadata(path)
    for directory in _DIRECTORIES:
        os.makedirs(os.path.join(path, directory), mode=0o700, exist_ok=True)


def _finish(path: str) -> None:
    os.rename(os.path.join(path, _UNFINISHED), os.path.join(path, "volume.json"))
    sync_directory(path)


def _describe(file: str, info: VolumeInfo) -> None:
    replace_file(file, msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")


def _read_unfinished(path: str) -> VolumeInfo | None:
    """What an interrupted creation was to make; None when there was none, or it had not come so far."""
    try:
        with open(os.path.join(path, _UNFINISHED), "rb") as stream:
            return msgspec.json.decode(stream.read(), type=VolumeInfo)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    except OSError as error:
        raise _unusable(path, error) from None


def _remove_metadata(path: str) -> None:
    for name in _METADATA:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, name))


def _clear(path: str) -> None:
    """Take away what has been made of a volume that cannot be finished, but for the description of what was to be: it
    keeps a mount from making another."""
    _remove_metadata(path)
    for directory in _DIRECTORIES:
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(path, directory))


def _has_foreign_files(path: str) -> bool:
    """Whether a directory holds anything that an interrupted creation would not have left. One that does not exist or
    cannot be read holds nothing."""
    try:
        names = set(os.listdir(path)) - _IGNORED_NAMES
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(path, error) from None
    if _UNFINISHED in names:
        return not names <= _OWN_NAMES
    return not names <= {"lock"}


def _take_lock(path: str, holder: Holder) -> VolumeLock:
    try:
        return VolumeLock(os.path.join(path, "lock"), holder)
    except Locked as error:
        raise Refusal(errno.EBUSY, _who(path, error.holder)) from None
    except OSError as error:
        raise _unusable(path, error) from None


def _who(path: str, holder: Holder | None) -> str:
    if holder is None:
        return f"volume {path} is in use by another process: try again when that has ended"
    if holder.doing == "mount":
        return (
            f"volume {path} is mounted on {holder.mountpoint} by process {holder.pid}: unmount it first "
            f"(polefs umount {holder.mountpoint})"
        )
    what = {"check": "checked", "gc": "rid of garbage", "dump": "dumped"}.get(holder.doing, "made")
    return f"volume {path} is being {what} by process {holder.pid}: try again when that has ended"


def _unusable(path: str, error: OSError) -> Refusal:
    if error.errno == errno.ENOTDIR or (error.errno == errno.EEXIST and not os.path.isdir(path)):
        return Refusal(errno.ENOTDIR, f"volume {path} is not a directory: give the directory of a volume, or a new one")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Refusal(
            error.errno, f"cannot write to volume {path}: {error.strerror}: give a directory that you may write to"
        )
    return Refusal(error.errno or errno.EIO, f"cannot use volume {path}: {error.strerror or error}")
