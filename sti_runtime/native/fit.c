/* fit.c: from raw samples to a device profile: robust fits and percentiles (docs/planner.md, "the fit").
 *
 * All floating point is IEEE double, one operation at a time in the stated order (-ffp-contract=off), and only in
 * fit_line; samples are sorted first, so their order does not matter. Everything else is integer arithmetic.
 */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "planner.h"
#include "wide.h"

enum {
  PPM = 1000000,
  IO_ERROR_BOUND_PPM = 200000, /* a profile whose median relative IO residual is larger is unfit */
  MIN_IO_SAMPLES = 12,
  MIN_SAMPLES = 5, /* per width, per fidelity, of fixed costs: fewer (but some) make the profile unfit */
  FIT_ROUNDS = 50,
};
static const double residual_floor = 0.001, singular = 1e-9;

/* ------------------------------------------------------------------ percentiles */

/* Nearest rank: which of n sorted values, from 0. */
static size_t rank_of(size_t n, unsigned percent) {
  size_t rank = (size_t)(((uint64_t)percent * n + 99) / 100);
  return rank ? rank - 1 : 0;
}

static int by_value(const void *a, const void *b) {
  int64_t left = *(const int64_t *)a, right = *(const int64_t *)b;
  return (left > right) - (left < right);
}

static int by_wide(const void *a, const void *b) { return wide_compare(*(const Wide *)a, *(const Wide *)b); }

/* Sorts values [n]. */
static Wide wide_percentile(Wide *values, size_t n, unsigned percent) {
  qsort(values, n, sizeof *values, by_wide);
  return values[rank_of(n, percent)];
}

/* a · 10⁶ / b, rounded down; a below 2^65, b not 0. */
static Wide ppm_of(Wide a, Wide b) {
  Wide scaled;
  wide_scale(a, PPM, &scaled);
  return wide_floor(scaled, b);
}

static StiCode too_large(StiError *error) {
  return sti_fail(error, STI_INPUT, "Profile the device again; samples are in ns and bytes.",
                  "The samples give a figure of 2^63 or more.");
}

static StiCode no_samples(StiError *error, const char *kind, const char *detail) {
  return sti_fail(error, STI_INPUT, "Profile the device again; its journal says why samples were refused.",
                  "No usable %s samples for a device profile: %s.", kind, detail);
}

static const char *const none_taken = "all are warm-ups or throttled, or none were taken";

__attribute__((format(printf, 4, 5)))
static StiCode note_unfit(Arena *arena, DeviceProfile *profile, StiError *error, const char *format, ...) {
  char text[160];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  profile->unfit[profile->unfit_count] = arena_text(arena, text, (size_t)length);
  return profile->unfit[profile->unfit_count++] ? STI_OK : sti_out_of_memory(error);
}

/* ------------------------------------------------------------------ IO */

static int by_io(const void *a, const void *b) {
  const IoSample *left = a, *right = b;
  if (left->versions != right->versions) return left->versions < right->versions ? -1 : 1;
  if (left->bytes != right->bytes) return left->bytes < right->bytes ? -1 : 1;
  return (left->duration_ns > right->duration_ns) - (left->duration_ns < right->duration_ns);
}

/* Robust line through (versions, bytes, duration): alpha in ns, slope in ns per byte.
 *
 * Minimises the sum of relative absolute residuals by iteratively reweighted least squares: a median fit, so a
 * minority of disturbed reads cannot pull it. Neither figure is negative: one that would be is set to 0 and the other
 * fitted alone. Rows that are all of one size per version cannot tell the two apart: alpha is 0. */
