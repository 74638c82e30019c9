/* disk_read.c: plain direct reads, one after the other: the bandwidth of the storage as it is now.
 *
 *     disk_read FILE BYTES       both multiples of 4096; reads from the file's start, 1 MiB at a time
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 1 << 20 };

static long long monotonic_ns(void)
{
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(int argc, char **argv)
{
  if (argc != 3) {
    fprintf(stderr, "usage: disk_read FILE BYTES\n");
    return 2;
  }
  long long bytes = atoll(argv[2]), done = 0;
  void *buffer;
  int file = open(argv[1], O_RDONLY | O_DIRECT);
  if (file < 0 || posix_memalign(&buffer, 4096, BLOCK)) {
    fprintf(stderr, "%s: %s\n", argv[1], strerror(errno));
    return 1;
  }
  long long began = monotonic_ns();
  while (done < bytes) {
    ssize_t got = pread(file, buffer, bytes - done < BLOCK ? bytes - done : BLOCK, done);
    if (got <= 0) {
      fprintf(stderr, "%s: %s at %lld\n", argv[1], got ? strerror(errno) : "ends", done);
      return 1;
    }
    done += got;
  }
  printf("{\"bytes\":%lld,\"duration_ns\":%lld}\n", done, monotonic_ns() - began);
  return 0;
}
