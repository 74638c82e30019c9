/* embedding_rows.h: which pages of embeddings.bin a request needs, and its rows out of them.
 *
 * A request reads the rows of its distinct tokens, the first L position rows and its token-type rows as whole 4 KiB
 * pages, each page once. The pages lie in one buffer in file order, so a row that crosses a page border is contiguous.
 */
#ifndef STI_EMBEDDING_ROWS_H
#define STI_EMBEDDING_ROWS_H

#include "formats.h"

/* B rows of task data, cut to L tokens. */
typedef struct {
  const int32_t *input_ids;   /* [B, L] */
  const int32_t *token_types; /* [B, L]; NULL is allowed when the model has none */
  const int32_t *lengths;     /* [B] real tokens */
  int32_t batch, tokens;      /* B, L */
} Rows;

/* Neighbouring pages read as one: file range, where it lies in the buffer, what the file has of it. */
typedef struct { int64_t offset, length, required, start; } PageRun;

/* The page reads of a request and where its rows lie. Zero-initialise. */
typedef struct {
  PageRun *runs; /* [run_count] ascending */
  int32_t run_count;
  int64_t buffer_bytes, required_bytes;
  uint8_t *buffer;        /* [buffer_bytes] the pages in file order */
  const float **words;    /* [B, L] → row [H] */
  const float **types;    /* [B, L] → row [H]; NULL when the model has none */
  const float *positions; /* [L, H] */
  int64_t peak_bytes;     /* largest buffer_bytes since it was last set */
  /* room */
  uint64_t *wanted;     /* [word_count] bitmap of pages of the file */
  int32_t *before;      /* [word_count] pages wanted below each of its words */
  int32_t word_count, run_room;
  int64_t cell_room, buffer_room;
} RowReads;

/* Errors: STI_INPUT if a token is outside the vocabulary or the sequence longer than the positions. */
StiCode rows_check(const Manifest *manifest, const Rows *rows, StiError *error);
/* Make room for any rows of this shape, before a request starts. Errors: STI_RESOURCE. */
StiCode rows_reserve(RowReads *reads, const Manifest *manifest, int32_t batch, int32_t tokens, StiError *error);
/* The reads of checked rows; allocates nothing. */
void rows_plan(RowReads *reads, const Manifest *manifest, const Rows *rows);
void rows_free(RowReads *reads);

#endif
