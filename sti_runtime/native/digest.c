/* digest.c: SHA-256 (FIPS 180-4), with the CPU's instructions where it has them, and zlib's CRC-32. */
#include "base.h"

#include <string.h>

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* ------------------------------------------------------------------ any CPU */

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void blocks_portable(uint32_t state[8], const uint8_t *data, size_t count) {
  for (; count > 0; count--, data += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
      const uint8_t *word = data + 4 * i;
      w[i] = (uint32_t)word[0] << 24 | (uint32_t)word[1] << 16 | (uint32_t)word[2] << 8 | word[3];
    }
    for (int i = 16; i < 64; i++) {
      uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
      uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
      uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25), choice = (e & f) ^ (~e & g);
      uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22), majority = (a & b) ^ (a & c) ^ (b & c);
      uint32_t t1 = h + s1 + choice + round_constants[i] + w[i], t2 = s0 + majority;
      h = g, g = f, f = e, e = d + t1;
      d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
  }
}

/* ------------------------------------------------------------------ the CPU's own instructions */

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

static bool has_instructions(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & 1u << 29);
}

/* Rounds 4i … 4i+3; `message` is the schedule of those rounds. The instructions keep the state as ABEF and CDGH. */
__attribute__((target("sha,sse4.1,ssse3")))
static void blocks_fast(uint32_t state[8], const uint8_t *data, size_t count) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);        /* CDAB */
  __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B); /* EFGH */
  __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0);
  for (; count > 0; count--, data += 64) {
    __m128i abef_before = abef, cdgh_before = cdgh, w[4];
    for (int i = 0; i < 16; i++) {
      __m128i message;
      if (i < 4) {
        message = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), big_endian);
      } else {
        __m128i t = _mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]);
        t = _mm_add_epi32(t, _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4));
        message = _mm_sha256msg2_epu32(t, w[(i + 3) & 3]);
      }
      w[i & 3] = message;
      __m128i sum = _mm_add_epi32(message, _mm_loadu_si128((const __m128i *)(round_constants + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>

static bool has_instructions(void) {
  const unsigned long sha2 = 1ul << 6; /* HWCAP_SHA2 */
  return getauxval(AT_HWCAP) & sha2;
}

__attribute__((target("+sha2")))
static void blocks_fast(uint32_t state[8], const uint8_t *data, size_t count) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; count > 0; count--, data += 64) {
    uint32x4_t abcd_before = abcd, efgh_before = efgh, w[4];
    for (int i = 0; i < 16; i++) {
      uint32x4_t message;
      if (i < 4) message = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
      else message = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]), w[(i + 2) & 3], w[(i + 3) & 3]);
      w[i & 3] = message;
      uint32x4_t sum = vaddq_u32(message, vld1q_u32(round_constants + 4 * i)), abcd_old = abcd;
      abcd = vsha256hq_u32(abcd, efgh, sum);
      efgh = vsha256h2q_u32(efgh, abcd_old, sum);
    }
    abcd = vaddq_u32(abcd, abcd_before);
    efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}

#else
static bool has_instructions(void) { return false; }
#define blocks_fast blocks_portable
#endif

/* ------------------------------------------------------------------ SHA-256 */

static void add_blocks(uint32_t state[8], const uint8_t *data, size_t count) {
  static int fast; /* 0: not asked yet, 1: yes, 2: no; every thread would write the same */
  int known = __atomic_load_n(&fast, __ATOMIC_RELAXED);
  if (known == 0) {
    known = has_instructions() ? 1 : 2;
    __atomic_store_n(&fast, known, __ATOMIC_RELAXED);
  }
  (known == 1 ? blocks_fast : blocks_portable)(state, data, count);
}

void sha256_begin(Sha256 *hash) {
  *hash = (Sha256){.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

void sha256_add(Sha256 *hash, const void *data, size_t bytes) {
  const uint8_t *next = data;
  size_t held = hash->bytes % 64;
  hash->bytes += bytes;
  if (held != 0) {
    size_t taken = bytes < 64 - held ? bytes : 64 - held;
    memcpy(hash->block + held, next, taken);
    next += taken;
    bytes -= taken;
    if (held + taken < 64) return;
    add_blocks(hash->state, hash->block, 1);
  }
  if (bytes >= 64) add_blocks(hash->state, next, bytes / 64);
  if (bytes % 64 != 0) memcpy(hash->block, next + bytes / 64 * 64, bytes % 64);
}

void sha256_end(Sha256 *hash, char hex[65]) {
  uint64_t bits = hash->bytes * 8;
  uint8_t tail[72] = {0x80};
  size_t padding = 1 + (119 - hash->bytes % 64) % 64; /* up to 8 bytes before the end of a block */
  for (int i = 0; i < 8; i++) tail[padding + i] = (uint8_t)(bits >> (56 - 8 * i));
  sha256_add(hash, tail, padding + 8);
  for (int i = 0; i < 64; i++) hex[i] = "0123456789abcdef"[hash->state[i / 8] >> (28 - i % 8 * 4) & 15];
  hex[64] = '\0';
}

void sha256_hex(const void *data, size_t bytes, char hex[65]) {
  Sha256 hash;
  sha256_begin(&hash);
  sha256_add(&hash, data, bytes);
  sha256_end(&hash, hex);
}

bool is_digest(const char *text) {
  for (int i = 0; i < 64; i++)
    if ((text[i] < '0' || text[i] > '9') && (text[i] < 'a' || text[i] > 'f')) return false;
  return text[64] == '\0';
}

/* ------------------------------------------------------------------ CRC-32 */

/* Four bits at a time: a table of sixteen needs no set-up, and lines of a journal are short. */
uint32_t crc32_of(const void *data, size_t bytes) {
  static const uint32_t table[16] = {
      0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
      0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
  };
  const uint8_t *next = data;
  uint32_t crc = 0xffffffff;
  for (; bytes > 0; bytes--) {
    crc ^= *next++;
    crc = crc >> 4 ^ table[crc & 15];
    crc = crc >> 4 ^ table[crc & 15];
  }
  return ~crc;
}
