/* The hot path: requests of /dev/fuse that are served without any Python but the file system's handler.
 *
 * FastPath.run reads a request, checks and decodes it, runs the first step of its handler and writes the reply, again
 * and again. It knows requests that are a fixed structure with a name or data behind it, and the common replies. All
 * else it leaves to the Python code, which says what is right in every case: a request of another form is handed back
 * before anything was done for it; a handler that waits, an exception that is no plain OSError, a result without a
 * simple encoding and a reply that the kernel refused go to the dispatcher (fast.FastServer).
 *
 * Layouts come from _structs.cdef: compiled in for replies, as offsets found by wire.Codec for requests. The buffer is
 * not looked at once Python code has run for its request: a handler may have another one put in its place. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_structs.cdef"
#include "_replies.h"

#include "_uring.h"

enum {
    OPCODES = 64,
    MOST_FIELDS = 12,
    ORIGIN = 5,              /* fields that every operation begins with: unique, nodeid, uid, gid, pid */
    WITHOUT_LOCK = 64 << 10, /* bytes from which on a reply is written with the interpreter lock released */
    MOST_BYTES = INT32_MAX,  /* of a reply that the request does not bound */
};

#define CONSTANTS(X)                                                                            \
    X(TAIL_NOTHING) X(TAIL_NAME) X(TAIL_DATA)                                                   \
    X(REPLY_NONE) X(REPLY_EMPTY) X(REPLY_ENTRY) X(REPLY_ATTRIBUTES) X(REPLY_OPENED)             \
    X(REPLY_CREATED) X(REPLY_COUNT) X(REPLY_DATA) X(REPLY_OTHER)

/* What stands behind the structure of a request. */
enum tail { TAIL_NOTHING, TAIL_NAME, TAIL_DATA };

struct place {
    uint16_t offset, size;
};

/* How an opcode is served. */
struct plan {
    PyObject *row, *op_type, *handler; /* NULL: not here */
    uint16_t size;                     /* of the structure */
    uint8_t fields, tail, reply;
    int8_t sized; /* the field with the size of the data that follow, or of the largest REPLY_DATA; -1: there is none */
    struct place places[MOST_FIELDS];
};

/* A request being served. */
struct request {
    struct fuse_in_header header;
    const struct plan *plan;
    PyObject *op;
    uint32_t most; /* bytes of REPLY_DATA */
};

typedef struct {
    PyObject_HEAD
    int fd;                    /* where requests come from, or ... */
    struct rawfuse_ring *ring; /* ... this one, made and owned by Python code */
    PyObject *views;           /* list: the memory of each entry of the ring */
    int left;              /* requests until run returns */
    unsigned int in_place; /* data of a WRITE up to this size are copied */
    bool running;          /* run is on the stack */
    bool reading;          /* into the buffer, without the interpreter lock */
    bool entered;          /* asyncio.current_task() is `task` */
    Py_buffer buffer;      /* of the descriptor */
    PyObject *view;        /* the memoryview of it */
    char *message;         /* the request being served, in the buffer or in an entry of the ring */
    PyObject *memory;      /* borrowed: the memoryview that it lies in */
    PyObject *server, *channel, *loop;
    PyObject *waiting;     /* dict: requests in flight by their ids */
    PyObject *task;        /* the Running of first steps; a handler that waits keeps it */
    struct plan plans[OPCODES];
} FastPath;

enum { RUNNING_TOUCHED };
static struct layout running = { "rawfuse.running", "Running", { "touched" } };
static PyObject *enter, *leave; /* asyncio.tasks._enter_task, _leave_task */

/* System calls: a length or -errno */

/* Of a ring, what rawfuse_ring_next says, but -EAGAIN for nothing. */
static long next_request(FastPath *path, long nanoseconds)
{
    int64_t found = rawfuse_ring_next(path->ring, 0);
    if (found == 0 && nanoseconds > 0) {
        Py_BEGIN_ALLOW_THREADS
        found = rawfuse_ring_next(path->ring, nanoseconds);
        Py_END_ALLOW_THREADS
    }
    if (found > 0) {
        path->message = rawfuse_ring_message(path->ring, found >> 32);
        path->memory = PyList_GET_ITEM(path->views, found >> 32);
    }
    return found == 0 ? -EAGAIN : found;
}

