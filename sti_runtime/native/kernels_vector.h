/* kernels_vector.h: vectors of VW floats, and what is computed with them alike on every instruction set.
 *
 * Include after defining VW, and FEW_REGISTERS where a product's accumulators take most of them: unrolled further, its
 * loop would keep some in memory. The compiler turns the arithmetic into the instructions of the file's target.
 */
#ifndef STI_KERNELS_VECTOR_H
#define STI_KERNELS_VECTOR_H

#include <math.h>
#include <string.h>

#include "kernels.h"
#if defined __arm__ && defined __ARM_NEON
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#ifdef FEW_REGISTERS
#define UNROLL_INPUTS _Pragma("clang loop unroll_count(2)")
#else
#define UNROLL_INPUTS _Pragma("clang loop unroll_count(4)")
#endif
#else
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_INPUTS _Pragma("GCC unroll 2")
#endif

typedef float V __attribute__((vector_size(4 * VW)));
typedef int32_t VI __attribute__((vector_size(4 * VW)));
typedef int8_t VB __attribute__((vector_size(VW)));
typedef float LooseV __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef int32_t LooseVI __attribute__((vector_size(4 * VW), aligned(1), may_alias));
typedef int8_t LooseVB __attribute__((vector_size(VW), aligned(1), may_alias));

INLINE V load(const float *from) { return *(const LooseV *)from; }
INLINE void store(float *to, V value) { *(LooseV *)to = value; }
INLINE VI load_ints(const int32_t *from) { return *(const LooseVI *)from; }
INLINE VI load_bytes(const int8_t *from) { return *(const LooseVI *)from; }
INLINE V splat(float value) { return value - (V){0}; }
INLINE VI splat_int(int32_t value) { return value - (VI){0}; }
INLINE V select_v(VI mask, V yes, V no) { return (V)((mask & (VI)yes) | (~mask & (VI)no)); }
INLINE V max_v(V a, V b) { return select_v(a > b, a, b); }
INLINE V min_v(V a, V b) { return select_v(a < b, a, b); }
/* sum + a · b; fused where that is one instruction. Compilers contract the sum themselves, but not on 32-bit ARM. */
INLINE V fused(V sum, V a, V b) {
#if defined __arm__ && defined __ARM_NEON && defined __ARM_FEATURE_FMA
  return (V)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return sum + a * b;
#endif
}

INLINE VI lanes(void) {
  VI lane;
  UNROLL for (int i = 0; i < VW; i++) lane[i] = i;
  return lane;
}

INLINE float sum_of(V value) {
  float sum = 0;
  for (int i = 0; i < VW; i++) sum += value[i];
  return sum;
}

INLINE float max_of(V value) {
  float most = value[0];
  for (int i = 1; i < VW; i++) most = value[i] > most ? value[i] : most;
  return most;
}

/* The first n < VW floats, the rest `fill`; and their store. */
INLINE V load_some(const float *from, int n, float fill) {
  float some[VW];
  for (int i = 0; i < VW; i++) some[i] = i < n ? from[i] : fill;
  return load(some);
}

INLINE void store_some(float *to, V value, int n) {
  for (int i = 0; i < n; i++) to[i] = value[i];
}

/* Adding 1.5 · 2^23 leaves the nearest integer in a float's low bits. */
#define ROUNDER 12582912.0f

/* Source: Cephes expf; within 2 units in the last place on [−87, 88], clamped there. */
INLINE V exp_v(V x) {
  x = min_v(max_v(x, splat(-87.3f)), splat(88.3f));
  V rounded = x * 1.44269504088896341f + ROUNDER;
  V n = rounded - ROUNDER;
  x = x - n * 0.693359375f;
  x = x + n * 2.12194440e-4f;
  V y = splat(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.0f;
  return y * (V)(((VI)rounded + (127 - 0x4B400000)) << 23);
}

/* Source: the rational minimax approximation of Eigen's perf; absolute error below 4.2e-7. */
INLINE V erf_v(V x) {
  x = min_v(max_v(x, splat(-4.0f)), splat(4.0f));
  V square = x * x;
  V p = splat(-2.72614225801306e-10f);
  p = p * square + 2.77068142495902e-08f;
  p = p * square + -2.10102402082508e-06f;
  p = p * square + -5.69250639462346e-05f;
  p = p * square + -7.34990630326855e-04f;
  p = p * square + -2.95459980854025e-03f;
  p = p * square + -1.60960333262415e-02f;
  V q = splat(-1.45660718464996e-05f);
  q = q * square + -2.13374055278905e-04f;
  q = q * square + -1.68282697438203e-03f;
  q = q * square + -7.37332916720468e-03f;
  q = q * square + -1.42647390514189e-02f;
  return x * p / q;
}

INLINE V activate_v(Activation activation, V x) {
  if (activation == ACT_RELU) return max_v(x, splat(0));
  if (activation == ACT_GELU) return x * 0.5f * (erf_v(x * 0.70710678118654752f) + 1.0f);
  /* ½x(1 + tanh u) = x / (1 + exp(−2u)) */
  V u = (x * x * 0.044715f + 1.0f) * x * 0.79788456080286536f;
  return x / (exp_v(u * -2.0f) + 1.0f);
}

/* ------------------------------------------------------------------ blocks of rows */

/* The micro-kernels' row counts, most first, as cases of a switch. */
#define CASE(R, call) \
  case R:             \
    call(R);          \
    break;
#define CASES_2(call) CASE(2, call) CASE(1, call)
#define CASES_4(call) CASE(4, call) CASES_2(call)
#define CASES_6(call) CASE(6, call) CASES_4(call)
#define CASES_12(call) CASE(12, call) CASE(8, call) CASES_4(call)
#define CASES_OF(rows, call) CASES_PASTE(rows, call)
#define CASES_PASTE(rows, call) CASES_##rows(call)

/* Rows of the next block when `left` are left: one of the cases of `most`. */
INLINE int32_t block_rows(int32_t left, int32_t most) {
  if (left >= most) return most;
  if (left >= 8 && most > 8) return 8;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

/* A block's share of what is to be brought closer, `blocks` being left, this one included. */
INLINE void bring_closer(Ahead *ahead, int32_t blocks) {
  if (!ahead || ahead->lines == 0) return;
  for (int32_t share = (ahead->lines + blocks - 1) / blocks; share > 0; share--) {
    if (ahead->spans[ahead->count - 1].lines == 0) ahead->count--;
    uintptr_t line = (uintptr_t)--ahead->spans[ahead->count - 1].lines * CACHE_LINE_BYTES;
    __builtin_prefetch((const void *)(ahead->spans[ahead->count - 1].start + line), 0, 2); /* into the second cache */
    ahead->lines--;
  }
}

#endif
