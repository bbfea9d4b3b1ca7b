"""The mounted file system: ``rawfuse.FileSystem`` over metadata and contents."""

from polefs.client.atime import AccessTimes
from polefs.client.filesystem import PoleFileSystem

__all__ = ["AccessTimes", "PoleFileSystem"]
