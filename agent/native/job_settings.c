/* job_settings.c: the settings of a job file (docs/job-and-journal.md, 2 and 8), read and written. */
#include <string.h>

#include "../../sti_runtime/native/records.h"
#include "job.h"

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#define DIGITS "0123456789"

enum { PATH_MOST = 255, KEY_MOST = 100 };

static const char *const kind_names[] = {"android", "file", "idle", NULL}; /* in the order of SettingKind */
const char *const setting_namespaces[] = {"global", "secure", "system", NULL};

/* ------------------------------------------------------------------ forms */

bool is_setting_value(const char *text) {
  size_t length = strlen(text);
  if (length == 0 || length > SETTING_VALUE_MOST || text[0] == ' ' || text[length - 1] == ' ') return false;
  for (size_t i = 0; i < length; i++)
    if (text[i] < ' ' || text[i] > '~') return false;
  return true;
}

bool is_setting_path(const char *text, bool stars) {
  static const char *const roots[] = {"/sys/class/", "/sys/devices/"};
  size_t root = 0;
  for (int i = 0; i < 2; i++)
    if (strncmp(text, roots[i], strlen(roots[i])) == 0) root = strlen(roots[i]);
  if (root == 0) return false;
  for (const char *part = text + root;; part++) { /* no part begins with '.', so none leads up */
    size_t length = strspn(part, LETTERS DIGITS "_.:@,+-");
    if (length == 0 || part[0] == '.') return false;
    part += length;
    part += stars && *part == '*';
    if (*part == '\0') return strlen(text) <= PATH_MOST;
    if (*part != '/') return false;
  }
}

bool is_setting_key(const char *text) {
  size_t length = strlen(text);
  return length > 0 && length <= KEY_MOST && strchr(LETTERS, text[0]) != NULL &&
         strspn(text, LETTERS DIGITS "_.") == length;
}

/* ------------------------------------------------------------------ reading */

static const char *field_value_text(Fields *fields) {
  const char *text = field_text(fields, "value", 1, SETTING_VALUE_MOST);
  if (fields->code == STI_OK && !is_setting_value(text))
    fields_problem(fields, "value should be printable ASCII without blanks around");
  return text;
}

static StiCode parse_setting(const JsonValue *value, const char *source, size_t index, Setting *setting,
                             StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Job", "settings", (int64_t)index, error);
  setting->kind = (SettingKind)field_choice(&fields, "kind", kind_names);
  STI_TRY(fields.code);
  switch (setting->kind) {
    case SETTING_ANDROID:
      setting->key = field_text(&fields, "key", 1, KEY_MOST);
      if (fields.code == STI_OK && !is_setting_key(setting->key))
        fields_problem(&fields, "key should be letters, digits, '_' and '.', a letter first");
      setting->namespace_ = setting_namespaces[field_choice(&fields, "namespace", setting_namespaces)];
      setting->value = field_value_text(&fields);
      break;
    case SETTING_FILE:
      setting->path = field_text(&fields, "path", 1, PATH_MOST);
      if (fields.code == STI_OK && !is_setting_path(setting->path, true))
        fields_problem(&fields, "path should be a file below /sys/class or /sys/devices");
      setting->value = field_value_text(&fields);
      break;
    case SETTING_IDLE: setting->latency_us = field_int(&fields, "latency_us", 0, INT_MOST); break;
  }
  return fields_end(&fields);
}

StiCode settings_parse(Arena *arena, const JsonValue *array, const char *source, Job *job, StiError *error) {
  job->setting_count = (int32_t)array->array.count;
  job->settings = new_array(arena, array->array.count, sizeof *job->settings);
  if (job->settings == NULL) return sti_out_of_memory(error);
  for (int32_t i = 0; i < job->setting_count; i++)
    STI_TRY(parse_setting(&array->array.items[i], source, (size_t)i, &job->settings[i], error));
  return STI_OK;
}

/* ------------------------------------------------------------------ writing */

void settings_write(Text *out, const Job *job) {
  json_key(out, "settings"), json_open(out, '[');
  for (int32_t i = 0; i < job->setting_count; i++) {
    const Setting *setting = &job->settings[i];
    json_open(out, '{');
    if (setting->kind == SETTING_ANDROID) json_text_field(out, "key", setting->key);
    json_text_field(out, "kind", kind_names[setting->kind]);
    if (setting->kind == SETTING_IDLE) json_int_field(out, "latency_us", setting->latency_us);
    if (setting->kind == SETTING_ANDROID) json_text_field(out, "namespace", setting->namespace_);
    if (setting->kind == SETTING_FILE) json_text_field(out, "path", setting->path);
    if (setting->kind != SETTING_IDLE) json_text_field(out, "value", setting->value);
    json_close(out, '}');
  }
  json_close(out, ']');
}
