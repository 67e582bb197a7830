// The signatures of the ops in C++. They call the kernels of the instruction set in use, at first the best one of this
// processor. The ops check their arguments in Python (checks.py) before they call these functions, which check only what is
// a limit of these kernels.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "instruction_sets.h"

namespace py = pybind11;
using at::Tensor;
using hmr::table;
using std::optional;
using std::string;

namespace {

void use_instruction_set(const string& name) {
    if (!hmr::use(name)) throw py::value_error("instruction_set: " + name + " is not one that this processor has");
}

int threads() { return at::get_num_threads(); }
bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }
const void* in(const Tensor& x) { return x.const_data_ptr(); }
const void* in(const optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }
const float* in_floats(const Tensor& x) { return x.const_data_ptr<float>(); }
float* floats(const Tensor& x) { return x.data_ptr<float>(); }
const int64_t* indices(const Tensor& x) { return x.const_data_ptr<int64_t>(); }
Tensor empty_like(const Tensor& x, at::IntArrayRef shape) { return at::empty(shape, x.options()); }

// Rows [N, heads, D] whose heads follow one another; a copy if they do not.
Tensor with_dense_heads(const Tensor& x) { return x.stride(1) == x.size(2) || x.size(1) <= 1 ? x : x.contiguous(); }

// The width of a convolution, which the kernels keep in arrays of 16.
int64_t width(const char* name, const Tensor& weight_CW) {
    const int64_t W = weight_CW.size(1);
    if (W < 1 || W > 16) throw py::value_error(string(name) + ": W = " + std::to_string(W) + ", wanted 1 to 16");
    return W;
}

std::vector<Tensor> project(const Tensor& x_NH, const std::vector<Tensor>& weights) {
    std::vector<const void*> pointers;
    std::vector<int64_t> outs;
    int64_t total = 0;
    for (const auto& weight_OH : weights) {
        pointers.push_back(in(weight_OH));
        outs.push_back(weight_OH.size(0));
        total += weight_OH.size(0);
    }
    const int64_t N = x_NH.size(0), H = x_NH.size(1);
    const Tensor y = empty_like(x_NH, {N, total});
    if (N)
        table->project({in(x_NH), x_NH.stride(0), N, H, (int64_t)weights.size(), pointers.data(), outs.data(), y.data_ptr(), total},
                       is_bf16(x_NH), threads());
    if (weights.size() == 1) return {y};
    return y.split_with_sizes(outs, 1);
}

Tensor run_experts(const Tensor& x_NH, const Tensor& gate_up_EJH, const Tensor& down_EHI, hmr::Experts& args) {
    const Tensor y = empty_like(x_NH, {x_NH.size(0), x_NH.size(1)});
    args.E = down_EHI.size(0), args.I = down_EHI.size(2);
    args.gate_up = in(gate_up_EJH), args.down = in(down_EHI);
    args.ld_gate_up = gate_up_EJH.stride(0), args.ld_down = down_EHI.stride(0);
    args.x = in(x_NH), args.ldx = x_NH.stride(0), args.N = x_NH.size(0), args.H = x_NH.size(1), args.y = y.data_ptr();
    table->experts(args, is_bf16(x_NH), threads());
    return y;
}

Tensor experts(const Tensor& x_NH, const Tensor& weights_NK, const Tensor& ids_NK, const Tensor& gate_up_EJH, const Tensor& down_EHI) {
    const Tensor weights = weights_NK.to(at::kFloat).contiguous(), ids = ids_NK.contiguous();
    hmr::Experts args = {};
    args.K = ids.size(1), args.ids = indices(ids), args.weights = in_floats(weights);
    return run_experts(x_NH, gate_up_EJH, down_EHI, args);
}

