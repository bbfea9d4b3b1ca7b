from rawfuse.testing.posix.test_permissions import *  # noqa: F403
