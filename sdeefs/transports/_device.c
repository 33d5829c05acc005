/* The device transport's loop in C: read a request, call its handler, write the answer.
 *
 * Each thread has a descriptor of its own; it does what device.py's loop in Python does, in a few
 * microseconds less, and on its caller's CPU.
 */
#define _GNU_SOURCE
#include "_serving.h"

#include "_following.h"
#include "_forgetting.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define WRITE 16
#define HEADER sizeof(struct in_header)
/* A reader that finds another one at work looks so many times whether it is done: to be woken takes
 * longer. */
#define LOOKS 100
/* Bytes: longer replies aren't kept until the next request. */
#define SMALL 4096

typedef struct {
	PyObject_HEAD
	size_t size;
	struct readers readers;
	struct forgets forgets;
	atomic_bool serving; /* somebody has the interpreter's lock */
	PyObject *handlers, *later, *fault;
	uint64_t counts[OPCODES];
} Device;

/* What is to be written once the interpreter's lock is given up. */
struct answer {
	bool due;
	int error;
	PyObject *body; /* bytes, or NULL */
};

/* Without the interpreter's lock; returns 0 or the errno with which the kernel refused it. */
static int write_answer(int fd, uint64_t unique, const struct answer *answer)
{
	size_t length = answer->body ? (size_t)PyBytes_GET_SIZE(answer->body) : 0;
	struct out_header out = { (uint32_t)(sizeof out + length), -answer->error, unique };
	struct iovec parts[2] = { { &out, sizeof out }, { NULL, length } };

	if (length)
		parts[1].iov_base = PyBytes_AS_STRING(answer->body);
	if (writev(fd, parts, length ? 2 : 1) >= 0 || errno == ENOENT || errno == ENODEV || errno == ENOTCONN)
		return 0;
	return errno;
}

