/* resident.h: resident.bin in memory. Reading it may begin before the manifest, which says what is in it, is read:
 * the file and the memory it goes to are waited for by a thread of their own meanwhile. */
#ifndef STI_RESIDENT_H
#define STI_RESIDENT_H

#include "base.h"

typedef struct Resident Resident;

/* Begin to read `folder`/resident.bin. NULL when that is not possible now: resident_take then reads it. */
Resident *resident_begin(const char *folder);

/* The file's `bytes` and a cache line behind them, from pages_alloc; `begun` may be NULL and is used up.
 * Errors: STI_INPUT, STI_STORAGE_READ, STI_RESOURCE; STI_FORMAT when the file is shorter. */
StiCode resident_take(Resident *begun, const char *folder, int64_t bytes, uint8_t **data, StiError *error);

void resident_drop(Resident *begun); /* NULL is allowed */

#endif
