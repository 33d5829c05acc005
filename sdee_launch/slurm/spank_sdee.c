/*
 * The Slurm plugin of SDEE: a job's tasks run in the environment of the user who submitted it.
 *
 * It decides nothing. On the submit side it asks a helper program in Python (`python=PATH`,
 * module sdee_launch.slurm.submit) which environment the job is to have, and hands its answer to
 * the nodes' Prolog. On a node it asks sdeed for the namespaces of the instance that Prolog made,
 * and takes each task into them before exec. Whatever fails, fails the step: no task ever runs
 * outside the environment that its job asked for.
 *
 * plugstack.conf:  required /PATH/spank_sdee.so python=/PATH/python
 *
 * A step's way in has three parts, for reasons that lie in slurmstepd (22.05):
 *  - user_init, in the thread that forks all tasks: its children are born in the instance's PID
 *    namespace. It changes this thread only, and task_post_fork changes it back, before the
 *    thread starts others (clone(CLONE_THREAD) is EINVAL meanwhile).
 *  - task_init, in the task, as the user, who owns the instance's user namespace: it joins that,
 *    with its capabilities the mount namespace, then drops what the daemon says.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(sdee, 1)

#define JOBS "/run/sdee/jobs"
#define SOCKET "/run/sdee/sdeed.sock"
#define TOLD "SLURM_SPANK_SDEE_" /* of variables that come with the job, with --export=NONE, too */
#define DIRECTORY TOLD "DIRECTORY"
#define TEXT 4096
#define REPLY (256 * 1024)
#define TOLD_TEXT (32 * 1024) /* all that the submit side tells, binds with it: see transfer.py */

/* Descriptors that come with the daemon's answer, in this order. */
enum { FD_USER, FD_MOUNT, FD_PID, FD_ROOT, FD_SECCOMP, FD_COUNT };

/* What the submit side tells Prolog; the job's processes see it, too. */
static const char *const names[] = {"REF", "IDENTITY", "SOURCE", "TRANSPORT", "ENGINE", "KEEP", "BINDS"};
#define NAMES (sizeof names / sizeof *names)

static char *wanted;         /* --sdee */
static char *exclude;        /* --sdee-exclude */
static int keep;             /* --sdee-keep */
static int submitted;        /* this srun asks for an environment */
static int allocating;       /* … and for an allocation of its own */
static int joined;           /* this step has an instance to join */
static int fds[FD_COUNT] = {-1, -1, -1, -1, -1};
static int own_pid_ns = -1;  /* where task_post_fork goes back to */
static uint64_t bounding;    /* capabilities that a task may keep */
static int no_new_privs;
static char failure[TEXT];   /* why this step can't start */
static char work_dir[PATH_MAX]; /* where the job's batch script starts */
static const char *python = "python3";
static const char *place = SOCKET;

static int on_option(int value, const char *argument, int remote)
{
	(void) remote;
	if (value == 1) {
		if (!argument || !*argument) {
			slurm_error("sdee: --sdee wants `no' or NAME[@GENERATION]");
			return -1;
		}
		free(wanted);
		wanted = strdup(argument);
	} else if (value == 2) {
		keep = 1;
	} else {
		free(exclude);
		exclude = argument ? strdup(argument) : NULL;
	}
	return 0;
}

static struct spank_option options[] = {
	{"sdee", "NAME[@GEN]|no",
	 "run the job in this environment (the one it is submitted from), or in none", 1, 1, on_option},
	{"sdee-keep", NULL,
	 "keep what the job writes as a new generation (see sdee job save)", 0, 2, on_option},
	{"sdee-exclude", "PATTERN[,...]",
	 "leave these paths of the environment behind", 1, 3, on_option},
	SPANK_OPTIONS_TABLE_END};

