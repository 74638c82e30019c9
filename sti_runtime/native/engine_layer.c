#include "engine_internal.h"

enum { Q, K, V, O, FFN_IN, FFN_OUT, UNITS_PER_THREAD = 2, ROWS_PER_UNIT = 4 };

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* ------------------------------------------------------------------ units: groups of panels */

/* Phases of products, in order. */
typedef enum { PROJECT, GATHER_HEADS, FFN, GATHER_FFN, PHASES } Phase;

static int32_t outputs_of(const Engine *engine, Phase phase) {
  return phase == PROJECT ? engine->d16 : phase == FFN ? engine->f16 : engine->h16;
}

static int32_t groups_of(const Engine *engine, Phase phase) {
  int32_t size = engine->kernels.panels * STI_PANEL;
  return (outputs_of(engine, phase) + size - 1) / size;
}

static int32_t units_of(const Engine *engine, Phase phase) {
  int32_t matrices = phase == PROJECT ? 3 * engine->pass.count : phase == FFN ? engine->pass.count : 1;
  return matrices * groups_of(engine, phase);
}

/* Unit `unit` of a phase: a group of panels of one matrix of one slice, or of all slices where they add up. */
static PanelGroup group_of(const Engine *engine, Phase phase, int32_t unit) {
  static const int first_matrix[PHASES] = {Q, O, FFN_IN, FFN_OUT};
  int32_t groups = groups_of(engine, phase), step = engine->kernels.panels, matrix = unit / groups;
  if (phase == PROJECT) matrix = matrix / 3 * STI_MATRICES + matrix % 3;
  else matrix *= STI_MATRICES;
  int32_t panel = unit % groups * step, panels = outputs_of(engine, phase) / STI_PANEL - panel;
  return (PanelGroup){.parts = &engine->matrices[first_matrix[phase] + matrix],
                      .count = phase == PROJECT || phase == FFN ? 1 : engine->pass.count, .step = STI_MATRICES,
                      .panel = panel, .panels = smaller(step, panels)};
}

/* The unit, and the one that its thread probably gets next: threads take turns. */
static void set_groups(const Engine *engine, Phase phase, int32_t unit, PanelWork *work) {
  work->group = group_of(engine, phase, unit);
  unit += pool_threads(engine->pool);
  if (unit >= units_of(engine, phase)) unit -= units_of(engine, phase++);
  work->next = phase < PHASES && unit < units_of(engine, phase) ? group_of(engine, phase, unit) : (PanelGroup){0};
}

/* ------------------------------------------------------------------ rows: norms and quantization */

static void quantize_row(Engine *engine, int64_t row) {
  engine->x_scale[row] = engine->kernels.quantize(engine->x + row * engine->x_stride, 1, engine->model->hidden,
                                                  engine->x_stride, engine->x8 + row * engine->x_stride);
}

static void normalize_row(Engine *engine, int64_t row, const float *const norm[2]) {
  engine->kernels.normalize(engine->x + row * engine->x_stride, norm[0], norm[1], engine->model->layer_norm_eps,
                            engine->model->hidden);
  if (engine->mode == MODE_INT8) quantize_row(engine, row);
}

static void normalize_phase(Engine *engine, const float *const norm[2]) {
  for (int32_t row; (row = ROWS_PER_UNIT * pool_next(engine->pool)) < engine->pass.rows;) {
    int32_t end = smaller(row + ROWS_PER_UNIT, engine->pass.rows);
    for (; row < end; row++) normalize_row(engine, row, norm);
  }
  pool_barrier(engine->pool);
}

/* Quantize `buffer` [rows][count][size], slices `padded` apart, into work8. */
static void quantize_phase(Engine *engine, const float *buffer, int64_t stride, int32_t size, int32_t padded) {
  if (engine->mode != MODE_INT8) return;
  for (int32_t row; (row = ROWS_PER_UNIT * pool_next(engine->pool)) < engine->pass.rows;) {
    int32_t end = smaller(row + ROWS_PER_UNIT, engine->pass.rows);
    for (; row < end; row++) {
      engine->work_scale[row] = engine->kernels.quantize(buffer + row * stride, engine->pass.count, size, padded,
                                                         engine->work8 + row * stride);
    }
  }
  pool_barrier(engine->pool);
}

void embed_phase(void *state, int thread) {
  Engine *engine = state;
  const Pass *r = &engine->pass;
  int32_t hidden = engine->model->hidden;
  (void)thread;
  for (int32_t row; (row = ROWS_PER_UNIT * pool_next(engine->pool)) < r->rows;) {
    int32_t end = smaller(row + ROWS_PER_UNIT, r->rows);
    for (; row < end; row++) {
      engine->kernels.sum(engine->x + row * engine->x_stride, r->words[row],
                          r->positions + (int64_t)(row % r->tokens) * hidden, r->types ? r->types[row] : NULL, hidden);
      normalize_row(engine, row, engine->embedding_norm);
    }
  }
}

/* ------------------------------------------------------------------ attention */

