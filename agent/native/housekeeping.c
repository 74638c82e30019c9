/* housekeeping.c: what is kept on the device and what goes: the verbs `has`, `collect`, `forget` and `clean`.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arguments.h"
#include "identity.h"
#include "incoming.h"
#include "job.h"
#include "locks.h"
#include "process.h"
#include "settings.h"
#include "verbs.h"

enum { DIGEST_CHARS = 64 };

/* ------------------------------------------------------------------ what is here */

/* Whether the folder of that name holds the manifest that it is named after. */
static bool holds_manifest(const Spool *spool, const char *kind, const char *digest) {
  Path path;
  char found[65] = "";
  spool_path(spool, path, "%s/%s/" MANIFEST_FILE, kind, digest);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bool holds = digest_of_file(fd, found) == 0 && strcmp(found, digest) == 0;
  close(fd);
  return holds;
}

static bool is_here(const Spool *spool, const char *kind, const char *digest) {
  Path path;
  if (strcmp(kind, "tasks") != 0) return holds_manifest(spool, kind, digest);
  spool_path(spool, path, "tasks/%s.safetensors", digest);
  return is_file(path);
}

/* Of sorted digests, each once. */
static void write_here(Text *out, const Spool *spool, const char *kind, char *const *digests, int count) {
  json_key(out, kind), json_open(out, '[');
  for (int i = 0; i < count; i++)
    if ((i == 0 || strcmp(digests[i], digests[i - 1]) != 0) && is_here(spool, kind, digests[i]))
      json_text(out, digests[i]);
  json_close(out, ']');
}

/* How much there is of each one's task data that is on its way. */
static void write_partial(Text *out, const Spool *spool, char *const *digests, int count) {
  json_key(out, "partial"), json_open(out, '{');
  for (int i = 0; i < count; i++) {
    Path path;
    struct stat status;
    spool_path(spool, path, "tasks/%s.partial", digests[i]);
    bool again = i > 0 && strcmp(digests[i], digests[i - 1]) == 0;
    if (again || lstat(path, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size == 0) continue;
    json_int_field(out, digests[i], status.st_size);
  }
  json_close(out, '}');
}

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* With what `version` says and who the device is, so that one answer settles a deploy. */
StiCode verb_has(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  char identity[IDENTITY_TEXT];
  const char *source;
  STI_TRY(arguments_open(argc, argv, 0, TAKES_DIGESTS, &arguments, &spool, error));
  STI_TRY(agent_digest_known(error));
  STI_TRY(device_identity(&spool, identity, &source, error));
  for (int i = 0; i < arguments.digest_count; i++) STI_TRY(check_digest(arguments.digests[i], error));
  if (arguments.digest_count > 0)
    qsort(arguments.digests, (size_t)arguments.digest_count, sizeof *arguments.digests, by_text);
  json_open(out, '{');
  json_text_field(out, "agent", agent_version());
  json_text_field(out, "agent_digest", agent_digest());
  write_here(out, &spool, "bundles", arguments.digests, arguments.digest_count);
  json_text_field(out, "identity", identity);
  write_here(out, &spool, "incoming", arguments.digests, arguments.digest_count);
  write_partial(out, &spool, arguments.digests, arguments.digest_count);
  json_int_field(out, "protocol", PROTOCOL_VERSION);
  write_here(out, &spool, "tasks", arguments.digests, arguments.digest_count);
  json_close(out, '}');
  return STI_OK;
}

/* ------------------------------------------------------------------ collect */

/* What stays: the digests asked for, and those of a job that runs ("" for none). */
typedef struct {
  char **digests; /* [count] */
  int count;
  char bundle[65], task[65];
} Kept;

/* The digest a file of ours is named after; false for other names. */
static bool named_after(const char *name, char digest[DIGEST_CHARS + 1]) {
  static const char *const endings[] = {"", ".done", ".arrived", ".manifest", ".safetensors", ".partial"};
  if (strlen(name) < DIGEST_CHARS) return false;
  memcpy(digest, name, DIGEST_CHARS);
  digest[DIGEST_CHARS] = '\0';
  if (!is_digest(digest)) return false;
  for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++)
    if (strcmp(name + DIGEST_CHARS, endings[i]) == 0) return true;
  return false;
}

