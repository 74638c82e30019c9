/* reading_program.c: the sensors and the parsers of facts over captured files, for test_reading.py.
 *
 *   sensors ROOT SPOOL            sensors of the trees ROOT/sys and ROOT/proc
 *   complete ROOT SPOOL           the same, completed by Android's programs below ROOT/android
 *   serial ROOT                   the serial that they say
 *   battery | thermal             of standard input, what Android's services print
 *   watch ROOT LIMIT CPU…         a watch over those trees ("" for no limit): for each line of standard input one
 *                                 reading and a line, 1 if the sample is throttled; at its end the readings
 *   gates LIMITS… READINGS… BEFORE MS ROOT GOVERNOR MIN MAX CPU…   verdicts: "" for null; temperature, battery, load, free
 *                                 space of both; the temperature BEFORE was read MS earlier; clocks are those of ROOT/sys
 *   model | features | clocks | os-release | build-prop | mount PATH | property NAME      of standard input
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../agent/native/android.h"
#include "../../agent/native/facts_parse.h"
#include "../../agent/native/kernel_files.h"
#include "../../agent/native/sensors.h"
#include "../../agent/native/watch.h"
#include "../../sti_runtime/native/json.h"

static void read_below(const char *root) {
  static char sys[4096], proc[4096], android[4096];
  snprintf(sys, sizeof sys, "%s/sys", root);
  snprintf(proc, sizeof proc, "%s/proc", root);
  snprintf(android, sizeof android, "%s/android", root);
  kernel_roots.sys = sys;
  kernel_roots.android = android;
  kernel_roots.proc = proc;
}

static int print_sensors(const char *root, const char *spool, bool complete) {
  Text out = {0};
  Sensors sensors;
  read_below(root);
  sensors_read(spool, &sensors);
  if (complete) android_complete(&sensors);
  sensors_write(&out, &sensors);
  puts(out.data);
  text_free(&out);
  return 0;
}

static bool number(const char *text, int64_t *value) { return parse_int(text, value); }

static int print_watch(const char *root, const char *limit, char **words, int count) {
  Arena arena = {0};
  Text out = {0};
  Watch watch;
  StiError error;
  Gates gates = {0};
  int32_t cpus[64];
  char line[16];
  bool throttled;
  read_below(root);
  gates.has_temperature = number(limit, &gates.max_temperature_milli_c);
  for (int i = 0; i < count && i < 64; i++) cpus[i] = atoi(words[i]);
  StiCode code = watch_begin(&watch, cpus, count, &gates, &arena, &error);
  puts(code == STI_OK ? "begun" : error.what);
  fflush(stdout);
  for (int64_t after = 1; code == STI_OK && fgets(line, sizeof line, stdin) != NULL; after++) {
    code = watch_sampled(&watch, after, &throttled, &error);
    puts(code == STI_OK ? (throttled ? "1" : "0") : error.what);
    fflush(stdout);
  }
  watch_write(&out, &watch);
  puts(out.data);
  text_free(&out);
  arena_free(&arena);
  return code != STI_OK;
}

static int print_gates(int argc, char **argv) {
  Gates gates = {.wait_limit_s = 3};
  Sensors now = {0}, before = {0};
  Settling settling = {0};
  int32_t cpus[64];
  GateVerdict verdicts[GATE_COUNT];
  Text out = {0};
  StiError error;
  gates.has_temperature = number(argv[0], &gates.max_temperature_milli_c);
  gates.has_battery = number(argv[1], &gates.min_battery_percent);
  gates.has_load = number(argv[2], &gates.max_load_milli);
  gates.has_free = number(argv[3], &gates.min_free_bytes);
  now.has_temperature = number(argv[4], &now.temperature_milli_c);
  now.has_battery = number(argv[5], &now.battery_percent);
  now.has_load = number(argv[6], &now.load_milli);
  now.has_free = number(argv[7], &now.free_bytes);
  before.has_temperature = number(argv[8], &before.temperature_milli_c);
  settling_add(&settling, &before, 0);
  settling_add(&settling, &now, atoll(argv[9]) * 1000000);
  read_below(argv[10]);
  gates.governor = argv[11][0] ? argv[11] : NULL;
  gates.has_min_khz = number(argv[12], &gates.min_khz);
  gates.has_max_khz = number(argv[13], &gates.max_khz);
  for (int i = 14; i < argc && i < 64; i++) cpus[i - 14] = atoi(argv[i]);
  int count = gates_check(&gates, &now, &settling, cpus, argc - 14, verdicts);
  gates_write(&out, verdicts, count);
  puts(out.data);
  gates_error(verdicts, count, 3.4, &gates, &error);
  puts(gates_shut(verdicts, count) ? error.what : "");
  text_free(&out);
  return 0;
}

static void print_battery(const char *text) {
  AndroidBattery battery = parse_android_battery(text);
  Text out = {0};
  json_open(&out, '[');
  json_bool(&out, battery.present);
  battery.has_percent ? json_int(&out, battery.percent) : json_null(&out);
  battery.has_temperature ? json_int(&out, battery.temperature_milli_c) : json_null(&out);
  json_close(&out, ']');
  puts(out.data);
  text_free(&out);
}

static void print_thermal(const char *text) {
  static AndroidThermal thermal;
  Text out = {0};
  parse_android_thermal(text, &thermal);
  json_open(&out, '[');
  thermal.has_status ? json_int(&out, thermal.status) : json_null(&out);
  for (int i = 0; i < thermal.zone_count; i++) {
    const Zone *zone = &thermal.zones[i];
    json_open(&out, '[');
    json_text(&out, zone->name);
    zone->has_temperature ? json_int(&out, zone->temperature_milli_c) : json_null(&out);
    json_close(&out, ']');
  }
  json_close(&out, ']');
  puts(out.data);
  text_free(&out);
}

static void print_found(bool found, const char *text) { puts(found ? text : "null"); }

int main(int argc, char **argv) {
  static char input[KERNEL_TEXT];
  char found[1024], other[1024];
  int64_t khz[16];
  const char *what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "sensors") == 0 && argc == 4) return print_sensors(argv[2], argv[3], false);
  if (strcmp(what, "complete") == 0 && argc == 4) return print_sensors(argv[2], argv[3], true);
  if (strcmp(what, "serial") == 0 && argc == 3) {
    read_below(argv[2]);
    print_found(android_serial(found, sizeof found), found);
    return 0;
  }
  if (strcmp(what, "watch") == 0 && argc >= 4) return print_watch(argv[2], argv[3], argv + 4, argc - 4);
  if (strcmp(what, "gates") == 0 && argc >= 17) return print_gates(argc - 2, argv + 2);
  size_t length = fread(input, 1, sizeof input - 1, stdin);
  if (strcmp(what, "model") == 0) print_found(parse_cpu_model(input, found, sizeof found), found);
  if (strcmp(what, "battery") == 0) print_battery(input);
  if (strcmp(what, "thermal") == 0) print_thermal(input);
  if (strcmp(what, "features") == 0) puts(cpu_flags(input));
  if (strcmp(what, "os-release") == 0) print_found(parse_os_release(input, found, sizeof found), found);
  if (strcmp(what, "build-prop") == 0) print_found(parse_build_prop(input, found, sizeof found), found);
  if (strcmp(what, "property") == 0 && argc == 3)
    print_found(parse_property_area(input, length, argv[2], found, sizeof found), found);
  if (strcmp(what, "mount") == 0 && argc == 3) {
    bool mounted = parse_mount(input, argv[2], found, other, sizeof found);
    printf("%s %s\n", mounted ? found : "null", mounted ? other : "null");
  }
  if (strcmp(what, "clocks") == 0)
    for (int i = 0, count = parse_clocks(input, khz, 16); i < count; i++) printf("%" PRId64 "\n", khz[i]);
  return 0;
}
