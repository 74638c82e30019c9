/* pack.c: see pack.h. */
#include "pack.h"

#include <stdarg.h>
#include <stdio.h>

#include "../../sti_runtime/native/json.h"

static StiCode not_a_pack(StiError *error, const char *format, ...) __attribute__((format(printf, 2, 3)));

static StiCode not_a_pack(StiError *error, const char *format, ...) {
  char cause[200];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(cause, sizeof cause, format, arguments);
  va_end(arguments);
  return sti_fail(error, STI_FORMAT, RESEND, "The input is not a pack: %s.", cause);
}

static bool is_list_of_integers(const JsonValue *value) {
  if (value->kind != JSON_ARRAY) return false;
  for (size_t i = 0; i < value->array.count; i++)
    if (value->array.items[i].kind != JSON_INT && value->array.items[i].kind != JSON_BIG) return false;
  return true;
}

static StiCode take_numbers(Arena *arena, const Layout *layout, Pack *pack, const JsonValue *list, StiError *error) {
  ChunkSet seen;
  STI_TRY(chunk_set(arena, layout, &seen, error));
  pack->chunks = arena_alloc(arena, list->array.count * sizeof *pack->chunks);
  if (pack->chunks == NULL) return sti_out_of_memory(error);
  for (size_t i = 0; i < list->array.count; i++) {
    const JsonValue *item = &list->array.items[i];
    bool known = item->kind == JSON_INT && item->integer >= 0 && item->integer < layout->chunk_count;
    if (!known || seen.has[item->integer])
      return not_a_pack(error, "its chunk numbers are not distinct numbers below %d", (int)layout->chunk_count);
    chunk_add(&seen, (int32_t)item->integer);
    pack->chunks[pack->count++] = (int32_t)item->integer;
  }
  return STI_OK;
}

StiCode pack_parse(Arena *arena, const char *line, size_t length, const Layout *layout, Pack *pack, StiError *error) {
  JsonValue *list;
  StiError ignored;
  *pack = (Pack){0};
  if (length == 0) return not_a_pack(error, "its first line has no end within %d bytes", PACK_HEADER_CAP_BYTES);
  StiCode code = json_parse(arena, line, length, "pack", &list, &ignored);
  if (code == STI_RESOURCE) return sti_out_of_memory(error);
  if (code != STI_OK || !is_list_of_integers(list))
    return not_a_pack(error, "its first line is not a JSON list of integers");
  return take_numbers(arena, layout, pack, list, error);
}
