/* setting_journal.c: see setting_journal.h. */
#include "setting_journal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent_log.h"

enum { JOURNAL_CAP_BYTES = 4 << 20 };

/* ------------------------------------------------------------------ writing */

void setting_before_write(Text *out, const SettingText *before) {
  json_key(out, "before");
  if (before->set) json_text(out, before->text);
  else json_null(out);
}

static void write_change(Text *out, const Change *change) {
  Text body = {0};
  json_open(&body, '{');
  setting_before_write(&body, &change->before);
  json_text_field(&body, "boot_id", change->boot);
  json_text_field(&body, "job", change->job);
  json_text_field(&body, "target", change->target);
  json_text_field(&body, "value", change->value.text);
  json_close(&body, '}');
  text_printf(out, "0 %08" PRIx32 " ", crc32_of(body.data, body.length));
  text_append(out, body.data, body.length);
  text_append(out, "\n", 1);
  out->failed = out->failed || body.failed;
  text_free(&body);
}

int change_append(const Spool *spool, const Change *change) {
  Path path;
  struct stat status;
  Text line = {0};
  spool_path(spool, path, SETTINGS_JOURNAL);
  write_change(&line, change);
  int fd = line.failed ? -1 : open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  int problem = line.failed ? ENOMEM : fd < 0 || fstat(fd, &status) != 0 ? errno : 0;
  if (problem == 0) {
    problem = write_whole(fd, line.data, line.length, status.st_size);
    if (problem == 0 && fsync(fd) != 0) problem = errno;
    if (problem == 0) problem = sync_folder(spool->root);
    /* A torn line that has to stay counts for nothing. */
    if (problem != 0 && ftruncate(fd, status.st_size) != 0) log_warning("%s: cannot be cut back", path);
  }
  if (fd >= 0) close(fd);
  text_free(&line);
  return problem;
}

/* ------------------------------------------------------------------ reading */

static StiCode parse_change(Arena *arena, const char *body, size_t length, Change *change, StiError *error) {
  JsonValue *value;
  Fields fields;
  *change = (Change){.value = {.set = true}};
  STI_TRY(json_parse(arena, body, length, "a line", &value, error));
  fields_begin(&fields, value, "a line", "Change", "", error);
  change->before.set = !field_is_null(&fields, "before");
  const char *before = change->before.set ? field_text(&fields, "before", 0, SETTING_TEXT_MOST) : "";
  const char *boot = field_text(&fields, "boot_id", 1, BOOT_ID_TEXT - 1);
  const char *job = field_text(&fields, "job", 0, JOB_LABEL - 1);
  const char *target = field_text(&fields, "target", 1, TARGET_ROOM - 1);
  const char *text = field_text(&fields, "value", 1, SETTING_VALUE_MOST);
  STI_TRY(fields_end(&fields));
  if (!is_target(target) || !is_setting_value(text) || strlen(before) > SETTING_TEXT_MOST)
    return sti_fail(error, STI_FORMAT, "", "a line: not a change of a setting.");
  snprintf(change->before.text, sizeof change->before.text, "%s", before);
  snprintf(change->boot, sizeof change->boot, "%s", boot);
  snprintf(change->job, sizeof change->job, "%s", job);
  snprintf(change->target, sizeof change->target, "%s", target);
  snprintf(change->value.text, sizeof change->value.text, "%s", text);
  return STI_OK;
}

/* Good lines count, whatever stands between them. */
static void parse_changes(const char *path, const char *data, size_t length, Changes *changes) {
  const char *end = data + length, *body;
  for (const char *line = data; line < end && changes->count < SETTING_REPORTS_MOST;) {
    const char *newline = memchr(line, '\n', (size_t)(end - line)), *stop = newline == NULL ? end : newline;
    uint64_t seq;
    size_t body_length;
    Arena arena = {0};
    StiError problem = {.what = "a line with a wrong checksum"};
    bool good = line_body(line, (size_t)(stop - line), &seq, &body, &body_length) &&
                parse_change(&arena, body, body_length, &changes->items[changes->count], &problem) == STI_OK;
    if (good) changes->count++;
    else if (stop > line) log_warning("%s: %s", path, problem.what);
    arena_free(&arena);
    line = stop + 1;
  }
}

StiCode changes_read(const Spool *spool, Changes *changes, StiError *error) {
  Path path;
  Arena arena = {0};
  const char *data;
  size_t length;
  *changes = (Changes){0};
  spool_path(spool, path, SETTINGS_JOURNAL);
  if (!is_file(path)) return STI_OK;
  STI_TRY(read_file(&arena, path, JOURNAL_CAP_BYTES, &data, &length, error));
  changes->items = calloc(SETTING_REPORTS_MOST, sizeof *changes->items);
  if (changes->items != NULL) parse_changes(path, data, length, changes);
  arena_free(&arena);
  return changes->items != NULL ? STI_OK : sti_out_of_memory(error);
}

StiCode changes_write(const Spool *spool, const Changes *changes, StiError *error) {
  Path path;
  Text lines = {0};
  spool_path(spool, path, SETTINGS_JOURNAL);
  if (changes->count == 0) {
    int problem = unlink(path) == 0 || errno == ENOENT ? sync_folder(spool->root) : errno;
    return problem == 0 ? STI_OK : storage_error(error, problem, path);
  }
  for (int i = 0; i < changes->count; i++) write_change(&lines, &changes->items[i]);
  StiCode code = lines.failed ? sti_out_of_memory(error) : write_atomic(path, lines.data, lines.length, error);
  text_free(&lines);
  return code;
}
