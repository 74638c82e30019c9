/* plan_format.c: the plan: read, written, digested and held against its bundle (sti_runtime/plan.py, plan_check.py). */
#include "records.h"

#include <string.h>

const char *const policy_names[POLICY_COUNT + 1] = {
    [POLICY_STI] = "sti",
    [POLICY_STI_0MB] = "sti-0mb",
    [POLICY_EXACT] = "exact",
    [POLICY_EXACT_IO] = "exact-io",
    [POLICY_RANDOM] = "random",
    [POLICY_NO_SLACK] = "no-slack",
    [POLICY_UNIFORM] = "uniform",
    [POLICY_WIDE_FIRST] = "wide-first",
    [POLICY_LOAD_EXEC] = "load-exec",
    [POLICY_STD_PIPELINE_2] = "std-pipeline-2",
    [POLICY_STD_PIPELINE_6] = "std-pipeline-6",
    [POLICY_STD_PIPELINE_32] = "std-pipeline-32",
    [POLICY_PRELOAD_6] = "preload-6",
    [POLICY_PRELOAD_32] = "preload-32",
    [POLICY_COUNT] = NULL,
};

static const StoredFormat stored = {"Plan", "stifarm-plan", 1, false, STI_FORMAT};
static const char *const planners[] = {
    [PLANNER_PAPER] = "paper", [PLANNER_BASELINE] = "baseline", [PLANNER_EXACT] = "exact", NULL};
static const char *const modes[] = {"pipeline", "load-exec", NULL};

/* ------------------------------------------------------------------ reading */

static StiCode parse_shard(const JsonValue *value, const char *source, const char *path, size_t index,
                           PlannedShard *shard, StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Plan", path, (int64_t)index, error);
  shard->fidelity = field_fidelity(&fields, "fidelity");
  shard->layer = (int32_t)field_int(&fields, "layer", 0, INT32_MAX);
  shard->length = field_int(&fields, "length", 1, INT_MOST);
  shard->offset = field_int(&fields, "offset", 0, INT_MOST);
  shard->order = (int32_t)field_int(&fields, "order", 0, INT32_MAX);
  shard->preloaded = field_bool(&fields, "preloaded");
  shard->slice = (int32_t)field_int(&fields, "slice", 0, INT32_MAX);
  shard->source_layer = (int32_t)field_int(&fields, "source_layer", 0, INT32_MAX);
  return fields_end(&fields);
}

static StiCode parse_prediction(Arena *arena, const JsonValue *value, const char *source, const char *path,
                                Prediction *prediction, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Plan", path, error);
  prediction->fixed_ns = field_int(&fields, "fixed_ns", 0, INT_MOST);
  prediction->latency_ns = field_int(&fields, "latency_ns", 0, INT_MOST);
  const JsonValue *layers = field_array(&fields, "layers", 0, INT32_MAX);
  prediction->median_latency_ns = field_int(&fields, "median_latency_ns", 0, INT_MOST);
  prediction->stall_ns = field_int(&fields, "stall_ns", 0, INT_MOST);
  STI_TRY(fields_end(&fields));
  prediction->layer_count = (int32_t)layers->array.count;
  prediction->layers = new_array(arena, layers->array.count, sizeof *prediction->layers);
  if (prediction->layers == NULL) return sti_out_of_memory(error);
  char place[PATH_ROOM];
  join_path(place, path, "layers");
  for (size_t i = 0; i < layers->array.count; i++) {
    LayerTime *time = &prediction->layers[i];
    Fields layer;
    fields_begin_item(&layer, &layers->array.items[i], source, "Plan", place, (int64_t)i, error);
    time->compute_end_ns = field_int(&layer, "compute_end_ns", 0, INT_MOST);
    time->compute_start_ns = field_int(&layer, "compute_start_ns", 0, INT_MOST);
    time->io_end_ns = field_int(&layer, "io_end_ns", 0, INT_MOST);
    time->io_start_ns = field_int(&layer, "io_start_ns", 0, INT_MOST);
    STI_TRY(fields_end(&layer));
  }
  return STI_OK;
}

