/* prepare.c: what happens before a request's clock starts: the plan's reads, and room for them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "executor.h"

/* ------------------------------------------------------------------ a session */

static int32_t shard_count(const Plan *plan) { return plan->submodel.depth * plan->submodel.width; }

Session *executor_session(Executor *executor, const Storage *storage, const PlannedShard *shards, int32_t count,
                          int32_t depth) {
  Session *session = &executor->session;
  memset(session, 0, sizeof *session);
  session->storage = storage;
  session->shards = shards;
  session->shard_count = count;
  session->layer_count = depth;
  session->index = executor->index;
  session->reads = executor->reads;
  session->loaded = executor->loaded;
  session->arrived = executor->arrived;
  session->layers = executor->layers;
  memset(session->arrived, 0, (size_t)count * sizeof *session->arrived);
  memset(session->layers, 0, (size_t)depth * sizeof *session->layers);
  for (int32_t i = 0; i < count; i++) {
    const PlannedShard *shard = &shards[i];
    const Version *version = manifest_version(executor->manifest, shard->source_layer, shard->slice, shard->fidelity);
    session->loaded[i] = (LoadedShard){shard->slice, shard->fidelity, version->outliers, NULL};
  }
  return session;
}

void executor_add_reads(Executor *executor, Session *session, int32_t first, int32_t count, bool placed) {
  const int32_t merged = merge_reads(session->shards, executor->index + first, count, executor->merged);
  for (int32_t i = 0; i < merged; i++) {
    const MergedRead *from = &executor->merged[i];
    executor->reads[session->read_count++] = (Read){
        .layer = from->layer,
        .first = first + from->first,
        .count = from->count,
        .file = storage_region(executor->manifest, from->fidelity),
        .placed = placed,
        .offset = from->offset,
        .length = from->length,
    };
    session->layers[from->layer].missing += from->count;
  }
  session->unread += count;
}

void executor_add_plan(Executor *executor, Session *session, const Plan *plan, bool cold) {
  const int32_t preloaded = plan_order(plan, true, executor->index);
  for (int32_t i = 0; i < preloaded; i++) {
    const int32_t shard = executor->index[i];
    session->loaded[shard].data = preload_get(&executor->preload, &plan->shards[shard]);
  }
  if (cold) executor_add_reads(executor, session, 0, preloaded, true);
  const int32_t streamed = plan_order(plan, false, executor->index + preloaded);
  executor_add_reads(executor, session, preloaded, streamed, false);
}

void executor_drop_unread(Executor *executor, const Session *session) {
  for (int32_t i = 0; i < session->read_count; i++) {
    const Read *read = &session->reads[i];
    for (int32_t j = read->first; j < read->first + read->count && read->placed; j++)
      if (!session->arrived[session->index[j]])
        preload_evict(&executor->preload, &session->shards[session->index[j]]);
  }
}

/* ------------------------------------------------------------------ plans and buffers */

/* The smallest working buffer with which the plan's reads can all be made. A layer's bytes are freed only when it has
 * been computed, and layers are computed in order; so while layer l is incomplete, everything read for layers ≥ l is
 * held. read_bytes, last_read [depth] and order [depth · width] are scratch. */
static int64_t smallest_working_bytes(const Plan *plan, int32_t *order, int64_t *read_bytes, int32_t *last_read) {
  const int32_t count = plan_order(plan, false, order), depth = plan->submodel.depth;
  int64_t needed = 0, held = 0, all = 0;
  int32_t done = 0;
  for (int32_t layer = 0; layer < depth; layer++) {
    read_bytes[layer] = 0;
    last_read[layer] = -1;
  }
  for (int32_t i = 0; i < count; i++) last_read[plan->shards[order[i]].layer] = i;
  for (int32_t i = 0; i < count; i++) {
    const PlannedShard *shard = &plan->shards[order[i]];
    for (; done < depth && last_read[done] < i; done++) held -= read_bytes[done]; /* may have been computed before */
    held += shard->length;
    all += shard->length;
    read_bytes[shard->layer] += shard->length;
    if (held > needed) needed = held;
  }
  return plan->load_exec ? all : needed;
}

