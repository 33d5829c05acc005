/* OPEN, READ and RELEASE of plain files. */
#include "shortcuts.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

/* What of open(2)'s flags reaches the descriptor of a layer's file (core/handles.py). */
#define KEPT (O_ACCMODE | O_SYNC | O_DSYNC)
/* Bytes: files of lower that aren't larger go to the kernel when they are opened. */
#define SMALL 32768

int layer_flags(Shortcuts *self, uint32_t flags)
{
	int wanted = (int)flags & KEPT;

	if (self->writeback && (flags & O_ACCMODE) == O_WRONLY)
		wanted = (wanted & ~O_ACCMODE) | O_RDWR; /* the kernel fills pages through it */
	if (self->is_volatile)
		wanted &= ~(O_SYNC | O_DSYNC);
	return wanted;
}

static PyObject *contents(const struct stat *st)
{
	long long mtime = (long long)st->st_mtim.tv_sec * 1000000000LL + st->st_mtim.tv_nsec;

	return Py_BuildValue("(LL)", mtime, (long long)st->st_size);
}

/* Whether what the kernel has cached of a file is still its data; notes what it is from now on. */
static int keeps_cache(PyObject *extra, const struct stat *st)
{
	PyObject *now = contents(st);
	int keep;

	if (!now)
		return -1;
	keep = PyList_GET_SIZE(SLOT(extra, shape.handles)) > 0;
	if (!keep)
		keep = PyObject_RichCompareBool(SLOT(extra, shape.opened), now, Py_EQ);
	set_slot(extra, shape.opened, now);
	return keep;
}

/* Give the kernel a small file's data before its first reader asks for it. That spares the READ, and the
 * GETATTR of a reader that looks again at what it has read (Linux takes the time of access for changed).
 * Returns whether it has it all. Not while anybody else has the file open: a page of it may be locked for
 * a READ that this very thread has yet to answer. */
static int stored(Shortcuts *self, PyObject *node, int fd, const struct stat *st)
{
	char data[SMALL];
	struct {
		struct out_header head;
		struct fuse_notify_store_out store;
	} message = { .head.error = FUSE_NOTIFY_STORE, .store.nodeid = slot_u64(node, shape.number) };
	struct iovec parts[2] = { { &message, sizeof message }, { data, sizeof data } };
	ssize_t length;

	if (self->device < 0 || st->st_size <= 0 || st->st_size > SMALL)
		return 0;
	length = preadv2(fd, &parts[1], 1, 0, RWF_NOWAIT); /* a worker waits for disks */
	if (length != st->st_size)
		return 0;
	parts[1].iov_len = (size_t)length;
	message.store.size = (uint32_t)length;
	message.head.len = (uint32_t)(sizeof message + (size_t)length);
	return writev(self->device, parts, 2) == (ssize_t)message.head.len;
}

static PyObject *new_file(PyObject *node, PyObject *fd, int writable, PyObject *io)
{
	PyObject *file = PyType_GenericAlloc(shape.open_file, 0);

	if (!file)
		return NULL;
	SLOT(file, shape.file_node) = Py_NewRef(node);
	SLOT(file, shape.file_fd) = Py_NewRef(fd);
	SLOT(file, shape.file_writable) = Py_NewRef(writable ? Py_True : Py_False);
	SLOT(file, shape.file_io) = Py_NewRef(io);
	SLOT(file, shape.file_lower) = Py_NewRef(slot_int(node, shape.layer) == UPPER ? Py_False : Py_True);
	return file;
}

/* The kernel's name for the file that it reads and writes itself; 0: it goes by requests; -1 with an
 * exception. Of a node's first handle as BackingIds.acquire() does it, all else by that. */
static int backing_id(Shortcuts *self, PyObject *node, PyObject *handle, PyObject *fd)
{
	PyObject *arguments[3] = { SLOT(node, shape.number), handle, fd }, *id, *use;
	int number = 0, known = self->uses ? PyDict_Contains(self->uses, arguments[0]) : 1;
	struct fuse_backing_map map = { .fd = (int32_t)PyLong_AsLong(fd) };

	if (!known && !PyList_GET_SIZE(SLOT(SLOT(node, shape.extra_at), shape.handles)))
		number = ioctl(self->device, FUSE_DEV_IOC_BACKING_OPEN, &map);
	if (number > 0) {
		use = Py_BuildValue("[ii]", number, 1);
		known = use ? PyDict_SetItem(self->uses, arguments[0], use) : -1;
		if (!known)
			known = PyDict_SetItem(self->node_of, handle, arguments[0]);
		Py_XDECREF(use);
		return known < 0 ? -1 : number;
	}
	id = PyObject_Vectorcall(self->acquire_backing, arguments, 3, NULL);
	if (!id)
		return -1;
	number = (int)PyLong_AsLong(id);
	Py_DECREF(id);
	return number;
}

