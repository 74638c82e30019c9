#include "engine_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char REMEDY_BUNDLE[] = "Verify the bundle and deploy it again.";

static int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Floats between rows of `columns`: whole panels, an odd number of cache lines. */
static int64_t row_stride(int64_t columns) { return up_to(columns, STI_PANEL) | STI_PANEL; }

/* ------------------------------------------------------------------ resident.bin */

static StiCode read_resident(Engine *engine, const char *folder, Resident *begun, StiError *error) {
  int64_t bytes = manifest_file_bytes(engine->manifest, "resident.bin");
  if (bytes < 0) {
    resident_drop(begun);
    return sti_fail(error, STI_FORMAT, REMEDY_BUNDLE, "%s: the manifest does not list resident.bin.", folder);
  }
  engine->resident_bytes = bytes + CACHE_LINE_BYTES;
  return resident_take(begun, folder, bytes, &engine->resident, error);
}

/* Looks tensors up in the order in which they are stored, so that each look-up starts where the last one ended. */
typedef struct {
  const Engine *engine;
  int32_t next;
  const char *missing; /* the first one not there, or not whole */
  char name[64];
} Finder;

static const TensorEntry *find_entry(Finder *finder, const char *name) {
  const Manifest *manifest = finder->engine->manifest;
  for (int32_t i = 0; i < manifest->resident_count; i++) {
    const TensorEntry *entry = &manifest->resident[(finder->next + i) % manifest->resident_count];
    if (strcmp(entry->name, name) != 0) continue;
    finder->next = (int32_t)(entry - manifest->resident) + 1;
    if (entry->offset % CACHE_LINE_BYTES || entry->offset < 0 || entry->length < 0) break;
    if (entry->length > finder->engine->resident_bytes - CACHE_LINE_BYTES - entry->offset) break;
    return entry;
  }
  if (!finder->missing) finder->missing = strcpy(finder->name, name);
  return NULL;
}

/* `count` floats called <prefix>.<suffix>; NULL if they are missing. */
static const float *find_floats(Finder *finder, const char *prefix, const char *suffix, int64_t count) {
  char name[64];
  snprintf(name, sizeof name, "%s.%s", prefix, suffix);
  const TensorEntry *entry = find_entry(finder, name);
  if (!entry) return NULL;
  if (entry->gobo6 || entry->length != count * (int64_t)sizeof(float)) {
    if (!finder->missing) finder->missing = strcpy(finder->name, name);
    return NULL;
  }
  return (const float *)(finder->engine->resident + entry->offset);
}

static void find_norm(Finder *finder, const char *prefix, const float *norm[2]) {
  norm[0] = find_floats(finder, prefix, "weight", finder->engine->model->hidden);
  norm[1] = find_floats(finder, prefix, "bias", finder->engine->model->hidden);
}

static void find_layer(Finder *finder, int32_t layer, LayerParameters *out) {
  const ModelConfig *model = finder->engine->model;
  char prefix[48];
#define PREFIX(part) (snprintf(prefix, sizeof prefix, "layers.%d." part, (int)layer), prefix)
  out->q_bias = find_floats(finder, PREFIX("attention.q"), "bias", model->hidden);
  out->k_bias = find_floats(finder, PREFIX("attention.k"), "bias", model->hidden);
  out->v_bias = find_floats(finder, PREFIX("attention.v"), "bias", model->hidden);
  out->o_bias = find_floats(finder, PREFIX("attention.o"), "bias", model->hidden);
  find_norm(finder, PREFIX("attention.norm"), out->attention_norm);
  out->in_bias = find_floats(finder, PREFIX("ffn.in"), "bias", model->ffn);
  out->out_bias = find_floats(finder, PREFIX("ffn.out"), "bias", model->hidden);
  find_norm(finder, PREFIX("ffn.norm"), out->ffn_norm);
#undef PREFIX
}

