/* runner.c: the verb `run`: admits a job, resumes at the first unit that is not in the journal, journals every result
 * (docs/job-and-journal.md, 4).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../sti_runtime/native/threads.h"
#include "agent_log.h"
#include "android.h"
#include "arguments.h"
#include "job_records.h"
#include "locks.h"
#include "open_unit.h"
#include "process.h"
#include "settings.h"
#include "signals.h"
#include "units.h"
#include "verbs.h"
#include "waiting.h"

static const double run_lock_wait_s = 5; /* longer than `collect` holds the lock; a running job is not waited for */
static const double gate_poll_s = (double)GATE_POLL_NS / 1e9;

typedef struct {
  const Spool *spool;
  Path folder; /* jobs/<id>/<attempt> */
  Job job;
  Journal journal;
  UnitNote note;
  Settling settling; /* what was read before one unit still counts for the next */
  bool note_failed; /* the note cannot be written: no failure of the unit, the run ends */
  Context *context;
} Run;

/* How a run ended: "ended" (all units journalled), "refused" or "stopped". */
typedef struct {
  const char *state;
  int64_t done, failed;
  int exit_code;
} Ending;

/* ------------------------------------------------------------------ one unit */

/* Sleep in slices until the time is over or a signal came; returns the seconds slept. */
static double sleep_watching(double duration_s) {
  int64_t start = monotonic_ns(), end = start + (int64_t)(duration_s * 1e9);
  for (int64_t now = start; now < end && !stop_requested(); now = monotonic_ns()) {
    int64_t slice = end - now < 100000000 ? end - now : 100000000;
    nanosleep(&(struct timespec){.tv_nsec = (long)slice}, NULL);
  }
  return (double)(monotonic_ns() - start) / 1e9;
}

static void log_verdicts(const Unit *unit, const GateVerdict *verdicts, int count) {
  for (int i = 0; i < count; i++)
    if (verdicts[i].state != GATE_PASS)
      log_warning("Unit %" PRId64 ": gate %s is %s: %s", unit->number, verdicts[i].gate,
                  verdicts[i].state == GATE_FAIL ? "fail" : "ungated", verdicts[i].detail);
}

static StiCode run_open(Run *run, const Unit *unit, const GateVerdict *verdicts, int count, Text *result,
                        StiError *error) {
  log_info("Unit %" PRId64 " (%s) begins", unit->number, unit_kind_names[unit->kind]);
  log_verdicts(unit, verdicts, count);
  waiting_over(run->folder);
  StiCode code = unit_note_begin(&run->note, unit, error);
  run->note_failed = code != STI_OK;
  if (run->note_failed) return code;
  unit_begin();
  code = run_unit(run->context, unit, verdicts, count, result, error);
  unit_end();
  return code;
}

/* The verdicts of the gates now; returns their number. */
static int look(Run *run, GateVerdict verdicts[GATE_COUNT]) {
  const Gates *gates = &run->job.gates;
  int64_t at_ns = monotonic_ns();
  Sensors now;
  sensors_read(run->spool->root, &now);
  if (gates->has_temperature || gates->has_battery) android_complete(&now);
  settling_add(&run->settling, &now, at_ns);
  return gates_check(gates, &now, &run->settling, run->job.cpus, run->job.cpu_count, verdicts);
}

/* Hold the machine, check the gates, run. The machine is not held while waiting for a gate.
 * Errors: STI_STOPPED when a signal came first, STI_GATE when a gate stayed shut for the wait limit; the unit's. */
static StiCode run_gated(Run *run, const Unit *unit, Text *result, StiError *error) {
  const Gates *gates = &run->job.gates;
  GateVerdict verdicts[GATE_COUNT];
  char causes[GATE_CAUSES];
  bool timed = unit_is_timed(unit->kind);
  double limit_s = (double)gates->wait_limit_s, waited_s = 0;
  settling_recent(&run->settling, monotonic_ns());
  for (;;) {
    Lock machine;
    STI_TRY(lock_hold_machine(run->job.machine_lock, timed, stop_requested, &machine, error));
    int count = timed ? look(run, verdicts) : 0;
    bool open = !gates_shut(verdicts, count);
    StiCode code = open ? run_open(run, unit, verdicts, count, result, error) : STI_OK;
    lock_release(&machine);
    if (open) return code;
    if (waited_s >= limit_s) {
      waiting_over(run->folder);
      return gates_error(verdicts, count, waited_s, gates, error);
    }
    gates_causes(verdicts, count, causes);
    if (waited_s <= 0) log_info("Unit %" PRId64 " waits for its gates: %s", unit->number, causes);
    waiting_note(run->folder, causes);
    waited_s += sleep_watching(limit_s - waited_s < gate_poll_s ? limit_s - waited_s : gate_poll_s);
    if (stop_requested()) return STI_STOPPED;
  }
}

