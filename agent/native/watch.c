/* watch.c: see watch.h; what counts as throttled is said in docs/job-and-journal.md, 2.
 *
 * How many files a reading opens is bounded by the caps in watch.h, whatever the device has.
 */
#include "watch.h"

#include <stdio.h>
#include <string.h>

/* A reading is kept when temperature or load moved by this, available memory by one part in KEPT_MEMORY_SHARE. */
enum { KEPT_MILLI_C = 1000, KEPT_LOAD_MILLI = 250, KEPT_MEMORY_SHARE = 16 };

/* ------------------------------------------------------------------ what is watched */

/* Of equally hot zones the first. */
static void find_zones(Watch *watch) {
  EntryName names[ENTRIES];
  int64_t hottest[WATCHED_ZONES], value;
  char folder[4096];
  snprintf(folder, sizeof folder, "%s/class/thermal", kernel_roots.sys);
  int count = list_entries(folder, "thermal_zone", true, names, ENTRIES);
  for (int i = 0; i < count; i++) {
    if (!zone_temperature(names[i], &value)) continue;
    int at = watch->zone_count;
    while (at > 0 && hottest[at - 1] < value) at--;
    if (at == WATCHED_ZONES) continue;
    if (watch->zone_count < WATCHED_ZONES) watch->zone_count++;
    for (int other = watch->zone_count - 1; other > at; other--) {
      hottest[other] = hottest[other - 1];
      memcpy(watch->zones[other], watch->zones[other - 1], sizeof watch->zones[other]);
    }
    hottest[at] = value;
    memcpy(watch->zones[at], names[i], sizeof watch->zones[at]);
  }
}

/* ------------------------------------------------------------------ reading */

static void read_frequencies(const Watch *watch, Reading *reading) {
  for (int i = 0; i < watch->domain_count; i++) {
    reading->khz[i].clock = domain_khz(watch->cpus[i], "scaling_cur_freq");
    reading->khz[i].ceiling = domain_khz(watch->cpus[i], "scaling_max_freq");
  }
}

static void find(Reading *reading, bool throttled) {
  reading->has_throttled = true;
  reading->throttled |= throttled;
}

static void judge_khz(Reading *reading, int64_t khz, int64_t usual) {
  if (khz >= 0 && usual >= 0) find(reading, 100 * khz < (100 - CLOCK_TOLERANCE_PERCENT) * usual);
}

static void read_rest(const Watch *watch, Reading *reading) {
  int64_t value;
  for (int i = 0; i < watch->domain_count; i++) {
    judge_khz(reading, reading->khz[i].clock, watch->usual[i].clock);
    judge_khz(reading, reading->khz[i].ceiling, watch->usual[i].ceiling);
  }
  for (int i = 0; i < watch->cooler_count; i++)
    if (kernel_int(&value, "%s/class/thermal/%s/cur_state", kernel_roots.sys, watch->coolers[i]))
      find(reading, value > 0);
  for (int i = 0; i < watch->zone_count; i++) {
    if (!zone_temperature(watch->zones[i], &value)) continue;
    if (!reading->has_temperature || value > reading->temperature_milli_c) reading->temperature_milli_c = value;
    reading->has_temperature = true;
  }
  if (reading->has_temperature && watch->has_limit) find(reading, reading->temperature_milli_c > watch->limit_milli_c);
  reading->has_load = load_milli(&reading->load_milli);
  reading->has_memory = meminfo_bytes("MemAvailable", &reading->available_memory_bytes);
}

/* ------------------------------------------------------------------ keeping */

static bool moved(bool had, int64_t was, bool has, int64_t is, int64_t by) {
  if (!had || !has) return had != has;
  return (was > is ? was - is : is - was) >= (by > 1 ? by : 1);
}

/* Whether a reading says something that the one kept before it does not. */
static bool differs(const Reading *kept, const Reading *now, int domain_count) {
  if (kept->has_throttled != now->has_throttled || kept->throttled != now->throttled) return true;
  for (int i = 0; i < domain_count; i++) {
    const DomainKhz *was = &kept->khz[i], *is = &now->khz[i];
    if (was->ceiling != is->ceiling) return true;
    if (moved(was->clock >= 0, was->clock, is->clock >= 0, is->clock, was->clock * CLOCK_TOLERANCE_PERCENT / 100))
      return true;
  }
  return moved(kept->has_temperature, kept->temperature_milli_c, now->has_temperature, now->temperature_milli_c,
               KEPT_MILLI_C) ||
         moved(kept->has_load, kept->load_milli, now->has_load, now->load_milli, KEPT_LOAD_MILLI) ||
         moved(kept->has_memory, kept->available_memory_bytes, now->has_memory, now->available_memory_bytes,
               kept->available_memory_bytes / KEPT_MEMORY_SHARE);
}

