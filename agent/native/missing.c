/* missing.c: the verb `missing`: announce a bundle; which of its chunks must be sent, after all the device has were
 * copied from elsewhere (docs/job-and-journal.md, 6).
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"
#include "arguments.h"
#include "chunk_writer.h"
#include "locks.h"
#include "verbs.h"

/* Where a finished bundle of this device holds a wanted chunk. file NULL: none does. */
typedef struct {
  const char *bundle, *file;
  int64_t offset;
  int32_t chunk; /* first of those with its bytes */
} Source;

typedef struct {
  const Spool *spool;
  const Layout *layout;
  Arena *arena;
  bool *lacking;   /* [chunk_count], of the first chunks: not all of their places are done */
  Source *sources; /* [chunk_count], likewise */
  bool *copied;    /* [chunk_count], likewise */
} Announcement;

static int64_t saturated_add(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? INT64_MAX : sum;
}

/* ------------------------------------------------------------------ what is lacking, and who has it */

static StiCode find_lacking(Announcement *announced, StiError *error) {
  const Layout *layout = announced->layout;
  size_t count = (size_t)layout->chunk_count;
  ChunkSet done;
  STI_TRY(done_read(announced->arena, announced->spool, layout, &done, error));
  announced->lacking = arena_alloc(announced->arena, count * sizeof *announced->lacking);
  announced->copied = arena_alloc(announced->arena, count * sizeof *announced->copied);
  announced->sources = arena_alloc(announced->arena, count * sizeof *announced->sources);
  if (announced->lacking == NULL || announced->copied == NULL || announced->sources == NULL)
    return sti_out_of_memory(error);
  for (size_t i = 0; i < count; i++)
    if (!done.has[i]) announced->lacking[layout->chunks[i].first] = true;
  return STI_OK;
}

/* Note which wanted chunks the bundle has that nobody had before. Its layout lives in an arena of its own. */
static StiCode look_in_bundle(Announcement *announced, const char *bundle, const Layout *theirs, StiError *error) {
  for (int32_t i = 0; i < theirs->chunk_count; i++) {
    const LayoutChunk *chunk = &theirs->chunks[i];
    int32_t wanted = layout_find(announced->layout, chunk->sha256);
    if (wanted < 0 || !announced->lacking[wanted] || announced->sources[wanted].file != NULL) continue;
    if (chunk->length != announced->layout->chunks[wanted].length) continue;
    const char *name = theirs->files[chunk->file].name, *file = arena_text(announced->arena, name, strlen(name));
    if (file == NULL) return sti_out_of_memory(error);
    announced->sources[wanted] = (Source){.bundle = bundle, .file = file, .offset = chunk->offset, .chunk = wanted};
  }
  return STI_OK;
}

/* A bundle with a bad manifest has nothing. */
static StiCode find_sources(Announcement *announced, StiError *error) {
  Path folder, path;
  Names bundles;
  spool_path(announced->spool, folder, "bundles");
  STI_TRY(list_folder(announced->arena, folder, &bundles, error));
  for (size_t i = 0; i < bundles.count; i++) {
    Arena arena = {0};
    Layout theirs;
    StiError ignored;
    spool_path(announced->spool, path, "bundles/%s/" MANIFEST_FILE, bundles.names[i]);
    StiCode code = STI_OK;
    if (layout_read(&arena, path, &theirs, &ignored) == STI_OK)
      code = look_in_bundle(announced, bundles.names[i], &theirs, error);
    arena_free(&arena);
    if (code != STI_OK) return code;
  }
  return STI_OK;
}

/* ------------------------------------------------------------------ space */

/* Bytes of the files that are not allocated yet. */
static int64_t lacking_bytes(const Announcement *announced) {
  int64_t needed = 0;
  for (int32_t i = 0; i < announced->layout->file_count; i++) {
    const LayoutFile *file = &announced->layout->files[i];
    Path path;
    struct stat status;
    spool_path(announced->spool, path, "incoming/%s/%s", announced->layout->digest, file->name);
    int64_t allocated = stat(path, &status) == 0 ? (int64_t)status.st_blocks * 512 : 0;
    if (file->bytes > allocated) needed = saturated_add(needed, file->bytes - allocated);
  }
  return needed;
}

