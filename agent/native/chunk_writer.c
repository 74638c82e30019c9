/* chunk_writer.c: see chunk_writer.h. */
#include "chunk_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../sti_runtime/native/threads.h"

/* ------------------------------------------------------------------ the thread */

/* Wait for a batch, a second, or the end; the chunks that waited become the batch. Returns their number. */
static int32_t next_batch(ChunkWriter *writer, bool *closing) {
  struct timespec deadline;
  int waited = 0;
  clock_gettime(CLOCK_MONOTONIC, &deadline);
  deadline.tv_sec++;
  pthread_mutex_lock(&writer->mutex);
  while (!writer->closing && writer->waiting_bytes < BATCH_BYTES && waited == 0)
    waited = pthread_cond_timedwait(&writer->changed, &writer->mutex, &deadline);
  int32_t count = writer->waiting_count, *batch = writer->waiting;
  writer->waiting = writer->batch;
  writer->batch = batch;
  writer->waiting_count = 0;
  writer->waiting_bytes = 0;
  *closing = writer->closing;
  pthread_mutex_unlock(&writer->mutex);
  return count;
}

static int sync_files(const ChunkWriter *writer, int32_t count) {
  const Layout *layout = writer->layout;
  for (int32_t i = 0; i < count; i++) {
    int32_t file = layout->chunks[writer->batch[i]].file;
    bool synced = false;
    for (int32_t k = 0; k < i && !synced; k++) synced = layout->chunks[writer->batch[k]].file == file;
    if (!synced && fsync(writer->fds[file]) != 0) return errno;
  }
  return 0;
}

static StiCode flush(ChunkWriter *writer, int32_t count, StiError *error) {
  const Layout *layout = writer->layout;
  Path folder;
  spool_path(writer->spool, folder, "incoming/%s", layout->digest);
  int problem = sync_files(writer, count);
  if (problem == 0) problem = sync_folder(folder);
  if (problem != 0) return storage_error(error, problem, folder);
  STI_TRY(done_append(writer->spool, layout, writer->batch, count, error));
  for (int32_t i = 0; i < count && writer->read_back; i++) {
    const LayoutChunk *chunk = &layout->chunks[writer->batch[i]];
    if (chunk_stored(writer->fds[chunk->file], chunk, writer->check) == 0) chunk_add(&writer->stored, writer->batch[i]);
  }
  return STI_OK;
}

static void *flush_all(void *state) {
  ChunkWriter *writer = state;
  StiError error = {0};
  for (bool closing = false; !closing;) {
    int32_t count = next_batch(writer, &closing);
    if (count == 0 || error.code != STI_OK || flush(writer, count, &error) == STI_OK) continue;
    pthread_mutex_lock(&writer->mutex);
    writer->problem = error;
    pthread_mutex_unlock(&writer->mutex);
  }
  return NULL;
}

/* ------------------------------------------------------------------ the caller */

static bool allocate(Arena *arena, ChunkWriter *writer) {
  size_t chunks = (size_t)writer->layout->chunk_count, files = (size_t)writer->layout->file_count;
  writer->fds = arena_alloc(arena, files * sizeof *writer->fds);
  writer->block = arena_alloc(arena, COPY_BYTES);
  writer->check = arena_alloc(arena, writer->read_back ? COPY_BYTES : 1);
  writer->waiting = arena_alloc(arena, chunks * sizeof *writer->waiting);
  writer->batch = arena_alloc(arena, chunks * sizeof *writer->batch);
  if (writer->fds == NULL) return false;
  for (size_t i = 0; i < files; i++) writer->fds[i] = -1;
  return writer->block != NULL && writer->check != NULL && writer->waiting != NULL && writer->batch != NULL;
}

