/* open_unit.c: see open_unit.h. */
#include "open_unit.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent_log.h"
#include "kernel_files.h"

#define OPEN_UNIT_FILE "open-unit"

enum { NOTE_CAP_BYTES = 512 };

/* ------------------------------------------------------------------ reading */

static StiCode parse_note(Arena *arena, const char *line, size_t length, UnitNote *note, StiError *error) {
  JsonValue *value;
  Fields fields;
  STI_TRY(json_parse(arena, line, length, note->path, &value, error));
  fields_begin(&fields, value, note->path, "OpenUnit", "", error);
  const char *boot = field_text(&fields, "boot_id", 1, BOOT_ID_TEXT - 1);
  int64_t kills = field_int(&fields, "kills", 0, INT64_MAX - 1);
  int64_t oom_kills = field_is_null(&fields, "oom_kills") ? -1 : field_int(&fields, "oom_kills", 0, INT64_MAX);
  int64_t unit = field_int(&fields, "unit", 0, INT64_MAX);
  STI_TRY(fields_end(&fields));
  if (strcmp(boot, note->boot) != 0) return STI_OK;
  note->unit = unit;
  note->kills = kills + 1;
  note->oom_kills = oom_kills;
  return STI_OK;
}

/* One line; what is left of a longer one behind the newline means nothing. */
static void read_note(UnitNote *note) {
  char text[NOTE_CAP_BYTES + 1];
  Arena arena = {0};
  StiError problem = {0};
  ssize_t got = pread(note->fd, text, NOTE_CAP_BYTES, 0);
  StiCode code = STI_OK;
  if (got < 0) code = storage_error(&problem, errno, note->path);
  text[got < 0 ? 0 : got] = '\0';
  size_t length = strcspn(text, "\n");
  if (code == STI_OK && length > 0) code = parse_note(&arena, text, length, note, &problem);
  if (code != STI_OK) log_warning("The note of the unit that was running is ignored: %s", problem.what);
  arena_free(&arena);
}

StiCode unit_note_open(const char *folder, UnitNote *note, StiError *error) {
  *note = (UnitNote){.fd = -1, .oom_kills = -1};
  path_below(note->path, folder, OPEN_UNIT_FILE);
  STI_TRY(boot_id(note->boot, error));
  note->fd = open(note->path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (note->fd < 0) return storage_error(error, errno, note->path);
  read_note(note);
  return STI_OK;
}

void unit_note_remove(UnitNote *note) {
  /* An empty note counts for nothing, should it have to stay. */
  if (unlink(note->path) != 0 && errno != ENOENT && ftruncate(note->fd, 0) != 0)
    log_warning("%s: cannot be removed: %s", note->path, strerror(errno));
  close(note->fd);
  note->fd = -1;
}

/* ------------------------------------------------------------------ writing */

int64_t oom_kills_now(void) {
  char text[KERNEL_TEXT], *rest = text, *line;
  int64_t count;
  if (!kernel_text(text, sizeof text, "%s/vmstat", kernel_roots.proc)) return -1;
  while ((line = next_line(&rest)) != NULL) {
    const char *value = split_line(line, ' ');
    if (value != NULL && strcmp(line, "oom_kill") == 0) return parse_int(value, &count) && count >= 0 ? count : -1;
  }
  return -1;
}

static int64_t kills_in(const UnitNote *note, const Unit *unit) { return note->unit == unit->number ? note->kills : 0; }

StiCode unit_note_begin(const UnitNote *note, const Unit *unit, StiError *error) {
  Text line = {0};
  int64_t kills = kills_in(note, unit), oom_kills = kills > 0 ? note->oom_kills : oom_kills_now();
  json_open(&line, '{');
  json_text_field(&line, "boot_id", note->boot);
  json_int_field(&line, "kills", kills);
  json_key(&line, "oom_kills");
  if (oom_kills >= 0)
    json_int(&line, oom_kills);
  else
    json_null(&line);
  json_int_field(&line, "unit", unit->number);
  json_close(&line, '}');
  text_append(&line, "\n", 1);
  if (line.failed) {
    text_free(&line);
    return sti_out_of_memory(error);
  }
  int problem = write_whole(note->fd, line.data, line.length, 0);
  text_free(&line);
  return problem == 0 ? STI_OK : storage_error(error, problem, note->path);
}

/* ------------------------------------------------------------------ the rule */

static void describe(int64_t before, int64_t now, char evidence[200]) {
  if (before < 0 || now < 0)
    snprintf(evidence, 200, "this kernel does not count its out-of-memory kills");
  else if (now > before)
    snprintf(evidence, 200, "the kernel counts %" PRId64 " out-of-memory kill(s) in that time", now - before);
  else
    snprintf(evidence, 200,
             "the kernel counts no out-of-memory kill of its own in that time, so it was Android's low-memory killer, a"
             " user, or a crash that agent.log tells of");
}

StiCode unit_note_verdict(const UnitNote *note, const Unit *unit, StiError *error) {
  char evidence[200];
  int64_t kills = kills_in(note, unit);
  if (kills == 0) return STI_OK;
  if (kills < KILL_LIMIT) {
    log_warning("The agent was killed while it ran unit %" PRId64 " (%s)", unit->number, unit_kind_names[unit->kind]);
    return STI_OK;
  }
  describe(note->oom_kills, oom_kills_now(), evidence);
  return sti_fail(error, STI_RESOURCE,
                  "Give the unit a smaller preload or working buffer, a smaller submodel or batch, or free memory on the"
                  " device; then run it again.",
                  "The agent was killed %" PRId64 " times while it ran unit %" PRId64
                  " (%s), likely for lack of memory: %s.",
                  kills, unit->number, unit_kind_names[unit->kind], evidence);
}
