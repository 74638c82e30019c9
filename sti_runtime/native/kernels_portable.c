/* kernels_portable.c: plain C, for any CPU. The compiler makes of the vectors what its baseline has. */
#define VW 4
#define MR 4
#define NV 2
#define MR8 4
#define NV8 2
#define OFFSET 0

#include "kernels_vector.h"

/* Bytes as 16-bit numbers: a product of two is below 2^14, so the sum of two products fits as well. */
INLINE VI dot4(VI sum, VI weights, int32_t a) {
  typedef int16_t Halves __attribute__((vector_size(4 * VW)));
  Halves even = (Halves)weights << 8 >> 8, odd = (Halves)weights >> 8; /* bytes 0, 2 and 1, 3 of each lane */
  Halves x = (Halves)splat_int(a);
  VI pairs = (VI)(even * (x << 8 >> 8) + odd * (x >> 8));
  return sum + (pairs << 16 >> 16) + (pairs >> 16);
}

#include "kernels_template.h"

/* Code of output n, input k of a block. */
INLINE int code_of(const int fidelity, const uint8_t *low, const uint8_t *high, int k, int n) {
  if (fidelity == 2) return low[n] >> 2 * k & 3;
  int bit = high[2 * k + n / 8] >> n % 8 & 1;
  if (fidelity == 3) return (low[n] >> 2 * k & 3) | bit << 2;
  int nibble = low[n + k % 2 * 16] >> k / 2 * 4 & 15;
  if (fidelity == 4) return nibble;
  return nibble | (fidelity == 5 ? bit : high[n] >> 2 * k & 3) << 4;
}

INLINE void decode_blocks(const int fidelity, const float *table, const uint8_t *low, const uint8_t *high,
                          int64_t blocks, float *out) {
  for (int64_t block = 0; block < blocks; block++) {
    for (int k = 0; k < BLOCK_INPUTS; k++) {
      for (int n = 0; n < STI_PANEL; n++) *out++ = table[code_of(fidelity, low, high, k, n)];
    }
    low += fidelity <= 3 ? 16 : 32;
    high += fidelity == 3 || fidelity == 5 ? 8 : fidelity == 6 ? 16 : 0;
  }
}

INLINE void decode8_blocks(const int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high,
                           int64_t blocks, int8_t *out) {
  for (int64_t block = 0; block < blocks; block++) {
    for (int n = 0; n < STI_PANEL; n++) {
      for (int k = 0; k < BLOCK_INPUTS; k++) *out++ = table[code_of(fidelity, low, high, k, n)];
    }
    low += fidelity <= 3 ? 16 : 32;
    high += fidelity == 3 || fidelity == 5 ? 8 : fidelity == 6 ? 16 : 0;
  }
}

static void decode(int fidelity, const float *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                   float *out) {
  EACH_FIDELITY(decode_blocks)
}

static void decode8(int fidelity, const int8_t *table, const uint8_t *low, const uint8_t *high, int64_t blocks,
                    int8_t *out) {
  EACH_FIDELITY(decode8_blocks)
}

void kernels_portable(Kernels *kernels) {
  fill_kernels(kernels);
  kernels->isa = ISA_PORTABLE;
  kernels->panels = 1;
  kernels->depth = 256;
  kernels->depth8 = 768;
  kernels->decode = decode;
  kernels->decode8 = decode8;
}