static void fit_line(const IoSample *rows, size_t n, double *alpha_ns, double *ns_per_byte) {
  double alpha = 0.0, slope = 0.0;
  for (int round = 0; round < FIT_ROUNDS; round++) {
    double vv = 0.0, vb = 0.0, bb = 0.0, vy = 0.0, by = 0.0;
    for (size_t i = 0; i < n; i++) {
      double v = (double)rows[i].versions, b = (double)rows[i].bytes;
      double y = rows[i].duration_ns > 1 ? (double)rows[i].duration_ns : 1.0;
      double weight;
      if (round == 0) {
        weight = 1.0 / (y * y);
      } else {
        double fit = alpha * v;
        fit = fit + slope * b;
        double scale = fit > 1.0 ? fit : 1.0;
        double residual = fabs(y - fit) / scale;
        weight = 1.0 / ((scale * scale) * (residual > residual_floor ? residual : residual_floor));
      }
      double wv = weight * v, wb = weight * b;
      vv = vv + wv * v;
      vb = vb + wv * b;
      bb = bb + wb * b;
      vy = vy + wv * y;
      by = by + wb * y;
    }
    double determinant = vv * bb - vb * vb;
    if (determinant <= singular * (vv * bb)) {
      alpha = 0.0;
      slope = by / bb;
      continue;
    }
    alpha = (vy * bb - by * vb) / determinant;
    slope = (by * vv - vy * vb) / determinant;
    if (alpha < 0.0) {
      alpha = 0.0;
      slope = by / bb;
    } else if (slope < 0.0) {
      alpha = vy / vv;
      slope = 0.0;
    }
  }
  *alpha_ns = alpha;
  *ns_per_byte = slope;
}

/* At least 1. */
static Wide fitted_ns(const IoFit *io, const IoSample *row) {
  Wide per_byte = wide_floor(wide_product((uint64_t)row->bytes, (uint64_t)io->ps_per_byte), wide_of(1000));
  Wide fitted = wide_sum(wide_product((uint64_t)row->versions, (uint64_t)io->alpha_ns), per_byte);
  return wide_compare(fitted, wide_of(1)) < 0 ? wide_of(1) : fitted;
}

/* How the valid rows [n] lie about the line: p95 of measured ÷ fitted, median of |measured − fitted| ÷ fitted. */
static StiCode fit_residuals(Arena *arena, const IoSample *rows, size_t n, IoFit *io, StiError *error) {
  Wide *ratios = arena_alloc(arena, n * sizeof *ratios), *errors = arena_alloc(arena, n * sizeof *errors);
  if (!ratios || !errors) return sti_out_of_memory(error);
  for (size_t i = 0; i < n; i++) {
    Wide fitted = fitted_ns(io, &rows[i]), measured = wide_of((uint64_t)rows[i].duration_ns), scaled;
    ratios[i] = ppm_of(measured, fitted);
    if (wide_compare(measured, fitted) >= 0) {
      errors[i] = ppm_of(wide_difference(measured, fitted), fitted);
    } else { /* ⌊(f − y)·10⁶ / f⌋ = 10⁶ − ⌈y·10⁶ / f⌉, and f − y may be too large to scale */
      wide_scale(measured, PPM, &scaled);
      errors[i] = wide_difference(wide_of(PPM), wide_ceiling(scaled, fitted));
    }
  }
  if (!wide_to_int(wide_percentile(errors, n, 50), &io->error_ppm)) return too_large(error);
  if (!wide_to_int(wide_percentile(ratios, n, 95), &io->p95_ppm)) return too_large(error);
  if (io->p95_ppm < 1) io->p95_ppm = 1;
  return STI_OK;
}

/* How much longer reads take while a layer is computed: the median of measured ÷ fitted, at least 10⁶. */
static StiCode fit_beside(Arena *arena, const ProfileSamples *samples, DeviceProfile *profile, StiError *error) {
  IoFit *io = &profile->io;
  size_t n = 0;
  Wide *ratios = arena_alloc(arena, (samples->beside_count + 1) * sizeof *ratios);
  if (!ratios) return sti_out_of_memory(error);
  for (size_t i = 0; i < samples->beside_count; i++) {
    const IoSample *row = &samples->beside[i];
    if (row->valid) ratios[n++] = ppm_of(wide_of((uint64_t)row->duration_ns), fitted_ns(io, row));
  }
  if (n < MIN_SAMPLES)
    STI_TRY(note_unfit(arena, profile, error, "io: %zu valid reads beside compute, fewer than %d", n, MIN_SAMPLES));
  io->beside_samples = (int64_t)n;
  io->beside_ppm = PPM;
  if (n > 0 && !wide_to_int(wide_percentile(ratios, n, 50), &io->beside_ppm)) return too_large(error);
  if (io->beside_ppm < PPM) io->beside_ppm = PPM;
  return STI_OK;
}

