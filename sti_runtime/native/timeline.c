/* timeline.c: one IO thread reads in plan order, one compute thread takes the layers in order.
 *
 *   IO thread       | embedding rows | reads of layer 0 | reads of layer 1 | …
 *   compute thread                   | embedding |..stall..| layer 0 | layer 1 | … | head |
 *
 * A read starts when the one before has ended and its bytes are free in the working buffer, and is slower while a layer
 * is computed; a layer's streamed bytes prolong its compute, and are freed when it has been computed. Layer l computes when its reads (load-exec: all reads) have ended and layer
 * l-1 has been computed.
 */
#include "timeline.h"

#include "wide.h"

enum { PPM = 1000000 };

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

/* Take from *work what `ns` do at a rate; false, and nothing taken, if no more than that is left. */
static bool outlasts(Wide *work, int64_t ns, int64_t rate) {
  const Wide done = wide_product((uint64_t)ns, (uint64_t)rate);
  if (wide_compare(*work, done) <= 0) return false;
  *work = wide_difference(*work, done);
  return true;
}

static int64_t time_of(Wide work, int64_t rate) { return (int64_t)wide_ceiling(work, wide_of((uint64_t)rate)).low; }

/* When a read that starts at now_ns ends, rounded up to a ns. computed [count] layers are known; *ahead is the first of
 * them that may be computed after now_ns, moved on for the next read. */
static int64_t read_end(int64_t now_ns, int64_t alone_ns, int64_t beside_ppm, const LayerTime *computed, int32_t count,
                        int32_t *ahead) {
  if (beside_ppm == PPM) return now_ns + alone_ns;
  /* of which a ns does beside_ppm while nothing is computed, else 10^6 */
  Wide work = wide_product((uint64_t)alone_ns, (uint64_t)beside_ppm);
  for (; *ahead < count; ++*ahead) {
    const LayerTime *layer = &computed[*ahead];
    if (now_ns < layer->compute_start_ns) {
      if (!outlasts(&work, layer->compute_start_ns - now_ns, beside_ppm)) break;
      now_ns = layer->compute_start_ns;
    }
    if (now_ns < layer->compute_end_ns) {
      if (!outlasts(&work, layer->compute_end_ns - now_ns, PPM)) return now_ns + time_of(work, PPM);
      now_ns = layer->compute_end_ns;
    }
  }
  return now_ns + time_of(work, beside_ppm);
}

int64_t sharing_layer_ns(Sharing sharing, int64_t streamed_bytes) {
  if (streamed_bytes == 0) return 0;
  const Wide ps = wide_product((uint64_t)streamed_bytes, (uint64_t)sharing.ps_per_byte);
  return sharing.each_ns + (int64_t)wide_floor(ps, wide_of(1000)).low;
}

bool simulate(const LayerWork *works, int32_t depth, const FixedTime *fixed, int64_t working_bytes, bool load_exec,
              Sharing sharing, Timeline *timeline) {
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
  int32_t ahead = 0;
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
      io_ns = read_end(io_ns, read->ns, sharing.beside_ppm, timeline->layers, i, &ahead);
      times->io_end_ns = io_ns;
    }
    times->compute_start_ns = later(compute_ns, load_exec ? all_read_ns : times->io_end_ns);
    stall_ns += times->compute_start_ns - compute_ns;
    const int64_t added_ns = load_exec ? 0 : sharing_layer_ns(sharing, works[i].streamed_bytes);
    compute_ns = times->compute_end_ns = times->compute_start_ns + works[i].compute_ns + added_ns;
  }
  timeline->end_ns = compute_ns + fixed->head_ns;
  timeline->stall_ns = stall_ns;
  return true;
}
