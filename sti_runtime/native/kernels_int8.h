/* kernels_int8.h: products of int8 and the quantization of activations. The file that includes it first defines
 *
 *   VW           then includes kernels_vector.h
 *   MR8, NV8     rows by vectors of a product's accumulators; NV8·VW divides 16 or is 16·MAX_PANELS
 *   OFFSET       of activations, 0 or 128
 *   dot4         VI dot4(VI sum, VI weights, int32_t a): in each lane, sum plus the products of 4 bytes of weights with
 *                those of a
 */
#ifndef STI_KERNELS_INT8_H
#define STI_KERNELS_INT8_H

#include "kernels_vector.h"

INLINE void product8_block(const Product8 *p, int32_t row, const int32_t *sums, int column, const int rows,
                           const int vectors) {
  VI sum[MR8][NV8];
  const int8_t *w[NV8];
  const uint8_t *bases[(MR8 + 2) / 3];
  const int64_t stride = p->a_stride, x_stride = p->x_stride, c_stride = p->c_stride;
  UNROLL for (int j = 0; j < vectors; j++) {
    int at = column + j * VW;
    w[j] = p->w + at / STI_PANEL * p->w_panel + at % STI_PANEL * BLOCK_INPUTS;
    VI start = OFFSET ? load_ints(sums + at) * -OFFSET : splat_int(0);
    UNROLL for (int r = 0; r < rows; r++) sum[r][j] = start;
  }
  UNROLL for (int r = 0; r < rows; r += 3) bases[r / 3] = p->a + (row + r) * stride;
  UNROLL_INPUTS for (int32_t k = p->inputs; k > 0; k -= BLOCK_INPUTS) {
    VI weight[NV8];
    UNROLL for (int j = 0; j < vectors; j++) {
      weight[j] = load_bytes(w[j]);
      w[j] += BLOCK;
    }
    UNROLL for (int r = 0; r < rows; r++) {
      int32_t a;
      memcpy(&a, bases[r / 3] + r % 3 * stride, sizeof a);
      UNROLL for (int j = 0; j < vectors; j++) sum[r][j] = dot4(sum[r][j], weight[j], a);
    }
    UNROLL for (int r = 0; r < rows; r += 3) bases[r / 3] += BLOCK_INPUTS;
  }
  UNROLL for (int j = 0; j < vectors; j++) {
    int at = column + j * VW;
    float *c = p->c + row * c_stride + at;
    V out[MR8], bias = p->bias ? load(p->bias + at) : splat(0);
    UNROLL for (int r = 0; r < rows; r++) {
      out[r] = __builtin_convertvector(sum[r][j], V) * (p->scale * p->row_scale[row + r]) + bias;
      if (p->add) out[r] += load(c + r * c_stride);
    }
    const TileOutlier *outlier = p->outliers[at / STI_PANEL], *end = outlier + p->outlier_count[at / STI_PANEL];
    for (; outlier < end; outlier++) {
      if (outlier->output / VW != at % STI_PANEL / VW) continue;
      V weight = select_v(lanes() == outlier->output % VW, splat(outlier->value), splat(0));
      const float *x = p->x + row * x_stride + outlier->input;
      UNROLL for (int r = 0; r < rows; r++) out[r] += weight * x[r * x_stride];
    }
    UNROLL for (int r = 0; r < rows; r++) store(c + r * c_stride, out[r]);
  }
}

INLINE void product8_rows(const Product8 *p, int32_t row, const int32_t *sums, int column, int rows,
                          const int vectors) {
#define CALL(R) product8_block(p, row, sums, column, R, vectors)
  switch (rows) { CASES_OF(MR8, CALL) }
#undef CALL
}

static void product8(const Product8 *p) {
  int32_t sums[MAX_PANELS * STI_PANEL]; /* of each output's weights: what an offset adds */
  int end = p->panels * STI_PANEL, last = 0;
  for (int at = 0; OFFSET && at < end; at += VW) {
    VI sum = splat_int(0);
    const int8_t *w = p->w + at / STI_PANEL * p->w_panel + at % STI_PANEL * BLOCK_INPUTS;
    for (int32_t k = 0; k < p->inputs; k += BLOCK_INPUTS, w += BLOCK) sum = dot4(sum, load_bytes(w), 0x01010101);
    *(LooseVI *)(sums + at) = sum;
  }
  for (int32_t row = 0, rows; row < p->rows; row += rows) {
    rows = block_rows(p->rows - row, MR8);
    bring_closer(p->ahead, (p->rows - row + MR8 - 1) / MR8);
    for (last = 0; last + NV8 * VW <= end; last += NV8 * VW) product8_rows(p, row, sums, last, rows, NV8);
#if NV8 * VW > 16
    if (last < end) product8_rows(p, row, sums, last, rows, STI_PANEL / VW);
#endif
  }
}

static float quantize(const float *x, int32_t parts, int32_t n, int64_t stride, uint8_t *out) {
  V most = splat(0);
  int32_t whole = n / VW * VW;
  for (int32_t p = 0; p < parts; p++) {
    const float *from = x + p * stride;
    for (int32_t i = 0; i < whole; i += VW) most = max_v(most, max_v(load(from + i), -load(from + i)));
    if (n > whole) {
      V some = load_some(from + whole, n - whole, 0);
      most = max_v(most, max_v(some, -some));
    }
  }
  float scale = max_of(most) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int32_t p = 0; p < parts; p++) {
    const float *from = x + p * stride;
    uint8_t *to = out + p * stride;
    for (int32_t i = 0; i < whole; i += VW) {
      VI code = (VI)(load(from + i) * inverse + ROUNDER) - (0x4B400000 - OFFSET);
      *(LooseVB *)(to + i) = __builtin_convertvector(code, VB);
    }
    for (int32_t i = whole; i < stride; i++) to[i] = (uint8_t)(i < n ? lrintf(from[i] * inverse) + OFFSET : OFFSET);
  }
  return scale;
}

INLINE void fill_int8_kernels(Kernels *kernels) {
  kernels->product8 = product8;
  kernels->quantize = quantize;
  kernels->offset = OFFSET;
}

#endif
