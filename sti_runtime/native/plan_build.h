/* plan_build.h: what every policy needs to make a plan: cost tables, the order of submodels, assembling the record.
 *
 * Symbols of all shape comments: N layers and M slices of the bundle, n × m of a submodel. A shard's *row* is l·M + s
 * in the bundle, its *index* i·m + s in the submodel; its *grade* is the position of its fidelity in ShardCosts.
 */
#ifndef STI_PLAN_BUILD_H
#define STI_PLAN_BUILD_H

#include "planner.h"
#include "timeline.h"

typedef enum { FIGURE_MEDIAN, FIGURE_P95, FIGURES } Figure;

typedef struct {
  int32_t heads;
  int grades;                                   /* fidelities the bundle holds and the policy may use */
  int fidelity[STI_FIDELITIES];                 /* ascending */
  const Version *versions[STI_FIDELITIES];      /* [N · M] */
  int64_t *io_ns[FIGURES][STI_FIDELITIES];      /* [N · M] T_io of each version while nothing is computed */
  int64_t *budget_ns[STI_FIDELITIES];           /* [N · M] what it takes of AIB: p95, while layers are computed */
  int64_t decompress_ns[FIGURES][STI_FIDELITIES];
} ShardCosts;

/* What is decided for one submodel. */
typedef struct {
  const Submodel *submodel;
  int8_t *grade;   /* [n · m] */
  bool *preloaded; /* [n · m] */
} Choice;

/* Buffers for the largest submodel a bundle can have, and one more layer's reads for trials. */
typedef struct {
  Choice choice;     /* grade, preloaded: [N · M] */
  LayerWork *works;  /* [N], each with reads [M] */
  LayerWork spare;   /* reads [M] */
  LayerTime *events; /* [N] */
} Desk;

/* Cost the versions from `lowest` to `highest` bits. Errors: STI_INPUT when both are the same and the bundle does not
 * hold it, when the profile lacks one or a submodel's width, or when all of it together, one after the other, would
 * take 2^63 ns or bytes; STI_RESOURCE. Below that no sum of planning overflows. */
StiCode shard_costs(Arena *arena, const Manifest *manifest, const DeviceProfile *profile, int lowest,
                    int highest, ShardCosts *costs, StiError *error);
/* A plan made by importance uses no fidelity below the profile's base, where the model is at chance. Errors: STI_INPUT
 * when the bundle has none from `base` up. */
StiCode check_base(const Manifest *manifest, int base, StiError *error);
Sharing profile_sharing(const DeviceProfile *profile, Figure figure);
int64_t profile_layer_ns(const DeviceProfile *profile, int32_t width, Figure figure);

StiCode open_desk(Arena *arena, const Manifest *manifest, Desk *desk, StiError *error);

/* Submodels in the order planning tries them: most shards, then the deeper (wide_first: the wider), then as listed.
 * order [submodel_count] */
StiCode largest_first(Arena *arena, const Manifest *manifest, bool wide_first, const Submodel ***order,
                      StiError *error);

/* Cost one layer of a choice, by the merging rule of merge_reads, into work->reads [m]. */
void layer_work(const ShardCosts *costs, const Choice *choice, int32_t layer, int64_t layer_ns, Figure figure,
                LayerWork *work);
void cost_layers(const ShardCosts *costs, const DeviceProfile *profile, const Choice *choice, Figure figure,
                 LayerWork *works);

/* Fill what depends on the choice: submodel, shards, prediction, flags (`flag` last, unless NULL). The caller has set
 * policy, mode, slack, importance and the budgets. Errors: STI_RESOURCE when W cannot hold a layer. */
StiCode assemble_plan(Arena *arena, const PlanRequest *request, const ShardCosts *costs, Desk *desk, const char *flag,
                      Plan *plan, StiError *error);

/* STI_INFEASIBLE; `given`: under what. */
StiCode fail_infeasible(int64_t target_ns, int64_t smallest_ns, const char *given, StiError *error);

/* What policies of the paper's planner differ in. */
typedef struct {
  int64_t preload_bytes;  /* |S| */
  const int32_t *ranking; /* [N · M] rows, most important first */
  const char *flag;       /* of the plan; NULL: none */
  bool slack;
  bool uniform;    /* without pass 2 */
  bool wide_first; /* ties of submodels go to the wider */
} PaperForm;

/* planner.c: the paper's planner. */
StiCode plan_paper(Arena *arena, const PlanRequest *request, const PaperForm *form, Plan *plan, StiError *error);

#endif