/* Shards are the n × m of the submodel, layer-major, each in its layer, on whole blocks. */
static void check_shards(Fields *fields, const Plan *plan, size_t count) {
  const Submodel *submodel = &plan->submodel;
  if ((int64_t)submodel->depth * submodel->width != (int64_t)count) {
    fields_problem(fields, "shards must be the %d×%d of the submodel, layer-major", submodel->depth, submodel->width);
    return;
  }
  for (size_t i = 0; i < count && fields->code == STI_OK; i++) {
    const PlannedShard *shard = &plan->shards[i];
    if (shard->layer != (int32_t)i / submodel->width || shard->slice != (int32_t)i % submodel->width)
      fields_problem(fields, "shards must be the %d×%d of the submodel, layer-major", submodel->depth, submodel->width);
    else if (shard->source_layer != submodel->kept[shard->layer])
      fields_problem(fields, "shard %d,%d: not its submodel's layer", shard->layer, shard->slice);
    else if (shard->offset % STI_ALIGNMENT != 0 || shard->length % STI_ALIGNMENT != 0)
      fields_problem(fields, "shard %d,%d: misaligned", shard->layer, shard->slice);
  }
}

static void check_preloaded_bytes(Fields *fields, const Plan *plan, size_t count) {
  int64_t bytes = 0;
  bool fits = true;
  for (size_t i = 0; i < count; i++)
    if (plan->shards[i].preloaded && __builtin_add_overflow(bytes, plan->shards[i].length, &bytes)) fits = false;
  if (!fits || bytes > plan->preload_bytes)
    fields_problem(fields, "it preloads more bytes than its buffer of %lld", (long long)plan->preload_bytes);
}

/* Read orders are 0, 1, 2, …, of the streamed and of the preloaded shards. */
static void check_orders(Fields *fields, Arena *arena, const Plan *plan, size_t count) {
  size_t preloaded = 0;
  for (size_t i = 0; i < count; i++) preloaded += plan->shards[i].preloaded;
  bool *seen = new_array(arena, count, sizeof *seen); /* [streamed shards], then [preloaded] */
  if (seen == NULL) {
    fields_out_of_memory(fields);
    return;
  }
  for (size_t i = 0; i < count; i++) {
    const PlannedShard *shard = &plan->shards[i];
    size_t first = shard->preloaded ? count - preloaded : 0, room = shard->preloaded ? preloaded : count - preloaded;
    size_t order = (size_t)shard->order;
    if (order >= room || seen[first + order])
      fields_problem(fields, "read orders must be 0, 1, 2, … without gaps");
    if (fields->code != STI_OK) return;
    seen[first + order] = true;
  }
}

StiCode plan_parse(Arena *arena, const JsonValue *value, const char *source, const char *path, Plan *plan,
                   StiError *error) {
  Fields fields;
  *plan = (Plan){0};
  fields_begin_stored(&fields, value, &stored, source, path, error);
  field_copy_digest(&fields, "bundle", plan->bundle);
  field_copy_digest(&fields, "device_profile", plan->device_profile);
  field_texts(&fields, arena, "flags", &plan->flags, &plan->flag_count);
  field_copy_digest_or_null(&fields, "importance", plan->importance);
  plan->load_exec = field_choice(&fields, "mode", modes) == 1;
  plan->planner = (Planner)field_choice(&fields, "planner", planners);
  plan->policy = (Policy)field_choice(&fields, "policy", policy_names);
  const JsonValue *predicted = field_value(&fields, "predicted");
  plan->preload_bytes = field_int(&fields, "preload_bytes", 0, INT_MOST);
  plan->sequence_length = field_int(&fields, "sequence_length", 1, INT_MOST);
  const JsonValue *shards = field_array(&fields, "shards", 1, INT32_MAX);
  plan->slack = field_bool(&fields, "slack");
  const JsonValue *submodel = field_value(&fields, "submodel");
  plan->target_ns = field_int(&fields, "target_ns", 1, INT_MOST);
  plan->within_target = field_bool(&fields, "within_target");
  plan->working_bytes = field_int(&fields, "working_bytes", 1, INT_MOST);
  STI_TRY(fields_end(&fields));

  char place[PATH_ROOM];
  STI_TRY(parse_prediction(arena, predicted, source, join_path(place, path, "predicted"), &plan->predicted, error));
  STI_TRY(submodel_parse(arena, submodel, source, join_path(place, path, "submodel"), &plan->submodel, error));
  size_t count = shards->array.count;
  plan->shards = new_array(arena, count, sizeof *plan->shards);
  if (plan->shards == NULL) return sti_out_of_memory(error);
  join_path(place, path, "shards");
  for (size_t i = 0; i < count; i++)
    STI_TRY(parse_shard(&shards->array.items[i], source, place, i, &plan->shards[i], error));
  check_shards(&fields, plan, count);
  check_preloaded_bytes(&fields, plan, count);
  check_orders(&fields, arena, plan, count);
  return fields.code;
}

