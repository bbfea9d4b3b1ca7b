"""Builds the compiled modules ``rawfuse._kernel`` and ``rawfuse._fast``; everything else stands in pyproject.toml."""

from setuptools import Extension, setup

FAST = Extension(
    "rawfuse._fast",
    ["rawfuse/_fast.c"],
    depends=["rawfuse/_structs.cdef", "rawfuse/_replies.h", "rawfuse/_uring.h"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-cast-function-type"],
)

setup(cffi_modules=["rawfuse/_build.py:ffibuilder"], ext_modules=[FAST])