static long read_request(FastPath *path, long nanoseconds)
{
    struct timespec start, now;
    ssize_t n;
    if (path->ring != NULL)
        return next_request(path, nanoseconds);
    n = read(path->fd, path->buffer.buf, path->buffer.len);
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
        } while ((now.tv_sec - start.tv_sec) * (long)SECOND + now.tv_nsec - start.tv_nsec < nanoseconds);
        Py_END_ALLOW_THREADS
        path->reading = false;
    }
    if (n == 0)
        return -ENODEV; /* no device says so, but a socket at its end */
    return n < 0 ? -errno : n;
}

static long put_reply(FastPath *path, const void *header, const void *body, Py_ssize_t size)
{
    uint64_t unique = ((const struct fuse_out_header *)header)->unique;
    int error;
    if (size < WITHOUT_LOCK) {
        error = rawfuse_ring_reply(path->ring, unique, header, body, size);
    } else {
        Py_BEGIN_ALLOW_THREADS
        error = rawfuse_ring_reply(path->ring, unique, header, body, size);
        Py_END_ALLOW_THREADS
    }
    return error < 0 ? error : (long)sizeof(struct fuse_out_header) + size;
}

static long write_message(FastPath *path, uint64_t unique, int error, struct message *message, Py_ssize_t body)
{
    ssize_t length = (ssize_t)sizeof(message->header) + body;
    message->header = (struct fuse_out_header){ .len = (uint32_t)length, .error = -error, .unique = unique };
    if (path->ring != NULL)
        return put_reply(path, message, &message->entry, body);
    return write(path->fd, message, length) < 0 ? -errno : length;
}

static long write_data(FastPath *path, uint64_t unique, const Py_buffer *data)
{
    struct fuse_out_header header = { .len = (uint32_t)(sizeof(header) + data->len), .unique = unique };
    struct iovec parts[2] = { { &header, sizeof(header) }, { data->buf, (size_t)data->len } };
    ssize_t n;
    if (path->ring != NULL)
        return put_reply(path, &header, data->buf, data->len);
    if (data->len < WITHOUT_LOCK) {
        n = writev(path->fd, parts, 2);
    } else {
        Py_BEGIN_ALLOW_THREADS
        n = writev(path->fd, parts, 2);
        Py_END_ALLOW_THREADS
    }
    return n < 0 ? -errno : n;
}

/* From requests to operations */

static PyObject *field(const char *structure, struct place place)
{
    uint64_t wide;
    uint32_t narrow;
    if (place.size == sizeof(narrow)) {
        memcpy(&narrow, structure + place.offset, sizeof(narrow));
        return PyLong_FromUnsignedLong(narrow);
    }
    memcpy(&wide, structure + place.offset, sizeof(wide));
    return PyLong_FromUnsignedLongLong(wide);
}

/* As decode.write: small data are copied, big data lie in the buffer. */
static PyObject *data_view(FastPath *path, Py_ssize_t start, Py_ssize_t end)
{
    PyObject *data, *view;
    if (end - start > (Py_ssize_t)path->in_place)
        return PySequence_GetSlice(path->memory, start, end);
    data = PyBytes_FromStringAndSize(path->message + start, end - start);
    view = data != NULL ? PyMemoryView_FromObject(data) : NULL;
    Py_XDECREF(data);
    return view;
}

