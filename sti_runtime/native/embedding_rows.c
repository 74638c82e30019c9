/* embedding_rows.c: token ids → page runs → pointers to rows. */
#include "embedding_rows.h"

#include <stdlib.h>
#include <string.h>

enum { MERGE_PAGES = STI_MERGE_LIMIT_BYTES / STI_ALIGNMENT };

static int64_t file_bytes_of(const Manifest *manifest) { return manifest_file_bytes(manifest, "embeddings.bin"); }

/* ------------------------------------------------------------------ checks */

static void bounds(const int32_t *values, int64_t count, int32_t *lowest, int32_t *highest) {
  *lowest = *highest = values[0];
  for (int64_t i = 1; i < count; i++) {
    if (values[i] < *lowest) *lowest = values[i];
    if (values[i] > *highest) *highest = values[i];
  }
}

StiCode rows_check(const Manifest *manifest, const Rows *rows, StiError *error) {
  const ModelConfig *model = &manifest->model;
  const int64_t cells = (int64_t)rows->batch * rows->tokens, longest = model->positions - model->position_offset;
  int32_t lowest, highest;
  for (int32_t i = 0; i < rows->batch; i++)
    if (rows->tokens > longest || rows->lengths[i] < 1 || rows->lengths[i] > rows->tokens)
      return sti_fail(error, STI_INPUT, "Tokenize the task with fewer tokens.",
                      "%d of %d tokens do not fit a model of %lld.", (int)rows->lengths[i], (int)rows->tokens,
                      (long long)longest);
  bounds(rows->input_ids, cells, &lowest, &highest);
  if (lowest < 0 || highest >= model->vocab)
    return sti_fail(error, STI_INPUT, "Tokenize the task with this model's tokenizer.",
                    "Token id %d is outside the model's vocabulary of %lld.", (int)(lowest >= 0 ? highest : lowest),
                    (long long)model->vocab);
  if (model->token_types == 0) return STI_OK;
  bounds(rows->token_types, cells, &lowest, &highest);
  if (lowest < 0 || highest >= model->token_types)
    return sti_fail(error, STI_INPUT, "Tokenize the task for this model.", "A token type is outside the model's.");
  return STI_OK;
}

/* ------------------------------------------------------------------ room */

void rows_free(RowReads *reads) {
  free(reads->runs);
  free(reads->words);
  free(reads->types);
  free(reads->wanted);
  free(reads->before);
  if (reads->buffer != NULL) pages_free(reads->buffer, (size_t)reads->buffer_room);
  *reads = (RowReads){.peak_bytes = reads->peak_bytes};
}

/* Pages that any `rows` rows of `row_bytes` touch, wherever they lie. */
static int64_t pages_of_rows(int64_t rows, int64_t row_bytes) {
  return rows * ((row_bytes + STI_ALIGNMENT - 2) / STI_ALIGNMENT + 1);
}

StiCode rows_reserve(RowReads *reads, const Manifest *manifest, int32_t batch, int32_t tokens, StiError *error) {
  const ModelConfig *model = &manifest->model;
  const int64_t cells = (int64_t)batch * tokens, row_bytes = manifest->word.row_bytes;
  if (reads->words != NULL && reads->cell_room >= cells) return STI_OK;
  rows_free(reads);
  const int64_t kinds = model->token_types < cells ? model->token_types : cells;
  const int64_t file_pages = (file_bytes_of(manifest) + STI_ALIGNMENT - 1) / STI_ALIGNMENT;
  const int64_t positions = model->positions < cells ? model->positions : cells;
  int64_t pages = pages_of_rows(cells + kinds, row_bytes) + pages_of_rows(1, positions * row_bytes);
  if (pages > file_pages) pages = file_pages;
  const int64_t runs = cells + kinds + 1 + pages / MERGE_PAGES + 1; /* one per row, and those cut at 1 MiB */
  if (runs > INT32_MAX || file_pages > INT32_MAX || pages > PTRDIFF_MAX / STI_ALIGNMENT)
    return sti_out_of_memory(error);
  reads->cell_room = cells;
  reads->run_room = (int32_t)runs;
  reads->word_count = (int32_t)(file_pages / 64 + 1);
  reads->buffer_room = pages * STI_ALIGNMENT;
  reads->runs = calloc((size_t)runs, sizeof *reads->runs);
  reads->words = calloc((size_t)cells, sizeof *reads->words);
  reads->types = model->token_types > 0 ? calloc((size_t)cells, sizeof *reads->types) : NULL;
  reads->wanted = calloc((size_t)reads->word_count, sizeof *reads->wanted);
  reads->before = calloc((size_t)reads->word_count, sizeof *reads->before);
  reads->buffer = pages_alloc((size_t)reads->buffer_room);
  if (reads->runs != NULL && reads->words != NULL && (reads->types != NULL || model->token_types == 0) &&
      reads->wanted != NULL && reads->before != NULL && reads->buffer != NULL)
    return STI_OK;
  rows_free(reads);
  return sti_out_of_memory(error);
}

