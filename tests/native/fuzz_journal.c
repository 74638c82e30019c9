/* fuzz_journal.c: recovery of a journal. What it keeps is inside the file, and reading only that much says the same. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../agent/native/journal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool holds) {
  if (!holds) abort();
}

/* Give every line of the shape "<seq> <8 digits> <json>" the checksum of its JSON, so that damage gets behind it. */
static void mend_checksums(char *data, size_t size) {
  for (char *line = data, *end = data + size; line < end;) {
    char *newline = memchr(line, '\n', (size_t)(end - line)), *stop = newline == NULL ? end : newline;
    char *blank = memchr(line, ' ', (size_t)(stop - line));
    if (blank != NULL && stop - blank > 10 && blank[9] == ' ') {
      char digits[9];
      snprintf(digits, sizeof digits, "%08x", crc32_of(blank + 10, (size_t)(stop - blank - 10)));
      memcpy(blank + 1, digits, 8);
    }
    line = stop + 1;
  }
}

static void scan(const void *data, size_t size) {
  static JournalState state, again; /* too large for a stack */
  StiError error;
  char path[64];
  int file = memfd_create("journal", MFD_CLOEXEC);
  require(file >= 0 && write(file, data, size) == (ssize_t)size);
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  if (journal_scan(path, &state, &error) == STI_OK) {
    require(state.good_bytes >= 0 && state.good_bytes <= (int64_t)size);
    require(ftruncate(file, state.good_bytes) == 0);
    require(journal_scan(path, &again, &error) == STI_OK);
    require(again.good_bytes == state.good_bytes && again.next_seq == state.next_seq);
    require(again.has_end == state.has_end && again.done.count == state.done.count);
    journal_state_free(&again);
    journal_state_free(&state);
  }
  close(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  scan(data, size);
  char *mended = malloc(size + 1);
  require(mended != NULL);
  if (size != 0) memcpy(mended, data, size);
  mend_checksums(mended, size);
  scan(mended, size);
  free(mended);
  return 0;
}
