/* plan_build.c: cost tables, the order of submodels, assembling a plan (sti_runtime/plan_build.py). */
#include "plan_build.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantity.h"
#include "wide.h"

enum { PPM = 1000000 };

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ------------------------------------------------------------------ figures of a profile */

static const KeyedTime *find_time(const KeyedTime *times, int32_t count, int64_t key) {
  for (int32_t i = 0; i < count; i++)
    if (times[i].key == key) return &times[i];
  return NULL;
}

static int64_t figure_of(const KeyedTime *time, Figure figure) {
  return figure == FIGURE_P95 ? time->p95_ns : time->median_ns;
}

static uint64_t largest_time(const KeyedTime *times, int32_t count) {
  int64_t largest = 0;
  for (int32_t i = 0; i < count; i++) largest = larger(largest, larger(times[i].median_ns, times[i].p95_ns));
  return (uint64_t)largest;
}

Sharing profile_sharing(const DeviceProfile *profile, Figure figure) {
  const ReadCost *cost = &profile->read_cost;
  if (figure == FIGURE_P95) return (Sharing){profile->io.beside_ppm, cost->p95_layer_ns, cost->p95_ps_per_byte};
  return (Sharing){profile->io.beside_ppm, cost->median_layer_ns, cost->median_ps_per_byte};
}

int64_t profile_layer_ns(const DeviceProfile *profile, int32_t width, Figure figure) {
  return figure_of(find_time(profile->compute, profile->compute_count, width), figure);
}

static Wide fixed_total(const FixedTime *fixed) {
  Wide parts = wide_sum(wide_of((uint64_t)fixed->embed_io_ns), wide_of((uint64_t)fixed->embed_compute_ns));
  return wide_sum(parts, wide_of((uint64_t)fixed->head_ns));
}

/* The median time of reading `bytes` in `count` versions; at most 2^127. */
static Wide read_ns(const IoFit *io, int64_t count, int64_t bytes) {
  return wide_sum(wide_product((uint64_t)count, (uint64_t)io->alpha_ns),
                  wide_floor(wide_product((uint64_t)bytes, (uint64_t)io->ps_per_byte), wide_of(1000)));
}

/* T_io of one version; check_extent has made sure that it is below 2^63. */
static int64_t version_io_ns(const IoFit *io, int64_t bytes, Figure figure) {
  Wide ns = read_ns(io, 1, bytes);
  if (figure == FIGURE_P95) {
    wide_scale(ns, (uint64_t)io->p95_ppm, &ns);
    ns = wide_ceiling(ns, wide_of(PPM));
  }
  return (int64_t)ns.low;
}

static int64_t version_budget_ns(const IoFit *io, int64_t p95_ns) {
  return (int64_t)wide_ceiling(wide_product((uint64_t)p95_ns, (uint64_t)io->beside_ppm), wide_of(PPM)).low;
}

/* ------------------------------------------------------------------ costs */

static void list_number(Text *list, int64_t number) {
  text_printf(list, "%s%" PRId64, list->length ? ", " : "", number);
}

/* STI_INPUT with `list` between two texts, if anything was listed. Frees the list. */
static StiCode fail_listed(Text *list, const char *before, const char *after, const char *remedy, StiError *error) {
  StiCode code = STI_OK;
  if (list->failed) code = sti_out_of_memory(error);
  else if (list->length) code = sti_fail(error, STI_INPUT, remedy, "%s%s%s", before, list->data, after);
  text_free(list);
  return code;
}

/* `remedy` [200] begins with what to do and ends with the fidelities there are. */
static void list_regions(const Manifest *manifest, char remedy[200]) {
  for (int32_t i = 0; i < manifest->region_count; i++) {
    size_t length = strlen(remedy);
    const char *end = i + 1 < manifest->region_count ? ", " : ".";
    snprintf(remedy + length, 200 - length, "%d%s", manifest->regions[i].fidelity, end);
  }
}

