/* spawning.c: requests in processes of their own: spawn-cold, from the start of the process to the logits.
 *
 * The parent notes the time and starts this executable as `spawned SPOOL`; the child gets a job of one request on its
 * standard input and answers with one record on its standard output. CLOCK_MONOTONIC is the same in both, so the
 * child's times are the parent's.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "kernel_files.h"
#include "signals.h"
#include "unit_kinds.h"

enum { LIMIT_S = 600, WORDS_SHOWN_BYTES = 500 };
static const char reply_source[] = "the answer of a request's process";

typedef struct { Sample sample; Memory memory; IoMode io_mode; } Reply;

/* ------------------------------------------------------------------ child */

static void write_reply(Text *out, const Reply *reply) {
  json_open(out, '{');
  json_text_field(out, "io_mode", io_mode_name(reply->io_mode));
  json_key(out, "memory"), write_memory(out, &reply->memory);
  json_key(out, "sample"), write_sample(out, &reply->sample);
  json_int_field(out, "started_ns", reply->sample.started_ns);
  json_close(out, '}');
}

static StiCode one_request(Context *context, const Unit *unit, Arena *arena, Text *out, StiError *error) {
  Reply reply;
  Outcome outcome;
  Executor *executor;
  if (unit->kind != UNIT_EXECUTE)
    return sti_fail(error, STI_FORMAT, "Spawn execute units only.", "A %s unit is not a request.",
                    unit_kind_names[unit->kind]);
  STI_TRY(execute_request(context, unit, 0, arena, &reply.sample, &outcome, error));
  reply.io_mode = outcome.io_mode;
  STI_TRY(context_executor(context, &executor, error));
  reply.memory = memory_now(executor);
  write_reply(out, &reply);
  return out->failed ? sti_out_of_memory(error) : STI_OK;
}

static StiCode read_job(Arena *arena, Job *job, StiError *error) {
  Text text = {0};
  char block[16384];
  size_t got;
  while (text.length <= JOB_CAP_BYTES && (got = fread(block, 1, sizeof block, stdin)) > 0) text_append(&text, block, got);
  StiCode code = text.failed ? sti_out_of_memory(error)
                             : job_parse(arena, text.data, text.length, "standard input", job, error);
  text_free(&text);
  return code;
}

static StiCode answer(const char *spool, Arena *arena, Text *out, StiError *error) {
  Job *job = arena_alloc(arena, sizeof *job);
  Context *context;
  if (job == NULL) return sti_out_of_memory(error);
  STI_TRY(read_job(arena, job, error));
  STI_TRY(context_open(job, spool, &context, error));
  StiCode code = one_request(context, &job->units[0], arena, out, error);
  context_close(context);
  return code;
}

int spawned_main(const char *spool) {
  Arena arena = {0};
  Text out = {0};
  StiError error = {0};
  StiCode code = answer(spool, &arena, &out, &error);
  if (code != STI_OK) {
    text_clear(&out);
    json_open(&out, '{');
    json_text_field(&out, "remedy", error.remedy);
    json_text_field(&out, "what", error.what);
    json_close(&out, '}');
  }
  bool written = !out.failed && fwrite(out.data, 1, out.length, stdout) == out.length && fflush(stdout) == 0;
  text_free(&out);
  arena_free(&arena);
  return code == STI_OK && written ? 0 : 1;
}

/* ------------------------------------------------------------------ parent: the answer */

static StiCode read_trace(const JsonValue *list, Sample *sample, StiError *error) {
  for (size_t i = 0; i < list->array.count; i++) {
    Fields fields;
    LayerTrace *trace = &sample->trace[i];
    fields_begin(&fields, &list->array.items[i], reply_source, "LayerTrace", "sample.trace", error);
    trace->bytes = field_int(&fields, "bytes", 0, INT64_MAX);
    trace->compute_end_ns = field_int(&fields, "compute_end_ns", 0, INT64_MAX / 2);
    trace->compute_start_ns = field_int(&fields, "compute_start_ns", 0, INT64_MAX / 2);
    trace->decompress_ns = field_int(&fields, "decompress_ns", 0, INT64_MAX);
    trace->io_end_ns = field_int(&fields, "io_end_ns", 0, INT64_MAX / 2);
    trace->io_start_ns = field_int(&fields, "io_start_ns", 0, INT64_MAX / 2);
    trace->stall_ns = field_int(&fields, "stall_ns", 0, INT64_MAX);
    STI_TRY(fields_end(&fields));
  }
  return STI_OK;
}

