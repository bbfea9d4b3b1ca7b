"""Fuzzing of rawfuse: ``python -m tests.fuzz``. Two targets take any bytes: the decoder, and a session that is fed
a hostile stream of requests through a socket pair. ``corpus`` keeps inputs that reach new code."""
