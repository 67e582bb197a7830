// Router, experts, shared expert and their sum. Only the weights of chosen experts are read, each once.

// The K largest of E logits, and their softmax; of equal logits the first one comes first. A NaN among the logits makes all
// weights NaN. Overwrites the logits: a chosen one becomes NaN, which no comparison chooses again.
static void choose(float* logits, int64_t E, int64_t K, int64_t* ids, float* weights) {
    const int64_t BLOCK = 32, blocks = (E + BLOCK - 1) / BLOCK;
    float* most = (float*)malloc(blocks * sizeof(float));
    auto largest_of = [&](int64_t block) {
        vf found = splat(-INFINITY);
        for (int64_t e = block * BLOCK; e < E && e < (block + 1) * BLOCK; e += LANES) {
            vf l = load_upto(logits + e, E - e);
            for (int64_t i = E - e; i < LANES; i++) l[i] = -INFINITY;
            found = l > found ? l : found;
        }
        float largest = found[0];
        for (int i = 1; i < LANES; i++) largest = found[i] > largest ? found[i] : largest;
        return largest;
    };
    float nan = 0;
    for (int64_t e = 0; e < E; e++) nan += logits[e] != logits[e];
    if (nan)
        for (int64_t e = 0; e < E; e++) logits[e] = 0;
    for (int64_t block = 0; block < blocks; block++) most[block] = largest_of(block);
    for (int64_t k = 0; k < K; k++) {
        float largest = most[0];
        for (int64_t block = 1; block < blocks; block++) largest = most[block] > largest ? most[block] : largest;
        int64_t e = 0;
        while (most[e / BLOCK] != largest || logits[e] != largest) e += most[e / BLOCK] != largest ? BLOCK : 1;
        ids[k] = e;
        weights[k] = largest;
        logits[e] = NAN;
        most[e / BLOCK] = largest_of(e / BLOCK);
    }
    free(most);
    float top = nan ? NAN : weights[0], total = 0;
    for (int64_t k = 0; k < K; k++) total += weights[k] = expf(weights[k] - top);
    for (int64_t k = 0; k < K; k++) weights[k] /= total;
}

// act[m][i] = silu(gate[i] . x[m]) * (up[i] . x[m]) for I rows of gate and up, ready for the product with down
template <typename T, typename X = typename Ready<T>::type>
static void gated(const X* const* x, int64_t M, const T* gate, const T* up, int64_t I, int64_t H, float* hidden, X* act, int64_t ldact) {
    const int64_t BLOCK = 64;
    for (int64_t i = 0; i < I; i += BLOCK) {
        int64_t count = I - i < BLOCK ? I - i : BLOCK;
        rows_times(x, M, gate + i * H, H, count, H, hidden, 2 * BLOCK);
        rows_times(x, M, up + i * H, H, count, H, hidden + BLOCK, 2 * BLOCK);
        for (int64_t m = 0; m < M; m++) {
            float* h = hidden + m * 2 * BLOCK;
            for (int64_t j = 0; j < count; j += LANES) store(h + j, vsilu(load(h + j)) * load(h + BLOCK + j));  // lanes after count are not used
            ready<T>(h, count, act + m * ldact + i);
        }
    }
}

