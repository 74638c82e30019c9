/* setting_targets.c: see setting_targets.h. */
#include "setting_targets.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "kernel_files.h"

#define IDLE_STATES "/sys/devices/system/cpu/cpu*/cpuidle/state*/disable"

enum { ANDROID_LIMIT_S = 10, READ_ROOM = 4096 };

static int no(char why[WHY_ROOM], const char *format, ...) __attribute__((format(printf, 2, 3)));
static int no(char why[WHY_ROOM], const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(why, WHY_ROOM, format, arguments);
  va_end(arguments);
  return -1;
}

bool setting_text_equal(const SettingText *left, const SettingText *right) {
  return left->set == right->set && (!left->set || strcmp(left->text, right->text) == 0);
}

bool target_is_file(const char *target) { return target[0] == '/'; }

/* "namespace/key" in two; false if it has another form. */
static bool split_target(const char *target, TargetText namespace_, const char **key) {
  const char *slash = strchr(target, '/');
  if (slash == NULL || strlen(target) >= TARGET_ROOM) return false;
  snprintf(namespace_, TARGET_ROOM, "%.*s", (int)(slash - target), target);
  *key = slash + 1;
  for (const char *const *name = setting_namespaces; *name != NULL; name++)
    if (strcmp(*name, namespace_) == 0) return is_setting_key(*key);
  return false;
}

bool is_target(const char *text) {
  TargetText namespace_;
  const char *key;
  return target_is_file(text) ? is_setting_path(text, false) : split_target(text, namespace_, &key);
}

/* What was read, if it can be put back. */
static int take_text(char *found, SettingText *text, char why[WHY_ROOM]) {
  const char *value = stripped(found);
  size_t length = strlen(value);
  bool printable = length <= SETTING_TEXT_MOST;
  for (size_t i = 0; i < length && printable; i++) printable = value[i] >= ' ' && value[i] <= '~';
  if (!printable) return no(why, "it holds what could not be put back");
  *text = (SettingText){.set = true};
  memcpy(text->text, value, length);
  return 0;
}

/* ------------------------------------------------------------------ files */

/* The path below the root of sysfs; false when it does not fit. */
static bool below_sysfs(const char *target, char path[PATH_MAX]) {
  return snprintf(path, PATH_MAX, "%s%s", kernel_roots.sys, target + strlen("/sys")) < PATH_MAX;
}

