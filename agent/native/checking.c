/* checking.c: whether what lies in a bundle's folder is what its manifest says (declared in incoming.h).
 *
 * Chunks are hashed by a few threads, each taking the next one: reads stay sequential, hashing keeps up with storage.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../sti_runtime/native/threads.h"
#include "incoming.h"

enum { CHECK_THREADS = 4, ALONE_BYTES = 8 << 20 };

int digest_of_piece(int fd, int64_t offset, int64_t length, char *block, char hex[65]) {
  Sha256 hash;
  sha256_begin(&hash);
  for (int64_t done = 0; done < length;) {
    int64_t left = length - done;
    ssize_t got = pread(fd, block, left < COPY_BYTES ? (size_t)left : COPY_BYTES, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) {
      hex[0] = '\0';
      return 0;
    }
    sha256_add(&hash, block, (size_t)got);
    done += got;
  }
  sha256_end(&hash, hex);
  return 0;
}

int digest_of_file(int fd, char hex[65]) {
  struct stat status;
  char *block = pages_alloc(COPY_BYTES);
  int problem = block == NULL ? ENOMEM : fstat(fd, &status) != 0 ? errno : 0;
  if (problem == 0) problem = digest_of_piece(fd, 0, status.st_size, block, hex);
  pages_free(block, COPY_BYTES);
  return problem;
}

/* ------------------------------------------------------------------ chunks */

/* What the threads share. */
typedef struct {
  const char *folder;
  const Layout *layout;
  const bool *stored;   /* [chunk_count], NULL: none was read before */
  bool *damaged;        /* [chunk_count], each written by one thread */
  atomic_int next;      /* chunk to be taken next */
  atomic_int problem;   /* errno of the first read that storage failed */
  atomic_int bad_file;  /* which file that was */
} Check;

/* A regular file, not a link; -1 otherwise. */
static int open_file(const char *folder, const char *name) {
  Path path;
  struct stat status;
  path_below(path, folder, name);
  int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (fd >= 0 && (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode))) {
    close(fd);
    fd = -1;
  }
  return fd;
}

int chunk_stored(int fd, const LayoutChunk *chunk, char *block) {
  char hex[65] = "";
  posix_fadvise(fd, chunk->offset, chunk->length, POSIX_FADV_DONTNEED);
  int problem = digest_of_piece(fd, chunk->offset, chunk->length, block, hex);
  posix_fadvise(fd, chunk->offset, chunk->length, POSIX_FADV_DONTNEED);
  if (problem != 0) return problem;
  return strcmp(hex, chunk->sha256) == 0 ? 0 : EBADMSG;
}

static void check_chunk(Check *check, int fd, int32_t number, char *block) {
  const LayoutChunk *chunk = &check->layout->chunks[number];
  int problem = fd < 0 ? EBADMSG : chunk_stored(fd, chunk, block), none = 0;
  check->damaged[number] = problem != 0;
  if (problem != 0 && problem != EBADMSG && atomic_compare_exchange_strong(&check->problem, &none, problem))
    atomic_store(&check->bad_file, chunk->file);
}

/* Takes chunks until there is none left; without memory the other threads take them. */
static void *check_chunks(void *state) {
  Check *check = state;
  char *block = pages_alloc(COPY_BYTES);
  int32_t file = -1, number;
  int fd = -1;
  while (block != NULL && (number = atomic_fetch_add(&check->next, 1)) < check->layout->chunk_count) {
    if (check->stored != NULL && check->stored[number]) continue;
    if (check->layout->chunks[number].file != file) {
      if (fd >= 0) close(fd);
      file = check->layout->chunks[number].file;
      fd = open_file(check->folder, check->layout->files[file].name);
    }
    check_chunk(check, fd, number, block);
  }
  if (fd >= 0) close(fd);
  pages_free(block, COPY_BYTES);
  return NULL;
}

/* What is in the page cache says nothing about storage; only what is on storage can be dropped from it. */
static void drop_cached(const char *folder, const Layout *layout) {
  for (int32_t i = 0; i < layout->file_count; i++) {
    int fd = open_file(folder, layout->files[i].name);
    if (fd < 0) continue;
    fsync(fd); /* where storage fails, reading says so */
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
  }
}

static int thread_count(const Layout *layout) {
  int cpus = cpus_allowed(NULL, 0);
  if (layout_bytes(layout) < ALONE_BYTES) return 1;
  return cpus == 0 ? 2 : cpus < CHECK_THREADS ? cpus : CHECK_THREADS;
}

StiCode chunks_damaged(Arena *arena, const char *folder, const Layout *layout, const ChunkSet *stored,
                       ChunkSet *damaged, StiError *error) {
  pthread_t threads[CHECK_THREADS];
  int started = 0, wanted = thread_count(layout);
  STI_TRY(chunk_set(arena, layout, damaged, error));
  Check check = {.folder = folder, .layout = layout, .damaged = damaged->has};
  if (stored != NULL) check.stored = stored->has;
  drop_cached(folder, layout);
  while (started < wanted - 1 && thread_start(&threads[started], SMALL_STACK_BYTES, check_chunks, &check) == 0) started++;
  check_chunks(&check);
  while (started > 0) pthread_join(threads[--started], NULL);
  drop_cached(folder, layout);
  if (atomic_load(&check.next) < layout->chunk_count) return sti_out_of_memory(error);
  if (atomic_load(&check.problem) != 0)
    return sti_fail_errno(error, STI_STORAGE_READ, atomic_load(&check.problem),
                          "Try again; if it stays so, the storage is failing.", "%s/%s: cannot be read", folder,
                          layout->files[atomic_load(&check.bad_file)].name);
  for (int32_t i = 0; i < layout->chunk_count; i++) damaged->count += damaged->has[i];
  return STI_OK;
}

/* ------------------------------------------------------------------ files */

/* Which of the layout's files the name is, -1 if it is none. */
static int32_t file_named(const Layout *layout, const char *name) {
  for (int32_t i = 0; i < layout->file_count; i++)
    if (strcmp(layout->files[i].name, name) == 0) return i;
  return -1;
}

static bool has_size(const char *folder, const LayoutFile *file) {
  Path path;
  struct stat status;
  path_below(path, folder, file->name);
  return lstat(path, &status) == 0 && status.st_size == file->bytes;
}

/* The lesser of two names; NULL is none. */
static const char *earlier(const char *a, const char *b) {
  return a == NULL || (b != NULL && strcmp(b, a) < 0) ? b : a;
}

StiCode check_files(Arena *arena, const char *folder, const Layout *layout, StiError *error) {
  Names names;
  const char *odd = NULL;
  STI_TRY(list_folder(arena, folder, &names, error));
  for (size_t i = 0; i < names.count; i++)
    if (strcmp(names.names[i], MANIFEST_FILE) != 0 && file_named(layout, names.names[i]) < 0)
      odd = earlier(odd, names.names[i]);
  for (int32_t i = 0; i < layout->file_count; i++)
    if (!has_size(folder, &layout->files[i])) odd = earlier(odd, layout->files[i].name);
  if (odd == NULL) return STI_OK;
  return sti_fail(error, STI_FORMAT, "Run `collect` without keeping this bundle, then deploy it again.",
                  "%s: %.200s is missing, of a wrong size, or does not belong there.", folder, odd);
}
