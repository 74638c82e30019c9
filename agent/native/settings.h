/* settings.h: what a job changes on the device, and that it is put back (docs/job-and-journal.md, 8).
 *
 * Each change is a line of settings.journal, on storage before anything is changed. At the end of the run each value is put
 * back, last change first, and the file removed; what a killed agent leaves is put back by the next verb that finds nobody
 * running. A setting that cannot be changed or put back is reported, logged, and no error.
 */
#ifndef AGENT_SETTINGS_H
#define AGENT_SETTINGS_H

#include "job.h"
#include "spool.h"

/* Change what the job asks for, if `wanted`; appends the list of reports. Under the run lock. */
void settings_apply(const Spool *spool, const Job *job, bool wanted, Text *reports);
/* Put back what the journal tells of; appends the list of reports. Under the run lock.
 * Errors: STI_FORMAT, STI_RESOURCE when it cannot be read, storage_error's when it cannot be removed. */
StiCode settings_restore(const Spool *spool, Text *reports, StiError *error);
/* At every contact: put back what a killed agent left, unless one runs now; told in its job's log. What fails is told there
 * and tried again at the next contact. */
void settings_restore_left(const Spool *spool);
/* Put back what there is, under the run lock. Errors: STI_REFUSED naming what cannot be put back. */
StiCode settings_check_restored(const Spool *spool, StiError *error);

#endif
