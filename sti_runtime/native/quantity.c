/* quantity.c: parsing what users write, formatting what they read. */
#include "quantity.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

typedef struct { const char *name; int64_t factor; } Unit;

static const Unit sizes[] = {
    {"", 1}, {"b", 1}, {"kB", 1000}, {"MB", 1000000}, {"GB", 1000000000},
    {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {NULL, 0},
};
static const Unit times[] = {
    {"ns", 1}, {"us", 1000}, {"µs", 1000}, {"ms", 1000000}, {"s", 1000000000}, {"m", 60000000000}, {NULL, 0},
};

/* ------------------------------------------------------------------ parsing */

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static const Unit *find_unit(const Unit *units, const char *name, size_t length) {
  for (; units->name; units++)
    if (strlen(units->name) == length && strncasecmp(units->name, name, length) == 0) return units;
  return NULL;
}

static StiCode parse(const char *text, const Unit *units, const char *option, const char *what, const char *example,
                     int64_t *value, StiError *error) {
  const char *at = text;
  while (is_space(*at)) at++;
  const char *whole = at;
  while (is_digit(*at)) at++;
  const char *whole_end = at, *fraction_end = at;
  if (*at == '.' && is_digit(at[1])) {
    at++;
    while (is_digit(*at)) at++;
    fraction_end = at;
  }
  while (is_space(*at)) at++;
  const char *end = at + strlen(at);
  while (end > at && is_space(end[-1])) end--;
  const Unit *unit = find_unit(units, at, (size_t)(end - at));
  if (whole == whole_end || !unit)
    return sti_fail(error, STI_INPUT, example, "%s: '%.100s' is not %s.", option, text, what);

  int64_t result = 0, fraction = 0;
  bool fits = true;
  for (at = whole; at < whole_end; at++)
    fits = fits && !__builtin_mul_overflow(result, 10, &result) && !__builtin_add_overflow(result, *at - '0', &result);
  /* From the last digit to the first: rounding each step down rounds the sum down. */
  for (at = fraction_end - 1; at > whole_end; at--) fraction = ((*at - '0') * unit->factor + fraction) / 10;
  fits = fits && !__builtin_mul_overflow(result, unit->factor, &result) &&
         !__builtin_add_overflow(result, fraction, &result);
  if (!fits)
    return sti_fail(error, STI_INPUT, example, "%s: '%.100s' is larger than anything here can be.", option, text);
  *value = result;
  return STI_OK;
}

StiCode parse_bytes(const char *text, const char *option, int64_t *bytes, StiError *error) {
  return parse(text, sizes, option, "a size", "Write it like 4MB, 512KiB or 4096.", bytes, error);
}

StiCode parse_duration_ns(const char *text, const char *option, int64_t *duration_ns, StiError *error) {
  return parse(text, times, option, "a duration", "Write it like 150ms or 0.2s.", duration_ns, error);
}

/* ------------------------------------------------------------------ formatting */

static void format(int64_t value, const Unit *large, const char *smallest, char text[QUANTITY_CHARS]) {
  for (; large->name; large++) {
    if (value < large->factor) continue;
    double scaled = (double)value / (double)large->factor;
    const char *layout = value < 1999 * (large->factor / 2) ? "%.3g %s" : "%.0f %s"; /* 999.5 of the unit */
    snprintf(text, QUANTITY_CHARS, layout, scaled, large->name);
    return;
  }
  snprintf(text, QUANTITY_CHARS, "%" PRId64 " %s", value, smallest);
}

void format_bytes(int64_t bytes, char text[QUANTITY_CHARS]) {
  static const Unit large[] = {{"GB", 1000000000}, {"MB", 1000000}, {"kB", 1000}, {NULL, 0}};
  format(bytes, large, "B", text);
}

void format_ns(int64_t duration_ns, char text[QUANTITY_CHARS]) {
  static const Unit large[] = {{"s", 1000000000}, {"ms", 1000000}, {"µs", 1000}, {NULL, 0}};
  format(duration_ns, large, "ns", text);
}

void format_ns_up(int64_t duration_ns, char text[QUANTITY_CHARS]) {
  int64_t step = 1;
  while (duration_ns / step >= 1000) step *= 10;
  const int64_t over = duration_ns % step;
  if (over > 0) duration_ns = duration_ns > INT64_MAX - (step - over) ? INT64_MAX : duration_ns + (step - over);
  format_ns(duration_ns, text);
}
