/* facts.c: the `facts` verb: what the device is, read from the kernel by pure parsers; nothing is guessed.
 *
 * The record is sti_runtime/device_facts.py's. A fact that cannot be read is null.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <unistd.h>

#ifdef __GLIBC__
#include <gnu/libc-version.h>
#endif

#include "../../sti_runtime/native/json.h"
#include "android.h"
#include "arguments.h"
#include "facts_parse.h"
#include "identity.h"
#include "kernel_files.h"
#include "sensors.h"
#include "spool.h"
#include "verbs.h"

enum { FACT_CHARS = 500, PROBE_BYTES = 4096 };

/* The SIMD extensions that matter to an engine, as /proc/cpuinfo calls them. */
static const char *const features[] = {
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd",
    "neon", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
};

/* ------------------------------------------------------------------ system */

static bool property_of_android(char *build, size_t size) {
  static const char *const contexts[] = {"build_prop", "fingerprint_prop", "exported_fingerprint_prop",
                                         "exported2_default_prop"};
  for (size_t i = 0; i < sizeof contexts / sizeof contexts[0]; i++) {
    char path[PATH_MAX];
    Arena arena = {0};
    const char *area;
    size_t length;
    StiError ignored;
    snprintf(path, sizeof path, "%s/dev/__properties__/u:object_r:%s:s0", kernel_roots.android, contexts[i]);
    bool found = read_file(&arena, path, 4 << 20, &area, &length, &ignored) == STI_OK &&
                 parse_property_area(area, length, "ro.build.fingerprint", build, size);
    arena_free(&arena);
    if (found) return true;
  }
  return false;
}

static bool os_build(char *build, size_t size) {
  char *text = malloc(KERNEL_TEXT);
  if (text == NULL) return false;
  bool found = (is_android() && android_property("ro.build.fingerprint", build, size)) ||
               (kernel_text(text, KERNEL_TEXT, "%s/system/build.prop", kernel_roots.android) &&
                parse_build_prop(text, build, size)) ||
               property_of_android(build, size) ||
               (kernel_text(text, KERNEL_TEXT, "%s/os-release", kernel_roots.etc) && parse_os_release(text, build, size));
  free(text);
  return found;
}

/* Whether a hypervisor shows: the CPU flag on x86, else the firmware's vendor strings. */
static bool is_virtual(const char *flags) {
  static const char *const vendors[] = {"QEMU", "KVM", "VMware", "VirtualBox", "Xen", "Microsoft Corporation",
                                        "Amazon EC2", "Google Compute Engine", "Firecracker"};
  static const char *const places[] = {"sys_vendor", "product_name"};
  if (has_word(flags, "hypervisor")) return true;
  for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
    char text[256];
    if (!kernel_text(text, sizeof text, "%s/class/dmi/id/%s", kernel_roots.sys, places[i])) continue;
    for (size_t k = 0; k < sizeof vendors / sizeof vendors[0]; k++)
      if (strstr(text, vendors[k])) return true;
  }
  return false;
}

/* ------------------------------------------------------------------ storage */

/* The disk or partition below the folder, and whether the whole disk rotates. */
static bool block_device(const char *folder, char *name, size_t size, bool *known, int64_t *rotational) {
  struct stat status;
  char link[PATH_MAX], device[PATH_MAX], path[PATH_MAX + 16];
  *known = false;
  if (stat(folder, &status) != 0) return false;
  snprintf(link, sizeof link, "%s/dev/block/%u:%u", kernel_roots.sys, major(status.st_dev), minor(status.st_dev));
  if (realpath(link, device) == NULL) return false;
  char *base = strrchr(device, '/');
  if (base == NULL) return false;
  snprintf(name, size, "%s", base + 1);
  snprintf(path, sizeof path, "%s/partition", device);
  if (access(path, F_OK) == 0) *base = '\0';
  *known = kernel_int(rotational, "%s/queue/rotational", device);
  return true;
}

