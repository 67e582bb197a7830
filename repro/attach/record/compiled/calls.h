/* The groups and the calls of a witness, as repro.trace.recording.calls has them in Python: Group and Call. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "checksum.h"

enum { FIXED = 24, ROW = 44, RECORD = FIXED + ROW + 4 };
enum { ENTER, LEAVE, ISSUE, WAIT, NUM_KINDS };

/* -- repro.trace.recording.calls.Group -------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    unsigned long long seq, left;
    unsigned int hash;
    Py_ssize_t index, last, left_word;
} Group;

static int group_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(options)) {
    Group *self = (Group *)object;
    return PyArg_ParseTuple(args, "nnn", &self->index, &self->last, &self->left_word) ? 0 : -1;
}

static PyMemberDef group_members[] = {
    {"seq", T_ULONGLONG, offsetof(Group, seq), 0, NULL},
    {"left", T_ULONGLONG, offsetof(Group, left), 0, NULL},
    {"hash", T_UINT, offsetof(Group, hash), 0, NULL},
    {"index", T_PYSSIZET, offsetof(Group, index), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject GroupType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Group",
    .tp_basicsize = sizeof(Group),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = group_init,
    .tp_members = group_members,
};

/* -- repro.trace.recording.calls.Call ------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Group *group;
    PyObject *entry;
    Py_ssize_t num_sizes;
    uint8_t digest[4];
    uint8_t fixed[NUM_KINDS][FIXED];
    uint32_t check[NUM_KINDS];
} Call;

/* Call(group, digest, num_sizes, entry, ((fixed, check) of ENTER, LEAVE, ISSUE, WAIT)) */
static int call_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(options)) {
    Call *self = (Call *)object;
    PyObject *group, *entry;
    const char *digest, *fixed[NUM_KINDS];
    Py_ssize_t size, sizes[NUM_KINDS];
    if (!PyArg_ParseTuple(args, "O!y#nO((y#I)(y#I)(y#I)(y#I))", &GroupType, &group, &digest, &size, &self->num_sizes,
                          &entry, &fixed[0], &sizes[0], &self->check[0], &fixed[1], &sizes[1], &self->check[1],
                          &fixed[2], &sizes[2], &self->check[2], &fixed[3], &sizes[3], &self->check[3]))
        return -1;
    if (size != sizeof self->digest || self->group) {
        PyErr_SetString(PyExc_ValueError, "Call: the digest has four bytes, and a call is made once");
        return -1;
    }
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        if (sizes[kind] != FIXED) {
            PyErr_SetString(PyExc_ValueError, "Call: the first part of a record has 24 bytes");
            return -1;
        }
        memcpy(self->fixed[kind], fixed[kind], FIXED);
    }
    memcpy(self->digest, digest, sizeof self->digest);
    self->group = (Group *)Py_NewRef(group);
    self->entry = Py_NewRef(entry);
    return 0;
}

static void call_dealloc(PyObject *object) {
    Py_XDECREF(((Call *)object)->group);
    Py_XDECREF(((Call *)object)->entry);
    Py_TYPE(object)->tp_free(object);
}

static PyMemberDef call_members[] = {
    {"group", T_OBJECT_EX, offsetof(Call, group), READONLY, NULL},
    {"num_sizes", T_PYSSIZET, offsetof(Call, num_sizes), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject CallType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Call",
    .tp_basicsize = sizeof(Call),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = call_init,
    .tp_dealloc = call_dealloc,
    .tp_members = call_members,
};
