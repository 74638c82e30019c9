/* planner.c: the planner `paper` in three steps (docs/planner.md; STI, ASPLOS 2023, section 5).
 *
 * 1. compute planning: the largest trained submodel whose compute fits T;
 * 2. preload: its bottom layers, at one fidelity, as far as they fit |S|;
 * 3. IO planning: streamed shards at the highest uniform fidelity that is valid, then raised one by one from most to
 *    least important.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "plan_build.h"
#include "quantity.h"

typedef struct {
  const Manifest *manifest;
  const DeviceProfile *profile;
  ShardCosts costs;
  const int32_t *ranking; /* [N · M] rows, most important first */
  int64_t target_ns, preload_bytes, working_bytes, fixed_ns, dearest_ns /* largest D */;
  bool slack;
} Problem;

/* Fidelities of one submodel under construction, with AIB and layer costs kept current.
 *
 * margins[l] is the least of AIB(l), AIB(l+1), …: what a read of layer l may still cost, since it debits all of them.
 * With AIB never below E, what all reads add to compute, and W no limit, layer l starts by embeddings + slack +
 * l · T_comp, so the request ends by T: the simulation is only run when an AIB is less or the streamed bytes exceed W. */
typedef struct {
  const Problem *problem;
  Desk *desk;
  const Submodel *submodel;
  int64_t *aib, *margins; /* [N] */
  int32_t *position;      /* [N] of a bundle's layer in the submodel, -1: not kept */
  int64_t layer_ns, t_comp_ns;
  Sharing sharing;
} Draft;

static int64_t fixed_and_compute_ns(const Problem *problem, const Submodel *submodel) {
  int64_t layer_ns = profile_layer_ns(problem->profile, submodel->width, FIGURE_P95);
  return problem->fixed_ns + submodel->depth * (layer_ns + submodel->width * problem->dearest_ns);
}

/* ------------------------------------------------------------------ step 2: preload */

/* Whether all slices of the submodel's first layer fit |S| at this grade. */
static bool bottom_fits(const Problem *problem, const Submodel *submodel, int grade) {
  const Version *versions = problem->costs.versions[grade] + (int64_t)submodel->kept[0] * problem->costs.heads;
  int64_t bytes = 0;
  for (int32_t slice = 0; slice < submodel->width; slice++) bytes += versions[slice].length;
  return bytes <= problem->preload_bytes;
}

static bool preload_if_fits(const Problem *problem, Choice *choice, int32_t index, int grade, int64_t *free_bytes) {
  int32_t width = choice->submodel->width;
  int64_t row = (int64_t)choice->submodel->kept[index / width] * problem->costs.heads + index % width;
  int64_t length = problem->costs.versions[grade][row].length;
  if (length > *free_bytes) return false;
  *free_bytes -= length;
  choice->grade[index] = (int8_t)grade;
  choice->preloaded[index] = true;
  return true;
}

/* The highest grade at which all of layer 0 fits, then bottom-up at it until one does not fit. If layer 0 fits at no
 * grade: its shards at the lowest, most important first, as many as fit. */
static void choose_preload(const Problem *problem, Choice *choice) {
  const Submodel *submodel = choice->submodel;
  int32_t shards = submodel->depth * submodel->width, heads = problem->costs.heads;
  int64_t free_bytes = problem->preload_bytes;
  memset(choice->grade, 0, (size_t)shards * sizeof *choice->grade);
  memset(choice->preloaded, 0, (size_t)shards * sizeof *choice->preloaded);
  int grade = problem->costs.grades - 1;
  while (grade >= 0 && !bottom_fits(problem, submodel, grade)) grade--;
  if (grade >= 0) {
    for (int32_t i = 0; i < shards && preload_if_fits(problem, choice, i, grade, &free_bytes);) i++;
    return;
  }
  for (int32_t i = 0; i < problem->manifest->model.layers * heads; i++) {
    int32_t row = problem->ranking[i], slice = row % heads;
    if (row / heads == submodel->kept[0] && slice < submodel->width)
      preload_if_fits(problem, choice, slice, 0, &free_bytes);
  }
}

/* ------------------------------------------------------------------ step 3: IO planning */