/* By hand: sbatch and salloc don't read a table called spank_options, only srun does. */
int slurm_spank_init(spank_t sp, int ac, char **av)
{
	(void) ac;
	(void) av;
	if (spank_context() == S_CTX_SLURMD || spank_context() == S_CTX_JOB_SCRIPT)
		return 0;
	for (struct spank_option *option = options; option->name; option++)
		if (spank_option_register(sp, option) != ESPANK_SUCCESS) {
			slurm_error("sdee: the option --%s can't be registered", option->name);
			return -1;
		}
	return 0;
}

static void arguments(int ac, char **av)
{
	for (int i = 0; i < ac; i++) {
		if (!strncmp(av[i], "python=", 7))
			python = av[i] + 7;
		else if (!strncmp(av[i], "socket=", 7))
			place = av[i] + 7;
		else
			slurm_error("sdee: plugstack.conf: unknown argument %s", av[i]);
	}
}

/* -- The submit side ------------------------------------------------------------------------ */

/* Run the helper; what it prints goes to `out`. Returns its exit code, or -1. */
static int ask_helper(char *out, size_t size)
{
	const char *argv[16];
	int n = 0, pipe_fds[2], status;
	size_t got = 0;
	ssize_t more;

	argv[n++] = python;
	argv[n++] = "-I";
	argv[n++] = "-m";
	argv[n++] = "sdee_launch.slurm.submit";
	if (wanted) {
		argv[n++] = "--sdee";
		argv[n++] = wanted;
	}
	if (exclude) {
		argv[n++] = "--exclude";
		argv[n++] = exclude;
	}
	if (keep)
		argv[n++] = "--keep";
	argv[n] = NULL;
	if (pipe2(pipe_fds, O_CLOEXEC) < 0)
		return -1;
	pid_t pid = fork();
	if (pid < 0) {
		close(pipe_fds[0]);
		close(pipe_fds[1]);
		return -1;
	}
	if (!pid) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		int null = open("/dev/null", O_RDONLY);
		if (null >= 0)
			dup2(null, 0); /* the job's standard input is not the helper's */
		dup2(pipe_fds[1], 1);
		execvp(python, (char *const *) argv);
		fprintf(stderr, "sdee: %s: %s\n", python, strerror(errno));
		_exit(127);
	}
	close(pipe_fds[1]);
	while (got < size - 1) {
		more = read(pipe_fds[0], out + got, size - 1 - got);
		if (more < 0 && errno == EINTR)
			continue;
		if (more <= 0)
			break;
		got += more;
	}
	out[got] = 0;
	close(pipe_fds[0]);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int exists_in_home(const char *name)
{
	char path[PATH_MAX];
	const char *home = getenv("HOME");

	return home && snprintf(path, sizeof path, "%s/%s", home, name) < (int) sizeof path &&
	       !access(path, F_OK);
}

/* A job that is submitted from another one doesn't inherit that one's environment. */
static void forget(void)
{
	char name[64];

	unsetenv("SDEE_JOB_REF");
	unsetenv(DIRECTORY);
	for (size_t i = 0; i < NAMES; i++) {
		snprintf(name, sizeof name, TOLD "%s", names[i]);
		unsetenv(name);
	}
}

