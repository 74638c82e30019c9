/* input.c: see input.h. */
#include "input.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "incoming.h"
#include "signals.h"

enum { INPUT_WAIT_S = 30 }; /* input that is silent for longer has ended */

StiCode input_open(Arena *arena, int fd, Input *input, StiError *error) {
  *input = (Input){.fd = fd, .block = arena_alloc(arena, COPY_BYTES)};
  return input->block == NULL ? sti_out_of_memory(error) : STI_OK;
}

/* What there is, once there is some; 0 at the end. */
static size_t fill(Input *input) {
  for (int waited_s = 0; waited_s < INPUT_WAIT_S && !stop_requested();) {
    struct pollfd ready = {.fd = input->fd, .events = POLLIN};
    int found = poll(&ready, 1, 1000);
    waited_s += found == 0;
    if (found <= 0) continue;
    ssize_t got = read(input->fd, input->block, COPY_BYTES);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    return got < 0 ? 0 : (size_t)got;
  }
  return 0;
}

const char *input_piece(Input *input, int64_t limit, size_t *length) {
  if (input->start == input->end) {
    input->start = 0;
    input->end = fill(input);
  }
  size_t left = input->end - input->start;
  const char *piece = input->block + input->start;
  *length = (int64_t)left < limit ? left : (size_t)limit;
  input->start += *length;
  return piece;
}

StiCode input_line(Arena *arena, Input *input, size_t cap_bytes, char **line, size_t *length, StiError *error) {
  size_t done = 0, got = 1;
  *line = arena_alloc(arena, cap_bytes);
  *length = 0;
  if (*line == NULL) return sti_out_of_memory(error);
  while (*length == 0 && done < cap_bytes && got > 0) {
    const char *piece = input_piece(input, (int64_t)(cap_bytes - done), &got);
    const char *newline = got > 0 ? memchr(piece, '\n', got) : NULL;
    size_t taken = newline == NULL ? got : (size_t)(newline - piece) + 1;
    memcpy(*line + done, piece, taken);
    input->start -= got - taken;
    done += taken;
    if (newline != NULL) *length = done;
  }
  return STI_OK;
}
