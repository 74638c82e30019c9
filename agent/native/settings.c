/* settings.c: see settings.h; and the verb `restore`. */
#include "settings.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent_log.h"
#include "arguments.h"
#include "identity.h"
#include "journal_format.h"
#include "locks.h"
#include "setting_journal.h"
#include "verbs.h"

typedef enum { APPLIED, NOT_APPLIED, RESTORED, KEPT, NOT_RESTORED } State;
static const char *const state_names[] = {"applied", "not-applied", "restored", "kept", "not-restored"};

/* ------------------------------------------------------------------ reports */

static void report(Text *out, const char *target, const char *value, const SettingText *before, State state,
                   const char *why) {
  if (state == APPLIED || state == RESTORED)
    log_info("Setting %s: %s%s%s", target, state_names[state], why[0] ? ", " : "", why);
  else
    log_warning("Setting %s is %s: %s", target, state_names[state], why);
  json_open(out, '{');
  setting_before_write(out, before);
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
  int problem = boot_id(change->boot, &error) == STI_OK ? change_append(applying->spool, change) : EIO;
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

static StiCode restore_changes(const Spool *spool, Changes *changes, Text *reports, StiError *error) {
  char boot[BOOT_ID_TEXT];
  STI_TRY(changes_read(spool, changes, error));
  if (changes->items == NULL) return STI_OK;
  STI_TRY(boot_id(boot, error));
  restore_all(changes, boot, reports);
  return changes_write(spool, changes, error);
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
  if (changes_read(spool, &changes, &ignored) == STI_OK && changes.count > 0) {
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
