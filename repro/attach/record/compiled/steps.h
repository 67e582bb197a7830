/* The steps of a vLLM worker, and the hook of its step agreement: the hot path of repro.attach.vllm.worker.
 *
 * If the worker's last execution issued what the worker had declared, there is nothing to learn. Then this hook begins
 * the next step, and declares the schedule that the worker has learned for the kind of step on which the ranks agree.
 * After any other execution, this hook calls the hook in Python. In the usual case no Python function runs, because at
 * some depths of the stack each call of a Python function takes 10 us: CPython maps memory for its frame.
 */

#include "exchange.h"

enum { NUM_ROWS = 4, MICROBATCHES = 2, MODES = 3 }; /* the rows of an agreement, see worker._agreed_key */

static PyObject *str_is_cpu, *str_tolist;

/* Call a function, while this thread runs the layer. */
static PyObject *call_within(PyObject *name, PyObject *function, PyObject *const *args, size_t nargsf,
                             PyObject *keywords) {
    State *mine = &state;
    PyObject *outer = mine->layer, *layer = Py_NewRef(name);
    PyUnicode_InternInPlace(&layer); /* equal names become one object, because the memo compares identities */
    mine->layer = layer;
    PyObject *result = PyObject_Vectorcall(function, args, nargsf, keywords);
    Py_XSETREF(mine->layer, outer);
    return result;
}

/* -- repro.attach.vllm.progress.Progress ----------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *phase, *agreement, *plans; /* never NULL */
    PyObject *kind, *expected;            /* NULL: None */
    long long step;
    Py_ssize_t live;
    char executing, begun;
} Progress;

static PyObject *progress_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(keywords)) {
    Progress *self = PyArg_ParseTuple(args, "") ? (Progress *)type->tp_alloc(type, 0) : NULL;
    if (!self) return NULL;
    self->phase = Py_NewRef(str_empty);
    self->agreement = PyTuple_New(0);
    self->plans = PyDict_New();
    self->step = -1;
    if (!self->agreement || !self->plans) Py_CLEAR(self);
    return (PyObject *)self;
}

/* A deleted attribute would be NULL. */
static int progress_set(PyObject *self, PyObject *name, PyObject *value) {
    if (value) return PyObject_GenericSetAttr(self, name, value);
    PyErr_SetString(PyExc_TypeError, "Progress: an attribute cannot be deleted");
    return -1;
}

static void progress_dealloc(PyObject *object) {
    Progress *self = (Progress *)object;
    Py_XDECREF(self->phase);
    Py_XDECREF(self->agreement);
    Py_XDECREF(self->kind);
    Py_XDECREF(self->expected);
    Py_XDECREF(self->plans);
    Py_TYPE(object)->tp_free(object);
}

static PyMemberDef progress_members[] = {
    {"phase", T_OBJECT, offsetof(Progress, phase), 0, NULL},
    {"step", T_LONGLONG, offsetof(Progress, step), 0, NULL},
    {"live", T_PYSSIZET, offsetof(Progress, live), 0, NULL},
    {"executing", T_BOOL, offsetof(Progress, executing), 0, NULL},
    {"begun", T_BOOL, offsetof(Progress, begun), 0, NULL},
    {"agreement", T_OBJECT, offsetof(Progress, agreement), 0, NULL},
    {"kind", T_OBJECT, offsetof(Progress, kind), 0, NULL},
    {"expected", T_OBJECT, offsetof(Progress, expected), 0, NULL},
    {"plans", T_OBJECT, offsetof(Progress, plans), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject ProgressType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Progress",
    .tp_basicsize = sizeof(Progress),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = progress_new,
    .tp_setattro = progress_set,
    .tp_dealloc = progress_dealloc,
    .tp_members = progress_members,
};

/* -- the hook of the agreement --------------------------------------------------------------------------------- */

static int declare(Tape *file, Progress *now, PyObject *schedule) {
    return tape_begin_step(file, now->step, schedule, now->executing ? now->live : 0);
}

/* Begin a step. Returns 0 if only Python can, because there is something to learn from the step before; -1 with an
 * error of the program. */
static int begin_step(Tape *file, Progress *now) {
    PyObject *issued = file->noted;
    if (!issued || !now->expected || !PyList_CheckExact(now->expected)) return 0;
    int equal = PyObject_RichCompareBool(issued, now->expected, Py_EQ);
    if (equal <= 0 || PyList_SetSlice(issued, 0, PyList_GET_SIZE(issued), NULL) < 0) return clear_own_error();
    Py_CLEAR(now->kind);
    Py_CLEAR(now->expected);
    now->begun = 1;
    now->step++;
    PyObject *agreement = Py_NewRef(now->agreement);
    int failed = declare(file, now, agreement) < 0 && clear_own_error() < 0;
    Py_DECREF(agreement);
    return failed ? -1 : 1;
}

/* Find the smallest number of a row of the agreement. Returns 0, also with an exception, if the row has no numbers, or
 * others than ints of 64 bits. */
static int smallest(PyObject *row, long *least) {
    if (!PyList_CheckExact(row) || !PyList_GET_SIZE(row)) return 0;
    *least = LONG_MAX;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(row); i++) {
        if (!PyLong_CheckExact(PyList_GET_ITEM(row, i))) return 0;
        long number = PyLong_AsLong(PyList_GET_ITEM(row, i));
        if (number == -1 && PyErr_Occurred()) return 0;
        if (number < *least) *least = number;
    }
    return 1;
}