static StiCode open_draft(Arena *arena, const Problem *problem, Desk *desk, Draft *draft, StiError *error) {
  size_t layers = (size_t)problem->manifest->model.layers;
  *draft = (Draft){.problem = problem, .desk = desk, .sharing = profile_sharing(problem->profile, FIGURE_P95)};
  draft->aib = arena_alloc(arena, layers * sizeof *draft->aib);
  draft->margins = arena_alloc(arena, layers * sizeof *draft->margins);
  draft->position = arena_alloc(arena, layers * sizeof *draft->position);
  return draft->aib && draft->margins && draft->position ? STI_OK : sti_out_of_memory(error);
}

/* Turn to another submodel and choose what it preloads. */
static void begin_draft(Draft *draft, const Submodel *submodel) {
  const Problem *problem = draft->problem;
  draft->submodel = draft->desk->choice.submodel = submodel;
  draft->layer_ns = profile_layer_ns(problem->profile, submodel->width, FIGURE_P95);
  draft->t_comp_ns = draft->layer_ns + submodel->width * problem->dearest_ns;
  for (int32_t l = 0; l < problem->manifest->model.layers; l++) draft->position[l] = -1;
  for (int32_t i = 0; i < submodel->depth; i++) draft->position[submodel->kept[i]] = i;
  choose_preload(problem, &draft->desk->choice);
}

static int64_t slack_of(const Draft *draft) {
  return draft->problem->target_ns - fixed_and_compute_ns(draft->problem, draft->submodel);
}

static void update_margins(Draft *draft) {
  int64_t least = INT64_MAX;
  for (int32_t l = draft->submodel->depth - 1; l >= 0; l--) {
    if (draft->aib[l] < least) least = draft->aib[l];
    draft->margins[l] = least;
  }
}

/* Layer costs are left as they were: see recost. */
static void set_uniform(Draft *draft, int grade) {
  const ShardCosts *costs = &draft->problem->costs;
  const Submodel *submodel = draft->submodel;
  const Choice *choice = &draft->desk->choice;
  int64_t budget_ns = draft->problem->slack ? slack_of(draft) : 0;
  for (int32_t l = 0, i = 0; l < submodel->depth; l++) {
    const int64_t *debit_ns = costs->budget_ns[grade] + (int64_t)submodel->kept[l] * costs->heads;
    for (int32_t slice = 0; slice < submodel->width; slice++, i++) {
      if (choice->preloaded[i]) continue;
      choice->grade[i] = (int8_t)grade;
      budget_ns -= debit_ns[slice];
    }
    draft->aib[l] = budget_ns + l * draft->t_comp_ns;
  }
  update_margins(draft);
}

static void recost(Draft *draft) {
  cost_layers(&draft->problem->costs, draft->problem->profile, &draft->desk->choice, FIGURE_P95, draft->desk->works);
}

/* The end of the p95 timeline; false if there is none. */
static bool timeline_end(const Draft *draft, int64_t *end_ns) {
  Timeline timeline = {.layers = draft->desk->events};
  bool ends = simulate(draft->desk->works, draft->submodel->depth, &draft->problem->profile->fixed_p95,
                       draft->problem->working_bytes, false, draft->sharing, &timeline);
  *end_ns = timeline.end_ns;
  return ends;
}

/* margin_ns: no AIB is less. */
static bool ends_in_time(const Draft *draft, int64_t margin_ns) {
  int64_t streamed_bytes = 0, added_ns = 0, end_ns;
  for (int32_t l = 0; l < draft->submodel->depth; l++) {
    streamed_bytes += draft->desk->works[l].streamed_bytes;
    added_ns += sharing_layer_ns(draft->sharing, draft->desk->works[l].streamed_bytes);
  }
  if (streamed_bytes <= draft->problem->working_bytes && added_ns <= margin_ns) return true;
  return timeline_end(draft, &end_ns) && end_ns <= draft->problem->target_ns;
}