static void find_linear(Finder *finder, const char *prefix, int32_t outputs, Linear *linear) {
  const Engine *engine = finder->engine;
  int32_t inputs = engine->model->hidden;
  char name[64];
  snprintf(name, sizeof name, "%s.weight", prefix);
  const TensorEntry *entry = find_entry(finder, name);
  bool sound = entry != NULL;
  if (entry && entry->gobo6) {
    int64_t bytes = gobo6_matrix(engine->resident + entry->offset, outputs, inputs, entry->outliers, &linear->packed);
    sound = entry->length == bytes && outliers_are_sound(&linear->packed);
  } else if (entry) {
    linear->rows = (const float *)(engine->resident + entry->offset);
    sound = entry->length == (int64_t)outputs * inputs * (int64_t)sizeof(float);
  }
  if (!sound && !finder->missing) finder->missing = strcpy(finder->name, name);
  linear->bias = find_floats(finder, prefix, "bias", outputs);
}

static StiCode find_parameters(Engine *engine, StiError *error) {
  const ModelConfig *model = engine->model;
  Finder finder = {.engine = engine};
  engine->layers = calloc((size_t)model->layers, sizeof *engine->layers);
  if (!engine->layers) return sti_out_of_memory(error);
  find_norm(&finder, "embeddings.norm", engine->embedding_norm);
  for (int32_t layer = 0; layer < model->layers; layer++) find_layer(&finder, layer, &engine->layers[layer]);
  if (model->has_head && model->head_activation != HEAD_NONE) {
    find_linear(&finder, "head.pooler", model->hidden, &engine->pooler);
  }
  if (model->has_head) find_linear(&finder, "head.classifier", model->labels, &engine->classifier);
  if (!finder.missing) return STI_OK;
  return sti_fail(error, STI_FORMAT, REMEDY_BUNDLE, "resident.bin: %s is missing or not as the model needs it.",
                  finder.missing);
}

/* ------------------------------------------------------------------ open and close */

StiCode engine_open(const Manifest *manifest, const char *folder, const EngineOptions *options, Engine **result,
                    StiError *error) {
  Isa isa = options->isa == ISA_AUTO ? isa_best() : options->isa;
  if (!isa_available(isa)) {
    resident_drop(options->resident);
    return sti_fail(error, STI_INPUT, "Name one that it has, or none.", "This CPU or executable has no %s kernels.",
                    isa_name(isa));
  }
  Engine *engine = calloc(1, sizeof *engine);
  if (!engine) {
    resident_drop(options->resident);
    return sti_out_of_memory(error);
  }
  const ModelConfig *model = &manifest->model;
  engine->manifest = manifest;
  engine->model = model;
  engine->mode = options->mode;
  engine->d = model->hidden / model->heads;
  engine->f = model->ffn / model->heads;
  engine->d16 = (int32_t)up_to(engine->d, STI_PANEL);
  engine->f16 = (int32_t)up_to(engine->f, STI_PANEL);
  engine->h16 = (int32_t)up_to(model->hidden, STI_PANEL);
  kernels_get(isa, &engine->kernels);
  StiCode code = read_resident(engine, folder, options->resident, error);
  if (code == STI_OK) code = find_parameters(engine, error);
  if (code == STI_OK) code = pool_open(options->threads, options->cpus, options->cpu_count, &engine->pool, error);
  if (code != STI_OK) {
    engine_close(engine);
    return code;
  }
  *result = engine;
  return STI_OK;
}

static void free_buffers(Engine *engine) {
  if (engine->memory) pages_free(engine->memory, (size_t)engine->memory_bytes);
  engine->memory = NULL;
  engine->memory_bytes = 0;
  engine->width = 0;
}

void engine_close(Engine *engine) {
  if (!engine) return;
  pool_close(engine->pool);
  free_buffers(engine);
  if (engine->resident) pages_free(engine->resident, (size_t)engine->resident_bytes);
  free(engine->layers);
  free(engine);
}

/* ------------------------------------------------------------------ buffers */

/* Hands out aligned parts of engine->memory; with no memory yet it only adds them up. */
typedef struct {
  uint8_t *memory;
  int64_t used;
} Layout;

