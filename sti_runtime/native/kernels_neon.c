/* kernels_neon.c: NEON, 64-bit and 32-bit ARM. Dictionaries are looked up a byte of the float at a time. */
#if defined __aarch64__ || (defined __arm__ && defined __ARM_NEON)

#include <arm_neon.h>

#define VW 4
#define NV8 4
#define OFFSET 0
#ifdef __aarch64__
#define MR 6
#define NV 4
#define MR8 4
#else
#define MR 4
#define NV 2
#define MR8 2
#endif

#include "kernels_vector.h"

INLINE VI dot4(VI sum, VI weights, int32_t a) {
  int8x16_t w = (int8x16_t)weights;
  int8x8_t x = vreinterpret_s8_s32(vdup_n_s32(a));
  int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), x)), high = vpaddlq_s16(vmull_s8(vget_high_s8(w), x));
  int32x2_t first = vpadd_s32(vget_low_s32(low), vget_high_s32(low));
  int32x2_t second = vpadd_s32(vget_low_s32(high), vget_high_s32(high));
  return sum + (VI)vcombine_s32(first, second);
}

#include "kernels_template.h"

/* ------------------------------------------------------------------ codes and look-up */

/* The 64 codes of a block, 16 per input. */
INLINE void block_codes(const int fidelity, const uint8_t *low, const uint8_t *high, uint8x16_t code[BLOCK_INPUTS]) {
  if (fidelity <= 3) {
    uint8x16_t quads = vld1q_u8(low);
    UNROLL for (int k = 0; k < BLOCK_INPUTS; k++) code[k] = (quads >> (uint8_t)(2 * k)) & 3;
  } else {
    UNROLL for (int k = 0; k < 2; k++) {
      uint8x16_t both = vld1q_u8(low + 16 * k);
      code[k] = both & 15;
      code[k + 2] = both >> 4;
    }
  }
  if (fidelity == 3 || fidelity == 5) {
    static const uint8_t each_bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bit = vld1q_u8(each_bit);
    UNROLL for (int k = 0; k < BLOCK_INPUTS; k++) {
      uint8x16_t spread = vcombine_u8(vdup_n_u8(high[2 * k]), vdup_n_u8(high[2 * k + 1]));
      code[k] |= vtstq_u8(spread, bit) & vdupq_n_u8(fidelity == 3 ? 4 : 16);
    }
  }
  if (fidelity == 6) {
    uint8x16_t quads = vld1q_u8(high);
    UNROLL for (int k = 0; k < BLOCK_INPUTS; k++) code[k] |= ((quads >> (uint8_t)(2 * k)) & 3) << 4;
  }
}

/* Bytes of a table of 16, 32 or 64, by codes below that. */
INLINE uint8x16_t look_up(const uint8x16_t table[4], const int entries, uint8x16_t code) {
#ifdef __aarch64__
  if (entries <= 16) return vqtbl1q_u8(table[0], code);
  if (entries <= 32) return vqtbl2q_u8((uint8x16x2_t){{table[0], table[1]}}, code);
  return vqtbl4q_u8((uint8x16x4_t){{table[0], table[1], table[2], table[3]}}, code);
#else
  uint8x8_t half[2] = {vget_low_u8(code), vget_high_u8(code)};
  uint8x8x4_t first = {{vget_low_u8(table[0]), vget_high_u8(table[0]), vget_low_u8(table[1]), vget_high_u8(table[1])}};
  uint8x8x4_t last = {{vget_low_u8(table[2]), vget_high_u8(table[2]), vget_low_u8(table[3]), vget_high_u8(table[3])}};
  for (int i = 0; i < 2; i++) {
    uint8x8_t c = half[i];
    half[i] = entries <= 16 ? vtbl2_u8((uint8x8x2_t){{first.val[0], first.val[1]}}, c) : vtbl4_u8(first, c);
    if (entries > 32) half[i] = vtbx4_u8(half[i], last, vsub_u8(c, vdup_n_u8(32))); /* keeps what is out of range */
  }
  return vcombine_u8(half[0], half[1]);
#endif
}

/* ------------------------------------------------------------------ codes → floats */

INLINE void decode_blocks(const int fidelity, const float *table, const uint8_t *low, const uint8_t *high,
                          int64_t blocks, float *out) {
  const int entries = 1 << fidelity;
  float padded[16];
  uint8x16_t bytes[4][4]; /* [byte of the float][entries] */
  for (int i = 0; i < 16; i++) padded[i] = table[i & (entries - 1)];
  for (int i = 0; i < 4; i++) {
    uint8x16x4_t planes = vld4q_u8((const uint8_t *)(i * 16 < entries && entries > 16 ? table + 16 * i : padded));
    for (int b = 0; b < 4; b++) bytes[b][i] = planes.val[b];
  }
  for (int64_t block = 0; block < blocks; block++) {
    uint8x16_t code[BLOCK_INPUTS];
    block_codes(fidelity, low, high, code);
    low += fidelity <= 3 ? 16 : 32;
    high += fidelity == 3 || fidelity == 5 ? 8 : fidelity == 6 ? 16 : 0;
    UNROLL for (int k = 0; k < BLOCK_INPUTS; k++, out += STI_PANEL) {
      uint8x16x4_t value;
      UNROLL for (int b = 0; b < 4; b++) value.val[b] = look_up(bytes[b], entries, code[k]);
      vst4q_u8((uint8_t *)out, value);
    }
  }
}

static void decode(int fidelity, const float *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                   float *out) {
  EACH_FIDELITY(decode_blocks)
}

/* ------------------------------------------------------------------ codes → int8, [16][4] */

INLINE void decode8_blocks(const int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high,
                           int64_t blocks, int8_t *out) {
  uint8x16_t rows[4];
  for (int i = 0; i < 4; i++) rows[i] = vld1q_u8((const uint8_t *)table + 16 * i);
  for (int64_t block = 0; block < blocks; block++, out += BLOCK) {
    uint8x16_t code[BLOCK_INPUTS];
    uint8x16x4_t value;
    block_codes(fidelity, low, high, code);
    low += fidelity <= 3 ? 16 : 32;
    high += fidelity == 3 || fidelity == 5 ? 8 : fidelity == 6 ? 16 : 0;
    UNROLL for (int k = 0; k < BLOCK_INPUTS; k++) value.val[k] = look_up(rows, 1 << fidelity, code[k]);
    vst4q_u8((uint8_t *)out, value);
  }
}

static void decode8(int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                    int8_t *out) {
  EACH_FIDELITY(decode8_blocks)
}

void kernels_neon(Kernels *kernels) {
  fill_kernels(kernels);
  kernels->isa = ISA_NEON;
  kernels->panels = 1;
  kernels->depth = 256;
  kernels->depth8 = 768;
  kernels->decode = decode;
  kernels->decode8 = decode8;
}

#else
typedef int kernels_neon_are_for_another_target;
#endif
