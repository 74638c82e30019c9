/* settings.c: see settings.h; and the verb `restore`. */
#include "settings.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent_log.h"
#include "arguments.h"
#include "identity.h"
#include "journal_format.h"
#include "locks.h"
#include "setting_targets.h"
#include "verbs.h"

enum { JOURNAL_CAP_BYTES = 4 << 20, JOB_LABEL = 96 };

/* One line of the journal: `target` was `before`, `job` sets it to `value`. */
typedef struct {
  SettingText before, value;
  char boot[BOOT_ID_TEXT], job[JOB_LABEL];
  TargetText target;
} Change;

typedef enum { APPLIED, NOT_APPLIED, RESTORED, KEPT, NOT_RESTORED } State;
static const char *const state_names[] = {"applied", "not-applied", "restored", "kept", "not-restored"};

/* ------------------------------------------------------------------ reports */

static void write_before(Text *out, const SettingText *before) {
  json_key(out, "before");
  if (before->set) json_text(out, before->text);
  else json_null(out);
}

static void report(Text *out, const char *target, const char *value, const SettingText *before, State state,
                   const char *why) {
  if (state == APPLIED || state == RESTORED)
    log_info("Setting %s: %s%s%s", target, state_names[state], why[0] ? ", " : "", why);
  else
    log_warning("Setting %s is %s: %s", target, state_names[state], why);
  json_open(out, '{');
  write_before(out, before);
  json_text_field(out, "state", state_names[state]);
  json_text_field(out, "target", target);
  json_text_field(out, "value", value);
  json_text_field(out, "why", why);
  json_close(out, '}');
}

static void describe_found(char why[WHY_ROOM], const char *before, const SettingText *found, const char *after) {
  snprintf(why, WHY_ROOM, "%s%s%s%s%s", before, found->set ? "'" : "", found->set ? found->text : "nothing",
           found->set ? "'" : "", after);
}

/* ------------------------------------------------------------------ the journal: writing */

