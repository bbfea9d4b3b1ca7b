"""Builds the compiled module ``rawfuse._kernel``; everything else stands in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["rawfuse/_build.py:ffibuilder"])
