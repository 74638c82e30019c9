/* kernels_template.h: the kernels in terms of kernels_vector.h. A kernels_<isa>.c first defines what kernels_int8.h
 * needs, and
 *
 *   MR, NV       rows by vectors of a product's accumulators; NV·VW divides 16 or is 16·MAX_PANELS
 */
#ifndef STI_KERNELS_TEMPLATE_H
#define STI_KERNELS_TEMPLATE_H

#include "kernels_int8.h"

/* ------------------------------------------------------------------ fp32 product */

/* rows × vectors accumulators stay in registers over all inputs. a, c: at the block's first row; column: of c. */
INLINE void product_block(const Product *p, const float *a, float *c, int column, const int rows, const int vectors) {
  V sum[MR][NV];
  const float *w[NV], *bases[(MR + 2) / 3]; /* every third row: the two after it are one and two strides away */
  const int64_t stride = p->a_stride, w_stride = p->w_stride, c_stride = p->c_stride;
  UNROLL for (int j = 0; j < vectors; j++) {
    int at = column + j * VW;
    w[j] = p->w + at / STI_PANEL * p->w_panel + at % STI_PANEL;
    V bias = p->bias ? load(p->bias + at) : splat(0);
    UNROLL for (int r = 0; r < rows; r++) sum[r][j] = bias;
  }
  if (p->add) {
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int j = 0; j < vectors; j++) sum[r][j] += load(c + r * c_stride + column + j * VW);
    }
  }
  UNROLL for (int r = 0; r < rows; r += 3) bases[r / 3] = a + r * stride;
  UNROLL_INPUTS for (int32_t k = p->inputs; k > 0; k--) {
    V weight[NV];
    UNROLL for (int j = 0; j < vectors; j++) {
      weight[j] = load(w[j]);
      w[j] += w_stride;
    }
    UNROLL for (int r = 0; r < rows; r++) {
      V x = splat(bases[r / 3][r % 3 * stride]);
      UNROLL for (int j = 0; j < vectors; j++) sum[r][j] = fused(sum[r][j], weight[j], x);
    }
    UNROLL for (int r = 0; r < rows; r += 3) bases[r / 3]++;
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int j = 0; j < vectors; j++) store(c + r * c_stride + column + j * VW, sum[r][j]);
  }
}

INLINE void product_rows(const Product *p, const float *a, float *c, int column, int rows, const int vectors) {
#define CALL(R) product_block(p, a, c, column, R, vectors)
  switch (rows) { CASES_OF(MR, CALL) }
#undef CALL
}

__attribute__((noinline)) static void product(const Product *p) {
  for (int32_t row = 0, rows; row < p->rows; row += rows) {
    rows = block_rows(p->rows - row, MR);
    bring_closer(p->ahead, (p->rows - row + MR - 1) / MR);
    const float *a = p->a + row * p->a_stride;
    float *c = p->c + row * p->c_stride;
    int column = 0, end = p->panels * STI_PANEL;
    for (; column + NV * VW <= end; column += NV * VW) product_rows(p, a, c, column, rows, NV);
#if NV * VW > 16
    if (column < end) product_rows(p, a, c, column, rows, STI_PANEL / VW);
#endif
  }
}

/* ------------------------------------------------------------------ attention */

/* Scores of `rows` rows [rows, columns], of which `length` count → probabilities; exp((s − max) · scale) / sum. */
INLINE void softmax(float *scores, int32_t rows, int32_t length, int32_t columns, float scale) {
  for (int32_t r = 0; r < rows; r++, scores += columns) {
    for (int32_t i = length; i < columns; i++) scores[i] = -INFINITY;
    V most = load(scores), sum = splat(0);
    for (int32_t i = VW; i < columns; i += VW) most = max_v(most, load(scores + i));
    float shift = max_of(most);
    for (int32_t i = 0; i < columns; i += VW) {
      V e = exp_v((load(scores + i) - shift) * scale);
      sum += select_v(lanes() < length - i, e, splat(0));
      store(scores + i, e);
    }
    float inverse = 1.0f / sum_of(sum);
    for (int32_t i = 0; i < columns; i += VW) store(scores + i, load(scores + i) * inverse);
  }
}

