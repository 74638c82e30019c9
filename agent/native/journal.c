/* journal.c: see journal.h. */
#include "journal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent_log.h"

#define NEW_ATTEMPT "The journal is damaged; start a new attempt of the job."

enum { FIRST_WINDOW = 1 << 16, WHERE_CHARS = PATH_CHARS + 40 };

/* ------------------------------------------------------------------ state */

bool unit_set_has(const UnitSet *set, int64_t unit) { return set->bits[unit / 64] >> (unit % 64) & 1; }

static void add_unit(UnitSet *set, int64_t unit) {
  set->count += !unit_set_has(set, unit);
  set->bits[unit / 64] |= UINT64_C(1) << (unit % 64);
}

bool journal_unit_finished(const JournalState *state, int64_t unit) {
  return unit_set_has(&state->done, unit) || unit_set_has(&state->failed, unit);
}

int64_t journal_finished(const JournalState *state) {
  int64_t count = 0;
  for (size_t i = 0; i < sizeof state->done.bits / sizeof state->done.bits[0]; i++)
    count += __builtin_popcountll(state->done.bits[i] | state->failed.bits[i]);
  return count;
}

bool journal_of_others(const JournalState *state, const Lease *lease) {
  return state->leases > 0 && (lease == NULL || state->leases > 1 || !lease_equal(&state->lease.lease, lease));
}

static StiCode take(JournalState *state, const Record *record, StiError *error) {
  switch (record->type) {
    case RECORD_RESULT: add_unit(&state->done, record->unit); break;
    case RECORD_FAILURE: add_unit(&state->failed, record->unit); break;
    case RECORD_START:
      if (state->leases == 0) state->leases = lease_copy(&record->lease, &state->lease) ? 1 : 2;
      else if (!lease_equal(&state->lease.lease, &record->lease)) state->leases = 2;
      break;
    case RECORD_END:
      state->has_end = true;
      free(state->refused);
      state->refused = record->refused == NULL ? NULL : strdup(record->refused);
      if (record->refused != NULL && state->refused == NULL) return sti_out_of_memory(error);
  }
  state->next_seq++;
  return STI_OK;
}

void journal_state_free(JournalState *state) {
  free(state->refused);
  state->refused = NULL;
}

/* ------------------------------------------------------------------ reading from the start */

/* The part of the file behind the last good record, as much of it as was read. */
typedef struct {
  int fd;
  const char *path;
  int64_t left;                       /* bytes of the file not yet read */
  char *data;                         /* [capacity] */
  size_t start, end, capacity;        /* what lies in data [start, end) */
} Window;

static StiCode cannot_read(const char *path, StiError *error) {
  return sti_fail_errno(error, STI_FORMAT, errno, "Check the folder's owner and permissions.", "%s: cannot be read",
                        path);
}

/* Room for more behind `end`: first by moving what there is to the front, then by a larger buffer. */
static StiCode make_room(Window *window, StiError *error) {
  if (window->end < window->capacity) return STI_OK;
  if (window->start > 0) {
    memmove(window->data, window->data + window->start, window->end - window->start);
    window->end -= window->start;
    window->start = 0;
    return STI_OK;
  }
  size_t capacity = window->capacity ? 2 * window->capacity : FIRST_WINDOW;
  if (capacity > LINE_CAP_BYTES + 1) capacity = LINE_CAP_BYTES + 1;
  char *grown = realloc(window->data, capacity);
  if (grown == NULL) return sti_out_of_memory(error);
  window->data = grown;
  window->capacity = capacity;
  return STI_OK;
}

/* Read once more; *more is false at the end of the file and when the window holds more than one line can be. */
static StiCode read_more(Window *window, bool *more, StiError *error) {
  *more = window->left > 0 && window->end - window->start <= LINE_CAP_BYTES;
  if (!*more) return STI_OK;
  STI_TRY(make_room(window, error));
  size_t room = window->capacity - window->end;
  if ((int64_t)room > window->left) room = (size_t)window->left;
  ssize_t got = read(window->fd, window->data + window->end, room);
  if (got < 0 && errno != EINTR) return cannot_read(window->path, error);
  if (got > 0) window->end += (size_t)got;
  window->left = got == 0 ? 0 : window->left - (got > 0 ? got : 0);
  return STI_OK;
}

