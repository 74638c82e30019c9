/* kernels_avx512.c: AVX-512 with byte permutes and VNNI. Dictionaries of up to 64 floats live in four registers. */
#if defined __x86_64__ && defined __AVX512VBMI__ && defined __AVX512VNNI__

#include <immintrin.h>

#define VW 16
#define MR 12
#define NV 2
#define MR8 12
#define NV8 2
#define OFFSET 128

#include "kernels_vector.h"

INLINE VI dot4(VI sum, VI weights, int32_t a) {
  return (VI)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(a), (__m512i)weights);
}

#include "kernels_template.h"

/* ------------------------------------------------------------------ codes → floats */

INLINE __m512i widen(const uint8_t *from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)); }

/* Permutes look at the low bits of an index only, so what lies above them in a byte need not be cleared. */
INLINE void decode_blocks(const int fidelity, const float *table, const uint8_t *low, const uint8_t *high,
                          int64_t blocks, float *out) {
  const bool quads = fidelity <= 3; /* the low plane's width is 2, not 4 */
  const __m512 t0 = quads ? _mm512_broadcast_f32x4(_mm_loadu_ps(table)) : _mm512_loadu_ps(table);
  const __m512 t1 = fidelity == 3   ? _mm512_broadcast_f32x4(_mm_loadu_ps(table + 4))
                    : fidelity >= 5 ? _mm512_loadu_ps(table + 16)
                                    : t0;
  const __m512 t2 = fidelity == 6 ? _mm512_loadu_ps(table + 32) : t0;
  const __m512 t3 = fidelity == 6 ? _mm512_loadu_ps(table + 48) : t0;
  for (int64_t block = 0; block < blocks; block++, out += BLOCK) {
    __m512i index[BLOCK_INPUTS];
    index[0] = widen(low);
    index[1] = quads ? _mm512_srli_epi32(index[0], 2) : widen(low + 16);
    index[2] = _mm512_srli_epi32(index[0], 4);
    index[3] = quads ? _mm512_srli_epi32(index[0], 6) : _mm512_srli_epi32(index[1], 4);
    low += quads ? 16 : 32;
    uint64_t bits = 0;
    __m512i pairs = _mm512_setzero_si512();
    if (fidelity == 3 || fidelity == 5) {
      memcpy(&bits, high, sizeof bits);
      high += sizeof bits;
    }
    if (fidelity == 6) {
      pairs = _mm512_slli_epi32(widen(high), 4);
      high += 16;
    }
    UNROLL for (int i = 0; i < BLOCK_INPUTS; i++) {
      __m512 value;
      if (fidelity == 6) {
        /* bits 0–3 of the one, 4 and above of the other */
        __m512i code = _mm512_ternarylogic_epi32(_mm512_set1_epi32(15), index[i],
                                                 _mm512_srli_epi32(pairs, 2 * (unsigned)i), 0xCA);
        value = _mm512_mask_blend_ps(_mm512_test_epi32_mask(code, _mm512_set1_epi32(32)),
                                     _mm512_permutex2var_ps(t0, code, t1), _mm512_permutex2var_ps(t2, code, t3));
      } else {
        value = _mm512_permutexvar_ps(index[i], t0);
        if (fidelity == 3 || fidelity == 5) {
          value = _mm512_mask_permutexvar_ps(value, (__mmask16)(bits >> (16 * i)), index[i], t1);
        }
      }
      _mm512_store_ps(out + i * STI_PANEL, value);
    }
  }
}

static void decode(int fidelity, const float *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                   float *out) {
  EACH_FIDELITY(decode_blocks)
}

/* ------------------------------------------------------------------ codes → int8, [16][4] */

