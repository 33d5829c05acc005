/* COPY_FILE_RANGE of small files: cp asks for it first. */
#include "shortcuts.h"

#include <fcntl.h>
#include <sys/xattr.h>
#include <unistd.h>

/* More is a worker's: core/copyup.py. */
#define LARGE (1 << 20)

/* Whether a write would take bits or capabilities away: Handles._before_write(). */
static int may_lose_privileges(int fd, uint32_t uid)
{
	struct stat st;

	if (uid != 0 && (fstat(fd, &st) < 0 || st.st_mode & 06000))
		return 1;
	return fgetxattr(fd, "security.capability", NULL, 0) >= 0 || (errno != ENODATA && errno != EOPNOTSUPP);
}

/* Called without the core's lock, as Python's own copies without it. */
int do_copy_file_range(Shortcuts *self, struct call *call)
{
	struct fuse_copy_file_range_in in;
	PyObject *source, *target;
	int from, to, error, rc;
	off_t offset, to_offset;
	ssize_t length;

	if (call->length < (Py_ssize_t)sizeof in)
		return LEAVE;
	memcpy(&in, call->body, sizeof in);
	source = find_file(self, in.fh_in);
	target = find_file(self, in.fh_out);
	if (!source || !target || in.len > LARGE || SLOT(target, shape.file_writable) != Py_True)
		return LEAVE;
	from = (int)slot_int(source, shape.file_fd);
	to = (int)slot_int(target, shape.file_fd);
	if (may_lose_privileges(to, call->uid))
		return LEAVE;
	rc = settled(self);
	if (rc)
		return rc;
	offset = (off_t)in.off_in;
	to_offset = (off_t)in.off_out;
	Py_BEGIN_ALLOW_THREADS
	length = copy_file_range(from, &offset, to, &to_offset, (size_t)in.len, 0);
	error = errno;
	Py_END_ALLOW_THREADS
	if (length < 0)
		return error == EINTR ? LEAVE : error;
	/* struct fuse_copy_file_range_out; in the older reply a count of 32 bits, and padding */
	memcpy(call->out, &(uint64_t){ (uint64_t)length }, 8);
	call->size = 8;
	return ANSWERED;
}
