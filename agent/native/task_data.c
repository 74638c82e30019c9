/* task_data.c: see task_data.h. */
#include "task_data.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"

enum { TENSORS = 4, LARGEST_TYPE = 255 };
static const char *const tensor_names[TENSORS] = {"input_ids", "token_types", "lengths", "labels"};
static const char *const again = "It is damaged or not task data; make it again.";

typedef struct {
  int rank;
  int64_t shape[2], begin, end; /* offsets from the end of the header */
} Tensor;

/* ------------------------------------------------------------------ header */

static StiCode read_at(int fd, const char *path, int64_t offset, void *data, size_t bytes, StiError *error) {
  for (size_t done = 0; done < bytes;) {
    ssize_t got = pread(fd, (char *)data + done, bytes - done, offset + (int64_t)done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return sti_fail_errno(error, STI_FORMAT, errno, again, "%s: cannot be read", path);
    if (got == 0) return sti_fail(error, STI_FORMAT, again, "%s: ends before its header says it does.", path);
    done += (size_t)got;
  }
  return STI_OK;
}

/* {"data_offsets": [begin, end], "dtype": "I32", "shape": […]} */
static StiCode parse_tensor(const JsonValue *value, const char *path, const char *name, int64_t data_bytes, Tensor *tensor,
                            StiError *error) {
  static const char *const types[] = {"I32", NULL};
  Fields fields;
  fields_begin(&fields, value, path, "tensor of task data", name, error);
  const JsonValue *offsets = field_array(&fields, "data_offsets", 2, 2);
  field_choice(&fields, "dtype", types);
  const JsonValue *shape = field_array(&fields, "shape", 1, 2);
  STI_TRY(fields_end(&fields));
  int64_t elements = 1, room = data_bytes / 4; /* elements the file has room for: 4 · elements cannot overflow */
  tensor->rank = (int)shape->array.count;
  for (int i = 0; i < tensor->rank; i++) {
    const JsonValue *side = &shape->array.items[i];
    if (side->kind != JSON_INT || side->integer < 1 || side->integer > INT32_MAX || side->integer > room / elements)
      return sti_fail(error, STI_FORMAT, again, "%s: %s has a shape that does not fit the file.", path, name);
    tensor->shape[i] = side->integer;
    elements *= side->integer;
  }
  const JsonValue *bounds = offsets->array.items;
  if (bounds[0].kind != JSON_INT || bounds[1].kind != JSON_INT || bounds[0].integer < 0 ||
      bounds[1].integer > data_bytes || bounds[0].integer > bounds[1].integer ||
      bounds[1].integer - bounds[0].integer != 4 * elements)
    return sti_fail(error, STI_FORMAT, again, "%s: the offsets of %s do not fit its shape and the file.", path, name);
  tensor->begin = bounds[0].integer;
  tensor->end = bounds[1].integer;
  return STI_OK;
}

/* Tensors lie one after the other without holes, from the header's end to the file's. */
static bool without_holes(const Tensor tensors[TENSORS], int64_t data_bytes) {
  int64_t at = 0;
  for (int i = 0; i < TENSORS; i++) {
    int next = 0;
    while (next < TENSORS && tensors[next].begin != at) next++;
    if (next == TENSORS) return false;
    at = tensors[next].end; /* no tensor is empty, so none can be found twice */
  }
  return at == data_bytes;
}

/* The metadata's one key holds the JSON of a TaskDataInfo. */
static StiCode parse_info(Arena *arena, const JsonValue *metadata, const char *path, TaskData *data, StiError *error) {
  static const StoredFormat stored = {"TaskDataInfo", "stifarm-task-data", 1, false, STI_FORMAT};
  const JsonValue *text = NULL;
  if (metadata != NULL && metadata->kind == JSON_OBJECT)
    for (size_t i = 0; i < metadata->object.count; i++)
      if (strcmp(metadata->object.members[i].key, "stifarm") == 0) text = metadata->object.members[i].value;
  if (text == NULL || text->kind != JSON_STRING)
    return sti_fail(error, STI_FORMAT, again, "%s: does not say what it holds; it is not task data.", path);
  JsonValue *info;
  STI_TRY(json_parse(arena, text->text.data, text->text.length, path, &info, error));
  Fields fields;
  fields_begin_stored(&fields, info, &stored, path, "", error);
  const JsonValue *labels = field_array(&fields, "labels", 2, INT32_MAX);
  field_text(&fields, "split", 0, SIZE_MAX);
  field_text(&fields, "task", 0, SIZE_MAX);
  if (!field_is_null(&fields, "tokenizer")) field_digest(&fields, "tokenizer");
  STI_TRY(fields_end(&fields));
  for (size_t i = 0; i < labels->array.count; i++)
    if (labels->array.items[i].kind != JSON_STRING)
      return sti_fail(error, STI_FORMAT, again, "%s: label %zu is not a text.", path, i);
  data->label_count = (int32_t)labels->array.count;
  return STI_OK;
}

static StiCode check_shapes(const Tensor tensors[TENSORS], TaskData *data, StiError *error) {
  if (tensors[0].rank != 2)
    return sti_fail(error, STI_FORMAT, again, "%s: input_ids has %d dimensions, not 2.", data->path, tensors[0].rank);
  data->rows = tensors[0].shape[0];
  data->tokens = (int32_t)tensors[0].shape[1];
  for (int i = 1; i < TENSORS; i++) {
    bool matrix = i == 1, fits = tensors[i].rank == (matrix ? 2 : 1) && tensors[i].shape[0] == data->rows;
    if (!fits || (matrix && tensors[i].shape[1] != data->tokens))
      return sti_fail(error, STI_FORMAT, again, "%s: the shape of %s does not fit that of input_ids [%" PRId64 ", %d].",
                      data->path, tensor_names[i], data->rows, data->tokens);
  }
  return STI_OK;
}

static StiCode parse_header(Arena *arena, char *header, size_t length, int64_t file_bytes, TaskData *data,
                            StiError *error) {
  JsonValue *root;
  Tensor tensors[TENSORS] = {0};
  unsigned seen = 0;
  const JsonValue *metadata = NULL;
  int64_t data_offset = 8 + (int64_t)length, data_bytes = file_bytes - data_offset;
  STI_TRY(json_parse(arena, header, length, data->path, &root, error));
  if (root->kind != JSON_OBJECT) return sti_fail(error, STI_FORMAT, again, "%s: the header is no object.", data->path);
  for (size_t i = 0; i < root->object.count; i++) {
    const JsonMember *member = &root->object.members[i];
    int tensor = 0;
    while (tensor < TENSORS && strcmp(member->key, tensor_names[tensor]) != 0) tensor++;
    if (tensor < TENSORS) {
      STI_TRY(parse_tensor(member->value, data->path, member->key, data_bytes, &tensors[tensor], error));
      seen |= 1u << tensor;
    } else if (strcmp(member->key, "__metadata__") == 0) {
      metadata = member->value;
    } else {
      return sti_fail(error, STI_FORMAT, again, "%s: holds a tensor %.80s, not task data.", data->path, member->key);
    }
  }
  for (int i = 0; i < TENSORS; i++)
    if (!(seen & (1u << i)))
      return sti_fail(error, STI_FORMAT, again, "%s: holds no tensor %s; it is not task data.", data->path, tensor_names[i]);
  if (!without_holes(tensors, data_bytes))
    return sti_fail(error, STI_FORMAT, again, "%s: the tensors do not fill the file without holes.", data->path);
  STI_TRY(check_shapes(tensors, data, error));
  data->input_ids = data_offset + tensors[0].begin;
  data->token_types = data_offset + tensors[1].begin;
  data->lengths = data_offset + tensors[2].begin;
  data->labels = data_offset + tensors[3].begin;
  return parse_info(arena, metadata, data->path, data, error);
}

static StiCode read_header(Arena *arena, TaskData *data, StiError *error) {
  struct stat status;
  uint8_t prefix[8];
  uint64_t length = 0;
  if (fstat(data->fd, &status) != 0)
    return sti_fail_errno(error, STI_FORMAT, errno, again, "%s: cannot be read", data->path);
  STI_TRY(read_at(data->fd, data->path, 0, prefix, sizeof prefix, error));
  for (int i = 7; i >= 0; i--) length = length << 8 | prefix[i];
  if (length > TASK_HEADER_CAP_BYTES || (int64_t)length > (int64_t)status.st_size - 8)
    return sti_fail(error, STI_FORMAT, again, "%s: its header of %" PRIu64 " bytes is longer than a header can be.",
                    data->path, length);
  char *header = arena_alloc(arena, (size_t)length + 1);
  if (header == NULL) return sti_out_of_memory(error);
  STI_TRY(read_at(data->fd, data->path, 8, header, (size_t)length, error));
  return parse_header(arena, header, (size_t)length, status.st_size, data, error);
}

StiCode task_data_open(const char *path, TaskData *data, StiError *error) {
  *data = (TaskData){.fd = -1};
  data->path = strdup(path);
  if (data->path == NULL) return sti_out_of_memory(error);
  data->fd = open(path, O_RDONLY | O_CLOEXEC);
  StiCode code = data->fd < 0 ? sti_fail_errno(error, STI_FORMAT, errno, again, "%s: cannot be read", path) : STI_OK;
  Arena arena = {0};
  if (code == STI_OK) code = read_header(&arena, data, error);
  arena_free(&arena);
  if (code != STI_OK) task_data_close(data);
  return code;
}

void task_data_close(TaskData *data) {
  if (data->path != NULL && data->fd >= 0) close(data->fd);
  free(data->path);
  *data = (TaskData){.fd = -1};
}

/* ------------------------------------------------------------------ values */

static StiCode read_values(const TaskData *data, const char *name, int64_t offset, int32_t *values, int64_t count,
                           int32_t low, int32_t high, StiError *error) {
  STI_TRY(read_at(data->fd, data->path, offset, values, (size_t)count * sizeof *values, error));
  for (int64_t i = 0; i < count; i++)
    if (values[i] < low || values[i] > high)
      return sti_fail(error, STI_FORMAT, again, "%s: Task data: %s has values outside %d to %d.", data->path, name, low, high);
  return STI_OK;
}

StiCode task_data_row(const TaskData *data, int64_t row, int32_t *input_ids, int32_t *token_types, int32_t *length,
                      StiError *error) {
  int64_t at = row * data->tokens * 4;
  STI_TRY(read_values(data, "input_ids", data->input_ids + at, input_ids, data->tokens, 0, INT32_MAX, error));
  STI_TRY(read_values(data, "token_types", data->token_types + at, token_types, data->tokens, 0, LARGEST_TYPE, error));
  return read_values(data, "lengths", data->lengths + 4 * row, length, 1, 1, data->tokens, error);
}

StiCode task_data_labels(const TaskData *data, int32_t *labels, StiError *error) {
  return read_values(data, "labels", data->labels, labels, data->rows, UNKNOWN_LABEL, data->label_count - 1, error);
}
