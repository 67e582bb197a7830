// The gated delta rule on a GPU, the plain way: a block for each head of each sequence, a thread for each value
// channel, which keeps its column of the state in registers. Written to the documentation, not yet run on a GPU.
//
// Row-major and contiguous: q, k [B, T, H, K], v, o [B, T, H, V], g, beta [B, T, H], state [B, H, K, V].
#include <cstdint>
#include <cuda_runtime.h>

template <class T, int K>
__global__ void run_head(int64_t num_tokens, int64_t H, int64_t V, const T* q, const T* k, const T* v, const T* g,
                         const T* beta, T* o, T* state) {
  const int64_t b = blockIdx.y, h = blockIdx.x, j = threadIdx.x;
  __shared__ T q_t[K], k_t[K];
  T S[K];
  T* column = state + (b * H + h) * K * V + j;
  for (int i = 0; i < K; i++) S[i] = column[i * V];
  for (int64_t t = 0; t < num_tokens; t++) {
    const int64_t row = (b * num_tokens + t) * H + h;
    __syncthreads();
    for (int i = threadIdx.x; i < K; i += blockDim.x) {
      q_t[i] = q[row * K + i];
      k_t[i] = k[row * K + i];
    }
    __syncthreads();
    const T decay = exp(g[row]);
    T held = 0, read = 0;
    for (int i = 0; i < K; i++) {
      S[i] *= decay;
      held += k_t[i] * S[i];
    }
    const T d = beta[row] * (v[row * V + j] - held);
    for (int i = 0; i < K; i++) {
      S[i] += k_t[i] * d;
      read += q_t[i] * S[i];
    }
    o[row * V + j] = read;
  }
  for (int i = 0; i < K; i++) column[i * V] = S[i];
}

template <class T, int K>
int launch(int64_t B, int64_t num_tokens, int64_t H, int64_t V, const T* q, const T* k, const T* v, const T* g,
           const T* beta, T* o, T* state, cudaStream_t stream) {
  run_head<T, K><<<dim3(H, B), V, 0, stream>>>(num_tokens, H, V, q, k, v, g, beta, o, state);
  return cudaGetLastError() == cudaSuccess ? 0 : 2;
}

template <class T>
int prefill(int64_t B, int64_t num_tokens, int64_t H, int64_t K, int64_t V, const T* q, const T* k, const T* v,
            const T* g, const T* beta, T* o, T* state, void* stream) {
  if (!B || !H || !num_tokens) return 0;
  if (V > 1024) return 1;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (K) {
    case 32: return launch<T, 32>(B, num_tokens, H, V, q, k, v, g, beta, o, state, on);
    case 64: return launch<T, 64>(B, num_tokens, H, V, q, k, v, g, beta, o, state, on);
    case 128: return launch<T, 128>(B, num_tokens, H, V, q, k, v, g, beta, o, state, on);
  }
  return 1;
}

#define ENTRY(NAME, T)                                                                                             \
  extern "C" int gdn_prefill_cuda_##NAME(int64_t B, int64_t num_tokens, int64_t H, int64_t K, int64_t V,            \
                                         const T* q, const T* k, const T* v, const T* g, const T* beta, T* o,       \
                                         T* state, void* stream) {                                                 \
    return prefill(B, num_tokens, H, K, V, q, k, v, g, beta, o, state, stream);                                    \
  }

ENTRY(f32, float)
ENTRY(f64, double)
