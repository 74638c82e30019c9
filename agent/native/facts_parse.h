/* facts_parse.h: facts out of what kernel and system files say: pure parsers. False or 0: it is not said. */
#ifndef AGENT_FACTS_PARSE_H
#define AGENT_FACTS_PARSE_H

#include "../../sti_runtime/native/base.h"

/* "model name" on x86; the core types on Arm: "4× Cortex-A55 + 4× Cortex-A76". */
bool parse_cpu_model(const char *cpuinfo, char *model, size_t size);
/* The first "flags" (x86) or "Features" (Arm) line, "" if there is none; cpuinfo is cut to pieces. */
const char *cpu_flags(char *cpuinfo);
bool has_word(const char *list, const char *word); /* whether it stands in a list separated by blanks */
/* "cpu MHz" of each CPU: what x86 shows where there is no cpufreq (virtual machines). Returns their number. */
int parse_clocks(const char *cpuinfo, int64_t *khz, int cap);

/* os-release(5): PRETTY_NAME, with BUILD_ID where there is one. */
bool parse_os_release(const char *text, char *build, size_t size);
/* ro.build.fingerprint, else the display id, of Android's build.prop. */
bool parse_build_prop(const char *text, char *build, size_t size);
/* A property out of Android's shared property area: where build.prop is root's, what remains without running getprop. */
bool parse_property_area(const char *area, size_t length, const char *name, char *value, size_t size);

/* (filesystem, source) of the mount that holds `path`, into texts of `size`. Source: proc_pid_mountinfo(5). */
bool parse_mount(const char *mountinfo, const char *path, char *filesystem, char *source, size_t size);

#endif
