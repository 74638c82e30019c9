/* profile_format.c: device and importance profiles (sti_runtime/profile.py, importance_profile.py). */
#include "records.h"

#include <stdlib.h>
#include <string.h>

static const StoredFormat stored_device = {"DeviceProfile", "stifarm-device-profile", 1, false, STI_FORMAT};
static const StoredFormat stored_importance = {"ImportanceProfile", "stifarm-importance", 1, false, STI_FORMAT};

/* ------------------------------------------------------------------ device profile: reading */

static StiCode parse_io(const JsonValue *value, const char *source, IoFit *io, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "DeviceProfile", "io", error);
  io->alpha_ns = field_int(&fields, "alpha_ns", 0, INT_MOST);
  io->beside_ppm = field_int(&fields, "beside_ppm", 1000000, INT_MOST);
  io->beside_samples = field_int(&fields, "beside_samples", 0, INT_MOST);
  io->error_ppm = field_int(&fields, "error_ppm", 0, INT_MOST);
  io->p95_ppm = field_int(&fields, "p95_ppm", 1, INT_MOST);
  io->ps_per_byte = field_int(&fields, "ps_per_byte", 0, INT_MOST);
  io->samples = field_int(&fields, "samples", 1, INT_MOST);
  return fields_end(&fields);
}

static StiCode parse_read_cost(const JsonValue *value, const char *source, ReadCost *cost, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "DeviceProfile", "read_cost", error);
  cost->median_layer_ns = field_int(&fields, "median_layer_ns", 0, INT_MOST);
  cost->median_ps_per_byte = field_int(&fields, "median_ps_per_byte", 0, INT_MOST);
  cost->p95_layer_ns = field_int(&fields, "p95_layer_ns", 0, INT_MOST);
  cost->p95_ps_per_byte = field_int(&fields, "p95_ps_per_byte", 0, INT_MOST);
  cost->samples = field_int(&fields, "samples", 0, INT_MOST);
  return fields_end(&fields);
}

static StiCode parse_fixed(const JsonValue *value, const char *source, const char *path, FixedTime *fixed,
                           StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "DeviceProfile", path, error);
  fixed->embed_compute_ns = field_int(&fields, "embed_compute_ns", 0, INT_MOST);
  fixed->embed_io_ns = field_int(&fields, "embed_io_ns", 0, INT_MOST);
  fixed->head_ns = field_int(&fields, "head_ns", 0, INT_MOST);
  fixed->samples = field_int(&fields, "samples", 1, INT_MOST);
  return fields_end(&fields);
}

/* The rows of `name`, each keyed by its "width" or "fidelity". */
static StiCode parse_times(Arena *arena, const JsonValue *array, const char *source, const char *name,
                           const char *key, KeyedTime **times, int32_t *count, StiError *error) {
  *count = (int32_t)array->array.count;
  *times = new_array(arena, array->array.count, sizeof **times);
  if (*times == NULL) return sti_out_of_memory(error);
  bool fidelity = strcmp(key, "fidelity") == 0;
  for (size_t i = 0; i < array->array.count; i++) {
    KeyedTime *time = &(*times)[i];
    Fields fields;
    fields_begin_item(&fields, &array->array.items[i], source, "DeviceProfile", name, (int64_t)i, error);
    time->key = fidelity ? field_fidelity(&fields, key) : field_int(&fields, key, 1, INT_MOST);
    time->median_ns = field_int(&fields, "median_ns", 0, INT_MOST);
    time->p95_ns = field_int(&fields, "p95_ns", 0, INT_MOST);
    time->samples = field_int(&fields, "samples", 1, INT_MOST);
    STI_TRY(fields_end(&fields));
  }
  return STI_OK;
}

