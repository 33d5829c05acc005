/* READDIRPLUS: the pages of a list that the core has taken (core/listing.py). */
#include "shortcuts.h"

#define ENTRY sizeof(struct fuse_entry_out)

/* core/lookers.py: a process and a kind of what it lists, and their place in the table. */
static uint64_t looker(const struct call *call, uint32_t mode)
{
	return (uint64_t)call->pid << 1 | S_ISDIR(mode);
}

static Py_ssize_t place_in(Shortcuts *self, uint64_t key)
{
	return (Py_ssize_t)(key % (uint64_t)PyList_GET_SIZE(self->lookers));
}

static int wants_attributes(Shortcuts *self, const struct call *call, uint32_t mode)
{
	uint64_t key = looker(call, mode);

	return PyLong_AsUnsignedLongLongMask(PyList_GET_ITEM(self->lookers, place_in(self, key))) == key;
}

/* Filesystem.lookup()'s note of who looks up what it has listed. */
void note_lookup(Shortcuts *self, PyObject *directory, const struct call *call, uint32_t mode)
{
	uint64_t key = looker(call, mode);
	PyObject *number;

	if (slot_int(directory, shape.lister) != (long)call->pid)
		return;
	number = PyLong_FromUnsignedLongLong(key);
	if (number)
		(void)PyList_SetItem(self->lookers, place_in(self, key), number);
	else
		PyErr_Clear(); /* it stays unknown */
}

/* A look-up that isn't plain, by Python: its encoded answer, or 0 for a name to leave out. */
static int look_up_slowly(Shortcuts *self, PyObject *directory, PyObject *name, uint64_t ino,
			  struct fuse_entry_out *out)
{
	PyObject *arguments[2] = { directory, name }, *entry, *packed = NULL;
	int rc = -1;

	entry = PyObject_Vectorcall(self->lookup, arguments, 2, NULL);
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

int do_readdirplus(Shortcuts *self, struct call *call)
{
	struct fuse_read_in in;
	PyObject *key, *open, *directory, *entries;
	Py_ssize_t position;
	size_t used = 0;
	char *page;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	key = PyLong_FromUnsignedLongLong(in.fh);
	if (!key)
		return FAILED;
	open = PyDict_GetItemWithError(self->open_dirs, key);
	Py_DECREF(key);
	if (!open || !Py_IS_TYPE(open, shape.open_directory))
		return PyErr_Occurred() ? FAILED : LEAVE;
	directory = SLOT(open, shape.directory_node);
	entries = SLOT(open, shape.entries);
	if (in.offset == 0 || entries == Py_None) {
		PyObject *number = PyLong_FromUnsignedLongLong(in.offset);

		if (!number)
			return FAILED;
		entries = PyObject_VectorcallMethod(str_entries, (PyObject *[]){ self->filesystem, open, number }, 3,
						    NULL);
		Py_DECREF(number);
		if (!entries)
			return FAILED;
	} else {
		Py_INCREF(entries);
	}
	call->bytes = PyBytes_FromStringAndSize(NULL, in.size);
	if (!call->bytes || !PyList_Check(entries)) {
		Py_DECREF(entries);
		return FAILED;
	}
	page = PyBytes_AS_STRING(call->bytes);
	for (position = (Py_ssize_t)in.offset; position < PyList_GET_SIZE(entries); position++) {
		PyObject *entry = PyList_GET_ITEM(entries, position), *name = PyTuple_GET_ITEM(entry, 0);
		uint64_t ino = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(entry, 1));
		uint32_t kind = (uint32_t)PyLong_AsUnsignedLongMask(PyTuple_GET_ITEM(entry, 2));
		size_t length = (size_t)PyBytes_GET_SIZE(name);
		size_t size = (ENTRY + sizeof(struct fuse_dirent) + length + 7) & ~(size_t)7;
		struct fuse_entry_out *out = (struct fuse_entry_out *)(page + used);
		struct fuse_dirent *dirent = (struct fuse_dirent *)(out + 1);
		struct found found;
		int rc;

		if (used + size > in.size)
			break;
		if (position < 2) {
			memset(out, 0, ENTRY);
		} else if (ino && !wants_attributes(self, call, kind)) {
			memset(out, 0, ENTRY);
			set_slot(directory, shape.lister, Py_NewRef(call->arguments[4]));
		} else {
			rc = find_name(self, directory, name, &found);
			if (!rc)
				rc = pack_found(self, &found, out);
			if (rc == LEAVE) {
				rc = look_up_slowly(self, directory, name, ino, out);
				if (rc < 0)
					goto failed;
				if (!rc)
					continue;
			} else if (rc) {
				goto failed;
			} else if (!out->nodeid) {
				continue; /* removed since */
			}
			if (out->nodeid) {
				ino = out->attr.ino;
				kind = out->attr.mode & S_IFMT;
			}
		}
		dirent->ino = ino;
		dirent->off = (uint64_t)position + 1;
		dirent->namelen = (uint32_t)length;
		dirent->type = kind >> 12;
		memcpy(dirent->name, PyBytes_AS_STRING(name), length);
		memset(dirent->name + length, 0, size - ENTRY - sizeof *dirent - length);
		used += size;
	}
	Py_DECREF(entries);
	return _PyBytes_Resize(&call->bytes, (Py_ssize_t)used) < 0 ? FAILED : ANSWERED;
failed:
	Py_DECREF(entries);
	Py_CLEAR(call->bytes);
	return FAILED;
}
