/* executor.h: the executor's own state, shared by pipeline.c and evaluate.c. */
#ifndef STI_EXECUTOR_H
#define STI_EXECUTOR_H

#include "io_side.h"

enum { APART_SLOTS = 4 };

/* Memory of one layer that executor_load_layer read. */
typedef struct {
  uint8_t *pages; /* [room] kept for the next layer */
  int64_t room;
  LoadedShard *shards; /* [heads] */
  bool taken;
} Apart;

struct Executor {
  const Manifest *manifest;
  Engine *engine;
  Throttle throttle;
  char *folder;
  Storage storages[2]; /* by the mode asked for */
  bool opened[2];
  pthread_mutex_t busy; /* one session at a time */
  IoSide io;
  Preload preload;
  RowReads rows;
  Apart apart[APART_SLOTS];
  int64_t apart_bytes, apart_peak;

  /* The current session's. N layers of M slices. */
  Session session;
  LoadedShard *loaded;  /* [N · M] */
  bool *arrived;        /* [N · M] */
  int32_t *index;       /* [N · M] */
  MergedRead *merged;   /* [N · M] */
  Read *reads;          /* [N · M] */
  LayerIo *layers;      /* [N] */
  LayerTrace *trace;    /* [N] */
  int64_t *layer_bytes; /* [N] */
  int32_t *last_read;   /* [N] */
  float *logits;        /* [logit_room] */
  int64_t logit_room;
};

/* ------------------------------------------------------------------ executor.c */

void executor_lock(Executor *executor);
StiCode executor_unlock(Executor *executor, StiCode code); /* returns code */
StiCode executor_storage(Executor *executor, IoMode asked, const Storage **storage, StiError *error);

/* ------------------------------------------------------------------ prepare.c: before the clock starts */

/* Check a plan against the bundle and its working buffer. Errors: STI_FORMAT, STI_RESOURCE. */
StiCode executor_check(Executor *executor, const Plan *plan, StiError *error);
/* Threads, and room for the rows and logits of a request of this shape. Errors: STI_RESOURCE. */
StiCode executor_reserve(Executor *executor, int32_t batch, int32_t tokens, StiError *error);
/* Set W. Errors: STI_RESOURCE. */
StiCode executor_size_working(Executor *executor, const Plan *plan, StiError *error);
/* Set |S| and read what is missing of what the plan preloads. Errors: STI_STORAGE_READ, STI_FORMAT, STI_RESOURCE. */
StiCode executor_refill(Executor *executor, const Plan *plan, const Storage *storage, StiError *error);
/* Set |S| and make room for all that the plan preloads, without reading it. Errors: STI_RESOURCE. */
StiCode executor_empty(Executor *executor, const Plan *plan, StiError *error);

/* A session without reads over `count` shards of `depth` layers, in the executor's arrays. */
Session *executor_session(Executor *executor, const Storage *storage, const PlannedShard *shards, int32_t count,
                          int32_t depth);
/* Add the reads of the `count` shards at index[first …], merged. placed: `loaded` says where to. */
void executor_add_reads(Executor *executor, Session *session, int32_t first, int32_t count, bool placed);
/* The reads of a plan. cold: of preloaded shards too; else those are taken from the preload buffer. */
void executor_add_plan(Executor *executor, Session *session, const Plan *plan, bool cold);
/* After a session: let go of preloaded shards that were to be read and were not. */
void executor_drop_unread(Executor *executor, const Session *session);

/* ------------------------------------------------------------------ pipeline.c */

/* One request over checked rows with buffers that are ready; plan NULL: no layers. stopping NULL: never. The outcome's
 * logits are [B, labels]; its verdict is the caller's. Errors: STI_FORMAT, STI_STORAGE_READ, STI_STOPPED. */
StiCode executor_request(Executor *executor, const Plan *plan, const Rows *rows, const Storage *storage, bool cold,
                         bool (*stopping)(void), Outcome *outcome, StiError *error);
/* One layer, throttled; returns when it ended. */
int64_t executor_compute(const Executor *executor, int32_t source_layer, const LoadedShard *shards, int32_t count,
                         LayerTimes *times);

#endif
