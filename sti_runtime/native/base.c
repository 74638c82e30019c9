/* base.c: errors, arenas, text buffers, clocks and files. Digests are in digest.c. */
#include "base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------------------------ errors */

/* Drop a character that was cut at the buffer's end: its lead byte promises more than is there. */
static void end_at_character(char *text, size_t length) {
  size_t start = length;
  while (start > 0 && length - start < 4 && ((unsigned char)text[start - 1] & 0xC0) == 0x80) start--;
  if (start == 0) return;
  unsigned char lead = (unsigned char)text[start - 1];
  size_t promised = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
  if (promised > length - start + 1) text[start - 1] = '\0';
}

static void format_text(char *out, size_t room, const char *format, va_list arguments) {
  int length = vsnprintf(out, room, format, arguments);
  if (length < 0) out[0] = '\0';
  else if ((size_t)length >= room) end_at_character(out, room - 1);
}

static void plain_text(char *out, size_t room, const char *text) {
  size_t length = strlen(text);
  size_t kept = length < room ? length : room - 1;
  memcpy(out, text, kept);
  out[kept] = '\0';
  if (kept < length) end_at_character(out, kept);
}

StiCode sti_fail(StiError *error, StiCode code, const char *remedy, const char *format, ...) {
  error->code = code;
  error->smallest_target_ns = 0;
  plain_text(error->remedy, sizeof error->remedy, remedy);
  va_list arguments;
  va_start(arguments, format);
  format_text(error->what, sizeof error->what, format, arguments);
  va_end(arguments);
  return code;
}

StiCode sti_fail_errno(StiError *error, StiCode code, int errno_value, const char *remedy, const char *format, ...) {
  char what[sizeof error->what - 128]; /* the cause must fit behind it */
  va_list arguments;
  va_start(arguments, format);
  format_text(what, sizeof what, format, arguments);
  va_end(arguments);
  return sti_fail(error, errno_value == ENOMEM ? STI_RESOURCE : code, remedy, "%s: %s.", what, strerror(errno_value));
}

static const struct {
  const char *name;
  int exit_code;
} error_kinds[] = {
    [STI_OK] = {"", 0},
    [STI_INPUT] = {"InputError", 2},
    [STI_DATASET] = {"DatasetError", 2},
    [STI_FORMAT] = {"FormatError", 1},
    [STI_DIGEST] = {"DigestError", 1},
    [STI_INFEASIBLE] = {"InfeasiblePlanError", 1},
    [STI_RESOURCE] = {"ResourceError", 1},
    [STI_STORAGE_READ] = {"StorageReadError", 1},
    [STI_SPAWNED] = {"SpawnedRequestError", 1},
    [STI_REFUSED] = {"RefusedError", 3},
    [STI_STORAGE_FULL] = {"StorageFullError", 4},
    [STI_BUSY] = {"BusyError", 5},
    [STI_GATE] = {"GateError", 1},
    [STI_STOPPED] = {"stopped", 1},
    [STI_INTERNAL] = {"internal", 1},
};

const char *sti_error_name(StiCode code) { return error_kinds[code].name; }
int sti_exit_code(StiCode code) { return error_kinds[code].exit_code; }

StiCode sti_out_of_memory(StiError *error) {
  return sti_fail(error, STI_RESOURCE, "Free memory on the device and try again.", "There is not enough memory.");
}

/* ------------------------------------------------------------------ memory */

/* Under the address sanitizer, gcc's or clang's, what is not handed out may not be touched, as with malloc. */
#if defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER 1
#endif
#endif

