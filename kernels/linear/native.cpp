// Rows times several weights. Each thread prepares the rows for itself, a block at a time. With few rows, each weight is read
// once, in memory order.

template <typename T> static void project(const Project& p, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < p.num_weights; i++) total += p.sizes[i];
#pragma omp parallel num_threads(threads) if (total * p.H * p.N > PARALLEL)
    {
        const int64_t ROWS = 128, BLOCK = 48, most = p.N < ROWS ? p.N : ROWS;
        ReadyRows<T> x(most, p.H);
        float* out = (float*)malloc(most * BLOCK * sizeof(float));
        const Range mine = share(total, omp_get_thread_num(), omp_get_num_threads(), LANES);
        for (int64_t row = 0; row < p.N; row += ROWS) {
            const int64_t M = p.N - row < ROWS ? p.N - row : ROWS;
            for (int64_t m = 0; m < M; m++) x.set(m, (const T*)p.x + (row + m) * p.ldx, p.H);
            int64_t first = 0;
            for (int64_t i = 0; i < p.num_weights; first += p.sizes[i++]) {
                const int64_t begin = mine.begin > first ? mine.begin - first : 0;
                const int64_t end = mine.end - first < p.sizes[i] ? mine.end - first : p.sizes[i];
                for (int64_t o = begin; o < end; o += BLOCK) {
                    const int64_t count = end - o < BLOCK ? end - o : BLOCK;
                    rows_times(x.rows, M, (const T*)p.weights[i] + o * p.H, p.H, count, p.H, out, BLOCK);
                    for (int64_t m = 0; m < M; m++) {
                        T* y = (T*)p.y + (row + m) * p.ldy + first + o;
                        for (int64_t j = 0; j < count; j += LANES)
                            store_upto(y + j, load_upto(out + m * BLOCK + j, count - j), count - j);
                    }
                }
            }
        }
        free(out);
    }
}
