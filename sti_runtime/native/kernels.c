/* kernels.c: which kernels this CPU can run. */
#include "kernels.h"

#if defined __x86_64__
#include <cpuid.h>
#elif defined __aarch64__ || defined __arm__
#include <sys/auxv.h>
#endif

const char *isa_name(Isa isa) {
  static const char *const names[] = {"auto", "portable", "avx2", "avx512", "neon", "neon-dotprod"};
  return names[isa];
}

#if defined __x86_64__

enum { CPUID1_ECX_FMA = 1 << 12, CPUID1_ECX_OSXSAVE = 1 << 27, CPUID1_ECX_F16C = 1 << 29, CPUID7_EBX_AVX2 = 1 << 5 };
/* F, DQ, BW, VL in leaf 7's EBX; VBMI, VNNI in its ECX */
static const unsigned AVX512_EBX = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, AVX512_ECX = 1u << 1 | 1u << 11;
/* what the kernel saves on a context switch: SSE and AVX; masks and the upper halves as well */
static const unsigned SAVES_AVX = 0x06, SAVES_AVX512 = 0xE6;

bool isa_available(Isa isa) {
  unsigned eax, ebx, ecx, edx, ecx1, saved = 0, high;
  if (isa == ISA_PORTABLE) return true;
  if (isa != ISA_AVX2 && isa != ISA_AVX512) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx1, &edx) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (ecx1 & CPUID1_ECX_OSXSAVE) __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  bool avx2 = (saved & SAVES_AVX) == SAVES_AVX && (ebx & CPUID7_EBX_AVX2) && (ecx1 & CPUID1_ECX_FMA) &&
              (ecx1 & CPUID1_ECX_F16C);
  if (isa == ISA_AVX2) return avx2;
  return avx2 && (saved & SAVES_AVX512) == SAVES_AVX512 && (ebx & AVX512_EBX) == AVX512_EBX &&
         (ecx & AVX512_ECX) == AVX512_ECX;
}

Isa isa_best(void) {
  return isa_available(ISA_AVX512) ? ISA_AVX512 : isa_available(ISA_AVX2) ? ISA_AVX2 : ISA_PORTABLE;
}

void kernels_get(Isa isa, Kernels *kernels) {
  if (isa == ISA_AVX512) kernels_avx512(kernels);
  else if (isa == ISA_AVX2) kernels_avx2(kernels);
  else kernels_portable(kernels);
}

#elif defined __aarch64__

enum { HWCAP_BIT_ASIMD = 1 << 1, HWCAP_BIT_DOT_PRODUCT = 1 << 20 };

bool isa_available(Isa isa) {
  unsigned long caps = getauxval(AT_HWCAP);
  if (isa == ISA_NEON) return caps & HWCAP_BIT_ASIMD;
  if (isa == ISA_NEON_DOTPROD) return (caps & HWCAP_BIT_ASIMD) && (caps & HWCAP_BIT_DOT_PRODUCT);
  return isa == ISA_PORTABLE;
}

Isa isa_best(void) {
  return isa_available(ISA_NEON_DOTPROD) ? ISA_NEON_DOTPROD : isa_available(ISA_NEON) ? ISA_NEON : ISA_PORTABLE;
}

void kernels_get(Isa isa, Kernels *kernels) {
  if (isa == ISA_NEON_DOTPROD) kernels_neon_dotprod(kernels);
  else if (isa == ISA_NEON) kernels_neon(kernels);
  else kernels_portable(kernels);
}

#elif defined __arm__

enum { HWCAP_BIT_NEON = 1 << 12, HWCAP_BIT_VFP4 = 1 << 16 }; /* VFPv4 brought fused multiply-add */

bool isa_available(Isa isa) {
  unsigned long caps = getauxval(AT_HWCAP);
  if (isa == ISA_NEON) return (caps & HWCAP_BIT_NEON) && (caps & HWCAP_BIT_VFP4);
  return isa == ISA_PORTABLE;
}

Isa isa_best(void) { return isa_available(ISA_NEON) ? ISA_NEON : ISA_PORTABLE; }

void kernels_get(Isa isa, Kernels *kernels) {
  if (isa == ISA_NEON) kernels_neon(kernels);
  else kernels_portable(kernels);
}

#else

bool isa_available(Isa isa) { return isa == ISA_PORTABLE; }
Isa isa_best(void) { return ISA_PORTABLE; }
void kernels_get(Isa isa, Kernels *kernels) {
  (void)isa;
  kernels_portable(kernels);
}

#endif

int64_t attention_scratch(int32_t tokens, int32_t head_size) {
  int64_t columns = (tokens + STI_PANEL - 1) / STI_PANEL * STI_PANEL;
  return columns * head_size + columns * STI_PANEL; /* keys, and scores of at most 16 rows */
}
