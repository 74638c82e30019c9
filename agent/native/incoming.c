/* incoming.c: see incoming.h. */
#include "incoming.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "identity.h"

/* ------------------------------------------------------------------ layout */

static void add_chunk(Layout *layout, int64_t offset, int64_t length, const char *sha256) {
  layout->chunks[layout->chunk_count++] = (LayoutChunk){
      .file = layout->file_count - 1, .next = -1, .offset = offset, .length = length, .sha256 = sha256};
  layout->files[layout->file_count - 1].bytes = offset + length;
}

static StiCode list_chunks(Arena *arena, const Manifest *manifest, Layout *layout, StiError *error) {
  size_t shards = (size_t)manifest->model.layers * (size_t)manifest->model.heads;
  size_t count = shards * (size_t)manifest->region_count;
  for (int32_t i = 0; i < manifest->file_count; i++) count += (size_t)manifest->files[i].chunk_count;
  layout->files = arena_alloc(arena, (size_t)(manifest->region_count + manifest->file_count) * sizeof *layout->files);
  layout->chunks = arena_alloc(arena, count * sizeof *layout->chunks);
  layout->by_digest = arena_alloc(arena, count * sizeof *layout->by_digest);
  if (layout->files == NULL || layout->chunks == NULL || layout->by_digest == NULL) return sti_out_of_memory(error);
  for (int32_t i = 0; i < manifest->region_count; i++) {
    const Region *region = &manifest->regions[i];
    layout->files[layout->file_count++].name = region->file;
    for (size_t k = 0; k < shards; k++)
      add_chunk(layout, region->versions[k].offset, region->versions[k].length, region->versions[k].sha256);
  }
  for (int32_t i = 0; i < manifest->file_count; i++) {
    const DataFile *data = &manifest->files[i];
    layout->files[layout->file_count++].name = data->file;
    for (int32_t k = 0; k < data->chunk_count; k++)
      add_chunk(layout, data->chunks[k].offset, data->chunks[k].length, data->chunks[k].sha256);
  }
  return STI_OK;
}

static int by_digest(const void *a, const void *b, void *state) {
  const LayoutChunk *chunks = state;
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  int order = strcmp(chunks[x].sha256, chunks[y].sha256);
  return order != 0 ? order : (x > y) - (x < y);
}

/* Chain the chunks of equal bytes, in the order of their numbers. */
static StiCode chain_equal(Layout *layout, const char *path, StiError *error) {
  LayoutChunk *chunks = layout->chunks;
  for (int32_t i = 0; i < layout->chunk_count; i++) layout->by_digest[i] = i;
  qsort_r(layout->by_digest, (size_t)layout->chunk_count, sizeof layout->by_digest[0], by_digest, chunks);
  for (int32_t i = 0; i < layout->chunk_count; i++) {
    LayoutChunk *chunk = &chunks[layout->by_digest[i]];
    LayoutChunk *before = i > 0 ? &chunks[layout->by_digest[i - 1]] : NULL;
    chunk->first = layout->by_digest[i];
    if (before == NULL || strcmp(before->sha256, chunk->sha256) != 0) continue;
    chunk->first = before->first;
    before->next = layout->by_digest[i];
    if (before->length != chunk->length)
      return sti_fail(error, STI_FORMAT, "Build it again.", "%s: chunks of one digest have different lengths.", path);
  }
  return STI_OK;
}

StiCode layout_read(Arena *arena, const char *path, Layout *layout, StiError *error) {
  Manifest manifest;
  *layout = (Layout){0};
  STI_TRY(read_file(arena, path, MANIFEST_CAP_BYTES, &layout->data, &layout->data_length, error));
  STI_TRY(manifest_parse(arena, layout->data, layout->data_length, path, &manifest, error));
  memcpy(layout->digest, manifest.digest, sizeof layout->digest);
  STI_TRY(list_chunks(arena, &manifest, layout, error));
  return chain_equal(layout, path, error);
}

