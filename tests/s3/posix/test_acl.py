from rawfuse.testing.posix.test_acl import *  # noqa: F403
