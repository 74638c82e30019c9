/* clocks.h: the clock domains of the CPUs that are used, and the gate on their governor and ceiling (agent/clocks.py).
 *
 * A ceiling is the highest clock that the kernel allows a domain now (scaling_max_freq): limits of the thermal and
 * power management, and switched-off boosts, arrive there, whatever the load.
 */
#ifndef AGENT_CLOCKS_H
#define AGENT_CLOCKS_H

#include "sensors.h"

enum { CLOCK_DOMAINS = SENSOR_POLICIES };

/* The first used CPU of each clock domain. cpus [cpu_count]: those used, 0: all this process may use. Returns their
 * number. */
int clock_domains(const int32_t *cpus, int cpu_count, int32_t found[CLOCK_DOMAINS]);
int64_t domain_khz(int32_t cpu, const char *file); /* a cpufreq file of a CPU; −1: not readable */
bool domain_governor(int32_t cpu, char governor[64]);

bool clocks_asked(const Gates *gates);
/* The gate `clocks`: it fails where one domain is not as asked, whatever cannot be read elsewhere. */
GateVerdict clocks_judge(const Gates *gates, const int32_t *cpus, int cpu_count);

#endif
