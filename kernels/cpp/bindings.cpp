// The ops' signatures in C++: checks of every argument, and the kernels of the instruction set that is used, at first the best
// one. A bad argument is a ValueError that names it, with what it is and what was wanted.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
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

template <typename Numbers> string listed(const Numbers& numbers) {
    string text = "[";
    for (auto number : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(number);
    return text + "]";
}

string dtype_name(at::ScalarType type) {
    switch (type) {
        case at::kFloat: return "float32";
        case at::kDouble: return "float64";
        case at::kBFloat16: return "bfloat16";
        case at::kHalf: return "float16";
        case at::kLong: return "int64";
        case at::kInt: return "int32";
        default: return c10::toString(type);
    }
}

// The numbers that the letters of one call stand for; as Sizes in checks.py.
struct Sizes {
    int64_t known[128];
    Sizes() { std::fill(std::begin(known), std::end(known), -1); }
    int64_t operator[](char letter) const { return known[(int)letter]; }

    void take(const char* name, const Tensor& x, std::initializer_list<at::ScalarType> types, int dense = 1) {
        const string whole = name, letters = whole.substr(whole.rfind('_') + 1);
        bool fits = x.dim() == (int64_t)letters.size();
        for (size_t i = 0; fits && i < letters.size(); i++) {
            const int64_t wanted = known[(int)letters[i]];
            fits = wanted < 0 || wanted == x.size(i);
        }
        if (!fits) {
            string text;
            for (char letter : letters) {
                text += (text.empty() ? "" : ", ") + string(1, letter);
                if (known[(int)letter] >= 0) text += " = " + std::to_string(known[(int)letter]);
            }
            throw py::value_error(whole + ": shape " + listed(x.sizes()) + ", wanted [" + text + "]");
        }
        for (size_t i = 0; i < letters.size(); i++) known[(int)letters[i]] = x.size(i);
        if (std::find(types.begin(), types.end(), x.scalar_type()) == types.end()) {
            string text;
            for (auto type : types) text += (text.empty() ? "" : " or ") + dtype_name(type);
            throw py::value_error(whole + ": dtype " + dtype_name(x.scalar_type()) + ", wanted " + text);
        }
        if (!x.device().is_cpu()) throw py::value_error(whole + ": device " + x.device().str() + ", wanted cpu");
        int64_t step = 1;
        for (int64_t i = x.dim() - 1; i >= x.dim() - dense; i--) {
            if (x.size(i) > 1 && x.stride(i) != step && x.numel())
                throw py::value_error(whole + ": strides " + listed(x.strides()) + ", wanted the last " +
                                      std::to_string(dense) + " dimensions contiguous");
            step *= x.size(i);
        }
    }

    void multiple(char letter, char of) const {
        const int64_t number = (*this)[letter], divisor = (*this)[of];
        if (divisor <= 0 || number % divisor)
            throw py::value_error(string(1, letter) + ": " + std::to_string(number) + ", wanted a multiple of " +
                                  string(1, of) + " = " + std::to_string(divisor));
    }
};

void check_slots(const Tensor& slots, int64_t count) {
    const int64_t *s = slots.const_data_ptr<int64_t>(), n = slots.numel();
    for (int64_t i = 0; i < n; i++)
        if (s[i] < 0 || s[i] >= count)
            throw py::value_error("slots_B: index " + std::to_string(s[i]) + ", wanted 0 to " + std::to_string(count - 1));
    std::vector<int64_t> sorted(s, s + n);
    std::sort(sorted.begin(), sorted.end());
    auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end())
        throw py::value_error("slots_B: index " + std::to_string(*twice) + " appears " +
                              std::to_string(std::count(sorted.begin(), sorted.end(), *twice)) + " times, wanted once");
}

void check_cu_seqlens(const Tensor& x, int64_t num_sequences, int64_t num_tokens) {
    if (x.numel() != num_sequences + 1)
        throw py::value_error("cu_seqlens_X: shape " + listed(x.sizes()) + ", wanted [X = " +
                              std::to_string(num_sequences + 1) + "]");
    const int64_t* s = x.const_data_ptr<int64_t>();
    if (s[0] != 0 || s[num_sequences] != num_tokens)
        throw py::value_error("cu_seqlens_X: from " + std::to_string(s[0]) + " to " + std::to_string(s[num_sequences]) +
                              ", wanted 0 to " + std::to_string(num_tokens));
    for (int64_t i = 0; i < num_sequences; i++)
        if (s[i + 1] < s[i])
            throw py::value_error("cu_seqlens_X: " + std::to_string(s[i + 1]) + " after " + std::to_string(s[i]) +
                                  ", wanted numbers that never fall");
}

