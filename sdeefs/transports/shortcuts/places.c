/* Where an object is, and what stat tells of it: core/union.py and core/attributes.py in C. */
#include "shortcuts.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/xattr.h>
#include <unistd.h>

#define OVERFLOW_ID 65534

/* The open descriptor of a directory in a layer; -1: Python has to open it. */
int directory_fd(Shortcuts *self, PyObject *directory, long layer)
{
	PyObject *lowers, *fds;
	Py_ssize_t i;

	if (layer == UPPER) {
		if (SLOT(directory, shape.parent) == Py_None)
			return self->layers[UPPER].fd;
		return (int)slot_int(directory, shape.upper_fd);
	}
	lowers = SLOT(directory, shape.lowers);
	fds = SLOT(directory, shape.lower_fds);
	for (i = 0; i < PyTuple_GET_SIZE(lowers); i++) {
		PyObject *lower = PyTuple_GET_ITEM(lowers, i), *path;

		if (PyLong_AsLong(PyTuple_GET_ITEM(lower, 0)) != layer)
			continue;
		path = PyTuple_GET_ITEM(lower, 1);
		if (PyBytes_GET_SIZE(path) == 0)
			return layer < self->layer_count ? self->layers[layer].fd : -1;
		if (fds == Py_None || i >= PyList_GET_SIZE(fds))
			return -1;
		return (int)PyLong_AsLong(PyList_GET_ITEM(fds, i));
	}
	return -1;
}

/* A directory of upper, open, in which names may come and go; or LEAVE. */
int changeable(Shortcuts *self, uint64_t number, PyObject **directory, int *fd)
{
	*directory = find_node(self, number);
	if (!self->writable || !*directory || !is_directory(*directory) ||
	    slot_int(*directory, shape.layer) != UPPER || slot_int(*directory, shape.flags) & FLAG_DEAD)
		return LEAVE;
	*fd = directory_fd(self, *directory, UPPER);
	return *fd < 0 ? LEAVE : ANSWERED;
}

int place_of(Shortcuts *self, PyObject *node, struct place *place)
{
	PyObject *extra = SLOT(node, shape.extra_at), *parent = SLOT(node, shape.parent);
	long layer = slot_int(node, shape.layer);

	place->name = "";
	if (layer < 0 || layer >= self->layer_count)
		return LEAVE;
	if (extra != Py_None) {
		place->fd = (int)slot_int(extra, shape.fd);
		if (place->fd >= 0)
			return ANSWERED;
		if (SLOT(extra, shape.index) != Py_None)
			return LEAVE;
	}
	if (is_directory(node)) {
		place->fd = directory_fd(self, node, layer);
		if (place->fd >= 0)
			return ANSWERED;
		if (layer != UPPER)
			return LEAVE;
	}
	if (parent == Py_None)
		return LEAVE;
	place->fd = directory_fd(self, parent, layer);
	place->name = PyBytes_AS_STRING(SLOT(node, shape.name));
	/* Of filesystems that count characters (NTFS) names are longer than paths made here may be. */
	return place->fd >= 0 && strlen(place->name) <= NAME_MAX ? ANSWERED : LEAVE;
}

int stat_place(const struct place *place, struct stat *st)
{
	int rc = *place->name ? fstatat(place->fd, place->name, st, AT_SYMLINK_NOFOLLOW) : fstat(place->fd, st);

	return rc < 0 ? errno : 0;
}

/* Node.is_of(): file systems use inode numbers again. */
int is_of(PyObject *node, const struct stat *st)
{
	return st->st_ino == slot_u64(node, shape.ino) && (st->st_mode & S_IFMT) == slot_u64(node, shape.kind);
}

/* Of the object that the node stands for; where another one has its place, Python says what it is. */
int stat_node(Shortcuts *self, PyObject *node, struct stat *st)
{
	struct place place;

	if (place_of(self, node, &place) || stat_place(&place, st) || !is_of(node, st))
		return LEAVE;
	return ANSWERED;
}

