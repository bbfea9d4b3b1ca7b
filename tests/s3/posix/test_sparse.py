from rawfuse.testing.posix.test_sparse import *  # noqa: F403
