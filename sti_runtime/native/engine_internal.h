/* engine_internal.h: what the engine's files share: its memory, and products of packed matrices.
 *
 * In memory the outputs of a slice are padded to whole panels, so that products store whole vectors: d16, f16, H16 are
 * d, f, H rounded up to 16. Padding columns hold finite values that nothing reads. Rows of a buffer are an odd number
 * of cache lines apart, so that neighbouring rows do not compete for the same sets of a cache.
 */
#ifndef STI_ENGINE_INTERNAL_H
#define STI_ENGINE_INTERNAL_H

#include "kernels.h"
#include "threads.h"

/* ------------------------------------------------------------------ memory */

/* A packed matrix [outputs, inputs] in memory, as panels of blocks; at 32 bits as panels of floats. */
typedef struct {
  int fidelity;
  int32_t outputs, inputs, padded; /* padded: inputs rounded up to 4 */
  const float *table;              /* [2^fidelity] */
  const uint8_t *plane[2];         /* at the matrix's first block; at 32 bits the stream */
  int32_t plane_bytes[2];          /* per block; 0 for a plane that is not there */
  const uint32_t *positions;       /* [outliers], in the matrix's stream, ascending */
  const float *values;             /* [outliers] */
  uint32_t outliers;
  const float *stream;             /* 32 bits: [panels][padded][16] */
  const int8_t *table8;            /* [64] int8 mode, below 32 bits; NULL: fp32 */
  float scale;                     /* of table8 */
} Matrix;

/* A head weight: packed at 6 bits, or plain row-major floats. */
typedef struct {
  const float *rows; /* [outputs, inputs] or NULL */
  Matrix packed;
  const float *bias; /* [outputs] */
} Linear;

typedef struct {
  const float *q_bias, *k_bias, *v_bias, *o_bias; /* [H] */
  const float *in_bias, *out_bias;                /* [F], [H] */
  const float *attention_norm[2], *ffn_norm[2];   /* weight, bias [H] */
} LayerParameters;

typedef struct {
  _Alignas(CACHE_LINE_BYTES) float *scratch; /* tile, or what attention needs */
  TileOutlier *outliers;                     /* [MAX_PANELS][TILE_OUTLIERS], int8 mode */
  uint64_t decode_ticks;
} ThreadState;

enum { TILE_OUTLIERS = 512 };

typedef struct {
  int32_t tokens, batch, rows; /* of the pass; rows: B·L */
  int32_t count;               /* slices of the layer being computed */
  int32_t source_layer;
  const LoadedShard *shards;   /* [count] */
  const float *const *words, *const *types, *positions;
} Pass;

struct Engine {
  const Manifest *manifest;
  const ModelConfig *model;
  EngineMode mode;
  Kernels kernels;
  Pool *pool;
  ThreadState *threads; /* [pool_threads] */
  int32_t d, f, d16, f16, h16;

  uint8_t *resident; /* resident.bin, and a cache line more: vectors may be read past a bias's end */
  int64_t resident_bytes;
  LayerParameters *layers; /* [N] */
  const float *embedding_norm[2];
  Linear pooler, classifier;

  int32_t width, max_tokens, max_batch;    /* as allocated */
  int64_t x_stride, head_stride, ffn_stride, label_stride; /* floats between rows of x; q, k, v; ffn; logits */
  uint8_t *memory; /* all of the following */
  int64_t memory_bytes;
  float *x;        /* [B·L, H16] */
  float *q, *k, *v; /* [B·L, m·d16]; q becomes the context */
  float *ffn;      /* [B·L, m·f16], in the place of q, k, v */
  float *pooled, *dense; /* [B, H16] */
  float *logits;   /* [B, labels16] */
  int32_t *lengths; /* [B] */
  Matrix *matrices; /* [m][6] of the layer being computed */
  /* int8 mode; rows are as far apart as those of the floats */
  uint8_t *x8;             /* [B·L, H16] */
  uint8_t *work8;          /* [B·L, m·d16] or [B·L, m·f16] */
  float *x_scale, *work_scale; /* [B·L] */
  int8_t (*tables8)[6][64];    /* [m] */

  Pass pass;
};

/* ------------------------------------------------------------------ packed matrices (engine_matrix.c) */

/* The six matrices of a shard. Tables are taken as they are stored: aligned to 4 bytes. */
void shard_matrices(const ModelConfig *model, const LoadedShard *shard, Matrix matrices[STI_MATRICES]);
/* A gobo6 tensor (docs/bundle.md, "resident.bin"); its payload's bytes are returned. */
int64_t gobo6_matrix(const uint8_t *payload, int32_t outputs, int32_t inputs, uint32_t outliers, Matrix *matrix);
/* Whether the outliers' positions are ascending and inside the matrix. */
bool outliers_are_sound(const Matrix *matrix);

/* Bring a matrix's table and outliers closer, which would be waited for one by one. */
void prefetch_exceptions(const Matrix *matrix);

/* Quantize the centroid tables of `count` matrices, `step` apart, with one scale; 32-bit ones are left out.
 * tables8: that of the first, likewise `step` apart. */
void quantize_tables(Matrix *matrices, int32_t count, int32_t step, int8_t (*tables8)[64]);

/* `panels` panels of outputs of a matrix, or of the same matrix of several slices, side by side along the inputs. */
typedef struct {
  const Matrix *parts; /* [count], `step` apart */
  int32_t count, step;
  int32_t panel, panels; /* the first one, and how many */
} PanelGroup;

/* c = (add ? c : 0) + bias + Σ over parts of a[part] · part. */
typedef struct {
  PanelGroup group;
  PanelGroup next;     /* what this thread probably works on next; count 0: not known */
  int32_t part_stride; /* columns of a from part to part */
  int32_t rows;
  const float *a; /* [rows, …] */
  int64_t a_stride;
  const uint8_t *a8;      /* a quantized, rows a_stride apart; NULL: fp32 */
  const float *row_scale; /* [rows], of a8 */
  float *c;               /* [rows, 16·panels] */
  int64_t c_stride;
  const float *bias;
  bool add;
} PanelWork;
void panel_product(const Kernels *kernels, ThreadState *thread, const PanelWork *work);

/* A clock that is cheap to read; only ratios of its differences mean something. */
static inline uint64_t ticks(void) {
#if defined __x86_64__
  return __builtin_ia32_rdtsc();
#elif defined __aarch64__
  uint64_t count;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(count));
  return count;
#else
  return (uint64_t)monotonic_ns();
#endif
}

/* ------------------------------------------------------------------ phases (engine_layer.c), on all threads */

void embed_phase(void *engine, int thread);
void layer_phases(void *engine, int thread);

#endif