static void *part(Layout *layout, int64_t count, size_t size) {
  int64_t start = layout->used;
  layout->used = start + up_to(count * (int64_t)size, CACHE_LINE_BYTES);
  return layout->memory ? layout->memory + start : NULL;
}

static void lay_out(Engine *engine, Layout *layout) {
  const Kernels *kernels = &engine->kernels;
  int64_t rows = (int64_t)engine->max_batch * engine->max_tokens, batch = engine->max_batch, m = engine->width;
  int64_t heads = 3 * engine->head_stride, work = heads > engine->ffn_stride ? heads : engine->ffn_stride;
  engine->x = part(layout, rows * engine->x_stride, sizeof(float));
  engine->ffn = part(layout, rows * work, sizeof(float));
  engine->q = engine->ffn;
  engine->k = engine->q + rows * engine->head_stride;
  engine->v = engine->k + rows * engine->head_stride;
  engine->pooled = part(layout, batch * engine->x_stride, sizeof(float));
  engine->dense = part(layout, batch * engine->x_stride, sizeof(float));
  engine->logits = part(layout, batch * engine->label_stride, sizeof(float));
  engine->lengths = part(layout, batch, sizeof(int32_t));
  engine->matrices = part(layout, m * STI_MATRICES, sizeof(Matrix));
  int64_t tile = (int64_t)kernels->panels * kernels->depth * STI_PANEL * (int64_t)sizeof(float);
  if (engine->mode == MODE_INT8) {
    int64_t tile8 = (int64_t)kernels->panels * kernels->depth8 * STI_PANEL;
    int64_t widest = engine->head_stride > engine->ffn_stride ? engine->head_stride : engine->ffn_stride;
    if (tile8 > tile) tile = tile8;
    engine->x8 = part(layout, rows * engine->x_stride, 1);
    engine->work8 = part(layout, rows * widest, 1);
    engine->x_scale = part(layout, rows, sizeof(float));
    engine->work_scale = part(layout, rows, sizeof(float));
    engine->tables8 = part(layout, m, sizeof *engine->tables8);
  }
  int64_t scratch = attention_scratch(engine->max_tokens, engine->d) * (int64_t)sizeof(float);
  engine->threads = part(layout, pool_threads(engine->pool), sizeof *engine->threads);
  for (int i = 0; i < pool_threads(engine->pool); i++) {
    void *own = part(layout, scratch > tile ? scratch : tile, 1);
    void *outliers = engine->mode == MODE_INT8 ? part(layout, MAX_PANELS * TILE_OUTLIERS, sizeof(TileOutlier)) : NULL;
    if (layout->memory) engine->threads[i] = (ThreadState){.scratch = own, .outliers = outliers};
  }
}

StiCode engine_allocate(Engine *engine, int32_t width, int32_t tokens, int32_t batch, StiError *error) {
  const ModelConfig *model = engine->model;
  if (width < 1 || width > model->heads || tokens < 1 || batch < 1) {
    return sti_fail(error, STI_INPUT, "Plan with a width of the model and at least one token.",
                    "A request of %d rows of %d tokens, %d slices wide, cannot be computed.", (int)batch, (int)tokens,
                    (int)width);
  }
  int64_t ffn_inputs = (int64_t)width * engine->f16;
  if (engine->mode == MODE_INT8 && (ffn_inputs > UINT16_MAX || model->hidden > UINT16_MAX)) {
    return sti_fail(error, STI_INPUT, "Use the engine `native`.", "The model is too wide for sums of int8 products.");
  }
  if (engine->memory && engine->width == width && engine->max_tokens == tokens && engine->max_batch == batch) {
    return STI_OK;
  }
  free_buffers(engine);
  engine->width = width;
  engine->max_tokens = tokens;
  engine->max_batch = batch;
  engine->x_stride = row_stride(model->hidden);
  engine->head_stride = row_stride((int64_t)width * engine->d16);
  engine->ffn_stride = row_stride(ffn_inputs);
  engine->label_stride = row_stride(model->labels);
  int64_t widest = engine->x_stride + 3 * engine->head_stride + engine->ffn_stride;
  if ((int64_t)batch * tokens > INT32_MAX / 2 || (int64_t)batch * tokens > INT64_MAX / 64 / widest) {
    engine->width = 0;
    return sti_fail(error, STI_RESOURCE, "Use fewer rows or tokens.", "%d rows of %d tokens are too many.", (int)batch,
                    (int)tokens);
  }
  Layout layout = {0};
  lay_out(engine, &layout);
  layout.memory = (uint64_t)layout.used > SIZE_MAX / 2 ? NULL : pages_alloc((size_t)layout.used);
  if (!layout.memory) {
    engine->width = 0;
    return sti_fail(error, STI_RESOURCE, "Use a narrower submodel, fewer tokens or a smaller batch.",
                    "%lld bytes of activations do not fit in memory.", (long long)layout.used);
  }
  engine->memory = layout.memory;
  engine->memory_bytes = layout.used;
  layout.used = 0;
  lay_out(engine, &layout);
  return STI_OK;
}

