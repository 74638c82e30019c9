/* pipeline.c: requests: the compute side of a plan whose shards arrive meanwhile. */
#include "pipeline.h"

#include "executor.h"

/* ------------------------------------------------------------------ one request, compute side */

typedef struct { int64_t cpu_ns, start_ns; } Section;

static Section begin_section(const Executor *executor) {
  const Throttle *throttle = &executor->throttle;
  const bool limited = throttle->section_begin != NULL && throttle->section_end != NULL;
  return (Section){limited ? throttle->section_begin(throttle->state) : -1, monotonic_ns()};
}

/* Returns when the section ended, the throttle's wait included. */
static int64_t end_section(const Executor *executor, Section section) {
  if (section.cpu_ns >= 0) executor->throttle.section_end(executor->throttle.state, section.cpu_ns, section.start_ns);
  return monotonic_ns();
}

/* The times are scaled to the wall time, of which a throttle's wait is a part. */
int64_t executor_compute(const Executor *executor, int32_t source_layer, const LoadedShard *shards, int32_t count,
                         LayerTimes *times) {
  const Section section = begin_section(executor);
  engine_layer(executor->engine, source_layer, shards, count, times);
  const int64_t end_ns = end_section(executor, section), wall_ns = end_ns - section.start_ns;
  const int64_t worked_ns = times->decompress_ns + times->compute_ns;
  if (section.cpu_ns >= 0 && worked_ns > 0)
    times->decompress_ns = (int64_t)((double)times->decompress_ns / (double)worked_ns * (double)wall_ns);
  times->compute_ns = wall_ns > times->decompress_ns ? wall_ns - times->decompress_ns : 0;
  return end_ns;
}

static int64_t after(int64_t start_ns, int64_t time_ns) { return time_ns > start_ns ? time_ns - start_ns : 0; }

/* Wait for a layer and compute it. False when the session failed. */
static bool run_layer(Executor *executor, Session *session, const Plan *plan, int32_t layer, int64_t start_ns) {
  const int32_t width = plan->submodel.width;
  LayerIo *state = &session->layers[layer];
  LayerTimes times = {0, 0};
  const int64_t wait_ns = monotonic_ns();
  if (!io_wait(&executor->io, session, plan->load_exec ? &session->unread : &state->missing)) return false;
  const int64_t ready_ns = monotonic_ns();
  const int64_t end_ns =
      executor_compute(executor, plan->submodel.kept[layer], &session->loaded[layer * width], width, &times);
  io_release(&executor->io, session, layer);
  executor->trace[layer] = (LayerTrace){
      .io_start_ns = after(start_ns, state->start_ns),
      .io_end_ns = after(start_ns, state->end_ns),
      .bytes = state->bytes,
      .compute_start_ns = ready_ns - start_ns,
      .compute_end_ns = end_ns - start_ns,
      .decompress_ns = times.decompress_ns,
      .stall_ns = state->bytes > 0 ? ready_ns - wait_ns : 0,
  };
  return true;
}

/* Embedding, layers, head, while the session's reads arrive. */
static StiCode compute_request(Executor *executor, Session *session, const Plan *plan, const Rows *rows,
                               bool (*stopping)(void), Outcome *outcome, StiError *error) {
  const int64_t start_ns = outcome->started_ns;
  const RowReads *reads = &executor->rows;
  if (!io_wait(&executor->io, session, &session->rows_missing)) return STI_STORAGE_READ;
  const int64_t embed_start_ns = monotonic_ns();
  Section section = begin_section(executor);
  engine_begin(executor->engine, reads->words, reads->types, reads->positions, rows->lengths, rows->batch,
               rows->tokens);
  const int64_t embed_end_ns = end_section(executor, section);
  for (int32_t layer = 0; layer < session->layer_count; layer++) {
    if (stopping != NULL && stopping()) return sti_fail(error, STI_STOPPED, "", "Stopped.");
    if (!run_layer(executor, session, plan, layer, start_ns)) return STI_STORAGE_READ;
    outcome->stall_ns += executor->trace[layer].stall_ns;
    outcome->planned_bytes += executor->trace[layer].bytes;
  }
  const int64_t head_start_ns = monotonic_ns();
  section = begin_section(executor);
  engine_finish(executor->engine, executor->logits, &outcome->hidden);
  const int64_t end_ns = end_section(executor, section);
  outcome->latency_ns = end_ns - start_ns;
  outcome->embed_io_ns = embed_start_ns - start_ns;
  outcome->embed_compute_ns = embed_end_ns - embed_start_ns;
  outcome->head_ns = end_ns - head_start_ns;
  return STI_OK;
}

StiCode executor_request(Executor *executor, const Plan *plan, const Rows *rows, const Storage *storage, bool cold,
                         bool (*stopping)(void), Outcome *outcome, StiError *error) {
  const ModelConfig *model = &executor->manifest->model;
  const int32_t depth = plan == NULL ? 0 : plan->submodel.depth;
  const int32_t shards = plan == NULL ? 0 : depth * plan->submodel.width;
  Session *session = executor_session(executor, storage, plan == NULL ? NULL : plan->shards, shards, depth);
  if (plan != NULL) executor_add_plan(executor, session, plan, cold);
  const int64_t before = io_storage_bytes(&executor->io);
  *outcome = (Outcome){
      .logits = executor->logits,
      .logit_count = model->has_head ? model->labels : 0,
      .trace = executor->trace,
      .layer_count = depth,
      .io_mode = storage->mode,
      .started_ns = monotonic_ns(),
  };
  rows_plan(&executor->rows, executor->manifest, rows);
  session->rows = &executor->rows;
  session->rows_missing = executor->rows.run_count;
  outcome->embed_bytes = outcome->planned_bytes = executor->rows.required_bytes;
  io_begin(&executor->io, session);
  const StiCode computed = compute_request(executor, session, plan, rows, stopping, outcome, error);
  const StiCode read = io_end(&executor->io, session, error);
  executor_drop_unread(executor, session);
  if (read != STI_OK || computed != STI_OK) return read != STI_OK ? read : computed;
  const int64_t storage_bytes = io_storage_bytes(&executor->io);
  outcome->io_not_accounted = before < 0 || storage_bytes < 0;
  outcome->storage_bytes = outcome->io_not_accounted ? 0 : storage_bytes - before;
  return STI_OK;
}

