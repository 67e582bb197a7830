#include "jit.h"

extern "C" int gdn_prefill_f64(int64_t B, int64_t M, int64_t H, int64_t K, int64_t V, int64_t slot_stride,
                               const int64_t* starts, const int64_t* slots, const double* q, const double* k,
                               const double* v, const double* g, const double* beta, double* o, double* state) {
  return prefill(B, M, H, K, V, slot_stride, starts, slots, q, k, v, g, beta, o, state);
}