// One row: all threads work on each expert.
template <typename T> static void one_row(const Experts& p, int threads) {
    const int64_t K = p.K, I = p.I, H = p.H, S = p.S, UNIT = Ready<T>::UNIT;
    float* logits = (float*)malloc(p.E * sizeof(float));
    ReadyRows<T> acts(K + (S > 0), I > S ? I : S), xs(1, H);
    xs.set(0, (const T*)p.x, H);
    const auto* x = xs.data;
#pragma omp parallel num_threads(threads) if (K * I * H > PARALLEL)
    {
        const int index = omp_get_thread_num(), count = omp_get_num_threads();
        int64_t* ids = (int64_t*)malloc(K * sizeof(int64_t));
        float* weights = (float*)malloc(K * sizeof(float));
        float hidden[128] = {};
        if (p.router) {
            Range mine = share(p.E, index, count, LANES);
            row_times(x, (const T*)p.router + mine.begin * H, H, mine.end - mine.begin, H, logits + mine.begin);
#pragma omp barrier
            float* own = (float*)malloc(p.E * sizeof(float));
            memcpy(own, logits, p.E * sizeof(float));
            choose(own, p.E, K, ids, weights);
            free(own);
        } else {
            for (int64_t k = 0; k < K; k++) {
                ids[k] = p.ids[k] >= 0 && p.ids[k] < p.E ? p.ids[k] : -1;
                weights[k] = p.weights[k];
            }
        }
        const int64_t units = (I + UNIT - 1) / UNIT, shared_units = (S + UNIT - 1) / UNIT;
        Range mine = share(K * units + shared_units, index, count);
        for (int64_t u = mine.begin, many; u < mine.end; u += many) {
            const bool routed = u < K * units;
            const int64_t k = routed ? u / units : K, first = u - k * units, size = routed ? I : S;
            many = (routed ? units : shared_units) - first;  // the rest of the expert, or of this thread's part
            many = many < mine.end - u ? many : mine.end - u;
            if (routed && ids[k] < 0) continue;
            const int64_t i = first * UNIT, n = size - i < many * UNIT ? size - i : many * UNIT;
            const T* gate = routed ? (const T*)p.gate_up + ids[k] * p.ld_gate_up : (const T*)p.shared_gate;
            const T* up = routed ? gate + I * H : (const T*)p.shared_up;
            gated<T>(&x, 1, gate + i * H, up + i * H, n, H, hidden, acts.data + k * acts.ld + i, 0);
        }
        float scale = 0;
        if (S) row_times(x, (const T*)p.shared_scale, H, 1, H, &scale), scale = sigmoid(scale);
#pragma omp barrier
        mine = share(H, index, count, LANES);
        const int64_t rows = mine.end - mine.begin, padded = (rows + LANES - 1) / LANES * LANES;
        float* y = (float*)calloc(2 * padded + 1, sizeof(float));
        float* part = y + padded;
        for (int64_t k = 0; k < K + (S > 0); k++) {
            if (k < K && ids[k] < 0) continue;
            const int64_t size = k < K ? I : S;
            const T* down = k < K ? (const T*)p.down + ids[k] * p.ld_down : (const T*)p.shared_down;
            row_times(acts.rows[k], down + mine.begin * size, size, rows, size, part);
            const vf weight = splat(k < K ? weights[k] : scale);
            for (int64_t h = 0; h < padded; h += LANES) store(y + h, load(y + h) + weight * load(part + h));
        }
        T* out = (T*)p.y + mine.begin;
        for (int64_t h = 0; h < rows; h += LANES) store_upto(out + h, load(y + h), rows - h);
        free(y);
        free(ids);
        free(weights);
    }
    free(logits);
}