static StiCode check_region(const Manifest *manifest, int fidelity, StiError *error) {
  char remedy[200] = "Build it with these fidelities; it has ";
  if (manifest_region(manifest, fidelity)) return STI_OK;
  list_regions(manifest, remedy);
  return sti_fail(error, STI_INPUT, remedy, "The bundle holds no versions at %d bits.", fidelity);
}

StiCode check_base(const Manifest *manifest, int base, StiError *error) {
  char remedy[200] = "Build it with more bits; it has ";
  if (manifest->regions[manifest->region_count - 1].fidelity >= base) return STI_OK;
  list_regions(manifest, remedy);
  return sti_fail(error, STI_INPUT, remedy,
                  "The importance profile's base is %d bits, below which the model is at chance; the bundle holds no"
                  " versions of so many.",
                  base);
}

static int ascending(const void *a, const void *b) {
  int32_t left = *(const int32_t *)a, right = *(const int32_t *)b;
  return (left > right) - (left < right);
}

/* Every width of the bundle's submodels must be in the profile. */
static StiCode check_widths(Arena *arena, const Manifest *manifest, const DeviceProfile *profile, StiError *error) {
  int32_t *widths = arena_alloc(arena, (size_t)manifest->submodel_count * sizeof *widths);
  if (!widths) return sti_out_of_memory(error);
  for (int32_t i = 0; i < manifest->submodel_count; i++) widths[i] = manifest->submodels[i].width;
  qsort(widths, (size_t)manifest->submodel_count, sizeof *widths, ascending);
  Text list = {0};
  for (int32_t i = 0; i < manifest->submodel_count; i++)
    if ((i == 0 || widths[i] != widths[i - 1]) && !find_time(profile->compute, profile->compute_count, widths[i]))
      list_number(&list, widths[i]);
  return fail_listed(&list, "The device profile has no compute time for layers ",
                     " slices wide, which submodels of the bundle have.",
                     "Profile the device again with every width of the bundle.", error);
}

/* All costed versions read one after the other, and all N · M shards computed, must stay below 2^63 bytes and ns. */
static StiCode check_extent(const Manifest *manifest, const DeviceProfile *profile, const ShardCosts *costs,
                            StiError *error) {
  int64_t layers = manifest->model.layers, shards = layers * costs->heads, count = shards * costs->grades, bytes = 0;
  for (int g = 0; g < costs->grades; g++)
    for (int64_t row = 0; row < shards; row++)
      if (__builtin_add_overflow(bytes, costs->versions[g][row].length, &bytes))
        return sti_fail(error, STI_INPUT, "Name another bundle.", "The bundle's versions come to 2^63 bytes or more.");

  Wide total;
  int64_t total_ns;
  bool fits = wide_scale(read_ns(&profile->io, count, bytes), (uint64_t)larger(profile->io.p95_ppm, PPM), &total);
  if (fits) {
    Wide worst = wide_sum(wide_ceiling(total, wide_of(PPM)), wide_of((uint64_t)count));
    fits = wide_scale(worst, (uint64_t)profile->io.beside_ppm, &total);
  }
  total = wide_sum(wide_ceiling(total, wide_of(PPM)), wide_of((uint64_t)count));
  total = wide_sum(total, wide_product((uint64_t)layers, largest_time(profile->compute, profile->compute_count)));
  total = wide_sum(total, wide_product((uint64_t)shards, largest_time(profile->decompress, profile->decompress_count)));
  const int64_t each_ns = larger(profile->read_cost.median_layer_ns, profile->read_cost.p95_layer_ns);
  const int64_t ps_per_byte = larger(profile->read_cost.median_ps_per_byte, profile->read_cost.p95_ps_per_byte);
  total = wide_sum(total, wide_product((uint64_t)layers, (uint64_t)each_ns));
  total = wide_sum(total, wide_floor(wide_product((uint64_t)bytes, (uint64_t)ps_per_byte), wide_of(1000)));
  Wide usual = fixed_total(&profile->fixed_median), worst = fixed_total(&profile->fixed_p95);
  total = wide_sum(total, wide_compare(usual, worst) > 0 ? usual : worst);
  if (fits && wide_to_int(total, &total_ns)) return STI_OK;
  return sti_fail(error, STI_INPUT, "Profile the device again.",
                  "By the device profile, reading and computing all of the bundle takes 2^63 ns or more.");
}

