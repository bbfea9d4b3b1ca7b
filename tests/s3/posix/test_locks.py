from rawfuse.testing.posix.test_locks import *  # noqa: F403
