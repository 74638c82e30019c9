/* incoming.h: a bundle on its way: its layout, the list of verified chunks, checking and committing it.
 *
 * incoming/<digest>.done lists verified chunks, one number per line, appended after their bytes were flushed.
 * incoming/<digest>.arrived lists those that are not flushed yet and counts only in the boot that its first line names:
 * what a killed process has written is lost with the boot, no sooner. The caller holds the spool's deploy lock.
 */
#ifndef AGENT_INCOMING_H
#define AGENT_INCOMING_H

#include "../../sti_runtime/native/formats.h"
#include "spool.h"

#define MANIFEST_FILE "manifest.json"
#define RESEND "Run deploy again: it sends what is missing."

enum { COPY_BYTES = 1 << 20 };

/* ------------------------------------------------------------------ layout */

typedef struct { const char *name; int64_t bytes; } LayoutFile;

typedef struct {
  int32_t file; /* which of the layout's files */
  int32_t first, next; /* the first chunk with these bytes; the next one behind this, -1 if it is the last */
  int64_t offset, length;
  const char *sha256;
} LayoutChunk;

/* A manifest with what the deploy needs of it: every version of every region, then the chunks of the other files. */
typedef struct {
  char digest[65];
  const char *data; /* the manifest's bytes, [data_length] */
  size_t data_length;
  LayoutFile *files;   /* [file_count] */
  LayoutChunk *chunks; /* [chunk_count] */
  int32_t *by_digest;  /* [chunk_count] numbers of chunks, sorted by digest, then by number */
  int32_t file_count, chunk_count;
} Layout;

/* Errors: STI_FORMAT if the manifest is unreadable, over-long, malformed or not canonical; STI_RESOURCE. */
StiCode layout_read(Arena *arena, const char *path, Layout *layout, StiError *error);
/* The layout of an announced bundle. Errors: STI_INPUT if it was not announced, STI_DIGEST, layout_read's. */
StiCode layout_incoming(Arena *arena, const Spool *spool, const char *digest, Layout *layout, StiError *error);
int32_t layout_find(const Layout *layout, const char *sha256); /* the first chunk with these bytes, -1 */
int64_t layout_bytes(const Layout *layout);                    /* of all files; INT64_MAX if they are more */

/* ------------------------------------------------------------------ the list of verified chunks */

/* A set of chunk numbers. */
typedef struct { bool *has; /* [chunk_count] */ int32_t count; } ChunkSet;
StiCode chunk_set(Arena *arena, const Layout *layout, ChunkSet *set, StiError *error); /* empty */
void chunk_add(ChunkSet *set, int32_t chunk);

/* Lines that are torn or make no sense count as not done. Errors: STI_FORMAT if it cannot be read, STI_RESOURCE. */
StiCode done_read(Arena *arena, const Spool *spool, const Layout *layout, ChunkSet *done, StiError *error);
/* Add to the list; the chunks' bytes are on storage already. Errors: storage_error's. */
StiCode done_append(const Spool *spool, const Layout *layout, const int32_t *chunks, int32_t count, StiError *error);
/* The list of chunks written in this boot, to append whole lines to. Errors: storage_error's, boot_id's. */
StiCode arrived_open(const Spool *spool, const char *digest, int *fd, StiError *error);
/* Replace the lists. Errors: storage_error's. */
StiCode done_write(const Spool *spool, const Layout *layout, const ChunkSet *done, StiError *error);
/* Remove what lies beside a bundle on its way: the pushed manifest, then the lists. */
void forget_incoming(const Spool *spool, const char *digest);

/* ------------------------------------------------------------------ checking (checking.c) */

/* SHA-256 of a stretch of a file, read in blocks; "" when the file ends before. Returns 0 or errno. */
int digest_of_piece(int fd, int64_t offset, int64_t length, char *block, char hex[65]);
int digest_of_file(int fd, char hex[65]); /* of a whole file, likewise */
/* Whether a chunk's bytes, read from storage and not from the page cache, are right: 0, or errno; EBADMSG: wrong.
 * Leaves none of them cached. block: [COPY_BYTES]. */
int chunk_stored(int fd, const LayoutChunk *chunk, char *block);
/* Chunks whose bytes, read from storage by several threads, are wrong; those in `stored` (NULL: none) were read before.
 * Leaves nothing in the page cache. Errors: STI_STORAGE_READ when storage fails, STI_RESOURCE. */
StiCode chunks_damaged(Arena *arena, const char *folder, const Layout *layout, const ChunkSet *stored,
                       ChunkSet *damaged, StiError *error);
/* STI_FORMAT unless the folder holds exactly the manifest's files at their exact sizes. */
StiCode check_files(Arena *arena, const char *folder, const Layout *layout, StiError *error);

/* ------------------------------------------------------------------ committing (chunks.c) */

/* Make an announced bundle visible once every chunk was read from storage, but those in `stored`, which this process has
 * read back already. Errors: STI_DIGEST if chunks are missing or wrong (`missing` asks for them again), STI_FORMAT if
 * the folder holds other files. */
StiCode commit_incoming(Arena *arena, const Spool *spool, const Layout *layout, const ChunkSet *stored, StiError *error);

#endif
