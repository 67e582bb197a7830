/* Write the events of one witness file: the hot path of repro.trace.recording.recorder.Recorder, with the same bytes.
 *
 * Each function here changes the file and the counters without giving up the interpreter's lock, so that several threads
 * can record. tape_vector and tape_begin_step call Python, before they write. The layout and the order of writing are
 * those of repro.trace.witness.format; Python passes the offsets.
 */

#include "calls.h"

#include <time.h>

enum { MAX_NOTED = 4096 };

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    uint8_t *data;
    Py_ssize_t ring_at, ring_end, next_at, events_at;
    unsigned long long num_events, guard;
    long long step;
    long phase; /* the number of the rank's phase, which is in each record */
    PyObject *clock; /* NULL: CLOCK_MONOTONIC */
    PyObject *noted; /* NULL, or a list to which the entry of each issued call is appended */
    PyObject *store; /* stores a tuple of sizes; returns its offset */
    PyObject *schedules, *part; /* repro.trace.recording.schedules: the known schedules, and what makes a new one known */
    PyObject *progress; /* NULL, or what is known about the worker whose file this is; see steps.h */
    PyObject *sizes; /* NULL, or the tuple that was stored last, and its offset */
    uint64_t sizes_at;
} Tape;

/* Tape(buffer, ring_at, ring_end, events_at, guard, clock, store, schedules, part) */
static int tape_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(options)) {
    Tape *self = (Tape *)object;
    PyObject *buffer, *clock, *store, *schedules, *part;
    if (!PyArg_ParseTuple(args, "OnnnKOOO!O", &buffer, &self->ring_at, &self->ring_end, &self->events_at, &self->guard,
                          &clock, &store, &PyDict_Type, &schedules, &part))
        return -1;
    if (self->data || PyObject_GetBuffer(buffer, &self->view, PyBUF_WRITABLE) < 0) return -1;
    if (self->ring_at < 0 || self->ring_end > self->view.len || self->events_at > self->view.len - 8 ||
        self->ring_end <= self->ring_at || (self->ring_end - self->ring_at) % RECORD) {
        PyBuffer_Release(&self->view);
        PyErr_SetString(PyExc_ValueError, "Tape: the ring does not lie in the buffer");
        return -1;
    }
    self->data = self->view.buf;
    self->next_at = self->ring_at;
    self->step = -1;
    self->clock = clock == Py_None ? NULL : Py_NewRef(clock);
    self->store = Py_NewRef(store);
    self->schedules = Py_NewRef(schedules);
    self->part = Py_NewRef(part);
    return 0;
}

static void tape_dealloc(PyObject *object) {
    Tape *self = (Tape *)object;
    if (self->data) PyBuffer_Release(&self->view);
    Py_XDECREF(self->clock);
    Py_XDECREF(self->noted);
    Py_XDECREF(self->store);
    Py_XDECREF(self->schedules);
    Py_XDECREF(self->part);
    Py_XDECREF(self->progress);
    Py_XDECREF(self->sizes);
    Py_TYPE(object)->tp_free(object);
}

static int tape_now(Tape *self, uint64_t *now) {
    if (self->clock) {
        PyObject *value = PyObject_CallNoArgs(self->clock);
        *now = value ? PyLong_AsUnsignedLongLong(value) : 0;
        Py_XDECREF(value);
        return PyErr_Occurred() ? -1 : 0;
    }
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    *now = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    return 0;
}

/* One aligned 8-byte store, which a reader never sees half-written, after all stores before it. */
static void tape_publish(Tape *self, Py_ssize_t at, uint64_t value) {
    __atomic_store_n((uint64_t *)(self->data + at), value * self->guard, __ATOMIC_RELEASE);
}

/* Write the next record of the ring; return where it is. */
static uint8_t *tape_write(Tape *self, const uint8_t *fixed, uint32_t check, uint64_t now, uint64_t seq,
                           uint64_t vector, uint32_t hash) {
    uint8_t record[RECORD], *at = self->data + self->next_at;
    const uint64_t row[5] = {++self->num_events, now, seq, vector, (uint64_t)self->step};
    memcpy(record, fixed, FIXED);
    memcpy(record + FIXED, row, sizeof row);
    memcpy(record + FIXED + sizeof row, &hash, sizeof hash);
    check = crc32(record + FIXED, ROW, check);
    memcpy(record + FIXED + ROW, &check, sizeof check);
    memcpy(at, record, RECORD);
    self->next_at += RECORD;
    if (self->next_at == self->ring_end) self->next_at = self->ring_at;
    return at;
}