StiCode writer_open(Arena *arena, const Spool *spool, const Layout *layout, bool read_back, ChunkWriter *writer,
                    StiError *error) {
  pthread_condattr_t monotonic;
  *writer = (ChunkWriter){.spool = spool, .layout = layout, .read_back = read_back, .arrived = -1};
  if (!allocate(arena, writer)) return sti_out_of_memory(error);
  STI_TRY(chunk_set(arena, layout, &writer->stored, error));
  STI_TRY(arrived_open(spool, layout->digest, &writer->arrived, error));
  pthread_mutex_init(&writer->mutex, NULL);
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&writer->changed, &monotonic);
  pthread_condattr_destroy(&monotonic);
  writer->started = thread_start(&writer->thread, SMALL_STACK_BYTES, flush_all, writer) == 0;
  return writer->started ? STI_OK : sti_out_of_memory(error);
}

/* The file of a chunk, opened if it is not yet. */
static StiCode open_place(ChunkWriter *writer, int32_t chunk, Path path, int *fd, StiError *error) {
  int32_t file = writer->layout->chunks[chunk].file;
  spool_path(writer->spool, path, "incoming/%s/%s", writer->layout->digest, writer->layout->files[file].name);
  if (writer->fds[file] < 0) writer->fds[file] = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
  *fd = writer->fds[file];
  return *fd < 0 ? storage_error(error, errno, path) : STI_OK;
}

StiCode writer_write(ChunkWriter *writer, int32_t chunk, const char *data, size_t length, int64_t done, StiError *error) {
  Path path;
  int fd;
  STI_TRY(open_place(writer, chunk, path, &fd, error));
  int problem = write_whole(fd, data, length, writer->layout->chunks[chunk].offset + done);
  return problem == 0 ? STI_OK : storage_error(error, problem, path);
}

StiCode writer_copy(ChunkWriter *writer, int32_t chunk, int32_t other, StiError *error) {
  const LayoutChunk *from = &writer->layout->chunks[chunk];
  for (int64_t done = 0; done < from->length;) {
    int64_t left = from->length - done;
    ssize_t got = pread(writer->fds[from->file], writer->block, left < COPY_BYTES ? (size_t)left : COPY_BYTES,
                        from->offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      return sti_fail_errno(error, STI_STORAGE_READ, got < 0 ? errno : EIO,
                            "Try again; if it stays so, the storage is failing.", "A chunk cannot be read");
    STI_TRY(writer_write(writer, other, writer->block, (size_t)got, done, error));
    done += got;
  }
  return STI_OK;
}

StiCode writer_add(ChunkWriter *writer, int32_t chunk, StiError *error) {
  char line[16];
  int problem = append_whole(writer->arrived, line, (size_t)snprintf(line, sizeof line, "%d\n", (int)chunk));
  if (problem != 0) return storage_error(error, problem, writer->layout->digest);
  pthread_mutex_lock(&writer->mutex);
  StiCode code = writer->problem.code;
  if (code != STI_OK) {
    *error = writer->problem;
  } else {
    writer->waiting[writer->waiting_count++] = chunk;
    writer->waiting_bytes += writer->layout->chunks[chunk].length;
    if (writer->waiting_bytes >= BATCH_BYTES) pthread_cond_signal(&writer->changed);
  }
  pthread_mutex_unlock(&writer->mutex);
  return code;
}

StiCode writer_close(ChunkWriter *writer, StiError *error) {
  if (writer->arrived >= 0) close(writer->arrived);
  if (!writer->started) return STI_OK;
  pthread_mutex_lock(&writer->mutex);
  writer->closing = true;
  pthread_cond_signal(&writer->changed);
  pthread_mutex_unlock(&writer->mutex);
  pthread_join(writer->thread, NULL);
  pthread_cond_destroy(&writer->changed);
  pthread_mutex_destroy(&writer->mutex);
  for (int32_t i = 0; i < writer->layout->file_count; i++)
    if (writer->fds[i] >= 0) close(writer->fds[i]);
  if (writer->problem.code != STI_OK) *error = writer->problem;
  return writer->problem.code;
}
