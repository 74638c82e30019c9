/* threads.h: the compute pool: a fixed set of threads that do one piece of work together, in phases.
 *
 * The caller is thread 0. Waiting spins for some microseconds, since phases follow one another closely, then sleeps on
 * a futex, so that a thread stalled on storage costs nothing.
 */
#ifndef STI_THREADS_H
#define STI_THREADS_H

#include "base.h"

#include <pthread.h>
#include <sched.h>

/* ------------------------------------------------------------------ CPUs */

enum { CPU_NUMBERS = 4096 }; /* every CPU's number is below (sti_runtime/messages.py) */
/* A set of CPUs; one cpu_set_t ends at CPU_SETSIZE. */
typedef struct { cpu_set_t parts[CPU_NUMBERS / CPU_SETSIZE]; } CpuMask;

/* Numbers of the CPUs the calling thread may run on, ascending: cpus [cap], NULL: only counted. 0: not known. */
int cpus_allowed(int64_t *cpus, int cap);
/* Let the calling thread run on these alone. Returns 0 or an errno. */
int cpus_pin(const int32_t *cpus, int cpu_count);

/* ------------------------------------------------------------------ one thread */

enum { SMALL_STACK_BYTES = 64 << 10, WORK_STACK_BYTES = 256 << 10 };

/* Start a thread; it is to be joined or detached. It gets no signals: they are the business of the one that starts it.
 * Its stack is as small as said, since what a C library gives unasked (musl's limit: 8 MB) counts against a limit on
 * the address space. Returns 0 or an errno. */
int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *argument), void *argument);

/* ------------------------------------------------------------------ the pool */

typedef struct Pool Pool;

/* cpus [cpu_count]: thread i is pinned to cpus[i mod cpu_count]; NULL: none is. The caller only between pool_pin_caller
 * and pool_unpin_caller: threads and processes it starts inherit its CPUs. Errors: STI_RESOURCE, STI_INPUT. */
StiCode pool_open(int threads, const int32_t *cpus, int cpu_count, Pool **pool, StiError *error);
void pool_close(Pool *pool); /* NULL is allowed */
void pool_pin_caller(Pool *pool);
void pool_unpin_caller(Pool *pool);
int pool_threads(const Pool *pool);

/* All threads call work(state, thread); returns when the last is done. */
void pool_run(Pool *pool, void (*work)(void *state, int thread), void *state);

/* Inside work. Units of the current phase are handed out from 0 in order; a barrier ends the phase. */
int32_t pool_next(Pool *pool);
void pool_barrier(Pool *pool);

#endif
