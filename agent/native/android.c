/* android.c: see android.h. */
#include "android.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"

enum { PROGRAM_LIMIT_S = 10 };

/* ------------------------------------------------------------------ its programs */

static void program_path(char path[PATH_MAX], const char *name) {
  snprintf(path, PATH_MAX, "%s/system/bin/%s", kernel_roots.android, name);
}

static bool never(void) { return false; }

/* What a program of the device printed, to be freed; false unless it ended well and said something. */
static bool asked(const char *name, const char *argument, Text *out) {
  char path[PATH_MAX];
  Said said = {0};
  StiError ignored;
  program_path(path, name);
  if (access(path, X_OK) != 0) return false;
  char *const argv[] = {(char *)name, (char *)argument, NULL};
  const Command command = {path, argv};
  bool ended = child_run(&command, &(Text){0}, PROGRAM_LIMIT_S, never, &said, &ignored) == STI_OK &&
               WIFEXITED(said.status) && WEXITSTATUS(said.status) == 0 && said.out.length > 0;
  text_free(&said.words);
  *out = said.out;
  if (!ended) text_free(out);
  return ended;
}

bool is_android(void) {
  char path[PATH_MAX];
  program_path(path, "getprop");
  return access(path, X_OK) == 0;
}

bool android_property(const char *name, char *value, size_t size) {
  Text out;
  if (!asked("getprop", name, &out)) return false;
  snprintf(value, size, "%s", stripped(out.data));
  make_utf8(value);
  text_free(&out);
  return value[0] != '\0';
}

