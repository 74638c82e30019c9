/* engine.h: the arithmetic of a request: embedding sum, layers of m slices with their decompression, head.
 *
 * Weights are decompressed tile by tile into cache just before use, spread over the compute threads; no whole-layer
 * copy exists. Kernels are chosen once, at engine_open, from what the CPU has (or as forced). Nothing is allocated
 * after engine_allocate.
 *
 * Symbols of all shape comments: B rows, L tokens, H hidden, m slices of a layer, d head size, f FFN slice.
 */
#ifndef STI_ENGINE_H
#define STI_ENGINE_H

#include "formats.h"
#include "resident.h"

typedef enum { MODE_FP32, MODE_INT8 } EngineMode;

/* Instruction sets, best last. ISA_AUTO: the best this CPU has. */
typedef enum { ISA_AUTO, ISA_PORTABLE, ISA_AVX2, ISA_AVX512, ISA_NEON, ISA_NEON_DOTPROD } Isa;
const char *isa_name(Isa isa);        /* "portable", "avx2", "avx512", "neon", "neon-dotprod" */
bool isa_available(Isa isa);          /* compiled in, and this CPU (and kernel) has it */
Isa isa_best(void);

typedef struct {
  int threads;          /* compute threads, the caller's included */
  EngineMode mode;
  Isa isa;
  const int32_t *cpus;  /* [cpu_count] CPUs to pin the compute threads to, one each, round robin; NULL: not pinned. The
                           caller is pinned from engine_begin to engine_finish; must outlive the engine */
  int cpu_count;
  Resident *resident;   /* resident.bin, begun to be read; used up by engine_open, also when it fails. NULL: not begun */
} EngineOptions;

/* One version in memory. data: the payload first, at least 64-byte aligned, `length` of the version readable. */
typedef struct {
  int32_t slice, fidelity;
  const uint32_t *outliers; /* [6] */
  const uint8_t *data;
} LoadedShard;

typedef struct Engine Engine;

/* Reads resident.bin below `folder` into memory once. The manifest must outlive the engine.
 * Errors: STI_INPUT when a forced ISA is not there, STI_STORAGE_READ, STI_RESOURCE, STI_FORMAT. */
StiCode engine_open(const Manifest *manifest, const char *folder, const EngineOptions *options, Engine **engine,
                    StiError *error);
void engine_close(Engine *engine); /* NULL is allowed */

/* Size all buffers for layers of up to `width` slices, B rows of L tokens. Errors: STI_RESOURCE, STI_INPUT. */
StiCode engine_allocate(Engine *engine, int32_t width, int32_t tokens, int32_t batch, StiError *error);

/* Start a request. words, types: for each of the B·L tokens a pointer to its embedding row [H] (types NULL when the
 * model has none); positions: row 0 of the L position rows in use, contiguous [L, H]; lengths [B] real tokens. */
void engine_begin(Engine *engine, const float *const *words, const float *const *types, const float *positions,
                  const int32_t *lengths, int32_t batch, int32_t tokens);

typedef struct {
  int64_t decompress_ns; /* decompression and outliers: the threads' sum ÷ threads */
  int64_t compute_ns;    /* the rest of the layer's wall time */
} LayerTimes;

/* Check a version once after it is read: outlier positions inside their matrices. O(outliers). Errors: STI_FORMAT. */
StiCode engine_check_shard(const Engine *engine, const LoadedShard *shard, StiError *error);
/* One layer of `count` slices on the current hidden state. */
void engine_layer(Engine *engine, int32_t source_layer, const LoadedShard *shards, int32_t count, LayerTimes *times);

/* Pool and classify. logits [B, labels] (untouched without a head); hidden: *hidden points at [B, L, H], valid until
 * the next engine_begin. */
void engine_finish(Engine *engine, float *logits, const float **hidden);

int64_t engine_resident_bytes(const Engine *engine);
int64_t engine_activation_bytes(const Engine *engine); /* activations, tiles and scratch of all threads */
Isa engine_isa(const Engine *engine);

#endif
