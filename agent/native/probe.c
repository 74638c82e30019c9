/* probe.c: the probe unit: sensors, and whether an emulated device is as slow as it says. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../sti_runtime/native/storage.h"
#include "../../sti_runtime/native/threads.h"
#include "android.h"
#include "spool.h"
#include "unit_kinds.h"

enum {
  SINGLE_READS = 15,
  SECTIONS = 25,
  NS_PER_WEIGHT = 5, /* CPU time per weight of a narrow layer, decompression included: the scale, not a measurement */
  DEFAULT_READ_BYTES = 256 << 10,
  FILE_BYTES = 16 << 20,
  WRITE_BYTES = 64 << 10,
  MOST_THREADS = 256,
};
static const int64_t ns_per_s = 1000000000, sustained_ns = 1000000000, spin_ns = 500000000, section_ns = 5000000,
                     least_section_ns = 200000, most_section_ns = 20000000;

/* Nominal beside measured rates; what is not limited is absent. */
typedef struct {
  bool io, cpu;
  int64_t io_bytes_per_s, read_bytes, read_p50_ns, read_nominal_ns;
  int64_t cpu_share_milli, section_cpu_ns, section_p50_ns, section_nominal_ns;
} Verified;

static int ascending(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* The lower of the two middle values; sorts values [count]. */
static int64_t median_low(int64_t *values, size_t count) {
  qsort(values, count, sizeof *values, ascending);
  return values[(count - 1) / 2];
}

/* ------------------------------------------------------------------ what is typical for the job */

/* Bytes of every merged read that the job's plans make, [*count]. */
static StiCode planned_reads(const Job *job, Arena *arena, int64_t **sizes, size_t *count, StiError *error) {
  size_t shards = 0;
  for (int32_t i = 0; i < job->unit_count; i++)
    if (job->units[i].kind == UNIT_EXECUTE)
      shards += (size_t)job->units[i].plan.submodel.depth * (size_t)job->units[i].plan.submodel.width;
  *sizes = arena_alloc(arena, shards * sizeof **sizes + 1);
  *count = 0;
  if (*sizes == NULL) return sti_out_of_memory(error);
  for (int32_t i = 0; i < job->unit_count; i++) {
    const Plan *plan = &job->units[i].plan;
    if (job->units[i].kind != UNIT_EXECUTE) continue;
    size_t planned = (size_t)plan->submodel.depth * (size_t)plan->submodel.width;
    int32_t *index = arena_alloc(arena, planned * sizeof *index);
    MergedRead *reads = arena_alloc(arena, planned * sizeof *reads);
    if (index == NULL || reads == NULL) return sti_out_of_memory(error);
    int32_t merged = merge_reads(plan->shards, index, plan_order(plan, false, index), reads);
    for (int32_t k = 0; k < merged; k++) (*sizes)[(*count)++] = reads[k].length;
  }
  return STI_OK;
}

/* The median merged read of the job's plans; without plans that of a 4-bit layer; else 256 KiB. */
static StiCode typical_read_bytes(Context *context, int64_t *bytes, StiError *error) {
  Arena arena = {0};
  int64_t *sizes;
  size_t count;
  StiCode code = planned_reads(context->job, &arena, &sizes, &count, error);
  if (code == STI_OK && count > 0) *bytes = median_low(sizes, count);
  arena_free(&arena);
  if (code != STI_OK || count > 0) return code;
  *bytes = DEFAULT_READ_BYTES;
  if (context->bundle_folder == NULL) return STI_OK;
  const Manifest *manifest;
  STI_TRY(context_manifest(context, &manifest, error));
  const Region *region = manifest_region(manifest, 4);
  if (region == NULL) region = &manifest->regions[0];
  *bytes = 0;
  for (int32_t slice = 0; slice < manifest->model.heads; slice++) *bytes += region->versions[slice].length;
  if (*bytes > STI_MERGE_LIMIT_BYTES) *bytes = STI_MERGE_LIMIT_BYTES;
  return STI_OK;
}

/* About the CPU time of the bundle's narrowest layer, from its weights; without a bundle the longest. */
static StiCode typical_section_ns(Context *context, int64_t *section, StiError *error) {
  *section = most_section_ns;
  if (context->bundle_folder == NULL) return STI_OK;
  const Manifest *manifest;
  STI_TRY(context_manifest(context, &manifest, error));
  const ModelConfig *model = &manifest->model;
  int64_t narrowest = model->heads, head = model->hidden / model->heads, ffn = model->ffn / model->heads;
  for (int32_t i = 0; i < manifest->submodel_count; i++)
    if (manifest->submodels[i].width < narrowest) narrowest = manifest->submodels[i].width;
  int64_t weights = narrowest * model->hidden * (4 * head + 2 * ffn);
  *section = weights * NS_PER_WEIGHT;
  if (*section < least_section_ns) *section = least_section_ns;
  if (*section > most_section_ns) *section = most_section_ns;
  return STI_OK;
}

/* ------------------------------------------------------------------ reads */

typedef struct { char folder[PATH_MAX], name[80]; int64_t bytes; bool temporary; } ProbeFile;

static StiCode fill_file(int fd, const char *path, StiError *error) {
  uint64_t block[WRITE_BYTES / 8], random = 0;
  for (int64_t written = 0; written < FILE_BYTES;) {
    for (size_t i = 0; i < WRITE_BYTES / 8; i++) block[i] = random_next(&random);
    ssize_t got = write(fd, block, sizeof block);
    if (got < 0 && errno != EINTR) return storage_error(error, errno, path);
    if (got > 0) written += got;
  }
  return fsync(fd) == 0 ? STI_OK : storage_error(error, errno, path);
}

/* A temporary file in the spool, for jobs without a bundle. */
static StiCode make_probe_file(Context *context, ProbeFile *file, StiError *error) {
  char path[PATH_MAX + 100];
  snprintf(file->folder, sizeof file->folder, "%s", context->spool);
  snprintf(file->name, sizeof file->name, ".probe.%ld.partial", (long)getpid());
  snprintf(path, sizeof path, "%s/%s", file->folder, file->name);
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return storage_error(error, errno, path);
  StiCode code = fill_file(fd, path, error);
  close(fd);
  if (code != STI_OK) unlink(path);
  file->temporary = true;
  file->bytes = FILE_BYTES;
  return code;
}

/* The largest region of the job's bundle, else a temporary file. */
static StiCode probe_file(Context *context, ProbeFile *file, StiError *error) {
  *file = (ProbeFile){0};
  if (context->bundle_folder == NULL) return make_probe_file(context, file, error);
  const Manifest *manifest;
  STI_TRY(context_manifest(context, &manifest, error));
  int32_t shards = manifest->model.layers * manifest->model.heads;
  snprintf(file->folder, sizeof file->folder, "%s", context->bundle_folder);
  for (int32_t i = 0; i < manifest->region_count; i++) {
    const Version *last = &manifest->regions[i].versions[shards - 1];
    if (last->offset + last->length <= file->bytes) continue;
    file->bytes = last->offset + last->length;
    snprintf(file->name, sizeof file->name, "%s", manifest->regions[i].file);
  }
  return STI_OK;
}

static void remove_probe_file(const ProbeFile *file) {
  char path[PATH_MAX + 100];
  snprintf(path, sizeof path, "%s/%s", file->folder, file->name);
  if (file->temporary) unlink(path);
}

/* One read at a random place, missing the page cache, through the throttle. */
static StiCode paced_read(const Storage *storage, const Throttle *throttle, const Verified *found, uint64_t *places,
                          void *buffer, int64_t *duration_ns, StiError *error) {
  int64_t blocks = (storage->files[0].bytes - found->read_bytes) / STI_ALIGNMENT + 1;
  int64_t offset = random_below(places, blocks) * STI_ALIGNMENT;
  struct iovec part = {buffer, (size_t)found->read_bytes};
  STI_TRY(unit_stopped());
  if (storage->mode == IO_BUFFERED) storage_evict(storage);
  int64_t start_ns = monotonic_ns();
  STI_TRY(storage_read(storage, 0, offset, &part, 1, found->read_bytes, error));
  throttled_read(throttle, start_ns, found->read_bytes);
  *duration_ns = monotonic_ns() - start_ns;
  return STI_OK;
}

/* Bytes per second sustained for a second of random reads; median time of a read after a pause as long as a read should
 * take, when a device that saves up for bursts would do so. */
static StiCode measure_reads(Context *context, const Storage *storage, void *buffer, Verified *found, StiError *error) {
  Throttle throttle = throttle_for(&context->device);
  uint64_t places = (uint64_t)storage->files[0].bytes;
  int64_t duration_ns, singles[SINGLE_READS], done = 0, elapsed_ns;
  STI_TRY(paced_read(storage, &throttle, found, &places, buffer, &duration_ns, error));
  int64_t start_ns = monotonic_ns();
  while ((elapsed_ns = monotonic_ns() - start_ns) < sustained_ns) {
    STI_TRY(paced_read(storage, &throttle, found, &places, buffer, &duration_ns, error));
    done += found->read_bytes;
  }
  found->io_bytes_per_s = (int64_t)((double)done * (double)ns_per_s / (double)elapsed_ns);
  for (int i = 0; i < SINGLE_READS; i++) {
    sleep_until(monotonic_ns() + found->read_nominal_ns);
    STI_TRY(paced_read(storage, &throttle, found, &places, buffer, &singles[i], error));
  }
  found->read_p50_ns = median_low(singles, SINGLE_READS);
  return STI_OK;
}

static StiCode verify_io(Context *context, const ProbeFile *file, Verified *found, StiError *error) {
  int64_t whole = file->bytes / STI_ALIGNMENT * STI_ALIGNMENT;
  STI_TRY(typical_read_bytes(context, &found->read_bytes, error));
  if (found->read_bytes > whole) found->read_bytes = whole;
  found->read_nominal_ns =
      (int64_t)((double)found->read_bytes * (double)ns_per_s / (double)context->job->emulation.io_bytes_per_s);
  Storage storage;
  STI_TRY(storage_open_file(&storage, file->folder, file->name, file->bytes, IO_DIRECT, error));
  void *buffer = pages_alloc((size_t)found->read_bytes);
  StiCode code = buffer == NULL ? sti_out_of_memory(error) : measure_reads(context, &storage, buffer, found, error);
  if (buffer != NULL) pages_free(buffer, (size_t)found->read_bytes);
  storage_close(&storage);
  return code;
}

/* ------------------------------------------------------------------ compute */

typedef struct { int64_t until_ns; const Job *job; } Spin;

/* Keep a CPU busy until some time of CLOCK_MONOTONIC. */
static void spin(int64_t until_ns) {
  Sha256 hash;
  uint8_t block[4096] = {0};
  sha256_begin(&hash);
  while (monotonic_ns() < until_ns) sha256_add(&hash, block, sizeof block);
}

/* The caller may be pinned to one CPU as a compute thread; its helpers are not to share that one. */
static void *spin_helper(void *argument) {
  const Spin *task = argument;
  if (task->job->cpu_count > 0) cpus_pin(task->job->cpus, task->job->cpu_count);
  spin(task->until_ns);
  return NULL;
}

/* Use `cpu_ns` of this thread's CPU time. */
static void burn(int64_t cpu_ns) {
  int64_t until_ns = thread_cpu_ns() + cpu_ns;
  Sha256 hash;
  uint8_t block[4096] = {0};
  sha256_begin(&hash);
  while (thread_cpu_ns() < until_ns) sha256_add(&hash, block, sizeof block);
}

/* `threads` busy threads, the caller's included, until some time. */
static StiCode spin_all(const Job *job, int threads, int64_t until_ns, StiError *error) {
  pthread_t helpers[MOST_THREADS];
  Spin task = {until_ns, job};
  int started = 0, problem = 0;
  while (started < threads - 1 &&
         (problem = thread_start(&helpers[started], SMALL_STACK_BYTES, spin_helper, &task)) == 0)
    started++;
  spin(until_ns);
  for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
  if (problem == 0) return STI_OK;
  return sti_fail_errno(error, STI_RESOURCE, problem, "Close other programs on the device.", "No thread to compute with");
}

/* CPU time ÷ wall time, in thousandths, of busy threads, as many as the nominal share could feed. */
static StiCode measure_cpu_share(Context *context, Verified *found, StiError *error) {
  Throttle throttle = throttle_for(&context->device);
  int64_t wanted = (context->job->emulation.cpu_share_milli + 999) / 1000;
  int threads = wanted < MOST_THREADS ? (int)wanted : MOST_THREADS;
  int64_t start_ns = monotonic_ns(), start_cpu_ns = process_cpu_ns();
  while (monotonic_ns() - start_ns < spin_ns) {
    STI_TRY(unit_stopped());
    Section section = section_begin(&throttle);
    STI_TRY(spin_all(context->job, threads, section.begun_ns + section_ns, error));
    section_end(&throttle, section);
  }
  found->cpu_share_milli = (process_cpu_ns() - start_cpu_ns) * 1000 / (monotonic_ns() - start_ns);
  return STI_OK;
}

/* Median wall time of single-threaded sections of a narrow layer's CPU time, after pauses. A limit that works in coarser
 * slices than a section lets some through at full speed and holds up others: its median is far from nominal though its
 * average is right. */
static StiCode measure_sections(Context *context, Verified *found) {
  Throttle throttle = throttle_for(&context->device);
  int64_t walls[SECTIONS];
  for (int i = 0; i < SECTIONS; i++) {
    STI_TRY(unit_stopped());
    sleep_until(monotonic_ns() + found->section_nominal_ns);
    Section section = section_begin(&throttle);
    burn(found->section_cpu_ns);
    section_end(&throttle, section);
    walls[i] = monotonic_ns() - section.begun_ns;
  }
  found->section_p50_ns = median_low(walls, SECTIONS);
  return STI_OK;
}

static StiCode verify_cpu(Context *context, Verified *found, StiError *error) {
  STI_TRY(measure_cpu_share(context, found, error));
  STI_TRY(typical_section_ns(context, &found->section_cpu_ns, error));
  found->section_nominal_ns = found->section_cpu_ns * 1000 / context->job->emulation.cpu_share_milli;
  if (found->section_nominal_ns < found->section_cpu_ns) found->section_nominal_ns = found->section_cpu_ns;
  return measure_sections(context, found);
}

/* ------------------------------------------------------------------ result */

/* Measure an emulated device through the throttle its requests go through. */
static StiCode verify(Context *context, Verified *found, StiError *error) {
  const Emulation *emulation = &context->job->emulation;
  *found = (Verified){.io = emulation->io_bytes_per_s > 0, .cpu = emulation->cpu_share_milli > 0};
  if (found->io) {
    ProbeFile file;
    STI_TRY(probe_file(context, &file, error));
    StiCode code = verify_io(context, &file, found, error);
    remove_probe_file(&file);
    if (code != STI_OK) return code;
  }
  return found->cpu ? verify_cpu(context, found, error) : STI_OK;
}

static void write_mechanism(Text *out, const char *key, Mechanism mechanism) {
  json_key(out, key);
  if (mechanism == MECHANISM_NONE)
    json_null(out);
  else
    json_text(out, mechanism_name(mechanism));
}

static void write_emulation(Text *out, const Emulation *emulation) {
  json_open(out, '{');
  write_mechanism(out, "cpu_mechanism", emulation->cpu_mechanism);
  write_maybe(out, "cpu_share_milli", emulation->cpu_share_milli > 0, emulation->cpu_share_milli);
  write_maybe(out, "io_bytes_per_s", emulation->io_bytes_per_s > 0, emulation->io_bytes_per_s);
  write_mechanism(out, "io_mechanism", emulation->io_mechanism);
  json_close(out, '}');
}

static void write_verified(Text *out, const Emulation *emulation, const Verified *found) {
  json_open(out, '{');
  write_maybe(out, "cpu_share_milli", found->cpu, found->cpu_share_milli);
  json_key(out, "emulation"), write_emulation(out, emulation);
  write_maybe(out, "io_bytes_per_s", found->io, found->io_bytes_per_s);
  write_maybe(out, "read_bytes", found->io, found->read_bytes);
  write_maybe(out, "read_nominal_ns", found->io, found->read_nominal_ns);
  write_maybe(out, "read_p50_ns", found->io, found->read_p50_ns);
  write_maybe(out, "section_cpu_ns", found->cpu, found->section_cpu_ns);
  write_maybe(out, "section_nominal_ns", found->cpu, found->section_nominal_ns);
  write_maybe(out, "section_p50_ns", found->cpu, found->section_p50_ns);
  json_close(out, '}');
}

StiCode run_probe(Context *context, Text *result, StiError *error) {
  Sensors sensors;
  Verified found;
  sensors_read(context->spool, &sensors);
  android_complete(&sensors);
  if (context->job->emulated) STI_TRY(verify(context, &found, error));
  json_open(result, '{');
  json_text_field(result, "kind", "probe");
  json_key(result, "sensors"), sensors_write(result, &sensors);
  json_key(result, "verified");
  if (context->job->emulated)
    write_verified(result, &context->job->emulation, &found);
  else
    json_null(result);
  json_close(result, '}');
  return STI_OK;
}
