/* json.h: strict JSON into an arena, and canonical JSON out (sorted keys, no white space; docs/job-and-journal.md).
 *
 * The reader refuses: duplicate keys, invalid UTF-8, lone surrogates, NaN, trailing bytes, nesting over 64, integers
 * outside int64 (they become JSON_BIG, which no field accepts). Lengths are explicit; strings are NUL-terminated too.
 */
#ifndef STI_JSON_H
#define STI_JSON_H

#include "base.h"

typedef enum { JSON_NULL, JSON_BOOL, JSON_INT, JSON_BIG, JSON_DOUBLE, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonKind;

typedef struct JsonValue JsonValue;
typedef struct {
  const char *key;
  size_t key_length;
  JsonValue *value;
} JsonMember;

struct JsonValue {
  JsonKind kind;
  union {
    bool boolean;
    int64_t integer;
    double number;
    struct { const char *data; size_t length; } text;
    struct { JsonValue *items; size_t count; } array;
    struct { JsonMember *members; size_t count; } object; /* in the order of the source */
  };
};

/* `source` names the text in messages. Errors: STI_FORMAT with the byte offset, STI_RESOURCE. */
StiCode json_parse(Arena *arena, const char *data, size_t length, const char *source, JsonValue **value,
                   StiError *error);
/* Also tells whether the text is what json_canonical writes of the value. */
StiCode json_parse_noting(Arena *arena, const char *data, size_t length, const char *source, JsonValue **value,
                          bool *canonical, StiError *error);
/* Order of two keys: that of their bytes, which is that of their characters. */
int json_compare_keys(const JsonMember *left, const JsonMember *right);

/* ------------------------------------------------------------------ reading typed fields */

/* Walks one object; the first problem is kept in *error with its dotted path, later calls do nothing.
 * Usage: fields_begin → field_* for every known field → fields_end (refuses unknown and missing fields). */
typedef struct {
  const JsonValue *object;
  const char *source; /* file or message */
  const char *what;   /* type name: "Plan" */
  char path[200];     /* where the object stands: "shards.3" */
  int64_t index;      /* which item of the array at `path` it is; -1: not an item */
  uint64_t seen;      /* bit per member, objects have at most 64 fields */
  size_t next;        /* member to look at first: files have their fields in one order */
  StiError *error;
  StiCode code;
} Fields;

void fields_begin(Fields *fields, const JsonValue *object, const char *source, const char *what, const char *path,
                  StiError *error);
/* The same for item `index` of the array at `path`. */
void fields_begin_item(Fields *fields, const JsonValue *object, const char *source, const char *what, const char *path,
                       int64_t index, StiError *error);

/* A stored format: the type it is read as, its "format" and the "version" known here. */
typedef struct {
  const char *what;   /* "Plan" */
  const char *format; /* "stifarm-plan" */
  int version;
  bool exact;         /* its version is an integer: what field_literal takes besides is refused */
  StiCode newer;      /* the error that a later version is */
} StoredFormat;

/* fields_begin for a stored record, and its fields "format" and "version". A later version is the problem, with both
 * numbers, whatever else may have changed in it. */
void fields_begin_stored(Fields *fields, const JsonValue *object, const StoredFormat *stored, const char *source,
                         const char *path, StiError *error);
const JsonValue *field_value(Fields *fields, const char *name); /* any kind, NULL (and an error) if missing */
/* After a problem the rest give the least there is: 0, false, "", an array or object without members. */
int64_t field_int(Fields *fields, const char *name, int64_t least, int64_t most);
bool field_bool(Fields *fields, const char *name);
double field_number(Fields *fields, const char *name); /* finite; an integer is taken as one */
const char *field_text(Fields *fields, const char *name, size_t least_chars, size_t most_chars);
const char *field_digest(Fields *fields, const char *name);
int field_choice(Fields *fields, const char *name, const char *const *choices); /* index in a NULL-ended list */
/* One of `count` integers. As pydantic's Literal takes them: 4.0 is 4, true is 1; the value becomes that integer. */
int64_t field_literal(Fields *fields, const char *name, const int *allowed, int count);
const JsonValue *field_array(Fields *fields, const char *name, size_t least, size_t most);
/* Item `index` of the array that `name` is. */
int64_t field_item_int(Fields *fields, const char *name, const JsonValue *array, size_t index, int64_t least,
                       int64_t most);
const char *field_item_text(Fields *fields, const char *name, const JsonValue *array, size_t index);
const JsonValue *field_object(Fields *fields, const char *name);
bool field_is_null(Fields *fields, const char *name); /* true marks it seen; false leaves it to be read */
bool field_is_given(Fields *fields, const char *name); /* of one that may be missing; leaves it to be read */
void fields_problem(Fields *fields, const char *format, ...) __attribute__((format(printf, 2, 3)));
StiCode fields_end(Fields *fields);

/* ------------------------------------------------------------------ writing */

/* Keys must be given in ascending byte order: the writer asserts nothing, tests compare with canonical_json. */
void json_key(Text *out, const char *key);  /* writes a comma where one is due, then "key": */
void json_text(Text *out, const char *text); /* what is not UTF-8 is written as U+FFFD */
void json_text_n(Text *out, const char *text, size_t length);
void json_int(Text *out, int64_t value);
void json_number(Text *out, double value);  /* shortest text that reads back the same, spelled as Python's repr */
enum { JSON_NUMBER_ROOM = 40 };
size_t json_spell_number(char text[JSON_NUMBER_ROOM], double value); /* the same into a buffer; returns its length */
void json_bool(Text *out, bool value);
void json_null(Text *out);
void json_open(Text *out, char bracket);    /* '{' or '[' */
void json_close(Text *out, char bracket);   /* '}' or ']' */
/* Commas: any of the above writes ',' first when the byte before it is not one of "{[:," and is not the start. */

/* "key":value */
void json_int_field(Text *out, const char *key, int64_t value);
void json_text_field(Text *out, const char *key, const char *value);
void json_bool_field(Text *out, const char *key, bool value);

void json_canonical(Text *out, const JsonValue *value); /* any parsed value, keys sorted */

#endif
