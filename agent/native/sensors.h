/* sensors.h: what can be read without root, and the gates on it (agent/sensors.py, agent/gates.py). */
#ifndef AGENT_SENSORS_H
#define AGENT_SENSORS_H

#include "job.h"
#include "kernel_files.h"

enum { SENSOR_CPUS = 1024, SENSOR_POLICIES = 16, SENSOR_STATES = 64, ZONE_NAME = 80 };

/* Time one clock domain has spent at each of its clocks since boot. */
typedef struct {
  int64_t cpu; /* the domain's first CPU */
  int64_t khz[SENSOR_STATES], ms[SENSOR_STATES];
  int count;
} ClockTimes;

/* Absent sensors have their has_ flag clear and are written as null. */
typedef struct {
  int64_t wall_ns;
  bool has_temperature, has_load, has_memory, has_free, has_battery, has_throttled;
  int64_t temperature_milli_c, load_milli, available_memory_bytes, free_bytes, battery_percent;
  bool throttled;
  int64_t cpu_khz[SENSOR_CPUS]; int cpu_count;
  ClockTimes time_in_state[SENSOR_POLICIES]; int policy_count;
} Sensors;

void sensors_read(const char *spool, Sensors *sensors);
void sensors_write(Text *out, const Sensors *sensors); /* canonical JSON */

/* ------------------------------------------------------------------ single sensors, for the facts too */

typedef struct { char name[ZONE_NAME]; bool has_temperature; int64_t temperature_milli_c; } Zone;
int thermal_zones(Zone *zones, int cap);                       /* zones that read nonsense have no temperature */
bool zone_temperature(const char *folder, int64_t *milli_c);   /* of one zone, by its folder's name */
bool plausible_milli_c(int64_t value, int64_t unit_milli_c);   /* of a reading; a zone without a sensor reads 0 */
int cpu_coolers(EntryName *coolers, int cap);                  /* folders of cooling devices that slow the CPU */
int parse_cpu_list(const char *text, int64_t *cpus, int cap);  /* "0-3,6"; 0 when malformed */
int online_cpus(int64_t *cpus, int cap);                       /* those of this process where the list is unreadable */
int cpu_clocks(const char *file, int64_t *khz, int cap);       /* a cpufreq file of each online CPU; 0 unless all read */
bool load_milli(int64_t *milli);                               /* one-minute load */
bool meminfo_bytes(const char *name, int64_t *bytes);
bool has_battery(void);                                        /* readable or not */
void write_ints(Text *out, const int64_t *values, int count);  /* JSON array */
void write_maybe(Text *out, const char *key, bool known, int64_t value); /* "key":value or null */

/* ------------------------------------------------------------------ gates */

typedef enum { GATE_PASS, GATE_FAIL, GATE_UNGATED } GateState;
typedef struct { const char *gate; GateState state; char detail[200]; } GateVerdict;
enum { GATE_COUNT = 5, GATE_CAUSES = GATE_COUNT * 240 };
#define GATE_POLL_NS INT64_C(2000000000) /* how long is waited before a gate that is shut is looked at again */

/* What the readings so far say of whether the temperature is stable; zero: nothing was read. */
typedef struct {
  bool known;                          /* milli_c, at_ns: the reading that the next is compared with, and its time */
  int64_t milli_c, at_ns;
  bool settled;                        /* stable */
  bool has_moved; int64_t was_milli_c; /* what it was before it last moved */
} Settling;

/* One more reading. What was read less than GATE_POLL_NS ago keeps its verdict unless the temperature has moved since,
 * so that units that follow each other need no pause of their own. */
void settling_add(Settling *settling, const Sensors *now, int64_t at_ns);
void settling_recent(Settling *settling, int64_t at_ns); /* a reading that is too old counts no more */

/* Verdicts on the limits that are asked for; settling includes `now`: the temperature must not only be low enough but
 * stable. cpus [cpu_count]: those used, 0: all this process may use. Returns their number. */
int gates_check(const Gates *gates, const Sensors *now, const Settling *settling, const int32_t *cpus, int cpu_count,
                GateVerdict verdicts[GATE_COUNT]);
bool gates_shut(const GateVerdict *verdicts, int count);
StiCode gates_error(const GateVerdict *verdicts, int count, double waited_s, const Gates *gates, StiError *error); /* STI_GATE */
void gates_causes(const GateVerdict *verdicts, int count, char causes[GATE_CAUSES]); /* which are shut, and why */
void gates_write(Text *out, const GateVerdict *verdicts, int count); /* canonical JSON array */

#endif
