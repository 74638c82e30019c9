/* agent_log.c: see agent_log.h. */
#include "agent_log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "spool.h"

enum { LINE_CHARS = 6000 };

static int log_fd = -1;

StiCode log_open(const char *path, StiError *error) {
  log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  return log_fd >= 0 ? STI_OK : storage_error(error, errno, path);
}

void log_close(void) {
  if (log_fd >= 0) close(log_fd);
  log_fd = -1;
}

/* A log that cannot be written stops nothing: what counts is in the journal. */
static void put_line(const char *line, size_t length) {
  if (log_fd >= 0 && write(log_fd, line, length) < 0) errno = 0;
  if (write(STDERR_FILENO, line, length) < 0) errno = 0;
}

__attribute__((format(printf, 2, 0))) static void log_line(const char *level, const char *format, va_list arguments) {
  char line[LINE_CHARS];
  struct timespec now;
  struct tm utc;
  clock_gettime(CLOCK_REALTIME, &now);
  gmtime_r(&now.tv_sec, &utc);
  size_t length = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S", &utc);
  length += (size_t)snprintf(line + length, sizeof line - length, ".%03dZ %s ", (int)(now.tv_nsec / 1000000), level);
  size_t text = length;
  int wanted = vsnprintf(line + length, sizeof line - length - 1, format, arguments);
  length += wanted < 0 ? 0 : strlen(line + length);
  for (; text < length; text++)
    if (line[text] == '\n') line[text] = ' ';
  line[length++] = '\n';
  put_line(line, length);
}

void log_info(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log_line("INFO", format, arguments);
  va_end(arguments);
}

void log_warning(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log_line("WARNING", format, arguments);
  va_end(arguments);
}

void log_error(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log_line("ERROR", format, arguments);
  va_end(arguments);
}
