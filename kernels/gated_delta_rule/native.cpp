// The gated delta rule, token by token. Columns of a state are independent, so a block of columns stays in the first-level
// cache for a whole sequence. This takes fewer operations than a chunked form, and rounds like the definition.

// x / |x| times a factor, in floats
template <typename T> INLINE void unit_vector(const T* x, int64_t K, float factor, float* unit) {
    vf squares = vf{};
    for (int64_t i = 0; i < K; i += LANES) {
        const vf v = load_upto(x + i, K - i);
        store_upto(unit + i, v, K - i);
        squares += v * v;
    }
    const float scale = factor / sqrtf(sum(squares) + 1e-6f);
    for (int64_t i = 0; i < K; i += LANES) store_upto(unit + i, load_upto(unit + i, K - i) * scale, K - i);
}

INLINE float inner(const float* a, const float* b, int64_t n) {
    vf acc = vf{};
    for (int64_t i = 0; i < n; i += LANES) acc += load_upto(a + i, n - i) * load_upto(b + i, n - i);
    return sum(acc);
}

// One token on NV * LANES columns: S = decay S, d = beta (v - S^T k), S += k d^T, o = S^T q. o is computed from the
// previous S as decay S^T q + (q . k) d, so that one pass over S serves both sums.
template <int NV>
INLINE void rule_token(float* S, int64_t ld, int64_t K, const float* q, const float* k, float qk, float decay, float beta, const vf* v, vf* o) {
    vf read[NV] = {}, seen[NV] = {}, d[NV];
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < NV; j++) {
            const vf s = load(S + i * ld + j * LANES);
            read[j] += k[i] * s;
            seen[j] += q[i] * s;
        }
    for (int j = 0; j < NV; j++) {
        d[j] = beta * (v[j] - decay * read[j]);
        o[j] = decay * seen[j] + qk * d[j];
    }
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < NV; j++) store(S + i * ld + j * LANES, decay * load(S + i * ld + j * LANES) + k[i] * d[j]);
}

const int64_t RULE_PARTS = 8, RULE_BLOCK = RULE_PARTS * LANES;

// A block of up to RULE_BLOCK columns of one head, for the tokens `begin` to `end`; `scratch` holds K (RULE_BLOCK + 2).
template <typename T>
static void rule_columns(const Rule& p, int64_t b, int64_t h, int64_t column, int64_t begin, int64_t end, float* scratch) {
    const int64_t K = p.K, count = p.V - column < RULE_BLOCK ? p.V - column : RULE_BLOCK, m = h / (p.H / p.M);
    float* pool = p.state + p.slots[b] * p.ld_state + h * K * p.V + column;
    float *S = scratch, *q = scratch + K * RULE_BLOCK, *k = q + K;
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < RULE_PARTS; j++) {
            const int64_t left = count - j * LANES;
            store(S + i * RULE_BLOCK + j * LANES, left > 0 ? load_upto(pool + i * p.V + j * LANES, left) : vf{});
        }
    for (int64_t t = begin; t < end; t++) {
        unit_vector((const T*)p.q + t * p.ldq + m * K, K, 1 / sqrtf(K), q);
        unit_vector((const T*)p.k + t * p.ldk + m * K, K, 1, k);
        const T* row = (const T*)p.v + t * p.ldv + h * p.V + column;
        T* out = (T*)p.o + (t * p.H + h) * p.V + column;
        const float decay = expf(p.g[t * p.ldg + h]), beta = p.beta[t * p.ldbeta + h], qk = inner(q, k, K);
        for (int64_t part = 0; part < count; part += 4 * LANES) {
            vf v[4], o[4];
            for (int j = 0; j < 4; j++) {
                const int64_t at = part + j * LANES;
                v[j] = count > at ? load_upto(row + at, count - at) : vf{};
            }
            rule_token<4>(S + part, RULE_BLOCK, K, q, k, qk, decay, beta, v, o);
            for (int j = 0; j < 4; j++) {
                const int64_t at = part + j * LANES;
                if (count > at) store_upto(out + at, o[j], count - at);
            }
        }
    }
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < RULE_PARTS; j++)
            if (count > j * LANES) store_upto(pool + i * p.V + j * LANES, load(S + i * RULE_BLOCK + j * LANES), count - j * LANES);
}

