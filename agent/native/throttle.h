/* throttle.h: slowing an emulated device inside the agent: the labelled fallback where cgroups are not allowed. */
#ifndef AGENT_THROTTLE_H
#define AGENT_THROTTLE_H

#include <pthread.h>

#include "job.h"

/* One emulated device; concurrent reads queue up behind each other. Must not move while in use. */
typedef struct {
  int64_t io_bytes_per_s;  /* 0: not limited */
  int64_t cpu_share_milli; /* 0: not limited */
  pthread_mutex_t lock;    /* guards free_ns */
  int64_t free_ns;         /* when the device has delivered all reads issued so far */
} AgentThrottle;

/* The throttle a job asks for: only what mechanism "agent" limits, the kernel's cgroups do the rest. */
void throttle_open(AgentThrottle *device, const Job *job);
void throttle_close(AgentThrottle *device);
Throttle throttle_for(AgentThrottle *device); /* for the executor; its members are NULL where nothing is limited */

/* Reads and sections of compute through a throttle, limited or not. */
void throttled_read(const Throttle *throttle, int64_t started_ns, int64_t bytes);
typedef struct { int64_t begun_cpu_ns, begun_ns; } Section;
Section section_begin(const Throttle *throttle);
void section_end(const Throttle *throttle, Section section);

/* Return at `deadline_ns` of CLOCK_MONOTONIC, or at once if it has passed. */
void sleep_until(int64_t deadline_ns);
int64_t process_cpu_ns(void); /* of all threads */
int64_t thread_cpu_ns(void);

/* When a read issued at `started_ns` ends; the device is busy until then. Idle time earns nothing. */
int64_t read_due_ns(AgentThrottle *device, int64_t started_ns, int64_t bytes);
/* How much longer a section of `cpu_ns` CPU time, all threads, takes at `share_milli` than it did. */
int64_t owed_sleep_ns(int64_t cpu_ns, int64_t wall_duration_ns, int64_t share_milli);

#endif