static StiCode fit_io(Arena *arena, const ProfileSamples *samples, DeviceProfile *profile, StiError *error) {
  IoFit *io = &profile->io;
  size_t n = 0;
  IoSample *valid = arena_alloc(arena, (samples->io_count + 1) * sizeof *valid);
  if (!valid) return sti_out_of_memory(error);
  for (size_t i = 0; i < samples->io_count; i++)
    if (samples->io[i].valid) valid[n++] = samples->io[i];
  if (n == 0) {
    char detail[60];
    snprintf(detail, sizeof detail, "%zu were taken, none is valid", samples->io_count);
    return no_samples(error, "IO", detail);
  }
  if (n < MIN_IO_SAMPLES)
    STI_TRY(note_unfit(arena, profile, error, "io: %zu valid samples, fewer than %d", n, MIN_IO_SAMPLES));
  qsort(valid, n, sizeof *valid, by_io);
  double alpha, slope;
  fit_line(valid, n, &alpha, &slope);
  if (!(alpha + 0.5 < 0x1p63 && slope * 1000.0 + 0.5 < 0x1p63)) return too_large(error);
  *io = (IoFit){
      .alpha_ns = (int64_t)(alpha + 0.5),
      .ps_per_byte = (int64_t)(slope * 1000.0 + 0.5),
      .samples = (int64_t)n,
  };
  STI_TRY(fit_residuals(arena, valid, n, io, error));
  if (io->error_ppm > IO_ERROR_BOUND_PPM)
    STI_TRY(note_unfit(arena, profile, error, "io: median residual of %" PRId64 " ppm, more than %d", io->error_ppm,
                       IO_ERROR_BOUND_PPM));
  return fit_beside(arena, samples, profile, error);
}

/* ------------------------------------------------------------------ compute and decompression */

/* One sample's figure under its width, or under its fidelity. loud: of a sample with reads beside, set for medians only. */
typedef struct {
  int64_t key;
  Wide value;
  bool loud;
} Keyed;

static int by_key(const void *a, const void *b) {
  const Keyed *left = a, *right = b;
  if (left->key != right->key) return left->key < right->key ? -1 : 1;
  if (left->loud != right->loud) return left->loud ? 1 : -1;
  return wide_compare(left->value, right->value);
}

/* Medians of figures [n] by key, of a key's quiet ones where it has any, into times [n]; sorts the figures. Returns the
 * number of keys. */
static int32_t group_medians(Keyed *figures, size_t n, KeyedTime *times) {
  int32_t count = 0;
  qsort(figures, n, sizeof *figures, by_key);
  for (size_t first = 0, end; first < n; first = end) {
    size_t quiet = 0;
    for (end = first; end < n && figures[end].key == figures[first].key; end++) quiet += !figures[end].loud;
    const Keyed *median = &figures[first + rank_of(quiet > 0 ? quiet : end - first, 50)];
    times[count++] = (KeyedTime){.key = median->key, .median_ns = (int64_t)median->value.low,
                                 .samples = (int64_t)(end - first)};
  }
  return count;
}

/* median · ratio / 10⁶, rounded up; false: 2^63 or more. */
static bool scaled_up(int64_t median, Wide ratio, int64_t *p95) {
  Wide product;
  return wide_scale(ratio, (uint64_t)median, &product) && wide_to_int(wide_ceiling(product, wide_of(PPM)), p95);
}

/* p95 figures of the same groups: the median times the 95th percentile of ratios [n]; sorts the ratios. */
static StiCode group_p95(Keyed *ratios, size_t n, KeyedTime *times, StiError *error) {
  qsort(ratios, n, sizeof *ratios, by_key);
  for (size_t first = 0; first < n; first += (size_t)times++->samples) {
    const Wide ratio = ratios[first + rank_of((size_t)times->samples, 95)].value;
    if (!scaled_up(times->median_ns, ratio, &times->p95_ns)) return too_large(error);
  }
  return STI_OK;
}

static int64_t median_of(const KeyedTime *times, int32_t count, int64_t key) {
  int32_t low = 0;
  while (count > 1) { /* times ascend by key, and hold it */
    int32_t half = count / 2;
    if (times[low + half].key <= key) low += half;
    count -= half;
  }
  return times[low].median_ns;
}

