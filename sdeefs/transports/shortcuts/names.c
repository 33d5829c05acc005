/* LOOKUP and FORGET. */
#include "shortcuts.h"

#include <fcntl.h>

static PyObject *stamp_of(const struct stat *st)
{
	long long mtime = (long long)st->st_mtim.tv_sec * 1000000000LL + st->st_mtim.tv_nsec;
	PyObject *pair = Py_BuildValue("(LL)", (long long)st->st_size, mtime), *stamp;
	Py_hash_t hash;

	if (!pair)
		return NULL;
	hash = PyObject_Hash(pair);
	Py_DECREF(pair);
	stamp = hash == -1 && PyErr_Occurred() ? NULL : PyLong_FromSsize_t(hash);
	return stamp;
}

/* 1: the node that the kernel knows by this name is still this object; 0: there is none; or LEAVE. */
static int is_known(PyObject *child, const struct stat *st, long layer, PyObject *stamp)
{
	int same;

	if (!child)
		return 0;
	if (!Py_IS_TYPE(child, shape.node) || slot_u64(child, shape.ino) != st->st_ino ||
	    slot_int(child, shape.layer) != layer || (slot_u64(child, shape.kind) != (st->st_mode & S_IFMT)))
		return LEAVE;
	if (!stamp)
		return slot_u64(child, shape.stamp) == 0 ? 1 : LEAVE;
	same = PyObject_RichCompareBool(SLOT(child, shape.stamp), stamp, Py_EQ);
	return same > 0 ? 1 : same < 0 ? FAILED : LEAVE;
}

static int bind(Shortcuts *self, PyObject *parent, PyObject *name, long layer, int fd, struct found *found)
{
	PyObject *child = PyDict_GetItemWithError(SLOT(parent, shape.children), name), *stamp = NULL;
	const struct stat *st = &found->st;
	int known;

	if (!child && PyErr_Occurred())
		return FAILED;
	if (self->writeback && layer != UPPER && S_ISREG(st->st_mode) && !(stamp = stamp_of(st)))
		return FAILED;
	known = is_known(child, st, layer, stamp);
	if (known == 1) {
		found->node = child;
	} else if (known == 0 && layer == UPPER && st->st_nlink > 1) {
		known = bind_linked(self, parent, name, fd, found);
	} else if (known == 0) {
		if (layer == UPPER ? !is_plain_upper(parent, name, fd, st) : st->st_nlink > 1)
			known = LEAVE;
		else
			found->node = new_node(self, parent, name, st, layer,
					       st->st_ino ^ self->layers[layer].mix, stamp);
	}
	Py_XDECREF(stamp);
	if (known < 0)
		return known;
	found->layer = layer;
	return found->node ? ANSWERED : FAILED;
}

/* Zero-size files may be whiteouts where the layer has such. */
int has_xattr_whiteouts(Shortcuts *self, long layer)
{
	return is_true(self->layers[layer].object, str_xwhiteouts);
}

