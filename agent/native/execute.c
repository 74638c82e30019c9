/* execute.c: timed requests of one plan, one after the other. */
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel_files.h"
#include "unit_kinds.h"

const char *const io_mode_names[] = {"direct", "buffered", NULL};
const char *const request_kind_names[] = {"spawn-cold", "cold", "warm", "cached", NULL};

const char *const proven_mode_names[] = {"direct", "buffered-cold", "cached", "mixed", "unknown", NULL};

const char *io_mode_name(IoMode io_mode) { return io_mode_names[io_mode]; }

/* ------------------------------------------------------------------ memory of the process */

/* VmHWM goes back to what is resident now; where that is refused it stays the peak of the process's whole life.
 * Source: Documentation/filesystems/proc.rst, clear_refs. */
static void reset_process_peak(void) {
  int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return;
  ssize_t ignored = write(fd, "5", 1);
  (void)ignored;
  close(fd);
}

static int64_t process_peak_bytes(void) {
  char text[4096], *rest = text, *line;
  int64_t kib;
  if (!kernel_text(text, sizeof text, "/proc/self/status")) return 0;
  while ((line = next_line(&rest)) != NULL) {
    char *value = split_line(line, ':');
    if (value == NULL || strcmp(line, "VmHWM") != 0) continue;
    value[strcspn(value, " ")] = '\0';
    return parse_int(value, &kib) && kib > 0 && kib < INT64_MAX / 1024 ? 1024 * kib : 0;
  }
  return 0;
}

Memory memory_now(const Executor *executor) {
  return (Memory){.parts = executor_memory(executor), .process_peak_bytes = process_peak_bytes()};
}

/* ------------------------------------------------------------------ requests */

/* Copy what belongs to the executor. */
static StiCode keep_outcome(const Outcome *outcome, int64_t row, bool warmup, Arena *arena, Sample *sample,
                            StiError *error) {
  size_t logits = (size_t)outcome->logit_count * sizeof *sample->logits;
  size_t trace = (size_t)outcome->layer_count * sizeof *sample->trace;
  *sample = (Sample){.row = row,
                     .warmup = warmup,
                     .started_ns = outcome->started_ns,
                     .latency_ns = outcome->latency_ns,
                     .stall_ns = outcome->stall_ns,
                     .planned_bytes = outcome->planned_bytes,
                     .storage_bytes = outcome->storage_bytes > 0 ? outcome->storage_bytes : 0,
                     .mode_proven = proven_mode(outcome->planned_bytes,
                                                outcome->io_not_accounted ? -1 : outcome->storage_bytes,
                                                outcome->io_mode),
                     .logits = arena_alloc(arena, logits + 1),
                     .logit_count = outcome->logit_count,
                     .trace = arena_alloc(arena, trace + 1),
                     .layer_count = outcome->layer_count,
                     .io_not_accounted = outcome->io_not_accounted,
                     .not_from_storage = outcome->not_from_storage,
                     .not_cached = outcome->not_cached};
  if (sample->logits == NULL || sample->trace == NULL) return sti_out_of_memory(error);
  for (int i = 0; i < outcome->logit_count; i++)
    if (!isfinite(outcome->logits[i]))
      return sti_fail(error, STI_FORMAT, "The model's weights are not finite; build the bundle from sound ones.",
                      "Logit %d of row %" PRId64 " is not finite.", i, row);
  memcpy(sample->logits, outcome->logits, logits);
  memcpy(sample->trace, outcome->trace, trace);
  return STI_OK;
}

StiCode execute_request(Context *context, const Unit *unit, int index, Arena *arena, Sample *sample, Outcome *outcome,
                        StiError *error) {
  Executor *executor;
  Request request;
  int64_t row = unit->rows[index];
  STI_TRY(context_executor(context, &executor, error));
  STI_TRY(context_request(context, row, &request, error));
  if (unit->request_kind != REQUEST_CACHED) STI_TRY(executor_evict(executor, unit->io_mode, error));
  STI_TRY(executor_run(executor, &unit->plan, &request, unit->request_kind, unit->io_mode, outcome, error));
  STI_TRY(keep_outcome(outcome, row, index < unit->warmups, arena, sample, error));
  sample->mode_asked = unit->io_mode;
  return STI_OK;
}

