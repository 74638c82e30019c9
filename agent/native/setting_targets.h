/* setting_targets.h: one setting of a device at a time: a file of sysfs, or a value of Android's settings provider.
 *
 * A target is a text: "/sys/…" or "namespace/key". Values are printable ASCII, at most SETTING_TEXT_MOST characters.
 */
#ifndef AGENT_SETTING_TARGETS_H
#define AGENT_SETTING_TARGETS_H

#include "job.h"

enum { TARGET_ROOM = 320, SETTING_TEXT_MOST = 256, WHY_ROOM = 400 };
typedef char TargetText[TARGET_ROOM];

/* What a target holds. */
typedef struct {
  bool set; /* false: Android knows no value */
  char text[SETTING_TEXT_MOST + 1];
} SettingText;

bool setting_text_equal(const SettingText *left, const SettingText *right);
bool is_target(const char *text);           /* of one of the two forms */
bool target_is_file(const char *target);

/* Both: 0, or -1 and why not. */
int target_read(const char *target, SettingText *text, char why[WHY_ROOM]);
int target_write(const char *target, const SettingText *text, char why[WHY_ROOM]);

/* Everything a setting stands for on this device. Returns false when that is nothing, with what it is called and why. */
typedef void TargetFunction(void *context, const char *target, const char *value);
bool setting_targets(const Setting *setting, TargetFunction *each, void *context, TargetText name, char why[WHY_ROOM]);
const char *setting_value(const Setting *setting);

#endif