// Many rows: each thread computes whole experts, for the rows that chose them.
template <typename T> static void many_rows(const Experts& p, int threads) {
    const int64_t N = p.N, K = p.K, I = p.I, H = p.H, S = p.S, E = p.E, P = N * K, BLOCK = 64;
    typedef typename Ready<T>::type X;
    ReadyRows<T> xs(N, H);
    const X* const* x = xs.rows;
#pragma omp parallel for num_threads(threads) if (N * H > PARALLEL)
    for (int64_t n = 0; n < N; n++) xs.set(n, (const T*)p.x + n * p.ldx, H);
    int64_t* ids = (int64_t*)malloc(P * sizeof(int64_t));
    float* weights = (float*)malloc(P * sizeof(float));
    if (p.router) {
        float* logits = (float*)malloc(N * E * sizeof(float));
#pragma omp parallel num_threads(threads) if (N * E * H > PARALLEL)
        {
            Range mine = share(E, omp_get_thread_num(), omp_get_num_threads(), LANES);
            rows_times(x, N, (const T*)p.router + mine.begin * H, H, mine.end - mine.begin, H, logits + mine.begin, E);
#pragma omp barrier
#pragma omp for
            for (int64_t n = 0; n < N; n++) choose(logits + n * E, E, K, ids + n * K, weights + n * K);
        }
        free(logits);
    } else {
        memcpy(ids, p.ids, P * sizeof(int64_t));
        memcpy(weights, p.weights, P * sizeof(float));
    }

    // Choices sorted by expert: place[choice] is its row of `out`, picked[row] its row of x.
    int64_t* begin = (int64_t*)calloc(E + 1, sizeof(int64_t));
    int64_t* hit = (int64_t*)malloc(E * sizeof(int64_t));
    int64_t* place = (int64_t*)malloc(P * sizeof(int64_t));
    const X** picked = (const X**)malloc(P * sizeof(X*));
    for (int64_t i = 0; i < P; i++)
        if (ids[i] >= 0 && ids[i] < E) begin[ids[i] + 1]++;
    int64_t hits = 0;
    for (int64_t e = 0; e < E; e++) {
        if (begin[e + 1]) hit[hits++] = e;
        begin[e + 1] += begin[e];
    }
    int64_t* next = (int64_t*)malloc(E * sizeof(int64_t));
    memcpy(next, begin, E * sizeof(int64_t));
    for (int64_t i = 0; i < P; i++) {
        place[i] = ids[i] >= 0 && ids[i] < E ? next[ids[i]]++ : -1;
        if (place[i] >= 0) picked[place[i]] = x[i / K];
    }
    free(next);
    const int64_t held = begin[E], shared_tasks = S ? (N + BLOCK - 1) / BLOCK : 0;
    float* out = (float*)malloc((held + (S ? N : 0)) * H * sizeof(float) + 1);
#pragma omp parallel num_threads(threads) if (P * I * H > PARALLEL)
    {
        float* hidden = (float*)malloc(BLOCK * 128 * sizeof(float));
        ReadyRows<T> acts(BLOCK, I > S ? I : S);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < hits + shared_tasks; task++) {
            const bool routed = task < hits;
            const int64_t e = routed ? hit[task] : 0, size = routed ? I : S;
            const int64_t from = routed ? begin[e] : (task - hits) * BLOCK;
            const int64_t to = routed ? begin[e + 1] : from + BLOCK < N ? from + BLOCK : N;
            const T* gate = routed ? (const T*)p.gate_up + e * p.ld_gate_up : (const T*)p.shared_gate;
            const T* up = routed ? gate + I * H : (const T*)p.shared_up;
            const T* down = routed ? (const T*)p.down + e * p.ld_down : (const T*)p.shared_down;
            const X* const* rows = routed ? picked : x;
            for (int64_t r = from; r < to; r += BLOCK) {
                const int64_t M = to - r < BLOCK ? to - r : BLOCK;
                gated<T>(rows + r, M, gate, up, size, H, hidden, acts.data, acts.ld);
                rows_times(acts.rows, M, down, size, H, size, out + (routed ? r : held + r) * H, H);
            }
        }
        free(hidden);
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            float scale = 0;
            if (S) row_times(x[n], (const T*)p.shared_scale, H, 1, H, &scale), scale = sigmoid(scale);
            for (int64_t h = 0; h < H; h += LANES) {
                vf y = S ? splat(scale) * load_upto(out + (held + n) * H + h, H - h) : vf{};
                for (int64_t i = n * K; i < n * K + K; i++)
                    if (place[i] >= 0) y += splat(weights[i]) * load_upto(out + place[i] * H + h, H - h);
                store_upto((T*)p.y + n * H + h, y, H - h);
            }
        }
    }
    free(out), free(picked), free(place), free(hit), free(begin), free(weights), free(ids);
}

template <typename T> static void experts(const Experts& p, int threads) {
    if (p.N == 0) return;
    p.N == 1 ? one_row<T>(p, threads) : many_rows<T>(p, threads);
}
