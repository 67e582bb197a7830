// The gated delta rule on a GPU, the plain way: a block for each head of each sequence, a thread for each value
// channel, which keeps its column of the state in registers.
//
// Row-major: q, k [T, M, K], v, o [T, H, V], g, beta [T, H]. Sequence b has the tokens starts[b] to starts[b + 1], and
// its state [H, K, V] lies at state + slots[b] * slot_stride.
#include <cstdint>
#include <cuda_runtime.h>

template <class T, int K>
__global__ void run_head(int64_t M, int64_t V, int64_t slot_stride, const int64_t* starts, const int64_t* slots,
                         const T* q, const T* k, const T* v, const T* g, const T* beta, T* o, T* state) {
  const int64_t b = blockIdx.y, h = blockIdx.x, H = gridDim.x, j = threadIdx.x;
  __shared__ T q_t[K], k_t[K];
  T S[K];
  T* column = state + slots[b] * slot_stride + h * K * V + j;
  for (int i = 0; i < K; i++) S[i] = column[i * V];
  for (int64_t t = starts[b]; t < starts[b + 1]; t++) {
    const int64_t row = t * H + h, key_row = t * M + h / (H / M);
    __syncthreads();
    for (int i = threadIdx.x; i < K; i += blockDim.x) {
      q_t[i] = q[key_row * K + i];
      k_t[i] = k[key_row * K + i];
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

#define RUN(KEY_DIM)                                                                                               \
  case KEY_DIM:                                                                                                    \
    run_head<T, KEY_DIM><<<dim3(H, B), V, 0, on>>>(M, V, slot_stride, starts, slots, q, k, v, g, beta, o, state);   \
    return cudaGetLastError() == cudaSuccess ? 0 : 2;

// Returns 0, 1 when no function was made for heads of these sizes, or 2 when the launch failed.
template <class T>
int prefill(int64_t B, int64_t M, int64_t H, int64_t K, int64_t V, int64_t slot_stride, const int64_t* starts,
            const int64_t* slots, const T* q, const T* k, const T* v, const T* g, const T* beta, T* o, T* state,
            void* stream) {
  if (!B || !H) return 0;
  if (V > 1024) return 1;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (K) {
    RUN(32)
    RUN(64)
    RUN(128)
  }
  return 1;
}

#define ENTRY(NAME, T)                                                                                             \
  extern "C" int gdn_prefill_cuda_##NAME(int64_t B, int64_t M, int64_t H, int64_t K, int64_t V,                     \
                                         int64_t slot_stride, const int64_t* starts, const int64_t* slots,          \
                                         const T* q, const T* k, const T* v, const T* g, const T* beta, T* o,       \
                                         T* state, void* stream) {                                                 \
    return prefill(B, M, H, K, V, slot_stride, starts, slots, q, k, v, g, beta, o, state, stream);                 \
  }

ENTRY(f32, float)
ENTRY(f64, double)
