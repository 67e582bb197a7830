/* The hooks of torch's process groups, for the calls that programs make often.
 *
 * An Issue replaces a method of ProcessGroup, and does what `_recorded` in collectives.py does. A Wait replaces
 * Work.wait, and does what `_recorded_wait` does. For a call that they cannot read (unusual arguments, several tensors,
 * a coalescing block, a missing option), they call these two functions. All that may run Python code comes before
 * the event is written, because another thread can record an event while Python code runs.
 */

#include "steps.h"

/* -- the hooks ------------------------------------------------------------------------------------------------- */

static PyObject *issue_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    Issue *self = (Issue *)callable;
    Py_ssize_t count = PyVectorcall_NARGS(nargsf);
    State *mine = &state;
    /* pybind11 takes a method that is no function of C for an override of the program, and calls it where the original
     * calls itself, without end. It does not in a frame of the method's name, which the hooks of collectives.py have. */
    if (count && is_of_subclass(args[0])) return PyObject_Vectorcall(self->slow, args, nargsf, keywords);
    if (!is_recording || mine->inside || !count) return PyObject_Vectorcall(self->function, args, nargsf, keywords);
    Key key = {.method = self, .group = args[0], .layer = mine->layer ? mine->layer : str_empty,
               .phase = tape ? tape->phase : 0, .root = -1};
    uint64_t size = UINT64_MAX; /* repro.trace.witness.format.NO_VECTOR */
    Entry *entry = NULL;
    if (tape && !mine->coalesced && read_call(self, args, count, keywords, &key, &size) == 0) {
        entry = find(self, &key);
        if (!entry && !PyErr_Occurred()) entry = resolve(self, args, nargsf, keywords, &key);
    }
    Py_XDECREF((PyObject *)key.dtype);
    if (clear_own_error() < 0) return NULL; /* Ctrl-C before the call */
    Tape *file = tape;
    if (!entry || !file) return PyObject_Vectorcall(self->slow, args, nargsf, keywords);

    Call *call = (Call *)Py_NewRef((PyObject *)entry->call);
    int pollable = entry->pollable;
    Py_INCREF(file);
    uint64_t seq = tape_enter(file, call, (int)key.asynchronous, size);
    PyErr_Clear();
    mine->inside = 1;
    PyObject *work = PyObject_Vectorcall(self->function, args, nargsf, keywords);
    mine->inside = 0;
    if (work == Py_None) {
        if (tape_leave(file, call, seq) < 0) PyErr_Clear();
    } else if (work && !key.asynchronous) {
        remember(work, call, seq, 1, 0);
    } else if (work) {
        remember(work, call, seq, 0, pollable);
    }
    Py_DECREF(file);
    Py_DECREF(call);
    return work;
}

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original, *function, *slow;
} Wait;

static PyObject *wait_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *keywords) {
    Wait *self = (Wait *)callable;
    PyObject *work = PyVectorcall_NARGS(nargsf) ? args[0] : NULL, *done;
    if ((is_recording && !tape) || (work && is_of_subclass(work)))
        return PyObject_Vectorcall(self->slow, args, nargsf, keywords);
    Issued one = work ? take(work) : (Issued){NULL};
    if (one.call) {
        if (!one.blocking && tape && tape_append(tape, one.call->fixed[WAIT], one.call->check[WAIT], one.seq) < 0)
            PyErr_Clear();
        done = PyObject_Vectorcall(self->function, args, nargsf, keywords);
        if (done && tape && tape_leave(tape, one.call, one.seq) < 0) PyErr_Clear();
        Py_DECREF(one.call);
        return done;
    }
    PyObject *entry = work && PyDict_GET_SIZE(pending) ? take_pending(work) : NULL;
    if (entry && tape && PyTuple_GET_ITEM(entry, 2) != Py_True) write_each(tape, PyTuple_GET_ITEM(entry, 1), WAIT);
    done = PyObject_Vectorcall(self->function, args, nargsf, keywords);
    if (entry && tape && done) write_each(tape, PyTuple_GET_ITEM(entry, 1), LEAVE);
    Py_XDECREF(entry);
    return done;
}

/* As a function does: an instance in a class is called with the object as its first argument. */
static PyObject *bind(PyObject *self, PyObject *object, PyObject *Py_UNUSED(type)) {
    return object ? PyMethod_New(self, object) : Py_NewRef(self);
}

