/* READDIR and READDIRPLUS. */
#include "shortcuts.h"

#define ENTRY sizeof(struct fuse_entry_out)

/* A look-up that isn't plain, by Python: its encoded answer, or 0 for a name to leave out. */
static int look_up_slowly(Shortcuts *self, PyObject *directory, PyObject *name, uint64_t ino,
			  struct fuse_entry_out *out)
{
	PyObject *entry = PyObject_CallFunctionObjArgs(self->lookup, directory, name, NULL), *packed = NULL;
	int rc = FAILED;

	if (entry)
		packed = PyObject_CallOneArg(self->pack_entry, entry);
	if (packed && PyBytes_Check(packed) && PyBytes_GET_SIZE(packed) == ENTRY) {
		memcpy(out, PyBytes_AS_STRING(packed), ENTRY);
		rc = out->nodeid != 0;
	} else if (!entry && PyErr_ExceptionMatches(PyExc_OSError)) {
		PyErr_Clear();
		memset(out, 0, ENTRY);
		rc = ino != 0; /* without what a look-up would have told */
	}
	Py_XDECREF(entry);
	Py_XDECREF(packed);
	return rc;
}

/* The same, plain or not. */
static int look_up(Shortcuts *self, PyObject *directory, PyObject *name, uint64_t ino, struct fuse_entry_out *out)
{
	struct found found;
	int rc = find_name(self, directory, name, &found);

	if (!rc)
		rc = pack_found(self, &found, out);
	if (rc == LEAVE)
		return look_up_slowly(self, directory, name, ino, out);
	return rc ? FAILED : out->nodeid != 0; /* 0: removed since */
}

/* Listing._inode_number(); 0: the name is gone. */
static int number_of(Shortcuts *self, PyObject *directory, PyObject *name, uint64_t *ino)
{
	PyObject *number = PyObject_CallFunctionObjArgs(self->inode_number, directory, name, NULL);

	if (!number)
		return FAILED;
	*ino = PyLong_AsUnsignedLongLongMask(number);
	Py_DECREF(number);
	return *ino != 0;
}

static int fill(Shortcuts *self, struct call *call, PyObject *directory, PyObject *entries,
		const struct fuse_read_in *in, int plus)
{
	char *page = PyBytes_AS_STRING(call->bytes);
	size_t used = 0, head = plus ? ENTRY : 0;
	Py_ssize_t position = following(entries, in->offset);

	if (position == PyList_GET_SIZE(entries) && PyDict_DelItem(self->lists, SLOT(directory, shape.number)) < 0)
		PyErr_Clear(); /* it was another's */
	for (; position < PyList_GET_SIZE(entries); position++) {
		PyObject *entry = PyList_GET_ITEM(entries, position), *name = PyTuple_GET_ITEM(entry, 0);
		uint64_t ino = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(entry, 1));
		uint32_t kind = (uint32_t)PyLong_AsUnsignedLongMask(PyTuple_GET_ITEM(entry, 2));
		size_t length = (size_t)PyBytes_GET_SIZE(name);
		size_t size = (head + sizeof(struct fuse_dirent) + length + 7) & ~(size_t)7;
		struct fuse_entry_out *out = (struct fuse_entry_out *)(page + used);
		struct fuse_dirent *dirent = (struct fuse_dirent *)(page + used + head);
		int rc = 1;

		if (used + size > in->size)
			break;
		if (!plus) {
			if (!ino)
				rc = number_of(self, directory, name, &ino);
		} else if (position < 2) {
			memset(out, 0, ENTRY);
		} else if (ino && !wants_attributes(self, call, kind)) {
			memset(out, 0, ENTRY);
			set_slot(directory, shape.lister, Py_NewRef(call->arguments[4]));
		} else {
			rc = look_up(self, directory, name, ino, out);
			if (rc > 0 && out->nodeid) {
				ino = out->attr.ino;
				kind = out->attr.mode & S_IFMT;
			}
		}
		if (rc < 0)
			return FAILED;
		if (!rc)
			continue;
		dirent->ino = ino;
		dirent->off = position < 2 ? (uint64_t)position + 1 : cookie(entry);
		dirent->namelen = (uint32_t)length;
		dirent->type = kind >> 12;
		memcpy(dirent->name, PyBytes_AS_STRING(name), length);
		memset(dirent->name + length, 0, size - head - sizeof *dirent - length);
		used += size;
	}
	return _PyBytes_Resize(&call->bytes, (Py_ssize_t)used) < 0 ? FAILED : ANSWERED;
}

static int trim(Shortcuts *self)
{
	PyObject *done;
	int rc = is_crowded(self);

	if (rc <= 0)
		return rc;
	done = PyObject_CallNoArgs(self->trim);
	Py_XDECREF(done);
	return done ? ANSWERED : FAILED;
}

static int read_page(Shortcuts *self, struct call *call, int plus)
{
	struct fuse_read_in in;
	PyObject *directory, *entries;
	int rc;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	if (trim(self) < 0)
		return FAILED;
	memcpy(&in, call->body, sizeof in);
	directory = find_node(self, call->node);
	if (!directory || !is_directory(directory))
		return PyErr_Occurred() ? FAILED : LEAVE;
	entries = entries_of(self, directory, in.offset);
	if (!entries)
		return FAILED;
	call->bytes = PyBytes_FromStringAndSize(NULL, in.size);
	rc = call->bytes ? fill(self, call, directory, entries, &in, plus) : FAILED;
	if (rc)
		Py_CLEAR(call->bytes);
	Py_DECREF(entries);
	return rc;
}

int do_readdir(Shortcuts *self, struct call *call)
{
	return read_page(self, call, 0);
}

int do_readdirplus(Shortcuts *self, struct call *call)
{
	return read_page(self, call, 1);
}
