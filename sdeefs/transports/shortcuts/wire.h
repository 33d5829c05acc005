/* The structures of linux/fuse.h (protocol 7.31) that the shortcuts read and write; sdeefs/transports/
 * wire.py has all of them. The installed header may be older than the kernel. */
#ifndef SHORTCUTS_WIRE_H
#define SHORTCUTS_WIRE_H

#include <stdint.h>

enum {
	FUSE_LOOKUP = 1,
	FUSE_FORGET = 2,
	FUSE_GETATTR = 3,
	FUSE_SETATTR = 4,
	FUSE_SYMLINK = 6,
	FUSE_MKNOD = 8,
	FUSE_MKDIR = 9,
	FUSE_UNLINK = 10,
	FUSE_RMDIR = 11,
	FUSE_RENAME = 12,
	FUSE_LINK = 13,
	FUSE_OPEN = 14,
	FUSE_READ = 15,
	FUSE_RELEASE = 18,
	FUSE_SETXATTR = 21,
	FUSE_GETXATTR = 22,
	FUSE_LISTXATTR = 23,
	FUSE_READDIR = 28,
	FUSE_CREATE = 35,
	FUSE_BATCH_FORGET = 42,
	FUSE_READDIRPLUS = 44,
	FUSE_RENAME2 = 45,
	FUSE_COPY_FILE_RANGE = 47,
	FUSE_COPY_FILE_RANGE_64 = 53,
};

#define FATTR_MODE (1 << 0)
#define FATTR_UID (1 << 1)
#define FATTR_GID (1 << 2)
#define FATTR_SIZE (1 << 3)
#define FATTR_ATIME (1 << 4)
#define FATTR_MTIME (1 << 5)
#define FATTR_FH (1 << 6)
#define FATTR_ATIME_NOW (1 << 7)
#define FATTR_MTIME_NOW (1 << 8)
#define FATTR_LOCKOWNER (1 << 9)
#define FATTR_CTIME (1 << 10)
#define FATTR_KILL_SUIDGID (1 << 11)

#define FOPEN_KEEP_CACHE (1 << 1)
#define FOPEN_PASSTHROUGH (1 << 7)

struct fuse_attr {
	uint64_t ino, size, blocks, atime, mtime, ctime;
	uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};
struct fuse_entry_out {
	uint64_t nodeid, generation, entry_valid, attr_valid;
	uint32_t entry_valid_nsec, attr_valid_nsec;
	struct fuse_attr attr;
};
struct fuse_attr_out {
	uint64_t attr_valid;
	uint32_t attr_valid_nsec, dummy;
	struct fuse_attr attr;
};
struct fuse_setattr_in {
	uint32_t valid, padding;
	uint64_t fh, size, lock_owner, atime, mtime, ctime;
	uint32_t atimensec, mtimensec, ctimensec, mode, unused4, uid, gid, unused5;
};
struct fuse_mknod_in {
	uint32_t mode, rdev, umask, padding;
};
struct fuse_mkdir_in {
	uint32_t mode, umask;
};
struct fuse_rename2_in {
	uint64_t newdir;
	uint32_t flags, padding;
};
struct fuse_open_in {
	uint32_t flags, open_flags;
};
struct fuse_create_in {
	uint32_t flags, mode, umask, open_flags;
};
struct fuse_open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};
struct fuse_read_in {
	uint64_t fh, offset;
	uint32_t size, read_flags;
	uint64_t lock_owner;
	uint32_t flags, padding;
};
struct fuse_release_in {
	uint64_t fh;
	uint32_t flags, release_flags;
	uint64_t lock_owner;
};
struct fuse_setxattr_in {
	uint32_t size, flags, setxattr_flags, padding;
};
struct fuse_getxattr_in {
	uint32_t size, padding;
};
struct fuse_forget_one {
	uint64_t nodeid, nlookup;
};
struct fuse_batch_forget_in {
	uint32_t count, dummy;
};
struct fuse_copy_file_range_in {
	uint64_t fh_in, off_in, nodeid_out, fh_out, off_out, len, flags;
};
struct fuse_backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define FUSE_DEV_IOC_BACKING_OPEN _IOW(229, 1, struct fuse_backing_map)
#define FUSE_DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)
#define FUSE_NOTIFY_STORE 4 /* in the place of out_header's error */
struct fuse_notify_store_out {
	uint64_t nodeid, offset;
	uint32_t size, padding;
};
struct fuse_dirent {
	uint64_t ino, off;
	uint32_t namelen, type;
	char name[];
};

_Static_assert(sizeof(struct fuse_entry_out) == 128, "fuse_entry_out");
_Static_assert(sizeof(struct fuse_attr_out) == 104, "fuse_attr_out");
_Static_assert(sizeof(struct fuse_setattr_in) == 88, "fuse_setattr_in");
_Static_assert(sizeof(struct fuse_open_out) == 16, "fuse_open_out");
_Static_assert(sizeof(struct fuse_dirent) == 24, "fuse_dirent");

#endif
