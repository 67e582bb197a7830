/* Read a call of a process group's method, and find out whether an equal call is already in the memo.
 *
 * Calls are equal if their method, group, call site, data type and module are the same objects, and if they have the
 * same root, the same reduction, the same phase of the rank, and are both asynchronous or both not. For a call that is
 * not in the memo, the hook calls `resolve` in collectives.py.
 */

#include "options.h"

enum { NOT_SIZED, FIRST_SIZED, SECOND_SIZED };
enum { MEMO_SIZE = 1024, NUM_DEPTHS = 4 };

static Tape *tape;          /* of the recorded rank; NULL: use the hooks of collectives.py */
static Tape *known_tape;    /* the tape to which the calls in the memo belong */
static unsigned generation; /* another one with each tape: what the memo has is of the past then */
static PyObject *get_frame; /* sys._getframe */
static PyObject *str_dtype, *str_numel, *str_opts, *str_empty;

/* -- the state of a thread ------------------------------------------------------------------------------------- */

typedef struct {
    int inside;          /* a replaced method runs; what it calls is not recorded again */
    PyObject *coalesced; /* NULL, or the calls of an open coalescing block */
    PyObject *layer;     /* NULL, or the module that runs */
} State;

static __thread State state;

typedef struct {
    PyObject_HEAD
} Thread;

static PyObject *thread_get_inside(PyObject *Py_UNUSED(self), void *Py_UNUSED(closure)) {
    return PyBool_FromLong(state.inside);
}

static int thread_set_inside(PyObject *Py_UNUSED(self), PyObject *value, void *Py_UNUSED(closure)) {
    state.inside = value && PyObject_IsTrue(value) > 0;
    return 0;
}

static PyObject *thread_get_coalesced(PyObject *Py_UNUSED(self), void *Py_UNUSED(closure)) {
    return Py_NewRef(state.coalesced ? state.coalesced : Py_None);
}

static int thread_set_coalesced(PyObject *Py_UNUSED(self), PyObject *value, void *Py_UNUSED(closure)) {
    Py_XSETREF(state.coalesced, value && value != Py_None ? Py_NewRef(value) : NULL);
    return 0;
}

static PyObject *thread_get_layer(PyObject *Py_UNUSED(self), void *Py_UNUSED(closure)) {
    return Py_NewRef(state.layer ? state.layer : str_empty);
}

static int thread_set_layer(PyObject *Py_UNUSED(self), PyObject *value, void *Py_UNUSED(closure)) {
    if (!value || !PyUnicode_CheckExact(value)) {
        PyErr_SetString(PyExc_TypeError, "the name of a layer is a string");
        return -1;
    }
    Py_INCREF(value); /* equal names become one object, because the memo compares identities */
    PyUnicode_InternInPlace(&value);
    Py_XSETREF(state.layer, value);
    return 0;
}

static PyGetSetDef thread_getset[] = {
    {"inside", thread_get_inside, thread_set_inside, NULL, NULL},
    {"coalesced", thread_get_coalesced, thread_set_coalesced, NULL, NULL},
    {"layer", thread_get_layer, thread_set_layer, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject ThreadType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hmr_record.Thread",
    .tp_basicsize = sizeof(Thread),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_getset = thread_getset,
};

/* -- the calls that are known ---------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original, *function, *slow, *resolve; /* function: what the original calls */
    int sized, has_tensor, rooted, reduces, one_sided;
    long depths[NUM_DEPTHS]; /* from the caller of the method to the call site, the depth found last first */
} Issue;

/* Complete a hook whose original, slow and resolve are set. The hooks live as long as the process. */
static void issue_complete(Issue *self, vectorcallfunc vectorcall) {
    Py_INCREF(self->original);
    self->function = Py_NewRef(function_of(self->original));
    Py_INCREF(self->slow);
    Py_INCREF(self->resolve);
    for (int i = 0; i < NUM_DEPTHS; i++) self->depths[i] = -1;
    self->vectorcall = vectorcall;
}

/* What tells one call from another. All pointers are compared only while an entry of the memo keeps them alive. The
 * reader of a call owns the data type, the caller of the method the rest. */
typedef struct {
    const void *method, *group, *code, *dtype, *layer;
    long instruction, root, reduction, asynchronous, phase;
} Key;

typedef struct {
    Key key;
    unsigned generation;
    int pollable;
    Call *call;
    PyObject *group, *code, *dtype, *layer; /* a weak reference to the group; strong ones to the others */
} Entry;

static Entry memo[MEMO_SIZE];

static Entry *slot_of(const Key *key) {
    uint64_t hash = 0, words[sizeof *key / sizeof(uint64_t)];
    memcpy(words, key, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) hash = (hash ^ words[i]) * 0x9E3779B97F4A7C15u;
    return &memo[hash >> 54];
}

static PyObject *alive(PyObject *reference) { /* borrowed */
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *object = NULL;
    if (PyWeakref_GetRef(reference, &object) <= 0) return NULL;
    Py_DECREF(object); /* the caller holds it, or compares its identity only */
    return object;
#else
    return PyWeakref_GetObject(reference);
#endif
}

static int is_known(const Entry *entry, const Key *key) {
    return entry->call && entry->generation == generation && !memcmp(&entry->key, key, sizeof *key) &&
           alive(entry->group) == key->group;
}

