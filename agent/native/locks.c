/* locks.c: see locks.h. */
#include "locks.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../../sti_runtime/native/threads.h"

enum { POLL_NS = 50000000 };
static const double deploy_wait_s = 600;

/* ------------------------------------------------------------------ one attempt */

static bool in_sticky_folder(const char *path) {
  Path folder;
  struct stat status;
  const char *slash = strrchr(path, '/');
  snprintf(folder, sizeof folder, "%.*s", slash == NULL ? 1 : (int)(slash - path) + 1, slash == NULL ? "." : path);
  return stat(folder, &status) == 0 && (status.st_mode & S_ISVTX);
}

static StiCode open_lock(const char *path, int *fd, StiError *error) {
  int flags = O_RDWR | O_NOFOLLOW | O_CLOEXEC;
  /* Linux refuses O_CREAT on another user's file in a sticky folder, where the machine's lock lies. */
  *fd = open(path, flags);
  if (*fd < 0 && errno == ENOENT) {
    *fd = open(path, flags | O_CREAT, 0666);
    /* Whatever the umask: every user of the machine takes this lock. */
    if (*fd >= 0 && in_sticky_folder(path)) fchmod(*fd, 0666);
  }
  if (*fd >= 0) return STI_OK;
  return sti_fail_errno(error, STI_FORMAT, errno,
                        "Its folder must exist and be writable, and it must not be a symbolic link.",
                        "%s: the lock file cannot be opened", path);
}

static StiCode cannot_lock(const char *path, int errno_value, StiError *error) {
  return sti_fail_errno(error, STI_RESOURCE, errno_value, "Put the file where the file system has locks.",
                        "%s: cannot be locked", path);
}

/* Whether `path` still names the locked file, and not one made after its removal. */
static bool is_current(int fd, const char *path) {
  struct stat named, held;
  return stat(path, &named) == 0 && fstat(fd, &held) == 0 && named.st_dev == held.st_dev &&
         named.st_ino == held.st_ino;
}

/* *fd holds the lock, or is -1 if somebody else does. */
static StiCode try_lock(const char *path, int *fd, StiError *error) {
  for (;;) {
    STI_TRY(open_lock(path, fd, error));
    if (flock(*fd, LOCK_EX | LOCK_NB) != 0) {
      int problem = errno;
      close(*fd);
      *fd = -1;
      return problem == EWOULDBLOCK || problem == EINTR ? STI_OK : cannot_lock(path, problem, error);
    }
    if (is_current(*fd, path)) return STI_OK;
    close(*fd);
  }
}

/* ------------------------------------------------------------------ locks of the spool */

void lock_read_label(const char *path, char label[LABEL_CHARS]) {
  label[0] = '\0';
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t length = fd < 0 ? 0 : read(fd, label, LABEL_CHARS - 1);
  label[length > 0 ? length : 0] = '\0';
  if (fd >= 0) close(fd);
}

static StiCode busy(const char *path, const char *what, StiError *error) {
  char label[LABEL_CHARS];
  lock_read_label(path, label);
  return sti_fail(error, STI_BUSY, "Try again when it is done, or stop it.", "%s is in use%s%s (%s is locked).", what,
                  label[0] ? " by " : "", label, path);
}

StiCode lock_hold(const char *path, double wait_s, const char *what, const char *label, Lock *lock, StiError *error) {
  int64_t deadline = monotonic_ns() + (int64_t)(wait_s * 1e9);
  for (;;) {
    STI_TRY(try_lock(path, &lock->fd, error));
    if (lock->fd >= 0) break;
    if (monotonic_ns() >= deadline) return busy(path, what, error);
    nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
  }
  int problem = ftruncate(lock->fd, 0) == 0 ? write_whole(lock->fd, label, strlen(label), 0) : errno;
  if (problem == 0) return STI_OK;
  lock_release(lock);
  return storage_error(error, problem, path);
}

void lock_release(Lock *lock) {
  if (lock->fd >= 0) close(lock->fd);
  lock->fd = -1;
}

