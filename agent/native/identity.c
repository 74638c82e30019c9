/* identity.c: see identity.h. */
#include "identity.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#include "../../sti_runtime/native/json.h"
#include "android.h"
#include "arguments.h"
#include "job.h"
#include "kernel_files.h"
#include "verbs.h"

#define AGENT_NAME "stifarm-agent-native"
#define AGENT_VERSION "0.1.0"
#define SALT "stifarm device identity v1"

#if defined(__x86_64__)
#define ARCHITECTURE "x86_64"
#elif defined(__aarch64__)
#define ARCHITECTURE "aarch64"
#elif defined(__arm__)
#define ARCHITECTURE "armv7"
#else
#error "no name for this architecture"
#endif

/* ------------------------------------------------------------------ the device */

/* The first digits of SHA-256 over salt, a zero byte and the raw value. */
static void hashed(const char *raw, char *digits, size_t count) {
  Sha256 hash;
  char hex[65];
  sha256_begin(&hash);
  sha256_add(&hash, SALT, sizeof SALT);
  sha256_add(&hash, raw, strlen(raw));
  sha256_end(&hash, hex);
  memcpy(digits, hex, count);
  digits[count] = '\0';
}

/* The address of the first network card that is a device, in the order of their names. */
static bool first_address(char *address, size_t size) {
  char folder[64];
  EntryName names[ENTRIES];
  snprintf(folder, sizeof folder, "%s/class/net", kernel_roots.sys);
  int count = list_entries(folder, "", false, names, ENTRIES);
  for (int i = 0; i < count; i++) {
    Path card, device;
    path_below(card, folder, names[i]);
    path_below(device, card, "device");
    if (access(device, F_OK) == 0 && kernel_text(address, size, "%s/address", card) &&
        address[strspn(address, ":0")] != '\0')
      return true;
  }
  return false;
}

/* An Android device by the number that its shell user can read; elsewhere by what the kernel or the system has.
 * Source: machine-id(5), "a cryptographic, keyed hash function" for application-specific ids. */
StiCode machine_identity(char machine[MACHINE_TEXT], const char **source, StiError *error) {
  char raw[256];
  if (is_android() && android_serial(raw, sizeof raw))
    *source = "android-serial";
  else if (kernel_text(raw, sizeof raw, "%s/device-tree/serial-number", kernel_roots.proc) && raw[strspn(raw, "0")] != '\0')
    *source = "device-tree-serial";
  else if (kernel_text(raw, sizeof raw, "%s/machine-id", kernel_roots.etc) && strlen(raw) == 32)
    *source = "machine-id";
  else if (first_address(raw, sizeof raw))
    *source = "mac-address";
  else
    return sti_fail(error, STI_INPUT, "Create /etc/machine-id (systemd-machine-id-setup or dbus-uuidgen).",
                    "This device has no identity that an unprivileged user can read: no board serial, no "
                    "/etc/machine-id, no network card.");
  hashed(raw, machine, MACHINE_TEXT - 1);
  return STI_OK;
}

StiCode device_identity(const Spool *spool, char identity[IDENTITY_TEXT], const char **source, StiError *error) {
  char machine[MACHINE_TEXT], mark[EMULATED_ID_TEXT];
  STI_TRY(machine_identity(machine, source, error));
  STI_TRY(emulated_id(spool, mark, error));
  snprintf(identity, IDENTITY_TEXT, "%s%s%s", machine, mark[0] ? "/" : "", mark);
  return STI_OK;
}

StiCode emulated_id(const Spool *spool, char mark[EMULATED_ID_TEXT], StiError *error) {
  Path path;
  char text[64] = "";
  spool_path(spool, path, "device_id");
  mark[0] = '\0';
  if (access(path, F_OK) != 0) return STI_OK;
  if (!kernel_text(text, sizeof text, "%s", path) || strlen(text) != EMULATED_ID_TEXT - 1 ||
      strspn(text, "0123456789abcdef") != EMULATED_ID_TEXT - 1)
    return sti_fail(error, STI_INPUT, "Remove the file and probe the device again.", "%s: not a device id of ours.",
                    path);
  memcpy(mark, text, EMULATED_ID_TEXT);
  return STI_OK;
}

