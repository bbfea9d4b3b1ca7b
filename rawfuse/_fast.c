/* The hot path: requests of /dev/fuse that are served without any Python but the file system's handler.
 *
 * FastPath.run reads a request, checks and decodes it, runs the handler's first step and writes the reply, again and
 * again. It knows fixed structures with a name or data behind them, and the common replies. Whatever else there is it
 * leaves to the Python code, which says what is right for all of it: a request that has another form is handed back
 * before anything was done for it; a handler that waits, an error that is no plain OSError, a result that has no simple
 * encoding and a reply that the kernel refused go to the dispatcher.
 *
 * Layouts come from _structs.cdef: compiled in for replies, as offsets computed by wire.Codec for requests. Nothing of
 * a request is looked at in the buffer once Python code has run: handlers may have it exchanged for another one. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_structs.cdef"

enum {
    OPCODES = 64,
    MOST_FIELDS = 12,
    ORIGIN = 5,              /* unique, nodeid, uid, gid, pid */
    WITHOUT_LOCK = 64 << 10, /* bytes from which on a reply is written with the interpreter lock released */
    SECOND = 1000000000,
};

/* What stands behind the structure of a request, and what is replied. */
enum tail { TAIL_NOTHING, TAIL_NAME, TAIL_DATA };
enum reply { REPLY_NONE, REPLY_EMPTY, REPLY_ENTRY, REPLY_ATTRIBUTES, REPLY_OPENED, REPLY_CREATED, REPLY_COUNT,
             REPLY_DATA, REPLY_OTHER };

struct place {
    uint16_t offset, size;
};

/* How an opcode is served. */
struct plan {
    PyObject *row, *op_type, *handler; /* NULL: not here */
    uint16_t size;                     /* of the structure behind the header */
    uint8_t fields, tail, reply;
    int8_t asked;                      /* the field that bounds REPLY_DATA; -1: none does */
    struct place places[MOST_FIELDS];
};

typedef struct {
    PyObject_HEAD
    int fd;
    int left;               /* requests until run returns */
    unsigned int in_place;  /* data of a WRITE above this size are not copied */
    bool running;           /* run is on the stack */
    bool reading;           /* without the interpreter lock */
    bool entered;           /* asyncio.current_task() is `task` */
    Py_buffer buffer;
    PyObject *view;         /* the memoryview of it */
    PyObject *server, *channel, *loop;
    PyObject *waiting;      /* requests in flight, by their ids */
    PyObject *task;         /* of first steps, made by server.new_task; a handler that waits keeps it */
    struct plan plans[OPCODES];
} FastPath;

static PyObject *enter, *leave; /* asyncio.tasks._enter_task, _leave_task */

/* Slots of Python objects */

enum { ATTR_INO, ATTR_MODE, ATTR_NLINK, ATTR_UID, ATTR_GID, ATTR_SIZE, ATTR_BLOCKS, ATTR_ATIME, ATTR_MTIME, ATTR_CTIME,
       ATTR_RDEV, ATTR_BLKSIZE, ATTR_FLAGS, MOST_SLOTS };
enum { ENTRY_NODEID, ENTRY_ATTRIBUTES, ENTRY_TTL, ENTRY_ATTR_TTL, ENTRY_GENERATION };
enum { REPLY_ATTRS, REPLY_ATTR_TTL };
enum { OPENED_FH, OPENED_FLAGS, OPENED_BACKING_ID };
enum { RUNNING_TOUCHED };

struct layout {
    const char *name;
    const char *slots[MOST_SLOTS + 1];
    PyTypeObject *type;
    Py_ssize_t offsets[MOST_SLOTS];
};

static struct layout attributes = { "Attributes", { "ino", "mode", "nlink", "uid", "gid", "size", "blocks", "atime",
                                                    "mtime", "ctime", "rdev", "blksize", "flags" } };
static struct layout entry = { "Entry", { "nodeid", "attributes", "entry_ttl", "attr_ttl", "generation" } };
static struct layout attributes_reply = { "AttributesReply", { "attributes", "attr_ttl" } };
static struct layout opened_file = { "OpenedFile", { "fh", "flags", "backing_id" } };
static struct layout running = { "Running", { "touched" } };

