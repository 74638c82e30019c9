/* json_write.c: canonical JSON out; numbers are spelled as Python spells them. */
#include "json.h"
#include "utf8.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ structure */

static void comma(Text *out) {
  if (out->length == 0 || strchr("{[:,", out->data[out->length - 1]) != NULL) return;
  text_append(out, ",", 1);
}

static void put(Text *out, const char *word) {
  comma(out);
  text_append(out, word, strlen(word));
}

static void put_quoted(Text *out, const char *text, size_t length) {
  text_append(out, "\"", 1);
  size_t plain = 0; /* where the run of bytes to copy as they are begins */
  for (size_t i = 0; i < length;) {
    unsigned char byte = (unsigned char)text[i];
    int bytes = byte < 0x80 ? 1 : utf8_sequence(text + i, length - i);
    bool escaped = byte < 0x20 || byte == '"' || byte == '\\';
    if (bytes > 0 && !escaped) {
      i += (size_t)bytes;
      continue;
    }
    text_append(out, text + plain, i - plain);
    const char *letter = byte == 0 ? NULL : strchr("\"\"\\\\\bb\ff\nn\rr\tt", byte);
    if (bytes < 0) text_append(out, "\xEF\xBF\xBD", 3);
    else if (letter != NULL) text_append(out, (const char[]){'\\', letter[1]}, 2);
    else text_printf(out, "\\u%04x", byte);
    i += (size_t)abs(bytes);
    plain = i;
  }
  text_append(out, text + plain, length - plain);
  text_append(out, "\"", 1);
}

void json_key(Text *out, const char *key) {
  comma(out);
  put_quoted(out, key, strlen(key));
  text_append(out, ":", 1);
}

void json_text_n(Text *out, const char *text, size_t length) {
  comma(out);
  put_quoted(out, text, length);
}

void json_text(Text *out, const char *text) { json_text_n(out, text, strlen(text)); }
void json_bool(Text *out, bool value) { put(out, value ? "true" : "false"); }
void json_null(Text *out) { put(out, "null"); }
void json_open(Text *out, char bracket) { put(out, bracket == '{' ? "{" : "["); }
void json_close(Text *out, char bracket) { text_append(out, &bracket, 1); }

void json_int(Text *out, int64_t value) {
  char digits[24], *next = digits + sizeof digits;
  *--next = '\0';
  uint64_t left = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
  do *--next = (char)('0' + left % 10);
  while ((left /= 10) != 0);
  if (value < 0) *--next = '-';
  put(out, next);
}

/* ------------------------------------------------------------------ numbers */

/* The shortest digits that read back as `value`, as printf's "%.*e" writes them. */
static void shortest_digits(char text[JSON_NUMBER_ROOM], double value) {
  /* 15 digits always survive in a normal number, so fewer are these without their zeros; 17 always tell it. */
  int exponent;
  bool power_of_two = frexp(value, &exponent) == 0.5;
  for (int digits = value < DBL_MIN ? 1 : 15; digits <= 17; digits++) {
    snprintf(text, JSON_NUMBER_ROOM, "%.*e", digits - 1, value);
    if (strtod(text, NULL) == value) return;
    if (!power_of_two || digits == 17) continue;
    /* Below a power of two numbers lie closer: the decimal above may read back where the nearest does not. */
    char *last = strchr(text, 'e') - 1;
    if (*last == '9') continue;
    ++*last;
    if (strtod(text, NULL) == value) return;
  }
}

size_t json_spell_number(char text[JSON_NUMBER_ROOM], double value) {
  if (!isfinite(value)) { /* as Python says it; no reader of ours takes it */
    const char *word = isnan(value) ? "NaN" : value < 0 ? "-Infinity" : "Infinity";
    return (size_t)snprintf(text, JSON_NUMBER_ROOM, "%s", word);
  }
  const char *sign = signbit(value) ? "-" : "";
  char digits[JSON_NUMBER_ROOM];
  shortest_digits(digits, fabs(value));
  char *mark = strchr(digits, 'e');
  int exponent = atoi(mark + 1);
  *mark = '\0';
  if (digits[1] == '.') memmove(digits + 1, digits + 2, strlen(digits + 2) + 1);
  int count = (int)strlen(digits);
  while (count > 1 && digits[count - 1] == '0') digits[--count] = '\0';

  if (exponent < -4 || exponent >= 16) {
    const char *point = count > 1 ? "." : "";
    return (size_t)snprintf(text, JSON_NUMBER_ROOM, "%s%c%s%se%+03d", sign, digits[0], point, digits + 1, exponent);
  }
  static const char zeros[] = "0000000000000000";
  if (exponent < 0) return (size_t)snprintf(text, JSON_NUMBER_ROOM, "%s0.%.*s%s", sign, -exponent - 1, zeros, digits);
  int whole = exponent + 1, filled = whole > count ? whole - count : 0;
  const char *fraction = whole < count ? digits + whole : "0";
  return (size_t)snprintf(text, JSON_NUMBER_ROOM, "%s%.*s%.*s.%s", sign, whole, digits, filled, zeros, fraction);
}

void json_number(Text *out, double value) {
  char text[JSON_NUMBER_ROOM];
  json_spell_number(text, value);
  put(out, text);
}

/* ------------------------------------------------------------------ fields and any value */

void json_int_field(Text *out, const char *key, int64_t value) {
  json_key(out, key);
  json_int(out, value);
}

void json_text_field(Text *out, const char *key, const char *value) {
  json_key(out, key);
  json_text(out, value);
}

void json_bool_field(Text *out, const char *key, bool value) {
  json_key(out, key);
  json_bool(out, value);
}


int json_compare_keys(const JsonMember *left, const JsonMember *right) {
  size_t shorter = left->key_length < right->key_length ? left->key_length : right->key_length;
  int order = memcmp(left->key, right->key, shorter);
  return order != 0 ? order : (left->key_length > right->key_length) - (left->key_length < right->key_length);
}

static int compare_members(const void *left, const void *right) {
  return json_compare_keys(*(JsonMember *const *)left, *(JsonMember *const *)right);
}

static void put_object(Text *out, const JsonValue *object) {
  size_t count = object->object.count;
  const JsonMember **sorted = malloc((count + 1) * sizeof *sorted);
  if (sorted == NULL) {
    out->failed = true;
    return;
  }
  for (size_t i = 0; i < count; i++) sorted[i] = &object->object.members[i];
  qsort(sorted, count, sizeof *sorted, compare_members);
  json_open(out, '{');
  for (size_t i = 0; i < count; i++) {
    json_text_n(out, sorted[i]->key, sorted[i]->key_length);
    text_append(out, ":", 1);
    json_canonical(out, sorted[i]->value);
  }
  json_close(out, '}');
  free(sorted);
}

void json_canonical(Text *out, const JsonValue *value) {
  switch (value->kind) {
    case JSON_NULL: json_null(out); break;
    case JSON_BOOL: json_bool(out, value->boolean); break;
    case JSON_INT: json_int(out, value->integer); break;
    case JSON_DOUBLE: json_number(out, value->number); break;
    case JSON_STRING: json_text_n(out, value->text.data, value->text.length); break;
    case JSON_BIG:
      comma(out);
      text_append(out, value->text.data, value->text.length);
      break;
    case JSON_ARRAY:
      json_open(out, '[');
      for (size_t i = 0; i < value->array.count; i++) json_canonical(out, &value->array.items[i]);
      json_close(out, ']');
      break;
    case JSON_OBJECT: put_object(out, value); break;
  }
}
