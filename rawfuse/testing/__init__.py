"""Tests of file systems on real mounts that cannot hang: a pytest plugin, and a suite of POSIX behaviour.

``rawfuse.testing.plugin`` has the fixtures, ``rawfuse.testing.posix`` the suite. Nothing here depends on how the file
system is made: a server is a command that mounts. docs/testing.md is the manual. The library itself never imports this
package; it needs pytest, and the suite hypothesis (``pip install polefs[testing]``).
"""
