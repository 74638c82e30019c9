/* units.c: which measurement each kind of unit is. Nothing is written, logged or flushed inside a timed region;
 * journalling is the caller's.
 */
#include "units.h"

#include "unit_kinds.h"

static StiCode measure(Context *context, const Unit *unit, const GateVerdict *gates, int gate_count, Text *result,
                       StiError *error) {
  switch (unit->kind) {
    case UNIT_PROBE: return run_probe(context, result, error);
    case UNIT_PROFILE_IO:
    case UNIT_PROFILE_COMPUTE:
    case UNIT_PROFILE_FIXED: return run_profile(context, unit, result, error);
    case UNIT_EXECUTE: return run_execute(context, unit, gates, gate_count, result, error);
    case UNIT_EVALUATE: return run_evaluate(context, unit, result, error);
  }
  return sti_fail(error, STI_INTERNAL, "Report it with the agent's log.", "Unit kind %d is not known.", (int)unit->kind);
}

StiCode run_unit(Context *context, const Unit *unit, const GateVerdict *gates, int gate_count, Text *result,
                 StiError *error) {
  text_clear(result);
  STI_TRY(measure(context, unit, gates, gate_count, result, error));
  return result->failed ? sti_out_of_memory(error) : STI_OK;
}
