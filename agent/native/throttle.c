/* throttle.c: reads are paced as by one device of the stated rate that never saves up for a burst. After a section of
 * compute the caller sleeps until a CPU of the stated share would have done the same work; a share above 1000 is more
 * than one CPU's worth and limits the sum over threads.
 */
#include "throttle.h"

#include <math.h>
#include <time.h>

enum { SPIN_NS = 100000 }; /* the last part of a wait is spun: a sleep may end this late (timer slack is 50 µs) */
static const int64_t ns_per_s = 1000000000;

/* ------------------------------------------------------------------ clocks */

static int64_t clock_ns(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (int64_t)now.tv_sec * ns_per_s + now.tv_nsec;
}

int64_t process_cpu_ns(void) { return clock_ns(CLOCK_PROCESS_CPUTIME_ID); }
int64_t thread_cpu_ns(void) { return clock_ns(CLOCK_THREAD_CPUTIME_ID); }

void sleep_until(int64_t deadline_ns) {
  int64_t early_ns = deadline_ns - SPIN_NS;
  struct timespec until = {.tv_sec = (time_t)(early_ns / ns_per_s), .tv_nsec = (long)(early_ns % ns_per_s)};
  while (monotonic_ns() < early_ns) clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
  while (monotonic_ns() < deadline_ns) {
  }
}

/* ------------------------------------------------------------------ accounting */

int64_t read_due_ns(AgentThrottle *device, int64_t started_ns, int64_t bytes) {
  int64_t rate = device->io_bytes_per_s;
  int64_t takes_ns = bytes <= INT64_MAX / 2 / ns_per_s && rate <= INT64_MAX / 2
                         ? (bytes * ns_per_s + rate - 1) / rate
                         : (int64_t)ceil((double)bytes * (double)ns_per_s / (double)rate);
  pthread_mutex_lock(&device->lock);
  int64_t start_ns = started_ns > device->free_ns ? started_ns : device->free_ns;
  int64_t due_ns = device->free_ns = start_ns + takes_ns;
  pthread_mutex_unlock(&device->lock);
  return due_ns;
}

int64_t owed_sleep_ns(int64_t cpu_ns, int64_t wall_duration_ns, int64_t share_milli) {
  int64_t owed_ns = cpu_ns * 1000 / share_milli - wall_duration_ns;
  return owed_ns > 0 ? owed_ns : 0;
}

/* ------------------------------------------------------------------ as the executor calls it */

static void after_read(void *state, int64_t started_ns, int64_t bytes) {
  sleep_until(read_due_ns(state, started_ns, bytes));
}

static int64_t begin_section(void *state) {
  (void)state;
  return process_cpu_ns();
}

static void end_section(void *state, int64_t begun_cpu_ns, int64_t begun_ns) {
  const AgentThrottle *device = state;
  int64_t cpu_ns = process_cpu_ns() - begun_cpu_ns, now_ns = monotonic_ns();
  sleep_until(now_ns + owed_sleep_ns(cpu_ns, now_ns - begun_ns, device->cpu_share_milli));
}

void throttle_open(AgentThrottle *device, const Job *job) {
  const Emulation *emulation = &job->emulation;
  *device = (AgentThrottle){0};
  pthread_mutex_init(&device->lock, NULL);
  if (!job->emulated) return;
  if (emulation->io_mechanism == MECHANISM_AGENT) device->io_bytes_per_s = emulation->io_bytes_per_s;
  if (emulation->cpu_mechanism == MECHANISM_AGENT) device->cpu_share_milli = emulation->cpu_share_milli;
}

void throttle_close(AgentThrottle *device) { pthread_mutex_destroy(&device->lock); }

Throttle throttle_for(AgentThrottle *device) {
  Throttle throttle = {.state = device};
  if (device->io_bytes_per_s > 0) throttle.after_read = after_read;
  if (device->cpu_share_milli > 0) {
    throttle.section_begin = begin_section;
    throttle.section_end = end_section;
  }
  return throttle;
}

void throttled_read(const Throttle *throttle, int64_t started_ns, int64_t bytes) {
  if (throttle->after_read != NULL) throttle->after_read(throttle->state, started_ns, bytes);
}

Section section_begin(const Throttle *throttle) {
  Section section = {.begun_ns = monotonic_ns()};
  if (throttle->section_begin != NULL) section.begun_cpu_ns = throttle->section_begin(throttle->state);
  return section;
}

void section_end(const Throttle *throttle, Section section) {
  if (throttle->section_end != NULL) throttle->section_end(throttle->state, section.begun_cpu_ns, section.begun_ns);
}
