/* FORGETs that readers have taken, until the thread that sees to them comes for all: nobody waits for one,
 * so it is kept without the interpreter's lock, and several become one BATCH_FORGET. */
#ifndef FORGETTING_H
#define FORGETTING_H

#include "_serving.h"
#include "shortcuts/wire.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Beyond so many their reader sees to them itself. */
#define MOST 65536
/* So many are seen to with the core's lock taken once. */
#define AT_ONCE 256

struct forgets {
	pthread_mutex_t lock;
	pthread_cond_t some;
	struct fuse_forget_one *list;
	size_t done, count, room; /* from `done` on they wait */
	uint64_t requests[2]; /* that were kept: FORGETs, BATCH_FORGETs */
	bool wanted; /* somebody comes for them */
};

static inline void forgets_begin(struct forgets *all)
{
	memset(all, 0, sizeof *all);
	pthread_mutex_init(&all->lock, NULL);
	pthread_cond_init(&all->some, NULL);
}

static inline void forgets_end(struct forgets *all)
{
	free(all->list);
	pthread_cond_destroy(&all->some);
	pthread_mutex_destroy(&all->lock);
}

/* Called with the lock. */
static inline bool keep_forgets(struct forgets *all, const struct fuse_forget_one *ones, size_t count)
{
	if (!all->wanted || all->count + count > MOST)
		return false;
	if (all->count + count > all->room) {
		size_t room = 2 * (all->count + count);
		struct fuse_forget_one *more = realloc(all->list, room * sizeof *more);

		if (!more)
			return false;
		all->list = more;
		all->room = room;
	}
	memcpy(all->list + all->count, ones, count * sizeof *ones);
	all->count += count;
	return true;
}

/* Whether a request is a FORGET that was kept. */
static inline bool forgets_take(struct forgets *all, const struct in_header *in, const char *body, size_t length)
{
	struct fuse_forget_one one = { .nodeid = in->nodeid };
	struct fuse_batch_forget_in batch = { .count = 1 };
	const struct fuse_forget_one *ones = &one;
	bool kept;

	if (in->opcode == FUSE_FORGET && length >= sizeof one.nlookup) {
		memcpy(&one.nlookup, body, sizeof one.nlookup);
	} else if (in->opcode == FUSE_BATCH_FORGET && length >= sizeof batch) {
		memcpy(&batch, body, sizeof batch);
		ones = (const struct fuse_forget_one *)(body + sizeof batch);
		if (batch.count > (length - sizeof batch) / sizeof *ones)
			return false;
	} else {
		return false;
	}
	pthread_mutex_lock(&all->lock);
	kept = keep_forgets(all, ones, batch.count);
	all->requests[in->opcode == FUSE_BATCH_FORGET] += kept;
	if (kept && all->count == batch.count && !all->done)
		pthread_cond_signal(&all->some);
	pthread_mutex_unlock(&all->lock);
	return kept;
}

/* Add what was kept to counts by opcode. */
static inline void forgets_count(struct forgets *all, uint64_t *counts)
{
	pthread_mutex_lock(&all->lock);
	counts[FUSE_FORGET] += all->requests[0];
	counts[FUSE_BATCH_FORGET] += all->requests[1];
	pthread_mutex_unlock(&all->lock);
}

/* Wait until there are some, and so many nanoseconds more; then the body of a BATCH_FORGET with those that
 * came first, NULL with an exception. None once nobody wants them any more. */
static inline PyObject *forgets_wait(struct forgets *all, long pause)
{
	struct {
		struct fuse_batch_forget_in head;
		struct fuse_forget_one ones[AT_ONCE];
	} body = { 0 };
	struct timespec time = { .tv_nsec = pause };
	size_t count = 0;
	bool wanted;

	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&all->lock);
	if (all->done == all->count) {
		while (all->wanted && all->done == all->count)
			pthread_cond_wait(&all->some, &all->lock);
		pthread_mutex_unlock(&all->lock);
		nanosleep(&time, NULL);
		pthread_mutex_lock(&all->lock);
	}
	wanted = all->wanted;
	if (wanted) {
		count = all->count - all->done < AT_ONCE ? all->count - all->done : AT_ONCE;
		memcpy(body.ones, all->list + all->done, count * sizeof *body.ones);
		all->done += count;
		if (all->done == all->count)
			all->done = all->count = 0;
	}
	pthread_mutex_unlock(&all->lock);
	Py_END_ALLOW_THREADS
	if (!wanted)
		Py_RETURN_NONE;
	body.head.count = (uint32_t)count;
	return PyBytes_FromStringAndSize((const char *)&body, (Py_ssize_t)(sizeof body.head + count * sizeof *body.ones));
}

static inline void forgets_want(struct forgets *all, bool wanted)
{
	pthread_mutex_lock(&all->lock);
	all->wanted = wanted;
	pthread_cond_broadcast(&all->some);
	pthread_mutex_unlock(&all->lock);
}

#endif
