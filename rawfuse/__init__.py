"""rawfuse: file systems in Python on the raw ``/dev/fuse`` protocol, without a FUSE library."""

from rawfuse import ops
from rawfuse.abi import InitFlag, Opcode, OpenFlag, SetAttrFlag
from rawfuse.errors import FuseError, ProtocolError
from rawfuse.filesystem import FileSystem
from rawfuse.mount import MountOptions
from rawfuse.negotiate import Settings
from rawfuse.replies import (
    FOREVER,
    SECOND,
    Attributes,
    AttributesReply,
    DirectoryBuffer,
    DirectoryPlusBuffer,
    Entry,
    FileLock,
    FileSystemStatus,
    IoctlResult,
    OpenedFile,
)
from rawfuse.serving import run, serve
from rawfuse.session import Session

__all__ = [
    "FOREVER",
    "SECOND",
    "Attributes",
    "AttributesReply",
    "DirectoryBuffer",
    "DirectoryPlusBuffer",
    "Entry",
    "FileLock",
    "FileSystem",
    "FileSystemStatus",
    "FuseError",
    "InitFlag",
    "IoctlResult",
    "MountOptions",
    "Opcode",
    "OpenFlag",
    "OpenedFile",
    "ProtocolError",
    "Session",
    "SetAttrFlag",
    "Settings",
    "ops",
    "run",
    "serve",
]