StiCode profile_parse(Arena *arena, const char *data, size_t length, const char *source, DeviceProfile *profile,
                      StiError *error) {
  JsonValue *value;
  bool canonical;
  STI_TRY(record_parse(arena, data, length, RECORD_MOST_BYTES, source, "DeviceProfile", &value, &canonical, error));
  *profile = (DeviceProfile){0};
  Fields fields;
  fields_begin_stored(&fields, value, &stored_device, source, "", error);
  field_copy_digest(&fields, "bundle", profile->bundle);
  const JsonValue *compute = field_array(&fields, "compute", 1, INT32_MAX);
  const JsonValue *decompress = field_array(&fields, "decompress", 1, INT32_MAX);
  profile->emulated = field_bool(&fields, "emulated");
  profile->engine = field_text(&fields, "engine", 0, SIZE_MAX);
  const JsonValue *fixed_median = field_value(&fields, "fixed_median"), *fixed_p95 = field_value(&fields, "fixed_p95");
  const JsonValue *io = field_value(&fields, "io");
  profile->queue_depth = field_int(&fields, "queue_depth", 1, INT_MOST);
  const JsonValue *read_cost = field_value(&fields, "read_cost");
  profile->sequence_length = field_int(&fields, "sequence_length", 1, INT_MOST);
  profile->threads = field_int(&fields, "threads", 1, INT_MOST);
  field_texts(&fields, arena, "unfit", &profile->unfit, &profile->unfit_count);
  STI_TRY(fields_end(&fields));
  STI_TRY(parse_io(io, source, &profile->io, error));
  STI_TRY(parse_read_cost(read_cost, source, &profile->read_cost, error));
  STI_TRY(parse_times(arena, compute, source, "compute", "width", &profile->compute, &profile->compute_count, error));
  STI_TRY(parse_times(arena, decompress, source, "decompress", "fidelity", &profile->decompress,
                      &profile->decompress_count, error));
  STI_TRY(parse_fixed(fixed_median, source, "fixed_median", &profile->fixed_median, error));
  return parse_fixed(fixed_p95, source, "fixed_p95", &profile->fixed_p95, error);
}

/* ------------------------------------------------------------------ device profile: writing */

static void write_fixed(Text *out, const char *key, const FixedTime *fixed) {
  json_key(out, key);
  json_open(out, '{');
  json_int_field(out, "embed_compute_ns", fixed->embed_compute_ns);
  json_int_field(out, "embed_io_ns", fixed->embed_io_ns);
  json_int_field(out, "head_ns", fixed->head_ns);
  json_int_field(out, "samples", fixed->samples);
  json_close(out, '}');
}

static void write_compute(Text *out, const DeviceProfile *profile) {
  json_key(out, "compute");
  json_open(out, '[');
  for (int32_t i = 0; i < profile->compute_count; i++) {
    const KeyedTime *time = &profile->compute[i];
    json_open(out, '{');
    json_int_field(out, "median_ns", time->median_ns);
    json_int_field(out, "p95_ns", time->p95_ns);
    json_int_field(out, "samples", time->samples);
    json_int_field(out, "width", time->key);
    json_close(out, '}');
  }
  json_close(out, ']');
}

static void write_decompress(Text *out, const DeviceProfile *profile) {
  json_key(out, "decompress");
  json_open(out, '[');
  for (int32_t i = 0; i < profile->decompress_count; i++) {
    const KeyedTime *time = &profile->decompress[i];
    json_open(out, '{');
    json_int_field(out, "fidelity", time->key);
    json_int_field(out, "median_ns", time->median_ns);
    json_int_field(out, "p95_ns", time->p95_ns);
    json_int_field(out, "samples", time->samples);
    json_close(out, '}');
  }
  json_close(out, ']');
}

