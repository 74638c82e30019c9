/* measure.c: the verb `profile`: measure this device for a bundle and fit its device profile.
 *
 *   profile --bundle FOLDER --task FILE [--out FILE] [--threads N] [--queue-depth N] [--engine …] [--isa …] [--cpus …]
 *
 * The same units, in the same numbers, that a host would send (orchestrator/jobs.py, profile_units).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standalone.h"
#include "unit_kinds.h"
#include "verbs.h"

enum { ROUNDS = 4, COMPUTE_WARMUPS = 1, COMPUTE_REPEATS = 2, FIXED_WARMUPS = 3, FIXED_REQUESTS = 30 };

typedef struct {
  int64_t *widths, *fidelities; /* ascending: of the bundle's submodels, of its regions */
  int32_t width_count, fidelity_count;
  const Manifest *manifest;
  const TaskData *task;
} Subject;

/* ------------------------------------------------------------------ what to measure */

static bool contains(const int64_t *values, int32_t count, int64_t value) {
  for (int32_t i = 0; i < count; i++)
    if (values[i] == value) return true;
  return false;
}

static StiCode find_subject(Context *context, Arena *arena, Subject *subject, StiError *error) {
  STI_TRY(context_manifest(context, &subject->manifest, error));
  STI_TRY(context_task(context, &subject->task, error));
  const Manifest *manifest = subject->manifest;
  subject->widths = arena_alloc(arena, (size_t)manifest->submodel_count * sizeof *subject->widths);
  subject->fidelities = arena_alloc(arena, (size_t)manifest->region_count * sizeof *subject->fidelities);
  if (subject->widths == NULL || subject->fidelities == NULL) return sti_out_of_memory(error);
  subject->width_count = 0;
  for (int32_t width = 1; width <= manifest->model.heads; width++)
    for (int32_t i = 0; i < manifest->submodel_count; i++)
      if (manifest->submodels[i].width == width && !contains(subject->widths, subject->width_count, width))
        subject->widths[subject->width_count++] = width;
  subject->fidelity_count = manifest->region_count;
  for (int32_t i = 0; i < manifest->region_count; i++) subject->fidelities[i] = manifest->regions[i].fidelity;
  return STI_OK;
}

/* `count` row numbers: distinct ones at random while there are any, then again. rows [count]. */
static void sample_rows(int64_t available, int64_t *rows, int32_t count) {
  uint64_t random = 0;
  int32_t pass = 0; /* where the current run of distinct rows begins */
  for (int32_t i = 0; i < count; i++) {
    if (i - pass == available) pass = i;
    do rows[i] = random_below(&random, available);
    while (contains(rows + pass, i - pass, rows[i]));
  }
}

/* ------------------------------------------------------------------ measuring */

/* Room for the samples of all rounds. */
static StiCode reserve(Arena *arena, const Subject *subject, ProfileSamples *samples, StiError *error) {
  size_t widths = (size_t)subject->width_count, fidelities = (size_t)subject->fidelity_count;
  size_t reads = ROUNDS * widths * (fidelities + 1);
  size_t layers = ROUNDS * widths * fidelities * (COMPUTE_WARMUPS + 2 * COMPUTE_REPEATS);
  samples->io = arena_alloc(arena, reads * sizeof *samples->io);
  samples->beside = arena_alloc(arena, layers * sizeof *samples->beside);
  samples->compute = arena_alloc(arena, layers * sizeof *samples->compute);
  return samples->io && samples->beside && samples->compute ? STI_OK : sti_out_of_memory(error);
}

static StiCode measure_io(Context *context, Arena *arena, const Subject *subject, int round, ProfileSamples *samples,
                          StiError *error) {
  Unit unit = {.kind = UNIT_PROFILE_IO,
               .widths = subject->widths,
               .width_count = subject->width_count,
               .fidelities = subject->fidelities,
               .fidelity_count = subject->fidelity_count,
               .repeats = 1,
               .seed = round};
  IoSamples found;
  STI_TRY(profile_io(context, &unit, arena, &found, error));
  memcpy(samples->io + samples->io_count, found.samples, found.count * sizeof *found.samples);
  samples->io_count += found.count;
  return STI_OK;
}

