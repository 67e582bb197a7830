/* The works (torch's objects for issued collectives) for which the program has not waited yet.
 *
 * The program waits for most works soon: these are only in the array `recent`. The other works move to the dict
 * `pending`, which takes more time, because it needs a tuple for each work.
 */

#include "read.h"

enum { NUM_RECENT = 64 };

static PyObject *pending; /* collectives._pending */

/* The collective of a work. */
typedef struct {
    Call *call;
    uint64_t seq;
    int blocking, pollable;
} Issued;

/* A work that was issued lately: its address, and a weak reference to it. */
typedef struct {
    PyObject *work, *reference;
    Issued issued;
} Recent;

static Recent recent[NUM_RECENT];

static Recent *recent_of(PyObject *work) {
    return &recent[((uintptr_t)work >> 4) * 0x9E3779B97F4A7C15u >> 58];
}

/* pending[id(work)] = (weak reference, ((call, seq),), blocking, pollable) */
static void to_pending(PyObject *work, PyObject *reference, const Issued *one) {
    PyObject *key = PyLong_FromVoidPtr(work);
    PyObject *value = Py_BuildValue("(O((OK))OO)", reference, one->call, (unsigned long long)one->seq,
                                    one->blocking ? Py_True : Py_False, one->pollable ? Py_True : Py_False);
    if (!key || !value || PyDict_SetItem(pending, key, value) < 0) PyErr_Clear();
    Py_XDECREF(key);
    Py_XDECREF(value);
}

/* Empty a slot into `pending`, unless the work is gone. */
static void spill(Recent *slot) {
    Recent old = *slot;
    memset(slot, 0, sizeof *slot); /* first, because the end of an object may run Python code */
    if (old.work && alive(old.reference) == old.work) to_pending(old.work, old.reference, &old.issued);
    Py_XDECREF(old.reference);
    Py_XDECREF(old.issued.call);
}

/* Remember a work until it is waited for. blocking: the program waits for it at once. */
static void remember(PyObject *work, Call *call, uint64_t seq, int blocking, int pollable) {
    PyObject *reference = PyWeakref_NewRef(work, NULL);
    if (!reference) {
        PyErr_Clear();
        return;
    }
    Recent *slot = recent_of(work);
    while (slot->work) spill(slot); /* which may run Python code that issues a collective */
    *slot = (Recent){work, reference, {(Call *)Py_NewRef((PyObject *)call), seq, blocking, pollable}};
    if (is_of_subclass(work)) spill(slot); /* `_recorded_wait` looks into `pending` only */
}

/* Take a work that a thread issued lately. The caller owns the call, if there is one. */
static Issued take(PyObject *work) {
    Recent *slot = recent_of(work);
    if (work != slot->work || alive(slot->reference) != work) return (Issued){NULL};
    Recent taken = *slot;
    memset(slot, 0, sizeof *slot);
    Py_DECREF(taken.reference);
    return taken.issued;
}

/* Take a work out of `pending`. Returns its tuple, or NULL. */
static PyObject *take_pending(PyObject *work) {
    PyObject *key = PyLong_FromVoidPtr(work);
    PyObject *entry = key ? Py_XNewRef(PyDict_GetItemWithError(pending, key)) : NULL;
    if (entry) PyDict_DelItem(pending, key);
    Py_XDECREF(key);
    PyErr_Clear();
    if (entry && alive(PyTuple_GET_ITEM(entry, 0)) != work) Py_CLEAR(entry);
    return entry;
}

/* Write the waits (kind WAIT) or the completions (LEAVE) of the calls of a pending work. */
static void write_each(Tape *mine, PyObject *calls, int kind) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(calls); i++) {
        PyObject *pair = PyTuple_GET_ITEM(calls, i);
        Call *call = (Call *)PyTuple_GET_ITEM(pair, 0);
        uint64_t seq = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(pair, 1));
        int failed = !Py_IS_TYPE(call, &CallType);
        if (!failed && kind == WAIT) failed = tape_append(mine, call->fixed[WAIT], call->check[WAIT], seq);
        if (!failed && kind == LEAVE) failed = tape_leave(mine, call, seq);
        if (failed) PyErr_Clear();
    }
}