/* The kind of a step, as worker.agreed names it. Returns NULL, also with an exception, for rows of another form. */
static PyObject *kind_of(Progress *now, PyObject *rows) {
    PyObject *is_cpu = PyObject_GetAttr(rows, str_is_cpu), *kind = NULL;
    PyObject *list = is_cpu == Py_True ? PyObject_CallMethodNoArgs(rows, str_tolist) : NULL;
    int is_list = list && PyList_CheckExact(list);
    long microbatch, mode;
    if (is_cpu == Py_False || (is_list && PyList_GET_SIZE(list) != NUM_ROWS)) {
        kind = Py_BuildValue("(O)", now->phase);
    } else if (is_list && smallest(PyList_GET_ITEM(list, MICROBATCHES), &microbatch) &&
               smallest(PyList_GET_ITEM(list, MODES), &mode)) {
        kind = Py_BuildValue("(Oll)", now->phase, microbatch, mode);
    }
    Py_XDECREF(is_cpu);
    Py_XDECREF(list);
    return kind;
}

/* Declare the schedule of the step on which the ranks have agreed. Returns 0 if this kind has no plan or the recorder
 * fails; -1 with an error of the program. */
static int agreed(Tape *file, Progress *now, PyObject *rows) {
    PyObject *kind = kind_of(now, rows);
    PyObject *planned = kind ? Py_XNewRef(PyDict_GetItemWithError(now->plans, kind)) : NULL;
    int is_known = planned && PyTuple_CheckExact(planned) && PyTuple_GET_SIZE(planned) == 2;
    if (is_known) {
        PyObject *plan = PyTuple_GET_ITEM(planned, 0), *expected = PyTuple_GET_ITEM(planned, 1);
        Py_XSETREF(now->kind, Py_NewRef(kind));
        Py_XSETREF(now->expected, Py_NewRef(expected));
        if (PyObject_IsTrue(plan) > 0 && declare(file, now, plan) < 0) is_known = 0; /* Python reports why */
    }
    Py_XDECREF(planned);
    Py_XDECREF(kind);
    return clear_own_error() < 0 ? -1 : is_known;
}

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original, *slow, *declare, *layer;
} Agreement;

static PyObject *run_agreement(Agreement *self, Tape *file, Progress *now, PyObject *const *args, size_t nargsf,
                               PyObject *keywords) {
    if (now->executing && now->begun) { /* a layer of the model issues it */
        PyObject *layer = state.layer && PyUnicode_GET_LENGTH(state.layer) ? state.layer : self->layer;
        return call_within(layer, self->original, args, nargsf, keywords);
    }
    int begun = begin_step(file, now);
    if (begun < 0) return NULL;
    if (!begun) return PyObject_Vectorcall(self->slow, args, nargsf, keywords);
    PyObject *rows = call_within(self->layer, self->original, args, nargsf, keywords);
    if (!rows) return NULL;
    PyObject *none = agreed(file, now, rows) ? NULL : PyObject_CallOneArg(self->declare, rows);
    Py_XDECREF(none);
    if (PyErr_Occurred()) Py_CLEAR(rows);
    return rows;
}

static PyObject *agreement_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    Agreement *self = (Agreement *)callable;
    if (!is_recording) return PyObject_Vectorcall(self->original, args, nargsf, keywords);
    PyObject *progress = tape ? tape->progress : NULL;
    if (!progress || !Py_IS_TYPE(progress, &ProgressType))
        return PyObject_Vectorcall(self->slow, args, nargsf, keywords);
    Py_INCREF(progress);
    Tape *file = (Tape *)Py_NewRef((PyObject *)tape);
    PyObject *rows = run_agreement(self, file, (Progress *)progress, args, nargsf, keywords);
    Py_DECREF(file);
    Py_DECREF(progress);
    return rows;
}

/* Agreement(original, slow, declare, layer) */
static int agreement_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(keywords)) {
    Agreement *self = (Agreement *)object;
    if (self->original ||
        !PyArg_ParseTuple(args, "OOOU", &self->original, &self->slow, &self->declare, &self->layer))
        return -1;
    Py_INCREF(self->original); /* the hooks live as long as the process */
    Py_INCREF(self->slow);
    Py_INCREF(self->declare);
    Py_INCREF(self->layer);
    self->vectorcall = agreement_call;
    return 0;
}

static PyTypeObject AgreementType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Agreement",
    .tp_basicsize = sizeof(Agreement),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = PyType_GenericNew,
    .tp_init = agreement_init,
    .tp_vectorcall_offset = offsetof(Agreement, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_getattro = attribute_of,
};