static StiCode measure_compute(Context *context, Arena *arena, const Subject *subject, int64_t *width,
                               ProfileSamples *samples, StiError *error) {
  Unit unit = {.kind = UNIT_PROFILE_COMPUTE,
               .widths = width,
               .width_count = 1,
               .fidelities = subject->fidelities,
               .fidelity_count = subject->fidelity_count,
               .warmups = COMPUTE_WARMUPS,
               .repeats = COMPUTE_REPEATS};
  ComputeSamples found;
  STI_TRY(profile_compute(context, &unit, arena, &found, error));
  memcpy(samples->compute + samples->compute_count, found.samples, found.count * sizeof *found.samples);
  samples->compute_count += found.count;
  memcpy(samples->beside + samples->beside_count, found.reads, found.read_count * sizeof *found.reads);
  samples->beside_count += found.read_count;
  return STI_OK;
}

static StiCode measure_fixed(Context *context, Arena *arena, const Subject *subject, ProfileSamples *samples,
                             StiError *error) {
  int64_t rows[FIXED_WARMUPS + FIXED_REQUESTS];
  Unit unit = {.kind = UNIT_PROFILE_FIXED, .warmups = FIXED_WARMUPS, .rows = rows, .row_count = FIXED_WARMUPS + FIXED_REQUESTS};
  FixedSamples found;
  sample_rows(subject->task->rows, rows, unit.row_count);
  STI_TRY(profile_fixed(context, &unit, arena, &found, error));
  samples->fixed = found.samples;
  samples->fixed_count = found.count;
  return STI_OK;
}

static StiCode write_out(const char *path, const Text *text, StiError *error) {
  static const char *const remedy = "Check the folder's owner, permissions and free space.";
  FILE *stream = fopen(path, "we");
  if (stream == NULL) return sti_fail_errno(error, STI_INPUT, errno, remedy, "%s: cannot be written", path);
  bool written = fwrite(text->data, 1, text->length, stream) == text->length;
  int problem = errno;
  if (fclose(stream) == 0 && written) return STI_OK;
  return sti_fail_errno(error, STI_RESOURCE, written ? errno : problem, remedy, "%s: cannot be written", path);
}

static StiCode measure(const Options *options, Standalone *standalone, Arena *arena, Text *out, StiError *error) {
  Context *context = standalone->context;
  Subject subject;
  STI_TRY(find_subject(context, arena, &subject, error));
  ProfileSamples samples = {.widths = subject.widths,
                            .width_count = (size_t)subject.width_count,
                            .fidelities = subject.fidelities,
                            .fidelity_count = (size_t)subject.fidelity_count};
  STI_TRY(reserve(arena, &subject, &samples, error));
  for (int round = 0; round < ROUNDS; round++) {
    STI_TRY(measure_io(context, arena, &subject, round, &samples, error));
    for (int32_t i = 0; i < subject.width_count; i++)
      STI_TRY(measure_compute(context, arena, &subject, &subject.widths[i], &samples, error));
  }
  STI_TRY(measure_fixed(context, arena, &subject, &samples, error));
  DeviceProfile profile = {.engine = engine_names[standalone->job.engine],
                           .sequence_length = subject.task->tokens,
                           .threads = standalone->job.threads,
                           .queue_depth = standalone->job.queue_depth};
  memcpy(profile.bundle, subject.manifest->digest, sizeof profile.bundle);
  STI_TRY(fit_profile(arena, &samples, &profile, error));
  profile_write(out, &profile);
  if (out->failed) return sti_out_of_memory(error);
  return options->out == NULL ? STI_OK : write_out(options->out, out, error);
}

StiCode verb_profile(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  Options options;
  (void)exit_code;
  STI_TRY(options_parse(argc, argv, TAKES_OUT, &options, error));
  return standalone_act(measure, &options, out, error);
}