void check_width(const char* name, int64_t width) {
    if (width < 1 || width > 16)
        throw py::value_error(string(name) + ": W = " + std::to_string(width) + ", wanted 1 to 16");
}

bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }
const void* in(const Tensor& x) { return x.const_data_ptr(); }
const void* in(const optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }
float* floats(const Tensor& x) { return x.data_ptr<float>(); }
const int64_t* indices(const Tensor& x) { return x.const_data_ptr<int64_t>(); }
Tensor empty_like(const Tensor& x, at::IntArrayRef shape) { return at::empty(shape, x.options()); }
// Rows [N, heads, D] whose heads follow one another; a copy where they do not.
Tensor with_dense_heads(const Tensor& x) { return x.stride(1) == x.size(2) || x.size(1) <= 1 ? x : x.contiguous(); }
const auto FLOATS = {at::kFloat, at::kBFloat16};

std::vector<Tensor> project(const Tensor& x_NH, const std::vector<Tensor>& weights) {
    Sizes sizes;
    sizes.take("x_NH", x_NH, FLOATS);
    const auto type = x_NH.scalar_type();
    std::vector<const void*> pointers;
    std::vector<int64_t> outs;
    int64_t total = 0;
    for (const auto& weight : weights) {
        sizes.known['O'] = -1;
        sizes.take("weight_OH", weight, {type}, 2);
        pointers.push_back(in(weight));
        outs.push_back(weight.size(0));
        total += weight.size(0);
    }
    const int64_t N = sizes['N'], H = sizes['H'];
    const Tensor y = empty_like(x_NH, {N, total});
    if (N)
        table->project({in(x_NH), x_NH.stride(0), N, H, (int64_t)weights.size(), pointers.data(), outs.data(), y.data_ptr(), total},
                       is_bf16(x_NH), threads());
    if (weights.size() == 1) return {y};
    return y.split_with_sizes(outs, 1);
}

Tensor run_experts(const Tensor& x, hmr::Experts& args) {
    const Tensor y = empty_like(x, {x.size(0), x.size(1)});
    args.x = in(x), args.ldx = x.stride(0), args.N = x.size(0), args.H = x.size(1), args.y = y.data_ptr();
    table->experts(args, is_bf16(x), threads());
    return y;
}

Tensor experts(const Tensor& x_NH, const Tensor& weights_NK, const Tensor& ids_NK, const Tensor& gate_up_EJH, const Tensor& down_EHI) {
    Sizes sizes;
    const auto type = x_NH.scalar_type();
    sizes.take("x_NH", x_NH, FLOATS);
    sizes.take("weights_NK", weights_NK, {type, at::kFloat});
    sizes.take("ids_NK", ids_NK, {at::kLong});
    sizes.take("gate_up_EJH", gate_up_EJH, {type}, 2);
    sizes.take("down_EHI", down_EHI, {type}, 2);
    if (sizes['J'] != 2 * sizes['I'])
        throw py::value_error("gate_up_EJH: J = " + std::to_string(sizes['J']) + ", wanted 2 I = " + std::to_string(2 * sizes['I']));
    const Tensor weights = weights_NK.to(at::kFloat).contiguous(), ids = ids_NK.contiguous();
    hmr::Experts args = {};
    args.E = sizes['E'], args.K = sizes['K'], args.I = sizes['I'];
    args.gate_up = in(gate_up_EJH), args.down = in(down_EHI);
    args.ld_gate_up = gate_up_EJH.stride(0), args.ld_down = down_EHI.stride(0);
    args.ids = indices(ids), args.weights = weights.const_data_ptr<float>();
    return run_experts(x_NH, args);
}

