from rawfuse.testing.posix.test_model import *  # noqa: F403