static void attention(const Attention *t) {
  int32_t d = t->head_size, columns = (t->length + STI_PANEL - 1) / STI_PANEL * STI_PANEL;
  float *keys = t->scratch;               /* [columns/16][d][16]: k as a product's weights */
  float *scores = keys + (int64_t)columns * d; /* [MR, columns] */
  for (int32_t token = 0; token < columns; token++) {
    float *to = keys + (int64_t)(token / STI_PANEL) * d * STI_PANEL + token % STI_PANEL;
    const float *from = t->k + least(token, t->length - 1) * t->stride;
    for (int32_t i = 0; i < d; i++) to[i * STI_PANEL] = from[i];
  }
  for (int32_t row = 0, rows; row < t->tokens; row += rows) {
    rows = block_rows(t->tokens - row, MR);
    float *q = t->q + row * t->stride;
    product(&(Product){.rows = rows, .inputs = d, .panels = columns / STI_PANEL, .a = q, .a_stride = t->stride,
                       .w = keys, .w_panel = (int64_t)d * STI_PANEL, .w_stride = STI_PANEL, .c = scores,
                       .c_stride = columns});
    softmax(scores, rows, t->length, columns, 1.0f / sqrtf((float)d));
    product(&(Product){.rows = rows, .inputs = t->length, .panels = (d + STI_PANEL - 1) / STI_PANEL, .a = scores,
                       .a_stride = columns, .w = t->v, .w_panel = STI_PANEL, .w_stride = t->stride, .c = q,
                       .c_stride = t->stride});
  }
}

/* ------------------------------------------------------------------ rows */

static void activate(Activation activation, float *x, int32_t rows, int32_t columns, int64_t stride) {
  for (int32_t r = 0; r < rows; r++, x += stride) {
    for (int32_t i = 0; i < columns; i += VW) store(x + i, activate_v(activation, load(x + i)));
  }
}

static void sum(float *x, const float *word, const float *position, const float *type, int32_t n) {
  for (int32_t i = 0; i < n; i++) x[i] = word[i] + position[i] + (type ? type[i] : 0.0f);
}

static void normalize(float *x, const float *weight, const float *bias, double eps, int32_t n) {
  int32_t whole = n / VW * VW;
  V part = n > whole ? load_some(x + whole, n - whole, 0) : splat(0);
  for (int32_t i = 0; i < whole; i += VW) part += load(x + i);
  float mean = sum_of(part) / (float)n;
  part = n > whole ? load_some(x + whole, n - whole, mean) - mean : splat(0);
  part *= part;
  for (int32_t i = 0; i < whole; i += VW) {
    V off = load(x + i) - mean;
    part += off * off;
  }
  float scale = (float)(1.0 / sqrt((double)sum_of(part) / n + eps));
  for (int32_t i = 0; i < whole; i += VW) {
    store(x + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
  }
  for (int32_t i = whole; i < n; i++) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

static float dot(const float *x, const float *y, int32_t n) {
  int32_t whole = n / VW * VW;
  V part = splat(0);
  for (int32_t i = 0; i < whole; i += VW) part += load(x + i) * load(y + i);
  float result = sum_of(part);
  for (int32_t i = whole; i < n; i++) result += x[i] * y[i];
  return result;
}

/* ------------------------------------------------------------------ the table */

/* A function made for each fidelity from one that takes it as a constant. */
#define EACH_FIDELITY(function)                                 \
  switch (fidelity) {                                           \
    case 2: function(2, table, low, high, blocks, out); break;  \
    case 3: function(3, table, low, high, blocks, out); break;  \
    case 4: function(4, table, low, high, blocks, out); break;  \
    case 5: function(5, table, low, high, blocks, out); break;  \
    default: function(6, table, low, high, blocks, out); break; \
  }

/* All but isa, panels, depth, depth8, decode and decode8. */
INLINE void fill_kernels(Kernels *kernels) {
  kernels->product = product;
  kernels->activate = activate;
  kernels->attention = attention;
  kernels->sum = sum;
  kernels->normalize = normalize;
  kernels->dot = dot;
  fill_int8_kernels(kernels);
}

#endif