/* Pass 1: the highest uniform fidelity of all streamed shards that is valid; false if none is. */
static bool raise_together(Draft *draft) {
  for (int grade = draft->problem->costs.grades - 1; grade >= 0; grade--) {
    set_uniform(draft, grade);
    if (draft->margins[0] < 0) continue;
    recost(draft);
    if (ends_in_time(draft, draft->margins[0])) return true;
  }
  return false;
}

/* The streamed shard (layer, slice) of the submodel to the highest fidelity, above its own, that is valid. */
static void raise_one(Draft *draft, int32_t layer, int32_t slice) {
  const ShardCosts *costs = &draft->problem->costs;
  Desk *desk = draft->desk;
  int64_t row = (int64_t)draft->submodel->kept[layer] * costs->heads + slice;
  int32_t index = layer * draft->submodel->width + slice;
  int8_t current = desk->choice.grade[index];
  for (int grade = costs->grades - 1; grade > current; grade--) {
    int64_t debit_ns = costs->budget_ns[grade][row] - costs->budget_ns[current][row];
    int64_t more_bytes = costs->versions[grade][row].length - costs->versions[current][row].length;
    if (debit_ns > draft->margins[layer]) continue;
    if (desk->works[layer].streamed_bytes + more_bytes > draft->problem->working_bytes) continue;
    LayerWork before = desk->works[layer];
    desk->works[layer] = desk->spare;
    desk->spare = before;
    desk->choice.grade[index] = (int8_t)grade;
    layer_work(costs, &desk->choice, layer, draft->layer_ns, FIGURE_P95, &desk->works[layer]);
    int64_t margin_ns = draft->margins[layer] - debit_ns;
    for (int32_t l = 0; l < layer; l++)
      if (draft->aib[l] < margin_ns) margin_ns = draft->aib[l];
    if (ends_in_time(draft, margin_ns)) {
      for (int32_t l = layer; l < draft->submodel->depth; l++) draft->aib[l] -= debit_ns;
      update_margins(draft);
      return;
    }
    desk->choice.grade[index] = current;
    desk->spare = desk->works[layer];
    desk->works[layer] = before;
  }
}

/* Pass 2: once through the ranking. */
static void raise_in_turn(Draft *draft) {
  int32_t heads = draft->problem->costs.heads;
  for (int32_t i = 0; i < draft->problem->manifest->model.layers * heads; i++) {
    int32_t row = draft->problem->ranking[i], layer = draft->position[row / heads], slice = row % heads;
    if (layer < 0 || slice >= draft->submodel->width) continue;
    if (!draft->desk->choice.preloaded[layer * draft->submodel->width + slice]) raise_one(draft, layer, slice);
  }
}

/* ------------------------------------------------------------------ when there is no valid submodel */

/* The smallest T at which this uniform fidelity is valid. False if W (or having no slack) rules it out. */
static bool smallest_target(Draft *draft, int grade, int64_t *smallest_ns) {
  int64_t paced_ns, end_ns;
  set_uniform(draft, grade);
  recost(draft);
  if (draft->problem->slack) paced_ns = draft->problem->target_ns - draft->margins[0]; /* AIB rises as T does */
  else if (draft->margins[0] < 0) return false;
  else paced_ns = fixed_and_compute_ns(draft->problem, draft->submodel);
  if (!timeline_end(draft, &end_ns)) return false;
  *smallest_ns = paced_ns > end_ns ? paced_ns : end_ns;
  return true;
}

static int64_t largest_layer_bytes(const Draft *draft) {
  int64_t largest = 0;
  for (int32_t l = 0; l < draft->submodel->depth; l++)
    if (draft->desk->works[l].streamed_bytes > largest) largest = draft->desk->works[l].streamed_bytes;
  return largest;
}

