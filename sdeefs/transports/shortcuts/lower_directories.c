/* LOOKUP of a directory that only one lower has: Lookup._find_lower(), _bind(), and the watch's mark. */
#include "shortcuts.h"

#include <fcntl.h>
#include <stddef.h>
#include <sys/fanotify.h>
#include <unistd.h>

#define HANDLE_ROOM 128

/* Whether so many are open that some have to be closed, which Python does between requests. */
int is_crowded(Shortcuts *self)
{
	PyObject *open = PyObject_GetAttr(self->filesystem, str_open_directories);
	long count = open ? PyLong_AsLong(open) : -1;

	Py_XDECREF(open);
	return PyErr_Occurred() ? FAILED : count > self->max_directories;
}

/* 1: another directory may be kept open and watched; the watch (None: there is none), and its group. */
static int is_room(Shortcuts *self, PyObject **watch, int *group)
{
	PyObject *number;
	int crowded = is_crowded(self);

	*group = -1;
	*watch = crowded < 0 ? NULL : PyObject_GetAttr(self->filesystem, str_watch);
	if (!*watch)
		return FAILED;
	if (crowded)
		return 0;
	if (*watch == Py_None)
		return 1;
	number = PyObject_CallMethodNoArgs(*watch, str_group_with_room);
	*group = number ? (int)PyLong_AsLong(number) : -1;
	Py_XDECREF(number);
	return PyErr_Occurred() ? FAILED : *group >= 0;
}

/* The handle by which events name a directory that is watched from now on, as bytes; NULL: not here. */
static PyObject *watched(Shortcuts *self, int group, int fd)
{
	union {
		struct file_handle head;
		char room[sizeof(struct file_handle) + HANDLE_ROOM];
	} handle = { .head.handle_bytes = HANDLE_ROOM };
	char path[32];
	int mount;

	xattr_path(path, sizeof path, &(struct place){ fd, "" });
	if (fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_ONLYDIR, self->watched_events, AT_FDCWD, path) < 0 ||
	    name_to_handle_at(fd, "", &handle.head, &mount, AT_EMPTY_PATH) < 0)
		return NULL;
	return PyBytes_FromStringAndSize(handle.room + offsetof(struct file_handle, handle_type),
					 (Py_ssize_t)(sizeof(int) + handle.head.handle_bytes));
}

/* The object that was looked up, open, and nothing mounted on it; -1: Python says what it is. */
static int open_same(int parent, const char *name, const struct stat *st)
{
	int fd = openat(parent, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	struct stat above, here;

	if (fd < 0)
		return -1;
	if (fstat(fd, &here) == 0 && here.st_ino == st->st_ino && fstat(parent, &above) == 0 &&
	    above.st_dev == here.st_dev)
		return fd;
	close(fd);
	return -1;
}

/* ((layer, path of the directory from the layer's root),) */
static PyObject *lowers_of(PyObject *above, PyObject *name)
{
	PyObject *path = PyTuple_GET_ITEM(above, 1), *whole, *one, *all;

	if (PyBytes_GET_SIZE(path))
		whole = PyBytes_FromFormat("%s/%s", PyBytes_AS_STRING(path), PyBytes_AS_STRING(name));
	else
		whole = Py_NewRef(name);
	one = whole ? PyTuple_Pack(2, PyTuple_GET_ITEM(above, 0), whole) : NULL;
	all = one ? PyTuple_Pack(1, one) : NULL;
	Py_XDECREF(whole);
	Py_XDECREF(one);
	return all;
}

/* A directory that is known by this name: it needs no more than the same lowers. */
static int is_same(PyObject *child, const struct stat *st, long layer, PyObject *lowers)
{
	int same;

	if (!is_directory(child) || slot_u64(child, shape.ino) != st->st_ino || slot_int(child, shape.layer) != layer ||
	    slot_int(child, shape.flags) & FLAGS_FOUND || SLOT(child, shape.redirect) != Py_None)
		return LEAVE;
	same = PyObject_RichCompareBool(SLOT(child, shape.lowers), lowers, Py_EQ);
	return same < 0 ? FAILED : same ? ANSWERED : LEAVE;
}

/* Its descriptor is the node's from here on, also where this fails. */
static int keep(Shortcuts *self, PyObject *node, int fd, PyObject *watch, PyObject *handle)
{
	PyObject *number = PyLong_FromLong(fd), *fds = number ? PyList_New(1) : NULL, *done;

	if (!fds) {
		Py_XDECREF(number);
		close(fd);
		return FAILED;
	}
	PyList_SET_ITEM(fds, 0, number);
	set_slot(node, shape.lower_fds, fds);
	if (remember(self, node, 0, fd))
		return FAILED;
	if (!handle)
		return ANSWERED;
	done = PyObject_CallMethodObjArgs(watch, str_marked, SLOT(node, shape.number), handle, NULL);
	Py_XDECREF(done);
	return done ? ANSWERED : FAILED;
}

static int make(Shortcuts *self, PyObject *parent, PyObject *name, PyObject *lowers, long layer, int above,
		struct found *found)
{
	PyObject *watch, *handle = NULL;
	int group, fd = -1, rc = is_room(self, &watch, &group);

	if (rc > 0) {
		fd = open_same(above, PyBytes_AS_STRING(name), &found->st);
		if (fd >= 0 && group >= 0)
			handle = watched(self, group, fd);
		rc = fd >= 0 && (group < 0 || handle) ? 1 : PyErr_Occurred() ? FAILED : 0;
	}
	if (rc > 0) {
		found->node = new_directory(self, parent, name, &found->st, layer, lowers);
		if (found->node) {
			rc = keep(self, found->node, fd, watch, handle);
			fd = -1;
		} else {
			rc = FAILED;
		}
	} else if (!rc) {
		rc = LEAVE;
	}
	if (fd >= 0)
		close(fd);
	Py_XDECREF(handle);
	Py_XDECREF(watch);
	return rc;
}

int find_lower_directory(Shortcuts *self, PyObject *parent, PyObject *name, PyObject *above, int fd,
			 struct found *found)
{
	long layer = PyLong_AsLong(PyTuple_GET_ITEM(above, 0));
	PyObject *child, *lowers;
	int rc;

	if (self->secrets.on || has_xattr_whiteouts(self, layer))
		return PyErr_Occurred() ? FAILED : LEAVE;
	child = PyDict_GetItemWithError(SLOT(parent, shape.children), name);
	if (!child && PyErr_Occurred())
		return FAILED;
	lowers = lowers_of(above, name);
	if (!lowers)
		return FAILED;
	found->layer = layer;
	if (child) {
		rc = is_same(child, &found->st, layer, lowers);
		found->node = child;
	} else {
		rc = make(self, parent, name, lowers, layer, fd, found);
	}
	Py_DECREF(lowers);
	return rc;
}
