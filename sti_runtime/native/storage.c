/* storage.c: opening, proving, reading and evicting a bundle's files. */
#include "storage.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char remedy[] = "Verify the bundle and deploy it again; if it happens again, the storage is failing.";

/* ------------------------------------------------------------------ accounting */

int counter_open(void) {
  char path[64];
  snprintf(path, sizeof path, "/proc/self/task/%ld/io", syscall(SYS_gettid));
  return open(path, O_RDONLY | O_CLOEXEC);
}

bool counter_read(int counter, int64_t *bytes) {
  char text[1024];
  const ssize_t got = counter < 0 ? -1 : pread(counter, text, sizeof text - 1, 0);
  if (got <= 0) return false;
  text[got] = '\0';
  const char *field = strstr(text, "\nread_bytes: ");
  if (field == NULL) return false;
  *bytes = strtoll(field + strlen("\nread_bytes: "), NULL, 10);
  return true;
}

/* ------------------------------------------------------------------ opening */

/* Write dirty pages back: they could not be evicted, and would be written inside a timed read. Unlike fdatasync this
 * does not flush the device, which takes milliseconds even when there is nothing to write. */
static int settle(int fd) {
  const unsigned wait_and_write =
      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (sync_file_range(fd, 0, 0, wait_and_write) == 0) return 0;
  return errno == ENOSYS || errno == EINVAL || errno == ESPIPE ? fdatasync(fd) : -1;
}

static StiCode open_file(const char *folder, const char *name, int flags, int *fd, StiError *error) {
  char path[PATH_MAX];
  const int length = snprintf(path, sizeof path, "%s/%s", folder, name);
  *fd = -1;
  if (length >= (int)sizeof path) errno = ENAMETOOLONG;
  else *fd = open(path, O_RDONLY | O_CLOEXEC | flags);
  if (*fd >= 0) return STI_OK;
  return sti_fail_errno(error, STI_STORAGE_READ, errno, remedy, "%s/%s: cannot be opened", folder, name);
}

/* Read a page through the cache, then directly, and see whether the kernel counted the second read. page [4096].
 * Returns 0 or an errno: a file that cannot be read at all proves nothing. */
static int prove_direct(int cached, int direct, void *page, bool *works) {
  *works = false;
  posix_fadvise(cached, 0, 0, POSIX_FADV_RANDOM); /* one page, no readahead */
  if (settle(cached) != 0 || pread(cached, page, STI_ALIGNMENT, 0) < 0) return errno;
  if (direct < 0) return 0;
  const int counter = counter_open();
  int64_t before = 0, after = 0;
  const bool counted_before = counter_read(counter, &before);
  const ssize_t got = pread(direct, page, STI_ALIGNMENT, 0);
  const int failure = got < 0 ? errno : 0;
  const bool counted_after = counter_read(counter, &after);
  if (counter >= 0) close(counter);
  *works = got > 0 && counted_before && counted_after && after - before >= got;
  return failure == EINVAL ? 0 : failure;
}

static StiCode direct_works(const char *folder, const char *name, bool *works, StiError *error) {
  StiError refused;
  int cached, direct;
  STI_TRY(open_file(folder, name, 0, &cached, error));
  void *page = pages_alloc(STI_ALIGNMENT);
  if (page == NULL) {
    close(cached);
    return sti_out_of_memory(error);
  }
  open_file(folder, name, O_DIRECT, &direct, &refused); /* -1: the filesystem has no direct IO */
  const int failure = prove_direct(cached, direct, page, works);
  if (direct >= 0) close(direct);
  close(cached);
  pages_free(page, STI_ALIGNMENT);
  if (failure == 0) return STI_OK;
  return sti_fail_errno(error, STI_STORAGE_READ, failure, remedy, "%s/%s: cannot be read", folder, name);
}

static StiCode open_stored(Storage *storage, const char *name, int64_t bytes, StiError *error) {
  const char *folder = storage->folder;
  StoredFile *file = &storage->files[storage->file_count];
  struct stat status;
  STI_TRY(open_file(folder, name, storage->mode == IO_DIRECT ? O_DIRECT : 0, &file->fd, error));
  file->name = name;
  file->bytes = bytes;
  storage->file_count += 1; /* closed with the others from here on */
  if (fstat(file->fd, &status) != 0 || settle(file->fd) != 0)
    return sti_fail_errno(error, STI_STORAGE_READ, errno, remedy, "%s/%s: cannot be synced", folder, name);
  if (status.st_size < bytes)
    return sti_fail(error, STI_STORAGE_READ, remedy,
                    "%s/%s: %lld bytes, but its manifest says %lld: it is truncated.", folder, name,
                    (long long)status.st_size, (long long)bytes);
  if (storage->mode == IO_BUFFERED) posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM);
  return STI_OK;
}

