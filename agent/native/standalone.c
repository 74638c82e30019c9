/* standalone.c: options and set-up of the verbs without a host, and the verbs `infer` and `score`.
 *
 *   infer --bundle FOLDER --plan FILE --task FILE [--row N] [--kind cold|warm|cached] [--repeat N]
 *         [--io-mode direct|buffered] [--threads N] [--queue-depth N] [--engine native|native-int8] [--isa NAME] [--cpus 0,1]
 *   score --bundle FOLDER --plan FILE --task FILE [--batch N] [--threads N] …
 */
#include "standalone.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../sti_runtime/native/threads.h"
#include "sensors.h"
#include "unit_kinds.h"
#include "verbs.h"

enum { PLAN_CAP_BYTES = 4 << 20, MOST_REPEATS = 100000, DEFAULT_QUEUE_DEPTH = 8 };
static const char *const see = "See docs/engine.md.";

static int64_t loaded_ns; /* before main: as close to the process's start as the process itself can look */
__attribute__((constructor)) static void note_start(void) { loaded_ns = monotonic_ns(); }

/* ------------------------------------------------------------------ options */

static StiCode parse_count(const char *text, const char *option, int64_t least, int64_t most, int64_t *value,
                           StiError *error) {
  char *end;
  long long parsed = strtoll(text, &end, 10);
  if (end == text || *end != '\0' || parsed < least || parsed > most)
    return sti_fail(error, STI_INPUT, see, "%s: '%.40s' is no number from %" PRId64 " to %" PRId64 ".", option, text, least,
                    most);
  *value = parsed;
  return STI_OK;
}

static StiCode parse_choice(const char *text, const char *option, const char *const *names, int first, int *value,
                            StiError *error) {
  Text known = {0};
  for (int i = first; names[i] != NULL; i++) {
    if (strcmp(names[i], text) == 0) {
      *value = i;
      text_free(&known);
      return STI_OK;
    }
    text_printf(&known, "%s%s", i == first ? "There is: " : ", ", names[i]);
  }
  StiCode code = sti_fail(error, STI_INPUT, known.failed ? see : known.data, "%s: '%.40s' is not known.", option, text);
  text_free(&known);
  return code;
}

static StiCode parse_cpus(const char *text, Options *options, StiError *error) {
  int64_t cpus[STANDALONE_CPUS];
  options->cpu_count = parse_cpu_list(text, cpus, STANDALONE_CPUS);
  for (int i = 0; i < options->cpu_count; i++) options->cpus[i] = (int32_t)cpus[i];
  if (options->cpu_count > 0) return STI_OK;
  return sti_fail(error, STI_INPUT, "Write it like 0,1 or 4-7.",
                  "--cpus: '%.40s' is no list of CPUs; their numbers are below %d.", text, CPU_NUMBERS);
}

/* Options of every verb; *known: whether it was one. */
static StiCode parse_common(const char *name, const char *value, Options *options, bool *known, StiError *error) {
  static const char *const isas[] = {"auto", "portable", "avx2", "avx512", "neon", "neon-dotprod", NULL};
  int chosen;
  *known = true;
  if (strcmp(name, "--bundle") == 0) options->bundle = value;
  else if (strcmp(name, "--task") == 0) options->task = value;
  else if (strcmp(name, "--threads") == 0) return parse_count(value, name, 1, 1024, &options->threads, error);
  else if (strcmp(name, "--queue-depth") == 0) return parse_count(value, name, 1, 1024, &options->queue_depth, error);
  else if (strcmp(name, "--cpus") == 0) return parse_cpus(value, options, error);
  else if (strcmp(name, "--engine") == 0) {
    STI_TRY(parse_choice(value, name, engine_names, ENGINE_NATIVE, &chosen, error));
    options->engine = (EngineName)chosen;
  } else if (strcmp(name, "--isa") == 0) {
    STI_TRY(parse_choice(value, name, isas, ISA_AUTO, &chosen, error));
    options->isa = (Isa)chosen;
  } else
    *known = false;
  return STI_OK;
}

