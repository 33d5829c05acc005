/* The core's objects as C sees them: their slots by offset, and how new ones are made. */
#include "shortcuts.h"

#include <structmember.h>
#include <unistd.h>

struct shape shape;
PyObject *str_next, *str_next_handle, *str_lower_timeout, *str_xwhiteouts, *str_spare, *str_index_inodes;
PyObject *str_watch, *str_open_directories, *str_group_with_room, *str_marked, *str_generation, *zero;
static PyObject *one, *minus_one, *kinds[16], *small[64];

static int offset(PyTypeObject *type, const char *name, Py_ssize_t *at)
{
	PyObject *member = PyObject_GetAttrString((PyObject *)type, name);
	int rc = -1;

	if (!member)
		return -1;
	if (Py_IS_TYPE(member, &PyMemberDescr_Type) &&
	    ((PyMemberDescrObject *)member)->d_member->type == T_OBJECT_EX) {
		*at = ((PyMemberDescrObject *)member)->d_member->offset;
		rc = 0;
	} else {
		PyErr_Format(PyExc_TypeError, "%s.%s is no slot", type->tp_name, name);
	}
	Py_DECREF(member);
	return rc;
}

static PyTypeObject *class_of(const char *module, const char *name)
{
	PyObject *imported = PyImport_ImportModule(module), *found;

	if (!imported)
		return NULL;
	found = PyObject_GetAttrString(imported, name);
	Py_DECREF(imported);
	if (found && !PyType_Check(found)) {
		Py_CLEAR(found);
		PyErr_Format(PyExc_TypeError, "%s.%s is no class", module, name);
	}
	return (PyTypeObject *)found;
}

int learn_shape(void)
{
	struct {
		PyTypeObject **type;
		const char *name;
		Py_ssize_t *at;
	} wanted[] = {
		{ &shape.node, "number", &shape.number },
		{ &shape.node, "count", &shape.count },
		{ &shape.node, "parent", &shape.parent },
		{ &shape.node, "name", &shape.name },
		{ &shape.node, "kind", &shape.kind },
		{ &shape.node, "layer", &shape.layer },
		{ &shape.node, "ino", &shape.ino },
		{ &shape.node, "shown", &shape.shown },
		{ &shape.node, "extra", &shape.extra_at },
		{ &shape.node, "stamp", &shape.stamp },
		{ &shape.directory, "children", &shape.children },
		{ &shape.directory, "lowers", &shape.lowers },
		{ &shape.directory, "lower_fds", &shape.lower_fds },
		{ &shape.directory, "upper_fd", &shape.upper_fd },
		{ &shape.directory, "flags", &shape.flags },
		{ &shape.directory, "lister", &shape.lister },
		{ &shape.directory, "redirect", &shape.redirect },
		{ &shape.extra, "names", &shape.names },
		{ &shape.extra, "key", &shape.key },
		{ &shape.extra, "fd", &shape.fd },
		{ &shape.extra, "index", &shape.index },
		{ &shape.extra, "lower_nlink", &shape.lower_nlink },
		{ &shape.extra, "handles", &shape.handles },
		{ &shape.extra, "opened", &shape.opened },
		{ &shape.extra, "secret", &shape.secret },
		{ &shape.extra, "work_name", &shape.work_name },
		{ &shape.extra, "privileged", &shape.privileged },
		{ &shape.open_file, "node", &shape.file_node },
		{ &shape.open_file, "fd", &shape.file_fd },
		{ &shape.open_file, "writable", &shape.file_writable },
		{ &shape.open_file, "io", &shape.file_io },
		{ &shape.open_file, "lower", &shape.file_lower },
	};
	size_t i;

	if (zero)
		return 0;
	if (!(shape.node = class_of("sdeefs.core.nodes", "Node")) ||
	    !(shape.directory = class_of("sdeefs.core.nodes", "Directory")) ||
	    !(shape.extra = class_of("sdeefs.core.nodes", "Extra")) ||
	    !(shape.open_file = class_of("sdeefs.core.handles", "OpenFile")))
		return -1;
	for (i = 0; i < sizeof wanted / sizeof *wanted; i++)
		if (offset(*wanted[i].type, wanted[i].name, wanted[i].at) < 0)
			return -1;
	for (i = 0; i < 16; i++)
		if (!(kinds[i] = PyLong_FromUnsignedLong(i << 12)))
			return -1;
	for (i = 0; i < 64; i++)
		if (!(small[i] = PyLong_FromUnsignedLong(i)))
			return -1;
	str_next = PyUnicode_InternFromString("_next");
	str_next_handle = PyUnicode_InternFromString("_next_handle");
	str_lower_timeout = PyUnicode_InternFromString("lower_timeout");
	str_xwhiteouts = PyUnicode_InternFromString("xwhiteouts");
	str_spare = PyUnicode_InternFromString("_spare_whiteout");
	str_index_inodes = PyUnicode_InternFromString("index_inodes");
	str_watch = PyUnicode_InternFromString("watch");
	str_open_directories = PyUnicode_InternFromString("open_directories");
	str_group_with_room = PyUnicode_InternFromString("group_with_room");
	str_marked = PyUnicode_InternFromString("marked");
	str_generation = PyUnicode_InternFromString("generation");
	one = PyLong_FromLong(1);
	minus_one = PyLong_FromLong(-1);
	if (!str_next || !str_next_handle || !str_lower_timeout || !str_xwhiteouts || !str_spare ||
	    !str_index_inodes || !str_watch || !str_open_directories || !str_group_with_room || !str_marked || !str_generation || !one || !minus_one)
		return -1;
	zero = PyLong_FromLong(0);
	return zero ? 0 : -1;
}