template <typename T> static void rule(const Rule& p, int threads) {
    const int64_t blocks = (p.V + RULE_BLOCK - 1) / RULE_BLOCK;
#pragma omp parallel num_threads(threads) if (p.starts[p.B] * p.H * p.K * p.V > PARALLEL)
    {
        float* scratch = (float*)malloc(p.K * (RULE_BLOCK + 2) * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.B * p.H * blocks; task++) {
            const int64_t b = task / (p.H * blocks), h = task / blocks % p.H;
            if (p.starts[b + 1] > p.starts[b])
                rule_columns<T>(p, b, h, task % blocks * RULE_BLOCK, p.starts[b], p.starts[b + 1], scratch);
        }
        free(scratch);
    }
}

INLINE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// Convolution, gates, rule and gated norm of one token of each sequence.
template <typename T> static void rule_decode(const RuleDecode& p, int threads) {
    const int64_t B = p.B, M = p.M, H = p.H, K = p.K, V = p.V, C = 2 * M * K + H * V;
    const int64_t blocks = (C + STRIP - 1) / STRIP, columns = (V + LANES - 1) / LANES * LANES;
    float* qkv = (float*)malloc(B * C * sizeof(float));
    const Conv in = {p.qkv, p.ldqkv, B, C, p.W, nullptr, p.conv_weight, nullptr, p.conv, p.ld_conv, p.slots, nullptr, 0};
#pragma omp parallel num_threads(threads) if (B * H * K * V > PARALLEL)
    {
#pragma omp for
        for (int64_t task = 0; task < B * blocks; task++) {
            const int64_t b = task / blocks, c = task % blocks * STRIP;
            conv_channels(in, c, b, b + 1, (T*)p.conv + p.slots[b] * p.ld_conv, qkv + b * C, C);
        }
        float* q = (float*)malloc((2 * K + columns) * sizeof(float));
        float *k = q + K, *o = k + K;
#pragma omp for
        for (int64_t task = 0; task < B * H; task++) {
            const int64_t b = task / H, h = task % H, m = h / (H / M);
            const float* row = qkv + b * C;
            const float* v = row + 2 * M * K + h * V;
            unit_vector(row + m * K, K, 1 / sqrtf(K), q);
            unit_vector(row + (M + m) * K, K, 1, k);
            const float qk = inner(q, k, K);
            const float beta = sigmoid(widen(((const T*)p.b)[b * p.ldb + h]));
            const float a = widen(((const T*)p.a)[b * p.lda + h]) + widen(((const T*)p.dt_bias)[h]);
            const float decay = expf(-expf(widen(((const T*)p.A_log)[h])) * softplus(a));
            float* S = p.state + p.slots[b] * p.ld_state + h * K * V;
            int64_t column = 0;
            for (; column + 4 * LANES <= V; column += 4 * LANES) {
                const vf in[4] = {load(v + column), load(v + column + LANES), load(v + column + 2 * LANES), load(v + column + 3 * LANES)};
                vf out[4];
                rule_token<4>(S + column, V, K, q, k, qk, decay, beta, in, out);
                for (int j = 0; j < 4; j++) store(o + column + j * LANES, out[j]);
            }
            for (; column + LANES <= V; column += LANES) {
                const vf in = load(v + column);
                vf out;
                rule_token<1>(S + column, V, K, q, k, qk, decay, beta, &in, &out);
                store(o + column, out);
            }
            for (; column < V; column++) {
                float read = 0, out = 0;
                for (int64_t i = 0; i < K; i++) read += k[i] * S[i * V + column];
                const float d = beta * (v[column] - read * decay);
                for (int64_t i = 0; i < K; i++) out += q[i] * (S[i * V + column] = decay * S[i * V + column] + k[i] * d);
                o[column] = out;
            }
            vf squares = vf{};
            for (int64_t i = 0; i < V; i += LANES) {
                const vf x = load_upto(o + i, V - i);
                squares += x * x;
            }
            const vf scale = splat(1.0f / sqrtf(sum(squares) / V + p.eps));
            const T* z = (const T*)p.z + b * p.ldz + h * V;
            for (int64_t i = 0; i < V; i += LANES) {
                const vf x = load_upto(o + i, V - i) * scale * load_upto((const T*)p.norm_weight + i, V - i);
                store_upto((T*)p.y + (b * H + h) * V + i, x * vsilu(load_upto(z + i, V - i)), V - i);
            }
        }
        free(q);
    }
    free(qkv);
}