/* Find what the record of a call says about its sizes: one size itself, several as the offset of their vector. */
static int tape_vector(Tape *self, PyObject *sizes, uint64_t *vector) {
    if (PyTuple_GET_SIZE(sizes) == 1) {
        *vector = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(sizes, 0));
        return PyErr_Occurred() ? -1 : 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes); i++)
        if (!PyLong_CheckExact(PyTuple_GET_ITEM(sizes, i))) { /* to compare other objects may run Python code */
            PyErr_SetString(PyExc_TypeError, "vector: a size is an int");
            return -1;
        }
    int equal = self->sizes ? PyObject_RichCompareBool(self->sizes, sizes, Py_EQ) : 0;
    if (equal) {
        *vector = self->sizes_at;
        return equal < 0 ? -1 : 0;
    }
    PyObject *offset = PyObject_CallOneArg(self->store, sizes); /* another thread may store others meanwhile */
    if (!offset) return -1;
    *vector = PyLong_AsUnsignedLongLong(offset);
    Py_DECREF(offset);
    if (PyErr_Occurred()) return -1;
    if (*vector != UINT64_MAX) { /* repro.trace.witness.format.NO_VECTOR */
        self->sizes_at = *vector;
        Py_XSETREF(self->sizes, Py_NewRef(sizes));
    }
    return 0;
}

/* Record that a call is issued. Returns its number in the group; 0 with an exception if the clock failed. */
static uint64_t tape_enter(Tape *self, Call *call, int asynchronous, uint64_t vector) {
    Group *group = call->group;
    int kind = asynchronous ? ISSUE : ENTER;
    uint64_t now;
    if (tape_now(self, &now) < 0) return 0;
    uint64_t seq = ++group->seq;
    group->hash = crc32(call->digest, sizeof call->digest, group->hash);
    const uint8_t *at = tape_write(self, call->fixed[kind], call->check[kind], now, seq, vector, group->hash);
    memcpy(self->data + group->last, at, RECORD);
    tape_publish(self, self->events_at, self->num_events);
    if (self->noted && PyList_GET_SIZE(self->noted) < MAX_NOTED && PyList_Append(self->noted, call->entry) < 0)
        PyErr_Clear();
    return seq;
}

/* Record the completion of a call. */
static int tape_leave(Tape *self, Call *call, uint64_t seq) {
    Group *group = call->group;
    uint64_t now;
    if (tape_now(self, &now) < 0) return -1;
    tape_write(self, call->fixed[LEAVE], call->check[LEAVE], now, seq, 0, 0);
    if (seq > group->left) {
        group->left = seq;
        tape_publish(self, group->left_word * 8, seq);
    }
    tape_publish(self, self->events_at, self->num_events);
    return 0;
}

/* Record the wait for a call, or an event that belongs to no call. */
static int tape_append(Tape *self, const uint8_t *fixed, uint32_t check, uint64_t seq) {
    uint64_t now;
    if (tape_now(self, &now) < 0) return -1;
    tape_write(self, fixed, check, now, seq, 0, 0);
    tape_publish(self, self->events_at, self->num_events);
    return 0;
}

/* Record that a step begins, and its schedule. A schedule that is not known yet is asked for: that runs Python code. */
static int tape_begin_step(Tape *self, long long step, PyObject *schedule, Py_ssize_t live) {
    PyObject *key = Py_BuildValue("(Nnl)", PyLong_FromVoidPtr(schedule), live, self->phase), *part = NULL;
    PyObject *known = key ? PyDict_GetItemWithError(self->schedules, key) : NULL;
    Py_XDECREF(key);
    if (known && PyTuple_Check(known) && PyTuple_GET_SIZE(known) == 2 && PyTuple_GET_ITEM(known, 0) == schedule)
        part = Py_NewRef(PyTuple_GET_ITEM(known, 1));
    else if (!PyErr_Occurred())
        part = PyObject_CallFunction(self->part, "Onl", schedule, live, self->phase);
    const char *fixed;
    Py_ssize_t size;
    unsigned int check;
    int failed = !part || !PyArg_ParseTuple(part, "y#I", &fixed, &size, &check) || size != FIXED;
    if (!failed) {
        self->step = step;
        failed = tape_append(self, (const uint8_t *)fixed, check, 0);
    }
    Py_XDECREF(part);
    if (failed && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "begin_step: a part of a record has 24 bytes");
    return failed ? -1 : 0;
}