Tensor mixture(const Tensor& x_NH, const Tensor& router_EH, const Tensor& gate_up_EJH, const Tensor& down_EHI, const Tensor& shared_gate_SH,
               const Tensor& shared_up_SH, const Tensor& shared_down_HS, const Tensor& shared_scale_1H, int64_t top_k) {
    Sizes sizes;
    const auto type = x_NH.scalar_type();
    sizes.take("x_NH", x_NH, FLOATS);
    sizes.take("router_EH", router_EH, {type}, 2);
    sizes.take("gate_up_EJH", gate_up_EJH, {type}, 2);
    sizes.take("down_EHI", down_EHI, {type}, 2);
    sizes.take("shared_gate_SH", shared_gate_SH, {type}, 2);
    sizes.take("shared_up_SH", shared_up_SH, {type}, 2);
    sizes.take("shared_down_HS", shared_down_HS, {type}, 2);
    sizes.known['1'] = 1;
    sizes.take("shared_scale_1H", shared_scale_1H, {type});
    if (sizes['J'] != 2 * sizes['I'])
        throw py::value_error("gate_up_EJH: J = " + std::to_string(sizes['J']) + ", wanted 2 I = " + std::to_string(2 * sizes['I']));
    if (top_k < 1 || top_k > sizes['E'])
        throw py::value_error("top_k: " + std::to_string(top_k) + ", wanted 1 to E = " + std::to_string(sizes['E']));
    hmr::Experts args = {};
    args.E = sizes['E'], args.K = top_k, args.I = sizes['I'], args.S = sizes['S'];
    args.gate_up = in(gate_up_EJH), args.down = in(down_EHI), args.router = in(router_EH);
    args.ld_gate_up = gate_up_EJH.stride(0), args.ld_down = down_EHI.stride(0);
    args.shared_gate = in(shared_gate_SH), args.shared_up = in(shared_up_SH), args.shared_down = in(shared_down_HS);
    args.shared_scale = in(shared_scale_1H);
    return run_experts(x_NH, args);
}

Tensor attention_decode(const Tensor& q_BQD, const Tensor& kv_PL2KD, const Tensor& table_BX, const Tensor& lengths_B, int64_t longest) {
    Sizes sizes;
    sizes.take("q_BQD", q_BQD, FLOATS, 2);
    sizes.known['2'] = 2;
    sizes.take("kv_PL2KD", kv_PL2KD, {q_BQD.scalar_type()}, 3);
    sizes.multiple('Q', 'K');
    sizes.take("table_BX", table_BX, {at::kLong});
    sizes.take("lengths_B", lengths_B, {at::kLong});
    const int64_t B = sizes['B'], L = sizes['L'], most = sizes['X'] * L, *lengths = indices(lengths_B), *table_of = indices(table_BX);
    if (longest < 1 || longest > most)
        throw py::value_error("longest: " + std::to_string(longest) + ", wanted 1 to X L = " + std::to_string(most));
    for (int64_t b = 0; b < B; b++) {
        if (lengths[b] < 1 || lengths[b] > longest)
            throw py::value_error("lengths_B: " + std::to_string(lengths[b]) + ", wanted 1 to longest = " + std::to_string(longest));
        for (int64_t x = 0; x < sizes['X']; x++) {
            const int64_t page = table_of[b * table_BX.stride(0) + x];
            if (page < 0 || page >= sizes['P'])
                throw py::value_error("table_BX: page " + std::to_string(page) + ", wanted 0 to " + std::to_string(sizes['P'] - 1));
        }
    }
    const Tensor o = empty_like(q_BQD, {B, sizes['Q'], sizes['D']});
    table->attend({in(q_BQD), in(kv_PL2KD), q_BQD.stride(0), kv_PL2KD.stride(0), kv_PL2KD.stride(1), B, sizes['Q'], sizes['K'], sizes['D'], L,
                   table_of, lengths, table_BX.stride(0), o.data_ptr()},
                  is_bf16(q_BQD), threads());
    return o;
}

Tensor run_conv(const char* name, const Tensor& x, const Tensor& weight_CW, const optional<Tensor>& bias_C, const Tensor& state_JSC,
                const Tensor& slots_B, const Tensor* cu_seqlens) {
    Sizes sizes;
    const auto type = x.scalar_type();
    sizes.take(name, x, FLOATS);
    sizes.take("weight_CW", weight_CW, {type}, 2);
    check_width("weight_CW", sizes['W']);
    sizes.known['S'] = sizes['W'] - 1;
    if (bias_C) sizes.take("bias_C", *bias_C, {type});
    sizes.take("state_JSC", state_JSC, {type}, 2);
    sizes.take("slots_B", slots_B, {at::kLong});
    check_slots(slots_B, sizes['J']);
    if (cu_seqlens) {
        sizes.take("cu_seqlens_X", *cu_seqlens, {at::kLong});
        check_cu_seqlens(*cu_seqlens, sizes['B'], sizes['T']);
    }
    const Tensor y = empty_like(x, {x.size(0), x.size(1)});
    table->conv({in(x), x.stride(0), sizes['B'], sizes['C'], sizes['W'], cu_seqlens ? indices(*cu_seqlens) : nullptr, in(weight_CW), in(bias_C),
                 state_JSC.data_ptr(), state_JSC.stride(0), indices(slots_B), y.data_ptr(), sizes['C']},
                is_bf16(x), threads());
    return y;
}

