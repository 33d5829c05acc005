/* The device's readers follow a lone caller to its CPU.
 *
 * A request and its answer cost two wake-ups. On one CPU each takes a microsecond or two; across two
 * CPUs, of which one sleeps while the other works, some 25. The kernel hands a request to the reader
 * that has slept longest, and puts it on an idle CPU: never the caller's. So the readers are bound to
 * the CPU on which a lone caller waits. The other readers are bound while they sleep, and take its next
 * request there; a reader that is awake would answer from there at once, and Linux gives a caller that
 * isn't on the run queue any more to an idle CPU with the answer. From 6.12 on it leaves a caller there
 * that has had more than its share of the CPU (delayed dequeue): the readers' time counts little
 * (scheduling.py), so it has. Where that doesn't hold, what is tried fails, and is tried ever more rarely.
 */
#ifndef FOLLOWING_H
#define FOLLOWING_H

#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define READERS 64
#define NOWHERE (-1) /* not bound: all of the process's CPUs */
/* Nanoseconds: a caller that asks again so soon after its answer is on the readers' CPU. */
#define NEAR 10000
/* Where it takes longer its CPU is looked up, which takes a third as long as a request does: once it was
 * found here not for one request, and for about twice as many each time, up to so many. */
#define TRUST 63
/* A change of caller weighs so many requests without one; at so much the callers are many. */
#define CHANGE 4
#define MANY 16
/* A caller that has left weighs so many requests that find it here; at so much the pursuit ends, for
 * this many requests at first, and for twice as many each time. */
#define MISS 4
#define LOST 32
#define REST 64
#define LONGEST_REST 65536

/* Guarded by the interpreter's lock, but for what is said to be read without. */
struct readers {
	pid_t threads[READERS];
	int count;
	atomic_int cpu; /* to which they are bound; read without */
	cpu_set_t cpus; /* that they may use otherwise; never changes */
	bool able;
	uint32_t caller; /* of the last request */
	unsigned changes; /* of the caller: see CHANGE */
	unsigned misses, rest, next_rest;
	unsigned trust, trusted; /* requests without a look: how many at a time, and yet to come */
	int64_t answered; /* when the last answer was given, in ns */
};

static inline int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Whether /proc shows the processes by the numbers that requests have. */
static inline bool proc_is_ours(void)
{
	char text[16];
	ssize_t length = readlink("/proc/self", text, sizeof text - 1);

	if (length <= 0)
		return false;
	text[length] = 0;
	return atoi(text) == getpid();
}

static inline void readers_begin(struct readers *all)
{
	memset(all, 0, sizeof *all);
	all->cpu = NOWHERE;
	all->next_rest = REST;
	all->able = !sched_getaffinity(0, sizeof all->cpus, &all->cpus) &&
		    CPU_COUNT(&all->cpus) > 1 && proc_is_ours();
}

static inline void readers_join(struct readers *all)
{
	if (all->count < READERS)
		all->threads[all->count++] = gettid();
	else
		all->able = false;
}

static inline void readers_leave(struct readers *all)
{
	pid_t me = gettid();
	int i;

	for (i = 0; i < all->count; i++) {
		if (all->threads[i] == me) {
			all->threads[i] = all->threads[--all->count];
			return;
		}
	}
}

/* The CPU on which a thread is or was last, or NOWHERE; see proc_pid_stat(5), “processor”. */
static inline int cpu_of(uint32_t thread)
{
	char path[32], text[1024], *at;
	ssize_t length;
	int fd, field;

	snprintf(path, sizeof path, "/proc/%u/stat", thread);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return NOWHERE;
	length = read(fd, text, sizeof text - 1);
	close(fd);
	if (length <= 0)
		return NOWHERE;
	text[length] = 0;
	at = strrchr(text, ')');
	for (field = 2; at && field < 39; field++)
		at = strchr(at + 1, ' ');
	return at ? atoi(at + 1) : NOWHERE;
}

/* Bind a thread to where `all` says that they are; needs no lock. */
static inline void bind_reader(const struct readers *all, pid_t thread)
{
	int cpu = all->cpu;
	cpu_set_t one;

	CPU_ZERO(&one);
	if (cpu != NOWHERE)
		CPU_SET(cpu, &one);
	/* What is refused (the CPU has gone, the thread has ended) stays as it is. */
	sched_setaffinity(thread, sizeof one, cpu == NOWHERE ? &all->cpus : &one);
}

/* Before an answer: bind the readers that sleep. Returns whether this one is to move after it. */
static inline bool move_to(struct readers *all, int cpu)
{
	pid_t me = gettid();
	int i;

	if (cpu == all->cpu)
		return false;
	all->cpu = cpu;
	for (i = 0; i < all->count; i++)
		if (all->threads[i] != me)
			bind_reader(all, all->threads[i]);
	return true;
}

/* The caller is where the readers are, and was for so many requests. */
static inline bool found(struct readers *all, unsigned requests)
{
	if (all->misses) {
		all->misses -= requests < all->misses ? requests : all->misses;
		if (!all->misses)
			all->next_rest = REST;
	}
	return false;
}

/* The same, after a look. */
static inline bool seen(struct readers *all)
{
	unsigned requests = 1 + all->trust;

	if (all->trust < TRUST)
		all->trust += requests;
	all->trusted = all->trust;
	return found(all, requests);
}

/* The caller is elsewhere; whether that is so too often. */
static inline bool lost(struct readers *all)
{
	all->trust = all->trusted = 0;
	all->misses += MISS;
	if (all->misses < LOST)
		return false;
	all->misses = 0;
	all->rest = all->next_rest;
	if (all->next_rest < LONGEST_REST)
		all->next_rest *= 2;
	return true;
}

/* Whether one of so many requests is left. */
static inline bool spend(unsigned *left)
{
	if (!*left)
		return false;
	--*left;
	return true;
}

/* Before a request of this thread is answered. Returns whether this reader is to move after that
 * (bind_reader). */
static inline bool follow(struct readers *all, uint32_t caller)
{
	int cpu;

	if (!all->able || !caller) /* nobody's: the kernel's own, or from another PID namespace */
		return false;
	if (caller != all->caller) {
		all->caller = caller;
		all->changes += CHANGE;
	} else if (all->changes) {
		all->changes--;
	}
	if (all->changes > MANY) {
		all->changes = MANY + CHANGE;
		return move_to(all, NOWHERE);
	}
	if (spend(&all->rest))
		return false;
	if (all->changes)
		return false;
	if (all->cpu != NOWHERE) {
		if (now() - all->answered < NEAR)
			return found(all, 1);
		if (spend(&all->trusted))
			return false;
	}
	cpu = cpu_of(caller);
	if (cpu == NOWHERE || !CPU_ISSET(cpu, &all->cpus))
		return move_to(all, NOWHERE);
	return cpu == all->cpu ? seen(all) : move_to(all, lost(all) ? NOWHERE : cpu);
}

#endif
