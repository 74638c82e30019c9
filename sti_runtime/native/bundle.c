/* bundle.c: opening a bundle: its manifest must agree with the model it describes and with the files beside it
 * (sti_runtime/bundle.py). */
#include "records.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char make_again[] = "Delete the folder, then build or deploy the bundle again.";

/* ------------------------------------------------------------------ what its model needs */

typedef struct {
  Arena *arena;
  const Manifest *manifest;
  const char *source;
  const TensorEntry **sorted; /* [resident_count] by name */
  int32_t found;              /* tensors of the model so far */
  StiError *error;
} Check;

static StiCode check_version(const Check *check, const Region *region, const Version *version) {
  const ModelConfig *model = &check->manifest->model;
  for (int i = 0; i < STI_MATRICES; i++) {
    int32_t out, in;
    matrix_shape(model, i, &out, &in);
    if (version->outliers[i] > (int64_t)out * in || (region->fidelity == 32 && version->outliers[i] != 0))
      return sti_fail(check->error, STI_FORMAT, make_again, "%s: %s at %lld: its outlier counts do not fit this model.",
                      check->source, region->file, (long long)version->offset);
  }
  PayloadLayout layout;
  payload_layout(model, region->fidelity, version->outliers, &layout);
  if (version->payload_bytes == layout.payload_bytes) return STI_OK;
  return sti_fail(check->error, STI_FORMAT, make_again,
                  "%s: %s at %lld: a payload of %lld bytes, not the %lld of this model.", check->source, region->file,
                  (long long)version->offset, (long long)version->payload_bytes, (long long)layout.payload_bytes);
}

static int compare_tensors(const void *left, const void *right) {
  return strcmp((*(const TensorEntry *const *)left)->name, (*(const TensorEntry *const *)right)->name);
}

static int compare_name(const void *name, const void *tensor) {
  return strcmp(name, (*(const TensorEntry *const *)tensor)->name);
}

/* A tensor of the model: [rows], or [rows, columns] where columns is not 0. */
static StiCode check_tensor(Check *check, const char *name, int64_t rows, int64_t columns) {
  const TensorEntry **entry = bsearch(name, check->sorted, (size_t)check->manifest->resident_count,
                                      sizeof *check->sorted, compare_name);
  const TensorEntry *tensor = entry == NULL ? NULL : *entry;
  if (tensor == NULL || tensor->rank != (columns == 0 ? 1 : 2) || tensor->shape[0] != rows ||
      (columns != 0 && tensor->shape[1] != columns))
    return sti_fail(check->error, STI_FORMAT, make_again, "%s: its resident tensors are not those of this model: %s.",
                    check->source, name);
  check->found++;
  bool packable = strcmp(name, "head.pooler.weight") == 0 || strcmp(name, "head.classifier.weight") == 0;
  if (tensor->gobo6 && !packable)
    return sti_fail(check->error, STI_FORMAT, make_again, "%s: %s may not be stored at 6 bits.", check->source, name);
  int64_t elements = rows * (columns == 0 ? 1 : columns), bytes = (int64_t)sizeof(float) * elements;
  if (tensor->gobo6 && tensor->outliers <= elements) {
    PayloadLayout layout;
    matrices_layout(1, &tensor->shape, 6, &tensor->outliers, &layout);
    bytes = layout.payload_bytes;
  }
  if (tensor->length == bytes && tensor->outliers <= (tensor->gobo6 ? elements : 0)) return STI_OK;
  return sti_fail(check->error, STI_FORMAT, make_again, "%s: %s does not have the length of its shape.", check->source,
                  name);
}

/* `name`.weight and `name`.bias; a norm's weight is [rows]. */
static StiCode check_pair(Check *check, const char *name, int64_t rows, int64_t columns) {
  char whole[100];
  snprintf(whole, sizeof whole, "%s.weight", name);
  STI_TRY(check_tensor(check, whole, rows, columns));
  snprintf(whole, sizeof whole, "%s.bias", name);
  return check_tensor(check, whole, rows, 0);
}

static StiCode check_layer(Check *check, int32_t layer) {
  static const char *const biases[] = {"attention.q", "attention.k", "attention.v", "attention.o", "ffn.in", "ffn.out"};
  const ModelConfig *model = &check->manifest->model;
  char name[100];
  for (int i = 0; i < STI_MATRICES; i++) {
    snprintf(name, sizeof name, "layers.%d.%s.bias", layer, biases[i]);
    STI_TRY(check_tensor(check, name, i == 4 ? model->ffn : model->hidden, 0));
  }
  snprintf(name, sizeof name, "layers.%d.attention.norm", layer);
  STI_TRY(check_pair(check, name, model->hidden, 0));
  snprintf(name, sizeof name, "layers.%d.ffn.norm", layer);
  return check_pair(check, name, model->hidden, 0);
}

