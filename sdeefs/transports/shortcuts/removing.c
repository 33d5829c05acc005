/* UNLINK and RMDIR: core/removal.py. */
#include "shortcuts.h"

#include <fcntl.h>
#include <unistd.h>

/* A file whose only name goes lives on by descriptor while the kernel holds it: Removal._hold(). */
int hold(PyObject *node, const struct place *place)
{
	PyObject *extra, *number;
	int fd = openat(place->fd, place->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0)
		return LEAVE;
	number = PyLong_FromLong(fd);
	extra = number ? more(node) : NULL;
	if (!extra) {
		Py_XDECREF(number);
		close(fd);
		return FAILED;
	}
	set_slot(extra, shape.fd, number);
	return ANSWERED;
}

void let_go(PyObject *node)
{
	PyObject *extra = SLOT(node, shape.extra_at);
	int error = errno;

	close((int)slot_int(extra, shape.fd));
	set_slot(extra, shape.fd, PyLong_FromLong(-1));
	errno = error;
}

/* Removal._link_whiteout(), once the work directory has one to link. */
static int link_whiteout(Shortcuts *self, int directory, const char *name)
{
	PyObject *spare = PyObject_GetAttr(self->upper, str_spare);
	int rc = LEAVE;

	if (!spare)
		return FAILED;
	if (PyBytes_Check(spare) && linkat(self->work_fd, PyBytes_AS_STRING(spare), directory, name, 0) == 0)
		rc = ANSWERED;
	Py_DECREF(spare);
	return rc;
}

int do_unlink(Shortcuts *self, struct call *call)
{
	PyObject *parent, *name, *node, *extra;
	struct found found;
	struct place place;
	const char *text;
	int fd, rc, below, held;

	if (call->length < 2 || changeable(self, call->node, &parent, &fd))
		return LEAVE;
	name = PyBytes_FromStringAndSize(call->body, call->length - 1);
	if (!name)
		return FAILED;
	text = PyBytes_AS_STRING(name);
	node = PyDict_GetItemWithError(SLOT(parent, shape.children), name);
	rc = node && Py_IS_TYPE(node, shape.node) ? find_name(self, parent, name, &found) : LEAVE;
	if (!rc && (found.node != node || (found.layer != UPPER && (found.st.st_nlink > 1 || self->work_fd < 0))))
		rc = LEAVE;
	extra = rc ? Py_None : SLOT(node, shape.extra_at);
	if (extra != Py_None && (slot_int(extra, shape.fd) >= 0 || SLOT(extra, shape.index) != Py_None))
		rc = LEAVE;
	if (!rc && slot_int(node, shape.count) <= 0)
		rc = LEAVE;
	below = rc || found.layer != UPPER ? 0 : in_lowers(self, parent, text);
	if (!rc && below)
		rc = LEAVE; /* a whiteout takes the place of upper's file */
	if (!rc)
		rc = place_of(self, node, &place);
	if (!rc)
		rc = settled(self);
	if (rc) {
		Py_DECREF(name);
		return rc;
	}
	Py_INCREF(node);
	held = !has_more_names(node);
	rc = held ? hold(node, &place) : 0;
	if (!rc) {
		if (found.layer != UPPER)
			rc = link_whiteout(self, fd, text);
		else if (unlinkat(fd, text, 0) < 0)
			rc = errno;
		if (!rc)
			rc = remove_name(node, parent, name);
		else if (held)
			let_go(node);
	}
	Py_DECREF(node);
	Py_DECREF(name);
	call->size = 0;
	return rc;
}

/* Of a directory that upper alone has. */
int do_rmdir(Shortcuts *self, struct call *call)
{
	PyObject *parent, *name, *node;
	struct found found;
	int fd, rc;

	if (call->length < 2 || changeable(self, call->node, &parent, &fd))
		return LEAVE;
	name = PyBytes_FromStringAndSize(call->body, call->length - 1);
	if (!name)
		return FAILED;
	rc = find_name(self, parent, name, &found);
	node = found.node;
	if (!rc && (!node || !is_directory(node) || found.layer != UPPER || slot_int(node, shape.count) <= 0 ||
		    PyTuple_GET_SIZE(SLOT(node, shape.lowers)) || in_lowers(self, parent, PyBytes_AS_STRING(name))))
		rc = LEAVE;
	if (!rc)
		rc = settled(self);
	if (!rc)
		rc = open_upper(self, node, fd); /* it stays reachable while the kernel holds it */
	if (!rc && unlinkat(fd, PyBytes_AS_STRING(name), AT_REMOVEDIR) < 0)
		rc = errno == ENOTEMPTY || errno == EEXIST ? LEAVE : errno; /* whiteouts, perhaps */
	if (!rc) {
		set_slot(node, shape.flags, PyLong_FromLong(slot_int(node, shape.flags) | FLAG_DEAD));
		rc = PyDict_DelItem(SLOT(parent, shape.children), name) < 0 ? FAILED : 0;
	}
	Py_DECREF(name);
	call->size = 0;
	return rc;
}