/* ------------------------------------------------------------------ writing */

static int32_t shard_count(const Plan *plan) { return plan->submodel.depth * plan->submodel.width; }

static void write_prediction(Text *out, const Prediction *prediction) {
  json_open(out, '{');
  json_int_field(out, "fixed_ns", prediction->fixed_ns);
  json_int_field(out, "latency_ns", prediction->latency_ns);
  json_key(out, "layers");
  json_open(out, '[');
  for (int32_t i = 0; i < prediction->layer_count; i++) {
    const LayerTime *time = &prediction->layers[i];
    json_open(out, '{');
    json_int_field(out, "compute_end_ns", time->compute_end_ns);
    json_int_field(out, "compute_start_ns", time->compute_start_ns);
    json_int_field(out, "io_end_ns", time->io_end_ns);
    json_int_field(out, "io_start_ns", time->io_start_ns);
    json_close(out, '}');
  }
  json_close(out, ']');
  json_int_field(out, "median_latency_ns", prediction->median_latency_ns);
  json_int_field(out, "stall_ns", prediction->stall_ns);
  json_close(out, '}');
}

static void write_shards(Text *out, const Plan *plan) {
  json_open(out, '[');
  for (int32_t i = 0; i < shard_count(plan); i++) {
    const PlannedShard *shard = &plan->shards[i];
    json_open(out, '{');
    json_int_field(out, "fidelity", shard->fidelity);
    json_int_field(out, "layer", shard->layer);
    json_int_field(out, "length", shard->length);
    json_int_field(out, "offset", shard->offset);
    json_int_field(out, "order", shard->order);
    json_bool_field(out, "preloaded", shard->preloaded);
    json_int_field(out, "slice", shard->slice);
    json_int_field(out, "source_layer", shard->source_layer);
    json_close(out, '}');
  }
  json_close(out, ']');
}

void plan_write(Text *out, const Plan *plan) {
  json_open(out, '{');
  json_text_field(out, "bundle", plan->bundle);
  json_text_field(out, "device_profile", plan->device_profile);
  json_key(out, "flags");
  json_open(out, '[');
  for (int32_t i = 0; i < plan->flag_count; i++) json_text(out, plan->flags[i]);
  json_close(out, ']');
  json_text_field(out, "format", stored.format);
  json_key(out, "importance");
  if (plan->importance[0] == '\0') json_null(out);
  else json_text(out, plan->importance);
  json_text_field(out, "mode", modes[plan->load_exec]);
  json_text_field(out, "planner", planners[plan->planner]);
  json_text_field(out, "policy", policy_names[plan->policy]);
  json_key(out, "predicted");
  write_prediction(out, &plan->predicted);
  json_int_field(out, "preload_bytes", plan->preload_bytes);
  json_int_field(out, "sequence_length", plan->sequence_length);
  json_key(out, "shards");
  write_shards(out, plan);
  json_bool_field(out, "slack", plan->slack);
  json_key(out, "submodel");
  submodel_write(out, &plan->submodel);
  json_int_field(out, "target_ns", plan->target_ns);
  json_int_field(out, "version", stored.version);
  json_bool_field(out, "within_target", plan->within_target);
  json_int_field(out, "working_bytes", plan->working_bytes);
  json_close(out, '}');
}

/* ------------------------------------------------------------------ digests */

void plan_digest(const Plan *plan, char hex[65]) {
  Text text = {0};
  plan_write(&text, plan);
  text_digest(&text, hex);
}

void plan_content_digest(const Plan *plan, char hex[65]) {
  Text text = {0};
  json_open(&text, '{');
  json_text_field(&text, "bundle", plan->bundle);
  json_key(&text, "fidelities");
  json_open(&text, '[');
  for (int32_t i = 0; i < shard_count(plan); i++) json_int(&text, plan->shards[i].fidelity);
  json_close(&text, ']');
  json_int_field(&text, "sequence_length", plan->sequence_length);
  json_key(&text, "submodel");
  submodel_write(&text, &plan->submodel);
  json_close(&text, '}');
  text_digest(&text, hex);
}

