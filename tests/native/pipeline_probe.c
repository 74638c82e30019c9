/* pipeline_probe.c: drives an executor by lines on standard input; one line of JSON per line on standard output.
 *
 * Usage: pipeline_probe FOLDER DIGEST THREADS QUEUE_DEPTH BYTES_PER_S (0: not paced)
 *
 *     mode MODE | evict MODE | reset | state
 *     fill PLAN MODE | run PLAN ROWS KIND MODE | fixed ROWS MODE | evaluate PLAN ROWS BATCH STOP_AFTER (-1: never)
 *     load MODE FIDELITY WIDTH LAYER | beside MODE FIDELITY WIDTH ROUNDS
 *
 * PLAN is a file of canonical JSON; ROWS one of int32: R, L, ids [R, L], types [R, L], lengths [R].
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../sti_runtime/native/executor.h"

static const char *const kinds[] = {"spawn-cold", "cold", "warm", "cached", NULL};
static const char *const modes[] = {"direct", "buffered", NULL};

typedef struct {
  int32_t rows, tokens;
  int32_t *ids, *types, *lengths;
} Data;

static int choice(const char *text, const char *const *choices) {
  for (int i = 0; choices[i] != NULL; i++)
    if (strcmp(text, choices[i]) == 0) return i;
  fprintf(stderr, "no such choice: %s\n", text);
  exit(2);
}

static Data read_rows(Arena *arena, const char *path) {
  const char *bytes;
  size_t length;
  StiError error;
  if (read_file(arena, path, 64 << 20, &bytes, &length, &error) != STI_OK || length < 8) exit(2);
  int32_t *numbers = arena_alloc(arena, length);
  memcpy(numbers, bytes, length);
  Data data = {.rows = numbers[0], .tokens = numbers[1], .ids = numbers + 2};
  data.types = data.ids + data.rows * data.tokens;
  data.lengths = data.types + data.rows * data.tokens;
  return data;
}

static Plan read_plan(Arena *arena, const char *path) {
  const char *bytes;
  size_t length;
  JsonValue *value;
  Plan plan;
  StiError error = {0};
  if (read_file(arena, path, 4 << 20, &bytes, &length, &error) != STI_OK ||
      json_parse(arena, bytes, length, path, &value, &error) != STI_OK ||
      plan_parse(arena, value, path, "", &plan, &error) != STI_OK) {
    fprintf(stderr, "%s\n", error.what);
    exit(2);
  }
  return plan;
}

static Request request_of(const Data *data) { return (Request){data->ids, data->types, data->tokens, data->lengths[0]}; }

/* ------------------------------------------------------------------ answers */

static void numbers(Text *out, const char *key, const float *values, int64_t count) {
  json_key(out, key);
  json_open(out, '[');
  for (int64_t i = 0; i < count; i++) json_number(out, (double)values[i]);
  json_close(out, ']');
}

static void answer_error(Text *out, const StiError *error) {
  json_text_field(out, "error", sti_error_name(error->code));
  json_text_field(out, "what", error->what);
  json_text_field(out, "remedy", error->remedy);
}

static void answer_outcome(Text *out, const Outcome *outcome, const Data *data, int32_t hidden) {
  json_int_field(out, "latency_ns", outcome->latency_ns);
  json_int_field(out, "stall_ns", outcome->stall_ns);
  json_int_field(out, "planned_bytes", outcome->planned_bytes);
  json_int_field(out, "storage_bytes", outcome->storage_bytes);
  json_int_field(out, "embed_io_ns", outcome->embed_io_ns);
  json_int_field(out, "embed_compute_ns", outcome->embed_compute_ns);
  json_int_field(out, "head_ns", outcome->head_ns);
  json_int_field(out, "embed_bytes", outcome->embed_bytes);
  json_int_field(out, "io_not_accounted", outcome->io_not_accounted);
  json_int_field(out, "not_from_storage", outcome->not_from_storage);
  json_int_field(out, "not_cached", outcome->not_cached);
  json_text_field(out, "io_mode", modes[outcome->io_mode]);
  numbers(out, "logits", outcome->logits, outcome->logit_count);
  numbers(out, "hidden", outcome->hidden, (int64_t)data->tokens * hidden);
  json_key(out, "trace");
  json_open(out, '[');
  for (int32_t i = 0; i < outcome->layer_count; i++) {
    const LayerTrace *layer = &outcome->trace[i];
    json_open(out, '{');
    json_int_field(out, "io_start_ns", layer->io_start_ns);
    json_int_field(out, "io_end_ns", layer->io_end_ns);
    json_int_field(out, "bytes", layer->bytes);
    json_int_field(out, "compute_start_ns", layer->compute_start_ns);
    json_int_field(out, "compute_end_ns", layer->compute_end_ns);
    json_int_field(out, "decompress_ns", layer->decompress_ns);
    json_int_field(out, "stall_ns", layer->stall_ns);
    json_close(out, '}');
  }
  json_close(out, ']');
}

