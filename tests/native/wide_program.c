/* Reads lines of "a_high a_low b_high b_low factor" and prints what wide.h makes of them, for test_wide.py. */
#include <inttypes.h>
#include <stdio.h>

#include "../../sti_runtime/native/wide.h"

static void print(Wide value) { printf("%" PRIu64 " %" PRIu64 " ", value.high, value.low); }

int main(void) {
  Wide a, b, product;
  uint64_t factor;
  while (scanf("%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64 "%" SCNu64, &a.high, &a.low, &b.high, &b.low, &factor) == 5) {
    int64_t value = 0;
    bool fits = wide_scale(a, factor, &product), is_int = wide_to_int(a, &value);
    print(wide_product(a.low, b.low));
    print(wide_sum(a, b));
    print(wide_difference(a, b));
    print(product);
    print(wide_floor(a, b));
    print(wide_ceiling(a, b));
    printf("%d %d %d %" PRId64 "\n", wide_compare(a, b), fits, is_int, value);
  }
  return 0;
}