/* Which environment the job gets: the helper prints NAME=VALUE lines for the nodes' Prolog. */
static int choose(spank_t sp)
{
	static char out[TOLD_TEXT];
	char *line, *rest, *equals;

	if (wanted && !strcmp(wanted, "no")) {
		forget();
		return 0;
	}
	if (spank_context() == S_CTX_LOCAL && getenv("SLURM_JOB_ID")) {
		/* A step: its job has chosen. */
		submitted = getenv("SDEE_JOB_REF") || getenv(TOLD "REF");
		return 0;
	}
	allocating = spank_context() == S_CTX_LOCAL;
	forget();
	if (!wanted && access("/run/sdee/inside", F_OK) && !exists_in_home(".config/sdee/sdee.toml"))
		return 0;
	if (ask_helper(out, sizeof out)) {
		slurm_error("sdee: the job is not submitted (--sdee=no submits it without)");
		return -1;
	}
	if (!strcmp(out, "step\n")) { /* srun --jobid: its job has chosen, too */
		submitted = 1;
		allocating = 0;
		return 0;
	}
	for (line = strtok_r(out, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		if (!(equals = strchr(line, '=')))
			continue;
		*equals = 0;
		if (spank_job_control_setenv(sp, line, equals + 1, 1) != ESPANK_SUCCESS) {
			slurm_error("sdee: %s can't be passed to the nodes", line);
			return -1;
		}
		if (!strcmp(line, "SDEE_REF")) {
			setenv("SDEE_JOB_REF", equals + 1, 1);
			submitted = 1;
		}
	}
	return 0;
}

/*
 * --chdir of srun for task_init: slurmstepd can't find a directory that only the environment has,
 * and doesn't tell plugins which it was to be.
 */
static void name_directory(spank_t sp)
{
	static char line[256 * 1024];
	char here[PATH_MAX], path[2 * PATH_MAX], **command;
	const char *chdir = getenv("SLURM_WORKING_DIR"), *end, *word, *next;
	int count = 0, fd;
	ssize_t size = -1;

	if (spank_get_item(sp, S_JOB_ARGV, &count, &command) != ESPANK_SUCCESS)
		return;
	if ((fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC)) >= 0) {
		size = read(fd, line, sizeof line - 1);
		close(fd);
	}
	end = line + (size < 0 ? 0 : size);
	/* The last words are the program's own: `srun java -Dname=value` */
	for (; count > 0 && end > line; count--)
		do
			end--;
		while (end > line && end[-1]);
	for (word = line; word < end; word = next) {
		next = word + strlen(word) + 1;
		if (!strncmp(word, "--chdir=", 8))
			chdir = word + 8;
		else if (!strncmp(word, "-D", 2) && word[2])
			chdir = word + 2;
		else if ((!strcmp(word, "--chdir") || !strcmp(word, "-D")) && next < end)
			chdir = next;
	}
	if (!chdir || !*chdir || !getcwd(here, sizeof here))
		return;
	if (*chdir == '/')
		snprintf(path, sizeof path, "%s", chdir);
	else
		snprintf(path, sizeof path, "%s/%s", here, chdir);
	setenv(DIRECTORY, path, 1);
}

/*
 * Did a Prolog on any node of the job fail? All have ended when srun has its nodes, and when a
 * batch step starts (PrologFlags=DeferBatch); hook.py leaves a note with the controller.
 */
static int noted(uint32_t job, char *reason, size_t size)
{
	job_info_msg_t *message = NULL;
	char again[32];
	int found = 0;

	if (slurm_load_job(&message, job, SHOW_DETAIL) || !message)
		return 0; /* the node itself still refuses */
	for (uint32_t i = 0; i < message->record_count; i++) {
		const char *note = message->job_array[i].admin_comment;
		uint32_t restarts = message->job_array[i].restart_cnt;
		if (message->job_array[i].job_id == job && message->job_array[i].work_dir)
			snprintf(work_dir, sizeof work_dir, "%s", message->job_array[i].work_dir);
		snprintf(again, sizeof again, "(restart %u)", restarts);
		if (message->job_array[i].job_id == job && note && !strncmp(note, "sdee: ", 6) &&
		    (restarts ? strstr(note, again) != NULL : !strstr(note, "(restart "))) {
			snprintf(reason, size, "%s", note + 6);
			found = 1;
		}
	}
	slurm_free_job_info_msg(message);
	return found;
}

int slurm_spank_local_user_init(spank_t sp, int ac, char **av)
{
	uint32_t job = 0;

	(void) ac;
	(void) av;
	if (!submitted || spank_get_item(sp, S_JOB_ID, &job) != ESPANK_SUCCESS)
		return 0;
	if (!noted(job, failure, sizeof failure)) {
		name_directory(sp);
		return 0;
	}
	slurm_error("sdee: %s", failure);
	if (allocating)
		slurm_complete_job(job, 1); /* srun would go and leave the allocation */
	return -1;
}

