/* The device transport's loop in C: read a request, call its handler, write the answer.
 *
 * One thread's, on a descriptor of its own; it does what device.py's loop in Python does, in a few
 * microseconds less.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define OPCODES 64
#define WRITE 16
#define HEADER sizeof(struct in_header)

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

typedef struct {
	PyObject_HEAD
	int fd;
	size_t size;
	PyObject *handlers, *later, *fault;
	uint64_t counts[OPCODES];
} Device;

static void reply(Device *self, uint64_t unique, int error, const char *body, size_t length)
{
	struct out_header out = { (uint32_t)(sizeof out + length), -error, unique };
	struct iovec parts[2] = { { &out, sizeof out }, { (void *)body, length } };
	ssize_t written;
	int number;

	Py_BEGIN_ALLOW_THREADS
	written = writev(self->fd, parts, length ? 2 : 1);
	number = errno;
	Py_END_ALLOW_THREADS
	if (written < 0 && number != ENOENT && number != ENODEV && number != ENOTCONN) {
		PyObject *done = PyObject_CallFunction(self->fault, "iO", number, Py_None);

		if (!done)
			PyErr_WriteUnraisable(self->fault);
		Py_XDECREF(done);
	}
}

/* The errno of the exception that is set, which is cleared; what isn't an OSError is told of. */
static int failure(Device *self, uint32_t opcode)
{
	PyObject *type, *value, *trace, *number = NULL;
	int error = EIO;

	PyErr_Fetch(&type, &value, &trace);
	PyErr_NormalizeException(&type, &value, &trace);
	if (value && PyErr_GivenExceptionMatches(type, PyExc_OSError)) {
		number = PyObject_GetAttrString(value, "errno");
		if (number && PyLong_Check(number))
			error = (int)PyLong_AsLong(number);
		PyErr_Clear();
	} else {
		PyObject *done;

		if (value && trace)
			PyException_SetTraceback(value, trace);
		done = PyObject_CallFunction(self->fault, "IO", (unsigned)opcode, value ? value : Py_None);
		if (!done)
			PyErr_WriteUnraisable(self->fault);
		Py_XDECREF(done);
	}
	Py_XDECREF(number);
	Py_XDECREF(type);
	Py_XDECREF(value);
	Py_XDECREF(trace);
	return error > 0 && error < 512 ? error : EIO;
}

