/* What the loops in C share: FUSE's headers, a call of Python's handlers, and what came of it. */
#ifndef SERVING_H
#define SERVING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>

#ifdef Py_GIL_DISABLED
#error "what is shared here is guarded by the interpreter's lock: free-threaded builds serve in Python"
#endif

#define OPCODES 64

/* From linux/fuse.h. */
struct in_header {
	uint32_t len, opcode;
	uint64_t unique, nodeid;
	uint32_t uid, gid, pid;
	uint16_t total_extlen, padding;
};
struct out_header {
	uint32_t len;
	int32_t error;
	uint64_t unique;
};

/* The handler's reply to a request, or NULL with an exception. Steals `body`, which may be NULL. */
static inline PyObject *call_handler(PyObject *handlers, const struct in_header *in, PyObject *body)
{
	PyObject *arguments[6] = { NULL }, *result = NULL;
	int i;

	arguments[1] = PyLong_FromUnsignedLongLong(in->nodeid);
	arguments[2] = body;
	arguments[3] = PyLong_FromUnsignedLong(in->uid);
	arguments[4] = PyLong_FromUnsignedLong(in->gid);
	arguments[5] = PyLong_FromUnsignedLong(in->pid);
	if (arguments[1] && arguments[2] && arguments[3] && arguments[4] && arguments[5])
		result = PyObject_Vectorcall(PyList_GET_ITEM(handlers, in->opcode), arguments + 1,
					     5 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
	for (i = 1; i < 6; i++)
		Py_XDECREF(arguments[i]);
	return result;
}

/* The errno of the exception that is set, which is cleared; what isn't an OSError is told to `fault`,
 * which logs it with its traceback. */
static inline int failure(PyObject *fault, uint32_t opcode)
{
	PyObject *type, *value, *trace;
	int number = EIO;

	PyErr_Fetch(&type, &value, &trace);
	PyErr_NormalizeException(&type, &value, &trace);
	if (value && PyErr_GivenExceptionMatches(type, PyExc_OSError)) {
		PyObject *attribute = PyObject_GetAttrString(value, "errno");

		if (attribute && PyLong_Check(attribute))
			number = (int)PyLong_AsLong(attribute);
		Py_XDECREF(attribute);
		PyErr_Clear();
	} else {
		PyObject *done;

		if (trace && value)
			PyException_SetTraceback(value, trace);
		done = PyObject_CallFunction(fault, "IO", (unsigned)opcode, value ? value : Py_None);
		if (!done)
			PyErr_WriteUnraisable(fault);
		Py_XDECREF(done);
	}
	Py_XDECREF(type);
	Py_XDECREF(value);
	Py_XDECREF(trace);
	return number > 0 && number < 512 ? number : EIO;
}

/* Counts by opcode as a list. */
static inline PyObject *counts_list(const uint64_t *counts)
{
	PyObject *list = PyList_New(OPCODES);
	int i;

	for (i = 0; list && i < OPCODES; i++) {
		PyObject *number = PyLong_FromUnsignedLongLong(counts[i]);

		if (!number) {
			Py_CLEAR(list);
			break;
		}
		PyList_SET_ITEM(list, i, number);
	}
	return list;
}

#endif
