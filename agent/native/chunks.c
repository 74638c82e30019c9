/* chunks.c: the verbs `commit` and `verify`: making a bundle visible, and looking at it again.
 *
 * A bundle grows in incoming/<digest>/ and appears in bundles/<digest>/ by one rename, after every chunk was verified
 * from storage; it is never half-visible. Both hold the spool's deploy lock. Formats: docs/job-and-journal.md, 6.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "../../sti_runtime/native/json.h"
#include "arguments.h"
#include "incoming.h"
#include "locks.h"
#include "verbs.h"

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

StiCode commit_incoming(Arena *arena, const Spool *spool, const Layout *layout, const ChunkSet *stored, StiError *error) {
  ChunkSet damaged;
  Path folder;
  spool_path(spool, folder, "incoming/%s", layout->digest);
  STI_TRY(check_files(arena, folder, layout, error));
  STI_TRY(chunks_damaged(arena, folder, layout, stored, &damaged, error));
  if (damaged.count > 0) return refuse_damaged(arena, spool, layout, &damaged, error);
  STI_TRY(move_bundle(spool, layout->digest, "incoming", "bundles", error));
  forget_incoming(spool, layout->digest);
  return STI_OK;
}

static StiCode commit_held(Arena *arena, const Spool *spool, const char *digest, Text *out, StiError *error) {
  Layout layout;
  Path folder;
  STI_TRY(check_digest(digest, error));
  spool_path(spool, folder, "bundles/%s", digest);
  if (is_folder(folder)) {
    forget_incoming(spool, digest);
    write_committed(out, 0, digest, "already");
    return STI_OK;
  }
  STI_TRY(layout_incoming(arena, spool, digest, &layout, error));
  STI_TRY(commit_incoming(arena, spool, &layout, NULL, error));
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
  STI_TRY(chunks_damaged(arena, folder, &layout, NULL, &damaged, error));
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