/* Bytes this process had the kernel read from storage. Source: proc_pid_io(5), read_bytes. */
static bool storage_read_bytes(int64_t *bytes) {
  char text[1024], *rest = text, *line;
  if (!kernel_text(text, sizeof text, "%s/self/io", kernel_roots.proc)) return false;
  while ((line = next_line(&rest)) != NULL) {
    char *value = split_line(line, ':');
    if (value != NULL && strcmp(line, "read_bytes") == 0) return parse_int(value, bytes);
  }
  return false;
}

static StiCode write_probe(const char *path, StiError *error) {
  char block[PROBE_BYTES];
  memset(block, 0x5a, sizeof block);
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return storage_error(error, errno, path);
  bool written = write(fd, block, sizeof block) == (ssize_t)sizeof block && fsync(fd) == 0;
  int problem = errno;
  close(fd);
  if (written) return STI_OK;
  unlink(path);
  return storage_error(error, problem, path);
}

/* Really try it: write a block, read it back with O_DIRECT, and see whether storage was read. */
static StiCode try_direct_io(const char *folder, const char **verdict, StiError *error) {
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s/.direct-io.%ld", folder, (long)getpid());
  STI_TRY(write_probe(path, error));
  int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
  unlink(path);
  void *buffer = pages_alloc(PROBE_BYTES);
  *verdict = "refused";
  if (fd >= 0 && buffer != NULL) {
    int64_t before = 0, after = 0;
    bool counted = storage_read_bytes(&before);
    ssize_t got = pread(fd, buffer, PROBE_BYTES, 0);
    counted = storage_read_bytes(&after) && counted;
    if (got >= 0)
      *verdict = !counted ? "unproven" : got == PROBE_BYTES && after - before >= got ? "works" : "silent-fallback";
  }
  if (fd >= 0) close(fd);
  if (buffer != NULL) pages_free(buffer, PROBE_BYTES);
  return buffer == NULL ? sti_out_of_memory(error) : STI_OK;
}

/* ------------------------------------------------------------------ the record */

/* A text of at most FACT_CHARS bytes, cut at a whole character; null if it is not known. */
static void write_text(Text *out, const char *key, bool known, const char *text) {
  json_key(out, key);
  if (!known) {
    json_null(out);
    return;
  }
  size_t length = strnlen(text, FACT_CHARS);
  while (length && ((unsigned char)text[length] & 0xc0) == 0x80) length--;
  json_text_n(out, text, length);
}

static StiCode write_storage(Text *out, const char *spool, const char *direct_io, StiError *error) {
  struct statvfs stat;
  char folder[PATH_MAX], filesystem[256] = "", source[256] = "", device[256] = "";
  char *mounts = malloc(KERNEL_TEXT);
  bool rotation_known;
  int64_t rotational = 0;
  if (mounts == NULL) return sti_out_of_memory(error);
  if (statvfs(spool, &stat) != 0 || realpath(spool, folder) == NULL) {
    free(mounts);
    return sti_fail_errno(error, STI_INPUT, errno, "Give a folder this user may read.", "%s: cannot be looked at", spool);
  }
  bool mounted = kernel_text(mounts, KERNEL_TEXT, "%s/self/mountinfo", kernel_roots.proc) &&
                 parse_mount(mounts, folder, filesystem, source, sizeof source);
  bool block = block_device(spool, device, sizeof device, &rotation_known, &rotational);
  free(mounts);
  json_open(out, '{');
  write_text(out, "block_device", block || mounted, block ? device : source);
  write_text(out, "direct_io", true, direct_io);
  write_text(out, "filesystem", mounted, filesystem);
  json_int_field(out, "free_bytes", (int64_t)stat.f_bavail * (int64_t)stat.f_frsize);
  write_text(out, "path", true, spool);
  json_key(out, "rotational");
  if (rotation_known)
    json_bool(out, rotational != 0);
  else
    json_null(out);
  json_int_field(out, "total_bytes", (int64_t)stat.f_blocks * (int64_t)stat.f_frsize);
  json_close(out, '}');
  return STI_OK;
}

