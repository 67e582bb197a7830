// Rotary position embedding, head by head.

template <typename T> static void rope(const Rope& p, int threads) {
#pragma omp parallel for num_threads(threads) if (p.T * p.H * p.D > PARALLEL)
    for (int64_t t = 0; t < p.T; t++) {
        const T *cos = (const T*)p.cos + t * p.ldcos, *sin = (const T*)p.sin + t * p.ldsin;
        for (int64_t h = 0; h < p.H; h++) {
            const T* x = (const T*)p.x + t * p.ldx_token + h * p.ldx_head;
            T* y = (T*)p.y + (t * p.H + h) * p.D;
            for (int64_t i = 0; i < p.R; i += LANES) {
                const int64_t n = p.R - i;
                const vf a = load_upto(x + i, n), b = load_upto(x + p.R + i, n);
                const vf c = load_upto(cos + i, n), s = load_upto(sin + i, n);
                store_upto(y + i, a * c - b * s, n);
                store_upto(y + p.R + i, b * c + a * s, n);
            }
            memcpy(y + 2 * p.R, x + 2 * p.R, (p.D - 2 * p.R) * sizeof(T));
        }
    }
}