/* Fidelities of samples are the keys of times, ascending. */
static StiCode check_fidelities(const KeyedTime *times, int32_t count, StiError *error) {
  Text list = {0};
  for (int32_t i = 0; i < count; i++)
    if (times[i].key > 32 || sti_fidelity_index((int)times[i].key) < 0)
      text_printf(&list, "%s%" PRId64, list.length ? ", " : "", times[i].key);
  StiCode code = STI_OK;
  if (list.failed) code = sti_out_of_memory(error);
  else if (list.length)
    code = sti_fail(error, STI_INPUT, "Profile the device again.", "Compute samples at %s bits, which no bundle holds.",
                    list.data);
  text_free(&list);
  return code;
}

/* A shard's share of its layer's decompression, rounded half up. */
static int64_t shard_ns(const ComputeSample *row) {
  int64_t rest = row->decompress_ns % row->width;
  return row->decompress_ns / row->width + (rest >= row->width - rest);
}

/* What a layer takes by its medians, without reads beside. */
static Wide layer_usual(const ComputeSample *row, const DeviceProfile *profile) {
  int64_t compute_ns = median_of(profile->compute, profile->compute_count, row->width);
  int64_t decompress_ns = median_of(profile->decompress, profile->decompress_count, row->fidelity);
  return wide_sum(wide_of((uint64_t)compute_ns), wide_product((uint64_t)row->width, (uint64_t)decompress_ns));
}

static Wide layer_measured(const ComputeSample *row) {
  return wide_of((uint64_t)row->decompress_ns + (uint64_t)row->compute_ns);
}

static Wide read_ps(int64_t bytes, int64_t ps_per_byte) {
  return wide_floor(wide_product((uint64_t)bytes, (uint64_t)ps_per_byte), wide_of(1000));
}

/* How far the layer as a whole exceeds its medians, ppm, at least 10⁶: the parts' own percentiles would not do, since
 * a disturbance hits either part, seldom both, and their sum would count it twice. */
static Wide layer_ratio(const ComputeSample *row, const DeviceProfile *profile) {
  const ReadCost *cost = &profile->read_cost;
  Wide usual = layer_usual(row, profile);
  if (row->read_bytes > 0) {
    usual = wide_sum(usual, wide_of((uint64_t)cost->median_layer_ns));
    usual = wide_sum(usual, read_ps(row->read_bytes, cost->median_ps_per_byte));
  }
  Wide measured = layer_measured(row);
  Wide ratio = ppm_of(measured, wide_compare(usual, wide_of(1)) < 0 ? wide_of(1) : usual);
  return wide_compare(ratio, wide_of(PPM)) < 0 ? wide_of(PPM) : ratio;
}

/* Name the keys, wanted [n] or measured, of which there are too few samples, ascending. Sorts wanted. */
static StiCode note_missing(Arena *arena, const char *what, const char *key, int64_t *wanted, size_t n,
                            const KeyedTime *times, int32_t count, DeviceProfile *profile, StiError *error) {
  qsort(wanted, n, sizeof *wanted, by_value);
  for (size_t i = 0, t = 0; i < n || t < (size_t)count;) {
    bool from_times = t < (size_t)count && (i == n || times[t].key <= wanted[i]);
    int64_t value = from_times ? times[t].key : wanted[i], samples = from_times ? times[t++].samples : 0;
    while (i < n && wanted[i] == value) i++;
    if (samples < MIN_SAMPLES)
      STI_TRY(note_unfit(arena, profile, error, "%s: %" PRId64 " samples of %s %" PRId64 ", fewer than %d", what,
                         samples, key, value, MIN_SAMPLES));
  }
  return STI_OK;
}

static int64_t *copy_of(Arena *arena, const int64_t *values, size_t n) {
  int64_t *copy = arena_alloc(arena, (n + 1) * sizeof *copy);
  if (copy && n) memcpy(copy, values, n * sizeof *copy);
  return copy;
}

typedef struct { int64_t bytes; Wide ns; } Added;

static int by_bytes(const void *a, const void *b) {
  const Added *left = a, *right = b;
  if (left->bytes != right->bytes) return left->bytes < right->bytes ? -1 : 1;
  return wide_compare(left->ns, right->ns);
}

/* What reading beside adds to compute, over rows [n] with such reads: those that read the least tell what it costs at
 * all, the others what a byte costs. */
