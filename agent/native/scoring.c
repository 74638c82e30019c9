/* scoring.c: evaluate units: score the plan's weights on all labelled rows (sti_runtime/metrics.py). */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "signals.h"
#include "unit_kinds.h"

/* The labelled rows, and what the model says of them. R rows, L tokens, C labels. */
typedef struct {
  int64_t rows;
  int32_t tokens, classes;
  int32_t *labels;                  /* [R] */
  int32_t *input_ids, *token_types; /* [R, L] */
  int32_t *lengths;                 /* [R] */
  float *logits;                    /* [R, C] */
} Scored;

/* ------------------------------------------------------------------ rows */

/* `rows` × `columns` values of 4 bytes; NULL when memory cannot hold them. */
static void *matrix_alloc(Arena *arena, int64_t rows, int64_t columns) {
  bool fits = rows <= INT64_MAX / 4 / columns && (uint64_t)rows * (uint64_t)columns * 4 <= SIZE_MAX / 2;
  return fits ? arena_alloc(arena, (size_t)rows * (size_t)columns * 4) : NULL;
}

/* The rows whose label is known, one after the other. */
static StiCode read_labelled(Context *context, Arena *arena, Scored *scored, StiError *error) {
  const TaskData *data = NULL;
  STI_TRY(context_task(context, &data, error));
  int32_t *all = matrix_alloc(arena, data->rows, 1);
  if (all == NULL) return sti_out_of_memory(error);
  STI_TRY(task_data_labels(data, all, error));
  for (int64_t row = 0; row < data->rows; row++) scored->rows += all[row] != UNKNOWN_LABEL;
  if (scored->rows == 0)
    return sti_fail(error, STI_DATASET, "Score on data that has labelled rows.", "None of the rows has a label.");
  scored->tokens = data->tokens;
  scored->labels = matrix_alloc(arena, scored->rows, 1);
  scored->lengths = matrix_alloc(arena, scored->rows, 1);
  scored->input_ids = matrix_alloc(arena, scored->rows, scored->tokens);
  scored->token_types = matrix_alloc(arena, scored->rows, scored->tokens);
  scored->logits = matrix_alloc(arena, scored->rows, scored->classes);
  if (scored->labels == NULL || scored->lengths == NULL || scored->input_ids == NULL || scored->token_types == NULL ||
      scored->logits == NULL)
    return sti_out_of_memory(error);
  int64_t kept = 0;
  for (int64_t row = 0; row < data->rows; row++) {
    if (all[row] == UNKNOWN_LABEL) continue;
    if (all[row] >= scored->classes)
      return sti_fail(error, STI_DATASET, "Check that the data belongs to the task the model was made for.",
                      "A row has a label outside the %d that the model's head knows.", scored->classes);
    scored->labels[kept] = all[row];
    STI_TRY(task_data_row(data, row, scored->input_ids + kept * scored->tokens,
                          scored->token_types + kept * scored->tokens, &scored->lengths[kept], error));
    kept++;
  }
  return STI_OK;
}

/* ------------------------------------------------------------------ scores */

static int32_t argmax(const float *logits, int32_t classes) {
  int32_t best = 0;
  for (int32_t i = 1; i < classes; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

/* Nats. */
static double cross_entropy(const float *logits, int32_t classes, int32_t label) {
  double highest = logits[argmax(logits, classes)], sum = 0;
  for (int32_t i = 0; i < classes; i++) sum += exp((double)logits[i] - highest);
  return log(sum) - ((double)logits[label] - highest);
}

/* Kahan's sum in Neumaier's form: as good as exact for this many terms. */
static double mean_loss(const Scored *scored) {
  double sum = 0, lost = 0;
  for (int64_t row = 0; row < scored->rows; row++) {
    double term = cross_entropy(scored->logits + row * scored->classes, scored->classes, scored->labels[row]);
    double next = sum + term;
    lost += fabs(sum) >= fabs(term) ? (sum - next) + term : (term - next) + sum;
    sum = next;
  }
  return (sum + lost) / (double)scored->rows;
}

static void write_scored(Text *out, const Plan *plan, const Scored *scored, double loss) {
  char digest[65];
  int64_t correct = 0;
  plan_content_digest(plan, digest);
  for (int64_t row = 0; row < scored->rows; row++)
    correct += argmax(scored->logits + row * scored->classes, scored->classes) == scored->labels[row];
  json_open(out, '{');
  json_text_field(out, "content_digest", digest);
  json_int_field(out, "correct", correct);
  json_text_field(out, "kind", "evaluate");
  json_key(out, "loss"), json_number(out, loss);
  json_key(out, "predictions"), json_open(out, '[');
  for (int64_t row = 0; row < scored->rows; row++)
    json_int(out, argmax(scored->logits + row * scored->classes, scored->classes));
  json_close(out, ']');
  json_int_field(out, "rows", scored->rows);
  json_close(out, '}');
}

static StiCode evaluate_into(Context *context, const Unit *unit, Arena *arena, Text *result, StiError *error) {
  const Manifest *manifest;
  Executor *executor;
  STI_TRY(context_manifest(context, &manifest, error));
  STI_TRY(plan_check_bundle(&unit->plan, manifest, error));
  if (!manifest->model.has_head)
    return sti_fail(error, STI_INPUT, "Train one: stifarm model train.", "A model without a head has no accuracy.");
  Scored scored = {.classes = manifest->model.labels};
  STI_TRY(read_labelled(context, arena, &scored, error));
  STI_TRY(context_executor(context, &executor, error));
  int32_t batch = unit->batch < scored.rows ? (int32_t)unit->batch : (int32_t)scored.rows;
  STI_TRY(executor_evaluate(executor, &unit->plan, scored.input_ids, scored.token_types, scored.lengths, scored.rows,
                            scored.tokens, batch, scored.logits, unit_abandoned, error));
  double loss = mean_loss(&scored);
  if (!isfinite(loss))
    return sti_fail(error, STI_FORMAT, "The model's weights are not finite; build the bundle from sound ones.",
                    "The mean cross-entropy is not finite.");
  write_scored(result, &unit->plan, &scored, loss);
  return STI_OK;
}

StiCode run_evaluate(Context *context, const Unit *unit, Text *result, StiError *error) {
  Arena arena = {0};
  StiCode code = evaluate_into(context, unit, &arena, result, error);
  arena_free(&arena);
  return code;
}
