/* policies.c: the policies that are compared, as one table: from a policy's name to its plan.
 *
 * The paper's planner serves sti, sti-0mb and the ablations; exact and exact-io need a solver, which only the host has.
 * A baseline takes the largest trained submodel whose predicted
 * p95 latency meets T, at one uniform fidelity, with the buffers it needs (STI, ASPLOS 2023, section 7.1).
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan_build.h"

/* W of a baseline. */
typedef enum { BUFFER_ALL, BUFFER_TWO_LAYERS, BUFFER_SMALLEST } Buffer;

typedef struct {
  int fidelity;                      /* of a baseline; 0: the paper's planner, with importance */
  bool preload, shuffled, load_exec; /* preload: |S| as given (paper), or everything (baseline) */
  bool no_slack, uniform, wide_first; /* of the paper's planner: see PaperForm */
  bool host_only;
  Buffer buffer;
} Rules;

static const Rules rules_of[POLICY_COUNT] = {
    [POLICY_STI] = {.preload = true},
    [POLICY_STI_0MB] = {.preload = false},
    [POLICY_EXACT] = {.preload = true, .host_only = true},
    [POLICY_EXACT_IO] = {.preload = true, .host_only = true},
    [POLICY_RANDOM] = {.preload = true, .shuffled = true},
    [POLICY_NO_SLACK] = {.preload = true, .no_slack = true},
    [POLICY_UNIFORM] = {.preload = true, .uniform = true},
    [POLICY_WIDE_FIRST] = {.preload = true, .wide_first = true},
    [POLICY_LOAD_EXEC] = {.fidelity = 32, .load_exec = true, .buffer = BUFFER_ALL},
    [POLICY_STD_PIPELINE_2] = {.fidelity = 2, .buffer = BUFFER_TWO_LAYERS},
    [POLICY_STD_PIPELINE_6] = {.fidelity = 6, .buffer = BUFFER_TWO_LAYERS},
    [POLICY_STD_PIPELINE_32] = {.fidelity = 32, .buffer = BUFFER_TWO_LAYERS},
    [POLICY_PRELOAD_6] = {.fidelity = 6, .preload = true, .buffer = BUFFER_SMALLEST},
    [POLICY_PRELOAD_32] = {.fidelity = 32, .preload = true, .buffer = BUFFER_SMALLEST},
};

/* ------------------------------------------------------------------ baselines */

static int64_t buffer_bytes(Buffer buffer, const LayerWork *works, int32_t depth) {
  int64_t all = 0, largest = 0, second = 0;
  for (int32_t i = 0; i < depth; i++) {
    int64_t bytes = works[i].streamed_bytes;
    all += bytes;
    if (bytes > largest) {
      second = largest;
      largest = bytes;
    } else if (bytes > second) {
      second = bytes;
    }
  }
  return buffer == BUFFER_ALL ? all : buffer == BUFFER_TWO_LAYERS ? largest + second : STI_ALIGNMENT;
}

static int64_t choice_bytes(const ShardCosts *costs, const Submodel *submodel) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < submodel->depth; i++)
    for (int32_t slice = 0; slice < submodel->width; slice++)
      bytes += costs->versions[0][(int64_t)submodel->kept[i] * costs->heads + slice].length;
  return bytes;
}

static StiCode plan_baseline(Arena *arena, const PlanRequest *request, const Rules *policy, Plan *plan,
                             StiError *error) {
  const Manifest *manifest = request->manifest;
  ShardCosts costs;
  Desk desk;
  const Submodel **order;
  STI_TRY(shard_costs(arena, manifest, request->profile, policy->fidelity, policy->fidelity, &costs, error));
  STI_TRY(open_desk(arena, manifest, &desk, error));
  STI_TRY(largest_first(arena, manifest, false, &order, error));
  /* One grade, all of it streamed or all preloaded: the same choice for every submodel. */
  memset(desk.choice.preloaded, policy->preload, (size_t)manifest->model.layers * (size_t)costs.heads);
  int64_t smallest_ns = INT64_MAX;
  for (int32_t i = 0; i < manifest->submodel_count; i++) {
    Timeline timeline = {.layers = desk.events};
    desk.choice.submodel = order[i];
    cost_layers(&costs, request->profile, &desk.choice, FIGURE_P95, desk.works);
    plan->working_bytes = buffer_bytes(policy->buffer, desk.works, order[i]->depth);
    if (!simulate(desk.works, order[i]->depth, &request->profile->fixed_p95, plan->working_bytes, policy->load_exec,
                  profile_sharing(request->profile, FIGURE_P95), &timeline))
      return sti_fail(error, STI_INTERNAL, "", "%s: its own working buffer of %" PRId64 " bytes is too small.",
                      policy_names[request->policy], plan->working_bytes);
    if (timeline.end_ns <= request->target_ns) {
      plan->planner = PLANNER_BASELINE;
      plan->load_exec = policy->load_exec;
      plan->preload_bytes = policy->preload ? choice_bytes(&costs, order[i]) : 0;
      return assemble_plan(arena, request, &costs, &desk, NULL, plan, error);
    }
    if (timeline.end_ns < smallest_ns) smallest_ns = timeline.end_ns;
  }
  char given[60];
  snprintf(given, sizeof given, "under %s", policy_names[request->policy]);
  return fail_infeasible(request->target_ns, smallest_ns, given, error);
}

