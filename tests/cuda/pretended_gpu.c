/* Runs kernels that were translated to C, block after block, thread after thread.

   A thread is a set of registers and a place to go on. Each runs until it waits for others; when all of a warp or of a
   block have come to the same place, they go on. So what no GPU promises does not happen to work here: a warp's lanes do
   not run in step, and threads take turns in an order that is reversed after every barrier. Shared memory begins as
   numbers that are none. Counted as trouble: an access outside the memory that was given, or not aligned to its size;
   threads of a block, or lanes of a warp, that wait for each other at different places. */
#include "pretended_gpu.h"
#include "pretended_driver.h"
#include <stdlib.h>

#define LANES 32
#define MOST 1024

static _Thread_local char waste[16];

static void complain(const Thread *thread, const char *what, uint64_t address, unsigned bytes)
{
    trouble("thread (%u, %u, %u) of block (%u, %u, %u) of %.80s: %u bytes at %llx %s", thread->tid[0], thread->tid[1],
            thread->tid[2], thread->ctaid[0], thread->ctaid[1], thread->ctaid[2], thread->kernel, bytes,
            (unsigned long long)address, what);
}

char *global_at(Thread *thread, uint64_t address, unsigned bytes)
{
    if (address % bytes) complain(thread, "are not aligned", address, bytes);
    else if (!is_given((char *)address, bytes)) complain(thread, "lie outside of what was given", address, bytes);
    else return (char *)address;
    return waste;
}

char *shared_at(Thread *thread, uint64_t address, unsigned bytes)
{
    if (address % bytes) complain(thread, "of shared memory are not aligned", address, bytes);
    else if (address + bytes > thread->shared_bytes) complain(thread, "lie outside of shared memory", address, bytes);
    else return thread->shared + address;
    return waste;
}

/* Whether all have ended, or wait for the same reason at the same place. */
static int together(const Thread *threads, int count)
{
    for (int i = 1; i < count; i++)
        if (threads[i].stopped != threads->stopped || (threads->stopped != ENDED && threads[i].at != threads->at)) return 0;
    return 1;
}

/* Lanes that wait for each other exchange what they have and go on. 0: they will not meet. */
static int exchange(Thread *lanes, int count)
{
    if (count < LANES || !together(lanes, count)) return 0;
    for (int l = 0; l < count; l++) {
        int other = l ^ lanes[l].apart;
        if (lanes[l].members != UINT32_MAX || lanes[l].bounds != LANES - 1 || other >= LANES) return 0;
        lanes[l].taken = lanes[other].given;
    }
    return 1;
}

static void run_block(Program *program, Thread *threads, int count, char *registers, size_t bytes)
{
    for (int phase = 0;; phase++) {
        int warps = (count + LANES - 1) / LANES;
        for (int w = 0; w < warps; w++) {
            int first = LANES * (phase % 2 ? warps - 1 - w : w), lanes = count - first < LANES ? count - first : LANES;
            int waiting;
            do {
                waiting = 0;
                for (int l = 0; l < lanes; l++) {
                    Thread *thread = threads + first + (phase % 2 ? lanes - 1 - l : l);
                    thread->stopped = program(thread, registers + bytes * (thread - threads));
                    waiting |= thread->stopped == WARP || thread->stopped == EXCHANGE;
                }
                if (waiting && !exchange(threads + first, lanes)) {
                    trouble("lanes of %.80s wait for each other at different places", threads->kernel);
                    return;
                }
            } while (waiting);
        }
        if (!together(threads, count)) {
            trouble("threads of %.80s wait for each other at different places", threads->kernel);
            return;
        }
        if (threads->stopped == ENDED) return;
    }
}

void run_grid(Program *program, size_t bytes, uint32_t shared_bytes, const unsigned grid[3], const unsigned block[3],
              const uint64_t *parameters, const char *kernel)
{
    int count = block[0] * block[1] * block[2];
    long blocks = (long)grid[0] * grid[1] * grid[2];
#pragma omp parallel
    {
        Thread *threads = calloc(MOST, sizeof *threads);
        char *registers = calloc(count, bytes), *shared = aligned_alloc(16, shared_bytes + 16 - shared_bytes % 16);
#pragma omp for schedule(dynamic)
        for (long number = 0; number < blocks; number++) {
            memset(shared, 0xff, shared_bytes);
            for (int i = 0; i < count; i++)
                threads[i] = (Thread){
                    .tid = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]},
                    .ctaid = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]},
                    .ntid = {block[0], block[1], block[2]},
                    .nctaid = {grid[0], grid[1], grid[2]},
                    .parameters = parameters,
                    .shared = shared,
                    .shared_bytes = shared_bytes,
                    .kernel = kernel,
                };
            run_block(program, threads, count, registers, bytes);
        }
        free(threads);
        free(registers);
        free(shared);
    }
}
