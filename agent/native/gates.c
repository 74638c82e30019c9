/* gates.c: conditions checked before timed units. They fail closed.
 *
 * A gate that is asked and whose sensor cannot be read gives "ungated", never "pass": the unit runs and its result says
 * so. A gate that stays shut for the whole wait limit gives "fail", and the unit does not run.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clocks.h"

/* A device is stable when two readings at least GATE_POLL_NS apart differ by less than this. */
enum { SETTLED_MILLI_C = 500 };
#define KEPT_NS INT64_C(60000000000) /* an older reading says nothing when a unit's turn comes */

typedef struct {
  const char *name, *unit;
  bool asked, readable, upper; /* upper: the limit is one from above */
  int64_t limit, reading;
} Rule;

void settling_add(Settling *settling, const Sensors *now, int64_t at_ns) {
  if (!now->has_temperature) return;
  int64_t milli_c = now->temperature_milli_c;
  bool moved = settling->known && llabs(settling->milli_c - milli_c) >= SETTLED_MILLI_C;
  if (settling->known && !moved && at_ns - settling->at_ns < GATE_POLL_NS) return;
  *settling = (Settling){.known = true,
                         .milli_c = milli_c,
                         .at_ns = at_ns,
                         .settled = settling->known && !moved,
                         .has_moved = moved,
                         .was_milli_c = settling->milli_c};
}

void settling_recent(Settling *settling, int64_t at_ns) {
  if (at_ns - settling->at_ns > KEPT_NS) *settling = (Settling){0};
}

/* Appends why the temperature does not count as stable. */
static void describe_unsettled(const Settling *settling, const char *unit, char *end, size_t room) {
  if (settling->has_moved)
    snprintf(end, room, ", %s: was %" PRId64 "%s a moment ago",
             settling->milli_c > settling->was_milli_c ? "warming" : "cooling", settling->was_milli_c, unit);
  else
    snprintf(end, room, ", stable or not shows in %" PRId64 " s", GATE_POLL_NS / 1000000000);
}

static GateVerdict judge(const Rule *rule, const Settling *settling) {
  GateVerdict verdict = {.gate = rule->name};
  if (!rule->readable) {
    verdict.state = GATE_UNGATED;
    snprintf(verdict.detail, sizeof verdict.detail, "no %s sensor can be read; wanted %s %" PRId64 "%s", rule->name,
             rule->upper ? "<=" : ">=", rule->limit, rule->unit);
    return verdict;
  }
  bool open = rule->upper ? rule->reading <= rule->limit : rule->reading >= rule->limit;
  const char *relation = rule->upper ? (open ? "<=" : ">") : (open ? ">=" : "<");
  int length = snprintf(verdict.detail, sizeof verdict.detail, "%" PRId64 "%s %s %" PRId64 "%s", rule->reading, rule->unit,
                        relation, rule->limit, rule->unit);
  if (open && strcmp(rule->name, "temperature") == 0 && !settling->settled) {
    open = false;
    describe_unsettled(settling, rule->unit, verdict.detail + length, sizeof verdict.detail - (size_t)length);
  }
  verdict.state = open ? GATE_PASS : GATE_FAIL;
  return verdict;
}

int gates_check(const Gates *gates, const Sensors *now, const Settling *settling, const int32_t *cpus, int cpu_count,
                GateVerdict verdicts[GATE_COUNT]) {
  const Rule rules[] = {
      {"temperature", "m°C", gates->has_temperature, now->has_temperature, true, gates->max_temperature_milli_c,
       now->temperature_milli_c},
      {"battery", "%", gates->has_battery, now->has_battery, false, gates->min_battery_percent, now->battery_percent},
      {"load", "/1000", gates->has_load, now->has_load, true, gates->max_load_milli, now->load_milli},
      {"free-space", " bytes", gates->has_free, now->has_free, false, gates->min_free_bytes, now->free_bytes},
  };
  int count = 0;
  for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
    if (rules[i].asked) verdicts[count++] = judge(&rules[i], settling);
  if (clocks_asked(gates)) verdicts[count++] = clocks_judge(gates, cpus, cpu_count);
  return count;
}

bool gates_shut(const GateVerdict *verdicts, int count) {
  for (int i = 0; i < count; i++)
    if (verdicts[i].state == GATE_FAIL) return true;
  return false;
}

void gates_causes(const GateVerdict *verdicts, int count, char causes[GATE_CAUSES]) {
  causes[0] = '\0';
  for (int i = 0; i < count; i++) {
    size_t length = strlen(causes);
    if (verdicts[i].state == GATE_FAIL)
      snprintf(causes + length, GATE_CAUSES - length, "%s%s: %s", length ? "; " : "", verdicts[i].gate,
               verdicts[i].detail);
  }
}

StiCode gates_error(const GateVerdict *verdicts, int count, double waited_s, const Gates *gates, StiError *error) {
  char causes[GATE_CAUSES];
  gates_causes(verdicts, count, causes);
  return sti_fail(error, STI_GATE,
                  "Let the device cool, charge or become idle, set its clocks, or change its gates in the inventory.",
                  "Gates stayed shut for %.0f s (limit %" PRId64 " s): %s.", waited_s, gates->wait_limit_s, causes);
}

void gates_write(Text *out, const GateVerdict *verdicts, int count) {
  static const char *const states[] = {"pass", "fail", "ungated"};
  json_open(out, '[');
  for (int i = 0; i < count; i++) {
    json_open(out, '{');
    json_text_field(out, "detail", verdicts[i].detail);
    json_text_field(out, "gate", verdicts[i].gate);
    json_text_field(out, "verdict", states[verdicts[i].state]);
    json_close(out, '}');
  }
  json_close(out, ']');
}
