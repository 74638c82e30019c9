/* kernels_check.c: every kernel of every instruction set this CPU has, against plain scalar arithmetic.
 *
 * Prints the names of the instruction sets that were checked. A difference is told on standard error; exit code 1.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../sti_runtime/native/engine_internal.h"

enum { BLOCKS = 37, MOST_ROWS = 30, MOST_INPUTS = 100, COLUMNS = MAX_PANELS * STI_PANEL, STRIDE = 144 };

static const char *checked; /* instruction set and kernel */

static void check(bool holds, const char *what, double found, double wanted) {
  if (holds) return;
  fprintf(stderr, "%s: %s: %.9g, not %.9g\n", checked, what, found, wanted);
  exit(1);
}

static uint32_t noise_state = 1;
static uint32_t noise(void) { return (noise_state = noise_state * 1664525u + 1013904223u) >> 8; }
static float noise_float(void) { return (float)noise() / (float)(1 << 24) - 0.5f; }
static int32_t between(int32_t least, int32_t most) {
  return least + (int32_t)(noise() % (uint32_t)(most - least + 1));
}

/* ------------------------------------------------------------------ codes */

static void check_decode(const Kernels *kernels, int fidelity) {
  static const int widths[7][2] = {{0}, {0}, {2, 0}, {2, 1}, {4, 0}, {4, 1}, {4, 2}};
  static uint8_t planes[2][BLOCKS * 32];
  static _Alignas(64) float out[BLOCKS * BLOCK];
  static _Alignas(64) int8_t out8[BLOCKS * BLOCK];
  float table[64];
  int8_t table8[64];
  memset(planes, 0, sizeof planes);
  for (int i = 0; i < 64; i++) table[i] = noise_float();
  for (int i = 0; i < 64; i++) table8[i] = (int8_t)((i & ((1 << fidelity) - 1)) * 2 - STI_MOST_WEIGHT8);
  static int codes[BLOCKS * BLOCK];
  for (int i = 0; i < BLOCKS * BLOCK; i++) {
    int code = codes[i] = (int)(noise() & ((1u << fidelity) - 1)), block = i / BLOCK, j = i % BLOCK;
    for (int p = 0; p < 2; p++) {
      int width = widths[fidelity][p], bits = code & ((1 << width) - 1);
      uint8_t *at = planes[p] + block * width * 8;
      if (width == 4) at[j % 32] |= (uint8_t)(bits << (j / 32 * 4));
      if (width == 2) at[j % 16] |= (uint8_t)(bits << (j / 16 * 2));
      if (width == 1) at[j / 8] |= (uint8_t)(bits << (j % 8));
      code >>= width;
    }
  }
  kernels->decode(fidelity, table, planes[0], planes[1], BLOCKS, out);
  kernels->decode8(fidelity, table8, planes[0], planes[1], BLOCKS, out8);
  for (int i = 0; i < BLOCKS * BLOCK; i++) {
    int k = i % BLOCK / STI_PANEL, n = i % STI_PANEL;
    check(out[i] == table[codes[i]], "decode", out[i], table[codes[i]]);
    int8_t found = out8[i / BLOCK * BLOCK + n * BLOCK_INPUTS + k];
    check(found == table8[codes[i]], "decode8", found, table8[codes[i]]);
  }
}

/* ------------------------------------------------------------------ products */

static float a[MOST_ROWS * STRIDE], c[MOST_ROWS * STRIDE], before[MOST_ROWS * STRIDE], bias[COLUMNS];

static void fill(float *values, int count) {
  for (int i = 0; i < count; i++) values[i] = noise_float();
}

static void check_product(const Kernels *kernels) {
  static float w[MAX_PANELS * MOST_INPUTS * STI_PANEL];
  Product p = {.rows = between(1, MOST_ROWS), .inputs = between(1, MOST_INPUTS), .panels = between(1, kernels->panels),
               .a = a, .a_stride = STRIDE, .w = w, .w_panel = MOST_INPUTS * STI_PANEL, .w_stride = STI_PANEL, .c = c,
               .c_stride = STRIDE, .bias = noise() % 2 ? bias : NULL, .add = noise() % 2};
  fill(a, MOST_ROWS * STRIDE);
  fill(w, MAX_PANELS * MOST_INPUTS * STI_PANEL);
  fill(bias, COLUMNS);
  fill(c, MOST_ROWS * STRIDE);
  memcpy(before, c, sizeof before);
  kernels->product(&p);
  for (int r = 0; r < MOST_ROWS; r++) {
    for (int n = 0; n < STRIDE; n++) {
      double wanted = before[r * STRIDE + n];
      if (r < p.rows && n < p.panels * STI_PANEL) {
        wanted = (p.add ? wanted : 0) + (p.bias ? bias[n] : 0);
        for (int k = 0; k < p.inputs; k++) {
          wanted += (double)a[r * STRIDE + k] * w[n / STI_PANEL * p.w_panel + k * STI_PANEL + n % STI_PANEL];
        }
      }
      check(fabs(c[r * STRIDE + n] - wanted) < 1e-5, "product", c[r * STRIDE + n], wanted);
    }
  }
}

