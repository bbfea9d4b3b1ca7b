"""The cffi builder of ``rawfuse._kernel``: compiles ``_structs.cdef`` and the C helpers."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_STRUCTS = (_HERE / "_structs.cdef").read_text()
_HELPERS = (_HERE / "_helpers.c").read_text()

_INCLUDES = """
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>
"""

_SIGNATURES = """
long rawfuse_read(int fd, void *buffer, size_t size);
long rawfuse_read_soon(int fd, void *buffer, size_t size, long nanoseconds);
long rawfuse_write(int fd, const void *buffer, size_t size);
int rawfuse_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
int rawfuse_umount(const char *target, int flags);
int rawfuse_interrupt(unsigned long thread);
"""

ffibuilder = FFI()
ffibuilder.cdef(_STRUCTS + _SIGNATURES)
ffibuilder.set_source("rawfuse._kernel", _INCLUDES + _STRUCTS + _HELPERS, extra_compile_args=["-O2"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True, tmpdir=str(_HERE.parent))
