/* io_side.c: reads issued in plan order by queue_depth threads. */
#include "io_side.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "threads.h"

enum {
  BORDER_BYTES = 1 << 20, /* a layer's reads begin when less than this is in flight of others */
  MERGED_VERSIONS = STI_MERGE_LIMIT_BYTES / STI_ALIGNMENT, /* most in one read */
  NICE = -10,
  SLICE_NS = 100000,
  SPIN_NS = 30000, /* about what falling asleep and being woken costs */
};

/* ------------------------------------------------------------------ one read */

static int64_t paced_read(const IoSide *side, const Storage *storage, int file, int64_t offset, struct iovec *parts,
                          int count, int64_t required, StiError *error, StiCode *code) {
  const int64_t start_ns = monotonic_ns();
  *code = storage_read(storage, file, offset, parts, count, required, error);
  if (*code == STI_OK && side->throttle.after_read != NULL)
    side->throttle.after_read(side->throttle.state, start_ns, required);
  return start_ns;
}

/* Read versions to where `loaded` says and check them. */
static StiCode read_versions(const IoSide *side, const Session *session, const Read *read, int64_t *start_ns,
                             StiError *error) {
  struct iovec parts[MERGED_VERSIONS];
  StiCode code;
  int count = 0;
  for (int32_t i = read->first; i < read->first + read->count; i++) {
    uint8_t *data = (uint8_t *)(uintptr_t)session->loaded[session->index[i]].data;
    const size_t length = (size_t)session->shards[session->index[i]].length;
    if (count > 0 && (uint8_t *)parts[count - 1].iov_base + parts[count - 1].iov_len == data)
      parts[count - 1].iov_len += length;
    else
      parts[count++] = (struct iovec){data, length};
  }
  *start_ns = paced_read(side, session->storage, read->file, read->offset, parts, count, read->length, error, &code);
  for (int32_t i = read->first; code == STI_OK && i < read->first + read->count; i++)
    code = engine_check_shard(side->engine, &session->loaded[session->index[i]], error);
  return code;
}

static StiCode read_rows(const IoSide *side, const Session *session, const PageRun *run, int64_t *start_ns,
                         StiError *error) {
  struct iovec part = {session->rows->buffer + run->start, (size_t)run->length};
  const int embeddings = session->storage->file_count - 1;
  StiCode code;
  *start_ns = paced_read(side, session->storage, embeddings, run->offset, &part, 1, run->required, error, &code);
  return code;
}

/* ------------------------------------------------------------------ issuing, under the lock */

static int32_t run_count(const Session *session) { return session->rows == NULL ? 0 : session->rows->run_count; }

static int32_t all_reads(const Session *session) { return run_count(session) + session->read_count; }

static bool may_issue(const IoSide *side) {
  const Session *session = side->session;
  if (session == NULL || session->stopped || session->next == all_reads(session)) return false;
  if (session->next < run_count(session)) return true;
  const Read *read = &session->reads[session->next - run_count(session)];
  const bool others = session->running > session->layers[read->layer].running;
  if (others && session->running_bytes >= BORDER_BYTES) return false;
  return read->placed || ring_fits(&side->working, read->length);
}

static bool is_over(const Session *session) {
  return session->running == 0 && (session->stopped || session->next == all_reads(session));
}

/* Count a read as in flight, or (sign −1) as over. */
static void count_running(Session *session, const PageRun *run, const Read *read, int32_t sign) {
  session->running += sign;
  session->running_bytes += sign * (read == NULL ? run->length : read->length);
  if (read != NULL) session->layers[read->layer].running += sign;
}

static void acquire(IoSide *side, Session *session, const Read *read) {
  if (read->placed) return;
  for (int32_t i = read->first; i < read->first + read->count; i++)
    session->loaded[session->index[i]].data = ring_acquire(&side->working, session->shards[session->index[i]].length);
  session->layers[read->layer].held_bytes += read->length;
}

static void fail(IoSide *side, Session *session, int32_t number, const StiError *error) {
  if (!atomic_load_explicit(&session->failed, memory_order_relaxed) || number < session->failed_read) {
    side->error = *error;
    session->failed_read = number;
  }
  session->stopped = true;
  atomic_store_explicit(&session->failed, true, memory_order_release);
  pthread_cond_signal(&side->ready);
}

