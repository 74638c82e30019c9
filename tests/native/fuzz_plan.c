/* fuzz_plan.c: plans. What is taken is written and read back the same, and all its shards are read exactly once. */
#include <stdlib.h>
#include <string.h>

#include "../../sti_runtime/native/formats.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool holds) {
  if (!holds) abort();
}

static StiCode parse(Arena *arena, const char *data, size_t size, Plan *plan) {
  JsonValue *value;
  StiError error;
  STI_TRY(json_parse(arena, data, size, "plan", &value, &error));
  return plan_parse(arena, value, "plan", "", plan, &error);
}

/* Shards in the merged reads of one kind. */
static int32_t shards_read(const Plan *plan, bool preloaded, int32_t *index, MergedRead *reads) {
  int32_t count = plan_order(plan, preloaded, index), merged = merge_reads(plan->shards, index, count, reads), sum = 0;
  for (int32_t i = 0; i < merged; i++) {
    require(reads[i].first == sum && reads[i].count > 0);
    require(reads[i].length <= STI_MERGE_LIMIT_BYTES || reads[i].count == 1);
    sum += reads[i].count;
  }
  require(sum == count);
  return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Arena arena = {0};
  Plan plan, again;
  if (parse(&arena, (const char *)data, size, &plan) == STI_OK) {
    Text text = {0};
    char digest[65], digest_again[65];
    plan_write(&text, &plan);
    require(parse(&arena, text.data, text.length, &again) == STI_OK);
    plan_digest(&plan, digest);
    plan_digest(&again, digest_again);
    require(strcmp(digest, digest_again) == 0);
    int32_t shards = plan.submodel.depth * plan.submodel.width;
    int32_t *index = calloc((size_t)shards, sizeof *index);
    MergedRead *reads = calloc((size_t)shards, sizeof *reads);
    require(index != NULL && reads != NULL);
    require(shards_read(&plan, false, index, reads) + shards_read(&plan, true, index, reads) == shards);
    free(index);
    free(reads);
    text_free(&text);
  }
  arena_free(&arena);
  return 0;
}
