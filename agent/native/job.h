/* job.h: the job file as C structs (sti_runtime/messages.py; docs/job-and-journal.md, section 2). */
#ifndef AGENT_JOB_H
#define AGENT_JOB_H

#include "../../sti_runtime/native/formats.h"
#include "../../sti_runtime/native/pipeline.h"

/* JOB_THREAD_CAP: most compute threads, and most reads in flight. */
enum { JOB_THREAD_CAP = 1024, JOB_CAP_BYTES = 16 << 20 };
enum { RECORD_CAP_BYTES = 4 << 20, PROTOCOL_VERSION = 4 };

typedef struct { const char *store; int64_t counter; bool takeover; } Lease;

/* Who slows a resource. LAB: whoever made the virtual device, by control groups around all of it. */
typedef enum {
  MECHANISM_NONE,
  MECHANISM_CGROUP_V1,
  MECHANISM_CGROUP_V2,
  MECHANISM_AGENT,
  MECHANISM_LAB_CGROUP_V1,
  MECHANISM_LAB_CGROUP_V2
} Mechanism;
const char *mechanism_name(Mechanism mechanism); /* "cgroup-v1", …; NULL for MECHANISM_NONE */

typedef struct {
  int64_t io_bytes_per_s;  /* 0: not limited */
  Mechanism io_mechanism;
  int64_t cpu_share_milli; /* 0: not limited */
  Mechanism cpu_mechanism;
} Emulation;

/* A limit is asked for when its has_ flag is set. */
typedef struct {
  bool has_temperature, has_battery, has_load, has_free, has_min_khz, has_max_khz;
  int64_t max_temperature_milli_c, min_battery_percent, max_load_milli, min_free_bytes, wait_limit_s;
  const char *governor;     /* of each clock domain of the CPUs used; NULL: not asked */
  int64_t min_khz, max_khz; /* of its ceiling */
} Gates;

typedef enum { SETTING_ANDROID, SETTING_FILE, SETTING_IDLE } SettingKind;

/* What is to be changed on the device while the job runs. */
typedef struct {
  SettingKind kind;
  const char *path;             /* file: /sys/…; a part that ends with '*' stands for all with a number there */
  const char *namespace_, *key; /* android */
  const char *value;            /* file, android */
  int64_t latency_us;           /* idle: no state that takes longer to leave may be entered */
} Setting;
enum { SETTINGS_MOST = 64, SETTING_VALUE_MOST = 64 };

typedef enum { UNIT_PROBE, UNIT_PROFILE_IO, UNIT_PROFILE_COMPUTE, UNIT_PROFILE_FIXED, UNIT_EXECUTE, UNIT_EVALUATE } UnitKind;
extern const char *const unit_kind_names[]; /* "probe", …, NULL */

typedef struct {
  int64_t number;
  UnitKind kind;
  int64_t *widths; int32_t width_count;        /* profile-io; profile-compute has one */
  int64_t *fidelities; int32_t fidelity_count; /* profile-io, profile-compute */
  int64_t warmups, repeats, seed, batch;
  int64_t *rows; int32_t row_count;            /* profile-fixed, execute */
  Plan plan;                                   /* execute, evaluate */
  RequestKind request_kind;                    /* execute */
  IoMode io_mode;                              /* execute */
} Unit;

/* "torch", "native", "native-int8": the last two are this executable, with fp32 and int8 arithmetic. */
typedef enum { ENGINE_TORCH, ENGINE_NATIVE, ENGINE_NATIVE_INT8 } EngineName;
extern const char *const engine_names[]; /* NULL-ended */

typedef struct {
  const char *id;
  int64_t attempt;
  Lease lease;
  const char *device;
  char bundle[65], task_data[65]; /* "" for null */
  EngineName engine;
  int64_t threads, queue_depth;
  int32_t *cpus; int32_t cpu_count;
  const char *machine_lock; /* NULL for null */
  bool emulated;
  Emulation emulation;
  Gates gates;
  Setting *settings; int32_t setting_count;
  Unit *units; int32_t unit_count;
} Job;

/* Errors: STI_REFUSED for a newer version, STI_FORMAT, STI_RESOURCE. */
StiCode job_parse(Arena *arena, const char *data, size_t length, const char *source, Job *job, StiError *error);
void job_write(Text *out, const Job *job); /* canonical JSON: spawn-cold children get theirs on standard input */
bool unit_is_timed(UnitKind kind);

/* job_settings.c */
StiCode settings_parse(Arena *arena, const JsonValue *array, const char *source, Job *job, StiError *error);
void settings_write(Text *out, const Job *job);
/* Whether the text is printable ASCII without blanks around, of 1 to SETTING_VALUE_MOST characters. */
bool is_setting_value(const char *text);
bool is_setting_path(const char *text, bool stars); /* /sys/class/… or /sys/devices/…, nowhere else; '*' or none */
bool is_setting_key(const char *text);
extern const char *const setting_namespaces[]; /* NULL-ended */

#endif
