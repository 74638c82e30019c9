/* formats.h: the stored formats as C structs: model, bundle manifest, plan, device profile, importance profile.
 *
 * Each is parsed and validated exactly as its pydantic record (sti_runtime/model.py, manifest.py, plan.py, profile.py,
 * importance_profile.py): what one refuses the other refuses. Everything lives in the caller's arena. Beyond that this
 * side refuses what those let pass and no writer of ours writes: a key twice, integers outside int64, U+0000.
 */
#ifndef STI_FORMATS_H
#define STI_FORMATS_H

#include "base.h"
#include "json.h"

enum { STI_ALIGNMENT = 4096, STI_MATRICES = 6, STI_FIDELITIES = 6, STI_MERGE_LIMIT_BYTES = 1 << 20, STI_PANEL = 16 };
extern const int sti_fidelities[STI_FIDELITIES]; /* 2, 3, 4, 5, 6, 32 */
int sti_fidelity_index(int fidelity);            /* position in sti_fidelities, -1 if there is none */

/* ------------------------------------------------------------------ model */

typedef enum { ACT_GELU, ACT_GELU_TANH, ACT_RELU } Activation;
typedef enum { POOL_CLS, POOL_MEAN } Pooling;
typedef enum { HEAD_NONE, HEAD_TANH, HEAD_RELU } HeadActivation;

typedef struct {
  int family; /* 0 bert, 1 distilbert, 2 roberta */
  int32_t layers, heads, hidden, ffn; /* N, M, H, F; d = hidden/heads, f = ffn/heads */
  int64_t vocab, positions, position_offset, token_types;
  double layer_norm_eps;
  Activation activation;
  int64_t pad_id;
  bool has_head;
  Pooling pooling;
  HeadActivation head_activation;
  int32_t labels;
} ModelConfig;

typedef struct {
  int32_t depth, width; /* n, m */
  int32_t *kept;        /* [depth], original layers, ascending */
} Submodel;

/* ------------------------------------------------------------------ manifest */

typedef struct {
  int64_t offset, length, payload_bytes;
  uint32_t outliers[STI_MATRICES];
  char sha256[65];
} Version;

typedef struct {
  int fidelity;
  const char *file;
  Version *versions; /* [layers · heads], layer-major */
} Region;

typedef struct {
  const char *name;
  int rank;         /* 1 or 2 in a checked bundle */
  int64_t shape[2]; /* [out, in], or [n, 0] */
  bool gobo6;
  int64_t offset, length;
  uint32_t outliers;
} TensorEntry;
typedef struct { int64_t rows, row_bytes, offset; } EmbeddingTable; /* rows 0: the table is absent */
typedef struct { int64_t offset, length; char sha256[65]; } Chunk;
typedef struct { const char *file; int64_t bytes; Chunk *chunks; int32_t chunk_count; } DataFile;

typedef struct {
  char digest[65]; /* of the manifest's bytes: the bundle's */
  ModelConfig model;
  char model_digest[65];
  bool untrained;
  Submodel *submodels;
  int32_t submodel_count;
  Region *regions; /* ascending fidelity */
  int32_t region_count;
  TensorEntry *resident;
  int32_t resident_count;
  EmbeddingTable word, position, token_type;
  int32_t embedding_count; /* tables that the manifest names */
  DataFile *files; /* resident.bin, embeddings.bin */
  int32_t file_count;
} Manifest;

enum { MANIFEST_CAP_BYTES = 8 << 20 };

/* The bytes must be canonical JSON of at most 8 MiB; checked against itself only. Errors: STI_FORMAT, STI_RESOURCE. */
StiCode manifest_parse(Arena *arena, const char *data, size_t length, const char *source, Manifest *manifest,
                       StiError *error);
/* Whether it holds what its model needs: payload sizes, resident tensors, embedding tables. Errors as above. */
StiCode manifest_check(Arena *arena, const Manifest *manifest, const char *source, StiError *error);
/* <folder>/manifest.json, checked as above, and the sizes of all files. Its digest must be `digest`, or with NULL the
 * folder's name if that is a digest. Errors: also STI_DIGEST. */
StiCode bundle_open(Arena *arena, const char *folder, const char *digest, Manifest *manifest, StiError *error);
const Region *manifest_region(const Manifest *manifest, int fidelity);                 /* NULL if absent */
const Version *manifest_version(const Manifest *manifest, int layer, int slice, int fidelity); /* NULL if absent */
const TensorEntry *manifest_tensor(const Manifest *manifest, const char *name);        /* NULL if absent */
int64_t manifest_file_bytes(const Manifest *manifest, const char *file);               /* -1 if absent */

/* Shape [out, in] of matrix i (q k v o ffn_in ffn_out) of a shard; padded: multiples of 16 and 4. */
void matrix_shape(const ModelConfig *model, int matrix, int32_t *out, int32_t *in);

/* Where the parts of a version's payload lie (docs/bundle.md, "A version: the stream"). */
typedef struct {
  int64_t stream;                    /* elements of all six padded matrices */
  int64_t start[STI_MATRICES];       /* element at which each matrix begins */
  int planes;                        /* 0 at 32 bits */
  int plane_bits[2];
  int64_t plane_offset[2];           /* bytes from the payload's start */
  int64_t outlier_offset[STI_MATRICES]; /* bytes: positions u32[r], then values f32[r] */
  int64_t payload_bytes;
} PayloadLayout;
void payload_layout(const ModelConfig *model, int fidelity, const uint32_t outliers[STI_MATRICES],
                    PayloadLayout *layout);
