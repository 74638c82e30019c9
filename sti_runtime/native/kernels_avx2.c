/* kernels_avx2.c: AVX2 with FMA. */
#if defined __x86_64__ && defined __AVX2__ && defined __FMA__

#include <immintrin.h>

#define VW 8
#define MR 6
#define NV 2
#define MR8 4
#define NV8 2
#define OFFSET 128
#define FEW_REGISTERS

#include "kernels_vector.h"

/* Byte products are of an unsigned and a signed factor; two of them fit 16 bits, for weights are STI_MOST_WEIGHT8 at most. */
INLINE VI dot4(VI sum, VI weights, int32_t a) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(a), (__m256i)weights);
  return sum + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#include "kernels_template.h"

/* ------------------------------------------------------------------ codes */

/* The 64 codes of a block, 16 per input. */
INLINE void block_codes(const int fidelity, const uint8_t *low, const uint8_t *high, __m128i code[BLOCK_INPUTS]) {
  const __m128i nibble = _mm_set1_epi8(15), pair = _mm_set1_epi8(3);
  if (fidelity <= 3) {
    __m128i quads = _mm_loadu_si128((const __m128i *)low);
    for (int k = 0; k < BLOCK_INPUTS; k++) code[k] = _mm_and_si128(_mm_srli_epi16(quads, 2 * k), pair);
  } else {
    for (int k = 0; k < 2; k++) {
      __m128i both = _mm_loadu_si128((const __m128i *)(low + 16 * k));
      code[k] = _mm_and_si128(both, nibble);
      code[k + 2] = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
    }
  }
  if (fidelity == 3 || fidelity == 5) {
    /* byte n looks at bit n mod 8 of byte 2k + n/8 */
    const __m128i bit = _mm_set1_epi64x((int64_t)0x8040201008040201), half = _mm_set_epi64x(0x0101010101010101, 0);
    __m128i bits = _mm_loadl_epi64((const __m128i *)high), value = _mm_set1_epi8(fidelity == 3 ? 4 : 16);
    for (int k = 0; k < BLOCK_INPUTS; k++) {
      __m128i spread = _mm_shuffle_epi8(bits, _mm_add_epi8(half, _mm_set1_epi8((char)(2 * k))));
      __m128i set = _mm_cmpeq_epi8(_mm_and_si128(spread, bit), bit);
      code[k] = _mm_or_si128(code[k], _mm_and_si128(set, value));
    }
  }
  if (fidelity == 6) {
    __m128i quads = _mm_loadu_si128((const __m128i *)high);
    for (int k = 0; k < BLOCK_INPUTS; k++) {
      __m128i upper = _mm_and_si128(_mm_srli_epi16(quads, 2 * k), pair);
      code[k] = _mm_or_si128(code[k], _mm_slli_epi16(upper, 4));
    }
  }
}

/* Bytes of a table of up to 64, by codes below 64: 16 entries at a time. */
INLINE __m128i look_up(const __m128i *table, const int entries, __m128i code) {
  __m128i value = _mm_shuffle_epi8(table[0], code); /* looks at bits 0–3 */
  if (entries > 16) value = _mm_blendv_epi8(value, _mm_shuffle_epi8(table[1], code), _mm_slli_epi16(code, 3));
  if (entries > 32) {
    __m128i upper = _mm_shuffle_epi8(table[2], code);
    upper = _mm_blendv_epi8(upper, _mm_shuffle_epi8(table[3], code), _mm_slli_epi16(code, 3));
    value = _mm_blendv_epi8(value, upper, _mm_slli_epi16(code, 2));
  }
  return value;
}

/* ------------------------------------------------------------------ codes → floats */

/* 16 floats → row i of each table of bytes. */
INLINE void byte_planes(const float *floats, int i, __m128i bytes[4][4]) {
  const __m128i gather = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m128i part[4]; /* four floats each: their bytes 0, then 1, 2, 3 */
  for (int j = 0; j < 4; j++) part[j] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)floats + j), gather);
  __m128i a = _mm_unpacklo_epi32(part[0], part[1]), b = _mm_unpacklo_epi32(part[2], part[3]);
  __m128i c = _mm_unpackhi_epi32(part[0], part[1]), d = _mm_unpackhi_epi32(part[2], part[3]);
  bytes[0][i] = _mm_unpacklo_epi64(a, b);
  bytes[1][i] = _mm_unpackhi_epi64(a, b);
  bytes[2][i] = _mm_unpacklo_epi64(c, d);
  bytes[3][i] = _mm_unpackhi_epi64(c, d);
}

/* `look_up` of the codes of two inputs at once; the tables are in both halves. */
INLINE __m256i look_up_two(const __m256i *table, const int entries, __m256i code) {
  __m256i value = _mm256_shuffle_epi8(table[0], code), fifth = _mm256_slli_epi16(code, 3);
  if (entries > 16) value = _mm256_blendv_epi8(value, _mm256_shuffle_epi8(table[1], code), fifth);
  if (entries > 32) {
    __m256i upper = _mm256_shuffle_epi8(table[2], code);
    upper = _mm256_blendv_epi8(upper, _mm256_shuffle_epi8(table[3], code), fifth);
    value = _mm256_blendv_epi8(value, upper, _mm256_slli_epi16(code, 2));
  }
  return value;
}