/* Run one unit and journal its result or failure; a result that cannot be a record becomes a failure.
 * Errors: STI_STOPPED when a signal came first; journal_append's and unit_note_begin's for what storage refuses. */
static StiCode attempt_unit(Run *run, const Unit *unit, StiError *error) {
  Text result = {0};
  StiError failure = {0};
  StiCode code = unit_note_verdict(&run->note, unit, &failure);
  if (code == STI_OK) code = run_gated(run, unit, &result, &failure);
  bool appending = code == STI_OK;
  if (appending) code = append_result(&run->journal, unit, &result, &failure);
  text_free(&result);
  if (code == STI_STOPPED && unit_abandoned())
    log_warning("Unit %" PRId64 " abandoned at the second signal; it runs again on resume", unit->number);
  if (code == STI_OK || code == STI_STOPPED) return code;
  failure.code = code;
  if (!run->note_failed && (!appending || code == STI_FORMAT || code == STI_RESOURCE))
    return append_failure(&run->journal, unit, &failure, error);
  *error = failure;
  return code;
}

/* ------------------------------------------------------------------ all units */

static StiCode run_remaining(Run *run, char reason[REASON_CHARS], StiError *error) {
  reason[0] = '\0';
  for (int32_t i = 0; i < run->job.unit_count; i++) {
    const Unit *unit = &run->job.units[i];
    if (journal_unit_finished(&run->journal.state, unit->number)) continue;
    STI_TRY(fence_still_admits(run->spool, &run->job.lease, reason, error));
    if (reason[0]) log_warning("Superseded before unit %" PRId64 ": %s", unit->number, reason);
    if (reason[0]) return STI_OK;
    if (stop_requested()) return STI_STOPPED;
    STI_TRY(attempt_unit(run, unit, error));
  }
  return STI_OK;
}

static int64_t first_unfinished(const Run *run) {
  int64_t number = 0;
  while (number < run->job.unit_count && journal_unit_finished(&run->journal.state, number)) number++;
  return number;
}

static StiCode run_in_context(Run *run, char reason[REASON_CHARS], StiError *error) {
  STI_TRY(context_open(&run->job, run->spool->root, &run->context, error));
  StiCode code = run_remaining(run, reason, error);
  context_close(run->context);
  return code;
}

/* Write `start`, run what is not in the journal. STI_STOPPED: a signal ended it early. */
static StiCode run_set(Run *run, char reason[REASON_CHARS], StiError *error) {
  Text settings = {0};
  int64_t first = first_unfinished(run);
  bool remains = first < run->job.unit_count;
  settings_apply(run->spool, &run->job, remains, &settings);
  StiCode code = settings.failed ? sti_out_of_memory(error) : STI_OK;
  if (code == STI_OK) code = append_start(&run->journal, &run->job, run->spool, first, &settings, error);
  text_free(&settings);
  return code == STI_OK && remains ? run_in_context(run, reason, error) : code;
}

/* run_set, then put the device's settings back, however it ended, and write `end`. */
static StiCode run_units(Run *run, StiError *error) {
  char reason[REASON_CHARS] = "", refused[REASON_CHARS + 20];
  Text settings = {0};
  StiError problem = {0};
  StiCode code = run_set(run, reason, error);
  if (settings_restore(run->spool, &settings, &problem) != STI_OK) log_error("%s", problem.what);
  if (code == STI_OK && settings.failed) code = sti_out_of_memory(error);
  snprintf(refused, sizeof refused, "superseded: %s", reason);
  if (code == STI_OK) code = append_end(&run->journal, reason[0] ? refused : NULL, &settings, error);
  text_free(&settings);
  return code;
}

/* run_units with the note of the running unit, removed however it ends. */
static StiCode run_noting(Run *run, StiError *error) {
  STI_TRY(unit_note_open(run->folder, &run->note, error));
  StiCode code = run_units(run, error);
  waiting_over(run->folder);
  unit_note_remove(&run->note);
  return code;
}

