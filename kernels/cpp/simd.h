// Vectors of LANES floats in the compiler's own vector types, so that the same kernel compiles for any instruction set.
//
// Included inside a namespace per instruction set, with LANES defined, and HMR_BF16_DOT where two bfloat16 vectors can be
// multiplied and added into a float one by one instruction. No standard library here: a template instantiated for a wide
// instruction set could be merged with that of a narrow one and run where it must not.

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

// Multiplications, or elements of the cheaper kernels, from which a second thread pays.
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
    return (vf)(__builtin_convertvector(h, vu) << 16);
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

INLINE vf hadd(vf a, vf b) {  // sums of neighbours: first a's, then b's
#if LANES == 16
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

INLINE vf sums(vf* v) {  // lane i has the sum of v[i], for LANES vectors, which are destroyed
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] = hadd(v[2 * i], v[2 * i + 1]);
    return v[0];
}

INLINE float sum(vf v) {
    for (int n = LANES; n > 1; n /= 2) v = hadd(v, v);
    return v[0];
}

INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

INLINE vf vexp(vf x) {  // 2 ulp; from e^-87.3, below which it stays, to e^88.3
    x = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
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

// acc + the products of STEP elements of two rows
#if defined(HMR_BF16_DOT)
INLINE vf dot_step(const bf16* a, const bf16* b, vf acc) {
    __m512bh x, y;
    __builtin_memcpy(&x, a, 64);
    __builtin_memcpy(&y, b, 64);
    return (vf)_mm512_dpbf16_ps((__m512)acc, x, y);
}
template <typename T> struct Step { static const int64_t size = LANES; };
template <> struct Step<bf16> { static const int64_t size = 2 * LANES; };
#else
INLINE vf dot_step(const bf16* a, const bf16* b, vf acc) { return acc + load(a) * load(b); }
template <typename T> struct Step { static const int64_t size = LANES; };
#endif
INLINE vf dot_step(const float* a, const float* b, vf acc) { return acc + load(a) * load(b); }

template <typename T> INLINE vf dot_rest(const T* a, const T* b, int64_t n, vf acc) {
    for (; n >= LANES; n -= LANES, a += LANES, b += LANES) acc += load(a) * load(b);
    return n ? acc + load(a, n) * load(b, n) : acc;
}

template <typename T> INLINE vf dot(const T* a, const T* b, int64_t n) {
    const int64_t step = Step<T>::size;
    vf even = vf{}, odd = vf{};
    for (; n >= 2 * step; n -= 2 * step, a += 2 * step, b += 2 * step) {
        even = dot_step(a, b, even);
        odd = dot_step(a + step, b + step, odd);
    }
    if (n >= step) {
        even = dot_step(a, b, even);
        a += step, b += step, n -= step;
    }
    return dot_rest(a, b, n, even + odd);
}

// out[m][o] = x[m] . w[o] for M rows x and O rows w, which lie ldw apart; out in floats, rows ldo apart
template <int M, int O, typename T>
INLINE void tile(const T* const* x, const T* w, int64_t ldw, int64_t K, float* out, int64_t ldo) {
    const int64_t step = Step<T>::size;
    const int padded = (M * O + LANES - 1) / LANES * LANES;
    vf acc[padded] = {};
    int64_t k = 0;
    for (; k + step <= K; k += step)
        for (int m = 0; m < M; m++)
            for (int o = 0; o < O; o++) acc[m * O + o] = dot_step(x[m] + k, w + o * ldw + k, acc[m * O + o]);
    if (k < K)
        for (int m = 0; m < M; m++)
            for (int o = 0; o < O; o++) acc[m * O + o] = dot_rest(x[m] + k, w + o * ldw + k, K - k, acc[m * O + o]);
    float flat[padded];
    for (int i = 0; i < padded; i += LANES) store(flat + i, sums(acc + i));
    for (int m = 0; m < M; m++) __builtin_memcpy(out + m * ldo, flat + m * O, O * sizeof(float));
}

// One row x: the rows of w are read one after another, as memory likes it.
template <typename T> INLINE void row_times(const T* x, const T* w, int64_t ldw, int64_t O, int64_t K, float* out) {
    int64_t o = 0;
    for (; o + LANES <= O; o += LANES) {
        vf acc[LANES];
        for (int i = 0; i < LANES; i++) acc[i] = dot(x, w + (o + i) * ldw, K);
        store(out + o, sums(acc));
    }
    for (; o < O; o++) out[o] = sum(dot(x, w + o * ldw, K));
}

// The same for M rows x. Four rows of w at a time are multiplied with all rows of x.
template <typename T>
static void rows_times(const T* const* x, int64_t M, const T* w, int64_t ldw, int64_t O, int64_t K, float* out, int64_t ldo) {
    if (M == 1) return row_times(x[0], w, ldw, O, K, out);
    int64_t o = 0;
    for (; o + 4 <= O; o += 4) {
        int64_t m = 0;
        for (; m + 4 <= M; m += 4) tile<4, 4>(x + m, w + o * ldw, ldw, K, out + m * ldo + o, ldo);
        if (M - m == 3) tile<3, 4>(x + m, w + o * ldw, ldw, K, out + m * ldo + o, ldo);
        if (M - m == 2) tile<2, 4>(x + m, w + o * ldw, ldw, K, out + m * ldo + o, ldo);
        if (M - m == 1) tile<1, 4>(x + m, w + o * ldw, ldw, K, out + m * ldo + o, ldo);
    }
    for (; o < O; o++)
        for (int64_t m = 0; m < M; m++) out[m * ldo + o] = sum(dot(x[m], w + o * ldw, K));
}

struct Range {
    int64_t begin, end;
};

// Part `index` of `count` of n things, which come in units of `unit`.
INLINE Range share(int64_t n, int64_t index, int64_t count, int64_t unit = 1) {
    int64_t units = (n + unit - 1) / unit;
    int64_t begin = units * index / count * unit, end = units * (index + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
}