static uint32_t to_shown(const struct id_map *map, uint32_t stored)
{
	Py_ssize_t i;

	for (i = 0; i < map->count; i++) {
		const struct id_range *range = &map->ranges[i];

		if (stored >= range->outside && stored - range->outside < range->count)
			return (uint32_t)(stored - range->outside + range->inside);
	}
	return map->count ? OVERFLOW_ID : stored;
}

static int to_stored(const struct id_map *map, uint32_t shown, uint32_t *stored)
{
	Py_ssize_t i;

	*stored = shown;
	if (!map->count || shown == UINT32_MAX)
		return 0;
	for (i = 0; i < map->count; i++) {
		const struct id_range *range = &map->ranges[i];

		if (shown >= range->inside && shown - range->inside < range->count) {
			*stored = (uint32_t)(shown - range->inside + range->outside);
			return 0;
		}
	}
	return -1;
}

int stored_ids(const struct owners *owners, uint32_t uid, uint32_t gid, uint32_t *stored_uid,
	       uint32_t *stored_gid)
{
	if (to_stored(&owners->uids, uid, stored_uid) < 0)
		return -1;
	return to_stored(&owners->gids, gid, stored_gid);
}

int shown_attributes(Shortcuts *self, PyObject *node, const struct stat *st, struct fuse_attr *attr)
{
	long layer = slot_int(node, shape.layer);
	const struct owners *owners = layer <= self->unmapped ? &self->upper_owners : &self->lower_owners;
	PyObject *extra = SLOT(node, shape.extra_at);
	uint32_t uid = st->st_uid, gid = st->st_gid, nlink = (uint32_t)st->st_nlink;

	if (!owners->identity) {
		if (owners->squash) {
			uid = uid == OVERFLOW_ID ? 0 : uid;
			gid = gid == OVERFLOW_ID ? 0 : gid;
		}
		uid = to_shown(&owners->uids, uid);
		gid = to_shown(&owners->gids, gid);
	}
	if (is_directory(node)) {
		Py_ssize_t lowers = PyTuple_GET_SIZE(SLOT(node, shape.lowers));

		if (slot_int(node, shape.flags) & FLAG_DEAD)
			nlink = 0;
		else if (lowers && (layer == UPPER || lowers > 1))
			nlink = 1;
	} else if (extra != Py_None) {
		if (SLOT(extra, shape.index) != Py_None)
			return LEAVE;
		if (SLOT(extra, shape.work_name) != Py_None)
			nlink--;
	}
	*attr = (struct fuse_attr){
		.ino = slot_u64(node, shape.shown),
		.size = (uint64_t)st->st_size,
		.blocks = (uint64_t)st->st_blocks,
		.atime = (uint64_t)st->st_atim.tv_sec,
		.mtime = (uint64_t)st->st_mtim.tv_sec,
		.ctime = (uint64_t)st->st_ctim.tv_sec,
		.atimensec = (uint32_t)st->st_atim.tv_nsec,
		.mtimensec = (uint32_t)st->st_mtim.tv_nsec,
		.ctimensec = (uint32_t)st->st_ctim.tv_nsec,
		.mode = st->st_mode,
		.nlink = nlink,
		.uid = uid,
		.gid = gid,
		.rdev = (uint32_t)st->st_rdev,
		.blksize = (uint32_t)st->st_blksize,
	};
	return ANSWERED;
}

/* How long the kernel may believe what comes from a layer. */
double lower_timeout(Shortcuts *self)
{
	PyObject *value = PyObject_GetAttr(self->filesystem, str_lower_timeout);
	double timeout = value ? PyFloat_AsDouble(value) : -1;

	Py_XDECREF(value);
	return timeout;
}

int timeout_of(Shortcuts *self, long layer, uint64_t *seconds, uint32_t *nanoseconds)
{
	double timeout = layer == UPPER ? self->upper_timeout : lower_timeout(self);

	if (timeout < 0)
		return PyErr_Occurred() ? FAILED : LEAVE;
	*seconds = (uint64_t)timeout;
	*nanoseconds = (uint32_t)((timeout - (double)*seconds) * 1e9);
	return ANSWERED;
}

