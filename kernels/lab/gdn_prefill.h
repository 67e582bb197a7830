// The gated delta rule of one head, token by token, with the head's sizes known to the compiler: one function for
// each pair of them, as GPU libraries generate their kernels. The formulas are in gated_delta_rule/reference.py.
//
// Row-major: q, k [T, M, K], v, o [T, H, V], g, beta [T, H], state [K, V]; the pointers are those of the head's first
// element in each. M key heads, each shared by H / M value heads.
#pragma once
#include <cmath>
#include <cstdint>

template <class T>
struct Rows {
  int64_t num_tokens, num_key_heads, num_heads;
  const T *q, *k, *v, *g, *beta;
  T *o, *state;
};

template <class T, int K, int V>
void run_head(const Rows<T>& x) {
  T S[K][V];
  for (int i = 0; i < K; i++)
    for (int j = 0; j < V; j++) S[i][j] = x.state[i * V + j];
  for (int64_t t = 0; t < x.num_tokens; t++) {
    const T *q = x.q + t * x.num_key_heads * K, *k = x.k + t * x.num_key_heads * K, *v = x.v + t * x.num_heads * V;
    T* o = x.o + t * x.num_heads * V;
    const T decay = std::exp(x.g[t * x.num_heads]), beta = x.beta[t * x.num_heads];
    T d[V] = {}, read[V] = {};
    for (int i = 0; i < K; i++)
      for (int j = 0; j < V; j++) {
        S[i][j] *= decay;
        d[j] += k[i] * S[i][j];
      }
    for (int j = 0; j < V; j++) d[j] = beta * (v[j] - d[j]);
    for (int i = 0; i < K; i++)
      for (int j = 0; j < V; j++) {
        S[i][j] += k[i] * d[j];
        read[j] += q[i] * S[i][j];
      }
    for (int j = 0; j < V; j++) o[j] = read[j];
  }
  for (int i = 0; i < K; i++)
    for (int j = 0; j < V; j++) x.state[i * V + j] = S[i][j];
}

template <class T>
using Head = void (*)(const Rows<T>&);

template <class T, int K>
Head<T> head_of(int64_t value_dim) {
  switch (value_dim) {
    case 16: return run_head<T, K, 16>;
    case 32: return run_head<T, K, 32>;
    case 64: return run_head<T, K, 64>;
    case 128: return run_head<T, K, 128>;
    case 192: return run_head<T, K, 192>;
    case 256: return run_head<T, K, 256>;
  }
  return nullptr;
}

template <class T>
Head<T> head_of(int64_t key_dim, int64_t value_dim) {
  switch (key_dim) {
    case 16: return head_of<T, 16>(value_dim);
    case 32: return head_of<T, 32>(value_dim);
    case 64: return head_of<T, 64>(value_dim);
    case 128: return head_of<T, 128>(value_dim);
    case 192: return head_of<T, 192>(value_dim);
    case 256: return head_of<T, 256>(value_dim);
  }
  return nullptr;
}

// Sequence b has the tokens starts[b] to starts[b + 1], and its state lies at state + slots[b] * slot_stride. Returns 0,
// or 1 when no function was made for heads of these sizes.
template <class T>
int prefill(int64_t B, int64_t M, int64_t H, int64_t K, int64_t V, int64_t slot_stride, const int64_t* starts,
            const int64_t* slots, const T* q, const T* k, const T* v, const T* g, const T* beta, T* o, T* state) {
  const Head<T> run = head_of<T>(K, V);
  if (!run) return 1;
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++) {
      const int64_t t = starts[b], row = t * H + h, key_row = t * M + h / (H / M);
      run({starts[b + 1] - t, M, H, q + key_row * K, k + key_row * K, v + row * V, g + row, beta + row, o + row * V,
           state + slots[b] * slot_stride + h * K * V});
    }
  return 0;
}
