/* storage.h: a bundle's files open for reads in one mode, and the kernel's proof of where the bytes came from.
 *
 * Direct: O_DIRECT, the page cache is bypassed. A filesystem may accept O_DIRECT and serve the read from memory all
 * the same, so the mode is used only after a proof: a page that is surely cached is read directly, and the kernel must
 * count it as read from the device. Buffered: ordinary reads without readahead; storage_evict drops what is cached.
 *
 * Source: open(2), posix_fadvise(2), sync_file_range(2), proc_pid_io(5).
 */
#ifndef STI_STORAGE_H
#define STI_STORAGE_H

#include <sys/uio.h>

#include "formats.h"
#include "pipeline.h"

enum { STORAGE_FILES = STI_FIDELITIES + 1 };

typedef struct {
  const char *name; /* the manifest's */
  int64_t bytes;    /* what the manifest says of it */
  int fd;
} StoredFile;

typedef struct {
  IoMode mode;                     /* in use */
  const char *folder;              /* the bundle's */
  StoredFile files[STORAGE_FILES]; /* [file_count] regions in the manifest's order, then embeddings.bin */
  int file_count;
} Storage;

/* Threads may read at the same time. Errors: STI_STORAGE_READ, also for a file shorter than its manifest says. */
StiCode storage_open(Storage *storage, const char *folder, const Manifest *manifest, IoMode asked, StiError *error);
/* One file of `bytes` bytes, alone: files[0]. */
StiCode storage_open_file(Storage *storage, const char *folder, const char *name, int64_t bytes, IoMode asked,
                          StiError *error);
void storage_close(Storage *storage);

/* Positions in files[]; the manifest must hold the fidelity. */
int storage_region(const Manifest *manifest, int fidelity);
int storage_embeddings(const Manifest *manifest);

/* Fill parts[count] one after the other from `offset` on. `required`: how much must be there; the rest may lie behind
 * the file's end. Direct mode: offset, sizes and addresses are multiples of 4096. Changes parts.
 * Errors: STI_STORAGE_READ. */
StiCode storage_read(const Storage *storage, int file, int64_t offset, struct iovec *parts, int count, int64_t required,
                     StiError *error);

/* Drop the files' clean pages from the page cache (those that no process has mapped). */
void storage_evict(const Storage *storage);

/* ------------------------------------------------------------------ accounting */

/* Bytes the kernel has fetched from storage for one thread: per thread, so that pages of the executable faulted in
 * elsewhere in the process do not pass for data read. */
int counter_open(void); /* of the calling thread; -1 where the kernel does not account for IO */
bool counter_read(int counter, int64_t *bytes);

#endif
