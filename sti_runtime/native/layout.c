/* layout.c: how a shard's matrices are shaped and where the parts of a stored version lie (docs/bundle.md). */
#include "formats.h"

#include <string.h>

const int sti_fidelities[STI_FIDELITIES] = {2, 3, 4, 5, 6, 32};

enum { STEP = 4, PLANE_ALIGNMENT = 64, VALUE_BYTES = 4, OUTLIER_BYTES = 8 };

int sti_fidelity_index(int fidelity) {
  for (int i = 0; i < STI_FIDELITIES; i++)
    if (sti_fidelities[i] == fidelity) return i;
  return -1;
}

void matrix_shape(const ModelConfig *model, int matrix, int32_t *out, int32_t *in) {
  int32_t head = model->hidden / model->heads, neurons = model->ffn / model->heads;
  const int32_t shapes[STI_MATRICES][2] = {
      {head, model->hidden}, {head, model->hidden},    {head, model->hidden},
      {model->hidden, head}, {neurons, model->hidden}, {model->hidden, neurons},
  };
  *out = shapes[matrix][0];
  *in = shapes[matrix][1];
}

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void matrices_layout(int count, const int64_t (*shapes)[2], int fidelity, const uint32_t *outliers,
                     PayloadLayout *layout) {
  /* Widths of the bit planes of each fidelity, low bits first. */
  static const int plane_bits[STI_FIDELITIES][2] = {{2, 0}, {2, 1}, {4, 0}, {4, 1}, {4, 2}, {0, 0}};
  memset(layout, 0, sizeof *layout);
  for (int i = 0; i < count; i++) {
    layout->start[i] = layout->stream;
    layout->stream += round_up(shapes[i][0], STI_PANEL) * round_up(shapes[i][1], STEP);
  }
  if (fidelity == 32) {
    layout->payload_bytes = VALUE_BYTES * layout->stream;
    for (int i = 0; i < count; i++) layout->outlier_offset[i] = layout->payload_bytes;
    return;
  }
  int64_t end = (int64_t)count * VALUE_BYTES << fidelity; /* centroid tables */
  const int *widths = plane_bits[sti_fidelity_index(fidelity)];
  for (; layout->planes < 2 && widths[layout->planes] != 0; layout->planes++) {
    layout->plane_bits[layout->planes] = widths[layout->planes];
    layout->plane_offset[layout->planes] = round_up(end, PLANE_ALIGNMENT);
    end = layout->plane_offset[layout->planes] + layout->stream * widths[layout->planes] / 8;
  }
  end = round_up(end, PLANE_ALIGNMENT);
  for (int i = 0; i < count; i++) {
    layout->outlier_offset[i] = end;
    end += OUTLIER_BYTES * (int64_t)outliers[i];
  }
  layout->payload_bytes = end;
}

void payload_layout(const ModelConfig *model, int fidelity, const uint32_t outliers[STI_MATRICES],
                    PayloadLayout *layout) {
  int64_t shapes[STI_MATRICES][2];
  for (int i = 0; i < STI_MATRICES; i++) {
    int32_t out, in;
    matrix_shape(model, i, &out, &in);
    shapes[i][0] = out;
    shapes[i][1] = in;
  }
  matrices_layout(STI_MATRICES, (const int64_t(*)[2])shapes, fidelity, outliers, layout);
}
