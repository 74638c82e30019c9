/* sensors.c: sensors that need no root: what the kernel shows below /sys and /proc. */
#include "sensors.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

#include "../../sti_runtime/native/threads.h"
#include "kernel_files.h"

_Static_assert((int)ZONE_NAME == (int)ENTRY_NAME, "a zone without a type is named after its folder");

enum { COLDEST_MILLI_C = -40000, HOTTEST_MILLI_C = 150000 };

/* ------------------------------------------------------------------ temperature */

/* Zones without a sensor read 0 or INT_MIN. */
bool plausible_milli_c(int64_t value, int64_t unit_milli_c) {
  return value != 0 && value >= COLDEST_MILLI_C / unit_milli_c && value <= HOTTEST_MILLI_C / unit_milli_c;
}

/* Source: Documentation/driver-api/thermal/sysfs-api.rst. */
bool zone_temperature(const char *folder, int64_t *milli_c) {
  return kernel_int(milli_c, "%s/class/thermal/%s/temp", kernel_roots.sys, folder) && plausible_milli_c(*milli_c, 1);
}

int thermal_zones(Zone *zones, int cap) {
  char folder[4096];
  EntryName names[ENTRIES];
  snprintf(folder, sizeof folder, "%s/class/thermal", kernel_roots.sys);
  int count = list_entries(folder, "thermal_zone", true, names, cap < ENTRIES ? cap : ENTRIES);
  for (int i = 0; i < count; i++) {
    Zone *zone = &zones[i];
    int64_t value = 0;
    if (!kernel_text(zone->name, sizeof zone->name, "%s/%s/type", folder, names[i]) || !zone->name[0])
      memcpy(zone->name, names[i], sizeof names[i]);
    zone->has_temperature = zone_temperature(names[i], &value);
    zone->temperature_milli_c = value;
  }
  return count;
}

static void read_temperature(Sensors *sensors) {
  Zone zones[ENTRIES];
  int count = thermal_zones(zones, ENTRIES);
  for (int i = 0; i < count; i++) {
    if (!zones[i].has_temperature) continue;
    if (!sensors->has_temperature || zones[i].temperature_milli_c > sensors->temperature_milli_c)
      sensors->temperature_milli_c = zones[i].temperature_milli_c;
    sensors->has_temperature = true;
  }
}

int cpu_coolers(EntryName *coolers, int cap) {
  char folder[4096], type[128];
  EntryName names[ENTRIES];
  snprintf(folder, sizeof folder, "%s/class/thermal", kernel_roots.sys);
  int count = list_entries(folder, "cooling_device", true, names, ENTRIES), found = 0;
  for (int i = 0; i < count && found < cap; i++) {
    if (!kernel_text(type, sizeof type, "%s/%s/type", folder, names[i])) continue;
    for (char *c = type; *c; c++) *c = (char)tolower((unsigned char)*c);
    bool of_cpu = strstr(type, "cpufreq") || strstr(type, "cpu-") || strstr(type, "processor");
    if (of_cpu) memcpy(coolers[found++], names[i], sizeof names[i]);
  }
  return found;
}

/* Whether a cooling device holds the CPU below its full clock. */
static void read_throttled(Sensors *sensors) {
  EntryName coolers[ENTRIES];
  int count = cpu_coolers(coolers, ENTRIES);
  for (int i = 0; i < count; i++) {
    int64_t state;
    if (!kernel_int(&state, "%s/class/thermal/%s/cur_state", kernel_roots.sys, coolers[i])) continue;
    sensors->has_throttled = true;
    sensors->throttled |= state > 0;
  }
}

/* ------------------------------------------------------------------ CPUs */

int parse_cpu_list(const char *text, int64_t *cpus, int cap) {
  int count = 0;
  while (*text) {
    char *end;
    if (*text == ',') {
      text++;
      continue;
    }
    if (!isdigit((unsigned char)*text)) return 0;
    unsigned long low = strtoul(text, &end, 10), high = low;
    if (*end == '-') {
      if (!isdigit((unsigned char)end[1])) return 0;
      high = strtoul(end + 1, &end, 10);
    }
    if ((*end != ',' && *end != '\0') || low > high || high >= CPU_NUMBERS) return 0;
    for (unsigned long cpu = low; cpu <= high && count < cap; cpu++) cpus[count++] = (int64_t)cpu;
    text = end;
  }
  return count;
}

int online_cpus(int64_t *cpus, int cap) {
  char text[4096];
  int count = 0;
  if (kernel_text(text, sizeof text, "%s/devices/system/cpu/online", kernel_roots.sys))
    count = parse_cpu_list(text, cpus, cap);
  return count > 0 ? count : cpus_allowed(cpus, cap);
}

int cpu_clocks(const char *file, int64_t *khz, int cap) {
  int count = online_cpus(khz, cap);
  for (int i = 0; i < count; i++)
    if (!kernel_int(&khz[i], "%s/devices/system/cpu/cpu%d/cpufreq/%s", kernel_roots.sys, (int)khz[i], file)) return 0;
  return count;
}

