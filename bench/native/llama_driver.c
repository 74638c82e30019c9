/* llama_driver.c: llama.cpp as a peer: a classifier loaded from a GGUF file, then requests one after the other.
 *
 *     llama_driver quantize IN OUT q4_0|q8_0
 *     llama_driver run MODEL mmap|direct THREADS ROWS_FILE TOKENS REQUESTS
 *
 * ROWS_FILE: int32 token ids [rows, TOKENS]. `run` prints the JSON of bench/peers/report.py.
 */
#include <llama.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long long monotonic_ns(void)
{
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void silent(enum ggml_log_level level, const char *text, void *state)
{
  (void)state;
  if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static int quantize(const char *from, const char *to, const char *type)
{
  struct llama_model_quantize_params params = llama_model_quantize_default_params();
  params.nthread = 2;
  params.ftype = strcmp(type, "q4_0") ? LLAMA_FTYPE_MOSTLY_Q8_0 : LLAMA_FTYPE_MOSTLY_Q4_0;
  return llama_model_quantize(from, to, &params) ? 1 : 0;
}

/* All token ids of the file; NULL when it cannot be read. */
static llama_token *read_rows(const char *path, int tokens, int *rows)
{
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) return NULL;
  long bytes = ftell(file);
  llama_token *ids = malloc(bytes > 0 ? (size_t)bytes : 1);
  *rows = (int)(bytes / (long)(sizeof *ids) / tokens);
  if (ids && (fseek(file, 0, SEEK_SET) || *rows < 1 || fread(ids, 1, (size_t)bytes, file) != (size_t)bytes)) return NULL;
  fclose(file);
  return ids;
}

static long long peak_bytes(void)
{
  char line[256];
  long long kilobytes = 0;
  FILE *file = fopen("/proc/self/status", "r");
  while (file && fgets(line, sizeof line, file))
    if (sscanf(line, "VmHWM: %lld", &kilobytes) == 1) break;
  if (file) fclose(file);
  return kilobytes * 1024;
}

static int run(char **argv)
{
  int tokens = atoi(argv[6]), requests = atoi(argv[7]), threads = atoi(argv[4]), rows = 0;
  llama_token *ids = read_rows(argv[5], tokens, &rows);
  long long *took = calloc((size_t)requests, sizeof *took);
  if (!ids || !took || requests < 1) return 1;

  long long began = monotonic_ns(), first = 0, peak = 0;
  struct llama_model_params model_params = llama_model_default_params();
  model_params.load_mode = strcmp(argv[3], "direct") ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_DIRECT_IO;
  struct llama_model *model = llama_model_load_from_file(argv[2], model_params);
  if (!model) return 1;
  struct llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = (uint32_t)tokens;
  params.n_threads = params.n_threads_batch = threads;
  params.embeddings = true;
  params.pooling_type = LLAMA_POOLING_TYPE_RANK; /* the first token through pooler and classifier */
  struct llama_context *context = llama_init_from_model(model, params);
  if (!context) return 1;
  int labels = (int)llama_model_n_cls_out(model);
  float *logits = calloc((size_t)requests * (size_t)labels, sizeof *logits);
  struct llama_batch batch = llama_batch_init(tokens, 0, 1);
  if (!logits) return 1;

  for (int request = 0; request < requests; request++) {
    long long start = monotonic_ns();
    batch.n_tokens = tokens;
    for (int i = 0; i < tokens; i++) {
      batch.token[i] = ids[request % rows * tokens + i];
      batch.pos[i] = i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = 1;
    }
    if (llama_encode(context, batch)) return 1;
    const float *found = llama_get_embeddings_seq(context, 0);
    if (!found) return 1;
    memcpy(logits + (size_t)request * (size_t)labels, found, (size_t)labels * sizeof *logits);
    long long now = monotonic_ns();
    took[request] = now - start;
    if (!request) {
      first = now;
      peak = peak_bytes();
    }
  }

  printf("{\"began_ns\":%lld,\"logits_ns\":%lld,\"peak_bytes\":%lld,\"steady_ns\":[", began, first, peak);
  for (int i = 1; i < requests; i++) printf("%s%lld", i > 1 ? "," : "", took[i]);
  printf("],\"logits\":[");
  for (int i = 0; i < requests; i++)
    for (int j = 0; j < labels; j++)
      printf("%s%.9g%s", j ? "," : i ? ",[" : "[", (double)logits[i * labels + j], j + 1 < labels ? "" : "]");
  printf("]}\n");
  return 0;
}

int main(int argc, char **argv)
{
  llama_log_set(silent, NULL);
  llama_backend_init();
  int failed = 2;
  if (argc == 5 && !strcmp(argv[1], "quantize"))
    failed = quantize(argv[2], argv[3], argv[4]);
  else if (argc == 8 && !strcmp(argv[1], "run"))
    failed = run(argv);
  else
    fprintf(stderr, "usage: llama_driver quantize IN OUT TYPE | run MODEL MODE THREADS ROWS TOKENS REQUESTS\n");
  return failed;
}
