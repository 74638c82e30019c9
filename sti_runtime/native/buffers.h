/* buffers.h: the memory that shards live in: the working buffer (W) and the preload buffer (|S|).
 *
 * Neither is thread-safe: callers hold a lock of their own. Sizes are multiples of 4096, addresses page-aligned.
 */
#ifndef STI_BUFFERS_H
#define STI_BUFFERS_H

#include <sys/uio.h>

#include "formats.h"

/* ------------------------------------------------------------------ working buffer
 *
 * A ring: shards come in read order and leave layer by layer in the same order, so what is free is one piece (which
 * may go round the end) and a read fits whenever its bytes are free. A version is contiguous all the same:
 *
 *     |<------------------------- capacity ------------------------>|<- longest ->|
 *     |  x  | newer … head      free      oldest …      | version that crosses |
 *                                                                   |<-  x  ->|
 *
 * The version that crosses the end is continued behind it, and the x bytes at the start go back to the system until it
 * is released: the memory held never exceeds the capacity. A plan whose reads are not in layer order gets a ring as
 * long as all its reads, of which no more than the capacity is held at once.
 */
typedef struct {
  uint8_t *pages;        /* [room] */
  int64_t room;
  int64_t capacity;      /* bytes in use at most */
  int64_t length;        /* where the ring ends; the capacity, or the length of all reads */
  int64_t head;          /* where the next version starts */
  int64_t in_use;
  int64_t crossing;      /* x; 0: no version crosses the end */
  int64_t crossing_left; /* bytes to release until the crossing version is released too */
  int64_t held, peak;    /* memory in use or kept for reuse; most since ring_trim */
  bool in_order;
} Ring;

/* Set the capacity and empty the ring. longest: of a version; total: all that will be acquired until it is empty.
 * Errors: STI_RESOURCE. */
StiCode ring_size(Ring *ring, int64_t capacity, int64_t longest, int64_t total, bool in_order, StiError *error);
bool ring_fits(const Ring *ring, int64_t bytes);
uint8_t *ring_acquire(Ring *ring, int64_t bytes);          /* one version; it must fit */
void ring_release(Ring *ring, int64_t bytes);              /* the oldest ones; in_order only */
void ring_drop(Ring *ring, uint8_t *data, int64_t bytes);  /* one version; not in_order only */
void ring_clear(Ring *ring);                               /* nothing is in use any more */
void ring_trim(Ring *ring);                                /* the same; memory goes back, a new peak starts */

/* ------------------------------------------------------------------ preload buffer
 *
 * At most |S| bytes of versions, one per shard; what does not fit is evicted from the top layer down.
 * Source: STI (ASPLOS 2023), section 5.5.
 */
typedef struct {
  uint8_t *data; /* [bytes]; NULL: not held */
  int64_t bytes;
  int32_t fidelity;
} Held;

typedef struct {
  Held *shards; /* [layers, slices] */
  int32_t layers, slices;
  int64_t capacity, held, peak;
} Preload;

StiCode preload_open(Preload *preload, int32_t layers, int32_t slices, StiError *error);
void preload_resize(Preload *preload, int64_t capacity);                 /* evicts from the top until the rest fits */
void preload_keep(Preload *preload, const PlannedShard *shards, int32_t count); /* evicts all but the preloaded ones */
uint8_t *preload_get(const Preload *preload, const PlannedShard *shard); /* NULL: not held */
uint8_t *preload_place(Preload *preload, const PlannedShard *shard);     /* memory for it; NULL: none */
void preload_evict(Preload *preload, const PlannedShard *shard);
void preload_clear(Preload *preload);
void preload_trim(Preload *preload); /* the same; a new peak starts */
void preload_close(Preload *preload);

#endif
