/* child.c: see child.h. */
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { OUT_CAP_BYTES = 16 << 20, WORDS_CAP_BYTES = 4096, POLL_MS = 200, END_POLL_NS = 1000000 };
static const int64_t killed_limit_ns = 10000000000; /* a killed process ends when the kernel lets go of its reads */
extern char **environ;

typedef struct {
  pid_t pid;
  int input, output, words; /* our ends of its standard streams; -1: closed */
} Child;

/* How long to stay with the process. */
typedef struct {
  int64_t deadline_ns, limit_s;
  bool (*stopped)(void);
} Patience;

static void close_end(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

/* ------------------------------------------------------------------ start */

/* Start the process with these pipes as its standard streams. Returns an errno. */
static int start_child(const Command *command, int pipes[3][2], pid_t *pid) {
  posix_spawn_file_actions_t actions;
  int problem = posix_spawn_file_actions_init(&actions);
  if (problem != 0) return problem;
  for (int stream = 0; stream < 3 && problem == 0; stream++)
    problem = posix_spawn_file_actions_adddup2(&actions, pipes[stream][stream == 0 ? 0 : 1], stream);
  if (problem == 0) problem = posix_spawn(pid, command->program, &actions, NULL, command->argv, environ);
  posix_spawn_file_actions_destroy(&actions);
  return problem;
}

static int open_child(const Command *command, Child *child) {
  int pipes[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}}, problem = 0;
  pid_t pid = -1;
  for (int stream = 0; stream < 3 && problem == 0; stream++)
    if (pipe2(pipes[stream], O_CLOEXEC) != 0) problem = errno;
  if (problem == 0) problem = start_child(command, pipes, &pid);
  for (int stream = 0; stream < 3; stream++) {
    close_end(&pipes[stream][stream == 0 ? 0 : 1]);
    if (problem != 0) close_end(&pipes[stream][stream == 0 ? 1 : 0]);
  }
  *child = (Child){.pid = pid, .input = pipes[0][1], .output = pipes[1][0], .words = pipes[2][0]};
  if (problem == 0) fcntl(child->input, F_SETFL, O_NONBLOCK);
  return problem;
}

/* ------------------------------------------------------------------ streams */

/* STI_STOPPED, or STI_SPAWNED when the time is up. */
static StiCode check_patience(const Patience *patience, StiError *error) {
  if (patience->stopped()) return STI_STOPPED;
  if (monotonic_ns() <= patience->deadline_ns) return STI_OK;
  return sti_fail(error, STI_SPAWNED, "See agent.log.", "A request's process had not ended after %" PRId64 " s.",
                  patience->limit_s);
}

/* Take what there is to read; the end of the stream closes it. More than the cap is dropped. */
static void take(int *fd, Text *text, size_t cap) {
  char block[16384];
  ssize_t got = read(*fd, block, sizeof block);
  if (got < 0 && errno == EINTR) return;
  if (got <= 0) close_end(fd);
  else if (text->length < cap) text_append(text, block, (size_t)got);
}

/* Give the input, take both streams until they end. */
static StiCode converse(Child *child, const Text *input, const Patience *patience, Said *said, StiError *error) {
  size_t given = 0;
  while (child->output >= 0 || child->words >= 0) {
    struct pollfd ends[3] = {{child->input, POLLOUT, 0}, {child->output, POLLIN, 0}, {child->words, POLLIN, 0}};
    int ready = poll(ends, 3, POLL_MS);
    STI_TRY(check_patience(patience, error));
    if (ready <= 0) continue;
    if (ends[0].revents != 0) {
      ssize_t sent = write(child->input, input->data + given, input->length - given);
      if (sent > 0) given += (size_t)sent;
      if (given == input->length || (sent < 0 && errno != EAGAIN && errno != EINTR)) close_end(&child->input);
    }
    if (ends[1].revents != 0) take(&child->output, &said->out, OUT_CAP_BYTES);
    if (ends[2].revents != 0) take(&child->words, &said->words, WORDS_CAP_BYTES);
  }
  return STI_OK;
}

/* ------------------------------------------------------------------ end */

/* Whether it has ended; then *status is its exit status. Errors: STI_SPAWNED when that cannot be known. */
static StiCode look(pid_t pid, bool *ended, int *status, StiError *error) {
  pid_t found = waitpid(pid, status, WNOHANG);
  *ended = found == pid;
  if (found >= 0 || errno == EINTR) return STI_OK;
  return sti_fail_errno(error, STI_SPAWNED, errno, "Run the agent where SIGCHLD is not ignored.",
                        "The end of a request's process was not seen");
}

static void nap(void) { nanosleep(&(struct timespec){.tv_nsec = END_POLL_NS}, NULL); }

static StiCode await_end(pid_t pid, const Patience *patience, int *status, StiError *error) {
  for (bool ended = false;;) {
    STI_TRY(look(pid, &ended, status, error));
    if (ended) return STI_OK;
    STI_TRY(check_patience(patience, error));
    nap();
  }
}

/* Kill it, unless it has ended, and wait for its end. One that the kernel holds longer is left: it can only go. */
static void end_child(pid_t pid) {
  StiError ignored;
  int status;
  int64_t deadline_ns = monotonic_ns() + killed_limit_ns;
  for (bool ended = false, killed = false; monotonic_ns() < deadline_ns; nap()) {
    if (look(pid, &ended, &status, &ignored) != STI_OK || ended) return;
    if (!killed) kill(pid, SIGKILL); /* it is there and ours: the number is not another's */
    killed = true;
  }
}

StiCode child_run(const Command *command, const Text *input, int64_t limit_s, bool (*stopped)(void), Said *said,
                  StiError *error) {
  Child child;
  Patience patience = {monotonic_ns() + limit_s * 1000000000, limit_s, stopped};
  int problem = open_child(command, &child);
  if (problem != 0)
    return sti_fail_errno(error, STI_SPAWNED, problem, "Close other programs on the device.",
                          "A request's process could not be started");
  StiCode code = converse(&child, input, &patience, said, error);
  close_end(&child.input);
  close_end(&child.output);
  close_end(&child.words);
  if (code == STI_OK) code = await_end(child.pid, &patience, &said->status, error);
  if (code != STI_OK) end_child(child.pid);
  if (code == STI_OK && (said->out.failed || said->words.failed)) return sti_out_of_memory(error);
  return code;
}
