// All kernels, compiled for the instruction set that the including file has chosen: it defines ISA (a namespace), LANES,
// and HMR_BF16_DOT and HMR_AMX where the set has them, after the standard headers are in.
namespace hmr {
namespace ISA {
#include "simd.h"
#if defined(HMR_AMX)
#include "amx.h"
#endif
#include "product.h"
#include "../linear/native.cpp"
#include "../moe/native.cpp"
#include "../attention/native.cpp"
#include "../causal_conv/native.cpp"
#include "../norm/native.cpp"
#include "../rope/native.cpp"
#include "../gated_delta_rule/native.cpp"
#include "../ssd/native.cpp"

// One entry for both dtypes.
#define EITHER(name, Args)                                       \
    static void name##_any(const Args& args, bool is_bf16, int threads) { \
        is_bf16 ? name<bf16>(args, threads) : name<float>(args, threads); \
    }
EITHER(project, Project)
EITHER(experts, Experts)
EITHER(attend, Attend)
EITHER(conv, Conv)
EITHER(rule, Rule)
EITHER(rule_decode, RuleDecode)
EITHER(scan, Scan)
EITHER(scan_decode, ScanDecode)
EITHER(norm, Norm)
EITHER(rope, Rope)
#undef EITHER
}  // namespace ISA
}  // namespace hmr

#define HMR_TABLE(name)                                                                                          \
    {                                                                                                            \
        name, hmr::ISA::project_any, hmr::ISA::experts_any, hmr::ISA::attend_any, hmr::ISA::conv_any,            \
            hmr::ISA::rule_any, hmr::ISA::rule_decode_any, hmr::ISA::scan_any, hmr::ISA::scan_decode_any,        \
            hmr::ISA::norm_any, hmr::ISA::rope_any                                                               \
    }
