/* signals.h: stopping on SIGTERM and SIGINT: first after the running unit, at the second signal at once. */
#ifndef AGENT_SIGNALS_H
#define AGENT_SIGNALS_H

#include <stdbool.h>

/* Catch SIGTERM and SIGINT; ignore SIGHUP, for the connection may go while the job runs. */
void signals_install(void);
/* For every verb: a limit on file sizes and a closed pipe are errors of write, not the end of the process. */
void signals_ignore_writes(void);

bool stop_requested(void);
int stop_signal(void);     /* 0: none came */

/* Between begin and end a second signal abandons the unit; outside, signals are only noted. */
void unit_begin(void);
void unit_end(void);
bool unit_abandoned(void); /* stays true until the next unit_begin */

#endif
