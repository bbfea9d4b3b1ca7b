from rawfuse.testing.posix.test_xattr import *  # noqa: F403