StiCode mark_emulated(const Spool *spool, StiError *error) {
  Path path, resolved;
  char digits[EMULATED_ID_TEXT];
  spool_path(spool, path, "device_id");
  if (access(path, F_OK) == 0) return STI_OK;
  if (realpath(spool->root, resolved) == NULL) return storage_error(error, errno, spool->root);
  hashed(resolved, digits, EMULATED_ID_TEXT - 1);
  return write_atomic(path, digits, EMULATED_ID_TEXT - 1, error);
}

StiCode boot_id(char boot[BOOT_ID_TEXT], StiError *error) {
  if (kernel_text(boot, BOOT_ID_TEXT, "%s/sys/kernel/random/boot_id", kernel_roots.proc) && boot[0]) return STI_OK;
  return sti_fail(error, STI_INPUT, "Mount /proc for this user.", "/proc/sys/kernel/random/boot_id cannot be read.");
}

/* ------------------------------------------------------------------ the agent */

StiCode forced_isa(Isa *isa, StiError *error) {
  const char *name = getenv("STIFARM_ISA");
  char known[80] = "";
  *isa = ISA_AUTO;
  if (name == NULL || !*name) return STI_OK;
  for (Isa one = ISA_PORTABLE; one <= ISA_NEON_DOTPROD; one++) {
    if (!isa_available(one)) continue;
    if (strcmp(name, isa_name(one)) == 0) *isa = one;
    size_t length = strlen(known);
    snprintf(known + length, sizeof known - length, "%s%s", length ? ", " : "", isa_name(one));
  }
  if (*isa != ISA_AUTO) return STI_OK;
  return sti_fail(error, STI_INPUT, "Unset STIFARM_ISA, or choose one of those.",
                  "STIFARM_ISA: this executable and CPU have %s, not '%.40s'.", known, name);
}

const char *agent_version(void) {
  static char version[96];
  Isa isa;
  StiError ignored;
  if (forced_isa(&isa, &ignored) != STI_OK || isa == ISA_AUTO) isa = isa_best();
  snprintf(version, sizeof version, AGENT_NAME " " AGENT_VERSION " " ARCHITECTURE " %s", isa_name(isa));
  return version;
}

static char own_digest[65];

static void read_own_digest(void) {
  static char block[1 << 16];
  Sha256 hash;
  ssize_t got;
  int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  const char *started_as = (const char *)getauxval(AT_EXECFN);
  if (fd < 0 && started_as != NULL) fd = open(started_as, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  sha256_begin(&hash);
  while ((got = read(fd, block, sizeof block)) > 0 || (got < 0 && errno == EINTR))
    if (got > 0) sha256_add(&hash, block, (size_t)got);
  if (got == 0) sha256_end(&hash, own_digest);
  close(fd);
}

const char *agent_digest(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, read_own_digest);
  return own_digest;
}

StiCode agent_digest_known(StiError *error) {
  if (agent_digest()[0]) return STI_OK;
  return sti_fail(error, STI_INPUT, "Mount /proc for this user.", "The agent's own executable cannot be read.");
}

StiCode verb_version(int argc, char **argv, Text *out, int *exit_code, StiError *error) {
  (void)exit_code;
  Arguments arguments;
  STI_TRY(arguments_read(argc, argv, 0, 0, &arguments, error));
  STI_TRY(agent_digest_known(error));
  json_open(out, '{');
  json_text_field(out, "agent", agent_version());
  json_text_field(out, "agent_digest", agent_digest());
  json_int_field(out, "protocol", PROTOCOL_VERSION);
  json_close(out, '}');
  return STI_OK;
}