/* Count *count down by `by`; wake the compute thread at 0. What was read is visible to whoever sees the new value. */
static void count_down(IoSide *side, _Atomic int32_t *count, int32_t by) {
  if (atomic_fetch_sub_explicit(count, by, memory_order_release) == by) pthread_cond_signal(&side->ready);
}

static void arrive(IoSide *side, Session *session, const Read *read, int64_t start_ns, int64_t end_ns) {
  LayerIo *layer = &session->layers[read->layer];
  if (layer->start_ns == 0 || start_ns < layer->start_ns) layer->start_ns = start_ns;
  if (end_ns > layer->end_ns) layer->end_ns = end_ns;
  layer->bytes += read->length;
  for (int32_t i = read->first; i < read->first + read->count; i++) session->arrived[session->index[i]] = true;
  count_down(side, &layer->missing, read->count);
  count_down(side, &session->unread, read->count);
}

/* Issue the next read; the lock is given up while it runs. */
static void issue(IoSide *side, StiError *error) {
  Session *session = side->session;
  const int32_t number = session->next, runs = run_count(session);
  const PageRun *run = number < runs ? &session->rows->runs[number] : NULL;
  const Read *read = number < runs ? NULL : &session->reads[number - runs];
  int64_t start_ns = 0;
  StiCode code;
  session->next += 1;
  count_running(session, run, read, 1);
  if (read != NULL) acquire(side, session, read);
  if (side->idle > 0 && may_issue(side)) pthread_cond_signal(&side->work);
  pthread_mutex_unlock(&side->lock);

  if (read == NULL) code = read_rows(side, session, run, &start_ns, error);
  else code = read_versions(side, session, read, &start_ns, error);
  const int64_t end_ns = monotonic_ns();

  pthread_mutex_lock(&side->lock);
  count_running(session, run, read, -1);
  if (session->start_ns == 0 || start_ns < session->start_ns) session->start_ns = start_ns;
  if (end_ns > session->end_ns) session->end_ns = end_ns;
  if (code != STI_OK) fail(side, session, number, error);
  else if (read == NULL) count_down(side, &session->rows_missing, 1);
  else arrive(side, session, read, start_ns, end_ns);
  if (is_over(session)) pthread_cond_signal(&side->ready);
}

/* ------------------------------------------------------------------ threads */

static void choose_cpus(const IoSide *side) {
  if (side->cpus != NULL) cpus_pin(side->cpus, side->cpu_count); /* a hint: where it is refused they run where they may */
}

/* linux/sched/types.h, which C libraries do not agree on */
typedef struct {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime_ns, deadline_ns, period_ns;
} SchedulingAttributes;

/* A reading thread works for microseconds and then sleeps, but it must get its CPU at once: while it waits for a
 * compute thread's time slice to end, the storage is idle. So it asks for a short slice (from Linux 6.12 on) and, where
 * that is allowed, for a higher priority. */
