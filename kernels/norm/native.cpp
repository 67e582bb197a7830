// Root-mean-square norms, a row after another.

template <typename T> INLINE vf norm_input(const Norm& p, const T* x, const T* gate, int64_t i, int64_t n) {
    const vf v = load_upto(x + i, n);
    return p.kind == 2 ? v * vsilu(load_upto(gate + i, n)) : v;
}

// `size` features from feature h of a row
template <typename T> static void norm_span(const Norm& p, const T* x, const T* gate, int64_t h, int64_t size, T* y) {
    vf squares = vf{};
    for (int64_t i = 0; i < size; i += LANES) {
        const vf v = norm_input(p, x, gate, i, size - i);
        squares += v * v;
    }
    const vf scale = splat(1.0f / sqrtf(sum(squares) / size + p.eps));
    const T* weight = (const T*)p.weight + h;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i;
        const vf v = norm_input(p, x, gate, i, n) * scale, w = load_upto(weight + i, n);
        vf out = p.kind == 0 ? v + v * w : v * w;
        if (p.kind == 1) out *= vsilu(load_upto(gate + i, n));
        store_upto(y + i, out, n);
    }
}

template <typename T> static void norm(const Norm& p, int threads) {
    const int64_t size = p.kind == 2 ? p.H / p.G : p.H;
#pragma omp parallel for num_threads(threads) if (p.N * p.H > PARALLEL)
    for (int64_t n = 0; n < p.N; n++)
        for (int64_t h = 0; h < p.H; h += size) {
            const T* gate = p.gate ? (const T*)p.gate + n * p.ldgate + h : nullptr;
            norm_span(p, (const T*)p.x + n * p.ldx + h, gate, h, size, (T*)p.y + n * p.H + h);
        }
}
