/* waiting.c: see waiting.h. */
#include "waiting.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent_log.h"
#include "spool.h"

#define WAITING_FILE "waiting"

void waiting_note(const char *folder, const char *causes) {
  Path path;
  path_below(path, folder, WAITING_FILE);
  FILE *file = fopen(path, "we");
  bool written = file != NULL && fputs(causes, file) >= 0;
  if (file != NULL && fclose(file) != 0) written = false;
  if (!written) log_warning("%s: cannot be written: %s", path, strerror(errno));
}

void waiting_over(const char *folder) {
  Path path;
  path_below(path, folder, WAITING_FILE);
  if (unlink(path) != 0 && errno != ENOENT) log_warning("%s: cannot be removed: %s", path, strerror(errno));
}