StiCode layout_incoming(Arena *arena, const Spool *spool, const char *digest, Layout *layout, StiError *error) {
  Path path;
  STI_TRY(check_digest(digest, error));
  spool_path(spool, path, "incoming/%s/" MANIFEST_FILE, digest);
  if (access(path, F_OK) != 0)
    return sti_fail(error, STI_INPUT, "Call `missing` first.", "Bundle %.12s was not announced to this device.",
                    digest);
  STI_TRY(layout_read(arena, path, layout, error));
  if (strcmp(layout->digest, digest) == 0) return STI_OK;
  return sti_fail(error, STI_DIGEST, RESEND, "%s: this is the manifest of %.12s.", path, layout->digest);
}

int32_t layout_find(const Layout *layout, const char *sha256) {
  int32_t low = 0, high = layout->chunk_count;
  while (low < high) {
    int32_t middle = low + (high - low) / 2;
    if (strcmp(layout->chunks[layout->by_digest[middle]].sha256, sha256) < 0)
      low = middle + 1;
    else
      high = middle;
  }
  bool found = low < layout->chunk_count && strcmp(layout->chunks[layout->by_digest[low]].sha256, sha256) == 0;
  return found ? layout->by_digest[low] : -1;
}

int64_t layout_bytes(const Layout *layout) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < layout->file_count; i++)
    if (__builtin_add_overflow(bytes, layout->files[i].bytes, &bytes)) return INT64_MAX;
  return bytes;
}

/* ------------------------------------------------------------------ the list of verified chunks */

StiCode chunk_set(Arena *arena, const Layout *layout, ChunkSet *set, StiError *error) {
  *set = (ChunkSet){.has = arena_alloc(arena, (size_t)layout->chunk_count * sizeof *set->has)};
  return set->has == NULL ? sti_out_of_memory(error) : STI_OK;
}

void chunk_add(ChunkSet *set, int32_t chunk) {
  set->count += !set->has[chunk];
  set->has[chunk] = true;
}

/* A line as far as it was read: its number, or that it is none. */
typedef struct { int32_t number; int digits; bool bad; } DoneLine;

static void read_done_block(DoneLine *line, const char *block, size_t length, const Layout *layout, ChunkSet *done) {
  for (size_t i = 0; i < length; i++) {
    char c = block[i];
    if (c == '\n') {
      if (!line->bad && line->digits > 0 && line->number < layout->chunk_count) chunk_add(done, line->number);
      *line = (DoneLine){0};
    } else if (c < '0' || c > '9' || ++line->digits >= 10) {
      line->bad = true;
    } else {
      line->number = 10 * line->number + (c - '0');
    }
  }
}

/* Read the numbers of an open list from `offset` on. Returns 0 or errno. */
static int read_list(int fd, off_t offset, const Layout *layout, ChunkSet *done) {
  char block[1 << 14];
  DoneLine line = {0};
  ssize_t got;
  while ((got = pread(fd, block, sizeof block, offset)) > 0) {
    read_done_block(&line, block, (size_t)got, layout, done);
    offset += got;
  }
  return got < 0 ? errno : 0;
}

/* The first line of a list of this boot, with its newline. */
static StiCode boot_line(char line[BOOT_ID_TEXT + 1], size_t *length, StiError *error) {
  STI_TRY(boot_id(line, error));
  *length = strlen(line) + 1;
  line[*length - 1] = '\n';
  return STI_OK;
}

static bool begins_with(int fd, const char *line, size_t length) {
  char found[BOOT_ID_TEXT + 1];
  return pread(fd, found, length, 0) == (ssize_t)length && memcmp(found, line, length) == 0;
}