static int learn(Entry *entry, const Key *key, Call *call, int pollable, PyObject *group) {
    PyObject *reference = PyWeakref_NewRef(group, NULL);
    if (!reference) return -1;
    entry->key = *key;
    entry->generation = generation;
    entry->pollable = pollable;
    Py_XSETREF(entry->call, (Call *)Py_NewRef((PyObject *)call));
    Py_XSETREF(entry->group, reference);
    Py_XSETREF(entry->code, Py_NewRef((PyObject *)key->code));
    Py_XSETREF(entry->dtype, Py_XNewRef((PyObject *)key->dtype));
    Py_XSETREF(entry->layer, Py_XNewRef((PyObject *)key->layer));
    return 0;
}

/* -- reading a call -------------------------------------------------------------------------------------------- */

static PyObject *first_of(PyObject *tensors) { /* borrowed; NULL for an empty list */
    while (tensors && (PyList_CheckExact(tensors) || PyTuple_CheckExact(tensors)))
        tensors = Py_SIZE(tensors) ? PySequence_Fast_GET_ITEM(tensors, 0) : NULL;
    return tensors;
}

/* Read everything but the call site. Returns -1, also with an exception, for a call of a shape that is not known. */
static int read_call(const Issue *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords, Key *key,
                     uint64_t *size) {
    PyObject *first = count > 1 ? args[1] : NULL, *second = count > 2 ? args[2] : NULL;
    PyObject *options = count > 1 ? args[count - 1] : NULL;
    if (keywords && PyTuple_GET_SIZE(keywords)) {
        if (PyTuple_GET_SIZE(keywords) > 1 || PyUnicode_Compare(PyTuple_GET_ITEM(keywords, 0), str_opts)) return -1;
        options = args[count];
    }
    if (self->one_sided) {
        if (!second || !PyLong_CheckExact(second)) return -1;
        key->root = PyLong_AsLong(second);
        if (PyErr_Occurred()) return -1;
        key->asynchronous = 1;
    } else {
        if (!options) return -1;
        if (option_read(options, ASYNCHRONOUS, &key->asynchronous) < 0 ||
            (self->rooted && option_read(options, ROOT, &key->root) < 0) ||
            (self->reduces && option_read(options, REDUCTION, &key->reduction) < 0))
            return -1;
        if (options == newest.owner) Py_CLEAR(newest.owner); /* the caller still holds it */
    }
    if (!self->has_tensor) return PyErr_Occurred() ? -1 : 0;
    PyObject *tensor = Py_XNewRef(first_of(first)); /* a tensor of a mode or a subclass runs Python code */
    key->dtype = tensor ? PyObject_GetAttr(tensor, str_dtype) : NULL;
    Py_XDECREF(tensor);
    if (!key->dtype) return -1;
    if (self->sized != NOT_SIZED) {
        PyObject *sized = self->sized == FIRST_SIZED ? first : second;
        if (!sized) return -1;
        if (PyList_CheckExact(sized) || PyTuple_CheckExact(sized)) {
            if (Py_SIZE(sized) != 1) return -1;
            sized = PySequence_Fast_GET_ITEM(sized, 0);
        }
        Py_INCREF(sized);
        PyObject *number = PyObject_CallMethodNoArgs(sized, str_numel);
        *size = number ? PyLong_AsUnsignedLongLong(number) : 0;
        Py_XDECREF(number);
        Py_DECREF(sized);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* Complete the key by the frame at a depth. Returns -1 if there is none. The memo keeps the code alive, if it knows it. */
static int read_site(long depth, Key *key) {
    PyObject *number = PyLong_FromLong(depth), *frame = NULL;
    if (number) frame = PyObject_CallOneArg(get_frame, number);
    Py_XDECREF(number);
    if (!frame) return -1;
    PyObject *code = (PyObject *)PyFrame_GetCode((PyFrameObject *)frame);
    key->code = code;
    key->instruction = PyFrame_GetLasti((PyFrameObject *)frame);
    Py_DECREF(code); /* the caller's frame holds it */
    Py_DECREF(frame);
    return 0;
}

/* Find a known call at one of the depths where the method had its call sites. */
static Entry *find(Issue *self, Key *key) {
    for (int i = 0; i < NUM_DEPTHS && self->depths[i] >= 0; i++) {
        long depth = self->depths[i];
        if (read_site(depth, key) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_ValueError)) return NULL;
            PyErr_Clear(); /* fewer frames */
            continue;
        }
        Entry *entry = slot_of(key);
        if (is_known(entry, key)) {
            for (; i > 0; i--) self->depths[i] = self->depths[i - 1];
            self->depths[0] = depth;
            return entry;
        }
    }
    return NULL;
}

/* Ask `resolve` about the call. Returns NULL, with or without an exception, if it does not know it either. */
static Entry *resolve(Issue *self, PyObject *const *args, size_t nargsf, PyObject *keywords, Key *key) {
    unsigned asked = generation;
    PyObject *answer = PyObject_Vectorcall(self->resolve, args, nargsf & ~PY_VECTORCALL_ARGUMENTS_OFFSET, keywords);
    PyObject *call;
    long depth;
    int pollable;
    Entry *entry = NULL;
    if (answer && answer != Py_None && tape && asked == generation && /* no call across a change of the rank */
        key->phase == tape->phase &&                                   /* or of the phase */
        PyArg_ParseTuple(answer, "O!lp", &CallType, &call, &depth, &pollable) && read_site(depth, key) == 0) {
        int known = 0;
        for (int i = 0; i < NUM_DEPTHS; i++) known |= self->depths[i] == depth;
        if (!known) {
            memmove(self->depths + 1, self->depths, sizeof self->depths - sizeof *self->depths);
            self->depths[0] = depth;
        }
        entry = slot_of(key);
        if (learn(entry, key, (Call *)call, pollable, (PyObject *)key->group) < 0) entry = NULL;
    }
    Py_XDECREF(answer);
    return entry;
}
