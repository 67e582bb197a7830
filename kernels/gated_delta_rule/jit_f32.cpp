#include "jit.h"

extern "C" int gdn_prefill_f32(int64_t B, int64_t num_tokens, int64_t H, int64_t K, int64_t V, const float* q,
                              const float* k, const float* v, const float* g, const float* beta, float* o, float* state) {
  return prefill(B, num_tokens, H, K, V, q, k, v, g, beta, o, state);
}
