/* From results of handlers to the common replies, as rawfuse/encode.py makes them. A value that is not as simple as it
 * mostly is (a subclass, a number out of range, a deleted attribute) is left to that code. */

enum { SECOND = 1000000000 };

enum reply { REPLY_NONE, REPLY_EMPTY, REPLY_ENTRY, REPLY_ATTRIBUTES, REPLY_OPENED, REPLY_CREATED, REPLY_COUNT,
             REPLY_DATA, REPLY_OTHER };

/* Slots of Python objects, read where the descriptors of their types say */

enum { INO, MODE, NLINK, UID, GID, SIZE, BLOCKS, ATIME, MTIME, CTIME, RDEV, BLKSIZE, FLAGS, MOST_SLOTS };
enum { ENTRY_NODEID, ENTRY_ATTRIBUTES, ENTRY_TTL, ENTRY_ATTR_TTL, ENTRY_GENERATION };
enum { ANSWER_ATTRIBUTES, ANSWER_TTL };
enum { OPENED_FH, OPENED_FLAGS, OPENED_BACKING_ID };

struct layout {
    const char *module, *name, *slots[MOST_SLOTS + 1];
    PyTypeObject *type;
    Py_ssize_t offsets[MOST_SLOTS];
};

static struct layout attributes = { "rawfuse.replies", "Attributes",
                                    { "ino", "mode", "nlink", "uid", "gid", "size", "blocks", "atime", "mtime",
                                      "ctime", "rdev", "blksize", "flags" } };
static struct layout entry = { "rawfuse.replies", "Entry",
                               { "nodeid", "attributes", "entry_ttl", "attr_ttl", "generation" } };
static struct layout attributes_reply = { "rawfuse.replies", "AttributesReply", { "attributes", "attr_ttl" } };
static struct layout opened_file = { "rawfuse.replies", "OpenedFile", { "fh", "flags", "backing_id" } };

/* False with an exception when the type does not keep all of them in slots. */
static bool find_layout(struct layout *layout)
{
    PyObject *module = PyImport_ImportModule(layout->module), *type = NULL;
    if (module != NULL)
        type = PyObject_GetAttrString(module, layout->name);
    Py_XDECREF(module);
    layout->type = (PyTypeObject *)type; /* for good */
    for (int i = 0; type != NULL && layout->slots[i] != NULL; i++) {
        PyObject *descriptor = PyObject_GetAttrString(type, layout->slots[i]);
        bool found = descriptor != NULL && Py_IS_TYPE(descriptor, &PyMemberDescr_Type) &&
                     ((PyMemberDescrObject *)descriptor)->d_member->type == T_OBJECT_EX;
        if (found)
            layout->offsets[i] = ((PyMemberDescrObject *)descriptor)->d_member->offset;
        else if (descriptor != NULL)
            PyErr_Format(PyExc_TypeError, "%s.%s is no slot", layout->name, layout->slots[i]);
        Py_XDECREF(descriptor);
        if (!found)
            return false;
    }
    return type != NULL;
}

/* A borrowed reference; NULL when the slot has been deleted. */
static inline PyObject *slot(PyObject *object, const struct layout *layout, int index)
{
    return *(PyObject **)((char *)object + layout->offsets[index]);
}

/* These return false, without an exception, for a value that Python code must look at. */

static bool get_u64(PyObject *object, uint64_t *value)
{
    if (object == NULL || !PyLong_Check(object))
        return false;
    *value = PyLong_AsUnsignedLongLong(object);
    if (*value != UINT64_MAX || !PyErr_Occurred())
        return true;
    PyErr_Clear();
    return false;
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
    if (*value != -1 || !PyErr_Occurred())
        return true;
    PyErr_Clear();
    return false;
}

/* Nanoseconds as seconds, which may be negative, and what is left, which may not. */
static bool get_time(PyObject *object, uint64_t *seconds, uint32_t *nanoseconds)
{
    int64_t total, whole, rest;
    if (!get_s64(object, &total))
        return false;
    whole = total / SECOND;
    rest = total % SECOND;
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
    const struct layout *a = &attributes;
    return object != NULL && Py_IS_TYPE(object, a->type) && get_u64(slot(object, a, INO), &out->ino) &&
           get_u64(slot(object, a, SIZE), &out->size) && get_u64(slot(object, a, BLOCKS), &out->blocks) &&
           get_time(slot(object, a, ATIME), &out->atime, &out->atimensec) &&
           get_time(slot(object, a, MTIME), &out->mtime, &out->mtimensec) &&
           get_time(slot(object, a, CTIME), &out->ctime, &out->ctimensec) &&
           get_u32(slot(object, a, MODE), &out->mode) && get_u32(slot(object, a, NLINK), &out->nlink) &&
           get_u32(slot(object, a, UID), &out->uid) && get_u32(slot(object, a, GID), &out->gid) &&
           get_u32(slot(object, a, RDEV), &out->rdev) && get_u32(slot(object, a, BLKSIZE), &out->blksize) &&
           get_u32(slot(object, a, FLAGS), &out->flags);
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
           get_ttl(slot(object, &attributes_reply, ANSWER_TTL), &out->attr_valid, &out->attr_valid_nsec) &&
           get_attributes(slot(object, &attributes_reply, ANSWER_ATTRIBUTES), &out->attr);
}

static bool get_opened(PyObject *object, struct fuse_open_out *out)
{
    int64_t backing_id = 0;
    bool known = Py_IS_TYPE(object, opened_file.type) && get_u64(slot(object, &opened_file, OPENED_FH), &out->fh) &&
                 get_u32(slot(object, &opened_file, OPENED_FLAGS), &out->open_flags) &&
                 get_s64(slot(object, &opened_file, OPENED_BACKING_ID), &backing_id);
    out->backing_id = (int32_t)backing_id;
    return known && out->backing_id == backing_id;
}

struct created {
    struct fuse_entry_out entry;
    struct fuse_open_out opened;
};

static bool get_created(PyObject *object, struct created *out)
{
    return PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2 &&
           get_entry(PyTuple_GET_ITEM(object, 0), &out->entry) && get_opened(PyTuple_GET_ITEM(object, 1), &out->opened);
}

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

/* The size of the body, or -1. */
static Py_ssize_t encode(enum reply kind, PyObject *result, struct message *message)
{
    memset(message, 0, sizeof(*message));
    switch (kind) {
    case REPLY_EMPTY:
        return 0;
    case REPLY_ENTRY:
        return get_entry(result, &message->entry) ? (Py_ssize_t)sizeof(message->entry) : -1;
    case REPLY_ATTRIBUTES:
        return get_attributes_reply(result, &message->attributes) ? (Py_ssize_t)sizeof(message->attributes) : -1;
    case REPLY_OPENED:
        return get_opened(result, &message->opened) ? (Py_ssize_t)sizeof(message->opened) : -1;
    case REPLY_CREATED:
        return get_created(result, &message->created) ? (Py_ssize_t)sizeof(message->created) : -1;
    case REPLY_COUNT:
        return get_u32(result, &message->count.size) ? (Py_ssize_t)sizeof(message->count) : -1;
    default:
        return -1;
    }
}