/* The same of `count` ≤ 6 matrices of shapes[count] = [out, in], each at most 2^24: "gobo6" is one at 6 bits. */
void matrices_layout(int count, const int64_t (*shapes)[2], int fidelity, const uint32_t *outliers,
                     PayloadLayout *layout);

/* ------------------------------------------------------------------ plan */

typedef enum {
  POLICY_STI, POLICY_STI_0MB, POLICY_EXACT, POLICY_EXACT_IO, POLICY_RANDOM, POLICY_NO_SLACK, POLICY_UNIFORM,
  POLICY_WIDE_FIRST, POLICY_LOAD_EXEC, POLICY_STD_PIPELINE_2, POLICY_STD_PIPELINE_6, POLICY_STD_PIPELINE_32,
  POLICY_PRELOAD_6, POLICY_PRELOAD_32, POLICY_COUNT,
} Policy;
extern const char *const policy_names[POLICY_COUNT + 1]; /* "sti", …, NULL */

typedef struct {
  int32_t layer, source_layer, slice, fidelity, order;
  bool preloaded;
  int64_t offset, length;
} PlannedShard;

typedef struct { int64_t io_start_ns, io_end_ns, compute_start_ns, compute_end_ns; } LayerTime;

typedef struct {
  int64_t latency_ns, median_latency_ns, fixed_ns, stall_ns;
  LayerTime *layers; /* [layer_count] */
  int32_t layer_count;
} Prediction;

typedef enum { PLANNER_PAPER, PLANNER_BASELINE, PLANNER_EXACT } Planner;

typedef struct {
  Planner planner;
  Policy policy;
  bool load_exec; /* mode: "load-exec", else "pipeline" */
  bool slack;
  char bundle[65], importance[65] /* "" for null */, device_profile[65];
  int64_t target_ns, preload_bytes, working_bytes, sequence_length;
  Submodel submodel;
  PlannedShard *shards; /* [depth · width], layer-major */
  Prediction predicted;
  bool within_target;
  const char **flags; /* [flag_count] */
  int32_t flag_count;
} Plan;

/* `path`: where the plan stands in its source, "" for the whole of it. */
StiCode plan_parse(Arena *arena, const JsonValue *value, const char *source, const char *path, Plan *plan,
                   StiError *error);
void plan_write(Text *out, const Plan *plan);                 /* canonical JSON */
void plan_digest(const Plan *plan, char hex[65]);             /* "" when memory is short */
void plan_content_digest(const Plan *plan, char hex[65]);     /* bundle, submodel, sequence length, fidelities */
/* plan_check.check_bundle: STI_FORMAT unless the plan was made for this bundle. */
StiCode plan_check_bundle(const Plan *plan, const Manifest *manifest, StiError *error);

/* plan.merged_reads: neighbours in read order, of one layer and region, adjacent, together at most 1 MiB. */
typedef struct {
  int32_t layer, fidelity, first, count; /* shards[index[first …]] */
  int64_t offset, length;
} MergedRead;
/* Indices of the plan's shards in read order, streamed or preloaded ones. index [depth·width]; returns their number. */
int32_t plan_order(const Plan *plan, bool preloaded, int32_t *index);
/* reads [count] at most; returns their number. */
int32_t merge_reads(const PlannedShard *shards, const int32_t *index, int32_t count, MergedRead *reads);

/* ------------------------------------------------------------------ profiles */

typedef struct { int64_t alpha_ns, ps_per_byte, p95_ppm, error_ppm, samples, beside_ppm, beside_samples; } IoFit;
typedef struct { int64_t key /* width or fidelity */, median_ns, p95_ns, samples; } KeyedTime;
/* What reading a layer adds to the compute beside it, once and per byte. */
typedef struct { int64_t median_layer_ns, p95_layer_ns, median_ps_per_byte, p95_ps_per_byte, samples; } ReadCost;
typedef struct { int64_t embed_io_ns, embed_compute_ns, head_ns, samples; } FixedTime;

typedef struct {
  char bundle[65];
  const char *engine;
  int64_t sequence_length, threads, queue_depth;
  bool emulated;
  IoFit io;
  KeyedTime *compute; int32_t compute_count;       /* key: width */
  KeyedTime *decompress; int32_t decompress_count; /* key: fidelity */
  ReadCost read_cost;
  FixedTime fixed_median, fixed_p95;
  const char **unfit; int32_t unfit_count;
} DeviceProfile;

StiCode profile_parse(Arena *arena, const char *data, size_t length, const char *source, DeviceProfile *profile,
                      StiError *error);
void profile_write(Text *out, const DeviceProfile *profile);
void profile_digest(const DeviceProfile *profile, char hex[65]);

typedef struct { int32_t layer, slice; int64_t loss_nano, correct; } ShardScore;
typedef struct {
  char digest[65]; /* of its canonical JSON */
  char model_digest[65];
  int32_t layers, slices;
  int32_t base_fidelity; /* bits; plans use no fewer */
  bool by_accuracy; /* method exhaustive-accuracy: ranked by correct rows alone */
  ShardScore *scores; /* [layers · slices], layer-major */
} ImportanceProfile;

StiCode importance_parse(Arena *arena, const char *data, size_t length, const char *source, ImportanceProfile *profile,
                         StiError *error);
/* Indices into scores from most to least important: lowest loss (unless by accuracy), most correct, (layer, slice).
 * ranking [layers·slices]. */
void importance_ranking(const ImportanceProfile *profile, int32_t *ranking);

#endif