/* Open the file itself, which must exist below sysfs, whatever links lead to it. A descriptor, or -1 and why not. */
static int open_inside(const char *target, int flags, const char *verb, char why[WHY_ROOM]) {
  char path[PATH_MAX], real[PATH_MAX], root[PATH_MAX];
  if (!below_sysfs(target, path) || realpath(kernel_roots.sys, root) == NULL || realpath(path, real) == NULL)
    return no(why, "it cannot be %s: %s", verb, strerror(errno));
  size_t length = strlen(root);
  if (strncmp(real, root, length) != 0 || real[length] != '/') return no(why, "it leads out of sysfs");
  int fd = open(real, flags | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
  return fd >= 0 ? fd : no(why, "it cannot be %s: %s", verb, strerror(errno));
}

static int read_file_target(const char *target, SettingText *text, char why[WHY_ROOM]) {
  char found[READ_ROOM];
  int fd = open_inside(target, O_RDONLY, "read", why);
  if (fd < 0) return -1;
  ssize_t length = read(fd, found, sizeof found - 1);
  int problem = errno;
  close(fd);
  if (length < 0) return no(why, "it cannot be read: %s", strerror(problem));
  found[length] = '\0';
  if (stripped(found)[0] == '\0') return no(why, "it cannot be read: it is empty");
  return take_text(found, text, why);
}

static int write_file_target(const char *target, const SettingText *text, char why[WHY_ROOM]) {
  int fd = open_inside(target, O_WRONLY | O_TRUNC, "written", why);
  if (fd < 0) return -1;
  size_t length = strlen(text->text);
  int problem = write(fd, text->text, length) == (ssize_t)length ? 0 : errno; /* sysfs takes a value in one write */
  close(fd);
  return problem == 0 ? 0 : no(why, "it cannot be written: %s", strerror(problem));
}

/* ------------------------------------------------------------------ Android */

static bool never(void) { return false; }

/* Run `settings` with these words; what it says goes to `found`. */
static int android(char *const words[], char found[READ_ROOM], char why[WHY_ROOM]) {
  char program[PATH_MAX], *argv[6] = {program};
  Said said = {0};
  Text nothing = {0};
  StiError error = {0};
  snprintf(program, sizeof program, "%s/system/bin/settings", kernel_roots.android);
  for (int i = 0; words[i] != NULL; i++) argv[i + 1] = words[i];
  StiCode code = child_run(&(Command){program, argv}, &nothing, ANDROID_LIMIT_S, never, &said, &error);
  bool done = code == STI_OK && WIFEXITED(said.status) && WEXITSTATUS(said.status) == 0;
  snprintf(found, READ_ROOM, "%s", said.out.data == NULL ? "" : said.out.data);
  text_free(&said.out);
  text_free(&said.words);
  if (done) return 0;
  if (code != STI_OK) return no(why, "%.200s cannot be run: %.150s", program, error.what);
  return no(why, "%.200s %s failed (status %d)", program, words[0], said.status);
}

static int read_android(const char *target, SettingText *text, char why[WHY_ROOM]) {
  TargetText namespace_;
  const char *key;
  char found[READ_ROOM];
  if (!split_target(target, namespace_, &key)) return no(why, "it is no setting");
  if (android((char *[]){"get", namespace_, (char *)key, NULL}, found, why) != 0) return -1;
  if (take_text(found, text, why) != 0) return -1;
  if (strcmp(text->text, "null") == 0) *text = (SettingText){0};
  return 0;
}

static int write_android(const char *target, const SettingText *text, char why[WHY_ROOM]) {
  TargetText namespace_;
  const char *key;
  char found[READ_ROOM];
  if (!split_target(target, namespace_, &key)) return no(why, "it is no setting");
  char *put[] = {"put", namespace_, (char *)key, (char *)text->text, NULL};
  char *unset[] = {"delete", namespace_, (char *)key, NULL};
  return android(text->set ? put : unset, found, why);
}

int target_read(const char *target, SettingText *text, char why[WHY_ROOM]) {
  return target_is_file(target) ? read_file_target(target, text, why) : read_android(target, text, why);
}

int target_write(const char *target, const SettingText *text, char why[WHY_ROOM]) {
  return target_is_file(target) ? write_file_target(target, text, why) : write_android(target, text, why);
}

/* ------------------------------------------------------------------ what a setting stands for */

typedef struct {
  const Setting *setting;
  TargetFunction *each;
  void *context;
  int found;
} Expansion;

static bool too_shallow(const Setting *setting, const char *path) {
  int64_t latency_us;
  const char *slash = strrchr(path, '/');
  return setting->kind == SETTING_IDLE &&
         kernel_int(&latency_us, "%.*s/latency", (int)(slash - path), path) && latency_us <= setting->latency_us;
}

/* One file that the pattern led to. */
static void take_file(Expansion *expansion, const char *target, bool matched) {
  char path[PATH_MAX];
  if (!below_sysfs(target, path) || (matched && access(path, F_OK) != 0)) return;
  expansion->found++;
  if (!too_shallow(expansion->setting, path))
    expansion->each(expansion->context, target, setting_value(expansion->setting));
}

static bool is_number(const char *text) { return text[0] != '\0' && text[strspn(text, "0123456789")] == '\0'; }

/* Follow `pattern`, which begins with '/' or has ended, below `target`. */
static void follow(Expansion *expansion, const TargetText target, const char *pattern, bool matched) {
  if (pattern[0] == '\0') {
    take_file(expansion, target, matched);
    return;
  }
  TargetText below;
  const char *part = pattern + 1;
  size_t length = strcspn(part, "/");
  const char *rest = part + length;
  bool star = length > 0 && part[length - 1] == '*';
  char folder[PATH_MAX], prefix[ENTRY_NAME];
  if (!star) {
    if (snprintf(below, sizeof below, "%s/%.*s", target, (int)length, part) < TARGET_ROOM)
      follow(expansion, below, rest, matched);
    return;
  }
  EntryName *names = calloc(ENTRIES, sizeof *names);
  bool fits = names != NULL && below_sysfs(target, folder) &&
              snprintf(prefix, sizeof prefix, "%.*s", (int)length - 1, part) < ENTRY_NAME;
  int count = fits ? list_entries(folder, prefix, true, names, ENTRIES) : 0;
  for (int i = 0; i < count; i++)
    if (is_number(names[i] + length - 1) && snprintf(below, sizeof below, "%s/%s", target, names[i]) < TARGET_ROOM)
      follow(expansion, below, rest, true);
  free(names);
}

const char *setting_value(const Setting *setting) { return setting->kind == SETTING_IDLE ? "1" : setting->value; }

bool setting_targets(const Setting *setting, TargetFunction *each, void *context, TargetText name,
                     char why[WHY_ROOM]) {
  Expansion expansion = {setting, each, context, 0};
  if (setting->kind == SETTING_ANDROID) {
    snprintf(name, TARGET_ROOM, "%s/%s", setting->namespace_, setting->key);
    each(context, name, setting->value);
    return true;
  }
  const char *pattern = setting->kind == SETTING_IDLE ? IDLE_STATES : setting->path;
  snprintf(name, TARGET_ROOM, "%s", pattern);
  follow(&expansion, (TargetText){"/sys"}, pattern + strlen("/sys"), false);
  if (expansion.found > 0) return true;
  no(why, "there is no such file on this device");
  return false;
}
