/* session.c: the verb `session`: requests as JSON lines on standard input, planned where T, |S| or W changed.
 *
 *   session --bundle FOLDER --profile FILE --task FILE [--importance FILE] [--policy sti] [--io-mode direct|buffered] …
 *
 * A line {"preload_bytes": 1000000, "row": 0, "target_ns": 150000000, "working_bytes": 4000000}, quantities also as texts
 * ("150ms", "1MB"), is answered by one line as soon as the request is done, a failed one by {"error": …}. The preload
 * buffer stays filled from one request to the next. Engine, threads and queue depth are the profile's unless given.
 */
#include <string.h>

#include "../../sti_runtime/native/quantity.h"
#include "answers.h"
#include "standalone.h"
#include "unit_kinds.h"
#include "verbs.h"

enum { PROFILE_CAP_BYTES = 16 << 20 };
static const char source[] = "standard input";

typedef struct { int64_t row, target_ns, preload_bytes, working_bytes; } Question;

typedef struct {
  const Options *options;
  Context *context;
  const Manifest *manifest;
  DeviceProfile profile;
  char profile_digest[65];
  bool has_importance, has_plan;
  ImportanceProfile importance;
  Question planned; /* what the plan was made for */
  Unit unit;        /* its plan, which lives in plan_arena */
  Arena plan_arena;
  int64_t plan_ns;  /* time the last planning took */
  int64_t requests, failed, replans;
} Session;

/* ------------------------------------------------------------------ questions */

static int64_t read_quantity(Fields *fields, const char *name, bool duration) {
  const JsonValue *value = field_value(fields, name);
  int64_t quantity = 0;
  if (value == NULL) return 0;
  if (value->kind != JSON_STRING) return field_int(fields, name, 0, INT64_MAX);
  StiCode code = duration ? parse_duration_ns(value->text.data, name, &quantity, fields->error)
                          : parse_bytes(value->text.data, name, &quantity, fields->error);
  if (code != STI_OK) fields->code = code;
  return quantity;
}

static StiCode read_question(Arena *arena, const char *line, size_t length, Question *question, StiError *error) {
  JsonValue *value;
  Fields fields;
  STI_TRY(json_parse(arena, line, length, source, &value, error));
  fields_begin(&fields, value, source, "Question", "", error);
  question->preload_bytes = read_quantity(&fields, "preload_bytes", false);
  question->row = field_int(&fields, "row", 0, INT64_MAX);
  question->target_ns = read_quantity(&fields, "target_ns", true);
  question->working_bytes = read_quantity(&fields, "working_bytes", false);
  return fields_end(&fields);
}

/* ------------------------------------------------------------------ planning */

/* Plan anew where the question differs in T, |S| or W from the one before. */
static StiCode plan_for(Session *session, const Question *question, bool *replanned, StiError *error) {
  const Question *old = &session->planned;
  *replanned = !session->has_plan || question->target_ns != old->target_ns ||
               question->preload_bytes != old->preload_bytes || question->working_bytes != old->working_bytes;
  if (!*replanned) return STI_OK;
  PlanRequest request = {.manifest = session->manifest,
                         .importance = session->has_importance ? &session->importance : NULL,
                         .profile = &session->profile,
                         .profile_digest = session->profile_digest,
                         .target_ns = question->target_ns,
                         .preload_bytes = question->preload_bytes,
                         .working_bytes = question->working_bytes,
                         .policy = session->options->policy,
                         .slack = true};
  Arena arena = {0};
  Plan plan;
  int64_t start_ns = monotonic_ns();
  StiCode code = make_plan(&arena, &request, &plan, error);
  if (code != STI_OK) {
    arena_free(&arena);
    return code;
  }
  session->plan_ns = monotonic_ns() - start_ns;
  arena_free(&session->plan_arena);
  session->plan_arena = arena;
  session->unit.plan = plan;
  session->planned = *question;
  session->has_plan = true;
  session->replans++;
  return STI_OK;
}

/* ------------------------------------------------------------------ answers */

