/* UnixBench's lines, measured the same way by drivers of our own: unixlike LINE SECONDS [FILE].
 *
 * Each line repeats its operation for SECONDS and prints how often it could, per second (file copy:
 * KiB per second). The first two are synthetic mixes of the kind that Dhrystone (strings, records,
 * integers) and Whetstone (floating point) made popular; their counts mean nothing outside this
 * program's own ratios.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

struct record {
    struct record *next;
    int kind, number;
    char text[31];
};

static double integers(double seconds)
{
    static struct record a, b;
    char left[31], right[31];
    unsigned long loops = 0;
    volatile int sink = 0;
    double start = now();
    a.next = &b;
    while (now() - start < seconds)
        for (int i = 0; i < 10000; i++, loops++) {
            snprintf(left, sizeof left, "SOME STRING, NUMBER %d", i & 7);
            strcpy(right, "SOME STRING, NUMBER 3");
            b = a;
            b.kind = strcmp(left, right) > 0;
            b.number = a.number + i % 11 * 3;
            memcpy(b.text, left, sizeof left);
            sink += a.next->number + b.kind;
        }
    return loops / (now() - start);
}

static double floats(double seconds)
{
    double x = 0.5, y = 0.25, start = now();
    unsigned long loops = 0;
    volatile double sink;
    while (now() - start < seconds)
        for (int i = 0; i < 10000; i++, loops++) {
            x = (x + y + sin(x) * cos(y)) * 0.499975;
            y = sqrt(exp(log(fabs(x) + 1.0) / 2.0));
            sink = x + y;
        }
    (void)sink;
    return loops / (now() - start);
}

static double copy(double seconds, const char *path, size_t block)
{
    char *buffer = malloc(block), other[4096];
    const size_t blocks = 2000;
    unsigned long copied = 0;
    memset(buffer, 'x', block);
    snprintf(other, sizeof other, "%s.copy", path);
    int from = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), to = open(other, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (from < 0 || to < 0) {
        perror(path);
        exit(1);
    }
    for (size_t i = 0; i < blocks; i++)
        if (write(from, buffer, block) != (ssize_t)block)
            exit(1);
    double start = now();
    while (now() - start < seconds) {
        lseek(from, 0, SEEK_SET);
        lseek(to, 0, SEEK_SET);
        for (size_t i = 0; i < blocks; i++, copied += block)
            if (read(from, buffer, block) != (ssize_t)block || write(to, buffer, block) != (ssize_t)block)
                exit(1);
    }
    double rate = copied / 1024.0 / (now() - start);
    unlink(path);
    unlink(other);
    return rate;
}

static double pipes(double seconds)
{
    int ends[2];
    char buffer[512] = {0};
    unsigned long loops = 0;
    if (pipe(ends))
        exit(1);
    double start = now();
    while (now() - start < seconds)
        for (int i = 0; i < 1000; i++, loops++)
            if (write(ends[1], buffer, sizeof buffer) < 0 || read(ends[0], buffer, sizeof buffer) < 0)
                exit(1);
    return loops / (now() - start);
}

static double switches(double seconds)
{
    int there[2], back[2];
    unsigned number = 0;
    unsigned long loops = 0;
    if (pipe(there) || pipe(back))
        exit(1);
    pid_t child = fork();
    if (!child) {
        close(there[1]);
        while (read(there[0], &number, sizeof number) == sizeof number)
            if (write(back[1], &number, sizeof number) < 0)
                break;
        _exit(0);
    }
    double start = now();
    while (now() - start < seconds)
        for (int i = 0; i < 100; i++, loops++)
            if (write(there[1], &number, sizeof number) < 0 || read(back[0], &number, sizeof number) < 0)
                exit(1);
    double rate = loops / (now() - start);
    close(there[1]);
    waitpid(child, NULL, 0);
    return rate;
}

static double processes(double seconds, char *const *command)
{
    unsigned long loops = 0;
    double start = now();
    while (now() - start < seconds) {
        int status;
        pid_t child = fork();
        if (!child) {
            if (command)
                execv(command[0], command);
            _exit(command != NULL);
        }
        if (waitpid(child, &status, 0) < 0 || status)
            exit(1);
        loops++;
    }
    return loops / (now() - start);
}

/* A chain of execl: the program replaces itself until the time is over. */
static double execs(double seconds, char *self, const char *sofar)
{
    static char count[32], until[64];
    double end = sofar ? atof(getenv("UNIXLIKE_END")) : now() + seconds;
    unsigned long loops = sofar ? strtoul(sofar, NULL, 10) : 0;
    if (now() >= end)
        return loops / seconds;
    snprintf(count, sizeof count, "%lu", loops + 1);
    snprintf(until, sizeof until, "%.9f", end);
    setenv("UNIXLIKE_END", until, 1);
    char text[32];
    snprintf(text, sizeof text, "%f", seconds);
    execl(self, self, "execl", text, count, NULL);
    exit(1);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: unixlike LINE SECONDS [FILE]\n");
        return 2;
    }
    const char *line = argv[1], *path = argc > 3 ? argv[3] : NULL;
    double seconds = atof(argv[2]), rate;
    char *script[] = {"/bin/sh", "-c", "sort </etc/passwd | grep -c root >/dev/null; test -d /", NULL};
    if (!strcmp(line, "integers"))
        rate = integers(seconds);
    else if (!strcmp(line, "floats"))
        rate = floats(seconds);
    else if (!strncmp(line, "copy", 4) && path)
        rate = copy(seconds, path, strtoul(line + 4, NULL, 10));
    else if (!strcmp(line, "pipe"))
        rate = pipes(seconds);
    else if (!strcmp(line, "switch"))
        rate = switches(seconds);
    else if (!strcmp(line, "process"))
        rate = processes(seconds, NULL);
    else if (!strcmp(line, "script"))
        rate = processes(seconds, script);
    else if (!strcmp(line, "execl"))
        rate = execs(seconds, argv[0], path);
    else {
        fprintf(stderr, "unixlike: no line %s\n", line);
        return 2;
    }
    printf("%.3f\n", rate);
    return 0;
}
