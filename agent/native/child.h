/* child.h: a process of our own: it is given a text on its standard input and says what it has to say until a limit.
 *
 * Between call and return the process exists; afterwards it has ended and been waited for, or was killed and has not ended
 * within ten seconds (in a call of the kernel that cannot be interrupted).
 */
#ifndef AGENT_CHILD_H
#define AGENT_CHILD_H

#include "../../sti_runtime/native/base.h"

/* program: its path; argv [… NULL]. No string is changed. */
typedef struct { const char *program; char *const *argv; } Command;

/* What a process said, each cut at its cap, and its exit status as waitpid gives it. Free out and words. */
typedef struct {
  Text out, words; /* standard output, standard error */
  int status;
} Said;

/* Start it, give it `input`, take both streams to their ends, and wait until it has ended, for `limit_s` in all; one
 * that lives on then, or when `stopped` says so, is killed.
 * Errors: STI_SPAWNED (cannot be started, over the limit, its end unseen), STI_STOPPED, STI_RESOURCE. */
StiCode child_run(const Command *command, const Text *input, int64_t limit_s, bool (*stopped)(void), Said *said,
                  StiError *error);

#endif