/* Where a class with __slots__ keeps one of them in its objects; -1 with an exception when it has no such slot. */
static Py_ssize_t slot_offset(PyTypeObject *type, const char *name)
{
    PyObject *descriptor = PyObject_GetAttrString((PyObject *)type, name);
    Py_ssize_t offset = -1;
    if (descriptor == NULL)
        return -1;
    if (Py_IS_TYPE(descriptor, &PyMemberDescr_Type) && PyType_IsSubtype(type, PyDescr_TYPE(descriptor)) &&
        ((PyMemberDescrObject *)descriptor)->d_member->type == T_OBJECT_EX)
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    else
        PyErr_Format(PyExc_TypeError, "%s.%s is no slot", type->tp_name, name);
    Py_DECREF(descriptor);
    return offset;
}

static bool find_layout(struct layout *layout, const char *module_name)
{
    PyObject *module = PyImport_ImportModule(module_name);
    if (module == NULL)
        return false;
    layout->type = (PyTypeObject *)PyObject_GetAttrString(module, layout->name);
    Py_DECREF(module);
    if (layout->type == NULL)
        return false;
    for (int i = 0; layout->slots[i] != NULL; i++)
        if ((layout->offsets[i] = slot_offset(layout->type, layout->slots[i])) < 0)
            return false;
    return true;
}

/* A borrowed reference; NULL when the slot has been deleted. */
static inline PyObject *slot(PyObject *object, const struct layout *layout, int index)
{
    return *(PyObject **)((char *)object + layout->offsets[index]);
}

/* Results to replies. Each returns false, with no exception, for a value that Python code must look at. */