static StiCode cost_versions(Arena *arena, const IoFit *io, int64_t shards, ShardCosts *costs, StiError *error) {
  for (int g = 0; g < costs->grades; g++) {
    for (Figure figure = 0; figure < FIGURES; figure++) {
      int64_t *io_ns = arena_alloc(arena, (size_t)shards * sizeof *io_ns);
      if (!io_ns) return sti_out_of_memory(error);
      for (int64_t row = 0; row < shards; row++) io_ns[row] = version_io_ns(io, costs->versions[g][row].length, figure);
      costs->io_ns[figure][g] = io_ns;
    }
    int64_t *budget_ns = arena_alloc(arena, (size_t)shards * sizeof *budget_ns);
    if (!budget_ns) return sti_out_of_memory(error);
    for (int64_t row = 0; row < shards; row++)
      budget_ns[row] = version_budget_ns(io, costs->io_ns[FIGURE_P95][g][row]);
    costs->budget_ns[g] = budget_ns;
  }
  return STI_OK;
}

StiCode shard_costs(Arena *arena, const Manifest *manifest, const DeviceProfile *profile, int lowest,
                    int highest, ShardCosts *costs, StiError *error) {
  *costs = (ShardCosts){.heads = manifest->model.heads};
  if (lowest == highest) STI_TRY(check_region(manifest, lowest, error));
  Text missing = {0};
  for (int32_t i = 0; i < manifest->region_count; i++) {
    const Region *region = &manifest->regions[i];
    if (region->fidelity < lowest || region->fidelity > highest) continue;
    const KeyedTime *time = find_time(profile->decompress, profile->decompress_count, region->fidelity);
    if (!time) {
      list_number(&missing, region->fidelity);
      continue;
    }
    int g = costs->grades++;
    costs->fidelity[g] = region->fidelity;
    costs->versions[g] = region->versions;
    for (Figure figure = 0; figure < FIGURES; figure++) costs->decompress_ns[figure][g] = figure_of(time, figure);
  }
  STI_TRY(fail_listed(&missing, "The device profile has no decompression time at ", " bits.",
                      "Profile the device again with every fidelity of the bundle.", error));
  STI_TRY(check_widths(arena, manifest, profile, error));
  STI_TRY(check_extent(manifest, profile, costs, error));
  return cost_versions(arena, &profile->io, (int64_t)manifest->model.layers * costs->heads, costs, error);
}

/* The rule of merge_reads: versions of one layer are adjacent in a region when their slices are. */
void layer_work(const ShardCosts *costs, const Choice *choice, int32_t layer, int64_t layer_ns, Figure figure,
                LayerWork *work) {
  int32_t width = choice->submodel->width;
  int64_t first_row = (int64_t)choice->submodel->kept[layer] * costs->heads, first = (int64_t)layer * width;
  int last = -1; /* grade of the read that may grow */
  work->read_count = 0;
  work->streamed_bytes = 0;
  work->compute_ns = layer_ns;
  for (int32_t slice = 0; slice < width; slice++) {
    int grade = choice->grade[first + slice];
    work->compute_ns += costs->decompress_ns[figure][grade];
    if (choice->preloaded[first + slice]) {
      last = -1;
      continue;
    }
    int64_t bytes = costs->versions[grade][first_row + slice].length;
    int64_t ns = costs->io_ns[figure][grade][first_row + slice];
    if (grade != last || work->reads[work->read_count - 1].bytes + bytes > STI_MERGE_LIMIT_BYTES)
      work->reads[work->read_count++] = (TimedRead){0};
    TimedRead *read = &work->reads[work->read_count - 1];
    read->bytes += bytes;
    read->ns += ns;
    work->streamed_bytes += bytes;
    last = grade;
  }
}

