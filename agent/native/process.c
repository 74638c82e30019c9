/* process.c: see process.h; and the verbs `status` and `stop`. */
#include "process.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arguments.h"
#include "identity.h"
#include "job.h"
#include "journal.h"
#include "kernel_files.h"
#include "verbs.h"

enum { PID_CAP_BYTES = 4096, START_FIELD = 22, FIRST_FIELD_AFTER_NAME = 3 };

/* ------------------------------------------------------------------ the pid file */

/* Source: proc_pid_stat(5), field 22; the command name may hold blanks and parentheses. The main thread's own file is
 * read, which has the same start time: user-mode emulators show their own figures in the process's. */
bool start_ticks(int64_t pid, int64_t *ticks) {
  char text[2048];
  if (!kernel_text(text, sizeof text, "%s/%lld/task/%lld/stat", kernel_roots.proc, (long long)pid, (long long)pid))
    return false;
  char *rest = strrchr(text, ')'), *field = NULL, *position = NULL;
  if (rest == NULL) return false;
  field = strtok_r(rest + 1, " ", &position);
  if (field == NULL || field[0] == 'Z' || field[0] == 'X') return false;
  for (int number = FIRST_FIELD_AFTER_NAME; number < START_FIELD && field != NULL; number++)
    field = strtok_r(NULL, " ", &position);
  return field != NULL && parse_int(field, ticks);
}

StiCode write_pid(const char *folder, StiError *error) {
  char boot[BOOT_ID_TEXT];
  Path path;
  int64_t ticks;
  Text text = {0};
  STI_TRY(boot_id(boot, error));
  path_below(path, folder, PID_FILE);
  json_open(&text, '{');
  json_text_field(&text, "boot_id", boot);
  json_int_field(&text, "pid", getpid());
  json_key(&text, "start_ticks");
  if (start_ticks(getpid(), &ticks))
    json_int(&text, ticks);
  else
    json_null(&text);
  json_close(&text, '}');
  StiCode code = text.failed ? sti_out_of_memory(error) : write_atomic(path, text.data, text.length, error);
  text_free(&text);
  return code;
}

void remove_pid(const char *folder) {
  Path path;
  path_below(path, folder, PID_FILE);
  unlink(path);
}

static const JsonValue *member_of(const JsonValue *object, const char *key, JsonKind kind) {
  if (object->kind != JSON_OBJECT) return NULL;
  for (size_t i = 0; i < object->object.count; i++) {
    const JsonMember *member = &object->object.members[i];
    if (strcmp(member->key, key) == 0 && member->value->kind == kind) return member->value;
  }
  return NULL;
}

/* The pid in the file, 0 when it is stale. */
static int64_t live_pid(const JsonValue *record) {
  char boot[BOOT_ID_TEXT];
  StiError ignored;
  int64_t ticks;
  const JsonValue *pid = member_of(record, "pid", JSON_INT), *started = member_of(record, "start_ticks", JSON_INT),
                  *of_boot = member_of(record, "boot_id", JSON_STRING);
  if (pid == NULL || started == NULL || of_boot == NULL || pid->integer <= 1 || pid->integer > INT_MAX) return 0;
  if (boot_id(boot, &ignored) != STI_OK || strcmp(boot, of_boot->text.data) != 0) return 0;
  return start_ticks(pid->integer, &ticks) && ticks == started->integer ? pid->integer : 0;
}

int64_t running_pid(const char *folder) {
  Arena arena = {0};
  Path path;
  const char *data;
  size_t length;
  JsonValue *record;
  StiError ignored;
  path_below(path, folder, PID_FILE);
  bool readable = read_file(&arena, path, PID_CAP_BYTES, &data, &length, &ignored) == STI_OK &&
                  json_parse(&arena, data, length, path, &record, &ignored) == STI_OK;
  int64_t pid = readable ? live_pid(record) : 0;
  arena_free(&arena);
  return pid;
}

/* ------------------------------------------------------------------ status */

static StiCode count_units(const char *path, int64_t *units, StiError *error) {
  Arena arena = {0};
  const char *data;
  size_t length;
  Job job;
  StiCode code = read_file(&arena, path, JOB_CAP_BYTES, &data, &length, error);
  if (code == STI_OK) code = job_parse(&arena, data, length, path, &job, error);
  if (code == STI_OK) *units = job.unit_count;
  if (code == STI_REFUSED) error->code = code = STI_FORMAT; /* only `run` refuses */
  arena_free(&arena);
  return code;
}

static void write_status(Text *out, const char *state, int64_t pid, int64_t units, const JournalState *journal) {
  json_open(out, '{');
  json_int_field(out, "done", journal->done.count);
  json_int_field(out, "failed", journal->failed.count);
  json_int_field(out, "journal_bytes", journal->good_bytes);
  json_key(out, "pid");
  if (pid)
    json_int(out, pid);
  else
    json_null(out);
  json_key(out, "refused");
  if (journal->refused != NULL)
    json_text(out, journal->refused);
  else
    json_null(out);
  json_text_field(out, "state", state);
  json_int_field(out, "units", units);
  json_close(out, '}');
}

/* Where a job stands: absent, running, stopped (to be resumed) or ended. */
StiCode verb_status(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Path folder, path;
  int64_t units = 0;
  JournalState journal = {0};
  STI_TRY(arguments_open(argc, argv, 2, 0, &arguments, &spool, error));
  STI_TRY(spool_job(&spool, arguments.words[0], arguments.words[1], folder, error));
  path_below(path, folder, "job.json");
  if (access(path, F_OK) != 0) {
    write_status(out, "absent", 0, 0, &journal);
    return STI_OK;
  }
  STI_TRY(count_units(path, &units, error));
  int64_t pid = running_pid(folder);
  path_below(path, folder, "journal.log");
  StiCode code = journal_scan(path, &journal, error);
  if (code == STI_OK)
    write_status(out, journal.has_end ? "ended" : pid ? "running" : "stopped", pid, units, &journal);
  journal_state_free(&journal);
  return code;
}

/* ------------------------------------------------------------------ stop */

/* Send SIGTERM to the process that runs the job; whether it went out. The handle is bound to one process; the check
 * behind it closes the gap of a reused pid. Kernels before 5.3 have no handles: there the check alone must do. */
static bool terminate(const char *folder, int64_t pid) {
  int handle = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
  if (handle < 0) return errno != ESRCH && running_pid(folder) == pid && kill((pid_t)pid, SIGTERM) == 0;
  bool sent = running_pid(folder) == pid && syscall(SYS_pidfd_send_signal, handle, SIGTERM, NULL, 0) == 0;
  close(handle);
  return sent;
}

/* Ask the process that runs a job to stop after its unit; never signals anything else. */
StiCode verb_stop(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Path folder;
  STI_TRY(arguments_open(argc, argv, 2, 0, &arguments, &spool, error));
  STI_TRY(spool_job(&spool, arguments.words[0], arguments.words[1], folder, error));
  int64_t pid = running_pid(folder);
  bool sent = pid != 0 && terminate(folder, pid);
  json_open(out, '{');
  json_key(out, "signalled");
  if (sent)
    json_int(out, pid);
  else
    json_null(out);
  json_close(out, '}');
  return STI_OK;
}