Tensor mixture(const Tensor& x_NH, const Tensor& router_EH, const Tensor& gate_up_EJH, const Tensor& down_EHI, const Tensor& shared_gate_SH,
               const Tensor& shared_up_SH, const Tensor& shared_down_HS, const Tensor& shared_scale_1H, int64_t top_k) {
    hmr::Experts args = {};
    args.K = top_k, args.S = shared_gate_SH.size(0), args.router = in(router_EH);
    args.shared_gate = in(shared_gate_SH), args.shared_up = in(shared_up_SH), args.shared_down = in(shared_down_HS);
    args.shared_scale = in(shared_scale_1H);
    return run_experts(x_NH, gate_up_EJH, down_EHI, args);
}

Tensor attention_decode(const Tensor& q_BQD, const Tensor& kv_PL2KD, const Tensor& table_BX, const Tensor& lengths_B, int64_t longest) {
    const int64_t B = q_BQD.size(0), Q = q_BQD.size(1), D = q_BQD.size(2), L = kv_PL2KD.size(1), K = kv_PL2KD.size(3);
    const Tensor o = empty_like(q_BQD, {B, Q, D});
    table->attend({in(q_BQD), in(kv_PL2KD), q_BQD.stride(0), kv_PL2KD.stride(0), kv_PL2KD.stride(1), B, Q, K, D, L, indices(table_BX),
                   indices(lengths_B), table_BX.stride(0), o.data_ptr()},
                  is_bf16(q_BQD), threads());
    return o;
}

Tensor run_conv(const Tensor& x, const Tensor& weight_CW, const optional<Tensor>& bias_C, const Tensor& state_JSC, const Tensor& slots_B,
                const int64_t* starts) {
    const int64_t B = slots_B.size(0), C = weight_CW.size(0), W = width("weight_CW", weight_CW);
    const Tensor y = empty_like(x, {x.size(0), C});
    table->conv({in(x), x.stride(0), B, C, W, starts, in(weight_CW), in(bias_C), state_JSC.data_ptr(), state_JSC.stride(0), indices(slots_B),
                 y.data_ptr(), C},
                is_bf16(x), threads());
    return y;
}

Tensor conv_prefill(const Tensor& x_TC, const Tensor& weight_CW, const optional<Tensor>& bias_C, const Tensor& state_JSC, const Tensor& slots_B,
                    const Tensor& cu_seqlens_X) {
    return run_conv(x_TC, weight_CW, bias_C, state_JSC, slots_B, indices(cu_seqlens_X));
}

Tensor conv_update(const Tensor& x_BC, const Tensor& weight_CW, const optional<Tensor>& bias_C, const Tensor& state_JSC, const Tensor& slots_B) {
    return run_conv(x_BC, weight_CW, bias_C, state_JSC, slots_B, nullptr);
}

Tensor rule_prefill(const Tensor& q_TMK, const Tensor& k_TMK, const Tensor& v_THV, const Tensor& g_TH, const Tensor& beta_TH,
                    const Tensor& state_JHKV, const Tensor& slots_B, const Tensor& cu_seqlens_X) {
    const int64_t T = q_TMK.size(0), M = q_TMK.size(1), K = q_TMK.size(2), H = v_THV.size(1), V = v_THV.size(2);
    const Tensor o = empty_like(v_THV, {T, H, V});
    const Tensor q = with_dense_heads(q_TMK), k = with_dense_heads(k_TMK), v = with_dense_heads(v_THV);
    table->rule({in(q), in(k), in(v), q.stride(0), k.stride(0), v.stride(0), slots_B.size(0), M, H, K, V, in_floats(g_TH), in_floats(beta_TH),
                 g_TH.stride(0), beta_TH.stride(0), floats(state_JHKV), state_JHKV.stride(0), indices(slots_B), indices(cu_seqlens_X), o.data_ptr()},
                is_bf16(q_TMK), threads());
    return o;
}

