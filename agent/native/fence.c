/* fence.c: see fence.h. */
#include "fence.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "locks.h"

static const double lock_wait_s = 10;
enum { FENCE_CAP_BYTES = 16 << 20 };

/* Content of fence.json; in an arena. */
typedef struct {
  bool present;
  const char *owner;
  const JsonValue *counters; /* an object: store -> counter */
} Fence;

/* ------------------------------------------------------------------ leases */

bool lease_copy(const Lease *lease, LeaseText *copy) {
  size_t length = strlen(lease->store);
  if (length >= STORE_BYTES) return false;
  memcpy(copy->store, lease->store, length + 1);
  copy->lease = (Lease){.store = copy->store, .counter = lease->counter, .takeover = lease->takeover};
  return true;
}

bool lease_equal(const Lease *a, const Lease *b) {
  return a->counter == b->counter && a->takeover == b->takeover && strcmp(a->store, b->store) == 0;
}

static size_t characters(const char *text, size_t length) {
  size_t count = 0;
  for (size_t i = 0; i < length; i++) count += ((unsigned char)text[i] & 0xc0) != 0x80;
  return count;
}

/* Decimal digits below 2^63 up to `end`. */
static bool parse_counter(const char *text, const char *end, int64_t *counter) {
  *counter = 0;
  if (text == end) return false;
  for (; text < end; text++) {
    if (*text < '0' || *text > '9') return false;
    if (__builtin_mul_overflow(*counter, 10, counter) || __builtin_add_overflow(*counter, *text - '0', counter))
      return false;
  }
  return true;
}

StiCode lease_parse(const char *text, LeaseText *lease, StiError *error) {
  size_t store = strcspn(text, ":");
  const char *counter = text + store + (text[store] == ':');
  const char *end = counter + strcspn(counter, ":");
  lease->lease = (Lease){.store = lease->store, .takeover = strcmp(end, ":takeover") == 0};
  if (!parse_counter(counter, end, &lease->lease.counter) || (*end != '\0' && !lease->lease.takeover))
    return sti_fail(error, STI_INPUT, "Write STORE:COUNTER or STORE:COUNTER:takeover.", "'%.80s' is not a lease.",
                    text);
  if (store == 0 || store >= STORE_BYTES || characters(text, store) > STORE_CHARS)
    return sti_fail(error, STI_INPUT, "The store's id has 1–64 characters.", "'%.80s' is not a lease.", text);
  memcpy(lease->store, text, store);
  lease->store[store] = '\0';
  return STI_OK;
}

/* ------------------------------------------------------------------ the rule */

static bool is_of_store(const JsonMember *member, const char *store) {
  return strlen(store) == member->key_length && memcmp(store, member->key, member->key_length) == 0;
}

/* -1: none was seen of this store. */
static int64_t highest_seen(const Fence *fence, const char *store) {
  for (size_t i = 0; fence->present && i < fence->counters->object.count; i++)
    if (is_of_store(&fence->counters->object.members[i], store))
      return fence->counters->object.members[i].value->integer;
  return -1;
}

/* Why the lease is refused, "" when it is not. */
static void refusal(const Fence *fence, const Lease *lease, bool takeover, char reason[REASON_CHARS]) {
  reason[0] = '\0';
  if (!fence->present) return;
  int64_t highest = highest_seen(fence, lease->store);
  if (strcmp(lease->store, fence->owner) != 0 && !takeover)
    snprintf(reason, REASON_CHARS, "the device belongs to store '%.260s', this lease is of store '%.260s'",
             fence->owner, lease->store);
  else if (lease->counter < highest)
    snprintf(reason, REASON_CHARS,
             "the lease has counter %" PRId64 ", %" PRId64 " was seen already: its controller is stale", lease->counter,
             highest);
}

/* ------------------------------------------------------------------ the file */

static const StoredFormat stored = {"Fence", "stifarm-fence", 1, false, STI_FORMAT};

