#include "threads.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SPIN_NS = 50000, SPINS_PER_LOOK = 64, CACHE_LINE = 64 };

typedef struct {
  Pool *pool;
  pthread_t thread;
  int index; /* 1 … threads − 1 */
} Worker;

struct Pool {
  _Alignas(CACHE_LINE) _Atomic int32_t next;      /* unit to hand out */
  _Alignas(CACHE_LINE) _Atomic int32_t arrived;   /* threads at the barrier */
  _Alignas(CACHE_LINE) _Atomic uint32_t phase;    /* futex: barriers passed so far */
  _Atomic int32_t asleep;                         /* threads in futex_wait on phase or run */
  _Alignas(CACHE_LINE) _Atomic uint32_t run;      /* futex: pool_run calls so far */
  void (*work)(void *state, int thread);          /* NULL: the workers end */
  void *state;
  int threads, started;
  const int32_t *cpus; /* [cpu_count] */
  int cpu_count;
  bool caller_pinned;
  CpuMask caller_cpus;   /* before it was pinned */
  Worker workers[];      /* [threads − 1] */
};

/* ------------------------------------------------------------------ CPUs */

static int mask_of(const int32_t *cpus, int cpu_count, CpuMask *mask) {
  CPU_ZERO_S(sizeof *mask, mask->parts);
  for (int i = 0; i < cpu_count; i++) {
    if (cpus[i] < 0 || cpus[i] >= CPU_NUMBERS) return EINVAL;
    CPU_SET_S((size_t)cpus[i], sizeof *mask, mask->parts);
  }
  return 0;
}

int cpus_allowed(int64_t *cpus, int cap) {
  CpuMask mask;
  int count = 0;
  CPU_ZERO_S(sizeof mask, mask.parts);
  if (sched_getaffinity(0, sizeof mask, mask.parts) != 0) return 0;
  if (cpus == NULL) return CPU_COUNT_S(sizeof mask, mask.parts);
  for (int64_t cpu = 0; cpu < CPU_NUMBERS && count < cap; cpu++)
    if (CPU_ISSET_S((size_t)cpu, sizeof mask, mask.parts)) cpus[count++] = cpu;
  return count;
}

int cpus_pin(const int32_t *cpus, int cpu_count) {
  CpuMask mask;
  int problem = mask_of(cpus, cpu_count, &mask);
  if (problem) return problem;
  return sched_setaffinity(0, sizeof mask, mask.parts) == 0 ? 0 : errno;
}

/* ------------------------------------------------------------------ one thread */

int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *argument), void *argument) {
  pthread_attr_t attributes;
  sigset_t all, previous;
  sigfillset(&all);
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, stack_bytes);
  pthread_sigmask(SIG_SETMASK, &all, &previous); /* inherited */
  const int problem = pthread_create(thread, &attributes, run, argument);
  pthread_sigmask(SIG_SETMASK, &previous, NULL);
  pthread_attr_destroy(&attributes);
  return problem;
}

/* ------------------------------------------------------------------ waiting */

static void relax(void) {
#if defined __x86_64__
  __builtin_ia32_pause();
#elif defined __aarch64__ || defined __arm__
  __asm__ volatile("yield");
#endif
}

/* Returns when *word is no longer `seen`. */
static void wait_for_change(Pool *pool, _Atomic uint32_t *word, uint32_t seen) {
  int64_t started_ns = monotonic_ns();
  do {
    for (int i = 0; i < SPINS_PER_LOOK; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
      relax();
    }
  } while (monotonic_ns() - started_ns < SPIN_NS);
  atomic_fetch_add(&pool->asleep, 1);
  while (atomic_load(word) == seen) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
  atomic_fetch_sub(&pool->asleep, 1);
}

