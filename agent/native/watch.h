/* watch.h: the cheap sensors between a unit's samples, and which samples they show to be throttled (agent/watch.py).
 *
 * A watch reads once when it begins and once after every sample, never while one is timed (reads beside compute
 * excepted).
 */
#ifndef AGENT_WATCH_H
#define AGENT_WATCH_H

#include "clocks.h"
#include "kernel_files.h"

enum { WATCHED_DOMAINS = CLOCK_DOMAINS, WATCHED_ZONES = 4, WATCHED_COOLERS = 16, CLOCK_TOLERANCE_PERCENT = 15 };

/* A clock domain's clock, and the highest that the kernel allows it; −1: not readable. */
typedef struct { int64_t clock, ceiling; } DomainKhz;

typedef struct Reading Reading;
struct Reading {
  int64_t after; /* samples taken before it */
  DomainKhz khz[WATCHED_DOMAINS];
  bool has_temperature, has_load, has_memory, has_throttled;
  int64_t temperature_milli_c, load_milli, available_memory_bytes;
  bool throttled;
  Reading *next; /* of those kept */
};

typedef struct {
  Arena *arena; /* what is kept lies there */
  int32_t cpus[WATCHED_DOMAINS]; int domain_count; /* the first used CPU of each clock domain */
  DomainKhz usual[WATCHED_DOMAINS];                /* when the watch began; −1: not judged */
  EntryName zones[WATCHED_ZONES]; int zone_count;  /* the hottest when the watch began */
  EntryName coolers[WATCHED_COOLERS]; int cooler_count;
  bool has_limit; int64_t limit_milli_c;
  Reading *first, *kept, last; /* kept: the newest of those kept */
  bool last_kept;              /* whether that is the last */
} Watch;

/* Takes the first reading. cpus [cpu_count]: those used, 0: all this process may use; limit of the temperature gate. */
StiCode watch_begin(Watch *watch, const int32_t *cpus, int cpu_count, const Gates *gates, Arena *arena, StiError *error);
/* Read again, `after` samples having been taken; *throttled: whether the sample since the last reading was. */
StiCode watch_sampled(Watch *watch, int64_t after, bool *throttled, StiError *error);
/* The first reading, the last, and those between that differ from the one kept before them: canonical JSON. */
void watch_write(Text *out, const Watch *watch);

#endif
