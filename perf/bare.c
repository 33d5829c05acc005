/* The barest FUSE server over io_uring: one directory without anything in it, told from memory.
 *
 * bare MOUNTPOINT: mounts there (as root) and serves until it is unmounted. A pinned thread for each
 * CPU, no locks, no system call but the one that commits an answer and waits for the next request: what
 * a request takes here, every server pays for each of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

/* From linux/fuse.h of Linux 6.14; the installed header may be older. */
#define OVER_IO_URING (1ULL << 41)
#define INIT_EXTENDED (1u << 30)
#define REGISTER 1
#define COMMIT_AND_FETCH 2

struct header {
	char in_out[128];
	char op_in[128];
	uint64_t flags, commit_id;
	uint32_t payload_size, padding;
	uint64_t reserved;
};
struct command {
	uint64_t flags, commit_id;
	uint16_t queue;
	uint8_t padding[6];
};
struct entry {
	struct header header;
	char payload[1 << 17];
	struct iovec parts[2];
	int queue;
};

#define DEPTH 4

static int device;
static char request[1 << 18];

static void fail(const char *what)
{
	fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void submit(struct io_uring *ring, struct entry *entry, int operation)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct command *command;

	memset(sqe, 0, 128);
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->cmd_op = operation;
	sqe->user_data = (uint64_t)(uintptr_t)entry;
	if (operation == REGISTER) {
		sqe->addr = (uint64_t)(uintptr_t)entry->parts;
		sqe->len = 2;
	}
	command = (struct command *)sqe->cmd;
	command->queue = (uint16_t)entry->queue;
	command->commit_id = entry->header.commit_id;
}

static void answer(struct entry *entry)
{
	struct fuse_in_header in;
	struct fuse_out_header *out = (struct fuse_out_header *)entry->header.in_out;

	memcpy(&in, entry->header.in_out, sizeof in);
	out->error = -ENOSYS;
	out->unique = in.unique;
	entry->header.payload_size = 0;
	if (in.opcode == FUSE_GETATTR) {
		struct fuse_attr_out *reply = (struct fuse_attr_out *)entry->payload;

		memset(reply, 0, sizeof *reply);
		reply->attr.ino = in.nodeid;
		reply->attr.mode = S_IFDIR | 0755;
		reply->attr.nlink = 2;
		entry->header.payload_size = sizeof *reply;
		out->error = 0;
	} else if (in.opcode == FUSE_LOOKUP) {
		out->error = -ENOENT;
	}
	out->len = (uint32_t)sizeof *out + entry->header.payload_size;
}

static void *serve(void *argument)
{
	int queue = (int)(intptr_t)argument, i;
	struct io_uring_params parameters = {
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
	};
	struct entry *entries = aligned_alloc(4096, sizeof *entries * DEPTH);
	struct io_uring ring;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(queue, &cpus);
	if (sched_setaffinity(0, sizeof cpus, &cpus))
		fail("sched_setaffinity");
	errno = -io_uring_queue_init_params(DEPTH * 2, &ring, &parameters);
	if (errno)
		fail("io_uring_setup");
	errno = -io_uring_register_files(&ring, &device, 1);
	if (errno || !entries)
		fail("a ring");
	io_uring_register_ring_fd(&ring);
	for (i = 0; i < DEPTH; i++) {
		memset(&entries[i], 0, sizeof entries[i]);
		entries[i].queue = queue;
		entries[i].parts[0] = (struct iovec){ &entries[i].header, sizeof entries[i].header };
		entries[i].parts[1] = (struct iovec){ entries[i].payload, sizeof entries[i].payload };
		submit(&ring, &entries[i], REGISTER);
	}
	for (;;) {
		struct io_uring_cqe *cqe;
		unsigned head, seen = 0;

		if (io_uring_submit_and_wait(&ring, 1) < 0)
			continue; /* interrupted */
		io_uring_for_each_cqe(&ring, head, cqe) {
			struct entry *entry = (struct entry *)(uintptr_t)cqe->user_data;

			if (cqe->res) /* unmounted */
				exit(0);
			answer(entry);
			submit(&ring, entry, COMMIT_AND_FETCH);
			seen++;
		}
		io_uring_cq_advance(&ring, seen);
	}
	return NULL;
}

static void negotiate(void)
{
	struct fuse_in_header *in = (struct fuse_in_header *)request;
	struct fuse_init_in *offer = (struct fuse_init_in *)(in + 1);
	struct {
		struct fuse_out_header head;
		struct fuse_init_out init;
	} reply = { 0 };

	if (read(device, request, sizeof request) < 0 || in->opcode != FUSE_INIT)
		fail("INIT");
	if (!((uint64_t)offer->flags2 << 32 & OVER_IO_URING)) {
		fprintf(stderr, "bare: the kernel doesn't offer FUSE over io_uring\n");
		exit(1);
	}
	reply.head.len = sizeof reply;
	reply.head.unique = in->unique;
	reply.init.major = 7;
	reply.init.minor = 36;
	reply.init.flags = INIT_EXTENDED | FUSE_MAX_PAGES | FUSE_BIG_WRITES;
	reply.init.flags2 = OVER_IO_URING >> 32;
	reply.init.max_write = sizeof ((struct entry *)0)->payload;
	reply.init.max_pages = 32;
	if (write(device, &reply, sizeof reply) != sizeof reply)
		fail("the answer to INIT");
}

int main(int count, char **words)
{
	long cpus = sysconf(_SC_NPROCESSORS_CONF), i;
	char options[100];

	if (count != 2) {
		fprintf(stderr, "usage: bare MOUNTPOINT\n");
		return 2;
	}
	device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (device < 0)
		fail("/dev/fuse");
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", device);
	if (mount("bare", words[1], "fuse", MS_NOSUID | MS_NODEV, options))
		fail(words[1]);
	negotiate();
	for (i = 0; i < cpus; i++) {
		pthread_t thread;

		errno = pthread_create(&thread, NULL, serve, (void *)i);
		if (errno)
			fail("a thread");
	}
	/* FORGET, and what comes before the rings are ready. */
	for (;;) {
		struct fuse_in_header *in = (struct fuse_in_header *)request;
		struct fuse_out_header out = { sizeof out, -ENOSYS, 0 };

		if (read(device, request, sizeof request) < 0) {
			if (errno == ENODEV)
				return 0;
			continue;
		}
		out.unique = in->unique;
		if (in->opcode != FUSE_FORGET && in->opcode != FUSE_BATCH_FORGET && in->opcode != FUSE_INTERRUPT)
			(void)!write(device, &out, sizeof out);
	}
}
