/* task_data.h: tokenized rows out of a task-data file (sti_runtime/task_data.py), read where they are asked for.
 *
 * The file is safetensors: a header, then int32 tensors input_ids and token_types [R, L], lengths and labels [R].
 * Opening checks the whole header against the file; values are checked when their row is read, so that a request costs
 * one row of memory and not the file.
 */
#ifndef AGENT_TASK_DATA_H
#define AGENT_TASK_DATA_H

#include "../../sti_runtime/native/base.h"

enum { UNKNOWN_LABEL = -1, TASK_HEADER_CAP_BYTES = 1 << 20 };

typedef struct {
  int fd;
  char *path;
  int64_t rows;        /* R */
  int32_t tokens;      /* L */
  int32_t label_count;
  int64_t input_ids, token_types, lengths, labels; /* offsets in the file */
} TaskData;

/* Errors: STI_FORMAT naming the file and the cause, STI_RESOURCE. */
StiCode task_data_open(const char *path, TaskData *data, StiError *error);
void task_data_close(TaskData *data); /* a zeroed one is allowed */

/* One row below `rows`: ids and types [L], its length. Errors: STI_FORMAT. */
StiCode task_data_row(const TaskData *data, int64_t row, int32_t *input_ids, int32_t *token_types, int32_t *length,
                      StiError *error);
/* All labels [R]. Errors: STI_FORMAT. */
StiCode task_data_labels(const TaskData *data, int32_t *labels, StiError *error);

#endif