/* ------------------------------------------------------------------ a request */

void engine_begin(Engine *engine, const float *const *words, const float *const *types, const float *positions,
                  const int32_t *lengths, int32_t batch, int32_t tokens) {
  pool_pin_caller(engine->pool);
  engine->pass = (Pass){.tokens = tokens, .batch = batch, .rows = batch * tokens, .words = words, .types = types,
                        .positions = positions};
  for (int32_t i = 0; i < batch; i++) {
    engine->lengths[i] = lengths[i] < 1 ? 1 : lengths[i] > tokens ? tokens : lengths[i];
  }
  pool_run(engine->pool, embed_phase, engine);
}

StiCode engine_check_shard(const Engine *engine, const LoadedShard *shard, StiError *error) {
  Matrix matrices[STI_MATRICES];
  if (shard->fidelity == 32) return STI_OK;
  shard_matrices(engine->model, shard, matrices);
  for (int i = 0; i < STI_MATRICES; i++) {
    if (outliers_are_sound(&matrices[i])) continue;
    return sti_fail(error, STI_FORMAT, "The region file is damaged; verify the bundle and deploy it again.",
                    "Outliers of matrix %d of a shard version are out of order or outside the matrix.", i);
  }
  return STI_OK;
}

void engine_layer(Engine *engine, int32_t source_layer, const LoadedShard *shards, int32_t count, LayerTimes *times) {
  int64_t started_ns = monotonic_ns();
  uint64_t started = ticks(), decoding = 0;
  engine->pass.source_layer = source_layer;
  engine->pass.shards = shards;
  engine->pass.count = count;
  for (int32_t i = 0; i < count; i++) shard_matrices(engine->model, &shards[i], &engine->matrices[i * STI_MATRICES]);
  for (int32_t i = 0; i < count * STI_MATRICES; i++) prefetch_exceptions(&engine->matrices[i]);
  if (engine->mode == MODE_INT8) {
    for (int matrix = 0; matrix < STI_MATRICES; matrix++) {
      /* O and FFN2 add up over slices: one scale for all of them */
      bool shared = matrix == 3 || matrix == 5;
      for (int32_t i = 0; i < (shared ? 1 : count); i++) {
        quantize_tables(&engine->matrices[i * STI_MATRICES + matrix], shared ? count : 1, STI_MATRICES,
                        &engine->tables8[i][matrix]);
      }
    }
  }
  pool_run(engine->pool, layer_phases, engine);
  uint64_t all = ticks() - started;
  for (int i = 0; i < pool_threads(engine->pool); i++) decoding += engine->threads[i].decode_ticks;
  int64_t wall_ns = monotonic_ns() - started_ns;
  double share = all ? (double)decoding / pool_threads(engine->pool) / (double)all : 0.0;
  times->decompress_ns = (int64_t)(share * (double)wall_ns);
  times->compute_ns = wall_ns - times->decompress_ns;
}

/* ------------------------------------------------------------------ head */