/* ------------------------------------------------------------------ the reads of a request */

static void want(RowReads *reads, int64_t offset, int64_t bytes) {
  for (int64_t page = offset / STI_ALIGNMENT; page <= (offset + bytes - 1) / STI_ALIGNMENT; page++)
    reads->wanted[page / 64] |= UINT64_C(1) << page % 64;
}

/* File offset of a wanted byte → its address in the buffer. */
static const float *address(const RowReads *reads, int64_t offset) {
  const int64_t page = offset / STI_ALIGNMENT;
  const uint64_t below = reads->wanted[page / 64] & ((UINT64_C(1) << page % 64) - 1);
  const int64_t index = reads->before[page / 64] + __builtin_popcountll(below);
  return (const float *)(const void *)(reads->buffer + index * STI_ALIGNMENT + offset % STI_ALIGNMENT);
}

/* Number the wanted pages and cut them into runs. */
static void find_runs(RowReads *reads, int64_t file_bytes) {
  PageRun *run = NULL;
  int32_t pages = 0;
  reads->run_count = 0;
  for (int32_t word = 0; word < reads->word_count; word++) {
    reads->before[word] = pages;
    for (uint64_t rest = reads->wanted[word]; rest != 0; rest &= rest - 1) {
      const int64_t page = (int64_t)word * 64 + __builtin_ctzll(rest);
      if (run == NULL || run->offset + run->length != page * STI_ALIGNMENT || run->length == STI_MERGE_LIMIT_BYTES) {
        run = &reads->runs[reads->run_count++];
        *run = (PageRun){.offset = page * STI_ALIGNMENT, .start = (int64_t)pages * STI_ALIGNMENT};
      }
      run->length += STI_ALIGNMENT;
      pages += 1;
    }
  }
  reads->buffer_bytes = (int64_t)pages * STI_ALIGNMENT;
  reads->required_bytes = 0;
  for (int32_t i = 0; i < reads->run_count; i++) {
    run = &reads->runs[i];
    run->required = run->length < file_bytes - run->offset ? run->length : file_bytes - run->offset;
    reads->required_bytes += run->required;
  }
  if (reads->buffer_bytes > reads->peak_bytes) reads->peak_bytes = reads->buffer_bytes;
}

void rows_plan(RowReads *reads, const Manifest *manifest, const Rows *rows) {
  const EmbeddingTable *word = &manifest->word, *position = &manifest->position, *type = &manifest->token_type;
  const int64_t cells = (int64_t)rows->batch * rows->tokens;
  const int64_t first = position->offset + manifest->model.position_offset * position->row_bytes;
  memset(reads->wanted, 0, (size_t)reads->word_count * sizeof *reads->wanted);
  want(reads, first, rows->tokens * position->row_bytes);
  for (int64_t i = 0; i < cells; i++) want(reads, word->offset + rows->input_ids[i] * word->row_bytes, word->row_bytes);
  for (int64_t i = 0; i < cells && reads->types != NULL; i++)
    want(reads, type->offset + rows->token_types[i] * type->row_bytes, type->row_bytes);
  find_runs(reads, file_bytes_of(manifest));
  reads->positions = address(reads, first);
  for (int64_t i = 0; i < cells; i++)
    reads->words[i] = address(reads, word->offset + rows->input_ids[i] * word->row_bytes);
  for (int64_t i = 0; i < cells && reads->types != NULL; i++)
    reads->types[i] = address(reads, type->offset + rows->token_types[i] * type->row_bytes);
}