static StiCode check_space(const Announcement *announced, StiError *error) {
  struct statvfs status;
  const char *root = announced->spool->root;
  if (statvfs(root, &status) != 0) return storage_error(error, errno, root);
  int64_t free_bytes = (int64_t)status.f_bavail * (int64_t)status.f_frsize;
  int64_t needed = saturated_add(lacking_bytes(announced), (int64_t)announced->layout->data_length);
  if (needed <= free_bytes) return STI_OK;
  return sti_fail(error, STI_RESOURCE, "Free space on the device, or remove what it no longer needs (devices clean).",
                  "%s: bundle %.12s needs %" PRId64 " more bytes, %" PRId64 " are free.", root,
                  announced->layout->digest, needed, free_bytes);
}

/* Where the file system cannot allocate ahead: write zeros behind what there is. Returns 0 or errno. */
static int write_zeros(int fd, int64_t bytes) {
  struct stat status;
  if (fstat(fd, &status) != 0) return errno;
  char *zeros = pages_alloc(COPY_BYTES);
  int problem = zeros == NULL ? ENOMEM : 0;
  for (int64_t at = status.st_size; at < bytes && problem == 0; at += COPY_BYTES)
    problem = write_whole(fd, zeros, bytes - at < COPY_BYTES ? (size_t)(bytes - at) : COPY_BYTES, at);
  pages_free(zeros, COPY_BYTES);
  return problem;
}

/* Allocate a file (contiguous, so that cold reads are fair). Returns 0 or errno. */
static int reserve_file(const char *path, int64_t bytes) {
  int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644), problem;
  if (fd < 0) return errno;
  do problem = fallocate(fd, 0, 0, bytes) == 0 ? 0 : errno;
  while (problem == EINTR);
  if (problem == EOPNOTSUPP || problem == ENOSYS) problem = write_zeros(fd, bytes);
  if (problem == 0 && ftruncate(fd, bytes) != 0) problem = errno;
  close(fd);
  return problem;
}

/* A killed agent can have left the manifest's temporary file, which does not belong into a bundle. */
static StiCode remove_leftovers(const Announcement *announced, const char *folder, StiError *error) {
  Names names;
  STI_TRY(list_folder(announced->arena, folder, &names, error));
  for (size_t i = 0; i < names.count; i++) {
    Path path;
    path_below(path, folder, names.names[i]);
    if (strncmp(names.names[i], "." MANIFEST_FILE ".", sizeof "." MANIFEST_FILE) == 0) unlink(path);
  }
  return STI_OK;
}

/* Check the space for the whole bundle, then allocate its files. */
static StiCode reserve(const Announcement *announced, StiError *error) {
  const Layout *layout = announced->layout;
  Path folder, path;
  STI_TRY(check_space(announced, error));
  spool_path(announced->spool, folder, "incoming/%s", layout->digest);
  int problem = mkdir(folder, 0777) == 0 || (errno == EEXIST && is_folder(folder)) ? 0 : errno;
  for (int32_t i = 0; i < layout->file_count && problem == 0; i++) {
    spool_path(announced->spool, path, "incoming/%s/%s", layout->digest, layout->files[i].name);
    problem = reserve_file(path, layout->files[i].bytes);
  }
  if (problem != 0) return storage_error(error, problem, folder);
  STI_TRY(remove_leftovers(announced, folder, error));
  spool_path(announced->spool, path, "incoming/%s/" MANIFEST_FILE, layout->digest);
  if (access(path, F_OK) == 0) return STI_OK;
  return write_atomic(path, layout->data, layout->data_length, error);
}

/* ------------------------------------------------------------------ copying */

static int by_place(const void *a, const void *b) {
  const Source *x = a, *y = b;
  int order = strcmp(x->bundle, y->bundle);
  if (order == 0) order = strcmp(x->file, y->file);
  return order != 0 ? order : (x->offset > y->offset) - (x->offset < y->offset);
}

/* Copy the chunk at `offset` to every place it has. *right: whether its bytes are, else none was listed.
 * Errors: storage_error's. */
static StiCode copy_right(ChunkWriter *writer, int fd, int64_t offset, int32_t first, bool *right, StiError *error) {
  const LayoutChunk *chunks = writer->layout->chunks;
  char hex[65] = "";
  int problem = digest_of_piece(fd, offset, chunks[first].length, writer->block, hex);
  *right = problem == 0 && strcmp(hex, chunks[first].sha256) == 0;
  for (int64_t done = 0; *right && done < chunks[first].length;) {
    int64_t left = chunks[first].length - done;
    ssize_t got = pread(fd, writer->block, left < COPY_BYTES ? (size_t)left : COPY_BYTES, offset + done);
    if (got < 0 && errno == EINTR) continue;
    *right = got > 0;
    for (int32_t place = first; *right && place >= 0; place = chunks[place].next)
      STI_TRY(writer_write(writer, place, writer->block, (size_t)got, done, error));
    done += got;
  }
  for (int32_t place = first; *right && place >= 0; place = chunks[place].next)
    STI_TRY(writer_add(writer, place, error));
  return STI_OK;
}

