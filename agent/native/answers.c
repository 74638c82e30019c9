/* answers.c: errors as JSON, and one answer for each line of standard input. */
#include "answers.h"

#include <stdio.h>
#include <stdlib.h>

#include "../../sti_runtime/native/json.h"

void write_error(Text *out, const StiError *error) {
  json_open(out, '{');
  json_key(out, "error"), json_open(out, '{');
  json_text_field(out, "remedy", error->remedy);
  if (error->code == STI_INFEASIBLE) json_int_field(out, "smallest_target_ns", error->smallest_target_ns);
  json_text_field(out, "type", sti_error_name(error->code));
  json_text_field(out, "what", error->what);
  json_close(out, '}');
  json_close(out, '}');
}

void print_out_of_memory(void) {
  StiError error;
  sti_out_of_memory(&error); /* its words need no escaping */
  printf("{\"error\":{\"remedy\":\"%s\",\"type\":\"%s\",\"what\":\"%s\"}}\n", error.remedy,
         sti_error_name(error.code), error.what);
}

static void answer_one(AnswerFunction *answer, void *context, const char *line, size_t length, Text *out) {
  StiError problem = {0};
  Arena arena = {0};
  text_clear(out);
  if (answer(context, &arena, line, length, out, &problem) != STI_OK) {
    text_clear(out);
    write_error(out, &problem);
  }
  text_append(out, "\n", 1);
  arena_free(&arena);
}

StiCode answer_lines(AnswerFunction *answer, void *context, StiError *error) {
  char *line = NULL;
  size_t capacity = 0;
  ssize_t length;
  Text out = {0};
  StiCode code = STI_OK;
  while (code == STI_OK && (length = getline(&line, &capacity, stdin)) >= 0) {
    if (length > 0 && line[length - 1] == '\n') line[--length] = '\0';
    answer_one(answer, context, line, (size_t)length, &out);
    if (out.failed) code = sti_out_of_memory(error);
    else if (fwrite(out.data, 1, out.length, stdout) != out.length || fflush(stdout) != 0)
      code = sti_fail(error, STI_RESOURCE, "Nobody reads it any more, or the storage is full.",
                      "The answers cannot be written.");
  }
  text_free(&out);
  free(line);
  return code;
}
