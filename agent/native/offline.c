/* offline.c: what needs no device: the verbs `fit` (samples -> device profile) and `plan` (profiles + T + |S| + W ->
 * plan).
 *
 *   fit SAMPLES | --lines
 *   plan --bundle FOLDER --profile FILE --target 150ms [--importance FILE] [--preload 1MB] [--working 4MB]
 *        [--policy sti] [--no-slack] [--seed N]
 *   plan --bundle FOLDER [--importance FILE] --lines
 *
 * With --lines standard input holds one question per line, and each is answered by one line: the record, or
 * {"error": …} (answers.h). SAMPLES: see fit_document. A bundle's manifest.json will do for its folder.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "../../sti_runtime/native/planner.h"
#include "../../sti_runtime/native/quantity.h"
#include "answers.h"
#include "unit_kinds.h"
#include "verbs.h"

enum { FILE_CAP_BYTES = 16 << 20, PATH_CHARS = 4096 };

/* ------------------------------------------------------------------ fit */

/* Kinds of unit results; those from IGNORED on hold no samples. Lists of samples are of the same kinds, and the reads of
 * compute results are one more. */
enum { RESULT_IO, RESULT_COMPUTE, RESULT_FIXED, RESULT_IGNORED, LIST_BESIDE = RESULT_IGNORED, LISTS };
static const char *const result_kinds[] = {"profile-io", "profile-compute", "profile-fixed", "probe", "execute",
                                           "evaluate", NULL};

/* *reads: of compute results, those beside; else NULL. */
static StiCode read_result(const JsonValue *value, size_t number, const char *source, int *kind,
                           const JsonValue **samples, const JsonValue **reads, StiError *error) {
  Fields fields;
  char path[40];
  snprintf(path, sizeof path, "results.%zu", number);
  fields_begin(&fields, value, source, "UnitResult", path, error);
  *samples = *reads = NULL;
  *kind = field_choice(&fields, "kind", result_kinds);
  if (fields.code != STI_OK || *kind >= RESULT_IGNORED) return fields.code;
  if (*kind != RESULT_FIXED) field_choice(&fields, "io_mode", io_mode_names);
  if (*kind == RESULT_COMPUTE) *reads = field_array(&fields, "reads", 0, SIZE_MAX);
  field_array(&fields, "readings", 0, SIZE_MAX);
  *samples = field_array(&fields, "samples", 0, SIZE_MAX);
  return fields_end(&fields);
}

static void read_io_sample(Fields *fields, IoSample *sample) {
  sample->versions = field_int(fields, "versions", 1, INT64_MAX);
  sample->bytes = field_int(fields, "bytes", 1, INT64_MAX);
  sample->storage_bytes = field_int(fields, "storage_bytes", 0, INT64_MAX);
  sample->duration_ns = field_int(fields, "duration_ns", 0, INT64_MAX);
  sample->mode_asked = field_choice(fields, "mode_asked", io_mode_names);
  sample->mode_proven = field_choice(fields, "mode_proven", proven_mode_names);
  sample->throttled = field_bool(fields, "throttled");
  sample->valid = field_bool(fields, "valid");
}

static void read_compute_sample(Fields *fields, ComputeSample *sample) {
  sample->width = field_int(fields, "width", 1, INT64_MAX);
  sample->fidelity = field_int(fields, "fidelity", 1, INT64_MAX);
  sample->read_bytes = field_int(fields, "read_bytes", 0, INT64_MAX);
  sample->decompress_ns = field_int(fields, "decompress_ns", 0, INT64_MAX);
  sample->compute_ns = field_int(fields, "compute_ns", 0, INT64_MAX);
  sample->throttled = field_bool(fields, "throttled");
  sample->warmup = field_bool(fields, "warmup");
}

static void read_fixed_sample(Fields *fields, FixedSample *sample) {
  sample->embed_io_ns = field_int(fields, "embed_io_ns", 0, INT64_MAX);
  sample->embed_compute_ns = field_int(fields, "embed_compute_ns", 0, INT64_MAX);
  sample->head_ns = field_int(fields, "head_ns", 0, INT64_MAX);
  sample->bytes = field_int(fields, "bytes", 0, INT64_MAX);
  sample->storage_bytes = field_int(fields, "storage_bytes", 0, INT64_MAX);
  sample->mode_asked = field_choice(fields, "mode_asked", io_mode_names);
  sample->mode_proven = field_choice(fields, "mode_proven", proven_mode_names);
  sample->throttled = field_bool(fields, "throttled");
  sample->warmup = field_bool(fields, "warmup");
}

