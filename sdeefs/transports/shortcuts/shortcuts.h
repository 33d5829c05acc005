/* Answers to the commonest requests without the interpreter, from the core's own objects.
 *
 * The core (sdeefs/core, Python) is whole without this. Each function here serves the plain case of
 * one request, on the same nodes, handles and descriptors and with the same result, and leaves all
 * else to Python (LEAVE) before it has changed anything. So what isn't plain (whiteouts, copy-up,
 * hard links that were copied up, secrets, ACLs) is written once, in Python.
 *
 * All run with the GIL and the core's lock held. System calls keep the GIL: they are short on a
 * local filesystem, and handing it over for each costs more than they do. Not so close(), which frees
 * the blocks of a file without names: it waits until both are given up. Remote layers get no
 * shortcuts (shortcuts.py).
 */
#ifndef SHORTCUTS_H
#define SHORTCUTS_H

#include "../_serving.h"

#include <string.h>
#include <sys/stat.h>

#include "wire.h"

/* What a shortcut returns; an errno (positive) is the answer, too. */
#define ANSWERED 0
#define LEAVE (-1)  /* to Python's handler; nothing has been changed */
#define FAILED (-2) /* with a Python exception */

#define UPPER 0

/* Directory.flags, as sdeefs/core/nodes.py has them. */
#define FLAG_IMPURE 1
#define FLAG_OPAQUE 2
#define FLAG_HIDDEN 4
#define FLAG_DEAD 8
#define FLAG_ACL_KNOWN 16
#define FLAG_ACL_DEFAULT 32
#define FLAG_XWHITEOUTS 64
/* What a look-up finds out anew. */
#define FLAGS_FOUND (FLAG_IMPURE | FLAG_OPAQUE | FLAG_HIDDEN | FLAG_XWHITEOUTS)

struct id_range {
	uint64_t inside, outside, count; /* all ids are 2^32 */
};

struct id_map {
	struct id_range *ranges;
	Py_ssize_t count;
};

/* How the ids of one kind of layer are shown (core/ids.py: Owners). */
struct owners {
	struct id_map uids, gids;
	int squash, identity;
};

struct layer {
	PyObject *object;
	int fd;
	uint64_t mix; /* is xored into inode numbers: the filesystem's number above bit 56 */
};

struct secrets {
	int on;
	uint32_t uid, *gids;
	Py_ssize_t gid_count;
};

typedef struct {
	PyObject_HEAD
	PyObject *filesystem;	    /* core.filesystem.Filesystem */
	PyObject *acquire, *release; /* its lock's */
	PyObject *nodes, *files, *linked, *table, *upper;
	PyObject *handlers; /* Python's, by opcode */
	PyObject *backing;  /* BackingIds, or None */
	PyObject *acquire_backing, *release_backing;
	PyObject *uses, *node_of; /* its tables; NULL: leave all of it to it */
	PyObject *read_later; /* the rest of a READ that has to wait for a disk */
	PyObject *credentials; /* the module */
	PyObject *settle, *become, *pack_entry, *lookup, *entries, *inode_number, *keep_list, *remember, *trim;
	PyObject *lists; /* core/listing.py: those that are being read, by node */
	PyObject *lookers; /* core/lookers.py: its table */
	PyObject *io_passthrough, *io_cached;
	struct layer *layers;
	Py_ssize_t layer_count;
	long unmapped, max_directories;
	uint64_t watched_events; /* of a directory of lower: fanotify's mask */
	struct owners upper_owners, lower_owners;
	struct secrets secrets;
	double upper_timeout;
	uint32_t open_base; /* flags of every OPEN reply */
	int writable, index_on, writeback, passthrough, setxattr_ext, is_volatile;
	int work_fd;
	int device; /* of the connection, for notifications; -1: none */
	char own_prefix[32]; /* of xattrs that merged doesn't show as they are */
	int *dropped; /* descriptors to close */
	Py_ssize_t dropped_count, dropped_room;
	uint64_t left[OPCODES]; /* requests that were Python's, by opcode */
} Shortcuts;

