/* manifest.c: the bundle manifest, parsed and checked against itself (sti_runtime/manifest.py). */
#include "records.h"

#include <stdlib.h>
#include <string.h>

static const char manifest_name[] = "manifest.json", resident_file[] = "resident.bin";
static const char embeddings_file[] = "embeddings.bin";

/* ------------------------------------------------------------------ parts */

/* Bytes of a file that is not a region; -1 if there is none of that name. */
static int64_t data_file_bytes(const Manifest *manifest, const char *file) {
  for (int32_t i = 0; i < manifest->file_count; i++)
    if (strcmp(manifest->files[i].file, file) == 0) return manifest->files[i].bytes;
  return -1;
}

/* A bare file name: [a-z0-9][a-z0-9_.-]{0,63} */
static const char *field_file(Fields *fields) {
  static const char first[] = "abcdefghijklmnopqrstuvwxyz0123456789";
  static const char rest[] = "abcdefghijklmnopqrstuvwxyz0123456789_.-";
  const char *name = field_text(fields, "file", 1, 64);
  if (fields->code == STI_OK && (strchr(first, name[0]) == NULL || name[strspn(name, rest)] != '\0'))
    fields_problem(fields, "file should be a bare file name, not \"%s\"", name);
  return name;
}

static StiCode parse_version(const JsonValue *value, const char *source, const char *path, size_t index,
                             Version *version, StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Manifest", path, (int64_t)index, error);
  version->length = field_int(&fields, "length", 1, INT_MOST);
  version->offset = field_int(&fields, "offset", 0, INT_MOST);
  const JsonValue *outliers = field_array(&fields, "outliers", STI_MATRICES, STI_MATRICES);
  for (size_t i = 0; i < outliers->array.count; i++)
    version->outliers[i] = (uint32_t)field_item_int(&fields, "outliers", outliers, i, 0, UINT32_MAX);
  version->payload_bytes = field_int(&fields, "payload_bytes", 1, INT_MOST);
  field_copy_digest(&fields, "sha256", version->sha256);
  return fields_end(&fields);
}

/* Versions follow one another without holes; each is padded to whole blocks. */
static void check_versions(Fields *fields, const Region *region, size_t count) {
  int64_t end = 0;
  for (size_t i = 0; i < count; i++) {
    const Version *version = &region->versions[i];
    if (version->offset != end || version->length % STI_ALIGNMENT != 0)
      fields_problem(fields, "%s: a hole, overlap or misalignment at %lld", region->file, (long long)end);
    else if (version->payload_bytes > version->length || version->payload_bytes <= version->length - STI_ALIGNMENT)
      fields_problem(fields, "%s: a payload that does not fit its version at %lld", region->file, (long long)end);
    else if (__builtin_add_overflow(end, version->length, &end))
      fields_problem(fields, "%s: it is longer than a file can be", region->file);
    if (fields->code != STI_OK) return;
  }
}

static StiCode parse_region(Arena *arena, const JsonValue *value, const char *source, size_t index, size_t shards,
                            Region *region, StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Manifest", "regions", (int64_t)index, error);
  /* Not field_literal's 2.0 for 2: no other spelling is canonical. */
  region->fidelity = (int)field_int(&fields, "fidelity", sti_fidelities[0], sti_fidelities[STI_FIDELITIES - 1]);
  if (fields.code == STI_OK && sti_fidelity_index(region->fidelity) < 0)
    fields_problem(&fields, "%d bits are not a fidelity", region->fidelity);
  region->file = field_file(&fields);
  const JsonValue *versions = field_array(&fields, "versions", 0, INT32_MAX);
  STI_TRY(fields_end(&fields));
  if (versions->array.count != shards)
    fields_problem(&fields, "%s: %zu versions for %zu shards", region->file, versions->array.count, shards);
  STI_TRY(fields.code);
  region->versions = new_array(arena, shards, sizeof *region->versions);
  if (region->versions == NULL) return sti_out_of_memory(error);
  char path[PATH_ROOM];
  snprintf(path, sizeof path, "regions.%zu.versions", index);
  for (size_t i = 0; i < shards; i++)
    STI_TRY(parse_version(&versions->array.items[i], source, path, i, &region->versions[i], error));
  check_versions(&fields, region, shards);
  return fields.code;
}

