/* accept_task.c: the verb `accept-task`: task data comes on standard input, from where it broke off, and is verified.
 *
 * Format: docs/job-and-journal.md, 6.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"
#include "arguments.h"
#include "incoming.h"
#include "input.h"
#include "locks.h"
#include "signals.h"
#include "verbs.h"

#define NO_PIECE "The input is not a piece of task data: "

enum { PIECE_HEADER_CAP_BYTES = 100 };

/* `length` bytes from `offset` on, of a file of `total`. */
typedef struct { int64_t offset, length, total; } Piece;

/* ------------------------------------------------------------------ a piece */

static StiCode read_piece(Arena *arena, Input *input, Piece *piece, StiError *error) {
  JsonValue *list;
  StiError ignored;
  char *line;
  size_t length;
  STI_TRY(input_line(arena, input, PIECE_HEADER_CAP_BYTES, &line, &length, error));
  StiCode code = length == 0 ? STI_FORMAT : json_parse(arena, line, length, "piece", &list, &ignored);
  if (code == STI_RESOURCE) return sti_out_of_memory(error);
  bool good = code == STI_OK && list->kind == JSON_ARRAY && list->array.count == 3;
  for (int i = 0; good && i < 3; i++)
    good = list->array.items[i].kind == JSON_INT && list->array.items[i].integer >= 0;
  if (!good) return sti_fail(error, STI_FORMAT, RESEND, NO_PIECE "its first line is not a JSON list of three sizes.");
  const JsonValue *items = list->array.items;
  *piece = (Piece){.offset = items[0].integer, .length = items[1].integer, .total = items[2].integer};
  if (piece->length > piece->total - piece->offset)
    return sti_fail(error, STI_FORMAT, RESEND, NO_PIECE "it ends behind the whole.");
  return STI_OK;
}

/* Write it as it comes; what follows it is not read, what was behind it is cut off. */
static StiCode write_piece(Input *input, int fd, const char *partial, const Piece *piece, StiError *error) {
  size_t got = 1;
  int64_t done = 0;
  int problem = ftruncate(fd, piece->offset) == 0 ? 0 : errno;
  while (problem == 0 && done < piece->length && got > 0) {
    const char *data = input_piece(input, piece->length - done, &got);
    problem = write_whole(fd, data, got, piece->offset + done);
    done += (int64_t)got;
  }
  if (problem != 0) return storage_error(error, problem, partial);
  if (done == piece->length) return STI_OK;
  return sti_fail(error, STI_FORMAT, RESEND, "The input ended after %" PRId64 " of %" PRId64 " bytes, which are kept.",
                  done, piece->length);
}

static StiCode append_piece(Input *input, int fd, const char *partial, const Piece *piece, StiError *error) {
  struct stat status;
  if (fstat(fd, &status) != 0) return storage_error(error, errno, partial);
  if (piece->offset > (int64_t)status.st_size)
    return sti_fail(error, STI_INPUT, RESEND, "%s: holds %" PRId64 " bytes, the piece begins at %" PRId64 ".", partial,
                    (int64_t)status.st_size, piece->offset);
  return write_piece(input, fd, partial, piece, error);
}

/* ------------------------------------------------------------------ the whole */

/* Make the file visible if it is what it should be; a damaged one is removed. */
static StiCode show_task(const Spool *spool, const char *digest, int fd, const char *partial, const char *task,
                         StiError *error) {
  char found[65];
  Path folder;
  int problem = digest_of_file(fd, found);
  if (problem != 0) return sti_fail_errno(error, STI_STORAGE_READ, problem, RESEND, "%s: cannot be read", partial);
  if (strcmp(found, digest) != 0) {
    unlink(partial);
    return sti_fail(error, STI_DIGEST, RESEND, "%s: what came has digest %.12s, not %.12s.", partial, found, digest);
  }
  spool_path(spool, folder, "tasks");
  if (fsync(fd) != 0 || rename(partial, task) != 0) problem = errno;
  if (problem == 0) problem = sync_folder(folder);
  return problem == 0 ? STI_OK : storage_error(error, problem, partial);
}

/* ------------------------------------------------------------------ the verb */

typedef struct { const char *state; int64_t bytes; } Outcome;

static StiCode take_task(Arena *arena, const Spool *spool, const char *digest, Outcome *outcome, StiError *error) {
  Path task, partial;
  Input input;
  Piece piece = {0};
  STI_TRY(check_digest(digest, error));
  spool_path(spool, task, "tasks/%s.safetensors", digest);
  spool_path(spool, partial, "tasks/%s.partial", digest);
  if (is_file(task)) {
    unlink(partial);
    *outcome = (Outcome){.state = "already", .bytes = file_bytes(task)};
    return STI_OK;
  }
  STI_TRY(input_open(arena, STDIN_FILENO, &input, error));
  STI_TRY(read_piece(arena, &input, &piece, error));
  int fd = open(partial, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
  if (fd < 0) return storage_error(error, errno, partial);
  *outcome = (Outcome){.state = "incoming", .bytes = piece.offset + piece.length};
  StiCode code = append_piece(&input, fd, partial, &piece, error);
  if (code == STI_OK && outcome->bytes == piece.total) {
    outcome->state = "accepted";
    code = show_task(spool, digest, fd, partial, task, error);
  }
  close(fd);
  return code;
}

StiCode verb_accept_task(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Lock lock;
  Outcome outcome = {0};
  Arena arena = {0};
  signals_install();
  STI_TRY(arguments_open(argc, argv, 1, TAKES_LEASE, &arguments, &spool, error));
  STI_TRY(hold_deploy(&spool, &lock, error));
  StiCode code = take_task(&arena, &spool, arguments.words[0], &outcome, error);
  lock_release(&lock);
  arena_free(&arena);
  if (code != STI_OK) return code;
  json_open(out, '{');
  json_int_field(out, "bytes", outcome.bytes);
  json_text_field(out, "digest", arguments.words[0]);
  json_text_field(out, "state", outcome.state);
  json_close(out, '}');
  return STI_OK;
}