/* BackingIds.release(): of a node's only handle here, else by that. -1 with an exception. */
static int release_backing(Shortcuts *self, PyObject *node, PyObject *handle)
{
	PyObject *number = SLOT(node, shape.number), *use, *done;

	use = self->uses ? PyDict_GetItemWithError(self->uses, number) : NULL;
	if (use && PyLong_AsLong(PyList_GET_ITEM(use, 1)) == 1 && PyDict_Contains(self->node_of, handle) == 1) {
		uint32_t id = (uint32_t)PyLong_AsUnsignedLongMask(PyList_GET_ITEM(use, 0));

		if (PyDict_DelItem(self->uses, number) < 0 || PyDict_DelItem(self->node_of, handle) < 0)
			return -1;
		if (id)
			(void)ioctl(self->device, FUSE_DEV_IOC_BACKING_CLOSE, &id);
		return 0;
	}
	done = PyErr_Occurred() ? NULL : PyObject_CallOneArg(self->release_backing, handle);
	Py_XDECREF(done);
	return done ? 0 : -1;
}

/* Handles._opened() and encode_open(): the handle of an open descriptor, which it owns from then on. */
int opened(Shortcuts *self, PyObject *node, int fd, const struct stat *st, int writable,
	   struct fuse_open_out *out)
{
	PyObject *extra = more(node), *handles, *io, *handle = NULL, *number = NULL, *file = NULL;
	int keep = 0, id = 0, first, rc = FAILED; /* first: the kernel has nothing of it yet */

	if (!extra)
		return FAILED;
	handles = SLOT(extra, shape.handles);
	if (PyList_GET_SIZE(handles))
		io = SLOT(PyList_GET_ITEM(handles, 0), shape.file_io);
	else
		io = self->passthrough && (slot_int(node, shape.layer) == UPPER || !self->writable) ?
			self->io_passthrough : self->io_cached;
	first = SLOT(extra, shape.opened) == Py_None && !PyList_GET_SIZE(handles);
	if (io == self->io_cached) {
		keep = keeps_cache(extra, st);
		if (!keep && first && slot_int(node, shape.layer) != UPPER)
			keep = stored(self, node, fd, st);
	} else {
		set_slot(extra, shape.opened, Py_NewRef(Py_None));
	}
	handle = keep < 0 ? NULL : next_number(self->filesystem, str_next_handle);
	number = handle ? PyLong_FromLong(fd) : NULL;
	file = number ? new_file(node, number, writable, io) : NULL;
	if (file && io == self->io_passthrough && self->backing != Py_None)
		id = backing_id(self, node, handle, number);
	if (file && id >= 0 && PyDict_SetItem(self->files, handle, file) == 0) {
		if (PyList_Append(handles, file) == 0)
			rc = ANSWERED;
		else
			PyDict_DelItem(self->files, handle);
	}
	if (!rc) {
		out->fh = PyLong_AsUnsignedLongLongMask(handle);
		out->backing_id = id;
		out->open_flags = self->open_base | (id ? FOPEN_PASSTHROUGH : keep ? FOPEN_KEEP_CACHE : 0);
	}
	Py_XDECREF(handle);
	Py_XDECREF(number);
	Py_XDECREF(file);
	return rc;
}

/* Whether a handle may be opened here: all of a node's go the same way, DIRECT ones are Python's. */
static int is_plain(Shortcuts *self, PyObject *node)
{
	PyObject *extra = SLOT(node, shape.extra_at), *handles;

	if (extra == Py_None)
		return 1;
	if (SLOT(extra, shape.secret) != Py_False || SLOT(extra, shape.work_name) != Py_None)
		return 0;
	handles = SLOT(extra, shape.handles);
	if (PyList_GET_SIZE(handles)) {
		PyObject *io = SLOT(PyList_GET_ITEM(handles, 0), shape.file_io);

		return io == self->io_cached || io == self->io_passthrough;
	}
	return 1;
}

