/* RENAME of a file that upper alone has, to a new name or over another such file: core/renames.py. */
#include "shortcuts.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

/* One end of it. */
struct end {
	PyObject *parent, *name;
	const char *text;
	int directory; /* the parent in upper, open */
	struct found found;
};

/* Whether there is a directory of upper, open, in which names may come and go. */
static int ready(Shortcuts *self, uint64_t parent, const char *name, size_t length, struct end *end)
{
	if (length < 1 || length > NAME_MAX || changeable(self, parent, &end->parent, &end->directory) ||
	    slot_int(end->parent, shape.count) <= 0)
		return LEAVE;
	end->name = PyBytes_FromStringAndSize(name, (Py_ssize_t)length);
	if (!end->name)
		return FAILED;
	end->text = PyBytes_AS_STRING(end->name);
	return ANSWERED;
}

static int find(Shortcuts *self, struct end *end)
{
	return find_name(self, end->parent, end->name, &end->found);
}

/* A file of upper with one name, that hasn't come from lower, and nothing unusual to it. */
static int is_plain(Shortcuts *self, const struct end *end)
{
	PyObject *node = end->found.node, *extra;

	if (!Py_IS_TYPE(node, shape.node) || end->found.layer != UPPER || end->found.st.st_nlink > 1 ||
	    slot_int(node, shape.count) <= 0 || SLOT(node, shape.parent) != end->parent ||
	    slot_u64(node, shape.shown) != (slot_u64(node, shape.ino) ^ self->layers[UPPER].mix))
		return 0;
	extra = SLOT(node, shape.extra_at);
	return extra == Py_None ||
	       (SLOT(extra, shape.names) == Py_None && SLOT(extra, shape.key) == Py_None &&
		SLOT(extra, shape.index) == Py_None && SLOT(extra, shape.secret) == Py_False &&
		SLOT(extra, shape.work_name) == Py_None && slot_int(extra, shape.fd) < 0);
}

/* Renames._move_name(), and before it NodeTable.remove_name() of who had the new name. */
static int move_name(const struct end *from, const struct end *to)
{
	PyObject *node = from->found.node;
	int rc;

	Py_INCREF(node);
	rc = PyDict_DelItem(SLOT(from->parent, shape.children), from->name);
	if (!rc)
		rc = PyDict_SetItem(SLOT(to->parent, shape.children), to->name, node);
	set_slot(node, shape.parent, Py_NewRef(to->parent));
	set_slot(node, shape.name, Py_NewRef(to->name));
	Py_DECREF(node);
	return rc < 0 ? FAILED : ANSWERED;
}

static int move(Shortcuts *self, const struct end *from, const struct end *to)
{
	PyObject *replaced = to->found.node; /* lives on by descriptor while the kernel holds it */
	struct place place = { to->directory, to->text };
	int rc = settled(self);

	if (!rc && replaced)
		rc = hold(replaced, &place);
	if (rc)
		return rc;
	if (renameat(from->directory, from->text, to->directory, to->text) == 0)
		return move_name(from, to);
	rc = errno;
	if (replaced)
		let_go(replaced);
	return rc;
}

static int rename_to(Shortcuts *self, struct call *call, uint64_t to_node, uint32_t flags, const char *names)
{
	const char *end = call->body + call->length;
	size_t length = strnlen(names, (size_t)(end - names));
	const char *to_name = names + length + 1;
	struct end from = { 0 }, to = { 0 };
	int rc;

	call->size = 0;
	if (to_name >= end || end[-1] || flags & ~RENAME_NOREPLACE)
		return LEAVE;
	rc = ready(self, call->node, names, length, &from);
	if (!rc)
		rc = ready(self, to_node, to_name, strlen(to_name), &to);
	if (!rc)
		rc = find(self, &from);
	if (!rc)
		rc = find(self, &to);
	if (!rc && (!from.found.node || !is_plain(self, &from) || from.found.node == to.found.node ||
		    (to.found.node && !is_plain(self, &to))))
		rc = LEAVE;
	if (!rc && in_lowers(self, from.parent, from.text))
		rc = LEAVE; /* a whiteout stays behind */
	if (!rc && to.found.node && flags & RENAME_NOREPLACE)
		rc = EEXIST;
	if (!rc)
		rc = move(self, &from, &to);
	Py_XDECREF(from.name);
	Py_XDECREF(to.name);
	return rc;
}

int do_rename(Shortcuts *self, struct call *call)
{
	uint64_t to_node;

	if (call->length < (Py_ssize_t)sizeof to_node + 4)
		return LEAVE;
	memcpy(&to_node, call->body, sizeof to_node);
	return rename_to(self, call, to_node, 0, call->body + sizeof to_node);
}

int do_rename2(Shortcuts *self, struct call *call)
{
	struct fuse_rename2_in in;

	if (call->length < (Py_ssize_t)sizeof in + 4)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	return rename_to(self, call, in.newdir, in.flags, call->body + sizeof in);
}
