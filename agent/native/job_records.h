/* job_records.h: what a run writes into its journal: the four kinds of payload. Errors: journal_append's. */
#ifndef AGENT_JOB_RECORDS_H
#define AGENT_JOB_RECORDS_H

#include "journal.h"

/* The agent starts or resumes the job at `first_unit`. settings: the list of reports, whole; NULL: none. */
StiCode append_start(Journal *journal, const Job *job, const Spool *spool, int64_t first_unit, const Text *settings,
                     StiError *error);
StiCode append_result(Journal *journal, const Unit *unit, const Text *result, StiError *error);
StiCode append_failure(Journal *journal, const Unit *unit, const StiError *failure, StiError *error); /* logged too */
StiCode append_end(Journal *journal, const char *refused, const Text *settings, StiError *error); /* NULL: every unit is in the journal */

#endif
