/* journal_program.c: append payloads to a journal, one file each: `program JOURNAL PAYLOAD…`.
 *
 * Prints a line per payload, "ok" or the error's class name and words, then the journal's state.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "../../agent/native/journal.h"
#include "../../agent/native/signals.h"

enum { PAYLOAD_CAP = 16 << 20 };

static void append(Journal *journal, const char *path) {
  Arena arena = {0};
  Text payload = {0};
  StiError error = {0};
  const char *data;
  size_t length;
  StiCode code = read_file(&arena, path, PAYLOAD_CAP, &data, &length, &error);
  if (code == STI_OK) {
    text_append(&payload, data, length);
    code = journal_append(journal, &payload, &error);
  }
  if (code == STI_OK)
    puts("ok");
  else
    printf("%s: %s\n", sti_error_name(code), error.what);
  text_free(&payload);
  arena_free(&arena);
}

int main(int argc, char **argv) {
  static Journal journal;
  StiError error = {0};
  signals_ignore_writes();
  if (argc < 2) return 2;
  StiCode code = journal_open(argv[1], &journal, &error);
  if (code != STI_OK) {
    printf("%s: %s\n", sti_error_name(code), error.what);
    return 1;
  }
  for (int i = 2; i < argc; i++) append(&journal, argv[i]);
  printf("%" PRId64 " %" PRId64 " %" PRId64 "\n", journal.state.next_seq, journal.state.done.count,
         journal.state.failed.count);
  journal_close(&journal);
  return 0;
}