static void ask_for_quick_turns(void) {
  SchedulingAttributes attributes = {.size = sizeof attributes, .nice = NICE, .runtime_ns = SLICE_NS};
  if (syscall(SYS_sched_setattr, 0, &attributes, 0) == 0) return;
  attributes.nice = 0;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

static void *io_main(void *argument) {
  IoSide *side = argument;
  StiError error;
  choose_cpus(side);
  ask_for_quick_turns();
  const int counter = counter_open();
  pthread_mutex_lock(&side->lock);
  side->counters[side->joined++] = counter;
  while (!side->closing) {
    if (may_issue(side)) {
      issue(side, &error);
      continue;
    }
    side->idle += 1;
    pthread_cond_wait(&side->work, &side->lock);
    side->idle -= 1;
  }
  pthread_mutex_unlock(&side->lock);
  return NULL;
}

StiCode io_open(IoSide *side, const Engine *engine, const ExecutorOptions *options, StiError *error) {
  const int depth = options->queue_depth < 1 ? 1 : options->queue_depth;
  *side = (IoSide){.engine = engine, .throttle = options->throttle, .queue_depth = depth, .working.in_order = true};
  pthread_mutex_init(&side->lock, NULL);
  pthread_cond_init(&side->work, NULL);
  pthread_cond_init(&side->ready, NULL);
  side->threads = calloc((size_t)depth, sizeof *side->threads);
  side->counters = calloc((size_t)depth, sizeof *side->counters);
  side->cpu_count = options->cpus == NULL ? 0 : options->cpu_count;
  if (side->cpu_count > 0) side->cpus = calloc((size_t)side->cpu_count, sizeof *side->cpus);
  if (side->threads == NULL || side->counters == NULL || (side->cpu_count > 0 && side->cpus == NULL))
    return sti_out_of_memory(error);
  if (side->cpu_count > 0) memcpy(side->cpus, options->cpus, (size_t)side->cpu_count * sizeof *side->cpus);
  return STI_OK;
}

StiCode io_start(IoSide *side, StiError *error) {
  while (side->thread_count < side->queue_depth &&
         thread_start(&side->threads[side->thread_count], WORK_STACK_BYTES, io_main, side) == 0)
    side->thread_count += 1;
  if (side->thread_count == side->queue_depth) return STI_OK;
  return sti_fail(error, STI_RESOURCE, "Close other programs on the device.",
                  "Only %d of %d reading threads could be started.", side->thread_count, side->queue_depth);
}

void io_close(IoSide *side) {
  pthread_mutex_lock(&side->lock);
  side->closing = true;
  pthread_cond_broadcast(&side->work);
  pthread_mutex_unlock(&side->lock);
  for (int i = 0; i < side->thread_count; i++) pthread_join(side->threads[i], NULL);
  for (int i = 0; i < side->joined; i++)
    if (side->counters[i] >= 0) close(side->counters[i]);
  free(side->threads);
  free(side->counters);
  free(side->cpus);
  ring_trim(&side->working);
  pthread_cond_destroy(&side->ready);
  pthread_cond_destroy(&side->work);
  pthread_mutex_destroy(&side->lock);
}

int64_t io_storage_bytes(IoSide *side) {
  int64_t sum = 0, bytes;
  pthread_mutex_lock(&side->lock); /* a thread that has not joined has not read */
  for (int i = 0; i < side->joined && sum >= 0; i++) sum = counter_read(side->counters[i], &bytes) ? sum + bytes : -1;
  pthread_mutex_unlock(&side->lock);
  return sum;
}

/* ------------------------------------------------------------------ the compute thread's side */

void io_begin(IoSide *side, Session *session) {
  pthread_mutex_lock(&side->lock);
  side->session = session;
  pthread_cond_broadcast(&side->work);
  pthread_mutex_unlock(&side->lock);
}

static bool is_there(const Session *session, _Atomic int32_t *count) {
  return atomic_load_explicit(count, memory_order_acquire) == 0 ||
         atomic_load_explicit(&session->failed, memory_order_acquire);
}

bool io_wait(IoSide *side, Session *session, _Atomic int32_t *count) {
  if (!is_there(session, count)) {
    const int64_t until_ns = monotonic_ns() + SPIN_NS;
    while (!is_there(session, count) && monotonic_ns() < until_ns) continue;
  }
  if (!is_there(session, count)) {
    pthread_mutex_lock(&side->lock);
    while (!is_there(session, count)) pthread_cond_wait(&side->ready, &side->lock);
    pthread_mutex_unlock(&side->lock);
  }
  return !atomic_load_explicit(&session->failed, memory_order_acquire);
}

void io_release(IoSide *side, Session *session, int32_t layer) {
  LayerIo *state = &session->layers[layer];
  pthread_mutex_lock(&side->lock);
  if (side->working.in_order) {
    ring_release(&side->working, state->held_bytes);
  } else {
    for (int32_t i = 0; i < session->shard_count; i++)
      if (session->shards[i].layer == layer && !session->shards[i].preloaded)
        ring_drop(&side->working, (uint8_t *)(uintptr_t)session->loaded[i].data, session->shards[i].length);
  }
  state->held_bytes = 0;
  if (side->idle > 0 && may_issue(side)) pthread_cond_signal(&side->work);
  pthread_mutex_unlock(&side->lock);
}

static StiCode end_locked(IoSide *side, Session *session, StiError *error) {
  while (!is_over(session)) pthread_cond_wait(&side->ready, &side->lock);
  side->session = NULL;
  ring_clear(&side->working);
  const bool failed = atomic_load_explicit(&session->failed, memory_order_relaxed);
  if (failed) *error = side->error;
  pthread_mutex_unlock(&side->lock);
  return failed ? error->code : STI_OK;
}

StiCode io_end(IoSide *side, Session *session, StiError *error) {
  pthread_mutex_lock(&side->lock);
  session->stopped = true;
  return end_locked(side, session, error);
}

StiCode io_finish(IoSide *side, Session *session, StiError *error) {
  pthread_mutex_lock(&side->lock);
  return end_locked(side, session, error);
}