/* -- A node ---------------------------------------------------------------------------------- */

/* The value of a string member of a flat JSON object, unescaped as far as our daemon escapes. */
static int member(const char *json, const char *name, char *out, size_t size)
{
	char key[64];
	size_t n = 0;

	snprintf(key, sizeof key, "\"%s\":\"", name);
	const char *at = strstr(json, key);
	if (!at)
		return 0;
	for (at += strlen(key); *at && *at != '"' && n < size - 1; at++) {
		if (*at != '\\') {
			out[n++] = *at;
			continue;
		}
		at++;
		if (*at == 'n')
			out[n++] = '\n';
		else if (*at == 'u' && strlen(at) > 4)
			out[n++] = '?', at += 4;
		else if (*at)
			out[n++] = *at;
		else
			break;
	}
	out[n] = 0;
	return 1;
}

static int fail(const char *what)
{
	snprintf(failure, sizeof failure, "%s: %s", what, strerror(errno));
	return -1;
}

/* A connection to sdeed; a daemon that restarts is waited for. */
static int connect_daemon(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval patience = {.tv_sec = 120};

	strncpy(address.sun_path, place, sizeof address.sun_path - 1);
	for (int tries = 0;; tries++) {
		int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (s < 0)
			return -1;
		if (!connect(s, (struct sockaddr *) &address, sizeof address)) {
			setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
			return s;
		}
		int reason = errno;
		close(s);
		errno = reason;
		if (tries >= 300 || (reason != ECONNREFUSED && reason != ENOENT && reason != EAGAIN))
			return -1;
		usleep(100 * 1000);
	}
}

static int read_all(int s, char *to, size_t count)
{
	while (count) {
		ssize_t n = recv(s, to, count, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			if (!n)
				errno = ECONNRESET;
			return -1;
		}
		to += n;
		count -= n;
	}
	return 0;
}

/* One request, one reply and its descriptors: sdee_launch/protocol.py says how. */
static int exchange(int s, const char *text, char *reply, size_t size)
{
	unsigned char head[4];
	uint32_t length = strlen(text);
	_Alignas(struct cmsghdr) char ancillary[CMSG_SPACE(64 * sizeof(int))];
	struct iovec io = {head, sizeof head};
	struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = ancillary,
				 .msg_controllen = sizeof ancillary};
	int taken = 0;

	head[0] = length >> 24, head[1] = length >> 16, head[2] = length >> 8, head[3] = length;
	if (send(s, head, 4, MSG_NOSIGNAL) != 4 ||
	    send(s, text, length, MSG_NOSIGNAL) != (ssize_t) length)
		return -1;
	ssize_t n;
	while ((n = recvmsg(s, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL)) < 0 && errno == EINTR)
		;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); n > 0 && c; c = CMSG_NXTHDR(&message, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		int count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int), fd;
		for (int i = 0; i < count; i++) {
			memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
			if (taken < FD_COUNT)
				fds[taken++] = fd;
			else
				close(fd);
		}
	}
	if (n != 4) {
		if (n >= 0)
			errno = ECONNRESET;
		return -1;
	}
	length = (uint32_t) head[0] << 24 | head[1] << 16 | head[2] << 8 | head[3];
	if (length >= size) {
		errno = EMSGSIZE;
		return -1;
	}
	if (read_all(s, reply, length))
		return -1;
	reply[length] = 0;
	return 0;
}

