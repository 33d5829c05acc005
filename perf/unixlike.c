/* UnixBench's lines, measured the same way by drivers of our own: unixlike LINE SECONDS COPIES DIRECTORY.
 *
 * Each line repeats its operation for SECONDS in so many copies at once and prints how often all of
 * them together could, per second (file copy, in DIRECTORY: KiB per second). The time is cut into
 * parts, and the best of a copy's parts counts: a disturbance by others only ever slows. The first two are
 * synthetic mixes of the kind that Dhrystone (strings, records, integers) and Whetstone (floating
 * point) made popular; their counts mean nothing outside this program's own ratios.
 *
 * Each copy is pinned to a CPU: where the scheduler happens to place the two ends of a pipe makes a
 * difference of ten times, which would hide what is looked for.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PARTS = 10 };

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
    /* Aligned and static: where they happen to lie on a stack makes a difference. */
    static _Alignas(64) struct record a, b;
    static _Alignas(64) char left[32], right[32];
    static const char *const volatile words[] = {"SOME STRING, NUMBER 1", "SOME STRING, NUMBER 2"};
    unsigned long loops = 0;
    volatile int sink = 0;
    double start = now();
    a.next = &b;
    while (now() - start < seconds)
        for (int i = 0; i < 2000; i++, loops++) {
            strcpy(left, words[i & 1]);
            strcpy(right, words[i % 3 == 0]);
            left[20] += i & 7;
            b = a;
            b.kind = strcmp(left, right) > 0;
            b.number = a.number + i % 11 * 3;
            memcpy(b.text, left, sizeof b.text);
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
        for (int i = 0; i < 2000; i++, loops++) {
            x = (x + y + sin(x) * cos(y)) * 0.499975;
            y = sqrt(exp(log(fabs(x) + 1.0) / 2.0));
            sink = x + y;
        }
    (void)sink;
    return loops / (now() - start);
}

static double copy(double seconds, const char *directory, int number, size_t block)
{
    char *buffer = malloc(block), path[4096], other[4096];
    const size_t blocks = 2000;
    memset(buffer, 'x', block);
    snprintf(path, sizeof path, "%s/unixlike-%d-%d", directory, (int)getpid(), number);
    snprintf(other, sizeof other, "%s/unixlike-%d-%d.copy", directory, (int)getpid(), number);
    int from = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), to = open(other, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (from < 0 || to < 0) {
        perror(path);
        exit(1);
    }
    for (size_t i = 0; i < blocks; i++)
        if (write(from, buffer, block) != (ssize_t)block)
            exit(1);
    double start = now(), before = start, rate = 0;
    /* The first pass makes the copy, and isn't counted: what is measured is copying, not allocating. */
    for (int pass = 0; pass < 2 || before - start < seconds; pass++) {
        lseek(from, 0, SEEK_SET);
        lseek(to, 0, SEEK_SET);
        for (size_t i = 0; i < blocks; i++)
            if (read(from, buffer, block) != (ssize_t)block || write(to, buffer, block) != (ssize_t)block)
                exit(1);
        double after = now(), own = blocks * block / 1024.0 / (after - before);
        if (pass && own > rate)
            rate = own;
        before = after;
    }
    unlink(path);
    unlink(other);
    return rate;
}

static double pipes(double seconds)
{
    int ends[2];
    /* At a fixed distance from where the pipe's page begins: on a stack it would be anywhere. */
    static _Alignas(4096) char page[4096];
    char *buffer = page + 2048;
    unsigned long loops = 0;
    if (pipe(ends))
        exit(1);
    double start = now();
    while (now() - start < seconds)
        for (int i = 0; i < 200; i++, loops++)
            if (write(ends[1], buffer, 512) < 0 || read(ends[0], buffer, 512) < 0)
                exit(1);
    close(ends[0]);
    close(ends[1]);
    return loops / (now() - start);
}

