/* json_fields.c: reading the typed fields of an object; the first problem is kept with its dotted path. */
#include "json.h"
#include "utf8.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const JsonValue empty_array = {.kind = JSON_ARRAY}, empty_object = {.kind = JSON_OBJECT};

/* ------------------------------------------------------------------ problems */

/* "shards.3.offset", for messages. */
static void full_path(const Fields *fields, const char *name, char *path, size_t room) {
  char index[24] = "";
  if (fields->index >= 0) snprintf(index, sizeof index, "%lld", (long long)fields->index);
  const char *parts[] = {fields->path, index, name};
  size_t used = 0;
  path[0] = '\0';
  for (int i = 0; i < 3; i++) {
    if (parts[i][0] == '\0' || used >= room) continue;
    used += (size_t)snprintf(path + used, room - used, "%s%s", used == 0 ? "" : ".", parts[i]);
  }
}

static void problem_at(Fields *fields, const char *name, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static void keep_problem(Fields *fields, const char *name, const char *format, va_list arguments) {
  if (fields->code != STI_OK) return;
  char path[300], cause[1000];
  full_path(fields, name, path, sizeof path);
  vsnprintf(cause, sizeof cause, format, arguments);
  fields->code = sti_fail(fields->error, STI_FORMAT,
                          "It is damaged, edited or written by another version; make it again.",
                          "%s: not a valid %s: %s: %s.", fields->source, fields->what,
                          path[0] == '\0' ? "the whole file" : path, cause);
}

static void problem_at(Fields *fields, const char *name, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_problem(fields, name, format, arguments);
  va_end(arguments);
}

void fields_problem(Fields *fields, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_problem(fields, "", format, arguments);
  va_end(arguments);
}

/* ------------------------------------------------------------------ begin and end */

void fields_begin_item(Fields *fields, const JsonValue *object, const char *source, const char *what, const char *path,
                       int64_t index, StiError *error) {
  size_t length = strlen(path), kept = length < sizeof fields->path ? length : sizeof fields->path - 1;
  *fields = (Fields){.object = object, .source = source, .what = what, .index = index, .error = error};
  memcpy(fields->path, path, kept);
  if (object == NULL || object->kind != JSON_OBJECT) {
    fields_problem(fields, "it should be an object");
    fields->object = &empty_object;
  } else if (object->object.count > 64) {
    fields_problem(fields, "it has %zu fields, which is too many", object->object.count);
  }
}

void fields_begin(Fields *fields, const JsonValue *object, const char *source, const char *what, const char *path,
                  StiError *error) {
  fields_begin_item(fields, object, source, what, path, -1, error);
}

StiCode fields_end(Fields *fields) {
  for (size_t i = 0; fields->code == STI_OK && i < fields->object->object.count; i++) {
    if (!(fields->seen >> i & 1)) problem_at(fields, fields->object->object.members[i].key, "there is no such field");
  }
  return fields->code;
}

/* ------------------------------------------------------------------ fields */

/* The member's value, marked as seen; NULL if there is none. */
static JsonValue *find(Fields *fields, const char *name) {
  size_t count = fields->object->object.count, length = strlen(name);
  const JsonMember *members = fields->object->object.members;
  for (size_t step = 0; step < count; step++) {
    size_t i = fields->next + step < count ? fields->next + step : fields->next + step - count;
    if (members[i].key_length != length || memcmp(members[i].key, name, length) != 0) continue;
    fields->seen |= (uint64_t)1 << i;
    fields->next = i + 1 < count ? i + 1 : 0;
    return members[i].value;
  }
  return NULL;
}

static JsonValue *find_needed(Fields *fields, const char *name) {
  if (fields->code != STI_OK) return NULL;
  JsonValue *value = find(fields, name);
  if (value == NULL) problem_at(fields, name, "the field is missing");
  return value;
}

const JsonValue *field_value(Fields *fields, const char *name) { return find_needed(fields, name); }

bool field_is_null(Fields *fields, const char *name) {
  if (fields->code != STI_OK) return false;
  uint64_t seen = fields->seen;
  const JsonValue *value = find(fields, name);
  bool null = value != NULL && value->kind == JSON_NULL;
  if (!null) fields->seen = seen;
  return null;
}

bool field_is_given(Fields *fields, const char *name) {
  if (fields->code != STI_OK) return false;
  uint64_t seen = fields->seen;
  bool given = find(fields, name) != NULL;
  fields->seen = seen;
  return given;
}

static int64_t int_of(Fields *fields, const char *name, const JsonValue *value, int64_t least, int64_t most) {
  if (value->kind == JSON_INT && value->integer >= least && value->integer <= most) return value->integer;
  if (value->kind == JSON_INT || value->kind == JSON_BIG)
    problem_at(fields, name, "it should be from %lld to %lld", (long long)least, (long long)most);
  else problem_at(fields, name, "it should be an integer");
  return 0;
}

int64_t field_int(Fields *fields, const char *name, int64_t least, int64_t most) {
  const JsonValue *value = field_value(fields, name);
  return value == NULL ? 0 : int_of(fields, name, value, least, most);
}

bool field_bool(Fields *fields, const char *name) {
  const JsonValue *value = field_value(fields, name);
  if (value == NULL) return false;
  if (value->kind != JSON_BOOL) problem_at(fields, name, "it should be true or false");
  return value->kind == JSON_BOOL && value->boolean;
}

double field_number(Fields *fields, const char *name) {
  const JsonValue *value = field_value(fields, name);
  if (value == NULL) return 0;
  if (value->kind == JSON_INT) return (double)value->integer;
  if (value->kind == JSON_DOUBLE && isfinite(value->number)) return value->number;
  problem_at(fields, name, "it should be a finite number");
  return 0;
}

static size_t characters(const char *text, size_t bytes) {
  size_t count = 0;
  for (size_t i = 0; i < bytes; i++) count += ((unsigned char)text[i] & 0xC0) != 0x80;
  return count;
}

static const char *text_of(Fields *fields, const char *name, const JsonValue *value, size_t least_chars,
                           size_t most_chars) {
  if (value->kind != JSON_STRING) {
    problem_at(fields, name, "it should be a string");
    return "";
  }
  size_t count = characters(value->text.data, value->text.length);
  if (count < least_chars || count > most_chars)
    problem_at(fields, name, "it should have %zu to %zu characters", least_chars, most_chars);
  else if (strlen(value->text.data) != value->text.length)
    problem_at(fields, name, "it holds the character U+0000");
  return fields->code == STI_OK ? value->text.data : "";
}

const char *field_text(Fields *fields, const char *name, size_t least_chars, size_t most_chars) {
  const JsonValue *value = field_value(fields, name);
  return value == NULL ? "" : text_of(fields, name, value, least_chars, most_chars);
}

const char *field_digest(Fields *fields, const char *name) {
  const JsonValue *value = field_value(fields, name);
  if (value == NULL) return "";
  if (value->kind == JSON_STRING && value->text.length == 64 && is_digest(value->text.data)) return value->text.data;
  problem_at(fields, name, "it should be a SHA-256: 64 lower-case hexadecimal digits");
  return "";
}

int field_choice(Fields *fields, const char *name, const char *const *choices) {
  const char *text = field_text(fields, name, 0, SIZE_MAX);
  if (fields->code != STI_OK) return 0;
  char known[300] = "";
  for (int i = 0; choices[i] != NULL; i++) {
    if (strcmp(text, choices[i]) == 0) return i;
    size_t used = strlen(known);
    snprintf(known + used, sizeof known - used, "%s%s", i == 0 ? "" : ", ", choices[i]);
  }
  problem_at(fields, name, "it should be one of: %s", known);
  return 0;
}

int64_t field_literal(Fields *fields, const char *name, const int *allowed, int count) {
  JsonValue *value = find_needed(fields, name);
  if (value == NULL) return 0;
  double number = value->kind == JSON_INT      ? (double)value->integer
                  : value->kind == JSON_DOUBLE ? value->number
                  : value->kind == JSON_BOOL   ? value->boolean
                                               : NAN;
  char known[100] = "";
  for (int i = 0; i < count; i++) {
    if (number == allowed[i]) {
      value->kind = JSON_INT;
      return value->integer = allowed[i];
    }
    size_t used = strlen(known);
    snprintf(known + used, sizeof known - used, "%s%d", i == 0 ? "" : ", ", allowed[i]);
  }
  problem_at(fields, name, count == 1 ? "it should be %s" : "it should be one of: %s", known);
  return 0;
}

static const JsonValue *member_named(const JsonValue *object, const char *name) {
  for (size_t i = 0; i < object->object.count; i++)
    if (strcmp(object->object.members[i].key, name) == 0) return object->object.members[i].value;
  return NULL;
}

/* The version that an object of this format states, 0 for one of another format or without a version. */
static int64_t stated_version(const JsonValue *object, const char *wanted) {
  if (object == NULL || object->kind != JSON_OBJECT) return 0;
  const JsonValue *format = member_named(object, "format"), *version = member_named(object, "version");
  bool ours = format != NULL && format->kind == JSON_STRING && strcmp(format->text.data, wanted) == 0;
  return ours && version != NULL && version->kind == JSON_INT ? version->integer : 0;
}

void fields_begin_stored(Fields *fields, const JsonValue *object, const StoredFormat *stored, const char *source,
                         const char *path, StiError *error) {
  int64_t version = stated_version(object, stored->format);
  fields_begin(fields, object, source, stored->what, path, error);
  if (version > stored->version)
    fields->code = sti_fail(error, stored->newer, "Update the agent on the device, or make it again with this version.",
                            "%s: %s version %lld, this agent knows %d.", source, stored->format + strlen("stifarm-"),
                            (long long)version, stored->version);
  field_choice(fields, "format", (const char *const[]){stored->format, NULL});
  if (stored->exact) field_int(fields, "version", stored->version, stored->version);
  else field_literal(fields, "version", &stored->version, 1);
}

static const JsonValue *field_of_kind(Fields *fields, const char *name, const JsonValue *empty) {
  const JsonValue *value = field_value(fields, name);
  if (value == NULL) return empty;
  if (value->kind == empty->kind) return value;
  problem_at(fields, name, empty->kind == JSON_ARRAY ? "it should be an array" : "it should be an object");
  return empty;
}

const JsonValue *field_array(Fields *fields, const char *name, size_t least, size_t most) {
  const JsonValue *value = field_of_kind(fields, name, &empty_array);
  if (fields->code != STI_OK || (value->array.count >= least && value->array.count <= most)) return value;
  problem_at(fields, name, "it should have %zu to %zu items, not %zu", least, most, value->array.count);
  return &empty_array;
}

/* "kept.3", for messages. */
typedef struct { char text[64]; } ItemName;

static ItemName item_name(const char *name, size_t index) {
  ItemName item;
  snprintf(item.text, sizeof item.text, "%s.%zu", name, index);
  return item;
}

int64_t field_item_int(Fields *fields, const char *name, const JsonValue *array, size_t index, int64_t least,
                       int64_t most) {
  const JsonValue *value = &array->array.items[index];
  if (fields->code != STI_OK) return 0;
  if (value->kind == JSON_INT && value->integer >= least && value->integer <= most) return value->integer;
  return int_of(fields, item_name(name, index).text, value, least, most);
}

const char *field_item_text(Fields *fields, const char *name, const JsonValue *array, size_t index) {
  if (fields->code != STI_OK) return "";
  return text_of(fields, item_name(name, index).text, &array->array.items[index], 0, SIZE_MAX);
}

const JsonValue *field_object(Fields *fields, const char *name) { return field_of_kind(fields, name, &empty_object); }
