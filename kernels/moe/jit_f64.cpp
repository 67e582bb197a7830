#include "jit.h"

extern "C" int moe_experts_f64(int64_t N, int64_t K, int64_t H, int64_t E, int64_t I, int64_t block_rows, const double* x,
                              const double* weights, const int64_t* ids, const double* gate_up, const double* down, double* out) {
  return experts(N, K, H, E, I, block_rows, x, weights, ids, gate_up, down, out);
}