typedef struct { Sample *samples; IoMode io_mode; Memory memory; Sensors before, after; Watch watch; } Executed;

static StiCode in_process(Context *context, const Unit *unit, Arena *arena, Executed *executed, StiError *error) {
  Executor *executor;
  STI_TRY(context_executor(context, &executor, error));
  executor_reset(executor);
  reset_process_peak();
  for (int i = 0; i < unit->row_count; i++) {
    Outcome outcome;
    Sample *sample = &executed->samples[i];
    STI_TRY(unit_stopped());
    STI_TRY(execute_request(context, unit, i, arena, sample, &outcome, error));
    STI_TRY(watch_sampled(&executed->watch, i + 1, &sample->throttled, error));
    executed->io_mode = outcome.io_mode;
  }
  executed->memory = memory_now(executor);
  return STI_OK;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Each request in a process of its own; memory is the largest of any of them, part by part. */
static StiCode spawned(Context *context, const Unit *unit, Arena *arena, Executed *executed, StiError *error) {
  Memory *memory = &executed->memory;
  for (int i = 0; i < unit->row_count; i++) {
    Memory used;
    Sample *sample = &executed->samples[i];
    STI_TRY(unit_stopped());
    STI_TRY(run_spawned(context, unit, i, arena, sample, &used, &executed->io_mode, error));
    STI_TRY(watch_sampled(&executed->watch, i + 1, &sample->throttled, error));
    memory->parts.resident = larger(memory->parts.resident, used.parts.resident);
    memory->parts.preload = larger(memory->parts.preload, used.parts.preload);
    memory->parts.working = larger(memory->parts.working, used.parts.working);
    memory->parts.activations = larger(memory->parts.activations, used.parts.activations);
    memory->process_peak_bytes = larger(memory->process_peak_bytes, used.process_peak_bytes);
  }
  return STI_OK;
}

ProvenMode proven_mode(int64_t planned_bytes, int64_t storage_bytes, IoMode in_use) {
  if (storage_bytes < 0) return PROVEN_UNKNOWN;
  if (storage_bytes >= planned_bytes) return in_use == IO_DIRECT ? PROVEN_DIRECT : PROVEN_BUFFERED_COLD;
  return storage_bytes > 0 ? PROVEN_MIXED : PROVEN_CACHED;
}

ProvenMode proven_of_all(const Sample *samples, int count) {
  for (int i = 1; i < count; i++)
    if (samples[i].mode_proven != samples[0].mode_proven) return PROVEN_MIXED;
  return samples[0].mode_proven;
}

/* ------------------------------------------------------------------ JSON */

static void write_trace(Text *out, const LayerTrace *trace) {
  json_open(out, '{');
  json_int_field(out, "bytes", trace->bytes);
  json_int_field(out, "compute_end_ns", trace->compute_end_ns);
  json_int_field(out, "compute_start_ns", trace->compute_start_ns);
  json_int_field(out, "decompress_ns", trace->decompress_ns);
  json_int_field(out, "io_end_ns", trace->io_end_ns);
  json_int_field(out, "io_start_ns", trace->io_start_ns);
  json_int_field(out, "stall_ns", trace->stall_ns);
  json_close(out, '}');
}

static void write_verdict(Text *out, const Sample *sample) {
  bool valid = !sample->io_not_accounted && !sample->not_cached && !sample->not_from_storage && !sample->throttled;
  json_open(out, '{');
  json_key(out, "reasons"), json_open(out, '[');
  if (sample->io_not_accounted) json_text(out, "io-not-accounted");
  if (sample->not_cached) json_text(out, "not-cached");
  if (sample->not_from_storage) json_text(out, "not-from-storage");
  if (sample->throttled) json_text(out, "throttled");
  json_close(out, ']');
  json_bool_field(out, "valid", valid);
  json_close(out, '}');
}

void write_sample(Text *out, const Sample *sample) {
  json_open(out, '{');
  json_int_field(out, "latency_ns", sample->latency_ns);
  json_key(out, "logits"), json_open(out, '[');
  for (int i = 0; i < sample->logit_count; i++) json_number(out, (double)sample->logits[i]);
  json_close(out, ']');
  json_text_field(out, "mode_asked", io_mode_name(sample->mode_asked));
  json_text_field(out, "mode_proven", proven_mode_names[sample->mode_proven]);
  json_int_field(out, "planned_bytes", sample->planned_bytes);
  json_int_field(out, "row", sample->row);
  json_int_field(out, "stall_ns", sample->stall_ns);
  json_int_field(out, "storage_bytes", sample->storage_bytes);
  json_key(out, "trace"), json_open(out, '[');
  for (int i = 0; i < sample->layer_count; i++) write_trace(out, &sample->trace[i]);
  json_close(out, ']');
  json_key(out, "verdict"), write_verdict(out, sample);
  json_bool_field(out, "warmup", sample->warmup);
  json_close(out, '}');
}

void write_memory(Text *out, const Memory *memory) {
  json_open(out, '{');
  json_int_field(out, "activations", memory->parts.activations);
  json_int_field(out, "preload", memory->parts.preload);
  write_maybe(out, "process_peak_bytes", memory->process_peak_bytes > 0, memory->process_peak_bytes);
  json_int_field(out, "resident", memory->parts.resident);
  json_int_field(out, "working", memory->parts.working);
  json_close(out, '}');
}

static void write_executed(Text *out, const Unit *unit, const GateVerdict *gates, int gate_count,
                           const Executed *executed) {
  char digest[65];
  plan_digest(&unit->plan, digest);
  json_open(out, '{');
  json_key(out, "after"), sensors_write(out, &executed->after);
  json_key(out, "before"), sensors_write(out, &executed->before);
  json_key(out, "gates"), gates_write(out, gates, gate_count);
  json_text_field(out, "io_mode", io_mode_name(executed->io_mode));
  json_text_field(out, "io_mode_proven", proven_mode_names[proven_of_all(executed->samples, unit->row_count)]);
  json_text_field(out, "kind", "execute");
  json_key(out, "memory"), write_memory(out, &executed->memory);
  json_text_field(out, "plan_digest", digest);
  json_key(out, "readings"), watch_write(out, &executed->watch);
  json_text_field(out, "request_kind", request_kind_names[unit->request_kind]);
  json_key(out, "requests"), json_open(out, '[');
  for (int i = 0; i < unit->row_count; i++) write_sample(out, &executed->samples[i]);
  json_close(out, ']');
  json_close(out, '}');
}

static StiCode execute_into(Context *context, const Unit *unit, const GateVerdict *gates, int gate_count, Arena *arena,
                            Text *result, StiError *error) {
  const Job *job = context->job;
  Executed *executed = arena_alloc(arena, sizeof *executed);
  if (executed == NULL) return sti_out_of_memory(error);
  executed->samples = arena_alloc(arena, (size_t)unit->row_count * sizeof *executed->samples);
  if (executed->samples == NULL) return sti_out_of_memory(error);
  bool spawn = unit->request_kind == REQUEST_SPAWN_COLD;
  sensors_read(context->spool, &executed->before);
  STI_TRY(watch_begin(&executed->watch, job->cpus, job->cpu_count, &job->gates, arena, error));
  STI_TRY((spawn ? spawned : in_process)(context, unit, arena, executed, error));
  sensors_read(context->spool, &executed->after);
  write_executed(result, unit, gates, gate_count, executed);
  return STI_OK;
}

StiCode run_execute(Context *context, const Unit *unit, const GateVerdict *gates, int gate_count, Text *result,
                    StiError *error) {
  Arena arena = {0};
  StiCode code = execute_into(context, unit, gates, gate_count, &arena, result, error);
  arena_free(&arena);
  return code;
}
