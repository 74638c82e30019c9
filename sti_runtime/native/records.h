/* records.h: what the parsers of the stored formats share (sti_runtime/records.py). */
#ifndef STI_RECORDS_H
#define STI_RECORDS_H

#include "formats.h"

#include <stdio.h>

enum {
  RECORD_MOST_BYTES = 16 << 20, /* of a file of ours, unless it says otherwise */
  MATRIX_MOST = 1 << 24,        /* rows or columns of a matrix: sizes in bytes then fit int64 */
  PATH_ROOM = 200,
};
#define INT_MOST INT64_MAX

/* Zeroed; NULL when memory is short or the size overflows. */
static inline void *new_array(Arena *arena, size_t count, size_t item_bytes) {
  size_t bytes;
  return __builtin_mul_overflow(count, item_bytes, &bytes) ? NULL : arena_alloc(arena, bytes);
}

/* "units.3" + "plan" → "units.3.plan" */
const char *join_path(char room[PATH_ROOM], const char *path, const char *name);

/* The whole of a file of at most `cap_bytes`. */
StiCode record_parse(Arena *arena, const char *data, size_t length, size_t cap_bytes, const char *source,
                     const char *what, JsonValue **value, bool *canonical, StiError *error);

/* Lists of a field; on failure *items is NULL and the problem is kept (memory: STI_RESOURCE). */
void field_ints(Fields *fields, Arena *arena, const char *name, size_t least_items, int64_t least, int64_t most,
                int64_t **items, int32_t *count);
void field_small_ints(Fields *fields, Arena *arena, const char *name, size_t least_items, int32_t least,
                      int32_t most, int32_t **items, int32_t *count);
void field_texts(Fields *fields, Arena *arena, const char *name, const char ***items, int32_t *count);
void fields_out_of_memory(Fields *fields);
void field_copy_digest(Fields *fields, const char *name, char digest[65]); /* "" after a problem */
void field_copy_digest_or_null(Fields *fields, const char *name, char digest[65]); /* "" for null */
int32_t field_fidelity(Fields *fields, const char *name);

void text_digest(Text *text, char hex[65]); /* "" when memory was short; frees the text */

StiCode model_parse(const JsonValue *value, const char *source, const char *path, ModelConfig *model, StiError *error);
StiCode submodel_parse(Arena *arena, const JsonValue *value, const char *source, const char *path, Submodel *submodel,
                       StiError *error);
void submodel_write(Text *out, const Submodel *submodel);

#endif
