/* FUSE over io_uring (Linux >= 6.14): one thread's ring with the queues that it serves.
 *
 * The kernel puts a request on the queue of its caller's CPU. A thread that is pinned there waits in
 * io_uring_enter(2), takes the GIL once for all that has come, calls the same Python handlers as the
 * device transport, and commits the answers with its next wait. What takes long is handed to Python
 * (a worker thread), which gives the answer back by answer(): the kernel accepts it only from the
 * thread that owns the ring, so an eventfd wakes that.
 *
 * What an entry is: a header (fuse_in_header and fuse_out_header share its first 128 bytes, the
 * operation's own structure has the next 128) and a payload (names, data, the reply's body).
 */
#include "_serving.h"

#include <liburing.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

/* From linux/fuse.h of Linux 6.14; the installed header may be older. */
#define CMD_REGISTER 1
#define CMD_COMMIT_AND_FETCH 2

struct ent_in_out {
	uint64_t flags, commit_id;
	uint32_t payload_sz, padding;
	uint64_t reserved;
};
struct req_header {
	char in_out[128];
	char op_in[128];
	struct ent_in_out ent;
};
struct cmd_req {
	uint64_t flags, commit_id;
	uint16_t qid;
	uint8_t padding[6];
};

/* From linux/io_uring.h of Linux 6.0 and 6.1. */
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

enum state { IN_KERNEL, WITH_WORKER, DEAD };

struct entry {
	struct req_header *header;
	char *payload;
	struct iovec iov[2];
	uint16_t qid;
	enum state state;
	uint64_t unique;
};

struct answer {
	uint32_t index;
	int error;
	PyObject *body;
};

typedef struct {
	PyObject_HEAD
	struct io_uring ring;
	int have_ring;
	int fuse_fd, event_fd, cpu;
	uint64_t event_value;
	size_t payload_size;
	struct entry *entries;
	uint32_t count, alive;
	char *memory;
	size_t memory_size;
	PyObject *handlers, *later, *fault;
	struct answer *answers; /* given by workers, not yet committed; the GIL guards it */
	uint32_t answered;
	uint64_t counts[OPCODES];
	int stop; /* set with the GIL held, read without */
	int first_error;
} Ring;

static int ring_setup(struct io_uring *ring, unsigned entries)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER |
			 IORING_SETUP_DEFER_TASKRUN,
		.cq_entries = entries * 2,
	};

	return io_uring_queue_init_params(entries, ring, &params);
}

static struct io_uring_sqe *get_sqe(Ring *self)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&self->ring);

	if (!sqe) {
		io_uring_submit(&self->ring);
		sqe = io_uring_get_sqe(&self->ring);
	}
	return sqe;
}

static void prepare(Ring *self, struct entry *entry, int operation, uint64_t commit_id)
{
	struct io_uring_sqe *sqe = get_sqe(self);
	struct cmd_req *request;

	if (!sqe) { /* more in flight than the ring has room for: can't be */
		entry->state = DEAD;
		self->alive--;
		return;
	}
	memset(sqe, 0, 128);
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->fd = 0;
	sqe->cmd_op = operation;
	sqe->user_data = (uint64_t)(uintptr_t)entry;
	if (operation == CMD_REGISTER) {
		sqe->addr = (uint64_t)(uintptr_t)entry->iov;
		sqe->len = 2;
	}
	request = (struct cmd_req *)sqe->cmd;
	request->qid = entry->qid;
	request->commit_id = commit_id;
	entry->state = IN_KERNEL;
}

static void watch_events(Ring *self)
{
	struct io_uring_sqe *sqe = get_sqe(self);

	if (!sqe)
		return;
	memset(sqe, 0, 128);
	io_uring_prep_read(sqe, self->event_fd, &self->event_value, sizeof self->event_value, 0);
	sqe->user_data = 0;
}