static StiCode fit_read_cost(Arena *arena, const ComputeSample *rows, size_t n, DeviceProfile *profile,
                             StiError *error) {
  ReadCost *cost = &profile->read_cost;
  size_t count = 0;
  Added *added = arena_alloc(arena, (n + 1) * sizeof *added);
  Wide *values = arena_alloc(arena, (n + 1) * sizeof *values);
  if (!added || !values) return sti_out_of_memory(error);
  *cost = (ReadCost){0};
  for (size_t i = 0; i < n; i++) {
    if (rows[i].read_bytes == 0) continue;
    Wide usual = layer_usual(&rows[i], profile), measured = layer_measured(&rows[i]);
    added[count++] = (Added){rows[i].read_bytes, wide_compare(measured, usual) > 0 ? wide_difference(measured, usual)
                                                                                  : wide_of(0)};
  }
  cost->samples = (int64_t)count;
  if (count == 0) return STI_OK;
  qsort(added, count, sizeof *added, by_bytes);
  const size_t few = (count + 1) / 2;
  for (size_t i = 0; i < few; i++) values[i] = added[i].ns;
  const Wide each = wide_percentile(values, few, 50);
  if (!wide_to_int(each, &cost->median_layer_ns)) return too_large(error);
  if (count == few) return STI_OK;
  for (size_t i = few; i < count; i++) {
    Wide more = wide_compare(added[i].ns, each) > 0 ? wide_difference(added[i].ns, each) : wide_of(0);
    wide_scale(more, 1000, &more);
    values[i - few] = wide_floor(more, wide_of((uint64_t)added[i].bytes));
  }
  if (!wide_to_int(wide_percentile(values, count - few, 50), &cost->median_ps_per_byte)) return too_large(error);
  return STI_OK;
}

/* By how much layers with reads beside, of rows [n], exceed their medians. */
static StiCode fit_read_p95(Arena *arena, const ComputeSample *rows, size_t n, DeviceProfile *profile,
                            StiError *error) {
  ReadCost *cost = &profile->read_cost;
  size_t count = 0;
  Wide *ratios = arena_alloc(arena, (n + 1) * sizeof *ratios);
  if (!ratios) return sti_out_of_memory(error);
  for (size_t i = 0; i < n; i++)
    if (rows[i].read_bytes > 0) ratios[count++] = layer_ratio(&rows[i], profile);
  if (count == 0) return STI_OK;
  const Wide ratio = wide_percentile(ratios, count, 95);
  if (!scaled_up(cost->median_layer_ns, ratio, &cost->p95_layer_ns)) return too_large(error);
  return scaled_up(cost->median_ps_per_byte, ratio, &cost->p95_ps_per_byte) ? STI_OK : too_large(error);
}

static StiCode fit_layers(Arena *arena, const ProfileSamples *samples, DeviceProfile *profile, StiError *error) {
  size_t n = 0, all = samples->compute_count + 1;
  ComputeSample *rows = arena_alloc(arena, all * sizeof *rows);
  Keyed *by_width = arena_alloc(arena, all * sizeof *by_width);
  Keyed *by_fidelity = arena_alloc(arena, all * sizeof *by_fidelity);
  profile->compute = arena_alloc(arena, all * sizeof *profile->compute);
  profile->decompress = arena_alloc(arena, all * sizeof *profile->decompress);
  int64_t *widths = copy_of(arena, samples->widths, samples->width_count);
  int64_t *fidelities = copy_of(arena, samples->fidelities, samples->fidelity_count);
  if (!rows || !by_width || !by_fidelity || !profile->compute || !profile->decompress || !widths || !fidelities)
    return sti_out_of_memory(error);
  for (size_t i = 0; i < samples->compute_count; i++)
    if (!samples->compute[i].warmup && !samples->compute[i].throttled) rows[n++] = samples->compute[i];
  if (n == 0) return no_samples(error, "compute", none_taken);

  for (size_t i = 0; i < n; i++) {
    const bool loud = rows[i].read_bytes > 0;
    by_width[i] = (Keyed){rows[i].width, wide_of((uint64_t)rows[i].compute_ns), loud};
    by_fidelity[i] = (Keyed){rows[i].fidelity, wide_of((uint64_t)shard_ns(&rows[i])), loud};
  }
  profile->compute_count = group_medians(by_width, n, profile->compute);
  profile->decompress_count = group_medians(by_fidelity, n, profile->decompress);
  STI_TRY(check_fidelities(profile->decompress, profile->decompress_count, error));
  STI_TRY(fit_read_cost(arena, rows, n, profile, error));
  STI_TRY(fit_read_p95(arena, rows, n, profile, error));
  if (profile->read_cost.samples < MIN_SAMPLES)
    STI_TRY(note_unfit(arena, profile, error, "compute: %" PRId64 " samples beside reads, fewer than %d",
                       profile->read_cost.samples, MIN_SAMPLES));

  for (size_t i = 0; i < n; i++) {
    Wide ratio = layer_ratio(&rows[i], profile);
    by_width[i] = (Keyed){rows[i].width, ratio, false};
    by_fidelity[i] = (Keyed){rows[i].fidelity, ratio, false};
  }
  STI_TRY(group_p95(by_width, n, profile->compute, error));
  STI_TRY(group_p95(by_fidelity, n, profile->decompress, error));
  STI_TRY(note_missing(arena, "compute", "width", widths, samples->width_count, profile->compute,
                       profile->compute_count, profile, error));
  return note_missing(arena, "decompression", "fidelity", fidelities, samples->fidelity_count, profile->decompress,
                      profile->decompress_count, profile, error);
}