static void write_governors(Text *out) {
  int64_t cpus[SENSOR_CPUS];
  char governor[64];
  int count = online_cpus(cpus, SENSOR_CPUS);
  json_open(out, '[');
  for (int i = 0; i < count; i++)
    if (kernel_text(governor, sizeof governor, "%s/devices/system/cpu/cpu%d/cpufreq/scaling_governor", kernel_roots.sys,
                    (int)cpus[i]) && governor[0])
      json_text(out, governor);
  json_close(out, ']');
}

/* Names of NVIDIA GPUs as their driver lists them. */
static void write_gpus(Text *out) {
  char folder[PATH_MAX], text[4096], *rest, *line;
  EntryName names[ENTRIES];
  snprintf(folder, sizeof folder, "%s/driver/nvidia/gpus", kernel_roots.proc);
  int count = list_entries(folder, "", false, names, ENTRIES);
  json_open(out, '[');
  for (int i = 0; i < count; i++) {
    if (!kernel_text(text, sizeof text, "%s/%s/information", folder, names[i])) continue;
    rest = text;
    while ((line = next_line(&rest)) != NULL) {
      char *value = split_line(line, ':');
      if (value != NULL && strcmp(line, "Model") == 0) json_text(out, value);
    }
  }
  json_close(out, ']');
}

/* The kernel's zones; where none can be read, those of Android's thermal service. */
static void write_zones(Text *out) {
  Zone zones[ENTRIES];
  AndroidThermal thermal;
  int count = thermal_zones(zones, ENTRIES);
  bool readable = false;
  for (int i = 0; i < count; i++) readable |= zones[i].has_temperature;
  if (!readable && is_android() && android_thermal(&thermal) && thermal.zone_count > 0) {
    count = thermal.zone_count;
    memcpy(zones, thermal.zones, sizeof zones);
  }
  json_open(out, '[');
  for (int i = 0; i < count; i++) {
    json_open(out, '{');
    json_text_field(out, "name", zones[i].name);
    write_maybe(out, "temperature_milli_c", zones[i].has_temperature, zones[i].temperature_milli_c);
    json_close(out, '}');
  }
  json_close(out, ']');
}

static void write_clocks(Text *out, const char *key, const char *file, const char *cpuinfo) {
  int64_t khz[SENSOR_CPUS];
  int count = cpu_clocks(file, khz, SENSOR_CPUS);
  if (count == 0 && cpuinfo != NULL) count = parse_clocks(cpuinfo, khz, SENSOR_CPUS);
  json_key(out, key), write_ints(out, khz, count);
}

static void write_cpus(Text *out) {
  int64_t cpus[SENSOR_CPUS];
  int count = online_cpus(cpus, SENSOR_CPUS);
  json_key(out, "cpus"), write_ints(out, cpus, count);
}

static void write_notes(Text *out, bool virtual_, const char *direct_io) {
  char note[80];
  json_open(out, '[');
  if (virtual_) json_text(out, "virtual machine: its host's page cache is invisible; cold is the guest's view");
  snprintf(note, sizeof note, "direct IO at the spool: %s", direct_io);
  if (strcmp(direct_io, "works") != 0) json_text(out, note);
  json_close(out, ']');
}

static bool runs_from_battery(void) {
  AndroidBattery battery;
  return has_battery() || (is_android() && android_battery(&battery));
}

static const char *libc_name(void) {
#ifdef __GLIBC__
  static char name[32];
  snprintf(name, sizeof name, "glibc %s", gnu_get_libc_version());
  return name;
#else
  return "musl"; /* its own, linked in: the device's plays no part */
#endif
}