/* Ask sdeed for the job's instance. Its environment variables become the step's. */
static int ask_daemon(spank_t sp, uint32_t job)
{
	char text[128], value[TEXT], *line, *rest, *equals;
	char *reply = malloc(REPLY);
	int s = -1, result = -1;

	if (!reply)
		return fail("sdee");
	if ((s = connect_daemon()) < 0) {
		fail("sdeed does not answer on " SOCKET);
		goto out;
	}
	snprintf(text, sizeof text, "{\"op\":\"job-join\",\"job\":%u}", job);
	if (exchange(s, text, reply, REPLY)) {
		fail("sdeed gave no answer");
		goto out;
	}
	if (!strstr(reply, "\"ok\":true")) {
		if (!member(reply, "error", failure, sizeof failure) || !*failure)
			snprintf(failure, sizeof failure, "sdeed answered %.200s", reply);
		goto out;
	}
	if (fds[FD_PID] < 0 || !member(reply, "bounding", value, sizeof value)) {
		snprintf(failure, sizeof failure, "sdeed's answer lacks namespaces: %.200s", reply);
		goto out;
	}
	bounding = strtoull(value, NULL, 16);
	no_new_privs = member(reply, "no_new_privs", value, sizeof value) && *value == '1';
	if (member(reply, "environment", value, sizeof value))
		for (line = strtok_r(value, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
			if ((equals = strchr(line, '='))) {
				*equals = 0;
				spank_setenv(sp, line, equals + 1, 1);
			}
	own_pid_ns = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
	joined = 1;
	result = 0;
out:
	if (s >= 0)
		close(s);
	free(reply);
	return result;
}

/* The step names an environment that its job doesn't have. */
static int wants_another(spank_t sp)
{
	char name[256] = "", generation[32] = "", reference[300];

	if (!wanted)
		return 0;
	spank_getenv(sp, "SDEE_ENVIRONMENT", name, sizeof name);
	spank_getenv(sp, "SDEE_GENERATION", generation, sizeof generation);
	snprintf(reference, sizeof reference, "%s@%s", name, generation);
	if (!strcmp(wanted, name) || !strcmp(wanted, reference))
		return 0;
	snprintf(failure, sizeof failure, "the step wants %.200s, but its job has %s", wanted, reference);
	return 1;
}

/*
 * Slurmd (22.05) forgets credentials every other second only: a job that is requeued and starts
 * again on the same node gets no Prolog if that was a moment ago. So a step of such a job does
 * what Prolog does, if no other step has.
 */
static void make_up_for_prolog(spank_t sp, uint32_t job)
{
	char *argv[] = {(char *) python, "-I", "-m", "sdee_launch.slurm.hook", "prolog", NULL};
	static char value[TOLD_TEXT];
	char *variables[16], from[64], node[HOST_NAME_MAX + 1] = "", path[64];
	int n = 0, lock = open("/run/sdee", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct stat status;
	uid_t uid = 0;
	pid_t pid;

	snprintf(path, sizeof path, JOBS "/%u", job);
	/* As root nothing is run that a working directory might have. */
	if (*python != '/' || lock < 0 || flock(lock, LOCK_EX) || !lstat(path, &status) ||
	    spank_get_item(sp, S_JOB_UID, &uid) != ESPANK_SUCCESS)
		goto out;
	for (size_t i = 0; i < NAMES; i++) {
		snprintf(from, sizeof from, TOLD "%s", names[i]);
		if (spank_getenv(sp, from, value, sizeof value) == ESPANK_SUCCESS &&
		    asprintf(&variables[n], "SPANK_SDEE_%s=%s", names[i], value) > 0)
			n++;
	}
	spank_getenv(sp, "SLURMD_NODENAME", node, sizeof node);
	if (!*node)
		gethostname(node, sizeof node - 1);
	if (asprintf(&variables[n], "SLURMD_NODENAME=%s", node) > 0)
		n++;
	if (asprintf(&variables[n], "SLURM_JOB_ID=%u", job) > 0)
		n++;
	if (asprintf(&variables[n], "SLURM_JOB_UID=%u", uid) > 0)
		n++;
	variables[n] = NULL;
	if (!(pid = fork())) {
		execve(python, argv, variables);
		_exit(127);
	}
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	while (n)
		free(variables[--n]);
out:
	if (lock >= 0)
		close(lock);
}

/* Whether the controller has requeued the job; slurmstepd isn't told yet. */
static int requeued(uint32_t job)
{
	job_info_msg_t *message = NULL;
	int found = 0;

	if (slurm_load_job(&message, job, SHOW_DETAIL) || !message)
		return 0;
	for (uint32_t i = 0; i < message->record_count; i++)
		if (message->job_array[i].job_id == job && message->job_array[i].restart_cnt)
			found = 1;
	slurm_free_job_info_msg(message);
	return found;
}

int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	uint32_t job = 0, step = 0;
	char path[64], reference[256] = "", here[PATH_MAX];
	struct stat status;

	arguments(ac, av);
	if (spank_context() == S_CTX_LOCAL || spank_context() == S_CTX_ALLOCATOR) {
		if (choose(sp))
			return -1;
		/* Here for all components of a heterogeneous job; name_directory() knows of --chdir. */
		if (submitted && spank_context() == S_CTX_LOCAL && getcwd(here, sizeof here))
			setenv(DIRECTORY, here, 1);
		return 0;
	}
	if (spank_context() != S_CTX_REMOTE)
		return 0;
	if (spank_get_item(sp, S_JOB_ID, &job) != ESPANK_SUCCESS ||
	    spank_get_item(sp, S_JOB_STEPID, &step) != ESPANK_SUCCESS)
		return 0;
	if (step == SLURM_EXTERN_CONT || (wanted && !strcmp(wanted, "no")))
		return 0;
	snprintf(path, sizeof path, JOBS "/%u", job);
	if (spank_getenv(sp, "SDEE_JOB_REF", reference, sizeof reference) != ESPANK_SUCCESS)
		spank_getenv(sp, TOLD "REF", reference, sizeof reference);
	if (*reference && lstat(path, &status) && requeued(job))
		make_up_for_prolog(sp, job);
	if (lstat(path, &status)) {
		if (*reference)
			snprintf(failure, sizeof failure,
				 "the job wants %s, but no Prolog of SDEE ran for it on this node "
				 "since it was booted (sdee install --slurm says what slurm.conf needs)", reference);
		return 0;
	}
	/* Failures are said later: now the job's output isn't there yet. */
	if (step == SLURM_BATCH_SCRIPT && noted(job, failure, sizeof failure))
		return 0;
	if (!ask_daemon(sp, job) && wants_another(sp))
		joined = 0;
	return 0;
}

/* Effective CAP_SYS_ADMIN for this thread: user_init is called with the user's effective ids. */
static int raise_admin(int up)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];

	if (syscall(SYS_capget, &head, data))
		return -1;
	if (up)
		data[0].effective |= 1u << CAP_SYS_ADMIN;
	else
		data[0].effective &= ~(1u << CAP_SYS_ADMIN);
	return syscall(SYS_capset, &head, data);
}