static void check_product8(const Kernels *kernels) {
  static int8_t w[MAX_PANELS * MOST_INPUTS * STI_PANEL];
  static uint8_t a8[MOST_ROWS * STRIDE];
  float scale[MOST_ROWS];
  TileOutlier outliers[MAX_PANELS][5];
  int32_t blocks = between(1, MOST_INPUTS / BLOCK_INPUTS), inputs = blocks * BLOCK_INPUTS;
  Product8 p = {.rows = between(1, MOST_ROWS), .inputs = inputs, .panels = between(1, kernels->panels), .a = a8,
                .a_stride = STRIDE, .row_scale = scale, .w = w, .w_panel = MOST_INPUTS * STI_PANEL, .scale = 0.01f,
                .x = a, .x_stride = STRIDE, .c = c, .c_stride = STRIDE, .bias = noise() % 2 ? bias : NULL,
                .add = noise() % 2};
  fill(a, MOST_ROWS * STRIDE);
  fill(bias, COLUMNS);
  fill(c, MOST_ROWS * STRIDE);
  fill(scale, MOST_ROWS);
  memcpy(before, c, sizeof before);
  bool extreme = noise() % 4 == 0; /* where sums of byte products would saturate */
  for (size_t i = 0; i < sizeof w; i++) {
    const int most = STI_MOST_WEIGHT8;
    w[i] = (int8_t)(extreme ? most - 2 * most * (int)(i / 7 % 2) : between(-most, most));
  }
  for (size_t i = 0; i < sizeof a8; i++) {
    a8[i] = (uint8_t)((extreme ? 127 - 254 * (int)(i / 9 % 2) : between(-127, 127)) + kernels->offset);
  }
  for (int j = 0; j < MAX_PANELS; j++) {
    p.outliers[j] = outliers[j];
    p.outlier_count[j] = between(0, 5);
    for (int i = 0; i < 5; i++) outliers[j][i] = (TileOutlier){between(0, inputs - 1), between(0, 15), noise_float()};
  }
  kernels->product8(&p);
  for (int r = 0; r < MOST_ROWS; r++) {
    for (int n = 0; n < STRIDE; n++) {
      double wanted = before[r * STRIDE + n];
      if (r < p.rows && n < p.panels * STI_PANEL) {
        int64_t sum = 0;
        for (int k = 0; k < inputs; k++) {
          int code = kernels->offset ? a8[r * STRIDE + k] - kernels->offset : (int8_t)a8[r * STRIDE + k];
          sum += code * w[n / STI_PANEL * p.w_panel + k / 4 * BLOCK + n % STI_PANEL * 4 + k % 4];
        }
        wanted = (p.add ? wanted : 0) + (p.bias ? bias[n] : 0) + (double)sum * scale[r] * p.scale;
        for (int i = 0; i < p.outlier_count[n / STI_PANEL]; i++) {
          const TileOutlier *o = &outliers[n / STI_PANEL][i];
          if (o->output == n % STI_PANEL) wanted += (double)o->value * a[r * STRIDE + o->input];
        }
      }
      check(fabs(c[r * STRIDE + n] - wanted) < 1e-6 * (10 + fabs(wanted)), "product8", c[r * STRIDE + n], wanted);
    }
  }
}

/* ------------------------------------------------------------------ rows */

static void check_activation(const Kernels *kernels, Activation activation) {
  enum { COUNT = 4096 };
  static float x[COUNT];
  for (int i = 0; i < COUNT; i++) x[i] = (float)(i - COUNT / 2) * (20.0f / COUNT);
  kernels->activate(activation, x, 1, COUNT, COUNT);
  for (int i = 0; i < COUNT; i++) {
    double at = (double)(i - COUNT / 2) * (20.0 / COUNT), wanted = at > 0 ? at : 0;
    if (activation == ACT_GELU) wanted = at * 0.5 * (1 + erf(at * 0.70710678118654752));
    double inner = 0.79788456080286536 * (at + 0.044715 * at * at * at);
    if (activation == ACT_GELU_TANH) wanted = at * 0.5 * (1 + tanh(inner));
    check(fabs(x[i] - wanted) < 2e-6, "activate", x[i], wanted);
  }
}