/* From 16 entries on: the four bytes of a float are looked up apart, two inputs [2][16] at a time. */
INLINE void decode_two(const __m256i tables[4][4], const int entries, const __m128i code[2], float *out) {
  __m256i both = _mm256_set_m128i(code[1], code[0]), byte[4], part[4];
  for (int b = 0; b < 4; b++) byte[b] = look_up_two(tables[b], entries, both);
  __m256i a = _mm256_unpacklo_epi8(byte[0], byte[1]), b = _mm256_unpackhi_epi8(byte[0], byte[1]);
  __m256i c = _mm256_unpacklo_epi8(byte[2], byte[3]), d = _mm256_unpackhi_epi8(byte[2], byte[3]);
  part[0] = _mm256_unpacklo_epi16(a, c); /* outputs 0–3 of the first input, then of the second */
  part[1] = _mm256_unpackhi_epi16(a, c);
  part[2] = _mm256_unpacklo_epi16(b, d);
  part[3] = _mm256_unpackhi_epi16(b, d);
  __m256i *to = (__m256i *)out;
  for (int half = 0; half < 2; half++) {
    _mm256_store_si256(to + half, _mm256_permute2x128_si256(part[2 * half], part[2 * half + 1], 0x20));
    _mm256_store_si256(to + 2 + half, _mm256_permute2x128_si256(part[2 * half], part[2 * half + 1], 0x31));
  }
}

/* Up to 8 entries: a permute of eight floats. */
INLINE void decode_blocks(const int fidelity, const float *table, const uint8_t *low, const uint8_t *high,
                          int64_t blocks, float *out) {
  const int entries = 1 << fidelity;
  float padded[8];
  for (int i = 0; i < 8; i++) padded[i] = table[i & (entries - 1)];
  const __m256 eight = _mm256_loadu_ps(padded);
  __m256i tables[4][4]; /* [byte of the float][16 entries each] */
  for (int i = 0; i < entries / 16; i++) {
    __m128i bytes[4][4];
    byte_planes(table + 16 * i, i, bytes);
    for (int b = 0; b < 4; b++) tables[b][i] = _mm256_broadcastsi128_si256(bytes[b][i]);
  }
  for (int64_t block = 0; block < blocks; block++, out += BLOCK) {
    __m128i code[BLOCK_INPUTS];
    block_codes(fidelity, low, high, code);
    low += fidelity <= 3 ? 16 : 32;
    high += fidelity == 3 || fidelity == 5 ? 8 : fidelity == 6 ? 16 : 0;
    if (entries >= 16) {
      for (int k = 0; k < BLOCK_INPUTS; k += 2) decode_two(tables, entries, code + k, out + k * STI_PANEL);
      continue;
    }
    for (int i = 0; i < 2 * BLOCK_INPUTS; i++) {
      __m128i codes = code[i / 2];
      __m256i index = _mm256_cvtepu8_epi32(i % 2 ? _mm_unpackhi_epi64(codes, codes) : codes);
      _mm256_store_ps(out + 8 * i, _mm256_permutevar8x32_ps(eight, index));
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
  __m128i rows[4];
  for (int i = 0; i < 4; i++) rows[i] = _mm_loadu_si128((const __m128i *)table + i);
  for (int64_t block = 0; block < blocks; block++, out += BLOCK) {
    __m128i code[BLOCK_INPUTS], value[BLOCK_INPUTS];
    block_codes(fidelity, low, high, code);
    low += fidelity <= 3 ? 16 : 32;
    high += fidelity == 3 || fidelity == 5 ? 8 : fidelity == 6 ? 16 : 0;
    for (int k = 0; k < BLOCK_INPUTS; k++) value[k] = look_up(rows, 1 << fidelity, code[k]);
    __m128i a = _mm_unpacklo_epi8(value[0], value[1]), b = _mm_unpackhi_epi8(value[0], value[1]);
    __m128i c = _mm_unpacklo_epi8(value[2], value[3]), d = _mm_unpackhi_epi8(value[2], value[3]);
    __m128i *to = (__m128i *)out;
    _mm_store_si128(to, _mm_unpacklo_epi16(a, c));
    _mm_store_si128(to + 1, _mm_unpackhi_epi16(a, c));
    _mm_store_si128(to + 2, _mm_unpacklo_epi16(b, d));
    _mm_store_si128(to + 3, _mm_unpackhi_epi16(b, d));
  }
}

static void decode8(int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                    int8_t *out) {
  EACH_FIDELITY(decode8_blocks)
}

void kernels_avx2(Kernels *kernels) {
  fill_kernels(kernels);
  kernels->isa = ISA_AVX2;
  kernels->panels = 1;
  kernels->depth = 256;
  kernels->depth8 = 768;
  kernels->decode = decode;
  kernels->decode8 = decode8;
}

#else
typedef int kernels_avx2_are_for_another_target;
#endif