Tensor rule_decode(const Tensor& qkv_BC, const Tensor& z_BHV, const Tensor& b_BH, const Tensor& a_BH, const Tensor& conv_weight_CW,
                   const Tensor& A_log_H, const Tensor& dt_bias_H, const Tensor& norm_weight_V, const Tensor& conv_JSC,
                   const Tensor& state_JHKV, const Tensor& slots_B, int64_t num_key_heads, double eps) {
    const int64_t B = qkv_BC.size(0), H = state_JHKV.size(1), K = state_JHKV.size(2), V = state_JHKV.size(3);
    const int64_t W = width("conv_weight_CW", conv_weight_CW);
    const Tensor y = empty_like(qkv_BC, {B, H, V});
    table->rule_decode({in(qkv_BC), in(z_BHV), in(b_BH), in(a_BH), qkv_BC.stride(0), z_BHV.stride(0), b_BH.stride(0), a_BH.stride(0), B,
                        num_key_heads, H, K, V, W, in(conv_weight_CW), in(A_log_H), in(dt_bias_H), in(norm_weight_V), conv_JSC.data_ptr(),
                        conv_JSC.stride(0), floats(state_JHKV), state_JHKV.stride(0), indices(slots_B), (float)eps, y.data_ptr()},
                       is_bf16(qkv_BC), threads());
    return y;
}

Tensor scan_prefill(const Tensor& x_THP, const Tensor& dt_TH, const Tensor& A_H, const Tensor& b_TGN, const Tensor& c_TGN, const Tensor& D_H,
                    const Tensor& state_JHPN, const Tensor& slots_B, const Tensor& cu_seqlens_X) {
    const int64_t T = x_THP.size(0), H = x_THP.size(1), P = x_THP.size(2), G = b_TGN.size(1), N = b_TGN.size(2);
    const Tensor y = empty_like(x_THP, {T, H, P});
    const Tensor x = with_dense_heads(x_THP), b = with_dense_heads(b_TGN), c = with_dense_heads(c_TGN);
    table->scan({in(x), in(b), in(c), in(D_H), x.stride(0), b.stride(0), c.stride(0), slots_B.size(0), H, P, G, N, in_floats(dt_TH), in_floats(A_H),
                 dt_TH.stride(0), floats(state_JHPN), state_JHPN.stride(0), indices(slots_B), indices(cu_seqlens_X), y.data_ptr()},
                is_bf16(x_THP), threads());
    return y;
}

Tensor scan_decode(const Tensor& xbc_BC, const Tensor& z_BI, const Tensor& dt_BH, const Tensor& conv_weight_CW, const optional<Tensor>& conv_bias_C,
                   const Tensor& A_log_H, const Tensor& D_H, const Tensor& dt_bias_H, const optional<Tensor>& norm_weight_I, const Tensor& conv_JSC,
                   const Tensor& state_JHPN, const Tensor& slots_B, int64_t num_groups, std::tuple<double, optional<double>> dt_limit, double eps) {
    const int64_t B = xbc_BC.size(0), H = state_JHPN.size(1), P = state_JHPN.size(2), N = state_JHPN.size(3);
    const int64_t W = width("conv_weight_CW", conv_weight_CW);
    const Tensor y = empty_like(xbc_BC, {B, H * P});
    table->scan_decode({in(xbc_BC), in(z_BI), in(dt_BH), xbc_BC.stride(0), z_BI.stride(0), dt_BH.stride(0), B, H, P, num_groups, N, W,
                        in(conv_weight_CW), in(conv_bias_C), in(A_log_H), in(D_H), in(dt_bias_H), in(norm_weight_I), conv_JSC.data_ptr(),
                        conv_JSC.stride(0), floats(state_JHPN), state_JHPN.stride(0), indices(slots_B), (float)std::get<0>(dt_limit),
                        std::get<1>(dt_limit) ? (float)*std::get<1>(dt_limit) : INFINITY, (float)eps, y.data_ptr()},
                       is_bf16(xbc_BC), threads());
    return y;
}

