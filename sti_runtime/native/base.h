/* base.h: what every native file stands on: errors as return codes, arenas, text buffers, SHA-256, clocks, files.
 *
 * Conventions of all native code: functions that can fail return an StiCode and fill *error; nothing below main calls
 * exit(); times are int64_t nanoseconds of CLOCK_MONOTONIC, sizes int64_t bytes, unless the name says otherwise.
 */
#ifndef STI_BASE_H
#define STI_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ------------------------------------------------------------------ errors */

/* The error tree of sti_runtime/errors.py and agent/errors.py, by code. */
typedef enum {
  STI_OK = 0,
  STI_INPUT,        /* InputError: what was asked for is wrong (exit 2) */
  STI_DATASET,      /* DatasetError (exit 2) */
  STI_FORMAT,       /* FormatError: a file of ours is malformed or of a newer version (exit 1) */
  STI_DIGEST,       /* DigestError (exit 1) */
  STI_INFEASIBLE,   /* InfeasiblePlanError (exit 1) */
  STI_RESOURCE,     /* ResourceError: storage, memory or a buffer is too small (exit 1) */
  STI_STORAGE_READ, /* StorageReadError (exit 1) */
  STI_SPAWNED,      /* SpawnedRequestError (exit 1) */
  STI_REFUSED,      /* RefusedError (exit 3) */
  STI_STORAGE_FULL, /* StorageFullError (exit 4) */
  STI_BUSY,         /* BusyError (exit 5) */
  STI_GATE,         /* GateError (exit 1) */
  STI_STOPPED,      /* not an error: a signal ended the wait */
  STI_INTERNAL,     /* "internal" (exit 1) */
} StiCode;

typedef struct {
  StiCode code;
  char what[2000];             /* what happened, to which file or device */
  char remedy[2000];           /* what to do next; may be empty */
  int64_t smallest_target_ns;  /* STI_INFEASIBLE only: the smallest T that works, 0 if there is none */
} StiError;

/* Fill *error and return code. `remedy` is plain text; what follows is printf's. Cuts at whole UTF-8 characters. */
StiCode sti_fail(StiError *error, StiCode code, const char *remedy, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Like sti_fail for a failed system call: appends ": <strerror(errno)>." and maps ENOMEM to STI_RESOURCE. */
StiCode sti_fail_errno(StiError *error, StiCode code, int errno_value, const char *remedy, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
const char *sti_error_name(StiCode code); /* class name of the error tree: "FormatError", …, "internal" */
int sti_exit_code(StiCode code);

#define STI_TRY(call)                       \
  do {                                      \
    StiCode sti_try_code = (call);          \
    if (sti_try_code != STI_OK) return sti_try_code; \
  } while (0)

/* ------------------------------------------------------------------ memory */

/* Memory that is freed all at once. Zero-initialise; chunks are mmapped, so freeing returns them to the system. */
typedef struct ArenaChunk ArenaChunk;
typedef struct {
  ArenaChunk *chunks;
  size_t used_bytes; /* handed out so far */
  size_t cap_bytes;  /* most it may hold; 0: no limit */
} Arena;

void *arena_alloc(Arena *arena, size_t bytes); /* zeroed, 16-byte aligned; NULL when memory or cap is exhausted */
char *arena_text(Arena *arena, const char *text, size_t length); /* NUL-terminated copy; NULL as above */
void arena_free(Arena *arena);
StiCode sti_out_of_memory(StiError *error); /* STI_RESOURCE with the words for it */

/* A growing byte buffer. Zero-initialise. After a failed append `failed` stays set and appends do nothing. */
typedef struct {
  char *data; /* [length], NUL-terminated when not NULL */
  size_t length, capacity;
  bool failed;
} Text;

void text_append(Text *text, const char *data, size_t length);
void text_printf(Text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
void text_clear(Text *text); /* keeps the memory */
void text_free(Text *text);

/* Page-aligned anonymous memory, zero-filled, apart from the heap; NULL on failure. */
void *pages_alloc(size_t bytes);
void pages_free(void *memory, size_t bytes);

/* ------------------------------------------------------------------ digests */

typedef struct {
  uint32_t state[8];
  uint64_t bytes;
  uint8_t block[64];
} Sha256;

void sha256_begin(Sha256 *hash); /* uses the CPU's SHA instructions where it has them */
void sha256_add(Sha256 *hash, const void *data, size_t bytes);
void sha256_end(Sha256 *hash, char hex[65]);
void sha256_hex(const void *data, size_t bytes, char hex[65]);
bool is_digest(const char *text); /* 64 lower-case hexadecimal digits */
uint32_t crc32_of(const void *data, size_t bytes); /* zlib's polynomial */

/* ------------------------------------------------------------------ clocks and files */

int64_t monotonic_ns(void);
int64_t wall_ns(void);

/* Whole file into the arena (with a NUL behind it), at most cap_bytes.
 * Errors: STI_FORMAT if it is missing, unreadable or longer. */
StiCode read_file(Arena *arena, const char *path, size_t cap_bytes, const char **data, size_t *length, StiError *error);

#endif
