// Products by AMX on any processor: the tiles' instructions, and AVX-512's dot product for what is left over, are done here
// number by number. Random products, against sums in double; exit status 1 names the first that is wrong.
#include <stdio.h>

#include <random>
#include <vector>

#include "cpp/headers.h"

static float registers[8][16][16];  // 16 rows of 64 bytes

static float number(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

static void emulated_load(int t, const void* from, long stride) {
    for (int row = 0; row < 16; row++) memcpy(registers[t][row], (const char*)from + row * stride, 64);
}

static void emulated_store(int t, void* to, long stride) {
    for (int row = 0; row < 16; row++) memcpy((char*)to + row * stride, registers[t][row], 64);
}

static void emulated_product(int sums, int left, int right) {
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            uint16_t a[2], b[32];
            memcpy(a, &registers[left][i][k], sizeof a);
            memcpy(b, registers[right][k], sizeof b);
            for (int j = 0; j < 16; j++) {
                registers[sums][i][j] += number(a[0]) * number(b[2 * j]);
                registers[sums][i][j] += number(a[1]) * number(b[2 * j + 1]);
            }
        }
}

static __m512 emulated_dot(__m512 sums, __m512bh left, __m512bh right) {
    uint16_t a[32], b[32];
    float out[16];
    memcpy(a, &left, 64), memcpy(b, &right, 64), memcpy(out, &sums, 64);
    for (int i = 0; i < 32; i++) out[i / 2] += number(a[i]) * number(b[i]);
    memcpy(&sums, out, 64);
    return sums;
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_zero(t) memset(registers[t], 0, sizeof registers[t])
#define _tile_dpbf16ps emulated_product
#define _tile_loadconfig(shapes) (void)shapes
#define _tile_release() (void)0
#define _mm512_dpbf16_ps emulated_dot

#define LANES 16
#define HMR_BF16_DOT 1
#define HMR_AMX 1
namespace hmr {
bool tiles_allowed = true;
namespace emulated {
#include "cpp/simd.h"
#include "cpp/amx.h"
#include "cpp/product.h"
}  // namespace emulated
}  // namespace hmr

using hmr::bf16;
using namespace hmr::emulated;

int main() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int number_of = 0; number_of < 200; number_of++) {
        const int64_t M = 1 + random() % (number_of % 10 ? 40 : 300), O = 1 + random() % 100, K = 1 + random() % 200;
        const int64_t ldw = K + random() % 9, ldo = O + random() % 5;
        std::vector<bf16> w(O * ldw), x(M * K);
        for (auto& each : w) narrow(&each, normal(random));
        for (auto& each : x) narrow(&each, normal(random));
        ReadyRows<bf16> rows(M, K);
        for (int64_t m = 0; m < M; m++) rows.set(m, x.data() + m * K, K);
        std::vector<float> out(M * ldo, NAN);
        rows_times(rows.rows, M, w.data(), ldw, O, K, out.data(), ldo);
        for (int64_t m = 0; m < M; m++)
            for (int64_t o = 0; o < ldo; o++) {
                double want = 0, size = 1e-9;
                for (int64_t k = 0; k < K && o < O; k++) {
                    const double product = (double)number(x[m * K + k].bits) * number(w[o * ldw + k].bits);
                    want += product, size += fabs(product);
                }
                const float got = out[m * ldo + o];
                if (o < O ? !(fabs(got - want) <= 1e-6 * size) : !isnan(got)) {
                    printf("M %ld O %ld K %ld, row %ld column %ld: %g, wanted %g\n", M, O, K, m, o, got, want);
                    return 1;
                }
            }
    }
    puts("200 products");
}