static void answer_load(Text *out, const LayerLoad *load, const LayerTimes *times) {
  json_int_field(out, "bytes", load->bytes);
  json_int_field(out, "storage_bytes", load->storage_bytes);
  json_int_field(out, "duration_ns", load->duration_ns);
  json_int_field(out, "decompress_ns", times->decompress_ns);
  json_int_field(out, "compute_ns", times->compute_ns);
}

static void answer_state(Text *out, Executor *executor) {
  const MemoryParts memory = executor_memory(executor);
  json_int_field(out, "resident", memory.resident);
  json_int_field(out, "preload", memory.preload);
  json_int_field(out, "working", memory.working);
  json_int_field(out, "activations", memory.activations);
  json_int_field(out, "ring_in_use", executor->io.working.in_use);
  json_int_field(out, "ring_held", executor->io.working.held);
  json_int_field(out, "ring_peak", executor->io.working.peak);
  json_int_field(out, "ring_capacity", executor->io.working.capacity);
  json_int_field(out, "preload_held", executor->preload.held);
  json_int_field(out, "fetched", io_storage_bytes(&executor->io));
  json_key(out, "preloaded");
  json_open(out, '[');
  for (int32_t i = 0; i < executor->preload.layers * executor->preload.slices; i++) {
    const Held *held = &executor->preload.shards[i];
    if (held->data == NULL) continue;
    json_open(out, '[');
    json_int(out, i / executor->preload.slices);
    json_int(out, i % executor->preload.slices);
    json_int(out, held->fidelity);
    json_close(out, ']');
  }
  json_close(out, ']');
}

/* ------------------------------------------------------------------ layers apart */

static int32_t layer_shards(const Manifest *manifest, int layer, int fidelity, int32_t width, PlannedShard *shards) {
  for (int32_t i = 0; i < width; i++) {
    const Version *version = manifest_version(manifest, layer, i, fidelity);
    shards[i] = (PlannedShard){.source_layer = layer, .slice = i, .fidelity = fidelity, .order = i,
                               .offset = version->offset, .length = version->length};
  }
  return width;
}

typedef struct {
  Executor *executor;
  IoMode mode;
  int fidelity, width, rounds;
  StiCode code;
  StiError error;
} Beside;

static void *read_beside(void *argument) {
  Beside *beside = argument;
  PlannedShard shards[64];
  for (int i = 0; i < beside->rounds && beside->code == STI_OK; i++) {
    LayerLoad load;
    const int layer = i % beside->executor->manifest->model.layers;
    layer_shards(beside->executor->manifest, layer, beside->fidelity, beside->width, shards);
    beside->code = executor_load_layer(beside->executor, shards, beside->width, beside->mode, &load, &beside->error);
    if (beside->code == STI_OK) executor_drop_layer(beside->executor, &load);
  }
  return NULL;
}

static StiCode load_and_compute(Executor *executor, IoMode mode, int fidelity, int width, int layer, int rounds,
                                Text *out, StiError *error) {
  PlannedShard shards[64];
  LayerLoad load;
  LayerTimes times;
  Beside beside = {.executor = executor, .mode = mode, .fidelity = fidelity, .width = width, .rounds = rounds};
  pthread_t thread;
  layer_shards(executor->manifest, layer, fidelity, width, shards);
  STI_TRY(executor_load_layer(executor, shards, width, mode, &load, error));
  if (rounds > 0) pthread_create(&thread, NULL, read_beside, &beside);
  for (int i = 0; i <= rounds; i++) executor_compute_layer(executor, layer, &load, &times);
  if (rounds > 0) pthread_join(thread, NULL);
  answer_load(out, &load, &times);
  executor_drop_layer(executor, &load);
  if (beside.code != STI_OK) *error = beside.error;
  return beside.code;
}

/* ------------------------------------------------------------------ commands */

static int stop_after;
static bool stopping(void) { return stop_after >= 0 && stop_after-- == 0; }

static StiCode evaluate(Executor *executor, Arena *arena, char **words, Text *out, StiError *error) {
  const Plan plan = read_plan(arena, words[1]);
  const Data data = read_rows(arena, words[2]);
  const int32_t labels = executor->manifest->model.labels;
  float *logits = arena_alloc(arena, (size_t)data.rows * (size_t)(labels + 1) * sizeof *logits);
  stop_after = atoi(words[4]);
  STI_TRY(executor_evaluate(executor, &plan, data.ids, data.types, data.lengths, data.rows, data.tokens, atoi(words[3]),
                            logits, stopping, error));
  numbers(out, "logits", logits, (int64_t)data.rows * labels);
  return STI_OK;
}

