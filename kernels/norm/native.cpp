// Root-mean-square norms, row by row.

// `size` features from feature h of a row; `gated` has room for them
template <typename T> static void norm_span(const Norm& p, const T* x, const T* gate, int64_t h, int64_t size, float* gated, T* y) {
    vf squares = vf{};
    for (int64_t i = 0; i < size; i += LANES) {
        vf v = load_upto(x + i, size - i);
        if (p.kind == 2) v *= vsilu(load_upto(gate + i, size - i)), store(gated + i, v);
        squares += v * v;
    }
    const vf scale = splat(1.0f / sqrtf(sum(squares) / size + p.eps));
    const T* weight = (const T*)p.weight + h;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i;
        const vf v = (p.kind == 2 ? load(gated + i) : load_upto(x + i, n)) * scale, w = load_upto(weight + i, n);
        vf out = p.kind == 0 ? v + v * w : v * w;
        if (p.kind == 1) out *= vsilu(load_upto(gate + i, n));
        store_upto(y + i, out, n);
    }
}

template <typename T> static void norm(const Norm& p, int threads) {
    const int64_t size = p.kind == 2 ? p.H / p.G : p.H;
#pragma omp parallel num_threads(threads) if (p.N * p.H > PARALLEL)
    {
        float* gated = (float*)malloc((size + LANES) * sizeof(float));
#pragma omp for
        for (int64_t n = 0; n < p.N; n++)
            for (int64_t h = 0; h < p.H; h += size) {
                const T* gate = p.gate ? (const T*)p.gate + n * p.ldgate + h : nullptr;
                norm_span(p, (const T*)p.x + n * p.ldx + h, gate, h, size, gated, (T*)p.y + n * p.H + h);
            }
        free(gated);
    }
}