Tensor run_norm(const Tensor& x_NH, const optional<Tensor>& gate_NH, const Tensor& weight_H, int64_t num_groups, double eps, int kind) {
    const int64_t N = x_NH.size(0), H = x_NH.size(1);
    const Tensor y = empty_like(x_NH, {N, H});
    table->norm({in(x_NH), in(gate_NH), in(weight_H), x_NH.stride(0), gate_NH ? gate_NH->stride(0) : 0, N, H, num_groups, (float)eps, kind,
                 y.data_ptr()},
                is_bf16(x_NH), threads());
    return y;
}

Tensor rms_norm(const Tensor& x_NH, const Tensor& weight_H, double eps) { return run_norm(x_NH, {}, weight_H, 1, eps, 0); }

Tensor norm_then_gate(const Tensor& x_NH, const Tensor& gate_NH, const Tensor& weight_H, double eps) {
    return run_norm(x_NH, gate_NH, weight_H, 1, eps, 1);
}

Tensor gate_then_norm(const Tensor& x_NH, const Tensor& gate_NH, const Tensor& weight_H, int64_t num_groups, double eps) {
    return run_norm(x_NH, gate_NH, weight_H, num_groups, eps, 2);
}

Tensor rotate(const Tensor& x_THD, const Tensor& cos_TR, const Tensor& sin_TR) {
    const int64_t T = x_THD.size(0), H = x_THD.size(1), D = x_THD.size(2), R = cos_TR.size(1);
    const Tensor y = empty_like(x_THD, {T, H, D});
    table->rope({in(x_THD), in(cos_TR), in(sin_TR), x_THD.stride(0), x_THD.stride(1), cos_TR.stride(0), sin_TR.stride(0), T, H, D, R, y.data_ptr()},
                is_bf16(x_THD), threads());
    return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using py::arg;
    use_instruction_set(hmr::instruction_sets().back());
    // Other Python threads run during a call. A C++ exception becomes a Python one after the interpreter lock is held again.
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("instruction_sets", &hmr::instruction_sets);
    m.def("use_instruction_set", &use_instruction_set);
    m.def("instruction_set", [] { return table->name; });
    m.def("project", &project, unlocked);
    m.def("experts", &experts, unlocked);
    m.def("mixture", &mixture, unlocked, arg("x_NH"), arg("router_EH"), arg("gate_up_EJH"), arg("down_EHI"), arg("shared_gate_SH"), arg("shared_up_SH"),
          arg("shared_down_HS"), arg("shared_scale_1H"), py::kw_only(), arg("top_k"));
    m.def("attention_decode", &attention_decode, unlocked);
    m.def("conv_prefill", &conv_prefill, unlocked);
    m.def("conv_update", &conv_update, unlocked);
    m.def("rule_prefill", &rule_prefill, unlocked);
    m.def("rule_decode", &rule_decode, unlocked, arg("qkv_BC"), arg("z_BHV"), arg("b_BH"), arg("a_BH"), arg("conv_weight_CW"), arg("A_log_H"),
          arg("dt_bias_H"), arg("norm_weight_V"), arg("conv_JSC"), arg("state_JHKV"), arg("slots_B"), py::kw_only(), arg("num_key_heads"), arg("eps"));
    m.def("scan_prefill", &scan_prefill, unlocked);
    m.def("scan_decode", &scan_decode, unlocked, arg("xbc_BC"), arg("z_BI"), arg("dt_BH"), arg("conv_weight_CW"), arg("conv_bias_C"), arg("A_log_H"),
          arg("D_H"), arg("dt_bias_H"), arg("norm_weight_I"), arg("conv_JSC"), arg("state_JHPN"), arg("slots_B"), py::kw_only(), arg("num_groups"),
          arg("dt_limit"), arg("eps"));
    m.def("rms_norm", &rms_norm, unlocked);
    m.def("norm_then_gate", &norm_then_gate, unlocked);
    m.def("gate_then_norm", &gate_then_norm, unlocked);
    m.def("rotate", &rotate, unlocked);
}