static void commit(Ring *self, struct entry *entry, int error, PyObject *body)
{
	struct out_header *out = (struct out_header *)entry->header->in_out;
	size_t length = 0;

	if (!error && body) {
		length = (size_t)PyBytes_GET_SIZE(body);
		if (length > self->payload_size) {
			error = EIO;
			length = 0;
		} else {
			memcpy(entry->payload, PyBytes_AS_STRING(body), length);
		}
	}
	out->unique = entry->unique;
	out->error = -error;
	out->len = (uint32_t)(sizeof *out + length);
	entry->header->ent.payload_sz = (uint32_t)length;
	prepare(self, entry, CMD_COMMIT_AND_FETCH, entry->header->ent.commit_id);
}

static PyObject *ask(Ring *self, struct entry *entry, const struct in_header *in)
{
	size_t payload = entry->header->ent.payload_sz;
	size_t operation = in->len - sizeof *in - payload;
	PyObject *body;

	if (in->len < sizeof *in + payload || operation > sizeof entry->header->op_in ||
	    payload > self->payload_size || in->opcode >= (uint32_t)PyList_GET_SIZE(self->handlers)) {
		errno = in->opcode >= OPCODES ? ENOSYS : EIO;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	body = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(operation + payload));
	if (body) {
		memcpy(PyBytes_AS_STRING(body), entry->header->op_in, operation);
		memcpy(PyBytes_AS_STRING(body) + operation, entry->payload, payload);
	}
	return call_handler(self->handlers, in, body);
}

static void serve(Ring *self, struct entry *entry)
{
	struct in_header in;
	PyObject *reply, *handed;

	memcpy(&in, entry->header->in_out, sizeof in);
	entry->unique = in.unique;
	if (in.opcode < OPCODES)
		self->counts[in.opcode]++;
	reply = ask(self, entry, &in);
	if (!reply) {
		commit(self, entry, failure(self->fault, in.opcode), NULL);
		return;
	}
	if (PyBytes_CheckExact(reply)) {
		commit(self, entry, 0, reply);
	} else if (reply == Py_None) {
		commit(self, entry, 0, NULL);
	} else if (PyLong_CheckExact(reply)) {
		commit(self, entry, (int)PyLong_AsLong(reply), NULL);
	} else {
		entry->state = WITH_WORKER;
		handed = PyObject_CallFunction(self->later, "IKIO", (unsigned)(entry - self->entries),
					       (unsigned long long)in.unique, (unsigned)in.pid, reply);
		if (!handed)
			commit(self, entry, failure(self->fault, in.opcode), NULL);
		Py_XDECREF(handed);
	}
	Py_DECREF(reply);
}

static void commit_answers(Ring *self)
{
	while (self->answered) {
		struct answer answer = self->answers[--self->answered];

		commit(self, &self->entries[answer.index], answer.error, answer.body);
		Py_XDECREF(answer.body);
	}
}

/* Called with the GIL held. */
static void take(Ring *self)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0;
	int events = 0;

	io_uring_for_each_cqe(&self->ring, head, cqe) {
		struct entry *entry = (struct entry *)(uintptr_t)cqe->user_data;

		seen++;
		if (!entry) {
			events = 1;
		} else if (cqe->res == 0) {
			serve(self, entry);
		} else if (entry->state != DEAD) {
			if (!self->first_error)
				self->first_error = -cqe->res;
			entry->state = DEAD;
			self->alive--;
		}
	}
	io_uring_cq_advance(&self->ring, seen);
	commit_answers(self);
	if (events && !self->stop)
		watch_events(self);
}

static int set_up(Ring *self)
{
	uint32_t i;
	int rc;

	if (self->cpu >= 0) {
		cpu_set_t *set = CPU_ALLOC(self->cpu + 1);
		size_t size = CPU_ALLOC_SIZE(self->cpu + 1);

		if (set) { /* a cpuset may forbid it: then the thread runs where it may */
			CPU_ZERO_S(size, set);
			CPU_SET_S(self->cpu, size, set);
			(void)!sched_setaffinity(0, size, set);
			CPU_FREE(set);
		}
	}
	rc = ring_setup(&self->ring, self->count + 2);
	if (rc < 0)
		return -rc;
	self->have_ring = 1;
	rc = io_uring_register_files(&self->ring, &self->fuse_fd, 1);
	if (rc < 0)
		return -rc;
	io_uring_register_ring_fd(&self->ring);
	self->alive = self->count;
	for (i = 0; i < self->count; i++)
		prepare(self, &self->entries[i], CMD_REGISTER, 0);
	watch_events(self);
	return 0;
}

