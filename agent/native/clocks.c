/* clocks.c: see clocks.h. */
#include "clocks.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "../../sti_runtime/native/threads.h"

enum { MOST_KHZ = 2000000000 };

/* CPUs of one clock domain share one cpufreq folder. */
int clock_domains(const int32_t *cpus, int cpu_count, int32_t found[CLOCK_DOMAINS]) {
  struct { dev_t dev; ino_t ino; } known[CLOCK_DOMAINS];
  int64_t allowed[CPU_NUMBERS];
  char folder[4096];
  struct stat status;
  int domains = 0, count = cpu_count > 0 ? cpu_count : cpus_allowed(allowed, CPU_NUMBERS);
  for (int i = 0; i < count && domains < CLOCK_DOMAINS; i++) {
    int32_t cpu = cpu_count > 0 ? cpus[i] : (int32_t)allowed[i];
    snprintf(folder, sizeof folder, "%s/devices/system/cpu/cpu%d/cpufreq", kernel_roots.sys, (int)cpu);
    if (stat(folder, &status) != 0) continue; /* a CPU without cpufreq */
    int at = 0;
    while (at < domains && (known[at].dev != status.st_dev || known[at].ino != status.st_ino)) at++;
    if (at < domains) continue;
    known[at].dev = status.st_dev;
    known[at].ino = status.st_ino;
    found[domains++] = cpu;
  }
  return domains;
}

int64_t domain_khz(int32_t cpu, const char *file) {
  int64_t khz;
  bool known = kernel_int(&khz, "%s/devices/system/cpu/cpu%d/cpufreq/%s", kernel_roots.sys, (int)cpu, file);
  return known && khz >= 0 && khz <= MOST_KHZ ? khz : -1;
}

bool domain_governor(int32_t cpu, char governor[64]) {
  return kernel_text(governor, 64, "%s/devices/system/cpu/cpu%d/cpufreq/scaling_governor", kernel_roots.sys, (int)cpu) &&
         governor[0] != '\0';
}

/* ------------------------------------------------------------------ the gate */

typedef struct {
  int32_t cpu;
  bool has_governor; char governor[64];
  int64_t ceiling_khz; /* −1: not readable */
} Domain;

static bool bounds_asked(const Gates *gates) { return gates->has_min_khz || gates->has_max_khz; }

bool clocks_asked(const Gates *gates) { return gates->governor != NULL || bounds_asked(gates); }

static void say(GateVerdict *verdict, GateState state, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void say(GateVerdict *verdict, GateState state, const char *format, ...) {
  va_list words;
  va_start(words, format);
  vsnprintf(verdict->detail, sizeof verdict->detail, format, words);
  va_end(words);
  verdict->state = state;
}

/* Whether a domain is not as asked; says so. */
static bool is_wrong(const Gates *gates, const Domain *domain, GateVerdict *verdict) {
  int cpu = (int)domain->cpu;
  int64_t khz = domain->ceiling_khz;
  if (gates->governor != NULL && domain->has_governor && strcmp(domain->governor, gates->governor) != 0)
    say(verdict, GATE_FAIL, "cpu%d: governor %s, wanted %s", cpu, domain->governor, gates->governor);
  else if (khz >= 0 && gates->has_min_khz && khz < gates->min_khz)
    say(verdict, GATE_FAIL, "cpu%d: its ceiling %" PRId64 "kHz < %" PRId64 "kHz", cpu, khz, gates->min_khz);
  else if (khz >= 0 && gates->has_max_khz && khz > gates->max_khz)
    say(verdict, GATE_FAIL, "cpu%d: its ceiling %" PRId64 "kHz > %" PRId64 "kHz", cpu, khz, gates->max_khz);
  else
    return false;
  return true;
}

/* Whether what is asked of a domain cannot be read; says so. */
static bool is_unreadable(const Gates *gates, const Domain *domain, GateVerdict *verdict) {
  int cpu = (int)domain->cpu;
  if (gates->governor != NULL && !domain->has_governor)
    say(verdict, GATE_UNGATED, "cpu%d: its governor cannot be read; wanted %s", cpu, gates->governor);
  else if (bounds_asked(gates) && domain->ceiling_khz < 0)
    say(verdict, GATE_UNGATED, "cpu%d: its ceiling cannot be read", cpu);
  else
    return false;
  return true;
}

GateVerdict clocks_judge(const Gates *gates, const int32_t *cpus, int cpu_count) {
  GateVerdict verdict = {.gate = "clocks"};
  int32_t found[CLOCK_DOMAINS];
  Domain domains[CLOCK_DOMAINS];
  int count = clock_domains(cpus, cpu_count, found);
  for (int i = 0; i < count; i++) {
    domains[i] = (Domain){.cpu = found[i], .ceiling_khz = domain_khz(found[i], "scaling_max_freq")};
    domains[i].has_governor = domain_governor(found[i], domains[i].governor);
  }
  for (int i = 0; i < count; i++)
    if (is_wrong(gates, &domains[i], &verdict)) return verdict;
  for (int i = 0; i < count; i++)
    if (is_unreadable(gates, &domains[i], &verdict)) return verdict;
  say(&verdict, count ? GATE_PASS : GATE_UNGATED, "%s", count ? "as wanted: " : "no clock can be read");
  for (int i = 0; i < count; i++) {
    size_t length = strlen(verdict.detail);
    snprintf(verdict.detail + length, sizeof verdict.detail - length, "%scpu%d", i ? ", " : "", (int)domains[i].cpu);
  }
  return verdict;
}