StiCode hold_run(const Spool *spool, double wait_s, const char *label, Lock *lock, StiError *error) {
  Path path;
  spool_path(spool, path, "locks/run");
  return lock_hold(path, wait_s, "The device", label, lock, error);
}

StiCode hold_deploy(const Spool *spool, Lock *lock, StiError *error) {
  Path path;
  spool_path(spool, path, "locks/deploy");
  return lock_hold(path, deploy_wait_s, "Deploying to this device", "", lock, error);
}

/* ------------------------------------------------------------------ the machine's lock */

/* A thread that blocks in flock, so that the kernel queues us while the main thread stays responsive. Freed by whoever
 * of the two is done with it last. */
typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  int fd, operation, problem; /* problem: errno of flock */
  bool finished, abandoned;
} Waiter;

static void free_waiter(Waiter *waiter) {
  pthread_cond_destroy(&waiter->changed);
  pthread_mutex_destroy(&waiter->mutex);
  free(waiter);
}

static void *wait_for_lock(void *state) {
  Waiter *waiter = state;
  int problem = 0;
  while (flock(waiter->fd, waiter->operation) != 0 && (problem = errno) == EINTR) problem = 0;
  pthread_mutex_lock(&waiter->mutex);
  waiter->finished = true;
  waiter->problem = problem;
  bool abandoned = waiter->abandoned;
  pthread_cond_signal(&waiter->changed);
  pthread_mutex_unlock(&waiter->mutex);
  if (abandoned) {
    close(waiter->fd); /* a lock that is granted too late is released at once */
    free_waiter(waiter);
  }
  return NULL;
}

/* Takes over the descriptor. */
static StiCode start_waiter(int fd, int operation, Waiter **started, StiError *error) {
  pthread_condattr_t clock;
  pthread_t thread;
  Waiter *waiter = calloc(1, sizeof *waiter);
  if (waiter == NULL) {
    close(fd);
    return sti_out_of_memory(error);
  }
  waiter->fd = fd;
  waiter->operation = operation;
  pthread_mutex_init(&waiter->mutex, NULL);
  pthread_condattr_init(&clock);
  pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  pthread_cond_init(&waiter->changed, &clock);
  pthread_condattr_destroy(&clock);
  int problem = thread_start(&thread, SMALL_STACK_BYTES, wait_for_lock, waiter);
  if (problem == 0) {
    pthread_detach(thread);
    *started = waiter;
    return STI_OK;
  }
  close(fd);
  free_waiter(waiter);
  return sti_fail_errno(error, STI_RESOURCE, problem, "Let the device start more threads.",
                        "A thread cannot be started");
}

/* Returns whether the waiter is finished; if stopping() came first it was abandoned, and must not be used again. */
static bool watch_waiter(Waiter *waiter, bool (*stopping)(void)) {
  pthread_mutex_lock(&waiter->mutex);
  while (!waiter->finished && !waiter->abandoned) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += POLL_NS;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&waiter->changed, &waiter->mutex, &until);
    waiter->abandoned = !waiter->finished && stopping();
  }
  bool finished = waiter->finished;
  pthread_mutex_unlock(&waiter->mutex);
  return finished;
}

StiCode lock_hold_machine(const char *path, bool timed, bool (*stopping)(void), Lock *lock, StiError *error) {
  int operation = timed ? LOCK_EX : LOCK_SH;
  Waiter *waiter = NULL;
  lock->fd = -1;
  if (path == NULL) return STI_OK;
  STI_TRY(open_lock(path, &lock->fd, error));
  if (flock(lock->fd, operation | LOCK_NB) == 0) return STI_OK;
  int fd = lock->fd;
  lock->fd = -1;
  STI_TRY(start_waiter(fd, operation, &waiter, error));
  if (!watch_waiter(waiter, stopping)) return STI_STOPPED;
  int problem = waiter->problem;
  free_waiter(waiter);
  if (problem == 0) {
    lock->fd = fd;
    return STI_OK;
  }
  close(fd);
  return cannot_lock(path, problem, error);
}