PyDoc_STRVAR(run_doc,
"run()\n\n"
"Serve in this thread until the connection is over or stop(); returns the errno with which the\n"
"first entry ended (ENOTCONN at an unmount), 0 after stop(). Raises OSError where no ring can be.");

static PyObject *Ring_run(Ring *self, PyObject *Py_UNUSED(ignored))
{
	int rc;

	rc = set_up(self);
	while (!rc && !self->stop && self->alive) {
		int waited;

		Py_BEGIN_ALLOW_THREADS
		waited = io_uring_submit_and_wait(&self->ring, 1);
		Py_END_ALLOW_THREADS
		if (waited < 0 && waited != -EINTR && waited != -EAGAIN && waited != -EBUSY) {
			rc = -waited;
			break;
		}
		take(self);
	}
	if (self->have_ring) {
		self->have_ring = 0;
		Py_BEGIN_ALLOW_THREADS
		io_uring_queue_exit(&self->ring);
		Py_END_ALLOW_THREADS
	}
	self->stop = 1;
	self->alive = 0;
	while (self->answered)
		Py_XDECREF(self->answers[--self->answered].body);
	if (rc) {
		errno = rc;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyLong_FromLong(self->first_error);
}

static void wake(Ring *self)
{
	uint64_t one = 1;

	if (self->event_fd >= 0)
		(void)!write(self->event_fd, &one, sizeof one);
}

PyDoc_STRVAR(stop_doc, "stop()\n\nEnd run(), from any thread.");

static PyObject *Ring_stop(Ring *self, PyObject *Py_UNUSED(ignored))
{
	self->stop = 1;
	wake(self);
	Py_RETURN_NONE;
}

PyDoc_STRVAR(answer_doc,
"answer(index, error, body)\n\n"
"Give the ring's thread the answer to a request that it handed to `later`, from any thread.");

static PyObject *Ring_answer(Ring *self, PyObject *args)
{
	unsigned index;
	int error;
	PyObject *body;

	if (!PyArg_ParseTuple(args, "IiS", &index, &error, &body))
		return NULL;
	if (index >= self->count) {
		PyErr_SetString(PyExc_IndexError, "no such entry");
		return NULL;
	}
	if (!self->stop && self->entries[index].state == WITH_WORKER && self->answered < self->count) {
		Py_INCREF(body);
		self->answers[self->answered++] = (struct answer){ index, error, body };
		wake(self);
	}
	Py_RETURN_NONE;
}

PyDoc_STRVAR(counts_doc, "counts() -> list[int]\n\nRequests served, by opcode.");

static PyObject *Ring_counts(Ring *self, PyObject *Py_UNUSED(ignored))
{
	return counts_list(self->counts);
}

static size_t pages(size_t size)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (size + page - 1) / page * page;
}