static StiCode parse_own(const char *verb, const char *name, const char *value, unsigned takes, Options *options,
                         StiError *error) {
  int chosen;
  if ((takes & TAKES_PLAN) && strcmp(name, "--plan") == 0) options->plan = value;
  else if ((takes & TAKES_PROFILES) && strcmp(name, "--profile") == 0) options->profile = value;
  else if ((takes & TAKES_PROFILES) && strcmp(name, "--importance") == 0) options->importance = value;
  else if ((takes & TAKES_OUT) && strcmp(name, "--out") == 0) options->out = value;
  else if ((takes & TAKES_BATCH) && strcmp(name, "--batch") == 0)
    return parse_count(value, name, 1, INT32_MAX, &options->batch, error);
  else if ((takes & TAKES_REQUEST) && strcmp(name, "--row") == 0)
    return parse_count(value, name, 0, INT64_MAX, &options->row, error);
  else if ((takes & TAKES_REQUEST) && strcmp(name, "--repeat") == 0)
    return parse_count(value, name, 1, MOST_REPEATS, &options->repeat, error);
  else if ((takes & TAKES_REQUEST) && strcmp(name, "--kind") == 0) {
    STI_TRY(parse_choice(value, name, request_kind_names, REQUEST_COLD, &chosen, error));
    options->kind = (RequestKind)chosen;
  } else if ((takes & (TAKES_REQUEST | TAKES_PROFILES)) && strcmp(name, "--io-mode") == 0) {
    STI_TRY(parse_choice(value, name, io_mode_names, 0, &chosen, error));
    options->io_mode = (IoMode)chosen;
  } else if ((takes & TAKES_PROFILES) && strcmp(name, "--policy") == 0) {
    STI_TRY(parse_choice(value, name, policy_names, 0, &chosen, error));
    options->policy = (Policy)chosen;
  } else
    return sti_fail(error, STI_INPUT, see, "%s has no option %.40s.", verb, name);
  return STI_OK;
}

StiCode options_parse(int argc, char **argv, unsigned takes, Options *options, StiError *error) {
  *options = (Options){.repeat = 1, .batch = 32, .kind = REQUEST_COLD};
  for (int i = 1; i < argc; i += 2) {
    bool known;
    if (i + 1 == argc) return sti_fail(error, STI_INPUT, see, "%s: %.40s needs a value.", argv[0], argv[i]);
    STI_TRY(parse_common(argv[i], argv[i + 1], options, &known, error));
    if (!known) STI_TRY(parse_own(argv[0], argv[i], argv[i + 1], takes, options, error));
  }
  const struct { const char *option, *value; bool needed; } wanted[] = {
      {"--bundle", options->bundle, true},
      {"--task", options->task, true},
      {"--plan", options->plan, takes & TAKES_PLAN},
      {"--profile", options->profile, takes & TAKES_PROFILES},
  };
  for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
    if (wanted[i].needed && wanted[i].value == NULL)
      return sti_fail(error, STI_INPUT, see, "%s needs %s.", argv[0], wanted[i].option);
  return STI_OK;
}

/* ------------------------------------------------------------------ set-up */

/* As many threads as the process may use CPUs. */
static int64_t usable_cpus(const Options *options) {
  int allowed = options->cpu_count > 0 ? options->cpu_count : cpus_allowed(NULL, 0);
  return allowed > 0 ? allowed : 1;
}

static StiCode pin(const Options *options, StiError *error) {
  if (options->cpu_count == 0 || cpus_pin(options->cpus, options->cpu_count) == 0) return STI_OK;
  return sti_fail(error, STI_INPUT, "Name CPUs that are online.", "--cpus: this process cannot be pinned to them.");
}

StiCode standalone_open(const Options *options, Standalone *standalone, StiError *error) {
  static const char *const nobody = "standalone";
  standalone->job = (Job){.id = nobody,
                          .attempt = 1,
                          .device = nobody,
                          .engine = options->engine == ENGINE_TORCH ? ENGINE_NATIVE : options->engine,
                          .threads = options->threads > 0 ? options->threads : usable_cpus(options),
                          .queue_depth = options->queue_depth > 0 ? options->queue_depth : DEFAULT_QUEUE_DEPTH,
                          .cpus = (int32_t *)(uintptr_t)options->cpus,
                          .cpu_count = options->cpu_count};
  STI_TRY(pin(options, error));
  STI_TRY(context_open_at(&standalone->job, options->bundle, options->bundle, options->task, &standalone->context, error));
  if (options->isa != ISA_AUTO) standalone->context->isa = options->isa;
  return STI_OK;
}

void standalone_close(Standalone *standalone) { context_close(standalone->context); }

StiCode read_plan(Arena *arena, const char *path, Plan *plan, StiError *error) {
  const char *data;
  size_t length;
  JsonValue *value;
  STI_TRY(read_file(arena, path, PLAN_CAP_BYTES, &data, &length, error));
  STI_TRY(json_parse(arena, data, length, path, &value, error));
  return plan_parse(arena, value, path, "", plan, error);
}

StiCode standalone_act(Action *action, const Options *options, Text *out, StiError *error) {
  Standalone standalone;
  Arena arena = {0};
  STI_TRY(standalone_open(options, &standalone, error));
  StiCode code = action(options, &standalone, &arena, out, error);
  standalone_close(&standalone);
  arena_free(&arena);
  return code;
}

/* ------------------------------------------------------------------ infer */

typedef struct { int64_t embed_io_ns, embed_compute_ns, head_ns; } FixedParts;

typedef struct {
  int64_t opened_ns; /* bundle, task row and engine are there */
  IoMode io_mode;
  Memory memory;
  Sample *samples;   /* [repeat] */
  FixedParts *parts; /* [repeat] */
} Inference;