static void write_answer(Text *out, const Session *session, const Question *question, bool replanned,
                         const Sample *sample) {
  const Plan *plan = &session->unit.plan;
  char digest[65];
  plan_digest(plan, digest);
  json_open(out, '{');
  json_text_field(out, "plan_digest", digest);
  json_int_field(out, "plan_ns", replanned ? session->plan_ns : 0);
  json_int_field(out, "predicted_median_ns", plan->predicted.median_latency_ns);
  json_int_field(out, "predicted_ns", plan->predicted.latency_ns);
  json_int_field(out, "preload_bytes", question->preload_bytes);
  json_bool_field(out, "replanned", replanned);
  json_key(out, "sample"), write_sample(out, sample);
  json_int_field(out, "target_ns", question->target_ns);
  json_bool_field(out, "within_target", sample->latency_ns <= question->target_ns);
  json_int_field(out, "working_bytes", question->working_bytes);
  json_close(out, '}');
}

static StiCode answer_question(Session *session, Arena *arena, const char *line, size_t length, Text *out,
                               StiError *error) {
  Question question;
  Sample sample;
  Outcome outcome;
  bool replanned;
  STI_TRY(read_question(arena, line, length, &question, error));
  STI_TRY(plan_for(session, &question, &replanned, error));
  session->unit.rows = &question.row;
  STI_TRY(execute_request(session->context, &session->unit, 0, arena, &sample, &outcome, error));
  write_answer(out, session, &question, replanned, &sample);
  return STI_OK;
}

static StiCode answer_line(void *context, Arena *arena, const char *line, size_t length, Text *out, StiError *error) {
  Session *session = context;
  StiCode code = answer_question(session, arena, line, length, out, error);
  session->requests++;
  session->failed += code != STI_OK;
  return code;
}

/* ------------------------------------------------------------------ the verb */

static StiCode read_profiles(Session *session, Arena *arena, StiError *error) {
  const Options *options = session->options;
  const char *data;
  size_t length;
  STI_TRY(read_file(arena, options->profile, PROFILE_CAP_BYTES, &data, &length, error));
  STI_TRY(profile_parse(arena, data, length, options->profile, &session->profile, error));
  profile_digest(&session->profile, session->profile_digest);
  session->has_importance = options->importance != NULL;
  if (!session->has_importance) return STI_OK;
  STI_TRY(read_file(arena, options->importance, PROFILE_CAP_BYTES, &data, &length, error));
  return importance_parse(arena, data, length, options->importance, &session->importance, error);
}

/* What the options leave open is as it was profiled. */
static void take_from_profile(Options *options, const DeviceProfile *profile) {
  if (options->threads == 0) options->threads = profile->threads;
  if (options->queue_depth == 0) options->queue_depth = profile->queue_depth;
  if (options->engine == ENGINE_TORCH)
    options->engine = strcmp(profile->engine, engine_names[ENGINE_NATIVE_INT8]) == 0 ? ENGINE_NATIVE_INT8 : ENGINE_NATIVE;
}

static StiCode serve(Session *session, Standalone *standalone, Text *out, StiError *error) {
  session->context = standalone->context;
  session->unit = (Unit){.kind = UNIT_EXECUTE,
                         .row_count = 1,
                         .request_kind = REQUEST_WARM,
                         .io_mode = session->options->io_mode};
  STI_TRY(context_manifest(standalone->context, &session->manifest, error));
  STI_TRY(answer_lines(answer_line, session, error));
  json_open(out, '{');
  json_int_field(out, "failed", session->failed);
  json_int_field(out, "replans", session->replans);
  json_int_field(out, "requests", session->requests);
  json_close(out, '}');
  return STI_OK;
}

static StiCode run_session(Options *options, Session *session, Arena *arena, Text *out, StiError *error) {
  Standalone standalone;
  session->options = options;
  STI_TRY(read_profiles(session, arena, error));
  take_from_profile(options, &session->profile);
  STI_TRY(standalone_open(options, &standalone, error));
  StiCode code = serve(session, &standalone, out, error);
  standalone_close(&standalone);
  arena_free(&session->plan_arena);
  return code;
}

StiCode verb_session(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  Options options;
  Session session = {0};
  Arena arena = {0};
  (void)exit_code;
  STI_TRY(options_parse(argc, argv, TAKES_PROFILES, &options, error));
  StiCode code = run_session(&options, &session, &arena, out, error);
  arena_free(&arena);
  return code;
}
