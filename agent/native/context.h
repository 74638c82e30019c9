/* context.h: what the units of one job share: bundle, task data, engine, executor. Each is opened when first used. */
#ifndef AGENT_CONTEXT_H
#define AGENT_CONTEXT_H

#include <pthread.h>

#include "task_data.h"
#include "throttle.h"
#include "units.h"

struct Context {
  const Job *job;
  const char *spool;  /* where sensors are read and probe files are written */
  char *bundle_folder; /* NULL: the job names no bundle */
  char *task_file;     /* NULL: the job names no task data */
  Isa isa;             /* ISA_AUTO unless forced */

  Resident *resident; /* being read since the context was opened, until the engine takes it */
  bool fetching;      /* the task data, by the thread */
  pthread_t fetcher;

  Arena arena; /* what the manifest points to */
  AgentThrottle device;
  bool has_manifest;
  Manifest manifest;
  TaskData task;
  int32_t *input_ids, *token_types; /* [L] each: the row of the current request */
  Engine *engine;
  Executor *executor;
};

/* A context over a bundle folder and a task-data file anywhere, either NULL. The paths are copied. */
StiCode context_open_at(const Job *job, const char *spool, const char *bundle_folder, const char *task_file,
                        Context **context, StiError *error);

/* Errors of all of these: STI_INPUT when the job names no such thing, and what opening it raises. */
StiCode context_manifest(Context *context, const Manifest **manifest, StiError *error);
StiCode context_task(Context *context, const TaskData **data, StiError *error);
StiCode context_executor(Context *context, Executor **executor, StiError *error);
/* One row of the task data; valid until the next call. */
StiCode context_request(Context *context, int64_t row, Request *request, StiError *error);

/* STI_STOPPED once a second signal abandoned the unit: asked between requests and reads. */
StiCode unit_stopped(void);

#endif