/* ------------------------------------------------------------------ fixed costs */

/* Percentile of one part (by its place in FixedSample) of rows [n]; values [n] is scratch. */
static int64_t part_percentile(const FixedSample *rows, size_t n, size_t place, unsigned percent, int64_t *values) {
  for (size_t i = 0; i < n; i++) memcpy(&values[i], (const char *)&rows[i] + place, sizeof *values);
  qsort(values, n, sizeof *values, by_value);
  return values[rank_of(n, percent)];
}

static FixedTime fixed_time(const FixedSample *rows, size_t n, unsigned percent, int64_t *values) {
  return (FixedTime){
      .embed_io_ns = part_percentile(rows, n, offsetof(FixedSample, embed_io_ns), percent, values),
      .embed_compute_ns = part_percentile(rows, n, offsetof(FixedSample, embed_compute_ns), percent, values),
      .head_ns = part_percentile(rows, n, offsetof(FixedSample, head_ns), percent, values),
      .samples = (int64_t)n,
  };
}

static StiCode fit_fixed(Arena *arena, const ProfileSamples *samples, DeviceProfile *profile, StiError *error) {
  size_t n = 0, stored = 0;
  FixedSample *rows = arena_alloc(arena, (samples->fixed_count + 1) * sizeof *rows);
  int64_t *values = arena_alloc(arena, (samples->fixed_count + 1) * sizeof *values);
  if (!rows || !values) return sti_out_of_memory(error);
  for (size_t i = 0; i < samples->fixed_count; i++) {
    const FixedSample *sample = &samples->fixed[i];
    if (sample->warmup || sample->throttled) continue;
    rows[n++] = *sample;
    stored += sample->storage_bytes >= sample->bytes;
  }
  if (n == 0) return no_samples(error, "fixed-cost", none_taken);
  if (stored < n && stored < MIN_SAMPLES) {
    STI_TRY(note_unfit(arena, profile, error, "fixed: only %zu of %zu samples were read from storage", stored, n));
  } else {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
      if (rows[i].storage_bytes >= rows[i].bytes) rows[kept++] = rows[i];
    n = kept;
  }
  if (n < MIN_SAMPLES) STI_TRY(note_unfit(arena, profile, error, "fixed: %zu samples, fewer than %d", n, MIN_SAMPLES));
  profile->fixed_median = fixed_time(rows, n, 50, values);
  profile->fixed_p95 = fixed_time(rows, n, 95, values);
  return STI_OK;
}

/* ------------------------------------------------------------------ the fit */

StiCode fit_profile(Arena *arena, const ProfileSamples *samples, DeviceProfile *profile, StiError *error) {
  /* Three reasons of IO, one of read cost, two of fixed costs, one for each width and fidelity measured or wanted. */
  size_t reasons = 6 + 2 * samples->compute_count + samples->width_count + samples->fidelity_count;
  profile->unfit = arena_alloc(arena, reasons * sizeof *profile->unfit);
  profile->unfit_count = 0;
  if (!profile->unfit) return sti_out_of_memory(error);
  STI_TRY(fit_io(arena, samples, profile, error));
  STI_TRY(fit_layers(arena, samples, profile, error));
  return fit_fixed(arena, samples, profile, error);
}
