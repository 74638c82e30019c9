#include "engine_internal.h"

#include <math.h>
#include <string.h>

/* ------------------------------------------------------------------ where a matrix's parts lie */

static int64_t align_line(int64_t offset) {
  return (offset + CACHE_LINE_BYTES - 1) / CACHE_LINE_BYTES * CACHE_LINE_BYTES;
}

static int32_t padded_inputs(int32_t inputs) { return (inputs + BLOCK_INPUTS - 1) / BLOCK_INPUTS * BLOCK_INPUTS; }

static int64_t stream_length(const Matrix *matrix) {
  return (int64_t)(matrix->outputs + STI_PANEL - 1) / STI_PANEL * STI_PANEL * matrix->padded;
}

void shard_matrices(const ModelConfig *model, const LoadedShard *shard, Matrix matrices[STI_MATRICES]) {
  PayloadLayout layout;
  payload_layout(model, shard->fidelity, shard->outliers, &layout);
  for (int i = 0; i < STI_MATRICES; i++) {
    Matrix *m = &matrices[i];
    *m = (Matrix){.fidelity = shard->fidelity};
    matrix_shape(model, i, &m->outputs, &m->inputs);
    m->padded = padded_inputs(m->inputs);
    if (shard->fidelity == 32) {
      m->stream = (const float *)shard->data + layout.start[i];
      m->plane[0] = m->plane[1] = (const uint8_t *)m->stream;
      m->plane_bytes[0] = BLOCK * (int)sizeof(float);
      continue;
    }
    m->table = (const float *)shard->data + ((int64_t)i << shard->fidelity);
    for (int plane = 0; plane < layout.planes; plane++) {
      m->plane_bytes[plane] = BLOCK * layout.plane_bits[plane] / 8;
      m->plane[plane] = shard->data + layout.plane_offset[plane] + layout.start[i] / BLOCK * m->plane_bytes[plane];
    }
    if (layout.planes == 1) m->plane[1] = m->plane[0];
    m->outliers = shard->outliers[i];
    m->positions = (const uint32_t *)(shard->data + layout.outlier_offset[i]);
    m->values = (const float *)(m->positions + m->outliers);
  }
}

int64_t gobo6_matrix(const uint8_t *payload, int32_t outputs, int32_t inputs, uint32_t outliers, Matrix *m) {
  *m = (Matrix){.fidelity = 6, .outputs = outputs, .inputs = inputs, .padded = padded_inputs(inputs),
                .table = (const float *)payload, .plane_bytes = {32, 16}, .outliers = outliers};
  int64_t blocks = stream_length(m) / BLOCK, low = 64 * sizeof(float), high = align_line(low + 32 * blocks);
  int64_t exceptions = align_line(high + 16 * blocks);
  m->plane[0] = payload + low;
  m->plane[1] = payload + high;
  m->positions = (const uint32_t *)(payload + exceptions);
  m->values = (const float *)(m->positions + outliers);
  return exceptions + 8 * (int64_t)outliers;
}

bool outliers_are_sound(const Matrix *matrix) {
  const uint32_t *positions = matrix->positions;
  uint32_t n = matrix->outliers;
  bool ascending = true;
  for (uint32_t i = 1; i < n; i++) ascending &= positions[i - 1] < positions[i];
  return ascending && (n == 0 || positions[n - 1] < stream_length(matrix));
}

/* |value| ≤ STI_MOST_WEIGHT8. Adding 1.5 · 2^23 leaves the nearest integer in the low bits. */
static int8_t rounded(float value) {
  uint32_t bits;
  value += 12582912.0f;
  memcpy(&bits, &value, sizeof bits);
  return (int8_t)bits;
}

void quantize_tables(Matrix *matrices, int32_t count, int32_t step, int8_t (*tables8)[64]) {
  float most = 0;
  for (int32_t i = 0; i < count; i++) {
    const Matrix *m = &matrices[i * step];
    if (m->fidelity == 32) continue; /* tables are ascending: the ends are the extremes */
    most = fmaxf(most, fmaxf(fabsf(m->table[0]), fabsf(m->table[(1 << m->fidelity) - 1])));
  }
  float inverse = most > 0 ? STI_MOST_WEIGHT8 / most : 0.0f;
  for (int32_t i = 0; i < count; i++) {
    Matrix *m = &matrices[i * step];
    if (m->fidelity == 32) continue;
    int8_t *table = tables8[i * step];
    for (int code = 0; code < 1 << m->fidelity; code++) table[code] = rounded(m->table[code] * inverse);
    for (int size = 1 << m->fidelity; size < 64; size *= 2) memcpy(table + size, table, (size_t)size);
    m->table8 = table;
    m->scale = most / STI_MOST_WEIGHT8;
  }
}

/* ------------------------------------------------------------------ products */

