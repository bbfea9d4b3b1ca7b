from rawfuse.testing.posix.test_errors import *  # noqa: F403
