/* facts_parse.c: see facts_parse.h. */
#include "facts_parse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "kernel_files.h"

enum { CORE_TYPES = 16 };

/* ------------------------------------------------------------------ CPU */

/* MIDR part numbers. Source: arch/arm64/include/asm/cputype.h. */
static const struct { const char *part, *name; } arm_parts[] = {
    {"0xd03", "Cortex-A53"},   {"0xd04", "Cortex-A35"},  {"0xd05", "Cortex-A55"},  {"0xd07", "Cortex-A57"},
    {"0xd08", "Cortex-A72"},   {"0xd09", "Cortex-A73"},  {"0xd0a", "Cortex-A75"},  {"0xd0b", "Cortex-A76"},
    {"0xd41", "Cortex-A78"},   {"0xd42", "Cortex-A78AE"}, {"0xd44", "Cortex-X1"},  {"0xd46", "Cortex-A510"},
    {"0xd47", "Cortex-A710"},  {"0xd48", "Cortex-X2"},   {"0xd4d", "Cortex-A715"}, {"0xd4e", "Cortex-X3"},
};

static void arm_name(const char *part, char *name, size_t size) {
  for (size_t i = 0; i < sizeof arm_parts / sizeof arm_parts[0]; i++)
    if (strcasecmp(part, arm_parts[i].part) == 0) {
      snprintf(name, size, "%s", arm_parts[i].name);
      return;
    }
  snprintf(name, size, "part %s", part);
}

bool parse_cpu_model(const char *cpuinfo, char *model, size_t size) {
  struct { char name[64]; int count; } types[CORE_TYPES];
  int type_count = 0;
  char *copy = strdup(cpuinfo), *rest = copy, *line;
  model[0] = '\0';
  while ((line = next_line(&rest)) != NULL) {
    char *value = split_line(line, ':'), name[64];
    if (value == NULL) continue;
    if (strcmp(line, "model name") == 0 && *value && !model[0]) snprintf(model, size, "%s", value);
    if (strcmp(line, "CPU part") != 0) continue;
    arm_name(value, name, sizeof name);
    int type = 0;
    while (type < type_count && strcmp(types[type].name, name) != 0) type++;
    if (type == CORE_TYPES) continue;
    if (type == type_count) {
      memcpy(types[type_count].name, name, sizeof name);
      types[type_count++].count = 0;
    }
    types[type].count++;
  }
  free(copy);
  size_t length = 0;
  for (int i = 0; i < type_count && length < size; i++)
    length += (size_t)snprintf(model + length, size - length, "%s%d× %s", i ? " + " : "", types[i].count, types[i].name);
  return model[0] != '\0';
}

bool has_word(const char *list, const char *word) {
  size_t length = strlen(word);
  for (const char *at = list; (at = strstr(at, word)) != NULL; at += length)
    if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0')) return true;
  return false;
}

const char *cpu_flags(char *cpuinfo) {
  char *line;
  while ((line = next_line(&cpuinfo)) != NULL) {
    char *value = split_line(line, ':');
    if (value != NULL && (strcasecmp(line, "flags") == 0 || strcasecmp(line, "features") == 0)) return value;
  }
  return "";
}

int parse_clocks(const char *cpuinfo, int64_t *khz, int cap) {
  char *copy = strdup(cpuinfo), *rest = copy, *line;
  int count = 0;
  while (count < cap && (line = next_line(&rest)) != NULL) {
    char *value = split_line(line, ':'), *end;
    if (value == NULL || strcmp(line, "cpu MHz") != 0) continue;
    double mhz = strtod(value, &end);
    if (end != value && *end == '\0' && mhz >= 0 && mhz < 1e9) khz[count++] = (int64_t)(mhz * 1000 + 0.5);
  }
  free(copy);
  return count;
}

/* ------------------------------------------------------------------ system */

static void unquote(char *value) {
  size_t length = strlen(value);
  while (length && strchr("\"'", value[length - 1])) value[--length] = '\0';
  size_t skip = strspn(value, "\"'");
  memmove(value, value + skip, length - skip + 1);
}

bool parse_os_release(const char *text, char *build, size_t size) {
  char *copy = strdup(text), *rest = copy, *line;
  const char *pretty = "", *name = "", *id = "";
  while ((line = next_line(&rest)) != NULL) {
    char *value = split_line(line, '=');
    if (value == NULL) continue;
    unquote(value);
    if (strcmp(line, "PRETTY_NAME") == 0) pretty = value;
    if (strcmp(line, "NAME") == 0) name = value;
    if (strcmp(line, "BUILD_ID") == 0) id = value;
  }
  if (*pretty) name = pretty;
  snprintf(build, size, *id && *name ? "%s (%s)" : "%s", name, id);
  free(copy);
  return build[0] != '\0';
}

bool parse_build_prop(const char *text, char *build, size_t size) {
  char *copy = strdup(text), *rest = copy, *line;
  build[0] = '\0';
  while ((line = next_line(&rest)) != NULL) {
    char *value = split_line(line, '=');
    if (value == NULL || !*value) continue;
    bool fingerprint = strcmp(line, "ro.build.fingerprint") == 0 || strcmp(line, "ro.system.build.fingerprint") == 0;
    if (fingerprint || (strcmp(line, "ro.build.display.id") == 0 && !build[0])) snprintf(build, size, "%s", value);
  }
  free(copy);
  return build[0] != '\0';
}

/* An entry is `serial u32, value [92], name`; the serial's first byte is the value's length.
 * Source: bionic, system_properties/include/system_properties/prop_info.h. */
bool parse_property_area(const char *area, size_t length, const char *name, char *value, size_t size) {
  enum { VALUE = 92, SERIAL = 4 };
  size_t name_size = strlen(name) + 1;
  for (size_t at = SERIAL + VALUE; at + name_size <= length; at++) {
    if (memcmp(area + at, name, name_size) != 0) continue;
    uint32_t serial;
    memcpy(&serial, area + at - VALUE - SERIAL, sizeof serial);
    const char *found = area + at - VALUE;
    size_t found_length = strnlen(found, VALUE);
    if (found_length == 0 || found_length == VALUE || found_length != serial >> 24) continue;
    snprintf(value, size, "%s", found);
    return true;
  }
  return false;
}

bool parse_mount(const char *mountinfo, const char *path, char *filesystem, char *source, size_t size) {
  char *copy = strdup(mountinfo), *rest = copy, *line;
  size_t best = 0;
  bool found = false;
  while ((line = next_line(&rest)) != NULL) {
    char *tail = strstr(line, " - "), *state, *point = NULL, *word;
    if (tail == NULL) continue;
    *tail = '\0';
    char *kind = strtok_r(tail + 3, " ", &state), *device = strtok_r(NULL, " ", &state);
    int field = 0;
    for (word = strtok_r(line, " ", &state); word != NULL; word = strtok_r(NULL, " ", &state), field++)
      if (field == 4) point = word;
    if (point == NULL || kind == NULL || device == NULL) continue;
    for (char *blank; (blank = strstr(point, "\\040")) != NULL; memmove(blank + 1, blank + 4, strlen(blank + 4) + 1))
      *blank = ' ';
    size_t length = strlen(point);
    while (length && point[length - 1] == '/') point[--length] = '\0';
    bool inside = strncmp(path, point, length) == 0 && (path[length] == '/' || path[length] == '\0');
    if (!inside || (found && length < best)) continue;
    best = length;
    found = true;
    snprintf(filesystem, size, "%s", kind);
    snprintf(source, size, "%s", device);
  }
  free(copy);
  return found;
}
