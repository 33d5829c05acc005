/* GETATTR, SETATTR, and xattrs that aren't there. */
#include "shortcuts.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#ifndef SYS_fchmodat2
#define SYS_fchmodat2 452 /* Linux 6.6, the same number everywhere */
#endif
#define CHANGES                                                                                     \
	(FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_SIZE | FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | \
	 FATTR_MTIME_NOW)

static int answer(Shortcuts *self, struct call *call, PyObject *node)
{
	struct fuse_attr_out *out = (struct fuse_attr_out *)call->out;
	struct stat st;
	int rc = stat_node(self, node, &st);

	if (!rc)
		rc = shown_attributes(self, node, &st, &out->attr);
	if (!rc)
		rc = timeout_of(self, slot_int(node, shape.layer), &out->attr_valid, &out->attr_valid_nsec);
	out->dummy = 0;
	call->size = sizeof *out;
	return rc;
}

int do_getattr(Shortcuts *self, struct call *call)
{
	PyObject *node = find_node(self, call->node), *extra;

	if (!node)
		return LEAVE;
	extra = SLOT(node, shape.extra_at);
	if (extra != Py_None && SLOT(extra, shape.privileged) != Py_None)
		return LEAVE;
	return answer(self, call, node);
}

static int change_times(const struct fuse_setattr_in *in, int file, const struct place *place)
{
	struct timespec times[2] = { { 0, UTIME_OMIT }, { 0, UTIME_OMIT } };

	if (in->valid & FATTR_ATIME_NOW)
		times[0].tv_nsec = UTIME_NOW;
	else if (in->valid & FATTR_ATIME)
		times[0] = (struct timespec){ (time_t)in->atime, in->atimensec };
	if (in->valid & FATTR_MTIME_NOW)
		times[1].tv_nsec = UTIME_NOW;
	else if (in->valid & FATTR_MTIME)
		times[1] = (struct timespec){ (time_t)in->mtime, in->mtimensec };
	if (file >= 0)
		return futimens(file, times) < 0 ? errno : 0;
	return utimensat(place->fd, place->name, times, AT_SYMLINK_NOFOLLOW) < 0 ? errno : 0;
}

/* One kind of change of an object of upper; several at once are Python's. */
static int change(Shortcuts *self, const struct fuse_setattr_in *in, int file, const struct place *place)
{
	/* What may come beside GID and MTIME, of which the rest of the switch knows. */
	const uint32_t more = FATTR_UID | FATTR_ATIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW;
	uint32_t uid = UINT32_MAX, gid = UINT32_MAX;

	switch (in->valid & CHANGES & ~more) {
	case FATTR_SIZE:
		if (file < 0 || in->valid & more)
			return LEAVE;
		if (ftruncate(file, (off_t)in->size) < 0)
			return errno == EINVAL ? LEAVE : errno; /* a descriptor for reading */
		return 0;
	case FATTR_MODE:
		if (in->valid & more)
			return LEAVE;
		if (file >= 0)
			return fchmod(file, in->mode & 07777) < 0 ? errno : 0;
		if (!*place->name)
			return LEAVE;
		if (syscall(SYS_fchmodat2, place->fd, place->name, in->mode & 07777, AT_SYMLINK_NOFOLLOW) < 0)
			return errno == ENOSYS ? LEAVE : errno;
		return 0;
	case FATTR_MTIME:
		if (in->valid & FATTR_UID)
			return LEAVE;
		return *place->name || file >= 0 ? change_times(in, file, place) : LEAVE;
	case FATTR_GID:
	case 0:
		if (in->valid & (FATTR_ATIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW)) {
			if (in->valid & (FATTR_UID | FATTR_GID))
				return LEAVE;
			return *place->name || file >= 0 ? change_times(in, file, place) : LEAVE;
		}
		if (stored_ids(&self->upper_owners, in->valid & FATTR_UID ? in->uid : UINT32_MAX,
			       in->valid & FATTR_GID ? in->gid : UINT32_MAX, &uid, &gid) < 0)
			return LEAVE;
		return fchownat(place->fd, place->name, uid, gid,
				AT_SYMLINK_NOFOLLOW | (*place->name ? 0 : AT_EMPTY_PATH)) < 0 ? errno : 0;
	}
	return LEAVE;
}

int do_setattr(Shortcuts *self, struct call *call)
{
	struct fuse_setattr_in in;
	PyObject *node, *extra, *file = NULL;
	struct place place;
	int rc;

	if (call->length < (Py_ssize_t)sizeof in || !self->writable)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	node = find_node(self, call->node);
	if (!node || slot_int(node, shape.layer) != UPPER || !(in.valid & CHANGES) || place_of(self, node, &place))
		return LEAVE;
	/* chown(2) takes setuid, setgid and capabilities away by itself. */
	if (in.valid & FATTR_KILL_SUIDGID && in.valid & CHANGES & ~(FATTR_UID | FATTR_GID))
		return LEAVE;
	extra = SLOT(node, shape.extra_at);
	if (extra != Py_None) {
		if (SLOT(extra, shape.secret) != Py_False || SLOT(extra, shape.privileged) != Py_None)
			return LEAVE;
		if (in.valid & FATTR_MODE && in.mode & 06000 && PyList_GET_SIZE(SLOT(extra, shape.handles)))
			return LEAVE; /* what is written to it takes these bits away */
	}
	if (in.valid & FATTR_FH)
		file = find_file(self, in.fh);
	if (file && SLOT(file, shape.file_node) != node)
		file = NULL;
	rc = settled(self);
	if (!rc)
		rc = change(self, &in, file ? (int)slot_int(file, shape.file_fd) : -1, &place);
	if (rc)
		return rc;
	return answer(self, call, node);
}

