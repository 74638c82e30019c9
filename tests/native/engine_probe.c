/* engine_probe.c: runs passes through the engine for test_engine.py.
 *
 *     engine_probe FOLDER DIGEST ISA MODE THREADS CPUS
 *
 * CPUS: comma-separated, or "-". Standard input, numbers apart by white space, any number of passes:
 *
 *     depth width batch tokens
 *     source layers [depth], fidelities [depth][width], lengths [batch], word ids [batch][tokens], types likewise
 *
 * Standard output, per pass: floats, logits [batch][labels], hidden [batch][tokens][hidden]. Exit code 3: no such ISA.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../sti_runtime/native/engine.h"

static void check(bool holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "engine_probe: %s (%s)\n", what, strerror(errno));
  exit(1);
}

static void *get(size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  check(memory != NULL, "out of memory");
  return memory;
}

/* The next number, or -1 at the end. */
static int32_t number(void) {
  int value;
  return scanf("%d", &value) == 1 ? value : -1;
}

static int32_t *numbers(size_t count) {
  int32_t *values = get(count, sizeof *values);
  for (size_t i = 0; i < count; i++) check((values[i] = number()) >= 0, "too few numbers");
  return values;
}

static void *read_at(const char *folder, const char *file, int64_t offset, int64_t length) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, file);
  int descriptor = open(path, O_RDONLY);
  void *data = aligned_alloc(4096, (size_t)((length + 4095) / 4096 * 4096));
  check(descriptor >= 0 && data && pread(descriptor, data, (size_t)length, offset) == length, path);
  close(descriptor);
  return data;
}

/* Exactly the payload, so that a sanitizer sees any read past it. */
static uint8_t *read_payload(const char *folder, const Manifest *manifest, int32_t layer, int32_t slice,
                             int32_t fidelity, const uint32_t **outliers) {
  const Version *version = manifest_version(manifest, layer, slice, fidelity);
  check(version != NULL, "no such version");
  *outliers = version->outliers;
  uint8_t *payload = read_at(folder, manifest_region(manifest, fidelity)->file, version->offset, version->length);
  uint8_t *exact = aligned_alloc(64, (size_t)((version->payload_bytes + 63) / 64 * 64));
  check(exact != NULL, "out of memory");
  memcpy(exact, payload, (size_t)version->payload_bytes);
  free(payload);
  return exact;
}

typedef struct {
  const char *folder;
  const Manifest *manifest;
  Engine *engine;
  float *word, *position, *type; /* embedding tables; type NULL without one */
} Probe;

static void run_layer(const Probe *probe, int32_t layer, const int32_t *fidelities, int32_t width) {
  LoadedShard *shards = get((size_t)width, sizeof *shards);
  StiError error;
  for (int32_t s = 0; s < width; s++) {
    shards[s] = (LoadedShard){.slice = s, .fidelity = fidelities[s]};
    shards[s].data = read_payload(probe->folder, probe->manifest, layer, s, fidelities[s], &shards[s].outliers);
    check(engine_check_shard(probe->engine, &shards[s], &error) == STI_OK, error.what);
  }
  LayerTimes times;
  engine_layer(probe->engine, layer, shards, width, &times);
  check(times.compute_ns >= 0 && times.decompress_ns >= 0, "negative times");
  for (int32_t s = 0; s < width; s++) free((void *)shards[s].data);
  free(shards);
}

/* One pass; false at the end of the input. */
static bool run_pass(const Probe *probe) {
  const ModelConfig *model = &probe->manifest->model;
  int32_t depth = number();
  if (depth < 0) return false;
  int32_t width = number(), batch = number(), tokens = number();
  size_t rows = (size_t)(batch * tokens);
  int32_t *layers = numbers((size_t)depth), *fidelities = numbers((size_t)(depth * width));
  int32_t *lengths = numbers((size_t)batch), *ids = numbers(rows), *types = numbers(rows);
  const float **words = get(rows, sizeof *words), **type_rows = get(rows, sizeof *type_rows);
  for (size_t i = 0; i < rows; i++) {
    words[i] = probe->word + (int64_t)ids[i] * model->hidden;
    if (probe->type) type_rows[i] = probe->type + (int64_t)types[i] * model->hidden;
  }
  StiError error;
  check(engine_allocate(probe->engine, width, tokens, batch, &error) == STI_OK, error.what);
  engine_begin(probe->engine, words, probe->type ? type_rows : NULL,
               probe->position + model->position_offset * model->hidden, lengths, batch, tokens);
  for (int32_t i = 0; i < depth; i++) run_layer(probe, layers[i], fidelities + i * width, width);
  size_t labels = model->has_head ? (size_t)(batch * model->labels) : 0;
  float *logits = get(labels, sizeof *logits);
  const float *hidden;
  engine_finish(probe->engine, logits, &hidden);
  size_t count = rows * (size_t)model->hidden;
  check(fwrite(logits, sizeof *logits, labels, stdout) == labels, "cannot write");
  check(fwrite(hidden, sizeof *hidden, count, stdout) == count, "cannot write");
  void *const done[] = {layers, fidelities, lengths, ids, types, words, type_rows, logits};
  for (size_t i = 0; i < sizeof done / sizeof *done; i++) free(done[i]);
  return true;
}

static float *read_table(const char *folder, const EmbeddingTable *table) {
  return table->rows ? read_at(folder, "embeddings.bin", table->offset, table->rows * table->row_bytes) : NULL;
}

int main(int argc, char **argv) {
  check(argc == 7, "usage: engine_probe FOLDER DIGEST ISA MODE THREADS CPUS");
  Arena arena = {0};
  Manifest manifest;
  StiError error;
  check(bundle_open(&arena, argv[1], argv[2], &manifest, &error) == STI_OK, error.what);
  int32_t cpus[64], cpu_count = 0;
  for (char *at = strcmp(argv[6], "-") ? argv[6] : NULL; at && cpu_count < 64; at = strchr(at, ',')) {
    at += *at == ',';
    cpus[cpu_count++] = atoi(at);
  }
  Isa isa = ISA_AUTO;
  while (isa < ISA_NEON_DOTPROD && strcmp(isa_name(isa), argv[3]) != 0) isa++;
  if (strcmp(isa_name(isa), argv[3]) != 0 || (isa != ISA_AUTO && !isa_available(isa))) return 3;
  EngineOptions options = {.threads = atoi(argv[5]), .isa = isa,
                           .mode = strcmp(argv[4], "int8") ? MODE_FP32 : MODE_INT8,
                           .cpus = cpu_count ? cpus : NULL, .cpu_count = cpu_count};
  Probe probe = {.folder = argv[1], .manifest = &manifest};
  check(engine_open(&manifest, argv[1], &options, &probe.engine, &error) == STI_OK, error.what);
  check(engine_isa(probe.engine) == (isa == ISA_AUTO ? isa_best() : isa), "another ISA than asked for");
  probe.word = read_table(argv[1], &manifest.word);
  probe.position = read_table(argv[1], &manifest.position);
  probe.type = read_table(argv[1], &manifest.token_type);
  while (run_pass(&probe)) continue;
  check(engine_resident_bytes(probe.engine) > 0 && engine_activation_bytes(probe.engine) > 0, "no memory accounted");
  engine_close(probe.engine);
  free(probe.word);
  free(probe.position);
  free(probe.type);
  arena_free(&arena);
  return 0;
}
