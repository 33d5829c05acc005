/* The class Shortcuts: one mount's, whose methods stand in the transports' table of handlers. */
#include "shortcuts.h"

typedef int (*shortcut)(Shortcuts *self, struct call *call);

static PyObject *leave(Shortcuts *self, uint32_t opcode, PyObject *const *arguments, Py_ssize_t count)
{
	self->left[opcode]++;
	return PyObject_Vectorcall(PyList_GET_ITEM(self->handlers, opcode), arguments, (size_t)count, NULL);
}

/* The core's lock; -1 with an exception. */
static int lock(Shortcuts *self)
{
	PyObject *taken = PyObject_CallNoArgs(self->acquire);

	Py_XDECREF(taken);
	return taken ? 0 : -1;
}

static int unlock(Shortcuts *self)
{
	PyObject *type, *value, *trace, *done;

	PyErr_Fetch(&type, &value, &trace);
	done = PyObject_CallNoArgs(self->release);
	if (!done)
		PyErr_WriteUnraisable(self->release);
	PyErr_Restore(type, value, trace);
	Py_XDECREF(done);
	return 0;
}

static PyObject *serve(Shortcuts *self, uint32_t opcode, shortcut shortcut, int locked,
		       PyObject *const *arguments, Py_ssize_t count)
{
	struct call call = { .arguments = arguments };
	int rc = LEAVE;

	if (count != 5 || !PyBytes_CheckExact(arguments[1]))
		return leave(self, opcode, arguments, count);
	call.node = PyLong_AsUnsignedLongLongMask(arguments[0]);
	call.body = PyBytes_AS_STRING(arguments[1]);
	call.length = PyBytes_GET_SIZE(arguments[1]);
	call.uid = (uint32_t)PyLong_AsUnsignedLongMask(arguments[2]);
	call.gid = (uint32_t)PyLong_AsUnsignedLongMask(arguments[3]);
	call.pid = (uint32_t)PyLong_AsUnsignedLongMask(arguments[4]);
	if (locked) {
		if (lock(self) < 0)
			return NULL;
		rc = shortcut(self, &call);
		unlock(self);
		if (self->dropped_count)
			close_dropped(self);
	} else {
		rc = shortcut(self, &call);
	}
	if (rc == ANSWERED)
		return call.bytes ? call.bytes : PyBytes_FromStringAndSize(call.out, (Py_ssize_t)call.size);
	if (rc == LEAVE && call.bytes) {
		PyObject *others[5], *reply;

		memcpy(others, arguments, sizeof others);
		others[1] = call.bytes;
		reply = leave(self, opcode, others, count);
		Py_DECREF(call.bytes);
		return reply;
	}
	if (rc == LEAVE)
		return leave(self, opcode, arguments, count);
	if (rc == FAILED) {
		if (!PyErr_Occurred())
			PyErr_SetString(PyExc_RuntimeError, "a shortcut failed");
		return NULL;
	}
	return PyLong_FromLong(rc); /* an errno: to raise it would take longer than all else here */
}

