/* wide.h: exact unsigned integers of 128 bits, for products that leave 64 (median × ppm). Compilers for 32-bit
 * targets have no such type, and all of ours must agree to the last digit.
 */
#ifndef STI_WIDE_H
#define STI_WIDE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct { uint64_t high, low; } Wide;

Wide wide_of(uint64_t value);
Wide wide_product(uint64_t a, uint64_t b);
Wide wide_sum(Wide a, Wide b);        /* modulo 2^128, like the next */
Wide wide_difference(Wide a, Wide b);
int wide_compare(Wide a, Wide b);     /* -1, 0, 1 */
bool wide_scale(Wide a, uint64_t factor, Wide *product); /* false: 2^128 or more */

/* Rounded down, and up; the divisor is not 0. */
Wide wide_floor(Wide a, Wide divisor);
Wide wide_ceiling(Wide a, Wide divisor);

/* The value as int64_t; false: it is 2^63 or more. */
bool wide_to_int(Wide a, int64_t *value);

#endif