static double switches(double seconds)
{
    int there[2], back[2];
    static _Alignas(4096) unsigned page[1024];
    unsigned *number = page + 512;
    unsigned long loops = 0;
    if (pipe(there) || pipe(back))
        exit(1);
    pid_t child = fork();
    if (!child) {
        close(there[1]);
        while (read(there[0], number, sizeof *number) == sizeof *number)
            if (write(back[1], number, sizeof *number) < 0)
                break;
        _exit(0);
    }
    double start = now();
    while (now() - start < seconds)
        for (int i = 0; i < 20; i++, loops++)
            if (write(there[1], number, sizeof *number) < 0 || read(back[0], number, sizeof *number) < 0)
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

/* A chain of execl: the program replaces itself until the time of each part is over. */
static double execs(char *self, double seconds, int parts, double start, unsigned long loops, double best)
{
    char length[32], left[32], begun[32], count[32], record[32];
    if (now() - start >= seconds) {
        double rate = loops / (now() - start);
        best = rate > best ? rate : best;
        start = now();
        loops = 0;
        if (!--parts)
            return best;
    }
    snprintf(length, sizeof length, "%.9f", seconds);
    snprintf(left, sizeof left, "%d", parts);
    snprintf(begun, sizeof begun, "%.9f", start);
    snprintf(count, sizeof count, "%lu", loops + 1);
    snprintf(record, sizeof record, "%.6f", best);
    execl(self, self, "execl-chain", length, left, begun, count, record, NULL);
    exit(1);
}

/* Pin the process to the CPU of copy `number`, the last one first: interrupts prefer the first. */
static void pin(int number)
{
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    int left = CPU_COUNT(&allowed) - 1 - number % CPU_COUNT(&allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && !left--) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof one, &one);
        }
}

static double rate_of(const char *line, double seconds, char *self, const char *directory, int number)
{
    char *script[] = {"/bin/sh", "-c", "sort </etc/passwd | grep -c root >/dev/null; test -d /", NULL};
    if (!strncmp(line, "copy", 4))
        return copy(seconds, directory, number, strtoul(line + 4, NULL, 10));
    if (!strcmp(line, "execl"))
        return execs(self, seconds / 5, 5, now(), 0, 0);
    double best = -1;
    for (int part = 0; part < PARTS; part++) {
        double length = seconds / PARTS, rate = -1;
        if (!strcmp(line, "integers"))
            rate = integers(length);
        else if (!strcmp(line, "floats"))
            rate = floats(length);
        else if (!strcmp(line, "pipe"))
            rate = pipes(length);
        else if (!strcmp(line, "switch"))
            rate = switches(length);
        else if (!strcmp(line, "process"))
            rate = processes(length, NULL);
        else if (!strcmp(line, "script"))
            rate = processes(length, script);
        best = rate > best ? rate : best;
    }
    return best;
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: unixlike LINE SECONDS COPIES DIRECTORY\n");
        return 2;
    }
    double seconds = atof(argv[2]), sum = 0, rate;
    if (argc > 6 && !strcmp(argv[1], "execl-chain")) {
        printf("%.3f\n", execs(argv[0], seconds, atoi(argv[3]), atof(argv[4]), strtoul(argv[5], NULL, 10), atof(argv[6])));
        return 0;
    }
    int copies = atoi(argv[3]), gate[2], out[2], status, heard = 0;
    if (pipe2(gate, O_CLOEXEC) || pipe2(out, O_CLOEXEC))
        return 1;
    for (int number = 0; number < copies; number++) {
        pid_t child = fork();
        if (child < 0)
            return 1;
        if (child)
            continue;
        char byte;
        pin(number);
        dup2(out[1], 1);
        close(gate[1]);
        if (read(gate[0], &byte, 1)) /* until all copies are there */
            exit(1);
        rate = rate_of(argv[1], seconds, argv[0], argv[4], number);
        if (rate < 0) {
            fprintf(stderr, "unixlike: no line %s\n", argv[1]);
            exit(2);
        }
        printf("%.3f\n", rate);
        exit(0);
    }
    close(gate[1]);
    close(out[1]);
    FILE *rates = fdopen(out[0], "r");
    for (; rates && fscanf(rates, "%lf", &rate) == 1; heard++)
        sum += rate;
    while (wait(&status) > 0)
        if (status)
            return 1;
    if (heard != copies)
        return 1;
    printf("%.3f\n", sum);
    return 0;
}
