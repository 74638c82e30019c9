/* units.h: what the agent does for each kind of unit, and what the units of one job share. */
#ifndef AGENT_UNITS_H
#define AGENT_UNITS_H

#include "job.h"
#include "sensors.h"

/* Bundle, task data, engine and executor of one job: opened when a unit first needs them. */
typedef struct Context Context;
StiCode context_open(const Job *job, const char *spool, Context **context, StiError *error); /* opens nothing yet */
void context_close(Context *context);

/* Run one unit; on STI_OK *result holds the canonical JSON of its UnitResult. `gates` are the verdicts that go into an
 * execute result. STI_STOPPED: a second signal came (signals.h). */
StiCode run_unit(Context *context, const Unit *unit, const GateVerdict *gates, int gate_count, Text *result, StiError *error);

/* The child side of spawn-cold: a job of one request on standard input, one record on standard output. */
int spawned_main(const char *spool);

#endif
