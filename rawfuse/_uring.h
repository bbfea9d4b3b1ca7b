/* FUSE over io_uring (protocol 7.42): one ring that carries the entries of all queues.
 *
 * An entry is registered once with its header and its payload memory, and from then on is either armed (the kernel may
 * put a request into it) or holds a request; committing the reply arms it again. The kernel copies only in the thread
 * that made the ring and while that enters it (IORING_SETUP_DEFER_TASKRUN), so that thread must make all calls here,
 * and between them nothing changes.
 *
 * A request is laid out in the entry's memory as a read of /dev/fuse gives it: header, the operation's structure,
 * payload. The kernel fills the payload memory, which begins RING_LEAD bytes into the entry's memory: where the payload
 * of a WRITE belongs. That of an operation with a structure of another size is moved. */

enum {
    RING_SUBMISSIONS = 64,
    RING_LEAD = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in),
    RING_NO_ENTRY = 1 << 24,
};

struct ring_entry {
    struct fuse_uring_req_header header;
    struct iovec memory[2];
    uint64_t unique; /* of the request that it holds; 0: armed */
    uint16_t queue;
    uint8_t used;
};

struct rawfuse_ring {
    int fd, device, event;
    size_t payload;
    unsigned queues;
    struct {
        unsigned armed, used; /* all that are armed, and those of them that have been used */
    } *queue;
    unsigned entries_used, latest, held; /* entries, the one of the latest request, those that hold one */
    struct ring_entry *entries;
    unsigned queued; /* submissions that the kernel has not seen */
    unsigned *sq_tail, *sq_flags, sq_mask;
    char *sqes;
    unsigned *cq_head, *cq_tail, *cq_flags, cq_mask;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_size;
};

static inline int ring_enter(struct rawfuse_ring *ring, unsigned wanted)
{
    long done;
    do
        done = syscall(SYS_io_uring_enter, ring->fd, ring->queued, wanted, IORING_ENTER_GETEVENTS, NULL, 0);
    while (done < 0 && errno == EINTR);
    if (done < 0)
        return -errno;
    ring->queued -= done;
    return 0;
}

/* The next submission, zeroed; the queue is emptied first when it is full. NULL with errno. */
static inline struct io_uring_sqe *ring_submission(struct rawfuse_ring *ring, unsigned index)
{
    const unsigned tail = *ring->sq_tail;
    struct io_uring_sqe *sqe = (struct io_uring_sqe *)(ring->sqes + (tail & ring->sq_mask) * 2 * sizeof(*sqe));
    int error = ring->queued == RING_SUBMISSIONS ? ring_enter(ring, 0) : 0;
    if (error < 0 || ring->queued == RING_SUBMISSIONS) {
        errno = error < 0 ? -error : EBUSY;
        return NULL;
    }
    memset(sqe, 0, 2 * sizeof(*sqe));
    sqe->user_data = index;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->queued++;
    return sqe;
}

static inline int ring_command(struct rawfuse_ring *ring, unsigned index, unsigned command)
{
    struct ring_entry *entry = &ring->entries[index];
    const struct fuse_uring_cmd_req request = {.commit_id = entry->unique, .qid = entry->queue};
    struct io_uring_sqe *sqe = ring_submission(ring, index);
    if (!sqe)
        return -errno;
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = ring->device;
    sqe->cmd_op = command;
    if (command == FUSE_IO_URING_CMD_REGISTER) {
        sqe->addr = (uintptr_t)entry->memory;
        sqe->len = 2;
    }
    memcpy(sqe->cmd, &request, sizeof(request));
    ring->held -= entry->unique != 0;
    entry->unique = 0;
    ring->queue[entry->queue].armed++;
    ring->queue[entry->queue].used += entry->used;
    return 0;
}

