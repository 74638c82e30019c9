/* journal.h: appending to a journal so that a record is there whole, or not at all.
 *
 * One record is one write followed by fsync. What a crash leaves half-written at the end is cut off when the job
 * resumes; damage anywhere else is an error.
 */
#ifndef AGENT_JOURNAL_H
#define AGENT_JOURNAL_H

#include "identity.h"
#include "journal_format.h"

typedef struct {
  int64_t count;
  uint64_t bits[(UNIT_CAP + 63) / 64];
} UnitSet;
bool unit_set_has(const UnitSet *set, int64_t unit);

/* What a journal says about its job so far. Zero-initialise. */
typedef struct {
  int64_t next_seq, good_bytes;
  UnitSet done, failed;
  int leases; /* different ones among the start records: 0, 1, or 2 for more than one */
  LeaseText lease; /* the first of them */
  bool has_end;
  char *refused; /* of the end; NULL for null */
} JournalState;

/* Read a journal from its start to its last good record; an absent one is empty. good_bytes is less than the file's
 * size when the end is torn. Memory: one line at a time.
 * Errors: STI_FORMAT when a bad line has a good one behind it, or is longer than a line can be; STI_RESOURCE. */
StiCode journal_scan(const char *path, JournalState *state, StiError *error);
void journal_state_free(JournalState *state);

bool journal_unit_finished(const JournalState *state, int64_t unit);
int64_t journal_finished(const JournalState *state);              /* units that are not run again */
bool journal_of_others(const JournalState *state, const Lease *lease); /* a start of another lease; NULL: of any */

/* A journal open for appending. One process at a time: the caller holds the spool's run lock. */
typedef struct {
  int fd;
  Path path;
  char boot[BOOT_ID_TEXT];
  JournalState state;
} Journal;

/* Opened (made if absent), a torn end cut off. Errors: journal_scan's, storage_error's. */
StiCode journal_open(const char *path, Journal *journal, StiError *error);
void journal_close(Journal *journal);
/* Append one record, given the canonical JSON of its payload, and flush it to storage.
 * Errors: STI_FORMAT if it cannot be a record (nothing was written); storage_error's if storage failed (the file was
 * cut back to its last good record). */
StiCode journal_append(Journal *journal, const Text *payload, StiError *error);

#endif
