/* input.h: a verb's standard input: taken in blocks as it comes, and ended where a link is gone without a word. */
#ifndef AGENT_INPUT_H
#define AGENT_INPUT_H

#include "../../sti_runtime/native/base.h"

/* A stream that cannot be sought. */
typedef struct {
  int fd;
  char *block; /* [COPY_BYTES] */
  size_t start, end;
} Input;

StiCode input_open(Arena *arena, int fd, Input *input, StiError *error); /* errors: STI_RESOURCE */
/* The next bytes there are, at most `limit`, good until the next call; length 0 at the end: of the stream, of patience,
 * at a signal, or where the link broke. */
const char *input_piece(Input *input, int64_t limit, size_t *length);
/* The first line, at most the cap; *length counts its newline, 0 if there is none. Errors: STI_RESOURCE. */
StiCode input_line(Arena *arena, Input *input, size_t cap_bytes, char **line, size_t *length, StiError *error);

#endif
