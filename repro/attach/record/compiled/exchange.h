/* The hook of a method that exchanges rows between ranks, for example vLLM's all_gatherv.
 *
 * Such a method belongs to a class of the program: method(self, rows, …, sizes), where sizes has the number of rows of
 * each rank, or is None. A call is recorded as one blocking collective, whatever collectives the method issues.
 */

#include "works.h"

typedef struct {
    Issue issue;
    Py_ssize_t sizes_at; /* the position of the sizes in the arguments, if they are given by position */
} Exchange;

static PyObject *str_sizes, *str_device_group;

/* Read everything but the call site. Returns -1, also with an exception, for a call of a shape that is not known. */
static int read_exchange(const Exchange *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords, Key *key,
                         uint64_t *vector) {
    PyObject *sizes = count > self->sizes_at ? args[self->sizes_at] : Py_None;
    for (Py_ssize_t i = 0; keywords && i < PyTuple_GET_SIZE(keywords); i++)
        if (PyTuple_GET_ITEM(keywords, i) == str_sizes) sizes = args[count + i]; /* names of arguments are interned */
    PyObject *rows = Py_XNewRef(first_of(args[1])); /* a tensor of a mode or a subclass runs Python code */
    key->dtype = rows ? PyObject_GetAttr(rows, str_dtype) : NULL;
    Py_XDECREF(rows);
    if (!key->dtype || !tape) return -1;
    key->root = 0; /* here: the number of sizes */
    if (sizes == Py_None) return 0;
    PyObject *tuple = PyList_CheckExact(sizes) || PyTuple_CheckExact(sizes) ? PySequence_Tuple(sizes) : NULL;
    if (!tuple) return -1;
    key->root = PyTuple_GET_SIZE(tuple);
    Tape *file = (Tape *)Py_NewRef((PyObject *)tape);
    int failed = tape_vector(file, tuple, vector);
    Py_DECREF(file);
    Py_DECREF(tuple);
    return failed;
}

static PyObject *exchange_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    Exchange *self = (Exchange *)callable;
    Py_ssize_t count = PyVectorcall_NARGS(nargsf);
    State *mine = &state;
    if (!is_recording || mine->inside) return PyObject_Vectorcall(self->issue.function, args, nargsf, keywords);
    PyObject *group = tape && count > 1 ? PyObject_GetAttr(args[0], str_device_group) : NULL;
    Key key = {.method = self, .group = group, .layer = mine->layer ? mine->layer : str_empty,
               .phase = tape ? tape->phase : 0};
    uint64_t vector = UINT64_MAX; /* repro.trace.witness.format.NO_VECTOR */
    Entry *entry = NULL;
    if (tape && group && read_exchange(self, args, count, keywords, &key, &vector) == 0) {
        entry = find(&self->issue, &key);
        if (!entry && !PyErr_Occurred()) entry = resolve(&self->issue, args, nargsf, keywords, &key);
    }
    Py_XDECREF((PyObject *)key.dtype);
    Py_XDECREF(group); /* the coordinator holds it */
    if (clear_own_error() < 0) return NULL; /* Ctrl-C before the call */
    Tape *file = tape;
    if (!entry || !file) return PyObject_Vectorcall(self->issue.slow, args, nargsf, keywords);

    Call *call = (Call *)Py_NewRef((PyObject *)entry->call);
    Py_INCREF(file);
    uint64_t seq = tape_enter(file, call, 0, vector);
    PyErr_Clear();
    mine->inside = 1;
    PyObject *result = PyObject_Vectorcall(self->issue.function, args, nargsf, keywords);
    mine->inside = 0;
    if (result && tape_leave(file, call, seq) < 0) PyErr_Clear();
    Py_DECREF(file);
    Py_DECREF(call);
    return result;
}

/* Exchange(original, slow, resolve, sizes_at) */
static int exchange_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(keywords)) {
    Exchange *self = (Exchange *)object;
    Issue *issue = &self->issue;
    if (issue->original ||
        !PyArg_ParseTuple(args, "OOOn", &issue->original, &issue->slow, &issue->resolve, &self->sizes_at))
        return -1;
    issue_complete(issue, exchange_call);
    return 0;
}

static PyTypeObject ExchangeType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Exchange",
    .tp_basicsize = sizeof(Exchange),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = PyType_GenericNew,
    .tp_init = exchange_init,
    .tp_vectorcall_offset = offsetof(Exchange, issue.vectorcall),
    .tp_call = PyVectorcall_Call,
};