static StiCode read_samples(const JsonValue *list, size_t number, int kind, const char *source, ProfileSamples *samples,
                            StiError *error) {
  static const char *const names[LISTS] = {"IoSample", "ComputeSample", "FixedSample", "IoSample"};
  for (size_t i = 0; i < list->array.count; i++) {
    Fields fields;
    char path[80];
    snprintf(path, sizeof path, "results.%zu.%s.%zu", number, kind == LIST_BESIDE ? "reads" : "samples", i);
    fields_begin(&fields, &list->array.items[i], source, names[kind], path, error);
    if (kind == RESULT_IO) read_io_sample(&fields, &samples->io[samples->io_count++]);
    else if (kind == LIST_BESIDE) read_io_sample(&fields, &samples->beside[samples->beside_count++]);
    else if (kind == RESULT_COMPUTE) read_compute_sample(&fields, &samples->compute[samples->compute_count++]);
    else read_fixed_sample(&fields, &samples->fixed[samples->fixed_count++]);
    STI_TRY(fields_end(&fields));
  }
  return STI_OK;
}

static StiCode read_results(Arena *arena, const JsonValue *results, const char *source, ProfileSamples *samples,
                            StiError *error) {
  size_t counts[LISTS] = {0};
  const JsonValue *list, *reads;
  int kind;
  for (size_t i = 0; i < results->array.count; i++) {
    STI_TRY(read_result(&results->array.items[i], i, source, &kind, &list, &reads, error));
    if (list) counts[kind] += list->array.count;
    if (reads) counts[LIST_BESIDE] += reads->array.count;
  }
  samples->io = arena_alloc(arena, (counts[RESULT_IO] + 1) * sizeof *samples->io);
  samples->compute = arena_alloc(arena, (counts[RESULT_COMPUTE] + 1) * sizeof *samples->compute);
  samples->fixed = arena_alloc(arena, (counts[RESULT_FIXED] + 1) * sizeof *samples->fixed);
  samples->beside = arena_alloc(arena, (counts[LIST_BESIDE] + 1) * sizeof *samples->beside);
  if (!samples->io || !samples->compute || !samples->fixed || !samples->beside) return sti_out_of_memory(error);
  for (size_t i = 0; i < results->array.count; i++) {
    STI_TRY(read_result(&results->array.items[i], i, source, &kind, &list, &reads, error));
    if (list) STI_TRY(read_samples(list, i, kind, source, samples, error));
    if (reads) STI_TRY(read_samples(reads, i, LIST_BESIDE, source, samples, error));
  }
  return STI_OK;
}

static StiCode read_numbers(Arena *arena, Fields *fields, const char *name, const int64_t **numbers, size_t *count) {
  const JsonValue *list = field_array(fields, name, 0, SIZE_MAX);
  if (!list) return fields->code;
  int64_t *values = arena_alloc(arena, (list->array.count + 1) * sizeof *values);
  if (!values) return sti_out_of_memory(fields->error);
  for (size_t i = 0; i < list->array.count; i++) {
    const JsonValue *item = &list->array.items[i];
    if (item->kind != JSON_INT || item->integer < 1) {
      fields_problem(fields, "%s.%zu must be an integer of at least 1", name, i);
      return fields->code;
    }
    values[i] = item->integer;
  }
  *numbers = values;
  *count = list->array.count;
  return STI_OK;
}

/* A samples document: {"bundle", "emulated", "engine", "fidelities", "queue_depth", "results", "sequence_length",
 * "threads", "widths"}: what a profile says besides its fits, the bundle's fidelities and its submodels' widths, and
 * unit results as in a journal, in any order. */
static StiCode fit_document(Arena *arena, const char *data, size_t length, const char *source, Text *out,
                            StiError *error) {
  JsonValue *value;
  Fields fields;
  DeviceProfile profile = {0};
  ProfileSamples samples = {0};
  STI_TRY(json_parse(arena, data, length, source, &value, error));
  fields_begin(&fields, value, source, "Samples", "", error);
  const char *bundle = field_digest(&fields, "bundle");
  profile.emulated = field_bool(&fields, "emulated");
  profile.engine = field_text(&fields, "engine", 0, SIZE_MAX);
  STI_TRY(read_numbers(arena, &fields, "fidelities", &samples.fidelities, &samples.fidelity_count));
  profile.queue_depth = field_int(&fields, "queue_depth", 1, INT64_MAX);
  const JsonValue *results = field_array(&fields, "results", 0, SIZE_MAX);
  profile.sequence_length = field_int(&fields, "sequence_length", 1, INT64_MAX);
  profile.threads = field_int(&fields, "threads", 1, INT64_MAX);
  STI_TRY(read_numbers(arena, &fields, "widths", &samples.widths, &samples.width_count));
  STI_TRY(fields_end(&fields));
  memcpy(profile.bundle, bundle, sizeof profile.bundle);
  STI_TRY(read_results(arena, results, source, &samples, error));
  STI_TRY(fit_profile(arena, &samples, &profile, error));
  profile_write(out, &profile);
  return out->failed ? sti_out_of_memory(error) : STI_OK;
}