void profile_write(Text *out, const DeviceProfile *profile) {
  json_open(out, '{');
  json_text_field(out, "bundle", profile->bundle);
  write_compute(out, profile);
  write_decompress(out, profile);
  json_bool_field(out, "emulated", profile->emulated);
  json_text_field(out, "engine", profile->engine);
  write_fixed(out, "fixed_median", &profile->fixed_median);
  write_fixed(out, "fixed_p95", &profile->fixed_p95);
  json_text_field(out, "format", stored_device.format);
  json_key(out, "io");
  json_open(out, '{');
  json_int_field(out, "alpha_ns", profile->io.alpha_ns);
  json_int_field(out, "beside_ppm", profile->io.beside_ppm);
  json_int_field(out, "beside_samples", profile->io.beside_samples);
  json_int_field(out, "error_ppm", profile->io.error_ppm);
  json_int_field(out, "p95_ppm", profile->io.p95_ppm);
  json_int_field(out, "ps_per_byte", profile->io.ps_per_byte);
  json_int_field(out, "samples", profile->io.samples);
  json_close(out, '}');
  json_int_field(out, "queue_depth", profile->queue_depth);
  json_key(out, "read_cost");
  json_open(out, '{');
  json_int_field(out, "median_layer_ns", profile->read_cost.median_layer_ns);
  json_int_field(out, "median_ps_per_byte", profile->read_cost.median_ps_per_byte);
  json_int_field(out, "p95_layer_ns", profile->read_cost.p95_layer_ns);
  json_int_field(out, "p95_ps_per_byte", profile->read_cost.p95_ps_per_byte);
  json_int_field(out, "samples", profile->read_cost.samples);
  json_close(out, '}');
  json_int_field(out, "sequence_length", profile->sequence_length);
  json_int_field(out, "threads", profile->threads);
  json_key(out, "unfit");
  json_open(out, '[');
  for (int32_t i = 0; i < profile->unfit_count; i++) json_text(out, profile->unfit[i]);
  json_close(out, ']');
  json_int_field(out, "version", stored_device.version);
  json_close(out, '}');
}

void profile_digest(const DeviceProfile *profile, char hex[65]) {
  Text text = {0};
  profile_write(&text, profile);
  text_digest(&text, hex);
}

/* ------------------------------------------------------------------ importance */

static StiCode parse_score(const JsonValue *value, const char *source, const char *path, int64_t index,
                           ShardScore *score, StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "ImportanceProfile", path, index, error);
  score->correct = field_int(&fields, "correct", 0, INT_MOST);
  score->loss_nano = field_int(&fields, "loss_nano", INT64_MIN, INT_MOST);
  return fields_end(&fields);
}

static StiCode parse_scores(Arena *arena, const JsonValue *array, const char *source, ImportanceProfile *profile,
                            StiError *error) {
  profile->scores = new_array(arena, array->array.count, sizeof *profile->scores);
  if (profile->scores == NULL) return sti_out_of_memory(error);
  for (size_t i = 0; i < array->array.count; i++) {
    ShardScore *score = &profile->scores[i];
    Fields fields;
    fields_begin_item(&fields, &array->array.items[i], source, "ImportanceProfile", "scores", (int64_t)i, error);
    score->layer = (int32_t)field_int(&fields, "layer", 0, INT32_MAX);
    const JsonValue *figures = field_value(&fields, "score");
    score->slice = (int32_t)field_int(&fields, "slice", 0, INT32_MAX);
    STI_TRY(fields_end(&fields));
    STI_TRY(parse_score(figures, source, "scores", (int64_t)i, score, error));
    if (score->layer != (int32_t)i / profile->slices || score->slice != (int32_t)i % profile->slices)
      fields_problem(&fields, "scores must cover all shards, layer-major");
    STI_TRY(fields.code);
  }
  return STI_OK;
}