/* What a name stands for, if that is plain: Lookup._find() and _bind(). */
int find_name(Shortcuts *self, PyObject *parent, PyObject *name, struct found *found)
{
	const char *text = PyBytes_AS_STRING(name);
	long flags = slot_int(parent, shape.flags);
	PyObject *lowers = SLOT(parent, shape.lowers), *child;
	struct stat *st = &found->st;
	Py_ssize_t i;

	found->node = NULL;
	found->layer = UPPER;
	if (text[0] == '.' && (!text[1] || (text[1] == '.' && !text[2])))
		return LEAVE;
	if (slot_int(parent, shape.layer) == UPPER) {
		int fd = directory_fd(self, parent, UPPER);

		if (fd < 0)
			return LEAVE;
		if (fstatat(fd, text, st, AT_SYMLINK_NOFOLLOW) == 0) {
			if (S_ISDIR(st->st_mode))
				return find_upper_directory(self, parent, name, fd, found);
			if (st->st_size == 0 && S_ISCHR(st->st_mode))
				return LEAVE;
			if (st->st_size == 0 && S_ISREG(st->st_mode) && has_xattr_whiteouts(self, UPPER))
				return PyErr_Occurred() ? FAILED : LEAVE;
			return bind(self, parent, name, UPPER, fd, found);
		}
		if (errno != ENOENT)
			return LEAVE;
	}
	for (i = 0; !(flags & FLAG_HIDDEN) && i < PyTuple_GET_SIZE(lowers); i++) {
		long layer = PyLong_AsLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(lowers, i), 0));
		int fd = directory_fd(self, parent, layer);

		if (fd < 0)
			return LEAVE;
		if (fstatat(fd, text, st, AT_SYMLINK_NOFOLLOW) < 0) {
			if (errno != ENOENT)
				return LEAVE;
			continue;
		}
		if (S_ISDIR(st->st_mode) && i + 1 == PyTuple_GET_SIZE(lowers))
			return find_lower_directory(self, parent, name, PyTuple_GET_ITEM(lowers, i), fd, found);
		if (S_ISDIR(st->st_mode) || S_ISCHR(st->st_mode) || (st->st_nlink > 1 && self->index_on))
			return LEAVE;
		if (st->st_size == 0 && S_ISREG(st->st_mode) && has_xattr_whiteouts(self, layer))
			return PyErr_Occurred() ? FAILED : LEAVE;
		if (may_be_secret(self, layer, st, fd, text))
			return LEAVE;
		return bind(self, parent, name, layer, fd, found);
	}
	child = PyDict_GetItemWithError(SLOT(parent, shape.children), name);
	if (child || PyErr_Occurred())
		return child ? LEAVE : FAILED; /* it was there before */
	if (PyTuple_GET_SIZE(lowers))
		found->layer = UPPER + 1; /* lower may get one */
	return ANSWERED;
}

/* The answer to a look-up, which counts. */
int pack_found(Shortcuts *self, const struct found *found, struct fuse_entry_out *out)
{
	PyObject *count;
	int rc;

	memset(out, 0, sizeof *out);
	rc = timeout_of(self, found->layer, &out->entry_valid, &out->entry_valid_nsec);
	if (rc || !found->node)
		return rc;
	out->attr_valid = out->entry_valid;
	out->attr_valid_nsec = out->entry_valid_nsec;
	rc = shown_attributes(self, found->node, &found->st, &out->attr);
	if (rc)
		return rc;
	out->nodeid = slot_u64(found->node, shape.number);
	count = PyLong_FromLong(slot_int(found->node, shape.count) + 1);
	if (!count)
		return FAILED;
	set_slot(found->node, shape.count, count);
	return ANSWERED;
}

static PyObject *parent_of(Shortcuts *self, struct call *call)
{
	PyObject *parent = find_node(self, call->node);

	return parent && is_directory(parent) ? parent : NULL;
}

int do_lookup(Shortcuts *self, struct call *call)
{
	PyObject *parent = parent_of(self, call), *name;
	struct found found;
	int rc;

	if (!parent || call->length < 2)
		return LEAVE;
	name = PyBytes_FromStringAndSize(call->body, call->length - 1);
	if (!name)
		return FAILED;
	rc = find_name(self, parent, name, &found);
	if (!rc)
		rc = pack_found(self, &found, (struct fuse_entry_out *)call->out);
	if (!rc && found.node)
		note_lookup(self, parent, call, found.st.st_mode);
	call->size = sizeof(struct fuse_entry_out);
	Py_DECREF(name);
	return rc;
}

