/* profiling.c: the profile units: raw samples of reads, of layer compute and of a request's fixed parts.
 *
 * All of them go through the executor's own code, so that what is profiled is what will run.
 */
#include <inttypes.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "../../sti_runtime/native/threads.h"
#include "unit_kinds.h"

enum { MOST_SAMPLES = RECORD_CAP_BYTES / 256 }; /* with its reading and its read one takes about as much of the record */
static const IoMode asked_mode = IO_DIRECT; /* where storage refuses it, buffered reads after eviction */

/* ------------------------------------------------------------------ choosing */

uint64_t random_next(uint64_t *state) { /* Source: Steele, Lea, Flood, OOPSLA 2014 */
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t random_below(uint64_t *state, int64_t bound) {
  uint64_t range = (uint64_t)bound, fair = UINT64_MAX - UINT64_MAX % range, drawn;
  do drawn = random_next(state);
  while (drawn >= fair);
  return (int64_t)(drawn % range);
}

/* Memory for `width` shards of a layer, one fidelity each; width is checked against the model here. */
static StiCode layer_alloc(Arena *arena, const Manifest *manifest, int64_t width, PlannedShard **shards, StiError *error) {
  if (width < 1 || width > manifest->model.heads)
    return sti_fail(error, STI_INPUT, "Profile what the bundle holds.",
                    "The bundle has no layer of %" PRId64 " slices, but of at most %d.", width, manifest->model.heads);
  *shards = arena_alloc(arena, (size_t)width * sizeof **shards);
  return *shards == NULL ? sti_out_of_memory(error) : STI_OK;
}

/* Slice `slice` of a layer as a plan would stream it. */
static StiCode layer_shard(const Manifest *manifest, int32_t source_layer, int32_t slice, int64_t fidelity,
                           PlannedShard *shard, StiError *error) {
  const Version *version =
      fidelity > 0 && fidelity <= 32 ? manifest_version(manifest, source_layer, slice, (int)fidelity) : NULL;
  if (version == NULL)
    return sti_fail(error, STI_INPUT, "Profile what the bundle holds.",
                    "The bundle has no slice %d at %" PRId64 " bits.", slice, fidelity);
  *shard = (PlannedShard){.source_layer = source_layer,
                          .slice = slice,
                          .fidelity = (int32_t)fidelity,
                          .order = slice,
                          .offset = version->offset,
                          .length = version->length};
  return STI_OK;
}

/* The first `width` slices of one layer, all at one fidelity. */
static StiCode uniform_layer(const Manifest *manifest, int32_t source_layer, int64_t width, int64_t fidelity,
                             PlannedShard *shards, StiError *error) {
  for (int32_t slice = 0; slice < width; slice++)
    STI_TRY(layer_shard(manifest, source_layer, slice, fidelity, &shards[slice], error));
  return STI_OK;
}

static StiCode too_many(int64_t repeats, StiError *error) {
  return sti_fail(error, STI_FORMAT, "Ask for fewer repeats, or for fewer kinds in one unit.",
                  "The samples of %" PRId64 " repeats are more than a record may hold.", repeats);
}

static StiCode begin_watch(const Context *context, Arena *arena, Watch *watch, StiError *error) {
  const Job *job = context->job;
  return watch_begin(watch, job->cpus, job->cpu_count, &job->gates, arena, error);
}

/* ------------------------------------------------------------------ reads */

static IoSample sample_of(const LayerLoad *load, IoMode in_use) {
  return (IoSample){.versions = load->count,
                    .bytes = load->bytes,
                    .storage_bytes = load->storage_bytes > 0 ? load->storage_bytes : 0,
                    .duration_ns = load->duration_ns,
                    .mode_asked = asked_mode,
                    .mode_proven = proven_mode(load->bytes, load->storage_bytes, in_use),
                    .valid = load->storage_bytes >= load->bytes};
}

/* One cold read of a layer of some kind. fidelity 0: mixed at random from the unit's. */
static StiCode read_layer(Executor *executor, const Manifest *manifest, const Unit *unit, int64_t width, int64_t fidelity,
                          uint64_t *random, PlannedShard *shards, IoMode io_mode, IoSample *sample, StiError *error) {
  int32_t source_layer = (int32_t)random_below(random, manifest->model.layers);
  for (int32_t slice = 0; slice < width; slice++) {
    int64_t drawn = unit->fidelities[random_below(random, unit->fidelity_count)];
    STI_TRY(layer_shard(manifest, source_layer, slice, fidelity > 0 ? fidelity : drawn, &shards[slice], error));
  }
  LayerLoad load;
  STI_TRY(executor_evict(executor, asked_mode, error));
  STI_TRY(executor_load_layer(executor, shards, (int32_t)width, asked_mode, &load, error));
  *sample = sample_of(&load, io_mode);
  executor_drop_layer(executor, &load);
  return STI_OK;
}

/* The kinds are interleaved, so that drift of the storage falls on all alike. */
StiCode profile_io(Context *context, const Unit *unit, Arena *arena, IoSamples *found, StiError *error) {
  Executor *executor;
  const Manifest *manifest;
  uint64_t random = (uint64_t)unit->seed;
  STI_TRY(context_executor(context, &executor, error));
  STI_TRY(context_manifest(context, &manifest, error));
  if (unit->fidelity_count == 0)
    return sti_fail(error, STI_INPUT, "Profile what the bundle holds.", "The unit names no fidelity to read.");
  PlannedShard *shards;
  STI_TRY(layer_alloc(arena, manifest, manifest->model.heads, &shards, error));
  int64_t kinds = (int64_t)unit->width_count * (unit->fidelity_count + 1);
  if (kinds > 0 && unit->repeats > MOST_SAMPLES / kinds) return too_many(unit->repeats, error);
  found->count = 0;
  found->samples = arena_alloc(arena, (size_t)(kinds * unit->repeats) * sizeof *found->samples + 1);
  if (found->samples == NULL) return sti_out_of_memory(error);
  STI_TRY(executor_io_mode(executor, asked_mode, &found->io_mode, error));
  STI_TRY(begin_watch(context, arena, &found->watch, error));
  for (int64_t repeat = -1; repeat < unit->repeats; repeat++) { /* the first round only touches memory and code */
    for (int32_t w = 0; w < unit->width_count; w++) {
      if (unit->widths[w] > manifest->model.heads)
        return sti_fail(error, STI_INPUT, "Profile what the bundle holds.",
                        "The bundle has no layer of %" PRId64 " slices, but of at most %d.", unit->widths[w],
                        manifest->model.heads);
      for (int32_t f = 0; f <= unit->fidelity_count; f++) {
        IoSample sample;
        int64_t fidelity = f < unit->fidelity_count ? unit->fidelities[f] : 0;
        STI_TRY(unit_stopped());
        STI_TRY(read_layer(executor, manifest, unit, unit->widths[w], fidelity, &random, shards, found->io_mode, &sample,
                           error));
        int64_t after = (int64_t)found->count + (repeat >= 0);
        STI_TRY(watch_sampled(&found->watch, after, &sample.throttled, error));
        sample.valid &= !sample.throttled;
        if (repeat >= 0) found->samples[found->count++] = sample;
      }
    }
  }
  executor_reset(executor);
  return STI_OK;
}

/* ------------------------------------------------------------------ compute, reads beside */

/* Another thread that reads one layer from storage for each beside_next, unless it is still at the one before. */
typedef struct {
  Executor *executor;
  const Manifest *manifest;
  int64_t width, fidelity;
  IoMode io_mode;      /* in use */
  int64_t layer_bytes; /* of one read, about */
  PlannedShard *shards; /* [width] */
  int32_t layer;        /* the next to be read */
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  bool asked, leaving; /* guarded by lock, as are code, reads and read_count */
  IoSample *reads;     /* [repeats], those that ended before the thread was to leave */
  size_t read_count;
  int64_t begun_bytes; /* of the reads begun */
  StiCode code; /* the first error, with its words in error */
  StiError error;
} Beside;

static StiCode read_beside(Beside *beside, IoSample *sample) {
  LayerLoad load;
  STI_TRY(uniform_layer(beside->manifest, beside->layer, beside->width, beside->fidelity, beside->shards, &beside->error));
  STI_TRY(executor_evict(beside->executor, asked_mode, &beside->error));
  STI_TRY(executor_load_layer(beside->executor, beside->shards, (int32_t)beside->width, asked_mode, &load, &beside->error));
  *sample = sample_of(&load, beside->io_mode);
  executor_drop_layer(beside->executor, &load);
  beside->layer = (beside->layer + 1) % beside->manifest->model.layers;
  return STI_OK;
}

static void *beside_main(void *argument) {
  Beside *beside = argument;
  pthread_mutex_lock(&beside->lock);
  while (!beside->leaving) {
    if (!beside->asked) {
      pthread_cond_wait(&beside->changed, &beside->lock);
      continue;
    }
    IoSample sample;
    pthread_mutex_unlock(&beside->lock);
    StiCode code = read_beside(beside, &sample);
    pthread_mutex_lock(&beside->lock);
    beside->asked = false;
    beside->code = code;
    if (code == STI_OK && !beside->leaving) beside->reads[beside->read_count++] = sample;
    beside->leaving |= code != STI_OK;
  }
  pthread_mutex_unlock(&beside->lock);
  return NULL;
}

static StiCode beside_begin(Beside *beside, StiError *error) {
  pthread_mutex_init(&beside->lock, NULL);
  pthread_cond_init(&beside->changed, NULL);
  int problem = thread_start(&beside->thread, WORK_STACK_BYTES, beside_main, beside);
  if (problem == 0) return STI_OK;
  pthread_mutex_destroy(&beside->lock);
  pthread_cond_destroy(&beside->changed);
  return sti_fail_errno(error, STI_RESOURCE, problem, "Close other programs on the device.", "No thread to read beside");
}

/* Start reading a layer, unless one is being read or one has failed; returns at once whether it was started. */
static bool beside_next(Beside *beside) {
  pthread_mutex_lock(&beside->lock);
  const bool started = !beside->asked && !beside->leaving;
  if (started) beside->begun_bytes += beside->layer_bytes;
  beside->asked |= started;
  pthread_cond_signal(&beside->changed);
  pthread_mutex_unlock(&beside->lock);
  return started;
}

/* Bytes read from storage so far, by the kernel's count, else those of the reads begun. */
static int64_t beside_bytes(Beside *beside) {
  const int64_t counted = executor_storage_bytes(beside->executor);
  pthread_mutex_lock(&beside->lock);
  const int64_t begun = beside->begun_bytes;
  pthread_mutex_unlock(&beside->lock);
  return counted < 0 ? begun : counted;
}

static bool beside_is_reading(Beside *beside) {
  pthread_mutex_lock(&beside->lock);
  const bool reading = beside->asked;
  pthread_mutex_unlock(&beside->lock);
  return reading;
}

/* Until the read that was started has reached the kernel: a layer may be computed in less time than that takes. */
static void beside_await(Beside *beside, int64_t bytes_before) {
  static const struct timespec pause = {.tv_nsec = 20000}; /* looking takes the lock that reads are issued under */
  while (beside_is_reading(beside) && beside_bytes(beside) == bytes_before) nanosleep(&pause, NULL);
}

static StiCode beside_code(Beside *beside) {
  pthread_mutex_lock(&beside->lock);
  const StiCode code = beside->code;
  pthread_mutex_unlock(&beside->lock);
  return code;
}

/* Whether a read has ended, or failed. */
static bool beside_has_read(Beside *beside) {
  pthread_mutex_lock(&beside->lock);
  bool has = beside->read_count > 0 || beside->code != STI_OK;
  pthread_mutex_unlock(&beside->lock);
  return has;
}

/* Waits for the read under way. Errors: those of the reads. */
static StiCode beside_end(Beside *beside, StiError *error) {
  pthread_mutex_lock(&beside->lock);
  beside->leaving = true;
  pthread_cond_signal(&beside->changed);
  pthread_mutex_unlock(&beside->lock);
  pthread_join(beside->thread, NULL);
  pthread_mutex_destroy(&beside->lock);
  pthread_cond_destroy(&beside->changed);
  if (beside->code != STI_OK) *error = beside->error;
  return beside->code;
}

/* One layer computed; *sample but for its reads. */
static StiCode compute_once(Executor *executor, const LayerLoad *load, int32_t source_layer, ComputeSample *sample) {
  LayerTimes times;
  executor_compute_layer(executor, source_layer, load, &times);
  sample->decompress_ns = times.decompress_ns;
  sample->compute_ns = times.compute_ns;
  return unit_stopped();
}

/* The layer computed `repeats` times while others are read, and on until a read has ended. What is read is shared out
 * evenly over the samples [repeats], which lie from `after` on: the kernel counts bytes when they are asked of storage,
 * and a read may span several layers. Of a throttled stretch no read counts: which of them it was cannot be told. */
static StiCode compute_beside(Executor *executor, const LayerLoad *load, int32_t source_layer, Beside *beside,
                              ComputeSample *samples, int64_t repeats, Watch *watch, int64_t after, StiError *error) {
  const int64_t before = beside_bytes(beside);
  bool throttled = false, late = false;
  StiCode code = STI_OK;
  for (int64_t i = 0; i < repeats && code == STI_OK; i++) {
    const int64_t begun = beside_bytes(beside);
    if (beside_next(beside)) beside_await(beside, begun);
    code = compute_once(executor, load, source_layer, &samples[i]);
    if (code == STI_OK) code = watch_sampled(watch, after + i + 1, &samples[i].throttled, error);
    if (code == STI_OK) code = beside_code(beside);
    throttled |= samples[i].throttled;
  }
  const int64_t read_bytes = beside_bytes(beside) - before;
  for (int64_t i = 0; i < repeats; i++) samples[i].read_bytes = read_bytes / repeats;
  ComputeSample unrecorded;
  while (code == STI_OK && !beside_has_read(beside)) code = compute_once(executor, load, source_layer, &unrecorded);
  if (code == STI_OK) code = watch_sampled(watch, after + repeats, &late, error);
  StiError failure;
  const StiCode read = beside_end(beside, &failure);
  if (read != STI_OK && (code == STI_OK || code == read)) {
    code = read;
    *error = failure;
  }
  for (size_t i = 0; i < beside->read_count && (throttled || late); i++) {
    beside->reads[i].throttled = true;
    beside->reads[i].valid = false;
  }
  return code;
}

/* One fidelity: a layer computed again and again, at first alone, then while others are read. Its samples, warmups +
 * 2 · repeats, are those from `first` on. */
static StiCode compute_fidelity(Context *context, const Unit *unit, int64_t fidelity, const PlannedShard *shards,
                                Beside *beside, ComputeSamples *found, int64_t first, StiError *error) {
  Executor *executor;
  LayerLoad load;
  const int64_t alone = unit->warmups + unit->repeats;
  ComputeSample *samples = &found->samples[first];
  STI_TRY(context_executor(context, &executor, error));
  STI_TRY(executor_load_layer(executor, shards, (int32_t)unit->widths[0], asked_mode, &load, error));
  for (int64_t i = 0; i < alone + unit->repeats; i++)
    samples[i] = (ComputeSample){.width = unit->widths[0], .fidelity = fidelity, .warmup = i < unit->warmups};
  IoSample first_touch; /* of the memory that the reads beside go to: it is not their cost */
  StiCode code = read_beside(beside, &first_touch);
  if (code != STI_OK) *error = beside->error;
  for (int64_t i = 0; i < alone && code == STI_OK; i++) {
    code = compute_once(executor, &load, shards[0].source_layer, &samples[i]);
    if (code == STI_OK) code = watch_sampled(&found->watch, first + i + 1, &samples[i].throttled, error);
  }
  if (code == STI_OK) code = beside_begin(beside, error);
  if (code == STI_OK)
    code = compute_beside(executor, &load, shards[0].source_layer, beside, &samples[alone], unit->repeats,
                          &found->watch, first + alone, error);
  executor_drop_layer(executor, &load);
  return code;
}

/* The layer with the most bytes at a fidelity: memory for its reads is enough for those of any other. */
static StiCode largest_layer(const Manifest *manifest, int64_t width, int64_t fidelity, PlannedShard *shards,
                             int32_t *largest, StiError *error) {
  int64_t most = -1;
  for (int32_t layer = 0; layer < manifest->model.layers; layer++) {
    int64_t bytes = 0;
    STI_TRY(uniform_layer(manifest, layer, width, fidelity, shards, error));
    for (int64_t slice = 0; slice < width; slice++) bytes += shards[slice].length;
    if (bytes > most) *largest = layer;
    if (bytes > most) most = bytes;
  }
  return STI_OK;
}

/* After computing alone, reads go on beside as in a request: while a layer is computed at most the next one is being
 * read, and a slow read spans several layers. It goes on until one read has ended, so that all reads are beside compute. */
StiCode profile_compute(Context *context, const Unit *unit, Arena *arena, ComputeSamples *found, StiError *error) {
  Executor *executor;
  const Manifest *manifest;
  Request request;
  Outcome outcome;
  PlannedShard *shards, *read;
  int64_t width = unit->widths[0];
  STI_TRY(context_executor(context, &executor, error));
  STI_TRY(context_manifest(context, &manifest, error));
  STI_TRY(layer_alloc(arena, manifest, width, &shards, error));
  STI_TRY(layer_alloc(arena, manifest, width, &read, error));
  if (unit->repeats > MOST_SAMPLES || unit->warmups > MOST_SAMPLES) return too_many(unit->repeats, error);
  int64_t each = unit->warmups + 2 * unit->repeats;
  if (unit->fidelity_count > MOST_SAMPLES / each) return too_many(each, error);
  found->count = (size_t)(unit->fidelity_count * each);
  found->samples = arena_alloc(arena, found->count * sizeof *found->samples + 1);
  found->reads = arena_alloc(arena, found->count * sizeof *found->reads + 1);
  found->read_count = 0;
  if (found->samples == NULL || found->reads == NULL) return sti_out_of_memory(error);
  STI_TRY(context_request(context, 0, &request, error));
  STI_TRY(executor_run_fixed(executor, &request, asked_mode, &outcome, error)); /* gives a real hidden state to work on */
  STI_TRY(executor_io_mode(executor, asked_mode, &found->io_mode, error));
  STI_TRY(begin_watch(context, arena, &found->watch, error));
  for (int32_t i = 0; i < unit->fidelity_count; i++) {
    int64_t fidelity = unit->fidelities[i];
    Beside beside = {.executor = executor,
                     .manifest = manifest,
                     .width = width,
                     .fidelity = fidelity,
                     .io_mode = found->io_mode,
                     .shards = read,
                     .reads = found->reads + found->read_count};
    STI_TRY(largest_layer(manifest, width, fidelity, shards, &beside.layer, error));
    STI_TRY(uniform_layer(manifest, i % manifest->model.layers, width, fidelity, shards, error));
    for (int64_t slice = 0; slice < width; slice++) beside.layer_bytes += shards[slice].length;
    STI_TRY(compute_fidelity(context, unit, fidelity, shards, &beside, found, i * each, error));
    found->read_count += beside.read_count;
  }
  executor_reset(executor);
  return STI_OK;
}

/* ------------------------------------------------------------------ fixed parts */

StiCode profile_fixed(Context *context, const Unit *unit, Arena *arena, FixedSamples *found, StiError *error) {
  Executor *executor;
  STI_TRY(context_executor(context, &executor, error));
  found->count = (size_t)unit->row_count;
  found->samples = arena_alloc(arena, found->count * sizeof *found->samples + 1);
  if (found->samples == NULL) return sti_out_of_memory(error);
  STI_TRY(begin_watch(context, arena, &found->watch, error));
  for (int32_t i = 0; i < unit->row_count; i++) {
    Request request;
    Outcome outcome;
    STI_TRY(unit_stopped());
    STI_TRY(context_request(context, unit->rows[i], &request, error));
    STI_TRY(executor_evict(executor, asked_mode, error));
    STI_TRY(executor_run_fixed(executor, &request, asked_mode, &outcome, error));
    int64_t counted = outcome.io_not_accounted ? -1 : outcome.storage_bytes;
    found->samples[i] = (FixedSample){.embed_io_ns = outcome.embed_io_ns,
                                      .embed_compute_ns = outcome.embed_compute_ns,
                                      .head_ns = outcome.head_ns,
                                      .bytes = outcome.planned_bytes,
                                      .storage_bytes = outcome.storage_bytes,
                                      .mode_asked = asked_mode,
                                      .mode_proven = proven_mode(outcome.planned_bytes, counted, outcome.io_mode),
                                      .warmup = i < unit->warmups};
    STI_TRY(watch_sampled(&found->watch, i + 1, &found->samples[i].throttled, error));
  }
  return STI_OK;
}

/* ------------------------------------------------------------------ results */

static void write_reads(Text *out, const char *key, const IoSample *samples, size_t count) {
  json_key(out, key), json_open(out, '[');
  for (size_t i = 0; i < count; i++) {
    const IoSample *sample = &samples[i];
    json_open(out, '{');
    json_int_field(out, "bytes", sample->bytes);
    json_int_field(out, "duration_ns", sample->duration_ns);
    json_text_field(out, "mode_asked", io_mode_names[sample->mode_asked]);
    json_text_field(out, "mode_proven", proven_mode_names[sample->mode_proven]);
    json_int_field(out, "storage_bytes", sample->storage_bytes);
    json_bool_field(out, "throttled", sample->throttled);
    json_bool_field(out, "valid", sample->valid);
    json_int_field(out, "versions", sample->versions);
    json_close(out, '}');
  }
  json_close(out, ']');
}

static void write_io(Text *out, const IoSamples *found) {
  json_open(out, '{');
  json_text_field(out, "io_mode", io_mode_name(found->io_mode));
  json_text_field(out, "kind", "profile-io");
  json_key(out, "readings"), watch_write(out, &found->watch);
  write_reads(out, "samples", found->samples, found->count);
  json_close(out, '}');
}

static void write_compute(Text *out, const ComputeSamples *found) {
  json_open(out, '{');
  json_text_field(out, "io_mode", io_mode_name(found->io_mode));
  json_text_field(out, "kind", "profile-compute");
  json_key(out, "readings"), watch_write(out, &found->watch);
  write_reads(out, "reads", found->reads, found->read_count);
  json_key(out, "samples"), json_open(out, '[');
  for (size_t i = 0; i < found->count; i++) {
    const ComputeSample *sample = &found->samples[i];
    json_open(out, '{');
    json_int_field(out, "compute_ns", sample->compute_ns);
    json_int_field(out, "decompress_ns", sample->decompress_ns);
    json_int_field(out, "fidelity", sample->fidelity);
    json_int_field(out, "read_bytes", sample->read_bytes);
    json_bool_field(out, "throttled", sample->throttled);
    json_bool_field(out, "warmup", sample->warmup);
    json_int_field(out, "width", sample->width);
    json_close(out, '}');
  }
  json_close(out, ']');
  json_close(out, '}');
}

static void write_fixed(Text *out, const FixedSamples *found) {
  json_open(out, '{');
  json_text_field(out, "kind", "profile-fixed");
  json_key(out, "readings"), watch_write(out, &found->watch);
  json_key(out, "samples"), json_open(out, '[');
  for (size_t i = 0; i < found->count; i++) {
    const FixedSample *sample = &found->samples[i];
    json_open(out, '{');
    json_int_field(out, "bytes", sample->bytes);
    json_int_field(out, "embed_compute_ns", sample->embed_compute_ns);
    json_int_field(out, "embed_io_ns", sample->embed_io_ns);
    json_int_field(out, "head_ns", sample->head_ns);
    json_text_field(out, "mode_asked", io_mode_names[sample->mode_asked]);
    json_text_field(out, "mode_proven", proven_mode_names[sample->mode_proven]);
    json_int_field(out, "storage_bytes", sample->storage_bytes);
    json_bool_field(out, "throttled", sample->throttled);
    json_bool_field(out, "warmup", sample->warmup);
    json_close(out, '}');
  }
  json_close(out, ']');
  json_close(out, '}');
}

static StiCode profile_into(Context *context, const Unit *unit, Arena *arena, Text *result, StiError *error) {
  IoSamples io;
  ComputeSamples compute;
  FixedSamples fixed;
  switch (unit->kind) {
    case UNIT_PROFILE_IO:
      STI_TRY(profile_io(context, unit, arena, &io, error));
      write_io(result, &io);
      return STI_OK;
    case UNIT_PROFILE_COMPUTE:
      STI_TRY(profile_compute(context, unit, arena, &compute, error));
      write_compute(result, &compute);
      return STI_OK;
    default:
      STI_TRY(profile_fixed(context, unit, arena, &fixed, error));
      write_fixed(result, &fixed);
      return STI_OK;
  }
}

StiCode run_profile(Context *context, const Unit *unit, Text *result, StiError *error) {
  Arena arena = {0};
  StiCode code = profile_into(context, unit, &arena, result, error);
  arena_free(&arena);
  return code;
}
