from rawfuse.testing.posix.test_unlinked import *  # noqa: F403
