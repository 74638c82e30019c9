/* executor.c: opening and closing an executor, its storages, its memory. */
#include "executor.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ opening */

StiCode executor_open(const ExecutorOptions *options, Executor **out, StiError *error) {
  const ModelConfig *model = &options->manifest->model;
  const size_t layers = (size_t)model->layers, shards = layers * (size_t)model->heads;
  Executor *executor = *out = calloc(1, sizeof *executor);
  if (executor == NULL) return sti_out_of_memory(error);
  executor->manifest = options->manifest;
  executor->engine = options->engine;
  executor->throttle = options->throttle;
  pthread_mutex_init(&executor->busy, NULL);
  StiCode code = io_open(&executor->io, options->engine, options, error);
  if (code == STI_OK) code = preload_open(&executor->preload, model->layers, model->heads, error);
  executor->folder = strdup(options->folder);
  executor->loaded = calloc(shards, sizeof *executor->loaded);
  executor->arrived = calloc(shards, sizeof *executor->arrived);
  executor->index = calloc(shards, sizeof *executor->index);
  executor->merged = calloc(shards, sizeof *executor->merged);
  executor->reads = calloc(shards, sizeof *executor->reads);
  executor->layers = calloc(layers, sizeof *executor->layers);
  executor->trace = calloc(layers, sizeof *executor->trace);
  executor->layer_bytes = calloc(layers, sizeof *executor->layer_bytes);
  executor->last_read = calloc(layers, sizeof *executor->last_read);
  if (code == STI_OK && (executor->folder == NULL || executor->loaded == NULL || executor->arrived == NULL ||
                         executor->index == NULL || executor->merged == NULL || executor->reads == NULL ||
                         executor->layers == NULL || executor->trace == NULL || executor->layer_bytes == NULL ||
                         executor->last_read == NULL))
    code = sti_out_of_memory(error);
  for (int i = 0; i < APART_SLOTS && code == STI_OK; i++) {
    executor->apart[i].shards = calloc((size_t)model->heads, sizeof(LoadedShard));
    if (executor->apart[i].shards == NULL) code = sti_out_of_memory(error);
  }
  if (code == STI_OK) return STI_OK;
  executor_close(executor);
  *out = NULL;
  return code;
}

void executor_close(Executor *executor) {
  if (executor == NULL) return;
  executor_reset(executor);
  io_close(&executor->io);
  preload_close(&executor->preload);
  for (int i = 0; i < 2; i++)
    if (executor->opened[i]) storage_close(&executor->storages[i]);
  for (int i = 0; i < APART_SLOTS; i++) {
    if (executor->apart[i].pages != NULL) pages_free(executor->apart[i].pages, (size_t)executor->apart[i].room);
    free(executor->apart[i].shards);
  }
  free(executor->folder);
  free(executor->loaded);
  free(executor->arrived);
  free(executor->index);
  free(executor->merged);
  free(executor->reads);
  free(executor->layers);
  free(executor->trace);
  free(executor->layer_bytes);
  free(executor->last_read);
  free(executor->logits);
  pthread_mutex_destroy(&executor->busy);
  free(executor);
}

void executor_lock(Executor *executor) { pthread_mutex_lock(&executor->busy); }

StiCode executor_unlock(Executor *executor, StiCode code) {
  pthread_mutex_unlock(&executor->busy);
  return code;
}

/* ------------------------------------------------------------------ storage */

StiCode executor_storage(Executor *executor, IoMode asked, const Storage **storage, StiError *error) {
  if (!executor->opened[asked])
    STI_TRY(storage_open(&executor->storages[asked], executor->folder, executor->manifest, asked, error));
  executor->opened[asked] = true;
  *storage = &executor->storages[asked];
  return STI_OK;
}

StiCode executor_io_mode(Executor *executor, IoMode asked, IoMode *in_use, StiError *error) {
  const Storage *storage;
  executor_lock(executor);
  const StiCode code = executor_storage(executor, asked, &storage, error);
  if (code == STI_OK) *in_use = storage->mode;
  return executor_unlock(executor, code);
}

int64_t executor_storage_bytes(Executor *executor) { return io_storage_bytes(&executor->io); }

StiCode executor_evict(Executor *executor, IoMode asked, StiError *error) {
  const Storage *storage;
  executor_lock(executor);
  const StiCode code = executor_storage(executor, asked, &storage, error);
  if (code == STI_OK && storage->mode == IO_BUFFERED) storage_evict(storage);
  return executor_unlock(executor, code);
}

/* ------------------------------------------------------------------ memory */

MemoryParts executor_memory(const Executor *executor) {
  return (MemoryParts){
      .resident = engine_resident_bytes(executor->engine),
      .preload = executor->preload.peak,
      .working = executor->io.working.peak + executor->apart_peak + executor->rows.peak_bytes,
      .activations = engine_activation_bytes(executor->engine),
  };
}

void executor_reset(Executor *executor) {
  executor_lock(executor);
  if (executor->preload.shards != NULL) preload_trim(&executor->preload);
  ring_trim(&executor->io.working);
  rows_free(&executor->rows);
  executor->rows.peak_bytes = 0;
  for (int i = 0; i < APART_SLOTS; i++) {
    Apart *slot = &executor->apart[i];
    if (slot->taken || slot->pages == NULL) continue;
    pages_free(slot->pages, (size_t)slot->room);
    executor->apart_bytes -= slot->room;
    slot->pages = NULL;
    slot->room = 0;
  }
  executor->apart_peak = executor->apart_bytes;
  executor_unlock(executor, STI_OK);
}