static inline void rawfuse_ring_close(struct rawfuse_ring *ring)
{
    if (ring->sqes)
        munmap(ring->sqes, RING_SUBMISSIONS * 2 * sizeof(struct io_uring_sqe));
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    if (ring->fd >= 0)
        close(ring->fd);
    if (ring->event >= 0)
        close(ring->event);
    free(ring->entries);
    free(ring->queue);
    free(ring);
}

static inline void *ring_map(struct rawfuse_ring *ring, size_t size, off_t what)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, what);
    return memory == MAP_FAILED ? NULL : memory;
}

static inline int ring_set_up(struct rawfuse_ring *ring, unsigned entries)
{
    struct io_uring_params params = {
        .flags = IORING_SETUP_SQE128 | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                 IORING_SETUP_TASKRUN_FLAG,
        .cq_entries = entries < RING_SUBMISSIONS ? RING_SUBMISSIONS : entries,
    };
    size_t submissions_size;
    char *rings;
    unsigned *array;
    ring->fd = syscall(SYS_io_uring_setup, RING_SUBMISSIONS, &params);
    if (ring->fd < 0)
        return -errno;
    submissions_size = params.sq_off.array + params.sq_entries * sizeof(*array);
    ring->rings_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    if (ring->rings_size < submissions_size)
        ring->rings_size = submissions_size;
    rings = ring->rings = ring_map(ring, ring->rings_size, IORING_OFF_SQ_RING);
    if (!rings)
        return -errno;
    ring->sqes = ring_map(ring, RING_SUBMISSIONS * 2 * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
    if (!ring->sqes)
        return -errno;
    ring->sq_tail = (unsigned *)(rings + params.sq_off.tail);
    ring->sq_flags = (unsigned *)(rings + params.sq_off.flags);
    ring->sq_mask = *(unsigned *)(rings + params.sq_off.ring_mask);
    ring->cq_head = (unsigned *)(rings + params.cq_off.head);
    ring->cq_tail = (unsigned *)(rings + params.cq_off.tail);
    ring->cq_flags = (unsigned *)(rings + params.cq_off.flags);
    ring->cq_mask = *(unsigned *)(rings + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    array = (unsigned *)(rings + params.sq_off.array);
    for (unsigned i = 0; i < RING_SUBMISSIONS; i++)
        array[i] = i;
    /* Work that waits for its thread (IORING_SETUP_DEFER_TASKRUN) shows on an eventfd, but not on the ring's own
     * descriptor. */
    ring->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ring->event < 0 || syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_EVENTFD, &ring->event, 1) < 0)
        return -errno;
    return 0;
}

/* The request that has come into an entry, as a read of /dev/fuse would give it. Its length. */
static inline int ring_request(struct ring_entry *entry)
{
    const size_t size = entry->header.ring_ent_in_out.payload_sz;
    char *payload = entry->memory[1].iov_base, *arguments = payload - RING_LEAD + sizeof(struct fuse_in_header);
    struct fuse_in_header in;
    size_t operation;
    memcpy(&in, entry->header.in_out, sizeof(in));
    memcpy(payload - RING_LEAD, &in, sizeof(in));
    operation = in.len - sizeof(in) - size;
    if (operation > sizeof(entry->header.op_in))
        return sizeof(in); /* no such thing is known; it is not as long as it says */
    if (arguments + operation != payload)
        memmove(arguments + operation, payload, size);
    memcpy(arguments, entry->header.op_in, operation);
    return in.len;
}

/* What has completed: the index of an entry << 32 | the length of the request in it; -(index + 1 << 16 | errno) for an
 * entry that the kernel has given up; 0 for nothing. */
static inline int64_t ring_completion(struct rawfuse_ring *ring)
{
    unsigned head = *ring->cq_head;
    const unsigned tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    while (head != tail) {
        const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
        const uint64_t index = cqe->user_data;
        struct ring_entry *entry;
        int result = cqe->res;
        __atomic_store_n(ring->cq_head, ++head, __ATOMIC_RELEASE);
        if (index == RING_NO_ENTRY)
            continue;
        entry = &ring->entries[index];
        ring->queue[entry->queue].armed--;
        ring->queue[entry->queue].used -= entry->used;
        if (result == 0) {
            entry->used = 1;
            entry->unique = entry->header.ring_ent_in_out.commit_id;
            ring->held++;
            ring->latest = index;
            result = ring_request(entry);
        }
        return result < 0 ? -(int64_t)((index + 1) << 16 | -result) : (int64_t)(index << 32 | result);
    }
    return 0;
}