/* A tile being filled, the inputs of one or several parts that follow one another in a. */
typedef struct {
  const Kernels *kernels;
  ThreadState *thread;
  const PanelWork *work;
  bool started;   /* c holds something */
  bool int8;      /* of the tile */
  int32_t filled; /* inputs */
  int32_t column; /* of a, where the tile's inputs begin */
  float scale;    /* int8: of the tile's weights */
  int32_t outliers[MAX_PANELS];
  Ahead ahead; /* what the next tile is made of */
} Tile;

static int8_t *tile8_panel(const Tile *tile, int panel) {
  return (int8_t *)tile->thread->scratch + (int64_t)panel * tile->kernels->depth8 * STI_PANEL;
}

static float *tile_panel(const Tile *tile, int panel) {
  return tile->thread->scratch + (int64_t)panel * tile->kernels->depth * STI_PANEL;
}

/* Small and scattered parts at the start of a layer: all at once. */
void prefetch_exceptions(const Matrix *matrix) {
  if (matrix->fidelity == 32) return;
  uintptr_t starts[] = {(uintptr_t)matrix->table, (uintptr_t)matrix->positions};
  int64_t bytes[] = {(int64_t)sizeof(float) << matrix->fidelity, (int64_t)matrix->outliers * 8};
  for (int i = 0; i < 2; i++) {
    for (int64_t at = 0; at < bytes[i]; at += CACHE_LINE_BYTES) {
      __builtin_prefetch((const void *)(starts[i] + (uintptr_t)at));
    }
  }
}

/* Note what the next tile is made of: up to a tile's depth from input `from` of part `part` on, or, behind the last
 * part, of the group after this one. */
static void look_ahead(Tile *tile, int32_t part, int32_t from) {
  const PanelWork *work = tile->work;
  const PanelGroup *group = part < work->group.count ? &work->group : &work->next;
  Ahead *ahead = &tile->ahead;
  ahead->count = ahead->lines = 0;
  if (group == &work->next) part = 0;
  int32_t left = work->a8 ? tile->kernels->depth8 : tile->kernels->depth;
  for (int32_t inputs; left > 0 && part < group->count; left -= inputs, from = 0, part++) {
    const Matrix *matrix = &group->parts[part * group->step];
    inputs = matrix->inputs - from < left ? matrix->inputs - from : left;
    for (int i = 0; i < 2 * group->panels && ahead->count < AHEAD_SPANS; i++) {
      int64_t block = ((int64_t)(group->panel + i / 2) * matrix->padded + from) / BLOCK_INPUTS;
      int32_t bytes = padded_inputs(inputs) / BLOCK_INPUTS * matrix->plane_bytes[i % 2];
      int32_t lines = (bytes + CACHE_LINE_BYTES - 1) / CACHE_LINE_BYTES;
      if (lines == 0) continue;
      uintptr_t start = (uintptr_t)matrix->plane[i % 2] + (uintptr_t)(block * matrix->plane_bytes[i % 2]);
      ahead->spans[ahead->count].start = start;
      ahead->spans[ahead->count++].lines = lines;
      ahead->lines += lines;
    }
  }
}

/* Multiply floats at w; the first product of a work adds its bias. */
static void multiply(Tile *tile, const float *w, int64_t w_panel, int32_t column, int32_t inputs) {
  const PanelWork *work = tile->work;
  tile->kernels->product(&(Product){
      .rows = work->rows, .inputs = inputs, .panels = work->group.panels, .a = work->a + column,
      .a_stride = work->a_stride, .w = w, .w_panel = w_panel, .w_stride = STI_PANEL, .c = work->c,
      .c_stride = work->c_stride, .bias = tile->started ? NULL : work->bias, .add = tile->started || work->add,
      .ahead = &tile->ahead});
  tile->started = true;
}

static void flush(Tile *tile) {
  if (!tile->filled) return;
  const PanelWork *work = tile->work;
  if (!tile->int8) {
    multiply(tile, tile_panel(tile, 0), (int64_t)tile->kernels->depth * STI_PANEL, tile->column, tile->filled);
  } else {
    Product8 product = {
        .rows = work->rows, .inputs = padded_inputs(tile->filled), .panels = work->group.panels,
        .a = work->a8 + tile->column, .a_stride = work->a_stride, .row_scale = work->row_scale,
        .w = tile8_panel(tile, 0), .w_panel = (int64_t)tile->kernels->depth8 * STI_PANEL, .scale = tile->scale,
        .x = work->a + tile->column, .x_stride = work->a_stride, .c = work->c, .c_stride = work->c_stride,
        .bias = tile->started ? NULL : work->bias, .add = tile->started || work->add, .ahead = &tile->ahead};
    for (int j = 0; j < MAX_PANELS; j++) {
      product.outliers[j] = tile->thread->outliers + j * TILE_OUTLIERS;
      product.outlier_count[j] = tile->outliers[j];
      tile->outliers[j] = 0;
    }
    tile->kernels->product8(&product);
    tile->started = true;
  }
  tile->filled = 0;
}

/* Index of the first outlier at or after `position`. */
static uint32_t outlier_from(const Matrix *matrix, uint32_t position) {
  uint32_t low = 0, high = matrix->outliers;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (matrix->positions[middle] < position) low = middle + 1;
    else high = middle;
  }
  return low;
}