static int issue_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(options)) {
    Issue *self = (Issue *)object;
    if (self->original || !PyArg_ParseTuple(args, "OOOipppp", &self->original, &self->slow, &self->resolve,
                                            &self->sized, &self->has_tensor, &self->rooted, &self->reduces,
                                            &self->one_sided))
        return -1;
    issue_complete(self, issue_call);
    return 0;
}

static int wait_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(options)) {
    Wait *self = (Wait *)object;
    if (self->original || !PyArg_ParseTuple(args, "OO", &self->original, &self->slow)) return -1;
    Py_INCREF(self->original);
    self->function = Py_NewRef(function_of(self->original));
    Py_INCREF(self->slow);
    self->vectorcall = wait_call;
    return 0;
}

static PyTypeObject IssueType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Issue",
    .tp_basicsize = sizeof(Issue),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_new = PyType_GenericNew,
    .tp_init = issue_init,
    .tp_vectorcall_offset = offsetof(Issue, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = bind,
    .tp_getattro = attribute_of,
};

static PyTypeObject WaitType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Wait",
    .tp_basicsize = sizeof(Wait),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_new = PyType_GenericNew,
    .tp_init = wait_init,
    .tp_vectorcall_offset = offsetof(Wait, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = bind,
    .tp_getattro = attribute_of,
};

static PyTypeObject OptionType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Option",
    .tp_basicsize = sizeof(Option),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = option_init,
    .tp_descr_get = option_get,
    .tp_descr_set = option_set,
    .tp_getattro = attribute_of,
};

/* -- the module ------------------------------------------------------------------------------------------------ */

static PyObject *record(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *object;
    int recording;
    if (!PyArg_ParseTuple(args, "pO", &recording, &object)) return NULL;
    is_recording = recording;
    Py_CLEAR(newest.owner);
    Py_XSETREF(tape, Py_IS_TYPE(object, &TapeType) ? (Tape *)Py_NewRef(object) : NULL);
    if (tape && tape != known_tape) {
        generation++;
        Py_XSETREF(known_tape, (Tape *)Py_NewRef(object));
    }
    Py_RETURN_NONE;
}

static PyObject *spill_all(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args)) {
    for (int i = 0; i < NUM_RECENT; i++) spill(&recent[i]);
    Py_RETURN_NONE;
}

/* within(layer, function, …): call function(…), and record `layer` with each collective that it issues. */
static PyObject *within(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count, PyObject *keywords) {
    if (count < 2 || !PyUnicode_CheckExact(args[0]))
        return PyErr_Format(PyExc_TypeError, "within: a name of a layer and a function are needed");
    return call_within(args[0], args[1], args + 2, count - 2, keywords);
}

static PyMethodDef functions[] = {
    {"record", record, METH_VARARGS,
     "record(recording, tape): set whether this process is a recorded rank, and its tape or None"},
    {"spill", spill_all, METH_NOARGS, "Move to `pending` all works for which the program has not waited yet."},
    {"within", (PyCFunction)(void (*)(void))within, METH_FASTCALL | METH_KEYWORDS,
     "within(layer, function, ...): call function(...), and record `layer` with each collective that it issues"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "hmr_record", .m_size = -1, .m_methods = functions,
};

PyMODINIT_FUNC PyInit_hmr_record(void) {
    struct {
        PyObject **place;
        const char *text;
    } names[] = {{&str_dtype, "dtype"}, {&str_numel, "numel"}, {&str_opts, "opts"}, {&str_sizes, "sizes"},
                 {&str_device_group, "device_group"}, {&str_empty, ""}, {&str_is_cpu, "is_cpu"}, {&str_tolist, "tolist"},
                 {&option_names[ASYNCHRONOUS], "asyncOp"}, {&option_names[ROOT], "rootRank"},
                 {&option_names[REDUCTION], "reduceOp"}};
    PyTypeObject *types[] = {&GroupType, &CallType, &TapeType, &ThreadType, &IssueType, &WaitType, &OptionType,
                             &ExchangeType, &ProgressType, &AgreementType};
    crc_prepare();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!(*names[i].place = PyUnicode_InternFromString(names[i].text))) return NULL;
    get_frame = Py_XNewRef(PySys_GetObject("_getframe"));
    pending = PyDict_New();
    PyObject *made = PyObject_CallFunction((PyObject *)&PyType_Type, "s(){}", "made");
    if (made) subclass = ((PyTypeObject *)made)->tp_dealloc;
    Py_XDECREF(made);
    PyObject *module = PyModule_Create(&definition);
    if (!made || !get_frame || !pending || !module || PyModule_AddObjectRef(module, "pending", pending) < 0) return NULL;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyModule_AddType(module, types[i]) < 0) return NULL;
    return module;
}
