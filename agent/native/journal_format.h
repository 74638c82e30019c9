/* journal_format.h: the bytes of a journal: one line per record, checked by a checksum (docs/job-and-journal.md, 3).
 *
 *     <seq> <crc32 of the JSON, 8 hex digits> <canonical JSON of {boot_id, payload, seq, wall_ns}>\n
 */
#ifndef AGENT_JOURNAL_FORMAT_H
#define AGENT_JOURNAL_FORMAT_H

#include "fence.h"

enum {
  LINE_CAP_BYTES = RECORD_CAP_BYTES + 40, /* sequence number of at most 19 digits, two blanks, checksum, newline */
  UNIT_CAP = 100000,                      /* most units of a job */
  SETTING_REPORTS_MOST = 1024,            /* in a start or end record */
};

typedef enum { RECORD_END, RECORD_FAILURE, RECORD_RESULT, RECORD_START } RecordType;

/* What the agent needs of a record. Texts lie in the arena it was decoded into. */
typedef struct {
  int64_t seq;
  RecordType type;
  int64_t unit;        /* result, failure */
  Lease lease;         /* start */
  const char *refused; /* end; NULL for null */
} Record;

/* The JSON of one line (given without its newline) after length, shape and checksum were checked; false: a bad line. */
bool line_body(const char *line, size_t length, uint64_t *seq, const char **body, size_t *body_length);
/* Validate one record: its envelope and payload; of a result its kind (its inside is the host's to check).
 * Errors: STI_FORMAT naming `source`, STI_RESOURCE. */
StiCode record_decode(Arena *arena, const char *body, size_t length, const char *source, Record *record,
                      StiError *error);

#endif