static StiCode fit_line(void *context, Arena *arena, const char *line, size_t length, Text *out, StiError *error) {
  (void)context;
  return fit_document(arena, line, length, "standard input", out, error);
}

StiCode verb_fit(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  if (argc != 2) return sti_fail(error, STI_INPUT, "Write: fit SAMPLES, or fit --lines.", "fit takes one argument.");
  if (strcmp(argv[1], "--lines") == 0) return answer_lines(fit_line, NULL, error);
  Arena arena = {0};
  const char *data;
  size_t length;
  StiCode code = read_file(&arena, argv[1], FILE_CAP_BYTES, &data, &length, error);
  if (code == STI_OK) code = fit_document(&arena, data, length, argv[1], out, error);
  arena_free(&arena);
  return code;
}

/* ------------------------------------------------------------------ plan: what is read */

typedef struct {
  const char *bundle, *profile, *importance; /* paths, NULL: not given */
  bool lines;
  PlanRequest request;
} PlanOptions;

static StiCode read_bundle(Arena *arena, const char *path, Manifest *manifest, StiError *error) {
  const char *data;
  size_t length;
  struct stat status;
  if (stat(path, &status) == 0 && S_ISDIR(status.st_mode)) {
    char folder[PATH_CHARS];
    if (snprintf(folder, sizeof folder, "%s", path) >= PATH_CHARS)
      return sti_fail(error, STI_INPUT, "", "%.100s…: a path that long cannot be opened.", path);
    for (size_t end = strlen(folder); end > 1 && folder[end - 1] == '/';) folder[--end] = '\0';
    const char *slash = strrchr(folder, '/');
    return bundle_open(arena, folder, slash ? slash + 1 : folder, manifest, error);
  }
  STI_TRY(read_file(arena, path, MANIFEST_CAP_BYTES, &data, &length, error));
  return manifest_parse(arena, data, length, path, manifest, error);
}

static StiCode read_importance(Arena *arena, const char *path, ImportanceProfile *importance, StiError *error) {
  const char *data;
  size_t length;
  STI_TRY(read_file(arena, path, FILE_CAP_BYTES, &data, &length, error));
  return importance_parse(arena, data, length, path, importance, error);
}

static StiCode write_plan(Arena *arena, PlanRequest *request, const DeviceProfile *profile, Text *out,
                          StiError *error) {
  Plan plan;
  char digest[65];
  profile_digest(profile, digest);
  if (digest[0] == '\0') return sti_out_of_memory(error);
  request->profile = profile;
  request->profile_digest = digest;
  STI_TRY(make_plan(arena, request, &plan, error));
  plan_write(out, &plan);
  return out->failed ? sti_out_of_memory(error) : STI_OK;
}

static StiCode plan_file(Arena *arena, PlanOptions *options, Text *out, StiError *error) {
  DeviceProfile profile;
  const char *data;
  size_t length;
  STI_TRY(read_file(arena, options->profile, FILE_CAP_BYTES, &data, &length, error));
  STI_TRY(profile_parse(arena, data, length, options->profile, &profile, error));
  return write_plan(arena, &options->request, &profile, out, error);
}

/* One line: {"policy", "preload_bytes", "profile", "seed", "slack", "target_ns", "working_bytes"}. */
static StiCode plan_document(Arena *arena, PlanRequest *request, const char *line, size_t length, Text *out,
                             StiError *error) {
  static const char source[] = "standard input";
  JsonValue *value;
  Fields fields;
  DeviceProfile profile;
  STI_TRY(json_parse(arena, line, length, source, &value, error));
  fields_begin(&fields, value, source, "Question", "", error);
  int policy = field_choice(&fields, "policy", policy_names);
  request->preload_bytes = field_int(&fields, "preload_bytes", INT64_MIN, INT64_MAX);
  const JsonValue *device = field_object(&fields, "profile");
  request->seed = field_int(&fields, "seed", 0, INT64_MAX);
  request->slack = field_bool(&fields, "slack");
  request->target_ns = field_int(&fields, "target_ns", INT64_MIN, INT64_MAX);
  request->working_bytes = field_int(&fields, "working_bytes", INT64_MIN, INT64_MAX);
  STI_TRY(fields_end(&fields));
  request->policy = (Policy)policy;
  Text text = {0};
  json_canonical(&text, device);
  StiCode code = text.failed ? sti_out_of_memory(error)
                             : profile_parse(arena, text.data, text.length, source, &profile, error);
  text_free(&text);
  return code == STI_OK ? write_plan(arena, request, &profile, out, error) : code;
}

