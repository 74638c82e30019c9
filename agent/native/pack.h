/* pack.h: the first line of what `accept` takes in: which chunks follow, in which order (docs/job-and-journal.md, 6). */
#ifndef AGENT_PACK_H
#define AGENT_PACK_H

#include "incoming.h"

enum { PACK_HEADER_CAP_BYTES = 1 << 20 };

typedef struct {
  int32_t *chunks; /* [count], distinct, each below the layout's chunk_count */
  int32_t count;
} Pack;

/* The line without what follows it; length 0: there was none within the cap. Errors: STI_FORMAT, STI_RESOURCE. */
StiCode pack_parse(Arena *arena, const char *line, size_t length, const Layout *layout, Pack *pack, StiError *error);

#endif
