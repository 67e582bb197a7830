#include "jit.h"

extern "C" int gdn_prefill_f64(int64_t B, int64_t num_tokens, int64_t H, int64_t K, int64_t V, const double* q,
                              const double* k, const double* v, const double* g, const double* beta, double* o, double* state) {
  return prefill(B, num_tokens, H, K, V, q, k, v, g, beta, o, state);
}