StiCode executor_check(Executor *executor, const Plan *plan, StiError *error) {
  STI_TRY(plan_check_bundle(plan, executor->manifest, error));
  const int64_t needed = smallest_working_bytes(plan, executor->index, executor->layer_bytes, executor->last_read);
  if (needed <= plan->working_bytes) return STI_OK;
  char remedy[100];
  snprintf(remedy, sizeof remedy, "Plan with a working buffer of at least %lld bytes.", (long long)needed);
  return sti_fail(error, STI_RESOURCE, remedy, "The plan streams %lld bytes at once into a working buffer of %lld.",
                  (long long)needed, (long long)plan->working_bytes);
}

StiCode executor_size_working(Executor *executor, const Plan *plan, StiError *error) {
  const int32_t count = plan_order(plan, false, executor->index);
  int64_t longest = 0, total = 0;
  bool in_order = true;
  for (int32_t i = 0; i < count; i++) {
    const PlannedShard *shard = &plan->shards[executor->index[i]];
    if (shard->length > longest) longest = shard->length;
    total += shard->length;
    in_order = in_order && (i == 0 || plan->shards[executor->index[i - 1]].layer <= shard->layer);
  }
  return ring_size(&executor->io.working, plan->working_bytes, longest, total, in_order, error);
}

static StiCode place(Executor *executor, const PlannedShard *shard, StiError *error) {
  return preload_place(&executor->preload, shard) == NULL ? sti_out_of_memory(error) : STI_OK;
}

/* Read the preloaded shards that are missing; `index` lists them, in read order. */
static StiCode read_missing(Executor *executor, const Plan *plan, const Storage *storage, int32_t missing,
                            StiError *error) {
  StiCode code = io_start(&executor->io, error);
  Session *session = executor_session(executor, storage, plan->shards, shard_count(plan), plan->submodel.depth);
  for (int32_t i = 0; i < missing && code == STI_OK; i++) {
    const int32_t shard = executor->index[i];
    code = place(executor, &plan->shards[shard], error);
    session->loaded[shard].data = preload_get(&executor->preload, &plan->shards[shard]);
  }
  executor_add_reads(executor, session, 0, missing, true);
  if (code == STI_OK) {
    io_begin(&executor->io, session);
    code = io_finish(&executor->io, session, error);
  }
  executor_drop_unread(executor, session);
  return code;
}

StiCode executor_refill(Executor *executor, const Plan *plan, const Storage *storage, StiError *error) {
  preload_resize(&executor->preload, plan->preload_bytes);
  preload_keep(&executor->preload, plan->shards, shard_count(plan));
  const int32_t preloaded = plan_order(plan, true, executor->index);
  int32_t missing = 0;
  for (int32_t i = 0; i < preloaded; i++)
    if (preload_get(&executor->preload, &plan->shards[executor->index[i]]) == NULL)
      executor->index[missing++] = executor->index[i];
  return missing == 0 ? STI_OK : read_missing(executor, plan, storage, missing, error);
}

StiCode executor_empty(Executor *executor, const Plan *plan, StiError *error) {
  StiCode code = STI_OK;
  preload_clear(&executor->preload);
  preload_resize(&executor->preload, plan->preload_bytes);
  for (int32_t i = 0; i < shard_count(plan) && code == STI_OK; i++)
    if (plan->shards[i].preloaded) code = place(executor, &plan->shards[i], error);
  if (code != STI_OK) preload_clear(&executor->preload);
  return code;
}

StiCode executor_reserve(Executor *executor, int32_t batch, int32_t tokens, StiError *error) {
  const int64_t logits = (int64_t)batch * executor->manifest->model.labels;
  STI_TRY(io_start(&executor->io, error));
  STI_TRY(rows_reserve(&executor->rows, executor->manifest, batch, tokens, error));
  if (logits <= executor->logit_room) return STI_OK;
  free(executor->logits);
  executor->logits = calloc((size_t)logits, sizeof *executor->logits);
  executor->logit_room = executor->logits == NULL ? 0 : logits;
  return executor->logits == NULL ? sti_out_of_memory(error) : STI_OK;
}

StiCode executor_fill(Executor *executor, const Plan *plan, IoMode io_mode, StiError *error) {
  const Storage *storage;
  executor_lock(executor);
  StiCode code = executor_check(executor, plan, error);
  if (code == STI_OK) code = executor_storage(executor, io_mode, &storage, error);
  if (code == STI_OK) code = executor_refill(executor, plan, storage, error);
  return executor_unlock(executor, code);
}