/* Length of the line at the window's start, without its newline; *found is false when there is none that long. */
static StiCode find_line(Window *window, size_t *length, bool *found, StiError *error) {
  size_t searched = 0;
  for (bool more = true;;) {
    size_t there = window->end - window->start;
    const char *newline =
        there > searched ? memchr(window->data + window->start + searched, '\n', there - searched) : NULL;
    *found = newline != NULL;
    if (*found) *length = (size_t)(newline - (window->data + window->start));
    if (*found || !more) return STI_OK;
    searched = there;
    STI_TRY(read_more(window, &more, error));
  }
}

/* STI_FORMAT unless what the window begins with can be one append that was cut short. */
static StiCode check_torn(Window *window, const char *where, StiError *error) {
  for (bool more = true; more;) STI_TRY(read_more(window, &more, error));
  const char *data = window->data + window->start;
  size_t length = window->end - window->start;
  if (length > LINE_CAP_BYTES || window->left > 0)
    return sti_fail(error, STI_FORMAT, NEW_ATTEMPT,
                    "%s: %" PRId64 " bytes that are no record, more than one append can leave.", where,
                    (int64_t)length + window->left);
  const char *line = memchr(data, '\n', length), *end = data + length;
  while (line != NULL) {
    const char *next = memchr(line + 1, '\n', (size_t)(end - line - 1)), *body;
    uint64_t seq;
    size_t body_length, line_length = (size_t)((next == NULL ? end : next) - line - 1);
    if (line_body(line + 1, line_length, &seq, &body, &body_length))
      return sti_fail(error, STI_FORMAT, NEW_ATTEMPT, "%s: a bad record with good ones behind it.", where);
    line = next;
  }
  return STI_OK;
}

static StiCode take_line(JournalState *state, uint64_t seq, const char *body, size_t length, const char *where,
                         StiError *error) {
  Arena arena = {0};
  Record record;
  StiCode code = record_decode(&arena, body, length, where, &record, error);
  if (code == STI_OK && (uint64_t)record.seq != seq)
    code = sti_fail(error, STI_FORMAT, NEW_ATTEMPT, "%s: the line says record %" PRIu64 ", its JSON %" PRId64 ".",
                    where, seq, record.seq);
  if (code == STI_OK && record.seq != state->next_seq)
    code = sti_fail(error, STI_FORMAT, NEW_ATTEMPT, "%s: record %" PRId64 " where %" PRId64 " was due.", where,
                    record.seq, state->next_seq);
  if (code == STI_OK) code = take(state, &record, error);
  arena_free(&arena);
  return code;
}

static StiCode scan_window(Window *window, JournalState *state, StiError *error) {
  for (;;) {
    char where[WHERE_CHARS];
    size_t length = 0, body_length;
    const char *body;
    uint64_t seq;
    bool found;
    STI_TRY(find_line(window, &length, &found, error));
    if (!found && window->left == 0 && window->start == window->end) return STI_OK;
    snprintf(where, sizeof where, "%s at byte %" PRId64, window->path, state->good_bytes);
    if (!found || !line_body(window->data + window->start, length, &seq, &body, &body_length))
      return check_torn(window, where, error);
    STI_TRY(take_line(state, seq, body, body_length, where, error));
    window->start += length + 1;
    state->good_bytes += (int64_t)length + 1;
  }
}

StiCode journal_scan(const char *path, JournalState *state, StiError *error) {
  struct stat status;
  *state = (JournalState){0};
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? STI_OK : cannot_read(path, error);
  Window window = {.fd = fd, .path = path};
  StiCode code = fstat(fd, &status) == 0 ? STI_OK : cannot_read(path, error);
  if (code == STI_OK) {
    window.left = status.st_size;
    code = scan_window(&window, state, error);
  }
  close(fd);
  free(window.data);
  if (code != STI_OK) journal_state_free(state);
  return code;
}

