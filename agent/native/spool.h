/* spool.h: the one folder an agent writes to, and the paths in it (docs/job-and-journal.md, section 1).
 *
 * Paths are formed from validated digests and job ids only, so none can lead outside.
 */
#ifndef AGENT_SPOOL_H
#define AGENT_SPOOL_H

#include "../../sti_runtime/native/base.h"

enum {
  PATH_CHARS = 4096,
  ROOT_CHARS = 3500, /* longest spool folder: every path below it then fits a Path */
  NAME_CHARS = 256,
};
typedef char Path[PATH_CHARS];

typedef struct { char root[ROOT_CHARS + 1]; } Spool; /* absolute, not resolved */

#define SETTINGS_JOURNAL "settings.journal"
extern const char *const spool_owned[]; /* everything `clean` removes, NULL-ended */

/* The spool at `root`, made with its folders if it is not there. Errors: STI_INPUT. */
StiCode spool_open(const char *root, Spool *spool, StiError *error);
/* <root>/<format…>; the pieces are names that were checked. */
void spool_path(const Spool *spool, Path path, const char *format, ...) __attribute__((format(printf, 3, 4)));

void path_below(Path path, const char *folder, const char *name); /* <folder>/<name>, both known to fit */

/* Errors: STI_INPUT unless `digest` can form a path. */
StiCode check_digest(const char *digest, StiError *error);
/* <root>/jobs/<id>/<attempt>. Errors: STI_INPUT unless id and attempt can form a path. */
StiCode spool_job(const Spool *spool, const char *id, const char *attempt, Path folder, StiError *error);

/* ------------------------------------------------------------------ files */

/* Durable or not at all: fsync of a folder's entries. Returns 0 or errno. */
int sync_folder(const char *folder);
int sync_folder_of(const char *path); /* of the folder that holds `path` */
/* All of it at `offset`, however often the kernel writes less. Returns 0 or errno. */
int write_whole(int fd, const char *data, size_t length, int64_t offset);
int append_whole(int fd, const char *data, size_t length); /* the same at the end of a file opened with O_APPEND */
/* Replace `path` by the data: durable and whole, or not at all. Errors: as storage_error's. */
StiCode write_atomic(const char *path, const char *data, size_t length, StiError *error);
/* The error of ours for a failed write to `path`: STI_STORAGE_FULL, or STI_INPUT where it is not space that lacks. */
StiCode storage_error(StiError *error, int errno_value, const char *path);
bool is_full(int errno_value); /* ENOSPC, EDQUOT, EFBIG */

/* Remove a file or folder so that it is never seen half-removed under its name; absent ones are no error. */
StiCode remove_whole(const char *path, StiError *error);

bool is_folder(const char *path); /* links are followed, as in the next */
bool is_file(const char *path);
int64_t file_bytes(const char *path); /* 0 when there is none */

/* Names in a folder but "." and "..", sorted bytewise, in the arena. Errors: STI_INPUT, STI_RESOURCE. */
typedef struct { const char **names; size_t count; } Names;
StiCode list_folder(Arena *arena, const char *folder, Names *names, StiError *error);

#endif