static bool get_u64(PyObject *object, uint64_t *value)
{
    if (object == NULL || !PyLong_Check(object))
        return false;
    *value = PyLong_AsUnsignedLongLong(object);
    if (*value == UINT64_MAX && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

static bool get_u32(PyObject *object, uint32_t *value)
{
    uint64_t wide;
    if (!get_u64(object, &wide) || wide > UINT32_MAX)
        return false;
    *value = (uint32_t)wide;
    return true;
}

static bool get_s64(PyObject *object, int64_t *value)
{
    if (object == NULL || !PyLong_Check(object))
        return false;
    *value = PyLong_AsLongLong(object);
    if (*value == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

/* Nanoseconds as seconds, which may be negative, and what is left, which may not. */
static bool get_time(PyObject *object, uint64_t *seconds, uint32_t *nanoseconds)
{
    int64_t total;
    if (!get_s64(object, &total))
        return false;
    int64_t whole = total / SECOND, rest = total % SECOND;
    if (rest < 0) {
        whole--;
        rest += SECOND;
    }
    *seconds = (uint64_t)whole;
    *nanoseconds = (uint32_t)rest;
    return true;
}

static bool get_ttl(PyObject *object, uint64_t *seconds, uint32_t *nanoseconds)
{
    return get_time(object, seconds, nanoseconds) && (int64_t)*seconds >= 0;
}

static bool get_attributes(PyObject *object, struct fuse_attr *out)
{
    if (object == NULL || !Py_IS_TYPE(object, attributes.type))
        return false;
    return get_u64(slot(object, &attributes, ATTR_INO), &out->ino) &&
           get_u64(slot(object, &attributes, ATTR_SIZE), &out->size) &&
           get_u64(slot(object, &attributes, ATTR_BLOCKS), &out->blocks) &&
           get_time(slot(object, &attributes, ATTR_ATIME), &out->atime, &out->atimensec) &&
           get_time(slot(object, &attributes, ATTR_MTIME), &out->mtime, &out->mtimensec) &&
           get_time(slot(object, &attributes, ATTR_CTIME), &out->ctime, &out->ctimensec) &&
           get_u32(slot(object, &attributes, ATTR_MODE), &out->mode) &&
           get_u32(slot(object, &attributes, ATTR_NLINK), &out->nlink) &&
           get_u32(slot(object, &attributes, ATTR_UID), &out->uid) &&
           get_u32(slot(object, &attributes, ATTR_GID), &out->gid) &&
           get_u32(slot(object, &attributes, ATTR_RDEV), &out->rdev) &&
           get_u32(slot(object, &attributes, ATTR_BLKSIZE), &out->blksize) &&
           get_u32(slot(object, &attributes, ATTR_FLAGS), &out->flags);
}

static bool get_entry(PyObject *object, struct fuse_entry_out *out)
{
    if (!Py_IS_TYPE(object, entry.type) ||
        !get_ttl(slot(object, &entry, ENTRY_TTL), &out->entry_valid, &out->entry_valid_nsec))
        return false;
    if (slot(object, &entry, ENTRY_ATTRIBUTES) == Py_None)
        return true; /* a negative entry is zeros */
    return get_u64(slot(object, &entry, ENTRY_NODEID), &out->nodeid) &&
           get_u64(slot(object, &entry, ENTRY_GENERATION), &out->generation) &&
           get_ttl(slot(object, &entry, ENTRY_ATTR_TTL), &out->attr_valid, &out->attr_valid_nsec) &&
           get_attributes(slot(object, &entry, ENTRY_ATTRIBUTES), &out->attr);
}

static bool get_attributes_reply(PyObject *object, struct fuse_attr_out *out)
{
    return Py_IS_TYPE(object, attributes_reply.type) &&
           get_ttl(slot(object, &attributes_reply, REPLY_ATTR_TTL), &out->attr_valid, &out->attr_valid_nsec) &&
           get_attributes(slot(object, &attributes_reply, REPLY_ATTRS), &out->attr);
}

static bool get_opened(PyObject *object, struct fuse_open_out *out)
{
    int64_t backing_id;
    if (!Py_IS_TYPE(object, opened_file.type) || !get_u64(slot(object, &opened_file, OPENED_FH), &out->fh) ||
        !get_u32(slot(object, &opened_file, OPENED_FLAGS), &out->open_flags) ||
        !get_s64(slot(object, &opened_file, OPENED_BACKING_ID), &backing_id) || backing_id != (int32_t)backing_id)
        return false;
    out->backing_id = (int32_t)backing_id;
    return true;
}

struct created {
    struct fuse_entry_out entry;
    struct fuse_open_out opened;
};

struct message {
    struct fuse_out_header header;
    union {
        struct fuse_entry_out entry;
        struct fuse_attr_out attributes;
        struct fuse_open_out opened;
        struct created created;
        struct fuse_write_out count;
    };
};

/* The size of the body, or -1 when Python code must look at the result. */
static Py_ssize_t encode(enum reply kind, PyObject *result, struct message *message)
{
    bool known = false;
    Py_ssize_t size = 0;
    memset(message, 0, sizeof(*message));
    switch (kind) {
    case REPLY_EMPTY:
        return 0;
    case REPLY_ENTRY:
        size = sizeof(message->entry);
        known = get_entry(result, &message->entry);
        break;
    case REPLY_ATTRIBUTES:
        size = sizeof(message->attributes);
        known = get_attributes_reply(result, &message->attributes);
        break;
    case REPLY_OPENED:
        size = sizeof(message->opened);
        known = get_opened(result, &message->opened);
        break;
    case REPLY_CREATED:
        size = sizeof(message->created);
        known = PyTuple_CheckExact(result) && PyTuple_GET_SIZE(result) == 2 &&
                get_entry(PyTuple_GET_ITEM(result, 0), &message->created.entry) &&
                get_opened(PyTuple_GET_ITEM(result, 1), &message->created.opened);
        break;
    case REPLY_COUNT:
        size = sizeof(message->count);
        known = get_u32(result, &message->count.size);
        break;
    default:
        break;
    }
    return known ? size : -1;
}

/* System calls: a length or -errno */

static long read_request(FastPath *path, long nanoseconds)
{
    struct timespec start, now;
    ssize_t n = read(path->fd, path->buffer.buf, path->buffer.len);
    if (n < 0 && errno == EAGAIN && nanoseconds > 0) {
        path->reading = true;
        Py_BEGIN_ALLOW_THREADS
        clock_gettime(CLOCK_MONOTONIC, &start);
        do {
            /* Who else could run on this processor goes first: it may be the one who makes the next request. */
            sched_yield();
            n = read(path->fd, path->buffer.buf, path->buffer.len);
            if (n >= 0 || errno != EAGAIN)
                break;
            clock_gettime(CLOCK_MONOTONIC, &now);
        } while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < nanoseconds);
        Py_END_ALLOW_THREADS
        path->reading = false;
    }
    if (n == 0)
        return -ENODEV; /* never from a device: a socket at its end */
    return n < 0 ? -errno : n;
}

static long write_message(FastPath *path, uint64_t unique, int error, struct message *message, Py_ssize_t body)
{
    Py_ssize_t length = sizeof(message->header) + body;
    message->header = (struct fuse_out_header){ .len = length, .error = -error, .unique = unique };
    return write(path->fd, message, length) < 0 ? -errno : 0;
}

static long write_data(FastPath *path, uint64_t unique, const Py_buffer *data)
{
    struct fuse_out_header header = { .len = sizeof(header) + data->len, .unique = unique };
    struct iovec parts[2] = { { &header, sizeof(header) }, { data->buf, data->len } };
    ssize_t n;
    if (data->len < WITHOUT_LOCK) {
        n = writev(path->fd, parts, 2);
    } else {
        Py_BEGIN_ALLOW_THREADS
        n = writev(path->fd, parts, 2);
        Py_END_ALLOW_THREADS
    }
    return n < 0 ? -errno : 0;
}

/* Requests to operations */

static PyObject *field(const char *structure, struct place place)
{
    uint64_t wide;
    uint32_t narrow;
    if (place.size == sizeof(wide)) {
        memcpy(&wide, structure + place.offset, sizeof(wide));
        return PyLong_FromUnsignedLongLong(wide);
    }
    memcpy(&narrow, structure + place.offset, sizeof(narrow));
    return PyLong_FromUnsignedLong(narrow);
}

/* The data of a WRITE as decode.write gives them: a small payload is copied, a big one lies in the buffer. */
static PyObject *payload(FastPath *path, Py_ssize_t start, Py_ssize_t end)
{
    PyObject *data, *view;
    if (end - start > (Py_ssize_t)path->in_place)
        return PySequence_GetSlice(path->view, start, end);
    data = PyBytes_FromStringAndSize((char *)path->buffer.buf + start, end - start);
    view = data != NULL ? PyMemoryView_FromObject(data) : NULL;
    Py_XDECREF(data);
    return view;
}

/* The operation, or NULL when the request does not have exactly the planned form (or memory is short). `asked` gets the
 * number of bytes that the reply may have. */
static PyObject *decode(FastPath *path, const struct plan *plan, const struct fuse_in_header *in, uint32_t *asked)
{
    PyObject *values[ORIGIN + MOST_FIELDS + 1];
    PyObject *op = NULL;
    const char *request = path->buffer.buf;
    const char *structure = request + sizeof(*in), *rest = structure + plan->size;
    Py_ssize_t left = (Py_ssize_t)in->len - (Py_ssize_t)sizeof(*in) - plan->size;
    int count = 0;

    if (left < 0)
        return NULL;
    if (plan->tail == TAIL_NOTHING && left != 0)
        return NULL;
    if (plan->tail == TAIL_NAME && (left < 2 || memchr(rest, 0, left) != rest + left - 1))
        return NULL;
    if (plan->tail == TAIL_DATA) {
        uint32_t announced;
        memcpy(&announced, structure + plan->places[plan->asked].offset, sizeof(announced));
        if (announced != left)
            return NULL;
    } else if (plan->asked >= 0) {
        memcpy(asked, structure + plan->places[plan->asked].offset, sizeof(*asked));
    }
    values[count++] = PyLong_FromUnsignedLongLong(in->unique);
    values[count++] = PyLong_FromUnsignedLongLong(in->nodeid);
    values[count++] = PyLong_FromUnsignedLong(in->uid);
    values[count++] = PyLong_FromUnsignedLong(in->gid);
    values[count++] = PyLong_FromUnsignedLong(in->pid);
    for (int i = 0; i < plan->fields; i++)
        values[count++] = field(structure, plan->places[i]);
    if (plan->tail == TAIL_NAME)
        values[count++] = PyBytes_FromStringAndSize(rest, left - 1);
    else if (plan->tail == TAIL_DATA)
        values[count++] = payload(path, rest - request, in->len);

    if (!PyErr_Occurred() && (PyDict_GET_SIZE(path->waiting) == 0 || plan->reply == REPLY_NONE ||
                              PyDict_Contains(path->waiting, values[0]) == 0))
        op = PyObject_Vectorcall(plan->op_type, values, count, NULL);
    PyErr_Clear();
    while (count > 0)
        Py_XDECREF(values[--count]);
    return op;
}

/* Calls of Python. These return 0, or -1 with an exception, which ends run. */

static int call(PyObject *function, PyObject *first, PyObject *second)
{
    PyObject *done = PyObject_CallFunctionObjArgs(function, first, second, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* server.method(channel, ...) */
static int tell(FastPath *path, const char *method, const char *format, ...)
{
    PyObject *function = PyObject_GetAttrString(path->server, method), *arguments = NULL, *done = NULL;
    va_list values;
    va_start(values, format);
    if (function != NULL && (arguments = Py_VaBuildValue(format, values)) != NULL)
        done = PyObject_CallObject(function, arguments);
    va_end(values);
    Py_XDECREF(function);
    Py_XDECREF(arguments);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int leave_task(FastPath *path)
{
    if (!path->entered)
        return 0;
    path->entered = false;
    return call(leave, path->loop, path->task);
}

static int enter_task(FastPath *path)
{
    if (path->entered)
        return 0;
    if (path->task == NULL) {
        path->task = PyObject_CallMethod(path->server, "new_task", NULL);
        if (path->task == NULL)
            return -1;
        if (!Py_IS_TYPE(path->task, running.type)) {
            PyErr_SetString(PyExc_TypeError, "new_task made no Running");
            return -1;
        }
    }
    path->entered = call(enter, path->loop, path->task) == 0;
    return path->entered ? 0 : -1;
}

/* A task that somebody has kept or cancelled belongs to the handler that is finished now; the next one gets another. */
static int part_with_task(FastPath *path)
{
    PyObject *done;
    if (Py_REFCNT(path->task) <= 1 + path->entered && slot(path->task, &running, RUNNING_TOUCHED) == Py_False)
        return 0;
    if (leave_task(path) < 0)
        return -1;
    done = PyObject_CallMethod(path->task, "retire", NULL);
    Py_CLEAR(path->task);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Handlers and replies */

static int reply(FastPath *path, const struct plan *plan, uint64_t unique, PyObject *op, uint32_t asked,
                 PyObject *result)
{
    struct message message;
    Py_buffer data;
    long sent = 1;

    if (plan->reply == REPLY_NONE)
        return 0;
    if (plan->reply != REPLY_DATA) {
        Py_ssize_t size = encode(plan->reply, result, &message);
        if (size >= 0)
            sent = write_message(path, unique, 0, &message, size);
    } else if (PyBytes_CheckExact(result) || PyByteArray_CheckExact(result) || PyMemoryView_Check(result)) {
        if (PyObject_GetBuffer(result, &data, PyBUF_SIMPLE) == 0) {
            if (data.len <= asked)
                sent = write_data(path, unique, &data);
            PyBuffer_Release(&data);
        }
        PyErr_Clear();
    }
    if (sent == 0)
        return 0;
    if (sent > 0)
        return tell(path, "answered", "OOOO", path->channel, plan->row, op, result);
    return tell(path, "refused", "OOOOl", path->channel, plan->row, op, result, sent);
}

/* The errno of an OSError that is replied as it is, else 0. */
static int plain_errno(PyObject *failure)
{
    PyObject *number;
    long code = 0;
    if (!PyObject_TypeCheck(failure, (PyTypeObject *)PyExc_OSError))
        return 0;
    number = PyObject_GetAttrString(failure, "errno");
    if (number != NULL && PyLong_CheckExact(number))
        code = PyLong_AsLong(number);
    Py_XDECREF(number);
    if (PyErr_Occurred())
        PyErr_Clear();
    return code > 0 && code <= FUSE_MAX_ERRNO && code != ENOSYS ? (int)code : 0;
}

static int reply_failure(FastPath *path, const struct plan *plan, uint64_t unique, PyObject *op)
{
    PyObject *type, *failure, *traceback;
    struct message message;
    int code, done = 0;

    PyErr_Fetch(&type, &failure, &traceback);
    PyErr_NormalizeException(&type, &failure, &traceback);
    code = plan->reply == REPLY_NONE ? 0 : plain_errno(failure);
    if (code != 0) {
        write_message(path, unique, code, &message, 0);
    } else {
        if (traceback != NULL)
            PyException_SetTraceback(failure, traceback);
        done = tell(path, "failed", "OOOO", path->channel, plan->row, op, failure);
    }
    Py_XDECREF(type);
    Py_XDECREF(failure);
    Py_XDECREF(traceback);
    return done;
}

/* A coroutine waits: the dispatcher takes it and its task over. */
static int suspend(FastPath *path, const struct plan *plan, PyObject *op, uint32_t length, PyObject *coroutine,
                   PyObject *yielded, PyObject *context)
{
    if (leave_task(path) < 0)
        return -1;
    PyObject *task = path->task;
    path->task = NULL;
    int done = tell(path, "suspended", "OOOkOOOO", path->channel, plan->row, op, (unsigned long)length, coroutine,
                    yielded, context, task);
    Py_DECREF(task);
    return done;
}

/* Start the handler, and reply if it does not wait. */
static int start(FastPath *path, const struct plan *plan, const struct fuse_in_header *in, PyObject *op,
                 uint32_t asked)
{
    PyObject *context, *coroutine, *result = NULL;
    PySendResult state;
    int done;

    if (enter_task(path) < 0)
        return -1;
    coroutine = PyObject_CallOneArg(plan->handler, op);
    if (coroutine == NULL)
        return reply_failure(path, plan, in->unique, op);
    if (!PyCoro_CheckExact(coroutine)) {
        done = leave_task(path);
        if (done == 0)
            done = tell(path, "made", "OOOkO", path->channel, plan->row, op, (unsigned long)in->len, coroutine);
        Py_DECREF(coroutine);
        return done;
    }
    context = PyContext_CopyCurrent();
    if (context == NULL || PyContext_Enter(context) < 0) {
        Py_XDECREF(context);
        Py_DECREF(coroutine);
        return -1;
    }
    state = PyIter_Send(coroutine, Py_None, &result);
    if (PyContext_Exit(context) < 0)
        state = PYGEN_ERROR;
    if (state == PYGEN_RETURN)
        done = reply(path, plan, in->unique, op, asked, result);
    else if (state == PYGEN_ERROR)
        done = reply_failure(path, plan, in->unique, op);
    else
        done = suspend(path, plan, op, in->len, coroutine, result, context);
    Py_XDECREF(result);
    Py_DECREF(context);
    Py_DECREF(coroutine);
    return done;
}

/* 1: served; 0: a request for Python code; -1: an exception. */
static int serve(FastPath *path, long length)
{
    struct fuse_in_header in;
    const struct plan *plan;
    uint32_t asked = INT32_MAX;
    PyObject *op;
    int done;

    if (length < (long)sizeof(in))
        return 0;
    memcpy(&in, path->buffer.buf, sizeof(in));
    if (in.len != (unsigned long)length || in.total_extlen != 0 || in.opcode >= OPCODES)
        return 0;
    plan = &path->plans[in.opcode];
    if (plan->handler == NULL || (op = decode(path, plan, &in, &asked)) == NULL)
        return 0;
    done = start(path, plan, &in, op, asked);
    Py_DECREF(op);
    if (done == 0 && path->task != NULL)
        done = part_with_task(path);
    return done < 0 ? -1 : 1;
}

/* The type */

PyDoc_STRVAR(run_doc, "run(nanoseconds) -> int\n\n"
"Serve what comes, at most `left` requests. Returns the length of a request that stands in the buffer and must be\n"
"served by Python code, 0 when none is left, or -errno of the read: EAGAIN when nothing came for so long.");

static PyObject *path_run(FastPath *path, PyObject *argument)
{
    long nanoseconds = PyLong_AsLong(argument), length = 0;
    int served = 1;

    if (nanoseconds == -1 && PyErr_Occurred())
        return NULL;
    if (path->running || path->view == NULL) {
        PyErr_SetString(PyExc_RuntimeError, path->running ? "run is running already" : "no buffer to read into");
        return NULL;
    }
    path->running = true;
    while (served == 1 && path->left > 0) {
        path->left--;
        length = read_request(path, PyDict_GET_SIZE(path->waiting) == 0 ? nanoseconds : 0);
        if (length == -EINTR || length == -ENOENT)
            continue;
        if (length <= 0)
            break;
        served = serve(path, length);
    }
    if (leave_task(path) < 0)
        served = -1;
    path->running = false;
    if (served < 0)
        return NULL;
    return PyLong_FromLong(served == 1 && length > 0 ? 0 : length);
}

PyDoc_STRVAR(use_doc, "use(buffer)\n\nRead requests into the memory of this RequestBuffer from now on.");

static PyObject *path_use(FastPath *path, PyObject *request_buffer)
{
    PyObject *view = PyObject_GetAttrString(request_buffer, "view");
    Py_buffer buffer;

    if (view == NULL || PyObject_GetBuffer(view, &buffer, PyBUF_WRITABLE) < 0) {
        Py_XDECREF(view);
        return NULL;
    }
    if (path->reading) {
        PyErr_SetString(PyExc_RuntimeError, "the buffer is in use");
        PyBuffer_Release(&buffer);
        Py_DECREF(view);
        return NULL;
    }
    if (path->view != NULL)
        PyBuffer_Release(&path->buffer);
    path->buffer = buffer;
    Py_XSETREF(path->view, view);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(add_doc, "add(opcode, row, op_type, handler, size, places, tail, reply, asked)\n\n"
"Serve an opcode. Its request has a structure of `size` bytes with fields at `places`, (offset, size) each, and\n"
"`tail` behind it; `asked` is the field that bounds the reply (or the data), -1 for none.");

static PyObject *path_add(FastPath *path, PyObject *arguments)
{
    struct plan plan = { 0 };
    PyObject *places;
    int opcode, size, tail, reply, asked;

    if (!PyArg_ParseTuple(arguments, "iOOOiO!iii", &opcode, &plan.row, &plan.op_type, &plan.handler, &size,
                          &PyTuple_Type, &places, &tail, &reply, &asked))
        return NULL;
    plan.fields = (uint8_t)PyTuple_GET_SIZE(places);
    if (opcode < 0 || opcode >= OPCODES || path->plans[opcode].row != NULL || size < 0 || size > UINT16_MAX ||
        PyTuple_GET_SIZE(places) > MOST_FIELDS || tail < 0 || tail > TAIL_DATA || reply < 0 || reply > REPLY_OTHER ||
        asked < -1 || asked >= plan.fields || (tail == TAIL_DATA && asked < 0)) {
        PyErr_Format(PyExc_ValueError, "opcode %d cannot be served like this", opcode);
        return NULL;
    }
    for (int i = 0; i < plan.fields; i++) {
        struct place *place = &plan.places[i];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(places, i), "HH", &place->offset, &place->size))
            return NULL;
        if ((place->size != 4 && place->size != 8) || place->offset + place->size > size ||
            (i == asked && place->size != 4)) {
            PyErr_Format(PyExc_ValueError, "opcode %d: field %d is no integer of the structure", opcode, i);
            return NULL;
        }
    }
    plan.size = (uint16_t)size;
    plan.tail = (uint8_t)tail;
    plan.reply = (uint8_t)reply;
    plan.asked = (int8_t)asked;
    Py_INCREF(plan.row);
    Py_INCREF(plan.op_type);
    Py_INCREF(plan.handler);
    path->plans[opcode] = plan;
    Py_RETURN_NONE;
}

static PyObject *path_new(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    static char *names[] = { "fd", "server", "channel", "loop", "waiting", "in_place", NULL };
    PyObject *server, *channel, *loop, *waiting;
    unsigned int in_place;
    int fd;

    if (!PyArg_ParseTupleAndKeywords(arguments, named, "iOOOO!I", names, &fd, &server, &channel, &loop, &PyDict_Type,
                                     &waiting, &in_place))
        return NULL;
    FastPath *path = (FastPath *)type->tp_alloc(type, 0);
    if (path == NULL)
        return NULL;
    path->fd = fd;
    path->in_place = in_place;
    path->server = Py_NewRef(server);
    path->channel = Py_NewRef(channel);
    path->loop = Py_NewRef(loop);
    path->waiting = Py_NewRef(waiting);
    return (PyObject *)path;
}

static int path_traverse(FastPath *path, visitproc visit, void *arg)
{
    Py_VISIT(path->view);
    Py_VISIT(path->server);
    Py_VISIT(path->channel);
    Py_VISIT(path->loop);
    Py_VISIT(path->waiting);
    Py_VISIT(path->task);
    for (int i = 0; i < OPCODES; i++) {
        Py_VISIT(path->plans[i].row);
        Py_VISIT(path->plans[i].op_type);
        Py_VISIT(path->plans[i].handler);
    }
    return 0;
}

static int path_clear(FastPath *path)
{
    path->left = 0;
    if (path->view != NULL)
        PyBuffer_Release(&path->buffer);
    Py_CLEAR(path->view);
    Py_CLEAR(path->server);
    Py_CLEAR(path->channel);
    Py_CLEAR(path->loop);
    Py_CLEAR(path->waiting);
    Py_CLEAR(path->task);
    for (int i = 0; i < OPCODES; i++) {
        Py_CLEAR(path->plans[i].row);
        Py_CLEAR(path->plans[i].op_type);
        Py_CLEAR(path->plans[i].handler);
    }
    return 0;
}

static void path_dealloc(FastPath *path)
{
    PyObject_GC_UnTrack(path);
    path_clear(path);
    Py_TYPE(path)->tp_free(path);
}

static PyMethodDef path_methods[] = {
    { "add", (PyCFunction)path_add, METH_VARARGS, add_doc },
    { "run", (PyCFunction)path_run, METH_O, run_doc },
    { "use", (PyCFunction)path_use, METH_O, use_doc },
    { NULL },
};

static PyMemberDef path_members[] = {
    { "left", T_INT, offsetof(FastPath, left), 0, "requests until run returns" },
    { NULL },
};

static PyTypeObject path_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "rawfuse._fast.FastPath",
    .tp_doc = "Serves the common requests of one descriptor.",
    .tp_basicsize = sizeof(FastPath),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = path_new,
    .tp_dealloc = (destructor)path_dealloc,
    .tp_traverse = (traverseproc)path_traverse,
    .tp_clear = (inquiry)path_clear,
    .tp_methods = path_methods,
    .tp_members = path_members,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "rawfuse._fast",
    .m_doc = "The hot path of rawfuse, compiled.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__fast(void)
{
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        { "TAIL_NOTHING", TAIL_NOTHING }, { "TAIL_NAME", TAIL_NAME },         { "TAIL_DATA", TAIL_DATA },
        { "REPLY_NONE", REPLY_NONE },     { "REPLY_EMPTY", REPLY_EMPTY },     { "REPLY_ENTRY", REPLY_ENTRY },
        { "REPLY_OPENED", REPLY_OPENED }, { "REPLY_CREATED", REPLY_CREATED }, { "REPLY_ATTRIBUTES", REPLY_ATTRIBUTES },
        { "REPLY_COUNT", REPLY_COUNT },   { "REPLY_DATA", REPLY_DATA },       { "REPLY_OTHER", REPLY_OTHER },
    };
    PyObject *module, *tasks = PyImport_ImportModule("asyncio.tasks");
    if (tasks == NULL)
        return NULL;
    enter = PyObject_GetAttrString(tasks, "_enter_task");
    leave = PyObject_GetAttrString(tasks, "_leave_task");
    Py_DECREF(tasks);
    if (enter == NULL || leave == NULL || !find_layout(&attributes, "rawfuse.replies") ||
        !find_layout(&entry, "rawfuse.replies") || !find_layout(&attributes_reply, "rawfuse.replies") ||
        !find_layout(&opened_file, "rawfuse.replies") || !find_layout(&running, "rawfuse.running") ||
        (module = PyModule_Create(&definition)) == NULL)
        return NULL;
    for (size_t i = 0; i < sizeof(constants) / sizeof(*constants); i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return NULL;
    if (PyModule_AddType(module, &path_type) < 0)
        return NULL;
    return module;
}