/* Inputs [from, from + inputs) of one panel, behind what the tile holds; false (int8 only): too many outliers. */
static bool fill_panel(Tile *tile, const Matrix *matrix, int j, int32_t from, int32_t inputs) {
  int32_t panel = tile->work->group.panel + j;
  int64_t block = ((int64_t)panel * matrix->padded + from) / BLOCK_INPUTS;
  int64_t blocks = padded_inputs(inputs) / BLOCK_INPUTS;
  const uint8_t *low = matrix->plane[0] + block * matrix->plane_bytes[0];
  const uint8_t *high = matrix->plane[1] + block * matrix->plane_bytes[1];
  uint32_t start = (uint32_t)(block * BLOCK), end = (uint32_t)(inputs * STI_PANEL), i = outlier_from(matrix, start), at;
  if (!tile->int8) {
    float *out = tile_panel(tile, j) + tile->filled * STI_PANEL;
    tile->kernels->decode(matrix->fidelity, matrix->table, low, high, blocks, out);
    for (; i < matrix->outliers && (at = matrix->positions[i] - start) < end; i++) out[at] = matrix->values[i];
    return true;
  }
  int8_t *out = tile8_panel(tile, j) + tile->filled * STI_PANEL;
  TileOutlier *outliers = tile->thread->outliers + j * TILE_OUTLIERS;
  int32_t count = tile->outliers[j];
  tile->kernels->decode8(matrix->fidelity, matrix->table8, low, high, blocks, out);
  for (; i < matrix->outliers && (at = matrix->positions[i] - start) < end; i++) {
    if (count == TILE_OUTLIERS) return false;
    int32_t input = (int32_t)(at / STI_PANEL), output = (int32_t)(at % STI_PANEL);
    out[input / BLOCK_INPUTS * BLOCK + output * BLOCK_INPUTS + input % BLOCK_INPUTS] = 0;
    outliers[count++] = (TileOutlier){.input = tile->filled + input, .output = output, .value = matrix->values[i]};
  }
  tile->outliers[j] = count;
  return true;
}

/* Up to `inputs` inputs from `from` on; returns how many fitted. */
static int32_t fill(Tile *tile, const Matrix *matrix, int32_t from, int32_t inputs) {
  uint64_t started = ticks();
  for (int32_t before[MAX_PANELS];;) {
    bool fits = true;
    memcpy(before, tile->outliers, sizeof before);
    for (int j = 0; fits && j < tile->work->group.panels; j++) fits = fill_panel(tile, matrix, j, from, inputs);
    if (fits) break;
    memcpy(tile->outliers, before, sizeof before);
    if (tile->filled) {
      inputs = 0;
      break;
    }
    inputs = padded_inputs(inputs / 2); /* a block's 64 weights always fit */
  }
  tile->filled += inputs;
  tile->thread->decode_ticks += ticks() - started;
  return inputs;
}

void panel_product(const Kernels *kernels, ThreadState *thread, const PanelWork *work) {
  Tile tile; /* not cleared as a whole: most of it is spans, of which `count` count */
  tile.kernels = kernels;
  tile.thread = thread;
  tile.work = work;
  tile.started = tile.int8 = false;
  tile.filled = tile.column = tile.ahead.count = tile.ahead.lines = 0;
  memset(tile.outliers, 0, sizeof tile.outliers);
  for (int32_t part = 0; part < work->group.count; part++) {
    const Matrix *matrix = &work->group.parts[part * work->group.step];
    int32_t column = part * work->part_stride;
    bool int8 = work->a8 && matrix->table8;
    int32_t depth = int8 ? kernels->depth8 : kernels->depth;
    bool follows = tile.int8 == int8 && tile.column + tile.filled == column && matrix->fidelity != 32;
    if (!follows) {
      look_ahead(&tile, part, 0);
      flush(&tile);
    }
    for (int32_t from = 0, taken; from < matrix->inputs; from += taken) {
      taken = matrix->inputs - from < depth ? matrix->inputs - from : depth;
      if (matrix->fidelity == 32) {
        int64_t panel_length = (int64_t)matrix->padded * STI_PANEL;
        look_ahead(&tile, part + (from + taken == matrix->inputs), (from + taken) % matrix->inputs);
        multiply(&tile, matrix->stream + work->group.panel * panel_length + (int64_t)from * STI_PANEL, panel_length,
                 column + from, taken);
        continue;
      }
      if (tile.filled == depth) {
        look_ahead(&tile, part, from);
        flush(&tile);
      }
      if (taken > depth - tile.filled) taken = depth - tile.filled;
      if (!tile.filled) tile.column = column + from;
      tile.int8 = int8;
      tile.scale = matrix->scale;
      taken = fill(&tile, matrix, from, taken);
      if (!taken) flush(&tile);
    }
  }
  look_ahead(&tile, work->group.count, 0);
  flush(&tile);
}