static int Ring_init(Ring *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "fuse_fd", "cpu", "queues", "depth", "payload_size",
				 "handlers", "later", "fault", NULL };
	PyObject *queues, *handlers, *later, *fault;
	Py_ssize_t queue_count, i;
	unsigned depth;
	Py_ssize_t payload_size;
	size_t header_size = pages(sizeof(struct req_header)), entry_size;
	uint32_t at = 0, j;

	if (self->entries) {
		PyErr_SetString(PyExc_RuntimeError, "made already");
		return -1;
	}
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiO!InO!OO", names, &self->fuse_fd, &self->cpu,
					 &PyList_Type, &queues, &depth, &payload_size, &PyList_Type,
					 &handlers, &later, &fault))
		return -1;
	queue_count = PyList_GET_SIZE(queues);
	if (queue_count < 1 || depth < 1 || payload_size < 8192) {
		PyErr_SetString(PyExc_ValueError, "needs a queue, a depth, and a payload of 8192 bytes");
		return -1;
	}
	self->payload_size = pages((size_t)payload_size);
	self->count = (uint32_t)queue_count * depth;
	entry_size = header_size + self->payload_size;
	self->memory_size = entry_size * self->count;
	/* Untouched payloads cost no memory. */
	self->memory = mmap(NULL, self->memory_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (self->memory == MAP_FAILED) {
		self->memory = NULL;
		PyErr_SetFromErrno(PyExc_OSError);
		return -1;
	}
	self->entries = calloc(self->count, sizeof *self->entries);
	self->answers = calloc(self->count, sizeof *self->answers);
	if (!self->entries || !self->answers) {
		PyErr_NoMemory();
		return -1;
	}
	for (i = 0; i < queue_count; i++) {
		long qid = PyLong_AsLong(PyList_GET_ITEM(queues, i));

		if (qid == -1 && PyErr_Occurred())
			return -1;
		for (j = 0; j < depth; j++, at++) {
			struct entry *entry = &self->entries[at];

			entry->qid = (uint16_t)qid;
			entry->header = (struct req_header *)(self->memory + at * entry_size);
			entry->payload = self->memory + at * entry_size + header_size;
			entry->iov[0] = (struct iovec){ entry->header, sizeof *entry->header };
			entry->iov[1] = (struct iovec){ entry->payload, self->payload_size };
		}
	}
	self->event_fd = eventfd(0, EFD_CLOEXEC);
	if (self->event_fd < 0) {
		PyErr_SetFromErrno(PyExc_OSError);
		return -1;
	}
	Py_INCREF(handlers);
	self->handlers = handlers;
	Py_INCREF(later);
	self->later = later;
	Py_INCREF(fault);
	self->fault = fault;
	return 0;
}

static PyObject *Ring_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
	Ring *self = (Ring *)type->tp_alloc(type, 0);

	if (self)
		self->event_fd = -1;
	return (PyObject *)self;
}

static int Ring_traverse(Ring *self, visitproc visit, void *arg)
{
	Py_VISIT(self->handlers);
	Py_VISIT(self->later);
	Py_VISIT(self->fault);
	return 0;
}

static int Ring_clear(Ring *self)
{
	Py_CLEAR(self->handlers);
	Py_CLEAR(self->later);
	Py_CLEAR(self->fault);
	return 0;
}

static void Ring_dealloc(Ring *self)
{
	PyObject_GC_UnTrack(self);
	Ring_clear(self);
	if (self->event_fd >= 0)
		close(self->event_fd);
	free(self->entries);
	free(self->answers);
	if (self->memory)
		munmap(self->memory, self->memory_size);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef Ring_methods[] = {
	{ "run", (PyCFunction)Ring_run, METH_NOARGS, run_doc },
	{ "stop", (PyCFunction)Ring_stop, METH_NOARGS, stop_doc },
	{ "answer", (PyCFunction)Ring_answer, METH_VARARGS, answer_doc },
	{ "counts", (PyCFunction)Ring_counts, METH_NOARGS, counts_doc },
	{ NULL },
};

static PyTypeObject RingType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "sdeefs.transports._ring.Ring",
	.tp_doc = PyDoc_STR("Ring(fuse_fd, cpu, queues, depth, payload_size, handlers, later, fault)"),
	.tp_basicsize = sizeof(Ring),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.tp_new = Ring_new,
	.tp_init = (initproc)Ring_init,
	.tp_dealloc = (destructor)Ring_dealloc,
	.tp_traverse = (traverseproc)Ring_traverse,
	.tp_clear = (inquiry)Ring_clear,
	.tp_methods = Ring_methods,
};

PyDoc_STRVAR(probe_doc, "probe()\n\nMake such a ring and take it away again. Raises OSError.");

static PyObject *probe(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(ignored))
{
	struct io_uring ring;
	int rc = ring_setup(&ring, 4);

	if (rc < 0) {
		errno = -rc;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	io_uring_queue_exit(&ring);
	Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
	{ "probe", probe, METH_NOARGS, probe_doc },
	{ NULL },
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "sdeefs.transports._ring",
	.m_doc = PyDoc_STR("FUSE over io_uring: the part that must be in C."),
	.m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__ring(void)
{
	PyObject *made;

	if (PyType_Ready(&RingType) < 0)
		return NULL;
	made = PyModule_Create(&module);
	if (made && PyModule_AddObjectRef(made, "Ring", (PyObject *)&RingType) < 0)
		Py_CLEAR(made);
	return made;
}