static void pool_rows(Engine *engine) {
  int32_t hidden = engine->model->hidden;
  for (int32_t b = 0; b < engine->pass.batch; b++) {
    const float *x = engine->x + (int64_t)b * engine->pass.tokens * engine->x_stride;
    float *pooled = engine->pooled + b * engine->x_stride;
    int32_t count = engine->model->pooling == POOL_CLS ? 1 : engine->lengths[b];
    memcpy(pooled, x, (size_t)hidden * sizeof *pooled);
    for (int32_t token = 1; token < count; token++) {
      for (int32_t i = 0; i < hidden; i++) pooled[i] += x[token * engine->x_stride + i];
    }
    for (int32_t i = 0; i < hidden; i++) pooled[i] /= (float)count;
  }
}

typedef struct {
  Engine *engine;
  const Linear *linear;
  const float *in; /* [B, H16] */
  float *out;      /* [B, outputs rounded up to 16], rows out_stride apart */
  int64_t out_stride;
  int32_t outputs;
} LinearWork;

/* out = in · Wᵀ + bias; a unit is a run of panels. */
static void linear_phase(void *state, int thread) {
  const LinearWork *work = state;
  Engine *engine = work->engine;
  int32_t panels = (work->outputs + STI_PANEL - 1) / STI_PANEL, step = engine->kernels.panels;
  for (int32_t panel; (panel = step * pool_next(engine->pool)) < panels;) {
    int32_t count = panels - panel < step ? panels - panel : step, first = panel * STI_PANEL;
    if (!work->linear->rows) {
      panel_product(&engine->kernels, &engine->threads[thread],
                    &(PanelWork){.group = {.parts = &work->linear->packed, .count = 1, .panel = panel, .panels = count},
                                 .rows = engine->pass.batch, .a = work->in, .a_stride = engine->x_stride,
                                 .c = work->out + first, .c_stride = work->out_stride,
                                 .bias = work->linear->bias + first});
      continue;
    }
    int32_t hidden = engine->model->hidden, end = first + count * STI_PANEL;
    for (int32_t b = 0; b < engine->pass.batch; b++) {
      for (int32_t i = first; i < end && i < work->outputs; i++) {
        const float *in = work->in + b * engine->x_stride, *weights = work->linear->rows + (int64_t)i * hidden;
        work->out[b * work->out_stride + i] = engine->kernels.dot(in, weights, hidden) + work->linear->bias[i];
      }
    }
  }
}

static void classify(Engine *engine, float *logits) {
  const ModelConfig *model = engine->model;
  const float *in = engine->pooled;
  pool_rows(engine);
  if (model->head_activation != HEAD_NONE) {
    pool_run(engine->pool, linear_phase,
             &(LinearWork){engine, &engine->pooler, in, engine->dense, engine->x_stride, model->hidden});
    for (int32_t b = 0; b < engine->pass.batch; b++) {
      float *row = engine->dense + b * engine->x_stride;
      for (int32_t i = 0; i < model->hidden; i++) {
        row[i] = model->head_activation == HEAD_TANH ? tanhf(row[i]) : fmaxf(row[i], 0.0f);
      }
    }
    in = engine->dense;
  }
  pool_run(engine->pool, linear_phase,
           &(LinearWork){engine, &engine->classifier, in, engine->logits, engine->label_stride, model->labels});
  for (int32_t b = 0; b < engine->pass.batch; b++) {
    memcpy(logits + (int64_t)b * model->labels, engine->logits + b * engine->label_stride,
           (size_t)model->labels * sizeof *logits);
  }
}

void engine_finish(Engine *engine, float *logits, const float **hidden) {
  if (engine->model->has_head) classify(engine, logits);
  size_t row_bytes = (size_t)engine->model->hidden * sizeof(float);
  for (int64_t row = 1; row < engine->pass.rows; row++) {
    memmove(engine->x + row * engine->model->hidden, engine->x + row * engine->x_stride, row_bytes);
  }
  *hidden = engine->x;
  pool_unpin_caller(engine->pool);
}

int64_t engine_resident_bytes(const Engine *engine) { return engine->resident_bytes; }
int64_t engine_activation_bytes(const Engine *engine) { return engine->memory_bytes; }
Isa engine_isa(const Engine *engine) { return engine->kernels.isa; }
