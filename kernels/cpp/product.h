// Products of rows x and rows w of type T, out[m][o] = x[m] . w[o], for projections, router, experts and attention scores.
//
// `ready` converts the rows x once, for any number of rows w: to floats, padded with zeros to a whole number of UNITs.
// Weights stay as they are in memory and are widened in registers. A bfloat16 vector is two of floats, its even
// elements shifted left and its odd ones masked, so a ready row has each UNIT's even elements first, then its odd ones.

template <typename T> struct Ready {
    typedef float type;
    static const int64_t UNIT = LANES;
};
#if defined(HMR_BF16_DOT)
template <> struct Ready<bf16> {
    typedef bf16 type;
    static const int64_t UNIT = 2 * LANES;
};
#else
template <> struct Ready<bf16> {
    typedef float type;
    static const int64_t UNIT = 2 * LANES;
};
#endif

template <typename T> INLINE int64_t ready_size(int64_t K) { return (K + Ready<T>::UNIT - 1) / Ready<T>::UNIT * Ready<T>::UNIT; }

INLINE void ready_unit(const float* x, float* to, float) { store(to, load(x)); }
#if defined(HMR_BF16_DOT)
INLINE void ready_unit(const bf16* x, bf16* to, bf16) { __builtin_memcpy(to, x, 4 * LANES); }
INLINE void ready_unit(const float* x, bf16* to, bf16) { store(to, load(x)), store(to + LANES, load(x + LANES)); }
#else
INLINE void ready_unit(const bf16* x, float* to, bf16) {
    vu both;
    __builtin_memcpy(&both, x, sizeof both);
    store(to, (vf)(both << 16)), store(to + LANES, (vf)(both & 0xffff0000));
}
INLINE void ready_unit(const float* x, float* to, bf16) {
    const vf a = load(x), b = load(x + LANES);
#if LANES == 8
    const vf even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14), odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    const vf even = __builtin_shufflevector(a, b, 0, 2, 4, 6), odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
    store(to, even), store(to + LANES, odd);
}
#endif

// Convert a row of K elements, of T or of floats, for products with rows of T.
template <typename T, typename X> INLINE void ready(const X* x, int64_t K, typename Ready<T>::type* to) {
    const int64_t UNIT = Ready<T>::UNIT;
    int64_t k = 0;
    for (; k + UNIT <= K; k += UNIT) ready_unit(x + k, to + k, T{});
    if (k < K) {
        X rest[UNIT] = {};
        __builtin_memcpy(rest, x + k, (K - k) * sizeof(X));
        ready_unit(rest, to + k, T{});
    }
}

// acc += the products of a UNIT of M ready rows and O rows w
template <int M, int O> INLINE void unit(const float* const* x, int64_t k, const float* w, int64_t ldw, vf (*acc)[O]) {
    vf rows[M];
    for (int m = 0; m < M; m++) rows[m] = load(x[m] + k);
    for (int o = 0; o < O; o++) {
        const vf weight = load(w + o * ldw);
        for (int m = 0; m < M; m++) acc[m][o] += rows[m] * weight;
    }
}

#if defined(HMR_BF16_DOT)
template <int M, int O> INLINE void unit(const bf16* const* x, int64_t k, const bf16* w, int64_t ldw, vf (*acc)[O]) {
    __m512bh rows[M];
    for (int m = 0; m < M; m++) __builtin_memcpy(&rows[m], x[m] + k, 64);
    for (int o = 0; o < O; o++) {
        __m512bh weight;
        __builtin_memcpy(&weight, w + o * ldw, 64);
        for (int m = 0; m < M; m++) acc[m][o] = (vf)_mm512_dpbf16_ps((__m512)acc[m][o], rows[m], weight);
    }
}
#else
template <int M, int O> INLINE void unit(const float* const* x, int64_t k, const bf16* w, int64_t ldw, vf (*acc)[O]) {
    vf even[M], odd[M];
    for (int m = 0; m < M; m++) even[m] = load(x[m] + k), odd[m] = load(x[m] + k + LANES);
    for (int o = 0; o < O; o++) {
        vu both;
        __builtin_memcpy(&both, w + o * ldw, sizeof both);
        for (int m = 0; m < M; m++) acc[m][o] += even[m] * (vf)(both << 16);
        for (int m = 0; m < M; m++) acc[m][o] += odd[m] * (vf)(both & 0xffff0000);
    }
}
#endif

// The whole UNITs of M rows x and O rows w; O is one or a multiple of four. Sums and operands should fit 16 registers.
template <int M, int O, typename T>
INLINE void tile(const typename Ready<T>::type* const* x, const T* w, int64_t ldw, int64_t K, float* out, int64_t ldo) {
    const int64_t UNIT = Ready<T>::UNIT;
    vf acc[M][O] = {};
    int64_t k = 0;
    do {  // runs at least once: for a loop that may not run, GCC keeps the sums in memory
        unit<M, O>(x, k, w + k, ldw, acc);
        k += UNIT;
    } while (k + UNIT <= K);
    for (int m = 0; m < M; m++)
        if constexpr (O == 1)
            out[m * ldo] = sum(acc[m][0]);
        else
            for (int o = 0; o < O; o += 4) {
                const v4 four = sums(acc[m][o], acc[m][o + 1], acc[m][o + 2], acc[m][o + 3]);
                __builtin_memcpy(out + m * ldo + o, &four, 16);
            }
}

