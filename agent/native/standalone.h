/* standalone.h: options and set-up of the verbs that run the whole runtime without a host: profile, infer, score,
 * session (docs/engine.md). */
#ifndef AGENT_STANDALONE_H
#define AGENT_STANDALONE_H

#include "context.h"

enum { STANDALONE_CPUS = 64 };

typedef struct {
  const char *bundle, *task;                      /* every verb's */
  const char *plan, *profile, *importance, *out;  /* paths, NULL: not given */
  int64_t row, repeat, batch;
  int64_t threads, queue_depth; /* 0: not given */
  RequestKind kind;
  IoMode io_mode;
  EngineName engine;            /* ENGINE_TORCH: not given */
  Isa isa;
  Policy policy;
  int32_t cpus[STANDALONE_CPUS];
  int cpu_count;
} Options;

/* One verb's own options as bits: what it does not take is refused. TAKES_PLAN and TAKES_PROFILES also require theirs. */
typedef enum { TAKES_PLAN = 1, TAKES_REQUEST = 2, TAKES_BATCH = 4, TAKES_PROFILES = 8, TAKES_OUT = 16 } Takes;

/* argv[0] is the verb. --bundle and --task are required. Errors: STI_INPUT. */
StiCode options_parse(int argc, char **argv, unsigned takes, Options *options, StiError *error);

/* A job and context as the options say: no spool, no lease, no device. What is not given: every CPU this process may use,
 * queue depth 8, fp32. */
typedef struct { Job job; Context *context; } Standalone;
StiCode standalone_open(const Options *options, Standalone *standalone, StiError *error);
void standalone_close(Standalone *standalone);

/* What a verb does once it is set up; result into out. */
typedef StiCode Action(const Options *options, Standalone *standalone, Arena *arena, Text *out, StiError *error);
StiCode standalone_act(Action *action, const Options *options, Text *out, StiError *error);

StiCode read_plan(Arena *arena, const char *path, Plan *plan, StiError *error);

#endif
