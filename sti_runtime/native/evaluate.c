/* evaluate.c: a plan's logits for many rows, for its task score: untimed, in batches.
 *
 * A batch goes through the same path as a request: its layers stream through a working buffer of two layers, so each
 * version is read and decompressed once per batch and memory stays bounded. Batches hold rows of similar length, cut to
 * their longest: padding does not change a row.
 */
#include <stdlib.h>
#include <string.h>

#include "executor.h"

enum { ACTIVATION_BYTES = 64 << 20 }; /* about what a batch may take */

typedef struct {
  Plan plan;              /* the same, nothing preloaded */
  PlannedShard *shards;   /* [depth · width] */
  int64_t *order;         /* [R] rows by length */
  int32_t batch;          /* B */
  int32_t *input_ids;     /* [B, L] */
  int32_t *token_types;   /* [B, L] */
  int32_t *lengths;       /* [B] */
} Evaluation;

/* Rows by length, ascending, as they come. */
static StiCode sort_rows(int64_t *order, const int32_t *lengths, int64_t rows, int32_t tokens, StiError *error) {
  int64_t *place = calloc((size_t)tokens + 2, sizeof *place);
  if (place == NULL) return sti_out_of_memory(error);
  for (int64_t i = 0; i < rows; i++) place[lengths[i] + 1] += 1;
  for (int32_t length = 1; length <= tokens; length++) place[length] += place[length - 1];
  for (int64_t i = 0; i < rows; i++) order[place[lengths[i]]++] = i;
  free(place);
  return STI_OK;
}

/* Rows per batch: as asked, if their activations (x, its sum, q, k, v, context; FFN before and after) stay small. */
static int32_t batch_rows(const ModelConfig *model, int64_t rows, int32_t tokens, int32_t batch) {
  const int64_t row_bytes = 4LL * tokens * (6LL * model->hidden + 2LL * model->ffn);
  const int64_t most = ACTIVATION_BYTES / row_bytes;
  int64_t chosen = batch < 1 ? 1 : batch;
  if (chosen > most) chosen = most;
  if (chosen > rows) chosen = rows;
  return chosen < 1 ? 1 : (int32_t)chosen;
}

/* The plan with every shard streamed, and a working buffer in which one layer is read while another is computed. */
static void stream_all(Evaluation *evaluation, const Plan *plan) {
  const int32_t width = plan->submodel.width, count = plan->submodel.depth * width;
  int64_t layer_bytes = 0, largest = 0;
  evaluation->plan = *plan;
  evaluation->plan.shards = evaluation->shards;
  for (int32_t i = 0; i < count; i++) {
    PlannedShard *shard = &evaluation->shards[i];
    *shard = plan->shards[i];
    shard->preloaded = false;
    shard->order = i;
    layer_bytes = i % width == 0 ? shard->length : layer_bytes + shard->length;
    if (layer_bytes > largest) largest = layer_bytes;
  }
  evaluation->plan.load_exec = false;
  evaluation->plan.preload_bytes = 0;
  evaluation->plan.working_bytes = 2 * largest;
}

/* Copy the rows order[0 … batch), cut to the last and longest of them. */
static Rows gather(Evaluation *evaluation, const int64_t *order, int32_t batch, const int32_t *input_ids,
                   const int32_t *token_types, const int32_t *lengths, int32_t tokens) {
  const int32_t longest = lengths[order[batch - 1]];
  const size_t bytes = (size_t)longest * sizeof(int32_t);
  for (int32_t i = 0; i < batch; i++) {
    memcpy(evaluation->input_ids + (int64_t)i * longest, input_ids + order[i] * tokens, bytes);
    if (token_types != NULL)
      memcpy(evaluation->token_types + (int64_t)i * longest, token_types + order[i] * tokens, bytes);
    evaluation->lengths[i] = lengths[order[i]];
  }
  return (Rows){evaluation->input_ids, evaluation->token_types, evaluation->lengths, batch, longest};
}