/* Whether the request that stands in the buffer has exactly the planned form. */
static bool has_form(FastPath *path, struct request *request)
{
    const struct plan *plan = request->plan;
    const char *structure = path->message + sizeof(request->header), *rest = structure + plan->size;
    Py_ssize_t left = (Py_ssize_t)request->header.len - (Py_ssize_t)sizeof(request->header) - plan->size;

    request->most = MOST_BYTES;
    if (left < 0)
        return false;
    if (plan->sized >= 0)
        memcpy(&request->most, structure + plan->places[plan->sized].offset, sizeof(request->most));
    switch (plan->tail) {
    case TAIL_NAME:
        return left > 1 && memchr(rest, 0, left) == rest + left - 1;
    case TAIL_DATA:
        return left == request->most;
    default:
        return left == 0;
    }
}

/* The operation; NULL, without an exception, where its id is another's, or memory is short. */
static PyObject *make_op(FastPath *path, const struct request *request)
{
    const struct plan *plan = request->plan;
    const struct fuse_in_header *in = &request->header;
    const char *structure = path->message + sizeof(*in);
    Py_ssize_t rest = (Py_ssize_t)sizeof(*in) + plan->size;
    PyObject *values[ORIGIN + MOST_FIELDS + 1], *op = NULL;
    int count = 0;

    values[count++] = PyLong_FromUnsignedLongLong(in->unique);
    values[count++] = PyLong_FromUnsignedLongLong(in->nodeid);
    values[count++] = PyLong_FromUnsignedLong(in->uid);
    values[count++] = PyLong_FromUnsignedLong(in->gid);
    values[count++] = PyLong_FromUnsignedLong(in->pid);
    for (int i = 0; i < plan->fields; i++)
        values[count++] = field(structure, plan->places[i]);
    if (plan->tail == TAIL_NAME)
        values[count++] = PyBytes_FromStringAndSize(structure + plan->size, in->len - rest - 1);
    else if (plan->tail == TAIL_DATA)
        values[count++] = data_view(path, rest, in->len);
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

/* server.method(channel, row, op, ...) */
static int tell(FastPath *path, const struct request *request, const char *method, const char *format, ...)
{
    PyObject *first = Py_BuildValue("(OOO)", path->channel, request->plan->row, request->op);
    PyObject *rest = NULL, *all = NULL, *function = NULL, *done = NULL;
    va_list values;
    va_start(values, format);
    if (first != NULL && (rest = Py_VaBuildValue(format, values)) != NULL &&
        (all = PySequence_Concat(first, rest)) != NULL &&
        (function = PyObject_GetAttrString(path->server, method)) != NULL)
        done = PyObject_CallObject(function, all);
    va_end(values);
    Py_XDECREF(first);
    Py_XDECREF(rest);
    Py_XDECREF(all);
    Py_XDECREF(function);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int enter_task(FastPath *path)
{
    if (path->entered)
        return 0;
    if (path->task == NULL && (path->task = PyObject_CallMethod(path->server, "new_task", NULL)) == NULL)
        return -1;
    if (!Py_IS_TYPE(path->task, running.type)) {
        PyErr_SetString(PyExc_TypeError, "new_task made no Running");
        return -1;
    }
    path->entered = call(enter, path->loop, path->task) == 0;
    return path->entered ? 0 : -1;
}

static int leave_task(FastPath *path)
{
    if (!path->entered)
        return 0;
    path->entered = false;
    return call(leave, path->loop, path->task);
}

/* A task that somebody has kept or cancelled belongs to the handler that has finished; the next one gets another. */
static int part_with_task(FastPath *path)
{
    PyObject *done;
    if (path->task == NULL ||
        (Py_REFCNT(path->task) <= 1 + path->entered && slot(path->task, &running, RUNNING_TOUCHED) == Py_False))
        return 0;
    if (leave_task(path) < 0)
        return -1;
    done = PyObject_CallMethod(path->task, "retire", NULL);
    Py_CLEAR(path->task);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int reply(FastPath *path, const struct request *request, PyObject *result)
{
    struct message message;
    Py_buffer data;
    long sent = 0;

    if (request->plan->reply == REPLY_NONE)
        return 0;
    if (request->plan->reply != REPLY_DATA) {
        Py_ssize_t size = encode(request->plan->reply, result, &message);
        if (size >= 0)
            sent = write_message(path, request->header.unique, 0, &message, size);
    } else if (PyBytes_CheckExact(result) || PyByteArray_CheckExact(result) || PyMemoryView_Check(result)) {
        if (PyObject_GetBuffer(result, &data, PyBUF_SIMPLE) == 0) {
            if ((uint64_t)data.len <= request->most && data.len <= MOST_BYTES)
                sent = write_data(path, request->header.unique, &data);
            PyBuffer_Release(&data);
        }
        PyErr_Clear();
    }
    if (sent > 0)
        return 0;
    return sent == 0 ? tell(path, request, "answered", "(O)", result)
                     : tell(path, request, "refused", "(Ol)", result, sent);
}

/* The errno of an OSError that is replied as it is; 0 for others (dispatcher._reply_failure). */
static int plain_errno(PyObject *failure)
{
    PyObject *number;
    long code = 0;
    if (failure == NULL || !PyObject_TypeCheck(failure, (PyTypeObject *)PyExc_OSError))
        return 0;
    number = PyObject_GetAttrString(failure, "errno");
    if (number != NULL && PyLong_CheckExact(number))
        code = PyLong_AsLong(number);
    Py_XDECREF(number);
    PyErr_Clear();
    return code > 0 && code <= FUSE_MAX_ERRNO && code != ENOSYS ? (int)code : 0;
}

static int reply_failure(FastPath *path, const struct request *request)
{
    PyObject *type, *failure, *traceback;
    struct message message;
    int code, done = 0;

    PyErr_Fetch(&type, &failure, &traceback);
    PyErr_NormalizeException(&type, &failure, &traceback);
    code = request->plan->reply == REPLY_NONE ? 0 : plain_errno(failure);
    if (code != 0) {
        write_message(path, request->header.unique, code, &message, 0);
    } else {
        if (traceback != NULL)
            PyException_SetTraceback(failure, traceback);
        done = tell(path, request, "failed", "(O)", failure);
    }
    Py_XDECREF(type);
    Py_XDECREF(failure);
    Py_XDECREF(traceback);
    return done;
}

/* The dispatcher takes over a coroutine that waits, and its task. */
static int suspend(FastPath *path, const struct request *request, PyObject *coroutine, PyObject *yielded,
                   PyObject *context)
{
    PyObject *task = path->task;
    int done = leave_task(path);
    path->task = NULL;
    if (done == 0)
        done = tell(path, request, "suspended", "(kOOOO)", (unsigned long)request->header.len, coroutine, yielded,
                    context, task);
    Py_DECREF(task);
    return done;
}

/* The first step of a handler, in a context of its own. */
static int step(FastPath *path, const struct request *request, PyObject *coroutine)
{
    PyObject *context = PyContext_CopyCurrent(), *result = NULL;
    PySendResult state;
    int done;

    if (context == NULL || PyContext_Enter(context) < 0) {
        Py_XDECREF(context);
        return -1;
    }
    state = PyIter_Send(coroutine, Py_None, &result);
    if (PyContext_Exit(context) < 0)
        state = PYGEN_ERROR;
    if (state == PYGEN_RETURN)
        done = reply(path, request, result);
    else if (state == PYGEN_NEXT)
        done = suspend(path, request, coroutine, result, context);
    else
        done = reply_failure(path, request);
    Py_XDECREF(result);
    Py_DECREF(context);
    return done;
}

/* 1: served; 0: a request for Python code; -1: an exception. */
static int serve(FastPath *path, long length)
{
    struct request request;
    const struct fuse_in_header *in = &request.header;
    PyObject *coroutine;
    int done;

    if (length < (long)sizeof(*in))
        return 0;
    memcpy(&request.header, path->message, sizeof(*in));
    if (in->len != (unsigned long)length || in->total_extlen != 0 || in->opcode >= OPCODES)
        return 0;
    request.plan = &path->plans[in->opcode];
    if (request.plan->handler == NULL || !has_form(path, &request) ||
        (request.op = make_op(path, &request)) == NULL)
        return 0;
    done = enter_task(path);
    if (done == 0) {
        coroutine = PyObject_CallOneArg(request.plan->handler, request.op);
        if (coroutine == NULL)
            done = reply_failure(path, &request);
        else if (PyCoro_CheckExact(coroutine))
            done = step(path, &request, coroutine);
        else if ((done = leave_task(path)) == 0)
            done = tell(path, &request, "made", "(kO)", (unsigned long)length, coroutine);
        Py_XDECREF(coroutine);
    }
    Py_DECREF(request.op);
    if (done == 0)
        done = part_with_task(path);
    return done < 0 ? -1 : 1;
}

/* The type; its methods are described in _fast.pyi. */

static PyObject *path_run(FastPath *path, PyObject *argument)
{
    long nanoseconds = PyLong_AsLong(argument), length = 0;
    PyObject *type, *failure, *traceback;
    int served = 1;

    if (nanoseconds == -1 && PyErr_Occurred())
        return NULL;
    if (path->running || (path->view == NULL && path->ring == NULL))
        return PyErr_Format(PyExc_RuntimeError, path->running ? "run is running" : "there is no buffer");
    path->running = true;
    while (served == 1 && path->left > 0) {
        path->left--;
        length = read_request(path, PyDict_GET_SIZE(path->waiting) == 0 ? nanoseconds : 0);
        if (length > 0)
            served = serve(path, length & UINT32_MAX);
        else if (length != -EINTR && length != -ENOENT)
            break;
    }
    PyErr_Fetch(&type, &failure, &traceback); /* a function must not be called with an exception set */
    if (leave_task(path) < 0)
        served = -1;
    if (type != NULL)
        PyErr_Restore(type, failure, traceback);
    path->running = false;
    if (served < 0)
        return NULL;
    return PyLong_FromLong(served == 1 && length > 0 ? 0 : length);
}

static PyObject *path_use(FastPath *path, PyObject *request_buffer)
{
    PyObject *view = PyObject_GetAttrString(request_buffer, "view");
    Py_buffer buffer;

    if (view == NULL || PyObject_GetBuffer(view, &buffer, PyBUF_WRITABLE) < 0) {
        Py_XDECREF(view);
        return NULL;
    }
    if (path->reading) {
        PyBuffer_Release(&buffer);
        Py_DECREF(view);
        return PyErr_Format(PyExc_RuntimeError, "the buffer is in use");
    }
    if (path->view != NULL)
        PyBuffer_Release(&path->buffer);
    path->buffer = buffer;
    Py_XSETREF(path->view, view);
    path->message = buffer.buf;
    path->memory = view;
    Py_RETURN_NONE;
}

static PyObject *path_add(FastPath *path, PyObject *arguments)
{
    struct plan plan = { 0 };
    PyObject *places;
    int opcode, size, tail, reply, sized;

    if (!PyArg_ParseTuple(arguments, "iOOOiO!iii", &opcode, &plan.row, &plan.op_type, &plan.handler, &size,
                          &PyTuple_Type, &places, &tail, &reply, &sized))
        return NULL;
    if (opcode < 0 || opcode >= OPCODES || path->plans[opcode].row != NULL || size < 0 || size > UINT16_MAX ||
        PyTuple_GET_SIZE(places) > MOST_FIELDS || tail < 0 || tail > TAIL_DATA || reply < 0 || reply > REPLY_OTHER ||
        sized < -1 || sized >= PyTuple_GET_SIZE(places) || (tail == TAIL_DATA && sized < 0))
        return PyErr_Format(PyExc_ValueError, "opcode %d cannot be served like this", opcode);
    plan.size = (uint16_t)size;
    plan.fields = (uint8_t)PyTuple_GET_SIZE(places);
    plan.tail = (uint8_t)tail;
    plan.reply = (uint8_t)reply;
    plan.sized = (int8_t)sized;
    for (int i = 0; i < plan.fields; i++) {
        struct place *place = &plan.places[i];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(places, i), "HH", &place->offset, &place->size))
            return NULL;
        if ((place->size != 4 && place->size != 8) || place->offset + place->size > size ||
            (i == sized && place->size != 4))
            return PyErr_Format(PyExc_ValueError, "opcode %d: field %d is no integer of the structure", opcode, i);
    }
    Py_INCREF(plan.row);
    Py_INCREF(plan.op_type);
    Py_INCREF(plan.handler);
    path->plans[opcode] = plan;
    Py_RETURN_NONE;
}

static PyObject *path_new(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    static char *names[] = { "server", "channel", "loop", "waiting", "in_place", "fd", "ring", "views", NULL };
    PyObject *server, *channel, *loop, *waiting, *views = NULL;
    unsigned long long ring = 0;
    FastPath *path;
    unsigned int in_place;
    int fd = -1;

    if (!PyArg_ParseTupleAndKeywords(arguments, named, "OOOO!I|$iKO!", names, &server, &channel, &loop, &PyDict_Type,
                                     &waiting, &in_place, &fd, &ring, &PyList_Type, &views) ||
        (path = (FastPath *)type->tp_alloc(type, 0)) == NULL)
        return NULL;
    path->fd = fd;
    path->ring = views != NULL ? (struct rawfuse_ring *)(uintptr_t)ring : NULL;
    path->views = Py_XNewRef(views);
    path->in_place = in_place;
    path->server = Py_NewRef(server);
    path->channel = Py_NewRef(channel);
    path->loop = Py_NewRef(loop);
    path->waiting = Py_NewRef(waiting);
    return (PyObject *)path;
}

static int path_traverse(FastPath *path, visitproc visit, void *arg)
{
    Py_VISIT(path->views);
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
    if (path->view != NULL)
        PyBuffer_Release(&path->buffer);
    Py_CLEAR(path->view); /* run refuses from now on */
    path->ring = NULL;
    Py_CLEAR(path->views);
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
    { "add", (PyCFunction)path_add, METH_VARARGS, NULL },
    { "run", (PyCFunction)path_run, METH_O, NULL },
    { "use", (PyCFunction)path_use, METH_O, NULL },
    { NULL, NULL, 0, NULL },
};

static PyMemberDef path_members[] = {
    { "left", T_INT, offsetof(FastPath, left), 0, NULL },
    { NULL, 0, 0, 0, NULL },
};

static PyTypeObject path_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "rawfuse._fast.FastPath",
    .tp_basicsize = sizeof(FastPath),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = path_new,
    .tp_dealloc = (destructor)path_dealloc,
    .tp_traverse = (traverseproc)path_traverse,
    .tp_clear = (inquiry)path_clear,
    .tp_methods = path_methods,
    .tp_members = path_members,
};

static struct PyModuleDef definition = { PyModuleDef_HEAD_INIT, .m_name = "rawfuse._fast", .m_size = -1 };

PyMODINIT_FUNC PyInit__fast(void)
{
    PyObject *module, *tasks = PyImport_ImportModule("asyncio.tasks");
    bool complete = true;
    if (tasks == NULL)
        return NULL;
    enter = PyObject_GetAttrString(tasks, "_enter_task");
    leave = PyObject_GetAttrString(tasks, "_leave_task");
    Py_DECREF(tasks);
    if (enter == NULL || leave == NULL || !find_layout(&attributes) || !find_layout(&entry) ||
        !find_layout(&attributes_reply) || !find_layout(&opened_file) || !find_layout(&running) ||
        (module = PyModule_Create(&definition)) == NULL)
        return NULL;
#define ADD(name) complete = complete && PyModule_AddIntConstant(module, #name, name) == 0;
    CONSTANTS(ADD)
    if (complete && PyModule_AddType(module, &path_type) == 0)
        return module;
    Py_DECREF(module);
    return NULL;
}