/* Lines "<kHz> <units of 10 ms>". Source: Documentation/cpu-freq/cpufreq-stats.rst. */
static void read_time_in_state(Sensors *sensors) {
  char folder[4096], text[8192];
  EntryName names[SENSOR_POLICIES];
  snprintf(folder, sizeof folder, "%s/devices/system/cpu/cpufreq", kernel_roots.sys);
  int count = list_entries(folder, "policy", true, names, SENSOR_POLICIES);
  for (int i = 0; i < count; i++) {
    ClockTimes *times = &sensors->time_in_state[sensors->policy_count];
    if (!parse_int(names[i] + strlen("policy"), &times->cpu) || times->cpu < 0 ||
        !kernel_text(text, sizeof text, "%s/%s/stats/time_in_state", folder, names[i]))
      continue;
    char *rest = text, *line;
    times->count = 0;
    while (times->count < SENSOR_STATES && (line = next_line(&rest)) != NULL) {
      char *units = split_line(line, ' ');
      int64_t khz, spent;
      if (units == NULL || !parse_int(line, &khz) || !parse_int(units, &spent) || khz < 0 || spent < 0 ||
          spent > INT64_MAX / 10)
        continue;
      times->khz[times->count] = khz;
      times->ms[times->count++] = 10 * spent;
    }
    sensors->policy_count += times->count > 0;
  }
}

/* ------------------------------------------------------------------ load, memory, storage, battery */

bool load_milli(int64_t *milli) {
  char text[128], *end;
  if (!kernel_text(text, sizeof text, "%s/loadavg", kernel_roots.proc)) return false;
  double load = strtod(text, &end);
  bool known = end != text && (*end == '\0' || isspace((unsigned char)*end)) && fabs(load) < 1e12;
  if (known) *milli = llrint(1000 * load);
  return known;
}

bool meminfo_bytes(const char *name, int64_t *bytes) {
  char text[8192], *rest = text, *line;
  if (!kernel_text(text, sizeof text, "%s/meminfo", kernel_roots.proc)) return false;
  while ((line = next_line(&rest)) != NULL) {
    char *value = split_line(line, ':');
    if (value == NULL || strcmp(line, name) != 0) continue;
    value[strcspn(value, " \t")] = '\0';
    if (!parse_int(value, bytes) || *bytes < 0 || *bytes > INT64_MAX / 1024) return false;
    *bytes *= 1024;
    return true;
  }
  return false;
}

/* Batteries that power the device: those of mice and the like have scope "Device". */
static bool find_battery(bool readable, int64_t *percent) {
  char folder[4096], text[64];
  EntryName names[ENTRIES];
  snprintf(folder, sizeof folder, "%s/class/power_supply", kernel_roots.sys);
  int count = list_entries(folder, "", false, names, ENTRIES);
  for (int i = 0; i < count; i++) {
    if (!kernel_text(text, sizeof text, "%s/%s/type", folder, names[i]) || strcmp(text, "Battery") != 0) continue;
    if (kernel_text(text, sizeof text, "%s/%s/scope", folder, names[i]) && strcmp(text, "Device") == 0) continue;
    if (!readable) return true;
    if (kernel_int(percent, "%s/%s/capacity", folder, names[i]) && *percent >= 0 && *percent <= 100) return true;
  }
  return false;
}

bool has_battery(void) { return find_battery(false, NULL); }

static void read_free(const char *spool, Sensors *sensors) {
  struct statvfs stat;
  sensors->has_free = statvfs(spool, &stat) == 0;
  if (sensors->has_free) sensors->free_bytes = (int64_t)stat.f_bavail * (int64_t)stat.f_frsize;
}

void sensors_read(const char *spool, Sensors *sensors) {
  memset(sensors, 0, sizeof *sensors);
  sensors->wall_ns = wall_ns();
  read_temperature(sensors);
  sensors->cpu_count = cpu_clocks("scaling_cur_freq", sensors->cpu_khz, SENSOR_CPUS);
  read_time_in_state(sensors);
  sensors->has_load = load_milli(&sensors->load_milli);
  sensors->has_memory = meminfo_bytes("MemAvailable", &sensors->available_memory_bytes);
  read_free(spool, sensors);
  sensors->has_battery = find_battery(true, &sensors->battery_percent);
  read_throttled(sensors);
}

/* ------------------------------------------------------------------ JSON */

void write_ints(Text *out, const int64_t *values, int count) {
  json_open(out, '[');
  for (int i = 0; i < count; i++) json_int(out, values[i]);
  json_close(out, ']');
}

void write_maybe(Text *out, const char *key, bool known, int64_t value) {
  json_key(out, key);
  if (known)
    json_int(out, value);
  else
    json_null(out);
}

static void write_clock_times(Text *out, const ClockTimes *times) {
  json_open(out, '{');
  json_int_field(out, "cpu", times->cpu);
  json_key(out, "khz"), write_ints(out, times->khz, times->count);
  json_key(out, "ms"), write_ints(out, times->ms, times->count);
  json_close(out, '}');
}

void sensors_write(Text *out, const Sensors *sensors) {
  json_open(out, '{');
  write_maybe(out, "available_memory_bytes", sensors->has_memory, sensors->available_memory_bytes);
  write_maybe(out, "battery_percent", sensors->has_battery, sensors->battery_percent);
  json_key(out, "cpu_khz"), write_ints(out, sensors->cpu_khz, sensors->cpu_count);
  write_maybe(out, "free_bytes", sensors->has_free, sensors->free_bytes);
  write_maybe(out, "load_milli", sensors->has_load, sensors->load_milli);
  write_maybe(out, "temperature_milli_c", sensors->has_temperature, sensors->temperature_milli_c);
  json_key(out, "throttled");
  if (sensors->has_throttled)
    json_bool(out, sensors->throttled);
  else
    json_null(out);
  json_key(out, "time_in_state");
  json_open(out, '[');
  for (int i = 0; i < sensors->policy_count; i++) write_clock_times(out, &sensors->time_in_state[i]);
  json_close(out, ']');
  json_int_field(out, "wall_ns", sensors->wall_ns);
  json_close(out, '}');
}
