/* verbs.c: the table of all verbs. */
#include "verbs.h"

#include <string.h>

#define LEASE " [--lease STORE:COUNTER[:takeover]]"
#define MACHINE " [--engine native|native-int8] [--threads N] [--queue-depth N] [--cpus 0,1] [--isa NAME]"

const Verb verbs[] = {
    {"version", verb_version, "version", "Print version and digest of this agent."},
    {"facts", verb_facts, "facts [--emulated] --spool DIR", "Print what this device is."},
    {"run", verb_run, "run JOB --spool DIR", "Run or resume a job."},
    {"status", verb_status, "status ID ATTEMPT --spool DIR", "Where a job stands."},
    {"stop", verb_stop, "stop ID ATTEMPT --spool DIR", "Ask a job to stop after its unit."},
    {"forget", verb_forget, "forget ID ATTEMPT --spool DIR" LEASE, "Remove a job's folder."},
    {"missing", verb_missing, "missing MANIFEST --spool DIR" LEASE, "Announce a bundle."},
    {"accept", verb_accept, "accept DIGEST [--commit] --spool DIR" LEASE, "Take in chunks from standard input."},
    {"commit", verb_commit, "commit DIGEST --spool DIR" LEASE, "Verify a bundle and make it visible."},
    {"verify", verb_verify, "verify DIGEST --spool DIR" LEASE, "Verify a finished bundle."},
    {"has", verb_has, "has DIGEST... --spool DIR", "Which content is here."},
    {"accept-task", verb_accept_task, "accept-task DIGEST --spool DIR" LEASE, "Take in task data from standard input."},
    {"accept-job", verb_accept_job, "accept-job ID ATTEMPT DIGEST --spool DIR" LEASE,
     "Take in a job file from standard input."},
    {"collect", verb_collect, "collect [--keep DIGEST...] --spool DIR" LEASE, "Remove content not kept."},
    {"restore", verb_restore, "restore --spool DIR", "Put back what a killed agent left changed on the device."},
    {"clean", verb_clean, "clean --spool DIR" LEASE, "Remove everything of ours."},
    {"fit", verb_fit, "fit SAMPLES | --lines", "Make a device profile from samples."},
    {"plan", verb_plan,
     "plan --bundle FOLDER --profile FILE --target TIME [--importance FILE] [--preload SIZE] [--working SIZE]"
     " [--policy NAME] [--no-slack] [--seed N] | --bundle FOLDER [--importance FILE] --lines",
     "Make a plan."},
    {"profile", verb_profile, "profile --bundle FOLDER --task FILE [--out FILE]" MACHINE,
     "Measure this device and fit its profile."},
    {"infer", verb_infer,
     "infer --bundle FOLDER --plan FILE --task FILE [--row N] [--kind cold|warm|cached] [--repeat N]"
     " [--io-mode direct|buffered]" MACHINE,
     "Answer requests with a plan."},
    {"score", verb_score, "score --bundle FOLDER --plan FILE --task FILE [--batch N]" MACHINE,
     "Score a plan on task data."},
    {"session", verb_session,
     "session --bundle FOLDER --task FILE --profile FILE [--importance FILE] [--policy NAME]"
     " [--io-mode direct|buffered]" MACHINE,
     "Answer requests given as lines, planning anew when T, |S| or W changes."},
    {0},
};

const Verb *verb_named(const char *name) {
  for (const Verb *verb = verbs; verb->name != NULL; verb++)
    if (strcmp(verb->name, name) == 0) return verb;
  return NULL;
}
