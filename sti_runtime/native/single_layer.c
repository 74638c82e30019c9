/* single_layer.c: one layer read or computed apart from any request, for profiles. */
#include <string.h>

#include "executor.h"

/* A free slot of at least `bytes`; the best fitting one is grown if need be. */
static Apart *take_apart(Executor *executor, int64_t bytes) {
  Apart *best = NULL;
  for (int i = 0; i < APART_SLOTS; i++) {
    Apart *slot = &executor->apart[i];
    if (slot->taken) continue;
    if (best == NULL || (slot->room >= bytes ? best->room < bytes || slot->room < best->room : slot->room > best->room))
      best = slot;
  }
  if (best == NULL) return NULL;
  if (best->room < bytes) {
    if (best->pages != NULL) pages_free(best->pages, (size_t)best->room);
    executor->apart_bytes -= best->room;
    best->pages = pages_alloc((size_t)bytes);
    best->room = best->pages == NULL ? 0 : bytes;
    executor->apart_bytes += best->room;
    if (executor->apart_bytes > executor->apart_peak) executor->apart_peak = executor->apart_bytes;
    if (best->pages == NULL) return NULL;
  }
  best->taken = true;
  return best;
}

/* The shards must be versions of the bundle, of one layer. */
static StiCode check_layer(const Executor *executor, const PlannedShard *shards, int32_t count, StiError *error) {
  bool good = count >= 1 && count <= executor->manifest->model.heads;
  for (int32_t i = 0; i < count && good; i++) {
    const Version *version =
        manifest_version(executor->manifest, shards[i].source_layer, shards[i].slice, shards[i].fidelity);
    good = version != NULL && shards[i].layer == 0 && shards[i].source_layer == shards[0].source_layer &&
           version->offset == shards[i].offset && version->length == shards[i].length;
  }
  return good ? STI_OK
              : sti_fail(error, STI_INPUT, "Profile what the bundle holds.",
                         "These are not shards of one layer of the bundle.");
}

static StiCode load_layer(Executor *executor, const PlannedShard *shards, int32_t count, const Storage *storage,
                          LayerLoad *load, StiError *error) {
  int64_t bytes = 0, place = 0;
  for (int32_t i = 0; i < count; i++) bytes += shards[i].length;
  Apart *slot = bytes > PTRDIFF_MAX ? NULL : take_apart(executor, bytes);
  if (slot == NULL) return sti_out_of_memory(error);
  Session *session = executor_session(executor, storage, shards, count, 1);
  for (int32_t i = 0; i < count; i++) {
    executor->index[i] = i;
    session->loaded[i].data = slot->pages + place;
    place += shards[i].length;
  }
  executor_add_reads(executor, session, 0, count, true);
  const int64_t before = io_storage_bytes(&executor->io);
  io_begin(&executor->io, session);
  const StiCode code = io_finish(&executor->io, session, error);
  const int64_t storage_bytes = io_storage_bytes(&executor->io);
  slot->taken = code == STI_OK;
  if (code != STI_OK) return code;
  memcpy(slot->shards, session->loaded, (size_t)count * sizeof *slot->shards);
  *load = (LayerLoad){
      .shards = slot->shards,
      .count = count,
      .bytes = bytes,
      .storage_bytes = before < 0 || storage_bytes < 0 ? -1 : storage_bytes - before,
      .duration_ns = session->end_ns - session->start_ns,
  };
  return STI_OK;
}

StiCode executor_load_layer(Executor *executor, const PlannedShard *shards, int32_t count, IoMode io_mode,
                            LayerLoad *load, StiError *error) {
  const Storage *storage;
  executor_lock(executor);
  StiCode code = check_layer(executor, shards, count, error);
  if (code == STI_OK) code = executor_storage(executor, io_mode, &storage, error);
  if (code == STI_OK) code = io_start(&executor->io, error);
  if (code == STI_OK) code = load_layer(executor, shards, count, storage, load, error);
  return executor_unlock(executor, code);
}

void executor_drop_layer(Executor *executor, LayerLoad *load) {
  executor_lock(executor);
  for (int i = 0; i < APART_SLOTS; i++)
    if (executor->apart[i].shards == load->shards) executor->apart[i].taken = false;
  executor_unlock(executor, STI_OK);
  *load = (LayerLoad){0};
}

void executor_compute_layer(Executor *executor, int32_t source_layer, const LayerLoad *load, LayerTimes *times) {
  executor_compute(executor, source_layer, load->shards, load->count, times);
}