// Add the products of the last K % UNIT elements to out. Models built for speed have no such rest.
template <typename T>
static __attribute__((noinline)) void add_rest(const typename Ready<T>::type* const* x, int64_t M, const T* w, int64_t ldw, int64_t O, int64_t K, float* out, int64_t ldo) {
    const int64_t UNIT = Ready<T>::UNIT, whole = K / UNIT * UNIT;
    for (int64_t o = 0; o < O; o++) {
        T rest[UNIT] = {};
        __builtin_memcpy(rest, w + o * ldw + whole, (K - whole) * sizeof(T));
        for (int64_t m = 0; m < M; m++) {
            vf acc[1][1] = {};
            unit<1, 1>(x + m, whole, rest, 0, acc);
            out[m * ldo + o] += sum(acc[0][0]);
        }
    }
}

template <int M, int O, typename T>
INLINE void tiles(const typename Ready<T>::type* const* x, const T* w, int64_t ldw, int64_t from, int64_t to, int64_t K, float* out, int64_t ldo) {
    int64_t o = from;
    if (K < Ready<T>::UNIT) {
        for (int m = 0; m < M; m++)
            for (o = from; o < to; o++) out[m * ldo + o] = 0;
        return;
    }
    for (; o + O <= to; o += O) tile<M, O>(x, w + o * ldw, ldw, K, out + o, ldo);
    for (; o < to; o++) tile<M, 1>(x, w + o * ldw, ldw, K, out + o, ldo);
}

// M rows, with w read as four streams, each a quarter of it and in order. One thread gets the most bandwidth this way: on an
// EPYC 1.6 times that of one stream, and twice that of four or eight rows side by side.
template <int M, typename T>
INLINE void streams(const typename Ready<T>::type* const* x, const T* w, int64_t ldw, int64_t quarter, int64_t K, float* out, int64_t ldo) {
    float four[M][4];
    tile<M, 4>(x, w, quarter * ldw, K, four[0], 4);
    for (int m = 0; m < M; m++)
        for (int stream = 0; stream < 4; stream++) out[m * ldo + stream * quarter] = four[m][stream];
}

template <int N> struct Count {
    static const int value = N;
};

// Call group(first row, Count) for M rows in groups of three or two; a group of one only for a single row.
template <typename T, typename Group> INLINE void in_groups(int64_t M, Group group) {
    const bool three = sizeof(T) == sizeof(typename Ready<T>::type);  // else a weight takes two registers, and three rows do not fit
    for (int64_t m = 0, count; m < M; m += count) {
        const int64_t left = M - m;
        count = left == 1 ? 1 : left == 3 || (three && left > 4) ? 3 : 2;
        if (count == 3) group(m, Count<3>{});
        if (count == 2) group(m, Count<2>{});
        if (count == 1) group(m, Count<1>{});
    }
}

// M ready rows times O rows w, which lie `ldw` apart. Few rows are limited by reading w, so w is read in streams. Many rows
// share a panel of w that stays in the first-level cache.
template <typename T>
static void rows_times(const typename Ready<T>::type* const* x, int64_t M, const T* w, int64_t ldw, int64_t O, int64_t K, float* out, int64_t ldo) {
    const int64_t FEW = 8, PANEL = 24;
    int64_t from = 0;
#if defined(HMR_AMX)
    if constexpr (sizeof(T) == 2) from = tiles_times(x, M, w, ldw, O, K, out, ldo);
#endif
    const int64_t quarter = M <= FEW && K >= Ready<T>::UNIT ? (O - from) / 4 : 0;
    for (int64_t o = from; o < from + quarter; o++)
        in_groups<T>(M, [&](int64_t m, auto count) { streams<count.value>(x + m, w + o * ldw, ldw, quarter, K, out + m * ldo + o, ldo); });
    for (int64_t o = from + 4 * quarter; o < O; o += PANEL) {
        const int64_t to = O - o < PANEL ? O : o + PANEL;
        in_groups<T>(M, [&](int64_t m, auto count) { tiles<count.value, 4>(x + m, w, ldw, o, to, K, out + m * ldo, ldo); });
    }
    if (K % Ready<T>::UNIT) add_rest(x, M, w, ldw, O, K, out, ldo);
}

// The same for one row.
template <typename T> static void row_times(const typename Ready<T>::type* x, const T* w, int64_t ldw, int64_t O, int64_t K, float* out) {
    rows_times(&x, 1, w, ldw, O, K, out, 0);
}

// Converted rows, in memory of their own.
template <typename T> struct ReadyRows {
    typedef typename Ready<T>::type X;
    int64_t ld;
    X* data;
    const X** rows;

    ReadyRows(int64_t count, int64_t K) : ld(ready_size<T>(K)) {
        data = (X*)aligned_alloc(64, (count * ld * sizeof(X) + 64) / 64 * 64);
        rows = (const X**)malloc((count + 1) * sizeof(X*));
        for (int64_t i = 0; i < count; i++) rows[i] = data + i * ld;
    }
    ReadyRows(const ReadyRows&) = delete;
    ~ReadyRows() { free(data), free(rows); }

    template <typename Y> void set(int64_t row, const Y* x, int64_t K) { ready<T>(x, K, data + row * ld); }
};
