"""What POSIX and Linux promise of a file system, as tests that run on any mount.

pytest --pyargs rawfuse.testing.posix --fuse-server "python -m myfs {mountpoint}"
"""
