/* job.c: the job file, read and written (sti_runtime/messages.py; docs/job-and-journal.md, section 2). */
#include "job.h"

#include "../../sti_runtime/native/records.h"
#include "../../sti_runtime/native/threads.h"

#include <string.h>

enum { MOST_UNITS = 100000, MOST_SHARE_MILLI = 1000000 };

const char *const unit_kind_names[] = {"probe",   "profile-io", "profile-compute", "profile-fixed",
                                       "execute", "evaluate",   NULL};
const char *const engine_names[] = {"torch", "native", "native-int8", NULL};

/* From MECHANISM_CGROUP_V1 on. */
static const char *const mechanism_names[] = {"cgroup-v1",     "cgroup-v2",     "agent",
                                              "lab-cgroup-v1", "lab-cgroup-v2", NULL};
static const char *const request_kind_names[] = {"spawn-cold", "cold", "warm", "cached", NULL};
static const char *const io_mode_names[] = {"direct", "buffered", NULL};

bool unit_is_timed(UnitKind kind) { return kind != UNIT_EVALUATE; }

/* ------------------------------------------------------------------ reading: units */

static void parse_unit_kind(Fields *fields, Arena *arena, Unit *unit) {
  switch (unit->kind) {
    case UNIT_PROBE: break;
    case UNIT_PROFILE_IO:
      field_ints(fields, arena, "fidelities", 0, 1, INT_MOST, &unit->fidelities, &unit->fidelity_count);
      unit->repeats = field_int(fields, "repeats", 1, INT_MOST);
      unit->seed = field_int(fields, "seed", 0, INT_MOST);
      field_ints(fields, arena, "widths", 0, 1, INT_MOST, &unit->widths, &unit->width_count);
      break;
    case UNIT_PROFILE_COMPUTE:
      field_ints(fields, arena, "fidelities", 0, 1, INT_MOST, &unit->fidelities, &unit->fidelity_count);
      unit->repeats = field_int(fields, "repeats", 1, INT_MOST);
      unit->warmups = field_int(fields, "warmups", 0, INT_MOST);
      unit->width_count = 1;
      unit->widths = new_array(arena, 1, sizeof *unit->widths);
      if (unit->widths == NULL) fields_out_of_memory(fields);
      else unit->widths[0] = field_int(fields, "width", 1, INT_MOST);
      break;
    case UNIT_PROFILE_FIXED:
      field_ints(fields, arena, "rows", 0, 0, INT_MOST, &unit->rows, &unit->row_count);
      unit->warmups = field_int(fields, "warmups", 0, INT_MOST);
      break;
    case UNIT_EXECUTE:
      unit->io_mode = (IoMode)field_choice(fields, "io_mode", io_mode_names);
      unit->request_kind = (RequestKind)field_choice(fields, "request_kind", request_kind_names);
      field_ints(fields, arena, "rows", 1, 0, INT_MOST, &unit->rows, &unit->row_count);
      unit->warmups = field_int(fields, "warmups", 0, INT_MOST);
      break;
    case UNIT_EVALUATE: unit->batch = field_int(fields, "batch", 1, INT_MOST); break;
  }
}

static StiCode parse_unit(Arena *arena, const JsonValue *value, const char *source, size_t index, Unit *unit,
                          StiError *error) {
  Fields fields;
  fields_begin_item(&fields, value, source, "Job", "units", (int64_t)index, error);
  unit->kind = (UnitKind)field_choice(&fields, "kind", unit_kind_names);
  STI_TRY(fields.code);
  parse_unit_kind(&fields, arena, unit);
  unit->number = field_int(&fields, "number", 0, INT_MOST);
  bool planned = unit->kind == UNIT_EXECUTE || unit->kind == UNIT_EVALUATE;
  const JsonValue *plan = planned ? field_value(&fields, "plan") : NULL;
  STI_TRY(fields_end(&fields));
  if (unit->number != (int64_t)index) fields_problem(&fields, "units must be numbered 0, 1, 2, …");
  STI_TRY(fields.code);
  if (!planned) return STI_OK;
  char path[PATH_ROOM];
  snprintf(path, sizeof path, "units.%zu.plan", index);
  return plan_parse(arena, plan, source, path, &unit->plan, error);
}

