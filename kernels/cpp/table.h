// The kernels' arguments, and the table of the kernels compiled for one instruction set. Pointers are to float or bf16 as
// `is_bf16` says unless typed; ld_ is a distance between rows, in elements. Letters as in each op's __init__.py.
#pragma once
#include <cstdint>

namespace hmr {

struct bf16 {
    uint16_t bits;
};

struct Project {
    const void* x;
    int64_t ldx, N, H, num_weights;
    const void* const* weights;  // each [O, H]
    const int64_t* sizes;        // O of each
    void* y;
    int64_t ldy;
};

struct Experts {
    const void* x;
    int64_t ldx, N, H, E, K, I, S;  // S: intermediate size of the shared expert, 0 for none
    const void *gate_up, *down;
    int64_t ld_gate_up, ld_down;  // from expert to expert
    // Either the router's weight, or its choices.
    const void* router;
    const int64_t* ids;
    const float* weights;
    const void *shared_gate, *shared_up, *shared_down, *shared_scale;
    void* y;
};

struct Attend {
    const void *q, *kv;
    int64_t ldq, ld_page, ld_token, B, Q, K, D, L;
    const int64_t *table, *lengths;
    int64_t ld_table;
    void* o;
};

struct Conv {
    const void* x;
    int64_t ldx, B, C, W;
    const int64_t* starts;
    const void *weight, *bias;
    void* state;
    int64_t ld_state;
    const int64_t* slots;
    void* y;
    int64_t ldy;
};

struct Rule {
    const void *q, *k, *v;
    int64_t ldq, ldk, ldv, B, M, H, K, V;
    const float *g, *beta;
    int64_t ldg, ldbeta;
    float* state;
    int64_t ld_state;
    const int64_t *slots, *starts;
    void* o;
};

struct RuleDecode {
    const void *qkv, *z, *b, *a;
    int64_t ldqkv, ldz, ldb, lda, B, M, H, K, V, W;
    const void *conv_weight, *A_log, *dt_bias, *norm_weight;
    void* conv;
    int64_t ld_conv;
    float* state;
    int64_t ld_state;
    const int64_t* slots;
    float eps;
    void* y;
};

struct Scan {
    const void *x, *b, *c, *D;
    int64_t ldx, ldb, ldc, B, H, P, G, N;
    const float *dt, *A;
    int64_t lddt;
    float* state;
    int64_t ld_state;
    const int64_t *slots, *starts;
    void* y;
};

struct ScanDecode {
    const void *xbc, *z, *dt;
    int64_t ldxbc, ldz, lddt, B, H, P, G, N, W;
    const void *conv_weight, *conv_bias, *A_log, *D, *dt_bias, *norm_weight;
    void* conv;
    int64_t ld_conv;
    float* state;
    int64_t ld_state;
    const int64_t* slots;
    float dt_min, dt_max, eps;
    void* y;
};

struct Norm {
    const void *x, *gate, *weight;
    int64_t ldx, ldgate, N, H, G;
    float eps;
    int kind;  // 0: x / rms (1 + w); 1: w x / rms silu(gate); 2: w y / rms(y), y = x silu(gate), over each of G groups
    void* y;
};

struct Rope {
    const void *x, *cos, *sin;
    int64_t ldx_token, ldx_head, ldcos, ldsin, T, H, D, R;
    void* y;
};

struct Table {
    const char* name;
    void (*project)(const Project&, bool is_bf16, int threads);
    void (*experts)(const Experts&, bool is_bf16, int threads);
    void (*attend)(const Attend&, bool is_bf16, int threads);
    void (*conv)(const Conv&, bool is_bf16, int threads);
    void (*rule)(const Rule&, bool is_bf16, int threads);
    void (*rule_decode)(const RuleDecode&, bool is_bf16, int threads);
    void (*scan)(const Scan&, bool is_bf16, int threads);
    void (*scan_decode)(const ScanDecode&, bool is_bf16, int threads);
    void (*norm)(const Norm&, bool is_bf16, int threads);
    void (*rope)(const Rope&, bool is_bf16, int threads);
};

extern const Table generic_table, avx2_table, avx512_table, amx_table;
extern bool tiles_allowed;  // the last two are the same code, which uses AMX if this is true

}  // namespace hmr
