/* allocation_log.c: the heap and the mappings of a program, with the times at which it asked for any or gave any back.
 *
 * Linked into a program it stands for the C library's allocator and for mmap and munmap. At the program's end it prints
 * the times (monotonic_ns) to standard error, one to a line; where there were more than fit, "overflow".
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../sti_runtime/native/base.h"

enum { MOST_EVENTS = 1 << 16, HEAP_BYTES = 64 << 20, HEADER_BYTES = 64 };

static int64_t events[MOST_EVENTS];
static _Atomic int event_count;
static _Alignas(4096) uint8_t heap[HEAP_BYTES]; /* handed out from its start; never used again */
static _Atomic size_t heap_used;

static void note(void) {
  const int number = atomic_fetch_add(&event_count, 1);
  if (number < MOST_EVENTS) events[number] = monotonic_ns();
}

__attribute__((destructor)) static void print_events(void) {
  const int count = atomic_load(&event_count);
  for (int i = 0; i < count && i < MOST_EVENTS; i++) fprintf(stderr, "%lld\n", (long long)events[i]);
  if (count > MOST_EVENTS) fprintf(stderr, "overflow\n");
}

/* ------------------------------------------------------------------ the heap */

/* The size lies before what is handed out. */
static size_t *size_of(void *memory) { return (size_t *)(void *)((uint8_t *)memory - HEADER_BYTES); }

void *aligned_alloc(size_t alignment, size_t bytes) {
  const size_t most = HEADER_BYTES + alignment + bytes;
  note();
  if (alignment > HEAP_BYTES || bytes > HEAP_BYTES) return NULL;
  const size_t start = atomic_fetch_add(&heap_used, most);
  if (start + most > HEAP_BYTES) return NULL;
  const uintptr_t first = (uintptr_t)heap + start + HEADER_BYTES;
  void *memory = heap + ((first + alignment - 1) / alignment * alignment - (uintptr_t)heap);
  *size_of(memory) = bytes;
  return memory;
}

void *malloc(size_t bytes) { return aligned_alloc(HEADER_BYTES, bytes); }

void *calloc(size_t count, size_t bytes) { /* the heap is zeros */
  return bytes > 0 && count > HEAP_BYTES / bytes ? NULL : malloc(count * bytes);
}

void *realloc(void *memory, size_t bytes) {
  void *moved = malloc(bytes);
  if (memory != NULL && moved != NULL) memcpy(moved, memory, *size_of(memory) < bytes ? *size_of(memory) : bytes);
  return moved;
}

void free(void *memory) {
  if (memory != NULL) note();
}

/* ------------------------------------------------------------------ mappings */

void *mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset) {
  note();
  return (void *)syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
}

int munmap(void *address, size_t bytes) {
  note();
  return (int)syscall(SYS_munmap, address, bytes);
}