/* ------------------------------------------------------------------ reading: the job */

static StiCode parse_lease(const JsonValue *value, const char *source, Lease *lease, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Job", "lease", error);
  lease->counter = field_int(&fields, "counter", 0, INT_MOST);
  lease->store = field_text(&fields, "store", 1, 64);
  lease->takeover = field_bool(&fields, "takeover");
  return fields_end(&fields);
}

static Mechanism field_mechanism(Fields *fields, const char *name) {
  if (field_is_null(fields, name)) return MECHANISM_NONE;
  return (Mechanism)(MECHANISM_CGROUP_V1 + field_choice(fields, name, mechanism_names));
}

static StiCode parse_emulation(const JsonValue *value, const char *source, Emulation *emulation, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Job", "emulation", error);
  emulation->cpu_mechanism = field_mechanism(&fields, "cpu_mechanism");
  if (!field_is_null(&fields, "cpu_share_milli"))
    emulation->cpu_share_milli = field_int(&fields, "cpu_share_milli", 1, MOST_SHARE_MILLI);
  if (!field_is_null(&fields, "io_bytes_per_s"))
    emulation->io_bytes_per_s = field_int(&fields, "io_bytes_per_s", 1, INT_MOST);
  emulation->io_mechanism = field_mechanism(&fields, "io_mechanism");
  return fields_end(&fields);
}

static int64_t field_limit(Fields *fields, const char *name, bool *asked) {
  *asked = !field_is_null(fields, name);
  return *asked ? field_int(fields, name, INT64_MIN, INT_MOST) : 0;
}

