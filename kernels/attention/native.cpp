// Attention of one token of each sequence over pages of keys and values. A task is one KV head of one sequence, with all
// query heads that share it, so each key and value is read once, in place.

// sums[r][c] = sum_s p[r][s] v[s][c] for R rows of p that lie `lds` apart and N vectors of columns, over the
// tokens of all pages.
template <int R, int N, typename T>
INLINE void weigh(const Attend& p, const int64_t* pages, int64_t length, const T* values, const float* scores, int64_t lds, int64_t left, T* o) {
    vf acc[R][N] = {};
    for (int64_t s = 0; s < length;) {
        const T* v = values + pages[s / p.L] * p.ld_page;
        const int64_t end = s + p.L < length ? s + p.L : length;
        for (; s < end; s++, v += p.ld_token) {
            vf row[N];
            for (int n = 0; n < N; n++) row[n] = left >= N * LANES ? load(v + n * LANES) : load_upto(v, left);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) acc[r][n] += scores[r * lds + s] * row[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) left >= N * LANES ? store(o + r * p.D + n * LANES, acc[r][n]) : store_upto(o + r * p.D, acc[r][n], left);
}

template <int R, typename T>
INLINE void weigh_columns(const Attend& p, const int64_t* pages, int64_t length, const T* values, const float* scores, int64_t lds, T* o) {
    int64_t c = 0;
    for (; c + 4 * LANES <= p.D; c += 4 * LANES) weigh<R, 4>(p, pages, length, values + c, scores, lds, p.D - c, o + c);
    for (; c < p.D; c += LANES) weigh<R, 1>(p, pages, length, values + c, scores, lds, p.D - c, o + c);
}

// Softmax of n scores times a factor.
INLINE void softmax(float* scores, int64_t n, float factor) {
    vf most = splat(-INFINITY);
    for (int64_t s = 0; s < n; s += LANES) {
        vf x = load_upto(scores + s, n - s);
        for (int64_t i = n - s; i < LANES; i++) x[i] = -INFINITY;
        most = x > most ? x : most;
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    vf total = vf{};
    for (int64_t s = 0; s < n; s += LANES) {
        vf x = vexp((load_upto(scores + s, n - s) - top) * factor);
        for (int64_t i = n - s; i < LANES; i++) x[i] = 0;
        store_upto(scores + s, x, n - s);
        total += x;
    }
    const float scale = 1 / sum(total);
    for (int64_t s = 0; s < n; s += LANES) store_upto(scores + s, load_upto(scores + s, n - s) * scale, n - s);
}

template <typename T> static void attend(const Attend& p, int threads) {
    const int64_t D = p.D, R = p.Q / p.K;
    int64_t tokens = 0, longest = 0;
    for (int64_t b = 0; b < p.B; b++) tokens += p.lengths[b], longest = p.lengths[b] > longest ? p.lengths[b] : longest;
#pragma omp parallel num_threads(threads) if (tokens * p.Q * D > PARALLEL)
    {
        ReadyRows<T> q(R, D);
        float* scores = (float*)malloc(R * longest * sizeof(float) + 1);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.B * p.K; task++) {
            const int64_t b = task / p.K, k = task % p.K, length = p.lengths[b];
            const int64_t* pages = p.table + b * p.ld_table;
            const T* keys = (const T*)p.kv + k * D;
            for (int64_t r = 0; r < R; r++) q.set(r, (const T*)p.q + b * p.ldq + (k * R + r) * D, D);
            for (int64_t s = 0; s < length; s += p.L) {
                const int64_t count = length - s < p.L ? length - s : p.L;
                rows_times(q.rows, R, keys + pages[s / p.L] * p.ld_page, p.ld_token, count, D, scores + s, longest);
            }
            for (int64_t r = 0; r < R; r++) softmax(scores + r * longest, length, 1 / sqrtf(D));
            T* o = (T*)p.o + (b * p.Q + k * R) * D;
            const T* values = keys + p.K * D;
            int64_t r = 0;
            for (; r + 2 <= R; r += 2) weigh_columns<2>(p, pages, length, values, scores + r * longest, longest, o + r * D);
            if (r < R) weigh_columns<1>(p, pages, length, values, scores + r * longest, longest, o + r * D);
        }
        free(scores);
    }
}