/* Numbers that a whole model shares tell no two devices apart. */
bool android_serial(char *serial, size_t size) {
  static const char *const names[] = {"ro.serialno", "ro.boot.serialno"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (android_property(names[i], serial, size) && serial[strspn(serial, "0")] != '\0' &&
        strcasecmp(serial, "unknown") != 0 && strcasecmp(serial, "0123456789abcdef") != 0)
      return true;
  return false;
}

/* ------------------------------------------------------------------ battery */

/* Source: frameworks/base, services/core/java/com/android/server/BatteryService.java, dumpInternal. */
AndroidBattery parse_android_battery(const char *text) {
  AndroidBattery found = {0};
  int64_t level = -1, scale = -1, tenths;
  if (strstr(text, "UPDATES STOPPED") != NULL) return found;
  char *copy = strdup(text), *rest = copy, *line;
  while (copy != NULL && (line = next_line(&rest)) != NULL) {
    char *value = split_line(line, ':');
    if (value == NULL) continue;
    if (strcmp(line, "present") == 0) found.present = strcmp(value, "true") == 0;
    if (strcmp(line, "level") == 0 && !parse_int(value, &level)) level = -1;
    if (strcmp(line, "scale") == 0 && !parse_int(value, &scale)) scale = -1;
    if (strcmp(line, "temperature") == 0 && parse_int(value, &tenths) && plausible_milli_c(tenths, 100)) {
      found.has_temperature = true;
      found.temperature_milli_c = 100 * tenths;
    }
  }
  free(copy);
  if (!found.present) return (AndroidBattery){0};
  found.has_percent = level >= 0 && scale > 0 && level <= scale && scale < 1000000;
  if (found.has_percent) found.percent = 100 * level / scale;
  return found;
}

bool android_battery(AndroidBattery *battery) {
  Text out;
  if (!asked("dumpsys", "battery", &out)) return false;
  *battery = parse_android_battery(out.data);
  text_free(&out);
  return battery->present;
}

/* ------------------------------------------------------------------ temperature */

/* The text behind `key` in "Temperature{mValue=41.2, mType=0, mName=cpu0, mStatus=0}", up to the next comma or brace. */
static bool field_of(const char *line, const char *key, char *value, size_t size) {
  const char *at = strstr(line, key);
  if (at == NULL) return false;
  at += strlen(key);
  size_t length = strcspn(at, ",}");
  if (length == 0 || length >= size) return false;
  memcpy(value, at, length);
  value[length] = '\0';
  return true;
}

/* Types 6 to 8 are a battery's voltage, current and charge. Source: hardware/interfaces/thermal, TemperatureType. */
static void take_zone(const char *line, AndroidThermal *thermal) {
  char number[32], type[16], *end;
  int64_t kind;
  Zone *zone = &thermal->zones[thermal->zone_count];
  if (thermal->zone_count == ENTRIES || strstr(line, "Temperature{") == NULL ||
      !field_of(line, "mValue=", number, sizeof number) || !field_of(line, "mType=", type, sizeof type) ||
      !field_of(line, "mName=", zone->name, sizeof zone->name) || !parse_int(type, &kind) || (kind >= 6 && kind <= 8))
    return;
  double degrees = strtod(number, &end);
  int64_t milli_c = *end == '\0' && fabs(degrees) < 1e6 ? llrint(1000 * degrees) : 0;
  zone->has_temperature = plausible_milli_c(milli_c, 1);
  zone->temperature_milli_c = milli_c;
  make_utf8(zone->name);
  thermal->zone_count++;
}

/* Source: frameworks/base, services/core/java/com/android/server/power/ThermalManagerService.java, dump. */
void parse_android_thermal(const char *text, AndroidThermal *thermal) {
  bool ready = false, overridden = false, current = false;
  char *copy = strdup(text), *rest = copy, *line;
  memset(thermal, 0, sizeof *thermal);
  while (copy != NULL && (line = next_line(&rest)) != NULL) {
    bool inside = *line == ' ' || *line == '\t';
    if (!inside) current = strncmp(line, "Current temperatures", strlen("Current temperatures")) == 0;
    if (inside && current) take_zone(line, thermal);
    char *value = split_line(line, ':');
    if (value == NULL) continue;
    if (strcmp(line, "HAL Ready") == 0) ready = strcmp(value, "true") == 0;
    if (strcmp(line, "IsStatusOverride") == 0) overridden = strcmp(value, "true") == 0;
    if (strcmp(line, "Thermal Status") == 0)
      thermal->has_status = parse_int(value, &thermal->status) && thermal->status >= 0 && thermal->status <= 6;
  }
  free(copy);
  if (!ready) thermal->zone_count = 0;
  thermal->has_status = thermal->has_status && ready && !overridden;
}

bool android_thermal(AndroidThermal *thermal) {
  Text out;
  if (!asked("dumpsys", "thermalservice", &out)) return false;
  parse_android_thermal(out.data, thermal);
  text_free(&out);
  return true;
}

/* ------------------------------------------------------------------ sensors */

static void take_thermal(const AndroidThermal *thermal, Sensors *sensors) {
  if (!sensors->has_throttled && thermal->has_status) {
    sensors->has_throttled = true;
    sensors->throttled = thermal->status > 0;
  }
  if (sensors->has_temperature) return;
  for (int i = 0; i < thermal->zone_count; i++) {
    const Zone *zone = &thermal->zones[i];
    if (!zone->has_temperature) continue;
    if (!sensors->has_temperature || zone->temperature_milli_c > sensors->temperature_milli_c)
      sensors->temperature_milli_c = zone->temperature_milli_c;
    sensors->has_temperature = true;
  }
}

void android_complete(Sensors *sensors) {
  AndroidThermal thermal;
  AndroidBattery battery;
  if (!is_android()) return;
  if ((!sensors->has_temperature || !sensors->has_throttled) && android_thermal(&thermal))
    take_thermal(&thermal, sensors);
  if ((sensors->has_temperature && sensors->has_battery) || !android_battery(&battery)) return;
  if (!sensors->has_battery && battery.has_percent) {
    sensors->has_battery = true;
    sensors->battery_percent = battery.percent;
  }
  if (!sensors->has_temperature && battery.has_temperature) {
    sensors->has_temperature = true;
    sensors->temperature_milli_c = battery.temperature_milli_c;
  }
}