static PyObject *call(Device *self, const struct in_header *in, const char *body, size_t length)
{
	PyObject *arguments[6] = { NULL }, *result = NULL;
	int i;

	if (in->opcode >= (uint32_t)PyList_GET_SIZE(self->handlers)) {
		errno = ENOSYS;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	arguments[1] = PyLong_FromUnsignedLongLong(in->nodeid);
	/* What is written isn't copied: the handler is done with it when it returns. */
	arguments[2] = in->opcode == WRITE ?
		PyMemoryView_FromMemory((char *)body, (Py_ssize_t)length, PyBUF_READ) :
		PyBytes_FromStringAndSize(body, (Py_ssize_t)length);
	arguments[3] = PyLong_FromUnsignedLong(in->uid);
	arguments[4] = PyLong_FromUnsignedLong(in->gid);
	arguments[5] = PyLong_FromUnsignedLong(in->pid);
	if (arguments[1] && arguments[2] && arguments[3] && arguments[4] && arguments[5])
		result = PyObject_Vectorcall(PyList_GET_ITEM(self->handlers, in->opcode), arguments + 1,
					     5 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
	for (i = 1; i < 6; i++)
		Py_XDECREF(arguments[i]);
	return result;
}

/* Called with the interpreter's lock. */
static void serve(Device *self, const char *request, size_t length)
{
	struct in_header in;
	PyObject *answer;

	memcpy(&in, request, HEADER);
	if (in.opcode < OPCODES)
		self->counts[in.opcode]++;
	answer = call(self, &in, request + HEADER, length - HEADER);
	if (!answer) {
		reply(self, in.unique, failure(self, in.opcode), NULL, 0);
		return;
	}
	if (PyBytes_CheckExact(answer)) {
		reply(self, in.unique, 0, PyBytes_AS_STRING(answer), (size_t)PyBytes_GET_SIZE(answer));
	} else if (answer != Py_None) {
		PyObject *handed = PyObject_CallFunction(self->later, "KIO", (unsigned long long)in.unique,
							 (unsigned)in.pid, answer);

		if (!handed)
			reply(self, in.unique, failure(self, in.opcode), NULL, 0);
		Py_XDECREF(handed);
	}
	Py_DECREF(answer);
}

PyDoc_STRVAR(run_doc,
"run()\n\n"
"Serve in this thread until the connection is over; returns the errno with which reading ended\n"
"(ENODEV at an unmount).");

static PyObject *Device_run(Device *self, PyObject *Py_UNUSED(ignored))
{
	char *buffer = malloc(self->size);
	int number = 0;

	if (!buffer)
		return PyErr_NoMemory();
	Py_BEGIN_ALLOW_THREADS
	while (!number) {
		ssize_t length = read(self->fd, buffer, self->size);

		if (length >= (ssize_t)HEADER) {
			Py_BLOCK_THREADS
			serve(self, buffer, (size_t)length);
			Py_UNBLOCK_THREADS
		} else if (length < 0 && errno != EINTR && errno != ENOENT && errno != EAGAIN) {
			number = errno; /* ENOENT: a request was interrupted while it was handed over */
		}
	}
	Py_END_ALLOW_THREADS
	free(buffer);
	return PyLong_FromLong(number);
}

PyDoc_STRVAR(counts_doc, "counts() -> list[int]\n\nRequests served, by opcode.");

static PyObject *Device_counts(Device *self, PyObject *Py_UNUSED(ignored))
{
	PyObject *list = PyList_New(OPCODES);
	int i;

	for (i = 0; list && i < OPCODES; i++) {
		PyObject *number = PyLong_FromUnsignedLongLong(self->counts[i]);

		if (!number) {
			Py_CLEAR(list);
			break;
		}
		PyList_SET_ITEM(list, i, number);
	}
	return list;
}

static int Device_init(Device *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "fd", "size", "handlers", "later", "fault", NULL };
	PyObject *handlers, *later, *fault;
	Py_ssize_t size;

	if (self->handlers) {
		PyErr_SetString(PyExc_RuntimeError, "made already");
		return -1;
	}
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "inO!OO", names, &self->fd, &size,
					 &PyList_Type, &handlers, &later, &fault))
		return -1;
	self->size = (size_t)size;
	self->handlers = Py_NewRef(handlers);
	self->later = Py_NewRef(later);
	self->fault = Py_NewRef(fault);
	return 0;
}

static int Device_traverse(Device *self, visitproc visit, void *arg)
{
	Py_VISIT(self->handlers);
	Py_VISIT(self->later);
	Py_VISIT(self->fault);
	return 0;
}

static int Device_clear(Device *self)
{
	Py_CLEAR(self->handlers);
	Py_CLEAR(self->later);
	Py_CLEAR(self->fault);
	return 0;
}

static void Device_dealloc(Device *self)
{
	PyObject_GC_UnTrack(self);
	Device_clear(self);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef Device_methods[] = {
	{ "run", (PyCFunction)Device_run, METH_NOARGS, run_doc },
	{ "counts", (PyCFunction)Device_counts, METH_NOARGS, counts_doc },
	{ NULL },
};

static PyTypeObject DeviceType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "sdeefs.transports._device.Device",
	.tp_doc = PyDoc_STR("Device(fd, size, handlers, later, fault)"),
	.tp_basicsize = sizeof(Device),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.tp_new = PyType_GenericNew,
	.tp_init = (initproc)Device_init,
	.tp_dealloc = (destructor)Device_dealloc,
	.tp_traverse = (traverseproc)Device_traverse,
	.tp_clear = (inquiry)Device_clear,
	.tp_methods = Device_methods,
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "sdeefs.transports._device",
	.m_doc = PyDoc_STR("The loop over /dev/fuse."),
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__device(void)
{
	PyObject *made;

	if (PyType_Ready(&DeviceType) < 0)
		return NULL;
	made = PyModule_Create(&module);
	if (made && PyModule_AddObjectRef(made, "Device", (PyObject *)&DeviceType) < 0)
		Py_CLEAR(made);
	return made;
}
