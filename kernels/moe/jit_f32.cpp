#include "jit.h"

extern "C" int moe_experts_f32(int64_t N, int64_t K, int64_t H, int64_t E, int64_t I, int64_t block_rows, const float* x,
                              const float* weights, const int64_t* ids, const float* gate_up, const float* down, float* out) {
  return experts(N, K, H, E, I, block_rows, x, weights, ids, gate_up, down, out);
}