static StiCode open_all(Storage *storage, const Manifest *manifest, StiError *error) {
  const int32_t shards = manifest->model.layers * manifest->model.heads;
  for (int32_t i = 0; i < manifest->region_count; i++) {
    const Version *last = &manifest->regions[i].versions[shards - 1];
    STI_TRY(open_stored(storage, manifest->regions[i].file, last->offset + last->length, error));
  }
  return open_stored(storage, "embeddings.bin", manifest_file_bytes(manifest, "embeddings.bin"), error);
}

/* The mode in use, proven on one of the files. */
static StiCode open_mode(Storage *storage, const char *folder, const char *name, IoMode asked, StiError *error) {
  *storage = (Storage){.mode = asked, .folder = folder};
  if (asked == IO_BUFFERED) return STI_OK;
  bool works;
  STI_TRY(direct_works(folder, name, &works, error));
  if (!works) storage->mode = IO_BUFFERED;
  return STI_OK;
}

StiCode storage_open(Storage *storage, const char *folder, const Manifest *manifest, IoMode asked, StiError *error) {
  STI_TRY(open_mode(storage, folder, manifest->regions[0].file, asked, error));
  const StiCode code = open_all(storage, manifest, error);
  if (code != STI_OK) storage_close(storage);
  return code;
}

StiCode storage_open_file(Storage *storage, const char *folder, const char *name, int64_t bytes, IoMode asked,
                          StiError *error) {
  STI_TRY(open_mode(storage, folder, name, asked, error));
  const StiCode code = open_stored(storage, name, bytes, error);
  if (code != STI_OK) storage_close(storage);
  return code;
}

void storage_close(Storage *storage) {
  for (int i = 0; i < storage->file_count; i++) close(storage->files[i].fd);
  storage->file_count = 0;
}

int storage_region(const Manifest *manifest, int fidelity) {
  return (int)(manifest_region(manifest, fidelity) - manifest->regions);
}

int storage_embeddings(const Manifest *manifest) { return manifest->region_count; }

/* ------------------------------------------------------------------ reading */

/* Leave out the first `done` bytes of parts[*count]. */
static struct iovec *skip_parts(struct iovec *parts, int *count, size_t done) {
  while (*count > 0 && done >= parts->iov_len) {
    done -= parts->iov_len;
    parts += 1;
    *count -= 1;
  }
  if (*count > 0) {
    parts->iov_base = (char *)parts->iov_base + done;
    parts->iov_len -= done;
  }
  return parts;
}

StiCode storage_read(const Storage *storage, int file, int64_t offset, struct iovec *parts, int count, int64_t required,
                     StiError *error) {
  const StoredFile *stored = &storage->files[file];
  int64_t done = 0;
  while (true) {
    const ssize_t got = preadv(stored->fd, parts, count, offset + done);
    if (got < 0) {
      if (errno == EINTR) continue;
      return sti_fail_errno(error, STI_STORAGE_READ, errno, remedy, "%s/%s: reading %lld bytes at %lld failed",
                            storage->folder, stored->name, (long long)(required - done), (long long)(offset + done));
    }
    done += got;
    if (done >= required) return STI_OK;
    /* A direct read that stops inside a block has met the end of the file. */
    if (got == 0 || (storage->mode == IO_DIRECT && got % STI_ALIGNMENT != 0)) break;
    parts = skip_parts(parts, &count, (size_t)got);
  }
  return sti_fail(error, STI_STORAGE_READ, remedy,
                  "%s/%s: ends at %lld, but bytes up to %lld were to be read: it was truncated.", storage->folder,
                  stored->name, (long long)(offset + done), (long long)(offset + required));
}

void storage_evict(const Storage *storage) {
  for (int i = 0; i < storage->file_count; i++) {
    settle(storage->files[i].fd); /* a dirty page would stay */
    posix_fadvise(storage->files[i].fd, 0, 0, POSIX_FADV_DONTNEED);
  }
}
