/* Files of upper with several names: LINK, and how each name finds its node (core/nodes.py). */
#include "shortcuts.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/xattr.h>
#include <unistd.h>

static PyObject *key_of(const struct stat *st)
{
	return Py_BuildValue("(iK)", UPPER, (unsigned long long)st->st_ino);
}

/* NodeTable.set_key() of a node that has none. Steals `key`. */
static int set_key(Shortcuts *self, PyObject *node, PyObject *key)
{
	PyObject *extra = key ? more(node) : NULL;

	if (!extra || PyDict_SetItem(self->linked, key, node) < 0) {
		Py_XDECREF(key);
		return FAILED;
	}
	set_slot(extra, shape.key, key);
	return ANSWERED;
}

static int is_first(PyObject *node, PyObject *parent, PyObject *name)
{
	return SLOT(node, shape.parent) == parent && PyObject_RichCompareBool(SLOT(node, shape.name), name, Py_EQ) == 1;
}

/* NodeTable.add_name(), where nobody has it. */
static int add_name(PyObject *node, PyObject *parent, PyObject *name)
{
	PyObject *extra, *pair;
	int rc;

	if (PyDict_SetItem(SLOT(parent, shape.children), name, node) < 0)
		return FAILED;
	if (is_first(node, parent, name))
		return ANSWERED;
	extra = more(node);
	if (!extra)
		return FAILED;
	if (SLOT(extra, shape.names) == Py_None) {
		PyObject *names = PySet_New(NULL);

		if (!names)
			return FAILED;
		set_slot(extra, shape.names, names);
	}
	pair = PyTuple_Pack(2, parent, name);
	rc = pair ? PySet_Add(SLOT(extra, shape.names), pair) : -1;
	Py_XDECREF(pair);
	return rc < 0 ? FAILED : ANSWERED;
}

int has_more_names(PyObject *node)
{
	PyObject *extra = SLOT(node, shape.extra_at);

	return extra != Py_None && SLOT(extra, shape.names) != Py_None && PySet_GET_SIZE(SLOT(extra, shape.names)) > 0;
}

/* NodeTable.remove_name(): another name takes the place of the first. */
int remove_name(PyObject *node, PyObject *parent, PyObject *name)
{
	PyObject *names, *pair;
	int rc;

	if (PyDict_DelItem(SLOT(parent, shape.children), name) < 0)
		return FAILED;
	if (!has_more_names(node))
		return ANSWERED;
	names = SLOT(SLOT(node, shape.extra_at), shape.names);
	if (is_first(node, parent, name)) {
		pair = PySet_Pop(names);
		if (!pair)
			return FAILED;
		set_slot(node, shape.parent, Py_NewRef(PyTuple_GET_ITEM(pair, 0)));
		set_slot(node, shape.name, Py_NewRef(PyTuple_GET_ITEM(pair, 1)));
		rc = 0;
	} else {
		pair = PyTuple_Pack(2, parent, name);
		rc = pair ? PySet_Discard(names, pair) : -1;
	}
	Py_XDECREF(pair);
	return rc < 0 ? FAILED : ANSWERED;
}

/* Lookup._bind() of a name that isn't known; one without xattrs comes from no lower, nor from the index. */
int bind_linked(Shortcuts *self, PyObject *parent, PyObject *name, int fd, struct found *found)
{
	const struct stat *st = &found->st;
	PyObject *key, *known;
	char path[320];
	int rc;

	xattr_path(path, sizeof path, &(struct place){ fd, PyBytes_AS_STRING(name) });
	if (PyBytes_GET_SIZE(name) > NAME_MAX || llistxattr(path, NULL, 0) != 0)
		return LEAVE;
	key = key_of(st);
	known = key ? PyDict_GetItemWithError(self->linked, key) : NULL;
	if (known) {
		PyObject *extra = SLOT(known, shape.extra_at);

		Py_DECREF(key);
		if (!Py_IS_TYPE(known, shape.node) || slot_u64(known, shape.kind) != (st->st_mode & S_IFMT) ||
		    SLOT(known, shape.parent) == Py_None || (extra != Py_None && slot_int(extra, shape.fd) >= 0))
			return LEAVE;
		found->node = known;
		return add_name(known, parent, name);
	}
	if (PyErr_Occurred()) {
		Py_XDECREF(key);
		return FAILED;
	}
	found->node = new_node(self, parent, name, st, UPPER, st->st_ino ^ self->layers[UPPER].mix, NULL);
	if (!found->node) {
		Py_DECREF(key);
		return FAILED;
	}
	rc = set_key(self, found->node, key);
	return rc;
}

/* Creation._link() of a file of upper that hasn't come from lower. */
int do_link(Shortcuts *self, struct call *call)
{
	uint64_t number;
	Py_ssize_t length = call->length - (Py_ssize_t)sizeof number - 1;
	const char *text = call->body + sizeof number;
	PyObject *parent, *node, *extra, *name, *child;
	struct found found = { .layer = UPPER };
	struct place place;
	int directory, rc;

	if (length < 1 || length > NAME_MAX || changeable(self, call->node, &parent, &directory))
		return LEAVE;
	memcpy(&number, call->body, sizeof number);
	node = found.node = find_node(self, number);
	if (!node || !Py_IS_TYPE(node, shape.node) || slot_int(node, shape.layer) != UPPER ||
	    slot_u64(node, shape.shown) != (slot_u64(node, shape.ino) ^ self->layers[UPPER].mix) ||
	    place_of(self, node, &place) || !*place.name)
		return LEAVE;
	extra = SLOT(node, shape.extra_at);
	if (extra != Py_None && (SLOT(extra, shape.index) != Py_None || SLOT(extra, shape.work_name) != Py_None ||
				 SLOT(extra, shape.secret) != Py_False))
		return LEAVE;
	name = PyBytes_FromStringAndSize(text, length);
	if (!name)
		return FAILED;
	child = PyDict_GetItemWithError(SLOT(parent, shape.children), name);
	rc = child ? LEAVE : PyErr_Occurred() ? FAILED : settled(self);
	if (!rc && linkat(place.fd, place.name, directory, text, 0) < 0)
		rc = errno == EEXIST ? LEAVE : errno; /* a whiteout has the name */
	if (!rc && fstatat(directory, text, &found.st, AT_SYMLINK_NOFOLLOW) < 0)
		rc = errno;
	if (!rc)
		rc = add_name(node, parent, name);
	extra = SLOT(node, shape.extra_at);
	if (!rc && (extra == Py_None || SLOT(extra, shape.key) == Py_None))
		rc = set_key(self, node, key_of(&found.st));
	if (!rc)
		rc = pack_found(self, &found, (struct fuse_entry_out *)call->out);
	Py_DECREF(name);
	call->size = sizeof(struct fuse_entry_out);
	return rc;
}
