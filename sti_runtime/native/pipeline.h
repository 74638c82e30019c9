/* pipeline.h: the executor: an IO side that reads shards in plan order beside the compute thread.
 *
 *     IO threads      | embedding rows | reads of layer 0 | reads of layer 1 | …
 *     compute threads                  | embedding |..stall..| layer 0 | layer 1 | … | head |
 *
 * Semantics are those of sti_runtime/pipeline.py and pipeline_io.py: merged reads are issued in plan order, up to
 * queue_depth in flight (also across the border of two layers: storage does not run dry at a layer's last read); a read
 * is issued when its bytes are free in the working buffer; a layer's bytes are freed when it has been computed; the
 * preload buffer keeps bottom layers and evicts from the top; every sample records the mode asked for and the mode
 * proven. One request at a time, from one thread.
 */
#ifndef STI_PIPELINE_H
#define STI_PIPELINE_H

#include "engine.h"

typedef enum { IO_DIRECT, IO_BUFFERED } IoMode;
typedef enum { REQUEST_SPAWN_COLD, REQUEST_COLD, REQUEST_WARM, REQUEST_CACHED } RequestKind;

/* Slows an emulated device; NULL members: not limited. Called on the thread that read or computed. */
typedef struct {
  void *state;
  void (*after_read)(void *state, int64_t started_ns, int64_t bytes); /* returns when the device would have delivered */
  int64_t (*section_begin)(void *state);                 /* before a section of compute: CPU time of the process */
  void (*section_end)(void *state, int64_t begun_cpu_ns, int64_t begun_ns); /* sleeps what the share owes */
} Throttle;

typedef struct {
  const int32_t *input_ids;   /* [L] */
  const int32_t *token_types; /* [L] */
  int32_t tokens, length;     /* L, real tokens */
} Request;

typedef struct {
  int64_t io_start_ns, io_end_ns, bytes, compute_start_ns, compute_end_ns, decompress_ns, stall_ns;
} LayerTrace; /* from the request's start */

typedef struct {
  float *logits;       /* [labels], 0 without a head */
  int32_t logit_count;
  const float *hidden; /* [L, H], valid until the next request */
  LayerTrace *trace;   /* [layer_count] */
  int32_t layer_count;
  int64_t started_ns, latency_ns, stall_ns, planned_bytes, storage_bytes;
  int64_t embed_io_ns, embed_compute_ns, head_ns, embed_bytes;
  bool io_not_accounted, not_from_storage, not_cached; /* reasons why the sample is invalid */
  IoMode io_mode; /* in use, which is not the one asked for where storage refused it */
} Outcome; /* logits and trace belong to the executor, valid until its next request */

typedef struct {
  const Manifest *manifest; /* must outlive the executor */
  const char *folder;       /* the bundle's */
  Engine *engine;           /* likewise */
  int queue_depth;
  Throttle throttle;
  const int32_t *cpus;      /* [cpu_count] the reading threads may run on; NULL: those of the thread that opens */
  int cpu_count;
} ExecutorOptions;

typedef struct Executor Executor;

StiCode executor_open(const ExecutorOptions *options, Executor **executor, StiError *error);
void executor_close(Executor *executor); /* NULL is allowed */

/* The mode in use for what is asked (opens the files and proves direct IO on first use). Errors: STI_STORAGE_READ. */
StiCode executor_io_mode(Executor *executor, IoMode asked, IoMode *in_use, StiError *error);
/* Drop the bundle's pages from the page cache when the mode in use is buffered. */
StiCode executor_evict(Executor *executor, IoMode asked, StiError *error);
/* Bytes that the kernel has read from storage for the reading threads so far; below 0: it does not count. */
int64_t executor_storage_bytes(Executor *executor);

/* Bring the preload buffer to what the plan preloads: evict from the top, read what is missing. */
StiCode executor_fill(Executor *executor, const Plan *plan, IoMode io_mode, StiError *error);
/* One request. Errors: STI_FORMAT (another bundle's plan), STI_INPUT, STI_RESOURCE, STI_STORAGE_READ; all buffers are
 * returned and the next request runs. */
StiCode executor_run(Executor *executor, const Plan *plan, const Request *request, RequestKind kind, IoMode io_mode,
                     Outcome *outcome, StiError *error);
/* The request path without layers: embedding reads, their sum and norm, the head. */
StiCode executor_run_fixed(Executor *executor, const Request *request, IoMode io_mode, Outcome *outcome,
                           StiError *error);

typedef struct {
  LoadedShard *shards; /* [count] */
  int32_t count;
  int64_t bytes, storage_bytes /* -1: not accounted */, duration_ns;
} LayerLoad;
/* Read the shards of one layer as a request would, apart from any request, into working memory of their size. May be
 * called from a second thread while the first computes (profile-compute reads beside). */
StiCode executor_load_layer(Executor *executor, const PlannedShard *shards, int32_t count, IoMode io_mode,
                            LayerLoad *load, StiError *error);
void executor_drop_layer(Executor *executor, LayerLoad *load);
/* Decompress and compute one loaded layer, throttled; times include the throttle's waits. */
void executor_compute_layer(Executor *executor, int32_t source_layer, const LayerLoad *load, LayerTimes *times);

typedef struct { int64_t resident, preload, working, activations; } MemoryParts; /* peak bytes since executor_reset */
MemoryParts executor_memory(const Executor *executor);
void executor_reset(Executor *executor); /* empty the buffers, return their memory, count peaks anew */

/* Task score: rows in batches, weights read shard by shard (untimed). logits [rows, labels].
 * input_ids, token_types [rows, L]; lengths [rows]. */
StiCode executor_evaluate(Executor *executor, const Plan *plan, const int32_t *input_ids, const int32_t *token_types,
                          const int32_t *lengths, int64_t rows, int32_t tokens, int32_t batch, float *logits,
                          bool (*stopping)(void), StiError *error);

#endif