/* ------------------------------------------------------------------ the plan and its bundle */

static bool offers(const Manifest *manifest, const Submodel *wanted) {
  for (int32_t i = 0; i < manifest->submodel_count; i++) {
    const Submodel *offered = &manifest->submodels[i];
    size_t bytes = (size_t)wanted->depth * sizeof *wanted->kept;
    if (offered->width == wanted->width && offered->depth == wanted->depth &&
        memcmp(offered->kept, wanted->kept, bytes) == 0)
      return true;
  }
  return false;
}

static StiCode unfit(const Manifest *manifest, StiError *error, const char *cause) {
  return sti_fail(error, STI_FORMAT, "Plan again for this bundle.", "The plan does not fit bundle %.12s: %s.",
                  manifest->digest, cause);
}

static StiCode check_place(const PlannedShard *shard, const Manifest *manifest, StiError *error) {
  char cause[200];
  int layer = shard->source_layer, slice = shard->slice, bits = shard->fidelity;
  long long offset = shard->offset, length = shard->length;
  const Version *version = manifest_version(manifest, layer, slice, bits);
  if (version != NULL && version->offset == offset && version->length == length) return STI_OK;
  if (layer >= manifest->model.layers || slice >= manifest->model.heads)
    snprintf(cause, sizeof cause, "shard %d,%d is not in the bundle", layer, slice);
  else if (version == NULL)
    snprintf(cause, sizeof cause, "the bundle holds no versions at %d bits", bits);
  else
    snprintf(cause, sizeof cause, "shard %d,%d at %d bits lies at %lld+%lld, not %lld+%lld", layer, slice, bits,
             (long long)version->offset, (long long)version->length, offset, length);
  return unfit(manifest, error, cause);
}

StiCode plan_check_bundle(const Plan *plan, const Manifest *manifest, StiError *error) {
  char cause[200];
  if (strcmp(plan->bundle, manifest->digest) != 0) {
    snprintf(cause, sizeof cause, "made for bundle %.12s, not %.12s", plan->bundle, manifest->digest);
    return unfit(manifest, error, cause);
  }
  if (!offers(manifest, &plan->submodel)) {
    snprintf(cause, sizeof cause, "submodel %d×%d is not one of the bundle's", plan->submodel.depth,
             plan->submodel.width);
    return unfit(manifest, error, cause);
  }
  for (int32_t i = 0; i < shard_count(plan); i++) STI_TRY(check_place(&plan->shards[i], manifest, error));
  return STI_OK;
}

/* ------------------------------------------------------------------ the reads of a plan */

int32_t plan_order(const Plan *plan, bool preloaded, int32_t *index) {
  int32_t count = 0;
  for (int32_t i = 0; i < shard_count(plan); i++) {
    if (plan->shards[i].preloaded != preloaded) continue;
    index[plan->shards[i].order] = i;
    count++;
  }
  return count;
}

/* Whether `next`, of the same layer and region, begins where `last` ends and the whole stays small enough. */
static bool joins(const PlannedShard *first, const PlannedShard *last, const PlannedShard *next) {
  /* Unsigned: the end of a shard that is in no bundle can lie beyond int64. */
  uint64_t last_end = (uint64_t)last->offset + (uint64_t)last->length;
  uint64_t next_end = (uint64_t)next->offset + (uint64_t)next->length;
  return last->layer == next->layer && last->fidelity == next->fidelity && last_end == (uint64_t)next->offset &&
         next_end - (uint64_t)first->offset <= STI_MERGE_LIMIT_BYTES;
}

int32_t merge_reads(const PlannedShard *shards, const int32_t *index, int32_t count, MergedRead *reads) {
  int32_t read_count = 0;
  for (int32_t i = 0; i < count; i++) {
    const PlannedShard *shard = &shards[index[i]];
    MergedRead *read = read_count == 0 ? NULL : &reads[read_count - 1];
    if (read != NULL && joins(&shards[index[read->first]], &shards[index[i - 1]], shard)) {
      read->count++;
      read->length += shard->length;
      continue;
    }
    reads[read_count++] = (MergedRead){.layer = shard->layer, .fidelity = shard->fidelity, .first = i, .count = 1,
                                       .offset = shard->offset, .length = shard->length};
  }
  return read_count;
}
