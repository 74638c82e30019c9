/* waiting.c: see waiting.h. */
#include "waiting.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent_log.h"
#include "spool.h"

#define WAITING_FILE "waiting"

void waiting_note(const char *folder, const GateVerdict *verdicts, int count) {
  Path path;
  path_below(path, folder, WAITING_FILE);
  FILE *file = fopen(path, "we");
  bool written = file != NULL;
  const char *between = "";
  for (int i = 0; i < count && written; i++) {
    if (verdicts[i].state != GATE_FAIL) continue;
    written = fprintf(file, "%s%s: %s", between, verdicts[i].gate, verdicts[i].detail) > 0;
    between = "; ";
  }
  if (file != NULL && fclose(file) != 0) written = false;
  if (!written) log_warning("%s: cannot be written: %s", path, strerror(errno));
}

void waiting_over(const char *folder) {
  Path path;
  path_below(path, folder, WAITING_FILE);
  if (unlink(path) != 0 && errno != ENOENT) log_warning("%s: cannot be removed: %s", path, strerror(errno));
}