static StiCode check_rows(const Executor *executor, const int32_t *input_ids, const int32_t *token_types,
                          const int32_t *lengths, int64_t rows, int32_t tokens, StiError *error) {
  for (int64_t i = 0; i < rows; i++) {
    const int32_t *types = token_types == NULL ? NULL : token_types + i * tokens;
    const Rows row = {input_ids + i * tokens, types, lengths + i, 1, tokens};
    STI_TRY(rows_check(executor->manifest, &row, error));
  }
  return STI_OK;
}

static StiCode evaluate(Executor *executor, Evaluation *evaluation, const int32_t *input_ids,
                        const int32_t *token_types, const int32_t *lengths, int64_t rows, int32_t tokens,
                        float *logits, bool (*stopping)(void), StiError *error) {
  const Plan *plan = &evaluation->plan;
  const int32_t labels = executor->manifest->model.labels;
  const Storage *storage;
  Outcome outcome;
  STI_TRY(sort_rows(evaluation->order, lengths, rows, tokens, error));
  STI_TRY(executor_check(executor, plan, error));
  STI_TRY(executor_storage(executor, IO_BUFFERED, &storage, error));
  STI_TRY(engine_allocate(executor->engine, plan->submodel.width, tokens, evaluation->batch, error));
  STI_TRY(executor_reserve(executor, evaluation->batch, tokens, error));
  STI_TRY(executor_size_working(executor, plan, error));
  for (int64_t first = 0; first < rows; first += evaluation->batch) {
    const int32_t count = rows - first < evaluation->batch ? (int32_t)(rows - first) : evaluation->batch;
    const int64_t *order = evaluation->order + first;
    const Rows batch = gather(evaluation, order, count, input_ids, token_types, lengths, tokens);
    STI_TRY(executor_request(executor, plan, &batch, storage, false, stopping, &outcome, error));
    for (int32_t i = 0; i < count; i++)
      memcpy(logits + order[i] * labels, outcome.logits + (int64_t)i * labels, (size_t)labels * sizeof *logits);
  }
  return STI_OK;
}

StiCode executor_evaluate(Executor *executor, const Plan *plan, const int32_t *input_ids, const int32_t *token_types,
                          const int32_t *lengths, int64_t rows, int32_t tokens, int32_t batch, float *logits,
                          bool (*stopping)(void), StiError *error) {
  if (!executor->manifest->model.has_head)
    return sti_fail(error, STI_INPUT, "Train one: stifarm model train.", "A model without a head has no accuracy.");
  STI_TRY(plan_check_bundle(plan, executor->manifest, error));
  STI_TRY(check_rows(executor, input_ids, token_types, lengths, rows, tokens, error));
  const size_t shards = (size_t)plan->submodel.depth * (size_t)plan->submodel.width;
  Evaluation evaluation = {.batch = batch_rows(&executor->manifest->model, rows, tokens, batch)};
  const size_t cells = (size_t)evaluation.batch * (size_t)tokens;
  evaluation.shards = calloc(shards, sizeof *evaluation.shards);
  evaluation.order = calloc((size_t)rows + 1, sizeof *evaluation.order);
  evaluation.input_ids = calloc(cells, sizeof *evaluation.input_ids);
  evaluation.token_types = calloc(cells, sizeof *evaluation.token_types);
  evaluation.lengths = calloc((size_t)evaluation.batch, sizeof *evaluation.lengths);
  StiCode code = STI_RESOURCE;
  if (evaluation.shards == NULL || evaluation.order == NULL || evaluation.input_ids == NULL ||
      evaluation.token_types == NULL || evaluation.lengths == NULL) {
    sti_out_of_memory(error);
  } else {
    stream_all(&evaluation, plan);
    pthread_mutex_lock(&executor->busy);
    code = evaluate(executor, &evaluation, input_ids, token_types, lengths, rows, tokens, logits, stopping, error);
    pthread_mutex_unlock(&executor->busy);
  }
  free(evaluation.shards);
  free(evaluation.order);
  free(evaluation.input_ids);
  free(evaluation.token_types);
  free(evaluation.lengths);
  return code;
}
