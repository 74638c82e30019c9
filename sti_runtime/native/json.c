/* json.c: the strict JSON reader. The source is copied once; strings are decoded in place and point into the copy. */
#include "json.h"
#include "utf8.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_NESTED = 64 };

/* Values and members of the arrays and objects that are still open, innermost last. */
typedef struct {
  char *data;
  size_t used, capacity; /* bytes */
} Stack;

typedef struct {
  Arena *arena;
  char *start, *next, *end; /* the copy; *end is NUL */
  const char *source;
  Stack stack;
  int depth;
  bool canonical;
  StiError *error;
} Parser;

static StiCode refuse(const Parser *parser, const char *at, const char *cause) {
  return sti_fail(parser->error, STI_FORMAT, "It is damaged, edited or written by another version; make it again.",
                  "%s: not valid JSON: %s at byte %lld.", parser->source, cause, (long long)(at - parser->start));
}

static StiCode push(Parser *parser, const void *item, size_t bytes) {
  Stack *stack = &parser->stack;
  if (stack->capacity - stack->used < bytes) {
    size_t capacity = stack->capacity == 0 ? 4096 : stack->capacity * 2;
    char *data = capacity > SIZE_MAX / 4 ? NULL : realloc(stack->data, capacity);
    if (data == NULL) return sti_out_of_memory(parser->error);
    stack->data = data;
    stack->capacity = capacity;
  }
  memcpy(stack->data + stack->used, item, bytes);
  stack->used += bytes;
  return STI_OK;
}

static void skip_space(Parser *parser) {
  char *next = parser->next;
  while (*next == ' ' || *next == '\n' || *next == '\r' || *next == '\t') next++;
  if (next != parser->next) parser->canonical = false;
  parser->next = next;
}

/* ------------------------------------------------------------------ strings */

static int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

/* The four digits behind "\u"; -1 if they are not there. */
static int32_t hex_quad(const char *digits) {
  int32_t value = 0;
  for (int i = 0; i < 4; i++) {
    int digit = hex_digit(digits[i]);
    if (digit < 0) return -1;
    value = value << 4 | digit;
  }
  return value;
}