#if defined(ADDRESS_SANITIZER)
/* Of sanitizer/asan_interface.h, which not every compiler brings. */
void __asan_poison_memory_region(void const volatile *address, size_t bytes);
void __asan_unpoison_memory_region(void const volatile *address, size_t bytes);
enum { GUARD_BYTES = 16 };
static void poison(void *memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
static void unpoison(void *memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
enum { GUARD_BYTES = 0 };
static void poison(void *memory, size_t bytes) { (void)memory, (void)bytes; }
static void unpoison(void *memory, size_t bytes) { (void)memory, (void)bytes; }
#endif

enum { FIRST_CHUNK = 64 << 10, LAST_CHUNK = 4 << 20, ARENA_ALIGNMENT = 16 };

struct ArenaChunk {
  ArenaChunk *next;
  size_t bytes; /* of the mapping */
  size_t used;  /* header included */
} __attribute__((aligned(ARENA_ALIGNMENT)));

void *pages_alloc(size_t bytes) {
  void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return memory == MAP_FAILED ? NULL : memory;
}

void pages_free(void *memory, size_t bytes) {
  if (memory != NULL) munmap(memory, bytes);
}

/* Chunks double from one to the next, so that few are mapped and little is wasted. */
static ArenaChunk *add_chunk(Arena *arena, size_t bytes) {
  size_t size = arena->chunks == NULL ? FIRST_CHUNK : arena->chunks->bytes * 2;
  if (size > LAST_CHUNK) size = LAST_CHUNK;
  if (bytes > SIZE_MAX - sizeof(ArenaChunk) - 4096) return NULL;
  if (size < bytes + sizeof(ArenaChunk)) size = (bytes + sizeof(ArenaChunk) + 4095) & ~(size_t)4095;
  ArenaChunk *chunk = pages_alloc(size);
  if (chunk == NULL) return NULL;
  *chunk = (ArenaChunk){.next = arena->chunks, .bytes = size, .used = sizeof(ArenaChunk)};
  arena->chunks = chunk;
  poison(chunk + 1, size - sizeof *chunk);
  return chunk;
}

void *arena_alloc(Arena *arena, size_t bytes) {
  if (bytes > SIZE_MAX / 2) return NULL;
  size_t size = ((bytes + ARENA_ALIGNMENT - 1) & ~(size_t)(ARENA_ALIGNMENT - 1)) + GUARD_BYTES;
  if (arena->cap_bytes != 0 && (size > arena->cap_bytes || arena->used_bytes > arena->cap_bytes - size)) return NULL;
  ArenaChunk *chunk = arena->chunks;
  if (chunk == NULL || chunk->bytes - chunk->used < size) chunk = add_chunk(arena, size);
  if (chunk == NULL) return NULL;
  void *memory = (char *)chunk + chunk->used;
  unpoison(memory, bytes);
  chunk->used += size;
  arena->used_bytes += size;
  return memory;
}

char *arena_text(Arena *arena, const char *text, size_t length) {
  char *copy = length < SIZE_MAX ? arena_alloc(arena, length + 1) : NULL;
  if (copy != NULL) memcpy(copy, text, length);
  return copy;
}

void arena_free(Arena *arena) {
  for (ArenaChunk *chunk = arena->chunks, *next; chunk != NULL; chunk = next) {
    next = chunk->next;
    unpoison(chunk, chunk->bytes);
    pages_free(chunk, chunk->bytes);
  }
  arena->chunks = NULL;
  arena->used_bytes = 0;
}

/* ------------------------------------------------------------------ text */

/* Room for `more` bytes and a NUL behind them. */
static bool text_reserve(Text *text, size_t more) {
  if (text->failed) return false;
  if (text->capacity - text->length > more) return true;
  size_t capacity = text->capacity < 256 ? 256 : text->capacity;
  while (capacity - text->length <= more && capacity <= SIZE_MAX / 2) capacity *= 2;
  char *data = capacity - text->length > more ? realloc(text->data, capacity) : NULL;
  if (data == NULL) {
    text->failed = true;
    return false;
  }
  text->data = data;
  text->capacity = capacity;
  return true;
}

void text_append(Text *text, const char *data, size_t length) {
  if (!text_reserve(text, length)) return;
  if (length != 0) memcpy(text->data + text->length, data, length);
  text->length += length;
  text->data[text->length] = '\0';
}

void text_printf(Text *text, const char *format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  int length = vsnprintf(NULL, 0, format, arguments);
  if (length < 0) text->failed = true;
  else if (text_reserve(text, (size_t)length)) {
    vsnprintf(text->data + text->length, (size_t)length + 1, format, again);
    text->length += (size_t)length;
  }
  va_end(again);
  va_end(arguments);
}

void text_clear(Text *text) {
  text->length = 0;
  text->failed = false;
  if (text->data != NULL) text->data[0] = '\0';
}

void text_free(Text *text) {
  free(text->data);
  *text = (Text){0};
}

/* ------------------------------------------------------------------ clocks and files */

static int64_t clock_ns(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t monotonic_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
int64_t wall_ns(void) { return clock_ns(CLOCK_REALTIME); }

/* Read to the end, at most `room` bytes. Returns the count, or -1 with errno set. */
static ssize_t read_all(int file, char *data, size_t room) {
  size_t done = 0;
  while (done < room) {
    ssize_t got = read(file, data + done, room - done);
    if (got == 0) break;
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    done += (size_t)got;
  }
  return (ssize_t)done;
}

static StiCode cannot_read(const char *path, int errno_value, StiError *error) {
  return sti_fail_errno(error, STI_FORMAT, errno_value, "", "%s: cannot be read", path);
}

StiCode read_file(Arena *arena, const char *path, size_t cap_bytes, const char **data, size_t *length,
                  StiError *error) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return cannot_read(path, errno, error);
  struct stat status;
  if (fstat(file, &status) != 0) {
    int errno_value = errno;
    close(file);
    return cannot_read(path, errno_value, error);
  }
  /* A file of /proc states size 0: then as much as it may have is asked for. */
  bool sized = S_ISREG(status.st_mode) && status.st_size > 0 && (uint64_t)status.st_size < cap_bytes;
  size_t room = sized ? (size_t)status.st_size : cap_bytes;
  char *memory = arena_alloc(arena, room + 2);
  ssize_t got = memory == NULL ? 0 : read_all(file, memory, room + 1);
  int errno_value = errno;
  close(file);
  if (memory == NULL) return sti_out_of_memory(error);
  if (got < 0) return cannot_read(path, errno_value, error);
  if ((size_t)got > room)
    return sti_fail(error, STI_FORMAT, "It is damaged or not one of ours; make it again.",
                    "%s: more than the %zu bytes it may have.", path, room);
  memory[got] = '\0';
  *data = memory;
  *length = (size_t)got;
  return STI_OK;
}