static void check_normalize(const Kernels *kernels) {
  int32_t n = between(1, STRIDE);
  float weight[STRIDE], shift[STRIDE], x[STRIDE];
  fill(weight, STRIDE);
  fill(shift, STRIDE);
  for (int i = 0; i < n; i++) x[i] = 3.0f + noise_float();
  double mean = 0, square = 0;
  for (int i = 0; i < n; i++) mean += x[i] / (double)n;
  for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean) / n;
  memcpy(a, x, sizeof x);
  kernels->normalize(x, weight, shift, 1e-5, n);
  for (int i = 0; i < n; i++) {
    double wanted = (a[i] - mean) / sqrt(square + 1e-5) * weight[i] + shift[i];
    check(fabs(x[i] - wanted) < 1e-4, "normalize", x[i], wanted);
  }
}

static void check_quantize(const Kernels *kernels) {
  int32_t n = between(1, 40), parts = between(1, 3), stride = 48;
  uint8_t out[STRIDE];
  fill(a, STRIDE);
  float most = 0;
  for (int p = 0; p < parts; p++) {
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(a[p * stride + i]));
    for (int i = n; i < stride; i++) a[p * stride + i] = 100; /* padding does not count */
  }
  float scale = kernels->quantize(a, parts, n, stride, out);
  check(fabsf(scale - most / 127) <= 1e-6f * scale, "quantize: scale", scale, most / 127);
  for (int i = 0; i < parts * stride; i++) {
    double found = kernels->offset ? out[i] - kernels->offset : (int8_t)out[i];
    double wanted = i % stride < n ? a[i] / scale : 0;
    check(fabs(found - wanted) < 0.5001 && fabs(found) <= 127, "quantize", found, wanted);
  }
  memset(a, 0, sizeof a);
  scale = kernels->quantize(a, 1, n, stride, out);
  check(scale == 0 && out[0] == kernels->offset, "quantize: zeros", out[0], kernels->offset);
}

static void check_dot(const Kernels *kernels) {
  int32_t n = between(1, STRIDE);
  fill(a, STRIDE);
  fill(c, STRIDE);
  double wanted = 0;
  for (int i = 0; i < n; i++) wanted += (double)a[i] * c[i];
  float found = kernels->dot(a, c, n);
  check(fabs(found - wanted) < 1e-5, "dot", found, wanted);
}

static void check_attention(const Kernels *kernels) {
  enum { MOST_TOKENS = 40, MOST_SIZE = 40 };
  static float q[MOST_TOKENS * STRIDE], k[MOST_TOKENS * STRIDE], v[MOST_TOKENS * STRIDE], kept[MOST_TOKENS * STRIDE];
  int32_t tokens = between(1, MOST_TOKENS), length = between(1, tokens), size = between(1, MOST_SIZE);
  float *scratch = malloc((size_t)attention_scratch(tokens, size) * sizeof *scratch);
  check(scratch != NULL, "memory", 0, 1);
  for (int i = 0; i < MOST_TOKENS * STRIDE; i++) {
    kept[i] = q[i] = 4 * noise_float();
    k[i] = 4 * noise_float();
    v[i] = noise_float();
  }
  kernels->attention(&(Attention){.q = q, .k = k, .v = v, .stride = STRIDE, .tokens = tokens, .length = length,
                                  .head_size = size, .scratch = scratch});
  for (int t = 0; t < tokens; t++) {
    double score[MOST_TOKENS], most = -INFINITY, sum = 0;
    for (int u = 0; u < length; u++) {
      score[u] = 0;
      for (int i = 0; i < size; i++) score[u] += (double)kept[t * STRIDE + i] * k[u * STRIDE + i];
      score[u] /= sqrt(size);
      most = fmax(most, score[u]);
    }
    for (int u = 0; u < length; u++) sum += score[u] = exp(score[u] - most);
    for (int i = 0; i < size; i++) {
      double wanted = 0;
      for (int u = 0; u < length; u++) wanted += score[u] / sum * v[u * STRIDE + i];
      check(fabs(q[t * STRIDE + i] - wanted) < 1e-5, "attention", q[t * STRIDE + i], wanted);
    }
  }
  free(scratch);
}

int main(void) {
  for (Isa isa = ISA_PORTABLE; isa <= ISA_NEON_DOTPROD; isa++) {
    if (!isa_available(isa)) continue;
    Kernels kernels;
    kernels_get(isa, &kernels);
    checked = isa_name(isa);
    check(kernels.isa == isa, "isa", kernels.isa, isa);
    for (int fidelity = 2; fidelity <= 6; fidelity++) check_decode(&kernels, fidelity);
    for (int round = 0; round < 60; round++) {
      check_product(&kernels);
      check_product8(&kernels);
      check_normalize(&kernels);
      check_quantize(&kernels);
      check_dot(&kernels);
      check_attention(&kernels);
    }
    for (Activation activation = ACT_GELU; activation <= ACT_RELU; activation++) check_activation(&kernels, activation);
    printf("%s\n", isa_name(isa));
  }
  return 0;
}
