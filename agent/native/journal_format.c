/* journal_format.c: see journal_format.h. */
#include "journal_format.h"

#include <string.h>

enum { SEQ_DIGITS = 19, CRC_DIGITS = 8, HEAD_LEAST = 1 + 1 + CRC_DIGITS + 1 };

static const char *const record_types[] = {"end", "failure", "result", "start", NULL};

/* ------------------------------------------------------------------ lines */

static bool hex_value(const char *digits, uint32_t *value) {
  *value = 0;
  for (int i = 0; i < CRC_DIGITS; i++) {
    char c = digits[i];
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return false;
    *value = *value << 4 | (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
  }
  return true;
}

bool line_body(const char *line, size_t length, uint64_t *seq, const char **body, size_t *body_length) {
  size_t digits = 0;
  uint32_t crc;
  if (length < HEAD_LEAST || length >= LINE_CAP_BYTES) return false;
  *seq = 0;
  while (digits < SEQ_DIGITS && digits < length && line[digits] >= '0' && line[digits] <= '9')
    *seq = 10 * *seq + (uint64_t)(line[digits++] - '0'); /* 19 digits fit */
  if (digits == 0 || (line[0] == '0' && digits > 1) || length < digits + HEAD_LEAST - 1) return false;
  const char *rest = line + digits;
  if (rest[0] != ' ' || !hex_value(rest + 1, &crc) || rest[1 + CRC_DIGITS] != ' ') return false;
  *body = rest + HEAD_LEAST - 1;
  *body_length = length - digits - (HEAD_LEAST - 1);
  return crc32_of(*body, *body_length) == crc;
}

/* ------------------------------------------------------------------ records */

/* Any string: it may hold what no name may, the character U+0000 too. */
static const char *field_words(Fields *fields, const char *name) {
  const JsonValue *value = field_value(fields, name);
  if (value == NULL) return "";
  if (value->kind == JSON_STRING) return value->text.data;
  fields_problem(fields, "%s: it should be a string", name);
  return "";
}

static void decode_lease(const JsonValue *value, Fields *record, Lease *lease) {
  Fields fields;
  if (record->code != STI_OK) return;
  fields_begin(&fields, value, record->source, record->what, "payload.lease", record->error);
  lease->counter = field_int(&fields, "counter", 0, INT64_MAX);
  lease->store = field_text(&fields, "store", 1, STORE_CHARS);
  lease->takeover = field_bool(&fields, "takeover");
  record->code = fields_end(&fields);
}

static void decode_start(Fields *fields, Record *record) {
  field_words(fields, "agent");
  field_digest(fields, "agent_digest");
  field_int(fields, "attempt", 1, INT64_MAX);
  field_bool(fields, "emulated");
  field_int(fields, "first_unit", 0, INT64_MAX);
  field_text(fields, "job", 1, 64);
  decode_lease(field_object(fields, "lease"), fields, &record->lease);
  field_int(fields, "protocol", 1, INT64_MAX);
  field_object(fields, "sensors");
  if (field_is_given(fields, "settings")) field_array(fields, "settings", 0, SETTING_REPORTS_MOST);
}

static void decode_result(Fields *fields, Record *record) {
  Fields result;
  const JsonValue *value = field_object(fields, "result");
  record->unit = field_int(fields, "unit", 0, UNIT_CAP - 1);
  if (fields->code != STI_OK) return;
  fields_begin(&result, value, fields->source, fields->what, "payload.result", fields->error);
  field_choice(&result, "kind", unit_kind_names);
  fields->code = result.code;
}

static void decode_failure(Fields *fields, Record *record) {
  field_words(fields, "error");
  field_words(fields, "remedy");
  record->unit = field_int(fields, "unit", 0, UNIT_CAP - 1);
  field_words(fields, "what");
}

static void decode_end(Fields *fields, Record *record) {
  field_int(fields, "done", 0, INT64_MAX);
  field_int(fields, "failed", 0, INT64_MAX);
  record->refused = field_is_null(fields, "refused") ? NULL : field_words(fields, "refused");
  if (field_is_given(fields, "settings")) field_array(fields, "settings", 0, SETTING_REPORTS_MOST);
}

static StiCode decode_payload(const JsonValue *value, const char *source, Record *record, StiError *error) {
  static void (*const decoders[])(Fields *, Record *) = {
      [RECORD_END] = decode_end,
      [RECORD_FAILURE] = decode_failure,
      [RECORD_RESULT] = decode_result,
      [RECORD_START] = decode_start,
  };
  Fields fields;
  fields_begin(&fields, value, source, "JournalRecord", "payload", error);
  record->type = (RecordType)field_choice(&fields, "type", record_types);
  if (fields.code == STI_OK) decoders[record->type](&fields, record);
  return fields_end(&fields);
}

StiCode record_decode(Arena *arena, const char *body, size_t length, const char *source, Record *record,
                      StiError *error) {
  JsonValue *value;
  Fields fields;
  *record = (Record){0};
  STI_TRY(json_parse(arena, body, length, source, &value, error));
  fields_begin(&fields, value, source, "JournalRecord", "", error);
  field_text(&fields, "boot_id", 1, 64);
  const JsonValue *payload = field_object(&fields, "payload");
  record->seq = field_int(&fields, "seq", 0, INT64_MAX);
  field_int(&fields, "wall_ns", 0, INT64_MAX);
  STI_TRY(fields_end(&fields));
  return decode_payload(payload, source, record, error);
}
