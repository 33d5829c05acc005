/* Small kernels of the kind that the NAS Parallel Benchmarks name: kernels ep|is|cg|mg... REPEATS.
 *
 * ep: pairs of Gaussian deviates, no communication. is: bucket sort of integers. cg: conjugate
 * gradient on a sparse matrix. mg: a 3-D stencil. Each rank of MPI (with -DUSE_MPI) works on its own
 * share and one reduction ends it. Each kernel named is run once for warmth, then REPEATS times, and
 * the seconds of the slowest rank in the best run are printed: a disturbance by others only ever
 * slows, and a run of a few milliseconds often escapes it. Alone, it is pinned to the last CPU that
 * it may use.
 */
#define _GNU_SOURCE
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef USE_MPI
#include <mpi.h>
#endif

static uint64_t state;

static double next(void)
{
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (double)(state >> 11) / 9007199254740992.0;
}

static double ep(void)
{
    double sum = 0;
    for (int i = 0; i < 250000; i++) {
        double x = 2 * next() - 1, y = 2 * next() - 1, t = x * x + y * y;
        if (t <= 1 && t > 0)
            sum += x * sqrt(-2 * log(t) / t);
    }
    return sum;
}

static double is(void)
{
    enum { N = 1 << 19, RANGE = 1 << 16 };
    static int keys[N], sorted[N], count[RANGE + 1];
    memset(count, 0, sizeof count);
    for (int i = 0; i < N; i++)
        keys[i] = next() * RANGE;
    for (int i = 0; i < N; i++)
        count[keys[i] + 1]++;
    for (int i = 0; i < RANGE; i++)
        count[i + 1] += count[i];
    for (int i = 0; i < N; i++)
        sorted[count[keys[i]]++] = keys[i];
    return sorted[N / 2];
}

static double cg(void)
{
    enum { N = 50000, PER_ROW = 9, STEPS = 4 };
    static int column[N][PER_ROW];
    static double value[N][PER_ROW], x[N], r[N], p[N], q[N];
    double rho = 0;
    for (int i = 0; i < N; i++) {
        for (int k = 0; k < PER_ROW; k++) {
            column[i][k] = next() * N;
            value[i][k] = k ? 0.01 : 4;
        }
        column[i][0] = i;
        x[i] = 0;
        r[i] = p[i] = 1;
        rho += 1;
    }
    for (int step = 0; step < STEPS; step++) {
        double pq = 0, old = rho;
        for (int i = 0; i < N; i++) {
            q[i] = 0;
            for (int k = 0; k < PER_ROW; k++)
                q[i] += value[i][k] * p[column[i][k]];
            pq += p[i] * q[i];
        }
        double alpha = rho / pq;
        rho = 0;
        for (int i = 0; i < N; i++) {
            x[i] += alpha * p[i];
            r[i] -= alpha * q[i];
            rho += r[i] * r[i];
        }
        for (int i = 0; i < N; i++)
            p[i] = r[i] + rho / old * p[i];
    }
    return x[N / 2];
}

static double mg(void)
{
    enum { N = 130 };
    static double a[N][N][N], b[N][N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            for (int k = 0; k < N; k++)
                a[i][j][k] = (i * j * k) % 7;
    for (int step = 0; step < 1; step++) {
        for (int i = 1; i < N - 1; i++)
            for (int j = 1; j < N - 1; j++)
                for (int k = 1; k < N - 1; k++)
                    b[i][j][k] = (a[i - 1][j][k] + a[i + 1][j][k] + a[i][j - 1][k] + a[i][j + 1][k] + a[i][j][k - 1] +
                                  a[i][j][k + 1]) / 6;
        memcpy(a, b, sizeof a);
    }
    return a[N / 2][N / 2][N / 2];
}

static double seconds_of(char kernel, double *sum)
{
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    *sum += kernel == 'e' ? ep() : kernel == 'i' ? is() : kernel == 'c' ? cg() : mg();
    clock_gettime(CLOCK_MONOTONIC, &end);
    return end.tv_sec - start.tv_sec + (end.tv_nsec - start.tv_nsec) * 1e-9;
}

#ifndef USE_MPI
static void pin(void)
{
    cpu_set_t allowed, one;
    int last = CPU_SETSIZE - 1;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    while (last > 0 && !CPU_ISSET(last, &allowed))
        last--;
    CPU_ZERO(&one);
    CPU_SET(last, &one);
    sched_setaffinity(0, sizeof one, &one);
}
#endif

int main(int argc, char **argv)
{
    int rank = 0;
#ifdef USE_MPI
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
#else
    pin();
#endif
    if (argc < 3) {
        fprintf(stderr, "usage: kernels ep|is|cg|mg... REPEATS\n");
        return 2;
    }
    double sum = 0;
    for (int i = 1; i < argc - 1; i++) {
        double best = 0;
        state = 12345 + rank;
        for (int repeat = 0; repeat <= atoi(argv[argc - 1]); repeat++) {
#ifdef USE_MPI
            MPI_Barrier(MPI_COMM_WORLD);
#endif
            double slowest = seconds_of(argv[i][0], &sum);
#ifdef USE_MPI
            double total, seconds = slowest;
            MPI_Reduce(&seconds, &slowest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
            MPI_Allreduce(&sum, &total, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
            sum = total;
#endif
            if (repeat == 1 || (repeat && slowest < best))
                best = slowest;
        }
        if (!rank)
            printf("%.6f\n", best);
    }
#ifdef USE_MPI
    MPI_Finalize();
#endif
    return sum == 0.12345; /* so that nothing is optimised away */
}