Tensor conv_prefill(const Tensor& x_TC, const Tensor& weight_CW, const optional<Tensor>& bias_C, const Tensor& state_JSC, const Tensor& slots_B,
                    const Tensor& cu_seqlens_X) {
    return run_conv("x_TC", x_TC, weight_CW, bias_C, state_JSC, slots_B, &cu_seqlens_X);
}

Tensor conv_update(const Tensor& x_BC, const Tensor& weight_CW, const optional<Tensor>& bias_C, const Tensor& state_JSC, const Tensor& slots_B) {
    return run_conv("x_BC", x_BC, weight_CW, bias_C, state_JSC, slots_B, nullptr);
}

Tensor rule_prefill(const Tensor& q_TMK, const Tensor& k_TMK, const Tensor& v_THV, const Tensor& g_TH, const Tensor& beta_TH,
                    const Tensor& state_JHKV, const Tensor& slots_B, const Tensor& cu_seqlens_X) {
    Sizes sizes;
    const auto type = q_TMK.scalar_type();
    sizes.take("q_TMK", q_TMK, FLOATS);
    sizes.take("k_TMK", k_TMK, {type});
    sizes.take("v_THV", v_THV, {type});
    sizes.multiple('H', 'M');
    sizes.take("g_TH", g_TH, {at::kFloat});
    sizes.take("beta_TH", beta_TH, {at::kFloat});
    sizes.take("state_JHKV", state_JHKV, {at::kFloat}, 3);
    sizes.take("slots_B", slots_B, {at::kLong});
    check_slots(slots_B, sizes['J']);
    sizes.take("cu_seqlens_X", cu_seqlens_X, {at::kLong});
    check_cu_seqlens(cu_seqlens_X, sizes['B'], sizes['T']);
    const Tensor o = empty_like(v_THV, {sizes['T'], sizes['H'], sizes['V']});
    const Tensor q = with_dense_heads(q_TMK), k = with_dense_heads(k_TMK), v = with_dense_heads(v_THV);
    table->rule({in(q), in(k), in(v), q.stride(0), k.stride(0), v.stride(0), sizes['B'], sizes['M'], sizes['H'],
                 sizes['K'], sizes['V'], g_TH.const_data_ptr<float>(), beta_TH.const_data_ptr<float>(), g_TH.stride(0), beta_TH.stride(0),
                 floats(state_JHKV), state_JHKV.stride(0), indices(slots_B), indices(cu_seqlens_X), o.data_ptr()},
                is_bf16(q_TMK), threads());
    return o;
}