static StiCode parse_fence(Arena *arena, const char *data, size_t length, const char *path, Fence *fence,
                           StiError *error) {
  JsonValue *value;
  Fields fields;
  STI_TRY(json_parse(arena, data, length, path, &value, error));
  fields_begin_stored(&fields, value, &stored, path, "", error);
  fence->counters = field_object(&fields, "counters");
  fence->owner = field_text(&fields, "owner", 1, STORE_CHARS);
  STI_TRY(fields_end(&fields));
  for (size_t i = 0; i < fence->counters->object.count; i++) {
    const JsonMember *member = &fence->counters->object.members[i];
    if (member->value->kind != JSON_INT || member->value->integer < 0)
      fields_problem(&fields, "counters.%.64s must be an integer of at least 0", member->key);
  }
  fence->present = true;
  return fields.code;
}

static StiCode read_fence(Arena *arena, const Spool *spool, Fence *fence, StiError *error) {
  Path path;
  const char *data;
  size_t length;
  spool_path(spool, path, "fence.json");
  *fence = (Fence){0};
  if (access(path, F_OK) != 0) return STI_OK;
  STI_TRY(read_file(arena, path, FENCE_CAP_BYTES, &data, &length, error));
  return parse_fence(arena, data, length, path, fence, error);
}

/* The fence after the lease was let in. */
static StiCode write_fence(Arena *arena, const Spool *spool, const Fence *fence, const Lease *lease, StiError *error) {
  JsonValue counter = {.kind = JSON_INT, .integer = lease->counter}, counters = {.kind = JSON_OBJECT};
  size_t before = fence->present ? fence->counters->object.count : 0;
  JsonMember *members = arena_alloc(arena, (before + 1) * sizeof *members);
  if (members == NULL) return sti_out_of_memory(error);
  counters.object.members = members;
  members[counters.object.count++] =
      (JsonMember){.key = lease->store, .key_length = strlen(lease->store), .value = &counter};
  for (size_t i = 0; i < before; i++)
    if (!is_of_store(&fence->counters->object.members[i], lease->store))
      members[counters.object.count++] = fence->counters->object.members[i];

  Text text = {0};
  Path path;
  spool_path(spool, path, "fence.json");
  json_open(&text, '{');
  json_key(&text, "counters"), json_canonical(&text, &counters);
  json_text_field(&text, "format", stored.format);
  json_text_field(&text, "owner", lease->store);
  json_int_field(&text, "version", stored.version);
  json_close(&text, '}');
  StiCode code = text.failed ? sti_out_of_memory(error) : write_atomic(path, text.data, text.length, error);
  text_free(&text);
  return code;
}

StiCode fence_refused(const char *reason, StiError *error) {
  return sti_fail(error, STI_REFUSED, "Take a new lease; to move the device to another store, take it over explicitly.",
                  "Refused: %s.", reason);
}

/* After a failed read: what it said, with what to do. */
static StiCode fence_damaged(StiError *error) {
  StiError said = *error;
  return sti_fail(error, STI_FORMAT,
                  "Nobody knows whose the device is. Take it over explicitly: that writes the file anew.", "%s",
                  said.what);
}

static StiCode admit_held(Arena *arena, const Spool *spool, const Lease *lease, StiError *error) {
  Fence fence;
  char reason[REASON_CHARS];
  StiCode code = read_fence(arena, spool, &fence, error);
  if (code == STI_FORMAT && lease->takeover)
    fence = (Fence){0};
  else if (code == STI_FORMAT)
    return fence_damaged(error);
  else
    STI_TRY(code);
  refusal(&fence, lease, lease->takeover, reason);
  if (reason[0]) return fence_refused(reason, error);
  bool known = fence.present && strcmp(fence.owner, lease->store) == 0 &&
               highest_seen(&fence, lease->store) == lease->counter;
  return known ? STI_OK : write_fence(arena, spool, &fence, lease, error);
}

StiCode fence_admit(const Spool *spool, const Lease *lease, StiError *error) {
  Arena arena = {0};
  Path path;
  Lock lock;
  spool_path(spool, path, "locks/fence");
  STI_TRY(lock_hold(path, lock_wait_s, "The fence", "", &lock, error));
  StiCode code = admit_held(&arena, spool, lease, error);
  lock_release(&lock);
  arena_free(&arena);
  return code;
}

StiCode fence_still_admits(const Spool *spool, const Lease *lease, char reason[REASON_CHARS], StiError *error) {
  Arena arena = {0};
  Fence fence;
  reason[0] = '\0';
  StiCode code = read_fence(&arena, spool, &fence, error);
  if (code == STI_OK) refusal(&fence, lease, false, reason);
  arena_free(&arena);
  return code;
}
