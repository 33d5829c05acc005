/* The device transport's loop in C: read a request, call its handler, write the answer.
 *
 * It does what device.py's loop does, with two differences that Python can't afford. One thread reads
 * at a time, and hands the reading on only for requests that may wait (data of files): so the kernel
 * wakes no second thread in vain. And the reader looks for the next request for a moment before it
 * sleeps, without the interpreter's lock: where the caller runs on another CPU, waking a thread costs
 * more than all else. Whether looking pays is tried from time to time, and done only if it does.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
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

/* Trials of looking against sleeping: so many requests each, then so many as the better one says. */
#define TRIAL 64
#define TERM 4096

enum phase { SLEEPS, LOOKS, DECIDED };

struct watchfulness {
	enum phase phase;
	int looks;	   /* now */
	uint32_t left;	   /* requests until the phase ends */
	uint64_t began;	   /* of the trial, in ns */
	uint64_t idle;	   /* of that time, long waits: nobody asked */
	uint64_t slept;	   /* what the other trial took */
};

typedef struct {
	PyObject_HEAD
	int fd;
	size_t size;
	uint64_t moment; /* how long the reader looks before it sleeps, in ns */
	PyObject *handlers, *later, *fault;
	pthread_mutex_t reading;
	struct watchfulness watch;
	uint64_t counts[OPCODES];
	uint64_t slow; /* opcodes for which the reading is handed on, as bits */
	int ended;
} Device;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

/* One request was taken; the next phase may begin. */
static void note(Device *self, uint64_t time)
{
	struct watchfulness *watch = &self->watch;
	uint64_t took;

	if (!self->moment || watch->left--)
		return;
	took = time - watch->began - watch->idle;
	switch (watch->phase) {
	case DECIDED:
		watch->phase = SLEEPS;
		watch->looks = 0;
		break;
	case SLEEPS:
		watch->slept = took;
		watch->phase = LOOKS;
		watch->looks = 1;
		break;
	case LOOKS:
		watch->looks = took < watch->slept - watch->slept / 8;
		watch->phase = DECIDED;
		break;
	}
	watch->left = watch->phase == DECIDED ? TERM : TRIAL;
	watch->began = time;
	watch->idle = 0;
}

/* The length of the next request, or -1 with errno. */
static ssize_t next_request(Device *self, char *buffer)
{
	struct pollfd wanted = { .fd = self->fd, .events = POLLIN };
	uint64_t began = 0, time;
	ssize_t length;

	for (;;) {
		length = read(self->fd, buffer, self->size);
		if (length >= 0)
			break;
		if (errno == EINTR || errno == ENOENT)
			continue; /* ENOENT: it was interrupted while it was handed over */
		if (errno != EAGAIN)
			return -1;
		if (!began)
			began = now();
		if (self->watch.looks && now() - began < self->moment)
			continue;
		if (poll(&wanted, 1, -1) < 0 && errno != EINTR)
			return -1;
	}
	if (self->moment) {
		time = now();
		if (began && time - began > 200000) /* ns: the callers were busy with other things */
			self->watch.idle += time - began;
		note(self, time);
	}
	return length;
}

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
"Serve in this thread until the connection is over; any number of threads may. Returns the errno\n"
"with which reading ended (ENODEV at an unmount).");

static PyObject *Device_run(Device *self, PyObject *Py_UNUSED(ignored))
{
	char *buffer = malloc(self->size);
	int number = 0;

	if (!buffer)
		return PyErr_NoMemory();
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&self->reading);
	for (;;) {
		ssize_t length = self->ended ? -1 : next_request(self, buffer);
		int hands_on;

		if (length < 0) {
			if (!self->ended)
				self->ended = errno;
			number = self->ended;
			break;
		}
		if (length < (ssize_t)HEADER)
			continue;
		hands_on = self->slow >> (((struct in_header *)buffer)->opcode & 63) & 1;
		if (hands_on)
			pthread_mutex_unlock(&self->reading);
		Py_BLOCK_THREADS
		serve(self, buffer, (size_t)length);
		Py_UNBLOCK_THREADS
		if (hands_on)
			pthread_mutex_lock(&self->reading);
	}
	pthread_mutex_unlock(&self->reading);
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

PyDoc_STRVAR(looks_doc, "looks() -> bool\n\nWhether the reader looks for the next request before it sleeps.");

static PyObject *Device_looks(Device *self, PyObject *Py_UNUSED(ignored))
{
	return PyBool_FromLong(self->watch.looks);
}

static int Device_init(Device *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "fd", "size", "moment", "slow", "handlers", "later", "fault", NULL };
	PyObject *handlers, *later, *fault;
	unsigned long long moment, slow;
	Py_ssize_t size;

	if (self->handlers) {
		PyErr_SetString(PyExc_RuntimeError, "made already");
		return -1;
	}
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "inKKO!OO", names, &self->fd, &size, &moment, &slow,
					 &PyList_Type, &handlers, &later, &fault))
		return -1;
	self->size = (size_t)size;
	self->moment = moment;
	self->slow = slow;
	self->watch.left = TRIAL;
	self->handlers = Py_NewRef(handlers);
	self->later = Py_NewRef(later);
	self->fault = Py_NewRef(fault);
	return 0;
}

static PyObject *Device_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
	Device *self = (Device *)type->tp_alloc(type, 0);

	if (self)
		pthread_mutex_init(&self->reading, NULL);
	return (PyObject *)self;
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
	pthread_mutex_destroy(&self->reading);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef Device_methods[] = {
	{ "run", (PyCFunction)Device_run, METH_NOARGS, run_doc },
	{ "counts", (PyCFunction)Device_counts, METH_NOARGS, counts_doc },
	{ "looks", (PyCFunction)Device_looks, METH_NOARGS, looks_doc },
	{ NULL },
};

static PyTypeObject DeviceType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "sdeefs.transports._device.Device",
	.tp_doc = PyDoc_STR("Device(fd, size, moment, slow, handlers, later, fault)"),
	.tp_basicsize = sizeof(Device),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.tp_new = Device_new,
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