/* Levels are the host's: checked, not kept. */
static StiCode check_levels(const JsonValue *array, const char *source, StiError *error) {
  for (size_t i = 0; i < array->array.count; i++) {
    Fields fields, inner;
    ShardScore ignored;
    fields_begin_item(&fields, &array->array.items[i], source, "ImportanceProfile", "levels", (int64_t)i, error);
    field_literal(&fields, "fidelity", sti_fidelities, STI_FIDELITIES);
    const JsonValue *score = field_value(&fields, "score");
    const JsonValue *submodel = field_value(&fields, "submodel");
    STI_TRY(fields_end(&fields));
    STI_TRY(parse_score(score, source, "levels", (int64_t)i, &ignored, error));
    fields_begin_item(&inner, submodel, source, "ImportanceProfile", "levels", (int64_t)i, error);
    const JsonValue *kept = field_array(&inner, "kept", 1, INT32_MAX);
    for (size_t k = 0; inner.code == STI_OK && k < kept->array.count; k++)
      field_item_int(&inner, "kept", kept, k, 0, INT32_MAX);
    field_int(&inner, "width", 1, INT32_MAX);
    STI_TRY(fields_end(&inner));
  }
  return STI_OK;
}

StiCode importance_parse(Arena *arena, const char *data, size_t length, const char *source, ImportanceProfile *profile,
                         StiError *error) {
  JsonValue *value;
  bool canonical;
  STI_TRY(record_parse(arena, data, length, RECORD_MOST_BYTES, source, "ImportanceProfile", &value, &canonical, error));
  *profile = (ImportanceProfile){0};
  Fields fields;
  fields_begin_stored(&fields, value, &stored_importance, source, "", error);
  const JsonValue *base = field_value(&fields, "base");
  profile->base_fidelity = (int32_t)field_literal(&fields, "base_fidelity", sti_fidelities, STI_FIDELITIES - 1);
  profile->layers = (int32_t)field_int(&fields, "layers", 1, INT32_MAX);
  profile->by_accuracy =
      field_choice(&fields, "method", (const char *const[]){"exhaustive", "exhaustive-accuracy", "gradient", NULL}) == 1;
  field_copy_digest(&fields, "model_digest", profile->model_digest);
  field_int(&fields, "reliability_ppm", INT64_MIN, INT_MOST);
  field_int(&fields, "rows", 1, INT_MOST);
  const JsonValue *scores = field_array(&fields, "scores", 0, INT32_MAX);
  const JsonValue *levels = field_is_given(&fields, "levels") ? field_array(&fields, "levels", 1, INT32_MAX) : NULL;
  profile->slices = (int32_t)field_int(&fields, "slices", 1, INT32_MAX);
  field_digest(&fields, "split_digest");
  field_text(&fields, "task", 0, SIZE_MAX);
  STI_TRY(fields_end(&fields));
  ShardScore base_score;
  STI_TRY(parse_score(base, source, "base", -1, &base_score, error));
  int64_t shards = (int64_t)profile->layers * profile->slices;
  if (shards != (int64_t)scores->array.count)
    fields_problem(&fields, "scores must cover all %lld shards, layer-major", (long long)shards);
  STI_TRY(fields.code);
  STI_TRY(parse_scores(arena, scores, source, profile, error));
  if (levels != NULL) STI_TRY(check_levels(levels, source, error));
  Text text = {0};
  json_canonical(&text, value);
  text_digest(&text, profile->digest);
  return profile->digest[0] == '\0' ? sti_out_of_memory(error) : STI_OK;
}

/* Most important first; scores are layer-major, so their indices break the last ties. */
static int compare_scores(const void *left, const void *right, void *context) {
  const ImportanceProfile *profile = context;
  int32_t i = *(const int32_t *)left, j = *(const int32_t *)right;
  const ShardScore *a = profile->scores + i, *b = profile->scores + j;
  if (!profile->by_accuracy && a->loss_nano != b->loss_nano) return a->loss_nano < b->loss_nano ? -1 : 1;
  if (a->correct != b->correct) return a->correct > b->correct ? -1 : 1;
  return i - j;
}

void importance_ranking(const ImportanceProfile *profile, int32_t *ranking) {
  int32_t count = profile->layers * profile->slices;
  for (int32_t i = 0; i < count; i++) ranking[i] = i;
  qsort_r(ranking, (size_t)count, sizeof *ranking, compare_scores, (void *)profile);
}
