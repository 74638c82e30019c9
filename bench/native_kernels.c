/* native_kernels.c: how fast the engine's kernels are on a layer of BERT-base shape (python -m bench.kernels).
 *
 *     native_kernels FOLDER ISA MODE THREADS TOKENS ROUNDS [speeds]
 *
 * FOLDER takes a resident.bin. Prints one JSON object per line; times are the least of ROUNDS (others' load only adds).
 * "speeds": only the first line, what products and multiply-adds alone reach.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../sti_runtime/native/engine_internal.h"

/* LAYERS copies of a layer take turns, so that weights come from memory, not from cache. */
enum { LAYERS = 12, HEADS = 12, HIDDEN = 768, FFN = 3072, CHAINS = 12 };

/* A burst is about half a millisecond: a shared CPU leaves one of many alone. */
enum { PEAK_STEPS = 250000, PRODUCTS = 25, BURSTS_PER_ROUND = 8, MOST_THREADS = 64 };

static void check(bool holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "native_kernels: %s\n", what);
  exit(1);
}

static double seconds(int64_t ns) { return (double)ns * 1e-9; }

/* ------------------------------------------------------------------ multiply-adds in registers: the limit */

/* Fused, whatever this file is compiled with: a product and a sum apart are no limit of fused kernels. */
#define PEAK_EACH(i)                                 \
  sum[i] = sum[i] * a + b;                           \
  __asm__ volatile("" : PEAK_REGISTER(sum[i]));
#define DEFINE_PEAK(NAME, BYTES, TARGET)                                              \
  TARGET static float NAME(void) {                                                    \
    _Pragma("clang fp contract(fast)")                                                \
    typedef float Vector __attribute__((vector_size(BYTES)));                         \
    Vector sum[CHAINS], a = (Vector){0} + 0.999f, b = (Vector){0} + 1e-3f;            \
    for (int i = 0; i < CHAINS; i++) sum[i] = (Vector){0} + (float)i;                 \
    for (int step = 0; step < PEAK_STEPS; step++) {                                   \
      PEAK_EACH(0) PEAK_EACH(1) PEAK_EACH(2) PEAK_EACH(3) PEAK_EACH(4) PEAK_EACH(5)   \
      PEAK_EACH(6) PEAK_EACH(7) PEAK_EACH(8) PEAK_EACH(9) PEAK_EACH(10) PEAK_EACH(11) \
    }                                                                                 \
    for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];                                \
    return sum[0][0];                                                                 \
  }
#if defined __x86_64__
#define PEAK_REGISTER "+v"
DEFINE_PEAK(peak_sse, 16, )
DEFINE_PEAK(peak_avx2, 32, __attribute__((target("avx2,fma"))))
DEFINE_PEAK(peak_avx512, 64, __attribute__((target("avx512f"))))
#else
#define PEAK_REGISTER "+w"
DEFINE_PEAK(peak_sse, 16, )
#endif

typedef struct {
  Isa isa;
  int threads;
  atomic_int *arrived; /* of `threads` */
  int64_t started_ns, ended_ns;
  float result;
} PeakWork;

/* Begins when all threads are there: their creation is no part of what is measured. */
static void *run_peak(void *argument) {
  PeakWork *work = argument;
  atomic_fetch_add(work->arrived, 1);
  while (atomic_load(work->arrived) < work->threads) continue;
  work->started_ns = monotonic_ns();
#if defined __x86_64__
  work->result = work->isa == ISA_AVX512 ? peak_avx512() : work->isa == ISA_AVX2 ? peak_avx2() : peak_sse();
#else
  work->result = peak_sse();
#endif
  work->ended_ns = monotonic_ns();
  return NULL;
}