/* ------------------------------------------------------------------ requests */

/* Read all that a request will stream once, so that the page cache holds it. */
static StiCode warm_page_cache(Executor *executor, const Plan *plan, const Rows *rows, const Storage *storage,
                               StiError *error) {
  const int32_t count = plan_order(plan, false, executor->index);
  StiCode code = STI_OK;
  int64_t longest = STI_MERGE_LIMIT_BYTES;
  for (int32_t i = 0; i < count; i++)
    if (plan->shards[executor->index[i]].length > longest) longest = plan->shards[executor->index[i]].length;
  void *scratch = pages_alloc((size_t)longest);
  if (scratch == NULL) return sti_out_of_memory(error);
  rows_plan(&executor->rows, executor->manifest, rows);
  for (int32_t i = 0; i < executor->rows.run_count && code == STI_OK; i++) {
    const PageRun *run = &executor->rows.runs[i];
    struct iovec part = {scratch, (size_t)run->length};
    code = storage_read(storage, storage_embeddings(executor->manifest), run->offset, &part, 1, run->required, error);
  }
  for (int32_t i = 0; i < count && code == STI_OK; i++) {
    const PlannedShard *shard = &plan->shards[executor->index[i]];
    struct iovec part = {scratch, (size_t)shard->length};
    const int file = storage_region(executor->manifest, shard->fidelity);
    code = storage_read(storage, file, shard->offset, &part, 1, shard->length, error);
  }
  pages_free(scratch, (size_t)longest);
  return code;
}

static StiCode check_request(Executor *executor, const Plan *plan, const Rows *rows, RequestKind kind,
                             IoMode io_mode, StiError *error) {
  STI_TRY(executor_check(executor, plan, error));
  STI_TRY(rows_check(executor->manifest, rows, error));
  if (rows->tokens != plan->sequence_length)
    return sti_fail(error, STI_INPUT, "Profile and plan for the task's sequence length.",
                    "The plan is for %lld tokens, the row has %d.", (long long)plan->sequence_length,
                    (int)rows->tokens);
  if (kind == REQUEST_CACHED && io_mode != IO_BUFFERED)
    return sti_fail(error, STI_INPUT, "Ask for buffered reads.", "A cached request reads through the page cache.");
  return STI_OK;
}

static StiCode run(Executor *executor, const Plan *plan, const Rows *rows, RequestKind kind, IoMode io_mode,
                   Outcome *outcome, StiError *error) {
  const bool cold = kind == REQUEST_SPAWN_COLD || kind == REQUEST_COLD;
  const Storage *storage;
  STI_TRY(check_request(executor, plan, rows, kind, io_mode, error));
  STI_TRY(executor_storage(executor, io_mode, &storage, error));
  STI_TRY(engine_allocate(executor->engine, plan->submodel.width, rows->tokens, 1, error));
  STI_TRY(executor_reserve(executor, 1, rows->tokens, error));
  STI_TRY(executor_size_working(executor, plan, error));
  STI_TRY(cold ? executor_empty(executor, plan, error) : executor_refill(executor, plan, storage, error));
  if (kind == REQUEST_CACHED) STI_TRY(warm_page_cache(executor, plan, rows, storage, error));
  STI_TRY(executor_request(executor, plan, rows, storage, cold, NULL, outcome, error));
  if (outcome->io_not_accounted) return STI_OK;
  outcome->not_cached = kind == REQUEST_CACHED && outcome->storage_bytes > 0;
  outcome->not_from_storage = kind != REQUEST_CACHED && outcome->storage_bytes < outcome->planned_bytes;
  return STI_OK;
}

StiCode executor_run(Executor *executor, const Plan *plan, const Request *request, RequestKind kind, IoMode io_mode,
                     Outcome *outcome, StiError *error) {
  const Rows rows = {request->input_ids, request->token_types, &request->length, 1, request->tokens};
  executor_lock(executor);
  return executor_unlock(executor, run(executor, plan, &rows, kind, io_mode, outcome, error));
}

static StiCode run_fixed(Executor *executor, const Rows *rows, IoMode io_mode, Outcome *outcome, StiError *error) {
  const Storage *storage;
  STI_TRY(rows_check(executor->manifest, rows, error));
  STI_TRY(executor_storage(executor, io_mode, &storage, error));
  /* As wide as layers get: what computes single layers next is not to find the engine smaller. */
  STI_TRY(engine_allocate(executor->engine, executor->manifest->model.heads, rows->tokens, 1, error));
  STI_TRY(executor_reserve(executor, 1, rows->tokens, error));
  STI_TRY(executor_request(executor, NULL, rows, storage, true, NULL, outcome, error));
  outcome->not_from_storage = !outcome->io_not_accounted && outcome->storage_bytes < outcome->planned_bytes;
  return STI_OK;
}

StiCode executor_run_fixed(Executor *executor, const Request *request, IoMode io_mode, Outcome *outcome,
                           StiError *error) {
  const Rows rows = {request->input_ids, request->token_types, &request->length, 1, request->tokens};
  executor_lock(executor);
  return executor_unlock(executor, run_fixed(executor, &rows, io_mode, outcome, error));
}