int do_open(Shortcuts *self, struct call *call)
{
	struct fuse_open_in in;
	PyObject *node;
	struct place place;
	struct stat st;
	int fd, writable, rc;
	long layer;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	node = find_node(self, call->node);
	if (!node || slot_u64(node, shape.kind) != S_IFREG || in.flags & (O_TRUNC | O_NOATIME) ||
	    !is_plain(self, node) || place_of(self, node, &place) || !*place.name)
		return LEAVE;
	layer = slot_int(node, shape.layer);
	writable = (in.flags & O_ACCMODE) != O_RDONLY;
	if (writable && (!self->writable || layer != UPPER))
		return LEAVE;
	rc = writable ? settled(self) : 0;
	if (rc)
		return rc;
	fd = openat(place.fd, place.name,
		    layer_flags(self, in.flags) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW);
	if (fd < 0)
		return errno == EACCES || errno == EPERM || errno == ENOENT || errno == ELOOP || errno == ENXIO ?
			LEAVE : errno;
	if (fstat(fd, &st) < 0 || !is_of(node, &st) ||
	    (writable && st.st_mode & 06000) || may_be_secret(self, layer, &st, place.fd, place.name))
		rc = LEAVE;
	else
		rc = opened(self, node, fd, &st, writable, (struct fuse_open_out *)call->out);
	if (rc)
		close(fd);
	call->size = sizeof(struct fuse_open_out);
	return rc;
}

/* The file's data from an offset on, without waiting for a disk. 1: a worker has to read it. */
static int read_cached(int fd, PyObject **bytes, Py_ssize_t size, off_t offset)
{
	struct iovec part = { PyBytes_AS_STRING(*bytes), (size_t)size };
	ssize_t length = preadv2(fd, &part, 1, offset, RWF_NOWAIT);
	struct stat st;

	if (length < 0 && errno == EOPNOTSUPP) {
		Py_BEGIN_ALLOW_THREADS
		do
			length = pread(fd, part.iov_base, part.iov_len, offset);
		while (length < 0 && errno == EINTR);
		Py_END_ALLOW_THREADS
	} else if (length < 0 ? errno == EAGAIN : length < size && !(fstat(fd, &st) == 0 && offset + length >= st.st_size)) {
		return 1;
	}
	if (length < 0)
		return errno == EINTR ? 1 : -errno;
	return length < size && _PyBytes_Resize(bytes, length) < 0 ? -ENOMEM : 0;
}

/* Called without the lock: Python's own takes none either. */
int do_read(Shortcuts *self, struct call *call)
{
	struct fuse_read_in in;
	PyObject *file, *bytes;
	int rc;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	file = find_file(self, in.fh);
	if (!file)
		return LEAVE;
	bytes = PyBytes_FromStringAndSize(NULL, in.size);
	if (!bytes)
		return FAILED;
	rc = read_cached((int)slot_int(file, shape.file_fd), &bytes, in.size, (off_t)in.offset);
	if (!rc) {
		call->bytes = bytes;
		return ANSWERED;
	}
	Py_XDECREF(bytes);
	if (rc < 0)
		return PyErr_Occurred() ? FAILED : -rc;
	call->bytes = PyObject_CallFunction(self->read_later, "KKI", (unsigned long long)in.fh,
					    (unsigned long long)in.offset, in.size);
	return call->bytes ? ANSWERED : FAILED;
}

int do_release(Shortcuts *self, struct call *call)
{
	struct fuse_release_in in;
	PyObject *file, *node, *extra, *handles, *handle;
	Py_ssize_t i, at = -1;
	struct stat st;
	int fd, rc = 0;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	file = find_file(self, in.fh);
	if (!file)
		return LEAVE;
	node = SLOT(file, shape.file_node);
	extra = SLOT(node, shape.extra_at);
	if (extra == Py_None || SLOT(extra, shape.privileged) != Py_None || slot_int(node, shape.count) <= 0)
		return LEAVE;
	handles = SLOT(extra, shape.handles);
	for (i = 0; i < PyList_GET_SIZE(handles); i++)
		if (PyList_GET_ITEM(handles, i) == file)
			at = i;
	if (at < 0)
		return LEAVE;
	handle = PyLong_FromUnsignedLongLong(in.fh);
	if (!handle)
		return FAILED;
	fd = (int)slot_int(file, shape.file_fd);
	if (SLOT(file, shape.file_io) == self->io_cached && SLOT(file, shape.file_writable) == Py_True &&
	    fstat(fd, &st) == 0) {
		PyObject *now = contents(&st);

		if (now)
			set_slot(extra, shape.opened, now);
	}
	if (SLOT(file, shape.file_io) == self->io_passthrough && self->backing != Py_None)
		rc = release_backing(self, node, handle);
	if (rc < 0 || PyList_SetSlice(handles, at, at + 1, NULL) < 0 || PyDict_DelItem(self->files, handle) < 0) {
		Py_DECREF(handle);
		return FAILED;
	}
	Py_DECREF(handle);
	close_later(self, fd);
	call->size = 0;
	return ANSWERED;
}
