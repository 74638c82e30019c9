/* process.h: agent processes: the pid file, telling a running one from a stale pid. */
#ifndef AGENT_PROCESS_H
#define AGENT_PROCESS_H

#include "spool.h"

#define PID_FILE "pid"

/* Start time of a live process in clock ticks since boot; false if there is none (zombies are none). */
bool start_ticks(int64_t pid, int64_t *ticks);
/* Say that this process runs the job in `folder`. Errors: storage_error's, STI_INPUT. */
StiCode write_pid(const char *folder, StiError *error);
void remove_pid(const char *folder);
/* The process that runs the job in `folder`; 0 when its pid file is absent or stale. A pid counts only if the boot and
 * the process's start time are those in the file. */
int64_t running_pid(const char *folder);

#endif