/* ------------------------------------------------------------------ the paper's planner */

typedef struct {
  char key[65]; /* SHA-256 of "seed:layer:slice" */
  int32_t row;
} Shuffled;

static int by_key(const void *a, const void *b) {
  return strcmp(((const Shuffled *)a)->key, ((const Shuffled *)b)->key);
}

static StiCode shuffled_ranking(Arena *arena, const ImportanceProfile *importance, int64_t seed, int32_t *ranking,
                                StiError *error) {
  int32_t count = importance->layers * importance->slices;
  Shuffled *shuffled = arena_alloc(arena, (size_t)count * sizeof *shuffled);
  if (!shuffled) return sti_out_of_memory(error);
  for (int32_t row = 0; row < count; row++) {
    char text[64];
    int length = snprintf(text, sizeof text, "%" PRId64 ":%" PRId32 ":%" PRId32, seed, row / importance->slices,
                          row % importance->slices);
    sha256_hex(text, (size_t)length, shuffled[row].key);
    shuffled[row].row = row;
  }
  qsort(shuffled, (size_t)count, sizeof *shuffled, by_key);
  for (int32_t i = 0; i < count; i++) ranking[i] = shuffled[i].row;
  return STI_OK;
}

static StiCode plan_planned(Arena *arena, const PlanRequest *request, const Rules *policy, Plan *plan,
                            StiError *error) {
  const ImportanceProfile *importance = request->importance;
  int32_t *ranking = arena_alloc(arena, (size_t)importance->layers * (size_t)importance->slices * sizeof *ranking);
  char *flag = NULL;
  if (!ranking) return sti_out_of_memory(error);
  if (policy->shuffled) {
    char text[32];
    int length = snprintf(text, sizeof text, "seed-%" PRId64, request->seed);
    flag = arena_text(arena, text, (size_t)length);
    if (!flag) return sti_out_of_memory(error);
    STI_TRY(shuffled_ranking(arena, importance, request->seed, ranking, error));
  } else {
    importance_ranking(importance, ranking);
  }
  PaperForm form = {
      .preload_bytes = policy->preload ? request->preload_bytes : 0,
      .ranking = ranking,
      .flag = flag,
      .slack = request->slack && !policy->no_slack,
      .uniform = policy->uniform,
      .wide_first = policy->wide_first,
  };
  return plan_paper(arena, request, &form, plan, error);
}

/* ------------------------------------------------------------------ every policy */

static StiCode check_budget(const char *name, int64_t value, int64_t least, StiError *error) {
  if (value >= least) return STI_OK;
  char remedy[40];
  snprintf(remedy, sizeof remedy, "Give at least %" PRId64 ".", least);
  return sti_fail(error, STI_INPUT, remedy, "A %s of %" PRId64 " cannot be planned for.", name, value);
}

StiCode make_plan(Arena *arena, const PlanRequest *request, Plan *plan, StiError *error) {
  const Rules *policy = &rules_of[request->policy];
  *plan = (Plan){.policy = request->policy};
  if (policy->host_only)
    return sti_fail(error, STI_INPUT, "Plan on the host: stifarm plan.", "Policy %s is planned by a solver on the host.",
                    policy_names[request->policy]);
  if (!policy->fidelity && !request->importance)
    return sti_fail(error, STI_INPUT, "Name one, or measure it for this task first.",
                    "Policy %s needs an importance profile.", policy_names[request->policy]);
  STI_TRY(check_budget("target latency", request->target_ns, 1, error));
  if (policy->fidelity || policy->preload) STI_TRY(check_budget("preload buffer", request->preload_bytes, 0, error));
  STI_TRY(check_budget("working buffer", request->working_bytes, 1, error));
  return policy->fidelity ? plan_baseline(arena, request, policy, plan, error)
                          : plan_planned(arena, request, policy, plan, error);
}