Tensor rule_decode(const Tensor& qkv_BC, const Tensor& z_BHV, const Tensor& b_BH, const Tensor& a_BH, const Tensor& conv_weight_CW,
                   const Tensor& A_log_H, const Tensor& dt_bias_H, const Tensor& norm_weight_V, const Tensor& conv_JSC,
                   const Tensor& state_JHKV, const Tensor& slots_B, int64_t num_key_heads, double eps) {
    Sizes sizes;
    const auto type = qkv_BC.scalar_type();
    sizes.known['M'] = num_key_heads;
    sizes.take("qkv_BC", qkv_BC, FLOATS);
    sizes.take("z_BHV", z_BHV, {type}, 2);
    sizes.multiple('H', 'M');
    sizes.take("b_BH", b_BH, {type});
    sizes.take("a_BH", a_BH, {type});
    sizes.take("conv_weight_CW", conv_weight_CW, {type}, 2);
    check_width("conv_weight_CW", sizes['W']);
    sizes.take("A_log_H", A_log_H, {type});
    sizes.take("dt_bias_H", dt_bias_H, {type});
    sizes.take("norm_weight_V", norm_weight_V, {type});
    sizes.known['S'] = sizes['W'] - 1;
    sizes.take("conv_JSC", conv_JSC, {type}, 2);
    sizes.take("state_JHKV", state_JHKV, {at::kFloat}, 3);
    const int64_t M = num_key_heads, H = sizes['H'], K = sizes['K'], V = sizes['V'], wanted = 2 * M * K + H * V;
    if (sizes['C'] != wanted)
        throw py::value_error("qkv_BC: C = " + std::to_string(sizes['C']) + ", wanted 2 M K + H V = " + std::to_string(wanted) + " (M = " +
                              std::to_string(M) + ", H = " + std::to_string(H) + ", K = " + std::to_string(K) + ", V = " + std::to_string(V) + ")");
    sizes.take("slots_B", slots_B, {at::kLong});
    check_slots(slots_B, sizes['J']);
    const Tensor y = empty_like(qkv_BC, {sizes['B'], H, V});
    table->rule_decode({in(qkv_BC), in(z_BHV), in(b_BH), in(a_BH), qkv_BC.stride(0), z_BHV.stride(0), b_BH.stride(0), a_BH.stride(0), sizes['B'], M,
                        H, K, V, sizes['W'], in(conv_weight_CW), in(A_log_H), in(dt_bias_H), in(norm_weight_V), conv_JSC.data_ptr(),
                        conv_JSC.stride(0), floats(state_JHKV), state_JHKV.stride(0), indices(slots_B), (float)eps, y.data_ptr()},
                       is_bf16(qkv_BC), threads());
    return y;
}

Tensor scan_prefill(const Tensor& x_THP, const Tensor& dt_TH, const Tensor& A_H, const Tensor& b_TGN, const Tensor& c_TGN, const Tensor& D_H,
                    const Tensor& state_JHPN, const Tensor& slots_B, const Tensor& cu_seqlens_X) {
    Sizes sizes;
    const auto type = x_THP.scalar_type();
    sizes.take("x_THP", x_THP, FLOATS);
    sizes.take("dt_TH", dt_TH, {at::kFloat});
    sizes.take("A_H", A_H, {at::kFloat});
    sizes.take("b_TGN", b_TGN, {type});
    sizes.take("c_TGN", c_TGN, {type});
    sizes.multiple('H', 'G');
    sizes.take("D_H", D_H, {type});
    sizes.take("state_JHPN", state_JHPN, {at::kFloat}, 3);
    sizes.take("slots_B", slots_B, {at::kLong});
    check_slots(slots_B, sizes['J']);
    sizes.take("cu_seqlens_X", cu_seqlens_X, {at::kLong});
    check_cu_seqlens(cu_seqlens_X, sizes['B'], sizes['T']);
    const Tensor y = empty_like(x_THP, {sizes['T'], sizes['H'], sizes['P']});
    const Tensor x = with_dense_heads(x_THP), b = with_dense_heads(b_TGN), c = with_dense_heads(c_TGN);
    table->scan({in(x), in(b), in(c), in(D_H), x.stride(0), b.stride(0), c.stride(0), sizes['B'], sizes['H'], sizes['P'],
                 sizes['G'], sizes['N'], dt_TH.const_data_ptr<float>(), A_H.const_data_ptr<float>(), dt_TH.stride(0), floats(state_JHPN),
                 state_JHPN.stride(0), indices(slots_B), indices(cu_seqlens_X), y.data_ptr()},
                is_bf16(x_THP), threads());
    return y;
}

