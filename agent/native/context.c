/* context.c: see context.h. */
#include "context.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../sti_runtime/native/threads.h"
#include "identity.h"
#include "signals.h"

/* ------------------------------------------------------------------ opening and closing */

/* Have the kernel begin to read the task data, on a thread: a file's name alone may have to come from the storage. That
 * it cannot be read is found out by who reads it. */
static void *fetch_task(void *path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return NULL;
  posix_fadvise(file, 0, 0, POSIX_FADV_WILLNEED);
  close(file);
  return NULL;
}

/* What is wanted soon is read beside what is wanted first, the manifest. */
static void fetch_ahead(Context *context) {
  if (context->bundle_folder != NULL) context->resident = resident_begin(context->bundle_folder);
  if (context->task_file == NULL) return;
  context->fetching = thread_start(&context->fetcher, SMALL_STACK_BYTES, fetch_task, context->task_file) == 0;
}

StiCode context_open_at(const Job *job, const char *spool, const char *bundle_folder, const char *task_file,
                        Context **context, StiError *error) {
  Context *opened = calloc(1, sizeof *opened);
  if (opened == NULL) return sti_out_of_memory(error);
  opened->job = job;
  opened->spool = spool;
  opened->task.fd = -1;
  throttle_open(&opened->device, job);
  opened->bundle_folder = bundle_folder == NULL ? NULL : strdup(bundle_folder);
  opened->task_file = task_file == NULL ? NULL : strdup(task_file);
  StiCode code = forced_isa(&opened->isa, error);
  if ((bundle_folder != NULL && opened->bundle_folder == NULL) || (task_file != NULL && opened->task_file == NULL))
    code = sti_out_of_memory(error);
  if (code != STI_OK) {
    context_close(opened);
    return code;
  }
  fetch_ahead(opened);
  *context = opened;
  return STI_OK;
}

StiCode context_open(const Job *job, const char *spool, Context **context, StiError *error) {
  char *bundle = NULL, *task = NULL;
  bool named = (!job->bundle[0] || asprintf(&bundle, "%s/bundles/%s", spool, job->bundle) >= 0) &&
               (!job->task_data[0] || asprintf(&task, "%s/tasks/%s.safetensors", spool, job->task_data) >= 0);
  StiCode code = named ? context_open_at(job, spool, bundle, task, context, error) : sti_out_of_memory(error);
  free(bundle);
  free(task);
  return code;
}

void context_close(Context *context) {
  if (context == NULL) return;
  if (context->fetching) pthread_join(context->fetcher, NULL);
  resident_drop(context->resident);
  executor_close(context->executor);
  engine_close(context->engine);
  task_data_close(&context->task);
  throttle_close(&context->device);
  arena_free(&context->arena);
  free(context->input_ids);
  free(context->token_types);
  free(context->bundle_folder);
  free(context->task_file);
  free(context);
}

StiCode unit_stopped(void) { return unit_abandoned() ? STI_STOPPED : STI_OK; }

/* ------------------------------------------------------------------ what units ask for */

static int at_most_int(int64_t value) { return value > INT_MAX ? INT_MAX : (int)value; }

StiCode context_manifest(Context *context, const Manifest **manifest, StiError *error) {
  *manifest = &context->manifest;
  if (context->bundle_folder == NULL)
    return sti_fail(error, STI_INPUT, "", "Job %s names no bundle, but a unit needs one.", context->job->id);
  if (context->has_manifest) return STI_OK;
  StiCode code = bundle_open(&context->arena, context->bundle_folder, NULL, &context->manifest, error);
  context->has_manifest = code == STI_OK;
  if (code != STI_OK) arena_free(&context->arena);
  return code;
}

StiCode context_task(Context *context, const TaskData **data, StiError *error) {
  if (context->task_file == NULL)
    return sti_fail(error, STI_INPUT, "", "Job %s names no task data, but a unit needs rows.", context->job->id);
  if (context->task.fd < 0) STI_TRY(task_data_open(context->task_file, &context->task, error));
  *data = &context->task;
  return STI_OK;
}

StiCode context_executor(Context *context, Executor **executor, StiError *error) {
  const Job *job = context->job;
  const Manifest *manifest;
  STI_TRY(context_manifest(context, &manifest, error));
  if (context->engine == NULL) {
    EngineOptions options = {.threads = at_most_int(job->threads),
                             .mode = job->engine == ENGINE_NATIVE_INT8 ? MODE_INT8 : MODE_FP32,
                             .isa = context->isa,
                             .cpus = job->cpu_count > 0 ? job->cpus : NULL,
                             .cpu_count = job->cpu_count,
                             .resident = context->resident};
    context->resident = NULL;
    STI_TRY(engine_open(manifest, context->bundle_folder, &options, &context->engine, error));
  }
  if (context->executor == NULL) {
    ExecutorOptions options = {.manifest = manifest,
                               .folder = context->bundle_folder,
                               .engine = context->engine,
                               .queue_depth = at_most_int(job->queue_depth),
                               .throttle = throttle_for(&context->device),
                               .cpus = job->cpu_count > 0 ? job->cpus : NULL,
                               .cpu_count = job->cpu_count};
    STI_TRY(executor_open(&options, &context->executor, error));
  }
  *executor = context->executor;
  return STI_OK;
}

StiCode context_request(Context *context, int64_t row, Request *request, StiError *error) {
  const TaskData *data = &context->task;
  STI_TRY(context_task(context, &data, error));
  if (row < 0 || row >= data->rows)
    return sti_fail(error, STI_INPUT, "", "Row %" PRId64 " of task data that has %" PRId64 " rows was asked for.", row,
                    data->rows);
  if (context->input_ids == NULL) context->input_ids = calloc((size_t)data->tokens, sizeof *context->input_ids);
  if (context->token_types == NULL) context->token_types = calloc((size_t)data->tokens, sizeof *context->token_types);
  if (context->input_ids == NULL || context->token_types == NULL) return sti_out_of_memory(error);
  *request = (Request){.input_ids = context->input_ids, .token_types = context->token_types, .tokens = data->tokens};
  return task_data_row(data, row, context->input_ids, context->token_types, &request->length, error);
}