/* Floating-point operations per second of `threads` threads at once, one burst: first begin to last end. */
static double measure_peak(Isa isa, int threads) {
  double lanes = isa == ISA_AVX512 ? 16 : isa == ISA_AVX2 ? 8 : 4;
  pthread_t handles[MOST_THREADS];
  PeakWork work[MOST_THREADS];
  atomic_int arrived = 0;
  for (int i = 0; i < threads; i++) work[i] = (PeakWork){.isa = isa, .threads = threads, .arrived = &arrived};
  for (int i = 1; i < threads; i++) check(!pthread_create(&handles[i], NULL, run_peak, &work[i]), "no thread");
  run_peak(&work[0]);
  int64_t started_ns = work[0].started_ns, ended_ns = work[0].ended_ns;
  for (int i = 1; i < threads; i++) {
    pthread_join(handles[i], NULL);
    if (work[i].started_ns < started_ns) started_ns = work[i].started_ns;
    if (work[i].ended_ns > ended_ns) ended_ns = work[i].ended_ns;
  }
  return 2.0 * lanes * CHAINS * PEAK_STEPS * threads / seconds(ended_ns - started_ns);
}

/* ------------------------------------------------------------------ a made-up model */

static uint32_t noise_state = 1;
static uint32_t noise(void) { return noise_state = noise_state * 1664525u + 1013904223u; }
static float noise_float(void) { return (float)(noise() >> 8) / (float)(1 << 24) - 0.5f; }

static void add_tensor(Manifest *manifest, const char *name, int64_t floats, int64_t *offset) {
  manifest->resident[manifest->resident_count++] = (TensorEntry){
      .name = name, .rank = 1, .shape = {floats}, .offset = *offset, .length = floats * (int64_t)sizeof(float)};
  *offset += (floats * (int64_t)sizeof(float) + 63) / 64 * 64;
}

static void make_manifest(const char *folder, Manifest *manifest) {
  static const char *const names[] = {
      "embeddings.norm.weight", "embeddings.norm.bias", "layers.0.attention.q.bias", "layers.0.attention.k.bias",
      "layers.0.attention.v.bias", "layers.0.attention.o.bias", "layers.0.attention.norm.weight",
      "layers.0.attention.norm.bias", "layers.0.ffn.in.bias", "layers.0.ffn.out.bias", "layers.0.ffn.norm.weight",
      "layers.0.ffn.norm.bias"};
  static TensorEntry entries[12];
  static DataFile file = {.file = "resident.bin"};
  int64_t bytes = 0;
  manifest->model = (ModelConfig){.layers = 1, .heads = HEADS, .hidden = HIDDEN, .ffn = FFN, .vocab = 1,
                                  .positions = 512, .layer_norm_eps = 1e-12, .activation = ACT_GELU};
  manifest->resident = entries;
  for (int i = 0; i < 12; i++) add_tensor(manifest, names[i], i == 8 ? FFN : HIDDEN, &bytes);
  manifest->files = &file;
  manifest->file_count = 1;
  file.bytes = bytes;
  char path[4096];
  snprintf(path, sizeof path, "%s/resident.bin", folder);
  FILE *out = fopen(path, "wb");
  check(out != NULL, "cannot write resident.bin");
  for (int64_t i = 0; i < bytes / 4; i++) {
    float value = 1.0f + noise_float() * 0.1f;
    check(fwrite(&value, sizeof value, 1, out) == 1, "cannot write resident.bin");
  }
  fclose(out);
}

/* A version with the share of outliers of Gaussian weights of σ = 0.04: one in 2,560. */
static uint8_t *make_version(const ModelConfig *model, int fidelity, LoadedShard *shard, uint32_t outliers[6]) {
  PayloadLayout layout;
  for (int i = 0; i < STI_MATRICES; i++) {
    int32_t out, in;
    matrix_shape(model, i, &out, &in);
    outliers[i] = fidelity == 32 ? 0 : (uint32_t)(out * in / 2560);
  }
  payload_layout(model, fidelity, outliers, &layout);
  uint8_t *data = aligned_alloc(4096, (size_t)(layout.payload_bytes + 4095) / 4096 * 4096);
  check(data != NULL, "out of memory");
  for (int64_t i = 0; i < layout.payload_bytes / 4; i++) {
    uint32_t word = noise();
    float weight = noise_float() * 0.1f;
    memcpy(data + 4 * i, fidelity == 32 ? (void *)&weight : (void *)&word, 4);
  }
  for (int i = 0; fidelity != 32 && i < STI_MATRICES; i++) {
    float *table = (float *)data + ((int64_t)i << fidelity);
    for (int code = 0; code < 1 << fidelity; code++) table[code] = 0.1f * ((float)code / (float)(1 << fidelity) - 0.5f);
    uint32_t *positions = (uint32_t *)(data + layout.outlier_offset[i]);
    float *values = (float *)(positions + outliers[i]);
    for (uint32_t k = 0; k < outliers[i]; k++) {
      positions[k] = k * 2560 + noise() % 2560;
      values[k] = noise_float();
    }
  }
  *shard = (LoadedShard){.fidelity = fidelity, .outliers = outliers, .data = data};
  return data;
}