/* NodeTable.drop() of a plain file; 0: it is Python's. */
static int drop(Shortcuts *self, PyObject *node)
{
	PyObject *extra = SLOT(node, shape.extra_at), *parent = SLOT(node, shape.parent), *children;
	int fd = -1;

	if (!Py_IS_TYPE(node, shape.node) || parent == Py_None)
		return 0;
	children = SLOT(parent, shape.children);
	if (slot_int(parent, shape.count) <= 0)
		return 0;
	if (extra != Py_None) {
		if (PyList_GET_SIZE(SLOT(extra, shape.handles)) || has_more_names(node) ||
		    SLOT(extra, shape.work_name) != Py_None)
			return 0;
		fd = (int)slot_int(extra, shape.fd);
		if (SLOT(extra, shape.key) != Py_None &&
		    PyDict_GetItemWithError(self->linked, SLOT(extra, shape.key)) == node)
			PyDict_DelItem(self->linked, SLOT(extra, shape.key));
	}
	if (PyDict_GetItemWithError(children, SLOT(node, shape.name)) == node)
		PyDict_DelItem(children, SLOT(node, shape.name));
	if (PyErr_Occurred() || PyDict_DelItem(self->nodes, SLOT(node, shape.number)) < 0) {
		PyErr_Clear();
		return 1;
	}
	set_slot(node, shape.count, PyLong_FromLong(0));
	if (fd >= 0) {
		close_later(self, fd);
		set_slot(extra, shape.fd, PyLong_FromLong(-1));
	}
	return 1;
}

/* Whether a node has lost look-ups; 0: Python has to see to it. */
static int forget(Shortcuts *self, uint64_t number, uint64_t lookups)
{
	PyObject *node = find_node(self, number), *left;
	long count;

	if (!node || number == 1)
		return node != NULL;
	count = slot_int(node, shape.count);
	if (count <= 0 || lookups > (uint64_t)count)
		return 0;
	if (lookups == (uint64_t)count) {
		int dropped;

		Py_INCREF(node);
		dropped = drop(self, node);
		Py_DECREF(node);
		return dropped;
	}
	left = PyLong_FromLong(count - (long)lookups);
	if (!left)
		return 0;
	set_slot(node, shape.count, left);
	return 1;
}

int do_forget(Shortcuts *self, struct call *call)
{
	uint64_t lookups;

	if (call->length < 8)
		return LEAVE;
	memcpy(&lookups, call->body, 8);
	return forget(self, call->node, lookups) ? ANSWERED : LEAVE;
}

/* Those that are Python's it gets as one such request, once the lock is given up: they close descriptors. */
int do_batch_forget(Shortcuts *self, struct call *call)
{
	const struct fuse_forget_one *ones =
		(const struct fuse_forget_one *)(call->body + sizeof(struct fuse_batch_forget_in));
	struct fuse_batch_forget_in in;
	PyObject *rest;
	struct fuse_forget_one *left;
	uint32_t i, count = 0;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	if ((Py_ssize_t)(in.count * sizeof *ones + sizeof in) > call->length)
		return LEAVE;
	rest = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(in.count * sizeof *ones));
	if (!rest)
		return FAILED;
	left = (struct fuse_forget_one *)PyBytes_AS_STRING(rest);
	for (i = 0; i < in.count; i++) {
		struct fuse_forget_one one;

		memcpy(&one, &ones[i], sizeof one);
		if (!forget(self, one.nodeid, one.nlookup)) {
			PyErr_Clear(); /* no memory: Python may find some */
			memcpy(&left[count++], &one, sizeof one);
		}
	}
	if (!count) {
		Py_DECREF(rest);
		return ANSWERED;
	}
	call->bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(sizeof in + count * sizeof *left));
	if (call->bytes) {
		in.count = count;
		memcpy(PyBytes_AS_STRING(call->bytes), &in, sizeof in);
		memcpy(PyBytes_AS_STRING(call->bytes) + sizeof in, left, count * sizeof *left);
	}
	Py_DECREF(rest);
	return call->bytes ? LEAVE : FAILED;
}

/* Whether a lower has this name, below what upper says. */
int in_lowers(Shortcuts *self, PyObject *parent, const char *name)
{
	PyObject *lowers = SLOT(parent, shape.lowers);
	struct stat st;
	Py_ssize_t i;

	if (slot_int(parent, shape.flags) & FLAG_HIDDEN)
		return 0;
	for (i = 0; i < PyTuple_GET_SIZE(lowers); i++) {
		long layer = PyLong_AsLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(lowers, i), 0));
		int fd = directory_fd(self, parent, layer);

		if (fd < 0)
			return LEAVE;
		if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0)
			return S_ISCHR(st.st_mode) || st.st_size == 0 ? LEAVE : 1;
		if (errno != ENOENT)
			return LEAVE;
	}
	return 0;
}
