/* CREATE, MKDIR, MKNOD and SYMLINK, where upper has nothing of that name: core/creation.py. */
#include "shortcuts.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Where something new goes: Creation._ready(). */
struct spot {
	PyObject *parent, *name;
	const char *text; /* of the name */
	int directory;	  /* the parent in upper, open */
};

/* The request begins with `size` bytes, for `in`, and the name. The thread makes what it makes as the caller from
 * here on. `spot->name` is the caller's to release. */
static int ready(Shortcuts *self, struct call *call, void *in, size_t size, struct spot *spot)
{
	size_t whole = (size_t)call->length, length = whole > size ? strnlen(call->body + size, whole - size) : 0;
	PyObject *child;
	uint32_t uid, gid;
	int became;

	spot->name = NULL;
	if (length < 1 || length > NAME_MAX || size + length == whole ||
	    changeable(self, call->node, &spot->parent, &spot->directory) ||
	    (slot_int(spot->parent, shape.flags) & (FLAG_ACL_KNOWN | FLAG_ACL_DEFAULT)) != FLAG_ACL_KNOWN ||
	    stored_ids(&self->upper_owners, call->uid, call->gid, &uid, &gid) < 0)
		return LEAVE;
	if (size)
		memcpy(in, call->body, size);
	spot->name = PyBytes_FromStringAndSize(call->body + size, (Py_ssize_t)length);
	if (!spot->name)
		return FAILED;
	spot->text = PyBytes_AS_STRING(spot->name);
	child = PyDict_GetItemWithError(SLOT(spot->parent, shape.children), spot->name);
	if (child || PyErr_Occurred())
		return child ? LEAVE : FAILED;
	became = becomes(self, uid, gid);
	return became < 0 ? FAILED : became ? 0 : LEAVE;
}

static PyObject *made(Shortcuts *self, const struct spot *spot, const struct stat *st)
{
	return new_node(self, spot->parent, spot->name, st, UPPER, st->st_ino ^ self->layers[UPPER].mix, NULL);
}

int do_create(Shortcuts *self, struct call *call)
{
	struct fuse_create_in in;
	struct fuse_entry_out *entry = (struct fuse_entry_out *)call->out;
	struct found found = { .layer = UPPER };
	struct spot spot;
	int fd = -1, rc;

	rc = ready(self, call, &in, sizeof in, &spot);
	if (!rc && in.mode & 06000)
		rc = LEAVE;
	if (!rc) {
		fd = openat(spot.directory, spot.text,
			    layer_flags(self, in.flags) | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
			    in.mode & ~in.umask & 07777);
		if (fd < 0)
			rc = errno == EEXIST ? LEAVE : errno; /* a whiteout has the name */
		else if (fstat(fd, &found.st) < 0)
			rc = errno;
	}
	if (!rc) {
		found.node = made(self, &spot, &found.st);
		rc = found.node ? pack_found(self, &found, entry) : FAILED;
	}
	if (!rc)
		rc = opened(self, found.node, fd, &found.st, (in.flags & O_ACCMODE) != O_RDONLY,
			    (struct fuse_open_out *)(entry + 1));
	if (rc && fd >= 0)
		close(fd);
	Py_XDECREF(spot.name);
	call->size = sizeof *entry + sizeof(struct fuse_open_out);
	return rc;
}

/* Answer with the look-up of what has just been made. */
static int answer(Shortcuts *self, struct call *call, const struct spot *spot, struct found *found)
{
	if (fstatat(spot->directory, spot->text, &found->st, AT_SYMLINK_NOFOLLOW) < 0)
		return errno;
	if (S_ISDIR(found->st.st_mode))
		found->node = made_directory(self, spot->parent, spot->name, &found->st, spot->directory);
	else
		found->node = made(self, spot, &found->st);
	call->size = sizeof(struct fuse_entry_out);
	return found->node ? pack_found(self, found, (struct fuse_entry_out *)call->out) : FAILED;
}

/* What may appear in lower later doesn't shine through, as with overlayfs; only a full disk is an error. */
static int make_opaque(Shortcuts *self, const struct spot *spot)
{
	char path[320], mark[sizeof self->own_prefix + 8];

	if (!PyTuple_GET_SIZE(SLOT(spot->parent, shape.lowers)))
		return 0;
	xattr_path(path, sizeof path, &(struct place){ spot->directory, spot->text });
	snprintf(mark, sizeof mark, "%sopaque", self->own_prefix);
	if (lsetxattr(path, mark, "y", 1, 0) == 0 || (errno != ENOSPC && errno != EDQUOT && errno != EIO))
		return 0;
	return errno;
}

int do_mkdir(Shortcuts *self, struct call *call)
{
	struct fuse_mkdir_in in;
	struct found found = { .layer = UPPER };
	struct spot spot;
	int rc;

	rc = ready(self, call, &in, sizeof in, &spot);
	if (!rc && mkdirat(spot.directory, spot.text, in.mode & ~in.umask & 07777) < 0)
		rc = errno == EEXIST ? LEAVE : errno;
	if (!rc) {
		rc = make_opaque(self, &spot);
		if (rc)
			(void)unlinkat(spot.directory, spot.text, AT_REMOVEDIR);
	}
	if (!rc)
		rc = answer(self, call, &spot, &found);
	Py_XDECREF(spot.name);
	return rc;
}

int do_mknod(Shortcuts *self, struct call *call)
{
	struct fuse_mknod_in in;
	struct found found = { .layer = UPPER };
	struct spot spot;
	int rc;

	rc = ready(self, call, &in, sizeof in, &spot);
	if (!rc && (S_ISCHR(in.mode) || S_ISBLK(in.mode)))
		rc = LEAVE;
	if (!rc && mknodat(spot.directory, spot.text, in.mode & ~(in.umask & 07777), 0) < 0)
		rc = errno == EEXIST ? LEAVE : errno;
	if (!rc)
		rc = answer(self, call, &spot, &found);
	Py_XDECREF(spot.name);
	return rc;
}

int do_symlink(Shortcuts *self, struct call *call)
{
	struct found found = { .layer = UPPER };
	struct spot spot;
	const char *target;
	int rc = ready(self, call, NULL, 0, &spot);

	target = rc ? NULL : call->body + PyBytes_GET_SIZE(spot.name) + 1;
	if (!rc && (target == call->body + call->length || call->body[call->length - 1]))
		rc = LEAVE;
	if (!rc && symlinkat(target, spot.directory, spot.text) < 0)
		rc = errno == EEXIST ? LEAVE : errno;
	if (!rc)
		rc = answer(self, call, &spot, &found);
	Py_XDECREF(spot.name);
	return rc;
}
