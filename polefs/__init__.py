"""polefs: a POSIX file system with names in a database and contents in an object store."""

__version__ = "0.1.0"