static StiCode parse_tensor(const JsonValue *value, const char *source, size_t index, TensorEntry *tensor,
                            StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Manifest", "resident", (int64_t)index, error);
  tensor->gobo6 = field_choice(&fields, "encoding", (const char *const[]){"f32", "gobo6", NULL}) == 1;
  tensor->length = field_int(&fields, "length", 1, INT_MOST);
  tensor->name = field_text(&fields, "name", 0, SIZE_MAX);
  tensor->offset = field_int(&fields, "offset", 0, INT_MOST);
  tensor->outliers = (uint32_t)field_int(&fields, "outliers", 0, UINT32_MAX);
  const JsonValue *shape = field_array(&fields, "shape", 0, INT32_MAX);
  tensor->rank = (int)shape->array.count;
  for (size_t i = 0; i < shape->array.count; i++) {
    int64_t size = field_item_int(&fields, "shape", shape, i, 1, INT_MOST);
    if (i < 2) tensor->shape[i] = size;
  }
  return fields_end(&fields);
}

static StiCode parse_table(const JsonValue *value, const char *source, size_t index, Manifest *manifest,
                           StiError *error) {
  static const char *const names[] = {"word", "position", "token_type", NULL};
  EmbeddingTable *tables[] = {&manifest->word, &manifest->position, &manifest->token_type};
  Fields fields;
  fields_begin_item(&fields, value, source, "Manifest", "embeddings", (int64_t)index, error);
  int name = field_choice(&fields, "name", names);
  EmbeddingTable *table = tables[name];
  table->offset = field_int(&fields, "offset", 0, INT_MOST);
  table->row_bytes = field_int(&fields, "row_bytes", 1, INT_MOST);
  table->rows = field_int(&fields, "rows", 1, INT_MOST);
  STI_TRY(fields_end(&fields));
  int64_t bytes, end, room = data_file_bytes(manifest, embeddings_file);
  if (table->offset % STI_ALIGNMENT != 0 || table->row_bytes != (int64_t)sizeof(float) * manifest->model.hidden)
    fields_problem(&fields, "embedding table %s is misaligned or of a wrong row size", names[name]);
  else if (__builtin_mul_overflow(table->rows, table->row_bytes, &bytes) ||
           __builtin_add_overflow(table->offset, bytes, &end) || end > room)
    fields_problem(&fields, "embedding table %s lies outside %s", names[name], embeddings_file);
  return fields.code;
}

static StiCode parse_file(Arena *arena, const JsonValue *value, const char *source, size_t index, DataFile *file,
                          StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Manifest", "files", (int64_t)index, error);
  file->bytes = field_int(&fields, "bytes", 1, INT_MOST);
  const JsonValue *chunks = field_array(&fields, "chunks", 0, INT32_MAX);
  file->file = field_file(&fields);
  STI_TRY(fields_end(&fields));
  file->chunk_count = (int32_t)chunks->array.count;
  file->chunks = new_array(arena, chunks->array.count, sizeof *file->chunks);
  if (file->chunks == NULL) return sti_out_of_memory(error);
  char path[PATH_ROOM];
  snprintf(path, sizeof path, "files.%zu.chunks", index);
  int64_t end = 0;
  for (size_t i = 0; i < chunks->array.count; i++) {
    Chunk *chunk = &file->chunks[i];
    Fields part;
    fields_begin_item(&part, &chunks->array.items[i], source, "Manifest", path, (int64_t)i, error);
    chunk->length = field_int(&part, "length", 1, INT_MOST);
    chunk->offset = field_int(&part, "offset", 0, INT_MOST);
    field_copy_digest(&part, "sha256", chunk->sha256);
    STI_TRY(fields_end(&part));
    if (chunk->offset != end || __builtin_add_overflow(end, chunk->length, &end))
      fields_problem(&part, "%s: a hole or overlap at %lld", file->file, (long long)end);
    STI_TRY(part.code);
  }
  if (end != file->bytes)
    fields_problem(&fields, "%s: chunks cover %lld of %lld bytes", file->file, (long long)end, (long long)file->bytes);
  return fields.code;
}

static StiCode parse_submodel(Arena *arena, const JsonValue *value, const char *source, size_t index,
                              const ModelConfig *model, Submodel *submodel, StiError *error) {
  char path[PATH_ROOM];
  snprintf(path, sizeof path, "submodels.%zu", index);
  STI_TRY(submodel_parse(arena, value, source, path, submodel, error));
  Fields fields;
  fields_begin(&fields, value, source, "Manifest", path, error);
  if (submodel->width > model->heads) fields_problem(&fields, "it is larger than the model");
  for (int32_t i = 0; i < submodel->depth; i++) {
    if (submodel->kept[i] >= model->layers) fields_problem(&fields, "it is larger than the model");
    if (i > 0 && submodel->kept[i] <= submodel->kept[i - 1]) fields_problem(&fields, "kept layers must ascend");
  }
  return fields.code;
}

