/* The device transport's loop in C: read a request, call its handler, write the answer.
 *
 * One thread's, on a descriptor of its own; it does what device.py's loop in Python does, in a few
 * microseconds less.
 */
#include "_serving.h"

#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define WRITE 16
#define HEADER sizeof(struct in_header)

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

static PyObject *ask(Device *self, const struct in_header *in, const char *body, Py_ssize_t length)
{
	if (in->opcode >= (uint32_t)PyList_GET_SIZE(self->handlers)) {
		errno = ENOSYS;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	/* What is written isn't copied: the handler is done with it when it returns. */
	return call_handler(self->handlers, in,
			    in->opcode == WRITE ? PyMemoryView_FromMemory((char *)body, length, PyBUF_READ) :
						  PyBytes_FromStringAndSize(body, length));
}

/* Called with the interpreter's lock. */
static void serve(Device *self, const char *request, size_t length)
{
	struct in_header in;
	PyObject *answer;

	memcpy(&in, request, HEADER);
	if (in.opcode < OPCODES)
		self->counts[in.opcode]++;
	answer = ask(self, &in, request + HEADER, (Py_ssize_t)(length - HEADER));
	if (!answer) {
		reply(self, in.unique, failure(self->fault, in.opcode), NULL, 0);
		return;
	}
	if (PyBytes_CheckExact(answer)) {
		reply(self, in.unique, 0, PyBytes_AS_STRING(answer), (size_t)PyBytes_GET_SIZE(answer));
	} else if (answer != Py_None) {
		PyObject *handed = PyObject_CallFunction(self->later, "KIO", (unsigned long long)in.unique,
							 (unsigned)in.pid, answer);

		if (!handed)
			reply(self, in.unique, failure(self->fault, in.opcode), NULL, 0);
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
		} else if (!length) {
			number = ENODEV; /* the connection was wound up, and /dev/null has its place */
		}
	}
	Py_END_ALLOW_THREADS
	free(buffer);
	return PyLong_FromLong(number);
}

PyDoc_STRVAR(counts_doc, "counts() -> list[int]\n\nRequests served, by opcode.");

static PyObject *Device_counts(Device *self, PyObject *Py_UNUSED(ignored))
{
	return counts_list(self->counts);
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
