/* job_records.c: see job_records.h. */
#include "job_records.h"

#include <inttypes.h>

#include "agent_log.h"
#include "sensors.h"

/* "settings": what was reported of them; NULL: nothing. */
static void write_settings(Text *payload, const Text *reports) {
  json_key(payload, "settings");
  if (reports == NULL) json_open(payload, '['), json_close(payload, ']');
  else text_append(payload, reports->data, reports->length);
}

StiCode append_end(Journal *journal, const char *refused, const Text *settings, StiError *error) {
  Text payload = {0};
  json_open(&payload, '{');
  json_int_field(&payload, "done", journal->state.done.count);
  json_int_field(&payload, "failed", journal->state.failed.count);
  json_key(&payload, "refused");
  if (refused != NULL)
    json_text(&payload, refused);
  else
    json_null(&payload);
  write_settings(&payload, settings);
  json_text_field(&payload, "type", "end");
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}

static void write_lease(Text *out, const Lease *lease) {
  json_open(out, '{');
  json_int_field(out, "counter", lease->counter);
  json_text_field(out, "store", lease->store);
  json_bool_field(out, "takeover", lease->takeover);
  json_close(out, '}');
}

StiCode append_start(Journal *journal, const Job *job, const Spool *spool, int64_t first_unit, const Text *settings,
                     StiError *error) {
  char mark[EMULATED_ID_TEXT];
  Sensors sensors;
  Text payload = {0};
  STI_TRY(emulated_id(spool, mark, error));
  sensors_read(spool->root, &sensors);
  json_open(&payload, '{');
  json_text_field(&payload, "agent", agent_version());
  json_text_field(&payload, "agent_digest", agent_digest());
  json_int_field(&payload, "attempt", job->attempt);
  json_bool_field(&payload, "emulated", job->emulated || mark[0]);
  json_int_field(&payload, "first_unit", first_unit);
  json_text_field(&payload, "job", job->id);
  json_key(&payload, "lease"), write_lease(&payload, &job->lease);
  json_int_field(&payload, "protocol", PROTOCOL_VERSION);
  json_key(&payload, "sensors"), sensors_write(&payload, &sensors);
  write_settings(&payload, settings);
  json_text_field(&payload, "type", "start");
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}

StiCode append_result(Journal *journal, const Unit *unit, const Text *result, StiError *error) {
  Text payload = {0};
  json_open(&payload, '{');
  json_key(&payload, "result"), text_append(&payload, result->data, result->length);
  json_text_field(&payload, "type", "result");
  json_int_field(&payload, "unit", unit->number);
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}

StiCode append_failure(Journal *journal, const Unit *unit, const StiError *failure, StiError *error) {
  Text payload = {0};
  const char *name = sti_error_name(failure->code);
  log_error("Unit %" PRId64 " (%s) failed: %s: %s %s", unit->number, unit_kind_names[unit->kind], name, failure->what,
            failure->remedy);
  json_open(&payload, '{');
  json_text_field(&payload, "error", name);
  json_text_field(&payload, "remedy", failure->remedy);
  json_text_field(&payload, "type", "failure");
  json_int_field(&payload, "unit", unit->number);
  json_text_field(&payload, "what", failure->what);
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}