static StiCode parse_sensitivity(const JsonValue *value, const char *source, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Manifest", "quantizer.sensitivity", error);
  field_int(&fields, "rows", 1, INT_MOST);
  field_digest(&fields, "rows_digest");
  field_text(&fields, "task", 1, 64);
  return fields_end(&fields);
}

/* Who made the versions: nothing here depends on it, all codecs' payloads are read alike. */
static StiCode parse_quantizer(const JsonValue *value, const char *source, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Manifest", "quantizer", error);
  enum { GOBO, GOBO_CONVERGED, FISHER };
  const int name = field_choice(&fields, "name", (const char *const[]){"gobo", "gobo-converged", "fisher", NULL});
  field_int(&fields, "outlier_log_density_milli", INT64_MIN, INT_MOST);
  if (name == FISHER) {
    field_int(&fields, "sensitive_ppm", 0, 1000000);
    const JsonValue *sensitivity = field_value(&fields, "sensitivity");
    STI_TRY(fields_end(&fields));
    return parse_sensitivity(sensitivity, source, error);
  }
  if (!field_bool(&fields, "refined") && name == GOBO_CONVERGED) fields_problem(&fields, "gobo-converged is refined");
  return fields_end(&fields);
}

/* ------------------------------------------------------------------ the whole */

static int compare_texts(const void *left, const void *right) {
  return strcmp(*(const char *const *)left, *(const char *const *)right);
}

static void check_names(Fields *fields, Arena *arena, const Manifest *manifest) {
  size_t count = 0, most = (size_t)manifest->region_count + (size_t)manifest->file_count + 1;
  const char **names = new_array(arena, most, sizeof *names);
  if (names == NULL) {
    fields_out_of_memory(fields);
    return;
  }
  for (int32_t i = 0; i < manifest->region_count; i++) names[count++] = manifest->regions[i].file;
  for (int32_t i = 0; i < manifest->file_count; i++) names[count++] = manifest->files[i].file;
  names[count++] = manifest_name;
  qsort(names, count, sizeof *names, compare_texts);
  for (size_t i = 1; i < count; i++)
    if (strcmp(names[i - 1], names[i]) == 0) fields_problem(fields, "two files share the name %s", names[i]);
}

/* The arrays of the manifest, as JSON. */
typedef struct {
  const JsonValue *submodels, *regions, *resident, *embeddings, *files;
} Parts;

/* Each kind of part after the ones it is checked against. */
static StiCode parse_parts(Arena *arena, const Parts *parts, const char *source, Manifest *manifest, StiError *error) {
  manifest->submodel_count = (int32_t)parts->submodels->array.count;
  manifest->region_count = (int32_t)parts->regions->array.count;
  manifest->resident_count = (int32_t)parts->resident->array.count;
  manifest->embedding_count = (int32_t)parts->embeddings->array.count;
  manifest->file_count = (int32_t)parts->files->array.count;
  manifest->submodels = new_array(arena, parts->submodels->array.count, sizeof *manifest->submodels);
  manifest->regions = new_array(arena, parts->regions->array.count, sizeof *manifest->regions);
  manifest->resident = new_array(arena, parts->resident->array.count, sizeof *manifest->resident);
  manifest->files = new_array(arena, parts->files->array.count, sizeof *manifest->files);
  if (!manifest->submodels || !manifest->regions || !manifest->resident || !manifest->files)
    return sti_out_of_memory(error);

  const ModelConfig *model = &manifest->model;
  size_t shards = (size_t)model->layers * (size_t)model->heads;
  for (size_t i = 0; i < parts->submodels->array.count; i++)
    STI_TRY(parse_submodel(arena, &parts->submodels->array.items[i], source, i, model, &manifest->submodels[i], error));
  for (size_t i = 0; i < parts->regions->array.count; i++)
    STI_TRY(parse_region(arena, &parts->regions->array.items[i], source, i, shards, &manifest->regions[i], error));
  for (size_t i = 0; i < parts->files->array.count; i++)
    STI_TRY(parse_file(arena, &parts->files->array.items[i], source, i, &manifest->files[i], error));
  for (size_t i = 0; i < parts->resident->array.count; i++)
    STI_TRY(parse_tensor(&parts->resident->array.items[i], source, i, &manifest->resident[i], error));
  for (size_t i = 0; i < parts->embeddings->array.count; i++)
    STI_TRY(parse_table(&parts->embeddings->array.items[i], source, i, manifest, error));
  return STI_OK;
}