/* One operation that does nothing: who allows io_uring_setup may still forbid io_uring_enter (seccomp). */
static inline int ring_try(struct rawfuse_ring *ring)
{
    if (!ring_submission(ring, RING_NO_ENTRY))
        return -errno;
    return ring_enter(ring, 1);
}

/* A ring with room for `entries` entries of `payload` bytes each in `queues` queues; -errno where there can be none. */
static inline int rawfuse_ring_open(int device, unsigned queues, unsigned entries, size_t payload,
                                    struct rawfuse_ring **result)
{
    struct rawfuse_ring *ring = calloc(1, sizeof(*ring));
    int error;
    if (!ring)
        return -ENOMEM;
    ring->fd = ring->event = -1;
    ring->device = device;
    ring->queues = queues;
    ring->payload = payload;
    ring->queue = calloc(queues, sizeof(*ring->queue));
    ring->entries = calloc(entries, sizeof(*ring->entries));
    error = ring->queue && ring->entries ? ring_set_up(ring, entries) : -ENOMEM;
    if (error == 0)
        error = ring_try(ring);
    if (error < 0)
        rawfuse_ring_close(ring);
    else
        *result = ring;
    return error;
}

/* What an event loop polls: readable when the kernel has something for us, between rawfuse_ring_sleep and
 * rawfuse_ring_wake. */
static inline int rawfuse_ring_fd(const struct rawfuse_ring *ring)
{
    return ring->event;
}

static inline void rawfuse_ring_wake(struct rawfuse_ring *ring)
{
    uint64_t count;
    __atomic_store_n(ring->cq_flags, IORING_CQ_EVENTFD_DISABLED, __ATOMIC_RELAXED);
    (void)!read(ring->event, &count, sizeof(count));
}

/* Flush, and have the descriptor tell when there is more. Not 0: there is more already, so do not wait. */
static inline int rawfuse_ring_sleep(struct rawfuse_ring *ring)
{
    int error = ring->queued ? ring_enter(ring, 0) : 0;
    __atomic_store_n(ring->cq_flags, 0, __ATOMIC_SEQ_CST);
    return error < 0 || *ring->cq_head != __atomic_load_n(ring->cq_tail, __ATOMIC_SEQ_CST) ||
           __atomic_load_n(ring->sq_flags, __ATOMIC_SEQ_CST) & IORING_SQ_TASKRUN;
}

/* Register one more entry. `memory` has room for RING_LEAD bytes and the payload, and for RING_LEAD more to move a
 * payload up. `idle`: no request waits for an entry of the queue. The entry's index, or -errno. */
static inline int rawfuse_ring_register(struct rawfuse_ring *ring, unsigned queue, char *memory, int idle)
{
    const unsigned index = ring->entries_used;
    struct ring_entry *entry = &ring->entries[index];
    int error;
    entry->queue = queue;
    entry->used = idle;
    entry->memory[0] = (struct iovec){&entry->header, sizeof(entry->header)};
    entry->memory[1] = (struct iovec){memory + RING_LEAD, ring->payload};
    error = ring_command(ring, index, FUSE_IO_URING_CMD_REGISTER);
    if (error == 0)
        error = ring_enter(ring, 0);
    if (error < 0)
        return error;
    /* A refusal stands in the completion queue by now; behind it there may be requests. */
    for (unsigned head = *ring->cq_head; head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE); head++) {
        struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
        if (cqe->user_data == index && cqe->res < 0) {
            cqe->user_data = RING_NO_ENTRY;
            ring->queue[queue].armed--;
            ring->queue[queue].used -= entry->used;
            return cqe->res;
        }
    }
    ring->entries_used++;
    return index;
}

