/* accept_job.c: the verb `accept-job`: a job file comes on standard input and is there whole and flushed, or not at all.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"
#include "arguments.h"
#include "incoming.h"
#include "input.h"
#include "job.h"
#include "signals.h"
#include "verbs.h"

/* What lies at `path`: "already" for the job asked for, "other" for another whole one, NULL for none: nothing, or a file
 * that a power cut has torn. */
static StiCode look_at_held(Arena *arena, const char *path, const char *digest, const char **state, StiError *error) {
  const char *data;
  size_t length;
  char found[65];
  Job job;
  StiError ignored;
  *state = NULL;
  if (!is_file(path) || file_bytes(path) > JOB_CAP_BYTES) return STI_OK;
  STI_TRY(read_file(arena, path, JOB_CAP_BYTES, &data, &length, error));
  sha256_hex(data, length, found);
  if (strcmp(found, digest) == 0) {
    *state = "already";
    return STI_OK;
  }
  StiCode code = job_parse(arena, data, length, path, &job, &ignored);
  if (code == STI_RESOURCE) return sti_out_of_memory(error);
  if (code == STI_OK || code == STI_REFUSED) *state = "other"; /* refused: a newer agent's */
  return STI_OK;
}

/* All there is, up to one byte over the cap. Errors: STI_RESOURCE. */
static StiCode read_rest(Input *input, Text *data, StiError *error) {
  size_t got = 1;
  while (data->length <= JOB_CAP_BYTES && got > 0) {
    const char *piece = input_piece(input, (int64_t)(JOB_CAP_BYTES + 1 - data->length), &got);
    text_append(data, piece, got);
    if (data->failed) return sti_out_of_memory(error);
  }
  return STI_OK;
}

/* Make jobs/<id>/<attempt>. Returns 0 or errno. */
static int make_job_folder(const Spool *spool, const char *id, const char *folder) {
  Path jobs, parent;
  spool_path(spool, jobs, "jobs");
  spool_path(spool, parent, "jobs/%s", id);
  int problem = mkdir(parent, 0777) == 0 || errno == EEXIST ? 0 : errno;
  if (problem == 0 && mkdir(folder, 0777) != 0 && errno != EEXIST) problem = errno;
  if (problem == 0) problem = sync_folder(jobs);
  return problem == 0 ? sync_folder(parent) : problem;
}

static StiCode take_input(Arena *arena, Text *data, const char *path, const char *digest, StiError *error) {
  Input input;
  char found[65];
  STI_TRY(input_open(arena, STDIN_FILENO, &input, error));
  STI_TRY(read_rest(&input, data, error));
  sha256_hex(data->data == NULL ? "" : data->data, data->length, found);
  if (strcmp(found, digest) == 0) return STI_OK;
  return sti_fail(error, STI_DIGEST, RESEND, "%s: what came is not the job file, nor all of it (%zu bytes).", path,
                  data->length);
}

static StiCode take_job(Arena *arena, const Spool *spool, const char *const words[], const char **state, StiError *error) {
  Path folder, path;
  Text data = {0};
  STI_TRY(check_digest(words[2], error));
  STI_TRY(spool_job(spool, words[0], words[1], folder, error));
  path_below(path, folder, "job.json");
  STI_TRY(look_at_held(arena, path, words[2], state, error));
  if (*state != NULL) return STI_OK;
  *state = "accepted";
  StiCode code = take_input(arena, &data, path, words[2], error);
  int problem = code == STI_OK ? make_job_folder(spool, words[0], folder) : 0;
  if (problem != 0) code = storage_error(error, problem, path);
  if (code == STI_OK) code = write_atomic(path, data.data, data.length, error);
  text_free(&data);
  return code;
}

StiCode verb_accept_job(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  const char *state = NULL;
  Arena arena = {0};
  signals_install();
  STI_TRY(arguments_open(argc, argv, 3, TAKES_LEASE, &arguments, &spool, error));
  StiCode code = take_job(&arena, &spool, arguments.words, &state, error);
  arena_free(&arena);
  if (code != STI_OK) return code;
  json_open(out, '{');
  json_text_field(out, "digest", arguments.words[2]);
  json_text_field(out, "state", state);
  json_close(out, '}');
  return STI_OK;
}