void cost_layers(const ShardCosts *costs, const DeviceProfile *profile, const Choice *choice, Figure figure,
                 LayerWork *works) {
  int64_t layer_ns = profile_layer_ns(profile, choice->submodel->width, figure);
  for (int32_t i = 0; i < choice->submodel->depth; i++) layer_work(costs, choice, i, layer_ns, figure, &works[i]);
}

StiCode fail_infeasible(int64_t target_ns, int64_t smallest_ns, const char *given, StiError *error) {
  char target[QUANTITY_CHARS], smallest[QUANTITY_CHARS], remedy[100];
  format_ns(target_ns, target);
  format_ns_up(smallest_ns, smallest);
  snprintf(remedy, sizeof remedy, "The smallest target latency that works is %s.", smallest);
  sti_fail(error, STI_INFEASIBLE, remedy, "No trained submodel of the bundle meets %s on this device %s.", target,
           given);
  error->smallest_target_ns = smallest_ns;
  return STI_INFEASIBLE;
}

/* ------------------------------------------------------------------ order and buffers */

static int by_size(const void *a, const void *b) {
  const Submodel *left = *(const Submodel *const *)a, *right = *(const Submodel *const *)b;
  int64_t left_shards = (int64_t)left->depth * left->width, right_shards = (int64_t)right->depth * right->width;
  if (left_shards != right_shards) return left_shards > right_shards ? -1 : 1;
  if (left->depth != right->depth) return left->depth > right->depth ? -1 : 1;
  return (left > right) - (left < right); /* as the bundle lists them */
}

static int by_size_wide_first(const void *a, const void *b) {
  const Submodel *left = *(const Submodel *const *)a, *right = *(const Submodel *const *)b;
  bool tie = (int64_t)left->depth * left->width == (int64_t)right->depth * right->width;
  return tie && left->width != right->width ? (left->width > right->width ? -1 : 1) : by_size(a, b);
}

StiCode largest_first(Arena *arena, const Manifest *manifest, bool wide_first, const Submodel ***order,
                      StiError *error) {
  size_t count = (size_t)manifest->submodel_count;
  *order = arena_alloc(arena, count * sizeof **order);
  if (!*order) return sti_out_of_memory(error);
  for (size_t i = 0; i < count; i++) (*order)[i] = &manifest->submodels[i];
  qsort(*order, count, sizeof **order, wide_first ? by_size_wide_first : by_size);
  return STI_OK;
}

StiCode open_desk(Arena *arena, const Manifest *manifest, Desk *desk, StiError *error) {
  size_t layers = (size_t)manifest->model.layers, heads = (size_t)manifest->model.heads;
  desk->choice.grade = arena_alloc(arena, layers * heads * sizeof *desk->choice.grade);
  desk->choice.preloaded = arena_alloc(arena, layers * heads * sizeof *desk->choice.preloaded);
  desk->works = arena_alloc(arena, layers * sizeof *desk->works);
  desk->events = arena_alloc(arena, layers * sizeof *desk->events);
  TimedRead *reads = arena_alloc(arena, (layers + 1) * heads * sizeof *reads);
  if (!desk->choice.grade || !desk->choice.preloaded || !desk->works || !desk->events || !reads)
    return sti_out_of_memory(error);
  for (size_t i = 0; i < layers; i++) desk->works[i].reads = reads + i * heads;
  desk->spare.reads = reads + layers * heads;
  return STI_OK;
}

/* ------------------------------------------------------------------ the record */

