from rawfuse.testing.posix.test_statfs_times import *  # noqa: F403
