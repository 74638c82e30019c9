/* io_side.h: the threads that read, and what they and the compute thread share.
 *
 * The reads of one request (or of one fill, or of one layer apart) are a session. They are issued strictly in order, up
 * to queue_depth in flight; a read into the working buffer is issued when its bytes are free there, and the ones behind
 * it wait for it. Reads of a layer begin when little is in flight of the layers before: enough to keep the storage busy
 * across the border, too little to hold up what is waited for. One session at a time: the caller holds its own lock.
 */
#ifndef STI_IO_SIDE_H
#define STI_IO_SIDE_H

#include <pthread.h>
#include <stdatomic.h>

#include "buffers.h"
#include "embedding_rows.h"
#include "engine.h"
#include "pipeline.h"
#include "storage.h"

/* A merged read of versions that are neighbours in one region. */
typedef struct {
  int32_t layer;        /* of the session */
  int32_t first, count; /* shards[index[first … first + count)] */
  int32_t file;         /* of the storage */
  bool placed;          /* loaded[…].data says where to; else into the working buffer */
  int64_t offset, length;
} Read;

/* How far the reads of one layer are. Times of CLOCK_MONOTONIC, 0 before the first read. */
typedef struct {
  _Atomic int32_t missing; /* versions */
  int64_t start_ns, end_ns, bytes;
  int64_t held_bytes; /* of the working buffer */
  int32_t running;    /* reads in flight */
} LayerIo;

typedef struct {
  /* set by the caller */
  const Storage *storage;
  const RowReads *rows;       /* NULL: none */
  const PlannedShard *shards; /* [shard_count] */
  const int32_t *index;       /* positions in shards, in read order */
  const Read *reads;          /* [read_count] in order, behind the rows */
  int32_t shard_count, read_count;
  LoadedShard *loaded; /* [shard_count] where each version is */
  bool *arrived;       /* [shard_count] it was read and is good */
  LayerIo *layers;     /* [layer_count] `missing` set, the rest 0 */
  int32_t layer_count;
  _Atomic int32_t rows_missing, unread; /* page runs; versions */
  /* of the threads */
  int32_t next, running; /* first read not issued; reads in flight */
  int64_t running_bytes;
  int64_t start_ns, end_ns;
  int32_t failed_read; /* the first in order: in flight with others, it may not be the first in time */
  _Atomic bool failed;
  bool stopped;
} Session;

typedef struct {
  const Engine *engine;
  Throttle throttle;
  int32_t *cpus; /* [cpu_count] the threads may run on; NULL: as the thread that starts them */
  int cpu_count;
  int queue_depth;

  pthread_t *threads; /* [queue_depth], thread_count started */
  int *counters;      /* [queue_depth] of the threads that run, joined of them */
  int thread_count, joined;
  bool closing;

  pthread_mutex_t lock; /* guards all below, and the session */
  pthread_cond_t work;  /* a read may be issued */
  pthread_cond_t ready; /* what the compute thread waits for */
  int idle;             /* threads that wait for work */
  Ring working;
  Session *session; /* NULL: none */
  StiError error;   /* of the session's failed_read */
} IoSide;

StiCode io_open(IoSide *side, const Engine *engine, const ExecutorOptions *options, StiError *error);
void io_close(IoSide *side);

/* Start the threads, once. Errors: STI_RESOURCE. */
StiCode io_start(IoSide *side, StiError *error);
/* Bytes fetched from storage by the threads so far; -1 where the kernel does not say. */
int64_t io_storage_bytes(IoSide *side);

void io_begin(IoSide *side, Session *session);
/* Wait until *count, a counter of the session, is 0. False when the session failed before. */
bool io_wait(IoSide *side, Session *session, _Atomic int32_t *count);
/* A layer was computed: its bytes of the working buffer are free. */
void io_release(IoSide *side, Session *session, int32_t layer);
/* Let no further read start, wait for those in flight, empty the working buffer. Errors: of its first failed read. */
StiCode io_end(IoSide *side, Session *session, StiError *error);
/* Wait for the last read, then the same. */
StiCode io_finish(IoSide *side, Session *session, StiError *error);

#endif
