/* The options of a call, as the program set them.
 *
 * Reading an option through torch's property takes 0.2 to 0.6 us, longer than writing an event. So an Option replaces
 * such a property, and notes the value when the program sets it. The values of one object of options are kept: the
 * newest. The hook of the call that gets this object uses these values, and does not read the properties.
 */

#include "tape.h"

enum { ASYNCHRONOUS, ROOT, REDUCTION, NUM_OPTIONS };

static int is_recording;    /* whether this process is a recorded rank */
static destructor subclass; /* how CPython ends the objects of every class that a class statement made */
static PyObject *option_names[NUM_OPTIONS];

/* One object for all threads, because one thread may change what another has set. */
static struct {
    PyObject *owner; /* NULL, or the options that the program set last */
    int is_known[NUM_OPTIONS];
    long values[NUM_OPTIONS];
} newest;

/* Whether the object is of a class of the program, whose attributes and methods may be others than torch's. */
static int is_of_subclass(PyObject *object) {
    return Py_TYPE(object)->tp_dealloc == subclass;
}

/* What an instance method calls; called directly, it saves a call and a tuple. */
static PyObject *function_of(PyObject *method) { /* borrowed */
    return PyInstanceMethod_Check(method) ? PyInstanceMethod_GET_FUNCTION(method) : method;
}

/* Clear an error of the recorder. Returns -1 for another one, such as Ctrl-C: the program must get it. */
static int clear_own_error(void) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return 0;
}

/* What all hooks begin with. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original;
} Hook;

/* Names and documentation are those of the original. */
static PyObject *attribute_of(PyObject *self, PyObject *name) {
    PyObject *value = PyObject_GenericGetAttr(self, name), *original = ((Hook *)self)->original;
    if (!original || (value ? value != Py_None : !PyErr_ExceptionMatches(PyExc_AttributeError))) return value;
    Py_XDECREF(value); /* None: the class has no documentation */
    PyErr_Clear();
    return PyObject_GetAttr(original, name);
}

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall; /* NULL; a Hook has it */
    PyObject *original, *get, *set;
    PyObject *constants; /* a tuple of the values that are known by identity, such as ReduceOp.SUM, by their number */
    int option;
} Option;

/* Option(property, name, constants) */
static int option_init(PyObject *object, PyObject *args, PyObject *Py_UNUSED(keywords)) {
    Option *self = (Option *)object;
    PyObject *property, *name, *constants;
    if (self->original ||
        !PyArg_ParseTuple(args, "O!UO!", &PyProperty_Type, &property, &name, &PyTuple_Type, &constants))
        return -1;
    while (self->option < NUM_OPTIONS && PyUnicode_Compare(name, option_names[self->option])) self->option++;
    if (self->option == NUM_OPTIONS) {
        PyErr_SetString(PyExc_ValueError, "Option: the hooks read no option of this name");
        return -1;
    }
    PyObject *get = PyObject_GetAttrString(property, "fget"), *set = PyObject_GetAttrString(property, "fset");
    if (!get || !set) return -1;
    self->get = Py_NewRef(function_of(get));
    self->set = Py_NewRef(function_of(set));
    Py_DECREF(get);
    Py_DECREF(set);
    self->constants = Py_NewRef(constants);
    self->original = Py_NewRef(property); /* the hooks live as long as the process */
    return 0;
}

static PyObject *option_get(PyObject *object, PyObject *owner, PyObject *Py_UNUSED(type)) {
    Option *self = (Option *)object;
    if (!owner) return Py_NewRef(object);
    if (owner == newest.owner) newest.is_known[self->option] = 0; /* a program may change the reduction that it got */
    return PyObject_CallOneArg(self->get, owner);
}

/* Remember the value of an option, if it is of a known type. */
static void option_remember(Option *self, PyObject *owner, PyObject *value) {
    int is_known = 0;
    long number = -1;
    if (self->option == REDUCTION) {
        Py_ssize_t count = PyTuple_GET_SIZE(self->constants);
        for (number = 0; number < count && PyTuple_GET_ITEM(self->constants, number) != value; number++) {}
        is_known = number < count;
    } else if (self->option == ASYNCHRONOUS ? PyBool_Check(value) : PyLong_CheckExact(value)) {
        number = PyLong_AsLong(value);
        is_known = number != -1 || !PyErr_Occurred();
        PyErr_Clear();
    }
    PyObject *older = newest.owner;
    if (older != owner) memset(newest.is_known, 0, sizeof newest.is_known);
    newest.owner = Py_NewRef(owner);
    newest.is_known[self->option] = is_known;
    newest.values[self->option] = number;
    Py_XDECREF(older); /* last, because it may run Python code */
}

static int option_set(PyObject *object, PyObject *owner, PyObject *value) {
    Option *self = (Option *)object;
    if (!value) return Py_TYPE(self->original)->tp_descr_set(self->original, owner, value);
    PyObject *args[] = {NULL, owner, value};
    PyObject *done = PyObject_Vectorcall(self->set, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    if (!done) return -1;
    Py_DECREF(done);
    if (is_recording && !is_of_subclass(owner)) option_remember(self, owner, value);
    else if (owner == newest.owner) newest.is_known[self->option] = 0;
    return 0;
}

/* Read an option of a call. Returns -1, also with an exception, if it is not of the known types. */
static int option_read(PyObject *options, int option, long *value) {
    if (options == newest.owner && newest.is_known[option]) {
        *value = newest.values[option];
        return 0;
    }
    PyObject *attribute = PyObject_GetAttr(options, option_names[option]);
    int is_valid = attribute && (option != ASYNCHRONOUS || PyBool_Check(attribute));
    if (is_valid) /* the hash of a reduction is its number */
        *value = option == REDUCTION ? (long)PyObject_Hash(attribute) : PyLong_AsLong(attribute);
    Py_XDECREF(attribute);
    return is_valid && !PyErr_Occurred() ? 0 : -1;
}