/* ------------------------------------------------------------------ what is measured */

/* One layer's weights into a tile that stays in cache, one thread. */
static double decode_layer(const Engine *engine, const LoadedShard *shards, bool int8, int rounds) {
  const Kernels *kernels = &engine->kernels;
  Matrix matrices[HEADS][STI_MATRICES];
  static int8_t table8[64];
  int64_t least = INT64_MAX, depth = int8 ? kernels->depth8 : kernels->depth;
  for (int s = 0; s < HEADS; s++) shard_matrices(engine->model, &shards[s], matrices[s]);
  for (int round = 0; round < rounds; round++) {
    int64_t started = monotonic_ns();
    for (int i = 0; i < HEADS * STI_MATRICES; i++) {
      const Matrix *m = &matrices[i / STI_MATRICES][i % STI_MATRICES];
      int64_t blocks = (int64_t)m->outputs * m->inputs / BLOCK, most = depth * STI_PANEL / BLOCK;
      for (int64_t block = 0; block < blocks; block += most) {
        int64_t count = blocks - block < most ? blocks - block : most;
        const uint8_t *low = m->plane[0] + block * m->plane_bytes[0];
        const uint8_t *high = m->plane[1] + block * m->plane_bytes[1];
        if (int8) kernels->decode8(m->fidelity, table8, low, high, count, (int8_t *)engine->threads[0].scratch);
        else kernels->decode(m->fidelity, m->table, low, high, count, engine->threads[0].scratch);
      }
    }
    int64_t took = monotonic_ns() - started;
    if (took < least) least = took;
  }
  return seconds(least);
}

/* All rows by one tile, over and over: operations per second of one thread, one burst. */
static double measure_product(const Engine *engine, int32_t rows, bool int8) {
  const Kernels *kernels = &engine->kernels;
  int32_t depth = int8 ? kernels->depth8 : kernels->depth;
  int64_t panel = (int64_t)depth * STI_PANEL;
  Product product = {.rows = rows, .inputs = depth, .panels = kernels->panels, .a = engine->x,
                     .a_stride = engine->x_stride, .w = engine->threads[0].scratch, .w_panel = panel,
                     .w_stride = STI_PANEL, .c = engine->ffn, .c_stride = engine->ffn_stride};
  Product8 product8 = {.rows = rows, .inputs = depth, .panels = kernels->panels, .a = engine->x8,
                       .a_stride = engine->x_stride, .row_scale = engine->x_scale,
                       .w = (const int8_t *)engine->threads[0].scratch, .w_panel = panel, .scale = 1,
                       .x = engine->x, .x_stride = engine->x_stride, .c = engine->ffn, .c_stride = engine->ffn_stride};
  for (int i = 0; i < MAX_PANELS; i++) product8.outliers[i] = engine->threads[0].outliers;
  int64_t started = monotonic_ns();
  for (int i = 0; i < PRODUCTS; i++) {
    if (int8) kernels->product8(&product8);
    else kernels->product(&product);
  }
  return 2.0 * rows * depth * STI_PANEL * kernels->panels * PRODUCTS / seconds(monotonic_ns() - started);
}

/* The best of many bursts, operations per second: products by one thread, multiply-adds by one and by all. */
typedef struct { double product, peak_1, peak; } Speeds;

/* Bursts take turns: what a clock does in between meets all three. */
static Speeds measure_speeds(const Engine *engine, Isa isa, int threads, int32_t tokens, bool int8, int rounds) {
  Speeds best = {0, 0, 0};
  for (int burst = 0; burst < rounds * BURSTS_PER_ROUND; burst++) {
    best.product = fmax(best.product, measure_product(engine, tokens, int8));
    best.peak_1 = fmax(best.peak_1, measure_peak(isa, 1));
    best.peak = fmax(best.peak, measure_peak(isa, threads));
  }
  return best;
}