/* Children are born in the instance. A dead one can't have any: see that before Slurm tries. */
static int enter_pid_namespace(void)
{
	int status;

	if (own_pid_ns < 0 || raise_admin(1))
		return fail("capabilities");
	if (setns(fds[FD_PID], CLONE_NEWPID))
		return fail("the instance's PID namespace");
	pid_t pid = fork();
	if (!pid)
		_exit(0);
	if (pid < 0) {
		setns(own_pid_ns, CLONE_NEWPID);
		return fail("the instance of the environment has ended");
	}
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return 0;
}

int slurm_spank_user_init(spank_t sp, int ac, char **av)
{
	(void) sp;
	(void) ac;
	(void) av;
	if (joined && enter_pid_namespace())
		joined = 0;
	/*
	 * Failures wait for task_init: a batch step that failed here would drain the node, and of
	 * another one srun (22.05) would say so and end with 0.
	 */
	return 0;
}

int slurm_spank_task_post_fork(spank_t sp, int ac, char **av)
{
	(void) sp;
	(void) ac;
	(void) av;
	if (joined && own_pid_ns >= 0) {
		setns(own_pid_ns, CLONE_NEWPID);
		close(own_pid_ns);
		own_pid_ns = -1;
	}
	return 0;
}

/* Keep the capabilities that the daemon says: joining gave all of them. */
static int drop_capabilities(void)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];

	for (int cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
		if (!(bounding >> cap & 1) && prctl(PR_CAPBSET_DROP, cap))
			return -1;
	memset(data, 0, sizeof data);
	data[0].effective = data[0].permitted = (uint32_t) bounding;
	data[1].effective = data[1].permitted = (uint32_t) (bounding >> 32);
	return syscall(SYS_capset, &head, data);
}