static void write_request(Text *out, const Sample *sample, const FixedParts *parts) {
  int64_t decompress_ns = 0, layers_ns = 0;
  for (int i = 0; i < sample->layer_count; i++) {
    decompress_ns += sample->trace[i].decompress_ns;
    layers_ns += sample->trace[i].compute_end_ns - sample->trace[i].compute_start_ns;
  }
  json_open(out, '{');
  json_int_field(out, "decompress_ns", decompress_ns);
  json_int_field(out, "embed_compute_ns", parts->embed_compute_ns);
  json_int_field(out, "embed_io_ns", parts->embed_io_ns);
  json_int_field(out, "head_ns", parts->head_ns);
  json_int_field(out, "layers_ns", layers_ns);
  json_key(out, "sample"), write_sample(out, sample);
  json_int_field(out, "started_ns", sample->started_ns);
  json_close(out, '}');
}

static void write_inference(Text *out, const Options *options, const Standalone *standalone, const Plan *plan,
                            const Inference *inference) {
  char digest[65], content[65];
  plan_digest(plan, digest);
  plan_content_digest(plan, content);
  json_open(out, '{');
  json_text_field(out, "content_digest", content);
  json_text_field(out, "engine", engine_names[standalone->job.engine]);
  json_text_field(out, "io_mode", io_mode_name(inference->io_mode));
  json_text_field(out, "io_mode_proven", proven_mode_names[proven_of_all(inference->samples, (int)options->repeat)]);
  json_text_field(out, "isa", isa_name(engine_isa(standalone->context->engine)));
  json_int_field(out, "loaded_ns", loaded_ns);
  json_key(out, "memory"), write_memory(out, &inference->memory);
  json_int_field(out, "opened_ns", inference->opened_ns);
  json_text_field(out, "plan_digest", digest);
  json_key(out, "predicted"), json_open(out, '{');
  json_int_field(out, "latency_ns", plan->predicted.latency_ns);
  json_int_field(out, "median_latency_ns", plan->predicted.median_latency_ns);
  json_int_field(out, "stall_ns", plan->predicted.stall_ns);
  json_close(out, '}');
  json_int_field(out, "queue_depth", standalone->job.queue_depth);
  json_text_field(out, "request_kind", request_kind_names[options->kind]);
  json_key(out, "requests"), json_open(out, '[');
  for (int64_t i = 0; i < options->repeat; i++) write_request(out, &inference->samples[i], &inference->parts[i]);
  json_close(out, ']');
  json_int_field(out, "target_ns", plan->target_ns);
  json_int_field(out, "threads", standalone->job.threads);
  json_close(out, '}');
}

static StiCode infer(const Options *options, Standalone *standalone, Arena *arena, Text *out, StiError *error) {
  Plan plan;
  Inference inference = {.samples = arena_alloc(arena, (size_t)options->repeat * sizeof *inference.samples),
                         .parts = arena_alloc(arena, (size_t)options->repeat * sizeof *inference.parts)};
  Executor *executor;
  Request request;
  int64_t row = options->row;
  Unit unit = {.kind = UNIT_EXECUTE, .rows = &row, .row_count = 1, .request_kind = options->kind, .io_mode = options->io_mode};
  if (inference.samples == NULL || inference.parts == NULL) return sti_out_of_memory(error);
  STI_TRY(read_plan(arena, options->plan, &plan, error));
  STI_TRY(context_executor(standalone->context, &executor, error));
  STI_TRY(context_request(standalone->context, row, &request, error));
  inference.opened_ns = monotonic_ns();
  unit.plan = plan;
  for (int64_t i = 0; i < options->repeat; i++) {
    Outcome outcome;
    STI_TRY(execute_request(standalone->context, &unit, 0, arena, &inference.samples[i], &outcome, error));
    inference.parts[i] = (FixedParts){outcome.embed_io_ns, outcome.embed_compute_ns, outcome.head_ns};
    inference.io_mode = outcome.io_mode;
  }
  inference.memory = memory_now(executor);
  write_inference(out, options, standalone, &plan, &inference);
  return out->failed ? sti_out_of_memory(error) : STI_OK;
}

StiCode verb_infer(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  Options options;
  (void)exit_code;
  STI_TRY(options_parse(argc, argv, TAKES_PLAN | TAKES_REQUEST, &options, error));
  return standalone_act(infer, &options, out, error);
}

/* ------------------------------------------------------------------ score */

static StiCode score(const Options *options, Standalone *standalone, Arena *arena, Text *out, StiError *error) {
  Unit unit = {.kind = UNIT_EVALUATE, .batch = options->batch};
  STI_TRY(read_plan(arena, options->plan, &unit.plan, error));
  return run_unit(standalone->context, &unit, NULL, 0, out, error);
}

StiCode verb_score(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  Options options;
  (void)exit_code;
  STI_TRY(options_parse(argc, argv, TAKES_PLAN | TAKES_BATCH, &options, error));
  return standalone_act(score, &options, out, error);
}
