/* chunks.c: the verbs `accept`, `commit` and `verify`: taking chunks in and making a bundle visible.
 *
 * A bundle grows in incoming/<digest>/ and appears in bundles/<digest>/ by one rename, after every chunk was verified
 * from storage; it is never half-visible. All hold the spool's deploy lock. Formats: docs/job-and-journal.md, 6.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"
#include "arguments.h"
#include "incoming.h"
#include "locks.h"
#include "verbs.h"

enum { PACK_HEADER_CAP_BYTES = 1 << 20 };

/* Its chunks follow behind the header, in the header's order. */
typedef struct {
  const char *name;
  int fd;
  int64_t bytes, header_bytes;
  int32_t *chunks; /* [count] */
  int32_t count;
} Pack;

/* ------------------------------------------------------------------ packs */

static StiCode not_a_pack(const Pack *pack, StiError *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static StiCode not_a_pack(const Pack *pack, StiError *error, const char *format, ...) {
  char cause[200];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(cause, sizeof cause, format, arguments);
  va_end(arguments);
  return sti_fail(error, STI_FORMAT, RESEND, "%.255s: not a pack: %s.", pack->name, cause);
}

/* The first line, at most the cap; *length counts its newline, 0 if there is none. */
static StiCode read_first_line(Arena *arena, Pack *pack, char **line, size_t *length, StiError *error) {
  size_t done = 0;
  ssize_t got = 1;
  *line = arena_alloc(arena, PACK_HEADER_CAP_BYTES);
  *length = 0;
  if (*line == NULL) return sti_out_of_memory(error);
  while (*length == 0 && done < PACK_HEADER_CAP_BYTES && got != 0) {
    got = pread(pack->fd, *line + done, PACK_HEADER_CAP_BYTES - done, (int64_t)done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      return sti_fail_errno(error, STI_STORAGE_READ, errno, RESEND, "%.255s: cannot be read", pack->name);
    const char *newline = memchr(*line + done, '\n', (size_t)got);
    done += (size_t)got;
    if (newline != NULL) *length = (size_t)(newline - *line) + 1;
  }
  return STI_OK;
}

/* Check the chunk numbers and the pack's length by them. */
static StiCode take_numbers(Arena *arena, const Layout *layout, Pack *pack, const JsonValue *list, StiError *error) {
  ChunkSet seen;
  int64_t accounted = pack->header_bytes;
  STI_TRY(chunk_set(arena, layout, &seen, error));
  pack->chunks = arena_alloc(arena, list->array.count * sizeof *pack->chunks);
  if (pack->chunks == NULL) return sti_out_of_memory(error);
  for (size_t i = 0; i < list->array.count; i++) {
    const JsonValue *item = &list->array.items[i];
    bool known = item->kind == JSON_INT && item->integer >= 0 && item->integer < layout->chunk_count;
    if (!known || seen.has[item->integer])
      return not_a_pack(pack, error, "its chunk numbers are not distinct numbers below %d", (int)layout->chunk_count);
    chunk_add(&seen, (int32_t)item->integer);
    pack->chunks[pack->count++] = (int32_t)item->integer;
    if (__builtin_add_overflow(accounted, layout->chunks[item->integer].length, &accounted)) accounted = INT64_MAX;
  }
  if (pack->bytes <= accounted) return STI_OK;
  return not_a_pack(pack, error, "it has %" PRId64 " bytes, its first line accounts for %" PRId64, pack->bytes,
                    accounted);
}

static bool is_list_of_integers(const JsonValue *value) {
  if (value->kind != JSON_ARRAY) return false;
  for (size_t i = 0; i < value->array.count; i++)
    if (value->array.items[i].kind != JSON_INT && value->array.items[i].kind != JSON_BIG) return false;
  return true;
}

static StiCode read_header(Arena *arena, const Layout *layout, Pack *pack, StiError *error) {
  char *line;
  size_t length;
  JsonValue *list;
  StiError ignored;
  STI_TRY(read_first_line(arena, pack, &line, &length, error));
  if (length == 0)
    return not_a_pack(pack, error, "its first line has no end within %d bytes", PACK_HEADER_CAP_BYTES);
  StiCode code = json_parse(arena, line, length, pack->name, &list, &ignored);
  if (code == STI_RESOURCE) return sti_out_of_memory(error);
  if (code != STI_OK || !is_list_of_integers(list))
    return not_a_pack(pack, error, "its first line is not a JSON list of integers");
  pack->header_bytes = (int64_t)length;
  return take_numbers(arena, layout, pack, list, error);
}

/* ------------------------------------------------------------------ accept */

/* Take in the chunks that are right; `rejected` gets the others. */
static StiCode take_in(ChunkWriter *writer, const Pack *pack, ChunkSet *rejected, StiError *error) {
  int64_t offset = pack->header_bytes;
  for (int32_t i = 0; i < pack->count; i++) {
    bool right;
    STI_TRY(writer_take(writer, pack->fd, offset, pack->chunks[i], &right, error));
    if (!right) chunk_add(rejected, pack->chunks[i]);
    offset += writer->layout->chunks[pack->chunks[i]].length;
    if (offset > pack->bytes) offset = pack->bytes;
  }
  return STI_OK;
}

static void write_accepted(Text *out, const Layout *layout, const Pack *pack, const ChunkSet *rejected,
                           const ChunkSet *done) {
  json_open(out, '{');
  json_int_field(out, "accepted", pack->count - rejected->count);
  json_text_field(out, "digest", layout->digest);
  json_key(out, "rejected"), json_open(out, '[');
  for (int32_t i = 0; i < pack->count; i++)
    if (rejected->has[pack->chunks[i]]) json_int(out, pack->chunks[i]);
  json_close(out, ']');
  json_int_field(out, "remaining", layout->chunk_count - done->count);
  json_close(out, '}');
}

static StiCode accept_pack(Arena *arena, const Spool *spool, const char *digest, Pack *pack, Text *out,
                           StiError *error) {
  Layout layout;
  ChunkWriter writer;
  ChunkSet rejected, done;
  StiError problem = {0};
  STI_TRY(layout_incoming(arena, spool, digest, &layout, error));
  STI_TRY(read_header(arena, &layout, pack, error));
  STI_TRY(chunk_set(arena, &layout, &rejected, error));
  StiCode code = writer_open(arena, spool, &layout, &writer, error);
  if (code == STI_OK) code = take_in(&writer, pack, &rejected, error);
  StiCode closed = writer_close(&writer, &problem);
  if (code == STI_OK && closed != STI_OK) *error = problem, code = closed;
  if (code != STI_OK) return code;
  STI_TRY(done_read(arena, spool, &layout, &done, error));
  write_accepted(out, &layout, pack, &rejected, &done);
  return STI_OK;
}

/* A regular file right in incoming/, not a link. */
static bool is_pushed(const Spool *spool, const char *path) {
  Path resolved, folder, incoming;
  struct stat status;
  spool_path(spool, incoming, "incoming");
  if (lstat(path, &status) != 0 || !S_ISREG(status.st_mode)) return false;
  if (realpath(path, resolved) == NULL || realpath(incoming, folder) == NULL) return false;
  *strrchr(resolved, '/') = '\0';
  return strcmp(resolved, folder) == 0;
}

/* The pack is removed in any case once it is known to be one of ours. */
static StiCode accept_pushed(const Spool *spool, const char *digest, const char *path, Text *out, StiError *error) {
  Arena arena = {0};
  Lock lock;
  if (!is_pushed(spool, path))
    return sti_fail(error, STI_INPUT, "Push packs into that folder.", "%.500s: not a file in %.1000s/incoming.", path,
                    spool->root);
  const char *slash = strrchr(path, '/');
  Pack pack = {.name = slash == NULL ? path : slash + 1, .bytes = file_bytes(path)};
  STI_TRY(hold_deploy(spool, &lock, error));
  pack.fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  StiCode code = pack.fd >= 0 ? accept_pack(&arena, spool, digest, &pack, out, error)
                              : sti_fail_errno(error, STI_INPUT, errno, RESEND, "%s: cannot be read", path);
  if (pack.fd >= 0) close(pack.fd);
  unlink(path);
  lock_release(&lock);
  arena_free(&arena);
  return code;
}

StiCode verb_accept(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  STI_TRY(arguments_open(argc, argv, 2, TAKES_LEASE, &arguments, &spool, error));
  return accept_pushed(&spool, arguments.words[0], arguments.words[1], out, error);
}

/* ------------------------------------------------------------------ commit */

/* Move a bundle's folder between incoming/ and bundles/. */
static StiCode move_bundle(const Spool *spool, const char *digest, const char *from, const char *to, StiError *error) {
  Path source, target, folder;
  spool_path(spool, source, "%s/%s", from, digest);
  spool_path(spool, target, "%s/%s", to, digest);
  int problem = rename(source, target) == 0 ? 0 : errno;
  spool_path(spool, folder, "bundles");
  if (problem == 0) problem = sync_folder(folder);
  spool_path(spool, folder, "incoming");
  if (problem == 0) problem = sync_folder(folder);
  return problem == 0 ? STI_OK : storage_error(error, problem, target);
}

static void write_committed(Text *out, int64_t bytes, const char *digest, const char *state) {
  json_open(out, '{');
  json_int_field(out, "bytes", bytes);
  json_text_field(out, "digest", digest);
  json_text_field(out, "state", state);
  json_close(out, '}');
}

/* Strike damaged chunks from the done list, so that they are asked for again. */
static StiCode refuse_damaged(Arena *arena, const Spool *spool, const Layout *layout, const ChunkSet *damaged,
                              StiError *error) {
  ChunkSet done;
  int32_t first = layout->chunk_count;
  STI_TRY(done_read(arena, spool, layout, &done, error));
  for (int32_t i = layout->chunk_count - 1; i >= 0; i--) {
    if (!damaged->has[i]) continue;
    done.has[i] = false;
    first = i;
  }
  STI_TRY(done_write(spool, layout, &done, error));
  return sti_fail(error, STI_DIGEST, RESEND,
                  "Bundle %.12s: %d of %d chunks are missing or damaged, the first at byte %" PRId64 " of %s.",
                  layout->digest, (int)damaged->count, (int)layout->chunk_count, layout->chunks[first].offset,
                  layout->files[layout->chunks[first].file].name);
}

static StiCode commit_held(Arena *arena, const Spool *spool, const char *digest, Text *out, StiError *error) {
  Layout layout;
  ChunkSet damaged;
  Path folder;
  STI_TRY(check_digest(digest, error));
  spool_path(spool, folder, "bundles/%s", digest);
  if (is_folder(folder)) {
    done_remove(spool, digest);
    write_committed(out, 0, digest, "already");
    return STI_OK;
  }
  STI_TRY(layout_incoming(arena, spool, digest, &layout, error));
  spool_path(spool, folder, "incoming/%s", digest);
  STI_TRY(check_files(arena, folder, &layout, error));
  STI_TRY(chunks_damaged(arena, folder, &layout, &damaged, error));
  if (damaged.count > 0) return refuse_damaged(arena, spool, &layout, &damaged, error);
  STI_TRY(move_bundle(spool, digest, "incoming", "bundles", error));
  done_remove(spool, digest);
  write_committed(out, layout_bytes(&layout), digest, "committed");
  return STI_OK;
}

StiCode verb_commit(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Lock lock;
  Arena arena = {0};
  STI_TRY(arguments_open(argc, argv, 1, TAKES_LEASE, &arguments, &spool, error));
  STI_TRY(hold_deploy(&spool, &lock, error));
  StiCode code = commit_held(&arena, &spool, arguments.words[0], out, error);
  lock_release(&lock);
  arena_free(&arena);
  return code;
}

/* ------------------------------------------------------------------ verify */

static void write_verified(Text *out, const Layout *layout, const ChunkSet *damaged) {
  json_open(out, '{');
  json_key(out, "damaged"), json_open(out, '[');
  for (int32_t i = 0; i < layout->chunk_count; i++)
    if (damaged->has[i]) json_int(out, i);
  json_close(out, ']');
  json_text_field(out, "digest", layout->digest);
  json_text_field(out, "state", damaged->count > 0 ? "damaged" : "intact");
  json_close(out, '}');
}

/* A damaged bundle goes back to incoming/, to be mended. */
static StiCode verify_held(Arena *arena, const Spool *spool, const char *digest, Text *out, StiError *error) {
  Layout layout;
  ChunkSet damaged, good;
  Path folder, manifest;
  STI_TRY(check_digest(digest, error));
  spool_path(spool, folder, "bundles/%s", digest);
  spool_path(spool, manifest, "bundles/%s/" MANIFEST_FILE, digest);
  if (!is_folder(folder))
    return sti_fail(error, STI_INPUT, "Deploy it.", "Bundle %.12s is not on this device.", digest);
  STI_TRY(layout_read(arena, manifest, &layout, error));
  if (strcmp(layout.digest, digest) != 0)
    return sti_fail(error, STI_DIGEST, "Deploy it again.", "%s: holds the manifest of %.12s.", folder, layout.digest);
  STI_TRY(chunks_damaged(arena, folder, &layout, &damaged, error));
  if (damaged.count > 0) {
    STI_TRY(chunk_set(arena, &layout, &good, error));
    for (int32_t i = 0; i < layout.chunk_count; i++)
      if (!damaged.has[i]) chunk_add(&good, i);
    STI_TRY(done_write(spool, &layout, &good, error));
    STI_TRY(move_bundle(spool, digest, "bundles", "incoming", error));
  }
  write_verified(out, &layout, &damaged);
  return STI_OK;
}

/* Busy while a job runs, which may be reading the bundle. */
StiCode verb_verify(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Lock run, deploy;
  Arena arena = {0};
  STI_TRY(arguments_open(argc, argv, 1, TAKES_LEASE, &arguments, &spool, error));
  STI_TRY(hold_run(&spool, 0, "", &run, error));
  StiCode code = hold_deploy(&spool, &deploy, error);
  if (code == STI_OK) {
    code = verify_held(&arena, &spool, arguments.words[0], out, error);
    lock_release(&deploy);
  }
  lock_release(&run);
  arena_free(&arena);
  return code;
}