static void check_whole(Fields *fields, Arena *arena, const Manifest *manifest) {
  check_names(fields, arena, manifest);
  for (int32_t i = 1; i < manifest->region_count; i++)
    if (manifest->regions[i].fidelity <= manifest->regions[i - 1].fidelity)
      fields_problem(fields, "regions must be in ascending order of fidelity, one each");
  int64_t room = data_file_bytes(manifest, resident_file);
  for (int32_t i = 0; i < manifest->resident_count; i++) {
    const TensorEntry *tensor = &manifest->resident[i];
    int64_t end;
    if (__builtin_add_overflow(tensor->offset, tensor->length, &end) || end > room)
      fields_problem(fields, "resident tensor %s lies outside %s", tensor->name, resident_file);
  }
}

/* Exact: no other spelling is canonical. */
static const StoredFormat stored = {"Manifest", "stifarm-bundle", 1, true, STI_FORMAT};

StiCode manifest_parse(Arena *arena, const char *data, size_t length, const char *source, Manifest *manifest,
                       StiError *error) {
  JsonValue *value;
  bool canonical;
  STI_TRY(record_parse(arena, data, length, MANIFEST_CAP_BYTES, source, "Manifest", &value, &canonical, error));
  *manifest = (Manifest){0};
  Fields fields;
  Parts parts;
  fields_begin_stored(&fields, value, &stored, source, "", error);
  parts.embeddings = field_array(&fields, "embeddings", 0, INT32_MAX);
  parts.files = field_array(&fields, "files", 0, INT32_MAX);
  const JsonValue *model = field_value(&fields, "model");
  field_copy_digest(&fields, "model_digest", manifest->model_digest);
  const JsonValue *quantizer = field_value(&fields, "quantizer");
  parts.regions = field_array(&fields, "regions", 1, INT32_MAX);
  parts.resident = field_array(&fields, "resident", 0, INT32_MAX);
  parts.submodels = field_array(&fields, "submodels", 1, INT32_MAX);
  manifest->untrained = field_bool(&fields, "untrained");
  STI_TRY(fields_end(&fields));
  STI_TRY(model_parse(model, source, "model", &manifest->model, error));
  STI_TRY(parse_quantizer(quantizer, source, error));
  if ((int64_t)manifest->model.layers * manifest->model.heads > MANIFEST_CAP_BYTES)
    fields_problem(&fields, "its model has more shards than a manifest can hold");
  STI_TRY(fields.code);
  STI_TRY(parse_parts(arena, &parts, source, manifest, error));
  check_whole(&fields, arena, manifest);
  STI_TRY(fields.code);
  if (!canonical)
    return sti_fail(error, STI_FORMAT, "Delete the folder, then build or deploy the bundle again.",
                    "%s: is not in canonical form.", source);
  sha256_hex(data, length, manifest->digest);
  return STI_OK;
}

/* ------------------------------------------------------------------ looking up */

const Region *manifest_region(const Manifest *manifest, int fidelity) {
  for (int32_t i = 0; i < manifest->region_count; i++)
    if (manifest->regions[i].fidelity == fidelity) return &manifest->regions[i];
  return NULL;
}

const Version *manifest_version(const Manifest *manifest, int layer, int slice, int fidelity) {
  const Region *region = manifest_region(manifest, fidelity);
  const ModelConfig *model = &manifest->model;
  if (region == NULL || layer < 0 || layer >= model->layers || slice < 0 || slice >= model->heads) return NULL;
  return &region->versions[(size_t)layer * (size_t)model->heads + (size_t)slice];
}

const TensorEntry *manifest_tensor(const Manifest *manifest, const char *name) {
  for (int32_t i = 0; i < manifest->resident_count; i++)
    if (strcmp(manifest->resident[i].name, name) == 0) return &manifest->resident[i];
  return NULL;
}

int64_t manifest_file_bytes(const Manifest *manifest, const char *file) {
  for (int32_t i = 0; i < manifest->region_count; i++) {
    if (strcmp(manifest->regions[i].file, file) != 0) continue;
    const Version *last = &manifest->regions[i].versions[manifest->model.layers * manifest->model.heads - 1];
    return last->offset + last->length;
  }
  return data_file_bytes(manifest, file);
}
