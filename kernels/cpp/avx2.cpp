// The kernels for x86 with AVX2 and FMA.
#include "headers.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define LANES 8
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hmr::Table hmr::avx2_table = HMR_TABLE("avx2");
#else
const hmr::Table hmr::avx2_table = {};
#endif
