/* System calls whose failure is an ordinary answer here: they return -errno and raise no Python exception. */

static long rawfuse_read(int fd, void *buffer, size_t size)
{
    ssize_t n = read(fd, buffer, size);
    return n < 0 ? -errno : n;
}

static long rawfuse_write(int fd, const void *buffer, size_t size)
{
    ssize_t n = write(fd, buffer, size);
    return n < 0 ? -errno : n;
}

static int rawfuse_mount(const char *source, const char *target, const char *type, unsigned long flags,
                         const char *data)
{
    return mount(source, target, type, flags, data) < 0 ? -errno : 0;
}

static int rawfuse_umount(const char *target, int flags)
{
    return umount2(target, flags) < 0 ? -errno : 0;
}

/* Of the calling thread and those that it starts; CLONE_NEWUSER of a process with one thread only. */
static int rawfuse_unshare(int flags)
{
    return unshare(flags) < 0 ? -errno : 0;
}

static void rawfuse_wake_up(int signal)
{
    (void)signal;
}

/* Make a blocking system call of a thread return EINTR. SIGURG is ignored by default, so a handler is needed. */
static int rawfuse_interrupt(unsigned long thread)
{
    struct sigaction action = {.sa_handler = rawfuse_wake_up};
    sigaction(SIGURG, &action, NULL);
    return pthread_kill((pthread_t)thread, SIGURG);
}

/* As rawfuse_read on a non-blocking descriptor, but looks again for up to `nanoseconds` before it returns -EAGAIN. Who
 * else could run on this processor goes first: it may be the one who makes the next request. */
static long rawfuse_read_soon(int fd, void *buffer, size_t size, long nanoseconds)
{
    struct timespec start, now;
    ssize_t n = read(fd, buffer, size);
    if (n >= 0 || errno != EAGAIN)
        return n < 0 ? -errno : n;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        sched_yield();
        n = read(fd, buffer, size);
        if (n >= 0 || errno != EAGAIN)
            return n < 0 ? -errno : n;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < nanoseconds);
    return -EAGAIN;
}