Tensor scan_decode(const Tensor& xbc_BC, const Tensor& z_BI, const Tensor& dt_BH, const Tensor& conv_weight_CW, const optional<Tensor>& conv_bias_C,
                   const Tensor& A_log_H, const Tensor& D_H, const Tensor& dt_bias_H, const optional<Tensor>& norm_weight_I, const Tensor& conv_JSC,
                   const Tensor& state_JHPN, const Tensor& slots_B, int64_t num_groups, std::tuple<double, optional<double>> dt_limit, double eps) {
    Sizes sizes;
    const auto type = xbc_BC.scalar_type();
    sizes.known['G'] = num_groups;
    sizes.take("xbc_BC", xbc_BC, FLOATS);
    sizes.take("z_BI", z_BI, {type});
    sizes.take("dt_BH", dt_BH, {type});
    sizes.multiple('H', 'G');
    sizes.take("conv_weight_CW", conv_weight_CW, {type}, 2);
    check_width("conv_weight_CW", sizes['W']);
    if (conv_bias_C) sizes.take("conv_bias_C", *conv_bias_C, {type});
    if (norm_weight_I) sizes.take("norm_weight_I", *norm_weight_I, {type});
    sizes.take("A_log_H", A_log_H, {type});
    sizes.take("D_H", D_H, {type});
    sizes.take("dt_bias_H", dt_bias_H, {type});
    sizes.known['S'] = sizes['W'] - 1;
    sizes.take("conv_JSC", conv_JSC, {type}, 2);
    sizes.take("state_JHPN", state_JHPN, {at::kFloat}, 3);
    const int64_t H = sizes['H'], P = sizes['P'], N = sizes['N'], G = num_groups, wanted = H * P + 2 * G * N;
    if (sizes['I'] != H * P)
        throw py::value_error("z_BI: I = " + std::to_string(sizes['I']) + ", wanted H P = " + std::to_string(H * P) + " (H = " +
                              std::to_string(H) + ", P = " + std::to_string(P) + ")");
    if (sizes['C'] != wanted)
        throw py::value_error("xbc_BC: C = " + std::to_string(sizes['C']) + ", wanted H P + 2 G N = " + std::to_string(wanted) + " (H = " +
                              std::to_string(H) + ", P = " + std::to_string(P) + ", G = " + std::to_string(G) + ", N = " + std::to_string(N) + ")");
    sizes.take("slots_B", slots_B, {at::kLong});
    check_slots(slots_B, sizes['J']);
    const Tensor y = empty_like(xbc_BC, {sizes['B'], sizes['I']});
    table->scan_decode({in(xbc_BC), in(z_BI), in(dt_BH), xbc_BC.stride(0), z_BI.stride(0), dt_BH.stride(0), sizes['B'], H, P, G, N, sizes['W'],
                        in(conv_weight_CW), in(conv_bias_C), in(A_log_H), in(D_H), in(dt_bias_H), in(norm_weight_I), conv_JSC.data_ptr(),
                        conv_JSC.stride(0), floats(state_JHPN), state_JHPN.stride(0), indices(slots_B), (float)std::get<0>(dt_limit),
                        std::get<1>(dt_limit) ? (float)*std::get<1>(dt_limit) : INFINITY, (float)eps, y.data_ptr()},
                       is_bf16(xbc_BC), threads());
    return y;
}

Tensor run_norm(const Tensor& x_NH, const optional<Tensor>& gate_NH, const Tensor& weight_H, int64_t num_groups, double eps, int kind) {
    Sizes sizes;
    const auto type = x_NH.scalar_type();
    sizes.take("x_NH", x_NH, FLOATS);
    if (gate_NH) sizes.take("gate_NH", *gate_NH, {type});
    sizes.take("weight_H", weight_H, {type});
    if (num_groups < 1 || sizes['H'] % num_groups)
        throw py::value_error("num_groups: " + std::to_string(num_groups) + ", wanted a divisor of H = " + std::to_string(sizes['H']));
    const Tensor y = empty_like(x_NH, {sizes['N'], sizes['H']});
    table->norm({in(x_NH), in(gate_NH), in(weight_H), x_NH.stride(0), gate_NH ? gate_NH->stride(0) : 0, sizes['N'], sizes['H'], num_groups,
                 (float)eps, kind, y.data_ptr()},
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
    Sizes sizes;
    const auto type = x_THD.scalar_type();
    sizes.take("x_THD", x_THD, FLOATS);
    sizes.take("cos_TR", cos_TR, {type});
    sizes.take("sin_TR", sin_TR, {type});
    if (2 * sizes['R'] > sizes['D'])
        throw py::value_error("cos_TR: R = " + std::to_string(sizes['R']) + ", wanted at most half of D = " + std::to_string(sizes['D']));
    const Tensor y = empty_like(x_THD, {sizes['T'], sizes['H'], sizes['D']});
    table->rope({in(x_THD), in(cos_TR), in(sin_TR), x_THD.stride(0), x_THD.stride(1), cos_TR.stride(0), sin_TR.stride(0), sizes['T'], sizes['H'],
                 sizes['D'], sizes['R'], y.data_ptr()},
                is_bf16(x_THD), threads());
    return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using py::arg;
    use_instruction_set(hmr::instruction_sets().back());
    // Other Python threads run meanwhile. An error is thrown as a C++ exception, and made a Python one with the lock held again.
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