/* The daemon's filter, compiled in Python: an array of struct sock_filter in a memfd. */
static int set_filter(void)
{
	static struct sock_filter code[BPF_MAXINSNS];
	ssize_t size;

	if (fds[FD_SECCOMP] < 0)
		return 0;
	size = pread(fds[FD_SECCOMP], code, sizeof code, 0);
	if (size <= 0)
		return -1;
	struct sock_fprog program = {size / sizeof code[0], code};
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* A directory of the host that the program inherits would be a way out of the instance. */
static int keep_no_directories(void)
{
	DIR *list = opendir("/proc/self/fd");
	struct dirent *entry;
	struct stat status;

	if (!list)
		return -1;
	while ((entry = readdir(list))) {
		int fd = atoi(entry->d_name);
		if (fd > 2 && !fstat(fd, &status) && S_ISDIR(status.st_mode))
			fcntl(fd, F_SETFD, FD_CLOEXEC);
	}
	closedir(list);
	return 0;
}

int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	char directory[PATH_MAX], from[PATH_MAX], value[32];

	(void) ac;
	(void) av;
	if (*failure) {
		slurm_error("sdee: %s", failure);
		return -1;
	}
	if (!joined)
		return 0;
	/* A rank of srun --mpi=pmix meets slurmstepd, on the host: see identity.py. */
	if (spank_getenv(sp, "PMIX_NAMESPACE", from, sizeof from) == ESPANK_SUCCESS &&
	    spank_getenv(sp, "PMIX_MCA_psec", value, sizeof value) == ESPANK_SUCCESS &&
	    !strcmp(value, "native"))
		spank_unsetenv(sp, "PMIX_MCA_psec");
	if (!getcwd(directory, sizeof directory))
		strcpy(directory, "/");
	if (*work_dir)
		strcpy(from, work_dir);
	else if (spank_getenv(sp, DIRECTORY, from, sizeof from) != ESPANK_SUCCESS)
		*from = 0;
	spank_unsetenv(sp, DIRECTORY);
	/* A directory that only the environment has: slurmstepd went to /tmp in its place. */
	if (!strcmp(directory, "/tmp") && *from == '/' && access(from, X_OK))
		strcpy(directory, from);
	if (keep_no_directories())
		fail("/proc/self/fd");
	else if (setns(fds[FD_USER], CLONE_NEWUSER))
		fail("the instance's user namespace");
	else if (setns(fds[FD_MOUNT], CLONE_NEWNS))
		fail("the instance's mount namespace");
	else if (setresgid(0, 0, 0) || setresuid(0, 0, 0))
		fail("ids of the instance");
	else if (chdir(directory) && (slurm_error("sdee: %s: %m: going to /tmp instead", directory), chdir("/tmp")))
		fail("/tmp");
	else if (no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		fail("no_new_privs");
	else if (set_filter()) /* while CAP_SYS_ADMIN is there */
		fail("seccomp");
	else if (drop_capabilities())
		fail("capabilities");
	if (*failure) {
		slurm_error("sdee: %s", failure);
		return -1;
	}
	return 0;
}
