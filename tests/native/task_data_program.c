/* task_data_program.c: a task-data file as the agent reads it, for test_task_data.py: all of it, or why not. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../agent/native/task_data.h"
#include "../../sti_runtime/native/json.h"

static void write_values(Text *out, const char *key, const int32_t *values, int64_t count) {
  json_key(out, key);
  json_open(out, '[');
  for (int64_t i = 0; i < count; i++) json_int(out, values[i]);
  json_close(out, ']');
}

static StiCode print_rows(const TaskData *data, int32_t *ids, int32_t *types, int32_t *labels, Text *out, StiError *error) {
  STI_TRY(task_data_labels(data, labels, error));
  json_open(out, '{');
  write_values(out, "labels", labels, data->rows);
  json_key(out, "rows");
  json_open(out, '[');
  for (int64_t row = 0; row < data->rows; row++) {
    int32_t length;
    STI_TRY(task_data_row(data, row, ids, types, &length, error));
    json_open(out, '{');
    write_values(out, "ids", ids, data->tokens);
    write_values(out, "length", &length, 1);
    write_values(out, "types", types, data->tokens);
    json_close(out, '}');
  }
  json_close(out, ']');
  json_close(out, '}');
  return STI_OK;
}

int main(int argc, char **argv) {
  StiError error;
  TaskData data;
  Text out = {0};
  StiCode code = task_data_open(argc > 1 ? argv[1] : "", &data, &error);
  if (code == STI_OK) {
    int32_t *values = calloc((size_t)(2 * data.tokens + data.rows), sizeof *values);
    code = print_rows(&data, values, values + data.tokens, values + 2 * data.tokens, &out, &error);
    task_data_close(&data);
    free(values);
  }
  printf("%s\n", code == STI_OK ? out.data : error.what);
  text_free(&out);
  return code == STI_OK ? 0 : (int)code;
}
