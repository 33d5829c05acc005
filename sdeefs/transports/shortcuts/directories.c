/* READDIRPLUS: the pages of a list that the core has taken (core/listing.py). */
#include "shortcuts.h"

#define ENTRY sizeof(struct fuse_entry_out)

/* A look-up that isn't plain, by Python: its encoded answer, or 0 for a name to leave out. */
static int look_up_slowly(Shortcuts *self, PyObject *directory, PyObject *name, uint64_t ino,
			  struct fuse_entry_out *out)
{
	PyObject *arguments[3] = { SLOT(directory, shape.number), name, Py_None }, *entry, *packed = NULL;
	int rc = -1;

	entry = PyObject_Vectorcall(self->lookup, arguments, 3, NULL);
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