/* Patterns: byte i = 4n + k of the result is output n, input k of the block. */
#define EACH_4(F, i) F(i), F((i) + 1), F((i) + 2), F((i) + 3)
#define EACH_16(F, i) EACH_4(F, i), EACH_4(F, (i) + 4), EACH_4(F, (i) + 8), EACH_4(F, (i) + 12)
#define EACH_64(F) {EACH_16(F, 0), EACH_16(F, 16), EACH_16(F, 32), EACH_16(F, 48)}
#define N(i) ((i) / 4)
#define K(i) ((i) % 4)
#define AT(i) ((i) % 8 * 8) /* the byte's place in its 64-bit word */

/* Byte of a 2-bit, 4-bit or 1-bit plane that holds the code, and the code's place in the word of bytes so gathered. */
#define FROM_2(i) N(i)
#define FROM_4(i) (N(i) + K(i) % 2 * 16)
#define FROM_1(i) (2 * K(i) + N(i) / 8)
#define SHIFT_2(i) (AT(i) + 2 * K(i))
#define SHIFT_4(i) (AT(i) + K(i) / 2 * 4)
#define SHIFT_2_UP_4(i) ((AT(i) + 2 * K(i) - 4) & 63) /* to bits 4 and 5 */
#define BIT_1(i) (1 << N(i) % 8)
/* Tables cut to 4 or 16 entries: the low half and the high half of an 8- or 32-entry dictionary. */
#define LOW_4(i) ((i) & 3)
#define LOW_16(i) ((i) & 15)
#define HIGH_4(i) (((i) & 3) | 4)
#define HIGH_16(i) (((i) & 15) | 16)

#define PATTERN(F) (pattern((const uint8_t[64])EACH_64(F)))
INLINE __m512i pattern(const uint8_t bytes[64]) {
  __m512i vector = _mm512_loadu_si512(bytes);
  __asm__("" : "+v"(vector)); /* else a compiler that sees the constant replaces one permute by several */
  return vector;
}

INLINE void decode8_blocks(const int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high,
                           int64_t blocks, int8_t *out) {
  const bool quads = fidelity <= 3;
  const __m512i from = quads ? PATTERN(FROM_2) : PATTERN(FROM_4), shift = quads ? PATTERN(SHIFT_2) : PATTERN(SHIFT_4);
  const __m512i pair_from = PATTERN(FROM_2), pair_shift = PATTERN(SHIFT_2_UP_4);
  const __m512i bit_from = PATTERN(FROM_1), bit = PATTERN(BIT_1);
  const __m512i whole = _mm512_loadu_si512(table);
  const __m512i t0 = fidelity == 6 ? whole : _mm512_permutexvar_epi8(quads ? PATTERN(LOW_4) : PATTERN(LOW_16), whole);
  const __m512i t1 = _mm512_permutexvar_epi8(quads ? PATTERN(HIGH_4) : PATTERN(HIGH_16), whole);
  for (int64_t block = 0; block < blocks; block++, out += BLOCK) {
    __m512i source = quads ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)low))
                           : _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)low));
    low += quads ? 16 : 32;
    __m512i code = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(from, source)), value;
    if (fidelity == 6) {
      __m512i pairs = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)high));
      high += 16;
      pairs = _mm512_multishift_epi64_epi8(pair_shift, _mm512_permutexvar_epi8(pair_from, pairs));
      code = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), code, pairs, 0xCA);
    }
    value = _mm512_permutexvar_epi8(code, t0);
    if (fidelity == 3 || fidelity == 5) {
      __m512i bits = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)high));
      high += 8;
      __mmask64 set = _mm512_test_epi8_mask(_mm512_permutexvar_epi8(bit_from, bits), bit);
      value = _mm512_mask_permutexvar_epi8(value, set, code, t1);
    }
    _mm512_store_si512(out, value);
  }
}

static void decode8(int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                    int8_t *out) {
  EACH_FIDELITY(decode8_blocks)
}

void kernels_avx512(Kernels *kernels) {
  fill_kernels(kernels);
  kernels->isa = ISA_AVX512;
  kernels->panels = 2;
  kernels->depth = 256;
  kernels->depth8 = 768;
  kernels->decode = decode;
  kernels->decode8 = decode8;
}

#else
typedef int kernels_avx512_are_for_another_target;
#endif