/* [a-z][a-z0-9_-]{0,31} */
static const char *field_governor(Fields *fields) {
  const char *name = field_text(fields, "governor", 1, 32);
  if (fields->code == STI_OK &&
      (name[0] < 'a' || name[0] > 'z' || name[strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_-")] != '\0'))
    fields_problem(fields, "governor should hold a-z, 0-9, '_' and '-', and begin with a letter");
  return name;
}

/* A frequency that may be missing. */
static int64_t field_khz(Fields *fields, const char *name, bool *asked) {
  *asked = field_is_given(fields, name) && !field_is_null(fields, name);
  return *asked ? field_int(fields, name, 0, INT_MOST) : 0;
}

static StiCode parse_gates(const JsonValue *value, const char *source, Gates *gates, StiError *error) {
  Fields fields;
  fields_begin(&fields, value, source, "Job", "gates", error);
  if (field_is_given(&fields, "governor") && !field_is_null(&fields, "governor"))
    gates->governor = field_governor(&fields);
  gates->max_khz = field_khz(&fields, "max_khz", &gates->has_max_khz);
  gates->max_load_milli = field_limit(&fields, "max_load_milli", &gates->has_load);
  gates->max_temperature_milli_c = field_limit(&fields, "max_temperature_milli_c", &gates->has_temperature);
  gates->min_battery_percent = field_limit(&fields, "min_battery_percent", &gates->has_battery);
  gates->min_free_bytes = field_limit(&fields, "min_free_bytes", &gates->has_free);
  gates->min_khz = field_khz(&fields, "min_khz", &gates->has_min_khz);
  gates->wait_limit_s = field_int(&fields, "wait_limit_s", 0, INT_MOST);
  return fields_end(&fields);
}

/* [a-z0-9][a-z0-9-]{0,63} */
static const char *field_job_id(Fields *fields) {
  const char *id = field_text(fields, "id", 1, 64);
  if (fields->code == STI_OK && (id[0] == '-' || id[strspn(id, "abcdefghijklmnopqrstuvwxyz0123456789-")] != '\0'))
    fields_problem(fields, "id should hold a-z, 0-9 and '-', and not begin with '-'");
  return id;
}

/* A job of a later version is refused as such. */
static const StoredFormat stored = {"Job", "stifarm-job", 1, false, STI_REFUSED};

/* The members that are parsed once all fields are known to be there. */
typedef struct {
  const JsonValue *emulation /* NULL for null */, *gates, *lease, *settings /* NULL: not given */, *units;
} Parts;

static StiCode parse_parts(Arena *arena, const Parts *parts, const char *source, Job *job, StiError *error) {
  STI_TRY(parse_lease(parts->lease, source, &job->lease, error));
  STI_TRY(parse_gates(parts->gates, source, &job->gates, error));
  job->emulated = parts->emulation != NULL;
  if (job->emulated) STI_TRY(parse_emulation(parts->emulation, source, &job->emulation, error));
  if (parts->settings != NULL) STI_TRY(settings_parse(arena, parts->settings, source, job, error));
  job->unit_count = (int32_t)parts->units->array.count;
  job->units = new_array(arena, parts->units->array.count, sizeof *job->units);
  if (job->units == NULL) return sti_out_of_memory(error);
  for (int32_t i = 0; i < job->unit_count; i++)
    STI_TRY(parse_unit(arena, &parts->units->array.items[i], source, (size_t)i, &job->units[i], error));
  return STI_OK;
}

StiCode job_parse(Arena *arena, const char *data, size_t length, const char *source, Job *job, StiError *error) {
  JsonValue *value;
  bool canonical;
  STI_TRY(record_parse(arena, data, length, JOB_CAP_BYTES, source, "Job", &value, &canonical, error));
  *job = (Job){0};
  Fields fields;
  Parts parts = {0};
  fields_begin_stored(&fields, value, &stored, source, "", error);
  job->attempt = field_int(&fields, "attempt", 1, INT_MOST);
  field_copy_digest_or_null(&fields, "bundle", job->bundle);
  field_small_ints(&fields, arena, "cpus", 0, 0, CPU_NUMBERS - 1, &job->cpus, &job->cpu_count);
  job->device = field_text(&fields, "device", 1, 200);
  if (!field_is_null(&fields, "emulation")) parts.emulation = field_value(&fields, "emulation");
  job->engine = (EngineName)field_choice(&fields, "engine", engine_names);
  parts.gates = field_value(&fields, "gates");
  job->id = field_job_id(&fields);
  parts.lease = field_value(&fields, "lease");
  if (!field_is_null(&fields, "machine_lock")) job->machine_lock = field_text(&fields, "machine_lock", 0, SIZE_MAX);
  job->queue_depth = field_int(&fields, "queue_depth", 1, JOB_THREAD_CAP);
  if (field_is_given(&fields, "settings")) parts.settings = field_array(&fields, "settings", 0, SETTINGS_MOST);
  field_copy_digest_or_null(&fields, "task_data", job->task_data);
  job->threads = field_int(&fields, "threads", 1, JOB_THREAD_CAP);
  parts.units = field_array(&fields, "units", 1, MOST_UNITS);
  STI_TRY(fields_end(&fields));
  return parse_parts(arena, &parts, source, job, error);
}

/* ------------------------------------------------------------------ writing */

static void write_ints(Text *out, const char *key, const int64_t *items, int32_t count) {
  json_key(out, key);
  json_open(out, '[');
  for (int32_t i = 0; i < count; i++) json_int(out, items[i]);
  json_close(out, ']');
}

static void write_text_or_null(Text *out, const char *key, const char *text) {
  json_key(out, key);
  if (text == NULL) json_null(out);
  else json_text(out, text);
}

static void write_int_or_null(Text *out, const char *key, bool has, int64_t value) {
  json_key(out, key);
  if (has) json_int(out, value);
  else json_null(out);
}

static void write_unit(Text *out, const Unit *unit) {
  const UnitKind kind = unit->kind;
  bool executes = kind == UNIT_EXECUTE, profiles_io = kind == UNIT_PROFILE_IO, computes = kind == UNIT_PROFILE_COMPUTE;
  json_open(out, '{');
  if (kind == UNIT_EVALUATE) json_int_field(out, "batch", unit->batch);
  if (profiles_io || computes) write_ints(out, "fidelities", unit->fidelities, unit->fidelity_count);
  if (executes) json_text_field(out, "io_mode", io_mode_names[unit->io_mode]);
  json_text_field(out, "kind", unit_kind_names[kind]);
  json_int_field(out, "number", unit->number);
  if (executes || kind == UNIT_EVALUATE) {
    json_key(out, "plan");
    plan_write(out, &unit->plan);
  }
  if (profiles_io || computes) json_int_field(out, "repeats", unit->repeats);
  if (executes) json_text_field(out, "request_kind", request_kind_names[unit->request_kind]);
  if (executes || kind == UNIT_PROFILE_FIXED) write_ints(out, "rows", unit->rows, unit->row_count);
  if (profiles_io) json_int_field(out, "seed", unit->seed);
  if (computes || executes || kind == UNIT_PROFILE_FIXED) json_int_field(out, "warmups", unit->warmups);
  if (computes) json_int_field(out, "width", unit->widths[0]);
  if (profiles_io) write_ints(out, "widths", unit->widths, unit->width_count);
  json_close(out, '}');
}

const char *mechanism_name(Mechanism mechanism) {
  return mechanism == MECHANISM_NONE ? NULL : mechanism_names[mechanism - MECHANISM_CGROUP_V1];
}

static void write_emulation(Text *out, const Emulation *emulation) {
  json_open(out, '{');
  write_text_or_null(out, "cpu_mechanism", mechanism_name(emulation->cpu_mechanism));
  write_int_or_null(out, "cpu_share_milli", emulation->cpu_share_milli != 0, emulation->cpu_share_milli);
  write_int_or_null(out, "io_bytes_per_s", emulation->io_bytes_per_s != 0, emulation->io_bytes_per_s);
  write_text_or_null(out, "io_mechanism", mechanism_name(emulation->io_mechanism));
  json_close(out, '}');
}

static void write_gates(Text *out, const Gates *gates) {
  json_open(out, '{');
  write_text_or_null(out, "governor", gates->governor);
  write_int_or_null(out, "max_khz", gates->has_max_khz, gates->max_khz);
  write_int_or_null(out, "max_load_milli", gates->has_load, gates->max_load_milli);
  write_int_or_null(out, "max_temperature_milli_c", gates->has_temperature, gates->max_temperature_milli_c);
  write_int_or_null(out, "min_battery_percent", gates->has_battery, gates->min_battery_percent);
  write_int_or_null(out, "min_free_bytes", gates->has_free, gates->min_free_bytes);
  write_int_or_null(out, "min_khz", gates->has_min_khz, gates->min_khz);
  json_int_field(out, "wait_limit_s", gates->wait_limit_s);
  json_close(out, '}');
}

static void write_lease(Text *out, const Lease *lease) {
  json_open(out, '{');
  json_int_field(out, "counter", lease->counter);
  json_text_field(out, "store", lease->store);
  json_bool_field(out, "takeover", lease->takeover);
  json_close(out, '}');
}

void job_write(Text *out, const Job *job) {
  json_open(out, '{');
  json_int_field(out, "attempt", job->attempt);
  write_text_or_null(out, "bundle", job->bundle[0] == '\0' ? NULL : job->bundle);
  json_key(out, "cpus");
  json_open(out, '[');
  for (int32_t i = 0; i < job->cpu_count; i++) json_int(out, job->cpus[i]);
  json_close(out, ']');
  json_text_field(out, "device", job->device);
  json_key(out, "emulation");
  if (job->emulated) write_emulation(out, &job->emulation);
  else json_null(out);
  json_text_field(out, "engine", engine_names[job->engine]);
  json_text_field(out, "format", stored.format);
  json_key(out, "gates");
  write_gates(out, &job->gates);
  json_text_field(out, "id", job->id);
  json_key(out, "lease");
  write_lease(out, &job->lease);
  write_text_or_null(out, "machine_lock", job->machine_lock);
  json_int_field(out, "queue_depth", job->queue_depth);
  settings_write(out, job);
  write_text_or_null(out, "task_data", job->task_data[0] == '\0' ? NULL : job->task_data);
  json_int_field(out, "threads", job->threads);
  json_key(out, "units");
  json_open(out, '[');
  for (int32_t i = 0; i < job->unit_count; i++) write_unit(out, &job->units[i]);
  json_close(out, ']');
  json_int_field(out, "version", stored.version);
  json_close(out, '}');
}
