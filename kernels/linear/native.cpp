// A few rows times several weights. Each weight is read once, in the order in which it lies in memory.

template <typename T> static void project(const Project& p, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < p.num_weights; i++) total += p.sizes[i];
#pragma omp parallel num_threads(threads) if (total * p.H * p.N > PARALLEL)
    {
        const int64_t BLOCK = 64;
        const T** x = (const T**)malloc(p.N * sizeof(T*));
        float* out = (float*)malloc(p.N * BLOCK * sizeof(float));
        for (int64_t n = 0; n < p.N; n++) x[n] = (const T*)p.x + n * p.ldx;
        Range mine = share(total, omp_get_thread_num(), omp_get_num_threads(), LANES);
        int64_t first = 0;
        for (int64_t i = 0; i < p.num_weights; first += p.sizes[i++]) {
            int64_t begin = mine.begin > first ? mine.begin - first : 0;
            int64_t end = mine.end - first < p.sizes[i] ? mine.end - first : p.sizes[i];
            for (int64_t o = begin; o < end; o += BLOCK) {
                int64_t count = end - o < BLOCK ? end - o : BLOCK;
                rows_times(x, p.N, (const T*)p.weights[i] + o * p.H, p.H, count, p.H, out, BLOCK);
                for (int64_t n = 0; n < p.N; n++) {
                    T* y = (T*)p.y + n * p.ldy + first + o;
                    for (int64_t j = 0; j < count; j += LANES)
                        store_upto(y + j, load_upto(out + n * BLOCK + j, count - j), count - j);
                }
            }
        }
        free(x);
        free(out);
    }
}