static bool is_kept(const Kept *kept, const char *digest) {
  for (int i = 0; i < kept->count; i++)
    if (strcmp(kept->digests[i], digest) == 0) return true;
  return strcmp(kept->bundle, digest) == 0 || strcmp(kept->task, digest) == 0;
}

/* Names are sorted, so that what is named after one digest lies together. */
static StiCode remove_names(const Spool *spool, const char *kind, const Names *names, const Kept *kept, Text *out,
                            StiError *error) {
  char last[DIGEST_CHARS + 1] = "";
  for (size_t i = 0; i < names->count; i++) {
    char digest[DIGEST_CHARS + 1];
    Path path;
    bool named = named_after(names->names[i], digest);
    if (named && is_kept(kept, digest)) continue;
    if (strlen(names->names[i]) >= NAME_CHARS) continue;
    spool_path(spool, path, "%s/%s", kind, names->names[i]);
    STI_TRY(remove_whole(path, error));
    if (!named || strcmp(digest, last) == 0) continue;
    json_text(out, digest);
    memcpy(last, digest, sizeof last);
  }
  return STI_OK;
}

static StiCode remove_others(const Spool *spool, const Kept *kept, Text *out, StiError *error) {
  static const char *const kinds[] = {"bundles", "incoming", "tasks"};
  for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
    Arena arena = {0};
    Names names;
    Path folder;
    spool_path(spool, folder, "%s", kinds[i]);
    json_key(out, kinds[i]), json_open(out, '[');
    StiCode code = list_folder(&arena, folder, &names, error);
    if (code == STI_OK) code = remove_names(spool, kinds[i], &names, kept, out, error);
    json_close(out, ']');
    arena_free(&arena);
    if (code != STI_OK) return code;
    int problem = sync_folder(folder);
    if (problem != 0) return storage_error(error, problem, folder);
  }
  return STI_OK;
}

/* Keep what the job under the run lock's label needs. */
static StiCode keep_running(const Spool *spool, Kept *kept, StiError *error) {
  char label[LABEL_CHARS];
  Path path, folder;
  Arena arena = {0};
  const char *data;
  size_t length;
  Job job;
  spool_path(spool, path, "locks/run");
  lock_read_label(path, label);
  char *slash = strchr(label, '/');
  if (slash == NULL || slash[1] == '\0')
    return sti_fail(error, STI_BUSY, "Try again in a moment.", "Another agent process is starting.");
  *slash = '\0';
  STI_TRY(spool_job(spool, label, slash + 1, folder, error));
  path_below(path, folder, "job.json");
  StiCode code = read_file(&arena, path, JOB_CAP_BYTES, &data, &length, error);
  if (code == STI_OK) code = job_parse(&arena, data, length, path, &job, error);
  if (code == STI_OK) {
    memcpy(kept->bundle, job.bundle, sizeof kept->bundle);
    memcpy(kept->task, job.task_data, sizeof kept->task);
  }
  arena_free(&arena);
  return code;
}

/* While the run lock is held here no job starts; while a job holds it, that job is named in it. */
static StiCode collect(const Spool *spool, Kept *kept, Text *out, StiError *error) {
  Lock lock;
  StiCode code = hold_run(spool, 0, "", &lock, error);
  if (code == STI_BUSY) {
    STI_TRY(keep_running(spool, kept, error));
    return remove_others(spool, kept, out, error);
  }
  if (code != STI_OK) return code;
  code = remove_others(spool, kept, out, error);
  lock_release(&lock);
  return code;
}