static StiCode read_verdict(const JsonValue *value, Sample *sample, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, reply_source, "Verdict", "sample.verdict", error);
  const JsonValue *reasons = field_array(&fields, "reasons", 0, 8);
  field_bool(&fields, "valid");
  STI_TRY(fields_end(&fields));
  for (size_t i = 0; i < reasons->array.count; i++) {
    const JsonValue *reason = &reasons->array.items[i];
    const char *text = reason->kind == JSON_STRING ? reason->text.data : "";
    sample->io_not_accounted |= strcmp(text, "io-not-accounted") == 0;
    sample->not_cached |= strcmp(text, "not-cached") == 0;
    sample->not_from_storage |= strcmp(text, "not-from-storage") == 0;
  }
  return STI_OK;
}

static StiCode read_sample(Arena *arena, const JsonValue *value, Sample *sample, StiError *error) {
  Fields fields;
  *sample = (Sample){0};
  fields_begin(&fields, value, reply_source, "RequestSample", "sample", error);
  sample->latency_ns = field_int(&fields, "latency_ns", 0, INT64_MAX / 2);
  const JsonValue *logits = field_array(&fields, "logits", 0, INT_MAX);
  sample->mode_asked = (IoMode)field_choice(&fields, "mode_asked", io_mode_names);
  sample->mode_proven = (ProvenMode)field_choice(&fields, "mode_proven", proven_mode_names);
  sample->planned_bytes = field_int(&fields, "planned_bytes", 0, INT64_MAX);
  sample->row = field_int(&fields, "row", 0, INT64_MAX);
  sample->stall_ns = field_int(&fields, "stall_ns", 0, INT64_MAX);
  sample->storage_bytes = field_int(&fields, "storage_bytes", 0, INT64_MAX);
  const JsonValue *trace = field_array(&fields, "trace", 0, INT_MAX);
  const JsonValue *verdict = field_object(&fields, "verdict");
  sample->warmup = field_bool(&fields, "warmup");
  STI_TRY(fields_end(&fields));
  sample->logit_count = (int)logits->array.count;
  sample->layer_count = (int)trace->array.count;
  sample->logits = arena_alloc(arena, logits->array.count * sizeof *sample->logits + 1);
  sample->trace = arena_alloc(arena, trace->array.count * sizeof *sample->trace + 1);
  if (sample->logits == NULL || sample->trace == NULL) return sti_out_of_memory(error);
  for (int i = 0; i < sample->logit_count; i++) {
    const JsonValue *logit = &logits->array.items[i];
    sample->logits[i] = logit->kind == JSON_INT ? (float)logit->integer : logit->kind == JSON_DOUBLE ? (float)logit->number : 0;
  }
  STI_TRY(read_trace(trace, sample, error));
  return read_verdict(verdict, sample, error);
}

static StiCode read_memory(const JsonValue *value, Memory *memory, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, reply_source, "MemoryParts", "memory", error);
  memory->parts.activations = field_int(&fields, "activations", 0, INT64_MAX);
  memory->parts.preload = field_int(&fields, "preload", 0, INT64_MAX);
  memory->process_peak_bytes =
      field_is_null(&fields, "process_peak_bytes") ? 0 : field_int(&fields, "process_peak_bytes", 0, INT64_MAX);
  memory->parts.resident = field_int(&fields, "resident", 0, INT64_MAX);
  memory->parts.working = field_int(&fields, "working", 0, INT64_MAX);
  return fields_end(&fields);
}

static StiCode read_reply(Arena *arena, const Text *text, Reply *reply, StiError *error) {
  JsonValue *value;
  Fields fields;
  STI_TRY(json_parse(arena, text->data, text->length, reply_source, &value, error));
  fields_begin(&fields, value, reply_source, "SpawnReply", "", error);
  reply->io_mode = (IoMode)field_choice(&fields, "io_mode", io_mode_names);
  const JsonValue *memory = field_object(&fields, "memory"), *sample = field_object(&fields, "sample");
  int64_t started_ns = field_int(&fields, "started_ns", 0, INT64_MAX / 2);
  STI_TRY(fields_end(&fields));
  STI_TRY(read_memory(memory, &reply->memory, error));
  STI_TRY(read_sample(arena, sample, &reply->sample, error));
  reply->sample.started_ns = started_ns;
  return STI_OK;
}

