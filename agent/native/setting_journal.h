/* setting_journal.h: settings.journal: what was changed on the device and is to be put back (docs/job-and-journal.md, 8). */
#ifndef AGENT_SETTING_JOURNAL_H
#define AGENT_SETTING_JOURNAL_H

#include "identity.h"
#include "journal_format.h"
#include "setting_targets.h"

enum { JOB_LABEL = 96 };

/* One line of the journal: `target` was `before`, `job` sets it to `value`. */
typedef struct {
  SettingText before, value;
  char boot[BOOT_ID_TEXT], job[JOB_LABEL];
  TargetText target;
} Change;

typedef struct {
  Change *items; /* [count] */
  int count;
} Changes;

void setting_before_write(Text *out, const SettingText *before); /* "before": the value, null where not set */

/* Append one line, on storage; the file is as before if it cannot be. Returns 0 or errno. */
int change_append(const Spool *spool, const Change *change);
/* Every good line, at most SETTING_REPORTS_MOST; none where there is no journal. Free changes->items.
 * Errors: STI_FORMAT, STI_RESOURCE. */
StiCode changes_read(const Spool *spool, Changes *changes, StiError *error);
/* Make the journal hold these changes; remove it when there are none. Errors: storage_error's, STI_RESOURCE. */
StiCode changes_write(const Spool *spool, const Changes *changes, StiError *error);

#endif