void xattr_path(char *path, size_t size, const struct place *place)
{
	if (*place->name)
		snprintf(path, size, "/proc/self/fd/%d/%s", place->fd, place->name);
	else
		snprintf(path, size, "/proc/self/fd/%d", place->fd);
}

/* Whether the secrets rule (core/secrets.py) may be for a file of a lower: Python has the last word. */
int may_be_secret(Shortcuts *self, long layer, const struct stat *st, int fd, const char *name)
{
	const struct secrets *secrets = &self->secrets;
	char path[320];
	mode_t bits = st->st_mode;
	Py_ssize_t i;

	if (!secrets->on || layer <= self->unmapped || !S_ISREG(st->st_mode))
		return 0;
	if (st->st_uid == secrets->uid) {
		bits >>= 6;
	} else {
		for (i = 0; i < secrets->gid_count; i++) {
			if (st->st_gid == secrets->gids[i]) {
				bits >>= 3;
				break;
			}
		}
	}
	if (!(bits & 4) || strlen(name) > NAME_MAX)
		return 1;
	xattr_path(path, sizeof path, &(struct place){ fd, name });
	return lgetxattr(path, "system.posix_acl_access", NULL, 0) >= 0;
}

/* What the calling thread is, as core/credentials.py has made it; good for one generation. */
static _Thread_local struct {
	long generation;
	int known; /* the ids, too */
	uint32_t uid, gid;
} thread = { .generation = -1 };

static long generation(Shortcuts *self)
{
	PyObject *value = PyObject_GetAttr(self->credentials, str_generation);
	long number = value ? PyLong_AsLong(value) : -1;

	Py_XDECREF(value);
	return number;
}

/* The calling thread writes to upper with the capabilities that it should have. */
int settled(Shortcuts *self)
{
	long current = generation(self);
	PyObject *done;

	if (current == -1)
		return FAILED;
	if (current == thread.generation)
		return ANSWERED;
	done = PyObject_CallNoArgs(self->settle);
	if (!done)
		return FAILED;
	Py_DECREF(done);
	thread.generation = current;
	thread.known = 0;
	return ANSWERED;
}

/* Whether the thread creates files as these ids from now on; -1 with an exception. */
int becomes(Shortcuts *self, uint32_t uid, uint32_t gid)
{
	PyObject *ids[2], *done = NULL;
	long current = generation(self);
	int truth;

	if (current == -1)
		return -1;
	if (current == thread.generation && thread.known && thread.uid == uid && thread.gid == gid)
		return 1;
	ids[0] = PyLong_FromUnsignedLong(uid);
	ids[1] = PyLong_FromUnsignedLong(gid);
	if (ids[0] && ids[1])
		done = PyObject_Vectorcall(self->become, ids, 2, NULL);
	Py_XDECREF(ids[0]);
	Py_XDECREF(ids[1]);
	truth = done ? PyObject_IsTrue(done) : -1;
	Py_XDECREF(done);
	if (truth == 1) {
		thread.generation = generation(self);
		thread.known = 1;
		thread.uid = uid;
		thread.gid = gid;
	}
	return truth;
}

/* A file of upper that says nothing of lower or of the index: it has no xattrs at all. */
int is_plain_upper(PyObject *parent, PyObject *name, int fd, const struct stat *st)
{
	char path[320];

	if (st->st_nlink == 1 && PyTuple_GET_SIZE(SLOT(parent, shape.lowers)) == 0 &&
	    !(slot_int(parent, shape.flags) & FLAG_IMPURE))
		return 1;
	if (st->st_nlink > 1 || PyBytes_GET_SIZE(name) > NAME_MAX)
		return 0; /* its other names, or the index, may know it */
	xattr_path(path, sizeof path, &(struct place){ fd, PyBytes_AS_STRING(name) });
	return llistxattr(path, NULL, 0) == 0;
}
