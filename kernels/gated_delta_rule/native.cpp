// The gated delta rule, token by token. Columns of a state do not mix, so a block of them stays in the first-level cache
// for a whole sequence; with that, fewer operations than a chunked form, and its rounding is that of the definition.

// 1 / |x| and x in floats
template <typename T> INLINE float unit_scale(const T* x, int64_t K, float* wide) {
    vf squares = vf{};
    for (int64_t i = 0; i < K; i += LANES) {
        const vf v = load_upto(x + i, K - i);
        store_upto(wide + i, v, K - i);
        squares += v * v;
    }
    return 1.0f / sqrtf(sum(squares) + 1e-6f);
}

// One token on NV * LANES columns: S = decay S, d = beta (v - S^T k), S += k d^T, o = S^T q; k and q are scaled first.
template <int NV>
INLINE void rule_token(float* S, int64_t ld, int64_t K, const float* q, const float* k, float q_scale, float k_scale, float decay, float beta, const vf* v, vf* o) {
    vf read[NV] = {}, d[NV];
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < NV; j++) read[j] += k[i] * load(S + i * ld + j * LANES);
    for (int j = 0; j < NV; j++) {
        d[j] = beta * (v[j] - read[j] * (k_scale * decay)) * k_scale;
        o[j] = vf{};
    }
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < NV; j++) {
            const vf s = decay * load(S + i * ld + j * LANES) + k[i] * d[j];
            store(S + i * ld + j * LANES, s);
            o[j] += q[i] * s;
        }
    for (int j = 0; j < NV; j++) o[j] *= q_scale;
}

const int64_t RULE_BLOCK = 4 * LANES;

// A block of up to RULE_BLOCK columns of one head, for the tokens `begin` to `end`; `scratch` holds K (RULE_BLOCK + 2).
template <typename T>
static void rule_columns(const Rule& p, int64_t b, int64_t h, int64_t column, int64_t begin, int64_t end, float* scratch) {
    const int64_t K = p.K, count = p.V - column < RULE_BLOCK ? p.V - column : RULE_BLOCK, m = h / (p.H / p.M);
    float* pool = p.state + p.slots[b] * p.ld_state + h * K * p.V + column;
    float *S = scratch, *q = scratch + K * RULE_BLOCK, *k = q + K;
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < 4; j++) {
            const int64_t left = count - j * LANES;
            store(S + i * RULE_BLOCK + j * LANES, left > 0 ? load_upto(pool + i * p.V + j * LANES, left) : vf{});
        }
    for (int64_t t = begin; t < end; t++) {
        const float q_scale = unit_scale((const T*)p.q + t * p.ldq + m * K, K, q) / sqrtf(K);
        const float k_scale = unit_scale((const T*)p.k + t * p.ldk + m * K, K, k);
        const T* row = (const T*)p.v + t * p.ldv + h * p.V + column;
        vf v[4], o[4];
        for (int j = 0; j < 4; j++) v[j] = count > j * LANES ? load_upto(row + j * LANES, count - j * LANES) : vf{};
        const float decay = expf(p.g[t * p.ldg + h]), beta = p.beta[t * p.ldbeta + h];
        rule_token<4>(S, RULE_BLOCK, K, q, k, q_scale, k_scale, decay, beta, v, o);
        T* out = (T*)p.o + (t * p.H + h) * p.V + column;
        for (int j = 0; j < 4; j++)
            if (count > j * LANES) store_upto(out + j * LANES, o[j], count - j * LANES);
    }
    for (int64_t i = 0; i < K; i++)
        for (int j = 0; j < 4; j++)
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
    const int64_t blocks = (C + LANES - 1) / LANES, columns = (V + LANES - 1) / LANES * LANES;
    float* qkv = (float*)malloc(B * C * sizeof(float));
    const Conv in = {p.qkv, p.ldqkv, B, C, p.W, nullptr, p.conv_weight, nullptr, p.conv, p.ld_conv, p.slots, nullptr, 0};
#pragma omp parallel num_threads(threads) if (B * H * K * V > PARALLEL)
    {
#pragma omp for
        for (int64_t task = 0; task < B * blocks; task++) {
            const int64_t b = task / blocks, c = task % blocks * LANES;
            conv_channels(in, c, b, b + 1, (T*)p.conv + p.slots[b] * p.ld_conv, qkv + b * C, C);
        }
        float* q = (float*)malloc((2 * K + columns) * sizeof(float));
        float *k = q + K, *o = k + K;
#pragma omp for
        for (int64_t task = 0; task < B * H; task++) {
            const int64_t b = task / H, h = task % H, m = h / (H / M);
            const float* row = qkv + b * C;
            const float* v = row + 2 * M * K + h * V;
            const float q_scale = unit_scale(row + m * K, K, q) / sqrtf(K);
            const float k_scale = unit_scale(row + (M + m) * K, K, k);
            const float beta = sigmoid(widen(((const T*)p.b)[b * p.ldb + h]));
            const float a = widen(((const T*)p.a)[b * p.lda + h]) + widen(((const T*)p.dt_bias)[h]);
            const float decay = expf(-expf(widen(((const T*)p.A_log)[h])) * softplus(a));
            float* S = p.state + p.slots[b] * p.ld_state + h * K * V;
            int64_t column = 0;
            for (; column + 4 * LANES <= V; column += 4 * LANES) {
                const vf in[4] = {load(v + column), load(v + column + LANES), load(v + column + 2 * LANES), load(v + column + 3 * LANES)};
                vf out[4];
                rule_token<4>(S + column, V, K, q, k, q_scale, k_scale, decay, beta, in, out);
                for (int j = 0; j < 4; j++) store(o + column + j * LANES, out[j]);
            }
            for (; column + LANES <= V; column += LANES) {
                const vf in = load(v + column);
                vf out;
                rule_token<1>(S + column, V, K, q, k, q_scale, k_scale, decay, beta, &in, &out);
                store(o + column, out);
            }
            for (; column < V; column++) {
                float read = 0, out = 0;
                for (int64_t i = 0; i < K; i++) read += k[i] * S[i * V + column];
                const float d = beta * (v[column] - read * k_scale * decay) * k_scale;
                for (int64_t i = 0; i < K; i++) out += q[i] * (S[i * V + column] = decay * S[i * V + column] + k[i] * d);
                o[column] = out * q_scale;
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
