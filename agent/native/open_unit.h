/* open_unit.h: the unit that is running, noted beside the journal: how an agent learns what its predecessor was killed
 * in (docs/job-and-journal.md, section 4).
 *
 * A limit on memory that is enforced by killing leaves the agent no time for a record. So each unit is noted before it
 * begins, and the note is removed when the process leaves the job by itself: what a resumed agent finds was left by one
 * that was killed. It counts within one boot only, so it need not be flushed: what a process has written outlives it.
 */
#ifndef AGENT_OPEN_UNIT_H
#define AGENT_OPEN_UNIT_H

#include "identity.h"
#include "job.h"

enum { KILL_LIMIT = 2 }; /* so many times may the agent be killed in one unit before the unit is a failure */

typedef struct {
  int fd;
  Path path;
  char boot[BOOT_ID_TEXT];
  /* What the note said when it was opened: kills 0 where it said nothing. */
  int64_t unit, kills;   /* the agent was killed in this unit so often, since the last boot */
  int64_t oom_kills;     /* the kernel's count when the unit first began, -1: not known */
} UnitNote;

/* The note of the job in `folder`, opened for writing. Errors: storage_error's, STI_INPUT. */
StiCode unit_note_open(const char *folder, UnitNote *note, StiError *error);
void unit_note_remove(UnitNote *note);
/* Note that the unit runs from now on. Errors: storage_error's: no failure of the unit, the run ends. */
StiCode unit_note_begin(const UnitNote *note, const Unit *unit, StiError *error);
/* STI_RESOURCE when the agent was killed in the unit too often for it to run again. Logs what is known of it. */
StiCode unit_note_verdict(const UnitNote *note, const Unit *unit, StiError *error);

/* Processes that the kernel's out-of-memory killer has ended since boot, control groups' included; -1 where the kernel
 * does not say. Source: mm/oom_kill.c (OOM_KILL of /proc/vmstat, since Linux 4.13). */
int64_t oom_kills_now(void);

#endif
