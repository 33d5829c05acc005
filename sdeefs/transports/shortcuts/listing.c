/* The entries of a directory, as core/listing.py takes them; those of several layers are Python's. */
#include "shortcuts.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

/* The only layer that has the directory, open; LEAVE where others say something, too. */
static int only_layer(Shortcuts *self, PyObject *directory, long *layer)
{
	long flags = slot_int(directory, shape.flags);
	PyObject *lowers = SLOT(directory, shape.lowers);
	Py_ssize_t below = flags & FLAG_HIDDEN ? 0 : PyTuple_GET_SIZE(lowers);
	int fd;

	if (flags & FLAG_DEAD)
		return LEAVE;
	*layer = slot_int(directory, shape.layer);
	if (*layer == UPPER) {
		/* Numbers of what was copied up are their origin's. */
		if (below || flags & FLAG_IMPURE)
			return LEAVE;
		switch (is_true(self->upper, str_index_inodes)) {
		case 0:
			break;
		case 1:
			return LEAVE;
		default:
			return FAILED;
		}
	} else {
		if (below != 1)
			return LEAVE;
		*layer = PyLong_AsLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(lowers, 0), 0));
	}
	switch (has_xattr_whiteouts(self, *layer)) {
	case 0:
		fd = directory_fd(self, directory, *layer);
		return fd < 0 ? LEAVE : fd;
	case 1:
		return LEAVE;
	default:
		return FAILED;
	}
}

/* (name, inode number, kind) at the end of the list. */
static int append(PyObject *list, PyObject *name, PyObject *ino, PyObject *kind)
{
	PyObject *entry = name && ino && kind ? PyTuple_Pack(3, name, ino, kind) : NULL;
	int rc = entry ? PyList_Append(list, entry) : -1;

	Py_XDECREF(entry);
	return rc < 0 ? FAILED : ANSWERED;
}

static int append_all(Shortcuts *self, PyObject *list, int fd, long layer)
{
	_Alignas(struct dirent64) char page[32768];
	ssize_t length, at;

	while ((length = getdents64(fd, page, sizeof page)) > 0) {
		for (at = 0; at < length;) {
			const struct dirent64 *one = (const struct dirent64 *)(page + at);
			PyObject *name, *ino;
			int rc;

			at += one->d_reclen;
			if (strcmp(one->d_name, ".") == 0 || strcmp(one->d_name, "..") == 0)
				continue;
			if (one->d_type == DT_UNKNOWN || one->d_type == DT_CHR)
				return LEAVE; /* a whiteout, perhaps */
			name = PyBytes_FromString(one->d_name);
			ino = PyLong_FromUnsignedLongLong(one->d_ino ^ self->layers[layer].mix);
			rc = append(list, name, ino, kind_object(one->d_type));
			Py_XDECREF(name);
			Py_XDECREF(ino);
			if (rc)
				return rc;
		}
	}
	return length < 0 ? LEAVE : ANSWERED;
}

/* Listing._snapshot() of a directory of one layer. */
static int take(Shortcuts *self, PyObject *directory, PyObject **taken)
{
	static const char here[] = ".", above[] = "..";
	PyObject *parent = SLOT(directory, shape.parent), *list, *dot, *dots;
	int place, fd, rc;
	long layer;

	place = only_layer(self, directory, &layer);
	if (place < 0)
		return place;
	fd = openat(place, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return LEAVE;
	list = PyList_New(0);
	dot = PyBytes_FromString(here);
	dots = PyBytes_FromString(above);
	if (parent == Py_None)
		parent = directory;
	rc = list ? append(list, dot, SLOT(directory, shape.shown), kind_object(DT_DIR)) : FAILED;
	if (!rc)
		rc = append(list, dots, SLOT(parent, shape.shown), kind_object(DT_DIR));
	if (!rc)
		rc = append_all(self, list, fd, layer);
	close(fd);
	Py_XDECREF(dot);
	Py_XDECREF(dots);
	if (rc)
		Py_XDECREF(list);
	else
		*taken = list;
	return rc;
}

/* core/listing.py's cookie(), by which lists are ordered. */
uint64_t cookie(PyObject *entry)
{
	PyObject *name = PyTuple_GET_ITEM(entry, 0);
	const unsigned char *at = (const unsigned char *)PyBytes_AS_STRING(name);
	uint64_t value = 0xCBF29CE484222325;
	Py_ssize_t left;

	for (left = PyBytes_GET_SIZE(name); left; left--)
		value = (value ^ *at++) * 0x100000001B3;
	value &= INT64_MAX;
	return value < 3 ? 3 : value;
}

struct placed {
	uint64_t cookie;
	PyObject *entry;
};

static int by_cookie(const void *one, const void *other)
{
	uint64_t a = ((const struct placed *)one)->cookie, b = ((const struct placed *)other)->cookie;

	return a < b ? -1 : a > b;
}

/* All but "." and "..", which stay in front. */
static int sort(PyObject *list)
{
	PyObject **entries = ((PyListObject *)list)->ob_item + 2;
	Py_ssize_t i, count = PyList_GET_SIZE(list) - 2;
	struct placed *all = PyMem_Malloc(((size_t)count + 1) * sizeof *all);

	if (!all) {
		PyErr_NoMemory();
		return FAILED;
	}
	for (i = 0; i < count; i++)
		all[i] = (struct placed){ cookie(entries[i]), entries[i] };
	qsort(all, (size_t)count, sizeof *all, by_cookie);
	for (i = 0; i < count; i++)
		entries[i] = all[i].entry;
	PyMem_Free(all);
	return ANSWERED;
}

/* The place in a list of what comes after an offset. */
Py_ssize_t following(PyObject *entries, uint64_t offset)
{
	Py_ssize_t low = 2, high = PyList_GET_SIZE(entries);

	if (offset < 2)
		return (Py_ssize_t)offset;
	while (low < high) {
		Py_ssize_t middle = low + (high - low) / 2;

		if (cookie(PyList_GET_ITEM(entries, middle)) <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Listing._entries(): the list to go on in; a new reference, NULL with an exception. */
PyObject *entries_of(Shortcuts *self, PyObject *directory, uint64_t offset)
{
	PyObject *entries = NULL, *kept, *number;

	if (offset) {
		entries = PyDict_GetItemWithError(self->lists, SLOT(directory, shape.number));
		if (entries || PyErr_Occurred())
			return Py_XNewRef(entries);
	}
	switch (take(self, directory, &entries)) {
	case ANSWERED:
		kept = sort(entries) ? NULL : PyObject_CallFunctionObjArgs(self->keep_list, directory, entries, NULL);
		if (!kept)
			Py_CLEAR(entries);
		Py_XDECREF(kept);
		return entries;
	case LEAVE:
		number = PyLong_FromUnsignedLongLong(offset);
		entries = number ? PyObject_CallFunctionObjArgs(self->entries, directory, number, NULL) : NULL;
		Py_XDECREF(number);
		if (entries && !PyList_Check(entries)) {
			PyErr_SetString(PyExc_TypeError, "entries: a list");
			Py_CLEAR(entries);
		}
		return entries;
	default:
		return NULL;
	}
}