static PyObject *tape_begin_step_py(PyObject *self, PyObject *args) {
    long long step;
    PyObject *schedule;
    Py_ssize_t live;
    if (!PyArg_ParseTuple(args, "LOn", &step, &schedule, &live)) return NULL;
    return tape_begin_step((Tape *)self, step, schedule, live) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *tape_enter_py(PyObject *self, PyObject *args) {
    PyObject *call;
    int asynchronous;
    unsigned long long vector;
    if (!PyArg_ParseTuple(args, "O!pK", &CallType, &call, &asynchronous, &vector)) return NULL;
    uint64_t seq = tape_enter((Tape *)self, (Call *)call, asynchronous, vector);
    return seq ? PyLong_FromUnsignedLongLong(seq) : NULL;
}

static PyObject *tape_leave_py(PyObject *self, PyObject *args) {
    PyObject *call;
    unsigned long long seq;
    if (!PyArg_ParseTuple(args, "O!K", &CallType, &call, &seq)) return NULL;
    return tape_leave((Tape *)self, (Call *)call, seq) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *tape_wait_py(PyObject *self, PyObject *args) {
    PyObject *object;
    unsigned long long seq;
    if (!PyArg_ParseTuple(args, "O!K", &CallType, &object, &seq)) return NULL;
    Call *call = (Call *)object;
    return tape_append((Tape *)self, call->fixed[WAIT], call->check[WAIT], seq) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *tape_append_py(PyObject *self, PyObject *args) {
    const char *fixed;
    Py_ssize_t size;
    unsigned int check;
    unsigned long long seq;
    if (!PyArg_ParseTuple(args, "y#IK", &fixed, &size, &check, &seq)) return NULL;
    if (size != FIXED) return PyErr_Format(PyExc_ValueError, "append: the first part of a record has 24 bytes");
    return tape_append((Tape *)self, (const uint8_t *)fixed, check, seq) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *tape_vector_py(PyObject *self, PyObject *sizes) {
    uint64_t vector;
    if (!PyTuple_Check(sizes)) return PyErr_Format(PyExc_TypeError, "vector: the sizes are a tuple");
    return tape_vector((Tape *)self, sizes, &vector) < 0 ? NULL : PyLong_FromUnsignedLongLong(vector);
}

static PyObject *tape_get_noted(PyObject *self, void *Py_UNUSED(closure)) {
    PyObject *noted = ((Tape *)self)->noted;
    return Py_NewRef(noted ? noted : Py_None);
}

static int tape_set_noted(PyObject *self, PyObject *value, void *Py_UNUSED(closure)) {
    if (!value || (value != Py_None && !PyList_CheckExact(value))) {
        PyErr_SetString(PyExc_TypeError, "noted is a list or None");
        return -1;
    }
    Py_XSETREF(((Tape *)self)->noted, value == Py_None ? NULL : Py_NewRef(value));
    return 0;
}

static PyMethodDef tape_methods[] = {
    {"enter", tape_enter_py, METH_VARARGS, "enter(call, asynchronous, vector) -> the number of the call in its group"},
    {"leave", tape_leave_py, METH_VARARGS, "leave(call, seq)"},
    {"wait", tape_wait_py, METH_VARARGS, "wait(call, seq)"},
    {"vector", tape_vector_py, METH_O, "vector(sizes) -> the argument `vector` of `enter` for these sizes"},
    {"begin_step", tape_begin_step_py, METH_VARARGS, "begin_step(step, schedule, number of live requests)"},
    {"append", tape_append_py, METH_VARARGS, "append(fixed, check, seq)"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef tape_members[] = {
    {"step", T_LONGLONG, offsetof(Tape, step), 0, NULL},
    {"phase", T_LONG, offsetof(Tape, phase), 0, NULL},
    {"num_events", T_ULONGLONG, offsetof(Tape, num_events), READONLY, NULL},
    {"progress", T_OBJECT, offsetof(Tape, progress), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef tape_getset[] = {
    {"noted", tape_get_noted, tape_set_noted, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject TapeType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Tape",
    .tp_basicsize = sizeof(Tape),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = tape_init,
    .tp_dealloc = tape_dealloc,
    .tp_methods = tape_methods,
    .tp_members = tape_members,
    .tp_getset = tape_getset,
};