static void tell_refused(Device *self, int number)
{
	PyObject *done = PyObject_CallFunction(self->fault, "iO", number, Py_None);

	if (!done)
		PyErr_WriteUnraisable(self->fault);
	Py_XDECREF(done);
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

static void await_turn(Device *self)
{
	int looks;

	for (looks = 0; looks < LOOKS && atomic_load_explicit(&self->serving, memory_order_relaxed); looks++) {
#if defined(__x86_64__) || defined(__i386__)
		__builtin_ia32_pause();
#elif defined(__aarch64__)
		__asm__ volatile("yield");
#endif
	}
}

/* Called with the interpreter's lock; a request is at least a header. */
static struct answer serve(Device *self, int fd, const struct in_header *in, const char *body, size_t length)
{
	struct answer answer = { .due = true };
	PyObject *reply;

	if (in->opcode < OPCODES)
		self->counts[in->opcode]++;
	reply = ask(self, in, body, (Py_ssize_t)length);
	if (reply && PyBytes_CheckExact(reply)) {
		answer.body = reply;
		return answer;
	}
	if (reply && PyLong_CheckExact(reply)) {
		answer.error = (int)PyLong_AsLong(reply);
		Py_DECREF(reply);
		return answer;
	}
	if (reply && reply != Py_None) {
		PyObject *handed = PyObject_CallFunction(self->later, "iKIO", fd, (unsigned long long)in->unique,
							 (unsigned)in->pid, reply);

		Py_DECREF(reply);
		reply = handed;
	}
	answer.due = !reply;
	if (!reply)
		answer.error = failure(self->fault, in->opcode);
	Py_XDECREF(reply);
	return answer;
}

PyDoc_STRVAR(run_doc,
"run(fd)\n\n"
"Serve what comes from `fd` in this thread until the connection is over; returns the errno with which\n"
"reading ended (ENODEV at an unmount).");

static PyObject *Device_run(Device *self, PyObject *argument)
{
	int fd = (int)PyLong_AsLong(argument);
	struct answer answer = { 0 };
	char *buffer;
	int number = 0;

	if (fd == -1 && PyErr_Occurred())
		return NULL;
	buffer = malloc(self->size);
	if (!buffer)
		return PyErr_NoMemory();
	readers_join(&self->readers);
	Py_BEGIN_ALLOW_THREADS
	while (!number) {
		ssize_t length = read(fd, buffer, self->size);

		if (length >= (ssize_t)HEADER) {
			const struct in_header *in = (const struct in_header *)buffer;
			int refused = 0;
			bool moves;

			if (forgets_take(&self->forgets, in, buffer + HEADER, (size_t)length - HEADER))
				continue;
			await_turn(self);
			Py_BLOCK_THREADS
			atomic_store_explicit(&self->serving, true, memory_order_relaxed);
			Py_CLEAR(answer.body); /* the last one's */
			moves = follow(&self->readers, in->pid);
			answer = serve(self, fd, in, buffer + HEADER, (size_t)length - HEADER);
			self->readers.answered = now();
			atomic_store_explicit(&self->serving, false, memory_order_relaxed);
			Py_UNBLOCK_THREADS
			if (answer.due)
				refused = write_answer(fd, in->unique, &answer);
			if (moves)
				bind_reader(&self->readers, gettid());
			if (refused || (answer.body && PyBytes_GET_SIZE(answer.body) > SMALL)) {
				Py_BLOCK_THREADS
				Py_CLEAR(answer.body);
				if (refused)
					tell_refused(self, refused);
				Py_UNBLOCK_THREADS
			}
		} else if (length < 0 && errno != EINTR && errno != ENOENT && errno != EAGAIN) {
			number = errno; /* ENOENT: a request was interrupted while it was handed over */
		} else if (!length) {
			number = ENODEV; /* the connection was wound up, and /dev/null has its place */
		}
	}
	Py_END_ALLOW_THREADS
	Py_CLEAR(answer.body);
	readers_leave(&self->readers);
	free(buffer);
	return PyLong_FromLong(number);
}

PyDoc_STRVAR(counts_doc, "counts() -> list[int]\n\nRequests served, by opcode.");

static PyObject *Device_counts(Device *self, PyObject *Py_UNUSED(ignored))
{
	uint64_t counts[OPCODES];

	memcpy(counts, self->counts, sizeof counts);
	forgets_count(&self->forgets, counts);
	return counts_list(counts);
}

PyDoc_STRVAR(keep_forgets_doc,
"keep_forgets(wanted)\n\n"
"Whether what is to be forgotten is kept for wait_for_forgets(), whose waiting this ends if it isn't.");

static PyObject *Device_keep_forgets(Device *self, PyObject *wanted)
{
	int truth = PyObject_IsTrue(wanted);

	if (truth < 0)
		return NULL;
	forgets_want(&self->forgets, truth);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(wait_for_forgets_doc,
"wait_for_forgets(pause) -> bytes | None\n\n"
"Wait until there are some and `pause` seconds (less than one) more; returns the body of a BATCH_FORGET,\n"
"None once they aren't kept.");

static PyObject *Device_wait_for_forgets(Device *self, PyObject *pause)
{
	double seconds = PyFloat_AsDouble(pause);

	if (seconds == -1.0 && PyErr_Occurred())
		return NULL;
	return forgets_wait(&self->forgets, (long)(seconds * 1e9));
}

static int Device_init(Device *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "size", "handlers", "later", "fault", NULL };
	PyObject *handlers, *later, *fault;
	Py_ssize_t size;

	if (self->handlers) {
		PyErr_SetString(PyExc_RuntimeError, "made already");
		return -1;
	}
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nO!OO", names, &size,
					 &PyList_Type, &handlers, &later, &fault))
		return -1;
	self->size = (size_t)size;
	readers_begin(&self->readers);
	forgets_begin(&self->forgets);
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
	if (self->handlers)
		forgets_end(&self->forgets);
	Device_clear(self);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef Device_methods[] = {
	{ "run", (PyCFunction)Device_run, METH_O, run_doc },
	{ "counts", (PyCFunction)Device_counts, METH_NOARGS, counts_doc },
	{ "keep_forgets", (PyCFunction)Device_keep_forgets, METH_O, keep_forgets_doc },
	{ "wait_for_forgets", (PyCFunction)Device_wait_for_forgets, METH_O, wait_for_forgets_doc },
	{ NULL },
};

static PyTypeObject DeviceType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "sdeefs.transports._device.Device",
	.tp_doc = PyDoc_STR("Device(size, handlers, later, fault)"),
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
