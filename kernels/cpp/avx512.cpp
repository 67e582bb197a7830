// The kernels for x86 with AVX-512 and its bfloat16 dot product (Zen 4, Cooper Lake, Sapphire Rapids and later), and with AMX
// if `tiles_allowed`, because a processor may lack it.
#include "headers.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,prefer-vector-width=512")
#endif
#define ISA avx512
#define LANES 16
#define HMR_BF16_DOT 1
#define HMR_AMX 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hmr::Table hmr::avx512_table = HMR_TABLE("avx512bf16");
const hmr::Table hmr::amx_table = HMR_TABLE("amx");
#else
const hmr::Table hmr::avx512_table = {};
const hmr::Table hmr::amx_table = {};
#endif
