/* formats_probe.c: what the C parsers make of documents.
 *
 * Requests on standard input: "<kind> <length>\n" and that many bytes. Answers: "<length>\n" and that many bytes, which
 * are "ok\n" and what was asked for, or the error's class name, what happened and the remedy, one line each.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../agent/native/job.h"

typedef StiCode Answer(Arena *arena, const char *data, size_t length, Text *out, StiError *error);

static StiCode answer_json(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  JsonValue *value;
  bool canonical;
  STI_TRY(json_parse_noting(arena, data, length, "document", &value, &canonical, error));
  text_printf(out, "%d\n", canonical);
  Text text = {0};
  json_canonical(&text, value);
  text_append(out, text.data, text.length);
  text_free(&text);
  return STI_OK;
}

static StiCode answer_manifest(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  Manifest manifest;
  STI_TRY(manifest_parse(arena, data, length, "manifest.json", &manifest, error));
  StiError problem;
  bool whole = manifest_check(arena, &manifest, "manifest.json", &problem) == STI_OK;
  text_printf(out, "%s\n%d", manifest.digest, whole);
  return STI_OK;
}

static void write_reads(Text *out, const Plan *plan, bool preloaded) {
  size_t most = (size_t)plan->submodel.depth * (size_t)plan->submodel.width;
  int32_t *index = calloc(most, sizeof *index);
  MergedRead *reads = calloc(most, sizeof *reads);
  int32_t count = merge_reads(plan->shards, index, plan_order(plan, preloaded, index), reads);
  for (int32_t i = 0; i < count; i++)
    text_printf(out, "%d %d %" PRId64 " %" PRId64 " %d;", reads[i].layer, reads[i].fidelity, reads[i].offset,
                reads[i].length, reads[i].count);
  text_append(out, "\n", 1);
  free(index);
  free(reads);
}

static StiCode answer_plan(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  JsonValue *value;
  Plan plan;
  STI_TRY(json_parse(arena, data, length, "plan", &value, error));
  STI_TRY(plan_parse(arena, value, "plan", "", &plan, error));
  char digest[65], content[65];
  plan_digest(&plan, digest);
  plan_content_digest(&plan, content);
  text_printf(out, "%s\n%s\n", digest, content);
  write_reads(out, &plan, false);
  write_reads(out, &plan, true);
  Text text = {0};
  plan_write(&text, &plan);
  text_append(out, text.data, text.length);
  text_free(&text);
  return STI_OK;
}

/* A manifest, a newline, a plan. */
static StiCode answer_fit(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  const char *newline = memchr(data, '\n', length);
  size_t first = newline == NULL ? length : (size_t)(newline - data);
  Manifest manifest;
  JsonValue *value;
  Plan plan;
  STI_TRY(manifest_parse(arena, data, first, "manifest.json", &manifest, error));
  STI_TRY(json_parse(arena, data + first + 1, length - first - 1, "plan", &value, error));
  STI_TRY(plan_parse(arena, value, "plan", "", &plan, error));
  text_append(out, "fits", 4);
  return plan_check_bundle(&plan, &manifest, error);
}

static StiCode answer_profile(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  DeviceProfile profile;
  char digest[65];
  STI_TRY(profile_parse(arena, data, length, "profile", &profile, error));
  profile_digest(&profile, digest);
  text_printf(out, "%s", digest);
  return STI_OK;
}

static StiCode answer_importance(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  ImportanceProfile profile;
  STI_TRY(importance_parse(arena, data, length, "importance", &profile, error));
  text_printf(out, "%s\n", profile.digest);
  int32_t count = profile.layers * profile.slices, *ranking = calloc((size_t)count, sizeof *ranking);
  importance_ranking(&profile, ranking);
  for (int32_t i = 0; i < count; i++) text_printf(out, "%d ", ranking[i]);
  free(ranking);
  return STI_OK;
}

static StiCode answer_job(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  Job job;
  STI_TRY(job_parse(arena, data, length, "job.json", &job, error));
  Text text = {0};
  job_write(&text, &job);
  text_append(out, text.data, text.length);
  text_free(&text);
  return STI_OK;
}

/* Any bytes as a JSON string. */
static StiCode answer_text(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  (void)arena, (void)error;
  json_text_n(out, data, length);
  return STI_OK;
}

/* An error that says this. */
static StiCode answer_words(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  (void)out;
  const char *text = arena_text(arena, data, length);
  return text == NULL ? sti_out_of_memory(error) : sti_fail(error, STI_INPUT, text, "%s", text);
}

