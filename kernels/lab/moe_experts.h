// Gated MLP experts over the rows that chose them, a block of rows at a time, so that a weight is read once for all
// rows of a block: one function for each block size. The formulas are in moe/reference.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// act[i + u] = silu(gate x[r]) * up x[r] for U intermediate features of R rows.
template <class T, int R, int U>
void features(int64_t i, int64_t H, int64_t I, const T* gate_up, const T* const* x, T* act) {
  const T *gate = gate_up + i * H, *up = gate_up + (I + i) * H;
  T a[U][R] = {}, b[U][R] = {};
  for (int64_t h = 0; h < H; h++)
    for (int u = 0; u < U; u++)
      for (int r = 0; r < R; r++) {
        a[u][r] += gate[u * H + h] * x[r][h];
        b[u][r] += up[u * H + h] * x[r][h];
      }
  for (int u = 0; u < U; u++)
    for (int r = 0; r < R; r++) act[(i + u) * R + r] = a[u][r] / (1 + std::exp(-a[u][r])) * b[u][r];
}

// out[r] += weight[r] down (silu(gate x[r]) * up x[r]) for R rows of one expert, U features at a time.
template <class T, int R, int U>
void run_block(int64_t H, int64_t I, const T* gate_up, const T* down, const T* const* x, const T* weight, T* const* out,
               T* act) {
  int64_t i = 0;
  for (; i + U <= I; i += U) features<T, R, U>(i, H, I, gate_up, x, act);
  for (; i < I; i++) features<T, R, 1>(i, H, I, gate_up, x, act);
  for (int64_t h = 0; h < H; h++) {
    const T* row = down + h * I;
    T y[R] = {};
    for (int64_t i = 0; i < I; i++)
      for (int r = 0; r < R; r++) y[r] += row[i] * act[i * R + r];
    for (int r = 0; r < R; r++) out[r][h] += weight[r] * y[r];
  }
}

template <class T>
using Block = void (*)(int64_t, int64_t, const T*, const T*, const T* const*, const T*, T* const*, T*);

template <class T, int U, int... R>
Block<T> with_rows(int64_t rows) {
  Block<T> found = nullptr;
  ((rows == R ? void(found = run_block<T, R, U>) : void()), ...);
  return found;
}

// Few rows leave registers for more features.
template <class T>
Block<T> block_of(int64_t rows) {
  if (const Block<T> found = with_rows<T, 8, 1, 2, 3, 4, 5, 6>(rows)) return found;
  if (const Block<T> found = with_rows<T, 4, 7, 8, 9, 10, 11, 12>(rows)) return found;
  return with_rows<T, 2, 14, 16, 20, 24>(rows);
}

// x, out [N, H], weights [N, K], ids [N, K], gate_up [E, 2 I, H], down [E, H, I]; out must come zeroed. Ids outside
// 0 to E - 1 are held elsewhere. Returns 0, or 1 for a block size that no function was made for.
template <class T>
int experts(int64_t N, int64_t K, int64_t H, int64_t E, int64_t I, int64_t block_rows, const T* x, const T* weights,
            const int64_t* ids, const T* gate_up, const T* down, T* out) {
  if (!block_of<T>(block_rows)) return 1;
  std::vector<std::vector<int64_t>> picks(E);
  for (int64_t p = 0; p < N * K; p++)
    if (ids[p] >= 0 && ids[p] < E) picks[ids[p]].push_back(p);
  std::vector<T> act(block_rows * I), weight(block_rows);
  std::vector<const T*> in(block_rows);
  std::vector<T*> to(block_rows);
  for (int64_t e = 0; e < E; e++)
    for (size_t done = 0; done < picks[e].size();) {
      int64_t rows = std::min<int64_t>(block_rows, picks[e].size() - done);
      while (!block_of<T>(rows)) rows--;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t p = picks[e][done + r];
        in[r] = x + p / K * H;
        to[r] = out + p / K * H;
        weight[r] = weights[p];
      }
      block_of<T>(rows)(H, I, gate_up + e * 2 * I * H, down + e * H * I, in.data(), weight.data(), to.data(),
                        act.data());
      done += rows;
    }
  return 0;
}
