/* fuzz_driver.c: runs a fuzz target (LLVMFuzzerTestOneInput) where libFuzzer is not to be had: on files, and on mutations
 * of them that are the same each time.
 *
 *   fuzz_<what> MUTATIONS SEED FILE…     each file as it is, then MUTATIONS inputs made from each
 *
 * Targets abort, or the sanitizers do; with libFuzzer they are built with -fsanitize=fuzzer and without this file.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Set up by environment or arguments; most targets have none. */
__attribute__((weak)) int LLVMFuzzerInitialize(int *argc, char ***argv);

typedef struct {
  uint8_t *data; /* [size] */
  size_t size;
} Input;

/* ------------------------------------------------------------------ chance */

static uint64_t chance_state;

/* splitmix64 */
static uint64_t chance(uint64_t below) {
  uint64_t z = chance_state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return (z ^ z >> 31) % below;
}

/* ------------------------------------------------------------------ mutations */

/* What breaks readers of text: edges of integers, other kinds of values, escapes, brackets, control characters. */
enum { EDGES = 11 }; /* pieces that are numbers */
static const char *const pieces[] = {
    "0", "-1", "1", "4096", "16777216", "2147483647", "2147483648", "4294967296", "9223372036854775807",
    "9223372036854775808", "-0", "1e999", "0.1", "null", "true", "\"\"", "[]", "{}", "[", "]", "{", "}", ",", ":", "\"", "\\", "\\u0000", "\\ud800",
    "\\ud83d\\ude00", "\n", "\t", " ", "\x80", "\xC3", "\xF4\x8F\xBF\xBF", "\xFF", "[[[[[[[[[[[[[[[[",
};

/* data with [at, end) replaced by `piece`. */
static Input replaced(Input input, size_t at, size_t end, const void *piece, size_t length) {
  Input made = {malloc(input.size - (end - at) + length + 1), input.size - (end - at) + length};
  if (made.data == NULL) abort();
  memcpy(made.data, input.data, at);
  memcpy(made.data + at, piece, length);
  memcpy(made.data + at + length, input.data + end, input.size - end);
  return made;
}

/* The run of digits and signs, or of letters, around `at`: a number, a word, a key. */
static void token(Input input, size_t at, size_t *start, size_t *end) {
  const char *plain = "0123456789+-.eEabcdfghijklmnopqrstuvwxyz_";
  *start = *end = at;
  while (*start > 0 && input.data[*start - 1] != 0 && strchr(plain, input.data[*start - 1]) != NULL) --*start;
  while (*end < input.size && input.data[*end] != 0 && strchr(plain, input.data[*end]) != NULL) ++*end;
}

/* The next number behind `at` moved by a little, or to an edge: the deepest checks look at numbers. */
static Input number_changed(Input input, size_t at) {
  size_t start = at, end;
  while (start < input.size && (input.data[start] < '0' || input.data[start] > '9')) start++;
  for (end = start; end < input.size && input.data[end] >= '0' && input.data[end] <= '9';) end++;
  char text[24] = "";
  if (end - start < 19) memcpy(text, input.data + start, end - start);
  const int64_t value = strtoll(text, NULL, 10), steps[] = {-4096, -64, -1, 1, 64, 4096, value, -value};
  const char *edge = pieces[chance(EDGES)];
  snprintf(text, sizeof text, "%" PRId64, value + steps[chance(8)]);
  if (chance(3) == 0) return replaced(input, start, end, edge, strlen(edge));
  return replaced(input, start, end, text, strlen(text));
}

static Input mutated(Input input, Input other) {
  const char *piece = pieces[chance(sizeof pieces / sizeof *pieces)];
  size_t at = chance(input.size + 1), left = input.size - at;
  size_t run = left == 0 ? 0 : 1 + chance(left < 40 ? left : 40), start, end;
  uint8_t byte = (uint8_t)chance(256);
  switch (chance(12)) {
    case 0: return replaced(input, at, at + (left > 0), &byte, 1);
    case 1: return replaced(input, at, at + run, "", 0);
    case 2: return replaced(input, at, at, input.data + at, run);
    case 3: return replaced(input, at, at, piece, strlen(piece));
    case 4: /* the end cut off, rarely: little else is reached behind it */
      if (chance(8) == 0) return replaced(input, at, input.size, "", 0);
      return replaced(input, at, at + (left > 0), &byte, 1);
    case 5: /* a run of another file */
      start = chance(other.size + 1);
      end = start + chance(other.size - start + 1) % 200;
      return replaced(input, at, at + run, other.data + start, end - start);
    case 6: /* one token of this file for another */
      token(input, at, &start, &end);
      at = chance(input.size + 1);
      size_t from, to;
      token(input, at, &from, &to);
      return replaced(input, start, end, input.data + from, to - from);
    case 7:
      token(input, at, &start, &end);
      return replaced(input, start, end, piece, strlen(piece));
    default: return number_changed(input, at);
  }
}

/* ------------------------------------------------------------------ running */

static Input read_input(const char *path) {
  FILE *file = fopen(path, "rb");
  Input input = {malloc(1 << 20), 0};
  if (file == NULL || input.data == NULL) {
    perror(path);
    exit(2);
  }
  input.size = fread(input.data, 1, 1 << 20, file);
  fclose(file);
  return input;
}

/* A copy of exactly the input's size, so that a read past its end is seen. */
static void run(Input input) {
  uint8_t *copy = malloc(input.size == 0 ? 1 : input.size);
  if (copy == NULL) abort();
  if (input.size != 0) memcpy(copy, input.data, input.size);
  LLVMFuzzerTestOneInput(copy, input.size);
  free(copy);
}

int main(int argc, char **argv) {
  if (LLVMFuzzerInitialize != NULL) LLVMFuzzerInitialize(&argc, &argv);
  if (argc < 4) return 2;
  int64_t mutations = strtoll(argv[1], NULL, 10);
  chance_state = strtoull(argv[2], NULL, 10);
  size_t count = (size_t)argc - 3;
  Input *inputs = calloc(count, sizeof *inputs);
  if (inputs == NULL) return 2;
  for (size_t i = 0; i < count; i++) inputs[i] = read_input(argv[3 + i]);
  for (size_t i = 0; i < count; i++) {
    run(inputs[i]);
    for (int64_t k = 0; k < mutations; k++) {
      Input made = mutated(inputs[i], inputs[chance(count)]);
      for (uint64_t more = chance(6) / 3 * chance(3); more > 0; more--) {
        Input again = mutated(made, inputs[chance(count)]);
        free(made.data);
        made = again;
      }
      run(made);
      free(made.data);
    }
  }
  for (size_t i = 0; i < count; i++) free(inputs[i].data);
  free(inputs);
  return 0;
}