/* Remove bundles, half-sent bundles and task data that are not kept; a running job's always are. */
StiCode verb_collect(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Lock lock;
  STI_TRY(arguments_open(argc, argv, 0, TAKES_LEASE | TAKES_KEEP, &arguments, &spool, error));
  Kept kept = {.digests = arguments.digests, .count = arguments.digest_count};
  for (int i = 0; i < kept.count; i++) STI_TRY(check_digest(kept.digests[i], error));
  STI_TRY(hold_deploy(&spool, &lock, error));
  json_open(out, '{');
  json_key(out, "removed"), json_open(out, '{');
  StiCode code = collect(&spool, &kept, out, error);
  json_close(out, '}');
  json_close(out, '}');
  lock_release(&lock);
  return code;
}

/* ------------------------------------------------------------------ forget */

/* Remove one job's folder, journal included. */
StiCode verb_forget(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Path folder, parent;
  STI_TRY(arguments_open(argc, argv, 2, TAKES_LEASE, &arguments, &spool, error));
  const char *id = arguments.words[0], *attempt = arguments.words[1];
  STI_TRY(spool_job(&spool, id, attempt, folder, error));
  if (running_pid(folder) != 0)
    return sti_fail(error, STI_BUSY, "Stop it first.", "Job %s/%s is running.", id, attempt);
  bool present = is_folder(folder);
  if (present) {
    STI_TRY(remove_whole(folder, error));
    spool_path(&spool, parent, "jobs/%s", id);
    rmdir(parent); /* refused while it holds other attempts */
  }
  json_open(out, '{');
  json_bool_field(out, "removed", present);
  json_close(out, '}');
  return STI_OK;
}

/* ------------------------------------------------------------------ clean */

/* Temporary files that a killed agent of ours left in the spool's root: .<one of ours>.… */
static bool is_leftover(const char *name) {
  static const char *const probes[] = {"direct-io", "probe", NULL};
  const char *const *const ours[] = {spool_owned, probes};
  if (name[0] != '.') return false;
  size_t stem = strcspn(name + 1, ".");
  for (size_t i = 0; i < sizeof ours / sizeof ours[0]; i++)
    for (const char *const *one = ours[i]; *one != NULL; one++)
      if (strcspn(*one, ".") == stem && strncmp(*one, name + 1, stem) == 0) return true;
  return false;
}

static StiCode remove_one(const Spool *spool, const char *name, Text *out, StiError *error) {
  Path path;
  struct stat status;
  spool_path(spool, path, "%s", name);
  if (lstat(path, &status) != 0) return STI_OK;
  STI_TRY(remove_whole(path, error));
  json_text(out, name);
  return STI_OK;
}

static StiCode clean(const Spool *spool, Text *out, StiError *error) {
  Arena arena = {0};
  Names names;
  StiCode code = list_folder(&arena, spool->root, &names, error);
  for (size_t i = 0; code == STI_OK && spool_owned[i] != NULL; i++)
    code = remove_one(spool, spool_owned[i], out, error);
  for (size_t i = 0; code == STI_OK && i < names.count; i++)
    if (is_leftover(names.names[i])) code = remove_one(spool, names.names[i], out, error);
  arena_free(&arena);
  int problem = code == STI_OK ? sync_folder(spool->root) : 0;
  return problem == 0 ? code : storage_error(error, problem, spool->root);
}

/* Under the run lock. */
static StiCode clean_held(const Spool *spool, Text *out, StiError *error) {
  Lock deploy;
  STI_TRY(settings_check_restored(spool, error));
  STI_TRY(hold_deploy(spool, &deploy, error));
  json_open(out, '{');
  json_key(out, "removed"), json_open(out, '[');
  StiCode code = clean(spool, out, error);
  json_close(out, ']');
  json_close(out, '}');
  lock_release(&deploy);
  return code;
}

/* Remove everything of ours from the spool; the folder itself stays, and what others put there. */
StiCode verb_clean(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Lock run;
  STI_TRY(arguments_open(argc, argv, 0, TAKES_LEASE, &arguments, &spool, error));
  STI_TRY(hold_run(&spool, 0, "", &run, error));
  StiCode code = clean_held(&spool, out, error);
  lock_release(&run);
  return code;
}
