/* verbs.h: the executable's command line. Each verb gets its arguments and appends one line of canonical JSON to *out.
 *
 * Usage errors are STI_INPUT. main prints *out, or {"error": {"remedy", "type", "what"}}, and returns the exit code.
 */
#ifndef AGENT_VERBS_H
#define AGENT_VERBS_H

#include "../../sti_runtime/native/base.h"

/* argv[0] is the verb. *exit_code: 0 unless the verb sets another one (run: 3 refused, 128 + signal). */
typedef StiCode VerbFunction(int argc, char **argv, Text *out, int *exit_code, StiError *error);

/* docs/job-and-journal.md, section 7: the verbs every agent has */
VerbFunction verb_version, verb_facts, verb_run, verb_status, verb_stop, verb_forget, verb_missing, verb_accept,
    verb_commit, verb_verify, verb_has, verb_accept_task, verb_accept_job, verb_collect, verb_restore, verb_clean;

/* docs/engine.md: the runtime without a host */
VerbFunction verb_fit;     /* samples -> device profile */
VerbFunction verb_plan;    /* bundle + importance + profile + T + |S| + W -> plan */
VerbFunction verb_profile; /* measure this device and fit */
VerbFunction verb_infer;   /* one request of a plan: logits, latency, trace */
VerbFunction verb_score;   /* a plan's score on task data */
VerbFunction verb_session; /* requests as JSON lines on standard input; replans when T, |S| or W changes */

typedef struct {
  const char *name;
  VerbFunction *call;
  const char *usage; /* name and arguments, one line or more */
  const char *text;  /* what it does */
} Verb;
extern const Verb verbs[]; /* in the order of the usage text; ends with a NULL name */
const Verb *verb_named(const char *name); /* NULL if there is none */

#endif
