/* fence.h: which controller may start things here, by the lease counters seen so far (docs/job-and-journal.md, 5).
 *
 * fence.json holds the store that owns the device and the highest counter seen of every store. A lower counter of the
 * same store is a stale controller; another store needs an explicit take-over. So does a fence that is damaged: nobody
 * knows whose the device is.
 */
#ifndef AGENT_FENCE_H
#define AGENT_FENCE_H

#include "job.h"
#include "spool.h"

enum { STORE_CHARS = 64, STORE_BYTES = 4 * STORE_CHARS + 1, REASON_CHARS = 800 };

/* A lease that holds its store's name itself. */
typedef struct { Lease lease; char store[STORE_BYTES]; } LeaseText;
bool lease_copy(const Lease *lease, LeaseText *copy); /* false when the store's name is too long */
bool lease_equal(const Lease *a, const Lease *b);

/* STORE:COUNTER or STORE:COUNTER:takeover. Errors: STI_INPUT. */
StiCode lease_parse(const char *text, LeaseText *lease, StiError *error);

/* Let the lease in and remember it durably, or refuse. A take-over writes a damaged fence anew. Errors: STI_REFUSED, STI_FORMAT, STI_BUSY, storage_error's. */
StiCode fence_admit(const Spool *spool, const Lease *lease, StiError *error);

StiCode fence_refused(const char *reason, StiError *error); /* STI_REFUSED, with what to do */

/* Why a job that was let in with the lease must stop now; "" while it may go on. A take-over counts once: after another
 * store has taken the device, the flag opens nothing. Errors: STI_FORMAT. */
StiCode fence_still_admits(const Spool *spool, const Lease *lease, char reason[REASON_CHARS], StiError *error);

#endif