/* Copy the chunk at a source; one that is gone or damaged there is asked for instead. */
static StiCode copy_source(Announcement *announced, ChunkWriter *writer, const Source *source, StiError *error) {
  Path path;
  bool right = false;
  spool_path(announced->spool, path, "bundles/%s/%s", source->bundle, source->file);
  int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return STI_OK;
  StiCode code = copy_right(writer, fd, source->offset, source->chunk, &right, error);
  close(fd);
  announced->copied[source->chunk] = right;
  return code;
}

/* The sources there are, in the order in which they lie on storage. Returns their number. */
static size_t ordered_sources(const Announcement *announced, Source *ordered) {
  size_t count = 0;
  for (int32_t i = 0; i < announced->layout->chunk_count; i++)
    if (announced->sources[i].file != NULL) ordered[count++] = announced->sources[i];
  if (count > 0) qsort(ordered, count, sizeof *ordered, by_place);
  return count;
}

static StiCode copy_local(Announcement *announced, StiError *error) {
  ChunkWriter writer;
  StiError problem = {0};
  Source *ordered = arena_alloc(announced->arena, (size_t)announced->layout->chunk_count * sizeof *ordered);
  if (ordered == NULL) return sti_out_of_memory(error);
  size_t count = ordered_sources(announced, ordered);
  StiCode code = writer_open(announced->arena, announced->spool, announced->layout, false, &writer, error);
  for (size_t i = 0; i < count && code == STI_OK; i++) code = copy_source(announced, &writer, &ordered[i], error);
  StiCode closed = writer_close(&writer, &problem);
  if (code == STI_OK && closed != STI_OK) *error = problem;
  return code != STI_OK ? code : closed;
}

/* ------------------------------------------------------------------ the verb */

static void write_report(Text *out, const Announcement *announced, bool complete) {
  const Layout *layout = announced->layout;
  int64_t copied = 0, missing_bytes = 0;
  Text missing = {0};
  json_open(&missing, '[');
  for (int32_t i = 0; i < layout->chunk_count && !complete; i++) {
    int32_t first = layout->chunks[i].first;
    copied += announced->copied[first];
    if (i != first || !announced->lacking[i] || announced->copied[i]) continue;
    json_int(&missing, i);
    missing_bytes += layout->chunks[i].length;
  }
  json_close(&missing, ']');
  json_open(out, '{');
  json_bool_field(out, "complete", complete);
  json_int_field(out, "copied", copied);
  json_text_field(out, "digest", layout->digest);
  json_key(out, "missing"), text_append(out, missing.data, missing.length);
  json_int_field(out, "missing_bytes", missing_bytes);
  json_int_field(out, "total", layout->chunk_count);
  json_close(out, '}');
  out->failed |= missing.failed;
  text_free(&missing);
}

static StiCode announce(Announcement *announced, Text *out, StiError *error) {
  Path finished, pack;
  spool_path(announced->spool, pack, "incoming/pack");
  unlink(pack); /* input that a killed host left */
  spool_path(announced->spool, finished, "bundles/%s", announced->layout->digest);
  if (is_folder(finished)) {
    write_report(out, announced, true);
    return STI_OK;
  }
  STI_TRY(find_lacking(announced, error));
  STI_TRY(find_sources(announced, error));
  STI_TRY(reserve(announced, error));
  STI_TRY(copy_local(announced, error));
  write_report(out, announced, false);
  return STI_OK;
}

static StiCode announce_alone(Arena *arena, const Spool *spool, const char *manifest, Text *out, StiError *error) {
  Layout layout;
  Lock lock;
  STI_TRY(layout_read(arena, manifest, &layout, error));
  STI_TRY(hold_deploy(spool, &lock, error));
  Announcement announced = {.spool = spool, .layout = &layout, .arena = arena};
  StiCode code = announce(&announced, out, error);
  lock_release(&lock);
  return code;
}

StiCode verb_missing(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  Arena arena = {0};
  STI_TRY(arguments_open(argc, argv, 1, TAKES_LEASE, &arguments, &spool, error));
  StiCode code = announce_alone(&arena, &spool, arguments.words[0], out, error);
  arena_free(&arena);
  return code;
}