#define METHOD(name, opcode, locked)                                                                \
	static PyObject *Shortcuts_##name(Shortcuts *self, PyObject *const *arguments, Py_ssize_t count) \
	{                                                                                           \
		return serve(self, opcode, do_##name, locked, arguments, count);                    \
	}
#define do_copy_file_range_64 do_copy_file_range
METHOD(lookup, FUSE_LOOKUP, 1)
METHOD(getattr, FUSE_GETATTR, 1)
METHOD(setattr, FUSE_SETATTR, 1)
METHOD(symlink, FUSE_SYMLINK, 1)
METHOD(mknod, FUSE_MKNOD, 1)
METHOD(mkdir, FUSE_MKDIR, 1)
METHOD(unlink, FUSE_UNLINK, 1)
METHOD(rmdir, FUSE_RMDIR, 1)
METHOD(rename, FUSE_RENAME, 1)
METHOD(rename2, FUSE_RENAME2, 1)
METHOD(link, FUSE_LINK, 1)
METHOD(open, FUSE_OPEN, 1)
METHOD(read, FUSE_READ, 0)
METHOD(release, FUSE_RELEASE, 1)
METHOD(setxattr, FUSE_SETXATTR, 1)
METHOD(getxattr, FUSE_GETXATTR, 1)
METHOD(listxattr, FUSE_LISTXATTR, 1)
METHOD(create, FUSE_CREATE, 1)
METHOD(copy_file_range, FUSE_COPY_FILE_RANGE, 0)
METHOD(copy_file_range_64, FUSE_COPY_FILE_RANGE_64, 0)
METHOD(readdir, FUSE_READDIR, 1)
METHOD(readdirplus, FUSE_READDIRPLUS, 1)

/* Of these the kernel expects no reply. */
#define SILENT(name, opcode)                                                                        \
	static PyObject *Shortcuts_##name(Shortcuts *self, PyObject *const *arguments, Py_ssize_t count) \
	{                                                                                           \
		PyObject *done = serve(self, opcode, do_##name, 1, arguments, count);               \
		if (!done)                                                                          \
			return NULL;                                                                \
		Py_DECREF(done);                                                                    \
		Py_RETURN_NONE;                                                                     \
	}
SILENT(forget, FUSE_FORGET)
SILENT(batch_forget, FUSE_BATCH_FORGET)

PyDoc_STRVAR(left_doc, "left() -> list[int]\n\nRequests that were left to Python, by opcode.");

static PyObject *Shortcuts_left(Shortcuts *self, PyObject *Py_UNUSED(ignored))
{
	return counts_list(self->left);
}

static int read_map(PyObject *ranges, struct id_map *map)
{
	Py_ssize_t i;

	map->count = PyTuple_Size(ranges);
	if (map->count < 0)
		return -1;
	map->ranges = PyMem_Calloc((size_t)map->count + 1, sizeof *map->ranges);
	if (!map->ranges)
		return -1;
	for (i = 0; i < map->count; i++) {
		struct id_range *range = &map->ranges[i];
		unsigned long long inside, outside, count;

		if (!PyArg_ParseTuple(PyTuple_GET_ITEM(ranges, i), "KKK", &inside, &outside, &count))
			return -1;
		*range = (struct id_range){ inside, outside, count };
	}
	return 0;
}

static int read_owners(PyObject *maps, struct owners *owners)
{
	PyObject *uids, *gids;

	if (!PyArg_ParseTuple(maps, "O!O!p", &PyTuple_Type, &uids, &PyTuple_Type, &gids, &owners->squash))
		return -1;
	if (read_map(uids, &owners->uids) < 0 || read_map(gids, &owners->gids) < 0)
		return -1;
	owners->identity = !owners->uids.count && !owners->gids.count && !owners->squash;
	return 0;
}

static int read_secrets(PyObject *words, struct secrets *secrets)
{
	Py_ssize_t i;

	if (words == Py_None)
		return 0;
	if (!PyTuple_Check(words) || PyTuple_GET_SIZE(words) < 1) {
		PyErr_SetString(PyExc_TypeError, "secrets: (uid, gid, ...)");
		return -1;
	}
	secrets->gid_count = PyTuple_GET_SIZE(words) - 1;
	secrets->gids = PyMem_Calloc((size_t)secrets->gid_count + 1, sizeof *secrets->gids);
	if (!secrets->gids)
		return -1;
	secrets->uid = (uint32_t)PyLong_AsUnsignedLongMask(PyTuple_GET_ITEM(words, 0));
	for (i = 0; i < secrets->gid_count; i++)
		secrets->gids[i] = (uint32_t)PyLong_AsUnsignedLongMask(PyTuple_GET_ITEM(words, i + 1));
	secrets->on = 1;
	return PyErr_Occurred() ? -1 : 0;
}

/* [(Layer or None, descriptor, what is xored into inode numbers)], by the layer's number. */
static int read_layers(Shortcuts *self, PyObject *layers)
{
	Py_ssize_t i;

	self->layers = PyMem_Calloc((size_t)PyList_GET_SIZE(layers) + 1, sizeof *self->layers);
	if (!self->layers)
		return -1;
	for (i = 0; i < PyList_GET_SIZE(layers); i++) {
		struct layer *layer = &self->layers[i];
		unsigned long long mix;

		if (!PyArg_ParseTuple(PyList_GET_ITEM(layers, i), "OiK", &layer->object, &layer->fd, &mix))
			return -1;
		layer->mix = mix;
		Py_INCREF(layer->object);
		self->layer_count = i + 1;
	}
	return 0;
}

static PyObject *attribute(PyObject *object, const char *first, const char *second)
{
	PyObject *found = PyObject_GetAttrString(object, first), *deeper;

	if (!found || !second)
		return found;
	deeper = PyObject_GetAttrString(found, second);
	Py_DECREF(found);
	return deeper;
}

static PyObject *imported(const char *module, const char *first, const char *second)
{
	PyObject *found = PyImport_ImportModule(module), *deeper;

	if (!found)
		return NULL;
	deeper = attribute(found, first, second);
	Py_DECREF(found);
	return deeper;
}

static int find_objects(Shortcuts *self)
{
	PyObject *filesystem = self->filesystem;

	self->acquire = attribute(filesystem, "lock", "acquire");
	self->release = attribute(filesystem, "lock", "release");
	self->table = attribute(filesystem, "table", NULL);
	self->nodes = attribute(filesystem, "table", "nodes");
	self->files = attribute(filesystem, "_files", NULL);
	self->linked = attribute(filesystem, "table", "linked");
	self->upper = attribute(filesystem, "upper", NULL);
	self->lookup = attribute(filesystem, "_lookup", NULL);
	self->entries = attribute(filesystem, "_entries", NULL);
	self->trim = attribute(filesystem, "_trim", NULL);
	self->remember = attribute(filesystem, "_remember", NULL);
	self->inode_number = attribute(filesystem, "_inode_number", NULL);
	self->keep_list = attribute(filesystem, "_keep_list", NULL);
	self->lists = attribute(filesystem, "_lists", NULL);
	self->lookers = attribute(filesystem, "lookers", "table");
	self->credentials = PyImport_ImportModule("sdeefs.core.credentials");
	if (self->credentials) {
		self->settle = attribute(self->credentials, "settle", NULL);
		self->become = attribute(self->credentials, "become", NULL);
	}
	self->pack_entry = imported("sdeefs.transports.wire", "pack_entry", NULL);
	self->io_passthrough = imported("sdeefs.core.api", "Io", "PASSTHROUGH");
	self->io_cached = imported("sdeefs.core.api", "Io", "CACHED");
	if (self->backing != Py_None) {
		self->acquire_backing = attribute(self->backing, "acquire", NULL);
		self->release_backing = attribute(self->backing, "release", NULL);
		if (self->device >= 0) {
			self->uses = attribute(self->backing, "uses", NULL);
			self->node_of = attribute(self->backing, "node_of", NULL);
		}
	}
	return PyErr_Occurred() || !PyDict_Check(self->nodes) || !PyDict_Check(self->files) || !PyDict_Check(self->linked) ||
			       !PyDict_Check(self->lists) || !PyList_Check(self->lookers) ? -1 : 0;
}

static int Shortcuts_init(Shortcuts *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "filesystem", "handlers", "backing_ids", "open_base", "layers",
				 "upper_owners", "lower_owners", "unmapped", "secrets", "upper_timeout",
				 "writable", "index_on", "writeback", "passthrough", "setxattr_ext", "volatile",
				 "work_fd", "own_prefix", "max_directories", "watched_events",
				 "read_later", "device", NULL };
	PyObject *layers, *upper_owners, *lower_owners, *secrets;
	unsigned long long watched_events;
	const char *prefix;

	if (self->filesystem) {
		PyErr_SetString(PyExc_RuntimeError, "made already");
		return -1;
	}
	if (learn_shape() < 0)
		return -1;
	if (!PyArg_ParseTupleAndKeywords(
		    args, kwargs, "OO!OIO!OOlOdppppppiylKOi", names, &self->filesystem, &PyList_Type, &self->handlers,
		    &self->backing, &self->open_base, &PyList_Type, &layers, &upper_owners, &lower_owners,
		    &self->unmapped, &secrets, &self->upper_timeout, &self->writable, &self->index_on,
		    &self->writeback, &self->passthrough, &self->setxattr_ext, &self->is_volatile, &self->work_fd,
		    &prefix, &self->max_directories, &watched_events,
		    &self->read_later, &self->device)) {
		self->filesystem = self->handlers = self->backing = self->read_later = NULL;
		return -1;
	}
	self->watched_events = watched_events;
	Py_INCREF(self->filesystem);
	Py_INCREF(self->handlers);
	Py_INCREF(self->backing);
	Py_INCREF(self->read_later);
	if (strlen(prefix) >= sizeof self->own_prefix) {
		PyErr_SetString(PyExc_ValueError, "own_prefix is too long");
		return -1;
	}
	strcpy(self->own_prefix, prefix);
	if (read_layers(self, layers) < 0 || read_owners(upper_owners, &self->upper_owners) < 0 ||
	    read_owners(lower_owners, &self->lower_owners) < 0 || read_secrets(secrets, &self->secrets) < 0)
		return -1;
	return find_objects(self);
}

/* All objects that are held, for the collector. */
#define OBJECTS(do)                                                                               \
	do(self->filesystem);                                                                     \
	do(self->acquire);                                                                        \
	do(self->release);                                                                        \
	do(self->nodes);                                                                          \
	do(self->files);                                                                          \
	do(self->linked);                                                                         \
	do(self->table);                                                                          \
	do(self->upper);                                                                          \
	do(self->handlers);                                                                       \
	do(self->backing);                                                                        \
	do(self->acquire_backing);                                                                \
	do(self->release_backing);                                                                \
	do(self->uses);                                                                           \
	do(self->node_of);                                                                        \
	do(self->credentials);                                                                    \
	do(self->read_later);                                                                     \
	do(self->settle);                                                                         \
	do(self->become);                                                                         \
	do(self->pack_entry);                                                                     \
	do(self->lookup);                                                                         \
	do(self->entries);                                                                        \
	do(self->inode_number);                                                                   \
	do(self->remember);                                                                       \
	do(self->trim);                                                                           \
	do(self->keep_list);                                                                      \
	do(self->lists);                                                                          \
	do(self->lookers);                                                                        \
	do(self->io_passthrough);                                                                 \
	do(self->io_cached)

static int Shortcuts_traverse(Shortcuts *self, visitproc visit, void *arg)
{
	Py_ssize_t i;

	OBJECTS(Py_VISIT);
	for (i = 0; i < self->layer_count; i++)
		Py_VISIT(self->layers[i].object);
	return 0;
}

static int Shortcuts_clear(Shortcuts *self)
{
	Py_ssize_t i;

	OBJECTS(Py_CLEAR);
	for (i = 0; i < self->layer_count; i++)
		Py_CLEAR(self->layers[i].object);
	return 0;
}

static void Shortcuts_dealloc(Shortcuts *self)
{
	PyObject_GC_UnTrack(self);
	Shortcuts_clear(self);
	PyMem_Free(self->layers);
	PyMem_Free(self->upper_owners.uids.ranges);
	PyMem_Free(self->upper_owners.gids.ranges);
	PyMem_Free(self->lower_owners.uids.ranges);
	PyMem_Free(self->lower_owners.gids.ranges);
	PyMem_Free(self->secrets.gids);
	PyMem_Free(self->dropped);
	Py_TYPE(self)->tp_free((PyObject *)self);
}

#define ROW(name) { #name, (PyCFunction)(void (*)(void))Shortcuts_##name, METH_FASTCALL, NULL }
static PyMethodDef Shortcuts_methods[] = {
	ROW(lookup), ROW(getattr), ROW(setattr), ROW(symlink), ROW(mknod), ROW(mkdir), ROW(unlink), ROW(rmdir),
	ROW(rename), ROW(rename2), ROW(link), ROW(open), ROW(read), ROW(release),
	ROW(setxattr), ROW(getxattr), ROW(listxattr), ROW(create), ROW(copy_file_range),
	ROW(copy_file_range_64), ROW(readdir), ROW(readdirplus), ROW(forget), ROW(batch_forget),
	{ "left", (PyCFunction)Shortcuts_left, METH_NOARGS, left_doc },
	{ NULL },
};

static PyTypeObject ShortcutsType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "sdeefs.transports._shortcuts.Shortcuts",
	.tp_doc = PyDoc_STR("One mount's shortcuts; each method is a handler of the request it is named for."),
	.tp_basicsize = sizeof(Shortcuts),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.tp_new = PyType_GenericNew,
	.tp_init = (initproc)Shortcuts_init,
	.tp_dealloc = (destructor)Shortcuts_dealloc,
	.tp_traverse = (traverseproc)Shortcuts_traverse,
	.tp_clear = (inquiry)Shortcuts_clear,
	.tp_methods = Shortcuts_methods,
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "sdeefs.transports._shortcuts",
	.m_doc = PyDoc_STR("Answers to the commonest requests without the interpreter."),
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__shortcuts(void)
{
	PyObject *made;

	if (PyType_Ready(&ShortcutsType) < 0)
		return NULL;
	made = PyModule_Create(&module);
	if (made && PyModule_AddObjectRef(made, "Shortcuts", (PyObject *)&ShortcutsType) < 0)
		Py_CLEAR(made);
	return made;
}