static void list_shards(const ShardCosts *costs, const Choice *choice, PlannedShard *shards) {
  const Submodel *submodel = choice->submodel;
  int32_t orders[2] = {0, 0};
  for (int32_t i = 0; i < submodel->depth * submodel->width; i++) {
    int32_t layer = i / submodel->width, slice = i % submodel->width;
    const Version *version = &costs->versions[choice->grade[i]][(int64_t)submodel->kept[layer] * costs->heads + slice];
    shards[i] = (PlannedShard){
        .layer = layer,
        .source_layer = submodel->kept[layer],
        .slice = slice,
        .fidelity = costs->fidelity[choice->grade[i]],
        .order = orders[choice->preloaded[i]]++,
        .preloaded = choice->preloaded[i],
        .offset = version->offset,
        .length = version->length,
    };
  }
}

static bool predict(const DeviceProfile *profile, const ShardCosts *costs, Desk *desk, int64_t working_bytes,
                    bool load_exec, Prediction *predicted) {
  int32_t depth = desk->choice.submodel->depth;
  Timeline usual = {.layers = desk->events}, worst = {.layers = predicted->layers};
  cost_layers(costs, profile, &desk->choice, FIGURE_MEDIAN, desk->works);
  if (!simulate(desk->works, depth, &profile->fixed_median, working_bytes, load_exec,
                profile_sharing(profile, FIGURE_MEDIAN), &usual))
    return false;
  cost_layers(costs, profile, &desk->choice, FIGURE_P95, desk->works);
  if (!simulate(desk->works, depth, &profile->fixed_p95, working_bytes, load_exec, profile_sharing(profile, FIGURE_P95),
                &worst))
    return false;
  predicted->layer_count = depth;
  predicted->latency_ns = worst.end_ns;
  predicted->median_latency_ns = usual.end_ns;
  predicted->stall_ns = worst.stall_ns;
  predicted->fixed_ns = (int64_t)fixed_total(&profile->fixed_p95).low;
  return true;
}

/* What a reader of the plan must be told about the inputs it rests on. flags [4] */
static int32_t list_flags(const PlanRequest *request, const char *flag, const char **flags) {
  int32_t count = 0;
  if (request->profile->unfit_count) flags[count++] = "unfit-profile";
  if (request->manifest->untrained) flags[count++] = "untrained-submodels";
  if (strcmp(request->profile->bundle, request->manifest->digest) != 0) flags[count++] = "borrowed-profile";
  if (flag) flags[count++] = flag;
  return count;
}

StiCode assemble_plan(Arena *arena, const PlanRequest *request, const ShardCosts *costs, Desk *desk, const char *flag,
                      Plan *plan, StiError *error) {
  const Submodel *submodel = desk->choice.submodel;
  size_t depth = (size_t)submodel->depth;
  memcpy(plan->bundle, request->manifest->digest, sizeof plan->bundle);
  snprintf(plan->device_profile, sizeof plan->device_profile, "%s", request->profile_digest);
  plan->target_ns = request->target_ns;
  plan->sequence_length = request->profile->sequence_length;
  plan->submodel = *submodel;
  plan->shards = arena_alloc(arena, depth * (size_t)submodel->width * sizeof *plan->shards);
  plan->predicted.layers = arena_alloc(arena, depth * sizeof *plan->predicted.layers);
  plan->flags = arena_alloc(arena, 4 * sizeof *plan->flags);
  if (!plan->shards || !plan->predicted.layers || !plan->flags) return sti_out_of_memory(error);
  list_shards(costs, &desk->choice, plan->shards);
  if (!predict(request->profile, costs, desk, plan->working_bytes, plan->load_exec, &plan->predicted))
    return sti_fail(error, STI_RESOURCE, "Give a larger working buffer.",
                    "A working buffer of %" PRId64 " bytes cannot hold a layer of submodel %" PRId32 "×%" PRId32 ".",
                    plan->working_bytes, submodel->depth, submodel->width);
  plan->within_target = plan->predicted.latency_ns <= plan->target_ns;
  plan->flag_count = list_flags(request, flag, plan->flags);
  return STI_OK;
}