static void conclude(const Run *run, Ending *ending) {
  const JournalState *state = &run->journal.state;
  *ending = (Ending){.done = state->done.count, .failed = state->failed.count};
  if (!state->has_end) {
    ending->state = "stopped";
    ending->exit_code = 128 + stop_signal();
    log_info("Stopped by signal %d after %" PRId64 " of %" PRId32 " units", stop_signal(), journal_finished(state),
             run->job.unit_count);
  } else if (state->refused != NULL) {
    ending->state = "refused";
    ending->exit_code = sti_exit_code(STI_REFUSED);
  } else {
    ending->state = "ended";
    log_info("Ended: %" PRId64 " units done, %" PRId64 " failed", ending->done, ending->failed);
  }
}

/* The part under the spool's run lock, with the journal open. */
static StiCode run_journal(Run *run, Ending *ending, StiError *error) {
  const JournalState *state = &run->journal.state;
  if (!state->has_end) {
    if (journal_of_others(state, &run->job.lease))
      return sti_fail(error, STI_REFUSED, "A new lease needs a new attempt number.",
                      "%s: was begun under another lease.", run->journal.path);
    STI_TRY(write_pid(run->folder, error));
    StiCode code = run_noting(run, error);
    remove_pid(run->folder);
    if (code != STI_OK && code != STI_STOPPED) return code;
  }
  conclude(run, ending);
  return STI_OK;
}

static StiCode run_held(Run *run, Ending *ending, StiError *error) {
  Path path;
  path_below(path, run->folder, "journal.log");
  STI_TRY(journal_open(path, &run->journal, error));
  StiCode code = run_journal(run, ending, error);
  journal_close(&run->journal);
  return code;
}

/* ------------------------------------------------------------------ admission */

/* STI_REFUSED unless this is the job's device, with its engine and CPUs. */
static StiCode check_device(const Run *run, StiError *error) {
  const Job *job = &run->job;
  char here[IDENTITY_TEXT];
  const char *source;
  STI_TRY(device_identity(run->spool, here, &source, error));
  if (strcmp(job->device, here) != 0)
    return sti_fail(error, STI_REFUSED, "Probe the device again: its address may have passed to another one.",
                    "The job is for device %.200s, this is %s.", job->device, here);
  if (job->engine != ENGINE_NATIVE && job->engine != ENGINE_NATIVE_INT8)
    return sti_fail(error, STI_REFUSED, "Deploy the engine's own agent.",
                    "The job wants engine '%s', this agent has 'native' and 'native-int8'.", engine_names[job->engine]);
  int problem = job->cpu_count > 0 ? cpus_pin(job->cpus, job->cpu_count) : 0; /* before it starts threads */
  if (problem == 0) return STI_OK;
  Text cpus = {0};
  for (int32_t i = 0; i < job->cpu_count; i++) text_printf(&cpus, "%s%" PRId32, i ? ", " : "", job->cpus[i]);
  sti_fail(error, STI_REFUSED, "Correct the device's cpus in the inventory.",
           "The agent cannot be pinned to CPUs [%.200s]: %s.", cpus.data == NULL ? "" : cpus.data, strerror(problem));
  text_free(&cpus);
  return STI_REFUSED;
}

static StiCode append_refusal(Run *run, const Lease *lease, const char *refused, StiError *error) {
  Path path;
  path_below(path, run->folder, "journal.log");
  STI_TRY(journal_open(path, &run->journal, error));
  const JournalState *state = &run->journal.state;
  bool ours = !state->has_end && !journal_of_others(state, lease);
  StiCode code = ours ? append_end(&run->journal, refused, NULL, error) : STI_OK;
  journal_close(&run->journal);
  return code;
}

/* Journal the refusal in *error, if this journal is the lease's to write and nobody is writing it; lease NULL: it is
 * not known. Returns STI_REFUSED, or the error that stopped the journalling. */
static StiCode record_refusal(Run *run, const Lease *lease, StiError *error) {
  Lock lock;
  StiError problem = {0};
  Text refused = {0};
  StiCode code = hold_run(run->spool, 0, "", &lock, &problem);
  if (code == STI_BUSY) {
    log_warning("Another job runs; the refusal is not journalled");
    return STI_REFUSED;
  }
  if (code == STI_OK) {
    text_printf(&refused, "%s%s%s", error->what, error->remedy[0] ? " " : "", error->remedy);
    code = refused.failed ? sti_out_of_memory(&problem) : append_refusal(run, lease, refused.data, &problem);
    lock_release(&lock);
  }
  text_free(&refused);
  if (code == STI_OK) return STI_REFUSED;
  *error = problem;
  return code;
}

