/* unit_kinds.h: the measurements behind run_unit, as structs for who measures in process, and as their JSON. */
#ifndef AGENT_UNIT_KINDS_H
#define AGENT_UNIT_KINDS_H

#include "../../sti_runtime/native/planner.h"
#include "context.h"
#include "watch.h"

/* Where the bytes of a sample came from, by the kernel's count: all from storage, past the page cache or through it;
 * none; some; it does not count. */
typedef enum { PROVEN_DIRECT, PROVEN_BUFFERED_COLD, PROVEN_CACHED, PROVEN_MIXED, PROVEN_UNKNOWN } ProvenMode;
extern const char *const proven_mode_names[]; /* "direct", …, NULL */
/* storage_bytes: −1 when the kernel does not count. in_use: not the mode asked for where storage refused that. */
ProvenMode proven_mode(int64_t planned_bytes, int64_t storage_bytes, IoMode in_use);

/* ------------------------------------------------------------------ probe.c */

StiCode run_probe(Context *context, Text *result, StiError *error);

/* ------------------------------------------------------------------ profiling.c: samples lie in the arena */

typedef struct { IoSample *samples; size_t count; IoMode io_mode; Watch watch; } IoSamples;
typedef struct {
  ComputeSample *samples; size_t count;
  IoSample *reads; size_t read_count; /* beside, all while a layer was computed */
  IoMode io_mode;
  Watch watch;
} ComputeSamples;
typedef struct { FixedSample *samples; size_t count; Watch watch; } FixedSamples;
StiCode profile_io(Context *context, const Unit *unit, Arena *arena, IoSamples *found, StiError *error);
StiCode profile_compute(Context *context, const Unit *unit, Arena *arena, ComputeSamples *found, StiError *error);
StiCode profile_fixed(Context *context, const Unit *unit, Arena *arena, FixedSamples *found, StiError *error);
StiCode run_profile(Context *context, const Unit *unit, Text *result, StiError *error); /* any of the three */

/* A generator that gives the same numbers for the same seed everywhere (splitmix64). below: 0 … bound − 1. */
uint64_t random_next(uint64_t *state);
int64_t random_below(uint64_t *state, int64_t bound);

/* ------------------------------------------------------------------ execute.c, scoring.c */

typedef struct {
  int64_t row;
  bool warmup;
  int64_t started_ns; /* of CLOCK_MONOTONIC */
  int64_t latency_ns, stall_ns, planned_bytes, storage_bytes;
  IoMode mode_asked;
  ProvenMode mode_proven;
  float *logits;     /* [logit_count] */
  int logit_count;
  LayerTrace *trace; /* [layer_count] */
  int layer_count;
  bool io_not_accounted, not_from_storage, not_cached, throttled; /* reasons why it does not count */
} Sample;

typedef struct { MemoryParts parts; int64_t process_peak_bytes; /* 0: not readable */ } Memory;

/* One request, evicted before unless it is to be cached; the sample lies in the arena. outcome: valid until the next. */
StiCode execute_request(Context *context, const Unit *unit, int index, Arena *arena, Sample *sample, Outcome *outcome,
                        StiError *error);
StiCode run_execute(Context *context, const Unit *unit, const GateVerdict *gates, int gate_count, Text *result,
                    StiError *error);
StiCode run_evaluate(Context *context, const Unit *unit, Text *result, StiError *error);

Memory memory_now(const Executor *executor);
/* What is proven of all requests together: what is proven of each, or mixed. */
ProvenMode proven_of_all(const Sample *samples, int count);
void write_sample(Text *out, const Sample *sample);
void write_memory(Text *out, const Memory *memory);
const char *io_mode_name(IoMode io_mode);
extern const char *const io_mode_names[];      /* NULL-ended */
extern const char *const request_kind_names[]; /* NULL-ended */

/* ------------------------------------------------------------------ spawning.c */

/* Request `index` of the unit in a new process; its times count from before the process started.
 * Errors: STI_SPAWNED with the child's own words. */
StiCode run_spawned(Context *context, const Unit *unit, int index, Arena *arena, Sample *sample, Memory *memory,
                    IoMode *io_mode, StiError *error);

#endif
