"""Benchmarks: ``bench.throughput`` (any directory), ``bench.compare`` (polefs beside its peers), ``bench.requests``."""