long slot_int(PyObject *object, Py_ssize_t at)
{
	PyObject *value = SLOT(object, at);
	int overflow;
	long number;

	if (!value || !PyLong_Check(value))
		return -1;
	number = PyLong_AsLongAndOverflow(value, &overflow);
	return overflow ? -1 : number;
}

uint64_t slot_u64(PyObject *object, Py_ssize_t at)
{
	PyObject *value = SLOT(object, at);

	return value && PyLong_Check(value) ? PyLong_AsUnsignedLongLongMask(value) : 0;
}

void set_slot(PyObject *object, Py_ssize_t at, PyObject *value)
{
	PyObject *old = SLOT(object, at);

	SLOT(object, at) = value;
	Py_XDECREF(old);
}

int is_directory(PyObject *node)
{
	return Py_IS_TYPE(node, shape.directory);
}

int is_true(PyObject *object, PyObject *attribute)
{
	PyObject *value = PyObject_GetAttr(object, attribute);
	int truth = value ? PyObject_IsTrue(value) : -1;

	Py_XDECREF(value);
	return truth;
}

static PyObject *numbered(PyObject *dict, uint64_t number)
{
	PyObject *key = PyLong_FromUnsignedLongLong(number), *found;

	if (!key)
		return NULL;
	found = PyDict_GetItemWithError(dict, key);
	Py_DECREF(key);
	return found;
}

PyObject *find_node(Shortcuts *self, uint64_t number)
{
	PyObject *node = numbered(self->nodes, number);

	return node && (Py_IS_TYPE(node, shape.node) || Py_IS_TYPE(node, shape.directory)) ? node : NULL;
}

PyObject *find_file(Shortcuts *self, uint64_t handle)
{
	PyObject *file = numbered(self->files, handle);

	return file && Py_IS_TYPE(file, shape.open_file) ? file : NULL;
}

PyObject *next_number(PyObject *owner, PyObject *attribute)
{
	PyObject *number = PyObject_GetAttr(owner, attribute), *after;

	if (!number)
		return NULL;
	after = PyNumber_Add(number, one);
	if (!after || PyObject_SetAttr(owner, attribute, after) < 0)
		Py_CLEAR(number);
	Py_XDECREF(after);
	return number;
}

PyObject *kind_object(unsigned type)
{
	return kinds[type & 15];
}

/* Take a new node's place in the tree, with one look-up's count still to be added. Steals node,
 * returns it borrowed. */
static PyObject *place(Shortcuts *self, PyObject *node, PyObject *parent, PyObject *name, const struct stat *st,
		       long layer, uint64_t shown, PyObject *stamp)
{
	PyObject *number = NULL, *ino = NULL, *shown_object = NULL;
	int rc;

	if (!node)
		return NULL;
	number = next_number(self->table, str_next);
	ino = PyLong_FromUnsignedLongLong(st->st_ino);
	shown_object = shown == st->st_ino ? Py_XNewRef(ino) : PyLong_FromUnsignedLongLong(shown);
	SLOT(node, shape.number) = Py_XNewRef(number);
	SLOT(node, shape.count) = Py_NewRef(zero);
	SLOT(node, shape.parent) = Py_NewRef(parent);
	SLOT(node, shape.name) = Py_NewRef(name);
	SLOT(node, shape.kind) = Py_NewRef(kinds[(st->st_mode & S_IFMT) >> 12]);
	SLOT(node, shape.layer) = layer < 64 ? Py_NewRef(small[layer]) : PyLong_FromLong(layer);
	SLOT(node, shape.ino) = ino;
	SLOT(node, shape.shown) = shown_object;
	SLOT(node, shape.extra_at) = Py_NewRef(Py_None);
	SLOT(node, shape.stamp) = Py_NewRef(stamp ? stamp : zero);
	rc = !number || !ino || !shown_object || !SLOT(node, shape.layer) ||
	     PyDict_SetItem(SLOT(parent, shape.children), name, node) < 0;
	if (!rc && PyDict_SetItem(self->nodes, number, node) < 0) {
		PyDict_DelItem(SLOT(parent, shape.children), name);
		rc = 1;
	}
	Py_XDECREF(number);
	Py_DECREF(node); /* the tree has it */
	return rc ? NULL : node;
}

