/* quantity.h: sizes and durations as people write and read them (sti_runtime/units.py). */
#ifndef STI_QUANTITY_H
#define STI_QUANTITY_H

#include "base.h"

enum { QUANTITY_CHARS = 32 };

/* "4MB", "512 KiB", "4096"; "150ms", "0.2 s". `option` names the source in messages: "--preload". Errors: STI_INPUT. */
StiCode parse_bytes(const char *text, const char *option, int64_t *bytes, StiError *error);
StiCode parse_duration_ns(const char *text, const char *option, int64_t *duration_ns, StiError *error);

void format_bytes(int64_t bytes, char text[QUANTITY_CHARS]);       /* "1.2 MB" */
void format_ns(int64_t duration_ns, char text[QUANTITY_CHARS]);    /* "12.3 ms" */
void format_ns_up(int64_t duration_ns, char text[QUANTITY_CHARS]); /* "60.7 ms" of 60.62 ms: what is shown is enough */

#endif