/* Canonical JSON of DeviceFacts. cpuinfo: whole text, flags: its first line of flags. */
static StiCode write_facts(Text *out, const Spool *spool, const char *cpuinfo, const char *flags, StiError *error) {
  char identity[IDENTITY_TEXT], boot[BOOT_ID_TEXT], model[1024], build[1024], kernel[1024], mark[EMULATED_ID_TEXT];
  const char *source, *direct_io;
  struct utsname system_;
  int64_t memory = 0;
  STI_TRY(agent_digest_known(error));
  STI_TRY(device_identity(spool, identity, &source, error));
  STI_TRY(emulated_id(spool, mark, error));
  STI_TRY(boot_id(boot, error));
  STI_TRY(try_direct_io(spool->root, &direct_io, error));
  uname(&system_);
  snprintf(kernel, sizeof kernel, "%s %s %s", system_.sysname, system_.release, system_.version);
  bool model_known = parse_cpu_model(cpuinfo, model, sizeof model), virtual_ = is_virtual(flags);
  bool build_known = os_build(build, sizeof build), memory_known = meminfo_bytes("MemTotal", &memory);

  json_open(out, '{');
  json_text_field(out, "agent", agent_version());
  json_text_field(out, "agent_digest", agent_digest());
  json_text_field(out, "architecture", system_.machine);
  json_bool_field(out, "battery", runs_from_battery());
  json_text_field(out, "boot_id", boot);
  json_key(out, "cpu_features"), json_open(out, '[');
  for (size_t i = 0; i < sizeof features / sizeof features[0]; i++)
    if (has_word(flags, features[i])) json_text(out, features[i]);
  json_close(out, ']');
  write_text(out, "cpu_model", model_known, model);
  write_cpus(out);
  write_clocks(out, "current_khz", "scaling_cur_freq", cpuinfo);
  json_bool_field(out, "emulated_spool", mark[0] != '\0');
  json_key(out, "engines"), json_open(out, '[');
  json_text(out, "native"), json_text(out, "native-int8");
  json_close(out, ']');
  json_text_field(out, "format", "stifarm-facts");
  json_key(out, "governors"), write_governors(out);
  json_key(out, "gpus"), write_gpus(out);
  json_text_field(out, "identity", identity);
  json_text_field(out, "identity_source", source);
  write_text(out, "kernel", true, kernel);
  json_text_field(out, "libc", libc_name());
  write_clocks(out, "max_khz", "cpuinfo_max_freq", NULL);
  write_maybe(out, "memory_bytes", memory_known, memory);
  write_clocks(out, "min_khz", "cpuinfo_min_freq", NULL);
  json_key(out, "notes"), write_notes(out, virtual_, direct_io);
  write_text(out, "os_build", build_known, build);
  json_int_field(out, "protocol", PROTOCOL_VERSION);
  json_key(out, "python"), json_null(out);
  json_key(out, "storage");
  STI_TRY(write_storage(out, spool->root, direct_io, error));
  json_key(out, "thermal_zones"), write_zones(out);
  json_key(out, "torch"), json_null(out);
  json_int_field(out, "version", 1);
  json_bool_field(out, "virtual_machine", virtual_);
  json_int_field(out, "wall_ns", wall_ns());
  json_close(out, '}');
  return out->failed ? sti_out_of_memory(error) : STI_OK;
}

static StiCode facts_of(const Spool *spool, Text *out, StiError *error) {
  char *cpuinfo = malloc(KERNEL_TEXT), *cut = malloc(KERNEL_TEXT);
  StiCode code = cpuinfo == NULL || cut == NULL ? sti_out_of_memory(error) : STI_OK;
  if (code == STI_OK) {
    if (!kernel_text(cpuinfo, KERNEL_TEXT, "%s/cpuinfo", kernel_roots.proc)) cpuinfo[0] = '\0';
    memcpy(cut, cpuinfo, strlen(cpuinfo) + 1);
    code = write_facts(out, spool, cpuinfo, cpu_flags(cut), error);
  }
  free(cpuinfo);
  free(cut);
  return code;
}

StiCode verb_facts(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  Arguments arguments;
  Spool spool;
  (void)exit_code;
  STI_TRY(arguments_open(argc, argv, 0, TAKES_SPOOL | TAKES_EMULATED, &arguments, &spool, error));
  if (arguments.emulated) STI_TRY(mark_emulated(&spool, error));
  return facts_of(&spool, out, error);
}
