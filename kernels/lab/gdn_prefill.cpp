// One large file on purpose: the lab needs a build that takes some seconds.
#include "gdn_prefill.h"

#define ENTRY(NAME, T)                                                                                             \
  extern "C" int gdn_prefill_##NAME(int64_t B, int64_t M, int64_t H, int64_t K, int64_t V, int64_t slot_stride,     \
                                    const int64_t* starts, const int64_t* slots, const T* q, const T* k,           \
                                    const T* v, const T* g, const T* beta, T* o, T* state) {                       \
    return prefill(B, M, H, K, V, slot_stride, starts, slots, q, k, v, g, beta, o, state);                         \
  }

ENTRY(f32, float)
ENTRY(f64, double)
