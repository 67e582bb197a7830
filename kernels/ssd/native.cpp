// The Mamba-2 recurrence, token by token. Rows of a state are independent, so LANES of them stay in the first-level cache
// for a whole sequence.

// One token on `rows` rows of a state whose rows lie `ld` apart, a multiple of LANES: S = decay S + (dt x) b^T, y = S c.
INLINE vf scan_token(float* S, int64_t ld, int64_t rows, const float* b, const float* c, float decay, float dt, vf x) {
    float dtx[LANES], y[LANES] = {};
    store(dtx, dt * x);
    auto row = [&](int64_t r) {
        vf acc = vf{};
        for (int64_t n = 0; n < ld; n += LANES) {
            const vf s = decay * load(S + r * ld + n) + dtx[r] * load(b + n);
            store(S + r * ld + n, s);
            acc += s * load(c + n);
        }
        return acc;
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const v4 four = sums(row(r), row(r + 1), row(r + 2), row(r + 3));
        __builtin_memcpy(y + r, &four, sizeof four);
    }
    for (; r < rows; r++) y[r] = sum(row(r));
    return load(y);
}

template <typename T> INLINE void widen_row(const T* x, int64_t n, float* wide) {
    for (int64_t i = 0; i < n; i += LANES) store(wide + i, load_upto(x + i, n - i));
}

INLINE void copy_rows(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += LANES) store_upto(to + r * ld_to + i, load_upto(from + r * ld_from + i, n - i), n - i);
}

template <typename T> static void scan(const Scan& p, int threads) {
    const int64_t blocks = (p.P + LANES - 1) / LANES, ld = (p.N + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads) if (p.starts[p.B] * p.H * p.P * p.N > PARALLEL)
    {
        float* S = (float*)calloc((LANES + 2) * ld, sizeof(float));
        float *b = S + LANES * ld, *c = b + ld;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.B * p.H * blocks; task++) {
            const int64_t s = task / (p.H * blocks), h = task / blocks % p.H, row = task % blocks * LANES;
            const int64_t rows = p.P - row < LANES ? p.P - row : LANES, g = h / (p.H / p.G);
            const float A = p.A[h], D = widen(((const T*)p.D)[h]);
            float* pool = p.state + p.slots[s] * p.ld_state + (h * p.P + row) * p.N;
            if (p.starts[s] == p.starts[s + 1]) continue;
            copy_rows(S, ld, pool, p.N, rows, p.N);
            for (int64_t t = p.starts[s]; t < p.starts[s + 1]; t++) {
                widen_row((const T*)p.b + t * p.ldb + g * p.N, p.N, b);
                widen_row((const T*)p.c + t * p.ldc + g * p.N, p.N, c);
                const vf x = load_upto((const T*)p.x + t * p.ldx + h * p.P + row, rows);
                const float dt = p.dt[t * p.lddt + h];
                const vf y = scan_token(S, ld, rows, b, c, expf(dt * A), dt, x) + D * x;
                store_upto((T*)p.y + (t * p.H + h) * p.P + row, y, rows);
            }
            copy_rows(pool, p.N, S, ld, rows, p.N);
        }
        free(S);
    }
}

// Convolution, time step, recurrence, and the gated norm if it has a weight, of one token of each sequence.
template <typename T> static void scan_decode(const ScanDecode& p, int threads) {
    const int64_t B = p.B, H = p.H, P = p.P, G = p.G, N = p.N, I = H * P, C = I + 2 * G * N;
    const int64_t blocks = (C + STRIP - 1) / STRIP, ld = (N + LANES - 1) / LANES * LANES;
    float* xbc = (float*)malloc(B * (C + I) * sizeof(float));
    float* ys = xbc + B * C;
    const Conv in = {p.xbc, p.ldxbc, B, C, p.W, nullptr, p.conv_weight, p.conv_bias, p.conv, p.ld_conv, p.slots, nullptr, 0};
#pragma omp parallel num_threads(threads) if (B * H * P * N > PARALLEL)
    {
#pragma omp for
        for (int64_t task = 0; task < B * blocks; task++) {
            const int64_t b = task / blocks, c = task % blocks * STRIP;
            conv_channels(in, c, b, b + 1, (T*)p.conv + p.slots[b] * p.ld_conv, xbc + b * C, C);
        }
        float* S = (float*)calloc((LANES + 2) * ld, sizeof(float));
        float *b_row = S + LANES * ld, *c_row = b_row + ld;
#pragma omp for
        for (int64_t task = 0; task < B * H; task++) {
            const int64_t s = task / H, h = task % H, g = h / (H / G);
            const float* row = xbc + s * C;
            const float raw = softplus(widen(((const T*)p.dt)[s * p.lddt + h]) + widen(((const T*)p.dt_bias)[h]));
            const float dt = raw < p.dt_min ? p.dt_min : raw > p.dt_max ? p.dt_max : raw;  // NaN stays NaN
            const float decay = expf(-expf(widen(((const T*)p.A_log)[h])) * dt), D = widen(((const T*)p.D)[h]);
            widen_row(row + I + g * N, N, b_row);
            widen_row(row + I + (G + g) * N, N, c_row);
            for (int64_t r = 0; r < P; r += LANES) {
                const int64_t rows = P - r < LANES ? P - r : LANES;
                float* pool = p.state + p.slots[s] * p.ld_state + (h * P + r) * N;
                const vf x = load_upto(row + h * P + r, rows);
                if (ld != N) copy_rows(S, ld, pool, N, rows, N);
                const vf y = scan_token(ld == N ? pool : S, ld, rows, b_row, c_row, decay, dt, x) + D * x;
                if (ld != N) copy_rows(pool, N, S, ld, rows, N);
                store_upto(ys + s * I + h * P + r, y, rows);
            }
        }
        free(S);
#pragma omp for
        for (int64_t task = 0; task < B * G; task++) {
            const int64_t s = task / G, size = I / G, from = task % G * size;
            float* y = ys + s * I + from;
            T* out = (T*)p.y + s * I + from;
            vf squares = vf{};
            for (int64_t i = 0; p.norm_weight && i < size; i += LANES) {
                const vf v = load_upto(y + i, size - i) * vsilu(load_upto((const T*)p.z + s * p.ldz + from + i, size - i));
                store_upto(y + i, v, size - i);
                squares += v * v;
            }
            const vf scale = splat(1.0f / sqrtf(sum(squares) / size + p.eps));
            for (int64_t i = 0; i < size; i += LANES) {
                vf v = load_upto(y + i, size - i);
                if (p.norm_weight) v *= scale * load_upto((const T*)p.norm_weight + from + i, size - i);
                store_upto(out + i, v, size - i);
            }
        }
    }
    free(xbc);
}
