/* job_records.c: see job_records.h. */
#include "job_records.h"

#include <inttypes.h>

#include "agent_log.h"
#include "sensors.h"

StiCode append_end(Journal *journal, const char *refused, StiError *error) {
  Text payload = {0};
  json_open(&payload, '{');
  json_key(&payload, "done"), json_int(&payload, journal->state.done.count);
  json_key(&payload, "failed"), json_int(&payload, journal->state.failed.count);
  json_key(&payload, "refused");
  if (refused != NULL)
    json_text(&payload, refused);
  else
    json_null(&payload);
  json_key(&payload, "type"), json_text(&payload, "end");
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}

static void write_lease(Text *out, const Lease *lease) {
  json_open(out, '{');
  json_key(out, "counter"), json_int(out, lease->counter);
  json_key(out, "store"), json_text(out, lease->store);
  json_key(out, "takeover"), json_bool(out, lease->takeover);
  json_close(out, '}');
}

StiCode append_start(Journal *journal, const Job *job, const Spool *spool, int64_t first_unit, StiError *error) {
  char mark[EMULATED_ID_TEXT];
  Sensors sensors;
  Text payload = {0};
  STI_TRY(emulated_id(spool, mark, error));
  sensors_read(spool->root, &sensors);
  json_open(&payload, '{');
  json_key(&payload, "agent"), json_text(&payload, agent_version());
  json_key(&payload, "agent_digest"), json_text(&payload, agent_digest());
  json_key(&payload, "attempt"), json_int(&payload, job->attempt);
  json_key(&payload, "emulated"), json_bool(&payload, job->emulated || mark[0]);
  json_key(&payload, "first_unit"), json_int(&payload, first_unit);
  json_key(&payload, "job"), json_text(&payload, job->id);
  json_key(&payload, "lease"), write_lease(&payload, &job->lease);
  json_key(&payload, "protocol"), json_int(&payload, PROTOCOL_VERSION);
  json_key(&payload, "sensors"), sensors_write(&payload, &sensors);
  json_key(&payload, "type"), json_text(&payload, "start");
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}

StiCode append_result(Journal *journal, const Unit *unit, const Text *result, StiError *error) {
  Text payload = {0};
  json_open(&payload, '{');
  json_key(&payload, "result"), text_append(&payload, result->data, result->length);
  json_key(&payload, "type"), json_text(&payload, "result");
  json_key(&payload, "unit"), json_int(&payload, unit->number);
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
  json_key(&payload, "error"), json_text(&payload, name);
  json_key(&payload, "remedy"), json_text(&payload, failure->remedy);
  json_key(&payload, "type"), json_text(&payload, "failure");
  json_key(&payload, "unit"), json_int(&payload, unit->number);
  json_key(&payload, "what"), json_text(&payload, failure->what);
  json_close(&payload, '}');
  StiCode code = journal_append(journal, &payload, error);
  text_free(&payload);
  return code;
}
