from rawfuse.testing.posix.test_bigdirs import *  # noqa: F403