/* A queue with less than `wanted` armed entries, or -1. */
static inline int rawfuse_ring_short(const struct rawfuse_ring *ring, unsigned wanted)
{
    for (unsigned queue = 0; queue < ring->queues; queue++)
        if (ring->queue[queue].armed < wanted)
            return queue;
    return -1;
}

/* Whether the latest request may wait for one behind it. A request that found no armed entry is put into one when a
 * reply is committed in its queue, but not when an entry is registered. So one used entry has to be armed: then no
 * request waits, or (it has completed already) its own reply will see to that. */
static inline int rawfuse_ring_may_wait(const struct rawfuse_ring *ring)
{
    return ring->queue[ring->entries[ring->latest].queue].used > 0;
}

/* The entry that holds request `unique`, or -ENOENT. */
static inline int rawfuse_ring_find(struct rawfuse_ring *ring, uint64_t unique)
{
    if (ring->entries[ring->latest].unique == unique)
        return ring->latest;
    for (unsigned index = 0; index < ring->entries_used; index++)
        if (ring->entries[index].unique == unique)
            return index;
    return -ENOENT;
}

/* The request in an entry. */
static inline char *rawfuse_ring_message(const struct rawfuse_ring *ring, unsigned index)
{
    return (char *)ring->entries[index].memory[1].iov_base - RING_LEAD;
}

/* Queue a reply whose body, `size` bytes, lies in the payload memory of the entry. */
static inline int rawfuse_ring_commit(struct rawfuse_ring *ring, int index, const void *header, size_t size)
{
    struct ring_entry *entry = &ring->entries[index];
    memcpy(entry->header.in_out, header, sizeof(struct fuse_out_header));
    entry->header.ring_ent_in_out.payload_sz = size;
    return ring_command(ring, index, FUSE_IO_URING_CMD_COMMIT_AND_FETCH);
}

/* Queue a reply. ENOENT: no entry holds the request; EINVAL: the reply is too long. */
static inline int rawfuse_ring_reply(struct rawfuse_ring *ring, uint64_t unique, const void *header, const void *body,
                                     size_t size)
{
    const int index = rawfuse_ring_find(ring, unique);
    if (index < 0)
        return index;
    if (size > ring->payload)
        return -EINVAL;
    memcpy(ring->entries[index].memory[1].iov_base, body, size);
    return rawfuse_ring_commit(ring, index, header, size);
}

/* Entries that hold a request, besides those whose requests have not been taken yet. */
static inline unsigned rawfuse_ring_held(const struct rawfuse_ring *ring)
{
    return ring->held;
}

/* Give the kernel what is queued, and have it fill entries. */
static inline int rawfuse_ring_flush(struct rawfuse_ring *ring)
{
    return ring_enter(ring, 0);
}

/* As ring_completion, or -errno of io_uring_enter. Where there is nothing, flush and look again for `nanoseconds`. Who
 * else could run on this processor goes first: it may be the one who makes the next request. */
static inline int64_t rawfuse_ring_next(struct rawfuse_ring *ring, long nanoseconds)
{
    struct timespec start = {0}, now = {0};
    int64_t found = ring_completion(ring);
    int error;
    while (found == 0) {
        if (ring->queued || __atomic_load_n(ring->sq_flags, __ATOMIC_ACQUIRE) & IORING_SQ_TASKRUN) {
            error = ring_enter(ring, 0);
            found = error < 0 ? error : ring_completion(ring);
        } else if (nanoseconds <= 0 ||
                   (now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec >= nanoseconds) {
            break;
        } else {
            if (start.tv_sec == 0)
                clock_gettime(CLOCK_MONOTONIC, &start);
            sched_yield();
            clock_gettime(CLOCK_MONOTONIC, &now);
        }
    }
    return found;
}