PyObject *new_node(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st, long layer,
		   uint64_t shown, PyObject *stamp)
{
	return place(self, PyType_GenericAlloc(shape.node, 0), parent, name, st, layer, shown, stamp);
}

PyObject *new_directory(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st, long layer,
			PyObject *lowers)
{
	PyObject *node = PyType_GenericAlloc(shape.directory, 0), *children = PyDict_New();

	if (!node || !children) {
		Py_XDECREF(node);
		Py_XDECREF(children);
		return NULL;
	}
	SLOT(node, shape.children) = children;
	SLOT(node, shape.lowers) = Py_NewRef(lowers);
	SLOT(node, shape.lower_fds) = Py_NewRef(Py_None);
	SLOT(node, shape.upper_fd) = Py_NewRef(minus_one);
	SLOT(node, shape.flags) = Py_NewRef(zero);
	SLOT(node, shape.lister) = Py_NewRef(minus_one);
	SLOT(node, shape.redirect) = Py_NewRef(Py_None);
	return place(self, node, parent, name, st, layer, st->st_ino ^ self->layers[layer].mix, NULL);
}

/* Union._remember(): a descriptor of a directory is open, of its lower at `position` or of upper (-1). */
int remember(Shortcuts *self, PyObject *directory, long position, int fd)
{
	PyObject *done = PyObject_CallFunction(self->remember, "Oli", directory, position, fd);

	Py_XDECREF(done);
	return done ? ANSWERED : FAILED;
}

/* As Extra.__init__ makes it. */
static PyObject *new_extra(void)
{
	PyObject *extra = PyType_GenericAlloc(shape.extra, 0), *handles = PyList_New(0);

	if (!extra || !handles) {
		Py_XDECREF(extra);
		Py_XDECREF(handles);
		return NULL;
	}
	SLOT(extra, shape.names) = Py_NewRef(Py_None);
	SLOT(extra, shape.key) = Py_NewRef(Py_None);
	SLOT(extra, shape.fd) = Py_NewRef(minus_one);
	SLOT(extra, shape.index) = Py_NewRef(Py_None);
	SLOT(extra, shape.lower_nlink) = Py_NewRef(zero);
	SLOT(extra, shape.handles) = handles;
	SLOT(extra, shape.opened) = Py_NewRef(Py_None);
	SLOT(extra, shape.secret) = Py_NewRef(Py_False);
	SLOT(extra, shape.work_name) = Py_NewRef(Py_None);
	SLOT(extra, shape.privileged) = Py_NewRef(Py_None);
	return extra;
}

/* Node.more(). Borrowed; NULL with an exception. */
PyObject *more(PyObject *node)
{
	PyObject *extra = SLOT(node, shape.extra_at);

	if (extra != Py_None)
		return extra;
	extra = new_extra();
	if (extra)
		set_slot(node, shape.extra_at, extra);
	return extra;
}

void close_later(Shortcuts *self, int fd)
{
	if (self->dropped_count == self->dropped_room) {
		Py_ssize_t room = self->dropped_room ? 2 * self->dropped_room : 64;
		int *more = PyMem_Realloc(self->dropped, (size_t)room * sizeof *more);

		if (!more) {
			close(fd);
			return;
		}
		self->dropped = more;
		self->dropped_room = room;
	}
	self->dropped[self->dropped_count++] = fd;
}

void close_dropped(Shortcuts *self)
{
	int *fds = self->dropped;
	Py_ssize_t i, count = self->dropped_count;

	self->dropped = NULL;
	self->dropped_count = self->dropped_room = 0;
	Py_BEGIN_ALLOW_THREADS
	for (i = 0; i < count; i++)
		close(fds[i]);
	Py_END_ALLOW_THREADS
	PyMem_Free(fds);
}