static StiCode read_job(Arena *arena, const char *path, Job *job, StiError *error) {
  Arena file = {0};
  const char *data;
  size_t length;
  StiCode code = read_file(&file, path, JOB_CAP_BYTES, &data, &length, error);
  if (code == STI_OK) code = job_parse(arena, data, length, path, job, error);
  arena_free(&file);
  return code;
}

/* Whether the job lies in its own folder, is for this device, and its lease is let in. */
static StiCode admit(const Run *run, const char *path, StiError *error) {
  char place[100];
  size_t folder = strlen(run->folder), length;
  snprintf(place, sizeof place, "/%s/%" PRId64, run->job.id, run->job.attempt);
  length = strlen(place);
  if (folder < length || strcmp(run->folder + folder - length, place) != 0)
    return sti_fail(error, STI_REFUSED, "Push it to its own folder.", "%s: holds job %s.", path, place + 1);
  STI_TRY(check_device(run, error));
  return fence_admit(run->spool, &run->job.lease, error);
}

static StiCode admit_and_run(Arena *arena, Run *run, Ending *ending, StiError *error) {
  Path path;
  char label[100];
  Lock lock;
  Isa isa;
  path_below(path, run->folder, "job.json");
  STI_TRY(forced_isa(&isa, error));
  STI_TRY(agent_digest_known(error));
  StiCode code = read_job(arena, path, &run->job, error);
  if (code == STI_REFUSED) return record_refusal(run, NULL, error);
  if (code != STI_OK) return code;
  code = admit(run, path, error);
  if (code == STI_REFUSED) return record_refusal(run, &run->job.lease, error);
  if (code != STI_OK) return code;
  snprintf(label, sizeof label, "%s/%" PRId64, run->job.id, run->job.attempt);
  STI_TRY(hold_run(run->spool, run_lock_wait_s, label, &lock, error));
  code = run_held(run, ending, error);
  lock_release(&lock);
  return code;
}

/* ------------------------------------------------------------------ the verb */

/* The last component of a path, cut off in place. */
static const char *cut_name(char *path) {
  char *slash = strrchr(path, '/');
  if (slash == NULL) return "";
  *slash = '\0';
  return slash + 1;
}

/* <root>/jobs/<id>/<attempt> of a job file that lies there. Errors: STI_INPUT unless it has this one form. */
static StiCode job_folder(const char *given, const Spool *spool, Path folder, StiError *error) {
  Path resolved, whole, expected;
  bool there = realpath(given, resolved) != NULL && is_file(resolved);
  if (there) {
    memcpy(whole, resolved, sizeof whole);
    there = strcmp(cut_name(resolved), "job.json") == 0;
  }
  if (there) {
    const char *attempt = cut_name(resolved), *id = cut_name(resolved);
    STI_TRY(spool_job(spool, id, attempt, folder, error));
    there = realpath(folder, expected) != NULL && strncmp(whole, expected, strlen(expected)) == 0 &&
            strcmp(whole + strlen(expected), "/job.json") == 0;
  }
  if (there) return STI_OK;
  return sti_fail(error, STI_INPUT, "Job files lie at jobs/<id>/<attempt>/job.json of the spool.",
                  "%.1000s: not a job file of this spool.", given);
}

static StiCode run_logged(Run *run, Ending *ending, StiError *error) {
  Path path;
  Arena arena = {0};
  path_below(path, run->folder, "agent.log");
  STI_TRY(log_open(path, error));
  signals_install();
  StiCode code = admit_and_run(&arena, run, ending, error);
  if (code != STI_OK) log_error("%s: %s %s", sti_error_name(code), error->what, error->remedy);
  arena_free(&arena);
  log_close();
  return code;
}

StiCode verb_run(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  Arguments arguments;
  Spool spool;
  Ending ending = {0};
  STI_TRY(arguments_open(argc, argv, 1, 0, &arguments, &spool, error));
  Run *run = calloc(1, sizeof *run);
  if (run == NULL) return sti_out_of_memory(error);
  run->spool = &spool;
  StiCode code = job_folder(arguments.words[0], &spool, run->folder, error);
  if (code == STI_OK) code = run_logged(run, &ending, error);
  free(run);
  if (code != STI_OK) return code;
  *exit_code = ending.exit_code;
  json_open(out, '{');
  json_int_field(out, "done", ending.done);
  json_int_field(out, "failed", ending.failed);
  json_text_field(out, "state", ending.state);
  json_close(out, '}');
  return STI_OK;
}