static StiCode infeasible(Draft *draft, StiError *error) {
  const Problem *problem = draft->problem;
  int64_t smallest_ns = 0, needed_bytes = INT64_MAX, found_ns;
  bool found = false;
  for (int32_t i = 0; i < problem->manifest->submodel_count; i++) {
    begin_draft(draft, &problem->manifest->submodels[i]);
    for (int grade = 0; grade < problem->costs.grades; grade++) {
      bool works = smallest_target(draft, grade, &found_ns);
      if (works && (!found || found_ns < smallest_ns)) smallest_ns = found_ns;
      found = found || works;
      int64_t bytes = largest_layer_bytes(draft);
      if (bytes < needed_bytes) needed_bytes = bytes;
    }
  }
  if (found) {
    char preload[QUANTITY_CHARS], working[QUANTITY_CHARS], given[100];
    format_bytes(problem->preload_bytes, preload);
    format_bytes(problem->working_bytes, working);
    snprintf(given, sizeof given, "with |S| = %s and W = %s", preload, working);
    return fail_infeasible(problem->target_ns, smallest_ns, given, error);
  }
  if (needed_bytes > problem->working_bytes) {
    char remedy[60];
    snprintf(remedy, sizeof remedy, "Give at least %" PRId64 " bytes.", needed_bytes);
    return sti_fail(error, STI_RESOURCE, remedy,
                    "A working buffer of %" PRId64 " bytes cannot hold a layer of any trained submodel.",
                    problem->working_bytes);
  }
  return sti_fail(error, STI_RESOURCE, "Give a larger preload buffer, or plan with slack.",
                  "Without slack no target latency works with |S| = %" PRId64 " bytes and W = %" PRId64
                  " bytes: layer 0 has no IO time, and later layers too little.",
                  problem->preload_bytes, problem->working_bytes);
}

/* ------------------------------------------------------------------ the planner */

static StiCode check_importance(const Manifest *manifest, const ImportanceProfile *importance, StiError *error) {
  if (strcmp(importance->model_digest, manifest->model_digest) != 0)
    return sti_fail(error, STI_INPUT, "Name the importance profile of the bundle's model.",
                    "The importance profile is of model %.12s, the bundle of model %.12s.", importance->model_digest,
                    manifest->model_digest);
  if (importance->layers != manifest->model.layers || importance->slices != manifest->model.heads)
    return sti_fail(error, STI_INPUT, "Make the importance profile again.",
                    "The importance profile scores %" PRId32 "×%" PRId32 " shards, the bundle has %" PRId32
                    "×%" PRId32 ".",
                    importance->layers, importance->slices, manifest->model.layers, manifest->model.heads);
  return check_base(manifest, importance->base_fidelity, error);
}

StiCode plan_paper(Arena *arena, const PlanRequest *request, const PaperForm *form, Plan *plan, StiError *error) {
  const DeviceProfile *profile = request->profile;
  Problem problem = {
      .manifest = request->manifest,
      .profile = profile,
      .ranking = form->ranking,
      .target_ns = request->target_ns,
      .preload_bytes = form->preload_bytes,
      .working_bytes = request->working_bytes,
      .slack = form->slack,
  };
  Desk desk;
  Draft draft;
  const Submodel **order;
  STI_TRY(check_importance(request->manifest, request->importance, error));
  STI_TRY(shard_costs(arena, request->manifest, profile, request->importance->base_fidelity, 32, &problem.costs,
                      error));
  STI_TRY(open_desk(arena, request->manifest, &desk, error));
  STI_TRY(open_draft(arena, &problem, &desk, &draft, error));
  STI_TRY(largest_first(arena, request->manifest, form->wide_first, &order, error));
  problem.fixed_ns = profile->fixed_p95.embed_io_ns + profile->fixed_p95.embed_compute_ns + profile->fixed_p95.head_ns;
  for (int32_t i = 0; i < profile->decompress_count; i++)
    if (profile->decompress[i].p95_ns > problem.dearest_ns) problem.dearest_ns = profile->decompress[i].p95_ns;

  for (int32_t i = 0; i < request->manifest->submodel_count; i++) {
    if (fixed_and_compute_ns(&problem, order[i]) > problem.target_ns) continue; /* step 1 */
    begin_draft(&draft, order[i]);
    if (!raise_together(&draft)) continue;
    if (!form->uniform) raise_in_turn(&draft);
    plan->slack = form->slack;
    plan->preload_bytes = form->preload_bytes;
    plan->working_bytes = request->working_bytes;
    memcpy(plan->importance, request->importance->digest, sizeof plan->importance);
    return assemble_plan(arena, request, &problem.costs, &desk, form->flag, plan, error);
  }
  return infeasible(&draft, error);
}
