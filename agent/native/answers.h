/* answers.h: how the executable answers: an error as JSON, and questions that come as lines on standard input. */
#ifndef AGENT_ANSWERS_H
#define AGENT_ANSWERS_H

#include "../../sti_runtime/native/base.h"

/* {"error": {"remedy", "type", "what"}} and, where a larger T works, "smallest_target_ns". */
void write_error(Text *out, const StiError *error);

/* The same of sti_out_of_memory, to standard output, where there is no memory to build it in. */
void print_out_of_memory(void);

/* Answer one line, given NUL-terminated without its newline, by one line; arena is freed after it. */
typedef StiCode AnswerFunction(void *context, Arena *arena, const char *line, size_t length, Text *out,
                               StiError *error);

/* Until standard input ends; each answer, or its error, leaves before the next line is read.
 * Errors: STI_RESOURCE when the answers cannot be written. */
StiCode answer_lines(AnswerFunction *answer, void *context, StiError *error);

#endif
