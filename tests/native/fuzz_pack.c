/* fuzz_pack.c: the first line of what `accept` takes in. What is taken names distinct chunks that the bundle has. */
#include <stdlib.h>
#include <string.h>

#include "../../agent/native/pack.h"

enum { CHUNKS = 100 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const Layout layout = {.chunk_count = CHUNKS};
  Arena arena = {0};
  Pack pack;
  StiError error;
  if (pack_parse(&arena, (const char *)data, size, &layout, &pack, &error) == STI_OK) {
    bool seen[CHUNKS] = {false};
    for (int32_t i = 0; i < pack.count; i++) {
      int32_t number = pack.chunks[i];
      if (number < 0 || number >= CHUNKS || seen[number]) abort();
      seen[number] = true;
    }
  }
  arena_free(&arena);
  return 0;
}
