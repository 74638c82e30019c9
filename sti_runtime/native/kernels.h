/* kernels.h: the inner loops, once per instruction set. All work on panels: 16 outputs by any number of inputs.
 *
 * Shapes: a tile is [panels][depth][16] floats (or, for int8, [panels][depth/4][16][4] bytes): what a product consumes,
 * panel after panel, input after input. Weights come as blocks of 64 codes, 4 inputs by 16 outputs (docs/bundle.md).
 */
#ifndef STI_KERNELS_H
#define STI_KERNELS_H

#include "engine.h"

enum { BLOCK = 64, BLOCK_INPUTS = 4, MAX_PANELS = 2, CACHE_LINE_BYTES = 64 };

/* Memory to bring closer during a product, a few cache lines per block of rows: all at once would stall it. */
enum { AHEAD_SPANS = 64 };
typedef struct {
  struct { uintptr_t start; int32_t lines; } spans[AHEAD_SPANS]; /* [count] */
  int32_t count, lines; /* lines: of all spans that are left */
} Ahead;

/* Of int8 weights, on every ISA: the most with which two products with an unsigned byte sum up in 16 bits (AVX2 has no
 * other product of bytes). Activations keep all 8 bits, for theirs are the larger errors. */
#define STI_MOST_WEIGHT8 64

/* c = (add ? c : 0) + (bias ? bias : 0) + a · w: `panels` panels, 16·panels columns of c. */
typedef struct {
  int32_t rows, inputs, panels;
  const float *a; /* [rows, inputs], rows a_stride apart */
  int64_t a_stride;
  const float *w; /* [panels][inputs][16]: panels w_panel apart, inputs w_stride apart */
  int64_t w_panel, w_stride;
  float *c; /* [rows, 16·panels], rows c_stride apart */
  int64_t c_stride;
  const float *bias; /* [16·panels] or NULL */
  bool add;
  Ahead *ahead; /* NULL: nothing */
} Product;

/* A weight that has no code: its input in the tile, its output in its panel. */
typedef struct { int32_t input, output; float value; } TileOutlier;

/* c = (add ? c : 0) + bias + row_scale · scale · (a − offset) · w + outliers · x. */
typedef struct {
  int32_t rows, inputs, panels;             /* inputs: a multiple of 4 */
  const uint8_t *a;                         /* [rows, inputs]: signed, or unsigned with an offset (Kernels.offset) */
  int64_t a_stride;
  const float *row_scale;                   /* [rows] */
  const int8_t *w;                          /* [panels][inputs/4][16][4], panels w_panel apart; ± STI_MOST_WEIGHT8 */
  int64_t w_panel;
  float scale;                              /* of the weights */
  const float *x;                           /* [rows, inputs]: a before quantization */
  int64_t x_stride;
  const TileOutlier *outliers[MAX_PANELS];  /* [outlier_count] */
  int32_t outlier_count[MAX_PANELS];
  float *c;
  int64_t c_stride;
  const float *bias;
  bool add;
  Ahead *ahead;
} Product8;

/* One head of one row: q [tokens, d] becomes its context. */
typedef struct {
  float *q; /* [tokens, 16·⌈d/16⌉], rows `stride` apart, as k and v */
  const float *k, *v; /* [length, …] */
  int64_t stride;
  int32_t tokens, length, head_size;
  float *scratch; /* [attention_scratch] */
} Attention;

typedef struct {
  Isa isa;
  int panels;     /* panels of a tile */
  int depth;      /* inputs of a tile, a multiple of 4 */
  int depth8;     /* the same for int8 */
  int offset;     /* int8 activations are stored plus this: 0 (signed) or 128 (unsigned) */

  /* blocks · 64 codes → floats; low, high: the planes at the first block; table [2^fidelity]; out 64-byte aligned */
  void (*decode)(int fidelity, const float *table, const uint8_t *low, const uint8_t *high, int64_t blocks, float *out);
  /* … → int8, each block transposed to [16][4]; table [64], entry i is that of code i mod 2^fidelity */
  void (*decode8)(int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                  int8_t *out);
  void (*product)(const Product *product);
  void (*product8)(const Product8 *product);
  void (*activate)(Activation activation, float *x, int32_t rows, int32_t columns, int64_t stride); /* columns: ·16 */
  void (*attention)(const Attention *attention);
  /* x [n] += y (and z unless NULL) */
  void (*sum)(float *x, const float *word, const float *position, const float *type, int32_t n);
  void (*normalize)(float *x, const float *weight, const float *bias, double eps, int32_t n);
  /* parts [parts][n], `stride` apart, → out likewise, columns n … stride are zero; returns the scale */
  float (*quantize)(const float *x, int32_t parts, int32_t n, int64_t stride, uint8_t *out);
  float (*dot)(const float *x, const float *y, int32_t n);
} Kernels;

/* Kernels of an ISA that is available. */
void kernels_get(Isa isa, Kernels *kernels);
/* Floats of scratch that attention needs. */
int64_t attention_scratch(int32_t tokens, int32_t head_size);

/* One per file, absent on other architectures. */
void kernels_portable(Kernels *kernels);
void kernels_avx2(Kernels *kernels);
void kernels_avx512(Kernels *kernels);
void kernels_neon(Kernels *kernels);
void kernels_neon_dotprod(Kernels *kernels);

#endif
