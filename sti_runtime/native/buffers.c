/* buffers.c: the working buffer as a ring, the preload buffer as a table of versions. */
#include "buffers.h"

#include <stdlib.h>
#include <sys/mman.h>

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ------------------------------------------------------------------ working buffer */

/* Give the pages [from, to) back to the system; they read as zeros when touched again. */
static void give_back(Ring *ring, int64_t from, int64_t to) {
  if (from >= to) return;
  madvise(ring->pages + from, (size_t)(to - from), MADV_DONTNEED);
}

static void set_held(Ring *ring, int64_t held) {
  ring->held = held;
  if (held > ring->peak) ring->peak = held;
}

StiCode ring_size(Ring *ring, int64_t capacity, int64_t longest, int64_t total, bool in_order, StiError *error) {
  capacity = least(capacity, total) / STI_ALIGNMENT * STI_ALIGNMENT;
  const int64_t room = in_order ? capacity + longest : total;
  ring_clear(ring);
  if (room > ring->room) {
    if (ring->pages != NULL) pages_free(ring->pages, (size_t)ring->room);
    ring->pages = room > PTRDIFF_MAX ? NULL : pages_alloc((size_t)room);
    ring->held = 0;
    ring->room = ring->pages == NULL ? 0 : room;
    if (ring->pages == NULL) return sti_out_of_memory(error);
  }
  ring->in_order = in_order;
  ring->capacity = capacity;
  ring->length = in_order ? capacity : total;
  const int64_t kept = in_order ? least(ring->held, capacity) : 0;
  give_back(ring, kept, ring->room);
  ring->held = kept;
  return STI_OK;
}

bool ring_fits(const Ring *ring, int64_t bytes) { return ring->in_use + bytes <= ring->capacity; }

uint8_t *ring_acquire(Ring *ring, int64_t bytes) {
  uint8_t *data = ring->pages + ring->head;
  const int64_t end = ring->head + bytes, beyond = end - ring->length;
  ring->in_use += bytes;
  if (!ring->in_order) {
    set_held(ring, ring->in_use);
  } else if (beyond > 0) {
    give_back(ring, 0, beyond);
    ring->crossing = beyond;
    ring->crossing_left = ring->in_use;
    set_held(ring, ring->length);
  } else if (end > ring->held) {
    set_held(ring, end);
  }
  ring->head = beyond >= 0 ? beyond : end;
  return data;
}

static void end_crossing(Ring *ring) {
  if (ring->crossing == 0) return;
  give_back(ring, ring->length, ring->length + ring->crossing);
  ring->crossing = 0;
}

void ring_release(Ring *ring, int64_t bytes) {
  ring->in_use -= bytes;
  ring->crossing_left -= bytes;
  if (ring->crossing_left <= 0) end_crossing(ring);
  if (ring->in_use == 0) ring->head = 0; /* stay at the start while little is in use: less memory is touched */
}

void ring_drop(Ring *ring, uint8_t *data, int64_t bytes) {
  give_back(ring, data - ring->pages, data - ring->pages + bytes);
  ring->in_use -= bytes;
  ring->held = ring->in_use;
}

void ring_clear(Ring *ring) {
  end_crossing(ring);
  if (!ring->in_order) {
    give_back(ring, 0, ring->room);
    ring->held = 0;
  }
  ring->in_use = ring->head = 0;
}

void ring_trim(Ring *ring) {
  if (ring->pages != NULL) pages_free(ring->pages, (size_t)ring->room);
  *ring = (Ring){.in_order = true};
}

/* ------------------------------------------------------------------ preload buffer */

StiCode preload_open(Preload *preload, int32_t layers, int32_t slices, StiError *error) {
  *preload = (Preload){.layers = layers, .slices = slices};
  preload->shards = calloc((size_t)layers * (size_t)slices, sizeof *preload->shards);
  return preload->shards == NULL ? sti_out_of_memory(error) : STI_OK;
}

static Held *find(const Preload *preload, const PlannedShard *shard) {
  return &preload->shards[(int64_t)shard->source_layer * preload->slices + shard->slice];
}

static void evict(Preload *preload, Held *held) {
  if (held->data == NULL) return;
  pages_free(held->data, (size_t)held->bytes);
  preload->held -= held->bytes;
  held->data = NULL;
}

void preload_resize(Preload *preload, int64_t capacity) {
  for (int64_t i = (int64_t)preload->layers * preload->slices - 1; i >= 0 && preload->held > capacity; i--)
    evict(preload, &preload->shards[i]);
  preload->capacity = capacity;
}

void preload_keep(Preload *preload, const PlannedShard *shards, int32_t count) {
  int64_t next = 0; /* shards and the table are both layer-major */
  for (int32_t i = 0; i < count; i++) {
    const int64_t place = find(preload, &shards[i]) - preload->shards;
    for (; next < place; next++) evict(preload, &preload->shards[next]);
    if (!shards[i].preloaded || preload_get(preload, &shards[i]) == NULL) evict(preload, &preload->shards[place]);
    next = place + 1;
  }
  for (; next < (int64_t)preload->layers * preload->slices; next++) evict(preload, &preload->shards[next]);
}

uint8_t *preload_get(const Preload *preload, const PlannedShard *shard) {
  const Held *held = find(preload, shard);
  return held->fidelity == shard->fidelity ? held->data : NULL;
}

uint8_t *preload_place(Preload *preload, const PlannedShard *shard) {
  Held *held = find(preload, shard);
  if (preload->held + shard->length > preload->capacity || shard->length > PTRDIFF_MAX) return NULL;
  held->data = pages_alloc((size_t)shard->length);
  if (held->data == NULL) return NULL;
  held->bytes = shard->length;
  held->fidelity = shard->fidelity;
  preload->held += shard->length;
  if (preload->held > preload->peak) preload->peak = preload->held;
  return held->data;
}

void preload_evict(Preload *preload, const PlannedShard *shard) { evict(preload, find(preload, shard)); }

void preload_clear(Preload *preload) { preload_keep(preload, NULL, 0); }

void preload_trim(Preload *preload) {
  preload_clear(preload);
  preload->peak = 0;
}

void preload_close(Preload *preload) {
  if (preload->shards == NULL) return;
  preload_clear(preload);
  free(preload->shards);
  preload->shards = NULL;
}
