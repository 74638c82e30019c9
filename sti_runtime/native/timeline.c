/* timeline.c: one IO thread reads in plan order, one compute thread takes the layers in order.
 *
 *   IO thread       | embedding rows | reads of layer 0 | reads of layer 1 | …
 *   compute thread                   | embedding |..stall..| layer 0 | layer 1 | … | head |
 *
 * A read starts when the one before has ended and its bytes are free in the working buffer; a layer's streamed bytes
 * are freed when it has been computed. Layer l computes when its reads (load-exec: all reads) have ended and layer
 * l-1 has been computed.
 */
#include "timeline.h"

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

bool simulate(const LayerWork *works, int32_t depth, const FixedTime *fixed, int64_t working_bytes, bool load_exec,
              Timeline *timeline) {
  int64_t io_ns = fixed->embed_io_ns, compute_ns = io_ns + fixed->embed_compute_ns;
  int64_t all_read_ns = io_ns, all_bytes = 0;
  for (int32_t i = 0; i < depth; i++) {
    all_bytes += works[i].streamed_bytes;
    for (int32_t r = 0; r < works[i].read_count; r++) all_read_ns += works[i].reads[r].ns;
    if (works[i].streamed_bytes > working_bytes) return false;
  }
  if (load_exec && all_bytes > working_bytes) return false;

  int64_t used_bytes = 0, stall_ns = 0;
  int32_t oldest = 0; /* layer whose bytes are freed next */
  for (int32_t i = 0; i < depth; i++) {
    LayerTime *times = &timeline->layers[i];
    *times = (LayerTime){0};
    for (int32_t r = 0; r < works[i].read_count; r++) {
      const TimedRead *read = &works[i].reads[r];
      for (; used_bytes + read->bytes > working_bytes && oldest < i; oldest++) {
        if (works[oldest].read_count == 0) continue;
        used_bytes -= works[oldest].streamed_bytes;
        io_ns = later(io_ns, timeline->layers[oldest].compute_end_ns);
      }
      if (r == 0) times->io_start_ns = io_ns;
      used_bytes += read->bytes;
      io_ns += read->ns;
      times->io_end_ns = io_ns;
    }
    times->compute_start_ns = later(compute_ns, load_exec ? all_read_ns : times->io_end_ns);
    stall_ns += times->compute_start_ns - compute_ns;
    compute_ns = times->compute_end_ns = times->compute_start_ns + works[i].compute_ns;
  }
  timeline->end_ns = compute_ns + fixed->head_ns;
  timeline->stall_ns = stall_ns;
  return true;
}