static StiCode read_kind(const Spool *spool, const Layout *layout, bool arrived, ChunkSet *done, StiError *error) {
  Path path;
  char line[BOOT_ID_TEXT + 1];
  size_t length = 0;
  if (arrived) STI_TRY(boot_line(line, &length, error));
  spool_path(spool, path, "incoming/%s.%s", layout->digest, arrived ? "arrived" : "done");
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 && errno == ENOENT) return STI_OK;
  bool counts = fd >= 0 && (!arrived || begins_with(fd, line, length));
  int problem = fd < 0 ? errno : counts ? read_list(fd, (off_t)length, layout, done) : 0;
  if (fd >= 0) close(fd);
  if (problem == 0) return STI_OK;
  return sti_fail_errno(error, STI_FORMAT, problem, "Check the folder's owner and permissions.", "%s: cannot be read",
                        path);
}

StiCode done_read(Arena *arena, const Spool *spool, const Layout *layout, ChunkSet *done, StiError *error) {
  STI_TRY(chunk_set(arena, layout, done, error));
  STI_TRY(read_kind(spool, layout, false, done, error));
  return read_kind(spool, layout, true, done, error);
}

StiCode arrived_open(const Spool *spool, const char *digest, int *fd, StiError *error) {
  Path path;
  char line[BOOT_ID_TEXT + 1];
  size_t length;
  STI_TRY(boot_line(line, &length, error));
  spool_path(spool, path, "incoming/%s.arrived", digest);
  *fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0666);
  if (*fd < 0) return storage_error(error, errno, path);
  bool ours = begins_with(*fd, line, length);
  if (!ours && ftruncate(*fd, 0) != 0) return storage_error(error, errno, path);
  int problem = ours ? append_whole(*fd, "-\n", 2) /* as in the other list */ : append_whole(*fd, line, length);
  return problem == 0 ? STI_OK : storage_error(error, problem, path);
}

static void list_numbers(Text *lines, const Layout *layout, const ChunkSet *set) {
  for (int32_t i = 0; i < layout->chunk_count; i++)
    if (set->has[i]) text_printf(lines, "%d\n", (int)i);
}

StiCode done_append(const Spool *spool, const Layout *layout, const int32_t *chunks, int32_t count, StiError *error) {
  Path path;
  struct stat status;
  Text lines = {0};
  /* A torn last line must neither run into the first new one nor count as a whole one. */
  text_append(&lines, "-\n", 2);
  for (int32_t i = 0; i < count; i++) text_printf(&lines, "%d\n", (int)chunks[i]);
  spool_path(spool, path, "incoming/%s.done", layout->digest);
  int fd = open(path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
  int problem = fd < 0 || fstat(fd, &status) != 0 ? errno : 0;
  if (problem == 0 && !lines.failed) problem = write_whole(fd, lines.data, lines.length, status.st_size);
  if (problem == 0 && fsync(fd) != 0) problem = errno;
  if (fd >= 0) close(fd);
  if (problem == 0) problem = sync_folder_of(path);
  bool failed = lines.failed;
  text_free(&lines);
  if (failed) return sti_out_of_memory(error);
  return problem == 0 ? STI_OK : storage_error(error, problem, path);
}

StiCode done_write(const Spool *spool, const Layout *layout, const ChunkSet *done, StiError *error) {
  Path path;
  Text lines = {0};
  list_numbers(&lines, layout, done);
  spool_path(spool, path, "incoming/%s.done", layout->digest);
  Path arrived;
  spool_path(spool, arrived, "incoming/%s.arrived", layout->digest);
  unlink(arrived);
  StiCode code = lines.failed ? sti_out_of_memory(error)
                              : write_atomic(path, lines.data == NULL ? "" : lines.data, lines.length, error);
  text_free(&lines);
  return code;
}

void forget_incoming(const Spool *spool, const char *digest) {
  Path path;
  spool_path(spool, path, "incoming/%s.manifest", digest);
  unlink(path);
  spool_path(spool, path, "incoming/%s.arrived", digest);
  unlink(path);
  spool_path(spool, path, "incoming/%s.done", digest);
  unlink(path);
}