/* The child's own words, where it had any: a record on standard output, else what it left on standard error. */
static StiCode spawn_failure(Arena *arena, const Said *said, StiError *error) {
  const Text *out = &said->out, *words = &said->words;
  StiError ignored = {0};
  JsonValue *value;
  Fields fields;
  if (out->length > 0 && json_parse(arena, out->data, out->length, reply_source, &value, &ignored) == STI_OK) {
    fields_begin(&fields, value, reply_source, "SpawnFailure", "", &ignored);
    const char *remedy = field_text(&fields, "remedy", 0, SIZE_MAX), *what = field_text(&fields, "what", 0, SIZE_MAX);
    if (fields_end(&fields) == STI_OK) return sti_fail(error, STI_SPAWNED, remedy, "%s", what);
  }
  size_t skip = words->length > WORDS_SHOWN_BYTES ? words->length - WORDS_SHOWN_BYTES : 0;
  char tail[WORDS_SHOWN_BYTES + 1];
  snprintf(tail, sizeof tail, "%s", words->length > 0 ? words->data + skip : "");
  make_utf8(tail);
  if (WIFSIGNALED(said->status))
    return sti_fail(error, STI_SPAWNED, "See agent.log; signal 9 without a reason is the kernel short of memory.",
                    "A request's process was ended by signal %d: %s", WTERMSIG(said->status), tail);
  return sti_fail(error, STI_SPAWNED, "See agent.log.", "A request's process ended with code %d: %s",
                  WEXITSTATUS(said->status), tail);
}

/* ------------------------------------------------------------------ parent: the process */

typedef struct { char self[PATH_MAX]; char *argv[5]; } SpawnedArguments;

/* What to execute: this very executable; under user-mode emulation by the emulator that STIFARM_EMULATOR names. */
static int make_command(const char *spool, SpawnedArguments *arguments, Command *command) {
  char *emulator = getenv("STIFARM_EMULATOR");
  bool emulated = emulator != NULL && *emulator;
  ssize_t length = readlink("/proc/self/exe", arguments->self, sizeof arguments->self - 1);
  if (length < 0) return errno;
  arguments->self[length] = '\0';
  int count = 0;
  if (emulated) arguments->argv[count++] = emulator;
  arguments->argv[count++] = arguments->self;
  arguments->argv[count++] = (char *)"spawned";
  arguments->argv[count++] = (char *)(uintptr_t)spool;
  arguments->argv[count] = NULL;
  command->program = emulated ? emulator : "/proc/self/exe"; /* which the link names also after it was replaced */
  command->argv = arguments->argv;
  return 0;
}

/* ------------------------------------------------------------------ parent: one request */

static void shift_trace(Sample *sample, int64_t by_ns) {
  for (int i = 0; i < sample->layer_count; i++) {
    LayerTrace *trace = &sample->trace[i];
    if (trace->bytes > 0) trace->io_start_ns += by_ns, trace->io_end_ns += by_ns;
    trace->compute_start_ns += by_ns;
    trace->compute_end_ns += by_ns;
  }
}

/* The job with this one request as its only unit. */
static void write_alone(Text *out, const Job *job, const Unit *unit, int index) {
  Unit alone = *unit;
  Job one = *job;
  alone.number = 0;
  alone.rows = &unit->rows[index];
  alone.row_count = 1;
  alone.warmups = 0;
  one.units = &alone;
  one.unit_count = 1;
  job_write(out, &one);
}

static StiCode run_once(Context *context, const Text *job, Arena *arena, Said *said, Reply *reply, StiError *error) {
  SpawnedArguments arguments;
  Command command;
  int problem = make_command(context->spool, &arguments, &command);
  if (problem != 0)
    return sti_fail_errno(error, STI_SPAWNED, problem, "Mount /proc.", "This executable cannot be found");
  STI_TRY(child_run(&command, job, LIMIT_S, unit_abandoned, said, error));
  if (said->status != 0) return spawn_failure(arena, said, error);
  return read_reply(arena, &said->out, reply, error);
}

StiCode run_spawned(Context *context, const Unit *unit, int index, Arena *arena, Sample *sample, Memory *memory,
                    IoMode *io_mode, StiError *error) {
  Text job = {0};
  Said said = {0};
  Reply reply = {0};
  write_alone(&job, context->job, unit, index);
  int64_t started_ns = monotonic_ns();
  StiCode code = job.failed ? sti_out_of_memory(error) : run_once(context, &job, arena, &said, &reply, error);
  text_free(&job);
  text_free(&said.out);
  text_free(&said.words);
  if (code != STI_OK) return code;
  int64_t ready_ns = reply.sample.started_ns - started_ns;
  *sample = reply.sample;
  *memory = reply.memory;
  *io_mode = reply.io_mode;
  sample->warmup = index < unit->warmups;
  sample->started_ns = started_ns;
  sample->latency_ns += ready_ns;
  shift_trace(sample, ready_ns);
  return STI_OK;
}
