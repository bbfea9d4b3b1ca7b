"""The cffi builder of ``rawfuse._kernel``: compiles ``_structs.cdef`` and the C helpers."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_STRUCTS = (_HERE / "_structs.cdef").read_text()
_HELPERS = (_HERE / "_helpers.c").read_text()
_URING = (_HERE / "_uring.h").read_text()

_INCLUDES = """
#include <errno.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
"""

_SIGNATURES = """
long rawfuse_read(int fd, void *buffer, size_t size);
long rawfuse_read_soon(int fd, void *buffer, size_t size, long nanoseconds);
long rawfuse_write(int fd, const void *buffer, size_t size);
int rawfuse_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
int rawfuse_umount(const char *target, int flags);
int rawfuse_unshare(int flags);
int rawfuse_interrupt(unsigned long thread);

struct rawfuse_ring;
int rawfuse_ring_open(int device, unsigned queues, unsigned entries, size_t payload, struct rawfuse_ring **result);
void rawfuse_ring_close(struct rawfuse_ring *ring);
int rawfuse_ring_fd(const struct rawfuse_ring *ring);
void rawfuse_ring_wake(struct rawfuse_ring *ring);
int rawfuse_ring_sleep(struct rawfuse_ring *ring);
int rawfuse_ring_register(struct rawfuse_ring *ring, unsigned queue, char *memory, int idle);
int rawfuse_ring_short(const struct rawfuse_ring *ring, unsigned wanted);
int rawfuse_ring_may_wait(const struct rawfuse_ring *ring);
int64_t rawfuse_ring_next(struct rawfuse_ring *ring, long nanoseconds);
int rawfuse_ring_find(struct rawfuse_ring *ring, uint64_t unique);
int rawfuse_ring_commit(struct rawfuse_ring *ring, int index, const char *header, size_t size);
unsigned rawfuse_ring_held(const struct rawfuse_ring *ring);
int rawfuse_ring_flush(struct rawfuse_ring *ring);
"""

ffibuilder = FFI()
ffibuilder.cdef(_STRUCTS + _SIGNATURES)
ffibuilder.set_source("rawfuse._kernel", _INCLUDES + _STRUCTS + _HELPERS + _URING, extra_compile_args=["-O2"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True, tmpdir=str(_HERE.parent))
