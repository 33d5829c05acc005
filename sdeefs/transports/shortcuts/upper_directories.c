/* Directories of upper that the lowers have no part in. */
#include "shortcuts.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Whether all that the lowers have below a directory is hidden. */
static int shows_no_lower(PyObject *directory)
{
	return !PyTuple_GET_SIZE(SLOT(directory, shape.lowers)) || slot_int(directory, shape.flags) & FLAG_HIDDEN;
}

static PyObject *make(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st)
{
	PyObject *none = PyTuple_New(0), *node = NULL;

	if (none)
		node = new_directory(self, parent, name, st, UPPER, none);
	Py_XDECREF(none);
	return node;
}

/* Union._upper_fd(). LEAVE: it can't be opened. */
int open_upper(Shortcuts *self, PyObject *node, int above)
{
	int fd;

	if (slot_int(node, shape.upper_fd) >= 0)
		return ANSWERED;
	fd = openat(above, PyBytes_AS_STRING(SLOT(node, shape.name)), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return LEAVE;
	set_slot(node, shape.upper_fd, PyLong_FromLong(fd));
	return remember(self, node, -1, fd);
}

/* Creation._made(). NULL with an exception. */
PyObject *made_directory(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st, int above)
{
	PyObject *node = make(self, parent, name, st);
	long flags = FLAG_ACL_KNOWN; /* who has no default ACL hands none down */
	int crowded;

	if (!node)
		return NULL;
	if (PyTuple_GET_SIZE(SLOT(parent, shape.lowers)))
		flags |= FLAG_OPAQUE;
	set_slot(node, shape.flags, PyLong_FromLong(flags));
	crowded = is_crowded(self);
	return crowded < 0 || (!crowded && open_upper(self, node, above) == FAILED) ? NULL : node;
}

/* LOOKUP: Lookup._find_upper_directory() and _bind(). What upper says of a directory that is known hasn't
 * changed since, as nobody else writes there. */
int find_upper_directory(Shortcuts *self, PyObject *parent, PyObject *name, int fd, struct found *found)
{
	PyObject *child = PyDict_GetItemWithError(SLOT(parent, shape.children), name);
	char path[320];

	if (!child && PyErr_Occurred())
		return FAILED;
	if (child) {
		if (!is_directory(child) || slot_u64(child, shape.ino) != found->st.st_ino ||
		    slot_int(child, shape.layer) != UPPER || PyTuple_GET_SIZE(SLOT(child, shape.lowers)) ||
		    SLOT(child, shape.redirect) != Py_None ||
		    !(shows_no_lower(parent) || slot_int(child, shape.flags) & FLAG_OPAQUE))
			return LEAVE;
		found->node = child;
		return ANSWERED;
	}
	if (!shows_no_lower(parent) || PyBytes_GET_SIZE(name) > NAME_MAX)
		return LEAVE;
	xattr_path(path, sizeof path, &(struct place){ fd, PyBytes_AS_STRING(name) });
	if (llistxattr(path, NULL, 0) != 0)
		return LEAVE;
	found->node = make(self, parent, name, &found->st);
	return found->node ? ANSWERED : FAILED;
}
