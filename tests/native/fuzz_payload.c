/* fuzz_payload.c: stored versions. Whatever the bytes, a version is refused or computed without reading or writing
 * outside its payload.
 *
 * Input: a fidelity's index, six outlier counts (u16, taken modulo what fits) and the payload, repeated to its length.
 * The model is that of the bundle which STIFARM_FUZZ_BUNDLE names.
 */
#include <stdlib.h>
#include <string.h>

#include "../../sti_runtime/native/engine.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

enum { TOKENS = 5, HEAD_BYTES = 1 + 2 * STI_MATRICES };

static Arena arena;
static Manifest manifest;
static Engine *engines[2]; /* fp32, int8 */
static float *row;         /* [H], as every embedding */
static float *positions;   /* [L, H] */
static float logits[4096]; /* [labels] */

static void require(bool holds) {
  if (!holds) abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc, (void)argv;
  StiError error;
  const char *folder = getenv("STIFARM_FUZZ_BUNDLE");
  require(folder != NULL && bundle_open(&arena, folder, NULL, &manifest, &error) == STI_OK);
  for (int mode = 0; mode < 2; mode++) {
    EngineOptions options = {.threads = 1, .mode = mode == 0 ? MODE_FP32 : MODE_INT8, .isa = ISA_AUTO};
    require(engine_open(&manifest, folder, &options, &engines[mode], &error) == STI_OK);
    require(engine_allocate(engines[mode], 1, TOKENS, 1, &error) == STI_OK);
  }
  row = arena_alloc(&arena, (size_t)manifest.model.hidden * sizeof *row);
  positions = arena_alloc(&arena, TOKENS * (size_t)manifest.model.hidden * sizeof *positions);
  require(row != NULL && positions != NULL);
  for (int32_t i = 0; i < manifest.model.hidden; i++) row[i] = (float)(i % 7) - 3;
  return 0;
}

static void compute(Engine *engine, const LoadedShard *shard) {
  const float *rows[TOKENS], *hidden;
  const int32_t length = TOKENS;
  LayerTimes times;
  for (int i = 0; i < TOKENS; i++) rows[i] = row;
  engine_begin(engine, rows, manifest.model.token_types == 0 ? NULL : rows, positions, &length, 1, TOKENS);
  engine_layer(engine, 0, shard, 1, &times);
  engine_finish(engine, logits, &hidden);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < HEAD_BYTES) return 0;
  int fidelity = sti_fidelities[data[0] % STI_FIDELITIES];
  uint32_t outliers[STI_MATRICES];
  for (int i = 0; i < STI_MATRICES; i++) {
    int32_t out, in;
    matrix_shape(&manifest.model, i, &out, &in);
    outliers[i] = fidelity == 32 ? 0 : (data[1 + 2 * i] | (uint32_t)data[2 + 2 * i] << 8) % (uint32_t)(out * in + 1);
  }
  PayloadLayout layout;
  payload_layout(&manifest.model, fidelity, outliers, &layout);
  /* As it is read: whole blocks, the payload first. The sanitizer guards what lies behind the last block. */
  size_t length = ((size_t)layout.payload_bytes + STI_ALIGNMENT - 1) / STI_ALIGNMENT * STI_ALIGNMENT;
  uint8_t *payload = aligned_alloc(STI_ALIGNMENT, length);
  require(payload != NULL);
  memset(payload, 0, length);
  size -= HEAD_BYTES;
  for (size_t i = 0; size != 0 && i < (size_t)layout.payload_bytes; i += size) {
    size_t left = (size_t)layout.payload_bytes - i;
    memcpy(payload + i, data + HEAD_BYTES, size < left ? size : left);
  }
  LoadedShard shard = {.slice = 0, .fidelity = fidelity, .outliers = outliers, .data = payload};
  for (int mode = 0; mode < 2; mode++) {
    StiError error;
    if (engine_check_shard(engines[mode], &shard, &error) == STI_OK) compute(engines[mode], &shard);
  }
  free(payload);
  return 0;
}