/* One request, and its answer: `out` and `size`, or `bytes`; of one that is left `bytes` is the body, if part
 * of it is done. */
struct call {
	uint64_t node;
	const char *body;
	Py_ssize_t length;
	uint32_t uid, gid, pid;
	PyObject *const *arguments; /* as Python's handler takes them */
	char out[192];
	size_t size;
	PyObject *bytes;
};

/* objects.c: the core's objects */
struct shape {
	PyTypeObject *node, *directory, *extra, *open_file;
	/* Node */
	Py_ssize_t number, count, parent, name, kind, layer, ino, shown, extra_at, stamp;
	/* Directory */
	Py_ssize_t children, lowers, lower_fds, upper_fd, flags, lister, redirect;
	/* Extra */
	Py_ssize_t names, key, fd, index, lower_nlink, handles, opened, secret, work_name, privileged;
	/* OpenFile */
	Py_ssize_t file_node, file_fd, file_writable, file_io, file_lower;
};
extern struct shape shape;

#define SLOT(object, at) (*(PyObject **)((char *)(object) + (at)))

int learn_shape(void);
long slot_int(PyObject *object, Py_ssize_t at); /* small numbers; -1 where it is none */
uint64_t slot_u64(PyObject *object, Py_ssize_t at);
void set_slot(PyObject *object, Py_ssize_t at, PyObject *value); /* steals value */
int is_directory(PyObject *node);
int is_true(PyObject *object, PyObject *attribute); /* -1 with an exception */
PyObject *find_node(Shortcuts *self, uint64_t number); /* borrowed; NULL: none, or an exception */
PyObject *find_file(Shortcuts *self, uint64_t handle); /* the same, of an open file */
PyObject *new_node(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st, long layer,
		   uint64_t shown, PyObject *stamp);
PyObject *new_directory(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st, long layer,
			PyObject *lowers); /* without descriptors */
PyObject *more(PyObject *node); /* its Extra, made when first needed; borrowed */
int remember(Shortcuts *self, PyObject *directory, long position, int fd); /* position -1: in upper */
PyObject *kind_object(unsigned type); /* S_IFMT bits of a d_type; borrowed */
PyObject *next_number(PyObject *owner, PyObject *attribute); /* and count it up */
void close_later(Shortcuts *self, int fd); /* once the lock is given up */
void close_dropped(Shortcuts *self);
extern PyObject *str_next, *str_next_handle, *str_lower_timeout, *str_xwhiteouts, *str_spare, *str_index_inodes;
extern PyObject *str_watch, *str_open_directories, *str_group_with_room, *str_marked, *str_generation, *zero;

/* places.c: where an object is, and what stat tells of it */
struct place {
	int fd;
	const char *name; /* empty: the descriptor is the object */
};
int directory_fd(Shortcuts *self, PyObject *directory, long layer); /* -1: not open */
int changeable(Shortcuts *self, uint64_t number, PyObject **directory, int *fd);
int place_of(Shortcuts *self, PyObject *node, struct place *place); /* ANSWERED or LEAVE */
int is_of(PyObject *node, const struct stat *st);
int stat_place(const struct place *place, struct stat *st);	    /* an errno */
int stat_node(Shortcuts *self, PyObject *node, struct stat *st);   /* LEAVE where it isn't there */
int shown_attributes(Shortcuts *self, PyObject *node, const struct stat *st, struct fuse_attr *attr);
int stored_ids(const struct owners *owners, uint32_t uid, uint32_t gid, uint32_t *stored_uid,
	       uint32_t *stored_gid); /* -1: no place in the map; 0xFFFFFFFF stays */