static StiCode keep(Watch *watch, StiError *error) {
  Reading *kept = arena_alloc(watch->arena, sizeof *kept);
  if (kept == NULL) return sti_out_of_memory(error);
  *kept = watch->last;
  watch->last_kept = true;
  if (watch->kept == NULL)
    watch->first = kept;
  else
    watch->kept->next = kept;
  watch->kept = kept;
  return STI_OK;
}

/* ------------------------------------------------------------------ a unit's readings */

/* The clock below which, less the tolerance, the domain is throttled; −1 where it follows the load. What is above
 * base_frequency comes and goes with the other CPUs' load. */
static int64_t judged_khz(int32_t cpu, int64_t khz) {
  char governor[64];
  int64_t sure = domain_khz(cpu, "base_frequency");
  bool known = domain_governor(cpu, governor);
  if (!known || (strcmp(governor, "performance") != 0 && strcmp(governor, "userspace") != 0)) return -1;
  return sure >= 0 && sure < khz ? sure : khz;
}

StiCode watch_begin(Watch *watch, const int32_t *cpus, int cpu_count, const Gates *gates, Arena *arena,
                    StiError *error) {
  *watch = (Watch){.arena = arena, .has_limit = gates->has_temperature, .limit_milli_c = gates->max_temperature_milli_c};
  watch->domain_count = clock_domains(cpus, cpu_count, watch->cpus);
  find_zones(watch);
  watch->cooler_count = cpu_coolers(watch->coolers, WATCHED_COOLERS);
  read_frequencies(watch, &watch->last);
  for (int i = 0; i < watch->domain_count; i++) {
    watch->usual[i] = watch->last.khz[i];
    watch->usual[i].clock = judged_khz(watch->cpus[i], watch->last.khz[i].clock);
  }
  read_rest(watch, &watch->last);
  return keep(watch, error);
}

StiCode watch_sampled(Watch *watch, int64_t after, bool *throttled, StiError *error) {
  bool before = watch->last.throttled;
  watch->last = (Reading){.after = after};
  watch->last_kept = false;
  read_frequencies(watch, &watch->last);
  read_rest(watch, &watch->last);
  *throttled = before || watch->last.throttled;
  return differs(watch->kept, &watch->last, watch->domain_count) ? keep(watch, error) : STI_OK;
}

/* ------------------------------------------------------------------ JSON */

static void write_khz(Text *out, int64_t khz) {
  if (khz < 0)
    json_null(out);
  else
    json_int(out, khz);
}

static void write_reading(Text *out, const Reading *reading, int domain_count) {
  json_open(out, '{');
  json_int_field(out, "after", reading->after);
  write_maybe(out, "available_memory_bytes", reading->has_memory, reading->available_memory_bytes);
  json_key(out, "ceilings_khz"), json_open(out, '[');
  for (int i = 0; i < domain_count; i++) write_khz(out, reading->khz[i].ceiling);
  json_close(out, ']');
  json_key(out, "clocks_khz"), json_open(out, '[');
  for (int i = 0; i < domain_count; i++) write_khz(out, reading->khz[i].clock);
  json_close(out, ']');
  write_maybe(out, "load_milli", reading->has_load, reading->load_milli);
  write_maybe(out, "temperature_milli_c", reading->has_temperature, reading->temperature_milli_c);
  json_key(out, "throttled");
  if (reading->has_throttled)
    json_bool(out, reading->throttled);
  else
    json_null(out);
  json_close(out, '}');
}

void watch_write(Text *out, const Watch *watch) {
  json_open(out, '[');
  for (const Reading *reading = watch->first; reading != NULL; reading = reading->next)
    write_reading(out, reading, watch->domain_count);
  if (!watch->last_kept) write_reading(out, &watch->last, watch->domain_count);
  json_close(out, ']');
}