static int by_size(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  bool only_speeds = argc == 8 && !strcmp(argv[7], "speeds");
  check(argc == 7 || only_speeds, "usage: native_kernels FOLDER ISA MODE THREADS TOKENS ROUNDS [speeds]");
  const char *folder = argv[1];
  bool int8 = !strcmp(argv[3], "int8");
  int threads = atoi(argv[4]), tokens = atoi(argv[5]), rounds = atoi(argv[6]);
  check(threads > 0 && threads <= MOST_THREADS && tokens > 0 && rounds > 0, "THREADS, TOKENS and ROUNDS are positive");
  Isa isa = ISA_PORTABLE;
  while (isa < ISA_NEON_DOTPROD && strcmp(isa_name(isa), argv[2]) != 0) isa++;
  if (strcmp(isa_name(isa), argv[2]) != 0 || !isa_available(isa)) return 3;

  static Manifest manifest;
  static StiError error;
  Engine *engine;
  make_manifest(folder, &manifest);
  EngineOptions options = {.threads = threads, .mode = int8 ? MODE_INT8 : MODE_FP32, .isa = isa};
  check(engine_open(&manifest, folder, &options, &engine, &error) == STI_OK, error.what);
  check(engine_allocate(engine, HEADS, tokens, 1, &error) == STI_OK, error.what);
  float *rows = calloc((size_t)tokens * HIDDEN, sizeof *rows);
  const float **words = calloc((size_t)tokens, sizeof *words);
  int64_t *wall = calloc((size_t)rounds, sizeof *wall);
  check(rows && words && wall, "out of memory");
  for (int i = 0; i < tokens * HIDDEN; i++) rows[i] = noise_float();
  for (int i = 0; i < tokens; i++) words[i] = rows + i * HIDDEN;
  engine_begin(engine, words, NULL, rows, &tokens, 1, tokens);
  Speeds speeds = measure_speeds(engine, isa, threads, tokens, int8, rounds);
  printf("{\"isa\":\"%s\",\"mode\":\"%s\",\"threads\":%d,\"tokens\":%d,\"peak_gflops\":%.1f,"
         "\"peak_gflops_1\":%.1f,\"product_gflops_1\":%.1f,\"activation_bytes\":%lld}\n",
         argv[2], argv[3], threads, tokens, speeds.peak * 1e-9, speeds.peak_1 * 1e-9, speeds.product * 1e-9,
         (long long)engine_activation_bytes(engine));

  for (int i = 0; i < (only_speeds ? 0 : STI_FIDELITIES); i++) {
    LoadedShard shards[LAYERS][HEADS];
    uint32_t outliers[LAYERS][HEADS][STI_MATRICES];
    uint8_t *data[LAYERS][HEADS];
    for (int l = 0; l < LAYERS; l++) {
      for (int s = 0; s < HEADS; s++) {
        data[l][s] = make_version(&manifest.model, sti_fidelities[i], &shards[l][s], outliers[l][s]);
        shards[l][s].slice = s;
      }
    }
    int64_t decompress = 0, least = INT64_MAX; /* of the fastest round */
    for (int round = 0; round < rounds; round++) {
      LayerTimes times;
      engine_layer(engine, 0, shards[round % LAYERS], HEADS, &times);
      wall[round] = times.compute_ns + times.decompress_ns;
      if (wall[round] < least) {
        least = wall[round];
        decompress = times.decompress_ns;
      }
    }
    qsort(wall, (size_t)rounds, sizeof *wall, by_size);
    printf("{\"fidelity\":%d,\"layer_ms\":%.3f,\"layer_median_ms\":%.3f,\"decompress_ms\":%.3f,\"decode_1_ms\":%.3f}\n",
           sti_fidelities[i], seconds(wall[0]) * 1e3, seconds(wall[rounds / 2]) * 1e3, seconds(decompress) * 1e3,
           sti_fidelities[i] == 32 ? 0.0 : decode_layer(engine, shards[0], int8, rounds) * 1e3);
    for (int l = 0; l < LAYERS; l++) {
      for (int s = 0; s < HEADS; s++) free(data[l][s]);
    }
  }
  engine_close(engine);
  free(rows);
  free(words);
  free(wall);
}
