/* accept.c: the verb `accept`: chunks come on standard input, are checked as they come and listed once on storage.
 *
 * Input that ends early leaves what came whole: it is flushed and listed before the verb fails, and only the rest has to
 * come again. Format: docs/job-and-journal.md, 6.
 */
#include <string.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"
#include "arguments.h"
#include "chunk_writer.h"
#include "fence.h"
#include "input.h"
#include "locks.h"
#include "pack.h"
#include "signals.h"
#include "verbs.h"

typedef struct {
  const Spool *spool;
  const Layout *layout;
  const Lease *lease; /* NULL: none was given */
  bool commit;
  Input input;
  Pack pack;
  ChunkWriter writer;
  ChunkSet done, rejected;
  int64_t unchecked_bytes; /* since the lease was looked at */
} Intake;

/* ------------------------------------------------------------------ chunks */

static int32_t next_place(const Intake *intake, int32_t place) {
  while (place >= 0 && intake->done.has[place]) place = intake->layout->chunks[place].next;
  return place;
}

/* Take a chunk to the first place it lacks, -1: none. Written as it comes, it counts once it is listed. *whole: whether
 * the input held all of it; *right: whether its bytes are. */
static StiCode take_bytes(Intake *intake, int32_t number, int32_t place, bool *whole, bool *right, StiError *error) {
  const LayoutChunk *chunk = &intake->layout->chunks[number];
  Sha256 hash;
  char hex[65];
  size_t got = 1;
  int64_t done = 0;
  sha256_begin(&hash);
  while (done < chunk->length && got > 0) {
    const char *piece = input_piece(&intake->input, chunk->length - done, &got);
    sha256_add(&hash, piece, got);
    if (place >= 0 && got > 0) STI_TRY(writer_write(&intake->writer, place, piece, got, done, error));
    done += (int64_t)got;
  }
  sha256_end(&hash, hex);
  *whole = done == chunk->length;
  *right = strcmp(hex, chunk->sha256) == 0;
  return STI_OK;
}

/* All places that the chunk lacked have it, once the first has. */
static StiCode list_places(Intake *intake, int32_t first, StiError *error) {
  for (int32_t place = first; place >= 0; place = next_place(intake, place)) {
    if (place != first) STI_TRY(writer_copy(&intake->writer, first, place, error));
    STI_TRY(writer_add(&intake->writer, place, error));
    chunk_add(&intake->done, place);
  }
  return STI_OK;
}

/* Look at the fence again now and then. */
static StiCode check_lease(Intake *intake, int64_t bytes, StiError *error) {
  char reason[REASON_CHARS] = "";
  intake->unchecked_bytes += bytes;
  if (intake->lease == NULL || intake->unchecked_bytes < BATCH_BYTES) return STI_OK;
  intake->unchecked_bytes = 0;
  STI_TRY(fence_still_admits(intake->spool, intake->lease, reason, error));
  return reason[0] ? fence_refused(reason, error) : STI_OK;
}

static StiCode take_chunks(Intake *intake, StiError *error) {
  for (int32_t i = 0; i < intake->pack.count; i++) {
    int32_t number = intake->pack.chunks[i];
    int32_t place = next_place(intake, intake->layout->chunks[number].first);
    bool whole, right;
    STI_TRY(take_bytes(intake, number, place, &whole, &right, error));
    if (!whole)
      return sti_fail(error, STI_FORMAT, RESEND, "The input ended after %d of %d chunks, which are kept.", (int)i,
                      (int)intake->pack.count);
    if (right) STI_TRY(list_places(intake, place, error));
    else chunk_add(&intake->rejected, number);
    STI_TRY(check_lease(intake, intake->layout->chunks[number].length, error));
  }
  return STI_OK;
}

/* ------------------------------------------------------------------ the verb */

static void write_accepted(Text *out, const Intake *intake, int32_t remaining, bool committed) {
  json_open(out, '{');
  json_int_field(out, "accepted", intake->pack.count - intake->rejected.count);
  json_text_field(out, "digest", intake->layout->digest);
  json_key(out, "rejected"), json_open(out, '[');
  for (int32_t i = 0; i < intake->pack.count; i++)
    if (intake->rejected.has[intake->pack.chunks[i]]) json_int(out, intake->pack.chunks[i]);
  json_close(out, ']');
  json_int_field(out, "remaining", remaining);
  json_text_field(out, "state", committed ? "committed" : "incoming");
  json_close(out, '}');
}

/* Whatever ends the intake, what came whole is flushed and listed. */
static StiCode take_in(Arena *arena, Intake *intake, StiError *error) {
  StiError problem = {0};
  STI_TRY(done_read(arena, intake->spool, intake->layout, &intake->done, error));
  STI_TRY(chunk_set(arena, intake->layout, &intake->rejected, error));
  StiCode code = writer_open(arena, intake->spool, intake->layout, intake->commit, &intake->writer, error);
  if (code == STI_OK) code = take_chunks(intake, error);
  StiCode closed = writer_close(&intake->writer, &problem);
  if (code == STI_OK && closed != STI_OK) *error = problem;
  return code != STI_OK ? code : closed;
}

static StiCode accept_held(Arena *arena, Intake *intake, const char *digest, Text *out, StiError *error) {
  Layout layout;
  ChunkSet done;
  char *line;
  size_t length;
  STI_TRY(layout_incoming(arena, intake->spool, digest, &layout, error));
  intake->layout = &layout;
  STI_TRY(input_open(arena, STDIN_FILENO, &intake->input, error));
  STI_TRY(input_line(arena, &intake->input, PACK_HEADER_CAP_BYTES, &line, &length, error));
  STI_TRY(pack_parse(arena, line, length, &layout, &intake->pack, error));
  STI_TRY(take_in(arena, intake, error));
  STI_TRY(done_read(arena, intake->spool, &layout, &done, error));
  int32_t remaining = layout.chunk_count - done.count;
  bool commits = intake->commit && remaining == 0;
  if (commits) STI_TRY(commit_incoming(arena, intake->spool, &layout, &intake->writer.stored, error));
  write_accepted(out, intake, remaining, commits);
  return STI_OK;
}

StiCode verb_accept(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  Spool spool;
  LeaseText lease;
  Lock lock;
  Arena arena = {0};
  signals_install();
  STI_TRY(arguments_open(argc, argv, 1, TAKES_LEASE | TAKES_COMMIT, &arguments, &spool, error));
  if (arguments.lease != NULL) STI_TRY(lease_parse(arguments.lease, &lease, error));
  Intake intake = {.spool = &spool, .lease = arguments.lease == NULL ? NULL : &lease.lease, .commit = arguments.commit};
  STI_TRY(hold_deploy(&spool, &lock, error));
  StiCode code = accept_held(&arena, &intake, arguments.words[0], out, error);
  lock_release(&lock);
  arena_free(&arena);
  return code;
}
