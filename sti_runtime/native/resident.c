/* resident.c: reading resident.bin, on a thread of its own where it begins early. */
#include "resident.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels.h"
#include "threads.h"

enum { MOST_EARLY_BYTES = 64 << 20 };

static const char REMEDY_BUNDLE[] = "Verify the bundle and deploy it again.";

struct Resident {
  pthread_t thread;
  char *path;
  uint8_t *data; /* [bytes + CACHE_LINE_BYTES]; NULL when it could not be read */
  int64_t bytes;
};

static size_t room_for(int64_t bytes) { return (size_t)bytes + CACHE_LINE_BYTES; }

/* Read [0, bytes) of a file; how many there were, or -1 and errno. */
static int64_t read_whole(int file, uint8_t *data, int64_t bytes) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t got = pread(file, data + done, (size_t)(bytes - done), done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) break;
    done += got;
  }
  return done;
}

/* ------------------------------------------------------------------ early */

/* What fails here fails again in resident_take, which says so. */
static void read_early(Resident *resident) {
  struct stat status;
  const int file = open(resident->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return;
  if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size <= MOST_EARLY_BYTES) {
    posix_fadvise(file, 0, 0, POSIX_FADV_WILLNEED);
    resident->bytes = status.st_size;
    resident->data = pages_alloc(room_for(resident->bytes));
    if (resident->data && read_whole(file, resident->data, resident->bytes) != resident->bytes) {
      pages_free(resident->data, room_for(resident->bytes));
      resident->data = NULL;
    }
  }
  close(file);
}

static void *early_main(void *argument) {
  read_early(argument);
  return NULL;
}

Resident *resident_begin(const char *folder) {
  Resident *resident = calloc(1, sizeof *resident);
  if (!resident) return NULL;
  const size_t length = strlen(folder) + sizeof "/resident.bin";
  resident->path = malloc(length);
  if (resident->path) snprintf(resident->path, length, "%s/resident.bin", folder);
  if (resident->path && thread_start(&resident->thread, SMALL_STACK_BYTES, early_main, resident) == 0) return resident;
  free(resident->path);
  free(resident);
  return NULL;
}

void resident_drop(Resident *resident) {
  if (!resident) return;
  pthread_join(resident->thread, NULL);
  if (resident->data) pages_free(resident->data, room_for(resident->bytes));
  free(resident->path);
  free(resident);
}

/* ------------------------------------------------------------------ now */

static StiCode read_now(const char *folder, int64_t bytes, uint8_t **data, StiError *error) {
  char path[4096];
  if (snprintf(path, sizeof path, "%s/resident.bin", folder) >= (int)sizeof path)
    return sti_fail(error, STI_INPUT, "Use a shorter path.", "%s: the path is too long.", folder);
  uint8_t *memory = pages_alloc(room_for(bytes));
  if (!memory) return sti_out_of_memory(error);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  const int64_t done = file < 0 ? -1 : read_whole(file, memory, bytes);
  const int reason = errno;
  if (file >= 0) close(file);
  if (done == bytes) {
    *data = memory;
    return STI_OK;
  }
  pages_free(memory, room_for(bytes));
  if (done < 0) return sti_fail_errno(error, STI_STORAGE_READ, reason, REMEDY_BUNDLE, "%s: cannot be read", path);
  return sti_fail(error, STI_FORMAT, REMEDY_BUNDLE, "%s: is truncated at %lld bytes.", path, (long long)done);
}

StiCode resident_take(Resident *begun, const char *folder, int64_t bytes, uint8_t **data, StiError *error) {
  *data = NULL;
  if (begun) {
    pthread_join(begun->thread, NULL);
    if (begun->data && begun->bytes == bytes) {
      *data = begun->data;
      begun->data = NULL;
    } else if (begun->data) {
      pages_free(begun->data, room_for(begun->bytes));
    }
    free(begun->path);
    free(begun);
  }
  return *data ? STI_OK : read_now(folder, bytes, data, error);
}