static StiCode plan_line(void *context, Arena *arena, const char *line, size_t length, Text *out, StiError *error) {
  PlanRequest request = *(const PlanRequest *)context;
  return plan_document(arena, &request, line, length, out, error);
}

/* ------------------------------------------------------------------ plan: the command line */

static StiCode parse_policy(const char *name, Policy *policy, StiError *error) {
  Text known = {0};
  for (int i = 0; i < POLICY_COUNT; i++) {
    if (strcmp(policy_names[i], name) == 0) {
      *policy = (Policy)i;
      text_free(&known);
      return STI_OK;
    }
    text_printf(&known, "%s%s", i ? ", " : "There is: ", policy_names[i]);
  }
  text_append(&known, ".", 1);
  StiCode code = known.failed ? sti_out_of_memory(error)
                              : sti_fail(error, STI_INPUT, known.data, "Unknown policy '%.100s'.", name);
  text_free(&known);
  return code;
}

/* A bare number is ns. */
static StiCode parse_target(const char *text, int64_t *target_ns, StiError *error) {
  char with_unit[40];
  size_t digits = strspn(text, "0123456789");
  bool bare = digits > 0 && text[digits] == '\0' && digits < sizeof with_unit - 2;
  if (bare) snprintf(with_unit, sizeof with_unit, "%sns", text);
  return parse_duration_ns(bare ? with_unit : text, "--target", target_ns, error);
}

static StiCode parse_seed(const char *text, int64_t *seed, StiError *error) {
  StiError ignored = {0};
  if (text[0] != '\0' && strspn(text, "0123456789") == strlen(text) && parse_bytes(text, "", seed, &ignored) == STI_OK)
    return STI_OK;
  return sti_fail(error, STI_INPUT, "Give a number from 0 on.", "--seed: '%.100s' is not a seed.", text);
}

static StiCode parse_option(const char *name, const char *value, PlanOptions *options, StiError *error) {
  PlanRequest *request = &options->request;
  if (strcmp(name, "--bundle") == 0) options->bundle = value;
  else if (strcmp(name, "--profile") == 0) options->profile = value;
  else if (strcmp(name, "--importance") == 0) options->importance = value;
  else if (strcmp(name, "--target") == 0) return parse_target(value, &request->target_ns, error);
  else if (strcmp(name, "--preload") == 0) return parse_bytes(value, "--preload", &request->preload_bytes, error);
  else if (strcmp(name, "--working") == 0) return parse_bytes(value, "--working", &request->working_bytes, error);
  else if (strcmp(name, "--policy") == 0) return parse_policy(value, &request->policy, error);
  else if (strcmp(name, "--seed") == 0) return parse_seed(value, &request->seed, error);
  else return sti_fail(error, STI_INPUT, "See docs/engine.md.", "plan has no option %.100s.", name);
  return STI_OK;
}

static StiCode parse_options(int argc, char **argv, PlanOptions *options, StiError *error) {
  *options = (PlanOptions){
      .request = {.preload_bytes = 1000000, .working_bytes = 4000000, .policy = POLICY_STI, .slack = true}};
  bool asked = false;
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--no-slack") == 0) options->request.slack = false;
    else if (strcmp(argv[i], "--lines") == 0) options->lines = true;
    else {
      if (i + 1 == argc)
        return sti_fail(error, STI_INPUT, "See docs/engine.md.", "plan: %.100s needs a value.", argv[i]);
      asked = asked || strcmp(argv[i], "--target") == 0;
      STI_TRY(parse_option(argv[i], argv[i + 1], options, error));
      i++;
    }
  }
  if (!options->bundle)
    return sti_fail(error, STI_INPUT, "Add --bundle and the bundle's folder.", "plan: no bundle is named.");
  if (!options->lines && !options->profile)
    return sti_fail(error, STI_INPUT, "Add --profile and the profile's file; fit makes one from samples.",
                    "plan: no device profile is named.");
  if (!options->lines && !asked)
    return sti_fail(error, STI_INPUT, "Add one: --target 150ms.", "plan: no target latency was given.");
  return STI_OK;
}

static StiCode run_plan(Arena *arena, PlanOptions *options, Text *out, StiError *error) {
  Manifest manifest;
  ImportanceProfile importance;
  STI_TRY(read_bundle(arena, options->bundle, &manifest, error));
  options->request.manifest = &manifest;
  if (options->importance) {
    STI_TRY(read_importance(arena, options->importance, &importance, error));
    options->request.importance = &importance;
  }
  return options->lines ? answer_lines(plan_line, &options->request, error) : plan_file(arena, options, out, error);
}

StiCode verb_plan(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arena arena = {0};
  PlanOptions options;
  STI_TRY(parse_options(argc, argv, &options, error));
  StiCode code = run_plan(&arena, &options, out, error);
  arena_free(&arena);
  return code;
}
