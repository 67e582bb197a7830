// One file on purpose: it takes the compiler some seconds, which is what it is here for.
#include "moe_experts.h"

#define ENTRY(NAME, T)                                                                                             \
  extern "C" int moe_experts_##NAME(int64_t N, int64_t K, int64_t H, int64_t E, int64_t I, int64_t block_rows,      \
                                    const T* x, const T* weights, const int64_t* ids, const T* gate_up,            \
                                    const T* down, T* out) {                                                       \
    return experts(N, K, H, E, I, block_rows, x, weights, ids, gate_up, down, out);                                \
  }

ENTRY(f32, float)
ENTRY(f64, double)
