/* agent_log.h: the log for people: jobs/<id>/<attempt>/agent.log, and standard error should storage be full.
 * Never called inside a timed region.
 */
#ifndef AGENT_LOG_H
#define AGENT_LOG_H

#include "../../sti_runtime/native/base.h"

/* Until then lines go to standard error only. Errors: storage_error's. */
StiCode log_open(const char *path, StiError *error);
void log_close(void);

/* One line: time (UTC), level, text. Newlines in the text become blanks. */
void log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_warning(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