static void change(Pool *pool, _Atomic uint32_t *word) {
  atomic_fetch_add(word, 1);
  if (atomic_load(&pool->asleep)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* ------------------------------------------------------------------ work */

int32_t pool_next(Pool *pool) { return atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed); }

void pool_barrier(Pool *pool) {
  uint32_t phase = atomic_load_explicit(&pool->phase, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 < pool->threads) {
    wait_for_change(pool, &pool->phase, phase);
    return;
  }
  atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
  atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
  change(pool, &pool->phase);
}

void pool_run(Pool *pool, void (*work)(void *state, int thread), void *state) {
  pool->work = work;
  pool->state = state;
  change(pool, &pool->run);
  work(state, 0);
  pool_barrier(pool);
}

static void *worker_main(void *argument) {
  Worker *worker = argument;
  Pool *pool = worker->pool;
  for (uint32_t seen = 0;; seen++) {
    wait_for_change(pool, &pool->run, seen);
    if (!pool->work) return NULL;
    pool->work(pool->state, worker->index);
    pool_barrier(pool);
  }
}

/* ------------------------------------------------------------------ life */

void pool_pin_caller(Pool *pool) {
  if (!pool->cpu_count || pool->caller_pinned) return;
  pool->caller_pinned = !sched_getaffinity(0, sizeof pool->caller_cpus, pool->caller_cpus.parts) &&
                        !cpus_pin(&pool->cpus[0], 1);
}

void pool_unpin_caller(Pool *pool) {
  if (pool->caller_pinned) sched_setaffinity(0, sizeof pool->caller_cpus, pool->caller_cpus.parts);
  pool->caller_pinned = false;
}

/* Pins the workers, and proves that the caller can be. */
static StiCode pin(Pool *pool, StiError *error) {
  if (!pool->cpu_count) return STI_OK;
  int problem = 0;
  for (int i = 0; !problem && i < pool->threads - 1; i++) {
    CpuMask mask;
    problem = mask_of(&pool->cpus[(i + 1) % pool->cpu_count], 1, &mask);
    if (!problem) problem = pthread_setaffinity_np(pool->workers[i].thread, sizeof mask, mask.parts);
  }
  if (!problem) pool_pin_caller(pool);
  bool pinned = pool->caller_pinned;
  pool_unpin_caller(pool);
  if (pinned) return STI_OK;
  return sti_fail(error, STI_INPUT, "Name CPUs that are there, online and allowed, or none.",
                  "The compute threads cannot be pinned to the CPUs asked for.");
}

StiCode pool_open(int threads, const int32_t *cpus, int cpu_count, Pool **result, StiError *error) {
  if (threads < 1) return sti_fail(error, STI_INPUT, "Give one or more.", "%d threads cannot compute.", threads);
  size_t bytes = sizeof(Pool) + (size_t)(threads - 1) * sizeof(Worker);
  Pool *pool = aligned_alloc(CACHE_LINE, (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
  if (!pool) return sti_out_of_memory(error);
  *pool = (Pool){.threads = threads, .cpus = cpus, .cpu_count = cpus ? cpu_count : 0};
  int failed = 0;
  while (!failed && pool->started < threads - 1) {
    Worker *worker = &pool->workers[pool->started];
    *worker = (Worker){.pool = pool, .index = pool->started + 1};
    failed = thread_start(&worker->thread, WORK_STACK_BYTES, worker_main, worker);
    if (!failed) pool->started++;
  }
  StiCode code = failed ? sti_fail_errno(error, STI_RESOURCE, failed, "Use fewer threads or free memory.",
                                         "Compute thread %d of %d cannot be started", pool->started + 2, threads)
                        : pin(pool, error);
  if (code != STI_OK) {
    pool_close(pool);
    return code;
  }
  *result = pool;
  return STI_OK;
}

void pool_close(Pool *pool) {
  if (!pool) return;
  pool->work = NULL;
  change(pool, &pool->run);
  for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
  pool_unpin_caller(pool);
  free(pool);
}

int pool_threads(const Pool *pool) { return pool->threads; }
