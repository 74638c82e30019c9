/* chunk_writer.h: writing chunks to their places: noted at once, then flushed and listed beside whoever brings them.
 *
 * A thread does the flushing, so that a link never waits for storage; it takes all that was written so far at once, so
 * that slow flushing makes fewer of them. The caller holds the spool's deploy lock.
 */
#ifndef AGENT_CHUNK_WRITER_H
#define AGENT_CHUNK_WRITER_H

#include <pthread.h>

#include "incoming.h"

enum { BATCH_BYTES = 8 << 20 }; /* chunks are flushed when as much was written, or after a second */

typedef struct {
  const Spool *spool;
  const Layout *layout;
  bool read_back;
  int *fds;            /* [file_count], -1: not yet open; opened by the caller, before it adds a chunk of the file */
  int arrived;         /* the list of what is not flushed yet */
  char *block, *check; /* [COPY_BYTES] the caller's, the thread's */
  ChunkSet stored;     /* read from storage again and right there; the thread's until it was joined */
  pthread_t thread;
  bool started;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  /* shared, under the mutex */
  int32_t *waiting, *batch; /* [chunk_count] whole chunks to be flushed; those the thread is at */
  int32_t waiting_count;
  int64_t waiting_bytes;
  bool closing;
  StiError problem; /* what stopped the flushing; code STI_OK: nothing */
} ChunkWriter;

/* To be closed whether it opened or not. read_back: read what was flushed from storage again, into `stored`. */
StiCode writer_open(Arena *arena, const Spool *spool, const Layout *layout, bool read_back, ChunkWriter *writer,
                    StiError *error);
/* Bytes of a chunk, from its byte `done` on. Errors: storage_error's. */
StiCode writer_write(ChunkWriter *writer, int32_t chunk, const char *data, size_t length, int64_t done, StiError *error);
/* Write to `other` what was written to `chunk`, which has the same bytes. Errors: storage_error's, STI_STORAGE_READ. */
StiCode writer_copy(ChunkWriter *writer, int32_t chunk, int32_t other, StiError *error);
/* The chunk is whole: note, flush and list it. Errors: storage_error's, what stopped the flushing. */
StiCode writer_add(ChunkWriter *writer, int32_t chunk, StiError *error);
/* Wait for all of it. After an error, what was not listed comes again. Errors: what stopped the flushing. */
StiCode writer_close(ChunkWriter *writer, StiError *error);

#endif
