from rawfuse.testing.posix.test_attributes import *  # noqa: F403