double lower_timeout(Shortcuts *self); /* seconds; -1 with an exception */
int timeout_of(Shortcuts *self, long layer, uint64_t *seconds, uint32_t *nanoseconds);
int may_be_secret(Shortcuts *self, long layer, const struct stat *st, int fd, const char *name);
void xattr_path(char *path, size_t size, const struct place *place);
int settled(Shortcuts *self);
int becomes(Shortcuts *self, uint32_t uid, uint32_t gid);
int is_plain_upper(PyObject *parent, PyObject *name, int fd, const struct stat *st);

/* names.c */
struct found {
	PyObject *node; /* borrowed; NULL: no such name */
	struct stat st;
	long layer;
};
int find_name(Shortcuts *self, PyObject *parent, PyObject *name, struct found *found);
int pack_found(Shortcuts *self, const struct found *found, struct fuse_entry_out *out);
int has_xattr_whiteouts(Shortcuts *self, long layer); /* -1 with an exception */
int in_lowers(Shortcuts *self, PyObject *parent, const char *name); /* 0, 1, or LEAVE */
int do_lookup(Shortcuts *self, struct call *call);
int do_forget(Shortcuts *self, struct call *call);
int do_batch_forget(Shortcuts *self, struct call *call);

/* making.c */
int do_create(Shortcuts *self, struct call *call);
int do_mkdir(Shortcuts *self, struct call *call);
int do_mknod(Shortcuts *self, struct call *call);
int do_symlink(Shortcuts *self, struct call *call);

/* linked.c */
int has_more_names(PyObject *node);
int remove_name(PyObject *node, PyObject *parent, PyObject *name);
int bind_linked(Shortcuts *self, PyObject *parent, PyObject *name, int fd, struct found *found);
int do_link(Shortcuts *self, struct call *call);

/* removing.c */
int hold(PyObject *node, const struct place *place);
void let_go(PyObject *node);
int do_unlink(Shortcuts *self, struct call *call);
int do_rmdir(Shortcuts *self, struct call *call);

/* renaming.c */
int do_rename(Shortcuts *self, struct call *call);
int do_rename2(Shortcuts *self, struct call *call);

/* upper_directories.c */
int open_upper(Shortcuts *self, PyObject *node, int above); /* `above`: its parent in upper, open */
PyObject *made_directory(Shortcuts *self, PyObject *parent, PyObject *name, const struct stat *st, int above);
int find_upper_directory(Shortcuts *self, PyObject *parent, PyObject *name, int fd, struct found *found);

/* lower_directories.c */
int is_crowded(Shortcuts *self);
int find_lower_directory(Shortcuts *self, PyObject *parent, PyObject *name, PyObject *above, int fd,
			 struct found *found); /* `above`: (layer, path) of the parent, open as `fd` */

/* attributes.c */
int do_getattr(Shortcuts *self, struct call *call);
int do_setattr(Shortcuts *self, struct call *call);
int do_setxattr(Shortcuts *self, struct call *call);
int do_getxattr(Shortcuts *self, struct call *call);
int do_listxattr(Shortcuts *self, struct call *call);

/* files.c */
int layer_flags(Shortcuts *self, uint32_t flags);
int opened(Shortcuts *self, PyObject *node, int fd, const struct stat *st, int writable,
	   struct fuse_open_out *out);
int do_open(Shortcuts *self, struct call *call);
int do_read(Shortcuts *self, struct call *call);
int do_release(Shortcuts *self, struct call *call);

/* copying.c */
int do_copy_file_range(Shortcuts *self, struct call *call);

/* lookers.c */
int wants_attributes(Shortcuts *self, const struct call *call, uint32_t mode);
void note_lookup(Shortcuts *self, PyObject *directory, const struct call *call, uint32_t mode);

/* listing.c */
PyObject *entries_of(Shortcuts *self, PyObject *directory, uint64_t offset);
Py_ssize_t following(PyObject *entries, uint64_t offset);
uint64_t cookie(PyObject *entry);

/* directories.c */
int do_readdir(Shortcuts *self, struct call *call);
int do_readdirplus(Shortcuts *self, struct call *call);

#endif