/* One escape at *from (the backslash), written to *to, which never overtakes it. NULL, or what is wrong. */
static const char *unescape(Parser *parser, char **from, char **to) {
  static const char letters[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
  char letter = (*from)[1];
  const char *known = letter == '\0' ? NULL : strchr(letters, letter);
  if (known != NULL) {
    if (letter == '/') parser->canonical = false;
    *(*to)++ = meant[known - letters];
    *from += 2;
    return NULL;
  }
  if (letter != 'u') return "an unknown escape";
  int32_t code = hex_quad(*from + 2);
  if (code < 0) return "an escape without its four digits";
  bool needed = code < 0x20 && memchr("\b\f\n\r\t", code, 5) == NULL, lower = (*from)[5] < 'A' || (*from)[5] > 'F';
  if (!needed || !lower) parser->canonical = false;
  *from += 6;
  if (code >= 0xDC00 && code < 0xE000) return "half a surrogate pair";
  if (code >= 0xD800 && code < 0xDC00) {
    int32_t low = (*from)[0] == '\\' && (*from)[1] == 'u' ? hex_quad(*from + 2) : -1;
    if (low < 0xDC00 || low > 0xDFFF) return "half a surrogate pair";
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    *from += 6;
  }
  *to += utf8_put(*to, (uint32_t)code);
  return NULL;
}

/* Bytes that stand for themselves in a string: most strings have no other. */
static const bool is_plain[256] = {[' ' ... '!'] = true, ['"' + 1 ... '\\' - 1] = true, ['\\' + 1 ... 0x7F] = true};

/* parser->next is behind the opening quote; it ends behind the closing one, which becomes the string's NUL. */
static StiCode parse_string(Parser *parser, const char **data, size_t *length) {
  char *from = parser->next, *to;
  *data = from;
  while (is_plain[(unsigned char)*from]) from++;
  for (to = from;;) {
    unsigned char byte = (unsigned char)*from;
    if (byte == '"') break;
    if (byte == '\\') {
      const char *problem = unescape(parser, &from, &to);
      if (problem != NULL) return refuse(parser, from, problem);
    } else if (byte < 0x20) {
      return refuse(parser, from, from == parser->end ? "the text ends inside a string" : "a control character");
    } else if (byte < 0x80) {
      *to++ = *from++;
    } else {
      int bytes = utf8_sequence(from, (size_t)(parser->end - from));
      if (bytes < 0) return refuse(parser, from, "a byte that is not UTF-8");
      while (bytes-- > 0) *to++ = *from++;
    }
  }
  *to = '\0';
  *length = (size_t)(to - *data);
  parser->next = from + 1;
  return STI_OK;
}

/* ------------------------------------------------------------------ numbers */

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* Behind the last digit; NULL if there is none. */
static char *skip_digits(char *next) {
  if (!is_digit(*next)) return NULL;
  while (is_digit(*next)) next++;
  return next;
}

static StiCode parse_double(Parser *parser, char *start, char *behind, JsonValue *value) {
  value->kind = JSON_DOUBLE;
  value->number = strtod(start, NULL);
  char spelled[JSON_NUMBER_ROOM];
  size_t length = json_spell_number(spelled, value->number);
  if (length != (size_t)(behind - start) || memcmp(spelled, start, length) != 0) parser->canonical = false;
  parser->next = behind;
  return STI_OK;
}

static StiCode parse_number(Parser *parser, JsonValue *value) {
  char *start = parser->next;
  bool negative = *start == '-';
  char *digits = start + negative, *behind = skip_digits(digits);
  if (behind == NULL) return refuse(parser, start, "a number without digits");
  if (*digits == '0' && behind != digits + 1) return refuse(parser, start, "a number with a leading zero");
  bool whole = true;
  if (*behind == '.') {
    whole = false;
    behind = skip_digits(behind + 1);
    if (behind == NULL) return refuse(parser, start, "a number that ends at its point");
  }
  if (*behind == 'e' || *behind == 'E') {
    whole = false;
    behind += behind[1] == '+' || behind[1] == '-' ? 2 : 1;
    behind = skip_digits(behind);
    if (behind == NULL) return refuse(parser, start, "a number that ends at its exponent");
  }
  if (!whole) return parse_double(parser, start, behind, value);

  parser->next = behind;
  value->kind = JSON_INT;
  value->integer = 0;
  for (char *digit = digits; digit < behind; digit++) {
    int add = negative ? '0' - *digit : *digit - '0';
    if (__builtin_mul_overflow(value->integer, 10, &value->integer) ||
        __builtin_add_overflow(value->integer, add, &value->integer)) {
      value->kind = JSON_BIG;
      value->text.data = start;
      value->text.length = (size_t)(behind - start);
      return STI_OK;
    }
  }
  if (negative && value->integer == 0) parser->canonical = false;
  return STI_OK;
}

/* ------------------------------------------------------------------ values */

static StiCode parse_value(Parser *parser, JsonValue *value);

/* Take what was pushed since `mark` into the arena. Items are JsonValue or JsonMember. */
static void *pop_items(Parser *parser, size_t mark) {
  size_t bytes = parser->stack.used - mark;
  void *items = arena_alloc(parser->arena, bytes);
  if (items != NULL && bytes != 0) memcpy(items, parser->stack.data + mark, bytes);
  parser->stack.used = mark;
  return items;
}

/* Behind an item: *more when a comma follows, else the bracket was taken. */
static StiCode parse_separator(Parser *parser, char bracket, bool *more) {
  skip_space(parser);
  char found = *parser->next;
  if (found != ',' && found != bracket) {
    return refuse(parser, parser->next, bracket == ']' ? "neither ',' nor ']'" : "neither ',' nor '}'");
  }
  parser->next++;
  *more = found == ',';
  if (*more) skip_space(parser);
  return STI_OK;
}

static StiCode parse_array(Parser *parser, JsonValue *value) {
  size_t mark = parser->stack.used;
  bool more = *parser->next != ']';
  if (!more) parser->next++;
  while (more) {
    JsonValue item;
    STI_TRY(parse_value(parser, &item));
    STI_TRY(push(parser, &item, sizeof item));
    STI_TRY(parse_separator(parser, ']', &more));
  }
  value->kind = JSON_ARRAY;
  value->array.count = (parser->stack.used - mark) / sizeof(JsonValue);
  value->array.items = pop_items(parser, mark);
  return value->array.items == NULL ? sti_out_of_memory(parser->error) : STI_OK;
}

static int compare_members(const void *left, const void *right) {
  return json_compare_keys(*(JsonMember *const *)left, *(JsonMember *const *)right);
}

/* Sorted keys (as in all canonical JSON) show their duplicates as neighbours; others are sorted first. */
static StiCode check_keys(Parser *parser, const JsonValue *object) {
  const JsonMember *members = object->object.members;
  size_t count = object->object.count, ordered = 1;
  while (ordered < count && json_compare_keys(&members[ordered - 1], &members[ordered]) < 0) ordered++;
  if (ordered >= count) return STI_OK;
  parser->canonical = false;
  const JsonMember **sorted = malloc(count * sizeof *sorted);
  if (sorted == NULL) return sti_out_of_memory(parser->error);
  for (size_t i = 0; i < count; i++) sorted[i] = &members[i];
  qsort(sorted, count, sizeof *sorted, compare_members);
  const char *twice = NULL;
  for (size_t i = 1; i < count && twice == NULL; i++)
    if (json_compare_keys(sorted[i - 1], sorted[i]) == 0) twice = sorted[i]->key;
  free(sorted);
  return twice == NULL ? STI_OK : refuse(parser, twice, "a key that its object has twice");
}

static StiCode parse_member(Parser *parser, JsonMember *member) {
  if (*parser->next != '"') return refuse(parser, parser->next, "a member without a key");
  parser->next++;
  STI_TRY(parse_string(parser, &member->key, &member->key_length));
  skip_space(parser);
  if (*parser->next != ':') return refuse(parser, parser->next, "a key without ':'");
  parser->next++;
  skip_space(parser);
  return STI_OK;
}

/* A member and its value, as they lie on the stack. */
typedef struct {
  JsonMember member;
  JsonValue value;
} Pair;

static StiCode parse_object(Parser *parser, JsonValue *value) {
  size_t mark = parser->stack.used;
  bool more = *parser->next != '}';
  if (!more) parser->next++;
  while (more) {
    Pair pair = {0};
    STI_TRY(parse_member(parser, &pair.member));
    STI_TRY(parse_value(parser, &pair.value));
    STI_TRY(push(parser, &pair, sizeof pair));
    STI_TRY(parse_separator(parser, '}', &more));
  }
  size_t count = (parser->stack.used - mark) / sizeof(Pair);
  JsonMember *members = arena_alloc(parser->arena, count * sizeof *members);
  JsonValue *values = arena_alloc(parser->arena, count * sizeof *values);
  if (members == NULL || values == NULL) return sti_out_of_memory(parser->error);
  for (size_t i = 0; i < count; i++) {
    Pair pair;
    memcpy(&pair, parser->stack.data + mark + i * sizeof pair, sizeof pair);
    values[i] = pair.value;
    members[i] = pair.member;
    members[i].value = &values[i];
  }
  parser->stack.used = mark;
  value->kind = JSON_OBJECT;
  value->object.members = members;
  value->object.count = count;
  return check_keys(parser, value);
}

static StiCode parse_nested(Parser *parser, JsonValue *value) {
  if (parser->depth == MOST_NESTED) return refuse(parser, parser->next, "nesting deeper than 64");
  parser->depth++;
  char bracket = *parser->next++;
  skip_space(parser);
  StiCode code = bracket == '[' ? parse_array(parser, value) : parse_object(parser, value);
  parser->depth--;
  return code;
}

static bool take_word(Parser *parser, const char *word) {
  size_t length = strlen(word);
  if (strncmp(parser->next, word, length) != 0) return false;
  parser->next += length;
  return true;
}

static StiCode parse_value(Parser *parser, JsonValue *value) {
  memset(value, 0, sizeof *value);
  char first = *parser->next;
  if (first == '{' || first == '[') return parse_nested(parser, value);
  if (first == '-' || is_digit(first)) return parse_number(parser, value);
  if (first == '"') {
    parser->next++;
    value->kind = JSON_STRING;
    return parse_string(parser, &value->text.data, &value->text.length);
  }
  value->kind = JSON_BOOL;
  value->boolean = take_word(parser, "true");
  if (value->boolean || take_word(parser, "false")) return STI_OK;
  value->kind = JSON_NULL;
  if (take_word(parser, "null")) return STI_OK;
  return refuse(parser, parser->next, parser->next == parser->end ? "the text ends too early" : "not a value");
}

StiCode json_parse_noting(Arena *arena, const char *data, size_t length, const char *source, JsonValue **value,
                          bool *canonical, StiError *error) {
  char *copy = arena_text(arena, data, length);
  *value = arena_alloc(arena, sizeof **value);
  if (copy == NULL || *value == NULL) return sti_out_of_memory(error);
  Parser parser = {.arena = arena, .start = copy, .next = copy, .end = copy + length, .source = source,
                   .canonical = true, .error = error};
  skip_space(&parser);
  StiCode code = parse_value(&parser, *value);
  skip_space(&parser);
  if (code == STI_OK && parser.next != parser.end) code = refuse(&parser, parser.next, "something behind the value");
  free(parser.stack.data);
  *canonical = code == STI_OK && parser.canonical;
  return code;
}

StiCode json_parse(Arena *arena, const char *data, size_t length, const char *source, JsonValue **value,
                   StiError *error) {
  bool canonical;
  return json_parse_noting(arena, data, length, source, value, &canonical, error);
}