/* q, k, v [B·L, m·d16] = x · Wᵀ + bias */
static void project_phase(Engine *engine, ThreadState *thread, const LayerParameters *layer) {
  const Pass *r = &engine->pass;
  float *const out[] = {engine->q, engine->k, engine->v};
  const float *const bias[] = {layer->q_bias, layer->k_bias, layer->v_bias};
  int32_t groups = groups_of(engine, PROJECT);
  for (int32_t unit; (unit = pool_next(engine->pool)) < units_of(engine, PROJECT);) {
    int32_t slice = unit / groups / 3, matrix = unit / groups % 3;
    PanelWork work = {.rows = r->rows, .a = engine->x, .a_stride = engine->x_stride, .a8 = engine->x8,
                      .row_scale = engine->x_scale, .c_stride = engine->head_stride};
    set_groups(engine, PROJECT, unit, &work);
    work.c = out[matrix] + slice * engine->d16 + work.group.panel * STI_PANEL;
    work.bias = bias[matrix] + r->shards[slice].slice * engine->d + work.group.panel * STI_PANEL;
    panel_product(&engine->kernels, thread, &work);
  }
  pool_barrier(engine->pool);
}

/* q = softmax(q · kᵀ / √d) · v, by heads, cut by queries where heads are fewer than what keeps all threads busy. */
static void attention_phase(Engine *engine, ThreadState *thread) {
  const Pass *r = &engine->pass;
  int32_t heads = r->batch * r->count, wanted = UNITS_PER_THREAD * pool_threads(engine->pool);
  int32_t parts = smaller((wanted + heads - 1) / heads, (r->tokens + STI_PANEL - 1) / STI_PANEL);
  int32_t size = (r->tokens + parts - 1) / parts;
  for (int32_t unit; (unit = pool_next(engine->pool)) < heads * parts;) {
    int32_t row = unit / parts / r->count, slice = unit / parts % r->count, from = unit % parts * size;
    int64_t start = row * (int64_t)r->tokens * engine->head_stride + slice * engine->d16;
    if (from >= r->tokens) continue;
    engine->kernels.attention(&(Attention){
        .q = engine->q + start + from * engine->head_stride, .k = engine->k + start, .v = engine->v + start,
        .stride = engine->head_stride, .tokens = smaller(size, r->tokens - from), .length = engine->lengths[row],
        .head_size = engine->d, .scratch = thread->scratch});
  }
  pool_barrier(engine->pool);
}

/* ------------------------------------------------------------------ products over all slices, and the FFN */

/* x += a · Wᵀ + bias, W being a matrix of all slices, side by side along the inputs. */
static void gather_phase(Engine *engine, ThreadState *thread, Phase phase, const float *a, int64_t a_stride,
                         int32_t part_stride, const float *bias) {
  for (int32_t unit; (unit = pool_next(engine->pool)) < units_of(engine, phase);) {
    PanelWork work = {.part_stride = part_stride, .rows = engine->pass.rows, .a = a, .a_stride = a_stride,
                      .a8 = engine->work8, .row_scale = engine->work_scale, .c_stride = engine->x_stride, .add = true};
    set_groups(engine, phase, unit, &work);
    work.c = engine->x + work.group.panel * STI_PANEL;
    work.bias = bias + work.group.panel * STI_PANEL;
    panel_product(&engine->kernels, thread, &work);
  }
  pool_barrier(engine->pool);
}

/* ffn [B·L, m·f16] = activation(x · Wᵀ + bias) */
static void ffn_phase(Engine *engine, ThreadState *thread, const LayerParameters *layer) {
  const Pass *r = &engine->pass;
  for (int32_t unit; (unit = pool_next(engine->pool)) < units_of(engine, FFN);) {
    int32_t slice = unit / groups_of(engine, FFN);
    PanelWork work = {.rows = r->rows, .a = engine->x, .a_stride = engine->x_stride, .a8 = engine->x8,
                      .row_scale = engine->x_scale, .c_stride = engine->ffn_stride};
    set_groups(engine, FFN, unit, &work);
    work.c = engine->ffn + slice * engine->f16 + work.group.panel * STI_PANEL;
    work.bias = layer->in_bias + r->shards[slice].slice * engine->f + work.group.panel * STI_PANEL;
    panel_product(&engine->kernels, thread, &work);
    engine->kernels.activate(engine->model->activation, work.c, r->rows, work.group.panels * STI_PANEL,
                             engine->ffn_stride);
  }
  pool_barrier(engine->pool);
}

void layer_phases(void *state, int index) {
  Engine *engine = state;
  ThreadState *thread = &engine->threads[index];
  const LayerParameters *layer = &engine->layers[engine->pass.source_layer];
  thread->decode_ticks = 0;
  project_phase(engine, thread, layer);
  attention_phase(engine, thread);
  quantize_phase(engine, engine->q, engine->head_stride, engine->d, engine->d16);
  gather_phase(engine, thread, GATHER_HEADS, engine->q, engine->head_stride, engine->d16, layer->o_bias);
  normalize_phase(engine, layer->attention_norm);
  ffn_phase(engine, thread, layer);
  quantize_phase(engine, engine->ffn, engine->ffn_stride, engine->f, engine->f16);
  gather_phase(engine, thread, GATHER_FFN, engine->ffn, engine->ffn_stride, engine->f16, layer->out_bias);
  normalize_phase(engine, layer->ffn_norm);
}
