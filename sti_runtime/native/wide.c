/* wide.c: 128-bit integers from two 64-bit limbs. */
#include "wide.h"

Wide wide_of(uint64_t value) { return (Wide){0, value}; }

Wide wide_product(uint64_t a, uint64_t b) {
  uint64_t a_high = a >> 32, a_low = a & UINT32_MAX, b_high = b >> 32, b_low = b & UINT32_MAX;
  uint64_t low = a_low * b_low;
  uint64_t middle = a_high * b_low + (low >> 32); /* at most (2^32 - 1) · 2^32: no carry is lost */
  uint64_t other = a_low * b_high + (middle & UINT32_MAX);
  return (Wide){a_high * b_high + (middle >> 32) + (other >> 32), other << 32 | (low & UINT32_MAX)};
}

Wide wide_sum(Wide a, Wide b) {
  uint64_t low = a.low + b.low;
  return (Wide){a.high + b.high + (low < a.low), low};
}

Wide wide_difference(Wide a, Wide b) { return (Wide){a.high - b.high - (a.low < b.low), a.low - b.low}; }

int wide_compare(Wide a, Wide b) {
  if (a.high != b.high) return a.high < b.high ? -1 : 1;
  return (a.low > b.low) - (a.low < b.low);
}

bool wide_scale(Wide a, uint64_t factor, Wide *product) {
  Wide low = wide_product(a.low, factor), high = wide_product(a.high, factor);
  *product = (Wide){high.low + low.high, low.low};
  return high.high == 0 && product->high >= low.high;
}

/* Long division by bits; what stays small, nearly everything, is left to the machine. */
static Wide divide(Wide a, Wide divisor, Wide *remainder) {
  if (a.high == 0 && divisor.high == 0) {
    *remainder = wide_of(a.low % divisor.low);
    return wide_of(a.low / divisor.low);
  }
  Wide quotient = {0, 0}, rest = {0, 0};
  for (int bit = 127; bit >= 0; bit--) {
    uint64_t limb = bit < 64 ? a.low : a.high;
    bool carry = rest.high >> 63;
    rest = (Wide){rest.high << 1 | rest.low >> 63, rest.low << 1 | (limb >> bit % 64 & 1)};
    quotient = (Wide){quotient.high << 1 | quotient.low >> 63, quotient.low << 1};
    if (carry || wide_compare(rest, divisor) >= 0) {
      rest = wide_difference(rest, divisor);
      quotient.low |= 1;
    }
  }
  *remainder = rest;
  return quotient;
}

Wide wide_floor(Wide a, Wide divisor) {
  Wide remainder;
  return divide(a, divisor, &remainder);
}

Wide wide_ceiling(Wide a, Wide divisor) {
  Wide remainder, quotient = divide(a, divisor, &remainder);
  return remainder.high | remainder.low ? wide_sum(quotient, wide_of(1)) : quotient;
}

bool wide_to_int(Wide a, int64_t *value) {
  if (a.high != 0 || a.low > INT64_MAX) return false;
  *value = (int64_t)a.low;
  return true;
}