static StiCode check_resident(Check *check) {
  const Manifest *manifest = check->manifest;
  const ModelConfig *model = &manifest->model;
  check->sorted = new_array(check->arena, (size_t)manifest->resident_count, sizeof *check->sorted);
  if (check->sorted == NULL) return sti_out_of_memory(check->error);
  for (int32_t i = 0; i < manifest->resident_count; i++) check->sorted[i] = &manifest->resident[i];
  qsort(check->sorted, (size_t)manifest->resident_count, sizeof *check->sorted, compare_tensors);
  STI_TRY(check_pair(check, "embeddings.norm", model->hidden, 0));
  for (int32_t layer = 0; layer < model->layers; layer++) STI_TRY(check_layer(check, layer));
  if (model->has_head && model->head_activation != HEAD_NONE)
    STI_TRY(check_pair(check, "head.pooler", model->hidden, model->hidden));
  if (model->has_head) STI_TRY(check_pair(check, "head.classifier", model->labels, model->hidden));
  if (check->found == manifest->resident_count) return STI_OK;
  return sti_fail(check->error, STI_FORMAT, make_again, "%s: its resident tensors are not those of this model.",
                  check->source);
}

static bool has_data_files(const Manifest *manifest) {
  if (manifest->file_count != 2) return false;
  const char *first = manifest->files[0].file, *second = manifest->files[1].file; /* never the same */
  return (strcmp(first, "resident.bin") == 0 || strcmp(second, "resident.bin") == 0) &&
         (strcmp(first, "embeddings.bin") == 0 || strcmp(second, "embeddings.bin") == 0);
}

StiCode manifest_check(Arena *arena, const Manifest *manifest, const char *source, StiError *error) {
  Check check = {.arena = arena, .manifest = manifest, .source = source, .error = error};
  const ModelConfig *model = &manifest->model;
  for (int32_t i = 0; i < manifest->region_count; i++)
    for (int32_t shard = 0; shard < model->layers * model->heads; shard++)
      STI_TRY(check_version(&check, &manifest->regions[i], &manifest->regions[i].versions[shard]));
  if (!has_data_files(manifest))
    return sti_fail(error, STI_FORMAT, make_again, "%s: its data files must be resident.bin and embeddings.bin.",
                    source);
  STI_TRY(check_resident(&check));
  if (manifest->word.rows != model->vocab || manifest->position.rows != model->positions ||
      manifest->token_type.rows != model->token_types || manifest->embedding_count != (model->token_types == 0 ? 2 : 3))
    return sti_fail(error, STI_FORMAT, make_again, "%s: its embedding tables are not those of this model.", source);
  return STI_OK;
}

/* ------------------------------------------------------------------ opening */

/* A plain file of exactly `bytes`: not a link, which could lead out of the bundle. */
static StiCode check_file(const char *folder, const char *file, int64_t bytes, StiError *error) {
  char path[4096];
  struct stat status;
  snprintf(path, sizeof path, "%s/%s", folder, file);
  if (lstat(path, &status) != 0)
    return sti_fail_errno(error, STI_FORMAT, errno, make_again, "%s: is missing", path);
  if (!S_ISREG(status.st_mode)) return sti_fail(error, STI_FORMAT, make_again, "%s: is not a plain file.", path);
  if (status.st_size == bytes) return STI_OK;
  return sti_fail(error, STI_FORMAT, make_again, "%s: has %lld bytes, its manifest says %lld.", path,
                  (long long)status.st_size, (long long)bytes);
}

/* The last part of a path, without a slash behind it, if it is a digest; else NULL. */
static const char *digest_of_folder(const char *folder, char digest[65]) {
  size_t end = strlen(folder);
  while (end > 0 && folder[end - 1] == '/') end--;
  if (end < 64 || (end > 64 && folder[end - 65] != '/')) return NULL;
  memcpy(digest, folder + end - 64, 64);
  digest[64] = '\0';
  return is_digest(digest) ? digest : NULL;
}

StiCode bundle_open(Arena *arena, const char *folder, const char *digest, Manifest *manifest, StiError *error) {
  char path[4096], named[65];
  const char *data;
  size_t length;
  if (strlen(folder) > sizeof path - 100)
    return sti_fail(error, STI_FORMAT, "Put the bundle where its path is shorter.", "%s: the path is too long.",
                    folder);
  snprintf(path, sizeof path, "%s/manifest.json", folder);
  if (read_file(arena, path, MANIFEST_CAP_BYTES, &data, &length, error) != STI_OK) {
    if (error->code == STI_FORMAT && error->remedy[0] == '\0')
      snprintf(error->remedy, sizeof error->remedy,
               "Give the folder of a bundle, as bundle build prints it; if it is one, make it again.");
    return error->code;
  }
  STI_TRY(manifest_parse(arena, data, length, path, manifest, error));
  if (digest == NULL) digest = digest_of_folder(folder, named);
  if (digest != NULL && strcmp(digest, manifest->digest) != 0)
    return sti_fail(error, STI_DIGEST, make_again, "%s: its SHA-256 is %s, not the %s it is named after.", path,
                    manifest->digest, digest);
  STI_TRY(manifest_check(arena, manifest, path, error));
  for (int32_t i = 0; i < manifest->region_count; i++) {
    const char *file = manifest->regions[i].file;
    STI_TRY(check_file(folder, file, manifest_file_bytes(manifest, file), error));
  }
  for (int32_t i = 0; i < manifest->file_count; i++)
    STI_TRY(check_file(folder, manifest->files[i].file, manifest->files[i].bytes, error));
  return STI_OK;
}
