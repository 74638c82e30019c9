/* planner.h: samples → device profile (fit), and profiles + T + |S| + W → plan, by the arithmetic of docs/planner.md.
 *
 * Both agree with sti_runtime/profile_fit.py, planner.py, timeline.py and policies.py digest for digest.
 */
#ifndef STI_PLANNER_H
#define STI_PLANNER_H

#include "formats.h"

/* ------------------------------------------------------------------ fit */

/* As in a journal's unit results; mode_asked and mode_proven: an IoMode and a ProvenMode, which no fit looks at. */
typedef struct {
  int64_t versions, bytes, storage_bytes, duration_ns;
  int mode_asked, mode_proven;
  bool throttled, valid;
} IoSample;
typedef struct { int64_t width, fidelity, read_bytes, decompress_ns, compute_ns; bool throttled, warmup; } ComputeSample;
typedef struct {
  int64_t embed_io_ns, embed_compute_ns, head_ns, bytes, storage_bytes;
  int mode_asked, mode_proven;
  bool throttled, warmup;
} FixedSample;

typedef struct {
  IoSample *io; size_t io_count;         /* while nothing was computed */
  IoSample *beside; size_t beside_count; /* while a layer was */
  ComputeSample *compute; size_t compute_count;
  FixedSample *fixed; size_t fixed_count;
  const int64_t *widths; size_t width_count;        /* of the bundle's submodels: those that must be measured … */
  const int64_t *fidelities; size_t fidelity_count; /* … and of its regions; any order, too few samples are `unfit` */
} ProfileSamples;

/* What a profile says besides its fits: fill bundle, engine, sequence_length, threads, queue_depth, emulated of
 * *profile first. Lists are allocated in the arena. Errors: STI_INPUT when a kind has no usable sample, a sample's
 * fidelity is unknown, or a figure would be 2^63 or more; STI_RESOURCE. */
StiCode fit_profile(Arena *arena, const ProfileSamples *samples, DeviceProfile *profile, StiError *error);

/* ------------------------------------------------------------------ plan */

typedef struct {
  const Manifest *manifest;
  const ImportanceProfile *importance; /* NULL: only baselines can be planned */
  const DeviceProfile *profile;
  const char *profile_digest;
  int64_t target_ns, preload_bytes, working_bytes;
  Policy policy;
  bool slack;
  int64_t seed; /* policy `random` */
} PlanRequest;

/* The plan lives in the arena and points into the request's manifest and profile. Errors: STI_INFEASIBLE naming the
 * smallest T; STI_RESOURCE when no T works because of W (without slack: of |S|), or memory is short; STI_INPUT. */
StiCode make_plan(Arena *arena, const PlanRequest *request, Plan *plan, StiError *error);

#endif