static void write_change(Text *out, const Change *change) {
  Text body = {0};
  json_open(&body, '{');
  write_before(&body, &change->before);
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

/* Append one line, on storage; the file is as before if it cannot be. Returns 0 or errno. */
static int append_change(const Spool *spool, const Change *change) {
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

/* ------------------------------------------------------------------ applying */

typedef struct {
  const Spool *spool;
  const Job *job;
  Text *reports;
  int count;
} Applying;

/* Journal the change, make it, and look. The state it is in, and why where it is not applied. */
static State change_one(const Applying *applying, Change *change, char why[WHY_ROOM]) {
  SettingText now;
  StiError error = {0};
  if (target_read(change->target, &change->before, why) != 0) return NOT_APPLIED;
  if (setting_text_equal(&change->before, &change->value)) {
    snprintf(why, WHY_ROOM, "it was so before");
    return APPLIED;
  }
  int problem = boot_id(change->boot, &error) == STI_OK ? append_change(applying->spool, change) : EIO;
  if (problem != 0) {
    snprintf(why, WHY_ROOM, "it cannot be journalled: %s", strerror(problem));
    return NOT_APPLIED;
  }
  if (target_write(change->target, &change->value, why) != 0 || target_read(change->target, &now, why) != 0)
    return NOT_APPLIED;
  if (setting_text_equal(&now, &change->value)) return APPLIED;
  describe_found(why, "it reads back ", &now, "");
  char ignored[WHY_ROOM];
  if (!setting_text_equal(&now, &change->before) && target_write(change->target, &change->before, ignored) != 0)
    log_warning("Setting %s: %s", change->target, ignored);
  return NOT_APPLIED;
}

static void apply_one(void *context, const char *target, const char *value) {
  Applying *applying = context;
  char why[WHY_ROOM] = "";
  Change change = {.value = {.set = true}};
  if (++applying->count > SETTING_REPORTS_MOST) {
    if (applying->count == SETTING_REPORTS_MOST + 1)
      log_warning("More than %d settings; the rest is left alone", SETTING_REPORTS_MOST);
    return;
  }
  snprintf(change.job, sizeof change.job, "%s/%" PRId64, applying->job->id, applying->job->attempt);
  snprintf(change.target, sizeof change.target, "%s", target);
  snprintf(change.value.text, sizeof change.value.text, "%s", value);
  State state = change_one(applying, &change, why);
  report(applying->reports, target, value, &change.before, state, why);
}

void settings_apply(const Spool *spool, const Job *job, bool wanted, Text *reports) {
  Applying applying = {spool, job, reports, 0};
  json_open(reports, '[');
  for (int32_t i = 0; i < job->setting_count && wanted; i++) {
    TargetText name;
    char why[WHY_ROOM] = "";
    const Setting *setting = &job->settings[i];
    if (!setting_targets(setting, apply_one, &applying, name, why) && ++applying.count <= SETTING_REPORTS_MOST)
      report(reports, name, setting_value(setting), &(SettingText){0}, NOT_APPLIED, why);
  }
  json_close(reports, ']');
}

/* ------------------------------------------------------------------ the journal: reading */

typedef struct {
  Change *items; /* [count] */
  int count;
} Changes;

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

/* Free changes->items. None where there is no journal. Errors: STI_FORMAT, STI_RESOURCE. */
static StiCode read_changes(const Spool *spool, Changes *changes, StiError *error) {
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

/* ------------------------------------------------------------------ restoring */

static State restore_one(const Change *change, const char *boot, char why[WHY_ROOM]) {
  SettingText found;
  const char *target = change->target;
  if (target_is_file(target) && strcmp(change->boot, boot) != 0) {
    snprintf(why, WHY_ROOM, "by the reboot since");
    return RESTORED;
  }
  if (target_read(target, &found, why) != 0) return NOT_RESTORED;
  if (setting_text_equal(&found, &change->before)) return RESTORED;
  if (!setting_text_equal(&found, &change->value)) {
    describe_found(why, "somebody set it to ", &found, " meanwhile");
    return KEPT;
  }
  if (target_write(target, &change->before, why) != 0 || target_read(target, &found, why) != 0) return NOT_RESTORED;
  if (setting_text_equal(&found, &change->before)) return RESTORED;
  describe_found(why, "it reads back ", &found, "");
  return NOT_RESTORED;
}

/* Restore all, last first; those that could not be move to the front of the list, whose count becomes theirs. */
static void restore_all(Changes *changes, const char *boot, Text *reports) {
  bool left[SETTING_REPORTS_MOST];
  for (int i = changes->count - 1; i >= 0; i--) {
    const Change *change = &changes->items[i];
    char why[WHY_ROOM] = "";
    State state = restore_one(change, boot, why);
    left[i] = state == NOT_RESTORED;
    report(reports, change->target, change->value.text, &change->before, state, why);
  }
  int kept = 0;
  for (int i = 0; i < changes->count; i++)
    if (left[i]) changes->items[kept++] = changes->items[i];
  changes->count = kept;
}

/* Make the journal hold these changes; remove it when there are none. */
static StiCode rewrite(const Spool *spool, const Changes *changes, StiError *error) {
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

static StiCode restore_changes(const Spool *spool, Changes *changes, Text *reports, StiError *error) {
  char boot[BOOT_ID_TEXT];
  STI_TRY(read_changes(spool, changes, error));
  if (changes->items == NULL) return STI_OK;
  STI_TRY(boot_id(boot, error));
  restore_all(changes, boot, reports);
  return rewrite(spool, changes, error);
}

StiCode settings_restore(const Spool *spool, Text *reports, StiError *error) {
  Changes changes = {0};
  json_open(reports, '[');
  StiCode code = restore_changes(spool, &changes, reports, error);
  json_close(reports, ']');
  free(changes.items);
  return code;
}

/* ------------------------------------------------------------------ at other times */

/* Log to the job that made the changes, where it is still there. */
static void open_job_log(const Spool *spool) {
  Changes changes;
  Path folder, path;
  StiError ignored = {0};
  if (read_changes(spool, &changes, &ignored) == STI_OK && changes.count > 0) {
    char *job = changes.items[0].job, *slash = strchr(job, '/');
    if (slash != NULL) *slash = '\0';
    if (slash != NULL && spool_job(spool, job, slash + 1, folder, &ignored) == STI_OK && is_folder(folder)) {
      path_below(path, folder, "agent.log");
      if (log_open(path, &ignored) != STI_OK) log_warning("%s", ignored.what);
    }
  }
  free(changes.items);
}

void settings_restore_left(const Spool *spool) {
  Path path;
  Lock lock;
  Text reports = {0};
  StiError problem = {0};
  spool_path(spool, path, SETTINGS_JOURNAL);
  if (!is_file(path)) return;
  StiCode code = hold_run(spool, 0, "", &lock, &problem);
  if (code == STI_BUSY) return; /* an agent runs: it will do it */
  if (code == STI_OK) {
    open_job_log(spool);
    code = settings_restore(spool, &reports, &problem);
    lock_release(&lock);
  }
  if (code != STI_OK) log_warning("Settings left behind are not restored: %s", problem.what);
  log_close();
  text_free(&reports);
}

StiCode settings_check_restored(const Spool *spool, StiError *error) {
  Changes changes = {0};
  Text reports = {0};
  StiCode code = restore_changes(spool, &changes, &reports, error);
  if (code == STI_OK && changes.count > 0) {
    const Change *first = &changes.items[0];
    code = sti_fail(error, STI_REFUSED,
                    "Put it back by hand, or restart the device where it is a file of /sys; then clean again.",
                    "%s cannot be put back to %s%s%s.", first->target, first->before.set ? "'" : "",
                    first->before.set ? first->before.text : "nothing", first->before.set ? "'" : "");
  }
  free(changes.items);
  text_free(&reports);
  return code;
}

StiCode verb_restore(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Lock lock;
  STI_TRY(arguments_read(argc, argv, 0, TAKES_SPOOL, &arguments, error));
  STI_TRY(spool_open(arguments.spool, &spool, error));
  STI_TRY(hold_run(&spool, 0, "", &lock, error));
  json_open(out, '{');
  json_key(out, "settings");
  StiCode code = settings_restore(&spool, out, error);
  json_close(out, '}');
  lock_release(&lock);
  return code;
}
