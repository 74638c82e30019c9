/* records.c: what the parsers of the stored formats share, and the model's configuration. */
#include "records.h"

#include <string.h>

/* ------------------------------------------------------------------ files and lists */

const char *join_path(char room[PATH_ROOM], const char *path, const char *name) {
  snprintf(room, PATH_ROOM, "%s%s%s", path, path[0] == '\0' ? "" : ".", name);
  return room;
}

StiCode record_parse(Arena *arena, const char *data, size_t length, size_t cap_bytes, const char *source,
                     const char *what, JsonValue **value, bool *canonical, StiError *error) {
  if (length > cap_bytes)
    return sti_fail(error, STI_FORMAT, "It is damaged or not one of ours; make it again.",
                    "%s: %zu bytes, more than the %zu a %s may have.", source, length, cap_bytes, what);
  return json_parse_noting(arena, data, length, source, value, canonical, error);
}

void fields_out_of_memory(Fields *fields) {
  if (fields->code == STI_OK) fields->code = sti_out_of_memory(fields->error);
}

void field_ints(Fields *fields, Arena *arena, const char *name, size_t least_items, int64_t least, int64_t most,
                int64_t **items, int32_t *count) {
  const JsonValue *array = field_array(fields, name, least_items, INT32_MAX);
  *count = (int32_t)array->array.count;
  *items = new_array(arena, array->array.count, sizeof **items);
  if (*items == NULL) fields_out_of_memory(fields);
  for (size_t i = 0; fields->code == STI_OK && i < array->array.count; i++)
    (*items)[i] = field_item_int(fields, name, array, i, least, most);
}

void field_small_ints(Fields *fields, Arena *arena, const char *name, size_t least_items, int32_t least,
                      int32_t most, int32_t **items, int32_t *count) {
  const JsonValue *array = field_array(fields, name, least_items, INT32_MAX);
  *count = (int32_t)array->array.count;
  *items = new_array(arena, array->array.count, sizeof **items);
  if (*items == NULL) fields_out_of_memory(fields);
  for (size_t i = 0; fields->code == STI_OK && i < array->array.count; i++)
    (*items)[i] = (int32_t)field_item_int(fields, name, array, i, least, most);
}

void field_texts(Fields *fields, Arena *arena, const char *name, const char ***items, int32_t *count) {
  const JsonValue *array = field_array(fields, name, 0, INT32_MAX);
  *count = (int32_t)array->array.count;
  *items = new_array(arena, array->array.count, sizeof **items);
  if (*items == NULL) fields_out_of_memory(fields);
  for (size_t i = 0; fields->code == STI_OK && i < array->array.count; i++)
    (*items)[i] = field_item_text(fields, name, array, i);
}

void field_copy_digest(Fields *fields, const char *name, char digest[65]) {
  const char *text = field_digest(fields, name);
  memcpy(digest, text, strlen(text) + 1);
}

void field_copy_digest_or_null(Fields *fields, const char *name, char digest[65]) {
  digest[0] = '\0';
  if (!field_is_null(fields, name)) field_copy_digest(fields, name, digest);
}

int32_t field_fidelity(Fields *fields, const char *name) {
  return (int32_t)field_literal(fields, name, sti_fidelities, STI_FIDELITIES);
}

/* ------------------------------------------------------------------ digests */

void text_digest(Text *text, char hex[65]) {
  hex[0] = '\0';
  if (!text->failed) sha256_hex(text->data, text->length, hex);
  text_free(text);
}

/* ------------------------------------------------------------------ model */

static void parse_head(const JsonValue *value, const char *source, const char *path, ModelConfig *model,
                       Fields *outer) {
  static const char *const activations[] = {"none", "tanh", "relu", NULL};
  char place[PATH_ROOM];
  Fields fields;
  fields_begin(&fields, value, source, outer->what, join_path(place, path, "head"), outer->error);
  model->has_head = true;
  model->head_activation = (HeadActivation)field_choice(&fields, "activation", activations);
  const JsonValue *labels = field_array(&fields, "labels", 2, 4096);
  model->labels = (int32_t)labels->array.count;
  for (size_t i = 0; i < labels->array.count; i++) field_item_text(&fields, "labels", labels, i);
  model->pooling = (Pooling)field_choice(&fields, "pooling", (const char *const[]){"cls", "mean", NULL});
  outer->code = fields_end(&fields);
}

StiCode model_parse(const JsonValue *value, const char *source, const char *path, ModelConfig *model, StiError *error) {
  static const char *const activations[] = {"gelu", "gelu_tanh", "relu", NULL};
  static const char *const families[] = {"bert", "distilbert", "roberta", NULL};
  Fields fields;
  fields_begin(&fields, value, source, "Manifest", path, error);
  memset(model, 0, sizeof *model);
  model->activation = (Activation)field_choice(&fields, "activation", activations);
  model->family = field_choice(&fields, "family", families);
  model->ffn = (int32_t)field_int(&fields, "ffn", 1, MATRIX_MOST);
  if (!field_is_null(&fields, "head")) {
    const JsonValue *head = field_value(&fields, "head");
    if (head != NULL) parse_head(head, source, path, model, &fields);
  }
  model->heads = (int32_t)field_int(&fields, "heads", 1, INT32_MAX);
  model->hidden = (int32_t)field_int(&fields, "hidden", 1, MATRIX_MOST);
  model->layer_norm_eps = field_number(&fields, "layer_norm_eps");
  if (!(model->layer_norm_eps > 0 && model->layer_norm_eps < 1))
    fields_problem(&fields, "layer_norm_eps should be between 0 and 1");
  model->layers = (int32_t)field_int(&fields, "layers", 1, INT32_MAX);
  model->pad_id = field_int(&fields, "pad_id", 0, INT_MOST);
  model->position_offset = field_int(&fields, "position_offset", 0, INT_MOST);
  model->positions = field_int(&fields, "positions", 1, INT_MOST);
  model->token_types = field_int(&fields, "token_types", 0, INT_MOST);
  model->vocab = field_int(&fields, "vocab", 1, INT_MOST);
  if (fields.code == STI_OK && (model->hidden % model->heads != 0 || model->ffn % model->heads != 0))
    fields_problem(&fields, "hidden (%d) and ffn (%d) must be multiples of heads (%d)", model->hidden, model->ffn,
                   model->heads);
  return fields_end(&fields);
}

StiCode submodel_parse(Arena *arena, const JsonValue *value, const char *source, const char *path, Submodel *submodel,
                       StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Submodel", path, error);
  field_small_ints(&fields, arena, "kept", 1, 0, INT32_MAX, &submodel->kept, &submodel->depth);
  submodel->width = (int32_t)field_int(&fields, "width", 1, INT32_MAX);
  return fields_end(&fields);
}

void submodel_write(Text *out, const Submodel *submodel) {
  json_open(out, '{');
  json_key(out, "kept");
  json_open(out, '[');
  for (int32_t i = 0; i < submodel->depth; i++) json_int(out, submodel->kept[i]);
  json_close(out, ']');
  json_int_field(out, "width", submodel->width);
  json_close(out, '}');
}
