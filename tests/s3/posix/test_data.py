from rawfuse.testing.posix.test_data import *  # noqa: F403
