/* timeline.h: what the executor will do with a plan, simulated in integer nanoseconds (docs/planner.md, "Timeline"). */
#ifndef STI_TIMELINE_H
#define STI_TIMELINE_H

#include "formats.h"

typedef struct { int64_t bytes, ns; } TimedRead;

/* One layer: its merged reads in order, the bytes they stream, its compute with decompression. */
typedef struct {
  TimedRead *reads; /* [width], read_count of them in use */
  int32_t read_count;
  int64_t streamed_bytes, compute_ns;
} LayerWork;

typedef struct {
  LayerTime *layers; /* [depth] ns from the request; a layer without reads has both IO times 0 */
  int64_t end_ns, stall_ns;
} Timeline;

/* What IO and compute take from each other: while a layer is computed a read takes beside_ppm / 10^6 times as long as
 * alone; reading a layer prolongs its compute by each_ns, and by ps_per_byte. */
typedef struct { int64_t beside_ppm, each_ns, ps_per_byte; } Sharing;

int64_t sharing_layer_ns(Sharing sharing, int64_t streamed_bytes);

/* One request over works [depth] into timeline->layers. False if it can never end: a layer (load-exec: the whole
 * submodel) streams more than the working buffer holds. The caller keeps all sums below 2^63 (plan_build.h). */
bool simulate(const LayerWork *works, int32_t depth, const FixedTime *fixed, int64_t working_bytes, bool load_exec,
              Sharing sharing, Timeline *timeline);

#endif