/* ------------------------------------------------------------------ appending */

/* Cut off what the last append left torn. Returns 0 or errno. */
static int cut_torn(const Journal *journal) {
  struct stat status;
  if (fstat(journal->fd, &status) != 0) return errno;
  int64_t torn = status.st_size - journal->state.good_bytes;
  if (torn > 0) {
    log_warning("%s: cut off %" PRId64 " bytes of an append that was cut short", journal->path, torn);
    if (ftruncate(journal->fd, journal->state.good_bytes) != 0) return errno;
  }
  return fsync(journal->fd) == 0 ? sync_folder_of(journal->path) : errno;
}

StiCode journal_open(const char *path, Journal *journal, StiError *error) {
  snprintf(journal->path, sizeof journal->path, "%s", path);
  STI_TRY(boot_id(journal->boot, error));
  STI_TRY(journal_scan(path, &journal->state, error));
  journal->fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  int problem = journal->fd < 0 ? errno : cut_torn(journal);
  if (problem == 0) return STI_OK;
  journal_close(journal);
  return storage_error(error, problem, path);
}

void journal_close(Journal *journal) {
  if (journal->fd >= 0) close(journal->fd);
  journal->fd = -1;
  journal_state_free(&journal->state);
}

static void write_body(Text *body, const Journal *journal, const Text *payload) {
  json_open(body, '{');
  json_text_field(body, "boot_id", journal->boot);
  json_key(body, "payload"), text_append(body, payload->data, payload->length);
  json_int_field(body, "seq", journal->state.next_seq);
  json_int_field(body, "wall_ns", wall_ns());
  json_close(body, '}');
}

/* Whether the body can be read back as the record it is. */
static StiCode check_body(Arena *arena, const Journal *journal, const Text *body, Record *record, StiError *error) {
  char source[40];
  snprintf(source, sizeof source, "journal record %" PRId64, journal->state.next_seq);
  if (body->length > RECORD_CAP_BYTES)
    return sti_fail(error, STI_FORMAT, "Split the unit into smaller ones.",
                    "%s has %zu bytes, more than the %d a record may have.", source, body->length, RECORD_CAP_BYTES);
  StiError problem = {0};
  StiCode code = record_decode(arena, body->data, body->length, source, record, &problem);
  if (code == STI_FORMAT)
    return sti_fail(error, code, "A value is not finite, or out of range.", "%s cannot be written: %s", source,
                    problem.what);
  if (code != STI_OK) *error = problem;
  return code;
}

static StiCode write_line(Journal *journal, const Text *body, StiError *error) {
  Text line = {0};
  text_printf(&line, "%" PRId64 " %08" PRIx32 " ", journal->state.next_seq, crc32_of(body->data, body->length));
  text_append(&line, body->data, body->length);
  text_append(&line, "\n", 1);
  if (line.failed) {
    text_free(&line);
    return sti_out_of_memory(error);
  }
  int problem = write_whole(journal->fd, line.data, line.length, journal->state.good_bytes);
  if (problem == 0 && fsync(journal->fd) != 0) problem = errno;
  if (problem == 0)
    journal->state.good_bytes += (int64_t)line.length;
  else if (ftruncate(journal->fd, journal->state.good_bytes) != 0)
    log_error("%s: cannot be cut back: %s", journal->path, strerror(errno));
  text_free(&line);
  return problem == 0 ? STI_OK : storage_error(error, problem, journal->path);
}

StiCode journal_append(Journal *journal, const Text *payload, StiError *error) {
  Arena arena = {0};
  Text body = {0};
  Record record;
  write_body(&body, journal, payload);
  StiCode code = body.failed || payload->failed ? sti_out_of_memory(error) : STI_OK;
  if (code == STI_OK) code = check_body(&arena, journal, &body, &record, error);
  if (code == STI_OK) code = write_line(journal, &body, error);
  if (code == STI_OK) code = take(&journal->state, &record, error);
  text_free(&body);
  arena_free(&arena);
  return code;
}
