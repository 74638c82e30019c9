/* spawn.c: start a command in a fresh process and say when it began, when it ended and what it used.
 *
 *     spawn [-g CGROUP_PROCS_FILE]… -- ARGV…
 *
 * Enters the control groups first, so that neither entering them nor a large parent's fork is part of what is timed.
 * The command's standard output passes through; then one line of JSON follows.
 */
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static long long monotonic_ns(void)
{
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int enter(const char *procs)
{
  FILE *file = fopen(procs, "w");
  if (!file) return -1;
  int written = fprintf(file, "%d", (int)getpid());
  return fclose(file) || written < 0 ? -1 : 0;
}

static long long microseconds(struct timeval time)
{
  return time.tv_sec * 1000000LL + time.tv_usec;
}

int main(int argc, char **argv)
{
  int next = 1;
  for (; next + 1 < argc && !strcmp(argv[next], "-g"); next += 2)
    if (enter(argv[next + 1])) {
      fprintf(stderr, "cannot enter the control group of %s: %s\n", argv[next + 1], strerror(errno));
      return 126;
    }
  if (next + 1 >= argc || strcmp(argv[next], "--")) {
    fprintf(stderr, "usage: spawn [-g CGROUP_PROCS_FILE]... -- ARGV...\n");
    return 2;
  }
  pid_t child;
  long long spawned = monotonic_ns();
  int failed = posix_spawnp(&child, argv[next + 1], NULL, NULL, argv + next + 1, environ);
  if (failed) {
    fprintf(stderr, "cannot run %s: %s\n", argv[next + 1], strerror(failed));
    return 127;
  }
  int status;
  struct rusage usage;
  while (wait4(child, &status, 0, &usage) < 0)
    if (errno != EINTR) return 1;
  printf("{\"spawned_ns\":%lld,\"ended_ns\":%lld,\"status\":%d,\"user_us\":%lld,\"system_us\":%lld}\n", spawned,
         monotonic_ns(), WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
         microseconds(usage.ru_utime), microseconds(usage.ru_stime));
  return 0;
}
