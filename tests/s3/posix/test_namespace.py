from rawfuse.testing.posix.test_namespace import *  # noqa: F403
