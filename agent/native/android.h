/* android.h: what an Android device tells only through its own programs, where the kernel's files are closed to shell.
 *
 * A program takes 10 to 100 ms: these are for facts, the probe unit and gates, never between samples.
 */
#ifndef AGENT_ANDROID_H
#define AGENT_ANDROID_H

#include "sensors.h"

bool is_android(void); /* its getprop is there */

/* A system property, asked of getprop; false where there is none or it is empty. */
bool android_property(const char *name, char *value, size_t size);
/* The serial number of the device; false where it has none of its own. */
bool android_serial(char *serial, size_t size);

/* What `dumpsys battery` says; all clear where it is faked (updates stopped) or not said. */
typedef struct {
  bool present, has_percent, has_temperature;
  int64_t percent, temperature_milli_c;
} AndroidBattery;
AndroidBattery parse_android_battery(const char *text);
bool android_battery(AndroidBattery *battery);

/* What `dumpsys thermalservice` says; nothing where its thermal HAL is not ready. status: 0 none … 6 shutdown. */
typedef struct {
  bool has_status;
  int64_t status;
  Zone zones[ENTRIES];
  int zone_count;
} AndroidThermal;
void parse_android_thermal(const char *text, AndroidThermal *thermal);
bool android_thermal(AndroidThermal *thermal); /* since Android 10 */

/* Fill in what the kernel did not show: temperature, throttling, battery. Elsewhere than on Android: nothing. */
void android_complete(Sensors *sensors);

#endif
