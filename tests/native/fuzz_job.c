/* fuzz_job.c: job files. What is taken is written as canonical JSON and read back the same. */
#include <stdlib.h>
#include <string.h>

#include "../../agent/native/job.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool holds) {
  if (!holds) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Arena arena = {0};
  Job job, again;
  StiError error;
  if (job_parse(&arena, (const char *)data, size, "job.json", &job, &error) == STI_OK) {
    Text text = {0}, text_again = {0};
    JsonValue *value;
    bool canonical;
    job_write(&text, &job);
    require(!text.failed && job_parse(&arena, text.data, text.length, "job.json", &again, &error) == STI_OK);
    require(json_parse_noting(&arena, text.data, text.length, "job.json", &value, &canonical, &error) == STI_OK);
    require(canonical);
    job_write(&text_again, &again);
    require(text.length == text_again.length && memcmp(text.data, text_again.data, text.length) == 0);
    text_free(&text);
    text_free(&text_again);
  }
  arena_free(&arena);
  return 0;
}