/* The object of an xattr request: through an open file of it, which spares the path. */
static int open_fd(PyObject *node)
{
	PyObject *extra = SLOT(node, shape.extra_at), *handles;

	if (extra == Py_None)
		return -1;
	handles = SLOT(extra, shape.handles);
	if (!PyList_GET_SIZE(handles) || SLOT(PyList_GET_ITEM(handles, 0), shape.file_lower) != Py_False)
		return -1;
	return slot_int(node, shape.layer) == UPPER ?
		(int)slot_int(PyList_GET_ITEM(handles, 0), shape.file_fd) : -1;
}

static int absent(const char *name)
{
	/* Of a filesystem without ACLs the kernel must not hear EOPNOTSUPP: it fails every check then. */
	if (errno == EOPNOTSUPP && strncmp(name, "system.posix_acl_", 17) == 0)
		return ENODATA;
	return errno == ENODATA || errno == EOPNOTSUPP ? errno : LEAVE;
}

int do_getxattr(Shortcuts *self, struct call *call)
{
	PyObject *node = find_node(self, call->node);
	const char *name = call->body + sizeof(struct fuse_getxattr_in);
	struct place place;
	char path[320];
	int fd;

	if (!node || call->length <= (Py_ssize_t)sizeof(struct fuse_getxattr_in) + 1 ||
	    strncmp(name, self->own_prefix, strlen(self->own_prefix)) == 0)
		return LEAVE;
	fd = open_fd(node);
	if (fd >= 0)
		return fgetxattr(fd, name, NULL, 0) < 0 ? absent(name) : LEAVE;
	if (place_of(self, node, &place))
		return LEAVE;
	xattr_path(path, sizeof path, &place);
	if (*place.name)
		return lgetxattr(path, name, NULL, 0) < 0 ? absent(name) : LEAVE;
	return getxattr(path, name, NULL, 0) < 0 ? absent(name) : LEAVE;
}

/* What chmod is to programs that know ACLs: one that says no more than the mode, and names nobody. */
#define MINIMAL_ACL 28

int do_setxattr(Shortcuts *self, struct call *call)
{
	static const char name[] = "system.posix_acl_access";
	PyObject *node = find_node(self, call->node), *extra;
	const char *text = call->body + sizeof(struct fuse_setxattr_in), *value = text + sizeof name;
	struct fuse_setxattr_in in;
	struct place place;
	char path[320];
	int fd, rc;

	if (!node || !self->setxattr_ext || call->length != (Py_ssize_t)(sizeof in + sizeof name + MINIMAL_ACL))
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	if (in.size != MINIMAL_ACL || in.flags || in.setxattr_flags || memcmp(text, name, sizeof name) != 0 ||
	    !self->writable || slot_int(node, shape.layer) != UPPER)
		return LEAVE;
	extra = SLOT(node, shape.extra_at);
	if (extra != Py_None && (SLOT(extra, shape.secret) != Py_False || SLOT(extra, shape.privileged) != Py_None))
		return LEAVE;
	fd = open_fd(node);
	if (fd < 0 && place_of(self, node, &place))
		return LEAVE;
	rc = settled(self);
	if (rc)
		return rc;
	call->size = 0;
	if (fd >= 0)
		return fsetxattr(fd, name, value, MINIMAL_ACL, 0) < 0 ? errno : 0;
	xattr_path(path, sizeof path, &place);
	if (*place.name)
		return lsetxattr(path, name, value, MINIMAL_ACL, 0) < 0 ? errno : 0;
	return setxattr(path, name, value, MINIMAL_ACL, 0) < 0 ? errno : 0;
}

int do_listxattr(Shortcuts *self, struct call *call)
{
	PyObject *node = find_node(self, call->node);
	struct fuse_getxattr_in in;
	struct place place;
	char path[320];

	if (!node || call->length < (Py_ssize_t)sizeof in || place_of(self, node, &place))
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	xattr_path(path, sizeof path, &place);
	if ((*place.name ? llistxattr(path, NULL, 0) : listxattr(path, NULL, 0)) != 0)
		return LEAVE;
	/* None: the answer is a length (struct fuse_getxattr_out) or an empty list. */
	memset(call->out, 0, 8);
	call->size = in.size ? 0 : 8;
	return ANSWERED;
}
