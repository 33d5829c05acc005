/*
 * Stands in an instance where a Slurm client command stood, and runs the real one as its user.
 *
 * Slurm's clients send getuid(), munge takes the caller's id from its socket: as uid 0 of a user
 * namespace the two differ and Slurm refuses the request. In a user namespace nested in that one,
 * which maps the user's own ids back, they agree.
 *
 * The real command is REAL/NAME, NAME being the last component of what this was called as.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef REAL
#define REAL "/run/sdee-clients"
#endif

static const char *name;

static void die(const char *what)
{
	fprintf(stderr, "%s: %s: %s\n", name, what, strerror(errno));
	exit(1);
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die(path);
	close(fd);
}

/* What id 0 of this namespace is to the one above. */
static unsigned long outside(const char *path)
{
	unsigned long first, id, count;
	FILE *file = fopen(path, "re");

	if (!file)
		die(path);
	while (fscanf(file, "%lu %lu %lu", &first, &id, &count) == 3)
		if (!first) {
			fclose(file);
			return id;
		}
	fclose(file);
	return 0;
}

/* Whether a path is on one of the instance's own file systems in memory, as /tmp is. */
static int in_memory(const char *path)
{
	char line[2 * PATH_MAX], point[PATH_MAX];
	size_t longest = 0;
	int found = 0;
	FILE *file = fopen("/proc/self/mountinfo", "re");

	while (file && fgets(line, sizeof line, file)) {
		if (sscanf(line, "%*s %*s %*s %*s %4095s", point) != 1)
			continue;
		size_t length = strcmp(point, "/") ? strlen(point) : 0;
		if (length >= longest && !strncmp(path, point, length) && strchr("/", path[length])) {
			longest = length;
			found = strstr(line, " - tmpfs sdee ") != NULL;
		}
	}
	if (file)
		fclose(file);
	return found;
}

int main(int argc, char **argv)
{
	char path[256], map[64];

	name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	snprintf(path, sizeof path, "%s/%s", REAL, name);
	/* Slurm's daemons are outside: they write to the nodes' own. */
	if (!strcmp(name, "sbcast") && argc > 2 && *argv[argc - 1] == '/' && in_memory(argv[argc - 1]))
		fprintf(stderr,
			"sbcast: sdee: tasks don't see %s of the nodes, but their environment's own; take a "
			"directory in your home, or show them /tmp of the nodes, by binds = [\"/tmp\"] below "
			"[instance] in ~/.config/sdee/sdee.toml\n", argv[argc - 1]);
	if (!getuid()) {
		unsigned long uid = outside("/proc/self/uid_map");
		unsigned long gid = outside("/proc/self/gid_map");

		if (uid) {
			gid_t group = getegid();

			if (unshare(CLONE_NEWUSER))
				die("a nested user namespace can't be made (user.max_user_namespaces?)");
			snprintf(map, sizeof map, "%lu 0 1\n", uid);
			put("/proc/self/uid_map", map);
			put("/proc/self/setgroups", "deny");
			snprintf(map, sizeof map, "%lu %u 1\n", gid ? gid : uid, group);
			put("/proc/self/gid_map", map);
		}
	}
	execv(path, argv);
	die(path);
}
