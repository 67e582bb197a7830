// Vectors of LANES floats in the compiler's own vector types, so that the same kernel compiles for any instruction set.
//
// Included inside a namespace per instruction set, with LANES defined, and HMR_BF16_DOT if one instruction multiplies two
// bfloat16 vectors and adds them to a float vector. Do not use the standard library here: the linker could merge a template
// instance of a wide instruction set with that of a narrow one, which then fails on older processors.

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

// From this many multiplications (elements in the cheaper kernels), a second thread makes a call faster.
const int64_t PARALLEL = 16384;

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - vf{}; }

INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load(const bf16* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
#if LANES == 8  // GCC 12 emits five instructions for a conversion that is one
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

INLINE float widen(float x) { return x; }

INLINE float widen(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}

INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE void store(bf16* p, vf v) {  // rounds to nearest, ties to even; NaN stays NaN
    vu u = (vu)v, rounded = u + 0x7fff + ((u >> 16) & 1);
    vu nan = (vu)(v != v);
    vh h = __builtin_convertvector(((rounded & ~nan) | ((u | 0x400000) & nan)) >> 16, vh);
    __builtin_memcpy(p, &h, sizeof h);
}

template <typename T> INLINE vf load(const T* p, int64_t n) {  // the first n < LANES, then zeros
    T part[LANES] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return load(part);
}

template <typename T> INLINE void store(T* p, vf v, int64_t n) {
    T part[LANES];
    store(part, v);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

template <typename T> INLINE vf load_upto(const T* p, int64_t n) { return n >= LANES ? load(p) : load(p, n); }
template <typename T> INLINE void store_upto(T* p, vf v, int64_t n) { n >= LANES ? store(p, v) : store(p, v, n); }
INLINE void narrow(float* p, float x) { *p = x; }
INLINE void narrow(bf16* p, float x) { store(p, splat(x), 1); }

typedef float v4 __attribute__((vector_size(16)));

// The sums of a, b, c and d: first inside each 16 bytes, which is cheap, then across them.
INLINE v4 sums(vf a, vf b, vf c, vf d) {
#if LANES == 16
    const vf ac = __builtin_shufflevector(a, c, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  __builtin_shufflevector(a, c, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const vf bd = __builtin_shufflevector(b, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  __builtin_shufflevector(b, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const vf each = __builtin_shufflevector(ac, bd, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                    __builtin_shufflevector(ac, bd, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return __builtin_shufflevector(each, each, 0, 1, 2, 3) + __builtin_shufflevector(each, each, 4, 5, 6, 7) +
           __builtin_shufflevector(each, each, 8, 9, 10, 11) + __builtin_shufflevector(each, each, 12, 13, 14, 15);
#elif LANES == 8
    const vf ac = (vf)_mm256_unpacklo_ps((__m256)a, (__m256)c) + (vf)_mm256_unpackhi_ps((__m256)a, (__m256)c);
    const vf bd = (vf)_mm256_unpacklo_ps((__m256)b, (__m256)d) + (vf)_mm256_unpackhi_ps((__m256)b, (__m256)d);
    const vf each = (vf)_mm256_unpacklo_ps((__m256)ac, (__m256)bd) + (vf)_mm256_unpackhi_ps((__m256)ac, (__m256)bd);
    return (v4)_mm256_castps256_ps128((__m256)each) + (v4)_mm256_extractf128_ps((__m256)each, 1);
#else
    const vf ac = __builtin_shufflevector(a, c, 0, 4, 1, 5) + __builtin_shufflevector(a, c, 2, 6, 3, 7);
    const vf bd = __builtin_shufflevector(b, d, 0, 4, 1, 5) + __builtin_shufflevector(b, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ac, bd, 0, 4, 1, 5) + __builtin_shufflevector(ac, bd, 2, 6, 3, 7);
#endif
}

INLINE float sum(vf v) { return sums(v, v, v, v)[0]; }

// NaN stays NaN: x is returned if neither is larger.
INLINE vf at_most(vf x, vf most) { return x > most ? most : x; }
INLINE vf at_least(vf x, vf least) { return x < least ? least : x; }

INLINE vf vexp(vf x) {  // 2 ulp; from e^-87.3, below which it stays, to e^88.3
    x = at_most(at_least(x, splat(-87.3f)), splat(88.3f));
    vf t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi power = ((vi)t - 0x4B400000 + 127) << 23;
    return p * (vf)power;
}

INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }
INLINE float sigmoid(float x) { return vsigmoid(splat(x))[0]; }

struct Range {
    int64_t begin, end;
};

// Part `index` of `count` parts of n elements, in multiples of `unit`.
INLINE Range share(int64_t n, int64_t index, int64_t count, int64_t unit = 1) {
    int64_t units = (n + unit - 1) / unit;
    int64_t begin = units * index / count * unit, end = units * (index + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}