/* Doubles as they lie in memory. */
static StiCode answer_numbers(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  (void)arena, (void)error;
  for (size_t i = 0; i + sizeof(double) <= length; i += sizeof(double)) {
    double value;
    char text[JSON_NUMBER_ROOM];
    memcpy(&value, data + i, sizeof value);
    json_spell_number(text, value);
    text_printf(out, "%s\n", text);
  }
  return STI_OK;
}

/* SHA-256 at once and in growing pieces, and CRC-32. */
static StiCode answer_digests(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  (void)arena, (void)error;
  char whole[65], pieces[65];
  sha256_hex(data, length, whole);
  Sha256 hash;
  sha256_begin(&hash);
  for (size_t done = 0, piece = 1; done < length; piece = piece % 150 + 7) {
    size_t taken = piece < length - done ? piece : length - done;
    sha256_add(&hash, data + done, taken);
    done += taken;
  }
  sha256_end(&hash, pieces);
  text_printf(out, "%s\n%s\n%08x", whole, pieces, crc32_of(data, length));
  return STI_OK;
}

/* "layers heads hidden ffn fidelity" and six outlier counts. */
static StiCode answer_layout(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  const char *text = arena_text(arena, data, length);
  ModelConfig model = {0};
  uint32_t outliers[STI_MATRICES];
  int fidelity;
  if (text == NULL || sscanf(text, "%d %d %d %d %d %u %u %u %u %u %u", &model.layers, &model.heads, &model.hidden,
                             &model.ffn, &fidelity, &outliers[0], &outliers[1], &outliers[2], &outliers[3],
                             &outliers[4], &outliers[5]) != 11)
    return sti_fail(error, STI_INPUT, "", "not a layout request");
  PayloadLayout layout;
  payload_layout(&model, fidelity, outliers, &layout);
  text_printf(out, "%" PRId64 "\n", layout.stream);
  for (int i = 0; i < layout.planes; i++)
    text_printf(out, "%d %" PRId64 ";", layout.plane_bits[i], layout.plane_offset[i]);
  text_append(out, "\n", 1);
  for (int i = 0; i < STI_MATRICES; i++) text_printf(out, "%" PRId64 " ", layout.outlier_offset[i]);
  text_printf(out, "\n%" PRId64, layout.payload_bytes);
  return STI_OK;
}

/* "<digest or ->\n<folder>" */
static StiCode answer_open(Arena *arena, const char *data, size_t length, Text *out, StiError *error) {
  char *text = arena_text(arena, data, length), *newline = strchr(text, '\n');
  *newline = '\0';
  Manifest manifest;
  STI_TRY(bundle_open(arena, newline + 1, strcmp(text, "-") == 0 ? NULL : text, &manifest, error));
  text_printf(out, "%s", manifest.digest);
  return STI_OK;
}

static const struct {
  const char *kind;
  Answer *answer;
} answers[] = {
    {"json", answer_json},       {"manifest", answer_manifest},     {"plan", answer_plan},
    {"fit", answer_fit},         {"profile", answer_profile},       {"importance", answer_importance},
    {"job", answer_job},         {"numbers", answer_numbers},       {"digests", answer_digests},
    {"layout", answer_layout},   {"open", answer_open},             {"text", answer_text},
    {"words", answer_words},
};

static int answer_one(const char *kind, const char *data, size_t length) {
  for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
    if (strcmp(answers[i].kind, kind) != 0) continue;
    Arena arena = {0};
    Text out = {0};
    StiError error = {0};
    StiCode code = answers[i].answer(&arena, data, length, &out, &error);
    if (code == STI_OK) {
      printf("%zu\nok\n", out.length + 3);
      fwrite(out.data, 1, out.length, stdout);
    } else {
      const char *name = sti_error_name(code);
      printf("%zu\n%s\n%s\n%s", strlen(name) + strlen(error.what) + strlen(error.remedy) + 2, name, error.what,
             error.remedy);
    }
    text_free(&out);
    arena_free(&arena);
    return 0;
  }
  return 2;
}

int main(void) {
  char kind[32];
  size_t length;
  while (scanf("%31s %zu", kind, &length) == 2) {
    char *data = malloc(length == 0 ? 1 : length); /* of exactly its size, so that reading past it is seen */
    if (data == NULL || getchar() != '\n' || fread(data, 1, length, stdin) != length) return 2;
    int code = answer_one(kind, data, length);
    free(data);
    if (code != 0) return code;
  }
  return 0;
}