static StiCode run(Executor *executor, Arena *arena, char **words, Text *out, StiError *error) {
  const int32_t hidden = executor->manifest->model.hidden;
  Outcome outcome;
  if (strcmp(words[0], "fixed") == 0) {
    const Data data = read_rows(arena, words[1]);
    const Request request = request_of(&data);
    STI_TRY(executor_run_fixed(executor, &request, (IoMode)choice(words[2], modes), &outcome, error));
    answer_outcome(out, &outcome, &data, hidden);
    return STI_OK;
  }
  const Plan plan = read_plan(arena, words[1]);
  const Data data = read_rows(arena, words[2]);
  const Request request = request_of(&data);
  STI_TRY(executor_run(executor, &plan, &request, (RequestKind)choice(words[3], kinds),
                       (IoMode)choice(words[4], modes), &outcome, error));
  answer_outcome(out, &outcome, &data, hidden);
  return STI_OK;
}

static StiCode command(Executor *executor, Arena *arena, char **words, Text *out, StiError *error) {
  const char *verb = words[0];
  if (strcmp(verb, "mode") == 0) {
    IoMode in_use;
    STI_TRY(executor_io_mode(executor, (IoMode)choice(words[1], modes), &in_use, error));
    json_text_field(out, "io_mode", modes[in_use]);
    return STI_OK;
  }
  if (strcmp(verb, "evict") == 0) return executor_evict(executor, (IoMode)choice(words[1], modes), error);
  if (strcmp(verb, "evaluate") == 0) return evaluate(executor, arena, words, out, error);
  if (strcmp(verb, "run") == 0 || strcmp(verb, "fixed") == 0) return run(executor, arena, words, out, error);
  if (strcmp(verb, "fill") == 0) {
    const Plan plan = read_plan(arena, words[1]);
    return executor_fill(executor, &plan, (IoMode)choice(words[2], modes), error);
  }
  if (strcmp(verb, "load") == 0 || strcmp(verb, "beside") == 0) {
    const bool beside = strcmp(verb, "beside") == 0;
    return load_and_compute(executor, (IoMode)choice(words[1], modes), atoi(words[2]), atoi(words[3]),
                            beside ? 0 : atoi(words[4]), beside ? atoi(words[4]) : 0, out, error);
  }
  if (strcmp(verb, "reset") == 0) executor_reset(executor);
  answer_state(out, executor);
  return STI_OK;
}

static void serve(Executor *executor) {
  static char line[1 << 16];
  Text out = {0};
  while (fgets(line, sizeof line, stdin) != NULL) {
    char *words[8] = {NULL}, *rest = line;
    StiError error = {0};
    Arena arena = {0};
    for (int i = 0; i < 7 && (words[i] = strtok_r(rest, " \n", &rest)) != NULL; i++) continue;
    text_clear(&out);
    json_open(&out, '{');
    if (command(executor, &arena, words, &out, &error) != STI_OK) answer_error(&out, &error);
    json_close(&out, '}');
    puts(out.data);
    fflush(stdout);
    arena_free(&arena);
  }
  text_free(&out);
}

/* ------------------------------------------------------------------ a paced device */

static struct {
  pthread_mutex_t lock;
  int64_t bytes_per_s, free_ns;
} device = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void pace(void *state, int64_t started_ns, int64_t bytes) {
  (void)state;
  pthread_mutex_lock(&device.lock);
  if (device.free_ns < started_ns) device.free_ns = started_ns;
  device.free_ns += bytes * 1000000000 / device.bytes_per_s;
  const struct timespec due = {device.free_ns / 1000000000, device.free_ns % 1000000000};
  pthread_mutex_unlock(&device.lock);
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
}

int main(int argc, char **argv) {
  Arena arena = {0};
  Manifest manifest;
  Engine *engine = NULL;
  Executor *executor = NULL;
  StiError error = {0};
  if (argc != 6) return 2;
  device.bytes_per_s = atoll(argv[5]);
  const EngineOptions computing = {.threads = atoi(argv[3])};
  StiCode code = bundle_open(&arena, argv[1], argv[2], &manifest, &error);
  if (code == STI_OK) code = engine_open(&manifest, argv[1], &computing, &engine, &error);
  const ExecutorOptions options = {
      .manifest = &manifest,
      .folder = argv[1],
      .engine = engine,
      .queue_depth = atoi(argv[4]),
      .throttle = {.after_read = device.bytes_per_s > 0 ? pace : NULL},
  };
  if (code == STI_OK) code = executor_open(&options, &executor, &error);
  if (code == STI_OK) serve(executor);
  else fprintf(stderr, "%s\n", error.what);
  executor_close(executor);
  engine_close(engine);
  arena_free(&arena);
  return code == STI_OK ? 0 : 1;
}
