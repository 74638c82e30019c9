/* kernels_neon_dotprod.c: NEON with the dot product instructions of ARMv8.2, which int8 products are made of. */
#if defined __aarch64__ && defined __ARM_FEATURE_DOTPROD

#include <arm_neon.h>

#define VW 4
#define MR8 6
#define NV8 4
#define OFFSET 0

#include "kernels_vector.h"

INLINE VI dot4(VI sum, VI weights, int32_t a) {
  return (VI)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(a)));
}

#include "kernels_int8.h"

void kernels_neon_dotprod(Kernels *kernels) {
  kernels_neon(kernels);
  kernels->isa = ISA_NEON_DOTPROD;
  fill_int8_kernels(kernels);
}

#else
typedef int kernels_neon_dotprod_are_for_another_target;
#endif
